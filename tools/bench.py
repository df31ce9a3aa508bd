"""How fast, how much memory, against what: one command, one process, the same batches for every row, random weights, no download.

    python -m tools.bench config/bench_cpu.py                                   a laptop, about 10 minutes
    python -m tools.bench config/math.py --shape=8x512/128 --arch=llama3-8b     one H100 or H200
    python -m tools.bench --report                                              the README's section again, from results/bench/*.json

    --shape=BxS/N     B examples of S tokens, the last N of them scored (default: batch_size x max_seq_len / a quarter)
    --arch=NAME       config/models/NAME.json instead of the config's model      --steps=20   timed steps of each row
    --kernels=False   without the table of single products                       --real=False without the rows on GSM8K's lengths
    --option=value    everything else is train.py's: --recompute=True, --threads=1, --predictor_rank=8 ...

Rows, one step of each in turn, round by round, in an order that rotates; medians and quartiles over the rounds:

    HF + PEFT     transformers + peft: sdpa, batch padded to the longest text (or to S), labels -100 outside the answer. The same weights
                  (views of ours), r, targets and AdamW (fused), adapters in the model's dtype, no autocast: as fast as it goes.
    dense LoRA    ours: no padding, rows that nothing reads any more are skipped (model.py). The baseline of every claim about sparsity.
    + MLP, + attention   ours, sparse, with channels chosen by svd (as published) or measured. The last of them is SparseLoRA.

    time ratio    dense LoRA's median total / the row's          FLOP ratio   the same of the counted FLOPs (model.flops)
    share         time ratio / FLOP ratio: how much of what sparsity saves arrives. 100 % is a perfect implementation.
    peak          weights, adapter, optimizer state, copies of kept rows, and what a step allocates at most beyond them. On a CPU from the
                  profiler's record of the allocator, which counts the same thing as torch.cuda.max_memory_allocated.
    roofline      FLOPs at the GEMM rate + elementwise bytes at the copy bandwidth (traffic()); both rates are measured between the
                  rounds, under the same load. MFU is relative to that GEMM rate, not to a data sheet.

A row that cannot run says why. Nothing is filled in.
"""
import contextlib
import json
import platform
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import config
import data
import predictor
import train
from config import UserError
from model import TARGETS, LLaMA, ModelConfig, read_json, write_text
from tools import bench_kernels, bench_report, dist, options, run

MODELS, OUT = Path(config.ROOT) / "config" / "models", Path(config.ROOT) / "results" / "bench"
OWN = dict(shape="", arch="", steps=20, kernels=True, real=True, report=False, out="")

# GSM8K's training set under the Alpaca template in LLaMA-3 tokens, (prompt, answer) of every 78th of its 7,473 examples sorted by
# length: each stands for 1 % of them. Mean prompt 83, answer 101, longest 385 (of all: 82, 101, 460).
GSM8K = """
50+45 76+23 58+45 58+48 60+49 62+49 61+52 63+52 65+52 64+55 58+63 68+54 69+55 55+71 65+62 77+51 61+69 83+48 67+66 80+54 86+49
65+72 72+66 78+61 62+79 74+68 61+83 69+76 75+71 87+60 61+88 78+72 102+49 70+83 79+75 90+65 70+87 82+76 62+98 73+88 75+87 86+77
80+85 64+103 76+92 90+79 81+90 67+106 83+91 90+85 80+97 85+93 63+117 87+94 77+106 100+84 83+103 82+106 83+107 74+118 108+85 94+101
98+99 95+104 92+109 92+111 85+120 98+109 92+117 89+122 96+117 106+109 122+95 90+130 91+131 68+157 84+143 112+117 85+148 84+152
108+131 78+165 92+154 109+141 96+158 121+138 85+179 103+166 104+170 116+165 107+181 122+175 95+213 110+210 92+244 138+247
"""


# ---- what to measure -------------------------------------------------------------------------------------------------------------

