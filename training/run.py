"""What surrounds the training loop: data, folder, log, checkpoints, monitoring, signals, several processes.

`open_run` opens a run; `Run.updates` and `Run.micro_batches` are what the loop iterates over.
"""

import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from scheduler import sample_noise
from training import checkpoint, cost, monitor, presets, run_folder
from training.data import DataStream, ImageDataset, PromptDataset, describe, open_data, read_prompts
from training.models import Models, generator_of, load_models
from training.options import STEPS, resolve
from training.pairs import PairDataset, open_pairs
from utils import cli, device, distributed
from weights import check_resolution, read_config

TABLE_PROMPTS = 64  # at most, for the final table and --monitor
SKIPS = 10  # updates in a row without a finite loss and gradient after which a run stops


@contextmanager
def open_run(args: Namespace, load: Callable = load_models, resolve: Callable = resolve) -> Iterator["Run"]:
    """Open the run that the flags describe; on --resume with the flags it was started with.

    Raises ValueError or OSError for bad input, before anything is written, and with advice when memory runs out.
    """
    if args.resume:
        run_folder.resume(args)
    preset = presets.preset_for(args.base, read_config(args.base, "unet"))
    distributed.set_device()
    resolve(args, preset)
    check_resolution(args.base, args.resolution)
    main = distributed.is_main_process()
    if main and not args.resume:
        cli.check_writable(run_folder.new_folder(args))
    prompts = read_prompts(args.prompts) if args.prompts else list(preset.prompts)
    if len(prompts) > TABLE_PROMPTS:
        if main:
            print(f"--prompts:       the first {TABLE_PROMPTS} of {len(prompts):,}; evaluate.py measures all of them")
        prompts = prompts[:TABLE_PROMPTS]
    if args.monitor and len(prompts) < 2:
        raise ValueError("--monitor needs several prompts for its standard errors: --prompts must name two or more")
    data = data_of(args)
    try:
        with distributed.process_group(args.device):
            models = load(args, preset)
            for total, asked in ((models.reward, captions_of(data)), (models.judge, [])):
                for reward in total.rewards if total else ():
                    reward.check([*prompts, *asked])
            with run_folder.claim(args) if main else nullcontext() as folder:
                yield Run(args, models, preset, prompts, data, folder)
    except (RuntimeError, MemoryError) as error:
        if not device.is_out_of_memory(error):
            raise
        raise ValueError(memory_advice(args, error)) from None


def data_of(args: Namespace):
    """The data set of `--data`. Raises ValueError if a method that needs images gets prompts."""
    captions_only = not needs_images(args)  # no image needs to be there
    data = open_pairs(args.data, args.resolution) if args.method == "dpo" and captions_only else None
    data = data or open_data(
        args.data, args.resolution, args.images, args.caption_column, args.allow_missing, captions_only
    )
    if isinstance(data, PromptDataset) and needs_images(args):
        raise ValueError(f"--data {args.data}: {args.method} needs images, and these are prompts alone")
    if distributed.is_main_process():
        print(f"data:            {describe(data)}")
    return data


def captions_of(data) -> list[str]:
    """The captions of a data set that was read from files."""
    if isinstance(data, PromptDataset):
        return data.prompts
    images = data.better if isinstance(data, PairDataset) else data
    return [caption for _, caption in images.rows] if isinstance(images, ImageDataset) else []


def needs_images(args: Namespace) -> bool:
    return args.method in ("diffusion", "imagerefl") or args.from_image


