"""Files: Hugging Face directories and adapters in, whole files out. What can be wrong with them is said
in one sentence.
"""
import contextlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from config import UserError
from kernels import NF4
from lib import nf4


def read_json(path):
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        raise UserError(f"{path} has to hold a JSON object, not {type(value).__name__}")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: a model is a Hugging Face directory or hub id with a "
                        "config.json and safetensors") from None
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON: {e}") from None


def resolve(path):
    """A directory stays itself; a hub id is downloaded (safetensors, JSON and tokenizer files only; HF_TOKEN
    gives the token)."""
    if Path(path).is_dir():
        return Path(path)
    if str(path).startswith((".", "/", "~")) or str(path).count("/") != 1:
        raise UserError(f"model {str(path)!r} is neither a directory nor a hub id of the form owner/name: "
                        "give the directory with --model=DIR")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(
            str(path), allow_patterns=["*.safetensors", "*.json", "tokenizer.model", "chat_template*"],
            ignore_patterns=["consolidated*", "original/*", "onnx/*"]))
    except Exception as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(f"model {path} could not be downloaded ({type(e).__name__}: {reason}): "
                        "give a local directory with --model=DIR, or set HF_TOKEN if it is gated") from None


# ---- weights

def weight_files(folder):
    """The safetensors files of a checkpoint. UserError where there are none, a shard is missing, one is not
    in the index, or two checkpoints lie there."""
    folder = Path(folder)
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    names, present = set(), sorted(p.name for p in folder.glob("*.safetensors"))
    if index.exists():
        named = read_json(index).get("weight_map")
        if (not isinstance(named, dict) or not named
            or not all(isinstance(n, str) and Path(n).name == n for n in named.values())):
            raise UserError(f"{index} has no weight_map from tensors to files beside it; download it again")
        names = set(named.values())
    shards = [n for n in present if n != whole.name and (n.startswith("model-") or n in names)]
    if whole.exists() and whole.name not in names:
        if shards:
            raise UserError(f"{folder} holds two checkpoints, {whole.name} and {shards[0]}: keep the files "
                            "of one (model.safetensors.index.json belongs to the shards)")
        return [whole]  # an index beside it is of shards that are gone
    for name in sorted(names):
        if name not in present:
            raise UserError(f"{folder}: shard {name} of model.safetensors.index.json is missing; "
                            "download it again")
    extra = [n for n in shards if n not in names]
    if names and extra:
        raise UserError(f"{folder}: {extra[0]} is not in model.safetensors.index.json; remove it, "
                        "or the index of another checkpoint")
    if names:
        return [folder / n for n in sorted(names)]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise UserError(f"{folder} has only pickled weights, which can execute code when they are opened; "
                        "convert them to safetensors")
    raise UserError(f"{folder} has no model.safetensors" + (f" (but {present[0]})" if present else ""))


@torch.no_grad()
def load_weights(model, files):
    """Streams every tensor to its place. Each rank of a sharded model reads only the rows that it keeps. What
    bitsandbytes has packed is read with all that belongs to it, in whichever file that is. A head that a tied
    model's files hold too has to be the embedding."""
    sources, seen, head = model.named_sources(), set(), None
    homes = {}  # of each tensor, its file
    for path in files:
        with readable(path) as f:
            homes.update(dict.fromkeys(f.keys(), path))

    def whole(name):
        """A tensor of the checkpoint; None where it has none of this name."""
        if name not in homes:
            return None
        with readable(homes[name]) as f:
            return f.get_tensor(name)

    for path in files:
        with readable(path) as f:
            for name in f.keys():
                if name in sources and f.get_slice(name).get_dtype() == "U8":
                    load_packed(whole, name, *sources[name], f"{path.name}: {name}")
                    seen.add(name)
                elif name in sources:
                    load_tensor(f.get_slice(name), *sources[name], f"{path.name}: {name}")
                    seen.add(name)
                elif name == "lm_head.weight":
                    head = path
                elif not name.endswith("rotary_emb.inv_freq") and not nf4.belongs(name, sources):
                    raise UserError(f"{path}: tensor {name} has no place in this architecture "
                                    "(config.json's model_type, layers, biases)")
    missing = sorted(sources.keys() - seen)
    if missing:
        raise UserError(f"{files[0].parent}: {len(missing)} tensors are missing from the safetensors files, "
                        f"{missing[0]} first")
    if head and not is_embedding(head, sources["model.embed_tokens.weight"][0]):
        raise UserError(f"{head}: lm_head.weight is not the embedding, though config.json has "
                        "tie_word_embeddings = true: set it to false, or remove that tensor")


