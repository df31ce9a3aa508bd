"""What the tests of whole runs share: a tiny base, runs that are stopped, and what they left, compared.

A run here is train.py on a random LLaMA of 3 blocks and 48 short word problems: 12 steps in about a second.
"""
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import config
import train
from model import LLaMA, ModelConfig
from lib import state

ROOT = Path(__file__).resolve().parent.parent
train.TIMED_STEPS = 2  # eleven take as long as the twelve steps of a run
SIZES = dict(model_type="llama", vocab_size=832, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True, eos_token_id=738)
OPTIONS = dict(prompt_format="plain", device="cpu", dtype="float32", threads=1, max_seq_len=64, batch_size=5, micro_batch_size=3, max_steps=12,
               learning_rate=1e-2, eval_interval=4, eval_examples=6, save_interval=3, test_examples=4, max_new_tokens=4, lora_r=4, lora_alpha=8.0,
               lora_targets="q,k,v,o,gate,up,down", mlp_sparsity=0.5, attn_sparsity=0.5, predictor="measured", sparse_start=0.25)


def kinds(every, fast):
    """The argument `kind` of a test: each of `every`, those that are not in `fast` marked slow."""
    return pytest.mark.parametrize("kind", [kind if kind in fast else pytest.param(kind, marks=pytest.mark.slow)
                                            for kind in every])


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


def weights(out):
    return load_file(Path(out) / "adapter_model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def metrics_lines(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def metrics(out):
    """The lines of metrics.jsonl without what depends on the clock; never two of a step."""
    lines = metrics_lines(out)
    keys = [(m["step"], "val_loss" in m, "held" in m) for m in lines]
    assert len(set(keys)) == len(keys), "a step twice in metrics.jsonl"
    lines.sort(key=lambda m: m["step"])  # a step's line comes one step late
    return [{k: v for k, v in m.items() if k != "seconds"} for m in lines]


def newest(out):
    """(tensors, info without what depends on clock and place) of the newest state."""
    tensors, info = state.read(sorted((Path(out) / "state").iterdir())[-1])
    return tensors, {k: v for k, v in info.items() if k not in ("seconds", "config")}


def same_run(a, b):
    """Two out_dirs hold the same run, bit for bit: adapter, moments, what was measured, generators, counters, metrics."""
    (ta, ia), (tb, ib) = newest(a), newest(b)
    name = next(n for n in ("adapter_model.safetensors", "model.safetensors") if (Path(a) / n).exists())
    assert equal(load_file(Path(a) / name), load_file(Path(b) / name))
    assert equal(ta, tb) and ia == ib and metrics(a) == metrics(b)


def tree(folder):
    """{path: contents} of all files, to see that nothing was written or destroyed."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file() and p.name != ".lock"}


def at_step(monkeypatch, n, do):
    """Calls do(grad) before the n-th optimizer step of the next run, counted from 0."""
    real, calls = train.update, iter(range(10 ** 6))

    def update(optimizer, grad, *args):
        if next(calls) == n:
            do(grad)
        return real(optimizer, grad, *args)

    monkeypatch.setattr(train, "update", update)


def crash(grad):
    1 / 0


def term(*_):
    os.kill(os.getpid(), signal.SIGTERM)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def start(target, *args):
    import multiprocessing
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_runs", "tests.test_ranks"])
    p = context.Process(target=target, args=args)
    p.start()
    return p


def env(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}
