"""Frozen weights, LoRA and contextual sparsity in one: autograd functions with a hand-written backward. Three
of them are the method (ProjectOut, ProjectIn, SwiGLU); the others are the way into attention's grid and back,
attention on a CPU, and the loss.

A batch is a stream of T rows (data.collate). The first n rows are *sparse* (context tokens: they carry no
loss), the rest are dense. A sparse row computes only the kept channels idx of a weight, forward and
backward; a dense row computes all of them. Both kinds write into one output, so dense LoRA is this very code
with n = 0.

    T rows, n of them sparse     D model width       N projection width
    I MLP width                  C kept channels     R LoRA rank

Frozen weights are stored with their sparse axis first, so that to keep channels is to gather contiguous
rows of W:

    qkv      W (N, D)     dense  y = x W.T + b       sparse  y = b;  y[:, idx] += x W[idx].T
    o        W (N, D)     dense  y = x W             sparse  y = x[:, idx] W[idx]
    MLP      Wg, Wu (I, D) in one tensor, Wd (I, D)  dense: idx = all
                          g = x Wg[idx].T    u = x Wu[idx].T    h = silu(g) u    y = h Wd[idx]
    LoRA     y += s (x A.T) B.T, s = alpha / R; on q, k, v, o for all channels, in the MLP for the kept ones
             (B_g[idx], B_u[idx], A_d[:, idx]): a step trains exactly the rows that it computed

and the backward is the exact gradient of that forward:

    qkv      dx = dy[:, idx] W[idx]      o     dx[:, idx] = dy W[idx].T
    MLP      dh = dy Wd[idx].T    dg, du = swiglu'(dh, g, u)    dx = dg Wg[idx] + du Wu[idx]
    LoRA     dz = s dy B    dx += dz A    dA = dz.T x    dB = s dy.T z    with z = x A.T

(The paper's code drops the base branch's gradient in the attention projections; here it is kept.) Frozen
weights get no gradient; with lora_r = 0 the weights themselves are trained, and dW = dy.T x is computed in
the same place.

Cost of one sparse row against a dense one: C / N of the multiplications and of the weight bytes, in the
forward and for dx (a frozen weight has no dW). All products are kernels.gather_matmul_nt (x W[idx].T) and
gather_matmul_nn (x W[idx]); Triton on a GPU, index_select and a library matmul on a CPU.
"""
from typing import NamedTuple, Optional

import torch
from torch.autograd import Function

import kernels


class Keep(NamedTuple):
    """The kept channels of one stored weight W (N, D): its row numbers, and a contiguous copy of those rows
    where one is worth it (channels that stay for many steps: predictor "measured")."""
    idx: torch.Tensor  # (C,) int64, sorted
    rows: Optional[torch.Tensor] = None  # (C, D) = W[idx]


class KeepAttention(NamedTuple):
    """The kept channels of an attention: those of q, k and v, sorted int64, each numbered in its own
    projection; the same as rows of the fused qkv weight; and the rows of o that read the kept values."""
    channels: tuple
    qkv: Keep
    o: Keep


class KeepMLP(NamedTuple):
    """The kept MLP channels: idx (C,) int64, sorted; the same as rows of the fused gate_up (2C,) and
    of down (C,)."""
    idx: torch.Tensor
    gate_up: Keep
    down: Keep

    @property
    def channels(self):
        return self.idx


def matmul_nt(x, w, keep):
    """x (T, D), w (N, D) -> x w.T (T, N), or compact x w[idx].T (T, C)."""
    if keep is None or keep.rows is not None:
        return kernels.matmul_nt(x, w if keep is None else keep.rows)
    return kernels.gather_matmul_nt(x, w, keep.idx)


def matmul_nn(x, w, keep, out):
    """x (T, N), or compact (T, C), and w (N, D) -> out (T, D) = x w, or x w[idx]."""
    if keep is None or keep.rows is not None:
        return torch.mm(x, w if keep is None else keep.rows, out=out)
    return kernels.gather_matmul_nn(x, w, keep.idx, out=out)


