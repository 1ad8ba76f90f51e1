"""Trajectories: experts -> HDF5 files -> windows for training; as a program it makes, checks and
shows them.

    python data.py make                     # the default mixture, into datasets/ (about a minute)
    python data.py make laptop              # 18 tasks of all seven domains (about 5 minutes)
    python data.py make metaworld/push-v3 --episodes 50
    python data.py make darkroom/histories  # how 80 agents learn, for in-context learning
    python data.py pack datasets            # one file per task, for many or long trajectories
    python data.py convert d4rl hopper.hdf5 --task mujoco/hopper    # public data of other formats
    python data.py check datasets           # every file validated; exit code 1 names the faults
    python data.py info datasets            # counts, lengths, returns, action statistics

Layout, that of the public LRAM data sets: one file per trajectory,
<root>/<domain>/<task>/<episode>.hdf5, with

    states    (T, S) float32 or (T, 1, 64, 64) uint8
    actions   (T,) int or (T, A) float32 in [-1, 1]
    rewards   (T,) float32
    dones     (T,) bool, true at an end of the task
    executed  as actions, optional: what the world received, where that differs from the label
    returns_to_go (T,) float32, optional: sum of rewards from t on, unscaled; computed when absent

and beside them episode_lengths.json and episode_returns.json ({episode: number}: no file is opened
to plan a training run) and task.json, the card of the task. `actions` are what the expert asked for
(clean labels); what was executed had noise on it, so that the data show how to recover. A lost life
ends a trajectory in Atari, whose rewards are stored clipped to [-1, 1].

The public data sets themselves are read as downloaded: <root>/<task>/ without a domain's folder,
without task.json, under their spellings of a task's name (find_folder, load_card). What takes long
to learn about them is kept beside them (statistics.json, found_lengths.json).

Files, cards, packs and the sources of `convert` may be a stranger's: they are validated before use,
point at no other file, and nothing in them is executed or printed as advice.

darkroom/histories holds one file per training goal instead: 1000 episodes of 100 steps each, one
after the other as an agent learned them from nothing, T = 100,000; dones are true at each episode's
last step, and returns_to_go count to the end of their own episode.

Source: LRAM (arXiv 2410.22391), section 4.1 and appendix B.
Not included: data sets that are spread over several machines.
"""

import contextlib
import difflib
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import re
import stat
import sys
from collections import Counter, OrderedDict
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Annotated, Callable, Literal

import gymnasium as gym
import h5py
import numpy as np
import tyro

from eval import (
    DOMAINS,
    TABLE,
    DarkRoom,
    Domain,
    ProcgenCopies,
    cannot_play,
    canonical,
    constant_policy,
    domain_of,
    expand_tasks,
    make_env,
    random_policy,
    rollout,
    run_jobs,
    split_task,
    to_frames,
    to_gray,
    unavailable,
    world_spec,
)

DEFAULT_TASKS = (
    "darkroom/train",
    "metaworld/reach-v3",
    "metaworld/door-open-v3",
    "metaworld/drawer-close-v3",
    "metaworld/button-press-topdown-v3",
    "metaworld/window-open-v3",
    "dmcontrol/cartpole-balance",
    "atari/freeway",
)
VALIDATION_FRACTION, LEAST_HELD_OUT = 0.025, 5      # the latter per task, in the data that we make
# episode k of the data uses seed k; what a score is measured against has seeds of its own (scores:
# 1,000,000 + k)
EXPERT_SEED, RANDOM_SEED, CONSTANT_SEED = 2_500_000, 2_600_000, 2_700_000
# where only solved episodes count, a seed has this many tries: seed, seed + NEXT_TRY, ...
TRIES, NEXT_TRY = 8, 100_000
# in a task's folder until its data are complete: {}, or what is converted
UNFINISHED = "unfinished.json"
SAMPLE = 50                             # trajectories of a task that stand for all of them
LARGEST, MOST_STEPS = 2 ** 33, 10 ** 7  # bytes (two million frames), steps of an array in a file
CARD = ("task", "domain", "observation", "action", "reward_scale", "constant_rtg", "target_return",
        "reference_score", "random_score")      # what every card has
ROBOMIMIC_KEYS = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")
HISTORY = 1000                  # episodes of a learning history, the paper's 100,000 steps


# ----------------------------------------------------------------------------------------- experts
# An expert lives for one episode: policy = Expert(env), then policy(obs, reward) -> action, where
# reward is what the previous action earned (0.0 at first).
class MetaWorldExpert:
    """The scripted policy that Meta-World ships for the task: obs (39,) -> action (4,) float32."""

    def __init__(self, env):
        from metaworld.policies import ENV_POLICY_MAP
        self.policy = ENV_POLICY_MAP[env.unwrapped.name]()

    def __call__(self, obs, reward):
        # The scripts are proportional controllers that ask for more than 1; the simulator clips
        # silently. A label must be an action that an agent can emit, so it is clipped here.
        return np.clip(self.policy.get_action(obs), -1.0, 1.0).astype(np.float32)


class CartpoleExpert:
    """cartpole-balance and cartpole-swingup: obs (x, cos, sin, x', theta') -> force / 10 N, (1,).

    theta is 0 upright. A cart that accelerates by a tilts the pole: theta'' = 3/2 (g sin - a cos).
    """

    def __init__(self, env):
        pass

    def __call__(self, obs, reward):
        x, cos, sin, dx, dtheta = obs
        theta = np.arctan2(sin, cos)
        if abs(theta) < 0.7:
            # Near upright, linear: run under the pole as it falls, and drift back to the middle.
            push = 1.0 * x + 1.2 * dx + 9.0 * theta + 2.5 * dtheta
        else:
            # Energy of the pole over m l (l = 1/2): 0 at rest upright, -2 g hanging. It changes by
            # -a cos(theta) theta', so a push along energy cos(theta) theta' brings it to 0.
            energy = dtheta ** 2 / 3 + 9.81 * (cos - 1)
            push = 0.2 * energy * cos * dtheta - 0.3 * dx
        return np.clip([push], -1.0, 1.0).astype(np.float32)


class PointMassExpert:
    """point_mass-easy: obs (position 2, velocity 2) -> a damped spring to the origin, (2,)."""

    def __init__(self, env):
        pass

    def __call__(self, obs, reward):
        position, velocity = obs[:2], obs[2:]
        return np.clip(-10.0 * position - 2.0 * velocity, -1.0, 1.0).astype(np.float32)


class ReacherExpert:
    """reacher-easy and -hard: obs (angles 2, to_target 2, velocity 2) -> joint torques (2,).

    A damped spring from the finger to the target, as torques: tau = J^T (k e) - d q'. The arm is
    planar with two links of 0.12 m, so the Jacobian J follows from the two angles observed.
    """

    LINK = 0.12

    def __init__(self, env):
        pass

    def __call__(self, obs, reward):
        shoulder, wrist, error, velocity = obs[0], obs[0] + obs[1], obs[2:4], obs[4:6]
        # finger = LINK (cos s + cos w, sin s + sin w) with w the forearm's absolute angle
        forearm = self.LINK * np.array([-np.sin(wrist), np.cos(wrist)])      # d finger / d q2
        upper = self.LINK * np.array([-np.sin(shoulder), np.cos(shoulder)]) + forearm
        torque = 60.0 * np.array([upper @ error, forearm @ error]) - 0.24 * velocity
        return np.clip(torque, -1.0, 1.0).astype(np.float32)


class DarkRoomExpert:
    """Sweep the room row by row, alternately right and left, until a reward; then stay there.

    The sweep is a function of the position alone, so noise that knocks the agent about cannot
    derail it; cells that it skipped on the way are visited when the sweep has come to its end.
    Without noise goal number k along the sweep (from 0) gives a return of exactly 100 - k.
    """

    def __init__(self, env):
        self.size = env.unwrapped.SIZE
        self.unseen = np.ones((self.size, self.size), bool)
        self.goal = None
        self.first, self.swept = True, False

    def __call__(self, obs, reward):
        row, col = int(obs[0]), int(obs[1])
        if self.first:              # (0, 0) too pays only for a step that ends on it: stay, once
            self.first = False
            return DarkRoom.STAY
        self.unseen[row, col] = False
        if reward > 0:
            self.goal = (row, col)
        if self.goal is not None:
            return self._towards(row, col, *self.goal)
        end = self.size - 1 if row % 2 == 0 else 0              # the column where this row ends
        self.swept |= row == self.size - 1 and col == end
        if self.swept and self.unseen.any():
            rows, cols = np.nonzero(self.unseen)
            nearest = np.argmin(abs(rows - row) + abs(cols - col))
            return self._towards(row, col, rows[nearest], cols[nearest])
        if col != end:
            return DarkRoom.RIGHT if row % 2 == 0 else DarkRoom.LEFT
        return DarkRoom.DOWN

    def _towards(self, row, col, to_row, to_col):
        if row != to_row:
            return DarkRoom.DOWN if to_row > row else DarkRoom.UP
        if col != to_col:
            return DarkRoom.RIGHT if to_col > col else DarkRoom.LEFT
        return DarkRoom.STAY


NOOP, FIRE, UP, RIGHT, LEFT, DOWN = range(6)               # the first 6 of Atari's 18 actions


class FreewayExpert:
    """Crosses the road by the fastest way that meets no car, found anew at each decision.

    The search runs forward over sets of heights: `reach[t]` holds all heights at which the chicken
    can be after t decisions without having been hit. Then it runs backward from the far side to
    keep what lies on a fastest way. Among the first actions left, UP comes before NOOP before DOWN.
    A set is one integer with bit y for height y: moving all its members up is a shift by 4.
    """

    BOTTOM, TOP = 6, 178       # heights; the chicken moves 4 a decision
    HORIZON = 70               # decisions; an undisturbed crossing takes 43
    # Pixels a decision of the cars in lanes 0..9, from the bottom (measured; > 0 drives right).
    SPEED = (4/5, 1, 4/3, 2, 4, -4, -2, -4/3, -1, -4/5)
    # Measured on 824 collisions: lane i hits heights 12 + 16 i + (1..18) by a car at x 40..54.
    LANE, HIT_Y, HIT_X = (12, 16), (1, 18), (40, 54)
    SCREEN = 160               # cars that leave on one side come back on the other

    def __init__(self, env):
        self.ale = env.unwrapped.ale
        first, last = self.HIT_Y
        span = (1 << last - first + 1) - 1
        self.lanes = [span << self.LANE[0] + self.LANE[1] * i + first for i in range(10)]
        # danger[i][x]: the decisions from now on at which lane i is closed if its car is at x now
        t, x = np.arange(self.HORIZON), np.arange(self.SCREEN)
        self.danger = []
        for speed in self.SPEED:
            slack = abs(speed) / 2                         # half of what it drives in a decision
            later = (x[:, None] + speed * t) % self.SCREEN
            closed = (later >= self.HIT_X[0] - slack) & (later <= self.HIT_X[1] + slack)
            self.danger.append([np.flatnonzero(row).tolist() for row in closed])

    def __call__(self, obs, reward):
        ram = self.ale.getRAM()
        y, cars = int(ram[14]), ram[108:118].tolist()
        closed = [0] * self.HORIZON
        for lane, danger, x in zip(self.lanes, self.danger, cars):
            for t in danger[x]:
                closed[t] |= lane
        road, far_side = -1 << self.BOTTOM, -1 << self.TOP
        reach = [1 << y]
        while not reach[-1] & far_side:
            if len(reach) == self.HORIZON or not reach[-1]:
                return UP                                  # no way without a hit: run
            here = reach[-1]
            reach.append((here << 4 | here | here >> 4) & road & ~closed[len(reach)])
        way = reach.pop() & far_side
        while len(reach) > 1:
            way = (way << 4 | way | way >> 4) & reach.pop()
        for action, height in ((UP, y + 4), (NOOP, y), (DOWN, y - 4)):
            if height >= 0 and way >> height & 1:
                return action


def bounce(position, low, high):
    """Where a ball that flies on to `position` ends up between walls at `low` and `high`."""
    position = (position - low) % (2 * (high - low))
    return low + min(position, 2 * (high - low) - position)


class PongExpert:
    """Moves the paddle to where the ball will meet it, and alongside the ball while it flies away.

    The paddle is heavy: it gathers speed to 24 a decision and coasts, and a ball is met where it is
    8 +- 12 below the paddle. Steering by the place alone swings around the target by 25 and misses;
    so what counts is the place to which the paddle would coast. No good player even so: it rarely
    loses the ball but rarely wins it either, and without noise it can repeat one rally for ever.
    """

    PADDLE_X, WALLS = 188, (44, 207)
    OFFSET, TOLERANCE, COAST = 5, 6, 0.6                   # tuned

    def __init__(self, env):
        self.ale = env.unwrapped.ale
        self.last = None                                   # (x, y, paddle) one decision ago

    def __call__(self, obs, reward):
        x, y, paddle = self.ale.getRAM()[[49, 54, 51]].tolist()
        if y == 0:                                         # no ball in play
            self.last = None
            return FIRE
        target, coasting = y, paddle
        if self.last is not None:
            dx, dy = x - self.last[0], y - self.last[1]
            if dx > 0:                                     # it comes towards us
                target = bounce(y + dy * (self.PADDLE_X - x) / dx, *self.WALLS)
            coasting += self.COAST * (paddle - self.last[2])
        self.last = x, y, paddle
        error = target - coasting - self.OFFSET            # heights count downwards
        return RIGHT if error < -self.TOLERANCE else LEFT if error > self.TOLERANCE else NOOP


class BreakoutExpert:
    """Keeps the paddle below the ball."""

    LOST = 215                                             # the ball is below the paddle
    OFFSET, TOLERANCE = 10, 4                              # ball against paddle, tuned

    def __init__(self, env):
        self.ale = env.unwrapped.ale

    def __call__(self, obs, reward):
        x, y, paddle = self.ale.getRAM()[[99, 101, 72]].tolist()
        if y == 0 or y > self.LOST:                        # no ball in play: serve
            return FIRE
        error = x - paddle - self.OFFSET
        return RIGHT if error > self.TOLERANCE else LEFT if error < -self.TOLERANCE else NOOP


# A robot's hand takes things one after the other and brings each where it belongs. Everything below
# follows from where things are now, so noise that knocks the arm about cannot derail it: there are
# no phases to remember. Coordinates are the world's, in metres; z points up.
@dataclass
class Job:
    """One thing to be brought to one place, as the state of the world has it now."""
    thing: object                   # robosuite's model of it
    place: np.ndarray               # (3,) where it is
    grasp: np.ndarray               # (3,) where the hand takes it
    across: float | None            # the fingers close along this direction (rad), None: along any
    period: float                   # ... modulo this
    target: np.ndarray              # (3,) where to let go of it
    rise: float = 0.1               # how far above its target it travels
    turn: float = 0.0               # how far it has still to be turned (rad)
    slack: float = 0.01             # how far beside its target it may be let down
    slope: float = 3.0              # of the funnel through which it comes down
    via: np.ndarray | None = None   # (3,) where it has to go first


def wrap(angle, period):
    """The angle nearest to 0 that is the same modulo `period`."""
    return (angle + period / 2) % period - period / 2


def heading(rotation):
    """Direction (rad) in the plane of the first axis of a (3, 3) rotation; a hand closes along it.
    """
    return np.arctan2(rotation[1, 0], rotation[0, 0])


def step_over(place, target, rise, slack, slope=3.0):
    """The way (3,) from `place` to `target`: up, at `rise` above it to the side, and down to it
    through a funnel that is `slack` wide at its foot.
    """
    aside = target[:2] - place[:2]
    above = np.clip(slope * (np.linalg.norm(aside) - slack), 0, rise)
    up = target[2] + above - place[2]
    return np.append(aside * np.clip(1 - (up - 0.01) / 0.04, 0, 1), up)


