"""The data sets: each prepare.py on a small made-up folder of originals, on the real files where they are at
hand, and the generator of the embedded default. No network. python -m pytest tests/test_prepare.py"""
import gzip
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from config import UserError
from data import download

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.environ.get("SPARSELORA_ORIGINALS", os.path.join(ROOT, "..", "shared", "data"))
real_files = pytest.mark.skipif(not os.path.isdir(SHARED), reason="no folder of original data sets at hand")


def prepare(name, tmp_path):
    """A copy of data/NAME/prepare.py as a module: it writes beside the copy and not into the repository."""
    folder = tmp_path / "data" / name
    folder.mkdir(parents=True)
    copy = shutil.copy(os.path.join(ROOT, "data", name, "prepare.py"), folder)
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", copy)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module, folder


def read(path):
    with open(path, encoding="utf-8") as f:  # not str.splitlines: GSM8K's texts hold U+2028, no end of a line
        return [json.loads(line) for line in f]


def originals(tmp_path, **files):
    """A folder with these files; a name's double underscore is a dot."""
    folder = tmp_path / "originals"
    folder.mkdir()
    for name, rows in files.items():
        name = name.replace("__", ".")
        text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(folder)


# --- published data sets

def gsm8k_rows(n, word):
    return [{"question": f"What do {i} {word} cost?",
             "answer": f"It is 2*{i}=$<<2*{i}={2 * i}>>{2 * i}.\n#### {1000 + i:,}"} for i in range(n)]


def test_gsm8k_shots(tmp_path):
    """The problem itself comes last and is not among the two that are solved before it."""
    module, folder = prepare("gsm8k_shots", tmp_path)
    source = originals(tmp_path, gsm8k_train__jsonl=gsm8k_rows(540, "pens"), gsm8k_test__jsonl=gsm8k_rows(5, "cups"))
    module.main(source, shots=3)
    assert all(row["prompt"].count("Solution: ") == 3 for row in read(folder / "3" / "test.jsonl"))
    assert not (folder / "test.jsonl").exists()
    module.main(source)
    for split in ("train", "val", "test"):
        for row in read(folder / f"{split}.jsonl"):
            *shots, own = row["prompt"].split("\n\n")
            questions = [s.partition("\nSolution: ")[0] for s in shots]
            assert len(shots) == 2 and own not in questions and all("pens" in s and "\n#### 1" in s for s in shots)
            assert own.startswith("Problem: What do ") and row["response"].startswith(f"It is 2*{own.split()[3]}=")


def test_gsm8k(tmp_path):
    module, folder = prepare("gsm8k", tmp_path)
    rows = {"gsm8k_train__jsonl": gsm8k_rows(30, "pens"), "test__jsonl": gsm8k_rows(4, "cups")}
    source = originals(tmp_path, **rows)
    module.main(source=source)
    test, train, val = (read(folder / f"{name}.jsonl") for name in ("test", "train", "val"))
    assert test[3] == {"prompt": "What do 3 cups cost?", "response": "It is 2*3=$6.\n#### 1,003",
                       "answer": "1003"}
    assert (len(train), len(val)) == (27, 3) and not {r["prompt"] for r in train} & {r["prompt"] for r in val}
    assert sorted(os.listdir(folder)) == ["prepare.py", "test.jsonl", "train.jsonl", "val.jsonl"]


def adapters_rows(n, word, answer="3.0"):
    return [{"instruction": f"Question {word} {i}", "input": "", "output": f"\nA: so {i}. ", "answer": answer}
            for i in range(n)]


def test_math(tmp_path, capsys):
    module, folder = prepare("math", tmp_path)
    train = adapters_rows(40, "train") + adapters_rows(2, "SVAMP")  # two that a test set holds too
    source = originals(tmp_path, llm_adapters_math__json=train, gsm8k_test__json=adapters_rows(3, "gsm8k"),
                       llm_adapters_svamp_test__json=adapters_rows(5, "SVAMP", answer=3))
    module.main(source=source)
    out = capsys.readouterr().out
    assert "dropped 2 examples" in out and "AQuA_test.json" in out and "mawps_test.json" in out
    assert len(read(folder / "train.jsonl")) == 36 and len(read(folder / "val.jsonl")) == 4
    assert read(folder / "train.jsonl")[0]["response"].startswith("A: so ")
    assert read(folder / "test.jsonl") == read(folder / "test_gsm8k.jsonl")
    assert read(folder / "test_svamp.jsonl")[0]["answer"] == "3" and not (folder / "test_aqua.jsonl").exists()


