"""More than one GPU, in one place. A reader of the single-GPU path needs to know only: rank() is 0, world()
is 1, and the functions that gather, add or send return what they were given.

    torchrun --nproc_per_node=8 train.py config/math.py                     one machine, data parallel
    torchrun --nproc_per_node=8 train.py config/math.py --fsdp=True         the same, frozen weights sharded
                                                                            over the 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500
             train.py config/math.py                                        on each of 2 machines

Data parallel: every rank has the whole model, computes every world-th example of a batch, and the flat LoRA
gradient, with the loss and the sum of its weights appended, is summed in one all-reduce a step (27 M
numbers for LLaMA-3-8B: 108 MB, about 1 ms over NVLink). Every rank then makes the same update. FSDP: LoRA
is still replicated and reduced like that; only frozen weights are cut up, by rows, and a block's are
gathered while it is computed, forward and backward, so a rank holds 1 / world of the blocks and two or
three whole ones at a time.

Numbers that the host needs go over gloo, on the CPU, so that no host waits for a device.
"""
import contextlib
import ctypes
import json
import os
import re
import sys
from datetime import timedelta

import torch
import torch.distributed as td

import data
from config import UserError


def rank():
    return td.get_rank() if td.is_initialized() else 0


def world():
    return td.get_world_size() if td.is_initialized() else 1


def setup(cfg):
    """Joins the process group that torchrun announces, and returns this process's torch.device. UserError: a
    device that is not there."""
    name = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    launched = "LOCAL_RANK" in os.environ
    if launched and name.startswith("cuda:"):
        raise UserError(f"device = {name!r} names one GPU, but under torchrun each process takes its "
                        "own: use --device=cuda")
    device = use(f"cuda:{os.environ['LOCAL_RANK']}" if launched and name == "cuda" else name, cfg.dtype)
    if not launched:
        if cfg.fsdp:
            raise UserError("fsdp = True shards the frozen weights over the processes of torchrun: "
                            "start with torchrun --nproc_per_node=N train.py ...")
        return device
    n = int(os.environ["WORLD_SIZE"])  # before they meet: who comes late would find the others gone, not why
    if cfg.batch_size < n:
        raise UserError(f"batch_size = {cfg.batch_size} is less than one example for each of {n} "
                        "processes: raise it, or start fewer")
    if cfg.fsdp and cfg.lora_r == 0:
        raise UserError("fsdp = True shards frozen weights, and with lora_r = 0 none is frozen: use LoRA, "
                        "or --fsdp=False")
    if not td.is_initialized():
        td.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                              timeout=timedelta(seconds=cfg.timeout))
    return device


def keep_memory():
    """Lets a process keep what it has freed. glibc gives blocks of 128 KB and more back to the kernel, and each of their
    pages costs a fault when it comes again: a quarter of a step of SmolLM2 (4 x 512 tokens, bf16, one thread: 9.2 s
    instead of 6.7). Does nothing where there is no glibc."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    mallopt(mmap_threshold, 2 ** 30)
    mallopt(trim_threshold, 2 ** 31 - 1)
    mallopt(top_pad, 2 ** 28)


def use(name, dtype):
    """name: cpu, cuda or cuda:N -> its torch.device, the current one from now on: Triton launches there,
    whatever its tensors say. UserError: it is not there, or cannot compute in dtype (a name)."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"device = {name!r} has to be auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cpu":
        keep_memory()
        return device
    if not torch.cuda.is_available():
        raise UserError(f"device = {name!r}, but torch sees no CUDA GPU here: use --device=cpu, "
                        "or install a CUDA build of torch")
    if (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"there are {torch.cuda.device_count()} GPUs here, and {device} is not one of them: "
                        "choose another, or lower --nproc_per_node")
    if dtype == "bfloat16" and torch.cuda.get_device_capability(device)[0] < 8:
        raise UserError(f"dtype = 'bfloat16', but {torch.cuda.get_device_name(device)} has no bfloat16: "
                        "use --dtype=float16")
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


def leave():
    """The end of a run that went well. Under torchrun it ends the process too: threads of gloo that outlive
    the group abort the interpreter's own ending (SIGABRT after 4 of 40 finished runs on a loaded machine, and
    torchrun then calls the run failed)."""
    if td.is_initialized():
        td.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)


def launcher():
    """How this process was started, for the message that says how to start it again."""
    if "LOCAL_WORLD_SIZE" not in os.environ:
        return "python"
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    several = f" --nnodes={nodes} --rdzv_backend=c10d --rdzv_endpoint=HOST:29500" if nodes > 1 else ""
    return f"torchrun --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}{several}"


# ---- between ranks -----------------------------------------------------------------------------------------

