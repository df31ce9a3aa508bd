"""What proves it: `pytest -q -m "not slow"`. Whole runs and the tools are
tested in tests/test_*.py.

The central test is `masked`: the sparse model's loss and every LoRA gradient equal plain autograd through a
dense model whose context rows are multiplied by 0/1 masks, in fp64 to 1e-9, for every kind of block.
"""
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch.utils._pytree import tree_flatten, tree_unflatten

import data
import kernels
import predictor
import sparse
from config import UserError
from lib import dense as dense_ops
from lib import factors
from lib.factors import factorize
from lib.generate import at_once
from model import Chosen, LLaMA, ModelConfig, inverse_frequencies

SMALL = dict(model_type="llama", vocab_size=61, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
             num_attention_heads=6, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, rope_theta=10000.0,
             tie_word_embeddings=False, eos_token_id=2)
KINDS = {"multi-head": dict(num_key_value_heads=6), "grouped": {}, "tied": dict(tie_word_embeddings=True),
         "biases": dict(model_type="qwen2")}
ALL = "q,k,v,o,gate,up,down"


def build(seed=0, dtype=torch.float64, targets=ALL, r=4, lora_from=0, **kw):
    """A small random model whose weights, norms and biases are all far from their initial values; LoRA with
    B not zero."""
    torch.manual_seed(seed)
    m = LLaMA(ModelConfig.from_dict({**SMALL, **kw}), dtype)
    with torch.no_grad():
        for p in m.parameters():
            p.normal_(1, .3) if p.dim() == 1 else p.normal_(0, 1.5 / math.sqrt(p.shape[1]))
    if targets:
        m.add_lora(r, 2 * r, targets, first=lora_from)
        with torch.no_grad():
            for p in m.lora_parameters().values():
                p.normal_(0, .3)
    return m


def examples(sizes=((9, 4), (5, 7), (14, 1), (2, 2)), vocab=61, seed=0):
    """[Tokenized] with (prompt, response) lengths; weights 1 on responses but for a few other values."""
    rng = random.Random(seed)
    out = []
    for p, a in sizes:
        out.append(data.Tokenized([rng.randrange(vocab) for _ in range(p + a)],
                                  [0.0] * p + [rng.choice([1.0, 1.0, .5]) for _ in range(a)]))
    return out


def batch_of(sizes=((9, 4), (5, 7), (14, 1), (2, 2)), split="output", dense_first=0, **kw):
    return data.collate(examples(sizes, **kw), split, dense_first=dense_first)


# ---- the reference: a dense model with masks, in plain autograd --------------------------------------------

def masked_loss(m, batch, channels):
    """The loss of m on batch by the textbook: full matmuls, masks on the sparse rows, attention example by
    example; the map of the dropped MLP channels where there is one. channels: a list of (attn, mlp) kept channels a
    block, each None where dense."""
    masked = Masked(m, batch)
    x = masked.weights["model.embed_tokens.weight"][batch.tokens]  # (T, D)
    for i, (attn, mlp) in enumerate(channels):
        y = masked.attention(i, masked.norm(x, f"model.layers.{i}.input_layernorm"), attn)
        x = x + masked.loud_only(y, m.blocks[i].attn)
        y = masked.mlp(i, masked.norm(x, f"model.layers.{i}.post_attention_layernorm"), mlp)
        x = x + masked.loud_only(y, m.blocks[i].mlp)
    x = masked.norm(x, "model.norm")[batch.loss]
    head = masked.weights.get("lm_head.weight", masked.weights["model.embed_tokens.weight"])
    return (F.cross_entropy(x @ head.T, batch.targets, reduction="none") * batch.weights).sum()


