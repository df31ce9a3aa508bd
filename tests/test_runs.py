"""Whole runs: resume bit for bit, kills, signals, locks, damaged states.
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

import predictor
import train
from config import UserError
from model import LLaMA
from lib import dist, evaluate, log, state
from lib.signals import Signals
from tests.testing import (ROOT, at_step, crash, cut, env, equal, flip, kinds, make_base, metrics, metrics_lines, newest,
                           options, same_run, start, term, tree, weights)


# ---- resume ------------------------------------------------------------------------------------------------

KINDS = {"measured": {}, "no queries": dict(attn_sparsity=1), "backward": dict(mlp_sparsity=0.0, attn_sparsity=0.0, backward_sparsity=.7),
         "random": dict(predictor="random"), "svd": dict(predictor="svd"),
         "no warm-up": dict(sparse_start=0.0, split="random"), "all weights": dict(lora_r=0, learning_rate=1e-3, weight_decay=0.1)}


@kinds(KINDS, fast=("measured", "no queries", "backward", "all weights"))
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


def test_a_state_may_hold_options_that_are_gone(home, half, tmp_path):
    """An older version's state goes on; an option that it lacks had its default."""
    shutil.copytree(half / "half", tmp_path / "a")
    for path in (tmp_path / "a/state").glob("*/state.json"):
        old = json.loads(path.read_text())
        old["info"]["config"].update(sparse_ramp=0.0, published={"Llama-3-8B": [0.9, {"1": 0.5}]})
        del old["info"]["config"]["length_window"]
        path.write_text(json.dumps(state.sealed(old["info"], old["tensors"])))
    train.main(options(home, out_dir=tmp_path / "a", resume=True))
    same_run(half / "whole", tmp_path / "a")
    assert "published" not in state.read(max((tmp_path / "a/state").iterdir()))[1]["config"]


def test_looking_does_not_change_the_training(home, tmp_path):
    """How often a run is evaluated, saved and printed is not seen in its weights, not even with channels drawn at random."""
    train.main(options(home, out_dir=tmp_path / "a", predictor="random"))
    train.main(options(home, out_dir=tmp_path / "b", predictor="random", eval_interval=0, save_interval=0, log_interval=5))
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_stop_in_an_evaluation(home, tmp_path, monkeypatch):
    """The evaluation that a signal broke off is done again."""
    train.main(options(home, out_dir=tmp_path / "a"))
    with monkeypatch.context() as m:
        real = train.mean_loss
        m.setattr(train, "mean_loss", lambda *a: (term(), real(*a))[1])
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


def test_a_resumed_run_may_end_early(home, half, tmp_path, capsys):
    """Its schedules stay those of the first max_steps: the steps that it makes are the same. It is finished then."""
    out = copy_half(half, tmp_path)
    result = train.main(options(home, out_dir=out, resume=True, max_steps=8))
    assert newest(out)[1]["step"] == 8 and result["time_ratio"] > 0
    steps = lambda out: [m for m in metrics(out) if "loss" in m and m["step"] < 8]
    assert steps(out) == steps(half / "whole")
    assert train.main(options(home, out_dir=out, resume=True, max_steps=8)) is None
    assert "is finished" in capsys.readouterr().out


def test_a_stopped_run_leaves_an_adapter_and_the_best_one(home, tmp_path, monkeypatch):
    """With each saved state; best/ has the least validation loss of the evaluations so far."""
    with monkeypatch.context() as m:
        at_step(m, 8, term)
        losses = iter([2.0, 1.0, 3.0, 3.0])
        m.setattr(train, "mean_loss", lambda *a: next(losses))
        train.main(options(home, out_dir=tmp_path / "a", eval_interval=2))
    assert len(weights(tmp_path / "a")) and not equal(weights(tmp_path / "a"), weights(tmp_path / "a/best"))
    train.main(options(home, out_dir=tmp_path / "b", max_steps=12, eval_interval=4, save_interval=0))
    with monkeypatch.context() as m:
        at_step(m, 4, crash)
        with pytest.raises(ZeroDivisionError):
            train.main(options(home, out_dir=tmp_path / "c", eval_interval=4, save_interval=4))
    assert equal(weights(tmp_path / "c"), weights(tmp_path / "c/best"))


def test_whatever_goes_wrong_in_an_evaluation_the_steps_are_saved(home, tmp_path, monkeypatch):
    def fail(*a):
        raise UserError("a prompt of no tokens cannot be continued")

    monkeypatch.setattr(train, "mean_loss", fail)
    with pytest.raises(UserError, match="no tokens"):
        train.main(options(home, out_dir=tmp_path / "a", save_interval=0))
    assert newest(tmp_path / "a")[1]["step"] == 4