def architecture(cfg, name):
    """(name, config.json as a dict) of --arch, of a JSON file or directory, or of the file in config/models whose name is part of
    the model's id. UserError: there is none."""
    def bare(s):
        return re.sub(r"[^a-z0-9]", "", s.lower())

    path = MODELS / f"{name}.json" if name else Path(cfg.model)
    if path.suffix == ".json" and not path.is_absolute():
        path = Path(config.ROOT) / path
    if path.is_dir():
        return path.name, read_json(path / "config.json")
    if not path.suffix == ".json":
        found = [p for p in sorted(MODELS.glob("*.json")) if bare(p.stem) in bare(cfg.model)]
        path = max(found, key=lambda p: len(p.stem), default=path)
    if not path.exists():
        have = ", ".join(p.stem for p in sorted(MODELS.glob("*.json")))
        raise UserError(f"no architecture for {name or cfg.model!r}: give --arch= one of {have}, or a config.json as config/models/NAME.json")
    return path.stem, read_json(path)


def parse_shape(text, cfg):
    """"8x512/128" -> (8, 512, 128). UserError: anything else, or more scored tokens than can be predicted."""
    text = text or f"{cfg.batch_size}x{cfg.max_seq_len}/{max(1, cfg.max_seq_len // 4)}"
    found = re.fullmatch(r"(\d+)x(\d+)/(\d+)", text)
    B, S, N = map(int, found.groups()) if found else (0, 0, 0)
    if not (B > 0 and 0 < N < S):
        raise UserError(f"--shape={text} has to be EXAMPLESxTOKENS/SCORED, like 8x512/128, with fewer scored tokens than tokens")
    return B, S, N


