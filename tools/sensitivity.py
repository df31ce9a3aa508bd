"""Where the sparsity levels come from: which blocks can skip how much, and the ratios that meet
a compute budget.

    python -m tools.sensitivity config/tiny.py --budget=0.75
    python train.py config/tiny.py out/tiny/ratios.py --out_dir=out/tiny_0.75

    --by=gradient          what a part's price is: "gradient", 1 - the cosine of LoRA's gradient with the dense model's
                           (a backward pass each), or "loss", the mean over batches of |rise of the loss|
    --budget=0.75          FLOPs of a sparse training step over those of dense LoRA's
    --ratios=.5,.75,.9,.97,1   the ratios that are tried; 1, no queries, only of attention, and with a map
    --ranks=64,256         ranks of the map, one for all parts: each has an analysis of its own, and the one whose choice
                           is best on other batches is taken; "" is train.py's map_rank
    --batches=8            batches to measure on, and as many others to check the result on; all from
                           the training set
    --out=PATH             the config file to write; "" is out_dir/ratios.py. Beside it: a heat map (PNG), the
                           patterns it was checked against, and sensitivity.json, from which an interrupted
                           analysis goes on (a second budget is then free)
    --option=value         everything else is train.py's: --model=DIR, --predictor=measured, --threads=1, ...

One part (the MLP or the attention of one block) at a time is made sparse, all else stays dense, and the loss
rises by so much, and its gradient turns by so much, on the very same batch. Then

    curve of a part    points (saved FLOPs, change), one a ratio, from (0, 0); only its lower convex hull
                       counts. Change: the mean over batches of 1 - cosine, or of |rise|
    choice             the hulls' edges in order of their slope (change per saved FLOP), taken until the
                       budget is met, the last one in part (but no queries can only be taken whole)

By the loss a fall counts like a rise, batch by batch: before fine-tuning, breaking a block may lower the loss
(block 0's attention of the embedded base, -.16), and yet the part is not free; and where batches disagree the mean
of their rises may be near 0 by chance (SmolLM2 at a budget of .9, two batches to choose on: chosen by the mean
rise, the pattern costs .136 on others, by the mean |rise| .007).

If changes add up, this choice is the best. They do not quite (errors of one block meet those of another),
so it is checked: its true rise on other batches, beside that of uniform ratios and of the published
middle-to-late pattern at the same FLOPs. Cost: 2 (L - 1) parts * ratios * batches forward and backward passes, by the
loss only forward and each from its own block on (half of the model on average).

What keeps more of the gradient need not train better. The embedded base at 65 % of the FLOPs, two seeds: chosen, cosine
.79, test loss .037 +- .003; one ratio for all MLPs, .66, .031 +- .003. So train with both before a long run.
"""
import bisect
import hashlib
import json
import random
import shlex
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

import config
import data
import data.tokenizer
import predictor
import train
from config import UserError
from lib import dist
from lib.cli import run, split_options
from lib.factors import checksum
from lib.files import resolve, write_text
from lib.flops import flops_by_part
from tools.progress import Progress

OWN = dict(budget=0.75, ratios=".5,.75,.9,.97,1", ranks="", batches=8, by="gradient", out="")
# the change, 1 - cosine or mean |rise|, below which a shade is used
SHADES = ((.003, " "), (.01, "░"), (.03, "▒"), (.1, "▓"), (float("inf"), "█"))
# LLaMA-3-8B's blocks: MLP at .99, attention at .75, of 32
PUBLISHED = ([(3, 30)], [(14, 19), (21, 23), (25, 29)])


# ---- set up ------------------------------------------------------------------------------------------------

