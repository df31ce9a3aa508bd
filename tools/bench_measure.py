"""What tools.bench reads off the machine: milliseconds, peak memory, the rates that a roofline needs, host
waits, chip and versions.

A row here is anything with name, select(), batch(tokenized), step(batch, mark), flops(batch),
traffic(batch) and resident().
"""
import contextlib
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

import config
import kernels


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
        return [a.elapsed_time(b) if self.cuda else 1e3 * (b - a) for a, b in pairs]


def milliseconds(f, device):
    """Of one call. A GPU first sleeps for about a millisecond, so that all of f is queued before it starts:
    launching a kernel from Python takes longer than small ones run. What f reads may lie in the L2 cache."""
    if device.type == "cuda":
        torch.cuda._sleep(2_000_000)  # cycles
    clock = Clock(device)
    clock.mark()
    f()
    clock.mark()
    return clock.ms()[0]


def mean(xs):
    xs = list(xs)
    return sum(xs) / len(xs)


def quantile(xs, q=.5):
    """Linear between the two nearest."""
    xs = sorted(xs)
    i, part = divmod(q * (len(xs) - 1), 1)
    return xs[int(i)] + part * (xs[min(int(i) + 1, len(xs) - 1)] - xs[int(i)])


# ---- rows side by side -------------------------------------------------------------------------------------

def measure(run, rows, batches, steps, missing):
    """One step of each row in turn, the first row another one every round, so that a load that comes and goes
    hits all alike. Returns ({row name: what summary() reads}, (FLOP/s, bytes/s) of the machine, medians
    between the rounds). A row that does not fit into memory is put into missing."""
    c, out = run.model.config, {}
    for r in rows:
        try:
            out[r.name] = warm_up(run, r, batches)
        except torch.cuda.OutOfMemoryError:
            missing[r.name] = "out of memory"
            torch.cuda.empty_cache()
    rows, rates = [r for r in rows if r.name in out], []
    machine_rates(run.device, run.model.dtype, c)
    for i in range(steps):
        for j in range(len(rows)):
            r = rows[(i + j) % len(rows)]
            r.select()
            batch, clock = r.batch(batches[i % len(batches)]), Clock(run.device)
            r.step(batch, clock.mark)
            out[r.name]["times"].append(clock.ms())
        rates.append(machine_rates(run.device, run.model.dtype, c))
        last = ", ".join(f"{r.name} {sum(out[r.name]['times'][-1]):.0f}" for r in rows)
        print(f"  round {i + 1}/{steps}: {last}", flush=True)
    return out, [quantile(x) for x in zip(*rates)]


def warm_up(run, row, batches):
    """Steps before the timed ones, and what need not be timed."""
    row.select()
    # on a GPU kernels are tuned for every bucket of lengths
    some = batches if run.device.type == "cuda" else batches[:2]
    losses = [row.step(row.batch(t)).item() for t in some]
    print(f"  {row.name}: warm, loss {losses[0]:.4f}", flush=True)
    return dict(times=[], loss=losses[0], flops=mean(row.flops(row.batch(t)) for t in batches),
                traffic=mean(row.traffic(row.batch(t)) for t in batches),
                peak=peak_bytes(run, row, batches[0]),
                tokens=mean(sum(len(x.tokens) - 1 for x in t) for t in batches),
                host_sync=(host_sync(row, row.batch(batches[0]))
                           if row.ours and run.device.type == "cuda" else None))


def host_sync(row, batch):
    """"none", or the first line of our code in a step where the host waits for the device. (Of the waits of
    torch.distributed and of Triton's tuning torch does not know.)"""
    torch.cuda.set_sync_debug_mode("error")
    try:
        row.step(batch)
        return "none"
    except RuntimeError as e:
        row.run.grad.zero_()
        return f"{where(e)}: {str(e).splitlines()[0]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")