class Masked:
    """What masked_loss is made of."""

    def __init__(self, m, batch):
        self.m, self.c, self.batch = m, m.config, batch
        self.weights = {}  # by Hugging Face's names, (out, in)
        for name, (p, lo, rows, transposed) in m.named_sources().items():
            w = kernels.unpacked(p[lo:lo + rows]).clone()
            if transposed:
                w = w.T
            self.weights[name] = w
        self.lora = {k.split("base_model.model.")[-1]: v for k, v in m.lora_parameters().items()}
        angle = batch.positions[:, None].double() * inverse_frequencies(self.c)
        self.cos = torch.cat([angle.cos()] * 2, 1)[:, None]  # (T, 1, hd)
        self.sin = torch.cat([angle.sin()] * 2, 1)[:, None]

    def mask(self, idx, size):
        """(T, size): 1 on dense rows and on kept channels of sparse rows. idx None: all are kept."""
        k = torch.ones(len(self.batch.tokens), size, dtype=torch.float64)
        if idx is not None:
            k[:self.batch.n_sparse] = 0
            k[:self.batch.n_sparse, idx] = 1
        return k

    def loud_only(self, y, part):
        """y, what a part adds, whose sparse rows have no gradient but for those that were loud."""
        if not part.skips_backward or not part.loud:  # or nothing below needs a gradient
            return y
        rows, _ = part.loud
        quiet = torch.ones(self.batch.n_sparse, dtype=torch.bool)
        quiet[rows] = False
        y = y.clone()
        y[:len(quiet)][quiet] = y[:len(quiet)][quiet].detach()
        return y

    def low_rank(self, x, name):
        if name + ".lora_A.weight" not in self.lora:
            return 0
        A, B = self.lora[name + ".lora_A.weight"], self.lora[name + ".lora_B.weight"]
        return self.m.lora_alpha / self.m.lora_r * (x @ A.T) @ B.T

    def norm(self, x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + self.c.rms_norm_eps).rsqrt() * self.weights[name + ".weight"]

    def rotate(self, x):  # (T, heads, hd)
        x1, x2 = x.chunk(2, -1)
        return x * self.cos + torch.cat([-x2, x1], -1) * self.sin

    def attention(self, i, x, kept):
        """x (T, D), kept: channels of q, k and v, None, or (), where sparse rows have no queries -> (T, D)"""
        if kept == ():
            U, V, b = self.m.blocks[i].attn.predictor.map
            n = self.batch.n_sparse
            whole = self.attention(i, x, None)
            instead = x[:n] @ (U @ V) + b
            return torch.cat([instead, whole[n:]])
        H, K, hd = self.c.num_attention_heads, self.c.num_key_value_heads, self.c.head_dim
        at = f"model.layers.{i}.self_attn."
        qkv = []
        for t, letter in enumerate("qkv"):
            name = at + letter + "_proj"
            w = self.weights[name + ".weight"]
            y = (x @ w.T) * self.mask(kept and kept[t], len(w)) + self.low_rank(x, name)
            if self.c.qkv_bias:
                y = y + self.weights[name + ".bias"]
            qkv.append(y.view(len(x), -1, hd))
        q, k, v = self.rotate(qkv[0]), self.rotate(qkv[1]), qkv[2]
        k, v = k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)

        example, position = self.batch.places // self.batch.shape[1], self.batch.positions
        seen = (example[:, None] == example[None]) & (position[:, None] >= position[None])
        s = torch.einsum("thd,shd->hts", q, k) / math.sqrt(hd)
        a = torch.einsum("hts,shd->thd", s.masked_fill(~seen, -math.inf).softmax(-1), v).flatten(1)

        rows = None  # of o: a kept value channel of every query head that reads it
        if kept is not None:
            rows = [h * hd + int(j) % hd for j in kept[2] for h in range(H) if h // (H // K) == j // hd]
        o = self.weights[at + "o_proj.weight"]
        return (a * self.mask(rows, H * hd)) @ o.T + self.low_rank(a, at + "o_proj")

    def mlp(self, i, x, kept):
        """x (T, D), kept: channels, or None -> (T, D)"""
        at = f"model.layers.{i}.mlp."
        g = x @ self.weights[at + "gate_proj.weight"].T + self.low_rank(x, at + "gate_proj")
        u = x @ self.weights[at + "up_proj.weight"].T + self.low_rank(x, at + "up_proj")
        h = g * torch.sigmoid(g) * u * self.mask(kept, self.c.intermediate_size)
        y = h @ self.weights[at + "down_proj.weight"].T + self.low_rank(h, at + "down_proj")
        if kept is not None and self.m.blocks[i].mlp.predictor.map is not None:
            U, V, b = self.m.blocks[i].mlp.predictor.map
            n = self.batch.n_sparse
            y = y + torch.cat([x[:n] @ (U @ V) + b, x.new_zeros(len(x) - n, len(b))])
        return y


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
@pytest.mark.parametrize("how", ["svd", "oracle", "random", "measured", "energy"])
def test_sparse_equals_masked_dense(kind, how):
    m, batch = build(**KINDS[kind]), batch_of()
    predictor.attach(m, .6, .5, rank=4, kind=how, map_rank=5)
    if how in ("measured", "energy"):
        predictor.measure(m, [batch])
    assert_same(m, batch)
    assert (m.blocks[0].mlp.channels.numel() == 32
            and m.blocks[0].attn.channels[1].numel() == (48 if kind == "multi-head" else 16))
    assert m.blocks[-1].mlp.channels is None  # the last block is dense


@pytest.mark.parametrize("targets", [ALL, "q,k,v,o", "down", ""])
@pytest.mark.parametrize("kind", KINDS)
def test_map_equals_masked_dense(kind, targets):
    """Loss and gradients with a map and its bias, with LoRA in the MLP and without; by the model's input too."""
    m, batch = build(targets=targets, **KINDS[kind]), batch_of(dense_first=2)
    predictor.attach(m, .6, 0, kind="measured", map_rank=5)
    predictor.measure(m, [batch, batch_of(seed=1, dense_first=2)])
    U, V, b = m.blocks[0].mlp.predictor.map
    assert U.shape == (48, 5) and V.shape == (5, 48) and b.shape == (48,) and b.abs().min() > 0
    if targets:
        return assert_same(m, batch)
    m.embed.requires_grad_()
    own, ref = m.loss(batch), masked_loss(m, batch, [(None, block.mlp.channels) for block in m.blocks])
    mine, theirs = (torch.autograd.grad(loss, m.embed)[0] for loss in (own, ref))
    assert abs(own - ref) < 1e-9 * ref and (mine - theirs).abs().max() < 1e-9 * theirs.abs().max()


@pytest.mark.parametrize("targets", [ALL, "q,k,v,o", "k", "down"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_queries_equals_masked_dense(kind, targets):
    """attn_sparsity = 1: context rows make keys and values, and a map stands in for what they would have read."""
    m, batch = build(targets=targets, **KINDS[kind]), batch_of(dense_first=2)
    predictor.attach(m, [.6, 0, 0], [1, 1, 0], kind="measured", map_rank=5)
    predictor.measure(m, [batch, batch_of(seed=1, dense_first=2)])
    U, V, b = m.blocks[1].attn.predictor.map
    assert U.shape == (48, 5) and V.shape == (5, 48) and b.abs().min() > 0
    assert_same(m, batch)


def watch_loud(m):
    for part in m.parts():
        part.loud = ()


@pytest.mark.parametrize("split", ["output", "none", "random", "rectangle"])
@pytest.mark.parametrize("kind, targets", [*((kind, ALL) for kind in KINDS), ("biases", "q,k,v,o"), ("grouped", "k"),
                                           ("grouped", "down")])
def test_backward_sparsity_equals_masked_dense(kind, targets, split):
    """The loss is the dense model's; the gradient that of a model whose quiet rows are constants."""
    m = build(targets=targets, **KINDS[kind])
    sizes = [(9, 4), (15, 7), (24, 1), (70, 140)]
    if split != "rectangle":  # which would leave no sparse row
        sizes += [(2, 2), (0, 3)]
    batch = batch_of(sizes, split=split, dense_first=2)
    of_dense = grads(m.loss(batch), m)
    predictor.attach(m, 0, 0, backward_sparsity=[.6, .9, .5])
    watch_loud(m)
    assert_same(m, batch)
    dense_loss = masked_loss(m, batch, [(None, None)] * 3)
    assert abs(m.loss(batch) - dense_loss) < 1e-12 * dense_loss
    of_sparse = grads(m.loss(batch), m)
    assert any((of_sparse[k] - g).abs().max() > 1e-3 for k, g in of_dense.items() if g is not None)
    m.set_sparsity(0)
    again = grads(m.loss(batch), m)
    assert all(torch.equal(again[k], g) for k, g in of_dense.items() if g is not None)


def test_the_loudest_rows():
    """Of each text those with the largest gradient, rounded up; no dense row is among them."""
    batch = batch_of(((9, 4), (5, 7), (14, 1), (2, 2)), dense_first=2)
    B, S = batch.shape
    dy = torch.randn(batch.n_sparse, 3)
    rows = sparse.loudest_rows(dy, batch, .6)
    assert sparse.loud_counts(batch, .6) == [3, 1, 5, 0]  # of 6, 2, 11 and 0
    text = batch.places[:batch.n_sparse] // S
    for b, c in enumerate(sparse.loud_counts(batch, .6)):
        size = dy.norm(dim=1).masked_fill(text != b, -1)
        mine = rows[text[rows] == b]
        assert set(mine.tolist()) == set(size.topk(c).indices.tolist())
        assert (batch.positions[mine].diff() > 0).all()


def test_loud_rows_do_not_depend_on_the_batch():
    """So accumulation and ranks change nothing."""
    m, ex = build(), examples(((19, 4), (25, 7), (14, 1), (2, 2)))
    predictor.attach(m, 0, 0, backward_sparsity=.7)
    whole = grads(m.loss(data.collate(ex)), m)
    parts = [grads(m.loss(data.collate(some)), m) for some in (ex[:1], ex[1:])]
    for k, g in whole.items():
        assert (g - parts[0][k] - parts[1][k]).abs().max() < 1e-9 * max(1, g.abs().max()), k


@pytest.mark.parametrize("kw, dtype, tol", [(dict(model_type="qwen3"), torch.float64, 1e-9), ({}, torch.bfloat16, .02),
                                            (dict(lora_from=1), torch.float64, 1e-9)])
def test_where_all_rows_are_loud_the_gradient_is_the_dense_one(kw, dtype, tol):
    m, batch = build(dtype=dtype, **kw), batch_of(((9, 4), (15, 7), (24, 1), (2, 2)), dense_first=2)
    dense = grads(m.loss(batch), m)
    predictor.attach(m, 0, 0, backward_sparsity=1e-9)
    for name, g in grads(m.loss(batch), m).items():
        assert (g - dense[name]).norm() <= tol * dense[name].norm(), name


def test_rows_of_some_parts_and_channels_of_others():
    """A part that drops channels has the backward of its forward."""
    m, batch = build(), batch_of(((9, 4), (15, 7), (24, 1)), dense_first=2)
    predictor.attach(m, [0, .6, 0], [1, 0, 0], kind="measured", map_rank=5, backward_sparsity=.8)
    predictor.measure(m, [batch])
    assert [p.backward_sparsity for p in m.parts()] == [0, .8, .8, 0, 0, 0]
    watch_loud(m)
    assert_same(m, batch)


@pytest.mark.parametrize("split", ["output", "none", "random", "rectangle"])
@pytest.mark.parametrize("dense_first", [0, 3])
def test_no_queries_in_every_split(split, dense_first):
    """Texts without a dense row among them: none has one in split none with dense_first 0."""
    m, batch = build(), batch_of(((9, 4), (6, 3), (70, 140)), split=split, dense_first=dense_first)
    predictor.attach(m, 0, [1, 1, 0], kind="measured", map_rank=5)
    predictor.measure(m, [batch])
    assert_same(m, batch)


@pytest.mark.parametrize("split", ["output", "none", "random", "rectangle"])
@pytest.mark.parametrize("dense_first", [0, 3])
def test_every_split_equals_masked_dense(split, dense_first):
    m = build()
    predictor.attach(m, [.7, .3, .7], [.5, 0, 0], kind="oracle")
    batch = batch_of(split=split, dense_first=dense_first)
    assert (batch.positions[:batch.n_sparse] >= dense_first).all()
    assert_same(m, batch)


@pytest.mark.parametrize("targets", ["q,k,v,o", "q,v", "o", "gate,up,down", "down", "k,up"])
def test_lora_on_any_projection(targets):
    m = build(targets=targets)
    predictor.attach(m, .5, .5, kind="svd")
    assert_same(m, batch_of())


@pytest.mark.parametrize("how", ["dense", "svd", "measured"])
@pytest.mark.parametrize("targets", [ALL, "q,k,v,o", "down"])
@pytest.mark.parametrize("first", [1, 2])
def test_lora_in_the_upper_blocks(how, targets, first):
    """The same loss and gradients as everywhere, and no graph below the first block that has LoRA, sparse or not."""
    m, batch = build(targets=targets, lora_from=first), batch_of()
    if how != "dense":
        predictor.attach(m, .6, .5, kind=how, map_rank=5)
    if how == "measured":
        predictor.measure(m, [batch])
    assert_same(m, batch)
    assert all(f"layers.{i}." not in name for name in m.lora_parameters() for i in range(first))
    graph = []
    hooks = [b.register_forward_hook(lambda _, args, out: graph.append(out.requires_grad)) for b in m.blocks]
    m.loss(batch)
    [h.remove() for h in hooks]
    assert graph == [i >= first for i in range(len(m.blocks))]


def test_a_block_without_lora_is_measured_too():
    """And what a block scores does not depend on LoRA below it: with B = 0 the models are equal."""
    scores = []
    for first in (0, 2):
        m = build(targets="")
        m.add_lora(4, 8, ALL, first=first)
        predictor.attach(m, [0, .6, .6], [0, 0, .5], kind="measured")
        m.set_sparsity(0)
        loss = m.loss(batch_of(), measure=True)
        loss.backward()
        scores.append([p.score_sums for _, p in predictor.predictors(m)])
        assert len(scores[-1]) == 1  # the last block stays dense
    assert all(torch.equal(a, b) and a.sum() > 0 for a, b in zip(*scores))


def test_lora_from_a_block_that_is_there():
    with pytest.raises(UserError, match="lora_from = 3, but the model has blocks 0 to 2"):
        build(lora_from=3)


def test_qwen3_dense_gradients_and_sparse_mlp():
    m = build(model_type="qwen3")
    with pytest.raises(UserError, match="q/k norms"):
        predictor.attach(m, 0, .5)
    predictor.attach(m, .5, 0, kind="oracle")
    assert m.loss(batch_of()).isfinite()
    predictor.attach(m, 0, 1, kind="measured", map_rank=4)  # without queries there are none to rescale
    predictor.measure(m, [batch_of()])
    assert all(g.isfinite().all() for g in grads(m.loss(batch_of()), m).values() if g is not None)


# ---- one code path: dense, micro-batches, recompute --------------------------------------------------------

def test_ratio_zero_and_scale_zero_are_bitwise_dense():
    m, batch = build(dtype=torch.float32), batch_of()
    dense = m.loss(batch)
    g = grads(dense, m)
    predictor.attach(m, .6, .5, kind="svd")
    assert m.loss(batch) != dense
    m.set_sparsity(0)
    again = m.loss(batch)
    assert torch.equal(again, dense) and all(torch.equal(a, g[k]) for k, a in grads(again, m).items())
    predictor.attach(m, 0.0, [0.0] * 3, kind="svd")
    assert torch.equal(m.loss(batch), dense)


@pytest.mark.parametrize("kind", ["dense", "measured"])
def test_micro_batches_equal_the_big_batch(kind):
    """The loss is a sum, so gradients of parts add up to the whole's; with fixed channels in the
    sparse phase too."""
    m, ex = build(), examples()
    predictor.attach(m, .6, .5, kind="measured")
    predictor.measure(m, [data.collate(ex)])
    m.set_sparsity(0 if kind == "dense" else 1)
    whole = grads(m.loss(data.collate(ex)), m)
    parts = [grads(m.loss(data.collate(ex[i:i + 2])), m) for i in (0, 2)]
    for k, g in whole.items():
        assert torch.allclose(g, parts[0][k] + parts[1][k], rtol=1e-9, atol=1e-9), k


@pytest.mark.parametrize("kind", ["measured", "energy"])
def test_what_is_measured_does_not_depend_on_micro_batches_or_recomputation(kind):
    """Scores of parts add up to the whole's, and a recomputed block counts once."""
    def sums(batches, recompute=False):
        m = build()
        predictor.attach(m, .6, .5, kind=kind)
        m.recompute = recompute
        predictor.measure_more(m, batches)
        return {k: t.clone() for k, t in predictor.state(m).items()}

    ex = examples()
    whole = sums([data.collate(ex)])
    assert any(t.abs().max() > 0 for t in whole.values())
    for other in (sums([data.collate(ex[:2]), data.collate(ex[2:])]), sums([data.collate(ex)], recompute=True)):
        for k, t in whole.items():
            assert torch.allclose(t, other[k], rtol=1e-9, atol=1e-9 * t.abs().max()), k


@pytest.mark.parametrize("kind, attn", [*((kind, .5) for kind in predictor.KINDS), ("measured", 1), ("backward", 0)])
def test_recompute_changes_nothing(kind, attn):
    """Block inputs are kept, the rest is computed again, with the same channels (`random` would draw
    others)."""
    def run(recompute):
        m, batch = build(), batch_of()
        if kind == "backward":
            predictor.attach(m, [.6, 0, 0], 0, kind="random", seed=3, backward_sparsity=[0, .8, 0])
        else:
            predictor.attach(m, .6, attn, kind=kind, seed=3)
        m.recompute = recompute
        if kind in ("measured", "energy"):
            predictor.measure(m, [batch])
        return grads(m.loss(batch), m), predictor.state(m)
    (a, sa), (b, sb) = run(False), run(True)
    assert all(torch.equal(a[k], b[k]) for k in a) and all(torch.equal(sa[k], sb[k]) for k in sa)


def test_a_recomputation_gets_the_very_choice():
    """FSDP of torch 2.9 to 2.11 takes a block's arguments apart and puts them together again."""
    chosen = Chosen()
    leaves, structure = tree_flatten((chosen,))
    assert tree_unflatten(leaves, structure)[0] is chosen


def test_a_token_alone_sees_no_other_example():
    m = build(dtype=torch.float64)
    ex = examples()
    alone = sum(m.loss(data.collate([e])) for e in ex)
    assert abs(alone - m.loss(data.collate(ex))) < 1e-9 * alone


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-11), (torch.bfloat16, .05)])
@pytest.mark.parametrize("heads", [(6, 2), (3, 3)])
def test_attention_in_blocks_equals_torch(heads, dtype, tol):
    """Lengths around the block of 128 queries; nothing is read or written behind an example's end."""
    torch.manual_seed(0)
    (H, K), lengths, S = heads, [150, 128, 1, 129], 150
    real = torch.arange(S) < torch.tensor(lengths)[:, None]  # (B, S)
    shapes = [(len(lengths), h, S, 8) for h in (H, K, K)]
    exact = [(torch.randn(s, dtype=torch.float64).to(dtype).double() * real[:, None, :, None])
             .requires_grad_() for s in shapes]
    qkv = [t.detach().to(dtype).requires_grad_() for t in exact]
    mine = dense_ops.CausalAttention.apply(*qkv, lengths)
    ref = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True) * real[:, None, :, None]
    dy = torch.randn_like(ref).to(dtype).double() * real[:, None, :, None]
    grads = [torch.autograd.grad(y, x, d) for y, x, d in ((mine, qkv, dy.to(dtype)), (ref, exact, dy))]
    for a, b in zip([mine, *grads[0]], [ref, *grads[1]]):
        assert a.dtype == dtype and (a - b).abs().max() < tol * b.abs().max()


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-11), (torch.bfloat16, .05)])
@pytest.mark.parametrize("heads", [(6, 2), (3, 3)])
def test_attention_of_some_queries_equals_torch(heads, dtype, tol):
    """Scattered queries, more than a block of them in one text and none in another, against rows of the whole."""
    torch.manual_seed(0)
    (H, K), lengths, S, hd = heads, [300, 7, 5, 290], 300, 8
    some = [sorted(random.Random(b).sample(range(n), count)) for b, (n, count) in enumerate(zip(lengths, (150, 7, 0, 1)))]
    positions = torch.zeros(4, 150, dtype=torch.long)
    for b, where in enumerate(some):
        positions[b, :len(where)] = torch.tensor(where, dtype=torch.long)
    exact = [torch.randn(4, h, S, hd, dtype=torch.float64).to(dtype).double().requires_grad_() for h in (H, K, K)]
    wanted = torch.zeros(4, 1, 150, 1, dtype=torch.float64)
    for b, where in enumerate(some):
        wanted[b, :, :len(where)] = 1
    at = positions[:, None, :, None].expand(-1, H, -1, hd)
    ref = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True).gather(2, at) * wanted
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in (exact[0].gather(2, at), *exact[1:]))
    mine = dense_ops.CausalAttention.apply(q, k, v, [len(where) for where in some], positions)
    dy = torch.randn_like(ref).to(dtype).double() * wanted
    dq, dk, dv = torch.autograd.grad(mine, (q, k, v), dy.to(dtype))
    rq, rk, rv = torch.autograd.grad(ref, exact, dy)
    for a, b in zip((mine, dq, dk, dv), (ref, rq.gather(2, at) * wanted, rk, rv)):
        assert a.dtype == dtype and (a - b).abs().max() < tol * b.abs().max()
    # what a GPU does: a mask, no blocks
    masked = dense_ops.attend_from(q, k, v, positions) * wanted.to(dtype)
    assert (masked - ref).abs().max() < tol * ref.abs().max()


