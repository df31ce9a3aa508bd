"""What fits where: counts the bytes of a training step, without a GPU.

    python -m results.memory            writes results/memory.md (half an hour of one core)

The step is run for real, on torch's fake tensors: every tensor that model.py and sparse.py make is there,
with its shape and type but without storage, and a dispatch mode follows how many bytes are alive at once, in
forward and backward. Three things that PyTorch or Triton compute in one kernel on a GPU, but from parts on
other devices, are replaced by functions that keep and return what those kernels do: attention (flash),
RMSNorm and SwiGLU. Counted beside that: weights, LoRA with its gradient and AdamW's two moments (16 bytes a
weight), one chunk of the loss's logits, and 1.2 GB for the CUDA context and the allocator's gaps; with a base in
4 bits the buffer where one weight at a time is unpacked. Nothing of this was measured on a GPU.
"""
import bisect
import weakref
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import config
import data
import kernels
import model as llama
import predictor
from lib import nf4

BASE = dict(model_type="llama", rms_norm_eps=1e-5, tie_word_embeddings=False)
MODELS = {"8B": dict(BASE, vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                     num_attention_heads=32, num_key_value_heads=8),
          "13B": dict(BASE, vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                      num_attention_heads=40, num_key_value_heads=40),
          "70B": dict(BASE, vocab_size=128256, hidden_size=8192, intermediate_size=28672,
                      num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8)}
CARDS = 24, 48, 80, 141  # GB of 10^9 bytes
SMALL_CARDS = 8, 12, 16, 24, 48  # for a base in 4 bits
RESERVE = 1.2e9
FAKE = FakeTensorMode()  # of a CPU: the meta device has no random generator, which attach() wants
HEAD = """# What fits where (counted, not measured: `python -m results.memory`)

bf16 weights, LoRA of rank 32 on q, k, v, o, examples of 512 tokens of which 128 are scored. A cell is the
largest `micro_batch_size`, dense / sparse (the ratios of config/math.py; a sparse run starts with dense
steps, so its dense number holds unless `sparse_start = 0`); after the semicolon with `--recompute=True`. "-"
does not fit, 64 is where the table ends. A `batch_size` above it is accumulated.
"""


