"""Every option once: its type, its default, its bound and what it means, on one line of Config below.
`load(argv)` is the whole interface:

    python train.py config/math.py config/llama2_7b.py --model=DIR --max_steps=100

Config files are Python and are executed, so use only what you trust: plain assignments to the names below.
Several may follow one another; without any, config/tiny.py is taken. Then come the flags, --name=literal; of
two equal ones the last wins. A name that does not exist or a value of the wrong type is an error everywhere.
Helper names in a file begin with "_"; imported modules are ignored too. A config file, and the `model` and
`dataset` that it names, are looked for in the current directory and then in the repository.
"""
import ast
import dataclasses
import difflib
import inspect
import math
import os
import re
import types
import typing
from typing import Literal

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
Ratios = float | list | dict  # of channels that are skipped, block by block: ratios() says in which forms
TARGETS = "q", "k", "v", "o", "gate", "up", "down"
# What others call some options, where the name itself does not lead to ours.
ELSEWHERE = dict(lr="learning_rate", wd="weight_decay", bs="batch_size", rank="lora_r", ratio="mlp_sparsity",
                 gradient_accumulation_steps="micro_batch_size", model_name_or_path="model")


class UserError(Exception):
    """A mistake of the user: one clear sentence that names the thing, its value and the remedy."""


def option(default, **bound):
    """A field with a bound: at_least=1, at_most=1, above=0 or below=1 for a number, which else may be any
    from 0 up (check_number); given=True for a text that may not be empty."""
    return dataclasses.field(default=default, metadata=bound)


@dataclasses.dataclass
class Config:
    # model and data
    model: str = option("", given=True)  # directory or hub id of a llama, mistral, qwen2 or qwen3 model
    dataset: str = option("", given=True)  # a folder of data/ (tiny, gsm8k, ...) or your own JSON lines file
    val_dataset: str = ""  # the same, for the validation loss; "" holds out val_fraction of dataset
    val_fraction: float = option(0.05, below=1)  # of the examples, held out where there is no validation file
    prompt_format: Literal["plain", "alpaca", "llama3", "chatml"] = "plain"
    prompt_weight: float = option(0.0, at_most=1)  # of a prompt token (a response's: 1), for pretraining
    train_on: Literal["all", "last"] = "all"  # which answers of a conversation are scored
    skip_bad_rows: bool = False  # leave out, and count, rows that cannot be used, instead of stopping
    max_seq_len: int = option(512, at_least=2)  # tokens; longer examples are dropped and counted
    test_examples: int = 0  # test problems answered before and after the training, 0: none
    max_new_tokens: int = option(256, at_least=0)  # of a generated answer; 0: there are none, only losses

    # run
    out_dir: str = option("out", given=True)  # adapter, metrics.jsonl and the state to resume from
    resume: bool = False  # go on from out_dir's state, if there is one
    init_adapter: str = ""  # directory of a PEFT adapter to start from, with its rank, alpha and targets
    seed: int = 0  # of the order of examples, LoRA's A and every random choice
    device: str = "auto"  # auto (a GPU if there is one) | cpu | cuda | cuda:N
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # of weights, activations; LoRA: float32
    base_bits: int = 16  # 4: the frozen q, k, v, o, gate, up and down in NF4 (QLoRA), 16: in dtype
    threads: int = 0  # CPU threads, 0: torch's choice
    debug: bool = False  # traceback after an error

    # steps
    batch_size: int = option(8, at_least=1)  # examples of an optimizer step, over all GPUs
    micro_batch_size: int = 0  # examples of one forward pass, which keeps one set of channels; 0: batch_size
    length_window: int = option(32, at_least=1)  # batches among which examples of like length meet; 1: random
    max_steps: int = 0  # optimizer steps, 0: as many as epochs make
    epochs: float = 1.0  # used where max_steps is 0
    eval_interval: int = 0  # steps between two validation losses, 0: never, not at the end either
    eval_examples: int = option(256, at_least=1)  # validation examples at most
    save_interval: int = 0  # steps between two saved states, 0: only at the end or when stopped
    log_interval: int = 1  # steps between two log lines, 0: never

    # AdamW
    learning_rate: float = option(3e-4, above=0)
    lr_schedule: Literal["cosine", "linear"] = "cosine"  # towards 0
    decay_start: float = option(0.0, at_most=1)  # fraction of training after which the learning rate falls
    warmup_steps: int | float = 0.04  # an int: steps; a float below 1: a fraction of the training
    weight_decay: float = 0.0
    beta2: float = option(0.999, below=1)  # decay of AdamW's second moment
    grad_clip: float = 1.0  # largest norm of the gradient, 0: no clipping

    # LoRA
    lora_r: int = 32  # rank, 0: train all weights instead, densely
    lora_alpha: float = option(64.0, above=0)  # the branch is scaled by lora_alpha / lora_r
    lora_targets: str = "q,k,v,o"  # any of q,k,v,o,gate,up,down
    lora_from: int = 0  # the first block that has LoRA: below it nothing is trained, and no backward runs

    # sparsity: the share of channels that context tokens skip
    mlp_sparsity: Ratios = 0.0  # in [0, 1), or a list, or {"3-30": 0.99}: blocks 3 to 30
    attn_sparsity: Ratios = 0.0  # the same, for q, k, v and o; 1: k and v stay, and there is no query
    predictor: Literal["measured", "svd", "energy", "oracle", "random", "worst"] = "measured"  # of channels
    predictor_rank: int = option(8, at_least=1)  # of svd
    map_rank: int = 64  # measured: of the linear map that stands in for what is dropped, 0: none
    dense_first: int = 4  # tokens at the start of each text that are dense: attention sinks
    backward_sparsity: Ratios = 0.0  # where those are 0: of context tokens left out of the backward; .6 or more
    sparse_start: float = option(0.05, at_most=1)  # fraction of the training that runs dense first
    sparse_end: float = option(1.0, at_most=1)  # fraction after which it is dense again
    split: Literal["output", "none", "random", "rectangle"] = "output"  # dense tokens; output: scored ones
    recompute: bool = False  # keep only the input of each block: less memory, a third more time
    fsdp: bool = False  # under torchrun: shard the frozen weights over the GPUs
    timeout: int = option(600, at_least=1)  # under torchrun: seconds that processes wait for one another


