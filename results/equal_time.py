"""Does it pay? SparseLoRA against dense LoRA that is stopped after the same time.

    python -m results.equal_time tiny                   tiny_1e2, tiny_25e4: at other learning rates;
                                                        tiny_ablations: what each part is worth
    python -m results.equal_time stories --model=DIR    stories_240: longer; upper: see BASES
    python -m results.equal_time smollm2 --model=DIR    first: python data/gsm8k_shots/prepare.py; two_120: longer
    python -m results.equal_time long --model=DIR       first: the same with --shots=6; long_120: longer;
                                                        long_120_1e3: at a better learning rate
    python -m results.equal_time qwen_long --model=DIR  likewise; qwen_long_fp32; qwen_stories: the word problems

    BASE            one of BASES below: which runs there are; each is a train.py command line that can be pasted
    --seeds=0       of each run; 0: as many as BASES says
    --jobs=2        runs at a time, one thread each, so that all of them share the machine alike
    --dry=True      only print the command lines;  --collect=True: only collect what has finished
    --option=value  everything else goes to every train.py

Interrupted, it goes on: finished runs have a result.json, half-finished ones a state. What they wrote is collected in
equal_time.json, a run a line, of which equal_time.md and a picture of each base are made.
"""
import json
import math
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

import config
import data.tokenizer
from config import UserError
from lib.cli import run, split_options
from lib.files import resolve, write_text
from tools import bench_measure, sensitivity
from train import in_sparse_part, load_model

ROOT = Path(__file__).resolve().parent.parent
OWN = dict(seeds=0, jobs=2, dry=False, collect=False)
DENSE = "dense LoRA"


class Base(NamedTuple):
    """A model and a task."""
    title: str
    train: list  # train.py's arguments, of all runs
    seeds: int
    fewer: tuple  # dense LoRA is also stopped after so many steps
    lines: dict  # label of a sparse run: its arguments
    by: str = "val_loss"  # what runs are compared by: or test_loss


# What the two bases of SmolLM2 on GSM8K have in common.
SMOLLM2 = ["config/smollm2.py", "--dtype=bfloat16", "--lora_targets=q,k,v,o", "--max_steps=60", "--warmup_steps=6",
           "--eval_examples=64", "--test_examples=0"]
UPPER_MLPS = ['--mlp_sparsity={"17-28": 0.97}', "--map_rank=128"]
NO_QUERIES = ['--attn_sparsity={"17-28": 1}', "--map_rank=128"]
NO_QUERIES_LATER = [*NO_QUERIES, "--sparse_start=.15"]
# What the bases of 120 steps add to SMOLLM2.
LONGER = ["--dtype=float32", "--max_steps=120", "--warmup_steps=10", "--eval_interval=120"]
LOWER_TOO = ['--mlp_sparsity={"1-28": 0.97}', "--map_rank=256", "--sparse_start=.15", "--sparse_end=.9"]
# The embedded base's word problems, for SmolLM2.
TINY_TASK = ["--dataset=tiny", "--prompt_format=plain", "--lr_schedule=linear"]
# What its two bases in bf16 there have in common: the ratios too, which are config/smollm2.py's, UPPER_MLPS.
STORIES = ["config/smollm2.py", "--dtype=bfloat16", *TINY_TASK, "--learning_rate=1e-3", "--eval_interval=40",
           "--save_interval=40", "--eval_examples=64", "--test_examples=200", "--max_new_tokens=32"]
# What the bases with long prompts have in common; LONG_120: those of SmolLM2 with 120 steps.
LONG = ["--dataset=data/gsm8k_shots/6", "--batch_size=2", "--max_seq_len=1600", "--eval_interval=60",
        "--save_interval=20", "--max_new_tokens=0"]
LONG_120 = [*SMOLLM2, *LONG, *LONGER]
QWEN_LONG = ["config/qwen.py", "--max_steps=60", "--eval_examples=64", "--test_examples=0", *LONG]

# Everything is computed in the forward; in the backward nine context tokens of ten are left out, from the first step on.
BACKWARD = ["--mlp_sparsity=0", "--attn_sparsity=0", "--backward_sparsity=.9", "--sparse_start=0"]

