"""The worlds: task table, environments, one rollout loop, scores; as a program, it scores a
checkpoint.

    python eval.py --checkpoint runs/mlstm/checkpoint.pt     # needs nothing but the checkpoint
    python eval.py --checkpoint ... --tasks metaworld/reach-v3 --video reach.gif
    python eval.py --checkpoint ... --fast                   # acts through the compiled policy
    python eval.py --checkpoint ... --tasks metaworld/reach-v3 --export reach.pt2   # for a robot
    python eval.py --compare runs/*/scores.json --output scores.png
    python eval.py --list                                    # every task, and what is missing

Source: LRAM (arXiv 2410.22391), section 4 and appendix B; simulators: Meta-World (v3), DMControl,
Atari (ALE), Dark-Room (Laskin et al., 2022). Each world keeps one contract:

    observation    float32 vector (S,) with S <= 204, or a gray uint8 image (1, 64, 64)
    action         Discrete(n <= 18), or Box(-1, 1) of at most 8 dimensions
    reset(seed=s)  alone determines the episode, also when one instance is reset thousands of times
    end            out of time is `truncated`; `terminated` is an end of the task itself

Scores are normalised: 0 is the random policy, 1 the mean of the reference (the expert that made the
data),

    score = (return - random) / (reference - random)

averaged over episodes, then over the tasks of a domain, then over domains, so that each counts the
same. The interval is a 95 % bootstrap, stratified: episodes are redrawn within their task (Agarwal
et al., 2021, rliable).

Not included: simulator processes in parallel, rendering of MuJoCo without an OpenGL library.
"""

import difflib
import importlib.util
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
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
        import metaworld                                   # 0.4 s: only who uses it pays for it
        tasks = metaworld.ALL_V3_ENVIRONMENTS
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
    """Dark-Room with the goals of `split` ("train" or "heldout"). See DarkRoom."""
    return DarkRoom(split, render_mode="rgb_array" if render else None)


# ------------------------------------------------------------------------------------------- Atari
class InstantStart(gym.Wrapper):
    """Resets an ALE game by restoring its first moment instead of loading its ROM again.

    ALE's own reset(seed) loads the ROM for each new seed (70 ms against 3); its reset() without a
    seed does not, but then some games remember the last episode (Freeway's traffic, for one).
    Without sticky actions the emulator draws no random numbers, so the seed only has to reach
    `np_random`, from which AtariPreprocessing draws its number of initial no-ops.
    """

    def __init__(self, env):
        super().__init__(env)
        env.reset()
        env.step(0)     # one frame in: Q*bert's memory is not complete at the very start
        self.start = self.unwrapped.ale.cloneState()

    def reset(self, *, seed=None, options=None):
        game = self.unwrapped
        if seed is not None:
            game.np_random = np.random.default_rng(seed)
        game.ale.restoreState(self.start)
        return game._get_obs(), game._get_info()


