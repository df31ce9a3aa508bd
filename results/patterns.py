"""What whole patterns of MLP sparsity cost before any training, on validation data: no choice was made on it.

    python -m results.patterns config/smollm2.py --model=DIR --mlp=20-28:.9,1-28:.5

    --mlp=BLOCKS:RATIO,...   patterns to try, one after the other
    --batches=4              to measure the loss on, and as many training batches to measure channels on
    --files=a.py,b.py        also the ratios in these config files (tools.sensitivity wrote them)
    --option=value           everything else is train.py's (its predictor is used)

Prints the rise in loss (mean and standard error over the batches) and the FLOPs of a step over a dense one's.
"""
import config
import data
import data.tokenizer
from config import UserError
from lib.cli import run, split_options
from lib.files import resolve
from tools.sensitivity import flops, losses, mean_and_error, setup

OWN = dict(mlp="20-28:.9", files="", batches=4)


def patterns(own, args, n_layers):
    """-> {name: {"3.mlp": ratio, ...}}"""
    out = {}
    for item in filter(None, own["mlp"].split(",")):
        blocks, _, ratio = item.partition(":")
        try:
            ratios = dict(mlp=config.ratios({blocks: float(ratio)}, n_layers, "mlp"))
        except ValueError:
            raise UserError(f"--mlp={item} has to be BLOCKS:RATIO, like 20-28:.9") from None
        out[f"MLP {float(ratio):g} in {blocks}"] = ratios
    for file in filter(None, own["files"].split(",")):
        cfg = config.load([*args, file])
        out[file] = {k: config.ratios(getattr(cfg, f"{k}_sparsity"), n_layers, k) for k in ("mlp", "attn")}
    return {name: {f"{i}.{k}": r for k, rs in p.items() for i, r in enumerate(rs[:-1]) if r}
            for name, p in out.items()}


def main(argv):
    own, args = split_options(argv, __doc__, **OWN)
    cfg = config.load(args)
    model, _, _, _ = setup(cfg, own["batches"])
    _, val = data.load_splits(cfg, data.tokenizer.load(resolve(cfg.model)), ["val"])["val"]
    batches = [data.collate(val[i:i + cfg.batch_size], cfg.split).to(model.device)
               for i in range(0, min(len(val), own["batches"] * cfg.batch_size), cfg.batch_size)]
    dense, dense_flops = losses(model, batches, {}), sum(flops(model, batches, {}).values())
    print(f"dense loss {sum(dense) / len(dense):.4f}", flush=True)
    for name, ratios in patterns(own, args, len(model.blocks)).items():
        rise, error = mean_and_error([x - d for x, d in zip(losses(model, batches, ratios), dense)])
        share = sum(flops(model, batches, ratios).values()) / dense_flops
        print(f"{name:24s} loss {rise:+.4f} ± {error:.4f}, {share:.1%} of the FLOPs", flush=True)


if __name__ == "__main__":
    run(main)
