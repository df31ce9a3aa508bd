"""ablations.md and its pictures, from the runs that results/ablations.py has collected.
"""
import math

TITLES = dict(channels="Which channels", ratios="Where the ratios come from, at equal FLOPs",
              tokens="Which tokens are dense", budgets="Budgets, against dense LoRA stopped early",
              long="Ten times as long", sooner="Who has a given validation loss sooner")
COLUMNS = dict(after=("accuracy", "{:.1%}"), vs_dense=("against dense", "{:+.1%}"),
               test_loss=("test loss", "{:.4f}"), val_loss=("validation loss", "{:.4f}"),
               over=("above dense LoRA's, same seed", "{:+.4f}"), sooner=("time to a loss", "{:.0%}"),
               rise_at_switch=("rise at switch", "{:+.3f}"), rise_at_end=("rise at end", "{:+.3f}"),
               spike=("spike", "{:+.3f}"), flops_share=("FLOPs", "{:.0%}"), time_share=("time", "{:.0%}"))
# bases whose answers say nothing (2 of 64 right), so that losses are compared: with the same seed they are
# pairs (differences spread by .0006, losses by .006), which the embedded base's runs are not (README.md)
BY_LOSS = "smollm2", "smollm2_math"
KINDS = "oracle", "measured", "energy", "svd", "random", "worst"  # from the best to the worst that is known
HEAD = """# Ablations

Made by results/ablations.py; every run is a line of ablations.json, with its commit. Mean ± standard error
over n seeds. All runs are of predictors before 2026-11-26; tiny, lists, qwen3 and multihead are of the embedded
base and task before 2026-11-28, with short problems (`git checkout 749cdb0` has them).

* accuracy: greedy answers to test problems, after training, dense; against dense: difference of the means, as
  of independent runs; above dense LoRA's: difference of validation losses
* time to a loss: over dense LoRA's (under 100%: sooner), the mean over 20 validation losses, from the first
  that was measured down to the last that both reach
* rise: of one validation batch's loss when its context runs sparse; spike: training loss of the first five
  sparse steps over the dense run's
* FLOPs, time (forward and backward, sparse and dense steps timed in turn): of the whole run over full-length
  dense LoRA's
* budget: the share of a dense step's FLOPs for which tools/sensitivity.py chose the ratios
* dense LoRA's in that time: what dense LoRA with fewer steps reaches in the time of this line, on a line
  between two runs
"""


def summary(values):
    """-> mean, standard error (None for one value), n; None for no value."""
    n = len(values)
    if n == 0:
        return None
    mean, error = sum(values) / n, None
    if n > 1:
        error = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return dict(mean=mean, error=error, n=n)


def summaries(runs, row):
    """-> {label: {quantity: summary or None, "n", "options"}} of one row, from all runs of a base."""
    lines, out = {}, {}
    for r in runs:
        if row in r["rows"]:
            lines.setdefault(r["label"], {})[r["seed"]] = r
    dense = next((seeds for label, seeds in lines.items() if label.startswith("dense LoRA")), {})
    for label, seeds in lines.items():
        s = {key: summary([r[key] for r in seeds.values() if key in r]) for key in COLUMNS}
        base = summary([r["after"] for r in dense.values() if "after" in r])
        if s["after"] and base and seeds is not dense:
            errors = base["error"], s["after"]["error"]
            error = None if None in errors else math.hypot(*errors)
            s["vs_dense"] = dict(mean=s["after"]["mean"] - base["mean"], error=error, n=s["after"]["n"])
        s["over"] = summary([r["val_loss"] - dense[seed]["val_loss"] for seed, r in seeds.items()
                             if seed in dense and "val_loss" in r])
        out[label] = s | dict(n=len(seeds), options=next(iter(seeds.values()))["options"])
    return out


def between(points, x):
    """The mean and error at x on the line through points, sorted (x, mean, error or None); at its ends
    theirs."""
    for (a, y, e), (b, z, f) in zip(points, points[1:]):
        if x <= b:
            w = max(0, x - a) / (b - a)
            error = None if None in (e, f) else math.hypot(e * (1 - w), f * w)
            return dict(mean=y + (z - y) * w, error=error)
    return dict(mean=points[-1][1], error=points[-1][2])


def add_equal_time(lines, key):
    """Adds to the sparse lines of the budgets what dense LoRA reaches with so many steps that it takes as
    long."""
    dense = {label: s for label, s in lines.items() if label.startswith("dense LoRA")}
    points = sorted((s["time_share"]["mean"], s[key]["mean"], s[key]["error"]) for s in dense.values())
    for label, s in lines.items():
        if label not in dense and s["time_share"]:
            s["equal_time"] = between(points, s["time_share"]["mean"])


# ---- Markdown

