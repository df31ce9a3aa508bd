"""
Products with picked rows of a frozen weight, and the few elementwise kernels that pay.

    T rows of the stream, D model width, N rows of a weight w (N, D), idx (C,) the kept ones (int64),
    hd head width, I hidden width of the MLP, r rank of the predictor's factors.

A sparse layer computes C of N channels. Weights lie with the sparse axis first, so that whole rows are read,
D contiguous elements each, streamed to shared memory by asynchronous copies as in a dense product.
Two products serve the forward and the backward of everything (w never gets a gradient):

    gather_matmul_nt   y[t, c] = sum_d x[t, d] w[idx[c], d]    picks outputs: qkv, gate, up; dh = dy Wd[idx].T
    gather_matmul_nn   y[t, d] = sum_c x[t, c] w[idx[c], d]    picks the sum's terms: o, down; dx = dg Wg[idx]

                        FLOPs          bytes moved (e = element size)
    dense               2 T N D        e (T D + N D + T N)
    picked              2 T C D        e (T D + C D + T C)     a scattered y leaves out's other columns alone
    index_select + mm   2 T C D        e (T D + 3 C D + T C)   the copy is read, written and read again;
                                       + 2 e T C               one more pass for a scattered y or a gathered x
    swiglu              5 T C          3 e T C                 backward 5 e T C
    mlp_scores          4 T I r        2 e r (T + I) + 4 I     no (T, I) tensor
    rope                3 T n_rot hd   2 e T N                 + zeros, where the grid has holes

Each operation: formula, torch reference, Triton kernel, launcher. CUDA tensors in fp32, bf16, fp16 take the
kernel (fp32 accumulation), all others the reference, which is the CPU path and written to be fast there. With
TRITON_INTERPRET=1 set before the import CPU tensors take the kernels too: so tests see them without a GPU.
(The paper's code copies the picked rows and calls the library. Where rows are worth a copy for many steps, sparse.py
keeps one and calls the library too; which of the two is faster on a GPU is unmeasured: tools.bench times both.)

A weight may be packed in 4 bits (NF4, the next section). Then the two products unpack the picked rows in registers, and
a product with the whole weight unpacks it before, into one buffer that all layers share.
"""
import os
from functools import cache

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # not on Linux: the references are left, the kernels below are never called
    triton = None

    class tl:
        constexpr = None

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1" and triton is not None
jit = triton.jit(do_not_specialize=["T"]) if triton is not None else lambda f: f


def tuned(*tiles):
    """Autotune a product over (BLOCK_M, BLOCK_N, BLOCK_K, stages, warps), once per power of two of T and C.
    T changes with every batch: keyed on exact values, training would tune for ever."""
    if triton is None:
        return lambda kernel: kernel
    if INTERPRET:
        tiles = [(32, 32, 32, 1, 4)]  # a single config is never timed, and odd sizes meet every mask
    configs = []
    for m, n, k, stages, warps in tiles:
        block = dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k)
        configs.append(triton.Config(block, num_stages=stages, num_warps=warps))

    def tune(kernel):
        compiled = triton.jit(kernel, do_not_specialize=["T", "T_BUCKET", "C_BUCKET"])
        key = ["T_BUCKET", "C_BUCKET", "D"]
        return triton.autotune(configs, key, prune_configs_by={"early_config_prune": fitting})(compiled)
    return tune


def fitting(configs, args, **_):
    """Exact fp32 has no tensor cores: its products are unrolled, and large tiles compile for minutes and spill. With a
    packed weight a block has two products."""
    exact = args["x"].dtype == torch.float32 and args["PRECISION"] == "ieee"
    if not exact:
        return configs
    limit = 64 * 64 * 32
    if "table" in args:
        limit //= 4
    small = []
    for config in configs:
        block = config.kwargs
        if block["BLOCK_M"] * block["BLOCK_N"] * block["BLOCK_K"] <= limit:
            small.append(config)
    return small


def bucket(n):
    """The power of two that is at least n; 16 at least."""
    return max(16, 1 << max(n - 1, 0).bit_length())


def on_kernel(x):
    """Whether x is one for a Triton kernel."""
    if INTERPRET:  # its tl.dot reads bf16 as integers
        return x.dtype in (torch.float32, torch.float16)
    return x.is_cuda and triton is not None and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def side_by_side(x):
    """The kernels step from row to row by x.stride(0) and expect the elements of a row side by side."""
    if x.stride(1) == 1:
        return x
    return x.contiguous()


def precision(x):
    """fp32 products are exact unless the user has allowed TF32 for torch's own."""
    tf32 = x.dtype == torch.float32 and x.is_cuda and torch.backends.cuda.matmul.allow_tf32
    if tf32:
        return "tf32"
    return "ieee"


def even_and_odd(x):
    """x (T, D) -> (2, T, D / 2): its even columns, then its odd ones."""
    return x.unflatten(1, (-1, 2)).permute(2, 0, 1).contiguous()


def programs(n_rows, n_columns):
    """A product's grid: one program for each block of its result."""
    def grid(block):
        n_m = triton.cdiv(n_rows, block["BLOCK_M"])
        n_n = triton.cdiv(n_columns, block["BLOCK_N"])
        return (n_m * n_n,)
    return grid


