"""Mamba: the selective scan, a linear recurrence with coefficients from the input, and its block.

Source: Mamba (Gu and Dao, 2023, arXiv 2312.00752), sections 3.2 to 3.4 and algorithm 2. LRAM
(arXiv 2410.22391) compares it with xLSTM as a backbone.

    python mamba.py      # checks the scans against each other and reports what it proved

Every channel carries N numbers h. Each token decays them by exp(dt A) and adds dt x B: dt, B and C
are computed from the token itself, so a channel can keep, overwrite or ignore. The recurrence is
linear in h, so pairs of steps compose, (a2, b2) after (a1, b1) = (a2 a1, a2 b1 + b2), and a scan
can go over time as a tree. Three ways:

    selective_scan_recurrent   the loop, differentiated by PyTorch   the definition
    selective_scan_parallel    tree inside chunks, loop between      teaches; a GPU without Triton
    selective_scan_loop        the loop with its gradient by hand    training on a CPU, and acting

On a CPU the loop wins by 10x: the state (B, E, N) of one step stays in cache, the tree streams all
T of them from memory log T times. `selective_scan` picks by device.

Glossary (the same letters in every file of this project)
    B batch   T tokens   D model width   E = 2D inner width   N = 16 numbers of state per channel
    u          input of the scan (B, T, E)         dt  step size after softplus (B, T, E), positive
    A          decay rates (E, N), negative        D   skip weight (E,)
    B, C       what is written and read (B, T, N)  h   state (B, E, N)

Not included: Mamba-2 (scalar decay, matrix form), other initialisations; GPU kernels: kernels.py.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


# --------------------------------------------------------------------- the recurrence, three times
def selective_scan_recurrent(u, dt, A, B, C, D, state=None):
    """Selective scan, one token after another: the definition every other form is tested against.

    u, dt (B, T, E), A (E, N), B, C (B, T, N), D (E,), state h (B, E, N) of a previous call or
    None. Returns y (B, T, E) and h after the last token. Mamba, equations 2 and 4: zero-order hold
    for A, Euler for B.
    """
    h = _initial_state(u, A) if state is None else state
    y = []
    for t in range(u.shape[1]):
        # h_t = exp(dt_t A) h_{t-1} + (dt_t u_t) B_t                          (B, E, N)
        h = (torch.exp(dt[:, t, :, None] * A) * h
             + (dt[:, t] * u[:, t])[..., None] * B[:, t, None, :])
        # y_t = C_t h_t + D u_t                                               (B, E)
        y.append((h * C[:, t, None, :]).sum(-1) + D * u[:, t])
    return torch.stack(y, dim=1).to(u.dtype), h


def selective_scan_parallel(u, dt, A, B, C, D, state=None, chunk_size=32):
    """The scan as a tree (Hillis-Steele) in chunks, chunk after chunk. Same arguments and results.

    log2(chunk_size) rounds; in round r every position composes with the one 2^r before it:
    (a, b)_t <- (a_t a_{t-s}, a_t b_{t-s} + b_t).  Memory O(chunk_size) states of (B, E, N).
    """
    h = _initial_state(u, A) if state is None else state
    y = []
    for start in range(0, u.shape[1], chunk_size):
        chunk = slice(start, start + chunk_size)
        a = torch.exp(dt[:, chunk, :, None] * A)                            # (B, L, E, N)
        b = (dt[:, chunk] * u[:, chunk])[..., None] * B[:, chunk, None, :]
        shift = 1
        while shift < a.shape[1]:
            b = torch.cat([b[:, :shift], b[:, shift:] + a[:, shift:] * b[:, :-shift]], dim=1)
            a = torch.cat([a[:, :shift], a[:, shift:] * a[:, :-shift]], dim=1)
            shift *= 2
        hs = b + a * h[:, None]                                             # (B, L, E, N)
        y.append((hs * C[:, chunk, None, :]).sum(-1) + D * u[:, chunk])
        h = hs[:, -1]
    return torch.cat(y, dim=1).to(u.dtype), h


class _SelectiveScanLoop(torch.autograd.Function):
    """The loop of selective_scan_recurrent, and the reversed loop that is its exact gradient."""

    @staticmethod
    def forward(ctx, u, dt, A, B, C, D, h):
        hs, decays, y = [h], [], []
        steps = (dt[..., None], (dt * u)[..., None], B[:, :, None], C[..., None])
        steps = [z.unbind(1) for z in steps]                                # T views each
        for dt_t, x_t, B_t, C_t in zip(*steps):
            decay = torch.exp(dt_t * A)                                     # (B, E, N)
            h = torch.addcmul(decay * h, x_t, B_t)
            y.append(h @ C_t)                                               # (B, E, 1)
            hs.append(h)
            decays.append(decay)
        ctx.save_for_backward(u, dt, A, B, C, D, *decays, *hs)
        return torch.cat(y, dim=-1).transpose(1, 2) + D * u, h

    @staticmethod
    def backward(ctx, dy, dh):
        u, dt, A, B, C, D, *saved = ctx.saved_tensors
        T = u.shape[1]
        decays, hs = saved[:T], saved[T:]
        dA, grads = torch.zeros_like(hs[0]), []
        steps = (dy[..., None], dt[..., None], (dt * u)[:, :, None], B[..., None], C[:, :, None])
        steps = [z.unbind(1) for z in steps]                                # T views each
        for t, (dy_t, dt_t, x_t, B_t, C_t) in reversed(list(enumerate(zip(*steps)))):
            # y_t = C_t h_t: the state gets C_t dy_t on top of what comes back from t + 1
            dC = dy_t.transpose(1, 2) @ hs[t + 1]                           # (B, 1, N)
            dh = torch.addcmul(dh, dy_t, C_t)                               # (B, E, N)
            # h_t = decay h_{t-1} + x_t B_t with x = dt u
            dx, dB = dh @ B_t, x_t @ dh                                     # (B, E, 1), (B, 1, N)
            dh = dh * decays[t]                                             # through the decay
            d_log = dh * hs[t]                                              # gradient of dt A
            grads.append((dx[..., 0], (d_log * A).sum(-1), dB[:, 0], dC[:, 0]))
            dA.addcmul_(d_log, dt_t)
        dx, d_dt, dB, dC = (torch.stack(g[::-1], dim=1) for g in zip(*grads))
        du, d_dt = dx * dt + dy * D, d_dt + dx * u
        return du, d_dt, dA.sum(0), dB, dC, (dy * u).sum((0, 1)), dh


def selective_scan_loop(u, dt, A, B, C, D, state=None):
    """The definition, faster on a CPU: same arguments and results, first-order gradient by hand."""
    h = _initial_state(u, A) if state is None else state
    inputs = [z.to(h.dtype) for z in (u, dt, A, B, C, D)]
    y, h = _SelectiveScanLoop.apply(*inputs, h)
    return y.to(u.dtype), h


def selective_scan(u, dt, A, B, C, D, state=None):
    """The loop on a CPU or for few tokens (acting), else the tree. Same arguments and results."""
    loop = u.device.type == "cpu" or u.shape[1] <= 8
    return (selective_scan_loop if loop else selective_scan_parallel)(u, dt, A, B, C, D, state)


def _initial_state(u, A):
    dtype = torch.promote_types(u.dtype, torch.float32)
    return torch.zeros(u.shape[0], *A.shape, dtype=dtype, device=u.device)


# --------------------------------------------------------------------------------------- the block
def precise(form, *inputs):
    """form(*inputs), in float32 also under autocast: bfloat16 has 3 digits, too few for a gate."""
    kind = inputs[0].device.type
    if not torch.is_autocast_enabled(kind):
        return form(*inputs)
    with torch.autocast(kind, enabled=False):
        return form(*(x.float() for x in inputs))


def causal_conv(x, last, weight, bias):
    """Depthwise causal convolution over time: every channel sees its own last 4 values.

    x (B, T, E), last (B, 3, E) inputs before x, weight (E, 1, 4), bias (E,) -> (B, T, E), new last.
    """
    T, x = x.shape[1], torch.cat([last.to(x.dtype), x], dim=1)              # (B, 3 + T, E)
    if T <= 8:          # acting: a library call costs more than its four shifted products
        y = bias + sum(x[:, j:j + T] * weight[:, 0, j] for j in range(4))   # (B, T, E)
        return y, x[:, T:]
    y = F.conv1d(x.transpose(1, 2), weight, bias, groups=weight.shape[0])   # (B, E, T)
    return y.transpose(1, 2), x[:, T:]


class MambaBlock(nn.Module):
    """Residual Mamba-1 block, x (B, T, D) -> (B, T, D). Figure 3, d_state 16, d_conv 4, expand 2.

    State: (h (B, E, 16), conv (B, 3, E)): 64 E + 12 E bytes per row.
    num_blocks: blocks in the whole backbone (scales the output initialisation).
    scan: the function that runs the recurrence, any with the signature of selective_scan.
    """

    def __init__(self, dim, num_blocks=1, dropout=0.0, scan=selective_scan):
        super().__init__()
        E, N, rank = 2 * dim, 16, math.ceil(dim / 16)
        self.inner, self.rank, self.scan = E, rank, scan
        self.norm = nn.Parameter(torch.ones(dim))
        self.up = nn.Linear(dim, 2 * E, bias=False)
        conv = nn.Conv1d(E, E, 4, groups=E)                         # PyTorch's own initialisation
        self.conv_weight, self.conv_bias = conv.weight, conv.bias   # (E, 1, 4), (E,)
        self.select = nn.Linear(E, rank + 2 * N, bias=False)        # [d, B, C]
        self.dt = nn.Linear(rank, E)
        self.A_log = nn.Parameter(torch.arange(1, N + 1).float().log().repeat(E, 1))  # A = -1..-N
        self.D = nn.Parameter(torch.ones(E))
        self.down = nn.Linear(E, dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        # step sizes start log-uniform in [0.001, 0.1]; the bias is their inverse softplus
        nn.init.uniform_(self.dt.weight, -rank ** -0.5, rank ** -0.5)
        with torch.no_grad():
            dt = torch.exp(torch.empty(E).uniform_(math.log(1e-3), math.log(1e-1))).clamp(min=1e-4)
            self.dt.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
            self.down.weight /= math.sqrt(num_blocks)               # of nn.Linear's kaiming_uniform

    def initial_state(self, batch_size, device=None, dtype=torch.float32):
        """The state of batch_size fresh sequences; dtype is that of the convolution's inputs."""
        wide = torch.promote_types(dtype, torch.float32)
        h = torch.zeros(batch_size, *self.A_log.shape, device=device, dtype=wide)
        return h, torch.zeros(batch_size, 3, self.inner, device=device, dtype=dtype)

    def forward(self, x, state=None, final_state=True):
        """x (B, T, D), previous state or None -> y (B, T, D), final state (None if not wanted)."""
        h, conv = self.initial_state(x.shape[0], x.device, x.dtype) if state is None else state
        # [u, z] = W_in RMSNorm(x);   u = silu(conv4(u))
        u, z = self.up(F.rms_norm(x, (x.shape[-1],), self.norm, eps=1e-5)).chunk(2, dim=-1)
        u, conv = causal_conv(u, conv, self.conv_weight, self.conv_bias)
        u = F.silu(u)                                                 # (B, T, E)
        # dt, B, C from the token itself (the selection); A = -exp(A_log) in float32
        d, B, C = self.select(u).split([self.rank, 16, 16], dim=-1)   # (B, T, rank), 2 x (B, T, 16)
        dt = F.softplus(precise(self.dt, d).to(h.dtype))              # (B, T, E)
        A = -torch.exp(self.A_log.to(h.dtype))                        # (E, 16)
        y, h = self.scan(u, dt, A, B, C, self.D, h)                   # (B, T, E)
        x = x + self.dropout(self.down(y * F.silu(z)))
        return x, (h, conv) if final_state else None