def test_a_hang_up_saves_unless_it_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    try:
        with Signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(train.Interrupted):
                stop.check()
        assert stop.name() == "SIGHUP" and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with Signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            stop.check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_extra_passes_measure_what_the_warm_up_did_not(home, tmp_path, capsys):
    """Sparse from the first step on, with a base too wide for one batch: they are counted, and said."""
    result = train.main(options(home, out_dir=tmp_path / "a", sparse_start=0.0, eval_interval=0, test_examples=0, max_steps=2))
    rows = int(re.search(r"on ([\d,]+) context rows", capsys.readouterr().out)[1].replace(",", ""))
    assert rows >= 4 * 32
    one_pass = sum(m["flops"] for m in metrics(tmp_path / "a") if "flops" in m)
    assert result["flops"] > one_pass and result["dense_flops"] == sum(m["dense_flops"] for m in metrics(tmp_path / "a") if "flops" in m)


def test_stopped_between_extra_passes(home, tmp_path, monkeypatch):
    """The passes that were made before the stop are not made again."""
    changes = dict(sparse_start=0.0, micro_batch_size=5, batch_size=1, max_steps=3)
    train.main(options(home, out_dir=tmp_path / "a", **changes))
    assert newest(tmp_path / "a")[1]["extra"] > 2
    real = predictor.measure_more

    def stopped(*args):
        real(*args)
        term()

    with monkeypatch.context() as m:
        m.setattr(predictor, "measure_more", stopped)
        for _ in range(2):
            assert train.main(options(home, out_dir=tmp_path / "b", resume=True, **changes)) is None
    assert newest(tmp_path / "b")[1]["extra"] == 2
    train.main(options(home, out_dir=tmp_path / "b", resume=True, **changes))
    same_run(tmp_path / "a", tmp_path / "b")


def copy_half(half, tmp_path):
    shutil.copytree(half / "half", tmp_path / "b")
    return tmp_path / "b"


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


def test_a_damaged_state_is_not_the_one_before(home, half, tmp_path, monkeypatch):
    """After a resume from the older of two states the next save keeps that one, not the damaged one."""
    out = copy_half(half, tmp_path)
    cut(out / "state/000002/state.safetensors")
    at_step(monkeypatch, 1, term)  # saves after step 5
    train.main(options(home, out_dir=out, resume=True))
    monkeypatch.undo()
    assert sorted(p.name for p in (out / "state").iterdir()) == ["000001", "000002", "000002.damaged"]
    flip(out / "state/000002/state.safetensors")
    train.main(options(home, out_dir=out, resume=True))
    same_run(half / "whole", out)


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
    save_file(w, tmp_path / "other/model.safetensors", {"format": "pt"})  # the same weights, another rope_theta
    with pytest.raises(UserError, match="with other contents"):
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
    out = capsys.readouterr().out
    assert "could not be saved: the last saved step counts" in out and "there is none yet" in out


def full(path, data):
    raise OSError(28, "No space left on device")


def test_measured_needs_context(home, tmp_path):
    """Where none of the dense steps had a context token it says so, and keeps no arbitrary channels."""
    lines = [json.dumps(dict(prompt="", response=f"{i} apples")) for i in range(8)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "v.jsonl").write_text(json.dumps(dict(prompt="How many? " * 5, response="3")) + "\n")
    with pytest.raises(UserError, match="has measured nothing yet"):
        train.main(options(home, out_dir=tmp_path / "a", dataset=tmp_path / "d.jsonl", test_examples=0, max_steps=2,
                           val_dataset=tmp_path / "v.jsonl", sparse_start=.5, batch_size=4))


# ---- what a run says ---------------------------------------------------------------------------------------

def test_each_step_has_its_own_seconds(home, tmp_path, monkeypatch):
    """Though a step is reported when the next one has been launched; an evaluation counts for none, and fitting maps
    for the run alone."""
    real, calls, real_evaluate = train.forward_backward, iter(range(100)), train.evaluate
    monkeypatch.setattr(train, "forward_backward", lambda *a, **k: (time.sleep(next(calls) in (1, 6)), real(*a, **k)))
    monkeypatch.setattr(train, "evaluate", lambda *a: (time.sleep(1), real_evaluate(*a))[1])
    result = train.main(options(home, out_dir=tmp_path / "a", eval_interval=4))
    seconds = {m["step"]: m["seconds"] for m in metrics_lines(tmp_path / "a") if "seconds" in m}
    assert [k for k, s in seconds.items() if s >= 1] == [1, 6] and len(seconds) == 12
    assert 0 < result["seconds"] - sum(seconds.values()) < 1


def test_the_plan_counts_the_dense_steps_that_come(home, tmp_path, capsys):
    train.main(options(home, out_dir=tmp_path / "a", max_steps=25, sparse_start=.28, eval_interval=0, test_examples=0))
    out = capsys.readouterr().out
    assert "dense for 7 steps" in out and "sparse from step 7 on" in out


