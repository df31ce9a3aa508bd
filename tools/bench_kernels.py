"""The second table of tools.bench: each product with picked rows, at the shapes that the model uses.

    ours      the Triton kernel of kernels.py                       only on a GPU
    fused     the same gathering x's columns itself (nn_gather);
              ours copies them out first                            only on a GPU
    library   index_select + the library's matmul (kernels.*_ref)   what runs on a CPU
    dense     the same product with all channels

    nt   y = x W[idx].T, compact, or scattered into columns idx
    nn   y = x W[idx], x compact, or its columns idx gathered

Calls take turns; medians. share = (dense ms / ours ms) / (N / C): how much of the FLOPs saved arrives. GB/s
counts every operand once (kernels.py's table), and may pass the memory's where the L2 cache holds some;
TFLOP/s 2 T C D. Where `library` or `fused` wins on a GPU by more than noise, the rule belongs into
kernels.use_library or gather_first, with these numbers.
"""
import torch

import kernels
from tools.bench_measure import milliseconds, quantile

MLP, ATTENTION, ROWS = (.9, .97, .99), (.25, .5, .75), (1024, 4096, 16384)


def products(c):
    """(name, kind, N, ratio) of every sparse product of a block: kind is nt, nt_scatter, nn or nn_gather."""
    hd, inner = c.head_dim, c.intermediate_size
    Nq, N = c.num_attention_heads * hd, (c.num_attention_heads + 2 * c.num_key_value_heads) * hd
    for s in MLP:
        yield from (("gate, up", "nt", 2 * inner, s), ("down", "nn", inner, s),
                    ("dh of down", "nt", inner, s), ("dx of gate, up", "nn", 2 * inner, s))
    for s in ATTENTION:
        yield from (("q, k, v", "nt_scatter", N, s), ("o", "nn_gather", Nq, s),
                    ("dx of q, k, v", "nn_gather", N, s), ("dx of o", "nt_scatter", Nq, s))


def calls(kind, x, xc, w, idx, out):
    """{ours, fused, library, dense: a function} of one product. x (T, D) for nt, (T, N) for nn; xc (T, C):
    nn's compact operand."""
    if kind in ("nt", "nt_scatter"):
        to = out if kind == "nt_scatter" else None
        fs = dict(ours=lambda: kernels.nt_triton(x, w, idx, to),
                  library=lambda: kernels.gather_matmul_nt_ref(x, w, idx, to),
                  dense=lambda: x @ w.T)
    else:
        gather, a = kind == "nn_gather", x if kind == "nn_gather" else xc
        fs = dict(ours=lambda: kernels.nn_triton(kernels.columns(a, idx) if gather else a, w, idx),
                  library=lambda: kernels.gather_matmul_nn_ref(a, w, idx, gather),
                  dense=lambda: x @ w)
        if gather:
            fs["fused"] = lambda: kernels.nn_triton(a, w, idx, True)
    on_gpu = x.is_cuda and kernels.triton is not None
    return fs if on_gpu else {k: f for k, f in fs.items() if k not in ("ours", "fused")}


def table(c, dtype, device, rows=ROWS, repeats=0):
    """[{op, kind, ratio, T, C, ours_ms, fused_ms, library_ms, dense_ms, ...}] of model config c; ours_ms and
    fused_ms are None where they do not run."""
    D, e, out = c.hidden_size, torch.finfo(dtype).bits // 8, []
    repeats = repeats or (20 if device.type == "cuda" else 3)
    for T in rows:
        for name, kind, N, s in products(c):
            C = min(N, max(16, -(-round(N * (1 - s)) // 16) * 16))
            idx = torch.randperm(N, generator=torch.Generator().manual_seed(0))[:C].sort().values.to(device)
            x, xc, w, y = (torch.randn(*shape, device=device).to(dtype)
                           for shape in ((T, D if kind.startswith("nt") else N), (T, C), (N, D), (T, N)))
            fs = calls(kind, x, xc, w, idx, y)
            times = {k: [] for k in fs}
            for i in range(repeats + 1):  # the first round warms up, and tunes
                for k, f in fs.items():
                    times[k].append(milliseconds(f, device))
            ms = {k: quantile(t[1:]) for k, t in times.items()}
            best = ms.get("ours", ms["library"])
            out.append(dict(op=name, kind=kind, ratio=s, T=T, C=C, N=N, ours_ms=ms.get("ours"),
                            fused_ms=ms.get("fused"), library_ms=ms["library"], dense_ms=ms["dense"],
                            share=ms["dense"] / best * C / N,
                            gb_s=e * (T * D + C * D + T * C) / best / 1e6,
                            tflop_s=2 * T * C * D / best / 1e9))
    return out
