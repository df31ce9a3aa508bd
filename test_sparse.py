"""What proves it (design, section 5): `pytest -q -m "not slow"`. Whole runs and the tools are tested in tools/test_*.py.

The central test is `masked`: the sparse model's loss and every LoRA gradient equal plain autograd through a dense model whose context
rows are multiplied by 0/1 masks, in fp64 to 1e-9, for every kind of block.
"""
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import config
import data
import kernels
import predictor
import sparse
from config import UserError
from model import LLaMA, ModelConfig, inverse_frequencies

SMALL = dict(model_type="llama", vocab_size=61, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
             num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, rope_theta=10000.0, tie_word_embeddings=False, eos_token_id=2)
KINDS = {"multi-head": dict(num_key_value_heads=6), "grouped": {}, "tied": dict(tie_word_embeddings=True),
         "biases": dict(model_type="qwen2")}
ALL = "q,k,v,o,gate,up,down"


def build(seed=0, dtype=torch.float64, targets=ALL, r=4, **kw):
    """A small random model whose weights, norms and biases are all far from their initial values; LoRA with B not zero."""
    torch.manual_seed(seed)
    m = LLaMA(ModelConfig.from_dict({**SMALL, **kw}), dtype)
    with torch.no_grad():
        for p in m.parameters():
            p.normal_(1, .3) if p.dim() == 1 else p.normal_(0, 1.5 / math.sqrt(p.shape[1]))
    if targets:
        m.add_lora(r, 2 * r, targets)
        with torch.no_grad():
            for p in m.lora_parameters().values():
                p.normal_(0, .3)
    return m


def examples(sizes=((9, 4), (5, 7), (14, 1), (2, 2)), vocab=61, seed=0):
    """[Tokenized] with (prompt, response) lengths; weights 1 on responses but for a few other values."""
    rng = random.Random(seed)
    out = []
    for p, a in sizes:
        out.append(data.Tokenized([rng.randrange(vocab) for _ in range(p + a)], [0.0] * p + [rng.choice([1.0, 1.0, .5]) for _ in range(a)]))
    return out


def batch_of(sizes=((9, 4), (5, 7), (14, 1), (2, 2)), split="output", **kw):
    return data.collate(examples(sizes, **kw), split)


# ---- the reference: a dense model with masks, in plain autograd --------------------------------------------------------------------

