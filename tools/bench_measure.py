"""What tools.bench reads off the machine: milliseconds of a step and of single products, peak memory, the
rate of a matmul, chip and versions.

A row here is a bench.Ours or a bench.HuggingFace.
"""
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from statistics import mean, median

import torch
from torch.profiler import ProfilerActivity, profile

import config
import kernels
import predictor
from config import UserError

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler says when it starts and stops


def milliseconds(f, device, queued=False):
    """Of one call. queued: a GPU first sleeps for about a millisecond, so that all of f is queued before it
    starts: launching a kernel from Python takes longer than a small one runs. A step is timed without, for
    its launches are part of what it takes. What f reads may lie in the L2 cache."""
    if device.type != "cuda":
        start = time.perf_counter()
        f()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if queued:
        torch.cuda._sleep(2_000_000)  # cycles
    start.record()
    f()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


# ---- rows side by side -------------------------------------------------------------------------------------

def measure(rows, batches, steps):
    """One step of each row in turn, the first row another one every round, so that a load that comes and goes
    hits all alike -> {"rows": [dict], "missing": {row that cannot run: why}, "gemm_flops": the machine's
    FLOP/s, median between the rounds}."""
    shared, done, missing, rates = rows[0].shared, {}, {}, []
    for r in rows:
        try:
            done[r] = warm_up(r, batches)
        except UserError as e:
            missing[r.name] = str(e)
        except torch.OutOfMemoryError:
            missing[r.name] = "out of memory"
            torch.cuda.empty_cache()
    rows = list(done)
    gemm_rate(shared.model)  # warms up
    for i in range(steps):
        for j in range(len(rows)):
            r = rows[(i + j) % len(rows)]
            r.select()
            batch = r.batch(batches[i % len(batches)])
            done[r]["times_ms"].append(milliseconds(lambda: r.step(batch), shared.device))
        rates.append(gemm_rate(shared.model))
        last = ", ".join(f"{r.name} {done[r]['times_ms'][-1]:.0f}" for r in rows)
        print(f"  round {i + 1}/{steps}: {last}", flush=True)
    return dict(rows=list(done.values()), missing=missing, gemm_flops=median(rates))


def warm_up(row, batches):
    """Steps before the timed ones, and what need not be timed."""
    row.select()
    some = batches[:2]
    if row.shared.device.type == "cuda":
        some = batches  # kernels are tuned for every bucket of lengths
    losses = [row.step(row.batch(t)).item() for t in some]
    print(f"  {row.name}: warm, loss {losses[0]:.4f}", flush=True)
    first = row.batch(batches[0])
    out = dict(row=row.name, loss=losses[0], flops=mean(row.flops(row.batch(t)) for t in batches),
               tokens=mean(sum(len(x.tokens) - 1 for x in t) for t in batches),
               peak_gib=peak_bytes(row, first) / 2 ** 30, times_ms=[])
    if row.ours:
        out["predictor_ms"] = predictor_ms(row, first)
    return out


@torch.no_grad()
def predictor_ms(row, batch):
    """Milliseconds that choosing channels takes in all parts together, median of 5."""
    model, device = row.shared.model, row.shared.device
    x = torch.randn(batch.n_sparse, model.config.hidden_size, device=device).to(model.dtype)  # (n, D)
    choose = lambda: [p.select(x) for _, p in predictor.predictors(model) if p.c]
    return median([milliseconds(choose, device, queued=True) for _ in range(6)][1:])


def peak_bytes(row, batch):
    """What lies there between steps, and what one step allocates at most beyond it; on a CPU from the
    profiler's record of the allocator, the counterpart of torch.cuda.max_memory_allocated."""
    tensors = {(t.data_ptr(), t.shape): t for t in row.resident()}.values()  # a tensor counts once
    before = sum(t.numel() * t.element_size() for t in tensors)
    if row.shared.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        row.step(batch)
        return before + torch.cuda.max_memory_allocated() - start
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as p:
        row.step(batch)
    now = most = 0
    for e in p.profiler.kineto_results.events():
        if e.name() == "[memory]":
            now += e.nbytes()
            most = max(most, now)
    return before + most


