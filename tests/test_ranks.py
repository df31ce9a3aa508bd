"""Runs of several processes: gloo on the CPU.
"""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from model import LLaMA
from lib import dist
from tests.testing import ROOT, at_step, env, equal, kinds, metrics, newest, options, start, term, weights


def rank_child(home, changes, rank, world, port, hook):
    """One of `world` ranks, as torchrun would start it. hook(rank): called first."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    log = Path(changes["out_dir"]).parent / f"log{rank}"
    sys.stdout = sys.stderr = open(log, "a", buffering=1)
    torch.set_num_threads(1)
    if hook:
        hook(rank)
    flags = [f"--{k}={v}" for k, v in dict(changes, resume=True).items()]
    train.cli([str(home / "c.py"), *flags])


def run_ranks(home, world=2, hook=None, **changes):
    """-> the ranks' exit codes."""
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = [start(rank_child, home, changes, r, world, port, hook) for r in range(world)]
    for p in ranks:
        p.join()
    return [p.exitcode for p in ranks]


def as_two_ranks(monkeypatch):
    """One process makes the micro-batches of two ranks, one after the other: with svd each of them gets its own channels."""
    real = dist.micro_batches

    def micro_batches(*args, **kw):
        out = []
        for r in range(2):
            with pytest.MonkeyPatch.context() as m:
                m.setattr(dist, "rank", lambda: r)
                m.setattr(dist, "world", lambda: 2)
                out += real(*args, **kw)
        return out

    monkeypatch.setattr(dist, "micro_batches", micro_batches)


def assert_close_runs(a, b):
    """The same losses and gradient norms in every step, and the same adapter, to float rounding."""
    ma, mb = ([m for m in metrics(x) if "loss" in m] for x in (a, b))
    assert len(ma) == len(mb) > 0
    for x, y in zip(ma, mb):
        assert (x["step"], x["sparse"], x["lr"], x["tokens"]) == (y["step"], y["sparse"], y["lr"], y["tokens"])
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5) and x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-3)
    wa, wb = weights(a), weights(b)
    assert wa.keys() == wb.keys()
    for k in wa:
        torch.testing.assert_close(wa[k], wb[k], rtol=1e-3, atol=1e-4)


PARALLEL = {"dense": dict(mlp_sparsity=0.0, attn_sparsity=0.0), "svd": dict(predictor="svd"), "measured": {},
            "no queries": dict(attn_sparsity=1), "backward": dict(mlp_sparsity=0.0, attn_sparsity=0.0, backward_sparsity=.7)}


@kinds(PARALLEL, fast=("measured", "backward"))
def test_two_ranks_equal_one_process(home, tmp_path, monkeypatch, kind):
    """48 examples in batches of 5: shares of 3 and 2, in the last batch of an epoch 2 and 1."""
    changes = dict(PARALLEL[kind], micro_batch_size=2)
    with monkeypatch.context() as m:
        if kind == "svd":
            as_two_ranks(m)
        one = train.main(options(home, out_dir=tmp_path / "one", **changes))
    assert run_ranks(home, out_dir=tmp_path / "two", **changes) == [0, 0]
    assert_close_runs(tmp_path / "one", tmp_path / "two")
    two = json.loads((tmp_path / "two/result.json").read_text())
    for key in ("val_loss", "test_loss"):
        assert one[key] == pytest.approx(two[key], rel=1e-5)
    assert one["test_examples"] == two["test_examples"] == 4 and one["tokens"] == two["tokens"]


def hook_answers(rank):
    """Writes down every generated text."""
    real = LLaMA.generate

    def generate(self, prompts, *args, **kw):
        outs = real(self, prompts, *args, **kw)
        print("\n".join(f"ANSWER {p} {o}" for p, o in zip(prompts, outs)), flush=True)
        return outs

    LLaMA.generate = generate


