"""The SVD's factors of a base's weights, W.T ~= P Q, and where they lie on disk: ~/.cache/nanosparselora
(XDG_CACHE_HOME), so that a base is factorized once. What they are for: predictor.py.
A cache is not worth a failure: what cannot be read is made again, what cannot be written is not kept.
"""
import hashlib
import os
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lib import dist


def factorize(w, rank):
    """w (N, D) -> P (D, r), Q (r, N) fp32 with w.T ~= P Q, the best approximation of that rank to within 1e-3
    of its error.

    Randomized subspace iteration (Halko, Martinsson, Tropp 2011) on a block of r + 24 vectors: 18 thin
    products with w instead of an eigendecomposition of a 4096 x 4096 matrix, for 5 weights of each of 32
    blocks. Deterministic: the start block is seeded."""
    w = w.float()
    k = min(rank + 24, *w.shape)
    g = torch.Generator().manual_seed(0)
    y = w @ torch.randn(w.shape[1], k, generator=g).to(w.device)  # (N, k)
    for _ in range(8):
        y = w @ torch.linalg.qr(w.T @ torch.linalg.qr(y).Q).Q
    y = torch.linalg.qr(y).Q  # (N, k), orthonormal
    u, s, vh = torch.linalg.svd(y.T @ w, full_matrices=False)  # of (k, D)
    r = min(rank, k)
    P = vh[:r].T
    Q = ((y @ u[:, :r]) * s[:r]).T
    return P.contiguous(), Q.contiguous()


def factors(weights, rank):
    """weights: a function that yields (part's name, number within the part, w (N, D)) -> {part's name: [(P, Q) of
    each of its weights]} on the CPU, from the cache where these very weights were factorized before. The key has a
    checksum of all their bits, so a changed model never meets stale factors. Over several ranks all factorize
    together, or none does."""
    key = [f"1 {rank}"]
    for name, _, w in weights():
        key.append(f"{name} {tuple(w.shape)} {checksum(w)}")
    file = path(" ".join(key))
    tensors = load(file)
    if not dist.agree(bool(tensors)):
        tensors = {}
        for name, i, w in weights():
            P, Q = factorize(w, rank)
            tensors[f"{name}.P{i}"] = P.cpu()
            tensors[f"{name}.Q{i}"] = Q.cpu()
        save(file, tensors)
    return by_part(tensors)


def by_part(tensors):
    """{"0.mlp.P0": P, "0.mlp.Q0": Q, "0.mlp.P1": ...} -> {"0.mlp": [(P, Q), ...]}"""
    out = {}
    for key in sorted(tensors):
        name, factor = key.rsplit(".", 1)
        if factor.startswith("P"):
            Q = tensors[f"{name}.Q{factor[1:]}"]
            out.setdefault(name, []).append((tensors[key], Q))
    return out


# ---- the cache ---------------------------------------------------------------------------------------------

def checksum(w):
    """A 64-bit position-dependent sum of the bits of w (N, D), computed where w lies, in row blocks."""
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[w.element_size()]
    total = torch.zeros((), dtype=torch.int64, device=w.device)
    by_column = torch.arange(w.shape[1], device=w.device) * 0x9E3779B97F4A7C1 + 1  # (D,), odd; wraps
    for i in range(0, w.shape[0], 1024):
        bits = w[i:i + 1024].detach().view(ints).to(torch.int64)
        by_row = torch.arange(i, i + len(bits), device=w.device) * 0x2545F4914F6CDD1D + 3
        total += ((bits * by_column).sum(1) * by_row).sum()
    return int(total)


def path(key):
    """Of the file for this key, a text."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nanosparselora"
    return folder / f"svd-{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"


def load(file):
    """{name: tensor}; {} where there is none, or a damaged one."""
    try:
        with safe_open(file, "pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}
    except Exception:
        return {}


def save(file, tensors):
    tmp = file.with_suffix(f".{os.getpid()}.tmp")  # two runs may save the same factors
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, tmp)
        os.replace(tmp, file)
    except (OSError, SafetensorError):  # a read-only home; a full disk
        with suppress(OSError):
            tmp.unlink()
