"""Metrics and their errors against closed forms, brute force and simulation; Inception by its fingerprint."""

import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

import metrics
from pretrained import inception


def normal(n, D, seed, scale=1.0):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def sample(mu, S, n=40, seed=0):
    """n points whose mean and unbiased covariance are exactly mu and S."""
    mu, S = torch.as_tensor(mu, dtype=torch.float64), torch.as_tensor(S, dtype=torch.float64)
    z = normal(n, len(mu), seed)
    z = torch.linalg.qr(z - z.mean(0)).Q * math.sqrt(n - 1)
    lam, V = torch.linalg.eigh(S)
    return mu + z @ (V * lam.clamp(min=0).sqrt()).T


def quiet(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


# Means over prompts


def test_error_is_that_of_the_prompt_means():
    values, group = [0.0, 2.0, 2.0, 4.0, 4.0, 6.0], list("aabbcc")
    assert metrics.mean_and_error(values, group) == pytest.approx((3, 2 / math.sqrt(3)), abs=1e-15)
    assert metrics.mean_and_error(values)[1] == pytest.approx(np.std(values, ddof=1) / math.sqrt(6))


def test_prompts_weigh_alike_whatever_their_number_of_images():
    assert metrics.mean_and_error([1.0, 1.0, 1.0, 5.0], np.array([7, 7, 7, 2]))[0] == 3


def test_paired_difference_removes_what_the_prompts_share():
    prompt, group = normal(30, 1, 0)[:, 0].repeat_interleave(4) * 100, np.arange(30).repeat(4)
    a, b = prompt + normal(120, 1, 1)[:, 0], prompt + normal(120, 1, 2)[:, 0]
    mean, error = metrics.paired_difference(a, b, group)
    m = (a - b).view(30, 4).mean(1)
    assert mean == pytest.approx(m.mean().item()) and error == pytest.approx(m.std().item() / math.sqrt(30))
    assert error < 0.25 < 10 < metrics.mean_and_error(a, group)[1]
    with pytest.raises(ValueError, match="120 and 119"):
        metrics.paired_difference(a, b[1:])


def test_one_prompt_has_no_error():
    with pytest.warns(UserWarning, match="no standard error"):
        mean, error = metrics.mean_and_error([1.0, 2.0], ["a", "a"])
    assert mean == 1.5 and math.isnan(error)


def test_diversity_of_five_directions():
    angle = np.deg2rad([0, 30, 60, 90, 120])
    x = np.stack([np.cos(angle), np.sin(angle)], 1) * [[1], [2], [3], [4], [5]]
    assert metrics.diversity(x, np.zeros(5, int)) == pytest.approx(0.5535898384862245, abs=1e-15)


def test_diversity_is_the_mean_over_prompts_of_the_off_diagonal_cosines():
    x, group = normal(9, 6, 0), ["b", "a", "b", "a", "b", "c", "c", "c", "c"]
    terms = []
    for name in "bac":
        u = x[[g == name for g in group]].numpy()
        cos = np.corrcoef(np.hstack([u, -u]))  # rows of mean 0, so that correlations are cosines
        terms.append(1 - np.mean(cos[~np.eye(len(u), dtype=bool)]))
    assert metrics.group_diversity(x, group).tolist() == pytest.approx(terms)
    assert metrics.diversity(x, group) == pytest.approx(np.mean(terms))


def test_equal_images_have_no_diversity_and_opposite_ones_two():
    assert metrics.diversity([[3.0, 4.0], [3.0, 4.0]], [0, 0]) == pytest.approx(0, abs=1e-15)
    assert metrics.diversity([[3.0, 4.0], [-6.0, -8.0]], [0, 0]) == pytest.approx(2)


def test_diversity_refuses_what_has_none():
    with pytest.raises(ValueError, match="1 of 2"):
        metrics.diversity(normal(3, 2, 0), [0, 0, 1])
    with pytest.raises(ValueError, match="zero"):
        metrics.diversity([[0.0, 0.0], [1.0, 0.0]], [0, 0])
    with pytest.raises(ValueError, match="2 group ids for 3"):
        metrics.diversity(normal(3, 2, 0), [0, 0])


# FID

TOEPLITZ = [[1 / (1 + abs(i - j)) for j in range(5)] for i in range(5)]
GAUSSIANS = {
    "diagonal": ([0, 1, 2], np.diag([1, 4, 9]), [1, 1, 0], np.diag([4, 1, 16]), 8),
    "not commuting": ([1, 2], [[2, 1], [1, 2]], [0, 0], [[1, 0.5], [0.5, 3]], 5.320270148882052),
    "rank one": ([0, 0], [[1, 0], [0, 0]], [0, 0], [[0.5, 0.5], [0.5, 0.5]], 2 - math.sqrt(2)),
    "scaled": ([0] * 5, TOEPLITZ, [0] * 5, 4 * np.array(TOEPLITZ), 5),
    "identical": ([3] * 5, TOEPLITZ, [3] * 5, TOEPLITZ, 0),
}


@pytest.mark.parametrize("case", GAUSSIANS)
def test_fid_of_gaussians_in_closed_form(case):
    mu_x, S_x, mu_y, S_y, expected = GAUSSIANS[case]
    x, y = sample(mu_x, S_x, 40, 1), sample(mu_y, S_y, 50, 2)
    assert metrics.frechet_distance(mu_x, S_x, mu_y, S_y) == pytest.approx(expected, abs=1e-10)
    assert metrics.fid(x, y) == pytest.approx(expected, abs=1e-7 if case == "rank one" else 1e-10)


def test_fid_of_seven_points():
    i, j = np.arange(7)[:, None], np.arange(4)[None]
    x, y = np.sin(i + 0.5 * j) + 0.1 * i * j, np.cos(0.7 * i * (j + 1))
    assert metrics.fid(x, y) == pytest.approx(2.74951432102906, abs=1e-12)
    assert metrics.fid(torch.tensor(y), torch.tensor(x)) == pytest.approx(2.74951432102906, abs=1e-12)


@pytest.mark.parametrize("n", [60, 400])
def test_fid_of_a_set_with_itself_is_zero_at_any_rank(n):
    x = normal(n, 200, 0) / torch.arange(1, 201) ** 0.5 * 9 + 100
    assert abs(quiet(metrics.fid, x, x)) < 1e-8
    assert abs(quiet(metrics.fid, x, x.flip(0).clone())) < 1e-8


@pytest.mark.parametrize("n_x, n_y", [(300, 400), (30, 400), (400, 30), (30, 40)])
def test_fid_agrees_with_the_symmetric_eigenvalue_form(n_x, n_y):
    x, y = normal(n_x, 50, 0) + 0.1, normal(n_y, 50, 1) * torch.arange(1, 51) ** -0.5
    S_x, S_y = torch.cov(x.T), torch.cov(y.T)
    lam, V = torch.linalg.eigh(S_x)
    H = V * lam.clamp(min=0).sqrt() @ V.T
    cross = torch.linalg.eigvalsh(H @ S_y @ H).clamp(min=0).sqrt().sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + S_x.trace() + S_y.trace() - 2 * cross
    assert quiet(metrics.fid, x, y) == pytest.approx(expected.item(), abs=1e-6)
    assert metrics.frechet_distance(x.mean(0), S_x, y.mean(0), S_y) == pytest.approx(expected.item(), abs=1e-6)


def test_fid_of_singular_covariances_keeps_its_digits():
    x, y = normal(30, 50, 0) + 0.1, normal(20, 50, 1) * torch.arange(1, 51) ** -0.5
    moments = x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T)
    assert metrics.frechet_distance(*moments) == pytest.approx(quiet(metrics.fid, x, y), abs=1e-11)


