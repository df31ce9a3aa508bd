"""Examples from JSON lines. Your own data: one JSON object a line, in any of three forms,

    {"prompt": "...", "response": "..."}
    {"messages": [{"role": "user", "content": "..."}, ...]}  system (optional), user, assistant, user, ...
    {"instruction": "...", "input": "...", "output": "..."}  Alpaca's keys; "input" may be empty

and in each of them, if need be,

    "answer": "..."                   what accuracy is measured against
    "system": "..."                   the system prompt; "" is an empty one, null or absence none
    "history": [[prompt, response]]   earlier turns
    "weight": 0 to 1, "train": false  of the row, or of an assistant's message: how much its answers count

The text is raw, the prompt format is applied when tokenizing. Every response of a conversation is learned.
What cannot be expressed (tools, thoughts, images) is refused, other fields are ignored. What is wrong is
named with its file, line and field. """
import codecs
import contextlib
import fcntl
import gzip
import importlib
import json
import math
import os
import random
import re
import zlib
from typing import NamedTuple

from config import ROOT, UserError

HERE = os.path.dirname(os.path.abspath(__file__))


class Example(NamedTuple):
    """A prompt and the response to learn, raw. history: earlier (prompt, response) turns, learned too.
    system: None for none, "" for an empty one. weights: of the answers, history's first; (): each counts
    1."""
    prompt: str
    response: str
    answer: str = ""
    history: tuple = ()
    system: str | None = None
    weights: tuple = ()


def load(name_or_path, split="train", allow_empty=False, skipped=None):
    """[Example] of a folder of data/ (its prepare.py runs if the file is missing), of another folder that has
    SPLIT.jsonl, or of a file of JSON lines, whatever the split. UserError: names the file, line and field,
    and how many rows are bad. allow_empty: responses may be empty (text to pretrain on); in a test set if
    there is an answer. skipped: a list that gets what is wrong with bad rows, which are then left out."""
    path = locate(os.fspath(name_or_path), split)
    examples = []
    bad = []  # what is wrong, a sentence a row
    for where, row in read_rows(path, bad):
        try:
            example = parse(row, where)
            only_asked = split == "test" and example.answer
            if not (example.response.strip() or allow_empty or only_asked):
                raise UserError(f"{where}: the response is empty, so there is nothing to learn (with "
                                "--prompt_weight=1 the prompt would be)")
            examples.append(example)
        except UserError as e:
            bad.append(str(e))
    if bad and skipped is None:
        raise UserError(f"{bad[0]} ({len(bad)} of {len(bad) + len(examples)} rows are bad; "
                        "--skip_bad_rows=True leaves them out)")
    if not examples and bad:
        raise UserError(f"{path} holds no examples but bad ones: {bad[0]}")
    if not examples:
        raise UserError(f"{path} holds no examples")
    if skipped is not None:
        seen = set(skipped)  # a file may be read for two splits
        skipped += [b for b in bad if b not in seen]
    return examples


def source(cfg, split):
    """(data set, its part) that a split is read from; None where it is held out of the training examples. A
    file brings no splits of its own, a folder of yours those whose files it has."""
    if split == "train":
        return cfg.dataset, split
    folder = not names_a_file(cfg.dataset)
    if folder and has(cfg.dataset, split) and not (split == "val" and cfg.val_dataset):
        return cfg.dataset, split
    if cfg.val_dataset:
        return cfg.val_dataset, split
    if folder and split == "test":
        return source(cfg, "val")
    return None


def has(folder, split):
    """Whether a folder brings this split: one of yours where the file is there, one of data/ always."""
    file = lambda split: os.path.isfile(os.path.join(folder, split + ".jsonl"))
    return file(split) or not file("train")


def hold_out(examples, fits, fraction):
    """(train, held out), as numbers of examples: this fraction of the questions, the same for every seed,
    drawn among the examples that fit; those that do not stay in train. Where nothing can be held out
    (fraction 0, a single question), all that fit are held out and trained on."""
    questions = list(map(question, examples))
    different = list(dict.fromkeys(q for q, fit in zip(questions, fits) if fit))
    n = max(0, min(math.ceil(fraction * len(different)), len(different) - 1))
    chosen = {different[i] for i in random.Random(0).sample(range(len(different)), n)}
    train, held_out = [], []
    for i, q in enumerate(questions):
        if q not in chosen or not fits[i]:
            train.append(i)
        if fits[i] and (n == 0 or q in chosen):
            held_out.append(i)
    return train, held_out


def question(e):
    """What makes an example another one: all but its answer, and white space; texts without a prompt are
    their own."""
    texts = [e.system or ""]
    for turn in e.history:
        texts += turn
    texts.append(e.prompt)
    if not e.prompt.strip():
        texts.append(e.response)
    return tuple(" ".join(text.split()) for text in texts)