FIELDS = {field.name: field for field in dataclasses.fields(Config)}


# ---- reading -----------------------------------------------------------------------------------------------

def load(argv):
    """argv: [str], config files (.py) and --name=value flags -> Config, checked. `-h` prints all options and
    exits. UserError: a name or a value that is wrong, or a file that cannot be executed."""
    if "-h" in argv or "--help" in argv:
        print(help_text())
        raise SystemExit(0)
    files = [arg for arg in argv if arg.endswith(".py") and not arg.startswith("-")]
    flags = dict(parse_flag(arg) for arg in argv if arg not in files)
    cfg = Config()
    for file in files or ["config/tiny.py"]:
        vars(cfg).update(run_file(file))
    vars(cfg).update(flags)
    check(cfg)
    cfg.micro_batch_size = min(cfg.micro_batch_size or cfg.batch_size, cfg.batch_size)
    return cfg


def parse_flag(arg):
    """"--name=value" -> (name, value). A Python literal; true and false too for a bool; for a text, anything
    else is taken as it is. UserError: another form, no such option, a value of the wrong type."""
    name, equals, text = arg.removeprefix("--").partition("=")
    if not arg.startswith("--") or not equals:
        raise UserError(f"cannot read the argument {arg!r}: write --name=value, or the name of a .py file")
    know(name, arg)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    if kinds(name) == (str,) and not isinstance(value, str):
        value = text
    if kinds(name) == (bool,) and text in ("true", "false"):
        value = text == "true"
    return name, convert(name, value, arg)