def test_fid_floor_is_the_mean_fid_of_two_samples_of_one_gaussian():
    floor = metrics.fid_floor(sample([0] * 64, np.eye(64), 100), 500, 500)
    runs = [metrics.fid(normal(500, 64, 2 * k), normal(500, 64, 2 * k + 1)) for k in range(20)]
    assert floor == pytest.approx(4.416, abs=1e-9)
    assert np.mean(runs) == pytest.approx(floor, abs=0.08)
    assert metrics.fid_floor(sample([0, 0], np.diag([4, 1]), 50), 10, 40) == pytest.approx(0.125 * 8.3)


def test_fid_influence_is_the_derivative_by_the_weight_of_an_image():
    x, y = normal(30, 4, 0, 1.5) + 0.5, normal(25, 4, 1) * torch.tensor([1.0, 2.0, 0.5, 1.0])
    for psi, own, other in zip(metrics.fid_influence(x, y), (x, y), (y, x), strict=True):
        mu, S = own.mean(0), torch.cov(own.T)

        def moved(z, h, mu=mu, S=S, other=other):
            S_h = S + h * (torch.outer(z, z) - S)
            return metrics.frechet_distance(mu + h * z, S_h, other.mean(0), torch.cov(other.T))

        slope = torch.tensor([(moved(z, 1e-5) - moved(z, -1e-5)) / 2e-5 for z in own - mu], dtype=torch.float64)
        torch.testing.assert_close(psi, slope - slope.mean(), rtol=1e-6, atol=1e-6)


