"""The worlds: task table, environments, one rollout loop, scores; as a program, it scores a
checkpoint.

    python eval.py --checkpoint runs/mlstm/checkpoint.pt     # needs nothing but the checkpoint
    python eval.py --checkpoint ... --tasks metaworld/reach-v3 --video reach.gif
    python eval.py --checkpoint ... --tasks metaworld/reach-v3 --inspect state.png   # its memory
    python eval.py --checkpoint ... --embed clusters.png     # its tasks, by their hidden states
    python eval.py --checkpoint ... --fast                   # acts through the compiled policy
    python eval.py --checkpoint ... --tasks metaworld/reach-v3 --export reach.pt2   # for a robot
    python eval.py --compare runs/*/scores.json --output scores.png
    python eval.py --video pong.gif --tasks atari/pong --policy expert    # before any training
    python eval.py --list                                    # every task, and what is missing

A world of your own needs no line here: gym:ID is the task that gymnasium knows by this id, and
gym:module:ID imports the module that registers it first.

Source: LRAM (arXiv 2410.22391), section 4 and appendix B; simulators: Meta-World (v3), DMControl,
Atari (ALE), Procgen, Dark-Room (Laskin et al., 2022), robosuite (for Composuite and Mimicgen,
rebuilt). Each world keeps one contract:

    observation    float32 vector (S,) with S <= 204, or a gray uint8 image (1, 64, 64)
    action         Discrete(n <= 18), or Box(-1, 1) of at most 8 dimensions
    reset(seed=s)  alone determines the episode, also when one instance is reset thousands of times
    end            out of time is `truncated`; `terminated` is an end of the task itself

Scores are normalised: 0 is the random policy, 1 the mean of the reference (the expert that made the
data),

    score = (return - random) / (reference - random)

averaged over episodes, then over the tasks of a domain, then over domains, so that each counts the
same; --normalise public takes both numbers from the paper's table. The interval is a 95 %
bootstrap, stratified: episodes are redrawn within their task (Agarwal et al., 2021, rliable), and
so are those of the random policy and the reference, where the card holds them. A score whose
interval reaches down to 0 is not above random, and the table says so.

Not included: several processes for one task, rendering of MuJoCo without an OpenGL library.
"""

import concurrent.futures
import contextlib
import difflib
import functools
import importlib.util
import io
import itertools
import json
import logging
import multiprocessing
import os
import re
import shlex
import signal
import sys
import tempfile
import time
import traceback
import types
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, Literal

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

# episodes k = 0, 1, ... of a score use seed 1,000,000 + k: never used for data
EVALUATION_SEED = 1_000_000
METAWORLD_STEPS = 200          # the paper's limit; the simulator's own is 500
DMCONTROL_STEPS = 1000         # every task of the suite's benchmarking set lasts this long
ATARI_STEPS = 27_000           # decisions of 4 frames: 30 minutes of play, the literature's limit
GYM_STEPS = 1000               # where a world of somebody else's has no limit
STATE_WIDTH, MAX_DISCRETE, MAX_DIMS = 204, 18, 8   # lram.py's, which would import torch


# -------------------------------------------------------------------------------------- Meta-World
class MetaWorld(gym.Env):
    """One Meta-World v3 task with the goal visible, as in MT1, but with unlimited goals.

    Observation (39,) float32: hand (3), gripper opening, two objects (position 3, quaternion 4
    each), the same 18 numbers one step earlier, goal (3). Action (4,) float32: displacement of the
    hand (3), grip. Reward 0..10; info['success'] is 1.0 on the steps on which the task is solved.

    Made from the class below the MT1 benchmark: MT1 resets a second simulator 50 times to draw 50
    fixed goals (0.45 s a task against 0.09 s). Here each seed draws its own goal and objects.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 80}

    def __init__(self, name, render_mode=None):
        tasks = import_metaworld().ALL_V3_ENVIRONMENTS
        if name not in tasks:
            near = difflib.get_close_matches(name, tasks, n=3, cutoff=0.0)
            raise ValueError(f"no Meta-World task {name!r}; nearest: {', '.join(near)}")
        self.name, self.render_mode = name, render_mode
        self.sim = tasks[name](render_mode=render_mode, camera_name="corner2")
        # Do what set_task() would do, less the frozen draw: goal and objects are drawn anew from
        # sim.np_random at each reset (and not from numpy's global generator, the default).
        self.sim._set_task_called = True
        self.sim._freeze_rand_vec = False
        self.sim.seeded_rand_vec = True
        # Show the goal. step() clips the observation to a cached space in which a hidden goal may
        # only be 0, so the cache has to go too, else the goal vanishes after the first step.
        self.sim._partially_observable = False
        del self.sim.sawyer_observation_space
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (39,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.sim.np_random = self.np_random
        obs, _ = self.sim.reset()
        return obs.astype(np.float32), {}

    def step(self, action):
        obs, reward, terminated, _, info = self.sim.step(action)     # the limit is TimeLimit's
        return obs.astype(np.float32), float(reward), terminated, False, info

    def render(self):
        return self.sim.render()[::-1, ::-1]               # this camera is mounted upside down

    def close(self):
        self.sim.close()


def import_metaworld():
    """metaworld, also where the library of glfw does not load (it wants libX11).

    gymnasium's MuJoCo module imports glfw at its top, though only windows and MUJOCO_GL=glfw use
    it: an empty module does for all else.
    """
    try:
        import glfw  # noqa: F401
    except ImportError:
        if os.environ["MUJOCO_GL"] == "glfw":
            raise
        sys.modules["glfw"] = types.ModuleType("glfw")
    import metaworld                                       # 0.4 s: only who uses it pays for it
    return metaworld


def make_metaworld(name, render=False):
    """Meta-World task `name` ('reach-v3', one of 50), truncated after 200 steps. See MetaWorld."""
    check_mujoco_gl(render)
    env = MetaWorld(name, render_mode="rgb_array" if render else None)
    return gym.wrappers.TimeLimit(env, METAWORLD_STEPS)


# --------------------------------------------------------------------------------------- DMControl
class DMControl(gym.Env):
    """One task of the DeepMind Control Suite: flat float32 observation, action Box(-1, 1).

    The observation is the suite's dictionary, flattened in its own order; `slices` says where each
    entry went, e.g. {'position': slice(0, 3), 'velocity': slice(3, 5)}. Reward 0..1 a step.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}

    def __init__(self, name, render_mode=None):
        from dm_control import suite
        domain, _, task = name.partition("-")
        if (domain, task) not in suite.ALL_TASKS:
            near = [f"{d}-{t}" for d, t in suite.ALL_TASKS if d == domain]
            near = near or [f"{d}-{t}" for d, t in suite.BENCHMARKING]
            raise ValueError(f'no DMControl task {name!r}; choose from: {", ".join(near)}')
        self.name, self.render_mode = name, render_mode
        self.sim = suite.load(domain, task, task_kwargs={"random": 0})
        spec = self.sim.action_spec()
        # Action in [-1, 1] -> [minimum, maximum]: mostly the identity, but not for quadruped, say.
        self.centre = (spec.maximum + spec.minimum) / 2
        self.scale = (spec.maximum - spec.minimum) / 2
        if self.scale.max() > 1e6:                         # MuJoCo's way to say "no limit" (lqr)
            raise ValueError(f"{name} has unbounded actions, which Box(-1, 1) cannot express")
        self.action_space = gym.spaces.Box(-1.0, 1.0, spec.shape, np.float32)
        self.slices, size = {}, 0
        for key, entry in self.sim.observation_spec().items():
            width = int(np.prod(entry.shape))              # a scalar has shape () and width 1
            self.slices[key], size = slice(size, size + width), size + width
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)

    def _flatten(self, observation):
        parts = [np.ravel(value) for value in observation.values()]
        return np.concatenate(parts).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        # The task draws its start from its own generator; to reseed that one costs microseconds,
        # to load the task again (the documented way) parses the XML anew for 40 ms.
        if seed is not None:
            self.sim.task.random.seed(seed)
        return self._flatten(self.sim.reset().observation), {}

    def step(self, action):
        step = self.sim.step(self.centre + self.scale * action)
        # discount 0 is an end of the task itself, 1 on the last step is the end of time.
        terminated = step.last() and step.discount == 0.0
        truncated = step.last() and not terminated
        return self._flatten(step.observation), float(step.reward), terminated, truncated, {}

    def render(self):
        return self.sim.physics.render(height=480, width=480, camera_id=0)


def make_dmcontrol(name, render=False):
    """DMControl task `name` ('domain-task'), truncated after 1000 steps. See DMControl."""
    check_mujoco_gl(render)
    env = DMControl(name, render_mode="rgb_array" if render else None)
    return gym.wrappers.TimeLimit(env, DMCONTROL_STEPS)


def check_mujoco_gl(render):
    """Choose MuJoCo's OpenGL before its first import: none, unless pictures were asked for."""
    if not render:
        os.environ.setdefault("MUJOCO_GL", "disabled")     # a machine without OpenGL will do
        return
    # EGL draws on a GPU or, through Mesa, on a CPU, and needs no display; macOS has only GLFW.
    choice = os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "glfw")
    if choice == "disabled":
        raise RuntimeError(
            "render=True, but MUJOCO_GL is 'disabled' (by you, or by a world made earlier without "
            "render=True, and MuJoCo reads it only once): start Python with MUJOCO_GL=egl (GPU or "
            "CPU; apt-get install libegl1), osmesa (CPU; libosmesa6) or glfw (a desktop).")


# --------------------------------------------------------------------------------------- Dark-Room
class DarkRoom(gym.Env):
    """A 10 x 10 room without light: one hidden cell pays +1 on each step that ends on it.

    Start (0, 0); observation (row, col) float32; actions 0 up, 1 down, 2 left, 3 right, 4 stay (a
    wall stops a move); truncated after 100 steps, never terminated. The goal is not observed: only
    the memory of where a reward was found can tell it.

    split: 'train' (80 goals) or 'heldout' (20). `reset(seed=s)` takes goal s % number of goals,
    so consecutive seeds visit them all; `reset(options={'goal': k})` takes goal k of the split.
    info['goal']: its (row, col).
    """

    SIZE, STEPS = 10, 100
    UP, DOWN, LEFT, RIGHT, STAY = range(5)
    MOVES = np.array([(-1, 0), (1, 0), (0, -1), (0, 1), (0, 0)])
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, split="train", render_mode=None):
        cells = np.random.RandomState(43).permutation(self.SIZE ** 2)          # row-major
        splits = {"train": cells[:80], "heldout": cells[80:]}
        if split not in splits:
            raise ValueError(f"split is {split!r}; choose 'train' or 'heldout'")
        self.goals = np.stack(np.divmod(splits[split], self.SIZE), axis=1)     # (80 or 20, 2)
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(0.0, self.SIZE - 1.0, (2,), np.float32)
        self.action_space = gym.spaces.Discrete(5)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        k = (options or {}).get("goal", seed)
        if k is None:
            k = self.np_random.integers(len(self.goals))
        self.goal = self.goals[k % len(self.goals)]
        self.position, self.t = np.zeros(2, int), 0
        return self.position.astype(np.float32), {"goal": tuple(self.goal.tolist())}

    def step(self, action):
        self.position = np.clip(self.position + self.MOVES[action], 0, self.SIZE - 1)
        self.t += 1
        reward = float((self.position == self.goal).all())
        info = {"goal": tuple(self.goal.tolist())}
        return self.position.astype(np.float32), reward, False, self.t >= self.STEPS, info

    def render(self):
        """(160, 160, 3) uint8: the agent in blue, the goal in green (only we see it)."""
        room = np.full((self.SIZE, self.SIZE, 3), 32, np.uint8)
        room[tuple(self.goal)] = (64, 192, 64)
        room[tuple(self.position)] = (64, 96, 255)
        return room.repeat(16, axis=0).repeat(16, axis=1)


def make_darkroom(split, render=False):
    """Dark-Room with the goals of `split` ("train" or "heldout"; "histories", which are data of
    agents that learn, are about those of "train"). See DarkRoom.
    """
    split = "train" if split == "histories" else split
    return DarkRoom(split, render_mode="rgb_array" if render else None)


# ---------------------------------------------------------------------------------------- pictures
def to_gray(images):
    """uint8 (T, C, H, W) -> (T, 1, H, W): one channel as it is, three by luma (BT.601)."""
    if images.shape[1] == 1:
        return images
    luma = np.einsum("tchw,c->thw", images, (299.0, 587.0, 114.0))
    return np.rint(luma / 1000).astype(np.uint8)[:, None]


def to_frames(images):
    """uint8 (T, H, W), (T, H, W, C) or (T, C, H, W), C 1 or 3 -> gray (T, 1, 64, 64), by areas.

    Every sum is of whole numbers, which float64 holds exactly: all machines draw the same picture.
    """
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[-1] in (1, 3):
        images = np.moveaxis(images, -1, 1)
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images {images.shape[1:]}; expected one channel or three")
    images = to_gray(images)
    height, width = images.shape[2:]
    if (height, width) == (64, 64):
        return images
    sums = _overlaps(height) @ images @ _overlaps(width).T                  # (T, 1, 64, 64)
    return np.rint(sums / (height * width)).astype(np.uint8)


@functools.cache
def _overlaps(size):
    """(64, size): how much of each of 64 equal parts of a line lies in each of its `size` pixels;
    a part is `size` long, a pixel 64.
    """
    part, pixel = np.arange(64)[:, None] * size, np.arange(size) * 64
    shared = np.minimum(part + size, pixel + 64) - np.maximum(part, pixel)
    return np.maximum(shared, 0).astype(np.float64)


# ------------------------------------------------------------------------------------------- Atari
class Atari(gym.Wrapper):
    """An ALE game as agents see it: 4 frames a step, the brighter of the last two, 64 x 64 gray.

    What gymnasium's AtariPreprocessing does (up to 30 no-ops at the start, too), without OpenCV.
    Without sticky actions the emulator draws no random numbers: the seed decides the number of
    no-ops alone.
    """

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (1, 64, 64), np.uint8)
        self.metadata = {**env.metadata, "render_fps": 15}  # steps a second: 4 frames of 60

    def reset(self, *, seed=None, options=None):
        self.env.reset(seed=seed)
        for _ in range(self.unwrapped.np_random.integers(1, 31)):
            screen, *_, info = self.env.step(0)
        return to_frames(screen[None])[0], info

    def step(self, action):
        total, screens = 0.0, []
        for _ in range(4):
            screen, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            screens.append(screen)
            if terminated or truncated:
                break
        picture = np.max(screens[-2:], axis=0)      # some games draw half of it in each frame
        return to_frames(picture[None])[0], total, terminated, truncated, info


def make_atari(game, render=False):
    """Atari `game` ("freeway", "ms_pacman", one of 100): (1, 64, 64) uint8 grey, Discrete(18).

    A step is 4 frames of one action; no sticky actions; rewards are the game's points, unclipped.
    info["lives"] counts what is left; losing a life does not end the episode.
    """
    import ale_py
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)         # before the first banner
    gym.register_envs(ale_py)
    name = "".join(word.capitalize() for word in game.split("_"))      # ms_pacman -> MsPacman
    if f"ALE/{name}-v5" not in gym.registry:
        known = [id[4:-3] for id in gym.registry if id.startswith("ALE/")]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
        near = ["atari/" + re.sub(r"\B(?=[A-Z])", "_", name).lower() for name in near]
        raise ValueError(f"no such game; nearest: {', '.join(near)}")
    env = gym.make(f"ALE/{name}-v5", frameskip=1, repeat_action_probability=0.0,
                   full_action_space=True, obs_type="grayscale",       # cheaper than unused RGB
                   render_mode="rgb_array" if render else None)
    return gym.wrappers.TimeLimit(Atari(env), ATARI_STEPS)


# ----------------------------------------------------------------------------------------- Procgen
class Procgen(gym.Env):
    """One Procgen game: 200 levels, easy; a gray picture (1, 64, 64) uint8, Discrete(15).

    Actions 0 to 8 move (column times row: left, stay, right times down, stay, up; 4 stays), 9 to 14
    are the game's own (9 shoots); most games know only some. `reset(seed=s)` draws the level, and
    all that is random in it, from s. info["success"] is 1.0 on the step that completes the level
    (maze, heist, coinrun ...; some games have no such moment). The game's own time limit truncates.

    `picture` is what is seen in colour (64, 64, 3); `sim` is a ProcgenCopies of one.
    """

    TIME = {"maze": 500, "leaper": 500, "bossfight": 4000, "plunder": 4000, "bigfish": 6000}
    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}

    def __init__(self, name, render_mode=None):
        games = sorted(DOMAINS["procgen"].tasks + DOMAINS["procgen"].heldout)
        if name not in games:
            raise ValueError(f"no Procgen game {name!r}; choose from: {', '.join(games)}")
        self.name, self.render_mode = name, render_mode
        self.steps = self.TIME.get(name, 1000)             # the games' own limits
        self.observation_space = gym.spaces.Box(0, 255, (1, 64, 64), np.uint8)
        self.action_space = gym.spaces.Discrete(15)
        self.sim = ProcgenCopies(name, 1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2 ** 31))
        # The simulator draws level after level from the seed it was made with, and goes on by
        # itself; a new one costs 0.3 ms (the first of a process, which reads the sprites, 1 s).
        self.sim.close()
        self.sim, self.t = ProcgenCopies(self.name, 1, seed), 0
        self.picture = self.sim.observe()[0][0].copy()
        return self._observation(), {"success": 0.0, "level": self.sim.info["level_seed"]}

    def step(self, action):
        pictures, reward, over = self.sim.step(np.array([action]))
        info, self.t = self.sim.info, self.t + 1
        done, success = bool(over[0]), float(info["prev_level_complete"])
        if not done:            # at the end it shows the next level already: keep the last picture
            self.picture = pictures[0].copy()
        truncated = done and self.t >= self.steps and not success
        info = {"success": success, "level": info["prev_level_seed"]}
        return self._observation(), float(reward[0]), done and not truncated, truncated, info

    def _observation(self):
        return to_frames(self.picture[None])[0]

    def render(self):
        return self.picture

    def close(self):
        self.sim.close()


