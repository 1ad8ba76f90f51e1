"""Everything that is measured: milliseconds of acting and of kernels, and the paper's claims.

    python bench.py                                 # a step of every backbone, plain and compiled
    python bench.py --size 16m --threads 2          # a size of the paper; compiles for minutes
    python bench.py --latency                       # against the context: 50 to 25,600 steps
    python bench.py --throughput                    # against the batch
    python bench.py --memory --size 206m            # bytes of state against the context
    python bench.py --ladder                        # what each trick buys
    python bench.py --heads                         # 4 to 32 heads at constant width
    python bench.py --env atari/freeway             # in a simulator, its time included
    python bench.py --windows                       # the data side against what training takes
    python bench.py --draw latency.json ladder.json --output speed.png
    python bench.py --kernels                       # kernels.py beside PyTorch and public kernels
    python bench.py --claim C5                      # a claim of the paper: trains, scores, judges
    python bench.py --claim all --report            # judges what has been trained
    python bench.py --readme                        # README's tables from figures/results.json

The last line of a measurement is one JSON object; --output writes it to a file too.

Acting: random weights and observations; a step is observation in, action out: one chunk of 3
tokens through the carried state, and the argmax of the head's logits. "plain" is the model as it
is trained, "float32", "bfloat16" or "int8" is lram.FastPolicy with its weights so stored, compared
with plain PyTorch when it compiles (--ladder prints the difference from "plain"). Every
row has its own warm-up, which is dropped, then --steps steps or --seconds seconds (--env: --steps),
back to back; compile time is told apart. A step
misses the deadline of a control rate if it takes longer than the period. The floor is the time in
which this memory, at the rate measured first (bytes read and written per second of a large copy),
can read the weights once and read and write the state once. What other programs did to the cores
meanwhile is measured and told. gpt acts with a static cache and scaled_dot_product_attention, and
starts afresh when its C = 50 steps are full. Public peers (xlstm, mambapy, transformers), where
installed, carry the same weights, and are timed on their backbone alone, after their outputs have
been compared with ours:

    pip install --no-deps xlstm==2.0.6 mlstm-kernels==2.0.6 mambapy==1.2.0
    pip install einops omegaconf dacite transformers==5.23.0

Kernels: every row is timed in the same run, on the same inputs, after its result has been compared
with the float32 reference; medians after warm-up, the L2 cache cleared between runs
(triton.testing.do_bench). Steps are timed in a CUDA graph, which clears nothing: they take copies
of their inputs in turn, 256 MB of them. The two ceilings are measured first: bytes per second of a
large copy, and the rate of a large matrix product. A row's share is (bytes or operations that the
shape needs) / time / ceiling:

    sequences   (T + 1) (K + V) operations per head and token, all causal pairs, or 4 K V + (L + 64)
                (K + V) in chunks of L if that is less (kernels.chunk_length), or the bytes of q, k,
                v and h if they take longer; three times with the backward pass
    steps       8 K V bytes per head: C is read once and written once
    sLSTM       the bytes of gates and output, three times with the backward pass
    Mamba       the bytes of u, dt and y, three times with the backward pass

Public peers (`pip install --no-deps mlstm-kernels==2.0.6`, mamba-ssm) are measured where installed.
They take T in multiples of 64 and are given zero-padded inputs where T is none. What refuses a
shape or fails is named with its reason. TRITON_INTERPRET=1 python bench.py --kernels --quick runs
toy shapes on a CPU: it shows that everything runs, not how fast.

Claims: each is a set of runs of train.py and eval.py, kept in runs/claims/ and made once; protocol
and rule of decision stand above the claims' functions below. What was measured is kept in
figures/results.json with command, commit, machine, date and seeds; the pictures lie beside it.
"""
import gc
import importlib
import itertools
import json
import os
import math
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import mamba
import mlstm
import slstm
from lram import (BACKBONES, INDUCTOR, LRAM, SIZES, Backbone, Config, FastPolicy, bin_to_action,
                  choose_device, count_parameters, state_bytes, use_kernels)
from mlstm import relative_error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RATES = (50, 100, 200)                  # control rates in Hz
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}       # of a weight


