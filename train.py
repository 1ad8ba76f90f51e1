"""Training: windows -> weights. One loop, top to bottom.

    python train.py --backbone mlstm               # makes a four-domain data set, trains, scores
    python train.py --backbone gpt                 # another backbone on the same data
    python train.py --backbone mlstm --resume      # after an interruption; bit for bit on a CPU
    python train.py --backbone mlstm --size 16m    # a size of the paper, with its settings
    torchrun --nproc-per-node=4 train.py ...       # four processes, one per GPU (or CPU core)

Source: LRAM (arXiv 2410.22391), section 4.1 and appendix C. Every update accumulates one
micro-batch per domain, so that each domain counts the same; behaviour cloning with cross-entropy on
discretised actions.

Settings that are not given follow from the size: those of the paper for its sizes, and for `tiny`,
a size of our own, what reaches a working agent in minutes on a laptop (see SETTINGS; README lists
the differences).

Several processes (torchrun) share each micro-batch out: every process takes its windows of the same
global batch and the gradients are averaged (DistributedDataParallel), so that the loss is that of
one process. Process 0 keeps log and checkpoint; validation and evaluation are shared out too.

Not included: models that do not fit one device, mixtures that weigh domains differently.
"""
import atexit
import contextlib
import dataclasses
import datetime
import glob
import itertools
import json
import math
import os
import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from eval import EVALUATION_SEED, expand_tasks, format_table, play, summarise
from lram import (LRAM, Agent, Config, action_loss, action_rows, action_to_bin, choose_device,
                  count_parameters, load_checkpoint, save_checkpoint, use_kernels)

# name: (for tiny, for the paper's sizes)
SETTINGS = {
    "context": (20, 50), "image_context": (10, 50), "batch_size": (12, 128),
    "image_batch_size": (8, 128), "steps": (1000, 33_333), "lr": (2e-3, 1e-4), "warmup": (50, 667),
    "clip": (1.0, 0.25), "soft_sigma": (3.0, 0.0), "early_readout": (True, False),
    "standardise": (True, False), "cnn": ((8, 16, 16), (16, 32, 32)),
}


