"""The ablations: every run is a train.py command line that can be pasted. This script runs them and collects
what they wrote in ablations.json, of which results/tables.py makes ablations.md and the pictures.

    python -m results.ablations config/tiny.py
    python -m results.ablations config/smollm2.py --rows=channels,tokens,budgets --seeds=3 --name=smollm2
                             --mlp=.5 --attn= --budgets=.9,.95,.85,.75 --model=DIR --dtype=bfloat16 ...

    --rows=            channels, ratios, tokens, budgets, long, sooner, or some of them (titles: tables.py)
    --seeds=0          runs of each line; 0: five for channels, tokens and budgets, three for the others
    --name=tiny        of this base, in the tables and under out/ablations
    --kinds=           predictors of the row channels
    --mlp=, --attn=    ratios there; --blocks=20-28: in these blocks, not in all but the first and the last
    --budgets=         FLOPs of a sparse step over a dense one's; the first one is that of the row ratios
    --jobs=2           runs at a time, one thread each
    --dry=True         only print the command lines;  --collect=True: only collect
    --option=value     everything else goes to every train.py

Interrupted, it goes on: finished runs have a result.json, half-finished ones a state.
"""
import json
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import config
from config import UserError
from lib.cli import run, split_options
from lib.files import resolve, write_text
from results import tables

ROOT = Path(__file__).resolve().parent.parent
OWN = dict(rows="channels,ratios,tokens,budgets,long,sooner", seeds=0, name="tiny",
           kinds="svd,measured,energy,oracle,random,worst", mlp=".9,.95,.97", attn=".25,.5", blocks="",
           budgets=".75,.9,.85,.8,.7,.65", jobs=2, dry=False, collect=False)
SEEDS = dict(channels=5, ratios=3, tokens=5, budgets=5, long=3, sooner=3)
ANALYSIS = ["python", "-m", "tools.sensitivity"]
# what ablations.json keeps of a run
HEAD = "label", "seed", "rows", "options", "commit"
NUMBERS = ("before", "after", "test_loss", "val_loss", "sooner", "rise_at_switch", "rise_at_end", "spike",
           "flops_share", "time_share", "seconds", "steps")


class Line(NamedTuple):
    """One line of a table."""
    label: str
    args: list  # of train.py, besides the base's
    analysis: tuple = ()  # options of the tools.sensitivity that writes the file of ratios among args


class Run(NamedTuple):
    line: Line
    seed: int
    command: list
    out: Path


# ---- which runs there are ----------------------------------------------------------------------------------

