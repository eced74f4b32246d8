"""Generating with several weight schedules at once equals one at a time, and computes shared prefixes once."""

from types import SimpleNamespace

import torch
from recipe import rnd

from combined import aig_weights, combined_weights, generate
from report.sweep import generate_each
from scheduler import Scheduler

VAE = SimpleNamespace(factor=8, config=SimpleNamespace(latent_channels=4), decode=lambda x0: 2 * x0)


def text(prompts, size):
    return {"context": torch.cat([rnd(prompt, 1, 1, 1, 1) for prompt in prompts])}


def test_schedules_at_once_equal_one_at_a_time_and_share_their_first_steps():
    calls = []

    def base(x, t, context):
        calls.append("base")
        return torch.tanh(0.7 * x + context + t.view(-1, 1, 1, 1) / 1000)

    def tuned(x, t, context):
        calls.append("tuned")
        return torch.sin(x - context)

    schedules = [combined_weights(40, 30), combined_weights(40, 10), aig_weights(40, 2), combined_weights(40, 40)]
    inputs = (["a", "b"], [3, 4], (64, 64), 1.5)
    together = generate_each(base, tuned, VAE, text, Scheduler(40), schedules, *inputs)
    assert (calls.count("base"), calls.count("tuned")) == (40 + 39, 10 + 30 + 39)  # AIG's first step is the base's
    for schedule, images in zip(schedules, together, strict=True):
        assert torch.equal(images, generate(base, tuned, VAE, text, Scheduler(40), schedule, *inputs))


def test_equal_schedules_run_once():
    calls = []

    def unet(x, t, context):
        calls.append(t)
        return x

    twice = generate_each(unet, unet, VAE, text, Scheduler(4), [combined_weights(4, 2)] * 2, ["a"], [1], (64, 64), 1)
    assert len(calls) == 4 and torch.equal(*twice)