class ProcgenCopies:
    """`count` simulators of one game in lockstep, for Procgen itself and for experts that try their
    actions out before they take them.

    Two packages carry OpenAI's code, each for some Pythons: procgen-mirror (to 3.11, on gym3) and
    procgen-gym (from 3.13, on gymnasium). observe() and step(actions (N,)) return pictures (N, 64,
    64, 3) uint8, reward (N,) and over (N,) bool; info is the first one's; state() is all there is
    to know of the moment, for restore(): a list of bytes.
    """

    def __init__(self, name, count, seed=0):
        options = dict(distribution_mode="easy", num_levels=200, start_level=0, rand_seed=seed,
                       num_threads=0)
        self.count, self.gym3 = count, importlib.util.find_spec("procgen") is not None
        try:
            if self.gym3:
                with contextlib.redirect_stderr(io.StringIO()):     # it imports the old gym, which
                    from procgen import ProcgenGym3Env              # complains
                self.sim = sim = ProcgenGym3Env(count, name, **options)
            else:
                from procgen_gym import ProcgenVecEnv
                self.sim = sim = ProcgenVecEnv(count, name, **options)
        except OSError as error:
            lacks = re.search(r"[^ /']+(?=: cannot open)", str(error))
            raise SystemExit(f"Procgen cannot load {lacks[0] if lacks else error}; on Debian and "
                             "Ubuntu: apt-get install libgl1 libglib2.0-0") from None
        self.state, self.restore, self.close = sim.get_state, sim.set_state, sim.close

    def observe(self):
        if self.gym3:
            reward, obs, over = self.sim.observe()
            self.info = self.sim.get_info()[0]
            return obs["rgb"], reward, over
        pictures, info = self.sim.reset()                  # which only looks
        self.info = {key: values[0] for key, values in info.items()}
        return pictures, np.zeros(self.count), np.zeros(self.count, bool)

    def step(self, actions):
        if self.gym3:
            self.sim.act(actions)
            return self.observe()
        pictures, reward, over, _, info = self.sim.step(actions)
        self.info = {key: values[0] for key, values in info.items()}
        return pictures, reward, over


def make_procgen(game, render=False):
    """Procgen `game` ("maze", "coinrun", one of 16). See Procgen."""
    return Procgen(game, render_mode="rgb_array" if render else None)


# ------------------------------------------------------------- robosuite: Composuite and Mimicgen
TABLE = 0.8                    # height of the table in metres; the robot's base is at (-0.56, 0)
COMPOSUITE_STEPS = 500         # CompoSuite's length of an episode


@functools.cache
def import_robosuite():
    """robosuite, imported in silence and without its choice of MUJOCO_GL (see check_mujoco_gl)."""
    gl = os.environ["MUJOCO_GL"]
    logging.disable(logging.WARNING)            # it advises to install its optional parts
    import mujoco  # noqa: F401                 # reads MUJOCO_GL, which the next import overwrites
    import robosuite
    logging.disable(logging.NOTSET)
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    os.environ["MUJOCO_GL"] = gl
    return robosuite


# Two worlds of our own. In functions, because a class needs its base, whose import takes seconds;
# robosuite.make() finds them by name once they are defined.
@functools.cache
def stack_three_class():
    """robosuite's Stack with a third cube."""
    import_robosuite()
    from robosuite.environments.manipulation.stack import Stack
    from robosuite.models.objects import BoxObject
    from robosuite.models.tasks import ManipulationTask
    from robosuite.utils.observables import Observable, sensor

    class StackThree(Stack):
        """Stack, and then cube C on cube A."""

        def _load_model(self):
            super()._load_model()
            self.cubeC = BoxObject("cubeC", size=[0.02, 0.02, 0.02], rgba=[0, 0, 1, 1])
            self.placement_initializer.add_objects(self.cubeC)
            cubes = [self.cubeA, self.cubeB, self.cubeC]
            robots = [robot.robot_model for robot in self.robots]
            self.model = ManipulationTask(self.model.mujoco_arena, robots, cubes)

        def _setup_observables(self):
            observables = super()._setup_observables()

            @sensor(modality="object")
            def cubeC(cache):
                body = self.sim.data._data.body(self.cubeC.root_body)
                return np.concatenate([body.xpos, body.xquat])
            observables["cubeC"] = Observable("cubeC", cubeC, sampling_rate=self.control_freq)
            return observables

        def _check_success(self):
            height = self.sim.data._data.body(self.cubeC.root_body).xpos[2]
            return (super()._check_success() and height > TABLE + 0.08
                    and self.check_contact(self.cubeC, self.cubeA)
                    and not self._check_grasp(self.robots[0].gripper, self.cubeC))

    return StackThree


@functools.cache
def tabletop_class():
    """A robot at a table, for things of our own."""
    import_robosuite()
    from robosuite.controllers import load_part_controller_config
    from robosuite.controllers.composite.composite_controller_factory import (
        refactor_composite_controller_config,
    )
    from robosuite.environments.manipulation.manipulation_env import ManipulationEnv
    from robosuite.models.arenas import TableArena
    from robosuite.models.objects import CompositeObject
    from robosuite.models.tasks import ManipulationTask

    class Tabletop(ManipulationEnv):
        """A robot with Rethink's gripper, moved by its joints, at a table with things on it.

        things: {name: (position, parts, movable)}, where the parts are boxes (centre, half size).
        What is movable starts within 5 x 3 cm around its position.
        """

        def __init__(self, robot, things):
            self.things = things
            joints = load_part_controller_config(default_controller="JOINT_POSITION") | {"kp": 150}
            super().__init__(
                robot, gripper_types="RethinkGripper", control_freq=20, hard_reset=False,
                controller_configs=refactor_composite_controller_config(joints, robot, ["right"]),
                has_offscreen_renderer=False, use_camera_obs=False, ignore_done=True)

        def _load_model(self):
            super()._load_model()
            robot = self.robots[0].robot_model
            robot.set_base_xpos(robot.base_xpos_offset["table"](0.8))
            arena = TableArena(table_full_size=(0.8, 0.8, 0.05), table_offset=(0, 0, TABLE))
            arena.set_origin([0, 0, 0])
            self.bodies = {}
            for name, (position, parts, movable) in self.things.items():
                centres, sizes = zip(*parts)
                colour = [0.8, 0.2, 0.2, 1.0] if movable else [0.4, 0.5, 0.6, 1.0]
                body = self.bodies[name] = CompositeObject(
                    name, [0.1, 0.1, 0.1], ["box"] * len(parts), sizes, centres, rgba=colour,
                    geom_rgbas=[colour] * len(parts), density=500.0,
                    locations_relative_to_center=True,
                    joints="default" if movable else None,
                    # what has no height is paint
                    obj_types=["all" if min(size) > 0.001 else "visual" for size in sizes])
                body.get_obj().set("pos", " ".join(map(str, position)))
            self.model = ManipulationTask(arena, [robot], list(self.bodies.values()))

        def _setup_observables(self):
            return {}                           # composuite_observation reads the simulator itself

        def _reset_internal(self):
            super()._reset_internal()
            for name, (position, _, movable) in self.things.items():
                if movable:
                    spread = self.rng.uniform([-0.05, -0.03, 0], [0.05, 0.03, 0])
                    self.sim.data.set_joint_qpos(
                        self.bodies[name].joints[0], [*(position + spread), 1, 0, 0, 0])

        def reward(self, action):
            return 0.0                          # composuite_judge's business

    return Tabletop