def run_file(file):
    """Executes a config file -> {option: value}, its model and dataset found as find() has it."""
    path = find(file)
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
    values = {name: convert(name, value, file) for name, value in named.items()}
    for name in {"model", "dataset"} & values.keys():
        values[name] = find(values[name])
    return values


def find(path):
    """A relative path is looked for in the current directory, then in the repository; so train.py finds its
    config files, its embedded model and its data from anywhere. What is in neither (a hub id, the name of a
    data set) stays as it is."""
    at_home = os.path.join(ROOT, path)
    if path and not os.path.exists(path) and os.path.exists(at_home):
        return at_home
    return path


def know(name, where):
    """UserError if there is no such option, with the one that is meant: the same under a name that others use,
    one that has this word in its name, or the nearest by its letters."""
    if name in FIELDS:
        return
    meant = [ELSEWHERE[name]] if name in ELSEWHERE else []
    meant += [known for known in FIELDS if name in known.split("_")]
    meant += difflib.get_close_matches(name, FIELDS, 1, 0.6)
    if not meant:
        raise UserError(f"unknown option {name!r} in {where}: did you mean one of those that -h lists?")
    raise UserError(f"unknown option {name!r} in {where}: did you mean {meant[0]}? (-h lists all)")


def kinds(name):
    """The types that a value of this option may have: (str,), (int, float), ..."""
    if choices(name):
        return (str,)
    kind = FIELDS[name].type
    return typing.get_args(kind) or (kind,)


def choices(name):
    """The words that this option may be, () where it is not one of a few words."""
    kind = FIELDS[name].type
    if typing.get_origin(kind) is Literal:
        return typing.get_args(kind)
    return ()


def convert(name, value, where):
    """The value in its option's type: an int becomes a float, a tuple a list. UserError: any other type."""
    allowed = kinds(name)
    if isinstance(value, int) and not isinstance(value, bool) and float in allowed and int not in allowed:
        value = float(value)
    if isinstance(value, tuple) and list in allowed:
        value = list(value)
    if not isinstance(value, allowed) or isinstance(value, bool) and bool not in allowed:
        wanted = " or ".join(kind.__name__ for kind in allowed)
        if bool in allowed:
            wanted = "True or False"
        raise UserError(f"{name} has to be {wanted}, not {value!r} (in {where})")
    return value


# ---- checking ----------------------------------------------------------------------------------------------

def check(cfg):
    """UserError: a value of cfg that no training could use. First each by its own line of Config, then what
    such a line cannot say and what two options say together."""
    def need(name, good, what):
        if not good:
            raise UserError(f"{name} has to be {what}, not {getattr(cfg, name)!r}")

    for name, field in FIELDS.items():
        if field.type == Ratios:
            ratios(getattr(cfg, name), None, name)
        elif choices(name):
            need(name, getattr(cfg, name) in choices(name), "one of " + ", ".join(choices(name)))
        elif field.type is str:
            need(name, getattr(cfg, name) or not field.metadata.get("given"), "given")
        elif field.type is not bool:
            check_number(name, getattr(cfg, name), **field.metadata)

    whole = isinstance(cfg.warmup_steps, int)
    need("warmup_steps", whole or cfg.warmup_steps < 1, "an int or a fraction below 1")
    need("device", re.fullmatch(r"auto|cpu|cuda(:\d+)?", cfg.device), "auto, cpu, cuda or cuda:N")
    targets = cfg.lora_targets.split(",")
    need("lora_targets", set(targets) <= set(TARGETS) and len(set(targets)) == len(targets),
         f"some of {','.join(TARGETS)} with commas between")

    need("max_steps", cfg.max_steps or cfg.epochs, "above 0 where epochs is 0")
    # half a step of bfloat16 is .2 % of a weight: most updates would vanish
    need("dtype", cfg.lora_r or cfg.dtype == "float32", "float32 where lora_r is 0: the weights are trained")
    need("base_bits", cfg.base_bits in (4, 16), "4 or 16")
    need("base_bits", cfg.lora_r or cfg.base_bits == 16, "16 where lora_r is 0: packed weights cannot be trained")
    need("base_bits", not cfg.fsdp or cfg.base_bits == 16, "16 with fsdp: packed weights are not sharded")
    need("lora_from", cfg.lora_r or not cfg.lora_from, "0 where lora_r is 0: all weights are trained")
    need("init_adapter", cfg.lora_r or not cfg.init_adapter, "empty where lora_r is 0: there is no LoRA")
    need("sparse_end", cfg.sparse_end >= cfg.sparse_start, f"at least sparse_start ({cfg.sparse_start})")


