"""The ablations: every run is a train.py command line that can be pasted; this script only runs them and
collects what they wrote.

    python -m results.ablations config/tiny.py                       all rows, five seeds for 1, 4 and 7,
                                                                     three for the others
    python -m results.ablations config/tiny.py --rows=1,4 --seeds=3 --name=lists --dataset=tiny_lists
                                       --model=out/lists_base        (made as data/tiny/prepare.py says)
    python -m results.ablations config/smollm2.py --rows=1,4,7 --seeds=3 --name=smollm2 --mlp=.5 --attn=
                                       --budgets=.9,.95,.85,.75 --model=DIR --save_interval=0 --dtype=bfloat16
                                       --max_steps=30 --test_examples=0 --max_new_tokens=1 --eval_examples=48
                                       --eval_interval=30            (DIR: a link to the model)

    --rows=1,2,...     1 selectors  2 MLP, attention, both  3 where the ratios come from  4 split
                       5 when it is sparse  6 rank and refresh  7 budgets, and dense LoRA stopped early
                       8 long runs  9 who has a loss sooner
    --seeds=0          runs of each line; 0: as above
    --name=tiny        of this base, in the tables and under out/ablations
    --mlp=, --attn=    ratios of rows 1, 2 and 9; --blocks=20-28: in these blocks, not in all but the first
                       and the last
    --budgets=         of row 7 (FLOPs of a sparse step over a dense one's; the first one is row 3's)
    --jobs=2           runs at a time, one thread each
    --dry=True         only print the command lines;  --collect=True: only collect
    --option=value     everything else goes to every train.py

Interrupted, it goes on: finished runs have a result.json, half-finished ones a state. Writes
results/ablations.json (all numbers; what it has of other lines and seeds stays), results/ablations.md (mean,
standard error and number of seeds, with the options of each) and the README's table.
"""
import json
import math
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path

import config
from config import UserError
from predictor import KINDS
from results import plot, tables
from results.tables import summary
from lib.cli import run, split_options
from lib.files import resolve, write_section, write_text

ROOT = Path(__file__).resolve().parent.parent
OWN = dict(rows="1,2,3,4,5,6,7,8,9", seeds=0, name="tiny", mlp=".9,.95,.97", attn=".25,.5", blocks="",
           budgets=".75,.9,.85,.8,.7,.65", jobs=2, dry=False, collect=False)
TITLES = {1: "Which channels: five selectors", 2: "Which part",
          3: "Where the ratios come from, at equal FLOPs", 4: "Which tokens are dense",
          5: "When it is sparse", 6: "Rank of the SVD, refreshing of the measured channels",
          7: "Budgets, against dense LoRA stopped early", 8: "Ten times as long",
          9: "Who has a given validation loss sooner"}
SENSITIVITY = ["python", "-m", "tools.sensitivity"]
SEEDS = {1: 5, 4: 5, 7: 5}  # three for the others


# ---- the table of runs: row -> [(label, arguments of train.py)]. -------------------------------------------
# A label is one set of arguments; rows may share it.