def test_commonsense_reads_a_copy_of_the_repository(tmp_path):
    module, folder = prepare("commonsense", tmp_path)
    for path, rows in {"ft-training_set/commonsense_170k.json": adapters_rows(20, "train", "answer4"),
                       "dataset/ARC-Easy/test.json": adapters_rows(3, "easy", "answer1"),
                       "dataset/boolq/test.json": adapters_rows(2, "bool", "true")}.items():
        path = tmp_path / "LLM-Adapters" / path
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(rows))
    module.main(source=str(tmp_path / "LLM-Adapters"))
    assert len(read(folder / "test_arc-easy.jsonl")) == 3 and len(read(folder / "test.jsonl")) == 5
    assert len(read(folder / "train.jsonl")) == 18


def test_code(tmp_path):
    module, folder = prepare("code", tmp_path)
    answer = "Here:\n```python\nx = {}\n```\nand\n```python\ny\n```\nend"
    rows = [{"query": f"Write {i}", "answer": answer.format(i)} for i in range(20)]
    rows[19]["query"] = "Write 3"  # held out, but trained on: dropped
    rows += [{"query": "no code", "answer": "text"}, {"query": "long", "answer": f"```\n{'x' * 5000}\n```"}]
    human = [{"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n",
              "entry_point": "f", "test": "def check(f): assert f() == 1"}]
    files = {"CodeFeedback-Filtered-Instruction__jsonl": rows, "HumanEval__jsonl__gz": human}
    module.main(source=originals(tmp_path, **files))
    train, val, test = (read(folder / f"{name}.jsonl") for name in ("train", "val", "test"))
    assert (len(train), len(val)) == (18, 1)
    assert train[0] == {"prompt": "Write 0", "response": "Here:\n```python\nx = 0\n```"}
    assert test[0]["prompt"] == "def f():\n" and test[0]["entry_point"] == "f"


def test_instruct_filter(tmp_path, capsys):
    module, folder = prepare("instruct", tmp_path)
    rows = [{"instruction": f"Do {i}", "output": f"Done {i}"} for i in range(30)]
    rows[29]["instruction"] = "Do 3"  # held out, but trained on: dropped
    for output in ("I'm Sorry, but", "Well, as an AI I", " ", "x" * 9000):
        rows.append({"instruction": "Do it", "output": output})
    module.main(source=originals(tmp_path, alpaca_evol_instruct_70k__json=rows))
    assert "dropped 4 of 34" in capsys.readouterr().out
    parts = [read(folder / f"{name}.jsonl") for name in ("train", "val", "test")]
    assert [len(part) for part in parts] == [27, 2, 0]


@real_files
@pytest.mark.parametrize("name, sizes", [("gsm8k", {"train": 6973, "val": 500, "test": 1319}),
                                         ("math", {"test_gsm8k": 1319}), ("commonsense", {"test_boolq": 3270})])
def test_on_the_real_files(name, sizes, tmp_path):
    module, folder = prepare(name, tmp_path)
    module.main(source=SHARED)
    parts = {path.stem: read(path) for path in folder.glob("*.jsonl")}
    assert sizes.items() <= {part: len(rows) for part, rows in parts.items()}.items()
    prompts = {part: {row["prompt"] for row in rows} for part, rows in parts.items()}
    train, val, test = (prompts[part] for part in ("train", "val", "test"))
    assert not train & val and not (train | val) & test
    for row in parts["train"] + parts["val"]:
        assert row["prompt"].strip() and row["response"].strip() and row["answer"] and "<<" not in row["response"]


@real_files
def test_checksums_are_those_of_the_originals(tmp_path):
    pinned = {f"gsm8k_{part}.jsonl": digest for part, digest in prepare("gsm8k", tmp_path)[0].SHA256.items()}
    pinned["HumanEval.jsonl.gz"] = prepare("code", tmp_path)[0].TEST_SHA256
    for name, digest in pinned.items():
        with open(os.path.join(SHARED, name), "rb") as f:
            assert hashlib.sha256(f.read()).hexdigest() == digest


# --- downloads and mistakes

def serve(content, length=None):
    class Response:
        headers = {"Content-Length": str(len(content) if length is None else length)}

        def __init__(self):
            self.blocks = [content[i:i + 1000] for i in range(0, len(content), 1000)]

        def read(self, size):
            return self.blocks.pop(0) if self.blocks else b""

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass
    return lambda url, timeout: Response()


