"""What tools.bench reads off the machine: milliseconds of a step and of single products, peak memory, the
rates of a matmul and of a copy, chip and versions.

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
from lib.flops import at_work
from sparse import loud_counts

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

def measure(shared, rows, batches, steps):
    """One step of each row in turn, the first row another one every round, so that a load that comes and goes
    hits all alike -> {"rows": [dict], "missing": {row that cannot run: why}, "gemm_flops", "copy_bytes": the
    machine's rates a second, medians between the rounds}."""
    done, missing, rates = {}, {}, []
    for r in rows:
        try:
            done[r] = warm_up(r, batches)
        except torch.OutOfMemoryError:
            missing[r.name] = "out of memory"
            torch.cuda.empty_cache()
        except Exception as e:  # of others' code, or of torch.compile; an error of ours is a bug
            if r.ours:
                raise
            missing[r.name] = (str(e) or repr(e)).splitlines()[0]
    rows = list(done)
    machine_rates(shared.model)  # warms up
    for i in range(steps):
        for j in range(len(rows)):
            r = rows[(i + j) % len(rows)]
            r.select()
            batch = r.batch(batches[i % len(batches)])
            done[r]["times_ms"].append(milliseconds(lambda: r.step(batch), shared.device))
        rates.append(machine_rates(shared.model))
        last = ", ".join(f"{r.name} {done[r]['times_ms'][-1]:.0f}" for r in rows)
        print(f"  round {i + 1}/{steps}: {last}", flush=True)
    gemm, copy = map(median, zip(*rates))
    for out in done.values():
        out["roofline_ms"] = 1e3 * (out["flops"] / gemm + out["traffic"] / copy)
    return dict(rows=list(done.values()), missing=missing, gemm_flops=gemm, copy_bytes=copy)


def warm_up(row, batches):
    """Steps before the timed ones, and what need not be timed."""
    row.select()
    some = batches[:2]
    if row.shared.device.type == "cuda":
        some = batches  # kernels are tuned for every bucket of lengths
    losses = [row.step(row.batch(t)).item() for t in some]
    print(f"  {row.name}: warm, loss {losses[0]:.4f}", flush=True)
    first, model = row.batch(batches[0]), row.shared.model
    counted = [row.counted(row.batch(t)) for t in batches]
    out = dict(row=row.name, loss=losses[0], flops=mean(model.flops(b)[1] for b in counted),
               traffic=mean(traffic(model, b) for b in counted),
               tokens=mean(sum(len(x.tokens) - 1 for x in t) for t in batches),
               peak_gib=peak_bytes(row, first) / 2 ** 30, times_ms=[])
    if row.ours:
        out["predictor_ms"] = predictor_ms(row, first)
        out["unpack_ms"] = unpack_ms(row)
    return out


def unpack_ms(row):
    """Milliseconds that unpacking all weights once takes, median of 5; 0 where none is packed."""
    packed, device = row.shared.model.packed(), row.shared.device
    unpack = lambda: [kernels.unpacked(w) for w in packed]
    return median([milliseconds(unpack, device, queued=True) for _ in range(6)][1:])


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


# ---- the roofline ------------------------------------------------------------------------------------------

def machine_rates(model):
    """(FLOP/s of the MLP's matmul over 2048 rows in the model's dtype, bytes/s of a copy), now: what a step
    could reach under this load, not a data sheet's numbers."""
    like = model.blocks[0].mlp.down  # (I, D), which may be packed
    w = torch.ones(like.shape, dtype=like.dtype, device=like.device)
    x = w.new_ones(2048, w.shape[1])
    n, size = 1, 2 ** 26
    if w.is_cuda:
        n, size = 20, 2 ** 30
    a = torch.empty(size, dtype=torch.uint8, device=w.device)
    b = a.clone()
    gemm = milliseconds(lambda: [x @ w.T for _ in range(n)], w.device, queued=True) / n
    copy = milliseconds(lambda: [b.copy_(a) for _ in range(n)], w.device, queued=True) / n
    return 2 * len(x) * w.numel() / gemm * 1e3, 2 * size / copy * 1e3


def traffic(model, batch):
    """Bytes that a step moves outside its matmuls and attention, each operand of each elementwise pass once.
    In each block, a row: two norms (2 D forward, 3 D backward), two residual adds (3 D, 3 D); RoPE, the way
    into the grid and back (8 Nq, 8 Nkv); SwiGLU (3 C, 5 C). Then the loss (5 V), and AdamW (7 fp32 numbers
    for each of LoRA's)."""
    c = model.config
    T, T_loss, numbers = len(batch.tokens), batch.loss.stop - batch.loss.start, 0
    for i, b in enumerate(model.blocks):
        n, t = batch.n_sparse, T
        if i == len(model.blocks) - 1:
            n, t = 0, T_loss
        numbers += 22 * t * c.hidden_size + 8 * t * c.intermediate_size
        p = at_work(b.mlp, True, n)
        if p is not None:
            numbers -= 8 * n * (c.intermediate_size - p.c)
        p = at_work(b.attn, True, n)
        if p is not None and p.no_queries:
            t -= n
        if b.mlp.skips_backward and n:
            loud = sum(loud_counts(batch, b.mlp.backward_sparsity))
            numbers -= (5 * (n - loud) - 3 * loud) * c.intermediate_size  # the loud rows' forward is made twice
        if b.attn.skips_backward and n:
            t -= n / 2 - sum(loud_counts(batch, b.attn.backward_sparsity))
        numbers += 8 * c.head_dim * (t * c.num_attention_heads + T * c.num_key_value_heads)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return model.embed.element_size() * (numbers + 5 * T_loss * c.vocab_size) + 28 * trained


# ---- single products with picked rows ----------------------------------------------------------------------

ROWS, MLP, ATTENTION = (1024, 4096, 16384), (.9, .97, .99), (.25, .5, .75)  # and sparsity ratios


def product_times(model, rows=ROWS, repeats=20):
    """Both products of kernels.py on each weight of a block (its forward is one, its backward the other) ->
    [{weight, product, ratio, T, C, N, and milliseconds, medians of calls in turn}]: ours, on a GPU the Triton
    kernel; copied, the library's with rows that were copied out before, as for channels that stay; library,
    the same with index_select; dense, all channels."""
    c, like, out = model.config, model.embed, []
    D, Nq, Nkv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    weights = [("gate, up", 2 * c.intermediate_size, MLP), ("down", c.intermediate_size, MLP),
               ("q, k, v", Nq + 2 * Nkv, ATTENTION), ("o", Nq, ATTENTION)]
    cases = [(T, name, N, ratio) for T in rows for name, N, ratios in weights for ratio in ratios]
    for T, name, N, ratio in cases:
        x, w, wide = (like.new_empty(shape).normal_() for shape in ((T, D), (N, D), (T, N)))
        idx = predictor.top(torch.rand(N, device=w.device), predictor.number_kept(N, ratio))
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
