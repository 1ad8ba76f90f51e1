"""Triton kernels for mLSTM, sLSTM and Mamba: forward, exact backward, and the steps of acting.

Written from the equations (xLSTM, arXiv 2405.04517; Tiled Flash Linear Attention, arXiv 2503.14376;
Mamba, arXiv 2312.00752) and tested against the float64 loops of mlstm.py, slstm.py and mamba.py.

    python kernels.py                   # checks values and gradients; without a GPU interpreted
    python kernels.py --compile-all     # compiles every kernel at the paper's widths, no GPU needed
    python bench.py --kernels           # speed beside PyTorch and the public kernels, on a GPU

Each public function takes and returns what its PyTorch namesake does, and lram.use_kernels puts it
in its place. They are custom operators: they run under torch.compile and inside CUDA graphs.

    mlstm_triton            mlstm.mlstm_chunkwise     step kernel for up to 8 tokens, else chunks
    slstm_scan_triton       slstm.slstm_scan
    selective_scan_triton   mamba.selective_scan

From the loop to these kernels, what changed and what it buys (mLSTM, per head and token; bytes in
units of C = 4 K V, the matrix memory, 0.26 to 3.2 MB at K = V = 256 to 896)
    1  loop over tokens (mlstm_recurrent)     2 C bytes a token, 10 launches: the definition
    2  chunks of L tokens (mlstm_chunkwise)   2 C / L bytes; matrix products for tensor cores
    3  one program per tile of C, walking     C stays in registers: C / L bytes written, in the
       over the chunks (states_kernel)        operands' type, and all chunks are then independent
    4  weights from running maxima in         no maximum to carry through the loops: every tile
       float64 (gate_kernel)                  of every kernel needs one exp and no correction
    5  pairs S written once, L numbers a      a 640 wide head does not fit a program as in flash
       token (scores_kernel)                  attention: its tiles of h share S instead
    6  S and P kept, dC by the same kernel    no second forward pass; q dq - k dk give the gates'
       backwards (mix_kernel, dgates_kernel)  gradient without another product
    7  up to 8 tokens in one launch           2 C bytes for 3 tokens instead of 6 C, no barrier:
       (step_kernel)                          strips of C are independent

What a program owns, for one head (chunked mLSTM; the step kernel owns strips of C)

        states_kernel: a tile of C,          scores_kernel: BT rows     mix_kernel: BT tokens
        through all chunks                   of a chunk's S             x BW columns of h
              V                                  s <= t                      V
          +---+---+---+                      +---+                       +---+---+---+
        K |   |###|   |  chunk 0, 1, 2 ->  t |   |                     t |   |   |   |
          +---+---+---+                      +---+---+                   +---+---+---+
          |   |   |   |                      |###|###|                   |   |###|   |
          +---+---+---+                      +---+---+---+               +---+---+---+
                                             |   |   |   |
                                             +---+---+---+
No atomics: results repeat bit for bit. Tiles are masked, so widths are multiples of 16 and need not
be powers of two. Works with Triton 3.4 to 3.9.

Glossary: the letters of mlstm.py, slstm.py and mamba.py, and
    p          row and head, b H + head            w, M      log-weights, see gate_kernel
    S          weighted scores (B, H, T, L)        P         gradient of q_t k_s, as S
    BT, BK, BV, BW, BLOCK, ROWS, COLS              lengths of tiles, powers of two
    IN         how tl.dot multiplies float32: "ieee", or "tf32" if PyTorch may

Not included: tuning by search (tiles follow stated rules), sequence parallelism, AMD's GPUs.
"""
import argparse
import collections
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

LAUNCHES = collections.Counter()        # kernel name -> launches so far: tests count them
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"     # on a CPU, to test
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ---------------------------------------------------------------------------- what all of them use
def launch(kernel, grid, *args, num_warps=4, num_stages=2, **constants):
    """kernel[grid](*args, **constants), on the device of the first tensor; the one way in."""
    LAUNCHES[kernel.__name__] += 1
    if args[0].is_meta:                 # compile_all(): compiled for its target instead
        return _compile(kernel, args, constants, num_warps, num_stages)
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True,
                     **constants)


