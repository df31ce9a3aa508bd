"""Whole runs: resume bit for bit, kills, signals, locks, damaged states, two processes, and every kind of bad input.

A run here is train.py on a random LLaMA of 3 blocks and 48 short word problems: 12 steps in about a second.
"""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import config
import train
from config import UserError
from model import LLaMA, ModelConfig
from tools import dist, state, validate

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


def test_looking_does_not_change_the_training(home, tmp_path):
    """How often a run is evaluated, saved and printed is not seen in its weights, not even with channels drawn at random."""
    train.main(options(home, out_dir=tmp_path / "a", predictor="random"))
    train.main(options(home, out_dir=tmp_path / "b", predictor="random", eval_interval=0, save_interval=0, log_interval=5))
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_stop_in_an_evaluation(home, tmp_path, monkeypatch):
    """The evaluation that a signal broke off is done again."""
    train.main(options(home, out_dir=tmp_path / "a"))
    with monkeypatch.context() as m:
        real = validate.mean_loss
        m.setattr(validate, "mean_loss", lambda run, *a: (term(run), real(run, *a))[1])
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


def test_blocks_may_be_numbers(home, tmp_path):
    """In a saved state they are text; its checksum has to hold."""
    changes = dict(out_dir=tmp_path / "a", mlp_sparsity={1: .5, "0": .5}, save_interval=2)
    train.main(options(home, max_steps=4, **changes))
    newest = tmp_path / f"a/state/{state.numbers(tmp_path / 'a/state')[-1]:06d}"
    assert state.read(newest)[1]["finished"]  # Damaged, where the checksum does not hold
    assert train.main(options(home, max_steps=4, resume=True, **changes)) is None  # the same run, and finished


def test_a_run_that_ends_dense_can_be_finished(home, tmp_path, monkeypatch):
    """Stopped between its last step and the timing of its sparse steps, with `measured`."""
    changes = dict(out_dir=tmp_path / "a", predictor="measured", sparse_start=.25, sparse_end=.75, max_steps=4)
    with monkeypatch.context() as m:
        m.setattr(train, "time_ratio", lambda *a: (_ for _ in ()).throw(train.Interrupted))
        assert train.main(options(home, **changes)) is None
    assert train.main(options(home, resume=True, **changes))["time_ratio"] > 0


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


# ---- what a run says ---------------------------------------------------------------------------------------

def test_each_step_has_its_own_seconds(home, tmp_path, monkeypatch):
    """Though a step is reported when the next one has been launched; an evaluation counts for none."""
    real, calls, real_evaluate = train.forward_backward, iter(range(100)), train.evaluate
    monkeypatch.setattr(train, "forward_backward", lambda *a: (time.sleep(next(calls) in (1, 6)), real(*a)))
    monkeypatch.setattr(train, "evaluate", lambda *a: (time.sleep(1), real_evaluate(*a))[1])
    result = train.main(options(home, out_dir=tmp_path / "a", eval_interval=4))
    seconds = {m["step"]: m["seconds"] for m in metrics_lines(tmp_path / "a") if "seconds" in m}
    assert [k for k, s in seconds.items() if s >= 1] == [1, 6] and len(seconds) == 12
    assert abs(sum(seconds.values()) - result["seconds"]) < 1e-6


def test_a_named_gpu_becomes_the_current_one(home, monkeypatch):
    """Triton launches there, wherever its tensors lie."""
    seen, cuda = [], dict(is_available=lambda: True, device_count=lambda: 2, set_device=lambda d: seen.append(d),
                          get_device_capability=lambda d: (7, 5), get_device_name=lambda d: "a T4")
    for name, f in cuda.items():
        monkeypatch.setattr(torch.cuda, name, f)
    assert dist.setup(options(home, device="cuda:1")) == torch.device("cuda", 1) and seen == [torch.device("cuda", 1)]
    dist.setup(options(home, device="cuda"))
    dist.setup(options(home, device="cpu"))
    assert len(seen) == 1
    for name, dtype, message in (("cuda:7", "float32", "there are 2 GPUs here, and cuda:7 is not one of them"),
                                 ("cuda", "bfloat16", "a T4 has no bfloat16"), ("gpu", "float32", "has to be auto, cpu, cuda")):
        with pytest.raises(UserError, match=message):
            dist.use(name, dtype)


