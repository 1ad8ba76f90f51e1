"""Trajectories: experts -> HDF5 files -> windows for training; as a program it makes, checks and
shows them.

    python data.py make                     # the default mixture, into datasets/ (about a minute)
    python data.py make metaworld/push-v3 --episodes 50
    python data.py pack datasets            # one file per task, for many or long trajectories
    python data.py check datasets           # every file validated; exit code 1 names the faults
    python data.py info datasets            # counts, lengths, returns, action statistics

Layout, that of the public LRAM data sets: one file per trajectory,
<root>/<domain>/<task>/<episode>.hdf5, with

    states    (T, S) float32 or (T, 1, 64, 64) uint8
    actions   (T,) int or (T, A) float32 in [-1, 1]
    rewards   (T,) float32
    dones     (T,) bool, true at an end of the task
    returns_to_go (T,) float32, optional: sum of rewards from t on, unscaled; computed when absent

and beside them episode_lengths.json and episode_returns.json ({episode: number}: no file is opened
to plan a training run) and task.json, the card of the task. `actions` are what the expert asked for
(clean labels); what was executed had noise on it, so that the data show how to recover. A lost life
ends a trajectory in Atari, whose rewards are stored clipped to [-1, 1].

Source: LRAM (arXiv 2410.22391), section 4.1 and appendix B.
Not included: packed files, converters from other data sets, training data larger than one machine.
"""

import contextlib
import difflib
import importlib.metadata
import json
import math
import os
import sys
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Callable, Literal

import gymnasium as gym
import h5py
import numpy as np
import tyro

from eval import (
    DOMAINS,
    DarkRoom,
    constant_policy,
    expand_tasks,
    install_line,
    make_env,
    random_policy,
    rollout,
    run_jobs,
    split_task,
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
VALIDATION_FRACTION = 0.025
# episode k of the data uses seed k; what a score is measured against has seeds of its own (scores:
# 1,000,000 + k)
EXPERT_SEED, RANDOM_SEED, CONSTANT_SEED = 2_500_000, 2_600_000, 2_700_000
# where only solved episodes count, a seed has this many tries: seed, seed + NEXT_TRY, ...
TRIES, NEXT_TRY = 8, 100_000


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


RECIPES = {
    "darkroom": Recipe(DarkRoomExpert, episodes=320, sigma=0.05, references=80),
    "metaworld": Recipe(MetaWorldExpert, references=40),
    "metaworld/push-v3": Recipe(MetaWorldExpert, episodes=60, sigma=0.15),
    "metaworld/pick-place-v3": Recipe(MetaWorldExpert, episodes=60, sigma=0.1),
    "dmcontrol/cartpole-balance": Recipe(CartpoleExpert, episodes=20, sigma=0.5),
    "dmcontrol/cartpole-swingup": Recipe(CartpoleExpert, episodes=20),
    "dmcontrol/point_mass-easy": Recipe(PointMassExpert, episodes=40),
    "dmcontrol/reacher-easy": Recipe(ReacherExpert, episodes=40),
    "atari/freeway": Recipe(FreewayExpert, episodes=16, sigma=0.1, references=8),
    "atari/pong": Recipe(PongExpert, episodes=10, sigma=0.02, references=5),
    "atari/breakout": Recipe(BreakoutExpert, episodes=20, sigma=0.02, references=8),
}


def recipe_of(task):
    """The recipe of a task: its own row, else its domain's."""
    recipe = RECIPES.get(task) or RECIPES.get(task.partition("/")[0])
    if recipe is None:
        near = difflib.get_close_matches(task, RECIPES, n=1, cutoff=0.0)
        raise SystemExit(
            f"there is no expert for {task}; nearest: {near[0]}. There are experts for "
            f"{', '.join(RECIPES)}"
        )
    return recipe


def expert_policy(envs, expert):
    """A new expert for each episode of each row, as a policy of eval.rollout."""
    experts = [None] * envs.num_envs

    def act(obs, reward, done):
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
    mistakes, and the label stays what the expert asked for. With levels, seed s has
    sigma levels[s % len(levels)] and info["executed"] is the label: data of mixed quality.
    """

    def __init__(self, env, sigma_max, levels=()):
        super().__init__(env)
        self.sigma_max, self.levels = sigma_max, levels

    def reset(self, *, seed=None, options=None):
        self.rng = np.random.default_rng([seed, 1])  # [., 1]: not the stream of the world
        self.sigma = self.rng.uniform(0, self.sigma_max) * (self.rng.random() > 0.25)
        if self.levels:
            self.sigma = self.levels[seed % len(self.levels)]
        return self.env.reset(seed=seed, options=options)

    def step(self, action):
        space, sigma = self.action_space, self.sigma
        if isinstance(space, gym.spaces.Discrete):
            action = self.rng.integers(space.n) if self.rng.random() < sigma else action
        else:
            noise = sigma * self.rng.standard_normal(space.shape)
            action = np.clip(action + noise, -1, 1).astype(np.float32)
        obs, reward, terminated, truncated, info = self.env.step(action)
        if self.levels:
            info = {**info, "executed": action}
        return obs, reward, terminated, truncated, info


# ----------------------------------------------------------------------------------- writing files
def write_json(path, content):
    """Atomically."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, path)


def storage(dtype, shape):
    """How HDF5 stores such an array: images in gzip chunks of about one window, others plainly.

    Level 1 of gzip halves the time of higher ones at nearly their size.
    """
    if dtype != np.uint8 or len(shape) != 4:
        return {}
    return dict(compression="gzip", compression_opts=1, chunks=(min(50, shape[0]), *shape[1:]))


def write_trajectory(path, states, actions, rewards, terminated):
    """One trajectory to HDF5, atomically: the name appears when the file is whole."""
    temporary = Path(f"{path}.tmp")
    try:
        with h5py.File(temporary, "w") as f:
            f.create_dataset("states", data=states, **storage(states.dtype, states.shape))
            f.create_dataset("actions", data=actions)
            f.create_dataset("rewards", data=rewards.astype(np.float32))
            dones = np.zeros(len(rewards), bool)
            dones[-1] = terminated
            f.create_dataset("dones", data=dones)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"cannot write {path}: {error}; nothing half-written is left, free some space and run "
            "the same command again: it continues"
        ) from error