class Alive(TorchDispatchMode):
    """Bytes of all tensors made inside that are alive, and the most there ever were."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata
                  for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            # not a view, nor written in place, nor without storage
            if isinstance(t, torch.Tensor) and not t.is_meta and t.untyped_storage()._cdata not in inputs:
                n = t.untyped_storage().nbytes()
                self.now += n
                self.peak = max(self.peak, self.now)
                weakref.finalize(t.untyped_storage(), self.free, n)
        return out

    def free(self, n):
        self.now -= n


class Attend(Function):
    """Flash attention keeps its inputs, its output and a log-sum for each row; that of some queries their mask too."""

    @staticmethod
    def forward(ctx, q, k, v, lengths, positions=None):
        out = torch.empty_like(q)
        kept = [q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32)]
        if positions is not None:  # of some queries, with a mask
            (B, H, Sq, _), K, S = q.shape, k.shape[1], k.shape[2]
            kept.append(q.new_empty(B, 1, H // K * Sq, S))
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v = ctx.saved_tensors[:3]
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None, None


class Norm(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, x.new_empty(len(x), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        return torch.empty_like(dy), None


def make_model(shape, r=32, bits=16):
    """In bf16, its projections in so many bits, with LoRA on q, k, v, o."""
    with FAKE:
        model = llama.LLaMA(llama.ModelConfig.from_dict(shape), torch.bfloat16, "cpu")
        model.add_lora(r, 2 * r)
        if bits == 4:
            pack(model)
    return model.train()


def pack(model):
    """As to_4_bits(), without contents: these tensors have none."""
    for part in model.parts():
        for name, sizes in part.sizes.items():
            w = getattr(part, name)
            delattr(part, name)
            setattr(part, name, nf4.empty(sizes, w.shape[1], w.dtype, w.device))


def unpacking(model):
    """What stands in for kernels.unpacked, with its buffer made here, and for kernels.rows_of."""
    with FAKE:
        buffer = torch.empty(largest(model), dtype=model.dtype)

    def unpacked(w):
        if not isinstance(w, kernels.NF4):
            return w
        return buffer[:w.shape.numel()].view(w.shape)

    def rows_of(w, idx):
        return torch.empty(len(idx), w.shape[1], dtype=model.dtype)
    return unpacked, rows_of


def largest(model):
    """Numbers in the largest weight that is packed; 0 if none is."""
    return max((w.shape.numel() for w in model.packed()), default=0)


def keep_channels(model, mlp, attn):
    """Sparse at these ratios. Which channels are kept does not matter, their number does."""
    with FAKE:
        predictor.attach(model, mlp, attn, kind="random")


def step_bytes(model, examples, recompute, length=512, scored=128):
    """The most bytes that a step of so many examples has alive besides weights and what belongs to LoRA's
    weights."""
    tokens = data.Tokenized([0] * (length + 1), [0.0] * (length + 1 - scored) + [1.0] * scored)
    model.recompute = recompute
    unpacked, rows_of = unpacking(model)
    with (FAKE,
          patch.object(kernels, "unpacked", unpacked),
          patch.object(kernels, "rows_of", rows_of),
          patch.object(llama, "attend", Attend.apply),
          patch.object(llama.Block, "norm", lambda self, x, w: Norm.apply(x, w)),
          patch.object(kernels, "swiglu", lambda gu: gu.new_empty(len(gu), gu.shape[1] // 2)),
          patch.object(kernels, "swiglu_backward", lambda dh, gu: torch.empty_like(gu))):
        batch = data.collate([tokens] * examples, dense_first=0)
        for p in model.lora_parameters().values():
            p.grad = torch.zeros_like(p)
        with Alive() as alive:
            model.loss(batch).backward()
    chunk = 2 ** 26 // model.config.vocab_size  # rows of logits, in bf16, fp32 and bf16 again
    return alive.peak + min(chunk, examples * scored) * model.config.vocab_size * 8


def weight_bytes(model, ranks):
    """(frozen, LoRA): bytes on each of so many ranks, with FSDP where there are several: its share of the
    blocks, three of them whole (the one that is computed, and the next one twice while it is gathered), and
    all of the embedding and the head. With a base in 4 bits also the buffer of the largest weight, unpacked."""
    lora = sum(p.numel() for p in model.lora_parameters().values())
    block = 2 * sum(p.numel() for p in model.blocks[0].parameters()) - 2 * lora // len(model.blocks)
    block += sum(b.numel() * b.element_size() for b in model.blocks[0].buffers())
    blocks = len(model.blocks) * block
    rest = 2 * (model.embed.numel() + model.head.numel() * (model.head is not model.embed))
    rest += 2 * largest(model)
    if ranks == 1:
        return rest + blocks, 16 * lora
    return rest + blocks / ranks + 3 * block, 16 * lora


def two_models(shape, bits=16):
    """One dense, one with the ratios of config/math.py: at the same relative depth the same ratio."""
    math = config.load(["config/math.py", "--model=x/Meta-Llama-3-8B-Instruct"])
    n, dense, sparse = shape["num_hidden_layers"], make_model(shape, bits=bits), make_model(shape, bits=bits)
    mlp, attn = (config.ratios(r, 32, "ratio") for r in (math.mlp_sparsity, math.attn_sparsity))
    keep_channels(sparse, *([r[i * 32 // n] for i in range(n)] for r in (mlp, attn)))
    return dense, sparse


def fits(card, fixed, count):
    """The largest number of examples at once, up to 64. count(n): bytes of a step of n examples."""
    room = card * 1e9 - RESERVE - fixed
    return bisect.bisect_right(range(1, 65), room, key=count) if room > 0 else 0


def rows(name, shape, bits=16):
    """The table's rows of one model, on one GPU and on eight; in 4 bits on one."""
    models = two_models(shape, bits)
    count = cache(lambda model, recompute, n: step_bytes(model, n, recompute))
    kinds, cards = [("1, or each of 8", 1), ("8, fsdp", 8)], CARDS
    if bits == 4:
        kinds, cards = kinds[:1], SMALL_CARDS
    for gpus, ranks in kinds:
        frozen, lora = weight_bytes(models[0], ranks)
        cells = []
        for card in cards:
            found = [[fits(card, frozen + lora, partial(count, model, recompute)) for model in models]
                     for recompute in (False, True)]
            text = "; ".join(" / ".join(str(n or "-") for n in pair) for pair in found)
            cells.append(text if any(map(any, found)) else "-")
        yield f"| {name} | {gpus} | {frozen / 1e9:.1f} + {lora / 1e9:.1f} | " + " | ".join(cells) + " |"