def names_a_file(dataset):
    """Whether this is one file, which brings no splits of its own, and not a folder."""
    return os.path.isfile(dataset) or dataset.endswith(".jsonl")


def locate(name, split):
    """The file of JSON lines that `name` means."""
    if os.path.isfile(name):
        return name
    if os.path.isfile(os.path.join(name, split + ".jsonl")):
        return os.path.join(name, split + ".jsonl")
    path = os.path.join(HERE, name, split + ".jsonl")
    if name.endswith(".jsonl"):
        path = os.path.abspath(name)
    folder = os.path.dirname(path)
    if os.path.dirname(folder) != HERE or not os.path.isfile(os.path.join(folder, "prepare.py")):
        maker = os.path.join(os.path.dirname(name), "prepare.py")
        if os.path.isfile(os.path.join(ROOT, maker)):
            raise UserError(f"{name} has not been made yet: the head of {maker} says how")
        known = [f for f in sorted(os.listdir(HERE)) if os.path.isfile(os.path.join(HERE, f, "prepare.py"))]
        raise UserError(f"there is no {split!r} part of a data set {name!r}: give a JSON lines file or one "
                        f"of {', '.join(known)}")
    if not os.path.isfile(path):
        with alone(folder):
            if not os.path.isfile(path):
                importlib.import_module(f"data.{os.path.basename(folder)}.prepare").main()
    if not os.path.isfile(path):
        raise UserError(f"{os.path.relpath(folder)}/prepare.py makes no {os.path.basename(path)}")
    return path


@contextlib.contextmanager
def alone(folder):
    """Of all processes that come to this folder (torchrun's, another run) one is inside, others wait."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def read_rows(path, bad=None):
    """Yields ("FILE, line N", object) of a file of JSON lines; of one JSON list, ("FILE, item N", object).
    Gzipped or not. bad: a list that gets what is wrong with lines that cannot be read, instead of a
    UserError."""
    try:
        with open(path, "rb") as f:
            raw = f.read()
        if raw.startswith(b"\x1f\x8b"):
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"cannot read {path} ({getattr(e, 'strerror', None) or e})") from e
    raw = raw.removeprefix(codecs.BOM_UTF8)
    if raw.lstrip().startswith(b"["):
        for n, row in enumerate(parse_json(raw, path), 1):
            yield f"{path}, item {n}", row
        return
    for n, line in enumerate(raw.split(b"\n"), 1):  # not splitlines(): U+2028 may stand inside a string
        if not line.strip():
            continue
        where = f"{path}, line {n}"
        try:
            row = parse_json(line, where)
        except UserError as e:
            if bad is None:
                raise
            bad.append(str(e))
            continue
        yield where, row


def parse_json(raw, where):
    """The object that bytes of UTF-8 mean."""
    try:
        return json.loads(raw.decode())
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: not UTF-8 (byte {raw[e.start]:#x}); save it as UTF-8") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not JSON ({e})") from e


def parse(row, where):
    """A JSON object in one of the three forms -> Example."""
    if not isinstance(row, dict):
        raise UserError(f'{where}: has to be an object with "prompt" and "response", not {short(row)}')
    nothing_lost(row, "", where)
    answer = row.get("answer")
    if answer is None:
        answer = ""
    elif isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    answer = text_of(answer, "answer", where)
    system, turns, weights = turns_of(row, where)
    history = history_of(row, where)
    weights = [1.0] * len(history) + weights
    turns = history + turns
    weight = weight_of(row, ("weight", "train"), "", where)
    weights = tuple(weight * w for w in weights)
    if set(weights) == {1.0}:
        weights = ()
    if answer and len(turns) == 1 and not turns[0][0].strip() and not system:
        raise UserError(f'{where}: the prompt is empty, so there is nothing to "answer"')
    *earlier, (prompt, response) = turns
    return Example(prompt, response, answer, tuple(earlier), system, weights)


def turns_of(row, where):
    """-> (system or None, [(prompt, response)], [weight of each response]) of a row, whichever its form."""
    system = None
    if row.get("system") is not None:
        system = field(row, "system", where)
    if "messages" in row:
        own, turns, weights = from_messages(row["messages"], where)
        if own is None:
            own = system
        if system is not None and system != own:
            raise UserError(f'{where}: the field "system" is another than messages[0]: remove one of them')
        return own, turns, weights
    if "instruction" in row:
        prompt = field(row, "instruction", where)
        more = field(row, "input", where, "")
        if more:
            prompt += "\n\n" + more
        return system, [(prompt, field(row, "output", where))], [1.0]
    if "prompt" not in row and "response" not in row:
        raise UserError(f'{where}: the field "prompt" is missing (and so are "messages" and "instruction")')
    return system, [(field(row, "prompt", where), field(row, "response", where))], [1.0]


def history_of(row, where):
    """[(prompt, response)] of a row's earlier turns."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(t, list) and len(t) == 2 for t in history):
        raise UserError(f'{where}: the field "history" has to be [[prompt, response]], not {short(history)}')
    turns = []
    for i, (prompt, response) in enumerate(history):
        name = f"history[{i}]"
        turns.append((text_of(prompt, name, where), text_of(response, name, where)))
    not_empty(turns, "history", where)
    return turns


