"""What tools.bench shows of its measurements: one Markdown section a run, on the terminal and, of all runs in
results/bench/*.json, in results/bench.md. Ratios are made here, from the times and FLOPs in those files."""
from pathlib import Path

import numpy as np

import config
from config import UserError
from lib.files import read_json, write_text

ROOT = Path(config.ROOT)
RAW = ("row", "times_ms", "flops", "roofline_ms", "tokens", "peak_gib", "predictor_ms", "unpack_ms")  # old files: more
GROUPS = dict(full="full length", real="GSM8K's lengths")
TOP = """# Bench

Written by `python -m tools.bench --report` from the JSON files of [bench](bench), which hold every number
with machine, versions and load; the rows: `python -m tools.bench -h`. 4x512/128: 4 examples of 512 tokens,
the last 128 of each scored. All rows of a table run in turn, one step of each in every round.

- *over* a row: its time / this row's in the same round, the median of all rounds. *By sums*: of all rounds'
  time together, which on real lengths, where each round is another batch, is what a run takes.
- *FLOP ratio*: what the speed-up would be if time followed FLOPs. Counted is what is computed (HF's
  attention: the whole square). *Share that arrives*: how much of it was measured; 100 % is a perfect
  implementation.
- *MFU*: relative to the GEMM that is timed between the rounds, under the same load: the MLP's over 2048 rows.
- *of the roofline*: the least that the step could take / what it takes. The least: its FLOPs at the rate of
  that GEMM, and then the operands of its elementwise passes, each once, at the bandwidth of a copy in memory.
- *peak GiB*: weights, adapter, optimizer state, copies of kept rows, maps; and what a step allocates at most
  beyond them.
"""
GPU = """**On a GPU: unmeasured**, for lack of one. The command:

    python -m tools.bench config/math.py --shape=8x512/128 --arch=llama3-8b
"""


def with_ratios(group):
    """The rows of a group, each with what the tables show."""
    rows = [{k: r[k] for k in RAW if k in r} for r in group["rows"]]
    for r in rows:  # older files hold a step's forward, backward and optimizer apart
        r["steps"] = np.array(r["times_ms"]).reshape(len(r["times_ms"]), -1).sum(1)
    by_name = {r["row"]: r for r in rows}
    dense, hf = by_name.get("dense LoRA"), by_name.get("HF + PEFT")
    for r in rows:
        low, ms, high = np.quantile(r["steps"], (.25, .5, .75))
        r.update(total_ms=ms, low_ms=low, high_ms=high, tokens_s=r["tokens"] / ms * 1e3,
                 mfu=r["flops"] / ms * 1e3 / group["gemm_flops"])
        if "roofline_ms" in r:
            r["of_roofline"] = r["roofline_ms"] / ms
        if dense:
            r["over_dense"] = np.median(dense["steps"] / r["steps"])
            r["flop_ratio"] = dense["flops"] / r["flops"]
        if dense and not r["row"].startswith("HF"):
            r["share"] = r["over_dense"] / r["flop_ratio"]
        if hf:
            r["over_hf"] = np.median(hf["steps"] / r["steps"])
            r["over_hf_sums"] = hf["steps"].sum() / r["steps"].sum()
        without = by_name.get(r["row"].removesuffix(" + map"), r)
        if without is not r:  # round by round: both meet the same load, so that a per cent shows
            r["map_time"] = np.quantile(r["steps"] / without["steps"], (.25, .5, .75))
            r["map_flops"] = r["flops"] / without["flops"]
        plain = by_name.get(r["row"].removesuffix(" + 4 bits"), r)
        if plain is not r:
            r["packed_time"] = np.quantile(r["steps"] / plain["steps"], (.25, .5, .75))
    return rows


