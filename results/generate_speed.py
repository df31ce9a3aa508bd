"""Batch generation against transformers': the same prompts, the same number of new tokens, measured in turn.

    python -m results.generate_speed --model=DIR [--prompts=32] [--new_tokens=64] [--rounds=5] [--threads=2]
        [--device=cpu] [--dtype=float32] [--static=False]

Prompts are the first of GSM8K's test set. No text may end early, so both do the same work. transformers pads
on the left; --static=True gives it its static cache, compiled (GPU). Wall time is what counts; the processor
time of the process stands beside it because it moves less when the machine is shared. Medians; needs
transformers. The last line is JSON.
"""
import json
import statistics
import time

import torch

import data
import data.tokenizer
from lib import cli
from config import UserError
from model import LLaMA


def ours(model, prompts, n):
    return model.generate(prompts, n, stop=())


def theirs(model, prompts, n, static):
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    cache = {"cache_implementation": "static"} if static else {}
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=n, do_sample=False,
                         pad_token_id=0, **cache)
    return out[:, longest:].tolist()


def measure(f, device):
    t, c = time.perf_counter(), time.process_time()
    out = f()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return out, time.perf_counter() - t, time.process_time() - c


def main(argv):
    _, o = cli.options(argv, __doc__, (0, 0), model="", prompts=32, new_tokens=64, rounds=5, threads=2,
                         device="cpu", dtype="float32", static=False)
    if not o["model"]:
        raise UserError("name a model's directory: --model=DIR")
    from transformers import AutoModelForCausalLM
    torch.set_num_threads(o["threads"])
    dtype = getattr(torch, o["dtype"])
    tokenizer = data.tokenizer.load(o["model"])
    prompts = [data.prompt_ids(e, tokenizer, "plain") for e in data.load("gsm8k", "test")[:o["prompts"]]]
    a = LLaMA.from_pretrained(o["model"], dtype, o["device"])
    b = AutoModelForCausalLM.from_pretrained(o["model"], dtype=dtype).to(o["device"]).eval()
    b.generation_config.eos_token_id = None
    runs = {"ours": lambda n: ours(a, prompts, n),
            "transformers": lambda n: theirs(b, prompts, n, o["static"])}
    times = {name: [] for name in runs}
    for i in range(o["rounds"] + 1):  # the first warms up
        out = {}
        for name in sorted(runs, reverse=i % 2):
            out[name], wall, cpu = measure(lambda: runs[name](o["new_tokens"] if i else 2), o["device"])
            if i:
                times[name].append((wall, cpu))
                print(f"round {i}, {name:12}: {wall:.2f} s, {cpu:.2f} s of processor", flush=True)
    same = sum(x == y for x, y in zip(out["ours"], out["transformers"]))
    result = dict(options=o, same=f"{same} of {len(prompts)} texts equal",
                  prompt_tokens=sum(map(len, prompts)))
    for k, what in enumerate(("wall", "processor")):
        m = {name: statistics.median(t[k] for t in ts) for name, ts in times.items()}
        result[what] = {name: round(s, 3) for name, s in m.items()} | {"ratio": m["ours"] / m["transformers"]}
        if what == "wall":
            result["tokens/s"] = {name: round(len(prompts) * o["new_tokens"] / s, 1) for name, s in m.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
