"""Make docs/tour.md: one update of ImageReFL, one of ReFL and one sampled picture, with the numbers of a real run.

    python docs/make_tour.py

The text is docs/tour/template.md. There `{name}` is a measured value, and a line `@code FILE NAME [FROM .. TO]` the
code of a function, or its lines from the one that contains FROM to the one that contains TO. Pictures go to docs/tour/.
"""

import ast
import shlex
import sys
import tempfile
import textwrap
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import imagerefl
import metrics
import refl
import rewards
import scheduler as sched
import weights
from combined import cfg, combine, combined_weights, conditional, initial_noise
from pretrained.features import clip_features
from train import ADAM_EPS
from training import presets
from training.models import accelerate
from training.options import parse_args
from training.run import open_run
from utils import disk
from utils.images import grid, save_png, to_pil

TOUR = ROOT / "docs" / "tour"
SEED, IMAGES, BASE_STEPS = 15, 4, 30


class TracedScheduler(sched.Scheduler):
    """A scheduler that keeps what it was called with."""

    def __init__(self):
        super().__init__(40)
        self.noised, self.taken, self.predicted = [], [], []

    def add_noise(self, x0, eps, t):
        self.noised.append(super().add_noise(x0, eps, t).detach())
        return self.noised[-1]

    def step(self, i, x_t, eps, generator=None):
        self.taken.append((i, x_t.detach(), eps.detach()))
        return super().step(i, x_t, eps, generator)

    def predict_x0(self, x_t, eps, t):
        x0 = super().predict_x0(x_t, eps, t)
        self.predicted.append((self.timesteps.index(t), x_t.detach(), x0.detach()))
        return x0


def decoded(vae, latents: torch.Tensor) -> list:
    with torch.no_grad():
        return to_pil(vae.decode(latents))


def picture(name: str, vae, rows: dict[str, torch.Tensor], heads: list[str], cell: int = 112) -> None:
    """docs/tour/NAME.png: the decoded latents of each row."""
    save_png(grid([decoded(vae, latents) for latents in rows.values()], list(rows), heads, cell), TOUR / f"{name}.png")


def counted(unet, calls: list):
    """The UNet, noting for each call whether it has gradients."""

    def call(*x, **c):
        calls.append(torch.is_grad_enabled())
        return unet(*x, **c)

    return call