BASES = dict(
    tiny=Base("the embedded base and its word problems, 86 % context", ["config/tiny.py"], 5, (195, 175, 155), {
        "SparseLoRA": [],
        "backward of a tenth": BACKWARD,
        "and no queries in 3-4": ['--attn_sparsity={"3-4": 1}'],
        "svd": ["--predictor=svd"],
    }, by="test_loss"),
    tiny_1e2=Base(
        "the embedded base at twice the learning rate, 1e-2", ["config/tiny.py", "--learning_rate=1e-2"], 1, (195, 175),
        {"SparseLoRA": []}, by="test_loss"),
    tiny_25e4=Base(
        "the embedded base at half the learning rate, 2.5e-3", ["config/tiny.py", "--learning_rate=2.5e-3"], 1, (195, 175),
        {"SparseLoRA": []}, by="test_loss"),
    tiny_ablations=Base(
        "the embedded base once more: what each part of the method is worth (beside other jobs: times say little)",
        ["config/tiny.py"], 2, (180,), {
            "SparseLoRA": [],
            "channels by the loss, no map": ["--map_rank=0"],
            "channels by energy, no map": ["--predictor=energy"],
            "random channels, no map": ["--predictor=random"],
            "svd": ["--predictor=svd"],
            "map of rank 16": ["--map_rank=16"],
            "map of rank 128, the model's width": ["--map_rank=128"],
            "sparse from 2 % on": ["--sparse_start=.02"],
            "sparse from 10 % on": ["--sparse_start=.1"],
            "LoRA in 2-5, dense": ["--lora_from=2", "--mlp_sparsity=0"],
            "LoRA in 2-5, SparseLoRA": ["--lora_from=2"],
            "half of q, k, v and o too": ['--attn_sparsity={"1-4": 0.5}'],
            # tools.sensitivity config/tiny.py --budget=.65 --batches=2 --ranks=16,64,128 --ratios=.5,.9,.97,1
            "ratios and rank by sensitivity, 65 %": [
                '--mlp_sparsity={"1": 0.9, "2": 0.97, "3": 0.94, "4": 0.97}', '--attn_sparsity={"4": 1}',
                "--map_rank=128"],
            "one ratio for all blocks, 65 %": ['--mlp_sparsity={"0-4": 0.85}', "--map_rank=128"],
        }, by="test_loss"),
    stories=Base(
        "SmolLM2-135M-Instruct on the embedded base's word problems, 86 % context, 120 steps",
        [*STORIES, "--max_steps=120", "--warmup_steps=6"], 2, (96, 84), {
            ".97 in 17-28": [],  # as config/smollm2.py has it
            ".97 in 17-28, no queries there": NO_QUERIES,
            ".97 in 17-28, no queries there, dense to 15 %": NO_QUERIES_LATER,
            ".97 in 17-28, no queries there, dense to 30 %": [*NO_QUERIES, "--sparse_start=.3"],
            ".97 in 1-28": ['--mlp_sparsity={"1-28": 0.97}', "--map_rank=256"],
            "svd, .97 in 17-28": ["--predictor=svd"],
        }, by="test_loss"),
    stories_240=Base(
        "the same with 240 steps", [*STORIES, "--max_steps=240", "--warmup_steps=10"], 2, (200, 180), {
            ".97 in 17-28, no queries there": NO_QUERIES,
            ".97 in 17-28, no queries there, dense to 15 %": NO_QUERIES_LATER,
        }, by="test_loss"),
    upper=Base(
        "SmolLM2-135M-Instruct on the same problems, fp32: LoRA in some blocks only; the lower half sparse too",
        ["config/smollm2.py", "--dtype=float32", *TINY_TASK, "--learning_rate=1e-3", "--max_steps=120",
         "--warmup_steps=6", "--eval_interval=60", "--save_interval=30", "--eval_examples=32", "--test_examples=200",
         "--max_new_tokens=0"], 1, (90, 60), {
            "LoRA in 10-29, .97 in 17-28, no queries there": ["--lora_from=10", *NO_QUERIES_LATER],
            "LoRA in 15-29, .97 in 17-28, no queries there, 240 steps": [
                "--lora_from=15", *NO_QUERIES, "--sparse_start=.1", "--max_steps=240", "--warmup_steps=10"],
            ".97 in 1-28, dense to 15 % and from 90 % on": LOWER_TOO,
            ".97 in 1-28, no queries in 17-28, dense to 15 % and from 90 % on": [
                *LOWER_TOO, '--attn_sparsity={"17-28": 1}'],
        }, by="test_loss"),
    smollm2=Base(
        "SmolLM2-135M-Instruct, GSM8K with two solved problems before each, 80 % context",
        [*SMOLLM2, "--dataset=gsm8k_shots", "--batch_size=4", "--max_seq_len=640", "--eval_interval=30",
         "--save_interval=30", "--max_new_tokens=4"], 2, (51, 45), {
            ".97 in 17-28": UPPER_MLPS,
            ".97 in 17-28, no queries there": UPPER_MLPS + NO_QUERIES,
            ".5 in 1-16, .97 in 17-28": ['--mlp_sparsity={"1-16": 0.5, "17-28": 0.97}', "--map_rank=128"],
            ".97 in 1-28": ['--mlp_sparsity={"1-28": 0.97}', "--map_rank=256"],
        }),
    long=Base(
        "SmolLM2-135M-Instruct, GSM8K with six solved problems before each, 92 % context",
        [*SMOLLM2, *LONG], 2, (48, 42), {
            ".97 in 17-28": UPPER_MLPS,
            "no queries in 17-28": ["--mlp_sparsity=0", *NO_QUERIES],
            ".97 in 17-28, no queries there": UPPER_MLPS + NO_QUERIES,
            ".97 in 17-28, no queries there, dense to 15 %": [*UPPER_MLPS, *NO_QUERIES_LATER],
        }),
    long_120=Base(
        "the same with 120 steps, fp32",
        LONG_120, 2, (90, 60), {
            "backward of a tenth": BACKWARD,
            ".97 in 17-28, no queries there": UPPER_MLPS + NO_QUERIES,
            "LoRA in 15-29, dense": ["--lora_from=15", "--mlp_sparsity=0"],
            "LoRA in 15-29, .97 in 17-28, no queries there": ["--lora_from=15", *UPPER_MLPS, *NO_QUERIES],
            "LoRA in 15-29, .97 in 17-28, no queries there, 200 steps": [
                "--lora_from=15", *UPPER_MLPS, *NO_QUERIES, "--max_steps=200", "--eval_interval=200"],
        }),
    long_120_1e3=Base(
        "the same at twice the learning rate, 1e-3", [*LONG_120, "--learning_rate=1e-3"], 2, (90, 60),
        {"backward of a tenth": BACKWARD}),
    two_120=Base(
        "SmolLM2-135M-Instruct, GSM8K with two solved problems before each, 80 % context, 120 steps of 2, fp32",
        [*SMOLLM2, "--dataset=gsm8k_shots", "--batch_size=2", "--max_seq_len=640", "--save_interval=20",
         "--max_new_tokens=0", *LONGER], 2, (90, 60), {"backward of a tenth": BACKWARD}),
    qwen_long=Base(
        "Qwen2.5-Coder-0.5B-Instruct, GSM8K with six solved problems before each, 92 % context",
        [*QWEN_LONG, "--dtype=bfloat16"], 3, (45, 36), {
            ".97 in 12-22": [],  # as config/qwen.py has it
            ".97 in 12-22, no queries there": ['--attn_sparsity={"12-22": 1}'],
            ".97 in 12-22, no queries there, dense to 15 %": ['--attn_sparsity={"12-22": 1}', "--sparse_start=.15"],
            ".97 in 8-22, no queries there": ['--mlp_sparsity={"8-22": 0.97}', '--attn_sparsity={"8-22": 1}'],
        }),
    qwen_long_fp32=Base(
        "Qwen2.5-Coder-0.5B-Instruct, GSM8K with six solved problems before each, 92 % context, fp32",
        [*QWEN_LONG, "--dtype=float32"], 2, (45, 36), {
            "backward of a tenth": BACKWARD,
        }),
    qwen_stories=Base(
        "Qwen2.5-Coder-0.5B-Instruct on the embedded base's word problems, 86 % context, 40 steps, fp32",
        ["config/qwen.py", "--dtype=float32", *TINY_TASK, "--max_steps=40", "--warmup_steps=4", "--eval_interval=40",
         "--save_interval=10", "--eval_examples=128", "--test_examples=0"], 2, (32, 28), {
            ".97 in 12-22": [],
            ".97 in 12-22, no queries there": ['--attn_sparsity={"12-22": 1}'],
            ".97 in 12-22, no queries there, dense to 15 %": ['--attn_sparsity={"12-22": 1}', "--sparse_start=.15"],
            "svd, .97 in 12-22": ["--predictor=svd"],
        }),
)