@kinds(PARALLEL, fast=("measured",))
def test_fsdp_equals_data_parallel(home, tmp_path, kind):
    """Bit for bit, with a rank that has one micro-batch less, and with recomputation; both ranks generate the same texts."""
    changes = dict(PARALLEL[kind], micro_batch_size=2, recompute=kind in ("measured", "backward"))
    assert run_ranks(home, hook=hook_answers, out_dir=tmp_path / "ddp", **changes) == [0, 0]
    answers = sorted(l for r in range(2) for l in (tmp_path / f"log{r}").read_text().splitlines() if l.startswith("ANSWER"))
    for r in range(2):
        (tmp_path / f"log{r}").unlink()
    assert run_ranks(home, hook=hook_answers, out_dir=tmp_path / "fsdp", fsdp=True, **changes) == [0, 0], (tmp_path / "log0").read_text()[-3000:]
    for r in range(2):
        assert sorted(l for l in (tmp_path / f"log{r}").read_text().splitlines() if l.startswith("ANSWER")) == answers != []
    assert equal(weights(tmp_path / "ddp"), weights(tmp_path / "fsdp"))
    a, b = (json.loads((tmp_path / x / "result.json").read_text()) for x in ("ddp", "fsdp"))
    assert all(a[k] == b[k] for k in ("val_loss", "test_loss", "val_accuracy", "after", "before"))


def hook_shards(rank):
    """Writes down how many rows of each frozen weight this rank holds once the model is loaded, and how many it read from the files."""
    from lib import files as checkpoint
    real, read = train.load_model, {}

    def load_model(*args):
        loaded = real(*args)
        rows = {n: [p.to_local().shape[0], p.shape[0]] for n, p in loaded.named_parameters() if hasattr(p, "to_local")}
        assert all(hasattr(block, "unshard") for block in loaded.blocks)  # gathered one at a time
        print("ROWS", json.dumps([rows, read]), flush=True)
        return loaded

    real_tensor = checkpoint.load_tensor

    def load_tensor(source, p, first, rows, transposed, name):
        class Counted:
            def __getitem__(self, at):
                t = source[at]
                read[name] = t.shape[1 if transposed else 0]
                return t
            get_shape, get_dtype = source.get_shape, source.get_dtype
        real_tensor(Counted(), p, first, rows, transposed, name)

    train.load_model, checkpoint.load_tensor = load_model, load_tensor


def test_fsdp_reads_and_keeps_its_share(home, tmp_path):
    """Each of 2 ranks holds half the rows of every weight in the blocks, and has read as many; the adapter is on neither cut up."""
    assert run_ranks(home, hook=hook_shards, out_dir=tmp_path / "a", fsdp=True, max_steps=1, test_examples=0, eval_interval=0) == [0, 0]
    total = {}
    for r in range(2):
        line = next(l for l in (tmp_path / f"log{r}").read_text().splitlines() if l.startswith("ROWS"))
        rows, read = json.loads(line[5:])
        assert len(rows) == 3 * 6 and all(a * 2 == b for a, b in rows.values())
        for k, n in read.items():
            total[k] = total.get(k, 0) + n
    sizes = {k: v.shape[1 if "o_proj" in k or "down_proj" in k else 0] for k, v in load_file(home / "base/model.safetensors").items()}
    whole = "model.embed_tokens.weight", "model.norm.weight"  # every rank has all of these
    assert {k.split(": ")[1]: n for k, n in total.items()} == {k: n * (2 if k in whole else 1) for k, n in sizes.items()}


def hook_signal(rank):
    """Rank 1 gets a SIGTERM in step 4; rank 0 does not."""
    real, calls = train.update, iter(range(100))
    train.update = lambda *a: (rank == 1 and next(calls) == 4 and term(), real(*a))[1]


@pytest.mark.parametrize("ranks", [(2, 1), *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in [(1, 2), (2, 3)])])
def test_resume_on_another_number_of_ranks(home, tmp_path, monkeypatch, ranks):
    """Stopped after 5 steps on some ranks (by a signal to one of them), gone on with on others; the same run but for rounding."""
    train.main(options(home, out_dir=tmp_path / "a"))
    first, then = ranks
    with monkeypatch.context() as m:
        if first == 1:
            at_step(m, 4, term)
            train.main(options(home, out_dir=tmp_path / "b"))
        else:
            assert run_ranks(home, first, hook=hook_signal, out_dir=tmp_path / "b") == [0] * first
    assert newest(tmp_path / "b")[1]["step"] == 5
    assert run_ranks(home, then, out_dir=tmp_path / "b") == [0] * then if then > 1 else train.main(options(home, out_dir=tmp_path / "b", resume=True))
    assert_close_runs(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "measured"])
