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


def metrics(out):
    """The lines of metrics.jsonl without what depends on the clock; never two of a step."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    keys = [(m["step"], "val_loss" in m, "held" in m) for m in lines]
    assert len(set(keys)) == len(keys), "a step twice in metrics.jsonl"
    lines.sort(key=lambda m: m["step"])  # a step's line comes one step late
    return [{k: v for k, v in m.items() if k != "seconds"} for m in lines]


def newest(out):
    """(tensors, info without what depends on clock and place) of the newest state."""
    tensors, info = state.read(sorted((Path(out) / "state").iterdir())[-1])
    return tensors, {k: v for k, v in info.items() if k not in ("seconds", "config")}


def same_run(a, b):
    """Two out_dirs hold the same run, bit for bit: adapter, moments, energies, generators, counters, metrics."""
    (ta, ia), (tb, ib) = newest(a), newest(b)
    name = next(n for n in ("adapter_model.safetensors", "model.safetensors") if (Path(a) / n).exists())
    assert equal(load_file(Path(a) / name), load_file(Path(b) / name))
    assert equal(ta, tb) and ia == ib and metrics(a) == metrics(b)


def tree(folder):
    """{path: contents} of all files, to see that nothing was written or destroyed."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file() and p.name != ".lock"}


def at_step(monkeypatch, n, do):
    """Calls do(run) before the n-th optimizer step of the next run, counted from 0."""
    real, calls = train.update, iter(range(10 ** 6))

    def update(run, lr):
        if next(calls) == n:
            do(run)
        return real(run, lr)

    monkeypatch.setattr(train, "update", update)


def term(run):
    os.kill(os.getpid(), signal.SIGTERM)


# ---- resume ----------------------------------------------------------------------------------------------------------------------

KINDS = {"measured": {}, "refresh": dict(predictor_refresh=3, sparse_ramp=0.4), "random": dict(predictor="random"), "svd": dict(predictor="svd"),
         "no warm-up": dict(sparse_start=0.0, split="random"), "all weights": dict(lora_r=0, learning_rate=1e-3, weight_decay=0.1)}


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed_equals_uninterrupted(home, tmp_path, monkeypatch, kind, capsys):
    """Stopped by a signal in the warm-up, right before an evaluation, and in the sparse part: the same bits in the end."""
    changes = KINDS[kind]
    train.main(options(home, out_dir=tmp_path / "a", **changes))
    for n in (1, 2, 4):  # steps after each start: stops after 2, 5 and 10 steps
        with monkeypatch.context() as m:
            at_step(m, n, term)
            assert train.main(options(home, out_dir=tmp_path / "b", resume=True, **changes)) is None
        assert "go on with:\n  python train.py --resume=True" in capsys.readouterr().out
    assert newest(tmp_path / "b")[1]["step"] == 10
    train.main(options(home, out_dir=tmp_path / "b", resume=True, **changes))
    same_run(tmp_path / "a", tmp_path / "b")


def test_stop_in_an_evaluation(home, tmp_path, monkeypatch):
    """The evaluation that a signal broke off is done again."""
    train.main(options(home, out_dir=tmp_path / "a"))
    with monkeypatch.context() as m:
        real = train.mean_loss
        m.setattr(train, "mean_loss", lambda run, *a: (term(run), real(run, *a))[1])
        assert train.main(options(home, out_dir=tmp_path / "b")) is None
    assert newest(tmp_path / "b")[1]["step"] == 4 and newest(tmp_path / "b")[1]["evaluated"] == 0
    train.main(options(home, out_dir=tmp_path / "b", resume=True))
    same_run(tmp_path / "a", tmp_path / "b")


def test_resume_without_and_after(home, tmp_path, capsys):
    """Without a state --resume=True starts fresh; a finished run says so and changes nothing; without --resume it is not touched."""
    train.main(options(home, out_dir=tmp_path / "a", resume=True))
    before = tree(tmp_path)
    assert train.main(options(home, out_dir=tmp_path / "a", resume=True)) is None
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds another run"):
        train.main(options(home, out_dir=tmp_path / "a", seed=1))
    assert tree(tmp_path) == before