def test_directions_without_variance_change_neither_fid_nor_its_influence():
    x, y = normal(30, 4, 0, 2), normal(25, 4, 1)
    wide = [torch.nn.functional.pad(z, (0, 3)) + 7 for z in (x, y)]
    assert metrics.fid(*wide) == pytest.approx(metrics.fid(x, y))
    for psi, expected in zip(metrics.fid_influence(*wide), metrics.fid_influence(x, y), strict=True):
        torch.testing.assert_close(psi, expected)


def draws(statistic, runs=80, n=400):
    """Repeats of a statistic of n points of a wide against n of a narrow Gaussian."""
    wide, narrow = torch.tensor([2.0, 1.5, 1.0, 0.6]), torch.tensor([1.0, 0.8, 0.6, 0.4])
    return [statistic(normal(n, 4, 2 * k) * wide + 0.3, normal(n, 4, 2 * k + 1) * narrow) for k in range(runs)]


def test_fid_error_is_the_spread_of_repeated_draws():
    values, errors = zip(*draws(metrics.fid_and_error), strict=True)
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.2)


def test_a_fixed_reference_adds_no_error_to_fid():
    x, y = normal(50, 3, 0), normal(60, 3, 1) * 2
    alone = metrics.mean_and_error(metrics.fid_influence(x, y)[0])[1]
    assert metrics.fid_and_error(x, y, fixed_reference=True)[1] == alone < metrics.fid_and_error(x, y)[1]


def test_fid_error_counts_prompts_not_copies():
    x, y = normal(100, 3, 0) * 2, normal(200, 3, 1)
    once = metrics.fid_and_error(x, y)[1]
    copied = metrics.fid_and_error(x.repeat(4, 1), y, group_x=list(range(100)) * 4)[1]
    assert copied == pytest.approx(once, rel=0.02)


# CovDist and LogCovDist

X, Y = sample([0, 1, 2], np.diag([4, 2, 1])), sample([5, 5, 5], np.diag([1, 3, 2]))
LN = math.log(4 / 3)  # (4, 2, 1) against (3, 2, 1): only the first eigenvalue differs


@pytest.mark.parametrize(
    "reading, covdist, logcovdist",
    [
        ("ours", 1 / 3, 0.09589402414781582),
        ("jena2024", 1, 0.12493873660468076),
        ("clip", 1, 0.09589402414781582),
        ("squares", math.nan, 0.28768207244344746**2),
        ("rms", 0.5773502691896257, LN / math.sqrt(3)),
        ("mse", 1 / 3, LN**2 / 3),
    ],
)
def test_readings_of_the_spectral_distances_of_two_diagonals(reading, covdist, logcovdist):
    assert metrics.covariance_distance(X, Y, reading) == pytest.approx(covdist, abs=1e-9, nan_ok=True)
    assert metrics.log_covariance_distance(X, Y, reading) == pytest.approx(logcovdist, abs=1e-9)


