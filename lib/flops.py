"""The FLOPs of one training step, counted from shapes: model.flops(batch).

All that is computed, forward and backward, and nothing that is not: LoRA, the predictor, attention, the loss.
A multiplication and an addition are two. Attention counts as the blocks that are computed on a CPU, and on a
GPU, where it is fused, as the whole (B, S, S), as torch counts it; a recomputation is not counted. Equal to
torch.utils.flop_counter's number (tests/test_bench.py).

A product of n rows with (a, b) takes 2 n a b forward and as much again for its input's gradient, where that
is needed, and for its weight's, where that is trained. The first block's input needs none with LoRA.
"""
from lib import dense


def flops_by_part(model, batch, sparse_on=True):
    """{"0.attn": FLOPs, "0.mlp": ..., "head": ...} of one training step of this batch (data.Batch), at the
    present set_sparsity or, sparse_on False, dense. Letters: model.py."""
    c, out = model.config, {}
    D, inner = c.hidden_size, c.intermediate_size
    full = not model.lora_r and model.embed.requires_grad  # all weights are trained
    T_loss = batch.loss.stop - batch.loss.start
    need = full  # does this block's input need a gradient?
    for i, b in enumerate(model.blocks):
        last = i == len(model.blocks) - 1
        n, t = (0, T_loss) if last else (batch.n_sparse, len(batch.tokens))
        # None: runs dense
        pa, pm = (p.predictor if sparse_on and p.predictor is not None and p.predictor.c and n else None
                  for p in (b.attn, b.mlp))
        out[f"{i}.attn"], need = attention(model, batch, pa, n, t, need, full)
        rows = n * pm.c + (t - n) * inner if pm else t * inner  # rows x channels
        # forward 3 products, dh 1, dx 2, weights 3
        f = 2 * D * rows * (4 + 2 * need + 3 * full)
        if pm:
            f += pm.flops(n)
            if pm.map_rank_now():  # (x U) V, and (dy V.T) U.T
                f += 2 * n * pm.map_rank_now() * 2 * D * (1 + need)
        for x in ("gate", "up", "down"):
            if x in model.lora_targets:
                f += 2 * model.lora_r * ((2 + need if x != "down" else 3) * t * D + 3 * rows)
        out[f"{i}.mlp"], need = f, True
    out["head"] = 2 * T_loss * D * c.vocab_size * (2 + full)
    return out


def attention(model, batch, predictor, n, t, need, full):
    """-> (FLOPs of one block's attention, whether its output needs a gradient). predictor: None where it runs
    dense. n sparse rows, t rows for queries and outputs; keys and values always have all T."""
    c, T, (B, S) = model.config, len(batch.tokens), batch.shape
    D, R, G = c.hidden_size, model.lora_r, c.num_attention_heads // c.num_key_value_heads
    Nq, Nkv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim

    def lora(target, rows, n_in, n_out, need):  # x A.T and z B.T; dz, dB, dA and, where it is wanted, dx
        return 2 * R * rows * ((2 + need) * n_in + 3 * n_out) if target in model.lora_targets else 0

    # rows x channels of qkv, then of o
    qkv = n * predictor.c * (G + 2) + (T - n) * (Nq + 2 * Nkv) if predictor else t * Nq + T * 2 * Nkv
    o = n * predictor.c * G + (T - n) * Nq if predictor else t * Nq
    f = 2 * D * qkv * (1 + need + full) + (predictor.flops(n) if predictor else 0)
    f += lora("q", t, D, Nq, need) + lora("k", T, D, Nkv, need) + lora("v", T, D, Nkv, need)
    inside = need or full or any(x in model.lora_targets for x in "qkv")
    # tools.bench counts a whole attention for others' code by giving no lengths
    blocks = batch.lengths is not None and model.device.type == "cpu"
    pairs = dense.CausalAttention.pairs(batch.lengths) if blocks else B * S * S  # of queries and keys
    f += 2 * pairs * Nq * (2 + 5 * inside)  # 2 products forward, 5 backward
    f += 2 * D * o * (1 + inside + full) + lora("o", t, Nq, D, inside)
    return f, inside or "o" in model.lora_targets