def split_lives(episode):
    """An episode -> the (start, stop) of its lives; one piece where the world has no lives."""
    lost = np.flatnonzero(np.diff(episode.lives) < 0) + 2
    bounds = [0, *[int(b) for b in lost if b < len(episode.rewards)], len(episode.rewards)]
    return list(zip(bounds[:-1], bounds[1:]))


def _make_episodes(task, folder, noise, seeds, advance):
    """Worker: play the expert on these seeds and write one file per trajectory."""
    recipe, clip = recipe_of(task), split_task(task)[0].clip_rewards
    make = lambda: NoisyActions(make_env(task, limit=recipe.limit), recipe.sigma, noise)
    solved_only, pending = recipe.success_only and not noise, list(seeds)
    for attempt in range(TRIES if solved_only else 1):
        failed = []
        for episode in rollout(make, partial(expert_policy, expert=recipe.expert),
                               [seed + attempt * NEXT_TRY for seed in pending], num_envs=1,
                               advance=advance):
            seed = episode.seed - attempt * NEXT_TRY
            if solved_only and not episode.success:
                failed.append(seed)
                continue
            rewards = np.clip(episode.rewards, -1, 1) if clip else episode.rewards
            pieces = split_lives(episode)
            # life 0 last: it marks the seed as done
            for life, (a, b) in reversed(list(enumerate(pieces))):
                name = f"{seed:06d}.hdf5" if life == 0 else f"{seed:06d}-{life}.hdf5"
                end = episode.terminated or life + 1 < len(pieces)
                write_trajectory(Path(folder) / name, episode.states[a:b], episode.actions[a:b],
                                 rewards[a:b], end)
        pending = failed
        if not pending:
            break
    for seed in pending:                    # or else each run would try the same seeds again
        (Path(folder) / f"{seed:06d}.failed").touch()


def _measure(task, who, seeds, advance):
    """Worker: returns of the noise-free expert, the random policy or a constant action (int)."""
    policy = {
        "expert": partial(expert_policy, expert=recipe_of(task).expert),
        "random": random_policy,
    }.get(who, partial(constant_policy, action=who))
    make = partial(make_env, task, limit=recipe_of(task).limit)
    done = rollout(make, policy, seeds, num_envs=4, keep_states=False, advance=advance)
    return [float(e.rewards.sum()) for e in done]


def default_heldout(tasks):
    """What is scored beside `tasks` where nothing is said: Dark-Room's other goals."""
    return ("darkroom/heldout",) if "darkroom/train" in tasks else ()


