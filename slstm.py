"""sLSTM: an LSTM with exponential gates, a normaliser and head-wise recurrence, and its block.

Source: xLSTM (Beck et al., 2024, arXiv 2405.04517), section 2.2 and appendix A.2. LRAM
(arXiv 2410.22391) places a few of these blocks among mLSTM blocks: xLSTM[7:1].

    python slstm.py      # checks the loop and its hand-written gradient and reports what it proved

The gates see the previous output y through R. That is what lets an sLSTM track a state (count,
keep a parity) where mLSTM, Mamba and attention cannot, and it is also why **no parallel form over
time exists**: gate t needs y_{t-1}, which needs gate t-1, through a tanh and a sigmoid that no
associative scan can reorder. What is parallel is the projection of all T inputs (one matrix
product) and all heads and rows at once. So there are

    slstm_recurrent   the loop, differentiated by PyTorch   the definition
    slstm_scan        the same loop, gradient by hand       training and acting: 2x fewer operations

Glossary (the same letters in every file of this project)
    B batch   T tokens   D model width   H heads   dh = D/H units of a head   P inner MLP width
    gates      (B, T, 4, H, dh): input part plus bias of i, f, z, o before activation, in this order
    R          (4, H, dh, dh), R[gate, head, out, in]: recurrent weights, a block for each head
    i, f       input gate exp(i), forget gate sigmoid(f)
    z, o       cell input tanh(z), output gate sigmoid(o)
    y          output, c cell, n normaliser, m stabiliser: (B, H, dh) each; c, n scaled by exp(-m)

Not included: the exp forget gate, group-wise convolution options; GPU kernels: kernels.py.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


# ---------------------------------------------------------------------------------- the recurrence
def slstm_initial_state(gates):
    """y, c, n = 0 and m = -inf for gates (B, T, 4, H, dh): then the first token sets m = i."""
    B, _, _, H, dh = gates.shape
    dtype = torch.promote_types(gates.dtype, torch.float32)
    zeros = torch.zeros(B, H, dh, dtype=dtype, device=gates.device)
    return zeros, zeros, zeros, torch.full_like(zeros, -torch.inf)


def slstm_recurrent(gates, R, state=None):
    """sLSTM, one token after the other: the definition that every other form is tested against.

    gates (B, T, 4, H, dh), R (4, H, dh, dh), state (y, c, n, m) of a previous call or None.
    Returns y (B, T, H, dh) and the state after the last token. xLSTM, equations 8 to 18; m has no
    gradient, y does not depend on it.
    """
    y, c, n, m = slstm_initial_state(gates) if state is None else state
    out = []
    for t in range(gates.shape[1]):
        # every gate sees its input and, within its head, the previous output
        raw = gates[:, t].to(y.dtype) + torch.einsum("ghoi,bhi->bgho", R.to(y.dtype), y)
        i, f, z, o = raw.unbind(1)                                          # (B, H, dh) each
        log_f = F.logsigmoid(f)
        # m_t = max(log f + m_{t-1}, i): keeps both exp() below at most 1
        m_new = torch.maximum(log_f + m, i).detach()
        write, forget = torch.exp(i - m_new), torch.exp(log_f + m - m_new)
        # c_t = f c_{t-1} + i tanh(z),   n_t = f n_{t-1} + i   (>= 1 in these units),
        # y_t = sigmoid(o) c_t / n_t
        c = forget * c + write * torch.tanh(z)
        n = forget * n + write
        y = torch.sigmoid(o) * c / n
        m = m_new
        out.append(y)
    return torch.stack(out, dim=1).to(gates.dtype), (y, c, n, m)


class _SLSTMScan(torch.autograd.Function):
    """The loop of slstm_recurrent with few kernels a step, backpropagation through time by hand.

    Layout inside: heads first, (H, B, ...), so that the recurrent product of a step is one baddbmm
    with R as (H, dh, 4 dh).
    """

    @staticmethod
    def forward(ctx, gates, R, y, c, n, m):
        (B, T, _, H, dh), dtype = gates.shape, y.dtype
        x = gates.to(dtype).permute(1, 3, 0, 2, 4).reshape(T, H, B, 4 * dh)     # gate-major columns
        W = R.to(dtype).permute(1, 3, 0, 2).reshape(H, dh, 4 * dh)              # [in, (gate, out)]
        y, c, n, m = (s.transpose(0, 1) for s in (y, c, n, m))                  # (H, B, dh)
        ys, cs, ns, acts = [y], [c], [n], []
        for t in range(T):
            i, f, z, o = torch.baddbmm(x[t], y, W).split(dh, dim=-1)
            log_f = F.logsigmoid(f) + m
            m = torch.maximum(log_f, i)
            write, forget = torch.exp(i - m), torch.exp(log_f - m)
            z, o = torch.tanh(z), torch.sigmoid(o)
            c = torch.addcmul(forget * c, write, z)
            n = torch.addcmul(write, forget, n)
            y = o * c / n
            ys.append(y); cs.append(c); ns.append(n); acts.append((write, forget, z, o, f))
        ctx.save_for_backward(W, *ys, *cs, *ns, *(a for step in acts for a in step))
        ctx.R_dtype, ctx.gates_dtype, ctx.T = R.dtype, gates.dtype, T
        out = torch.stack(ys[1:]).permute(2, 0, 1, 3)                           # (B, T, H, dh)
        state = [s.transpose(0, 1) for s in (y, c, n, m)]
        ctx.mark_non_differentiable(state[3])
        return out.to(gates.dtype), *state

    @staticmethod
    def backward(ctx, d_out, dy, dc, dn, _):
        """Exact gradient, m constant (it cancels in y): the loop differentiated line by line."""
        T, (W, *saved) = ctx.T, ctx.saved_tensors
        ys, cs, ns = (saved[j * (T + 1):(j + 1) * (T + 1)] for j in range(3))
        acts = saved[3 * (T + 1):]
        H, B, dh = ys[0].shape
        d_out = d_out.to(W.dtype).permute(1, 2, 0, 3)                       # (T, H, B, dh)
        dy, dc, dn = (g.transpose(0, 1) for g in (dy, dc, dn))
        W_t = W.transpose(1, 2)                                             # (H, 4 dh, dh)
        d_raw = torch.empty(T, H, B, 4 * dh, dtype=W.dtype, device=W.device)
        for t in reversed(range(T)):
            write, forget, z, o, f = acts[5 * t:5 * t + 5]
            dy = dy + d_out[t]
            # y = o c / n
            dy_n = dy / ns[t + 1]                                           # dy / n
            dc, dn = dc + dy_n * o, dn - dy_n * ys[t + 1]
            d_i, d_f, d_z, d_o = d_raw[t].split(dh, dim=-1)
            torch.mul(write, torch.addcmul(dn, z, dc), out=d_i)             # i: enters c and n
            keep = cs[t] * dc + ns[t] * dn
            torch.mul(forget * torch.sigmoid(-f), keep, out=d_f)            # f: keeps c and n
            torch.mul(write * dc, 1 - z * z, out=d_z)
            torch.mul(dy_n * cs[t + 1], o * (1 - o), out=d_o)
            # to the step before: through R, and along c and n
            dy = d_raw[t] @ W_t
            dc, dn = forget * dc, forget * dn
        # all steps' outer products at once: dR_g = sum_t d_raw_g(t) y_{t-1}^T
        y_prev = torch.stack(ys[:-1]).permute(1, 3, 0, 2).reshape(H, dh, T * B)
        dW = y_prev @ d_raw.transpose(0, 1).reshape(H, T * B, 4 * dh)       # (H, in, 4 dh)
        dR = dW.view(H, dh, 4, dh).permute(2, 0, 3, 1)                      # [gate, head, out, in]
        d_gates = d_raw.view(T, H, B, 4, dh).permute(2, 0, 3, 1, 4)         # (B, T, 4, H, dh)
        state = (g.transpose(0, 1) for g in (dy, dc, dn))
        return d_gates.to(ctx.gates_dtype), dR.to(ctx.R_dtype), *state, None


def precise(form, *inputs):
    """form(*inputs), in float32 also under autocast: bfloat16 has 3 digits, too few for a gate."""
    kind = inputs[0].device.type
    if not torch.is_autocast_enabled(kind):
        return form(*inputs)
    with torch.autocast(kind, enabled=False):
        return form(*(x.float() for x in inputs))


def slstm_scan(gates, R, state=None):
    """The definition, faster: same arguments and results, first-order gradient by hand."""
    state = slstm_initial_state(gates) if state is None else state
    out, *state = precise(_SLSTMScan.apply, gates, R, *state)
    return out.to(gates.dtype), tuple(state)


# --------------------------------------------------------------------------------------- the block
def causal_conv(x, last, weight, bias):
    """Depthwise causal convolution over time: every channel sees its own last 4 values.

    x (B, T, D), last (B, 3, D) inputs before x, weight (D, 1, 4), bias (D,) -> (B, T, D), new last.
    """
    T, x = x.shape[1], torch.cat([last.to(x.dtype), x], dim=1)              # (B, 3 + T, D)
    if T <= 8:          # acting: a library call costs more than its four shifted products
        y = bias + sum(x[:, j:j + T] * weight[:, 0, j] for j in range(4))   # (B, T, D)
        return y, x[:, T:]
    y = F.conv1d(x.transpose(1, 2), weight, bias, groups=weight.shape[0])   # (B, D, T)
    return y.transpose(1, 2), x[:, T:]


class SLSTMBlock(nn.Module):
    """Residual sLSTM block followed by a gated MLP, x (B, T, D) -> (B, T, D). xLSTM, figure 10.

    State: (y, c, n, m (B, H, dh), conv (B, 3, D)): 16 D + 12 D bytes per row.
    num_blocks, block_index: size of the backbone and place in it (they scale the initialisation).
    cell: the function that runs the recurrence, any with the signature of slstm_scan.
    """

    def __init__(self, dim, num_heads=4, num_blocks=1, block_index=0, dropout=0.0, cell=slstm_scan):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"sLSTM: {num_heads} heads do not divide the model width {dim}")
        dh, P = dim // num_heads, 64 * math.ceil(1.3 * dim / 64)
        self.num_heads, self.cell = num_heads, cell
        self.norm = nn.Parameter(torch.zeros(dim))                  # weight is 1 + norm
        conv = nn.Conv1d(dim, dim, 4, groups=dim)                   # PyTorch's own initialisation
        self.conv_weight, self.conv_bias = conv.weight, conv.bias   # (D, 1, 4), (D,)
        self.W = nn.Parameter(torch.empty(4, num_heads, dh, dh))    # [gate, head, out, in]
        self.R = nn.Parameter(torch.zeros(4, num_heads, dh, dh))    # [gate, head, out, in]
        self.bias = nn.Parameter(torch.zeros(4, num_heads, dh))
        self.head_norm = nn.Parameter(torch.zeros(dim))             # weight is 1 + head_norm
        self.mlp_norm = nn.Parameter(torch.zeros(dim))              # weight is 1 + mlp_norm
        self.mlp_up = nn.Linear(dim, 2 * P, bias=False)
        self.mlp_down = nn.Linear(P, dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.W, std=math.sqrt(2 / (5 * dim)))
        nn.init.normal_(self.mlp_up.weight, std=math.sqrt(2 / (5 * dim)))
        nn.init.normal_(self.mlp_down.weight, std=2 / num_blocks / math.sqrt(dim))
        # forget bias falls from +5 (remembers long) to -7 (forgets at once) over a head's units,
        # in a curve that bends with the depth of the block
        depth = block_index / (num_blocks - 1) if num_blocks > 1 else 0.0
        unit = torch.arange(dh) / max(dh - 1, 1)
        with torch.no_grad():
            self.bias[1] = 5.0 - 12.0 * unit ** (0.3 + 1.3 * depth)

    def initial_state(self, batch_size, device=None, dtype=torch.float32):
        """The state of batch_size fresh sequences; dtype is that of the convolution's inputs."""
        _, H, dh, _ = self.R.shape
        wide = torch.promote_types(dtype, torch.float32)
        zeros = torch.zeros(batch_size, H, dh, device=device, dtype=wide)
        conv = torch.zeros(batch_size, 3, H * dh, device=device, dtype=dtype)
        return zeros, zeros, zeros, torch.full_like(zeros, -torch.inf), conv

    def forward(self, x, state=None, final_state=True):
        """x (B, T, D), previous state or None -> y (B, T, D), final state (None if not wanted)."""
        B, T, D = x.shape
        *memory, conv = self.initial_state(B, x.device, x.dtype) if state is None else state
        # x1 = LN(x);  i and f read the convolved input, z and o the input itself
        x1 = F.layer_norm(x, (D,), 1 + self.norm, eps=1e-5)
        x_c, conv = causal_conv(x1, conv, self.conv_weight, self.conv_bias)
        x_c = F.silu(x_c)
        inputs = torch.stack([x_c, x_c, x1, x1]).view(4, B, T, self.num_heads, -1)
        project = lambda z: torch.einsum("gbthi,ghoi->btgho", z, self.W) + self.bias
        gates = precise(project, inputs)                                    # (B, T, 4, H, dh)
        y, memory = self.cell(gates, self.R, memory)                        # (B, T, H, dh)
        # each head is normalised by itself, and no output projection
        y = F.layer_norm(y, y.shape[-1:], eps=1e-5).reshape(B, T, D)
        x = x + self.dropout((y * (1 + self.head_norm)).to(x.dtype))
        # gated MLP: x + W_2 (gelu(g) * w),  [g, w] = W_1 LN(x)
        g, w = self.mlp_up(F.layer_norm(x, (D,), 1 + self.mlp_norm, eps=1e-5)).chunk(2, dim=-1)
        x = x + self.dropout(self.mlp_down(F.gelu(g) * w))
        return x, (*memory, conv) if final_state else None


