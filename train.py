"""SparseLoRA fine-tuning. The one training loop: load, dense warm-up, sparse, evaluate, save.

    python train.py                                  the embedded default on a CPU, about three minutes
    python train.py config/math.py                   LLaMA-3-8B on a GPU
    python train.py config/math.py --model=DIR --batch_size=4 --resume=True
    python train.py -h                               every option with its default

A step: micro-batches forward and backward (the loss is a sum, not a mean), the flat LoRA gradient divided by
the sum of the loss weights of all of them (so that accumulation equals the big batch), clipped, AdamW. The
host never waits for the device between the first forward and the optimizer's step: metrics are read when the
next step has been launched.
"""
import json
import math
import os
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch

import config
import data
import data.tokenizer
import predictor
from config import UserError
from data import checks
from lib import dist, state
from lib.cli import tolerant_output
from lib.evaluate import accuracy, mean_loss, time_ratio
from lib.files import resolve, set_end_token, write_text
from lib.log import Log, clock, finite, say
from lib.signals import Interrupted, Signals
from model import LLaMA, ModelConfig, load_adapter

TIMED_STEPS = 11  # that are timed at the end of a run, sparse and dense in turn


@dataclass
class Run:
    """One run: what it was asked for, what it loaded, how far it is."""
    cfg: config.Config
    device: torch.device
    out: Path  # where it writes: the adapter, metrics.jsonl, state/
    folder: Path  # of the base model
    tokenizer: object
    examples: dict  # {"train", "val" and, where it is asked for, "test": [data.Example]}
    tokenized: dict  # the same of data.Tokenized
    order: Callable  # step -> [int], the numbers of its training examples
    model: LLaMA
    optimizer: torch.optim.Optimizer
    flat: torch.Tensor  # (n,) all trained weights
    grad: torch.Tensor  # (n + 2,) their gradients, the loss, and the sum of its weights
    max_steps: int  # of the schedules
    info: dict  # counters, saved with the state (new_info)
    fingerprints: dict  # of model and training data: what a state has to agree with
    stop: Signals
    log: Log = None


# ---- the loop ----------------------------------------------------------------------------------------------

def loop(run):
    """From the step of run.info to the last. Raises Interrupted between steps when a signal came."""
    cfg, model, info, log = run.cfg, run.model, run.info, run.log
    while info["step"] < last_step(run):
        step = info["step"]

        # Now and then the validation loss is taken, on the dense model.
        if evaluation_due(run):
            log.flush()
            evaluate(run)
            info["evaluated"] = step

        # This rank's micro-batches of the step's examples.
        batches = batches_of(run, step)

        # Dense at first, then sparse. At the switch the channels that dense steps have measured are fixed.
        sparse = is_sparse(run, step)
        if sparse and not info["sparse"]:
            log.flush()
            start_sparse(run)
        info["sparse"] = sparse
        model.set_sparsity(sparse)

        # Forward, backward, update. A dense step before the switch measures which channels matter.
        log.begin()
        measure = not sparse and predictor.measuring(model)
        forward_backward(model, run.grad, batches, measure)
        lr = learning_rate(cfg, step, run.max_steps)
        metrics = update(run.optimizer, run.grad, lr, cfg.grad_clip)

        # Its line is printed one step later: then the device need not wait for the host.
        work = count_work(model, batches)
        log.step(metrics, run.order(step), step=step, lr=lr, sparse=sparse, **work)
        for name, n in work.items():
            info[name] += n
        info["step"] += 1

        # A signal ends the run here, on all ranks; else it may be time to save.
        run.stop.check()
        if cfg.save_interval and info["step"] % cfg.save_interval == 0:
            log.flush()
            save(run)
    log.flush()


def batches_of(run, step):
    """This rank's micro-batches of the examples of a step, [data.Batch]."""
    cfg = run.cfg
    return dist.micro_batches(run.tokenized["train"], run.order(step), cfg, run.device, seed=step * cfg.batch_size)


def forward_backward(model, grad, batches, measure=False):
    """Adds the gradient of these micro-batches to grad (n + 2,), and their loss and the sum of its weights to its last
    two places. measure: the predictors see which channels matter."""
    for b in batches:
        loss = model.loss(b, measure=measure)  # a weighted sum: update() divides by the sum of weights
        loss.backward()  # adds to each p.grad, which is a view of grad: flatten()
        grad[-2:] += torch.stack([loss.detach(), b.weights.sum()])