def make(tasks=DEFAULT_TASKS, root="datasets", heldout=(), episodes=None, processes=None,
         noise=None, timeout=600.0):
    """Generate what is missing of the tasks' data; returns the tasks that exist now.

    tasks, heldout: names of tasks or domains (eval.expand_tasks); of `heldout` only the card is
    made, which scoring needs. episodes: per task (default: each recipe's own). noise: levels of
    mixed quality, see NoisyActions; None takes what is there, or clean labels. A kill at any moment
    loses at most the episodes being played: the next call continues. Tasks whose simulator is
    missing are named and left out, and so are those of which a simulator crashed, or hung for
    `timeout` seconds.
    """
    root, present, plans, levels = Path(root), [], {}, {}
    tasks = expand_tasks(tasks)
    for task in dict.fromkeys(tasks + expand_tasks(heldout, heldout=True)):
        missing = install_line(task)
        if missing:
            made = (root / task / "task.json").exists()         # can be trained on all the same
            present += [task] if made else []
            print(f"{task} {'cannot be scored' if made else 'left out'}: its simulator is not "
                  f"installed ({missing})", file=sys.stderr)
            continue
        present.append(task)
        levels[task] = _levels(root / task, noise)
        plan = _plan(task, root / task, episodes, task in tasks, levels[task])
        if plan:
            plans[task] = plan
    jobs = [(function, task, args) for task, plan in plans.items() for function, args in plan]
    if not jobs:
        return present
    # few more than one process per core would only take turns; long jobs first, so that none runs
    # alone at the end
    processes = processes or min(os.cpu_count() or 1, 8)
    jobs.sort(key=lambda job: job[1].startswith("atari"), reverse=True)
    measured, failed = _run(jobs, processes, timeout)
    for task, count in failed.items():
        print(f"{task} is incomplete: {count} of its {len(plans[task])} jobs failed; what was made "
              "is kept, the same command tries the rest again", file=sys.stderr)
    for task in sorted(plans, key=lambda task: task not in tasks):      # cards without data last
        if task not in failed:
            _finish_task(task, root / task, measured[task], levels[task])
    return [task for task in present if task not in failed]


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
                    raise SystemExit(str(result))                       # a full disk
                if isinstance(result, Exception):
                    failed[task] = failed.get(task, 0) + 1
                    bar.write(f"{task}, {_seeds_of(function, args)}: failed: {result}", sys.stderr)
                elif function is _measure:
                    measured[task].setdefault(args[0], []).extend(result)
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


def _levels(folder, noise):
    """The levels of mixed quality of a folder: those it was made with, else `noise`."""
    if not (folder / "task.json").exists():
        return tuple(noise or ())
    made = tuple(load_card(folder).get("noise", ()))
    if noise is not None and made != tuple(noise):
        raise SystemExit(f"{folder} was made with --noise {made}, not {noise}: give another "
                         "--root, or delete it")
    return made