class Robosuite(gym.Env):
    """A task of robosuite as a gymnasium.Env.

    observe(sim, observation of sim) -> float32 vector; judge(sim) -> (reward, success); `ends` says
    whether success terminates. Actions of Box(-1, 1): 20 a second, the last one the gripper's
    (above 0 closes it).
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, sim, observe, judge, ends, render_mode=None):
        self.sim, self.observe, self.judge, self.ends = sim, observe, judge, ends
        self.render_mode, self.renderer = render_mode, None
        size = observe(sim, sim.reset()).shape
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, size, np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (sim.action_dim,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        # The samplers of robosuite hold its generator: give that one a new state, not a new one.
        self.sim.rng.bit_generator.state = self.np_random.bit_generator.state
        return self.observe(self.sim, self.sim.reset()), {}

    def step(self, action):
        observation = self.sim.step(np.asarray(action, np.float64))[0]
        reward, success = self.judge(self.sim)
        terminated = self.ends and success
        observation = self.observe(self.sim, observation)
        return observation, reward, terminated, False, {"success": float(success)}

    def render(self):
        import mujoco
        if self.renderer is None:
            self.renderer = mujoco.Renderer(self.sim.sim.model._model, 480, 480)
            self.option = mujoco.MjvOption()
            self.option.geomgroup[0] = 0                   # the shapes that collide: not to be seen
        self.renderer.update_scene(self.sim.sim.data._data, "frontview", self.option)
        return self.renderer.render()

    def close(self):
        if self.renderer is not None:
            self.renderer.close()
        self.sim.close()


def open_box(x, y, z, wall):
    """The parts of a box without a lid: half sizes outside, half the thickness of its walls."""
    sides = [((s * (x - wall), 0, 0), (wall, y, z)) for s in (-1, 1)]
    ends = [((0, s * (y - wall), 0), (x, wall, z)) for s in (-1, 1)]
    return [((0, 0, wall - z), (x, y, wall)), *sides, *ends]


# CompoSuite's four factors, in geometry of our own instead of its meshes. The robot looks along x;
# the object starts on its right (y < 0), the goal is on its left, the obstacle between. Parts are
# boxes (centre, half size) in metres; the gripper opens 5.8 cm and closes along y.
COMPOSUITE_ROBOTS = ("IIWA", "Jaco", "Kinova3", "Panda")
COMPOSUITE_OBJECTS = {
    "Box": [((0, 0, 0), (0.02, 0.02, 0.02))],
    "Dumbbell": [((0, 0, 0), (0.025, 0.011, 0.011)),
                 ((-0.035, 0, 0), (0.01, 0.02, 0.02)),
                 ((0.035, 0, 0), (0.01, 0.02, 0.02))],
    "Plate": [((0, 0, 0), (0.03, 0.023, 0.01))],
    "Hollowbox": open_box(0.022, 0.022, 0.025, 0.003),
}
COMPOSUITE_OBSTACLES = {       # y, parts; 8 cm high
    "None": None,
    "GoalWall": (0.09, [((0, 0, 0), (0.08, 0.01, 0.04))]),
    "ObjectDoor": (-0.05, [((s * 0.13, 0, 0), (0.05, 0.01, 0.04)) for s in (-1, 1)]),
    "ObjectWall": (-0.05, [((0, 0, 0), (0.08, 0.01, 0.04))]),
}
COMPOSUITE_GOALS = {           # z, parts, and the box of the object's centre: lowest, highest
    "PickPlace": (0.015, open_box(0.07, 0.07, 0.015, 0.003), (-0.06, -0.06, 0), (0.06, 0.06, 0.05)),
    "Push": (0, [((0, 0, 0), (0.05, 0.05, 0.001))], (-0.04, -0.04, 0), (0.04, 0.04, 0.03)),
    "Shelf": (0.06, [((0, 0, 0.055), (0.09, 0.07, 0.005)),
                     ((0.085, 0, 0.04), (0.005, 0.07, 0.1)),
                     ((-0.085, 0, 0), (0.005, 0.07, 0.05))],
              (-0.08, -0.06, 0.12), (0.07, 0.06, 0.16)),
    "Trashcan": (0.06, open_box(0.08, 0.08, 0.06, 0.003), (-0.07, -0.07, 0), (0.07, 0.07, 0.08)),
}
COMPOSUITE_FACTORS = (COMPOSUITE_ROBOTS, *map(tuple, (
    COMPOSUITE_OBJECTS, COMPOSUITE_OBSTACLES, COMPOSUITE_GOALS)))
COMPOSUITE_LANE = -0.05        # x of obstacle and goal
COMPOSUITE_START, COMPOSUITE_GOAL = -0.16, 0.2             # y


def make_composuite(name, render=False):
    """Composuite's task `name` ("Panda_Box_None_PickPlace": robot, object, obstacle, objective).

    Observation (93,) float32: object 14, obstacle 14 (zeros without one), goal 17, one-hots of the
    four factors 16, robot 32; see composuite_observation. Action (8,): 7 joints, gripper. Reward
    0..1 a step, see composuite_judge. 500 steps; success does not end it.
    """
    check_mujoco_gl(render)
    choice = name.split("_")
    if len(choice) != 4 or any(x not in among for x, among in zip(choice, COMPOSUITE_FACTORS)):
        near = difflib.get_close_matches(name, composuite_names(), n=3, cutoff=0.0)
        raise ValueError(f"no such task; nearest: {', '.join(near)}")
    robot, thing, obstacle, objective = choice
    one_hots = np.concatenate([np.array(among) == x
                               for x, among in zip(choice, COMPOSUITE_FACTORS)])
    height = max(centre[2] + size[-1] for centre, size in COMPOSUITE_OBJECTS[thing])
    z, parts, _, _ = COMPOSUITE_GOALS[objective]
    place = lambda y, z: np.array([COMPOSUITE_LANE, y, TABLE + z])
    things = {"object": (place(COMPOSUITE_START, height), COMPOSUITE_OBJECTS[thing], True),
              "goal": (place(COMPOSUITE_GOAL, z), parts, False)}
    if COMPOSUITE_OBSTACLES[obstacle]:
        y, parts = COMPOSUITE_OBSTACLES[obstacle]
        things["obstacle"] = (place(y, 0.04), parts, False)
    sim = tabletop_class()(robot, things)
    env = Robosuite(sim, partial(composuite_observation, one_hots=one_hots),
                    partial(composuite_judge, objective=objective), ends=False,
                    render_mode="rgb_array" if render else None)
    env.factors = choice
    return gym.wrappers.TimeLimit(env, COMPOSUITE_STEPS)


def composuite_names(keep=lambda robot, thing, obstacle, objective: True):
    """The names of the 256 tasks, or of those whose four factors `keep` accepts."""
    return tuple("_".join(c) for c in itertools.product(*COMPOSUITE_FACTORS) if keep(*c))


def composuite_observation(sim, _, one_hots):
    """object, obstacle, goal: each position 3 and quaternion (w, x, y, z) 4 in the world, then the
    same as the hand sees it; goal minus object 3 at the end of the goal. Robot: cosines and sines
    of its joints 7 + 7, their velocities 7, hand 3 + 4, fingers 2, their velocities 2.
    """
    import mujoco
    robot, data = sim.robots[0], sim.sim.data._data
    site = robot.eef_site_id["right"]
    position, turn = data.site_xpos[site], data.xquat[sim.sim.model._model.site_bodyid[site]]
    parts, back, seen, relative = [], np.zeros(4), np.zeros(3), np.zeros(4)
    mujoco.mju_negQuat(back, turn)
    for name in ("object", "obstacle", "goal"):
        if name not in sim.bodies:
            parts.append(np.zeros(14))
            continue
        body = data.body(sim.bodies[name].root_body)
        mujoco.mju_mulQuat(relative, back, body.xquat)
        mujoco.mju_rotVecQuat(seen, body.xpos - position, back)
        parts += [body.xpos, body.xquat, seen.copy(), relative.copy()]
    thing, goal = (data.body(sim.bodies[name].root_body) for name in ("object", "goal"))
    q, dq = robot._joint_positions, robot._joint_velocities
    fingers = [data.qpos[robot._ref_gripper_joint_pos_indexes["right"]],
               data.qvel[robot._ref_gripper_joint_vel_indexes["right"]]]
    parts += [goal.xpos - thing.xpos, one_hots, np.cos(q), np.sin(q), dq, position, turn, *fingers]
    return np.concatenate(parts).astype(np.float32)


def composuite_judge(sim, objective):
    """(reward, success) of the state: 1 for success (the object is in the box of its goal and,
    unless the task is to push it, let go of), else at most 0.2 for reaching it; 0.3 for holding it,
    up to 0.5 as it is lifted 10 cm (or is pushed), up to 0.9 on its way to the goal.
    """
    data = sim.sim.data._data
    hand = data.site_xpos[sim.robots[0].eef_site_id["right"]]
    thing = data.body(sim.bodies["object"].root_body).xpos
    gap = thing - (COMPOSUITE_LANE, COMPOSUITE_GOAL, TABLE)
    _, _, lowest, highest = COMPOSUITE_GOALS[objective]
    inside = (gap > lowest).all() and (gap < highest).all()
    held = sim._check_grasp(sim.robots[0].gripper, sim.bodies["object"])
    if inside and (objective == "Push" or not held):
        return 1.0, True
    if not held:
        return 0.2 * float(1 - np.tanh(10 * np.linalg.norm(hand - thing))), False
    lifted = 1.0 if objective == "Push" else np.clip((thing[2] - TABLE - 0.02) / 0.1, 0, 1)
    near = 1 - np.tanh(5 * np.linalg.norm(gap - (np.add(lowest, highest) / 2)))
    return float(0.3 + 0.2 * lifted + 0.4 * lifted * near), False


# task: class of robosuite, its options, steps; MimicGen's names, D1 being placed more widely
MIMICGEN_HELDOUT = ("UR5e_StackThree_D1", "IIWA_Square_D0")
MIMICGEN_ROBOTS = ("Panda", "Sawyer", "IIWA", "UR5e")
MIMICGEN_TASKS = {
    "Lift_D0": ("Lift", {}, 200),
    "Stack_D0": ("Stack", {}, 300),
    "Stack_D1": ("Stack", {}, 300),
    "StackThree_D0": ("StackThree", {}, 500),
    "StackThree_D1": ("StackThree", {}, 500),
    "Square_D0": ("NutAssemblySquare", {}, 400),
    "NutAssembly_D0": ("NutAssembly", {}, 800),
    "PickPlace_D0": ("PickPlace", {}, 1000),
} | {f"PickPlace{thing}_D0": ("PickPlace", {"single_object_mode": 2, "object_type": thing.lower()},
                              300) for thing in ("Can", "Milk", "Bread", "Cereal")}


def make_mimicgen(name, render=False):
    """Mimicgen's task `name` ("Panda_Stack_D0": robot, task), as far as robosuite carries them.

    Observation float32: hand's position 3 and quaternion 4, fingers 2 (Panda, Sawyer) or 6, then
    robosuite's own object-state. Action (7,): the hand's motion 3, its turn 3, gripper. Reward 1 at
    success, which terminates. Lift and the single groceries are robosuite's own, beside MimicGen's.
    Not included: Square_D1 and D2, whose peg moves, and what needs MimicGen's own meshes: Coffee,
    CoffeePreparation, MugCleanup, HammerCleanup, Kitchen, Threading and ThreePieceAssembly, so also
    the two that the paper holds out.
    """
    check_mujoco_gl(render)
    robot, _, task = name.partition("_")
    if robot not in MIMICGEN_ROBOTS or task not in MIMICGEN_TASKS:
        near = difflib.get_close_matches(name, mimicgen_names(), n=3, cutoff=0.0)
        raise ValueError(f"no such task; nearest: {', '.join(near)}")
    robosuite, _ = import_robosuite(), stack_three_class()
    kind, options, steps = MIMICGEN_TASKS[task]
    sim = robosuite.make(kind, robots=robot, control_freq=20, has_offscreen_renderer=False,
                         use_camera_obs=False, hard_reset=False, ignore_done=True, **options)
    if robot == "Sawyer":       # the first link jams on the base, on which it should turn
        base = sim.sim.model._model.geom("robot0_base_col")
        base.contype = base.conaffinity = 0
    if task.endswith("D1"):
        sim.placement_initializer.x_range = sim.placement_initializer.y_range = (-0.12, 0.12)
    keys = "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object-state"
    observe = lambda sim, seen: np.concatenate([seen[key] for key in keys]).astype(np.float32)

    def judge(sim):
        success = bool(sim._check_success())
        return float(success), success
    env = Robosuite(sim, observe, judge, ends=True, render_mode="rgb_array" if render else None)
    return gym.wrappers.TimeLimit(env, steps)


def mimicgen_names():
    """The names of all tasks of all robots."""
    return tuple(f"{robot}_{task}" for task in MIMICGEN_TASKS for robot in MIMICGEN_ROBOTS)


# --------------------------------------------------------------------------------- worlds of others
class GymWorld(gym.Wrapper):
    """A gymnasium environment in the contract of this file; ValueError where it does not fit.

    Observations: gray or RGB pictures (H, W), (H, W, 1 or 3) uint8 become (1, 64, 64); all else
    that gymnasium can flatten (Box, Discrete as one-hot, Dict, Tuple, ...) becomes a vector (S,)
    float32. Actions: Discrete(n) counts from 0; a bounded Box is stretched to Box(-1, 1, (A,)).
    """

    def __init__(self, env, name):
        super().__init__(env)
        self.name = name
        self.source, self.target = env.observation_space, env.action_space
        shape = self.source.shape or ()
        self.image = (self.source.dtype == np.uint8 and len(shape) in (2, 3)
                      and min(shape[:2]) > 8 and shape[2:] in ((), (1,), (3,)))
        if self.image:
            self.observation_space = gym.spaces.Box(0, 255, (1, 64, 64), np.uint8)
        else:
            size = _flat_size(self.source)
            if size is None or size > STATE_WIDTH:
                raise ValueError(f"observations are {_named(self.source)}; expected at most "
                                 f"{STATE_WIDTH} numbers, or pictures (H, W, 1 or 3) uint8")
            self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        if isinstance(self.target, gym.spaces.Discrete):
            if self.target.n > MAX_DISCRETE:
                raise ValueError(f"actions are {_named(self.target)}; expected at most "
                                 f"Discrete({MAX_DISCRETE})")
            self.action_space = gym.spaces.Discrete(int(self.target.n))
            return
        box = isinstance(self.target, gym.spaces.Box) and self.target.dtype.kind == "f"
        size = int(np.prod(self.target.shape)) if box else 0
        if not (0 < size <= MAX_DIMS and self.target.is_bounded()):
            raise ValueError(f"actions are {_named(self.target)}; expected Discrete(n), or Box of "
                             f"at most {MAX_DIMS} dimensions with finite low and high")
        self.action_space = gym.spaces.Box(-1.0, 1.0, (size,), np.float32)

    def _observe(self, obs):
        if not self.image:
            return gym.spaces.flatten(self.source, obs).astype(np.float32).reshape(-1)
        return to_frames(obs[None])[0]

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        return self._observe(obs), _known(info)

    def step(self, action):
        if isinstance(self.target, gym.spaces.Discrete):
            action = self.target.start + int(action)
        else:
            low, high = self.target.low, self.target.high
            stretch = (np.reshape(action, low.shape).astype(np.float64) + 1) / 2
            action = np.clip(low + stretch * (high - low), low, high).astype(self.target.dtype)
        obs, reward, terminated, truncated, info = self.env.step(action)
        return self._observe(obs), float(reward), bool(terminated), bool(truncated), _known(info)


def _flat_size(space):
    """Numbers of an observation once flattened, None where it cannot be."""
    try:
        return gym.spaces.flatdim(space) if space.is_np_flattenable else None
    except NotImplementedError:                 # a space of somebody's own, as MiniGrid's missions
        return None


def _known(info):
    """What rollout reads; all else may have any form, over which vectors of worlds trip."""
    return {key: info[key] for key in ("lives", "success") if key in info}


def _named(space):
    """A space in one line of a message."""
    shape = getattr(space, "shape", None)
    if isinstance(space, gym.spaces.Box):
        bounded = "" if space.is_bounded() else ", not bounded"
        return f"Box{shape} {space.dtype}{bounded}"
    return str(space) if len(str(space)) < 100 else type(space).__name__


def make_gym(name, render=False):
    """The environment that gymnasium knows as `name` ("CartPole-v1", "module:Env-v0"). GymWorld.

    Without a time limit of its own it is truncated after 1000 steps. gymnasium imports `module`, so
    that name is believed where the user typed it, and not where a card or a folder has it.
    """
    typed = {canonical(word.split("=")[-1]) for word in sys.argv[1:]}      # workers see it too
    if ":" in name and f"gym/{name}" not in typed:
        raise ValueError("a module is imported only if the command line names it; if you trust it, "
                         f"add {shlex.quote('gym:' + name)} to the --tasks of this command")
    try:
        # not every world has a render_mode: it is named only where pictures are asked for
        env = gym.make(name, disable_env_checker=True,
                       **({"render_mode": "rgb_array"} if render else {}))
    except (gym.error.Error, ImportError) as error:
        near = difflib.get_close_matches(name, gym.registry, n=3, cutoff=0.5)
        raise ValueError(f"{str(error).rstrip('.')}" + (f"; nearest: {', '.join(near)}" if near
                                                        else "")) from None
    try:
        world = GymWorld(env, name)
    except ValueError:
        env.close()
        raise
    return world if env.spec.max_episode_steps else gym.wrappers.TimeLimit(world, GYM_STEPS)


# -------------------------------------------------------------------------------------- task table
@dataclass(frozen=True)
class Domain:
    """One row: how to make tasks, what to install, how rewards are read, how scores are taken."""
    make: Callable                      # (task name, render) -> gymnasium.Env
    package: str                        # what `import` needs: one of these names
    install: str                        # what pip needs
    tasks: tuple                        # the paper's training split
    heldout: tuple = ()                 # and what it holds out; other tasks can be named too
    # rewards and returns-to-go are divided by it (the paper's values); None: by a fifth of the
    # largest return in the data
    reward_scale: float | None = 1.0
    # the same for data that we make, where the paper's would not do: LayerNorm(w R + b) tells
    # returns of 1 to 5 apart and hardly those of 40 and 80, so that is where targets should be
    made_scale: float | None = None
    clip_rewards: bool = False  # the model sees rewards clipped to [-1, 1]; scores use raw ones
    # a return-to-go that never falls, where the true one names the goal
    constant_rtg: float | None = None
    episodes: int = 20                  # per task, for a score
    steps: int = 200                    # of a typical episode, for progress bars


_ATARI = """amidar assault asterix atlantis bank_heist battle_zone beam_rider boxing breakout
    carnival centipede chopper_command crazy_climber demon_attack double_dunk enduro fishing_derby
    freeway frostbite gopher gravitar hero ice_hockey jamesbond kangaroo krull kung_fu_master
    name_this_game phoenix pooyan qbert riverraid road_runner robotank seaquest time_pilot up_n_down
    video_pinball wizard_of_wor yars_revenge zaxxon"""
_METAWORLD = """assembly basketball button-press-topdown-wall button-press-topdown button-press-wall
    button-press coffee-button coffee-pull coffee-push dial-turn disassemble door-close door-open
    drawer-close drawer-open faucet-close faucet-open hammer handle-press-side handle-press
    handle-pull-side handle-pull lever-pull peg-insert-side peg-unplug-side pick-out-of-hole
    pick-place-wall pick-place plate-slide-back-side plate-slide-back plate-slide-side plate-slide
    push-back push-wall push reach-wall reach shelf-place soccer stick-pull stick-push sweep-into
    sweep window-close window-open"""

# The tasks and the split are the paper's (appendix B); names are today's.
DOMAINS = {
    "darkroom": Domain(make_darkroom, "gymnasium", "gymnasium", ("train",), ("heldout",),
                       made_scale=20.0, constant_rtg=80.0, episodes=80, steps=100),
    "metaworld": Domain(
        make_metaworld, "metaworld", "metaworld==3.1.1 packaging",
        tuple(f"{name}-v3" for name in _METAWORLD.split()),
        ("bin-picking-v3", "box-close-v3", "door-lock-v3", "door-unlock-v3", "hand-insert-v3"),
        reward_scale=200.0, made_scale=400.0),
    "dmcontrol": Domain(
        make_dmcontrol, "dm_control", "dm-control==1.0.28 (Python to 3.12)",
        ("ball_in_cup-catch", "cartpole-swingup", "cheetah-run", "finger-spin", "finger-turn_easy",
         "fish-upright", "hopper-stand", "point_mass-easy", "reacher-easy", "walker-run",
         "walker-stand"),
        ("cartpole-balance", "finger-turn_hard", "pendulum-swingup", "reacher-hard", "walker-walk"),
        reward_scale=100.0, made_scale=200.0, steps=1000),
    "atari": Domain(
        make_atari, "ale_py", "ale-py==0.12.1", tuple(_ATARI.split()),
        ("alien", "ms_pacman", "pong", "space_invaders", "star_gunner"),
        reward_scale=20.0, clip_rewards=True, episodes=8, steps=2000),
    "procgen": Domain(
        make_procgen, "procgen procgen_gym",
        "procgen-mirror==0.10.7 (Linux, Python to 3.11) or procgen-gym==0.1.1 (from 3.13)",
        ("bigfish", "bossfight", "caveflyer", "chaser", "coinrun", "dodgeball", "fruitbot", "heist",
         "leaper", "maze", "miner", "starpilot"),
        ("climber", "jumper", "ninja", "plunder"), made_scale=10.0, steps=300),
    "composuite": Domain(
        make_composuite, "robosuite", "robosuite==1.5.2; on Linux it needs gcc",
        composuite_names(lambda *c: (c[0], c[2]) != ("Panda", "ObjectWall")),
        composuite_names(lambda *c: (c[0], c[2]) == ("Panda", "ObjectWall")),
        made_scale=100.0, episodes=5, steps=500),
    # what the paper holds out cannot be built here: these two are our choice
    "mimicgen": Domain(
        make_mimicgen, "robosuite", "robosuite==1.5.2; on Linux it needs gcc",
        tuple(name for name in mimicgen_names() if name not in MIMICGEN_HELDOUT),
        MIMICGEN_HELDOUT, episodes=10),
    "gym": Domain(make_gym, "gymnasium", "gymnasium", (), reward_scale=None),
}


def all_tasks():
    """The table as names "domain/task"."""
    return [
        f"{name}/{task}"
        for name, domain in DOMAINS.items()
        for task in domain.tasks + domain.heldout
    ]


# a taste of every domain whose data are made in a quarter of an hour on a laptop
LAPTOP = """darkroom/train metaworld/reach-v3 metaworld/door-open-v3 metaworld/drawer-close-v3
    metaworld/button-press-topdown-v3 metaworld/window-open-v3 dmcontrol/cartpole-balance
    dmcontrol/cartpole-swingup dmcontrol/pendulum-swingup atari/freeway procgen/maze
    procgen/heist composuite/IIWA_Box_None_PickPlace composuite/Panda_Plate_None_Push
    composuite/Kinova3_Dumbbell_None_Trashcan mimicgen/Panda_Lift_D0 mimicgen/UR5e_Lift_D0
    mimicgen/Sawyer_Stack_D0"""


def canonical(task):
    """The one name of a task, which is also its folder: "gym:CartPole-v1" is "gym/CartPole-v1"."""
    return task.replace(":", "/", 1) if task.startswith("gym:") else task


def domain_of(task):
    """What a task is batched and averaged with; each world of gymnasium stands on its own."""
    return task if task.startswith("gym/") else task.split("/")[0]


def expand_tasks(names, heldout=False, root=None):
    """Names of tasks and of whole domains -> tasks; a domain stands for its training split, or with
    heldout=True for its held-out one, and "laptop" for LAPTOP. A folder below root is a task
    whatever its name.
    """
    tasks = []
    for name in map(canonical, names):
        if name == "laptop":
            tasks += LAPTOP.split()
        elif name in DOMAINS and DOMAINS[name].tasks:
            part = DOMAINS[name].heldout if heldout else DOMAINS[name].tasks
            tasks += [f"{name}/{task}" for task in part]
        else:
            if not (root and "/" in name and (Path(root) / name).is_dir()):
                split_task(name)                # refuses what does not exist
            tasks.append(name)
    return tuple(dict.fromkeys(tasks))


def split_task(task):
    """ "metaworld/reach-v3" -> (Domain, "reach-v3"); SystemExit names the nearest that exists."""
    domain, _, name = canonical(task).partition("/")
    if domain in DOMAINS and name:
        return DOMAINS[domain], name
    near = difflib.get_close_matches(task, all_tasks(), n=3, cutoff=0.3)
    raise SystemExit(
        f"task {task!r} does not exist; tasks are named domain/task, a domain alone "
        f"({', '.join(name for name in DOMAINS if DOMAINS[name].tasks)}) is all of it, and gym:ID "
        "is a world of gymnasium's"
        + (f"; nearest: {', '.join(near)}" if near else "")
        + ". See: python eval.py --list"
    )


def unavailable(task):
    """None if the task's world can be made here, else why not: what is missing, what installs it.

    A simulator counts that makes a world: it may be installed, and want a library of the system's.
    """
    name = canonical(task).split("/")[0]
    if name not in DOMAINS:                              # converted data: to train on alone
        return "eval.py has no world for this domain"
    split_task(task)
    return _missing_package(name) or _broken(name)


def _missing_package(name):
    domain = DOMAINS[name]
    if any(importlib.util.find_spec(package) for package in domain.package.split()):
        return None
    return f"its simulator is not installed (pip install {domain.install})"


@functools.cache
def _broken(name):
    domain = DOMAINS[name]
    try:
        for task in domain.tasks[:1]:
            domain.make(task).close()
    except (ImportError, OSError, RuntimeError, SystemExit) as error:
        return f"its simulator does not start: {str(error).splitlines()[0]}"


def make_env(task, render=False, limit=None):
    """The environment of "domain/task", cut at `limit` steps if given; SystemExit says what to do
    where there is none.
    """
    domain, name = split_task(task)
    missing = _missing_package(canonical(task).split("/")[0])
    if missing:
        raise SystemExit(f"{task} cannot be made: {missing}")
    try:
        env = domain.make(name, render)
    except ValueError as error:
        raise SystemExit(f"{task}: {error}") from None
    return gym.wrappers.TimeLimit(env, limit) if limit else env


def world_spec(task):
    """{"observation", "action"} of a task's world as in a card; None where there is no such world.

    observation: {"kind": "image" or "vector", "shape"}; action: {"kind": "discrete", "n"} or
    {"kind": "continuous", "dims"}.
    """
    try:
        env = make_env(task)
    except SystemExit:
        return None
    obs, action = env.observation_space, env.action_space
    env.close()
    return {"observation": {"kind": "image" if obs.dtype == np.uint8 else "vector",
                            "shape": list(obs.shape)},
            "action": {"kind": "discrete", "n": int(action.n)}
            if isinstance(action, gym.spaces.Discrete)
            else {"kind": "continuous", "dims": int(action.shape[0])}}


def cannot_play(task, card):
    """Why a policy trained on data with this card cannot be scored on the task here, or None."""
    missing = unavailable(task)
    if missing:
        return missing
    source = card.get("source")
    if "made_by" in card and not source:                # made in this very world
        return None
    # robomimic's own demonstrations are of robosuite's own tasks
    if task.split("/")[0] in ("composuite", "mimicgen") and (
            not isinstance(source, dict) or source.get("format") != "robomimic"):
        return "its data are of the original simulator, and the world here is rebuilt"
    world = world_spec(task)
    if world is None:
        return "eval.py does not have this task"
    for key in ("observation", "action"):
        if world[key] != card[key]:
            return f"its {key}s are {card[key]} in the data, {world[key]} in the simulator"
    return None


# ------------------------------------------------------------------------------------ rollout loop
@dataclass
class Episode:
    """One finished episode of T steps: what the policy saw, asked for and got."""
    seed: int
    states: np.ndarray          # (T, ...) before each action
    actions: np.ndarray         # (T,) int or (T, A) float32, as the policy asked
    executed: np.ndarray        # the same as the world received them (data.NoisyActions)
    rewards: np.ndarray         # (T,) float32, raw
    lives: np.ndarray           # (T,) int after each step, 0 where the world has none
    success: bool               # info["success"] at any step
    terminated: bool


def rollout(make, make_policy, seeds, num_envs=8, keep_states=True, advance=lambda steps: None):
    """Play one episode per seed, num_envs at a time in lockstep; yields each Episode as it ends.

    make() -> gymnasium.Env. make_policy(envs) -> act(obs, reward, done, lost_life) -> actions, all
    with a leading batch axis: reward is that of the step before, done marks the rows whose episode
    has just begun, lost_life those in which info["lives"] fell in the step before. The one loop for
    experts, random policies and trained agents. advance(steps) is called for progress.
    """
    n, queue = min(num_envs, len(seeds)), list(seeds)
    envs = SyncVectorEnv([make] * n, autoreset_mode=AutoresetMode.DISABLED)
    try:
        act = make_policy(envs)
        row_seeds, queue = queue[:n], queue[n:]
        obs, info = envs.reset(seed=row_seeds)
        reward, lives = np.zeros(n), np.zeros(n, int)
        done, lost = np.ones(n, bool), np.zeros(n, bool)
        active, logs = np.ones(n, bool), [[] for _ in range(n)]
        while active.any():
            action = act(obs, reward, done, lost)
            next_obs, reward, terminated, truncated, info = envs.step(action)
            executed = info.get("executed", action)
            before, lives = lives, info.get("lives", np.zeros(n, int))
            lost = ~done & (lives < before)     # done: rows whose first step this was
            success = info.get("success", np.zeros(n))
            for row in np.flatnonzero(active):
                state = np.array(obs[row]) if keep_states else None
                logs[row].append(
                    (state, np.array(action[row]), np.array(executed[row]), reward[row],
                     lives[row], success[row])
                )
            advance(int(active.sum()))
            obs, done = next_obs, terminated | truncated
            for row in np.flatnonzero(done & active):
                yield _episode(row_seeds[row], logs[row], bool(terminated[row]), keep_states)
                logs[row] = []
                # on with the next seed; with none left the row idles until the others are done
                active[row] = bool(queue)
                row_seeds[row] = queue.pop(0) if queue else row_seeds[row]
            if done.any() and active.any():
                obs, _ = envs.reset(seed=row_seeds, options={"reset_mask": done})
    finally:
        envs.close()


def _episode(seed, log, terminated, keep_states):
    states, actions, executed, rewards, lives, success = zip(*log)
    return Episode(
        seed,
        np.stack(states) if keep_states else None,
        np.stack(actions),
        np.stack(executed),
        np.array(rewards, np.float32),
        np.array(lives, np.int64),
        any(success),
        terminated,
    )


def random_policy(envs, seed=0):
    """Uniform actions."""
    space, rng = envs.single_action_space, np.random.default_rng(seed)
    if isinstance(space, gym.spaces.Discrete):
        return lambda obs, *_: rng.integers(space.n, size=len(obs))
    return lambda obs, *_: rng.uniform(-1, 1, (len(obs), *space.shape)).astype(np.float32)


def constant_policy(envs, action):
    """The same action always: what a policy that ignores the picture can reach."""
    return lambda obs, *_: np.full(len(obs), action)


def agent_policy(envs, agent):
    """A trained lram.Agent."""
    agent.begin(envs.num_envs)
    return agent.act


# -------------------------------------------------------------------------------- reference scores
# What the paper's scores are measured against, one row per task: name, return of the random policy,
# reference, target return ("-": not known). Where the reference is the maximum of the public data,
# it is the target too (theirs differ by less than 0.001) and "random" is the minimum, as in
# Procgen. The numbers are those of github.com/ml-jku/LRAM (MIT licence), commit a984cdf,
# src/envs/{dn_scores,hn_scores,target_returns}.py; Atari's random and human columns come from
# github.com/deepmind/dqn_zoo, atari_data.py (Apache-2.0). See LICENSE.
_METAWORLD_SCORES = """\
    reach 147.103 1905.1068, push 2.0408 1791.2244, pick-place 0.3011 1300.6919,
    door-open 83.5917 1608.8119, drawer-open 179.8318 1762.8101, drawer-close 0 1880,
    button-press-topdown 35.1767 1384.7, peg-insert-side 0.6391 1695.9866,
    window-open 40.516 1717.4207, window-close 30.2317 1559.3096, door-close 5.4191 1587.8,
    reach-wall 141.9194 1863.1053, pick-place-wall 0 1654.6439, push-wall 2.0338 1746.7048,
    button-press 46.4804 1604.5227, button-press-topdown-wall 35.1767 1388.5978,
    button-press-wall 8.2484 1614.5718, peg-unplug-side 1.6908 1619.8203, disassemble 0 1536.4565,
    hammer 31.6972 1724.8417, plate-slide 73.5299 1713.0806, plate-slide-side 13.2441 1748.3042,
    plate-slide-back 29.671 1806.1564, plate-slide-back-side 25.7285 1833.703,
    handle-press 9.0016 1929.8344, handle-pull 2.7437 1759.0701, handle-press-side 22.6648 1897.76,
    handle-pull-side 0.9445 1710.8367, stick-push 1.0867 1629.2634, stick-pull 0.6954 1551.3679,
    basketball 0.2175 1597.0182, soccer 0.7333 1706.2247, faucet-open 327.8281 1783.7488,
    faucet-close 410.239 1798.5878, coffee-push 2.2135 1694.6849, coffee-pull 4.6319 1475.0729,
    coffee-button 40.8464 1698.3198, sweep 2.8682 1560.8198, sweep-into 4.0911 1815.943,
    pick-out-of-hole 0.7432 1588.1172, assembly 15.0363 1285.642, shelf-place 0 1513.3306,
    push-back 0.442 1564.7234, lever-pull 33.9352 1677.197, dial-turn 0.0004 1887.3281,
    bin-picking 1.7012 1308.5978, box-close 0 1127.9011, hand-insert 0.6889 1789.0469,
    door-lock 177.2109 1831.5374, door-unlock 123.2161 1794.7216"""
_DMCONTROL_SCORES = """\
    acrobot-swingup 8.351 4.877 158.764, ball_in_cup-catch 0 926.719 1000,
    cartpole-balance 350.391 938.506 993.194, cartpole-swingup 27.414 766.15 857.492,
    cheetah-run 3.207 324.045 451.274, finger-spin 0.2 834.629 987,
    finger-turn_easy 57.8 800.645 1000, finger-turn_hard 40.6 676.144 1000,
    fish-swim 67.675 78.212 794.356, fish-upright 229.406 547.962 999.433,
    hopper-hop 0.076 62.794 116.777, hopper-stand 1.296 266.783 975.575,
    humanoid-run 0.741 0.794 2.567, humanoid-stand 4.327 5.053 17.218,
    humanoid-walk 0.913 1.194 12.589, manipulator-bring_ball 0 0.429 19.022,
    manipulator-insert_ball 0 43.307 1000, manipulator-insert_peg 0.235 78.477 1000,
    pendulum-swingup 0 614.491 1000, point_mass-easy 1.341 779.273 998.373,
    reacher-easy 33 849.241 1000, reacher-hard 8 779.947 1000,
    swimmer-swimmer15 78.817 152.297 1000, swimmer-swimmer6 229.834 167.082 1000,
    walker-run 23.427 344.794 513.464, walker-stand 134.701 816.322 999.82,
    walker-walk 30.193 773.174 982.159"""
_PROCGEN_SCORES = """\
    bigfish 0 5.9107 40, bossfight 0 2.179 15, caveflyer 0 7.6341 13, chaser 0 3.4349 13.3128,
    climber 0 9.1516 16, coinrun 0 9.6781 10, dodgeball 0 3.1873 20, fruitbot -7 16.9643 38,
    heist 0 7.9555 10, jumper 0 8.7396 10, leaper 0 4.9065 10, maze 0 9.4536 10,
    miner 0 11.6814 13, ninja 0 7.7674 10, plunder 0 4.9095 18, starpilot 0 17.3367 67"""
_ATARI_SCORES = """\
    alien 227.8 7127.7 218, amidar 5.8 1719.5 204, assault 222.4 742 160, asterix 210 8503.3 104,
    asteroids 719.1 47388.7 -, atlantis 12850 29028.1 1444, bank_heist 14.2 753.1 86,
    battle_zone 2360 37187.5 32, beam_rider 363.9 16926.5 152, berzerk 123.7 2630.4 -,
    bowling 23.1 160.7 -, boxing 0.1 12.1 88, breakout 1.7 30.5 95, carnival - - 45,
    centipede 2090.9 12017 137, chopper_command 811 7387.8 70, crazy_climber 10780.5 35829.4 735,
    defender 2874.5 18688.9 -, demon_attack 152.1 1971 231, double_dunk -18.6 -16.4 14,
    enduro 0 860.5 1091, fishing_derby -91.7 -38.7 53, freeway 0 29.6 34, frostbite 65.2 4334.7 71,
    gopher 257.6 2412.5 627, gravitar 173 3351.4 6, hero 1027 30826.4 201, ice_hockey -11.2 0.9 2,
    jamesbond 29 302.8 17, kangaroo 52 3035 74, krull 1598 2665.5 741,
    kung_fu_master 258.5 22736.3 275, montezuma_revenge 0 4753.3 -, ms_pacman 307.3 6951.6 403,
    name_this_game 2292.3 8049 640, phoenix 761.4 7242.6 67, pitfall -229.4 6463.7 -,
    pong -20.7 14.6 21, pooyan - - 427, private_eye 24.9 69571.3 -, qbert 163.9 13455 588,
    riverraid 1338.5 17118 250, road_runner 11.5 7845 217, robotank 2.2 11.9 73,
    seaquest 68.4 42054.7 315, skiing -17098.1 -4336.9 -, solaris 1236.3 12326.7 -,
    space_invaders 148 1668.7 318, star_gunner 664 10250 261, surround -10 6.5 -,
    tennis -23.8 -8.3 -, time_pilot 3568 5229.2 24, tutankham 11.4 167.6 -,
    up_n_down 533.4 11693.2 246, venture 0 1187.5 -, video_pinball 16256.9 17667.9 1078,
    wizard_of_wor 563.5 4756.5 46, yars_revenge 3092.9 54576.9 207, zaxxon 32.5 9173.3 30"""
# random and reference, ordered as composuite_names(): robots, objects, obstacles, objectives
_COMPOSUITE_SCORES = """\
    34.2943 422.6896 38.436 423.2112 22.2564 392.7056 19.4895 414.214 9.1711 417.9734
    32.7633 372.0507 31.2831 388.9835 10.9236 411.6396 43.9642 392.528 41.9162 387.2439
    12.3437 355.1942 10.077 377.3615 12.1884 407.7422 40.764 402.1152 10.3803 369.3631
    8.8909 394.6256 19.8469 408.9983 31.3429 403.705 17.9913 360.1213 31.5699 389.3736
    13.7382 398.5261 17.2815 358.6089 13.7079 358.069 31.6533 384.8889 6.4959 375.7194
    42.0848 372.8149 44.5049 332.6358 32.2144 358.2904 10.683 391.7573 9.4897 389.1574
    44.0715 341.2852 31.0994 365.8652 16.1579 414.3734 8.5393 407.4024 17.6037 374.8415
    5.6109 397.7719 17.8362 408.5447 10.9814 376.582 12.235 372.4099 11.8227 400.2317
    6.6643 381.6441 11.5567 373.6541 5.4965 349.4955 11.1007 366.6993 12.6105 396.0394
    12.883 395.6757 11.4958 351.4135 16.4352 379.8558 14.9898 422.507 19.8047 420.6052
    17.2876 403.8859 15.6829 413.8112 6.3764 419.541 17.0836 378.3529 19.8792 403.9416
    10.0154 403.7551 12.4441 386.7481 24.2423 381.1122 16.4937 343.6018 13.0273 369.7449
    7.4666 406.4884 37.1698 400.5991 22.6392 364.1277 13.383 390.5933 10.6097 380.3599
    34.9191 386.1124 13.5463 348.9094 11.1733 377.2025 10.4602 372.9176 22.5953 321.1584
    28.1746 348.0137 11.7735 369.816 2.0693 366.4434 39.5665 361.8412 29.5737 330.9081
    10.2635 348.2585 8.8292 371.855 35.5941 369.6819 8.4777 330.0855 24.9974 350.9608
    56.2307 355.6125 26.4615 356.8932 49.8153 325.7801 30.3643 341.4949 107.952 348.9397
    15.047 295.2301 58.5558 322.3699 29.7935 339.696 21.2415 348.8272 10.2356 340.2007
    39.8351 304.0632 24.3902 325.079 11.0959 347.2706 14.5793 337.6736 54.9856 296.5891
    30.5 325.5367 17.8849 366.7162 9.8736 367.8203 11.0834 342.9441 12.4709 362.5799
    20.4602 358.3443 12.5549 327.3481 14.4472 334.1012 18.3085 347.8802 19.644 353.0497
    13.168 341.8283 13.0975 323.689 7.292 337.2096 10.4849 355.2842 15.6346 348.5868
    8.7829 319.127 8.051 334.6109 28.6506 378.2476 16.4941 381.7607 15.0291 346.1891
    11.1675 362.976 13.9411 362.3539 16.6002 322.2183 7.6225 339.0533 29.6536 355.6227
    11.9709 356.0208 18.5165 353.3318 11.1222 318.0287 17.7145 337.9608 8.5119 363.9757
    19.5258 360.565 9.6975 321.8891 9.2933 342.2538 38.4416 425.4009 30.0559 428.0315
    18.2475 389.364 6.9692 415.2254 17.8266 415.1603 24.6329 373.9586 13.6893 385.2776
    8.3963 409.4071 14.6282 408.9602 7.399 396.5578 13.3729 366.5801 10.883 389.944
    8.3143 413.1352 1.2927 405.5613 7.9664 366.0194 7.6667 395.7307 48.5357 401.8801
    20.8669 405.8568 37.2735 363.8753 42.9124 390.6068 19.3837 393.442 13.1288 355.5746
    28.4337 355.2201 32.6547 386.5341 14.0273 383.0844 36.5199 383.6134 7.4872 339.1107
    38.2474 372.15 11.0238 388.9163 19.5603 386.0225 8.6434 336.2771 18.9259 373.2451
    20.5777 411.8783 32.003 407.4045 19.3038 376.0602 7.4133 395.1252 23.7958 406.7204
    15.4011 369.438 12.0883 373.31 6.1659 399.722 10.8501 396.2977 8.7078 393.791 17.9693 363.9405
    5.8734 378.2037 6.8484 398.0574 26.0772 394.4429 13.871 370.975 13.1361 382.8602
    12.4409 422.8646 20.102 418.2462 7.7897 404.0659 12.2294 415.3324 22.4748 413.5353
    18.8628 369.8759 20.8917 404.2996 10.6612 396.6298 10.6141 396.7687 4.3734 398.4861
    5.5156 350.2031 12.6474 379.065 17.7919 402.5087 27.6849 397.4564 30.8403 375.4196
    8.393 379.6972 10.1489 402.7562 35.4139 397.4014 12.817 357.7363 18.9648 392.7072
    11.3912 391.9168 34.7895 300.7138 32.9995 352.3642 14.9617 392.5051 17.2628 329.0957
    8.7999 328.241 11.8494 300.808 9.1216 315.0218 1.4694 338.1854 25.8325 330.4575
    30.8648 297.7375 12.8595 323.1698 31.5137 373.9502 21.1857 373.3488 50.2999 329.6797
    17.7564 372.779 22.6342 360.2449 19.7563 265.7354 25.9432 324.7186 22.7508 357.7439
    21.0527 303.0532 17.5614 309.5276 26.4273 283.3508 22.4707 284.3753 28.006 313.7836
    19.7928 320.4766 20.7777 280.836 19.4364 294.1954 19.51 380.8439 23.2818 385.475
    11.7839 341.5723 12.8828 367.6216 14.482 377.3351 9.685 348.3908 10.0223 340.3288
    13.4391 367.3199 17.262 314.5126 19.2525 307.8281 8.1509 312.9323 12.1427 293.2389
    14.8556 318.9778 11.0653 321.3536 16.4306 277.7495 11.0588 303.8733 10.6354 397.2718
    21.0601 399.9587 15.2793 349.8202 7.6515 382.1819 12.6573 389.1634 9.8277 360.0789
    21.3369 348.1734 10.0555 378.0457 6.6202 329.384 24.7741 322.4837 18.2482 312.36
    13.6362 308.0545 8.4047 345.2379 18.8042 330.8746 7.3328 289.9606 12.1934 331.1017"""
# 0 and 1 for all; I, S, U: also on IIWA, Sawyer and UR5e (only Sawyer's have a reference)
_MIMICGEN_TASKS = """\
    CoffeePreparation_D0, CoffeePreparation_D1, Coffee_D0 ISU, Coffee_D1 ISU, Coffee_D2 IU,
    HammerCleanup_D0 ISU, HammerCleanup_D1 ISU, Kitchen_D0 IU, Kitchen_D1 U, MugCleanup_D0 I,
    MugCleanup_D1 IU, NutAssembly_D0 ISU, PickPlace_D0 ISU, Square_D0 ISU, Square_D1 ISU,
    Square_D2, StackThree_D0 ISU, StackThree_D1 ISU, Stack_D0 ISU, Stack_D1 ISU, Threading_D0 ISU,
    Threading_D1 ISU, ThreePieceAssembly_D0 ISU, ThreePieceAssembly_D1 ISU, Threading_D2,
    ThreePieceAssembly_D2 ISU"""

_REFERENCES = {     # domain: (rows, suffix of today's names, kind of reference)
    "metaworld": (_METAWORLD_SCORES, "-v3", "data maximum"),      # measured on v2
    "dmcontrol": (_DMCONTROL_SCORES, "", "data mean"),
    "procgen": (_PROCGEN_SCORES, "", "data mean"),
    "atari": (_ATARI_SCORES, "", "human"),
}


@functools.cache
def reference_table():
    """The tables above as one: {task: (random, reference, target return, kind)}."""
    number = lambda text: None if text == "-" else float(text)
    table = {}
    for domain, (rows, suffix, kind) in _REFERENCES.items():
        for row in rows.split(","):
            name, random, reference, *target = row.split()
            table[f"{domain}/{name}{suffix}"] = (number(random), number(reference),
                                                 number(*target or [reference]), kind)
    numbers = iter(map(float, _COMPOSUITE_SCORES.split()))
    for name in composuite_names():
        random, reference = next(numbers), next(numbers)
        table[f"composuite/{name}"] = random, reference, reference, "data maximum"
    for row in _MIMICGEN_TASKS.split(","):
        name, *robots = row.split()
        table[f"mimicgen/Panda_{name}"] = 0.0, 1.0, 1.0, "data maximum"
        for robot in ("IIWA", "Sawyer", "UR5e"):
            if robots and robot[0] in robots[0]:
                ends = (0.0, 1.0) if robot == "Sawyer" else (None, None)
                table[f"mimicgen/{robot}_{name}"] = *ends, 1.0, "data maximum"
    return table


def reference_scores(task):
    """The paper's numbers for "domain/task": (random, reference, target return, kind), or None.

    kind: "human", "data maximum" or "data mean". Numbers may be None: carnival, pooyan and Mimicgen
    on IIWA and UR5e have a target but no reference, and some games a reference but no target.
    Targets of Atari count clipped rewards.
    """
    return reference_table().get(task)


# ------------------------------------------------------------------------------------------ scores
def anchors(task, card, by="data"):
    """The returns that score 0 and 1: (random, reference, reason); reason says why there is none.

    by: "data" takes the card's (here: the random policy and the mean of the expert), "public" the
    paper's table (see reference_scores), "human" the table for Atari and the card for the others.
    Public data of clipped rewards do not say what a game's points are: they go by the table.
    """
    random, reference = card.get("random_score"), card.get("reference_score")
    clipped = card.get("clip_rewards") and "source" in card
    if by == "public" or by == "human" and task.startswith("atari/") or clipped:
        random, reference, *_ = reference_scores(task) or (None, None)
        if card.get("limit"):
            return random, reference, (f"cut at {card['limit']} steps, the reference is of whole "
                                       "episodes")
    if random is None or reference is None:
        return random, reference, "no reference"
    if not reference > random:
        return random, reference, f"reference {reference:.4g} not above random {random:.4g}"
    return random, reference, None


def normalise(returns, random, reference):
    """Raw returns -> score: 0 the random policy, 1 the reference."""
    return (np.asarray(returns, np.float64) - random) / (reference - random)


@dataclass
class Played:
    """A task's returns, and those that its scores are measured against (one number: exact)."""
    returns: np.ndarray         # (n,)
    random: np.ndarray          # of the random policy
    reference: np.ndarray       # of the expert
    paired: bool = False        # reference k was played in the world of episode k: (n,)

    def scores(self):
        """(n,): 0 the random policy, 1 the reference."""
        return normalise(self.returns, self.random.mean(), self.reference.mean())

    def redraw(self, rng, times):
        """Bootstrap samples of the scores, (times, n): all three are redrawn."""
        row = rng.integers(len(self.returns), size=(times, len(self.returns)))
        low = rng.choice(self.random, (times, len(self.random))).mean(1, keepdims=True)
        high = self.reference[row] if self.paired else \
            rng.choice(self.reference, (times, len(self.reference)))
        high = high.mean(1, keepdims=True)
        # a sample whose reference is not above random has no scale
        return normalise(self.returns[row], low, np.where(high > low, high, np.nan))


