"""Tests of tools/bench*.py and of the FLOP counter that its ratios rest on. Tiny shapes, one thread."""
import json
import random
import traceback

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import config
import data
import predictor
from config import UserError
from model import LLaMA, ModelConfig
from results import memory
from tools import bench, bench_measure, bench_report

TINY = dict(model_type="llama", vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=False)
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def counted(f):
    """FLOPs that torch's counter sees in f(). Its table lacks the CPU's attention, addmm_ and baddbmm_: here they are."""
    def sdpa(q, k, v, *args, **kw):
        return 4 * q[0] * q[1] * q[2] * k[2] * q[3]

    def sdpa_backward(dy, q, k, v, *args, **kw):
        return 10 * q[0] * q[1] * q[2] * k[2] * q[3]

    def addmm(y, a, b, **kw):
        return 2 * a[0] * a[1] * b[1]

    def baddbmm(y, a, b, **kw):
        return 2 * a[0] * a[1] * a[2] * b[2]

    more = {aten.baddbmm_: baddbmm, aten._scaled_dot_product_flash_attention_for_cpu: sdpa, aten.addmm_: addmm,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward}
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        f()
    return counter.get_total_flops()


def batch(lengths=((20, 9), (31, 5), (12, 17)), seed=0):
    rng = random.Random(seed)
    return [data.Tokenized([rng.randrange(97) for _ in range(p + a)], [0.0] * p + [1.0] * a) for p, a in lengths]


def tiny(**kw):
    torch.manual_seed(0)
    return LLaMA(ModelConfig.from_dict({**TINY, **kw})).train()


# ---- the FLOP counter ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kw", [{}, dict(num_key_value_heads=4), dict(model_type="qwen2")], ids=str)
@pytest.mark.parametrize("targets", ["q,k,v,o", "q,v", "q,k,v,o,gate,up,down", "o", "down", "gate,up"])
def test_dense_flops_are_torchs(kw, targets):
    m, b = tiny(**kw), data.collate(batch())
    m.add_lora(4, 8, targets)
    assert m.flops(b) == (n := counted(lambda: m.loss(b).backward()), n)


def test_full_training_flops_are_torchs():
    m, b = tiny(), data.collate(batch())
    m.train_all()
    assert m.flops(b)[1] == counted(lambda: m.loss(b).backward())


@pytest.mark.parametrize("map_rank", [0, 5], ids=["no map", "map"])
@pytest.mark.parametrize("kind", ["svd", "measured", "energy", "oracle", "random"])
@pytest.mark.parametrize("ratios", [(.5, 0.), (0., .5), ([.5, 0., .5], [0., .5, 0.])], ids=["mlp", "attention", "some of both"])
@pytest.mark.parametrize("model_type, targets", [("llama", "q,k,v,o"), ("qwen2", "q,k,v,o,gate,up,down")])
def test_sparse_flops_are_torchs(targets, kind, map_rank, ratios, model_type, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    m, b = tiny(model_type=model_type), data.collate(batch())
    m.add_lora(4, 8, targets)
    predictor.attach(m, *ratios, kind=kind, map_rank=map_rank)
    before = m.flops(b)
    if kind in ("measured", "energy"):
        predictor.measure(m, [b])
        assert any(p.map for _, p in predictor.predictors(m)) == (kind == "measured" and map_rank > 0 and ratios != (0., .5))
    dense, sparse = m.flops(b)
    assert sparse == counted(lambda: m.loss(b).backward())
    assert before == (dense, sparse)  # known before anything is measured
    m.set_sparsity(0)
    assert dense == counted(lambda: m.loss(b).backward()) and m.flops(b) == (dense, dense)


def test_memory_is_counted_without_memory():
    """results.memory: on the meta device, with stand-ins for what a GPU fuses."""
    m = memory.make_model({**TINY, "num_hidden_layers": 6}, 4)
    one, ten = (memory.step_bytes(m, n, False, 32, 8) for n in (1, 10))
    assert 5 * one < ten < 11 * one and memory.step_bytes(m, 10, True, 32, 8) < .8 * ten
    memory.keep_channels(m, [.9] * 6, [0.0] * 6)
    assert memory.step_bytes(m, 10, False, 32, 8) < ten


# ---- the bench -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, billions", [("llama3-8b", 8.030), ("llama3.2-1b", 1.236), ("llama2-7b", 6.738), ("qwen2.5-7b", 7.616),
                                            ("smollm2-135m", .1345)])
