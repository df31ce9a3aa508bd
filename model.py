"""LLaMA, written out: weights from a Hugging Face directory or hub id, LoRA, generation with a KV cache,
adapters in PEFT's format. (How files are read, what a cache holds and how FLOPs are counted:
lib/architecture.py, files.py, generate.py, flops.py.)

    block:  x += attention(norm(x));  x += mlp(norm(x))
            norm: RMSNorm; attention: RoPE, grouped queries; mlp: SwiGLU

    T rows of the batch's stream    D model width    H query heads    K key/value heads    hd head dim
    Nq = H hd, Nkv = K hd    I MLP width    V vocabulary    L blocks    R LoRA rank    B examples
    S longest example    n sparse rows

A batch is a stream of T real tokens, without padding, in the order that data.collate gives them (sparse rows
first). Everything but attention runs on these rows; attention alone needs the order of the text, so q, k, v
are scattered into a (B, S) grid and back. After the last block's keys and values nothing reads a context row
any more: its query, output projection and MLP, the final norm and the head run on the loss rows only. In other
blocks context rows may do without queries too, in sparse steps (Attention.skip_queries).

Weights are stored as sparse.py wants them, sparse axis first, q/k/v fused and gate/up fused:

    attn.qkv (Nq + 2 Nkv, D)    attn.o (Nq, D): transposed
    mlp.gate_up (2 I, D)        mlp.down (I, D): transposed

Memory of LLaMA-3-8B: 8.03 G weights of 2 bytes = 16.06 GB, streamed from the shards tensor by tensor to their
place. In 4 bits (to_4_bits) the 6.98 G of the projections take 3.61 GB, and a buffer for the largest of them
unpacked .23. LoRA of r = 32 on q, k, v, o: 27 M weights, 4 bytes each, and twice that for AdamW.
"""
import json
import math
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import data
import kernels
import sparse
from config import UserError
from lib import dense, nf4
from lib.architecture import ModelConfig
from lib.files import load_weights, read_adapter, resolve, weight_files, write_safetensors, write_text
from lib.flops import flops_by_part
from lib.generate import generate
from sparse import LoudRows, SkipBackward, SkipQueries, loud_counts, loudest_rows

# cuDNN's attention, torch's first choice on an H100 since 2.11, makes a plan for every new shape, and here
# nearly every batch and every generated token has one (tens of ms each, others say; UNMEASURED here).
torch.backends.cuda.enable_cudnn_sdp(False)

TARGETS = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
           "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}


# ---- layers ------------------------------------------------------------------------------------------------

def weight(*shape, dtype, device):
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)


class Part(nn.Module):
    """What attention and MLP share: LoRA factors by target, and a place for a predictor.Predictor."""

    def __init__(self):
        super().__init__()
        self.lora = nn.ParameterDict()  # "q/A" (R, in), "q/B" (out, R): fp32 masters
        self.lora_scale = 0.0  # alpha / R
        self.predictor = None
        self.channels = None  # the kept channels of the last forward, None when dense: to look at, nothing reads it
        self.backward_sparsity = 0.0  # the share of sparse rows without a backward: predictor.attach sets it
        self.skips_backward = False  # whether it is in force: LLaMA.set_sparsity
        self.loud = None  # () where a backward is to note here which rows it had, and their share of |dy|^2

    def lora_of(self, targets):
        """[A, B, A, B, ...] of these targets, as sparse.py takes them: of rank 0 where a target has no LoRA."""
        out = []
        for t in targets:
            if t + "/A" in self.lora:
                out += [self.lora[t + "/A"], self.lora[t + "/B"]]
            else:
                n_in, n_out = self.shapes[t]
                w = self.main_weight()
                like = dict(dtype=w.dtype, device=w.device)
                out += [torch.empty(0, n_in, **like), torch.empty(n_out, 0, **like)]
        return out

    def loudest(self, batch):
        """-> what SkipBackward wants: a function of a gradient dy (n, D) that finds its loudest rows (c,)."""
        def rows_of(dy):
            rows = loudest_rows(dy, batch, self.backward_sparsity)
            if self.loud is not None:
                energies = dy.float().square().sum(1)
                self.loud = rows, energies[rows].sum() / energies.sum()
            return rows
        return rows_of

    def measurer(self, measure):
        """Who is shown what this part computes in a dense pass that measures: its predictor, or nobody."""
        if measure:
            return self.predictor
        return None

    @torch.no_grad()
    def to_4_bits(self):
        """Packs the weights: quantized tensor by tensor of the checkpoint, or without storage on the meta device."""
        for name, sizes in self.sizes.items():
            w = getattr(self, name)
            packed = nf4.empty(sizes, w.shape[1], w.dtype, w.device)
            delattr(self, name)
            setattr(self, name, packed)
            if w.is_meta:
                continue
            first = 0
            for rows in w.split(sizes):
                nf4.put(packed, first, *nf4.quantize(rows))
                first += len(rows)

    def sharded(self):
        """True where FSDP has cut the frozen weights up over ranks."""
        return any(hasattr(p, "full_tensor") for p in self.parameters(recurse=False))