# ---- steps that are not finite ---------------------------------------------------------------------------------------------------

def poison(run):
    run.grad[3] = float("nan")


def test_a_step_that_is_not_finite_is_skipped(home, tmp_path, monkeypatch, capsys):
    """Weights and moments stay, the step counts, the next ones work."""
    seen = []
    real, calls = train.update, iter(range(100))

    def update(run, lr):
        before = run.flat.clone(), {k: v.clone() for k, v in state.optimizer_tensors(run).items()}
        n = next(calls)
        if n in (2, 3, 6):
            run.grad[n] = float("nan") if n % 2 else float("inf")
        out = real(run, lr)
        seen.append(torch.equal(before[0], run.flat) and equal(before[1], state.optimizer_tensors(run)))
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
    """Long enough that most kills hit before the end: 160 steps, a state every second step."""
    changes = dict(max_steps=160 if kills > 9 else 20, save_interval=2, test_examples=0, eval_interval=8)
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
    before, names = tree(home), set(home.rglob("*"))
    for out in (home / "base", home / "data.jsonl", home / "data.jsonl/x"):
        for resume in (True, False):
            with pytest.raises(UserError, match="choose another --out_dir"):
                train.main(options(home, out_dir=out, resume=resume))
    assert tree(home) == before and set(home.rglob("*")) == names


def test_one_process_prepares_the_data(tmp_path, monkeypatch):
    """Of several that miss a data set's files, one runs prepare.py and the others wait for it."""
    import data.examples as examples
    (tmp_path / "new").mkdir()
    (tmp_path / "new/prepare.py").write_text("")
    calls = []

    class Prepare:
        @staticmethod
        def main():
            calls.append(1)
            time.sleep(0.3)
            (tmp_path / "new/train.jsonl").write_text('{"prompt": "a", "response": "b"}\n')

    monkeypatch.setattr(examples, "HERE", str(tmp_path))
    monkeypatch.setattr(examples.importlib, "import_module", lambda name: Prepare)
    with ThreadPoolExecutor(4) as pool:
        assert [len(e) for e in pool.map(lambda i: examples.load("new", "train"), range(4))] == [1] * 4
    assert len(calls) == 1


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


def hook_answers(rank):
    """Writes down every generated text."""
    real = LLaMA.generate

    def generate(self, prompts, *args, **kw):
        outs = real(self, prompts, *args, **kw)
        print("\n".join(f"ANSWER {p} {o}" for p, o in zip(prompts, outs)), flush=True)
        return outs

    LLaMA.generate = generate


@pytest.mark.parametrize("kind", [pytest.param("dense", marks=pytest.mark.slow), "svd", "measured"])
def test_fsdp_equals_data_parallel(home, tmp_path, kind):
    """Bit for bit, with a rank that has one micro-batch less, and with recomputation; both ranks generate the same texts."""
    changes = dict(PARALLEL[kind], micro_batch_size=2, recompute=kind == "measured")
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
    from tools import checkpoint
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
    train.update = lambda run, lr: (rank == 1 and next(calls) == 4 and term(run), real(run, lr))[1]


@pytest.mark.parametrize("ranks", [(2, 1), (1, 2), pytest.param((2, 3), marks=pytest.mark.slow)])
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
        torch.testing.assert_close(ta[k], tb[k], rtol=1e-5 if k.startswith("energies") else 0, atol=0)


def hook_death(rank):
    real, calls = train.update, iter(range(100))
    train.update = lambda run, lr: (rank == 1 and next(calls) == 4 and os._exit(3), real(run, lr))[1]