@jit
def tile(pid, n_m, n_n, GROUP: tl.constexpr):
    """Program number -> block row and column, so that GROUP block rows share w's blocks in the L2 cache."""
    group = pid // (GROUP * n_n)
    size = min(n_m - group * GROUP, GROUP)  # the last group may have fewer block rows
    within = pid % (GROUP * n_n)
    m = group * GROUP + within % size
    n = within // size
    return m, n


@jit
def store(y, acc, m, col, inside, y_stride, BLOCK_M: tl.constexpr):
    """Writes acc (BLOCK_M, BLOCK_N) to the m-th block of y's rows and to columns col (BLOCK_N,), where it is inside."""
    first_row = y + m.to(tl.int64) * BLOCK_M * y_stride
    y_rows = first_row + tl.arange(0, BLOCK_M)[:, None] * y_stride
    tl.store(y_rows + col[None, :], acc.to(y.dtype.element_ty), mask=inside)


def matmul_nt(x, w):
    """x (T, D), w (N, D) -> x w.T (T, N), dense. On a CPU in fp32 2048 columns at a time: two threads of MKL
    make 8192 columns of 787 rows at 193 GFLOP/s, so at 202; 49,152 of 170 rows at 190 and 207. bf16 gains
    nothing."""
    w = unpacked(w)
    if x.is_cuda or x.dtype != torch.float32 or len(w) <= 4096:
        return x @ w.T
    y = x.new_empty(len(x), len(w))  # (T, N)
    for rows, columns in zip(w.split(2048), y.split(2048, 1)):
        torch.mm(x, rows.T, out=columns)
    return y


# ------------------------------------------------------------------------------------------------------------
# a frozen weight in 4 bits (NF4 of QLoRA, Dettmers et al. 2023, arXiv 2305.14314); how it is made: lib/nf4.py

# What a code stands for: quantiles of a normal distribution, 0 among them, scaled to -1 .. 1.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
BLOCK = 64  # numbers of a row that share a scale
SCALES = 256  # scales that share a scale of their own


@cache
def nf4_values(device):
    """(16,) fp32."""
    return torch.tensor(NF4_VALUES, device=device)


@cache
def nf4_pairs(device):
    """(256,): the two values of a byte, its high half first. Both fp32 lie in one fp64, which index_select copies as
    one number: 8192 x 1024 in 10 ms, one core; as pairs 16, as quadruples from a table of 65,536 13."""
    values = nf4_values(device)
    byte = torch.arange(256, device=device)
    return torch.stack([values[byte >> 4], values[byte & 15]], 1).view(torch.float64).flatten()


@cache
def scale_values(device):
    """(256,) fp32, sorted: bitsandbytes' signed dynamic map (Dettmers et al. 2022, arXiv 2110.02861). A sign, a power
    of ten, and a fraction of as many bits as the exponent leaves: few for small numbers."""
    values = [0.0, 1.0]
    for exponent in range(-6, 1):
        edges = torch.linspace(.1, 1, 2 ** (exponent + 6) + 1)
        middles = 10 ** exponent * ((edges[:-1] + edges[1:]) / 2)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values), device=device)


class NF4(torch.nn.Module):
    """A weight (N, D) packed in 4 bits, D a multiple of 64: 4.13 bits a number, and 8 bytes a row.

        number (n, d)    NF4_VALUES[code] * scale (n, d // 64), rounded once, from fp32 to dtype
        code             of codes[n, d // 2] the high half for an even d, else the low one
        scale (n, j)     scale_values[scale_codes[n, j]] * nested[(start[n] + j) // 256] + offset[n], fp32

    The rows may be those of several tensors of a checkpoint, each quantized by itself: start says where in `nested` a
    row begins, offset is its tensor's. So any row can be unpacked alone. Slices of rows are views."""

    def __init__(self, codes, scale_codes, nested, start, offset, dtype):
        super().__init__()
        self.register_buffer("codes", codes)  # (N, D / 2) uint8
        self.register_buffer("scale_codes", scale_codes)  # (N, D / 64) uint8
        self.register_buffer("nested", nested)  # fp32, one for 256 scales
        self.register_buffer("start", start)  # (N,) int32
        self.register_buffer("offset", offset)  # (N,) fp32
        self.dtype = dtype  # of what is unpacked

    def __len__(self):
        return len(self.codes)

    def __getitem__(self, rows):
        return NF4(self.codes[rows], self.scale_codes[rows], self.nested, self.start[rows], self.offset[rows],
                   self.dtype)

    @property
    def shape(self):
        return torch.Size((len(self.codes), 2 * self.codes.shape[1]))

    @property
    def device(self):
        return self.codes.device

    def scales(self, idx=None):
        """Of rows idx (C,), or of all: (C, D / 64) fp32."""
        codes, start, offset = self.scale_codes, self.start, self.offset
        if idx is not None:
            codes, start, offset = codes.index_select(0, idx), start.index_select(0, idx), offset.index_select(0, idx)
        j = torch.arange(codes.shape[1], dtype=torch.int32, device=self.device)
        group = (start[:, None] + j) // SCALES  # (C, D / 64)
        values = scale_values(self.device).index_select(0, codes.flatten().int()).view(codes.shape)
        nested = self.nested.index_select(0, group.flatten()).view(codes.shape)
        return values.mul_(nested).add_(offset[:, None])

    def unpack(self, idx=None, out=None):
        """Rows idx (C,), or all -> (C, D) in dtype, into out where it is given."""
        scales = self.scales(idx)
        if out is None:
            out = torch.empty(len(scales), self.shape[1], dtype=self.dtype, device=self.device)
        if on_kernel(out):
            return unpack_triton(self.codes, scales, idx, out)
        codes = self.codes
        if idx is not None:
            codes = codes.index_select(0, idx)
        return unpack_ref(codes, scales, out)


