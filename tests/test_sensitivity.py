"""The layer analysis and the scripts of results/: the chooser on curves made by hand, whole analyses of a random model."""
import importlib.util
import itertools
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import config
import predictor
from config import UserError
from results import ablations, tables
from tools import sensitivity

FAST = ["--batches=2", "--ratios=.25,.5,.75"]


def analyse(home, out, *flags):
    sensitivity.main([str(home / "c.py"), *FAST, f"--out={out}", *flags])
    return json.loads((out.parent / "sensitivity.json").read_text())


# ---- choosing, without a model ---------------------------------------------------------------------------------------------------------

def test_a_change_is_a_change_whatever_its_sign(monkeypatch):
    """Where the loss rises on one batch and falls on the next the part is not free."""
    monkeypatch.setattr(sensitivity, "digest", lambda b: b)
    done = {"a": {"dense": 1.0, "0.mlp 0.5": 1.3}, "b": {"dense": 2.0, "0.mlp 0.5": 1.7}}
    assert sensitivity.changes(done, ["a", "b"])["0.mlp 0.5"] == pytest.approx(.3)
    assert sensitivity.rises(done, ["a", "b"])["0.mlp 0.5"][0] == pytest.approx(0)


def test_hull():
    points = [(.5, 10, .1), (.75, 15, .6), (.9, 20, .5), (.97, 20, .7)]
    assert sensitivity.hull(points) == [(0, 0, 0), (.5, 10, .1), (.9, 20, .5)]
    assert sensitivity.hull([(.5, -3, 0.), (.9, 4, .2)]) == [(0, 0, 0), (.9, 4, .2)]  # what saves nothing is out
    assert sensitivity.hull([(.5, 10, .5), (.9, 20, .1)]) == [(0, 0, 0), (.9, 20, .1)]
    assert sensitivity.hull([(.5, 0, 0.)]) == [(0, 0, 0)]


def test_choice_is_the_best_there_is():
    """Against all combinations of measured ratios, at every saving that the chooser stops at."""
    g = torch.Generator().manual_seed(0)
    curves = {k: [(r, 100 * r * w, w * r ** 2 * b) for r in (.5, .75, .9)] for k, w, b in
              zip("abcd", torch.rand(4, generator=g).add(.5).tolist(), torch.rand(4, generator=g).tolist())}
    saved = {k: {r: s for r, s, _ in v} for k, v in curves.items()}
    for need in (5, 40, 90, 150, 200):
        chosen, rise = sensitivity.choose(curves, need, lambda k, r: 100 * r * saved[k][.5] / 50)
        got = sum(100 * r * saved[k][.5] / 50 for k, r in chosen.items())
        assert got >= need
        assert got - need < 2  # the last edge is taken in hundredths
        best = min(sum(d for _, _, d in combination) for combination in itertools.product(*([(0, 0, 0), *v] for v in curves.values()))
                   if sum(s for _, s, _ in combination) >= need)
        assert rise <= best + 1e-9


def test_dead_parts_are_left_alone():
    chosen, rise = sensitivity.choose({"0.mlp": [(.9, 10, 5.)], "1.mlp": [(.9, 10, .01)], "2.mlp": [(.9, 0, 0.)]}, 9.5, lambda k, r: 10 * r / .9)
    assert chosen.keys() == {"1.mlp"} and .85 <= chosen["1.mlp"] <= .9


def test_published_pattern():
    mlp, attn = sensitivity.published(32)
    assert sorted(mlp) == list(range(3, 31)) and sorted(attn) == [*range(14, 20), *range(21, 24), *range(25, 30)]
    mlp, attn = sensitivity.published(6)
    assert sorted(mlp) == [1, 2, 3, 4] and 0 not in attn and 5 not in attn


# ---- whole analyses ----------------------------------------------------------------------------------------------------------------------

def test_start_at_a_block_is_the_whole_forward(home):
    cfg = config.load([str(home / "c.py"), "--predictor=svd"])
    model, warm, batches, fresh = sensitivity.setup(cfg, 1)
    inputs = []
    hooks = [b.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for b in model.blocks]
    predictor.set_ratios(model, {})
    with torch.no_grad():
        dense = model.loss(batches[0])
        [h.remove() for h in hooks]
        assert all(torch.equal(model.loss(batches[0], x, i), dense) for i, x in enumerate(inputs))
        predictor.set_ratios(model, {"1.mlp": .5})
        assert model.blocks[1].mlp.predictor.c and not model.blocks[0].mlp.predictor.c
        whole = model.loss(batches[0])
        assert whole != dense and torch.equal(model.loss(batches[0], inputs[1], 1), whole)


