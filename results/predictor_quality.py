"""How good is a predictor: which share of the best channels it finds, and which share of the true
energy those hold.

    python -m results.predictor_quality config/tiny.py --name=tiny
    python -m results.predictor_quality config/smollm2.py --model=DIR --name=smollm2 --batches=2

    --ranks=1,2,4,8,16,64   of the SVD         --ratios=.5,.75,.9,.97   sparsity
    --batches=4             training batches to test on, and as many others that "measured" measures on
    --name=                 of this base in results/predictor_quality.json and .md
    --option=value          everything else is train.py's (--init_adapter=out/tiny: on fine-tuned weights)

recall: the share of the oracle's channels (the most energy on this very batch) that were chosen. held: the
share of the batch's true energy that the chosen ones hold, next to the oracle's, which no choice can exceed.
Chance: both are the share of channels that is kept, on average.
"""
import json
import shlex
from dataclasses import replace
from pathlib import Path

import torch

import config
import data.tokenizer
import predictor
import train
from lib.cli import run, split_options
from lib.files import resolve, write_text
from tools.sensitivity import calibration

OWN = dict(ranks="1,2,4,8,16,64", ratios=".5,.75,.9,.97", batches=4, name="tiny")
HERE = Path(__file__).resolve().parent


def load(cfg):
    """-> (model in eval mode, tokenizer, device), with the adapter of init_adapter if there is one."""
    torch.manual_seed(cfg.seed)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    device, folder = train.dist.setup(cfg), resolve(cfg.model)
    tokenizer = data.tokenizer.load(folder)
    model = train.load_model(replace(cfg, mlp_sparsity=0.0, attn_sparsity=0.0, fsdp=False), folder, device,
                             tokenizer)
    return model.eval(), tokenizer, device


@torch.no_grad()
def inputs(model, batch):
    """{"3.mlp": x (n, D)}: what each part but the last block's sees of the sparse rows in a dense forward."""
    seen, hooks = {}, []
    model.set_sparsity(0)
    for i, block in enumerate(list(model.blocks)[:-1]):
        for kind in ("attn", "mlp"):
            def hook(_, args, name=f"{i}.{kind}"):
                seen[name] = args[0][:batch.n_sparse]
            hooks.append(getattr(block, kind).register_forward_pre_hook(hook))
    model.loss(batch)
    for h in hooks:
        h.remove()
    return seen


def keep(part, energies, ratio):
    n = part.n_kv_heads * part.head_dim if hasattr(part, "qkv") else len(part.down)
    chosen = predictor.keep_attention if hasattr(part, "qkv") else predictor.keep_mlp
    return chosen(part, energies, predictor.count(n, ratio))


def recall(kept, best):
    """Both KeepMLP or KeepAttention; for attention the mean of k's and v's recall."""
    a, b = ((k.channels[1:] if isinstance(k.channels, tuple) else [k.channels]) for k in (kept, best))
    return sum(torch.isin(y, x).double().mean().item() for x, y in zip(a, b)) / len(a)


@torch.no_grad()
def quality(model, before, batches, ranks, ratios):
    """-> [{"part", "method", "ratio", "recall", "held"}], means over the batches."""
    names = [f"{i}.{kind}" for i in range(len(model.blocks) - 1)
             for kind in (("mlp",) if model.config.qk_norm else ("attn", "mlp"))]
    parts = {name: getattr(model.blocks[int(name.split(".")[0])], name.split(".")[1]) for name in names}
    measured, sums = {}, {}
    for b in before:
        for name, x in inputs(model, b).items():
            if name in parts:
                measured[name] = measured.get(name, 0) + predictor.oracle(parts[name], x)
    for rank in ranks:
        predictor.attach(model, .5, 0.0 if model.config.qk_norm else .5, rank, "svd")
        for b in batches:
            for name, x in inputs(model, b).items():
                if name not in parts:
                    continue
                part, true = parts[name], predictor.oracle(parts[name], x)
                guesses = {f"svd {rank}": part.predictor.estimate(part, x)}
                if rank == ranks[0]:
                    guesses |= {"measured": measured[name], "oracle": true}
                for method, energies in guesses.items():
                    for ratio in ratios:
                        kept, best = keep(part, energies, ratio), keep(part, true, ratio)
                        total = sums.setdefault((name, method, ratio), [0.0, 0.0])
                        total[0] += recall(kept, best) / len(batches)
                        total[1] += predictor.share(part, kept, true).item() / len(batches)
    return [dict(part=n, method=m, ratio=r, recall=a, held=h) for (n, m, r), (a, h) in sums.items()]


def markdown(everything):
    lines = ["# Predictor quality", "",
             "Made by results/predictor_quality.py; by block in predictor_quality.json. "
             "Means over all blocks but the last (in brackets the worst block): recall of the oracle's "
             "channels / share of the true energy held. Chance is the share of channels kept, for both; "
             "that is rounded up to a multiple of 16: .125 at .9 in the embedded default's MLPs, .25 from "
             ".75 on in its attention, .17 and .08 at .9 and .97 in SmolLM2's.", ""]
    for name, entry in everything.items():
        rows = entry["rows"]
        for kind, title in (("mlp", "MLP"), ("attn", "attention")):
            some = [r for r in rows if r["part"].endswith(kind)]
            ratios = list(dict.fromkeys(r["ratio"] for r in some))
            if not some:
                continue
            lines += [f"## {name}, {title}", "", f"`{entry['command']}`", "",
                      "| | " + " | ".join(map(str, ratios)) + " |", "|---" * (len(ratios) + 1) + "|"]
            for method in sorted(dict.fromkeys(r["method"] for r in some),
                                 key=lambda m: ("measured", "oracle").count(m)):
                cells = []
                for ratio in ratios:
                    pair = []
                    for key in ("recall", "held"):
                        v = [r[key] for r in some if r["method"] == method and r["ratio"] == ratio]
                        pair.append(f"{sum(v) / len(v):.2f} ({min(v):.2f})")
                    cells.append(" / ".join(pair))
                lines.append(f"| {method} | " + " | ".join(cells) + " |")
            lines.append("")
    return "\n".join(lines)


def main(argv):
    own, args = split_options(argv, __doc__, **OWN)
    cfg = config.load(args)
    model, tokenizer, device = load(cfg)
    batches, n = calibration(cfg, tokenizer, 2 * own["batches"], device), own["batches"]
    rows = quality(model, batches[:n], batches[n:], [int(r) for r in own["ranks"].split(",")],
                   [float(r) for r in own["ratios"].split(",")])
    path = HERE / "predictor_quality.json"
    everything = json.loads(path.read_text()) if path.exists() else {}
    rows = [{k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()} for r in rows]
    everything[own["name"]] = dict(command=shlex.join(["python", "-m", "results.predictor_quality", *argv]),
                                   rows=rows)
    write_text(path, json.dumps(everything).replace("}, ", "},\n") + "\n")
    write_text(path.with_suffix(".md"), markdown(everything))
    print(markdown({own["name"]: everything[own["name"]]}))


if __name__ == "__main__":
    run(main)
