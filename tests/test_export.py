"""Adapters and merged checkpoints, both ways between us and PEFT / transformers, on tiny random checkpoints."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import data.tokenizer
from config import UserError
from model import LLaMA, load_adapter
from tools.export import export, main

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

ROOT = Path(__file__).parent.parent
SIZES = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
TOKENS = torch.arange(1, 19).view(2, 9) * 5 % 128


def make_base(path, kind="llama", dtype=torch.float32, shard="5GB", **kw):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **kw})
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(path, max_shard_size=shard)
    (path / "tokenizer.json").write_text("{}")
    (path / "optimizer.bin").write_text("not for the merged directory")
    return path


def hf(path, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def peft_adapter(base, path, **kw):
    """An adapter with B other than zero, written by PEFT itself; returns PEFT's model."""
    model = peft.get_peft_model(hf(base), peft.LoraConfig(**{**dict(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"]), **kw})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(0, .2)
    model.save_pretrained(path)
    return model


def our_adapter(base, path, targets="q,k,v,o,gate,up,down", **kw):
    model = LLaMA.from_pretrained(base)
    model.add_lora(4, 12, targets, **kw)
    with torch.no_grad():
        for p in model.lora_parameters().values():
            p.normal_(0, .2)
    model.save_adapter(path, base)
    return model


def logits(model):
    with torch.no_grad():
        return model.logits(TOKENS) if isinstance(model, LLaMA) else model(TOKENS).logits


def assert_equal(a, b, base=None, tolerance=3e-5):
    """Logits are equal, and, so that this says something, not the base's."""
    assert (logits(a) - logits(b)).abs().max() < tolerance
    if base is not None:
        assert (logits(a) - logits(base)).abs().max() > 100 * tolerance


# ---- adapters ----------------------------------------------------------------------------------------------

TARGETS = dict(list=["q_proj", "v_proj"], suffix=["self_attn.o_proj", "down_proj"], every="all-linear", regex=r".*\.self_attn\.(q|k)_proj")


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("rslora", [False, True])
def test_adapter_from_peft(tmp_path, targets, rslora):
    base = make_base(tmp_path / "base")
    theirs = peft_adapter(base, tmp_path / "a", target_modules=TARGETS[targets], use_rslora=rslora)
    ours = LLaMA.from_pretrained(base)
    load_adapter(ours, tmp_path / "a")
    assert_equal(ours, theirs, hf(base))


@pytest.mark.parametrize("rslora", [False, True])
def test_adapter_to_peft(tmp_path, rslora):
    base = make_base(tmp_path / "base", "qwen2")
    ours = our_adapter(base, tmp_path / "a", rslora=rslora)
    assert_equal(peft.PeftModel.from_pretrained(hf(base), tmp_path / "a").eval(), ours, hf(base))
    again = LLaMA.from_pretrained(base)
    load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again), logits(ours))


def test_adapter_of_the_upper_blocks(tmp_path):
    """lora_from is PEFT's layers_to_transform, both ways."""
    base = make_base(tmp_path / "base", num_hidden_layers=3)
    ours = our_adapter(base, tmp_path / "a", first=1)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["layers_to_transform"] == [1, 2]
    assert_equal(peft.PeftModel.from_pretrained(hf(base), tmp_path / "a").eval(), ours, hf(base))
    theirs = peft_adapter(base, tmp_path / "b", layers_to_transform=[1, 2])
    again = LLaMA.from_pretrained(base)
    load_adapter(again, tmp_path / "b")
    assert again.lora_from == 1
    assert_equal(again, theirs, hf(base))
    export(tmp_path / "b", tmp_path / "merged")
    assert_equal(hf(tmp_path / "merged"), theirs, hf(base))


@pytest.mark.parametrize("blocks", [[0], [0, 2]])
def test_adapter_of_other_blocks_is_refused(tmp_path, blocks):
    base = make_base(tmp_path / "base", num_hidden_layers=3)
    peft_adapter(base, tmp_path / "a", layers_to_transform=blocks)
    with pytest.raises(UserError, match="LoRA on q,v of blocks 0 to 2 disagree"):
        load_adapter(LLaMA.from_pretrained(base), tmp_path / "a")


def test_adapter_in_half_precision_is_read_as_fp32(tmp_path):
    base = make_base(tmp_path / "base")
    our_adapter(base, tmp_path / "a", "q")
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({k: v.half() for k, v in load_file(file).items()}, file)
    model = LLaMA.from_pretrained(base)
    load_adapter(model, tmp_path / "a")
    assert all(p.dtype == torch.float32 for p in model.lora_parameters().values())


REFUSED = [dict(use_dora=True), dict(bias="all"), dict(modules_to_save=["lm_head"]), dict(rank_pattern={"q_proj": 2}),
           dict(alpha_pattern={"q_proj": 2}), dict(init_lora_weights="pissa")]


@pytest.mark.parametrize("variant", REFUSED, ids=lambda v: next(iter(v)))
def test_other_variants_are_refused(tmp_path, variant):
    base = make_base(tmp_path / "base")
    peft_adapter(base, tmp_path / "a", **variant)
    for read in (lambda: load_adapter(LLaMA.from_pretrained(base), tmp_path / "a"), lambda: export(tmp_path / "a", tmp_path / "merged")):
        with pytest.raises(UserError, match=next(iter(variant))):
            read()
    assert not (tmp_path / "merged").exists()


def test_other_methods_and_damaged_files_are_refused(tmp_path):
    base = make_base(tmp_path / "base")
    our_adapter(base, tmp_path / "a", "q,v")
    model, config = LLaMA.from_pretrained(base), tmp_path / "a" / "adapter_config.json"
    good = json.loads(config.read_text())
    for change, message in ((dict(peft_type="IA3"), "peft_type"), (dict(r=0), "positive r"), (dict(r=8), "does not fit.*shape"),
                            (dict(lora_alpha=None), "lora_alpha")):
        config.write_text(json.dumps({**good, **change}))
        with pytest.raises(UserError, match=message):
            load_adapter(model, tmp_path / "a")
    config.write_text(json.dumps(good))
    file = tmp_path / "a" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_adapter(model, tmp_path / "a")
    file.unlink()
    with pytest.raises(UserError, match="no adapter_model.safetensors"):
        load_adapter(model, tmp_path / "a")
    with pytest.raises(UserError, match="holds no adapter"):
        load_adapter(model, base)


@pytest.mark.parametrize("change, message", [(dict(num_hidden_layers=3), "disagree"), (dict(num_hidden_layers=1), "2 blocks, this one 1"),
                                             (dict(hidden_size=32), "shape"), (dict(num_key_value_heads=4), "shape")])
def test_adapter_of_another_base_is_refused(tmp_path, change, message):
    our_adapter(make_base(tmp_path / "base"), tmp_path / "a")
    other = LLaMA.from_pretrained(make_base(tmp_path / "other", **change))
    with pytest.raises(UserError, match=message):
        load_adapter(other, tmp_path / "a")


# ---- merged checkpoints ------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, kw", [("llama", {}), ("llama", dict(tie_word_embeddings=True)), ("qwen2", {}), ("qwen3", dict(head_dim=16))])
@pytest.mark.parametrize("shard_gb", [5, 5e-5])
def test_merged_equals_adapter(tmp_path, kind, kw, shard_gb):
    base = make_base(tmp_path / "base", kind, **kw)
    ours = our_adapter(base, tmp_path / "a", rslora=kind == "qwen2")
    export(tmp_path / "a", tmp_path / "deep" / "merged", shard_gb=shard_gb)
    merged = tmp_path / "deep" / "merged"
    assert_equal(hf(merged), ours, hf(base))
    assert_equal(LLaMA.from_pretrained(merged), ours)
    names = {p.name for p in merged.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json"} < names and "optimizer.bin" not in names
    assert ("model.safetensors.index.json" in names) == (shard_gb != 5) == (len(list(merged.glob("model-*"))) > 1)
    assert [p.name for p in merged.parent.iterdir()] == ["merged"]  # nothing temporary is left


def test_merged_from_a_sharded_bf16_base(tmp_path):
    base = make_base(tmp_path / "base", dtype=torch.bfloat16, shard="60KB")
    assert len(list(base.glob("model-*"))) > 2
    peft_adapter(base, tmp_path / "a", target_modules="all-linear")
    export(tmp_path / "a", tmp_path / "merged", shard_gb=1e-4)
    exact = peft.PeftModel.from_pretrained(hf(base), tmp_path / "a").merge_and_unload().state_dict()
    seen = 0
    for path in (tmp_path / "merged").glob("*.safetensors"):
        assert path.stat().st_size < 1.3e5 and path.stat().st_mode & 0o444 == (tmp_path / "merged" / "config.json").stat().st_mode & 0o444
        with safe_open(path, "pt") as f:
            for name in f.keys():
                off = (f.get_tensor(name).float() - exact[name]).abs()
                assert (off <= 2 ** -8 * exact[name].abs() + 1e-6).all()  # merged in fp32 and rounded once: half a unit of bf16
                seen += 1
    assert seen == len(exact)
    assert hf(tmp_path / "merged", "auto").dtype == torch.bfloat16


def test_export_refuses(tmp_path):
    base = make_base(tmp_path / "base")
    our_adapter(base, tmp_path / "a")
    other = make_base(tmp_path / "other", hidden_size=32)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    few = make_base(tmp_path / "few", num_hidden_layers=1)
    for args, message in (((tmp_path / "a", tmp_path / "full"), "not empty"), ((base, tmp_path / "m"), "holds no adapter"),
                          ((tmp_path / "a", tmp_path / "m", str(other)), "another base"), ((tmp_path / "a", tmp_path / "m", str(few)), "another base"),
                          ((tmp_path / "a", tmp_path / "m", str(tmp_path / "nowhere")), "neither a directory.*--model=DIR")):
        with pytest.raises(UserError, match=message):
            export(*args)
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep me"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base", "few", "full", "other"]
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="safetensors"):
        export(tmp_path / "a", tmp_path / "m")


@pytest.mark.parametrize("eos, generation, merged", [(0, 0, ([2, 0], [2, 0])), (None, [1, 0], (2, [2, 1, 0])), (2, [0, 2], (2, [2, 0])),
                                                     ([0, 1], None, ([2, 0, 1], None))])
def test_what_ended_an_answer_ends_it_where_it_is_served(tmp_path, eos, generation, merged):
    """The trained end token comes first in config.json and generation_config.json, and is the tokenizer's eos_token."""
    base = make_base(tmp_path / "base", vocab_size=259)
    data.tokenizer.save_bpe(base, [], r"[\s\S]", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    ids = lambda found: [256 + i for i in found] if isinstance(found, list) else found if found is None else 256 + found
    edit_json(base / "config.json", eos_token_id=ids(eos))
    (base / "generation_config.json").unlink()
    if generation is not None:
        (base / "generation_config.json").write_text(json.dumps({"eos_token_id": ids(generation), "top_p": .5}))
    (base / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    model = LLaMA.from_pretrained(base)
    model.add_lora(4, 12)
    model.save_adapter(tmp_path / "a", base, data.notes(data.tokenizer.load(base), "chatml", 9))
    export(tmp_path / "a", tmp_path / "merged")
    read = lambda name, key: json.loads((tmp_path / "merged" / name).read_text())[key]
    assert read("config.json", "eos_token_id") == ids(merged[0])
    assert generation is None or (read("generation_config.json", "eos_token_id"), read("generation_config.json", "top_p")) == (ids(merged[1]), .5)
    assert read("tokenizer_config.json", "eos_token") == read("special_tokens_map.json", "eos_token") == "<|im_end|>"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token_id == 258
    assert data.tokenizer.load(tmp_path / "merged").eot == 258
    theirs = hf(tmp_path / "merged")
    with torch.no_grad():  # whatever it is asked, it ends at once
        theirs.lm_head.weight[258] = 100 * theirs.model.norm(theirs.model(torch.tensor([[5, 6]])).last_hidden_state)[0, -1]
    assert theirs.generate(torch.tensor([[5, 6]]), max_new_tokens=9, do_sample=False, pad_token_id=0).tolist() == [[5, 6, 258]]


def test_target_may_be_a_link(tmp_path, monkeypatch):
    ours = our_adapter(make_base(tmp_path / "base"), tmp_path / "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "here").mkdir()
    for link, to in (("link", "empty"), ("dangling", "deep/new"), ("absolute", tmp_path / "other")):
        (tmp_path / link).symlink_to(to)
        export(tmp_path / "a", tmp_path / link)
        assert (tmp_path / link).is_symlink() and not list(tmp_path.glob("**/.*.tmp"))
        assert_equal(LLaMA.from_pretrained(tmp_path / link), ours)
    monkeypatch.chdir(tmp_path / "here")
    export(tmp_path / "a", ".")
    assert (tmp_path / "here/model.safetensors").exists()
    (tmp_path / "round").symlink_to("round")
    monkeypatch.setattr("tools.export.write_shards", lambda *args: pytest.fail("written before it was refused"))
    for target, message in (("link", "not empty"), ("round", "round"), ("/proc", "not empty"), ("a/adapter_config.json", "not empty")):
        with pytest.raises(UserError, match=message):
            export(tmp_path / "a", tmp_path / target)
    monkeypatch.setattr("os.path.ismount", lambda path: True)
    with pytest.raises(UserError, match="another file system begins"):
        export(tmp_path / "a", tmp_path / "fresh")


def test_a_shard_has_a_size():
    with pytest.raises(UserError, match="--shard_gb=-1.0 must be positive"):
        main(["a", "merged", "--shard_gb=-1"])


def test_command_line(tmp_path):
    base = make_base(tmp_path / "base")
    ours = our_adapter(base, tmp_path / "a")
    base.rename(tmp_path / "moved")
    (tmp_path / "merged").mkdir()  # an empty one is fine

    def command(*args):
        return subprocess.run([sys.executable, "-m", "tools.export", str(tmp_path / "a"), str(tmp_path / "merged"), *args], cwd=ROOT,
                              capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for args in ((), ("--mdel=x",)):
        r = command(*args)
        assert r.returncode == 1 and r.stderr.startswith("error: ") and r.stderr.count("\n") == 1, r.stderr
    assert "Traceback" in command("--debug=True").stderr
    assert command(f"--model={tmp_path / 'moved'}").returncode == 0
    assert_equal(hf(tmp_path / "merged"), ours)


# ---- checkpoints are read as transformers reads them -------------------------------------------------------

def edit_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


LINEAR = {"type": "linear", "factor": 4.0}


def test_rope_in_both_spellings_counts_once(tmp_path):
    """rope_scaling written by hand into a config.json that has rope_parameters: the same is fine, another is an error."""
    base = make_base(tmp_path / "base")
    plain = logits(LLaMA.from_pretrained(base))
    edit_json(base / "config.json", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}, rope_theta=500.0, rope_scaling=LINEAR)
    assert_equal(LLaMA.from_pretrained(base), hf(base))
    assert (logits(LLaMA.from_pretrained(base)) - plain).abs().max() > 1e-3
    edit_json(base / "config.json", rope_parameters=None, max_position_embeddings=100)
    assert_equal(LLaMA.from_pretrained(base), hf(base))
    assert LLaMA.from_pretrained(base).config.max_positions == 400
    edit_json(base / "config.json", rope_scaling=None)
    assert LLaMA.from_pretrained(base).config.max_positions == 100


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("layers, windows", [(dict(max_window_layers=1), (0, 8, 8)), (dict(max_window_layers=3), (0, 0, 0)),
                                             (dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"]), (8, 0, 8))])
def test_only_the_layers_that_slide_in_transformers_slide(tmp_path, kind, layers, windows):
    base = make_base(tmp_path / "base", kind, num_hidden_layers=3, use_sliding_window=True, sliding_window=8, head_dim=16, **layers)
    ours, theirs = LLaMA.from_pretrained(base), hf(base)
    assert ours.config.windows == windows and ours.config.sliding_window == max(windows)
    for prompt in ([1, 2, 3, 4, 5, 6], [77]):
        new = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None)
        assert ours.generate([prompt], 40, stop=()) == [new[0, len(prompt):].tolist()]


def test_llama_ignores_a_sliding_window(tmp_path):
    base = make_base(tmp_path / "base")
    edit_json(base / "config.json", sliding_window=4, use_sliding_window=True)
    assert_equal(LLaMA.from_pretrained(base), hf(base))


def test_one_file_counts_where_an_index_has_lost_its_shards(tmp_path):
    base = make_base(tmp_path / "base")
    whole = logits(LLaMA.from_pretrained(base))
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}))
    assert torch.equal(logits(LLaMA.from_pretrained(base)), whole)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model.safetensors"}}))
    assert torch.equal(logits(LLaMA.from_pretrained(base)), whole)


def test_a_tied_head_in_the_file_has_to_be_the_embedding(tmp_path):
    base = make_base(tmp_path / "base", tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert_equal(LLaMA.from_pretrained(base), hf(base))
    tensors["lm_head.weight"][5, 3] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lm_head.weight is not the embedding.*tie_word_embeddings"):
        LLaMA.from_pretrained(base)
    edit_json(base / "config.json", tie_word_embeddings=False)
    assert_equal(LLaMA.from_pretrained(base), hf(base))
