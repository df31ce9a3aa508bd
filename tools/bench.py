"""How fast, how much memory, against what: one command, one process, the same batches for every row, random
weights, no download.

    python -m tools.bench config/bench_cpu.py                                   a laptop, about 10 minutes
    python -m tools.bench config/math.py --shape=8x512/128 --arch=llama3-8b     one H100 or H200
    python -m tools.bench config/bench_cpu.py --arch=qwen2.5-0.5b --dtype=bfloat16 --shape=4x512/3 \
        --mlp_sparsity='{"1-22": .97}' --rows=HF,dense,map                      another model, some rows
    python -m tools.bench --report              writes results/bench.md from all of results/bench/*.json

    --shape=BxS/N     B examples of S tokens, the last N scored; else batch_size, max_seq_len, a quarter of it
    --arch=NAME       config/models/NAME.json instead of the config's model
    --steps=20        timed steps of each row
    --rows=WORD,WORD  only the rows in whose names one of these words is
    --compile=True    HF + PEFT under torch.compile too, which takes minutes to compile
    --kernels=False   without the table of single products, which only a GPU has
    --real=False      without the rows on GSM8K's lengths
    --out=FILE        results/bench/<device>-<model>-<shape>-<dtype>.json
    --option=value    everything else is train.py's: --recompute=True, --threads=1, --map_rank=32 ...

Rows, one step of each in turn, round by round:

    HF + PEFT                transformers + peft: sdpa, the batch padded to its longest text (or to S). The
                             same weights (views of ours), r, targets and AdamW (fused); adapters in the
                             model's dtype and no autocast: as fast as it goes.
    HF + PEFT, torch.compile the same, compiled for one shape: always padded to S
    dense LoRA               ours: no padding, rows that nothing reads any more are skipped. The baseline of
                             every claim about sparsity.
    + MLP, svd               ours, sparse: channels chosen in every step, as published
    + MLP, measured          channels that were measured before, their rows copied out; without a map
    + MLP, measured + map    the same channels, and the low-rank map that stands in for the dropped ones
    + attention, ...         the same with sparse attention too, where the config has ratios for it; without queries
                             (a ratio of 1) only the row with a map
    + backward               every row computes everything in the forward; in the backward the config's
                             backward_sparsity, instead of channels
    ... + 4 bits             with --base_bits=4, after each row of ours: the same on the same base, packed in 4 bits

The columns: tools/bench_report.py. A row that cannot run says why. Nothing is filled in.
"""
import functools
import json
import os
import random
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import torch

import config
import data
import kernels
import predictor
import train
from config import UserError
from lib import dist
from lib.cli import run, split_options
from lib.files import read_json, write_text
from model import TARGETS, LLaMA, ModelConfig
from sparse import Keep
from tools import bench_measure, bench_report

ROOT = Path(config.ROOT)
OWN = dict(shape="", arch="", steps=20, rows="", compile=False, kernels=True, real=True, report=False,
           out="")

# GSM8K's training set under the Alpaca template in LLaMA-3 tokens: prompt+answer of 96 of its 7,473 examples,
# evenly spaced in order of length. Mean prompt 83, answer 101 (of all: 82, 101).
GSM8K = """
50+45 76+23 58+45 58+48 60+49 62+49 61+52 63+52 65+52 64+55 58+63 68+54 69+55 55+71 65+62 77+51 61+69 83+48
67+66 80+54 86+49 65+72 72+66 78+61 62+79 74+68 61+83 69+76 75+71 87+60 61+88 78+72 102+49 70+83 79+75 90+65
70+87 82+76 62+98 73+88 75+87 86+77 80+85 64+103 76+92 90+79 81+90 67+106 83+91 90+85 80+97 85+93 63+117
87+94 77+106 100+84 83+103 82+106 83+107 74+118 108+85 94+101 98+99 95+104 92+109 92+111 85+120 98+109
92+117 89+122 96+117 106+109 122+95 90+130 91+131 68+157 84+143 112+117 85+148 84+152 108+131 78+165 92+154
109+141 96+158 121+138 85+179 103+166 104+170 116+165 107+181 122+175 95+213 110+210 92+244 138+247
"""


# ---- what to measure ---------------------------------------------------------------------------------------