def test_two_ranks_resume_bit_for_bit(home, tmp_path, kind):
    """Each rank's own generator of random channels goes on where it was; measured energies of both ranks count once (they are summed in
    another order, so they alone may differ by rounding)."""
    changes = dict(predictor=kind, sparse_start=0.5)  # stopped in step 4: in the warm-up
    assert run_ranks(home, out_dir=tmp_path / "a", **changes) == [0, 0]
    assert run_ranks(home, hook=hook_signal, out_dir=tmp_path / "b", **changes) == [0, 0]
    assert run_ranks(home, hook=hook_signal, out_dir=tmp_path / "b", **changes) == [0, 0]  # stopped after 10: in the sparse part
    assert newest(tmp_path / "b")[1]["step"] == 10
    assert run_ranks(home, out_dir=tmp_path / "b", **changes) == [0, 0]
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    (ta, ia), (tb, ib) = newest(tmp_path / "a"), newest(tmp_path / "b")
    assert ia == ib and ta.keys() == tb.keys()
    for k in ta:
        torch.testing.assert_close(ta[k], tb[k], rtol=1e-5 if ".sums." in k or ".map." in k else 0, atol=0)


def hook_death(rank):
    real, calls = train.update, iter(range(100))
    train.update = lambda *a: (rank == 1 and next(calls) == 4 and os._exit(3), real(*a))[1]


def hook_death_in_forward(rank):
    """Under FSDP the others then wait in a block's all-gather."""
    real, calls = LLaMA.loss, iter(range(1000))
    LLaMA.loss = lambda self, batch, **k: (rank == 1 and torch.is_grad_enabled() and next(calls) == 6 and os._exit(3), real(self, batch, **k))[1]


def hook_hang(rank):
    real, calls = train.update, iter(range(100))
    train.update = lambda *a: (rank == 1 and next(calls) == 4 and time.sleep(40), real(*a))[1]


@pytest.mark.parametrize("hook", [hook_death, hook_death_in_forward, pytest.param(hook_hang, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fsdp", [False, True])
def test_a_rank_that_dies_or_hangs_ends_the_job(home, tmp_path, hook, fsdp):
    """The others say so in one sentence, and their states stay."""
    begun = time.time()
    codes = run_ranks(home, hook=hook, out_dir=tmp_path / "a", fsdp=fsdp, timeout=20)
    last = (tmp_path / "log0").read_text().splitlines()[-1]
    assert codes[0] == 1 and codes[1] != 0 and last.startswith("error: rank 0 of 2 lost the others: one ended, or did not answer within the timeout")
    assert "Traceback" not in (tmp_path / "log0").read_text()
    assert time.time() - begun < 60 and newest(tmp_path / "a")[1]["step"] in (3, 6)


def torchrun(script, home, out):
    """The real launcher: a run of 2 processes on the command line."""
    launcher = [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    flags = [str(home / "c.py"), f"--out_dir={out}", "--max_steps=4", "--test_examples=0", "--eval_interval=0"]
    return subprocess.run([*launcher, str(script), *flags], capture_output=True, text=True, env=env())


def test_torchrun(home, tmp_path):
    done = torchrun(ROOT / "train.py", home, tmp_path / "a")
    assert done.returncode == 0 and done.stdout.count("step    3/4") == 1, done.stderr[-2000:]


@pytest.mark.slow
def test_torchrun_with_a_rank_that_dies(home, tmp_path):
    (tmp_path / "dies.py").write_text("import os, sys\nimport train\nreal = train.update\n"
                                      "calls = iter(range(100))\ndef update(*a):\n    if os.environ['RANK'] == '1' and next(calls) == 2:\n        os._exit(3)\n    return real(*a)\n"
                                      "train.update = update\ntrain.cli(sys.argv[1:])\n")
    begun = time.time()
    done = torchrun(tmp_path / "dies.py", home, tmp_path / "b")
    assert done.returncode == 1 and time.time() - begun < 60
    assert "lost the others" in done.stderr or "exitcode  : 3" in done.stderr.replace("exitcode : 3", "exitcode  : 3")


def test_bad_input_on_two_ranks(home, tmp_path):
    """Each rank ends with the sentence; none waits for another."""
    for changes, message in ((dict(batch_size=1), "batch_size = 1 is less than one example for each of 2 processes"),
                             (dict(fsdp=True, lora_r=0), "with lora_r = 0 none is frozen"), (dict(dataset="/nowhere/d.jsonl"), "nowhere")):
        assert run_ranks(home, out_dir=tmp_path / "a", **changes) == [1, 1]
        last = [(tmp_path / f"log{r}").read_text().splitlines()[-1] for r in range(2)]
        assert all(line.startswith("error: ") for line in last)
        # what is wrong with the data is found when the ranks have met: the second may come too late for that
        assert all(message in line for line in last) or message == "nowhere" and message in last[0] + last[1]
    assert not (tmp_path / "a").exists()
