"""Which channels to keep: one set a layer, sorted, the C of the largest score. Either measured once, in dense steps,
and then fixed; or predicted from the layer's input in each forward pass.

    n sparse rows x (n, D)  ->  scores, one a channel  ->  the C largest

Only sparse rows vote. The energy of a channel is the sum over those rows of its squared activation: of y =
x W.T + b for an attention channel of q, k or v, of h = silu(g) u for an MLP channel. Six ways to a score:

    measured  ours, and a run's default. In the dense steps that the schedule runs anyway, a channel's score is what the
              loss feels of it: the sum over context rows of |h dL/dh|, first-order Taylor (Molchanov et al. 2016,
              arXiv 1611.06440). Then the channels are fixed, their rows of W are copied out once, and what the
              dropped ones would have added is replaced by a low-rank map of the input (below).
    svd       the paper's: W.T ~= P Q with P (D, r), Q (r, N), computed once from the weights (lib/factors.py).
              Attention never builds (n, N): with Z = x P and M = Z.T Z (r, r), energy_j = q_j.T M q_j: the
              exact energy of the approximate activation, for 2 n D r + 2 r^2 (n + N) operations. A bias is one more
              column of ones in Z, one more row of Q. The MLP needs silu per token: sum over rows of
              (silu(Zg qg_i) (Zu qu_i))^2, in blocks (kernels.mlp_scores).
    energy    true energies, summed and fixed in the same way, without a map: the ablation of `measured`
    oracle    true energies of this very batch: as dear as the dense layer
    random, worst    for ablations

The map. For a context token a trained MLP is mostly a linear map of its normed input x plus a few channels that
matter. So a sparse row computes, with k the kept channels and d the dropped ones,

    y = h[k] Wd[k] + (x U) V + b        U (D, r), V (r, D), b (D,): frozen; backward  dx += (dy V.T) U.T

fitted by ridge least squares to what is dropped, E = h[d] Wd[d], over context rows of the training set (He et al.
2017, arXiv 1707.06168; the bias as in FLAP, arXiv 2312.11983). What the dropped channels feed into LoRA's down branch
is not in E, and is lost. Row t has the weight w_t = 1 / |h_t|, so that no few loud rows decide. With Xc, Ec the rows
less their weighted means, times the root of w_t:

    M = (Xc.T Xc + ridge)^-1 Xc.T Ec    V: the r leading eigenvectors of M.T Xc.T Ec    U = M V.T
    b = mean E - mean X U V

A map that is fitted in the dense model meets other inputs in the sparse one, and errors pass through all blocks above.
So once the channels are chosen, the maps are fitted block after block (fit_maps), each on what enters its MLP in the
sparse model, whose blocks below have their maps by then; and to a little more than E: also to half of what those
blocks, and its own block's attention, have left missing. That takes forward passes only. (SmolLM2, MLP .9, r = 64, 8
batches, rise of the loss / cosine of the gradient with the dense model's: each map fitted alone .125 / .869, so
.077 / .891. What the half is worth stands at PULL.)

Sinks: the first tokens of each text have MLP outputs of up to 100,000 times the others'. data.collate makes them dense
rows (dense_first), so they neither vote nor enter the fit.

No queries. A layer's keys and values are all that the dense rows need of a context token. What the token itself reads
from others shapes only its own keys and values in the layers above, and in the upper half of a network that counts for
little. With a ratio of 1 an attention's sparse rows make keys and values in full, and neither a query nor an output: a
map of its normed input, fitted in the same way to all that attention would have added (E, w = 1 / |E|), stands in.
That saves q, o and, for those rows, the products of queries and keys.

Rows instead of channels. What the forward leaves out moves the loss alike on every batch: a bias, which no number of
steps averages away. What the backward leaves out does so far less. And in the backward nothing need be predicted: the
gradient that comes to a block says by itself which context tokens matter, and they are few. (SmolLM2, GSM8K behind six
solved problems, a trained adapter: of |dy|^2 over 1,000 context tokens a text a tenth of them has .92 to .97 in the
lower half of the blocks, .97 to 1.00 in the upper.) So with a `backward_sparsity` of .9 the forward is exact, and in
each block the loudest tenth of a text's context tokens has a backward (sparse.LoudRows). That saves less than half of
a dense step, but in every block from the first on. (There, cosine / error over norm / FLOPs of a step: a tenth
.987 / .16 / .65; MLP .97 and no queries in 17-28, r = 128, .84 / .59 / .67.)

Attention's channels hang together: q and k are kept in rotary pairs (d, d + hd/2) of a key/value head, the
same for every query head that reads it; a value channel's output-projection rows are those of every query
head of its group (keep_attention).

    T, n rows    D model width    H query heads    K key/value heads    G = H / K    hd head dim
    I MLP width    r rank, of the SVD or of a map    E (n, D) what the dropped channels would have added
"""
import math