def where(error):
    """file:line of the repository's innermost frame in an exception's traceback."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(config.ROOT)]
    return f"{os.path.relpath(frames[-1].filename, config.ROOT)}:{frames[-1].lineno}" if frames else "?"


def peak_bytes(run, row, tokenized):
    """What lies there between steps, and what one step allocates at most beyond it."""
    batch, before = row.batch(tokenized), row.resident()
    if run.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        row.step(batch)
        return before + torch.cuda.max_memory_allocated() - start
    from torch.profiler import ProfilerActivity, profile
    with quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True,
                                 acc_events=True) as p:
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
    sys.stderr.flush()
    old, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(old, 2)
        os.close(old)
        os.close(null)


def unique_bytes(tensors):
    return sum({(t.data_ptr(), t.shape): t.numel() * t.element_size() for t in tensors}.values())


# ---- rooflines ---------------------------------------------------------------------------------------------

def machine_rates(device, dtype, c):
    """(FLOP/s of the MLP's matmul over 2048 rows, bytes/s of a copy), now."""
    n, size = (20, 2 ** 30) if device.type == "cuda" else (1, 2 ** 26)
    x = torch.ones(2048, c.hidden_size, dtype=dtype, device=device)
    w = torch.ones(c.intermediate_size, c.hidden_size, dtype=dtype, device=device)
    a = torch.empty(size, dtype=torch.uint8, device=device)
    b = a.clone()
    gemm = milliseconds(lambda: [x @ w.T for _ in range(n)], device) / n
    copy = milliseconds(lambda: [b.copy_(a) for _ in range(n)], device) / n
    return 2 * x.numel() * len(w) / gemm * 1e3, 2 * size / copy * 1e3


def traffic(model, batch):
    """Bytes that a step moves outside its matmuls and attention, each operand of each elementwise pass once:
    per row and block 2 norms (forward 2 D, backward 3 D each), 2 residual adds (3 D, and 3 D backward), RoPE
    and the way into the grid and back (4 N + 4 Nq), swiglu (3 C forward, 5 C backward); the loss (5 V); AdamW
    (7 fp32 numbers for each of LoRA's)."""
    c, e = model.config, model.embed.element_size()
    Nq, Nkv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    T, T_loss, total = len(batch.tokens), batch.loss.stop - batch.loss.start, 0
    for i, b in enumerate(model.blocks):
        p, last = b.mlp.predictor, i == len(model.blocks) - 1
        n, t = (0, T_loss) if last else (batch.n_sparse, T)
        kept = n if p is not None and p.c else 0
        channels = kept * (p.c if kept else 0) + (t - kept) * c.intermediate_size
        total += e * (22 * t * c.hidden_size + 4 * t * Nq + 4 * (t * Nq + T * 2 * Nkv) + 8 * channels)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return total + 5 * e * T_loss * c.vocab_size + 28 * trained


# ---- parts of a step ---------------------------------------------------------------------------------------

@torch.no_grad()
def predictor_times(run, row, batch):
    """Milliseconds of choosing channels in all layers, medians of 5: {estimate, topk, sort_and_index,
    total}."""
    row.select()
    x = torch.randn(batch.n_sparse, run.model.config.hidden_size, device=run.device).to(run.model.dtype)
    sums = dict.fromkeys(("estimate", "topk", "keep", "total"), 0.0)

    def add(name, f):
        f()
        sums[name] += quantile([milliseconds(f, run.device) for _ in range(5)])

    for part, p in row.own.items():
        if p is None or not p.c:
            continue
        add("total", lambda: p.select(x))
        if p.estimate is not None:
            energies = p.estimate(part, x)
            add("estimate", lambda: p.estimate(part, x))
            add("topk", lambda: energies.topk(p.c))
            add("keep", lambda: p.keep(part, energies, p.c))
    sums["sort_and_index"] = max(0.0, sums.pop("keep") - sums["topk"])
    return sums


@torch.no_grad()
def grid_times(run, batch):
    """Milliseconds of all moves between rows and grid in one step: RoPE with its scatter, the gather
    back, both backward."""
    c, (B, S), rows = run.model.config, batch.shape, batch.rows
    hd, H, K = c.head_dim, c.num_attention_heads, c.num_key_value_heads
    cos, sin = run.model.rope(batch.positions)
    y = torch.randn(len(rows), (H + 2 * K) * hd, device=run.device).to(run.model.dtype)
    grid = kernels.rope_scatter(y, cos, sin, rows, H + K, hd, B * S)
    a = grid[:, :H * hd].contiguous()
    picked = a.index_select(0, rows)
    moves = (lambda: kernels.rope_scatter(y, cos, sin, rows, H + K, hd, B * S),
             lambda: kernels.rope_gather_backward(grid, cos, sin, rows, H + K, hd),
             lambda: a.index_select(0, rows), lambda: torch.zeros_like(a).index_copy_(0, rows, picked))
    once = sum(quantile([milliseconds(f, run.device) for _ in range(6)][1:]) for f in moves)
    return c.num_hidden_layers * once


# ---- the machine -------------------------------------------------------------------------------------------

def ask(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=config.ROOT).stdout.strip()
    except OSError:
        return ""


def load_average():
    return [round(x, 1) for x in os.getloadavg()] if hasattr(os, "getloadavg") else []


def machine(device):
    """What a reader needs to judge the numbers: chip, driver, versions, commit."""
    versions = dict(python=platform.python_version(), torch=torch.__version__)
    for name in ("triton", "transformers", "peft"):
        with contextlib.suppress(ImportError):
            versions[name] = __import__(name).__version__
    dirty = ask("git", "status", "--porcelain", "-uno", "--", "*.py")
    out = dict(date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), versions=versions,
               threads=torch.get_num_threads(),
               commit=ask("git", "rev-parse", "--short", "HEAD") + ("+changes" if dirty else ""))
    if device.type == "cuda":
        driver = ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
        return dict(device=torch.cuda.get_device_name(device), cuda=torch.version.cuda, driver=driver, **out)
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return dict(device="cpu", cpu=cpu[1] if cpu else platform.processor(), cores=os.cpu_count(), **out)
