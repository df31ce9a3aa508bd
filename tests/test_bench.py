"""Tests of tools/bench*.py and of the FLOP counter that its ratios rest on. Tiny shapes, one thread."""
import json
import random
import shutil
import traceback
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config
from torch.utils.flop_counter import FlopCounterMode

import config
import data
import kernels
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


@pytest.mark.parametrize("targets", ["q,k,v,o", "o", "gate,up", "q,k,v,o,gate,up,down"])
def test_flops_of_lora_in_the_upper_blocks_are_torchs(targets):
    """Below them forward only, sparse too."""
    m, b = tiny(), data.collate(batch())
    m.add_lora(4, 8, targets, first=1)
    assert m.flops(b) == (n := counted(lambda: m.loss(b).backward()), n)
    predictor.attach(m, .5, [1, 0, 0], kind="measured", map_rank=5)
    predictor.measure(m, [b])
    assert m.flops(b) == (n, counted(lambda: m.loss(b).backward()))


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


@pytest.mark.parametrize("model_type, targets", [("llama", "q,k,v,o"), ("qwen2", "q,k,v,o,gate,up,down")])
def test_flops_without_queries_are_torchs(model_type, targets):
    m, b = tiny(model_type=model_type), data.collate(batch())
    m.add_lora(4, 8, targets)
    predictor.attach(m, [.5, .5, 0], [1, 1, 0], kind="measured", map_rank=5)
    before = m.flops(b)
    predictor.measure(m, [b])
    dense, sparse = m.flops(b)
    assert before == (dense, sparse) and sparse == counted(lambda: m.loss(b).backward())


@pytest.mark.parametrize("targets", ["q,k,v,o", "q,k,v,o,gate,up,down", "down", "k"])
@pytest.mark.parametrize("first", [0, 1])
def test_flops_of_a_sparse_backward(targets, first):
    """A little more than torch's: how many keys a loud row sees is known in the backward, and bounded before."""
    m, b = tiny(model_type="qwen2"), data.collate(batch())
    m.add_lora(4, 8, targets, first=first)
    predictor.attach(m, 0, 0, backward_sparsity=.8)
    dense, sparse = m.flops(b)
    exact = counted(lambda: m.loss(b).backward())
    assert exact <= sparse < 1.01 * exact
    assert sparse < dense


def test_memory_is_counted_without_memory():
    """results.memory: on the meta device, with stand-ins for what a GPU fuses."""
    m = memory.make_model({**TINY, "num_hidden_layers": 6}, 4)
    one, ten = (memory.step_bytes(m, n, False, 32, 8) for n in (1, 10))
    assert 5 * one < ten < 11 * one and memory.step_bytes(m, 10, True, 32, 8) < .8 * ten
    packed = memory.make_model({**TINY, "num_hidden_layers": 6}, 4, bits=4)
    kernels.buffers.clear()
    assert memory.step_bytes(packed, 10, False, 32, 8) == pytest.approx(ten, rel=.01) and not kernels.buffers
    assert memory.weight_bytes(packed, 1)[0] < .5 * memory.weight_bytes(m, 1)[0]
    memory.keep_channels(m, [.9] * 6, [0.0] * 6)
    assert memory.step_bytes(m, 10, False, 32, 8) < ten


# ---- the bench -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, billions", [("llama3-8b", 8.030), ("llama3.2-1b", 1.236), ("llama2-7b", 6.738), ("qwen2.5-7b", 7.616),
                                            ("smollm2-135m", .1345), ("qwen2.5-0.5b", .4940)])
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
    rows = bench.make_rows(shared, 40, tokens)
    sparse = [f"+ {part}, {how}" for part in ("MLP", "attention") for how in ("svd", "measured", "measured + map")]
    assert [r.name for r in rows] == ["HF + PEFT", "HF + PEFT, padded to 40", "dense LoRA", *sparse]
    hf, padded, dense = rows[:3]
    for r in (hf, padded):
        b = r.batch(tokens)
        ours = data.collate(tokens)
        dense.select()
        loss = shared.model.loss(ours).item() / ours.weights.sum().item()
        assert r.hf.model(**b).loss.item() == pytest.approx(loss, rel=1e-5)
        assert shared.model.flops(r.counted(b))[1] == counted(lambda: r.hf.model(**b, use_cache=False).loss.backward())
    before = [p.clone() for p in shared.model.parameters()]
    padded.step(padded.batch(tokens))
    assert all(torch.equal(a, b) for a, b in zip(before, shared.model.parameters()))


