"""mLSTM, an LSTM whose memory is a matrix: recurrent, parallel and chunkwise forms, and its block.

Source: xLSTM (Beck et al., 2024, arXiv 2405.04517), sections 2.3 and 2.4 and appendix A; chunkwise
form as in Tiled Flash Linear Attention (arXiv 2503.14376). LRAM (arXiv 2410.22391) uses it as the
backbone xLSTM[1:0].

    python mlstm.py      # checks the three forms against each other and reports what it proved

The idea: attention without a growing cache. Every token writes the outer product k v^T into a
matrix C and reads it back with its query q. Gates decide how much of the old matrix survives (f)
and how much of the new token enters (i). One recurrence, three ways to compute it:

    recurrent   one token after the other, O(1) memory       acting, and the definition
    parallel    all pairs (t, s) at once, O(T^2)             short sequences, training
    chunkwise   parallel inside a chunk, recurrent between   long sequences, and 3 tokens per step

Glossary (the same letters in every file of this project)
    B batch   T tokens   D model width   H heads   E = 64 ceil(2D/64) inner width   L chunk length
    K, V       widths of a head's keys and values (in the block K = V = E/H)
    q, k, v    query, key (B, H, T, K), value (B, H, T, V)
    i, f       input and forget gate before activation (B, H, T): exp(i) and sigmoid(f)
    C, n       matrix memory (B, H, K, V) and normaliser (B, H, K), both scaled by exp(-m)
    m          stabiliser (B, H): largest log-weight of a token in memory; the true one is exp(m) C
    b          running sum of log sigmoid(f) inside a chunk: log of the decay since the chunk began

Not included: the 7B model's block (no convolution), sigmoid input gates; GPU kernels: kernels.py.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-6      # added to the normaliser, as in the public implementations


# --------------------------------------------------------------------- the recurrence, three times
def mlstm_initial_state(q, v):
    """Empty memory for q (B, H, T, K), v (B, H, T, V): zeros C (B, H, K, V), n (B, H, K), m (B, H).

    Float32 (float64 for float64 inputs) whatever the operands: it accumulates for whole episodes.
    """
    (B, H, _, K), V = q.shape, v.shape[-1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    zeros = lambda *shape: torch.zeros(shape, dtype=dtype, device=q.device)
    return zeros(B, H, K, V), zeros(B, H, K), zeros(B, H)


def quotient(num, den, m):
    """h = num / max(|den|, 1), num (..., V), den, m (...): the 1 is exp(-m) in scaled units."""
    return num / (torch.maximum(den.abs(), torch.exp(-m)) + EPS)[..., None]


def mlstm_recurrent(q, k, v, i, f, state=None, final_state=True):
    """mLSTM, one token after the other: the definition that every other form is tested against.

    q, k (B, H, T, K), v (B, H, T, V); i, f (B, H, T) gate pre-activations. state: (C, n, m) of a
    previous call, None to start fresh. Returns h (B, H, T, V) in the dtype of v and the state
    after the last token, None instead if it is not wanted. xLSTM, equations 19 to 27. m carries no
    gradient: h does not depend on it but through EPS.
    """
    C, n, m = mlstm_initial_state(q, v) if state is None else state
    out_dtype = v.dtype
    q, k, v, i, f = (x.to(C.dtype) for x in (q, k, v, i, f))
    q = q * q.shape[-1] ** -0.5
    h = []
    for t in range(q.shape[2]):
        q_t, k_t, v_t, i_t = q[:, :, t], k[:, :, t], v[:, :, t], i[:, :, t]
        log_f = F.logsigmoid(f[:, :, t])                                    # (B, H)
        # m_t = max(log f_t + m_{t-1}, i_t): the largest exponent in play, so no exp() exceeds 1
        m_new = torch.maximum(log_f + m, i_t).detach()                      # (B, H)
        forget, write = torch.exp(log_f + m - m_new), torch.exp(i_t - m_new)
        # C_t = f C_{t-1} + i k_t v_t^T,   n_t = f n_{t-1} + i k_t
        C = forget[..., None, None] * C + (write[..., None] * k_t)[..., None] * v_t[..., None, :]
        n = forget[..., None] * n + write[..., None] * k_t                  # (B, H, K)
        m = m_new
        # h_t = q_t^T C_t / max(|q_t^T n_t|, 1)
        num = torch.einsum("bhk,bhkv->bhv", q_t, C)                         # (B, H, V)
        den = (q_t * n).sum(-1)                                             # (B, H)
        h.append(quotient(num, den, m))
    return torch.stack(h, dim=2).to(out_dtype), (C, n, m) if final_state else None


def log_decay(log_f):
    """log_f (..., T) -> (..., T, T): entry [t, s] = sum of log_f over s < u <= t, -inf for s > t.

    Summed within each column and not as a difference b_t - b_s: over thousands of tokens b grows
    to -1e5, where float32 has no digits left for the few units that matter.
    """
    T = log_f.shape[-1]
    past = torch.ones(T, T, dtype=torch.bool, device=log_f.device).tril()
    x = log_f[..., :, None].expand(*log_f.shape, T)                         # [u, s] = log_f_u
    x = x.masked_fill(~past.tril(-1), 0.0).cumsum(-2)                       # keep u > s, sum to t
    return x.masked_fill(~past, -torch.inf)


def settled(x):
    """x itself; tells the compiler to compute it once, and not again wherever it is used."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