def update(optimizer, grad, lr, grad_clip):
    """One optimizer step from the summed gradients (n + 2,), which are zero after it. Returns (3,) on the device:
    loss, gradient norm, steps skipped in a row. A loss or gradient that is not finite skips the step: with
    found_inf = 1 the fused AdamW leaves all as it is, and the host need not know."""
    dist.all_reduce(grad)
    g, (loss, weights) = grad[:-2], grad[-2:].clone()
    g /= weights
    norm = torch.linalg.vector_norm(g)
    if grad_clip:
        g *= (grad_clip / (norm + 1e-6)).clamp(max=1)
    bad = 1 - (torch.isfinite(norm) & torch.isfinite(loss)).float()
    optimizer.grad_scale = None  # both are read by the fused AdamW
    optimizer.found_inf = bad
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.skipped = (optimizer.skipped + 1) * bad
    grad.zero_()
    return torch.stack([loss / weights, norm, optimizer.skipped])


def count_work(model, batches):
    """{"tokens", "dense_flops", "flops"} of a step, over all ranks: what a dense step would compute, and what this one
    does."""
    tokens = dense = flops = 0
    for b in batches:
        dense_step, this_step = model.flops(b)
        tokens += len(b.tokens)
        dense += dense_step
        flops += this_step
    tokens, dense, flops = dist.add(tokens, dense, flops)
    return {"tokens": tokens, "dense_flops": dense, "flops": flops}


def learning_rate(cfg, step, max_steps):
    """Linear warm-up, constant until decay_start, then a cosine, or a line, down to 0."""
    warmup = cfg.warmup_steps
    if isinstance(warmup, float):  # a fraction of the training
        warmup = round(warmup * max_steps)
    if step < warmup:
        return cfg.learning_rate * (step + 1) / (warmup + 1)
    first = max(warmup, cfg.decay_start * max_steps)
    f = max(0, step - first) / max(1, max_steps - first)
    if cfg.lr_schedule == "linear":
        return cfg.learning_rate * (1 - f)
    return cfg.learning_rate * (0.5 + 0.5 * math.cos(math.pi * f))


def is_sparse(run, step):
    """The schedule: dense before sparse_start and from sparse_end on, sparse between; dense where no part has a
    ratio."""
    if not run.model.can_be_sparse():
        return False
    return in_sparse_part(run.cfg, step, run.max_steps)


def in_sparse_part(cfg, step, max_steps):
    return cfg.sparse_start <= step / max_steps < cfg.sparse_end


def last_step(run):
    """Where the run ends: after max_steps, or, resumed with a smaller one, there; schedules stay as they were."""
    return min(run.max_steps, run.cfg.max_steps or run.max_steps)


def evaluation_due(run):
    """At every eval_interval-th step, but for the last, which finish() evaluates; and after a resume, if it
    was not done before."""
    step, every = run.info["step"], run.cfg.eval_interval
    return every and 0 < step < last_step(run) and step % every == 0 and run.info["evaluated"] != step


# ---- dense to sparse ---------------------------------------------------------------------------------------

ROWS_PER_WIDTH = 4  # at least so many context rows are measured for each of the model's D numbers
MAX_EXTRA = 64  # dense passes beside the steps


def start_sparse(run):
    """The switch. What dense steps have measured fixes the channels and the maps; where they were too few, batches that
    come next are measured first. All of it counts in the run's seconds and FLOPs."""
    model, info = run.model, run.info
    say(f"sparse from step {info['step']} on")
    if predictor.measuring(model):
        rows = measure_enough(run)
        start = time.perf_counter()
        predictor.fix(model)
        chosen = f"channels chosen on {rows:,} context rows"
        if any(p.rank_of_map() for _, p in predictor.predictors(model)):
            fitted_on = fit_on_measured(run)
            chosen += f", maps of rank {run.cfg.map_rank} fitted on {fitted_on:,}"
        info["seconds"] += time.perf_counter() - start
        say(f"  {chosen}")
    run.log.record(dict(step=info["step"], **selection(run)))