def dot_precision():
    """float32 products follow PyTorch's switch: exact, or TF32 where the user allowed it."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def refuse(name, tensors, expected, instead):
    """The one clear error for what a kernel cannot take."""
    given = ", ".join(f"{tuple(x.shape)} {str(x.dtype)[6:]} {x.device}" for x in tensors)
    raise ValueError(f"{name}: got {given}; expected {expected}, all on one CUDA device. Elsewhere "
                     f"and for other types use {instead}")


def acceptable(tensors):
    """On one CUDA device (or interpreted), in one of DTYPES, none empty."""
    return all(x.dtype in DTYPES and x.device == tensors[0].device and x.numel()
               and (x.is_cuda or INTERPRETED) for x in tensors)


@triton.jit
def log_sigmoid(x):
    """log(1 / (1 + exp(-x))) without overflow."""
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def tanh(z):
    """2 sigmoid(2z) - 1, and near 0, where that loses its digits, the series."""
    x = z * z
    series = z * (1 - x * (1 / 3 - x * (2 / 15 - x * (17 / 315))))
    return tl.where(x < 0.04, series, 2 * tl.sigmoid(2 * z) - 1)


@triton.jit
def product(acc, a, a_mask, a_step, a_hi, b, b_mask, b_step, lo, hi,
            BLOCK: tl.constexpr, IN: tl.constexpr):
    """acc (M, N) + sum over x in [lo, hi) of a[:, x] b[x, :], the matrix product of this file.

    a (M, 1), b (1, N): pointers to element 0 of every row and column; a_step, b_step: distance
    from one x to the next. a is read up to a_hi >= hi: a multiple of 16 where a's rows are
    contiguous, or the mask would cut loads of 16 bytes into single numbers.
    """
    for start in range(lo, hi, BLOCK):
        x = start + tl.arange(0, BLOCK)
        left = tl.load(a + x[None, :] * a_step, mask=a_mask & (x < a_hi)[None, :], other=0.0)
        right = tl.load(b + x[:, None] * b_step, mask=b_mask & (x < hi)[:, None], other=0.0)
        acc = tl.dot(left.to(right.dtype), right, acc, input_precision=IN)
    return acc


# ------------------------------------------------------------------------------ mLSTM: the kernels
@triton.jit
def maximum(a, b):
    """For tl.associative_scan."""
    return tl.maximum(a, b)


@triton.jit
def gate_kernel(i, f, m_first, w, M, m, m_last, T, BLOCK: tl.constexpr):
    """Every weight of the sequence from two running quantities; program p is row and head p.

    w_s = i_s - b_s with b = cumsum log sigmoid(f), and M_t = max(m_first, w_1 .. w_t). Then
        token s weighs exp(w_s - M_t) at token t, what was there at token p still exp(M_p - M_t),
    both at most 1. w (B H, T) and M (B H, T + 1; first the initial m) are float64: b grows to -1e5,
    and differences of a few units must keep their digits. Bytes per head and token: 8 in, 20 out.
    """
    p = tl.program_id(0).to(tl.int64)
    b_last = tl.zeros((1,), tl.float64)
    M_last = tl.load(m_first + p + tl.arange(0, 1)).to(tl.float64)
    tl.store(M + p * (T + 1) + tl.arange(0, 1), M_last)
    for start in range(0, T, BLOCK):
        t = start + tl.arange(0, BLOCK)
        f_t = tl.load(f + p * T + t, mask=t < T, other=0.0).to(tl.float64)
        log_f = log_sigmoid(f_t)
        log_f = tl.where(log_f < -1e5, -1e5, log_f)         # f = -inf forgets all, and stays finite
        log_f = tl.where(t < T, log_f, 0.0)
        b = b_last + tl.cumsum(log_f, axis=0)
        w_t = tl.load(i + p * T + t, mask=t < T, other=-float("inf")).to(tl.float64) - b
        w_t = tl.where(w_t < -1e30, -1e30, w_t)
        M_t = tl.maximum(M_last, tl.associative_scan(w_t, 0, maximum))
        tl.store(w + p * T + t, w_t, mask=t < T)
        tl.store(M + p * (T + 1) + 1 + t, M_t, mask=t < T)
        tl.store(m + p * T + t, (b + M_t).to(tl.float32), mask=t < T)
        b_last += tl.sum(log_f, axis=0)
        M_last = tl.maximum(M_last, tl.max(M_t, axis=0))
    tl.store(m_last + p + tl.arange(0, 1), (b_last + M_last).to(tl.float32))


@triton.jit
def weights(w, M):
    """exp(w_s - M_t) for float64 w (S,) and M (T,) -> float32 (T, S), with a sum of two float32s.

    x = high + low has 48 bits, and the differences of the high and the low parts are exact enough:
    no float64 arithmetic on the tile, which most GPUs do 32 to 64 times slower.
    """
    w_high, M_high = w.to(tl.float32), M.to(tl.float32)
    w_low, M_low = (w - w_high).to(tl.float32), (M - M_high).to(tl.float32)
    x = (w_high[None, :] - M_high[:, None]) + (w_low[None, :] - M_low[:, None])
    return tl.exp(x)


@triton.jit
def scores_kernel(q, k, n, w, M, S, den, T, H, K, L, chunks, scale,
                  STATE: tl.constexpr, BT: tl.constexpr, BLOCK: tl.constexpr, IN: tl.constexpr):
    """S[t,s] = (q_t k_s) scale exp(w_s - M_t) for s <= t of a chunk, and the denominators.

    Program: BT tokens t of a chunk, tile after tile of earlier tokens s. den_t = sum_s S[t,s]
    (+ the query on the normaliser n of the chunk's start). FLOPs K (L + BT) per token and head.
    """
    tiles = tl.cdiv(L, BT)
    tile, c = tl.program_id(0) % tiles, tl.program_id(0) // tiles % chunks
    p = (tl.program_id(0) // (tiles * chunks)).to(tl.int64)
    start, size = c * L, tl.minimum(L, T - c * L)
    token = (p // H * T + start) * H + p % H                # row of q and k, chunk's first token
    t = tile * BT + tl.arange(0, BT)
    inside = t < size
    M_t = tl.load(M + p * (T + 1) + start + 1 + t, mask=inside, other=0.0)
    q_t = q + token * K + t[:, None] * (H * K)              # (BT, 1) pointers
    den_t = tl.zeros((BT,), tl.float32)
    if STATE:
        # what the chunk's start is still worth: exp(M_start - M_t) scale q_t n
        decay = tl.exp((tl.load(M + p * (T + 1) + start) - M_t).to(tl.float32)) * scale
        for first in range(0, K, BLOCK):
            x = first + tl.arange(0, BLOCK)
            q_x = tl.load(q_t + x[None, :], mask=inside[:, None] & (x[None, :] < K), other=0.0)
            n_x = tl.load(n + (p * (chunks + 1) + c) * K + x, mask=x < K, other=0.0)
            den_t += decay * tl.sum(q_x.to(tl.float32) * n_x[None, :], axis=1)
    for first in range(0, tl.minimum((tile + 1) * BT, size), BT):
        s = first + tl.arange(0, BT)
        w_s = tl.load(w + p * T + start + s, mask=s < size, other=0.0)
        k_s = k + token * K + s[None, :] * (H * K)          # (1, BT) pointers
        S_tile = product(tl.zeros((BT, BT), tl.float32), q_t, inside[:, None], 1, K,
                         k_s, (s < size)[None, :], 1, 0, K, BLOCK, IN)
        S_tile = tl.where(s[None, :] <= t[:, None], S_tile * weights(w_s, M_t) * scale, 0.0)
        den_t += tl.sum(S_tile, axis=1)
        tl.store(S + (p * T + start + t[:, None]) * L + s[None, :], S_tile,
                 mask=inside[:, None] & (s[None, :] < L))
    tl.store(den + p * T + start + t, den_t, mask=inside)


@triton.jit
def states_kernel(x, y, vector, w, M, first, vector_first, at, vector_at, last, vector_last,
                  other, vector_other, dots, T, H, K, V, L, chunks, updates, scale,
                  REVERSE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
                  BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, IN: tl.constexpr):
    """Memory at the boundaries 0 .. chunks of the chunks; backwards, its gradient.

    Program: a tile (BK, BV) of one head's C in registers, chunk after chunk:
        C_end   = exp(M_start - M_end) C_start + sum_s exp(w_s - M_end)           k_s v_s^T
        dC_start = exp(M_start - M_end) dC_end + sum_t exp(M_start - M_t) scale q_t dnum_t^T
    and n likewise with 1 (dn: dden_t) for v. x = k (q), y = v (dnum), vector = dden; first, last:
    where C starts (if FIRST) and ends (if LAST), float32. Backwards also dots = <C, dC> + <n, dn>
    of the tile at every boundary, with C, n from other. FLOPs per token and head: 2 K V;
    bytes: 2 K V / L, and x, y once for every tile of the other width.
    """
    tiles_v, tiles_k = tl.cdiv(V, BV), tl.cdiv(K, BK)
    tile_v, tile_k = tl.program_id(0) % tiles_v, tl.program_id(0) // tiles_v % tiles_k
    p = (tl.program_id(0) // (tiles_v * tiles_k)).to(tl.int64)
    kk, vv = tile_k * BK + tl.arange(0, BK), tile_v * BV + tl.arange(0, BV)
    tile, inside = kk[:, None] * V + vv[None, :], (kk[:, None] < K) & (vv[None, :] < V)
    C, n = tl.zeros((BK, BV), tl.float32), tl.zeros((BK,), tl.float32)
    if FIRST:
        C = tl.load(first + p * K * V + tile, mask=inside, other=0.0)
        n = tl.load(vector_first + p * K + kk, mask=kk < K, other=0.0)
    for step in range(0, updates + 1):
        boundary = chunks - step if REVERSE else step
        slot = p * (chunks + 1) + boundary
        tl.store(at + slot * K * V + tile, C, mask=inside)
        if tile_v == 0:
            tl.store(vector_at + slot * K + kk, n, mask=kk < K)
        if REVERSE:
            # without a gradient of the last state, the last state may not have been computed
            rows = tl.where(step > 0, K, K if FIRST else 0)
            exists = (kk[:, None] < rows) & (vv[None, :] < V)
            C_dC = C * tl.load(other + slot * K * V + tile, mask=exists, other=0.0).to(tl.float32)
            dot = tl.sum(tl.sum(C_dC, axis=1), axis=0)
            if tile_v == 0:
                dot += tl.sum(n * tl.load(vector_other + slot * K + kk, mask=kk < rows, other=0.0))
            tl.store(dots + (slot * tiles_k + tile_k) * tiles_v + tile_v, dot)
        if step < updates:
            c = boundary - 1 if REVERSE else boundary
            start, size = c * L, tl.minimum(L, T - c * L)
            token = (p // H * T + start) * H + p % H
            M_start = tl.load(M + p * (T + 1) + start)
            M_end = tl.load(M + p * (T + 1) + start + size)
            C *= tl.exp((M_start - M_end).to(tl.float32))
            n *= tl.exp((M_start - M_end).to(tl.float32))
            for s0 in range(0, size, BT):
                s = s0 + tl.arange(0, BT)
                if REVERSE:
                    M_t = tl.load(M + p * (T + 1) + start + 1 + s, mask=s < size, other=0.0)
                    weight = tl.exp((M_start - M_t).to(tl.float32)) * scale         # (BT,)
                else:
                    w_s = tl.load(w + p * T + start + s, mask=s < size, other=0.0)
                    weight = tl.exp((w_s - M_end).to(tl.float32))
                x_s = tl.load(x + token * K + s[None, :] * (H * K) + kk[:, None],
                              mask=(kk[:, None] < K) & (s[None, :] < size), other=0.0)
                y_s = tl.load(y + token * V + s[:, None] * (H * V) + vv[None, :],
                              mask=(s[:, None] < size) & (vv[None, :] < V), other=0.0)
                x_s = tl.where(s[None, :] < size, x_s * weight[None, :], 0.0)       # (BK, BT)
                C = tl.dot(x_s.to(y_s.dtype), y_s, C, input_precision=IN)
                if tile_v == 0:
                    if REVERSE:
                        x_s *= tl.load(vector + p * T + start + s, mask=s < size, other=0.0)[None]
                    n += tl.sum(x_s, axis=1)
    if LAST:
        tl.store(last + p * K * V + tile, C, mask=inside)
        if tile_v == 0:
            tl.store(vector_last + p * K + kk, n, mask=kk < K)


@triton.jit
def mix_kernel(x, state, vector, factor, pairs, y, out, row, dots, w, M, m, den,
               T, H, X, Y, L, chunks, scale, x_stride, y_stride,
               BACK: tl.constexpr, STATE: tl.constexpr, VECTOR: tl.constexpr, NORM: tl.constexpr,
               BT: tl.constexpr, BW: tl.constexpr, BLOCK: tl.constexpr, IN: tl.constexpr):
    """What a token gets from the memory at its chunk's edge and from the tokens of its chunk.

        out_t = weight_t (x_t state + factor_t vector) + sum_s pairs[t,s] y_s

        out   x     state    pairs   y       of tokens    weight                     vector
        h     q     C start  S       v       BACK s <= t  exp(M_start - M_t) scale
        dq    dnum  C^T      P       k       BACK         the same                   dden_t n
        dk    v     dC^T end P^T     q       s >= t       exp(w_t - M_end)           dn
        dv    k     dC end   S^T     dnum    s >= t       the same

    h is divided by its denominator (NORM); dq and dk also yield dots = q dq, k dk (VECTOR), which
    are the gradients of the gates. Program: BT tokens of a chunk, BW of the Y columns. FLOPs per
    token and head: 2 X Y + Y (L + BT).
    """
    tiles_w, tiles = tl.cdiv(Y, BW), tl.cdiv(L, BT)
    tile_w, tile = tl.program_id(0) % tiles_w, tl.program_id(0) // tiles_w % tiles
    c = tl.program_id(0) // (tiles_w * tiles) % chunks
    p = (tl.program_id(0) // (tiles_w * tiles * chunks)).to(tl.int64)
    start, size = c * L, tl.minimum(L, T - c * L)
    token = (p // H * T + start) * H + p % H
    t, col = tile * BT + tl.arange(0, BT), tile_w * BW + tl.arange(0, BW)
    inside, in_row = (t < size)[:, None], (col < Y)[None, :]
    at = p * T + start + t                                  # of one number per token and head
    acc = tl.zeros((BT, BW), tl.float32)
    if STATE:
        slot = p * (chunks + 1) + (c if BACK else c + 1)
        acc = product(acc, x + token * X + t[:, None] * (H * X), inside, 1, X,
                      state + slot * X * Y + col[None, :] * y_stride, in_row, x_stride,
                      0, X, BLOCK, IN)
        if VECTOR:
            n = tl.load(vector + slot * Y + col, mask=col < Y, other=0.0)[None, :]
            if BACK:
                n = tl.load(factor + at, mask=t < size, other=0.0)[:, None] * n
            acc += n
        edge = tl.load(M + p * (T + 1) + start + (0 if BACK else size))
        if BACK:
            M_t = tl.load(M + p * (T + 1) + start + 1 + t, mask=t < size, other=0.0)
            weight = tl.exp((edge - M_t).to(tl.float32)) * scale
        else:
            w_t = tl.load(w + at, mask=t < size, other=0.0)
            weight = tl.exp((w_t - edge).to(tl.float32))
        acc *= weight[:, None]
    y_s, hi = y + token * Y + col[None, :], tl.minimum((tile + 1) * BT, L)
    if BACK:                                # behind size, pairs are 0 up to L, a multiple of 16
        acc = product(acc, pairs + at[:, None] * L, inside, 1, hi, y_s, in_row, H * Y,
                      0, tl.minimum(hi, size), BLOCK, IN)
    else:
        acc = product(acc, pairs + (p * T + start) * L + t[:, None], (t < L)[:, None], L, size,
                      y_s, in_row, H * Y, tile * BT, size, BLOCK, IN)
    if NORM:
        acc /= normaliser(m, den, at, t < size)[:, None]
    out_t = token * Y + t[:, None] * (H * Y) + col[None, :]
    tl.store(out + out_t, acc, mask=inside & in_row)
    if VECTOR:
        own = tl.load(row + out_t, mask=inside & in_row, other=0.0).to(tl.float32)
        rows = (tl.num_programs(0) // (tiles_w * tiles * chunks)).to(tl.int64)      # B H
        tl.store(dots + tile_w * rows * T + at, tl.sum(acc * own, axis=1),
                 mask=t < size)


@triton.jit
def normaliser(m, den, at, mask):
    """max(|den_t|, exp(-m_t)) + EPS."""
    floor = tl.exp(-tl.load(m + at, mask=mask, other=0.0))
    return tl.maximum(tl.abs(tl.load(den + at, mask=mask, other=0.0)), floor) + 1e-6


@triton.jit
def dscores_kernel(dh, h, v, w, M, m, den, P, dnum, dden, T, H, V, L, chunks, scale,
                   BT: tl.constexpr, BLOCK: tl.constexpr, IN: tl.constexpr):
    """Back through h = num / N: dnum, dden, and P[t,s], the gradient of q_t k_s.

        dnum_t = dh_t / N_t           dden_t = -(dh_t h_t) / N_t sign(den_t) where |den| is the max
        P[t,s] = (dnum_t v_s + dden_t) scale exp(w_s - M_t)

    Programs as in scores_kernel. FLOPs V (L + BT) per token and head.
    """
    tiles = tl.cdiv(L, BT)
    tile, c = tl.program_id(0) % tiles, tl.program_id(0) // tiles % chunks
    p = (tl.program_id(0) // (tiles * chunks)).to(tl.int64)
    start, size = c * L, tl.minimum(L, T - c * L)
    token = (p // H * T + start) * H + p % H
    t = tile * BT + tl.arange(0, BT)
    inside, at = t < size, p * T + start + t
    N = normaliser(m, den, at, inside)
    dh_h = tl.zeros((BT,), tl.float32)
    for first in range(0, V, BLOCK):
        x = first + tl.arange(0, BLOCK)
        here = token * V + t[:, None] * (H * V) + x[None, :]
        mask = inside[:, None] & (x[None, :] < V)
        dh_x = tl.load(dh + here, mask=mask, other=0.0).to(tl.float32)
        dh_h += tl.sum(dh_x * tl.load(h + here, mask=mask, other=0.0).to(tl.float32), axis=1)
        tl.store(dnum + here, dh_x / N[:, None], mask=mask)
    den_t = tl.load(den + at, mask=inside, other=0.0)
    floor = tl.exp(-tl.load(m + at, mask=inside, other=0.0))
    dden_t = tl.where(tl.abs(den_t) > floor, tl.where(den_t > 0, -dh_h, dh_h) / N, 0.0)
    tl.store(dden + at, dden_t, mask=inside)
    M_t = tl.load(M + p * (T + 1) + start + 1 + t, mask=inside, other=0.0)
    for first in range(0, tl.minimum((tile + 1) * BT, size), BT):
        s = first + tl.arange(0, BT)
        w_s = tl.load(w + p * T + start + s, mask=s < size, other=0.0)
        P_tile = product(tl.zeros((BT, BT), tl.float32),
                         dh + token * V + t[:, None] * (H * V), inside[:, None], 1, V,
                         v + token * V + s[None, :] * (H * V), (s < size)[None, :], 1,
                         0, V, BLOCK, IN)
        P_tile = (P_tile / N[:, None] + dden_t[:, None]) * weights(w_s, M_t) * scale
        tl.store(P + at[:, None] * L + s[None, :],
                 tl.where(s[None, :] <= t[:, None], P_tile, 0.0),
                 mask=inside[:, None] & (s[None, :] < L))


@triton.jit
def dgates_kernel(f, q_dq, k_dk, C_dC, di, df, T, L, chunks, tiles, tiles_C,
                  STATE: tl.constexpr, BLOCK: tl.constexpr):
    """di_s = k_s dk_s;  d log f_t = sum over t' >= t of q_t' dq_t' - k_t' dk_t'.

    A weight exp(b_t - b_s + i_s) has b_t where q_t is and -b_s + i_s where k_s is, and both enter
    linearly. The sum stops at the end of the chunk, where the rest of the sequence is <C, dC> +
    <n, dn>: over thousands of tokens it would lose its digits. Program: one chunk of one head.
    """
    c, p = tl.program_id(0) % chunks, (tl.program_id(0) // chunks).to(tl.int64)
    size, t = tl.minimum(L, T - c * L), tl.arange(0, BLOCK)
    at, inside = p * T + c * L + t, t < size
    stride = tl.num_programs(0).to(tl.int64) // chunks * T
    q_t, k_t = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for tile in range(0, tiles):
        q_t += tl.load(q_dq + tile * stride + at, mask=inside, other=0.0)
        k_t += tl.load(k_dk + tile * stride + at, mask=inside, other=0.0)
    d_log_f = tl.cumsum(q_t - k_t, axis=0, reverse=True)
    if STATE:
        for tile in range(0, tiles_C):
            d_log_f += tl.load(C_dC + (p * (chunks + 1) + c + 1) * tiles_C + tile)
    f_t = tl.load(f + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(di + at, k_t, mask=inside)
    tl.store(df + at, d_log_f * tl.sigmoid(-f_t), mask=inside)


# --------------------------------------------------------------- mLSTM: launches and custom ops
def chunk_length(T, K, V):
    """The stated rule: L = K V / (K + V) tokens, to the next 64, and one chunk up to T = 5 L.

    With this L the states at the boundaries cost half the bytes of q, k, v and h, and the pairs
    inside the chunks a quarter of the states' FLOPs. At T = 5 L the quadratic form in one chunk and
    the chunked one cost the same: (T + 64) (K + V) = 4 K V + (L + 64) (K + V). LRAM: K = V = 256 to
    896, L = 128 to 448, so its 150 tokens are one chunk; K = 128, V = 256: chunks of 128.
    """
    L = 64 * triton.cdiv(K * V, 64 * (K + V))
    return 16 * triton.cdiv(T, 16) if T <= 5 * L else L


def tiles(T, dtype):
    """BT tokens, BLOCK of the inner sums: 64 for 16-bit operands on tensor cores, 32 for fp32."""
    largest = 64 if dtype.itemsize == 2 else 32
    return min(largest, max(16, triton.next_power_of_2(T))), largest


def columns(width, dtype):
    """BW columns of an output: 128 for 16-bit types where it wastes less than 10 %, else BLOCK."""
    _, largest = tiles(1, dtype)
    return 128 if largest == 64 and 128 * triton.cdiv(width, 128) < 1.1 * width else largest


def _states(x, y, vector, w, M, first, at, last, other, dots, chunks, L, updates, **flags):
    (B, T, H, K), V = x.shape, y.shape[-1]
    BT, BLOCK = tiles(T, x.dtype)
    grid = (triton.cdiv(K, BLOCK) * triton.cdiv(V, BLOCK) * B * H,)
    launch(states_kernel, grid, x, y, vector, w, M, *first, *at, *last, *other, dots,
           T, H, K, V, L, chunks, updates, K ** -0.5, BT=BT, BK=BLOCK, BV=BLOCK,
           IN=dot_precision(), num_stages=3, **flags)


def _mix(out, x, state, strides, vector, factor, pairs, y, row, dots, rest, **flags):
    (B, T, H, X), Y = x.shape, y.shape[-1]
    w, M, m, den, chunks, L, scale = rest
    (BT, BLOCK), BW = tiles(T, x.dtype), columns(Y, x.dtype)
    grid = (triton.cdiv(Y, BW) * triton.cdiv(L, BT) * chunks * B * H,)
    launch(mix_kernel, grid, x, state, vector, factor, pairs, y, out, row, dots, w, M, m, den,
           T, H, X, Y, L, chunks, scale, *strides, BT=BT, BW=BW, BLOCK=BLOCK, IN=dot_precision(),
           num_warps=8 if BW == 128 else 4, num_stages=3, **flags)


def mlstm_forward(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor,
                  m: Tensor, fresh: bool, final: bool, save: bool) -> tuple[(Tensor,) * 11]:
    """q, k (B, T, H, K), v (B, T, H, V), i, f (B, H, T), C (B, H, K, V), n (B, H, K), m (B, H).

    fresh: C and n are zero and not read. final: the last C, n are wanted. -> h (B, T, H, V), last
    C, n, m, then what the gradient needs (empty without save).
    """
    (B, T, H, K), V = q.shape, v.shape[-1]
    h, C_last, n_last, m_last, *saved = _mlstm_outputs(q, k, v, i, f, C, n, m, fresh, final, True)
    w, M, ms, den, S, Cs, ns = saved
    L, (BT, BLOCK) = S.shape[-1], tiles(T, q.dtype)
    chunks, scale = triton.cdiv(T, L), K ** -0.5
    launch(gate_kernel, (B * H,), i, f, m, w, M, ms, m_last, T,
           BLOCK=min(1024, triton.next_power_of_2(T)))
    state = chunks > 1 or not fresh
    if state or final:
        _states(k, v, w, w, M, (C, n), (Cs, ns), (C_last, n_last), (Cs, ns), den, chunks, L,
                chunks if final else chunks - 1, REVERSE=False, FIRST=not fresh, LAST=final)
    launch(scores_kernel, (triton.cdiv(L, BT) * chunks * B * H,), q, k, ns, w, M, S, den,
           T, H, K, L, chunks, scale, STATE=state, BT=BT, BLOCK=BLOCK, IN=dot_precision(),
           num_stages=3)
    _mix(h, q, Cs, (V, 1), ns, den, S, v, q, den, (w, M, ms, den, chunks, L, scale),
         BACK=True, STATE=state, VECTOR=False, NORM=True)
    return h, C_last, n_last, m_last, *(saved if save else [x.new_empty(0) for x in saved])


def _mlstm_outputs(q, k, v, i, f, C, n, m, fresh, final, save):
    (B, T, H, K), V = q.shape, v.shape[-1]
    L = chunk_length(T, K, V)
    chunks = triton.cdiv(T, L)
    bounds = chunks + 1 if final or chunks > 1 or not fresh else 0
    wide = lambda *shape, dtype=torch.float32: q.new_empty(shape, dtype=dtype)
    saved = [wide(B, H, T, dtype=torch.float64), wide(B, H, T + 1, dtype=torch.float64),
             wide(B, H, T), wide(B, H, T), q.new_empty(B, H, T, L),
             q.new_empty(B, H, bounds, K, V), wide(B, H, bounds, K)]
    last = (wide(B, H, K, V), wide(B, H, K)) if final else (wide(0), wide(0))
    saved = saved if save else [x.new_empty(0) for x in saved]
    return (torch.empty_like(v), *last, wide(B, H), *saved)


def mlstm_backward(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, h: Tensor, w: Tensor,
                   M: Tensor, m: Tensor, den: Tensor, S: Tensor, Cs: Tensor, ns: Tensor,
                   dh: Tensor, dC: Tensor, dn: Tensor, fresh: bool, final: bool
                   ) -> tuple[(Tensor,) * 7]:
    """Gradients of q, k, v, i, f and of the initial C, n (empty if fresh).

    dh (B, T, H, V); dC, dn: gradients of the last state, read if final.
    """
    (B, T, H, K), V = q.shape, v.shape[-1]
    L, (BT, BLOCK), BW = S.shape[-1], tiles(T, q.dtype), columns(K, q.dtype)
    chunks, scale = triton.cdiv(T, L), K ** -0.5
    P, dnum, dden = torch.empty_like(S), torch.empty_like(v), torch.empty_like(den)
    dh, dC, dn = (x.contiguous() for x in (dh, dC, dn))
    launch(dscores_kernel, (triton.cdiv(L, BT) * chunks * B * H,), dh, h, v, w, M, m, den,
           P, dnum, dden, T, H, V, L, chunks, scale, BT=BT, BLOCK=BLOCK, IN=dot_precision(),
           num_stages=3)
    dCs, dns = torch.empty_like(Cs), torch.empty_like(ns)
    tiles_C, tiles_K = triton.cdiv(K, BLOCK) * triton.cdiv(V, BLOCK), triton.cdiv(K, BW)
    C_dC = den.new_empty(B, H, chunks + 1, tiles_C)
    dC_first, dn_first = _first_gradients(den, fresh, B, H, K, V)
    before, after = chunks > 1 or not fresh, chunks > 1 or final
    if before or after:
        _states(q, dnum, dden, w, M, (dC, dn), (dCs, dns), (dC_first, dn_first), (Cs, ns), C_dC,
                chunks, L, chunks - 1 if fresh else chunks, REVERSE=True, FIRST=final,
                LAST=not fresh)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    q_dq, k_dk = den.new_empty(2, tiles_K, B, H, T)
    rest = w, M, m, den, chunks, L, scale
    _mix(dq, dnum, Cs, (1, V), ns, dden, P, k, q, q_dq, rest,
         BACK=True, STATE=before, VECTOR=True, NORM=False)
    _mix(dk, v, dCs, (1, V), dns, dden, P, q, k, k_dk, rest,
         BACK=False, STATE=after, VECTOR=True, NORM=False)
    _mix(dv, k, dCs, (V, 1), dns, dden, S, dnum, v, k_dk, rest,
         BACK=False, STATE=after, VECTOR=False, NORM=False)
    di, df = torch.empty_like(i), torch.empty_like(f)
    launch(dgates_kernel, (chunks * B * H,), f, q_dq, k_dk, C_dC, di, df, T, L, chunks, tiles_K,
           tiles_C, STATE=after, BLOCK=triton.next_power_of_2(L))
    return dq, dk, dv, di, df, dC_first, dn_first


def _first_gradients(like, fresh, B, H, K, V):
    return (like.new_empty(0), like.new_empty(0)) if fresh else \
        (like.new_empty(B, H, K, V), like.new_empty(B, H, K))


mlstm_forward_op = torch.library.custom_op("lram::mlstm_forward", mlstm_forward, mutates_args=())
mlstm_backward_op = torch.library.custom_op("lram::mlstm_backward", mlstm_backward, mutates_args=())
mlstm_forward_op.register_fake(_mlstm_outputs)


@mlstm_backward_op.register_fake
def _(q, k, v, i, f, h, w, M, m, den, S, Cs, ns, dh, dC, dn, fresh, final):
    (B, _, H, K), V = q.shape, v.shape[-1]
    return (*(torch.empty_like(x) for x in (q, k, v, i, f)),
            *_first_gradients(den, fresh, B, H, K, V))


def _mlstm_save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    ctx.fresh, ctx.final = inputs[8:10]
    ctx.save_for_backward(*inputs[:5], output[0], *output[4:])


def _mlstm_gradient(ctx, dh, dC, dn, *_):
    q, k, v, i, f, h, w, M, m, *saved = ctx.saved_tensors
    (B, _, H, K), V = q.shape, v.shape[-1]
    final = ctx.final and (dC is not None or dn is not None)
    dh = torch.zeros_like(v) if dh is None else dh
    dC, dn = (m if not final else m.new_zeros(shape) if d is None else d
              for d, shape in ((dC, (B, H, K, V)), (dn, (B, H, K))))
    *gradients, dC, dn = mlstm_backward_op(q, k, v, i, f, h, w, M, m, *saved, dh, dC, dn,
                                           ctx.fresh, final)
    return *gradients, *((None, None) if ctx.fresh else (dC, dn)), None, None, None, None


mlstm_forward_op.register_autograd(_mlstm_gradient, setup_context=_mlstm_save)


# ------------------------------------------------------------------------------------ mLSTM: steps
@triton.jit
def step_kernel(q, k, v, i, f, C, n, m, h, C_out, n_out, m_out, T, H, K, V, scale,
                TP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """T = 1 to 8 tokens at once: the parallel form with the memory that came before.

    Program: a strip of BV columns of one head's C, read once and written once (C_out may be C).
    Bytes 8 K V per head; FLOPs 4 T K V: the memory's bandwidth is the floor. Every program sums
    q k and q n for itself, (T + 1) / (2 BV) of its work; the first strip writes n and m.
    """
    strips = tl.cdiv(V, BV)
    strip, p = tl.program_id(0) % strips, (tl.program_id(0) // strips).to(tl.int64)
    token = p // H * T * H + p % H                          # row of q, k, v
    t = tl.arange(0, TP)
    in_T = t < T
    rows, col = t[:, None], strip * BV + tl.arange(0, BV)
    in_V = in_T[:, None] & (col < V)[None, :]
    # b, w, M as in gate_kernel
    i_s = tl.load(i + p * T + t, mask=in_T, other=0.0).to(tl.float64)               # (TP,)
    log_f = log_sigmoid(tl.load(f + p * T + t, mask=in_T, other=0.0).to(tl.float64))
    log_f = tl.where(in_T, tl.where(log_f < -1e5, -1e5, log_f), 0.0)
    w = i_s - tl.cumsum(log_f, axis=0)
    w = tl.where(in_T, tl.where(w < -1e30, -1e30, w), -1e30)
    v_s = tl.load(v + token * V + rows * (H * V) + col[None, :], mask=in_V, other=0.0)
    v_s = v_s.to(tl.float32)                                                        # (TP, BV)
    past = t[None, :] <= tl.where(in_T, t, -1)[:, None]                             # (TP, TP)
    b = tl.sum(tl.where(past, log_f[None, :], 0.0), axis=1)                         # (TP,)
    m_first = tl.load(m + p).to(tl.float64)
    M = tl.maximum(m_first, tl.max(tl.where(past, w[None, :], -float("inf")), axis=1))
    M_last = tl.maximum(m_first, tl.max(w, axis=0))
    keep = tl.exp((m_first - M_last).to(tl.float32))
    write = tl.where(in_T, tl.exp((w - M_last).to(tl.float32)), 0.0)
    q_C = tl.zeros((TP, BK, BV), tl.float32)
    q_k = tl.zeros((TP, TP, BK), tl.float32)
    q_n = tl.zeros((TP, BK), tl.float32)
    for first in tl.range(0, K, BK, num_stages=4):          # four tiles of C on their way
        x = first + tl.arange(0, BK)
        at, in_K = token * K + rows * (H * K) + x[None, :], in_T[:, None] & (x < K)[None, :]
        q_x = tl.load(q + at, mask=in_K, other=0.0).to(tl.float32)                  # (TP, BK)
        k_x = tl.load(k + at, mask=in_K, other=0.0).to(tl.float32)
        n_x = tl.load(n + p * K + x, mask=x < K, other=0.0)
        tile, inside = x[:, None] * V + col[None, :], (x[:, None] < K) & (col[None, :] < V)
        C_x = tl.load(C + p * K * V + tile, mask=inside, other=0.0)                 # (BK, BV)
        q_C += q_x[:, :, None] * C_x[None, :, :]
        q_k += q_x[:, None, :] * k_x[None, :, :]
        q_n += q_x * n_x[None, :]
        # C_T = keep C + sum_s write_s k_s v_s^T,   n_T = keep n + sum_s write_s k_s
        k_x *= write[:, None]
        C_x = keep * C_x + tl.sum(k_x[:, :, None] * v_s[:, None, :], axis=0)
        tl.store(C_out + p * K * V + tile, C_x, mask=inside)
        if strip == 0:
            tl.store(n_out + p * K + x, keep * n_x + tl.sum(k_x, axis=0), mask=x < K)
    decay = tl.exp((m_first - M).to(tl.float32)) * scale
    S = tl.where(past, tl.sum(q_k, axis=2) * weights(w, M) * scale, 0.0)            # (TP, TP)
    den = tl.sum(q_n, axis=1) * decay + tl.sum(S, axis=1)
    num = tl.sum(q_C, axis=1) * decay[:, None] + tl.sum(S[:, :, None] * v_s[None, :, :], axis=1)
    h_t = num / (tl.maximum(tl.abs(den), tl.exp((-b - M).to(tl.float32))) + 1e-6)[:, None]
    tl.store(h + token * V + rows * (H * V) + col[None, :], h_t, mask=in_V)
    if strip == 0:
        tl.store(m_out + p, tl.sum(log_f, axis=0) + M_last)


def step_forward(q, k, v, i, f, C, n, m, C_out):
    """As mlstm_forward for T <= 8, and C_out, into which the new C goes -> h, n, m."""
    (B, T, H, K), V = q.shape, v.shape[-1]
    h, n_out, m_out = (torch.empty_like(x) for x in (v, n, m))
    # the widest strips that still give every multiprocessor (up to 132) a program or two
    BV = next((w for w in (64, 32) if B * H * triton.cdiv(V, w) >= 256), 16)
    TP = triton.next_power_of_2(T)
    launch(step_kernel, (B * H * triton.cdiv(V, BV),), q, k, v, i, f, C, n, m, h, C_out, n_out,
           m_out, T, H, K, V, K ** -0.5, TP=TP, BK=min(128, 4096 // (TP * BV)), BV=BV)
    return h, n_out, m_out


@torch.library.custom_op("lram::mlstm_step", mutates_args=())
def step_op(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor, m: Tensor
            ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """step_forward into a new C -> h, C, n, m."""
    C_out = torch.empty_like(C)
    h, n, m = step_forward(q, k, v, i, f, C, n, m, C_out)
    return h, C_out, n, m


@torch.library.custom_op("lram::mlstm_step_", mutates_args=("C",))
def step_in_place_op(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor,
                     m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """step_forward over the given C -> h, n, m."""
    return step_forward(q, k, v, i, f, C, n, m, C)


@step_op.register_fake
def _(q, k, v, i, f, C, n, m):
    return tuple(torch.empty_like(x) for x in (v, C, n, m))


@step_in_place_op.register_fake
def _(q, k, v, i, f, C, n, m):
    return tuple(torch.empty_like(x) for x in (v, n, m))


def _mlstm_inputs(name, q, k, v, i, f, state):
    """Checked, contiguous, heads behind tokens; state as a list, C and n empty if there is none."""
    tensors = [q, k, v, i, f, *(state or ())]
    shapes = ()
    if q.dim() == v.dim() == 4:
        (B, H, T, K), V = q.shape, v.shape[-1]
        shapes = ((B, H, T, K), (B, H, T, K), (B, H, T, V), (B, H, T), (B, H, T), (B, H, K, V),
                  (B, H, K), (B, H))
    if (not shapes or len(tensors) not in (5, 8) or not acceptable(tensors) or K % 16 or V % 16
            or any(x.shape != shape for x, shape in zip(tensors, shapes))
            or not q.dtype == k.dtype == v.dtype
            or any(x.dtype != torch.float32 for x in tensors[5:])):
        refuse(name, tensors, "q, k (B, H, T, K), v (B, H, T, V) of one dtype (float32, bfloat16, "
               "float16), K and V multiples of 16, none empty, i, f (B, H, T), state C (B, H, K, "
               "V), n (B, H, K), m (B, H) in float32", "mlstm.mlstm_chunkwise")
    if state is None:
        state = [torch.zeros(shape, dtype=torch.float32, device=q.device)
                 for shape in ((0,), (0,), (B, H))]
    # the block's q, k, v are (B, T, H, K) in memory already: no copy
    return [*(x.transpose(1, 2).contiguous() for x in (q, k, v)),
            *(x.contiguous() for x in (i, f, *state[:2], state[2].detach()))]


def mlstm_chunkwise_triton(q, k, v, i, f, state=None, final_state=True):
    """mlstm.mlstm_chunkwise on a GPU: same arguments and results, gradients also of the state.

    q, k (B, H, T, K), v (B, H, T, V) in float32, bfloat16 or float16, i, f (B, H, T), state C, n,
    m float32; K and V multiples of 16. final_state False: the state is not computed but None.
    Raises ValueError for what it does not take.
    """
    inputs = _mlstm_inputs("mlstm_chunkwise_triton", q, k, v, i, f, state)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    h, *last = mlstm_forward_op(*inputs, state is None, final_state, save)[:4]
    return h.transpose(1, 2), tuple(last) if final_state else None


def mlstm_step_triton(q, k, v, i, f, state, in_place=False):
    """mlstm.mlstm_chunkwise for 1 to 8 tokens from a state, in one launch, without gradient.

    in_place: the new C is written over the given one, which must be contiguous. n and m are new.
    """
    *inputs, C, n, m = _mlstm_inputs("mlstm_step_triton", q, k, v, i, f, state)
    if q.shape[2] > 8 or state is None or in_place and C is not state[0]:
        raise ValueError(f"mlstm_step_triton: got {q.shape[2]} tokens, state "
                         f"{'absent' if state is None else 'with C of strides'} "
                         f"{() if state is None else state[0].stride()}; takes 1 to 8 tokens and "
                         "a state, in place a contiguous C. Use mlstm_chunkwise_triton")
    if in_place:
        h, n, m = step_in_place_op(*inputs, C, n, m)
    else:
        h, C, n, m = step_op(*inputs, C, n, m)
    return h.transpose(1, 2), (C, n, m)


def mlstm_triton(q, k, v, i, f, state=None, final_state=True):
    """The step kernel to act, 8 tokens at most from a state and no gradient, else the chunks."""
    gradient = torch.is_grad_enabled() and any(
        x.requires_grad for x in (q, k, v, i, f, *(state or ())))
    if q.dim() == 4 and q.shape[2] <= 8 and state is not None and not gradient:
        h, state = mlstm_step_triton(q, k, v, i, f, state)
        return h, state if final_state else None
    return mlstm_chunkwise_triton(q, k, v, i, f, state, final_state)


# ------------------------------------------------------------------------------------------- sLSTM
# Gate t needs y_{t-1}, so time is a loop. One kernel serves two uses, by the rule in slstm_launch:
#
#     sequence   grid (batch tiles of 16 rows, heads): a program loops over time and, inside a step,
#                over the column tiles of its head. It reads R from L2 again in every step.
#     step       one launch per token, grid (batch tiles, heads, column tiles): for T <= 3, acting,
#                where a batch of 1 would otherwise keep H multiprocessors busy and no more.
#
#     the outputs of one head, dh columns      sequence: one program, tile after tile
#     | tile 0 | tile 1 | tile 2 |...          step:     one program per tile
#     every tile reads all of y_{t-1} and writes its own columns of y_t, into another slot of S
STEPWISE = 3                            # tokens up to which sLSTM launches once a token


@triton.jit(do_not_specialize=["first", "T"])
def slstm_forward_kernel(gates, R, S, raw, out, first, steps, tiles, B, T, H, dh, ld,
                         SAVE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                         BLOCK: tl.constexpr, IN: tl.constexpr):
    """Tokens first .. first + steps - 1 of ROWS batch rows of a head, `tiles` tiles of its columns.

    S (slots, 4, B, H, dh) fp32: y, c, n, m. SAVE: T + 1 slots, token t reads slot t and writes
    t + 1, all kept for the gradient. Else 2 slots in turn, the final state in slot 0.
    R (4, H, dh, ld), ld >= dh with zeros behind dh. Per row, unit and token, 16 bit: 8 bytes gates,
    32 S, 2 out (SAVE: 16 raw), 8 dh FLOPs; per head, token and batch tile 8 dh^2 bytes of R (L2).
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]        # (ROWS, 1)
    head, width, size = tl.program_id(1), H * dh, B * H * dh
    for t in range(first, first + steps):
        slot = t if SAVE else (T + t) % 2
        next_slot = t + 1 if SAVE else 1 - slot
        old = S + (slot * 4 * B + row) * width + head * dh                          # y_{t-1}
        new = S + (next_slot * 4 * B + row) * width + head * dh                     # y_t
        for tile in range(tl.program_id(2) * tiles, (tl.program_id(2) + 1) * tiles):
            col = tile * COLS + tl.arange(0, COLS)[None, :]                         # (1, COLS)
            mask = (row < B) & (col < dh)
            at = (row * T + t) * 4 * width + head * dh + col                        # (ROWS, COLS)
            i = tl.load(gates + at, mask=mask, other=0.0).to(tl.float32)
            f = tl.load(gates + at + width, mask=mask, other=0.0).to(tl.float32)
            z = tl.load(gates + at + 2 * width, mask=mask, other=0.0).to(tl.float32)
            o = tl.load(gates + at + 3 * width, mask=mask, other=0.0).to(tl.float32)
            # raw_g = gates_g + R_g y_{t-1}
            for start in range(0, ld, BLOCK):
                x = start + tl.arange(0, BLOCK)
                y = tl.load(old + x[None, :], mask=(row < B) & (x[None, :] < dh), other=0.0)
                y = y.to(R.dtype.element_ty)                                        # (ROWS, BLOCK)
                R_t = R + (head * dh + col) * ld + x[:, None]                       # (BLOCK, COLS)
                in_R = (x[:, None] < ld) & (col < dh)
                i = tl.dot(y, tl.load(R_t, mask=in_R, other=0.0), i, input_precision=IN)
                R_t += width * ld
                f = tl.dot(y, tl.load(R_t, mask=in_R, other=0.0), f, input_precision=IN)
                R_t += width * ld
                z = tl.dot(y, tl.load(R_t, mask=in_R, other=0.0), z, input_precision=IN)
                R_t += width * ld
                o = tl.dot(y, tl.load(R_t, mask=in_R, other=0.0), o, input_precision=IN)
            if SAVE:
                tl.store(raw + at, i, mask=mask)
                tl.store(raw + at + width, f, mask=mask)
                tl.store(raw + at + 2 * width, z, mask=mask)
                tl.store(raw + at + 3 * width, o, mask=mask)
            # m_t = max(log f + m_{t-1}, i): keeps both exp() below at most 1
            log_f = log_sigmoid(f) + tl.load(old + 3 * size + col, mask=mask, other=0.0)
            m = tl.maximum(log_f, i)
            write, forget = tl.exp(i - m), tl.exp(log_f - m)
            # c_t = f c_{t-1} + i tanh(z),   n_t = f n_{t-1} + i,   y_t = sigmoid(o) c_t / n_t
            c = forget * tl.load(old + size + col, mask=mask, other=0.0) + write * tanh(z)
            n = forget * tl.load(old + 2 * size + col, mask=mask, other=0.0) + write
            y_t = tl.sigmoid(o) * c / n
            tl.store(new + col, y_t, mask=mask)
            tl.store(new + size + col, c, mask=mask)
            tl.store(new + 2 * size + col, n, mask=mask)
            tl.store(new + 3 * size + col, m, mask=mask)
            tl.store(out + (row * T + t) * width + head * dh + col, y_t, mask=mask)
        tl.debug_barrier()              # y_t is in memory before any thread reads it as y_{t-1}