@dataclass
class Args:
    """Train a recurrent action model on several domains at once and score it in them."""
    backbone: Literal["mlstm", "xlstm", "slstm", "mamba", "gpt"] = "mlstm"
    """Block family. xlstm mixes mLSTM and sLSTM blocks (see --slstm-at)."""
    size: Literal["tiny", "16m", "48m", "110m", "206m", "408m",
                  "16m-half", "48m-half", "110m-half", "206m-half"] = "tiny"
    """Width and depth; tiny trains on a laptop CPU in minutes, the others are the paper's."""
    name: str | None = None
    """Folder below runs/ (default: backbone and size, numbered rather than overwrite a run); may be
    one in another, as in ablations/actions."""
    resume: bool = False
    """Continue the run of this name from its last checkpoint."""

    tasks: tuple[str, ...] = data.DEFAULT_TASKS
    """The mixture: tasks named domain/task or gym:ID, domains, or laptop (a taste of every domain);
    `python eval.py --list` shows them."""
    heldout: tuple[str, ...] | None = None
    """Tasks, or domains' held-out tasks, that are scored but never trained on (default:
    darkroom/heldout beside darkroom/train)."""
    data_root: Path = Path("datasets")
    """Where the trajectories live; what is missing is generated."""
    episodes_per_task: int | None = None
    """Trajectories to generate per task (default: each recipe's own)."""
    on_bad: Literal["refuse", "skip"] = "refuse"
    """What to do with a malformed file: stop and name it, or name it and go on."""
    top_fraction: float = 1.0
    """Part of each task's trajectories to use, best returns first (paper's fine-tuning: 0.05)."""

    steps: int | None = None
    """Optimizer steps, each over one micro-batch of every domain."""
    context: int | None = None
    """C: environment steps per window (tokens: 3 C)."""
    image_context: int | None = None
    """The same for domains with images, at most C: short windows show more different pictures."""
    align: int = 1
    """Windows begin at multiples of this many steps. In-context learning: --align 100 --context 200
    makes each window two whole episodes, one after the other, of a Dark-Room learning history."""
    batch_size: int | None = None
    """Windows per domain and step."""
    image_batch_size: int | None = None
    """The same for domains with images, which cost more."""
    lr: float | None = None
    """Peak learning rate of AdamW (betas 0.9, 0.999); cosine to 1e-6."""
    warmup: int | None = None
    """Steps of linear warm-up."""
    clip: float | None = None
    """Largest norm of the gradient."""
    weight_decay: float = 0.01
    """On matrices only."""
    soft_sigma: float | None = None
    """Width in bins of a Gaussian target over neighbouring bins; 0: one-hot (the paper)."""
    early_readout: bool | None = None
    """With images, learn the action from s_t too (the paper: no); acting still reads it at R_t."""
    standardise: bool | None = None
    """Observations with mean 0 and deviation 1 per task, coordinate and pixel (the paper: no)."""

    dim: int | None = None
    """Width D (default: by size)."""
    layers: int | None = None
    """Blocks (default: by size)."""
    heads: int | None = None
    """Heads of mLSTM, sLSTM or attention (default: 4; gpt by size)."""
    slstm_at: tuple[int, ...] | None = None
    """Layers of xlstm that are sLSTM blocks, counted from 0 (default: by size, in low layers)."""
    dropout: float = 0.0
    """On residual branches (the paper's ablation: 0.1)."""
    tokens: str = "r,s,rtg"
    """Tokens of a step, a part of a,r,s,rtg in this order; a: last action; s: behaviour cloning."""
    bins: int = 256
    """Of each continuous action dimension."""
    cnn: tuple[int, ...] | None = None
    """Channels of the three image stages."""
    init_from: Path | None = None
    """Start from the weights of this checkpoint (fine-tuning)."""

    seed: int = 0
    """Of initialisation, sampling and dropout."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products (autocast); auto: bfloat16 on a GPU, float32 on a CPU."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """What runs the recurrences: PyTorch or kernels.py; auto: the kernels on a GPU."""
    compile: bool = False
    """torch.compile the model: slow to start, faster after; pays on a GPU and for long runs."""
    workers: int | None = None
    """Processes that read windows ahead (default: 4 with a GPU, none on a CPU: its cores train)."""
    validate_every: int | None = None
    """Steps between validations (default: a sixth of the run)."""
    evaluate_every: int = 0
    """Steps between scores in the environments during training; 0: at the end only."""
    episodes: int | None = None
    """Episodes per task for a score (default: by domain); 0: no score."""
    save_every: int = 200
    """Steps between checkpoints."""
    profile: bool = False
    """Print where the time goes: data, forward, backward, optimizer."""


def resolve(args):
    """Fill what follows from the size."""
    column = 0 if args.size == "tiny" else 1
    chosen = {key: values[column] for key, values in SETTINGS.items() if getattr(args, key) is None}
    args = dataclasses.replace(args, **chosen)
    if args.align < 1:
        raise SystemExit(f"--align {args.align}: windows begin at multiples of at least 1 step")
    if args.episodes is not None and args.episodes < 0:
        raise SystemExit(f"--episodes {args.episodes}: give 1 or more, or 0 for no score")
    if args.image_context > args.context:
        args = dataclasses.replace(args, image_context=args.context)
    every = args.validate_every or max(1, math.ceil(args.steps / 6))
    tasks = expand_tasks(args.tasks, root=args.data_root)
    heldout = data.default_heldout(tasks) if args.heldout is None else args.heldout
    return dataclasses.replace(args, validate_every=every, tasks=tasks,
                               heldout=expand_tasks(heldout, heldout=True,
                                                    root=args.data_root))


def run_folder(args):
    """runs/<name>: a fresh one, made here, or with --resume the newest that has a checkpoint."""
    base = args.name or (args.backbone if args.size == "tiny" else f"{args.backbone}-{args.size}")
    if Path(base).is_absolute() or ".." in Path(base).parts or not Path(base).name:
        raise SystemExit(f"--name {base}: give the name of a folder below runs/")
    parent, base = (Path("runs") / base).parent, Path(base).name
    number = lambda path: int(path.name[len(base) + 1:] or 1)               # "mlstm-3" -> 3
    existing = [path for path in parent.glob(f"{glob.escape(base)}*")
                if path.name == base or re.fullmatch(r"-\d+", path.name[len(base):])]
    existing.sort(key=number)
    if args.resume:
        with_checkpoint = [p for p in existing if (p / "checkpoint.pt").exists()]
        if not with_checkpoint:
            raise SystemExit(f"nothing to resume: {parent / base} holds no checkpoint; "
                             "start without --resume")
        return with_checkpoint[-1]
    parent.mkdir(parents=True, exist_ok=True)
    for k in itertools.count(number(existing[-1]) + 1 if existing else 1):
        folder = parent / (base if k == 1 else f"{base}-{k}")
        with contextlib.suppress(FileExistsError):      # by a training that started beside this one
            folder.mkdir()
            atexit.register(_give_up, folder)
            return folder


def _give_up(folder):
    """A run that ended before it wrote anything leaves no folder."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def resumed_args(args, saved):
    """The settings of the interrupted run; a flag that contradicts them is refused."""
    free = ("resume", "name", "device", "kernels", "save_every", "profile", "episodes",
            "evaluate_every", "workers")
    saved = {k: v for k, v in saved.items() if k in {f.name for f in dataclasses.fields(Args)}}
    saved["data_root"] = Path(saved["data_root"])
    # a flag that was typed counts, even if it asks for what is the default
    typed = {word.split("=")[0].replace("_", "-") for word in sys.argv if word.startswith("--")}
    for field in dataclasses.fields(Args):
        given = getattr(args, field.name)
        if field.name in ("tasks", "heldout") and given:        # the run's are written out in full
            given = expand_tasks(given, field.name == "heldout", saved["data_root"])
        flag = "--" + field.name.replace("_", "-")
        asked = given != field.default or {flag, "--no" + flag[1:]} & typed
        if field.name in free:
            saved[field.name] = given
        elif asked and str(given) != str(saved.get(field.name)):
            raise SystemExit(f"{flag} {given} contradicts the run that is resumed "
                             f"({saved.get(field.name)}): leave it out, or start a new --name")
    return Args(**saved)