def gradient(loss: torch.Tensor, parameters: list) -> torch.Tensor:
    """The gradient of a loss, as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])


def imagerefl_update(run, unet, args, optimizer) -> dict:
    """The first update of `train.py --method imagerefl`, as train.py makes it, and its loss once more afterwards."""
    m, values = run.models, {}
    for after in (False, True):
        scheduler = TracedScheduler()
        x0, prompts, rng = next(run.micro_batches(0))
        c = m.text(prompts, run.size)
        calls = []
        given = (counted(unet, calls), m.vae, m.reward, scheduler, x0, args.start, c, prompts, rng, args.shift)
        l_reward, l_diffusion = imagerefl.imagerefl_losses(*given)
        scores = [-l_reward.item(), l_diffusion.item()]
        if after:
            return values | {"reward_after": scores[0], "diffusion_after": scores[1]}
        ((t_f, x_t_f, predicted),) = scheduler.predicted
        g_reward = gradient(args.reward_scale * l_reward, m.parameters)
        g_diffusion = gradient(args.diffusion_scale * l_diffusion, m.parameters)
        rows = {"real image": x0, "x_t at t'": scheduler.noised[0], "x_t at t_f": x_t_f}
        picture("imagerefl", m.vae, rows | {"predicted x0": predicted}, prompts)
        values |= {"prompts": ", ".join(f'"{p}"' for p in prompts), "x0_shape": tuple(x0.shape), "t_f": t_f}
        values |= {"context_shape": tuple(c["context"].shape), "x0_std": x0.std().item(), "last_before": t_f - 1}
        values |= {"calls": len(calls), "calls_no_grad": calls.count(False)}
        values |= {"t_of_t_f": scheduler.timesteps[t_f], "reward": scores[0], "diffusion": scores[1]}
        values |= {"norm_reward": g_reward.norm().item(), "norm_diffusion": g_diffusion.norm().item()}
        values["ratio"] = values["norm_reward"] / values["norm_diffusion"]
        values["cosine"] = torch.cosine_similarity(g_reward, g_diffusion, dim=0).item()
        before = torch.cat([p.detach().flatten().clone() for p in m.parameters])
        (args.reward_scale * l_reward + args.diffusion_scale * l_diffusion).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        moved = torch.cat([p.detach().flatten() for p in m.parameters]) - before
        values |= {"parameters": len(moved) / 1e6, "moved": (moved.norm() / before.norm()).item()}
        values |= {"median_move": moved.abs().median().item(), "lr": args.lr}
        values["median_gradient"] = (g_reward + g_diffusion).abs().median().item()


def refl_update(run, unet, args) -> dict:
    """The loss of the fourth update of the same run, a ReFL update, with the networks as they are."""
    m, scheduler, update = run.models, TracedScheduler(), imagerefl.REFL_EVERY - 1
    run.progress["position"] = update * args.batch_size  # of the data
    _, prompts, rng = next(run.micro_batches(update))
    x_T = sched.sample_noise(run.latent_shape(prompts), rng)
    loss = refl.refl_loss(unet, m.vae, m.reward, scheduler, x_T, m.text(prompts, run.size), prompts, rng, args.shift)
    ((t_f, x_t_f, predicted),) = scheduler.predicted
    g_reward = gradient(args.reward_scale * loss, m.parameters)
    at_20 = scheduler.taken[20][1]
    rows = {"noise x_T": x_T, "x_t at step 20": at_20, "x_t at t_f": x_t_f, "predicted x0": predicted}
    picture("refl", m.vae, rows, prompts)
    values = {"refl_t_f": t_f, "refl_steps": len(scheduler.taken), "refl_reward": -loss.item()}
    return values | {"refl_norm": g_reward.norm().item(), "refl_prompts": ", ".join(f'"{p}"' for p in prompts)}


@torch.no_grad()
def sampling() -> dict:
    """Combined generation with the shipped tuned model: the predicted x0 along the way, and what comes out."""
    base, tuned = weights.load_tuned(str(presets.TUNED), "tiny")
    vae, text, rater = weights.load_vae("tiny"), weights.load_text("tiny"), rewards.load("rater")
    features, prompts, seeds, size = (
        clip_features(presets.FEATURES),
        ["fox", "octopus"] * 4,
        [1, 1, 2, 2, 3, 3, 4, 4],
        (64, 64),
    )
    c, c_empty = text(prompts, size), text([""] * len(prompts), size)
    predictors = cfg(base, c, c_empty, presets.TINY.guidance), conditional(tuned, c)
    shown, strips, finals = [0, 10, 20, 29, 30, 35, 39], {}, {}
    readings = ["| T' | mean score of the rater, of 10 | diversity |", "|---|---|---|"]
    for T_prime, name in ((0, "base"), (10, "T' = 10"), (40, "tuned alone")):
        scheduler = TracedScheduler()
        x_T, generators = initial_noise(vae, seeds, size, "cpu")
        x_0 = combine(scheduler, *predictors, combined_weights(40, 40 - T_prime), x_T, generators)
        images = vae.decode(x_0).clamp(-1, 1)
        finals[name] = x_0
        diversity = metrics.group_diversity(features(images), prompts).mean().item()
        readings.append(f"| {T_prime} | {rater(images, prompts).mean().item():.2f} | {diversity:.3f} |")
        for i in shown:
            step, x_t, eps = scheduler.taken[i]
            scheduler.predict_x0(x_t, eps, scheduler.timesteps[step])
        for k in range(2):
            strips[f"{prompts[k]}, {name}"] = torch.cat([x0[k : k + 1] for _, _, x0 in scheduler.predicted])
    rows = {f"{prompt}, {name}": strips[f"{prompt}, {name}"] for prompt in prompts[:2] for name in ("base", "T' = 10")}
    picture("sampling", vae, rows, [f"step {i}" for i in shown], cell=72)
    order = sorted(range(len(prompts)), key=lambda k: prompts[k])
    heads = [f"{prompts[k]}, seed {seeds[k]}" for k in order]
    picture("final", vae, {name: x_0[order] for name, x_0 in finals.items()}, heads, cell=68)
    return {"readings": "\n".join(readings)}


def schedule_table() -> str:
    """The coefficients of some steps."""
    s = sched.Scheduler(40)
    lines = ["| step index i | countdown | timestep t | ᾱ_t | a_t | b_t | c_t | w, T' = 10 |", "|---" * 8 + "|"]
    for i in (0, 10, 20, 29, 30, 35, 39):
        numbers = (s.abar[s.timesteps[i]], s.a[i], s.b[i], s.c[i])
        cells = [i, 40 - i, s.timesteps[i], *(f"{n:.4f}" for n in numbers), f"{combined_weights(40, BASE_STEPS)[i]:g}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def measure() -> dict:
    """All values of the template; makes the pictures."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--method", "imagerefl", "--base", "tiny", "--dtype", "float32", "--device", "cpu"]
        flags += ["--batch-size", str(IMAGES), "--seed", str(SEED), "--output-dir", str(Path(folder) / "run")]
        args = parse_args(flags)
        with open_run(args) as run:
            optimizer = torch.optim.AdamW(run.models.parameters, args.lr, eps=ADAM_EPS, weight_decay=args.weight_decay)
            unet = accelerate(args, run.models, optimizer)
            values = imagerefl_update(run, unet, args, optimizer) | refl_update(run, unet, args)
    abar_30 = sched.Scheduler(40).abar[226].item()
    return (
        values
        | sampling()
        | {"schedule": schedule_table(), "abar_30": abar_30, "seed": SEED, "images": IMAGES}
        | {"updates": presets.TINY.updates["imagerefl"]}
    )


