"""DRaFT, DRTune and Diffusion-DPO on mini networks: which steps carry gradients, what the UNet sees, the values."""

# ruff: noqa: F401, F811 - fixtures

import copy
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from recipe import filled, golden_config, mini_base, rnd
from test_methods import CONDITIONING, PROMPTS, SCHEDULER, brightness, seeded, unet, vae
from test_speed import CONFIG, SMALL_VAE

import baselines
import refl
import sample
import train
import weights
from baselines.dpo import dpo_loss, ranked_pairs
from baselines.draft import draft_loss
from baselines.drtune import drtune_loss, trained_steps
from baselines.from_image import noised_image
from baselines.kl import KLToBase
from combined import conditional
from pretrained.configs import unet_config
from refl import score_latents
from report.points import method_and_path
from scheduler import denoise, diffusion_loss
from training import cost, monitor, options
from training.pairs import open_pairs
from unet import UNet
from vae import VAE

X_T = rnd("x_T", 2, 4, 4, 4)
TWICE = {"context": torch.cat([CONDITIONING["context"]] * 2)}


def draft(unet, vae, first=0, reward=brightness, **more):
    return draft_loss(unet, vae, reward, SCHEDULER, X_T, first, CONDITIONING, PROMPTS, seeded(), **more)


def drtune(unet, vae, first=0, seed=0, **more):
    return drtune_loss(unet, vae, brightness, SCHEDULER, X_T, first, CONDITIONING, PROMPTS, seeded(seed), **more)


def trained(unet) -> list[int]:
    """The step indices of the calls with gradients."""
    return [SCHEDULER.timesteps.index(t) for t, gradients in unet.calls if gradients]


def inputs_of(unet) -> list[torch.Tensor]:
    """The inputs of the UNet's calls, filled as they are made."""
    seen, forward = [], unet.forward
    unet.forward = lambda x, *args, **kwargs: (seen.append(x), forward(x, *args, **kwargs))[1]
    return seen


def assert_finite_differences(value, weight, step=1e-5, rel=1e-5) -> None:
    """The gradient of `value()` for the first entries of a weight."""
    weight.grad = None
    value().backward()
    with torch.no_grad():
        for i in range(3):
            weight[i] += step
            up = value()
            weight[i] -= 2 * step
            down = value()
            weight[i] += step
            assert weight.grad[i].item() == pytest.approx(((up - down) / (2 * step)).item(), rel=rel)


# ------------------------------------------------------------------------------------------------ DRaFT


@pytest.mark.parametrize("first, K", [(0, 1), (0, 3), (30, 3), (38, 3)])
def test_gradients_of_draft_pass_exactly_the_last_k_steps(unet, vae, first, K):
    seen = inputs_of(unet)
    draft(unet, vae, first, K=K).backward()
    assert [t for t, _ in unet.calls] == SCHEDULER.timesteps[first:]
    assert trained(unet) == list(range(max(40 - K, first), 40))
    assert [x.requires_grad for x in seen] == [i > max(40 - K, first) for i in range(first, 40)]


def test_the_reward_of_draft_sees_the_sampled_image(unet, vae):
    generator = seeded()
    with torch.no_grad():
        x0 = denoise(SCHEDULER, conditional(unet, CONDITIONING), X_T, SCHEDULER.steps, generator)
        expected = -score_latents(vae, brightness, x0, PROMPTS).mean()
    assert torch.equal(draft(unet, vae).detach(), expected)


@pytest.mark.parametrize("K", [1, 3])
def test_the_gradient_of_draft_equals_finite_differences(unet, vae, K):
    """From K steps before the end on, so that the steps without gradients depend on no weight."""
    unet, vae = unet.double(), vae.double()
    c, x = {"context": CONDITIONING["context"].double()}, X_T.double()
    inputs = (unet, vae, brightness, SCHEDULER, x, 40 - K, c, PROMPTS)
    assert_finite_differences(lambda: draft_loss(*inputs, seeded(), K=K), unet.conv_out.bias)


