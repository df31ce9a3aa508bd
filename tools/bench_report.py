"""What tools.bench shows of its measurements: the table of a run, a bar chart, and the README's speed section from results/bench/*.json."""
import re
from pathlib import Path

import config
from config import UserError
from model import read_json, write_text
from tools.bench_measure import quantile

ROOT = Path(config.ROOT)
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
PHASES = ("forward", "backward", "optimizer")


def summary(name, v, measured, rates):
    """One row's raw times -> what the tables show. Ratios are of medians; their quartiles are of the rounds, where rows ran side by side."""
    totals = {k: [sum(t) for t in m["times"]] for k, m in measured.items()}
    mine, ms = totals[name], quantile(totals[name])
    roofline = 1e3 * (v["flops"] / rates[0] + v["traffic"] / rates[1])
    out = dict(row=name, **{f"{p}_ms": quantile([t[i] for t in v["times"]]) for i, p in enumerate(PHASES)}, total_ms=ms,
               quartiles_ms=[quantile(mine, .25), quantile(mine, .75)], tokens=v["tokens"], tokens_s=v["tokens"] / ms * 1e3,
               flops=v["flops"], mfu=v["flops"] / ms * 1e3 / rates[0], roofline_ms=roofline, of_roofline=roofline / ms,
               peak_gib=v["peak"] / 2 ** 30, loss=v["loss"], host_sync=v.get("host_sync"), times_ms=v["times"])
    for key, base in (("dense", "dense LoRA"), ("hf", "HF + PEFT")):
        if base in totals:
            per_round = [b / t for b, t in zip(totals[base], mine)]
            out[f"over_{key}"] = quantile(totals[base]) / ms
            out[f"over_{key}_quartiles"] = [quantile(per_round, .25), quantile(per_round, .75)]
    out["flop_ratio"] = measured["dense LoRA"]["flops"] / v["flops"]
    out["share"] = out["over_dense"] / out["flop_ratio"]
    return out


# ---- text ------------------------------------------------------------------------------------------------------------------------

HEAD = ("row", "forward", "backward", "optimizer", "total ms", "quartiles", "tokens/s", "MFU", "TFLOPs", "over dense", "FLOP ratio", "share", "over HF",
        "peak GiB", "roofline ms", "of it")


def cells(r):
    hf = f"{r['over_hf']:.2f}x" if "over_hf" in r else "-"
    return (r["row"], *(f"{r[p + '_ms']:.0f}" for p in PHASES), f"{r['total_ms']:.0f}", "{:.0f}-{:.0f}".format(*r["quartiles_ms"]),
            f"{r['tokens_s']:,.0f}", f"{r['mfu']:.0%}", f"{r['flops'] / 1e12:.3g}", f"{r['over_dense']:.2f}x", f"{r['flop_ratio']:.2f}x",
            f"{r['share']:.0%}", hf, f"{r['peak_gib']:.2f}", f"{r['roofline_ms']:.0f}", f"{r['of_roofline']:.0%}")


def aligned(rows):
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(r, widths))) for r in rows)


def text(out):
    """The tables of one run, for a terminal."""
    parts = [f"\n{out['arch']} {out['shape']}, {out['lora']}, {out['dtype']}, {out['device']}, {out['threads']} threads, commit {out['commit']}"]
    for key, title in (("full", "full-length batches"), ("real", "GSM8K's lengths under the Alpaca template")):
        if key in out:
            g = out[key]
            parts.append(f"\n{title} ({g['gemm_flops'] / 1e12:.3g} TFLOP/s, {g['copy_bytes'] / 1e9:.3g} GB/s between the rounds)")
            parts.append(aligned([HEAD, *map(cells, g["rows"])]))
    parts += [f"{name}: {why}" for name, why in out["missing"].items()]
    for name, ms in out.get("predictor_ms", {}).items():
        step = next((r["total_ms"] for r in out["full"]["rows"] if r["row"] == name), None)
        parts.append(f"predictor of {name}: {ms['total']:.2f} ms, {ms['total'] / step:.1%} of the step (estimate {ms['estimate']:.2f}, top-k {ms['topk']:.2f}, "
                     f"sort and index {ms['sort_and_index']:.2f})")
    dense = next(r["total_ms"] for r in out["full"]["rows"] if r["row"] == "dense LoRA")
    parts.append(f"between rows and grid (RoPE, scatter, gather, and back): {out['grid_ms']:.2f} ms, {out['grid_ms'] / dense:.1%} of the dense step")
    syncs = {r["row"]: r["host_sync"] for r in out["full"]["rows"] if r.get("host_sync")}
    parts += [f"host synchronization in {k}: {v}" for k, v in syncs.items()]
    if "kernels" in out:
        parts += ["", kernel_table(out["kernels"])]
    return "\n".join(parts)