def measure_enough(run):
    """Extra dense passes, without an update, until the predictors have seen enough rows; MAX_EXTRA at most. Returns how
    many rows they have seen, over all ranks. The passes are not made again by a run that goes on from a state saved
    between them."""
    model, info = run.model, run.info
    wanted = ROWS_PER_WIDTH * model.config.hidden_size
    while True:
        rows, = dist.add(predictor.rows_measured(model))
        if rows >= wanted or info["extra"] == MAX_EXTRA:
            return rows
        run.stop.check()
        start = time.perf_counter()
        batches = batches_of(run, info["step"] + info["extra"])
        predictor.measure_more(model, batches)
        info["flops"] += count_work(model, batches)["flops"]
        info["seconds"] += time.perf_counter() - start
        info["extra"] += 1


def fit_on_measured(run):
    """Fits the maps on examples that were measured: on twice as many rows as have to be, or on all. Returns on how
    many, over all ranks."""
    model, info = run.model, run.info
    wanted = 2 * ROWS_PER_WIDTH * model.config.hidden_size
    batches = []
    rows = step = 0
    while rows < wanted and step < info["step"] + info["extra"]:
        more = batches_of(run, step)
        rows += dist.add(sum(b.n_sparse for b in more))[0]
        # about two forward passes, as many FLOPs as a dense step has on frozen weights
        info["flops"] += count_work(model, more)["dense_flops"]
        batches += more
        step += 1
    predictor.fit_maps(model, batches)
    return rows


@torch.no_grad()
def selection(run):
    """Prints, and returns, what the kept channels are worth on one validation batch: the share of the true energy that
    they hold, how much of the MLPs' outputs is missing, and how far sparsity moves the loss; with a backward_sparsity,
    the share of the gradient that is kept. A selection that fails shows here. Leaves sparsity fully on."""
    model, cfg = run.model, run.cfg
    if not model.can_be_sparse():
        return {}
    rng = model.selection_rng.get_state()  # looking must not change the training, and the random kinds draw
    some = run.tokenized["val"][:cfg.micro_batch_size or cfg.batch_size]
    batch = data.collate(some, cfg.split, 0, cfg.dense_first).to(run.device)
    model.set_sparsity(1)
    loud = predictor.watch_backward(model, batch)
    if loud:
        shares = "".join(f" {block}:{share:.2f}" for block, share in loud.items())
        say(f"  gradient energy of the context tokens that have a backward, by block:{shares}")
    if not predictor.predictors(model):
        return dict(held={}, loud=loud)
    total = batch.weights.sum().item()
    model.set_sparsity(0)
    dense_loss = model.loss(batch).item() / total
    model.set_sparsity(1)
    sparse_loss = model.loss(batch).item() / total
    seen = predictor.watch(model, batch)
    model.selection_rng.set_state(rng)
    for kind in ("attn", "mlp"):
        shares = ""
        for name, v in seen.items():
            block, part = name.split(".")
            if part == kind:
                shares += f" {block}:{v['held']:.2f}"
        if shares:
            say(f"  true energy held by the kept {kind} channels, by block:{shares}")
    mlps = [v for v in seen.values() if "residual" in v]
    if mlps:
        missing = sum(v["residual"] for v in mlps) / len(mlps)
        without_map = sum(v["without_map"] for v in mlps) / len(mlps)
        say(f"  missing of the MLPs' output energy on one validation batch: {missing:.2f} "
            f"({without_map:.2f} without the map)")
    for name, v in seen.items():
        if v.get("loudest", 0) > 1000:
            say(f"  {name}: one context row's output has {v['loudest']:,.0f} times the median energy, as attention "
                f"sinks do: a larger dense_first (now {cfg.dense_first}) may keep such rows out")
    what = "its loss" if mlps else "loss on one validation batch"
    say(f"  {what}: {dense_loss:.4f} dense, {sparse_loss:.4f} sparse ({sparse_loss - dense_loss:+.4f})")
    held = {name: v["held"] for name, v in seen.items()}
    return dict(held=held, loud=loud, dense_loss=dense_loss, sparse_loss=sparse_loss)


# ---- the beginning -----------------------------------------------------------------------------------------