# ---- which runs there are, and running them ----------------------------------------------------------------

class Run(NamedTuple):
    label: str
    seed: int
    command: list
    out: Path


def runs_of(name, seeds, more):
    """-> [Run] of a base, all with the first seed, then all with the second. more: arguments of every train.py."""
    base = BASES[name]
    lines = {DENSE: ["--mlp_sparsity=0"]}
    for steps in base.fewer:
        lines[f"{DENSE}, {steps} steps"] = ["--mlp_sparsity=0", f"--max_steps={steps}"]
    lines |= base.lines
    out = []
    for seed in range(seeds or base.seeds):
        for label, args in lines.items():
            folder = f"out/equal_time/{name}/{''.join(c if c.isalnum() else '_' for c in label)}/{seed}"
            command = ["python", "train.py", *base.train, *args, *more, "--threads=1", f"--seed={seed}",
                       f"--out_dir={folder}"]
            out.append(Run(label, seed, command, ROOT / folder))
    return out


def train(r):
    """Makes a run, or what is left of it. Its output goes to log.txt in its directory. Returns whether it is there now.
    UserError: a run of other options is there."""
    if finished(r):
        return True
    r.out.mkdir(parents=True, exist_ok=True)
    log = r.out / "log.txt"
    if not (r.out / "about.json").exists():
        here = bench_measure.machine(torch.device("cpu"))
        write_text(r.out / "about.json", json.dumps(dict(
            options=options_of(r), commit=here["commit"], machine=f"{here['cpu']}, {here['cores']} cores")))
    with open(log, "a") as f:
        command = [sys.executable, *r.command[1:], "--resume=True"]
        failed = subprocess.run(command, cwd=ROOT, stdout=f, stderr=f).returncode
    last = (log.read_text().strip().splitlines() or [""])[-1]
    if not failed and config.load(r.command[2:]).lora_from:
        write_text(r.out / "dense_step.json", json.dumps(dense_step(r)))
    if failed:
        print(f"failed ({failed}): {shlex.join(r.command)}\n  {last}", flush=True)
    else:
        print(f"done: {r.label}, seed {r.seed}", flush=True)
    return not failed


