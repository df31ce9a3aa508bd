"""The tables and pictures of results/ablations.py: ablations.md, the README's part of it, the budgets' curve.
"""
import math

from predictor import KINDS

RATIO_OPTIONS = ("--predictor=", "--budget=", "--init_adapter=", "--out=")  # by which files of ratios differ
COLUMNS = (("after", "accuracy", "{:.1%}"), ("vs_dense", "against dense", "{:+.1%}"),
           ("test_loss", "test loss", "{:.4f}"), ("val_loss", "validation loss", "{:.4f}"),
           ("over", "above dense LoRA's, same seed", "{:+.4f}"),
           ("sooner", "time to a loss", "{:.0%}"), ("rise_at_switch", "rise at switch", "{:+.3f}"),
           ("rise_at_end", "rise at end", "{:+.3f}"), ("spike", "spike", "{:+.3f}"),
           ("flops_share", "FLOPs", "{:.0%}"), ("time_share", "time", "{:.0%}"))


def budgets(*some):
    """{label: its name in the README} of row 7's sparse runs."""
    return {f"{kind}, sensitivity, budget {b}": f"{kind}, budget {b}" for kind in KINDS[:2] for b in some}


def fewer(*steps):
    labels = ["dense LoRA", *(f"dense LoRA, {n} steps" for n in steps)]
    return dict(zip(labels, labels))


# The README's tables of costs: (base, title, quantities, the one of the last column, {label: its name there})
SHIPPED = "as configured: measured, MLP .9 in blocks 20-28"
COSTS = (("tiny", "embedded default", ("after", "test_loss"), "after",
          {**fewer(360, 320, 280, 240), "svd, MLP 0.9": "as configured: svd, MLP .9 in blocks 1-4",
           **budgets(.9, .85, .8, .75, .7)}),
         ("smollm2", "SmolLM2, GSM8K", ("val_loss", "over"), "over",
          {**fewer(27, 24, 21), "as configured": SHIPPED, **budgets(.95, .9, .85, .75)}),
         ("smollm2_math", "SmolLM2, LLM-Adapters' math", ("val_loss", "after", "over"), "over",
          {**fewer(54, 48, 42), "measured, MLP 0.9 in blocks 20-28": SHIPPED, **budgets(.95, .9, .85, .75)}))
# and those of channels and of tokens: (base, title, quantity, label of a selector, or of the default)
CHANNELS = (("tiny", "embedded default, MLP .9", "after", "{}, MLP 0.9"),
            ("tiny", "MLP .95", "after", "{}, MLP 0.95"), ("tiny", "MLP .97", "after", "{}, MLP 0.97"),
            ("lists", "lists of words, MLP .9", "after", "{}, MLP 0.9"),
            ("multihead", "multi-head base, MLP .9", "after", "{}, MLP 0.9"),
            ("smollm2", "SmolLM2, GSM8K, MLP .5: loss", "val_loss", "{}, MLP 0.5"),
            ("smollm2_math", "SmolLM2, math, MLP .9 in 20-28: loss", "val_loss",
             "{}, MLP 0.9 in blocks 20-28"))
TOKENS = (("tiny", "embedded default", "after", "svd, MLP 0.9"),
          ("lists", "lists of words", "after", "svd, MLP 0.9"),
          ("smollm2", "SmolLM2, GSM8K: loss", "val_loss", "as configured"),
          ("smollm2_math", "SmolLM2, math: loss", "val_loss", "measured, MLP 0.9 in blocks 20-28"))


def summary(values):
    """-> mean, standard error (None for one value), n."""
    n, mean = len(values), sum(values) / len(values)
    return dict(mean=mean,
                error=math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None, n=n)


def cell(s, form):
    if s is None:
        return ""
    error = "" if s["error"] is None else " ± " + form.replace("+", "").format(s["error"]).rstrip("%")
    return form.format(s["mean"]) + error


def markdown(everything, titles):
    """everything: ablations.json; titles: {number of a row of runs: its title}. -> ablations.md."""
    lines = ["# Ablations", "",
             "Made by results/ablations.py; all numbers are in ablations.json. Mean ± standard error over n "
             "seeds. accuracy: greedy answers to test problems, after training, dense. against dense: "
             "the difference of the means, as of independent runs. rise: of one validation batch's loss "
             "when its context runs sparse. spike: training loss of the first five sparse steps over the "
             "dense run's. time to a loss: over dense LoRA's (under 100%: sooner), of the mean over 20 "
             "validation losses, from the first measured down to the last that both reach. FLOPs, time "
             "(forward and backward, sparse and dense steps timed in turn): of the whole run over "
             "full-length dense LoRA's.", ""]
    for name, entries in everything.items():
        before = [r["before"] for e in entries.values() for r in e["seeds"].values() if "before" in r]
        base = next(iter(entries.values()))["base"]
        ratios = {" ".join(word for word in e["ratios"].split() if not word.startswith(RATIO_OPTIONS))
                  for e in entries.values() if e["ratios"]}
        lines += [f"## {name}", "", f"`{base} OPTIONS --threads=1 --seed=N`."
                  + "".join(f" A file of ratios is what `{r} --predictor=KIND --budget=B --out=FILE` wrote."
                            for r in sorted(ratios))
                  + (f" Before training: {before[0]:.1%}." if before else ""), ""]
        for n, title in titles.items():
            some = {label: e for label, e in entries.items() if n in e["rows"]}
            if all(min(e["rows"]) < n or label == "dense LoRA" for label, e in some.items()):
                continue  # all of them stand in a table above
            shown = [c for c in COLUMNS if any(c[0] in e["summary"] for e in some.values())]
            lines += [f"### {n}. {title}", "", "| | n | " + " | ".join(c[1] for c in shown) + " | options |",
                      "|---" * (len(shown) + 3) + "|"]
            for label, e in some.items():
                row = [label, str(len(e["seeds"])),
                       *(cell(e["summary"].get(k), form) for k, _, form in shown),
                       f"`{e['args']}`" if e["args"] else ""]
                lines.append("| " + " | ".join(row) + " |")
            lines.append("")
    return "\n".join(lines)