def mlstm_parallel(q, k, v, i, f, state=None, final_state=True):
    """mLSTM, all tokens at once: one chunk of the chunkwise form. Same arguments and results.

    final_state False: None instead of the state, which training does not need; C costs 2 K V
    operations a token, more than all pairs of a window of 150 tokens at the paper's widths.
    Time and memory O(T^2) per head, every operation a large matrix product: right for T up to a
    few hundred, and for T = 3 (one environment step), where C is read and written once instead of
    three times. xLSTM, appendix A.3, with the incoming state that the public parallel form lacks.
    """
    fresh = state is None           # then C = n = 0: nothing to read or to keep from before
    fused = q.shape[2] <= 8 and torch.compiler.is_dynamo_compiling()
    C, n, m = mlstm_initial_state(q, v) if fresh else state
    T, dtype, scale = q.shape[2], v.dtype, q.shape[-1] ** -0.5
    log_f, i = F.logsigmoid(f.to(C.dtype)), i.to(C.dtype)           # (B, H, T)
    # log D[t,s] = (decay from s to t) + i_s: the log-weight of token s as token t sees it
    log_D = log_decay(log_f) + i[..., None, :]                      # (B, H, T, T)
    b = log_f.cumsum(-1)                                            # decay of the incoming state
    m_t = torch.maximum(log_D.amax(-1), b + m[..., None]).detach()  # (B, H, T)
    D = torch.exp(log_D - m_t[..., None])

    # S = (q k^T / sqrt(K)) * D;   h = (S v + decayed q C) / max(|S 1 + decayed q n|, exp(-m))
    if fused:           # sums in place of tiny matrix products, whose calls would cost more
        S = (q.to(C.dtype)[:, :, :, None] * k.to(C.dtype)[:, :, None]).sum(-1) * (D * scale)
        num = sum(S[..., s, None] * v.to(C.dtype)[:, :, s, None] for s in range(T))
    else:
        S = (q @ k.transpose(-1, -2)).to(C.dtype) * (D * scale)     # (B, H, T, T)
        num = (S.to(dtype) @ v).to(C.dtype)                         # (B, H, T, V)
    den = S.sum(-1)                                                 # (B, H, T)
    if not fresh:
        # decayed q (B, H, T, K): the query as the incoming state sees it
        decayed_q = q.to(C.dtype) * (torch.exp(b + m[..., None] - m_t) * scale)[..., None]
        if fused:       # sums that share one loop with C's update below: C passes the core once
            decayed_q = settled(decayed_q)
            read = [(decayed_q[:, :, t, :, None] * C).sum(-2) for t in range(T)]    # (B, H, V) each
            num = num + torch.stack(read, dim=2)
            den = den + (decayed_q * n[:, :, None]).sum(-1)
        else:
            num, den = num + decayed_q @ C, den + (decayed_q @ n[..., None])[..., 0]
    h = quotient(num, den, m_t)

    if not final_state:
        return h.to(dtype), None
    # the state after the last token: its row of D holds what every token still weighs at the end
    weighted_k = k.to(C.dtype) * D[..., -1, :, None]                # (B, H, T, K)
    if fused:
        weighted_k, v = settled(weighted_k), settled(v.to(C.dtype))
        C_new = sum(weighted_k[:, :, s, :, None] * v[:, :, s, None] for s in range(T))
    else:
        C_new = weighted_k.transpose(-1, -2) @ v.to(C.dtype)
    n_new = weighted_k.sum(-2)
    if not fresh:
        kept = torch.exp(b[..., -1] + m - m_t[..., -1])             # (B, H)
        C_new, n_new = torch.addcmul(C_new, kept[..., None, None], C), kept[..., None] * n + n_new
    return h.to(dtype), (C_new, n_new, m_t[..., -1])


