"""Bad input: one sentence as stderr's last line, exit code 1, nothing written.
"""
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from config import UserError
from model import LLaMA
from lib import dist
from tests.testing import ROOT, at_step, cut, env, make_base, options, tree


def flags(*args):
    return lambda home, tmp: list(args)


def file(text):
    """A config file with this text after the good one."""
    def make(home, tmp):
        (tmp / "bad.py").write_text(text)
        return [str(tmp / "bad.py")]
    return make


def base(change, *args):
    """A copy of the checkpoint, changed."""
    def make(home, tmp):
        shutil.copytree(home / "base", tmp / "m")
        change(tmp / "m")
        return [f"--model={tmp}/m", *args]
    return make


def raw(*drop, **values):
    """Changes config.json."""
    def change(m):
        c = {k: v for k, v in {**json.loads((m / "config.json").read_text()), **values}.items() if k not in drop}
        (m / "config.json").write_text(json.dumps(c))
    return change


def tensors(change):
    """Changes the tensors of model.safetensors in place."""
    def do(m):
        w = load_file(m / "model.safetensors")
        change(w)
        save_file({k: v.contiguous() for k, v in w.items()}, m / "model.safetensors")
    return do


def shards(names, keep, index=None):
    """Cuts the checkpoint into two shards with an index. names: of the shards in the index; keep: of the files that are there."""
    def do(m):
        w = load_file(m / "model.safetensors")
        (m / "model.safetensors").unlink()
        keys = sorted(w)
        for i, name in enumerate(keep):
            save_file({k: w[k] for k in keys[i::2]}, m / name)
        text = json.dumps({"weight_map": {k: names[i % 2] for i, k in enumerate(keys)}}) if index is None else index
        (m / "model.safetensors.index.json").write_text(text)
    return do


def rows(*lines, raw=None):
    """A data set of these lines."""
    def make(home, tmp):
        data = raw if raw is not None else "".join((l if isinstance(l, str) else json.dumps(l)) + "\n" for l in lines).encode()
        (tmp / "d.jsonl").write_bytes(data)
        return [f"--dataset={tmp}/d.jsonl"]
    return make


def adapter(change=lambda a: None, config={}, state=lambda s: s, base=None):
    """An adapter for the base (or one with other sizes), changed."""
    def make(home, tmp):
        make_base(tmp / "other", **(base or {}))
        model = LLaMA.from_pretrained(tmp / "other")
        model.add_lora(4, 8)
        model.save_adapter(tmp / "ad", "x")
        c = json.loads((tmp / "ad/adapter_config.json").read_text())
        (tmp / "ad/adapter_config.json").write_text(json.dumps({**c, **config}))
        save_file(state(load_file(tmp / "ad/adapter_model.safetensors")), tmp / "ad/adapter_model.safetensors")
        change(tmp / "ad")
        return [f"--init_adapter={tmp}/ad"]
    return make


def tokenizer(text):
    return lambda m: (m / "tokenizer.json").write_text(text)


def pickled(m):
    (m / "model.safetensors").rename(m / "pytorch_model.bin")


S1, S2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Q = "model.layers.1.self_attn.q_proj.weight"
GOOD = {"prompt": "a", "response": "b"}

