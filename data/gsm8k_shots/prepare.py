"""GSM8K with some solved problems of its training set before each: with two, prompts are five times as long as answers.

    python data/gsm8k_shots/prepare.py [--source=DIR] [--shots=2]

Two make data/gsm8k_shots, another number N the folder data/gsm8k_shots/N (--dataset=data/gsm8k_shots/N). DIR as for
data/gsm8k/prepare.py, whose splits these are. The solved ones are drawn anew for each problem (seed 0).
Long context, few scored tokens: what context sparsity is made for.
"""
import os
import random
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from data import download  # noqa: E402
from data.gsm8k import prepare as gsm8k  # noqa: E402


def with_shots(rows, pool, rng, n):
    """Each row with n others of pool, solved, before its question."""
    out = []
    for row in rows:
        shots = [s for s in rng.sample(pool, n + 1) if s["prompt"] != row["prompt"]][:n]
        solved = "".join(f"Problem: {s['prompt']}\nSolution: {s['response']}\n\n" for s in shots)
        out.append({**row, "prompt": f"{solved}Problem: {row['prompt']}"})
    return out


def main(source=None, shots=2):
    folder = "" if shots == 2 else str(shots)
    splits, rng = gsm8k.splits(source), random.Random(0)
    download.write_all(__file__,
                       {name: with_shots(rows, splits["train"], rng, shots) for name, rows in splits.items()}, folder)


if __name__ == "__main__":
    download.run(main, shots=2)