def setup(cfg, n):
    """-> (model with a predictor on every part, three lists of batches: to measure channels, n to analyse,
    n to check)."""
    torch.manual_seed(cfg.seed)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if not cfg.lora_r:
        raise UserError("lora_r = 0 trains all weights, and weights that are trained run dense: "
                        "there is nothing to analyse")
    if cfg.backward_sparsity:
        raise UserError(f"backward_sparsity = {cfg.backward_sparsity!r} cannot be analysed, and needs no ratios by "
                        "block: give --backward_sparsity=0 here")
    device = dist.setup(cfg)
    folder = resolve(cfg.model)
    tokenizer = data.tokenizer.load(folder)
    model = train.load_model(replace(cfg, mlp_sparsity=0.0, attn_sparsity=0.0, fsdp=False), folder, device,
                             tokenizer)
    warm = n if cfg.predictor in ("measured", "energy") else 0
    batches = calibration(cfg, tokenizer, warm + 2 * n, device)
    attn = .5
    if model.config.qk_norm:  # which attn_sparsity between 0 and 1 would rescale
        attn = 1.0 if has_maps(cfg) else 0.0
    predictor.attach(model, .5, attn, cfg.predictor_rank, cfg.predictor, cfg.map_rank, cfg.seed)
    if warm:
        predictor.measure_more(model, batches[:warm])
        predictor.fix(model)
    return model, batches[:warm], batches[warm:warm + n], batches[warm + n:]


def has_maps(cfg):
    return cfg.predictor == "measured" and cfg.map_rank > 0


def ratios_by_part(model, cfg, ratios):
    """{part: the ratios that can be tried of it}."""
    out = {}
    for name, p in predictor.predictors(model):
        allowed = [r for r in ratios if r < 1]
        if not p.is_mlp and model.config.qk_norm:
            allowed = []
        if not p.is_mlp and 1 in ratios and has_maps(cfg):
            allowed.append(1.0)
        out[name] = allowed
    return out


def each_ratio(tried):
    """tried: {part: ratios} -> [(ratio, {part: that ratio, where it is tried})]."""
    ratios = sorted({r for of_part in tried.values() for r in of_part})
    return [(r, {name: r for name, of_part in tried.items() if r in of_part}) for r in ratios]


def calibration(cfg, tokenizer, n, device):
    """n whole batches of the training set, drawn with cfg.seed."""
    _, tokenized = data.load_splits(cfg, tokenizer, ["train"], cfg.train_on)["train"]
    tokenized = random.Random(cfg.seed).sample(tokenized, min(len(tokenized), 2 * n * cfg.batch_size))
    drawn = data.batches([len(t.tokens) for t in tokenized], cfg.batch_size, cfg.seed, 0)
    whole = [idx for idx in drawn if len(idx) == cfg.batch_size][:n]
    if len(whole) < n:
        raise UserError(f"{n} batches of {cfg.batch_size} are needed and {cfg.dataset} makes {len(whole)}: "
                        "lower --batches or --batch_size")
    return [data.collate([tokenized[j] for j in idx], cfg.split, 0, cfg.dense_first).to(device) for idx in whole]


def fingerprint(model, cfg, warm):
    """A hash of all that a measurement depends on but the batch: the weights and the predictor."""
    key = hashlib.sha256(f"4 {cfg.predictor} {cfg.predictor_rank} {cfg.map_rank} {cfg.seed} {cfg.dtype} "
                         f"{list(map(digest, warm))}".encode())
    for name, p in model.named_parameters():
        if not name.endswith("/A"):  # with B = 0 an adapter changes nothing; with a trained B, B differs too
            key.update(f"{name} {checksum(p if p.dim() == 2 else p[None])}".encode())
    return key.hexdigest()[:16]


def digest(batch):
    key = hashlib.sha256(f"{batch.shape} {batch.n_sparse} {batch.loss}".encode())
    for t in (batch.tokens, batch.places, batch.targets, batch.weights):
        key.update(t.cpu().numpy().tobytes())
    return key.hexdigest()[:16]


# ---- measure -----------------------------------------------------------------------------------------------

def maps_alone(model, warm, tried):
    """tried: {part: ratios} -> {(part, ratio): the map of what it drops where no other part is sparse}."""
    maps = {}
    for r, parts in each_ratio(tried):
        predictor.set_ratios(model, parts)
        predictor.fit_maps(model, warm, alone=True)
        maps.update({(name, r): p.map for name, p in predictor.predictors(model) if p.rank_of_map()})
    return maps