def scatter_nt(x, w, keep, out, bias=None):
    """out (T, N): out[:, idx] = x w[idx].T + bias[idx]; other columns stay."""
    if keep.rows is None:
        return kernels.gather_matmul_nt(x, w, keep.idx, out=out, bias=bias)
    y = x @ keep.rows.T if bias is None else torch.addmm(bias[keep.idx], x, keep.rows.T)  # (T, C)
    return kernels.put_columns(out, keep.idx, y)


def gather_nn(x, w, keep, out):
    """out (T, D) = x[:, idx] w[idx] for x (T, N)."""
    if keep.rows is None:
        return kernels.gather_matmul_nn(x, w, keep.idx, gather=True, out=out)
    return torch.mm(kernels.columns(x, keep.idx), keep.rows, out=out)


def energy(y):
    """Sum over rows of y^2: y (n, N) -> (N,) in fp32 (fp64 for fp64). What a channel's importance is measured
    by. What is not finite counts as nothing: one bad batch must not decide for all that follow."""
    e = torch.linalg.vector_norm(y, dim=0, dtype=torch.promote_types(y.dtype, torch.float32)).square_()
    return e.nan_to_num_(0.0, 0.0, 0.0)


def weight_grad(dy, x):
    """dy.T x for dy (T, N), x (T, D) -> (N, D), in fp32 (fp64 for fp64) even where the operands are half: a
    sum over all rows of a batch neither rounds nor overflows before it is added to the fp32 gradient (but a
    CPU's bf16 product is rounded once, to bf16)."""
    if dy.is_cuda and dy.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(dy.T, x, out_dtype=torch.float32)
    if dy.dtype == torch.float16:
        return dy.T.float() @ x.float()
    return (dy.T @ x).to(torch.promote_types(dy.dtype, torch.float32))


# ---- LoRA on a fused projection: k LoRAs side by side, each on its own span of the output ------------------

def lora_forward(x, y, spans, lora, s):
    """y[:, lo:hi] += s (x A.T) B.T for each (lo, hi) of spans; lora = (A, B, A, B, ...), A (R, D),
    B (hi-lo, R). Returns z (T, kR): the thin products of all A are one matmul."""
    A = torch.cat([a.to(x.dtype) for a in lora[0::2]])  # (kR, D)
    z = x @ A.T  # (T, kR)
    for (lo, hi), b, zi in zip(spans, lora[1::2], z.chunk(len(spans), 1)):
        y[:, lo:hi].addmm_(zi, b.to(x.dtype).T, alpha=s)
    return z


def lora_backward(dy, x, z, dx, spans, lora, s):
    """Adds dz A to dx (None: not wanted) and returns [dA, dB, dA, dB, ...] in fp32."""
    dz = torch.empty_like(z)  # (T, kR)
    dB = []
    for (lo, hi), b, zi, dzi in zip(spans, lora[1::2], z.chunk(len(spans), 1), dz.chunk(len(spans), 1)):
        torch.mul(dy[:, lo:hi] @ b.to(dy.dtype), s, out=dzi)
        dB.append(weight_grad(dy[:, lo:hi], zi).mul_(s))  # (hi-lo, R)
    if dx is not None:
        dx.addmm_(dz, torch.cat([a.to(x.dtype) for a in lora[0::2]]))
    dA = weight_grad(dz, x).chunk(len(spans))  # k of (R, D)
    return [g for pair in zip(dA, dB) for g in pair]


# ---- projections -------------------------------------------------------------------------------------------
# Arguments that all three share: keep, a Keep (SwiGLU: a KeepMLP), or None where all rows are dense; n, how
# many rows come first and are sparse (without keep only measured); s = alpha / R; *lora, A, B, A, B, ... in fp32,
# whose gradients are fp32 too (fp64 for fp64), SwiGLU's six of gate, up and down. The projections' spans are
# the output columns (lo, hi) of each LoRA.

