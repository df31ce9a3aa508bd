"""The layer analysis: the chooser on curves made by hand, whole analyses of a random model."""
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import config
import predictor
from config import UserError
from tests.testing import make_base
from tools import sensitivity

ROOT = Path(__file__).resolve().parent.parent
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


def test_what_not_all_batches_have_is_left_out(monkeypatch):
    """An analysis of other ratios that was interrupted is in the same file."""
    monkeypatch.setattr(sensitivity, "digest", lambda b: b)
    done = {"a": {"dense": 1.0, "0.mlp 0.5": 1.1, "0.mlp 0.5 cosine": .9, "0.mlp 0.6": 1.2, "0.mlp 0.6 cosine": .8, "0.mlp 0.7": 1.3},
            "b": {"dense": 1.0, "0.mlp 0.5": 1.1, "0.mlp 0.5 cosine": .7, "0.mlp 0.7": 1.3}}
    assert sensitivity.rises(done, ["a", "b"]).keys() == {"0.mlp 0.5", "0.mlp 0.7"}
    assert sensitivity.changes(done, ["a", "b"], "gradient") == {"0.mlp 0.5": pytest.approx(.2)}


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


def test_no_queries_are_taken_whole():
    """Between .97 and 1 lies nothing: half of the queries cannot be left out."""
    chosen, _ = sensitivity.choose({"0.attn": [(.5, 5, .1), (1.0, 20, .2)]}, 6, lambda k, r: 20 * r)
    assert chosen == {"0.attn": 1.0}


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


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_no_queries_are_tried(home, tmp_path, model_type):
    """Of attention only, where there is a map; with q/k norms nothing else is tried of it."""
    make_base(tmp_path / "base", model_type=model_type)
    out, flags = tmp_path / "ratios.py", [f"--model={tmp_path}/base", "--ratios=.5,1"]
    with pytest.raises(UserError) as e:
        analyse(home, out, "--budget=.05", *flags)
    lowest = str(e.value).split("give --budget=")[1].split()[0]
    (done,) = analyse(home, out, f"--budget={lowest}", *flags).values()
    (seen, _) = done.values()
    attn = {key.split()[1] for key in seen if ".attn" in key}
    assert attn == ({"1.0"} if model_type == "qwen3" else {"0.5", "1.0"})
    assert {key.split()[1] for key in seen if ".mlp" in key} == {"0.5"}
    cfg = config.load([str(home / "c.py"), f"--model={tmp_path}/base", str(out)])
    assert cfg.attn_sparsity == [1.0, 1.0, 0.0]  # the lowest budget needs all
    for name in ("uniform", "published"):
        there = tmp_path / f"ratios_{name}.py"
        assert there.exists() and max(config.load([str(home / "c.py"), str(there)]).attn_sparsity) < 1
    for without in ("--map_rank=0", "--predictor=energy"):  # nothing could stand in for the queries
        other = tmp_path / without
        other.mkdir()
        (done,) = analyse(home, other / "ratios.py", "--budget=.97", *flags, without).values()
        assert not any("1.0" in key for seen in done.values() for key in seen)


def test_rank_of_the_map_is_chosen_too(home, tmp_path, capsys):
    """Each rank has an analysis of its own; the one that keeps more of the gradient on other batches is written."""
    out = tmp_path / "ratios.py"
    store = analyse(home, out, "--budget=.95", "--ranks=8,1")
    assert len(store) == 2
    found = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("  map of rank"):
            found[int(line.split()[3])] = float(line.split("cosine ")[1].split(";")[0])
    assert list(found) == [1, 8] and found[1] != found[8]
    best = max(found, key=found.get)
    cfg = config.load([str(home / "c.py"), str(out)])
    assert cfg.map_rank == best and f"cosine {found[best]:.3f}" in out.read_text().splitlines()[1]
    alone = analyse(home, tmp_path / "alone" / "ratios.py", "--budget=.95", f"--map_rank={best}")
    assert set(alone) < set(store)  # the very measurements that a run with this rank makes
    assert (tmp_path / "alone" / "ratios.py").read_text().splitlines()[1:] == out.read_text().splitlines()[1:]


def test_the_check(home):
    """Rise and cosine on other batches, against both models run there; nothing changes where nothing is sparse."""
    cfg = config.load([str(home / "c.py")])
    model, warm, _, fresh = sensitivity.setup(cfg, 2)
    dense = sensitivity.dense_of(model, fresh)
    assert sensitivity.check(model, warm, fresh, {}, dense) == pytest.approx((1, 0, 0, 1), abs=1e-6)
    pattern = {"0.mlp": .5, "1.mlp": .75}
    found = sensitivity.check(model, warm, fresh, pattern, dense)
    rises, cosines = [], []
    for b in fresh:
        at = []
        for ratios in ({}, pattern):
            predictor.set_ratios(model, ratios)
            if ratios:
                predictor.fit_maps(model, warm)
            at.append(sensitivity.gradient(model, b))
        (loss, g), (sparse_loss, sparse_g) = at
        rises.append((sparse_loss - loss) / b.weights.sum().item())
        cosines.append(torch.dot(g, sparse_g).item() / (g.norm() * sparse_g.norm()).item())
    assert found.flops < .99 and found.cosine == pytest.approx(sum(cosines) / 2, rel=1e-5) and found.cosine < .999
    assert (found.rise, found.error) == pytest.approx(sensitivity.mean_and_error(rises), rel=1e-3, abs=1e-6)


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


def test_the_command_line_that_it_ends_with_trains_the_model_that_was_analysed():
    args = ["config/qwen.py", "--model=/a b", "--threads=1", "--map_rank=16", "--out_dir=x"]
    assert sensitivity.use_it(args, "x/ratios.py", "x_0.8") == (
        "python train.py config/qwen.py x/ratios.py '--model=/a b' --threads=1 --out_dir=x_0.8")
    assert sensitivity.use_it([], "r.py", "o") == "python train.py config/tiny.py r.py --out_dir=o"
    # what is left out of it stands in the file, no map too
    assert "map_rank = 0 " in sensitivity.config_file({}, 2, config.Config(map_rank=0))


@pytest.mark.parametrize("flag, message", [("--budget=.01", "cannot be met"), ("--budget=1.5", "below 1"), ("--ratios=.5,x", "numbers between"),
                                           ("--ratios=1", "numbers between"), ("--ranks=4,x", "whole numbers above 0"),
                                           ("--ranks=0,4", "whole numbers above 0"), ("--batches=0", "at least 1"), ("--batches=99", "lower --batches"),
                                           ("--lora_r=0", "nothing to analyse"), ("--bugdet=.5", "unknown option"), ("--budget=x", "float")])
def test_bad_values(home, tmp_path, flag, message):
    with pytest.raises(UserError, match=message):
        analyse(home, tmp_path / "r.py", flag)


def test_ranks_need_maps(home, tmp_path):
    with pytest.raises(UserError, match="predictor = 'svd'.* leave it out"):
        analyse(home, tmp_path / "r.py", "--ranks=4,8", "--predictor=svd")


def test_lowest_budget_that_is_named_can_be_met(home, tmp_path):
    with pytest.raises(UserError) as e:
        analyse(home, tmp_path / "r.py", "--budget=.05")
    analyse(home, tmp_path / "r.py", "--budget=" + str(e.value).split("give --budget=")[1].split()[0])


def test_command_line_errors_are_one_line():
    done = subprocess.run([sys.executable, "-m", "tools.sensitivity", "--budget=2"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("error: --budget=2")