class Run:
    """A run in progress. `models` are its networks; `size` (H, W) in pixels; `stopped` after Ctrl-C."""

    def __init__(self, args: Namespace, models: Models, preset, prompts: list[str], data, folder: Path | None):
        self.args, self.models, self.preset, self.prompts, self.folder = args, models, preset, prompts, folder
        self.has_pairs = isinstance(data, PairDataset)
        self.size, self.guidance = (args.resolution, args.resolution), preset.guidance
        self.grid_columns = {"base": (2, STEPS), "tuned": (2, 0)}  # name -> images per prompt, base steps
        self.cached_images, self.metadata, self.values, self.stopped = {}, {}, {}, False
        self.progress = {"update": 0, "position": 0, "skipped": 0, "in_a_row": 0}
        prefetch = distributed.world_size if args.device != "cpu" else 0  # on a CPU it would compete with training
        self.stream = DataStream(data, args.seed, ahead=prefetch)

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """With --resume: load the newest checkpoint into the networks and the optimizer."""
        if self.args.resume:
            found = checkpoint.load_newest(Path(self.args.resume) / "states", self.models.modules, optimizer)
            self.progress |= found
            if self.args.steps < self.progress["update"]:
                raise ValueError(
                    f"--steps {self.args.steps}: the run has made {self.progress['update']} updates already"
                )

    def updates(self, optimizer: torch.optim.Optimizer) -> Iterator[int]:
        """The numbers of the updates that are left. After each: log, checkpoint, sample grid, monitor, stop."""
        args, main, first = self.args, distributed.is_main_process(), self.progress["update"]
        mfu = cost.MFUMeter(args, self.models.unet.config, self.models.vae.config) if args.device != "cpu" else None
        if main:
            self.begin()
        self.saved = time.time()
        left = range(first, args.steps)
        with cli.catch_signals() as self.signals, closing(self.stream):
            self.bar = tqdm(left, args.method, args.steps, initial=first, unit="update", disable=not main)
            for update in self.bar:
                began, self.values, self.logged = time.time(), {}, {}
                if args.device != "cpu":
                    torch.cuda.reset_peak_memory_stats()
                for group in optimizer.param_groups:
                    group["lr"] = lr_at(args, update)
                yield update
                self.values["seconds"] = round(time.time() - began, 4)
                if mfu:
                    self.values["peak_gb"] = round(torch.cuda.max_memory_allocated() / cost.GB, 2)
                    rate = mfu(self.kind, self.values["seconds"])
                    self.values["mfu"] = round(rate / distributed.world_size, 4)
                if self.after(update, optimizer):
                    return

    def begin(self) -> None:
        """Write `run.json`; save the first sample grid and, with --monitor, the initial scores."""
        args, update = self.args, self.progress["update"]
        self.metadata = run_folder.begin(args, self.folder, update)
        if args.monitor and "monitor" not in self.metadata:
            monitor.check(self, update, {})
        run_folder.describe(self.folder, self.metadata)
        print(self.summary(), flush=True)
        if args.sample_every and not update:
            monitor.save_grid(self, self.folder / "samples" / "step-000000.png")

    def summary(self) -> str:
        """What will be trained, on what, in which dtype, about how long, and where results go."""
        args, left = self.args, self.args.steps - self.progress["update"]
        weights = f"rank-{args.lora} adapters" if args.lora else "all weights"
        reward = "" if args.method == "diffusion" else f" for reward {args.reward}"
        lines = [
            f"training:        {args.method} on {args.base}, {weights}{reward}, {left} updates of "
            f"{args.batch_size * args.accumulate} images, {args.dtype} on {args.device}"
        ]
        if not args.shard:  # there a forward pass is a collective
            lines.append(f"duration:        about {max(1, round(predicted_minutes(self, left)))} min")
        return "\n".join([*lines, f"results:         {self.folder}"])

    def micro_batches(self, update: int) -> Iterator[tuple[Tensor | None, list[str], torch.Generator]]:
        """This process's micro-batches: scaled latents x0 of real images, prompts, generator.

        x0 is None where the method needs no images; the ReFL updates of ImageReFL do not use it. Of pairs of images
        it holds the preferred ones, then the others.
        """
        for number in distributed.micro_batches_of_this_rank(self.args.accumulate):
            generator = generator_of(self.args.seed, update, number)
            self.stream.position = self.progress["position"] + number * self.args.batch_size
            with self.autocast():
                x0, prompts = self.batch(generator)
            yield x0, prompts, generator

    @torch.no_grad()
    def batch(self, generator: torch.Generator) -> tuple[Tensor | None, list[str]]:
        """The next x0 (B, C, H/8, W/8), or None where the method needs no images, and its captions."""
        images, captions = self.stream.batch(self.args.batch_size)
        if self.has_pairs:
            images = images.transpose(0, 1).flatten(0, 1)
        elif not needs_images(self.args):
            return None, captions
        return self.models.vae.sample(device.to_device(images, self.args.device), generator), captions

    def autocast(self):
        return device.autocast(self.args.device, self.args.dtype)

    def latent_shape(self, prompts: list[str]) -> tuple[int, int, int, int]:
        """(B, C, H, W) of the latents of one image per prompt."""
        vae = self.models.vae
        return len(prompts), vae.config.latent_channels, *(side // vae.factor for side in self.size)

    def log(self, **values: Tensor) -> None:
        """Values of a micro-batch for log.jsonl, which averages them over the update."""
        for key, value in values.items():
            self.logged.setdefault(key, []).append(value.detach())

    @property
    def kind(self) -> str:
        """The kind of the update, by what it logged: ImageReFL has a diffusion loss, ReFL has none."""
        return "refl" if self.args.method == "imagerefl" and "diffusion" not in self.values else self.args.method

    @torch.no_grad()
    def gradients_are_finite(self) -> bool:
        """All-reduce gradients and logged values, clip, and return True if all of them are finite."""
        args, main = self.args, distributed.is_main_process()
        if not args.shard:
            distributed.all_reduce(p.grad for p in self.models.parameters)
        sums = [sum(value.item() for value in values) for values in self.logged.values()]
        late = main and time.time() - self.saved >= 60 * (args.save_minutes or math.inf)
        *sums, stop, late = distributed.all_reduce_sum([*sums, len(self.signals), late], args.device)
        self.values = {key: value / args.accumulate for key, value in zip(self.logged, sums, strict=True)}
        norm = torch.nn.utils.clip_grad_norm_(self.models.parameters, args.max_grad_norm or math.inf)
        self.values["grad_norm"] = distributed.gather(norm).item()
        self.stopped, self.late = bool(stop), bool(late)
        self.taken = all(map(math.isfinite, self.values.values()))
        return self.taken

    def after(self, update: int, optimizer: torch.optim.Optimizer) -> bool:
        """Log, monitor, save and sample after an update; True if it is the last. Raises ValueError if stuck."""
        args, progress, main = self.args, self.progress, distributed.is_main_process()
        indices = range(progress["position"], progress["position"] + args.batch_size * args.accumulate)
        progress["update"], progress["position"] = update + 1, indices.stop
        progress["in_a_row"] = 0 if self.taken else progress["in_a_row"] + 1
        row = {"update": update + 1, "kind": self.kind, "lr": lr_at(args, update)}
        collapsed = False
        if args.monitor and (update + 1) % args.monitor == 0:
            warned = main and monitor.check(self, update, self.values)
            collapsed = distributed.all_reduce_sum([warned and args.stop_on_collapse], args.device) == [1]
        last = self.stopped or collapsed or update + 1 == args.steps
        stuck = not self.taken and progress["in_a_row"] % SKIPS == 0
        saves = last or self.late or stuck or (update + 1) % args.save_every == 0
        tensors = checkpoint.tensors_of(self.models.modules, optimizer) if saves and (main or args.shard) else {}
        if main:
            skipped = [] if self.taken else [self.stream.index(n) for n in indices]
            run_folder.log(self.folder, row | self.values, progress, skipped)
            self.bar.set_postfix({key: f"{value:.3g}" for key, value in self.values.items()})
            if saves:
                run_folder.save_checkpoint(self.folder, tensors, progress, args.keep, last)
                self.saved = time.time()
            if args.sample_every and ((last and not self.stopped) or (update + 1) % args.sample_every == 0):
                monitor.save_grid(self, self.grid_path(update + 1))
        if stuck:
            raise ValueError(
                f"{SKIPS} updates in a row had no finite loss and gradient; saved; try a lower --lr, "
                "--max-grad-norm 1 or --dtype float32, with --resume and --override"
            )
        if main and last and (self.stopped or collapsed):
            reason = "by --stop-on-collapse"
            if self.stopped:
                reason = f"and saved; continue with: python {Path(sys.argv[0]).name} --resume {self.folder}"
            print(f"\nstopped after update {update + 1} {reason}")
        return last

    def grid_path(self, update: int) -> Path:
        return self.folder / "samples" / f"step-{update:06d}.png"

    def save_result(self, unet) -> bool:
        """Save the tuned UNet or its adapters; False after Ctrl-C, and on all processes but the first.

        `unet`: as the losses call it.
        """
        if self.stream.left_out:
            print(f"{len(self.stream.left_out)} images could not be decoded and were left out")
        if self.stopped:
            return False
        if self.args.shard:
            self.models.unet = self.models.tuned = unet.copy.float()
            unet.refresh()  # gather the sharded weights in float32
        if not distributed.is_main_process():
            return False
        run_folder.save_result(self.args, self.models.unet, self.folder, self.progress["update"])
        return True

    def finish(self, table: dict[str, dict] | None, command: str = "") -> None:
        """Mark the run as finished; print the table of scores, and what to do next."""
        if table:
            self.metadata["table"] = table
            print(f"\n{len(self.prompts)} prompts x {monitor.SEEDS} seeds, mean ± standard deviation")
            print(f"{monitor.layout(table)}\n")
        run_folder.describe(self.folder, self.metadata | {"finished": True})
        if self.args.sample_every:
            print(f"sample images:   {self.grid_path(self.progress['update'])}")
        print(f"result:          {self.folder}")
        if command:
            print(f"sample from it:  {command}")


@torch.no_grad()
def predicted_minutes(run: Run, updates: int) -> float:
    """From one timed forward pass of the UNet; the factors are ratios of FLOPs (`cost.costs_of`), decoder included."""
    args, prompts = run.args, ["a"] * run.args.batch_size
    x = sample_noise(run.latent_shape(prompts), generator_of(args.seed), args.device)
    for _ in range(2):  # the first call sets libraries up
        began = time.perf_counter()
        with run.autocast():
            run.models.unet(x, 226, **run.models.text(prompts, run.size)).sum().item()
        seconds = time.perf_counter() - began
    passes = cost.costs_of(args, cost.RATIOS)["3:1 mix" if args.method == "imagerefl" else args.method]
    sampled = len(run.prompts) * monitor.SEEDS * (3 * STEPS + STEPS / 4) / args.batch_size if run.models.reward else 0
    micro_batches = updates * args.accumulate / distributed.world_size
    return (micro_batches * passes + sampled) * seconds / 60


def lr_at(args: Namespace, update: int) -> float:
    """The learning rate of an update."""
    warm = min(1.0, (update + 1) / args.warmup) if args.warmup else 1.0
    decay = 0.5 * (1 + math.cos(math.pi * update / args.steps)) if args.lr_schedule == "cosine" else 1.0
    return args.lr * warm * decay


def memory_advice(args: Namespace, error: Exception) -> str:
    """Flags to try after an out-of-memory error, keeping the effective batch size."""
    if args.device == "cpu":
        import resource  # not on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    else:
        peak = torch.cuda.max_memory_allocated()
    smaller = max((n for n in range(1, args.batch_size) if args.batch_size % n == 0), default=0)
    flags = [f"--batch-size {smaller} --accumulate {args.accumulate * args.batch_size // smaller}"] if smaller else []
    flags += [] if args.checkpointing else ["--checkpointing"]
    flags += [] if args.lora else ["--lora 16"]
    return (
        f"out of memory with micro-batches of {args.batch_size} images of {args.resolution} pixels, peak "
        f"{peak / 1e9:.2f} GB ({(str(error) or 'of the CPU').splitlines()[0]}); "
        f"try {', '.join(flags) or 'a smaller --resolution'}"
    )
