"""SparseLoRA fine-tuning. The one training loop: load, dense warm-up, sparse, evaluate, save.

    python train.py                                  the embedded default on a CPU, about two minutes
    python train.py config/math.py                   LLaMA-3-8B on a GPU
    python train.py config/math.py --model=DIR --batch_size=4 --resume=True
    python train.py -h                               every option with its default

A step: micro-batches forward and backward (the loss is a sum, not a mean), the flat LoRA gradient divided by the sum of the loss
weights of all of them (so that accumulation equals the big batch), clipped, AdamW. The host never waits for the device between the
first forward and the optimizer's step: metrics are read when the next step has been launched.
"""
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch

import config
import data
import data.tokenizer
import predictor
from config import UserError
from model import LLaMA, ModelConfig, load_adapter, resolve, write_text
from tools import dist, state

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40": 181e12, "A6000": 155e12, "4090": 165e12, "3090": 71e12}  # dense bf16


def say(*args):
    if dist.rank() == 0:
        print(*args, flush=True)


# ---- the parts of a run ----------------------------------------------------------------------------------------------------------

def load_data(run):
    """run.examples and run.tokenized: {"train", "val", "test": lists}; prints their statistics and one example, scored part marked."""
    cfg, run.examples, run.tokenized = run.cfg, {}, {}
    for split in ("train", "val", "test") if cfg.test_examples else ("train", "val"):
        run.examples[split] = examples = data.load_split(cfg, split)
        if split == "test" and not any(e.response for e in examples):  # only questions and answers
            run.tokenized[split] = []
            continue
        run.tokenized[split] = data.tokenize(examples, run.tokenizer, cfg.max_seq_len, cfg.prompt_format, cfg.prompt_weight)
        say(f"{split:5s} {data.statistics(examples, run.tokenized[split], cfg.prompt_weight)}")
    say("first example, [[scored]]: " + repr(data.marked(run.tokenized["train"][0], run.tokenizer)))


def load_model(cfg, folder, device, tokenizer):
    """The frozen base with LoRA, or with lora_r = 0 all weights trained, from random ones where the directory has none."""
    dtype = getattr(torch, cfg.dtype)
    if cfg.lora_r == 0 and not any(folder.glob("*.safetensors")):
        model = LLaMA(ModelConfig.from_dir(folder), dtype, device)
    else:
        model = LLaMA.from_pretrained(folder, dtype, device, shard=dist.fsdp(device) if cfg.fsdp else None)
    c, L = model.config, len(model.blocks)
    if tokenizer.n_vocab > c.vocab_size:
        raise UserError(f"the tokenizer of {folder} has {tokenizer.n_vocab} tokens, the model's vocab_size is {c.vocab_size}: they belong to "
                        "different models")
    if c.sliding_window and c.sliding_window < cfg.max_seq_len:
        raise UserError(f"max_seq_len = {cfg.max_seq_len} is longer than the model's sliding window of {c.sliding_window}: lower it")
    mlp, attn = config.ratios(cfg.mlp_sparsity, L, "mlp_sparsity"), config.ratios(cfg.attn_sparsity, L, "attn_sparsity")
    if cfg.lora_r == 0:
        model.train_all()
        mlp = attn = [0.0] * L  # a weight that is trained needs all its rows
    elif cfg.init_adapter:
        load_adapter(model, cfg.init_adapter)
    else:
        model.add_lora(cfg.lora_r, cfg.lora_alpha, cfg.lora_targets)
    model.recompute = cfg.recompute
    predictor.attach(model, mlp, attn, cfg.predictor_rank, cfg.predictor, seed=cfg.seed + dist.rank(), agree=dist.agree)
    return model


def flatten(params):
    """Makes all trained tensors views of one flat vector and their gradients of another, which has two more places, for the loss and
    the sum of its weights. So one all-reduce, one norm and one fused AdamW serve a step, and the state of a run is three vectors.
    Returns (flat (n,), grad (n + 2,), number of elements in matrices, which come first)."""
    params = sorted(params, key=lambda p: p.dim() < 2)
    flat = torch.cat([p.detach().flatten() for p in params])  # (n,)
    grad, i = flat.new_zeros(len(flat) + 2), 0
    for p in params:
        p.data, p.grad = (t[i:i + p.numel()].view_as(p) for t in (flat, grad))
        i += p.numel()
    return flat, grad, sum(p.numel() for p in params if p.dim() >= 2)