def table(cfg, own, inner, folder):
    """-> {row: [Line]}; a row begins with the dense run that its others are compared with. cfg: the base's
    options; inner: the blocks that are made sparse; folder: where files of ratios go."""
    mlp, attn, budgets = (numbers(own, key) for key in ("mlp", "attn", "budgets"))
    kinds, steps = own["kinds"].split(","), cfg.max_steps or 200
    where = f" in blocks {own['blocks']}" if own["blocks"] else ""
    none = ["--mlp_sparsity=0", "--attn_sparsity=0"]
    # written out, so that it is another command line when the config file changes
    ratios = [f"--mlp_sparsity={json.dumps(cfg.mlp_sparsity or 0)}",
              f"--attn_sparsity={json.dumps(cfg.attn_sparsity or 0)}"]
    ours = ratios + [f"--predictor={cfg.predictor}"]
    dense, usual = Line("dense LoRA", none), Line("as configured", ours)

    def sparse(kind, part, ratio):
        value = {"MLP": 0, "attention": 0, part: json.dumps({inner: ratio})}
        return Line(f"{kind}, {part} {ratio:g}{where}", [f"--mlp_sparsity={value['MLP']}",
                    f"--attn_sparsity={value['attention']}", f"--predictor={kind}"])

    def chosen(kind, budget, what="sensitivity", pattern=""):
        """Ratios that tools.sensitivity chooses, or a pattern of equal FLOPs that it writes beside them."""
        file = f"{folder}/{kind}-{budget:g}"
        return Line(f"{kind}, {what}, budget {budget:g}", [f"{file}{pattern}.py"],
                    (f"--predictor={kind}", f"--budget={budget:g}", f"--out={file}.py"))

    rows = {}
    rows["channels"] = [dense]
    rows["channels"] += [sparse(kind, "MLP", ratio) for ratio in mlp for kind in kinds]
    rows["channels"] += [sparse(kind, "attention", ratio) for ratio in attn for kind in kinds]
    rows["ratios"] = [dense, chosen(cfg.predictor, budgets[0], "uniform", "_uniform"),
                      chosen(cfg.predictor, budgets[0], "uniform in the MLPs", "_uniform_mlp"),
                      chosen(cfg.predictor, budgets[0], "published pattern", "_published"),
                      chosen(cfg.predictor, budgets[0])]
    rows["tokens"] = [dense, usual]
    rows["tokens"] += [Line(f"split {s}", ours + [f"--split={s}"]) for s in ("rectangle", "none", "random")]
    rows["budgets"] = [dense, usual]
    for n in (round(share * steps) for share in (.9, .8, .7, .6, .5, .4)):
        rows["budgets"].append(Line(f"dense LoRA, {n} steps", none + [f"--max_steps={n}"]))
    for kind in dict.fromkeys(("svd", "measured", cfg.predictor)):
        rows["budgets"] += [chosen(kind, budget) for budget in sorted(budgets, reverse=True)]
    long, after = f"--max_steps={10 * steps}", f", {10 * steps} steps"
    rows["long"] = [Line(dense.label + after, none + [long]), Line(usual.label + after, ours + [long]),
                    Line("measured" + after, ratios + ["--predictor=measured", long])]
    # for the loss alone no answer is written
    often = [f"--eval_interval={max(1, steps // 10)}", "--max_new_tokens=1", "--test_examples=0"]
    rows["sooner"] = [Line(f"{line.label}, often evaluated", line.args + often)
                      for line in (dense, *(sparse("measured", "MLP", ratio) for ratio in mlp))]
    return rows


def numbers(own, key):
    try:
        return [float(v) for v in own[key].split(",") if v]
    except ValueError:
        raise UserError(f"--{key}={own[key]} has to be numbers with commas between") from None


def short(label):
    """The name of its folder."""
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in label.replace(", ", "-"))


def command_lines(base, own):
    """-> ({row: [Line]}, the runs that are asked for)."""
    cfg, wanted = config.load(base), own["rows"].split(",")
    layers = json.loads((resolve(cfg.model) / "config.json").read_text())["num_hidden_layers"]
    # block 0 costs everything, the last one is dense in any case
    inner = own["blocks"] or ("1" if layers < 4 else f"1-{layers - 2}")
    rows = table(cfg, own, inner, f"out/ablations/{own['name']}")
    if not set(wanted) <= set(rows):
        raise UserError(f"--rows={own['rows']} has to be some of {','.join(rows)}")
    first = {}  # equal options are one line, with the label that comes first
    rows = {row: [first.setdefault(tuple(line.args), line) for line in lines] for row, lines in rows.items()}
    runs = {(line.label, seed): run_of(base, own["name"], line, seed)
            for row in wanted for line in rows[row] for seed in range(own["seeds"] or SEEDS[row])}
    return rows, list(runs.values())


def run_of(base, name, line, seed):
    out = f"out/ablations/{name}/{short(line.label)}/{seed}"
    command = ["python", "train.py", *base, *line.args, "--threads=1", f"--seed={seed}", f"--out_dir={out}"]
    return Run(line, seed, command, ROOT / out)


# ---- run ---------------------------------------------------------------------------------------------------

