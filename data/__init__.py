"""From text to batches.

    load("gsm8k", "train") -> [Example]                     raw text (examples.py)
    tokenize(examples, tokenizer, ...) -> [Tokenized]       a weight for each token
    load_splits(cfg, tokenizer) -> {split: ([Example], [Tokenized])}   of a run
    collate([Tokenized], "output") -> Batch                 rows of one stream, without padding

weights[i] is how much the *prediction* of token i counts: 0 in a prompt, 1 in a response and its end-of-text
token. Position i predicts token i+1, so it is a loss position if weights[i+1] > 0, else context; the last
token predicts nothing and is left out. (The paper's code splits by label: there the position that predicts
the first answer token is computed sparsely, and the last, useless one densely.)
"""
import random
import re
from itertools import groupby
from typing import NamedTuple, Optional

import numpy as np
import torch

from config import UserError
from data.examples import Example, hold_out, load, question, source  # noqa: F401 (offered here)
from data.tokenizer import HOLE


class Tokenized(NamedTuple):
    """tokens: [int]; weights: [float], how much the prediction of each token counts."""
    tokens: list
    weights: list


class Batch(NamedTuple):
    """T rows, one for each token of B examples but their last, in the order
    [sparse, no loss | sparse, loss | dense, loss | dense, no loss], so that what is sparse and what is in the loss are
    each one range of rows. (split = "output" has no row that is both.) T_loss: how many are in the loss. Integers are
    int64, weights float32."""
    tokens: torch.Tensor  # (T,)
    targets: torch.Tensor  # (T_loss,) the token that follows each loss row
    weights: torch.Tensor  # (T_loss,)
    positions: torch.Tensor  # (T,) place in its example
    places: torch.Tensor  # (T,) place in the (B, S) grid that attention needs: b * S + position
    n_sparse: int  # rows 0 to n_sparse are sparse
    loss: slice  # the rows in the loss
    lengths: tuple  # rows of each example
    # where sparse rows have no queries, or few a backward, those of the dense rows have a grid of their own, (B, Sd):
    dense_places: Optional[torch.Tensor] = None  # (T - n_sparse,) b * Sd + number among the example's dense rows
    dense_positions: Optional[torch.Tensor] = None  # (B, Sd) place in its example
    dense_lengths: tuple = ()  # dense rows of each example

    @property
    def shape(self):
        """(B, S) of the grid."""
        return len(self.lengths), max(self.lengths)

    def to(self, device):
        """Pinned first where device is a GPU: the host waits for a copy from pageable memory."""
        def move(x):
            if not isinstance(x, torch.Tensor):
                return x
            if torch.device(device).type == "cuda" and not x.is_cuda:
                x = x.pin_memory()
            return x.to(device, non_blocking=True)
        return Batch(*map(move, self))


# ---- prompt formats: plain functions of strings. system: None for none, "" for an empty turn where a format
# has one; first: it opens the text; later turns follow an end of text

def plain(prompt, system=None, first=True):
    if system:
        return f"{system}\n\n{prompt}"
    return prompt


def alpaca(prompt, system=None, first=True):
    """Stanford Alpaca's for rows without an input, which LLM-Adapters uses too (here an input follows the
    instruction). A system prompt replaces its first two sentences."""
    text = f"\n\n### Instruction:\n{prompt}\n\n### Response:\n"
    if not first:
        return text
    intro = system or ("Below is an instruction that describes a task. Write a response that appropriately "
                       "completes the request.")
    return intro + text


def llama3(prompt, system=None, first=True):
    """Meta-Llama-3-Instruct's: like its template, it takes the white space off both ends of every text."""
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    start = ""
    if first:
        start += "<|begin_of_text|>"
    if system is not None:
        start += head.format("system") + system.strip() + "<|eot_id|>"
    return start + head.format("user") + prompt.strip() + "<|eot_id|>" + head.format("assistant")


def chatml(prompt, system=None, first=True):
    """Qwen's and SmolLM2's. A checkpoint's default system prompt is not here but in `tokenizer.system`."""
    start = ""
    if not first:
        start += "\n"
    if system is not None:
        start += f"<|im_start|>system\n{system}<|im_end|>\n"
    return start + f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


FORMATS = {"plain": plain, "alpaca": alpaca, "llama3": llama3, "chatml": chatml}
ENDS = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>"}


# ---- tokenizing

