"""A run's state on disk: what --resume=True goes on from.

    out_dir/state/000007/state.safetensors    every tensor of the run
                         state.json           everything else, the config, and SHA-256 sums of both
    out_dir/state/000006/                     the one before

A state is written under the name `tmp`, flushed to the disk, and begins to count with one rename. So a kill,
a power cut or a full disk at any moment leaves the last state as it was. The one before it stays too, for the
day when a disk damages the newest. No pickle anywhere.
"""
import fcntl
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import safetensors.torch

from config import Config, UserError
from lib.files import add_samples, write_text

FORMAT = 1
# Options that may be others on resume: they say where, how far and how fast a run computes and how much it tells, not
# what it computes (device and micro_batch_size change the rounding, the latter also whose rows choose channels
# together). The contents of model and dataset are compared instead of their paths (fingerprint).
FREE = {"model", "dataset", "out_dir", "resume", "debug", "threads", "device", "micro_batch_size", "recompute", "fsdp",
        "timeout", "log_interval", "eval_interval", "eval_examples", "save_interval", "max_steps"}


class Damaged(Exception):
    """A state that is torn, truncated or changed: what is wrong with it."""


def claim(out_dir, resume):
    """Before anything is loaded: takes the lock of an out_dir that exists. None where it does not, and then
    nothing is written. UserError when it is in use, or holds another run's work and resume is False."""
    out = Path(out_dir)
    if not out.exists():
        return None
    f = lock(out) if (out / ".lock").exists() else None
    if not resume and numbers(out / "state"):
        raise UserError(f"out_dir = {out} holds another run: go on with it with --resume=True, "
                        "or choose another --out_dir")
    odd = [p.name for p in out.glob("*.safetensors")]
    if odd and not numbers(out / "state"):
        raise UserError(f"out_dir = {out} holds weights that are not of a run of this program ({odd[0]}): "
                        "choose another --out_dir")
    return f or lock(out)


def lock(out_dir):
    """Holds out_dir for this process until the file that is returned is closed, or the process ends, however
    it ends. UserError when another process holds it, or when nothing can be written there."""
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        f = open(Path(out_dir) / ".lock", "w")
    except OSError as e:
        raise UserError(f"out_dir = {out_dir} cannot be written to ({e.strerror}): "
                        "choose another --out_dir") from None
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"out_dir = {out_dir} is in use by another run: wait for it, "
                        "or choose another --out_dir") from None
    return f


# ---- writing -----------------------------------------------------------------------------------------------

def save(out_dir, tensors, info):
    """tensors {name: tensor} and info (JSON) become the run's newest state. OSError (a full disk): there is
    no new one, the others stay."""
    folder = Path(out_dir) / "state"
    tmp, have = folder / "tmp", numbers(folder)
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        tmp.mkdir(parents=True)
        data = safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
        write(tmp / "state.safetensors", data)
        write(tmp / "state.json", json.dumps(sealed(info, hashlib.sha256(data).hexdigest())).encode())
        sync(tmp)
        os.rename(tmp, folder / f"{(have or [0])[-1] + 1:06d}")
        sync(folder)
    except OSError:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    for n in have[:-1]:
        shutil.rmtree(folder / f"{n:06d}", ignore_errors=True)


def numbers(folder):
    """The numbers of the states in a folder, oldest first."""
    return sorted(int(p.name) for p in Path(folder).glob("[0-9]*") if p.name.isdigit())