def architecture(cfg, name):
    """(name, config.json as a dict) of --arch, of a JSON file or directory, or of the file in config/models
    whose name is part of the model's id. UserError: there is none."""
    bare = lambda s: re.sub(r"[^a-z0-9]", "", s.lower())
    shipped = sorted((ROOT / "config" / "models").glob("*.json"))
    model = Path(config.find(cfg.model))
    if name:
        found = [p for p in shipped if p.stem == name]
    elif model.is_dir():
        return model.resolve().name, read_json(model / "config.json")
    elif model.is_file():
        found = [model]
    else:
        found = [p for p in shipped if bare(p.stem) in bare(cfg.model)]
    if not found:
        raise UserError(f"no architecture for {name or cfg.model!r}: give --arch= one of "
                        f"{', '.join(p.stem for p in shipped)}, or a config.json as --model=FILE.json")
    path = max(found, key=lambda p: len(p.stem))
    return path.stem, read_json(path)


def parse_shape(text, cfg):
    """"8x512/128" -> (8, 512, 128). UserError: anything else, or no token to predict from."""
    text = text or f"{cfg.batch_size}x{cfg.max_seq_len}/{max(1, cfg.max_seq_len // 4)}"
    found = re.fullmatch(r"(\d+)x(\d+)/(\d+)", text)
    B, S, N = map(int, found.groups()) if found else (0, 0, 0)
    if not (B > 0 and 0 < N < S):
        raise UserError(f"--shape={text} has to be EXAMPLESxTOKENS/SCORED, like 8x512/128, "
                        "with fewer scored tokens than tokens")
    return B, S, N


def make_batches(shape, vocab, n, real):
    """n lists of B data.Tokenized of random ids: all S long with N scored, or with lengths drawn from GSM8K
    (cut at S)."""
    (B, S, N), rng = shape, random.Random(0)
    gsm8k = [tuple(map(int, pair.split("+"))) for pair in GSM8K.split()]

    def example():
        prompt, answer = rng.choice(gsm8k) if real else (S - N, N)
        if prompt >= S:
            prompt = S // 2
        answer = min(answer, S - prompt)
        tokens = [rng.randrange(vocab) for _ in range(prompt + answer)]
        return data.Tokenized(tokens, [0.0] * prompt + [1.0] * answer)

    return [[example() for _ in range(B)] for _ in range(n)]


# ---- rows --------------------------------------------------------------------------------------------------

class Shared:
    """What the rows have in common: one model with LoRA on random weights, its gradient, its optimizer.
    raw: a config.json."""

    def __init__(self, cfg, raw):
        if cfg.lora_r == 0:
            raise UserError("lora_r = 0 trains all weights, and the benchmark is about LoRA: give a rank")
        self.cfg, self.raw, self.device = cfg, raw, dist.setup(cfg)
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        torch.manual_seed(cfg.seed)
        self.model = LLaMA(ModelConfig.from_dict(raw), getattr(torch, cfg.dtype), self.device).train()
        self.model.add_lora(cfg.lora_r, cfg.lora_alpha, cfg.lora_targets, first=cfg.lora_from)
        self.model.recompute = cfg.recompute
        self.plain = self.weights()
        cfg.learning_rate = 1e-5  # the tokens are random: there is nothing to learn
        flat, self.grad, matrices = train.flatten([p for p in self.model.parameters() if p.requires_grad])
        self.optimizer = train.make_optimizer(cfg, flat, self.grad, matrices)

    def weights(self):
        """{(part, name): the weight that this part has now}."""
        return {(part, name): getattr(part, name) for part in self.model.parts() for name in part.sizes}

    @functools.cached_property
    def packed(self):
        """The same in 4 bits, made where a row wants them. The model has them then."""
        self.model.to_4_bits()
        return self.weights()

    def use(self, packed):
        """Gives the model its weights in 4 bits, or the plain ones."""
        weights = self.plain
        if packed:
            weights = self.packed
        for (part, name), w in weights.items():
            delattr(part, name)  # a module cannot take a parameter's place
            setattr(part, name, w)

    @functools.cached_property
    def hf(self):
        """What hugging_face() returns, made where a row wants it."""
        return hugging_face(self, self.raw)


