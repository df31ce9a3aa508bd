"""
Tests of kernels.py: every Triton kernel against its torch reference, on a GPU where there is one, else in
Triton's interpreter (a subprocess with TRITON_INTERPRET=1); the references against plain formulas; and every
configuration that autotuning may pick compiled for sm_80 and sm_90. That needs no GPU and sees what the
interpreter cannot: missing tensor-core instructions and asynchronous copies, too much shared memory, spills.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest
import torch

import kernels as K
from lib import nf4

ROOT = os.path.dirname(os.path.abspath(K.__file__))
CUDA = torch.cuda.is_available() and K.triton is not None
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * CUDA
ROWS, CHANNELS, N = (1, 6, 42, 123), (16, 48, 96), 96  # C = N is among them
on_kernels = pytest.mark.skipif(not (CUDA or K.INTERPRET), reason="needs a GPU or TRITON_INTERPRET=1")
SHAPES = [(0, 16), (6, 0), (0, 0)]
if CUDA:
    SHAPES += [(t, c) for t in ROWS for c in CHANNELS]
else:  # the interpreter is slow: each number of rows and of channels, not each pair
    SHAPES += [(1, 16), (6, 48), (42, 96), (123, 48)]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def randn(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE, dtype)


def channels(C, n=N):
    return torch.randperm(n, generator=torch.Generator().manual_seed(C))[:C].sort().values.to(DEVICE)


def strided(t):
    """The same values as rows of a wider tensor, as slices of a stream have it."""
    wide = torch.full((t.shape[0], t.shape[1] + 16), float("nan"), dtype=t.dtype, device=t.device)
    wide[:, :t.shape[1]] = t
    return wide[:, :t.shape[1]]


def close(got, want, dtype):
    """Relative to the largest value; the reference is computed in fp64 from the very inputs."""
    assert got.shape == want.shape and not got.isnan().any()
    limit = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    if want.numel():
        error = (got.double() - want).abs().max() / (want.abs().max() + 1e-9)
        assert error < limit, f"relative error {error:.1e}"


# ------------------------------------------------------------------------------------------------------------
# each kernel against the reference

@on_kernels
@dtypes
def test_gather_matmul_nt(dtype):
    for T, C in SHAPES:
        check_nt(T, C, 40 if T % 2 else 64, dtype)  # 40 is no multiple of a block


def check_nt(T, C, D, dtype):
    x, w, bias = randn(T, D, dtype=dtype), randn(N, D, dtype=dtype, seed=1), randn(N, dtype=dtype)
    idx = channels(C)
    xd, wd, bd = x.double(), w.double(), bias.double()
    close(K.gather_matmul_nt(x, w, idx), K.gather_matmul_nt_ref(xd, wd, idx), dtype)
    want = K.gather_matmul_nt_ref(xd, wd, idx, bias=bd)
    close(K.gather_matmul_nt(strided(x), strided(w), idx, bias=bias), want, dtype)
    close(K.gather_matmul_nt(x.T.contiguous().T, w, idx, bias=bias), want, dtype)  # stored by columns
    old = randn(T, N, dtype=dtype, seed=2)
    for b, out in ((None, old.clone()), (bias, strided(old))):
        want = K.gather_matmul_nt_ref(xd, wd, idx, old.double(), None if b is None else bd)
        for _ in range(2):  # it only writes: twice is once
            got = K.gather_matmul_nt(strided(x), w, idx, out, b)
        assert got is out
        close(got, want, dtype)
        rest = torch.ones(N, dtype=torch.bool, device=DEVICE).index_fill_(0, idx, False)
        assert torch.equal(got[:, rest], old[:, rest])


@on_kernels
@dtypes
def test_gather_matmul_nn(dtype):
    for T, C in SHAPES:
        check_nn(T, C, 40 if T % 2 else 64, dtype)


def check_nn(T, C, D, dtype):
    h, x, w = randn(T, C, dtype=dtype), randn(T, N, dtype=dtype), randn(N, D, dtype=dtype, seed=1)
    idx = channels(C)
    compact, gathered = h.double() @ w.double()[idx], x.double()[:, idx] @ w.double()[idx]
    out = strided(randn(T, D, dtype=dtype, seed=2))
    close(K.gather_matmul_nn(h, w, idx), compact, dtype)
    assert K.gather_matmul_nn(strided(h), strided(w), idx, out=out) is out
    close(out, compact, dtype)
    close(K.gather_matmul_nn(K.columns(strided(x), idx), w, idx, out=out), gathered, dtype)


def packed(D, dtype):
    """N rows of three tensors, in 4 bits."""
    w = nf4.empty([40, 40, N - 80], D, dtype, DEVICE)
    for first, rows in zip((0, 40, 80), randn(N, D, dtype=dtype, seed=1).split([40, 40, N - 80])):
        nf4.put(w, first, *nf4.quantize(rows))
    return w


@on_kernels
@dtypes
def test_packed_weight(dtype):
    """All of it, some rows and a slice unpack to the reference's bits; both products are those with these numbers."""
    D = 192
    w = packed(D, dtype)
    whole = K.unpack_ref(w.codes, w.scales(), torch.empty(N, D, dtype=dtype, device=DEVICE))
    assert torch.equal(w.unpack(), whole) and torch.equal(w[40:].unpack(), whole[40:])
    bias, exact = randn(N, dtype=dtype), whole.double()
    for T, C in ((1, 16), (42, 48), (123, 96), (0, 16), (6, 0)):
        idx = channels(C)
        assert torch.equal(w.unpack(idx), whole[idx])
        x, h, old = randn(T, D, dtype=dtype), randn(T, C, dtype=dtype), randn(T, N, dtype=dtype, seed=2)
        close(K.gather_matmul_nt(strided(x), w, idx), x.double() @ exact[idx].T, dtype)
        want = K.gather_matmul_nt_ref(x.double(), exact, idx, old.double(), bias.double())
        close(K.gather_matmul_nt(x, w, idx, strided(old), bias), want, dtype)
        rows, own = w[40:], channels(C, N - 40)  # a slice has its own row numbers
        close(K.gather_matmul_nt(x, rows, own[own < 56]), x.double() @ exact[40:][own[own < 56]].T, dtype)
        out = strided(randn(T, D, dtype=dtype, seed=2))
        assert K.gather_matmul_nn(strided(h), w, idx, out=out) is out
        close(out, h.double() @ exact[idx], dtype)