def _plan(task, folder, episodes, with_data, noise=()):
    """The jobs [(function, args)] that complete a task's folder; the last argument: seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = recipe_of(task)
    wanted = (episodes or recipe.episodes) if with_data else 0
    files = {path.stem for end in ("*.hdf5", "*.failed") for path in folder.glob(end)}
    packed = {x.decode() for x in Pack(folder / PACK).names} if (folder / PACK).exists() else set()
    seeds = [s for s in range(wanted) if f"{s:06d}" not in files | packed]
    if not seeds and (folder / "task.json").exists():
        return []
    if packed - files:
        raise SystemExit(f"{folder / PACK} holds {len(packed - files)} trajectories that are no "
                         f"files any more, so nothing can be added to it; move it away, or ask for "
                         f"at most {len(packed)} episodes")
    (folder / PACK).unlink(missing_ok=True)             # it lacks what is made now
    (folder / "task.json").unlink(missing_ok=True)      # until all is there, the task is not
    chunk = 2 if task.startswith("atari") else 10
    plan = [(_make_episodes, (str(folder), noise, seeds[i : i + chunk]))
            for i in range(0, len(seeds), chunk)]
    n = min(recipe.references, 2 * episodes) if episodes else recipe.references
    span = lambda start: list(range(start, start + n))
    plan += [(_measure, ("expert", span(EXPERT_SEED))), (_measure, ("random", span(RANDOM_SEED)))]
    env = make_env(task)
    if isinstance(env.action_space, gym.spaces.Discrete):
        few = max(1, n // 8) if env.observation_space.dtype == np.uint8 else n
        plan += [
            (_measure, (a, list(range(CONSTANT_SEED, CONSTANT_SEED + few))))
            for a in range(env.action_space.n)
        ]
    env.close()
    return plan


def _finish_task(task, folder, measured, noise):
    """Write the index files and the card."""
    recipe, (domain, name) = recipe_of(task), split_task(task)
    env = make_env(task)
    space, obs_space = env.action_space, env.observation_space
    env.close()
    image = obs_space.dtype == np.uint8
    lengths, returns, total, square, count = {}, {}, 0.0, 0.0, 0
    for path in sorted(folder.glob("*.hdf5")):
        with h5py.File(path) as f:
            lengths[path.stem], returns[path.stem] = len(f["rewards"]), float(np.sum(f["rewards"]))
            states = f["states"][:].astype(np.float64)
            total, square, count = (
                total + states.sum(0),
                square + (states**2).sum(0),
                count + len(states),
            )
    card = {
        "task": task,
        "domain": task.split("/")[0],
        "observation": {"kind": "image" if image else "vector", "shape": list(obs_space.shape)},
        "action": (
            {"kind": "discrete", "n": int(space.n)}
            if isinstance(space, gym.spaces.Discrete)
            else {"kind": "continuous", "dims": int(space.shape[0])}
        ),
        "reward_scale": domain.reward_scale,
        "clip_rewards": domain.clip_rewards,
        "constant_rtg": domain.constant_rtg is not None,
        "limit": recipe.limit,
        "target_return": domain.constant_rtg or max(returns.values(), default=0.0),
        "reference_score": float(np.mean(measured["expert"])),
        "random_score": float(np.mean(measured["random"])),
        "noise": noise,
        "made_by": f"{recipe.expert.__name__}; " + (
            f"mixed quality, noise {', '.join(map(str, noise))}, labels as executed" if noise else
            f"labels clean, execution noise up to {recipe.sigma}"),
        "versions": {
            p: importlib.metadata.version(p)
            for p in {"gymnasium", "numpy", domain.package.replace("_", "-")}
        },
    }
    constants = {a: np.mean(r) for a, r in measured.items() if isinstance(a, int)}
    if constants:
        best = max(constants, key=constants.get)
        card["constant"] = {"action": best, "mean_return": float(constants[best])}
    if not count:           # without data of its own: read as a task of its domain that has some
        cards = [json.loads(path.read_text()) for path in sorted(folder.parent.glob("*/task.json"))]
        siblings = [c for c in cards if c["observation"] == card["observation"]]
        if not siblings:
            raise SystemExit(f"{task} has no data of its own; make a task of {card['domain']} with "
                             f"it, for example {card['domain']}/{domain.tasks[0]}")
        card["state_mean"], card["state_std"] = siblings[0]["state_mean"], siblings[0]["state_std"]
        card["target_return"] = domain.constant_rtg or max(measured["expert"])
    if count:
        mean, std = total / count, np.sqrt(np.maximum(square / count - (total / count) ** 2, 0))
        # a coordinate that never moves is left alone; pixels that hardly move must not be blown up
        std = std + 0.05 * 255 if image else np.where(std < 1e-4, 1.0, std)
        card["state_mean"], card["state_std"] = mean.round(6).tolist(), std.round(6).tolist()
    write_json(folder / "episode_lengths.json", lengths)
    write_json(folder / "episode_returns.json", returns)
    write_json(folder / "task.json", card)


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
    dones: np.ndarray | None = None         # (T,) bool; not read from a pack


def open_trajectory(path, card=None, length=None):
    """Read and validate one file, with its task's card and its length by the index, if given.

    BadTrajectory: path and reason.
    """
    bad = lambda reason: BadTrajectory(f"{path}: {reason}")
    try:
        f = h5py.File(path, "r")
    except FileNotFoundError:
        raise bad("there is no such file, although the index lists it") from None
    except OSError as error:
        raise bad(f"not a readable HDF5 file, perhaps truncated ({str(error)[:80]})") from None
    try:
        missing = [key for key in ("states", "actions", "rewards", "dones") if key not in f]
        if missing:
            raise bad(f"has no {', '.join(missing)}; expected states, actions, rewards, dones")
        states, actions, rewards = f["states"], f["actions"][:], f["rewards"][:]
        T = len(states)
        if (
            T == 0
            or len(actions) != T
            or rewards.shape != (T,)
            or f["dones"].shape not in ((T,), ())
        ):
            raise bad(
                f"lengths differ or are 0: states {states.shape}, actions {actions.shape}, rewards "
                f"{rewards.shape}, dones {f['dones'].shape}"
            )
        if length is not None and length != T:
            raise bad(f"holds {T} steps, but the index says {length}")
        image = states.dtype == np.uint8
        if (
            image
            and states.ndim != 4
            or not image
            and (states.ndim != 2 or states.dtype.kind != "f")
        ):
            raise bad(
                f"states are {states.dtype} {states.shape}; expected float (T, S) or uint8 "
                "(T, C, 64, 64)"
            )
        dones = np.zeros(T, bool)
        dones[-1 if f["dones"].shape == () else slice(None)] = f["dones"][()]
        if not image:
            states = states[:].astype(np.float32)
        _check_values(bad, states, actions, rewards, image, card)
        rtg = (
            f["returns_to_go"][:]
            if "returns_to_go" in f
            else np.cumsum(rewards[::-1], dtype=np.float64)[::-1]
        )
        if rtg.shape != (T,) or not np.isfinite(rtg).all():
            raise bad(f"returns_to_go {rtg.shape} are not {T} finite numbers")
    except (OSError, KeyError, RuntimeError) as error:
        f.close()
        raise bad(f"damaged inside ({str(error)[:80]})") from None
    except BadTrajectory:
        f.close()
        raise
    if not image:
        f.close()
    actions = actions.astype(np.int64 if actions.ndim == 1 else np.float32)
    return Trajectory(states, actions, rewards.astype(np.float32), rtg.astype(np.float32),
                      f if image else None, 0, T, dones)


def _check_values(bad, states, actions, rewards, image, card):
    """Values and shapes of one trajectory; raises bad(reason)."""
    if not np.isfinite(rewards).all() or (not image and not np.isfinite(states).all()):
        raise bad("holds NaN or infinite states or rewards")
    if (
        actions.ndim == 1
        and actions.dtype.kind not in "iu"
        or actions.ndim == 2
        and actions.dtype.kind != "f"
        or actions.ndim > 2
    ):
        raise bad(f"actions are {actions.dtype} {actions.shape}; expected int (T,) or float (T, A)")
    discrete = actions.ndim == 1
    low, high = (0, 17) if discrete else (-1.0, 1.0)
    if card and (card["action"]["kind"] == "discrete") != discrete:
        raise bad(
            f"actions are {actions.dtype} {actions.shape}, but the card says {card['action']}"
        )
    if card and discrete:
        high = card["action"]["n"] - 1
    if card and not discrete and actions.shape[1] != card["action"]["dims"]:
        raise bad(
            f"actions have {actions.shape[1]} dimensions, but the card says "
            f"{card['action']['dims']}"
        )
    if not np.isfinite(actions).all() or actions.min() < low or actions.max() > high:
        raise bad(f"actions from {actions.min()} to {actions.max()}, expected {low} to {high}")
    # RGB becomes gray
    shape = (1, *states.shape[2:]) if image and states.shape[1] == 3 else states.shape[1:]
    if card and tuple(shape) != tuple(card["observation"]["shape"]):
        raise bad(
            f"states are {states.shape[1:]} each, but the card says "
            f"{tuple(card['observation']['shape'])}"
        )


def to_gray(images):
    """uint8 (T, C, 64, 64) -> (T, 1, 64, 64): one channel as it is, three by luma (BT.601)."""
    if images.shape[1] == 1:
        return images
    luma = np.einsum("tchw,c->thw", images, (0.299, 0.587, 0.114))
    return np.rint(luma).astype(np.uint8)[:, None]


# one trajectory in the index of a Mixture: number of its task, its place among the names, its steps
ROW = np.dtype([("task", np.int32), ("episode", np.int32), ("length", np.int32)])


def load_card(folder):
    """The card of a task's folder."""
    if not (Path(folder) / "task.json").exists():
        raise SystemExit(f"{folder} has no task.json; finish it with: python data.py make "
                         f"{'/'.join(Path(folder).parts[-2:])}")
    return load_json(Path(folder) / "task.json")


