"""LLaMA, written out: weights from a Hugging Face directory or hub id, LoRA, generation with a KV cache,
adapters in PEFT's format. (How files are read, what a cache holds and how FLOPs are counted:
lib/architecture.py, checkpoint.py, generate.py, flops.py.)

    block:  x += attention(norm(x));  x += mlp(norm(x))
            norm: RMSNorm; attention: RoPE, grouped queries; mlp: SwiGLU

    T rows of the batch's stream    D model width    H query heads    K key/value heads    hd head dim
    Nq = H hd, Nkv = K hd    I MLP width    V vocabulary    L blocks    R LoRA rank    B examples
    S longest example    n sparse rows

A batch is a stream of T real tokens, without padding, in the order that data.collate gives them (sparse rows
first). Everything but attention runs on these rows; attention alone needs the order of the text, so q, k, v
are scattered into a (B, S) grid and back. After the last block's keys and values nothing reads a context row
any more: its query, output projection and MLP, the final norm and the head run on the loss rows only.

Weights are stored as sparse.py wants them, sparse axis first, q/k/v fused and gate/up fused:

    attn.qkv (Nq + 2 Nkv, D)    attn.o (Nq, D): transposed
    mlp.gate_up (2 I, D)        mlp.down (I, D): transposed

Memory of LLaMA-3-8B: 8.03 G weights of 2 bytes = 16.06 GB, streamed from the shards tensor by tensor to their
place. LoRA of r = 32 on q, k, v, o: 27 M weights, 4 bytes each, and twice that for AdamW.
"""
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import kernels
import sparse
from config import UserError
from lib.architecture import ModelConfig
from lib.files import (load_weights, read_adapter, resolve, weight_files, write_safetensors,
                              write_text)
from lib.flops import flops_by_part
from lib.generate import KVCache, prompt_batch, sample

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
        self.channels = None  # the kept channels of the last forward, None when dense

    def pairs(self, targets):
        """[(target, A, B)] of those targets that have LoRA."""
        return [(t, self.lora[t + "/A"], self.lora[t + "/B"]) for t in targets if t + "/A" in self.lora]

    def select(self, x, n):
        """x (T, D), n sparse rows -> what to keep of this part in this forward: None (all),
        KeepMLP or KeepAttention."""
        keep = self.predictor.select(x[:n]) if self.predictor is not None and self.predictor.c and n else None
        self.channels = None if keep is None else keep.channels
        return keep

    def energy_buffer(self, n):
        """Where this forward adds its true energies, with predictor "measured" in a dense training step, and
        the next sparse one chooses anew; else None."""
        if self.predictor is None or not self.predictor.measures() or not n:
            return None
        self.predictor.fresh = True
        return self.predictor.energies

    def sharded(self):
        """True where FSDP has cut the frozen weights up over ranks."""
        return any(hasattr(p, "full_tensor") for p in self.parameters(recurse=False))