def prepare(cfg, device, stop):
    """Loads everything -> Run. Nothing is written here, so that a run that cannot be leaves what was there."""
    torch.manual_seed(cfg.seed)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    folder = resolve(cfg.model)
    tokenizer = data.tokenizer.load(folder)
    examples, tokenized = load_data(cfg, tokenizer)
    model = load_model(cfg, folder, device, tokenizer)
    flat, grad, n_matrix = flatten([p for p in model.parameters() if p.requires_grad])
    dist.broadcast(flat)
    optimizer = make_optimizer(cfg, flat, grad, n_matrix)

    lengths = [len(t.tokens) for t in tokenized["train"]]

    @lru_cache(1)
    def epoch(n):
        return data.batches(lengths, cfg.batch_size, cfg.seed, n, cfg.length_window)

    per_epoch = len(epoch(0))

    def order(step):
        return epoch(step // per_epoch)[step % per_epoch]

    max_steps = cfg.max_steps or math.ceil(cfg.epochs * per_epoch)
    return Run(
        cfg=cfg,
        device=device,
        out=Path(cfg.out_dir),
        folder=folder,
        tokenizer=tokenizer,
        examples=examples,
        tokenized=tokenized,
        order=order,
        model=model,
        optimizer=optimizer,
        flat=flat,
        grad=grad,
        max_steps=max_steps,
        info=new_info(max_steps),
        fingerprints={"model": state.fingerprint(folder, model.config), "dataset": state.digest(tokenized["train"])},
        stop=stop)


def new_info(max_steps):
    return dict(
        step=0,  # how many steps are made
        extra=0,  # dense passes that measure_enough has made
        max_steps=max_steps,
        sparse=False,  # whether the last step was
        evaluated=0,  # the step of the last validation
        skipped=0,  # steps whose gradient was not finite
        seconds=0.0,
        tokens=0,
        flops=0,
        dense_flops=0,  # what dense LoRA would have computed
        before=None,  # accuracy before the training
        best=None,  # the least validation loss
        first_loss=None,
        finished=False)


def load_data(cfg, tokenizer):
    """-> (examples, tokenized), each {"train", "val", "test": list}; prints their statistics and one example, scored
    part marked."""
    splits = ["train", "val"]
    if cfg.test_examples:
        splits.append("test")
    skipped = None  # rows that cannot be used are errors, or are collected here
    if cfg.skip_bad_rows:
        skipped = []
    loaded = data.load_splits(cfg, tokenizer, splits, cfg.train_on, skipped)
    examples = {split: some for split, (some, _) in loaded.items()}
    tokenized = {split: some for split, (_, some) in loaded.items()}
    for split in splits:
        if not tokenized[split]:
            continue  # a test set of questions and answers only
        trained = ()
        if split != "train":
            trained = examples["train"]
        numbers = data.statistics(examples[split], tokenized[split], cfg.prompt_weight, cfg.train_on, trained)
        say(f"{split:5s} {numbers}")
    if skipped:
        say(f"skipped {len(skipped)} bad rows, the first: {skipped[0]}")
    say("first example, [[scored]]: " + repr(data.marked(tokenized["train"][0], tokenizer)))
    return examples, tokenized


def load_model(cfg, folder, device, tokenizer):
    """The frozen base with LoRA, or with lora_r = 0 all weights trained, from random ones where the
    directory has none."""
    dtype = getattr(torch, cfg.dtype)
    if cfg.lora_r == 0 and not any(folder.glob("*.safetensors")):
        model = LLaMA(ModelConfig.from_dir(folder), dtype, device)
    elif cfg.fsdp:
        model = LLaMA.from_pretrained(folder, dtype, device, shard=dist.fsdp(device))
    else:
        model = LLaMA.from_pretrained(folder, dtype, device, base_bits=cfg.base_bits)
    c, L = model.config, len(model.blocks)
    if tokenizer.n_vocab > c.vocab_size:
        raise UserError(f"the tokenizer of {folder} has {tokenizer.n_vocab} tokens, "
                        f"the model's vocab_size is {c.vocab_size}: they belong to "
                        "different models")
    if c.sliding_window and c.sliding_window < cfg.max_seq_len:
        raise UserError(f"max_seq_len = {cfg.max_seq_len} is longer than the model's sliding window of "
                        f"{c.sliding_window}: lower it")
    mlp = config.ratios(cfg.mlp_sparsity, L, "mlp_sparsity")
    attn = config.ratios(cfg.attn_sparsity, L, "attn_sparsity")
    backward = config.ratios(cfg.backward_sparsity, L, "backward_sparsity")
    if cfg.lora_r == 0:
        model.train_all()
        mlp = attn = backward = [0.0] * L  # a weight that is trained needs all its rows
    elif cfg.init_adapter:
        load_adapter(model, cfg.init_adapter)
        say(f"goes on from {cfg.init_adapter}: rank {model.lora_r}, alpha {model.lora_alpha:g} on "
            f"{','.join(model.lora_targets)} from block {model.lora_from} on, whatever lora_r, lora_alpha, "
            "lora_targets and lora_from say")
    else:
        model.add_lora(cfg.lora_r, cfg.lora_alpha, cfg.lora_targets, first=cfg.lora_from)
    model.recompute = cfg.recompute
    predictor.attach(model, mlp, attn, cfg.predictor_rank, cfg.predictor, cfg.map_rank, cfg.seed + dist.rank(),
                     backward)
    return model


def flatten(params):
    """Makes all trained tensors views of one flat vector and their gradients of another, which has two more
    places, for the loss and the sum of its weights. So one all-reduce, one norm and one fused AdamW serve a
    step, and the state of a run is three vectors. Returns (flat (n,), grad (n + 2,), number of elements in
    matrices, which come first)."""
    params = sorted(params, key=lambda p: p.dim() < 2)
    flat = torch.cat([p.detach().flatten() for p in params])  # (n,)
    grad = flat.new_zeros(len(flat) + 2)
    i = 0
    for p in params:
        end = i + p.numel()
        p.data = flat[i:end].view_as(p)
        p.grad = grad[i:end].view_as(p)
        i = end
    n_matrix = sum(p.numel() for p in params if p.dim() >= 2)
    return flat, grad, n_matrix


def make_optimizer(cfg, flat, grad, n_matrix):
    """AdamW on the flat vector; weight decay on matrices only (norms and biases are trained with
    lora_r = 0)."""
    groups = []
    for span, decay in ((slice(0, n_matrix), cfg.weight_decay), (slice(n_matrix, len(flat)), 0.0)):
        p = torch.nn.Parameter(flat[span])
        p.grad = grad[span]
        if p.numel():
            groups.append(dict(params=[p], weight_decay=decay))
    optimizer = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, cfg.beta2), fused=True)
    optimizer.skipped = torch.zeros((), device=flat.device)  # steps skipped in a row
    return optimizer