def test_architectures_have_the_published_sizes(name, billions):
    cfg = config.Config(model="somewhere/" + {"llama3-8b": "Meta-Llama-3-8B-Instruct"}.get(name, name))
    found, raw = bench.architecture(cfg, "")
    assert found == name and bench.architecture(config.Config(model="x"), name) == (name, raw)
    m = LLaMA(ModelConfig.from_dict(raw), device="meta")
    assert sum(p.numel() for p in m.parameters()) / 1e9 == pytest.approx(billions, rel=1e-3)


def test_unknown_architecture_and_shape():
    with pytest.raises(UserError, match="give --arch= one of .*llama3-8b"):
        bench.architecture(config.Config(model="owner/other"), "")
    assert bench.parse_shape("8x512/128", None) == (8, 512, 128)
    for bad in ("8x512", "8x512/512", "0x9/3", "axb/c"):
        with pytest.raises(UserError, match="--shape"):
            bench.parse_shape(bad, None)


def test_batches():
    (full,), real = bench.make_batches((3, 40, 10), 97, 1, False), bench.make_batches((8, 512, 128), 97, 40, True)
    assert [(len(t.tokens), sum(t.weights)) for t in full] == [(40, 10)] * 3
    lengths = [(len(t.tokens) - sum(t.weights), sum(t.weights)) for b in real for t in b]
    assert sum(p for p, _ in lengths) / 320 == pytest.approx(82, rel=.05)
    assert sum(a for _, a in lengths) / 320 == pytest.approx(101, rel=.1)
    assert all(len(t.tokens) <= 60 for b in bench.make_batches((8, 60, 20), 97, 5, True) for t in b)  # cut, and still with an answer
    p = bench.padded(full[:1] + batch(((3, 2),)), 41, "cpu")
    assert p["attention_mask"].sum(1).tolist() == [40, 5] and (p["labels"] >= 0).sum(1).tolist() == [10, 2]