def test_draft_lv_adds_gradients_of_the_last_step_from_the_noised_sample(unet, vae):
    seen, images = inputs_of(unet), []
    draft(unet, vae, 37, lambda x, p: images.append(x) or brightness(x, p), K=1, lv_samples=2).backward()
    assert trained(unet) == [39, 39, 39] and not any(x.requires_grad for x in seen)
    assert len(images[0]) == 3 * len(PROMPTS)
    noise = (SCHEDULER.abar[1] ** -0.5 * seen[-1] - seen[-2] / SCHEDULER.abar[1] ** 0.5).std()
    assert noise == pytest.approx((2 * (1 - SCHEDULER.abar[1])).sqrt().item(), rel=0.2)  # two draws around one x0


# ------------------------------------------------------------------------------------------------ DRTune


@pytest.mark.parametrize("first", [0, 30])
@pytest.mark.parametrize("seed", range(3))
def test_drtune_trains_equally_spaced_steps_and_no_input_requires_gradients(unet, vae, first, seed):
    seen = inputs_of(unet)
    drtune(unet, vae, first, seed).backward()
    steps, stop = trained(unet), first + len(unet.calls) - 1
    assert [t for t, _ in unet.calls] == SCHEDULER.timesteps[first : stop + 1] and 30 <= stop <= 39
    assert len(steps) == min(5, stop + 1 - first)
    assert len({b - a for a, b in itertools.pairwise(steps)}) <= 1
    assert not any(x.requires_grad for x in seen)


def test_the_trained_steps_of_drtune_reach_from_the_first_to_the_last():
    generator, counts = seeded(), torch.zeros(40)
    for _ in range(2000):
        steps = trained_steps(0, 37, 5, generator)
        assert len(steps) == 5 and steps.step == 7 and 0 <= steps[0] and steps[-1] <= 37
        counts[list(steps)] += 1
    assert (counts > 0).sum() == 38 and counts.sum() == 10_000


def test_the_gradient_of_drtune_is_that_of_the_linear_path(unet, vae, monkeypatch):
    """Steps 34 and 36 of 34..37: eps_theta(x_34) enters x_37 by b_34 a_35 a_36, and x0 by that over sqrt(abar)."""
    monkeypatch.setattr("baselines.drtune.sample_t_f", lambda *_: 37)
    monkeypatch.setattr("baselines.drtune.trained_steps", lambda *_: range(34, 38, 2))
    grads, forward = {}, unet.forward

    def spy(x, t, **c):
        eps = forward(x, t, **c)
        if eps.requires_grad:
            eps.register_hook(lambda g: grads.update({int(t[0]): g}))
        return eps

    unet.forward = spy
    x0s = []
    monkeypatch.setattr("baselines.drtune.score_latents", lambda v, r, x0, *_: x0s.append(x0) or x0.sum((1, 2, 3)))
    drtune(unet, vae, first=34).backward()
    a, b, abar = SCHEDULER.a, SCHEDULER.b, SCHEDULER.abar
    for i, factor in ((34, b[34] * a[35] * a[36]), (36, b[36])):
        expected = -factor / abar[SCHEDULER.timesteps[37]].sqrt() / 2  # a mean over two images
        assert torch.allclose(grads[SCHEDULER.timesteps[i]], torch.full((2, 4, 4, 4), expected.item()), rtol=1e-5)
    assert grads.keys() == {SCHEDULER.timesteps[34], SCHEDULER.timesteps[36]}


def test_the_weights_of_the_steps_that_the_documents_name():
    """|d x_0 / d eps_theta|: along the sampler by autograd, and where x_0 is predicted at the step."""
    eps = torch.zeros(40, 1, 1, 1, requires_grad=True)
    x = torch.zeros(1, 1, 1, 1)
    for i in SCHEDULER.steps:
        x = SCHEDULER.step(i, x, eps[i : i + 1], seeded())
    x.sum().backward()
    weights = eps.grad.abs().flatten()
    assert weights[[0, 10, 20, 30, 39]].tolist() == pytest.approx([3.19, 0.682, 0.227, 0.116, 0.041], abs=5e-3)
    assert (1 / SCHEDULER.abar[226] - 1).sqrt().item() == pytest.approx(0.635, abs=5e-3)