def hook_death_in_forward(rank):
    """Under FSDP the others then wait in a block's all-gather."""
    real, calls = LLaMA.loss, iter(range(1000))
    LLaMA.loss = lambda self, batch: (rank == 1 and torch.is_grad_enabled() and next(calls) == 6 and os._exit(3), real(self, batch))[1]


def hook_hang(rank):
    real, calls = train.update, iter(range(100))
    train.update = lambda run, lr: (rank == 1 and next(calls) == 4 and time.sleep(40), real(run, lr))[1]


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


# ---- bad input: one sentence as stderr's last line, exit code 1, nothing written -----------------------------------------------------

def flags(*args):
    return lambda home, tmp: list(args)


def file(text):
    """A config file with this text after the good one."""
    def make(home, tmp):
        (tmp / "bad.py").write_text(text)
        return [str(tmp / "bad.py")]
    return make


def base(change, *args):
    """A copy of the checkpoint, changed."""
    def make(home, tmp):
        shutil.copytree(home / "base", tmp / "m")
        change(tmp / "m")
        return [f"--model={tmp}/m", *args]
    return make


def raw(*drop, **values):
    """Changes config.json."""
    def change(m):
        c = {k: v for k, v in {**json.loads((m / "config.json").read_text()), **values}.items() if k not in drop}
        (m / "config.json").write_text(json.dumps(c))
    return change


def tensors(change):
    """Changes the tensors of model.safetensors in place."""
    def do(m):
        w = load_file(m / "model.safetensors")
        change(w)
        save_file({k: v.contiguous() for k, v in w.items()}, m / "model.safetensors")
    return do


def shards(names, keep, index=None):
    """Cuts the checkpoint into two shards with an index. names: of the shards in the index; keep: of the files that are there."""
    def do(m):
        w = load_file(m / "model.safetensors")
        (m / "model.safetensors").unlink()
        keys = sorted(w)
        for i, name in enumerate(keep):
            save_file({k: w[k] for k in keys[i::2]}, m / name)
        text = json.dumps({"weight_map": {k: names[i % 2] for i, k in enumerate(keys)}}) if index is None else index
        (m / "model.safetensors.index.json").write_text(text)
    return do


def rows(*lines, raw=None):
    """A data set of these lines."""
    def make(home, tmp):
        data = raw if raw is not None else "".join((l if isinstance(l, str) else json.dumps(l)) + "\n" for l in lines).encode()
        (tmp / "d.jsonl").write_bytes(data)
        return [f"--dataset={tmp}/d.jsonl"]
    return make


def adapter(change=lambda a: None, config={}, state=lambda s: s, base=None):
    """An adapter for the base (or one with other sizes), changed."""
    def make(home, tmp):
        make_base(tmp / "other", **(base or {}))
        model = LLaMA.from_pretrained(tmp / "other")
        model.add_lora(4, 8)
        model.save_adapter(tmp / "ad", "x")
        c = json.loads((tmp / "ad/adapter_config.json").read_text())
        (tmp / "ad/adapter_config.json").write_text(json.dumps({**c, **config}))
        save_file(state(load_file(tmp / "ad/adapter_model.safetensors")), tmp / "ad/adapter_model.safetensors")
        change(tmp / "ad")
        return [f"--init_adapter={tmp}/ad"]
    return make


def tokenizer(text):
    return lambda m: (m / "tokenizer.json").write_text(text)


def pickled(m):
    (m / "model.safetensors").rename(m / "pytorch_model.bin")


S1, S2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Q = "model.layers.1.self_attn.q_proj.weight"
GOOD = {"prompt": "a", "response": "b"}

