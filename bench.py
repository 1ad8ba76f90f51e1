"""Benchmarks: milliseconds per environment step on this CPU; speed of the kernels on a GPU.

    python bench.py                                 # acting: every backbone, plain and compiled
    python bench.py --size 16m --weights int8       # a size of the paper; compiles for minutes
    python bench.py --kernels                       # every table below, on an NVIDIA GPU
    python bench.py --kernels --output kernels.json # and the numbers
    TRITON_INTERPRET=1 python bench.py --kernels --quick    # toy shapes on a CPU: that it runs

Acting: one environment, random weights and observations, one step is observation in, logits out (3
tokens), the state carried on; compiled is lram.FastPolicy, compared with the plain model before it
is timed. The floor is the time to copy weights and state once in this memory. A step misses the
deadline of a control rate if it takes longer than the period.

Kernels: every row is timed in the same run, on the same inputs, after its result has been compared
with the float32 reference; medians after warm-up, caches flushed between runs
(triton.testing.do_bench). The two ceilings are measured first: bytes per second of a large copy,
and the rate of a large matrix product. A row's share is (bytes or operations that the shape needs)
/ time / ceiling:

    sequences   (T + 1) (K + V) operations per head and token, all causal pairs, or 4 K V + (L + 64)
                (K + V) in chunks of L if that is less (kernels.chunk_length); backward twice that
    steps       8 K V bytes per head: C is read once and written once
    sLSTM       the bytes of gates and output, three times with the backward pass
    Mamba       the bytes of u, dt and y, three times with the backward pass

Public peers (`pip install --no-deps mlstm-kernels==2.0.6`, mamba-ssm) are measured where installed.
They take T in multiples of 64 and are given zero-padded inputs where T is none. What refuses a
shape or fails is named with its reason.

Not included: simulators' own time, batches of environments, GPUs for acting.
"""
import importlib
import json
import os
import platform
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

import mamba
import mlstm
import slstm

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass
class Args:
    """Measure, print, and write what was measured."""
    size: str = "tiny"
    """Size of the models that act: tiny, 16m, 48m, 110m, 206m, ..."""
    backbones: tuple[str, ...] = ("mlstm", "xlstm", "slstm", "mamba", "gpt")
    """Backbones that act."""
    weights: Literal["float32", "bfloat16", "int8"] = "float32"
    """Storage of the weights of the compiled policy."""
    steps: int = 500
    """Environment steps that are timed, after 20 to warm up."""
    threads: int = 1
    """Threads of the CPU."""
    kernels: bool = False
    """Kernels of kernels.py against PyTorch and the public kernels; needs an NVIDIA GPU."""
    quick: bool = False
    """One toy shape of each kind: shows that everything runs, not how fast it is."""
    output: Path | None = None
    """Write the rows as JSON here."""


def milliseconds(function, graph=False):
    """Median time of a call after warm-up; graph: in a CUDA graph, without launch overhead."""
    if INTERPRETED:
        started = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - started)
    from triton.testing import do_bench, do_bench_cudagraph
    if graph:
        return do_bench_cudagraph(function, rep=50, return_mode="median")
    return do_bench(function, warmup=50, rep=200, return_mode="median")


def ceilings(device):
    """(bytes per second of a copy, operations per second of a bfloat16 matrix product)."""
    size = 2 ** (18 if INTERPRETED else 30)
    a, b = torch.empty(2, size, dtype=torch.uint8, device=device)
    width = 256 if INTERPRETED else 8192
    x, y = torch.randn(2, width, width, device=device, dtype=torch.bfloat16)
    return (2e3 * size / milliseconds(lambda: b.copy_(a)),
            2e3 * width ** 3 / milliseconds(lambda: x @ y))


