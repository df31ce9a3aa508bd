"""results/equal_time.py: its command lines, what it keeps of runs, its tables."""
import json
import shlex

import pytest

import config
from config import UserError
from results import equal_time
from results.equal_time import BASES, DENSE, Base, Mean


def test_every_run_is_a_valid_command_line():
    for name, base in BASES.items():
        runs = equal_time.runs_of(name, 0, ["--learning_rate=1e-5"])
        assert len({r.out for r in runs}) == len(runs) == base.seeds * (1 + len(base.fewer) + len(base.lines))
        for r in runs:
            assert shlex.split(shlex.join(r.command)) == r.command
            cfg = config.load(r.command[2:])
            config.ratios(cfg.mlp_sparsity, 30, "mlp_sparsity")
            assert cfg.seed == r.seed and cfg.learning_rate == 1e-5 and cfg.out_dir == str(r.out.relative_to(equal_time.ROOT))
            if r.label.startswith(DENSE):
                assert cfg.mlp_sparsity == cfg.attn_sparsity == cfg.lora_from == 0


def finish(r, loss, steps, sparse, between=0.0, seconds=2.0):
    """What a run of so many steps writes whose sparse steps take half of a dense one's time."""
    r.out.mkdir(parents=True, exist_ok=True)
    lines = [dict(step=i, loss=3.0, sparse=i >= steps - sparse, seconds=seconds) for i in range(steps)]
    for line in lines[steps - sparse:]:
        line["seconds"] /= 2
    result = dict(seconds=sum(line["seconds"] for line in lines) + between, flops=75, dense_flops=100, val_loss=loss, after=.5)
    lines.append(dict(step=steps, dense_loss=1.0, sparse_loss=1.5))
    if sparse:
        result["time_ratio"] = .5
    (r.out / "result.json").write_text(json.dumps(result))
    (r.out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (r.out / "about.json").write_text(json.dumps(dict(options=equal_time.options_of(r), commit="abc", machine="CPU")))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """One seed of dense LoRA, ten and five steps, and of a sparse line; nothing of it has run."""
    monkeypatch.setattr(equal_time, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    monkeypatch.setitem(BASES, "t", Base("a test", ["config/tiny.py"], 1, (5,), {"sparse": ["--map_rank=1"]}))
    return equal_time.runs_of("t", 0, [])


def test_time_counts_sparse_steps_by_their_ratio_and_the_switch(runs):
    finish(runs[2], loss=1.0, steps=10, sparse=8, between=3.0)
    kept = equal_time.read(runs[2], "val_loss")
    assert kept["time"] == 2 + 8 * .5 + 3.0 / 2.0 and kept["step_time"] == .5
    assert kept["flops"] == .75 * 10 and kept["rise"] == .5 and kept["accuracy"] == .5
    assert kept["options"] == "config/tiny.py --map_rank=1 --threads=1" and kept["commit"] == "abc"
    other = runs[2]._replace(command=[*runs[2].command[:3], "--map_rank=2", *runs[2].command[4:]])
    with pytest.raises(UserError, match="holds a run of other options, `config/tiny.py --map_rank=1"):
        equal_time.train(other)
    (runs[2].out / "result.json").unlink()  # one that has only begun likewise
    with pytest.raises(UserError, match="holds a run of other options"):
        equal_time.train(other)
    assert equal_time.about(runs[2])["commit"] == "abc" and not equal_time.finished(runs[2])


def test_runs_with_lora_in_some_blocks_are_counted_in_steps_of_lora_in_all(runs):
    finish(runs[2], loss=1.0, steps=10, sparse=8, between=3.0)
    whole = equal_time.read(runs[2], "val_loss")
    command = [*runs[2].command[:-1], "--lora_from=3", "--batch_size=2", runs[2].command[-1]]
    found = equal_time.dense_step(runs[2]._replace(command=command), n=1)
    assert .5 < found["flops"] < .8 and 0 < found["time"] < 2  # half of the six blocks have no backward
    (runs[2].out / "dense_step.json").write_text(json.dumps(dict(time=.5, flops=.25)))
    part = equal_time.read(runs[2], "val_loss")
    assert [part[k] / whole[k] for k in ("time", "step_time", "flops")] == [.5, .5, .25]


def test_a_longer_sparse_run_is_set_beside_full_length_dense_lora(runs):
    finish(runs[0], loss=1.0, steps=10, sparse=0)
    finish(runs[2], loss=1.0, steps=20, sparse=20)
    assert equal_time.lines_of(equal_time.collect([], runs, "val_loss"))["sparse"]["time"].mean == 1.0


def test_tables_set_a_sparse_run_beside_dense_ones_of_its_time(runs):
    full, half, sparse = runs
    finish(full, loss=1.0, steps=10, sparse=0)
    finish(half, loss=1.5, steps=5, sparse=0)
    finish(sparse, loss=1.1, steps=10, sparse=8)
    lines = equal_time.lines_of(equal_time.collect([], runs, "val_loss"))
    assert lines["sparse"]["time"].mean == .6 and lines["sparse"]["over"].mean == pytest.approx(.1)
    assert lines[half.label]["time"].mean == .5 and "over" not in lines[DENSE]
    assert equal_time.in_that_time(lines, .6).mean == pytest.approx(1.4)
    assert equal_time.in_that_time(lines, .4) is None
    assert equal_time.speedup(lines, "sparse").mean == pytest.approx(.9 / .6)  # dense LoRA has 1.1 after .9 of its time
    equal_time.main(["t", "--collect=True"])
    text = (equal_time.ROOT / "results" / "equal_time.md").read_text()
    row, = (line for line in text.splitlines() if line.startswith("| sparse"))
    assert row == "| sparse | 1 | 75% | 60.0% | 1.1000 | +0.1000 | 1.4000 | 1.50 | 50.0% | +0.500 |"


def test_speedup_follows_the_line_of_the_runs_beside_it():
    def line(time, loss, error=0.0):
        return dict(n=2 if error else 1, time=Mean(time, 0.0), loss=Mean(loss, error))

    lines = {DENSE: line(1.0, 1.0, .03), DENSE + ", 8 steps": line(.8, 1.2), DENSE + ", 6 steps": line(.6, 1.6),
             "behind": line(.8, 1.4), "ahead": line(.8, 1.1, .04), "beyond": line(.5, .9), "worst": line(.5, 1.8)}
    assert equal_time.speedup(lines, "behind").mean == pytest.approx(.7 / .8)
    assert equal_time.speedup(lines, "ahead") == pytest.approx((.9 / .8, .05 / 1 / .8))
    assert equal_time.speedup(lines, "beyond").mean == pytest.approx(1.1 / .5)
    assert equal_time.speedup(lines, "worst") is None and equal_time.at_most(lines, "worst") == "< 1.20"
    assert equal_time.at_most(lines, "behind") == ""
    assert equal_time.speedup({DENSE: lines[DENSE], "ahead": lines["ahead"]}, "ahead") is None
    lines[DENSE] = lines[f"{DENSE}, 6 steps"] | dict(time=Mean(1.0, 0))  # more steps gave nothing
    assert equal_time.speedup(lines, "ahead") is None


def test_like_is_compared_with_like():
    """A sparse run of one seed is set beside dense LoRA's runs of that seed, not beside the mean of all."""
    def run(label, seed, steps, loss):
        return dict(label=label, seed=seed, steps=steps, time=steps, flops=steps, loss=loss)

    runs = [run(DENSE, 0, 10, 1.0), run(DENSE, 1, 10, 3.0), run(DENSE + ", 5 steps", 0, 5, 2.0),
            run(DENSE + ", 5 steps", 1, 5, 5.0), run("sparse", 0, 8, 1.2), run("other", 2, 8, 1.2)]
    same_seed = equal_time.lines_of(equal_time.with_seeds_of("sparse", runs))
    assert equal_time.in_that_time(same_seed, .8).mean == pytest.approx(1.4)
    assert equal_time.speedup(same_seed, "sparse").mean == pytest.approx(.9 / .8)
    assert equal_time.with_seeds_of("other", runs) == runs  # dense LoRA was never run with that seed


def test_a_picture_without_dense_lora(runs, tmp_path):
    """Of what has finished, whatever has: here of a sparse run alone."""
    pytest.importorskip("matplotlib")
    finish(runs[2], loss=1.0, steps=10, sparse=8)
    equal_time.draw([equal_time.read(runs[2], "val_loss")], tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_the_way_of_a_run_is_in_its_own_time():
    """Ten steps, the first two dense, the others at half of their time; a switch of 1.2 dense steps is spread."""
    def run(seed, *losses):
        return dict(label="sparse", seed=seed, options="config/tiny.py --sparse_start=.2", steps=10, step_time=.5,
                    time=7.2, losses=[[step, loss] for step, loss in losses])

    points = equal_time.course([run(0, (2, 4.0), (6, 2.0), (10, 1.0)), run(1, (2, 6.0), (6, 3.0), (10, 1.5))])
    assert [time for time, _ in points] == pytest.approx([2.4, 4.8, 7.2])
    assert [loss for _, loss in points] == [5.0, 2.5, 1.25]


def test_what_is_known_of_other_runs_stays(runs):
    finish(runs[0], loss=1.0, steps=10, sparse=0)
    known = [dict(label=DENSE, seed=0, loss=9.0), dict(label=DENSE, seed=1, loss=8.0), dict(label="old", seed=0)]
    there = equal_time.collect(known, runs, "val_loss")
    assert [(r["label"], r["seed"]) for r in there] == [(DENSE, 0), (DENSE, 1), ("old", 0)]
    assert [r.get("loss") for r in there] == [1.0, 8.0, None]


def test_means_have_their_standard_error():
    assert equal_time.mean([2.0]) == Mean(2.0, 0.0)
    assert equal_time.mean([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / 3 ** .5))


def test_the_tables_are_those_of_the_stored_runs():
    results = equal_time.ROOT / "results"
    text = (results / "equal_time.json").read_text()
    everything = json.loads(text)
    assert text == equal_time.one_run_a_line(everything)
    assert (results / "equal_time.md").read_text() == equal_time.markdown(everything)


def test_nothing_finished_leaves_the_tables_alone(runs):
    with pytest.raises(UserError, match="no run under out/equal_time/t has finished"):
        equal_time.main(["t", "--collect=True"])
    assert not (equal_time.ROOT / "results" / "equal_time.json").exists()
    with pytest.raises(UserError, match="name one base of tiny, "):
        equal_time.main([])


def test_a_failed_run_is_said_after_the_others_are_collected(runs, capsys):
    finish(runs[0], loss=1.0, steps=10, sparse=0)  # there is no train.py for the other two
    with pytest.raises(UserError, match="2 of 3 runs failed, as said above: the same command goes on"):
        equal_time.main(["t"])
    assert "failed (2): python train.py config/tiny.py" in capsys.readouterr().out
    assert len(json.loads((equal_time.ROOT / "results" / "equal_time.json").read_text())["t"]["runs"]) == 1


@pytest.mark.slow
def test_runs_and_goes_on(home, runs, monkeypatch):
    (equal_time.ROOT / "train.py").symlink_to(equal_time.Path(config.__file__).parent.parent / "train.py")
    base = Base("a test", [str(home / "c.py"), "--max_steps=20"], 1, (10,), {"sparse": ["--mlp_sparsity=.5", "--map_rank=4"]})
    monkeypatch.setitem(BASES, "t", base)
    equal_time.main(["t"])
    before = (equal_time.ROOT / "results" / "equal_time.json").read_text()
    assert len(json.loads(before)["t"]["runs"]) == 3
    monkeypatch.setattr(equal_time.subprocess, "run", lambda *a, **k: pytest.fail("a finished run was run again"))
    equal_time.main(["t"])
    assert (equal_time.ROOT / "results" / "equal_time.json").read_text() == before
