"""How fast, how much memory, against what: one command, one process, the same batches for every row, random
weights, no download.

    python -m tools.bench config/bench_cpu.py                                   a laptop, about 10 minutes
    python -m tools.bench config/math.py --shape=8x512/128 --arch=llama3-8b     one H100 or H200
    python -m tools.bench --report                                              the README's section, from
                                                                                results/bench/*.json

    --shape=BxS/N     B examples of S tokens, the last N of them scored (default: batch_size x max_seq_len
                      / a quarter)
    --arch=NAME       config/models/NAME.json instead of the config's model
    --steps=20        timed steps of each row
    --kernels=False   without the table of single products (tools/bench_kernels.py)
    --real=False      without the rows on GSM8K's lengths
    --out=FILE        results/bench/<device>-<model>-<shape>.json
    --option=value    everything else is train.py's: --recompute=True, --threads=1, --predictor_rank=8 ...

Rows, one step of each in turn, round by round; medians and quartiles over the rounds:

    HF + PEFT     transformers + peft: sdpa, the batch padded to its longest text (or to S), labels -100
                  outside the answer. The same weights (views of ours), r, targets and AdamW (fused); adapters
                  in the model's dtype and no autocast: as fast as it goes.
    dense LoRA    ours: no padding, rows that nothing reads any more are skipped. The baseline of every
                  claim about sparsity.
    + MLP, + attention   ours, sparse, channels chosen by svd (as published) or measured. The last of
                         them is SparseLoRA.

    time ratio    dense LoRA's median total / the row's
    FLOP ratio    the same of the counted FLOPs (model.flops)
    share         time ratio / FLOP ratio: how much of what sparsity saves arrives; 100 % is a perfect
                  implementation
    peak          weights, adapter, optimizer state, copies of kept rows, and what a step allocates at
                  most beyond them; on a CPU from the profiler's record of the allocator, the
                  counterpart of torch.cuda.max_memory_allocated
    roofline      FLOPs at the GEMM rate + elementwise bytes at the copy bandwidth. Both rates are
                  measured between the rounds, under the same load; MFU is relative to that GEMM rate, not
                  to a data sheet.

A row that cannot run says why. Nothing is filled in.
"""
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import torch

import config
import data
import predictor
import train
from config import UserError
from model import TARGETS, LLaMA, ModelConfig
from lib import dist
from lib.cli import run, split_options
from tools import bench_kernels, bench_report
from lib.files import read_json, write_text
from tools.bench_measure import (grid_times, load_average, machine, measure, predictor_times, traffic,
                                 unique_bytes)