@on_kernels
@dtypes
def test_swiglu(dtype):
    for T, C in SHAPES:
        check_swiglu(T, C, dtype)


def check_swiglu(T, C, dtype):
    gu, dh = 3 * randn(T, 2 * C, dtype=dtype), randn(T, C, dtype=dtype, seed=1)
    close(K.swiglu(strided(gu)), K.swiglu_ref(gu.double()), dtype)
    want = K.swiglu_backward_ref(dh.double(), gu.double())
    close(K.swiglu_backward(strided(dh), strided(gu)), want, dtype)


@on_kernels
@dtypes
def test_mlp_scores(dtype):
    for T, r, I in [(1, 8, 96), (6, 9, 43), (42, 17, 130), (123, 8, 16), (0, 8, 16), (1100, 9, 70)]:
        check_scores(T, r, I, dtype)


def check_scores(T, r, I, dtype):
    z = [randn(T, r, dtype=dtype, seed=s) for s in (0, 1)]
    q = [randn(r, I, dtype=dtype, seed=s) for s in (2, 3)]
    got = K.mlp_scores(*z, *q)
    assert got.dtype == torch.float32 and torch.equal(got, K.mlp_scores(*z, *q))
    close(got, K.mlp_scores_ref(*(t.double() for t in z + q)).double(), torch.float32)


