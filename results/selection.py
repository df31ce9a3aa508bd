"""What a selection of channels is worth before any training: how far sparsity moves the loss, and how far it turns the
gradient. The central figure.

    python -m results.selection config/smollm2.py --model=DIR --name=smollm2 --lora_r=8 --dtype=bfloat16

    --name=smollm2         of this model and task in the tables; without it they are only written anew
    --kinds=measured,svd   predictors; with --ratios=.5,.75,.9,.97,.99 and --ranks=0,16,64,256. alone: measured, but each
                           map fitted as if no other part were sparse; measured:LO-HI: and no queries in these blocks;
                           backward: the ratios are backward_sparsity's
    --blocks=LO-HI         where the MLPs are sparse; default: all inner blocks but the first
    --fit=8 --test=4       batches to measure on, and others to look at
    --option=value         everything else is train.py's

Rise: of the loss per scored token, sparse over dense, mean over the test batches. Cosine: of the gradients of all of
LoRA's B, put end to end, with the dense model's on the same batch; and the same for each block. Channels and maps come
from the other batches. Writes results/selection.json (a line a setting; what is there is not measured again),
results/selection.md and, with matplotlib, results/selection.png.
"""
import json
import re
from pathlib import Path

import torch

import config
import predictor
from lib.cli import run, split_options
from lib.files import write_text
from tools import sensitivity

HERE = Path(__file__).resolve().parent
OWN = dict(name="", kinds="measured,svd", ratios=".5,.75,.9,.97,.99", ranks="0,16,64,256", blocks="", fit=8, test=4)


# ---- measuring ---------------------------------------------------------------------------------------------

def settings(own):
    """[(kind, ratio, rank of the map or 0)]."""
    out = []
    for kind in own["kinds"].split(","):
        ranks = [0]
        if kind == "alone" or kind.startswith("measured"):
            ranks = [int(r) for r in own["ranks"].split(",")]
        if ":" in kind:
            ranks = [r for r in ranks if r]  # without queries there has to be a map
        out += [(kind, float(ratio), rank) for ratio in own["ratios"].split(",") for rank in ranks]
    return out


def by_block(model, g):
    """The gradient of all of LoRA's B -> [its part of each block]."""
    sizes = [0] * len(model.blocks)
    for name, p in model.lora_parameters().items():
        if "lora_B" in name:
            sizes[int(name.split("layers.")[1].split(".")[0])] += p.numel()
    return g.split(sizes)


def look(model, batches, dense):
    """-> {"rise", "cosine", "blocks": [cosine], "flops": share of a dense step's}, means over the batches. dense: what
    gradient() gave for each."""
    n = len(batches)
    out = dict(rise=0.0, cosine=0.0, blocks=[0.0] * len(model.blocks))
    for b, (dense_loss, dense_g) in zip(batches, dense):
        loss, g = sensitivity.gradient(model, b)
        out["rise"] += (loss - dense_loss) / b.weights.sum().item() / n
        out["cosine"] += torch.cosine_similarity(g, dense_g, 0).item() / n
        for i, (x, y) in enumerate(zip(by_block(model, g), by_block(model, dense_g))):
            out["blocks"][i] += torch.cosine_similarity(x, y, 0).item() / n
    flops = [model.flops(b) for b in batches]
    return dict(out, flops=sum(s for _, s in flops) / sum(d for d, _ in flops))


def measure_all(cfg, own, store):
    """Fills store, {"name | blocks | kind ratio rank": numbers}, and writes it after each setting."""
    cfg.predictor = "random"  # sensitivity.setup then measures nothing
    model, _, fit, test = sensitivity.setup(cfg, max(own["fit"], own["test"]))
    fit, test = fit[:own["fit"]], test[:own["test"]]
    L = len(model.blocks)
    lo, hi = (int(i) for i in (own["blocks"] or f"1-{L - 2}").split("-"))
    among = lambda first, last: [1.0 if int(first) <= i <= int(last) else 0.0 for i in range(L)]
    key = lambda kind, ratio, rank: f"{own['name']} | {lo}-{hi} | {kind} {ratio:g} {rank}"
    todo = [s for s in settings(own) if key(*s) not in store]
    predictor.set_ratios(model, {})
    dense = [sensitivity.gradient(model, b) for b in test] if todo else []
    scored = sum(b.weights.sum().item() for b in test)
    about = dict(dense=sum(loss for loss, _ in dense) / scored, rows=sum(b.n_sparse for b in fit),
                 context=sum(b.n_sparse for b in test) / sum(len(b.tokens) for b in test))
    attached = None
    for kind, ratio, rank in todo:
        if kind == "backward":
            predictor.attach(model, 0, 0, backward_sparsity=[ratio * one for one in among(lo, hi)])
        elif kind != attached:
            attached = kind
            how, _, blocks = kind.partition(":")
            if kind == "alone":
                how = "measured"
            ratios = [ratio * one for one in among(lo, hi)]
            attn = among(*blocks.split("-")) if blocks else 0.0
            predictor.attach(model, ratios, attn, cfg.predictor_rank, how, rank or 1, cfg.seed)
            if predictor.measuring(model):
                predictor.measure_more(model, fit)
        for _, p in predictor.predictors(model):
            p.map_rank = rank
            if p.is_mlp:
                p.ratio = ratio
            p.switch(True)
            if p.measures():
                p.fix()
        predictor.fit_maps(model, fit, alone=kind == "alone")
        r = store[key(kind, ratio, rank)] = dict(look(model, test, dense), **about)
        write_text(HERE / "selection.json", as_lines(store))
        print(f"{kind} {ratio:g} map {rank}: rise {r['rise']:+.4f}, cosine {r['cosine']:.3f}, "
              f"{r['flops']:.1%} of the FLOPs", flush=True)