def sparse_alone(model, name, r, maps):
    predictor.set_ratios(model, {name: r})
    if (name, r) in maps:
        dict(predictor.predictors(model))[name].set_map(maps[name, r])


def analyse(model, warm, batches, tried, by, done, save):
    """tried: {part: ratios}. Fills done, {batch: {"dense": loss, "3.mlp 0.9": loss, ...}}, losses per scored token, and
    by the gradient also "3.mlp 0.9 cosine"; what is there is not measured again."""
    jobs = [(name, r, f"{name} {r}" + " cosine" * (by == "gradient"))
            for name, ratios in tried.items() for r in ratios]
    todo = sum(key not in done.get(digest(b), {}) for b in batches for _, _, key in jobs)
    bar = Progress("measuring", todo)
    maps = maps_alone(model, warm, tried) if todo else {}
    for b in batches:
        seen, total = done.setdefault(digest(b), {}), b.weights.sum().item()
        if all(key in seen for _, _, key in jobs):
            continue
        predictor.set_ratios(model, {})
        inputs, dense = [], None
        if by == "loss":
            inputs, seen["dense"] = block_inputs(model, b)
        else:
            seen["dense"], dense = gradient(model, b)
        seen["dense"] /= total
        for name, r, key in jobs:
            if key in seen:
                continue
            sparse_alone(model, name, r, maps)
            if by == "loss":
                i = int(name.split(".")[0])
                with torch.no_grad():
                    loss = model.loss(b, inputs[i], i).item()
            else:
                loss, g = gradient(model, b)
                seen[key] = torch.cosine_similarity(g, dense, 0).item()
            seen[f"{name} {r}"] = loss / total
            bar.step()
            if r == tried[name][-1]:
                save()
    bar.end()


@torch.no_grad()
def block_inputs(model, batch):
    """-> ([the input of every block], loss) of a forward."""
    inputs = []
    hooks = [block.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in model.blocks]
    loss = model.loss(batch).item()
    for h in hooks:
        h.remove()
    return inputs, loss


def gradient(model, batch):
    """-> (loss, the gradients of all of LoRA's B put end to end): with B = 0, as a fresh adapter has it, A has none."""
    params = [p for name, p in model.lora_parameters().items() if "lora_B" in name]
    loss = model.loss(batch)
    gradients = torch.autograd.grad(loss, params, allow_unused=True)
    return loss.item(), torch.cat([g.flatten() for g in gradients if g is not None])


def rises(done, batches):
    """-> {"3.mlp 0.9": (mean rise in loss, its standard error)} over the batches, each against its
    own dense loss."""
    return {k: mean_and_error(v) for k, v in by_batch(done, batches).items()}


def changes(done, batches, by="loss"):
    """-> {"3.mlp 0.9": what the choice is made by}: mean over the batches of |rise|, or of 1 - cosine."""
    rise = by_batch(done, batches)
    if by == "loss":
        return {k: sum(map(abs, v)) / len(v) for k, v in rise.items()}
    rows = [done[digest(b)] for b in batches]
    keys = [k for k in rise if all(k + " cosine" in row for row in rows)]
    return {k: sum(1 - row[k + " cosine"] for row in rows) / len(rows) for k in keys}


def by_batch(done, batches):
    """-> {"3.mlp 0.9": [rise in loss, one a batch]}. An analysis that was interrupted has left only a part of the
    batches with its ratios: what not all have is not in it."""
    rows = [done[digest(b)] for b in batches]
    keys = [k for k in rows[0] if k != "dense" and not k.endswith("cosine") and all(k in row for row in rows)]
    return {k: [row[k] - row["dense"] for row in rows] for k in keys}


def mean_and_error(values):
    t = torch.tensor(values, dtype=torch.float64)
    return t.mean().item(), t.std().item() / len(t) ** .5 if len(t) > 1 else float("nan")