def choose_workers(args, device, world):
    """Fill in the number of reading processes; returns args and the reason in words."""
    if min(args.batch_size, args.image_batch_size) < world:
        raise SystemExit(f"a batch of {min(args.batch_size, args.image_batch_size)} windows cannot "
                         f"be shared among {world} processes: give a larger --batch-size and "
                         "--image-batch-size")
    if args.workers is not None:
        return args, f"{args.workers} reading processes: asked for"
    if device.type == "cpu":
        return dataclasses.replace(args, workers=0), "no reading processes: the cores train"
    return dataclasses.replace(args, workers=4), "4 reading processes: the GPU does not wait"


def learning_rate(step, args):
    """Linear warm-up, then a cosine to 1e-6."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return 1e-6 + (args.lr - 1e-6) * 0.5 * (1 + math.cos(math.pi * progress))


def to_tensors(batch, config, device):
    """A batch of data.collate -> arguments of LRAM.forward, targets and their mask, as tensors."""
    continuous = batch["action"].ndim == 3
    target = action_to_bin(batch["action"], config.bins) if continuous else batch["action"]
    last = None
    if "a" in config.tokens:
        last = action_rows(batch["previous"], config.bins)
        last = np.where(batch["known"][..., None], last, -1)
        last = torch.as_tensor(last, device=device)                         # (B, C, A)
    obs, reward, rtg, target, mask = (torch.as_tensor(x, device=device) for x in (
        batch["obs"], batch["reward"], batch["rtg"], target, batch["mask"]))
    inputs = dict(obs=obs, reward=reward, rtg=rtg, last_action=last,
                  action_dims=batch["action"].shape[2] if continuous else 0)
    return inputs, target, mask


def join_processes(device):
    """(rank, number of processes) under torchrun, else (0, 1); all but process 0 fall silent."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        gpu = device != "cpu" and torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # process 0 makes data and may score for long while the others wait
        dist.init_process_group("nccl" if gpu else "gloo",
                                timeout=datetime.timedelta(days=1))
        if rank:
            sys.stdout = open(os.devnull, "w")
    return rank, world


