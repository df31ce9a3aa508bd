"""Loss and answers of a model on held-out examples, both dense, and what a sparse step takes. Shared out over ranks.
"""
import statistics
import time
from itertools import islice

import torch

import data
from lib import dist
from lib.generate import at_once


@torch.no_grad()
def mean_loss(model, tokenized, cfg, stop):
    """Mean loss per scored token of these examples, dense. stop: a signals.Signals."""
    model.set_sparsity(0)
    order = sorted(range(len(tokenized)), key=lambda i: len(tokenized[i].tokens))
    total = torch.zeros(2, dtype=torch.float64, device=model.device)  # loss, weights
    for i in range(0, len(order), cfg.batch_size):
        stop.check()
        for b in dist.micro_batches(tokenized, order[i:i + cfg.batch_size], cfg, model.device):
            total += torch.stack([model.loss(b).double(), b.weights.sum().double()])
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def accuracy(model, tokenizer, examples, n, cfg, stop):
    """(share that greedy generation gets right of the first n examples with an answer, their number); (None, 0)
    without any, or where max_new_tokens = 0. A prompt of more than max_seq_len tokens is left out, as in training."""
    if not cfg.max_new_tokens:
        return None, 0
    asked = ((data.prompt_ids(e, tokenizer, cfg.prompt_format), e) for e in examples if e.answer)
    asked = list(islice(((ids, e) for ids, e in asked if len(ids) <= cfg.max_seq_len), n))
    if not asked:
        return None, 0
    if cfg.fsdp:  # all ranks generate the same, in step
        mine, rounds = asked, len(asked)
    else:
        mine, rounds = asked[dist.rank()::dist.world()], -(-len(asked) // dist.world())
    mine = sorted(mine, key=lambda a: len(a[0]))
    longest = max(len(ids) for ids, _ in asked)
    size = at_once(model, longest + cfg.max_new_tokens)
    right = 0
    for i in range(0, rounds, size):
        stop.check()
        some = mine[i:i + size]
        outs = model.generate([ids for ids, _ in some], cfg.max_new_tokens, stop=tokenizer.stop)
        right += sum(data.is_correct(tokenizer.decode(out), e.answer) for (_, e), out in zip(some, outs))
    if not cfg.fsdp:
        right, = dist.add(right)
    return right / len(asked), len(asked)


def time_ratio(model, batches, stop):
    """Seconds of forward and backward, sparse over dense, median over the same batches in turn. batches: an iterable of
    lists of data.Batch. Adds to the gradients."""
    ratios = []
    for k, micro in enumerate(batches):
        stop.check()
        seconds = {}
        for sparse in ((0, 1) if k % 2 else (1, 0)):
            model.set_sparsity(sparse)
            synchronize(model.device)
            start = time.perf_counter()
            for b in micro:
                model.loss(b).backward()
            synchronize(model.device)
            seconds[sparse] = time.perf_counter() - start
        ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios[1:] or ratios)  # the first warms up


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
