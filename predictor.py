"""Which channels to keep: from a layer's input (or from what was measured before), one set of channels a
layer and a forward pass (so, with micro-batches, one for each).

    n sparse rows x (n, D)  ->  energies, one a channel  ->  keep(...): the C largest, sorted

Only sparse rows vote. The energy of a channel is the sum over those rows of its squared activation: of y =
x W.T + b for an attention channel of q, k or v, of h = silu(g) u for an MLP channel. Five ways to come by it:

    svd       the paper's: W.T ~= P Q with P (D, r), Q (r, N), computed once from the weights, without data.
              Attention never builds (n, N): with Z = x P and M = Z.T Z (r, r), energy_j = q_j.T M q_j: the
              exact energy of the approximate activation, for 2 n D r + 2 n r^2 operations. A bias is one more
              column of ones in Z, one more row of Q. The MLP needs silu per token: sum over rows of
              (silu(Zg qg_i) (Zu qu_i))^2, in blocks (kernels.mlp_scores).
    measured  ours: true energies, summed by the dense steps that the schedule runs anyway, then fixed. No
              factors, no estimate in the step, and the kept rows of W can be copied out once. On the
              embedded base it keeps .85 of the best channels at MLP .9 where svd keeps .49
              and chance .13 (results/predictor_quality.md).
    oracle    true energies of this very batch: as dear as the dense layer, the bound for every other
    random, worst    for ablations

Attention's channels hang together: q and k are kept in rotary pairs (d, d + hd/2) of a key/value head, the
same for every query head that reads it; a value channel's output-projection rows are those of every query
head of its group (keep_attention).

    T, n rows    D model width    H query heads    K key/value heads    G = H / K    hd head dim
    I MLP width    r SVD rank
"""
from contextlib import contextmanager
from functools import partial

import torch

import kernels
from config import UserError
from sparse import Keep, KeepAttention, KeepMLP, energy
from lib import cache

KINDS = ("svd", "measured", "oracle", "random", "worst")


# ---- energies -> kept channels -----------------------------------------------------------------------------

