"""Merges an adapter into its base: a whole Hugging Face directory, for transformers, vLLM,
lm-eval and llama.cpp.

    python -m tools.export out/math merged/ [--model=DIR]    DIR: the base, if it is not where
                                                             the adapter says
    --prompt_format=chatml    of an adapter that does not say which it was trained with (PEFT's)

    W' = W + s B A     s = alpha / r, or alpha / sqrt(r) with rslora; in fp32, rounded once to
                       the base's dtype

Works on the files alone, tensor by tensor, and writes shards of at most --shard_gb: an 8B merge holds one
shard (5 GB by default) in memory, whatever the base's files look like. An adapter that was trained on a 4-bit base
is merged into the 16-bit one on the disk, and it says so. The result is complete or absent: it is written
under another name, then renamed. What ended the trained answers is its first eos_token_id and its eos_token,
and the weights' files say how prompts are written (data.notes), for tools.eval.
"""
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

import data
import data.tokenizer
from lib import cli
from config import UserError
from lib.files import (find_base, read_adapter, read_notes, resolve, set_end_token, weight_files,
                       write_safetensors)

COPIED = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
          "added_tokens.json", "vocab.json", "merges.txt", "chat_template*", "LICENSE*", "USE_POLICY*",
          "NOTICE*")


def plan(files, limit):
    """The base's tensors, in their order, in shards of at most `limit` bytes: [[(file, name, bytes)]]."""
    shards, room = [], 0
    for path, name, size in (t for path in files for t in tensors_in(path)):
        if size > room:
            shards.append([])
            room = limit
        shards[-1].append((path, name, size))
        room -= size
    return shards


def tensors_in(path):
    """[(file, name, bytes)] of a safetensors file, from its header alone."""
    try:
        with safe_open(path, "pt") as f:
            slices = {name: f.get_slice(name) for name in f.keys()}
            return [(path, name, bytes_of(s.get_dtype(), s.get_shape())) for name, s in slices.items()]
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path} is not a readable safetensors file ({e}); download it again") from None


def bytes_of(dtype, shape):
    """Size of a safetensors tensor. dtype is its name there: F32, BF16, I8, F8_E4M3, BOOL, ..."""
    bits = re.match(r"[A-Z]+(\d+)", dtype)
    n = int(bits[1]) // 8 if bits else 1
    for d in shape:
        n *= d
    return n


def updates(adapter, state, scale):
    """{base tensor's name: (s B, A)} of an adapter. UserError: no LoRA factor of a linear layer."""
    pairs = {}
    for key, t in state.items():
        m = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if not m or t.dim() != 2:
            raise UserError(f"adapter {adapter}: tensor {key} is no LoRA factor of a linear layer")
        pairs.setdefault(m[1] + ".weight", {})[m[2]] = t.float()
    for name, p in pairs.items():
        if set(p) != {"A", "B"} or p["A"].shape[0] != p["B"].shape[1]:
            raise UserError(f"adapter {adapter}: the factors of {name} are incomplete or of different rank")
    return {name: (p["B"] * scale, p["A"]) for name, p in pairs.items()}


def merged(w, name, update):
    """w (N, D) + B A, in fp32 (fp64 for fp64), rounded once to w's dtype. update: (s B (N, r), A (r, D))."""
    B, A = update
    if not w.is_floating_point() or w.element_size() < 2:
        raise UserError(f"the base's {name} is quantized ({w.dtype}): merge into the full model, --model=DIR")
    if w.shape != (B.shape[0], A.shape[1]):
        raise UserError(f"the adapter is for another base: its {name} is {(B.shape[0], A.shape[1])}, "
                        "this base's "
                        f"{tuple(w.shape)}; give the right one with --model=DIR")
    high = torch.promote_types(w.dtype, torch.float32)
    return torch.addmm(w.to(high), B.to(high), A.to(high)).to(w.dtype)


