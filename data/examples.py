"""Examples from JSON lines. Your own data: one JSON object a line, in any of three forms,

    {"prompt": "...", "response": "..."}                     optional "history": [[prompt, response]]
    {"messages": [{"role": "user", "content": "..."}, ...]}  system (optional), user, assistant, user, ...
    {"instruction": "...", "input": "...", "output": "..."}  Alpaca's keys; "input" may be empty

with an optional "answer" in each of them: what accuracy is measured against. Other fields are ignored. The
text is raw, the prompt format is applied when tokenizing. Every response of a conversation is learned. What
is wrong is named with its file, line and field.
"""
import contextlib
import fcntl
import importlib
import json
import math
import os
import random
import re
from typing import NamedTuple

from config import UserError

HERE = os.path.dirname(os.path.abspath(__file__))


class Example(NamedTuple):
    """A prompt and the response to learn, raw. history: earlier (prompt, response) turns, learned too."""
    prompt: str
    response: str
    answer: str = ""
    history: tuple = ()
    system: str = ""


def load(name_or_path, split="train", allow_empty=False):
    """[Example] of a folder of data/ (its prepare.py runs if the file is missing), of another folder that has
    SPLIT.jsonl, or of a file of JSON lines, whatever the split. UserError: names the file, line and field.
    allow_empty: responses may be empty (text to pretrain on); in a test set if there is an answer."""
    path = locate(os.fspath(name_or_path), split)
    examples = []
    for where, row in read_rows(path):
        example = parse(row, where)
        if not example.response.strip() and not allow_empty and not (split == "test" and example.answer):
            raise UserError(f"{where}: the response is empty, so there is nothing to learn (with "
                            "--prompt_weight=1 the prompt would be)")
        examples.append(example)
    if not examples:
        raise UserError(f"{path} holds no examples")
    return examples


def load_split(cfg, split):
    """[Example] of "train", "val" or "test" as a Config has it. A folder brings its own splits. Of a file,
    val_fraction of the prompts is held out, the same for every seed, and is both "val" and "test", or
    val_dataset is. Where nothing can be held out (val_fraction 0, a single prompt), both are the training
    examples."""
    is_file = names_a_file(cfg.dataset)
    empty = cfg.prompt_weight > 0
    if split == "val" and cfg.val_dataset or split == "test" and cfg.val_dataset and is_file:
        return load(cfg.val_dataset, split, empty)
    examples = load(cfg.dataset, split, empty)
    if not is_file or cfg.val_dataset:
        return examples

    def key(e):  # equal prompts stay on one side; texts without a prompt are their own
        return (e.system, e.history, e.prompt) if e.prompt.strip() else e

    keys = list(dict.fromkeys(map(key, examples)))
    n = min(math.ceil(cfg.val_fraction * len(keys)), len(keys) - 1)
    held_out = {keys[i] for i in random.Random(0).sample(range(len(keys)), n)}
    return [e for e in examples if n == 0 or (key(e) in held_out) == (split != "train")]


def names_a_file(dataset):
    """Whether this is one file, which brings no splits of its own, and not a folder."""
    return os.path.isfile(dataset) or dataset.endswith(".jsonl")


def locate(name, split):
    """The file of JSON lines that `name` means."""
    if os.path.isfile(name):
        return name
    if os.path.isfile(os.path.join(name, split + ".jsonl")):
        return os.path.join(name, split + ".jsonl")
    path = os.path.abspath(name) if name.endswith(".jsonl") else os.path.join(HERE, name, split + ".jsonl")
    folder = os.path.dirname(path)
    if os.path.dirname(folder) != HERE or not os.path.isfile(os.path.join(folder, "prepare.py")):
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


def read_rows(path):
    """Yields ("FILE, line N", object) of a file of JSON lines; of one JSON list, ("FILE, item N", object)."""
    try:
        with open(path, "rb") as f:
            raw = f.read()
        text = raw.decode("utf-8-sig")
    except OSError as e:
        raise UserError(f"cannot read {path} ({e.strerror})") from e
    except UnicodeDecodeError as e:
        line = raw[:e.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8 (byte {raw[e.start]:#x}); save it as UTF-8") from e
    if text.lstrip().startswith("["):
        for n, row in enumerate(parse_json(text, path), 1):
            yield f"{path}, item {n}", row
        return
    for n, line in enumerate(text.split("\n"), 1):  # not splitlines(): U+2028 may stand inside a string
        if line.strip():
            yield f"{path}, line {n}", parse_json(line, f"{path}, line {n}")


def parse_json(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not JSON ({e})") from e


def parse(row, where):
    """A JSON object in one of the three forms -> Example."""
    if not isinstance(row, dict):
        raise UserError(f'{where}: has to be an object with "prompt" and "response", not {short(row)}')
    answer = row.get("answer")
    if answer is None:
        answer = ""
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    answer = text_of(answer, "answer", where)
    if "messages" in row:
        return from_messages(row["messages"], answer, where)
    if "instruction" in row:
        prompt, more = field(row, "instruction", where), field(row, "input", where, "")
        return Example(prompt + ("\n\n" + more if more else ""), field(row, "output", where), answer)
    if "prompt" not in row and "response" not in row:
        raise UserError(f'{where}: the field "prompt" is missing (and so are "messages" and "instruction")')
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(t, list) and len(t) == 2 for t in history):
        raise UserError(f'{where}: the field "history" has to be [[prompt, response]], not {short(history)}')
    turns = tuple(tuple(text_of(t, f"history[{i}]", where) for t in turn) for i, turn in enumerate(history))
    not_empty(turns, "history", where)
    prompt, response = field(row, "prompt", where), field(row, "response", where)
    return Example(prompt, response, answer, turns, field(row, "system", where, ""))


def from_messages(messages, answer, where):
    """[{"role", "content"}]: a system message or none, then user and assistant in turn, an assistant last."""
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise UserError(f'{where}: the field "messages" has to be a list of {{"role", "content"}}, not '
                        f"{short(messages)}")
    named = [(f"messages[{i}]", m) for i, m in enumerate(messages)]
    texts = [text_of(m.get("content"), name + ".content", where) for name, m in named]
    system = texts.pop(0) if messages[0].get("role") == "system" else ""
    named = named[len(messages) - len(texts):]
    for i, (name, m) in enumerate(named):
        wanted = ("user", "assistant")[i % 2]
        if m.get("role") != wanted:
            role = short(m.get("role"))
            raise UserError(f'{where}: the field "{name}.role" has to be "{wanted}", not {role}')
    if not texts or len(texts) % 2:
        raise UserError(f'{where}: the field "messages" has to end with an answer of the assistant')
    turns = list(zip(texts[::2], texts[1::2]))
    not_empty(turns[:-1], "messages", where)
    return Example(*turns[-1], answer, tuple(turns[:-1]), system)


def not_empty(turns, name, where):
    for i, (_, response) in enumerate(turns, 1):
        if not response.strip():
            raise UserError(f'{where}: answer {i} in "{name}" is empty')


def field(row, name, where, default=None):
    """row[name], which has to be text; where there is a default, null means that."""
    if name not in row and default is None:
        raise UserError(f'{where}: the field "{name}" is missing')
    value = row.get(name)
    return text_of(default if value is None and default is not None else value, name, where)


def text_of(value, name, where):
    if not isinstance(value, str):
        raise UserError(f'{where}: the field "{name}" has to be text, not {short(value)}')
    if re.search("[\ud800-\udfff]", value):
        raise UserError(f'{where}: the field "{name}" holds half of a surrogate pair, which is no character')
    return value


def short(value):
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) < 60 else text[:56] + " ..."
