"""LRAM: encoders, the 3-token stream, any of four block families, one shared action head, acting.

Source: A Large Recurrent Action Model (Schmied et al., 2024, arXiv 2410.22391), section 3 and
appendix C.

    python lram.py              # builds every backbone at every size, prints parameters and state
                                # bytes, checks act()
    python lram.py --gradients  # norm of the first gradient on a window of zeros, up to 206m

    world --(observation, reward)--> tokens --> backbone --> action distribution --(action)--> world

One environment step is one chunk of tokens [r_{t-1}, s_t, R_t]: the reward of the step before (0
at first), the observation, the return-to-go; the action a_t is read off the last of them. No
action enters the context (the copycat problem), so a policy that acts sees exactly the stream that
it was trained on. Everything that holds a sequence obeys one contract, y, state = f(x, state), for
any number of tokens: training passes a window of 3C tokens with state None, acting passes 3 tokens
and the state of the step before.

Glossary (the same letters in every file of this project)
    B batch    C context in environment steps    T = 3C tokens    D model width    H heads
    S observation width    A action dimensions of a task (at most 8)
    R_t        return-to-go, the return still to be collected
    card       what is known of a task (task.json): reward scale, target return, action spec,
               statistics, scores

Not included: export for a GPU.
"""
import copy
import importlib.util
import itertools
import json
import os
import pickle
import shutil
import sys
import time
import warnings
import weakref
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FunctionType

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from gpt import GPTBlock, LearnedPositions
from mamba import MambaBlock, selective_scan
from mlstm import MLSTMBlock, mlstm_chunkwise, precise, settled
from slstm import SLSTMBlock, slstm_scan

STATE_WIDTH = 204           # observations are zero-padded to this width: the union of DMControl's
MAX_DISCRETE = 18           # actions of a full Atari joystick
MAX_DIMS, BINS = 8, 256     # continuous action dimensions and bins of each (the paper's)
LARGEST_STATE = 10.0        # standardised observations are clipped to plus and minus this
BACKBONES = ("mlstm", "xlstm", "slstm", "mamba", "gpt")
TOKENS = ("a", "r", "s", "rtg")

# (D, recurrent layers, gpt layers, gpt heads, sLSTM layers of xLSTM[7:1]); 16m to 206m are the
# paper's. "-half": half the layers at the same number of parameters, for latency. gpt has no half
# variant.
SIZES = {
    "tiny": (96, 4, 2, 4, (1,)),
    "16m": (512, 8, 4, 8, (1,)),
    "48m": (768, 12, 6, 12, (1, 3)),
    "110m": (1024, 16, 8, 16, (1, 3)),
    "206m": (1280, 20, 10, 20, (1, 3, 5)),
    "408m": (1536, 28, 14, 24, (1, 3, 5)),
    "16m-half": (704, 4, None, None, (1,)),
    "48m-half": (1064, 6, None, None, (1,)),
    "110m-half": (1432, 8, None, None, (1,)),
    "206m-half": (1792, 10, None, None, (1, 3)),
}


@dataclass
class Config:
    """What shapes the model, written into every checkpoint. None: taken from the size (SIZES)."""
    backbone: str = "mlstm"
    size: str = "tiny"
    dim: int | None = None              # D
    layers: int | None = None
    heads: int | None = None            # of mLSTM, sLSTM (4 by default) and attention
    slstm_at: tuple | None = None       # which layers of xlstm are sLSTM blocks, counted from 0
    context: int = 50                   # C: window of training; gpt holds no more than this
    tokens: tuple = ("r", "s", "rtg")   # one step's tokens, in order; "a" in front: the last action
    dropout: float = 0.0
    cnn: tuple = (16, 32, 32)           # channels of the three image stages
    bins: int = BINS                    # of a continuous action dimension
    standardise: bool = False           # per-task mean 0 and deviation 1 of observations

    def __post_init__(self):
        if self.backbone not in BACKBONES:
            raise ValueError(f"backbone {self.backbone!r} does not exist; "
                             f"choose from {', '.join(BACKBONES)}")
        if self.size not in SIZES:
            raise ValueError(f"size {self.size!r} does not exist; choose from {', '.join(SIZES)}")
        dim, recurrent, gpt_layers, gpt_heads, slstm_at = SIZES[self.size]
        is_gpt = self.backbone == "gpt"
        if is_gpt and gpt_layers is None:
            raise ValueError(f"size {self.size!r} is for recurrent backbones; "
                             f"gpt has {self.size[:-5]!r}")
        self.dim = dim if self.dim is None else self.dim
        self.layers = (gpt_layers if is_gpt else recurrent) if self.layers is None else self.layers
        self.heads = (gpt_heads if is_gpt else 4) if self.heads is None else self.heads
        everywhere = range(self.layers)
        default_at = {"xlstm": [layer for layer in slstm_at if layer in everywhere],
                      "slstm": everywhere}.get(self.backbone, ())
        self.slstm_at = tuple(default_at if self.slstm_at is None else self.slstm_at)
        self.tokens, self.cnn = tuple(self.tokens), tuple(self.cnn)
        if self.bins < 2:
            raise ValueError(f"bins {self.bins}: an action needs at least 2")
        if any(layer not in everywhere for layer in self.slstm_at):
            raise ValueError(f"slstm_at {self.slstm_at}: "
                             f"layers are numbered 0 to {self.layers - 1}")
        if list(self.tokens) != [x for x in TOKENS if x in self.tokens] or "s" not in self.tokens:
            raise ValueError(f"tokens {self.tokens}: "
                             f"give a part of {TOKENS} that holds 's', in this order")

    @property
    def max_tokens(self):
        """Most tokens in C steps (an action is a token per dimension): capacity of gpt's cache."""
        return self.context * (len(self.tokens) + ("a" in self.tokens) * (MAX_DIMS - 1))


