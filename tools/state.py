"""A run's state on disk: what `--resume=True` goes on from."""
import fcntl
import json
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from config import UserError


def lock(out_dir):
    """Holds out_dir for this process until it ends, however it ends. UserError when another process holds it."""
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    f = open(Path(out_dir) / ".lock", "w")
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"out_dir = {out_dir} is in use by another run: wait for it, or choose another --out_dir") from None
    return f


def save(out_dir, tensors, info):
    """tensors {name: tensor} and info (JSON) as the run's newest state; the one before is kept until this one is complete."""
    folder = Path(out_dir) / "state"
    tmp = Path(out_dir) / "state.tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, tmp / "state.safetensors")
    (tmp / "state.json").write_text(json.dumps(info))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(tmp, folder)


def load(out_dir):
    """-> (tensors, info) of the newest good state, or None when there is none."""
    folder = Path(out_dir) / "state"
    if not folder.exists():
        return None
    return load_file(folder / "state.safetensors"), json.loads((folder / "state.json").read_text())