class Attention(Part):
    def __init__(self, c, **kw):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.eps = c.rms_norm_eps
        D, Nq, Nkv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.shapes = {"q": (D, Nq), "k": (D, Nkv), "v": (D, Nkv), "o": (Nq, D)}  # in, out
        self.spans = {"q": (0, Nq), "k": (Nq, Nq + Nkv), "v": (Nq + Nkv, Nq + 2 * Nkv)}  # rows of qkv
        self.sizes = {"qkv": [Nq, Nkv, Nkv], "o": [Nq]}  # rows of the checkpoint's tensors in each weight
        self.qkv = weight(Nq + 2 * Nkv, D, **kw)
        self.o = weight(Nq, D, **kw)
        self.qkv_bias = self.q_norm = self.k_norm = None
        if c.qkv_bias:  # qwen2
            self.qkv_bias = weight(Nq + 2 * Nkv, **kw)
        if c.qk_norm:  # qwen3
            self.q_norm = weight(self.head_dim, **kw)
            self.k_norm = weight(self.head_dim, **kw)

    def project(self, x, targets, keep=None, n=0, measurer=None):
        """x (T, D) -> (T, width): the projections "qkv", or only "q" or "kv", side by side."""
        lo = self.spans[targets[0]][0]  # the rows of qkv that they are
        hi = self.spans[targets[-1]][1]
        spans = []  # of each in the output
        for t in targets:
            first, end = self.spans[t]
            spans.append((first - lo, end - lo))
        bias = self.qkv_bias
        if bias is not None:
            bias = bias[lo:hi]
        y = sparse.KeepOutputs.apply(x, self.qkv[lo:hi], bias, keep and keep.qkv, n, self.lora_scale, spans, measurer,
                                     *self.lora_of(targets))
        if self.q_norm is None:
            return y
        normed = []
        for t, (first, end) in zip(targets, spans):
            normed.append(self.norm_heads(t, y[:, first:end]))
        return torch.cat(normed, 1)

    def norm_heads(self, target, y):
        """qwen3: RMSNorm of each query and each key head. y (T, heads hd)."""
        if target == "v":
            return y
        w = {"q": self.q_norm, "k": self.k_norm}[target]
        heads = y.reshape(-1, self.head_dim)  # (T heads, hd)
        return dense.rms_norm(heads, w, self.eps).view_as(y)

    def output(self, x, keep=None, n=0):
        """x (T, Nq) -> (T, D)."""
        return sparse.KeepInputs.apply(x, self.o, keep and keep.o, n, self.lora_scale, *self.lora_of("o"))

    def grid(self, y, batch, rope, rows, heads, n_rot):
        """y (T', sum(heads) hd), rows `rows` (a slice) of the stream -> one (B, h, S, hd) for each h of heads: the
        first n_rot heads rotated, each row at its place, zeros elsewhere."""
        cos, sin = rope
        return dense.RopeScatter.apply(y, cos[rows], sin[rows], batch.places[rows], n_rot, self.head_dim, batch.shape,
                                       heads)

    def forward(self, x, batch, rope, keep, measurer, last, cache):
        """x (T, D) -> (T, D), in the last block (T_loss, D). rope: cos, sin (T, hd/2). keep: KeepAttention, SkipQueries,
        SkipBackward or None. measurer: as in sparse.py. cache: a BlockCache to fill (generation), or None."""
        if isinstance(keep, SkipQueries):
            return self.skip_queries(x, batch, rope, keep)
        if isinstance(keep, SkipBackward):
            return self.skip_backward(x, batch, rope, keep)
        H, K, n = self.n_heads, self.n_kv_heads, batch.n_sparse
        if last:  # nothing reads the other rows' queries: with 3 of 512 tokens scored, 1.6 % of a sparse step
            k, v = self.keys_and_values(x, batch, rope)
            if cache is not None:
                cache.fill(k, v)
            rows = batch.loss
            cos, sin = rope
            return self.read(x[rows], (cos[rows], sin[rows]), batch.places[rows], batch.shape, k, v, batch.lengths)
        every = slice(0, len(x))
        y = self.project(x, "qkv", keep, n, measurer)  # (T, Nq + 2 Nkv)
        q, k, v = self.grid(y, batch, rope, every, (H, K, K), H + K)  # (B, H, S, hd), twice (B, K, S, hd)
        if cache is not None:
            cache.fill(k, v)
        a = attend(q, k, v, batch.lengths)  # (B, H, S, hd)
        return self.output(to_rows(a, batch.places), keep, n)

    def keys_and_values(self, x, batch, rope):
        """x (T, D) -> k, v (B, K, S, hd) each, of all rows."""
        K = self.n_kv_heads
        return self.grid(self.project(x, "kv"), batch, rope, slice(0, len(x)), (K, K), K)

    def read(self, x, rope, places, shape, k, v, lengths, positions=None):
        """What the queries of some rows x (T', D) read from all keys and values: (T', D). rope: theirs. places, shape:
        where in which grid they lie. lengths, positions: of attend."""
        H = self.n_heads
        [q] = dense.RopeScatter.apply(self.project(x, "q"), *rope, places, H, self.head_dim, shape, (H,))
        a = attend(q, k, v, lengths, positions)  # (B, H, as many as the grid has, hd)
        return self.output(to_rows(a, places))

    def read_dense_rows(self, x, batch, rope, k, v):
        """What the dense rows x (T - n, D) of a batch read, in a grid of their own: (T - n, D). rope: of all rows."""
        cos, sin = rope
        n = batch.n_sparse
        return self.read(x, (cos[n:], sin[n:]), batch.dense_places, batch.dense_positions.shape, k, v,
                         batch.dense_lengths, batch.dense_positions)

    def skip_queries(self, x, batch, rope, keep):
        """x (T, D) -> (T, D): only the dense rows have queries, in a grid of their own (B, Sd)."""
        n = batch.n_sparse
        context, others = x.split([n, len(x) - n])  # (n, D), (T - n, D)
        k, v = self.keys_and_values(x, batch, rope)  # (B, K, S, hd)
        instead = sparse.Map.apply(context, keep.map)  # (n, D)
        return torch.cat([instead, self.read_dense_rows(others, batch, rope, k, v)])

    def skip_backward(self, x, batch, rope, keep):
        """x (T, D) -> (T, D), exactly; of the sparse rows only the loudest have a backward through queries and outputs.
        All rows' keys and values have one, from the rows that do and from the dense rows."""
        n = batch.n_sparse
        context, others = x.split([n, len(x) - n])  # (n, D), (T - n, D)
        cos, sin = rope
        k, v = self.keys_and_values(x, batch, rope)  # (B, K, S, hd)
        counts = loud_counts(batch, self.backward_sparsity)

        def read(rows, x, k, v):
            if rows is None:
                return self.read(x, (cos[:n], sin[:n]), batch.places[:n], batch.shape, k, v, batch.lengths)
            places, positions = own_grid(batch.positions[rows], counts)
            return self.read(x, (cos[rows], sin[rows]), places, positions.shape, k, v, counts, positions)

        trained = [p for p in self.lora_of("qo") if p.requires_grad]
        y = LoudRows.apply(read, keep.loudest, len(trained), context, k, v, *trained)  # (n, D)
        return torch.cat([y, self.read_dense_rows(others, batch, rope, k, v)])

    def decode(self, x, rope, cache):
        """One new token for each of B texts: x (B, D) -> (B, D). cache: this block's keys and values."""
        H, K, hd, B = self.n_heads, self.n_kv_heads, self.head_dim, len(x)
        y = self.project(x, "qkv")
        y = kernels.rope_scatter(y, *rope, cache.lanes, H + K, hd, B).view(B, -1, hd)  # (B, H + 2 K, hd)
        k, v = cache.append(y[:, H:H + K], y[:, H + K:])  # (B, K, S, hd)
        # the G query heads of a group stand in for query positions: no key or value is repeated
        q = y[:, :H].view(B, K, H // K, hd)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=cache.mask)  # (B, K, G, hd)
        return self.output(a.reshape(B, H * hd))

    def activations(self, x):
        """The true q, k, v of x (n, D), with bias, less LoRA, which no row drops: (n, Nq + 2 Nkv)."""
        return F.linear(x, kernels.unpacked(self.qkv), self.qkv_bias)

    def main_weight(self):
        """The one whose rows are predicted, and whose type and device are the part's."""
        return self.qkv

    def predicted_weights(self):
        """Yields q's, k's and v's (N, D), each good until the next."""
        for lo, hi in self.spans.values():
            yield kernels.unpacked(self.qkv[lo:hi])


def attend(q, k, v, lengths, positions=None):
    """Causal attention, q (B, H, S, hd), k and v (B, K, S, hd). Rows behind an example's end are zero and
    come later: no mask. positions (B, Sq): only the tokens at these positions have queries, q (B, H, Sq, hd)."""
    if q.device.type == "cpu":
        return dense.CausalAttention.apply(q, k, v, lengths, positions)
    if positions is not None:
        return dense.attend_from(q, k, v, positions)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def to_rows(a, places):
    """a (B, H, S, hd), attention's grid -> its rows at these places b S + position: (T, Nq)."""
    return dense.Gather.apply(a.transpose(1, 2).flatten(2).flatten(0, 1), places)


def own_grid(positions, counts):
    """A grid for some rows of each text, counts of them, text after text, at these positions (c,) -> their places in
    it, (c,): b W + number; and the positions as a grid, (B, W), 0 where there is no row."""
    W = max(counts)
    places = [b * W + torch.arange(c, device=positions.device) for b, c in enumerate(counts)]
    places = torch.cat(places)
    grid = positions.new_zeros(len(counts) * W)
    grid[places] = positions
    return places, grid.view(-1, W)


class MLP(Part):
    def __init__(self, c, **kw):
        super().__init__()
        D, I = c.hidden_size, c.intermediate_size
        self.shapes = {"gate": (D, I), "up": (D, I), "down": (I, D)}
        self.sizes = {"gate_up": [I, I], "down": [I]}  # as in Attention
        self.gate_up = weight(2 * I, D, **kw)
        self.down = weight(I, D, **kw)

    def forward(self, x, n=0, keep=None, measurer=None):
        """x (T, D) -> (T, D). keep: a KeepMLP or a SkipBackward for the first n rows, or None. measurer: as in
        sparse.py."""
        if isinstance(keep, SkipBackward):
            return self.skip_backward(x, n, keep)
        return sparse.SwiGLU.apply(x, self.gate_up, self.down, keep, n, self.lora_scale, measurer,
                                   *self.lora_of(self.shapes))

    def skip_backward(self, x, n, keep):
        """x (T, D) -> (T, D), exactly; of the first n rows only the loudest have a backward."""
        context, others = x.split([n, len(x) - n])  # (n, D), (T - n, D)
        trained = [p for p in self.lora_of(self.shapes) if p.requires_grad]
        y = LoudRows.apply(lambda rows, x: self.forward(x), keep.loudest, len(trained), context, *trained)  # (n, D)
        return torch.cat([y, self.forward(others)])

    def activations(self, x):
        """The true h = silu(g) u of x (n, D), LoRA included: (n, I)."""
        gu = kernels.matmul_nt(x, self.gate_up)  # (n, 2I)
        sparse.lora_forward(x, gu, sparse.gate_up_spans(gu), self.lora_of(("gate", "up")), self.lora_scale)
        return kernels.swiglu(gu)

    def main_weight(self):
        """As in Attention."""
        return self.gate_up

    def predicted_weights(self):
        """Yields gate's and up's (I, D), each good until the next."""
        I = len(self.down)
        for lo in (0, I):
            yield kernels.unpacked(self.gate_up[lo:lo + I])


class Chosen(dict):
    """{"attn" or "mlp": what a forward keeps}: filled by it, read by its recomputation. A class of its own,
    for FSDP of torch 2.9 to 2.11 hands a block copies of the plain dicts among its arguments, and the
    recomputation would find its copy empty."""


class Block(nn.Module):
    def __init__(self, c, **kw):
        super().__init__()
        self.attn_norm, self.mlp_norm = weight(c.hidden_size, **kw), weight(c.hidden_size, **kw)
        self.attn, self.mlp = Attention(c, **kw), MLP(c, **kw)
        self.eps = c.rms_norm_eps

    def norm(self, x, w):
        return dense.rms_norm(x, w, self.eps)

    def predictors(self):
        """Those of its parts that have one."""
        return [part.predictor for part in (self.attn, self.mlp) if part.predictor is not None]

    def part_of(self, target):
        """The attention or the MLP, whichever has this LoRA target."""
        if target in self.attn.shapes:
            return self.attn
        return self.mlp

    def forward(self, x, batch, rope, last, measure, chosen, cache=None):
        """x (T, D) -> (T, D), in the last block (T_loss, D). measure: whether the predictors are shown what this
        dense pass computes. chosen: a Chosen, where a forward writes its channels and a recomputation reads them."""
        x = self.attention_half(x, batch, rope, last, measure, chosen, cache)
        return self.mlp_half(x, batch, last, measure, chosen)

    def attention_half(self, x, batch, rope, last, measure, chosen, cache=None):
        """x and what attention adds to it."""
        h = self.norm(x, self.attn_norm)
        keep = self.choose("attn", h, batch, batch.n_sparse, chosen)
        a = self.attn(h, batch, rope, keep, self.attn.measurer(measure), last, cache)
        if last:
            x = x[batch.loss]
        return x + a

    def mlp_half(self, x, batch, last, measure, chosen):
        """x and what the MLP adds to it."""
        n = batch.n_sparse
        if last:
            n = 0
        h = self.norm(x, self.mlp_norm)
        keep = self.choose("mlp", h, batch, n, chosen)
        return x + self.mlp(h, n, keep, self.mlp.measurer(measure))

    def choose(self, name, h, batch, n, chosen):
        """What part `name` keeps for its normed input h (T, D), whose first n rows are sparse: None (all), KeepMLP,
        KeepAttention, SkipQueries or SkipBackward. Chosen in the forward, and only read in its recomputation."""
        if name not in chosen:
            part = getattr(self, name)
            keep = None
            if part.predictor is not None and part.predictor.c and n:
                keep = part.predictor.select(h[:n])
            elif part.skips_backward and n and torch.is_grad_enabled() and (h.requires_grad or len(part.lora)):
                keep = SkipBackward(part.loudest(batch))
            part.channels = keep and keep.channels
            chosen[name] = keep
        return chosen[name]

    def decode(self, x, rope, cache):
        x = x + self.attn.decode(self.norm(x, self.attn_norm), rope, cache)
        return x + self.mlp(self.norm(x, self.mlp_norm))


# ---- the model ---------------------------------------------------------------------------------------------

class LLaMA(nn.Module):
    """LLaMA(ModelConfig, dtype, device) has random weights; LLaMA.from_pretrained(...) has a
    checkpoint's. Frozen until add_lora or train_all. dtype: torch.float32, bfloat16 or float16 (float64:
    everything in it)."""

    def __init__(self, config, dtype=torch.float32, device="cpu"):
        super().__init__()
        c, kw = config, dict(dtype=dtype, device=device)
        self.config = c
        self.dtype = dtype
        self.embed = weight(c.vocab_size, c.hidden_size, **kw)
        self.blocks = nn.ModuleList(Block(c, **kw) for _ in range(c.num_hidden_layers))
        self.final_norm = weight(c.hidden_size, **kw)
        self.head = self.embed
        if not c.tie_word_embeddings:
            self.head = weight(c.vocab_size, c.hidden_size, **kw)
        self.frequencies = None  # of RoPE, made when they are first needed
        self.recompute = False  # keep only the input of each block for the backward
        self.lora_r = self.lora_alpha = 0
        self.rslora = False
        self.lora_targets = ()
        self.lora_from = 0
        if torch.device(device).type != "meta":
            self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Matrices normal with 1 / sqrt(inputs), embeddings with .02; norms 1, biases 0."""
        for name, p in self.named_parameters():
            if "bias" in name:
                p.fill_(0.0)
            elif p.dim() == 1:
                p.fill_(1.0)
            elif name in ("embed", "head"):
                p.normal_(0, .02)
            elif name.endswith((".o", ".down")):  # stored transposed
                p.normal_(0, p.shape[0] ** -.5)
            else:
                p.normal_(0, p.shape[1] ** -.5)

    @property
    def device(self):
        return self.embed.device

    def parts(self):
        """Every block's attention and MLP."""
        return [part for b in self.blocks for part in (b.attn, b.mlp)]

    def packed(self):
        """All weights in 4 bits: [NF4]."""
        return [w for part in self.parts() for w in part.children() if isinstance(w, kernels.NF4)]

    def to_4_bits(self):
        """Packs all weights of q, k, v, o, gate, up and down in 4 bits (lib/nf4.py); embedding, head and norms stay.
        UserError: rows that cannot be cut into blocks of 64."""
        D = self.config.hidden_size  # the width of every stored row
        if D % kernels.BLOCK:
            raise UserError(f"base_bits = 4 packs rows of a multiple of {kernels.BLOCK} numbers, and those of "
                            f"model.layers.0.self_attn.q_proj.weight (and of all others) have {D}: use base_bits = 16")
        for part in self.parts():
            part.to_4_bits()

    # ---- weights in and out

    def named_sources(self):
        """{Hugging Face name: (parameter or NF4, first row, rows, transposed)}: where each tensor of a checkpoint
        lies in ours. The one table for reading and writing weights."""
        c = self.config
        D, I = c.hidden_size, c.intermediate_size
        out = {}

        def add(name, p, first, rows, transposed=False):
            out[name] = (p, first, rows, transposed)

        for i, b in enumerate(self.blocks):
            at = f"model.layers.{i}."
            for t, (lo, hi) in b.attn.spans.items():
                add(f"{at}self_attn.{t}_proj.weight", b.attn.qkv, lo, hi - lo)
                if b.attn.qkv_bias is not None:
                    add(f"{at}self_attn.{t}_proj.bias", b.attn.qkv_bias, lo, hi - lo)
            add(at + "self_attn.o_proj.weight", b.attn.o, 0, len(b.attn.o), transposed=True)
            if b.attn.q_norm is not None:
                add(at + "self_attn.q_norm.weight", b.attn.q_norm, 0, c.head_dim)
                add(at + "self_attn.k_norm.weight", b.attn.k_norm, 0, c.head_dim)
            add(at + "mlp.gate_proj.weight", b.mlp.gate_up, 0, I)
            add(at + "mlp.up_proj.weight", b.mlp.gate_up, I, I)
            add(at + "mlp.down_proj.weight", b.mlp.down, 0, I, transposed=True)
            add(at + "input_layernorm.weight", b.attn_norm, 0, D)
            add(at + "post_attention_layernorm.weight", b.mlp_norm, 0, D)
        add("model.embed_tokens.weight", self.embed, 0, c.vocab_size)
        add("model.norm.weight", self.final_norm, 0, D)
        if self.head is not self.embed:
            add("lm_head.weight", self.head, 0, c.vocab_size)
        return out

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu", shard=None, base_bits=16):
        """path: a directory or a hub id with config.json and safetensors. Tensors are streamed from the files
        straight to their place: never more than the model and one tensor. shard: called on the model while it
        has no storage yet (FSDP). base_bits: 4 packs the projections, each tensor as soon as it is read; a checkpoint
        that bitsandbytes has packed needs it. UserError: no such model, an architecture that is not written here,
        files that are missing, damaged or do not fit config.json, a width that 4 bits cannot have."""
        folder = resolve(path)
        config = ModelConfig.from_dir(folder)
        if config.quantized and base_bits == 16:
            raise UserError(f"{folder} is quantized to 4 bits: load it with base_bits = 4, or take the checkpoint "
                            "that it was made from")
        files = weight_files(folder)
        model = cls(config, dtype, "meta")
        if shard is not None:
            shard(model)
        if base_bits == 4:
            model.to_4_bits()
        model.to_empty(device=device)
        if config.tie_word_embeddings:
            model.head = model.embed
        load_weights(model, files)
        return model.eval()

    def save_pretrained(self, path, notes=None):
        """Writes config.json and model.safetensors as transformers reads them, in the model's dtype (weights in 4 bits
        are unpacked), and makes path if need be. notes: {str: str}, kept in the weights' file (data.notes)."""
        Path(path).mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, (p, lo, rows, transposed) in self.named_sources().items():
            t = p[lo:lo + rows]
            if isinstance(t, kernels.NF4):
                t = t.unpack()
            if transposed:
                t = t.T
            tensors[name] = t.detach().contiguous().cpu()
        write_safetensors(Path(path) / "model.safetensors", tensors, {"format": "pt", **(notes or {})})
        raw = {k: v for k, v in self.config.raw.items() if k not in ("dtype", "quantization_config")}
        # transformers 5 calls it dtype
        raw["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        write_text(Path(path) / "config.json", json.dumps(raw, indent=2) + "\n")

    def train_all(self):
        """All weights get gradients: lora_r = 0."""
        for p in self.parameters():
            p.requires_grad_(True)

    # ---- LoRA

    def add_lora(self, r, alpha, targets=("q", "k", "v", "o"), rslora=False, first=0):
        """Adapters of rank r, scaled by alpha / r (alpha / sqrt(r) with rslora), on targets (a list or
        "q,k,v,o"), in blocks from the first on. Below it no tensor needs a gradient, so autograd has no backward there.
        A Kaiming-uniform as in PEFT, B zero; fp32 (fp64 in an fp64 model). Errors: an unknown target, r not positive, a
        first block that the model does not have."""
        if isinstance(targets, str):
            targets = targets.split(",")
        targets = [t.strip() for t in targets]
        unknown = [t for t in targets if t not in TARGETS]
        if unknown or not targets or r <= 0:
            raise UserError(f"LoRA of rank {r} on {unknown or targets}: the rank must be positive and "
                            f"targets some of {','.join(TARGETS)}")
        if not 0 <= first < len(self.blocks):
            raise UserError(f"lora_from = {first}, but the model has blocks 0 to {len(self.blocks) - 1}")
        dtype = torch.promote_types(self.dtype, torch.float32)
        self.lora_r, self.lora_alpha, self.rslora, self.lora_from = r, alpha, rslora, first
        self.lora_targets = tuple(t for t in TARGETS if t in targets)
        scale = alpha / r
        if rslora:
            scale = alpha / math.sqrt(r)
        for b in self.blocks[first:]:
            b.attn.lora_scale = b.mlp.lora_scale = scale
            for t in self.lora_targets:
                part = b.part_of(t)
                n_in, n_out = part.shapes[t]
                bound = 1 / math.sqrt(n_in)  # kaiming_uniform_ with a = sqrt(5)
                part.lora[t + "/A"] = nn.Parameter(
                    torch.empty(r, n_in, dtype=dtype).uniform_(-bound, bound).to(self.device))
                part.lora[t + "/B"] = nn.Parameter(torch.zeros(n_out, r, dtype=dtype, device=self.device))

    def lora_parameters(self):
        """{PEFT's name: Parameter}."""
        out = {}
        for i in range(self.lora_from, len(self.blocks)):
            for t in self.lora_targets:
                lora = self.blocks[i].part_of(t).lora
                for m in "AB":
                    out[f"base_model.model.model.layers.{i}.{TARGETS[t]}.lora_{m}.weight"] = lora[f"{t}/{m}"]
        return out

    def lora_state(self, grads=False):
        """{PEFT's name: tensor}: the adapter's weights, or their gradients (zeros where there
        is none yet)."""
        out = {}
        for name, p in self.lora_parameters().items():
            if not grads:
                out[name] = p.detach()
            elif p.grad is None:
                out[name] = torch.zeros_like(p)
            else:
                out[name] = p.grad
        return out

    @torch.no_grad()
    def load_lora(self, state):
        """state: {PEFT's name: tensor} for exactly the adapters that add_lora made. UserError: others,
        or other shapes."""
        own = self.lora_parameters()
        odd = sorted(own.keys() ^ state.keys())
        if odd:
            raise UserError(f"the adapter and LoRA on {','.join(self.lora_targets)} of blocks {self.lora_from} to "
                            f"{len(self.blocks) - 1} disagree about {len(odd)} tensors, {odd[0]} first")
        for name, p in own.items():
            if p.shape != state[name].shape:
                raise UserError(f"adapter tensor {name} has shape {tuple(state[name].shape)}, "
                                f"this base needs {tuple(p.shape)}")
            p.copy_(state[name])

    def save_adapter(self, path, base="", notes=None):
        """Writes adapter_model.safetensors and adapter_config.json as PEFT has them. base: the base model's
        path or hub id; an existing directory is written with its absolute path, to be found from anywhere.
        notes: as of save_pretrained."""
        Path(path).mkdir(parents=True, exist_ok=True)
        base = Path(base).absolute() if str(base) and Path(base).is_dir() else base
        config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(base),
                      r=self.lora_r, lora_alpha=self.lora_alpha,
                      target_modules=[TARGETS[t].split(".")[1] for t in self.lora_targets], lora_dropout=0.0,
                      bias="none", fan_in_fan_out=False, inference_mode=True, use_rslora=self.rslora,
                      use_dora=False, modules_to_save=None)
        if self.lora_from:
            config |= dict(layers_to_transform=list(range(self.lora_from, len(self.blocks))), layers_pattern="layers")
        state = {k: v.cpu().contiguous() for k, v in self.lora_state().items()}
        write_safetensors(Path(path) / "adapter_model.safetensors", state, {"format": "pt", **(notes or {})})
        write_text(Path(path) / "adapter_config.json", json.dumps(config, indent=2) + "\n")

    # ---- forward

    def set_sparsity(self, on):
        """The one switch: the attached ratios, or dense."""
        for b in self.blocks:
            for p in b.predictors():
                p.switch(on)
        for part in self.parts():
            part.skips_backward = bool(on) and part.backward_sparsity > 0

    def can_be_sparse(self):
        """Whether set_sparsity changes anything: whether a part has a ratio."""
        return any(part.predictor is not None or part.backward_sparsity for part in self.parts())

    def rope(self, positions):
        """cos and sin (T, hd/2) of positions (T,), in fp32 (fp64 in an fp64 model)."""
        high = torch.promote_types(self.dtype, torch.float32)
        # made once: a copy from the host in every step would wait for the device
        if self.frequencies is None:
            # (hd/2,)
            self.frequencies = inverse_frequencies(self.config).to(device=positions.device, dtype=high)
        angles = positions.to(high)[:, None] * self.frequencies
        return angles.cos(), angles.sin()

    def hidden(self, batch, cache=None, x=None, first=0, measure=False):
        """batch -> the final norm's output on the loss rows, (T_loss, D). x (T, D): go on from block `first`
        with this input of it. measure: as of loss."""
        window = self.config.sliding_window
        if window and batch.shape[1] > window:
            raise UserError(f"a text of {batch.shape[1]} tokens is longer than the model's sliding window of "
                            f"{window}: lower max_seq_len")
        rope = self.rope(batch.positions)
        if x is None:
            x = F.embedding(batch.tokens, self.embed)  # (T, D)
        for i, block in enumerate(self.blocks):
            if i < first:
                continue
            if measure and block.predictors() and not x.requires_grad:
                x = x.requires_grad_()  # so that the backward comes to this block, LoRA or not
            last = i == len(self.blocks) - 1
            args = (x, batch, rope, last, measure, Chosen(), cache and cache.blocks[i])
            # nothing here draws random numbers, so their state need not be kept
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*args)
        return dense.rms_norm(x, self.final_norm, self.config.rms_norm_eps)

    def loss(self, batch, x=None, first=0, measure=False):
        """batch (data.Batch, on the model's device) -> the weighted sum of the loss over its loss rows, a
        scalar in fp32; the training loop divides by the sum of weights. Obeys set_sparsity alone, in training
        mode or not. measure: in the backward of this dense pass the predictors see which channels matter. x, first:
        as for hidden. UserError: sparse with channels that nothing has measured, or a text longer than the sliding
        window."""
        x = self.hidden(batch, None, x, first, measure)
        head = self.head
        if not torch.is_grad_enabled():  # CrossEntropy makes the gradients in its forward, where they are wanted
            head = head.detach()
        return dense.CrossEntropy.apply(x, head, batch.targets, batch.weights)

    @torch.no_grad()
    def logits(self, tokens):
        """tokens (B, S) int64, right-padded -> logits (B, S, V). Always dense."""
        B, S = tokens.shape
        places = torch.arange(B * S, device=tokens.device)
        batch = data.Batch(
            tokens=tokens.flatten(),
            targets=None,
            weights=None,
            positions=places % S,
            places=places,
            n_sparse=0,
            loss=slice(0, B * S),
            lengths=[S] * B)
        return (self.hidden(batch) @ self.head.T).view(B, S, -1)

    def generate(self, prompts, max_new_tokens, temperature=0.0, top_p=1.0, stop=None, seed=0, stream=None):
        """prompts: lists of token ids, of any lengths -> lists of new ids, without the one that ended
        them. Always dense.

        temperature 0 is greedy; top_p keeps the likeliest tokens that hold that share. stop: ids that end a
        text (default: all of the checkpoint's eos_token_id). stream: called with a list of (prompt number,
        token) after each step."""
        if stop is None:
            stop = self.config.eos_token_id
        return generate(self, prompts, max_new_tokens, temperature, top_p, set(stop), seed, stream)

    def decode(self, tokens, cache):
        """tokens (B,), the next of each text -> the final norm's output (B, D)."""
        rope = self.rope(cache.lengths)
        cache.advance()
        x = F.embedding(tokens, self.embed)
        for block, kv in zip(self.blocks, cache.blocks):
            x = block.decode(x, rope, kv)
        return dense.rms_norm(x, self.final_norm, self.config.rms_norm_eps)

    # ---- counting

    def flops(self, batch):
        """(dense, sparse): FLOPs of one training step of this batch, forward and backward, at the present
        set_sparsity (lib/flops.py)."""
        dense_step = flops_by_part(self, batch, sparse_on=False)
        sparse_step = flops_by_part(self, batch, sparse_on=True)
        return sum(dense_step.values()), sum(sparse_step.values())