@pytest.mark.parametrize("kind, by", [("svd", "loss"), ("svd", "gradient"), ("measured", "loss"), ("measured", "gradient")])
def test_analysis(home, tmp_path, capsys, kind, by):
    out = tmp_path / "ratios.py"
    store = analyse(home, out, "--budget=.95", f"--predictor={kind}", f"--by={by}")
    (done,) = store.values()
    numbers = 2 * 2 * 3 * (2 if by == "gradient" else 1)  # 2 blocks, 2 parts, 3 ratios: the loss, and the cosine
    assert len(done) == 2 and all(len(seen) == 1 + numbers for seen in done.values())
    cosines = [v for seen in done.values() for k, v in seen.items() if k.endswith("cosine")]
    assert all(-1 <= v <= 1.00001 for v in cosines) and bool(cosines) == (by == "gradient")
    cfg = config.load([str(home / "c.py"), str(out)])
    assert len(cfg.mlp_sparsity) == len(cfg.attn_sparsity) == 3 and cfg.mlp_sparsity[2] == cfg.attn_sparsity[2] == 0 and cfg.predictor == kind
    model, _, batches, _ = sensitivity.setup(cfg, 2)
    predictor.attach(model, cfg.mlp_sparsity, cfg.attn_sparsity, cfg.predictor_rank, "random")
    dense, sparse = (sum(f) for f in zip(*map(model.flops, batches)))
    assert kind == "svd" or sparse <= .95 * dense * 1.0001  # the factors' own FLOPs are not in it with random
    for name in ("uniform", "uniform_mlp", "published"):
        config.load([str(home / "c.py"), str(tmp_path / f"ratios_{name}.py")])
    if importlib.util.find_spec("matplotlib"):  # optional
        assert out.with_suffix(".png").stat().st_size > 1000
    text = capsys.readouterr().out
    assert "block" in text and "published pattern" in text and f"train.py {home / 'c.py'} {out}" in text


def test_goes_on_where_it_stopped(home, tmp_path, monkeypatch):
    whole = analyse(home, tmp_path / "a" / "r.py", "--budget=.95")
    count, real = [], sensitivity.Progress.step

    def step(self):
        count.append(1)
        if len(count) == 7:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(sensitivity.Progress, "step", step)
    with pytest.raises(KeyboardInterrupt):
        analyse(home, tmp_path / "b" / "r.py", "--budget=.95")
    monkeypatch.setattr(sensitivity.Progress, "step", lambda self: count.append(1))
    parts = json.loads((tmp_path / "b" / "sensitivity.json").read_text())
    (first,) = parts.values()
    stored = sum(k.endswith("cosine") for seen in first.values() for k in seen)
    assert stored == 6
    count.clear()
    assert analyse(home, tmp_path / "b" / "r.py", "--budget=.95") == whole
    assert len(count) == 24 - stored
    assert (tmp_path / "a" / "r.py").read_text().splitlines()[2:] == (tmp_path / "b" / "r.py").read_text().splitlines()[2:]
    count.clear()
    analyse(home, tmp_path / "b" / "s.py", "--budget=.97")  # another budget measures nothing anew
    assert not count
    assert len(analyse(home, tmp_path / "b" / "r.py", "--budget=.95", "--predictor=random")) == 2  # another predictor does


@pytest.mark.parametrize("flag, message", [("--budget=.01", "cannot be met"), ("--budget=1.5", "below 1"), ("--ratios=.5,x", "numbers between"),
                                           ("--ratios=1", "numbers between"), ("--batches=0", "at least 1"), ("--batches=99", "lower --batches"),
                                           ("--lora_r=0", "nothing to analyse"), ("--bugdet=.5", "unknown option"), ("--budget=x", "float")])
def test_bad_values(home, tmp_path, flag, message):
    with pytest.raises(UserError, match=message):
        analyse(home, tmp_path / "r.py", flag)