@contextlib.contextmanager
def lost():
    """What happens where another rank is gone becomes one sentence."""
    try:
        yield
    except RuntimeError as e:
        raise UserError(lost_message(e)) from e


def lost_message(e):
    here = os.environ.get("RANK", rank()), os.environ.get("WORLD_SIZE", world())  # they may not have met yet
    return (f"rank {here[0]} of {here[1]} lost the others: one ended, or did not answer within the timeout; "
            f"the cause is in its own message ({str(e).splitlines()[0][:200]})")


def is_loss(e):
    """Whether an error comes from a collective: FSDP's are inside of forward and backward."""
    return "LOCAL_RANK" in os.environ and (
        isinstance(e, td.DistError)
        or any(word in str(e) for word in ("gloo", "Gloo", "NCCL", "closed by peer")))


def all_reduce(t):
    """Sums t over all ranks, in place."""
    if td.is_initialized():
        with lost():
            td.all_reduce(t)
    return t


def broadcast(t):
    """t becomes rank 0's, in place."""
    if td.is_initialized():
        with lost():
            td.broadcast(t, 0)
    return t


def add(*numbers):
    """The sums of these integers over all ranks, a list. On the CPU: it holds up no device."""
    return list(numbers) if world() == 1 else all_reduce(torch.tensor([int(n) for n in numbers])).tolist()


def agree(yes):
    """True where it is on all ranks."""
    return add(bool(yes))[0] == world()


def gather(t):
    """t on the CPU, the same shape everywhere -> [rank 0's, rank 1's, ...]."""
    if world() == 1:
        return [t]
    out = [torch.empty_like(t) for _ in range(world())]
    with lost():
        td.all_gather(out, t)
    return out


def share(value):
    """Rank 0's value, of what JSON can hold, on all ranks."""
    if world() == 1:
        return value
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    size = broadcast(torch.tensor(len(data)))
    return json.loads(
        bytes(broadcast(data if rank() == 0 else torch.empty(int(size), dtype=torch.uint8)).tolist()))


def share_tensors(tensors):
    """Rank 0's {name: tensor}, on the CPU, on all ranks; None stays None."""
    if world() == 1:
        return tensors
    kinds = None
    if tensors is not None:
        kinds = {k: (str(t.dtype).removeprefix("torch."), list(t.shape)) for k, t in tensors.items()}
    kinds = share(kinds)
    if kinds is None:
        return None
    if rank():
        tensors = {k: torch.empty(shape, dtype=getattr(torch, dtype)) for k, (dtype, shape) in kinds.items()}
    return {k: broadcast(tensors[k]) for k in kinds}


# ---- FSDP --------------------------------------------------------------------------------------------------

def fsdp(device):
    """-> a function for LLaMA.from_pretrained(shard=...), which gets the model on the meta device. Adapters
    that are added later are not FSDP's: they stay whole on every rank. So do the embedding and the head,
    which are read outside the blocks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    def shard(model):
        mesh = init_device_mesh(device.type, (world(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
            register_fsdp_forward_method(block, "decode")
        fully_shard(model, mesh=mesh,
                    ignored_params={p for n, p in model.named_parameters() if not n.startswith("blocks.")})
        for method in ("hidden", "decode"):
            register_fsdp_forward_method(model, method)

    return shard


@contextlib.contextmanager
def whole(block):
    """Inside, the weights of a block have all their rows, where FSDP has cut them up over ranks (which all have to
    come here)."""
    if not hasattr(block, "unshard"):
        yield
        return
    block.unshard()
    try:
        yield
    finally:
        block.reshard()


def even(micro, share, size, example):
    """Under FSDP all ranks have to run the same number of forward passes: those of the largest share, in
    micro-batches of this size. A rank with fewer gets some of weight 0, made of example(). Their rows are all
    dense, so they have no say in which channels are kept."""
    n = -(-share // size) - len(micro)
    if not n:
        return micro
    spare = example()
    return micro + n * [spare._replace(weights=torch.zeros_like(spare.weights), n_sparse=0)]


# ---- a rank's share ----------------------------------------------------------------------------------------

def micro_batches(tokenized, idx, cfg, device, seed=0):
    """[data.Batch]: this rank's share of the examples idx of tokenized, on the device, in micro-batches. seed: of
    split = "random"."""
    share = idx[rank()::world()]
    largest_share = -(-cfg.batch_size // world())
    size = min(cfg.micro_batch_size or cfg.batch_size, largest_share)
    micro = []
    for i in range(0, len(share), size):
        some = [tokenized[j] for j in share[i:i + size]]
        micro.append(data.collate(some, cfg.split, seed + i, cfg.dense_first).to(device))
    if not cfg.fsdp:
        return micro
    return even(micro, -(-len(idx) // world()), size, lambda: data.collate([tokenized[idx[0]]]).to(device))
