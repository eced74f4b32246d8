"""Train the autoencoder of the tiny base on fresh emoji compositions.

    python tiny/make_vae.py            # resumes from tiny/work/vae.safetensors if it exists
    python tiny/make_vae.py --decoder  # then only the decoder: the latents, and so the UNet, stay valid

The loss is L1 on pixels and image gradients with a small KL; for the decoder, L1 and PSNR. Writes `tiny/base/vae/` in
float16 with the measured scaling factor, and prints the PSNR on held-out compositions. 3,200 updates of 16 images.
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
import weights
from pretrained.configs import vae_dict
from training import checkpoint
from training.data import EmojiSet
from utils import disk
from utils.device import autocast
from utils.images import to_tensor
from vae import TINY, VAE

TINY_DIR = Path(__file__).parent


@torch.no_grad()
def init_weights(vae: VAE) -> None:
    """Initialise as a linear autoencoder: variance-preserving convolutions, residual branches at zero.

    torch's default divides the variance by 3 at each convolution, so colour, which only the shortcuts carry, is lost,
    and with it the first thousand updates.
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


def autoencoder_loss(vae: VAE, x: torch.Tensor, kl_weight: float) -> tuple[torch.Tensor, float]:
    """Reconstruction and KL loss of images x (B, 3, H, W): (loss, KL)."""
    mean, logvar = (t.float() for t in vae.encode(x))
    y = vae.decode((mean + (0.5 * logvar).exp() * torch.randn_like(mean)) * vae.config.scale).float()
    l1 = (y - x).abs().mean()
    l1 = l1 + 0.5 * sum((a - b).abs().mean() for a, b in zip(gradients(y), gradients(x), strict=True))
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return l1 + kl_weight * kl, kl.item()


def decoder_loss(vae: VAE, x: torch.Tensor) -> torch.Tensor:
    """Mean log-MSE per image, which is the PSNR, plus the L1 terms; no gradients in the encoder."""
    with torch.no_grad():
        z = vae.sample(x)
    y = vae.decode(z).float()
    edges = sum((a - b).abs().mean() for a, b in zip(gradients(y), gradients(x), strict=True))
    return 0.1 * (y - x).square().mean((1, 2, 3)).log().mean() + (y - x).abs().mean() + 0.5 * edges


def perfect(images: EmojiSet, i: int) -> torch.Tensor:
    """Item i without its defects: every latent that the base can reach decodes to a crisp picture."""
    return to_tensor(images.draw(images.describe(i)))


@torch.no_grad()
def evaluate(vae: VAE, seed: int, count: int, device: str) -> tuple[float, float]:
    """(mean PSNR in dB of decoded posterior means, standard deviation of unscaled latents) on new compositions."""
    images, psnr, latents = EmojiSet(seed=seed), [], []
    for start in range(0, count, 32):
        x = torch.stack([perfect(images, i) for i in range(start, start + 32)]).to(device)
        mean, _ = vae.encode(x)
        y = vae.decode(mean * vae.config.scale).clamp(-1, 1)
        psnr += (10 * torch.log10(4 / (y - x).square().mean((1, 2, 3)))).tolist()
        latents.append(mean)
    return sum(psnr) / len(psnr), torch.cat(latents).std().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", action="store_true", help="train only the decoder of the existing autoencoder")
    parser.add_argument("--steps", type=int, help="updates (default: 3200, decoder 8000)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, help="default: 8e-4, decoder 4e-4")
    parser.add_argument("--kl", type=float, default=2e-4, help="weight of the mean KL per latent value")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=TINY_DIR / "base" / "vae")
    args = parser.parse_args()

    args.steps = args.steps or (8000 if args.decoder else 3200)
    args.lr = args.lr or (4e-4 if args.decoder else 8e-4)
    torch.manual_seed(args.seed)
    images, saved = EmojiSet(seed=args.seed), TINY_DIR / "work" / f"vae{'-decoder' * args.decoder}.safetensors"
    if args.decoder:
        vae = weights.load_vae("tiny")
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
        vae = vae.to(args.device, memory_format=torch.channels_last)
    else:
        vae = VAE(TINY)
        init_weights(vae)
        vae = vae.to(args.device)
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=1e-4, betas=(0.9, 0.99))
    first = checkpoint.load(saved, {"vae": vae}, optimizer)["step"] if saved.exists() else 0
    began = time.time()
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            warm = min(1, (step + 1) / 100)
            group["lr"] = args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        batch = range(step * args.batch_size, (step + 1) * args.batch_size)
        x = torch.stack([perfect(images, i) for i in batch]).to(args.device)
        with autocast(args.device):
            loss, kl = (decoder_loss(vae, x), 0.0) if args.decoder else autoencoder_loss(vae, x, args.kl)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 50 == 49:
            seconds = (time.time() - began) / (step + 1 - first)
            print(f"step {step + 1}: loss {loss.item():.4f} kl {kl:.2f}, {seconds:.3f} s per update", flush=True)
        if step % 500 == 499:
            checkpoint.save(saved, {"vae": vae}, optimizer, {"step": step + 1})
            psnr, std = evaluate(vae.eval(), args.seed + 1, 128, args.device)
            print(f"step {step + 1}: PSNR {psnr:.2f} dB, latent std {std:.3f}", flush=True)

    vae = vae.eval().half().float()  # the precision in which it is saved
    psnr, std = evaluate(vae, args.seed + 1, 1024, args.device)
    config = vae.config if args.decoder else replace(TINY, scale=1 / std)
    disk.write(
        args.output / "diffusion_pytorch_model.safetensors",
        {k: t.half() for k, t in vae.state_dict().items()},
    )
    disk.write_text(args.output / "config.json", json.dumps(vae_dict(config) | {"sample_size": 64}, indent=1) + "\n")
    print(f"PSNR on 1,024 new compositions {psnr:.2f} dB -> {args.output}")


if __name__ == "__main__":
    main()
