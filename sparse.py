"""The method: three projections whose context rows compute only the channels that were kept. Autograd functions with
a hand-written backward, for frozen weights with LoRA.

A batch is a stream of T rows, one a token (data.collate). Its first n rows may be *sparse*: by default the context
tokens, which carry no loss. In a sparse step such a row computes only the kept *channels* idx, which are stored rows of
a weight, forward and backward; all other rows compute all of them. Both kinds write into one output. A dense step is
this very code with keep = None: then n only says which rows are shown to a predictor that measures.

    T rows, n of them sparse     D model width       N projection width
    I MLP width                  C kept channels     R LoRA rank

Frozen weights are stored with their sparse axis first, so that to keep channels is to gather contiguous
rows of W:

    qkv      W (N, D)     dense  y = x W.T + b       sparse  y = b;  y[:, idx] += x W[idx].T
    o        W (N, D)     dense  y = x W             sparse  y = x[:, idx] W[idx]
             where sparse rows have no queries (predictor.py), a map of the attention's input is all: y = (x U) V + b
    MLP      Wg, Wu (I, D) in one tensor, Wd (I, D)  dense: idx = all
                          g = x Wg[idx].T    u = x Wu[idx].T    h = silu(g) u    y = h Wd[idx]
             where the dropped channels have a map (predictor.py), frozen and of low rank  y += (x U) V + b
    LoRA     y += s (x A.T) B.T, s = alpha / R (rslora: alpha / sqrt R); on q, k, v, o for all channels, in the MLP
             for the kept ones (B_g[idx], B_u[idx], A_d[:, idx]): a sparse row adds to the gradient of what it
             computed, and to no other (without queries: to k's and v's)

and the backward is the exact gradient of that forward:

    qkv      dx = dy[:, idx] W[idx]      o     dx[:, idx] = dy W[idx].T
    MLP      dh = dy Wd[idx].T    dg, du = swiglu'(dh, g, u)    dx = dg Wg[idx] + du Wu[idx] (+ (dy V.T) U.T)
    LoRA     dz = s dy B    dx += dz A    dA = dz.T x    dB = s dy.T z    with z = x A.T

Loud rows: in some blocks (backward_sparsity) a sparse row leaves nothing out in the forward, and most sparse rows have
no backward through MLP, query and output: only those do whose gradient dy is largest. The others get theirs through the
residual stream, and through their keys and values, which loud and dense rows read. So the loss is the dense model's,
and only the gradient lacks something (predictor.py says why that pays). Below a ratio of .6 it saves nothing, for the
loud rows' forward is made twice.

(The paper's code drops the base branch's gradient in the attention projections; here it is kept.) Frozen
weights get no gradient; with lora_r = 0 the weights themselves are trained, and dW = dy.T x is computed in
the same place.

Cost of one sparse row against a dense one: C / N of the multiplications and of the weight bytes, in the
forward and for dx (a frozen weight has no dW); LoRA and the map are thin products beside it. Kept rows that stay for
many steps were copied out once, where they are at most half of all (Predictor.set_fixed): plain matmuls. All others go
through kernels.gather_matmul_nt (x W[idx].T) and gather_matmul_nn (x W[idx]): Triton on a GPU, index_select and a
library matmul on a CPU.

A weight may be a kernels.NF4, packed in 4 bits: then the products unpack what they read of it, in the forward and again
in the backward, and what autograd keeps is the packed weight. Rows that were copied out are unpacked already.
"""
import math
from collections.abc import Callable
from typing import NamedTuple, Optional

import torch
from torch.autograd import Function

import kernels


# ---- what a forward keeps ----------------------------------------------------------------------------------

class Keep(NamedTuple):
    """The kept channels of one stored weight W (N, D): its row numbers, and a contiguous copy of those rows
    where one is worth it (channels that stay for many steps)."""
    idx: torch.Tensor  # (C,) int64, sorted
    copy: Optional[torch.Tensor] = None  # (C, D) = W[idx]


class KeepAttention(NamedTuple):
    """The kept channels of an attention. channels: those of q, k and v, sorted int64, each numbered in its own
    projection."""
    channels: tuple
    qkv: Keep  # the same as rows of the fused qkv weight
    o: Keep  # the rows of o that read the kept values


class SkipQueries(NamedTuple):
    """An attention whose sparse rows make keys and values only, for the dense rows to read. What they would have read
    themselves is replaced by a map of their normed input."""
    map: Optional[tuple] = None  # U (D, r), V (r, D), b (D,): (x U) V + b stands in
    channels: tuple = ()  # as the others have it: none is dropped