@on_kernels
@dtypes
@pytest.mark.parametrize("n_rot, n_heads, hd", [(3, 4, 8), (10, 12, 20), (0, 2, 16), (2, 2, 16)])
def test_rope(n_rot, n_heads, hd, dtype):
    for T, holes in [(1, 0), (6, 5), (42, 0), (123, 4), (0, 3), (0, 0)]:
        check_rope(T, holes, n_rot, n_heads, hd, dtype)


def check_rope(T, holes, n_rot, n_heads, hd, dtype):
    qkv, angle = randn(T, n_heads * hd, dtype=dtype), randn(T, hd // 2, dtype=torch.float32, seed=1)
    rows, cos, sin = channels(T, T + holes), angle.cos(), angle.sin()
    rope = (cos, sin, rows, n_rot, hd)
    exact = (cos.double(), sin.double(), rows, n_rot, hd)
    got = K.rope_scatter(strided(qkv), *rope, T + holes)
    close(got, K.rope_scatter_ref(qkv.double(), *exact, T + holes), dtype)
    dgrid = randn(T + holes, n_heads * hd, dtype=dtype, seed=2)
    want = K.rope_gather_backward_ref(dgrid.double(), *exact)
    close(K.rope_gather_backward(strided(dgrid), *rope), want, dtype)


def test_in_the_interpreter():
    """Runs the tests above on the CPU; TRITON_INTERPRET counts at import, hence the subprocess."""
    if K.INTERPRET or CUDA or K.triton is None:
        pytest.skip("the tests above have run, or there is no triton")
    env = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k"]
    halves = [[*command, f"not compile and not without_triton and {half}"] for half in ("float16", "not float16")]
    passed = 0
    for output in at_once(halves, env):
        passed += int(re.search(r"(\d+) passed", output)[1])
    assert passed >= 18


def at_once(commands, env):
    """Python with these arguments, each in a process of its own, all at a time -> what they print."""
    runs = [subprocess.Popen([sys.executable, *command], env=env, cwd=ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True) for command in commands]
    outputs = [run.communicate()[0] for run in runs]
    for run, output in zip(runs, outputs):
        assert run.returncode == 0, output[-5000:]
    return outputs


# ------------------------------------------------------------------------------------------------------------
# the references themselves: the CPU path, in fp64, against autograd and plain indexing

def test_dense_product_in_blocks():
    """More than 4096 columns go in blocks, the last one short; a batch's columns come out as without."""
    x, w = (randn(n, 8, dtype=torch.float32) for n in (5, 4096 + 2049))
    close(K.matmul_nt(x, w), x.double() @ w.double().T, x.dtype)
    close(K.matmul_nt(x, w[:4096]), x.double() @ w[:4096].double().T, x.dtype)


def test_references_agree_with_plain_formulas():
    T, D, C, f64 = 7, 24, 32, torch.float64
    x, w, idx, bias = randn(T, D, dtype=f64), randn(N, D, dtype=f64), channels(C), randn(N, dtype=f64)
    full = x @ w.T + bias
    close(K.gather_matmul_nt(x, w, idx, bias=bias), full[:, idx], f64)
    out = K.gather_matmul_nt(x, w, idx, torch.zeros_like(full), bias)
    want = torch.zeros_like(full)
    want[:, idx] = full[:, idx]
    close(out, want, f64)
    y = randn(T, N, dtype=f64)
    close(K.gather_matmul_nn(K.columns(y, idx), w, idx, out=torch.zeros_like(x)), y[:, idx] @ w[idx], f64)
    close(K.put_columns(torch.zeros_like(full), idx, full[:, idx]), want, f64)
    close(K.gather_matmul_nn(y[:, :C], w, idx), y[:, :C] @ w[idx], f64)


def test_backward_references_are_the_gradients():
    C, hd, n_rot, f64 = 32, 8, 3, torch.float64
    gu, dh = randn(9, 2 * C, dtype=f64).requires_grad_(), randn(9, C, dtype=f64)
    (torch.nn.functional.silu(gu[:, :C]) * gu[:, C:] * dh).sum().backward()
    close(K.swiglu(gu.detach()), torch.nn.functional.silu(gu[:, :C]).detach() * gu[:, C:].detach(), f64)
    close(K.swiglu_backward(dh, gu.detach()), gu.grad, f64)

    qkv, angle = randn(9, 4 * hd, dtype=f64).requires_grad_(), randn(9, hd // 2, dtype=f64)
    rows = channels(9, 14)
    x = qkv.view(9, 4, hd)
    half = torch.cat([-x[..., hd // 2:], x[..., :hd // 2]], -1)  # Hugging Face's rotate_half
    cos, sin = (torch.cat([f(angle)] * 2, 1)[:, None] for f in (torch.cos, torch.sin))
    rotated = torch.cat([(x * cos + half * sin)[:, :n_rot], x[:, n_rot:]], 1).view(9, -1)
    grid = torch.zeros(14, 4 * hd, dtype=f64, device=DEVICE).index_copy(0, rows, rotated)
    dgrid = randn(14, 4 * hd, dtype=f64, seed=1)
    (grid * dgrid).sum().backward()
    close(K.rope_scatter(qkv.detach(), angle.cos(), angle.sin(), rows, n_rot, hd, 14), grid.detach(), f64)
    close(K.rope_gather_backward(dgrid, angle.cos(), angle.sin(), rows, n_rot, hd), qkv.grad, f64)


def test_mlp_scores_reference():
    z = [randn(300, 9, dtype=torch.float64, seed=s) for s in (0, 1)]
    q = [randn(9, 1111, dtype=torch.float64, seed=s) for s in (2, 3)]
    want = (torch.nn.functional.silu(z[0] @ q[0]) * (z[1] @ q[1])).square().sum(0)
    close(K.mlp_scores(*z, *q).double(), want, torch.float32)
    close(K.mlp_scores(*(t.float() for t in z + q)).double(), want, torch.float32)


def test_imports_without_triton():
    code = ("import sys; sys.modules['triton'] = None; import torch, kernels as K; assert not K.INTERPRET;"
            "print(K.gather_matmul_nt(torch.ones(2, 4), torch.ones(3, 4), torch.tensor([1])).tolist())")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                         env=dict(os.environ, TRITON_INTERPRET="1"))
    assert run.stdout == "[[4.0], [4.0]]\n", run.stderr


# ------------------------------------------------------------------------------------------------------------
# compile every configuration, no GPU needed

LIMITS = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory a program may have


def compile_kernel(arch, kernel, types, odd, constants, stages=3, warps=4):
    """Compile as a launch would, with pointers and integers divisible by 16 (but those named in `odd`)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    types = types | dict.fromkeys(constants, "constexpr")
    aligned = [i for i, name in enumerate(kernel.arg_names) if name not in [*constants, *odd]]
    source = ASTSource(kernel, {name: types.get(name, "i32") for name in kernel.arg_names}, constants,
                       {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = dict(num_stages=stages, num_warps=warps)
    out = K.triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tools, ptx = os.path.join(os.path.dirname(K.triton.__file__), "backends", "nvidia", "bin"), out.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(out.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([os.path.join(tools, "cuobjdump"), "--dump-resource-usage", cubin.name],
                               capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(s + r":(\d+)", usage)[1]) for s in ("REG", "STACK", "LOCAL"))
    return dict(arch=arch, kernel=kernel.__name__, **constants, **options, mma=ptx.count("mma.sync"),
                wgmma=ptx.count("wgmma.mma_async"), async16=len(re.findall(r"cp\.async\.cg.*0x10", ptx)),
                shared=out.metadata.shared, registers=registers, spilled=stack + local)


def compile_matmuls(arch, dtype, D, only_scattered=0):
    """dtype: "bf16", "fp16", "fp32" (TF32) or "exact" (fp32). only_scattered: 1 leaves out nt's compact output."""
    precision, dtype = "tf32" if dtype == "fp32" else "ieee", "fp32" if dtype == "exact" else dtype
    types = dict(x=f"*{dtype}", w=f"*{dtype}", idx="*i64", bias=f"*{dtype}", y=f"*{dtype}")
    odd = ["T", "T_BUCKET", "C_BUCKET"]
    x = SimpleNamespace(dtype=torch.float32 if dtype == "fp32" else torch.bfloat16)
    nt_modes = [dict(SCATTER=True, BIAS=True)]
    if not only_scattered:
        nt_modes.append(dict(SCATTER=False, BIAS=False))
    for tuner, modes in ((K.nt_kernel, nt_modes), (K.nn_kernel, [{}])):
        for mode in modes:
            for config in K.fitting(tuner.configs, dict(PRECISION=precision, x=x)):
                yield compile_kernel(arch, tuner.fn, types, odd,
                                     dict(D=D, PRECISION=precision, **mode, **config.kwargs),
                                     config.num_stages, config.num_warps)


def compile_packed(arch, dtype, D):
    """The products with a packed weight; as of compile_matmuls."""
    precision, dtype = "tf32" if dtype == "fp32" else "ieee", "fp32" if dtype == "exact" else dtype
    types = dict(x=f"*{dtype}", w="*u8", scales="*fp32", idx="*i64", table="*fp32", bias=f"*{dtype}", y=f"*{dtype}")
    x = SimpleNamespace(dtype=torch.float32 if dtype == "fp32" else torch.bfloat16)
    for tuner, mode in ((K.nt_packed_kernel, dict(SCATTER=True, BIAS=True)), (K.nn_packed_kernel, {})):
        for config in K.fitting(tuner.configs, dict(PRECISION=precision, x=x, table=None)):
            yield compile_kernel(arch, tuner.fn, types, ["T", "T_BUCKET", "C_BUCKET"],
                                 dict(D=D, PRECISION=precision, **mode, **config.kwargs),
                                 config.num_stages, config.num_warps)


def compile_others(arch, dtype):
    types = dict.fromkeys(["gu", "h", "dh", "dgu", "zg", "zu", "qg", "qu", "src", "dst"], f"*{dtype}")
    types |= dict(part="*fp32", cos="*fp32", sin="*fp32", rows="*i64")
    for columns in (16, 1024):
        block = dict(BLOCK_T=1024 // columns, BLOCK_C=columns)
        yield compile_kernel(arch, K.swiglu_kernel, types, ["T"], block)
        yield compile_kernel(arch, K.swiglu_backward_kernel, types, ["T"], block)
    unpack = types | dict(codes="*u8", scales="*fp32", table="*fp32", idx="*i64", y=f"*{dtype}")
    for picked in (True, False):
        yield compile_kernel(arch, K.unpack_kernel, unpack, ["C"], dict(PICKED=picked, BLOCK_C=8, BLOCK_B=128))
    block = dict(ROWS=512, R=16, PRECISION="ieee", BLOCK_T=64, BLOCK_I=64)
    yield compile_kernel(arch, K.mlp_scores_kernel, types, ["T", "r"], block)
    for half in (32, 64):
        for scatter in (True, False):
            block = dict(HALF=half, SCATTER=scatter, BLOCK_H=8, BLOCK_D=half)
            yield compile_kernel(arch, K.rope_kernel, types, ["n_rot", "n_heads"], block)


@pytest.mark.slow
def test_exact_fp32_compiles(tmp_path):
    """Without spills."""
    results = compiled(tmp_path, "matmuls", "exact", 4096) + compiled(tmp_path, "packed", "exact", 4096)
    assert len(results) == 10 and all(r["spilled"] == 0 for r in results)


def test_exact_fp32_takes_small_tiles():
    """One for both products; TF32 and half precision have the large ones too."""
    if K.triton is None or K.INTERPRET:
        pytest.skip("nothing is tuned")
    for tuner in (K.nt_kernel, K.nn_kernel, K.nt_packed_kernel, K.nn_packed_kernel):
        table = dict.fromkeys({"table"} & set(tuner.fn.arg_names))
        n = [len(K.fitting(tuner.configs, dict(PRECISION=precision, x=torch.empty(0, dtype=dtype), **table)))
             for dtype, precision in ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee"))]
        assert n == [1, len(tuner.configs), len(tuner.configs)]


def compiled(tmp_path, *args):
    if K.triton is None:
        pytest.skip("no triton")
    env = dict(os.environ, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    commands = [["-m", "tests.test_kernels", str(arch), *map(str, args)] for arch in LIMITS]
    lines = "".join(at_once(commands, env)).splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


@pytest.mark.parametrize("dtype, D, only_scattered", [
    ("bf16", 4096, 1), *(pytest.param(*p, 0, marks=pytest.mark.slow) for p in
                         [("bf16", 4096), ("fp16", 4096), ("bf16", 576), ("fp32", 4096)])])
def test_matmuls_compile(dtype, D, only_scattered, tmp_path):
    """Tensor cores, 16-byte asynchronous copies into two or more tiles, memory the chip has, no spills."""
    results = compiled(tmp_path, "matmuls", dtype, D, only_scattered)
    for r in results:
        assert r["wgmma" if r["arch"] == 90 else "mma"] > 0, r
        if dtype != "fp32":  # TF32 turns w on its way, 4 bytes a copy; tuning drops the tiles that do not fit
            assert r["async16"] > 0, r
            assert r["shared"] <= LIMITS[r["arch"]] and r["spilled"] == 0, r
        assert r["shared"] >= 2 * (r["BLOCK_M"] + r["BLOCK_N"]) * r["BLOCK_K"] * 2, r
    assert len(results) == 2 * ((2 - only_scattered) * 6 + 7)  # sm_80 and sm_90; nt compact and scattered, nn


@pytest.mark.slow
@pytest.mark.parametrize("dtype, D", [("bf16", 4096), ("fp16", 4096), ("bf16", 576), ("fp32", 4096)])
def test_packed_products_compile(dtype, D, tmp_path):
    """The same for a weight in 4 bits, which is unpacked in registers."""
    results = compiled(tmp_path, "packed", dtype, D)
    for r in results:
        assert r["shared"] <= LIMITS[r["arch"]] and r["spilled"] == 0, r
        if r["BLOCK_M"] == 32:  # the tile of exact fp32: too small for wgmma and for 16 bytes a thread
            continue
        assert r["wgmma" if r["arch"] == 90 else "mma"] > 0 and r["async16"] > 0, r
        assert r["shared"] >= 2 * (r["BLOCK_M"] * 2 + r["BLOCK_N"] // 2) * r["BLOCK_K"], r  # two tiles of x and of codes
    assert len(results) == 2 * (4 + 4)


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_others_compile(dtype, tmp_path):
    for r in compiled(tmp_path, "others", dtype):
        assert r["spilled"] == 0 and r["shared"] <= LIMITS[r["arch"]], r
        assert r["kernel"] != "mlp_scores_kernel" or dtype == "fp32" or r["mma"] + r["wgmma"] > 0, r


if __name__ == "__main__":  # python -m tests.test_kernels 90 matmuls bf16 4096: one JSON line a configuration
    arch, what, dtype, *D = sys.argv[1:]
    compile_all = dict(matmuls=compile_matmuls, packed=compile_packed, others=compile_others)[what]
    for result in compile_all(int(arch), dtype, *map(int, D)):
        print(json.dumps(result | dict(dtype=dtype)), flush=True)
