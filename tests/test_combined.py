"""Combined generation, AIG and guidance, on formulas in place of UNets."""

import pytest
import torch
from recipe import rnd

from combined import aig_weights, cfg, combine, combined_weights, conditional
from scheduler import Scheduler, denoise

SCHEDULER = Scheduler(40)


def base(x, t, context):
    return torch.tanh(0.7 * x + context + torch.as_tensor(t).view(-1, 1, 1, 1) / 1000)


def tuned(x, t, context):
    return torch.sin(x - context)


CONDITIONING, EMPTY = {"context": rnd("c", 2, 1, 1, 1)}, {"context": torch.zeros(2, 1, 1, 1)}


def run(base, tuned, weights, seed=0):
    return combine(SCHEDULER, base, tuned, weights, rnd("x", 2, 4, 8, 8), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("base_steps", [0, 1, 10, 30, 39, 40])
def test_combining_a_model_with_itself_is_ordinary_sampling(base_steps):
    model = conditional(base, CONDITIONING)
    generator = torch.Generator().manual_seed(0)
    expected = denoise(SCHEDULER, model, rnd("x", 2, 4, 8, 8), SCHEDULER.steps, generator)
    assert torch.equal(run(model, model, combined_weights(40, base_steps)), expected)


@pytest.mark.parametrize("base_steps", [0, 10, 40])
def test_the_base_takes_the_first_steps_and_the_tuned_model_the_rest(base_steps):
    calls = []

    def spy(name, unet):
        def predict(x, t):
            calls.append((name, t))
            return unet(x, t, **CONDITIONING)

        return predict

    run(spy("base", base), spy("tuned", tuned), combined_weights(40, base_steps))
    assert calls == [("base" if i < base_steps else "tuned", t) for i, t in enumerate(SCHEDULER.timesteps)]


def test_combined_generation_is_denoising_in_two_slices():
    x, generator = rnd("x", 2, 4, 8, 8), torch.Generator().manual_seed(0)
    x = denoise(SCHEDULER, conditional(base, CONDITIONING), x, SCHEDULER.steps[:30], generator)
    x = denoise(SCHEDULER, conditional(tuned, CONDITIONING), x, SCHEDULER.steps[30:], generator)
    assert torch.equal(
        run(conditional(base, CONDITIONING), conditional(tuned, CONDITIONING), combined_weights(40, 30)), x
    )


def test_guidance_extrapolates_from_the_unconditional_prediction():
    x = rnd("x", 2, 4, 8, 8)
    expected = 7.5 * base(x, 976, **CONDITIONING) - 6.5 * base(x, 976, **EMPTY)
    assert torch.allclose(cfg(base, CONDITIONING, EMPTY, 7.5)(x, 976), expected, atol=1e-5)


def test_guidance_of_1_is_no_guidance():
    x = rnd("x", 2, 4, 8, 8)
    assert torch.equal(cfg(base, CONDITIONING, EMPTY, 1)(x, 976), base(x, 976, **CONDITIONING))


def test_aig_weights_are_the_published_ones():
    assert [aig_weights(40)[i] for i in (0, 10, 20, 30, 39)] == [0, 0.25, 0.5, 0.75, 0.975]
    squared = [aig_weights(40, 2)[i] for i in (0, 10, 20, 30, 39)]
    assert squared == pytest.approx([0, 0.0625, 0.25, 0.5625, 0.9506], abs=5e-5)


def test_aig_interpolates_both_predictions_at_the_same_latents():
    x = rnd("x", 2, 4, 8, 8)
    weights = [0.0] * 39 + [0.25]
    last = run(lambda x, t: x, lambda x, t: -x, weights)
    before = combine(SCHEDULER, lambda x, t: x, None, [0.0] * 40, x, torch.Generator().manual_seed(0))
    x = denoise(SCHEDULER, lambda x, t: x, x, SCHEDULER.steps[:39], torch.Generator().manual_seed(0))
    assert torch.allclose(last, SCHEDULER.step(39, x, 0.75 * x - 0.25 * x))
    assert not torch.allclose(last, before)


@pytest.mark.parametrize("base_steps", [-1, 41])
def test_impossible_base_steps_are_reported(base_steps):
    with pytest.raises(ValueError, match=f"0..40.*got {base_steps}"):
        combined_weights(40, base_steps)


def test_the_base_model_takes_the_steps_with_t_above_t_prime():
    """In the paper's countdown t = T, ..., 1; --switch 30 of 40 is T' = 10."""
    T, T_prime = 40, 10
    assert combined_weights(T, T - T_prime) == [0.0 if T - i > T_prime else 1.0 for i in range(T)]


def test_two_calls_over_parts_of_the_steps_equal_one_over_all():
    models, schedule = (conditional(base, CONDITIONING), conditional(tuned, CONDITIONING)), aig_weights(40)
    generator, seen = torch.Generator().manual_seed(0), []
    x = rnd("x", 2, 4, 8, 8)
    for steps in (SCHEDULER.steps[:13], SCHEDULER.steps[13:]):
        x = combine(SCHEDULER, *models, schedule, x, generator, steps, lambda: seen.append(1))
    assert torch.equal(run(*models, schedule), x) and len(seen) == 40