class ProjectOut(Function):
    """q, k, v: the sparse axis is the output. x (T, D), w (N, D), bias (N,) or None -> y (T, N)."""

    @staticmethod
    def forward(ctx, x, w, bias, keep, n, s, spans, *lora):
        n = 0 if keep is None else n
        y = x.new_empty(x.shape[0], w.shape[0])  # (T, N)
        if n:
            y[:n] = 0 if bias is None else bias
            scatter_nt(x[:n], w, keep, y[:n], bias)
        if bias is None:
            torch.mm(x[n:], w.T, out=y[n:])
        else:
            torch.addmm(bias, x[n:], w.T, out=y[n:])
        z = lora_forward(x, y, spans, lora, s) if lora else None
        ctx.save_for_backward(x, w, z, *lora)
        ctx.keep, ctx.n, ctx.s, ctx.spans = keep, n, s, spans
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w, z, *lora = ctx.saved_tensors
        n, dx, dw, dbias, dlora = ctx.n, None, None, None, []
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            if n:
                gather_nn(dy[:n], w, ctx.keep, dx[:n])  # dy[:, idx] W[idx]
            torch.mm(dy[n:], w, out=dx[n:])
        if lora:
            dlora = lora_backward(dy, x, z, dx, ctx.spans, lora, ctx.s)
        if ctx.needs_input_grad[1]:
            dw = weight_grad(dy, x)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0)
        return dx, dw, dbias, None, None, None, None, *dlora


class ProjectIn(Function):
    """o: the sparse axis is the input. x (T, N), w (N, D) -> y (T, D)."""

    @staticmethod
    def forward(ctx, x, w, keep, n, s, spans, *lora):
        n = 0 if keep is None else n
        y = x.new_empty(x.shape[0], w.shape[1])  # (T, D)
        if n:
            gather_nn(x[:n], w, keep, y[:n])
        torch.mm(x[n:], w, out=y[n:])
        z = lora_forward(x, y, spans, lora, s) if lora else None
        ctx.save_for_backward(x, w, z, *lora)
        ctx.keep, ctx.n, ctx.s, ctx.spans = keep, n, s, spans
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w, z, *lora = ctx.saved_tensors
        n, dx, dw, dlora = ctx.n, None, None, []
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            if n:
                dx[:n] = 0
                scatter_nt(dy[:n], w, ctx.keep, dx[:n])  # dx[:, idx] = dy W[idx].T
            torch.mm(dy[n:], w.T, out=dx[n:])
        if lora:
            dlora = lora_backward(dy, x, z, dx, ctx.spans, lora, ctx.s)
        if ctx.needs_input_grad[1]:
            dw = weight_grad(x, dy)
        return dx, dw, None, None, None, None, *dlora


# ---- MLP ---------------------------------------------------------------------------------------------------