def load_index(folder):
    """Names (E,) and lengths (E,) of a task's trajectories, by name, and their pack or None.

    From the pack's own index, or from episode_lengths.json: no trajectory is opened. Only where
    there is neither, each file is.
    """
    folder = Path(folder)
    if (folder / PACK).exists():
        pack = Pack(folder / PACK)
        return pack.names, pack.lengths, pack
    index = folder / "episode_lengths.json"
    if index.exists():
        lengths = load_json(index)
    else:
        lengths = {path.stem: len(open_trajectory(path).rewards) for path in folder.glob("*.hdf5")}
    names = sorted(lengths)
    # fixed-width bytes: a name of a million trajectories costs its letters, not a Python object
    return (np.array([name.encode() for name in names], bytes),
            np.array([lengths[name] for name in names], np.int64), None)


def load_json(path):
    """The content of a JSON file; SystemExit where it is none."""
    try:
        return json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path} is not JSON ({error}); delete it and run the command again"
                         ) from None


# ------------------------------------------------------------------------------------ packed files
PACK = "pack.h5"


class Pack:
    """All trajectories of a task in one file, one after the other, read by slices.

    states, actions, rewards, dones and returns_to_go as in single files, but (N, ...) for the N
    steps of all; starts, lengths and returns (E,) and episodes (E,), the names, say which steps are
    whose. Vectors are stored as they are and mapped into memory, images in gzip chunks. What is in
    it was validated when it was packed.
    """

    def __init__(self, path):
        self.path, bad = Path(path), lambda reason: BadTrajectory(f"{path}: {reason}")
        try:
            self.file = h5py.File(path, "r")
            self.names, self.starts, self.lengths, self.returns = (
                self.file[key][:] for key in ("episodes", "starts", "lengths", "returns"))
            self.states, self.actions, self.rewards, self.returns_to_go = (
                self._array(self.file[key])
                for key in ("states", "actions", "rewards", "returns_to_go"))
        except (OSError, KeyError, ValueError) as error:
            raise bad(f"not a whole pack ({str(error)[:80]}); make it again: python data.py pack"
                      ) from None
        steps = {len(x) for x in (self.states, self.actions, self.rewards, self.returns_to_go)}
        if len(steps) > 1 or not len(self.names) == len(self.starts) == len(self.lengths) or \
                (self.starts < 0).any() or (self.lengths < 1).any() or \
                (self.starts + self.lengths > min(steps)).any():
            raise bad("its index points outside of its data; make it again: python data.py pack")

    def _array(self, dataset):
        """A dataset without filters as a memory-mapped array, an image set as it is."""
        if dataset.id.get_offset() is None or dataset.chunks or not dataset.size:
            return dataset
        mapped = np.memmap(self.path, dataset.dtype, "r", dataset.id.get_offset(), dataset.shape)
        return mapped.view(np.ndarray)          # slices of a plain array are faster

    def trajectory(self, episode):
        """Number `episode` as a Trajectory."""
        return Trajectory(self.states, self.actions, self.rewards, self.returns_to_go, None,
                          int(self.starts[episode]), int(self.lengths[episode]))