def unpack_ref(codes, scales, out):
    """codes (C, D / 2), scales (C, D / 64) fp32 -> out (C, D). Block by block, so that what lies between stays in the
    cache: 8192 x 1024 in 11 ms, one core (in one block 13). A product with 2048 rows takes 250 in fp32, 54 in bf16."""
    pairs = nf4_pairs(codes.device)
    for codes, scales, y in row_blocks(2 ** 15, codes, scales, out):
        values = pairs.index_select(0, codes.flatten().int()).view(torch.float32)
        torch.mul(values.view(*scales.shape, BLOCK), scales[:, :, None], out=y.view(*scales.shape, BLOCK))
    return out


buffers = {}  # (device, dtype) -> (n,): what unpacked() writes to


def unpacked(w):
    """w (N, D) as a product takes it: itself, or where it is packed a copy in 16 bits. All copies lie in one buffer, as
    large as the largest weight: each is good until the next call."""
    if not isinstance(w, NF4):
        return w
    n = w.shape.numel()
    key = w.device, w.dtype
    if key not in buffers or len(buffers[key]) < n:
        buffers[key] = None  # so that old and new never lie there together
        buffers[key] = torch.empty(n, dtype=w.dtype, device=w.device)
    return w.unpack(out=buffers[key][:n].view(w.shape))


def rows_of(w, idx):
    """w (N, D), idx (C,) -> w[idx] (C, D), a copy, unpacked."""
    if isinstance(w, NF4):
        return w.unpack(idx)
    return w.index_select(0, idx)


@jit
def two_numbers(table, code, scale, dtype: tl.constexpr):
    """A byte's high half and its low one, times the scale."""
    high = tl.load(table + (code >> 4)) * scale
    low = tl.load(table + (code & 15)) * scale
    return high.to(dtype), low.to(dtype)


