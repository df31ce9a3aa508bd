"""Writing text: prompts as a batch, the cache of keys and values, sampling, and the loop over tokens. A model here is
what has hidden(batch, cache), decode(tokens, cache), head, config, device and dtype.
"""
import torch

import data
from config import UserError


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature, top_p, stop, seed, stream):
    """model.LLaMA.generate, which says what its arguments are."""
    if not prompts:
        return []
    if min(map(len, prompts)) == 0:
        raise UserError("a prompt of no tokens cannot be continued: give at least one token")
    rng = torch.Generator(model.device).manual_seed(seed)
    out = [[] for _ in prompts]
    lanes = list(range(len(prompts)))  # prompt numbers of the cache's rows
    ended = set()  # prompt numbers
    cache = KVCache(model, prompts, max_new_tokens)
    x = model.hidden(prompt_batch(prompts, model.device), cache)  # (B, D): each prompt's last row
    for step in range(max_new_tokens):
        new = sample(x @ model.head.T, temperature, top_p, rng).tolist()
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
        x = model.decode(torch.tensor(new, device=model.device), cache)
    return out


def prompt_batch(prompts, device):
    """B lists of ids -> a data.Batch of all their tokens, the last of each first: the rows that the last block and
    the head go on with."""
    lengths = [len(p) for p in prompts]
    B, S = len(prompts), max(lengths)
    at = [(i, n - 1) for i, n in enumerate(lengths)]
    at += [(i, j) for i, n in enumerate(lengths) for j in range(n - 1)]  # (prompt, position) of each row
    tokens = torch.tensor([prompts[i][j] for i, j in at], device=device)
    positions = torch.tensor([j for _, j in at], device=device)
    places = torch.tensor([i * S + j for i, j in at], device=device)
    return data.Batch(tokens, None, None, positions, places, 0, slice(0, B), lengths)


def at_once(model, tokens):
    """How many texts of up to so many tokens, prompt and answer, are written together: as many as keep their
    keys and values under 2 GB, at most 128. (With 456 tokens, 128 would take 7.7 GB in LLaMA-3-8B and 48 in
    LLaMA-2-13B.)"""
    c = model.config
    a_token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * model.dtype.itemsize  # bytes
    return max(1, min(128, 2 * 10**9 // (a_token * tokens)))


class KVCache:
    """Keys and values of B texts of different lengths, each text's at its own positions 0 .. length - 1."""

    def __init__(self, model, prompts, max_new_tokens):
        # (B,), also the next token's position
        self.lengths = torch.tensor([len(p) for p in prompts], device=model.device)
        self.lanes = torch.arange(len(prompts), device=model.device)  # (B,)
        self.size = max(map(len, prompts))  # positions in use by the longest
        self.capacity = self.size + max_new_tokens
        # positions that a token looks back on
        self.blocks = [BlockCache(self, window or self.capacity) for window in model.config.windows]

    def advance(self):
        """Makes room for one more token of each text."""
        self.write, self.lengths, self.size = self.lengths, self.lengths + 1, self.size + 1
        back = self.write[:, None] - torch.arange(self.size, device=self.lengths.device)  # (B, size)
        self.masks = {window: ((back >= 0) & (back < window))[:, None, None]  # (B, 1, 1, size)
                      for window in {b.window for b in self.blocks}}

    def select(self, alive):
        """Goes on with these texts only. alive: their numbers among the present ones."""
        idx = torch.tensor(alive, device=self.lanes.device)
        self.lengths, self.lanes = self.lengths[idx], self.lanes[:len(alive)]
        for b in self.blocks:
            b.k, b.v = b.k.index_select(0, idx), b.v.index_select(0, idx)


class BlockCache:
    """One block's part of a KVCache: k and v (B, K, capacity, hd)."""

    def __init__(self, owner, window):
        self.owner, self.window = owner, window

    def fill(self, k, v):
        """k, v (B, K, S, hd) of the prompts."""
        B, K, S, hd = k.shape
        self.k, self.v = (k.new_zeros(B, K, self.owner.capacity, hd),
                          v.new_zeros(B, K, self.owner.capacity, hd))
        self.k[:, :, :S], self.v[:, :, :S] = k, v

    def append(self, k, v):
        """k, v (B, K, hd) of one new token each -> all keys and values in use, (B, K, size, hd)."""
        o = self.owner
        self.k[o.lanes, :, o.write], self.v[o.lanes, :, o.write] = k, v
        return self.k[:, :, :o.size], self.v[:, :, :o.size]

    @property
    def lanes(self):
        return self.owner.lanes

    @property
    def mask(self):
        return self.owner.masks[self.window]


def sample(logits, temperature, top_p, rng):
    """logits (B, V) -> ids (B,). temperature 0: the likeliest; else drawn from the smallest set of tokens
    that holds top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    p, ids = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # the first token always stays
    return ids.gather(1, torch.multinomial(p, 1, generator=rng))[:, 0]
