"""Every option once, with its default and what it means. `load(argv)` is the whole interface:

    python train.py config/math.py --model=DIR --max_steps=100

Config files are Python and are executed, so use only what you trust: plain assignments to the names below.
Several may follow one another; without any, config/tiny.py is taken. Then come the flags, --name=literal; of
two equal ones the last wins. A name that does not exist or a value of the wrong type is an error everywhere.
Helper names in a file begin with "_"; imported modules are ignored too.
"""
import ast
import dataclasses
import difflib
import math
import os
import re
import types
import typing


class UserError(Exception):
    """A mistake of the user: one clear sentence that names the thing, its value and the remedy."""


@dataclasses.dataclass
class Config:
    # model and data
    model: str = ""  # directory or hub id of a llama, mistral, qwen2 or qwen3 model
    dataset: str = ""  # a folder of data/ (tiny, gsm8k, math, ...) or your own JSON lines file
    val_dataset: str = ""  # the same, for the validation loss; "" holds out val_fraction of dataset
    val_fraction: float = 0.05  # of the examples, held out where there is no validation file
    prompt_format: str = "plain"  # plain | alpaca | llama3 | chatml
    prompt_weight: float = 0.0  # of a prompt token in the loss (a response's has 1); for pretraining
    max_seq_len: int = 512  # tokens; longer examples are dropped and counted
    test_examples: int = 0  # test problems answered before and after the training, 0: none
    max_new_tokens: int = 256  # of an answer that is generated

    # run
    out_dir: str = "out"  # adapter, metrics.jsonl and the state to resume from
    resume: bool = False  # go on from out_dir's state, if there is one
    init_adapter: str = ""  # directory of a PEFT adapter to start from, with its rank, alpha and targets
    seed: int = 0  # of the order of examples, LoRA's A and every random choice
    device: str = "auto"  # auto (a GPU if there is one) | cpu | cuda | cuda:N
    dtype: str = "bfloat16"  # float32 | bfloat16 | float16, of weights and activations; LoRA is float32
    threads: int = 0  # CPU threads, 0: torch's choice
    debug: bool = False  # traceback after an error

    # steps
    batch_size: int = 8  # examples of an optimizer step, over all GPUs
    micro_batch_size: int = 0  # examples of one forward pass, which keeps one set of channels; 0: batch_size
    length_window: int = 32  # batches among which examples of like length meet; 1: random batches
    max_steps: int = 0  # optimizer steps, 0: as many as epochs make
    epochs: float = 1.0  # used where max_steps is 0
    eval_interval: int = 0  # steps between two validation losses, 0: never, not at the end either
    eval_examples: int = 256  # validation examples at most
    save_interval: int = 0  # steps between two saved states, 0: only at the end or when stopped
    log_interval: int = 1  # steps between two log lines, 0: never

    # AdamW
    learning_rate: float = 3e-4
    lr_schedule: str = "cosine"  # cosine | linear, towards 0
    decay_start: float = 0.0  # fraction of the training after which the learning rate falls
    warmup_steps: int | float = 0.04  # an int: steps; a float below 1: a fraction of the training
    weight_decay: float = 0.0
    beta2: float = 0.999  # decay of AdamW's second moment
    grad_clip: float = 1.0  # largest norm of the gradient, 0: no clipping

    # LoRA
    lora_r: int = 32  # rank, 0: train all weights instead, densely
    lora_alpha: float = 64.0  # the branch is scaled by lora_alpha / lora_r
    lora_targets: str = "q,k,v,o"  # any of q,k,v,o,gate,up,down

    # sparsity: the share of channels that context tokens skip
    mlp_sparsity: float | list | dict = 0.0  # in [0, 1), or a list, or {"3-30": 0.99}: blocks 3 to 30
    attn_sparsity: float | list | dict = 0.0  # the same, for q, k, v and o
    published: dict = dataclasses.field(default_factory=dict)  # {"part of model": (mlp, attn)}: ratios to use
    predictor: str = "svd"  # which channels to keep: svd | measured | oracle | random | worst
    predictor_rank: int = 8  # of svd
    predictor_refresh: int = 0  # measured: one dense step every so many measures again, 0: never
    sparse_start: float = 0.05  # fraction of the training that runs dense first
    sparse_ramp: float = 0.0  # fraction over which the ratios grow to their full size, 0: at once
    sparse_end: float = 1.0  # fraction after which it is dense again
    split: str = "output"  # dense tokens: output (those in the loss) | none | random | rectangle (ablations)
    recompute: bool = False  # keep only the input of each block: less memory, a third more time
    fsdp: bool = False  # under torchrun: shard the frozen weights over the GPUs
    timeout: int = 600  # under torchrun: seconds that processes wait for one another

    def ratio_source(self):
        """"published for KEY" where both ratios are those of the `published` table, else "ours"."""
        key = published_key(self)
        ours = key is None or tuple(self.published[key]) != (self.mlp_sparsity, self.attn_sparsity)
        return "ours" if ours else f"published for {key}"