@pytest.fixture
def tiny_run(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    return ["config/bench_cpu.py", f"--model={tmp_path}/tiny.json", "--attn_sparsity=.5", "--lora_r=4", "--shape=3x40/10",
            f"--out={tmp_path}/out.json"]


@pytest.mark.parametrize("kind, tied", [("llama", False), ("llama", True), ("qwen2", False)])
def test_hf_and_ours_do_the_same_work(tiny_run, kind, tied):
    """Same loss from the same weights, the FLOPs that we count for HF, and a step of theirs that leaves our weights alone."""
    pytest.importorskip("peft")
    cfg, raw = config.load(tiny_run[:4]), {**TINY, "model_type": kind, "tie_word_embeddings": tied}
    shared, tokens = bench.Shared(cfg, raw), batch()
    rows, padded = bench.make_rows(shared, raw, 40, tokens)
    sparse = [f"+ {part}, {how}" for part in ("MLP", "attention") for how in ("svd", "measured", "measured + map")]
    assert [r.name for r in rows] == ["HF + PEFT", "dense LoRA", *sparse] and padded.name == "HF + PEFT, padded to 40"
    for r in (rows[0], padded):
        b = r.batch(tokens)
        ours = data.collate(tokens)
        rows[1].select()
        loss = shared.model.loss(ours).item() / ours.weights.sum().item()
        assert r.hf.model(**b).loss.item() == pytest.approx(loss, rel=1e-5)
        assert r.flops(b) == counted(lambda: r.hf.model(**b, use_cache=False).loss.backward())
    before = [p.clone() for p in shared.model.parameters()]
    padded.step(padded.batch(tokens))
    assert all(torch.equal(a, b) for a, b in zip(before, shared.model.parameters()))


def test_the_map_is_all_that_its_row_adds(tiny_run):
    """The rows with and without it keep the same channels, and each row counts its own map and copies."""
    shared = bench.Shared(config.load(tiny_run[:4]), TINY)
    rows = {r.name: r for r in bench.make_rows(shared, TINY, 40, batch())[0]}
    without, with_map = (rows[f"+ attention, measured{x}"] for x in ("", " + map"))
    for a, b in zip(without.own.values(), with_map.own.values()):
        if a is not None:
            assert str(a.fixed.channels) == str(b.fixed.channels) and a.map is None and (b.map is not None) == b.is_mlp
    more = sum(t.numel() for t in with_map.resident()) - sum(t.numel() for t in without.resident())
    assert more == 2 * (2 * 64 * 64 + 64)  # of the two blocks that are sparse: U, V of the width 64 at most, b


def test_rows_that_run_out_of_memory_are_said(tiny_run, tmp_path, monkeypatch, capsys):
    """Dense LoRA's too, on which other numbers lean."""
    step = bench.Ours.step

    def small_card(self, *args):
        if self.name in ("dense LoRA", "+ MLP, svd"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, *args)

    monkeypatch.setattr(bench.Ours, "step", small_card)
    monkeypatch.setattr(bench, "hugging_face", lambda *args: "not installed (peft)")
    bench.main(tiny_run + ["--steps=1", "--real=False"])
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["full"]["missing"] == {"HF + PEFT": "not installed (peft)", "dense LoRA": "out of memory", "+ MLP, svd": "out of memory"}
    text = bench_report.section(out)
    assert "| + MLP, measured " in text and text in capsys.readouterr().out
    assert "out of memory" in text and "not installed (peft)" in text and "+ MLP, svd: choosing" not in text


def test_one_run(tiny_run, tmp_path, capsys):
    bench.main(tiny_run + ["--steps=2"])
    out = json.loads((tmp_path / "out.json").read_text())
    rows = {r["row"]: r for r in bench_report.with_ratios(out["full"])}
    assert rows["dense LoRA"]["share"] == 1 and all(r["total_ms"] > 0 and len(r["times_ms"]) == 2 for r in rows.values())
    flops = [rows[name]["flops"] for name in ("+ attention, measured", "+ MLP, measured", "+ MLP, measured + map", "dense LoRA")]
    assert flops == sorted(flops) and len(set(flops)) == 4
    assert rows["+ MLP, svd"]["peak_gib"] < rows["dense LoRA"]["peak_gib"]
    assert rows["+ MLP, svd"]["predictor_ms"] > 0
    text = capsys.readouterr().out
    assert "share" in text and "+ MLP, svd: choosing channels takes" in text
    file = tmp_path / "bench.md"
    with pytest.raises(UserError, match="no measurement"):
        bench_report.write(tmp_path / "nothing", file)
    (tmp_path / "tiny.json").unlink()
    bench_report.write(tmp_path, file)
    assert "+ attention, svd" in file.read_text() and "unmeasured" in file.read_text()


def test_what_the_map_costs_is_the_median_of_the_rounds():
    """The load may be another in each round; both rows of a round meet the same."""
    row = dict(tokens=10, peak_gib=1.0)
    group = dict(gemm_flops=1e9, rows=[dict(row, row="+ MLP, measured", times_ms=[10., 20., 40.], flops=100),
                                       dict(row, row="+ MLP, measured + map", times_ms=[11., 22., 80.], flops=104)])
    without, with_map = bench_report.with_ratios(group)
    assert with_map["map_time"][1] == pytest.approx(1.1) and with_map["map_flops"] == 1.04 and "map_time" not in without
    line, = bench_report.notes([without, with_map])
    assert "1.100x the time" in line and "1.040x the FLOPs: +5.8% beyond" in line


def test_runs_of_old_are_still_read():
    """Their steps' times are in three parts, and their own ratios are made anew."""
    row = dict(row="dense LoRA", tokens=10, peak_gib=1.0, flops=100, share=7.0, over_hf=7.0)
    new, = bench_report.with_ratios(dict(gemm_flops=1e9, rows=[dict(row, times_ms=[[1., 2., 3.], [2., 3., 3.]])]))
    assert new["total_ms"] == 7 and new["share"] == 1 and "over_hf" not in new


def test_single_products():
    rows = bench_measure.product_times(tiny(), rows=(8,), repeats=1)
    assert len(rows) == 24 and all(min(r[k] for k in ("ours", "copied", "library", "dense")) > 0 for r in rows)
    out = dict(arch="a", shape="1x8/4", lora="r 4", dtype="float32", device="H100", threads=1, steps=1, commit="c", command="x",
               products=rows)
    assert bench_report.section(out).count("x W[idx].T") == 12


# ---- no step waits for the GPU ---------------------------------------------------------------------------------------------------

def where(error):
    """file:line of the repository's innermost frame in an exception's traceback."""
    own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(config.ROOT)]
    return f"{own[-1].filename}:{own[-1].lineno}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_step_waits_for_the_gpu(tiny_run):
    """(Of the waits of torch.distributed and of Triton's tuning torch does not know.)"""
    cfg = config.load(tiny_run[:4] + ["--device=cuda", "--dtype=bfloat16"])
    shared = bench.Shared(cfg, TINY)
    for r in bench.make_rows(shared, TINY, 40, batch())[0]:
        if not r.ours:
            continue
        r.select()
        r.step(r.batch(batch()))  # tunes the kernels, which waits
        b = r.batch(batch())
        torch.cuda.set_sync_debug_mode("error")
        try:
            r.step(b)
        except RuntimeError as e:
            pytest.fail(f"{r.name} waits at {where(e)}: {e}")
        finally:
            torch.cuda.set_sync_debug_mode("default")
