"""Commonsense170K: 170,420 multiple-choice questions out of eight data sets, and their eight tests
(LLM-Adapters, arXiv 2304.01933; Apache-2.0).

    python data/commonsense/prepare.py [--source=DIR]

DIR is a copy of https://github.com/AGI-Edgerunners/LLM-Adapters, or a plain folder with
commonsense_170k.json (or llm_adapters_commonsense.json, or the part of it
llm_adapters_openbookqa_train.json) and, as far as there, NAME_test.json for the names below (or
llm_adapters_NAME_test.json, NAME in small letters).

Prompt: the instruction, which ends with the choices and the format of the answer; response: "the correct
answer is ..."; answer: its last word (true, answer3, ending1, solution2, option1). Training examples whose
prompt is in a test set are dropped and counted. val.jsonl: 1,000 questions held out of training (seed 0).
Tests: test_boolq.jsonl, ..., test_openbookqa.jsonl; test.jsonl is 1,000 of all eight, drawn with seed 0.
"""
import os
import random
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from data import download  # noqa: E402

TESTS = ["boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"]


def main(source=None):
    rows = download.llm_adapters(["commonsense_170k.json", "llm_adapters_commonsense.json",
                                  "llm_adapters_openbookqa_train.json"], source)
    tests = download.llm_adapters_tests(TESTS, source)
    train, val = download.split(rows, 1000, tests.values())
    test = [row for rows in tests.values() for row in rows]
    test = random.Random(0).sample(test, min(1000, len(test)))
    download.write_all(__file__, {f"test_{name}": rows for name, rows in tests.items()})
    # test.jsonl last: it says that all is there
    download.write_all(__file__, {"train": train, "val": val, "test": test})


if __name__ == "__main__":
    download.run(main)