def test_download_is_checked(monkeypatch, capsys):
    content = json.dumps(gsm8k_rows(200, "pens")).encode()
    ask = lambda **more: download.records(["a.json"], ["question"], url="https://x.org/a.json", **more)
    monkeypatch.setattr(download.urllib.request, "urlopen", serve(content))
    assert len(ask(sha256=hashlib.sha256(content).hexdigest())) == 200
    assert "100 %" in capsys.readouterr().err
    with pytest.raises(UserError, match="has sha256"):
        ask(sha256="0" * 64)
    monkeypatch.setattr(download.urllib.request, "urlopen", serve(content, len(content) + 1))
    with pytest.raises(UserError, match="closed after .* put it into a folder DIR and give --source=DIR"):
        ask()


@pytest.mark.parametrize("name, file", [("gsm8k", "gsm8k_train.jsonl"), ("math", "math_10k.json"),
                                        ("commonsense", "commonsense_170k.json"), ("code", "HumanEval.jsonl.gz"),
                                        ("instruct", "alpaca_evol_instruct_70k.json")])
def test_offline_names_the_file(name, file, tmp_path, monkeypatch):
    module, folder = prepare(name, tmp_path)

    def no_network(*args, **kwargs):
        raise OSError("no such host")
    monkeypatch.setattr(download, "https_file", no_network)
    monkeypatch.setattr(download, "hub_file", no_network)
    with pytest.raises(UserError) as e:
        module.main()
    assert file in str(e.value) and "--source=DIR" in str(e.value) and "\n" not in str(e.value)
    assert os.listdir(folder) == ["prepare.py"]