CHOICES = dict(prompt_format=("plain", "alpaca", "llama3", "chatml"), lr_schedule=("cosine", "linear"),
               dtype=("float32", "bfloat16", "float16"), split=("output", "none", "random", "rectangle"),
               predictor=("svd", "measured", "oracle", "random", "worst"))
TARGETS = "q", "k", "v", "o", "gate", "up", "down"
AT_LEAST = dict(max_seq_len=2, max_new_tokens=1, batch_size=1, length_window=1, predictor_rank=1,
                eval_examples=1, seed=0, test_examples=0, threads=0, micro_batch_size=0, max_steps=0,
                epochs=0, eval_interval=0, save_interval=0, log_interval=0, warmup_steps=0, weight_decay=0,
                grad_clip=0, lora_r=0, predictor_refresh=0, timeout=1)
FRACTIONS = "val_fraction", "prompt_weight", "decay_start", "sparse_start", "sparse_ramp", "sparse_end"
FIELDS = {field.name: field for field in dataclasses.fields(Config)}
RATIOS = "mlp_sparsity", "attn_sparsity"
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def load(argv):
    """argv: [str], config files (.py) and --name=value flags -> Config, checked. `-h` prints all options and
    exits. UserError: a name or a value that is wrong, or a file that cannot be executed."""
    if "-h" in argv or "--help" in argv:
        print(help_text())
        raise SystemExit(0)
    files = [arg for arg in argv if arg.endswith(".py") and not arg.startswith("-")]
    flags = dict(parse_flag(arg) for arg in argv if arg not in files)
    cfg, own = Config(), set()  # own: what was set after the table of published ratios, and overrules it
    for file in files or [os.path.join(ROOT, "config", "tiny.py")]:
        values = run_file(file)
        own = set() if "published" in values else own | values.keys()
        vars(cfg).update(values)
    vars(cfg).update(flags)
    check(cfg)
    key = published_key(cfg)
    for name, ratio in zip(RATIOS, cfg.published[key] if key else ()):
        if name not in own | flags.keys():
            setattr(cfg, name, ratio)
    cfg.micro_batch_size = min(cfg.micro_batch_size or cfg.batch_size, cfg.batch_size)
    return cfg


def parse_flag(arg):
    """"--name=value" -> (name, value). A Python literal; for a str option, anything else is taken as text."""
    name, equals, text = arg.removeprefix("--").partition("=")
    if not arg.startswith("--") or not equals:
        raise UserError(f"cannot read the argument {arg!r}: write --name=value, or the name of a .py file")
    know(name, arg)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    if FIELDS[name].type is str and not isinstance(value, str):
        value = text
    return name, convert(name, value, arg)


def run_file(file):
    """Executes a config file -> {option: value}. A path is looked for here, then in the repository."""
    path = file if os.path.exists(file) else os.path.join(ROOT, file)
    try:
        with open(path, encoding="utf-8") as f:
            code = compile(f.read(), path, "exec")
        space = {"__file__": path, "__name__": "config_file"}
        exec(code, space)
    except OSError as e:
        raise UserError(f"cannot read the config file {file} ({e.strerror})") from e
    except Exception as e:
        raise UserError(f"the config file {file} does not run ({type(e).__name__}: {e})") from e
    named = {k: v for k, v in space.items() if not k.startswith("_") and not isinstance(v, types.ModuleType)}
    for name in named:
        know(name, file)
    return {name: convert(name, value, file) for name, value in named.items()}


def know(name, where):
    """UserError, with the nearest real name, if there is no such option."""
    if name not in FIELDS:
        nearest = difflib.get_close_matches(name, FIELDS, 1, 0)[0]
        raise UserError(f"unknown option {name!r} in {where}: did you mean {nearest}? (-h lists all)")


def convert(name, value, where):
    """The value in its option's type: an int becomes a float, a tuple a list. UserError: any other type."""
    kinds = typing.get_args(FIELDS[name].type) or (FIELDS[name].type,)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
        value = float(value)
    if isinstance(value, tuple) and list in kinds:
        value = list(value)
    if not isinstance(value, kinds) or isinstance(value, bool) and bool not in kinds:
        wanted = "True or False" if bool in kinds else " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"{name} has to be {wanted}, not {value!r} (in {where})")
    return value


