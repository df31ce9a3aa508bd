"""Loss of several runs over one another, against time and against FLOPs, from their metrics.jsonl.

    python -m results.plot out/a out/b           writes out/b/loss.png
    --out=PATH       the picture     --smooth=20      steps that a point of the training loss is the mean of
    --target=        a validation loss, "": the highest of the runs' lowest, which all of them reach

Thin: the training loss, smoothed. Dots: the validation loss. Printed: when each run first has the target,
between two evaluations on a line. The finer eval_interval, the better it is known.
"""
import json
from pathlib import Path

from config import UserError
from lib.cli import options, run
from lib.state import read_lines


def read(out_dir):
    """-> (steps: [{"loss", and summed up to then "seconds", "flops"}], evaluations: the same with
    "val_loss"), in order."""
    path = Path(out_dir) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the out_dir of a run of train.py")
    steps, evaluations, seconds, flops = [], [], 0.0, 0.0
    for line in read_lines(path):
        m = json.loads(line)
        if "seconds" in m:
            seconds, flops = seconds + m["seconds"], flops + m["flops"]
        for key, where in (("loss", steps), ("val_loss", evaluations)):
            if m.get(key) is not None:
                where.append({key: m[key], "seconds": seconds, "flops": flops})
    result = path.with_name("result.json")  # has the last evaluation
    if result.is_file() and json.loads(result.read_text()).get("val_loss") is not None:
        evaluations.append({"val_loss": json.loads(result.read_text())["val_loss"], "seconds": seconds,
                            "flops": flops})
    if not steps:
        raise UserError(f"{path} holds no step yet: let the run make some first")
    return steps, evaluations


def smooth(values, n):
    """Mean of the last n values up to each, of fewer at the beginning."""
    return [sum(values[max(0, i - n + 1):i + 1]) / min(n, i + 1) for i in range(len(values))]


def reach(evaluations, target):
    """evaluations: dicts of "val_loss" and what has been spent by then -> the latter, a tuple (seconds,
    FLOPs), when the validation loss first is at the target, between two evaluations on a line; or None."""
    for a, b in zip([None, *evaluations], evaluations):
        if b["val_loss"] <= target:
            f = 1.0 if a is None else (a["val_loss"] - target) / (a["val_loss"] - b["val_loss"])
            return tuple(b[k] if a is None else a[k] + f * (b[k] - a[k]) for k in b if k != "val_loss")
    return None


def draw(runs, path, n):
    """runs: {name: read()'s pair}."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots need matplotlib, which training does not: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for ax, key, unit, what in zip(axes, ("seconds", "flops"), (1, 1e12),
                                   ("seconds of training", "TFLOP of training")):
        for i, (name, (steps, evaluations)) in enumerate(runs.items()):
            losses = smooth([s["loss"] for s in steps], n)
            ax.plot([s[key] / unit for s in steps], losses, color=f"C{i % 10}", lw=1, alpha=.6)
            ax.plot([e[key] / unit for e in evaluations], [e["val_loss"] for e in evaluations], "o--",
                    color=f"C{i % 10}", label=name, ms=4)
        ax.set(xlabel=what, yscale="log")
        ax.grid(alpha=.3, which="both")
    axes[0].set_ylabel(f"loss (line: training, mean of {n} steps; dots: validation)")
    axes[1].legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main(argv):
    folders, o = options(argv, __doc__, (1, 99), out="", smooth=20, target="")
    if o["smooth"] < 1:
        raise UserError(f"--smooth={o['smooth']} has to be at least 1")
    path = o["out"] or str(Path(folders[-1]) / "loss.png")
    runs = {f: read(f) for f in folders}
    lowest = [min(e["val_loss"] for e in evaluations) for _, evaluations in runs.values() if evaluations]
    try:
        target = float(o["target"]) if o["target"] else max(lowest) if lowest else None
    except ValueError:
        raise UserError(f"--target={o['target']} has to be a validation loss") from None
    for name, (_, evaluations) in runs.items() if target else ():  # no evaluation, nothing to say
        at = reach(evaluations, target)
        print(f"{name}: " + (f"validation loss {target:.4f} after {at[0]:.0f} s and {at[1] / 1e12:.2f} TFLOP"
                             if at else f"never at {target:.4f}"))
    draw(runs, path, o["smooth"])
    print(path)


if __name__ == "__main__":
    run(main)
