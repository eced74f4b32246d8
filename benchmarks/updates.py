"""One optimizer update of ReFL or ImageReFL: ours as `train.py` composes it, and one composed from diffusers."""

from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import rewards
from benchmarks.measure import Side, tensors_of
from benchmarks.networks import SCHEDULE, check_equal, conditioning, random_reward, trainable, unet_pair, vae_pair
from imagerefl import imagerefl_losses
from pretrained import lora, reward_networks
from refl import T_MAX, refl_loss, sample_t_f
from scheduler import Scheduler, sample_noise
from train import ADAM_EPS
from training.models import Models, accelerate, compile_networks
from training.options import STEPS
from unet import UNetConfig
from utils import acceleration
from utils.device import autocast, default_dtype, frozen_dtype
from vae import VAEConfig

K_R, K_D = 1e-3, 1e-5
T_PRIME = 30
SCHEDULER = Scheduler(STEPS, eta=1.0)
LR = 1e-6


@dataclass(frozen=True)
class Task:
    """What is trained, and on what. `side`: of the latents; `reward`: tiny, or a name for random weights."""

    unet: UNetConfig
    vae: VAEConfig
    side: int
    batch: int
    accumulate: int
    device: str
    reward: str
    lora: int | None = None
    checkpointing: bool = False

    @property
    def pixels(self) -> int:
        return self.side * 2 ** (len(self.vae.channels) - 1)

    def latent_shape(self, batch: int) -> tuple[int, int, int, int]:
        return (batch, self.unet.latent_channels, self.side, self.side)

    def batch_of(self, size: int, dtype: torch.dtype = torch.float32) -> dict:
        """Real images, text conditioning and prompts of a micro-batch."""
        images = sample_noise((size, 3, self.pixels, self.pixels), torch.Generator().manual_seed(3), self.device)
        c = conditioning(self.unet, size, self.device, dtype)
        return {"images": images.clamp(-1, 1), "c": c, "prompts": ["octopus"] * size}

    def load_reward(self) -> rewards.Reward:
        if self.reward.startswith("tiny"):
            return rewards.load(self.reward, device=self.device)
        return random_reward(self.reward, self.device)

    def args(self, compiled: bool = False, dtype: str | None = None) -> Namespace:
        """The flags of `train.py` that its functions need here."""
        dtype = dtype or default_dtype(self.device)
        return Namespace(
            device=self.device, dtype=dtype, compile=compiled, lora=self.lora, shard=False,
            seed=1, batch_size=self.batch, resolution=self.pixels,
        )  # fmt: skip


def our_loss(method: str, task: Task, unet, vae, reward, images: Tensor, c: dict, prompts: list[str], seed: int):
    """The loss of a micro-batch, as in `train.py`."""
    rng = torch.Generator().manual_seed(seed)
    if method == "refl":
        x_T = sample_noise(task.latent_shape(len(images)), rng, task.device)
        return K_R * refl_loss(unet, vae, reward, SCHEDULER, x_T, c, prompts, rng)
    with torch.no_grad():
        x0 = vae.sample(images, rng)
    l_reward, l_diffusion = imagerefl_losses(unet, vae, reward, SCHEDULER, x0, T_PRIME, c, prompts, rng)
    return K_R * l_reward + K_D * l_diffusion


def diffusers_scheduler(device: str):
    import diffusers

    scheduler = diffusers.DDPMScheduler(**SCHEDULE, variance_type="fixed_small")
    scheduler.set_timesteps(STEPS, device=device)
    return scheduler


def diffusers_loss(method: str, task: Task, unet, vae, reward, images: Tensor, c: dict, prompts: list[str], seed: int):
    """The same loss composed from diffusers' parts, as the official code does it, with the same draws."""
    scheduler, rng = diffusers_scheduler(task.device), torch.Generator().manual_seed(seed)
    steps, shape, first = scheduler.timesteps, task.latent_shape(len(images)), 0

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return unet(x, t, encoder_hidden_states=c["context"]).sample

    if method == "refl":
        x = sample_noise(shape, rng, task.device)
    else:
        with torch.no_grad():
            x0 = vae.encode(images).latent_dist.sample(rng) * vae.config.scaling_factor
        noise, first = sample_noise(shape, rng, task.device), T_PRIME
        x = noised = scheduler.add_noise(x0, noise, steps[first].expand(len(images)))
    t_f = sample_t_f(STEPS - T_MAX, SCHEDULER, rng)
    with torch.no_grad():
        for t in steps[first:t_f]:
            x = scheduler.step(predict(x, t), t, x, generator=rng).prev_sample
    x0 = scheduler.step(predict(x, steps[t_f]), steps[t_f], x).pred_original_sample
    loss = -K_R * reward(vae.decode(x0 / vae.config.scaling_factor).sample, prompts).mean()
    if method == "imagerefl":
        eps = predict(noised, steps[T_PRIME])
        loss = loss + K_D * torch.nn.functional.mse_loss(eps.float(), noise.float())
    return loss