# ---- what a state is made of, and going on from one --------------------------------------------------------

def optimizer_tensors(optimizer):
    """{name: tensor}: AdamW's own, not copies."""
    out = {"skipped": optimizer.skipped}
    for i, group in enumerate(optimizer.param_groups):
        p = group["params"][0]
        moments = optimizer.state[p]
        if not moments:  # before the first step
            moments.update(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p),
                           exp_avg_sq=torch.zeros_like(p))
        out.update({f"{k}.{i}": v.detach() for k, v in moments.items()})
    return out


def save(run):
    """Saves the adapter, and all that the run is made of: weights, moments, what was measured or chosen, generators,
    counters. Called by all ranks, written by one. False, and said so, where it could not be: the last good state
    stays."""
    tensors = {"flat": run.flat, **optimizer_tensors(run.optimizer)}
    for name, t in predictor.state(run.model).items():
        if ".sums." in name:  # each rank has measured its own share; channels and maps are the same on all
            t = dist.all_reduce(t.clone())
        tensors[name] = t
    rng = {"cpu": [torch.get_rng_state()], "select": dist.gather(run.model.selection_rng.get_state())}
    if run.device.type == "cuda":
        rng["cuda"] = [torch.cuda.get_rng_state()]
    rng = {k: [bytes(t.tolist()).hex() for t in v] for k, v in rng.items()}
    try:
        if dist.rank() == 0:
            info = {**run.info, "config": asdict(run.cfg), "prints": run.fingerprints, "rng": rng}
            state.save(run.out, tensors, info)
            if run.cfg.lora_r and run.info["step"]:
                save_adapter(run, run.out)
        return True
    except OSError as e:
        kept = "there is none yet"
        if state.numbers(run.out / "state"):
            kept = "the last good one stays"
        say(f"warning: the state after step {run.info['step']} could not be saved ({e.strerror}): {kept}, "
            "the run goes on")
        return False