def test_lowest_budget_that_is_named_can_be_met(home, tmp_path):
    with pytest.raises(UserError) as e:
        analyse(home, tmp_path / "r.py", "--budget=.05")
    analyse(home, tmp_path / "r.py", "--budget=" + str(e.value).split("give --budget=")[1].split()[0])


# ---- results -----------------------------------------------------------------------------------------------------------------------------

def test_every_ablation_is_a_valid_command_line():
    own = dict(ablations.OWN, name="test")
    rows, runs = ablations.command_lines(["config/tiny.py"], own)
    assert list(rows) == list(tables.TITLES) == list(ablations.SEEDS)
    labels = {line.label: line for lines in rows.values() for line in lines}
    assert len({tuple(line.args) for line in labels.values()}) == len(labels) == len({ablations.short(label) for label in labels})
    for r in runs:
        if r.line.analysis:  # its config file is yet to be written
            assert [a.partition("=")[0] for a in r.line.analysis] == ["--predictor", "--budget", "--out"]
        assert shlex.split(shlex.join(r.command)) == r.command
        cfg = config.load([a for a in r.command[2:] if not a.startswith("out/")])
        assert cfg.seed == r.seed and cfg.threads == 1 and cfg.out_dir.startswith("out/ablations/test/")
        config.ratios(cfg.mlp_sparsity, 6, "mlp_sparsity")
    with pytest.raises(UserError, match="rows"):
        ablations.command_lines(["config/tiny.py"], dict(own, rows="10"))
    # one kind of ratio alone
    for off, on in (("mlp", "attn"), ("attn", "mlp")):
        _, runs = ablations.command_lines(["config/tiny.py"], dict(own, rows="channels", **{off: ""}))
        labels = " ".join(r.line.label for r in runs)
        assert ("attention" in labels, "MLP" in labels) == (on == "attn", on == "mlp")


@pytest.mark.slow
def test_ablations_run_resume_and_collect(home, tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "ROOT", tmp_path)  # a copy of what train.py needs
    for name in ("train.py", "model.py", "sparse.py", "kernels.py", "predictor.py", "config", "data", "lib", "tools"):
        (tmp_path / name).symlink_to(Path(sensitivity.__file__).resolve().parent.parent / name)
    (tmp_path / "results").mkdir()
    args = [str(home / "c.py"), "--rows=tokens", "--seeds=1", "--name=t", "--mlp=.5", "--max_steps=150"]
    ablations.main(args)
    path = tmp_path / "results" / "ablations.json"
    lines = tables.summaries(json.loads(path.read_text())["t"]["runs"], "tokens")
    assert {"dense LoRA", "as configured", "split none"} <= lines.keys() and lines["dense LoRA"]["after"]["n"] == 1
    assert all(lines["split none"][key] for key in ("vs_dense", "rise_at_switch", "rise_at_end", "spike", "flops_share"))
    assert lines["as configured"]["flops_share"]["mean"] < 1
    text = path.with_suffix(".md").read_text()
    assert "### Which tokens are dense" in text and "--split=none" in text
    before = path.read_text()
    monkeypatch.setattr(ablations, "execute", lambda *a: pytest.fail("a finished run was run again"))
    ablations.main(args)
    assert path.read_text() == before
    # one that another config file made is no run of this line
    (tmp_path / "c.py").write_text((home / "c.py").read_text() + "learning_rate = 1.0\n")
    rows, runs = ablations.command_lines([str(tmp_path / "c.py"), *args[5:]], dict(ablations.OWN, name="t", rows="tokens"))
    with pytest.raises(UserError, match="dense_LoRA/0 holds a run of other options"):
        ablations.finished(runs[0])


