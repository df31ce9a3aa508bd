"""Answers test problems with an adapter or a whole model, and counts what is right.

    python -m tools.eval out/math --tasks=gsm8k,svamp,mawps    a run's directory, or any model's, or a hub id
    python -m tools.eval out/code --tasks=humaneval --execute=True
    python -m tools.eval out/mine --tasks=my_test.jsonl        {"prompt", "response", "answer"} a line
    python -m tools.eval out/tiny --prompt="Question: Eva has 3 ...\\nAnswer:"    one answer, as it is written

--tasks        names (gsm8k, svamp, mawps, aqua, boolq, piqa, ..., humaneval, a folder of data/) or files;
               default: the run's own test set
--limit=N      only the first N problems of each task
--batch_size   problems at a time, 32
--max_new_tokens, --dtype: the run's; else by task, by device
--prompt_format: the trained one, which the weights' file names; needed where it does not
--model=DIR    the adapter's base, if it is no longer where the adapter says
--base_bits    4 or 16, of the base; default: as the adapter was trained, else as the checkpoint is
--output=DIR   where predictions go, one file a task; default: eval/ in the run's directory
--overwrite=True   drops predictions of another adapter, task file or setting. Those of this very one are
               kept: an interrupted evaluation goes on where it stopped, a finished one only prints its result
--execute=True runs the programs that the model wrote for HumanEval here, with limits (see tools/sandbox.py)
--threads=N     CPU threads; --debug=True: traceback after an error
--temperature, --top_p, --seed: of --prompt; tasks are answered greedily. torchrun shares the problems out.

How an answer is read off a text: tools/answers.py, as LLM-Adapters does it, so that numbers compare with its
and the paper's (but for beams: these are greedy). Intervals are Wilson's, 95 %: they speak of the choice of
problems, not of how training runs differ.
"""
import glob
import hashlib
import importlib
import json
import os
import re
import sys
import time
from pathlib import Path

import torch

import data
import data.tokenizer
from config import ROOT, UserError
from data import examples
from lib import cli, dist, state
from lib.files import add_samples, find_base, read_json, read_notes, resolve, weight_files, write_text
from model import LLaMA, ModelConfig, load_adapter
from tools import answers, sandbox
from tools.progress import Progress