class ArmExpert:
    """Does the first of `jobs` that is not done: over the thing, down, close, over its place, down,
    open. jobs(env, sim) -> [Job]; act(sim, step 3, turn 3, grip) -> action of the task.
    """

    NEAR, LOST = 0.012, 0.03        # from the grasp: close the fingers, open them again

    def __init__(self, env, jobs, act):
        self.env, self.sim, self.jobs, self.act = env, env.unwrapped.sim, jobs, act
        self.closing = False

    def __call__(self, obs, reward):
        data = self.sim.sim.data._data
        site = self.sim.robots[0].eef_site_id["right"]
        hand, frame = data.site_xpos[site], data.site_xmat[site].reshape(3, 3)
        step, turn, grip = self.decide(hand, frame)
        # and upright: the rotation that brings the hand's axis down
        rotation = np.cross(frame[:, 2], (0, 0, -1)) + (0, 0, turn)
        return np.clip(self.act(self.sim, step, rotation, grip), -1, 1).astype(np.float32)

    def decide(self, hand, frame):
        """(step (3,), turn (rad) about z, grip: -1 open, 1 closed)."""
        for job in self.jobs(self.env.unwrapped, self.sim):
            held = self.sim._check_grasp(self.sim.robots[0].gripper, job.thing)
            beside = np.linalg.norm(job.place[:2] - job.target[:2])
            low = job.place[2] < job.target[2] + 0.01
            done = low and beside < (1.5 * job.slack if held else 0.04)
            if done and held:
                return np.zeros(3), 0.0, -1.0                   # stay until the fingers let go
            if not done:
                break
        if done:                                                # all: out of the way
            return np.array([0, 0, job.target[2] + job.rise + 0.1 - hand[2]]), 0.0, -1.0
        if held:
            # what still has to turn stays up
            rise, slack = job.rise, job.slack if abs(job.turn) < 0.06 else -1
            target = job.target if job.via is None else job.via
            return step_over(job.place, target, rise, slack, job.slope), job.turn, 1.0
        turn = 0 if job.across is None else wrap(job.across - heading(frame), job.period)
        away = np.linalg.norm(job.grasp - hand)
        self.closing = away < (self.LOST if self.closing else self.NEAR)
        hover = max(0.1, job.rise + 0.03)
        step = step_over(hand, job.grasp, hover, 0.01 if abs(turn) < 0.1 else -1)
        return step, turn, 1.0 if self.closing else -1.0


def hand_action(sim, step, turn, grip):
    """For OSC_POSE, whose action is a motion and a turn of the hand."""
    step = 15 * step
    return np.concatenate([step / max(1, np.abs(step).max()), np.clip(turn, -0.5, 0.5), [grip]])


def joint_action(sim, step, turn, grip):
    """For JOINT_POSITION: the joints that move the hand so, by damped least squares,
    dq = J^T (J J^T + 0.001 I)^-1 (step, turn).
    """
    import mujoco
    model, data, robot = sim.sim.model._model, sim.sim.data._data, sim.robots[0]
    J = np.zeros((6, model.nv))
    mujoco.mj_jacSite(model, data, J[:3], J[3:], robot.eef_site_id["right"])
    J = J[:, robot._ref_joint_vel_indexes]
    step = step * min(1, 0.1 / max(np.linalg.norm(step), 1e-6))
    dq = 13 * J.T @ np.linalg.solve(J @ J.T + 1e-3 * np.eye(6), np.append(step, turn))
    return np.append(dq / max(1, np.abs(dq).max()), grip)


def composuite_jobs(env, sim):
    """The object to its goal: around the obstacle if it is pushed, above it otherwise."""
    _, _, obstacle, objective = env.factors
    body = sim.sim.data._data.body(sim.bodies["object"].root_body)
    place, goal = body.xpos, sim.sim.data._data.body(sim.bodies["goal"].root_body).xpos
    rise, low = {"PickPlace": (0.12, TABLE + 0.015), "Push": (0.0, TABLE),
                 "Shelf": (0.06, TABLE + 0.13), "Trashcan": (0.04, TABLE + 0.15)}[objective]
    height = sim.things["object"][0][2] - TABLE                 # of the centre above the ground
    target = np.append(goal[:2], low + height)
    via = None
    if objective == "Push" and obstacle != "None":
        x, y, _ = sim.sim.data._data.body(sim.bodies["obstacle"].root_body).xpos
        gap = x if obstacle == "ObjectDoor" else x + 0.145      # through the door, round the wall
        if place[1] < y + 0.05:
            before = place[1] < y - 0.05 and abs(place[0] - gap) > 0.015
            via = np.array([gap, place[1] if before else y + 0.1, target[2]])
    grasp = np.append(place[:2], max(place[2], TABLE + 0.014))
    turn = wrap(-heading(body.xmat.reshape(3, 3)), np.pi)
    return [Job(sim.bodies["object"], place, grasp, np.pi / 2, np.pi, target, rise, turn, 0.015,
                via=via)]


def fingers_beside(job, others):
    """Grasp a square thing by the two sides on which its nearest neighbour is not."""
    x, y, _ = min((place - job.place for place in others), key=np.linalg.norm)
    if np.hypot(x, y) < 0.1:
        job.period = np.pi
        if abs(wrap(job.across - np.arctan2(y, x), np.pi)) < np.pi / 4:
            job.across += np.pi / 2


def mimicgen_jobs(env, sim):
    """Cubes onto cubes, nuts onto pegs, groceries into their part of the bin."""
    data, jobs = sim.sim.data._data, []

    def job(thing, target, across=0, period=np.pi / 2, grasp=(0, 0, 0), **options):
        body = data.body(thing.root_body)
        rotation = body.xmat.reshape(3, 3)
        across = None if across is None else heading(rotation) + across
        jobs.append(Job(thing, body.xpos, body.xpos + rotation @ grasp, across, period,
                        np.array(target), **options))
        return rotation

    if hasattr(sim, "cube"):                                    # Lift: to a place ever ahead of it
        job(sim.cube, data.body(sim.cube.root_body).xpos + (-0.05, 0, 0.1), rise=0)
    elif hasattr(sim, "cubeA"):
        stack = [sim.cubeB, sim.cubeA, *([sim.cubeC] if hasattr(sim, "cubeC") else [])]
        for below, cube in zip(stack, stack[1:]):
            height = below.size[2] + cube.size[2] + 0.004
            job(cube, data.body(below.root_body).xpos + (0, 0, height), rise=0.08)
            fingers_beside(jobs[-1], [data.body(c.root_body).xpos for c in stack if c is not cube])
    elif hasattr(sim, "nuts"):
        mode = sim.single_object_mode
        for k, nut in enumerate(sim.nuts if mode == 0 else sim.nuts[sim.nut_id:][:1]):
            peg = data.xpos[(sim.peg1_body_id, sim.peg2_body_id)[k]]
            around = data.body(nut.root_body).xpos[2] < 0.945   # the peg: just push
            rotation = job(nut, [*peg[:2], 0.855], np.pi / 2, np.pi,
                           (0.065 + 0.005 * k, 0, 0), rise=0.13,
                           slack=0.02 if around else 0.004, slope=20.0)
            # square on square, and the handle not away from the robot, where no hand can reach
            turns = [wrap(angle - heading(rotation), 2 * np.pi)
                     for angle in (-np.pi / 2, np.pi / 2, np.pi)]
            jobs[-1].turn = min(turns, key=abs)
    else:
        single = sim.single_object_mode
        for k, thing in enumerate(sim.objects):
            if single and k != sim.object_id:
                continue
            # milk, bread, cereal, can: height of centre and of the grasp above it; thin along y
            height, above = ((0.061, 0.045), (0.023, 0), (0.075, 0.04), (0.04, 0.005))[k]
            # nearer to the robot than the middle of its part, which not every arm can reach
            target = sim.target_bin_placements[k] + (-0.03, -0.04, 0.04 + height)
            across, period = ((0, np.pi / 2), (0, np.pi / 2), (np.pi / 2, np.pi), (None, 1))[k]
            job(thing, target, across, period, (0, 0, above), rise=0.15, slack=0.03)
            if k < 2:
                fingers_beside(jobs[-1], [data.body(other.root_body).xpos
                                          for other in sim.objects if other is not thing])
    return jobs


def ComposuiteExpert(env):
    """The script of every Composuite task: ArmExpert with joint actions."""
    return ArmExpert(env, composuite_jobs, joint_action)


def MimicgenExpert(env):
    """The script of every Mimicgen task: ArmExpert with motions of the hand."""
    return ArmExpert(env, mimicgen_jobs, hand_action)


# ---------------------------------------------------------------------------------------- planners
# Experts for games without a script: they try plans out in copies of the simulator, and so know the
# future. What they do is therefore not always a function of what can be seen, and is harder to
# clone than a script.
HORIZON, COMMIT = 24, 4        # decisions: the length of a plan, and how much of it is carried out
DISCOUNT = 0.99                # of rewards in a plan: sooner is better


def planner(rng, look, simulate, actions, noop, count, longest=(8, HORIZON)):
    """policy(obs, reward) that searches anew every COMMIT decisions, or when it was disturbed.

    look() -> array, what is to be seen now; simulate(plans (count, HORIZON)) -> scores (count,) and
    what would be seen before each decision of each plan, [count][COMMIT + 1]. The plans are the
    rest of the last one, which the others have to beat, doing nothing, and random ones that hold
    each of `actions` for 2 decisions to one of `longest`. Equal scores: the first, so that nothing
    changes without a reason.
    """
    plan, seen, t = np.full(HORIZON, noop), None, COMMIT

    def policy(obs, reward):
        nonlocal plan, seen, t
        now = look()
        if seen is None or t == COMMIT or not np.array_equal(now, seen[t]):
            rest = plan if seen is None else np.append(plan[t:], np.repeat(rng.choice(actions), t))
            plans = np.stack([rest, np.full(HORIZON, noop)]
                             + [random_plan(rng, actions, longest) for _ in range(count - 2)])
            scores, views = simulate(plans)
            best, t = int(np.argmax(scores)), 0
            plan, seen = plans[best], views[best]
        t += 1
        return int(plan[t - 1])
    return policy