def notes(rows):
    """What is said below a table, a line each."""
    for r in rows:
        if "map_time" in r:
            low, time, high = r["map_time"]
            beyond = time / r["map_flops"] - 1
            yield (f"- {r['row']}: {time:.3f}x the time without the map (median of the rounds' ratios, "
                   f"quartiles {low:.3f}-{high:.3f}), {r['map_flops']:.3f}x the FLOPs: {beyond:+.1%} beyond")
        if "packed_time" in r:
            low, time, high = r["packed_time"]
            share = 2 * r["unpack_ms"] / r["total_ms"]
            yield (f"- {r['row']}: {time:.3f}x the time without 4 bits (quartiles {low:.3f}-{high:.3f}); unpacking all "
                   f"weights takes {r['unpack_ms']:.0f} ms, twice a step: {share:.1%} of it")
        if r["row"].endswith("svd") and "predictor_ms" in r:
            share = r["predictor_ms"] / r["total_ms"]
            yield f"- {r['row']}: choosing channels takes {r['predictor_ms']:.2f} ms, {share:.1%} of the step"


# ---- tables ------------------------------------------------------------------------------------------------

STEPS = {"ms a step (quartiles)": "{total_ms:,.0f} ({low_ms:,.0f}-{high_ms:,.0f})",
         "over dense LoRA": "{over_dense:.2f}x", "FLOP ratio": "{flop_ratio:.2f}x",
         "share that arrives": "{share:.0%}", "over HF + PEFT": "{over_hf:.2f}x",
         "by sums": "{over_hf_sums:.2f}x", "tokens/s": "{tokens_s:,.0f}", "MFU": "{mfu:.0%}",
         "of the roofline": "{of_roofline:.0%}", "peak GiB": "{peak_gib:.2f}"}
PRODUCTS = {"product": "{product}", "ratio": "{ratio}", "rows": "{T}", "C": "{C}", "ours, ms": "{ours:.3f}",
            "copied before": "{copied:.3f}", "index_select + library": "{library:.3f}",
            "dense": "{dense:.3f}", "share that arrives": "{share:.0%}"}


def table(corner, key, columns, rows, missing):
    """Lines of Markdown whose columns line up on a terminal too."""
    cells = [[corner, *columns]]
    cells += [[r[key], *(shown(form, r) for form in columns.values())] for r in rows]
    cells += [[row, why, *[""] * (len(columns) - 1)] for row, why in missing.items()]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * w for w in widths])
    return ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in cells]


def shown(form, r):
    """- for a number that needs another row, where that one could not run."""
    try:
        return form.format(**r)
    except KeyError:
        return "-"


def section(out):
    """Markdown of one run."""
    run = f"{out['arch']} {out['shape']}, {out['lora']}, {out['dtype']}"
    machine = f"{out.get('cpu', out['device'])}, {out['threads']} threads"
    lines = [f"**{run}, {machine}**, {out['steps']} rounds, commit {out['commit']}:", "",
             f"    {out['command'].strip()}", ""]
    for key, name in GROUPS.items():
        if key in out:
            rows = with_ratios(out[key])
            lines += [*table(name, "row", STEPS, rows, out[key].get("missing", {})), ""]
            lines += [f"- GEMM: {out[key]['gemm_flops'] / 1e12:.3f} TFLOP/s", *notes(rows), ""]
    if "products" in out:
        rows = [dict(r, share=r["dense"] / r["ours"] * r["C"] / r["N"]) for r in out["products"]]
        lines += [*table("weight", "weight", PRODUCTS, rows, {}), ""]
    return "\n".join(lines)


def report(runs):
    """Markdown of all stored runs. What no run has measured is named so, with its command."""
    parts = [TOP, *map(section, runs)]
    if all(out["device"] == "cpu" for out in runs):
        parts.append(GPU)
    return "\n".join(parts)


def write(folder=ROOT / "results" / "bench", path=ROOT / "results" / "bench.md"):
    """Writes report() of all runs in a folder. UserError: nothing measured."""
    runs = [read_json(p) for p in sorted(folder.glob("*.json"))]
    if not runs:
        raise UserError(f"{folder} holds no measurement yet: "
                        "run python -m tools.bench config/bench_cpu.py first")
    write_text(path, report(runs))
    print(f"{path}: {len(runs)} runs")
