"""CodeFeedback: programming questions and code (m-a-p/CodeFeedback-Filtered-Instruction on the Hugging Face
hub, 156,526 examples, Apache-2.0), with OpenAI's HumanEval (MIT) as the test.

    python data/code/prepare.py [--source=DIR]

DIR holds CodeFeedback-Filtered-Instruction.jsonl and HumanEval.jsonl.gz (or HumanEval.jsonl).

As published: answers without a code block are dropped, of the others the first block is kept, with the text
before it; the first 100,000 that are short enough are for training, the next 1,000 for validation. Short
enough was measured in the model's tokens (1,024); here it is 4,096 characters, about as much, and
max_seq_len drops the few longer ones later. test.jsonl: the 164 functions to complete, with HumanEval's own
task_id, entry_point and test beside our fields; the response is the reference solution.
"""
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from data import download  # noqa: E402

REPO = "m-a-p/CodeFeedback-Filtered-Instruction"
TEST = ("https://raw.githubusercontent.com/openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/"
        "data/HumanEval.jsonl.gz")
TEST_SHA256 = "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"
MAX_CHARACTERS = 4096
N_TRAIN, N_VAL = 100_000, 1_000


def example(row):
    """With the answer's first code block, closed; None where there is none, or it is too long."""
    text, fence, rest = row["answer"].partition("```")
    response = f"{text}```{rest.partition('```')[0]}```".strip()
    if not fence or len(row["query"]) + len(response) > MAX_CHARACTERS:
        return None
    return {"prompt": row["query"].strip(), "response": response}


def test(source=None):
    """HumanEval alone: it serves evaluation without the 370 MB of the rest."""
    names, fields = ["HumanEval.jsonl.gz", "HumanEval.jsonl"], ["prompt", "canonical_solution", "test"]
    rows = download.records(names, fields, source, TEST, sha256=TEST_SHA256, optional=True)
    if rows:
        download.write(__file__, "test", [
            {"prompt": row["prompt"], "response": row["canonical_solution"], "task_id": row["task_id"],
             "entry_point": row["entry_point"], "test": row["test"]} for row in rows])


def main(source=None):
    test(source)
    originals = download.records([f"{REPO.partition('/')[2]}.jsonl"], ["query", "answer"], source, repo=REPO)
    rows = [row for row in map(example, originals) if row][:N_TRAIN + N_VAL]
    n_val = min(N_VAL, len(rows) // 10)
    train = rows[:len(rows) - n_val]
    download.write(__file__, "train", train)
    download.write(__file__, "val", download.unseen(rows[len(rows) - n_val:], train))


if __name__ == "__main__":
    download.run(main)