import torch

import config
import kernels
from config import UserError
from lib import dist
from lib.factors import factors
from sparse import Keep, KeepAttention, KeepMLP, SkipQueries, lora_forward

KINDS = ("svd", "measured", "energy", "oracle", "random", "worst")


# ---- scores ------------------------------------------------------------------------------------------------

def zero_where_bad(t):
    """t with 0 for what is not finite: one bad batch must not decide for all that follow."""
    return t.nan_to_num(0.0, 0.0, 0.0)


def energy(y):
    """Sum over rows of y^2: y (n, N) -> (N,) in fp32 (fp64 for fp64)."""
    # a norm adds up in fp32 without a copy of y in fp32
    norm = torch.linalg.vector_norm(y, dim=0, dtype=torch.promote_types(y.dtype, torch.float32))
    return zero_where_bad(norm.square())


def with_ones(x):
    """x (n, D) -> (n, D+1): a last column of ones, for a bias."""
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def svd_attention(x, P, Q, ranks):
    """x (n, D), P (D, sum of ranks), Q: one (r, N) of q, of k and of v, with a bias (r + 1, N) -> energies
    (Nq + 2 Nkv,)."""
    z = (x @ P).float()  # (n, sum of ranks)
    energies = []
    for zi, q in zip(z.split(ranks, 1), Q):
        if len(q) > zi.shape[1]:  # the bias
            zi = with_ones(zi)
        gram = zi.T @ zi  # M (r, r)
        energies.append((gram @ q).mul_(q).sum(0))  # q_j.T M q_j for all j
    return torch.cat(energies).clamp_(min=0)  # rounding can take a vanishing energy below 0, where sqrt is NaN


def svd_mlp(x, P, Q):
    """x (n, D), P (D, 2 r), Q: (r, I) of gate and of up -> energies (I,)."""
    z_gate, z_up = (x @ P).chunk(2, 1)  # (n, r) each
    return kernels.mlp_scores(z_gate, z_up, *Q)