def small_card():
    """What LLaMA-3-8B takes of 24 GB, part by part."""
    dense, sparse = two_models(MODELS["8B"])
    frozen, lora = weight_bytes(dense, 1)
    step = step_bytes(dense, 8, True)
    parts = {"weights, bf16": frozen, "LoRA r 32 on q, k, v, o: weights, gradient, two moments in fp32": lora,
             "a step of 8 x 512 tokens with recompute, dense": step,
             "(the same step, sparse)": step_bytes(sparse, 8, True), "CUDA context and gaps": RESERVE,
             "all, dense": frozen + lora + step + RESERVE}
    return [f"| {what} | {n / 1e9:.2f} GB |" for what, n in parts.items()]


def sparse_backward():
    """What a step of 8 x 512 tokens of LLaMA-3-8B takes without recompute, dense and with a backward_sparsity of .9."""
    lines = []
    for scored in (128, 8):
        model = make_model(MODELS["8B"])
        dense = step_bytes(model, 8, False, scored=scored)
        with FAKE:
            predictor.attach(model, 0, 0, backward_sparsity=.9)
        sparse = step_bytes(model, 8, False, scored=scored)
        lines.append(f"| {scored} of 512 scored | {dense / 1e9:.1f} GB | {sparse / 1e9:.1f} GB |")
    return lines


def steps_in_4_bits():
    """What a whole dense step with recompute takes on a base in 4 bits, everything counted."""
    lines = []
    for name, examples in (("8B", 8), ("13B", 8), ("70B", 4)):
        model = make_model(MODELS[name], bits=4)
        total = sum(weight_bytes(model, 1)) + step_bytes(model, examples, True) + RESERVE
        lines.append(f"| {name}, {examples} x 512 tokens | {total / 1e9:.1f} GB |")
    return lines


def table(cards, bits=16):
    """Lines of Markdown."""
    names = " | ".join(f"{card} GB" for card in cards)
    return [f"| model | GPUs | weights, LoRA (GB a GPU) | {names} |", "|---" * (3 + len(cards)) + "|",
            *(row for name, shape in MODELS.items() for row in rows(name, shape, bits))]


if __name__ == "__main__":
    lines = [HEAD, *table(CARDS), "", "With `--base_bits=4` (the weights with the buffer in which one at a time is "
             "unpacked):", "", *table(SMALL_CARDS, 4), "",
             "LLaMA-3-8B on a 24 GB card:", "", "| what | bytes |", "|---|---|", *small_card(), "",
             "A step of 8 x 512 tokens of LLaMA-3-8B without recompute, beside weights and LoRA:", "",
             "| | dense | `--backward_sparsity=.9`, other ratios 0 |", "|---|---|---|", *sparse_backward(), "",
             "All of a dense step with `--base_bits=4 --recompute=True`:", "", "| model | bytes |", "|---|---|",
             *steps_in_4_bits()]
    (Path(__file__).parent / "memory.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
