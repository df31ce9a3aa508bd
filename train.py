"""SparseLoRA fine-tuning. The one training loop: load, dense warm-up, sparse, evaluate, save.

    python train.py                                  the embedded default on a CPU, about two minutes
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
import signal
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

import config
import data
import data.tokenizer
import predictor
from config import UserError
from model import LLaMA, ModelConfig, load_adapter
from lib import dist, state
from lib.files import resolve, write_text
from lib.evaluate import Interrupted, accuracy, evaluate, make_batches, mean_loss, selection, time_ratio
from lib.log import finite, read_later, record, report, say, say_plan, say_result


# ---- the parts of a run ------------------------------------------------------------------------------------

def load_data(run):
    """run.examples and run.tokenized: {"train", "val", "test": lists}; prints their statistics and one
    example, scored part marked."""
    cfg, run.examples, run.tokenized = run.cfg, {}, {}
    for split in ("train", "val", "test") if cfg.test_examples else ("train", "val"):
        run.examples[split] = examples = data.load_split(cfg, split)
        if split == "test" and not any(e.response for e in examples):  # only questions and answers
            run.tokenized[split] = []
            continue
        run.tokenized[split] = data.tokenize(examples, run.tokenizer, cfg.max_seq_len, cfg.prompt_format,
                                             cfg.prompt_weight)
        say(f"{split:5s} {data.statistics(examples, run.tokenized[split], cfg.prompt_weight)}")
    say("first example, [[scored]]: " + repr(data.marked(run.tokenized["train"][0], run.tokenizer)))


def load_model(cfg, folder, device, tokenizer):
    """The frozen base with LoRA, or with lora_r = 0 all weights trained, from random ones where the
    directory has none."""
    dtype = getattr(torch, cfg.dtype)
    if cfg.lora_r == 0 and not any(folder.glob("*.safetensors")):
        model = LLaMA(ModelConfig.from_dir(folder), dtype, device)
    else:
        model = LLaMA.from_pretrained(folder, dtype, device, shard=dist.fsdp(device) if cfg.fsdp else None)
    c, L = model.config, len(model.blocks)
    if tokenizer.n_vocab > c.vocab_size:
        raise UserError(f"the tokenizer of {folder} has {tokenizer.n_vocab} tokens, "
                        f"the model's vocab_size is {c.vocab_size}: they belong to "
                        "different models")
    if c.sliding_window and c.sliding_window < cfg.max_seq_len:
        raise UserError(f"max_seq_len = {cfg.max_seq_len} is longer than the model's sliding window of "
                        f"{c.sliding_window}: lower it")
    mlp, attn = (config.ratios(cfg.mlp_sparsity, L, "mlp_sparsity"),
                 config.ratios(cfg.attn_sparsity, L, "attn_sparsity"))
    if cfg.lora_r == 0:
        model.train_all()
        mlp = attn = [0.0] * L  # a weight that is trained needs all its rows
    elif cfg.init_adapter:
        load_adapter(model, cfg.init_adapter)
        say(f"goes on from {cfg.init_adapter}: rank {model.lora_r}, alpha {model.lora_alpha:g} on "
            f"{','.join(model.lora_targets)}, whatever lora_r, lora_alpha and lora_targets say")
    else:
        model.add_lora(cfg.lora_r, cfg.lora_alpha, cfg.lora_targets)
    model.recompute = cfg.recompute
    predictor.attach(model, mlp, attn, cfg.predictor_rank, cfg.predictor, seed=cfg.seed + dist.rank(),
                     agree=dist.agree)
    return model


def flatten(params):
    """Makes all trained tensors views of one flat vector and their gradients of another, which has two more
    places, for the loss and the sum of its weights. So one all-reduce, one norm and one fused AdamW serve a
    step, and the state of a run is three vectors. Returns (flat (n,), grad (n + 2,), number of elements in
    matrices, which come first)."""
    params = sorted(params, key=lambda p: p.dim() < 2)
    flat = torch.cat([p.detach().flatten() for p in params])  # (n,)
    grad, i = flat.new_zeros(len(flat) + 2), 0
    for p in params:
        p.data, p.grad = (t[i:i + p.numel()].view_as(p) for t in (flat, grad))
        i += p.numel()
    return flat, grad, sum(p.numel() for p in params if p.dim() >= 2)


def make_optimizer(cfg, flat, grad, matrices):
    """AdamW on the flat vector; weight decay on matrices only (norms and biases are trained with
    lora_r = 0)."""
    groups = []
    for part, decay in ((slice(0, matrices), cfg.weight_decay), (slice(matrices, len(flat)), 0.0)):
        p = torch.nn.Parameter(flat[part])
        p.grad = grad[part]
        if p.numel():
            groups.append(dict(params=[p], weight_decay=decay))
    optimizer = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, cfg.beta2), fused=True)
    optimizer.skipped = torch.zeros((), device=flat.device)  # steps skipped in a row
    return optimizer


def forward_backward(run, micro):
    """Adds the gradient of these micro-batches to run.grad, and their loss and weights to its
    last two places."""
    for b in micro:
        loss = run.model.loss(b)  # a weighted sum: update() divides by the sum of weights
        loss.backward()
        run.grad[-2:] += torch.stack([loss.detach(), b.weights.sum()])


def update(run, lr):
    """One optimizer step from the summed gradients. Returns (3,) on the device: loss, gradient norm, steps
    skipped in a row. A loss or gradient that is not finite skips the step: with found_inf = 1 the fused AdamW
    leaves all as it is, and the host need not know."""
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
    """The schedule: 0 (dense) before sparse_start and from sparse_end on, 1 (sparse) between."""
    return float(cfg.sparse_start <= step / max_steps < cfg.sparse_end)


def scale_now(run):
    """The schedule's value at step run.info["step"]; but 0 where no part has a ratio, and in the steps, every
    predictor_refresh-th, that measure the channels anew."""
    cfg, step = run.cfg, run.info["step"]
    scale = sparsity(cfg, step, run.max_steps) if predictor.predictors(run.model) else 0.0
    if scale and run.info["sparse"] and cfg.predictor_refresh and step % cfg.predictor_refresh == 0:
        predictor.forget(run.model)
        scale = 0.0
    return scale


# ---- the loop ----------------------------------------------------------------------------------------------

def main(cfg, command="python train.py"):
    """One run, from its config to its adapter. Returns the summary that is also written to
    out_dir/result.json, a dict; None where a signal stopped the run or it was finished before. command: how
    to start this run again, for the message that says so.

    `run`, which all functions here and in tools/ pass on, holds

        cfg, device, out (Path)       the options, where it computes, where it writes
        folder, tokenizer             of the base
        examples, tokenized           lists by split
        model, optimizer, flat, grad  flat (n,) and grad (n + 2,) as flatten() makes them
        max_steps, info               info is saved as JSON: step, sparse, ...
        stop, lock                    signals that came; the lock on out
        unsummed                      this rank's measured energies are not yet added up over the ranks
        since                         when the step began that is reported next"""
    run = SimpleNamespace(cfg=cfg, stop=[], device=dist.setup(cfg), out=Path(cfg.out_dir), unsummed=False,
                          lock=None)
    try:
        lengths, per_epoch = prepare(run)
        if run.info["finished"]:
            return say(f"{run.out} is finished: its {'adapter' if cfg.lora_r else 'checkpoint'} lies there; "
                       "another run needs another --out_dir")
        with signals(run.stop):
            if run.info["before"] is None and cfg.test_examples:
                run.info["before"], n = accuracy(run, "test", cfg.test_examples)
                say(f"before training: {run.info['before']:.1%} of {n} test problems right"
                    if n else "no test example has an answer")
            loop(run, lengths, per_epoch)
            return finish(run, lengths)
    except Interrupted:
        name = signal.Signals(run.stop[0]).name if run.stop else "a signal to another rank"
        kept = "" if state.save_run(run) else " (which could not be saved: the last saved step counts)"
        say(f"stopped by {name} after step {run.info['step']} of {run.max_steps}{kept}; "
            f"go on with:\n  {command} --resume=True")
    finally:
        if run.lock:
            run.lock.close()


def prepare(run):
    """Loads everything, and the state to resume from. Nothing is written before all of it is found to be
    good. Returns (lengths of the training examples, steps in an epoch)."""
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
    run.info = dict(step=0, sparse=False, evaluated=0, skipped=0, seconds=0.0, tokens=0, flops=0,
                    dense_flops=0, before=None, finished=False)
    say_plan(run)
    if dist.rank() == 0 and not run.lock:
        run.lock = state.lock(run.out)
    state.resume_run(run)
    return lengths, per_epoch


@contextmanager
def signals(stop):
    """SIGINT, SIGTERM and SIGUSR1 are put in the list stop, which the loop looks at between steps. A second
    Ctrl-C quits at once (not under torchrun, which passes on a Ctrl-C that the terminal has sent already)."""
    def handler(signum, frame):
        if signum == signal.SIGINT and signum in stop and dist.world() == 1:
            os._exit(130)
        if not stop:
            os.write(2, b"stopping after this step"
                     + b" (Ctrl-C again: at once)" * (signum == signal.SIGINT) + b"\n")
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
    while info["step"] < run.max_steps:
        step = info["step"]
        if evaluation_due(run):
            evaluate(run, log, sparsity(cfg, step - 1, run.max_steps))
            info["evaluated"] = step
        epoch, i = divmod(step, per_epoch)
        if order is None or i == 0:
            # lists of example numbers
            order = data.batches(lengths, cfg.batch_size, cfg.seed, epoch, cfg.length_window)
        batch = order[i]
        micro = make_batches(run, "train", batch, seed=step * cfg.batch_size)

        scale = scale_now(run)  # dense or sparse: this line
        if scale and not info["sparse"]:
            report(run, log, pending)
            pending = None
            start_sparse(run, micro, scale, log)
        info["sparse"] = scale > 0
        run.unsummed |= scale == 0
        if pending is None:
            run.since = time.perf_counter()  # else this step began when the one before was done
        model.train()
        model.set_sparsity(scale)
        forward_backward(run, micro)
        lr = learning_rate(cfg, step, run.max_steps)
        metrics = read_later(update(run, lr))

        report(run, log, pending)  # of the step before, while the device is busy with this one
        flops = [model.flops(b) for b in micro]  # dense, sparse
        tokens, dense, sparse = (sum(len(b.tokens) for b in micro), sum(f for f, _ in flops),
                                 sum(f for _, f in flops))
        stop, tokens, dense, sparse = dist.add(len(run.stop), tokens, dense, sparse)
        pending = (metrics, batch, dict(step=step, lr=lr, scale=scale, tokens=tokens, dense_flops=dense,
                                        flops=sparse))
        info["step"] += 1
        for key in ("tokens", "dense_flops", "flops"):
            info[key] += pending[2][key]

        save_now = cfg.save_interval and info["step"] % cfg.save_interval == 0
        if evaluation_due(run) or save_now or stop or info["step"] == run.max_steps:
            report(run, log, pending)
            pending = None
        if stop:
            raise Interrupted
        if save_now:
            state.save_run(run)


def evaluation_due(run):
    """At every eval_interval-th step, but for the last, which finish() evaluates; and after a resume, if it
    was not done before."""
    step, every = run.info["step"], run.cfg.eval_interval
    return every and 0 < step < run.max_steps and step % every == 0 and run.info["evaluated"] != step


def start_sparse(run, micro, scale, log):
    """The dense-to-sparse switch: `measured` fixes its channels, after one forward pass if no dense
    step came before."""
    if run.cfg.predictor == "measured":
        if run.info["step"] == 0:
            run.unsummed = True
            predictor.measure(run.model, micro)
    say(f"sparse from step {run.info['step']} on")
    record(log, dict(step=run.info["step"], **selection(run, scale)))


# ---- beginning and end -------------------------------------------------------------------------------------

def finish(run, lengths):
    """The last evaluation, the adapter (or the whole checkpoint), and the summary."""
    cfg, info, out = run.cfg, run.info, run.out
    result = {k: info[k] for k in ("seconds", "tokens", "flops", "dense_flops", "before", "skipped")}
    state.save_run(run)  # a kill from here on costs the evaluation only
    if dist.rank() == 0:
        if cfg.lora_r:
            run.model.save_adapter(out, run.folder if Path(cfg.model).is_dir() else cfg.model)
        else:
            run.model.save_pretrained(out)
            for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json",
                         "chat_template.jinja", "generation_config.json"):
                if (run.folder / name).exists():
                    shutil.copy(run.folder / name, out / name)
    if cfg.eval_interval:
        result.update(evaluate(run, None, sparsity(cfg, info["step"] - 1, run.max_steps)))
    if cfg.test_examples:
        result["test_loss"] = mean_loss(run, "test", cfg.test_examples) if run.tokenized["test"] else None
        result["after"], result["test_examples"] = accuracy(run, "test", cfg.test_examples)
    if predictor.predictors(run.model):
        result["time_ratio"] = time_ratio(run, data.batches(lengths, cfg.batch_size, cfg.seed, 0,
                                                            cfg.length_window)[:11])
    info["finished"] = True
    state.save_run(run)
    if dist.rank() == 0:
        write_text(out / "result.json", json.dumps(finite(result), indent=2) + "\n")
    say_result(run, result)
    return result


def cli(argv):
    """The command line. What goes wrong is one sentence, stderr's last line, and exit code 1."""
    cfg, debug = None, "--debug=True" in argv
    try:
        cfg = config.load(argv)
        debug = cfg.debug
        main(cfg, shlex.join([*dist.launcher().split(), "train.py"]
                             + [a for a in argv if not a.startswith("--resume=")]))
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
    os._exit(1) if dist.world() > 1 else sys.exit(1)  # with others in the group, do not wait for them


def explain(e, cfg):
    """One sentence about what a user can do something about; None for a mistake of ours, which
    deserves its traceback."""
    if isinstance(e, UserError):
        return f"error: {e}"
    saved = cfg and state.numbers(Path(cfg.out_dir, "state"))
    rest = "; a saved state stays, go on from it with --resume=True" if saved else ""
    if isinstance(e, torch.OutOfMemoryError):
        return (f"error: out of memory on {cfg.device} with micro-batches of {cfg.micro_batch_size} examples "
                f"of up to {cfg.max_seq_len} tokens: lower micro_batch_size or set recompute=True{rest}")
    if isinstance(e, KeyboardInterrupt):
        return "interrupted before the training began"
    if isinstance(e, OSError):
        return f"error: {e.strerror or e} ({e.filename or (cfg.out_dir if cfg else 'stdout')}){rest}"
    return f"error: {dist.lost_message(e)}" if dist.is_loss(e) else None


if __name__ == "__main__":
    cli(sys.argv[1:])