def encode_turns(example, tokenizer, prompt_format):
    """Yields (prompt ids, response ids) of each turn, the latter with their end-of-text token, or [] where
    the response is empty. Special tokens count in templates, not in texts. UserError: no such format, the
    tokenizer lacks a special token of it, or names no end-of-text token."""
    if prompt_format not in FORMATS:
        raise UserError(f"prompt_format has to be one of {', '.join(FORMATS)}, not {prompt_format!r}")
    end, special = end_token(tokenizer, prompt_format), tokenizer.special.values()
    trim = str.strip if prompt_format == "llama3" else str
    system = example.system
    if prompt_format not in ENDS:  # no turns: an empty system prompt is none
        system = system or None
    elif prompt_format == "chatml" and system is None:
        system = tokenizer.system or None
    for i, (prompt, response) in enumerate([*example.history, (example.prompt, example.response)]):
        texts = [trim(prompt)] if system is None or i else [trim(system), trim(prompt)]
        template = FORMATS[prompt_format](HOLE, HOLE if len(texts) == 2 else None, i == 0)
        ids = tokenizer.encode_template(template, texts, i == 0)
        if i == 0 and tokenizer.bos is not None and ids[:1] != [tokenizer.bos]:
            ids = [tokenizer.bos] + ids
        opens = not ids or ids[-1] in special and (i == 0 or tokenizer.legacy)  # no text stands before it
        to_ids = tokenizer.encode if opens else tokenizer.go_on
        yield ids, to_ids(trim(response)) + [end] if trim(response) else []


def end_token(tokenizer, prompt_format):
    """The id that ends a response: the chat format's own, else the checkpoint's. UserError: there is none."""
    end = tokenizer.special.get(ENDS.get(prompt_format), tokenizer.eot)
    if end is None:
        raise UserError("the model names no end-of-text token: give its config.json an eos_token_id")
    return end


def notes(tokenizer, prompt_format, max_new_tokens):
    """{str: str}: what whoever asks the trained model has to know, kept in the header of its weights' file
    (which moves with them): how prompts are written, and what ends an answer."""
    end = end_token(tokenizer, prompt_format)
    return dict(prompt_format=prompt_format, max_new_tokens=str(max_new_tokens), end_id=str(end),
                end_token=tokenizer.decode([end], first=False))


def tokenize(examples, tokenizer, max_seq_len, prompt_format="plain", prompt_weight=0.0, train_on="all"):
    """[Example] -> [Tokenized], in order, without those longer than max_seq_len or with nothing scored.
    UserError: nothing is left."""
    made = [encode(e, tokenizer, max_seq_len, prompt_format, prompt_weight, train_on) for e in examples]
    return some_left(examples, [t for t in made if t], max_seq_len, prompt_weight, train_on)


def some_left(examples, tokenized, max_seq_len, prompt_weight, train_on):
    if not tokenized:
        found = statistics(examples, tokenized, prompt_weight, train_on)
        raise UserError(f"no example is left to learn from ({found}; max_seq_len is {max_seq_len})")
    return tokenized


def encode(example, tokenizer, max_seq_len, prompt_format="plain", prompt_weight=0.0, train_on="all"):
    """The Tokenized of an example; None if it is longer than max_seq_len, or nothing in it is scored. Prompt
    tokens weigh prompt_weight, responses and their end-of-text tokens what the example says, usually 1. An
    empty response gets no end-of-text token: it makes a text to pretrain on, not an answer."""
    tokens, weights = [], []
    turns = encode_turns(example, tokenizer, prompt_format)
    for (prompt, answer), weight in zip(turns, answer_weights(example, train_on)):
        tokens += prompt + answer
        weights += [float(prompt_weight)] * len(prompt) + [weight] * len(answer)
    if len(tokens) > max_seq_len or not any(weights[1:]):
        return None
    return Tokenized(tokens, weights)


def answer_weights(example, train_on="all"):
    """How much each answer of a conversation counts. train_on "last": only the last one."""
    weights = example.weights or (1.0,) * (len(example.history) + 1)
    if train_on == "all":
        return weights
    return (0.0,) * len(example.history) + weights[-1:]


