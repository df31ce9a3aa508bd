"""The tables and pictures of results/ablations.py: ablations.md, the README's part of it, the budgets' curve.
"""
from predictor import KINDS

RATIO_OPTIONS = ("--predictor=", "--budget=", "--init_adapter=", "--out=")  # by which files of ratios differ
COLUMNS = (("after", "accuracy", "{:.1%}"), ("vs_dense", "against dense", "{:+.1%}"),
           ("test_loss", "test loss", "{:.4f}"), ("val_loss", "validation loss", "{:.4f}"),
           ("sooner", "time to a loss", "{:.0%}"), ("rise_at_switch", "rise at switch", "{:+.3f}"),
           ("rise_at_end", "rise at end", "{:+.3f}"), ("spike", "spike", "{:+.3f}"),
           ("flops_share", "FLOPs", "{:.0%}"), ("time_share", "time", "{:.0%}"))

# name: (title, columns, lines) of the README's tables
README = {
    "tiny": ("embedded default", ("after", "vs_dense", "test_loss", "flops_share", "time_share"),
             ("dense LoRA", *(f"{kind}, MLP 0.9" for kind in KINDS), "split none", "split random",
              *(f"{kind}, sensitivity, budget {b}" for kind in KINDS[:2] for b in (.85, .75)),
              *(f"dense LoRA, {n} steps" for n in (360, 320, 280)))),
    "smollm2": ("SmolLM2-135M, GSM8K", ("val_loss", "rise_at_switch", "flops_share", "time_share"),
                ("dense LoRA", "as configured", "split none", "split random",
                 *(f"{kind}, sensitivity, budget {b}" for kind in KINDS[:2] for b in (.95, .9, .85, .75)),
                 *(f"{kind}, MLP 0.5" for kind in KINDS),
                 *(f"dense LoRA, {n} steps" for n in (27, 24, 21)))),
}


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
             "the paired difference to dense LoRA with the same seed. rise: of one validation batch's loss "
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
    """The README's tables: of each base the lines and columns in README. The rest is in ablations.md."""
    tables = []
    for name, (title, keys, labels) in README.items():
        some = {label: everything[name][label] for label in labels if label in everything.get(name, {})}
        shown = [c for c in COLUMNS if c[0] in keys]
        lines = [f"| {title} | seeds | " + " | ".join(c[1] for c in shown) + " |",
                 "|---" * (len(shown) + 2) + "|"]
        for label, e in some.items():
            cells = []
            for key, _, form in shown:
                s = e["summary"].get(key)
                cells.append(cell(s and (dict(s, error=None) if key.endswith("share") else s), form))
            lines.append(f"| {label} | {len(e['seeds'])} | " + " | ".join(cells) + " |")
        if some:
            tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


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
