"""docs/elsewhere.md: settings of other programs that equal Eq. 3, from the formulas of those programs."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import weights
from combined import combined_weights, generate
from scheduler import Scheduler
from training import presets

ROOT = Path(__file__).parent.parent
OURS = Scheduler(40)
NODES = {  # ComfyUI's inputs by type: a name of a link's type, or the type of a value; and the types of the outputs
    "CheckpointLoaderSimple": ({"ckpt_name": str}, ("MODEL", "CLIP", "VAE")),
    "CLIPTextEncode": ({"text": str, "clip": "CLIP"}, ("CONDITIONING",)),
    "EmptyLatentImage": ({"width": int, "height": int, "batch_size": int}, ("LATENT",)),
    "KSamplerAdvanced": (
        {
            **{"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
            **{"noise_seed": int, "steps": int, "start_at_step": int, "end_at_step": int, "cfg": float},
            **dict.fromkeys(("add_noise", "sampler_name", "scheduler", "return_with_leftover_noise"), str),
        },
        ("LATENT",),
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": str}, ()),
}


def comfy_sigmas(steps: int) -> np.ndarray:
    """ComfyUI's `ddim_uniform`: sigmas of every (1000 // steps)-th timestep from 1 on, downwards, then 0."""
    sigmas = ((1 - OURS.abar) / OURS.abar).sqrt().numpy()
    return np.append(sigmas[1 :: len(sigmas) // steps][::-1], 0.0)


def timestep(sigma: float) -> float:
    """The timestep with this noise level, interpolated in log sigma as ComfyUI does."""
    levels = ((1 - OURS.abar) / OURS.abar).sqrt().log().numpy()
    return float(np.interp(np.log(sigma), levels, np.arange(1000)))


def test_comfyuis_ddim_uniform_has_our_timesteps_and_its_ddpm_our_steps():
    sigmas = comfy_sigmas(40)
    assert [round(timestep(s)) for s in sigmas[:-1]] == OURS.timesteps
    for i, (sigma, after) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        abar, abar_next = 1 / (sigma**2 + 1), 1 / (after**2 + 1)
        ratio = abar / abar_next  # alpha of the step; ddpm: the mean and variance of q(x_s | x_t, x_0)
        assert ratio**-0.5 == pytest.approx(OURS.a[i].item(), abs=1e-12)
        assert -(1 - ratio) / (1 - abar) ** 0.5 / ratio**0.5 == pytest.approx(OURS.b[i].item(), abs=1e-9)
        variance = (1 - ratio) * (1 - abar_next) / (1 - abar)
        assert variance**0.5 == pytest.approx(OURS.c[i].item(), abs=1e-9)


def test_comfyuis_euler_ancestral_takes_the_same_steps():
    sigmas = comfy_sigmas(40)
    for i, (sigma, after) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        up = min(after, (after**2 * (sigma**2 - after**2) / sigma**2) ** 0.5)
        down = (after**2 - up**2) ** 0.5
        here, there = (1 + sigma**2) ** 0.5, (1 + after**2) ** 0.5  # it computes in x sqrt(1 + sigma^2)
        assert here / there == pytest.approx(OURS.a[i].item(), abs=1e-12)
        assert (down - sigma) / there == pytest.approx(OURS.b[i].item(), abs=1e-9)
        assert up / there == pytest.approx(OURS.c[i].item(), abs=1e-9)


def test_comfyuis_euler_takes_our_steps_without_fresh_noise():
    ours, sigmas = Scheduler(40, eta=0.0), comfy_sigmas(40)
    for i, (sigma, after) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        there = (1 + after**2) ** 0.5
        assert (1 + sigma**2) ** 0.5 / there == pytest.approx(ours.a[i].item(), abs=1e-12)
        assert (after - sigma) / there == pytest.approx(ours.b[i].item(), abs=1e-9)
    assert ours.abar[0].item() == pytest.approx(0.999, abs=5e-4)  # where A1111's last step ends


def test_other_schedules_reach_the_switch_elsewhere():
    sigma = np.array([((1 - a) / a) ** 0.5 for a in OURS.abar.tolist()])
    normal = np.linspace(999, 0, 40)[30]
    simple = [999 - int(i * 1000 / 40) for i in range(40)][30]
    ramp = np.linspace(0, 1, 40)
    karras = (sigma[-1] ** (1 / 7) + ramp * (sigma[0] ** (1 / 7) - sigma[-1] ** (1 / 7))) ** 7
    assert normal == pytest.approx(230.5, abs=0.5) and simple == 249 and OURS.timesteps[30] == 226
    assert int(np.argmin(abs(karras - sigma[226]))) == 24
    assert [len(comfy_sigmas(n)) - 1 for n in (28, 30, 35, 40, 50)] == [29, 31, 36, 40, 50]
    x_T = comfy_sigmas(40)[0] / (1 + comfy_sigmas(40)[0] ** 2) ** 0.5
    assert x_T == pytest.approx(0.997, abs=5e-4)  # of the starting noise


def test_the_cuts_of_a1111_and_diffusers_fall_between_the_same_steps():
    for share, base_steps in ((0.25, 10), (0.5, 20), (0.75, 30), (0.875, 35)):
        refiner = next(i for i, t in enumerate(OURS.timesteps) if (999 - t) / 1000 >= share)
        assert refiner == base_steps == next(i for i in range(40) if i / 40 >= share)
        cut = round(1000 - 1000 * share)
        first = [t for t in OURS.timesteps if t >= cut]  # denoising_end keeps these
        second = [t for t in OURS.timesteps if t < cut]  # denoising_start those
        assert (len(first), len(second)) == (base_steps, 40 - base_steps)


def test_the_switches_of_the_page_are_the_presets():
    rows = re.findall(
        r"^\| (ImageReFL|ReFL) \| (SD1.5|SDXL) \| (\d+) \|$", (ROOT / "docs/elsewhere.md").read_text(), re.M
    )
    bases = {"SD1.5": presets.SD15, "SDXL": presets.SDXL}
    assert {(m, b): int(n) for m, b, n in rows} == {
        (m, b): preset.switch[m.lower()] for b, preset in bases.items() for m in ("ReFL", "ImageReFL")
    }


def test_the_workflow_fits_its_nodes_and_the_table():
    graph = json.loads((ROOT / "docs" / "comfyui.json").read_text())
    for node in graph.values():
        inputs, _ = NODES[node["class_type"]]
        assert node["inputs"].keys() == inputs.keys()
        for name, kind in inputs.items():
            value = node["inputs"][name]
            if isinstance(kind, str):
                source, output = value
                assert NODES[graph[source]["class_type"]][1][output] == kind
            else:
                assert isinstance(value, kind)
    first, second = (node["inputs"] for node in graph.values() if node["class_type"] == "KSamplerAdvanced")
    assert graph[second["latent_image"][0]]["inputs"] is first and first["end_at_step"] == second["start_at_step"] == 30
    assert (first["add_noise"], second["add_noise"]) == ("enable", "disable")
    assert (first["return_with_leftover_noise"], second["return_with_leftover_noise"]) == ("enable", "disable")
    assert first["noise_seed"] != second["noise_seed"] and second["cfg"] == 1
    for same in ("steps", "sampler_name", "scheduler"):
        assert first[same] == second[same]
    assert first["steps"] == 40 and (first["sampler_name"], first["scheduler"]) == ("ddpm", "ddim_uniform")


@pytest.mark.slow
def test_diffusers_with_the_callback_of_the_page_draws_our_image(monkeypatch):
    """The code block of the page on the tiny base, with given noise and the guidance of that base."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    load = partial(StableDiffusionPipeline.from_pretrained, ROOT / "tiny" / "base", safety_checker=None)
    pipe, tuned = load(dtype=torch.float32), load(dtype=torch.float32).unet
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, pipe.unet.config.in_channels, 8, 8, generator=generator)
    with torch.no_grad():
        for p in tuned.parameters():
            p.mul_(1.01)  # a tuned model
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", lambda _: pipe)
    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", lambda _: tuned)
    page = (ROOT / "docs" / "elsewhere.md").read_text()
    code = page.split("```python\n")[1].split("```")[0].replace("7.5", "2.0")
    given = 'latents=latents, generator=generator, output_type="pt", num_inference_steps=40'
    code, count = code.replace("num_inference_steps=40", given), code.count("num_inference_steps=40")
    assert count == 1
    pipe.set_progress_bar_config(disable=True)
    names = {"prompt": "fox", "latents": latents, "generator": generator}
    exec(code, names)
    theirs = names["image"]

    ours_base, ours_tuned = weights.load_unet("tiny"), weights.load_unet("tiny")
    with torch.no_grad():
        for p in ours_tuned.parameters():
            p.mul_(1.01)
    vae, text = weights.load_vae("tiny"), weights.load_text("tiny")
    image = generate(ours_base, ours_tuned, vae, text, OURS, combined_weights(40, 30), ["fox"], [3], (64, 64), 2.0)[0]
    assert (theirs - (image / 2 + 0.5).clamp(0, 1)).abs().max() < 2e-3
