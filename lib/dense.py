"""What lies between the projections, the same for every row: the norm, the way from the stream's rows into attention's
grid and back, attention on a CPU, and the loss. Autograd functions of tensors; nothing here is sparse.

    T rows    B examples    S longest example    H query heads    K key/value heads    hd head dim
    D model width    V vocabulary
"""
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.autograd import Function

import kernels
from sparse import weight_grad


# ---- norm --------------------------------------------------------------------------------------------------

def rms_norm(x, w, eps):
    """x / sqrt(mean(x^2) + eps) w over the last axis. x (T, D), w (D,) -> (T, D)."""
    if x.is_cuda:
        return F.rms_norm(x, w.shape, w, eps)
    return RMSNorm.apply(x, w, eps)


class RMSNorm(Function):
    """rms_norm for the CPU, where torch's backward is a chain of ten passes over the whole tensor. Here blocks of rows
    stay in the cache while all passes run over them, in fp32: an in-place pass over fp32 in the cache takes .1 ns a
    number, over bf16 .3. Forward and backward of 2048 x 576, one core: bf16 4.2 instead of 11.2 ms, fp32 4.5 instead
    of 6.5.

        n = x r, r = 1 / sqrt(mean(x^2) + eps)    y = n w
        dn = dy w    dx = r (dn - n mean(dn n))    dw = sum over rows of dy n"""

    @staticmethod
    def forward(ctx, x, w, eps):
        high = torch.promote_types(x.dtype, torch.float32)
        r = x.new_empty(len(x), 1, dtype=high)
        y = torch.empty_like(x)
        w_high = w.to(high)
        for x_b, r_b, y_b in kernels.row_blocks(2 ** 16, x, r, y):
            n = x_b.to(high)
            torch.mean(n * n, 1, keepdim=True, out=r_b).add_(eps).rsqrt_()
            y_b.copy_((n * r_b).mul_(w_high))
        ctx.save_for_backward(x, w_high, r)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w, r = ctx.saved_tensors
        dx = torch.empty_like(x)
        dw = None
        if ctx.needs_input_grad[1]:
            dw = torch.zeros_like(w, dtype=r.dtype)
        for x_b, r_b, dy_b, dx_b in kernels.row_blocks(2 ** 16, x, r, dy, dx):
            n = x_b.to(r.dtype) * r_b
            dn = dy_b.to(r.dtype)
            if dw is not None:
                dw += (dn * n).sum(0)
            dn = dn * w
            mean = (dn * n).mean(1, keepdim=True)
            dx_b.copy_(n.mul_(mean).sub_(dn).mul_(-r_b))
        return dx, dw, None


# ---- rows <-> the (B, S) grid that attention needs ---------------------------------------------------------

class RopeScatter(Function):
    """Rotates the first n_rot heads of x (T, sum(heads) hd) and puts row t at places[t] of a zero-filled
    grid, shape = (B, S). Returns a view of the grid for each of heads, (B, h, S, hd): their gradients then
    meet in one pass, where autograd's split would take three."""

    @staticmethod
    def forward(ctx, x, cos, sin, places, n_rot, hd, shape, heads):
        ctx.save_for_backward(cos, sin, places)
        ctx.n_rot, ctx.hd = n_rot, hd
        B, S = shape
        grid = kernels.rope_scatter(x, cos, sin, places, n_rot, hd, B * S)  # (B*S, sum(heads) hd)
        return grid.view(B, S, -1, hd).transpose(1, 2).split(heads, 1)

    @staticmethod
    def backward(ctx, *dparts):
        cos, sin, places = ctx.saved_tensors
        # (B*S, sum(heads) hd)
        dgrid = torch.cat([d.transpose(1, 2) for d in dparts], 2).flatten(2).flatten(0, 1)
        dx = kernels.rope_gather_backward(dgrid, cos, sin, places, ctx.n_rot, ctx.hd)
        return dx, None, None, None, None, None, None, None


class Gather(Function):
    """grid (B*S, N) -> its rows at places (T,), (T, N); backward puts them back into zeros (no place comes
    twice, so no sum is needed)."""

    @staticmethod
    def forward(ctx, grid, places):
        ctx.save_for_backward(places)
        ctx.grid_rows = grid.shape[0]
        return grid.index_select(0, places)

    @staticmethod
    def backward(ctx, dy):
        [places] = ctx.saved_tensors
        return dy.new_zeros(ctx.grid_rows, dy.shape[1]).index_copy_(0, places, dy), None


