"""What a checkpoint's config.json says of its architecture, checked: whatever model.py cannot express is
refused here, in one sentence.
"""
from dataclasses import dataclass, field
from pathlib import Path

from config import UserError
from lib.files import read_json

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# What each kind of RoPE scaling has to say
NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass
class ModelConfig:
    """The fields of config.json that matter here, under Hugging Face's names; raw is the whole file."""
    model_type: str
    vocab_size: int
    hidden_size: int  # D
    intermediate_size: int  # I
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # K
    head_dim: int  # hd
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict  # {} where RoPE is not scaled
    tie_word_embeddings: bool
    qkv_bias: bool  # qwen2
    qk_norm: bool  # qwen3
    windows: tuple  # of each block, how many positions attention looks back on; 0: all
    eos_token_id: tuple  # all ids that end a text
    raw: dict = field(repr=False, default_factory=dict)

    @staticmethod
    def from_dict(c, where="config.json"):
        """c: config.json as a dict. UserError names the field that is missing or that this
        model cannot express."""
        kind = c.get("model_type")
        if kind not in ("llama", "mistral", "qwen2", "qwen3"):
            raise UserError(f"{where}: model_type {kind!r} is not one of llama, mistral, qwen2, qwen3")
        for key in SIZES:
            positive_integer(c, key, where)
        for key in ("num_key_value_heads", "head_dim"):
            if c.get(key) is not None:
                positive_integer(c, key, where)
        biased = c.get("mlp_bias") or (c.get("attention_bias") and kind != "qwen2")
        if biased or c.get("hidden_act", "silu") != "silu":
            raise UserError(f"{where}: only SwiGLU without biases is written here "
                            f"(hidden_act={c.get('hidden_act')!r}, "
                            f"mlp_bias={c.get('mlp_bias')}, attention_bias={c.get('attention_bias')})")
        check_quantization(c.get("quantization_config"), where)
        rope = rope_parameters(c, where)
        scaling = rope
        if rope["rope_type"] == "default":
            scaling = {}
        eps = c.get("rms_norm_eps", 1e-6)
        positive_number(eps, "rms_norm_eps", where)
        heads = c["num_attention_heads"]
        kv_heads = c.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise UserError(f"{where}: num_attention_heads {heads} is no multiple of "
                            f"num_key_value_heads {kv_heads}")
        head_dim = c.get("head_dim") or c["hidden_size"] // heads
        if head_dim % 2:
            raise UserError(f"{where}: head_dim must be even for RoPE, not {head_dim}")
        return ModelConfig(
            kind,
            **{key: c[key] for key in SIZES},
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=eps,
            rope_theta=float(rope["rope_theta"]),
            rope_scaling=scaling,
            tie_word_embeddings=bool(c.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
            eos_token_id=end_ids(c, where),
            windows=windows(c, where),
            raw=c)

    @property
    def quantized(self):
        """Whether the checkpoint's projections are packed in 4 bits."""
        return bool(self.raw.get("quantization_config"))

    @property
    def sliding_window(self):
        """The narrowest block's window, 0: no block has one."""
        return min(filter(None, self.windows), default=0)

    @property
    def max_positions(self):
        """How long the texts are that it was made for; None where config.json does not say."""
        n = self.raw.get("max_position_embeddings")
        if not isinstance(n, int) or n <= 0:
            return None
        if self.rope_scaling.get("rope_type") == "linear":
            return int(n * self.rope_scaling["factor"])
        return n

    @staticmethod
    def from_dir(path):
        """Reads path/config.json, and the end-of-text ids of generation_config.json where there is one."""
        c = read_json(Path(path) / "config.json")
        generation = Path(path) / "generation_config.json"
        if generation.exists():
            ids = read_json(generation).get("eos_token_id")
            if ids is not None:
                c = {**c, "eos_token_id": ids}
        return ModelConfig.from_dict(c, f"{path}/config.json")


def positive_integer(c, key, where):
    if not isinstance(c.get(key), int) or c[key] <= 0:
        raise UserError(f"{where}: {key} must be a positive integer, not {c.get(key)!r}")


def positive_number(value, key, where, place=""):
    if not isinstance(value, (int, float)) or not value > 0:
        raise UserError(f"{where}: {key} must be a positive number, not {value!r}{place}")


def check_quantization(q, where):
    """q: config.json's quantization_config, or None. UserError: it is not bitsandbytes' NF4."""
    if not q:
        return
    if not isinstance(q, dict):
        raise UserError(f"{where}: quantization_config has to be an object, or null, not {q!r}")
    kind = q.get("quant_method", "bitsandbytes")
    if kind == "bitsandbytes":
        kind = f"bitsandbytes with {q.get('bnb_4bit_quant_type', 'fp4')}"
        if not q.get("load_in_4bit"):
            kind = "bitsandbytes with 8 bits"
    if kind != "bitsandbytes with nf4":
        raise UserError(f"{where} has a quantization_config of {kind}: of quantized weights only those of bitsandbytes "
                        "with nf4 can be read here, use the checkpoint they were made from")


def end_ids(c, where):
    """config.json's eos_token_id, an id, a list of them or null, as a tuple."""
    eos = c.get("eos_token_id")
    if eos is None:
        eos = []
    if not isinstance(eos, list):
        eos = [eos]
    if not all(isinstance(e, int) and 0 <= e < c["vocab_size"] for e in eos):
        raise UserError(f"{where}: eos_token_id has to be a token of the vocabulary of "
                        f"{c['vocab_size']}, or a list of them, not {c['eos_token_id']!r}")
    return tuple(eos)


def rope_parameters(c, where):
    """What config.json says of RoPE, as one dict with rope_type and rope_theta: in rope_parameters
    (transformers 5) or in rope_scaling and rope_theta (before). UserError: in both and they differ, by
    kind of layer, of a part of each head, or of a kind that is not written here."""
    found = []
    for key in ("rope_parameters", "rope_scaling"):
        rope = c.get(key) or {}
        if not isinstance(rope, dict) or any(isinstance(v, dict) for v in rope.values()):
            raise UserError(f"{where}: {key} has to be one object of numbers for all layers, or null, "
                            f"not {rope!r}")
        part = rope.get("partial_rotary_factor", c.get("partial_rotary_factor"))
        if part not in (None, 1):
            raise UserError(f"{where}: partial_rotary_factor is {part!r}, and only whole heads are rotated "
                            "here")
        if rope:
            found.append(complete(rope, c))
    if len(found) == 2 and found[0] != found[1]:  # transformers would take rope_scaling and the outer theta
        raise UserError(f"{where}: rope_parameters {found[0]} and rope_scaling {found[1]} differ: keep the "
                        "one that is meant, with its rope_theta, and remove the other")
    if not found:
        found = [complete({}, c)]
    rope = found[0]
    kind = rope["rope_type"]
    if kind not in list(NEEDS):  # which may be no text
        raise UserError(f"{where}: RoPE scaling of type {kind!r} is not written here (default, "
                        "linear and llama3 are)")
    for key in NEEDS[kind]:
        positive_number(rope.get(key), key, where, " (in rope_scaling)")
    positive_number(rope["rope_theta"], "rope_theta", where)
    return rope


def complete(rope, c):
    """One of config.json's two objects, with a rope_theta and a rope_type."""
    rope = {"rope_theta": c.get("rope_theta", 10000.0), "rope_type": rope.get("type", "default"), **rope}
    rope.pop("type", None)
    return rope


def windows(c, where):
    """The sliding window of each block, 0: none. All blocks of a mistral slide; of a qwen, with
    use_sliding_window, those that layer_types names, or else those from max_window_layers on."""
    L, kind = c["num_hidden_layers"], c["model_type"]
    window = None
    if kind == "mistral" or kind != "llama" and c.get("use_sliding_window"):
        window = c.get("sliding_window", 4096)
    if window is not None and (not isinstance(window, int) or window < 1):
        raise UserError(f"{where}: sliding_window has to be a whole number, not {window!r}")
    first = 0
    if kind != "mistral":
        first = c.get("max_window_layers", 28)
    if not isinstance(first, int) or first < 0:
        raise UserError(f"{where}: max_window_layers has to be a whole number, not {first!r}")
    types = None
    if kind.startswith("qwen"):
        types = c.get("layer_types")
    if not types:
        return tuple((window or 0) * (i >= first) for i in range(L))
    if len(types) != L or any(t not in ("full_attention", "sliding_attention") for t in types):
        raise UserError(f"{where}: layer_types has to name full_attention or sliding_attention for each of "
                        f"the {L} layers, not {types!r}")
    if "sliding_attention" in types and not window:
        raise UserError(f"{where}: layer_types has sliding_attention, but use_sliding_window is "
                        f"{c.get('use_sliding_window')!r} and sliding_window {c.get('sliding_window')!r}: "
                        "set them, or remove layer_types")
    return tuple((window or 0) * (t == "sliding_attention") for t in types)
