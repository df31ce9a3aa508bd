"""WizardLM's evol-instruct: 70,000 instructions and ChatGPT's answers
(WizardLMTeam/WizardLM_evol_instruct_70k on the Hugging Face hub; its card states the licence).

    python data/instruct/prepare.py [--source=DIR]     # DIR holds alpaca_evol_instruct_70k.json

The published filter: an answer that contains "sorry" or "as an AI", in any case, is dropped (refusals); of
the others the first 52,000 that are short enough are for training, the next 3,000 held out. Short enough was
measured in the model's tokens (2,048); here it is 8,192 characters, about as much, and max_seq_len drops the
few longer ones later. Empty answers go too. The published score is MT-Bench's, which a judge model gives:
not in this repository. So of the 3,000, 2,000 are val.jsonl and 1,000 test.jsonl, to be scored by loss, or
read.
"""
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from data import download  # noqa: E402

REPO = "WizardLMTeam/WizardLM_evol_instruct_70k"
REFUSALS = ("sorry", "as an ai")
MAX_CHARACTERS = 8192
N_TRAIN, N_HELD_OUT = 52_000, 3_000


def keep(row):
    answer = row["output"].lower()
    return (answer.strip() and not any(phrase in answer for phrase in REFUSALS)
            and len(row["instruction"]) + len(answer) <= MAX_CHARACTERS)


def main(source=None):
    names, fields = ["alpaca_evol_instruct_70k.json"], ["instruction", "output"]
    originals = download.records(names, fields, source, repo=REPO)
    rows = [{"prompt": row["instruction"].strip(), "response": row["output"].strip()}
            for row in originals if keep(row)]
    print(f"dropped {len(originals) - len(rows):,} of {len(originals):,}: refusals, empty or long answers")
    rows = rows[:N_TRAIN + N_HELD_OUT]
    n_held_out = min(N_HELD_OUT, len(rows) // 10)
    train = rows[:len(rows) - n_held_out]
    held_out = download.unseen(rows[len(rows) - n_held_out:], train)
    n_test = len(held_out) // 3
    download.write_all(__file__, {"train": train, "val": held_out[n_test:], "test": held_out[:n_test]})


if __name__ == "__main__":
    download.run(main)