@contextlib.contextmanager
def readable(path):
    """The open safetensors file. UserError for all that can be wrong with it."""
    try:
        with safe_open(path, "pt") as f:
            yield f
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # safetensors has one error class for all that can be wrong with a file
        raise UserError(f"{path} is not a readable safetensors file ({e}); download it again") from None


def is_embedding(path, p):
    """Whether the file's lm_head.weight is what p, the embedding, holds (on this rank) after loading."""
    local, offset = (p.to_local(), row_offset(p)) if hasattr(p, "to_local") else (p, 0)
    with safe_open(path, "pt") as f:
        head = f.get_slice("lm_head.weight")
        return (head.get_shape() == list(p.shape)
                and torch.equal(head[offset:offset + len(local)].to(local), local))


def load_tensor(source, p, first, rows, transposed, name):
    """Copies a safetensors slice into rows first : first + rows of p, of which a sharded p
    holds only some, or packs it there."""
    shape = list(source.get_shape())
    want = [p.shape[1], rows] if transposed else [rows, *p.shape[1:]]
    if shape != want:
        raise UserError(f"{name} has shape {shape}, config.json says {want}")
    if source.get_dtype() not in ("F64", "F32", "F16", "BF16"):
        raise UserError(f"{name} is of type {source.get_dtype()}: quantized weights cannot be read here, "
                        "use the checkpoint they were made from")
    if isinstance(p, NF4):
        t = source[:].to(p.device)
        if transposed:
            t = t.T
        return nf4.put(p, first, *nf4.quantize(t))
    local, offset = (p.to_local(), row_offset(p)) if hasattr(p, "to_local") else (p, 0)
    lo, hi = max(first, offset), min(first + rows, offset + local.shape[0])
    if lo < hi:
        a, z = lo - first, hi - first
        t = source[:, a:z].T if transposed else source[a:z]
        local[lo - offset:hi - offset].copy_(t)


def load_packed(whole, source, p, first, rows, transposed, name):
    """The same for a tensor that bitsandbytes has packed. whole: a function, tensor's name -> tensor or None. Its codes
    and scales are copied; where it lies transposed here, or its scales are not quantized too, it is unpacked and
    packed anew."""
    if not isinstance(p, NF4):
        raise UserError(f"{name} is packed in 4 bits, and only q, k, v, o, gate, up and down can be: "
                        "use the checkpoint that it was made from")
    shape, *packed = nf4.read(whole, source, p.device, name)
    want = [p.shape[1], rows] if transposed else [rows, p.shape[1]]
    if shape != want:
        raise UserError(f"{name} has shape {shape}, config.json says {want}")
    nf4.put(p, first, *nf4.as_stored(shape, *packed, transposed))


def row_offset(p):
    """First row that this rank holds of a DTensor that is cut along dim 0 (FSDP2 cuts like torch.chunk)."""
    return p.device_mesh.get_local_rank() * -(-p.shape[0] // p.device_mesh.size())


def read_notes(folder):
    """{str: str}: what data.notes has left in the header of an adapter's or a model's weights; {} if
    nothing."""
    adapter = Path(folder) / "adapter_model.safetensors"
    file = adapter if adapter.exists() else weight_files(folder)[0]
    try:
        with safe_open(file, "pt") as f:
            notes = f.metadata() or {}
    except Exception as e:  # as in load_weights
        raise UserError(f"{file} is not a readable safetensors file ({e}); copy it again") from None
    return {k: v for k, v in notes.items() if k != "format"}


def set_end_token(folder, notes):
    """Makes the token that ends a trained answer the first that ends a text, for whoever serves this
    model."""
    for name in ("config.json", "generation_config.json"):
        if "end_id" in notes and (Path(folder) / name).exists():
            c, end = read_json(Path(folder) / name), int(notes["end_id"])
            old = c.get("eos_token_id")
            ids = [end, *(i for i in (old if isinstance(old, list) else [old]) if i not in (end, None))]
            c["eos_token_id"] = ids if ids[1:] else end
            write_text(Path(folder) / name, json.dumps(c, indent=2) + "\n")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if "end_token" in notes and (Path(folder) / name).exists():
            c = {**read_json(Path(folder) / name), "eos_token": notes["end_token"]}
            write_text(Path(folder) / name, json.dumps(c, indent=2, ensure_ascii=False) + "\n")


# ---- adapters in PEFT's format

# PEFT's options that plain LoRA does not have
VARIANTS = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication",
            "lora_bias", "fan_in_fan_out", "target_parameters",
            "trainable_token_indices", "alora_invocation_tokens", "use_qalora", "use_bdlora",
            "arrow_config", "kasa_config", "monteclora_config", "velora_config")