@pytest.fixture(scope="module")
def half(home, tmp_path_factory):
    """An out_dir with states after 3 and 6 steps, as a kill in step 8 leaves it; and that of the whole run."""
    folder = tmp_path_factory.mktemp("half")
    train.main(options(home, out_dir=folder / "whole"))
    with pytest.MonkeyPatch.context() as m:
        at_step(m, 7, crash)
        with pytest.raises(ZeroDivisionError):
            train.main(options(home, out_dir=folder / "half"))
    return folder


def crash(run):
    1 / 0


def copy_half(half, tmp_path):
    shutil.copytree(half / "half", tmp_path / "b")
    return tmp_path / "b"


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def tamper(path):
    s = json.loads(path.read_text())
    s["info"]["step"] = 11
    path.write_text(json.dumps(s))


DAMAGE = {"weights cut off": lambda d: cut(d / "state.safetensors"), "a bit of the weights": lambda d: flip(d / "state.safetensors"),
          "no weights": lambda d: (d / "state.safetensors").unlink(), "empty weights": lambda d: (d / "state.safetensors").write_bytes(b""),
          "json cut off": lambda d: cut(d / "state.json"), "no json": lambda d: (d / "state.json").unlink(), "step changed": lambda d: tamper(d / "state.json"),
          "json of something else": lambda d: (d / "state.json").write_text("[1]"), "binary json": lambda d: (d / "state.json").write_bytes(b"\xff\xfe\x00"),
          "weights of the other state": lambda d: shutil.copy(d.parent / "000001/state.safetensors", d)}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_state_gives_way_to_the_one_before(half, tmp_path, capsys, kind):
    out = copy_half(half, tmp_path)
    assert state.numbers(out / "state") == [1, 2]
    DAMAGE[kind](out / "state/000002")
    tensors, info = state.load(out, newest_identity(half))
    assert info["step"] == 3
    assert "000002 is damaged" in capsys.readouterr().err


def newest_identity(half):
    info = state.read(half / "half/state/000002")[1]
    return {"config": info["config"], "prints": info["prints"]}


def test_resume_from_the_older_state(home, half, tmp_path, capsys):
    """A whole run from the older of two states, and from the newer one: both end as the uninterrupted one. All damaged: an error."""
    for damaged in (True, False):
        out = copy_half(half, tmp_path / str(damaged))
        if damaged:
            cut(out / "state/000002/state.safetensors")
        train.main(options(home, out_dir=out, resume=True))
        same_run(half / "whole", out)
    out = copy_half(half, tmp_path)
    for d in (out / "state").iterdir():
        flip(d / "state.safetensors")
    before = tree(out)
    with pytest.raises(UserError, match="every state in .* is damaged"):
        train.main(options(home, out_dir=out, resume=True))
    assert tree(out) == before


def test_torn_metrics(home, half, tmp_path):
    out = copy_half(half, tmp_path)
    with open(out / "metrics.jsonl", "a") as f:
        f.write('{"step": 9, "lo')
    train.main(options(home, out_dir=out, resume=True))
    same_run(half / "whole", out)


FIXED = dict(max_steps=13, epochs=2.0, learning_rate=1e-3, seed=1, batch_size=4, lora_r=8, mlp_sparsity=0.25, predictor="svd", sparse_start=0.5, weight_decay=0.1,
             dtype="bfloat16", max_seq_len=50, grad_clip=0.5, lr_schedule="linear", split="none", test_examples=2, lora_targets="q,v")


@pytest.mark.parametrize("name", FIXED)
def test_other_options_are_refused(home, half, tmp_path, name):
    """The message names the option and both values; nothing is changed."""
    out = copy_half(half, tmp_path)
    before = tree(out)
    with pytest.raises(UserError, match=f"{name} = .* there, {FIXED[name]!r} here"):
        train.main(options(home, out_dir=out, resume=True, **{name: FIXED[name]}))
    assert tree(out) == before