def test_spectrum_is_sorted_rotation_free_and_divides_as_the_reading_says():
    Q = torch.linalg.qr(normal(3, 3, 5)).Q
    assert metrics.spectrum(X @ Q).tolist() == pytest.approx([4, 2, 1])
    assert metrics.spectrum(X, correction=0).tolist() == pytest.approx([3.9, 1.95, 0.975])


def test_scaling_the_covariance_moves_the_spectral_distances_as_it_should():
    x = sample([0] * 5, TOEPLITZ)
    assert metrics.covariance_distance(x, 3 * x + 1) == pytest.approx(8 * 5 / 5)
    assert metrics.log_covariance_distance(x, 3 * x + 1) == pytest.approx(math.log(9))
    assert metrics.log_covariance_distance(x, x / 3) == pytest.approx(math.log(9))


def test_spectral_errors_are_the_jackknife_over_blocks_of_prompts():
    x, y = normal(60, 3, 0) * torch.tensor([3.0, 2.0, 1.0]), normal(60, 3, 1)
    group = torch.arange(12).repeat_interleave(5)
    result = metrics.spectral_distances_and_errors(x, y, group_x=group, group_y=group, blocks=6)
    for k, distance in enumerate((metrics.covariance_distance, metrics.log_covariance_distance)):
        variance = 0
        for pairs in (lambda keep: (x[keep], y), lambda keep: (x, y[keep])):
            left_out = [quiet(distance, *pairs(group % 6 != b)) for b in range(6)]
            variance += 5 / 6 * np.square(left_out - np.mean(left_out)).sum()
        assert result[k] == pytest.approx((distance(x, y), math.sqrt(variance)), rel=1e-9)


@pytest.mark.parametrize("group", [[0] * 5, [0, 0, 1, 1, 1]])
def test_spectral_errors_of_one_prompt_are_unknown_and_of_two_known(group):
    pair = metrics.spectral_distances_and_errors(normal(5, 3, 1), normal(5, 3, 2), group_x=group)
    assert all(math.isfinite(value) and math.isnan(error) == (max(group) == 0) for value, error in pair)


def test_spectral_errors_are_the_spread_of_repeated_draws():
    results = np.array(draws(lambda x, y: metrics.spectral_distances_and_errors(x, y, blocks=10), runs=50))
    spread, error = results[:, :, 0].std(0, ddof=1), results[:, :, 1].mean(0)
    assert error == pytest.approx(spread, rel=0.2)


def test_a_fixed_reference_adds_no_spectral_error():
    x, y = normal(50, 3, 0), normal(50, 3, 1) * 2
    both, fixed = (metrics.spectral_distances_and_errors(x, y, fixed_reference=f) for f in (False, True))
    assert all(alone[1] < error[1] for alone, error in zip(fixed, both, strict=True))


def test_an_unknown_reading_is_named():
    with pytest.raises(ValueError, match="'theirs'.*ours, jena2024"):
        metrics.covariance_distance(X, Y, "theirs")


# Inputs


def test_numpy_torch_and_float32_give_the_same_float64_result():
    x, y = normal(20, 4, 0).float(), normal(20, 4, 1).float()
    for metric in (metrics.fid, metrics.covariance_distance, metrics.log_covariance_distance):
        expected = metric(x.double(), y.double())
        assert metric(x, y) == metric(x.numpy(), y.numpy()) == expected


@pytest.mark.parametrize("metric", [metrics.fid, metrics.covariance_distance, metrics.log_covariance_distance])
def test_too_few_images_are_warned_of(metric):
    x = normal(12, 10, 0)
    with pytest.warns(UserWarning, match="10 images cannot fill 10"):
        metric(x[2:], x[:10])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric(x, x + 1)


