"""What tools.bench shows of its measurements: the tables of a run, a bar chart, the README's
section from results/bench/*.json."""
from pathlib import Path

import config
from config import UserError
from tools.bench_measure import quantile
from lib.files import read_json, write_section

ROOT = Path(config.ROOT)
PHASES = ("forward", "backward", "optimizer")
GROUPS = dict(full="full length", real="GSM8K's lengths")
GPU = "python -m tools.bench config/math.py --shape=8x512/128 --arch=llama3-8b"


def summary(name, v, measured, rates):
    """One row's raw times -> what the tables show. Ratios are of medians; their quartiles are of the rounds,
    side by side; "sums" are of all rounds' time, which on real lengths, where each round is another batch, is
    what a run takes."""
    totals = {k: [sum(t) for t in m["times"]] for k, m in measured.items()}
    mine, ms = totals[name], quantile(totals[name])
    roofline = 1e3 * (v["flops"] / rates[0] + v["traffic"] / rates[1])
    phases = {f"{p}_ms": quantile([t[i] for t in v["times"]]) for i, p in enumerate(PHASES)}
    out = dict(row=name, **phases, total_ms=ms, quartiles_ms=[quantile(mine, .25), quantile(mine, .75)],
               tokens=v["tokens"], tokens_s=v["tokens"] / ms * 1e3, flops=v["flops"],
               mfu=v["flops"] / ms * 1e3 / rates[0], roofline_ms=roofline, of_roofline=roofline / ms,
               peak_gib=v["peak"] / 2 ** 30, loss=v["loss"], host_sync=v.get("host_sync"),
               times_ms=v["times"])
    for key, base in (("dense", "dense LoRA"), ("hf", "HF + PEFT")):
        if base in totals:
            per_round = [b / t for b, t in zip(totals[base], mine)]
            out[f"over_{key}"] = quantile(totals[base]) / ms
            out[f"over_{key}_quartiles"] = [quantile(per_round, .25), quantile(per_round, .75)]
            out[f"over_{key}_sums"] = sum(totals[base]) / sum(mine)
    if "dense LoRA" in measured:
        out["flop_ratio"] = measured["dense LoRA"]["flops"] / v["flops"]
        out["share"] = out["over_dense"] / out["flop_ratio"]
    return out


def shown(r, key, form):
    """A number of a row that needs another row, where that one could not run: -."""
    return form.format(r[key]) if key in r else "-"


def title(out):
    return (f"{out['arch']} {out['shape']}, {out['lora']}, {out['dtype']}, {out.get('cpu', out['device'])}, "
            f"{out['threads']} threads")


# ---- text --------------------------------------------------------------------------------------------------

HEAD = ("row", "forward", "backward", "optimizer", "total ms", "quartiles", "tokens/s", "MFU", "TFLOPs",
        "over dense", "FLOP ratio", "share", "over HF", "by sums", "peak GiB", "roofline ms", "of it")


def cells(r):
    return (r["row"], *(f"{r[p + '_ms']:.0f}" for p in PHASES), f"{r['total_ms']:.0f}",
            "{:.0f}-{:.0f}".format(*r["quartiles_ms"]), f"{r['tokens_s']:,.0f}", f"{r['mfu']:.0%}",
            f"{r['flops'] / 1e12:.3g}", shown(r, "over_dense", "{:.2f}x"), shown(r, "flop_ratio", "{:.2f}x"),
            shown(r, "share", "{:.0%}"), shown(r, "over_hf", "{:.2f}x"), shown(r, "over_hf_sums", "{:.2f}x"),
            f"{r['peak_gib']:.2f}", f"{r['roofline_ms']:.0f}", f"{r['of_roofline']:.0%}")


def aligned(rows):
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    line = lambda r: "  ".join([r[0].ljust(widths[0])] + [x.rjust(w) for x, w in zip(r[1:], widths[1:])])
    return "\n".join(map(line, rows))


def text(out):
    """The tables of one run, for a terminal."""
    parts = [f"\n{title(out)}, commit {out['commit']}"]
    for key, name in GROUPS.items():
        if key in out:
            g = out[key]
            parts.append(f"\n{name} ({g['gemm_flops'] / 1e12:.3g} TFLOP/s, {g['copy_bytes'] / 1e9:.3g} GB/s "
                         "between the rounds)")
            parts.append(aligned([HEAD, *map(cells, g["rows"])]))
    parts += [f"{name}: {why}" for name, why in out["missing"].items()]
    steps = {r["row"]: r["total_ms"] for r in out["full"]["rows"]}
    share = lambda ms, name: f"{ms / steps[name]:.1%}" if name in steps else "-"
    for name, ms in out.get("predictor_ms", {}).items():
        parts.append(f"predictor of {name}: {ms['total']:.2f} ms, {share(ms['total'], name)} of the "
                     f"step (estimate {ms['estimate']:.2f}, top-k {ms['topk']:.2f}, "
                     f"sort and index {ms['sort_and_index']:.2f})")
    parts.append(f"between rows and grid (RoPE, scatter, gather, and back): {out['grid_ms']:.2f} ms, "
                 f"{share(out['grid_ms'], 'dense LoRA')} of the dense step")
    syncs = {r["row"]: r["host_sync"] for r in out["full"]["rows"] if r.get("host_sync")}
    parts += [f"host synchronization in {k}: {v}" for k, v in syncs.items()]
    if "kernels" in out:
        parts += ["", kernel_table(out["kernels"])]
    return "\n".join(parts)