# -------------------------------------------------------------------------------------- self-check
def relative_error(a, b):
    """Largest absolute difference over the largest absolute value of b."""
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


def _self_check():
    torch.manual_seed(0)
    B, T, H, dh = 2, 60, 3, 10
    gates = torch.randn(B, T, 4, H, dh, dtype=torch.float64)
    gates[:, :, 1] += 3
    R = torch.randn(4, H, dh, dh, dtype=torch.float64) * 0.3
    weight = torch.randn(B, T, H, dh, dtype=torch.float64)
    print(f"sLSTM, B={B} T={T} H={H} dh={dh}, largest error relative to the float64 recurrence")
    print(f"{'form':<16}{'output':>10}{'c':>10}{'d gates':>10}{'d R':>10}")
    grads = {}
    for dtype in (torch.float64, torch.float32):
        for cell in (slstm_recurrent, slstm_scan):
            g, r = (x.to(dtype).detach().requires_grad_() for x in (gates, R))
            y, state = cell(g, r)
            ((y * weight).sum() + state[1].sum()).backward()
            result = (y, state[1], g.grad, r.grad)
            truth = grads.setdefault("truth", result)
            errors = [relative_error(a, b) for a, b in zip(result, truth)]
            assert max(errors) < (1e-10 if dtype == torch.float64 else 1e-5), errors
            print(f"{cell.__name__:<16}" + "".join(f"{e:>10.1e}" for e in errors)
                  + f"   {str(dtype)[6:]}")
    block = SLSTMBlock(96).double()
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