def dense_step(r, n=7):
    """A dense step of a run whose LoRA is in some blocks, over one with LoRA in all: {"time", "flops"}. Time: of forward
    and backward, median over n batches in turn."""
    cfg = replace(config.load(r.command[2:]), mlp_sparsity=0.0, attn_sparsity=0.0, backward_sparsity=0.0)
    torch.set_num_threads(1)
    folder, device = resolve(cfg.model), torch.device("cpu")
    tokenizer = data.tokenizer.load(folder)
    some, every = (load_model(c, folder, device, tokenizer) for c in (cfg, replace(cfg, lora_from=0)))
    ratios, flops = [], [0, 0]
    for b in sensitivity.calibration(cfg, tokenizer, n + 1, device):
        seconds = []
        for i, model in enumerate((some, every)):
            start = time.perf_counter()
            model.loss(b).backward()
            seconds.append(time.perf_counter() - start)
            flops[i] += model.flops(b)[0]
        ratios.append(seconds[0] / seconds[1])
    return dict(time=statistics.median(ratios[1:]), flops=flops[0] / flops[1])  # the first warms up


def options_of(r):
    return shown(r.command[2:-2])


def about(r):
    """What was noted when the run began."""
    return json.loads((r.out / "about.json").read_text())


def finished(r):
    """Whether the run was made to its end. UserError: one of other options has begun there."""
    if not (r.out / "about.json").exists():
        return False
    there = about(r)["options"]
    if there != options_of(r):
        raise UserError(f"{r.out} holds a run of other options, `{there}`: remove it")
    return (r.out / "result.json").exists()


# ---- collecting --------------------------------------------------------------------------------------------