def masked_loss(m, batch, channels):
    """The loss of m on batch by the textbook: full matmuls, masks on the sparse rows, attention example by example. channels: a list
    of (attn, mlp) kept channels a block, each None where dense."""
    c, n, T = m.config, batch.n_sparse, len(batch.tokens)
    H, K, hd = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    P = {k.split("layers.")[1]: v for k, v in m.lora_parameters().items()}
    src = {k: (p[lo:lo + rows].T if tr else p[lo:lo + rows]) for k, (p, lo, rows, tr) in m.named_sources().items()}

    def mask(idx, size):  # (T, size): 1 on dense rows and on kept channels of sparse rows
        k = torch.ones(T, size, dtype=torch.float64)
        if idx is not None:
            k[:n] = 0
            k[:n, idx] = 1
        return k

    def lora(x, i, name):
        a, b = P.get(f"{i}.{name}.lora_A.weight"), P.get(f"{i}.{name}.lora_B.weight")
        return 0 if a is None else m.lora_alpha / m.lora_r * (x @ a.T) @ b.T

    def norm(x, w):
        return x * (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).rsqrt() * w

    freq = inverse_frequencies(c)
    ang = batch.positions[:, None].double() * freq
    cos, sin = torch.cat([ang.cos()] * 2, 1)[:, None], torch.cat([ang.sin()] * 2, 1)[:, None]

    def rotate(x):  # (T, heads, hd)
        x1, x2 = x.chunk(2, -1)
        return x * cos + torch.cat([-x2, x1], -1) * sin

    x = src["model.embed_tokens.weight"][batch.tokens]
    for i, (ca, cm) in enumerate(channels):
        at = f"model.layers.{i}."
        h = norm(x, src[at + "input_layernorm.weight"])
        qkv = []
        for t, name in enumerate("qkv"):
            w = src[at + f"self_attn.{name}_proj.weight"]
            y = (h @ w.T) * mask(None if ca is None else ca[t], len(w)) + lora(h, i, f"self_attn.{name}_proj")
            if c.qkv_bias:
                y = y + src[at + f"self_attn.{name}_proj.bias"]
            qkv.append(y.view(T, -1, hd))
        q, k, v = rotate(qkv[0]), rotate(qkv[1]), qkv[2]
        k, v = k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
        a = torch.zeros(T, H, hd, dtype=torch.float64)
        example = batch.rows // batch.shape[1]
        s = torch.einsum("thd,shd->hts", q, k) / math.sqrt(hd)
        seen = (example[:, None] == example[None]) & (batch.positions[:, None] >= batch.positions[None])
        a = torch.einsum("hts,shd->thd", s.masked_fill(~seen, -math.inf).softmax(-1), v).flatten(1)
        o_idx = None if ca is None else torch.tensor(sorted(int(h * hd + j % hd) for j in ca[2] for h in range(H) if h // (H // K) == j // hd))
        x = x + (a * mask(o_idx, H * hd)) @ src[at + "self_attn.o_proj.weight"].T + lora(a, i, "self_attn.o_proj")
        h = norm(x, src[at + "post_attention_layernorm.weight"])
        I = c.intermediate_size
        g = h @ src[at + "mlp.gate_proj.weight"].T + lora(h, i, "mlp.gate_proj")
        u = h @ src[at + "mlp.up_proj.weight"].T + lora(h, i, "mlp.up_proj")
        act = g * torch.sigmoid(g) * u * mask(cm, I)
        x = x + act @ src[at + "mlp.down_proj.weight"].T + lora(act, i, "mlp.down_proj")
    x = norm(x, src["model.norm.weight"])[batch.loss]
    logits = x @ (src.get("lm_head.weight", src["model.embed_tokens.weight"])).T
    return (F.cross_entropy(logits, batch.targets, reduction="none") * batch.weights).sum()


def grads(loss, m):
    params = m.lora_parameters()
    return dict(zip(params, torch.autograd.grad(loss, params.values(), allow_unused=True)))


def assert_same(m, batch, tol=1e-9):
    """The sparse forward and backward against masked_loss with the channels that it kept."""
    loss = m.loss(batch)
    mine = grads(loss, m)
    ref = masked_loss(m, batch, [(b.attn.channels, b.mlp.channels) for b in m.blocks])
    theirs = grads(ref, m)
    assert abs(loss.item() - ref.item()) <= tol * abs(ref.item())
    for name, g in theirs.items():
        g = torch.zeros(1) if g is None else g
        have = torch.zeros(1) if mine[name] is None else mine[name]
        assert (have - g).abs().max() <= tol * max(1.0, g.abs().max()), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["svd", "oracle", "random", "measured"])
def test_sparse_equals_masked_dense(kind, how):
    m, batch = build(**KINDS[kind]), batch_of()
    predictor.attach(m, .6, .5, rank=4, kind=how)
    if how == "measured":
        m.set_sparsity(0)
        m.train()
        m.loss(batch)
        m.set_sparsity(1)
    assert_same(m, batch)
    assert m.blocks[0].mlp.channels.numel() == 32 and m.blocks[0].attn.channels[1].numel() == (48 if kind == "multi-head" else 16)
    assert m.blocks[-1].mlp.channels is None  # the last block is dense


@pytest.mark.parametrize("split", ["output", "none", "random", "rectangle"])
def test_every_split_equals_masked_dense(split):
    m = build()
    predictor.attach(m, [.7, .3, .7], [.5, 0, 0], kind="oracle")
    assert_same(m, batch_of(split=split))


@pytest.mark.parametrize("targets", ["q,k,v,o", "q,v", "o", "gate,up,down", "down", "k,up"])
def test_lora_on_any_projection(targets):
    m = build(targets=targets)
    predictor.attach(m, .5, .5, kind="svd")
    assert_same(m, batch_of())


def test_qwen3_dense_gradients_and_sparse_mlp():
    m = build(model_type="qwen3")
    with pytest.raises(UserError, match="q/k norms"):
        predictor.attach(m, 0, .5)
    predictor.attach(m, .5, 0, kind="oracle")
    assert m.loss(batch_of()).isfinite()