def flops(model, batches, ratios):
    """{part: FLOPs of a training step of these batches at {part: ratio}}, "head" included."""
    predictor.set_ratios(model, ratios)
    counts = [flops_by_part(model, b) for b in batches]
    return {k: sum(c[k] for c in counts) for k in counts[0]}


# ---- choose: plain numbers, no model -----------------------------------------------------------------------

def hull(points):
    """[(ratio, saved, change)] -> the lower convex hull of (saved, change) from (0, 0, 0) on: slopes
    grow along it."""
    points = sorted((p for p in points if p[1] > 0), key=lambda p: (p[1], p[2], p[0]))
    out = [(0.0, 0.0, 0.0)]
    for p in points:
        if p[1] == out[-1][1]:
            continue  # the same number of channels at another ratio: the first stands
        while len(out) > 1 and slope(out[-2], out[-1]) >= slope(out[-2], p):
            out.pop()
        out.append(p)
    return out


def slope(a, b):
    return (b[2] - a[2]) / (b[1] - a[1])


def choose(curves, need, saved_at):
    """curves: {part: [(ratio, saved FLOPs, change)]}; need: FLOPs to save; saved_at(part, ratio) -> FLOPs. ->
    ({part: ratio}, predicted change). Edges of all hulls in order of slope; of the last the first hundredth
    that is enough; an edge up to 1, no queries, is taken whole."""
    hulls = {k: hull(v) for k, v in curves.items()}
    edges = sorted((slope(a, b), k, a, b) for k, h in hulls.items() for a, b in zip(h, h[1:]))
    chosen, saved, change = {}, 0.0, 0.0
    for _, k, a, b in edges:
        if saved >= need:
            break
        if saved + b[1] - a[1] > need and b[0] < 1:  # the last edge
            for hundredth in range(int(a[0] * 100) + 1, int(b[0] * 100 + .999)):
                at = saved_at(k, hundredth / 100)
                if a[1] < at < b[1] and saved - a[1] + at >= need:
                    b = (hundredth / 100, at, a[2] + slope(a, b) * (at - a[1]))
                    break
        chosen[k], saved, change = b[0], saved + b[1] - a[1], change + b[2] - a[2]
    return chosen, change


def published(L):
    """The published pattern for LLaMA-3-8B at the same relative depths of L blocks: ({block:
    .99}, {block: .75})."""
    def at(ranges, ratio):
        return {i: ratio for i in range(L - 1) if any(a <= round(i * 31 / (L - 1)) <= b for a, b in ranges)}
    return at(PUBLISHED[0], .99), at(PUBLISHED[1], .75)


def patterns(model):
    """{name: {part: relative ratio}} of what the choice is compared with."""
    names = [name for name, p in predictor.predictors(model) if p.is_mlp or not model.config.qk_norm]
    mlp, attn = published(len(model.blocks))
    late = {**{f"{i}.mlp": r for i, r in mlp.items()}, **{f"{i}.attn": r for i, r in attn.items()}}
    return {"uniform": dict.fromkeys(names, 1.0),
            "uniform, MLP only": {n: 1.0 for n in names if n.endswith("mlp")},
            "published pattern": {n: r for n, r in late.items() if n in names}}


def same_flops(model, batches, pattern, wanted):
    """The pattern, all ratios times one factor and at most .99, where its FLOPs are nearest to those
    wanted."""
    def scaled(percent):
        return {k: round(min(.99, r * percent / 100), 4) for k, r in pattern.items()}

    def excess(percent):
        return sum(flops(model, batches, scaled(percent)).values()) - wanted

    # the smallest factor that is enough
    first = bisect.bisect_left(range(1, 200), 0, key=lambda p: -excess(p)) + 1
    return scaled(min((max(1, first - 1), first), key=lambda p: abs(excess(p))))


# ---- show and write ----------------------------------------------------------------------------------------

