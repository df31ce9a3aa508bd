"""Whole runs: resume bit for bit, kills, signals, locks, damaged states, two processes, and every kind of bad input.

A run here is train.py on a random LLaMA of 3 blocks and 48 short word problems: 12 steps in about a second.
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import config
import train
from config import UserError
from model import LLaMA, ModelConfig
from tools import dist, state

ROOT = Path(__file__).resolve().parent.parent
SIZES = dict(model_type="llama", vocab_size=768, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True, eos_token_id=738)
OPTIONS = dict(prompt_format="plain", device="cpu", dtype="float32", threads=1, max_seq_len=64, batch_size=5, micro_batch_size=3, max_steps=12,
               learning_rate=1e-2, eval_interval=4, eval_examples=6, save_interval=3, test_examples=4, max_new_tokens=4, lora_r=4, lora_alpha=8.0,
               lora_targets="q,k,v,o,gate,up,down", mlp_sparsity=0.5, attn_sparsity=0.5, predictor="measured", sparse_start=0.25)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with a random checkpoint `base`, `data.jsonl`, `val.jsonl` and a config file `c.py`."""
    home = tmp_path_factory.mktemp("runs")
    make_base(home / "base")
    rng = random.Random(0)
    for name, n in (("data", 48), ("val", 8)):
        lines = []
        for _ in range(n):
            a, b = rng.randrange(50), rng.randrange(50)
            lines.append(json.dumps(dict(prompt=f"Tom has {a} apples and buys {b} more. How many apples has Tom?" + " Well?" * rng.randrange(5),
                                         response=f" {a} + {b} = {a + b}. #### {a + b}", answer=str(a + b))))
        (home / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    options = dict(OPTIONS, model=str(home / "base"), dataset=str(home / "data.jsonl"), val_dataset=str(home / "val.jsonl"))
    (home / "c.py").write_text("".join(f"{k} = {v!r}\n" for k, v in options.items()))
    return home


def make_base(folder, **sizes):
    """A random checkpoint with the embedded tokenizer."""
    folder.mkdir()
    torch.manual_seed(1)
    raw = dict(SIZES, **sizes)
    LLaMA(ModelConfig.from_dict(raw)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "data/tiny/untrained" / name, folder)
    return folder


def options(home, **changes):
    return config.load([str(home / "c.py")] + [f"--{k}={v}" for k, v in changes.items()])


def command(home, *flags):
    return [sys.executable, str(ROOT / "train.py"), str(home / "c.py"), *flags]


def weights(out):
    return load_file(Path(out) / "adapter_model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