def bootstrap_interval(groups, statistic, draws=2000, seed=0):
    """95 % interval of statistic(groups), each of the groups redrawn within itself (stratified).

    groups: arrays, or Played, of which the scores are redrawn. statistic: arrays (..., episodes) ->
    (...); it is given 100 draws at a time, (100, episodes).
    """
    rng = np.random.default_rng(seed)
    redraw = lambda g: g.redraw(rng, 100) if isinstance(g, Played) else \
        rng.choice(g, (100, len(g)))
    values = [statistic([redraw(g) for g in groups]) for _ in range(draws // 100)]
    return [float(x) for x in np.nanpercentile(values, [2.5, 97.5])]


def mean_over_domains(groups, domains):
    """Scores of tasks, arrays (..., episodes) -> mean over episodes, then tasks, then domains."""
    by_domain = {}
    for scores, domain in zip(groups, domains):
        by_domain.setdefault(domain, []).append(scores.mean(-1))
    return np.mean([np.mean(tasks, axis=0) for tasks in by_domain.values()], axis=0)


def interquartile_mean(groups):
    """Mean of the middle half of all episodes: robust against single disasters and records."""
    x = np.sort(np.concatenate(groups, axis=-1))
    cut = x.shape[-1] // 4
    return x[..., cut:x.shape[-1] - cut].mean(-1)


def summarise(results, by="data"):
    """{task: result} of play() -> the content of scores.json: by task, by domain, overall.

    by: see anchors. A task without anchors stands with its raw return, `score` None and the reason
    in `unscored`; like the failed ones (`failed`: {task: reason}) it is in no mean. "domains",
    "mean_over_domains", "interval" and "interquartile_mean" are of the tasks trained on, those of
    the held-out ones stand apart in "heldout".
    """
    failed = {task: r["failed"] for task, r in results.items() if "failed" in r}
    tasks, groups = {}, {}
    for task, result in results.items():
        if task not in failed:
            tasks[task], groups[task] = _task_row(task, result, by)
    summary = {"tasks": tasks, "normalised_by": by, "failed": failed}
    chosen = lambda heldout: {t: g for t, g in groups.items()
                              if g is not None and tasks[t]["heldout"] == heldout}
    summary.update(_means(chosen(False)))
    if chosen(True):
        summary["heldout"] = _means(chosen(True))
    return summary


def _task_row(task, result, by):
    """One task's row of scores.json and its Played, None where there is nothing to scale by."""
    card, returns = result["card"], np.asarray(result["returns"], np.float64)
    paired = domain_of(task) == "darkroom" and "reference_returns" in card and "seeds" in result
    if paired:      # few goals: the expert's returns on those that were played, see DarkRoom.reset
        each = card["reference_returns"]
        each = [each[seed % len(each)] for seed in result["seeds"]]
        card = {**card, "reference_returns": each, "reference_score": float(np.mean(each))}
    random, reference, reason = anchors(task, card, by)
    behind = [np.array(card.get(f"{who}_returns") or [mean]) if mean == card.get(f"{who}_score")
              else np.array([mean]) for who, mean in (("random", random), ("reference", reference))]
    low, high = bootstrap_interval([returns], lambda g: g[0].mean(-1))
    row = {
        "score": None, "interval": None, "episodes": len(returns),
        "mean_return": float(returns.mean()), "return_interval": [low, high],
        "success": result.get("success"), "random_return": random, "reference_return": reference,
        "exact": [who for who, x in zip(("random", "reference"), behind) if len(x) == 1],
        "above_random": None if random is None else bootstrap_interval(
            [returns, behind[0]], lambda g: g[0].mean(-1) - g[1].mean(-1))[0] > 0,
        "heldout": card["heldout"], "target_return": card["target_return"],
        "best_constant_action": card.get("constant"),
    }
    if reason:
        return {**row, "unscored": reason}, None
    played = Played(returns, *behind, paired)
    row["score"] = float(played.scores().mean())
    row["interval"] = bootstrap_interval([played], lambda g: g[0].mean(-1))
    if card.get("constant"):            # what a policy that ignores the observation can reach
        row["constant_score"] = float(normalise(card["constant"]["mean_return"], random, reference))
    return row, played


def _means(groups):
    """{task: Played} -> means with intervals, of each domain and over domains; {} without tasks."""
    if not groups:
        return {}
    domains, rows = [domain_of(task) for task in groups], {}
    for domain in dict.fromkeys(domains):
        part = [played for task, played in groups.items() if domain_of(task) == domain]
        rows[domain] = _mean_row(part, partial(mean_over_domains, domains=[domain] * len(part)))
    over = _mean_row(list(groups.values()), partial(mean_over_domains, domains=domains))
    return {"domains": {d: row["mean"] for d, row in rows.items()}, "domain_scores": rows,
            "mean_over_domains": over.pop("mean"), **over}


def _mean_row(groups, mean):
    low, high = bootstrap_interval(groups, mean)
    scores = [played.scores() for played in groups]
    return {"mean": float(mean(scores)), "interval": [low, high],
            "interquartile_mean": float(interquartile_mean(scores)),
            "interquartile_interval": bootstrap_interval(groups, interquartile_mean),
            "above_random": low > 0, "scored_tasks": len(groups),
            "scored_episodes": sum(map(len, scores))}


def format_table(summary):
    """The summary as a table for people: tasks trained on, held-out tasks, means of each."""
    tasks = summary["tasks"]
    width = max(map(len, (*tasks, "interquartile mean over episodes"))) + 2
    number = lambda x, digits=1: "-" if x is None else f"{x:.{digits}f}"
    span = lambda ends: f"{ends[0]:.2f} to {ends[1]:.2f}" if ends else "-"
    yes = {True: "yes", False: "no", None: "-"}
    lines = []
    for heldout, title in ((False, "task"), (True, "held-out task (zero-shot)")):
        rows = {t: row for t, row in tasks.items() if row["heldout"] == heldout}
        if not rows:
            continue
        lines += [f"{title:<{width}}{'return':>9}{'random':>9}{'reference':>10}{'score':>7}"
                  f"{'95 % interval':>16}{'above random':>14}{'constant':>10}"]
        for task, row in rows.items():
            constant = number(row["constant_score"], 2) if "constant_score" in row else ""
            lines.append(
                f"{task:<{width}}{number(row['mean_return']):>9}{number(row['random_return']):>9}"
                f"{number(row['reference_return']):>10}{number(row['score'], 2):>7}"
                f"{span(row['interval']):>16}{yes[row['above_random']]:>14}{constant:>10}".rstrip())
        lines += ["", *_format_means(summary.get("heldout", {}) if heldout else summary, width)]
    unscored = {t: row["unscored"] for t, row in tasks.items() if "unscored" in row}
    lines += [f"{t}: raw return only, in no mean ({why})" for t, why in unscored.items()]
    lines += [f"{t} failed: {why}" for t, why in summary["failed"].items()]
    if failed := len(summary["failed"]):
        lines.append(f"{failed} task{'s' * (failed > 1)} failed")
    scale = {"data": "the card's reference", "public": "the paper's reference",
             "human": "a human (Atari) or the card's reference"}[summary["normalised_by"]]
    lines += [f"0 = the random policy, 1 = {scale}"]
    exact = [task for task, row in tasks.items() if row["score"] is not None and row["exact"]]
    if exact:
        lines.append(f"intervals take what scores 0 or 1 as exact, as only its mean is known, in "
                     f"{len(exact)} of {len(tasks)} tasks: {', '.join(exact[:3])}"
                     + " ..." * (len(exact) > 3))
    return "\n".join(lines)


def _format_means(means, width):
    """Lines for the means over domains of _means(), with an empty one at the end."""
    if "domain_scores" not in means:                        # no task has a score
        return []
    rows = {**means["domain_scores"],
            "mean over domains": {**means, "mean": means["mean_over_domains"]}}
    lines = [f"{'domain':<{width}}{'tasks':>9}{'episodes':>9}{'mean':>10}{'95 % interval':>23}"
             f"{'above random':>14}   interquartile mean"]
    for name, row in rows.items():
        (low, high), (iq_low, iq_high) = row["interval"], row["interquartile_interval"]
        span = f"{low:.3f} to {high:.3f}"
        lines.append(f"{name:<{width}}{row['scored_tasks']:>9}{row['scored_episodes']:>9}"
                     f"{row['mean']:>10.3f}{span:>23}"
                     f"{'yes' if row['above_random'] else 'no':>14}   "
                     f"{row['interquartile_mean']:.3f} ({iq_low:.3f} to {iq_high:.3f})")
    return [*lines, ""]


# -------------------------------------------------------------------------------- jobs in parallel
def run_jobs(jobs, processes, start, timeout=600.0, advance=lambda steps: None, method="spawn"):
    """Do jobs in several processes at once; yields (job, result) in the order in which they end.

    start() is called once in each process and returns do(job, advance) -> result; start, jobs and
    results are pickled, and start should be small: what is large comes as the path of a file. The
    result is an Exception where do() raised one, where its process died (a simulator that crashes)
    and where it neither ended nor reported a step for `timeout` seconds (one that hangs); its
    process is replaced, the other jobs go on. SystemExit where a process cannot even start. Steps
    that do() reports through its advance(steps) reach ours about twice a second. Leaving the loop
    early kills what runs. method "fork" starts at once; it is for what opens neither simulators nor
    a GPU.
    """
    from pebble import ProcessPool
    context = multiprocessing.get_context(method)
    # each job's steps, then its signs of life, advance(0) too; no lock, which a crash would leave
    n, steps = len(jobs), context.RawArray("q", 2 * len(jobs))
    pool = ProcessPool(min(processes, len(jobs)) or 1, initializer=_begin_worker,
                       initargs=(start, steps), context=context)
    told, seen, idle = 0, {}, time.monotonic()  # seen: of each job that runs: signs, since when
    try:
        futures = {pool.schedule(_do_job, (k, job)): (k, job) for k, job in enumerate(jobs)}
        while futures:
            ended, _ = concurrent.futures.wait(futures, 0.5, concurrent.futures.FIRST_COMPLETED)
            now, done = time.monotonic(), sum(steps[:n])
            advance(done - told)
            told = done
            for future in ended:
                k, job = futures.pop(future)
                yield job, _result(future, timeout)
            for future, (k, _) in futures.items():
                if future.running() and seen.get(k, (None,))[0] != steps[n + k]:
                    seen[k] = steps[n + k], now
                if k in seen and now - seen[k][1] > timeout:
                    future.cancel()             # kills its process
            idle = now if ended or any(future.running() for future in futures) else idle
            if futures and now - idle > timeout:
                raise SystemExit(f"no process has begun to work within {timeout:g} s")
    finally:
        pool.stop()
        pool.join()


def _result(future, timeout):
    """What a job came back with; SystemExit where its process could not start."""
    from concurrent.futures.process import BrokenProcessPool

    from pebble import ProcessExpired
    try:
        result, began = future.result()
    except concurrent.futures.CancelledError:
        return RuntimeError(f"no step for {timeout:g} s: its process hung, killed")
    except ProcessExpired as error:
        how = f"exit code {error.exitcode}" if error.exitcode >= 0 else \
            signal.Signals(-error.exitcode).name
        return RuntimeError(f"its process died ({how}): what it ran crashed, or memory ran out")
    except BrokenProcessPool:
        raise SystemExit("the processes that should do the work die before they begin: what they "
                         "died of stands above, or memory ran out") from None
    if not began:
        raise SystemExit(f"the processes that should do the work cannot start: {result}")
    return result


def _begin_worker(start, steps):
    """A process of run_jobs; start() may fail, so that it is called with the first job."""
    global WORKER
    warnings.filterwarnings("ignore")                      # they would tear the progress bar
    WORKER = functools.cache(start), steps


def _do_job(k, job):
    """(result or Exception of job number k, whether start() went well)."""
    start, steps = WORKER

    def advance(n):
        steps[k] += n
        steps[len(steps) // 2 + k] += 1
    began = False
    try:
        do = start()
        began = True
        return do(job, advance), began
    except (Exception, SystemExit) as error:
        return _failure(error), began


def _failure(error):
    """An exception -> one that can be pickled, with its kind and place in the message.

    A plain OSError, which is what a full disk raises, stays one.
    """
    if type(error) in (SystemExit, OSError):
        return (OSError if type(error) is OSError else RuntimeError)(str(error))
    place = traceback.extract_tb(error.__traceback__)[-1]
    return RuntimeError("; ".join([f"{type(error).__name__}: {error} ({Path(place.filename).name}, "
                                   f"line {place.lineno})", *getattr(error, "__notes__", ())]))


# -------------------------------------------------------------------------------------- evaluation
def score_task(
    model, task, card, episodes, seed, num_envs, agent_options, advance=lambda steps: None
):
    """A model's returns on one task, episode k from seed + k."""
    from lram import Agent
    agent, played = Agent(model, card, seed=seed, **agent_options), []
    try:
        for episode in rollout(
                partial(make_env, task, limit=card.get("limit")),
                partial(agent_policy, agent=agent), [seed + k for k in range(episodes)], num_envs,
                keep_states=False, advance=advance):
            played.append(episode)
    except Exception as error:          # what ended first is no fair sample: told, but not scored
        if played:
            mean = np.mean([e.rewards.sum() for e in played])
            error.add_note(f"{len(played)} of {episodes} episodes had ended, mean return "
                           f"{mean:.1f}, in no score")
        raise
    return {"returns": [float(e.rewards.sum()) for e in played], "card": card,
            "seeds": [e.seed for e in played],
            "success": float(np.mean([e.success for e in played]))}


def _load_player(path, config, device, kernels):
    """In a worker: the model, on one thread, as do() of run_jobs; jobs: arguments of score_task."""
    import torch
    from lram import LRAM, use_kernels
    torch.set_num_threads(1)
    model = LRAM(config).to(device)
    model.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    use_kernels(model, kernels)
    return lambda job, advance: score_task(model, *job, advance)


def _score_jobs(model, jobs, processes, timeout, advance):
    """score_task for each of jobs, here or in processes; yields (task, result or Exception)."""
    import torch
    if processes > 1:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "weights.pt"
            torch.save(model.state_dict(), path)
            cells = [getattr(b, "cell", getattr(b, "scan", None)) for b in model.backbone.blocks]
            triton = any(getattr(cell, "__module__", "") == "kernels" for cell in cells)
            start = partial(_load_player, path, model.config, next(model.parameters()).device,
                            "triton" if triton else "torch")
            for job, result in run_jobs(jobs, processes, start, timeout, advance):
                yield job[0], result
        return
    for job in jobs:
        try:
            yield job[0], score_task(model, *job, advance)
        except (Exception, SystemExit) as error:
            yield job[0], _failure(error)


def play(model, cards, episodes=None, seed=EVALUATION_SEED, num_envs=20, quiet=False,
         processes=None, timeout=600.0, **agent_options):
    """Play a model on the tasks of cards ({task: card}); returns {task: result} for summarise().

    A result holds "returns", "seeds", "success" and "card"; of a task that failed, which is named
    at once, "failed" (the reason) and "card". A task whose simulator is missing is named
    and left out. agent_options go to lram.Agent (context, temperature, target_return). processes:
    tasks played side by side, one thread each (default: as many as this program has threads, where
    the model is on the CPU and the work is worth it). Only these survive a simulator that crashes,
    or hangs for `timeout` seconds; results of several calls can be merged.
    """
    import torch
    from tqdm import tqdm
    if episodes is not None and episodes < 1 or num_envs < 1:
        raise SystemExit(f"{episodes} episodes in {num_envs} environments cannot be played: give 1 "
                         "or more of each")
    reasons = {task: cannot_play(task, card) for task, card in cards.items()}
    counts = {t: episodes or split_task(t)[0].episodes for t in cards if not reasons[t]}
    for task in cards.keys() - counts.keys():
        print(f"{task} left out: {reasons[task]}", file=sys.stderr)
    cost = {task: n * split_task(task)[0].steps for task, n in counts.items()}
    on_cpu = next(model.parameters()).device.type == "cpu"
    worth = on_cpu and len(counts) > 1 and sum(cost.values()) > 20_000
    processes = processes or (min(torch.get_num_threads(), 8) if worth else 1)
    longest_first = sorted(counts, key=cost.get, reverse=True)
    jobs = [(task, cards[task], counts[task], seed, num_envs, agent_options)
            for task in (longest_first if processes > 1 else counts)]
    results = dict.fromkeys(counts)
    with tqdm(total=sum(cost.values()), desc="evaluate", unit="step", unit_scale=True,
              disable=quiet, leave=False, mininterval=0.5) as bar:
        for task, result in _score_jobs(model, jobs, processes, timeout, bar.update):
            bar.set_postfix_str(task)
            if isinstance(result, Exception):
                tqdm.write(f"{task} failed: {result}", file=sys.stderr)
                result = {"failed": str(result), "card": cards[task]}
            results[task] = result
    return results


def evaluate(model, cards, *args, by="data", **options):
    """play() and summarise(): score a model on the tasks of cards; the content of scores.json."""
    return summarise(play(model, cards, *args, **options), by)


def play_trials(model, cards, trials=40, target_return=None, temperature=None, seed=0, context=None,
                quiet=False):
    """In-context learning: the same world `trials` times over, remembered (lram.InContextAgent).

    cards: {task: card} of Dark-Room; the worlds are all goals of a task. Returns {task: {"returns":
    (goals, trials) raw, "optimal" and "random": mean returns}}. Source: LRAM, appendix D.4; that
    actions are sampled is ours.
    """
    from lram import InContextAgent
    from tqdm import tqdm
    result, others = {}, [task for task in cards if domain_of(task) != "darkroom"]
    if others:
        raise SystemExit(f"--trials plays Dark-Room, {others[0]} is another world: give --tasks "
                         "darkroom, with a checkpoint that knows it")
    if model.config.backbone == "gpt" and model.config.context < 2 * DarkRoom.STEPS:
        raise SystemExit(f"gpt holds {model.config.context} steps, two trials are "
                         f"{2 * DarkRoom.STEPS}: train with --context {2 * DarkRoom.STEPS} "
                         f"--align {DarkRoom.STEPS}")
    for task, card in cards.items():
        distance = make_env(task).goals.sum(1)                  # from (0, 0)
        agent = InContextAgent(model, {**card, "constant_rtg": False}, context,
                               target_return=80.0 if target_return is None else target_return,
                               temperature=0.5 if temperature is None else temperature, seed=seed)
        with tqdm(total=len(distance) * trials * DarkRoom.STEPS, desc=task, unit="step",
                  unit_scale=True, disable=quiet, leave=False) as bar:
            # all rows end together, so that row k plays goal k again and again
            played = list(rollout(partial(make_env, task), partial(agent_policy, agent=agent),
                                  list(range(len(distance))) * trials, len(distance), False,
                                  bar.update))
        returns = np.array([e.rewards.sum() for e in played]).reshape(trials, -1).T
        result[task] = {"returns": returns.tolist(), "random": card["random_score"],
                        # the step that arrives pays too
                        "optimal": float(np.mean(DarkRoom.STEPS + 1 - np.maximum(distance, 1)))}
    return result


def format_trials(played):
    """Mean returns over the goals at some trials, intervals over goals, for people."""
    lines = []
    for task, row in played.items():
        returns = np.array(row["returns"])                                  # (goals, trials)
        count = returns.shape[1]
        lines.append(f"{task}: {len(returns)} goals; random {row['random']:.1f}, "
                     f"optimal {row['optimal']:.1f}")
        for trial in sorted({t for t in (1, 2, 3, 5, 10, 20, 40, count) if t <= count}):
            at = returns[:, trial - 1]
            low, high = bootstrap_interval([at], lambda g: g[0].mean(-1))
            lines.append(f"  trial {trial:>3}  {at.mean():6.1f}  ({low:.1f} to {high:.1f})")
    return "\n".join(lines)


# ------------------------------------------------------------------------- inside the model: memory
INSPECTED, DISTURBED = 500, 8       # steps of the episode at most; observations that are disturbed


def _mlstm_gates(args, h, state):
    """|C| / max(|n|, 1) is what a query can read; the true |C| alone grows with exp(m)."""
    import torch
    (i, f), (C, n, m) = args[3:5], state
    size = C[0].flatten(1).norm(dim=-1) / torch.maximum(n[0].norm(dim=-1), torch.exp(-m[0]))
    return torch.nn.functional.logsigmoid(f[0]).T[..., None], i[0].T[..., None], size


def _slstm_gates(args, y, state):
    """|c / n|, the cells as the output gate reads them; y_{t-1} enters the gates through R."""
    import torch
    gates, R, memory = args[:3]
    before = torch.cat([memory[0][:1, None], y[:1, :-1]], dim=1)        # (1, T, H, dh)
    i, f = gates[0, :, :2].transpose(0, 1) + torch.einsum("ghoi,bthi->gtho", R[:2], before)
    return torch.nn.functional.logsigmoid(f), i, (state[1] / state[2])[0].norm(dim=-1)


def _mamba_gates(args, y, h):
    """|h|; exp(dt A) decays what is there, dt scales what is written."""
    dt, A = args[1][0], args[2]                                         # (T, E), (E, 16)
    return (dt[..., None] * A).flatten(1)[:, None], dt[:, None], h[0].norm().view(1)


# class of a block: where it keeps its recurrence, what reads the calls, names for the picture
GATES = {
    "MLSTMBlock": ("cell", _mlstm_gates, "mLSTM", "i, log of the weight", "|C| / max(|n|, 1)"),
    "SLSTMBlock": ("cell", _slstm_gates, "sLSTM", "i, log of the weight", "|c / n|"),
    "MambaBlock": ("scan", _mamba_gates, "Mamba", "step size dt", "|h|"),
}


@contextlib.contextmanager
def record_gates(model):
    """Within, the calls of every recurrence are recorded (row 0 of the batch): {layer: [call]}.

    A call is {"forget", "write": (3, T, G) 10, 50 and 90 % quantiles of a group's units, the former
    as a factor; "log_forget": (G, units) its log summed over T; "size": (G,) of the state
    after it}, G groups: the heads, or Mamba's one. Attention has no gates, its layers are left out.
    """
    import torch
    calls, originals = {}, []

    def spy(run, read, found):
        def call(*args):
            out, state = run(*args)
            log_f, write, size = read(args, out, state)                 # (T, G, units) twice, (G,)
            some = lambda x: x.quantile(torch.tensor([0.1, 0.5, 0.9]).to(x), dim=-1)
            found.append({"forget": some(log_f.exp()), "write": some(write), "size": size,
                          "log_forget": log_f.double().sum(0)})
            return out, state
        return call
    for layer, block in enumerate(model.backbone.blocks):
        if type(block).__name__ in GATES:
            name, read, *_ = GATES[type(block).__name__]
            originals.append((block, name, getattr(block, name)))
            setattr(block, name, spy(originals[-1][2], read, calls.setdefault(layer, [])))
    try:
        yield calls
    finally:
        for block, name, run in originals:
            setattr(block, name, run)


def disturb(agent, episode, starts):
    """How far one disturbed observation moves the actions: total variation (len(starts), T).

    The agent sees the episode's inputs again, whatever it would do; row k sees them with one
    observation, that of step starts[k], one standard deviation off in every coordinate (fixed
    signs). Compared are the action distributions with those of the undisturbed row, in [0, 1],
    averaged over action dimensions; the recorder above sees the undisturbed one.
    """
    from lram import action_rows
    states, rows, card = episode.states, len(starts) + 1, agent.card
    spread = np.asarray(card["state_std"]) if "state_std" in card else states.std(0)
    shift = spread * np.random.default_rng(0).choice([-1, 1], spread.shape)
    agent.begin(rows)
    moved = []
    for t in range(len(states)):
        obs = np.repeat(states[t][None], rows, axis=0)
        for row in np.flatnonzero(np.asarray(starts) == t) + 1:
            off = states[t] + shift
            obs[row] = np.clip(np.rint(off), 0, 255) if obs.dtype == np.uint8 else off
        agent.act(obs, np.full(rows, episode.rewards[t - 1] if t else 0.0), np.full(rows, t == 0))
        agent.last_action = np.repeat(
            action_rows(episode.actions[t][None], agent.config.bins), rows, axis=0)
        logits = agent.logits.double()
        p = (logits if agent.action_dims else logits[:, None, :card["action"]["n"]]).softmax(-1)
        moved.append((p[1:] - p[:1]).abs().sum(-1).mean(-1).cpu().numpy() / 2)
    return np.stack(moved, axis=1)


def inspect(model, card, seed=EVALUATION_SEED, **agent_options):
    """What the state of a model holds while it acts for one episode; see draw_inspection.

    Returns {"episode", "context", "starts", "moved" (starts, steps after), "gone": steps until that
    stays below 1 % of its first value on average, None if it never does; "layers": {layer:
    {"kind", "forget" and "write" (3, steps, tokens, G), "size" (steps, G), "half_life" (G, units)
    in environment steps}}}, no layers where no state is carried.
    """
    import torch
    from lram import Agent
    limit = min(card.get("limit") or INSPECTED, INSPECTED)
    agent = Agent(model, card, seed=seed, **agent_options)
    make = partial(make_env, card["task"], limit=limit)
    (episode,) = rollout(make, partial(agent_policy, agent=agent), [seed], num_envs=1)
    steps = len(episode.rewards)
    starts = np.unique(np.linspace(steps // 10, steps // 2, DISTURBED).astype(int))
    with record_gates(model) if agent.context == "carry" else contextlib.nullcontext({}) as calls:
        moved = disturb(agent, episode, starts)
    after = steps - starts[-1]
    moved = np.stack([row[t:t + after] for row, t in zip(moved, starts)])
    left = np.flatnonzero(moved.mean(0) > 0.01 * moved[:, 0].mean())
    gone = 0 if not len(left) else int(left[-1]) + 1
    layers = {}
    for layer, found in calls.items():
        join = lambda key, dim=0: torch.stack([call[key] for call in found], dim).cpu().numpy()
        per_step = join("log_forget").mean(0)                           # (G, units), <= 0
        with np.errstate(divide="ignore"):                              # never forgets: infinite
            half_life = np.log(2) / np.abs(per_step)
        layers[layer] = {"kind": type(model.backbone.blocks[layer]).__name__, "size": join("size"),
                         "forget": join("forget", 1), "write": join("write", 1),
                         "half_life": half_life}
    return {"episode": episode, "context": agent.context, "starts": starts, "moved": moved,
            "gone": gone if gone < after else None, "layers": layers}


def format_inspection(found):
    """The table of inspect() as text, and the same as a dict for JSON."""
    steps, rows, lines = len(found["episode"].rewards), [], []
    for layer, x in found["layers"].items():
        _, _, kind, *_ = GATES[x["kind"]]
        heads = x["half_life"].shape[0] > 1
        # a number for each head, or 10, 50 and 90 % of Mamba's channels
        half = np.median(x["half_life"], 1) if heads else np.quantile(x["half_life"], (.1, .5, .9))
        rows.append({"layer": layer, "block": kind, "of": "heads" if heads else "10, 50, 90 %",
                     "half_life_steps": [float(h) if np.isfinite(h) else None for h in half],
                     "longer_than_episode": float((x["half_life"] > steps).mean()),
                     "size": x["size"][-1].tolist()})
        said = "  ".join("infinite" if np.isinf(h) else f"{h:8.3g}" for h in half)
        lines.append(f"{layer:>5}  {kind:<6}{said:<42}{rows[-1]['longer_than_episode']:>12.0%}   "
                     + "  ".join(f"{v:7.3g}" for v in rows[-1]["size"]))
    head = [f"{'layer':>5}  {'block':<6}{'half-life in steps (' + rows[0]['of'] + ')':<42}"
            f"{'> episode':>12}   size of the state at the end"] if rows else []
    gone = "still there" if found["gone"] is None else f"below 1 % after {found['gone']} steps"
    first, after = found["moved"][:, 0].mean(), found["moved"].shape[1]
    lines.append(f"one disturbed observation moves the action by {first:.2g} (total variation) at "
                 f"once; of that, within the {after} steps that were followed: {gone}")
    return "\n".join(head + lines), {
        "steps": steps, "return": float(found["episode"].rewards.sum()), "layers": rows,
        "context": found["context"], "disturbed_at": found["starts"].tolist(),
        "moved": found["moved"].mean(0).tolist(), "gone_after_steps": found["gone"]}


def draw_inspection(found, model, task, output):
    """One picture of inspect(): gates and state over the episode for up to four layers, below them
    one step's tokens, the half-lives of all layers, and the fate of a disturbance.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    layers, steps = found["layers"], len(found["episode"].rewards)
    shown = sorted({list(layers)[int(k)] for k in np.linspace(0, len(layers) - 1, 4)}) \
        if layers else []
    heads = max([x["size"].shape[1] for x in layers.values()], default=0)
    figure = plt.figure(figsize=(15 if shown else 9, 4.6 + 1.75 * len(shown)), layout="constrained")
    grid = figure.add_gridspec(len(shown) + 1, 6, height_ratios=[1] * len(shown) + [2.1])
    titled = {layers[layer]["kind"]: layer for layer in reversed(shown)}.values()
    for row, layer in enumerate(shown):
        _draw_layer([figure.add_subplot(grid[row, k:k + 2]) for k in (0, 2, 4)], layers[layer],
                    f"layer {layer}", layer in titled, row == len(shown) - 1)
    if layers:
        _draw_tokens(figure.add_subplot(grid[-1, :2]), layers[shown[-1]], shown[-1], model.config)
        _draw_half_lives(figure.add_subplot(grid[-1, 2:4]), layers, steps)
    _draw_disturbance(figure.add_subplot(grid[-1, 4:] if layers else grid[-1, :]), found, model)
    figure.suptitle(f"{model.config.backbone} {model.config.size} on {task}: what is remembered in "
                    f"{steps} steps (return {found['episode'].rewards.sum():.1f})\n"
                    + ("lines: mean of a step's tokens, median of the units; bands: lowest to "
                       "highest token, 80 % of the units" if layers else
                       f"context {found['context']}: no state runs through the episode, no gates"),
                    fontsize=13)
    if heads > 1:
        marks = [plt.Line2D([], [], color=f"C{g}", lw=3) for g in range(heads)]
        figure.legend(marks, [f"head {g}" for g in range(heads)], loc="upper right", ncol=2)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=90)
    plt.close(figure)


def _draw_layer(axes, x, name, new, last):
    """Forget gate, input gate and size of the state of one layer, over environment steps.

    new: the first of its kind, which gets titles.
    """
    *_, kind, write, size = GATES[x["kind"]]
    lost = np.maximum(1 - x["forget"], 1e-7)        # on a log axis 0.99 is far from 0.999
    for axis, values in zip(axes, (lost, x["write"])):
        low, mid, high = values.transpose(0, 3, 1, 2)                   # (G, steps, tokens) each
        for g in range(len(mid)):
            axis.plot(mid[g].mean(-1), color=f"C{g}", lw=1.3)
            # from the lowest token of a step to the highest, over the middle 80 % of the units
            axis.fill_between(np.arange(len(mid[g])), np.minimum(low, high)[g].min(-1),
                              np.maximum(low, high)[g].max(-1), color=f"C{g}", alpha=0.15, lw=0)
    axes[0].set_yscale("log")
    axes[0].invert_yaxis()                          # up: keeps more
    axes[2].plot(x["size"], lw=1.3)
    axes[0].set_ylabel(f"{name}\n{kind}", fontsize=11)
    for axis, title in zip(axes, ("forget gate: 1 - f, lost per token", f"input gate: {write}",
                                  f"size of the state: {size}")):
        axis.set_title(title if new else "", fontsize=11)
        axis.set_xlabel("environment step" if last else "")


def _draw_tokens(axis, x, layer, config, span=6):
    """The input gate token by token, over a few steps in the middle of the episode."""
    mid = x["write"][1]                                                 # (steps, tokens, G)
    start, n = max(0, (len(mid) - span) // 2), mid.shape[1]
    part = mid[start:start + span]
    part = part.reshape(-1, part.shape[-1])
    at = start + np.arange(len(part)) / n
    for g, values in enumerate(part.T):
        axis.plot(at, values, ".-", color=f"C{g}", ms=7)
    for step in range(start, start + len(part) // n + 1):
        axis.axvline(step - 0.5 / n, color="gray", lw=0.8, ls=":")
    kinds = ["a"] * (n - len(config.tokens) + 1) if "a" in config.tokens else []
    kinds += [{"rtg": "R"}.get(t, t) for t in config.tokens if t != "a"]
    axis.set_xticks(at, kinds * (len(part) // n), fontsize=9)
    axis.set_title(f"token by token, layer {layer}: {GATES[x['kind']][3]}", fontsize=11)
    axis.set_xlabel(f"tokens of steps {start} to {start + len(part) // n - 1}: "
                    "r reward, s observation, R return-to-go")


def _draw_half_lives(axis, layers, steps):
    """Every unit's half-life by layer and head, against the length of the episode."""
    top = 100 * steps                                       # what is longer lies on the upper edge
    for place, x in enumerate(layers.values()):
        half = x["half_life"]
        for g, values in enumerate(half):
            at = place + (g - (len(half) - 1) / 2) * 0.18
            axis.plot(np.full(len(values), at), np.clip(values, 0.02, top), "_", color=f"C{g}",
                      ms=9, alpha=min(1, max(0.02, 8 / len(values))))
            axis.plot(at, np.clip(np.median(values), 0.02, top), "o", color=f"C{g}", ms=7)
    axis.set_yscale("log")
    axis.set_ylim(None, 1.5 * max(axis.get_ylim()[1], steps))
    axis.axhspan(steps, axis.get_ylim()[1], color="gray", alpha=0.15, lw=0)
    axis.text(0.02, 0.97, "longer than the episode", transform=axis.transAxes, va="top", fontsize=9)
    axis.set_xticks(range(len(layers)), layers)
    axis.set_xlabel("layer")
    axis.set_ylabel("half-life [environment steps]")
    axis.set_title("memory by the forget gates that were applied", fontsize=11)


def _draw_disturbance(axis, found, model):
    """Total variation of the action's distribution over the steps since one observation was off."""
    moved = np.maximum(found["moved"], 1e-6)                # below are rounding errors
    axis.plot(moved.T, color="C0", alpha=0.25, lw=0.8)
    axis.plot(moved.mean(0), color="C0", lw=2.2, label=f"mean of {len(moved)} disturbances")
    axis.axhline(0.01 * moved[:, 0].mean(), color="k", ls="--", lw=1, label="1 % of the first")
    if found["gone"] is None:
        axis.plot([], [], " ", label="still there at the end")
    else:
        axis.axvline(found["gone"], color="C3", lw=1.2, label=f"gone after {found['gone']} steps")
    if found["context"] != "carry":
        axis.axvline(model.config.context, color="gray", ls=":", lw=1.5,
                     label=f"end of the context, {model.config.context} steps")
    axis.set_yscale("log")
    axis.set_xlabel("environment steps since the disturbed observation")
    axis.set_ylabel("total variation of the action")
    axis.set_title("how long one disturbed observation matters", fontsize=11)
    axis.legend(fontsize=9, loc="best")


# ----------------------------------------------------------------- inside the model: the embeddings
def embeddings(model, cards, root, windows=32, seed=0, raw=False):
    """Windows of each task's training data as the model represents them, as in LRAM's figure 5.

    Hidden states after the backbone's final norm, averaged over the tokens of a window of C steps
    (training's; the same for every task). `windows` per task, drawn as for training, on which
    `seed` alone decides. Held-out tasks have no data and are left out. raw: what is averaged is the
    input instead, observation (204 numbers and an image, zeros where a task has none), reward and
    return-to-go as the model reads them: the baseline, as domains differ in their inputs already.
    Returns (points (N, D) float32, task of each (N,)).
    """
    import torch
    from data import Mixture
    from train import to_tensors
    device, config, points, tasks = next(model.parameters()).device, model.config, [], []
    for task, card in cards.items():
        if card.get("heldout"):
            continue
        mixture = Mixture(root, [task], standardise=config.standardise)
        mixture.cards[task] = mixture.reading[task] = card      # the statistics of its training
        batch = mixture.sample(mixture.domains[0], windows, config.context, seed, step=0)
        valid = batch["mask"].reshape(windows, config.context, -1)[:, :, :1]        # (B, C, 1)
        if raw:
            obs = batch["obs"] / np.float32(255 if batch["obs"].dtype == np.uint8 else 1)
            image, obs = obs.ndim == 5, obs.reshape(windows, config.context, -1)
            room = STATE_WIDTH + 64 * 64 - obs.shape[-1]
            obs = np.pad(obs, ((0, 0), (0, 0), (room, 0) if image else (0, room)))
            x = np.concatenate([obs, batch["reward"][..., None], batch["rtg"][..., None]], axis=-1)
        else:
            inputs, *_ = to_tensors(batch, config, device)
            inputs.pop("action_dims")
            with torch.no_grad():
                tokens = model.tokens(**inputs)                                 # (B, C, n, D)
                y, _ = model.backbone(tokens.flatten(1, 2), final_state=False)
            x = y.view(tokens.shape).float().mean(2).cpu().numpy()              # (B, C, D)
        points.append((x * valid).sum(1) / valid.sum(1))
        tasks += [task] * windows
    if not points:
        raise SystemExit("none of these tasks was trained on: there are no data to embed")
    return np.concatenate(points), np.array(tasks)


def separation(points, tasks):
    """How well points (N, D) of tasks (N,) separate by domain and by task, in all D dimensions.

    Silhouette of a point: (b - a) / max(a, b), a its mean distance to the others of its cluster, b
    to the nearest other cluster; 1: compact and far apart, 0: overlapping. "domains" is the mean
    with "interval", a 95 % bootstrap over tasks; "tasks" the same with tasks as clusters.
    "neighbours": share of points whose nearest neighbour among all *other* tasks is of the same
    domain, over domains of at least two tasks (None without one); "chance": by a neighbour at
    random. What needs two clusters is None where there is one.
    """
    points = np.asarray(points, np.float64)
    points = points - points.mean(0)
    names, task = np.unique(tasks, return_inverse=True)
    domains, of_task = np.unique([domain_of(str(name)) for name in names], return_inverse=True)
    domain, square = of_task[task], (points ** 2).sum(1)
    sums, nearest = np.empty((len(points), len(names))), np.empty(len(points), int)
    for k in range(len(names)):                 # the rows of one task: N x N may not fit in memory
        mine = task == k
        distance = np.maximum(square[mine, None] + square - 2 * points[mine] @ points.T, 0) ** 0.5
        distance[:, mine] = np.where(np.eye(mine.sum(), dtype=bool), 0, distance[:, mine])
        sums[mine] = distance @ np.eye(len(names))[task]        # to all points of each task
        distance[:, mine] = np.inf
        nearest[mine] = domain[distance.argmin(1)]
    found = {"domains": None, "interval": None, "tasks": None, "neighbours": None, "chance": None}
    if len(domains) > 1:
        by_domain = silhouette(sums @ np.eye(len(domains))[of_task], domain)
        means = np.array([by_domain[task == k].mean() for k in range(len(names))])
        found["domains"] = float(by_domain.mean())
        found["interval"] = bootstrap_interval([means], lambda groups: groups[0].mean(-1))
    if len(names) > 1:
        found["tasks"] = float(silhouette(sums, task).mean())
    own = np.bincount(task)[task]
    others = np.bincount(domain)[domain] - own                  # points of its domain's other tasks
    if others.any():
        chance = others / np.maximum(len(points) - own, 1)
        found["neighbours"] = float((nearest == domain)[others > 0].mean())
        found["chance"] = float(chance[others > 0].mean())
    return found


def silhouette(sums, cluster):
    """Of each point, from its summed distances to every cluster, (N, clusters), and its own (N,).

    A point that is alone in its cluster has 0 (Rousseeuw, 1987).
    """
    size, at = np.bincount(cluster), (np.arange(len(cluster)), cluster)
    own = sums[at] / np.maximum(size[cluster] - 1, 1)
    other = sums / size
    other[at] = np.inf
    other = other.min(1)
    s = (other - own) / np.maximum(np.maximum(own, other), 1e-300)
    return np.where(size[cluster] > 1, s, 0.0)


def project(points, seed=0):
    """(N, D) -> (N, 2) and how: UMAP where it is installed (pip install umap-learn), else PCA."""
    try:
        import umap
    except ImportError:
        centred = points - points.mean(0)
        u, s, _ = np.linalg.svd(centred, full_matrices=False)
        share = (s[:2] ** 2).sum() / (s ** 2).sum()
        return u[:, :2] * s[:2], f"PCA, {share:.0%} of the variance"
    return umap.UMAP(random_state=seed).fit_transform(points), f"UMAP, random_state {seed}"


def draw_embeddings(panels, path):
    """One panel for each of panels, {name: (points, tasks, scores)}; scores: {row: separation()}.

    Coloured by domain, a marker for each task within it. The numbers below are of the full space.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    names = list(dict.fromkeys(str(t) for _, tasks, _ in panels.values() for t in tasks))
    domains = list(dict.fromkeys(map(domain_of, names)))
    colours = {d: plt.get_cmap("tab10")(k % 10) for k, d in enumerate(domains)}
    within = {t: [u for u in names if domain_of(u) == domain_of(t)].index(t) for t in names}
    style = {t: dict(color=colours[domain_of(t)], marker="osD^vP*X<>phd8"[within[t] % 14])
             for t in names}
    figure, axes = plt.subplots(1, len(panels), figsize=(6.4 * len(panels) + 3.2, 6.6),
                                squeeze=False, layout="constrained")
    for axis, (name, (points, tasks, scores)) in zip(axes[0], panels.items()):
        flat, how = project(points)
        for t in dict.fromkeys(map(str, tasks)):
            axis.scatter(*flat[tasks == t].T, s=26, alpha=0.7, lw=0, **style[t])
        axis.set_title(f"{name}: a point is a window ({how})", fontsize=12)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_xlabel(format_separation(scores), fontsize=8, family="monospace", loc="left")
    key = names if len(names) <= 24 else domains
    style |= {d: dict(color=colours[d], marker="o") for d in domains if d not in style}
    marks = [plt.Line2D([], [], ls="", ms=7, **style[k]) for k in key]
    figure.legend(marks, key, loc="outside right upper", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def format_separation(scores):
    """{row: separation()} as a table."""
    show = lambda x: "-" if x is None else f"{x:.2f}"
    lines = [f"{'':<11}{'silhouette, domains':<23}{'neighbour in domain (chance)':<31}"
             "silhouette, tasks"]
    for name, s in scores.items():
        low, high = map(show, s["interval"] or (None, None))
        lines.append(f"{name:<11}{show(s['domains']) + f' ({low} to {high})':<23}"
                     f"{show(s['neighbours']) + ' (' + show(s['chance']) + ')':<31}"
                     f"{show(s['tasks'])}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------- program
class _FrameGrabber(gym.Wrapper):
    """Keeps every second picture of an episode, of a long one fewer: at most MOST."""

    MOST = 600

    def __init__(self, env):
        super().__init__(env)
        self.frames, self.count, self.every = [], 0, 2

    def step(self, action):
        if self.count % self.every == 0:
            self.frames.append(self.env.render())
        if len(self.frames) > self.MOST:
            self.frames, self.every = self.frames[::2], 2 * self.every
        self.count += 1
        return self.env.step(action)


def side_by_side(agents, task, seed):
    """Play an episode with the first of two agents, the second beside it.

    Returns their logits (steps, classes) each, the share of equal actions and the median
    milliseconds of each.
    """
    logits, same, times = [], [], []

    def policy(envs):
        for agent in agents:
            agent.begin(envs.num_envs)

        def act(*inputs):
            started = time.perf_counter()
            action = agents[0].act(*inputs)
            middle = time.perf_counter()
            other = agents[1].act(*inputs)
            times.append((middle - started, time.perf_counter() - middle))
            agents[1].last_action = agents[0].last_action       # both live in the plain one's world
            logits.append([agent.logits.double().flatten().numpy() for agent in agents])
            same.append(np.mean(action == other))
            return action
        return act
    list(rollout(partial(make_env, task), policy, [seed], num_envs=1, keep_states=False))
    times = 1e3 * np.median(times[5:] or times, axis=0)     # the first steps warm up
    return *(np.stack(x) for x in zip(*logits)), np.mean(same), times


def check_fast(model, fast, task, card, seed=EVALUATION_SEED):
    """Play an episode with the plain model, the fast policy beside it; print how they differ."""
    from lram import Agent
    agents = Agent(model, card, seed=seed), Agent(fast, card, seed=seed)
    plain, compiled, same, (plain_ms, fast_ms) = side_by_side(agents, task, seed)
    print(f"fast path, {fast.weights}: compiled in {fast.compile_seconds:.0f} s; over an episode "
          f"of {task} ({len(plain)} steps) logits within {np.abs(plain - compiled).max():.1e}, "
          f"actions agree {100 * same:.1f} %; {plain_ms:.2f} -> {fast_ms:.2f} ms a step "
          "(median)")


class _Exported:
    """A file of lram.export_policy in the place of an Agent, loaded as a robot would load it."""

    def __init__(self, path, compiled):
        import torch
        if compiled:
            self.policy = torch._inductor.aoti_load_package(str(path))
            text = self.policy.get_metadata()["policy.json"]
        else:
            files = {"policy.json": ""}
            self.policy = torch.export.load(path, extra_files=files).module()
            text = files["policy.json"]
        says = json.loads(text)
        self.clip_rewards, self.scale = says["clip_rewards"], says["reward_scale"]
        self.start = [torch.full(shape, float(value), dtype=getattr(torch, dtype))
                      for shape, dtype, value in says["start"]]

    def begin(self, batch_size):
        self.state = self.start

    def act(self, obs, reward, done, lost_life):
        import torch
        reward = torch.tensor(reward, dtype=torch.float32)
        if lost_life.any():                             # see lram.Controller
            seen = reward.clamp(-1, 1) if self.clip_rewards else reward
            self.state = [self.start[0] + seen / self.scale, *self.state[1:]]
        action, self.logits, self.state = self.policy(torch.from_numpy(obs), reward, self.state)
        return action.numpy()


def export(model, cards, path, compiled, seed=EVALUATION_SEED, **agent_options):
    """Writes the policy of one task (lram.export_policy), once it has passed its check.

    The file is loaded again and acts through an episode beside the plain policy. SystemExit, and no
    file, where logits differ by more than 1e-5 of the largest (1e-4 compiled) or actions do.
    """
    from lram import Agent, export_policy
    if len(cards) != 1 or path.suffix != ".pt2":
        raise SystemExit("--export writes one task's policy to a file named .pt2; for example: "
                         f"--tasks {next(iter(cards))} --export policy.pt2")
    (task, card), = cards.items()
    agent, started = Agent(model, card, seed=seed, **agent_options), time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        draft = Path(folder) / path.name
        try:
            export_policy(agent, draft, compiled)
        except ValueError as error:
            raise SystemExit(str(error)) from None
        seconds = time.perf_counter() - started
        plain, ours, same, (plain_ms, our_ms) = side_by_side(
            (agent, _Exported(draft, compiled)), task, seed)
        plain = plain[:, :ours.shape[1]]        # of 18 discrete actions the task's own
        error = np.abs(ours - plain).max() / np.abs(plain).max()
        found = (f"over an episode of {task} ({len(plain)} steps) logits within {error:.0e} of the "
                 f"plain policy's largest, actions agree {100 * same:.1f} %")
        # two classes that tie may fall either way
        if not (error < (1e-4 if compiled else 1e-5) and same >= 0.99):
            raise SystemExit(f"the exported policy is not the plain one: {found}; nothing written")
        os.replace(draft, path)
    print(f"wrote {path}: {'compiled for this CPU' if compiled else 'portable'}, "
          f"{path.stat().st_size / 1e6:.1f} MB in {seconds:.0f} s; loaded again, {found}; "
          f"{plain_ms:.2f} -> {our_ms:.2f} ms a step (median)")


def record_video(make_policy, task, path, seed=EVALUATION_SEED, limit=None):
    """One episode of a policy of rollout() as an animated GIF (MuJoCo needs an OpenGL library)."""
    from PIL import Image
    if path.suffix.lower() != ".gif":
        raise SystemExit(f"--video writes an animated GIF, for example {path.with_suffix('.gif')}")
    try:
        env = _FrameGrabber(make_env(task, render=True, limit=limit))
        env.reset(seed=seed)
        env.render()
    except gym.error.Error as error:    # gymnasium's own worlds are drawn by pygame, for one
        raise SystemExit(f"{task}: {error}") from None
    except Exception as error:          # without OpenGL: one of many, each library has its own
        if "MUJOCO_GL" not in os.environ:
            raise
        if "MUJOCO_GL" in str(error):                      # check_mujoco_gl's
            raise SystemExit(f"{task}: {error}") from None
        raise SystemExit(f"{task}: no picture with MUJOCO_GL={os.environ['MUJOCO_GL']} "
                         f"({type(error).__name__}: {error}); MuJoCo draws with egl (apt-get "
                         "install libegl1), osmesa (libosmesa6) or glfw (a desktop)") from None
    (episode,) = rollout(lambda: env, make_policy, [seed], keep_states=False)
    frames = [Image.fromarray(frame) for frame in env.frames]
    duration = max(20, 1000 * env.every // env.metadata.get("render_fps", 30))
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, loop=0)
    print(f"wrote {path}: {task}, {len(frames)} frames, return {episode.rewards.sum():.1f}")


def show_world(args):
    """--video of the expert that makes the data, or of the random policy: needs no checkpoint."""
    if args.video is None or len(args.tasks) != 1:
        raise SystemExit(f"--policy {args.policy} shows a world; for example: --video world.gif "
                         f"--tasks atari/pong --policy {args.policy}")
    task, make_policy, limit = canonical(args.tasks[0]), random_policy, None
    if args.policy == "expert":
        from data import expert_policy, recipe_of
        make_policy = partial(expert_policy, expert=recipe_of(task).expert)
        limit = recipe_of(task).limit
    warnings.filterwarnings("ignore")                      # of the simulators
    return record_video(make_policy, task, args.video, args.seed, limit)


def show_trials(args, model, cards):
    """--trials: the table of play_trials, and its returns as JSON with --output."""
    try:
        played = play_trials(model, cards, args.trials, args.target_return, args.temperature,
                             args.seed, args.context)
    except ValueError as error:
        raise SystemExit(f"--trials: {error}") from None
    print(format_trials(played))
    write_scores(played, args.output)


def show_inside(args, model, cards, options):
    """--inspect or --embed: a picture, and its numbers on stdout (and as JSON with --output)."""
    task, card = next(iter(cards.items()))
    if args.inspect:
        path, found = args.inspect, inspect(model, card, args.seed, **options)
        text, summary = format_inspection(found)
        summary = {"task": task, **summary}
        draw_inspection(found, model, task, path)
    else:
        import torch
        from lram import LRAM
        torch.manual_seed(0)                # what the inputs alone bring: two baselines
        fresh = LRAM(model.config).to(next(model.parameters()).device).eval()
        points, tasks = embeddings(model, cards, args.data_root)
        rows = {"trained": points, "untrained": embeddings(fresh, cards, args.data_root)[0],
                "raw input": embeddings(model, cards, args.data_root, raw=True)[0]}
        path, summary = args.embed, {k: separation(x, tasks) for k, x in rows.items()}
        name = f"{model.config.backbone} {model.config.size}"
        draw_embeddings({name: (points, tasks, summary)}, path)
        text = (f"{len(points)} windows of {len(set(tasks))} tasks, in all dimensions; interval: "
                "95 %, tasks redrawn; neighbour: the nearest window of another task\n"
                + format_separation(summary))
    print(f"{text}\nwrote {path}")
    write_scores({"backbone": model.config.backbone, **summary}, args.output)


@dataclass
class Args:
    """Score a checkpoint in its environments."""
    checkpoint: Path | None = None
    """Written by train.py; holds the model and the cards of its tasks, nothing else is needed."""
    tasks: tuple[str, ...] = ()
    """Only these of the checkpoint's tasks or domains, e.g. metaworld/reach-v3 (default: all)."""
    episodes: int | None = None
    """Episodes per task (default: 20; Dark-Room 80, Atari 8)."""
    seed: int = EVALUATION_SEED
    """Episode k uses seed + k. The default seeds are used for nothing else."""
    context: Literal["carry", "window", "stagger", "pair"] | None = None
    """Acting beyond training's windows, see lram.Agent (default: carry; gpt: stagger); with
    --trials carry or pair, see lram.InContextAgent (default: carry; gpt: pair)."""
    temperature: float | None = None
    """0 acts greedily (the default); above, actions are sampled (the default of --trials: 0.5)."""
    target_return: float | None = None
    """Return to ask for, in raw reward (default: each task's own, the maximum in its data; with
    --trials 80, the paper's)."""
    trials: int = 0
    """In-context learning: play every goal of Dark-Room so often in a row, remembering."""
    num_envs: int = 20
    """Environments stepped together."""
    processes: int | None = None
    """Tasks played side by side on a CPU (default: one per core)."""
    timeout: float = 600.0
    """Seconds without a step after which a task played beside others counts as hung."""
    normalise: Literal["data", "public", "human"] = "data"
    """What scores 0 and 1: the card's random policy and expert, the paper's table, or the table for
    Atari (human) and the card for the rest."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """What runs the recurrences: PyTorch or kernels.py; auto: the kernels on a GPU."""
    fast: bool = False
    """Act through the compiled policy (CPU; compiles first), one environment at a time."""
    weights: Literal["float32", "bfloat16", "int8"] = "float32"
    """Storage of the weights with --fast; what it costs in agreement is printed."""
    export: Path | None = None
    """Write one task's policy (.pt2) for a control loop, check it and stop; --fast: compiled."""
    output: Path | None = None
    """Write the scores as JSON here (with --compare: the picture)."""
    video: Path | None = None
    """Record one episode of the first task as an animated GIF and stop."""
    inspect: Path | None = None
    """Draw what the state holds over one episode of the first task (.png) and stop."""
    embed: Path | None = None
    """Draw how the model groups windows of its tasks' training data (.png) and stop."""
    data_root: Path = Path("datasets")
    """Where the data live, for --embed."""
    policy: Literal["agent", "expert", "random"] = "agent"
    """Whose episode --video shows; expert and random need no checkpoint."""
    compare: tuple[Path, ...] = ()
    """Instead of scoring: a table of several runs' scores.json (with --output also a picture)."""
    list: bool = False
    """Print the task table and what is missing for each, and stop."""


def compare(paths, output):
    """Several scores.json -> a Markdown table on stdout, and a picture if output is given.

    A file may also hold several runs, {name: content of a scores.json}.
    """
    runs = {}
    for path in paths:
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise SystemExit(f"{path} cannot be read as scores ({error}); train.py and eval.py "
                             "--output write such files") from None
        name = path.parent.name if path.stem == "scores" else path.stem
        for name, run in ({name: content} if "tasks" in content else content).items():
            runs[f"{name} ({path})" if name in runs else name] = run
    print("\n".join(comparison_table(runs)))
    if output is not None:
        draw_comparison(runs, output)


def comparison_table(runs):
    """{name: content of a scores.json} -> lines of a Markdown table, a row for each task."""
    tasks = list(dict.fromkeys(task for run in runs.values() for task in run["tasks"]))
    lines = ["| task | " + " | ".join(runs) + " | best constant action |",
             "|---" * (len(runs) + 2) + "|"]
    for task in tasks:
        rows = [run["tasks"].get(task) for run in runs.values()]
        cells = [_compare_cell(row) for row in rows]
        constant = next(
            (f"{r['constant_score']:.2f}" for r in rows if r and "constant_score" in r), ""
        )
        held = " (held out)" if any(r and r["heldout"] for r in rows) else ""
        lines.append(f"| {task}{held} | " + " | ".join(cells) + f" | {constant} |")
    for name, part in (("mean over domains", lambda run: run),
                       ("mean over held-out domains", lambda run: run.get("heldout", {}))):
        means = [part(run) for run in runs.values()]
        if any("mean_over_domains" in m for m in means):
            cells = [f"**{m['mean_over_domains']:.3f}** ({m['interval'][0]:.3f} to "
                     f"{m['interval'][1]:.3f})" if "mean_over_domains" in m else "-" for m in means]
            lines.append(f"| **{name}** | " + " | ".join(cells) + " | |")
    return lines


def _compare_cell(row):
    if not row:
        return "-"
    if row["score"] is None:
        return f"return {row['mean_return']:.1f}"
    return f"{row['score']:.2f} ({row['interval'][0]:.2f} to {row['interval'][1]:.2f})"


def draw_comparison(runs, output):
    """Bars with intervals: for each task, and for the mean over domains, one for each run."""
    tasks = list(dict.fromkeys(task for run in runs.values() for task in run["tasks"]))
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(11, 4.2), layout="constrained")
    width, x = 0.8 / len(runs), np.arange(len(tasks) + 1)
    for k, (name, run) in enumerate(runs.items()):
        rows = [run["tasks"].get(task) for task in tasks] + [
            {"score": run.get("mean_over_domains"), **run}
        ]
        rows = [row if row and row["score"] is not None else
                {"score": np.nan, "interval": (np.nan, np.nan)} for row in rows]
        y = np.array([row["score"] for row in rows])
        ends = np.array([row["interval"] for row in rows]).T
        axis.bar(
            x + (k - (len(runs) - 1) / 2) * width,
            y,
            width,
            label=name,
            yerr=np.abs(ends - y),
            capsize=2,
            error_kw={"elinewidth": 1},
        )
    for k, task in enumerate(tasks):
        row = next(run["tasks"][task] for run in runs.values() if task in run["tasks"])
        if "constant_score" in row:
            axis.plot([k - 0.45, k + 0.45], [row["constant_score"]] * 2, "k:", linewidth=1.5,
                      label="best constant action" if k == 0 else None)
    axis.axhline(1.0, color="gray", linewidth=0.8)
    axis.axvline(len(tasks) - 0.5, color="gray", linewidth=0.8)
    many = len(tasks) > 10                      # one line each, slanted, or they run together
    labels = [task.replace("/", " " if many else "/\n").removesuffix("-v3") for task in tasks] + [
        "mean over domains" if many else "mean over\ndomains"
    ]
    axis.set_xticks(x, labels, fontsize=7, rotation=40 if many else 0, rotation_mode="anchor",
                    ha="right" if many else "center")
    axis.set_ylabel("score (0 random, 1 expert)")
    axis.set_ylim(min(0.0, axis.get_ylim()[0]), None)
    axis.legend(ncol=len(runs) + 1, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(output, dpi=110)
    plt.close(figure)
    print(f"wrote {output}", file=sys.stderr)


def choose_cards(cards, tasks):
    """The cards of the named tasks or domains; what the checkpoint does not know is refused."""
    chosen = {}
    for name in map(canonical, tasks):
        found = [task for task in cards if task == name or domain_of(task) == name]
        if not found:
            near = difflib.get_close_matches(name, cards, n=1, cutoff=0.0)
            raise SystemExit(
                f"this checkpoint has no card for {name!r}: it was trained on {', '.join(cards)}. "
                f"Nearest: {near[0]}"
            )
        chosen.update({task: cards[task] for task in found})
    return chosen or cards


def list_tasks():
    """--list: every task, whether it is held out, what it needs."""
    for task in all_tasks():
        domain, name = split_task(task)
        print(f"{task:<50}{'held out' if name in domain.heldout else '':<10}"
              f"{unavailable(task) or 'available'}")


def write_scores(scores, path):
    """As JSON, if there is a path, whole or not at all."""
    if path:
        from data import write_json
        write_json(path, scores)
        print(f"wrote {path}")


def main(args):
    """See the opening of this file."""
    if args.list:
        return list_tasks()
    if args.output:                                         # or it fails after all the work
        args.output.parent.mkdir(parents=True, exist_ok=True)
    chosen = [flag for flag in ("trials", "inspect", "embed", "export", "video", "compare")
              if getattr(args, flag)]
    if len(chosen) > 1 or args.fast and {"trials", "inspect", "embed"} & {*chosen}:
        raise SystemExit(f"--{' --'.join(chosen + ['fast'] * args.fast)}: one at a time")
    if args.trials < 0:
        raise SystemExit(f"--trials {args.trials}: at least 1")
    if args.compare:
        return compare(args.compare, args.output)
    if args.policy != "agent":
        return show_world(args)
    if args.checkpoint is None:
        raise SystemExit(
            "give --checkpoint PATH (python train.py writes runs/<name>/checkpoint.pt), or --list"
        )
    from lram import (Agent, choose_device, count_parameters, load_checkpoint,
                      model_from_checkpoint, use_kernels)
    device, _, reason = choose_device("cpu" if args.export else args.device)
    payload = load_checkpoint(args.checkpoint, device)
    model = model_from_checkpoint(payload, device)
    cards = choose_cards(payload["cards"], args.tasks)
    try:
        kernels = use_kernels(model, args.kernels)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print(
        f"{args.checkpoint}: {model.config.backbone} {model.config.size}, "
        f"{count_parameters(model):,} parameters, step {payload.get('step', '?')}; "
        f"device {reason}; kernels {kernels}"
    )
    options = dict(
        context=args.context, temperature=args.temperature, target_return=args.target_return
    )
    if args.trials:
        return show_trials(args, model, cards)
    options["temperature"] = args.temperature or 0.0
    if args.context == "pair":
        raise SystemExit("--context pair is for --trials; choose carry, window or stagger")
    if args.inspect or args.embed:
        return show_inside(args, model, cards, options)
    if args.export and args.weights != "float32":
        raise SystemExit("--export writes float32 weights; leave out --weights")
    if args.export:
        return export(model, cards, args.export, args.fast, args.seed, **options)
    num_envs, processes = args.num_envs, args.processes
    if args.fast:
        from lram import FastPolicy
        try:
            fast = FastPolicy(model, args.weights)
        except ValueError as error:
            raise SystemExit(str(error)) from None
        task = next(iter(cards))
        check_fast(model, fast, task, cards[task], args.seed)
        model, num_envs, processes = fast, 1, 1
    if args.video:
        task = next(iter(cards))
        agent = Agent(model, cards[task], seed=args.seed, **options)
        return record_video(partial(agent_policy, agent=agent), task, args.video, args.seed,
                            cards[task].get("limit"))
    summary = evaluate(model, cards, args.episodes, args.seed, num_envs, processes=processes,
                       timeout=args.timeout, by=args.normalise, **options)
    print(format_table(summary))
    write_scores(summary, args.output)
    if summary["failed"]:
        sys.exit(1)


if __name__ == "__main__":
    import tyro
    main(tyro.cli(Args, description=__doc__))
