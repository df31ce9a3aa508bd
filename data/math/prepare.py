"""Math10K: 9,919 word problems with chain-of-thought answers, and the tests that go with it (LLM-Adapters,
arXiv 2304.01933; Apache-2.0).

    python data/math/prepare.py [--source=DIR]

DIR is a copy of https://github.com/AGI-Edgerunners/LLM-Adapters, or a plain folder with math_10k.json (or
llm_adapters_math.json) and, as far as there, gsm8k_test.json, SVAMP_test.json, mawps_test.json,
AQuA_test.json (or llm_adapters_NAME_test.json, NAME in small letters).

Prompt: the instruction; response: the steps; answer: a number, or a letter for AQuA. Training examples whose
prompt is in a test set are dropped and counted. val.jsonl: 200 problems held out of training (seed 0).
Tests: test_gsm8k.jsonl, test_svamp.jsonl, test_mawps.jsonl (the published mean is over these),
test_aqua.jsonl; test.jsonl is GSM8K's.
"""
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from data import download  # noqa: E402


def main(source=None):
    rows = download.llm_adapters(["math_10k.json", "llm_adapters_math.json"], source)
    tests = download.llm_adapters_tests(["gsm8k", "SVAMP", "mawps", "AQuA"], source)
    train, val = download.split(rows, 200, tests.values())
    test = tests.get("gsm8k") or [row for rows in tests.values() for row in rows]
    download.write_all(__file__, {f"test_{name}": rows for name, rows in tests.items()})
    # test.jsonl last: it says that all is there
    download.write_all(__file__, {"train": train, "val": val, "test": test})


if __name__ == "__main__":
    download.run(main)