def make_optimizer(cfg, flat, grad, matrices):
    """AdamW on the flat vector; weight decay on matrices only (norms and biases are trained with lora_r = 0)."""
    groups = []
    for part, decay in ((slice(0, matrices), cfg.weight_decay), (slice(matrices, len(flat)), 0.0)):
        p = torch.nn.Parameter(flat[part])
        p.grad = grad[part]
        if p.numel():
            groups.append(dict(params=[p], weight_decay=decay))
    optimizer = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, cfg.beta2), fused=True)
    optimizer.skipped = torch.zeros((), device=flat.device)  # steps skipped in a row
    return optimizer


def update(run, lr):
    """One optimizer step from the summed gradients. Returns (3,) on the device: loss, gradient norm, steps skipped in a row. A loss or
    gradient that is not finite skips the step; AdamW's found_inf decides so on the device, without the host."""
    optimizer = run.optimizer
    dist.all_reduce(run.grad)
    g, (loss, weights) = run.grad[:-2], run.grad[-2:].clone()
    g /= weights
    norm = torch.linalg.vector_norm(g)
    if run.cfg.grad_clip:
        g *= (run.cfg.grad_clip / (norm + 1e-6)).clamp(max=1)
    bad = 1 - (torch.isfinite(norm) & torch.isfinite(loss)).float()
    optimizer.grad_scale, optimizer.found_inf = None, bad
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.skipped = (optimizer.skipped + 1) * bad
    run.grad.zero_()
    return torch.stack([loss / weights, norm, optimizer.skipped])


def learning_rate(cfg, step, max_steps):
    """Linear warm-up, constant until decay_start, then a cosine, or a line, down to 0."""
    warmup = cfg.warmup_steps if isinstance(cfg.warmup_steps, int) else round(cfg.warmup_steps * max_steps)
    if step < warmup:
        return cfg.learning_rate * (step + 1) / (warmup + 1)
    first = max(warmup, cfg.decay_start * max_steps)
    f = max(0, step - first) / max(1, max_steps - first)
    return cfg.learning_rate * (1 - f if cfg.lr_schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi * f))


def sparsity(cfg, step, max_steps):
    """The schedule: 0 (dense) before sparse_start and from sparse_end on; between, growing to 1 over sparse_ramp (0: at once)."""
    f = step / max_steps
    if f < cfg.sparse_start or f >= cfg.sparse_end:
        return 0.0
    return min(1.0, (f - cfg.sparse_start + 1 / max_steps) / cfg.sparse_ramp) if cfg.sparse_ramp else 1.0