class ChannelFirst(gym.ObservationWrapper):
    """(64, 64) -> (1, 64, 64)."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (1, 64, 64), np.uint8)

    def observation(self, picture):
        return picture[None]


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
        raise ValueError(f"no such game; nearest: {', '.join(near)}")
    env = gym.make(f"ALE/{name}-v5", frameskip=1, repeat_action_probability=0.0,
                   full_action_space=True, obs_type="grayscale",       # cheaper than unused RGB
                   render_mode="rgb_array" if render else None)
    env = gym.wrappers.AtariPreprocessing(InstantStart(env), noop_max=30, frame_skip=4,
                                          screen_size=64, grayscale_obs=True,
                                          terminal_on_life_loss=False)
    return gym.wrappers.TimeLimit(ChannelFirst(env), ATARI_STEPS)


# -------------------------------------------------------------------------------------- task table
@dataclass(frozen=True)
class Domain:
    """One row: how to make tasks, what to install, how rewards are read, how scores are taken."""
    make: Callable                      # (task name, render) -> gymnasium.Env
    package: str                        # what `import` needs
    install: str                        # what pip needs
    tasks: tuple                        # the paper's training split
    heldout: tuple = ()                 # and what it holds out; other tasks can be named too
    # rewards and returns-to-go are divided by it (SPEC: the paper's values)
    reward_scale: float = 1.0
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
                       constant_rtg=80.0, episodes=80, steps=100),
    "metaworld": Domain(
        make_metaworld, "metaworld", "metaworld==3.1.1 packaging",
        tuple(f"{name}-v3" for name in _METAWORLD.split()),
        ("bin-picking-v3", "box-close-v3", "door-lock-v3", "door-unlock-v3", "hand-insert-v3"),
        reward_scale=200.0),
    "dmcontrol": Domain(
        make_dmcontrol, "dm_control", "dm-control==1.0.28",
        ("ball_in_cup-catch", "cartpole-swingup", "cheetah-run", "finger-spin", "finger-turn_easy",
         "fish-upright", "hopper-stand", "point_mass-easy", "reacher-easy", "walker-run",
         "walker-stand"),
        ("cartpole-balance", "finger-turn_hard", "pendulum-swingup", "reacher-hard", "walker-walk"),
        reward_scale=100.0, steps=1000),
    "atari": Domain(
        make_atari, "ale_py", "ale-py==0.12.1 opencv-python-headless", tuple(_ATARI.split()),
        ("alien", "ms_pacman", "pong", "space_invaders", "star_gunner"),
        reward_scale=20.0, clip_rewards=True, episodes=8, steps=2000),
}


def all_tasks():
    """The table as names "domain/task"."""
    return [
        f"{name}/{task}"
        for name, domain in DOMAINS.items()
        for task in domain.tasks + domain.heldout
    ]


def expand_tasks(names, heldout=False, root=None):
    """Names of tasks and of whole domains -> tasks; a domain stands for its training split, or with
    heldout=True for its held-out one. A folder below root is a task whatever its name.
    """
    tasks = []
    for name in names:
        if name in DOMAINS:
            part = DOMAINS[name].heldout if heldout else DOMAINS[name].tasks
            tasks += [f"{name}/{task}" for task in part]
        else:
            if not (root and "/" in name and (Path(root) / name).is_dir()):
                split_task(name)                # refuses what does not exist
            tasks.append(name)
    return tuple(dict.fromkeys(tasks))


def split_task(task):
    """ "metaworld/reach-v3" -> (Domain, "reach-v3"); SystemExit names the nearest that exists."""
    domain, _, name = task.partition("/")
    if domain in DOMAINS and name:
        return DOMAINS[domain], name
    near = difflib.get_close_matches(task, all_tasks(), n=3, cutoff=0.3)
    raise SystemExit(
        f"task {task!r} does not exist; tasks are named domain/task, and a domain alone "
        f"({', '.join(DOMAINS)}) is all of it"
        + (f"; nearest: {', '.join(near)}" if near else "")
        + ". See: python eval.py --list"
    )


def install_line(task):
    """None if the task's simulator is installed, else the line that installs it."""
    if task.split("/")[0] not in DOMAINS:       # data that were converted: to train on alone
        return "eval.py has none for this domain"
    domain, _ = split_task(task)
    found = importlib.util.find_spec(domain.package) is not None
    return None if found else f"pip install {domain.install}"


def make_env(task, render=False, limit=None):
    """The environment of "domain/task", cut at `limit` steps if given; SystemExit says what to do
    where there is none.
    """
    domain, name = split_task(task)
    missing = install_line(task)
    if missing:
        raise SystemExit(
            f"{task} needs a simulator that is not installed; install it with: {missing}"
        )
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
    missing = install_line(task)
    if missing:
        return f"its simulator is not installed ({missing})"
    if "made_by" in card and "source" not in card:      # made in this very world
        return None
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
    actions: np.ndarray         # (T,) int or (T, A) float32, as the policy asked (see rollout)
    rewards: np.ndarray         # (T,) float32, raw
    lives: np.ndarray           # (T,) int after each step, 0 where the world has none
    success: bool               # info["success"] at any step
    terminated: bool


