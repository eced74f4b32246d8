import pytest
import torch
from recipe import golden, rnd

from scheduler import Scheduler, denoise, sample_noise

# Step: timestep, abar, a, b, c for 40 steps of strided DDPM.
TABLE = {
    0: (976, 0.006124008, 1.153969209, -0.288279028, 0.498538000),
    10: (726, 0.067860427, 1.098697069, -0.195270022, 0.411102018),
    20: (476, 0.309319505, 1.056956122, -0.133373604, 0.315226468),
    30: (226, 0.712723618, 1.027282168, -0.100450794, 0.212645929),
    35: (101, 0.892980537, 1.016638207, -0.100887347, 0.152888806),
    38: (26, 0.975652915, 1.011537525, -0.147039936, 0.039842461),
    39: (1, 0.998296028, 1.000853076, -0.041314412, 0.0),
}


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal to 1e-5, relative to the largest value: the reference computes its schedule in float32."""
    return bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1))


def test_coefficients_are_those_of_strided_ddpm():
    s = Scheduler(40, eta=1.0)
    for i, row in TABLE.items():
        ours = (s.timesteps[i], s.abar[s.timesteps[i]].item(), s.a[i].item(), s.b[i].item(), s.c[i].item())
        assert ours == pytest.approx(row, abs=1e-9)


def test_eta_0_coefficients():
    s = Scheduler(40, eta=0.0)
    assert [s.b[i].item() for i in (0, 30, 38)] == pytest.approx([-0.1545161735, -0.05275245753, -0.1165565925])
    assert s.c.abs().max() == 0


def test_alpha_bar_equals_the_published_schedule():
    assert (Scheduler().abar - golden("scheduler")[0]["alphas_cumprod"]).abs().max() <= 1e-6


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_trajectories_equal_diffusers_until_the_last_step(eta):
    g, s = golden("scheduler")[0], Scheduler(40, eta)
    assert s.timesteps == g[f"ddim_eta{eta}.timesteps"].tolist()
    x = rnd("sched.x", 2, 4, 8, 8)
    for i in range(39):  # diffusers' DDIM ends at abar_0, ours at the predicted x0
        x = s.a[i] * x + s.b[i] * torch.tanh(0.7 * x + s.timesteps[i] / 1000) + s.c[i] * rnd(f"sched.z{i}", 2, 4, 8, 8)
        assert close(x, g[f"ddim_eta{eta}.trajectory"][i])


def test_whole_ddpm_trajectory_and_predicted_x0_equal_diffusers():
    g, s = golden("scheduler")[0], Scheduler(40, eta=1.0)
    x = rnd("sched.x", 2, 4, 8, 8)
    for i, t in enumerate(s.timesteps):
        eps = torch.tanh(0.7 * x + t / 1000)
        x0 = s.predict_x0(x, eps, t)
        assert close(x0, g["ddpm.pred_original"][i])
        x = s.a[i] * x + s.b[i] * eps + s.c[i] * rnd(f"sched.z{i}", 2, 4, 8, 8)
        assert close(x, g["ddpm.trajectory"][i])


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 40, 50])
def test_last_step_returns_the_predicted_x0(steps, eta):
    s, x, eps = Scheduler(steps, eta), rnd("x", 2, 4, 8, 8), rnd("eps", 2, 4, 8, 8)
    assert torch.allclose(s.step(steps - 1, x, eps), s.predict_x0(x, eps, s.timesteps[-1]), atol=1e-6)


def test_add_noise_equals_diffusers():
    g = golden("scheduler")[0]
    clean, noise = rnd("sched.clean", 3, 4, 8, 8), rnd("sched.noise", 3, 4, 8, 8)
    noised = Scheduler().add_noise(clean, noise, g["add_noise.timesteps"])
    assert (noised - g["add_noise.output"]).abs().max() <= 1e-6


def test_predict_x0_undoes_add_noise():
    s, x0, eps, t = Scheduler(), rnd("x0", 3, 4, 8, 8), rnd("eps", 3, 4, 8, 8), torch.tensor([1, 226, 700])
    assert torch.allclose(s.predict_x0(s.add_noise(x0, eps, t), eps, t), x0, atol=1e-5)


def test_the_exact_noise_recovers_the_image_for_every_eta():
    x0 = rnd("x0", 1, 4, 8, 8)
    for eta in (0.0, 1.0):
        s = Scheduler(40, eta)
        x_t = s.add_noise(x0, rnd("eps", 1, 4, 8, 8), s.timesteps[10])

        def exact(x, t, s=s):
            return (x - s.abar[t].sqrt() * x0) / (1 - s.abar[t]).sqrt()

        x = denoise(s, exact, x_t, s.steps[10:], torch.Generator().manual_seed(0))
        assert torch.allclose(x.float(), x0, atol=1e-5)


def test_empty_slice_is_identity():
    s, x = Scheduler(), rnd("x", 1, 4, 8, 8)
    assert denoise(s, None, x, s.steps[30:30]) is x


def test_a_slice_visits_exactly_its_steps_and_slices_compose():
    s, x, seen = Scheduler(), rnd("x", 2, 4, 8, 8), []

    def predict(x, t):
        seen.append(t)
        return torch.tanh(0.7 * x + t / 1000)

    def run(*slices):
        generator, y = torch.Generator().manual_seed(1), x
        for part in slices:
            y = denoise(s, predict, y, s.steps[part], generator)
        return y

    in_one = run(slice(0, 40))
    assert seen == s.timesteps
    assert torch.equal(in_one, run(slice(0, 10), slice(10, 10), slice(10, 40)))


def test_noise_of_an_image_does_not_depend_on_its_batch():
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    batch = sample_noise((3, 4, 8, 8), generators(5, 6, 7))
    assert torch.equal(batch[1:2], sample_noise((1, 4, 8, 8), generators(6)))


@pytest.mark.parametrize(("steps", "eta", "named"), [(0, 1.0, "steps"), (1000, 1.0, "steps"), (40, 1.5, "eta")])
def test_impossible_settings_are_reported(steps, eta, named):
    with pytest.raises(ValueError, match=named):
        Scheduler(steps, eta)
