"""More than one GPU, in one place. A reader of the single-GPU path needs to know only: rank() is 0, world() is 1, all_reduce does nothing."""
import os

import torch
import torch.distributed as td

from config import UserError


def rank():
    return td.get_rank() if td.is_initialized() else 0


def world():
    return td.get_world_size() if td.is_initialized() else 1


def setup(cfg):
    """Joins the process group that torchrun announces, and returns this process's torch.device."""
    if cfg.device == "auto":
        cfg.device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.device(cfg.device).type
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("device = 'cuda', but torch sees no CUDA GPU here: use --device=cpu, or install a CUDA build of torch")
    if kind == "cuda" and cfg.dtype == "bfloat16" and torch.cuda.get_device_capability()[0] < 8:
        raise UserError(f"dtype = 'bfloat16', but {torch.cuda.get_device_name()} has no bfloat16: use --dtype=float16")
    return torch.device(cfg.device)


def all_reduce(t):
    """Sums t over all ranks, in place."""
    if td.is_initialized():
        td.all_reduce(t)
    return t
