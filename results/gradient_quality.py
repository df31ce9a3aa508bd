"""How near is the sparse gradient to the dense one, along a training: cosine and ratio of norms on the same
batches, per block.

    python -m results.gradient_quality config/tiny.py --every=40
    python -m results.gradient_quality config/tiny.py --every=40 --mlp_sparsity=0 --probe=.9
                                                      along a dense training

    --every=40         steps between two looks          --batches=4   validation batches that are looked at
    --kinds=svd,...    predictors that are compared
    --probe=           MLP ratio of blocks 1 to L - 2 at a look; "": the configured ratios
    --name=tiny        of this run in results/gradient_quality.json and .md
    --option=value     everything else is train.py's: the run itself goes as configured (same data order,
                       schedule and optimizer)
"""
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import torch

import config
import data
import data.tokenizer
import predictor
import train
from config import UserError
from lib.cli import run, split_options
from lib.files import resolve, write_text

OWN = dict(every=40, batches=4, kinds="oracle,measured,svd,random", probe="", name="tiny")
HERE = Path(__file__).resolve().parent


def setup(cfg):
    """What train.main makes before its loop."""
    r = SimpleNamespace(cfg=cfg, device=train.dist.setup(cfg))
    torch.manual_seed(cfg.seed)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    folder = resolve(cfg.model)
    r.tokenizer = data.tokenizer.load(folder)
    train.load_data(r)
    r.model = train.load_model(cfg, folder, r.device, r.tokenizer)
    r.flat, r.grad, matrices = train.flatten([p for p in r.model.parameters() if p.requires_grad])
    r.optimizer = train.make_optimizer(cfg, r.flat, r.grad, matrices)
    r.info, r.measured = dict(step=0, sparse=False), None
    return r


def gradients(model, batches):
    """{block number, and "all": the LoRA gradient (n,)} summed over the batches."""
    for g in model.lora_state(grads=True).values():
        g.zero_()
    for b in batches:
        model.loss(b).backward()
    state = {k: g.flatten() for k, g in model.lora_state(grads=True).items()}
    blocks = sorted({int(re.search(r"\.(\d+)\.", k)[1]) for k in state})
    out = {str(i): torch.cat([g for k, g in state.items() if f".layers.{i}." in k]) for i in blocks}
    for g in state.values():
        g.zero_()
    return {**out, "all": torch.cat(list(out.values()))}


def look(r, ratios, kinds, batches, warm):
    """{kind: {block: [cosine, ratio of norms]}}. The run's own predictors come back afterwards, with all that
    they have measured."""
    model, out = r.model, {}
    own = [(part, part.predictor) for b in model.blocks for part in (b.attn, b.mlp)]
    rng = model.selection_rng
    model.eval()
    for kind in kinds:
        predictor.attach(model, *ratios, r.cfg.predictor_rank, kind)
        if kind == "measured":  # at the first look, and kept: as a run fixes its channels
            if r.measured is None:
                predictor.measure(model, warm)
                r.measured = {name: e.clone() for name, e in predictor.energies(model).items()}
            for name, p in predictor.predictors(model):
                p.energies.copy_(r.measured[name])
                p.fresh = True
            model.eval()
        model.set_sparsity(0)
        dense = gradients(model, batches)
        model.set_sparsity(1)
        sparse = gradients(model, batches)
        out[kind] = {i: [torch.cosine_similarity(dense[i], sparse[i], 0).item(),
                         (sparse[i].norm() / dense[i].norm()).item()] for i in dense}
    for part, p in own:
        part.predictor = p
    model.selection_rng = rng
    return out


def train_and_look(r, ratios, kinds, every, n):
    """-> [{"step", "kinds": look()}]"""
    cfg, looks = r.cfg, []
    for split in ("train", "val"):
        if n * cfg.batch_size > len(r.tokenized[split]):
            raise UserError(f"--batches={n} of {cfg.batch_size} examples are more than the {split} data's "
                            f"{len(r.tokenized[split])}: lower it")
    lengths = [len(t.tokens) for t in r.tokenized["train"]]
    order = data.batches(lengths, cfg.batch_size, cfg.seed, 0, cfg.length_window)
    r.max_steps, per_epoch = cfg.max_steps or math.ceil(cfg.epochs * len(order)), len(order)
    batches = [b for i in range(n)
               for b in train.make_batches(r, "val", range(i * cfg.batch_size, (i + 1) * cfg.batch_size))]
    warm = [b for i in range(n)
            for b in train.make_batches(r, "train", range(i * cfg.batch_size, (i + 1) * cfg.batch_size))]
    for step in range(r.max_steps + 1):
        if step % every == 0 or step == r.max_steps:
            looks.append(dict(step=step, kinds=look(r, ratios, kinds, batches, warm)))
            print(f"step {step}: cosine of the whole gradient "
                  + ", ".join(f"{k} {v['all'][0]:.3f}" for k, v in looks[-1]["kinds"].items()), flush=True)
        epoch, i = divmod(step, per_epoch)
        if i == 0:
            order = data.batches(lengths, cfg.batch_size, cfg.seed, epoch, cfg.length_window)
        if step < r.max_steps:
            one_step(r, order[i])
    return looks


def one_step(r, idx):
    """train.loop's step."""
    step = r.info["step"]
    micro = train.make_batches(r, "train", idx, seed=step * r.cfg.batch_size)
    scale = train.scale_now(r)
    if scale and step == 0 and r.cfg.predictor == "measured":
        predictor.measure(r.model, micro)
    r.info = dict(step=step + 1, sparse=scale > 0)
    r.model.train()
    r.model.set_sparsity(scale)
    train.forward_backward(r, micro)
    train.update(r, train.learning_rate(r.cfg, step, r.max_steps))


def markdown(everything):
    lines = ["# Gradient quality", "",
             "Made by results/gradient_quality.py. Cosine between the sparse and the dense gradient of the "
             "LoRA weights on the same batches (in brackets: norm of the sparse one over the dense one's): "
             "the whole gradient, then by block.", ""]
    for name, looks in everything.items():
        blocks = list(next(iter(looks[0]["kinds"].values())))
        blocks = ["all"] + [b for b in blocks if b != "all"]
        lines += [f"## {name}", "", "| step | predictor | " + " | ".join(blocks) + " |",
                  "|---" * (len(blocks) + 2) + "|"]
        for look in looks:
            for kind, v in look["kinds"].items():
                lines.append(f"| {look['step']} | {kind} | "
                             + " | ".join(f"{v[b][0]:.3f} ({v[b][1]:.2f})" for b in blocks) + " |")
        lines.append("")
    return "\n".join(lines)


def main(argv):
    own, args = split_options(argv, __doc__, **OWN)
    r = setup(config.load(args))
    L, cfg = len(r.model.blocks), r.cfg
    ratios = [config.ratios(cfg.mlp_sparsity, L, "mlp_sparsity"),
              config.ratios(cfg.attn_sparsity, L, "attn_sparsity")]
    if own["probe"]:
        ratios = [[float(own["probe"]) * (0 < i < L - 1) for i in range(L)], [0.0] * L]
    looks = train_and_look(r, ratios, own["kinds"].split(","), own["every"], own["batches"])
    path = HERE / "gradient_quality.json"
    everything = json.loads(path.read_text()) if path.exists() else {}
    everything[own["name"]] = looks
    write_text(path, json.dumps(everything) + "\n")
    write_text(path.with_suffix(".md"), markdown(everything))


if __name__ == "__main__":
    run(main)
