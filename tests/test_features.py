"""Feature extractors: Inception by its fingerprint, DINO and CLIP against transformers."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_metrics import normal
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from pretrained import inception
from pretrained.features import clip_features, dino_features, inception_features, is_dinov2
from pretrained.preprocess import CLIP_MEAN, CLIP_STD, preprocess


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


def test_inception_weights_that_are_not_finite_are_refused(tmp_path):
    state = hashed_state()
    state["Mixed_7c.branch1x1.bn.running_var"][3] = math.nan
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="Mixed_7c.branch1x1.bn.running_var contains NaN"):
        inception.load_inception(tmp_path / "weights.pth")


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

    single = inception_features(inception_file)(images.float())
    assert single.dtype == torch.float32
    assert single.double().norm(dim=1).tolist() == pytest.approx(f.norm(dim=1).tolist(), rel=1e-5)


def test_inception_sees_images_as_they_would_be_saved(inception_file):
    features = inception_features(inception_file)
    images = noise(1, 3 * 20 * 30).view(1, 3, 20, 30) * 2
    assert torch.equal(features(images), features(images.clamp(-1, 1)))


def test_inception_refuses_a_file_of_another_network(tmp_path):
    with pytest.raises(FileNotFoundError, match="pt_inception-2015-12-05-6726825d.pth.*mseitzer/pytorch-fid"):
        inception_features(tmp_path / "none.pth")
    torch.save({"AuxLogits.conv0.conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth: not pytorch-fid's Inception") as error:
        inception_features(tmp_path / "other.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [(96, 128), (130, 70), (301, 419), (224, 224)])
def test_preprocessing_is_pillows_bicubic_then_a_centre_crop(size):
    images = normal(1, 3 * size[0] * size[1], 0).view(1, 3, *size).float()
    x = preprocess(images, 224, CLIP_MEAN, CLIP_STD)
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
    features = dino_features(folders / "dino", norm)(IMAGES)
    torch.testing.assert_close(features, token / token.norm(dim=1, keepdim=True))


def test_fd_dinov2_takes_the_class_token_at_its_own_length(folders):
    assert is_dinov2(folders / "dinov2") and not is_dinov2(folders / "dino")
    token = dino_features(folders / "dinov2", "imagenet", unit=False)(IMAGES)
    assert (token.norm(dim=1) - 1).abs().min() > 0.1
    unit = dino_features(folders / "dinov2", "imagenet")(IMAGES)
    torch.testing.assert_close(torch.nn.functional.normalize(token, dim=1), unit)


def test_a_folder_of_dinov2_can_be_used(folders):
    features = dino_features(folders / "dinov2")(IMAGES)
    assert features.shape == (2, 32) and features.norm(dim=1).tolist() == pytest.approx([1, 1])
    with pytest.raises(ValueError, match="clip model, neither DINO"):
        dino_features(folders / "clip")


def test_clip_features_are_the_normalised_image_embeddings_at_the_folders_size(folders):
    features = clip_features(folders / "clip")
    images = IMAGES[..., :64, :64]
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    model = CLIPModel.from_pretrained(folders / "clip").float().eval()
    with torch.no_grad():
        e = model(torch.tensor([[97, 98]]), ((images / 2 + 0.5).clamp(0, 1) - mean) / std).image_embeds
    torch.testing.assert_close(features(images), e)
    assert features(images).dtype == torch.float32 and features(IMAGES).shape == (2, 24)


def test_a_missing_or_incomplete_model_folder_names_what_to_download(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="openai/clip-vit-base-patch32"):
        clip_features(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="facebook/dino-vits16"):
        dino_features(tmp_path / "none")
    (tmp_path / "config.json").write_bytes((folders / "dino/config.json").read_bytes())
    torch.save({"embeddings.cls_token": torch.zeros(1, 1, 32)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin: not a complete ViTModel"):
        dino_features(tmp_path)