def check(cfg):
    """UserError: a value of cfg that no training could use."""
    def need(name, good, what):
        if not good:
            raise UserError(f"{name} has to be {what}, not {getattr(cfg, name)!r}")

    for name in ("model", "dataset", "out_dir"):
        need(name, getattr(cfg, name), "given")
    for name, choices in CHOICES.items():
        need(name, getattr(cfg, name) in choices, "one of " + ", ".join(choices))
    for name, least in AT_LEAST.items():
        need(name, least <= getattr(cfg, name) < math.inf, f"at least {least}")
    for name in FRACTIONS:
        need(name, 0 <= getattr(cfg, name) <= 1, "in [0, 1]")
    for name in ("learning_rate", "lora_alpha"):
        need(name, 0 < getattr(cfg, name) < math.inf, "above 0")
    need("val_fraction", cfg.val_fraction < 1, "below 1")
    need("beta2", 0 <= cfg.beta2 < 1, "in [0, 1)")
    need("max_steps", cfg.max_steps or cfg.epochs, "above 0 where epochs is 0")
    # half a step of bfloat16 is .2 % of a weight: most updates would vanish
    need("dtype", cfg.lora_r or cfg.dtype == "float32", "float32 where lora_r is 0: the weights are trained")
    need("init_adapter", cfg.lora_r or not cfg.init_adapter, "empty where lora_r is 0: there is no LoRA")
    whole = isinstance(cfg.warmup_steps, int)
    need("warmup_steps", whole or cfg.warmup_steps < 1, "an int or a fraction below 1")
    need("predictor_refresh", not cfg.predictor_refresh or cfg.predictor == "measured",
         "0 where predictor is not measured")
    need("sparse_end", cfg.sparse_end >= cfg.sparse_start, f"at least sparse_start ({cfg.sparse_start})")
    need("device", re.fullmatch(r"auto|cpu|cuda(:\d+)?", cfg.device), "auto, cpu, cuda or cuda:N")
    targets = cfg.lora_targets.split(",")
    need("lora_targets", set(targets) <= set(TARGETS) and len(set(targets)) == len(targets),
         f"some of {','.join(TARGETS)} with commas between")
    for name in RATIOS:
        ratios(getattr(cfg, name), None, name)
    for key, pair in cfg.published.items():
        if not isinstance(key, str) or not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise UserError(f"published maps part of a model's name to (mlp, attn), not {key!r} to {pair!r}")
        for ratio in pair:
            ratios(ratio, None, f"published[{key!r}]")


def ratios(value, n_layers, name):
    """A ratio for all blocks, a list of one a block, or {"3-30": .99, "5": .5} (both ends included, the rest
    is 0) -> [float] of n_layers. UserError: not in [0, 1), a wrong length, a block that is not there or named
    twice. n_layers None: only the form is checked."""
    if isinstance(value, dict):
        pairs = [(block, ratio) for key, ratio in value.items() for block in block_range(key, n_layers, name)]
        blocks = [block for block, _ in pairs]
        if len(set(blocks)) < len(blocks):
            raise UserError(f"{name} names block {max(blocks, key=blocks.count)} twice")
        value = [dict(pairs).get(block, 0.0) for block in range(n_layers or max(blocks, default=-1) + 1)]
    elif not isinstance(value, (list, tuple)):
        value = [value] * (n_layers or 1)
    for ratio in value:
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
            raise UserError(f"{name} has the ratio {ratio!r}, which is not a number in [0, 1)")
    if n_layers is not None and len(value) != n_layers:
        raise UserError(f"{name} lists {len(value)} ratios, but the model has {n_layers} blocks")
    return [float(ratio) for ratio in value]


def block_range(key, n_layers, name):
    """"3-30", "5" or 5 -> the blocks it names."""
    found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", str(key).replace(" ", ""))
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if first > last:
        raise UserError(f'{name} has the key {key!r}: a range of blocks is written "3-30", a single one "5"')
    if n_layers is not None and last >= n_layers:
        raise UserError(f"{name} names block {last}, but the model's blocks are 0 to {n_layers - 1}")
    return range(first, last + 1)


def published_key(cfg):
    """The longest key of cfg.published that is part of cfg.model, in any case; None if there is none."""
    return max((key for key in cfg.published if key.lower() in cfg.model.lower()), key=len, default=None)


def differences(cfg):
    """{name: value} of the options that are not at their default, for printing (without `published`)."""
    default = Config(micro_batch_size=cfg.batch_size, published=cfg.published)
    return {name: value for name, value in vars(cfg).items() if value != getattr(default, name)}


def help_text():
    """What -h prints: the options with their defaults and comments, read from the source above."""
    usage = "usage: python train.py [config/NAME.py ...] [--option=value ...]"
    lines = [usage, "", __doc__.split("\n\n", 2)[2].strip()]
    with open(__file__, encoding="utf-8") as f:
        source = f.read().partition("class Config:\n")[2].partition("    def ")[0]
    for line in source.splitlines():
        option = re.fullmatch(r"    (\w+): .+? = (.+?)(?:  # (.*))?", line)
        if option:
            default = getattr(Config(), option[1])
            lines.append(f"  --{option[1] + '=' + repr(default):<30}  {option[3] or ''}".rstrip())
        elif line.strip():
            lines += ["", line.strip().removeprefix("# ")]
    return "\n".join(lines)