def resume(run):
    """Goes on from out_dir's newest good state, where cfg.resume asks for it and there is one."""
    tensors = info = None
    if run.cfg.resume and dist.rank() == 0:
        tensors, info = state.load(run.out, {"config": asdict(run.cfg), "prints": run.fingerprints})
    info = dist.share(info)
    tensors = dist.share_tensors(tensors)
    if info is None:
        if dist.rank() == 0:
            write_text(run.out / "metrics.jsonl", "")
        return
    run.info.update({k: info[k] for k in run.info if k in info})
    run.max_steps = run.info["max_steps"]
    if run.cfg.max_steps > run.max_steps:
        raise UserError(f"max_steps = {run.max_steps} there, {run.cfg.max_steps} here: the schedules of this run end "
                        "there; go on from its adapter with --init_adapter and another --out_dir")
    for name, t in {"flat": run.flat, **optimizer_tensors(run.optimizer)}.items():
        if name not in tensors or tensors[name].shape != t.shape:
            raise UserError(f"the state in {run.out} is of a model of other sizes or other trained parts: "
                            "choose another --out_dir")
        t.copy_(tensors[name])
    predictor.load_state(run.model, tensors, first_rank=dist.rank() == 0)
    restore_generators(run, info["rng"])
    if dist.rank() == 0:
        state.cut_metrics(run.out / "metrics.jsonl", info["step"], info["evaluated"])
    say(f"resumed after step {run.info['step']} of {last_step(run)}")


def restore_generators(run, saved):
    """saved: {"cpu", "select", "cuda": hex of generator states, one or one a rank}."""
    def as_tensor(text):
        return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)

    rng = {kind: [as_tensor(text) for text in texts] for kind, texts in saved.items()}
    torch.set_rng_state(rng["cpu"][0])
    select, own = rng["select"], run.model.selection_rng
    if dist.rank() < len(select) and len(select[0]) == len(own.get_state()):
        own.set_state(select[dist.rank()])
    else:  # on more ranks than before, or on another kind of device
        own.manual_seed(run.cfg.seed + dist.rank() + 1000 * run.info["step"])
    if "cuda" in rng and run.device.type == "cuda":
        torch.cuda.set_rng_state(rng["cuda"][0])


# ---- evaluation, and the end -------------------------------------------------------------------------------

def evaluate(run):
    """validate(). Where it fails, as for want of memory, a run on one device saves the steps so far first."""
    try:
        return validate(run)
    except (UserError, RuntimeError):
        if dist.world() == 1:
            save(run)
        raise


def validate(run):
    """Validation loss and answers, dense, and what the selection is worth while the run is sparse. Keeps the adapter
    with the least validation loss in best/."""
    cfg, info = run.cfg, run.info
    some = run.tokenized["val"][:cfg.eval_examples]
    loss = mean_loss(run.model, some, cfg, run.stop)
    right, answered = accuracy(run.model, run.tokenizer, run.examples["val"], cfg.eval_examples, cfg, run.stop)
    line = f"step {info['step']}: validation loss {loss:.4f}"
    if answered:
        line += f", {right:.1%} of {answered} answers right"
    say(line)
    result = dict(val_loss=loss, val_accuracy=right)
    if info["sparse"]:
        result.update(selection(run))
    run.log.record(dict(step=info["step"], **result))
    if cfg.lora_r and (info["best"] is None or loss < info["best"]):
        info["best"] = loss
        if dist.rank() == 0:
            save_adapter(run, run.out / "best")
    return result


def finish(run):
    """The last evaluation, the adapter (or the whole checkpoint), and the summary."""
    cfg, info, out = run.cfg, run.info, run.out
    result = {k: info[k] for k in ("seconds", "tokens", "flops", "dense_flops", "before", "skipped")}
    save(run)  # a kill from here on costs the evaluation only
    if dist.rank() == 0 and cfg.lora_r == 0:
        save_checkpoint(run)
    if cfg.eval_interval:
        result.update(evaluate(run))
        info["evaluated"] = info["step"]
    if cfg.test_examples:
        result["test_loss"] = None
        if run.tokenized["test"]:
            result["test_loss"] = mean_loss(run.model, run.tokenized["test"][:cfg.test_examples], cfg, run.stop)
        result["after"], result["test_examples"] = accuracy(run.model, run.tokenizer, run.examples["test"],
                                                            cfg.test_examples, cfg, run.stop)
    if run.model.can_be_sparse() and not predictor.measuring(run.model):
        result["time_ratio"] = time_ratio(run.model, (batches_of(run, step) for step in range(TIMED_STEPS)), run.stop)
        run.grad.zero_()
    info["finished"] = True
    save(run)
    if dist.rank() == 0:
        write_text(out / "result.json", json.dumps(finite(result), indent=2) + "\n")
    say_result(run, result)
    return result