def readme(everything):
    """The README's tables: what is reached at which cost, a base each, and which channels and tokens matter.
    The rest is in ablations.md."""
    selectors = {k: k for k in ("dense LoRA", "oracle", "measured", *KINDS)}
    splits = {"tokens in the loss dense": "{}", "random ones": "split random",
              "a rectangle": "split rectangle", "none": "split none"}
    done = [costs(everything[name], *rest) for name, *rest in COSTS if name in everything]
    return "\n".join([*done, across(everything, CHANNELS, selectors), across(everything, TOKENS, splits)])


def costs(entries, title, keys, goal, names):
    """One base, from the dearest run to the cheapest, folded. Beside each sparse run what dense LoRA reaches
    with so many steps that it takes the same time, on a line between the dense runs there are. "over": of
    losses with the same seed, which are pairs on SmolLM2 (differences spread by .0006, losses by .006)."""
    dense = {label for label, e in entries.items() if label.startswith("dense LoRA") and 7 in e["rows"]}
    some = {label: dict(e["summary"], over=above(e["seeds"], entries["dense LoRA"]["seeds"]))
            for label, e in entries.items() if label in dense | names.keys()}
    form = next(f for k, _, f in COLUMNS if k == goal)
    shown = [c for c in COLUMNS if c[0] in (*keys, "flops_share", "time_share")]
    line = sorted((s["time_share"]["mean"], s[goal]["mean"], s[goal]["error"])
                  for s in map(some.get, dense))
    lines = [f"<details><summary>{title}, run by run</summary>", "",
             "| | seeds | " + " | ".join(c[1] for c in shown)
             + " | dense LoRA's in that time |", "|---" * (len(shown) + 3) + "|"]
    for label in sorted(some.keys() & names.keys(), key=lambda k: -some[k]["flops_share"]["mean"]):
        s = some[label]
        exact = ("flops_share", "time_share") if label in dense else ("flops_share",)
        cells = [cell(s.get(k) and (dict(s[k], error=None) if k in exact else s[k]), f) for k, _, f in shown]
        cells.append("" if label in dense else cell(between(line, s["time_share"]["mean"]), form))
        lines.append(" | ".join([f"| {names[label]}", str(len(entries[label]["seeds"])), *cells]) + " |")
    return "\n".join(lines) + "\n\n</details>\n"


def above(seeds, dense):
    """Validation losses less dense LoRA's with the same seed, a summary."""
    return summary([r["val_loss"] - dense[s]["val_loss"] for s, r in seeds.items() if s in dense])


def between(points, x):
    """The mean and error at x on the line through points, sorted (x, mean, error or None); at its ends
    theirs."""
    for (a, y, e), (b, z, f) in zip(points, points[1:]):
        if x <= b:
            w = max(0, x - a) / (b - a)
            error = None if None in (e, f) else math.hypot(e * (1 - w), f * w)
            return dict(mean=y + (z - y) * w, error=error)
    return dict(mean=points[-1][1], error=points[-1][2])


def across(everything, columns, names):
    """names, {name of a row: what its label's {} stands for, or its label}, down, bases across."""
    some = [c for c in columns if c[0] in everything]
    lines = ["| | " + " | ".join(title for _, title, _, _ in some) + " |", "|---" * (len(some) + 1) + "|"]
    for name, what in names.items():
        cells = []
        for base, _, key, label in some:
            e = everything[base].get(label.format(what) if what in KINDS or what == "{}" else what)
            cells.append(cell(e["summary"].get(key), next(f for k, _, f in COLUMNS if k == key)) if e else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw_budgets(entries, path):
    """Row 7: accuracy (where no answers were written, validation loss) against FLOPs and against time, dense
    LoRA stopped early beside the sparse runs."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    some = {label: e["summary"] for label, e in entries.items()
            if 7 in e["rows"] and {"val_loss", "flops_share"} <= e["summary"].keys()}
    if len(some) < 3:
        return
    what = "after" if all("after" in s for s in some.values()) else "val_loss"
    fig, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for line in dict.fromkeys(label.split(",")[0] for label in some):
        points = sorted((s for label, s in some.items() if label.split(",")[0] == line),
                        key=lambda s: s["flops_share"]["mean"])
        for ax, key in zip(axes, ("flops_share", "time_share")):
            ax.errorbar([s[key]["mean"] for s in points], [s[what]["mean"] for s in points],
                        [s[what]["error"] or 0 for s in points], marker="o", label=line, capsize=2)
    axes[0].set(xlabel="FLOPs of the run / full dense LoRA's",
                ylabel="accuracy on test problems" if what == "after" else "validation loss")
    axes[1].set(xlabel="time of the run / full dense LoRA's")
    axes[0].legend()
    fig.savefig(path, dpi=130)
    plt.close(fig)
