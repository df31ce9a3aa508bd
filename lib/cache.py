"""The SVD factors of a base on disk, in ~/.cache/nanosparselora (XDG_CACHE_HOME): it is factorized once.
A cache is not worth a failure: what cannot be read is made again, what cannot be written is not kept.
"""
import hashlib
import os
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def checksum(w):
    """A 64-bit position-dependent sum of the bits of w (N, D), computed where w lies, in row blocks."""
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[w.element_size()]
    total = torch.zeros((), dtype=torch.int64, device=w.device)
    odd = torch.arange(w.shape[1], device=w.device) * 0x9E3779B97F4A7C1 + 1  # (D,), wraps
    for i in range(0, w.shape[0], 1024):
        rows = w[i:i + 1024].detach().view(ints).to(torch.int64)
        total += ((rows * odd).sum(1)
                  * (torch.arange(i, i + len(rows), device=w.device) * 0x2545F4914F6CDD1D + 3)).sum()
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