def gradient(loss: Tensor, parameters: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def check_gradient(method: str, task: Task, reward) -> float:
    """The relative difference of our gradient and diffusers', float32, one image. Raises ValueError above 1 %."""
    (unet, their_unet), (vae, their_vae) = unet_pair(task.unet, task.device), vae_pair(task.vae, task.device)
    trainable(unet), trainable(their_unet)
    theirs, batch = dict(their_unet.named_parameters()), task.batch_of(1)
    with autocast(task.device, "float32"):
        ours = gradient(our_loss(method, task, unet, vae, reward, **batch, seed=0), list(unet.parameters()))
        expected = gradient(
            diffusers_loss(method, task, their_unet, their_vae, reward, **batch, seed=0),
            [theirs[key] for key, _ in unet.named_parameters()],
        )
    return check_equal(ours, expected, 1e-2)


def to_training_dtype(task: Task, reward: rewards.Reward) -> None:
    """Round the vision tower to bf16 where `train.py` does."""
    if frozen_dtype(task.args()) == torch.bfloat16:
        reward_networks.to_bf16(reward.network, torch.bfloat16)


def update_of(task: Task, loss_of: Callable[..., Tensor], optimizer, dtype: torch.dtype) -> Callable[[], None]:
    """One update as a function; the same seeds in every call, so that t_f and with it the work are the same."""
    batch = task.batch_of(task.batch, dtype)

    def update() -> None:
        for number in range(task.accumulate):
            with autocast(task.device):
                loss = loss_of(**batch, seed=1 + number)
            (loss / task.accumulate).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def our_models(task: Task, args: Namespace, reward, prepare: Callable[[nn.Module], object] | None = None) -> Models:
    """The networks of `train.py` with random weights. `prepare` may change the UNet before it is compiled."""
    speed, dtype = acceleration.speed(), frozen_dtype(args)
    unet, vae = unet_pair(task.unet, task.device, False)[0], vae_pair(task.vae, task.device, False)[0].to(dtype)
    if task.lora:
        parameters = lora.add(unet.to(dtype), task.lora, generator=torch.Generator().manual_seed(1))
        speed.fuse(unet)
    else:
        parameters = list(trainable(unet).parameters())
    unet.checkpointing = vae.decoder.checkpointing = task.checkpointing

    def text(prompts: list[str], size: tuple[int, int]) -> dict[str, Tensor]:
        return conditioning(task.unet, len(prompts), task.device, dtype)

    if prepare:
        prepare(unet)
    m = Models(unet, parameters, speed.fuse(vae), text, net=unet, reward=reward)
    if args.compile:
        compile_networks(args, m, speed)
    return m


def our_sides(methods: Iterable[str], task: Task, reward, compiled: bool = False, prepare=None) -> dict[str, Side]:
    """Our update by each method, on the same networks. Weights, optimizer and precision are those of `train.py`.

    `prepare` may change the UNet before it is compiled, and the copy on which its steps without gradients run.
    """
    args = task.args(compiled)
    m = our_models(task, args, reward, prepare)
    optimizer = torch.optim.AdamW(m.parameters, LR, eps=ADAM_EPS, fused=True)
    unet = accelerate(args, m, optimizer)
    kept = [m.unet, m.vae, optimizer]
    if getattr(unet, "dtype", None):  # a copy with its own weights; a packed copy shares them
        kept.append(unet.copy)
        if prepare:
            prepare(unet.copy)

    def side(method: str) -> Side:
        def loss_of(**batch) -> Tensor:
            return our_loss(method, task, unet, m.vae, reward, **batch)

        return Side(update_of(task, loss_of, optimizer, frozen_dtype(args)), lambda: tensors_of(*kept))

    return {method: side(method) for method in methods}


def diffusers_side(method: str, task: Task, reward) -> Side:
    """Diffusers' update: float32 weights and autoencoder under autocast, AdamW with its defaults, not compiled."""
    unet, vae = trainable(unet_pair(task.unet, task.device)[1]), vae_pair(task.vae, task.device)[1]
    if task.checkpointing:
        unet.enable_gradient_checkpointing(), unet.train()
        vae.enable_gradient_checkpointing(), vae.train()
    optimizer = torch.optim.AdamW(unet.parameters(), LR)

    def loss_of(**batch) -> Tensor:
        return diffusers_loss(method, task, unet, vae, reward, **batch)

    return Side(update_of(task, loss_of, optimizer, torch.float32), lambda: tensors_of(unet, vae, optimizer))