def write_shards(shards, changes, target, notes):
    """Writes the shards into target, one in memory at a time, and an index of several. `changes`
    is used up; notes: for the header of each file."""
    index, n = {}, len(shards)
    for i, shard in enumerate(shards):
        file = "model.safetensors" if n == 1 else f"model-{i + 1:05d}-of-{n:05d}.safetensors"
        tensors = {}
        for path, name, _ in shard:
            with safe_open(path, "pt") as f:
                t = f.get_tensor(name)
            tensors[name] = merged(t, name, changes.pop(name)) if name in changes else t
            index[name] = file
        write_safetensors(target / file, tensors, {"format": "pt", **notes})
        print(f"wrote {file}: {len(tensors)} tensors, {sum(s for _, _, s in shard) / 1e9:.2f} GB", flush=True)
    if n > 1:
        total = sum(size for shard in shards for _, _, size in shard)
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        (target / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")


def export(adapter, target, model="", shard_gb=5.0, prompt_format=""):
    """Merges an adapter into its base (or into `model`): the new directory `target`, which may
    exist if empty. prompt_format: if it is not the one that the adapter names."""
    target = find_target(target)
    if Path(adapter, "config.json").exists() and not Path(adapter, "adapter_config.json").exists():
        raise UserError(f"{adapter} has no adapter_config.json: it holds no adapter (a training with "
                        "lora_r = 0 makes a whole model, with nothing to merge)")
    settings, state = read_adapter(adapter)
    base, folder = find_base(resolve(adapter), model)
    notes = read_notes(resolve(adapter))
    bits = notes.pop("base_bits", "16")  # of the base in training; the merged model is not packed
    if prompt_format:
        notes = data.notes(data.tokenizer.load(folder), prompt_format, notes.get("max_new_tokens", 0))
    shards = plan(weight_files(folder), shard_gb * 1e9)
    scale = settings["lora_alpha"] / (settings["r"] ** .5 if settings.get("use_rslora") else settings["r"])
    changes = updates(adapter, state, scale)
    foreign = sorted(changes.keys() - {name for shard in shards for _, name, _ in shard})
    if foreign:
        raise UserError(f"the adapter in {adapter} is for another base: {base} has no {foreign[0]}; give the "
                        "right one with --model=DIR")
    tmp = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        tmp.mkdir(parents=True)
        for path in sorted({p for pattern in COPIED for p in folder.glob(pattern) if p.is_file()}):
            shutil.copyfile(path, tmp / path.name)  # follows the hub cache's links
        write_shards(shards, changes, tmp, notes)
        set_end_token(tmp, notes)
        flush(tmp)
        os.replace(tmp, target)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{target} could not be written ({e}): a full disk, or a damaged {base}") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    print(f"merged {adapter} into {base}: {target}")
    if bits == "4":
        print("the adapter was trained on this base in 4 bits, and is merged into it as it lies on the disk: what the "
              "packing had changed is gone, and answers may differ")
    if "end_id" in notes:
        print(f"prompt_format = {notes['prompt_format']}, answers end with {notes['end_token']}")
    else:
        print(f"{adapter} does not say its prompt_format, so the base's eos_token stays; --prompt_format=... "
              "sets the format's")


def find_target(path):
    """The directory that is meant, links followed. UserError, before hours of writing: it is not free."""
    try:
        target = Path(path).resolve()
    except (OSError, RuntimeError) as e:
        raise UserError(f"{path} cannot be followed ({e}): give another name") from None
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty: remove it, or give another name")
    if os.path.ismount(target):
        raise UserError(f"{target} is where another file system begins, and cannot be replaced: give a new "
                        "name in it")
    return target


def flush(folder):
    """All of it on the disk before the rename says so."""
    for path in folder.iterdir():
        with open(path, "rb+") as f:
            os.fsync(f.fileno())


def main(argv):
    (adapter, target), o = cli.options(argv, __doc__, (2, 2), model="", shard_gb=5.0, prompt_format="")
    if not o["shard_gb"] > 0:
        raise UserError(f"--shard_gb={o['shard_gb']} must be positive")
    export(adapter, target, o["model"], o["shard_gb"], o["prompt_format"])


if __name__ == "__main__":
    cli.run(main)