def pack_task(folder, card=None, on_bad="refuse"):
    """Gather a task's files in one, atomically; returns (trajectories, bytes).

    Every trajectory is validated on the way; on_bad "skip" names a bad one and leaves it out.
    Memory holds one trajectory at a time.
    """
    folder = Path(folder)
    names, lengths, packed = load_index(folder)
    if packed is not None:
        return len(names), packed.path.stat().st_size
    total, at, kept, temporary = int(lengths.sum()), 0, [], folder / f"{PACK}.tmp"
    try:
        with h5py.File(temporary, "w") as f:
            for name, length in zip(names, lengths.tolist()):
                path = folder / f"{name.decode()}.hdf5"
                try:
                    t = open_trajectory(path, card, length)
                    states = to_gray(t.states[:]) if t.states.ndim == 4 else t.states
                    if kept and f["states"].shape[1:] != states.shape[1:]:
                        raise BadTrajectory(f"{path}: states are {states.shape[1:]} each, those "
                                            f"before it {f['states'].shape[1:]}")
                except BadTrajectory as error:
                    if on_bad == "refuse":
                        raise
                    print(f"skipped: {error}", file=sys.stderr)
                    continue
                columns = dict(states=states, actions=t.actions, rewards=t.rewards,
                               returns_to_go=t.returns_to_go, dones=t.dones)
                for key, x in columns.items():
                    if not kept:
                        shape = (total, *x.shape[1:])
                        f.create_dataset(key, shape, x.dtype, **storage(x.dtype, shape))
                    f[key][at:at + length] = x
                if t.file:
                    t.file.close()
                kept.append((name, at, length, float(t.rewards.sum())))
                at += length
            if not kept:
                raise BadTrajectory(f"{folder}: holds no trajectory that can be packed")
            for key, x in zip(("episodes", "starts", "lengths", "returns"), zip(*kept)):
                f[key] = np.array(x)
        os.replace(temporary, folder / PACK)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return len(kept), (folder / PACK).stat().st_size