def leave_processes():
    """End a process of torchrun: all together, and without Python's own shutdown.

    gloo's threads may still hold a tensor, and to free it while Python shuts down aborts the
    process, now and then (github.com/pytorch/pytorch/pull/179291): all is written by now.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def share(value, world):
    """A picklable value of process 0, in every process."""
    box = [value]
    if world > 1:
        dist.broadcast_object_list(box)
    return box[0]


class Windows(torch.utils.data.Dataset):
    """Item k: the micro-batch of domain k % D at step first_step + k // D, this process's part.

    For a DataLoader, whose workers read ahead. A refusal (SystemExit) becomes its message, because
    a worker cannot stop the program.
    """

    def __init__(self, run, first_step):
        self.mixture, self.seed, self.part = run.mixture, run.args.seed, (run.rank, run.world)
        self.shapes = [(domain, *run.window_shape(domain)) for domain in run.mixture.domains]
        self.first_step, self.steps = first_step, run.args.steps

    def __len__(self):
        return (self.steps - self.first_step) * len(self.shapes)

    def __getitem__(self, k):
        step, number = divmod(k, len(self.shapes))
        try:
            return self.mixture.sample(*self.shapes[number], self.seed, self.first_step + step,
                                       self.part)
        except SystemExit as error:
            return str(error)


def unchanged(batch):
    """What a DataLoader should do to a batch."""
    return batch


class Log:
    """runs/<name>/log.jsonl, one JSON object per line; a resume drops lines past the checkpoint."""

    def __init__(self, path, step):
        self.path, self.rows = path, []
        if path is None:                        # the silent log of all processes but one
            return
        old = path.read_text().splitlines() if path.exists() else []
        for line in old:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:        # the line that a kill cut short
                continue
            if row["step"] < step:
                self.rows.append(row)
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def write(self, **row):
        """Append one line."""
        if self.path:
            self.rows.append(row)
            try:
                with open(self.path, "a") as f:
                    f.write(json.dumps(row) + "\n")
            except OSError as error:
                raise SystemExit(f"cannot write {self.path} ({error}): free some space; then, if "
                                 "there is a checkpoint.pt beside it, add --resume") from None


def draw_curves(rows, path, title):
    """Training loss and validation perplexity per domain against the step."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, key, label in ((axes[0], "loss", "training loss (nats)"),
                             (axes[1], "perplexity", "validation perplexity")):
        points = [r for r in rows if key in r]
        for domain in (points[-1][key] if points else {}):
            y = np.array([r[key].get(domain, np.nan) for r in points])
            width = max(1, len(y) // 60)        # a running mean, so that the trend shows
            if key == "loss" and len(y) >= width:
                y = np.convolve(y, np.ones(width) / width, mode="valid")
            axis.plot([r["step"] for r in points][-len(y):], y, label=domain,
                      marker="." if len(y) < 20 else None)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(label)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@dataclass
class Run:
    """What the functions below share."""
    args: Args
    folder: Path
    device: torch.device
    dtype: torch.dtype
    mixture: data.Mixture
    model: LRAM
    optimizer: torch.optim.Optimizer
    log: Log
    rank: int = 0
    world: int = 1

    def total(self, values):
        """A list of numbers, summed over all processes."""
        if self.world == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def gather(self, value):
        """[value of process 0, of process 1, ...], in every process."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def autocast(self):
        """Matrix products in self.dtype."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def window_shape(self, domain):
        """(windows, steps) of a micro-batch: other ones where observations are images."""
        image = any(card["domain"] == domain and card["observation"]["kind"] == "image"
                    for card in self.mixture.cards.values())
        return ((self.args.image_batch_size, self.args.image_context) if image else
                (self.args.batch_size, self.args.context))


def save(run, step):
    """Everything that a continuation needs, and the cards, so that eval.py needs nothing else."""
    rng = run.gather(torch.get_rng_state())
    if run.rank:
        return
    args = dataclasses.asdict(run.args)
    args = {key: str(x) if isinstance(x, Path) else x for key, x in args.items()}
    save_checkpoint(run.folder / "checkpoint.pt", {
        "model": run.model.state_dict(), "model_config": dataclasses.asdict(run.model.config),
        "cards": run.mixture.cards, "optimizer": run.optimizer.state_dict(),
        "step": step, "rng": rng, "args": args,
        "data": run.mixture.fingerprint,
        "versions": {"torch": str(torch.__version__), "numpy": np.__version__}})


@torch.no_grad()
def validate(run):
    """Perplexity, exp(mean cross-entropy with hard targets), by domain on held-out trajectories."""
    run.model.eval()
    result = {}
    for domain in run.mixture.domains:
        total, count = 0.0, 0
        for batch in run.mixture.validation_batches(domain, *run.window_shape(domain),
                                                    part=(run.rank, run.world)):
            inputs, target, mask = to_tensors(batch, run.model.config, run.device)
            with run.autocast():
                logits, _ = run.model(**inputs, final_state=False)
            n = int(mask.sum())
            total, count = total + action_loss(logits, target, mask).item() * n, count + n
        total, count = run.total([total, count])
        if count:
            result[domain] = math.exp(min(total / count, 30.0))
    run.model.train()
    return result


def measure(run, step):
    """Validate, and where it is time score the agent in its environments; log and print."""
    perplexity = validate(run)
    mean = float(np.mean(list(perplexity.values()))) if perplexity else float("nan")
    run.log.write(step=step, perplexity=perplexity, mean_perplexity=mean)
    tqdm.write(f"step {step:>6}  validation perplexity {mean:6.2f}  ("
               + ", ".join(f"{d} {p:.2f}" for d, p in perplexity.items()) + ")")
    every = run.args.evaluate_every
    if every and step % every == 0 and run.args.episodes != 0:
        scores = score(run, quiet=True)
        mean = scores.get("mean_over_domains", float("nan"))
        run.log.write(step=step, mean_over_domains=mean, domains=scores.get("domains"))
        tqdm.write(f"step {step:>6}  mean over domains {mean:.3f}")
        run.model.train()


def losses_of(run, forward, batch):
    """This process's part of a micro-batch -> the loss to differentiate, the one to log, tokens.

    The mean over the valid pairs of the global batch: this process has `part` of them.
    """
    args, config = run.args, run.model.config
    inputs, target, mask = to_tensors(batch, config, run.device)
    count = int(batch["mask"].sum())
    part = count / run.total([count])[0]
    # where the action is learned: from R_t alone, or with images from every token from s_t on
    early = args.early_readout and inputs["obs"].dim() == 5
    readouts = len(config.tokens) - config.tokens.index("s") if early else 1
    with run.autocast():
        # logits (B, C, readouts, ...)
        logits, _ = forward(**inputs, at=slice(-readouts, None), final_state=False)
        parts = [action_loss(x, target, mask, args.soft_sigma) for x in logits.unbind(2)]
    # times `world` because DistributedDataParallel takes the mean over processes
    loss = sum(parts) / len(parts) * part * run.world / len(run.mixture.domains)
    tokens = mask.shape[0] * mask.shape[1] * len(config.tokens) * run.world
    return loss, parts[-1].detach() * part, tokens


def fit(run, first_step):
    """The training loop; returns seconds and tokens, and prints where the time went if asked."""
    args, model = run.args, run.model
    if run.world > 1:       # a domain uses one of the two encoders: the other's gradient is missing
        model = DistributedDataParallel(model, find_unused_parameters=True)
    forward = torch.compile(model) if args.compile else model
    batches = iter(torch.utils.data.DataLoader(
        Windows(run, first_step), batch_size=None, num_workers=args.workers,
        collate_fn=unchanged, generator=torch.Generator()))     # not the generator of dropout
    spent = dict.fromkeys(("data", "forward", "backward", "optimizer"), 0.0)
    tokens, started = 0, time.perf_counter()

    def lap(key, since):
        if args.profile and run.device.type == "cuda":
            torch.cuda.synchronize()
        spent[key] += time.perf_counter() - since
        return time.perf_counter()

    run.model.train()
    bar = tqdm(total=args.steps, initial=first_step, desc="train", unit="step", mininterval=0.5,
               disable=run.rank > 0)
    for step in range(first_step, args.steps):
        if step % args.validate_every == 0:
            measure(run, step)
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        losses = []
        for domain in run.mixture.domains:
            clock = time.perf_counter()
            batch = next(batches)
            if isinstance(batch, str):
                raise SystemExit(batch)
            clock = lap("data", clock)
            # gradients are exchanged once per step, with those of the last domain
            waits = run.world > 1 and domain != run.mixture.domains[-1]
            with model.no_sync() if waits else contextlib.nullcontext():
                loss, logged, n = losses_of(run, forward, batch)
                clock = lap("forward", clock)
                loss.backward()
            losses.append(logged)
            tokens += n
            lap("backward", clock)
        clock = time.perf_counter()
        losses = dict(zip(run.mixture.domains, run.total(torch.stack(losses).tolist())))
        if not all(map(math.isfinite, losses.values())):
            raise SystemExit(f"the loss is not finite at step {step} ({losses}); the last "
                             f"checkpoint is untouched. Try a smaller --lr than {args.lr} or "
                             f"--clip than {args.clip}")
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), args.clip).item()
        if not math.isfinite(norm):     # clipping would make of it an update of zeros, or of NaN
            raise SystemExit(f"the norm of the gradient is {norm} at step {step}; the last "
                             "checkpoint is untouched. Try fewer --layers, --dtype float32, or a "
                             f"smaller --lr than {args.lr}")
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.log.write(step=step, loss=losses, lr=learning_rate(step, args), norm=norm)
        lap("optimizer", clock)
        bar.update()
        if step % 20 == 0:
            bar.set_postfix_str(" ".join(f"{d} {x:.2f}" for d, x in losses.items()), refresh=False)
        if (step + 1) % args.save_every == 0 and step + 1 < args.steps:
            save(run, step + 1)
    bar.close()
    seconds = time.perf_counter() - started
    if first_step < args.steps:
        measure(run, args.steps)
        print(f"trained {args.steps - first_step} steps in {seconds:.0f} s: "
              f"{tokens / seconds:,.0f} tokens per second")
    if args.profile:
        total = max(sum(spent.values()), 1e-9)
        print("where the time went: " + ", ".join(f"{k} {v / total:.0%}" for k, v in spent.items()))
    return seconds