class Ours:
    """A row of ours: the shared model under predictors of its own, and train.py's step. measure_on: batches
    that `measured` measures on; with and without a map they are the same, and so are the channels."""
    ours = True

    def __init__(self, name, shared, mlp, attn, kind="svd", map_rank=0, measure_on=(), backward=0.0, packed=False):
        self.name, self.shared, self.packed, model = name, shared, packed, shared.model
        shared.use(packed)
        predictor.attach(model, mlp, attn, shared.cfg.predictor_rank, kind, map_rank,
                         backward_sparsity=backward)
        if kind == "measured":
            predictor.measure(model, measure_on)
        self.own = {part: part.predictor for part in model.parts()}
        self.backward = {part: part.backward_sparsity for part in model.parts()}

    def select(self):
        torch.backends.cuda.enable_cudnn_sdp(False)  # as model.py sets it
        self.shared.use(self.packed)
        for part, own in self.own.items():
            part.predictor = own
        for part, ratio in self.backward.items():
            part.backward_sparsity = ratio
        self.shared.model.set_sparsity(1)

    def batch(self, tokenized):
        cfg = self.shared.cfg
        return data.collate(tokenized, cfg.split, 0, cfg.dense_first).to(self.shared.device)

    def step(self, batch):
        s = self.shared
        train.forward_backward(s.model, s.grad, [batch])
        return train.update(s.optimizer, s.grad, s.cfg.learning_rate, s.cfg.grad_clip)[0]

    def counted(self, batch):
        """The batch as our counters read it."""
        return batch

    def resident(self):
        """Tensors that lie there between steps. Copies of kept rows, maps and SVD factors are this row's, not
        the others'."""
        model = self.shared.model
        held = [*model.parameters(), *model.buffers(), self.shared.grad, *moments(self.shared.optimizer)]
        if self.packed:
            held += kernels.buffers.values()
        for p in filter(None, self.own.values()):
            held += [p.P, *(p.Q or ()), *(p.map or ())]
            held += [kept.copy for kept in p.fixed or () if isinstance(kept, Keep)]
        return [t for t in held if t is not None]


class HuggingFace:
    """transformers + peft on the same weights. length: pad to this, 0: to the longest text. compiled: its steps run
    under torch.compile."""
    ours = False

    def __init__(self, name, shared, length=0, compiled=False):
        self.name, self.shared, self.hf, self.length, self.compiled = name, shared, shared.hf, length, compiled

    def select(self):
        if isinstance(self.hf, str):
            raise UserError(self.hf)
        torch.backends.cuda.enable_cudnn_sdp(True)  # torch's own choice of attention

    def batch(self, tokenized):
        return padded(tokenized, self.length or max(len(t.tokens) for t in tokenized), self.shared.device)

    def step(self, batch):
        model = self.hf.model
        if self.compiled:
            model = self.hf.compiled
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.hf.params, self.shared.cfg.grad_clip or float("inf"))
        self.hf.optimizer.step()
        self.hf.optimizer.zero_grad()
        return loss.detach()

    def counted(self, batch):
        """The grid as our counters would see it if every row of it were real and read by the loss, with a
        fused attention (no lengths). Its cost is HF's (tested)."""
        B, S = batch["input_ids"].shape
        every = range(B * S)
        return SimpleNamespace(tokens=every, loss=slice(0, B * S), shape=(B, S), lengths=None, n_sparse=0)

    def resident(self):
        return [*self.hf.model.parameters(), *moments(self.hf.optimizer)]


def moments(optimizer):
    return [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()]


def padded(tokenized, length, device):
    """What most people train on: input_ids, attention_mask, labels (B, length), right-padded; labels are -100
    outside the answer, and HF shifts them itself."""
    ids = torch.zeros(len(tokenized), length, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, t in enumerate(tokenized):
        n, tokens = len(t.tokens), torch.tensor(t.tokens)
        ids[i, :n], mask[i, :n] = tokens, 1
        labels[i, :n] = torch.where(torch.tensor(t.weights) > 0, tokens, -100)
    return dict(input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device))


def hugging_face(shared, raw):
    """The HF + PEFT model on the weights of ours, as views where the layout allows; or a string: why there is
    none."""
    shared.use(packed=False)
    try:
        import peft
        import transformers
    except ImportError as e:
        return f"not installed ({e.name})"
    cfg, c = shared.cfg, transformers.AutoConfig.for_model(**raw)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(c, dtype=shared.model.dtype,
                                                              attn_implementation="sdpa")
    state = {}
    for name, (p, lo, rows, transposed) in shared.model.named_sources().items():
        w = p.detach()[lo:lo + rows]
        state[name] = w.T.contiguous() if transposed else w
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    # its buffers are in no checkpoint
    model.model.rotary_emb = type(model.model.rotary_emb)(c).to(shared.device)
    names = [TARGETS[t].split(".")[1] for t in cfg.lora_targets.split(",")]
    lora = peft.LoraConfig(r=cfg.lora_r, lora_alpha=cfg.lora_alpha, target_modules=names, task_type="CAUSAL_LM",
                           layers_to_transform=list(range(cfg.lora_from, c.num_hidden_layers)))
    model = peft.get_peft_model(model, lora, autocast_adapter_dtype=False).to(shared.device).train()
    if cfg.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=cfg.learning_rate, weight_decay=cfg.weight_decay, fused=True)
    compiled = torch.compile(model, dynamic=False)  # the same weights; it compiles in its first step
    return SimpleNamespace(model=model, compiled=compiled, params=params, optimizer=optimizer)