class SwiGLU(Function):
    """y = (silu(x Wg.T) * (x Wu.T)) Wd. x (T, D), gate_up (2I, D), down (I, D) -> y (T, D). lora: (A, B) of
    gate, up and down, None where there is none. energies (I,) fp32 or None: += the sum of h^2 over the first
    n rows (they are computed densely then)."""

    @staticmethod
    def forward(ctx, x, gate_up, down, keep, n, s, energies, *lora):
        y = x.new_empty(x.shape[0], down.shape[1])  # (T, D)
        cut = 0 if keep is None else n
        ctx.segments = [(slice(0, cut), keep), (slice(cut, x.shape[0]), None)]
        ctx.segments = [(r, k) for r, k in ctx.segments if r.stop > r.start]
        saved = []
        for rows, k in ctx.segments:
            loras = kept_lora(lora, k, x.dtype)
            gu, z, h = mlp_hidden(x[rows], gate_up, k, loras, s)
            matmul_nn(h, down, k and k.down, y[rows])
            zd = None
            if loras[4] is not None:
                zd = h @ loras[4].T  # (rows, R)
                y[rows].addmm_(zd, loras[5].T, alpha=s)
            if energies is not None and k is None and n:
                energies += energy(h[:n])
            saved += [gu, z, zd]
        ctx.save_for_backward(x, gate_up, down, *lora, *saved)
        ctx.s = s
        return y

    @staticmethod
    def backward(ctx, dy):
        x, gate_up, down, *rest = ctx.saved_tensors
        lora, saved, s = rest[:6], rest[6:], ctx.s
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dlora = [None if p is None else torch.zeros_like(p) for p in lora]
        dw = [None, None]
        for i, (rows, k) in enumerate(ctx.segments):
            gu, z, zd = saved[3 * i:3 * i + 3]
            Ag, Bg, Au, Bu, Ad, Bd = kept_lora(lora, k, x.dtype)
            xr, dyr = x[rows], dy[rows]
            at = slice(None) if k is None else k.idx
            # cheaper to redo than to keep
            h = kernels.swiglu(gu) if Ad is not None or ctx.needs_input_grad[2] else None
            dh = matmul_nt(dyr, down, k and k.down)  # (rows, C)
            if Ad is not None:
                dzd = (dyr @ Bd).mul_(s)  # (rows, R)
                dh.addmm_(dzd, Ad)
                dlora[5] += weight_grad(dyr, zd).mul_(s)
                dlora[4][:, at] += weight_grad(dzd, h)
            dgu = kernels.swiglu_backward(dh, gu)  # (rows, 2C)
            if dx is not None:
                matmul_nn(dgu, gate_up, k and k.gate_up, dx[rows])
            j = 0
            for a, A, B, dpart in ((0, Ag, Bg, dgu[:, :dh.shape[1]]), (2, Au, Bu, dgu[:, dh.shape[1]:])):
                if A is None:
                    continue
                zi = z[:, j:j + A.shape[0]]
                j += A.shape[0]
                dz = (dpart @ B).mul_(s)  # (rows, R)
                if dx is not None:
                    dx[rows].addmm_(dz, A)
                dlora[a] += weight_grad(dz, xr)
                dlora[a + 1][at] += weight_grad(dpart, zi).mul_(s)
            if ctx.needs_input_grad[1]:  # all weights are trained: dense, one segment
                dw[0] = weight_grad(dgu, xr)
            if ctx.needs_input_grad[2]:
                dw[1] = weight_grad(h, dyr)
        return dx, *dw, None, None, None, None, *dlora


def kept_lora(lora, k, dtype):
    """The MLP's LoRA factors in the compute dtype, cut down to the kept channels: B_g[idx], B_u[idx],
    A_d[:, idx]."""
    cast = [None if p is None else p.to(dtype) for p in lora]
    if k is not None:
        for i in (1, 3):
            cast[i] = None if cast[i] is None else cast[i].index_select(0, k.idx)
        cast[4] = None if cast[4] is None else cast[4].index_select(1, k.idx)
    return cast


def mlp_hidden(x, gate_up, k, lora, s):
    """x (T, D) -> gu (T, 2C) before the nonlinearity, z (T, kR) or None, h (T, C). lora as
    kept_lora returns it."""
    gu = matmul_nt(x, gate_up, k and k.gate_up)
    C = gu.shape[1] // 2
    spans, pairs = [], []
    for lo, A, B in ((0, lora[0], lora[1]), (C, lora[2], lora[3])):
        if A is not None:
            spans.append((lo, lo + C))
            pairs += [A, B]
    z = lora_forward(x, gu, spans, pairs, s) if pairs else None
    return gu, z, kernels.swiglu(gu)


# ---- between the projections: rows <-> the (B, S) grid that attention needs --------------------------------