def score(run, quiet=False):
    """Play all tasks, shared out over the processes; returns the content of scores.json."""
    cards = run.mixture.cards
    mine = {task: cards[task] for task in list(cards)[run.rank::run.world]}
    # beside other processes of torchrun, which wait: a simulator's crash must not be this one's
    played = run.gather(play(run.model, mine, run.args.episodes, quiet=quiet or run.rank > 0,
                             processes=2 if run.world > 1 else None))
    results = {task: result for part in played for task, result in part.items()}
    return summarise({task: results[task] for task in cards if task in results})


def finish(run, started, data_seconds, train_seconds):
    """Score the agent, write scores.json, say what was written and what to try next."""
    folder, written = run.folder, ["checkpoint.pt", "config.json", "log.jsonl", "curves.png"]
    scores = score(run) if run.args.episodes != 0 else None
    if run.rank:
        return
    draw_curves(run.log.rows, folder / "curves.png", f"{run.args.backbone} {run.args.size}")
    if scores:
        print("\n" + format_table(scores))
        acting = Agent(run.model, next(iter(run.mixture.cards.values()))).context
        scores.update(command="python " + shlex.join(sys.argv), seed=run.args.seed, context=acting,
                      evaluation_seed=EVALUATION_SEED, torch=str(torch.__version__),
                      parameters=count_parameters(run.model),
                      seconds={"data": data_seconds, "train": train_seconds,
                               "total": time.perf_counter() - started})
        (folder / "scores.json").write_text(json.dumps(scores, indent=1))
        written.append("scores.json")
    minutes = (time.perf_counter() - started) / 60
    print(f"\nwrote {folder}/: {', '.join(written)}  ({minutes:.1f} minutes in all, of them data "
          f"{data_seconds / 60:.1f}, training {train_seconds / 60:.1f})")
    other = "gpt" if run.args.backbone != "gpt" else "mlstm"
    task = next(iter(run.mixture.cards))
    print(f"next: python eval.py --checkpoint {folder}/checkpoint.pt --tasks {task} "
          f"--video it.gif\n      python train.py --backbone {other}")


