"""tools.eval: reading answers off real outputs, going on after an interruption, ranks, the sandbox."""
import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import data.tokenizer
from config import UserError
from model import LLaMA, ModelConfig
from tools import answers, eval as tool, export, sandbox

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
on_real_files = pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data here")


# ---- reading answers ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, answer, said, right", [
    ("A: He needs 24 tiles for each. He needs 24 * 24 = 576 tiles. The answer is 576.", "576.0", 576, True),
    ("In total he pays $24,000 + $12,000 = $36,000. The answer is $36,000.", "36000", 36000, True),
    ("The difference is 3 - 1.1666666666666667 = 1.8333.", "1.8333333333333335", 1.8333, True),
    ("It is 1.83.", "1.8333333333333335", 1.83, False),
    ("x = -15. The answer is -15", "-15.0", -15, True),
    ("9 * 5 = 45. 45 - 12 = 33.\n#### 33", "33", 33, True),
    ("He has 33 left, of 45", "33", 45, False),  # the last number counts
    ("I do not know.", "33", None, False),
    ("", "0", None, False),
    ("it is 5.", "1,005", 5, False),
    ("#### 1,005", "1,005", 1005, True),
    ("the correct answer is true", "true", "true", True),
    ("the correct answer is false, not true", "true", "false", False),  # the first word counts
    ("True", "true", "", False),
    ("the correct answer is answer4", "answer4", "answer4", True),
    ("answer1 or answer4", "answer4", "answer1", False),
    ("the correct answer is ending3", "ending3", "ending3", True),
    ("the correct answer is solution2", "solution1", "solution2", False),
    ("the correct answer is option2", "option2", "option2", True),
    ("C", "C", "C", True),
    ("Rationale: 500 + 120 = 620.The answer is (C).", "C", "C", True),
    ("After 4 years it is 620. The answer is (C).", "C", "A", False),  # LLM-Adapters' rule
    ("Anna has the eggs. Anna is at the zoo.\n#### zoo", "zoo", None, True),
    ("Anna has the eggs.\n#### the lake", "zoo", None, False),
    ("3 + 4 = 7.\n#### 7\n\nQuestion: There are 3 pens", "7", 7, True),  # run-on text
    ("#### 7 (see step 3)", "7", 7, True),
    ("#### zoo\n\nWhere is Tom?\n#### lake", "zoo", None, True),
])
def test_judge(text, answer, said, right):
    got = answers.judge(text, answer)
    assert got[1] is right and (said is None and got[0] is not None or got[0] == said or got == (None, False))


def test_stated_letter():
    assert answers.stated_letter("After 4 years it is 620.The answer is (C).") == "C"
    assert answers.stated_letter("Answer: D") == "D"
    assert answers.stated_letter("The answer is A. No: the answer is B") == "B"
    assert answers.stated_letter("#### C\n\nQ: ...\nThe answer is D\n#### E") == "C"
    assert answers.stated_letter("The answer is Eleven") == answers.stated_letter("Because") == ""