class CausalAttention(Function):
    """softmax(q k.T / sqrt(hd), no later position) v on the grid. q (B, H, S, hd), k and v (B, K, S, hd),
    lengths: B host integers -> (B, H, S, hd), zero behind an example's end. For the CPU, whose fused
    attention works through the grid's padding too: here an example's own rows only, BLOCK queries at a time
    against the keys up to them. Where not every token has a query, q (B, H, Sq, hd) has those of some, in order,
    positions (B, Sq) says which, int64, and lengths counts them.

        P = softmax(q k.T / sqrt(hd))    o = P v        (P is made again in the backward)
        dv = P.T do    dP = do v.T    dS = P (dP - rowsum(P dP))    dq = dS k / sqrt(hd)    dk = dS.T q / sqrt(hd)

    Where q is half the forward is torch's, an example at a time (4 of 512 tokens, 14/2 heads, AMX: 16 ms, in blocks
    35). The backward is written in fp32; where q is bf16, oneDNN multiplies in bf16 and adds up in fp32, which for q, k,
    v and do is exact. So dq, dk and dv are off by .0023 each against fp64, torch's by .0025, .0090 and .0091."""
    BLOCK = 128  # queries

    @staticmethod
    def ranges(lengths, positions=None):
        """(example, first, end, keys) of each block of queries: which they are, and how many keys they see."""
        step = CausalAttention.BLOCK
        out = []
        for b, length in enumerate(lengths):
            for i in range(0, length, step):
                j = min(i + step, length)
                keys = j
                if positions is not None:
                    keys = int(positions[b, j - 1]) + 1
                out.append((b, i, j, keys))
        return out

    @staticmethod
    def pairs(lengths, positions=None):
        """How many (query, key) pairs a head computes: with all queries about half of a square grid."""
        return sum((j - i) * keys for _, i, j, keys in CausalAttention.ranges(lengths, positions))

    @staticmethod
    def blocks(q, k, v, lengths, positions):
        """Yields for each block of m queries: its index into (B, h, Sq, hd) and that of its j keys, its queries
        (K, G m, hd) for G query heads in each of K groups, the keys and values that they see, (K, j, hd), in fp32
        where q is half; and which of the last keys are later than which query, (m, j or less)."""
        high = torch.promote_types(q.dtype, torch.float32)
        for b, i, end, j in CausalAttention.ranges(lengths, positions):
            rows = (b, slice(None), slice(i, end))
            seen = (b, slice(None), slice(0, j))
            queries = q[rows].reshape(k.shape[1], -1, q.shape[3])
            if positions is None:
                later = torch.ones(end - i, end - i, dtype=torch.bool, device=q.device).triu(1)
            else:
                later = torch.arange(j, device=q.device) > positions[b, i:end, None]
            yield rows, seen, queries.to(high), k[seen].to(high), v[seen].to(high), later

    @staticmethod
    def buffer(q, k):
        """Room for the scores of one block, which all blocks use in turn: 2 MB of fresh memory for each product cost a
        page fault for every 4 KB (4 of 512 tokens, 9/3 heads: 80 instead of 52 ms)."""
        high = torch.promote_types(q.dtype, torch.float32)
        return q.new_empty(q.shape[1] * min(CausalAttention.BLOCK, q.shape[2]) * k.shape[2], dtype=high)

    @staticmethod
    def weights(q, k, later, scale, buffer):
        """q (K, G m, hd), k (K, j, hd), later as in blocks() -> P (K, G m, j), 0 where the key is later than the query.
        Lies in the buffer."""
        K, j, _ = k.shape
        p = buffer[:K * q.shape[1] * j].view(K, -1, j)
        torch.bmm(q, k.transpose(1, 2), out=p).mul_(scale)
        m, last = later.shape
        p.unflatten(1, (-1, m))[..., -last:].masked_fill_(later, float("-inf"))
        return torch.softmax(p, 2, out=p)

    @staticmethod
    def forward(ctx, q, k, v, lengths, positions=None):
        # (B, H, S, hd), the heads of a row side by side: so it is read next
        out = torch.zeros_like(q.transpose(1, 2)).transpose(1, 2)
        if q.dtype in (torch.bfloat16, torch.float16):
            for b, n in enumerate(lengths):
                rows = slice(b, b + 1), slice(None), slice(0, n)
                if positions is None:
                    out[rows] = F.scaled_dot_product_attention(q[rows], k[rows], v[rows], is_causal=True,
                                                               enable_gqa=True)
                elif n:
                    seen = slice(b, b + 1), slice(None), slice(0, int(positions[b, n - 1]) + 1)
                    out[rows] = attend_from(q[rows], k[seen], v[seen], positions[b:b + 1, :n])
        else:
            buffer = CausalAttention.buffer(q, k)
            for rows, _, qs, ks, vs, later in CausalAttention.blocks(q, k, v, lengths, positions):
                p = CausalAttention.weights(qs, ks, later, q.shape[3] ** -.5, buffer)
                out[rows] = torch.bmm(p, vs).view_as(out[rows])
        ctx.save_for_backward(q, k, v, positions)
        ctx.lengths = lengths
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, positions = ctx.saved_tensors
        scale = q.shape[3] ** -.5
        high = torch.promote_types(q.dtype, torch.float32)
        dq = torch.zeros_like(q)
        dk = torch.zeros_like(k, dtype=high)  # sums over the blocks
        dv = torch.zeros_like(v, dtype=high)
        p_buffer = CausalAttention.buffer(q, k)
        dp_buffer = CausalAttention.buffer(q, k)
        with products_in_bf16(q.dtype == torch.bfloat16):
            for rows, seen, qs, ks, vs, later in CausalAttention.blocks(q, k, v, ctx.lengths, positions):
                do = dout[rows].reshape_as(qs).to(high)
                p = CausalAttention.weights(qs, ks, later, scale, p_buffer)  # (K, G m, j)
                dp = dp_buffer[:p.numel()].view_as(p)
                torch.bmm(do, vs.transpose(1, 2), out=dp)
                # a product that is added: baddbmm_ takes a strided slice head by head, on two threads half as fast
                dv[seen] += torch.bmm(p.transpose(1, 2), do)
                ds = torch._softmax_backward_data(dp, p, 2, high, grad_input=dp)
                dk[seen] += torch.bmm(ds.transpose(1, 2), qs)
                dq[rows] = torch.bmm(ds, ks).mul_(scale).view_as(dq[rows])
        return dq, dk.mul_(scale).to(q.dtype), dv.to(q.dtype), None, None