def attention_scores(attn, energies):
    """Energies of q, k, v (Nq + 2 Nkv,) -> scores: one a rotary pair (h, p) of a key/value head, numbered
    h * hd/2 + p, then one a value channel: (Nkv / 2 + Nkv,).

    A pair's is |k_(h,p)| * mean over the group's query heads g of |q_(g,p)|, norms over rows and both halves: what
    it adds to the logits. A half-kept pair would lose its cross terms q_d k_(d+hd/2). A value channel's is its
    energy."""
    H, K, hd = attn.n_heads, attn.n_kv_heads, attn.head_dim
    q, k, v = energies.split([H * hd, K * hd, K * hd])
    q_norm = q.view(K, H // K, 2, hd // 2).sum(2).sqrt().mean(1)  # (K, hd/2)
    k_norm = k.view(K, 2, hd // 2).sum(1).sqrt()  # (K, hd/2)
    return torch.cat([(q_norm * k_norm).flatten(), v])


def taylor_mlp(h, dh):
    """h and its gradient dh (n, I) -> scores (I,): the sum over rows of |h dL/dh|."""
    return zero_where_bad((h * dh).abs().sum(0))


def taylor_attention(attn, y, dy):
    """y (n, Nq + 2 Nkv): q, k, v before RoPE, less bias and LoRA; dy: the gradients -> scores as of
    attention_scores. Of a pair the sum of y dy over both halves, which does not depend on the rotation, then its
    size; summed over rows and query heads."""
    H, K, hd = attn.n_heads, attn.n_kv_heads, attn.head_dim
    high = torch.promote_types(y.dtype, torch.float32)
    felt = y.to(high) * dy.to(high)
    q, k, v = felt.split([H * hd, K * hd, K * hd], 1)
    q_pairs = q.view(len(y), K, H // K, 2, hd // 2).sum(3)  # (n, K, G, hd/2)
    k_pairs = k.view(len(y), K, 2, hd // 2).sum(2)  # (n, K, hd/2)
    pairs = q_pairs.abs().sum((0, 2)) + k_pairs.abs().sum(0)  # (K, hd/2)
    return zero_where_bad(torch.cat([pairs.flatten(), v.abs().sum(0)]))


# ---- scores -> kept channels -------------------------------------------------------------------------------

def number_kept(n, ratio, multiple=16):
    """How many of n channels stay at a sparsity ratio: n (1 - ratio), rounded up to a multiple, at least one
    multiple, at most n."""
    kept = round(n * (1 - ratio), 6)  # 6 digits: .1 of 480 is 48, not 48.000000000000007
    rounded_up = math.ceil(kept / multiple) * multiple
    return min(n, max(multiple, rounded_up))


def top(scores, c):
    """The c largest of scores (N,), as sorted int64 positions (c,)."""
    return scores.topk(c).indices.sort().values


def keep_mlp(mlp, channels, copy=False):
    """channels (C,) -> KeepMLP; with copy, with contiguous copies of the kept rows of the weights."""
    gate_and_up = torch.cat([channels, channels + len(mlp.down)])  # (2C,) rows of gate and of up
    return KeepMLP(
        channels,
        gate_up=keep_rows(mlp.gate_up, gate_and_up, copy),
        down=keep_rows(mlp.down, channels, copy))


def keep_attention(attn, k_channels, v_channels, copy=False):
    """Channels of k and of v, (C,) each, numbered over the key/value heads -> KeepAttention. copy: as for keep_mlp.
    The query channels are those of every query head that reads the key; the rows of o that read value channel
    (h, d) are (g, d) for every query head g of the group."""
    H, K, hd = attn.n_heads, attn.n_kv_heads, attn.head_dim
    q_channels = every_head(k_channels, H // K, hd)  # (G C,)
    o_rows = every_head(v_channels, H // K, hd)  # (G C,)
    qkv_rows = torch.cat([q_channels, H * hd + k_channels, (H + K) * hd + v_channels])
    return KeepAttention(
        (q_channels, k_channels, v_channels),
        qkv=keep_rows(attn.qkv, qkv_rows, copy),
        o=keep_rows(attn.o, o_rows, copy))


def every_head(idx, G, hd):
    """Channels (C,) numbered over key/value heads -> the same channels of all G query heads of each head's
    group, sorted (G C,)."""
    h = idx // hd
    d = idx % hd
    query_heads = h[:, None] * G + torch.arange(G, device=idx.device)  # (C, G)
    return (query_heads * hd + d[:, None]).flatten().sort().values


def keep_rows(w, idx, copy):
    """Rows idx of w (N, D) -> Keep. A copy is unpacked."""
    if copy:
        return Keep(idx, kernels.rows_of(w, idx))
    return Keep(idx)


def top_attention(attn, scores, c):
    """scores as above -> (channels of k, channels of v), (c,) each, sorted: the c/2 best pairs over all heads, and the
    c best value channels."""
    half = attn.head_dim // 2
    n_pairs = attn.n_kv_heads * half
    pairs = top(scores[:n_pairs], c // 2)  # (c/2,)
    first = pairs // half * attn.head_dim + pairs % half  # channel (h, p); its partner is (h, p + hd/2)
    k_channels = torch.cat([first, first + half]).sort().values
    v_channels = top(scores[n_pairs:], c)
    return k_channels, v_channels


# ---- the map of what is dropped ----------------------------------------------------------------------------

def fit_map(xx, xe, rank, ridge=.1):
    """The map of the head of this file. xx (D+1, D+1) = sum of w [x 1].T [x 1], xe (D+1, D) = sum of w [x 1].T E ->
    U (D, r), V (r, D), b (D,) in fp64. ridge: in units of the mean of the diagonal."""
    xx, xe = xx.double(), xe.double()
    total = xx[-1, -1]  # the sum of w
    mean_x = xx[-1, :-1] / total  # (D,)
    mean_e = xe[-1] / total  # (D,)
    xx = xx[:-1, :-1] - total * torch.outer(mean_x, mean_x)  # Xc.T Xc
    xe = xe[:-1] - total * torch.outer(mean_x, mean_e)  # Xc.T Ec
    xx.diagonal().add_(ridge * xx.diagonal().mean())
    M = torch.cholesky_solve(xe, torch.linalg.cholesky(xx))  # (D, D): the map of full rank
    leading = torch.linalg.eigh(M.T @ xe).eigenvectors[:, -rank:]  # (D, r)
    U = M @ leading
    V = leading.T.contiguous()
    b = mean_e - mean_x @ U @ V
    return U, V, b


# ---- a part's predictor ------------------------------------------------------------------------------------

class Predictor:
    """What attach() hangs on an attention or an MLP with a ratio above 0. model.py calls select(x) on the sparse rows
    of a forward; sparse.py, in the backward of a dense step that measures, see_mlp or see_attention."""

    def __init__(self, block, part, ratio, kind, map_rank, rng):
        self.block = block  # which FSDP makes whole
        self.part = part
        self.ratio = ratio
        self.kind = kind
        self.map_rank = map_rank
        self.rng = rng
        self.is_mlp = hasattr(part, "down")
        if self.is_mlp:
            self.n_channels = self.n_scores = len(part.down)  # I
        else:
            self.n_channels = part.n_kv_heads * part.head_dim  # Nkv, of k and of v
            self.n_scores = self.n_channels // 2 + self.n_channels  # rotary pairs, values
        self.c = 0  # how many channels a forward keeps now; 0: dense
        self.sharded = part.sharded()
        self.P = self.Q = self.ranks = None  # of svd: set_factors()
        self.rows = self.score_sums = None  # how many rows were measured, and the sum of their scores: forget()
        self.forget()
        self.fixed = None  # what fix() chose: KeepMLP, KeepAttention or SkipQueries
        self.selections = None  # watch() puts a list here: select() appends what it is given and what it keeps

    @property
    def no_queries(self):
        """Whether this is an attention whose sparse rows make keys and values only: attn_sparsity = 1."""
        return not self.is_mlp and self.ratio == 1

    def measures(self):
        """True for the kinds whose channels are measured in dense steps and then fixed."""
        return self.kind in ("measured", "energy")

    def forget(self):
        """Zeros for what dense steps add up."""
        if not self.measures():
            return
        w = self.part.main_weight()
        n = self.n_scores
        if self.kind == "energy" and not self.is_mlp:
            n = len(w)  # energies of q, k and v: pairs are scored when they are chosen
        high = torch.promote_types(w.dtype, torch.float32)
        self.rows = torch.zeros(1, dtype=high, device=w.device)
        self.score_sums = torch.zeros(n, dtype=high, device=w.device)

    @property
    def map(self):
        """(U (D, r), V (r, D), b (D,)) of what is dropped, or None."""
        if isinstance(self.fixed, (KeepMLP, SkipQueries)):
            return self.fixed.map
        return None

    def rank_of_map(self):
        """The rank of the map that stands in, 0: none. Also before it is fitted."""
        if self.kind != "measured" or not self.c or not (self.is_mlp or self.no_queries):
            return 0
        return min(self.map_rank, self.part.main_weight().shape[1])

    # ---- measuring

    def see_mlp(self, h, dh):
        """h and its gradient dh (n, I) of a dense step's context rows."""
        if not self.measures():
            return
        self.rows += len(h)
        if self.kind == "energy":
            self.score_sums += energy(h)
            return
        high = self.score_sums.dtype
        self.score_sums += taylor_mlp(h.to(high), dh.to(high))

    def see_attention(self, y, dy):
        """What a dense step's context rows would lose of q, k, v, side by side, and the gradients: (n, Nq + 2 Nkv)."""
        if not self.measures():
            return
        self.rows += len(y)
        if self.kind == "measured":
            self.score_sums += taylor_attention(self.part, y, dy)
            return
        if self.part.qkv_bias is not None:
            y = y + self.part.qkv_bias  # as the oracle has it
        self.score_sums += energy(y)

    @torch.no_grad()
    def fix(self):
        """Chooses the channels from what was measured. A map is fitted after that: fit_maps."""
        if self.is_mlp:
            self.set_fixed(top(self.score_sums, self.c))
            return
        if self.no_queries:
            self.set_fixed()
            return
        scores = self.score_sums
        if self.kind == "energy":
            scores = attention_scores(self.part, scores)
        self.set_fixed(*top_attention(self.part, scores, self.c))

    def set_fixed(self, *channels):
        """Fixes these channels, of an MLP or of k and of v; none where there are no queries. Copying the kept rows out
        once turns every sparse product into a plain matmul of fixed shape, for c / N of the weight's memory (of a
        packed weight's four times as much): worth it up to a half. A weight that is sharded over ranks has no rows to
        copy."""
        copy = 2 * self.c <= self.n_channels and not self.sharded
        if self.is_mlp:
            self.fixed = keep_mlp(self.part, *channels, copy)
        elif self.no_queries:
            self.fixed = SkipQueries()
        else:
            self.fixed = keep_attention(self.part, *channels, copy)

    def set_map(self, fitted):
        """fitted: (U, V, b), of any type and anywhere."""
        like = self.part.main_weight()
        self.fixed = self.fixed._replace(map=tuple(t.to(like.device, like.dtype) for t in fitted))

    def set_factors(self, pairs):
        """svd. pairs: (P, Q) of each of the part's weights, q, k, v or gate, up. Puts all P side by side, so that the
        estimate is one thin product."""
        like = self.part.main_weight()
        Ps = [P for P, _ in pairs]
        self.P = torch.cat(Ps, 1).to(like.device, like.dtype)  # (D, sum of r)
        self.ranks = [P.shape[1] for P in Ps]  # r each, less where the projection is narrower
        self.Q = [Q.to(like.device) for _, Q in pairs]  # (r, N) each, fp32
        if self.is_mlp:
            self.Q = [Q.to(like.dtype).contiguous() for Q in self.Q]  # (r, I) each
        elif self.part.qkv_bias is not None:
            with dist.whole(self.block):
                bias = self.part.qkv_bias.detach().float().clone()  # (N,)
            biases = bias.split([Q.shape[1] for Q in self.Q])
            self.Q = [torch.cat([Q, b[None]]) for Q, b in zip(self.Q, biases)]

    # ---- selecting

    def switch(self, on):
        """Sparse from now on, or dense. Channels that were measured are chosen anew where the ratio has changed."""
        self.c = 0
        if on and self.no_queries:
            self.c = self.n_channels
        elif on and self.ratio > 0:
            self.c = number_kept(self.n_channels, self.ratio)
        without = isinstance(self.fixed, SkipQueries)
        if self.c and self.fixed is not None and (self.c != self.n_kept() or self.no_queries != without):
            if not self.rows:
                raise UserError(f"the channels were fixed at {self.n_kept()} of {self.n_channels} by another run, and "
                                "this one has measured nothing: predictor.measure(model, batches) does")
            self.fix()

    def n_kept(self):
        if self.is_mlp:
            return len(self.fixed.channels)
        if isinstance(self.fixed, SkipQueries):
            return self.n_channels
        return len(self.fixed.channels[1])

    def scores(self, x):
        """x (n, D) -> one score a channel of an MLP; of an attention as attention_scores has them."""
        if self.kind == "random":
            return torch.rand(self.n_scores, generator=self.rng, device=x.device)
        if self.kind == "svd" and self.is_mlp:
            return svd_mlp(x, self.P, self.Q)
        if self.kind == "svd":
            energies = svd_attention(x, self.P, self.Q, self.ranks)
        else:  # oracle, worst
            energies = energy(self.part.activations(x))
        scores = energies
        if not self.is_mlp:
            scores = attention_scores(self.part, energies)
        if self.kind == "worst":
            return -scores
        return scores

    @torch.no_grad()
    def select(self, x):
        """x (n, D), the sparse rows -> KeepMLP, KeepAttention or SkipQueries. Nothing here waits for the device."""
        if self.measures() and self.fixed is None:
            raise UserError(f"predictor={self.kind} has measured nothing yet: call predictor.measure(model, batches) "
                            "before a sparse forward")
        if self.rank_of_map() and self.map is None:
            raise UserError("the map of the dropped channels is not fitted yet: call "
                            "predictor.fit_maps(model, batches) before a sparse forward")
        if self.measures():
            kept = self.fixed
        elif self.is_mlp:
            kept = keep_mlp(self.part, top(self.scores(x), self.c))
        else:
            kept = keep_attention(self.part, *top_attention(self.part, self.scores(x), self.c))
        if self.selections is not None:
            self.selections.append((x, kept))
        return kept

    def flops(self, n):
        """Of one estimate from n sparse rows."""
        N, D = self.part.main_weight().shape
        if self.kind in ("oracle", "worst"):
            lora = 0
            if self.is_mlp:
                lora = sum(p.numel() for p in self.part.lora_of(("gate", "up")))
            return 2 * n * (D * N + lora)
        if self.kind != "svd":
            return 0
        thin = 2 * n * D * self.P.shape[1]
        if self.is_mlp:
            return thin + 2 * n * len(self.Q[0]) * N
        return thin + sum(2 * len(q) ** 2 * (n + q.shape[1]) for q in self.Q)


# ---- the public functions ----------------------------------------------------------------------------------

def attach(model, mlp_sparsity, attn_sparsity, rank=8, kind="svd", map_rank=64, seed=0, backward_sparsity=0.0):
    """Gives every block but the last a ratio and a way to choose channels, and switches sparsity fully on.

    mlp_sparsity, attn_sparsity: a float for all blocks, or a list of n_layers floats in [0, 1), for attention [0, 1].
    rank: of the SVD. kind: one of KINDS. map_rank: of the map that `measured` fits, 0: none. backward_sparsity: as
    mlp_sparsity, the share of sparse rows without a backward, through parts whose other ratio is 0. The last block
    stays dense: only its loss rows compute anything but keys and values. Errors: UserError for an unknown kind, a bad
    ratio, no queries without a map, or attention channels dropped in a model with q/k norms, which would rescale what is
    left of a query."""
    n = len(model.blocks)
    mlp = config.ratios(mlp_sparsity, n, "mlp_sparsity")
    attn = config.ratios(attn_sparsity, n, "attn_sparsity")
    if kind not in KINDS:
        raise UserError(f"predictor = {kind!r} is none of {', '.join(KINDS)}")
    if 1 in attn and (kind != "measured" or not map_rank):
        raise UserError(f"attn_sparsity = 1 needs a map that stands in for the queries, but predictor = {kind!r} and "
                        f"map_rank = {map_rank}: set predictor = 'measured' and map_rank = 64, or a ratio below 1")
    if any(0 < ratio < 1 for ratio in attn) and model.config.qk_norm:
        raise UserError(f"attn_sparsity = {max(r for r in attn if r < 1)} cannot be used with a "
                        f"{model.config.model_type} model: its q/k norms would rescale the channels that are left; set "
                        "attn_sparsity = 0, or 1 where there are to be no queries (MLP sparsity works)")
    model.selection_rng = torch.Generator(model.embed.device).manual_seed(seed)
    backward = config.ratios(backward_sparsity, n, "backward_sparsity")
    for i, block in enumerate(model.blocks):
        for part, ratio in ((block.attn, attn[i]), (block.mlp, mlp[i])):
            part.predictor = None
            part.backward_sparsity = 0.0
            if i == n - 1:
                continue
            if ratio == 0:
                part.backward_sparsity = backward[i]
            else:
                part.predictor = Predictor(block, part, ratio, kind, map_rank, model.selection_rng)
    if kind == "svd" and predictors(model):
        made = factors(lambda: predicted_weights(model), rank)
        for name, p in predictors(model):
            p.set_factors(made[name])
    model.set_sparsity(1)


def predicted_weights(model):
    """Yields (part's name, number within the part, w (N, D)) of all weights that the SVD stands for."""
    for name, p in predictors(model):
        with dist.whole(p.block):
            for i, w in enumerate(p.part.predicted_weights()):
                yield name, i, w


def predictors(model):
    """[(name, Predictor)] of all parts that have one, in the order of the blocks: ("0.attn", ...), ("0.mlp", ...)."""
    found = []
    for i, block in enumerate(model.blocks):
        for name, part in (("attn", block.attn), ("mlp", block.mlp)):
            if part.predictor is not None:
                found.append((f"{i}.{name}", part.predictor))
    return found


def set_ratios(model, ratios):
    """Other ratios, {name: ratio}, for parts that attach() gave a predictor; a part that is not named runs
    dense. Factors and what was measured stay as they are: this is how tools.sensitivity goes through the
    parts one by one. A part whose ratio has changed needs fit_maps before a sparse forward."""
    for name, p in predictors(model):
        p.ratio = ratios.get(name, 0.0)
        p.switch(True)


def measuring(model):
    """Whether dense steps have anything to measure: the kind asks for it, and the channels are not fixed yet."""
    return any(p.measures() and p.fixed is None for _, p in predictors(model))


def rows_measured(model):
    """How many context rows were measured so far, on this rank."""
    return min(int(p.rows) for _, p in predictors(model) if p.measures())


def measure(model, batches):
    """All that dense warm-up steps would have measured, anew and in one call on these batches: a dense forward and
    backward of each, then fix() and fit_maps(). Gradients of the weights are left as they were. Sparsity is fully on
    after it."""
    for _, p in predictors(model):
        p.forget()
    measure_more(model, batches)
    fix(model)
    fit_maps(model, batches)


def measure_more(model, batches):
    """Adds to what was measured so far: a dense forward and backward of each batch. Leaves the model dense."""
    model.set_sparsity(0)
    for b in batches:
        x = model.embed.detach()[b.tokens].requires_grad_()  # (T, D): so that a model without LoRA has a backward
        torch.autograd.grad(model.loss(b, x=x, measure=True), x)


@torch.no_grad()
def fix(model):
    """The dense-to-sparse switch: adds up over ranks what was measured, so that all keep the same, chooses channels,
    copies rows, and switches sparsity fully on. fit_maps() is to follow."""
    model.set_sparsity(1)
    for _, p in predictors(model):
        if not p.measures():
            continue
        dist.all_reduce(p.rows)
        dist.all_reduce(p.score_sums)
        if not p.rows:
            raise UserError(f"predictor={p.kind} has measured nothing yet: no dense step had a context token; "
                            "set mlp_sparsity = 0 and attn_sparsity = 0 for texts without prompts")
        with dist.whole(p.block):
            p.fix()


PULL = .5  # how much of what is missing. Cosine with 0 and .5: SmolLM2 .883 and .894, Qwen 0.5B .858 and .867


@torch.no_grad()
def fit_maps(model, batches, alone=False):
    """Fits the maps of what is dropped, block after block from the first, on the context rows of these batches: see the
    head of this file. Sparsity is fully on after it. Does nothing where there is no map.

    alone: each map as if no other part were sparse, on what enters it in the dense model (tools.sensitivity).
    Costs about two dense forward passes of each batch, and six (T, D) of memory a batch."""
    if not any(p.rank_of_map() for _, p in predictors(model)):
        return
    with dist.whole(model):
        dense = [model.embed.detach()[b.tokens] for b in batches]  # (T, D) each: what enters a block, all dense
    sparse = dense  # and what enters it in the sparse model
    ropes = [model.rope(b.positions) for b in batches]
    diverged = False  # whether a block so far is sparse, and the two differ
    for block in model.blocks[:-1]:
        with dist.whole(block):
            before = dense
            dense_middle, dense = dense_halves(block, batches, ropes, before)
            diverged = diverged or any(p.ratio > 0 for p in block.predictors())
            if alone or not diverged:
                fit_attention(block, batches, ropes, before, None)
                fit_mlp(block, batches, dense_middle, None)
                sparse = dense
                continue
            fit_attention(block, batches, ropes, sparse, dense_middle)
            middle = attention_halves(block, batches, ropes, sparse)
            fit_mlp(block, batches, middle, dense)
            sparse = mlp_halves(block, batches, middle)


def dense_halves(block, batches, ropes, xs):
    """xs: what enters the block, (T, D) for each batch -> what its attention half makes of it, and its MLP half of
    that, where no row is sparse."""
    for p in block.predictors():
        p.switch(False)
    middle = attention_halves(block, batches, ropes, xs)
    out = mlp_halves(block, batches, middle)
    for p in block.predictors():
        p.switch(True)
    return middle, out


def attention_halves(block, batches, ropes, xs):
    out = []
    for x, b, rope in zip(xs, batches, ropes):
        out.append(block.attention_half(x, b, rope, last=False, measure=False, chosen={}))
    return out


def mlp_halves(block, batches, xs):
    return [block.mlp_half(x, b, last=False, measure=False, chosen={}) for x, b in zip(xs, batches)]


def fit_mlp(block, batches, middle, wanted):
    """Fits the map of one block's MLP, if it has one. middle: what enters the block's MLP half; wanted: what leaves it
    in the dense model, or None, where the map is fitted alone; (T, D) for each batch."""
    mlp, p = block.mlp, block.mlp.predictor
    if p is None or not p.rank_of_map():
        return
    kept = p.fixed.channels
    sums = Sums(middle[0])
    for i, b in enumerate(batches):
        before = middle[i][:b.n_sparse]  # (n, D)
        x = block.norm(before, block.mlp_norm)  # (n, D)
        h = mlp.activations(x)  # (n, I)
        h_dropped = h.index_fill(1, kept, 0)
        down = kernels.unpacked(mlp.down)  # only now, for the buffer holds one weight at a time
        dropped = h_dropped @ down  # E (n, D)
        missing = 0.0
        if wanted is not None:
            # What is missing even with the MLP's whole output: the blocks below, and this one's attention, left that.
            whole = dropped + h[:, kept] @ down[kept]
            lora_forward(h, whole, [(0, whole.shape[1])], mlp.lora_of(["down"]), mlp.lora_scale)
            missing = wanted[i][:b.n_sparse].to(sums.dtype) - before - whole  # (n, D)
        sums.add(x, dropped + PULL * missing, loud=h)
    sums.fit(p)


def fit_attention(block, batches, ropes, entering, wanted):
    """Fits the map of one block's attention, if its sparse rows have no queries. entering: what enters the block;
    wanted: what leaves its attention half in the dense model, or None, where the map is fitted alone; (T, D) for each
    batch."""
    p = block.attn.predictor
    if p is None or not p.rank_of_map():
        return
    sums = Sums(entering[0])
    for i, b in enumerate(batches):
        n = b.n_sparse
        x = block.norm(entering[i], block.attn_norm)  # (T, D)
        whole = block.attn(x, b, ropes[i], keep=None, measurer=None, last=False, cache=None)[:n]  # E (n, D), with LoRA
        missing = 0.0
        if wanted is not None:
            missing = wanted[i][:n].to(sums.dtype) - entering[i][:n] - whole  # (n, D)
        sums.add(x[:n], whole + PULL * missing, loud=whole)
    sums.fit(p)


class Sums:
    """What a map is fitted from: sums over context rows of w [x 1].T [x 1] and w [x 1].T E, in fp32 (fp64 for fp64)."""

    def __init__(self, x):
        """x (T, D): one like those that are to come."""
        D = x.shape[1]
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.xx = torch.zeros(D + 1, D + 1, dtype=self.dtype, device=x.device)
        self.xe = torch.zeros(D + 1, D, dtype=self.dtype, device=x.device)

    def add(self, x, to_fit, loud):
        """x and to_fit (n, D). loud (n, N): a row's weight is 1 / its norm there."""
        w = zero_where_bad(1 / torch.linalg.vector_norm(loud, dim=1, dtype=self.dtype))  # (n,)
        x1 = zero_where_bad(with_ones(x.to(self.dtype)))  # (n, D+1)
        weighted = (x1 * w[:, None]).T  # (D+1, n)
        self.xx.addmm_(weighted, x1)
        self.xe.addmm_(weighted, zero_where_bad(to_fit.to(self.dtype)))

    def fit(self, p):
        """Gives the predictor p its map. All ranks get the same."""
        dist.all_reduce(self.xx)
        dist.all_reduce(self.xe)
        try:
            p.set_map(fit_map(self.xx, self.xe, p.map_rank))
        except torch.linalg.LinAlgError:
            raise UserError("no map can be fitted to a part whose activations are 0 or not finite on all context rows: "
                            "the run has diverged before it was sparse; lower learning_rate") from None


@torch.no_grad()
def watch(model, batch):
    """Runs one sparse forward at the present ratios and returns, on the very inputs of each part, {name: {"held": the
    share of the true energy that the kept channels hold}}, of an MLP also "residual": how much of its output is
    missing, |y - y'|^2 / |y|^2, mean over the rows; "without_map": the same without the map; "loudest": the largest
    |y|^2 of a row over the median. A share near 1 - ratio means that the selection is no better than chance. An
    attention without queries drops no channels, and is not in it."""
    watched = [(name, p) for name, p in predictors(model) if not p.no_queries]
    for _, p in watched:
        p.selections = []
    try:
        model.loss(batch)
        out = {}
        for name, p in watched:
            if p.selections:
                with dist.whole(p.block):
                    out[name] = quality(p, *p.selections[-1])
        return out
    finally:
        for _, p in watched:
            p.selections = None


def watch_backward(model, batch):
    """{block: share} for the blocks with a backward_sparsity: of the gradient that comes to the sparse rows of this
    batch, |dy|^2, the share of those that have a backward; mean of attention and MLP. A forward and a backward as in
    training; LoRA's gradients are left as they were."""
    parts = [(i, part) for i, b in enumerate(model.blocks) for part in (b.attn, b.mlp) if part.skips_backward]
    if not parts:
        return {}
    for _, part in parts:
        part.loud = ()
    try:
        with torch.enable_grad():
            torch.autograd.grad(model.loss(batch), list(model.lora_parameters().values()))
        shares = {}
        for i, part in parts:
            if part.loud:
                shares.setdefault(i, []).append(float(part.loud[1]))
        return {i: sum(s) / len(s) for i, s in shares.items()}
    finally:
        for _, part in parts:
            part.loud = None


def quality(p, x, kept):
    """One part's entry of watch(). x (n, D): its sparse rows."""
    part = p.part
    true = part.activations(x)  # (n, N)
    energies = energy(true)
    if not p.is_mlp:
        heads = (part.n_heads, part.n_kv_heads, part.n_kv_heads)
        of_qkv = energies.split([h * part.head_dim for h in heads])
        shares = []
        for e, channels in zip(of_qkv, kept.channels):
            shares.append(e[channels].sum() / e.sum())
        return {"held": float(torch.stack(shares).mean())}
    down = kernels.unpacked(part.down)  # (I, D)
    size = (true @ down).float().square().sum(1)  # (n,)
    found = {
        "held": float(energies[kept.channels].sum() / energies.sum()),
        "loudest": float(size.max() / size.median())}
    dropped = true.index_fill(1, kept.channels, 0) @ down  # (n, D)
    missing = dropped
    if kept.map is not None:
        U, V, b = kept.map
        missing = dropped - (x @ U @ V + b)

    def share(y):
        return float((y.float().square().sum(1) / size).mean())

    return dict(found, residual=share(missing), without_map=share(dropped))


# ---- to save and to go on ----------------------------------------------------------------------------------

def state(model):
    """{name: tensor} of all that was measured so far, or chosen: "0.mlp.sums.rows" and "0.mlp.sums.scores" before
    fix(), "0.mlp.channels.0", "0.mlp.map.0" after it. The tensors are the predictors' own."""
    out = {}
    for name, p in predictors(model):
        if not p.measures():
            continue
        if p.fixed is None:
            out[f"{name}.sums.rows"] = p.rows
            out[f"{name}.sums.scores"] = p.score_sums
            continue
        channels = [p.fixed.channels]
        if not p.is_mlp:
            # () where there are no queries
            channels = p.fixed.channels[1:]  # those of k and v say all
        out.update({f"{name}.channels.{i}": t for i, t in enumerate(channels)})
        out.update({f"{name}.map.{i}": t for i, t in enumerate(p.map or ())})
    return out


@torch.no_grad()
def load_state(model, tensors, first_rank=True):
    """Takes what state() gave, of a model with the same ratios, kind and ranks. Sums are over all ranks: only the first
    one takes them."""
    for name, p in predictors(model):
        channels = tensors_of(tensors, f"{name}.channels.")
        fitted = tensors_of(tensors, f"{name}.map.")
        rows = tensors.get(f"{name}.sums.rows")
        if channels or fitted:
            device = p.part.main_weight().device
            if channels:
                p.c = len(channels[0])
            with dist.whole(p.block):
                p.set_fixed(*(c.to(device) for c in channels))
            if fitted:
                p.set_map(fitted)
        elif first_rank and rows is not None:
            p.rows.copy_(rows)
            p.score_sums.copy_(tensors[f"{name}.sums.scores"])


def tensors_of(tensors, start):
    """Those whose name starts so, in order."""
    return [tensors[name] for name in sorted(tensors) if name.startswith(start)]