# -------------------------------------------------------------------------------------- self-check
def relative_error(a, b):
    """Largest absolute difference over the largest absolute value of b."""
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


def _self_check():
    torch.manual_seed(0)
    B, T, E, N = 2, 75, 24, 16
    inputs = [torch.randn(B, T, E), F.softplus(torch.randn(B, T, E) - 2), -torch.rand(E, N) * 16,
              torch.randn(B, T, N), torch.randn(B, T, N), torch.randn(E)]
    inputs = [x.double() for x in inputs]
    weight = torch.randn(B, T, E).double()
    print(f"Mamba, B={B} T={T} E={E} N={N}, largest error relative to the float64 recurrence")
    print(f"{'form':<26}{'output':>10}{'state':>10}{'gradients':>10}")
    truth = None
    for dtype in (torch.float64, torch.float32):
        for scan in (selective_scan_recurrent, selective_scan_parallel, selective_scan_loop):
            args = [x.to(dtype).detach().requires_grad_() for x in inputs]
            y, h = scan(*args)
            ((y * weight).sum() + h.sum()).backward()
            result = [y, h, *(a.grad for a in args)]
            truth = truth or result
            errors = [relative_error(a, b) for a, b in zip(result, truth)]
            assert max(errors) < (1e-10 if dtype == torch.float64 else 1e-5), errors
            print(f"{scan.__name__:<26}"
                  + "".join(f"{e:>10.1e}" for e in (*errors[:2], max(errors[2:])))
                  + f"   {str(dtype)[6:]}")
    block = MambaBlock(96).double()
    x = torch.randn(2, 30, 96, dtype=torch.float64)
    whole, _ = block(x)
    state, parts = None, []
    for part in x.split([1, 3, 7, 19], dim=1):
        y, state = block(part, state)
        parts.append(y)
    error = relative_error(torch.cat(parts, 1), whole)
    assert error < 1e-10, error
    print(f"block: 30 tokens in calls of 1, 3, 7 and 19 equal one call of 30 ({error:.0e})")


if __name__ == "__main__":
    _self_check()