def attend_from(q, k, v, positions):
    """torch's attention of queries (B, H, Sq, hd) that stand at positions (B, Sq), each to the keys up to its own. The
    query heads of a group stand in for more queries of its key head: torch's fused kernels with a mask know no
    groups."""
    (B, H, Sq, hd), K, S = q.shape, k.shape[1], k.shape[2]
    of_group = positions.repeat(1, H // K)  # (B, G Sq)
    seen = torch.arange(S, device=q.device) <= of_group[:, None, :, None]  # (B, 1, G Sq, S)
    return F.scaled_dot_product_attention(q.reshape(B, K, -1, hd), k, v, attn_mask=seen).reshape(B, H, Sq, hd)


@contextmanager
def products_in_bf16(wanted):
    """Products of fp32 tensors on a CPU that has bf16 in hardware: their operands are rounded to bf16, and what they
    add up to stays in fp32. torch's own bf16 product rounds its result to bf16 too."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    if wanted:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


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
        numbers = 2 ** 26 if x.is_cuda else 2 ** 23  # 256 MB of fp32 logits on a GPU, the L3 cache on a CPU
        chunk = max(64, numbers // len(w))
        for i in range(0, len(x), chunk):
            xc = x[i:i + chunk]
            t = targets[i:i + chunk, None]
            wt = weights[i:i + chunk, None].to(high)
            logits = kernels.matmul_nt(xc, w).to(high)  # (chunk, V)
            right = logits.gather(1, t)  # (chunk, 1)
            top = logits.amax(1, keepdim=True)
            p = logits.sub_(top).exp_()  # softmax, but for its denominator: one exp for the loss and the gradient
            denominator = p.sum(1, keepdim=True)
            total += ((denominator.log() + top - right) * wt).sum()
            if not (want_dx or want_dw):
                continue
            dlogits = p.mul_(wt / denominator).scatter_add_(1, t, -wt).to(x.dtype)  # w (softmax - one-hot)
            if want_dx:
                torch.mm(dlogits, w, out=dx[i:i + chunk])
            if want_dw:
                dw += weight_grad(dlogits, xc).to(dw.dtype)
        ctx.save_for_backward(dx, dw)
        return total

    @staticmethod
    def backward(ctx, dloss):
        dx, dw = ctx.saved_tensors
        if dx is not None:
            dx = dx * dloss.to(dx.dtype)
        if dw is not None:
            dw = dw * dloss
        return dx, dw, None, None