def test_other_contents_are_refused(home, half, tmp_path):
    """Weights or data with other contents under any name are refused, the same under another name are not."""
    out = copy_half(half, tmp_path)
    make_base(tmp_path / "other", rope_theta=5000.0)
    w = load_file(home / "base/model.safetensors")
    save_file({k: v * 2 for k, v in w.items()}, tmp_path / "other/model.safetensors")
    with pytest.raises(UserError, match="model = .*base' there, .*other' here, with other contents"):
        train.main(options(home, out_dir=out, resume=True, model=tmp_path / "other"))
    lines = (home / "data.jsonl").read_text()
    (tmp_path / "d.jsonl").write_text(lines.replace("Tom", "Tim"))
    with pytest.raises(UserError, match="dataset = .* with other contents"):
        train.main(options(home, out_dir=out, resume=True, dataset=tmp_path / "d.jsonl"))
    shutil.copytree(home / "base", tmp_path / "moved")
    shutil.copy(home / "data.jsonl", tmp_path / "moved.jsonl")
    train.main(options(home, out_dir=out, resume=True, model=tmp_path / "moved", dataset=tmp_path / "moved.jsonl", log_interval=5,
                       save_interval=1, recompute=True, debug=True))
    assert newest(out)[1]["step"] == 12


def test_full_disk(home, half, tmp_path, monkeypatch, capsys):
    """A save that runs out of space is reported, leaves no torn file, and the run goes on to the same end; a later save works again."""
    real, calls = state.write, iter(range(100))

    def write(path, data):
        if next(calls) in (2, 5):  # in the second save's first file, in the third save's second
            real(path, data[:len(data) // 2])
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(state, "write", write)
    train.main(options(home, out_dir=tmp_path / "b"))
    assert capsys.readouterr().out.count("could not be saved (No space left on device)") == 2
    assert not (tmp_path / "b/state/tmp").exists()
    same_run(half / "whole", tmp_path / "b")


def test_full_disk_when_stopped(home, tmp_path, monkeypatch, capsys):
    """The message does not promise a state that is not there."""
    monkeypatch.setattr(state, "write", full)
    at_step(monkeypatch, 1, term)
    train.main(options(home, out_dir=tmp_path / "b"))
    assert "could not be saved: the last saved step counts" in capsys.readouterr().out


def full(path, data):
    raise OSError(28, "No space left on device")


# ---- steps that are not finite ---------------------------------------------------------------------------------------------------

def poison(run):
    run.grad[3] = float("nan")


def test_a_step_that_is_not_finite_is_skipped(home, tmp_path, monkeypatch, capsys):
    """Weights and moments stay, the step counts, the next ones work."""
    seen = []
    real, calls = train.update, iter(range(100))

    def update(run, lr):
        before = run.flat.clone(), {k: v.clone() for k, v in train.optimizer_tensors(run).items()}
        n = next(calls)
        if n in (2, 3, 6):
            run.grad[n] = float("nan") if n % 2 else float("inf")
        out = real(run, lr)
        seen.append(torch.equal(before[0], run.flat) and equal(before[1], train.optimizer_tensors(run)))
        return out

    monkeypatch.setattr(train, "update", update)
    result = train.main(options(home, out_dir=tmp_path / "a"))
    assert seen == [n in (2, 3, 6) for n in range(12)] and result["skipped"] == 3
    assert capsys.readouterr().out.count("is not finite; the step is skipped") == 3
    assert [m["loss"] for m in metrics(tmp_path / "a") if "loss" in m and m["step"] == 3] != []


def test_three_in_a_row_end_the_run(home, tmp_path, monkeypatch):
    for n in (4, 5, 6):
        at_step(monkeypatch, n, poison)
    with pytest.raises(UserError, match="three steps in a row were not finite.*bad_batch.jsonl"):
        train.main(options(home, out_dir=tmp_path / "a"))
    texts = (tmp_path / "a/bad_batch.jsonl").read_text().splitlines()
    assert len(texts) in (3, 5) and all("Tom has" in json.loads(t) for t in texts)
    assert newest(tmp_path / "a")[1]["step"] in (3, 6)  # resumable


# ---- kills: children are forked from a server that has imported train already, so a start costs a moment ---------------------------

def faults(kill_at):
    """Kills this process before the n-th call that changes the disk. A write is torn in its middle."""
    calls, real_write = iter(range(1, 10 ** 9)), state.write

    def faulty(real):
        def call(*args, **kw):
            if next(calls) == kill_at:
                if real is real_write:
                    real(args[0], args[1][:len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kw)
        return call

    state.write = faulty(state.write)
    for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, faulty(getattr(os, name)))


def child(home, changes, kill_at):
    """The body of a child process: a run. kill_at: None, never."""
    if kill_at:
        faults(kill_at)
    sys.stdout = open(os.devnull, "w")
    torch.set_num_threads(1)
    train.main(options(home, resume=True, **changes))


def child_that_saves(out, step, kill_at):
    faults(kill_at)
    tensors, info = state.read(out / "state/000002")
    state.save(out, tensors, {**info, "step": step})


def start(target, *args):
    import multiprocessing
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tools.test_runs"])
    p = context.Process(target=target, args=args)
    p.start()
    return p


def kill_until_done(home, out, kills, rng, **changes):
    """Starts a run again and again, killed at random: half of the kills before a random write, fsync, rename or removal, half at a random
    time. The last start is left alone. -> how many were killed."""
    killed = 0
    for i in range(kills):
        p = start(child, home, dict(changes, out_dir=out), rng.randrange(1, 60) if i % 2 else None)
        if i % 2 == 0:
            time.sleep(rng.uniform(0.1, 1.5))
            p.kill()
        p.join()
        killed += p.exitcode == -signal.SIGKILL
    p = start(child, home, dict(changes, out_dir=out), None)
    p.join()
    assert p.exitcode == 0
    return killed


@pytest.mark.parametrize("kills", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_equals_uninterrupted(home, tmp_path, kills):
    """Long enough that most kills hit before the end: 40 steps, a state every second step."""
    changes = dict(max_steps=40 if kills > 9 else 20, save_interval=2, test_examples=0, eval_interval=8)
    train.main(options(home, out_dir=tmp_path / "a", **changes))
    killed = kill_until_done(home, tmp_path / "b", kills, random.Random(kills), **changes)
    print(f"{killed} of {kills} kills hit")
    assert killed >= kills * 2 // 3
    same_run(tmp_path / "a", tmp_path / "b")


def test_killed_before_every_step_of_a_save(half, tmp_path):
    """A save is killed before each of its writes, renames and removals in turn, and in the middle of each write. There is always a good
    state, the old one or the new one; the next save tidies up."""
    seen = []
    for n in range(1, 40):
        out = shutil.copytree(half / "half", tmp_path / str(n))
        p = start(child_that_saves, out, 7, n)
        p.join()
        info = state.load(out, newest_identity(half))[1]
        seen.append(info["step"])
        if p.exitcode == 0:
            break
        assert p.exitcode == -signal.SIGKILL
        tensors, _ = state.read(out / "state/000002")
        state.save(out, tensors, {**info, "step": 9})
        assert state.load(out, newest_identity(half))[1]["step"] == 9
        assert len(list((out / "state").iterdir())) == 2
    assert seen == sorted(seen) and set(seen) == {6, 7} and len(seen) >= 12


# ---- signals and the lock ----------------------------------------------------------------------------------------------------------

def slow_child(home, changes, seconds):
    """A run whose steps take so long that a signal meets one, and which writes its output to out_dir/../log."""
    real = train.update
    train.update = lambda run, lr: (time.sleep(seconds), real(run, lr))[1]
    sys.stdout = open(Path(changes["out_dir"]).parent / "log", "a", buffering=1)
    torch.set_num_threads(1)
    train.main(options(home, resume=True, **changes))


def wait_for(path, text, seconds=60):
    end = time.time() + seconds
    while time.time() < end:
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"no {text!r} in {path}")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_signals_save_and_exit_0(home, tmp_path, name):
    p = start(slow_child, home, dict(out_dir=tmp_path / "a", test_examples=0, save_interval=0), 0.2)
    wait_for(tmp_path / "log", "step    1/12")
    os.kill(p.pid, getattr(signal, name))
    p.join()
    log = (tmp_path / "log").read_text()
    step = newest(tmp_path / "a")[1]["step"]
    assert p.exitcode == 0 and 2 <= step < 8
    assert f"stopped by {name} after step {step} of 12; go on with:\n  python train.py --resume=True" in log


def test_second_interrupt_quits_at_once(home, tmp_path):
    p = start(slow_child, home, dict(out_dir=tmp_path / "a", test_examples=0), 8.0)
    wait_for(tmp_path / "log", "sparse step computes")
    wait_for(tmp_path / "a/metrics.jsonl", "")
    time.sleep(1)
    begun = time.time()
    for _ in range(2):
        os.kill(p.pid, signal.SIGINT)
        time.sleep(0.3)
    p.join()
    assert p.exitcode == 130 and time.time() - begun < 6


def test_two_runs_in_one_out_dir(home, half, tmp_path):
    """The second is refused while the first lives, and changes nothing; when the first is killed, however hard, the way is free."""
    out = copy_half(half, tmp_path)
    p = start(slow_child, home, dict(out_dir=out), 30.0)
    wait_for(tmp_path / "log", "resumed after step 6")
    before = tree(out)
    for resume in (True, False):
        with pytest.raises(UserError, match="in use by another run"):
            train.main(options(home, out_dir=out, resume=resume))
    assert tree(out) == before
    p.kill()
    p.join()
    train.main(options(home, out_dir=out, resume=True))
    same_run(half / "whole", out)


def test_foreign_out_dir_is_left_alone(home, tmp_path):
    """A directory with weights of something else, the base itself among them, and a file in the place of a directory."""
    before = tree(home)
    for out in (home / "base", home / "data.jsonl", home / "data.jsonl/x"):
        for resume in (True, False):
            with pytest.raises(UserError, match="choose another --out_dir"):
                train.main(options(home, out_dir=out, resume=resume))
    assert tree(home) == before


# ---- several processes (gloo on the CPU) -------------------------------------------------------------------------------------------

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
    real = train.make_batches

    def make_batches(run, split, idx, seed=0):
        out = []
        for r in range(2):
            with pytest.MonkeyPatch.context() as m:
                m.setattr(dist, "rank", lambda: r)
                m.setattr(dist, "world", lambda: 2)
                out += real(run, split, idx, seed)
        return out

    monkeypatch.setattr(train, "make_batches", make_batches)


def assert_close_runs(a, b):
    """The same losses and gradient norms in every step, and the same adapter, to float rounding."""
    ma, mb = ([m for m in metrics(x) if "loss" in m] for x in (a, b))
    assert len(ma) == len(mb) > 0
    for x, y in zip(ma, mb):
        assert (x["step"], x["scale"], x["lr"], x["tokens"]) == (y["step"], y["scale"], y["lr"], y["tokens"])
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5) and x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-3)
    wa, wb = weights(a), weights(b)
    assert wa.keys() == wb.keys()
    for k in wa:
        torch.testing.assert_close(wa[k], wb[k], rtol=1e-3, atol=1e-4)