BAD = {
    # options
    "unknown flag": (flags("--lerning_rate=1"), "unknown option 'lerning_rate'.*learning_rate"),
    "flag without value": (flags("--resume"), "--name=value"),
    "stray argument": (flags("config"), "cannot read the argument 'config'"),
    "single dash": (flags("-max_steps=3"), "cannot read the argument"),
    "unknown name in a file": (file("batchsize = 3\n"), "unknown option 'batchsize'.*batch_size"),
    "wrong type": (flags("--max_steps=many"), "max_steps has to be int, not 'many'"),
    "float for an int": (flags("--max_steps=1.5"), "max_steps has to be int, not 1.5"),
    "int for a bool": (flags("--recompute=1"), "recompute has to be True or False, not 1"),
    "wrong type in a file": (file("batch_size = '8'\n"), "batch_size has to be int, not '8'"),
    "code as a value": (flags("--max_steps=__import__('os').getpid()"), "max_steps has to be int"),
    "no such config file": (flags("config/mathh.py"), "cannot read the config file config/mathh.py"),
    "config file with a syntax error": (file("batch_size = \n"), "does not run .SyntaxError"),
    "config file that fails": (file("batch_size = 1 // 0\n"), "does not run .ZeroDivisionError"),
    "config file that is not text": (lambda home, tmp: [(tmp / "bad.py").write_bytes(b"\xff\xfe"), str(tmp / "bad.py")][1:], "does not run|not UTF-8"),
    "batch of nothing": (flags("--batch_size=0"), "batch_size has to be at least 1"),
    "negative rank": (flags("--lora_r=-4"), "lora_r has to be at least 0"),
    "negative steps": (flags("--max_steps=-1"), "max_steps has to be at least 0"),
    "no steps": (flags("--max_steps=0", "--epochs=0"), "max_steps has to be above 0"),
    "learning rate 0": (flags("--learning_rate=0"), "learning_rate has to be above 0"),
    "learning rate inf": (flags("--learning_rate=1e999"), "learning_rate has to be above 0, not inf"),
    "learning rate as text": (flags("--learning_rate=nan"), "learning_rate has to be float, not 'nan'"),
    "sequence of 1": (flags("--max_seq_len=1"), "max_seq_len has to be at least 2"),
    "lora target": (flags("--lora_targets=q,w"), "lora_targets has to be some of q,k,v,o"),
    "predictor": (flags("--predictor=svp"), "predictor has to be one of measured"),
    "prompt format": (flags("--prompt_format=llama2"), "prompt_format has to be one of plain"),
    "dtype": (flags("--dtype=float8"), "dtype has to be one of float32"),
    "half for trained weights": (flags("--lora_r=0", "--dtype=bfloat16"), "dtype has to be float32 where lora_r is 0"),
    "backward of no row": (flags("--backward_sparsity=1"), "backward_sparsity has the ratio 1.0, which is not a number in"),
    "ends before it starts": (flags("--sparse_start=.5", "--sparse_end=.4"), "sparse_end has to be at least sparse_start"),
    "ratio 1": (flags("--mlp_sparsity=1.0"), r"mlp_sparsity has the ratio 1.0, which is not a number in \[0, 1\)"),
    "ratio below 0": (flags("--attn_sparsity=-.1"), "attn_sparsity has the ratio -0.1"),
    "ratios of the wrong length": (flags("--mlp_sparsity=[.5,.5]"), "mlp_sparsity lists 2 ratios, but the model has 3 blocks"),
    "block that is not there": (flags('--mlp_sparsity={"1-3": .5}'), "mlp_sparsity names block 3, but the model's blocks are 0 to 2"),
    "block named twice": (flags('--mlp_sparsity={"0-1": .5, "1": .2}'), "mlp_sparsity names block 1 twice"),
    "range backwards": (flags('--mlp_sparsity={"2-1": .5}'), "a range of blocks is written"),
    "ratio in words": (flags("--mlp_sparsity=half"), "mlp_sparsity has to be"),
    # device
    "cuda": (flags("--device=cuda"), "device = 'cuda', but torch sees no CUDA GPU"),
    "device": (flags("--device=gpu"), "device has to be auto, cpu, cuda or cuda:N"),
    "fsdp alone": (flags("--fsdp=True"), "fsdp = True .* torchrun"),
    # model
    "no such model": (flags("--model=/nowhere/base"), "model '/nowhere/base' is neither a directory nor a hub id"),
    "no config.json": (base(lambda m: (m / "config.json").unlink()), "config.json does not exist"),
    "config.json is not JSON": (base(lambda m: (m / "config.json").write_text("{")), "config.json is not valid JSON"),
    "config.json is a list": (base(lambda m: (m / "config.json").write_text("[]")), "config.json .*object"),
    "unknown architecture": (base(raw(model_type="mamba")), "model_type 'mamba' is not one of llama"),
    "no architecture": (base(raw("model_type")), "model_type None is not one of"),
    "RoPE scaling": (base(raw(rope_scaling={"rope_type": "yarn", "factor": 4.0})), "RoPE scaling of type 'yarn'"),
    "RoPE scaling without its numbers": (base(raw(rope_scaling={"rope_type": "llama3", "factor": 4.0})), "low_freq_factor must be a positive number, not None .in rope_scaling"),
    "RoPE scaling of the wrong form": (base(raw(rope_scaling="linear")), "rope_scaling"),
    "RoPE in both spellings": (base(raw(rope_parameters={"rope_theta": 10000.0}, rope_scaling={"type": "linear", "factor": 4.0})),
                               "rope_parameters .* and rope_scaling .*'linear'.* differ: keep the one"),
    "RoPE with another theta in each": (base(raw("rope_theta", rope_parameters={"type": "linear", "factor": 2.0, "rope_theta": 5e5},
                                                 rope_scaling={"rope_type": "linear", "factor": 2.0})), "differ: keep the one that is meant, with its rope_theta"),
    "yarn beside rope_parameters": (base(raw(rope_parameters={"rope_theta": 10000.0}, rope_scaling={"type": "yarn", "factor": 4.0})), "'yarn'.* differ"),
    "RoPE by kind of layer": (base(raw(rope_parameters={"full_attention": {"rope_theta": 5e5}})), "rope_parameters has to be one object of numbers"),
    "RoPE of half a head": (base(raw(partial_rotary_factor=.5)), "partial_rotary_factor is 0.5"),
    "no hidden_size": (base(raw("hidden_size")), "hidden_size must be a positive integer, not None"),
    "layers as text": (base(raw(num_hidden_layers="3")), "num_hidden_layers must be a positive integer, not '3'"),
    "heads": (base(raw(num_key_value_heads=3)), "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
    "negative key/value heads": (base(raw(num_key_value_heads=-2)), "num_key_value_heads must be a positive integer"),
    "head_dim": (base(raw(head_dim=7)), "head_dim must be even"),
    "activation": (base(raw(hidden_act="gelu")), "only SwiGLU"),
    "rope_theta as text": (base(raw(rope_theta="big")), "rope_theta must be a positive number"),
    "eos as text": (base(raw(eos_token_id="</s>")), "eos_token_id has to be a token"),
    "eos outside the vocabulary": (base(raw(eos_token_id=5000)), "eos_token_id has to be a token of the vocabulary of 832"),
    "sliding window": (base(raw(model_type="mistral", sliding_window=32)), "max_seq_len = 64 is longer than the model's sliding window of 32"),
    "sliding window as text": (base(raw(model_type="mistral", sliding_window="32")), "sliding_window has to be a whole number, not '32'"),
    "layer types for fewer layers": (base(raw(model_type="qwen2", layer_types=["full_attention"])), "layer_types has to name .* of the 3 layers"),
    "unknown layer types": (base(raw(model_type="qwen3", layer_types=["chunked_attention"] * 3)), "layer_types has to name .*chunked"),
    "layers that slide without a window": (base(raw(model_type="qwen2", layer_types=["sliding_attention"] * 3)), "layer_types has sliding_attention, but use_sliding_window is None"),
    "q/k norms": (base(lambda m: None, "--attn_sparsity=.5"), None),  # filled in below
    "quantized": (base(raw(quantization_config={"quant_method": "gptq"})), "quantiz"),
    "no weights": (base(lambda m: (m / "model.safetensors").unlink()), "has no model.safetensors"),
    "pickle": (base(pickled), "only pickled weights, which can execute code"),
    "missing shard": (base(shards((S1, S2), (S1,))), f"shard {S2} of model.safetensors.index.json is missing"),
    "extra shard": (base(shards((S1, S1), (S1, S2))), f"{S2} is not in model.safetensors.index.json"),
    "index that is not JSON": (base(shards((S1, S2), (S1, S2), "{")), "index.json is not valid JSON"),
    "index without a map": (base(shards((S1, S2), (S1, S2), "{}")), "index.json has no weight_map"),
    "index that points outside": (base(shards((S1, "../" + S2), (S1, S2))), "index.json has no weight_map from tensors to files beside it"),
    "one file beside shards": (base(lambda m: (shutil.copy(m / "model.safetensors", m / "x"), shards((S1, S2), (S1, S2))(m), (m / "x").rename(m / "model.safetensors"))),
                               f"holds two checkpoints, model.safetensors and {S1}"),
    "one file beside a shard without index": (base(lambda m: shutil.copy(m / "model.safetensors", m / S2)), f"holds two checkpoints, model.safetensors and {S2}"),
    "a head that is not the embedding": (base(tensors(lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1}))), "lm_head.weight is not the embedding"),
    "a head of another size": (base(tensors(lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"][:700].clone()}))), "lm_head.weight is not the embedding"),
    "weights cut off": (base(lambda m: cut(m / "model.safetensors")), "is not a readable safetensors file"),
    "weights of garbage": (base(lambda m: (m / "model.safetensors").write_bytes(b"x" * 999)), "is not a readable safetensors file"),
    "empty weights": (base(lambda m: (m / "model.safetensors").write_bytes(b"")), "is not a readable safetensors file"),
    "another shape": (base(tensors(lambda w: w.update({Q: w[Q][:32]}))), r"q_proj.weight has shape \[32, 32\], config.json says \[64, 32\]"),
    "missing tensor": (base(tensors(lambda w: w.pop(Q))), f"1 tensors are missing .* {Q}"),
    "extra tensor": (base(tensors(lambda w: w.update({Q.replace(".1.", ".7."): w[Q].clone()}))), "tensor .* has no place in this architecture"),
    "integer weights": (base(tensors(lambda w: w.update({Q: w[Q].to(torch.int8)}))), "q_proj.weight"),
    "weights that are not numbers": (base(tensors(lambda w: w[Q].fill_(float("nan")))), "three steps in a row were not finite|not finite"),
    # tokenizer
    "no tokenizer": (base(lambda m: (m / "tokenizer.json").unlink()), "tokenizer"),
    "tokenizer that is not JSON": (base(tokenizer("{")), "tokenizer.json"),
    "tokenizer of another kind": (base(tokenizer('{"model": {"type": "Unigram", "vocab": []}}')), "tokenizer.json is not a byte-level BPE"),
    "tokenizer of the wrong form": (base(tokenizer("[]")), "tokenizer.json"),
    "tokenizer does not fit": (base(lambda m: (raw(vocab_size=700, eos_token_id=0)(m), tensors(lambda w: w.update({"model.embed_tokens.weight": w["model.embed_tokens.weight"][:700]}))(m))),
                               "the tokenizer of .* has 8.. tokens, the model's vocab_size is 700"),
    "chat format without its tokens": (flags("--prompt_format=llama3"), "needs the special token .*--prompt_format=plain"),
    # data
    "no such data": (flags("--dataset=/nowhere/d.jsonl"), "nowhere/d.jsonl"),
    "no such data set": (flags("--dataset=gsm9k"), "gsm9k.*gsm8k"),
    "validation data": (flags("--val_dataset=/nowhere/d.jsonl"), "nowhere/d.jsonl"),
    "a variant that is not made": (lambda home, tmp: ["--dataset=data/gsm8k_shots/97"], "not been made yet: the head of data/gsm8k_shots/prepare.py"),
    "a directory without data": (lambda home, tmp: [f"--dataset={tmp}"], "there is no 'train' part|train.jsonl"),
    "empty data": (rows(raw=b""), "d.jsonl holds no examples"),
    "data of blank lines": (rows("", " "), "d.jsonl holds no examples"),
    "not UTF-8": (rows(raw=b'{"prompt": "\xe9", "response": "b"}\n'), "line 1: not UTF-8"),
    "not JSON": (rows(GOOD, "{oops"), "line 2: not JSON"),
    "not objects": (rows(GOOD, "[1]"), "line 2: has to be an object"),
    "prompt of the wrong type": (rows({"prompt": 3, "response": "b"}), 'line 1: the field "prompt" has to be text, not 3'),
    "no response": (rows({"prompt": "a"}), 'line 1: the field "response" is missing'),
    "empty response": (rows(GOOD, {"prompt": "a", "response": " "}), "line 2: the response is empty"),
    "answer of the wrong type": (rows({**GOOD, "answer": ["b"]}), 'the field "answer" has to be text'),
    "history of the wrong form": (rows({**GOOD, "history": ["a"]}), 'the field "history" has to be'),
    "history with an empty answer": (rows({**GOOD, "history": [["a", ""]]}), 'answer 1 in "history" is empty'),
    "messages in the wrong order": (rows({"messages": [{"role": "assistant", "content": "a"}]}), 'messages.0..role" has to be "user"'),
    "half a surrogate pair": (rows('{"prompt": "\\ud800", "response": "b"}'), "surrogate"),
    "all too long": (rows({"prompt": "word " * 200, "response": "b"}), "no example is left .*1 too long.*max_seq_len is 64"),
    # adapter
    "no such adapter": (flags("--init_adapter=/nowhere/a"), "/nowhere/a"),
    "no adapter": (lambda home, tmp: [f"--init_adapter={home}/base"], "adapter_config.json is missing"),
    "adapter with fewer sizes": (adapter(base=dict(hidden_size=16)), "needs"),
    "adapter for a deeper base": (adapter(base=dict(num_hidden_layers=5)), "is for another base: it has 5 blocks, this one 3"),
    "adapter for a shallower base": (adapter(base=dict(num_hidden_layers=2)), "ad"),
    "DoRA": (adapter(config=dict(use_dora=True)), "use_dora = True.*only plain LoRA"),
    "adapter of pickle": (adapter(lambda a: (a / "adapter_model.safetensors").rename(a / "adapter_model.bin")), "no adapter_model.safetensors"),
    "adapter cut off": (adapter(lambda a: cut(a / "adapter_model.safetensors")), "is not a readable safetensors file"),
    "adapter's config is not JSON": (adapter(lambda a: (a / "adapter_config.json").write_text("{")), "adapter_config.json is not valid JSON"),
    "adapter of rank 0": (adapter(config=dict(r=0)), "positive r"),
    "adapter without lora": (adapter(state=lambda s: {"x": torch.zeros(2)}), "changes none of"),
    "adapter for trained weights": (flags("--lora_r=0", "--dtype=float32", "--init_adapter=x"), "init_adapter has to be empty where lora_r is 0"),
    # out_dir
    "out_dir below a file": (lambda home, tmp: [f"--out_dir={home}/data.jsonl/x"], "out_dir = .* cannot be written to"),
}
BAD["q/k norms"] = (base(lambda m: (raw(model_type="qwen3")(m), tensors(lambda w: w.update({f"model.layers.{i}.self_attn.{t}_norm.weight": torch.ones(16) for i in range(3) for t in "qk"}))(m))),
                    "attn_sparsity = 0.5 cannot be used with a qwen3 model")


@pytest.mark.parametrize("name", BAD)
def test_bad_input(home, tmp_path, capsys, monkeypatch, name):
    make, message = BAD[name]
    argv = [str(home / "c.py"), f"--out_dir={tmp_path}/out", *make(home, tmp_path)]
    before = tree(tmp_path), tree(home)
    with pytest.raises(SystemExit) as stop:
        train.cli(argv)
    err = capsys.readouterr().err
    last = err.splitlines()[-1]
    assert stop.value.code == 1 and last.startswith("error: ") and "Traceback" not in err, err[-2000:]
    assert re.search(message, last), last
    assert name == "weights that are not numbers" or (tree(tmp_path), tree(home)) == before and not (tmp_path / "out").exists()


SHELL = ["unknown flag", "block that is not there", "cuda", "weights cut off", "not UTF-8", "adapter for a deeper base"]


def test_bad_input_in_a_shell(home, tmp_path):
    """Some of them through `python train.py`, in processes of their own."""
    def try_one(name):
        tmp = tmp_path / name
        tmp.mkdir()
        make, message = BAD[name]
        argv = [str(home / "c.py"), f"--out_dir={tmp}/out", *make(home, tmp)]
        before = tree(tmp)
        done = subprocess.run([sys.executable, str(ROOT / "train.py"), *argv], capture_output=True, text=True, env=env(), cwd=tmp)
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and last.startswith("error: ") and "Traceback" not in done.stderr and re.search(message, last), done.stderr
        assert tree(tmp) == before and not (tmp / "out").exists()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(try_one, SHELL))


def test_debug_shows_the_traceback(home, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.cli([str(home / "c.py"), f"--out_dir={tmp_path}/out", "--model=/nowhere/x", "--debug=True"])
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("error: model '/nowhere/x'")


def test_too_long_examples_are_dropped_and_counted(home, tmp_path, capsys):
    (argv,) = rows({"prompt": "word " * 200, "response": "b"}, *[GOOD] * 6, {"prompt": "a", "response": "long " * 100})(home, tmp_path)
    train.cli([str(home / "c.py"), f"--out_dir={tmp_path}/out", argv, "--max_steps=1", "--test_examples=0"])
    assert "train 6 examples of" in (out := capsys.readouterr().out) and "dropped: 2 too long, 0 nothing scored" in out


def test_memory_and_interrupts_are_one_sentence(home, tmp_path, monkeypatch, capsys):
    def fail(error):
        def do(run):
            raise error
        return do

    full = OSError(28, "No space left on device", "x/adapter_model.safetensors")
    for error, message in ((torch.OutOfMemoryError("CUDA out of memory"), "out of memory on cpu with micro-batches of 3 examples of up to 64 tokens: lower "
                            "micro_batch_size or set recompute=True; a saved state stays"),
                           (full, "No space left on device .x/adapter_model.safetensors.; a saved state stays")):
        with monkeypatch.context() as m:
            at_step(m, 4, fail(error))
            with pytest.raises(SystemExit) as stop:
                train.cli([str(home / "c.py"), f"--out_dir={tmp_path}/out", "--resume=True"])
        assert stop.value.code == 1 and re.match("error: " + message, capsys.readouterr().err.splitlines()[-1])
    with monkeypatch.context() as m:
        at_step(m, 4, fail(full))
        with pytest.raises(SystemExit):
            train.cli([str(home / "c.py"), f"--out_dir={tmp_path}/unsaved", "--save_interval=0"])
    assert capsys.readouterr().err.splitlines()[-1].endswith("(x/adapter_model.safetensors)")
    monkeypatch.setattr(train, "resolve", lambda path: fail(KeyboardInterrupt())(0))
    with pytest.raises(SystemExit):
        train.cli([str(home / "c.py"), f"--out_dir={tmp_path}/b"])
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted before the training began") and not (tmp_path / "b").exists()


def test_gpus_that_cannot_serve(home, tmp_path, monkeypatch):
    """As if there were two GPUs, of a kind without bfloat16: what is asked for is named, before anything touches a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    for changes, message in ((dict(device="cuda:5"), "there are 2 GPUs here, and cuda:5 is not one of them"),
                             (dict(device="cuda", dtype="bfloat16"), "Tesla T4 has no bfloat16: use --dtype=float16"),
                             (dict(device="auto", dtype="bfloat16"), "Tesla T4 has no bfloat16")):
        with pytest.raises(UserError, match=message):
            dist.setup(options(home, **changes))
    monkeypatch.setenv("LOCAL_RANK", "2")
    for changes, message in ((dict(device="cuda:1"), "names one GPU, but under torchrun each process takes its own"),
                             (dict(device="cuda"), "there are 2 GPUs here, and cuda:2 is not one of them.*--nproc_per_node")):
        with pytest.raises(UserError, match=message):
            dist.setup(options(home, **changes))


def test_nothing_executes_data():
    """No pickle and no remote code anywhere; eval and exec only where config files are run."""
    for path in [p for p in ROOT.rglob("*.py") if not any(part.startswith((".", "out")) for part in p.relative_to(ROOT).parts)]:
        if "test_" not in path.name and path.parent.name != "results":
            text = path.read_text()
            for word in ("pickle.", "import pickle", " torch.load(", "trust_remote_code=True", " torch.save(", "yaml.load"):
                assert word not in text, (path, word)
            assert path.name in ("__init__.py", "sandbox.py") or not re.search(r"(?<![.\w])(eval|exec)\(", text), path
