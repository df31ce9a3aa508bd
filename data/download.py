"""What every data/NAME/prepare.py shares: find or download an original file, hold some out, write JSON lines.

    records(["test.jsonl"], fields, source, url)  -> list of dicts, from a folder or from the publisher
    split(rows, n_val, tests)                     -> (train, val): seeded, and nothing that a test set holds
    write(__file__, "train", rows)                -> data/NAME/train.jsonl, whole or not at all
    run(main)                                     -> `python data/NAME/prepare.py [--source=DIR]`
"""
import gzip
import hashlib
import json
import os
import random
import sys
import urllib.request

from config import UserError


def records(names, fields, source=None, url=None, repo=None, sha256=None, optional=False):
    """The records of one original file. `names`: what it may be called, the published name first; `fields`:
    the texts that each record needs.

    With `source` it is read from that folder, under any of its names; else it comes from `url` over HTTPS, or
    from the data set `repo` on the Hugging Face hub. `optional`: when `source` lacks it, that is a note and
    an empty list, not an error. `sha256` is checked on a download only: a local copy may be a part of it.
    """
    if source is None:
        return parse(download(names[0], url, repo, sha256), names[0], fields)
    source = os.path.expanduser(source)
    if not os.path.isdir(source):
        raise UserError(f"--source={source} is not a directory; give the folder that holds {names[0]}")
    for name in names:
        path = os.path.join(source, name)
        if os.path.isfile(path):
            with open(path, "rb") as f:
                return parse(f.read(), path, fields)
    if optional:
        print(f"note: {source} has no {' or '.join(names)}; left out")
        return []
    raise UserError(f"{source} has no {' or '.join(names)}; put the file there "
                    f"(it is published at {url or hub_page(repo)})")


def download(name, url, repo, sha256):
    """The bytes of the published file. Whatever fails (no network, a renamed file), the remedy is one."""
    try:
        content = https_file(url) if url else hub_file(repo, name)
    except Exception as e:
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:160]
        raise UserError(f"cannot download {os.path.basename(name)} from {url or hub_page(repo)} ({reason}); "
                        "put it into a folder DIR and give --source=DIR to this data set's prepare.py") from e
    found = hashlib.sha256(content).hexdigest()
    if sha256 and found != sha256:
        raise UserError(f"{url} has sha256 {found}, not {sha256}: damaged, or changed since; "
                        f"try again, or check the file and give it with --source=DIR")
    return content


def https_file(url):
    with urllib.request.urlopen(url, timeout=60) as response:
        total, blocks, done = int(response.headers.get("Content-Length") or 0), [], 0
        while block := response.read(1 << 18):
            blocks.append(block)
            done += len(block)
            bar = f"[{'#' * (24 * done // total):24}] {100 * done // total:3d} % of" if total else ""
            sys.stderr.write(f"\r{os.path.basename(url)} {bar} {(total or done) / 1e6:.1f} MB")
    sys.stderr.write("\n")
    if done < total:
        raise OSError(f"the connection closed after {done} of {total} bytes")
    return b"".join(blocks)


def hub_file(repo, name):
    from huggingface_hub import hf_hub_download  # draws its own bar; the file stays in the user's hub cache
    with open(hf_hub_download(repo, name, repo_type="dataset"), "rb") as f:
        return f.read()


def hub_page(repo):
    return f"https://huggingface.co/datasets/{repo}"


def parse(content, name, fields):
    """A JSON array or JSON lines, gzipped or not: told by the content."""
    try:
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode()
        is_array = text.lstrip().startswith("[")
        rows = json.loads(text) if is_array else [json.loads(x) for x in text.split("\n") if x.strip()]
    except (ValueError, OSError, EOFError) as e:  # not UTF-8, not JSON, a cut gzip stream
        raise UserError(f"{name} is neither a JSON array nor JSON lines ({e}); fetch it again") from e
    if not rows:
        raise UserError(f"{name} holds no records; fetch it again")
    for i, row in enumerate(rows, 1):
        for field in fields:
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise UserError(f"{name}: record {i} has no text {field!r}; is this the file it should be?")
    return rows


LLM_ADAPTERS = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/main/"


def llm_adapters(names, source, path=None, optional=False):
    """Examples of a file of the LLM-Adapters repository: instruction, input, output and answer."""
    path = path or "ft-training_set/" + names[0]
    examples = []
    fields = ["instruction", "output"]
    for row in records([*names, path], fields, source, LLM_ADAPTERS + path, optional=optional):
        prompt = f"{row['instruction']}\n{row.get('input', '')}".strip()
        answer = str(row.get("answer", ""))
        examples.append({"prompt": prompt, "response": row["output"].strip(), "answer": answer})
    return examples


def llm_adapters_tests(names, source):
    """{name in small letters: examples} of those test sets that are there."""
    tests = {}
    for name in names:
        accepted = [f"{name}_test.json", f"llm_adapters_{name.lower()}_test.json"]
        tests[name.lower()] = llm_adapters(accepted, source, f"dataset/{name}/test.json", optional=True)
    return {name: examples for name, examples in tests.items() if examples}


def split(rows, n_val, tests=(), seed=0):
    """(train, val). Prompts that a test set holds are dropped; equal prompts stay on one side."""
    kept = unseen(rows, (row for test in tests for row in test))
    if len(kept) < len(rows):
        print(f"dropped {len(rows) - len(kept)} examples whose prompt is in a test set")
    prompts = sorted({row["prompt"] for row in kept})
    held_out = set(random.Random(seed).sample(prompts, min(n_val, len(prompts) // 10)))
    train = [row for row in kept if row["prompt"] not in held_out]
    return train, [row for row in kept if row["prompt"] in held_out]


def unseen(rows, others):
    """The rows whose prompt is none of the others'."""
    seen = {row["prompt"] for row in others}
    return [row for row in rows if row["prompt"] not in seen]


def write(prepare_file, name, rows, folder=""):
    """name.jsonl beside the prepare.py that asks, or in a folder there; under a temporary name first: whole or
    absent."""
    path = os.path.join(os.path.dirname(os.path.abspath(prepare_file)), folder, name + ".jsonl")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.{os.getpid()}.tmp", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f.name, path)
    print(f"wrote {os.path.relpath(path)}: {len(rows):,} examples")


def write_all(prepare_file, parts, folder=""):
    for name, rows in parts.items():
        write(prepare_file, name, rows, folder)


def run(main, **numbers):
    """The command line of a prepare.py: main(source=DIR or None). numbers: other options that it has, whole numbers
    from 1 up, and their defaults."""
    try:
        given = dict(source=None, **numbers)
        for flag in sys.argv[1:]:
            name, _, value = flag.removeprefix("--").partition("=")
            if not flag.startswith("--") or name not in given or not value:
                more = "".join(f" and --{number}={n}" for number, n in numbers.items())
                raise UserError(f"unknown option {flag}; there is --source=DIR, where the files lie{more}")
            if name not in numbers:
                given[name] = value
            elif value.isdecimal() and int(value):
                given[name] = int(value)
            else:
                raise UserError(f"{flag} has to be a whole number from 1 up")
        main(**given)
    except UserError as e:
        sys.exit(f"error: {e}")