PARALLEL = {"dense": dict(mlp_sparsity=0.0, attn_sparsity=0.0), "svd": dict(predictor="svd"), "measured": {}}


@pytest.mark.parametrize("kind", PARALLEL)
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


@pytest.mark.parametrize("kind", PARALLEL)
def test_fsdp_equals_data_parallel(home, tmp_path, kind):
    """Bit for bit, with a rank that has one micro-batch less, and with recomputation."""
    changes = dict(PARALLEL[kind], micro_batch_size=2, recompute=kind == "measured")
    assert run_ranks(home, out_dir=tmp_path / "ddp", **changes) == [0, 0]
    assert run_ranks(home, out_dir=tmp_path / "fsdp", fsdp=True, **changes) == [0, 0], (tmp_path / "log0").read_text()[-3000:]
    assert equal(weights(tmp_path / "ddp"), weights(tmp_path / "fsdp"))
    a, b = (json.loads((tmp_path / x / "result.json").read_text()) for x in ("ddp", "fsdp"))
    assert all(a[k] == b[k] for k in ("val_loss", "test_loss", "val_accuracy", "after", "before"))


def hook_shards(rank):
    """Writes down how many rows of each frozen weight this rank holds once the model is loaded, and how many it read from the files."""
    import model
    real, read = train.load_model, {}

    def load_model(*args):
        loaded = real(*args)
        rows = {n: [p.to_local().shape[0], p.shape[0]] for n, p in loaded.named_parameters() if hasattr(p, "to_local")}
        print("ROWS", json.dumps([rows, read]), flush=True)
        return loaded

    real_tensor = model.load_tensor

    def load_tensor(source, p, first, rows, transposed, name):
        class Counted:
            def __getitem__(self, at):
                t = source[at]
                read[name] = t.shape[1 if transposed else 0]
                return t
            get_shape = source.get_shape
        real_tensor(Counted(), p, first, rows, transposed, name)

    train.load_model, model.load_tensor = load_model, load_tensor


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
    train.update = lambda run, lr: (rank == 1 and next(calls) == 4 and term(run), real(run, lr))[1]