def load_splits(cfg, tokenizer, splits=("train", "val", "test"), train_on="all", skipped=None):
    """{split: ([Example], [Tokenized])} as a Config has them. What is held out of the training examples is
    drawn among those that are not dropped, which takes all their tokens. skipped: as of load. UserError: bad
    rows, or a split of which nothing is left (but for a test set of questions and answers, without
    responses)."""
    def read(name, part):
        examples = load(name, part, cfg.prompt_weight > 0, skipped)
        how = cfg.max_seq_len, cfg.prompt_format, cfg.prompt_weight, train_on
        return examples, [encode(e, tokenizer, *how) for e in examples]

    held_out = [split for split in ("val", "test") if source(cfg, split) is None]
    out, parts = {}, {}  # parts: numbers of examples
    if held_out:
        examples, made = read(*source(cfg, "train"))
        train, held = hold_out(examples, [t is not None for t in made], cfg.val_fraction)
        parts = {"train": train, "val": held, "test": held}
    for split in splits:
        if split in (held_out and ["train", *held_out]):
            pairs = [(examples[i], made[i]) for i in parts[split]]
        else:
            pairs = list(zip(*read(*source(cfg, split))))
        mine, kept = [e for e, _ in pairs], [t for _, t in pairs if t]
        if split != "test" or any(e.response for e in mine):
            some_left(mine, kept, cfg.max_seq_len, cfg.prompt_weight, train_on)
        out[split] = mine, kept
    return out


def prompt_ids(example, tokenizer, prompt_format="plain"):
    """[int]: what generation starts from, the very ids that `encode` puts before the last response."""
    turns = encode_turns(example._replace(response=""), tokenizer, prompt_format)
    return [i for prompt, answer in turns for i in prompt + answer]


def statistics(examples, tokenized, prompt_weight=0.0, train_on="all", trained=()):
    """One line: what `tokenize` made of the examples, what it dropped, and how many ask what one of the
    examples `trained` asks, but for white space."""
    rows = sum(len(t.tokens) - 1 for t in tokenized)
    scored = sum(w > 0 for t in tokenized for w in t.weights[1:])
    dropped = len(examples) - len(tokenized)
    empty = 0 if prompt_weight else sum(not any(scored_answers(e, train_on)) for e in examples)
    line = f"{len(tokenized):,} examples of {rows + len(tokenized):,} tokens"
    if rows:
        line += (f" (longest {max(len(t.tokens) for t in tokenized)}), {1 - scored / rows:.1%} context, "
                 f"{scored / rows:.1%} scored")
    if dropped:
        line += f"; dropped: {dropped - empty:,} too long, {empty:,} nothing scored"
    seen = set(map(question, trained))
    known = sum(question(e) in seen for e in examples if seen)
    if known:
        line += f"; {known:,} of them are training rows (equal but for white space)"
    return line


def scored_answers(example, train_on):
    """The answers of a conversation that are learned."""
    texts = [response for _, response in example.history] + [example.response]
    return [text for text, weight in zip(texts, answer_weights(example, train_on)) if weight]


def marked(tokenized, tokenizer):
    """The text of a Tokenized, its scored part in [[ ]]. What only looks like a special token says so."""
    text = ""
    for scored, run in groupby(zip(tokenized.tokens, tokenized.weights), key=lambda pair: pair[1] > 0):
        part = tokenizer.decode([token for token, _ in run], first=not text, mark=True)
        if scored:
            part = f"[[{part}]]"
        text += part
    return text


# ---- batches