def test_attention_in_bf16_is_no_further_off_than_torch():
    """Each gradient against fp64, of queries loud enough that the softmax has peaks."""
    torch.manual_seed(0)
    shapes = [(1, h, 200, 64) for h in (6, 2, 2)]
    qkv = [torch.randn(s).mul(scale).bfloat16().requires_grad_() for s, scale in zip(shapes, (2, 1, 1))]
    exact = [t.detach().double().requires_grad_() for t in qkv]
    torch_out = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
    ref = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    mine = dense_ops.CausalAttention.apply(*qkv, [200])
    dy = torch.randn_like(ref).bfloat16()
    true = torch.autograd.grad(ref, exact, dy.double())
    for ours, theirs, t in zip(torch.autograd.grad(mine, qkv, dy), torch.autograd.grad(torch_out, qkv, dy), true):
        assert (ours - t).norm() <= 1.05 * (theirs - t).norm()


def test_chunked_cross_entropy_equals_torch():
    torch.manual_seed(0)
    x = torch.randn(150, 12, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2 ** 17, 12, dtype=torch.float64, requires_grad=True)  # three chunks of 64 rows
    t, weights = torch.randint(0, 2 ** 17, (150,)), torch.rand(150, dtype=torch.float64)
    mine = dense_ops.CrossEntropy.apply(x, w, t, weights)
    ref = (F.cross_entropy(x @ w.T, t, reduction="none") * weights).sum()
    for a, b in zip(torch.autograd.grad(mine * 3, (x, w)), torch.autograd.grad(ref * 3, (x, w))):
        assert torch.allclose(a, b, atol=1e-12)
    assert torch.allclose(mine, ref)