def write(path, data):
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def sync(folder):
    """Flushes a directory: a rename is on the disk only then."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sealed(info, tensors):
    """What state.json holds. tensors: SHA-256 of state.safetensors."""
    info = json.loads(json.dumps(info))  # as it will be read: a block's number as a key becomes text
    text = json.dumps(info, sort_keys=True)
    return {"format": FORMAT, "info": info, "tensors": tensors,
            "checksum": hashlib.sha256(f"{FORMAT} {tensors} {text}".encode()).hexdigest()}


# ---- reading -----------------------------------------------------------------------------------------------

def load(out_dir, identity):
    """-> (tensors, info) of the newest good state, (None, None) when there is no state. A damaged one is
    named on stderr and the one before it taken; UserError when all are damaged, or when it is of another run.
    identity: {"config": options, "prints": fingerprints}."""
    folder = Path(out_dir) / "state"
    for n in reversed(numbers(folder)):
        try:
            tensors, info = read(folder / f"{n:06d}")
        except Damaged as e:
            print(f"warning: {folder}/{n:06d} is damaged ({e}), trying the one before it", file=sys.stderr,
                  flush=True)
            continue
        odd = differences(info, identity)
        if odd:
            raise UserError(f"the state in {folder} is of another run ({'; '.join(odd)}): set these back, "
                            "or choose another --out_dir")
        for bad in (k for k in numbers(folder) if k > n):  # else the next save would keep it, not this one
            aside = folder / f"{bad:06d}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(folder / f"{bad:06d}", aside)
        return tensors, info
    if numbers(folder):
        raise UserError(f"every state in {folder} is damaged: start again with another --out_dir")
    return None, None


def read(folder):
    """-> (tensors, info) of one state. Damaged: anything that save() cannot have written."""
    try:
        s = json.loads((folder / "state.json").read_bytes())
        data = (folder / "state.safetensors").read_bytes()
    except (OSError, ValueError) as e:
        raise Damaged(getattr(e, "strerror", None) or f"state.json: {e}") from None
    if not isinstance(s, dict) or s.get("format") != FORMAT or s != sealed(s.get("info"), s.get("tensors")):
        raise Damaged(f"state.json does not fit its checksum, or is not of format {FORMAT}")
    if hashlib.sha256(data).hexdigest() != s["tensors"]:
        raise Damaged("state.safetensors does not fit its checksum")
    return safetensors.torch.load(data), s["info"]


# ---- does it belong to this run? ---------------------------------------------------------------------------

def differences(there, here):
    """Of a state and of a run that wants to go on from it -> ["seed = 1 there, 2 here", ...]: what should be
    equal and is not. An option that the state lacks has its default there; one that is no option any more says
    nothing."""
    old, new = {**vars(Config()), **there["config"]}, json.loads(json.dumps(here["config"]))
    odd = [f"{k} = {old[k]!r} there, {v!r} here" for k, v in new.items() if k not in FREE and old[k] != v]
    return odd + [f"{k} = {old[k]!r} there, {new[k]!r} here, with other contents"
                  for k, v in here["prints"].items() if there["prints"].get(k) != v]


def fingerprint(folder, architecture):
    """Of a model, in any directory: its ModelConfig, and of each safetensors file the size and 64 KB at 16
    places. Another model of the same architecture differs in nearly every weight, so the whole 16 GB need not
    be read."""
    own = {k: v for k, v in vars(architecture).items() if k not in ("raw", "eos_token_id")}
    sha = hashlib.sha256(json.dumps(own, sort_keys=True).encode())
    for path in sorted(Path(folder).glob("*.safetensors")):
        add_samples(sha, path)
    return sha.hexdigest()


def digest(tokenized):
    """Of all tokens and weights that a run trains on."""
    sha = hashlib.sha256()
    for t in tokenized:
        sha.update(np.asarray(t.tokens, np.int32).tobytes()
                   + np.asarray(t.weights, np.float32).tobytes() + b" ")
    return sha.hexdigest()


# ---- metrics.jsonl of a run that goes on -------------------------------------------------------------------

def cut_metrics(path, step, evaluated):
    """Keeps the lines of metrics.jsonl that a state after so many steps, evaluated last after so many, knows of: what
    comes later is done again."""
    lines = path.read_text(encoding="utf-8").splitlines(True) if path.exists() else []
    lines = [l for l in lines if l.startswith("{") and l.endswith("}\n")]  # a killed process may have left a torn one
    write_text(path, "".join(l for l in lines if known(json.loads(l), step, evaluated)))


def known(m, step, evaluated):
    if "val_loss" in m:
        return m["step"] <= evaluated
    return m["step"] < step
