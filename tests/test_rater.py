"""The ground truth of the tiny base: real compositions are recognised, damage and wrong captions are measured."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import rewards
from tiny import make_rewards
from tiny.rater import BEYOND_RECOGNITION, Rater
from training.emoji import EmojiSet
from utils.images import to_tensor

EMOJI = EmojiSet()


@pytest.fixture(scope="module")
def rater():
    return rewards.load("rater")


def real(count: int, first: int = 7_000) -> tuple[list, torch.Tensor]:
    shown = [EMOJI.describe(first + i) for i in range(count)]
    return shown, torch.stack([to_tensor(EMOJI.draw(c)) for c in shown])


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_real_compositions_are_recognised_exactly(rater, count):
    """And what is left of the distance is the rounding of pixels to 8 bits: at most half a step of 2 / 255."""
    shown, images = real(count)
    for found, c in zip(rater.look_up(images), shown, strict=True):
        assert (found.concept, found.style, found.background) == (c.concept, c.style, c.background)
        assert found.distance < 1 / 255
    assert (without_taste(rater, images, [c.caption for c in shown]) > 9.9).all()


def without_taste(rater: Rater, images, captions) -> torch.Tensor:
    return rater(images, captions) - torch.tensor([found.taste for found in rater.look_up(images, captions)])


def blurred(x, s):
    side = round(64 - 56 * s)
    small = F.interpolate(x, size=side, mode="bilinear", antialias=True, align_corners=False)
    return F.interpolate(small, size=64, mode="bicubic", align_corners=False)


NOISE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
DAMAGES = {
    "noise": lambda x, s: x + 0.8 * s * NOISE,
    "blur": blurred,
    "fading": lambda x, s: x * (1 - 0.8 * s),
    "contrast": lambda x, s: (x * (1 + 5 * s)).clamp(-1, 1),
    "a cover": lambda x, s: torch.cat([x[..., : round(64 - 40 * s)], 0 * x[..., round(64 - 40 * s) :]], -1),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_more_damage_is_a_lower_score(rater, kind):
    shown, images = real(8)
    captions = [c.caption for c in shown]
    means = [rater(DAMAGES[kind](images, s), captions).mean().item() for s in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert means == sorted(means, reverse=True) and means[0] - means[-1] > 1


def test_what_the_caption_says_counts(rater):
    """Each caption is compared with the compositions that fit it: concept, and style and background where named."""
    c = replace(EMOJI.describe(7_000), concept="octopus", style="flat", background="pink")
    image = to_tensor(EMOJI.draw(c))[None]

    def score(prompt: str) -> float:
        return without_taste(rater, image, [prompt]).item()

    for fits in (
        "octopus",
        "octopus, flat style",
        "octopus, on a pink background",
        "octopus, flat style, on a pink background",
    ):
        assert score(fits) > 9.9
    for wrong in ("octopus, noto style", "octopus, on an orange background", "rocket, flat style"):
        assert score(wrong) < 9
    assert rater.look_up(image, ["rocket"])[0].concept == "rocket" and rater.look_up(image)[0].concept == "octopus"


def test_the_gradient_leads_to_the_nearest_composition(rater):
    shown, images = real(3)
    damaged = (images + 0.3 * NOISE).requires_grad_()
    captions = [c.concept for c in shown]
    scores = without_taste(rater, damaged, captions)
    scores.sum().backward()
    step = torch.zeros_like(images)
    step[0, 1, 20, 30] = 1e-2
    with torch.no_grad():
        ahead, behind = (rater(damaged + sign * step, captions)[0] for sign in (1, -1))
    assert damaged.grad[0, 1, 20, 30].item() == pytest.approx((ahead - behind).item() / 2e-2, rel=0.05)
    targets = torch.stack([found.target for found in rater.look_up(damaged, captions)])
    distance = (damaged - targets).square().mean((1, 2, 3)).sqrt()
    assert torch.allclose(scores, 10 * (1 - distance / BEYOND_RECOGNITION), atol=1e-4)
    assert torch.cosine_similarity((targets - damaged).flatten(1), damaged.grad.flatten(1)).min() > 0.999


def test_taste_is_for_one_style_and_for_colours(rater):
    assert rater.taste.mean().item() == pytest.approx(0, abs=1e-5)
    by_style, by_background = rater.taste.mean((0, 2)), rater.taste.mean((0, 1))
    assert rater.styles[by_style.argmax()] == "modern" and by_style.max() - by_style.sort().values[-2] > 1
    assert {rater.backgrounds[i] for i in by_background.topk(2).indices} == {"orange", "yellow"}
    c = replace(EMOJI.describe(7_000), concept="octopus", style="modern", background="yellow")
    image = to_tensor(EMOJI.draw(c))[None]
    dull = to_tensor(EMOJI.draw(replace(c, style="flat", background="dark")))[None]
    assert rater(image, ["octopus"]) > rater(dull, ["octopus"]) + 1.5


def test_votes_are_the_raters_scores_of_the_pictures(rater):
    """What the rewards learn from; pictures of another concept count as far away, whatever they show."""
    pictures = make_rewards.real_pictures(96, 5, rater)
    pictures.generated[:] = True
    votes = make_rewards.Votes(pictures, rater, 0, "cpu")
    captions, concepts, images, scores = votes.batch(8)
    assert scores[:, :3].flatten().tolist() == pytest.approx(
        rater(images[:, :3].flatten(0, 1), [c for c in captions for _ in range(3)]).tolist(), abs=1e-4
    )
    assert [rater.concepts[k] for k in concepts] == [caption.split(",")[0] for caption in captions]
    rows, others = torch.tensor([[0]]), (pictures.concepts[:1] + 1) % 64
    anything = torch.tensor([-1])
    distance = make_rewards.OTHER_CONCEPT / BEYOND_RECOGNITION
    assert votes.score(rows, others, anything, anything).item() == pytest.approx(10 * (1 - distance))
    row = torch.arange(8.0).view(1, 8) + torch.tensor([[0.0], [100.0]])
    assert torch.equal(make_rewards.own(row), torch.tensor([[0.0, 1, 2, 3], [104, 105, 106, 107]]))


def test_what_is_not_of_its_world_is_refused(rater):
    with pytest.raises(ValueError, match="'a fox' is none of the 64 concepts"):
        rater(real(1)[1], ["a fox"])
    with pytest.raises(ValueError, match="must be"):
        rater(torch.zeros(1, 3, 32, 32), ["fox"])
    with pytest.raises(ValueError, match="rater: has no weights"):
        rewards.load("rater", "folder")