def test_unequal_sets_are_warned_of_where_they_bias_the_spectra():
    with pytest.warns(UserWarning, match="12 against 11"):
        metrics.covariance_distance(normal(12, 3, 0), normal(11, 3, 1))


def test_features_that_are_no_features_are_refused():
    for x in (normal(1, 3, 0), normal(5, 3, 0)[0], normal(5, 3, 0) / 0):
        with pytest.raises(ValueError, match="features"):
            metrics.fid(x, normal(5, 3, 0))
    with pytest.raises(ValueError, match="D is 3 and 4"):
        metrics.fid(normal(5, 3, 0), normal(5, 4, 0))


# Features


def noise(k, n):
    """Hashed uniform numbers in [-1, 1): n of stream k."""
    with np.errstate(over="ignore"):
        z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64(k) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(2 * ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2**53 - 1)


def hashed_state():
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in inception.Inception().state_dict().items() if "num_batches" not in k}
    state = {}
    for k, key in enumerate(sorted(shapes)):
        shape = shapes[key]
        scale, shift = {"running_var": (0.5, 1), "running_mean": (0.1, 0)}.get(key.split(".")[-1], (0.1, 0))
        if key.endswith("conv.weight"):
            scale = math.sqrt(6 / shape[1:].numel())
        elif key.endswith("bn.weight"):
            scale, shift = 0.2, 1
        elif key.startswith("fc."):
            scale = 0.01
        state[key] = (shift + scale * noise(k, shape.numel())).view(shape)
    return state


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(hashed_state(), path)
    return path


def test_hashed_noise_is_the_published_one():
    expected = [0.7666216164272852, -0.13694400590298006, -0.9471324568148045]
    assert noise(0, 3).tolist() == pytest.approx(expected, abs=1e-15)
    assert noise(9001, 2).tolist() == pytest.approx([-0.917535557809898, 0.48002400100132814], abs=1e-15)


def test_inception_has_the_published_keys_and_size():
    with torch.device("meta"):
        model = inception.Inception()
    assert len(model.state_dict()) == 566 and sum(p.numel() for p in model.parameters()) == 23_850_960


def test_inception_fingerprint(inception_file):
    images = noise(9001, 2 * 3 * 64 * 80).view(2, 3, 64, 80)
    f = inception.load_inception(inception_file)(images)
    assert f.shape == (2, 2048) and not f.requires_grad
    assert f.mean(1).tolist() == pytest.approx([2.055041060833471, 2.069011514250171], rel=1e-9)
    assert f.norm(dim=1).tolist() == pytest.approx([154.73438692648725, 155.8643080767695], rel=1e-9)
    assert (f[0] - f[1]).norm().item() == pytest.approx(2.478326161668404, rel=1e-9)
    ends = [0, 319, 320, 1087, 1088, 1855]  # of the branches that the last block joins
    a = [0.45778464519277684, 5.4684173331348225, 0.030567077447453243]
    a += [1.611069217758978, 4.432624917587332, 1.2187209986343104]
    b = [0.4162543179860859, 5.4818445863361065, 0.02428178648484624]
    b += [1.528080236038121, 4.47503125107791, 1.2518766740901413]
    assert f[0, ends].tolist() == pytest.approx(a, rel=1e-9) and f[1, ends].tolist() == pytest.approx(b, rel=1e-9)

    single = metrics.inception_features(inception_file)(images.float())
    assert single.dtype == torch.float32
    assert single.double().norm(dim=1).tolist() == pytest.approx(f.norm(dim=1).tolist(), rel=1e-5)


def test_inception_sees_images_as_they_would_be_saved(inception_file):
    features = metrics.inception_features(inception_file)
    images = noise(1, 3 * 20 * 30).view(1, 3, 20, 30) * 2
    assert torch.equal(features(images), features(images.clamp(-1, 1)))