class SkipBackward(NamedTuple):
    """A part whose sparse rows leave nothing out in the forward, and have a backward only where it is loud: LoudRows."""
    loudest: Callable  # dy (n, D), the gradient of what the sparse rows came to -> the rows that have one, (c,) int64
    channels: Optional[torch.Tensor] = None  # as the others have it: none is dropped


class KeepMLP(NamedTuple):
    """The kept channels of an MLP, (C,) int64, sorted; and what stands in for the dropped ones."""
    channels: torch.Tensor
    gate_up: Keep  # the same as rows of the fused gate_up: 2C
    down: Keep  # and of down: C
    map: Optional[tuple] = None  # U (D, r), V (r, D), b (D,): they add (x U) V + b


# ---- the two products, all rows of a weight or the kept ones -----------------------------------------------

def kept_nt(x, w, keep, out=None, bias=None):
    """x (T, D), w (N, D) -> x w[idx].T (+ bias[idx]): compact (T, C), or written into columns idx of out (T, N).
    keep None: all rows, x w.T (T, N), which nobody needs with an out or a bias."""
    if keep is None:
        assert out is None and bias is None
        return kernels.matmul_nt(x, w)
    if keep.copy is None:
        return kernels.gather_matmul_nt(x, w, keep.idx, out, bias)
    y = kernels.matmul_nt(x, keep.copy)  # (T, C)
    if bias is not None:
        y += bias[keep.idx]
    if out is None:
        return y
    return kernels.put_columns(out, keep.idx, y)


def kept_nn(x, w, keep, out):
    """x (T, C), w (N, D) -> out (T, D) = x w[idx]. keep None: all rows, x (T, N)."""
    if keep is None:
        return torch.mm(x, kernels.unpacked(w), out=out)
    if keep.copy is None:
        return kernels.gather_matmul_nn(x, w, keep.idx, out)
    return torch.mm(x, keep.copy, out=out)


def weight_grad(dy, x):
    """dy.T x for dy (T, N), x (T, D) -> (N, D), in fp32 (fp64 for fp64) even where the operands are half: a
    sum over all rows of a batch neither rounds nor overflows before it is added to the fp32 gradient (but a
    CPU's bf16 product is rounded once, to bf16)."""
    if dy.is_cuda and dy.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(dy.T, x, out_dtype=torch.float32)
    if dy.dtype == torch.float16:
        return dy.T.float() @ x.float()
    return (dy.T @ x).to(torch.promote_types(dy.dtype, torch.float32))


# ---- LoRA on a fused projection: several side by side, each on its own span of the output -------------------
# lora is [A, B, A, B, ...], A (R, D) and B (hi - lo, R) for each span (lo, hi). No LoRA is a LoRA of rank 0.

def lora_forward(x, y, spans, lora, s):
    """y[:, lo:hi] += s (x A.T) B.T for each span. Returns z (T, sum of R): the thin products of all A are one."""
    As, Bs = lora[0::2], lora[1::2]
    z = x @ torch.cat(As).to(x.dtype).T  # (T, sum of R)
    if z.shape[1] == 0:
        return z
    zs = z.split([len(A) for A in As], 1)  # (T, R) each
    for (lo, hi), B, zi in zip(spans, Bs, zs):
        y[:, lo:hi].addmm_(zi, B.to(x.dtype).T, alpha=s)
    return z


def lora_backward(dy, x, z, dx, spans, lora, s):
    """Adds dz A to dx (None: not wanted) and returns [dA, dB, dA, dB, ...] in fp32."""
    if z.shape[1] == 0:
        return [torch.zeros_like(p) for p in lora]
    As, Bs = lora[0::2], lora[1::2]
    ranks = [len(A) for A in As]
    dz = torch.empty_like(z)  # (T, sum of R)
    zs = z.split(ranks, 1)
    dzs = dz.split(ranks, 1)
    dBs = []
    for (lo, hi), B, zi, dzi in zip(spans, Bs, zs, dzs):
        dy_span = dy[:, lo:hi]
        torch.mul(dy_span @ B.to(dy.dtype), s, out=dzi)  # dz = s dy B
        dBs.append(weight_grad(dy_span, zi).mul_(s))  # dB = s dy.T z
    if dx is not None:
        dx.addmm_(dz, torch.cat(As).to(x.dtype))  # dx += dz A
    dAs = weight_grad(dz, x).split(ranks)  # dA = dz.T x
    return [gradient for pair in zip(dAs, dBs) for gradient in pair]