def make_rows(shared, length, tokenized, words=("",), compile=False):
    """The rows in whose names one of `words` is. length: what the padded ones pad to. tokenized: the examples
    that `measured` measures on. compile: with the compiled row. UserError: no row has such a name."""
    cfg, L = shared.cfg, len(shared.model.blocks)
    mlp = config.ratios(cfg.mlp_sparsity, L, "mlp_sparsity")
    attn = config.ratios(cfg.attn_sparsity, L, "attn_sparsity")
    zero = [0.0] * L
    see = [data.collate(tokenized, cfg.split, 0, cfg.dense_first).to(shared.device)]
    rows, names = [], []

    def add(kind, name, *args, **kw):
        names.append(name)
        if any(word in name for word in words):
            rows.append(kind(name, shared, *args, **kw))
        if kind is Ours and cfg.base_bits == 4 and "packed" not in kw:
            add(kind, f"{name} + 4 bits", *args, packed=True, **kw)

    add(HuggingFace, "HF + PEFT")
    add(HuggingFace, f"HF + PEFT, padded to {length}", length)
    if compile:
        add(HuggingFace, "HF + PEFT, torch.compile", length, True)
    add(Ours, "dense LoRA", zero, zero)
    for part, on, attn in (("+ MLP", any(mlp), zero), ("+ attention", any(attn), attn)):
        if on and 1 not in attn:  # without queries there has to be a map
            add(Ours, f"{part}, svd", mlp, attn)
            add(Ours, f"{part}, measured", mlp, attn, "measured", 0, see)
        if on and (1 in attn or any(mlp) and cfg.map_rank):
            add(Ours, f"{part}, measured + map", mlp, attn, "measured", cfg.map_rank, see)
    if cfg.backward_sparsity:
        add(Ours, "+ backward", zero, zero, backward=cfg.backward_sparsity)
    if not rows:
        raise UserError(f"--rows={','.join(words)} is in no row's name: there are {'; '.join(names)}")
    return rows


# ---- one run -----------------------------------------------------------------------------------------------

def main(argv):
    argv = [a + "=True" if a == "--report" else a for a in argv]
    own, args = split_options(argv, __doc__, **OWN)
    own = SimpleNamespace(**own)
    if own.report:
        return bench_report.write()
    cfg = config.load(args)
    name, raw = architecture(cfg, own.arch)
    shape = parse_shape(own.shape, cfg)
    load = getattr(os, "getloadavg", tuple)  # Windows has none
    load_before = load()
    shared = Shared(cfg, raw)
    vocab = shared.model.config.vocab_size
    full = make_batches(shape, vocab, 2, real=False)
    real = make_batches(shape, vocab, own.steps, real=True)
    rows = make_rows(shared, shape[1], full[0], own.rows.split(","), own.compile)
    out = dict(command="python -m tools.bench " + shlex.join(argv), shape="{}x{}/{}".format(*shape), arch=name,
               dtype=cfg.dtype, lora=f"r {cfg.lora_r} on {cfg.lora_targets}", mlp_sparsity=cfg.mlp_sparsity,
               attn_sparsity=cfg.attn_sparsity, map_rank=cfg.map_rank, backward_sparsity=cfg.backward_sparsity,
               recompute=cfg.recompute, steps=own.steps,
               **bench_measure.machine(shared.device), load_before=load_before)
    print(f"{name} {out['shape']} on {out['device']}, {out['threads']} threads, load {load_before}")
    unpadded = [r for r in rows if "padded" not in r.name]  # full length has nothing to pad
    out["full"] = bench_measure.measure(shared, unpadded, full, own.steps)
    if own.real:
        out["real"] = bench_measure.measure(shared, rows, real, own.steps)
    if own.kernels and shared.device.type == "cuda":
        out["products"] = bench_measure.product_times(shared.model)
    out["load_after"] = load()
    slug = re.sub(r"[^a-z0-9]+", "-", out["device"].lower()).strip("-")
    file = f"{slug}-{name}-{shape[0]}x{shape[1]}-{shape[2]}-{cfg.dtype}{'-recompute' * cfg.recompute}.json"
    path = Path(own.out or ROOT / "results" / "bench" / file)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(out) + "\n")
    print(f"\n{bench_report.section(out)}\nwritten: {path}")


if __name__ == "__main__":
    run(main)