def test_full_training_gradients():
    """lora_r = 0: weight gradients of every parameter, a tied head's from both its uses."""
    for kind in ("grouped", "tied", "biases"):
        m, batch = build(targets=None, **KINDS[kind]), batch_of()
        m.train_all()
        params = dict(m.named_parameters())
        mine = torch.autograd.grad(m.loss(batch), params.values())
        ref = torch.autograd.grad(masked_loss(m, batch, [(None, None)] * 3), params.values())
        for name, a, b in zip(params, mine, ref):
            assert (a - b).abs().max() <= 1e-9 * max(1, b.abs().max()), name


# ---- a base in 4 bits: all of the above on its unpacked weights --------------------------------------------

def build_packed(**kw):
    """build()'s model with rows of one block of 64."""
    m = build(hidden_size=64, **kw)
    m.to_4_bits()
    return m


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how, attn", [("dense", 0), ("svd", .5), ("oracle", .5), ("measured", .5), ("measured", 1),
                                       ("backward", 0)])
def test_4_bits_equal_masked_dense(kind, how, attn):
    """On the unpacked weights; channels that are gathered, and channels that were copied out, with a map."""
    m, batch = build_packed(**KINDS[kind]), batch_of(dense_first=2)
    if how == "backward":
        predictor.attach(m, 0, 0, backward_sparsity=.8)
        watch_loud(m)
    elif how != "dense":
        predictor.attach(m, .6, attn, rank=4, kind=how, map_rank=5)
    if how == "measured":
        predictor.measure(m, [batch])
    assert_same(m, batch)