# ------------------------------------------------------------------------------------------------ Diffusion-DPO


def test_dpo_at_the_base_model_is_log_2(unet, vae):
    loss = dpo_loss(unet, unet, SCHEDULER, rnd("pairs", 4, 4, 4, 4), TWICE, seeded())
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert [gradients for _, gradients in unet.calls] == [True, False]


def test_dpo_equals_its_equation(unet):
    x0, base = rnd("pairs", 4, 4, 4, 4), lambda x, t, context: torch.zeros_like(x)
    loss = dpo_loss(unet, base, SCHEDULER, x0, TWICE, seeded(), beta=2.0)
    generator = seeded()
    eps = torch.randn(2, 4, 4, 4, generator=generator)
    t = torch.randint(1000, (2,), generator=generator)
    expected = []
    with torch.no_grad():
        for k in range(2):
            gaps = []
            for x in (x0[k], x0[2 + k]):
                x_t = SCHEDULER.abar[t[k]].sqrt() * x + (1 - SCHEDULER.abar[t[k]]).sqrt() * eps[k]
                ours = unet(x_t[None].float(), t[k : k + 1], CONDITIONING["context"][k : k + 1])
                gaps.append((ours - eps[k]).square().mean() - eps[k].square().mean())
            expected.append(-torch.log(torch.sigmoid(-1.0 * (gaps[0] - gaps[1]))))
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)


def test_dpo_draws_k_timesteps_per_pair(unet):
    """In each draw the two noised images of a pair differ by what the images differ, scaled: t and eps are shared."""
    seen, times, x0 = inputs_of(unet), [], rnd("pairs", 4, 4, 4, 4)
    base = lambda x, t, context: (times.append(t), torch.zeros_like(x))[1]  # noqa: E731
    dpo_loss(unet, base, SCHEDULER, x0, TWICE, seeded(), K=3)
    better, worse = seen[0].view(2, 3, 2, 4, 4, 4)  # (halves of the batch, draws, pairs, ...)
    t = times[0].view(2, 3, 2)
    assert torch.equal(t[0], t[1]) and len(set(t[0].flatten().tolist())) == 6
    scale = SCHEDULER.abar[t[0]].sqrt().view(3, 2, 1, 1, 1)
    assert torch.allclose((better - worse).double(), scale * (x0[:2] - x0[2:]), atol=1e-5)


def test_the_gradient_of_dpo_equals_finite_differences_and_prefers_the_better_image(unet):
    unet = unet.double()
    x0, c = rnd("pairs", 4, 4, 4, 4).double(), {"context": TWICE["context"].double()}
    base = lambda x, t, context: torch.zeros_like(x)  # noqa: E731

    def value():
        return dpo_loss(unet, base, SCHEDULER, x0, c, seeded(), beta=1.0)

    assert_finite_differences(value, unet.conv_out.bias, 1e-2, 1e-2)  # `diffusion_loss` is in float32
    generator = seeded()
    eps = torch.randn(2, 4, 4, 4, generator=generator, dtype=torch.float32).double().repeat(2, 1, 1, 1)
    t = torch.randint(1000, (2,), generator=generator).repeat(2)

    def errors():
        with torch.no_grad():
            return diffusion_loss(unet(SCHEDULER.add_noise(x0, eps, t), t, **c), eps)

    before = errors()
    optimizer = torch.optim.SGD(unet.parameters(), 1e-3)
    optimizer.zero_grad()
    value().backward()
    optimizer.step()
    change = errors() - before
    assert change[:2].mean() < change[2:].mean()