def test_wrong_sources(tmp_path):
    module, _ = prepare("gsm8k", tmp_path)
    with pytest.raises(UserError, match="is not a directory"):
        module.main(source=str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no gsm8k_train.jsonl or train.jsonl; put the file there"):
        module.main(source=str(tmp_path / "empty"))
    bad = tmp_path / "empty" / "train.jsonl"
    for content, message in ((b"", "no records"), (b"\xff\xfe", "neither"), (b"{]", "neither"),
                             (b"\x1f\x8b00", "neither"), (b'{"question": 3, "answer": "x"}', "record 1 has no text 'question'"),
                             (b'["x"]', "record 1 has no text")):
        bad.write_bytes(content)
        with pytest.raises(UserError, match=message):
            module.main(source=str(tmp_path / "empty"))


def test_command_line(tmp_path):
    command = [sys.executable, os.path.join(ROOT, "data", "instruct", "prepare.py")]
    for flag, message in (("--sorce=x", "unknown option --sorce=x"),
                          (f"--source={tmp_path}", "alpaca_evol_instruct_70k.json")):
        done = subprocess.run([*command, flag], cwd=tmp_path, capture_output=True, text=True)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and message in last and "Traceback" not in done.stderr


# --- the embedded default

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return prepare("tiny", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def generated(tiny):
    module, folder = tiny
    module.main()
    base = {f"base_{name}": rows for name, rows in module.base_splits().items()}
    lists = {f"lists_{name}": rows for name, rows in module.lists_splits().items()}
    lists |= {f"lists_base_{name}": rows for name, rows in module.lists_base_splits().items()}
    return base | lists | {path.stem: read(path) for path in folder.glob("*.jsonl")}


def test_generator_is_deterministic(tiny, generated):
    """Pinned: the shipped weights, and every result that names this data, rest on exactly these examples."""
    _, folder = tiny
    lines = {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in generated.items()}
    assert {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in lines.items()} == PINNED
    for base in ("base", "untrained"):
        for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
            with open(os.path.join(ROOT, "data", "tiny", base, name)) as f:
                assert json.load(f) == json.loads((folder / base / name).read_text()), f"{base}/{name}"


PINNED = {
    "base_test": "27f72c391ad00f42",
    "base_train": "81831156c1acc608",
    "base_val": "611875668be7de85",
    "lists_base_test": "f1c60fc414fd4ffe",
    "lists_base_train": "a5a7e8a711b4b83f",
    "lists_base_val": "7c5cd4113d6ac214",
    "lists_test": "0add1118e933b127",
    "lists_train": "45a4fc2a1f73de01",
    "lists_val": "83103a9430f6f5fa",
    "test": "5588f28a9cf3074b",
    "train": "7aa638e9e316c945",
    "val": "9d5afec1c9996bcd",
}


def test_generated_steps_are_right(generated):
    for name in ("train", "val", "test", "base_train", "base_val", "base_test"):
        for row in generated[name]:
            if name.startswith("base") and row["prompt"].startswith("Story:"):
                assert row == {"prompt": row["prompt"], "response": ""}
                continue
            worked, _, answer = row["response"].partition("\n#### ")
            steps = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)\.", worked)
            assert worked == "".join(" {} {} {} = {}.".format(*step) for step in steps)
            for a, operation, b, c in steps:
                assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[operation] == int(c) > 0
            assert answer == row["answer"] == steps[-1][3]
            numbers = set(re.findall(r"\d+", row["prompt"]))
            words = {"twice": "2", "three times": "3", "four times": "4", "five times": "5"}
            numbers |= {digit for word, digit in words.items() if word in row["prompt"]}
            for step in steps:  # every number is given or worked out before
                assert {step[0], step[2]} <= numbers, row
                numbers.add(step[3])


def test_generated_lists_are_right(generated):
    """Worked out from the prompt's words alone."""
    asked = {"What is the list in order": sorted, "What is the list backwards": lambda w: w[::-1],
             "What is the list in order, last word first": lambda w: sorted(w)[::-1],
             "Which word of the list is first in order": lambda w: [min(w)]}
    seen = set()
    for name in ("lists_train", "lists_test", "lists_base_train", "lists_base_test"):
        for row in generated[name]:
            words = re.search(r"words: (.*?)\.", row["prompt"])[1].split(", ")
            question = re.search(r"(W[^.]*)\?\nAnswer:$", row["prompt"])[1]
            seen.add((name.startswith("lists_base"), question.partition(" without")[0]))
            rearrange = asked.get(question, lambda w: [x for x in w if x != question.split()[-1]])
            assert row["answer"].split(", ") == rearrange(words) != words[:0]
            assert row["response"] == f" {row['answer']}.\n#### {row['answer']}"
    assert {q for base, q in seen if base} == {"What is the list in order"} and len(seen) == 5


def test_splits_share_no_prompt(generated):
    for family in ("", "lists_", "base_", "lists_base_"):
        parts = [[row["prompt"] for row in generated[family + name]] for name in ("train", "val", "test")]
        train, val, test = map(set, parts)
        assert not train & val and not train & test and not val & test
        if family != "base_":
            size = 16000 if family == "lists_base_" else 4000
            assert [len(set(part)) for part in parts] == [size, 400, 400] == [len(part) for part in parts]
    new = {row["prompt"] for name in ("train", "val", "test") for row in generated[name]}
    assert not new & {row["prompt"] for row in generated["base_train"]}  # the base has seen none of them


def test_base_mix(generated):
    rows = generated["base_train"]
    stories = sum(row["response"] == "" for row in rows) / len(rows)
    bare = sum(bool(re.search(r"Question: (What is \d|Work out|\d)", row["prompt"])) for row in rows) / len(rows)
    assert len(rows) == 67200 and abs(stories - .18) < .01 and abs(bare - .32) < .01
    assert len(generated["base_test"]) >= 400 and all(row["answer"] for row in generated["base_test"])


def test_bpe_merges_by_frequency(tiny):
    module, _ = tiny
    assert module.train_bpe(["abc abc ab"], 2) == [(b"a", b"b"), (b"ab", b"c")]  # tie: larger than (" ", "ab")
    merges = module.train_bpe(["low lower lowest 12"], 100)
    tokens = {left + right for left, right in merges}
    assert b" lowest" in tokens and b"12" not in tokens and len(tokens) == len(merges)


def test_tokenizer_of_the_base():
    tokenizers = pytest.importorskip("transformers")
    folder = os.path.join(ROOT, "data", "tiny", "base")
    tokenizer = tokenizers.AutoTokenizer.from_pretrained(folder)
    config = tokenizers.AutoConfig.from_pretrained(folder)
    assert tokenizer.eos_token_id == config.eos_token_id == len(tokenizer) - 1 < config.vocab_size == 832
    assert 700 < len(tokenizer) < 832
    text = "Question: Eva has 3 jars with 45 shells. \n\n Ünïcode & 100% <|endoftext|"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.decode([i]) for i in tokenizer.encode(" 12 shells")] == [" ", "1", "2", " shells"]
    assert config.model_type == "llama" and config.head_dim == 32 and config.num_key_value_heads == 2