# ------------------------------------------------------------------------------------ the backbone
class Backbone(nn.Module):
    """Blocks and a final norm, x (B, T, D) -> y (B, T, D); state: a tuple of the blocks' states."""

    def __init__(self, config):
        super().__init__()
        D, L, H, p = config.dim, config.layers, config.heads, config.dropout
        if config.backbone == "gpt":
            blocks = [LearnedPositions(D, config.max_tokens)]
            blocks += [GPTBlock(D, H, config.max_tokens, L, p) for _ in range(L)]
            self.norm = nn.LayerNorm(D)
        elif config.backbone == "mamba":
            blocks = [MambaBlock(D, L, p) for _ in range(L)]
            self.norm = nn.RMSNorm(D, eps=1e-5)
        else:
            blocks = [SLSTMBlock(D, H, L, layer, p) if layer in config.slstm_at else
                      MLSTMBlock(D, H, L, p) for layer in range(L)]
            self.norm = nn.LayerNorm(D, bias=False)
        self.blocks = nn.ModuleList(blocks)

    def initial_state(self, batch_size, device=None, dtype=torch.float32):
        """The state of batch_size fresh sequences."""
        return tuple(block.initial_state(batch_size, device, dtype) for block in self.blocks)

    def forward(self, x, state=None, final_state=True):
        """x (B, T, D), previous state or None -> y (B, T, D), final state (None if not wanted)."""
        states = []
        for block, block_state in zip(self.blocks, state or [None] * len(self.blocks)):
            x, block_state = block(x, block_state, final_state)
            states.append(block_state)
        return self.norm(x), tuple(states) if final_state else None

    def reset(self, state, done):
        """Restart the rows where done (B,) is true. torch.where, not a product: -inf * 0 is NaN."""
        pick = lambda new, old: torch.where(done.view(-1, *[1] * (old.dim() - 1)),
                                            new.to(old.dtype), old)
        # one fresh row serves all; of a cache only `used` restarts: what is behind is never seen
        return tuple((*old[:2], old[2].masked_fill(done, 0)) if isinstance(block, GPTBlock) else
                     tuple(map(pick, block.initial_state(1, done.device, old[-1].dtype), old))
                     for block, old in zip(self.blocks, state))


class ImpalaCNN(nn.Module):
    """Image encoder of IMPALA (Espeholt et al., 2018): (N, 1, 64, 64) -> (N, D).

    Three stages of conv, max-pool and two residual units; PyTorch's default initialisation.
    """

    def __init__(self, dim, channels=(16, 32, 32)):
        super().__init__()
        stages, c_in = [], 1
        for c in channels:
            convs = [nn.Conv2d(c_in, c, 3, padding=1)] + \
                [nn.Conv2d(c, c, 3, padding=1) for _ in range(4)]
            stages.append(nn.ModuleList(convs))
            c_in = c
        self.stages = nn.ModuleList(stages)
        self.out = nn.Linear(c_in * 8 * 8, dim)

    def forward(self, image):
        """uint8 (N, 1, 64, 64), or float if standardised, -> (N, D)."""
        x = image.to(self.out.weight.dtype)
        x = x / 255 if image.dtype == torch.uint8 else x
        for first, *residual in self.stages:
            x = F.max_pool2d(first(x), 3, stride=2, padding=1)          # (N, c, 32 | 16 | 8, ...)
            for a, b in (residual[:2], residual[2:]):
                x = x + b(F.relu(a(F.relu(x))))
        return F.relu(self.out(F.relu(x).flatten(1)))


# --------------------------------------------------------------------------------------- the model
class LRAM(nn.Module):
    """Observations, rewards, returns-to-go in, action logits out, any backbone; state in, out."""

    def __init__(self, config):
        super().__init__()
        D, self.config = config.dim, config
        self.encode_state, self.encode_image = nn.Linear(STATE_WIDTH, D), ImpalaCNN(D, config.cnn)
        self.encode_reward, self.encode_rtg = nn.Linear(1, D), nn.Linear(1, D)
        self.head = nn.Linear(D, MAX_DISCRETE + MAX_DIMS * config.bins)
        for linear in (self.encode_state, self.encode_reward, self.encode_rtg, self.head):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        if "a" in config.tokens:    # a row per discrete action or (dimension, bin), as in the head
            self.encode_action = nn.Embedding(self.head.out_features, D)
            nn.init.normal_(self.encode_action.weight, std=0.02)
        self.token_norm = nn.LayerNorm(D)
        # No token may be the zero vector (r = 0, R = 0, s = 0, no last action): the Jacobian of a
        # LayerNorm there is 1 / sqrt(eps) = 316, and blocks with a multiplicative gate compound it
        # layer by layer until the first gradient of a deep model is infinite.
        for module in (self.encode_state, self.encode_reward, self.encode_rtg, self.token_norm):
            nn.init.normal_(module.bias, std=0.02)
        self.backbone = Backbone(config)

    def tokens(self, obs, reward, rtg, last_action=None):
        """One chunk of tokens per step, [a_{t-1}, r_{t-1}, s_t, R_t] or the part in config.tokens.

        obs (B, C, S) float or (B, C, 1, 64, 64) uint8 or standardised; reward = r_{t-1} and rtg =
        R_t (B, C), both divided by the reward scale; last_action (B, C, A) rows of encode_action,
        -1 for none. -> (B, C, tokens per step, D). ValueError for S > 204.
        """
        parts, dtype = [], self.encode_reward.weight.dtype
        reward, rtg = reward.to(dtype), rtg.to(dtype)
        if "a" in self.config.tokens:
            known = (last_action >= 0)[..., None]                       # (B, C, A, 1)
            parts.append(self.encode_action(last_action.clamp(min=0)) * known)
        if "r" in self.config.tokens:
            parts.append(precise(self.encode_reward, reward[..., None])[:, :, None])
        if obs.dim() == 3 and obs.shape[-1] > STATE_WIDTH:      # F.pad would cut it in silence
            raise ValueError(f"observations have {obs.shape[-1]} numbers, the model reads at most "
                             f"{STATE_WIDTH}: leave some out")
        if obs.dim() == 5:
            s = self.encode_image(obs.flatten(0, 1)).view(*obs.shape[:2], -1)
        else:
            obs = F.pad(obs.to(dtype), (0, STATE_WIDTH - obs.shape[-1]))
            s = precise(self.encode_state, obs)
        parts.append(s[:, :, None])                                     # (B, C, 1, D)
        if "rtg" in self.config.tokens:
            parts.append(precise(self.encode_rtg, rtg[..., None])[:, :, None])
        return self.token_norm(torch.cat(parts, dim=2))

    def forward(self, obs, reward, rtg, action_dims, last_action=None, state=None, at=-1,
                final_state=True):
        """The arguments of tokens(); action_dims: A for continuous actions, 0 for discrete ones.

        Returns logits (B, C, A, bins) or (B, C, 18) and the state after the last token. The head is
        one Linear for all tasks; only the rows that these tasks read are computed. at: the token of
        each step that is read, the last for acting; a slice reads several, logits (B, C, tokens,
        ...). final_state False: the state is not computed, None is returned (training).
        """
        tokens = self.tokens(obs, reward, rtg, last_action)             # (B, C, n, D)
        y, state = self.backbone(tokens.flatten(1, 2), state, final_state)      # (B, C n, D)
        y = y.view(tokens.shape)[:, :, at]                              # (B, C, D)
        logits = self.readout(y, action_dims)
        # softmax in float32 at least
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return (logits if action_dims == 0 else logits.unflatten(-1, (action_dims, -1))), state

    def readout(self, y, action_dims):
        """y (B, C, D) -> (B, C, A bins or 18), by the rows of the head that these actions need."""
        rows = head_rows(action_dims, self.config.bins)
        return F.linear(y, self.head.weight[rows], self.head.bias[rows])

    def act(self, obs, reward, rtg, action_dims, last_action=None, state=None, done=None):
        """One environment step for B environments: the chunk of one step, through the state.

        obs (B, S) or (B, 1, 64, 64), reward, rtg (B,), last_action (B, A); done (B,) restarts rows
        first. Returns logits (B, A, bins) or (B, 18) and the new state.
        """
        if done is not None and state is not None:
            state = self.backbone.reset(state, done)
        last_action = None if last_action is None else last_action[:, None]
        logits, state = self(obs[:, None], reward[:, None], rtg[:, None], action_dims,
                             last_action, state)
        return logits[:, 0], state

    def parameter_groups(self, weight_decay):
        """For AdamW: decay on matrices; none on biases, norms, recurrent weights, Mamba's A_log."""
        decay, rest = [], []
        for name, p in self.named_parameters():
            leaf = name.split(".")[-1]
            (decay if p.dim() >= 2 and leaf not in ("bias", "R", "A_log") else rest).append(p)
        return [{"params": decay, "weight_decay": weight_decay},
                {"params": rest, "weight_decay": 0.0}]