# initializations that also changed the base's weights
CHANGED_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga", "mica")


def read_adapter(path):
    """Directory or hub id -> (adapter_config.json as a dict, {PEFT's name: tensor}). UserError for all that
    is not plain LoRA."""
    folder = resolve(path)
    if not (folder / "adapter_config.json").exists():
        raise UserError(f"{path} holds no adapter: adapter_config.json is missing")
    c = read_json(folder / "adapter_config.json")
    odd = [f"{k} = {c[k]!r}" for k in VARIANTS if c.get(k)]
    odd += [f"{k} = {c[k]!r}"
            for k, plain in (("peft_type", "LORA"), ("bias", "none")) if c.get(k, plain) != plain]
    if str(c.get("init_lora_weights")).lower().startswith(CHANGED_BASE):
        odd.append(f"init_lora_weights = {c['init_lora_weights']!r}")
    if odd:
        raise UserError(f"{path}/adapter_config.json has {odd[0]}, and only plain LoRA can be read: "
                        "merge that adapter with PEFT first")
    if not (isinstance(c.get("r"), int) and c["r"] > 0 and isinstance(c.get("lora_alpha"), (int, float))):
        raise UserError(f"{path}/adapter_config.json needs a positive r and lora_alpha, "
                        f"not {c.get('r')!r} and {c.get('lora_alpha')!r}")
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        raise UserError(f"{path} has no adapter_model.safetensors: save the adapter with PEFT >= 0.6, "
                        "whose default it is")
    try:
        with safe_open(file, "pt") as f:
            return c, {k: f.get_tensor(k) for k in f.keys()}
    except Exception as e:  # as in load_weights
        raise UserError(f"{file} is not a readable safetensors file ({e}); copy it again") from None


def find_base(adapter, model=""):
    """(what is the base of the adapter in this directory: `model`, or else what adapter_config.json names;
    its directory). UserError: there is none."""
    base = model or read_json(Path(adapter) / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise UserError(f"{adapter}/adapter_config.json names no base model: give it with --model=DIR")
    try:
        return base, resolve(base)
    except UserError as e:
        named = "" if model else f"{adapter}/adapter_config.json names the base {base!r}: "
        raise UserError(f"{named}{e}") from None


def add_samples(sha, path):
    """Adds to a hashlib object a file's name, its size and 64 KB at 16 places: enough to tell weights apart."""
    size = os.path.getsize(path)
    sha.update(f"{Path(path).name} {size} ".encode())
    with open(path, "rb") as f:
        for i in range(16):
            f.seek(i * max(0, size - 65536) // 15)
            sha.update(f.read(65536))


# ---- writing

def write_text(path, text):
    """Writes a whole file or nothing: a temporary name, flushed to the disk, then renamed."""
    tmp = Path(f"{path}.tmp")
    with open(tmp, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


def write_safetensors(path, tensors, metadata=None):
    """The same for a safetensors file."""
    tmp = Path(f"{path}.tmp")
    try:
        save_file(tensors, tmp, metadata)
    except SafetensorError as e:
        raise OSError(str(e)) from e  # a full disk
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    os.chmod(tmp, 0o666 & ~mask)  # safetensors 0.8 lets nobody else read its files
    with open(tmp, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(tmp, path)