@on_real_files
def test_real_outputs_are_read():
    """The chain-of-thought outputs of Math10K's generator: what they state is what is read."""
    rows, read = json.loads((SHARED / "llm_adapters_math.json").read_text()), 0
    for row in rows:
        stated = row["output"].rpartition("The answer is")[2].strip(" .:$%()").replace(",", "")
        if len(row["answer"]) == 1 and row["answer"] in "ABCDE":
            if len(stated) == 1 and stated in "ABCDE":
                assert answers.stated_letter(row["output"]) == stated
                read += 1
        elif data.number(stated) is not None:
            assert answers.judge(row["output"], stated)[1]
            read += 1
    assert read > .85 * len(rows)
    for name in ("boolq_test", "openbookqa_train"):
        for row in json.loads((SHARED / f"llm_adapters_{name}.json").read_text()):
            assert answers.judge(row["output"], row["answer"]) == (row["answer"], True)
    for line in (SHARED / "gsm8k_test.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert answers.judge(row["answer"], row["answer"].rpartition("####")[2].strip())[1]


def test_wilson():
    low, high = answers.wilson(50, 100)
    assert abs(low - .4038) < 1e-4 and abs(high - .5962) < 1e-4
    assert answers.wilson(0, 20)[0] == 0 and answers.wilson(20, 20)[1] == 1
    assert answers.wilson(0, 20)[1] == pytest.approx(.1611, abs=1e-4)


# ---- programs ----------------------------------------------------------------------------------------------

PROMPT = "import math\n\n\ndef area(r):\n    \"\"\" Area of a circle.\n    \"\"\"\n"
TEST = "def check(f):\n    assert abs(f(2) - 12.566) < 1e-2\n"
COMPLETIONS = dict(
    goes_on="    return math.pi * r * r\n\n\nprint(area(1))\nthis is no Python",
    after_a_line_break="\n    return math.pi * r * r\n\n# Example\nprint('```python\\nnothing\\n```')",
    whole="Here it is:\n```python\ndef area(r):\n    return math.pi * r * r\n```\nIt needs math.",
    body="```python\n    return math.pi * r * r\n```",
    cut_off="```python\ndef area(r):\n    return math.pi * r * r\n",
    no_language="```\nimport math\ndef area(r):\n    return math.pi * r * r\n```",
    multi_line="    return (math.pi\n            * r * r\n)\n",
    blank_line_first="    \n    return math.pi * r * r\n",
    repeated="    return math.pi * r * r\n\n\ndef area(r):\n    return math.pi * r * r\n")


@pytest.mark.parametrize("kind", COMPLETIONS)
def test_program(kind):
    assert sandbox.check(answers.program(PROMPT, COMPLETIONS[kind], "area", TEST)) == "passed"


def test_wrong_programs():
    run = lambda text: sandbox.check(answers.program(PROMPT, text, "area", TEST))
    assert run("    return r") == "AssertionError: "
    assert run("    return r +").startswith("SyntaxError")
    assert run("") .startswith("TypeError")
    assert run("    import sys; sys.exit(0)") == "SystemExit: 0"
    assert run("    import os; os._exit(0)").startswith("ended early")
    assert run("    print('passed', flush=True)\n    raise ValueError('x')") == "ValueError: x"


@on_real_files
def test_canonical_solutions_pass():
    with gzip.open(SHARED / "HumanEval.jsonl.gz", "rt") as f:
        rows = [json.loads(line) for line in f]
    for row in rows[::6]:
        program = answers.program(row["prompt"], row["canonical_solution"], row["entry_point"], row["test"])
        assert sandbox.check(program, seconds=20) == "passed", row["task_id"]
        fenced = f"Sure!\n```python\n{row['prompt']}{row['canonical_solution']}```"
        program = answers.program(row["prompt"], fenced, row["entry_point"], row["test"])
        assert sandbox.check(program, seconds=20) == "passed", row["task_id"]


HARM = {
    "while True: pass": "out of time",
    "try:\n    while True: pass\nexcept BaseException: pass": "out of time",
    "import time; time.sleep(100)": "out of time",
    "x = bytearray(4 << 30)": "out of memory",
    "f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20))": "OSError",
    "open(VICTIM, 'w')": "PermissionError",
    "import os; os.open(VICTIM, os.O_WRONLY)": "PermissionError",
    "import os; os.remove(VICTIM)": "PermissionError",
    "import os; os.rename(VICTIM, 'mine')": "PermissionError",
    "import os; os.symlink(VICTIM, 'link'); open('link', 'a')": "PermissionError",
    "import os; d = os.open(os.path.dirname(VICTIM), os.O_RDONLY)": "PermissionError",
    "import shutil, os; shutil.rmtree(os.path.dirname(VICTIM))": "PermissionError",
    "import socket; socket.socket()": "PermissionError",
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:1')": "URLError",
    "import os; os.system('true')": "PermissionError",
    "import subprocess; subprocess.run(['true'])": "PermissionError",
    "import os; os.fork()": "PermissionError",
    "import os; os.kill(os.getppid(), 9)": "PermissionError",
    "import ctypes; ctypes.CDLL(None)": "PermissionError",
}


@pytest.mark.parametrize("program", HARM)
def test_sandbox_stops(program, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    assert sandbox.check(f"VICTIM = {str(victim)!r}\n{program}", seconds=1).startswith(HARM[program])
    assert victim.read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["victim"]


def test_sandbox_lets_programs_be():
    assert sandbox.check("import os, tempfile, shutil\nassert not os.listdir() and set(os.environ) <= {'TMPDIR', 'LC_CTYPE'}\n"
                         "open('a', 'w').write('x')\nassert open('a').read() == 'x'\nos.mkdir('b'); os.rename('a', 'b/a')\n"
                         "shutil.rmtree('b')\ntempfile.NamedTemporaryFile().write(b'x')") == "passed"


# ---- whole evaluations of a tiny random model --------------------------------------------------------------

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    data.tokenizer.save_bpe(folder, [], r"[\s\S]", ["<|end|>"])
    config = dict(model_type="llama", vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                  num_attention_heads=2, num_key_value_heads=1, eos_token_id=256)
    torch.manual_seed(0)
    LLaMA(ModelConfig.from_dict(config)).save_pretrained(folder)
    return folder


def write_state(run, number, options):
    """As far as tools.eval reads it."""
    (run / "state" / f"{number:06d}").mkdir(parents=True)
    (run / "state" / f"{number:06d}" / "state.json").write_text(json.dumps({"info": {"config": options}}))


@pytest.fixture
def run(base, tmp_path):
    """A run's directory with an adapter that the base does not have, and a task of numbers."""
    model = LLaMA.from_pretrained(base)
    model.add_lora(2, 400, "q,v")
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.lora_parameters().values():
            p.normal_(0, .2)
    model.save_adapter(tmp_path / "run", base)
    write_state(tmp_path / "run", 1, dict(prompt_format="plain", max_new_tokens=5, dtype="float32", dataset="none"))
    rows = [dict(prompt="What is " + "1 + " * (i % 4) + f"{i}?", response="", answer=str(i)) for i in range(9)]
    (tmp_path / "numbers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path / "run"


def evaluate(run, *args, task="numbers.jsonl"):
    tool.main([str(run), f"--tasks={run.parent / task}", "--device=cpu", *args])


def predictions(run, name="numbers"):
    return [json.loads(line) for line in (run / "eval" / f"{name}.jsonl").read_text().splitlines()]


def test_predictions_are_the_models(run, base, capsys):
    evaluate(run, "--batch_size=2")
    model, tokenizer, _ = tool.load(run, "", torch.float32, "cpu")
    found = predictions(run)
    assert [p["id"] for p in found] == list(range(9))
    for p, row in zip(found, map(json.loads, (run.parent / "numbers.jsonl").read_text().splitlines())):
        ids = data.prompt_ids(data.Example(row["prompt"], ""), tokenizer, "plain")
        out = model.generate([ids], 5, stop=tokenizer.stop)[0]
        assert p["text"] == tokenizer.decode(out) and p["tokens"] == len(out) and p["prompt"] == row["prompt"]
        assert (p["said"], p["correct"]) == answers.judge(p["text"], row["answer"])
    other = LLaMA.from_pretrained(base)
    assert any(other.generate([ids], 5)[0] != model.generate([ids], 5)[0] for ids in ([1, 2], [50, 60, 70], [9]))
    right = sum(p["correct"] for p in found)
    assert f"{right / 9:6.1%} of 9, 95 % interval" in capsys.readouterr().out
    assert not list((run / "eval").glob("*part*"))


def test_goes_on_after_an_interruption(run, monkeypatch):
    evaluate(run)
    whole = predictions(run)
    (run / "eval" / "numbers.jsonl").unlink()
    generate, calls = LLaMA.generate, []

    def interrupted(self, prompts, *args, **kw):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, prompts, *args, **kw)
    monkeypatch.setattr(LLaMA, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, "--batch_size=2")
    part = run / "eval" / "numbers.part0.jsonl"
    assert len(part.read_text().splitlines()) == 4
    part.write_text(part.read_text() + '{"id": 3, "finge')  # the line that a kill cut off
    evaluate(run, "--batch_size=2")
    assert calls == [2, 2, 2, 2, 2, 1] and predictions(run) == whole
    evaluate(run)  # finished: nothing is generated again
    assert len(calls) == 6


def test_the_runs_options_are_found(run, base):
    """The newest whole state's; a save that was killed has left a `tmp`."""
    write_state(run, 2, {"max_new_tokens": 7})
    (run / "state" / "tmp").mkdir()
    (run / "state" / "tmp" / "state.json").write_text("{")
    assert tool.run_config(run) == {"max_new_tokens": 7} and tool.run_config(base) == {}
    write_state(run, 3, {"max_new_tokens": 8})
    newest = max((run / "state").glob("0*")) / "state.json"
    assert tool.run_config(run) == {"max_new_tokens": 8}
    newest.write_text("{")  # damaged: the one before it
    assert tool.run_config(run) == {"max_new_tokens": 7}


def test_limit_is_extended(run):
    evaluate(run, "--limit=3")
    assert [p["id"] for p in predictions(run)] == [0, 1, 2]
    evaluate(run)
    assert len(predictions(run)) == 9
    evaluate(run, "--limit=2")
    assert len(predictions(run)) == 9  # the others stay on disk


def test_foreign_predictions_are_not_overwritten(run, capsys):
    evaluate(run)
    before = predictions(run)
    with pytest.raises(UserError, match="another adapter, task file or setting"):
        evaluate(run, "--max_new_tokens=4")
    assert predictions(run) == before
    state = run / "adapter_model.safetensors"
    raw = bytearray(state.read_bytes())
    raw[-3] ^= 1
    state.write_bytes(raw)
    with pytest.raises(UserError, match="another adapter"):
        evaluate(run)
    evaluate(run, f"--output={run / 'new'}")
    evaluate(run, "--overwrite=True")
    config = run / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": ', '"lora_alpha": 9'))
    with pytest.raises(UserError, match="another adapter"):
        evaluate(run)
    evaluate(run, "--overwrite=True")
    after = predictions(run)
    assert len(after) == 9 and after[0]["fingerprint"] != before[0]["fingerprint"]


def test_ranks_share_the_problems(run, monkeypatch):
    evaluate(run)
    whole = predictions(run)
    (run / "eval" / "numbers.jsonl").unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    evaluate(run)
    part = [json.loads(line)["id"] for line in (run / "eval" / "numbers.part1.jsonl").read_text().splitlines()]
    assert sorted(part) == [1, 3, 5, 7] and not (run / "eval" / "numbers.jsonl").exists()
    monkeypatch.setenv("RANK", "0")
    evaluate(run)
    assert predictions(run) == whole and not list((run / "eval").glob("*part*"))


@pytest.mark.parametrize("name", ["my [v1]", "all*", "what?", "a,b", "[!x]"])
def test_any_file_name_will_do(run, name):
    (run.parent / "numbers.jsonl").rename(run.parent / f"{name}.jsonl")
    evaluate(run, task=f"{name}.jsonl")  # which waited for ever for predictions that it did not find
    assert len(predictions(run, name)) == 9 and [p.name for p in (run / "eval").iterdir()] == [f"{name}.jsonl"]


def test_task_files_of_one_name(run):
    """Their predictions would lie in one file: refused before anything is loaded. A folder's test.jsonl is called by the folder."""
    for folder in "ab":
        (run.parent / folder).mkdir()
        for name in ("x", "test"):
            (run.parent / folder / f"{name}.jsonl").write_text((run.parent / "numbers.jsonl").read_text())
    files = lambda *names: "--tasks=" + ",".join(str(run.parent / n) for n in names)
    with pytest.raises(UserError, match="a/x.jsonl and .*b/x.jsonl would both be the task 'x'.*--output=DIR"):
        tool.main([str(run), files("a/x.jsonl", "b/x.jsonl"), "--model=/nowhere"])
    tool.main([str(run), files("a/x.jsonl", "a/../a/x.jsonl", "a/test.jsonl", "b"), "--limit=1", "--device=cpu"])
    assert sorted(p.name for p in (run / "eval").iterdir()) == ["a.jsonl", "b.jsonl", "x.jsonl"]


def test_programs_run_only_when_asked(run, capsys):
    row = dict(prompt=PROMPT, canonical_solution="    return 0\n", entry_point="area", test=TEST, task_id="T/0")
    (run.parent / "code.jsonl").write_text(json.dumps(row) + "\n")
    evaluate(run, task="code.jsonl")
    assert "--execute=True" in capsys.readouterr().out and "correct" not in predictions(run, "code")[0]
    evaluate(run, "--execute=True", task="code.jsonl")
    assert predictions(run, "code")[0]["correct"] is False
    assert "0.0% of 1" in capsys.readouterr().out


def test_a_field_called_test_makes_no_program(run, capsys):
    (run.parent / "notes.jsonl").write_text(json.dumps(dict(prompt="1 + 1?", response="2", answer="2", test="a note")) + "\n")
    evaluate(run, "--execute=True", task="notes.jsonl")
    assert "of 1, 95 %" in capsys.readouterr().out and "said" in predictions(run, "notes")[0]


def test_the_run_decides_its_own_tests(run, base, tmp_path):
    """As the training did: val_dataset only where dataset is a file."""
    def own(number, **options):
        write_state(run, number, options)
        return tool.complete(str(run), dict(prompt_format="", max_new_tokens=0, base_bits=0, device="cpu", dtype="", batch_size=1, limit=0,
                                            temperature=0, threads=0, top_p=1))["own_tests"]
    assert own(2, dataset="math", val_dataset="v.jsonl") == own(3, dataset="math") == "math"
    assert own(4, dataset="a.jsonl", val_dataset="v.jsonl") == "v.jsonl" and own(5, dataset="a.jsonl") == ""


def test_humaneval_comes_without_the_rest(tmp_path, monkeypatch):
    (tmp_path / "code").mkdir()
    (tmp_path / "code/prepare.py").write_text("")
    monkeypatch.setattr(tool, "DATA", tmp_path)
    monkeypatch.setattr("data.examples.HERE", str(tmp_path))
    monkeypatch.setattr("data.code.prepare.test", lambda: (tmp_path / "code/test.jsonl").write_text(""))
    monkeypatch.setattr("data.code.prepare.main", lambda: pytest.fail("370 MB were downloaded"))
    assert tool.find_task("humaneval") == tmp_path / "code/test.jsonl"


def test_the_prompt_format_moves_with_the_weights(tmp_path, capsys):
    """The adapter's two files copied elsewhere, the merge, a whole trained checkpoint: asked as they were trained. Others: nobody guesses."""
    base = tmp_path / "base"
    data.tokenizer.save_bpe(base, [], r"[\s\S]", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    config = dict(model_type="llama", vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, eos_token_id=256)
    model = LLaMA(ModelConfig.from_dict(config))
    model.save_pretrained(base)
    notes = data.notes(data.tokenizer.load(base), "chatml", 7)
    assert notes == dict(prompt_format="chatml", max_new_tokens="7", end_id="258", end_token="<|im_end|>")
    model.save_pretrained(tmp_path / "whole", notes)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / file, tmp_path / "whole")
    model.add_lora(2, 4)
    model.save_adapter(tmp_path / "run", base, notes)
    model.save_adapter(tmp_path / "silent", base)
    (tmp_path / "copy").mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "run" / file, tmp_path / "copy")
    for args in ((tmp_path / "copy", tmp_path / "merged"), (tmp_path / "silent", tmp_path / "plain")):
        export.export(*args)
    export.export(tmp_path / "silent", tmp_path / "told", prompt_format="chatml", shard_gb=2e-5)
    assert len(list((tmp_path / "told").glob("*.safetensors"))) > 1
    (tmp_path / "t.jsonl").write_text('{"prompt": "1 + 1?", "response": "", "answer": "2"}\n')
    for name, tokens in (("run", "7"), ("copy", "7"), ("merged", "7"), ("whole", "7"), ("told", "by task")):
        capsys.readouterr()
        tool.main([str(tmp_path / name), f"--tasks={tmp_path}/t.jsonl", "--device=cpu", f"--output={tmp_path}/out_{name}"])
        assert capsys.readouterr().out.startswith(f"prompt_format = chatml, max_new_tokens = {tokens}\n")
        tool.main([str(tmp_path / name), "--prompt=x", "--device=cpu", "--max_new_tokens=1"])
        assert "prompt_format = chatml, max_new_tokens = 1" in capsys.readouterr().err
    for name in ("base", "silent", "plain"):
        for more in (f"--tasks={tmp_path}/t.jsonl", "--prompt=x"):
            with pytest.raises(UserError, match=f"{name} does not say which prompt format .*--prompt_format=, one of plain, alpaca"):
                tool.main([str(tmp_path / name), more, "--device=cpu"])
    tool.main([str(tmp_path / "base"), "--prompt=x", "--device=cpu", "--prompt_format=plain", "--max_new_tokens=1"])


def test_prompt_streams(base, run, capsys, monkeypatch):
    tool.main([str(run), "--prompt=What is 1 + 1?\\nAnswer:", "--max_new_tokens=12", "--device=cpu"])
    model, tokenizer, _ = tool.load(run, "", torch.float32, "cpu")
    ids = data.prompt_ids(data.Example("What is 1 + 1?\nAnswer:", ""), tokenizer, "plain")
    assert capsys.readouterr().out == tokenizer.decode(model.generate([ids], 12)[0]) + "\n"
    pieces = []
    monkeypatch.setattr("builtins.print", lambda *a, **k: pieces.append(a[0] if a else "\n"))
    text = list("aé🙂b".encode())
    fake = type("Fake", (), dict(generate=lambda self, p, n, t, top, stop, seed, show: [show([(0, i)]) for i in text]))()
    tool.stream(fake, tokenizer, dict(prompt="x", prompt_format="plain", max_new_tokens=9, temperature=0, top_p=1, seed=0))
    assert "".join(pieces) == "aé🙂b\n" and "🙂" in pieces


def test_tasks_are_found(tmp_path, monkeypatch):
    for name in ("math/test.jsonl", "math/test_gsm8k.jsonl", "gsm8k/test.jsonl", "commonsense/test_ARC-Easy.jsonl", "code/test.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
        (tmp_path / name).with_name("prepare.py").write_text("")
    monkeypatch.setattr(tool, "DATA", tmp_path)
    monkeypatch.setattr("data.examples.HERE", str(tmp_path))
    found = lambda name, dataset="": str(tool.find_task(name, dataset).relative_to(tmp_path))
    assert found("gsm8k") == found("gsm8k", "math") == found("GSM8K") == "math/test_gsm8k.jsonl"
    assert found("gsm8k", "gsm8k") == "gsm8k/test.jsonl" and found("math") == "math/test.jsonl"
    assert found("arc-e") == found("ARC-Easy") == "commonsense/test_ARC-Easy.jsonl" and found("humaneval") == "code/test.jsonl"
    for name, message in (("svamp", "no test_svamp.jsonl"), ("gsmk8", "there is no task 'gsmk8'")):
        with pytest.raises(UserError, match=message):
            found(name)


def test_the_base_is_found_from_anywhere(base, run, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(base.parent)
    model = LLaMA.from_pretrained(base)
    model.add_lora(2, 4, "q")
    model.save_adapter(tmp_path / "near", base.name)
    written = json.loads((tmp_path / "near/adapter_config.json").read_text())["base_model_name_or_path"]
    assert written == str(base) and Path(written).is_absolute()
    monkeypatch.chdir(tmp_path)
    tool.main(["near", "--prompt=x", "--max_new_tokens=2", "--prompt_format=plain"])
    model.save_adapter(tmp_path / "far", base.name)  # of another machine, or of an older version
    for path in ("far", str(tmp_path / "far")):
        with pytest.raises(UserError, match=f"far/adapter_config.json names the base '{base.name}'.*--model=DIR"):
            tool.main([path, "--prompt=x", "--prompt_format=plain"])
    tool.main(["far", "--prompt=x", "--max_new_tokens=2", f"--model={base}", "--prompt_format=plain"])


def test_errors(run, base):
    (run.parent / "empty.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    for args, message in (((base,), "no test set of its own"), ((base, f"--tasks={run.parent / 'empty.jsonl'}"), "no problem with an"),
                          ((run, "--taks=gsm8k"), "did you mean --tasks"), ((run, "--prompt=x", f"--model={run.parent}"), "config.json"),
                          ((run, "--batch_size=0", "--prompt=x"), "at least 1"),
                          ((run, "--top_p=0", "--prompt=x"), "above 0 and at most 1"), ((run, "--limit=x"), "of type int")):
        with pytest.raises(UserError, match=message):
            tool.main(list(map(str, args)))


def test_command_line(base):
    r = subprocess.run([sys.executable, "-m", "tools.eval", str(base)], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 1 and r.stderr.startswith("error: ") and r.stderr.count("\n") == 1, r.stderr