class RopeScatter(Function):
    """Rotates the first n_rot heads of x (T, sum(heads) hd) and puts each row at its place of a zero-filled
    grid, shape = (B, S). Returns a view of the grid for each of heads, (B, h, S, hd): their gradients then
    meet in one pass, where autograd's split would take three."""

    @staticmethod
    def forward(ctx, x, cos, sin, rows, n_rot, hd, shape, heads):
        ctx.save_for_backward(cos, sin, rows)
        ctx.n_rot, ctx.hd = n_rot, hd
        B, S = shape
        grid = kernels.rope_scatter(x, cos, sin, rows, n_rot, hd, B * S)  # (B*S, sum(heads) hd)
        return grid.view(B, S, -1, hd).transpose(1, 2).split(heads, 1)

    @staticmethod
    def backward(ctx, *dparts):
        cos, sin, rows = ctx.saved_tensors
        # (B*S, sum(heads) hd)
        dgrid = torch.cat([d.transpose(1, 2) for d in dparts], 2).flatten(2).flatten(0, 1)
        dx = kernels.rope_gather_backward(dgrid, cos, sin, rows, ctx.n_rot, ctx.hd)
        return dx, None, None, None, None, None, None, None


class Gather(Function):
    """grid (B*S, N) -> its rows (T, N); backward puts them back into zeros (rows are unique, so no
    sum is needed)."""

    @staticmethod
    def forward(ctx, grid, rows):
        ctx.save_for_backward(rows)
        ctx.grid_rows = grid.shape[0]
        return grid.index_select(0, rows)

    @staticmethod
    def backward(ctx, dy):
        (rows,) = ctx.saved_tensors
        return dy.new_zeros(ctx.grid_rows, dy.shape[1]).index_copy_(0, rows, dy), None


class CausalAttention(Function):
    """softmax(q k.T / sqrt(hd), no later position) v on the grid. q (B, H, S, hd), k and v (B, K, S, hd),
    lengths: B host integers -> (B, H, S, hd), zero behind an example's end. For the CPU, whose fused
    attention works through the grid's padding too: here an example's own rows only, 64 queries at a time
    against the keys up to them. Forward and backward of 4 examples in 16/4 heads of 64, one core: of 512
    tokens each 107 ms instead of 157, of 95 to 300 tokens 21 instead of 56; 32 examples of 79: 50 and 50.

        P = softmax(q k.T)    o = P v        (q already scaled; P is made again in the backward)
        dv = P.T do    dP = do v.T    dS = P (dP - rowsum(P dP))    dq = dS k / sqrt(hd)    dk = dS.T q"""
    BLOCK = 64  # queries; of 128: a quarter slower

    @staticmethod
    def ranges(lengths):
        """(example, first, end) of each block of queries; its keys are 0 .. end."""
        step = CausalAttention.BLOCK
        return [(b, i, min(i + step, length))
                for b, length in enumerate(lengths) for i in range(0, length, step)]

    @staticmethod
    def pairs(lengths):
        """How many (query, key) pairs a head computes: about half of a square grid."""
        return sum((j - i) * j for _, i, j in CausalAttention.ranges(lengths))

    @staticmethod
    def blocks(q, k, v, lengths):
        """Yields for each block of m queries: its index into (B, h, S, hd) and that of its keys, m, its
        queries (K, G m, hd) for G query heads in each of K groups, scaled, and the keys and values that they
        see, (K, j, hd); fp32 where q is half."""
        high = torch.promote_types(q.dtype, torch.float32)
        for b, i, j in CausalAttention.ranges(lengths):
            rows, seen = (b, slice(None), slice(i, j)), (b, slice(None), slice(0, j))
            qs, ks, vs = (t.to(high) for t in (q[rows], k[seen], v[seen]))
            yield rows, seen, j - i, (qs * q.shape[3] ** -.5).reshape(k.shape[1], -1, q.shape[3]), ks, vs

    @staticmethod
    def scores(q, k, m):
        """q (K, G m, hd), the last m positions of k (K, j, hd) -> (K, G m, j), -inf where the key is later
        than the query."""
        s = torch.bmm(q, k.transpose(1, 2))
        later = torch.ones(m, m, dtype=torch.bool, device=q.device).triu(1)
        s.unflatten(1, (-1, m))[..., -m:].masked_fill_(later, float("-inf"))
        return s

    @staticmethod
    def forward(ctx, q, k, v, lengths):
        # (B, H, S, hd), the heads of a row side by side: so it is read next
        out = torch.zeros_like(q.transpose(1, 2)).transpose(1, 2)
        for rows, _, m, qs, ks, vs in CausalAttention.blocks(q, k, v, lengths):
            out[rows] = torch.bmm(CausalAttention.scores(qs, ks, m).softmax(2), vs).view_as(out[rows])
        ctx.save_for_backward(q, k, v)
        ctx.lengths = lengths
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(t, dtype=torch.promote_types(q.dtype, torch.float32))
                      for t in (q, k, v))
        for rows, seen, m, qs, ks, vs in CausalAttention.blocks(q, k, v, ctx.lengths):
            do = dout[rows].to(qs.dtype).reshape_as(qs)
            p = CausalAttention.scores(qs, ks, m).softmax(2)  # (K, G m, j)
            dv[seen].baddbmm_(p.transpose(1, 2), do)
            ds = torch._softmax_backward_data(torch.bmm(do, vs.transpose(1, 2)), p, 2, p.dtype)
            dk[seen].baddbmm_(ds.transpose(1, 2), qs)
            dq[rows] = torch.bmm(ds, ks).mul_(q.shape[3] ** -.5).view_as(dq[rows])
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), None