def test_pairs_are_samples_ordered_by_the_reward(unet, vae):
    x_T = rnd("four", 4, 4, 4, 4)
    x0, scores = ranked_pairs(unet, vae, brightness, SCHEDULER, x_T, 36, TWICE, PROMPTS * 2, seeded())
    with torch.no_grad():
        again = denoise(SCHEDULER, conditional(unet, TWICE), x_T, range(36, 40), seeded())
        own = score_latents(vae, brightness, x0, PROMPTS * 2)
    assert (own[:2] >= own[2:]).all() and not any(gradients for _, gradients in unet.calls)
    for k in range(2):  # both of a pair are of the same prompt
        assert sorted(x.sum().item() for x in x0[k::2]) == sorted(x.sum().item() for x in again[k::2])
    assert torch.equal(scores.sort().values, own.sort().values)


# ------------------------------------------------------------------------------------------------ from an image


def test_a_noised_image_has_the_diffusion_loss_of_imagerefl(unet):
    x0 = rnd("x0", 2, 4, 4, 4)
    x_t, loss = noised_image(unet, SCHEDULER, x0, 30, CONDITIONING, seeded())
    eps = torch.randn(2, 4, 4, 4, generator=seeded())
    assert torch.equal(x_t, SCHEDULER.add_noise(x0, eps, 226)) and unet.calls == [(226, True)]
    assert loss.item() == pytest.approx((unet(x_t, 226, **CONDITIONING) - eps).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("method, flags", [("draft", []), ("drtune", []), ("dpo", ["--beta", "7"])])
@pytest.mark.parametrize("from_image", [False, True])
def test_three_updates_of_four_start_from_an_image(method, flags, from_image, unet, vae, monkeypatch):
    starts, logged = [], []

    def loss(unet, vae, reward, scheduler, x_t, first, c, prompts, *rest):
        assert len(x_t) == len(prompts) == len(c["context"]) == (4 if method == "dpo" else 2)
        starts.append(first)
        return (x_t, torch.ones(4)) if method == "dpo" else x_t.mean()

    monkeypatch.setattr(baselines, "draft_loss", loss)
    monkeypatch.setattr(baselines, "drtune_loss", loss)
    monkeypatch.setattr(baselines, "ranked_pairs", loss)
    args = options.parse_args(["--method", method, *flags, *["--from-image"] * from_image, "--device", "cpu"])
    options.resolve(args, options.presets.TINY)
    m = SimpleNamespace(vae=vae, reward=brightness, reference=unet)
    run = SimpleNamespace(
        has_pairs=False, args=args, models=m, latent_shape=lambda p: (len(p), 4, 4, 4), log=lambda **v: logged.append(v)
    )
    x0 = rnd("x0", 2, 4, 4, 4) if from_image else None
    for update in range(4):
        baselines.baseline_loss(run, unet, SCHEDULER, update, x0, CONDITIONING, PROMPTS, seeded())
    assert starts == ([30, 30, 30, 0] if from_image else [0] * 4)
    assert ["diffusion" in values for values in logged] == [from_image] * 3 + [False]
    assert all("reward" in values for values in logged)


# ------------------------------------------------------------------------------------------------ KL to the base


def test_the_kl_is_the_squared_difference_from_the_base_in_calls_with_gradients(unet):
    """Zero at the base, without a change of predictions; its gradient equals finite differences."""
    unet, base = unet.double(), copy.deepcopy(unet).double().requires_grad_(False)
    tied, x_t = KLToBase(unet, base), X_T[:2].double()
    c = {"context": CONDITIONING["context"].double()}
    assert torch.equal(tied(x_t, 226, **c), unet(x_t, 226, **c)) and tied.loss().item() == 0
    with torch.no_grad():
        unet.conv_out.weight.add_(0.01)
        tied(x_t, 500, **c)
    assert tied.terms == []

    def expected(t: int) -> float:
        with torch.no_grad():
            return (unet(x_t, t, **c) - base(x_t, t, **c)).square().mean().item()

    tied(x_t, 226, **c), tied(x_t, 1, **c)
    assert tied.loss().item() == pytest.approx((expected(226) + expected(1)) / 2, rel=1e-5)

    @torch.enable_grad()
    def value() -> torch.Tensor:
        tied(x_t, 226, **c)
        return tied.loss()

    assert_finite_differences(value, unet.conv_out.bias, step=1e-3, rel=1e-3)
    assert all(p.grad is None for p in base.parameters())


# ------------------------------------------------------------------------------------------------ cost and flags


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["draft"], 37 + 3 * 3 + 6.5),
        (["draft", "--gradient-steps", "1", "--lv-samples", "2"], 39 + 3 + 6.5 + 2 * (3 + 6.5)),
        (["draft", "--gradient-steps", "1-3"], 38 + 2 * 3 + 6.5),
        (["drtune"], 35.5 - 5 + 5 * 3 + 6.5),
        (["dpo"], 2 * (40 + 3.25 + 4 * (3 + 1))),
        (["dpo", "--gradient-steps", "1"], 2 * (40 + 3.25 + 3 + 1)),
        (["draft", "--from-image"], (3 * (2 + 3 + 7 + 9 + 6.5) + 52.5) / 4),
        (["drtune", "--from-image"], (3 * (2 + 3 + 1.5 + 4 * 3 + 6.5) + 52) / 4),
        (["draft", "--kl-scale", "1"], 37 + 3 * 4 + 6.5),
        (["refl", "--kl-scale", "1"], 34.5 + 4 + 6.5),
        (["imagerefl", "--kl-scale", "1"], (3 * (2 + 3.6 + 4 + 4 + 6.5) + 34.5 + 4 + 6.5) / 4),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_cost_of_an_image_adds_up(flags, expected):
    names = ("UNet forward", "UNet with gradients", "decode with gradients", "encode", "reward with gradients")
    args = options.parse_args(["--method", *flags])
    options.resolve(args, options.presets.TINY)
    costs = cost.costs_of(args, dict(zip(names, (1, 3, 6, 2, 0.5), strict=True)))
    assert costs["3:1 mix" if args.method == "imagerefl" else args.method] == pytest.approx(expected)