def test_the_map_is_all_that_its_row_adds(tiny_run):
    """The rows with and without it keep the same channels, and each row counts its own map and copies."""
    shared = bench.Shared(config.load(tiny_run[:4]), TINY)
    rows = {r.name: r for r in bench.make_rows(shared, 40, batch())}
    without, with_map = (rows[f"+ attention, measured{x}"] for x in ("", " + map"))
    for a, b in zip(without.own.values(), with_map.own.values()):
        if a is not None:
            assert str(a.fixed.channels) == str(b.fixed.channels) and a.map is None and (b.map is not None) == b.is_mlp
    more = sum(t.numel() for t in with_map.resident()) - sum(t.numel() for t in without.resident())
    assert more == 2 * (2 * 64 * 64 + 64)  # of the two blocks that are sparse: U, V of the width 64 at most, b


def test_a_row_without_queries(tiny_run, tmp_path):
    bench.main(tiny_run + ["--steps=1", "--real=False", "--rows=LoRA,attention", "--attn_sparsity=1", "--map_rank=4"])
    rows = json.loads((tmp_path / "out.json").read_text())["full"]["rows"]
    assert [r["row"] for r in rows] == ["dense LoRA", "+ attention, measured + map"]
    assert rows[1]["flops"] < rows[0]["flops"]


def test_a_row_with_a_sparse_backward(tiny_run, tmp_path):
    """The other rows do not see it; the same loss in the first step, for fewer FLOPs and less memory."""
    bench.main(tiny_run + ["--steps=1", "--real=False", "--rows=dense LoRA,backward", "--backward_sparsity=.9",
                           "--mlp_sparsity=0", "--attn_sparsity=0"])
    dense, sparse = json.loads((tmp_path / "out.json").read_text())["full"]["rows"]
    assert (dense["row"], sparse["row"]) == ("dense LoRA", "+ backward")
    assert sparse["flops"] < dense["flops"] and sparse["peak_gib"] < dense["peak_gib"]


def test_rows_on_4_bits(tiny_run, tmp_path, capsys):
    """--base_bits=4 gives each row of ours a twin on the packed base: half the weights' memory and another loss. The rows
    that share the model do not see it."""
    bench.main(tiny_run + ["--steps=1", "--real=False", "--base_bits=4", "--rows=dense,MLP", "--map_rank=4"])
    rows = {r["row"]: r for r in json.loads((tmp_path / "out.json").read_text())["full"]["rows"]}
    assert list(rows) == [f"{name}{bits}" for name in ("dense LoRA", "+ MLP, svd", "+ MLP, measured", "+ MLP, measured + map")
                          for bits in ("", " + 4 bits")]
    for name, r in rows.items():
        if "4 bits" in name:
            plain = rows[name.removesuffix(" + 4 bits")]
            assert r["flops"] == plain["flops"] and r["peak_gib"] < plain["peak_gib"] and r["unpack_ms"] > 0
            assert 0 < abs(r["loss"] - plain["loss"]) < .1 and plain["unpack_ms"] < r["unpack_ms"]
    assert "- dense LoRA + 4 bits: " in (text := capsys.readouterr().out) and "x the time without 4 bits" in text


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
    assert all(0 < r["of_roofline"] for r in rows.values())
    text = capsys.readouterr().out
    assert "share" in text and "of the roofline" in text and "- GEMM: " in text and "+ MLP, svd: choosing channels takes" in text
    file = tmp_path / "bench.md"
    with pytest.raises(UserError, match="no measurement"):
        bench_report.write(tmp_path / "nothing", file)
    (tmp_path / "tiny.json").unlink()
    bench_report.write(tmp_path, file)
    assert "+ attention, svd" in file.read_text() and "unmeasured" in file.read_text()


def test_some_rows_of_another_model(tiny_run, monkeypatch):
    """Only the rows that --rows names are built; ratios may be given by block; --compile adds its row."""
    monkeypatch.setattr(bench, "hugging_face", lambda *args: "not installed (peft)")
    shared = bench.Shared(config.load(tiny_run[:4] + ['--mlp_sparsity={"1": .75}', "--attn_sparsity=0"]), TINY)
    names = lambda words, **kw: [r.name for r in bench.make_rows(shared, 40, batch(), words, **kw)]
    assert names(["dense", "map"]) == ["dense LoRA", "+ MLP, measured + map"]
    assert [p and p.c for p in (b.mlp.predictor for b in shared.model.blocks)] == [None, 32, None]  # in steps of 32
    hf = ["HF + PEFT", "HF + PEFT, padded to 40"]
    assert names(["HF"]) == hf and names(["HF"], compile=True) == [*hf, "HF + PEFT, torch.compile"]
    with pytest.raises(UserError, match="--rows=nothing is in no row's name: there are HF .* PEFT; .*; dense LoRA;"):
        names(["nothing"])