# ---- projections -------------------------------------------------------------------------------------------
# Arguments that all three share: keep, what the first n rows keep (a Keep, of SwiGLU a KeepMLP; None: all rows are
# dense); s = alpha / R; lora as above, fp32, with fp32 gradients (fp64 for fp64).
# measurer: None, or a predictor.Predictor that in the backward of a dense step is shown what the first n rows did: so
# it learns which channels matter. KeepInputs has none, for o's channels follow from v's.

class KeepOutputs(Function):
    """q, k, v: the sparse axis is the output. x (T, D), w (N, D), bias (N,) or None -> y (T, N)."""

    @staticmethod
    def forward(ctx, x, w, bias, keep, n, s, spans, measurer, *lora):
        assert keep is None or measurer is None
        cut = 0 if keep is None else n  # rows before it are sparse
        y = x.new_empty(len(x), len(w))  # (T, N)
        if cut:
            y[:cut] = 0 if bias is None else bias
            kept_nt(x[:cut], w, keep, y[:cut], bias)
        whole = kernels.unpacked(w)
        if bias is None:
            torch.mm(x[cut:], whole.T, out=y[cut:])
        else:
            torch.addmm(bias, x[cut:], whole.T, out=y[cut:])
        # A predictor scores what a sparse row would lose: x W.T. Bias and LoRA every row has.
        shown = None
        if measurer is not None:
            shown = y[:n].clone()  # (n, N)
            if bias is not None:
                shown -= bias
        z = lora_forward(x, y, spans, lora, s)
        ctx.save_for_backward(x, z, shown, *lora)
        ctx.w, ctx.keep, ctx.cut, ctx.s, ctx.spans, ctx.measurer = w, keep, cut, s, spans, measurer
        return y

    @staticmethod
    def backward(ctx, dy):
        x, z, shown, *lora = ctx.saved_tensors
        w, cut = ctx.w, ctx.cut
        dx = dw = dbias = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            if cut:
                kept_nn(kernels.columns(dy[:cut], ctx.keep.idx), w, ctx.keep, dx[:cut])  # dx = dy[:, idx] W[idx]
            torch.mm(dy[cut:], kernels.unpacked(w), out=dx[cut:])
        dlora = lora_backward(dy, x, z, dx, ctx.spans, lora, ctx.s)
        if ctx.needs_input_grad[1]:  # a weight that is trained has no sparse rows
            dw = weight_grad(dy, x)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0)
        if ctx.measurer is not None:
            ctx.measurer.see_attention(shown, dy[:len(shown)])
        return dx, dw, dbias, None, None, None, None, None, *dlora


class KeepInputs(Function):
    """o: the sparse axis is the input. x (T, N), w (N, D) -> y (T, D)."""

    @staticmethod
    def forward(ctx, x, w, keep, n, s, *lora):
        cut = 0 if keep is None else n
        y = x.new_empty(len(x), w.shape[1])  # (T, D)
        if cut:
            kept_nn(kernels.columns(x[:cut], keep.idx), w, keep, y[:cut])  # y = x[:, idx] W[idx]
        torch.mm(x[cut:], kernels.unpacked(w), out=y[cut:])
        z = lora_forward(x, y, [(0, w.shape[1])], lora, s)
        ctx.save_for_backward(x, z, *lora)
        ctx.w, ctx.keep, ctx.cut, ctx.s = w, keep, cut, s
        return y

    @staticmethod
    def backward(ctx, dy):
        x, z, *lora = ctx.saved_tensors
        w, cut = ctx.w, ctx.cut
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            if cut:
                dx[:cut] = 0
                kept_nt(dy[:cut], w, ctx.keep, dx[:cut])  # dx[:, idx] = dy W[idx].T
            torch.mm(dy[cut:], kernels.unpacked(w).T, out=dx[cut:])
        dlora = lora_backward(dy, x, z, dx, [(0, w.shape[1])], lora, ctx.s)
        if ctx.needs_input_grad[1]:
            dw = weight_grad(x, dy)
        return dx, dw, None, None, None, *dlora


class Map(Function):
    """The map that stands in for attention where sparse rows have no queries. x (n, D), map (U, V, b) -> (x U) V + b."""

    @staticmethod
    def forward(ctx, x, map):
        ctx.map = map
        U, V, b = map
        return torch.addmm(b, x @ U, V)

    @staticmethod
    def backward(ctx, dy):
        U, V, _ = ctx.map
        return dy @ V.T @ U.T, None  # dx = (dy V.T) U.T


# ---- MLP ---------------------------------------------------------------------------------------------------
# The two functions below see rows of one kind only: all dense (keep None), or all sparse, for which they cut LoRA down
# to the kept channels. C is I where all channels stay. SwiGLU calls them for each kind of rows.

