"""What a run says: the plan, a line every log_interval steps, the result; and metrics.jsonl, one
object a step.
"""
import json
import math
import time

import torch

import config
import data
import predictor
from config import UserError
from lib import dist
from lib.files import write_text

# dense bf16
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40": 181e12, "A6000": 155e12, "4090": 165e12,
        "3090": 71e12}


def say(*args):
    if dist.rank() == 0:
        print(*args, flush=True)


def record(log, m):
    """One line of metrics.jsonl. A full disk does not end a training."""
    try:
        if log:
            log.write(json.dumps(finite(m)) + "\n")
    except OSError as e:
        say(f"warning: metrics.jsonl could not be written ({e.strerror})")


def finite(m):
    """None for what is not finite, in nested dicts too: JSON has no NaN."""
    if isinstance(m, dict):
        return {k: finite(v) for k, v in m.items()}
    return None if isinstance(m, float) and not math.isfinite(m) else m


def read_later(t):
    """Queues a copy of t (n,) to the host behind what its device has still to do -> a function that waits for
    the copy alone, and returns (t as a list, when it was there). A plain t.tolist() would also wait for all
    that was launched since."""
    if not t.is_cuda:
        there = t.tolist(), time.perf_counter()
        return lambda: there
    host = torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait():
        copied.synchronize()
        return host.tolist(), time.perf_counter()
    return wait


def report(run, log, pending):
    """Waits for a step's metrics, writes them and its seconds (since the step before, or since it began) to
    metrics.jsonl, and every log_interval steps prints a line."""
    if pending is None:
        return
    metrics, batch, m = pending
    (m["loss"], m["grad_norm"], skipped), now = metrics()
    m["seconds"], run.since = now - run.since, now
    run.info["seconds"] += m["seconds"]
    record(log, m)
    if skipped:
        run.info["skipped"] += 1
        say(f"step {m['step']}: loss {m['loss']} or gradient norm {m['grad_norm']} is not finite; "
            "the step is skipped")
        if skipped >= 3:
            if dist.rank() == 0:
                texts = (run.tokenizer.decode(run.tokenized["train"][j].tokens) for j in batch)
                write_text(run.out / "bad_batch.jsonl", "".join(json.dumps(t) + "\n" for t in texts))
            raise UserError("three steps in a row were not finite; "
                            f"the last batch is in {run.out}/bad_batch.jsonl: lower the learning rate "
                            f"({run.cfg.learning_rate}), or use bfloat16 or float32 where dtype is float16")
    if run.cfg.log_interval and (m["step"] % run.cfg.log_interval == 0 or m["step"] == run.max_steps - 1):
        left = run.info["seconds"] / (m["step"] + 1) * (run.max_steps - m["step"] - 1)
        gpu = ""
        if run.device.type == "cuda":
            peak = next((v for k, v in PEAK.items() if k in torch.cuda.get_device_name()), None)
            gpu = (f" {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
                   + (f" mfu {m['flops'] / m['seconds'] / peak / dist.world():.0%}" if peak else ""))
        say(f"step {m['step']:4d}/{run.max_steps} {'sparse' if m['scale'] else 'dense '} "
            f"loss {m['loss']:.4f} grad {m['grad_norm']:.2f} "
            f"lr {m['lr']:.1e} | {m['tokens'] / m['seconds']:,.0f} tok/s {m['seconds'] * 1e3:.0f} ms, "
            f"{1 - m['flops'] / m['dense_flops']:.0%} FLOPs saved{gpu} | {clock(left)} left")


def clock(seconds):
    return (f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}" if seconds >= 3600
            else f"{int(seconds) // 60}:{int(seconds) % 60:02d}")


def say_plan(run):
    cfg, model = run.cfg, run.model
    for key, value in config.differences(cfg).items():
        say(f"  {key} = {value!r}")
    frozen = sum(p.numel() for p in model.parameters()) - run.flat.numel()
    say(f"{cfg.model}: {frozen / 1e6:,.1f} M frozen and {run.flat.numel() / 1e6:,.2f} M trained weights, "
        f"{run.max_steps} steps of {cfg.batch_size} examples")
    model.set_sparsity(1)
    sample = data.collate(run.tokenized["train"][:cfg.batch_size], cfg.split)
    dense, sparse = model.flops(sample)
    model.set_sparsity(0)
    first, end = (sum(step / run.max_steps < f for step in range(run.max_steps))
                  for f in (cfg.sparse_start, cfg.sparse_end))
    say(f"dense for {first} steps, then sparse ({cfg.predictor}) until step "
        f"{end}: a sparse step computes {sparse / dense:.0%} of a dense one's {dense / 1e9:,.1f} GFLOP"
        if predictor.predictors(model) else "dense throughout")


def say_result(run, r):
    say(f"\n{run.info['step']} steps in {clock(r['seconds'])}, {r['tokens']:,} tokens")
    if r.get("after") is not None:
        say(f"accuracy      before {r['before']:.1%}, after {r['after']:.1%}, "
            f"of {r['test_examples']} test problems")
    if r["flops"] < r["dense_flops"]:
        say(f"FLOPs saved   {1 - r['flops'] / r['dense_flops']:.1%} of dense LoRA's over the whole run")
        say(f"time saved    {1 - r['time_ratio']:.1%} of a dense step's forward and backward, "
            "timed in turn on the same batches")
    say(f"{'adapter' if run.cfg.lora_r else 'checkpoint'}       {run.out}")