@dataclass
class Args:
    """Measure, print, and write what was measured."""
    latency: bool = False
    """Latency and state against the context, batches of 1 and 16."""
    throughput: bool = False
    """Environment steps per second against the batch."""
    memory: bool = False
    """Bytes of state against the context; nothing is timed."""
    ladder: bool = False
    """Token by token, three at once, compiled, FastPolicy, smaller weights; on a GPU kernels."""
    heads: bool = False
    """mLSTM with 4 to 32 heads at constant width."""
    env: str | None = None
    """Act in this task, for instance atari/freeway, the simulator's time included."""
    windows: bool = False
    """Windows per second of the data side beside what training takes."""
    trajectories: int = 0
    """Make a synthetic data set of so many files: seconds to index it, memory while it is read."""
    claim: tuple[str, ...] = ()
    """Measure claims of the paper, C1 to C10 or all: trains what is missing, goes on where it was
    interrupted, and writes figures/results.json and pictures."""
    jobs: int = os.cpu_count() or 1
    """--claim: runs made side by side, on their share of the cores each."""
    report: bool = False
    """--claim: judge the runs that are there, make none."""
    record: tuple[str, ...] = ()
    """Write whole runs into figures/results.json: a name, then their scores.json files."""
    readme: bool = False
    """Write README's tables from figures/results.json."""
    kernels: bool = False
    """Kernels of kernels.py against PyTorch and the public kernels; needs an NVIDIA GPU."""
    draw: tuple[Path, ...] = ()
    """Draw what --latency and --ladder wrote with --output, instead of measuring."""
    size: str = "tiny"
    """Size of the models that act: tiny, 16m, 48m, 110m, 206m, ..., 206m-half."""
    backbones: tuple[str, ...] = ()
    """Backbones that act; by default those that the mode is about."""
    weights: Literal["float32", "bfloat16", "int8"] = "float32"
    """Storage of the weights of the compiled policy."""
    batches: tuple[int, ...] = ()
    """Environments at once; by default those of the mode (--latency: 1 16)."""
    contexts: tuple[int, ...] = (50, 200, 800, 1600, 6400, 25600)
    """Contexts in environment steps."""
    steps: int | None = None
    """Steps that are timed in a row; 2000, with --env 8192."""
    seconds: float = 20.0
    """A row ends after this time even if not all steps are done."""
    threads: int = 1
    """Threads of the CPU."""
    device: str = "cpu"
    """cpu, cuda or auto."""
    peers: Literal["no", "yes", "compiled"] = "yes"
    """Measure the public packages that are installed, too; compiled: also compiled as ours are."""
    data: Path = Path("datasets")
    """Data for --windows."""
    quick: bool = False
    """--kernels: one toy shape of each kind, to see that everything runs."""
    output: Path | None = None
    """Write the result as JSON here; with --draw, the picture."""


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
            graph=False):
        """Compare form(*inputs) with truth, then time it, forward and with its gradient."""
        row = {"table": self.title, "name": name, "shape": shape}
        self.rows.append(row)
        try:
            out = form(*inputs)
            row["error"] = ((out.float() - truth).norm() / truth.norm()).item()
            copies = itertools.repeat(inputs)
            if graph and not INTERPRETED:
                size = sum(x.numel() * x.element_size() for x in inputs)
                copies = itertools.cycle([[x.clone() for x in inputs]
                                          for _ in range(1 + 2 ** 28 // size)])
            row["forward_ms"] = milliseconds(lambda: form(*next(copies)), graph)
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
        inputs, moved = (q, k, v, i, f + 4), 2 * B * H * T * (K + V) * dtype.itemsize
        with torch.no_grad():
            truth = mlstm.mlstm_chunkwise(*(x.float() for x in inputs), final_state=False)[0]
        for name, form in forms.items():
            table.row(name, (B, H, T, K, V), form, inputs, truth,
                      mlstm_operations(B, H, T, K, V), moved)
        with torch.no_grad():
            truth = attention(*(x.float() for x in inputs[:3]))
        table.row("FlashAttention (no mLSTM)", (B, H, T, K, V), attention, inputs[:3], truth,
                  mlstm_operations(B, H, T, K, V), moved)


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
        for name, form in forms.items():
            given = [x.clone() for x in inputs] if "in place" in name else inputs
            with torch.no_grad():
                table.row(name, (B, H, T, K), form, given, truth, moved=8 * B * H * K * K,
                          backward=False, graph=True)


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


def kernels_main(args):
    """--kernels."""
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


# ------------------------------------------------------------------------------------- the machine
BUSY = 0.2          # cores kept busy by other programs, beyond which times are too long


def busy_jiffies():
    """Jiffies of all cores that were not idle since boot; None where Linux does not tell."""
    try:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]]
    except OSError:
        return None
    return sum(fields) - fields[3] - fields[4]


class Machine:
    """The ceilings of this machine, measured first, and what else ran on it meanwhile."""

    def __init__(self, device, threads):
        if device.type == "cpu":
            torch.set_num_threads(threads)
        self.device, self.threads = device, threads
        self.name = torch.cuda.get_device_name() if device.type == "cuda" else \
            f"{cpu_name()}, {threads} of {os.cpu_count()} threads"
        self.started, self.jiffies, self.own = time.time(), busy_jiffies(), sum(os.times()[:4])
        source, target = torch.ones(2, 2 ** 28, dtype=torch.uint8, device=device)
        x, y = torch.randn(2, 2048, 2048, device=device)
        # bytes read and written per second, operations per second of a float32 matrix product
        self.bandwidth = 2 ** 29 / self._seconds(lambda: target.copy_(source))
        self.rate = 2 * 2048 ** 3 / self._seconds(lambda: x @ y)

    def _seconds(self, function):
        times = []
        for _ in range(9):
            self.wait()
            started = time.perf_counter()
            function()
            self.wait()
            times.append(time.perf_counter() - started)
        return min(times)

    def wait(self):
        """Until the GPU is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def floor(self, name, weight_bytes, state):
        """Milliseconds in which this memory can read the weights and read and write the state.

        gpt writes no more of its cache than the new tokens.
        """
        return 1e3 * (weight_bytes + (1 if name == "gpt" else 2) * state) / self.bandwidth

    def others(self):
        """Cores that other programs kept busy since the start, None if unknown."""
        if self.jiffies is None:
            return None
        busy = (busy_jiffies() - self.jiffies) / os.sysconf("SC_CLK_TCK")
        return max(0.0, busy - (sum(os.times()[:4]) - self.own)) / (time.time() - self.started)

    def finish(self, args, rows, title):
        """Warn of a busy machine; print the result as one line of JSON, write it and its picture.
        """
        others = self.others()
        if others is not None and others > BUSY:
            print(f"WARNING: other programs kept {others:.1f} cores busy: these times are too long")
        result = {"mode": title, "arguments": sys.argv[1:], "commit": commit(),
                  "size": args.size, "machine": self.name, "threads": self.threads,
                  "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
                  "bandwidth": self.bandwidth, "rate": self.rate, "others": others, "rows": rows}
        print(json.dumps(result))
        if args.output:
            from data import write_json
            write_json(args.output, result)


def cpu_name():
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def show_card(machine, args):
    """What is measured, on what: parameters, bytes, ceilings."""
    print(f"{machine.name}; torch {torch.__version__}; memory {machine.bandwidth / 1e9:.0f} GB a "
          f"second read and written, float32 products {machine.rate / 1e9:,.0f} GFLOP a second")
    print(f"{args.size + ', ' + args.weights:<18}{'parameters':>14}{'weights MB':>12}"
          f"{'state MB':>10}{'floor ms':>10}   state at 25,600 steps of context")
    for name in args.backbones:
        config, long = Config(name, args.size), Config(name, args.size, context=25600)
        with torch.device("meta"):
            model = LRAM(config)
            state, at_length = (state_bytes(Backbone(c).initial_state(1, "meta"))
                                for c in (config, long))
        weights = weight_bytes(model, args.weights)
        print(f"{name:<18}{count_parameters(model):>14,}{weights / 1e6:>12.1f}{state / 1e6:>10.2f}"
              f"{machine.floor(name, weights, state):>10.2f}   {at_length / 1e6:,.1f} MB")


def weight_bytes(model, weights):
    """Bytes of the weights that one step reads: backbone, and the head of 4 dimensions."""
    backbone = count_parameters(model.backbone)
    if model.config.backbone == "gpt":      # of the positions' table it reads a few rows
        backbone -= model.backbone.blocks[0].embedding.weight.numel()
    return BYTES[weights] * (backbone + 1024 * model.config.dim)


# ------------------------------------------------------------------------------------- public peers
# Each takes an LRAM on the CPU and returns (name with version, step), or None where the package is
# missing. step(x, state): the tokens of one environment step, x (1, T, D) float32, and the state
# before (None: fresh) -> y (1, T, D) and the state after; the state that is given is used up. The
# weights are the model's own. compiled: as lram.FastPolicy is, which takes a minute or two.
def peers(model, args):
    """Public packages on the weights of a model, compared with it: [(label, act)]."""
    found = []
    make = {"gpt": peer_gpt, "mamba": peer_mamba}.get(model.config.backbone, peer_xlstm)
    for compiled in {"no": (), "yes": (False,), "compiled": (False, True)}[args.peers]:
        if args.device.type != "cpu":
            print("public packages are compared on a CPU only: no rows for them here")
            break
        try:
            name, step = make(model, compiled) or (None, None)
        except Exception as error:      # another version, or one that cannot be compiled
            print(f"{make.__name__}: {type(error).__name__}: {str(error).strip()[:90]}")
            continue
        if step is None:
            continue
        state = own = None
        with torch.no_grad():
            for x in torch.randn(8, 1, 3, model.config.dim):
                (y, state), (truth, own) = step(x, state), model.backbone(x, own)
                error = relative_error(y, truth)
                if not error < 1e-4:
                    raise SystemExit(f"{name} is off by {error:.0e}: not the same computation")
        x = torch.randn(1, 3, model.config.dim)
        found.append((name, lambda obs, scalar, state, step=step, x=x: step(x, state)))
    return found


def peer_xlstm(model, compiled=False):
    """The public xlstm package, backbones mlstm, xlstm and slstm. See the opening.

    Its step takes one token, and only "vanilla" of its sLSTM backends runs on a CPU.
    """
    if optional("xlstm", "xLSTMBlockStack") is None:
        return None
    import xlstm
    config = model.config
    stack = xlstm.xLSTMBlockStack(xlstm.xLSTMBlockStackConfig(
        mlstm_block=xlstm.mLSTMBlockConfig(mlstm=xlstm.mLSTMLayerConfig(
            conv1d_kernel_size=4, qkv_proj_blocksize=4, proj_factor=2.0, num_heads=config.heads)),
        slstm_block=xlstm.sLSTMBlockConfig(
            slstm=xlstm.sLSTMLayerConfig(backend="vanilla", num_heads=config.heads,
                                         conv1d_kernel_size=4),
            feedforward=xlstm.FeedForwardConfig(proj_factor=1.3, act_fn="gelu")),
        context_length=config.max_tokens, num_blocks=config.layers, embedding_dim=config.dim,
        slstm_at=list(config.slstm_at)))
    load_weights(stack, to_public_xlstm(model.backbone))
    for layer in config.slstm_at if compiled else ():
        stack.blocks[layer].xlstm.slstm_cell.pointwise = branchless_slstm

    def step(x, state):
        y = []
        for t in range(x.shape[1]):
            out, state = stack.step(x[:, t:t + 1], state)               # (B, 1, D)
            y.append(out)
        return torch.cat(y, dim=1), state
    return peer("xlstm", step, model, compiled)


def branchless_slstm(Wx, Ry, b, states, constants):
    """The sLSTM cell, in the place of the public package's own, which torch.compile gives up at: it
    asks `if` n is 0. Gates Wx, Ry (B, 4 D), b (4 D), states (4, B, D) -> states, gates (4, B, D).
    """
    i, f, z, o = (Wx + Ry + b).unflatten(-1, (4, -1)).unbind(1)         # (B, D) each
    _, c, n, m = states
    kept = F.logsigmoid(f) + m
    m = torch.where(n == 0, i, torch.maximum(i, kept))
    i, f, z, o = torch.exp(i - m), torch.exp(kept - m), torch.tanh(z), torch.sigmoid(o)
    c, n = f * c + i * z, f * n + i
    return torch.stack([o * c / n, c, n, m]), torch.stack([i, f, z, o])


def to_public_xlstm(backbone):
    """Our weights under the public package's names. Its igate and fgate are swapped in sLSTM, and
    the weight of its last norm is counted from 1.
    """
    out = {"post_blocks_norm.weight": backbone.norm.weight - 1}
    for layer, block in enumerate(backbone.blocks):
        put = lambda name, weight: out.update({f"blocks.{layer}.{name}": weight})
        put("xlstm_norm.weight", block.norm)
        put("xlstm.conv1d.conv.weight", block.conv_weight)
        put("xlstm.conv1d.conv.bias", block.conv_bias)
        if hasattr(block, "R"):                                         # sLSTM
            for gate, W in zip("fizo", block.W):                        # (H, dh, dh) each
                put(f"xlstm.{gate}gate.weight", W)
            R = block.R.transpose(0, 1).flatten(1, 2)                   # (H, 4 dh, dh)
            put("xlstm.slstm_cell._recurrent_kernel_", R)
            put("xlstm.slstm_cell._bias_", block.bias.flatten())
            put("xlstm.group_norm.weight", block.head_norm)
            put("ffn_norm.weight", block.mlp_norm)
            put("ffn.proj_up.weight", block.mlp_up.weight)
            put("ffn.proj_down.weight", block.mlp_down.weight)
            continue
        for letter, W in zip("qkv", block.qkv.transpose(-1, -2)):       # (E/4, out, in) each
            put(f"xlstm.{letter}_proj.weight", W)
        for gate, W, b in zip("if", block.gates.weight.chunk(2), block.gates.bias.chunk(2)):
            put(f"xlstm.mlstm_cell.{gate}gate.weight", W)
            put(f"xlstm.mlstm_cell.{gate}gate.bias", b)
        put("xlstm.proj_up.weight", block.up.weight)
        put("xlstm.mlstm_cell.outnorm.weight", block.head_norm)
        put("xlstm.learnable_skip", block.skip)
        put("xlstm.proj_down.weight", block.down.weight)
    return out


def peer_mamba(model, compiled=False):
    """mambapy, backbone mamba. Its step takes one token; the final norm it lacks is added. See the
    opening.
    """
    if optional("mambapy.mamba", "Mamba") is None:
        return None
    from mambapy.mamba import Mamba, MambaConfig
    config, weights = model.config, model.backbone.state_dict()
    stack = Mamba(MambaConfig(d_model=config.dim, n_layers=config.layers, rms_norm_eps=1e-5))
    names = {
        "norm.weight": "norm", "mixer.in_proj.weight": "up.weight",
        "mixer.conv1d.weight": "conv_weight", "mixer.conv1d.bias": "conv_bias",
        "mixer.x_proj.weight": "select.weight", "mixer.dt_proj.weight": "dt.weight",
        "mixer.dt_proj.bias": "dt.bias", "mixer.A_log": "A_log", "mixer.D": "D",
        "mixer.out_proj.weight": "down.weight"}
    load_weights(stack, {f"layers.{layer}.{theirs}": weights[f"blocks.{layer}.{ours}"]
                         for layer in range(config.layers) for theirs, ours in names.items()})
    norm = weights["norm.weight"].clone()                               # (D,)

    def step(x, state):
        if state is None:
            state = [(None, x.new_zeros(len(x), 2 * config.dim, 3)) for _ in stack.layers]
        y = []
        for t in range(x.shape[1]):
            out, state = stack.step(x[:, t], state)                     # (B, D)
            y.append(out)
        return F.rms_norm(torch.stack(y, dim=1), norm.shape, norm, eps=1e-5), state
    return peer("mambapy", step, model, compiled)


def peer_gpt(model, compiled=False):
    """Hugging Face's GPT-2, backbone gpt: all tokens in one call, and a static cache.

    One sequence at a time: the cache belongs to the step, and state None empties it. It holds
    config.max_tokens; more are an IndexError or RuntimeError. See the opening.
    """
    if optional("transformers", "GPT2Model") is None:
        return None
    from transformers import GPT2Config, GPT2Model, StaticCache
    config = model.config
    gpt2 = GPT2Model(GPT2Config(
        vocab_size=1, n_positions=config.max_tokens, n_embd=config.dim, n_layer=config.layers,
        n_head=config.heads, activation_function="gelu", bos_token_id=None, eos_token_id=None,
        attn_implementation="eager" if compiled else "sdpa"))           # measured: the faster one
    load_weights(gpt2, to_public_gpt(model.backbone) | {"wte.weight": gpt2.wte.weight})
    cache = StaticCache(config=gpt2.config, max_cache_len=config.max_tokens)
    cache.early_initialization(1, config.heads, config.dim // config.heads, torch.float32, "cpu")

    def step(x, state):
        if state is None:
            cache.reset()
        y = gpt2(inputs_embeds=x, past_key_values=cache, use_cache=True).last_hidden_state
        return y, cache
    return peer("transformers", step, model, compiled)


def to_public_gpt(backbone):
    """Our weights under Hugging Face's names; its layers hold matrices (in, out)."""
    position, *blocks = backbone.blocks
    out = {"wpe.weight": position.embedding.weight, "ln_f.weight": backbone.norm.weight,
           "ln_f.bias": backbone.norm.bias}
    names = {"ln_1": "norm", "attn.c_attn": "qkv", "attn.c_proj": "out", "ln_2": "mlp_norm",
             "mlp.c_fc": "mlp_up", "mlp.c_proj": "mlp_down"}
    for layer, block in enumerate(blocks):
        for theirs, ours in names.items():
            weight, bias = getattr(block, ours).weight, getattr(block, ours).bias
            out[f"h.{layer}.{theirs}.weight"] = weight.T if weight.dim() == 2 else weight
            out[f"h.{layer}.{theirs}.bias"] = bias
    return out


def load_weights(module, weights):
    """Copies all weights of a peer, none missing and none left over; it is ready to act then."""
    module.load_state_dict({name: weight.detach() for name, weight in weights.items()})
    module.eval().requires_grad_(False)


def peer(package, step, model, compiled):
    """(name with version, step), for a step(x, state) as it is, or compiled and called twice.

    The first step of a sequence, which makes the state, is never compiled: acting repeats the rest.
    """
    name = f"{package} {version(package)}"
    if not compiled:
        return name, torch.no_grad()(step)
    # every setting as in lram.FastPolicy: see there
    settings = dict(INDUCTOR, cpp_wrapper=True)
    from torch._inductor import config as inductor
    # without guards, torch.compile would reuse what it made of the same code for another model
    step.__code__ = step.__code__.replace()
    fast = torch.compile(step, fullgraph=True, dynamic=False, options={
        "guard_filter_fn": torch.compiler.skip_all_guards_unsafe})

    @torch.no_grad()            # around fast, not in it: nothing is frozen where gradients are on
    def run(x, state):
        return (step if state is None else fast)(x, state)
    state = None
    with inductor.patch(settings):
        for x in torch.randn(3, 1, len(model.config.tokens), model.config.dim):
            _, state = run(x, state)
    return f"{name}, compiled", run


# ------------------------------------------------------------------------------------------ acting
@torch.no_grad()
def act_times(act, args, batch=1, state=None, between=lambda t, state: state, warm=20):
    """Milliseconds of every step: observations in, actions (numpy) out.

    act(obs (B, 39), scalar (B,), state) -> logits (B, 4, 256), state. between(t, state) -> state
    is called before step t and not timed. Ends after args.steps steps or args.seconds seconds.
    """
    obs = torch.randn(64, batch, 39, device=args.device)
    scalar, times = torch.rand(64, batch, device=args.device), []
    for t in range(warm + args.steps):
        state = between(t, state)
        started = time.perf_counter()
        began = started if t <= warm else began
        logits, state = act(obs[t % 64], scalar[t % 64], state)
        action = bin_to_action(logits.argmax(-1)).cpu().numpy()
        times.append(1e3 * (time.perf_counter() - started))
        if len(times) >= 2 * warm and time.perf_counter() - began > args.seconds:
            break
    if not torch.isfinite(logits).all():
        raise SystemExit("the policy's logits are not finite: nothing was measured")
    return np.array(times[warm:])


def restart(context):
    """`between` of act_times for gpt: a fresh cache every `context` steps; 0: never."""
    return lambda t, state: None if context and t % context == 0 else state


def stepper(policy):
    """act() of a policy for act_times: reward and return-to-go are the same random number."""
    return lambda obs, scalar, state: policy.act(obs, scalar, scalar, 4, state=state)


def percentiles(times):
    """Times in ms -> {median_ms, ..., steps, missed: {Hz: steps longer than the period}}."""
    row = {f"p{p}_ms": float(np.percentile(times, p)) for p in (95, 99, 99.9)}
    return dict(median_ms=float(np.median(times)), **row, max_ms=float(times.max()),
                steps=len(times), missed={hz: int((times > 1e3 / hz).sum()) for hz in RATES})


def build(name, args, **options):
    """The model, the same weights for every row, and its fast policy."""
    torch.manual_seed(0)
    try:
        model = LRAM(Config(name, args.size, **options)).to(args.device).eval()
        return model, FastPolicy(model, args.weights)
    except ValueError as error:
        raise SystemExit(str(error)) from None


def backbone_alone(model, args):
    """act() of the compiled backbone without encoders and head, as the public peers are timed."""
    fast, x = FastPolicy(model, args.weights), torch.randn(1, 3, model.config.dim)
    for part in (fast.model, fast.plain):
        part.tokens = lambda obs, *rest: x[:, None]                     # (1, 1, 3, D)
        part.readout = lambda y, action_dims: y
    return lambda obs, scalar, state: fast.act(obs, scalar, scalar, 0, state=state)


def acting(args, machine):
    """One environment, one step after the other: plain, compiled, public peers."""
    show_card(machine, args)
    print(f"\n{'milliseconds per step':<30}{'median':>9}{'p95':>9}{'p99':>9}{'p99.9':>9}{'max':>9}"
          f"{'of floor':>10}")
    rows, verdicts = [], []
    for name in args.backbones:
        model, fast = build(name, args)
        context = model.config.context if name == "gpt" else 0
        state = state_bytes(model.backbone.initial_state(1))
        forms = {"plain": (stepper(model), "float32"), args.weights: (stepper(fast), args.weights)}
        rivals = peers(model, args)
        if rivals:
            forms["backbone alone"] = backbone_alone(model, args), args.weights
        for label, act in rivals:
            forms[label] = act, "float32"
        for label, (act, weights) in forms.items():
            times = act_times(act, args, between=restart(context))
            floor = machine.floor(name, weight_bytes(model, weights), state)
            row = dict(backbone=name, form=label, **percentiles(times), floor_ms=floor)
            rows.append(row)
            print(f"{name + ', ' + label:<30}{row['median_ms']:>9.2f}{row['p95_ms']:>9.2f}"
                  f"{row['p99_ms']:>9.2f}{row['p99.9_ms']:>9.2f}{row['max_ms']:>9.2f}"
                  f"{row['median_ms'] / floor:>10.1f}", flush=True)
            if label == args.weights:
                row["compile_seconds"] = fast.compile_seconds
                verdicts.append(row)
    print()
    for row in verdicts:
        print(f"{row['backbone']}, {row['form']}: " + ", ".join(
            f"{hz} Hz {missed} of {row['steps']} deadlines missed"
            for hz, missed in row["missed"].items())
            + f"; compiled in {row['compile_seconds']:.0f} s")
    for ours, row in itertools.product(rows, rows):
        if (ours["form"] == "backbone alone" and row["backbone"] == ours["backbone"]
                and row["form"] not in ("plain", args.weights, "backbone alone")):
            print(f"{row['backbone']}: {row['median_ms'] / ours['median_ms']:.1f} times as fast as "
                  f"{row['form']}, backbone against backbone, ours compiled in {args.weights}")
    return rows


def latency(args, machine):
    """Milliseconds and bytes of state against context, batches of 1 and 16."""
    show_card(machine, args)
    rows = []
    for batch in args.batches or (1, 16):
        print(f"\nbatch {batch}: median ms per step (p95), MB of state\n{'context, steps':<16}"
              + "".join(f"{name:>26}" for name in args.backbones))
        policies = {}
        for context in args.contexts:
            line = f"{context:<16,}"
            for name in args.backbones:
                row = dict(backbone=name, batch=batch, context=context)
                rows.append(row)
                row.update(latency_at(name, args, batch, context, policies))
                line += f"{row['failed']:>26}" if "failed" in row else \
                    (f"{row['median_ms']:>10.2f} ({row['p95_ms']:.2f})".rjust(17)
                     + f"{row['state_bytes'] / 1e6:>9,.1f}")
            print(line, flush=True)
    for name in args.backbones:
        measured = [r for r in rows if r["backbone"] == name and "failed" not in r
                    and r["batch"] == rows[0]["batch"]]
        if len(measured) < 2:
            continue
        first, last = measured[0], measured[-1]
        print(f"{name}: {last['median_ms'] / first['median_ms']:.2f} times the latency and "
              f"{last['state_bytes'] / first['state_bytes']:.1f} times the state at "
              f"{last['context']:,} steps of context as at {first['context']:,}")
    return rows


def latency_at(name, args, batch, context, policies):
    """One cell of latency: the row's measurements. policies: recurrent ones are compiled once.

    A recurrent state is made by the model itself, which reads `context` random steps in pieces;
    gpt's cache, made for just this context, is filled with random numbers and one step short of
    full: every step is timed there.
    """
    options = dict(context=context) if name == "gpt" else {}
    with torch.device("meta"):
        blocks = Backbone(Config(name, args.size, **options))
        size = state_bytes(blocks.initial_state(batch, "meta"))
    gc.collect()                                # the policies of the cells before
    if size > free_bytes(args.device) / 8:      # copies: our own, the policy's, its check's
        return dict(failed=f"{size / 1e9:.0f} GB: too large", state_bytes=size)
    if name == "gpt" or name not in policies:
        policies.pop(name, None)
        policies[name] = *build(name, args, **options), None, 0
    (model, fast, state, done), full = policies[name], 3 * (context - 1)
    if name == "gpt":
        state = model.backbone.initial_state(batch, args.device)
        for part in state:
            part[-1].fill_(full)
            for cache in part[:-1]:
                cache[:, :, :full].normal_()
    else:
        with torch.no_grad():
            for start in range(done, context, 256):         # at batch 1, then spread over the rows
                steps = min(256, context - start)
                obs, scalar = torch.randn(1, steps, 39), torch.rand(1, steps)
                _, state = model(obs.to(args.device), *[scalar.to(args.device)] * 2, 4, state=state)
        policies[name] = model, fast, state, context
        state = spread(state, batch)

    def rewind(t, state):
        for part in state if name == "gpt" else ():
            part[-1].fill_(full)
        return state
    times = act_times(stepper(fast), args, batch, fast.own_state(state), rewind)
    return dict(percentiles(times), state_bytes=size)


def spread(state, batch):
    """A state of one row -> the same for `batch` rows."""
    return tuple(tuple(x.expand(batch, *x.shape[1:]).clone() for x in part) for part in state)


def free_bytes(device):
    """Memory that is still free; infinite where it is not told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except ValueError:
        return float("inf")


def throughput(args, machine):
    """Environment steps per second against the batch; gpt with its cache full at each context."""
    show_card(machine, args)
    rows, names = [], [f"{name} at {C:,}" if name == "gpt" else name for name in args.backbones
                       for C in (args.contexts if name == "gpt" else (0,))]
    print("\nenvironment steps per second (of the floor)\nbatch   "
          + "".join(f"{name:>22}" for name in names))
    for batch in args.batches or (1, 8, 32, 96, 128):
        line = f"{batch:<8}"
        for name in args.backbones:
            for context in args.contexts if name == "gpt" else (0,):
                row = dict(backbone=name, batch=batch, context=context)
                rows.append(row)
                # recurrent: one step of context, since its length changes nothing (--latency)
                row.update(latency_at(name, args, batch, context or 1, {}))
                if "failed" in row:
                    line += f"{row['failed']:>22}"
                    continue
                row["per_second"] = 1e3 * batch / row["median_ms"]
                with torch.device("meta"):
                    weights = weight_bytes(LRAM(Config(name, args.size)), args.weights)
                # a step must move its bytes, and do 2 operations per weight and token
                row["floor_ms"] = max(machine.floor(name, weights, row["state_bytes"]),
                                      1e3 * 6 * batch * weights / BYTES[args.weights]
                                      / machine.rate)
                line += f"{row['per_second']:>14,.0f} ({row['floor_ms'] / row['median_ms']:>4.0%})"
        print(line, flush=True)
    return rows


def memory(args, machine):
    """Bytes of the state against context, from the shapes of the tensors alone."""
    del machine
    rows = []
    print(f"{args.size}: MB of state for one environment\n{'context, steps':<16}"
          + "".join(f"{name:>12}" for name in args.backbones))
    for context in args.contexts:
        for name in args.backbones:
            with torch.device("meta"):
                size = state_bytes(Backbone(Config(name, args.size, context=context))
                                   .initial_state(1, "meta"))
            rows.append(dict(backbone=name, context=context, state_bytes=size))
        print(f"{context:<16,}" + "".join(
            f"{r['state_bytes'] / 1e6:>12,.2f}" for r in rows[-len(args.backbones):]))
    return rows


def token_loop(model):
    """act() that takes the step's three tokens through the backbone one by one."""
    def act(obs, scalar, state):
        tokens, y = model.tokens(obs[:, None], scalar[:, None], scalar[:, None])[:, 0], None
        for t in range(tokens.shape[1]):
            y, state = model.backbone(tokens[:, t:t + 1], state)
        return model.readout(y[:, 0], 4).unflatten(-1, (4, 256)), state
    return act


@torch.no_grad()
def outputs(act, args, batch, steps=8):
    """Logits of the first steps on the same inputs: what is compared before anything is timed."""
    generator, state, logits = torch.Generator().manual_seed(1), None, []
    for obs in torch.randn(steps, batch, 39, generator=generator):
        out, state = act(obs.to(args.device), obs[:, 0].to(args.device), state)
        logits.append(out.float().cpu())
    return torch.stack(logits)


def ladder(args, machine):
    """What each trick buys: one environment, each rung on top of the one before."""
    show_card(machine, args)
    rows = []
    for name, batch in itertools.product(args.backbones, args.batches or (1,)):
        print(f"\n{name}, batch {batch}: {'median ms':>12}{'p99 ms':>10}{'times':>8}"
              f"{'difference':>12}")
        model, _ = build(name, args)
        context, before = model.config.context if name == "gpt" else 0, None
        rungs = {"token by token": token_loop(model), "three tokens at once": stepper(model)}
        if args.device.type == "cuda":
            twin = build(name, args)[0]
            if use_kernels(twin, "auto").startswith("triton"):
                rungs |= {"token by token, kernels": token_loop(twin),
                          "three at once, kernels": stepper(twin)}
        # PyTorch 2.13's default, buffers in place, gives wrong numbers here
        compiled = torch.compile(model.act, dynamic=False, options={"inplace_buffers": False})
        rungs["torch.compile"] = lambda obs, scalar, state: compiled(
            obs, scalar, scalar, 4, None, state)
        for weights in ("float32", "bfloat16") + ("int8",) * (args.device.type == "cpu"):
            rungs[f"FastPolicy, {weights}"] = stepper(FastPolicy(model, weights))
        truth = outputs(rungs["three tokens at once"], args, batch)
        for label, act in rungs.items():
            error = relative_error(outputs(act, args, batch), truth)
            if not error <= 0.1:
                print(f"  {label:<26}wrong numbers, off by {error:.0e}: not timed", flush=True)
                continue
            row = dict(backbone=name, batch=batch, rung=label, error=error, **percentiles(
                act_times(act, args, batch, between=restart(context))))
            rows.append(row)
            before = before or row["median_ms"]
            print(f"  {label:<26}{row['median_ms']:>10.2f}{row['p99_ms']:>10.2f}"
                  f"{before / row['median_ms']:>8.1f}{error:>12.1e}", flush=True)
    return rows


def heads(args, machine):
    """mLSTM with more, smaller heads at constant width: bytes of state, latency, throughput."""
    show_card(machine, args)
    rows, counts = [], (4, 8, 16, 32)
    batches = args.batches or (1, 16)
    print(f"\n{'heads':<8}{'state MB':>10}{'floor ms':>10}"
          + "".join(f"{f'batch {b}, ms':>16}{'per second':>12}" for b in batches))
    for count in counts:
        line = ""
        for batch in batches:
            try:
                Config("mlstm", args.size, heads=count)
                with torch.device("meta"):
                    blocks = Backbone(Config("mlstm", args.size, heads=count))
            except ValueError as error:
                line = str(error).split(";")[0]
                break
            model, fast = build("mlstm", args, heads=count)
            size = state_bytes(blocks.initial_state(batch, "meta"))
            floor = machine.floor("mlstm", weight_bytes(model, args.weights), size)
            row = dict(heads=count, batch=batch, state_bytes=size, floor_ms=floor,
                       **percentiles(act_times(stepper(fast), args, batch)))
            row["per_second"] = 1e3 * batch / row["median_ms"]
            rows.append(row)
            line = line or f"{size / 1e6:>10.2f}{floor:>10.2f}"
            line += f"{row['median_ms']:>16.2f}{row['per_second']:>12,.0f}"
        print(f"{count:<8}{line}", flush=True)
    return rows


def world(args, machine):
    """Acting in a simulator, its time included. The state runs on over episodes, the first part is
    dropped.

    The paper's Freeway episodes have 8,192 steps; with frame-skip 4 a game has 2,048, so four games
    count as one episode. gpt restarts its cache when it is full, every C = 50 steps.
    """
    from eval import make_env
    show_card(machine, args)
    rows, env = [], make_env(args.env)
    image, discrete = len(env.observation_space.shape) == 3, hasattr(env.action_space, "n")
    dims = 0 if discrete else env.action_space.shape[0]
    print(f"\n{args.env}, {args.steps} steps after as many that are dropped; ms per step, median"
          f"\n{'':<18}{'simulator':>10}{'policy':>10}{'p99':>10}{'steps/s':>10}  missed")
    for name in args.backbones:
        _, fast = build(name, args)
        obs, state, reward, times = env.reset(seed=0)[0], None, 0.0, []
        for t in range(2 * args.steps):
            if name == "gpt" and t % fast.config.context == 0:
                state = None
            started = time.perf_counter()
            seen = torch.as_tensor(np.asarray(obs))[None]
            logits, state = fast.act(
                (seen if image else seen.float()).to(args.device),
                *torch.full((2, 1), reward, device=args.device), dims, state=state)
            index = logits[0, :env.action_space.n if discrete else None].argmax(-1).cpu().numpy()
            action = int(index) if discrete else bin_to_action(index).astype(np.float32)
            middle = time.perf_counter()
            obs, reward, terminated, truncated, _ = env.step(action)
            reward = float(reward)
            if terminated or truncated:
                obs, _ = env.reset()
            times.append((1e3 * (middle - started), 1e3 * (time.perf_counter() - middle)))
        policy, simulator = np.array(times[args.steps:]).T
        row = dict(backbone=name, env=args.env, simulator_ms=float(np.median(simulator)),
                   per_second=1e3 / float(np.mean(policy + simulator)), **percentiles(policy))
        rows.append(row)
        print(f"{name + ', ' + args.weights:<18}{row['simulator_ms']:>10.2f}"
              f"{row['median_ms']:>10.2f}{row['p99_ms']:>10.2f}{row['per_second']:>10,.0f}  "
              + ", ".join(f"{hz} Hz: {n}" for hz, n in row["missed"].items()), flush=True)
    env.close()
    return rows


def rate(mixture, rows, context):
    """Windows per second that a data.Mixture reads, these (row, start)."""
    started = time.perf_counter()
    for row in rows:
        mixture.window(*row, context)
    return len(rows) / (time.perf_counter() - started)


def reading(root, tasks, domain, context, n=1000):
    """Windows per second of one domain in each way of keeping trajectories."""
    from data import PACK, Mixture, pack_task
    rng, files = np.random.default_rng(0), Mixture(root, tasks, open_files=1)
    rows = [files.draw(domain, context, rng) for _ in range(n)]
    chosen = sorted({tasks[row[0]] for row, _ in rows})
    result = {"opened": rate(files, rows[:n // 4], context)}
    files = Mixture(root, tasks, open_files=600)
    distinct = {row[:2] for row, _ in rows[:500]}            # as many as may stay open
    kept = [row for row in rows if row[0][:2] in distinct]
    rate(files, kept, context)
    result["kept"] = rate(files, kept, context)
    with tempfile.TemporaryDirectory() as folder:       # the user's data stay as they are
        for task in tasks:
            (Path(folder) / task).mkdir(parents=True)
            for file in (Path(root) / task).iterdir():
                if file.name != PACK:
                    (Path(folder) / task / file.name).symlink_to(file.absolute())
            if task in chosen:
                pack_task(Path(folder) / task)
        packed = Mixture(folder, tasks)
        rate(packed, rows, context)
        result["packed"] = rate(packed, rows, context)
        for task in chosen:                             # the same, with all of it in memory
            pack = packed.packs[task]
            for key in ("states", "actions", "rewards", "returns_to_go"):
                setattr(pack, key, np.array(getattr(pack, key)[:]))
        result["memory"] = rate(packed, rows, context)
    return result


def windows(args, machine):
    """Windows per second that the data side gives, and that training on this machine takes."""
    from data import Mixture, task_folders
    from train import to_tensors
    tasks = sorted(str(folder.relative_to(args.data)) for folder in task_folders(args.data)
                   if list(folder.glob("*.hdf5"))) if args.data.is_dir() else []
    if not tasks:
        raise SystemExit(f"{args.data} holds no tasks; make some with: python data.py make")
    C, B, rows, name = 50, 64, [], args.backbones[0]
    torch.manual_seed(0)
    mixture, model = Mixture(args.data, tasks), LRAM(Config(name, args.size)).to(args.device)
    print(f"{machine.name}; windows of {C} steps per second; training: {name}, {args.size}, batch "
          f"{B}\n{'domain':<14}{'file opened':>12}{'kept open':>12}{'packed':>12}{'in memory':>12}"
          f"{'training takes':>16}")
    for domain in mixture.domains:
        row = dict(domain=domain, **reading(args.data, tasks, domain, C))
        batch = mixture.sample(domain, B, C, 0, 0)
        inputs, seconds = to_tensors(batch, model.config, args.device)[0], []
        for _ in range(3):
            started = time.perf_counter()
            logits, _ = model(**inputs, final_state=False)
            logits.float().logsumexp(-1).mean().backward()
            machine.wait()
            seconds.append(time.perf_counter() - started)
        rows.append(dict(row, training=B / min(seconds)))
        print(f"{domain:<14}" + "".join(f"{x:>{w},.0f}" for x, w in zip(
            list(rows[-1].values())[1:], (12, 12, 12, 12, 16))), flush=True)
    return rows


def many(args, machine):
    """A synthetic set of --trajectories files: seconds to index it, memory while windows are read.

    Trajectories of 20 to 60 steps, 8 numbers a state, 2 a action, in a temporary folder.
    """
    from data import Mixture, pack_task, write_json, write_trajectory
    rows, rng, n = [], np.random.default_rng(0), args.trajectories
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * \
        os.sysconf("SC_PAGE_SIZE") / 1e6
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "synthetic" / "task"
        folder.mkdir(parents=True)
        lengths = {f"{k:07d}": int(T) for k, T in enumerate(rng.integers(20, 61, n))}
        started = time.perf_counter()
        for name, T in lengths.items():
            write_trajectory(folder / f"{name}.hdf5", rng.random((T, 8), np.float32),
                             rng.uniform(-1, 1, (T, 2)).astype(np.float32), rng.random(T), False)
        print(f"{machine.name}; {n:,} files of {np.mean(list(lengths.values())):.0f} steps written "
              f"in {time.perf_counter() - started:.0f} s\n{'':<9}{'index, s':>9}{'windows/s':>11}"
              "   resident memory, MB, before and after 5, 10, 15, 20 thousand windows")
        write_json(folder / "episode_lengths.json", lengths)
        write_json(folder / "task.json", {
            "task": "synthetic/task", "domain": "synthetic", "reward_scale": 1.0,
            "constant_rtg": False, "target_return": 60.0, "reference_score": 60.0,
            "random_score": 0.0, "observation": {"kind": "vector", "shape": [8]},
            "action": {"kind": "continuous", "dims": 2}})
        for layout in ("files", "packed"):
            if layout == "packed":
                pack_task(folder)
            started = time.perf_counter()
            mixture = Mixture(root, ["synthetic/task"])
            index, memory, speeds = time.perf_counter() - started, [resident()], []
            for part in range(4):
                draw_rng = np.random.default_rng(part)
                picks = [mixture.draw("synthetic", 20, draw_rng) for _ in range(5000)]
                speeds.append(rate(mixture, picks, 20))
                memory.append(resident())
            rows.append(dict(layout=layout, index_seconds=index, windows=np.median(speeds),
                             memory=memory))
            print(f"{layout:<9}{index:>9.2f}{np.median(speeds):>11,.0f}   "
                  + "".join(f"{m:>7.0f}" for m in memory), flush=True)
    return rows


# ------------------------------------------------------------------------------- the paper's claims
# A claim is measured by runs of train.py and eval.py that differ in one thing, over SEEDS. What
# follows is the protocol, committed before the runs; figures/results.json holds what they gave.
#
#     part     a difference, one value per seed, so arranged that the paper says it is positive; its
#              mean, and Student's 95 % interval over the seeds. equal: the interval lies within the
#              margin (0 but where a claim says "as well" or "little"); borne out: above -margin;
#              not: below; else undecided. Of a time or a number of bytes there is one value, that
#              decides alone
#     claim    borne out if all parts are or are equal, not if one is not, else undecided
LEDGER = Path("figures/results.json")
SEEDS = (0, 1, 2)
RECURRENT = ("mlstm", "xlstm", "mamba")
FOUR = (*RECURRENT, "gpt")
WIDTHS = (32, 64, 128)
RATES_TRIED = (1e-3, 2e-3, 4e-3)        # learning rates; each backbone is given its best (sLSTM:
                                        # xlstm's), on the mixture at the middle width
LITTLE = 0.05                           # of the expert's score: the margin of "as well", "little"

# The mixture of all comparisons but in-context learning: no pictures, so that a run takes minutes;
# a discrete world that asks for the last reward (Dark-Room) beside smooth control.
MIXTURE = ("darkroom/train", "metaworld/reach-v3", "metaworld/door-open-v3",
           "metaworld/drawer-close-v3", "metaworld/button-press-topdown-v3",
           "metaworld/window-open-v3", "dmcontrol/cartpole-swingup", "dmcontrol/point_mass-easy",
           "dmcontrol/reacher-easy")
SMOOTH = ("metaworld", "dmcontrol")
# of what the paper holds out, tasks with good experts here; of so many trajectories C6 uses 5 %
UNSEEN = ("metaworld/door-lock-v3", "metaworld/door-unlock-v3", "dmcontrol/cartpole-balance",
          "dmcontrol/reacher-hard")
UNSEEN_EPISODES = 100
WINDOW = 20 * 12                        # environment steps in a domain's batch: 12 windows of 20
TRAIN = (f"--tasks {' '.join(MIXTURE)} --heldout --context 20 --batch-size {WINDOW // 20} "
         "--steps 500")
ZERO_SHOT = f"--heldout darkroom/heldout {' '.join(UNSEEN)}"     # scored, never trained on
TUNE = (f"--tasks {' '.join(UNSEEN)} --heldout --context 20 --batch-size 12 "
        "--top-fraction 0.05 --steps 200")
# in-context learning: one learning rate for all, not tuned but for a look at another, 1e-3 for gpt
DARK = ("--tasks darkroom/histories --heldout darkroom/heldout --context 200 --align 100 "
        "--batch-size 16 --dim 32 --lr 3e-3 --steps 500 --episodes 0")


def trained(backbone, more="", width=64, on=TRAIN):
    """A variant of the mixture. gpt's two layers are wider, to hold as many parameters as four."""
    return backbone, f"{on} --dim {width + 8 * (backbone == 'gpt')} {more}"


# variant: (backbone, flags of train.py); trained once per seed for all claims that read it
VARIANTS = {f"{b} {w}": trained(b, ZERO_SHOT, w) for b in FOUR for w in WIDTHS}
VARIANTS |= {f"{b} actions": trained(b, "--tokens a,r,s,rtg") for b in ("mlstm", "gpt")}
VARIANTS |= {f"{b} C {c}": trained(b, f"--context {c} --batch-size {WINDOW // c}")
             for b in ("mlstm", "gpt") for c in (1, 5, 60)}
VARIANTS |= {
    "[1:1]": trained("xlstm", "--slstm-at 1 3"), "[1:3]": trained("xlstm", "--slstm-at 0 1 2"),
    "[0:1]": trained("slstm"), "mlstm half": trained("mlstm", "--layers 2", width=96),
    "mlstm 2 heads": trained("mlstm", "--heads 2"), "mlstm 8 heads": trained("mlstm", "--heads 8"),
    # the target as wide in actions as with 256
    "mlstm 64 bins": trained("mlstm", "--bins 64 --soft-sigma 0.75")}
VARIANTS |= {f"{b} {name}": trained(b, more) for b in ("mlstm", "gpt") for name, more in (
    ("dropout", "--dropout 0.1"), ("r,s", "--tokens r,s"), ("s", "--tokens s"))}
VARIANTS |= {f"{b} tuned": trained(b, f"--init-from runs/claims/{b}_64-s{{seed}}/checkpoint.pt",
                                   on=TUNE) for b in FOUR}
VARIANTS |= {f"{b} scratch": trained(b, on=TUNE) for b in FOUR}
VARIANTS |= {
    "dark mlstm [1:0]": ("mlstm", f"{DARK} --layers 8"),
    "dark xlstm [7:1]@1": ("xlstm", f"{DARK} --layers 8 --slstm-at 1"),
    "dark xlstm [3:1]@1,3": ("xlstm", f"{DARK} --layers 8 --slstm-at 1 3"),
    "dark xlstm [3:1]@5,7": ("xlstm", f"{DARK} --layers 8 --slstm-at 5 7"),
    "dark slstm [0:1]": ("slstm", f"{DARK} --layers 8"),
    "dark mamba": ("mamba", f"{DARK} --layers 8"), "dark gpt": ("gpt", f"{DARK} --layers 5")}


# which learning rate: {(backbone, rate): variant}
TUNING, TUNING_SEED = {(b, rate): f"rate {b} {rate}" for b in FOUR for rate in RATES_TRIED}, 100
VARIANTS |= {name: trained(b, f"--lr {rate} --episodes 0") for (b, rate), name in TUNING.items()}


def mean_score(run, domains=None):
    """Mean over domains of the scores after training, on the tasks trained on."""
    return float(np.mean([run["scores"][d] for d in domains or run["scores"]]))


def log_perplexity(run):
    """Mean over domains of the validation cross-entropy at the end, nats."""
    return float(np.mean(np.log(list(run["perplexity"].values()))))


def comparable(a, b):
    """Refuse two runs of other data, other budgets or another number of parameters."""
    for key in ("data", "tasks", "steps", "top_fraction"):
        if a["config"][key] != b["config"][key]:
            raise SystemExit(f"{a['name']} and {b['name']} cannot be compared: {key} is "
                             f"{a['config'][key]} and {b['config'][key]}; delete the one that is "
                             "not wanted below runs/claims, and run the claim again")
    tokens = [run["config"]["context"] * run["config"]["batch_size"] for run in (a, b)]
    sizes = [run["config"]["backbone_parameters"] for run in (a, b)]
    if tokens[0] != tokens[1] or max(sizes) > 1.2 * min(sizes):
        raise SystemExit(f"{a['name']} and {b['name']} cannot be compared: {tokens[0]} and "
                         f"{tokens[1]} environment steps in a batch, {sizes[0]:,} and "
                         f"{sizes[1]:,} parameters of the backbone")


def paired(runs, value, better, worse):
    """value(better) - value(worse), for each seed that has both."""
    seeds = [s for s in SEEDS if {(better, s), (worse, s)} <= runs.keys()]
    for s in seeds:
        comparable(runs[better, s], runs[worse, s])
    return [value(runs[better, s]) - value(runs[worse, s]) for s in seeds]


def of_seeds(runs, value, variant):
    """A cell of a table: the value of each seed that is there."""
    return [value(runs[variant, s]) for s in SEEDS if (variant, s) in runs]


def over_widths(runs, value, better, worse):
    """paired(), averaged over the widths; [] unless all are there."""
    rows = [paired(runs, value, f"{better} {w}", f"{worse} {w}") for w in WIDTHS]
    return np.mean(rows, axis=0).tolist() if min(map(len, rows)) == len(SEEDS) else []


def at_width(runs, value, width):
    """A row of a table: {backbone: values} at this width."""
    return {b: of_seeds(runs, value, f"{b} {width}") for b in FOUR}


def domains_of(tasks):
    """The domains of tasks, once each."""
    return list(dict.fromkeys(task.split("/")[0] for task in tasks))


def c1(runs):
    """Perplexity: every recurrent backbone against gpt, and the gap against the width."""
    parts = {f"{b} below gpt": over_widths(runs, log_perplexity, "gpt", b) for b in RECURRENT}
    small, large = ([paired(runs, log_perplexity, f"gpt {w}", f"{b} {w}") for b in RECURRENT]
                    for w in (WIDTHS[0], WIDTHS[-1]))
    whole = min(map(len, small + large)) == len(SEEDS)
    parts[f"gap at D {WIDTHS[-1]} over gap at D {WIDTHS[0]}"] = \
        (np.mean(large, axis=0) - np.mean(small, axis=0)).tolist() if whole else []
    table = {f"D {w}": at_width(runs, lambda run: math.exp(log_perplexity(run)), w) for w in WIDTHS}
    for domain in domains_of(MIXTURE):
        table[f"D {WIDTHS[-1]}, {domain}"] = at_width(
            runs, lambda run: run["perplexity"][domain], WIDTHS[-1])
    lines = {}
    for b in FOUR:
        curves = [runs[f"{b} {WIDTHS[-1]}", s]["curve"] for s in SEEDS
                  if (f"{b} {WIDTHS[-1]}", s) in runs]
        if curves:
            y = np.array([[p for _, p in curve][1:] for curve in curves])
            lines[b] = line([step for step, _ in curves[0]][1:], y.mean(0), y.min(0), y.max(0))
    curve = dict(title=f"D {WIDTHS[-1]}, mean and range of the seeds", x="optimizer step",
                 y="validation perplexity (geometric mean of domains)", lines=lines, levels={})
    return dict(parts=parts, tables={"validation perplexity": table}, curves=[curve])


def line(x, y, low, high):
    """A line of a picture with a band around it, as the ledger keeps it."""
    return {key: [float(f"{v:.5g}") for v in values]
            for key, values in dict(x=x, y=y, low=low, high=high).items()}


def c2(runs):
    """Scores in the environments: every recurrent backbone against gpt; held-out tasks beside."""
    parts = {f"{b} over gpt": over_widths(runs, mean_score, b, "gpt") for b in RECURRENT}
    table, last = {f"D {w}": at_width(runs, mean_score, w) for w in WIDTHS}, WIDTHS[-1]
    for d in domains_of(MIXTURE):
        table[f"D {last}, {d}"] = at_width(runs, lambda run: run["scores"][d], last)
    for d in domains_of(("darkroom/heldout", *UNSEEN)):
        table[f"D {last}, {d}, held-out tasks"] = at_width(
            runs, lambda run: run["heldout"][d], last)
    return dict(parts=parts, tables={"score": table})


def c3(runs):
    """Scores without and with actions in the context, on the domains of smooth control."""
    smooth = lambda run: mean_score(run, SMOOTH)
    parts, table = {}, {}
    for b in ("mlstm", "gpt"):
        parts[f"{b}: without actions over with"] = paired(runs, smooth, f"{b} 64", f"{b} actions")
        for d in domains_of(MIXTURE):
            value = lambda run: run["scores"][d]
            table[f"{b}, {d}"] = {name: of_seeds(runs, value, v) for name, v in (
                ("without actions", f"{b} 64"), ("with actions", f"{b} actions"))}
    return dict(parts=parts, tables={"score": table,
                                     "how much consecutive actions of the data differ":
                                     action_changes()})


def action_changes(root="datasets"):
    """{domain, and what: how much consecutive actions differ}, the mean over a domain's tasks."""
    from data import find_folder, open_trajectory, load_card
    rows = {}
    for task in MIXTURE:
        folder, values = find_folder(root, task), []
        for path in sorted(folder.glob("*.hdf5"))[:20]:
            actions = open_trajectory(path, load_card(folder, task)).actions[:]
            discrete = np.issubdtype(actions.dtype, np.integer)
            values.append(np.mean(actions[1:] != actions[:-1]) if discrete else
                          np.mean(np.diff(actions, axis=0) ** 2))
        row = f"{task.split('/')[0]}, " + ("share of steps with another action" if discrete else
                                           "mean squared difference")
        rows.setdefault(row, []).append(float(np.mean(values)))
    return {row: {"mean over tasks": [float(np.mean(v))]} for row, v in rows.items()}


def c4(runs):
    """Scores against the context length, without actions; acting sees no more than C steps."""
    value, parts, table = lambda run: run["stagger"]["mean"], {}, {}
    for b in ("mlstm", "gpt"):
        parts[f"{b}: C 60 over C 1"] = paired(runs, value, f"{b} C 60", f"{b} C 1")
        for d in ("mean", *domains_of(MIXTURE)):
            part = lambda run: run["stagger"][d]
            table[f"{b}, {d}"] = {f"C {c}": of_seeds(runs, part, v) for c, v in (
                (1, f"{b} C 1"), (5, f"{b} C 5"), (20, f"{b} 64"), (60, f"{b} C 60"))}
    return dict(parts=parts, tables={"score": table})


def trials_mean(run, goals="darkroom/heldout", part=slice(None)):
    """Mean return over goals and trials, as a share of the optimum."""
    played = run["trials"][goals]
    return float(np.mean(np.array(played["returns"])[:, part]) / played["optimal"])


def c5(runs):
    """Dark-Room: mean return over 40 trials on unseen goals, and the curve against the trial."""
    seven, low, deep = "dark xlstm [7:1]@1", "dark xlstm [3:1]@1,3", "dark xlstm [3:1]@5,7"
    parts = {f"{seven[5:]} over {other[5:]}": paired(runs, trials_mean, seven, other)
             for other in ("dark mlstm [1:0]", "dark mamba", "dark gpt")}
    parts[f"{low[5:]} over {deep[5:]}"] = paired(runs, trials_mean, low, deep)
    parts[f"{seven[5:]}, last 10 trials over the first"] = [
        trials_mean(runs[seven, s], part=slice(-10, None))
        - trials_mean(runs[seven, s], part=slice(1)) for s in SEEDS if (seven, s) in runs]
    variants = [v for v in VARIANTS if v.startswith("dark ")]
    cells = {"all 40 trials": trials_mean,
             "first trial": lambda run: trials_mean(run, part=slice(1)),
             "last 10 trials": lambda run: trials_mean(run, part=slice(-10, None)),
             "last 10, training goals":
                 lambda run: trials_mean(run, "darkroom/histories", slice(-10, None)),
             "last 10, one episode remembered":
                 lambda run: float(np.mean(np.array(run["pair"]["darkroom/heldout"]["returns"])
                                           [:, -10:]) / run["pair"]["darkroom/heldout"]["optimal"])}
    table = {v[5:]: {name: of_seeds(runs, value, v) for name, value in cells.items()}
             for v in variants}
    return dict(parts=parts, tables={"return over the optimum, held-out goals": table},
                curves=[trial_curves(runs, variants, goals, title) for goals, title in (
                    ("darkroom/heldout", "20 held-out goals"),
                    ("darkroom/histories", "80 training goals"))])


def trial_curves(runs, variants, goals, title, root="datasets"):
    """Mean return against the trial, seeds averaged; band: 95 % bootstrap over the goals."""
    from data import find_folder, open_trajectory
    lines, levels = {}, {}
    for v in variants:
        played = [runs[v, s]["trials"][goals] for s in SEEDS if (v, s) in runs]
        if not played:
            continue
        returns = np.mean([p["returns"] for p in played], axis=0)           # (goals, trials)
        drawn = np.random.default_rng(0).integers(len(returns), size=(1000, len(returns)))
        low, high = np.percentile(returns[drawn].mean(1), (2.5, 97.5), axis=0)
        lines[v[5:]] = line(range(1, returns.shape[1] + 1), returns.mean(0), low, high)
        levels = {"optimal": played[0]["optimal"], "random": played[0]["random"]}
    folder = find_folder(root, "darkroom/histories")
    learned = np.mean([open_trajectory(p).rewards[:].reshape(-1, 100).sum(1)
                       for p in sorted(folder.glob("*.hdf5"))], axis=0)     # (episodes,)
    learned = learned.reshape(40, -1).mean(1)
    lines["the data's learner, 25 episodes a trial"] = line(range(1, 41), learned, learned, learned)
    return dict(title=title, x="trial (100 steps each)", y="return", lines=lines, levels=levels)


def c6(runs):
    """Unseen tasks, 5 % of their trajectories: from the pre-trained weights, and from scratch."""
    parts = {f"{b}: pre-trained over scratch":
             paired(runs, mean_score, f"{b} tuned", f"{b} scratch") for b in FOUR}
    table = {b: {"pre-trained": of_seeds(runs, mean_score, f"{b} tuned"),
                 "from scratch": of_seeds(runs, mean_score, f"{b} scratch")}
             for b in FOUR}
    return dict(parts=parts, tables={"score on the unseen tasks": table})


def c7(runs):
    """Silhouette of the domains among the hidden states; an untrained model and raw inputs beside.
    """
    silhouette = lambda of: lambda run: run["embed"][of]["domains"]
    parts = {"xlstm over gpt": paired(runs, silhouette("trained"), "xlstm 64", "gpt 64")}
    for b in ("xlstm", "gpt"):
        gain = lambda run: silhouette("trained")(run) - silhouette("untrained")(run)
        parts[f"{b}: trained over untrained"] = of_seeds(runs, gain, f"{b} 64")
    table = {of: at_width(runs, silhouette(of), 64) for of in ("trained", "untrained", "raw input")}
    neighbour = lambda run: run["embed"]["trained"]["neighbours"]
    table["trained: nearest window of another task is of the same domain"] = at_width(
        runs, neighbour, 64)
    return dict(parts=parts, tables={"silhouette of the domains": table})


def c8(runs):
    """Latency and bytes of state at the longest context over those at the shortest, batch 1."""
    rows = {}
    for row in runs["latency"]["rows"]:
        if row["batch"] == 1 and "failed" not in row:
            rows.setdefault(row["backbone"], {})[row["context"]] = row
    common = sorted(set.intersection(*(set(r) for r in rows.values())))     # all have these
    first, last = common[0], common[-1]
    growth = lambda key: {b: r[last][key] / r[first][key] for b, r in rows.items()}
    times, sizes = growth("median_ms"), growth("state_bytes")
    parts = {}
    for b in rows:
        if b == "gpt":
            parts[f"gpt: latency times {times[b]:.1f}, at least 2"] = [times[b] - 2]
            parts[f"gpt: state times {sizes[b]:.0f}, at least 2"] = [sizes[b] - 2]
        else:
            parts[f"{b}: latency times {times[b]:.2f}, at most 1.2"] = [1.2 - times[b]]
            parts[f"{b}: state times {sizes[b]:.0f}, not more than 1"] = [1.001 - sizes[b]]
    lines = {b: line(common, *[[r[c]["median_ms"] for c in common]] * 3) for b, r in rows.items()}
    return dict(parts=parts, curves=[dict(
        title=f"{runs['latency']['size']}, batch 1, {runs['latency']['machine']}",
        x="context, environment steps", y="ms per step (median)",
        lines=lines, levels={}, log=True)],
        tables={f"at {last:,} steps of context, times that at {first:,}": {
            b: {"latency": [times[b]], "state": [sizes[b]]} for b in rows}})


def c9(runs):
    """Environment steps per second over gpt's at 1,600 steps of context, against the batch."""
    rows = {(r["backbone"], r["batch"], r["context"]): r["per_second"]
            for r in runs["throughput"]["rows"] if "failed" not in r}
    longest = max(context for *_, context in rows)
    names = list(dict.fromkeys(b for b, *_ in rows if b != "gpt"))
    batches = sorted({n for _, n, _ in rows if ("gpt", n, longest) in rows
                      and all((b, n, 0) in rows for b in names)})           # all have these
    ratio = {b: {n: rows[b, n, 0] / rows["gpt", n, longest] for n in batches} for b in names}
    parts = {}
    for b, r in ratio.items():
        growth = r[batches[-1]] / r[batches[0]]
        parts[f"{b}: {min(r.values()):.1f} times gpt's at least, more than 1"] = [
            min(r.values()) - 1]
        parts[f"{b}: that times {growth:.1f} from batch {batches[0]} to {batches[-1]}, at least 1.2"
              ] = [growth - 1.2]
    lines = {}
    for b, _, context in rows:
        own = {n: x for (name, n, c), x in rows.items() if (name, c) == (b, context)}
        lines[f"{b}, {f'{context:,} steps of' if context else 'any'} context"] = \
            line(own, *[list(own.values())] * 3)
    return dict(parts=parts, curves=[dict(
        title=f"{runs['throughput']['size']}, {runs['throughput']['machine']}",
        x="agents side by side (batch)", y="environment steps per second",
        lines=lines, levels={}, log=True)],
        tables={f"throughput over gpt's at {longest:,} steps of context": {
            b: {f"batch {n}": [x] for n, x in ratio[b].items()} for b in names}})


def c10(runs):
    """Ratios of mLSTM to sLSTM, dropout, half the layers, no returns-to-go, heads."""
    base, ratios = "mlstm 64", {"[3:1]": "xlstm 64", "[1:1]": "[1:1]", "[1:3]": "[1:3]",
                                "[0:1]": "[0:1]"}
    difference = partial(paired, runs, mean_score)
    parts = {f"[1:0] over {name}": difference(base, v) for name, v in ratios.items()}
    dropout = "gpt: without dropout over with"
    parts[dropout] = difference("gpt 64", "gpt dropout")
    parts["mlstm: half the layers over all"] = difference("mlstm half", base)
    for tokens in ("r,s", "s"):
        parts[f"tokens {tokens}: mlstm over gpt"] = difference(f"mlstm {tokens}", f"gpt {tokens}")
    rows = {"[1:0] (mlstm)": base, **ratios, "mlstm, half the layers": "mlstm half",
            "mlstm, 2 heads": "mlstm 2 heads", "mlstm, 8 heads": "mlstm 8 heads",
            "mlstm, 64 bins": "mlstm 64 bins", "mlstm, dropout": "mlstm dropout",
            "gpt": "gpt 64", "gpt, dropout": "gpt dropout",
            "mlstm, tokens r,s": "mlstm r,s", "gpt, tokens r,s": "gpt r,s",
            "mlstm, tokens s": "mlstm s", "gpt, tokens s": "gpt s"}
    scores = {"mean over domains": mean_score,
              **{d: partial(mean_score, domains=[d]) for d in domains_of(MIXTURE)}}
    perplexity = {"mean over domains": lambda run: math.exp(log_perplexity(run))}
    return dict(parts=parts, margins={dropout: 0.0}, tables={
        title: {name: {c: of_seeds(runs, value, v) for c, value in columns.items()}
                for name, v in rows.items()}
        for title, columns in (("score", scores), ("validation perplexity", perplexity))})


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and how it is measured here."""
    text: str
    figure: str                         # of the paper
    # runs -> {"parts": {name: values}, "tables": {title: {row: {column: values}}}, "curves"};
    # values: one per seed
    judge: Callable
    variants: tuple[str, ...] = ()      # what is trained
    then: tuple[str, ...] = ()          # scored once more, see THEN
    bench: str = ""                     # or: a mode of this program and its flags
    margin: float = 0.0                 # of its parts, where the judge gives none
    unit: str = ""
    beside: str = ""                    # what of the claim is not measured, and why


# second looks at a trained agent: flags of eval.py
THEN = {"trials": "--trials 40 --temperature 0.5",
        "pair": "--trials 40 --temperature 0.5 --context pair --tasks darkroom/heldout",
        "stagger": "--context stagger --episodes 20 --processes 1",
        "embed": "--embed {folder}/embed.png"}
AT_WIDTHS = tuple(f"{b} {w}" for b in FOUR for w in WIDTHS)
CLAIMS = {
    "C1": Claim("recurrent backbones reach a lower validation perplexity than the Transformer at "
                "equal size, the gap growing with size", "2a", c1, AT_WIDTHS, unit=" nats"),
    "C2": Claim("and act as well or better", "2b, 3, 14", c2, AT_WIDTHS, margin=LITTLE),
    "C3": Claim("removing actions from the context helps smooth continuous control", "23-25", c3,
                ("mlstm 64", "gpt 64", "mlstm actions", "gpt actions")),
    "C4": Claim("without actions, a longer context helps", "23-27", c4,
                tuple(f"{b} {v}" for b in ("mlstm", "gpt") for v in ("C 1", "C 5", "64", "C 60")),
                ("stagger",)),
    "C5": Claim("xLSTM[7:1] learns best in context on Dark-Room; sLSTM belongs in low layers",
                "4, 16, 31", c5, tuple(v for v in VARIANTS if v.startswith("dark ")),
                ("trials", "pair")),
    "C6": Claim("pre-training beats training from scratch when fine-tuned on held-out tasks", "15",
                c6, tuple(f"{b} {v}" for b in FOUR for v in ("64", "tuned", "scratch"))),
    "C7": Claim("hidden states cluster by domain, xLSTM's better separated than the "
                "Transformer's", "5, 34", c7, tuple(f"{b} 64" for b in FOUR), ("embed",)),
    "C8": Claim("recurrent latency and memory do not depend on the context; the Transformer's grow",
                "6", c8, bench="--latency --size 16m --backbones mlstm mamba gpt --seconds 3 "
                "--batches 1"),
    "C9": Claim("recurrent throughput exceeds the Transformer's, the more the larger the batch",
                "7", c9, bench="--throughput --backbones mlstm mamba gpt --batches 1 8 32 128 "
                "--contexts 800 1600 --seconds 2", beside="where more heads saturate, and three "
                "tokens without kernels against one with them (Fig. 21, 22), need a GPU"),
    "C10": Claim("sLSTM helps little on the mixture; dropout hurts the Transformer; half the "
                 "layers cost little; the trends hold without returns-to-go and rewards",
                 "28-30, 32, 33", c10,
                 ("mlstm 64", "xlstm 64", "gpt 64", "[1:1]", "[1:3]", "[0:1]", "mlstm half",
                  "mlstm 2 heads", "mlstm 8 heads", "mlstm 64 bins")
                 + tuple(f"{b} {v}" for b in ("mlstm", "gpt") for v in ("dropout", "r,s", "s")),
                 margin=LITTLE),
}


# --------------------------------------------------------------- claims: runs, judgement, ledger
def flags(text):
    """"--a 1 2 --b 3 --a 4" -> ["--a", "4", "--b", "3"]: what is said last holds."""
    found = {}
    for word in text.split():
        if word.startswith("--"):
            key, found[word] = word, []
        else:
            found[key].append(word)
    return [word for key, values in found.items() for word in (key, *values)]


def run_folder(name, seed):
    """runs/claims/<variant>-s<seed>, where train.py puts this run."""
    return Path("runs/claims") / f"{re.sub('[^a-z0-9]+', '_', name.lower()).strip('_')}-s{seed}"


def training(name, seed, rates):
    """The command that trains a variant, without python."""
    backbone, text = VARIANTS[name]
    words = flags(text.format(seed=seed))
    if "--lr" not in words:
        words += ["--lr", str(rates["xlstm" if backbone == "slstm" else backbone])]
    return ["train.py", "--backbone", backbone, "--name",
            str(run_folder(name, seed).relative_to("runs")), "--seed", str(seed), *words]


def call(words, log, threads, keep=()):
    """Run one of our programs on so many threads; command, output and seconds go to a file.

    keep: descriptors that the program inherits.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    here, started = Path(__file__).parent, time.time()
    with open(log, "a") as f:
        f.write(f"$ python {shlex.join(words)}\n")
        f.flush()
        try:
            done = subprocess.run([sys.executable, here / words[0], *words[1:]], stdout=f, stderr=f,
                                  env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                                  pass_fds=keep)
        finally:
            f.write(f"\n# {words[0]} took {time.time() - started:.1f} seconds\n")
    if done.returncode:
        tail = log.read_text().replace("\r", "\n").strip().splitlines()[-2:-1]
        raise RuntimeError(f"python {shlex.join(words)[:100]} ... failed; its last line: "
                           f"{' '.join(tail)[:300]}; all of it: {log}")


def make_run(command, folder, then, threads):
    """Train, unless it is done, and take each second look that is missing.

    job.json, written last, says that the training is complete, and what it was. A lock keeps two
    programs from making one run; whoever trains holds it, also when its own caller was killed.
    """
    import fcntl
    from data import write_json
    note, log = folder / "job.json", folder.with_suffix(".txt")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)            # waits while another program makes it
        if not note.exists():
            if "--init-from" in command:
                base = Path(command[command.index("--init-from") + 1]).parent
                if not (base / "job.json").exists():
                    raise RuntimeError(f"{folder} starts from {base}, which is not finished")
            resume = (folder / "checkpoint.pt").exists()
            if folder.exists() and not resume:      # killed before its first checkpoint
                shutil.rmtree(folder)
            made = {"command": command, "commit": commit(), "threads": threads, "looks": {},
                    **circumstances()}
            call(command + ["--resume"] * resume, log, threads, (lock.fileno(),))
            took = re.findall(r"^# train.py took ([\d.]+) seconds", log.read_text(), re.MULTILINE)
            write_json(note, {**made, "seconds": sum(map(float, took))})
        made = json.loads(note.read_text())
        if made["command"] != command:
            raise RuntimeError(f"{folder} holds another run ({shlex.join(made['command'])[:300]}); "
                               "delete it to make this one")
        for name in then:
            if made["looks"].get(name) != THEN[name]:
                words = flags(THEN[name].format(folder=folder))
                call(["eval.py", "--checkpoint", str(folder / "checkpoint.pt"), "--output",
                      str(folder / f"{name}.json"), *words], log, threads, (lock.fileno(),))
                made["looks"][name] = THEN[name]
                write_json(note, made)


def circumstances():
    """Where and when something is measured."""
    return {"machine": f"{cpu_name()}, {os.cpu_count()} cores", "torch": str(torch.__version__),
            "date": time.strftime("%Y-%m-%d")}


def make_runs(jobs, args):
    """make_run for each of jobs, args.jobs at a time; {folder: reason} of those that failed."""
    failed = {}
    if not jobs:
        return failed
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(jobs), unit="run") as bar:
        waiting = {pool.submit(make_run, *job, threads): job[1] for job in jobs}
        try:
            for done in as_completed(waiting):
                bar.update()
                if done.exception():
                    failed[waiting[done]] = str(done.exception())
                    tqdm.write(f"{waiting[done]}: {done.exception()}", file=sys.stderr)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise SystemExit("\ninterrupted; the same command goes on where it was") from None
    return failed


def read_run(name, seed, then=()):
    """What a finished run left, None if it, or a second look at it, is not there yet."""
    folder = run_folder(name, seed)
    if not (folder / "job.json").exists():
        return None
    read = lambda part: json.loads((folder / f"{part}.json").read_text())
    made = read("job")
    if any(made["looks"].get(part) != THEN[part] for part in then):
        return None
    rows = [json.loads(text) for text in (folder / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "perplexity" in row]
    run = dict(name=folder.name, config=read("config"), made=made,
               perplexity=rows[-1]["perplexity"],
               curve=[(row["step"], math.exp(log_perplexity(row))) for row in rows])
    numbers = list(run["perplexity"].values())
    if (folder / "scores.json").exists():
        scores = read("scores")
        run.update(scores=scores["domains"], heldout=scores.get("heldout", {}).get("domains", {}))
        absent = {*domains_of(run["config"]["tasks"])} - scores["domains"].keys()
        if absent:
            raise SystemExit(f"{folder} has no score for {', '.join(absent)} ({scores['failed']}): "
                             "delete it, and make it where the simulators are")
        numbers += run["scores"].values()
    if not np.isfinite(numbers).all():
        raise SystemExit(f"{folder} has a perplexity or a score that is not finite: it diverged")
    for part in then:
        run[part] = read(part)
        if part == "stagger":
            run[part] = {"mean": run[part]["mean_over_domains"], **run[part]["domains"]}
    return run


def tune(args):
    """{backbone: {learning rate: perplexity}} on the mixture, after making the runs that it needs.

    One run each at the middle width, with a seed that no comparison uses.
    """
    if args is not None:
        failed = make_runs([(training(name, TUNING_SEED, {}), run_folder(name, TUNING_SEED), ())
                            for name in TUNING.values()], args)
        if failed:
            raise SystemExit(f"learning rates cannot be chosen: {next(iter(failed.values()))}")
    runs = {key: read_run(name, TUNING_SEED) for key, name in TUNING.items()}
    return {b: {rate: round(math.exp(log_perplexity(runs[b, rate])), 4) for rate in RATES_TRIED}
            for b in FOUR} if all(runs.values()) else {}


def interval(values):
    """Mean and Student's 95 % interval; of a single value the value."""
    from scipy.stats import t
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return mean, mean, mean
    half = float(t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n ** 0.5)
    return mean, mean - half, mean + half


def verdict(values, margin):
    """Of one part; see the rule above."""
    _, low, high = interval(values)
    if -margin < low and high < margin:
        return "equal"
    return "borne out" if low > -margin else "not" if high < -margin else "undecided"


def judge(name, runs, missing):
    """The ledger's entry for a claim."""
    claim = CLAIMS[name]
    found = claim.judge(runs)
    parts, whole = {}, 1 if claim.bench else max(2, len(SEEDS))
    for label, values in found["parts"].items():
        margin = found.get("margins", {}).get(label, claim.margin)
        parts[label] = {"values": [round(v, 5) for v in values], "margin": margin, "verdict":
                        verdict(values, margin) if len(values) == whole else "missing"}
    rounded = {title: {row: {column: [round(v, 5) for v in values]
                             for column, values in cells.items()} for row, cells in table.items()}
               for title, table in found["tables"].items()}
    made = [run.get("made", run) for run in runs.values()]      # a mode of bench.py says it itself
    told = lambda key: ", ".join(sorted({str(m[key]) for m in made}))
    entry = {
        "claim": claim.text, "figure": claim.figure, "verdict": overall(parts), "parts": parts,
        "unit": claim.unit, "tables": rounded, "curves": found.get("curves", []),
        "missing": missing, "seeds": [] if claim.bench else list(SEEDS),
        "command": f"python bench.py --claim {name}", "runs": len(runs),
        "minutes": round(sum(m.get("seconds", 0) for m in made) / 60, 1),
        **{key: told(key) for key in ("machine", "torch", "date", "commit")}}
    if any("--lr" not in VARIANTS[v][1] for v in claim.variants):
        entry["tuning"] = tune(None)
    return entry


def overall(parts):
    """The verdict of a claim from those of its parts."""
    verdicts = {part["verdict"] for part in parts.values()}
    return next((v for v in ("missing", "not", "undecided") if v in verdicts), "borne out")


def commit():
    """The commit that is checked out, "+" behind it if code differs from it."""
    git = lambda *words: subprocess.run(["git", "-C", Path(__file__).parent, *words], text=True,
                                        capture_output=True).stdout.strip()
    changed = git("status", "--porcelain", "-uno", "--", "*.py")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def draw_claim(entry, path):
    """The entry's curves, or its first table as points with the range of the seeds."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    count = max(1, len(entry["curves"]))
    figure, axes = plt.subplots(1, count, figsize=(7 if count == 1 else 6.2 * count, 4.6),
                                squeeze=False, layout="constrained")
    for axis, curve in zip(axes[0], entry["curves"]):
        for name, points in curve["lines"].items():
            own = "data" in name                            # what was learned from, not a result
            axis.plot(points["x"], points["y"], label=name, color="black" if own else None,
                      linestyle=":" if own else "-", marker="o" if len(points["x"]) < 12 else "")
            axis.fill_between(points["x"], points["low"], points["high"], alpha=0.1,
                              color="black" if own else axis.lines[-1].get_color(), linewidth=0)
        for name, level in curve["levels"].items():
            axis.axhline(level, color="gray", linewidth=0.8, linestyle="--")
            axis.annotate(name, (1, level), xycoords=("axes fraction", "data"), ha="right",
                          va="bottom", color="gray", fontsize=8)
        axis.set(title=curve["title"], xlabel=curve["x"], ylabel=curve["y"])
        if curve.get("log"):
            axis.set(xscale="log", yscale="log")
        axis.spines[["top", "right"]].set_visible(False)
    if entry["curves"]:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center",
                      ncol=2 * count, fontsize=8)
    if not entry["curves"]:
        title, table = next(iter(entry["tables"].items()))
        columns, axis = list(dict.fromkeys(c for row in table.values() for c in row)), axes[0, 0]
        for k, column in enumerate(columns):
            places = [(y + (k - (len(columns) - 1) / 2) * 0.7 / len(columns), row[column])
                      for y, row in enumerate(table.values()) if row.get(column)]
            reach = np.array([[np.mean(v) - min(v), max(v) - np.mean(v)] for _, v in places])
            axis.errorbar([np.mean(v) for _, v in places], [y for y, _ in places],
                          xerr=reach.clip(min=0).T.reshape(2, -1), fmt="o", capsize=2, label=column)
        axis.set_yticks(range(len(table)), table)
        axis.invert_yaxis()
        axis.set(xlabel=title + " (mean and range of the seeds)" * bool(entry["seeds"]))
        axis.grid(axis="x", alpha=0.3)
        figure.legend(loc="outside lower center", ncol=4, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        figure.set_size_inches(7.5, max(2.6, 0.42 * len(table) + 1.5))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_clusters(entry, path, names=("xlstm 64", "gpt 64"), seed=0):
    """The hidden states of two trained models, projected; see eval.draw_embeddings."""
    import eval as worlds
    from lram import load_checkpoint, model_from_checkpoint
    panels = {}
    for name in names:
        if run_folder(name, seed).name in entry["missing"]:
            continue
        payload = load_checkpoint(run_folder(name, seed) / "checkpoint.pt")
        model = model_from_checkpoint(payload, torch.device("cpu"))
        cards = {t: c for t, c in payload["cards"].items() if not c["heldout"]}
        points, tasks = worlds.embeddings(model, cards, Path("datasets"))
        panels[name] = points, tasks, {"trained": worlds.separation(points, tasks)}
    if panels:
        worlds.draw_embeddings(panels, path)


def said(part, entry, label):
    """A part in words: label, mean, interval."""
    if part["verdict"] == "missing":
        return f"{label}: {len(part['values'])} of {len(entry['seeds'])} seeds"
    mean, low, high = interval(part["values"])
    if low == high:                             # one value, in the label
        return label
    margin = f", margin {part['margin']:g}" * bool(part["margin"])
    return f"{label} {mean:+.3f}{entry['unit']} ({low:+.3f} to {high:+.3f}{margin})"


def show_claim(name, entry):
    """An entry for people."""
    print(f"\n{name}: {entry['claim']} (Fig. {entry['figure']})")
    for label, part in entry["parts"].items():
        print(f"  {said(part, entry, label):<78} {part['verdict']}")
    for title, table in entry["tables"].items():
        columns = list(dict.fromkeys(c for row in table.values() for c in row))
        print(f"  {title}; mean (range of the seeds)\n  {'':<44}"
              + "".join(f"{c:>26}" for c in columns))
        for row, cells in table.items():
            print(f"  {row:<44}" + "".join(f"{spread_of(cells.get(c)):>26}" for c in columns))
    if entry["missing"]:
        print(f"  missing runs: {', '.join(entry['missing'])}")
    print(f"  verdict: {entry['verdict']}  ({entry['minutes']} minutes of training)")


def spread_of(values):
    """Mean and range of a cell."""
    if not values:
        return "missing"
    return f"{np.mean(values):.3f}" + (f" ({min(values):.3f} to {max(values):.3f})"
                                       if len(values) > 1 else "")


def verdict_in_words(entry):
    """The last cell of a claim's row."""
    if entry["verdict"] == "missing":
        return f"unfinished: {len(entry['missing'])} runs missing"
    return {"not": "**not** borne out", "undecided": "undecided at this scale"}.get(
        entry["verdict"], entry["verdict"])


def claims_table(ledger):
    """The claims, a line each; what is not in the ledger is listed as not measured."""
    lines = ["| claim | figure | command | here: mean difference (95 % interval over seeds) | "
             "verdict |", "|---|---|---|---|---|"]
    for name, claim in CLAIMS.items():
        entry = ledger.get(name)
        here = "; ".join(f"{said(part, entry, label)} [{part['verdict']}]" for label, part
                         in entry["parts"].items()) if entry else "not measured yet"
        here += f"; {claim.beside}" * bool(claim.beside)
        lines.append(f"| {name}: {claim.text} | {claim.figure} | `--claim {name}` | {here} | "
                     f"{verdict_in_words(entry) if entry else 'missing'} |")
    return lines


def claim_details(ledger):
    """For each measured claim its picture, tables and circumstances."""
    lines = []
    for name in CLAIMS:
        if name not in ledger:
            continue
        entry = ledger[name]
        how = f"{len(entry['seeds'])} seeds, {entry['minutes']:.0f} minutes of training" \
            if entry["seeds"] else f"`{CLAIMS[name].bench}`"
        lines += [f"**{name}.** `{entry['command']}`: {how}; {entry['date']}, {entry['machine']}, "
                  f"torch {entry['torch']}, commit {entry['commit']}.", ""]
        if "tuning" in entry:
            tried = (f"{b} " + ", ".join(f"{float(rate):g} ({p:.2f})" for rate, p in row.items())
                     for b, row in entry["tuning"].items())
            lines += ["Learning rates tried (validation perplexity), each backbone has its best: "
                      + "; ".join(tried) + ".", ""]
        lines += [f"![{name}: {entry['claim']}](figures/{name}.png)", ""]
        for title, table in entry["tables"].items():
            columns = list(dict.fromkeys(c for row in table.values() for c in row))
            lines += [f"| {title} | " + " | ".join(columns) + " |",
                      "|---" * (len(columns) + 1) + "|"]
            lines += [f"| {row} | " + " | ".join(spread_of(cells.get(c)) for c in columns) + " |"
                      for row, cells in table.items()] + [""]
    return lines[:-1]


def domains_table(runs):
    """{name: content of a scores.json} -> Markdown lines, a row for each domain."""
    domains = list(dict.fromkeys(d for run in runs.values() for d in run["domain_scores"]))
    cell = lambda row: (f"{row['mean']:.2f} ({row['interval'][0]:.2f} to {row['interval'][1]:.2f})"
                        + ("" if row["above_random"] else ", not above random"))
    return ["| domain | " + " | ".join(runs) + " |", "|---" * (len(runs) + 1) + "|",
            *(f"| {d} | " + " | ".join(cell(run["domain_scores"][d]) for run in runs.values())
              + " |" for d in domains)]


def readme_with(text, ledger):
    """README with its generated parts, between <!-- NAME --> and <!-- end -->, from the ledger."""
    from eval import comparison_table
    parts = {"claims": claims_table(ledger), "claim details": claim_details(ledger),
             "first run": comparison_table(ledger["first run"]["runs"]),
             "laptop domains": domains_table(ledger["laptop"]["runs"]),
             "laptop": comparison_table(ledger["laptop"]["runs"])}
    for name, lines in parts.items():
        pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise SystemExit(f"README.md needs one pair of <!-- {name} --> and <!-- end -->")
        text = pattern.sub(lambda found: found[1] + "\n".join(lines) + "\n" + found[2], text)
    return text


def record(name, *paths):
    """Write the scores.json of whole runs, one per backbone, into the ledger as one entry."""
    from data import write_json
    read = lambda path: json.loads(Path(path).read_text())
    configs = [read(Path(path).parent / "config.json") for path in paths]
    runs = {config["backbone"]: read(path) for config, path in zip(configs, paths)}
    ledger = read(LEDGER) if LEDGER.exists() else {}
    ledger[name] = {
        "command": "; ".join(run["command"] for run in runs.values()), "commit": commit(),
        "date": time.strftime("%Y-%m-%d"), "machine": f"{cpu_name()}, {os.cpu_count()} cores",
        "seeds": sorted({config["seed"] for config in configs}), "torch": torch.__version__,
        "runs": runs}
    write_json(LEDGER, ledger)
    print(f"wrote {name!r}, {', '.join(runs)}, into {LEDGER}; README's table: bench.py --readme")


def readme_main():
    """Write README's tables and the pictures of whole runs from figures/results.json."""
    from eval import draw_comparison
    path = Path("README.md")
    if not (path.exists() and LEDGER.exists()):
        raise SystemExit(f"--readme writes README.md from {LEDGER}: run it where both are")
    ledger = json.loads(LEDGER.read_text())
    temporary = Path(f"{path}.tmp")
    temporary.write_text(readme_with(path.read_text(), ledger))
    os.replace(temporary, path)
    for name in ("first run", "laptop"):
        draw_comparison(ledger[name]["runs"], LEDGER.parent / f"{name.replace(' ', '_')}.png")
    print(f"wrote {path} from {LEDGER}")


def claims_main(args):
    """Measure claims: make the runs that are missing, judge, write the ledger and the pictures."""
    from data import write_json
    unknown = [name for name in args.claim if name not in (*CLAIMS, "all")]
    if unknown:
        raise SystemExit(f"--claim {unknown[0]}: choose from {', '.join(CLAIMS)} or all")
    if args.jobs < 1:
        raise SystemExit(f"--jobs {args.jobs}: at least one run at a time")
    names = list(CLAIMS) if "all" in args.claim else list(dict.fromkeys(args.claim))
    failed = {} if args.report else make_claims(names, args)
    LEDGER.parent.mkdir(exist_ok=True)
    for name in names:
        try:
            runs, missing = read_claim(name)
            if not runs:
                print(f"{name}: none of its runs is there; python bench.py --claim {name} makes "
                      "them")
                continue
            entry = judge(name, runs, missing)
        except SystemExit as refusal:               # the other claims are judged all the same
            failed[name] = refusal
            continue
        show_claim(name, entry)
        ledger = json.loads(LEDGER.read_text()) if LEDGER.exists() else {}
        if len(missing) > len(ledger.get(name, {}).get("missing", missing)):
            print(f"  {LEDGER} keeps its entry, of which less is missing")
            continue
        write_json(LEDGER, {**ledger, name: entry})
        (draw_clusters if name == "C7" else draw_claim)(entry, LEDGER.parent / f"{name}.png")
    if failed:
        raise SystemExit("\n".join(f"{name}: {why}" for name, why in failed.items()))


def read_claim(name):
    """The finished runs of a claim, {(variant, seed): run} or {mode: result}, and what is missing.
    """
    claim, runs, missing = CLAIMS[name], {}, []
    if claim.bench:
        path = Path(f"runs/claims/{name}.json")
        result = json.loads(path.read_text()) if path.exists() else {}
        if (result.get("others") or 0) > BUSY:
            print(f"{name}: {path} was measured on a busy machine and does not count")
        elif result.get("arguments", [])[:-2] == claim.bench.split():   # but --output PATH
            runs[result["mode"]] = result
    for v, s in itertools.product(claim.variants, SEEDS):
        if run := read_run(v, s, claim.then):
            runs[v, s] = run
        else:
            missing.append(run_folder(v, s).name)
    return runs, missing


def make_claims(names, args):
    """All runs that the claims need and that are not there; {name: reason} of what failed."""
    from data import make
    from eval import DOMAINS
    keys = list(dict.fromkeys((v, s) for s in SEEDS for n in names for v in CLAIMS[n].variants))
    tasks = {word for v, _ in keys for word in flags(VARIANTS[v][1])
             if word.split("/")[0] in DOMAINS} - {"darkroom/heldout"}
    # once, before several runs would all make them
    if tasks - set(UNSEEN):
        make(tasks - set(UNSEEN), "datasets", ("darkroom/heldout",))
    if tasks & set(UNSEEN):
        make(tasks & set(UNSEEN), "datasets", episodes=UNSEEN_EPISODES)
    failed, rates = {}, {}
    if any("--lr" not in VARIANTS[v][1] for v, _ in keys):
        rates = {b: min(row, key=row.get) for b, row in tune(args).items()}
    for n in names:
        if CLAIMS[n].bench and not read_claim(n)[0]:
            try:
                call(["bench.py", *CLAIMS[n].bench.split(), "--output", f"runs/claims/{n}.json"],
                     Path(f"runs/claims/{n}.txt"), 1)
            except RuntimeError as error:
                failed[n] = error
    jobs = {}
    for v, s in keys:
        then = dict.fromkeys(t for n in names if v in CLAIMS[n].variants for t in CLAIMS[n].then)
        jobs[v, s] = training(v, s, rates), run_folder(v, s), tuple(then)
    # what starts from the weights of another comes after it
    second = {key for key in jobs if "--init-from" in VARIANTS[key[0]][1]}
    failed |= make_runs([job for key, job in jobs.items() if key not in second], args)
    return failed | make_runs([jobs[key] for key in jobs if key in second], args)


# ---------------------------------------------------------------------------------------- program
def draw(results, path):
    """A picture of saved results: latency against context, and the ladder."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    results = [json.loads(file.read_text()) for file in results]
    shown = [r for r in results if r["mode"] in ("latency", "ladder")]
    if not shown:
        raise SystemExit("--draw takes files that --latency --output or --ladder --output wrote")
    figure, axes = plt.subplots(1, len(shown), figsize=(5.5 * len(shown), 3.8), squeeze=False)
    for axis, result in zip(axes[0], shown):
        batch = result["rows"][0]["batch"]
        rows = [r for r in result["rows"] if r["batch"] == batch and "failed" not in r]
        title = f"{result['size']}, batch {batch}, {result['machine']}"
        if result["mode"] == "latency":
            for name in dict.fromkeys(r["backbone"] for r in rows):
                line = [(r["context"], r["median_ms"]) for r in rows if r["backbone"] == name]
                axis.plot(*zip(*line), marker="o", label=name)
            axis.set(xscale="log", yscale="log", xlabel="context, environment steps",
                     ylabel="ms per step (median)")
            axis.legend()
        else:
            rows = [r for r in rows if r["backbone"] == rows[0]["backbone"]][::-1]
            bars = axis.barh([r["rung"] for r in rows], [r["median_ms"] for r in rows])
            axis.bar_label(bars, fmt=" %.2f")
            axis.margins(x=0.12)
            axis.set(xlabel="ms per step (median)")
            title = f"{rows[0]['backbone']} {title}"
        axis.set_title(title, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


MODES = {"latency": latency, "throughput": throughput, "memory": memory, "ladder": ladder,
         "heads": heads, "env": world, "windows": windows, "trajectories": many}


def main(args):
    """See the opening of this file."""
    if args.draw:
        return draw(args.draw, args.output or Path("speed.png"))
    if args.claim:
        return claims_main(args)
    if args.report:
        raise SystemExit("--report judges claims: add --claim all, or some of C1 to C10")
    if args.record:
        return record(*args.record)
    if args.readme:
        return readme_main()
    if args.kernels:
        return kernels_main(args)
    chosen = [mode for mode in MODES if getattr(args, mode)]
    if len(chosen) > 1:
        raise SystemExit(f"--{' and --'.join(chosen)}: choose one")
    mode = chosen[0] if chosen else "acting"
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: no CUDA GPU found; leave it out, or use --device cpu")
    if args.output and not args.output.parent.is_dir():
        raise SystemExit(f"--output {args.output}: there is no folder {args.output.parent}")
    args.device, _, _ = choose_device(args.device)
    args.contexts = tuple(sorted(args.contexts))
    args.backbones = args.backbones or {
        "acting": BACKBONES, "ladder": ("mlstm",), "heads": ("mlstm",), "windows": ("mlstm",),
    }.get(mode, ("mlstm", "xlstm", "mamba", "gpt"))
    if args.size.endswith("half"):      # gpt has none
        args.backbones = tuple(name for name in args.backbones if name != "gpt")
    args.steps = args.steps or (8192 if mode == "env" else 2000)
    unknown = [name for name in args.backbones if name not in BACKBONES]
    if unknown or args.size not in SIZES:
        raise SystemExit(f"backbones are {', '.join(BACKBONES)} and sizes {', '.join(SIZES)}; "
                         f"given {', '.join(unknown) or args.size}")
    machine = Machine(args.device, args.threads)
    machine.finish(args, MODES.get(mode, acting)(args, machine), mode)


if __name__ == "__main__":
    import tyro
    main(tyro.cli(Args, description=__doc__))