def optional(module, name):
    """An attribute of a module that may not be installed; None then."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception:           # a peer may also fail while it is imported
        return None


class Table:
    """Rows that are printed as they are measured, and kept."""

    def __init__(self, device):
        self.device, self.rows = device, []
        self.bandwidth, self.rate = ceilings(device)
        print(f"measured ceilings: copy {self.bandwidth / 1e9:,.0f} GB/s, bfloat16 matrix product "
              f"{self.rate / 1e12:,.1f} TFLOP/s")

    def section(self, title, columns):
        """A heading."""
        self.title = title
        print(f"\n{title}\n{'':<34}" + "".join(f"{c:>14}" for c in columns), flush=True)

    def row(self, name, shape, form, inputs, truth, operations=0, moved=0, backward=True,
            graph=False, calls=1):
        """Compare form(*inputs) with truth, then time it, forward and with its gradient.

        calls: how many the form makes inside, whose mean time counts.
        """
        row = {"table": self.title, "name": name, "shape": shape}
        self.rows.append(row)
        try:
            out = form(*inputs)
            row["error"] = ((out.float() - truth).norm() / truth.norm()).item()
            row["forward_ms"] = milliseconds(partial(form, *inputs), graph) / calls
            if backward:
                leaves = [x.detach().requires_grad_() for x in inputs]
                gradient = torch.randn_like(out)
                row["both_ms"] = milliseconds(
                    lambda: torch.autograd.grad(form(*leaves), leaves, gradient))
        except Exception as error:      # out of memory, or a peer that refuses the shape
            row["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:60]}" \
                if str(error).strip() else type(error).__name__
            print(f"  {name:<32}{row['failed']}", flush=True)
            return
        ms, times = row.get("both_ms", row["forward_ms"]), 3 if backward else 1
        row["share"] = max(operations / self.rate, moved / self.bandwidth) * times * 1e3 / ms
        both = f"{row['both_ms']:>14.3f}" if backward else ""
        print(f"  {name:<32}{row['forward_ms']:>14.3f}{both}{row['share']:>14.1%}"
              f"{row['error']:>14.1e}", flush=True)


def mlstm_operations(B, H, T, K, V):
    """Operations of the forward pass that the shape needs, by the better of the two algorithms."""
    from kernels import chunk_length
    L = chunk_length(T, K, V)
    pairs, chunks = (T + 1) * (K + V), 4 * K * V + (L + 64) * (K + V)
    return B * H * T * (pairs if L >= T else min(pairs, chunks))


def padded(kernel):
    """A public kernel on T rounded up to 64: zeros with closed input gates behind the sequence."""
    def form(q, k, v, i, f):
        T, extra = q.shape[2], -q.shape[2] % 64
        if extra:
            q, k, v = (F.pad(x, (0, 0, 0, extra)) for x in (q, k, v))
            i, f = F.pad(i, (0, extra), value=-30.0), F.pad(f, (0, extra))
        return kernel(q, k, v, i, f)[:, :, :T]
    return form


def mlstm_rows(table, shapes, dtype):
    """mLSTM sequences, forward and backward."""
    import kernels
    public, columns = optional("mlstm_kernels.torch", "get_mlstm_kernel"), \
        ("forward ms", "+ backward", "of ceiling", "error")
    forms = {"PyTorch (mlstm.py)": lambda *a: mlstm.mlstm_chunkwise(*a, final_state=False)[0]}
    if not INTERPRETED:
        forms["PyTorch, torch.compile"] = torch.compile(forms["PyTorch (mlstm.py)"], dynamic=False)
    forms["kernels.py"] = lambda *a: kernels.mlstm_chunkwise_triton(*a, final_state=False)[0]
    if public and not INTERPRETED:
        for name, chunk in (("xl_chunk", 128), ("limit_chunk", 64)):
            forms[f"mlstm-kernels {name}"] = padded(partial(
                public(f"chunkwise--triton_{name}"), chunk_size=chunk,
                autocast_kernel_dtype=dtype))
    attention = partial(F.scaled_dot_product_attention, is_causal=True)
    for B, H, T, K, V in shapes:
        table.section(f"mLSTM, B {B}, H {H}, T {T}, K {K}, V {V}, {str(dtype)[6:]}", columns)
        # the block's own layout: heads behind tokens in memory
        q, k, v = (torch.randn(B, T, H, n, device=table.device, dtype=dtype).transpose(1, 2)
                   for n in (K, K, V))
        i, f = torch.randn(2, B, H, T, device=table.device)
        inputs = q, k, v, i, f + 4
        with torch.no_grad():
            truth = mlstm.mlstm_chunkwise(*(x.float() for x in inputs), final_state=False)[0]
        for name, form in forms.items():
            table.row(name, (B, H, T, K, V), form, inputs, truth, mlstm_operations(B, H, T, K, V))
        with torch.no_grad():
            truth = attention(*(x.float() for x in inputs[:3]))
        table.row("FlashAttention (no mLSTM)", (B, H, T, K, V), attention, inputs[:3], truth,
                  mlstm_operations(B, H, T, K, V))


def step_rows(table, shapes, dtype):
    """mLSTM steps inside a CUDA graph: one environment step is 3 tokens."""
    import kernels
    public = optional("mlstm_kernels.torch", "get_mlstm_step_kernel")
    for B, H, T, K in shapes:
        table.section(f"mLSTM step, B {B}, H {H}, {T} tokens, K = V = {K}, {str(dtype)[6:]}",
                      ("ms", "of ceiling", "error"))
        make = lambda *shape: torch.randn(shape, device=table.device)
        inputs = [*(make(B, T, H, K).to(dtype).transpose(1, 2) for _ in range(3)),
                  make(B, H, T), make(B, H, T) + 4, make(B, H, K, K), make(B, H, K),
                  torch.zeros(B, H, device=table.device)]
        state = lambda a: (*a[:5], tuple(a[5:]))
        truth = mlstm.mlstm_recurrent(*state([x.float() for x in inputs]))[0]
        forms = {"PyTorch (mlstm.py)": lambda *a: mlstm.mlstm_chunkwise(*state(a))[0],
                 "kernels.py": lambda *a: kernels.mlstm_step_triton(*state(a))[0],
                 "kernels.py, C in place": lambda *a: kernels.mlstm_step_triton(
                     *state(a), in_place=True)[0]}
        if public and not INTERPRETED:
            step = public("triton")

            def tokens(q, k, v, i, f, C, n, m):
                h = []
                for t in range(T):
                    out, (C, n, m) = step(q[:, :, t], k[:, :, t], v[:, :, t], i[:, :, t:t + 1],
                                          f[:, :, t:t + 1], C, n, m)
                    h.append(out)
                return torch.stack(h, 2)
            forms["mlstm-kernels step, per token"] = lambda *a: tokens(*a[:7], a[7][..., None])
        if T <= 4:      # four calls: three that leave C alone and one that writes it
            waiting = kernels.mlstm_waiting(B, H, K, K, 4 * T, table.device, dtype)

            def lazy(*a):
                (*a, memory), used, first = state(a), 0, None
                for _ in range(4):
                    h, memory, used = kernels.mlstm_lazy_step_triton(*a, memory, waiting, used)
                    first = h if first is None else first
                return first
            forms["kernels.py, lazy, C in place"] = lazy
        for name, form in forms.items():
            given = [x.clone() for x in inputs] if "in place" in name else inputs
            with torch.no_grad():
                table.row(name, (B, H, T, K), form, given, truth, moved=8 * B * H * K * K,
                          backward=False, graph=True, calls=4 if "lazy" in name else 1)


def stepwise(T, *inputs):
    """sLSTM with the other rule: the columns of a head spread over programs, a launch per token."""
    import kernels
    rule, kernels.STEPWISE = kernels.STEPWISE, T
    try:
        return kernels.slstm_scan_triton(*inputs)[0]
    finally:
        kernels.STEPWISE = rule


def slstm_rows(table, shapes, dtype):
    """sLSTM sequences, forward and backward."""
    import kernels
    for B, H, T, dh in shapes:
        table.section(f"sLSTM, B {B}, H {H}, T {T}, dh {dh}, {str(dtype)[6:]}",
                      ("forward ms", "+ backward", "of ceiling", "error"))
        gates = torch.randn(B, T, 4, H, dh, device=table.device, dtype=dtype)
        R = torch.randn(4, H, dh, dh, device=table.device, dtype=dtype) * dh ** -0.5
        truth = slstm.slstm_scan(gates.float(), R.float())[0]
        for name, form in (("PyTorch (slstm.py)", lambda *a: slstm.slstm_scan(*a)[0]),
                           ("kernels.py", lambda *a: kernels.slstm_scan_triton(*a)[0]),
                           ("kernels.py, a launch per token", partial(stepwise, T))):
            table.row(name, (B, H, T, dh), form, (gates, R), truth,
                      moved=5 * gates[:, :, 0].numel() * dtype.itemsize)


def mamba_rows(table, shapes, dtype):
    """Mamba's selective scan, forward and backward."""
    import kernels
    public = optional("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    for B, T, E in shapes:
        table.section(f"Mamba scan, B {B}, T {T}, E {E}, {str(dtype)[6:]}",
                      ("forward ms", "+ backward", "of ceiling", "error"))
        make = lambda *shape, dtype=dtype: torch.randn(shape, device=table.device, dtype=dtype)
        inputs = [make(B, T, E), F.softplus(make(B, T, E, dtype=torch.float32) - 3),
                  -torch.rand(E, 16, device=table.device) * 16, make(B, T, 16), make(B, T, 16),
                  make(E, dtype=torch.float32)]
        truth = mamba.selective_scan_parallel(*(x.float() for x in inputs))[0]
        forms = {"PyTorch (mamba.py)": lambda *a: mamba.selective_scan(*a)[0],
                 "kernels.py": lambda *a: kernels.selective_scan_triton(*a)[0]}
        if public and not INTERPRETED:
            last = lambda *xs: [x.transpose(1, 2) for x in xs]
            forms["mamba-ssm"] = lambda u, dt, A, B, C, D: public(
                *last(u, dt.to(u.dtype)), A, *last(B, C), D).transpose(1, 2)
        for name, form in forms.items():
            table.row(name, (B, T, E), form, inputs, truth,
                      moved=B * T * E * (2 * dtype.itemsize + 4))


def kernel_tables(quick):
    """All tables of --kernels -> the rows."""
    device = "cpu" if INTERPRETED else "cuda"
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    name = "a CPU, kernels interpreted: times mean nothing" if INTERPRETED else \
        torch.cuda.get_device_name()
    print(f"{name}; torch {torch.__version__}")
    torch.manual_seed(0)
    table = Table(device)
    if quick:
        mlstm_rows(table, [(2, 2, 70, 32, 32)], dtype)
        step_rows(table, [(1, 2, 3, 32)], dtype)
        slstm_rows(table, [(2, 2, 6, 32)], dtype)
        mamba_rows(table, [(2, 9, 32)], dtype)
        return table.rows
    # LRAM's own windows, then 65,536 tokens of a language model's heads
    mlstm_rows(table, [(128, 4, 150, K, K) for K in (256, 384, 512, 640)], dtype)
    mlstm_rows(table, [(65536 // T, 16, T, 128, 256) for T in (2048, 8192, 32768, 65536)], dtype)
    step_rows(table, [(B, 4, T, K) for B, T, K in (
        (1, 1, 640), (1, 3, 256), (1, 3, 640), (1, 3, 896), (1, 8, 640), (16, 3, 640),
        (128, 3, 640))], dtype)
    slstm_rows(table, [(128, 4, 150, dh) for dh in (128, 266, 320)] + [(1, 4, 3, 320)], dtype)
    mamba_rows(table, [(128, 150, E) for E in (1024, 2560)] + [(1, 3, 2560)], dtype)
    ours = [r for r in table.rows if r["name"] == "kernels.py" and "both_ms" in r]
    for row in ours:
        rivals = [r["both_ms"] for r in table.rows if r["table"] == row["table"]
                  and r["name"].startswith(("mlstm-kernels", "mamba-ssm")) and "both_ms" in r]
        if rivals:
            row["times_best_public"] = min(rivals) / row["both_ms"]
    ratios = [r["times_best_public"] for r in ours if "times_best_public" in r]
    if ratios:
        print(f"\nforward and backward against the best public kernel: {min(ratios):.2f} to "
              f"{max(ratios):.2f} times as fast, median {statistics.median(ratios):.2f}")
    return table.rows


# ------------------------------------------------------------------------------------------ acting
def act_times(policy, steps, context):
    """Milliseconds of every step of one environment; gpt starts afresh when its context is full."""
    obs, scalar, state, times = torch.randn(steps + 20, 1, 39), torch.ones(1), None, []
    with torch.no_grad():
        for t in range(steps + 20):
            state = None if context and t % context == 0 else state
            started = time.perf_counter()
            _, state = policy.act(obs[t], scalar, scalar, 4, state=state)
            times.append(1e3 * (time.perf_counter() - started))
    return np.array(times[20:])


def latency(args):
    """The table of acting; its last line is one JSON object."""
    from lram import LRAM, Config, FastPolicy, count_parameters, state_bytes
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    source, target = torch.empty(2, 2 ** 28, dtype=torch.uint8)
    copies = []
    for _ in range(7):
        started = time.perf_counter()
        target.copy_(source)
        copies.append(2 ** 28 / (time.perf_counter() - started))
    bandwidth = statistics.median(copies)
    print(f"{platform.processor() or platform.machine()}, {args.threads} of {os.cpu_count()} "
          f"threads, load {os.getloadavg()[0]:.1f}; torch {torch.__version__}; copies "
          f"{bandwidth / 1e9:.1f} GB a second; {args.size}, {args.steps} steps")
    print(f"{'milliseconds per step':<24}{'floor':>8}{'median':>8}{'p95':>8}{'p99':>8}{'max':>8}"
          f"{'> 20 ms':>9}{'> 10 ms':>9}{'> 5 ms':>9}")
    rows = []
    for name in args.backbones:
        try:
            model = LRAM(Config(name, args.size)).eval()
            fast = FastPolicy(model, args.weights)
        except ValueError as error:
            raise SystemExit(str(error)) from None
        bytes_per_weight = {"float32": 4, "bfloat16": 2, "int8": 1}[args.weights]
        state = state_bytes(model.backbone.initial_state(1))
        weights = count_parameters(model.backbone)
        context = model.config.context if name == "gpt" else 0
        for label, policy, size in (("plain", model, 4), (args.weights, fast, bytes_per_weight)):
            times = act_times(policy, args.steps, context)
            row = dict(backbone=name, policy=label, weight_bytes=weights * size, state_bytes=state,
                       floor_ms=1e3 * (weights * size + state) / bandwidth,
                       median_ms=float(np.median(times)), max_ms=float(times.max()),
                       p95_ms=float(np.percentile(times, 95)),
                       p99_ms=float(np.percentile(times, 99)),
                       missed={hz: int((times > 1e3 / hz).sum()) for hz in (50, 100, 200)})
            rows.append(row)
            print(f"{name + ', ' + label:<24}{row['floor_ms']:>8.2f}{row['median_ms']:>8.2f}"
                  f"{row['p95_ms']:>8.2f}{row['p99_ms']:>8.2f}{row['max_ms']:>8.2f}"
                  + "".join(f"{n:>9}" for n in row["missed"].values()), flush=True)
        rows[-1]["compile_seconds"] = fast.compile_seconds
    print(f"compiling took {', '.join(str(round(r['compile_seconds'])) for r in rows[1::2])} s; "
          f"load at the end {os.getloadavg()[0]:.1f}")
    print(json.dumps({"size": args.size, "threads": args.threads, "bandwidth": bandwidth,
                      "rows": rows}))
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1))


def main(args):
    """See the opening of this file."""
    if not args.kernels:
        return latency(args)
    if not (torch.cuda.is_available() or INTERPRETED):
        print("--kernels: no CUDA GPU found, so no kernel's speed can be measured here. What can "
              "be shown without one:\n"
              "    python -m pytest -q test_all.py -k kernel      values and gradients\n"
              "    python kernels.py --compile-all                compilation for sm_80 and sm_90")
        return
    rows = kernel_tables(args.quick)
    failed = [row for row in rows if "failed" in row and row["name"] == "kernels.py"]
    print(json.dumps({"rows": len(rows), "failed": len(failed)}))
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1))
        print(f"wrote {args.output}")


if __name__ == "__main__":
    import tyro
    main(tyro.cli(Args, description=__doc__))