class Attention(Part):
    def __init__(self, c, **kw):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim, self.eps = (
            c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rms_norm_eps)
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        self.qkv = weight(q + 2 * kv, c.hidden_size, **kw)
        self.qkv_bias = weight(q + 2 * kv, **kw) if c.qkv_bias else None
        self.o = weight(q, c.hidden_size, **kw)
        self.q_norm = weight(self.head_dim, **kw) if c.qk_norm else None
        self.k_norm = weight(self.head_dim, **kw) if c.qk_norm else None
        self.spans = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}

    def project(self, x, lo, hi, keep=None, n=0):
        """x (T, D) -> (T, hi - lo): rows lo:hi of the fused weight, with the LoRA of the projections that
        lie in them."""
        whole = (lo, hi) == (0, self.qkv.shape[0])
        w = self.qkv if whole else self.qkv[lo:hi]
        b = self.qkv_bias if whole or self.qkv_bias is None else self.qkv_bias[lo:hi]
        pairs = self.pairs([t for t, (a, z) in self.spans.items() if lo <= a and z <= hi])
        spans = [(self.spans[t][0] - lo, self.spans[t][1] - lo) for t, _, _ in pairs]
        y = sparse.ProjectOut.apply(x, w, b, keep and keep.qkv, n, self.lora_scale, spans,
                                    *[p for _, A, B in pairs for p in (A, B)])
        return y if self.q_norm is None else self.norm_heads(y, lo, hi)

    def norm_heads(self, y, lo, hi):
        """qwen3: RMSNorm of each query and each key head. y (T, hi - lo)."""
        out = []
        for t, w in (("q", self.q_norm), ("k", self.k_norm), ("v", None)):
            a, z = self.spans[t]
            if lo <= a and z <= hi:
                part = y[:, a - lo:z - lo].view(len(y), -1, self.head_dim)  # (T, heads, hd)
                out.append(
                    (part if w is None else F.rms_norm(part, (self.head_dim,), w, self.eps)).flatten(1))
        return torch.cat(out, 1)

    def output(self, x, keep=None, n=0):
        """x (T, Nq) -> (T, D)."""
        pairs = self.pairs(["o"])
        spans = [(0, self.o.shape[1])] * len(pairs)
        return sparse.ProjectIn.apply(x, self.o, keep and keep.o, n, self.lora_scale, spans,
                                      *[p for _, A, B in pairs for p in (A, B)])

    def grid(self, y, batch, rope, rows, heads, n_rot):
        """y (T', sum(heads) hd) -> one (B, h, S, hd) for each h of heads: the first n_rot heads rotated, each
        row at its place, zeros elsewhere."""
        return sparse.RopeScatter.apply(y, rope[0][rows], rope[1][rows], batch.rows[rows], n_rot,
                                        self.head_dim, batch.shape, heads)

    def forward(self, x, batch, rope, keep, energies, last, cache):
        """x (T, D) -> (T, D), in the last block (T_loss, D). rope: cos, sin (T, hd/2). keep: KeepAttention or
        None. energies: += those of the context rows, (Nq + 2 Nkv,), or None. last: of the last block. cache:
        a BlockCache to fill (generation), or None."""
        H, K, N = self.n_heads, self.n_kv_heads, self.qkv.shape[0]
        n, every, wanted = batch.n_sparse, slice(0, len(x)), batch.loss if last else slice(0, len(x))
        if last:  # queries for the loss rows only
            q, = self.grid(self.project(x[wanted], 0, H * self.head_dim), batch, rope, wanted, (H,), H)
            k, v = self.grid(self.project(x, H * self.head_dim, N), batch, rope, every, (K, K), K)
        else:
            y = self.project(x, 0, N, keep, n)  # (T, N)
            if energies is not None:
                energies += sparse.energy(y[:n].detach())
            q, k, v = self.grid(y, batch, rope, every, (H, K, K), H + K)  # (B, H, S, hd), twice (B, K, S, hd)
        if cache is not None:
            cache.fill(k, v)
        a = attend(q, k, v, batch.lengths)  # (B, H, S, hd)
        # (T or T_loss, Nq)
        a = sparse.Gather.apply(a.transpose(1, 2).flatten(2).flatten(0, 1), batch.rows[wanted])
        return self.output(a, None if last else keep, n)

    def decode(self, x, rope, cache):
        """One new token for each of B texts: x (B, D) -> (B, D). cache: this block's keys and values."""
        H, K, hd, B = self.n_heads, self.n_kv_heads, self.head_dim, len(x)
        y = self.project(x, 0, self.qkv.shape[0])
        y = kernels.rope_scatter(y, *rope, cache.lanes, H + K, hd, B).view(B, -1, hd)  # (B, H + 2 K, hd)
        k, v = cache.append(y[:, H:H + K], y[:, H + K:])  # (B, K, S, hd)
        # the G query heads of a group stand in for query positions: no key or value is repeated
        q = y[:, :H].view(B, K, H // K, hd)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=cache.mask)  # (B, K, G, hd)
        return self.output(a.reshape(B, H * hd))

    def activations(self, x):
        """The true q, k, v of x (n, D), LoRA and bias included: (n, Nq + 2 Nkv)."""
        return self.project(x, 0, self.qkv.shape[0])

    def fused(self):
        return self.qkv

    def predicted_weights(self):
        return [self.qkv[lo:hi] for lo, hi in self.spans.values()]


def attend(q, k, v, lengths):
    """Causal attention, q (B, H, S, hd), k and v (B, K, S, hd). Rows behind an example's end are zero and
    come later: no mask."""
    if q.device.type == "cpu":
        return sparse.CausalAttention.apply(q, k, v, lengths)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


class MLP(Part):
    def __init__(self, c, **kw):
        super().__init__()
        self.gate_up = weight(2 * c.intermediate_size, c.hidden_size, **kw)
        self.down = weight(c.intermediate_size, c.hidden_size, **kw)

    def lora_six(self):
        return [self.lora[f"{t}/{m}"] if f"{t}/{m}" in self.lora else None
                for t in ("gate", "up", "down") for m in "AB"]

    def forward(self, x, n=0, keep=None, energies=None):
        """x (T, D) -> (T, D)."""
        return sparse.SwiGLU.apply(x, self.gate_up, self.down, keep, n, self.lora_scale, energies,
                                   *self.lora_six())

    def activations(self, x):
        """The true h = silu(g) u of x (n, D): (n, I)."""
        return sparse.mlp_hidden(x, self.gate_up, None, sparse.kept_lora(self.lora_six(), None, x.dtype),
                                 self.lora_scale)[2]

    def fused(self):
        return self.gate_up

    def predicted_weights(self):
        return list(self.gate_up.chunk(2))


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
        return F.rms_norm(x, w.shape, w, self.eps)

    def forward(self, x, batch, rope, last, chosen, cache=None):
        """x (T, D) -> (T, D), in the last block (T_loss, D). chosen: a Chosen, where a forward writes its
        channels and a recomputation reads them, so that it keeps the same and measures nothing twice."""
        n = batch.n_sparse
        h = self.norm(x, self.attn_norm)
        keep, energies = self.choose("attn", h, n, chosen)
        a = self.attn(h, batch, rope, keep, energies, last, cache)
        if last:
            x, n = x[batch.loss], 0
        x = x + a
        h = self.norm(x, self.mlp_norm)
        return x + self.mlp(h, n, *self.choose("mlp", h, n, chosen))

    def choose(self, name, h, n, chosen):
        """-> (what part `name` keeps for its normed input h (T, D), the buffer for its true energies or
        None); both only once a step."""
        if name in chosen:
            return chosen[name], None
        part = getattr(self, name)
        chosen[name] = part.select(h, n)
        return chosen[name], part.energy_buffer(n)

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
        self.config, self.dtype, self.recompute, self.frequencies = c, dtype, False, None
        self.embed = weight(c.vocab_size, c.hidden_size, **kw)
        self.blocks = nn.ModuleList(Block(c, **kw) for _ in range(c.num_hidden_layers))
        self.final_norm = weight(c.hidden_size, **kw)
        self.head = self.embed if c.tie_word_embeddings else weight(c.vocab_size, c.hidden_size, **kw)
        self.lora_r = self.lora_alpha = 0
        self.lora_targets = ()
        if torch.device(device).type != "meta":
            self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Matrices normal with 1 / sqrt(inputs), embeddings with .02; norms 1, biases 0."""
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(0.0 if "bias" in name else 1.0)
            else:
                inputs = p.shape[0] if name.endswith((".o", ".down")) else p.shape[1]
                p.normal_(0, .02 if name in ("embed", "head") else inputs ** -.5)

    @property
    def device(self):
        return self.embed.device

    # ---- weights in and out

    def named_sources(self):
        """{Hugging Face name: (parameter, first row, rows, transposed)}: where each tensor of a checkpoint
        lies in ours. The one table for reading and writing weights."""
        c, out = self.config, {}
        Nq, inner = c.num_attention_heads * c.head_dim, c.intermediate_size
        for i, b in enumerate(self.blocks):
            at, a, m = f"model.layers.{i}.", b.attn, b.mlp
            for t, (lo, hi) in a.spans.items():
                out[f"{at}self_attn.{t}_proj.weight"] = (a.qkv, lo, hi - lo, False)
                if a.qkv_bias is not None:
                    out[f"{at}self_attn.{t}_proj.bias"] = (a.qkv_bias, lo, hi - lo, False)
            out[at + "self_attn.o_proj.weight"] = (a.o, 0, Nq, True)
            if a.q_norm is not None:
                out[at + "self_attn.q_norm.weight"] = (a.q_norm, 0, c.head_dim, False)
                out[at + "self_attn.k_norm.weight"] = (a.k_norm, 0, c.head_dim, False)
            out[at + "mlp.gate_proj.weight"] = (m.gate_up, 0, inner, False)
            out[at + "mlp.up_proj.weight"] = (m.gate_up, inner, inner, False)
            out[at + "mlp.down_proj.weight"] = (m.down, 0, inner, True)
            out[at + "input_layernorm.weight"] = (b.attn_norm, 0, c.hidden_size, False)
            out[at + "post_attention_layernorm.weight"] = (b.mlp_norm, 0, c.hidden_size, False)
        out["model.embed_tokens.weight"] = (self.embed, 0, c.vocab_size, False)
        out["model.norm.weight"] = (self.final_norm, 0, c.hidden_size, False)
        if self.head is not self.embed:
            out["lm_head.weight"] = (self.head, 0, c.vocab_size, False)
        return out

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu", shard=None):
        """path: a directory or a hub id with config.json and safetensors. Tensors are streamed from the files
        straight to their place: never more than the model and one tensor. shard: called on the model while it
        has no storage yet (FSDP). UserError: no such model, an architecture that is not written here, files
        that are missing, damaged or do not fit config.json."""
        folder = resolve(path)
        config = ModelConfig.from_dir(folder)
        files = weight_files(folder)
        model = cls(config, dtype, "meta")
        if shard is not None:
            shard(model)
        model.to_empty(device=device)
        if config.tie_word_embeddings:
            model.head = model.embed
        load_weights(model, files)
        return model.eval()

    def save_pretrained(self, path, notes=None):
        """Writes config.json and model.safetensors as transformers reads them, in the model's dtype, and
        makes path if need be. notes: {str: str}, kept in the weights' file (data.notes)."""
        Path(path).mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, (p, lo, rows, transposed) in self.named_sources().items():
            t = p.detach()[lo:lo + rows]
            tensors[name] = (t.T if transposed else t).contiguous().cpu()
        write_safetensors(Path(path) / "model.safetensors", tensors, {"format": "pt", **(notes or {})})
        raw = {k: v for k, v in self.config.raw.items() if k != "dtype"}  # transformers 5's name for it
        raw["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        write_text(Path(path) / "config.json", json.dumps(raw, indent=2) + "\n")

    def train_all(self):
        """All weights get gradients: lora_r = 0."""
        for p in self.parameters():
            p.requires_grad_(True)

    # ---- LoRA

    def add_lora(self, r, alpha, targets=("q", "k", "v", "o"), rslora=False):
        """Adapters of rank r, scaled by alpha / r (alpha / sqrt(r) with rslora), on targets (a list or
        "q,k,v,o"). A Kaiming-uniform as in PEFT, B zero; fp32 (fp64 in an fp64 model). Errors: an unknown
        target, r not positive."""
        targets = [t.strip() for t in targets.split(",")] if isinstance(targets, str) else list(targets)
        unknown = [t for t in targets if t not in TARGETS]
        if unknown or not targets or r <= 0:
            raise UserError(f"LoRA of rank {r} on {unknown or targets}: the rank must be positive and "
                            f"targets some of {','.join(TARGETS)}")
        dtype = torch.promote_types(self.dtype, torch.float32)
        self.lora_r, self.lora_alpha, self.lora_targets, self.rslora = (
            r, alpha, tuple(t for t in TARGETS if t in targets), rslora)
        c = self.config
        Nq, Nkv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        D, inner = c.hidden_size, c.intermediate_size
        shape = dict(q=(D, Nq), k=(D, Nkv), v=(D, Nkv), o=(Nq, D), gate=(D, inner), up=(D, inner),
                     down=(inner, D))
        for b in self.blocks:
            b.attn.lora_scale = b.mlp.lora_scale = alpha / (math.sqrt(r) if rslora else r)
            for t in self.lora_targets:
                n_in, n_out = shape[t]
                bound = 1 / math.sqrt(n_in)  # kaiming_uniform_ with a = sqrt(5)
                part = b.attn if t in "qkvo" else b.mlp
                part.lora[t + "/A"] = nn.Parameter(
                    torch.empty(r, n_in, dtype=dtype).uniform_(-bound, bound).to(self.device))
                part.lora[t + "/B"] = nn.Parameter(torch.zeros(n_out, r, dtype=dtype, device=self.device))

    def lora_parameters(self):
        """{PEFT's name: Parameter}."""
        out = {}
        for i, b in enumerate(self.blocks):
            for t in self.lora_targets:
                lora = (b.attn if t in "qkvo" else b.mlp).lora
                for m in "AB":
                    out[f"base_model.model.model.layers.{i}.{TARGETS[t]}.lora_{m}.weight"] = lora[f"{t}/{m}"]
        return out

    def lora_state(self, grads=False):
        """{PEFT's name: tensor}: the adapter's weights, or their gradients (zeros where there
        is none yet)."""
        if grads:
            return {k: torch.zeros_like(p) if p.grad is None else p.grad
                    for k, p in self.lora_parameters().items()}
        return {k: p.detach() for k, p in self.lora_parameters().items()}

    @torch.no_grad()
    def load_lora(self, state):
        """state: {PEFT's name: tensor} for exactly the adapters that add_lora made. UserError: others,
        or other shapes."""
        own = self.lora_parameters()
        odd = sorted(own.keys() ^ state.keys())
        if odd:
            raise UserError(f"the adapter and LoRA on {','.join(self.lora_targets)} of {len(self.blocks)} "
                            f"blocks disagree about {len(odd)} tensors, {odd[0]} first")
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
        state = {k: v.cpu().contiguous() for k, v in self.lora_state().items()}
        write_safetensors(Path(path) / "adapter_model.safetensors", state, {"format": "pt", **(notes or {})})
        write_text(Path(path) / "adapter_config.json", json.dumps(config, indent=2) + "\n")

    # ---- forward

    def set_sparsity(self, scale):
        """The one switch: 0 dense, 1 the attached ratios, between them all ratios times scale."""
        for b in self.blocks:
            for part in (b.attn, b.mlp):
                if part.predictor is not None:
                    part.predictor.set_scale(float(scale))

    def rope(self, positions):
        """cos and sin (T, hd/2) of positions (T,), in fp32 (fp64 in an fp64 model)."""
        high = torch.promote_types(self.dtype, torch.float32)
        # made once: a copy from the host in every step would wait for the device
        if self.frequencies is None:
            # (hd/2,)
            self.frequencies = inverse_frequencies(self.config).to(device=positions.device, dtype=high)
        angles = positions.to(high)[:, None] * self.frequencies
        return angles.cos(), angles.sin()

    def hidden(self, batch, cache=None, x=None, first=0):
        """batch -> the final norm's output on the loss rows, (T_loss, D). x (T, D): go on from block `first`
        with this input of it."""
        window = self.config.sliding_window
        if window and batch.shape[1] > window:
            raise UserError(f"a text of {batch.shape[1]} tokens is longer than the model's sliding window of "
                            f"{window}: lower max_seq_len")
        rope = self.rope(batch.positions)
        x = F.embedding(batch.tokens, self.embed) if x is None else x  # (T, D)
        for i, block in enumerate(list(self.blocks)[first:], first):
            args = (x, batch, rope, i == len(self.blocks) - 1, Chosen(), cache and cache.blocks[i])
            # nothing here draws random numbers, so their state need not be kept
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*args)
        return F.rms_norm(x, self.final_norm.shape, self.final_norm, self.config.rms_norm_eps)

    def loss(self, batch, x=None, first=0):
        """batch (data.Batch, on the model's device) -> the weighted sum of the loss over its loss rows, a
        scalar in fp32; the training loop divides by the sum of weights. Obeys set_sparsity alone, in training
        mode or not. x, first: as for hidden. UserError: sparse with "measured" before any dense step in
        training mode, or a text longer than the sliding window."""
        x = self.hidden(batch, None, x, first)
        head = self.head if torch.is_grad_enabled() else self.head.detach()
        return sparse.CrossEntropy.apply(x, head, batch.targets, batch.weights)

    @torch.no_grad()
    def logits(self, tokens):
        """tokens (B, S) int64, right-padded -> logits (B, S, V). Always dense."""
        B, S = tokens.shape
        rows = torch.arange(B * S, device=tokens.device)
        batch = SimpleNamespace(tokens=tokens.flatten(), positions=rows % S, rows=rows, n_sparse=0,
                                loss=slice(0, B * S), shape=(B, S), lengths=[S] * B)
        return (self.hidden(batch) @ self.head.T).view(B, S, -1)  # no sparse rows: dense at any set_sparsity

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=0.0, top_p=1.0, stop=None, seed=0, stream=None):
        """prompts: lists of token ids, of any lengths -> lists of new ids, without the one that ended
        them. Always dense.

        temperature 0 is greedy; top_p keeps the likeliest tokens that hold that share. stop: ids that end a
        text (default: all of the checkpoint's eos_token_id). stream: called with a list of (prompt number,
        token) after each step."""
        if not prompts:
            return []
        if min(map(len, prompts)) == 0:
            raise UserError("a prompt of no tokens cannot be continued: give at least one token")
        stop = set(self.config.eos_token_id if stop is None else stop)
        rng = torch.Generator(self.device).manual_seed(seed)
        # lanes: prompt numbers of the cache's rows
        out, lanes = [[] for _ in prompts], list(range(len(prompts)))
        ended = set()  # prompt numbers
        cache = KVCache(self, prompts, max_new_tokens)
        x = self.hidden(prompt_batch(prompts, self.device), cache)  # (B, D): each prompt's last row
        for step in range(max_new_tokens):
            new = sample(x @ self.head.T, temperature, top_p, rng).tolist()
            ended.update(lane for lane, t in zip(lanes, new) if t in stop)
            alive = [j for j, lane in enumerate(lanes) if lane not in ended]
            for j in alive:
                out[lanes[j]].append(new[j])
            if stream is not None:
                stream([(lanes[j], new[j]) for j in alive])
            if not alive or step == max_new_tokens - 1:
                break
            if len(alive) <= .75 * len(lanes):  # ended texts leave the batch, in few copies of the cache
                cache.select(alive)
                lanes, new = [lanes[j] for j in alive], [new[j] for j in alive]
            x = self.decode(torch.tensor(new, device=self.device), cache)
        return out

    def decode(self, tokens, cache):
        """tokens (B,), the next of each text -> the final norm's output (B, D)."""
        rope = self.rope(cache.lengths)
        cache.advance()
        x = F.embedding(tokens, self.embed)
        for block, kv in zip(self.blocks, cache.blocks):
            x = block.decode(x, rope, kv)
        return F.rms_norm(x, self.final_norm.shape, self.final_norm, self.config.rms_norm_eps)

    # ---- counting

    def flops(self, batch):
        """(dense, sparse): FLOPs of one training step of this batch, forward and backward, at the present
        set_sparsity (lib/flops.py)."""
        return tuple(sum(flops_by_part(self, batch, on).values()) for on in (False, True))


# ---- adapters in PEFT's format -----------------------------------------------------------------------------

def load_adapter(model, path):
    """Gives the model the adapter in path, written by save_adapter or by PEFT: add_lora and load_lora in
    one. Which targets it has is read off its tensors' names, for target_modules may be a list, full names
    or a regex."""
    c, state = read_adapter(path)
    blocks = {int(i) for k in state for i in re.findall(r"\.layers\.(\d+)\.", k)}
    if blocks and max(blocks) >= len(model.blocks):
        raise UserError(f"the adapter in {path} is for another base: it has {max(blocks) + 1} blocks, "
                        f"this one {len(model.blocks)}")
    targets = [t for t, name in TARGETS.items() if any(f".{name}.lora_" in k for k in state)]
    if not targets:
        raise UserError(f"the adapter in {path} changes none of {', '.join(TARGETS)}: "
                        f"{sorted(state)[:1]} cannot be read")
    model.add_lora(c["r"], c["lora_alpha"], targets, bool(c.get("use_rslora")))
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