BAD = {
    # options
    "unknown flag": (flags("--lerning_rate=1"), "unknown option 'lerning_rate'.*learning_rate"),
    "flag without value": (flags("--resume"), "--name=value"),
    "stray argument": (flags("config"), "cannot read the argument 'config'"),
    "single dash": (flags("-max_steps=3"), "cannot read the argument"),
    "unknown name in a file": (file("batchsize = 3\n"), "unknown option 'batchsize'.*batch_size"),
    "wrong type": (flags("--max_steps=many"), "max_steps has to be int, not 'many'"),
    "float for an int": (flags("--max_steps=1.5"), "max_steps has to be int, not 1.5"),
    "int for a bool": (flags("--recompute=1"), "recompute has to be True or False, not 1"),
    "wrong type in a file": (file("batch_size = '8'\n"), "batch_size has to be int, not '8'"),
    "code as a value": (flags("--max_steps=__import__('os').getpid()"), "max_steps has to be int"),
    "no such config file": (flags("config/mathh.py"), "cannot read the config file config/mathh.py"),
    "config file with a syntax error": (file("batch_size = \n"), "does not run .SyntaxError"),
    "config file that fails": (file("batch_size = 1 // 0\n"), "does not run .ZeroDivisionError"),
    "config file that is not text": (lambda home, tmp: [(tmp / "bad.py").write_bytes(b"\xff\xfe"), str(tmp / "bad.py")][1:], "does not run|not UTF-8"),
    "batch of nothing": (flags("--batch_size=0"), "batch_size has to be at least 1"),
    "negative rank": (flags("--lora_r=-4"), "lora_r has to be at least 0"),
    "negative steps": (flags("--max_steps=-1"), "max_steps has to be at least 0"),
    "no steps": (flags("--max_steps=0", "--epochs=0"), "max_steps has to be above 0"),
    "learning rate 0": (flags("--learning_rate=0"), "learning_rate has to be above 0"),
    "learning rate inf": (flags("--learning_rate=1e999"), "learning_rate has to be above 0, not inf"),
    "learning rate as text": (flags("--learning_rate=nan"), "learning_rate has to be float, not 'nan'"),
    "sequence of 1": (flags("--max_seq_len=1"), "max_seq_len has to be at least 2"),
    "lora target": (flags("--lora_targets=q,w"), "lora_targets has to be some of q,k,v,o"),
    "predictor": (flags("--predictor=svp"), "predictor has to be one of svd"),
    "prompt format": (flags("--prompt_format=llama2"), "prompt_format has to be one of plain"),
    "dtype": (flags("--dtype=float8"), "dtype has to be one of float32"),
    "half for trained weights": (flags("--lora_r=0", "--dtype=bfloat16"), "dtype has to be float32 where lora_r is 0"),
    "ends before it starts": (flags("--sparse_start=.5", "--sparse_end=.4"), "sparse_end has to be at least sparse_start"),
    "ratio 1": (flags("--mlp_sparsity=1.0"), r"mlp_sparsity has the ratio 1.0, which is not a number in \[0, 1\)"),
    "ratio below 0": (flags("--attn_sparsity=-.1"), "attn_sparsity has the ratio -0.1"),
    "ratios of the wrong length": (flags("--mlp_sparsity=[.5,.5]"), "mlp_sparsity lists 2 ratios, but the model has 3 blocks"),
    "block that is not there": (flags('--mlp_sparsity={"1-3": .5}'), "mlp_sparsity names block 3, but the model's blocks are 0 to 2"),
    "block named twice": (flags('--mlp_sparsity={"0-1": .5, "1": .2}'), "mlp_sparsity names block 1 twice"),
    "range backwards": (flags('--mlp_sparsity={"2-1": .5}'), "a range of blocks is written"),
    "ratio in words": (flags("--mlp_sparsity=half"), "mlp_sparsity has to be"),
    # device
    "cuda": (flags("--device=cuda"), "device = 'cuda', but torch sees no CUDA GPU"),
    "device": (flags("--device=gpu"), "device has to be auto, cpu, cuda or cuda:N"),
    "fsdp alone": (flags("--fsdp=True"), "fsdp = True .* torchrun"),
    # model
    "no such model": (flags("--model=/nowhere/base"), "model '/nowhere/base' is neither a directory nor a hub id"),
    "no config.json": (base(lambda m: (m / "config.json").unlink()), "config.json does not exist"),
    "config.json is not JSON": (base(lambda m: (m / "config.json").write_text("{")), "config.json is not valid JSON"),
    "config.json is a list": (base(lambda m: (m / "config.json").write_text("[]")), "config.json .*object"),
    "unknown architecture": (base(raw(model_type="mamba")), "model_type 'mamba' is not one of llama"),
    "no architecture": (base(raw("model_type")), "model_type None is not one of"),
    "RoPE scaling": (base(raw(rope_scaling={"rope_type": "yarn", "factor": 4.0})), "RoPE scaling of type 'yarn'"),
    "RoPE scaling without its numbers": (base(raw(rope_scaling={"rope_type": "llama3", "factor": 4.0})), "low_freq_factor must be a positive number, not None .in rope_scaling"),
    "RoPE scaling of the wrong form": (base(raw(rope_scaling="linear")), "rope_scaling"),
    "no hidden_size": (base(raw("hidden_size")), "hidden_size must be a positive integer, not None"),
    "layers as text": (base(raw(num_hidden_layers="3")), "num_hidden_layers must be a positive integer, not '3'"),
    "heads": (base(raw(num_key_value_heads=3)), "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
    "negative key/value heads": (base(raw(num_key_value_heads=-2)), "num_key_value_heads must be a positive integer"),
    "head_dim": (base(raw(head_dim=7)), "head_dim must be even"),
    "activation": (base(raw(hidden_act="gelu")), "only SwiGLU"),
    "rope_theta as text": (base(raw(rope_theta="big")), "rope_theta must be a positive number"),
    "eos as text": (base(raw(eos_token_id="</s>")), "eos_token_id has to be a token"),
    "eos outside the vocabulary": (base(raw(eos_token_id=5000)), "eos_token_id has to be a token of the vocabulary of 768"),
    "sliding window": (base(raw(model_type="mistral", sliding_window=32)), "max_seq_len = 64 is longer than the model's sliding window of 32"),
    "q/k norms": (base(lambda m: None, "--attn_sparsity=.5"), None),  # filled in below
    "quantized": (base(raw(quantization_config={"quant_method": "gptq"})), "quantiz"),
    "no weights": (base(lambda m: (m / "model.safetensors").unlink()), "has no model.safetensors"),
    "pickle": (base(pickled), "only pickled weights, which can execute code"),
    "missing shard": (base(shards((S1, S2), (S1,))), f"shard {S2} of model.safetensors.index.json is missing"),
    "extra shard": (base(shards((S1, S1), (S1, S2))), f"{S2} is not in model.safetensors.index.json"),
    "index that is not JSON": (base(shards((S1, S2), (S1, S2), "{")), "index.json is not valid JSON"),
    "index without a map": (base(shards((S1, S2), (S1, S2), "{}")), "index.json has no weight_map"),
    "index that points outside": (base(shards((S1, "../" + S2), (S1, S2))), "index.json has no weight_map from tensors to files beside it"),
    "weights cut off": (base(lambda m: cut(m / "model.safetensors")), "is not a readable safetensors file"),
    "weights of garbage": (base(lambda m: (m / "model.safetensors").write_bytes(b"x" * 999)), "is not a readable safetensors file"),
    "empty weights": (base(lambda m: (m / "model.safetensors").write_bytes(b"")), "is not a readable safetensors file"),
    "another shape": (base(tensors(lambda w: w.update({Q: w[Q][:32]}))), r"q_proj.weight has shape \[32, 32\], config.json says \[64, 32\]"),
    "missing tensor": (base(tensors(lambda w: w.pop(Q))), f"1 tensors are missing .* {Q}"),
    "extra tensor": (base(tensors(lambda w: w.update({Q.replace(".1.", ".7."): w[Q].clone()}))), "tensor .* has no place in this architecture"),
    "integer weights": (base(tensors(lambda w: w.update({Q: w[Q].to(torch.int8)}))), "q_proj.weight"),
    "weights that are not numbers": (base(tensors(lambda w: w[Q].fill_(float("nan")))), "three steps in a row were not finite|not finite"),
    # tokenizer
    "no tokenizer": (base(lambda m: (m / "tokenizer.json").unlink()), "tokenizer"),
    "tokenizer that is not JSON": (base(tokenizer("{")), "tokenizer.json"),
    "tokenizer of another kind": (base(tokenizer('{"model": {"type": "Unigram", "vocab": []}}')), "tokenizer.json is not a byte-level BPE"),
    "tokenizer of the wrong form": (base(tokenizer("[]")), "tokenizer.json"),
    "tokenizer does not fit": (base(lambda m: (raw(vocab_size=700, eos_token_id=0)(m), tensors(lambda w: w.update({"model.embed_tokens.weight": w["model.embed_tokens.weight"][:700]}))(m))),
                               "the tokenizer of .* has 7.. tokens, the model's vocab_size is 700"),
    "chat format without its tokens": (flags("--prompt_format=llama3"), "needs the special token .*--prompt_format=plain"),
    # data
    "no such data": (flags("--dataset=/nowhere/d.jsonl"), "nowhere/d.jsonl"),
    "no such data set": (flags("--dataset=gsm9k"), "gsm9k.*gsm8k"),
    "validation data": (flags("--val_dataset=/nowhere/d.jsonl"), "nowhere/d.jsonl"),
    "a directory without data": (lambda home, tmp: [f"--dataset={tmp}"], "there is no 'train' part|train.jsonl"),
    "empty data": (rows(raw=b""), "d.jsonl holds no examples"),
    "data of blank lines": (rows("", " "), "d.jsonl holds no examples"),
    "not UTF-8": (rows(raw=b'{"prompt": "\xe9", "response": "b"}\n'), "line 1: not UTF-8"),
    "not JSON": (rows(GOOD, "{oops"), "line 2: not JSON"),
    "not objects": (rows(GOOD, "[1]"), "line 2: has to be an object"),
    "prompt of the wrong type": (rows({"prompt": 3, "response": "b"}), 'line 1: the field "prompt" has to be text, not 3'),
    "no response": (rows({"prompt": "a"}), 'line 1: the field "response" is missing'),
    "empty response": (rows(GOOD, {"prompt": "a", "response": " "}), "line 2: the response is empty"),
    "answer of the wrong type": (rows({**GOOD, "answer": ["b"]}), 'the field "answer" has to be text'),
    "history of the wrong form": (rows({**GOOD, "history": ["a"]}), 'the field "history" has to be'),
    "messages in the wrong order": (rows({"messages": [{"role": "assistant", "content": "a"}]}), 'messages.0..role" has to be "user"'),
    "half a surrogate pair": (rows('{"prompt": "\\ud800", "response": "b"}'), "surrogate"),
    "all too long": (rows({"prompt": "word " * 200, "response": "b"}), "no example is left .*1 too long.*max_seq_len is 64"),
    # adapter
    "no such adapter": (flags("--init_adapter=/nowhere/a"), "/nowhere/a"),
    "no adapter": (lambda home, tmp: [f"--init_adapter={home}/base"], "adapter_config.json is missing"),
    "adapter with fewer sizes": (adapter(base=dict(hidden_size=16)), "needs"),
    "adapter for a deeper base": (adapter(base=dict(num_hidden_layers=5)), "is for another base: it has 5 blocks, this one 3"),
    "adapter for a shallower base": (adapter(base=dict(num_hidden_layers=2)), "ad"),
    "DoRA": (adapter(config=dict(use_dora=True)), "use_dora = True.*only plain LoRA"),
    "adapter of pickle": (adapter(lambda a: (a / "adapter_model.safetensors").rename(a / "adapter_model.bin")), "no adapter_model.safetensors"),
    "adapter cut off": (adapter(lambda a: cut(a / "adapter_model.safetensors")), "is not a readable safetensors file"),
    "adapter's config is not JSON": (adapter(lambda a: (a / "adapter_config.json").write_text("{")), "adapter_config.json is not valid JSON"),
    "adapter of rank 0": (adapter(config=dict(r=0)), "positive r"),
    "adapter without lora": (adapter(state=lambda s: {"x": torch.zeros(2)}), "changes none of"),
    # out_dir
    "out_dir below a file": (lambda home, tmp: [f"--out_dir={home}/data.jsonl/x"], "out_dir = .* cannot be written to"),
}
BAD["q/k norms"] = (base(lambda m: (raw(model_type="qwen3")(m), tensors(lambda w: w.update({f"model.layers.{i}.self_attn.{t}_norm.weight": torch.ones(16) for i in range(3) for t in "qk"}))(m))),
                    "attn_sparsity = 0.5 cannot be used with a qwen3 model")


@pytest.mark.parametrize("name", BAD)
def test_bad_input(home, tmp_path, capsys, monkeypatch, name):
    make, message = BAD[name]
    argv = [str(home / "c.py"), f"--out_dir={tmp_path}/out", *make(home, tmp_path)]
    before = tree(tmp_path), tree(home)
    with pytest.raises(SystemExit) as stop:
        train.cli(argv)
    err = capsys.readouterr().err
    last = err.splitlines()[-1]
    assert stop.value.code == 1 and last.startswith("error: ") and "Traceback" not in err, err[-2000:]
    assert re.search(message, last), last
    assert name == "weights that are not numbers" or (tree(tmp_path), tree(home)) == before and not (tmp_path / "out").exists()


SHELL = ["unknown flag", "unknown name in a file", "ratio 1", "block that is not there", "cuda", "pickle", "weights cut off", "unknown architecture",
         "not UTF-8", "empty response", "all too long", "adapter for a deeper base"]


def test_bad_input_in_a_shell(home, tmp_path):
    """A dozen of them through `python train.py`, in processes of their own."""
    def try_one(name):
        tmp = tmp_path / name
        tmp.mkdir()
        make, message = BAD[name]
        argv = [str(home / "c.py"), f"--out_dir={tmp}/out", *make(home, tmp)]
        before = tree(tmp)
        done = subprocess.run([sys.executable, str(ROOT / "train.py"), *argv], capture_output=True, text=True, env=env(), cwd=tmp)
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and last.startswith("error: ") and "Traceback" not in done.stderr and re.search(message, last), done.stderr
        assert tree(tmp) == before and not (tmp / "out").exists()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(try_one, SHELL))


