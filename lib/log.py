"""What a run says and writes of its steps: a line every log_interval steps, metrics.jsonl with one object a step.
"""
import json
import math
import time

import torch

from config import UserError
from lib import dist
from lib.files import write_text

# dense bf16
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40": 181e12, "A6000": 155e12, "4090": 165e12,
        "3090": 71e12}


def say(*args):
    """Prints, on one rank. A terminal that has hung up does not end a training."""
    if dist.rank() == 0:
        print(*args, flush=True)


def finite(m):
    """None for what is not finite, in nested dicts too: JSON has no NaN."""
    if isinstance(m, dict):
        return {k: finite(v) for k, v in m.items()}
    if isinstance(m, float) and not math.isfinite(m):
        return None
    return m


def clock(seconds):
    """Seconds as m:ss or h:mm:ss."""
    minutes, s = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{s:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"


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


class Log:
    """Reports steps one late: step() is given metrics that are still on the device, and reports the step before while
    the device is busy with this one. flush() waits for the last.

    path: of metrics.jsonl. info: the run's counters, to which seconds and skipped steps are added. texts: a function
    from the numbers of a step's examples to their texts, for a batch that cannot be trained on."""

    def __init__(self, path, info, cfg, max_steps, device, texts):
        self.file = open(path, "a", buffering=1) if dist.rank() == 0 else None
        self.folder, self.info, self.cfg, self.max_steps = path.parent, info, cfg, max_steps
        self.device, self.texts = device, texts
        self.pending = None
        self.last_loss = None
        self.since = 0.0  # when the step began that is pending

    def begin(self):
        """A step begins now; or, while one is pending, when that one is done."""
        if self.pending is None:
            self.since = time.perf_counter()

    def step(self, metrics, numbers, **known):
        """metrics (3,): loss, gradient norm, steps skipped in a row. numbers: of the step's examples. known: what else
        belongs to the line: step, lr, sparse, tokens, flops, dense_flops."""
        metrics = read_later(metrics)
        self.flush()
        self.pending = metrics, numbers, known

    def flush(self):
        """Waits for the pending step's metrics, writes them and its seconds, and every log_interval steps prints a
        line. UserError: three steps in a row could not be made."""
        if self.pending is None:
            return
        metrics, numbers, m = self.pending
        self.pending = None
        (m["loss"], m["grad_norm"], skipped), now = metrics()
        m["seconds"] = now - self.since
        self.since = now
        self.info["seconds"] += m["seconds"]
        self.last_loss = m["loss"]
        if self.info["first_loss"] is None:
            self.info["first_loss"] = m["loss"]
        self.record(m)
        if skipped:
            self.skipped(m, skipped, numbers)
        every = self.cfg.log_interval
        if every and (m["step"] % every == 0 or m["step"] == self.max_steps - 1):
            say(self.line(m))

    def record(self, m):
        """One line of metrics.jsonl. A full disk does not end a training."""
        if self.file is None:
            return
        try:
            self.file.write(json.dumps(finite(m)) + "\n")
        except OSError as e:
            say(f"warning: metrics.jsonl could not be written ({e.strerror})")

    def skipped(self, m, in_a_row, numbers):
        self.info["skipped"] += 1
        say(f"step {m['step']}: loss {m['loss']} or gradient norm {m['grad_norm']} is not finite; "
            "the step is skipped")
        if in_a_row < 3:
            return
        if dist.rank() == 0:
            lines = [json.dumps(text) + "\n" for text in self.texts(numbers)]
            write_text(self.folder / "bad_batch.jsonl", "".join(lines))
        raise UserError("three steps in a row were not finite; "
                        f"the last batch is in {self.folder}/bad_batch.jsonl: lower the learning rate "
                        f"({self.cfg.learning_rate}), or use bfloat16 or float32 where dtype is float16")

    def line(self, m):
        """The log line of a step."""
        left = self.info["seconds"] / (m["step"] + 1) * (self.max_steps - m["step"] - 1)
        kind = "sparse" if m["sparse"] else "dense "
        saved = 1 - m["flops"] / m["dense_flops"]
        return (f"step {m['step']:4d}/{self.max_steps} {kind} loss {m['loss']:.4f} grad {m['grad_norm']:.2f} "
                f"lr {m['lr']:.1e} | {m['tokens'] / m['seconds']:,.0f} tok/s {m['seconds'] * 1e3:.0f} ms, "
                f"{saved:.0%} FLOPs saved{self.gpu(m)} | {clock(left)} left")

    def gpu(self, m):
        """Memory at most, and the share of the card's peak, where the card is known."""
        if self.device.type != "cuda":
            return ""
        text = f" {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        for card, peak in PEAK.items():
            if card in torch.cuda.get_device_name():
                return text + f" mfu {m['flops'] / m['seconds'] / peak / dist.world():.0%}"
        return text