def random_plan(rng, actions, longest):
    """(HORIZON,) actions, each held for 2 decisions to one of `longest`."""
    lengths = rng.integers(2, rng.choice(longest) + 1, HORIZON // 2)       # enough: at least 2 each
    return np.repeat(rng.choice(actions, HORIZON // 2), lengths)[:HORIZON]


def atari_planner(env, count=16):
    """Plans in a second emulator: the most points, above all without losing a life."""
    from ale_py import Action, ALEInterface, roms
    game = env.unwrapped
    ale = ALEInterface()
    ale.setFloat("repeat_action_probability", 0.0)
    ale.setInt("frame_skip", 4)                            # a decision of the environment
    ale.loadROM(roms.get_rom_path(game.spec.kwargs["game"]))
    actions = [action.value for action in ale.getMinimalActionSet()]

    def simulate(plans):
        start, scores, views = game.ale.cloneState(), [], []
        for plan in plans:
            ale.restoreState(start)
            lives, score, seen = ale.lives(), 0.0, [ale.getRAM()]
            for t, action in enumerate(plan):
                score += DISCOUNT ** t * ale.act(Action(action))
                if t < COMMIT:
                    seen.append(ale.getRAM())
                if ale.game_over():
                    break
            lost = lives - ale.lives() + ale.game_over()
            scores.append(score - 1000.0 * lost)
            views.append(seen)
        return scores, views
    # the episode's own luck, copied: games that start alike are not played alike
    return planner(deepcopy(game.np_random), game.ale.getRAM, simulate, actions, NOOP, count)


# The actions that a Procgen game knows (1 left, 7 right, 3 down, 5 up, 4 stay, those between them
# diagonal, 9 shoots): fewer are searched sooner and are easier to clone.
CROSS, MOVES, SHOOT = (1, 3, 5, 7), tuple(range(9)), tuple(range(10))
PROCGEN_ACTIONS = {
    "chaser": CROSS, "leaper": CROSS, "miner": CROSS, "fruitbot": (1, 4, 7, 9), "bossfight": SHOOT,
    "caveflyer": SHOOT, "dodgeball": SHOOT, "plunder": SHOOT, "starpilot": SHOOT,
}
PROCGEN_STAY = 4
# where the goal lies in every level; elsewhere the planner prefers what it has not seen yet
PROCGEN_TOWARDS = {"coinrun": (6, 7, 8), "ninja": (6, 7, 8), "climber": (2, 5, 8), "leaper": (5,)}


def coarse(picture):
    """(64, 64, 3) uint8 -> bytes, equal for pictures that hardly differ."""
    return (picture[::4, ::4] >> 5).tobytes()


def procgen_planner(env, count=32):
    """Plans in copies of the game: the most reward, above all without an end that pays nothing."""
    game, visits = env.unwrapped, Counter()
    sims, towards = ProcgenCopies(game.name, count), PROCGEN_TOWARDS.get(game.name, ())

    def look():
        visits[coarse(game.picture)] += 1
        return game.picture

    def simulate(plans):
        sims.restore([game.sim.state()[0]] * count)
        # 1 % of a reward between plans that pay the same: for the direction, or for new places
        scores, alive = 0.01 * np.isin(plans, towards).mean(1), np.ones(count, bool)
        views = [[game.picture] for _ in range(count)]
        for t, actions in enumerate(plans.T):
            pictures, reward, first = sims.step(actions)
            scores += alive * DISCOUNT ** t * (reward - 5.0 * (first & (reward <= 0)))
            alive &= ~first
            if not towards:
                often = np.array([visits[coarse(picture)] for picture in pictures])
                scores += alive * 0.01 / HORIZON / (1 + often)
            if t < COMMIT:
                for seen, picture in zip(views, pictures):
                    seen.append(picture)
        return scores, views
    actions = PROCGEN_ACTIONS.get(game.name, MOVES)
    longest = (8,) if actions == CROSS else (8, HORIZON)   # corridors are short
    return planner(deepcopy(game.np_random), look, simulate, actions, PROCGEN_STAY, count, longest)


class MazeExpert:
    """Procgen's maze: the shortest way to the cheese, by breadth-first search in copies.

    A place is known by its picture, so nothing may move by itself. Moves are tried in one fixed
    order: among equally short ways the choice is always the same, a function of the picture, which
    can be cloned. hold: steps that a move lasts; key(picture): equal for what counts as one place.
    """

    WIDTH = 16                                             # places expanded at once

    def __init__(self, env, hold=1, key=np.ndarray.tobytes):
        self.game, self.hold, self.key = env.unwrapped, hold, key
        self.sims = ProcgenCopies(self.game.name, self.WIDTH * len(CROSS))
        self.way, self.lost = {}, False                    # way: picture -> action

    def __call__(self, obs, reward):
        here = self.game.picture.tobytes()
        if here not in self.way and not self.lost:         # at first, or thrown off the way
            moves = self.search()
            self.lost = not moves
            self.follow(moves)
        return self.way.get(here, PROCGEN_STAY)

    def search(self):
        """The moves from here to the goal; none where there is no way."""
        here = self.key(self.game.picture)
        origin, frontier = {here: None}, [(here, self.game.sim.state()[0])]
        while frontier:
            chunk, frontier = frontier[:self.WIDTH], frontier[self.WIDTH:]
            starts = [(place, state, a) for place, state in chunk for a in CROSS]
            starts += starts[:1] * (self.sims.count - len(starts))          # nothing new: idle
            self.sims.restore([state for _, state, _ in starts])
            won, over = np.zeros((2, self.sims.count), bool)
            for _ in range(self.hold):
                pictures, reward, first = self.sims.step(np.array([a for *_, a in starts]))
                won |= ~over & first & (reward > 0)
                over |= first
            states = self.sims.state()
            for k, (place, _, action) in enumerate(starts):
                if won[k]:
                    moves = [action]
                    while origin[place]:
                        place, action = origin[place]
                        moves.append(action)
                    return moves[::-1]
                there = self.key(pictures[k])
                if not over[k] and there not in origin:
                    origin[there] = place, action
                    frontier.append((there, states[k]))
        return []

    def follow(self, moves):
        """Fills `way` with the pictures along the moves from here."""
        self.sims.restore([self.game.sim.state()[0]] * self.sims.count)
        picture = self.game.picture
        for action in np.repeat(np.array(moves, int), self.hold):
            self.way[picture.tobytes()] = int(action)
            picture = self.sims.step(np.full(self.sims.count, action))[0][0]


def heist_expert(env):
    """Procgen's heist: keys, doors and gem in the fewest moves of 4 steps (about one field each).

    It is lost, and stays where it is, in one level of ten, where `coarse` takes two places for one.
    """
    return MazeExpert(env, hold=4, key=coarse)


# --------------------------------------------------------------------------------- planned control
# Where no controller is written down, one can be planned in a copy of the physics. A planner needs
# to see at each moment whether things get better, and the suite's rewards are mostly 0 until a task
# is solved; so each task has a reward to plan with: (q, v, model) -> (K, H), from MuJoCo's
# positions q (K, H, nq) and velocities v (K, H, nv), joints in the order of the suite's XML files.
# What is scored and stored are the suite's own rewards.
def bell(x, low, high, margin):
    """1 where low <= x <= high; beside it a Gaussian, fallen to 0.1 at distance `margin`."""
    distance = np.maximum(low - x, 0) + np.maximum(x - high, 0)
    return 0.1 ** (distance / margin) ** 2


def pendulum_swingup(q, v, model):
    """Angle 0 is upright. The motor is too weak to lift the pole: bring its energy to that of
    standing still up there.
    """
    energy = 0.0255 * v[..., 0] ** 2 + np.cos(q[..., 0])       # over m g l
    return np.cos(q[..., 0]) - np.abs(energy - 1)


def ball_in_cup_catch(q, v, model):
    """The ball in the middle of the cup, or closer to it and above the rim."""
    # slides of the cup, then of the ball, which at 0 hangs 0.35 m below the cup's middle
    dx, dz = q[..., 2] - q[..., 0], q[..., 3] - q[..., 1] - 0.35
    caught = (np.abs(dx) < 0.025) & (np.abs(dz) < 0.025)
    return caught + 0.3 * np.exp(-3 * np.hypot(dx, dz)) + 0.05 * np.tanh(dz)


def finger_misses(q):
    """How far the fingertip is out of the spinner's reach, in metres."""
    upper = q[..., 0] + np.pi / 2                              # absolute angles, 0 hanging down
    lower = upper + q[..., 1]
    x = 0.18 * np.sin(upper) + 0.17 * np.sin(lower)            # from the shoulder; the spinner's
    z = -0.18 * np.cos(upper) - 0.17 * np.cos(lower)           # hinge is 0.4 m to the right of it
    return np.maximum(np.hypot(x - 0.4, z) - 0.1, 0)


def finger_spin(q, v, model):
    """Spin backward; the suite counts 15 rad/s and more."""
    spin = -v[..., 2]
    return (spin >= 15) + np.clip(spin / 15, -1, 1) - finger_misses(q)


def finger_turn(q, v, model):
    """The spinner's tip in the target, whose place and radius the episode has put in the model."""
    target = model.site("target")
    x, z = 0.2 - 0.13 * np.sin(q[..., 2]), 0.4 + 0.13 * np.cos(q[..., 2])
    distance = np.hypot(x - target.pos[0], z - target.pos[2])
    return (distance < target.size[0]) - 5 * distance - finger_misses(q)


def fish_upright(q, v, model):
    """The torso's z axis along the world's, from its quaternion q[3:7]."""
    return bell(1 - 2 * (q[..., 4] ** 2 + q[..., 5] ** 2), 1, 1, 1)


def hopper_stand(q, v, model):
    """Torso high above the foot, which the suite counts from 0.6 m on, and above the ground."""
    torso, pelvis, thigh, calf = np.moveaxis(np.cumsum(q[..., 2:6], -1), -1, 0)   # absolute angles
    height = (0.135 * np.cos(torso) + 0.2 * np.cos(pelvis) + 0.33 * np.cos(thigh)
              + 0.32 * np.cos(calf))
    return 2 * (height > 0.62) + np.clip(height, -1, 0.7) + np.clip(1 + q[..., 1], 0, 0.8)


def walker_stand(q, v, model):
    """The suite's own: torso at 1.2 m or above, and upright."""
    return (3 * bell(q[..., 0] + 1.3, 1.2, 9, 0.6) + (1 + np.cos(q[..., 2])) / 2) / 4


def walker_move(q, v, model, speed):
    """Standing, times forward speed up to `speed` m/s."""
    return walker_stand(q, v, model) * (1 + 5 * np.clip(v[..., 1] / speed, 0, 1)) / 6


def cheetah_run(q, v, model):
    """Forward speed up to 10 m/s, belly down."""
    return np.clip(v[..., 0] / 10, -1, 1) - 0.02 * np.abs(q[..., 2])


@dataclass(frozen=True)
class Plan:
    """How a DMControl task is planned."""
    reward: Callable            # (q, v, model) -> (K, H), see above
    horizon: int                # H: steps to look ahead
    samples: int = 32           # K: sequences of actions that are tried
    hold: int = 2               # steps of a plan that are executed before the next one
    sigma: float = 0.7          # of the noise between them
    sharpness: float = 3.0      # how much the better ones outweigh the others


PLANS = {
    "ball_in_cup-catch": Plan(ball_in_cup_catch, 30, sharpness=6),
    "cheetah-run": Plan(cheetah_run, 40, samples=128, sigma=1.0, sharpness=10),
    "finger-spin": Plan(finger_spin, 20, samples=128, hold=1, sharpness=10),
    "finger-turn_easy": Plan(finger_turn, 80, samples=48, sigma=1.0, sharpness=8),
    "finger-turn_hard": Plan(finger_turn, 80, samples=48, sigma=1.0, sharpness=8),
    "fish-upright": Plan(fish_upright, 25, samples=20, hold=3),
    "hopper-stand": Plan(hopper_stand, 60, sigma=1.5, sharpness=10),
    "pendulum-swingup": Plan(pendulum_swingup, 50),
    "walker-run": Plan(partial(walker_move, speed=8), 25, samples=30, hold=3, sigma=1.0,
                       sharpness=10),
    "walker-stand": Plan(walker_stand, 30, samples=24, hold=3, sigma=1.0, sharpness=10),
    "walker-walk": Plan(partial(walker_move, speed=1.2), 25, samples=24, hold=3, sharpness=6),
}


class PlannedControl:
    """Plans a DMControl task of PLANS by MPPI (Williams et al., 2017); obs is not used.

    K sequences of H actions, the last plan plus noise, are tried out by mujoco.rollout from the
    state that the simulator is in; with J_k the mean reward of sequence k,

        plan = sum_k w_k actions_k,    w_k ~ exp(sharpness (J_k - max J) / std J)

    A weighted mean is smooth, so that it can be cloned. The simulator is read and never touched,
    and each plan starts from where noise has led. Its own noise is the same in every episode.
    """

    def __init__(self, env):
        import mujoco
        self.sim, self.plan = env.unwrapped.sim, PLANS[env.unwrapped.name]
        self.model = self.sim.physics.model.ptr
        self.scratch = mujoco.MjData(self.model)
        self.substeps = round(self.sim.control_timestep() / self.sim.physics.timestep())
        self.rng = np.random.default_rng(0)
        H = self.plan.horizon
        self.actions, self.t = np.zeros((H, self.model.nu)), 0
        # noise is drawn for every fifth step and joined by straight lines, (H, knots)
        knots = np.linspace(0, H - 1, max(3, H // 5))
        self.lines = np.stack([np.interp(np.arange(H), knots, row) for row in np.eye(len(knots))],
                              axis=1)

    def __call__(self, obs, reward):
        if self.t == self.plan.hold:
            ahead = self.actions[self.t:]
            self.actions, self.t = np.concatenate([ahead, np.zeros_like(self.actions[:self.t])]), 0
        if self.t == 0:
            self._replan()
        self.t += 1
        return self.actions[self.t - 1].astype(np.float32)

    def _replan(self):
        import mujoco
        from mujoco import rollout
        plan, nq, nv, n = self.plan, self.model.nq, self.model.nv, self.substeps
        state = np.zeros(mujoco.mj_stateSize(self.model, mujoco.mjtState.mjSTATE_FULLPHYSICS))
        mujoco.mj_getState(self.model, self.sim.physics.data.ptr, state,
                           mujoco.mjtState.mjSTATE_FULLPHYSICS)
        noise = plan.sigma * self.lines @ self.rng.standard_normal(
            (plan.samples, self.lines.shape[1], self.model.nu))
        noise[0] = 0                                           # the last plan itself
        tried = np.clip(self.actions + noise, -1, 1)           # (K, H, nu)
        states, _ = rollout.rollout(self.model, self.scratch, state[None], tried.repeat(n, axis=1))
        q, v = np.split(states[:, n - 1::n, 1:1 + nq + nv], [nq], axis=-1)        # [0] is the time
        value = plan.reward(q, v, self.model).mean(axis=1)     # (K,)
        weight = np.exp(plan.sharpness * (value - value.max()) / (value.std() + 1e-6))
        self.actions = np.tensordot(weight / weight.sum(), tried, axes=1)         # (H, nu)


# ------------------------------------------------------------------------------- learning histories
def q_learning(goals, seeds, episodes=HISTORY, rate=0.3, discount=0.95):
    """Tabular Q-learning in Dark-Room, one agent per goal that starts from nothing.

    goals (G, 2), seeds (G,) -> states (G, episodes, 100, 2), actions and rewards (G, episodes, 100)

        Q(s, a) <- Q(s, a) + rate (r + discount max_b Q(s', b) - Q(s, a))

    The share of random actions falls from 1 to 0 over the first 80 % of the episodes, so that
    returns rise all the while (the paper's histories are PPO's).
    """
    G, N, T = len(goals), DarkRoom.SIZE, DarkRoom.STEPS
    rngs, row = [np.random.default_rng([seed, 2]) for seed in seeds], np.arange(G)
    Q = np.stack([rng.normal(0, 1e-6, (N * N, 5)) for rng in rngs])         # ties are broken once
    states = np.zeros((G, episodes, T, 2), np.float32)
    actions, rewards = np.zeros((G, episodes, T), np.uint8), np.zeros((G, episodes, T), np.float32)
    for e in range(episodes):
        share = max(0.0, 1 - e / (0.8 * episodes))
        explore = np.stack([rng.random(T) for rng in rngs]) < share                     # (G, T)
        drawn = np.stack([rng.integers(0, 5, T) for rng in rngs])
        position = np.zeros((G, 2), int)
        for t in range(T):
            s = position @ (N, 1)
            a = np.where(explore[:, t], drawn[:, t], Q[row, s].argmax(1))
            states[:, e, t], actions[:, e, t] = position, a
            position = np.clip(position + DarkRoom.MOVES[a], 0, N - 1)
            rewards[:, e, t] = r = (position == goals).all(1)
            after = Q[row, position @ (N, 1)].max(1)
            Q[row, s, a] += rate * (r + discount * after - Q[row, s, a])
    return states, actions, rewards


def q_learning_histories(task, folder, seeds, advance):
    """Worker: one file per training goal, with all its episodes in the order of learning.

    dones are true at each episode's last step; returns_to_go are each episode's own. There is no
    noise but the learner's own.
    """
    goals = DarkRoom("train").goals
    goals = goals[np.array(seeds) % len(goals)]
    for seed, states, actions, rewards in zip(seeds, *q_learning(goals, seeds)):
        rtg = rewards[:, ::-1].cumsum(1)[:, ::-1]
        dones = np.zeros(rewards.shape, bool)
        dones[:, -1] = True
        write_trajectory(Path(folder) / f"{seed:06d}.hdf5", states.reshape(-1, 2), actions.ravel(),
                         rewards.ravel(), dones.ravel(), rtg.ravel())


# ----------------------------------------------------------------------------------------- recipes
@dataclass(frozen=True)
class Recipe:
    """How a task's data are made: whose actions, how many episodes, how noisy their execution."""
    expert: Callable                # expert(env) -> policy(obs, reward) -> action
    episodes: int = 30
    sigma: float = 0.3              # largest noise; a quarter of the episodes has none
    references: int = 20            # episodes that measure expert and random policy
    limit: int | None = None        # cut episodes at this many steps, in data and scores
    success_only: bool = False      # leave out episodes in which the task was not solved
    chunk: int = 10                 # episodes per job: few where an episode takes long
    randoms: int | None = None      # episodes of the random policy, where those are too few
    write: Callable | None = None   # writes the files in place of _make_episodes


# Meta-World's experts solve nearly all of their episodes, but for some: those that noise throws
# off (of 30 episodes 26 to 28 solved at 0.3, 29 or 30 at 0.1),
FRAGILE = ("assembly", "basketball", "hand-insert", "handle-pull-side")
# and those that fail from some starts whatever the noise (15 to 27 of 30)
UNSTEADY = ("box-close", "peg-insert-side", "pick-out-of-hole", "push-back", "shelf-place",
            "soccer", "stick-pull")

RECIPES = {
    "darkroom": Recipe(DarkRoomExpert, episodes=320, sigma=0.05, references=80),
    # one file for each of the 80 training goals; scored like darkroom/train
    "darkroom/histories": Recipe(DarkRoomExpert, 80, references=80, write=q_learning_histories,
                                 chunk=80),         # all of them learn side by side
    "metaworld": Recipe(MetaWorldExpert, references=40),
    **{f"metaworld/{name}-v3": Recipe(MetaWorldExpert, sigma=0.1, references=40)
       for name in FRAGILE},
    **{f"metaworld/{name}-v3": Recipe(MetaWorldExpert, sigma=0.1, references=40, success_only=True)
       for name in UNSTEADY},
    "metaworld/push-v3": Recipe(MetaWorldExpert, episodes=60, sigma=0.15),
    "metaworld/pick-place-v3": Recipe(MetaWorldExpert, episodes=60, sigma=0.1),
    **{f"dmcontrol/{name}": Recipe(PlannedControl, 10, 0.1, references=4, randoms=20, chunk=1)
       for name in PLANS},
    "dmcontrol/cartpole-balance": Recipe(CartpoleExpert, episodes=20, sigma=0.5),
    "dmcontrol/cartpole-swingup": Recipe(CartpoleExpert, episodes=20),
    "dmcontrol/point_mass-easy": Recipe(PointMassExpert, episodes=40),
    "dmcontrol/reacher-easy": Recipe(ReacherExpert, episodes=40),
    "dmcontrol/reacher-hard": Recipe(ReacherExpert, episodes=40),
    "atari": Recipe(atari_planner, episodes=5, sigma=0.05, references=3, limit=600, chunk=1),
    "atari/freeway": Recipe(FreewayExpert, episodes=16, sigma=0.1, references=8, chunk=2),
    "atari/pong": Recipe(PongExpert, episodes=10, sigma=0.02, references=5, chunk=2),
    "atari/breakout": Recipe(BreakoutExpert, episodes=20, sigma=0.02, references=8, chunk=2),
    "procgen": Recipe(procgen_planner, episodes=20, sigma=0.05, references=10, limit=500, chunk=1),
    "procgen/maze": Recipe(MazeExpert, episodes=300, sigma=0.1),
    "procgen/heist": Recipe(heist_expert, episodes=60, sigma=0.05, references=10, limit=500,
                            success_only=True, chunk=2),
    "composuite": Recipe(ComposuiteExpert, episodes=20, references=10, success_only=True),
    "mimicgen": Recipe(MimicgenExpert, sigma=0.2, references=10, success_only=True),
}


def recipe_of(task, needed=True):
    """The recipe of a task: its own row, else its domain's, else None if it is not needed."""
    recipe = RECIPES.get(task) or RECIPES.get(task.partition("/")[0])
    if recipe is None and needed:
        if task.startswith("gym/"):
            raise SystemExit(f"{task}: there is no expert for gymnasium's worlds; bring "
                             "trajectories: python data.py convert --help")
        near = difflib.get_close_matches(task, RECIPES, n=1, cutoff=0.0)
        raise SystemExit(
            f"there is no expert for {task}; nearest: {near[0]}. There are experts for "
            f"{', '.join(RECIPES)}"
        )
    return recipe


def expert_policy(envs, expert):
    """A new expert for each episode of each row, as a policy of eval.rollout."""
    experts = [None] * envs.num_envs

    def act(obs, reward, done, lost_life):
        for row in np.flatnonzero(done):
            experts[row] = expert(envs.envs[row])
        reward = np.where(done, 0.0, reward)
        return np.stack([policy(o, r) for policy, o, r in zip(experts, obs, reward)])
    return act


class NoisyActions(gym.Wrapper):
    """Executes a noisy copy of each action.

    Continuous: executed = clip(action + sigma N(0, 1)). Discrete: with probability sigma a
    uniformly random action instead. Noise and sigma follow from reset's seed alone. sigma is 0 in a
    quarter of the episodes, else uniform up to sigma_max: such data show how to recover from
    mistakes: the label stays what the expert asked for, info["executed"] is what the world got.
    """

    def __init__(self, env, sigma_max):
        super().__init__(env)
        self.sigma_max = sigma_max

    def reset(self, *, seed=None, options=None):
        self.rng = np.random.default_rng([seed, 1])  # [., 1]: not the stream of the world
        self.sigma = self.rng.uniform(0, self.sigma_max) * (self.rng.random() > 0.25)
        return self.env.reset(seed=seed, options=options)

    def step(self, action):
        space, sigma = self.action_space, self.sigma
        if isinstance(space, gym.spaces.Discrete):
            action = self.rng.integers(space.n) if self.rng.random() < sigma else action
        else:
            noise = sigma * self.rng.standard_normal(space.shape)
            action = np.clip(action + noise, -1, 1).astype(np.float32)
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated, {**info, "executed": action}


# ----------------------------------------------------------------------------------- writing files
@contextlib.contextmanager
def replacing(path):
    """A file, open to write, that takes the name `path` when it is whole and on the disk. Until
    then its name is this process's own; where anything fails, nothing is left of it.
    """
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise OSError(
            f"cannot write {path}: {error}; nothing half-written is left, free some space and run "
            "the same command again: it continues"
        ) from error


class ErrorsKept:
    """A file for HDF5, which crashes where a write fails: the first error waits here instead."""

    def __init__(self, file):
        self.file, self.error = file, None

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, content):
        view = memoryview(content).cast("B")
        try:
            while view and not self.error:
                view = view[self.file.write(view):]
        except OSError as error:
            self.error = error
        return len(content)

    def truncate(self, size):
        try:
            return self.file.truncate(size)
        except OSError as error:
            self.error = self.error or error


@contextlib.contextmanager
def new_hdf5(path):
    """A new HDF5 file that appears at `path` when it is whole, see replacing."""
    with replacing(path) as file:
        kept = ErrorsKept(file.raw)
        with h5py.File(kept, "w") as f:
            yield f
        if kept.error:
            raise kept.error


@contextlib.contextmanager
def file_errors_end():
    """A full disk, or a file that cannot be used, ends the program with the message alone."""
    try:
        yield
    except (OSError, BadTrajectory) as error:
        raise SystemExit(str(error)) from None


def write_json(path, content):
    """Atomically."""
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def storage(dtype, shape):
    """How HDF5 stores such an array: images in gzip chunks of 16, others plainly.

    A window begins anywhere, so that small chunks spare half of what a chunk as long as the window
    would unpack; still smaller ones compress worse. Level 1 of gzip halves the time of higher ones
    at nearly their size.
    """
    if dtype != np.uint8 or len(shape) != 4:
        return {}
    return dict(compression="gzip", compression_opts=1, chunks=(min(16, shape[0]), *shape[1:]))


def write_trajectory(path, states, actions, rewards, terminated, returns_to_go=None,
                     executed=None):
    """One trajectory to HDF5, atomically: the name appears when the file is whole.

    terminated: of the last step, or (T,) of each. executed, like actions: what the world received,
    written where that differs from the labels.
    """
    with new_hdf5(path) as f:
        f.create_dataset("states", data=states, **storage(states.dtype, states.shape))
        f.create_dataset("actions", data=actions)
        f.create_dataset("rewards", data=rewards.astype(np.float32))
        dones = np.zeros(len(rewards), bool)
        dones[-1 if np.ndim(terminated) == 0 else slice(None)] = terminated
        f.create_dataset("dones", data=dones)
        if executed is not None and (executed != actions).any():
            f.create_dataset("executed", data=executed)
        if returns_to_go is not None:
            f.create_dataset("returns_to_go", data=returns_to_go.astype(np.float32))


def split_lives(episode):
    """An episode -> the (start, stop) of its lives; one piece where the world has no lives."""
    lost = np.flatnonzero(np.diff(episode.lives) < 0) + 2
    bounds = [0, *[int(b) for b in lost if b < len(episode.rewards)], len(episode.rewards)]
    return list(zip(bounds[:-1], bounds[1:]))


def _make_episodes(task, folder, seeds, advance):
    """Worker: play the expert on these seeds and write one file per trajectory."""
    recipe, clip = recipe_of(task), split_task(task)[0].clip_rewards
    make = lambda: NoisyActions(make_env(task, limit=recipe.limit), recipe.sigma)
    pending = list(seeds)
    for attempt in range(TRIES if recipe.success_only else 1):
        failed = []
        for episode in rollout(make, partial(expert_policy, expert=recipe.expert),
                               [seed + attempt * NEXT_TRY for seed in pending], num_envs=1,
                               advance=advance):
            seed = episode.seed - attempt * NEXT_TRY
            if recipe.success_only and not episode.success:
                failed.append(seed)
                continue
            rewards = np.clip(episode.rewards, -1, 1) if clip else episode.rewards
            pieces = split_lives(episode)
            # life 0 last: it marks the seed as done
            for life, (a, b) in reversed(list(enumerate(pieces))):
                name = f"{seed:06d}.hdf5" if life == 0 else f"{seed:06d}-{life}.hdf5"
                end = episode.terminated or life + 1 < len(pieces)
                write_trajectory(Path(folder) / name, episode.states[a:b], episode.actions[a:b],
                                 rewards[a:b], end, executed=episode.executed[a:b])
        pending = failed
        if not pending:
            break
    for seed in pending:                    # or else each run would try the same seeds again
        (Path(folder) / f"{seed:06d}.failed").touch()


def _measure(task, who, seeds, advance, whole=False):
    """Worker: {seed: return} of the noise-free expert, the random policy or a constant action
    (int), in episodes cut where the recipe cuts the data's, or whole ones.
    """
    recipe = recipe_of(task, needed=who == "expert")
    if who == "expert":
        policy = partial(expert_policy, expert=recipe.expert)
    else:
        policy = random_policy if who == "random" else partial(constant_policy, action=who)
    make = partial(make_env, task, limit=recipe.limit if recipe and not whole else None)
    done = rollout(make, policy, seeds, num_envs=4, keep_states=False, advance=advance)
    return {e.seed: float(e.rewards.sum()) for e in done}


def seeds_of(episodes):
    """The seeds of a task's data: the first ones, and those that it takes to hold out five."""
    held_out = (s for s in itertools.count() if share_of(f"{s:06d}") < VALIDATION_FRACTION)
    return sorted({*range(episodes), *itertools.islice(held_out, min(LEAST_HELD_OUT, episodes))})


def default_heldout(tasks):
    """What is scored beside `tasks` where nothing is said: Dark-Room's other goals."""
    return ("darkroom/heldout",) if {"darkroom/train", "darkroom/histories"} & set(tasks) else ()


@file_errors_end()
def make(tasks=DEFAULT_TASKS, root="datasets", heldout=(), episodes=None, processes=None,
         timeout=600.0):
    """Generate what is missing of the tasks' data; returns the tasks that exist now.

    tasks, heldout: names of tasks or domains (eval.expand_tasks); of `heldout` only the card is
    made, which scoring needs. episodes: per task (default: each recipe's own). A kill at any moment
    loses at most the episodes being played: the next call continues, and what was there before
    can be trained on until more is complete. Tasks whose simulator is
    missing are named and left out, and so are those of which a simulator crashed, or hung for
    `timeout` seconds.
    """
    if episodes is not None and episodes < 1:
        raise SystemExit(f"{episodes} episodes a task cannot be made: give 1 or more")
    root, present, plans = Path(root), [], {}
    tasks = expand_tasks(tasks, root=root)
    for task in dict.fromkeys(tasks + expand_tasks(heldout, heldout=True, root=root)):
        missing, public = unavailable(task), is_public(find_folder(root, task))
        made = public or (root / task / "task.json").exists()
        if missing:                             # what is made can be trained on all the same
            print(f"{task} {'cannot be scored' if made else 'left out'}: {missing}",
                  file=sys.stderr)
        if missing or public:
            present += [task] if made else []
            continue
        present.append(task)
        plan = _plan(task, root / task, episodes, task in tasks)
        if plan:
            plans[task] = plan
    jobs = [(function, task, args) for task, plan in plans.items() for function, args in plan]
    if not jobs:
        return present
    # few more than one process per core would only take turns; slow tasks first, so that none runs
    # alone at the end
    processes = processes or min(os.cpu_count() or 1, 8)
    jobs.sort(key=lambda job: recipe_of(job[1]).chunk)
    measured, failed = _run(jobs, processes, timeout)
    again = [(_measure, task, args) for task in plans.keys() - failed.keys()
             for args in _best_constant(measured[task])]
    if again:
        told, more = _run(again, processes, timeout)
        failed |= more
        for task in told:
            measured[task] |= told[task]
    for task, count in failed.items():
        print(f"{task} is incomplete: {count} of its {len(plans[task])} jobs failed; what was made "
              "is kept, the same command tries the rest again"
              + ("; until then the data are those of before"
                 if (root / task / "task.json").exists() else ""), file=sys.stderr)
    for task in sorted(plans, key=lambda task: task not in tasks):      # cards without data last
        if task in tasks and task not in failed and not has_data(root / task):
            print(f"{task} left out: its expert solved none of its episodes", file=sys.stderr)
            failed[task] = 0
        if task not in failed:
            _finish_task(task, root / task, measured[task])
    return [t for t in present if t not in failed or (root / t / "task.json").exists()]


def _run(jobs, processes, timeout):
    """Do the jobs of all plans; returns what was measured, and {task: number of failed jobs}."""
    from tqdm import tqdm
    measured, failed = {task: {} for _, task, _ in jobs}, {}
    cost = lambda task, args: len(args[-1]) * split_task(task)[0].steps
    total = sum(cost(task, args) for _, task, args in jobs)
    try:
        with contextlib.closing(run_jobs(jobs, processes, _start_worker, timeout)) as running, \
                tqdm(total=total, desc="make data", unit="step", unit_scale=True) as bar:
            for (function, task, args), result in running:
                if isinstance(result, OSError):
                    raise result                                        # a full disk
                if isinstance(result, Exception):
                    failed[task] = failed.get(task, 0) + 1
                    bar.write(f"{task}, {_seeds_of(function, args)}: failed: {result}", sys.stderr)
                elif function is _measure:
                    measured[task].setdefault(args[0], {}).update(result)
                bar.set_postfix_str(task)
                bar.update(cost(task, args))
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted; the same command continues where it was") from None
    return measured, failed


def _seeds_of(function, args):
    who = f"measuring {args[0]}" if function is _measure else "episodes"
    return f"{who}, seeds {args[-1][0]} to {args[-1][-1]}"


def _start_worker():
    """Each worker of eval.run_jobs does (function, task, arguments)."""
    return lambda job, advance: job[0](job[1], *job[2], advance)


def _plan(task, folder, episodes, with_data):
    """The jobs [(function, args)] that complete a task's folder; the last argument: seeds."""
    recipe = recipe_of(task)
    made = load_json(folder / "task.json") if (folder / "task.json").exists() else {}
    if "made_by" in made and "reference_returns" not in made:
        raise SystemExit(f"{folder} was made by an earlier version, with other scales and without "
                         "the actions that were executed: move it away, and it is made again")
    wanted = (episodes or recipe.episodes) if with_data else 0
    files = {path.stem for end in ("*.hdf5", "*.failed") for path in folder.glob(end)}
    packed = {x.decode() for x in Pack(folder / PACK).names} if (folder / PACK).exists() else set()
    there = files | packed
    seeds = [s for s in seeds_of(wanted) if f"{s:06d}" not in there]
    if not seeds and (folder / "task.json").exists() and not (folder / UNFINISHED).exists():
        return []
    if packed - files:
        raise SystemExit(f"{folder / PACK} holds {len(packed - files)} trajectories that are no "
                         f"files any more, so nothing can be added to it; move it away, or ask for "
                         f"at most {len(packed)} episodes")
    env = make_env(task)                                # a name that does not exist ends here
    space, image = env.action_space, env.observation_space.dtype == np.uint8
    env.close()
    folder.mkdir(parents=True, exist_ok=True)
    # without it or a card the files would pass for a download; beside a card and an index it says
    # that files which they do not know yet are no fault
    write_json(folder / UNFINISHED, {})
    jobs = lambda seeds: [seeds[i:i + recipe.chunk] for i in range(0, len(seeds), recipe.chunk)]
    work = recipe.write or _make_episodes
    plan = [(work, (str(folder), few)) for few in jobs(seeds)]
    n = min(recipe.references, 2 * episodes) if episodes else recipe.references
    span = lambda start, n=n: list(range(start, start + n))
    goals = recipe.references if domain_of(task) == "darkroom" else n   # one of each, see DarkRoom
    plan += [(_measure, ("expert", few)) for few in jobs(span(EXPERT_SEED, goals))]
    plan += [(_measure, ("random", span(RANDOM_SEED, max(n, recipe.randoms or 0))))]
    if isinstance(space, gym.spaces.Discrete):
        few = max(1, n // 8) if image else n
        plan += [
            (_measure, (a, list(range(CONSTANT_SEED, CONSTANT_SEED + few))))
            for a in range(space.n)
        ]
    return plan


def _best_constant(measured):
    """What is left to _measure of the constant action that was the best in too few episodes: as
    many others as the random policy has, which replace them.
    """
    wanted = len(measured["random"])
    constants = {a: r for a, r in measured.items() if isinstance(a, int) and len(r) < wanted}
    if not constants:
        return []
    best = max(constants, key=lambda a: np.mean([*constants[a].values()]))
    first = max(constants[best]) + 1
    return [(best, [seed]) for seed in range(first, first + wanted)]


def _finish_task(task, folder, measured):
    """Write the index files and the card of a task whose data data.py made."""
    recipe, (domain, _) = recipe_of(task), split_task(task)
    stats = statistics(folder) | world_spec(task)
    # in the order of the seeds, however the jobs ended
    measured = {who: [r for _, r in sorted(result.items())] for who, result in measured.items()}
    extra = {
        "limit": recipe.limit,
        "reward_scale": domain.made_scale or domain.reward_scale,
        "reference_score": float(np.mean(measured["expert"])),
        "random_score": float(np.mean(measured["random"])),
        "reference_returns": measured["expert"],
        "random_returns": measured["random"],
        "made_by": recipe.write.__name__ if recipe.write else
        f"{recipe.expert.__name__}; labels clean, execution noise up to {recipe.sigma}",
        "versions": {
            p: importlib.metadata.version(p)
            for p in sorted({"gymnasium", "numpy", domain.install.partition("==")[0]})
        },
    }
    if recipe.write:            # histories carry true returns-to-go, whatever their domain does
        extra["constant_rtg"] = False
    constants = {a: r for a, r in measured.items() if isinstance(a, int)}
    if constants:                               # see _best_constant
        best = max(constants, key=lambda a: (len(constants[a]), np.mean(constants[a])))
        extra["constant"] = {"action": best, "mean_return": float(np.mean(constants[best]))}
    if not stats["lengths"]:    # no data of its own: Mixture reads it as the tasks that it is with
        width = stats["observation"]["shape"]
        extra |= {"state_mean": np.zeros(width).tolist(), "state_std": np.ones(width).tolist()}
        extra["target_return"] = domain.constant_rtg or max(measured["expert"])
    write_card(folder, stats, task_card(task, stats, **extra))


def write_card(folder, stats, card):
    """The index files, then the card, which says that the task's data are complete."""
    write_json(folder / "episode_lengths.json", stats["lengths"])
    write_json(folder / "episode_returns.json", stats["returns"])
    write_json(folder / "task.json", card)
    (folder / UNFINISHED).unlink(missing_ok=True)


def statistics(folder, at_most=None):
    """One pass over a task's trajectories, or over at_most of them, evenly chosen.

    Returns {"lengths", "returns": {episode: number}, "observation", "action": as in a card,
    "state_mean", "state_std": per coordinate or pixel, "repeated": trajectories that equal one that
    is held out}; without a trajectory the first two, empty. Malformed ones are left out: training
    and `check` name them.
    """
    stats, total, square, count = {"lengths": {}, "returns": {}}, 0.0, 0.0, 0
    digests = {}
    for stem, t in trajectories(folder, at_most):
        if isinstance(t, BadTrajectory):
            continue
        image = t.states.ndim == 4
        spec = {"observation": {"kind": "image" if image else "vector",
                                "shape": [1, 64, 64] if image else list(t.states.shape[1:])},
                "action": {"kind": "discrete", "n": 18} if t.actions.ndim == 1
                else {"kind": "continuous", "dims": t.actions.shape[1]}}
        if any(stats.get(key, value) != value for key, value in spec.items()):
            continue
        # a game of pixels is long: in blocks, and a quarter of them where a sample will do
        every, size = (200, 50) if image and at_most else (1000, 1000)
        try:
            digest = hashlib.sha256(t.actions.tobytes())
            for start in range(0, len(t.rewards), every):
                x = t.states[start:start + size]
                digest.update(x.tobytes())
                x = (to_gray(x) if image else x).astype(np.float64)
                total, square, count = total + x.sum(0), square + (x ** 2).sum(0), count + len(x)
        except OSError:                         # damaged frames
            continue
        stats |= spec
        stats["lengths"][stem], stats["returns"][stem] = len(t.rewards), float(t.rewards.sum())
        digests[stem] = digest.digest()
    if stats["lengths"]:
        mean, std = total / count, np.sqrt(np.maximum(square / count - (total / count) ** 2, 0))
        if stats["observation"]["kind"] == "image":     # pixels that hardly move stay small
            std = std + 0.05 * 255
        else:           # what is constant within a task (a goal, a one-hot task) is kept as it is
            mean, std = np.where(std < 1e-4, 0, mean), np.where(std < 1e-4, 1, std.clip(min=0.01))
        stats["state_mean"], stats["state_std"] = mean.round(6).tolist(), std.round(6).tolist()
    if digests and not at_most:
        held = dict(zip(digests, hold_out(digests)))
        seen = {digest for stem, digest in digests.items() if held[stem]}
        stats["repeated"] = [x for x, digest in digests.items() if digest in seen and not held[x]]
    return stats


def share_of(name):
    """A trajectory's name -> a fixed number in [0, 1); the lives of a game (seed-life) have one."""
    game = name.partition("-")[0] if re.fullmatch(r"\d+-\d+", name) else name
    return int(hashlib.sha256(game.encode()).hexdigest()[:8], 16) / 2 ** 32


def hold_out(names):
    """Which of a task's trajectories are for validation, (N,) bool: the first, and others by a hash
    of the name, so that the part stays what it is when others are added.
    """
    names = list(names)
    first, shares = share_of(min(names, default="")), np.array([share_of(name) for name in names])
    held = (shares < VALIDATION_FRACTION) | (shares == first)
    return held & ~held.all()


def task_card(task, stats, **extra):
    """The card of a task from the statistics of its data and eval.DOMAINS; `extra` comes last.

    A domain that eval.py does not know is scaled by a fifth of its largest return. Where nobody
    measured them, the reference score is the mean return of the data, the random score its
    smallest.
    """
    domain = DOMAINS.get(task.split("/")[0], Domain(None, "", "", (), reward_scale=None))
    returns = list(stats["returns"].values()) or [0.0]
    card = {
        "task": task,
        "domain": domain_of(task),
        "observation": stats["observation"],
        "action": stats["action"],
        "reward_scale": domain.reward_scale or max(map(abs, returns)) / 5 or 1.0,
        "clip_rewards": domain.clip_rewards,
        "constant_rtg": domain.constant_rtg is not None,
        "limit": None,
        "target_return": domain.constant_rtg or max(returns),
        "reference_score": float(np.mean(returns)),
        "random_score": min(returns),
    }
    return card | {key: stats[key] for key in ("state_mean", "state_std", "repeated")
                   if key in stats} | extra


# ----------------------------------------------------------------------------------- reading files
class BadTrajectory(ValueError):
    """A file that must not be trained on; the message names path and reason."""


@dataclass
class Trajectory:
    """One validated trajectory; images stay on disk and are sliced there, the rest is in memory.

    It is steps first to first + length of its arrays: in a pack they hold those of others too.
    """
    states: np.ndarray | h5py.Dataset       # (T, S) float32 or (T, 1, 64, 64) uint8
    actions: np.ndarray                     # (T,) int64 or (T, A) float32
    rewards: np.ndarray                     # (T,) float32
    returns_to_go: np.ndarray               # (T,) float32
    file: h5py.File | None                  # open while images are read from it
    first: int
    length: int
    executed: np.ndarray                    # as actions: what the world received
    dones: np.ndarray | None = None         # (T,) bool; not read from a pack


def open_trajectory(path, card=None, length=None):
    """Read and validate one file, with its task's card and its length in the index if given.

    BadTrajectory: path and reason.
    """
    bad, f = lambda reason: BadTrajectory(f"{path}: {reason}"), open_hdf5(path)
    try:
        missing = [key for key in ("states", "actions", "rewards", "dones") if key not in set(f)]
        if missing:
            raise bad(f"has no {', '.join(missing)}; expected states, actions, rewards, dones")
        for key in ("states", "actions", "rewards", "dones", "returns_to_go", "executed"):
            if key in set(f):
                inside(f, key)
        states, actions, rewards = f["states"], f["actions"][:], f["rewards"][:]
        executed, rtg = (f[key][:] if key in f else None for key in ("executed", "returns_to_go"))
        if f["dones"].shape not in ((len(rewards),), ()):
            raise bad(f"lengths differ: dones {f['dones'].shape}, rewards {rewards.shape}")
        if actions.ndim == 2 and actions.shape[1] == 1 and actions.dtype.kind in "iu":
            actions = actions[:, 0]
        if states.dtype != np.uint8:
            states = states[:]
        if executed is not None and executed.size == actions.size:
            executed = executed.reshape(actions.shape)
        dones = np.zeros(len(rewards), bool)
        dones[-1 if f["dones"].shape == () else 0:] = f["dones"][()]
        image = _check_values(bad, states, actions, rewards, card, dones, rtg, executed)
        if length is not None and len(rewards) != length:
            raise bad(f"holds {len(rewards)} steps, but the index says {length}")
        if rtg is None:
            rtg = np.cumsum(rewards[::-1], dtype=np.float64)[::-1]
    except BadTrajectory:
        f.close()
        raise
    except (OSError, KeyError, RuntimeError, TypeError, ValueError, AttributeError,
            MemoryError) as error:
        f.close()
        raise bad(f"damaged inside ({str(error)[:80]})") from None
    if not image:
        f.close()
        states = states.astype(np.float32)
    kind = np.int64 if actions.ndim == 1 else np.float32
    return Trajectory(states, actions.astype(kind), rewards.astype(np.float32),
                      rtg.astype(np.float32), f if image else None, 0, len(rewards),
                      (actions if executed is None else executed).astype(kind), dones)


def open_hdf5(path):
    """The HDF5 file at `path`, to read; BadTrajectory says what is wrong with it."""
    bad = lambda reason: BadTrajectory(f"{path}: {reason}")
    try:
        mode = os.stat(path)            # opening a pipe would wait for ever
        if not stat.S_ISREG(mode.st_mode):
            raise bad("is not a file")
        if mode.st_size == 0:
            raise bad("is empty (0 bytes)")
        return h5py.File(path, "r")
    except FileNotFoundError:
        link = os.path.islink(path)
        raise bad(f"is a symbolic link to {os.readlink(path)}, which does not exist" if link else
                  "does not exist (any more), although the index or the folder lists it") from None
    except PermissionError:
        raise bad("may not be read (permissions)") from None
    except OSError as error:
        raise bad(f"not a readable HDF5 file, perhaps truncated ({str(error)[:80]})") from None


def inside(group, key, bounded=True):
    """group[key], if it lies in the group's own file: a link, or a data set whose values are
    elsewhere, could read any file of the user. Of a data set `bounded` says that it must fit into
    memory, or a file of a kilobyte could ask for a terabyte. BadTrajectory otherwise.
    """
    bad = lambda reason: BadTrajectory(f"{group.file.filename}: {reason}")
    if key not in set(group):                   # `in group` would follow a link
        raise bad(f"has no {key}")
    here = group.id.links.get_info(key.encode()).type == h5py.h5l.TYPE_HARD
    found = group[key] if here else None
    if isinstance(found, h5py.Group):
        return found
    if not here or found.is_virtual or found.external:
        raise bad(f"{key} is not in this file: it points elsewhere")
    if found.dtype.kind not in "fiubS":
        raise bad(f"{key} is {found.dtype}, not numbers")
    if bounded and (found.nbytes > LARGEST or found.shape and found.shape[0] > MOST_STEPS):
        raise bad(f"{key} claims {found.shape} values, {found.nbytes / 2 ** 30:.1f} GiB; at most "
                  f"{MOST_STEPS:,} steps and {LARGEST >> 30} GiB are read")
    return found


def _check_values(bad, states, actions, rewards, card, dones=None, rtg=None, executed=None):
    """Shapes, types and values of one trajectory; raises bad(reason); true if states are images.

    Of a file, of an episode in a pack, and of what is converted. Values must be finite as float32,
    in which they are kept.
    """
    def finite(x):
        with np.errstate(over="ignore"):
            return np.isfinite(x.astype(np.float32, copy=False)).all()
    T, image = len(states), states.dtype == np.uint8
    if T == 0 or len(actions) != T or rewards.shape != (T,):
        raise bad(f"lengths differ or are 0: states {states.shape}, actions {actions.shape}, "
                  f"rewards {rewards.shape}")
    if image:
        fits = states.shape[1:] in ((1, 64, 64), (3, 64, 64))
    else:
        fits = states.dtype.kind == "f" and states.ndim == 2 and 0 < states.shape[1] <= 204
    if not fits:
        raise bad(f"states are {states.dtype} {states.shape}; expected float (T, S) with S up to "
                  "204, or uint8 (T, 1 or 3, 64, 64)")
    if rewards.dtype.kind not in "fiub":
        raise bad(f"rewards are {rewards.dtype}, not numbers")
    if not finite(rewards) or not image and not finite(states):
        raise bad("holds NaN or infinite states or rewards")
    _check_actions(bad, actions, card)
    # RGB becomes gray
    shape = (1, *states.shape[2:]) if image else states.shape[1:]
    if card and tuple(shape) != tuple(card["observation"]["shape"]):
        raise bad(
            f"states are {states.shape[1:]} each, but the card says "
            f"{tuple(card['observation']['shape'])}"
        )
    if executed is not None and executed.shape != actions.shape:
        raise bad(f"lengths differ: executed {executed.shape}, actions {actions.shape}")
    if executed is not None:
        _check_actions(bad, executed, card, "executed actions")
    if rtg is None:
        return image
    if rtg.shape != rewards.shape or not finite(rtg):
        raise bad(f"returns_to_go {rtg.shape} are not {T} finite numbers")
    # Dark-Room's histories count to the end of each episode; elsewhere to the end of the file
    sums = np.cumsum(rewards[::-1], dtype=np.float64)[::-1]
    if not dones[:-1].any() and np.abs(rtg - sums).max() > 1e-3 * np.abs(rewards).sum() + 1e-5:
        raise bad(f"returns_to_go begin with {rtg[0]:g}, but the rewards add up to {sums[0]:g}: "
                  "they must be unscaled sums; delete them and they are computed")
    return image


def _check_actions(bad, actions, card, name="actions"):
    """Shape, type and range of a trajectory's actions; raises bad(reason)."""
    discrete = actions.ndim == 1
    if actions.dtype.kind not in ("iu" if discrete else "f") or actions.ndim > 2:
        raise bad(f"{name} are {actions.dtype} {actions.shape}; expected int (T,) or float (T, A)")
    if not discrete and not 0 < actions.shape[1] <= 8:
        raise bad(f"{name} have {actions.shape[1]} dimensions; expected 1 to 8")
    low, high = (0, 17) if discrete else (-1.0, 1.0)
    if card and (card["action"]["kind"] == "discrete") != discrete:
        raise bad(
            f"{name} are {actions.dtype} {actions.shape}, but the card says {card['action']}"
        )
    if card and discrete:
        high = card["action"]["n"] - 1
    if card and not discrete and actions.shape[1] != card["action"]["dims"]:
        raise bad(
            f"{name} have {actions.shape[1]} dimensions, but the card says "
            f"{card['action']['dims']}"
        )
    if not np.isfinite(actions).all() or actions.min() < low or actions.max() > high:
        raise bad(f"{name} from {actions.min()} to {actions.max()}, expected {low} to {high}")


# one trajectory in the index of a Mixture: number of its task, its place among the names, its steps
ROW = np.dtype([("task", np.int32), ("episode", np.int32), ("length", np.int32)])


def episodes_in(folder):
    """The names of a task's trajectories, in order."""
    with os.scandir(folder) as entries:
        return sorted(e.name[:-5] for e in entries if e.name.endswith(".hdf5"))


def trajectories(folder, at_most=None):
    """Yields (name, Trajectory) of a task's, or of at_most of them, evenly chosen; in the place of
    a malformed one the BadTrajectory that says why. Those of a pack are cut out of it.
    """
    folder = Path(folder)
    try:
        packed = open_pack(folder)
    except BadTrajectory as error:
        yield PACK, error
        return
    names = [name.decode() for name in packed.names] if packed else episodes_in(folder)
    n = len(names)
    for k in range(n) if not at_most or n <= at_most else np.linspace(0, n - 1, at_most):
        name = names[int(k)]
        try:
            t = packed.cut(int(k)) if packed else open_trajectory(folder / f"{name}.hdf5")
        except BadTrajectory as error:
            yield name, error
            continue
        yield name, t
        if t.file:
            t.file.close()


def has_data(folder):
    """Whether a folder holds any trajectory, as a file or packed."""
    return Path(folder).is_dir() and any(next(Path(folder).glob(x), None) for x in ("*.hdf5", PACK))


def plain(name):
    """A task's name less what its spellings differ in: case, "-" and "_", Meta-World's v2 or v3,
    Atari's NoFrameskip-v4.
    """
    return re.sub(r"(noframeskip)?v\d$", "", re.sub(r"[-_]", "", name.lower()))


def find_folder(root, task):
    """The folder of a task's data: <root>/<domain>/<task>, or <root>/<task> as downloaded, also
    where the name is spelled differently (see plain). The first, if none holds data.
    """
    root, (domain, _, name) = Path(root), task.partition("/")
    if domain == "gym":         # these names have one spelling, and CartPole-v0 is not CartPole-v1
        return root / task
    candidates, names = [root / task], {plain(name)}
    if domain == "mimicgen":    # the public folders of its Panda name no robot: stack_d0
        names.add(plain(name.removeprefix("Panda_")))
    for parent in (root / domain, root):
        if parent.is_dir():
            candidates += sorted(p for p in parent.iterdir() if plain(p.name) in names)
    return next((folder for folder in candidates if has_data(folder)), root / task)


def is_public(folder):
    """Whether a folder's data were converted or downloaded: data that make must leave alone."""
    unfinished = folder / UNFINISHED
    if unfinished.exists():
        if "source" in load_json(unfinished):
            raise SystemExit(f"{folder}: an unfinished conversion; run the same python data.py "
                             "convert again, or delete the folder")
        return False
    if (folder / "task.json").exists():
        return "source" in load_json(folder / "task.json")
    return has_data(folder)


def load_card(folder, task=None):
    """The card of a task's folder; of a download, which has none, made from some of its files,
    whose statistics are kept beside them for the next start.
    """
    folder = Path(folder)
    if (folder / "task.json").exists():
        card = load_json(folder / "task.json")
        wrong = card_faults(card)
        if wrong:
            raise SystemExit(f"{folder / 'task.json'} {wrong[0]}; see: python data.py check "
                             f"{folder}")
        return card
    task = task or task_name(folder)
    if not has_data(folder) or not is_public(folder):
        raise SystemExit(f"{folder} has no task.json; finish it with: python data.py make {task}")
    kept = folder / "statistics.json"
    stats = load_json(kept) if kept.exists() else {}
    if stats.get("files") != len(episodes_in(folder)):
        stats = statistics(folder, at_most=SAMPLE) | {"files": len(episodes_in(folder))}
        if not stats["lengths"]:
            raise SystemExit(f"{folder}: none of the trajectories that were tried is sound; see: "
                             f"python data.py check {folder}")
        with contextlib.suppress(OSError):              # a read-only disk
            write_json(kept, stats)
    try:
        if (folder / "episode_returns.json").exists() or (folder / PACK).exists():
            stats["returns"] = episode_numbers(folder, "returns", "skip")
        card = task_card(
            task, stats | {"action": action_spec(task, stats["action"])},
            made_by="downloaded; mean and smallest return stand for reference and random",
            source="downloaded")
        wrong = card_faults(card)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        wrong = [f"{type(error).__name__}: {error}"]
    if wrong:
        raise SystemExit(f"{kept}: {wrong[0]}; delete it")
    return card


def action_spec(task, action):
    """How many actions a discrete task has: its simulator knows, the data show only those used."""
    world = world_spec(task) if action["kind"] == "discrete" else None
    return world["action"] if world and world["action"]["kind"] == "discrete" else action


def load_json(path):
    """The content of a JSON file; SystemExit names the file that holds no JSON object."""
    try:
        if Path(path).exists() and not Path(path).is_file():        # a pipe: it would wait for ever
            raise OSError("not a file")
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise SystemExit(f"{path} cannot be read as JSON ({error}); restore it, or delete its "
                         "folder and make or convert the data again") from None
    if not isinstance(content, dict):
        raise SystemExit(f"{path} is not a JSON object")
    return content


def load_index(folder, on_bad="refuse"):
    """Names (E,) and lengths (E,) of a task's trajectories, by name, and their pack or None.

    From the pack's own index, or from episode_lengths.json: no trajectory is opened. Only where
    there is neither, each file is.
    """
    pack = open_pack(folder)
    if pack:
        return pack.names, pack.lengths, pack
    lengths = episode_numbers(folder, "lengths", on_bad)
    names = sorted(lengths)
    # fixed-width bytes: a name of a million trajectories costs its letters, not a Python object
    return (np.array([name.encode() for name in names], bytes),
            np.array([lengths[name] for name in names], np.int64), None)


def episode_numbers(folder, what, on_bad="refuse"):
    """{episode: steps or return}, what: "lengths" or "returns".

    From the pack, else from the index, so that no file is opened, else from the files, once. An
    index that lists other episodes than there are is refused, or with on_bad "skip" only what both
    know is returned.
    """
    folder, pack = Path(folder), open_pack(folder)
    if pack:
        return dict(zip((x.decode() for x in pack.names), getattr(pack, what).tolist()))
    path, stems, index = folder / f"episode_{what}.json", episodes_in(folder), {}
    kept = folder / f"found_{what}.json"                # what was read here at an earlier start
    odd = lambda x: not isinstance(x, (int, float)) or not abs(x) < 1e30 or (
        what == "lengths" and not 0 < x <= MOST_STEPS)
    if path.exists():
        index = load_json(path)
        wrong = sorted(index.keys() ^ stems)
        if (folder / UNFINISHED).exists() and (folder / "task.json").exists():
            wrong = sorted(index.keys() - set(stems))    # what is being added does not count yet
        wrong += [s for s, x in index.items() if odd(x)]
        if wrong and on_bad == "refuse":
            raise SystemExit(f"malformed data: {path} and the files disagree about {wrong[0]} and "
                             f"{len(wrong) - 1} more; delete it, or go on without these: "
                             f"--on-bad skip. See: python data.py check {folder}")
        good = index.keys() - set(wrong)
        index = {stem: index[stem] for stem in stems if stem in good}
        if wrong:
            print(f"skipped: {path} and the files disagree about {len(wrong)} episodes",
                  file=sys.stderr)
        return index
    found = load_json(kept) if kept.exists() else {}
    if found.keys() == set(stems) and not any(map(odd, found.values())):
        return {stem: found[stem] for stem in stems}
    faults = 0
    for stem in stems:
        try:
            with open_hdf5(folder / f"{stem}.hdf5") as f:
                rewards = inside(f, "rewards")
                index[stem] = len(rewards) if what == "lengths" else float(rewards[:].sum())
        except (OSError, KeyError, ValueError, TypeError, RuntimeError):
            index[stem], faults = 1, 1  # it is named and refused, or skipped, where it is opened
    if not faults:
        with contextlib.suppress(OSError):              # a read-only disk
            write_json(kept, index)
    return index


# ------------------------------------------------------------------------------------ packed files
PACK = "pack.h5"


class Pack:
    """All trajectories of a task in one file, one after the other, read by slices.

    states, actions, executed, rewards, dones and returns_to_go as in single files, but (N, ...) for
    the N steps of all; starts, lengths and returns (E,) and episodes (E,), the names, say which
    steps are whose; left_out names bad files that were beside it. Vectors are stored as they are
    and mapped into memory, images in gzip chunks. A trajectory is validated at its first use, as a
    file is.
    """

    def __init__(self, path):
        self.path, bad = Path(path), lambda reason: BadTrajectory(
            f"{path}: {reason}; delete it and make it again: python data.py pack")
        self.file = open_hdf5(path)
        try:
            self.names, self.starts, self.lengths, self.returns = (
                inside(self.file, key)[:] for key in ("episodes", "starts", "lengths", "returns"))
            columns = [self._array(inside(self.file, key, bounded=False)) for key in (
                "states", "actions", "rewards", "returns_to_go", "dones")]
            self.states, self.actions, self.rewards, self.returns_to_go, self.dones = columns
            self.executed = self._array(inside(self.file, "executed", bounded=False)) \
                if "executed" in set(self.file) else self.actions
            self.left_out = inside(self.file, "left_out")[:] if "left_out" in set(self.file) else \
                self.names[:0]
            steps = {len(x) for x in (*columns, self.executed)}
            fits = (self.names.dtype.kind == "S" and self.starts.dtype == self.lengths.dtype == int
                    and self.states.dtype in (np.float32, np.uint8)
                    and self.actions.dtype in (np.float32, np.int64)
                    and self.rewards.dtype == self.returns_to_go.dtype == np.float32
                    and self.executed.dtype == self.actions.dtype and self.dones.dtype == bool
                    and len({x.shape for x in (self.names, self.starts, self.lengths,
                                               self.returns)}) == 1 == self.names.ndim)
            [name.decode() for name in self.names]
        except BadTrajectory:
            raise
        except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise bad(f"not a whole pack ({str(error)[:80]})") from None
        if not fits:
            raise bad("not what data.py writes")
        if len(steps) > 1 or (self.starts < 0).any() or (self.lengths < 1).any() or \
                (self.lengths > MOST_STEPS).any() or \
                (self.starts > min(steps) - self.lengths).any():
            raise bad("its index points outside of its data")
        self.sound = np.zeros(len(self.names), bool)

    def __reduce__(self):                       # a reading process opens its own
        return Pack, (self.path,)

    def _array(self, dataset):
        """A dataset without filters as a memory-mapped array, an image set as it is."""
        if dataset.id.get_offset() is None or dataset.chunks or not dataset.size:
            return dataset
        mapped = np.memmap(self.path, dataset.dtype, "r", dataset.id.get_offset(), dataset.shape)
        return mapped.view(np.ndarray)          # slices of a plain array are faster

    def stale(self):
        """Whether it lacks one of the files beside it, or is older than one."""
        names, made = {*self.names.tolist(), *self.left_out.tolist()}, self.path.stat().st_mtime_ns
        with os.scandir(self.path.parent) as entries:
            return any(e.name.endswith(".hdf5") and (
                e.name[:-5].encode() not in names
                or e.stat(follow_symlinks=False).st_mtime_ns > made) for e in entries)

    def trajectory(self, episode, card=None):
        """Number `episode` as a Trajectory; BadTrajectory as open_trajectory."""
        t = Trajectory(self.states, self.actions, self.rewards, self.returns_to_go, None,
                       int(self.starts[episode]), int(self.lengths[episode]), self.executed)
        if not self.sound[episode]:
            bad = lambda reason: BadTrajectory(
                f"{self.path}:{self.names[episode].decode()}: {reason}")
            here, image = slice(t.first, t.first + t.length), self.states.ndim == 4
            try:                                # pictures are read when they are needed
                states = np.broadcast_to(np.uint8(0), (t.length, *self.states.shape[1:])) \
                    if image else self.states[here]
                _check_values(bad, states, self.actions[here], self.rewards[here], card,
                              self.dones[here], self.returns_to_go[here], self.executed[here])
            except OSError as error:
                raise bad(f"damaged inside ({str(error)[:80]})") from None
            self.sound[episode] = True
        return t

    def cut(self, episode, card=None):
        """Number `episode` as a Trajectory that stands alone, in memory."""
        t = self.trajectory(episode, card)
        here = slice(t.first, t.first + t.length)
        try:
            return Trajectory(t.states[here], t.actions[here], t.rewards[here],
                              t.returns_to_go[here], None, 0, t.length, t.executed[here],
                              self.dones[here])
        except OSError as error:
            raise BadTrajectory(f"{self.path}:{self.names[episode].decode()}: damaged inside "
                                f"({str(error)[:80]})") from None


def open_pack(folder):
    """The pack of a folder; None if there is none, or if it does not hold what the files beside it
    do: then they are read.
    """
    path = Path(folder) / PACK
    pack = Pack(path) if path.exists() else None
    if pack and pack.stale():
        say_once(f"{path} is older than the files beside it, or lacks some: the files are read; "
                 f"pack them again with: python data.py pack {folder}")
        return None
    return pack


@cache
def say_once(text):
    """One line on standard error, however often it is asked for."""
    print(text, file=sys.stderr)


def pack_task(folder, card=None, on_bad="refuse"):
    """Gather a task's files in one, atomically; returns (trajectories, bytes).

    Every trajectory is validated on the way; on_bad "skip" names a bad one and leaves it out.
    Memory holds one trajectory at a time.
    """
    folder = Path(folder)
    names, lengths, packed = load_index(folder, on_bad)
    if packed is not None:
        return len(names), packed.path.stat().st_size
    # what the index says stays true: top_fraction and target returns come from it
    known = (folder / "episode_returns.json").exists()
    returns = episode_numbers(folder, "returns", on_bad) if known else {}
    total, at, kept, left_out = int(lengths.sum()), 0, [], []
    with new_hdf5(folder / PACK) as f:
        for name, length in zip(names, lengths.tolist()):
            path = folder / f"{name.decode()}.hdf5"
            try:
                t = open_trajectory(path, card, length)
                states = to_gray(t.states[:]) if t.states.ndim == 4 else t.states
                for key, x in (("states", states), ("actions", t.actions)):
                    if kept and f[key].shape[1:] != x.shape[1:]:
                        raise BadTrajectory(f"{path}: {key} are {x.shape[1:]} each, those before "
                                            f"it {f[key].shape[1:]}")
            except (BadTrajectory, OSError) as error:
                if isinstance(error, OSError):
                    error = BadTrajectory(f"{path}: damaged inside ({str(error)[:80]})")
                if on_bad == "refuse":
                    raise error from None
                print(f"skipped: {error}", file=sys.stderr)
                left_out.append(name)
                continue
            columns = dict(states=states, actions=t.actions, rewards=t.rewards,
                           returns_to_go=t.returns_to_go, dones=t.dones, executed=t.executed)
            for key, x in columns.items():
                if not kept:
                    shape = (total, *x.shape[1:])
                    f.create_dataset(key, shape, x.dtype, **storage(x.dtype, shape))
                f[key][at:at + length] = x
            if t.file:
                t.file.close()
            kept.append((name, at, length, returns.get(name.decode(), float(t.rewards.sum()))))
            at += length
        if not kept:
            raise BadTrajectory(f"{folder}: holds no trajectory that can be packed")
        for key, x in zip(("episodes", "starts", "lengths", "returns"), zip(*kept)):
            f[key] = np.array(x)
        f["left_out"] = np.array(left_out, names.dtype)
    return len(kept), (folder / PACK).stat().st_size


# -------------------------------------------------------------------------------------- conversion
# A reader yields the episodes of one public format as (name, states, actions, rewards, terminated)
# and may leave out what is `present` already. What is cut short at the end of a source is kept, as
# an episode that did not terminate.
def read_minari(args, present):
    """Minari: data/main_data.hdf5 with groups episode_0, ...; one observation more than actions."""
    path = args.source / "data" / "main_data.hdf5"
    if not path.exists():
        raise SystemExit(f"{path} does not exist: the source must be a data set's folder in "
                         "Minari's hdf5 format (its arrow format is not read)")
    with open_hdf5(path) as f:
        for name, episode in numbered(f, "episode_", present):
            actions, rewards, terminations = (
                inside(episode, key)[:] for key in ("actions", "rewards", "terminations"))
            T = len(rewards)
            yield (name, flatten(inside(episode, "observations"))[:T], actions, rewards,
                   T > 0 and bool(terminations[T - 1]))


def read_robomimic(args, present):
    """robomimic and Mimicgen: groups data/demo_0, ... with obs/<key>, chosen by --obs-keys.

    A task of ours ends at its first success, the first reward; such demonstrations are cut there,
    or their returns could not be reached.
    """
    keys = args.obs_keys or ROBOMIMIC_KEYS
    with open_hdf5(args.source) as f:
        for name, demo in numbered(inside(f, "data"), "demo_", present):
            seen = inside(demo, "obs") if "obs" in set(demo) else {}
            lacking = [key for key in keys if key not in set(seen)]
            if lacking:
                raise SystemExit(
                    f"{args.source}: {demo.name} has no obs/{lacking[0]}, only: {', '.join(seen)}; "
                    "choose with --obs-keys" + (", or have robomimic's dataset_states_to_obs.py "
                                                "write observations" if not seen else ""))
            states = np.concatenate([flatten(inside(seen, key)) for key in keys], axis=1)
            actions, rewards, dones = (
                inside(demo, key)[:] for key in ("actions", "rewards", "dones"))
            end = bool(dones[-1:].any())
            if args.task.startswith("mimicgen/") and (rewards > 0).any():
                end, T = True, int(np.argmax(rewards > 0)) + 1
                states, actions, rewards = states[:T], actions[:T], rewards[:T]
            yield name, states, actions, rewards, end


def read_flat(args, present):
    """D4RL and CompoSuite (500 steps): one stream, cut at terminals, timeouts, --episode-steps."""
    limit = args.episode_steps or (500 if args.format == "composuite" else None)
    with open_hdf5(args.source) as f:
        if "timeouts" not in set(f) and not limit:
            raise SystemExit(f"{args.source} does not say where episodes run out of time: it has "
                             "no timeouts; give the most steps of an episode with --episode-steps")
        terminals, actions, rewards = (
            inside(f, key) for key in ("terminals", "actions", "rewards"))
        ends = terminals = terminals[:].ravel() > 0
        if "timeouts" in set(f):
            ends = terminals | (inside(f, "timeouts")[:].ravel() > 0)
        for k, (a, b) in enumerate(cut(ends, limit)):
            if f"{k:06d}" not in present:
                yield (f"{k:06d}", flatten(inside(f, "observations"), a, b), actions[a:b],
                       rewards[a:b].ravel(), bool(terminals[b - 1]))


def cut(ends, limit=None):
    """(start, stop) of the pieces of a stream that ends where `ends` (T,) is true, or after limit
    steps; the last may be incomplete.
    """
    start = 0
    for stop in [*(np.flatnonzero(ends) + 1), len(ends)]:
        while limit and stop - start > limit:
            yield start, start + limit
            start += limit
        if stop > start:
            yield start, int(stop)
        start = int(stop)


def numbered(group, prefix, present):
    """(six digits, subgroup) of prefix0, prefix1, ... in the order of the numbers, less present."""
    for k in sorted(int(key[len(prefix):]) for key in group if key.startswith(prefix)):
        if f"{k:06d}" not in present:
            yield f"{k:06d}", inside(group, f"{prefix}{k}")


def flatten(observations, start=None, stop=None):
    """Vectors -> float32 (T, S), a dictionary joined in alphabetical order (gymnasium's), a tuple
    (_index_0, ...) by its numbers; images -> (T, 1, 64, 64).
    """
    if isinstance(observations, h5py.Group):
        tuples = all(re.fullmatch(r"_index_\d+", key) for key in observations)
        order = sorted(observations, key=(lambda key: int(key[7:])) if tuples else None)
        return np.concatenate([flatten(inside(observations, key), start, stop) for key in order],
                              axis=1)
    x = observations[start:stop]
    if x.dtype == np.uint8 and x.ndim >= 3:
        return to_frames(x)
    return x.reshape(len(x), -1).astype(np.float32)


READERS = {"minari": read_minari, "d4rl": read_flat, "robomimic": read_robomimic,
           "composuite": read_flat}


def map_actions(actions, args):
    """Actions of a source -> int (T,) or float32 (T, A), on [-1, 1] if --action-low or
    --clip-actions say how.
    """
    if actions.dtype.kind in "iub":
        return actions.reshape(len(actions)).astype(np.int64)
    actions = actions.reshape(len(actions), -1).astype(np.float64)
    if args.action_low:
        low, high = np.array(args.action_low), np.array(args.action_high)
        actions = 2 * (actions - low) / (high - low) - 1
    # 1.0000001 is what rounding leaves of 1
    if args.clip_actions or len(actions) and np.abs(actions).max() < 1 + 1e-5:
        actions = np.clip(actions, -1, 1)
    return actions.astype(np.float32)


@file_errors_end()
def convert(args):
    """Public data of another format -> <root>/<domain>/<task>/, see Convert; returns the number of
    episodes. A kill at any moment loses one episode: the same command continues.
    """
    from tqdm import tqdm
    args = replace(args, task=canonical(args.task))
    folder, done = args.root / args.task, 0
    if not _begin_conversion(args, folder):
        return len(episodes_in(folder))
    clip = args.task.split("/")[0] in DOMAINS and split_task(args.task)[0].clip_rewards
    present, name = set(episodes_in(folder)), "nothing"
    try:
        for name, states, actions, rewards, end in tqdm(
                READERS[args.format](args, present), desc="convert", unit="episode",
                initial=len(present)):
            bad = lambda reason: BadTrajectory(f"{args.source}: episode {name}: {reason}")
            rewards = np.clip(rewards, -1, 1) if clip else rewards
            try:
                actions = map_actions(actions, args)
                _check_values(bad, states, actions, rewards, None)
            except (BadTrajectory, ValueError) as error:
                if args.on_bad == "skip":
                    print(f"skipped: {error}", file=sys.stderr)
                    continue
                raise SystemExit(f"{error}{_range_of(args, actions)}\nor leave such episodes out: "
                                 "--on-bad skip") from None
            try:
                write_trajectory(folder / f"{name}.hdf5", states, actions, rewards, end)
            except OSError as error:                # a full disk: not the source's fault
                raise SystemExit(str(error)) from None
            done += 1
    except (OSError, EOFError, KeyError, ValueError, IndexError, TypeError, AttributeError,
            RuntimeError) as error:
        raise SystemExit(f"{args.source} cannot be read as {args.format} after episode {name}: "
                         f"{type(error).__name__}: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted; the same command continues where it was") from None
    if not done and not present:
        raise SystemExit(f"{args.source} holds no episode in the format {args.format}")
    _finish_conversion(args, folder)
    return len(present) + done


def _begin_conversion(args, folder):
    """Mark the folder as unfinished; false if this very conversion is already complete."""
    domain, _, name = args.task.partition("/")
    if not domain or not name or ".." in Path(args.task).parts or Path(args.task).is_absolute():
        raise SystemExit(f"--task {args.task} must be domain/task, for example mujoco/hopper")
    if bool(args.action_low) != bool(args.action_high):
        raise SystemExit("--action-low and --action-high go together: one number, or one for each "
                         "dimension")
    if not args.source.exists():
        raise SystemExit(f"{args.source} does not exist")
    source = {key: str(x) for key, x in asdict(args).items() if x and key not in ("root", "on_bad")}
    source["source"] = str(args.source.resolve())
    unfinished, card = folder / UNFINISHED, folder / "task.json"
    if card.exists() and not unfinished.exists() and load_json(card).get("source") == source:
        print(f"{folder} is complete")
        return False
    begun = load_json(unfinished).get("source") if unfinished.exists() else None
    if has_data(folder) and begun != source:
        raise SystemExit(f"{folder} holds other data, or this source's with other settings; delete "
                         "it, or choose another --root")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(unfinished, {"source": source})
    return True


def _range_of(args, actions):
    """What to add to a refusal of continuous actions: their range in the first episodes of the
    source, and what can be done.
    """
    if actions.dtype.kind != "f" or actions.size == 0 or np.abs(actions).max() <= 1:
        return ""
    some = itertools.islice(READERS[args.format](args, ()), SAMPLE)
    spans = [(np.min(a), np.max(a)) for _, _, a, _, _ in some if a.size]
    spans.append((actions.min(), actions.max()))
    low, high = min(x for x, _ in spans), max(x for _, x in spans)
    return (f"; in the first {len(spans) - 1} episodes actions lie between {low:.6g} and "
            f"{high:.6g}: delete {args.root / args.task} and rescale them with --action-low "
            f"{low:.6g} --action-high {high:.6g} (better: what the task's action space says), or "
            "cut them off with --clip-actions,")


def _finish_conversion(args, folder):
    """Index and card of converted data; says so where the simulator's world is another one."""
    stats = statistics(folder)
    stats["action"] = action_spec(args.task, stats["action"])
    if stats["lengths"].keys() != set(episodes_in(folder)):
        raise SystemExit(f"{args.source}: its episodes have states of different shapes; see: "
                         f"python data.py check {folder}")
    source = load_json(folder / UNFINISHED)["source"]
    extra, how = {}, "its smallest return stands for random"
    reason = cannot_play(args.task, stats | {"source": source})
    if reason:
        print(f"{args.task} can be trained on, but not scored: {reason}", file=sys.stderr)
    else:
        n = min(20, math.ceil(20_000 / split_task(args.task)[0].steps))
        extra["random_returns"] = [*_measure(
            args.task, "random", list(range(RANDOM_SEED, RANDOM_SEED + n)), lambda steps: None,
            whole=True).values()]
        extra["random_score"] = float(np.mean(extra["random_returns"]))
        how = f"random measured over {n} episodes"
    card = task_card(args.task, stats, **extra, source=source,
                     made_by=f"converted from {args.format}: {args.source.name}; the data's mean "
                             f"return stands for the reference, {how}")
    write_card(folder, stats, card)
    print(f"{folder}: {len(stats['lengths'])} episodes, {sum(stats['lengths'].values())} steps, "
          f"mean return {card['reference_score']:.2f}, random {card['random_score']:.2f} ({how})")


# ----------------------------------------------------------------------------------------- windows
class Mixture:
    """The trajectories of several tasks: random windows for training, fixed ones to validate.

    tasks are trained on, of `heldout` only the cards are read. Batches come from one domain at a
    time. Every batch follows from (seed, step, domain) alone, so a run that is resumed at a step
    sees what it would have seen, and packed and single files give the same. on_bad: "refuse" stops
    at a malformed file, "skip" names it once and goes on without it. At most `open_files`
    trajectories are held open; memory does not grow with their number but for 20 bytes each and the
    name. Random windows begin at multiples of `align` steps: where all episodes of a history have
    that length, at an episode.
    """

    def __init__(self, root, tasks, heldout=(), standardise=False, on_bad="refuse",
                 top_fraction=1.0, align=1, open_files=512):
        self.standardise, self.on_bad, self.open_files = standardise, on_bad, open_files
        self.align = align
        self.root, self.tasks, self.cards = Path(root), list(tasks), {}
        self.names, self.packs, self.reading, self.folders = {}, {}, {}, {}
        self.cache, self.bad, self.process = OrderedDict(), set(), os.getpid()
        parts = {}, {}                                      # for training, for validation
        for task in dict.fromkeys((*tasks, *heldout)):
            folder = self.folders[task] = find_folder(root, task)
            card = self.cards[task] = load_card(folder, task)
            card["heldout"] = task not in tasks
            if card["heldout"]:
                continue
            self.reading[task] = dict(card)
            if standardise:                                 # lists to arrays, once
                for key in ("state_mean", "state_std"):
                    self.reading[task][key] = np.asarray(card[key], np.float32)
            try:
                names, lengths, self.packs[task] = load_index(folder, on_bad)
            except BadTrajectory as error:
                raise SystemExit(f"malformed data: {error}") from None
            self.names[task] = names
            if not len(names):
                raise SystemExit(f"{folder} holds no trajectories; run: python data.py make {task}")
            held, ours = hold_out(name.decode() for name in names), np.arange(len(names))
            repeated = [name.encode() for name in card.get("repeated", [])]
            ours = ours[~held & ~np.isin(names, np.array(repeated, names.dtype))]
            if not len(ours):
                raise SystemExit(f"{folder}: nothing is left to train on, as all its trajectories "
                                 "are equal; add others")
            if top_fraction < 1:                            # the best trajectories by return
                best = np.argsort(-self._returns(task)[ours], kind="stable")
                ours = np.sort(ours[best[:math.ceil(top_fraction * len(ours))]])
            for part, some in zip(parts, (ours, np.flatnonzero(held))):
                rows = np.empty(len(some), ROW)
                rows["task"], rows["episode"] = self.tasks.index(task), some
                rows["length"] = lengths[some]
                part.setdefault(card["domain"], []).append(rows)
        # what is held out is read in the units of the tasks like it that are trained on
        for card in self.cards.values():
            like = [c for c in map(self.cards.get, self.tasks) if c["domain"] == card["domain"]]
            if not card["heldout"] or not like:
                continue
            card["reward_scale"] = like[0]["reward_scale"]
            like = [c for c in like if c["observation"] == card["observation"]]
            if like and all("state_mean" in c for c in like):
                mean, std = (np.array([c[key] for c in like])
                             for key in ("state_mean", "state_std"))
                card["state_mean"] = mean.mean(0).round(6).tolist()
                card["state_std"] = np.sqrt((std ** 2).mean(0) + mean.var(0)).round(6).tolist()
        self.train, self.validation = ({domain: np.concatenate(rows) for domain, rows in p.items()}
                                       for p in parts)
        self.domains = list(self.train)
        if not self.domains:
            raise SystemExit(f"nothing to train on among {', '.join(tasks)}")
        self.cumulative = {}                # of (domain, context): see draw

    @cached_property
    def fingerprint(self):
        """What is trained on, in 16 letters: tasks, their cards (which hold the statistics of the
        data), names and lengths of all trajectories.
        """
        cards = [self.cards[task] for task in self.tasks]
        digest = hashlib.sha256(json.dumps(cards, sort_keys=True).encode())
        for array in (*self.names.values(), *self.train.values(), *self.validation.values()):
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def __getstate__(self):                     # open files stay in the process that opened them
        return {**self.__dict__, "cache": OrderedDict()}

    def _returns(self, task):
        returns = episode_numbers(self.folders[task], "returns", self.on_bad)
        return np.array([returns[name.decode()] for name in self.names[task]])

    def get(self, task, episode, length):
        """The trajectory, validated at its first use and kept open; None if it is bad and on_bad is
        "skip".
        """
        if self.process != os.getpid():         # a worker: HDF5's handles must not be shared
            self.cache, self.process = OrderedDict(), os.getpid()
            self.packs = {t: pack and Pack(pack.path) for t, pack in self.packs.items()}
        if (task, episode) in self.cache:
            self.cache.move_to_end((task, episode))
            return self.cache[task, episode]
        path = self.folders[task] / f"{self.names[task][episode].decode()}.hdf5"
        try:
            if self.packs[task]:
                return self.packs[task].trajectory(episode, self.cards[task])
            trajectory = open_trajectory(path, self.cards[task], length)
        except BadTrajectory as error:
            return self.refuse(path, error)
        self.cache[task, episode] = trajectory
        if len(self.cache) > self.open_files:
            _, old = self.cache.popitem(last=False)
            if old.file:
                old.file.close()
        return trajectory

    def refuse(self, path, error):
        """Stop, naming the file and what is wrong with it, or if on_bad is "skip" name it once."""
        if self.on_bad == "refuse":
            raise SystemExit(
                f"malformed data: {error}\nrepair or delete it, or go on without it: "
                "--on-bad skip. All faults at once: python data.py check "
                f"{self.root}"
            ) from None
        if path not in self.bad:
            print(f"skipped: {error}", file=sys.stderr)
            self.bad.add(path)

    def window(self, row, start, context):
        """Steps start to start + context of a trajectory, row = (task, episode, length) of `train`
        or `validation`, as the model reads them; None if the file is bad.

        start may lie before the first step and the end after the last: the window is cut there.
        reward is r_{t-1} (0 at an episode's start) and rtg R_t, both over the reward scale;
        previous is the action that was executed before, with `known` false where there is none.
        """
        from lram import prepare_states
        number, episode, length = row
        task = self.tasks[number]
        t, card = self.get(task, episode, length), self.cards[task]
        if t is None:
            return None
        start, stop = max(start, 0), min(start + context, length)
        a, b = t.first + start, t.first + stop                              # in t's arrays
        try:
            states = t.states[a:b]
            states = to_gray(states) if states.ndim == 4 else states
        except OSError as error:
            name = self.names[task][episode].decode()
            path = self.folders[task] / (f"{PACK}:{name}" if self.packs[task] else f"{name}.hdf5")
            return self.refuse(path, f"{path}: damaged inside, at step {start} ({str(error)[:80]})")
        shifted = lambda x: np.concatenate([x[a - 1:a] if start else np.zeros_like(x[:1]),
                                            x[a:b - 1]])
        scale, rtg = np.float32(card["reward_scale"]), t.returns_to_go[a:b]
        if card["constant_rtg"]:
            rtg = np.full_like(rtg, card["target_return"])
        known = np.ones(b - a, bool)
        known[0] = start > 0
        return {
            "obs": prepare_states(states, self.reading[task], self.standardise),
            "reward": shifted(t.rewards) / scale,
            "rtg": rtg / scale,
            "action": t.actions[a:b],
            "previous": shifted(t.executed),
            "known": known,
        }

    def sample(self, domain, batch_size, context, seed, step, part=(0, 1)):
        """A batch of random windows, see collate: trajectories, then any end in them. part (k, n):
        every n-th window of it from the k-th on, the share of process k of n.
        """
        number = self.domains.index(domain)
        rng, plan = np.random.default_rng([seed, step, number]), []
        for _ in range(batch_size):
            plan.append(self.draw(domain, context, rng))
        windows = []
        for slot in range(part[0], batch_size, part[1]):
            window, spare, tries = self.window(*plan[slot], context), None, 0
            while window is None:               # a bad file: another draw, of this slot's own
                # (+ 1: numpy pads with zeros, so that [., ., ., 0] would be the plan's stream)
                spare = spare or np.random.default_rng([seed, step, number, slot + 1])
                window, tries = self.window(*self.draw(domain, context, spare), context), tries + 1
                if tries == 100:
                    raise SystemExit(f"every trajectory of {domain} that was tried is malformed; "
                                     f"see: python data.py check {self.root}")
            windows.append(window)
        return collate(windows, context)

    def draw(self, domain, context, rng):
        """A trajectory and a window in it: (row of train, start).

        The window's end is uniform in 1 to L + C - 1, and a trajectory is drawn in proportion to
        that number, so that every step is seen as often as any other, the first of an episode
        included, where acting begins. Aligned windows start at a multiple of self.align and lie
        within the trajectory, which is drawn in proportion to its length.
        """
        rows = self.train[domain]
        if (domain, context) not in self.cumulative:
            sizes = rows["length"] + (context - 1) * (self.align == 1)
            self.cumulative[domain, context] = sizes.cumsum() / sizes.sum()
        cumulative = self.cumulative[domain, context]
        row = rows[cumulative.searchsorted(rng.random(), side="right")].item()
        if self.align > 1:
            return row, self.align * int(rng.integers(max(0, row[2] - context) // self.align + 1))
        return row, int(rng.integers(1, row[2] + context)) - context

    def validation_batches(self, domain, batch_size, context, max_steps=4800, part=(0, 1)):
        """The held-out trajectories cut into consecutive windows, evenly thinned to about max_steps
        steps, the same for each task. part (k, n): every n-th batch from the k-th on.
        """
        rows, plan = self.validation.get(domain, np.empty(0, ROW)), []
        tasks = np.unique(rows["task"])
        for task in tasks:
            own = rows[rows["task"] == task]
            ends = np.cumsum(-(-own["length"] // context))              # windows up to here
            most = min(ends[-1], max(4, max_steps // context // len(tasks)))
            for k in np.unique(np.linspace(0, ends[-1] - 1, most).astype(int)):
                r = ends.searchsorted(k, side="right")
                plan.append((own[r].item(), int(k - (ends[r - 1] if r else 0)) * context))
        for i in range(part[0] * batch_size, len(plan), part[1] * batch_size):
            windows = [self.window(*one, context) for one in plan[i:i + batch_size]]
            windows = [w for w in windows if w is not None]
            if windows:
                yield collate(windows, context)


def collate(windows, context):
    """Windows of at most C steps -> one batch of arrays, padded with zeros on the right.

    obs (B, C, S or 1, 64, 64), reward, rtg (B, C), action and previous (B, C) int or (B, C, A)
    float, known (B, C), mask (B, C) or (B, C, A): true on real steps, and on the dimensions that a
    task really has.
    """
    def stack(key):
        width = np.max([w[key].shape[1:] for w in windows], axis=0).astype(int)
        out = np.zeros((len(windows), context, *width), windows[0][key].dtype)
        for b, w in enumerate(windows):
            out[(b, *map(slice, w[key].shape))] = w[key]
        return out
    kinds = {(w["action"].ndim, w["obs"].ndim) for w in windows}
    if len(kinds) > 1:
        raise SystemExit(
            "a domain mixes discrete and continuous actions, or images and vectors: give its tasks "
            "two domain names"
        )
    for w in windows:
        w["mask"] = np.ones(w["action"].shape, bool)
    return {
        key: stack(key) for key in ("obs", "reward", "rtg", "action", "previous", "known", "mask")
    }


# ----------------------------------------------------------------------------------------- program
def task_folders(path, onerror=None):
    """{folder: names of its files and its pack} of all folders at or below path that are a task's.

    Follows symbolic links; onerror(OSError) is told of folders that may not be read.
    """
    if Path(path).is_file():
        return {Path(path).parent: [Path(path).name]}
    found, seen = {}, set()
    for here, folders, files in os.walk(path, onerror=onerror, followlinks=True):
        if os.path.realpath(here) in seen:      # a link to a folder further up
            folders.clear()
            continue
        seen.add(os.path.realpath(here))
        names = sorted(n for n in (*folders, *files) if n.endswith(".hdf5") or n == PACK)
        folders[:] = [n for n in folders if not n.endswith(".hdf5")]
        if names or {"task.json", "episode_lengths.json", UNFINISHED} & {*files}:
            found[Path(here)] = names
    return dict(sorted(found.items()))


def task_name(folder, domain=None):
    """The name domain/task of a folder; `domain` says it where the layout has none. gymnasium's
    ids may have a slash: gym/ALE/Pong-v5.
    """
    parts = Path(folder).absolute().parts
    if domain:
        return f"{domain}/{parts[-1]}"
    return "/".join(parts[-3 if parts[-3:-2] == ("gym",) else -2:])


def check_files(folder, names, card, alive=lambda steps: None):
    """Worker: [(name, fault or None, facts)] of some files of a task, and of all in its pack.

    facts: steps, return and specification; None of a faulty one.
    """
    results = []
    for name in names:
        alive(0)                        # a sign of life: this process does not hang
        if name != PACK:
            results.append(check_content(folder, name, lambda: open_trajectory(
                folder / name, card)))
            continue
        try:
            pack = Pack(folder / PACK)
        except BadTrajectory as error:
            results.append((name, str(error), None))
            continue
        if pack.stale():
            results.append((name, f"{pack.path}: is older than the files beside it, or lacks some; "
                                  f"pack them again with: python data.py pack {folder}", None))
        for k, episode in enumerate(pack.names):
            alive(0)
            results.append(check_content(folder, f"{PACK}:{episode.decode()}",
                                         lambda: pack.cut(k, card)))
    return results


def check_content(folder, name, read):
    """A row of check_files for the trajectory that read() returns."""
    t = None
    try:
        t = read()
        for start in range(0, len(t.rewards), 1000):            # images: decompress everything once
            x = t.states[start:start + 1000]
        spec = ("images" if x.ndim == 4 else x.shape[1:], t.actions.shape[1:])
        return name, None, (len(t.rewards), float(t.rewards.sum()), spec)
    except BadTrajectory as error:
        return name, str(error), None
    except OSError as error:
        return name, f"{folder / name}: damaged inside ({str(error)[:80]})", None
    finally:
        if t and t.file:
            t.file.close()


def card_faults(card):
    """What is wrong with the content of a task's card, in words; [] if nothing is."""
    lacking = [key for key in CARD if key not in card]
    if lacking:
        return [f"has no {', '.join(lacking)}"]
    try:
        shape, action = tuple(card["observation"]["shape"]), card["action"]
        discrete = action["kind"] == "discrete"
        n = action["n"] if discrete else action["dims"]
        wrong = [] if 0 < n <= (18 if discrete else 8) else [f"has {n} actions"]
        wrong += [f"{key} is {card[key]}" for key in (
            "reward_scale", "target_return", "reference_score", "random_score")
            if not math.isfinite(card[key]) or key == "reward_scale" and not card[key] > 0]
        for key in {"state_mean", "state_std"} & card.keys():
            x = np.array(card[key], np.float64)
            if x.shape != shape:
                wrong.append(f"{key} has shape {x.shape}, observations have {shape}")
            elif not np.isfinite(x).all() or key == "state_std" and not (x > 0).all():
                wrong.append(f"{key} is not finite, or a deviation is not above 0")
        if not all(isinstance(name, str) for name in card.get("repeated", ())):
            wrong.append("repeated holds what is no name")
        if card.get("limit") is not None and not card["limit"] > 0:
            wrong.append(f"limit is {card['limit']}")
        return wrong
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        return [f"not a task's card ({type(error).__name__}: {error})"]


def check_card(folder):
    """(card or None, [fault]) of a folder's task.json, and of the mark that says "unfinished"."""
    path, faults = folder / "task.json", []
    if (folder / UNFINISHED).exists():
        faults.append(f"{folder}: incomplete; run the command that began it again: python data.py "
                      "make or convert")
    if not path.exists():
        return None, faults
    try:
        card = load_json(path)
    except SystemExit as error:
        return None, [*faults, str(error)]
    wrong = card_faults(card)
    if not wrong and plain(str(card["task"]).split("/")[-1]) != plain(folder.absolute().name):
        wrong = [f"is the card of {card['task']}"]
    return None if wrong else card, faults + [f"{path}: {reason}" for reason in wrong]


def check_folder(folder, results):
    """Faults that single files do not show: the index, odd ones out."""
    facts = {name.removesuffix(".hdf5"): f for name, _, f in results if f}
    files = {name[:-5] for name, _, _ in results if name.endswith(".hdf5")}
    faults, packed = [], (folder / PACK).exists()
    for k, what in enumerate(("lengths", "returns")):
        path = folder / f"episode_{what}.json"
        if not path.exists() or packed and not files:           # a pack has an index of its own
            continue
        try:
            index = load_json(path)
        except SystemExit as error:
            faults.append(str(error))
            continue
        faults += [f"{path}: lists {stem}, but there is no such file"
                   for stem in sorted(index.keys() - files)]
        if not (folder / UNFINISHED).exists():                  # what is being added comes last
            faults += [f"{path}: does not list {s}.hdf5" for s in sorted(files - index.keys())]
        for stem in sorted(files & facts.keys() & index.keys()):
            given, true = index[stem], facts[stem][k]
            if not isinstance(given, (int, float)) or abs(given - true) > 1e-3 + 1e-4 * abs(true):
                faults.append(f"{path}: says {given} of {stem}.hdf5, whose {what[:-1]} is {true}")
    usual = Counter(f[2] for f in facts.values()).most_common(1)
    for stem, (_, _, spec) in facts.items():
        if spec != usual[0][0]:
            path = folder / (stem if stem.startswith(PACK) else f"{stem}.hdf5")
            faults.append(f"{path}: states and actions {spec} each, elsewhere {usual[0][0]}")
    return faults


def check(path, domain=None, processes=None):
    """Validate everything below path, a folder at any level or one file; print each fault with path
    and reason; returns their number. domain: of folders that have none above them.
    """
    from tqdm import tqdm
    faults, results, jobs, checked = [], {}, [], 0

    def report(lines):
        faults.extend(lines)
        for line in lines:
            tqdm.write(line)
    folders = task_folders(path, lambda error: report([f"{error.filename}: {error.strerror}"]))
    for folder, names in folders.items():
        card, found = check_card(folder)
        report(found)
        jobs += [(folder, names[i:i + 200], card or _card_of_download(folder, domain))
                 for i in range(0, max(1, len(names)), 200)]
    total = sum(map(len, folders.values()))
    processes = processes or (min(os.cpu_count() or 1, 16) if total > 2000 else 1)
    left = Counter(folder for folder, _, _ in jobs)
    with tqdm(total=total, desc="check", unit="file", leave=False) as bar:
        for (folder, names, _), rows in run_jobs(
                jobs, processes, _start_checker,
                method="fork" if sys.platform == "linux" else "spawn"):
            if isinstance(rows, Exception):     # a damaged file can crash HDF5 itself
                rows = [(names[0], f"{folder}: {names[0]} to {names[-1]} not checked: {rows}",
                         None)]
            results.setdefault(folder, []).extend(rows)
            report([fault for _, fault, _ in rows if fault])
            bar.update(len(names))
            checked += len(rows)
            left[folder] -= 1
            if not left[folder] and not Path(path).is_file():
                report(check_folder(folder, results.pop(folder)))
    if not total and not faults:
        report([f"{path}: holds no trajectories (*.hdf5)"])
    print(f"{path}: {checked} trajectories in {len(folders)} tasks, {len(faults)} faults")
    return len(faults)


def _start_checker():
    """Each worker of eval.run_jobs does check_files."""
    return lambda job, advance: check_files(*job, advance)


def _card_of_download(folder, domain):
    """What its files are compared with where there is no card, but a domain that eval.py knows."""
    try:
        return load_card(folder, task_name(folder, domain)) if domain in DOMAINS else None
    except SystemExit:                  # no sound file, or unfinished: both are named anyway
        return None


@file_errors_end()
def pack(path, on_bad="refuse"):
    """Pack every task below path; a task that is packed already is left alone."""
    from tqdm import tqdm
    folders = [folder for folder, names in task_folders(path).items() if names]
    if not folders:
        raise SystemExit(f"{path} holds no trajectories; make some with: python data.py make")
    for folder in tqdm(folders, desc="pack", unit="task"):
        if (folder / UNFINISHED).exists():
            tqdm.write(f"{folder}: unfinished, so it is not packed; first run the make or convert "
                       "that began it again")
            continue
        card = load_card(folder) if (folder / "task.json").exists() else None
        try:
            count, size = pack_task(folder, card, on_bad)
        except BadTrajectory as error:
            raise SystemExit(f"malformed data: {error}\nrepair or delete it, or leave it out: "
                             "--on-bad skip. What was packed before it stays.") from None
        tqdm.write(f"{folder / PACK}: {count} trajectories, {size / 1e6:.1f} MB")


def describe(folder, task, sample=SAMPLE):
    """A row of `info`: what the index says of all trajectories, and what at most `sample` say.

    A bad file makes nothing fail: row["bad"] counts those met.
    """
    row = {"task": task, "bad": 0, "actions": [], "differ": [], "lengths": [], "returns": []}
    for _, t in trajectories(folder, sample):
        if isinstance(t, BadTrajectory):
            row["bad"] += 1
            continue
        a = t.actions
        row["lengths"].append(len(a))
        row["returns"].append(float(t.rewards.sum()))
        row["actions"].append(a)
        if len(a) > 1:      # Table 7: mean squared difference, or how often a discrete one changes
            row["differ"].append(np.mean((a[1:] - a[:-1]) ** 2 if a.ndim == 2 else a[1:] != a[:-1]))
    row["sampled"] = len(row["lengths"])
    row["episodes"] = len(episodes_in(folder))
    for what in ("lengths", "returns"):         # of all, where there is an index that can be read
        try:
            if (folder / PACK).exists() or (folder / f"episode_{what}.json").exists():
                numbers = episode_numbers(folder, what, "skip")
                row[what] = list(numbers.values()) or row[what]
                row["episodes"] = max(row["episodes"], len(numbers))
        except (SystemExit, BadTrajectory) as error:
            print(error, file=sys.stderr)
    return row


def format_info(row):
    """One line of the table; ~ marks a number of steps that was estimated from a sample."""
    if not row["sampled"]:
        return f"{row['task']:<40}{row['episodes']:>9}   none of {row['bad']} tried is sound"
    lengths, returns = np.array(row["lengths"]), np.array(row["returns"])
    every = len(lengths) == row["episodes"]
    steps = f"{'' if every else '~'}{lengths.mean() * row['episodes']:.0f}"
    spread = f"{returns.mean():.1f} ({returns.min():.1f} to {returns.max():.1f})"
    discrete = row["actions"][0].ndim == 1
    low, high = (f([f(a) for a in row["actions"]]) for f in (np.min, np.max))
    actions = f"{low:.0f} to {high:.0f}" if discrete else f"{low:.2f} to {high:.2f}"
    solved = f"{np.mean(returns >= 1):.0%}" if row["task"].startswith("mimicgen/") else ""
    differ = f"{np.mean(row['differ'] or [0]):.4f} {'changes' if discrete else 'squared'}"
    bad = f"  {row['bad']} malformed" if row["bad"] else ""
    return (f"{row['task']:<40}{row['episodes']:>9}{steps:>11}{lengths.mean():>8.0f}{spread:>28}"
            f"{solved:>8}{actions:>15}{differ:>16}{bad}")


def info(path, domain=None, sample=SAMPLE):
    """Print a table of what is at or below path, a row for each task and totals of each domain.
    Malformed files are counted, not fatal.
    """
    from tqdm import tqdm
    folders = task_folders(path)
    rows = [describe(folder, task_name(folder, domain), sample)
            for folder in tqdm(folders, desc="info", unit="task", leave=False) if folders[folder]]
    if not rows:
        print(f"{path} holds no trajectories; make some with: python data.py make")
        return
    print(f"{'task':<40}{'episodes':>9}{'steps':>11}{'length':>8}"
          f"{'return mean (min to max)':>28}{'solved':>8}{'actions':>15}{'consecutive':>16}")
    for row in rows:
        print(format_info(row))
    for name in dict.fromkeys(domain_of(row["task"]) for row in rows):
        mine = [row for row in rows if domain_of(row["task"]) == name and row["sampled"]]
        steps = sum(np.mean(row["lengths"]) * row["episodes"] for row in mine)
        differ = [np.mean(row["differ"] or [0]) for row in mine]
        print(f"{name + ': ' + str(len(mine)) + ' tasks':<40}"
              f"{sum(row['episodes'] for row in mine):>9}{steps:>11.0f}"
              + (f"   consecutive {np.mean(differ):.4f} +- {np.std(differ):.4f}" if mine else ""))
    print(f"Actions, and how much consecutive ones differ (mean squared difference, or the share "
          f"of changes), from at most {sample} trajectories a task; lengths and returns from the "
          "index where there is one, else from the same.")


@dataclass
class Make:
    """Generate what is missing of the tasks' data (default: the default mixture)."""
    tasks: tyro.conf.Positional[tuple[str, ...]] = DEFAULT_TASKS
    """Tasks named domain/task or gym:ID, whole domains, or laptop, a taste of every domain; python
    eval.py --list shows them."""
    heldout: tuple[str, ...] | None = None
    """Tasks, or domains' held-out tasks, that are only scored: their cards are made, no data
    (default: darkroom/heldout beside darkroom/train)."""
    root: Path = Path("datasets")
    """Where the data live."""
    episodes: int | None = None
    """Episodes per task (default: each recipe's own)."""
    processes: int | None = None
    """Worker processes (default: one per core, at most 8)."""
    timeout: float = 600.0
    """Seconds without a step after which a simulator counts as hung."""


@dataclass
class PackTasks:
    """Gather each task's trajectories in one file, pack.h5, which is read by slices."""
    path: tyro.conf.Positional[Path] = Path("datasets")
    """A folder at any level of the layout."""
    on_bad: Literal["refuse", "skip"] = "refuse"
    """What to do with a malformed file: stop and name it, or name it and leave it out."""


@dataclass
class Convert:
    """Public data of another format -> the layout of this file; interrupted, it continues."""
    format: tyro.conf.Positional[Literal["minari", "d4rl", "robomimic", "composuite"]]
    """What the source is: a Minari folder, or an HDF5 file of D4RL, of robomimic or Mimicgen, of
    CompoSuite."""
    source: tyro.conf.Positional[Path]
    """The file or folder that was downloaded."""
    task: str
    """The name domain/task that it gets; eval.py's own names (--list) can be scored too."""
    root: Path = Path("datasets")
    """Where the data go."""
    action_low: tuple[float, ...] = ()
    """The smallest action of the source (one number, or one a dimension), which becomes -1."""
    action_high: tuple[float, ...] = ()
    """The largest, which becomes 1."""
    clip_actions: bool = False
    """Cut actions off at -1 and 1 rather than refuse them."""
    obs_keys: tuple[str, ...] = ()
    """robomimic: observations to join, in order (default: hand's position and orientation,
    gripper, object)."""
    episode_steps: int | None = None
    """d4rl, composuite: cut episodes at this many steps (composuite: 500)."""
    on_bad: Literal["refuse", "skip"] = "refuse"
    """What to do with a malformed episode: stop and name it, or name it and go on."""


@dataclass
class Check:
    """Validate every trajectory below a folder; exit code 1 names the faults."""
    path: tyro.conf.Positional[Path] = Path("datasets")
    """A folder at any level of the layout, or one file."""
    domain: str | None = None
    """The domain of folders that have none above them, as in downloads."""
    processes: int | None = None
    """Worker processes (default: one per core, at most 16; one for few files)."""


@dataclass
class Info:
    """Counts, lengths, returns and action statistics of what is below a folder."""
    path: tyro.conf.Positional[Path] = Path("datasets")
    """A folder at any level of the layout."""
    domain: str | None = None
    """The domain of folders that have none above them, as in downloads."""
    sample: int = SAMPLE
    """Most trajectories to open per task."""


def main(args):
    """See the opening of this file."""
    if isinstance(args, Make):
        heldout = args.heldout
        if heldout is None:
            heldout = default_heldout(expand_tasks(args.tasks, root=args.root))
        present = make(args.tasks, args.root, heldout, args.episodes, args.processes, args.timeout)
        info(args.root)
        # what was left out or failed was named
        tasks = expand_tasks(args.tasks, root=args.root)
        if set(tasks) - set(present) or any((args.root / t / UNFINISHED).exists() for t in tasks):
            sys.exit(1)
    elif isinstance(args, PackTasks):
        pack(args.path, args.on_bad)
    elif isinstance(args, Convert):
        convert(args)
    elif isinstance(args, Check):
        sys.exit(1 if check(args.path, args.domain, args.processes) else 0)
    else:
        info(args.path, args.domain, args.sample)


if __name__ == "__main__":
    pack_tasks = Annotated[PackTasks, tyro.conf.subcommand("pack")]
    main(tyro.cli(Make | Convert | pack_tasks | Check | Info, description=__doc__))