def read(r, by):
    """What a finished run wrote -> what equal_time.json keeps of it. "time" is in steps of dense LoRA: a dense step
    counts 1, a sparse one what the run measured at its end, in turn on the same batches; what comes between steps,
    extra passes and the fit of the maps at the switch, counts its seconds over a dense step's. Where LoRA is in some
    blocks only, all that times what dense_step() measured."""
    result = json.loads((r.out / "result.json").read_text())
    steps = [json.loads(line) for line in (r.out / "metrics.jsonl").read_text().splitlines()]
    losses = [[m["step"], m["val_loss"]] for m in steps if m.get("val_loss") is not None]
    rise = [m["sparse_loss"] - m["dense_loss"] for m in steps if m.get("sparse_loss") is not None]
    steps = [m for m in steps if "loss" in m]
    sparse = sum(m["sparse"] for m in steps)
    between = result["seconds"] - sum(m["seconds"] for m in steps)
    ratio = result.get("time_ratio", 1.0)
    dense_seconds = statistics.median(m["seconds"] / (ratio if m["sparse"] else 1.0) for m in steps)
    own = dict(time=1.0, flops=1.0)  # a dense step of its own, in steps of dense LoRA
    if (r.out / "dense_step.json").exists():
        own = json.loads((r.out / "dense_step.json").read_text())
    kept = dict(label=r.label, seed=r.seed, **about(r), steps=len(steps), seconds=result["seconds"],
                flops=own["flops"] * result["flops"] / result["dense_flops"] * len(steps),
                step_time=own["time"] * ratio,
                time=own["time"] * (len(steps) - sparse + ratio * sparse + between / dense_seconds),
                loss=result[by], accuracy=result.get("after"),
                rise=rise[0] if rise else None, losses=losses)
    return {key: rounded(value) for key, value in kept.items() if value is not None}


def shown(args):
    """A command line, without where this machine has the model."""
    return shlex.join("--model=DIR" if arg.startswith("--model=") else arg for arg in args)


def rounded(value):
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return value


def collect(known, runs, by):
    """known: the runs of this base that equal_time.json has -> the same with those that have finished here."""
    there = {(r["label"], r["seed"]): r for r in known}
    for r in runs:
        if finished(r):
            there[r.label, r.seed] = read(r, by)
    order = list(dict.fromkeys([r.label for r in runs] + [r["label"] for r in known]))
    return sorted(there.values(), key=lambda r: (order.index(r["label"]), r["seed"]))


# ---- tables and pictures -----------------------------------------------------------------------------------

class Mean(NamedTuple):
    mean: float
    error: float  # standard error, 0 of one value