# ----------------------------------------------------------------------------------- actions, loss
def head_rows(action_dims, bins=BINS):
    """The rows of the head for A continuous dimensions, or for discrete actions (0)."""
    return slice(0, MAX_DISCRETE) if action_dims == 0 else \
        slice(MAX_DISCRETE, MAX_DISCRETE + action_dims * bins)


def part_of_head(head, rows):
    """Some rows of the head (a slice) as a Linear of their own, frozen."""
    part = nn.Linear(head.in_features, rows.stop - rows.start, device=head.weight.device)
    part.requires_grad_(False).weight.copy_(head.weight.detach()[rows])
    part.bias.copy_(head.bias.detach()[rows])
    return part


def action_to_bin(action, bins=BINS):
    """Continuous actions in [-1, 1] -> bins 0 to bins - 1, uniform. Any shape, tensor or array."""
    return ((action + 1) * (bins / 2)).clip(0, bins - 1).astype(np.int64) \
        if isinstance(action, np.ndarray) \
        else ((action + 1) * (bins / 2)).clamp(0, bins - 1).long()


def bin_to_action(index, bins=BINS):
    """Bins -> the centres of the bins, in (-1, 1)."""
    return (index + 0.5) * (2 / bins) - 1


def action_rows(action, bins=BINS):
    """Actions (..., A) float or (...) int -> (..., A or 1) rows of head and action embedding."""
    if np.issubdtype(action.dtype, np.integer):
        return action[..., None].astype(np.int64)
    return MAX_DISCRETE + bins * np.arange(action.shape[-1]) + action_to_bin(action, bins)


def action_loss(logits, target, mask, soft_sigma=0.0):
    """Mean cross-entropy over the valid (step, dimension) pairs, in nats.

    logits (B, C, 18) with target, mask (B, C), or (B, C, A, bins) with target, mask (B, C, A).
    target: action or bin; mask: bool, false on padding. soft_sigma > 0 spreads a bin's target over
    its neighbours as a Gaussian of that many bins (not in the paper): bins next to the right one
    are nearly right, which one-hot targets hide.
    """
    log_p = logits[mask].log_softmax(-1)                                # (valid pairs, classes)
    target = target[mask]
    if soft_sigma and logits.dim() == 4:
        bins = torch.arange(logits.shape[-1], device=logits.device, dtype=logits.dtype)
        soft = torch.softmax(-0.5 * ((bins - target[:, None]) / soft_sigma) ** 2, dim=-1)
        return -(soft * log_p).sum(-1).mean()
    return F.nll_loss(log_p, target)


# ------------------------------------------------------------------------------------------ acting
def prepare_states(states, card, standardise):
    """Observations as the model reads them: minus the task's mean and over its deviation, if asked.

    states (..., S) or uint8 images (..., 1, 64, 64) -> float32, images that are not standardised
    stay uint8. Used on the windows of training and while acting alike.
    """
    if standardise:     # per coordinate or pixel (data.statistics); an outlier stays in bounds
        mean, std = (np.asarray(card[key], dtype=np.float32) for key in ("state_mean", "state_std"))
        return ((states.astype(np.float32) - mean) / std).clip(-LARGEST_STATE, LARGEST_STATE)
    return states if card["observation"]["kind"] == "image" else states.astype(np.float32)