def mlp_forward(x, gate_up, down, keep, lora, s, y):
    """x (T, D) -> writes y (T, D). lora: A, B of gate, of up, of down. Returns what the backward needs: gu (T, 2C),
    gate and up before the nonlinearity; LoRA's z of gate and up, and of down."""
    lora = kept_lora(lora, keep)
    gu = kept_nt(x, gate_up, keep and keep.gate_up)  # g = x Wg[idx].T, u = x Wu[idx].T
    z_gu = lora_forward(x, gu, gate_up_spans(gu), lora[:4], s)
    h = kernels.swiglu(gu)  # h = silu(g) u, (T, C)
    kept_nn(h, down, keep and keep.down, y)  # y = h Wd[idx]
    z_down = lora_forward(h, y, [(0, y.shape[1])], lora[4:], s)
    if keep is not None and keep.map is not None:
        U, V, b = keep.map
        y.addmm_(x @ U, V).add_(b)  # y += (x U) V + b
    return gu, z_gu, z_down


def mlp_backward(dy, x, gate_up, down, keep, lora, s, gu, z_gu, z_down, dx, want_h):
    """dy (T, D) -> writes dx (T, D) (None: not wanted). Returns LoRA's six gradients, and for whoever else wants them h
    (only with want_h), dh = dL/dh (T, C) and dgu (T, 2C)."""
    lora = kept_lora(lora, keep)
    h = None
    if want_h or z_down.shape[1]:
        h = kernels.swiglu(gu)  # (T, C): cheaper to redo than to keep
    dh = kept_nt(dy, down, keep and keep.down)  # dh = dy Wd[idx].T, (T, C)
    d_down = lora_backward(dy, h, z_down, dh, [(0, dy.shape[1])], lora[4:], s)  # adds LoRA's share to dh
    dgu = kernels.swiglu_backward(dh, gu)  # dg, du = swiglu'(dh, g, u), (T, 2C)
    if dx is not None:
        kept_nn(dgu, gate_up, keep and keep.gate_up, dx)  # dx = dg Wg[idx] + du Wu[idx]
    if dx is not None and keep is not None and keep.map is not None:
        U, V, b = keep.map
        dx.addmm_(dy @ V.T, U.T)  # dx += (dy V.T) U.T
    d_gate_up = lora_backward(dgu, x, z_gu, dx, gate_up_spans(gu), lora[:4], s)
    return [*d_gate_up, *d_down], h, dh, dgu


def gate_up_spans(gu):
    """Of gate and of up in gu (T, 2C)."""
    C = gu.shape[1] // 2
    return [(0, C), (C, 2 * C)]


def kept_lora(lora, keep):
    """The MLP's six LoRA factors, cut down to the kept channels: B_g[idx], B_u[idx], A_d[:, idx]."""
    if keep is None:
        return lora
    Ag, Bg, Au, Bu, Ad, Bd = lora
    idx = keep.channels
    return [Ag, Bg[idx], Au, Bu[idx], Ad[:, idx], Bd]


def add_kept(total, gradients, keep):
    """Adds the gradients of what kept_lora returned to those of the whole factors."""
    if keep is None:
        for whole, part in zip(total, gradients):
            whole += part
        return
    Ag, Bg, Au, Bu, Ad, Bd = total
    dAg, dBg, dAu, dBu, dAd, dBd = gradients
    idx = keep.channels
    Ag += dAg
    Bg.index_add_(0, idx, dBg)
    Au += dAu
    Bu.index_add_(0, idx, dBu)
    Ad.index_add_(1, idx, dAd)
    Bd += dBd


def kinds_of_rows(T, n, keep):
    """[(slice of rows, what they keep)]: the sparse rows, then the dense ones."""
    if keep is None:
        return [(slice(0, T), None)]
    return [(slice(0, n), keep), (slice(n, T), None)]