def gemm_rate(model):
    """FLOP/s of the MLP's matmul over 2048 rows, now: MFU is relative to it, not to a data sheet."""
    w = torch.ones_like(model.blocks[0].mlp.down)  # (I, D)
    x = w.new_ones(2048, w.shape[1])
    n = 20 if w.is_cuda else 1
    ms = milliseconds(lambda: [x @ w.T for _ in range(n)], w.device, queued=True) / n
    return 2 * len(x) * w.numel() / ms * 1e3


# ---- single products with picked rows ----------------------------------------------------------------------

ROWS, MLP, ATTENTION = (1024, 4096, 16384), (.9, .97, .99), (.25, .5, .75)  # and sparsity ratios


def product_times(model, rows=ROWS, repeats=20):
    """Both products of kernels.py on each weight of a block (its forward is one, its backward the other) ->
    [{weight, product, ratio, T, C, N, and milliseconds, medians of calls in turn}]: ours, on a GPU the Triton
    kernel; copied, the library's with rows that were copied out before, as for channels that stay; library,
    the same with index_select; dense, all channels."""
    c, like, out = model.config, model.blocks[0].mlp.down, []
    D, Nq, Nkv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    weights = [("gate, up", 2 * c.intermediate_size, MLP), ("down", c.intermediate_size, MLP),
               ("q, k, v", Nq + 2 * Nkv, ATTENTION), ("o", Nq, ATTENTION)]
    cases = [(T, name, N, ratio) for T in rows for name, N, ratios in weights for ratio in ratios]
    for T, name, N, ratio in cases:
        x, w, wide = (like.new_empty(shape).normal_() for shape in ((T, D), (N, D), (T, N)))
        idx = predictor.top(torch.rand(N, device=w.device), predictor.count(N, ratio))
        copy, narrow = w[idx], kernels.columns(wide, idx)  # (C, D), (T, C)
        nt = dict(ours=lambda: kernels.gather_matmul_nt(x, w, idx),
                  library=lambda: kernels.gather_matmul_nt_ref(x, w, idx),
                  copied=lambda: kernels.matmul_nt(x, copy), dense=lambda: kernels.matmul_nt(x, w))
        nn = dict(ours=lambda: kernels.gather_matmul_nn(narrow, w, idx),
                  library=lambda: kernels.gather_matmul_nn_ref(narrow, w, idx),
                  copied=lambda: narrow @ copy, dense=lambda: wide @ w)
        for product, calls in (("x W[idx].T", nt), ("x W[idx]", nn)):
            times = {way: [] for way in calls}
            for _ in range(repeats + 1):  # the first round warms up, and tunes
                for way, f in calls.items():
                    times[way].append(milliseconds(f, w.device, queued=True))
            ms = {way: median(t[1:]) for way, t in times.items()}
            out.append(dict(weight=name, product=product, ratio=ratio, T=T, C=len(idx), N=N, **ms))
    return out


# ---- the machine -------------------------------------------------------------------------------------------

def machine(device):
    """What a reader needs to judge the numbers: chip, versions, commit."""
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    versions = {k: installed[k] for k in ("torch", "triton", "transformers", "peft") if k in installed}
    git = f"git -C '{config.ROOT}'"
    commit = subprocess.getoutput(f"{git} rev-parse --short HEAD")
    if subprocess.getoutput(f"{git} status --porcelain -uno -- '*.py'"):
        commit += "+changes"
    out = dict(date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), commit=commit,
               versions=dict(python=platform.python_version(), **versions), threads=torch.get_num_threads())
    if device.type == "cuda":
        return dict(device=torch.cuda.get_device_name(device), **out)
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return dict(device="cpu", cpu=cpu[1] if cpu else platform.processor(), cores=os.cpu_count(), **out)