# ---- loss --------------------------------------------------------------------------------------------------

class CrossEntropy(Function):
    """Weighted sum over rows of -log softmax(x W.T)[target], in chunks of rows, with the gradient computed in
    the forward: the (T, V) logits of a 128k vocabulary (8 x 128 rows: 0.5 GB in fp32) never exist whole, and
    are never computed twice.
    x (T, D), w (V, D), targets (T,) int64, weights (T,) -> scalar in fp32 (fp64 for fp64)."""

    @staticmethod
    def forward(ctx, x, w, targets, weights):
        high = torch.promote_types(x.dtype, torch.float32)
        want_dx, want_dw = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        total = torch.zeros((), dtype=high, device=x.device)
        dx = torch.empty_like(x) if want_dx else None
        dw = torch.zeros_like(w) if want_dw else None
        # 256 MB of fp32 logits on a GPU, the L3 cache on a CPU
        chunk = max(64, (2 ** 26 if x.is_cuda else 2 ** 23) // w.shape[0])
        for i in range(0, x.shape[0], chunk):
            xc, t, wt = x[i:i + chunk], targets[i:i + chunk, None], weights[i:i + chunk, None].to(high)
            logits = kernels.matmul_nt(xc, w).to(high)  # (chunk, V)
            lse = logits.logsumexp(1, keepdim=True)  # (chunk, 1)
            total += ((lse - logits.gather(1, t)) * wt).sum()
            if want_dx or want_dw:
                dlogits = (logits.sub_(lse).exp_().scatter_add_(1, t, torch.full_like(lse, -1)).mul_(wt)
                           .to(x.dtype))
                if want_dx:
                    torch.mm(dlogits, w, out=dx[i:i + chunk])
                if want_dw:
                    dw += weight_grad(dlogits, xc).to(dw.dtype)
        ctx.save_for_backward(dx, dw)
        return total

    @staticmethod
    def backward(ctx, dloss):
        dx, dw = ctx.saved_tensors
        return ((None if dx is None else dx * dloss.to(dx.dtype)), (None if dw is None else dw * dloss),
                None, None)
