"""GSM8K: 7,473 + 1,319 grade-school word problems with worked answers (MIT; arXiv 2110.14168).

    python data/gsm8k/prepare.py [--source=DIR]

DIR holds gsm8k_train.jsonl and gsm8k_test.jsonl, or train.jsonl and test.jsonl as the originals are called.

Prompt: the question. Response: the published steps without their calculator notes <<48/2=24>>, ending in
"#### N". Answer: N without thousands separators. val.jsonl: 500 problems held out of the training set (seed
0); test.jsonl: all 1,319 test problems.
"""
import os
import re
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from data import download  # noqa: E402

URL = ("https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
       "grade_school_math/data/")
SHA256 = {"train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
          "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"}


def example(row):
    response = re.sub(r"<<[^<>]*>>", "", row["answer"])
    return {"prompt": row["question"], "response": response,
            "answer": response.rpartition("####")[2].strip().replace(",", "")}


def splits(source=None):
    """{"train", "val", "test": lists of examples}"""
    rows = {}
    for part in ("train", "test"):
        names, fields = [f"gsm8k_{part}.jsonl", f"{part}.jsonl"], ["question", "answer"]
        originals = download.records(names, fields, source, f"{URL}{part}.jsonl", sha256=SHA256[part])
        rows[part] = [example(row) for row in originals]
    train, val = download.split(rows["train"], 500, [rows["test"]])
    return {"train": train, "val": val, "test": rows["test"]}


def main(source=None):
    download.write_all(__file__, splits(source))


if __name__ == "__main__":
    download.run(main)