def mlstm_chunkwise(q, k, v, i, f, state=None, final_state=True, chunk_size=64):
    """mLSTM, chunk after chunk: parallel inside, recurrent between. Same arguments and results.

    Time O(T L) instead of O(T^2). chunk_size: tokens per chunk, any length >= 1; the last may be
    shorter. With chunk_size 1 this is the recurrent form, with chunk_size >= T the parallel one.
    """
    h = []
    # split, not slices: each slice's gradient would fill a tensor of T tokens with zeros
    for chunk in zip(*(x.split(chunk_size, dim=2) for x in (q, k, v, i, f))):
        wanted = final_state or len(h) + 1 < -(-q.shape[2] // chunk_size)
        out, state = mlstm_parallel(*chunk, state, wanted)
        h.append(out)
    return torch.cat(h, dim=2), state


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


class MLSTMBlock(nn.Module):
    """Residual mLSTM block, x (B, T, D) -> (B, T, D). xLSTM, figure 11 (the one LRAM uses).

    State: (C (B, H, K, K), n (B, H, K), m (B, H), conv (B, 3, E)), float32 for the first three:
    4 (E^2/H + E + H) + 12 E bytes per row; at E = 2D and 4 heads the matrix alone is D^2 numbers.
    num_blocks: blocks in the whole backbone (scales the output initialisation).
    cell: the function that runs the recurrence, any with the signature of mlstm_chunkwise.
    """

    def __init__(self, dim, num_heads=4, num_blocks=1, dropout=0.0, cell=mlstm_chunkwise):
        super().__init__()
        E = 64 * math.ceil(2 * dim / 64)
        if E % num_heads or E // num_heads % 4:
            raise ValueError(f"mLSTM: {num_heads} heads do not divide the inner width {E} into "
                             f"multiples of 4; use a power of two up to {E // 4 & -(E // 4)}")
        self.inner, self.num_heads, self.cell = E, num_heads, cell
        self.norm = nn.Parameter(torch.zeros(dim))                  # weight is 1 + norm
        self.up = nn.Linear(dim, 2 * E, bias=False)
        conv = nn.Conv1d(E, E, 4, groups=E)                         # PyTorch's own initialisation
        self.conv_weight, self.conv_bias = conv.weight, conv.bias   # (E, 1, 4), (E,)
        self.qkv = nn.Parameter(torch.empty(3, E // 4, 4, 4))       # E/4 blocks [in, out] for each
        self.gates = nn.Linear(3 * E, 2 * num_heads)                # i and f of every head
        self.head_norm = nn.Parameter(torch.zeros(E))               # weight is 1 + head_norm
        self.skip = nn.Parameter(torch.ones(E))
        self.down = nn.Linear(E, dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        # small init for what reads the residual stream, Wang init for what writes to it
        nn.init.normal_(self.up.weight, std=math.sqrt(2 / (5 * dim)))
        nn.init.normal_(self.qkv, std=math.sqrt(2 / (5 * dim)))
        nn.init.normal_(self.down.weight, std=2 / num_blocks / math.sqrt(dim))
        # gates depend on nothing at first: forget gates from sigmoid(3) to sigmoid(6), one per head
        nn.init.zeros_(self.gates.weight)
        with torch.no_grad():
            self.gates.bias[:num_heads].normal_(std=0.1)
            self.gates.bias[num_heads:] = torch.linspace(3.0, 6.0, num_heads)

    def initial_state(self, batch_size, device=None, dtype=torch.float32):
        """The state of batch_size fresh sequences; dtype is that of the convolution's inputs."""
        H, K = self.num_heads, self.inner // self.num_heads
        wide = torch.promote_types(dtype, torch.float32)
        zeros = lambda *shape, dtype=wide: torch.zeros(
            batch_size, *shape, device=device, dtype=dtype)
        return zeros(H, K, K), zeros(H, K), zeros(H), zeros(3, self.inner, dtype=dtype)

    def project(self, x_c, x_m):
        """q = B_q x_c, k = B_k x_c, v = B_v x_m, block-diagonal with 4x4 blocks -> (3, B, T, E)."""
        stacked = torch.stack([x_c, x_c, x_m]).unflatten(-1, (-1, 4))       # (3, B, T, E/4, 4)
        return torch.einsum("pbtni,pnio->pbtno", stacked, self.qkv).flatten(-2)

    def bands(self):
        """Diagonals of B_q, B_k, B_v (3, 7, E): [p, 3 + d, e] weighs input e + d of output e."""
        bands = self.qkv.new_zeros(3, 7, self.inner // 4, 4)
        for i in range(4):
            for o in range(4):
                bands[:, 3 + i - o, :, o] = self.qkv[:, :, i, o]
        return bands.flatten(-2)

    def gate(self, q, k, v, x_c, x_m):
        """i, f = W [q; k; v] + b -> (B, T, 2H)."""
        return precise(self.gates, torch.cat([q, k, v], -1))

    def folded_gates(self):
        """The same map from [x_c; x_m], a Linear(2E, 2H): W [q; k; v] = (W_q B_q + W_k B_k) x_c +
        W_v B_v x_m. A third fewer weights for a model that is frozen."""
        E, gates = self.inner, self.gates
        W = gates.weight.double().view(-1, 3, E // 4, 4)                    # (2H, 3, E/4, out)
        parts = torch.einsum("gpno,pnio->pgni", W, self.qkv.double()).reshape(3, -1, E)
        folded = nn.Linear(2 * E, len(W), device=gates.weight.device, dtype=gates.weight.dtype)
        folded.weight.data.copy_(torch.cat([parts[0] + parts[1], parts[2]], -1))
        folded.bias.data.copy_(gates.bias)
        return folded

    def forward(self, x, state=None, final_state=True):
        """x (B, T, D), previous state or None -> y (B, T, D), final state (None if not wanted)."""
        B, T, D = x.shape
        H, E = self.num_heads, self.inner
        memory, conv = (None, x.new_zeros(B, 3, E)) if state is None else (state[:3], state[3])
        heads = lambda y: y.reshape(B, T, H, E // H).transpose(1, 2)    # (B, T, E) -> (B, H, T, K)

        # [x_m, z] = W_up LN(x);   x_c = silu(conv4(x_m))
        x_m, z = self.up(F.layer_norm(x, (D,), 1 + self.norm, eps=1e-5)).chunk(2, dim=-1)
        x_c, conv = causal_conv(x_m, conv, self.conv_weight, self.conv_bias)
        x_c = F.silu(x_c)                                                   # (B, T, E)

        q, k, v = self.project(x_c, x_m)                                    # (B, T, E) each
        # i, f: one scalar per head and token
        i, f = self.gate(q, k, v, x_c, x_m).transpose(1, 2).chunk(2, dim=1)            # (B, H, T)
        h, memory = self.cell(heads(q), heads(k), heads(v), i, f, memory, final_state)

        # each head is normalised by itself: y = W_down((norm(h) + skip x_c) * silu(z))
        h = F.layer_norm(h.transpose(1, 2), (E // H,), eps=1e-5).reshape(B, T, E)
        y = self.down((h * (1 + self.head_norm) + self.skip * x_c) * F.silu(z))
        return x + self.dropout(y), (*memory, conv) if final_state else None


# -------------------------------------------------------------------------------------- self-check
def relative_error(a, b):
    """Largest absolute difference over the largest absolute value of b."""
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


def _self_check():
    torch.manual_seed(0)
    B, H, T, K, V = 2, 3, 150, 24, 20
    q, k, v = (torch.randn(B, H, T, n, dtype=torch.float64) for n in (K, K, V))
    i, f = torch.randn(B, H, T, dtype=torch.float64), torch.randn(B, H, T, dtype=torch.float64) + 4
    truth, end = mlstm_recurrent(q, k, v, i, f)
    print(f"mLSTM, B={B} H={H} T={T} K={K} V={V}, largest error relative to the float64 recurrence")
    print(f"{'form':<24}{'output':>10}{'C':>10}{'n':>10}")
    forms = {"parallel": mlstm_parallel, "chunkwise, chunks of 64": mlstm_chunkwise,
             "chunkwise, chunks of 3": lambda *a: mlstm_chunkwise(*a, chunk_size=3)}
    for dtype in (torch.float64, torch.float32):
        bar = 1e-10 if dtype == torch.float64 else 1e-5
        for name, form in forms.items():
            h, state = form(*(x.to(dtype) for x in (q, k, v, i, f)))
            errors = [relative_error(h, truth),
                      *(relative_error(a, e) for a, e in zip(state[:2], end))]
            assert max(errors) < bar, f"{name} in {dtype} is off: {errors}"
            print(f"{name:<24}" + "".join(f"{e:>10.1e}" for e in errors) + f"   {str(dtype)[6:]}")
    block = MLSTMBlock(96).double()
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