def make_batches(run, split, idx, seed=0):
    """The micro-batches of these examples that are this rank's, on the device. seed: of split = "random"."""
    cfg, share = run.cfg, idx[dist.rank()::dist.world()]
    size = min(cfg.micro_batch_size or cfg.batch_size, -(-cfg.batch_size // dist.world()))
    micro = [data.collate([run.tokenized[split][j] for j in share[i:i + size]], cfg.split, seed=seed + i).to(run.device)
             for i in range(0, len(share), size)]
    return dist.even(micro, -(-len(idx) // dist.world()), size, lambda: data.collate([run.tokenized[split][idx[0]]]).to(run.device)) if cfg.fsdp else micro


# ---- evaluation: dense, between steps; `run` holds what a run has (see main) -----------------------------------------------------

class Interrupted(Exception):
    """A signal came in the middle of an evaluation."""


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
    """(share that greedy generation gets right of the split's first n examples with an answer, their number); (None, 0) without any."""
    run.model.eval()
    examples = [e for e in run.examples[split] if e.answer][:n]
    mine = examples if run.cfg.fsdp else examples[dist.rank()::dist.world()]  # FSDP: all ranks generate the same, in step
    prompts = [data.prompt_ids(e, run.tokenizer, run.cfg.prompt_format) for e in mine]
    order, right = sorted(range(len(mine)), key=lambda i: len(prompts[i])), 0
    for i in range(0, len(mine) if run.cfg.fsdp else -(-len(examples) // dist.world()), 128):
        look(run)
        some = order[i:i + 128]
        outs = run.model.generate([prompts[j] for j in some], run.cfg.max_new_tokens, stop=run.tokenizer.stop)
        right += sum(data.is_correct(run.tokenizer.decode(o), mine[j].answer) for j, o in zip(some, outs))
    total = torch.tensor([right, len(mine)], dtype=torch.float64, device=run.device) / (dist.world() if run.cfg.fsdp else 1)
    dist.all_reduce(total)
    right, n = total.tolist()
    return (right / n, int(n)) if n else (None, 0)


def selection(run, scale):
    """Prints, and returns, what share of the true energy the kept channels hold on one validation batch, and how far sparsity moves
    its loss: a selection that fails shows here."""
    if not predictor.predictors(run.model):
        return {}
    sum_energies(run)
    run.model.eval()
    rng = run.model.selection_rng.get_state()  # looking must not change the training
    batch = data.collate(run.tokenized["val"][:run.cfg.micro_batch_size or run.cfg.batch_size], run.cfg.split).to(run.device)
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


def time_ratio(run, batches):
    """Seconds of forward and backward, sparse over dense, median over the same batches in turn. batches: lists of example numbers."""
    run.model.eval()
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
    ratios = sorted(ratios[1:] or ratios)  # the first warms up
    return ratios[len(ratios) // 2]


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


# ---- the loop --------------------------------------------------------------------------------------------------------------------

def main(cfg, command="python train.py"):
    """One run, from its config to its adapter. Returns the summary that is also written to out_dir/result.json, a dict; None where a
    signal stopped the run or it was finished before. command: how to start this run again, for the message that says so."""
    run = SimpleNamespace(cfg=cfg, stop=[], device=dist.setup(cfg), out=Path(cfg.out_dir), command=command, fresh=False, lock=None)
    try:
        lengths, per_epoch = prepare(run)
        if run.info["finished"]:
            return say(f"{run.out} is finished: its {'adapter' if cfg.lora_r else 'checkpoint'} lies there; another run needs another --out_dir")
        with signals(run.stop):
            if run.info["before"] is None and cfg.test_examples:
                run.info["before"], n = accuracy(run, "test", cfg.test_examples)
                say(f"before training: {run.info['before']:.1%} of {n} test problems right" if n else "no test example has an answer")
            loop(run, lengths, per_epoch)
            return finish(run, lengths)
    except Interrupted:
        name = signal.Signals(run.stop[0]).name if run.stop else "a signal to another rank"
        kept = "" if save(run) else " (which could not be saved: the last saved step counts)"
        say(f"stopped by {name} after step {run.info['step']} of {run.max_steps}{kept}; go on with:\n  {command} --resume=True")
    finally:
        if run.lock:
            run.lock.close()


def prepare(run):
    """Loads everything, and the state to resume from. Nothing is written before all of it is found to be good. Returns (lengths of the
    training examples, steps in an epoch)."""
    cfg = run.cfg
    torch.manual_seed(cfg.seed)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    run.lock = state.claim(run.out, cfg.resume) if dist.rank() == 0 else None
    run.folder = resolve(cfg.model)
    run.tokenizer = data.tokenizer.load(run.folder)
    load_data(run)
    run.model = load_model(cfg, run.folder, run.device, run.tokenizer)
    run.flat, run.grad, matrices = flatten([p for p in run.model.parameters() if p.requires_grad])
    dist.broadcast(run.flat)
    run.optimizer = make_optimizer(cfg, run.flat, run.grad, matrices)
    lengths = [len(t.tokens) for t in run.tokenized["train"]]
    per_epoch = len(data.batches(lengths, cfg.batch_size, cfg.seed, 0, cfg.length_window))
    run.max_steps = cfg.max_steps or math.ceil(cfg.epochs * per_epoch)
    run.info = dict(step=0, sparse=False, evaluated=0, skipped=0, seconds=0.0, tokens=0, flops=0, dense_flops=0, best_val=None, before=None, finished=False)
    say_plan(run)
    if dist.rank() == 0 and not run.lock:
        run.lock = state.lock(run.out)
    resume(run)
    return lengths, per_epoch


@contextmanager
def signals(stop):
    """SIGINT, SIGTERM and SIGUSR1 are put in the list stop, which the loop looks at between steps. A second Ctrl-C quits at once (not under
    torchrun, which passes on a Ctrl-C that the terminal has sent already)."""
    def handler(signum, frame):
        if signum == signal.SIGINT and signum in stop and dist.world() == 1:
            os._exit(130)
        if not stop:
            os.write(2, b"stopping after this step" + b" (Ctrl-C again: at once)" * (signum == signal.SIGINT) + b"\n")
        stop.append(signum)

    before = [(s, signal.signal(s, handler)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    try:
        yield
    finally:
        for s, old in before:
            signal.signal(s, old)


def loop(run, lengths, per_epoch):
    """From the step of run.info to the last. Raises Interrupted between steps when a signal came."""
    cfg, model, info, pending, order = run.cfg, run.model, run.info, None, None
    log = open(run.out / "metrics.jsonl", "a", buffering=1) if dist.rank() == 0 else None
    sparsifiable = bool(predictor.predictors(model))
    while info["step"] < run.max_steps:
        step = info["step"]
        if evaluation_due(run):
            evaluate(run, log)
            info["evaluated"] = step
        epoch, i = divmod(step, per_epoch)
        if order is None or i == 0:
            order = data.batches(lengths, cfg.batch_size, cfg.seed, epoch, cfg.length_window)  # lists of example numbers
        batch = order[i]
        micro = make_batches(run, "train", batch, seed=step * cfg.batch_size)

        scale = sparsity(cfg, step, run.max_steps)  # dense or sparse: this line
        if not sparsifiable:
            scale = 0.0
        elif scale and not info["sparse"]:
            start_sparse(run, micro, scale, log)
        elif scale and cfg.predictor_refresh and step % cfg.predictor_refresh == 0:
            predictor.forget(model)  # and measure anew in one dense step
            scale = 0.0
        info["sparse"] = scale > 0
        run.fresh |= scale == 0
        start = time.perf_counter()
        model.train()
        model.set_sparsity(scale)
        for b in micro:
            loss = model.loss(b)  # a weighted sum: update() divides by the sum of weights
            loss.backward()
            run.grad[-2:] += torch.stack([loss.detach(), b.weights.sum()])
        lr = learning_rate(cfg, step, run.max_steps)
        metrics = update(run, lr)

        report(run, log, pending)  # the step before: waiting for it does not hold this one up
        flops = [model.flops(b) for b in micro]  # dense, sparse
        seconds = time.perf_counter() - start
        tokens, dense, sparse = sum(len(b.tokens) for b in micro), sum(f for f, _ in flops), sum(f for _, f in flops)
        stop, tokens, dense, sparse = dist.add(len(run.stop), tokens, dense, sparse)
        pending = (metrics, batch, dict(step=step, lr=lr, scale=scale, seconds=seconds, tokens=tokens, dense_flops=dense, flops=sparse))
        info["step"] += 1
        for key in ("seconds", "tokens", "dense_flops", "flops"):
            info[key] += pending[2][key]

        save_now = cfg.save_interval and info["step"] % cfg.save_interval == 0
        if evaluation_due(run) or save_now or stop or info["step"] == run.max_steps:
            report(run, log, pending)
            pending = None
        if stop:
            raise Interrupted
        if save_now:
            save(run)


def evaluation_due(run):
    """At every eval_interval-th step, but for the last, which finish() evaluates; and after a resume, if it was not done before."""
    step, every = run.info["step"], run.cfg.eval_interval
    return every and 0 < step < run.max_steps and step % every == 0 and run.info["evaluated"] != step


def start_sparse(run, micro, scale, log):
    """The dense-to-sparse switch: `measured` fixes its channels, after one forward pass if no dense step came before."""
    if run.cfg.predictor == "measured":
        if run.info["step"] == 0:
            run.model.train()
            run.model.set_sparsity(0)
            run.fresh = True
            with torch.no_grad():
                for b in micro:
                    run.model.loss(b)
    say(f"sparse from step {run.info['step']} on")
    record(log, dict(step=run.info["step"], **selection(run, scale)))


def sum_energies(run):
    """`measured`: adds up what the ranks have measured since channels were last fixed, so that all keep the same from now on."""
    for _, p in predictor.predictors(run.model):
        if run.fresh and p.energies is not None:
            dist.all_reduce(p.energies)
            p.fresh = True
    run.fresh = False


def report(run, log, pending):
    """Reads a step's metrics from the device, writes them to metrics.jsonl, and every log_interval steps prints a line."""
    if pending is None:
        return
    metrics, batch, m = pending
    m["loss"], m["grad_norm"], skipped = metrics.tolist()
    record(log, m)
    if skipped:
        run.info["skipped"] += 1
        say(f"step {m['step']}: loss {m['loss']} or gradient norm {m['grad_norm']} is not finite; the step is skipped")
        if skipped >= 3:
            write_text(run.out / "bad_batch.jsonl", "".join(json.dumps(run.tokenizer.decode(run.tokenized["train"][j].tokens)) + "\n" for j in batch))
            raise UserError(f"three steps in a row were not finite; the last batch is in {run.out}/bad_batch.jsonl: lower the learning rate "
                            f"({run.cfg.learning_rate}), or use bfloat16 or float32 where dtype is float16")
    if run.cfg.log_interval and (m["step"] % run.cfg.log_interval == 0 or m["step"] == run.max_steps - 1):
        left = run.info["seconds"] / run.info["step"] * (run.max_steps - m["step"] - 1)
        gpu = ""
        if run.device.type == "cuda":
            peak = next((v for k, v in PEAK.items() if k in torch.cuda.get_device_name()), None)
            gpu = f" {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" + (f" mfu {m['flops'] / m['seconds'] / peak / dist.world():.0%}" if peak else "")
        say(f"step {m['step']:4d}/{run.max_steps} {'sparse' if m['scale'] else 'dense '} loss {m['loss']:.4f} grad {m['grad_norm']:.2f} "
            f"lr {m['lr']:.1e} | {m['tokens'] / m['seconds']:,.0f} tok/s {m['seconds'] * 1e3:.0f} ms, "
            f"{1 - m['flops'] / m['dense_flops']:.0%} FLOPs saved{gpu} | {clock(left)} left")


def record(log, m):
    """One line of metrics.jsonl. A full disk does not end a training. (JSON has no NaN.)"""
    try:
        if log:
            log.write(json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in m.items()}) + "\n")
    except OSError as e:
        say(f"warning: metrics.jsonl could not be written ({e.strerror})")


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}" if seconds >= 3600 else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def evaluate(run, log):
    """Validation loss and answers, dense, and what the selection is worth."""
    n, info = run.cfg.eval_examples, run.info
    loss = mean_loss(run, "val", n)
    right, answered = accuracy(run, "val", n)
    info["best_val"] = min(loss, info["best_val"] or math.inf)
    say(f"step {info['step']}: validation loss {loss:.4f}" + (f", {right:.1%} of {answered} answers right" if answered else ""))
    scale = sparsity(run.cfg, info["step"] - 1, run.max_steps)
    seen = selection(run, scale) if scale else {}
    record(log, dict(step=info["step"], val_loss=loss, val_accuracy=right, **seen))
    return dict(val_loss=loss, val_accuracy=right, **seen)


# ---- beginning and end -----------------------------------------------------------------------------------------------------------

def say_plan(run):
    cfg, model = run.cfg, run.model
    for key, value in config.differences(cfg).items():
        say(f"  {key} = {value!r}")
    frozen = sum(p.numel() for p in model.parameters()) - run.flat.numel()
    say(f"{cfg.model}: {frozen / 1e6:,.1f} M frozen and {run.flat.numel() / 1e6:,.2f} M trained weights, {run.max_steps} steps of {cfg.batch_size} examples")
    model.set_sparsity(1)
    sample = data.collate(run.tokenized["train"][:cfg.batch_size], cfg.split)
    dense, sparse = model.flops(sample)
    first, end = math.ceil(cfg.sparse_start * run.max_steps), math.ceil(cfg.sparse_end * run.max_steps)
    say(f"dense for {first} steps, then sparse ({cfg.predictor}; ratios: {cfg.ratio_source()}) until step {end}: a sparse step computes "
        f"{sparse / dense:.0%} of a dense one's {dense / 1e9:,.1f} GFLOP" if predictor.predictors(model) else "dense throughout")


def optimizer_tensors(run):
    out = {"flat": run.flat}
    for i, group in enumerate(run.optimizer.param_groups):
        p = group["params"][0]
        s = run.optimizer.state[p]
        if not s:  # before the first step
            s.update(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        out.update({f"{k}.{i}": v.detach() for k, v in s.items()})
    return out


def run_tensors(run):
    """{name: tensor} of all that a run is made of but its random number generators: weights, moments, measured energies."""
    energies = {"energies." + k: v for k, v in predictor.energies(run.model).items()}
    return {**optimizer_tensors(run), "skipped": run.optimizer.skipped, **energies}


def identity(run):
    """What a state and a run have to agree on: the options, and the contents of what `model` and `dataset` name."""
    return {"config": asdict(run.cfg), "prints": {"model": state.fingerprint(run.folder), "dataset": state.digest(run.tokenized["train"])}}


def save(run):
    """Called by all ranks, written by one. False, and said so, where it could not be: the last good state stays."""
    tensors = run_tensors(run)
    if run.fresh:  # each rank has measured its own share
        tensors.update({k: dist.all_reduce(t.clone()) for k, t in tensors.items() if k.startswith("energies.")})
    rng = {"cpu": [torch.get_rng_state()], "select": dist.gather(run.model.selection_rng.get_state())}
    if run.device.type == "cuda":
        rng["cuda"] = [torch.cuda.get_rng_state()]
    try:
        if dist.rank() == 0:
            state.save(run.out, tensors, {**run.info, **identity(run), "rng": {k: [bytes(t.tolist()).hex() for t in v] for k, v in rng.items()}})
        return True
    except OSError as e:
        say(f"warning: the state after step {run.info['step']} could not be saved ({e.strerror}): the last good one stays, the run goes on")
        return False


def resume(run):
    """Goes on from out_dir's newest good state where cfg.resume asks for it and there is one; metrics of later steps are dropped."""
    tensors, info = state.load(run.out, identity(run)) if run.cfg.resume and dist.rank() == 0 else (None, None)
    info = dist.share(info)
    metrics = run.out / "metrics.jsonl"
    if info is None:
        if dist.rank() == 0:
            write_text(metrics, "")
        return
    run.info.update({k: info[k] for k in run.info})
    ours = run_tensors(run)
    if tensors and {k: t.shape for k, t in tensors.items()} != {k: t.shape for k, t in ours.items()}:
        raise UserError(f"the state in {run.out} is of a model of other sizes or other trained parts: choose another --out_dir")
    for name, t in ours.items():
        dist.broadcast(t.copy_(tensors[name]) if tensors else t)
        if name.startswith("energies.") and dist.rank():
            t.zero_()  # rank 0 holds the sum over all ranks
    run.fresh = True
    if info["sparse"]:
        sum_energies(run)
    rng = {k: [torch.tensor(list(bytes.fromhex(s)), dtype=torch.uint8) for s in v] for k, v in info["rng"].items()}
    torch.set_rng_state(rng["cpu"][0])
    if dist.rank() < len(rng["select"]) and len(rng["select"][0]) == len(run.model.selection_rng.get_state()):
        run.model.selection_rng.set_state(rng["select"][dist.rank()])
    else:  # on more ranks than before, or on another kind of device
        run.model.selection_rng.manual_seed(run.cfg.seed + dist.rank() + 1000 * info["step"])
    if "cuda" in rng and run.device.type == "cuda":
        torch.cuda.set_rng_state(rng["cuda"][0])
    if dist.rank() == 0:
        write_text(metrics, "".join(l for l in read_lines(metrics) if kept(json.loads(l), info)))
    say(f"resumed after step {run.info['step']} of {run.max_steps}")


def read_lines(path):
    """The whole lines of metrics.jsonl: a killed process may have left a torn one."""
    lines = path.read_text(encoding="utf-8").splitlines(True) if path.exists() else []
    return [l for l in lines if l.startswith("{") and l.endswith("}\n")]


def kept(m, info):
    """Whether this line of metrics.jsonl is of what the state knows of; what comes later is done again."""
    return m["step"] <= info["evaluated"] if "val_loss" in m else m["step"] < info["step"]


def finish(run, lengths):
    """The last evaluation, the adapter (or the whole checkpoint), and the summary."""
    cfg, info, out = run.cfg, run.info, run.out
    result = {k: info[k] for k in ("seconds", "tokens", "flops", "dense_flops", "before", "skipped")}
    save(run)  # a kill from here on costs the evaluation only
    if dist.rank() == 0:
        if cfg.lora_r:
            run.model.save_adapter(out, run.folder if Path(cfg.model).is_dir() else cfg.model)
        else:
            run.model.save_pretrained(out)
            for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json"):
                if (run.folder / name).exists():
                    shutil.copy(run.folder / name, out / name)
    if cfg.eval_interval:
        result.update(evaluate(run, None))
    if cfg.test_examples:
        result["test_loss"] = mean_loss(run, "test", cfg.test_examples) if run.tokenized["test"] else None
        result["after"], result["test_examples"] = accuracy(run, "test", cfg.test_examples)
    if predictor.predictors(run.model):
        result["time_ratio"] = time_ratio(run, data.batches(lengths, cfg.batch_size, cfg.seed, 0, cfg.length_window)[:11])
    info["finished"] = True
    save(run)
    if dist.rank() == 0:
        write_text(out / "result.json", json.dumps(result, indent=2) + "\n")
    say_result(run, result)
    return result


def say_result(run, r):
    say(f"\n{run.info['step']} steps in {clock(r['seconds'])}, {r['tokens']:,} tokens")
    if r.get("after") is not None:
        say(f"accuracy      before {r['before']:.1%}, after {r['after']:.1%}, of {r['test_examples']} test problems")
    if "time_ratio" in r:
        say(f"FLOPs saved   {1 - r['flops'] / r['dense_flops']:.1%} of dense LoRA's over the whole run")
        say(f"time saved    {1 - r['time_ratio']:.1%} of a dense step's forward and backward, timed in turn on the same batches")
    say(f"{'adapter' if run.cfg.lora_r else 'checkpoint'}       {run.out}")


def cli(argv):
    """The command line. What goes wrong is one sentence, stderr's last line, and exit code 1."""
    cfg, debug = None, "--debug=True" in argv
    try:
        cfg = config.load(argv)
        debug = cfg.debug
        main(cfg, shlex.join([*dist.launcher().split(), "train.py"] + [a for a in argv if not a.startswith("--resume=")]))
        dist.close()
        return
    except (UserError, OSError, RuntimeError, KeyboardInterrupt) as e:
        reason = explain(e, cfg)
        if reason is None:
            raise
        if debug:
            traceback.print_exc()
    sys.stdout.flush()
    print(reason, file=sys.stderr, flush=True)
    os._exit(1) if dist.world() > 1 else sys.exit(1)  # with others in the group, do not wait for them


def explain(e, cfg):
    """One sentence about what a user can do something about; None for a mistake of ours, which deserves its traceback."""
    if isinstance(e, UserError):
        return f"error: {e}"
    if isinstance(e, torch.OutOfMemoryError):
        return (f"error: out of memory on {cfg.device} with {cfg.micro_batch_size} examples of up to {cfg.max_seq_len} tokens at once: lower "
                "micro_batch_size or max_seq_len, or set recompute=True (a saved state stays, go on from it with --resume=True)")
    if isinstance(e, KeyboardInterrupt):
        return "interrupted before the training began"
    if isinstance(e, OSError):
        return f"error: {e.strerror or e} ({e.filename or cfg.out_dir}): a saved state stays, go on from it with --resume=True"
    return f"error: {dist.lost_message(e)}" if dist.is_loss(e) else None


if __name__ == "__main__":
    cli(sys.argv[1:])