@pytest.mark.parametrize("ranks", [(2, 1), (1, 2), (2, 3)])
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
        torch.testing.assert_close(ta[k], tb[k], rtol=1e-5 if k.startswith("energies") else 0, atol=0)


def hook_death(rank):
    real, calls = train.update, iter(range(100))
    train.update = lambda run, lr: (rank == 1 and next(calls) == 4 and os._exit(3), real(run, lr))[1]


def hook_hang(rank):
    real, calls = train.update, iter(range(100))
    train.update = lambda run, lr: (rank == 1 and next(calls) == 4 and time.sleep(40), real(run, lr))[1]


@pytest.mark.parametrize("hook", [hook_death, pytest.param(hook_hang, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fsdp", [False, True])
def test_a_rank_that_dies_or_hangs_ends_the_job(home, tmp_path, hook, fsdp):
    """The others say so in one sentence, and their states stay."""
    begun = time.time()
    codes = run_ranks(home, hook=hook, out_dir=tmp_path / "a", fsdp=fsdp, timeout=20)
    last = (tmp_path / "log0").read_text().splitlines()[-1]
    assert codes[0] == 1 and codes[1] != 0 and last.startswith("error: rank 0 of 2 lost the others: one ended, or did not answer within the timeout")
    assert "Traceback" not in (tmp_path / "log0").read_text()
    assert time.time() - begun < 60 and newest(tmp_path / "a")[1]["step"] == 3


def test_torchrun(home, tmp_path):
    """The real launcher: a run of 2 processes on the command line, and one whose rank 1 dies."""
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    flags = [str(home / "c.py"), f"--out_dir={tmp_path}/a", "--max_steps=4", "--test_examples=0", "--eval_interval=0"]
    done = subprocess.run([*torchrun, str(ROOT / "train.py"), *flags], capture_output=True, text=True, env=env())
    assert done.returncode == 0 and done.stdout.count("step    3/4") == 1, done.stderr[-2000:]
    (tmp_path / "dies.py").write_text("import os, sys\nimport train\nreal = train.update\n"
                                      "def update(run, lr):\n    if os.environ['RANK'] == '1' and run.info['step'] == 2:\n        os._exit(3)\n    return real(run, lr)\n"
                                      "train.update = update\ntrain.cli(sys.argv[1:])\n")
    begun = time.time()
    done = subprocess.run([*torchrun, str(tmp_path / "dies.py"), *flags, f"--out_dir={tmp_path}/b"], capture_output=True, text=True, env=env())
    assert done.returncode == 1 and time.time() - begun < 60
    assert "lost the others" in done.stderr or "exitcode  : 3" in done.stderr.replace("exitcode : 3", "exitcode  : 3")


def env(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}