def count(n, ratio, multiple=16):
    """How many of n channels stay at a sparsity ratio: n (1 - ratio), rounded up to a multiple, at least one
    multiple, at most n."""
    kept = round(n * (1 - ratio), 6)  # 6 digits: .1 of 480 is 48, not 48.000000000000007
    return min(n, max(multiple, -int(-kept // multiple) * multiple))


def top(scores, c, largest=True):
    """The c largest (or smallest) of scores (N,), as sorted int64 positions (c,)."""
    return scores.topk(c, largest=largest).indices.sort().values


def keep_mlp(mlp, energies, c, copy=False, largest=True):
    """energies (I,), c channels -> KeepMLP. copy: with contiguous copies of the kept rows of the weights.
    largest: False keeps those that matter least, the ablation "worst"."""
    idx = top(energies, c, largest)  # (C,)
    both = torch.cat([idx, idx + mlp.down.shape[0]])  # (2C,) rows of gate and of up
    return KeepMLP(idx, rows_of(mlp.gate_up, both, copy), rows_of(mlp.down, idx, copy))


def keep_attention(attn, energies, c, copy=False, largest=True):
    """energies of q, k, v (Nq + 2 Nkv,), c channels of k and as many of v -> KeepAttention. copy, largest: as
    for keep_mlp.

    q/k: for key/value head h and rotary pair p, score = |k_(h,p)| * mean over the group's query heads g of
    |q_(g,p)|, norms over rows and both halves; the c/2 best pairs over all heads. A half-kept pair would lose
    its cross terms q_d k_(d+hd/2).
    v/o: score = |v_(h,d)|; the rows of o that read (h, d) are (g, d) for every g of the group."""
    H, K, hd = attn.n_heads, attn.n_kv_heads, attn.head_dim
    G, half = H // K, hd // 2
    q, k, v = energies.split([H * hd, K * hd, K * hd])
    q_norm = q.view(K, G, 2, half).sum(2).sqrt().mean(1)  # (K, hd/2)
    k_norm = k.view(K, 2, half).sum(1).sqrt()  # (K, hd/2)
    pairs = top((q_norm * k_norm).flatten(), c // 2, largest)  # (C/2,) numbered h * hd/2 + p
    h, p = pairs // half, pairs % half
    k_idx = (h * hd + p)[:, None] + half * torch.arange(2, device=pairs.device)  # (C/2, 2)
    k_idx = k_idx.flatten().sort().values  # (C,)
    v_idx = top(v, c, largest)  # (C,)
    q_idx, o_idx = every_head(k_idx, G, hd), every_head(v_idx, G, hd)  # (G C,)
    qkv = torch.cat([q_idx, H * hd + k_idx, (H + K) * hd + v_idx])
    return KeepAttention((q_idx, k_idx, v_idx), rows_of(attn.qkv, qkv, copy), rows_of(attn.o, o_idx, copy))


def every_head(idx, G, hd):
    """Channels (C,) numbered over key/value heads -> the same channels of all G query heads of each head's
    group, sorted (G C,)."""
    h, d = idx // hd, idx % hd
    return ((h[:, None] * G + torch.arange(G, device=idx.device)) * hd + d[:, None]).flatten().sort().values


def rows_of(w, idx, copy):
    return Keep(idx, w.detach().index_select(0, idx) if copy else None)


# ---- energies, one function a kind: (part, x (n, D)) -> energies -------------------------------------------

def oracle(part, x):
    return energy(part.activations(x))


def at_random(generator, part, x):
    """Energies that mean nothing: the ablation "random"."""
    return torch.rand(part.predictor.n_energies, generator=generator, device=x.device)


def svd_attention(attn, x):
    """x (n, D) -> (Nq + 2 Nkv,): energies of q, k and v, each from its own factors."""
    z, out = x @ attn.predictor.P, []  # (n, 3 r)
    # z's parts (n, r); Q's (r, N), with a bias (r + 1, N)
    for zi, q in zip(z.float().split(attn.predictor.ranks, 1), attn.predictor.Q):
        if q.shape[0] > zi.shape[1]:
            zi = torch.cat([zi, zi.new_ones(len(zi), 1)], 1)
        out.append(((zi.T @ zi) @ q).mul_(q).sum(0))  # q_j.T M q_j for all j
    return torch.cat(out).clamp_(min=0)  # rounding can take a vanishing energy below 0, where sqrt is NaN


def svd_mlp(mlp, x):
    """x (n, D) -> (I,)."""
    zg, zu = (x @ mlp.predictor.P).chunk(2, 1)  # (n, r) each
    return kernels.mlp_scores(zg, zu, *mlp.predictor.Q)


# ---- the factors -------------------------------------------------------------------------------------------

def factorize(w, rank):
    """w (N, D) -> P (D, r), Q (r, N) fp32 with w.T ~= P Q, the best approximation of that rank to within 1e-3
    of its error.

    Randomized subspace iteration (Halko, Martinsson, Tropp 2011) on a block of r + 24 vectors: 18 thin
    products with w instead of an eigendecomposition of a 4096 x 4096 matrix, for 5 weights of each of 32
    blocks. Deterministic: the start block is seeded."""
    w = w.float()
    k = min(rank + 24, *w.shape)
    g = torch.Generator().manual_seed(0)
    y = w @ torch.randn(w.shape[1], k, generator=g).to(w.device)  # (N, k)
    for _ in range(8):
        y = w @ torch.linalg.qr(w.T @ torch.linalg.qr(y).Q).Q
    y = torch.linalg.qr(y).Q  # (N, k), orthonormal
    u, s, vh = torch.linalg.svd(y.T @ w, full_matrices=False)  # of (k, D)
    r = min(rank, k)
    return vh[:r].T.contiguous(), ((y @ u[:, :r]) * s[:r]).T.contiguous()


@contextmanager
def whole(model, name):
    """Inside, the weights of part `name` have all their rows, where FSDP has cut them up over ranks (which
    all have to come here)."""
    block = model.blocks[int(name.split(".")[0])]
    if hasattr(block, "unshard"):
        block.unshard()
    yield
    if hasattr(block, "reshard"):
        block.reshard()


def factors(model, parts, rank, agree):
    """{name: tensor} of P and Q for all parts, from the cache when these very weights were factorized before.
    The key has a checksum of all their bits, so a changed model never meets stale factors. agree: see
    attach."""
    key = [f"1 {rank}"]
    for name, part in parts:
        with whole(model, name):
            key += [f"{name} {tuple(w.shape)} {cache.checksum(w)}" for w in part.predicted_weights()]
    file = cache.path(" ".join(key))
    out = cache.load(file)
    if agree(bool(out)):
        return out
    for name, part in parts:
        with whole(model, name):
            for i, w in enumerate(part.predicted_weights()):
                out[f"{name}.P{i}"], out[f"{name}.Q{i}"] = (t.cpu() for t in factorize(w, rank))
    cache.save(file, out)
    return out


# ---- a part's predictor, and the public functions ----------------------------------------------------------

class Predictor:
    """What attach() hangs on an attention or an MLP with a ratio above 0. model.py calls select(x) on the
    sparse rows of a forward."""

    def __init__(self, part, ratio, kind, estimate, keep, n_channels, n_energies):
        self.part, self.ratio, self.kind, self.estimate, self.keep = part, ratio, kind, estimate, keep
        self.n_channels, self.n_energies = n_channels, n_energies  # I and I, or Nkv and Nq + 2 Nkv
        self.c = 0  # how many of them a forward keeps now; 0: dense
        # of `measured`: summed true energies, whether channels have to be chosen from them, those channels
        w = part.fused()
        high = torch.promote_types(w.dtype, torch.float32)
        self.energies = torch.zeros(n_energies, dtype=high, device=w.device) if kind == "measured" else None
        self.fresh, self.fixed, self.fixed_c = False, None, 0
        self.P = self.Q = self.ranks = None  # of svd: load_factors()
        # energy_held() puts a list here: select() then appends what share of the true energy it kept
        self.watch = None

    def set_scale(self, scale):
        """Sparsity ratio * scale from now on; 0 is dense. With `measured` this is where the
        channels are fixed."""
        self.c = count(self.n_channels, self.ratio * scale) if scale > 0 else 0
        if self.kind == "measured" and self.c and (self.fresh or (self.fixed and self.c != self.fixed_c)):
            self.fixed = self.keep(self.part, self.energies, self.c, copy=self.copies())
            self.fresh, self.fixed_c = False, self.c

    def copies(self):
        """Copying the kept rows out once turns every sparse product into a plain matmul of fixed shape,
        for c / N of the weight's memory: worth it up to a half. A weight that is sharded over ranks has no
        rows to copy."""
        return 2 * self.c <= self.n_channels and not self.part.sharded()

    def measures(self):
        """True in a dense forward in training mode, with `measured`: its activations belong into
        self.energies."""
        return self.kind == "measured" and self.c == 0 and self.part.training

    def flops(self, n):
        """Of one estimate from n sparse rows."""
        N, D = self.part.fused().shape
        if self.kind in ("oracle", "worst"):
            lora = self.part.pairs(("q", "k", "v", "gate", "up"))  # those of this part
            return 2 * n * D * N + sum(2 * n * (A.numel() + B.numel()) for _, A, B in lora)
        if self.kind != "svd":
            return 0
        rank = [len(q) for q in self.Q]  # one more with a bias
        if hasattr(self.part, "down"):
            return 2 * n * self.P.shape[1] * D + 2 * n * rank[0] * N
        return 2 * n * self.P.shape[1] * D + sum(2 * r * r * (n + q.shape[1]) for r, q in zip(rank, self.Q))

    @torch.no_grad()
    def select(self, x):
        """x (n, D), the sparse rows -> KeepMLP or KeepAttention. Nothing here waits for the device."""
        if self.kind == "measured":
            if self.fixed is None:
                raise UserError("predictor=measured has measured nothing yet: run a dense step in training "
                                "mode first (model.set_sparsity(0); model.loss(batch)), "
                                "then set_sparsity above 0")
            kept = self.fixed
        else:
            kept = self.keep(self.part, self.estimate(self.part, x), self.c)
        if self.watch is not None:
            self.watch.append(share(self.part, kept, oracle(self.part, x)))
        return kept


def share(part, kept, true):
    """What share of the true energies (N,) the kept channels hold; for attention the mean of q's, k's
    and v's share."""
    if isinstance(kept, KeepMLP):
        return true[kept.idx].sum() / true.sum()
    sizes = [n * part.head_dim for n in (part.n_heads, part.n_kv_heads, part.n_kv_heads)]
    return torch.stack([t[i].sum() / t.sum() for t, i in zip(true.split(sizes), kept.channels)]).mean()


def attach(model, mlp_sparsity, attn_sparsity, rank=8, kind="svd", seed=0, agree=bool):
    """Gives every block but the last a ratio and a way to choose channels, and switches sparsity fully on.

    mlp_sparsity, attn_sparsity: a float for all blocks, or a list of n_layers floats in [0, 1). rank: of the
    SVD. kind: one of KINDS. agree(found) says whether factors were found in the cache, by this process and,
    under FSDP, by all that have to factorize together. The last block stays dense: only its loss rows compute
    anything but keys and values. Errors: UserError for an unknown kind, a bad ratio, or attention sparsity in
    a model with q/k norms, which would rescale what is left of a query."""
    n = len(model.blocks)
    mlp, attn = (r if isinstance(r, (list, tuple)) else [r] * n for r in (mlp_sparsity, attn_sparsity))
    for name, ratios in (("mlp_sparsity", mlp), ("attn_sparsity", attn)):
        if len(ratios) != n:
            raise UserError(f"{name} has {len(ratios)} ratios, but the model has {n} blocks: "
                            "give one a block")
        if not all(0 <= r < 1 for r in ratios):
            raise UserError(f"{name} = {ratios} holds a ratio outside [0, 1): 0 is dense, .9 keeps a tenth")
    if kind not in KINDS:
        raise UserError(f"predictor = {kind!r} is none of {', '.join(KINDS)}")
    if any(attn) and model.config.qk_norm:
        raise UserError(f"attn_sparsity = {max(attn)} cannot be used with a {model.config.model_type} model: "
                        "its q/k norms would rescale the channels that are left; set attn_sparsity = 0 (MLP "
                        "sparsity works)")
    generator = torch.Generator(model.embed.device).manual_seed(seed)
    # estimate(part, x (n, D)) -> energies (N,); keep(part, energies, c, copy) -> KeepMLP or KeepAttention
    estimates = {"svd": (svd_attention, svd_mlp), "oracle": (oracle, oracle), "worst": (oracle, oracle),
                 "measured": (None, None), "random": (partial(at_random, generator),) * 2}
    e_attn, e_mlp = estimates[kind]
    keep_a, keep_m = (partial(keep, largest=kind != "worst") for keep in (keep_attention, keep_mlp))
    parts = []
    for i, block in enumerate(model.blocks):
        a, m = block.attn, block.mlp
        a.predictor = m.predictor = None
        if attn[i] > 0 and i < n - 1:
            a.predictor = Predictor(a, attn[i], kind, e_attn, keep_a, a.n_kv_heads * a.head_dim,
                                    a.qkv.shape[0])
            parts.append((f"{i}.attn", a))
        if mlp[i] > 0 and i < n - 1:
            m.predictor = Predictor(m, mlp[i], kind, e_mlp, keep_m, m.down.shape[0], m.down.shape[0])
            parts.append((f"{i}.mlp", m))
    if kind == "svd" and parts:
        load_factors(model, factors(model, parts, rank, agree), parts)
    model.selection_rng = generator
    model.set_sparsity(1.0)


def load_factors(model, tensors, parts):
    """Puts P of all weights of a part side by side, P (D, k r), so that the estimate is one thin product."""
    for name, part in parts:
        like, p = part.fused(), part.predictor
        P = [tensors[f"{name}.P{i}"] for i in range(3 if hasattr(part, "qkv") else 2)]
        Q = [tensors[f"{name}.Q{i}"].to(like.device) for i in range(len(P))]
        p.P = torch.cat(P, 1).to(like.device, like.dtype)  # (D, 3 r) or (D, 2 r)
        p.ranks = [f.shape[1] for f in P]  # r each, less where the projection is narrower
        bias = getattr(part, "qkv_bias", None)
        if bias is not None:
            with whole(model, name):
                bias = part.qkv_bias.detach().float().clone()  # (N,)
            Q = [torch.cat([q, b[None]]) for q, b in zip(Q, bias.split([q.shape[1] for q in Q]))]
        p.Q = Q if hasattr(part, "qkv") else [q.to(like.dtype).contiguous() for q in Q]  # (r, N) each


def predictors(model):
    """[(name, Predictor)] of all parts that have one, in the order of the blocks."""
    parts = [(f"{i}.{kind}", getattr(b, kind))
             for i, b in enumerate(model.blocks) for kind in ("attn", "mlp")]
    return [(name, part.predictor) for name, part in parts if part.predictor is not None]


def set_ratios(model, ratios):
    """Other ratios, {name: ratio}, for parts that attach() gave a predictor; a part that is not named runs
    dense. Factors and measured energies stay as they are: this is how tools.sensitivity goes through the
    parts one by one."""
    for name, p in predictors(model):
        p.ratio = ratios.get(name, 0.0)
        p.set_scale(1.0 if p.ratio else 0.0)


def energies(model):
    """{name: (N,) tensor} of what `measured` has summed so far: to add up over ranks, in place,
    and to save."""
    return {name: p.energies for name, p in predictors(model) if p.energies is not None}


@torch.no_grad()
def measure(model, batches):
    """`measured`: adds the true energies of these batches, in dense forwards. The model stays in training
    mode, and dense."""
    model.train()
    model.set_sparsity(0)
    for b in batches:
        model.loss(b)


def forget(model):
    """Starts the measuring anew: predictor_refresh. The channels stay as they are until new
    ones are fixed."""
    for e in energies(model).values():
        e.zero_()


@torch.no_grad()
def energy_held(model, batch):
    """Runs one sparse forward at the present ratios and returns {name: share} of the true energy, on the very
    same inputs, that the kept channels hold: {"0.mlp": .93, ...}. A share near 1 - ratio means that the
    selection is no better than chance."""
    watched = predictors(model)
    for _, p in watched:
        p.watch = []
    try:
        model.loss(batch)
        return {name: float(p.watch[-1]) for name, p in watched if p.watch}
    finally:
        for _, p in watched:
            p.watch = None