DATA = Path(ROOT, "data")
SETS = {"math": ("gsm8k", "svamp", "mawps", "aqua"), "code": ("humaneval",), "commonsense": (
        "boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "arc-easy", "arc-challenge", "openbookqa")}
ALIASES = {"siqa": "social_i_qa", "arc-e": "arc-easy", "arc-c": "arc-challenge", "obqa": "openbookqa"}


# ---- what to evaluate, and on what -------------------------------------------------------------------------

def run_config(path):
    """The options of the training that made this directory, {} if none did."""
    states = Path(path, "state")
    for n in reversed(state.numbers(states)):
        try:
            return read_json(states / f"{n:06d}" / "state.json")["info"]["config"]
        except (UserError, KeyError):  # damaged: the one before it
            pass
    return {}


def load(path, base, dtype, device, base_bits=0):
    """Directory or hub id -> (model, tokenizer, the files that they came from). base_bits: as of the command line."""
    folder = resolve(path)
    if not (folder / "adapter_config.json").exists():
        model = LLaMA.from_pretrained(folder, dtype, device, base_bits=base_bits or bits_of(folder))
        return model, data.tokenizer.load(str(folder)), base_files(folder)
    _, home = find_base(folder, base)
    bits = base_bits or int(read_notes(folder).get("base_bits") or bits_of(home))
    model = LLaMA.from_pretrained(home, dtype, device, base_bits=bits)
    load_adapter(model, folder)
    own = [folder / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    return model, data.tokenizer.load(str(home)), [*base_files(home), *own]


def bits_of(folder):
    """4 where the checkpoint's weights are packed in 4 bits, else 16."""
    if ModelConfig.from_dir(folder).quantized:
        return 4
    return 16


def base_files(folder):
    names = ("config.json", "tokenizer.json", "tokenizer.model")
    return [*weight_files(folder), *(folder / name for name in names if (folder / name).exists())]


def find_task(name, dataset=""):
    """The file of a task: a path, a data set's test.jsonl or test_NAME.jsonl (the run's own set comes
    first)."""
    if os.path.isfile(name):
        return Path(name)
    task = ALIASES.get(name.lower(), name.lower())
    folder = next((s for s, tasks in SETS.items() if task in tasks), "")
    if task == "humaneval":
        with examples.alone(DATA / folder):
            if not (DATA / folder / "test.jsonl").exists():
                importlib.import_module("data.code.prepare").test()
    if task == "humaneval" or task == os.path.basename(dataset):
        return Path(examples.locate(folder if task == "humaneval" else task, "test"))
    for attempt in (1, 2):
        files = DATA.glob("*/test_*.jsonl")
        for path in sorted(files, key=lambda p: p.parent.name != os.path.basename(dataset)):
            if path.name.lower() == f"test_{task}.jsonl":
                return path
        if folder and attempt == 1:
            examples.locate(folder, "test")  # prepares a set that is missing: test.jsonl comes last
    if folder:
        raise UserError(f"data/{folder} has no test_{task}.jsonl: run its prepare.py, or give --tasks=FILE")
    try:
        return Path(examples.locate(name, "test"))
    except UserError:
        raise UserError(f"there is no task {name!r}: give a file of JSON lines, "
                        "a folder of data/ with a test set, "
                        "or one of " + ", ".join(t for tasks in SETS.values() for t in tasks)) from None


def find_tasks(text, dataset=""):
    """{name: file} of the tasks that --tasks lists, in its order. A path is called by its file's stem, or by
    its folder if that is "test". UserError: two files of one name, whose predictions would lie in one
    file."""
    out = {}
    for task in [text] if os.path.isfile(text) else [t.strip() for t in text.split(",") if t.strip()]:
        path, name = find_task(task, dataset), task
        if os.path.isfile(task) or os.sep in task:
            name = path.resolve().parent.name if path.stem == "test" else path.stem.removeprefix("test_")
        if name in out and not path.samefile(out[name]):
            raise UserError(f"{out[name]} and {path} would both be the task {name!r}: evaluate them one by "
                            "one, with another --output=DIR each")
        out[name] = path
    return out


def problems(path, limit):
    """[(Example, row)] of a task's file: those that have an answer, or, HumanEval's, a test."""
    out = []
    for where, row in examples.read_rows(path):
        if isinstance(row, dict) and is_program(row):
            row = {"response": row.get("canonical_solution", ""), **row}
        example = examples.parse(row, where)
        if example.answer or is_program(row):
            out.append((example, row))
    if not out:
        raise UserError(f"{path} has no problem with an \"answer\" to compare with")
    return out[:limit or None]


def is_program(row):
    """HumanEval's rows: a function to write, and what tests it."""
    return "test" in row and "entry_point" in row


def default_tokens(task):
    """How many tokens an answer gets: LLM-Adapters' numbers, and 512 for a function."""
    example, row = task[0]
    return 512 if is_program(row) else 32 if re.fullmatch(r"true|false|[a-z]+\d", example.answer) else 256


def prompt_ids(example, row, tokenizer, prompt_format):
    """A function to complete is continued as it stands in the plain format; in a chat it needs a request."""
    if is_program(row) and prompt_format != "plain":
        request = "Complete this Python function. Give the whole function in one code block.\n\n"
        example = example._replace(prompt=f"{request}```python\n{example.prompt.strip()}\n```")
    elif is_program(row):  # the line break before the body is the model's to write, as in its training text
        example = example._replace(prompt=example.prompt.strip())
    return data.prompt_ids(example, tokenizer, prompt_format)


def fingerprint(files, task_file, settings):
    """Tells evaluations apart: by the task's file, the settings, each file of the model: its size and
    samples."""
    h = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    h.update(Path(task_file).read_bytes())
    for path in files:
        add_samples(h, path)
    return h.hexdigest()[:16]


# ---- predictions on disk: TASK.jsonl when all are there, TASK.partRANK.jsonl until then --------------------

def read_predictions(path, mark, overwrite):
    """{id: prediction} of a file, but for a line that was cut off. UserError if they are of another
    evaluation."""
    out = {}
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
        try:
            p = json.loads(line)
        except ValueError:  # cut off by a kill, or the end
            continue
        if p.get("fingerprint") == mark:
            out[p["id"]] = p
        elif not overwrite:
            raise UserError(f"{path} holds predictions of another adapter, task file or setting: keep them "
                            "with --output=DIR, or drop them with --overwrite=True")
    return out


def all_predictions(folder, task, mark, overwrite):
    out = {}
    for path in [folder / f"{task}.jsonl", *parts(folder, task)]:
        out.update(read_predictions(path, mark, overwrite))
    return out


def parts(folder, task):
    """What the ranks have written of a task so far, whatever its name is made of."""
    return sorted(folder.glob(f"{glob.escape(task)}.part*.jsonl"))


def lines(predictions):
    return "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in predictions)


# ---- generating --------------------------------------------------------------------------------------------

def answer(model, tokenizer, task, name, todo, total, o, part, mark):
    """Generates for the problems `todo` and appends each prediction to the file `part`, a batch at a time."""
    ids = {i: prompt_ids(*task[i], tokenizer, o["prompt_format"]) for i in todo}
    # alike in length; the longest first, where memory may fail
    order = sorted(todo, key=lambda i: -len(ids[i]))
    bar = Progress(name, total, total - len(todo), o["rank"] == 0)
    judged = right = tokens = 0
    with open(part, "a", encoding="utf-8") as f:
        for at in range(0, len(order), o["batch_size"]):
            batch = order[at:at + o["batch_size"]]
            outs = model.generate([ids[i] for i in batch], o["max_new_tokens"], stop=tokenizer.stop)
            done = []
            for i, out in zip(batch, outs):
                example, row = task[i]
                text = tokenizer.decode(out)
                p = dict(id=i, fingerprint=mark, prompt=example.prompt, text=text, tokens=len(out))
                if not is_program(row):
                    p["answer"] = example.answer
                    p["said"], p["correct"] = answers.judge(p["text"], example.answer)
                    judged, right = judged + 1, right + p["correct"]
                done.append(p)
            f.write(lines(done))
            f.flush()
            tokens += sum(map(len, outs))
            note = f", {tokens / bar.seconds():,.0f} tokens/s"
            if judged:
                note += f", {right / judged:.1%} right"
            bar.step(len(batch), note)
    bar.end()


def execute(task, predictions, name):
    """Runs the programs that have not been run: sets "correct", and "said" to how it went."""
    todo = [p for p in predictions if p.get("correct") is None]
    bar = Progress(f"{name}, running", len(todo))
    for p in todo:
        example, row = task[p["id"]]
        p["said"] = sandbox.check(answers.program(example.prompt, p["text"], row["entry_point"], row["test"]))
        p["correct"] = p["said"] == "passed"
        bar.step()
    bar.end()


def evaluate(model, tokenizer, weights, name, path, o, folder):
    """One task, from its file to its result {"task", "accuracy", "interval", "n", "file"}; None on ranks
    above 0, and "accuracy" None where programs were not run."""
    task = problems(path, o["limit"])
    o = {**o, "max_new_tokens": o["max_new_tokens"] or default_tokens(task)}
    settings = {k: o[k] for k in ("prompt_format", "max_new_tokens", "dtype")}
    if o["base_bits"]:
        settings["base_bits"] = o["base_bits"]
    mark = fingerprint(weights, path, settings)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{name}.part{o['rank']}.jsonl"
    done = all_predictions(folder, name, mark, o["overwrite"])
    whole = read_predictions(part, mark, o["overwrite"])
    write_text(part, lines(whole.values()))  # without a line that was cut off
    mine = range(o["rank"], len(task), o["world"])
    todo = [i for i in mine if i not in done]
    if todo:
        answer(model, tokenizer, task, name, todo, len(mine), o, part, mark)
    if o["rank"]:
        return None
    while not (done := all_predictions(folder, name, mark, o["overwrite"])).keys() >= set(range(len(task))):
        time.sleep(1)  # the other ranks are not ready
    chosen = [done[i] for i in range(len(task))]
    if o["execute"]:
        execute(task, [p for p in chosen if is_program(task[p["id"]][1])], name)
    file = folder / f"{name}.jsonl"
    write_text(file, lines(done[i] for i in sorted(done)))
    for old in parts(folder, name):
        old.unlink()
    return result(name, chosen, file)


def result(name, chosen, file):
    if any(p.get("correct") is None for p in chosen):
        return dict(task=name, accuracy=None, n=len(chosen), file=str(file))
    n, right = len(chosen), sum(p["correct"] for p in chosen)
    out = dict(task=name, accuracy=right / n, interval=answers.wilson(right, n), n=n, file=str(file))
    letters = [p for p in chosen if re.fullmatch("[A-E]", p.get("answer", ""))]
    if letters:
        out["stated"] = sum(answers.stated_letter(p["text"]) == p["answer"] for p in letters) / n
    return out


def say(r):
    if r["accuracy"] is None:
        print(f"{r['task']:14} {r['n']} programs, not run: look at them in {r['file']}, "
              "then add --execute=True")
        return
    low, high = r["interval"]
    share = f"{r['accuracy']:6.1%} of {r['n']}, 95 % interval {low:.1%} to {high:.1%}"
    print(f"{r['task']:14} {share}    {r['file']}")
    if "stated" in r:
        print(f"{'':14} {r['stated']:6.1%} by the letter that is stated as the answer")


# ---- one prompt --------------------------------------------------------------------------------------------

def stream(model, tokenizer, o):
    """Prints the answer to --prompt as it is generated. A character whose bytes are not all
    there yet waits."""
    ids = data.prompt_ids(data.Example(o["prompt"].replace("\\n", "\n"), ""), tokenizer, o["prompt_format"])
    out, shown = [], ""

    def show(new, last=False):
        nonlocal shown
        out.extend(t for _, t in new)
        text = tokenizer.decode(out)
        if not last:
            text = text.rstrip("\ufffd")
        print(text[len(shown):], end="", flush=True)
        shown = text

    n = o["max_new_tokens"] or 256
    model.generate([ids], n, o["temperature"], o["top_p"], tokenizer.stop, o["seed"], show)
    show([], last=True)
    print()


# ---- the command -------------------------------------------------------------------------------------------

def complete(path, o):
    """The options, with the run's where none was given, and by rank. UserError for values that cannot be."""
    run = run_config(path) if os.path.isdir(path) else {}
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    o = {**o, "rank": rank, "world": world, "dataset": run.get("dataset", "")}
    own_file = examples.names_a_file(o["dataset"])
    o["own_tests"] = run.get("val_dataset", "") if own_file else o["dataset"]  # as data.source has it
    o["prompt_format"] = o["prompt_format"] or run.get("prompt_format", "")
    o["max_new_tokens"] = o["max_new_tokens"] or run.get("max_new_tokens", 0)
    if o["device"] == "auto":
        o["device"] = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    o["dtype"] = o["dtype"] or run.get("dtype") or ("float32" if o["device"] == "cpu" else "bfloat16")
    for name, low in dict(batch_size=1, limit=0, max_new_tokens=0, temperature=0, threads=0).items():
        if not o[name] >= low:
            raise UserError(f"--{name}={o[name]} must be at least {low}")
    if not 0 < o["top_p"] <= 1:
        raise UserError(f"--top_p={o['top_p']} must be above 0 and at most 1")
    if o["dtype"] not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--dtype={o['dtype']} must be float32, bfloat16 or float16")
    if o["base_bits"] not in (0, 4, 16):
        raise UserError(f"--base_bits={o['base_bits']} must be 4 or 16")
    if o["prompt_format"] and o["prompt_format"] not in data.FORMATS:
        raise UserError(f"--prompt_format={o['prompt_format']} must be one of {', '.join(data.FORMATS)}")
    dist.use(o["device"], o["dtype"])
    return o


def as_trained(path, o):
    """The options, with the prompt format and the length of an answer that the weights' file names where
    neither the command line nor a run does. UserError: no format is known."""
    notes = read_notes(resolve(path))
    o["prompt_format"] = o["prompt_format"] or notes.get("prompt_format", "")
    o["max_new_tokens"] = o["max_new_tokens"] or int(notes.get("max_new_tokens") or 0)
    if o["prompt_format"] not in data.FORMATS:
        raise UserError(f"{path} does not say which prompt format it was trained with: give "
                        f"--prompt_format=, one of {', '.join(data.FORMATS)}")
    if not o["rank"]:
        print(f"prompt_format = {o['prompt_format']}, max_new_tokens = {o['max_new_tokens'] or 'by task'}",
              file=sys.stderr if o["prompt"] else sys.stdout, flush=True)
    return o


def main(argv):
    (path,), o = cli.options(
        argv, __doc__, (1, 1), tasks="", prompt="", limit=0, batch_size=32, max_new_tokens=0,
        prompt_format="", dtype="", device="auto", model="", base_bits=0, output="", overwrite=False, execute=False,
        temperature=0.0, top_p=1.0, seed=0, threads=0)
    o = complete(path, o)
    if o["threads"]:
        torch.set_num_threads(o["threads"])
    tasks = {} if o["prompt"] else find_tasks(o["tasks"] or o["own_tests"], o["dataset"])
    if not tasks and not o["prompt"]:
        raise UserError(f"{path} has no test set of its own: name tasks or a file, --tasks=gsm8k,svamp, "
                        "or ask it something, --prompt=...")
    for file in tasks.values():  # before minutes of loading
        problems(file, o["limit"])
    o = as_trained(path, o)
    model, tokenizer, weights = load(path, o["model"], getattr(torch, o["dtype"]), o["device"], o["base_bits"])
    own = os.path.isdir(path) and bool(o["dataset"] or Path(path, "adapter_config.json").exists())
    folder = Path(o["output"] or (Path(path, "eval") if own else Path("out", "eval", Path(path).name)))
    try:
        if o["prompt"]:
            return stream(model, tokenizer, o)
        results = [evaluate(model, tokenizer, weights, name, file, o, folder) for name, file in tasks.items()]
    except torch.OutOfMemoryError:
        raise UserError(f"out of memory on {o['device']} with {o['batch_size']} problems at a time: lower "
                        "--batch_size") from None
    results = [r for r in results if r]  # rank 0's
    for r in results:
        say(r)
    known = [r["accuracy"] for r in results if r["accuracy"] is not None]
    if len(known) > 1:
        print(f"{'mean':14} {sum(known) / len(known):6.1%} of {len(known)} tasks")


if __name__ == "__main__":
    cli.run(main)