class Agent:
    """A trained model acting in B environments of one task: keeps state, return-to-go and context.

    context says what happens in episodes longer than the windows of training (C steps):
        carry     the state runs on through the whole episode, cost constant (recurrent backbones)
        window    the last C steps recomputed every step, C times the cost (any; the public code's)
        stagger   two states, each restarted every C steps, half a window apart; the older acts:
                  constant cost, context between C/2 and C (any; the default of gpt)
    """

    def __init__(self, model, card, context=None, target_return=None, temperature=0.0, seed=0):
        self.model, self.card, self.config = model.eval(), card, model.config
        self.context = context or ("stagger" if self.config.backbone == "gpt" else "carry")
        if self.context not in ("carry", "window", "stagger"):
            raise ValueError(f"context {self.context!r} does not exist; "
                             "choose carry, window or stagger")
        self.device = next(model.parameters()).device
        self.action_dims = card["action"].get("dims", 0)
        self.scale = card["reward_scale"]
        target = card["target_return"] if target_return is None else target_return
        self.target = np.float32(target / self.scale)
        self.temperature = temperature
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def begin(self, batch_size):
        """Forget everything; batch_size environments start afresh."""
        self.step = np.zeros(batch_size, dtype=np.int64)    # steps since each row's episode began
        self.rtg = np.full(batch_size, self.target, dtype=np.float32)
        self.last_action = None
        self.state, self.window = None, None

    @torch.no_grad()
    def act(self, obs, reward, done, lost_life=None):
        """Actions for the observations obs (B, ...), after the raw rewards (B,) of the step before.

        done (B,): the rows whose episode has just begun (their reward does not count). lost_life
        (B,): the rows that lost a life in the step before, where trajectories of training end: the
        return-to-go restarts at the target; the state runs on, and the reward is seen. Returns int
        (B,) or float32 (B, A) in [-1, 1]; the logits stay in self.logits.
        """
        reward = self.as_seen(np.where(done, 0.0, reward))
        self.step = np.where(done, 0, self.step + 1)
        if not self.card["constant_rtg"]:
            self.rtg = self.rtg - reward
        begun = done if lost_life is None else done | lost_life
        self.rtg = np.where(begun, self.target, self.rtg).astype(np.float32)
        inputs = self._inputs(obs, reward, done)
        run = {"carry": self._carry, "window": self._window, "stagger": self._stagger}[self.context]
        # without a row to restart, the state need not be copied (a fifth of a small batch's time);
        # the compiled policy restarts rows inside its one function
        restart = done.any() or isinstance(self.model, FastPolicy)
        self.logits = run(*inputs, torch.as_tensor(done, device=self.device) if restart else None)
        action = self._decode(self.logits)
        self.last_action = action_rows(action, self.config.bins)
        return action

    def _inputs(self, obs, reward, fresh):
        """What the model reads, as tensors: observation, reward, return-to-go, last action (-1
        where there is none, and in the rows `fresh`).
        """
        shape = len(reward), max(self.action_dims, 1)
        last = np.full(shape, -1) if self.last_action is None else self.last_action
        last = np.where(fresh[:, None], -1, last)
        obs = prepare_states(np.asarray(obs), self.card, self.config.standardise)
        return [torch.as_tensor(x, device=self.device) for x in (obs, reward, self.rtg, last)]

    def as_seen(self, reward):
        """Raw rewards -> the model's: clipped for Atari, over the domain's scale, float32."""
        reward = np.clip(reward, -1, 1) if self.card["clip_rewards"] else reward
        return (reward / self.scale).astype(np.float32)

    def _carry(self, obs, reward, rtg, last, done):
        logits, self.state = self.model.act(obs, reward, rtg, self.action_dims, last,
                                            self.state, done)
        return logits

    def _stagger(self, obs, reward, rtg, last, done):
        logits, self.state = stagger(self.model, torch.as_tensor(self.step, device=self.device),
                                     obs, reward, rtg, self.action_dims, last, self.state)
        return logits

    def _window(self, obs, reward, rtg, last, done):
        # each row's last C steps, from the left; right of the newest nothing is seen (causality)
        C, B = self.config.context, len(obs)
        if self.window is None:
            self.window = [torch.zeros(B, C, *x.shape[1:], dtype=x.dtype, device=x.device)
                           for x in (obs, reward, rtg, last)]
        step = torch.as_tensor(self.step, device=self.device)
        full, at = step >= C, step.clamp(max=C - 1)
        rows = torch.arange(B, device=self.device)
        for j, x in enumerate((obs, reward, rtg, last)):
            buffer = self.window[j]
            wide = full.view(-1, *[1] * (buffer.dim() - 1))
            buffer = torch.where(wide, buffer.roll(-1, dims=1), buffer)
            buffer[rows, at] = x
            self.window[j] = buffer
        length = int(at.max()) + 1
        obs, reward, rtg, last = (x[:, :length] for x in self.window)
        logits, _ = self.model(obs, reward, rtg, self.action_dims, last, final_state=False)
        return logits[rows, at]

    def _decode(self, logits):
        """Logits (B, A, bins) or (B, 18) -> actions: the likeliest, or sampled at a temperature."""
        if self.action_dims == 0:
            logits = logits[:, :self.card["action"]["n"]]
        if self.temperature > 0:
            p = (logits / self.temperature).softmax(-1)
            index = torch.multinomial(p.flatten(0, -2), 1,
                                      generator=self.generator).view(p.shape[:-1])
        else:
            index = logits.argmax(-1)
        index = index.cpu().numpy()
        if self.action_dims:
            return bin_to_action(index, self.config.bins).astype(np.float32)
        return index


class InContextAgent(Agent):
    """An Agent that remembers the episodes before, played one after the other in B equal worlds.

    Trained on windows of whole consecutive episodes (train.py --align), it sees what a window
    shows: the reward that ended an episode is the first that the next one sees, and an episode that
    lies behind carries the return-to-go that it came to, not the target that was asked for. As a
    state cannot forget what it has read, the finished episode is read once more, with its true
    returns-to-go, from the state before it (one parallel pass). context:
        carry     from the state after all episodes before (recurrent backbones)
        pair      from a fresh state: the episode before is all that is remembered, as in training
                  on windows of two (any; the default of gpt)
    """

    def __init__(self, model, card, context=None, **options):
        super().__init__(model, card, **options)
        is_gpt = self.config.backbone == "gpt"
        self.context = context or ("pair" if is_gpt else "carry")
        if self.context not in ("carry", "pair") or is_gpt and self.context == "carry":
            raise ValueError(f"context {self.context!r} with {self.config.backbone}: choose pair"
                             + ("" if is_gpt else " or carry"))

    def begin(self, batch_size):
        """Forget everything."""
        super().begin(batch_size)
        self.before, self.seen = None, []       # state before this episode, its steps so far

    @torch.no_grad()
    def act(self, obs, reward, done, lost_life=None):
        """As Agent.act; done marks the first step of an episode, for all rows at once. Dark-Room
        has no lives: lost_life is not read.
        """
        if done.any() and not done.all():
            raise ValueError("in-context episodes begin and end together, done was true for "
                             f"{done.sum()} of {len(done)}: play worlds of equal length")
        reward = self.as_seen(reward)
        self.rtg = self.rtg - reward
        if done.any():
            self._read_again(reward)
            self.rtg = np.full_like(self.rtg, self.target)
        step = self._inputs(obs, reward, np.zeros_like(done))   # an action outlives its episode
        self.seen.append(step)
        self.logits, self.state = self.model.act(*step[:3], self.action_dims, step[3], self.state)
        action = self._decode(self.logits)
        self.last_action = action_rows(action, self.config.bins)
        return action

    def _read_again(self, reward):
        """The finished episode, which `reward` (B,) ended, with the return-to-go it came to."""
        if not self.seen:
            return
        obs, rewards, _, last = (torch.stack(x, dim=1) for x in zip(*self.seen))    # (B, T, ...)
        final = torch.as_tensor(reward, device=self.device)[:, None]
        # R_t = r_t + ... + r_T, and rewards[:, t] is r_{t-1}
        collected = torch.cat([rewards[:, 1:], final], dim=1)
        rtg = collected.flip(1).cumsum(1).flip(1)                                   # (B, T)
        _, self.state = self.model(obs, rewards, rtg, self.action_dims, last, self.before)
        self.before, self.seen = self.state if self.context == "carry" else None, []


