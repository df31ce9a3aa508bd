"""A base in 4 bits: equal to bitsandbytes' bit for bit, exact gradients, whole runs, and what is refused.

    python -m tests.test_nf4    writes tests/nf4.safetensors anew, with bitsandbytes: the golden file
"""
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import kernels
import train
from config import UserError
from lib import nf4
from model import LLaMA, ModelConfig
from results.memory import Alive
from tests.test_ranks import assert_close_runs, run_ranks
from tests.testing import SIZES, at_step, equal, make_base, newest, options, same_run, term, weights
from tools import eval as evaluation
from tools.export import export

GOLDEN = Path(__file__).with_name("nf4.safetensors")
CPU = torch.device("cpu")


def random_model(dtype=torch.float32, **sizes):
    torch.manual_seed(0)
    return LLaMA(ModelConfig.from_dict({**SIZES, "hidden_size": 64, **sizes}), dtype)


def same(a, b):
    """Two NF4 hold the same bits."""
    return all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers(), strict=True))


# ---- against bitsandbytes ----------------------------------------------------------------------------------

def by_bitsandbytes(w, double=True):
    """{tensor's name: tensor} as bitsandbytes writes a packed weight "w", and what it unpacks it to. Its scales are
    quantized by its portable kernel, as on a GPU (lib/nf4.py says why)."""
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(w, compress_statistics=double, quant_type="nf4")
    if double:
        scales = w.float().view(-1, 64).abs().amax(1)
        portable = torch.ops.bitsandbytes.quantize_blockwise.default._op_dk
        key = torch._C.DispatchKey.CompositeExplicitAutograd
        state.absmax, state.state2.absmax = portable(key, scales - state.offset, state.state2.code, 256)
    unpacked = functional.dequantize_4bit(codes, state)
    return {"w.weight": codes, **{f"w.weight.{k}": v for k, v in state.as_dict(packed=True).items()}}, unpacked


def packed_here(tensors, rows, dtype=torch.float32):
    """The NF4 of what bitsandbytes has written."""
    shape, *packed = nf4.read(tensors.get, "w.weight", CPU, "w.weight")
    w = nf4.empty([rows], shape[1], dtype, CPU)
    nf4.put(w, 0, *nf4.as_stored(shape, *packed, transposed=False))
    return w


def quantized_here(w):
    out = nf4.empty([len(w)], w.shape[1], w.dtype, CPU)
    nf4.put(out, 0, *nf4.quantize(w))
    return out