class SwiGLU(Function):
    """y = (silu(x Wg.T) * (x Wu.T)) Wd. x (T, D), gate_up (2I, D), down (I, D) -> y (T, D)."""

    @staticmethod
    def forward(ctx, x, gate_up, down, keep, n, s, measurer, *lora):
        assert keep is None or measurer is None
        y = x.new_empty(len(x), down.shape[1])  # (T, D)
        saved = []
        for rows, keep_rows in kinds_of_rows(len(x), n, keep):
            saved += mlp_forward(x[rows], gate_up, down, keep_rows, lora, s, y[rows])
        ctx.save_for_backward(x, *lora, *saved)
        ctx.weights = gate_up, down
        ctx.keep, ctx.n, ctx.s, ctx.measurer = keep, n, s, measurer
        return y

    @staticmethod
    def backward(ctx, dy):
        x, *rest = ctx.saved_tensors
        gate_up, down = ctx.weights
        lora, saved = rest[:6], rest[6:]
        train_gate_up, train_down = ctx.needs_input_grad[1:3]
        dx = dw_gate_up = dw_down = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
        dlora = [torch.zeros_like(p) for p in lora]
        want_h = train_down or ctx.measurer is not None
        for i, (rows, keep) in enumerate(kinds_of_rows(len(x), ctx.n, ctx.keep)):
            gu, z_gu, z_down = saved[3 * i:3 * i + 3]
            dx_rows = None
            if dx is not None:
                dx_rows = dx[rows]
            gradients, h, dh, dgu = mlp_backward(dy[rows], x[rows], gate_up, down, keep, lora, ctx.s, gu, z_gu, z_down,
                                                 dx_rows, want_h)
            add_kept(dlora, gradients, keep)
        if ctx.keep is None:  # rows of one kind only, so the loop ran once: h, dh and dgu are those of all rows
            if ctx.measurer is not None:
                ctx.measurer.see_mlp(h[:ctx.n], dh[:ctx.n])
            if train_gate_up:
                dw_gate_up = weight_grad(dgu, x)
            if train_down:
                dw_down = weight_grad(h, dy)
        return dx, dw_gate_up, dw_down, None, None, None, None, *dlora


# ---- the backward of the loudest rows ----------------------------------------------------------------------

class LoudRows(Function):
    """y = f(x), whose backward goes through the loudest rows only, those with the largest dy. The others have dx = 0.
    Row t of y depends on row t of x and on what else f reads. The forward keeps nothing but its inputs; the backward
    makes f of the loud rows again and differentiates that.

    f: called with rows (None: all n, or (c,) int64), x of these rows and others -> y of these rows. loudest: as in
    SkipBackward. tensors: x (n, D); others, which f reads whole, as keys and values; and the last n_trained, which f
    finds by itself: what it trains."""

    @staticmethod
    def forward(ctx, f, loudest, n_trained, *tensors):
        end = len(tensors) - n_trained
        ctx.f, ctx.loudest, ctx.trained = f, loudest, tensors[end:]
        ctx.save_for_backward(*tensors[:end])
        return f(None, *tensors[:end])

    @staticmethod
    def backward(ctx, dy):
        x, *others = ctx.saved_tensors
        rows = ctx.loudest(dy)  # (c,)
        inputs = []
        for t, wanted in zip([x[rows], *others], ctx.needs_input_grad[3:]):
            inputs.append(t.detach().requires_grad_(wanted))
        with torch.enable_grad():
            y = ctx.f(rows, *inputs)  # (c, D)
        tensors = [*inputs, *ctx.trained]
        found = iter(torch.autograd.grad(y, [t for t in tensors if t.requires_grad], dy[rows]))
        gradients = [next(found) if t.requires_grad else None for t in tensors]
        if gradients[0] is not None:
            gradients[0] = torch.zeros_like(x).index_copy_(0, rows, gradients[0])
        return None, None, None, *gradients


def loudest_rows(dy, batch, ratio):
    """dy (n, D), the gradient of a batch's sparse rows -> the rows (c,) int64 that have the largest: of each text's m
    sparse rows m (1 - ratio), rounded up. Text after text, each in its order. By text, so that it does not matter which
    texts make a batch; and how many they are the host knows without waiting."""
    B, S = batch.shape
    n = batch.n_sparse
    places = batch.places[:n]  # b S + position
    high = torch.promote_types(dy.dtype, torch.float32)
    size = dy.new_full((B * S,), -1, dtype=high)  # of each place; -1 where no sparse row is
    size[places] = torch.linalg.vector_norm(dy, dim=1, dtype=high)
    row_at = places.new_zeros(B * S)
    row_at[places] = torch.arange(n, device=dy.device)
    positions = size.view(B, S).argsort(1, descending=True)  # (B, S)
    of_texts = []
    for b, c in enumerate(loud_counts(batch, ratio)):
        of_texts.append(b * S + positions[b, :c].sort().values)
    return row_at[torch.cat(of_texts)]


def loud_counts(batch, ratio):
    """How many rows of each text loudest_rows() finds, one at least where it has a sparse row: [int]."""
    counts = []
    for whole, dense in zip(batch.lengths, batch.dense_lengths):
        m = whole - dense
        loud = math.ceil(round(m * (1 - ratio), 6))  # 6 digits: as predictor.number_kept
        counts.append(min(m, max(1, loud)))
    return counts