@jit
def unpack_kernel(
    codes,  # (N, D / 2) uint8
    scales,  # (C, D / 64)
    idx,  # (C,), read only with PICKED
    table,  # (16,)
    y,  # (C, D)
    C, D,
    codes_stride,
    PICKED: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr,
):
    """A program unpacks BLOCK_B bytes of BLOCK_C rows."""
    c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[:, None]
    byte = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)[None, :]
    mask = (c < C) & (byte < D // 2)
    row = c
    if PICKED:
        row = tl.load(idx + c, mask=c < C, other=0)
    code = tl.load(codes + row * codes_stride + byte, mask=mask, other=0).to(tl.int32)
    scale = tl.load(scales + c * (D // 64) + byte // 32, mask=mask, other=0.0)
    high, low = two_numbers(table, code, scale, tl.float32)
    d = tl.program_id(1) * 2 * BLOCK_B + tl.arange(0, 2 * BLOCK_B)[None, :]
    both = tl.interleave(high, low)  # (BLOCK_C, 2 BLOCK_B)
    tl.store(y + c * D + d, both.to(y.dtype.element_ty), mask=(c < C) & (d < D))


def unpack_triton(codes, scales, idx, out):
    C, D = out.shape
    any_pointer = scales  # where all rows are meant
    if idx is not None:
        any_pointer = idx
    block = (8, 128)
    grid = (triton.cdiv(C, block[0]), triton.cdiv(D // 2, block[1]))
    if C:
        unpack_kernel[grid](
            codes, scales, any_pointer, nf4_values(out.device), out,
            C, D,
            codes.stride(0),
            PICKED=idx is not None, BLOCK_C=block[0], BLOCK_B=block[1])
    return out


# ------------------------------------------------------------------------------------------------------------
# y = x w[idx].T (+ bias[idx]), compact (T, C), or written to columns idx of out (T, N)

def gather_matmul_nt_ref(x, w, idx, out=None, bias=None):
    y = x @ rows_of(w, idx).T  # (T, C)
    if bias is not None:
        y += bias.index_select(0, idx)
    if out is None:
        return y
    return put_columns(out, idx, y)


@tuned(
    (128, 256, 64, 4, 8),
    (128, 128, 64, 4, 8),
    (128, 64, 64, 4, 4),
    (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 4),
    (64, 64, 32, 4, 4),
)
def nt_kernel(
    x,  # (T, D)
    w,  # (N, D)
    idx,  # (C,)
    bias,  # (N,), read only with BIAS
    y,  # (T, C), or with SCATTER (T, N)
    T, C,
    x_stride, w_stride, y_stride,  # from row to row
    T_BUCKET, C_BUCKET,  # for autotuning only
    D: tl.constexpr, PRECISION: tl.constexpr,
    SCATTER: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """A program computes BLOCK_M rows of x times BLOCK_N picked rows of w."""
    pid = tl.program_id(0)
    m, n = tile(pid, tl.cdiv(T, BLOCK_M), tl.cdiv(C, BLOCK_N), 8)
    t = m * BLOCK_M + tl.arange(0, BLOCK_M)
    c = n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    # Pointers to the first block of each. Row offsets are int64, as idx is: T * N may pass 2^31.
    row = tl.load(idx + c, mask=c < C, other=0)
    x_row = (t % T).to(tl.int64)  # rows past T wrap, so that loads need no mask
    x_block = x + x_row[:, None] * x_stride + k[None, :]
    w_block = w + row[:, None] * w_stride + k[None, :]

    # The sum over D, in fp32.
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if BIAS:
        acc += tl.load(bias + row).to(tl.float32)[None, :]
    for i in range(0, D, BLOCK_K):
        if D % BLOCK_K == 0:
            a = tl.load(x_block)
            b = tl.load(w_block)
        else:
            left = k[None, :] < D - i
            a = tl.load(x_block, mask=left, other=0.0)
            b = tl.load(w_block, mask=left, other=0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
        x_block += BLOCK_K
        w_block += BLOCK_K

    # Written side by side, or to the picked columns.
    col = c
    if SCATTER:  # loaded again: `row`, kept over the loop, made Triton 3.6 spill 472 bytes a thread
        col = tl.load(idx + c, mask=c < C).to(tl.int32)
    inside = (t < T)[:, None] & (c < C)[None, :]
    store(y, acc, m, col, inside, y_stride, BLOCK_M)


@tuned(
    (128, 128, 32, 4, 8),
    (64, 128, 32, 4, 4),
    (64, 64, 32, 4, 4),
    (32, 32, 32, 4, 8),
)
def nt_packed_kernel(
    x,  # (2, T, D / 2): the even columns, then the odd ones
    w,  # (N, D / 2) codes
    scales,  # (C, D / 64) fp32, of the picked rows
    idx, table,  # (C,), (16,)
    bias,  # (N,), read only with BIAS
    y,  # (T, C), or with SCATTER (T, N)
    T, C,
    w_stride, y_stride,
    T_BUCKET, C_BUCKET,  # for autotuning only
    D: tl.constexpr, PRECISION: tl.constexpr,
    SCATTER: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """nt_kernel for a packed w: BLOCK_K = 32 bytes are the 64 numbers of a scale. The even numbers, which are the high
    halves of the bytes, and the odd ones make a product each, so that none has to change its place."""
    tl.static_assert(BLOCK_K == 32)
    pid = tl.program_id(0)
    m, n = tile(pid, tl.cdiv(T, BLOCK_M), tl.cdiv(C, BLOCK_N), 8)
    t = m * BLOCK_M + tl.arange(0, BLOCK_M)
    c = n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    row = tl.load(idx + c, mask=c < C, other=0)
    x_row = (t % T).to(tl.int64)  # as in nt_kernel
    even_block = x + x_row[:, None] * (D // 2) + k[None, :]
    odd_block = even_block + T.to(tl.int64) * (D // 2)
    w_block = w + row[:, None] * w_stride + k[None, :]
    scale_block = scales + (c % C) * (D // 64)  # channels past C wrap, as rows past T do

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if BIAS:
        acc += tl.load(bias + row).to(tl.float32)[None, :]
    for i in range(0, D // 64):
        code = tl.load(w_block).to(tl.int32)  # (BLOCK_N, BLOCK_K)
        scale = tl.load(scale_block + i)[:, None]
        even = tl.load(even_block)
        odd = tl.load(odd_block)
        high, low = two_numbers(table, code, scale, even.dtype)
        acc = tl.dot(even, tl.trans(high), acc, input_precision=PRECISION)
        acc = tl.dot(odd, tl.trans(low), acc, input_precision=PRECISION)
        even_block += BLOCK_K
        odd_block += BLOCK_K
        w_block += BLOCK_K

    col = c
    if SCATTER:  # as in nt_kernel
        col = tl.load(idx + c, mask=c < C).to(tl.int32)
    inside = (t < T)[:, None] & (c < C)[None, :]
    store(y, acc, m, col, inside, y_stride, BLOCK_M)


def gather_matmul_nt(x, w, idx, out=None, bias=None):
    """x (T, D), w (N, D), idx (C,) -> x @ w[idx].T (+ bias[idx]), compact (T, C); or written into columns
    idx of out (T, N), whose other columns keep what they hold. Only writes, so that autotuning may run it twice."""
    if not on_kernel(x):
        return gather_matmul_nt_ref(x, w, idx, out, bias)
    x = side_by_side(x)
    T, D = x.shape
    C = len(idx)
    y = out
    if y is None:
        y = x.new_empty(T, C)
    assert y.stride(1) == 1 or y.numel() == 0
    if T == 0 or C == 0:
        return y
    any_pointer = idx  # where there is no bias
    if bias is not None:
        any_pointer = bias
    if isinstance(w, NF4):
        nt_packed_kernel[programs(T, C)](
            even_and_odd(x), w.codes, w.scales(idx),
            idx, nf4_values(x.device), any_pointer, y,
            T, C,
            w.codes.stride(0), y.stride(0),
            bucket(T), bucket(C),
            D, precision(x),
            SCATTER=out is not None, BIAS=bias is not None)
        return y
    w = side_by_side(w)
    nt_kernel[programs(T, C)](
        x, w, idx, any_pointer, y,
        T, C,
        x.stride(0), w.stride(0), y.stride(0),
        bucket(T), bucket(C),
        D, precision(x),  # not by name: fitting() would not see it
        SCATTER=out is not None, BIAS=bias is not None)
    return y


# ------------------------------------------------------------------------------------------------------------
# y = x w[idx], x compact (T, C)

def gather_matmul_nn_ref(x, w, idx, out=None):
    if out is None:
        return x @ rows_of(w, idx)
    return torch.mm(x, rows_of(w, idx), out=out)


# w's address comes from another load (idx), and Triton's pipeliner spends half the stages on it: 7 stages
# keep 3 tiles in shared memory on sm_80 and 4 on sm_90, 5 keep 2 and 3, 4 only 1 and 2: no overlap on sm_80.
@tuned(
    (128, 256, 64, 5, 8),
    (128, 128, 64, 7, 8),
    (128, 128, 32, 7, 8),
    (64, 256, 32, 7, 8),
    (64, 128, 32, 7, 4),
    (64, 64, 64, 7, 4),
    (64, 64, 32, 7, 4),
)
def nn_kernel(
    x,  # (T, C)
    w,  # (N, D)
    idx,  # (C,)
    y,  # (T, D)
    T, C,
    x_stride, w_stride, y_stride,  # from row to row
    T_BUCKET, C_BUCKET,  # for autotuning only
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """A program computes BLOCK_M rows and BLOCK_N columns of y."""
    pid = tl.program_id(0)
    m, n = tile(pid, tl.cdiv(T, BLOCK_M), tl.cdiv(D, BLOCK_N), 8)
    t = m * BLOCK_M + tl.arange(0, BLOCK_M)
    d = n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_row = (t % T).to(tl.int64)  # as in nt_kernel
    x_rows = x + x_row[:, None] * x_stride

    # The sum over the picked rows, in fp32.
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(0, C, BLOCK_K):
        c = i + tl.arange(0, BLOCK_K)
        row = tl.load(idx + c, mask=c < C, other=0)
        x_block = x_rows + c[None, :]
        a = tl.load(x_block, mask=(c < C)[None, :], other=0.0)
        w_block = w + row[:, None] * w_stride + d[None, :]
        if D % BLOCK_N == 0:
            b = tl.load(w_block)  # rows past C read row 0, times a zero of a
        else:
            b = tl.load(w_block, mask=(d < D)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    inside = (t < T)[:, None] & (d < D)[None, :]
    store(y, acc, m, d, inside, y_stride, BLOCK_M)


@tuned(
    (128, 128, 32, 4, 8),
    (64, 128, 32, 4, 4),
    (64, 64, 32, 4, 4),
    (32, 32, 32, 4, 4),
)
def nn_packed_kernel(
    x,  # (T, C)
    w,  # (N, D / 2) codes
    scales,  # (C, D / 64) fp32, of the picked rows
    idx, table,  # (C,), (16,)
    y,  # (T, D)
    T, C,
    x_stride, w_stride, y_stride,
    T_BUCKET, C_BUCKET,  # for autotuning only
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """nn_kernel for a packed w. BLOCK_N columns of y are BLOCK_N / 2 bytes of a row: the even columns, which are their
    high halves, and the odd ones have sums of their own, which are interleaved in the end."""
    HALF: tl.constexpr = BLOCK_N // 2
    pid = tl.program_id(0)
    m, n = tile(pid, tl.cdiv(T, BLOCK_M), tl.cdiv(D, BLOCK_N), 8)
    t = m * BLOCK_M + tl.arange(0, BLOCK_M)
    byte = n * HALF + tl.arange(0, HALF)
    x_row = (t % T).to(tl.int64)  # as in nt_kernel
    x_rows = x + x_row[:, None] * x_stride

    acc_even = tl.zeros((BLOCK_M, HALF), tl.float32)
    acc_odd = tl.zeros((BLOCK_M, HALF), tl.float32)
    for i in range(0, C, BLOCK_K):
        c = i + tl.arange(0, BLOCK_K)
        row = tl.load(idx + c, mask=c < C, other=0)
        a = tl.load(x_rows + c[None, :], mask=(c < C)[None, :], other=0.0)
        inside = (c < C)[:, None] & (byte < D // 2)[None, :]
        code_block = w + row[:, None] * w_stride + byte[None, :]
        code = tl.load(code_block, mask=inside, other=0).to(tl.int32)
        scale_block = scales + c[:, None] * (D // 64) + (byte // 32)[None, :]
        scale = tl.load(scale_block, mask=inside, other=0.0)
        high, low = two_numbers(table, code, scale, a.dtype)
        acc_even = tl.dot(a, high, acc_even, input_precision=PRECISION)
        acc_odd = tl.dot(a, low, acc_odd, input_precision=PRECISION)

    acc = tl.interleave(acc_even, acc_odd)  # (BLOCK_M, BLOCK_N)
    d = n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (t < T)[:, None] & (d < D)[None, :]
    store(y, acc, m, d, inside, y_stride, BLOCK_M)


def gather_matmul_nn(x, w, idx, out=None):
    """x (T, C), w (N, D), idx (C,) -> x @ w[idx] (T, D), into out where it is given."""
    if not on_kernel(x):
        return gather_matmul_nn_ref(x, w, idx, out)
    x = side_by_side(x)
    T = len(x)
    C = len(idx)
    D = w.shape[1]
    y = out
    if y is None:
        y = x.new_empty(T, D)
    assert y.stride(1) == 1 or y.numel() == 0
    if T == 0:  # C = 0 runs the loop no times and writes zeros
        return y
    if isinstance(w, NF4):
        nn_packed_kernel[programs(T, D)](
            x, w.codes, w.scales(idx),
            idx, nf4_values(x.device), y,
            T, C,
            x.stride(0), w.codes.stride(0), y.stride(0),
            bucket(T), bucket(C),
            D, precision(x))
        return y
    w = side_by_side(w)
    nn_kernel[programs(T, D)](
        x, w, idx, y,
        T, C,
        x.stride(0), w.stride(0), y.stride(0),
        bucket(T), bucket(C),
        D, precision(x))
    return y


# ------------------------------------------------------------------------------------------------------------
# picked columns of an activation: one pass each, and the library's. (Gathering them inside the product reads
# scattered columns two bytes a load in each of its D / BLOCK_N column blocks, where cp.async moves no less than four.)

def columns(x, idx):
    """x (T, N) -> x[:, idx] (T, C). CPU, 1024 of 4096 columns of 1536 rows: gather .39 ms, index_select .64,
    x[:, idx] 1.17."""
    if x.is_cuda:
        return x.index_select(1, idx)
    return x.gather(1, idx.expand(len(x), -1))


def put_columns(out, idx, y):
    """out[:, idx] = y. CPU, 1024 of 4096 columns of 1536 rows: scatter_ .36 ms, index_copy_ .78,
    out[:, idx] = y 1.25."""
    if y.is_cuda:
        return out.index_copy_(1, idx, y)
    return out.scatter_(1, idx.expand_as(y), y)


# ------------------------------------------------------------------------------------------------------------
# h = silu(g) u of gu = [g | u] (T, 2C);  backward: dg = dh u s (1 + g (1 - s)), du = dh g s, s = sigmoid(g)

def row_blocks(numbers, *tensors):
    """The tensors cut into the same blocks of rows, about so many numbers of the first one each: they stay in the
    cache from one pass to the next."""
    rows = max(1, numbers // max(tensors[0].shape[1], 1))
    return zip(*(t.split(rows) for t in tensors))


def swiglu_ref(gu):
    C = gu.shape[1] // 2
    return F.silu(gu[:, :C]).mul_(gu[:, C:])


def swiglu_backward_ref(dh, gu):
    C = dh.shape[1]
    dgu = torch.empty_like(gu)
    # of 1536 x 4096: 11 -> 6 ms, as long as malloc reuses memory; else page faults hide it
    for dh, gu, out in row_blocks(2 ** 19, dh, gu, dgu):
        g = gu[:, :C]
        dsilu = dh * gu[:, C:]
        torch.mul(F.silu(g), dh, out=out[:, C:])
        torch.ops.aten.silu_backward.grad_input(dsilu, g, grad_input=out[:, :C])
    return dgu


@jit
def swiglu_kernel(
    gu,  # (T, 2C)
    h,  # (T, C)
    T, C,
    gu_stride, h_stride,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (t < T) & (c < C)

    g_block = gu + t * gu_stride + c
    g = tl.load(g_block, mask=mask).to(tl.float32)
    u_block = gu + t * gu_stride + C + c
    u = tl.load(u_block, mask=mask).to(tl.float32)

    h_block = h + t * h_stride + c
    y = g * tl.sigmoid(g) * u
    tl.store(h_block, y.to(h.dtype.element_ty), mask=mask)


@jit
def swiglu_backward_kernel(
    dh,  # (T, C)
    gu,  # (T, 2C)
    dgu,  # (T, 2C)
    T, C,
    dh_stride, gu_stride, dgu_stride,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (t < T) & (c < C)

    dh_block = dh + t * dh_stride + c
    d = tl.load(dh_block, mask=mask).to(tl.float32)
    g_block = gu + t * gu_stride + c
    g = tl.load(g_block, mask=mask).to(tl.float32)
    u_block = gu + t * gu_stride + C + c
    u = tl.load(u_block, mask=mask).to(tl.float32)

    s = tl.sigmoid(g)
    dg = d * u * s * (1 + g * (1 - s))
    du = d * g * s
    dg_block = dgu + t * dgu_stride + c
    tl.store(dg_block, dg.to(dgu.dtype.element_ty), mask=mask)
    du_block = dgu + t * dgu_stride + C + c
    tl.store(du_block, du.to(dgu.dtype.element_ty), mask=mask)


def swiglu_blocks(T, C):
    """1024 elements a program, over several rows where rows are short -> grid, block"""
    block_c = min(1024, bucket(C))
    block_t = 1024 // block_c
    grid = triton.cdiv(T, block_t), triton.cdiv(C, block_c)
    return grid, (block_t, block_c)


def swiglu(gu):
    """gu (T, 2C) = [gate | up] -> h (T, C) = silu(gate) * up"""
    if not on_kernel(gu):
        return swiglu_ref(gu)
    gu = side_by_side(gu)
    T = len(gu)
    C = gu.shape[1] // 2
    h = gu.new_empty(T, C)
    if T and C:
        grid, block = swiglu_blocks(T, C)
        swiglu_kernel[grid](gu, h, T, C, gu.stride(0), h.stride(0), *block)
    return h


def swiglu_backward(dh, gu):
    """dh (T, C), gu (T, 2C) -> dgu (T, 2C)"""
    if not on_kernel(gu):
        return swiglu_backward_ref(dh, gu)
    dh = side_by_side(dh)
    gu = side_by_side(gu)
    T, C = dh.shape
    dgu = torch.empty_like(gu)
    if T and C:
        grid, block = swiglu_blocks(T, C)
        swiglu_backward_kernel[grid](dh, gu, dgu, T, C, dh.stride(0), gu.stride(0), dgu.stride(0), *block)
    return dgu


# ------------------------------------------------------------------------------------------------------------
# scores[i] = sum_t (silu(zg[t] . qg[:, i]) * (zu[t] . qu[:, i]))^2: energies of the MLP's channels, estimated

def mlp_scores_ref(zg, zu, qg, qu):
    """Blocks of channels, 2^18 elements each. T 1536, I 4096: 3.1 ms; blocks of rows 4.3, one block 9.5."""
    if zg.dtype != torch.float64:  # sums of T squares need more than 8 or 11 bits
        zg, zu, qg, qu = zg.float(), zu.float(), qg.float(), qu.float()
    scores = zg.new_empty(qg.shape[1])
    block = max(16, 2 ** 18 // max(len(zg), 1))
    for qg, qu, s in zip(qg.split(block, 1), qu.split(block, 1), scores.split(block)):
        g = zg @ qg
        u = zu @ qu
        h = F.silu(g, inplace=True).mul_(u)
        torch.sum(h.square_(), 0, out=s)
    return scores.float()


@jit
def mlp_scores_kernel(
    zg, zu,  # (T, r)
    qg, qu,  # (r, I)
    part,  # (T / ROWS, I) float32
    T, I, r,
    ROWS: tl.constexpr,
    R: tl.constexpr,  # the rank, padded to the 16 that tl.dot wants
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr,
):
    """A program sums ROWS rows of BLOCK_I channels."""
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    j = tl.arange(0, R)
    first = tl.program_id(1) * ROWS

    # Both factors of these channels, once.
    q_mask = (j < r)[:, None] & (i < I)[None, :]
    q_gate_block = qg + j[:, None] * I + i[None, :]
    q_gate = tl.load(q_gate_block, mask=q_mask, other=0.0)
    q_up_block = qu + j[:, None] * I + i[None, :]
    q_up = tl.load(q_up_block, mask=q_mask, other=0.0)

    # The sum over the rows, BLOCK_T at a time; rows past T give 0.
    acc = tl.zeros((BLOCK_I,), tl.float32)
    for block in range(0, ROWS, BLOCK_T):
        t = first + block + tl.arange(0, BLOCK_T)
        z_block = t[:, None] * r + j[None, :]
        z_mask = (t < T)[:, None] & (j < r)[None, :]
        z_gate = tl.load(zg + z_block, mask=z_mask, other=0.0)
        g = tl.dot(z_gate, q_gate, input_precision=PRECISION)
        z_up = tl.load(zu + z_block, mask=z_mask, other=0.0)
        u = tl.dot(z_up, q_up, input_precision=PRECISION)
        h = g * tl.sigmoid(g) * u
        acc += tl.sum(h * h, 0)

    part_block = part + tl.program_id(1) * I + i
    tl.store(part_block, acc, mask=i < I)


def mlp_scores(zg, zu, qg, qu):
    """zg, zu (T, r), qg, qu (r, I) -> (I,) float32. No (T, I) tensor: a program sums 512 rows of 64 channels,
    and the parts (T/512, I) are added in a fixed order, so that equal inputs keep equal channels."""
    if not on_kernel(zg) or len(zg) == 0:
        return mlp_scores_ref(zg, zu, qg, qu)
    T, r = zg.shape
    I = qg.shape[1]
    rows = 512
    part = zg.new_empty(triton.cdiv(T, rows), I, dtype=torch.float32)
    grid = (triton.cdiv(I, 64), len(part))
    mlp_scores_kernel[grid](
        zg.contiguous(), zu.contiguous(),
        qg.contiguous(), qu.contiguous(),
        part,
        T, I, r,
        ROWS=rows, R=bucket(r), PRECISION=precision(zg), BLOCK_T=64, BLOCK_I=64)
    return part.sum(0)


# ------------------------------------------------------------------------------------------------------------
# RoPE and the move between the stream's rows and the (batch, position) grid, in one pass. First n_rot heads:
# (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), x1 and x2 a head's halves; the other heads are copied.

def halves(x, n_rot, hd):
    """x (T, N) -> two views (T, n_rot, hd/2): the halves of its first n_rot heads."""
    heads = x[:, :n_rot * hd].unflatten(1, (n_rot, 2, hd // 2))
    return heads.unbind(2)


def rope_scatter_ref(qkv, cos, sin, rows, n_rot, hd, grid_rows):
    n = n_rot * hd
    cos = cos[:, None].to(qkv.dtype)  # (T, 1, hd/2): the same for all heads
    sin = sin[:, None].to(qkv.dtype)
    rotated = qkv.new_empty(len(qkv), n)
    x1, x2 = halves(qkv, n_rot, hd)
    y1, y2 = halves(rotated, n_rot, hd)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin)
    grid = qkv.new_zeros(grid_rows, qkv.shape[1])
    grid[:, :n].index_copy_(0, rows, rotated)
    grid[:, n:].index_copy_(0, rows, qkv[:, n:])
    return grid


def rope_gather_backward_ref(dgrid, cos, sin, rows, n_rot, hd):
    dqkv = dgrid.index_select(0, rows)
    d1, d2 = halves(dqkv, n_rot, hd)
    cos = cos[:, None].to(dqkv.dtype)
    sin = sin[:, None].to(dqkv.dtype)
    d1_sin = d1 * sin
    d1.mul_(cos).addcmul_(d2, sin)
    d2.mul_(cos).sub_(d1_sin)
    return dqkv


@jit
def rope_kernel(
    src, dst,  # one (T, N), the other (grid_rows, N)
    cos, sin,  # (T, HALF)
    rows,  # (T,)
    n_rot, n_heads,
    src_stride, dst_stride,
    HALF: tl.constexpr,  # hd / 2
    SCATTER: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """dst[rows[t]] = rotate(src[t]), or, transposed, dst[t] = rotate back(src[rows[t]]). A program moves BLOCK_H
    heads of one t."""
    t = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + t)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    c = tl.load(cos + t * HALF + d, mask=d < HALF).to(tl.float32)[None, :]
    s = tl.load(sin + t * HALF + d, mask=d < HALF).to(tl.float32)[None, :]
    if SCATTER:
        src_row = t
        dst_row = row
    else:
        src_row = row
        dst_row = t
        s = -s

    # Both halves of each head.
    first_half = h[:, None] * (2 * HALF) + d[None, :]
    mask = (h < n_heads)[:, None] & (d < HALF)[None, :]
    src_block = src + src_row * src_stride + first_half
    x1 = tl.load(src_block, mask=mask).to(tl.float32)
    x2 = tl.load(src_block + HALF, mask=mask).to(tl.float32)

    rotate = (h < n_rot)[:, None]
    y1 = tl.where(rotate, x1 * c - x2 * s, x1).to(dst.dtype.element_ty)
    y2 = tl.where(rotate, x2 * c + x1 * s, x2).to(dst.dtype.element_ty)
    dst_block = dst + dst_row * dst_stride + first_half
    tl.store(dst_block, y1, mask=mask)
    tl.store(dst_block + HALF, y2, mask=mask)


def rope_triton(src, dst, cos, sin, rows, n_rot, hd, scatter):
    src = side_by_side(src)
    n_heads = src.shape[1] // hd
    block = 8  # heads of a program
    if len(rows) == 0:
        return dst
    grid = (len(rows), triton.cdiv(n_heads, block))
    rope_kernel[grid](
        src, dst,
        cos.contiguous(), sin.contiguous(),
        rows,
        n_rot, n_heads,
        src.stride(0), dst.stride(0),
        HALF=hd // 2, SCATTER=scatter, BLOCK_H=block, BLOCK_D=bucket(hd // 2))
    return dst


def rope_scatter(qkv, cos, sin, rows, n_rot, hd, grid_rows):
    """qkv (T, N), cos, sin (T, hd/2), rows (T,) without repeats -> (grid_rows, N), zero where no row lands"""
    if not on_kernel(qkv):
        return rope_scatter_ref(qkv, cos, sin, rows, n_rot, hd, grid_rows)
    if len(rows) == grid_rows:  # a full grid needs no zeros
        grid = qkv.new_empty(grid_rows, qkv.shape[1])
    else:
        grid = qkv.new_zeros(grid_rows, qkv.shape[1])
    return rope_triton(qkv, grid, cos, sin, rows, n_rot, hd, True)


def rope_gather_backward(dgrid, cos, sin, rows, n_rot, hd):
    """dgrid (grid_rows, N) -> dqkv (T, N): the transpose of rope_scatter"""
    if not on_kernel(dgrid):
        return rope_gather_backward_ref(dgrid, cos, sin, rows, n_rot, hd)
    dqkv = dgrid.new_empty(len(rows), dgrid.shape[1])
    return rope_triton(dgrid, dqkv, cos, sin, rows, n_rot, hd, False)