def test_golden_file():
    """Codes, scales and the unpacked matrix, without bitsandbytes."""
    golden = load_file(GOLDEN)
    w = golden.pop("source")  # (150, 128) bf16, with a block of zeros and an outlier
    unpacked = golden.pop("unpacked")
    mine, theirs = quantized_here(w), packed_here(golden, len(w), w.dtype)
    assert same(mine, theirs) and len(mine.nested) == 2
    assert torch.equal(mine.codes.flatten(), golden["w.weight"].flatten())
    assert torch.equal(mine.unpack(), unpacked)
    assert torch.equal(nf4.dequantize(*nf4.quantize(w), w.dtype), unpacked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_equal_to_bitsandbytes(dtype):
    torch.manual_seed(0)
    for shape in ((2, 64), (576, 576), (333, 896), (2048, 1024)):
        w = (.05 * torch.randn(shape)).to(dtype)
        tensors, unpacked = by_bitsandbytes(w)
        mine = quantized_here(w)
        assert same(mine, packed_here(tensors, len(w), dtype)), shape
        assert torch.equal(mine.unpack(), unpacked), shape


def test_scales_that_bitsandbytes_did_not_quantize():
    """Then they are quantized here: the codes are nearly all the same."""
    torch.manual_seed(0)
    w = torch.randn(64, 128)
    tensors, unpacked = by_bitsandbytes(w, double=False)
    mine = packed_here(tensors, 64)
    assert (mine.codes.flatten() == tensors["w.weight"].flatten()).float().mean() > .99
    assert (mine.unpack() - unpacked).norm() < .01 * unpacked.norm()


# ---- a packed weight ---------------------------------------------------------------------------------------

def test_any_rows_of_several_tensors():
    """Tensors of odd sizes are packed each by itself; rows, slices and all of it unpack to the same."""
    torch.manual_seed(0)
    parts = [scale * torch.randn(n, 192) for n, scale in ((70, 1.), (5, .01), (90, 30.))]
    w = nf4.empty([70, 5, 90], 192, torch.float32, CPU)
    for i in (2, 0, 1):  # in any order, as files have them
        nf4.put(w, [0, 70, 75][i], *nf4.quantize(parts[i]))
    want = torch.cat([nf4.dequantize(*nf4.quantize(p), torch.float32) for p in parts])
    assert torch.equal(w.unpack(), want) and len(w) == 165 and w.shape == (165, 192)
    idx = torch.tensor([164, 3, 70, 74, 75, 3])
    assert torch.equal(w.unpack(idx), want[idx]) and torch.equal(w[60:80].unpack(), want[60:80])
    assert torch.equal(w[60:80].unpack(torch.tensor([0, 19])), want[[60, 79]])
    for dtype in (torch.bfloat16, torch.float64):
        w.dtype = dtype
        assert torch.equal(w.unpack(), want.to(dtype))
    assert sum(b.numel() * b.element_size() for b in w.buffers()) < 165 * (192 * 4.13 / 8 + 8) + 40


def test_one_buffer_for_all():
    kernels.buffers.clear()
    small, large = quantized_here(torch.randn(3, 64)), quantized_here(torch.randn(9, 128))
    at = kernels.unpacked(large).data_ptr()
    assert kernels.unpacked(small).data_ptr() == at == kernels.unpacked(large).data_ptr()
    assert torch.equal(kernels.unpacked(large), large.unpack()) and len(kernels.buffers) == 1
    plain = torch.randn(3, 64)
    assert kernels.unpacked(plain) is plain


# ---- from files --------------------------------------------------------------------------------------------

def test_loading_packs_what_the_file_holds(tmp_path):
    """From a file in fp32 into a bf16 model: the file's own numbers are packed, not rounded ones. o and down by their
    stored rows."""
    m = random_model()
    m.save_pretrained(tmp_path)
    loaded = LLaMA.from_pretrained(tmp_path, torch.bfloat16, base_bits=4)
    m.to_4_bits()
    assert len(loaded.packed()) == 12 and all(same(a, b) for a, b in zip(loaded.packed(), m.packed()))
    assert loaded.blocks[0].attn.o.unpack().dtype == torch.bfloat16 == loaded.embed.dtype


def test_streaming_holds_the_model_and_one_tensor(tmp_path):
    """Of the bytes that loading allocates: at most the packed model and what one tensor takes while it is packed."""
    sizes = dict(hidden_size=512, intermediate_size=8192, num_hidden_layers=2)
    random_model(torch.bfloat16, **sizes).save_pretrained(tmp_path)
    LLaMA.from_pretrained(tmp_path, torch.bfloat16, base_bits=4)  # tables are made once
    with Alive() as alive:
        m = LLaMA.from_pretrained(tmp_path, torch.bfloat16, base_bits=4)
    resident = sum(t.numel() * t.element_size() for t in [*m.parameters(), *m.buffers()])
    in_16_bits = sum(w.shape.numel() for w in m.packed()) * 2
    assert resident < .3 * in_16_bits
    assert resident < alive.peak < resident + 2 * 8192 * 512 * 2  # the largest tensor in 16 bits, and as much again


def as_bitsandbytes(base, target, shards=1):
    """Writes base's checkpoint as bitsandbytes would have quantized it: here with lib/nf4.py, whose bits are the same
    (above). With two shards what belongs to a weight may lie in the other one."""
    target.mkdir()
    for path in base.glob("*.json"):
        (target / path.name).write_bytes(path.read_bytes())
    c = json.loads((base / "config.json").read_text())
    c["quantization_config"] = dict(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                    bnb_4bit_use_double_quant=True)
    (target / "config.json").write_text(json.dumps(c))
    tensors = {}
    for name, w in load_file(base / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = w
            continue
        codes, scale_codes, nested, offset = nf4.quantize(w.view(-1, 64))  # it has no rows
        state = dict(quant_type="nf4", blocksize=64, dtype="bfloat16", shape=list(w.shape), nested_blocksize=256,
                     nested_dtype="float32", nested_offset=offset.item())
        tensors[name] = codes.view(-1, 1)
        tensors.update({f"{name}.absmax": scale_codes.flatten(), f"{name}.quant_map": kernels.nf4_values(CPU).clone(),
                        f"{name}.nested_absmax": nested, f"{name}.nested_quant_map": kernels.scale_values(CPU).clone(),
                        f"{name}.{nf4.STATE}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)})
    if shards == 1:
        save_file(tensors, target / "model.safetensors")
        return target
    homes = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(homes.values()):
        save_file({name: t for name, t in tensors.items() if homes[name] == file}, target / file)
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    return target


@pytest.mark.parametrize("shards", [1, 2])
def test_checkpoints_of_bitsandbytes(tmp_path, shards):
    """q, k, v, gate and up bit for bit; o and down, which lie transposed here, are packed anew: twice the error."""
    m = random_model(model_type="qwen2")
    m.save_pretrained(tmp_path / "base")
    packed = LLaMA.from_pretrained(as_bitsandbytes(tmp_path / "base", tmp_path / "bnb", shards), base_bits=4)
    once = LLaMA.from_pretrained(tmp_path / "base", base_bits=4)
    for a, b, exact in zip(packed.blocks, once.blocks, m.blocks):
        assert same(a.attn.qkv, b.attn.qkv) and same(a.mlp.gate_up, b.mlp.gate_up)
        for name in ("attn.o", "mlp.down"):
            w, twice, one = exact.get_parameter(name), a.get_submodule(name).unpack(), b.get_submodule(name).unpack()
            assert .05 < (one - w).norm() / w.norm() < (twice - w).norm() / w.norm() < .15
    assert torch.equal(packed.embed, m.embed) and torch.equal(packed.blocks[1].attn.qkv_bias, m.blocks[1].attn.qkv_bias)


def test_what_cannot_be_read_is_refused(tmp_path):
    m = random_model()
    m.save_pretrained(tmp_path / "base")
    bnb = as_bitsandbytes(tmp_path / "base", tmp_path / "bnb")
    with pytest.raises(UserError, match="is quantized to 4 bits: load it with base_bits = 4"):
        LLaMA.from_pretrained(bnb)
    good = load_file(bnb / "model.safetensors")
    q = "model.layers.1.self_attn.q_proj.weight"

    def refuses(message, **changes):
        tensors = {k: v for k, v in {**good, **changes}.items() if v is not None}
        save_file(tensors, bnb / "model.safetensors")
        with pytest.raises(UserError, match=message):
            LLaMA.from_pretrained(bnb, base_bits=4)

    refuses(f"{q} is packed, but absmax is missing", **{f"{q}.absmax": None})
    refuses(f"{q} is packed, but quant_state.bitsandbytes__nf4 is missing", **{f"{q}.{nf4.STATE}": None})
    refuses("with a table of its own", **{f"{q}.quant_map": torch.linspace(-1, 1, 16)})
    refuses("has no place in this architecture", **{"model.layers.9.mlp.up_proj.weight.absmax": torch.zeros(1)})
    refuses("embed_tokens.weight is packed in 4 bits, and only q, k, v",
            **{"model.embed_tokens.weight": good[q].clone()})
    other = good[q.replace("q_proj", "k_proj") + "." + nf4.STATE].clone()
    refuses(r"q_proj.weight has shape \[32, 64\], config.json says \[64, 64\]", **{f"{q}.{nf4.STATE}": other})
    for settings, kind in ((dict(quant_method="gptq"), "gptq"), (dict(load_in_8bit=True), "bitsandbytes with 8 bits"),
                           (dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"), "bitsandbytes with fp4")):
        c = json.loads((bnb / "config.json").read_text())
        (bnb / "config.json").write_text(json.dumps({**c, "quantization_config": settings}))
        with pytest.raises(UserError, match=f"quantization_config of {kind}: .* use the checkpoint they were made"):
            LLaMA.from_pretrained(bnb, base_bits=4)


# ---- whole runs --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def packed_home(home, tmp_path_factory):
    """`home` with a base whose rows 4 bits can pack."""
    folder = tmp_path_factory.mktemp("packed")
    make_base(folder / "base", hidden_size=64)
    text = (home / "c.py").read_text().replace(str(home / "base"), str(folder / "base"))
    (folder / "c.py").write_text(text + "base_bits = 4\n")
    return folder


def test_stopped_and_resumed_equals_uninterrupted(packed_home, tmp_path, monkeypatch, capsys):
    """The base is packed again, to the same bits. The adapter says what it was trained on; eval and export obey."""
    train.main(options(packed_home, out_dir=tmp_path / "a"))
    assert "M of them in 4 bits) and" in capsys.readouterr().out
    for n in (1, 6):  # in the warm-up, and when sparse
        with monkeypatch.context() as m:
            at_step(m, n, term)
            train.main(options(packed_home, out_dir=tmp_path / "b", resume=True))
    with pytest.raises(UserError, match="base_bits = 4 there, 16 here"):
        train.main(options(packed_home, out_dir=tmp_path / "b", resume=True, base_bits=16))
    train.main(options(packed_home, out_dir=tmp_path / "b", resume=True))
    same_run(tmp_path / "a", tmp_path / "b")
    assert newest(tmp_path / "a")[1]["sparse"]

    load = lambda **kw: evaluation.load(tmp_path / "a", "", torch.float32, "cpu", **kw)[0]
    assert len(load().packed()) == 12 and load(base_bits=16).packed() == []
    export(tmp_path / "a", tmp_path / "merged")
    assert "was trained on this base in 4 bits" in capsys.readouterr().out
    merged = evaluation.load(tmp_path / "merged", "", torch.float32, "cpu")[0]
    tokens = torch.arange(12).view(2, 6)
    assert merged.packed() == [] and (merged.logits(tokens) - load(base_bits=16).logits(tokens)).abs().max() < 1e-4
    train.main(options(packed_home, out_dir=tmp_path / "c", base_bits=16))
    assert not equal(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_refusals(packed_home, home, tmp_path):
    for changes, message in ((dict(base_bits=8), "base_bits has to be 4 or 16, not 8"),
                             (dict(lora_r=0), "base_bits has to be 16 where lora_r is 0: packed weights cannot be trained"),
                             (dict(fsdp=True), "base_bits has to be 16 with fsdp: packed weights are not sharded")):
        with pytest.raises(UserError, match=message):
            options(packed_home, **changes)
    with pytest.raises(UserError, match="rows of a multiple of 64 numbers, and those of model.layers.0.self_attn."
                                        "q_proj.weight .and of all others. have 32: use base_bits = 16"):
        train.main(options(home, base_bits=4, out_dir=tmp_path / "a"))
    assert not (tmp_path / "a").exists()


if __name__ == "__main__":
    torch.manual_seed(0)
    source = (.05 * torch.randn(150, 128)).bfloat16()
    source[3] = 0
    source[7, 70] = 2
    written, matrix = by_bitsandbytes(source)
    save_file({"source": source, "unpacked": matrix, **written}, GOLDEN)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes", file=sys.stderr)


@pytest.mark.slow
def test_two_ranks_equal_one_process(packed_home, tmp_path):
    train.main(options(packed_home, out_dir=tmp_path / "one", micro_batch_size=2))
    assert run_ranks(packed_home, out_dir=tmp_path / "two", micro_batch_size=2) == [0, 0]
    assert_close_runs(tmp_path / "one", tmp_path / "two")