def test_inception_refuses_another_networks_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="pt_inception-2015-12-05-6726825d.pth.*mseitzer/pytorch-fid"):
        metrics.inception_features(tmp_path / "none.pth")
    torch.save({"AuxLogits.conv0.conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth: not pytorch-fid's Inception") as error:
        metrics.inception_features(tmp_path / "other.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [(96, 128), (130, 70), (301, 419), (224, 224)])
def test_preprocessing_is_pillows_bicubic_then_a_centre_crop(size):
    images = normal(1, 3 * size[0] * size[1], 0).view(1, 3, *size).float()
    x = metrics.preprocess(images, 224, metrics.CLIP_MEAN, metrics.CLIP_STD)
    H, W = (224 * s // min(size) for s in size)
    top, left = round((H - 224) / 2), round((W - 224) / 2)
    for c, plane in enumerate((images[0] / 2 + 0.5).clamp(0, 1).numpy()):
        resized = np.array(Image.fromarray(plane).resize((W, H), Image.Resampling.BICUBIC))
        crop = resized[top : top + 224, left : left + 224]
        expected = (crop - (0.48145466, 0.4578275, 0.40821073)[c]) / (0.26862954, 0.26130258, 0.27577711)[c]
        np.testing.assert_allclose(x[0, c].numpy(), expected, atol=1e-4)


def tower(**more):
    return {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    } | more


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small DINO, DINOv2 and CLIP, as transformers writes them: with the published key names."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    text = tower(vocab_size=99, bos_token_id=97, eos_token_id=98)
    clip = CLIPConfig(
        text_config=text,
        vision_config=tower(image_size=64, patch_size=16),
        projection_dim=24,
        dtype="float16",
    )
    ViTModel(ViTConfig(**tower())).save_pretrained(root / "dino")
    Dinov2Model(Dinov2Config(**tower(patch_size=14, image_size=518))).save_pretrained(root / "dinov2")
    CLIPModel(clip).half().save_pretrained(root / "clip")
    return root


IMAGES = (torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(3)) * 2 - 1) * 1.2


@pytest.mark.parametrize(
    "norm, mean, std",
    [
        ("clip", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
)
def test_dino_features_are_the_normalised_class_token(folders, norm, mean, std):
    scaled = ((IMAGES / 2 + 0.5).clamp(0, 1) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        token = ViTModel.from_pretrained(folders / "dino").eval()(scaled).last_hidden_state[:, 0]
    features = metrics.dino_features(folders / "dino", norm)(IMAGES)
    torch.testing.assert_close(features, token / token.norm(dim=1, keepdim=True))


def test_dinov2_is_an_option(folders):
    features = metrics.dino_features(folders / "dinov2")(IMAGES)
    assert features.shape == (2, 32) and features.norm(dim=1).tolist() == pytest.approx([1, 1])
    with pytest.raises(ValueError, match="clip model, neither DINO"):
        metrics.dino_features(folders / "clip")


def test_clip_features_are_the_normalised_image_embeddings_at_the_folders_size(folders):
    features = metrics.clip_features(folders / "clip")
    images = IMAGES[..., :64, :64]
    mean, std = torch.tensor(metrics.CLIP_MEAN).view(3, 1, 1), torch.tensor(metrics.CLIP_STD).view(3, 1, 1)
    model = CLIPModel.from_pretrained(folders / "clip").float().eval()
    with torch.no_grad():
        e = model(torch.tensor([[97, 98]]), ((images / 2 + 0.5).clamp(0, 1) - mean) / std).image_embeds
    torch.testing.assert_close(features(images), e)
    assert features(images).dtype == torch.float32 and features(IMAGES).shape == (2, 24)


def test_a_missing_or_partial_model_folder_says_what_to_get(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="openai/clip-vit-base-patch32"):
        metrics.clip_features(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="facebook/dino-vits16"):
        metrics.dino_features(tmp_path / "none")
    (tmp_path / "config.json").write_bytes((folders / "dino/config.json").read_bytes())
    torch.save({"embeddings.cls_token": torch.zeros(1, 1, 32)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin: not a whole ViTModel"):
        metrics.dino_features(tmp_path)