def check_number(name, value, at_least=0, at_most=None, above=None, below=None):
    """UserError: a number outside the bound of its option, or one that is infinite or nan."""
    good, what = at_least <= value < math.inf, f"at least {at_least}"
    if at_most is not None:
        good, what = at_least <= value <= at_most, f"in [{at_least}, {at_most}]"
    elif above is not None:
        good, what = above < value < math.inf, f"above {above}"
    elif below is not None:
        good, what = at_least <= value < below, f"below {below} and at least {at_least}"
    if not good:
        raise UserError(f"{name} has to be {what}, not {value!r}")


def ratios(value, n_layers, name):
    """A ratio for all blocks, a list of one a block, or {"3-30": .99, "5": .5} (both ends included, the rest
    is 0) -> [float] of n_layers. UserError: not in [0, 1), for attention not in [0, 1], a wrong length, a block that is
    not there or named twice. n_layers None: only the form is checked."""
    if isinstance(value, dict):
        pairs = [(block, ratio) for key, ratio in value.items() for block in block_range(key, n_layers, name)]
        blocks = [block for block, _ in pairs]
        if len(set(blocks)) < len(blocks):
            raise UserError(f"{name} names block {max(blocks, key=blocks.count)} twice")
        value = [dict(pairs).get(block, 0.0) for block in range(n_layers or max(blocks, default=-1) + 1)]
    elif not isinstance(value, (list, tuple)):
        value = [value] * (n_layers or 1)
    for ratio in value:
        if not is_ratio(ratio, name):
            end = "]" if is_ratio(1, name) else ")"
            raise UserError(f"{name} has the ratio {ratio!r}, which is not a number in [0, 1{end}")
    if n_layers is not None and len(value) != n_layers:
        raise UserError(f"{name} lists {len(value)} ratios, but the model has {n_layers} blocks")
    return [float(ratio) for ratio in value]


def is_ratio(value, name):
    """Whether the option of this name may have this ratio: a number in [0, 1), for attention also 1: no queries."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 <= value < 1 or name == "attn_sparsity" and value == 1


def block_range(key, n_layers, name):
    """"3-30", "5" or 5 -> the blocks it names."""
    found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", str(key).replace(" ", ""))
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if first > last:
        raise UserError(f'{name} names blocks by {key!r}: a range of blocks is written "3-30", a single one "5"')
    if n_layers is not None and last >= n_layers:
        raise UserError(f"{name} names block {last}, but the model's blocks are 0 to {n_layers - 1}")
    return range(first, last + 1)


# ---- printing ----------------------------------------------------------------------------------------------

def differences(cfg):
    """{name: value} of the options that are not at their default, for printing."""
    default = Config(micro_batch_size=cfg.batch_size)
    return {name: value for name, value in vars(cfg).items() if value != getattr(default, name)}


def help_text():
    """What -h prints: the options with their defaults, the words to choose from and their comments, read from
    the source of Config."""
    lines = ["usage: python train.py [config/NAME.py ...] [--option=value ...]", "",
             __doc__.split("\n\n", 2)[2].strip()]
    for line in inspect.getsource(Config).splitlines():
        code, _, comment = line.strip().partition("# ")
        name = code.partition(":")[0]
        if name in FIELDS:
            what = ": ".join(text for text in (" | ".join(choices(name)), comment) if text)
            lines.append(f"  --{name + '=' + repr(getattr(Config(), name)):<30}  {what}".rstrip())
        elif comment:
            lines += ["", comment]
    return "\n".join(lines)