def excerpt(file: str, name: str, first: str = "", last: str = "") -> str:
    """The code of `name` in a file without its docstring, whole or in part. Raises ValueError if it is not there."""
    text = (ROOT / file).read_text(encoding="utf-8")
    body, lines = ast.parse(text).body, text.splitlines()
    for part in name.split("."):
        found = [node for node in body if getattr(node, "name", None) == part]
        if not found:
            raise ValueError(f"{file} has no {name}")
        body = getattr(found[0], "body", [])
    chosen = list(range(found[0].lineno - 1, found[0].end_lineno))
    if body and ast.get_docstring(found[0]):
        chosen = [n for n in chosen if not body[0].lineno - 1 <= n < body[0].end_lineno]
    chosen = [lines[n] for n in chosen]
    if first:
        start = next((n for n, line in enumerate(chosen) if first in line), None)
        end = next((n for n, line in enumerate(chosen) if n >= (start or 0) and last in line), None)
        if start is None or end is None:
            raise ValueError(f"{file}: {name} has no line with {first if start is None else last!r}")
        chosen = chosen[start : end + 1]
    return textwrap.dedent("\n".join(chosen))


def code_block(line: str) -> str:
    """`@code FILE NAME [FROM .. TO]` -> a fenced block, headed by a link to the file."""
    _, file, name, *rest = shlex.split(line)
    first, last = (rest[0], rest[2]) if rest else ("", "")
    return f"[`{file}:{name}`](../{file})\n\n```python\n{excerpt(file, name, first, last)}\n```"


def code_blocks() -> list[str]:
    """The excerpts of the template, in order."""
    return [code_block(line) for line in (TOUR / "template.md").read_text().splitlines() if line.startswith("@code")]


def render(values: dict) -> str:
    lines = (TOUR / "template.md").read_text(encoding="utf-8").splitlines()
    filled = [code_block(line) if line.startswith("@code") else line.format_map(values) for line in lines]
    return "\n".join(filled) + "\n"


if __name__ == "__main__":
    disk.write_text(ROOT / "docs" / "tour.md", render(measure()))