def mean(values):
    values = list(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Mean(statistics.fmean(values), error)


def full_length(runs):
    """The steps of full-length dense LoRA; where it has not finished, of the longest run."""
    finished_dense = [r["steps"] for r in runs if r["label"] == DENSE]
    return max(finished_dense or (r["steps"] for r in runs))


def lines_of(runs):
    """[run] -> {label: {quantity: Mean, "n"}}. flops and time: over full-length dense LoRA's. over: by how much the
    loss is higher than that of full-length dense LoRA with the same seed."""
    by_label = {}
    for r in runs:
        by_label.setdefault(r["label"], {})[r["seed"]] = r
    full = full_length(runs)
    dense = by_label.get(DENSE, {})
    out = {}
    for label, seeds in by_label.items():
        line = dict(n=len(seeds))
        line["loss"] = mean(r["loss"] for r in seeds.values())
        line["flops"], line["time"] = (mean(r[key] / full for r in seeds.values()) for key in ("flops", "time"))
        if label != DENSE and dense.keys() & seeds.keys():
            line["over"] = mean(r["loss"] - dense[seed]["loss"] for seed, r in seeds.items() if seed in dense)
        for key in ("accuracy", "rise"):
            if all(key in r for r in seeds.values()):
                line[key] = mean(r[key] for r in seeds.values())
        out[label] = line
    return out


def dense_curve(lines):
    """[(time, loss as a Mean)] of dense LoRA's runs, the shortest first."""
    return sorted((s["time"].mean, s["loss"]) for label, s in lines.items() if label.startswith(DENSE))


def with_seeds_of(label, runs):
    """The runs with the seeds of this label's, for what sets it beside dense LoRA: a seed may move all runs' losses by
    more than what is compared. All runs, where dense LoRA lacks one of those seeds."""
    seeds = {r["seed"] for r in runs if r["label"] == label}
    if seeds <= {r["seed"] for r in runs if r["label"] == DENSE}:
        return [r for r in runs if r["seed"] in seeds]
    return runs


def in_that_time(lines, time):
    """The loss (Mean) of dense LoRA with so many steps that it takes this time, on a line between two of its runs;
    None beyond them."""
    points = dense_curve(lines)
    for (a, low), (b, high) in zip(points, points[1:]):
        if a <= time <= b:
            w = (time - a) / (b - a)
            return Mean(low.mean * (1 - w) + high.mean * w, math.hypot(low.error * (1 - w), high.error * w))
    return None


def speedup(lines, label):
    """How much faster a sparse run came to its loss than dense LoRA comes there, as a Mean: dense LoRA's time for that
    loss, on the line through the two runs beside it (the last two where it is lower still), over the sparse run's. The
    error is that of both losses, over the line's slope; 0, unknown, of one seed. None with less than two runs of dense
    LoRA, where the longer of the two is no better than the shorter, or where even the shortest has a lower loss:
    at_most()."""
    points, s = dense_curve(lines), lines[label]
    if len(points) < 2 or s["loss"].mean > points[0][1].mean:
        return None
    for (a, high), (b, low) in zip(points, points[1:]):
        if s["loss"].mean >= low.mean:
            break
    slope = (low.mean - high.mean) / (b - a)  # of the loss, in one full run's time
    if slope >= 0:
        return None
    reached = b + (s["loss"].mean - low.mean) / slope
    error = 0.0
    if s["n"] > 1:
        error = math.hypot(s["loss"].error, low.error) / abs(slope)
    return Mean(reached / s["time"].mean, error / s["time"].mean)


def at_most(lines, label):
    """What speedup() is less than where dense LoRA's shortest run has a lower loss than the sparse one, as a cell."""
    points, s = dense_curve(lines), lines[label]
    if not points or s["loss"].mean <= points[0][1].mean:
        return ""
    return f"< {points[0][0] / s['time'].mean:.2f}"


def cell(value, form):
    if value is None:
        return ""
    error = f" ± {form.format(value.error).lstrip('+')}" if value.error else ""
    return form.format(value.mean) + error


HEAD = """# SparseLoRA against dense LoRA in the same time

Written by results/equal_time.py, which says how; every run is a line of equal_time.json. Mean ± standard error over n
seeds. FLOPs and time: of the whole run, over full-length dense LoRA's. Time: forward and backward, sparse and dense
steps timed in turn on the same batches, and what the switch takes. Over dense: the loss less that of dense LoRA of the
same seed. In that time: the loss of dense LoRA with fewer steps and the same seeds, on a line between two runs.
Faster: dense LoRA's time for the sparse run's loss (on that line, or on its continuation to more steps), over the sparse
run's time; < where dense LoRA's shortest run is better already. Rise: of a validation batch's loss at the switch.
"""


def markdown(everything):
    """everything: what equal_time.json holds -> equal_time.md."""
    out = [HEAD]
    for name, base in everything.items():
        machines = "; ".join(dict.fromkeys(r["machine"] for r in base["runs"]))
        out += [f"## {name}: {base['title']}", "", f"{machines}. `{base['command']}`", "",
                f"![Loss against time](equal_time_{name}.png)", "",
                "| | n | FLOPs | time | loss | over dense | dense LoRA in that time | faster | accuracy | rise |",
                "|---|---|---|---|---|---|---|---|---|---|"]
        lines = lines_of(base["runs"])
        for label, s in lines.items():
            same_time, faster = None, ""
            if not label.startswith(DENSE):
                same_seeds = lines_of(with_seeds_of(label, base["runs"]))
                same_time = in_that_time(same_seeds, s["time"].mean)
                faster = cell(speedup(same_seeds, label), "{:.2f}") or at_most(same_seeds, label)
            cells = [label, str(s["n"]), f"{s['flops'].mean:.0%}", cell(s["time"], "{:.1%}"),
                     cell(s["loss"], "{:.4f}"), cell(s.get("over"), "{:+.4f}"), cell(same_time, "{:.4f}"),
                     faster, cell(s.get("accuracy"), "{:.1%}"), cell(s.get("rise"), "{:+.3f}")]
            out.append("| " + " | ".join(cells) + " |")
        out.append("")
    return "\n".join(out)


def course(runs):
    """The runs of one label, with all its seeds -> [(time, validation loss)] along the run, means over the seeds. time:
    of so many steps, dense ones and sparse ones, as a part of the whole run's."""
    first = runs[0]
    cfg = config.load(shlex.split(first["options"]))
    seconds = [0.0]  # after so many steps, in dense steps
    for i in range(first["steps"]):
        step_time = first["step_time"] if in_sparse_part(cfg, i, first["steps"]) else 1.0
        seconds.append(seconds[-1] + step_time)
    whole = statistics.fmean(r["time"] for r in runs)
    out = []
    for points in zip(*(r["losses"] for r in runs)):
        step = points[0][0]
        out.append((whole * seconds[step] / seconds[-1], statistics.fmean(loss for _, loss in points)))
    return out


def draw(runs, path):
    """Right: the loss at the end against the time of the run; dense LoRA's runs make a curve. Left, where runs have
    been validated on the way: their validation loss against the time so far."""
    try:
        import matplotlib
    except ImportError:
        return  # optional
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    tab20 = plt.get_cmap("tab20").colors  # pairs of a dark and a light one; a base may have more than ten lines
    blue, light_blue = tab20[:2]
    others = iter(tab20[2::2] + tab20[3::2])
    lines = lines_of(runs)
    dense = dense_curve(lines)
    full = full_length(runs)
    on_the_way = any(len(r["losses"]) > 1 for r in runs)
    fig, axes = plt.subplots(1, 1 + on_the_way, figsize=(9 + 4 * on_the_way, 4), layout="constrained", squeeze=False)
    *left, ax = axes[0]
    ax.errorbar([t for t, _ in dense], [v.mean for _, v in dense], [v.error for _, v in dense], marker="o", capsize=2,
                color=blue, label="dense LoRA, fewer steps")
    for label, s in lines.items():
        color = blue if label == DENSE else light_blue
        if not label.startswith(DENSE):
            color = next(others)
            ax.errorbar(s["time"].mean, s["loss"].mean, s["loss"].error, marker="s", capsize=2, color=color, label=label)
        if left:
            points = course([r for r in runs if r["label"] == label])
            left[0].plot([t / full for t, _ in points], [loss for _, loss in points], marker=".", lw=1, color=color)
    for a in left:
        a.set(xlabel="time so far / full dense LoRA's", ylabel="validation loss", yscale="log")
    ax.set(xlabel="time of the run / full dense LoRA's", ylabel="loss at the end")
    fig.legend(loc="outside right upper", fontsize=8)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def one_run_a_line(everything):
    return json.dumps(everything).replace('{"label": ', '\n{"label": ') + "\n"


def main(argv):
    own, args = split_options(argv, __doc__, **OWN)
    names = [arg for arg in args if arg in BASES]
    more = [arg for arg in args if arg not in BASES]
    if len(names) != 1:
        raise UserError(f"name one base of {', '.join(BASES)}; -h shows how")
    name, = names
    base, runs = BASES[name], runs_of(name, own["seeds"], more)
    if own["dry"]:
        return print("\n".join(shlex.join(r.command) for r in runs))
    there = []
    if not own["collect"]:
        with ThreadPoolExecutor(own["jobs"]) as pool:
            there = list(pool.map(train, runs))
    path = ROOT / "results" / "equal_time.json"
    everything = json.loads(path.read_text()) if path.exists() else {}
    ours = everything.setdefault(name, dict(runs=[]))
    ours |= dict(title=base.title, command=shown(["python", "-m", "results.equal_time", name, *more]))
    ours["runs"] = collect(ours["runs"], runs, base.by)
    if not ours["runs"]:
        raise UserError(f"no run under out/equal_time/{name} has finished: nothing to collect")
    write_text(path, one_run_a_line(everything))
    write_text(path.with_suffix(".md"), markdown(everything))
    draw(ours["runs"], path.with_name(f"equal_time_{name}.png"))
    print(path.with_suffix(".md"))
    if not all(there):
        raise UserError(f"{there.count(False)} of {len(runs)} runs failed, as said above: the same command goes on with "
                        "them, and their log.txt says more")


if __name__ == "__main__":
    run(main)