@triton.jit(do_not_specialize=["first", "T"])
def slstm_backward_kernel(d_out, R, S, raw, d_raw, dS, first, steps, tiles, B, T, H, dh, ld,
                          ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr,
                          IN: tl.constexpr):
    """Programs and tiles of the forward kernel, time reversed: t = T-1 .. 0, and -1, which only
    carries dy to the initial state.

    dS (3, B, H, dh) fp32: on entry the gradient of the final y, c, n, on return of the initial.
    Every tile reads all of d_raw(t+1) and writes its own columns of d_raw(t). Per row, unit and
    token, 16 bit: 16 bytes raw, 24 state, 10 gradients in and out, 16 dS; 8 dh FLOPs.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]        # (ROWS, 1)
    head, width, size = tl.program_id(1), H * dh, B * H * dh
    for step in range(first, first + steps):
        t = T - 1 - step
        for tile in range(tl.program_id(2) * tiles, (tl.program_id(2) + 1) * tiles):
            col = tile * COLS + tl.arange(0, COLS)[None, :]                         # (1, COLS)
            mask = (row < B) & (col < dh)
            at = row * width + head * dh + col                                      # (ROWS, COLS)
            # dy_t = dL/dy_t + sum_g R_g^T d_raw_g(t+1)
            # four sums, added at the end: four products in a row into one tile of accumulators
            # have been reported to be compiled wrongly for the newest GPUs
            i = tl.load(dS + at, mask=mask & (step == 0), other=0.0)
            f, z, o = tl.zeros_like(i), tl.zeros_like(i), tl.zeros_like(i)
            for start in range(0, dh, BLOCK):
                x = start + tl.arange(0, BLOCK)
                d_at = d_raw + (row * T + t + 1) * 4 * width + head * dh + x[None, :]
                in_d = (row < B) & (x[None, :] < dh) & (step > 0)
                R_at = R + (head * dh + x[:, None]) * ld + col                      # (BLOCK, COLS)
                in_R = (x[:, None] < dh) & (col < ld)
                i = tl.dot(tl.load(d_at, mask=in_d, other=0.0),                     # (ROWS, BLOCK)
                           tl.load(R_at, mask=in_R, other=0.0), i, input_precision=IN)
                f = tl.dot(tl.load(d_at + width, mask=in_d, other=0.0),
                           tl.load(R_at + width * ld, mask=in_R, other=0.0), f, input_precision=IN)
                z = tl.dot(tl.load(d_at + 2 * width, mask=in_d, other=0.0),
                           tl.load(R_at + 2 * width * ld, mask=in_R, other=0.0), z,
                           input_precision=IN)
                o = tl.dot(tl.load(d_at + 3 * width, mask=in_d, other=0.0),
                           tl.load(R_at + 3 * width * ld, mask=in_R, other=0.0), o,
                           input_precision=IN)
            dy = i + f + z + o
            if t < 0:
                tl.store(dS + at, dy, mask=mask)
            else:
                out_t = (row * T + t) * width + head * dh + col
                dy += tl.load(d_out + out_t, mask=mask).to(tl.float32)
                old = S + (t * 4 * B + row) * width + head * dh + col               # t-1, slot t
                new = old + 4 * size
                c, n = tl.load(new + size, mask=mask), tl.load(new + 2 * size, mask=mask, other=1)
                m = tl.load(new + 3 * size, mask=mask)
                raw_t = (row * T + t) * 4 * width + head * dh + col
                i, f = tl.load(raw + raw_t, mask=mask), tl.load(raw + raw_t + width, mask=mask)
                z = tanh(tl.load(raw + raw_t + 2 * width, mask=mask))
                o = tl.sigmoid(tl.load(raw + raw_t + 3 * width, mask=mask))
                write = tl.exp(i - m)
                forget = tl.exp(log_sigmoid(f) + tl.load(old + 3 * size, mask=mask) - m)
                # y = o c / n:  dc += dy o / n,  dn -= dy y / n
                dy_n, dS_at = dy / n, dS + at
                dc = tl.load(dS_at + size, mask=mask) + dy_n * o
                dn = tl.load(dS_at + 2 * size, mask=mask) - dy_n * o * c / n
                # di = I (z dc + dn),   df = F (c_{t-1} dc + n_{t-1} dn) sigmoid(-f)
                keep = tl.load(old + size, mask=mask) * dc
                keep += tl.load(old + 2 * size, mask=mask) * dn
                tl.store(d_raw + raw_t, write * (z * dc + dn), mask=mask)
                tl.store(d_raw + raw_t + width, forget * keep * tl.sigmoid(-f), mask=mask)
                # dz = I dc (1 - z^2),   do = dy c / n o (1 - o)
                tl.store(d_raw + raw_t + 2 * width, write * dc * (1 - z * z), mask=mask)
                tl.store(d_raw + raw_t + 3 * width, dy_n * c * o * (1 - o), mask=mask)
                tl.store(dS_at + size, forget * dc, mask=mask)
                tl.store(dS_at + 2 * size, forget * dn, mask=mask)
        tl.debug_barrier()              # d_raw(t) is in memory before any thread reads it at t-1


def slstm_launch(kernel, tensors, count, shape, **constants):
    """`count` time steps by the rule: a launch each for T <= STEPWISE, else one that loops.

    tensors: the kernel's pointers, R second.
    """
    (gates, R, *rest), (B, T, H, dh) = tensors, shape
    R = R.contiguous()
    by_step, small = T <= STEPWISE, R.element_size() == 2
    COLS = min(16 if by_step else 64, triton.next_power_of_2(max(dh, 16)))
    BLOCK = min(64 if small else 32, triton.next_power_of_2(max(dh, 16)))
    tiles = triton.cdiv(dh, COLS)
    if dh % 16 and not by_step:     # rows of R at multiples of 16: wide loads (worth it in a loop)
        R = torch.nn.functional.pad(R, (0, -dh % 16))
    grid = (triton.cdiv(B, 16), H, tiles if by_step else 1)
    for first in range(count if by_step else 1):
        launch(kernel, grid, gates, R, *rest, first, 1 if by_step else count,
               1 if by_step else tiles, B, T, H, dh, R.shape[3], ROWS=16, COLS=COLS, BLOCK=BLOCK,
               IN=dot_precision(), num_warps=4 if by_step else 8, num_stages=3, **constants)


def slstm_forward(gates: torch.Tensor, R: torch.Tensor, y: torch.Tensor, c: torch.Tensor,
                  n: torch.Tensor, m: torch.Tensor, save: bool
                  ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> y (B, T, H, dh), final state (4, B, H, dh), all states and raw gates for the gradient.

    The raw gates are saved, in fp32: computed again, they would cost a second product with R in
    every sequential step of the backward loop, which is what limits it; in bf16 they would be off
    by 1 %.
    """
    B, T, _, H, dh = gates.shape
    S = torch.empty(T + 1 if save else 2, 4, B, H, dh, dtype=torch.float32, device=gates.device)
    torch.stack((y, c, n, m), out=S[0 if save else T % 2])
    raw = S.new_empty(gates.shape if save else (0,))
    out = gates.new_empty(B, T, H, dh)
    slstm_launch(slstm_forward_kernel, (gates.contiguous(), R, S, raw if save else S, out), T,
                 (B, T, H, dh), SAVE=save)
    return (out, S[T].clone(), S, raw) if save else (out, S[0], S.new_empty(0), raw)