def test_resume_in_a_shell(home, half, tmp_path):
    """The command that a stopped run prints goes on with it, quotes and all; a finished run exits 0 and says so."""
    argv = ['--mlp_sparsity={"0-1": 0.5}', f"--out_dir={tmp_path}/a b", "--save_interval=1"]
    p = subprocess.Popen([sys.executable, "-u", "train.py", str(home / "c.py"), *argv], stdout=subprocess.PIPE, text=True, env=env(), cwd=ROOT)
    for line in p.stdout:
        if line.startswith("step    1/12"):
            p.terminate()
            break
    rest = p.stdout.read()
    assert p.wait() == 0 and "stopped by SIGTERM" in rest, rest
    line = rest.splitlines()[-1].strip()
    assert line.startswith("python train.py ") and line.endswith(" --resume=True")
    for text in ("12 steps in", "is finished"):
        done = subprocess.run(line.replace("python", sys.executable, 1), shell=True, capture_output=True, text=True, env=env(), cwd=ROOT)
        assert done.returncode == 0 and text in done.stdout, done.stderr


def test_debug_shows_the_traceback(home, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.cli([str(home / "c.py"), f"--out_dir={tmp_path}/out", "--model=/nowhere/x", "--debug=True"])
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("error: model '/nowhere/x'")


def test_too_long_examples_are_dropped_and_counted(home, tmp_path, capsys):
    (argv,) = rows({"prompt": "word " * 200, "response": "b"}, *[GOOD] * 6, {"prompt": "a", "response": "long " * 100})(home, tmp_path)
    train.cli([str(home / "c.py"), f"--out_dir={tmp_path}/out", argv, "--max_steps=1", "--test_examples=0"])
    assert "train 6 examples of" in (out := capsys.readouterr().out) and "dropped: 2 too long, 0 nothing scored" in out


def test_memory_and_interrupts_are_one_sentence(home, tmp_path, monkeypatch, capsys):
    def fail(error):
        def do(run):
            raise error
        return do

    full = OSError(28, "No space left on device", "x/adapter_model.safetensors")
    for error, message in ((torch.OutOfMemoryError("CUDA out of memory"), "out of memory on cpu with micro-batches of 3 examples of up to 64 tokens: lower "
                            "micro_batch_size or set recompute=True; a saved state stays"),
                           (full, "No space left on device .x/adapter_model.safetensors.; a saved state stays")):
        with monkeypatch.context() as m:
            at_step(m, 4, fail(error))
            with pytest.raises(SystemExit) as stop:
                train.cli([str(home / "c.py"), f"--out_dir={tmp_path}/out", "--resume=True"])
        assert stop.value.code == 1 and re.match("error: " + message, capsys.readouterr().err.splitlines()[-1])
    with monkeypatch.context() as m:
        at_step(m, 4, fail(full))
        with pytest.raises(SystemExit):
            train.cli([str(home / "c.py"), f"--out_dir={tmp_path}/unsaved", "--save_interval=0"])
    assert capsys.readouterr().err.splitlines()[-1].endswith("(x/adapter_model.safetensors)")
    monkeypatch.setattr(train, "resolve", lambda path: fail(KeyboardInterrupt())(0))
    with pytest.raises(SystemExit):
        train.cli([str(home / "c.py"), f"--out_dir={tmp_path}/b"])
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted before the training began") and not (tmp_path / "b").exists()


def test_gpus_that_cannot_serve(home, tmp_path, monkeypatch):
    """As if there were two GPUs, of a kind without bfloat16: what is asked for is named, before anything touches a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    for changes, message in ((dict(device="cuda:5"), "there are 2 GPUs here, and cuda:5 is not one of them"),
                             (dict(device="cuda", dtype="bfloat16"), "Tesla T4 has no bfloat16: use --dtype=float16"),
                             (dict(device="auto", dtype="bfloat16"), "Tesla T4 has no bfloat16")):
        with pytest.raises(UserError, match=message):
            dist.setup(options(home, **changes))
    monkeypatch.setenv("LOCAL_RANK", "2")
    for changes, message in ((dict(device="cuda:1"), "names one GPU, but under torchrun each process takes its own"),
                             (dict(device="cuda"), "there are 2 GPUs here, and cuda:2 is not one of them.*--nproc_per_node")):
        with pytest.raises(UserError, match=message):
            dist.setup(options(home, **changes))


def test_bad_input_on_two_ranks(home, tmp_path):
    """Each rank ends with the sentence; none waits for another."""
    for changes, message in ((dict(batch_size=1), "batch_size = 1 is less than one example for each of 2 processes"),
                             (dict(fsdp=True, lora_r=0), "with lora_r = 0 none is frozen"), (dict(dataset="/nowhere/d.jsonl"), "nowhere")):
        assert run_ranks(home, out_dir=tmp_path / "a", **changes) == [1, 1]
        for r in range(2):
            last = (tmp_path / f"log{r}").read_text().splitlines()[-1]
            assert last.startswith("error: ") and message in last
    assert not (tmp_path / "a").exists()


def test_nothing_executes_data():
    """No pickle and no remote code anywhere; eval and exec only where config files are run."""
    for path in [p for p in ROOT.rglob("*.py") if not any(part.startswith((".", "out")) for part in p.relative_to(ROOT).parts)]:
        if "test_" not in path.name and path.parent.name != "results":
            text = path.read_text()
            for word in ("pickle.", "import pickle", " torch.load(", "trust_remote_code=True", " torch.save(", "yaml.load"):
                assert word not in text, (path, word)
            assert path.name in ("__init__.py", "sandbox.py") or not re.search(r"(?<![.\w])(eval|exec)\(", text), path