def table(cfg, n_layers, folder, mlp, attn, budgets, blocks=""):
    """cfg: the base config with its flags; folder: where the chosen ratios are written. -> (rows, {file of
    ratios among their arguments: the options of the tools.sensitivity that writes it})."""
    needs = {}
    # block 0 costs everything, the last one is dense in any case
    inner = blocks or ("1" if n_layers < 4 else f"1-{n_layers - 2}")
    steps = cfg.max_steps or 200

    def ratios(m=0, a=0):
        return [f'--{k}_sparsity={{"{inner}": {r}}}' if r else f"--{k}_sparsity=0"
                for k, r in (("mlp", m), ("attn", a))]

    def chosen(kind, budget, pattern="", tuned=False):
        name = f"{folder}/{kind}-{budget:g}{'_tuned' * tuned}"
        init = [f"--init_adapter={folder}/{short('dense LoRA')}/0"] * tuned
        needs[name + pattern + ".py"] = [f"--predictor={kind}", f"--budget={budget:g}", *init,
                                         f"--out={name}.py"]
        return [name + pattern + ".py"]

    where = f" in blocks {blocks}" if blocks else ""
    dense, ours, measured = (("dense LoRA", ratios()), ("as configured", []),
                             ("measured", ["--predictor=measured"]))

    def sparse(kind, m=0, a=0):
        parts = [f"MLP {m:g}"] * bool(m) + [f"attention {a:g}"] * bool(a)
        return f"{kind}, {' and '.join(parts)}{where}", ratios(m, a) + [f"--predictor={kind}"]

    rows = {1: [dense, *(sparse(kind, m) for m in mlp for kind in KINDS),
                *(sparse(kind, 0, a) for a in attn for kind in KINDS)]}
    m, a = (mlp or [0])[0], (attn or [0])[0]
    rows[2] = [dense, *(sparse(cfg.predictor, *some) for some in ((m, 0), (0, a), (m, a)) if any(some))]
    rows[3] = [dense] + [(f"{cfg.predictor}, {what}, budget {budgets[0]:g}",
                          chosen(cfg.predictor, budgets[0], pattern, tuned))
                         for what, pattern, tuned in (("uniform", "_uniform", False),
                                                      ("uniform in the MLPs", "_uniform_mlp", False),
                                                      ("published pattern", "_published", False),
                                                      ("sensitivity", "", False),
                                                      ("sensitivity after fine-tuning", "", True))]
    rows[4] = [dense, ours] + [(f"split {s}", [f"--split={s}"]) for s in ("rectangle", "none", "random")]
    rows[5] = [dense, ours, ("sparse from the start", ["--sparse_start=0"]),
               ("dense for 20 %", ["--sparse_start=0.2"]),
               ("dense for 5 % and the last 10 %", ["--sparse_start=0.05", "--sparse_end=0.9"])]
    rows[6] = [dense, ours] + [(f"svd, rank {r}", ["--predictor=svd", f"--predictor_rank={r}"])
                               for r in (1, 2, 4, 8, 16, 64)]
    rows[6] += [measured] + [(f"measured, refresh {n}", ["--predictor=measured", f"--predictor_refresh={n}"])
                             for n in (50, 10)]
    rows[7] = [dense] + [(f"dense LoRA, {round(f * steps)} steps",
                          ratios() + [f"--max_steps={round(f * steps)}"]) for f in (.9, .8, .7, .6, .5, .4)]
    rows[7] += [(f"{k}, sensitivity, budget {b:g}", chosen(k, b))
                for k in dict.fromkeys(("svd", "measured", cfg.predictor))
                for b in sorted(budgets, reverse=True)]
    long = [f"--max_steps={10 * steps}"]
    rows[8] = [(f"{name}, {10 * steps} steps", args + long) for name, args in (dense, ours, measured)]
    # for the loss alone no answer is written
    often = [f"--eval_interval={max(1, steps // 10)}", "--max_new_tokens=1", "--test_examples=0"]
    rows[9] = [(f"{name}, often evaluated", args + often)
               for name, args in (dense, *(sparse("measured", m) for m in mlp))]
    return merged(rows, cfg, n_layers), needs


def merged(rows, cfg, n_layers):
    """The same rows; runs that come out the same (rank 8 is the default, ...) get the label of the first of
    them and so are run once."""
    first = {}
    for runs in rows.values():
        for k, (label, args) in enumerate(runs):
            if not any(a.endswith(".py") for a in args):
                c = replace(cfg, **dict(config.parse_flag(a) for a in args))
                # the last block is dense
                parts = [config.ratios(r, n_layers, "sparsity")[:-1]
                         for r in (c.mlp_sparsity, c.attn_sparsity)]
                key = repr(replace(c, mlp_sparsity=parts[0], attn_sparsity=parts[1],
                                   predictor=c.predictor if any(sum(parts, [])) else ""))
                runs[k] = first.setdefault(key, (label, args))
    return rows