def from_messages(messages, where):
    """[{"role", "content"}], a system message or none, then user and assistant in turn, an assistant last ->
    (system or None, [(prompt, response)], [weight of each response])."""
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise UserError(f'{where}: the field "messages" has to be a list of {{"role", "content"}}, not '
                        f"{short(messages)}")
    texts, weights = [], []
    roles = ["user", "assistant"] * len(messages)
    if messages[0].get("role") == "system":
        roles = ["system", *roles]
    for i, (m, wanted) in enumerate(zip(messages, roles)):
        name = f"messages[{i}]."
        nothing_lost(m, name, where)
        texts.append(content_of(m.get("content"), name + "content", where))
        if m.get("role") != wanted:
            role = short(m.get("role"))
            raise UserError(f'{where}: the field "{name}role" has to be "{wanted}", not {role}')
        learned = wanted == "assistant"
        weight = weight_of(m, ("weight", "train", "training", "loss"), name, where, float(learned))
        if learned:
            weights.append(weight)
        elif weight:
            raise UserError(f"{where}: {name[:-1]} is to be learned, and only the assistant's messages are "
                            "(--prompt_weight counts for all others)")
    system = None
    if roles[0] == "system":
        system, *texts = texts
    if not texts or len(texts) % 2:
        raise UserError(f'{where}: the field "messages" has to end with an answer of the assistant')
    turns = list(zip(texts[::2], texts[1::2]))
    not_empty(turns[:-1], "messages", where)
    return system, turns, weights


# what a row or a message may hold and no prompt format here can say
LOST = ("tools", "functions", "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking",
        "images", "image", "videos", "video", "audios", "audio")


def nothing_lost(fields, name, where):
    """UserError: something of a row or a message would be dropped, and it would learn another text."""
    for key in LOST:
        if fields.get(key):
            raise UserError(f'{where}: the field "{name}{key}" holds {short(fields[key])}, which no '
                            "prompt_format here can say: write it into the texts, or remove it")


def weight_of(fields, keys, name, where, default=1.0):
    """How much the answers of a row or a message count: the product of what these fields say, each a bool or
    a number from 0 to 1."""
    given = [(key, fields[key]) for key in keys if fields.get(key) is not None]
    for key, value in given:
        if not isinstance(value, (bool, int, float)) or not 0 <= value <= 1:
            raise UserError(f'{where}: the field "{name}{key}" has to be true, false or a number from 0 '
                            f"to 1, not {short(value)}")
    if not given:
        return default
    return float(math.prod(value for _, value in given))


def content_of(value, name, where):
    """The text of a message: a string, or a list of {"type": "text", "text": ...}, which is joined."""
    if not isinstance(value, list):
        return text_of(value, name, where)
    for i, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise UserError(f'{where}: the field "{name}[{i}]" has to be {{"type": "text", "text": ...}}, '
                            f"not {short(part)}")
    return "".join(text_of(part.get("text"), f"{name}[{i}].text", where) for i, part in enumerate(value))


def not_empty(turns, name, where):
    for i, (_, response) in enumerate(turns, 1):
        if not response.strip():
            raise UserError(f'{where}: answer {i} in "{name}" is empty')


def field(row, name, where, default=None):
    """row[name], which has to be text; where there is a default, null means that."""
    if name not in row and default is None:
        raise UserError(f'{where}: the field "{name}" is missing')
    value = row.get(name)
    if value is None and default is not None:
        value = default
    return text_of(value, name, where)


def text_of(value, name, where):
    if not isinstance(value, str):
        raise UserError(f'{where}: the field "{name}" has to be text, not {short(value)}')
    if re.search("[\ud800-\udfff]", value):
        raise UserError(f'{where}: the field "{name}" holds half of a surrogate pair, which is no character')
    return value


def short(value):
    """For a message: value as JSON, its beginning where it is long."""
    text = json.dumps(value, ensure_ascii=True)
    if len(text) < 60:
        return text
    return text[:56] + " ..."