def test_every_predictor_on_4_bits():
    batch = batch_of()
    for how in predictor.KINDS:
        m = build_packed()
        predictor.attach(m, .6, .5, rank=4, kind=how, map_rank=5)
        if how in ("measured", "energy"):
            predictor.measure(m, [batch])
        seen = predictor.watch(m, batch)
        assert 0 < seen["0.mlp"]["held"] <= 1 and seen["0.mlp"]["residual"] < 2
    assert m.generate([[3, 4, 5], [6]], 3, stop=[])[0]


@pytest.mark.parametrize("how", ["random", "measured"])
def test_recompute_changes_nothing_on_4_bits(how):
    def run(recompute):
        m, batch = build_packed(), batch_of()
        predictor.attach(m, .6, .5, kind=how, map_rank=5, seed=3)
        m.recompute = recompute
        if how == "measured":
            predictor.measure(m, [batch])
        return grads(m.loss(batch), m)
    a, b = run(False), run(True)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_autograd_keeps_the_packed_weight():
    """Nothing of a weight's shape is saved, in dense and in sparse rows."""
    m, batch = build_packed(), batch_of()
    predictor.attach(m, .6, .5, kind="oracle")
    shapes = {tuple(w.shape) for w in m.packed()} | {tuple(w.shape)[::-1] for w in m.packed()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        m.loss(batch)
    buffer = next(b.untyped_storage().data_ptr() for key, b in kernels.buffers.items() if key[1] == m.dtype)
    in_buffer = lambda t: t.untyped_storage().data_ptr() == buffer
    assert saved and not [t.shape for t in saved if tuple(t.shape) in shapes or in_buffer(t)]


def test_logits_of_4_bits_equal_transformers(tmp_path):
    """On the weights as they unpack, written to a checkpoint."""
    transformers = pytest.importorskip("transformers")
    for kind in ("llama", "qwen2"):
        m = build_packed(dtype=torch.float32, targets="", model_type=kind, num_attention_heads=4)
        m.save_pretrained(tmp_path / kind)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype=torch.float32).eval()
        tokens = torch.randint(0, 61, (2, 9))
        with torch.no_grad():
            assert (m.logits(tokens) - theirs(tokens).logits).abs().max() < 1e-4


# ---- the predictor -----------------------------------------------------------------------------------------

def test_how_many_channels_stay():
    assert (predictor.number_kept(14336, .99) == 144 and predictor.number_kept(4096, .75) == 1024
            and predictor.number_kept(480, .9) == 48)
    assert (predictor.number_kept(100, .999) == 16 and predictor.number_kept(8, .5) == 8
            and predictor.number_kept(100, 0.0) == 100)


@pytest.mark.parametrize("shape", [(96, 64), (64, 160), (300, 40)])
def test_factors_are_as_good_as_a_full_svd(shape):
    torch.manual_seed(0)
    for w in (torch.randn(*shape), torch.randn(shape[0], 20) @ torch.randn(20, shape[1])
              + .3 * torch.randn(*shape)):
        for rank in (1, 8, 16):
            P, Q = factorize(w, rank)
            u, s, vh = torch.linalg.svd(w.double())
            best = s[rank:].square().sum().sqrt()
            assert (w.T.double() - P.double() @ Q.double()).norm() <= best * 1.001


def test_gram_trick_is_the_energy_of_the_approximate_activation():
    m = build(model_type="qwen2", targets=None)
    predictor.attach(m, .5, .5, rank=5, kind="svd")
    attn, mlp = m.blocks[0].attn, m.blocks[0].mlp
    x = torch.randn(33, 48, dtype=torch.float64)
    y = (torch.cat([x @ P.double() @ Q.double()
                    for P, Q in (factorize(w, 5) for w in attn.predicted_weights())], 1)
         + attn.qkv_bias)
    p = attn.predictor
    assert torch.allclose(predictor.svd_attention(x, p.P, p.Q, p.ranks).double(), y.square().sum(0), rtol=1e-3)
    g, u = (x @ P.double() @ Q.double()
            for P, Q in (factorize(w, 5) for w in mlp.predicted_weights()))
    p = mlp.predictor
    assert torch.allclose(predictor.svd_mlp(x, p.P, p.Q).double(), (F.silu(g) * u).square().sum(0), rtol=1e-3)


def test_grouped_queries_keep_channels_that_meet():
    """Hand-made: 4 query heads, 2 key/value heads, hd 4. Only pair 1 of key head 1 and value channel
    (0, 2) carry energy."""
    attn = SimpleNamespace(n_heads=4, n_kv_heads=2, head_dim=4, o=torch.zeros(16, 3), qkv=torch.zeros(32, 3))
    q, k, v = torch.zeros(4, 4), torch.zeros(2, 4), torch.zeros(2, 4)
    q[2:, 1], q[2:, 3], k[1, 1], k[1, 3], v[0, 2] = 1, 2, 3, 1, 5
    q[:2, 0] = 100  # loud queries whose key channel is silent: they meet nothing
    scores = predictor.attention_scores(attn, torch.cat([q.flatten(), k.flatten(), v.flatten()]))
    keep = predictor.keep_attention(attn, *predictor.top_attention(attn, scores, 2))
    kq, kk, kv = keep.channels
    assert kk.tolist() == [5, 7]  # key head 1, pair (1, 3)
    assert kq.tolist() == [9, 11, 13, 15]  # the same channels of query heads 2 and 3, which read it
    assert 2 in kv.tolist() and len(kv) == 2
    assert set(keep.o.idx.tolist()) >= {2, 6}  # output rows of query heads 0 and 1, which read value (0, 2)
    assert (keep.qkv.idx.tolist() == kq.tolist() + [16 + i for i in kk.tolist()]
            + [24 + i for i in kv.tolist()])


@pytest.mark.parametrize("kind", ["measured", "energy"])
def test_only_what_is_asked_to_measure_is_measured(kind):
    m, batch = build(), batch_of()
    predictor.attach(m, .6, .5, kind=kind)
    with pytest.raises(UserError, match="measured nothing"):
        m.loss(batch)
    m.set_sparsity(0)
    grads(m.loss(batch), m)
    assert not any(t.any() for t in predictor.state(m).values())
    grads(m.loss(batch, measure=True), m)
    once = {k: t.clone() for k, t in predictor.state(m).items()}
    before = {k: p.grad for k, p in m.lora_parameters().items()}
    predictor.measure_more(m, [batch])
    assert all(torch.allclose(t, 2 * once[k]) for k, t in predictor.state(m).items())
    assert all(p.grad is before[k] for k, p in m.lora_parameters().items())
    predictor.fix(m)
    if kind == "measured":
        with pytest.raises(UserError, match="not fitted yet"):
            m.loss(batch)
    predictor.fit_maps(m, [batch])
    m.loss(batch)
    if kind == "energy":
        fixed = m.blocks[0].attn.channels
        predictor.attach(m, .6, .5, kind="oracle")
        m.loss(batch)  # block 0's attention sees the same input: the oracle's channels
        assert all(torch.equal(a, b) for a, b in zip(fixed, m.blocks[0].attn.channels))