ROOT = Path(config.ROOT)
OWN = dict(shape="", arch="", steps=20, kernels=True, real=True, report=False, out="")

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
    def bare(s):
        return re.sub(r"[^a-z0-9]", "", s.lower())

    shipped = sorted((ROOT / "config" / "models").glob("*.json"))
    if not name and Path(cfg.model).is_dir():
        return Path(cfg.model).resolve().name, read_json(Path(cfg.model) / "config.json")
    if name or not cfg.model.endswith(".json"):
        found = [p for p in shipped if (p.stem == name if name else bare(p.stem) in bare(cfg.model))]
        path = max(found, key=lambda p: len(p.stem), default=None)
    else:
        path = next((p for p in (Path(cfg.model), ROOT / cfg.model) if p.exists()), None)
    if path is None:
        raise UserError(f"no architecture for {name or cfg.model!r}: give --arch= one of "
                        f"{', '.join(p.stem for p in shipped)}, or a config.json as --model=FILE.json")
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
    pairs, out = [tuple(map(int, p.split("+"))) for p in GSM8K.split()], []
    for _ in range(n):
        lengths = [rng.choice(pairs) if real else (S - N, N) for _ in range(B)]
        lengths = [(p, min(a, S - p)) if p < S else (S // 2, S - S // 2) for p, a in lengths]
        out.append([data.Tokenized([rng.randrange(vocab) for _ in range(p + a)], [0.0] * p + [1.0] * a)
                    for p, a in lengths])
    return out


def padded(tokenized, length, device):
    """What most people train on: input_ids, attention_mask, labels (B, length), right-padded; HF shifts
    the labels itself."""
    ids = torch.zeros(len(tokenized), length, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, t in enumerate(tokenized):
        n, tokens = len(t.tokens), torch.tensor(t.tokens)
        ids[i, :n], mask[i, :n] = tokens, 1
        labels[i, :n] = torch.where(torch.tensor(t.weights) > 0, tokens, -100)
    return {k: v.to(device) for k, v in dict(input_ids=ids, attention_mask=mask, labels=labels).items()}


# ---- rows --------------------------------------------------------------------------------------------------

class Ours:
    """A row of ours: the one model that all of them share, under its own set of predictors;
    train.py's optimizer step."""
    ours = True

    def __init__(self, name, run, mlp, attn, kind, warm):
        self.name, self.run, self.model = name, run, run.model
        predictor.attach(run.model, mlp, attn, run.cfg.predictor_rank, kind)
        self.own = {part: part.predictor for b in run.model.blocks for part in (b.attn, b.mlp)}
        if kind == "measured":
            predictor.measure(run.model, [warm])
            run.model.set_sparsity(1)

    def select(self):
        torch.backends.cuda.enable_cudnn_sdp(False)  # as model.py sets it
        for part, p in self.own.items():
            part.predictor = p

    def batch(self, tokenized):
        return data.collate(tokenized, self.run.cfg.split).to(self.run.device)

    def step(self, batch, mark=lambda: None):
        mark()
        loss = self.model.loss(batch)
        mark()
        loss.backward()
        self.run.grad[-2:] += torch.stack([loss.detach(), batch.weights.sum()])
        mark()
        metrics = train.update(self.run, self.run.cfg.learning_rate)
        mark()
        return metrics[0]

    def flops(self, batch):
        return self.model.flops(batch)[1]

    def traffic(self, batch):
        return traffic(self.model, batch)

    def resident(self):
        """Bytes that lie there between steps. Copies of kept rows and SVD factors are this row's,
        not the others'."""
        held = [*self.model.parameters(), self.run.grad, *states(self.run.optimizer)]
        for p in filter(None, self.own.values()):
            held += [k.rows for k in p.fixed or () if isinstance(k, predictor.Keep) and k.rows is not None]
            held += [*(p.Q or ()), *filter(torch.is_tensor, (p.energies, p.P))]
        return unique_bytes(held)


class HuggingFace:
    """transformers + peft on the same weights. length: pad to this, 0: to the longest text."""
    ours = False

    def __init__(self, name, run, hf, length=0):
        self.name, self.run, self.hf, self.length = name, run, hf, length

    def select(self):
        torch.backends.cuda.enable_cudnn_sdp(True)  # torch's own choice of attention

    def batch(self, tokenized):
        length = self.length or max(len(t.tokens) for t in tokenized)
        return padded(tokenized, length, self.run.device)

    def step(self, batch, mark=lambda: None):
        mark()
        loss = self.hf.model(**batch, use_cache=False).loss
        mark()
        loss.backward()
        mark()
        torch.nn.utils.clip_grad_norm_(self.hf.params, self.run.cfg.grad_clip or float("inf"))
        self.hf.optimizer.step()
        self.hf.optimizer.zero_grad()
        mark()
        return loss.detach()

    def rows(self, batch):
        """The grid as our counters would see it if every row of it were real and read by the loss, with a
        fused attention (no lengths). Its cost is HF's (tested)."""
        B, S = batch["input_ids"].shape
        return SimpleNamespace(tokens=range(B * S), loss=slice(0, B * S), shape=(B, S), lengths=None,
                               n_sparse=0)

    def flops(self, batch):
        return self.run.model.flops(self.rows(batch))[0]

    def traffic(self, batch):
        return traffic(self.run.model, self.rows(batch))

    def resident(self):
        return unique_bytes([*self.hf.model.parameters(), *states(self.hf.optimizer)])


def states(optimizer):
    return [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.dim()]


def hugging_face(run, raw):
    """The HF + PEFT model on the weights of run.model, as views where the layout allows; or a string: why
    there is none."""
    try:
        import peft
        import transformers
    except ImportError as e:
        return f"not installed ({e.name})"
    cfg, c = run.cfg, transformers.AutoConfig.for_model(**raw)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(c, dtype=run.model.dtype,
                                                              attn_implementation="sdpa")
    state = {}
    for name, (p, lo, rows, transposed) in run.model.named_sources().items():
        w = p.detach()[lo:lo + rows]
        state[name] = w.T.contiguous() if transposed else w
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    # its buffers are in no checkpoint
    model.model.rotary_emb = type(model.model.rotary_emb)(c).to(run.device)
    names = [TARGETS[t].split(".")[1] for t in cfg.lora_targets.split(",")]
    lora = peft.LoraConfig(r=cfg.lora_r, lora_alpha=cfg.lora_alpha, target_modules=names,
                           task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora, autocast_adapter_dtype=False).to(run.device).train()
    if cfg.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=cfg.learning_rate, weight_decay=cfg.weight_decay, fused=True)
    return SimpleNamespace(model=model, params=params, optimizer=optimizer)


def make_rows(run, raw, shape, warm):
    """(rows on full-length batches, rows on real lengths, {row that cannot run: why})."""
    cfg, L = run.cfg, len(run.model.blocks)
    mlp, attn = (config.ratios(getattr(cfg, name), L, name) for name in ("mlp_sparsity", "attn_sparsity"))
    zero, hf, sparse = [0.0] * L, hugging_face(run, raw), []
    padding = {"HF + PEFT": 0, f"HF + PEFT, padded to {shape[1]}": shape[1]}
    others = [] if isinstance(hf, str) else [HuggingFace(name, run, hf, n) for name, n in padding.items()]
    dense = Ours("dense LoRA", run, zero, zero, "random", warm)
    for name, on, a in (("+ MLP", any(mlp), zero), ("+ attention", any(attn), attn)):
        if on:
            sparse += [Ours(f"{name}, {kind}", run, mlp, a, kind, warm) for kind in ("svd", "measured")]
    missing = dict.fromkeys(padding, hf) if isinstance(hf, str) else {}
    return [*others[:1], dense, *sparse], [*others, dense, *sparse[-2:]], missing


# ---- one run -----------------------------------------------------------------------------------------------

def setup(cfg, raw):
    device = dist.setup(cfg)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.lora_r == 0:
        raise UserError("lora_r = 0 trains all weights, and the benchmark is about LoRA: give a rank")
    torch.manual_seed(cfg.seed)
    model = LLaMA(ModelConfig.from_dict(raw), getattr(torch, cfg.dtype), device)
    model.add_lora(cfg.lora_r, cfg.lora_alpha, cfg.lora_targets)
    model.recompute = cfg.recompute
    cfg.learning_rate = 1e-5  # the tokens are random: there is nothing to learn
    r = SimpleNamespace(cfg=cfg, device=device, model=model.train())
    r.flat, r.grad, matrices = train.flatten([p for p in model.parameters() if p.requires_grad])
    r.optimizer = train.make_optimizer(cfg, r.flat, r.grad, matrices)
    return r


def main(argv):
    argv = [a + "=True" if a == "--report" else a for a in argv]
    own, args = split_options(argv, __doc__, **OWN)
    own = SimpleNamespace(**own)
    if own.report:
        return bench_report.readme()
    cfg = config.load(args)
    (name, raw), shape, load = architecture(cfg, own.arch), parse_shape(own.shape, cfg), load_average()
    r = setup(cfg, raw)
    vocab, device = r.model.config.vocab_size, r.device
    full, real = make_batches(shape, vocab, 2, False), make_batches(shape, vocab, own.steps, True)
    warm = data.collate(full[0], cfg.split).to(device)
    rows, real_rows, missing = make_rows(r, raw, shape, warm)
    out = dict(command="python -m tools.bench " + " ".join(argv), shape="{}x{}/{}".format(*shape), arch=name,
               dtype=cfg.dtype, lora=f"r {cfg.lora_r} on {cfg.lora_targets}", mlp_sparsity=cfg.mlp_sparsity,
               attn_sparsity=cfg.attn_sparsity, recompute=cfg.recompute, steps=own.steps, **machine(device),
               load_before=load, missing=missing)
    print(f"{name} {out['shape']} on {out['device']}, {out['threads']} threads, load {load}", flush=True)
    for key, some, batches in [("full", rows, full)] + [("real", real_rows, real)] * own.real:
        measured, rates = measure(r, some, batches, own.steps, missing)
        out[key] = dict(rows=[bench_report.summary(k, v, measured, rates) for k, v in measured.items()],
                        gemm_flops=rates[0], copy_bytes=rates[1])
    out["predictor_ms"] = {x.name: predictor_times(r, x, warm) for x in rows
                           if x.name.startswith("+") and x.name not in missing}
    out["grid_ms"] = grid_times(r, warm)
    if own.kernels:
        out["kernels"] = bench_kernels.table(r.model.config, r.model.dtype, device)
    out["load_after"] = load_average()
    slug = re.sub(r"[^a-z0-9]+", "-", out["device"].lower()).strip("-")
    file = f"{slug}-{name}-{shape[0]}x{shape[1]}-{shape[2]}{'-recompute' * cfg.recompute}.json"
    path = Path(own.out or ROOT / "results" / "bench" / file)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(out) + "\n")
    print(bench_report.text(out))
    bench_report.draw(out, path.with_suffix(".png"))
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    run(main)