# ----------------------------------------------------------------------------------------- windows
class Mixture:
    """The trajectories of several tasks: random windows for training, fixed ones to validate.

    tasks are trained on, of `heldout` only the cards are read. Batches come from one domain at a
    time. Every batch follows from (seed, step, domain) alone, so a run that is resumed at a step
    sees what it would have seen, and packed and single files give the same. on_bad: "refuse" stops
    at a malformed file, "skip" names it once and goes on without it. At most `open_files`
    trajectories are held open; memory does not grow with their number but for 20 bytes each and the
    name.
    """

    def __init__(self, root, tasks, heldout=(), standardise=False, on_bad="refuse",
                 top_fraction=1.0, open_files=512):
        self.standardise, self.on_bad, self.open_files = standardise, on_bad, open_files
        self.root, self.tasks, self.cards = Path(root), list(tasks), {}
        self.names, self.packs, self.reading = {}, {}, {}
        self.cache, self.bad, self.process = OrderedDict(), set(), os.getpid()
        parts = {}, {}                                      # for training, for validation
        for task in dict.fromkeys((*tasks, *heldout)):
            folder = self.root / task
            card = self.cards[task] = load_card(folder)
            card["heldout"] = task not in tasks
            if card["heldout"]:
                continue
            self.reading[task] = dict(card)
            if standardise:                                 # lists to arrays, once
                for key in ("state_mean", "state_std"):
                    self.reading[task][key] = np.asarray(card[key], np.float32)
            try:
                names, lengths, self.packs[task] = load_index(folder)
            except BadTrajectory as error:
                raise SystemExit(f"malformed data: {error}") from None
            self.names[task] = names
            if not len(names):
                raise SystemExit(f"{folder} holds no trajectories; run: python data.py make {task}")
            chosen = np.arange(len(names))
            if top_fraction < 1:                            # the best trajectories by return
                returns = self._returns(task)
                chosen = np.argsort(-returns, kind="stable")
                chosen = chosen[:math.ceil(top_fraction * len(chosen))]
            # the same trajectories are held out whatever else is in the mixture
            chosen = chosen[np.random.RandomState(0).permutation(len(chosen))]
            n_val = max(1, round(VALIDATION_FRACTION * len(chosen))) if len(chosen) > 1 else 0
            for part, some in zip(parts, (chosen[n_val:], chosen[:n_val])):
                rows = np.empty(len(some), ROW)
                rows["task"], rows["episode"] = self.tasks.index(task), some
                rows["length"] = lengths[some]
                part.setdefault(card["domain"], []).append(rows)
        self.train, self.validation = ({domain: np.concatenate(rows) for domain, rows in p.items()}
                                       for p in parts)
        self.domains = list(self.train)
        if not self.domains:
            raise SystemExit(f"nothing to train on among {', '.join(tasks)}")
        self.cumulative = {}                # probability that a draw is this trajectory or before
        for domain, rows in self.train.items():
            p = rows["length"] / rows["length"].sum()
            self.cumulative[domain] = p.cumsum() / p.sum()

    def _returns(self, task):
        if self.packs[task]:
            return self.packs[task].returns
        returns = load_json(self.root / task / "episode_returns.json")
        return np.array([returns[name.decode()] for name in self.names[task]])

    def get(self, task, episode, length):
        """The trajectory, validated at its first use and kept open; None if it is bad and on_bad is
        "skip".
        """
        if self.process != os.getpid():         # a worker: HDF5's handles must not be shared
            self.cache, self.process = OrderedDict(), os.getpid()
            self.packs = {t: pack and Pack(pack.path) for t, pack in self.packs.items()}
        if self.packs[task]:
            return self.packs[task].trajectory(episode)
        if (task, episode) in self.cache:
            self.cache.move_to_end((task, episode))
            return self.cache[task, episode]
        path = self.root / task / f"{self.names[task][episode].decode()}.hdf5"
        try:
            trajectory = open_trajectory(path, self.cards[task], length)
        except BadTrajectory as error:
            if self.on_bad == "refuse":
                raise SystemExit(
                    f"malformed data: {error}\nrepair or delete it, or go on without it: "
                    "--on-bad skip. All faults at once: python data.py check "
                    f"{self.root}"
                ) from None
            if path not in self.bad:
                print(f"skipped: {error}", file=sys.stderr)
                self.bad.add(path)
            return None
        self.cache[task, episode] = trajectory
        if len(self.cache) > self.open_files:
            _, old = self.cache.popitem(last=False)
            if old.file:
                old.file.close()
        return trajectory

    def window(self, row, start, context):
        """Steps start to start + context of a trajectory, row = (task, episode, length) of `train`
        or `validation`, as the model reads them; None if the file is bad.

        reward is r_{t-1} (0 at an episode's start) and rtg R_t, both over the reward scale;
        previous is the action before, with `known` false where there is none.
        """
        from lram import prepare_states
        number, episode, length = row
        task = self.tasks[number]
        t, card = self.get(task, episode, length), self.cards[task]
        if t is None:
            return None
        a, b = t.first + start, t.first + min(start + context, length)      # in t's arrays
        try:
            states = t.states[a:b]
            states = to_gray(states) if states.ndim == 4 else states
        except OSError as error:
            raise SystemExit(
                f"malformed data: {self.root / task}, {self.names[task][episode].decode()}: cannot "
                f"be read at step {start} ({error}); delete it, or see: python data.py check "
                f"{self.root}"
            ) from None
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
            "previous": shifted(t.actions),
            "known": known,
        }

    def sample(self, domain, batch_size, context, seed, step, part=(0, 1)):
        """A batch of random windows, see collate: trajectories in proportion to length, then any
        start. part (k, n): every n-th window of it from the k-th on, the share of process k of n.
        """
        number = self.domains.index(domain)
        rng, plan = np.random.default_rng([seed, step, number]), []
        for _ in range(batch_size):
            plan.append(self.draw(domain, context, rng))
        windows = []
        for slot in range(part[0], batch_size, part[1]):
            window, spare, tries = self.window(*plan[slot], context), None, 0
            while window is None:               # a bad file: another draw, of this slot's own
                spare = spare or np.random.default_rng([seed, step, number, slot])
                window, tries = self.window(*self.draw(domain, context, spare), context), tries + 1
                if tries == 100:
                    raise SystemExit(f"every trajectory of {domain} that was tried is malformed; "
                                     f"see: python data.py check {self.root}")
            windows.append(window)
        return collate(windows, context)

    def draw(self, domain, context, rng):
        """A trajectory in proportion to its length, any start in it: (row of train, start)."""
        rows, cumulative = self.train[domain], self.cumulative[domain]
        row = rows[cumulative.searchsorted(rng.random(), side="right")].item()
        return row, int(rng.integers(max(1, row[2] - context + 1)))

    def validation_batches(self, domain, batch_size, context, max_windows=96, part=(0, 1)):
        """The held-out trajectories cut into consecutive windows, evenly thinned to at most
        max_windows. part (k, n): every n-th batch from the k-th on.
        """
        rows = self.validation.get(domain, np.empty(0, ROW))
        ends = np.cumsum(-(-rows["length"] // context))             # windows up to here
        count = int(ends[-1]) if len(ends) else 0
        keep = np.unique(np.linspace(0, count - 1, min(max_windows, count)).astype(int))
        for i in range(part[0] * batch_size, len(keep), part[1] * batch_size):
            windows = []
            for k in keep[i:i + batch_size]:
                r = ends.searchsorted(k, side="right")
                start = int(k - (ends[r - 1] if r else 0)) * context
                windows.append(self.window(rows[r].item(), start, context))
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
def task_folders(path):
    """All folders below path that hold trajectories, as single files or packed."""
    return sorted({p.parent for end in ("*.hdf5", PACK) for p in Path(path).rglob(end)})


def check(path):
    """Validate every trajectory below path; print the faults; returns their number."""
    files = sorted(Path(path).rglob("*.hdf5"))
    faults = 0
    for file in files:
        card = load_card(file.parent) if (file.parent / "task.json").exists() else None
        try:
            trajectory = open_trajectory(file, card)
            trajectory.states[:]  # images: decompress everything once
            if trajectory.file:
                trajectory.file.close()
        except (BadTrajectory, OSError) as error:
            print(error)
            faults += 1
    print(f"{path}: {len(files)} trajectories, {faults} with faults")
    return faults + (not files)


def pack(path, on_bad="refuse"):
    """Pack every task below path; a task that is packed already is left alone."""
    from tqdm import tqdm
    folders = task_folders(path)
    if not folders:
        raise SystemExit(f"{path} holds no trajectories; make some with: python data.py make")
    for folder in tqdm(folders, desc="pack", unit="task"):
        card = load_card(folder) if (folder / "task.json").exists() else None
        try:
            count, size = pack_task(folder, card, on_bad)
        except BadTrajectory as error:
            raise SystemExit(f"malformed data: {error}\nrepair or delete it, or leave it out: "
                             "--on-bad skip. What was packed before it stays.") from None
        tqdm.write(f"{folder / PACK}: {count} trajectories, {size / 1e6:.1f} MB")


def info(path):
    """Print a table of what is below path."""
    print(f"{'task':<36}{'episodes':>9}{'steps':>9}{'length':>8}{'return mean (min to max)':>28}"
          f"{'consecutive actions':>21}")
    for folder in task_folders(path):
        lengths, returns, differ = [], [], []
        for file in sorted(folder.glob("*.hdf5")):
            t = open_trajectory(file)
            lengths.append(len(t.rewards))
            returns.append(t.rewards.sum())
            a = t.actions
            # Table 7 of the paper: mean squared difference, or how often it changes where actions
            # are discrete
            differ.append(
                (np.mean((a[1:] - a[:-1]) ** 2) if a.ndim == 2 else np.mean(a[1:] != a[:-1]))
                if len(a) > 1
                else 0.0
            )
        spread = f"{np.mean(returns):.1f} ({np.min(returns):.1f} to {np.max(returns):.1f})"
        kind = "squared diff." if a.ndim == 2 else "changes"
        print(
            f"{'/'.join(folder.parts[-2:]):<36}{len(lengths):>9}{sum(lengths):>9}"
            f"{np.mean(lengths):>8.0f}"
            f"{spread:>28}{np.mean(differ):>8.3f} {kind}"
        )


@dataclass
class Make:
    """Generate what is missing of the tasks' data (default: the default mixture)."""
    tasks: tyro.conf.Positional[tuple[str, ...]] = DEFAULT_TASKS
    """Tasks named domain/task, or whole domains; python eval.py --list shows them."""
    heldout: tuple[str, ...] | None = None
    """Tasks, or domains' held-out tasks, that are only scored: their cards are made, no data
    (default: darkroom/heldout beside darkroom/train)."""
    root: Path = Path("datasets")
    """Where the data live."""
    episodes: int | None = None
    """Episodes per task (default: each recipe's own)."""
    processes: int | None = None
    """Worker processes (default: one per core, at most 8)."""
    noise: tuple[float, ...] | None = None
    """Mixed quality, e.g. 0 0.3 1: noise of execution, level by level in turn; labels as executed
    (default: the expert's clean labels, executed with a little noise)."""
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
class Check:
    """Validate every trajectory below a folder; exit code 1 names the faults."""
    path: tyro.conf.Positional[Path] = Path("datasets")
    """A folder at any level of the layout."""


@dataclass
class Info:
    """Counts, lengths, returns and action statistics of what is below a folder."""
    path: tyro.conf.Positional[Path] = Path("datasets")
    """A folder at any level of the layout."""


def main(args):
    """See the opening of this file."""
    if isinstance(args, Make):
        heldout = default_heldout(args.tasks) if args.heldout is None else args.heldout
        make(args.tasks, args.root, heldout, args.episodes, args.processes, args.noise,
             args.timeout)
        info(args.root)
    elif isinstance(args, PackTasks):
        pack(args.path, args.on_bad)
    elif isinstance(args, Check):
        sys.exit(1 if check(args.path) else 0)
    else:
        info(args.path)


if __name__ == "__main__":
    main(tyro.cli(Make | Annotated[PackTasks, tyro.conf.subcommand("pack")] | Check | Info,
                  description=__doc__))