def as_lines(store):
    return "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in store.items()) + "\n}\n"


# ---- tables and the figure ---------------------------------------------------------------------------------

def grouped(store):
    """-> {(name, blocks): {predictor: {ratio: numbers}}}."""
    groups = {}
    for key, v in store.items():
        name, blocks, setting = key.split(" | ")
        kind, ratio, rank = setting.split(" ")
        if kind == "measured" and int(rank) == 0:
            kind = "measured, no map"
        elif kind == "measured":
            kind = f"measured, map {rank}"
        elif kind.startswith("measured:"):
            kind = f"measured, map {rank}, no queries in {kind.partition(':')[2]}"
        elif kind == "backward":
            kind = "backward of few tokens"
        elif kind == "alone":
            kind = f"measured, map {rank} fitted alone"
        groups.setdefault((name, blocks), {}).setdefault(kind, {})[float(ratio)] = v
    for group, rows in groups.items():
        groups[group] = {kind: rows[kind] for kind in sorted(rows, key=place)}
    return groups


def place(kind):
    """Where a row stands in its table: ours first, the ranks in order, and each with its variants behind it."""
    found = re.search(r"map (\d+)", kind)
    rank = int(found[1]) if found else 0
    return not kind.startswith("measured"), "alone" in kind, rank, kind


def markdown(store):
    """Of each model and range of blocks a table: a row a predictor, a column a ratio."""
    lines = ["# What a selection is worth before training", "",
             "Written by results/selection.py, which says how. Each cell: rise of the loss / cosine of the gradient "
             "with the dense model's / FLOPs of a step over dense LoRA's.", ""]
    for (name, blocks), rows in grouped(store).items():
        ratios = sorted({r for row in rows.values() for r in row})
        one = next(iter(next(iter(rows.values())).values()))
        lines += [f"## {name}, MLPs of blocks {blocks}", "",
                  f"Dense loss {one['dense']:.3f}; {one['context']:.0%} of the tokens are sparse; channels and maps "
                  f"from {one['rows']:,} context rows.", "",
                  "| | " + " | ".join(f"{r:g}" for r in ratios) + " |", "|---" * (len(ratios) + 1) + "|"]
        for kind, row in rows.items():
            cells = []
            for r in ratios:
                v = row.get(r)
                cells.append(f"{v['rise']:+.3f} / {v['cosine']:.2f} / {v['flops']:.0%}" if v else "")
            lines.append(f"| {kind} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def draw(store, path):
    """Cosine against FLOPs, a panel a model and range of blocks where more than one predictor has more than one ratio,
    a line a predictor (not the maps that are fitted alone: they lie on the others'). Nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    groups = {k: rows for k, rows in grouped(store).items() if sum(len(row) > 1 for row in rows.values()) > 1}
    if not groups:
        return
    fig, axes = plt.subplots(1, len(groups), figsize=(4.4 * len(groups), 4.2), squeeze=False, sharey=True,
                             layout="constrained")
    kinds = sorted({kind for rows in groups.values() for kind in rows if "alone" not in kind}, key=place)
    lines = {}
    for i, kind in enumerate(kinds):
        for ax, rows in zip(axes[0], groups.values()):
            points = sorted((100 * v["flops"], v["cosine"]) for v in rows.get(kind, {}).values())
            lines[kind], = ax.plot([x for x, _ in points], [y for _, y in points], marker="o", ms=3, color=f"C{i}")
    for ax, (name, blocks) in zip(axes[0], groups):
        ax.set_title(f"{name}, blocks {blocks}", fontsize=9)
        ax.set_xlabel("FLOPs of a step, % of dense LoRA's")
        ax.grid(alpha=.3)
    axes[0][0].set_ylabel("cosine with the dense gradient")
    fig.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, fontsize=8)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main(argv):
    own, args = split_options(argv, __doc__, **OWN)
    path = HERE / "selection.json"
    store = json.loads(path.read_text()) if path.exists() else {}
    if own["name"]:
        measure_all(config.load(args), own, store)
    write_text(HERE / "selection.md", markdown(store))
    draw(store, HERE / "selection.png")


if __name__ == "__main__":
    run(main)