# ---- adapters in PEFT's format -----------------------------------------------------------------------------

def load_adapter(model, path):
    """Gives the model the adapter in path, written by save_adapter or by PEFT: add_lora and load_lora in
    one. Which targets and blocks it has is read off its tensors' names, for target_modules may be a list, full names
    or a regex. UserError: an adapter of another base, or one of only some targets or blocks in between."""
    c, state = read_adapter(path)
    blocks = {int(i) for k in state for i in re.findall(r"\.layers\.(\d+)\.", k)}
    if blocks and max(blocks) >= len(model.blocks):
        raise UserError(f"the adapter in {path} is for another base: it has {max(blocks) + 1} blocks, "
                        f"this one {len(model.blocks)}")
    targets = [t for t, name in TARGETS.items() if any(f".{name}.lora_" in k for k in state)]
    if not targets:
        raise UserError(f"the adapter in {path} changes none of {', '.join(TARGETS)}: "
                        f"{sorted(state)[:1]} cannot be read")
    model.add_lora(c["r"], c["lora_alpha"], targets, bool(c.get("use_rslora")), min(blocks, default=0))
    try:
        model.load_lora(state)
    except UserError as e:
        raise UserError(f"{path} does not fit: {e}") from None


# ---- RoPE --------------------------------------------------------------------------------------------------

def inverse_frequencies(c):
    """theta^(-2i / hd), i < hd/2, in fp64, with the checkpoint's scaling: "linear" divides positions by a
    factor, "llama3" only the long wavelengths' (those over original_max_position_embeddings /
    low_freq_factor), blending between the two."""
    freq = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)  # (hd/2,)
    s = c.rope_scaling
    if not s:
        return freq
    if s.get("rope_type", s.get("type")) == "linear":
        return freq / s["factor"]
    # of each frequency over the original context
    turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: divided by the factor, 1: as it was
    return freq * (keep + (1 - keep) / s["factor"])
