"""Do the important channels stay the same, from batch to batch and from task to task? It decides when
measured channels are safe.

    python -m results.overlap config/smollm2.py --model=DIR --name=smollm2 \
--data=gsm8k:data/gsm8k/train.jsonl,\
openbookqa:data/commonsense/train.jsonl,boolq:data/commonsense/test_boolq.jsonl,code:data/code/test.jsonl

    --data=NAME:FILE,...   prepared JSON lines; two or more tasks
    --batches=4            batches of each task that are measured, and as many others of it to test on
    --ratio=               sparsity; several with commas between
    --option=value         everything else is train.py's; its predictor is "measured" here, MLP and attention
                           one at a time

Of a set measured on one task (rows), on other batches of a task (columns): the share of that task's own best
channels in it, and the rise in that task's loss when all blocks but the first and the last run sparse with
it. The diagonal is the task itself.
"""
import json
from dataclasses import replace
from pathlib import Path

import torch

import config
import predictor
from config import UserError
from results.predictor_quality import load, recall
from lib.cli import run, split_options
from lib.files import write_text
from tools.sensitivity import calibration

OWN = dict(data="", batches=4, ratio=".5,.9", name="tiny")
HERE = Path(__file__).resolve().parent


def tasks(text):
    pairs = [item.partition(":") for item in text.split(",") if item]
    if len(pairs) < 2 or not all(p[2] for p in pairs):
        raise UserError(f"--data={text} has to name two tasks or more: "
                        "--data=gsm8k:data/gsm8k/train.jsonl,boolq:...")
    return {name: path for name, _, path in pairs}


def energies_of(model, batches):
    """{part: true energies (N,)} summed over the batches."""
    for e in predictor.energies(model).values():
        e.zero_()
    predictor.measure(model, batches)
    return {k: e.clone() for k, e in predictor.energies(model).items()}


def fix(model, energies):
    """Channels from these energies, and sparsity on."""
    for name, p in predictor.predictors(model):
        p.energies.copy_(energies[name])
        p.fresh = True
    model.set_sparsity(1)


def overlap(model, a, b):
    """Mean over the parts: the share of the best channels by energies b that are among the best by a."""
    shares = [recall(p.keep(p.part, a[name], p.c), p.keep(p.part, b[name], p.c))
              for name, p in predictor.predictors(model)]
    return sum(shares) / len(shares)


@torch.no_grad()
def loss(model, batches):
    return sum(model.loss(b).item() for b in batches) / sum(b.weights.sum().item() for b in batches)


def study(model, first, second):
    """first, second: {task: batches}. -> {"batch to batch": {task: share}, "overlap": {row: {column: share}},
    "rise": the same}."""
    model.eval()
    model.set_sparsity(0)
    dense = {t: loss(model, b) for t, b in second.items()}
    ea, eb = ({t: energies_of(model, b) for t, b in some.items()} for some in (first, second))
    single = {t: [energies_of(model, [b]) for b in batches[:4]] for t, batches in first.items()}
    out = dict(dense=dense, overlap={}, rise={})
    model.eval()
    for t in first:
        fix(model, ea[t])
        out["overlap"][t] = {u: overlap(model, ea[t], eb[u]) for u in second}
        out["rise"][t] = {u: loss(model, second[u]) - dense[u] for u in second}
    pairs = {t: [overlap(model, x, y) for i, x in enumerate(e) for j, y in enumerate(e) if i != j]
             for t, e in single.items()}
    out["batch to batch"] = {t: sum(p) / len(p) if p else None for t, p in pairs.items()}
    return out


def markdown(everything):
    lines = ["# Do the important channels stay the same?", "",
             "Made by results/overlap.py. Rows: the task that the channels were measured on; columns: "
             "other batches of the task they are used on. Each cell: share of that task's own best channels "
             "among them / rise in its loss with all blocks but the first and the last sparse.", ""]
    for name, studies in everything.items():
        for what, s in studies.items():
            names = list(s["overlap"])
            lines += [f"## {name}, {what}", "", "| measured on | "
                      + " | ".join(f"{t} ({s['dense'][t]:.3f})" for t in names) + " | one batch to another |",
                      "|---" * (len(names) + 2) + "|"]
            for t in names:
                cells = [f"{s['overlap'][t][u]:.2f} / {s['rise'][t][u]:+.3f}" for u in names]
                single = s["batch to batch"][t]
                lines.append(f"| {t} | " + " | ".join(cells)
                             + f" | {'' if single is None else format(single, '.2f')} |")
            lines.append("")
    return "\n".join(lines)


def main(argv):
    own, args = split_options(argv, __doc__, **OWN)
    files, n = tasks(own["data"]), own["batches"]
    cfg = config.load(args)
    model, tokenizer, device = load(cfg)
    batches = {t: calibration(replace(cfg, dataset=path, val_dataset="", val_fraction=0.0), tokenizer, 2 * n,
                              device) for t, path in files.items()}
    L, studies = len(model.blocks), {}
    inner = [0 < i < L - 1 for i in range(L)]
    for ratio in map(float, own["ratio"].split(",")):
        for kind in ("mlp",) if model.config.qk_norm else ("mlp", "attn"):
            ratios = [ratio * on for on in inner]
            predictor.attach(model, ratios if kind == "mlp" else 0.0, ratios if kind == "attn" else 0.0,
                             kind="measured")
            studies[f"{kind} {ratio:g}"] = study(model, {t: b[:n] for t, b in batches.items()},
                                                 {t: b[n:] for t, b in batches.items()})
            print(markdown({own["name"]: {f"{kind} {ratio:g}": studies[f"{kind} {ratio:g}"]}})
                  .split("\n", 4)[4], flush=True)
    path = HERE / "overlap.json"
    everything = json.loads(path.read_text()) if path.exists() else {}
    everything[own["name"]] = studies
    write_text(path, json.dumps(everything, indent=1) + "\n")
    write_text(path.with_suffix(".md"), markdown(everything))


if __name__ == "__main__":
    run(main)
