"""What a run looks at between its steps: loss and answers, both dense; what the selected channels are worth;
what a step takes. `run` is described at train.main.
"""
import statistics
import time
from itertools import islice

import torch

import data
import predictor
from lib import dist
from lib.generate import at_once
from lib.log import record, say


def make_batches(run, split, idx, seed=0):
    """The micro-batches of these examples that are this rank's, on the device. seed: of split = "random"."""
    cfg, share = run.cfg, idx[dist.rank()::dist.world()]
    size = min(cfg.micro_batch_size or cfg.batch_size, -(-cfg.batch_size // dist.world()))
    micro = [data.collate([run.tokenized[split][j] for j in share[i:i + size]], cfg.split,
                          seed=seed + i).to(run.device)
             for i in range(0, len(share), size)]
    return (dist.even(micro, -(-len(idx) // dist.world()), size,
                      lambda: data.collate([run.tokenized[split][idx[0]]]).to(run.device))
            if cfg.fsdp else micro)


class Interrupted(Exception):
    """A signal came: between two steps, or in the middle of an evaluation."""


def look(run):
    if dist.add(len(run.stop))[0]:
        raise Interrupted


@torch.no_grad()
def mean_loss(run, split, n):
    """Mean loss per scored token of the split's first n examples, dense."""
    run.model.eval()
    run.model.set_sparsity(0)
    tokenized = run.tokenized[split][:n]
    order = sorted(range(len(tokenized)), key=lambda i: len(tokenized[i].tokens))
    total = torch.zeros(2, dtype=torch.float64, device=run.device)
    for i in range(0, len(order), run.cfg.batch_size):
        look(run)
        for b in make_batches(run, split, order[i:i + run.cfg.batch_size]):
            total += torch.stack([run.model.loss(b).double(), b.weights.sum().double()])
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def accuracy(run, split, n):
    """(share that greedy generation gets right of the split's first n examples with an answer, their number);
    (None, 0) without any. A prompt of more than max_seq_len tokens is left out, as in training."""
    run.model.eval()
    asked = ((data.prompt_ids(e, run.tokenizer, run.cfg.prompt_format), e)
             for e in run.examples[split] if e.answer)
    asked = list(islice(((ids, e) for ids, e in asked if len(ids) <= run.cfg.max_seq_len), n))
    # FSDP: all ranks generate the same, in step
    mine = sorted(asked if run.cfg.fsdp else asked[dist.rank()::dist.world()], key=lambda a: len(a[0]))
    longest = max((len(ids) for ids, _ in asked), default=0)
    size, right = at_once(run.model, longest + run.cfg.max_new_tokens), 0
    for i in range(0, len(mine) if run.cfg.fsdp else -(-len(asked) // dist.world()), size):
        look(run)
        some = mine[i:i + size]
        outs = run.model.generate([ids for ids, _ in some], run.cfg.max_new_tokens, stop=run.tokenizer.stop)
        right += sum(data.is_correct(run.tokenizer.decode(o), e.answer) for (_, e), o in zip(some, outs))
    total = (torch.tensor([right, len(mine)], dtype=torch.float64, device=run.device)
             / (dist.world() if run.cfg.fsdp else 1))
    dist.all_reduce(total)
    right, n = total.tolist()
    return (right / n, int(n)) if n else (None, 0)


def selection(run, scale):
    """Prints, and returns, what share of the true energy the kept channels hold on one validation batch, and
    how far sparsity moves its loss: a selection that fails shows here."""
    if not predictor.predictors(run.model):
        return {}
    sum_energies(run)
    run.model.eval()
    rng = run.model.selection_rng.get_state()  # looking must not change the training
    batch = data.collate(run.tokenized["val"][:run.cfg.micro_batch_size or run.cfg.batch_size],
                         run.cfg.split).to(run.device)
    total = batch.weights.sum().item()
    with torch.no_grad():
        run.model.set_sparsity(0)
        dense = run.model.loss(batch).item() / total
        run.model.set_sparsity(scale)
        sparse, held = run.model.loss(batch).item() / total, predictor.energy_held(run.model, batch)
    for kind in ("attn", "mlp"):
        shares = [f"{k.split('.')[0]}:{v:.2f}" for k, v in held.items() if k.endswith(kind)]
        if shares:
            say(f"  true energy held by the kept {kind} channels, by block: " + " ".join(shares))
    run.model.selection_rng.set_state(rng)
    say(f"  one validation batch: loss {dense:.4f} dense, {sparse:.4f} sparse ({sparse - dense:+.4f})")
    return dict(held=held, dense_loss=dense, sparse_loss=sparse)


def sum_energies(run):
    """`measured`: adds up what the ranks have measured since channels were last fixed, so that all keep the
    same from now on."""
    for _, p in predictor.predictors(run.model):
        if run.unsummed and p.energies is not None:
            dist.all_reduce(p.energies)
            p.fresh = bool(p.energies.any())  # no context so far: nothing was measured
    run.unsummed = False


def time_ratio(run, batches):
    """Seconds of forward and backward, sparse over dense, median over the same batches in turn. batches:
    lists of example numbers."""
    run.model.eval()
    sum_energies(run)  # of a run that ended dense, and was resumed here
    ratios = []
    for k, idx in enumerate(batches):
        look(run)
        micro, seconds = make_batches(run, "train", idx), {}
        for scale in ((0, 1) if k % 2 else (1, 0)):
            run.model.set_sparsity(scale)
            synchronize(run.device)
            t = time.perf_counter()
            for b in micro:
                run.model.loss(b).backward()
            synchronize(run.device)
            seconds[scale] = time.perf_counter() - t
        ratios.append(seconds[1] / seconds[0])
    run.grad.zero_()
    return statistics.median(ratios[1:] or ratios)  # the first warms up


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def evaluate(run, log, scale):
    """Validation loss and answers, dense, and what the selection is worth at this scale (0:
    nothing to select)."""
    n, info = run.cfg.eval_examples, run.info
    loss = mean_loss(run, "val", n)
    right, answered = accuracy(run, "val", n)
    say(f"step {info['step']}: validation loss {loss:.4f}"
        + (f", {right:.1%} of {answered} answers right" if answered else ""))
    seen = selection(run, scale) if scale else {}
    record(log, dict(step=info["step"], val_loss=loss, val_accuracy=right, **seen))
    return dict(val_loss=loss, val_accuracy=right, **seen)