def test_json_has_no_nan():
    assert log.finite({"a": float("nan"), "b": {"c": [1], "d": -float("inf"), "e": 2.5}}) == {
        "a": None, "b": {"c": [1], "d": None, "e": 2.5}}


def test_a_run_that_diverged_says_so(home, tmp_path, capsys):
    train.main(options(home, out_dir=tmp_path / "a", eval_interval=0, test_examples=0))
    assert "the run diverged" not in capsys.readouterr().out
    train.main(options(home, out_dir=tmp_path / "b", eval_interval=0, test_examples=0, learning_rate=100.0, grad_clip=0.0, warmup_steps=0, seed=2))
    assert re.search(r"warning: the loss went from 6\.\d+ to [\d.]+, and a model that knows nothing has 6.72: the run diverged",
                     capsys.readouterr().out)


def test_a_run_that_diverged_before_the_switch_says_so(home, tmp_path):
    """Then no map can be fitted."""
    with pytest.raises(UserError, match="no map can be fitted"):
        train.main(options(home, out_dir=tmp_path / "a", eval_interval=0, test_examples=0, learning_rate=1000.0, grad_clip=0.0, warmup_steps=0))


def test_output_that_cannot_show_a_character(home, tmp_path):
    """A latin-1 terminal, and a prompt in another script."""
    lines = [json.dumps(dict(prompt=f"\u0441\u043a\u043e\u043b\u044c\u043a\u043e {i}?", response=f"{i}")) for i in range(40)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines) + "\n")
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), str(home / "c.py"), f"--dataset={tmp_path}/d.jsonl", "--max_steps=1",
                           f"--out_dir={tmp_path}/a", "--val_dataset=", "--test_examples=0", "--eval_interval=0"],
                          capture_output=True, text=True, env=env(PYTHONIOENCODING="latin-1"))
    assert done.returncode == 0 and "\\u0441" in done.stdout, done.stderr[-1000:]


def test_a_prompt_over_max_seq_len_is_not_answered(home, tmp_path, monkeypatch):
    """One long prompt would give every text that is written beside it as long a cache."""
    lines = [dict(prompt="word " * n, response="3", answer="3") for n in (300, 5, 6, 7)]
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen, real = [], LLaMA.generate
    monkeypatch.setattr(evaluate, "at_once", lambda model, tokens: 2)
    monkeypatch.setattr(LLaMA, "generate", lambda self, prompts, *a, **k: (seen.append(len(prompts)), real(self, prompts, *a, **k))[1])
    result = train.main(options(home, out_dir=tmp_path / "a", val_dataset=tmp_path / "v.jsonl", max_steps=1, eval_interval=1,
                                test_examples=0))
    assert seen == [2, 1] and result["val_accuracy"] is not None


def test_no_answers_only_losses(home, tmp_path, monkeypatch, capsys):
    """max_new_tokens = 0: nothing is generated, and losses are those of a run with answers."""
    with_answers = train.main(options(home, out_dir=tmp_path / "a", max_steps=4))
    capsys.readouterr()
    monkeypatch.setattr(LLaMA, "generate", None)
    without = train.main(options(home, out_dir=tmp_path / "b", max_steps=4, max_new_tokens=0))
    assert without["val_loss"] == with_answers["val_loss"] and without["test_loss"] == with_answers["test_loss"]
    assert without["val_accuracy"] is without["before"] is without["after"] is None and with_answers["after"] is not None
    assert "right" not in capsys.readouterr().out


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


# ---- steps that are not finite -----------------------------------------------------------------------------

def poison(grad):
    grad[3] = float("nan")


def test_a_step_that_is_not_finite_is_skipped(home, tmp_path, monkeypatch, capsys):
    """Weights and moments stay, the step counts, the next ones work."""
    seen = []
    real, calls = train.update, iter(range(100))

    def everything(optimizer):
        weights = {str(i): group["params"][0].detach() for i, group in enumerate(optimizer.param_groups)}
        moments = {k: t for k, t in train.optimizer_tensors(optimizer).items() if k != "skipped"}
        return {**weights, **moments}

    def update(optimizer, grad, *args):
        before = {k: v.clone() for k, v in everything(optimizer).items()}
        n = next(calls)
        if n in (2, 3, 6):
            grad[n] = float("nan") if n % 2 else float("inf")
        out = real(optimizer, grad, *args)
        seen.append(equal(before, everything(optimizer)))
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


# ---- kills: children are forked from a server that has imported train already, so a start costs a moment ---

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


# ---- signals and the lock ----------------------------------------------------------------------------------

def slow_child(home, changes, seconds):
    """A run whose steps take so long that a signal meets one, and which writes its output to out_dir/../log."""
    real = train.update
    train.update = lambda *a: (time.sleep(seconds), real(*a))[1]
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
