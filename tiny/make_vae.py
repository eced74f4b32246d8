"""Train the autoencoder of the tiny base on fresh emoji compositions.

    python tiny/make_vae.py            # resumes from tiny/work/vae.safetensors if it is there

L1 on pixels, L1 on their gradients, and a small KL. Writes `tiny/base/vae/` in float16 with the measured latent scale
and prints the PSNR on compositions never seen. 3,200 updates of 16 images.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import state
from data import EmojiSet
from vae import TINY, VAE

TINY_DIR = Path(__file__).parent


@torch.no_grad()
def initialise(vae: VAE) -> None:
    """Start as a linear autoencoder: convolutions keep the variance, residual branches begin at zero.

    torch's own initialisation shrinks the variance by 3 at each convolution; the colour, which only the shortcuts
    carry, is lost on the way, and the first thousand updates with it.
    """
    for name, module in vae.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            torch.nn.init.zeros_(module.bias)
            if name.endswith(("conv2", "to_out.0")):
                torch.nn.init.zeros_(module.weight)
    logvar = slice(vae.config.latent_channels, None)
    vae.encoder.conv_out.weight[logvar] *= 0.1
    vae.quant_conv.bias[logvar] = -2.0  # start with a narrow posterior


def gradients(x: torch.Tensor) -> list[torch.Tensor]:
    return [x.diff(dim=-1), x.diff(dim=-2)]


def loss_of(vae: VAE, x: torch.Tensor, kl_weight: float) -> tuple[torch.Tensor, float]:
    """Reconstruction and KL loss of images x (B, 3, H, W)."""
    mean, logvar = (t.float() for t in vae.encode(x))
    y = vae.decode(mean + (0.5 * logvar).exp() * torch.randn_like(mean)).float()
    l1 = (y - x).abs().mean()
    l1 = l1 + 0.5 * sum((a - b).abs().mean() for a, b in zip(gradients(y), gradients(x), strict=True))
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return l1 + kl_weight * kl, kl.item()


@torch.no_grad()
def evaluate(vae: VAE, seed: int, count: int, device: str) -> tuple[float, float]:
    """Mean PSNR in dB of posterior means, and the standard deviation of unscaled latents, on fresh compositions."""
    images, psnr, latents = EmojiSet(seed=seed), [], []
    for start in range(0, count, 32):
        x = torch.stack([images[i][0] for i in range(start, start + 32)]).to(device)
        mean, _ = vae.encode(x)
        y = vae.decode(mean * vae.config.scale).clamp(-1, 1)
        psnr += (10 * torch.log10(4 / (y - x).square().mean((1, 2, 3)))).tolist()
        latents.append(mean)
    return sum(psnr) / len(psnr), torch.cat(latents).std().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3200, help="updates")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--kl", type=float, default=2e-4, help="weight of the KL term, a mean over latents")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=TINY_DIR / "base" / "vae")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    images, saved = EmojiSet(seed=args.seed), TINY_DIR / "work" / "vae.safetensors"
    vae = VAE(TINY)
    initialise(vae)
    vae = vae.to(args.device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, weight_decay=1e-4, betas=(0.9, 0.99))
    first = state.load(saved, {"vae": vae}, optimizer)["step"] if saved.exists() else 0
    began = time.time()
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            warm = min(1, (step + 1) / 100)
            group["lr"] = args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        batch = range(step * args.batch_size, (step + 1) * args.batch_size)
        x = torch.stack([images[i][0] for i in batch]).to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            loss, kl = loss_of(vae, x, args.kl)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            seconds = (time.time() - began) / (step + 1 - first)
            print(f"step {step + 1}: loss {loss.item():.4f} kl {kl:.2f}, {seconds:.3f} s an update", flush=True)
        if step % 500 == 499:
            state.save(saved, {"vae": vae}, optimizer, {"step": step + 1})
            psnr, std = evaluate(vae.eval(), args.seed + 1, 128, args.device)
            print(f"step {step + 1}: PSNR {psnr:.2f} dB, latent std {std:.3f}", flush=True)

    vae = vae.eval().half().float()  # as it is stored
    psnr, std = evaluate(vae, args.seed + 1, 1024, args.device)
    config = replace(TINY, scale=1 / std)
    state.write(
        args.output / "diffusion_pytorch_model.safetensors",
        {k: t.half() for k, t in vae.state_dict().items()},
    )
    state.write_text(args.output / "config.json", json.dumps(config.to_dict() | {"sample_size": 64}, indent=1) + "\n")
    print(f"PSNR on 1,024 fresh compositions {psnr:.2f} dB -> {args.output}")


if __name__ == "__main__":
    main()