@pytest.mark.parametrize(
    "flags, copies",
    [
        pytest.param(
            ["draft", "--gradient-steps", "2", "--lv-samples", "1"],
            0,
            marks=pytest.mark.slow,
        ),
        pytest.param(["drtune", "--from-image"], 0, marks=pytest.mark.slow),
        (["dpo"], 1),
        (["refl", "--kl-scale", "1"], 1),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_plan_keeps_the_copies_and_activations_of_a_method(flags, copies):
    def memory_of(*flags: str) -> cost.MemoryModel:
        args = options.parse_args(["--method", *flags, "--resolution", "16", "--device", "cpu"])
        options.resolve(args, options.presets.TINY)
        return cost.MemoryModel(args, CONFIG, SMALL_VAE)

    memory, size = memory_of(*flags), sum(p.nbytes for p in UNet(CONFIG).parameters())
    assert memory.between_updates - memory_of("refl").between_updates == copies * size
    kept, peaks = memory.peak("", (1, 5))
    for n, peak in zip((1, 5), peaks, strict=True):
        memory.IMAGES = n
        assert kept + max(itertools.accumulate(memory.micro_batch(False, False))) == pytest.approx(peak, abs=10_000)


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def fast(monkeypatch):
    """Four sampling steps, no scores of the base model."""
    monkeypatch.setattr(train, "STEPS", 4)
    monkeypatch.setattr(refl, "T_MAX", 2)
    monkeypatch.setattr(monitor, "evaluate", lambda *_: None)
    monkeypatch.setattr(monitor, "summarise", lambda *_: {"base": {"reward": [0.0, 0.0]}})


@pytest.fixture(scope="module", params=["mini", pytest.param("SD1.5's layers", marks=pytest.mark.slow)])
def base(request, tmp_path_factory):
    folder = Path(mini_base(tmp_path_factory.mktemp("base")))
    if request.param != "mini":
        config = unet_config(golden_config("unet_sd15_mini") | {"cross_attention_dim": 128})
        weights.save_unet(filled(UNet(config)), folder / "unet")
    return str(folder)


def run(base, folder, *flags: str) -> list[dict]:
    """The log of a run."""
    flags = [
        "--base",
        base,
        "--reward",
        "tiny",
        "--batch-size",
        "1",
        "--dtype",
        "float32",
        "--sample-every",
        "0",
        *flags,
    ]
    train.main(train.parse_args([*flags, "--start", "2", "--output-dir", str(folder)]))
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "flags, method, switch",
    [
        (["draft", "--lv-samples", "1"], "draft", 30),
        (["drtune", "--gradient-steps", "2"], "drtune", 10),
        (["dpo"], "dpo", 10),
        (["dpo", "--from-image", "--lora", "2"], "image-dpo", 30),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_run_trains_and_saves_what_the_other_commands_read(flags, method, switch, base, tmp_path, fast):
    (row,) = run(base, tmp_path / "run", "--steps", "1", "--method", *flags)
    assert row["kind"] == flags[0] and row["grad_norm"] > 0 and math.isfinite(row["reward"])
    assert ("diffusion" in row) == ("--from-image" in flags)
    if flags[0] == "dpo":
        assert row["dpo"] == pytest.approx(math.log(2), abs=1e-4)
    assert method_and_path(str(tmp_path / "run")) == (method, str(tmp_path / "run"))
    args = sample.parse_args(["--checkpoint", str(tmp_path / "run"), "--output-dir", str(tmp_path / "samples")])
    assert sample.resolve(args) == [0.0] * switch + [1.0] * (40 - switch)


@pytest.mark.parametrize(
    "flags",
    [
        ["refl"],
        pytest.param(["imagerefl", "--lora", "2"], marks=pytest.mark.slow),
        pytest.param(["drtune"], marks=pytest.mark.slow),
    ],
    ids=lambda flags: flags[0],
)
def test_a_kl_holds_the_model_near_the_base(flags, base, tmp_path, fast):
    """It is zero in the first update and smaller afterwards than where it weighs nothing."""
    last = []
    for scale in ("1e-9", "1e3"):
        rows = run(base, tmp_path / scale, "--steps", "10", "--kl-scale", scale, "--lr", "1e-3", "--method", *flags)
        assert rows[0]["kl"] < 1e-9 and all(row["kl"] > 1e-9 for row in rows[1:])
        last.append(rows[-1]["kl"])
    assert last[1] < 0.8 * last[0]


def test_dpo_learns_from_a_folder_of_pairs(base, tmp_path, fast, monkeypatch, capsys):
    for name, colour in (("a", 255), ("b", 0)):
        Image.new("RGB", (80, 64), (colour, 128, 128)).save(tmp_path / f"{name}.png")
    lines = [{"better": "a.png", "worse": "b.png", "text": text} for text in ("fox", "owl")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pairs, seen = open_pairs(str(tmp_path), 64), []
    assert [pairs[i][1] for i in range(len(pairs))] == ["fox", "owl"] and pairs[0][0].shape == (2, 3, 64, 64)
    assert pairs[0][0][:, 0].mean((1, 2)).tolist() == [1.0, -1.0]  # the better one is red
    assert open_pairs(None, 64) is None and open_pairs(str(tmp_path / "none"), 64) is None

    def loss(run, unet, scheduler, update, x0, c, prompts, rng):
        seen.append((x0, prompts))
        return baselines.baseline_loss(run, unet, scheduler, update, x0, c, prompts, rng)

    monkeypatch.setattr(train, "baseline_loss", loss)
    monkeypatch.setattr(VAE, "sample", lambda self, images, generator: images[:, [0, 0, 0, 0], ::8, ::8])  # red
    flags = ["--method", "dpo", "--data", str(tmp_path), "--batch-size", "2", "--steps", "1"]
    (row,) = run(base, tmp_path / "run", *flags)
    assert "reward" not in row and row["grad_norm"] > 0 and "2 pairs of images, from" in capsys.readouterr().out
    ((x0, prompts),) = seen
    assert sorted(prompts) == ["fox", "owl"] and x0.mean((1, 2, 3)).tolist() == [1.0, 1.0, -1.0, -1.0]