def make_batches(shape, vocab, n, real):
    """n lists of B data.Tokenized of random ids: all S long with N scored, or with lengths drawn from GSM8K (cut at S)."""
    (B, S, N), rng, pairs = shape, random.Random(0), [tuple(map(int, p.split("+"))) for p in GSM8K.split()]
    out = []
    for _ in range(n):
        lengths = [rng.choice(pairs) if real else (S - N, N) for _ in range(B)]
        lengths = [(p, min(a, S - p)) if p < S else (S // 2, S - S // 2) for p, a in lengths]
        out.append([data.Tokenized([rng.randrange(vocab) for _ in range(p + a)], [0.0] * p + [1.0] * a) for p, a in lengths])
    return out


def padded(tokenized, length, device):
    """What most people train on: {input_ids, attention_mask, labels} (B, length), right-padded; HF shifts the labels itself."""
    ids = torch.zeros(len(tokenized), length, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, t in enumerate(tokenized):
        n, tokens = len(t.tokens), torch.tensor(t.tokens)
        ids[i, :n], mask[i, :n] = tokens, 1
        labels[i, :n] = torch.where(torch.tensor(t.weights) > 0, tokens, -100)
    return {k: v.to(device) for k, v in dict(input_ids=ids, attention_mask=mask, labels=labels).items()}


# ---- rows: each has a name, batch(tokenized), and step(batch, mark), which calls mark() between its phases -------------------------

class Ours:
    """A row of ours: the one model that all of them share, under its own set of predictors; train.py's own optimizer step."""

    def __init__(self, name, run, mlp, attn, kind, warm):
        self.name, self.run, self.model = name, run, run.model
        predictor.attach(run.model, mlp, attn, run.cfg.predictor_rank, kind)
        self.own = {part: part.predictor for b in run.model.blocks for part in (b.attn, b.mlp)}
        if kind == "measured" and any(mlp + attn):
            run.model.set_sparsity(0)
            with torch.no_grad():
                run.model.loss(warm)
            run.model.set_sparsity(1)

    def select(self):
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
        self.select()
        return self.model.flops(batch)[1]

    def traffic(self, batch):
        self.select()
        return traffic(self.model, batch)

    def resident(self):
        """Bytes that lie there between steps. A copy of kept rows and SVD factors belong to this row, not to the others."""
        held = [*self.model.parameters(), self.run.grad, *states(self.run.optimizer)]
        for p in filter(None, self.own.values()):
            kept = [k.rows for k in (p.fixed or ()) if isinstance(k, predictor.Keep) and k.rows is not None]
            held += [*kept, *getattr(p, "Q", ()), *filter(torch.is_tensor, (p.energies, getattr(p, "P", None)))]
        return unique_bytes(held)


class HuggingFace:
    """transformers + peft on the same weights, as views where the layout allows. length: pad to this, 0: to the longest text."""

    def __init__(self, name, run, hf, length=0):
        self.name, self.run, self.hf, self.length = name, run, hf, length

    def select(self):
        pass

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
        """The padded batch as ours would be if every row of the grid were a real one that the loss reads: its cost is HF's (tested)."""
        B, S = batch["input_ids"].shape
        return SimpleNamespace(tokens=range(B * S), loss=slice(0, B * S), shape=(B, S), n_sparse=0)

    def flops(self, batch):
        return self.run.model.flops(self.rows(batch))[0]

    def traffic(self, batch):
        return traffic(self.run.model, self.rows(batch))

    def resident(self):
        return unique_bytes([*self.hf.model.parameters(), *states(self.hf.optimizer)])


def unique_bytes(tensors):
    return sum({(t.data_ptr(), t.shape): t.numel() * t.element_size() for t in tensors}.values())


def states(optimizer):
    return [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.dim()]


def hugging_face(run, raw):
    """The HF + PEFT model on the weights of run.model, or a string that says why there is none."""
    try:
        import peft
        import transformers
    except ImportError as e:
        return f"not installed ({e.name})"
    cfg, c = run.cfg, transformers.AutoConfig.for_model(**raw)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(c, dtype=run.model.dtype, attn_implementation="sdpa")
    state = {}
    for name, (p, lo, rows, transposed) in run.model.named_sources().items():
        w = p.detach()[lo:lo + rows]
        state[name] = w.T.contiguous() if transposed else w
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(c).to(run.device)  # its buffers are in no checkpoint
    names = [TARGETS[t].split(".")[1] for t in cfg.lora_targets.split(",")]
    lora = peft.LoraConfig(r=cfg.lora_r, lora_alpha=cfg.lora_alpha, target_modules=names, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora, autocast_adapter_dtype=False).to(run.device).train()
    if cfg.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=cfg.learning_rate, weight_decay=cfg.weight_decay, fused=True)
    return SimpleNamespace(model=model, params=params, optimizer=optimizer)


def make_rows(run, raw, shape, warm):
    """(rows on full-length batches, rows on real lengths, {row that cannot run: why})."""
    cfg, L = run.cfg, len(run.model.blocks)
    mlp, attn = config.ratios(cfg.mlp_sparsity, L, "mlp_sparsity"), config.ratios(cfg.attn_sparsity, L, "attn_sparsity")
    zero, hf = [0.0] * L, hugging_face(run, raw)
    padding = (("HF + PEFT", 0), (f"HF + PEFT, padded to {shape[1]}", shape[1]))
    others = [] if isinstance(hf, str) else [HuggingFace(name, run, hf, n) for name, n in padding]
    dense, sparse = Ours("dense LoRA", run, zero, zero, "random", warm), []
    for name, a in (("+ MLP", zero), ("+ attention", attn)):
        if name == "+ MLP" or any(attn):
            sparse += [Ours(f"{name}, {kind}", run, mlp, a, kind, warm) for kind in ("svd", "measured")]
    missing = {name: hf for name, _ in padding} if isinstance(hf, str) else {}
    return [*others[:1], dense, *sparse], [*others, dense, *sparse[-2:]], missing


# ---- measuring -------------------------------------------------------------------------------------------------------------------

class Clock:
    """Marks in a step -> milliseconds between them: CUDA events, read after the step, or the CPU's clock."""

    def __init__(self, device):
        self.cuda, self.marks = device.type == "cuda", []

    def mark(self):
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def ms(self):
        if self.cuda:
            self.marks[-1].synchronize()
        pairs = zip(self.marks, self.marks[1:])
        out = [a.elapsed_time(b) if self.cuda else 1e3 * (b - a) for a, b in pairs]
        self.marks = []
        return out


def milliseconds(f, device):
    """Of one call."""
    clock = Clock(device)
    clock.mark()
    f()
    clock.mark()
    return clock.ms()[0]


def measure(run, rows, batches, steps):
    """{row name: {times: [[forward, backward, optimizer] of each round], ...}} and the rates of the machine between the rounds."""
    out, rates, size = {r.name: dict(times=[]) for r in rows}, [], run.model.config
    for r in rows:
        r.select()
        with torch.random.fork_rng():
            some = batches if run.device.type == "cuda" else batches[:2]  # on a GPU kernels are tuned for every bucket of lengths
            losses = [r.step(r.batch(t)).item() for t in some]
        out[r.name].update(loss=losses[0], flops=mean(r.flops(r.batch(t)) for t in batches),
                           traffic=mean(r.traffic(r.batch(t)) for t in batches), peak=peak_bytes(run, r, batches[0]),
                           tokens=mean(sum(len(x.tokens) - 1 for x in t) for t in batches))
        if isinstance(r, Ours) and run.device.type == "cuda":
            out[r.name]["host_sync"] = host_sync(r, r.batch(batches[0]))
        print(f"  {r.name}: warm, loss {losses[0]:.4f}", flush=True)
    rates.append(machine_rates(run.device, run.model.dtype, size))  # the first warms up
    for i in range(steps):
        for j in range(len(rows)):
            r = rows[(i + j) % len(rows)]
            r.select()
            batch, clock = r.batch(batches[i % len(batches)]), Clock(run.device)
            r.step(batch, clock.mark)
            out[r.name]["times"].append(clock.ms())
        rates.append(machine_rates(run.device, run.model.dtype, size))
        print(f"  round {i + 1}/{steps}: " + ", ".join(f"{r.name} {sum(out[r.name]['times'][-1]):.0f}" for r in rows), flush=True)
    return out, [median(x) for x in zip(*rates[1:])]


def mean(xs):
    xs = list(xs)
    return sum(xs) / len(xs)


def median(xs):
    return sorted(xs)[len(xs) // 2] if len(xs) % 2 else mean(sorted(xs)[len(xs) // 2 - 1:][:2])


def machine_rates(device, dtype, c):
    """(FLOP/s of the MLP's matmul over 2048 rows, bytes/s of a copy), now."""
    x, w = torch.ones(2048, c.hidden_size, dtype=dtype, device=device), torch.ones(c.intermediate_size, c.hidden_size, dtype=dtype, device=device)
    a = torch.empty(2 ** 30 if device.type == "cuda" else 2 ** 26, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    b.copy_(a)
    n = 20 if device.type == "cuda" else 1
    gemm = milliseconds(lambda: [x @ w.T for _ in range(n)], device) / n
    copy = milliseconds(lambda: [b.copy_(a) for _ in range(n)], device) / n
    return 2 * x.numel() * len(w) / gemm * 1e3, 2 * a.numel() / copy * 1e3


def peak_bytes(run, row, tokenized):
    """What lies there between steps and what one step allocates at most beyond it."""
    batch, before = row.batch(tokenized), row.resident()
    if run.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        row.step(batch)
        return before + torch.cuda.max_memory_allocated() - start
    from torch.profiler import ProfilerActivity, profile
    with quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as p:
        row.step(batch)
    now = most = 0
    for e in p.profiler.kineto_results.events():
        if e.name() == "[memory]":
            now += e.nbytes()
            most = max(most, now)
    return before + most


@contextlib.contextmanager
def quiet_stderr():
    """Without the profiler's own start and stop lines, which come from C++."""
    import os
    sys.stderr.flush()
    old, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(old, 2)
        os.close(old), os.close(null)


def host_sync(row, batch):
    """"none", or the first place in a step where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        row.step(batch)
        return "none"
    except RuntimeError as e:
        return str(e).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def traffic(model, batch):
    """Bytes that a step moves outside its matmuls and attention, each operand of each elementwise pass once: per row and block 2 norms
    (forward 2 D, backward 3 D each), 2 residual adds (3 D, and 3 D backward), RoPE and the way into the grid and back (4 N + 4 Nq),
    swiglu (3 C forward, 5 C backward); the loss (5 V); AdamW (7 fp32 numbers of each of LoRA's)."""
    c, e = model.config, model.embed.element_size()
    Nq, Nkv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    T, T_loss, total = len(batch.tokens), batch.loss.stop - batch.loss.start, 0
    for i, b in enumerate(model.blocks):
        p, last = b.mlp.predictor, i == len(model.blocks) - 1
        n, t = (batch.n_sparse, T) if not last else (0, T_loss)
        C = n * p.c + (t - n) * c.intermediate_size if p is not None and p.c else t * c.intermediate_size
        total += e * (22 * t * c.hidden_size + 4 * t * Nq + 4 * (t * Nq + T * 2 * Nkv) + 8 * C)
    return total + 5 * e * T_loss * c.vocab_size + 28 * sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def predictor_times(run, row, batch):
    """Milliseconds of choosing channels in all layers, medians of 5: {estimate, topk, sort_and_index, total}."""
    row.select()
    x, names = torch.randn(batch.n_sparse, run.model.config.hidden_size, device=run.device).to(run.model.dtype), ("estimate", "topk", "all")
    sums = dict.fromkeys((*names, "total"), 0.0)
    for part, p in row.own.items():
        if p is None or not p.c:
            continue
        todo = [("total", lambda: p.select(x))]
        if p.estimate is not None:
            energies = p.estimate(part, x)
            todo += [("estimate", lambda: p.estimate(part, x)), ("topk", lambda: energies.topk(p.c)), ("all", lambda: p.keep(part, energies, p.c))]
        for name, f in todo:
            f()
            sums[name] += median([milliseconds(f, run.device) for _ in range(5)])
    return dict(estimate=sums["estimate"], topk=sums["topk"], sort_and_index=max(0.0, sums["all"] - sums["topk"]), total=sums["total"])


@torch.no_grad()
def grid_times(run, batch):
    """Milliseconds of all moves between rows and grid in one step (RoPE with its scatter, the gather back, both backward)."""
    import kernels
    c, (B, S), rows = run.model.config, batch.shape, batch.rows
    hd, H, K = c.head_dim, c.num_attention_heads, c.num_key_value_heads
    cos, sin = run.model.rope(batch.positions)
    y = torch.randn(len(rows), (H + 2 * K) * hd, device=run.device).to(run.model.dtype)
    grid = kernels.rope_scatter(y, cos, sin, rows, H + K, hd, B * S)
    a = grid[:, :H * hd].contiguous()
    picked = a.index_select(0, rows)
    todo = (lambda: kernels.rope_scatter(y, cos, sin, rows, H + K, hd, B * S), lambda: kernels.rope_gather_backward(grid, cos, sin, rows, H + K, hd),
            lambda: a.index_select(0, rows), lambda: torch.zeros_like(a).index_copy_(0, rows, picked))
    return c.num_hidden_layers * sum(median([milliseconds(f, run.device) for _ in range(6)][1:]) for f in todo)


# ---- one run ---------------------------------------------------------------------------------------------------------------------

def setup(cfg, raw):
    device = dist.setup(cfg)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.lora_r == 0:
        raise UserError("lora_r = 0 trains all weights, and the benchmark is about LoRA: give a rank")
    torch.manual_seed(cfg.seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(cfg.seed)
    model = LLaMA(ModelConfig.from_dict(raw), getattr(torch, cfg.dtype), device)
    model.add_lora(cfg.lora_r, cfg.lora_alpha, cfg.lora_targets)
    model.recompute = cfg.recompute
    cfg.learning_rate = 1e-5  # the tokens are random: nothing is to be learnt
    r = SimpleNamespace(cfg=cfg, device=device, model=model.train())
    r.flat, r.grad, matrices = train.flatten([p for p in model.parameters() if p.requires_grad])
    r.optimizer = train.make_optimizer(cfg, r.flat, r.grad, matrices)
    return r


def machine(device):
    """What a reader needs to judge the numbers: chip, driver, versions, commit, load."""
    def ask(*command):
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=config.ROOT).stdout.strip()
        except OSError:
            return ""

    versions = dict(python=platform.python_version(), torch=torch.__version__)
    for name in ("triton", "transformers", "peft"):
        with contextlib.suppress(ImportError):
            versions[name] = __import__(name).__version__
    out = dict(date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), versions=versions, threads=torch.get_num_threads(),
               commit=ask("git", "rev-parse", "--short", "HEAD") + ("+changes" if ask("git", "status", "--porcelain", "-uno") else ""))
    if device.type == "cuda":
        return dict(device=torch.cuda.get_device_name(device), cuda=torch.version.cuda,
                    driver=ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0], **out)
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else "")
    return dict(device="cpu", cpu=cpu[1] if cpu else platform.processor(), cores=torch.multiprocessing.cpu_count(), **out)


def main(argv):
    mine = [a for a in argv if a in ("-h", "--help", "--report") or a.partition("=")[0].removeprefix("--") in OWN]
    _, own = options([a if a != "--report" else "--report=True" for a in mine], __doc__, (0, 0), **OWN)
    own = SimpleNamespace(**own)
    if own.report:
        return bench_report.readme()
    cfg = config.load([a for a in argv if a not in mine])
    name, raw = architecture(cfg, own.arch)
    shape = parse_shape(own.shape, cfg)
    r, load = setup(cfg, raw), [round(x, 1) for x in getattr(__import__("os"), "getloadavg", tuple)()]
    device = r.device
    n = own.steps
    full = make_batches(shape, r.model.config.vocab_size, 2, False)
    warm = data.collate(full[0], cfg.split).to(device)
    rows, real_rows, missing = make_rows(r, raw, shape, warm)
    out = dict(command="python -m tools.bench " + " ".join(argv), shape="{}x{}/{}".format(*shape), arch=name, dtype=cfg.dtype, lora=f"r {cfg.lora_r} on {cfg.lora_targets}",
               mlp_sparsity=cfg.mlp_sparsity, attn_sparsity=cfg.attn_sparsity, recompute=cfg.recompute, **machine(device), load_before=load, steps=n, missing=missing)
    print(f"{name} {out['shape']} on {out['device']}, {out['threads']} threads, load {load}", flush=True)
    groups = [("full", rows, full)] + [("real", real_rows, make_batches(shape, r.model.config.vocab_size, n, True))] * own.real
    for key, some, batches in groups:
        measured, rates = measure(r, some, batches, n)
        out[key] = dict(rows=[bench_report.summary(k, v, measured, rates) for k, v in measured.items()], gemm_flops=rates[0], copy_bytes=rates[1])
    out["predictor_ms"] = {x.name: predictor_times(r, x, warm) for x in rows if isinstance(x, Ours) and x.name != "dense LoRA"}
    out["grid_ms"] = grid_times(r, warm)
    del rows, real_rows, groups, some
    if own.kernels:
        out["kernels"] = bench_kernels.table(r.model.config, r.model.dtype, device)
    slug = re.sub(r"[^a-z0-9]+", "-", out["device"].lower()).strip("-")
    path = Path(own.out or OUT / f"{slug}-{name}-{shape[0]}x{shape[1]}-{shape[2]}{'-recompute' * cfg.recompute}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(out, indent=1) + "\n")
    print(bench_report.text(out))
    bench_report.draw(out, path.with_suffix(".png"))
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    run(main)