def save_adapter(run, folder):
    """In PEFT's format. A base that is a directory is named by its whole path."""
    base = run.cfg.model
    if Path(base).is_dir():
        base = run.folder.resolve()
    run.model.save_adapter(folder, base, notes(run))


def save_checkpoint(run):
    """All weights, with the tokenizer's files: a Hugging Face directory."""
    run.model.save_pretrained(run.out, notes(run))
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja",
                 "generation_config.json"):
        if (run.folder / name).exists():
            shutil.copy(run.folder / name, run.out / name)
    set_end_token(run.out, notes(run))


def notes(run):
    """What is kept with the weights: how prompts were written, what ends an answer, and that the base was packed."""
    found = data.notes(run.tokenizer, run.cfg.prompt_format, run.cfg.max_new_tokens)
    if run.cfg.base_bits == 4:
        found["base_bits"] = "4"
    return found


# ---- what a run says ---------------------------------------------------------------------------------------

def say_plan(run):
    cfg, model = run.cfg, run.model
    for key, value in config.differences(cfg).items():
        say(f"  {key} = {value!r}")
    trained = run.flat.numel()
    in_4_bits = sum(w.shape.numel() for w in model.packed())
    frozen = sum(p.numel() for p in model.parameters()) - trained + in_4_bits
    of_them = ""
    if in_4_bits:
        of_them = f" ({in_4_bits / 1e6:,.1f} M of them in 4 bits)"
    say(f"{cfg.model}: {frozen / 1e6:,.1f} M frozen{of_them} and {trained / 1e6:,.2f} M trained weights, "
        f"{run.max_steps} steps of {cfg.batch_size} examples")
    if not model.can_be_sparse():
        say("dense throughout")
        return
    model.set_sparsity(1)
    sample = data.collate(run.tokenized["train"][:cfg.batch_size], cfg.split, 0, cfg.dense_first)
    dense, sparse = model.flops(sample)
    model.set_sparsity(0)
    steps = [step for step in range(run.max_steps) if is_sparse(run, step)]
    if not steps:
        say("dense throughout: sparse_start and sparse_end leave no sparse step")
        return
    how = f" ({cfg.predictor})" if predictor.predictors(model) else ""
    say(f"dense for {steps[0]} steps, then sparse{how} until step {steps[-1] + 1}: "
        f"a sparse step computes {sparse / dense:.0%} of a dense one's {dense / 1e9:,.1f} GFLOP")


def say_warnings(run):
    """What is likely wrong with the data, the format or the base, before anything is trained."""
    cfg, model = run.cfg, run.model
    found = checks.warnings(run.examples["train"], run.tokenized["train"], run.tokenizer, cfg.prompt_format,
                            model.config.max_positions)
    if cfg.lora_r:
        found += checks.untrained(run.tokenizer, cfg.prompt_format, model.embed, model.head)
    for sentence in found:
        say(f"warning: {sentence}")


def say_result(run, r):
    say(f"\n{run.info['step']} steps in {clock(r['seconds'])}, {r['tokens']:,} tokens")
    if r.get("after") is not None:
        say(f"accuracy      before {r['before']:.1%}, after {r['after']:.1%}, "
            f"of {r['test_examples']} test problems")
    if r["flops"] < r["dense_flops"]:
        say(f"FLOPs saved   {1 - r['flops'] / r['dense_flops']:.1%} of dense LoRA's over the whole run")
        say(f"time saved    {1 - r['time_ratio']:.1%} of a dense step's forward and backward, "
            "timed in turn on the same batches")
    say(f"{product(run.cfg):14s}{run.out}")
    first, last = run.info["first_loss"], run.log.last_loss
    uniform = math.log(run.model.config.vocab_size)  # of a model that knows nothing
    if last is not None:
        learned = last <= first or last < .95 * uniform  # False for nan
        if not learned:
            say(f"warning: the loss went from {first:.2f} to {last:.2f}, and a model that knows nothing has "
                f"{uniform:.2f}: the run diverged; lower learning_rate ({run.cfg.learning_rate})")
    if run.cfg.lora_r:
        for sentence in checks.stops(run.tokenizer, run.cfg.prompt_format):
            say(f"note: {sentence}")