def test_what_is_known_of_other_seeds_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    base = ["config/tiny.py"]
    rows, _ = ablations.command_lines(base, dict(ablations.OWN, name="t"))
    lines = {line.label: line for some in rows.values() for line in some}

    def finish(label, seed, after):
        out = ablations.run_of(base, "t", lines[label], seed).out
        out.mkdir(parents=True)
        (out / "result.json").write_text(json.dumps(dict(after=after, flops=2, dense_flops=4, time_ratio=.5)))
        (out / "metrics.jsonl").write_text("".join(json.dumps(dict(step=i, loss=1 - after, sparse=bool(i % 2))) + "\n" for i in range(4)))

    def collect(known):
        return json.loads(json.dumps(ablations.collect(base, "t", rows, known)))

    def seeds(runs, label):
        return {r["seed"]: r for r in runs if r["label"] == label}

    assert collect([]) == []
    finish("dense LoRA", 0, .8)
    finish("split none", 0, .6)
    first = collect([])
    assert seeds(first, "split none")[0]["spike"] > .19 and collect(first) == first
    (tmp_path / "out").rename(tmp_path / "another_machine")
    assert collect(first) == first
    finish("split none", 1, .7)  # without its dense run
    finish("split none", 0, .5)  # again
    second = collect(first)
    none, summary = seeds(second, "split none"), tables.summaries(second, "tokens")["split none"]
    assert seeds(second, "dense LoRA") == seeds(first, "dense LoRA") and list(none) == [0, 1]
    assert summary["after"]["mean"] == .6
    assert summary["vs_dense"] == dict(mean=.6 - .8, error=None, n=2)
    assert none[0]["time_share"] == .75 and "spike" not in none[0]
    # another command line is another run; what other options made stays
    other = dict(first[0], label="svd, MLP 0.1")
    third = collect([*(dict(r, options="--split=none") for r in none.values()), other])
    assert list(seeds(third, "split none")) == [0, 1] and third[-1] == other
    assert not seeds(collect([dict(first[0], options="--mlp_sparsity=0")]), "dense LoRA")


def test_the_tables_say_what_the_numbers_do():
    results = ablations.ROOT / "results"
    everything = json.loads((results / "ablations.json").read_text())
    assert (results / "ablations.md").read_text() == tables.markdown(everything)
    assert (results / "ablations.json").read_text() == ablations.one_run_a_line(everything)
    assert "](results/ablations.md)" in (ablations.ROOT / "README.md").read_text()
    line = [(.5, 60, 3), (.8, 90, 4), (1, 100, None)]
    between = lambda x: tuple(tables.between(line, x).values())
    assert between(.65) == pytest.approx((75, 2.5)) and between(.9) == (95, None)
    assert between(.4) == (60, 3) and between(1.2) == (100, None)


def test_nothing_finished_leaves_the_tables_alone(home):
    path = ablations.ROOT / "results" / "ablations.json"
    before = path.read_text()
    with pytest.raises(UserError, match="no run under out/ablations/none has finished"):
        ablations.main([str(home / "c.py"), "--name=none", "--collect=True"])
    assert path.read_text() == before


def test_when_a_loss_is_reached():
    points = [(2.0, 10), (1.0, 20), (1.5, 30), (.5, 40)]
    assert ablations.time_to(points, 1.5) == 15 and ablations.time_to(points, 3.0) == 10 and ablations.time_to(points, .1) is None
    assert ablations.time_to(points, .75) == 37.5


def test_who_has_a_loss_sooner():
    """Sparse steps take half a dense one's time; the loss is the same a step later."""
    dense = dict(evaluations=[(i, 10.0 - i) for i in range(11)], times=list(range(11)), flops=1, dense_flops=1, steps=10)
    r = dict(evaluations=[(i, 11.0 - i) for i in range(11)], times=[i / 2 for i in range(11)], flops=1, dense_flops=2,
             steps=10)
    assert ablations.reach(dense, 10, 1.5, 1) == 8.5 and ablations.reach(r, 30, 20, 1) == 0
    assert ablations.reach(dense, 10, 2, 4) == (2 + 4 + 6 + 8) / 4
    ablations.compare(r, dense)
    # to 9.55, 9.1, ... 1: on average 4.725 dense steps, one sparse step more at half the time each
    assert abs(r["sooner"] - (4.725 + 1) / 2 / 4.725) < 1e-12 and r["time_share"] == r["flops_share"] == .5


def test_summary():
    assert tables.summary([2.0]) == dict(mean=2.0, error=None, n=1)
    s = tables.summary([1.0, 2.0, 3.0])
    assert s["mean"] == 2 and abs(s["error"] - 1 / 3 ** .5) < 1e-12


def test_command_line_errors_are_one_line():
    done = subprocess.run([sys.executable, "-m", "tools.sensitivity", "--budget=2"], capture_output=True, text=True, cwd=ablations.ROOT)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("error: --budget=2")