def slstm_backward(d_out: torch.Tensor, d_final: torch.Tensor, R: torch.Tensor, S: torch.Tensor,
                   raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> d gates, d R, gradient of the initial y, c, n (3, B, H, dh)."""
    B, T, _, H, dh = raw.shape
    d_raw = torch.empty(raw.shape, dtype=R.dtype, device=R.device)
    dS = d_final[:3].clone(memory_format=torch.contiguous_format)
    slstm_launch(slstm_backward_kernel, (d_out.contiguous(), R, S, raw, d_raw, dS), T + 1,
                 (B, T, H, dh))
    # dR_g = sum_t d_raw_g(t) y_{t-1}^T: all steps' outer products as one batched product
    dR = torch.einsum("btgho,tbhi->ghoi", d_raw, S[:-1, 0].to(R.dtype))
    return d_raw, dR.contiguous(), dS


slstm_forward_op = torch.library.custom_op("lram::slstm_forward", slstm_forward, mutates_args=())
slstm_backward_op = torch.library.custom_op("lram::slstm_backward", slstm_backward, mutates_args=())


@slstm_forward_op.register_fake
def _(gates, R, y, c, n, m, save):
    B, T, _, H, dh = gates.shape
    S = y.new_empty((T + 1, 4, B, H, dh) if save else 0)
    raw = y.new_empty(gates.shape if save else 0)
    return gates.new_empty(B, T, H, dh), y.new_empty(4, B, H, dh), S, raw


@slstm_backward_op.register_fake
def _(d_out, d_final, R, S, raw):
    return (raw.new_empty(raw.shape, dtype=R.dtype), R.new_empty(R.shape),
            S.new_empty(S[0, :3].shape))


def _slstm_save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.gates_dtype = inputs[0].dtype
    ctx.save_for_backward(inputs[1], *output[2:])


def _slstm_gradient(ctx, d_out, d_final, *_):
    R, S, raw = ctx.saved_tensors
    B, T, _, H, dh = raw.shape
    d_out = S.new_zeros(B, T, H, dh) if d_out is None else d_out
    d_final = S.new_zeros(3, B, H, dh) if d_final is None else d_final
    d_gates, dR, dS = slstm_backward_op(d_out, d_final, R, S, raw)
    return d_gates.to(ctx.gates_dtype), dR, *dS.unbind(0), None, None


slstm_forward_op.register_autograd(_slstm_gradient, setup_context=_slstm_save)


def slstm_scan_triton(gates, R, state=None):
    """slstm.slstm_scan on a GPU: same arguments and results, gradient by hand.

    gates (B, T, 4, H, dh) fp32, bf16 or fp16, R (4, H, dh, dh), state (y, c, n, m) (B, H, dh) fp32
    or None. Products take operands of gates' dtype (of autocast where it is on) and accumulate in
    fp32; the rest is fp32.
    """
    B, T, four, H, dh = gates.shape if gates.dim() == 5 else (0,) * 5
    if state is None:
        zeros = torch.zeros(B, H, dh, dtype=torch.float32, device=gates.device)
        state = zeros, zeros, zeros, torch.full_like(zeros, -torch.inf)
    if (four != 4 or len(state) != 4 or R.shape != (4, H, dh, dh)
            or not acceptable([gates, R, *state])
            or any(x.shape != (B, H, dh) or x.dtype != torch.float32 for x in state)):
        refuse("slstm_scan_triton", [gates, R, *state], "gates (B, T, 4, H, dh) and R (4, H, dh, "
               "dh) in float32, bfloat16 or float16, none empty, state y, c, n, m (B, H, dh) in "
               "float32", "slstm.slstm_scan")
    y, c, n, m = state
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (gates, R, y, c, n))
    # under autocast the products take its type; the gates, sums with a float32 bias, keep theirs
    kind = gates.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else gates.dtype
    out, final, _, _ = slstm_forward_op(gates, R.to(dtype), y, c, n, m.detach(), save)
    y, c, n, m = final.unbind(0)
    return out, (y, c, n, m.detach())


# ------------------------------------------------------------------------------------------- Mamba
#     h_t = exp(dt_t A) h_{t-1} + (dt_t u_t) B_t        y_t = C_t h_t + D u_t
#
# Every channel e is a recurrence of its own, so a program takes a few channels of one sequence and
# keeps h (BLOCK_E, N) in registers while it walks over the tokens:
#
#                   channels ->                    forward:  chunk 0 -> 1 -> 2, h saved before each
#     tokens  +--------+--------+--------+         backward: chunk 2 -> 1 -> 0, each chunk runs
#       |     | chunk 0|        |        |                   forward again from the saved h and
#       v     | chunk 1|  next  |  next  |                   keeps its CHUNK states in registers,
#             | chunk 2| program| program|                   then walks back (never divides by a
#             +--------+--------+--------+                   decay: exp(dt A) underflows to 0)
#
# The loads of a chunk are issued together, ahead of the recurrence that waits for them.
CHUNK = 8                               # tokens whose states the backward holds in registers
FORWARD_TILE = 256                      # numbers of h in a forward program, one warp
BACKWARD_TILE = 1024                    # in a backward program, eight warps: registers suffice


@triton.jit
def load_rows(x, first, count, width, column, CHUNK: tl.constexpr):
    """Rows first .. first + CHUNK - 1 of x (rows, width) as a tuple; from `count` on they are 0."""
    rows = ()
    for i in tl.static_range(CHUNK):
        there = column < tl.where(i < count, width, 0)
        row = tl.load(x + (first + i) * width + column, mask=there, other=0.0)
        rows = rows + (row.to(tl.float32),)
    return rows


@triton.jit
def scan_forward_kernel(u, dt, A, B, C, D, h_first, y, h_last, saved, T, E, N,
                        SAVE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr,
                        BLOCK_N: tl.constexpr):
    """Program (b, j): sequence b, channels j BLOCK_E and on, all T tokens; T = 1 is the step.

    Bytes per token and channel (bf16, dt fp32): u 2, dt 4, y 2, saved 4 N / CHUNK = 8; B and C
    come from the cache. FLOPs: 6 N + 3, and N exponentials, which bound the speed.
    """
    b = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)[:, None]         # (BLOCK_E, 1)
    n = tl.arange(0, BLOCK_N)[None, :]                                      # (1, BLOCK_N)
    tile = e * N + n                                                        # (BLOCK_E, BLOCK_N)
    inside = (e < E) & (n < N)
    A_tile = tl.load(A + tile, mask=inside, other=0.0).to(tl.float32)
    D_e = tl.load(D + e, mask=e < E, other=0.0).to(tl.float32)              # (BLOCK_E, 1)
    h = tl.load(h_first + b * E * N + tile, mask=inside, other=0.0)         # (BLOCK_E, BLOCK_N)
    for start in range(0, T, CHUNK):
        if SAVE:
            chunk = b * ((T + CHUNK - 1) // CHUNK) + start // CHUNK
            tl.store(saved + chunk * E * N + tile, h, mask=inside)
        first, count = b * T + start, T - start
        us = load_rows(u, first, count, E, e, CHUNK)                        # CHUNK x (BLOCK_E, 1)
        dts = load_rows(dt, first, count, E, e, CHUNK)
        Bs = load_rows(B, first, count, N, n, CHUNK)                        # CHUNK x (1, BLOCK_N)
        Cs = load_rows(C, first, count, N, n, CHUNK)
        for i in tl.static_range(CHUNK):
            # h_t = exp(dt_t A) h_{t-1} + (dt_t u_t) B_t;  past the end dt = 0 and h stays
            h = tl.exp(dts[i] * A_tile) * h + dts[i] * us[i] * Bs[i]
            # y_t = C_t h_t + D u_t
            y_t = tl.sum(h * Cs[i], axis=1, keep_dims=True) + D_e * us[i]   # (BLOCK_E, 1)
            tl.store(y + (first + i) * E + e, y_t, mask=e < tl.where(i < count, E, 0))
    tl.store(h_last + b * E * N + tile, h, mask=inside)


@triton.jit
def scan_backward_kernel(u, dt, A, B, C, D, saved, dy, dh_last, du, d_dt, dA, dB, dC, dD, dh_first,
                         T, E, N, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr,
                         BLOCK_N: tl.constexpr):
    """Program (b, j): sequence b, channels j BLOCK_E and on, the chunks from last to first.

    dA (batch, E, N), dD (batch, E) and dB, dC (blocks of channels, batch, T, N) are partial sums.
    Bytes per token and channel (bf16, dt fp32): u, dt, dy 8, du, d_dt 6, saved 8, dB and dC
    8 N / BLOCK_E = 2. FLOPs: 19 N + 9, and 2 N exponentials.
    """
    b = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1)
    e = j * BLOCK_E + tl.arange(0, BLOCK_E)[:, None]                        # (BLOCK_E, 1)
    n = tl.arange(0, BLOCK_N)[None, :]                                      # (1, BLOCK_N)
    tile = e * N + n                                                        # (BLOCK_E, BLOCK_N)
    inside = (e < E) & (n < N)
    A_tile = tl.load(A + tile, mask=inside, other=0.0).to(tl.float32)
    D_e = tl.load(D + e, mask=e < E, other=0.0).to(tl.float32)
    dh = tl.load(dh_last + b * E * N + tile, mask=inside, other=0.0)
    dA_tile = tl.zeros((BLOCK_E, BLOCK_N), tl.float32)
    dD_e = tl.zeros((BLOCK_E, 1), tl.float32)
    chunks = (T + CHUNK - 1) // CHUNK
    for back in range(0, chunks):
        c = chunks - 1 - back
        first, count = b * T + c * CHUNK, T - c * CHUNK
        us = load_rows(u, first, count, E, e, CHUNK)
        dts = load_rows(dt, first, count, E, e, CHUNK)
        dys = load_rows(dy, first, count, E, e, CHUNK)
        Bs = load_rows(B, first, count, N, n, CHUNK)
        Cs = load_rows(C, first, count, N, n, CHUNK)
        h = tl.load(saved + (b * chunks + c) * E * N + tile, mask=inside, other=0.0)
        hs = (h,)                                                           # hs[i] = h before i
        for i in tl.static_range(CHUNK):
            h = tl.exp(dts[i] * A_tile) * h + dts[i] * us[i] * Bs[i]
            hs = hs + (h,)
        for i in tl.static_range(CHUNK - 1, -1, -1):
            # y_t = C_t h_t: the state gets C_t dy_t on top of what comes back from t + 1
            dC_t = tl.sum(dys[i] * hs[i + 1], axis=0, keep_dims=True)       # (1, BLOCK_N)
            dh += dys[i] * Cs[i]
            # h_t = decay h_{t-1} + x_t B_t with x = dt u and decay = exp(dt A)
            dx = tl.sum(dh * Bs[i], axis=1, keep_dims=True)                 # (BLOCK_E, 1)
            dB_t = tl.sum(dh * (dts[i] * us[i]), axis=0, keep_dims=True)    # (1, BLOCK_N)
            dh *= tl.exp(dts[i] * A_tile)
            d_log = dh * hs[i]                                              # gradient of dt A
            dA_tile += d_log * dts[i]
            dD_e += dys[i] * us[i]
            row, there = (first + i) * E + e, e < tl.where(i < count, E, 0)
            tl.store(du + row, dx * dts[i] + dys[i] * D_e, mask=there)
            d_dt_t = dx * us[i] + tl.sum(d_log * A_tile, axis=1, keep_dims=True)
            tl.store(d_dt + row, d_dt_t, mask=there)
            there = n < tl.where(i < count, N, 0)
            part = (j * tl.num_programs(0).to(tl.int64) * T + first + i) * N + n
            tl.store(dB + part, dB_t, mask=there)
            tl.store(dC + part, dC_t, mask=there)
    tl.store(dA + b * E * N + tile, dA_tile, mask=inside)
    tl.store(dD + b * E + e, dD_e, mask=e < E)
    tl.store(dh_first + b * E * N + tile, dh, mask=inside)


# ------------------------------------------------------------------------ launches and custom ops
def scan_forward(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h: Tensor,
                 save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous inputs -> y (B, T, E), last h (B, E, N), h before every chunk if save else ()."""
    y, h_last, saved = _scan_outputs(u, dt, A, B, C, D, h, save)
    (batch, T, E), N = u.shape, A.shape[1]
    # one warp, 16 channels at N = 16: no warp waits for another, and batch 1 still fills the GPU
    BLOCK_N = triton.next_power_of_2(N)
    BLOCK_E = max(4, FORWARD_TILE // BLOCK_N)
    launch(scan_forward_kernel, (batch, triton.cdiv(E, BLOCK_E)), u, dt, A, B, C, D, h, y, h_last,
           saved, T, E, N, SAVE=save, CHUNK=min(CHUNK, triton.next_power_of_2(T)), BLOCK_E=BLOCK_E,
           BLOCK_N=BLOCK_N, num_warps=1)
    return y, h_last, saved


def _scan_outputs(u, dt, A, B, C, D, h, save):
    chunks = (u.shape[0], triton.cdiv(u.shape[1], CHUNK), *A.shape)
    return torch.empty_like(u), torch.empty_like(h), h.new_empty(chunks if save else (0,))


def scan_backward(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, saved: Tensor,
                  dy: Tensor, dh: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                                   Tensor]:
    """Gradients of u, dt, A, B, C, D and the first h, each in the dtype of its tensor."""
    (batch, T, E), N = u.shape, A.shape[1]
    du, d_dt, dA, dh_first = (torch.empty_like(x) for x in (u, dt, dh, dh))
    # partial sums: 8 N / BLOCK_E bytes per token and channel, 12 MB at B 16, T 150, E 2560
    BLOCK_N = triton.next_power_of_2(N)
    BLOCK_E = max(8, BACKWARD_TILE // BLOCK_N)
    blocks = triton.cdiv(E, BLOCK_E)
    dB, dC = dh.new_empty(2, blocks, batch, T, N)
    dD = dh.new_empty(batch, E)
    launch(scan_backward_kernel, (batch, blocks), u, dt, A, B, C, D, saved, dy, dh,
           du, d_dt, dA, dB, dC, dD, dh_first, T, E, N, CHUNK=min(CHUNK, triton.next_power_of_2(T)),
           BLOCK_E=BLOCK_E, BLOCK_N=BLOCK_N, num_warps=8)
    dA, dB, dC, dD = (part.sum(0).to(x.dtype) for part, x in zip((dA, dB, dC, dD), (A, B, C, D)))
    return du, d_dt, dA, dB, dC, dD, dh_first


scan_forward_op = torch.library.custom_op("lram::selective_scan", scan_forward, mutates_args=())
scan_forward_op.register_fake(_scan_outputs)
scan_backward_op = torch.library.custom_op("lram::selective_scan_backward", scan_backward,
                                           mutates_args=())
scan_backward_op.register_fake(lambda u, dt, A, B, C, D, saved, dy, dh: tuple(
    torch.empty_like(x) for x in (u, dt, A, B, C, D, dh)))


def _scan_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], output[2])


def _scan_gradient(ctx, dy, dh, _):
    *inputs, saved = ctx.saved_tensors             # saved (B, chunks, E, N)
    dy = torch.zeros_like(inputs[0]) if dy is None else dy.contiguous()
    dh = saved.new_zeros(saved[:, 0].shape) if dh is None else dh.contiguous()
    return (*scan_backward_op(*inputs, saved, dy, dh), None)


scan_forward_op.register_autograd(_scan_gradient, setup_context=_scan_setup)


def selective_scan_triton(u, dt, A, B, C, D, state=None):
    """Selective scan on a GPU: arguments and results of mamba.selective_scan, any T, E and N.

    One launch forward (also for the one to three tokens of acting), one backward plus four sums.
    float32, bfloat16 or float16, the state float32. Anything else raises ValueError.
    """
    tensors, shapes = [u, dt, A, B, C, D] + ([] if state is None else [state]), ()
    if u.dim() == 3 and A.dim() == 2:
        (b, t, e), N = u.shape, A.shape[1]
        shapes = ((b, t, e), (b, t, e), (e, N), (b, t, N), (b, t, N), (e,), (b, e, N))
    if (not shapes or not acceptable(tensors)
            or any(x.shape != shape for x, shape in zip(tensors, shapes))
            or (state is not None and state.dtype != torch.float32)):
        refuse("selective_scan_triton", tensors, "u, dt (B, T, E), A (E, N), B, C (B, T, N), D "
               "(E,) in float32, bfloat16 or float16 and state (B, E, N) in float32, none empty",
               "mamba.selective_scan")
    if state is None:
        state = torch.zeros(u.shape[0], *A.shape, dtype=torch.float32, device=u.device)
    inputs = [x.contiguous() for x in (u, dt, A, B, C, D, state)]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return scan_forward_op(*inputs, save)[:2]


# ----------------------------------------------------------------- compiling and checking by itself
PAPER_WIDTHS = (64, 128, 256, 352, 384, 512, 544, 640, 720, 768, 896)
TARGETS = {80: 163, 90: 227}            # compute capability -> KiB of shared memory of a program
_target, _compiled = 90, {}


def _compile(kernel, args, constants, num_warps, num_stages):
    """Ahead of time, for _target, with the types and the divisibility by 16 of these arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
             torch.float64: "*fp64"}
    signature, values, attributes = dict.fromkeys(kernel.arg_names, "constexpr"), {**constants}, {}
    for index, (name, value) in enumerate(zip(kernel.arg_names, args)):
        if isinstance(value, int) and value == 1 and not kernel.params[index].do_not_specialize:
            values[name] = 1
            continue
        signature[name] = types[value.dtype] if isinstance(value, Tensor) else \
            "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, Tensor) or isinstance(value, int) and value % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    key = (kernel.__name__, _target, num_warps, *signature.values(), *attributes, *values.items())
    if key not in _compiled:
        source = ASTSource(kernel, signature, values, attributes)
        binary = triton.compile(source, target=GPUTarget("cuda", _target, 32),
                                options={"num_warps": num_warps, "num_stages": num_stages,
                                         "enable_fp_fusion": True})
        used = binary.metadata.shared / 1024
        narrow = len(re.findall(r"ld\.global\S*\.b16", binary.asm["ptx"]))
        _compiled[key] = used, _stack_bytes(binary), narrow
        if used > TARGETS[_target]:
            raise RuntimeError(f"{kernel.__name__} needs {used:.0f} KiB of shared memory, "
                               f"sm_{_target} has {TARGETS[_target]}")


def _stack_bytes(binary):
    """Bytes of stack per thread: registers that did not suffice and went to memory."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        output = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    return max(int(x) for x in re.findall(r"STACK:(\d+)", output.stdout + output.stderr))


def compile_all(widths=PAPER_WIDTHS, targets=TARGETS, dtype=torch.bfloat16):
    """Compiles every kernel at every head width without a device; prints the memory it uses.

    Calls the same functions that launch the kernels, on tensors without storage (device "meta").
    """
    global _target
    meta = lambda *shape, dtype=torch.float32: torch.empty(shape, device="meta", dtype=dtype)
    for _target in targets:
        for K in widths:
            before = len(_compiled)
            for B, H, T in ((1, 1, 1), (4, 4, 150), (4, 4, 8192)):
                q, gate = meta(B, T, H, K, dtype=dtype), meta(B, H, T)
                C, n, m = meta(B, H, K, K), meta(B, H, K), meta(B, H)
                for fresh, final in ((True, False), (False, True)):
                    h, *_, = out = mlstm_forward(q, q, q, gate, gate, C, n, m, fresh, final, True)
                    mlstm_backward(q, q, q, gate, gate, h, *out[4:], q, C, n, fresh, final)
            for T in (1, 3, 8):
                q, gate = meta(1, T, 4, K, dtype=dtype), meta(1, 4, T)
                step_forward(q, q, q, gate, gate, *(x[:1] for x in (C, n, m)), C[:1])
            dh, E, N = K // 2, 4 * K, 16            # an sLSTM head and a Mamba block of that model
            for T in (1, 150):
                R, y = meta(4, 4, dh, dh, dtype=dtype), meta(4, 4, dh)
                for save in (False, True):
                    y_t, last, S, raw = slstm_forward(meta(4, T, 4, 4, dh, dtype=dtype), R,
                                                      y, y, y, y, save)
                slstm_backward(y_t, last, R, S, raw)
                u, B = meta(4, T, E, dtype=dtype), meta(4, T, N, dtype=dtype)
                inputs = u, meta(4, T, E), meta(E, N), B, B, meta(E)
                for save in (False, True):
                    u_t, last, saved = scan_forward(*inputs, meta(4, E, N), save)
                scan_backward(*inputs, saved, u_t, last)
            print(f"sm_{_target}  head width {K:>4}: {len(_compiled) - before} new binaries",
                  flush=True)
    for name in sorted({key[0] for key in _compiled}):
        shared, stack, narrow = zip(*(x for key, x in _compiled.items() if key[0] == name))
        print(f"{name:<24}{len(shared):>4} binaries, shared memory {min(shared):.0f} to "
              f"{max(shared):.0f} KiB, at most {max(stack)} bytes of stack and {max(narrow)} loads "
              "of 2 bytes a thread")


def _self_check():
    import mamba
    import mlstm
    import slstm
    device = "cpu" if INTERPRETED else "cuda"
    where = "interpreted on a CPU" if INTERPRETED else torch.cuda.get_device_name()
    print(f"largest error relative to the float64 recurrence, float32, {where}")
    print(f"{'kernel':<26}{'shape':<24}{'output':>10}{'state':>10}{'gradients':>11}  launches")
    torch.manual_seed(0)
    normal = lambda *shape: torch.randn(shape, device=device, dtype=torch.float64)
    sequence = lambda B, H, T, K, V: [normal(B, H, T, K), normal(B, H, T, K), normal(B, H, T, V),
                                      normal(B, H, T), normal(B, H, T) + 4, normal(B, H, K, V),
                                      normal(B, H, K), normal(B, H)]
    gates = lambda B, T, H, dh: [normal(B, T, 4, H, dh), normal(4, H, dh, dh) * dh ** -0.5,
                                 normal(B, H, dh), normal(B, H, dh), 1 + normal(B, H, dh).abs(),
                                 normal(B, H, dh)]
    scan = lambda B, T, E, N: [normal(B, T, E), normal(B, T, E).exp() / 8, -N * normal(E, N).abs(),
                               normal(B, T, N), normal(B, T, N), normal(E), normal(B, E, N)]
    step = mlstm_step_triton, mlstm.mlstm_recurrent, sequence, 5
    chunks = mlstm_chunkwise_triton, mlstm.mlstm_recurrent, sequence, 5
    loop = slstm_scan_triton, slstm.slstm_recurrent, gates, 2
    tree = selective_scan_triton, mamba.selective_scan_recurrent, scan, 6
    for (cell, truth, make, first), shape in (
            (step, (2, 3, 3, 48, 80)), (chunks, (2, 3, 3, 48, 80)), (chunks, (2, 3, 150, 48, 80)),
            (chunks, (1, 1, 700, 48, 80)), (loop, (5, 3, 2, 45)), (loop, (5, 65, 2, 45)),
            (tree, (3, 3, 40, 16)), (tree, (3, 65, 40, 16))):
        inputs, results = make(*shape), []
        for form, dtype in ((truth, torch.float64), (cell, torch.float32)):
            leaves = [x.detach().to(dtype).requires_grad_(cell is not mlstm_step_triton)
                      for x in inputs]
            LAUNCHES.clear()
            out, state = form(*leaves[:first], leaves[first] if cell is selective_scan_triton else
                              (*leaves[first:-1], leaves[-1].detach()))
            state = state if isinstance(state, tuple) else (state,)
            gradients = ()
            if out.requires_grad:
                wanted = leaves if cell is selective_scan_triton else leaves[:-1]
                gradients = torch.autograd.grad(out.sin().sum() + state[0].sin().sum(), wanted)
            results.append((out, state, gradients))
        error = lambda a, b: max((mlstm.relative_error(x, y) for x, y in zip(a, b)), default=0.0)
        (out, state, gradients), ours = results
        errors = (error(ours[0:1], (out,)), error(ours[1], state), error(ours[2], gradients))
        print(f"{cell.__name__:<26}{str(shape):<24}{errors[0]:>10.1e}{errors[1]:>10.1e}"
              + (f"{errors[2]:>11.1e}" if gradients else f"{'-':>11}")
              + f"  {sum(LAUNCHES.values())}", flush=True)
        assert max(errors) < 1e-4, errors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Check the kernels, or compile all of them.")
    parser.add_argument("--compile-all", action="store_true",
                        help="compile for sm_80 and sm_90 at the paper's widths; needs no GPU")
    if parser.parse_args().compile_all:
        compile_all()
    elif INTERPRETED or torch.cuda.is_available():
        _self_check()
    else:
        os.execve(sys.executable, [sys.executable, *sys.argv],
                  {**os.environ, "TRITON_INTERPRET": "1"})