def product(cfg):
    """What a run makes."""
    if cfg.lora_r:
        return "adapter"
    return "checkpoint"


# ---- one run, and the command line -------------------------------------------------------------------------

def main(cfg, command="python train.py"):
    """One run, from its config to its adapter. Returns the summary that is also written to
    out_dir/result.json, a dict; None where a signal stopped the run or it was finished before. command: how
    to start this run again, for the message that says so."""
    device = dist.setup(cfg)
    lock = run = None
    if dist.rank() == 0:
        lock = state.claim(cfg.out_dir, cfg.resume)
    try:
        run = prepare(cfg, device, Signals())
        say_plan(run)
        say_warnings(run)
        if dist.rank() == 0 and lock is None:
            lock = state.lock(run.out)
        resume(run)
        if run.info["finished"]:
            say(f"{run.out} is finished: its {product(cfg)} lies there; another run needs another --out_dir")
            return None

        def texts(numbers):
            return [run.tokenizer.decode(run.tokenized["train"][i].tokens) for i in numbers]

        run.log = Log(run.out / "metrics.jsonl", run.info, cfg, last_step(run), device, texts)
        with run.stop:
            if run.info["before"] is None and cfg.test_examples and cfg.max_new_tokens:
                run.info["before"], n = accuracy(run.model, run.tokenizer, run.examples["test"], cfg.test_examples,
                                                 cfg, run.stop)
                if n:
                    say(f"before training: {run.info['before']:.1%} of {n} test problems right")
                else:
                    say("no test example has an answer")
            loop(run)
            return finish(run)
    except Interrupted:
        run.log.flush()
        kept = ""
        if not save(run):
            kept = " (which could not be saved: the last saved step counts)"
        say(f"stopped by {run.stop.name()} after step {run.info['step']} of {last_step(run)}{kept}; "
            f"go on with:\n  {command} --resume=True")
    finally:
        if lock:
            lock.close()


def cli(argv):
    """The command line. What goes wrong is one sentence, stderr's last line, and exit code 1."""
    tolerant_output()
    cfg = None
    debug = "--debug=True" in argv or "--debug=true" in argv
    try:
        cfg = config.load(argv)
        debug = cfg.debug
        others = [a for a in argv if not a.startswith("--resume=")]
        main(cfg, shlex.join([*dist.launcher().split(), "train.py", *others]))
        return dist.leave()
    except BrokenPipeError:
        os._exit(1)  # whoever read what we print has gone, as `| head` does
    except (UserError, OSError, RuntimeError, KeyboardInterrupt) as e:
        reason = explain(e, cfg)
        if reason is None:
            raise
        if debug:
            traceback.print_exc()
    sys.stdout.flush()
    print(reason, file=sys.stderr, flush=True)
    if dist.world() > 1:
        os._exit(1)  # with others in the group, do not wait for them
    sys.exit(1)


def explain(e, cfg):
    """One sentence about what a user can do something about; None for a mistake of ours, which
    deserves its traceback."""
    if isinstance(e, UserError):
        return f"error: {e}"
    rest = ""
    if cfg and state.numbers(Path(cfg.out_dir, "state")):
        rest = "; a saved state stays, go on from it with --resume=True"
    if isinstance(e, torch.OutOfMemoryError):
        return (f"error: out of memory on {cfg.device} with micro-batches of {cfg.micro_batch_size} examples "
                f"of up to {cfg.max_seq_len} tokens: lower micro_batch_size or set recompute=True{rest}")
    if isinstance(e, KeyboardInterrupt):
        return "interrupted before the training began"
    if isinstance(e, OSError):
        place = e.filename or (cfg and cfg.out_dir) or "stdout"
        return f"error: {e.strerror or e} ({place}){rest}"
    if dist.is_loss(e):
        return f"error: {dist.lost_message(e)}"
    return None


if __name__ == "__main__":
    cli(sys.argv[1:])
