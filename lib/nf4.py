"""Weights in 4 bits: how an NF4 (kernels.py) is made, from a weight or from what bitsandbytes has written.

    scale     the largest absolute value of 64 numbers of a row
    code      of the value of NF4_VALUES that is nearest to number / scale
    double quantization: the scales less their mean over the tensor of the checkpoint (the offset), in blocks of 256 in
              the order in which they lie, each divided by its largest absolute value (nested): the nearest of 256

in fp32, with the arithmetic of bitsandbytes (functional.quantize_4bit(w, compress_statistics=True, quant_type="nf4")):
codes, scales and the unpacked matrix are equal to its, bit for bit (tests/test_nf4.py). One exception: its own CPU
kernel finds the nearest of 256 through a table of 65,536 places, and .2 % of the scale codes are a neighbour of the
nearest one; on a GPU, and in its portable kernel, they are as here.
"""
import json
import math

import torch

import kernels
from config import UserError
from kernels import BLOCK, NF4, SCALES

SMALLEST = 1e-38  # what a block of zeros is divided by


def nearest(x, values):
    """x, values sorted (n,) -> the positions of the nearest values, uint8."""
    middles = (values[:-1] + values[1:]) / 2
    return torch.bucketize(x, middles, out_int32=True).to(torch.uint8)


def quantize(w):
    """w (N, D), D a multiple of 64, of any float type -> codes (N, D / 2) and scale_codes (N, D / 64) uint8, nested
    (N D / 64 / 256, rounded up) fp32, offset, a number in fp32 (). As of kernels.NF4."""
    N, D = w.shape
    codes = torch.empty(N, D // 2, dtype=torch.uint8, device=w.device)
    scales = torch.empty(N, D // BLOCK, device=w.device)
    values = kernels.nf4_values(w.device)
    for w_b, codes_b, scales_b in kernels.row_blocks(2 ** 18, w, codes, scales):  # what lies between: 8 MB
        blocks = w_b.float().contiguous().unflatten(1, (-1, BLOCK))  # (rows, D / 64, 64)
        torch.amax(blocks.abs(), 2, out=scales_b)
        inverse = 1 / scales_b.clamp(min=SMALLEST)
        code = nearest((blocks * inverse[:, :, None]).clamp(-1, 1), values).flatten(1)  # (rows, D)
        codes_b.copy_(code[:, 0::2] << 4 | code[:, 1::2])
    return codes, *quantize_scales(scales)


def quantize_scales(scales):
    """scales (N, D / 64) fp32 -> scale_codes of the same shape, nested, offset."""
    offset = scales.flatten().mean()
    rest = scales.flatten() - offset
    padding = -len(rest) % SCALES
    groups = torch.nn.functional.pad(rest, (0, padding)).view(-1, SCALES)
    nested = groups.abs().amax(1)  # one for 256
    inverse = 1 / nested.clamp(min=SMALLEST)
    code = nearest((groups * inverse[:, None]).clamp(-1, 1), kernels.scale_values(scales.device))
    return code.flatten()[:len(rest)].view(scales.shape), nested, offset


def dequantize(codes, scale_codes, nested, offset, dtype):
    """What quantize() returned -> (N, D) in dtype."""
    w = empty([len(codes)], 2 * codes.shape[1], dtype, codes.device)
    put(w, 0, codes, scale_codes, nested, offset)
    return w.unpack()


def empty(sizes, D, dtype, device):
    """An NF4 without contents, for tensors of sizes[0], sizes[1], ... rows of D numbers."""
    N = sum(sizes)
    groups = sum(math.ceil(n * D / BLOCK / SCALES) for n in sizes)
    new = lambda *shape, dtype: torch.empty(shape, dtype=dtype, device=device)
    w = NF4(codes=new(N, D // 2, dtype=torch.uint8), scale_codes=new(N, D // BLOCK, dtype=torch.uint8),
            nested=new(groups, dtype=torch.float32), start=new(N, dtype=torch.int32),
            offset=new(N, dtype=torch.float32), dtype=dtype)
    w.sizes = sizes
    return w


@torch.no_grad()
def put(w, first, codes, scale_codes, nested, offset):
    """Writes one tensor of the checkpoint, as quantize() returns it, to w's rows from `first` on."""
    blocks = w.scale_codes.shape[1]  # of a row
    rows, group = 0, 0  # of the tensors before it
    for size in w.sizes:
        if rows == first:
            break
        rows += size
        group += math.ceil(size * blocks / SCALES)
    here = slice(first, first + len(codes))
    w.codes[here] = codes
    w.scale_codes[here] = scale_codes
    w.nested[group:group + len(nested)] = nested
    w.start[here] = group * SCALES + blocks * torch.arange(len(codes), dtype=torch.int32, device=w.device)
    w.offset[here] = offset


# ---- what bitsandbytes has written -------------------------------------------------------------------------

PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")  # beside a packed tensor: NAME.absmax ...
STATE = "quant_state.bitsandbytes__nf4"  # JSON, as bytes


def belongs(name, sources):
    """Whether this tensor of a checkpoint is a part of one of `sources`, packed."""
    source, weight, part = name.rpartition(".weight.")
    return source + ".weight" in sources and bool(weight) and (part in PARTS or part == STATE)


def read(whole, name, device, label):
    """One packed tensor of a checkpoint. whole: a function, name -> tensor, or None where there is none of this name.
    -> its shape (of n numbers), codes (n / 64, 32), scales (n / 64, 1) fp32, and what they were made from, (scale_codes
    (n / 64, 1), nested, offset), or None where they are not quantized. UserError: not as lib/nf4.py packs."""
    def part(which):
        t = whole(f"{name}.{which}")
        if t is None:
            raise UserError(f"{label} is packed, but {which} is missing beside it: only NF4 of bitsandbytes can be "
                            "read, download it again or use the checkpoint that it was made from")
        return t.to(device)

    state = json.loads(bytes(part(STATE).tolist()))
    codes = whole(name).to(device).view(-1, BLOCK // 2)
    absmax = part("absmax").view(-1, 1)
    same = torch.equal(part("quant_map").float(), kernels.nf4_values(device)) and state["blocksize"] == BLOCK
    double = None
    if "nested_offset" in state:
        same = same and torch.equal(part("nested_quant_map").float(), kernels.scale_values(device))
        same = same and state["nested_blocksize"] == SCALES
        nested = part("nested_absmax").float()
        offset = torch.tensor(state["nested_offset"], device=device)
        double = absmax, nested, offset
        of_each = nested.repeat_interleave(SCALES)[:len(absmax), None]
        absmax = kernels.scale_values(device)[absmax.int()] * of_each + offset
    if not same:
        raise UserError(f"{label} is packed in blocks of {state['blocksize']} or with a table of its own: only NF4 in "
                        f"blocks of {BLOCK}, with scales in blocks of {SCALES}, can be read, use the checkpoint that "
                        "it was made from")
    return list(state["shape"]), codes, absmax.float(), double


def as_stored(shape, codes, scales, double, transposed):
    """What read() returned -> what put() wants. Bit for bit where the tensor lies here as it lies there and its scales
    are quantized; else packed anew, from what it unpacks to in fp32."""
    if double is not None and not transposed:
        scale_codes, nested, offset = double
        return codes.view(shape[0], -1), scale_codes.view(shape[0], -1), nested, offset
    w = kernels.unpack_ref(codes, scales, torch.empty(len(codes), BLOCK, device=codes.device)).view(shape)
    if transposed:
        w = w.T
    return quantize(w)
