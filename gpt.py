"""GPT: causal self-attention with a key-value cache, and its block. LRAM's Transformer baseline.

Source: GPT-2 (Radford et al., 2019) with pre-LayerNorm blocks, as in the Decision Transformer
(Chen et al., 2021, arXiv 2106.01345) and the baseline "DT" of LRAM (arXiv 2410.22391).

    python gpt.py      # checks the two forms against each other and reports what it proved

Its state is the cache of all keys and values since the sequence began: exact recall, at a cost
that grows with every token, and bounded by the positions it has learned. Two ways to compute it:

    attention_recurrent   one token after the other against the cache   the definition
    attention_parallel    all tokens at once                            training, prefill, acting

Glossary (the same letters in every file of this project)
    B batch   T tokens   D model width   H heads   dh = D/H head width   S cache size in tokens
    q, k, v    (B, H, T, dh)
    state      (keys (B, H, S, dh), values (B, H, S, dh), used (B,)): a buffer of fixed size; row b
               holds used[b] tokens. Rows may be of different age, so each can restart by itself.

Not included: rotary or relative positions, grouped queries, weight tying.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


# -------------------------------------------------------------------------------- attention, twice
def attention_initial_state(q, capacity):
    """An empty cache for q (B, H, T, dh) with room for `capacity` tokens."""
    B, H, _, dh = q.shape
    empty = torch.zeros(B, H, capacity, dh, dtype=q.dtype, device=q.device)
    return empty, empty, torch.zeros(B, dtype=torch.long, device=q.device)


def _append(cache, new, used):
    """Write new (B, H, T, dh) into cache (B, H, S, dh) at each row's own position used (B,)."""
    rows = torch.arange(len(new), device=new.device)[:, None]                       # (B, 1)
    at = used[:, None] + torch.arange(new.shape[2], device=new.device)              # (B, T)
    # cache[rows, :, at] = new, as a new tensor (which torch.compile turns back into a write)
    return torch.ops.aten.index_put(cache, [rows, None, at], new.transpose(1, 2).to(cache.dtype))


def attention_recurrent(q, k, v, state=None, capacity=None):
    """Causal attention, one token after another: the definition every other form is tested against.

    q, k, v (B, H, T, dh); state: the cache of a previous call, None for an empty one of `capacity`
    tokens (default T). Returns y (B, H, T, dh) and the cache. More tokens than its capacity are an
    IndexError or RuntimeError of the write.
    """
    keys, values, used = (attention_initial_state(q, capacity or q.shape[2])
                          if state is None else state)
    slots = torch.arange(keys.shape[2], device=q.device)
    y = []
    for t in range(q.shape[2]):
        keys, values = (_append(keys, k[:, :, t:t + 1], used),
                        _append(values, v[:, :, t:t + 1], used))
        used = used + 1
        # y_t = softmax(q_t k_s^T / sqrt(dh)) v_s over the tokens s <= t
        score = (keys @ q[:, :, t, :, None])[..., 0] * q.shape[-1] ** -0.5          # (B, H, S)
        score = score.masked_fill(slots >= used[:, None, None], -torch.inf)
        y.append((score.softmax(-1)[..., None, :] @ values)[..., 0, :])             # (B, H, dh)
    return torch.stack(y, dim=2), (keys, values, used)


def attention_parallel(q, k, v, state=None, capacity=None):
    """Causal attention, all tokens at once. Same arguments and results as the definition."""
    B, H, T, dh = q.shape
    if state is None:                   # nothing in the cache: attend among the T tokens alone
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        pad = (0, 0, 0, (capacity or T) - T)
        used = torch.full((B,), T, dtype=torch.long, device=q.device)
        return y, (F.pad(k, pad), F.pad(v, pad), used)
    keys, values, used = state
    keys, values = _append(keys, k, used), _append(values, v, used)
    # token t of row b sees the slots s <= used[b] + t
    slots, new = torch.arange(keys.shape[2], device=q.device), torch.arange(T, device=q.device)
    visible = slots <= (used[:, None] + new)[:, None, :, None]                      # (B, 1, T, S)
    y = F.scaled_dot_product_attention(q, keys.to(q.dtype), values.to(q.dtype), attn_mask=visible)
    return y, (keys, values, used + T)