def kernel_table(rows):
    head = ("product", "kind", "ratio", "rows", "C", "ours ms", "library ms", "dense ms", "share", "GB/s", "TFLOP/s")
    return aligned([head] + [(r["op"], r["kind"], f"{r['ratio']}", f"{r['T']}", f"{r['C']}", f"{r['ours_ms']:.3f}" if r["ours_ms"] else "no GPU",
                              f"{r['library_ms']:.3f}", f"{r['dense_ms']:.3f}", f"{r['share']:.0%}", f"{r['gb_s']:.0f}", f"{r['tflop_s']:.3g}") for r in rows])


def draw(out, path):
    """A bar a row: milliseconds, phases stacked. Nothing without matplotlib."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return
    groups = [(k, t) for k, t in (("full", f"{out['shape']} (examples x tokens / scored)"), ("real", "GSM8K's lengths")) if k in out]
    fig, axes = plt.subplots(1, len(groups), figsize=(6.2 * len(groups), 3), squeeze=False)
    for ax, (key, title) in zip(axes[0], groups):
        rows = out[key]["rows"][::-1]
        left = [0.0] * len(rows)
        for phase, color in zip(PHASES, ("#4878a8", "#90b8d8", "#d0a050")):
            ms = [r[f"{phase}_ms"] for r in rows]
            ax.barh([r["row"] for r in rows], ms, left=left, color=color, label=phase)
            left = [a + b for a, b in zip(left, ms)]
        for i, r in enumerate(rows):
            ax.text(left[i], i, f" {r['total_ms']:.0f} ms, {r['over_dense']:.2f}x", va="center", fontsize=8)
        ax.set_xlim(0, 1.3 * max(left))
        ax.set_title(f"{out['arch']}, {title}, {out['device']}", fontsize=9)
        ax.set_xlabel("ms a step, median")
    axes[0][0].legend(fontsize=7, loc="lower right")
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


# ---- the README's section --------------------------------------------------------------------------------------------------------

def section(runs):
    """Markdown of all stored runs. What has no run is named as unmeasured, with its command."""
    lines = []
    for out in runs:
        chip = out.get("cpu", out["device"])
        lines += [f"**{out['arch']}, {out['shape']}**, {out['lora']}, {out['dtype']}, {chip}, {out['threads']} threads, {out['steps']} rounds, commit {out['commit']}: "
                  f"`{out['command']}`", ""]
        for key, title in (("full", "full length"), ("real", "GSM8K's lengths")):
            if key not in out:
                continue
            lines += [f"| {title} | ms a step (quartiles) | over dense LoRA | FLOP ratio | share that arrives | over HF + PEFT | peak GiB |", "|---|---|---|---|---|---|---|"]
            for r in out[key]["rows"]:
                hf = f"{r['over_hf']:.2f}x" if "over_hf" in r else "-"
                sparse = r["row"].startswith("+")
                lines.append(f"| {r['row']} | {r['total_ms']:,.0f} ({r['quartiles_ms'][0]:,.0f}-{r['quartiles_ms'][1]:,.0f}) | {r['over_dense']:.2f}x | "
                             f"{r['flop_ratio']:.2f}x | " + (f"{r['share']:.0%}" if sparse else "") + f" | {hf} | {r['peak_gib']:.2f} |")
            lines += [f"| {name} | {why} | | | | | |" for name, why in out["missing"].items()] + [""]
    if not any("driver" in out for out in runs):
        lines += ["**On a GPU: unmeasured**, for lack of one. The command: `python -m tools.bench config/math.py --shape=8x512/128 --arch=llama3-8b`", ""]
    return "\n".join(lines)


def readme(folder=None, path=None):
    """Puts section() between the markers in the README. UserError: no markers, or nothing measured."""
    folder, path = Path(folder or ROOT / "results" / "bench"), Path(path or ROOT / "README.md")
    runs = [read_json(p) for p in sorted(folder.glob("*.json"))]
    if not runs:
        raise UserError(f"{folder} holds no measurement yet: run python -m tools.bench config/bench_cpu.py first")
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    if BEGIN not in old or END not in old:
        raise UserError(f"{path} has no place for the numbers: write {BEGIN} and {END} where they belong")
    new = f"{BEGIN}\n{section(runs)}{END}"
    write_text(path, re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), lambda m: new, old, flags=re.S))
    print(f"{path}: {len(runs)} runs")