def test_an_mlp_channel_scores_what_the_loss_feels():
    """The sum over context rows of |h dL/dh|, by autograd."""
    m, batch = build(), batch_of()
    predictor.attach(m, .6, .5, kind="measured")
    predictor.measure_more(m, [batch])
    seen, real = [], predictor.kernels.swiglu
    x = m.embed.detach()[batch.tokens].requires_grad_()
    mlp = m.blocks[1].mlp

    def forward(x, n, keep, measurer):
        g, u = ((x @ w.T + 2 * (x @ mlp.lora[t + "/A"].T) @ mlp.lora[t + "/B"].T)
                for t, w in zip(("gate", "up"), mlp.gate_up.chunk(2)))
        h = F.silu(g) * u
        h.retain_grad()
        seen.append(h)
        return h @ mlp.down + 2 * (h @ mlp.lora["down/A"].T) @ mlp.lora["down/B"].T

    mlp.forward = forward
    m.loss(batch, x=x).backward()
    h, = seen
    want = (h * h.grad)[:batch.n_sparse].abs().sum(0)
    assert torch.allclose(predictor.state(m)["1.mlp.sums.scores"], want, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_an_attention_channel_scores_what_the_loss_feels(kind):
    """Of x W.T, which a sparse row drops, without bias and LoRA, which it keeps, by autograd: of a value channel the
    sum over context rows of |y dL/dy|, of a rotary pair the same of its two halves' sum, over the group's query
    heads too."""
    m, batch = build(**KINDS[kind]), batch_of()
    predictor.attach(m, .6, .5, kind="measured")
    predictor.measure_more(m, [batch])
    attn, seen = m.blocks[0].attn, []
    H, K, hd = attn.n_heads, attn.n_kv_heads, attn.head_dim

    def project(x, targets, keep=None, n=0, measurer=None):
        y = x @ attn.qkv.T
        y.retain_grad()
        seen.append(y)
        lora = [2 * (x @ attn.lora[t + "/A"].T) @ attn.lora[t + "/B"].T for t in targets]
        bias = 0 if attn.qkv_bias is None else attn.qkv_bias
        return y + bias + torch.cat(lora, 1)

    attn.project = project
    x = m.embed.detach()[batch.tokens].requires_grad_()
    m.loss(batch, x=x).backward()
    felt = (seen[0] * seen[0].grad)[:batch.n_sparse]  # (n, Nq + 2 Nkv)
    want = []
    for h in range(K):
        for p in range(hd // 2):
            heads = [*range(h * (H // K), (h + 1) * (H // K)), H + h]  # the group's query heads, and the key head
            want.append(sum((felt[:, i * hd + p] + felt[:, i * hd + p + hd // 2]).abs().sum() for i in heads))
    want = torch.cat([torch.stack(want), felt[:, (H + K) * hd:].abs().sum(0)])
    assert torch.allclose(predictor.state(m)["0.attn.sums.scores"], want, rtol=1e-9)


def test_the_map_is_the_best_of_its_rank():
    """Against a plain weighted ridge regression, truncated by a full SVD of its predictions."""
    torch.manual_seed(0)
    n, D, I, r = 200, 12, 40, 3
    x, h, down = torch.randn(n, D).double() + 1, torch.randn(n, I).double(), torch.randn(I, D).double()
    h += x @ torch.randn(D, I).double()
    w, kept = torch.rand(n, 1).double(), torch.tensor([1, 5, 6])
    x1 = torch.cat([x, torch.ones(n, 1).double()], 1)
    R = h.index_fill(1, kept, 0) @ down
    U, V, b = predictor.fit_map((x1 * w).T @ x1, (x1 * w).T @ R, r, ridge=1e-12)
    error = lambda y: (w * (R - y).square()).sum()
    rootw = w.sqrt()
    full = torch.linalg.lstsq(x1 * rootw, R * rootw).solution
    F1 = x1 @ full - (w * (x1 @ full)).sum(0) / w.sum()
    u, s, vh = torch.linalg.svd(F1 * rootw, full_matrices=False)
    best = (w * (R - x1 @ full).square()).sum() + s[r:].square().sum()
    assert error(x @ U @ V + b) == pytest.approx(best.item(), rel=1e-6)


@pytest.mark.parametrize("bits,alone", [(16, False), (4, False), (16, True)])
def test_maps_are_fitted_block_after_block(bits, alone):
    """Against the textbook's dense and sparse streams, the latter with the maps of the blocks below; or each alone, to
    what is dropped in the dense one."""
    m = build()
    if bits == 4:
        m = build_packed()
    batches = [batch_of(), batch_of(((12, 3), (20, 5)), seed=1, dense_first=2)]
    predictor.attach(m, .6, .5, kind="measured", map_rank=5)
    predictor.measure_more(m, batches)
    predictor.fix(m)
    predictor.fit_maps(m, batches, alone)
    streams = [Masked(m, b) for b in batches]
    dense = [s.weights["model.embed_tokens.weight"][s.batch.tokens] for s in streams]  # (T, D) each
    sparse = list(dense)
    for i, block in enumerate(m.blocks[:-1]):
        kept, at = block.mlp.predictor.fixed.channels, f"model.layers.{i}."
        xx = xe = 0
        for j, s in enumerate(streams):
            n = s.batch.n_sparse
            x = dense[j] + s.attention(i, s.norm(dense[j], at + "input_layernorm"), None)
            dense[j] = x + s.mlp(i, s.norm(x, at + "post_attention_layernorm"), None)
            before = x
            channels = block.attn.predictor.fixed.channels
            sparse[j] = sparse[j] + s.attention(i, s.norm(sparse[j], at + "input_layernorm"), channels)
            if alone:
                sparse[j] = before
            x = s.norm(sparse[j], at + "post_attention_layernorm")  # (T, D)
            h = block.mlp.activations(x[:n])
            E = h.index_fill(1, kept, 0) @ s.weights[at + "mlp.down_proj.weight"].T
            missing = (dense[j] - sparse[j] - s.mlp(i, x, None))[:n]  # 0 where it is alone
            w = 1 / h.norm(dim=1, keepdim=True)
            x1 = torch.cat([x[:n], torch.ones(n, 1)], 1)
            xx, xe = xx + (x1 * w).T @ x1, xe + (x1 * w).T @ (E + predictor.PULL * missing)
            sparse[j] = sparse[j] + s.mlp(i, x, kept)
        U, V, b = block.mlp.predictor.map
        want = predictor.fit_map(xx, xe, 5)
        assert torch.allclose(U @ V, want[0] @ want[1], rtol=1e-7, atol=1e-9)
        assert torch.allclose(b, want[2], rtol=1e-7, atol=1e-9)


def test_the_map_of_attention_is_fitted_to_all_that_it_would_have_added():
    m, batch = build(), batch_of(dense_first=2)
    predictor.attach(m, 0, [1, 0, 0], kind="measured", map_rank=6)
    predictor.measure(m, [batch])
    n, masked = batch.n_sparse, Masked(m, batch)
    x = masked.norm(m.embed[batch.tokens], "model.layers.0.input_layernorm")
    E = masked.attention(0, x, None)[:n]
    x1 = predictor.with_ones(x[:n])
    weighted = (x1 / E.norm(dim=1, keepdim=True)).T
    U, V, b = predictor.fit_map(weighted @ x1, weighted @ E, 6)
    mine = m.blocks[0].attn.predictor.map
    assert torch.allclose(mine[0] @ mine[1], U @ V, rtol=1e-8, atol=1e-10) and torch.allclose(mine[2], b, rtol=1e-8)


def test_maps_do_not_depend_on_micro_batches():
    def maps(batches):
        m = build()
        predictor.attach(m, [.6, 0, 0], [1, 0, 0], kind="measured", map_rank=5)
        predictor.measure(m, batches)
        maps = [p.map for _, p in predictor.predictors(m)]
        assert len(maps) == 2
        return torch.cat([torch.cat([U @ V, b[None]]) for U, V, b in maps])

    ex = examples()
    assert torch.allclose(maps([data.collate(ex)]), maps([data.collate(ex[:2]), data.collate(ex[2:])]), rtol=1e-7)


def test_not_finite_is_not_measured():
    m, batch = build(dtype=torch.float32), batch_of()
    predictor.attach(m, .6, 0, kind="measured", map_rank=0)
    predictor.measure_more(m, [batch, batch])
    with torch.no_grad():
        m.blocks[1].mlp.down[3] = float("inf")
    predictor.measure_more(m, [batch])
    assert all(t.isfinite().all() for t in predictor.state(m).values())


def test_selectors_rank_as_they_should():
    """Energy held on the very batch: the oracle's is the most, the worst's the least; energies of this batch
    are the oracle's in block 0's attention, which sees the same input. A map that is fitted to the dropped output alone
    leaves less of it missing."""
    m, batch = build(dtype=torch.float32), batch_of(((30, 5), (20, 9), (25, 3)))
    held = {}
    for kind in predictor.KINDS:
        predictor.attach(m, .8, .5, kind=kind, map_rank=16)
        if kind in ("measured", "energy"):
            predictor.measure_more(m, [batch])
            predictor.fix(m)
            predictor.fit_maps(m, [batch], alone=True)
        held[kind] = predictor.watch(m, batch)
    assert held["oracle"]["0.attn"]["held"] == pytest.approx(held["energy"]["0.attn"]["held"], rel=1e-5)
    for part in ("0.mlp", "0.attn"):
        assert held["oracle"][part]["held"] >= held["svd"][part]["held"] > held["worst"][part]["held"]
    mlp = held["measured"]["0.mlp"]
    assert mlp["residual"] < .9 * mlp["without_map"]
    assert held["oracle"]["0.mlp"]["residual"] == held["oracle"]["0.mlp"]["without_map"]


def test_the_worst_are_what_the_oracle_leaves():
    """With half of the channels kept or less, in q, k and v as in the MLP."""
    m, batch = build(dtype=torch.float32), batch_of(((30, 5), (20, 9), (25, 3)))
    kept = {}
    for kind in ("oracle", "worst"):
        predictor.attach(m, .6, .5, kind=kind)
        m.loss(batch)  # block 0's attention sees the same input with both
        kept[kind] = m.blocks[0].attn.channels
        x = torch.randn(40, m.config.hidden_size, generator=torch.Generator().manual_seed(1))
        kept[kind] += (m.blocks[0].mlp.predictor.select(x).channels,)
    for best, worst in zip(*kept.values()):
        assert len(best) == len(worst) and not set(best.tolist()) & set(worst.tolist())


@pytest.mark.parametrize("kind, attn", [("measured", .5), ("energy", .5), ("measured", 1)])
def test_a_saved_choice_is_the_same_choice(kind, attn):
    """Before the switch the scores, after it channels and maps: the loss of a model that took them is the same."""
    (m, batch), other = (build(), batch_of()), build()
    for model in (m, other):
        predictor.attach(model, .6, attn, kind=kind, map_rank=4)
    predictor.measure_more(m, [batch])
    predictor.load_state(other, predictor.state(m))
    for model in (m, other):
        predictor.fix(model)
        predictor.fit_maps(model, [batch])
    assert torch.equal(m.loss(batch), other.loss(batch))
    again = build()
    predictor.attach(again, .6, attn, kind=kind, map_rank=4)
    predictor.load_state(again, {k: t.clone() for k, t in predictor.state(m).items()})
    assert torch.equal(m.loss(batch), again.loss(batch))
    shapes = [{k: t.shape for k, t in predictor.state(one).items()} for one in (again, m)]
    assert shapes[0] == shapes[1]
    again.set_sparsity(0)
    again.set_sparsity(1)
    with pytest.raises(UserError, match="has measured nothing"):
        predictor.set_ratios(again, {name: .2 for name, _ in predictor.predictors(again)})


def test_another_ratio_has_other_channels_and_wants_another_map():
    m, batch = build(), batch_of()
    predictor.attach(m, [.6, 0, 0], 0, kind="measured", map_rank=4)
    predictor.measure(m, [batch])
    p = m.blocks[0].mlp.predictor
    of_six = p.fixed
    predictor.set_ratios(m, {"0.mlp": .3})
    assert len(p.fixed.channels) > len(of_six.channels) and p.map is None
    with pytest.raises(UserError, match="not fitted yet"):
        m.loss(batch)
    predictor.set_ratios(m, {"0.mlp": .6})
    predictor.fit_maps(m, [batch])
    assert torch.equal(p.fixed.channels, of_six.channels)
    assert all(torch.equal(a, b) for a, b in zip(p.map, of_six.map))


def test_queries_may_come_back_and_go_again():
    m, batch = build(), batch_of()
    predictor.attach(m, 0, [1, 0, 0], kind="measured", map_rank=4)
    predictor.measure(m, [batch])
    without = m.loss(batch)
    for ratio in (.5, .01):  # .01 keeps all channels
        predictor.set_ratios(m, {"0.attn": ratio})
        assert_same(m, batch)
        assert m.blocks[0].attn.channels[1].numel() == (16 if ratio == .5 else 32)
        predictor.set_ratios(m, {"0.attn": 1})
        with pytest.raises(UserError, match="not fitted yet"):
            m.loss(batch)
        predictor.fit_maps(m, [batch])
        assert torch.equal(m.loss(batch), without)


def test_a_part_of_ratio_0_is_dense():
    """Also where its channels were fixed."""
    m, batch = build(), batch_of()
    predictor.attach(m, .6, 0, kind="measured", map_rank=4)
    predictor.measure(m, [batch])
    predictor.set_ratios(m, {})
    m.set_sparsity(1)
    sparse = m.loss(batch)
    m.set_sparsity(0)
    assert torch.equal(sparse, m.loss(batch))


def test_a_rank_above_a_projection_width_is_exact():
    """Then the estimate is the oracle (of a model without LoRA), though q's rank and k's differ."""
    m, batch = build(dtype=torch.float32, targets=""), batch_of(((30, 5), (20, 9)))
    kept = []
    for kind in ("oracle", "svd"):
        predictor.attach(m, 0, .5, rank=1000, kind=kind)
        m.loss(batch)
        kept.append(m.blocks[0].attn.channels)
    assert all(torch.equal(a, b) for a, b in zip(*kept))


def test_cached_factors_never_serve_changed_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    m = build(dtype=torch.float32)
    predictor.attach(m, .5, .5)
    first = m.blocks[0].mlp.predictor.P.clone()
    (path,) = (tmp_path / "nanosparselora").glob("*.safetensors")
    predictor.attach(m, .5, .5)
    assert torch.equal(first, m.blocks[0].mlp.predictor.P) and len(list(path.parent.iterdir())) == 1
    with torch.no_grad():
        m.blocks[0].mlp.gate_up[3, 5] += 1e-3  # one element of one weight
    predictor.attach(m, .5, .5)
    assert len(list(path.parent.iterdir())) == 2
    path.write_bytes(b"damaged")
    predictor.attach(build(dtype=torch.float32), .5, .5)  # made anew
    assert path.stat().st_size > 100

    def full(tensors, file):
        file.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(factors, "save_file", full)
    predictor.attach(build(dtype=torch.float32), .5, .5, rank=2)  # not kept, and no failure
    assert len(list(path.parent.iterdir())) == 2


def test_errors_of_attach():
    m = build()
    for args, words in (((1.0, 0), "not a number in"), (([.5], 0), "1 ratios"), ((.5, -.1), "not a number in")):
        with pytest.raises(UserError, match=words):
            predictor.attach(m, *args)
    with pytest.raises(UserError, match="none of svd"):
        predictor.attach(m, .5, 0, kind="best")
    for more in (dict(kind="svd"), dict(kind="energy"), dict(kind="measured", map_rank=0)):
        with pytest.raises(UserError, match="attn_sparsity = 1 needs a map"):
            predictor.attach(m, 0, 1, **more)


# ---- transformers and PEFT ---------------------------------------------------------------------------------

LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
HF = {"llama multi-head": ("Llama", dict(num_key_value_heads=4)), "llama grouped": ("Llama", {}),
      "llama tied": ("Llama", dict(tie_word_embeddings=True)),
      "llama3 rope": ("Llama", dict(rope_parameters=LLAMA3)),
      "mistral": ("Mistral", dict(sliding_window=None)), "qwen2": ("Qwen2", {}),
      "qwen3": ("Qwen3", dict(head_dim=32))}


def hugging_face(kind, path, **kw):
    transformers = pytest.importorskip("transformers")
    name, own = HF[kind]
    c = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, eos_token_id=None)
    torch.manual_seed(0)
    m = getattr(transformers, name + "ForCausalLM")(
        getattr(transformers, name + "Config")(**{**c, **own, **kw})).eval()
    with torch.no_grad():
        for n, p in m.named_parameters():
            if p.dim() == 1:
                p.normal_(1 if "norm" in n else 0, .3)
    m.save_pretrained(path, max_shard_size="100KB")
    return m


@pytest.mark.parametrize("kind", HF)
def test_logits_and_text_equal_transformers(kind, tmp_path):
    theirs = hugging_face(kind, tmp_path)
    ours = LLaMA.from_pretrained(tmp_path)
    tokens = torch.randint(0, 97, (3, 90))
    with torch.no_grad():
        assert (ours.logits(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]
    for p, new in zip(prompts, ours.generate(prompts, 9)):
        assert (new == theirs.generate(torch.tensor([p]), max_new_tokens=9, do_sample=False)[0, len(p):]
                .tolist())


def test_adapter_loads_in_peft_and_checkpoint_in_transformers(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = hugging_face("llama grouped", tmp_path / "base")
    ours = LLaMA.from_pretrained(tmp_path / "base")
    ours.add_lora(4, 12, ALL)
    with torch.no_grad():
        for p in ours.lora_parameters().values():
            p.normal_(0, .1)
    ours.save_adapter(tmp_path / "adapter", tmp_path / "base")
    ours.save_pretrained(tmp_path / "copy")
    tokens = torch.randint(0, 97, (2, 17))
    with torch.no_grad():
        copy = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
        assert torch.equal(copy(tokens).logits, base(tokens).logits)
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert (theirs(tokens).logits - ours.logits(tokens)).abs().max() < 1e-4


@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_generation_stops_and_batches_of_any_length_agree(every):
    m = build(dtype=torch.float32, targets=None)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]
    alone = [m.generate([p], 20, stop=())[0] for p in prompts]
    assert m.generate(prompts, 20, stop=()) == alone
    many = [[i, i + 1, 2 * i] for i in range(1, 25)]
    whole = m.generate(many, 20, stop=())
    # each text ends at its own first stop, however few others have ended
    for stop in sorted({t for a in whole for t in a})[::every]:
        assert m.generate(many, 20, stop=[stop]) == [a[:a.index(stop)] if stop in a else a for a in whole]
    assert (m.generate(prompts, 5, temperature=1.0, top_p=1e-6)
            == [a[:5] for a in m.generate(prompts, 5, stop=())] or m.config.eos_token_id)
    assert m.generate([], 5) == []


def test_generation_looks_back_no_further_than_the_sliding_window(tmp_path, monkeypatch):
    monkeypatch.setitem(HF, "mistral", ("Mistral", dict(sliding_window=8)))
    theirs, ours = hugging_face("mistral", tmp_path), LLaMA.from_pretrained(tmp_path)
    for p, new in zip(prompts := [[1, 2, 3, 4, 5, 6], [7, 8]], ours.generate(prompts, 30)):
        assert new == theirs.generate(torch.tensor([p]), max_new_tokens=30, do_sample=False)[0, len(p):].tolist()


def test_a_saved_checkpoint_names_its_own_dtype(tmp_path):
    """transformers 5 writes "dtype", older ones "torch_dtype": of a base in bf16 neither may stay."""
    transformers = pytest.importorskip("transformers")
    hugging_face("llama grouped", tmp_path / "base")
    path = tmp_path / "base/config.json"
    path.write_text(json.dumps(dict(json.loads(path.read_text()), dtype="bfloat16", torch_dtype="bfloat16")))
    LLaMA.from_pretrained(tmp_path / "base", torch.float32).save_pretrained(tmp_path / "copy")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "copy").dtype == torch.float32


def test_texts_are_written_together_as_memory_allows():
    sizes = dict(num_hidden_layers=32, num_key_value_heads=8, head_dim=128)  # LLaMA-3-8B: 131 kB a token
    m = SimpleNamespace(config=SimpleNamespace(**sizes), dtype=torch.bfloat16)
    assert at_once(m, 456) == 2 * 10**9 // (456 * 131072) == 33
    assert at_once(m, 20) == 128 and at_once(m, 10**6) == 1