def execute(command, log):
    """Runs a command line in the repository's root, its output to the file log -> whether it succeeded."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as f:
        code = subprocess.run([sys.executable, *command[1:]], cwd=ROOT, stdout=f, stderr=f).returncode
    if code:
        last = (log.read_text().strip().splitlines() or [""])[-1]
        print(f"failed ({code}): {shlex.join(command)}\n  {last}", flush=True)
    return code == 0


def run_all(runs, base, jobs):
    """First the analyses, one after the other, for they share a file; then the trainings, so many at a time:
    all lines with the first seed, then with the second."""
    for analysis in dict.fromkeys(r.line.analysis for r in runs if r.line.analysis):
        path = ROOT / analysis[-1].removeprefix("--out=")
        if not path.exists():
            execute([*ANALYSIS, *base, "--threads=1", *analysis], path.parent / "sensitivity.log")
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(train, sorted(runs, key=lambda r: r.seed)))


def train(r):
    if finished(r) or not options(r):
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    r.out.mkdir(parents=True, exist_ok=True)
    write_text(r.out / "about.json", json.dumps(dict(commit=commit.stdout.strip(), options=options(r))))
    if execute(r.command + ["--resume=True"], r.out / "log.txt"):
        print(f"done: {r.line.label}, seed {r.seed}", flush=True)


def about(r):
    """What was noted when the run began."""
    path = r.out / "about.json"
    return json.loads(path.read_text()) if path.exists() else dict(commit="", options="")


def options(r):
    """All that this train.py is told, the ratios in a file too. "": that file is not here."""
    if r.line.analysis and not Path(ROOT, r.line.args[0]).exists():
        return ""
    return repr(config.load(r.command[2:]))


def finished(r):
    """UserError where its directory holds a run of other options, or of ratios that were chosen anew."""
    if not (r.out / "result.json").exists():
        return False
    there, here = about(r)["options"], options(r)
    if there and here and there != here:
        raise UserError(f"{r.out} holds a run of other options (about.json) than `{shlex.join(r.command)}`: "
                        "remove it, or give another --name")
    return True


# ---- collect -----------------------------------------------------------------------------------------------

def read(out):
    """What a finished run wrote: its numbers, and its course, which only compare() needs."""
    r = json.loads((out / "result.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [m for m in lines if "loss" in m]
    switch = [m["sparse_loss"] - m["dense_loss"] for m in lines if m.get("sparse_loss") is not None]
    if switch:
        r["rise_at_switch"] = switch[0]
    if r.get("sparse_loss") is not None:
        r["rise_at_end"] = r["sparse_loss"] - r["dense_loss"]
    r["steps"] = len(steps)
    r["losses"] = [m["loss"] for m in steps]
    r["sparse"] = [m["sparse"] for m in steps]
    # up to each step, in dense steps. A sparse one counts time_ratio: the two were timed in turn, so what
    # else the machine did meanwhile hit both
    r["times"] = list(accumulate((r["time_ratio"] if sparse else 1.0 for sparse in r["sparse"]), initial=0.0))
    r["evaluations"] = [(m["step"], m["val_loss"]) for m in lines if m.get("val_loss") is not None]
    if r.get("val_loss") is not None:
        r["evaluations"].append((r["steps"], r["val_loss"]))
    return r


def compare(r, dense):
    """Adds what needs the dense run of the same seed, of which ablations.json may remember no more than the
    numbers: shares of FLOPs and time; the spike, by how much the training loss of the first five sparse steps
    lies over the dense run's on the same batches; and when a validation loss is reached."""
    # against the dense FLOPs that the run itself counted: whatever a version counts, it counts in both
    r["flops_share"] = r["flops"] / r["dense_flops"] * r["steps"] / dense["steps"]
    r["time_share"] = r["times"][-1] / dense["steps"]
    if any(r.get("sparse", ())) and "losses" in dense:
        first = r["sparse"].index(True)
        pairs = list(zip(r["losses"], dense["losses"]))[first:first + 5]
        rises = [a - b for a, b in pairs if a is not None and b is not None]  # a skipped step has no loss
        r["spike"] = sum(rises) / max(1, len(rises))
    if min(len(x.get("evaluations", ())) for x in (r, dense)) > 9:
        # 20 losses down to the last that both reach: a single one, late and so on a flat curve, says little
        # (SmolLM2, three seeds: the last alone .87, 1.07, .81, the mean .95, .98, .91)
        high = min(x["evaluations"][0][1] for x in (r, dense))
        low = max(min(v for _, v in x["evaluations"]) for x in (r, dense))
        r["sooner"] = reach(r, high, low) / reach(dense, high, low)