# -------------------------------------------------------------------------------------- the blocks
class LearnedPositions(nn.Module):
    """x (B, T, D) -> x + position embedding: all that tells a Transformer the order of its tokens.

    A block like the others (y, state = f(x, state)): its state is (used (B,)), the tokens a row
    has seen. Raises ValueError when a row would pass `capacity` (checked on a CPU; a GPU's own
    assertion fires there).
    """

    def __init__(self, dim, capacity):
        super().__init__()
        self.embedding = nn.Embedding(capacity, dim)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def initial_state(self, batch_size, device=None, dtype=torch.float32):
        """The state of batch_size fresh sequences."""
        return (torch.zeros(batch_size, dtype=torch.long, device=device),)

    def forward(self, x, state=None, final_state=True):
        """x (B, T, D), previous state or None -> y (B, T, D), final state (None if not wanted)."""
        B, T, _ = x.shape
        (used,) = self.initial_state(B, x.device) if state is None else state
        capacity = self.embedding.num_embeddings
        if (x.device.type == "cpu" and not torch.compiler.is_compiling()
                and int(used.max()) + T > capacity):
            raise ValueError(f"gpt: {int(used.max())} tokens in the cache and {T} new ones "
                             f"exceed its {capacity} positions; reset the state, or act with "
                             "--context window or stagger")
        position = used[:, None] + torch.arange(T, device=x.device)                 # (B, T)
        return x + self.embedding(position), (used + T,) if final_state else None


class GPTBlock(nn.Module):
    """Residual attention followed by a residual MLP of width 4D, x (B, T, D) -> (B, T, D).

    State: (keys (B, H, S, dh), values (B, H, S, dh), used (B,)): 2 S D numbers per row.
    capacity: S, the context in tokens.
    num_blocks: blocks in the whole backbone (scales the output initialisation).
    """

    def __init__(self, dim, num_heads, capacity, num_blocks=1, dropout=0.0):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"gpt: {num_heads} heads do not divide the model width {dim}")
        self.num_heads, self.capacity = num_heads, capacity
        self.norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp_up, self.mlp_down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.qkv, self.out, self.mlp_up, self.mlp_down):
            # two writes to the residual stream per block
            writes = linear in (self.out, self.mlp_down)
            nn.init.normal_(linear.weight, std=0.02 / (math.sqrt(2 * num_blocks) if writes else 1))
            nn.init.zeros_(linear.bias)

    def initial_state(self, batch_size, device=None, dtype=torch.float32):
        """The state of batch_size fresh sequences."""
        H, dh = self.num_heads, self.out.in_features // self.num_heads
        q = torch.empty(batch_size, H, 0, dh, device=device, dtype=dtype)
        return attention_initial_state(q, self.capacity)

    def forward(self, x, state=None, final_state=True):
        """x (B, T, D), previous state or None -> y (B, T, D), final state (None if not wanted)."""
        B, T, D = x.shape
        # x + W_o attention(W_qkv LN(x))
        qkv = self.qkv(self.norm(x)).view(B, T, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # (B, H, T, dh) each
        y, state = attention_parallel(q, k, v, state, self.capacity)
        x = x + self.dropout(self.out(y.transpose(1, 2).reshape(B, T, D)))
        # x + W_2 gelu(W_1 LN(x))
        x = x + self.dropout(self.mlp_down(F.gelu(self.mlp_up(self.mlp_norm(x)))))
        return x, state if final_state else None


# -------------------------------------------------------------------------------------- self-check
def relative_error(a, b):
    """Largest absolute difference over the largest absolute value of b."""
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


def _self_check():
    torch.manual_seed(0)
    B, H, T, dh = 2, 3, 75, 20
    q, k, v = torch.randn(3, B, H, T, dh, dtype=torch.float64)
    truth, cache = attention_recurrent(q, k, v)
    print(f"attention, B={B} H={H} T={T} dh={dh}, largest error relative to the float64 recurrence")
    for dtype, bar in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        y, state = attention_parallel(*(x.to(dtype) for x in (q, k, v)))
        errors = relative_error(y, truth), relative_error(state[0], cache[0])
        assert max(errors) < bar, errors
        print(f"attention_parallel      output {errors[0]:.1e}   cache {errors[1]:.1e}   "
              f"{str(dtype)[6:]}")
    blocks = nn.Sequential(LearnedPositions(96, 30), GPTBlock(96, 4, 30)).double()
    x = torch.randn(2, 30, 96, dtype=torch.float64)
    whole = blocks[1](blocks[0](x)[0])[0]
    position, cache, parts = None, None, []
    for part in x.split([1, 3, 7, 19], dim=1):
        y, position = blocks[0](part, position)
        y, cache = blocks[1](y, cache)
        parts.append(y)
    error = relative_error(torch.cat(parts, 1), whole)
    assert error < 1e-10, error
    print(f"block: 30 tokens in calls of 1, 3, 7 and 19 equal one call of 30 ({error:.0e})")


if __name__ == "__main__":
    _self_check()