def test_a_bug_of_ours_is_no_missing_row(tiny_run, tmp_path, monkeypatch):
    """What fails in others' code is said in its row; the first line of it."""
    def fails(*args):
        raise RuntimeError("no compiler\nand a long trace")

    pytest.importorskip("peft")
    run = tiny_run + ["--steps=1", "--real=False", "--compile=True", "--rows=HF,dense", '--mlp_sparsity={"1": .5}']
    monkeypatch.setattr(bench.HuggingFace, "step", fails)
    bench.main(run)
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["full"]["missing"] == {"HF + PEFT": "no compiler", "HF + PEFT, torch.compile": "no compiler"}
    assert out["command"].endswith("""'--mlp_sparsity={"1": .5}'""")  # as a shell wants it
    monkeypatch.setattr(bench.Ours, "step", fails)
    with pytest.raises(RuntimeError, match="no compiler"):
        bench.main(run)


@pytest.mark.slow
def test_without_a_compiler_the_row_says_so(tiny_run, tmp_path):
    pytest.importorskip("peft")
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        bench.main(tiny_run + ["--steps=1", "--real=False", "--compile=True", "--rows=compile"])
    out = json.loads((tmp_path / "out.json").read_text())["full"]
    assert out["rows"] == [] and "No working C++ compiler" in out["missing"]["HF + PEFT, torch.compile"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_is_the_same_step(tiny_run):
    """Same loss and gradients of the adapter that both share."""
    pytest.importorskip("peft")
    torch._dynamo.reset()
    shared, tokens = bench.Shared(config.load(tiny_run[:4]), TINY), batch()
    plain, padded, compiled = bench.make_rows(shared, 40, tokens, ["HF"], compile=True)
    b = compiled.batch(tokens)
    assert b["input_ids"].shape == (3, 40) and compiled.hf is plain.hf
    grads = []
    for model in (plain.hf.model, plain.hf.compiled):
        loss = model(**b, use_cache=False).loss
        grads.append([loss.detach(), *torch.autograd.grad(loss, plain.hf.params)])
    for eager, other in zip(*grads):
        torch.testing.assert_close(eager, other, rtol=1e-4, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # it did compile
    before = [p.clone() for p in plain.hf.params]
    compiled.step(b)
    assert not all(torch.equal(p, q) for p, q in zip(before, plain.hf.params))


def test_traffic_counts_what_is_kept():
    """One block of three is sparse and the last reads its loss rows only: by hand, in fp32."""
    m, b = tiny(), data.collate(batch())
    m.add_lora(4, 8, "o")
    T, T_loss, D, I = len(b.tokens), 31, 64, 96
    block = lambda t, channels: 22 * t * D + 8 * (t * 64 + T * 32) + 8 * channels
    dense = 2 * block(T, T * I) + block(T_loss, T_loss * I) + 5 * T_loss * 97
    rest = 7 * 3 * 4 * 128  # AdamW
    assert bench_measure.traffic(m, b) == 4 * (dense + rest)
    predictor.attach(m, [0, .75, 0], 0.0)
    assert bench_measure.traffic(m, b) == 4 * (dense + rest - 8 * b.n_sparse * (96 - 32))


def test_roofline_and_ratios_by_hand(monkeypatch):
    """The machine does 1e6 FLOP/s and moves 1e5 bytes/s, as it says; the rounds' loads differ threefold."""
    class Row:
        ours, shared = True, SimpleNamespace(model=None, device=torch.device("cpu"))
        select, step = (lambda *args: None,) * 2

        def __init__(self, name):
            self.name = name

        def batch(self, tokenized):
            return tokenized

    stats = {"dense LoRA": (6000, 200), "+ MLP, measured": (3000, 100)}  # FLOPs, bytes
    times = iter([10., 5., 6., 30., 20., 12.])  # the first row changes from round to round
    monkeypatch.setattr(bench_measure, "warm_up", lambda row, _: dict(
        row=row.name, flops=stats[row.name][0], traffic=stats[row.name][1], tokens=10, peak_gib=1., times_ms=[]))
    monkeypatch.setattr(bench_measure, "machine_rates", lambda model: (1e6, 1e5))
    monkeypatch.setattr(bench_measure, "milliseconds", lambda *args: next(times))
    out = bench_measure.measure(Row.shared, [Row(name) for name in stats], [0], 3)
    dense, sparse = bench_report.with_ratios(out)
    assert dense["times_ms"] == [10, 30, 20] and sparse["times_ms"] == [5, 6, 12]
    assert dense["of_roofline"] == pytest.approx((6 + 2) / 20) and sparse["of_roofline"] == pytest.approx((3 + 1) / 6)
    assert sparse["over_dense"] == 2 and sparse["flop_ratio"] == 2 and sparse["share"] == 1  # of 2, 5 and 1.67


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
    for r in bench.make_rows(shared, 40, batch()):
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