def batches(lengths, batch_size, seed, epoch, window=32):
    """[[int]]: the examples of each step of an epoch, every one once; one batch may be smaller. Those of like
    length meet, for the grid of attention is as wide as its longest row: the order is drawn, sorted within
    every `window` batches, cut, and the batches are shuffled. A pure function of its arguments."""
    rng = random.Random(f"{seed} {epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    out = []
    for i in range(0, len(order), window * batch_size):
        near = sorted(order[i:i + window * batch_size], key=lambda j: lengths[j])
        out += [near[j:j + batch_size] for j in range(0, len(near), batch_size)]
    rng.shuffle(out)
    return out


def collate(tokenized, split="output", seed=0, dense_first=4):
    """[Tokenized] -> Batch. split: which rows are dense. "output": those in the loss; "none": none; "random":
    as many as "output" has, drawn by seed; "rectangle" (the paper's code): from the shortest prompt of the
    batch to its last output. The first dense_first tokens of each text are dense too, in every split: some of them
    are attention sinks, whose activations are far from all others'."""
    lengths = np.array([len(t.tokens) - 1 for t in tokenized])
    tokens = np.concatenate([t.tokens[:-1] for t in tokenized]).astype(np.int64)  # (T,), as all that follow
    targets = np.concatenate([t.tokens[1:] for t in tokenized]).astype(np.int64)
    weights = np.concatenate([t.weights[1:] for t in tokenized]).astype(np.float32)
    positions = np.concatenate([np.arange(n) for n in lengths])
    first_places = np.arange(len(lengths)) * lengths.max()  # (B,)
    places = np.repeat(first_places, lengths) + positions

    scored = weights > 0
    n_loss = int(scored.sum())
    if split == "output":
        dense = scored.copy()
    elif split == "none" or n_loss == 0:
        dense = np.zeros_like(scored)
    elif split == "random":
        rest = np.flatnonzero(positions >= dense_first)
        dense = np.zeros_like(scored)
        dense[np.random.default_rng(seed).permutation(rest)[:n_loss]] = True
    elif split == "rectangle":
        dense = (positions >= positions[scored].min()) & (positions <= positions[scored].max())
    else:
        raise UserError(f"split has to be output, none, random or rectangle, not {split!r}")
    dense |= positions < dense_first

    kinds = [~dense & ~scored, ~dense & scored, dense & scored, dense & ~scored]  # in Batch's order
    group = np.select(kinds, [0, 1, 2, 3])
    order = np.argsort(group, kind="stable")
    before_loss = int((group == 0).sum())
    n_sparse = int((group < 2).sum())
    loss = slice(before_loss, before_loss + n_loss)
    in_loss = order[loss]  # (T_loss,)
    dense_places, dense_positions, dense_lengths = grid_of_dense(dense, lengths, positions)
    return Batch(
        tokens=torch.from_numpy(tokens[order]),
        targets=torch.from_numpy(targets[in_loss]),
        weights=torch.from_numpy(weights[in_loss]),
        positions=torch.from_numpy(positions[order]),
        places=torch.from_numpy(places[order]),
        n_sparse=n_sparse,
        loss=loss,
        lengths=tuple(lengths.tolist()),
        dense_places=torch.from_numpy(dense_places[order[n_sparse:]]),
        dense_positions=torch.from_numpy(dense_positions),
        dense_lengths=dense_lengths)


def grid_of_dense(dense, lengths, positions):
    """dense (T,): which tokens, example after example, run dense -> place of each in a grid of the dense ones, (T,), -1
    for the others; their positions in that grid, (B, Sd); how many each example has."""
    example = np.repeat(np.arange(len(lengths)), lengths)  # (T,)
    counts = np.bincount(example[dense], minlength=len(lengths))  # (B,)
    before = np.cumsum(counts) - counts  # (B,) dense tokens of earlier examples
    number = np.cumsum(dense) - 1 - before[example]  # (T,) among those of its example
    width = max(1, counts.max())
    places = np.where(dense, example * width + number, -1)
    grid = np.zeros(len(lengths) * width, dtype=np.int64)
    grid[places[dense]] = positions[dense]
    return places, grid.reshape(-1, width), tuple(counts.tolist())


# ---- answers

def is_correct(text, answer):
    """Whether a generated text gives the answer. A number: the stated one, within 1e-3. Words: the rest of
    the line after the first "####", or what follows the last "answer is", or the whole text, but for case,
    spaces and punctuation around it."""
    wanted = number(answer)
    if wanted is not None:
        found = stated_number(text)
        return found is not None and abs(found - wanted) <= 1e-3
    if "####" in text:
        said = text.split("####")[1].strip().split("\n")[0]
    else:
        said = re.split("answer is:?", text, flags=re.IGNORECASE)[-1]
    return bare(said) == bare(answer) != ""


def stated_number(text):
    """The number that stands right after a "####", the first such: what follows it may be run-on text.
    Without one, the last number of the text; None where there is none. Commas are left out."""
    text, pattern = text.replace(",", ""), r"-?\d+(?:\.\d+)?|-?\.\d+"
    found = re.search(rf"####[^\w-]*?({pattern})", text)
    found = [found[1]] if found else re.findall(pattern, text)
    return float(found[-1]) if found else None


def number(text):
    """The float that a text is, with thousands' commas, $ or % or not; else None."""
    text = text.strip().replace(",", "").strip("$% ")
    if re.fullmatch(r"-?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", text):
        return float(text)
    return None


def bare(text):
    return " ".join(text.lower().split()).strip(" .,:;!?\"'`*()[]")
