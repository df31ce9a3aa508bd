"""The FLOPs of one training step, counted from shapes: model.flops(batch).

All that is computed, forward and backward, and nothing that is not: LoRA, the predictor, attention, the loss.
A multiplication and an addition are two. Attention counts as the blocks that are computed on a CPU, and on a
GPU, where it is fused, as the whole (B, S, S), as torch counts it; a block's recomputation is not counted. Equal to
torch.utils.flop_counter's number (tests/test_bench.py), with backward_sparsity a little more.

A product of n rows with (a, b) takes 2 n a b forward and as much again for its input's gradient, where that
is needed, and for its weight's, where that is trained. With LoRA the input of the first block that has it needs none,
and the blocks below have no backward.
"""
from lib import dense
from sparse import loud_counts


def flops_by_part(model, batch, sparse_on=True):
    """{"0.attn": FLOPs, "0.mlp": ..., "head": ...} of one training step of this batch (data.Batch), at the
    present set_sparsity or, sparse_on False, dense. Letters: model.py."""
    D, V = model.config.hidden_size, model.config.vocab_size
    T_loss = batch.loss.stop - batch.loss.start
    full = not model.lora_r and model.embed.requires_grad  # all weights are trained
    need = full  # does this block's input need a gradient?
    out = {}
    for i, b in enumerate(model.blocks):
        n, t = batch.n_sparse, len(batch.tokens)  # sparse rows, and all
        if i == len(model.blocks) - 1:
            n, t = 0, T_loss
        targets = ()  # that have LoRA
        if i >= model.lora_from:
            targets = model.lora_targets
        attn, mlp = (working(part, batch, sparse_on, n) for part in (b.attn, b.mlp))
        out[f"{i}.attn"], need = of_attention(model, batch, targets, *attn, n, t, need, full)
        out[f"{i}.mlp"], need = of_mlp(model, targets, *mlp, n, t, need, full)
    out["head"] = 2 * T_loss * D * V * (2 + full)
    return out


def at_work(part, sparse_on, n):
    """The predictor of a part that has sparse rows in this step; None where it runs dense."""
    p = part.predictor
    if sparse_on and n and p is not None and p.c:
        return p
    return None


def working(part, batch, sparse_on, n):
    """at_work(), and how many sparse rows of each text have a backward through this part, None where all have."""
    loud = None
    if sparse_on and n and part.skips_backward:
        loud = loud_counts(batch, part.backward_sparsity)
    return at_work(part, sparse_on, n), loud


def of_mlp(model, targets, predictor, loud, n, t, need, full):
    """-> (FLOPs of one block's MLP, whether its output needs a gradient): n sparse rows of t. need: whether its input
    needs one. targets: what has LoRA in this block. loud: None, or how many sparse rows of each text have a backward,
    which makes their forward again."""
    D, I, R = model.config.hidden_size, model.config.intermediate_size, model.lora_r
    backward = need or full or any(x in targets for x in ("gate", "up", "down"))
    rows, back = t, t  # in the forward and in the backward
    if loud is not None and backward:
        rows, back = t + sum(loud), t - n + sum(loud)
    forward, work = rows * I, back * I  # times channels
    f = 0
    if predictor is not None:
        forward = work = n * predictor.c + (t - n) * I
        f += predictor.flops(n)
        f += mapped(predictor, n, D, need)
    f += 2 * D * (3 * forward + (backward + 2 * need + 3 * full) * work)  # 3 products; dh 1, dx 2, weights 3
    for target in ("gate", "up"):
        if target in targets:
            f += 2 * R * (rows * D + (1 + need) * back * D + forward + 2 * work)
    if "down" in targets:
        f += 2 * R * (rows * D + 2 * back * D + forward + 2 * work)
    return f, backward


def mapped(predictor, n, D, need):
    """FLOPs of a part's map on n sparse rows: (x U) V, and (dy V.T) U.T where the input needs a gradient."""
    return 2 * n * predictor.rank_of_map() * 2 * D * (1 + need)


def of_attention(model, batch, targets, predictor, loud, n, t, need, full):
    """-> (FLOPs of one block's attention, whether its output needs a gradient). targets, loud: as of_mlp has them.
    predictor: None where it runs dense. n sparse rows, t rows for queries and outputs; keys and values always have all
    T."""
    c, T = model.config, len(batch.tokens)
    D, R, G = c.hidden_size, model.lora_r, c.num_attention_heads // c.num_key_value_heads
    Nq, Nkv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim

    def lora(target, rows, n_in, n_out, need):  # x A.T and z B.T; dz, dB, dA and, where it is wanted, dx
        if target not in targets:
            return 0
        return 2 * R * rows * ((2 + need) * n_in + 3 * n_out)

    lengths, positions, f = batch.lengths, None, 0  # of queries
    inside = need or full or any(x in targets for x in "qkv")
    if not (inside or "o" in targets):  # nothing here has a backward
        loud = None
    no_queries = predictor is not None and predictor.no_queries
    if no_queries or loud is not None:
        t, lengths, positions = T - n, batch.dense_lengths, batch.dense_positions
    pairs = pairs_of(model, batch, lengths, positions)
    if no_queries:
        f += mapped(predictor, n, D, need)
    if loud is not None:  # in both passes, beside the forward of all sparse rows
        t += sum(loud)
        pairs += loud_pairs(model, batch, loud)
    qkv = t * Nq + T * 2 * Nkv  # rows times channels
    o = t * Nq
    if predictor is not None and not no_queries:
        qkv = n * predictor.c * (G + 2) + (T - n) * (Nq + 2 * Nkv)
        o = n * predictor.c * G + (T - n) * Nq
        f += predictor.flops(n)
    f += 2 * D * qkv * (1 + need + full)
    f += lora("q", t, D, Nq, need) + lora("k", T, D, Nkv, need) + lora("v", T, D, Nkv, need)
    f += 2 * pairs * Nq * (2 + 5 * inside)  # 2 products forward, 5 backward
    f += 2 * D * o * (1 + inside + full) + lora("o", t, Nq, D, inside)
    if loud is not None:
        f += 2 * n * 2 * D * Nq
        f += 2 * R * n * (D + Nq) * sum(x in targets for x in "qo")
        f += 2 * pairs_of(model, batch, batch.lengths) * Nq * 2
    return f, inside or "o" in targets


def loud_pairs(model, batch, loud):
    """Pairs of the loud rows' queries and keys: at most, for which rows are loud is known in the backward."""
    B, S = batch.shape
    if model.device.type == "cpu":
        return sum(c * length for c, length in zip(loud, batch.lengths))
    return B * max(loud) * S


def pairs_of(model, batch, lengths, positions=None):
    """Pairs of queries and keys, those at `positions` or all: on a GPU the whole square, as tools.bench counts others'
    code too (no lengths)."""
    if lengths is not None and model.device.type == "cpu":
        return dense.CausalAttention.pairs(lengths, positions)
    B, S = batch.shape
    queries = S if positions is None else positions.shape[1]
    return B * queries * S