def reach(r, high, low, n=20):
    """The mean time to n validation losses, evenly from high (not included) to low."""
    points = [(value, r["times"][step]) for step, value in r["evaluations"]]
    # max: rounding must not put the last target below what both reach
    return sum(time_to(points, max(low, high - (high - low) * i / n)) for i in range(1, n + 1)) / n


def time_to(points, target):
    """points: [(loss, time)] -> when the loss first is at the target, on a line between two; None: never."""
    before = None
    for loss, time in points:
        if loss <= target:
            if before is None:
                return time
            return before[1] + (time - before[1]) * (before[0] - target) / (before[0] - loss)
        before = loss, time
    return None


def collect(base, name, rows, known):
    """known: the runs of this base that ablations.json has. They may lie on another machine, and stay unless
    they were made again or their line is another command now. -> the same with those found here."""
    lines = {line.label: line for some in rows.values() for line in some}
    runs = {(r["label"], r["seed"]): r for r in known}
    for label, line in lines.items():
        head = dict(label=label, rows=[row for row in rows if line in rows[row]])
        head["options"] = shlex.join(line.args)
        for r in [r for r in known if r["label"] == label]:
            del runs[label, r["seed"]]
            if r["options"] == head["options"]:
                runs[label, r["seed"]] = r | head
        for out in (ROOT / "out/ablations" / name / short(label)).glob("[0-9]*"):
            r = run_of(base, name, line, int(out.name))
            if finished(r):
                runs[label, r.seed] = head | dict(seed=r.seed, commit=about(r)["commit"]) | read(out)
    for (label, seed), r in runs.items():
        dense = runs.get((rows[r["rows"][0]][0].label, seed)) if "times" in r else None
        if dense:
            compare(r, dense)
    order = [*lines, *(r["label"] for r in known)]  # at the end those of other options, as --mlp
    return [kept(runs[key]) for key in sorted(runs, key=lambda key: (order.index(key[0]), key[1]))]


def kept(r):
    """What ablations.json keeps of a run, seven digits of each number."""
    head = {key: r[key] for key in HEAD if key in r}
    return head | {key: float(f"{r[key]:.7g}") for key in NUMBERS if r.get(key) is not None}


def one_run_a_line(everything):
    return json.dumps(everything).replace('{"label": ', '\n{"label": ') + "\n"


def main(argv):
    own, base = split_options(argv, __doc__, **OWN)
    if not any(arg.endswith(".py") for arg in base):
        base = ["config/tiny.py", *base]
    rows, runs = command_lines(base, own)
    if own["dry"]:
        return print("\n".join(shlex.join(r.command) for r in runs))
    name, command = own["name"], shlex.join(["python", "train.py", *base])
    path = ROOT / "results" / "ablations.json"
    everything = json.loads(path.read_text()) if path.exists() else {}
    ratios = shlex.join([*ANALYSIS, *base, "--threads=1"])
    ours = everything.setdefault(name, dict(command=command, ratios=ratios, runs=[]))
    if ours["command"] != command:
        raise UserError(f"{path} holds runs of `{ours['command']}` as {name}, not of `{command}`: "
                        "give another --name")
    if not own["collect"]:
        run_all(runs, base, own["jobs"])
    ours["runs"] = collect(base, name, rows, ours["runs"])
    if not ours["runs"]:
        raise UserError(f"no run under out/ablations/{name} has finished: nothing to collect")
    write_text(path, one_run_a_line(everything))
    write_text(path.with_suffix(".md"), tables.markdown(everything))
    tables.draw(name, ours["runs"], path.with_name(f"budgets_{name}.png"))
    print(path.with_suffix(".md"))


if __name__ == "__main__":
    run(main)