def columns(tried):
    """{part: ratios} -> {"mlp": its ratios, "attn": its ratios}, without a kind of part that is not tried."""
    out = {}
    for kind in ("mlp", "attn"):
        for name, ratios in tried.items():
            if name.endswith(kind) and ratios:
                out[kind] = ratios  # the same in all blocks
    return out


def show(rise, change, tried, L):
    """The heat map: a row a block, a column a part and ratio. Numbers are rises, shades changes."""
    kinds = columns(tried)
    print("\nrise in loss, one part sparse: mean ± standard error; shade, by change:  "
          + "  ".join(f"{s or ' '} < {t:g}" for t, s in SHADES[:-1]) + "  █ more")
    print("block " + " | ".join("  ".join(f"{kind:>5s} {r:<8g}" for r in ratios) for kind, ratios in kinds.items()))
    for i in range(L - 1):
        cells = [[(change[k], *rise[k]) for k in (f"{i}.{kind} {r}" for r in ratios)]
                 for kind, ratios in kinds.items()]
        print(f"{i:5d} "
              + " | ".join("  ".join(f"{next(s for t, s in SHADES if c < t)}{m:+.3f}±{e:.3f} "
                                     for c, m, e in row) for row in cells))


def draw(path, change, tried, chosen, L):
    """The same as a PNG, with the chosen ratios below. Without matplotlib: no file."""
    try:
        import matplotlib
    except ImportError:
        return print("no heat map: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm
    kinds = columns(tried)
    fig, axes = plt.subplots(len(kinds) + 1, 1, figsize=(max(6, L * .32), 2 + 1.6 * len(kinds)), sharex=True,
                             layout="constrained")
    for ax, (kind, ratios) in zip(axes, kinds.items()):
        z = [[max(1e-4, change[f"{i}.{kind} {r}"]) for i in range(L - 1)] for r in ratios]
        im = ax.imshow(z, aspect="auto", origin="lower", cmap="magma_r", norm=LogNorm(1e-3, 1))
        ax.set_yticks(range(len(ratios)), ratios)
        ax.set_ylabel({"mlp": "MLP", "attn": "attention"}[kind] + " ratio")
    for j, kind in enumerate(kinds):
        axes[-1].bar([i + .4 * j - .2 for i in range(L - 1)],
                     [chosen.get(f"{i}.{kind}", 0) for i in range(L - 1)], .4, label=kind)
    axes[-1].set(ylabel="chosen", xlabel="block", ylim=(0, 1.02))
    axes[-1].legend(fontsize=7)
    fig.colorbar(im, ax=list(axes[:-1]), label="change")
    fig.savefig(path, dpi=130)
    plt.close(fig)
    print(f"heat map: {path}")


def config_file(ratios, L, cfg, *comments):
    """The text of a config file that train.py takes after the one that the analysis was made with."""
    lines = [f"# {c}\n" for c in comments]
    for kind in ("mlp", "attn"):
        lines.append(f"{kind}_sparsity = {[ratios.get(f'{i}.{kind}', 0.0) for i in range(L)]}\n")
    lines.append(f"predictor = {cfg.predictor!r}  # they were chosen with it\n")
    if cfg.predictor == "measured":
        lines.append(f"map_rank = {cfg.map_rank}  # and with this\n")
    return "".join(lines)


def use_it(args, ratios, out_dir):
    """The command line that trains with the config file `ratios`. args: of train.py, as they were given here."""
    files = [a for a in args if a.endswith(".py")] or ["config/tiny.py"]
    changed = ("--out_dir=", "--map_rank=", "--mlp_sparsity=", "--attn_sparsity=")  # options win over files
    options = [a for a in args if a.startswith("--") and not a.startswith(changed)]
    return shlex.join(["python", "train.py", *files, str(ratios), *options, f"--out_dir={out_dir}"])


def load_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def parse(own):
    try:
        ratios = sorted({float(r) for r in own["ratios"].split(",")})
    except ValueError:
        ratios = []
    if not ratios or not all(0 < r <= 1 for r in ratios) or ratios == [1]:
        raise UserError(f"--ratios={own['ratios']} has to be numbers between 0 and 1 with commas between, "
                        "such as .5,.75,.9; a 1 besides tries attention without queries")
    if not 0 < own["budget"] < 1:
        raise UserError(f"--budget={own['budget']} has to be above 0 and below 1: "
                        "FLOPs of a sparse step over a dense one's")
    if own["by"] not in ("gradient", "loss"):
        raise UserError(f"--by={own['by']} has to be gradient or loss")
    if own["batches"] < 1:
        raise UserError(f"--batches={own['batches']} has to be at least 1")
    return ratios


def ranks_of(own, cfg):
    """The ranks of the map that are tried."""
    if not own["ranks"]:
        return [cfg.map_rank]
    if not has_maps(cfg):
        raise UserError(f"--ranks={own['ranks']} is of maps, and predictor = {cfg.predictor!r} with map_rank = "
                        f"{cfg.map_rank} has none: leave it out, or set predictor = 'measured' and map_rank = 64")
    try:
        ranks = sorted({int(r) for r in own["ranks"].split(",")})
    except ValueError:
        ranks = [0]
    if ranks[0] < 1:
        raise UserError(f"--ranks={own['ranks']} has to be whole numbers above 0 with commas between, such as 64,256")
    return ranks


def plan(model, batches, tried, budget):
    """Before anything is measured: -> ({part: {ratio: the FLOPs it saves}}, {part: FLOPs of a dense step}). UserError:
    the budget cannot be met."""
    dense = flops(model, batches, {})
    total = sum(dense.values())
    saves = {name: {} for name in tried}
    for r, parts in each_ratio(tried):
        at = flops(model, batches, parts)
        for name in parts:
            saves[name][r] = dense[name] - at[name]
    lowest = (total - sum(max([0, *s.values()]) for s in saves.values())) / total
    print(f"a sparse step computes {lowest:.1%} of a dense one's FLOPs at least, with every part at its cheapest ratio")
    if budget < lowest:
        raise UserError(f"--budget={budget} cannot be met: with every part at its cheapest ratio a step still computes "
                        f"{lowest:.4f} of dense LoRA's FLOPs; give --budget={lowest + .005:.2f} or more, or other "
                        "--ratios")
    return saves, dense


# ---- one rank of the map, and the best of several ----------------------------------------------------------

class Choice(NamedTuple):
    """What the analysis came to with a map of one rank."""
    cfg: config.Config  # map_rank is that rank
    ratios: dict  # {part: ratio}
    predicted: float  # change
    rise: dict  # {"3.mlp 0.9": (mean, standard error)}
    change: dict  # {"3.mlp 0.9": change}


def choose_ratios(model, cfg, warm, batches, tried, own, store, save):
    """The whole analysis with maps of rank cfg.map_rank. store: {fingerprint: what was measured}."""
    set_rank(model, cfg)
    saves, dense = plan(model, batches, tried, own["budget"])
    done = store.setdefault(fingerprint(model, cfg, warm), {})
    analyse(model, warm, batches, tried, own["by"], done, save)
    change = changes(done, batches, own["by"])
    curves = {k: [(r, saved, change[f"{k} {r}"]) for r, saved in by_ratio.items()] for k, by_ratio in saves.items()}
    need = sum(dense.values()) * (1 - own["budget"])
    chosen, predicted = choose(curves, need, lambda k, r: dense[k] - flops(model, batches, {k: r})[k])
    return Choice(cfg, chosen, predicted, rises(done, batches), change)


def set_rank(model, cfg):
    for _, p in predictor.predictors(model):
        p.map_rank = cfg.map_rank


class Check(NamedTuple):
    """What ratios do to batches that had no part in their choice."""
    flops: float  # over a dense step's
    rise: float
    error: float  # of the rise
    cosine: float

    def __str__(self):
        return (f"{self.flops:6.1%} of the FLOPs, loss {self.rise:+.4f} ± {self.error:.4f}, "
                f"cosine {self.cosine:.3f}")


class Dense(NamedTuple):
    """What the dense model makes of a batch."""
    loss: float  # per scored token
    gradient: torch.Tensor  # as of gradient(), on the CPU, for there are many


def dense_of(model, batches):
    """-> [Dense]."""
    predictor.set_ratios(model, {})
    out = []
    for b in batches:
        loss, g = gradient(model, b)
        out.append(Dense(loss / b.weights.sum().item(), g.cpu()))
    return out


def check(model, warm, fresh, pattern, dense):
    """pattern: {part: ratio}; dense: dense_of(model, fresh)."""
    predictor.set_ratios(model, pattern)
    predictor.fit_maps(model, warm)
    rises, cosine = [], 0.0
    for b, d in zip(fresh, dense):
        loss, g = gradient(model, b)
        rises.append(loss / b.weights.sum().item() - d.loss)
        cosine += torch.cosine_similarity(g.cpu(), d.gradient, 0).item() / len(fresh)
    share = sum(flops(model, fresh, pattern).values()) / sum(flops(model, fresh, {}).values())
    return Check(share, *mean_and_error(rises), cosine)


def best_rank(model, warm, fresh, choices, dense, by):
    """The choice that is best on other batches."""
    checked = []
    for c in choices:
        set_rank(model, c.cfg)
        found = check(model, warm, fresh, c.ratios, dense)
        checked.append((1 - found.cosine if by == "gradient" else abs(found.rise), c.cfg.map_rank, c))
        print(f"  map of rank {c.cfg.map_rank:<6d} {found}; predicted change by {by} {c.predicted:.4f}")
    return min(checked)[-1]


def main(argv):
    own, args = split_options(argv, __doc__, **OWN)
    ratios = parse(own)
    cfg = config.load(args)
    ranks = ranks_of(own, cfg)
    model, warm, batches, fresh = setup(cfg, own["batches"])
    L, out = len(model.blocks), Path(own["out"] or Path(cfg.out_dir) / "ratios.py")
    tried = ratios_by_part(model, cfg, ratios)

    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_name("sensitivity.json")
    store = load_json(path)
    choices = []
    for rank in ranks:
        if len(ranks) > 1:
            print(f"map of rank {rank}: ", end="")
        with_rank = replace(cfg, map_rank=rank)
        choices.append(choose_ratios(model, with_rank, warm, batches, tried, own, store,
                                     lambda: write_text(path, json.dumps(store))))
    dense = dense_of(model, fresh)
    best = choices[0]
    if len(choices) > 1:
        print(f"\nranks of the map, on {len(fresh)} other batches:")
        best = best_rank(model, warm, fresh, choices, dense, own["by"])
    set_rank(model, best.cfg)
    show(best.rise, best.change, tried, L)
    draw(out.with_suffix(".png"), best.change, tried, best.ratios, L)

    # the check, on batches that had no part in the choice
    wanted = sum(flops(model, fresh[:1], best.ratios).values())
    rows = {"chosen": best.ratios,
            **{k: same_flops(model, fresh[:1], p, wanted) for k, p in patterns(model).items() if p}}
    print(f"\nchecked on {len(fresh)} other batches (dense loss {sum(d.loss for d in dense) / len(dense):.4f}); "
          f"predicted change by {own['by']} {best.predicted:.4f}")
    command, first = "python -m tools.sensitivity " + " ".join(argv), None
    for name, pattern in rows.items():
        found = check(model, warm, fresh, pattern, dense)
        first = first or found
        line = f"{name:18s} {found}" + " (cannot come nearer)" * (abs(found.flops - first.flops) > .02)
        print("  " + line)
        where = out if name == "chosen" else out.with_name(
            f"{out.stem}_{name.split()[0].strip(',')}{'_mlp' * ('MLP' in name)}.py")
        write_text(where, config_file(pattern, L, best.cfg, command, line))
    out_dir = f"{cfg.out_dir}_{own['budget']:g}"
    print(f"\nuse it:\n  {use_it(args, out, out_dir)}")


if __name__ == "__main__":
    run(main)