def short(label):
    return "".join(c if c.isalnum() or c in ".-" else "_"
                   for c in label.replace(", ", "-").replace(" %", "pct"))


# ---- run ---------------------------------------------------------------------------------------------------

def execute(command, log):
    """Runs a command line in the repository's root. Returns whether it succeeded; its output goes to
    the file log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as f:
        code = subprocess.run([sys.executable, *command[1:]], cwd=ROOT, stdout=f,
                              stderr=subprocess.STDOUT).returncode
    if code:
        print(f"failed ({code}): {shlex.join(command)}\n  "
              + (log.read_text().strip().splitlines() or [""])[-1], flush=True)
    return code == 0


def run_all(commands, folder, base, jobs):
    """commands: {(label, seed): (command line, arguments of the label, its analysis or None)}. First the
    analyses, one after the other (they share one file), then the trainings, so many at a time; then the same
    for the analyses that start from the adapter of a run."""
    for tuned in (False, True):
        some = {k: c for k, c in commands.items()
                if any(o.startswith("--init_adapter=") for o in c[2] or ()) == tuned}
        for need in dict.fromkeys(tuple(need) for _, _, need in some.values() if need):
            if not Path(ROOT, need[-1].partition("=")[2]).exists():
                execute([*SENSITIVITY, *base, "--threads=1", *need], ROOT / folder / "sensitivity.log")
        train_all(some, jobs)


def train_all(commands, jobs):
    def one(key):
        command, args, _ = commands[key]
        out = Path(ROOT, command[-1].partition("=")[2])
        if not finished(command) and all(Path(ROOT, a).exists() for a in args if a.endswith(".py")):
            if execute(command + ["--resume=True"], out / "log.txt"):
                print(f"done: {key[0]}, seed {key[1]}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        # all labels with the first seed, then with the second
        list(pool.map(one, sorted(commands, key=lambda k: k[1])))


# ---- collect -----------------------------------------------------------------------------------------------

def finished(command):
    """Whether the run of this command line has. UserError where its directory holds one of other options, or
    of ratios that were chosen anew since."""
    out = Path(ROOT, command[-1].partition("=")[2])
    if not (out / "result.json").exists():
        return False
    states = sorted((out / "state").glob("*/state.json"))
    if states and all(Path(ROOT, a).exists() for a in command[2:] if a.endswith(".py")):
        there = vars(config.Config()) | json.loads(states[-1].read_text())["info"]["config"]
        here = json.loads(json.dumps(asdict(config.load(command[2:]))))
        odd = [f"{k} = {there[k]!r}, not {v!r}" for k, v in here.items()
               if k not in ("out_dir", "resume", "device") and there[k] != v]
        if odd:
            raise UserError(f"{out} holds a run with {odd[0]}: remove it, or give another --name")
    return True


def read(out):
    """What a finished run wrote -> {quantity: number}, and "losses", its training losses."""
    result = json.loads((out / "result.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    r = {k: result.get(k) for k in ("after", "before", "test_loss", "val_loss", "seconds", "flops",
                                    "dense_flops", "time_ratio")}
    seen = [m for m in lines if m.get("sparse_loss") is not None]
    if seen:
        r["rise_at_switch"] = seen[0]["sparse_loss"] - seen[0]["dense_loss"]
    if result.get("sparse_loss") is not None:
        r["rise_at_end"] = result["sparse_loss"] - result["dense_loss"]
    r["losses"] = [m["loss"] for m in lines if "loss" in m]
    r["evaluations"] = [(m["step"], m["val_loss"]) for m in lines if m.get("val_loss") is not None]
    scales = [m["scale"] for m in lines if "loss" in m]
    r["switch"] = next((i for i, scale in enumerate(scales) if scale), None)
    r["steps"] = len(scales)
    # up to each step, a dense one's is 1
    r["times"] = list(accumulate((r["time_ratio"] if scale else 1.0 for scale in scales), initial=0.0))
    if result.get("val_loss") is not None:
        r["evaluations"].append((r["steps"], result["val_loss"]))
    return {k: v for k, v in r.items() if v is not None}


def compare(r, dense):
    """Adds what needs the dense run of the same seed: the share of its FLOPs and of its time, and the spike:
    by how much the training loss of the first five sparse steps lies over that of the dense
    run on the same batches. A sparse step's time is counted as time_ratio dense ones: the two were timed in
    turn, so what else the machine did meanwhile hit both. What needs the course of a run is left as it is
    where ablations.json alone remembers the run."""
    # against the dense FLOPs that the run itself counted: whatever a version counts, it counts in both
    r["flops_share"] = r["flops"] / r["dense_flops"] * r["steps"] / dense["steps"]
    if "times" in r:
        r["time_share"] = r["times"][-1] / dense["steps"]
    if "switch" in r and {"losses"} <= r.keys() & dense.keys():
        both = [(a, b) for a, b in list(zip(r["losses"], dense["losses"]))[r["switch"]:r["switch"] + 5]
                if a is not None and b is not None]  # a step that was skipped has none
        r["spike"] = sum(a - b for a, b in both) / max(1, len(both))
    if min(len(x.get("evaluations", ())) for x in (r, dense)) > 9:
        # 20 losses down to the last that both reach: a single one, late and so on a flat curve, says little
        # (SmolLM2, three seeds: the last alone .87, 1.07, .81, the mean .95, .98, .91)
        high = min(x["evaluations"][0][1] for x in (r, dense))
        low = max(min(v for _, v in x["evaluations"]) for x in (r, dense))
        r["sooner"] = reach(r, high, low) / reach(dense, high, low)


def reach(r, high, low, n=20):
    """When the validation loss first is at a target, between two evaluations on a line: the mean over n
    targets, evenly from high (not included) to low."""
    points = [dict(val_loss=value, time=r["times"][step]) for step, value in r["evaluations"]]
    # max: rounding must not put the last target below what both reach
    return sum(plot.reach(points, max(low, high - (high - low) * i / n))[0] for i in range(1, n + 1)) / n


def collect(commands, rows, base, known):
    """known: what ablations.json has of this base. Its runs, which may lie on another machine, stay unless
    they were made again or their command line has changed since.
    -> {label: {"command", "rows", "seeds": {seed: {quantity: number}},
    "summary": {quantity: {mean, error, n}}}}"""
    out = {}
    for (label, seed), (command, args, need) in commands.items():
        if label not in out:
            old = known.get(label, {})
            ratios = old.get("ratios")
            if need and Path(ROOT, args[0]).exists():
                # the first line of a file of ratios is the command that wrote it
                ratios = Path(ROOT, args[0]).read_text().partition("\n")[0].removeprefix("# ")
            out[label] = dict(command=(f"{ratios} && " if ratios else "") + shlex.join(command[:-2]),
                              ratios=ratios, base=shlex.join(command[:2] + base), args=shlex.join(args),
                              rows=[n for n in rows if label in dict(rows[n])], seeds={})
            if old.get("command") == out[label]["command"]:
                out[label]["seeds"].update(old["seeds"])
        if finished(command):
            out[label]["seeds"][str(seed)] = read(Path(ROOT, command[-1].partition("=")[2]))
    out = {label: entry for label, entry in out.items() if entry["seeds"]}
    # else the dense run of usual length
    reference = {label: rows[n][0][0] for n in (8, 9) for label, _ in rows[n]}
    for label, entry in out.items():
        for seed, r in entry["seeds"].items():
            dense = out.get(reference.get(label, "dense LoRA"), {"seeds": {}})["seeds"].get(seed)
            if dense:
                compare(r, dense)
    for label, entry in out.items():
        entry["seeds"] = dict(sorted(entry["seeds"].items(), key=lambda item: int(item[0])))
        some = entry["seeds"].values()
        for r in some:
            for key in ("losses", "evaluations", "times"):
                r.pop(key, None)
        keys = dict.fromkeys(k for r in some for k in r if k != "switch")
        entry["summary"] = {k: summary([r[k] for r in some if k in r]) for k in keys}
    for label, entry in out.items():
        against(entry["summary"], out.get(reference.get(label, "dense LoRA"), {}).get("summary", {}))
    # at the end those of other options, as --mlp
    return out | {label: entry for label, entry in known.items() if (label, 0) not in commands}


def against(s, dense):
    """Adds the difference in accuracy of two summaries. Seeds are no pairs: rounding alone makes another run
    (results/README.md)."""
    if "after" in s and "after" in dense and s is not dense:
        errors = [x["after"]["error"] for x in (s, dense)]
        s["vs_dense"] = dict(mean=s["after"]["mean"] - dense["after"]["mean"], n=s["after"]["n"],
                             error=None if None in errors else math.hypot(*errors))


def numbers(own, key, kind=float):
    try:
        return [kind(v) for v in own[key].split(",") if v]
    except ValueError:
        raise UserError(f"--{key}={own[key]} has to be numbers with commas between") from None


def command_lines(base, own):
    """-> (rows, {(label, seed): (command line as a list, arguments of the label, options of the analysis that
    it needs, or None)} of all rows, the keys of those to run, folder)."""
    cfg = config.load(base)
    layers = json.loads((resolve(cfg.model) / "config.json").read_text())["num_hidden_layers"]
    folder = f"out/ablations/{own['name']}"
    rows, needs = table(cfg, layers, folder, numbers(own, "mlp"), numbers(own, "attn"),
                        numbers(own, "budgets"), own["blocks"])
    wanted, commands, keys = numbers(own, "rows", int), {}, []
    if not set(wanted) <= set(rows):
        raise UserError(f"--rows={own['rows']} has to be some of {','.join(map(str, rows))}")
    for n, (label, args) in ((n, run) for n in [*wanted, *(n for n in rows if n not in wanted)]
                             for run in rows[n]):
        seeds = own["seeds"] or SEEDS.get(n, 3)
        for seed in range(max(10, seeds)):  # more than are run now, for those that ablations.json knows
            command = ["python", "train.py", *base, *args, "--threads=1", f"--seed={seed}",
                       f"--out_dir={folder}/{short(label)}/{seed}"]
            this = command, args, needs.get(args[0]) if args else None
            assert commands.get((label, seed), this) == this, f"two runs are called {label}"
            commands[label, seed] = this
            if n in wanted and seed < seeds and (label, seed) not in keys:
                keys.append((label, seed))
    return rows, commands, keys, folder


def main(argv):
    own, base = split_options(argv, __doc__, **OWN)
    base = base if any(a.endswith(".py") for a in base) else ["config/tiny.py", *base]
    rows, commands, keys, folder = command_lines(base, own)
    if own["dry"]:
        return print("\n".join(shlex.join(commands[k][0]) for k in keys))
    path = ROOT / "results" / "ablations.json"
    everything = json.loads(path.read_text()) if path.exists() else {}
    known, line = everything.get(own["name"], {}), shlex.join(["python", "train.py", *base])
    for entry in known.values():
        if entry["base"] != line:
            raise UserError(f"{path} holds runs of `{entry['base']}` as {own['name']}, not of `{line}`: "
                            "give another --name")
    if not own["collect"]:
        run_all({k: commands[k] for k in keys}, folder, base, own["jobs"])
    found = collect(commands, rows, base, known)
    if not found:
        raise UserError(f"no run under {folder} has finished: nothing to collect")
    everything[own["name"]] = found
    write_text(path, json.dumps(everything, indent=1) + "\n")
    write_text(path.with_suffix(".md"), tables.markdown(everything, TITLES))
    if (ROOT / "README.md").exists():
        write_section(ROOT / "README.md", "ablations", tables.readme(everything))
    tables.draw_budgets(everything[own["name"]], path.with_name(f"budgets_{own['name']}.png"))
    print(path.with_suffix(".md"))


if __name__ == "__main__":
    run(main)