def kernel_table(rows):
    lines = [("product", "kind", "ratio", "rows", "C", "ours ms", "fused ms", "library ms", "dense ms",
              "share", "GB/s", "TFLOP/s")]
    for r in rows:
        ours = f"{r['ours_ms']:.3f}" if r["ours_ms"] else "no GPU"
        fused = f"{r['fused_ms']:.3f}" if r.get("fused_ms") else ""
        lines.append((r["op"], r["kind"], f"{r['ratio']}", f"{r['T']}", f"{r['C']}", ours,
                      fused, f"{r['library_ms']:.3f}", f"{r['dense_ms']:.3f}", f"{r['share']:.0%}",
                      f"{r['gb_s']:.0f}", f"{r['tflop_s']:.3g}"))
    return aligned(lines)


def draw(out, path):
    """A bar a row: milliseconds, phases stacked. Nothing without matplotlib."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return
    groups = [(k, t) for k, t in GROUPS.items() if k in out]
    fig, axes = plt.subplots(1, len(groups), figsize=(6.2 * len(groups), 3), squeeze=False)
    for ax, (key, name) in zip(axes[0], groups):
        rows = out[key]["rows"][::-1]
        left = [0.0] * len(rows)
        for phase, color in zip(PHASES, ("#4878a8", "#90b8d8", "#d0a050")):
            ms = [r[f"{phase}_ms"] for r in rows]
            ax.barh([r["row"] for r in rows], ms, left=left, color=color, label=phase)
            left = [a + b for a, b in zip(left, ms)]
        for i, r in enumerate(rows):
            over = shown(r, "over_dense", "{:.2f}x")
            ax.text(left[i], i, f" {r['total_ms']:.0f} ms, {over}", va="center", fontsize=8)
        ax.set_xlim(0, 1.3 * max(left))
        ax.set_title(f"{out['arch']} {out['shape']}, {name}, {out['device']}", fontsize=9)
        ax.set_xlabel("ms a step, median")
    axes[0][0].legend(fontsize=7, loc="lower right")
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


# ---- the README's section ----------------------------------------------------------------------------------

def section(runs):
    """Markdown of all stored runs. What no run has measured is named so, with its command."""
    head = ("ms a step (quartiles)", "over dense LoRA", "FLOP ratio", "share that arrives", "over HF + PEFT",
            "by sums", "peak GiB")
    lines = []
    for out in runs:
        lines += [f"**{title(out)}**, {out['steps']} rounds, commit {out['commit']}:", "",
                  f"    {out['command'].strip()}", ""]
        for key, name in GROUPS.items():
            if key in out:
                lines += [f"| {name} | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|",
                          *map(markdown, out[key]["rows"])]
                lines += [f"| {row} | {why} | | | | | | |" for row, why in out["missing"].items()] + [""]
    if not any("driver" in out for out in runs):
        lines += [f"**On a GPU: unmeasured**, for lack of one. The command: `{GPU}`", ""]
    return "\n".join(lines)


def markdown(r):
    low, high = r["quartiles_ms"]
    share = shown(r, "share", "{:.0%}") if r["row"].startswith("+") else ""
    hf, sums = (f"{r[k]:.2f}x" if k in r else "" for k in ("over_hf", "over_hf_sums"))
    return (f"| {r['row']} | {r['total_ms']:,.0f} ({low:,.0f}-{high:,.0f}) | "
            f"{shown(r, 'over_dense', '{:.2f}x')} | {shown(r, 'flop_ratio', '{:.2f}x')} | {share} | {hf} | "
            f"{sums} | {r['peak_gib']:.2f} |")


def readme(folder=None, path=None):
    """Puts section() between the markers in the README. UserError: no markers, or nothing measured."""
    folder, path = Path(folder or ROOT / "results" / "bench"), Path(path or ROOT / "README.md")
    runs = [read_json(p) for p in sorted(folder.glob("*.json"))]
    if not runs:
        raise UserError(f"{folder} holds no measurement yet: run python -m tools.bench "
                        "config/bench_cpu.py first")
    write_section(path, "bench", section(runs))
    print(f"{path}: {len(runs)} runs")