def stagger(model, step, obs, reward, rtg, action_dims, last_action, state):
    """One step of B environments with two states each, restarted in turn; the older one acts.

    step (B,): steps since each episode began; the others as in LRAM.act, state with 2B rows.
    Returns the logits of B rows and the new state.
    """
    # rows 0..B-1 restart at steps 0, C, 2C, ...; rows B..2B-1 half a window later;
    # a row's age is its context
    C = model.config.context
    age = torch.stack([step % C, torch.where(step < C // 2, step, (step - C // 2) % C)])  # (2, B)
    twice = [torch.cat([x, x]) for x in (obs, reward, rtg)]
    logits, state = model.act(*twice, action_dims, torch.cat([last_action, last_action]), state,
                              (age == 0).flatten())
    first, second = logits.chunk(2)
    older = (age[0] >= age[1]).view(-1, *[1] * (first.dim() - 1))
    return torch.where(older, first, second), state


# Settings of the CPU compiler; in-place buffers give wrong numbers in 2.13 where C is returned
INDUCTOR = dict(freezing=True, max_autotune=True, inplace_buffers=False,
                max_autotune_report_choices_stats=False, autotune_num_choices_displayed=0)


def check_compiler():
    """ValueError where there is no C++ compiler."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        raise ValueError("the fast path compiles for this CPU and needs g++ (or another C++ "
                         "compiler, named in CXX)")


# ------------------------------------------------------------------------------------------ export
class Controller(nn.Module):
    """What a control loop calls: action, logits, state = controller(obs, reward, state).

    An Agent's greedy policy as a function of tensors, for one environment of its task. obs (1, S)
    float32 or (1, 1, 64, 64) uint8, as the world gives it; reward (1,) float32, raw, of the step
    before (0 at first). Returns the action, float32 (1, A) or int64 (1,), logits (1, A, bins) or
    (1, n), and the new state; `start` is the state in which an episode begins. A state is a list:
    return-to-go over the reward scale (1,), steps so far (1,), the last action's rows (1, A), then
    the backbone's tensors. After a lost life the return-to-go restarts: give state[0] = start[0]
    plus the reward, as the model sees it.
    """

    def __init__(self, agent):
        super().__init__()
        full = agent.config.backbone == "gpt" and agent.context == "carry"      # after C steps
        if full or agent.context == "window" or agent.temperature > 0:
            raise ValueError("an exported policy acts greedily, through a state of constant size; "
                             "leave out --temperature and --context "
                             f"{'carry' if full else 'window'}")
        self.card, self.action_dims, self.scale = agent.card, agent.action_dims, agent.scale
        self.target = float(agent.target)
        self.staggered, self.standardise = agent.context == "stagger", agent.config.standardise
        self.model = copy.deepcopy(agent.model).cpu().requires_grad_(False)
        use_kernels(self.model, "torch")
        # what this task needs and no more; its rows of the head are a Linear of their own, which
        # the compiler lays out for few tokens
        rows = head_rows(self.action_dims, self.model.config.bins)
        rows = rows if self.action_dims else slice(0, self.card["action"]["n"])
        head = part_of_head(self.model.head, rows)
        self.model.head, self.model.readout = head, lambda y, action_dims: head(y)
        image = self.card["observation"]["kind"] == "image"
        setattr(self.model, "encode_state" if image else "encode_image", None)
        if self.standardise:
            self.register_buffer("mean", torch.tensor(self.card["state_mean"]))
            self.register_buffer("std", torch.tensor(self.card["state_std"]))
        fresh = self.model.backbone.initial_state(1 + self.staggered)
        self.parts = [len(part) for part in fresh]
        self.start = [torch.full((1,), self.target), torch.zeros(1, dtype=torch.long),
                      torch.full((1, max(self.action_dims, 1)), -1)]
        self.start += [x.clone() for part in fresh for x in part]

    def forward(self, obs, reward, state):
        """See the class."""
        rtg, step, last, *rest = state
        rest = iter(rest)
        memory = tuple(tuple(itertools.islice(rest, n)) for n in self.parts)
        reward = (reward.clamp(-1, 1) if self.card["clip_rewards"] else reward) / self.scale
        rtg = torch.full_like(rtg, self.target) if self.card["constant_rtg"] else rtg - reward
        if self.standardise:
            obs = ((obs.float() - self.mean) / self.std).clamp(-LARGEST_STATE, LARGEST_STATE)
        inputs = obs, reward, rtg, self.action_dims, last, memory
        logits, memory = stagger(self.model, step, *inputs) if self.staggered else \
            self.model.act(*inputs)
        action = row = logits.argmax(-1)                                # (1, A) or (1,)
        if self.action_dims:
            bins = self.model.config.bins
            action = bin_to_action(row, bins)
            row = MAX_DISCRETE + bins * torch.arange(self.action_dims) + row
        # as contiguous as `start`: compiled code reads its inputs without a look at their strides
        new = [rtg, step + 1, row.view(1, -1), *(x for part in memory for x in part)]
        return action, logits, [x.clone(memory_format=torch.contiguous_format) for x in new]


def export_policy(agent, path, compiled=False):
    """Writes an Agent's policy, one step with explicit state, as a file that needs only PyTorch.

    compiled False: torch.export; for torch.export.load, wherever this PyTorch runs. True: machine
    code for CPUs like this one, fastest with as many threads; torch._inductor.aoti_load_package.
    Nothing in either is pickled. Its "policy.json" tells the task, the action and the state in
    which an episode begins, a list of [shape, dtype, value of all elements]. See Controller.
    """
    controller, card = Controller(agent), agent.card
    text = json.dumps({
        **{key: card[key] for key in ("task", "observation", "action", "reward_scale",
                                      "clip_rewards")},
        "target_return": float(agent.target) * agent.scale, "context": agent.context,
        "torch": torch.__version__, "threads": torch.get_num_threads() if compiled else None,
        "start": [[list(x.shape), str(x.dtype)[6:], str(x.flatten()[0].item())]
                  for x in controller.start]})
    image = card["observation"]["kind"] == "image"
    obs = torch.zeros(1, *card["observation"]["shape"], dtype=torch.uint8 if image else torch.float)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")                         # PyTorch's, about itself
        # strict: traced as torch.compile does, which the forms for a compiler look out for
        program = torch.export.export(controller, (obs, torch.zeros(1), controller.start),
                                      strict=compiled)
        if not compiled:
            program.example_inputs = None       # as large as the state, and would be pickled
            torch.export.save(program, path, extra_files={"policy.json": text})
            return
        check_compiler()
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs={
            **INDUCTOR, "aot_inductor.metadata": {"policy.json": text}})


# ----------------------------------------------------------------------------------- the fast path
COMPILED = itertools.count()
PACKED = {}     # int8 weights in the library's own layout; the compiled code holds their numbers


@torch.library.custom_op("lram::int8_linear", mutates_args=())
def int8_linear(x: torch.Tensor, number: int, outputs: int) -> torch.Tensor:
    """x (N, in) -> (N, out), both float32: the product with PACKED[number].

    PyTorch's int8 product (FBGEMM on x86): x is rounded to 7 bits, one scale for all of it, so that
    the processor multiplies bytes; with 8 bits a sum of two products overflows where it has no VNNI
    instructions. An operator of its own: torch.compile cannot hold a packed weight.
    """
    return torch.ops.quantized.linear_dynamic(x, PACKED[number], reduce_range=True)


@int8_linear.register_fake
def _(x, number, outputs):
    return x.new_empty(len(x), outputs)


class NarrowLinear(nn.Module):
    """nn.Linear with its weight in 16 or 8 bits, float32 outside. Bytes are what few rows cost.

    bits 16: weight and inputs in bfloat16. bits 8: each output's weights are rounded to 127 steps
    of their largest, the inputs to 127 steps of their range.
    """

    def __init__(self, linear, bits):
        super().__init__()
        weight, self.bits = linear.weight.detach(), bits
        self.in_features, self.out_features = linear.in_features, linear.out_features
        bias = None if linear.bias is None else linear.bias.detach().clone()
        if bits == 16:
            self.register_buffer("weight", weight.bfloat16())
            self.register_buffer("bias", bias)
            return
        scale = weight.abs().amax(1).clamp_min(1e-12) / 127                     # (out,)
        zero = torch.zeros(self.out_features, dtype=torch.long)
        with warnings.catch_warnings():         # deprecated for a package that is not PyTorch's own
            warnings.simplefilter("ignore")
            narrow = torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8)
        self.number = next(COMPILED)
        PACKED[self.number] = torch.ops.quantized.linear_prepack(narrow, bias)
        weakref.finalize(self, PACKED.pop, self.number)

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        if self.bits == 8:
            return int8_linear(x.flatten(0, -2), self.number, self.out_features).unflatten(
                0, x.shape[:-1])
        y = F.linear(x.bfloat16(), self.weight).to(x.dtype)
        return y if self.bias is None else y + self.bias


class FastPolicy(nn.Module):
    """A copy of a model whose act() is one compiled function: same arguments, same results.

    The state that a call returned is updated in place by the next. Another one is copied first, or
    refused if a later call has overwritten it: keep own_state(state), a copy, of one that you mean
    to come back to. The first call of each shape compiles for a minute or more
    (self.compile_seconds). Weights are copied: later training of the model is not
    seen. weights: "float32" (exact to rounding), "bfloat16", "int8" (CPUs alone), for the blocks'
    and the head's large matrices; states and sums stay float32.

    On a CPU the weights are frozen into the code and laid out for 3 rows at a time, which plain
    F.linear is slow at; a C++ compiler must be there. On a GPU the step, with the kernels of
    kernels.py where they can be, is captured as one CUDA graph over fixed memory: all calls of one
    shape write their state there, so two agents of one shape need a policy each.
    """

    def __init__(self, model, weights="float32"):
        super().__init__()
        if weights not in ("float32", "bfloat16", "int8"):
            raise ValueError(f"weights {weights!r} do not exist; choose float32, bfloat16 or int8")
        self.device = next(model.parameters()).device
        if self.device.type == "cpu":
            check_compiler()
        if self.device.type == "cuda" and weights == "int8":
            raise ValueError("int8 weights are for CPUs; choose float32 or bfloat16 on a GPU")
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.config, self.weights = model.config, weights
        self.compiled, self.compile_seconds, self.heads = {}, 0.0, nn.ModuleDict()
        self.last = None            # the state that the last call returned
        self.newest = WeakTensorKeyDictionary()     # first tensor -> id of the last state it was in
        for module in list(self.model.backbone.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear) and name != "gates":    # they are folded, below
                    setattr(module, name, self._narrowed(child))
        # the same weights in PyTorch alone: what the compiled step is compared with
        shared = itertools.chain(self.model.parameters(), self.model.buffers())
        self.plain = copy.deepcopy(self.model, {id(x): x for x in shared})
        use_kernels(self.plain, "torch")
        use_kernels(self.model, "auto" if self.device.type == "cuda" else "torch")
        for block in self.model.backbone.blocks:
            if isinstance(block, MLSTMBlock):
                folded = block.folded_gates().requires_grad_(False)
                block.gate = partial(_folded_gate, folded)
                if self.device.type == "cpu":
                    block.project = partial(_banded_project, block.bands().detach())
        self.model.readout = self.plain.readout = self._readout

    def forward(self, *args, **kwargs):
        """The model's own, not compiled."""
        return self.plain(*args, **kwargs)

    def _narrowed(self, linear):
        small = linear.weight.numel() < 2 ** 11       # gates and the like: nothing to gain
        return linear if small or self.weights == "float32" else \
            NarrowLinear(linear, 16 if self.weights == "bfloat16" else 8)

    def _head(self, action_dims):
        # a Linear of its own: PyTorch 2.13 compiles a slice of frozen weights as if it began at 0
        return self._narrowed(part_of_head(self.model.head,
                                           head_rows(action_dims, self.config.bins)))

    def _readout(self, y, action_dims):
        name = str(action_dims)
        return self.heads[name](y) if name in self.heads else \
            LRAM.readout(self.model, y, action_dims)

    def own_state(self, state):
        """A copy of a state, laid out for the compiled step; shares nothing with it.

        On a CPU C (B, H, K, V) is stored column after column: the step reads and updates it in one
        pass. ValueError for the state of another model.
        """
        copies, rows = [], len(state[0][0])
        shapes = self.model.backbone.initial_state(rows, "meta")
        if [[x.shape for x in part] for part in state] != [[x.shape for x in p] for p in shapes]:
            raise ValueError("this state is not one of this model: the shapes differ")
        for block, part, own in zip(self.model.backbone.blocks, state, shapes):
            part = [x.to(y.dtype).clone(memory_format=torch.contiguous_format)
                    for x, y in zip(part, own)]
            if isinstance(block, MLSTMBlock) and self.device.type == "cpu":
                part[0] = part[0].transpose(2, 3).contiguous().transpose(2, 3)
            copies.append(tuple(part))
        return tuple(copies)

    def _step(self, obs, reward, rtg, action_dims, last_action, state, done):
        logits, new = self.model.act(obs, reward, rtg, action_dims, last_action, state, done)
        for block, old_part, new_part in zip(self.model.backbone.blocks, state, new):
            for old, value in zip(old_part, new_part):
                # PyTorch 2.13 cannot compile a scan whose state is read and written in one kernel
                old.copy_(settled(value + 0.0) if isinstance(block, MambaBlock) else value)
        return logits

    def _fresh(self, rows):
        """An own_state of fresh sequences; never more than one block's part twice in memory."""
        one = self.model.backbone.initial_state(1, self.device)
        return self.own_state(tuple(tuple(x.expand(rows, *x.shape[1:]) for x in part)
                                    for part in one))

    @torch.no_grad()
    def act(self, obs, reward, rtg, action_dims, last_action=None, state=None, done=None):
        """See LRAM.act; the state that is returned is overwritten by the next call."""
        if state is None:
            state = self._fresh(len(reward))
        elif state is not self.last:
            if self.newest.get(state[0][0], id(state)) != id(state):
                raise ValueError("this state has been overwritten by a later call; go on from the "
                                 "state that the last call returned, and keep own_state(state), a "
                                 "copy, of one to come back to (on a GPU two agents of one shape "
                                 "need a FastPolicy each)")
            state = self.own_state(state)
        done = torch.zeros(len(reward), dtype=torch.bool, device=self.device) if done is None \
            else done
        if self.config.backbone == "gpt" and bool(done.any()):     # its reset leaves the caches be
            for part in state:
                for cache in part[:-1]:
                    cache[done] = 0
        last_action = last_action if "a" in self.config.tokens else None
        tensors = [x.contiguous() for x in (obs, reward, rtg, done, last_action) if x is not None]
        if any(len(x) != len(state[0][0]) for x in tensors):
            raise ValueError(f"the state has {len(state[0][0])} rows, the inputs have "
                             f"{[len(x) for x in tensors]}")
        key = action_dims, *((x.shape, x.dtype) for x in tensors)
        obs, reward, rtg, done, *last_action = tensors
        args = obs, reward, rtg, action_dims, last_action[0] if last_action else None, state, done
        if key not in self.compiled:
            self.compiled[key] = self._compile(*args)
        logits, state = self.compiled[key](*args)
        self.last = *state,             # a new tuple: what earlier calls returned is told from it
        self.newest[state[0][0]] = id(self.last)
        return logits, self.last

    def _compile(self, *args):
        """The compiled step for arguments like these, compared with the plain model on two rows."""
        action_dims, done = args[3], torch.zeros_like(args[6])
        if str(action_dims) not in self.heads:
            self.heads[str(action_dims)] = self._head(action_dims)
        # tensors of their own: what is one tensor here would be taken for one in every later call;
        # two rows in turn: a whole batch would need more states than a GPU holds
        rows = torch.arange(len(done), device=self.device) % 2
        inputs = [x[rows] if torch.is_tensor(x) else x for x in args[:5]]
        two = [x[:2] if torch.is_tensor(x) else x for x in inputs]
        # freezing is read while tracing: as an option of torch.compile it would come too late
        settings = dict(INDUCTOR, cpp_wrapper=True)
        from torch._inductor import config as inductor
        started = time.perf_counter()
        # without guards, which cost as much as a tiny model: act() sees to the shapes itself.
        # torch.compile keeps its results with the code object, so each needs a new one
        code = FastPolicy._step.__code__.replace(co_name=f"step_{next(COMPILED)}")
        step = torch.compile(
            FunctionType(code, globals()).__get__(self), fullgraph=True, dynamic=False,
            options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe})
        plain = self.plain.backbone.initial_state(len(rows[:2]), self.device)
        trial, error = self._fresh(len(rows)), 0.0
        for _ in range(min(3, self.config.context)):    # the state of one must serve the next
            with inductor.patch(settings if self.device.type == "cpu" else {}):
                logits = step(*inputs, trial, done)
            expected, plain = self.plain.act(*two, plain)
            for x, y in [(logits, expected[rows])] + [
                    (x[:2], y) for parts in zip(trial, plain) for x, y in zip(*parts)]:
                off = (x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-6)
                error = max(error, off.nan_to_num(torch.inf).item())
        if not error < (1e-3 if self.weights == "float32" else 5e-2):
            raise RuntimeError(f"the compiled policy is off by {error:.0e} from the plain one on "
                               f"this machine (PyTorch {torch.__version__}); act without --fast")
        run = self._captured(step, (*inputs, trial, done)) if self.device.type == "cuda" else \
            lambda *args: (step(*args), args[5])
        self.compile_seconds += time.perf_counter() - started
        return run

    def _captured(self, step, args):
        """The step as a CUDA graph over these arguments' memory: one launch for all of it."""
        static = args
        for part, fresh in zip(static[5], self.model.backbone.initial_state(1, self.device)):
            for x, y in zip(part, fresh):       # the steps below must not pass gpt's positions
                x.copy_(y)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):                 # what must not happen while capturing
            for _ in range(min(3, self.config.context - 1)):
                step(*static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step(*static)

        def replay(*args):
            for own, given in zip(static, args):
                if torch.is_tensor(own):
                    own.copy_(given)
            if args[5][0][0] is not static[5][0][0]:
                for own, given in zip(static[5], args[5]):
                    for x, y in zip(own, given):
                        x.copy_(y)
            graph.replay()
            return logits.clone(), static[5]
        return replay


def _banded_project(bands, x_c, x_m):
    # 768 products of 3x4 by 4x4 matrices (16m) cost more as calls than seven shifted products
    E = x_c.shape[-1]
    c, m = (settled(F.pad(x, (3, 3))) for x in (x_c, x_m))              # (B, T, E + 6)
    return settled(torch.stack([sum(x[..., d:d + E] * band[d] for d in range(7))
                                for x, band in zip((c, c, m), bands)]))


def _folded_gate(folded, q, k, v, x_c, x_m):
    # few outputs: a sum for each, where a matrix product would be laid out for many
    x = settled(torch.cat([x_c, x_m], -1))[..., None, :]                # (B, T, 1, 2E)
    return (x * folded.weight).sum(-1) + folded.bias


# ---------------------------------------------------------------------- checkpoints, device, check
def save_checkpoint(path, payload):
    """torch.save, atomically: a kill or a full disk leaves the previous file as it was."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    try:
        torch.save(payload, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:        # torch reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        left = "the last good checkpoint is untouched. Free some space and run again with " \
               "--resume" if path.exists() else "it would have been the first one. Free some " \
               "space and run again"
        raise SystemExit(f"cannot write {path} ({error}); {left}") from error


def load_checkpoint(path, device="cpu"):
    """The dict train.py wrote, read with weights_only=True: no code in a file is ever executed."""
    try:
        payload = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise SystemExit(f"no checkpoint at {path}; train one with: "
                         "python train.py --backbone mlstm") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        raise SystemExit(f"{path} is not a readable checkpoint "
                         f"({type(error).__name__}: {str(error)[:120]}); "
                         "it may be truncated: copy or train it again") from None
    missing = [key for key in ("model", "model_config", "cards")
               if not isinstance(payload, dict) or not isinstance(payload.get(key), dict)]
    if missing:
        raise SystemExit(f"{path} holds no {', '.join(missing)}: "
                         "it was not written by this project's train.py")
    return payload


def model_from_checkpoint(payload, device="cpu"):
    """The model of a loaded checkpoint, in eval mode; SystemExit where its parts do not fit."""
    try:
        model = LRAM(Config(**payload["model_config"]))
        model.load_state_dict(payload["model"])
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SystemExit(f"this checkpoint does not fit lram.py ({type(error).__name__}: {reason});"
                         " it is damaged, or another version of this project wrote it: use that "
                         "version, or train it again") from None
    return model.to(device).eval()


def use_kernels(model, choice="auto"):
    """Puts PyTorch or Triton behind every recurrence of the model; returns which and why, in words.

    choice: "torch"; "triton" (kernels.py), ValueError where it cannot be; "auto": Triton where a
    GPU can run it, else PyTorch. The one place that imports kernels.py. Call it after model.to().
    """
    blocks, why = model.backbone.blocks, ""
    parameter = next(model.parameters())
    recurrent = [b for b in blocks if isinstance(b, (MLSTMBlock, SLSTMBlock, MambaBlock))]
    if choice not in ("auto", "torch", "triton"):
        raise ValueError(f"kernels {choice!r} do not exist; choose auto, torch or triton")
    interpreted = choice == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if choice == "torch":
        why = "asked for"
    elif not recurrent:
        why = "attention is PyTorch's own"
    elif not parameter.is_cuda and not interpreted:
        why = f"the model is on the {parameter.device.type.upper()}"
    elif torch.version.hip:
        why = "AMD's GPUs are not supported"
    elif parameter.is_cuda and torch.cuda.get_device_capability(parameter.device) < (8, 0):
        why = f"{torch.cuda.get_device_name(parameter.device)} is older than sm_80"
    elif parameter.dtype == torch.float64:
        why = "the kernels have no float64"
    elif importlib.util.find_spec("triton") is None:
        why = "Triton is not installed"
    else:
        odd = [b.inner // b.num_heads for b in recurrent
               if isinstance(b, MLSTMBlock) and b.inner // b.num_heads % 16]
        if odd:
            why = f"mLSTM heads of width {odd[0]} are no multiple of 16"
    if not why:
        try:
            import kernels
        except (ImportError, AttributeError) as error:      # another Triton than 3.4 to 3.9
            why = f"kernels.py cannot be imported ({error})"
    if why and choice == "triton":
        raise ValueError(f"kernels triton: {why}; use auto or torch")
    for block in recurrent:
        if isinstance(block, MLSTMBlock):
            block.cell = mlstm_chunkwise if why else kernels.mlstm_triton
        elif isinstance(block, SLSTMBlock):
            block.cell = slstm_scan if why else kernels.slstm_scan_triton
        else:
            block.scan = selective_scan if why else kernels.selective_scan_triton
    if why:
        return f"torch ({why})"
    return "triton (interpreted on the CPU)" if interpreted and not parameter.is_cuda else \
        "triton (kernels.py)"


def choose_device(device="auto", dtype="auto"):
    """Names -> (torch.device, torch.dtype of matrix products, the reason in words)."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        reason = f"{device}: " + ("a GPU is available" if device == "cuda" else "no CUDA GPU found")
    else:
        reason = f"{device}: asked for"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
        reason += f"; {dtype}: the default there"
    return torch.device(device), getattr(torch, dtype), reason


def count_parameters(module):
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def state_bytes(state):
    """Bytes of a state, nested tuples of tensors."""
    return sum(map(state_bytes, state)) if isinstance(state, tuple) else \
        state.numel() * state.element_size()


def first_gradient(config, steps=6):
    """Norm of the first gradient on one window of zeros, where it is largest: finite and small, or
    the model cannot learn.
    """
    torch.manual_seed(0)
    model, zeros = LRAM(config), torch.zeros(1, steps)
    none = torch.full((1, steps, 4), -1)
    logits, _ = model(torch.zeros(1, steps, 39), zeros, zeros, 4, none, final_state=False)
    mask = torch.ones(1, steps, 4, dtype=torch.bool)
    action_loss(logits, torch.full(mask.shape, config.bins // 2), mask).backward()
    return torch.nn.utils.clip_grad_norm_(model.parameters(), torch.inf).item()


def _print_first_gradients():
    for size in ("tiny", "16m", "48m", "110m", "206m"):
        for tokens in (("r", "s", "rtg"), TOKENS):
            norms = (f"{name} {first_gradient(Config(name, size, tokens=tokens)):.2g}"
                     for name in BACKBONES)
            print(f"{size:<5} tokens {','.join(tokens):<8}", ", ".join(norms), flush=True)


def _self_check():
    print(f"{'size':<10}{'backbone':<9}{'D':>5}{'layers':>7}{'backbone only':>15}{'total':>13}"
          f"{'state, kB':>11}")
    for size in SIZES:
        for name in BACKBONES:
            if name == "gpt" and size.endswith("half"):
                continue
            with torch.device("meta"):
                config = Config(name, size)
                model = LRAM(config)
                state = state_bytes(model.backbone.initial_state(1, "meta"))
            print(f"{size:<10}{name:<9}{config.dim:>5}{config.layers:>7}"
                  f"{count_parameters(model.backbone):>15,}{count_parameters(model):>13,}"
                  f"{state / 1e3:>11,.0f}")
    torch.manual_seed(0)
    for name in BACKBONES:
        model = LRAM(Config(name, "tiny", context=20)).double().eval()
        obs = torch.randn(2, 20, 39, dtype=torch.float64)
        reward, rtg = torch.rand(2, 2, 20, dtype=torch.float64)
        with torch.no_grad():
            whole, _ = model(obs, reward, rtg, 4)
            state, steps = None, []
            for t in range(20):
                logits, state = model.act(obs[:, t], reward[:, t], rtg[:, t], 4, state=state)
                steps.append(logits)
        error = (torch.stack(steps, 1) - whole).abs().max().item()
        assert error < 1e-10, error
        print(
            f"{name:<6} 20 calls of act() give the logits of one call on the window ({error:.0e})"
        )
    torch.set_num_threads(1)
    for size in ("tiny", "16m"):
        times = ", ".join(f"{name} {_act_milliseconds(name, size):.1f}" for name in BACKBONES)
        print(f"act(), {size}, one environment, one CPU thread, eager, median ms per step: {times}")


def _act_milliseconds(name, size, steps=40):
    model, state = LRAM(Config(name, size)).eval(), None
    obs, scalar, times = torch.randn(1, 39), torch.zeros(1), []
    with torch.no_grad():
        for _ in range(steps):
            started = time.perf_counter()
            _, state = model.act(obs, scalar, scalar, 4, state=state)
            times.append(time.perf_counter() - started)
    return 1e3 * float(np.median(times[5:]))


if __name__ == "__main__":
    _print_first_gradients() if "--gradients" in sys.argv[1:] else _self_check()