def cell(s, form):
    if not s:
        return ""
    if s["error"] is None:
        return form.format(s["mean"])
    return form.format(s["mean"]) + " ± " + form.replace("+", "").format(s["error"]).rstrip("%")


def grid(rows):
    """rows: lists of cells, the first of which is the head -> Markdown."""
    head, *rest = ["| " + " | ".join(cells) + " |" for cells in rows]
    return [head, "|---" * len(rows[0]) + "|", *rest, ""]


def table(name, runs, row):
    """The table of one row of a base."""
    lines, columns = summaries(runs, row), dict(COLUMNS)
    if name not in BY_LOSS:
        del columns["over"]
    if row == "budgets":
        key = "over" if name in BY_LOSS else "after"
        add_equal_time(lines, key)
        columns["equal_time"] = "dense LoRA's in that time", COLUMNS[key][1]
        # from the dearest to the cheapest
        lines = dict(sorted(lines.items(), key=lambda item: -item[1]["flops_share"]["mean"]))
    columns = {key: column for key, column in columns.items() if any(s.get(key) for s in lines.values())}
    rows = [["", "n", *(title for title, _ in columns.values()), "options"]]
    for label, s in lines.items():
        cells = [cell(s.get(key), form) for key, (_, form) in columns.items()]
        rows.append([label, str(s["n"]), *cells, f"`{s['options']}`"])
    return [f"### {TITLES[row]}", "", *grid(rows)]


def section(name, base):
    """All tables of a base."""
    runs = base["runs"]
    lines = [f"## {name}", "", f"`{base['command']} OPTIONS --threads=1 --seed=N`. A file of ratios is what "
             f"`{base['ratios']} --predictor=KIND --budget=B --out=FILE` wrote."]
    lines += [f"Before training: {r['before']:.1%}." for r in runs[:1] if "before" in r] + [""]
    if enough(runs):
        lines += [f"![Budgets against FLOPs and against time](budgets_{name}.png)", ""]
    for row in TITLES:
        # a row whose lines all stand in tables above, but for dense LoRA, needs none
        if any(r["rows"][0] == row and r["label"] != "dense LoRA" for r in runs):
            lines += table(name, runs, row)
    return lines


def across(everything):
    """Which channels and which tokens, in all bases: accuracies, or losses."""
    channels, tokens = [], []
    kinds = [kind for kind in KINDS if any(r["label"].startswith(f"{kind}, ")
                                           for base in everything.values() for r in base["runs"])]
    for name, base in everything.items():
        key, what = "after", "accuracy"
        if name in BY_LOSS:
            key, what = "val_loss", "loss"
        form = COLUMNS[key][1]
        cells = {label: cell(s[key], form) for label, s in summaries(base["runs"], "channels").items()}
        for part in dict.fromkeys(label.partition(", ")[2] for label in cells if ", " in label):
            channels.append([f"{name}, {part}: {what}", cells.get("dense LoRA", ""),
                             *(cells.get(f"{kind}, {part}", "") for kind in kinds)])
        lines = summaries(base["runs"], "tokens").values()
        if len(lines) == 5:
            tokens.append([f"{name}: {what}", *(cell(s[key], form) for s in lines)])
    return ["## Which channels, in all bases", "", *grid([["", "dense LoRA", *kinds], *channels]),
            "## Which tokens are dense, in all bases", "",
            *grid([["", "dense LoRA", "those in the loss", "a rectangle", "none", "random ones"], *tokens])]


def markdown(everything):
    """everything: what ablations.json holds -> ablations.md."""
    lines = [HEAD, *across(everything)]
    for name, base in everything.items():
        lines += section(name, base)
    return "\n".join(lines)


# ---- the picture

def enough(runs):
    return len({r["label"] for r in runs if "budgets" in r["rows"]}) > 3


def draw(name, runs, path):
    """Budgets against FLOPs and against time: dense LoRA stopped early, and a curve for each predictor."""
    try:
        import matplotlib
    except ImportError:
        return  # optional
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    if not enough(runs):
        return
    key, what, curves = "after", "accuracy on test problems", {}
    if name in BY_LOSS:
        key, what = "val_loss", "validation loss"
    for label, s in summaries(runs, "budgets").items():
        if "budget" in label or label.startswith("dense LoRA"):
            curves.setdefault(label.split(",")[0], []).append(s)
    fig, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for ax, share, unit in zip(axes, ("flops_share", "time_share"), ("FLOPs", "time")):
        for curve, points in curves.items():
            points.sort(key=lambda s: s["flops_share"]["mean"])
            ax.errorbar([s[share]["mean"] for s in points], [s[key]["mean"] for s in points],
                        [s[key]["error"] or 0 for s in points], marker="o", label=curve, capsize=2)
        ax.set_xlabel(f"{unit} of the run / full dense LoRA's")
    axes[0].set_ylabel(what)
    axes[0].legend()
    fig.savefig(path, dpi=130)
    plt.close(fig)