def rollout(make, make_policy, seeds, num_envs=8, keep_states=True, advance=lambda steps: None):
    """Play one episode per seed, num_envs at a time in lockstep; yields each Episode as it ends.

    make() -> gymnasium.Env. make_policy(envs) -> act(obs, reward, done) -> actions, all with a
    leading batch axis: reward is that of the step before, done marks the rows whose episode has
    just begun. The one loop for experts, random policies and trained agents. advance(steps) is
    called for progress.
    """
    n, queue = min(num_envs, len(seeds)), list(seeds)
    envs = SyncVectorEnv([make] * n, autoreset_mode=AutoresetMode.DISABLED)
    try:
        act = make_policy(envs)
        row_seeds, queue = queue[:n], queue[n:]
        obs, info = envs.reset(seed=row_seeds)
        reward, done = np.zeros(n), np.ones(n, bool)
        active, logs = np.ones(n, bool), [[] for _ in range(n)]
        while active.any():
            action = act(obs, reward, done)
            next_obs, reward, terminated, truncated, info = envs.step(action)
            taken = info.get("executed", action)        # data.NoisyActions: not what was asked for
            lives, success = info.get("lives", np.zeros(n, int)), info.get("success", np.zeros(n))
            for row in np.flatnonzero(active):
                state = np.array(obs[row]) if keep_states else None
                logs[row].append(
                    (state, np.array(taken[row]), reward[row], lives[row], success[row])
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
    states, actions, rewards, lives, success = zip(*log)
    return Episode(
        seed,
        np.stack(states) if keep_states else None,
        np.stack(actions),
        np.array(rewards, np.float32),
        np.array(lives, np.int64),
        any(success),
        terminated,
    )


def random_policy(envs, seed=0):
    """Uniform actions."""
    space, rng = envs.single_action_space, np.random.default_rng(seed)
    if isinstance(space, gym.spaces.Discrete):
        return lambda obs, reward, done: rng.integers(space.n, size=len(done))
    return lambda obs, reward, done: rng.uniform(-1, 1, (len(done), *space.shape)).astype(
        np.float32
    )


def constant_policy(envs, action):
    """The same action always: what a policy that ignores the picture can reach."""
    return lambda obs, reward, done: np.full(len(done), action)


def agent_policy(envs, agent):
    """A trained lram.Agent."""
    agent.begin(envs.num_envs)
    return agent.act


# ------------------------------------------------------------------------------------------ scores
def normalise(returns, card):
    """Raw returns -> score: 0 the random policy, 1 the reference."""
    span = card["reference_score"] - card["random_score"]
    return (np.asarray(returns, np.float64) - card["random_score"]) / span


def bootstrap_interval(groups, statistic, draws=2000, seed=0):
    """95 % interval of statistic(groups), each of the arrays redrawn within itself (stratified)."""
    rng = np.random.default_rng(seed)
    values = [statistic([rng.choice(g, len(g)) for g in groups]) for _ in range(draws)]
    return [float(x) for x in np.percentile(values, [2.5, 97.5])]


def mean_over_domains(groups, domains):
    """Scores of each task (a list of arrays) -> mean over episodes, then tasks, then domains."""
    by_domain = {}
    for scores, domain in zip(groups, domains):
        by_domain.setdefault(domain, []).append(scores.mean())
    return float(np.mean([np.mean(tasks) for tasks in by_domain.values()]))


def interquartile_mean(groups):
    """Mean of the middle half of all episodes: robust against single disasters and records."""
    x = np.sort(np.concatenate(groups))
    cut = len(x) // 4
    return float(x[cut:len(x) - cut].mean())


def summarise(results):
    """{task: {"returns", "card"}} -> the content of scores.json: by task, by domain, overall."""
    tasks, groups = {}, {}
    for task, result in results.items():
        card = result["card"]
        scores = groups[task] = normalise(result["returns"], card)
        low, high = bootstrap_interval([scores], lambda g: g[0].mean())
        tasks[task] = {
            "score": float(scores.mean()), "interval": [low, high], "episodes": len(scores),
            "mean_return": float(np.mean(result["returns"])), "success": result.get("success"),
            "random_return": card["random_score"], "reference_return": card["reference_score"],
            "heldout": card["heldout"], "target_return": card["target_return"],
            "best_constant_action": result.get("constant"),
        }
        if result.get("constant"):
            tasks[task]["constant_score"] = float(
                normalise(result["constant"]["mean_return"], card)
            )
    trained = [t for t in tasks if not tasks[t]["heldout"]]
    summary = {"tasks": tasks}
    if trained:
        chosen, domains = [groups[t] for t in trained], [t.split("/")[0] for t in trained]
        within = lambda domain: [g.mean() for g, d in zip(chosen, domains) if d == domain]
        summary["domains"] = {d: float(np.mean(within(d))) for d in dict.fromkeys(domains)}
        summary["mean_over_domains"] = mean_over_domains(chosen, domains)
        summary["interval"] = bootstrap_interval(
            chosen, partial(mean_over_domains, domains=domains)
        )
        summary["interquartile_mean"] = interquartile_mean(chosen)
    return summary


def format_table(summary):
    """The summary as a table for people."""
    heading = f"{'task':<34}{'return':>9}{'random':>9}{'expert':>9}{'score':>8}"
    lines = [heading + f"   95 % interval  {'constant':>9}"]
    for task, row in summary["tasks"].items():
        constant = f"{row['constant_score']:.2f}" if "constant_score" in row else ""
        low, high = row["interval"]
        name = task + (" (held out)" if row["heldout"] else "")
        lines.append(
            f"{name:<34}{row['mean_return']:>9.1f}{row['random_return']:>9.1f}"
            f"{row['reference_return']:>9.1f}{row['score']:>8.2f}   {low:>5.2f} to {high:<5.2f} "
            f"{constant:>9}"
        )
    if "mean_over_domains" in summary:
        lines += ["", "  ".join(f"{d} {s:.2f}" for d, s in summary["domains"].items())]
        low, high = summary["interval"]
        lines.append(
            f"mean over domains {summary['mean_over_domains']:.3f} ({low:.3f} to {high:.3f}), "
            f"interquartile mean over episodes {summary['interquartile_mean']:.3f}; "
            "1 = expert, 0 = random; held-out tasks not in the means"
        )
    return "\n".join(lines)


def score_task(
    model, task, card, episodes, seed, num_envs, agent_options, advance=lambda steps: None
):
    """A model's returns on one task, and those of the best constant action on the same seeds."""
    from lram import Agent
    seeds = [seed + k for k in range(episodes)]
    play = partial(
        rollout, partial(make_env, task, limit=card.get("limit")), seeds=seeds, num_envs=num_envs,
        keep_states=False
    )
    agent = Agent(model, card, seed=seed, **agent_options)
    played = list(play(partial(agent_policy, agent=agent), advance=advance))
    result = {"returns": [float(e.rewards.sum()) for e in played], "card": card,
              "success": float(np.mean([e.success for e in played]))}
    if card.get("constant"):            # what a policy that ignores the observation can reach
        action = card["constant"]["action"]
        returns = [e.rewards.sum() for e in play(partial(constant_policy, action=action))]
        result["constant"] = {"action": action, "mean_return": float(np.mean(returns))}
    return result


def _score_in_worker(weights, config, *args):
    """score_task in a process of its own, on one thread."""
    import torch
    from lram import LRAM
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    model = LRAM(config)
    model.load_state_dict(torch.load(io.BytesIO(weights), weights_only=True))
    return score_task(model, *args)


def evaluate(
    model,
    cards,
    episodes=None,
    seed=EVALUATION_SEED,
    num_envs=20,
    quiet=False,
    processes=None,
    **agent_options,
):
    """Score a model on the tasks of cards ({task: card}); returns the content of scores.json.

    agent_options go to lram.Agent (context, temperature, target_return). A task whose simulator is
    missing is named and left out. processes: tasks played side by side, one thread each (default:
    as many as there are cores where the model is on the CPU and the work is worth starting
    processes).
    """
    import torch
    from tqdm import tqdm
    reasons = {task: cannot_play(task, card) for task, card in cards.items()}
    counts = {t: episodes or split_task(t)[0].episodes for t in cards if not reasons[t]}
    for task in cards.keys() - counts.keys():
        print(f"{task} left out: {reasons[task]}", file=sys.stderr)
    cost = {task: n * split_task(task)[0].steps for task, n in counts.items()}
    on_cpu = next(model.parameters()).device.type == "cpu"
    worth = on_cpu and len(counts) > 1 and sum(cost.values()) > 20_000
    processes = processes or (min(os.cpu_count() or 1, 8) if worth else 1)
    results = dict.fromkeys(counts)
    with tqdm(
        total=sum(cost.values()),
        desc="evaluate",
        unit="step",
        unit_scale=True,
        disable=quiet,
        leave=False,
        mininterval=0.5,
    ) as bar:
        if processes == 1:
            for task, n in counts.items():
                bar.set_postfix_str(task)
                results[task] = score_task(
                    model, task, cards[task], n, seed, num_envs, agent_options, bar.update
                )
            return summarise(results)
        weights = io.BytesIO()
        torch.save(model.state_dict(), weights)
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            longest_first = sorted(counts, key=cost.get, reverse=True)
            futures = {
                pool.submit(
                    _score_in_worker,
                    weights.getvalue(),
                    model.config,
                    task,
                    cards[task],
                    counts[task],
                    seed,
                    num_envs,
                    agent_options,
                ): task
                for task in longest_first
            }
            for future in as_completed(futures):
                task = futures[future]
                results[task] = future.result()
                bar.set_postfix_str(task)
                bar.update(cost[task])
    return summarise(results)


# ----------------------------------------------------------------------------------------- program
class _FrameGrabber(gym.Wrapper):
    """Keeps every second picture of an episode."""

    def __init__(self, env):
        super().__init__(env)
        self.frames, self.count = [], 0

    def step(self, action):
        if self.count % 2 == 0:
            self.frames.append(self.env.render())
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
    return *(np.stack(x) for x in zip(*logits)), np.mean(same), 1e3 * np.median(times[5:], axis=0)


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
        self.start = [torch.full(shape, float(value), dtype=getattr(torch, dtype))
                      for shape, dtype, value in json.loads(text)["start"]]

    def begin(self, batch_size):
        self.state = self.start

    def act(self, obs, reward, done):
        import torch
        reward = torch.tensor(reward, dtype=torch.float32)
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


def record_video(agent, task, path, seed=EVALUATION_SEED):
    """One episode as an animated GIF (for MuJoCo this needs an OpenGL library)."""
    from PIL import Image
    env = _FrameGrabber(make_env(task, render=True))
    (episode,) = rollout(lambda: env, partial(agent_policy, agent=agent), [seed], keep_states=False)
    frames = [Image.fromarray(frame) for frame in env.frames]
    duration = max(20, 2000 // env.metadata.get("render_fps", 30))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, loop=0)
    print(f"wrote {path}: {task}, {len(frames)} frames, return {episode.rewards.sum():.1f}")


@dataclass
class Args:
    """Score a checkpoint in its environments."""
    checkpoint: Path | None = None
    """Written by train.py; holds the model and the cards of its tasks, nothing else is needed."""
    tasks: tuple[str, ...] = ()
    """Only these of the checkpoint's tasks, e.g. metaworld/reach-v3 (default: all)."""
    episodes: int | None = None
    """Episodes per task (default: 20; Dark-Room 80, Atari 8)."""
    seed: int = EVALUATION_SEED
    """Episode k uses seed + k. The default seeds are used for nothing else."""
    context: Literal["carry", "window", "stagger"] | None = None
    """Acting beyond training's windows, see lram.Agent (default: carry; gpt: stagger)."""
    temperature: float = 0.0
    """0 acts greedily; above, actions are sampled."""
    target_return: float | None = None
    """Return to ask for, in raw reward (default: each task's own, the maximum in its data)."""
    num_envs: int = 20
    """Environments stepped together."""
    processes: int | None = None
    """Tasks played side by side on a CPU (default: one per core)."""
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
    compare: tuple[Path, ...] = ()
    """Instead of scoring: a table of several runs' scores.json (with --output also a picture)."""
    list: bool = False
    """Print the task table and what is missing for each, and stop."""


def compare(paths, output):
    """Several scores.json -> a Markdown table on stdout, and a picture if output is given."""
    runs = {path.parent.name: json.loads(path.read_text()) for path in paths}
    tasks = list(dict.fromkeys(task for run in runs.values() for task in run["tasks"]))
    print(
        "| task | "
        + " | ".join(runs)
        + " | best constant action |\n"
        + "|---" * (len(runs) + 2)
        + "|"
    )
    for task in tasks:
        rows = [run["tasks"].get(task) for run in runs.values()]
        cells = [
            f"{r['score']:.2f} ({r['interval'][0]:.2f} to {r['interval'][1]:.2f})" if r else "-"
            for r in rows
        ]
        constant = next(
            (f"{r['constant_score']:.2f}" for r in rows if r and "constant_score" in r), ""
        )
        held = " (held out)" if any(r and r["heldout"] for r in rows) else ""
        print(f"| {task}{held} | " + " | ".join(cells) + f" | {constant} |")
    means = [f"**{r['mean_over_domains']:.3f}** ({r['interval'][0]:.3f} to {r['interval'][1]:.3f})"
             for r in runs.values()]
    print("| **mean over domains** | " + " | ".join(means) + " | |")
    if output is None:
        return
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(11, 4.2), layout="constrained")
    width, x = 0.8 / len(runs), np.arange(len(tasks) + 1)
    for k, (name, run) in enumerate(runs.items()):
        rows = [run["tasks"].get(task) for task in tasks] + [
            {"score": run["mean_over_domains"], **run}
        ]
        y = np.array([r["score"] if r else np.nan for r in rows])
        ends = np.array([r["interval"] if r else (np.nan, np.nan) for r in rows]).T
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
    labels = [task.replace("/", "/\n").removesuffix("-v3") for task in tasks] + [
        "mean over\ndomains"
    ]
    axis.set_xticks(x, labels, rotation=0, fontsize=7)
    axis.set_ylabel("score (0 random, 1 expert)")
    axis.set_ylim(min(0.0, axis.get_ylim()[0]), None)
    axis.legend(ncol=len(runs) + 1, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(output, dpi=110)
    plt.close(figure)
    print(f"wrote {output}", file=sys.stderr)


def choose_cards(cards, tasks):
    """The cards of the named tasks; a task that the checkpoint does not know is refused."""
    for task in tasks:
        if task not in cards:
            near = difflib.get_close_matches(task, cards, n=1, cutoff=0.0)
            raise SystemExit(
                f"this checkpoint has no card for {task!r}: it was trained on {', '.join(cards)}. "
                f"Nearest: {near[0]}"
            )
    return {task: cards[task] for task in tasks or cards}


def main(args):
    """See the opening of this file."""
    if args.list:
        for task in all_tasks():
            print(f"{task:<36}{install_line(task) or 'available'}")
        return
    if args.compare:
        return compare(args.compare, args.output)
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
        return record_video(
            Agent(model, cards[task], seed=args.seed, **options), task, args.video, args.seed
        )
    summary = evaluate(
        model, cards, args.episodes, args.seed, num_envs, processes=processes, **options
    )
    print(format_table(summary))
    if args.output:
        args.output.write_text(json.dumps(summary, indent=1))
        print(f"wrote {args.output}")


if __name__ == "__main__":
    import tyro
    main(tyro.cli(Args, description=__doc__))