def build_model(args, device, fresh):
    """The model that the settings describe and its kernels in words; SystemExit if it cannot be."""
    try:
        config = Config(args.backbone, args.size, args.dim, args.layers, args.heads,
                        slstm_at=args.slstm_at, context=args.context, dropout=args.dropout,
                        tokens=tuple(args.tokens.split(",")), cnn=args.cnn,
                        standardise=args.standardise, bins=args.bins)
        model = LRAM(config).to(device)
        kernels = use_kernels(model, args.kernels)
    except ValueError as error:
        raise SystemExit(f"these settings do not fit together: {error}") from None
    if args.init_from and fresh:
        try:
            model.load_state_dict(load_checkpoint(args.init_from)["model"])
        except RuntimeError as error:
            raise SystemExit(f"--init-from {args.init_from} is a model of another shape; give its "
                             f"--backbone, --size, --tokens ... too. {str(error)[:300]}") from None
    return model, kernels


def main(args):
    """See the opening of this file."""
    started = time.perf_counter()
    rank, world = join_processes(args.device)
    folder = share(run_folder(args) if args.resume and not rank else None, world)
    saved = load_checkpoint(folder / "checkpoint.pt") if args.resume else None
    args = resolve(resumed_args(args, saved["args"]) if saved else args)
    device, dtype, reason = choose_device(args.device, args.dtype)
    args, workers = choose_workers(args, device, world)
    torch.manual_seed(args.seed)

    model, kernels = build_model(args, device, fresh=not saved)     # refuses what cannot be

    # the folder is taken before anything slow: two trainings may start together
    folder = folder or share(None if rank else run_folder(args), world)
    # data: what is missing is made now
    present = share(None if rank else data.make(args.tasks, args.data_root, args.heldout,
                                                args.episodes_per_task), world)
    tasks, heldout = ([t for t in names if t in present] for names in (args.tasks, args.heldout))
    mixture = data.Mixture(args.data_root, tasks, heldout, args.standardise, args.on_bad,
                           args.top_fraction, args.align)
    data_seconds = time.perf_counter() - started
    if saved and saved.get("data", mixture.fingerprint) != mixture.fingerprint:
        raise SystemExit(f"the trajectories below {args.data_root} are not those that the run was "
                         "interrupted on: restore them, or start a new --name")

    # optimizer, and what a resumed run left
    optimizer = torch.optim.AdamW(model.parameter_groups(args.weight_decay), lr=args.lr,
                                  betas=(0.9, 0.999))
    first_step = 0
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first_step = saved["step"]
    # of dropout: every process its own; a resume with as many processes as before continues it
    if saved and len(saved["rng"]) == world:
        torch.set_rng_state(saved["rng"][rank])
    elif rank or saved:
        torch.manual_seed(args.seed + 1_000_003 * (first_step + rank))
    config = {**dataclasses.asdict(args), "data": mixture.fingerprint,
              "backbone_parameters": count_parameters(model.backbone)}
    try:
        if not rank:
            (folder / "config.json").write_text(json.dumps(config, indent=1, default=str))
        run = Run(args, folder, device, dtype, mixture, model, optimizer,
                  # a run that is complete is not measured again: its last line stays
                  Log(None if rank else folder / "log.jsonl",
                      first_step + (first_step == args.steps)), rank, world)
    except OSError as error:
        raise SystemExit(f"cannot write to {folder} ({error}): free some space and run the same "
                         "command again") from None

    print(f"{args.backbone} {args.size}: {count_parameters(model):,} parameters, D "
          f"{model.config.dim}, {model.config.layers} layers; device {reason}, "
          f"{torch.get_num_threads()} threads; kernels {kernels}; {workers}"
          + (f"; {world} processes" if world > 1 else ""))
    kept, held = (sum(map(len, part.values())) for part in (mixture.train, mixture.validation))
    print(f"{len(mixture.domains)} domains, {kept} trajectories for training, {held} for "
          f"validation; run {folder}" + (f", resumed at step {first_step}" if saved else ""))
    try:
        train_seconds = fit(run, first_step)
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted; continue from the last checkpoint with: python train.py "
                         f"--backbone {args.backbone} --size {args.size} --name "
                         f"{folder.relative_to('runs')} "
                         "--resume") from None
    save(run, args.steps)
    finish(run, started, data_seconds, train_seconds)
    if world > 1:
        leave_processes()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
