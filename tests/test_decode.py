"""Pixels are what a viewer shows, and a picture that cannot be read says why."""

import io
import struct
import subprocess
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from training.data import ImageDataset
from utils import decode
from utils.images import read_image, to_pil

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the broken metadata


def saved(tmp_path, picture, suffix="png", **options):
    path = tmp_path / f"picture.{suffix}"
    picture.save(path, **options)
    return path


def first(path):
    return read_image(path).getpixel((0, 0))


def gradient(mode="RGB", size=(48, 32)):
    W, H = size
    pixels = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


# ------------------------------------------------------------------------------------------------- transparency


def hidden(mode):
    """A transparent picture whose hidden colour is green (or grey 60 %)."""
    if mode == "RGBA":
        return Image.new("RGBA", (8, 8), (0, 255, 0, 0)), {}
    if mode == "LA":
        return Image.new("LA", (8, 8), (150, 0)), {}
    if mode == "P":
        picture = Image.new("P", (8, 8), 1)
        picture.putpalette([255, 0, 0, 0, 255, 0])
        return picture, {"transparency": 1}
    if mode == "P, one alpha an entry":
        return hidden("P")[0], {"transparency": bytes([255, 0])}
    if mode == "L":
        return Image.new("L", (8, 8), 150), {"transparency": 150}
    if mode == "1":
        return Image.new("1", (8, 8), 0), {"transparency": 0}
    if mode == "I;16":
        return Image.fromarray(np.full((8, 8), 40_000, np.uint16)), {"transparency": 40_000}
    return Image.new("RGB", (8, 8), (0, 255, 0)), {"transparency": (0, 255, 0)}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "P, one alpha an entry", "L", "1", "I;16", "RGB"])
def test_transparency_shows_white_and_not_the_colour_under_it(tmp_path, mode):
    picture, options = hidden(mode)
    assert first(saved(tmp_path, picture, **options)) == (255, 255, 255)


@pytest.mark.parametrize("suffix", ["webp", "gif", "tiff", "ico"])
def test_transparency_of_other_formats_shows_white(tmp_path, suffix):
    picture = Image.new("RGBA", (16, 16), (0, 255, 0, 0))
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    assert first(saved(tmp_path, picture, suffix, **options)) == (255, 255, 255)


def test_half_transparency_is_mixed_with_white_and_opaque_pixels_stay(tmp_path):
    picture = gradient("RGBA")
    picture.putpixel((0, 0), (0, 0, 0, 128))
    got = np.array(read_image(saved(tmp_path, picture)))
    assert got[0, 0].tolist() == [127] * 3
    expected = np.array(gradient())
    assert (got != expected).any(-1).sum() == 1


def test_a_transparent_colour_with_16_bits_is_found(tmp_path):
    """PNG, RGB with 16 bits: Pillow keeps the upper 8 of the pixels and all 16 of the transparent colour."""

    def chunk(kind, content):
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    pixels = struct.pack(">6H", 0x1234, 0xFFFF, 0x4321, 0xFFFF, 0, 0)
    head = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"tRNS", pixels[:6]) + chunk(b"IDAT", zlib.compress(b"\0" + pixels))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b""))
    assert np.array(read_image(tmp_path / "a.png"))[0].tolist() == [[255] * 3, [255, 0, 0]]


# -------------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
def test_every_orientation_is_turned_upright(tmp_path, value, suffix):
    """Red top left, blue top right, as seen by a viewer."""
    upright = Image.new("RGB", (32, 32), "white")
    upright.paste("red", (0, 0, 16, 16))
    upright.paste("blue", (16, 0, 32, 16))
    turn = {5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = upright.transpose(turn.get(value) or decode.TRANSPOSE[value]) if value > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = value
    got = read_image(saved(tmp_path, stored, suffix, exif=exif))
    for xy, colour in (((4, 4), (255, 0, 0)), ((28, 4), (0, 0, 255)), ((4, 28), (255, 255, 255))):
        assert np.abs(np.subtract(got.getpixel(xy), colour)).max() < 8, (value, xy)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0garbage that is no TIFF header",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\xff\xff\0\0\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x02\0\0\0\x04abc\0\x01\x1a\0\x05\0\0\0\x01\0\0\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(range(256)),
    ],
)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_broken_exif_leaves_the_pixels(tmp_path, exif, suffix):
    picture = gradient()
    plain = read_image(saved(tmp_path, picture, suffix))
    assert read_image(saved(tmp_path, picture, suffix, exif=exif)).tobytes() == plain.tobytes()


@pytest.mark.parametrize("tag", [(0x011A, 2), (0x0132, 11), (0x010F, 13)])
def test_the_orientation_is_used_though_the_rest_of_exif_is_wrong(tmp_path, tag):
    """A resolution that is text, a date that is a number: Pillow reads them and cannot write them again."""
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHII", *tag, 2 if tag[1] == 2 else 1, 8)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(30)
    picture = gradient()
    expected = picture.transpose(Image.Transpose.ROTATE_270)
    assert read_image(saved(tmp_path, picture, exif=exif)).tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", [2, 4, 5, 7])
def test_an_orientation_of_another_type_is_ignored_or_read(tmp_path, kind):
    entry = struct.pack("<HHII", 0x0112, kind, 1, 26)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4) + struct.pack("<II", 1, 1)
    assert read_image(saved(tmp_path, gradient(), exif=exif)).size == (48, 32)


# ------------------------------------------------------------------------------------------------------ colours


def icc(tags, space=b"RGB ", device=b"mntr"):
    """A profile (ICC, version 2) from the contents of its tags."""
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"a\0" + bytes(78)} | tags
    table, content, at = b"", b"", 128 + 4 + 12 * len(tags)
    for key, value in tags.items():
        value += bytes(-len(value) % 4)
        table += key + struct.pack(">II", at + len(content), len(value))
        content += value
    white = struct.pack(">iii", 63190, 65536, 54061)  # D50
    head = struct.pack(">I4sI", at + len(content), b"lcms", 0x02400000) + device + space + b"XYZ " + bytes(12)
    head += b"acsp" + bytes(28) + white
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + content


def curve(gamma):
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * gamma))


def xyz(*values):
    return b"XYZ " + bytes(4) + struct.pack(">iii", *(round(65536 * v) for v in values))


SRGB_COLORANTS = {"r": (0.43607, 0.22249, 0.01392), "g": (0.38515, 0.71687, 0.09708), "b": (0.14307, 0.06061, 0.7141)}


def rgb_profile(order="rgb", gamma=2.2):
    colorants = {f"{to}XYZ".encode(): xyz(*SRGB_COLORANTS[of]) for to, of in zip("rgb", order, strict=True)}
    return icc(colorants | {f"{c}TRC".encode(): curve(gamma) for c in "rgb"} | {b"wtpt": xyz(0.9642, 1, 0.8249)})


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
def test_a_colour_profile_is_applied(tmp_path, suffix):
    """A profile whose first channel is blue: what it calls red is blue on a screen."""
    path = saved(tmp_path, Image.new("RGB", (16, 16), (255, 0, 0)), suffix, icc_profile=rgb_profile("bgr"))
    assert np.abs(np.subtract(first(path), (0, 0, 255))).max() <= 4


def test_a_profile_of_linear_light_brightens(tmp_path):
    """128 / 255 of linear light is 188 in sRGB."""
    profile = rgb_profile(gamma=1)
    assert (
        np.abs(
            np.subtract(first(saved(tmp_path, Image.new("RGB", (8, 8), (128,) * 3), icc_profile=profile)), 188)
        ).max()
        <= 1
    )
    grey = icc({b"kTRC": curve(1), b"wtpt": xyz(0.9642, 1, 0.8249)}, b"GRAY")
    assert np.abs(np.subtract(first(saved(tmp_path, Image.new("L", (8, 8), 128), icc_profile=grey)), 188)).max() <= 1
    half = Image.new("LA", (8, 8), (128, 128))
    assert np.abs(np.subtract(first(saved(tmp_path, half, icc_profile=grey)), 221)).max() <= 2
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([128] * 3)
    assert np.abs(np.subtract(first(saved(tmp_path, palette, icc_profile=profile)), 188)).max() <= 1


def test_srgb_profiles_leave_the_pixels_as_they_are(tmp_path):
    picture = gradient()
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert read_image(saved(tmp_path, picture, icc_profile=own)).tobytes() == picture.tobytes()


@pytest.mark.parametrize("profile", [b"", b"no profile", bytes(200), rgb_profile()[:150], icc({}, b"RGB ")])
def test_a_broken_or_unfitting_profile_is_ignored(tmp_path, profile):
    picture = gradient()
    assert read_image(saved(tmp_path, picture, icc_profile=profile)).tobytes() == picture.tobytes()
    grey = icc({b"kTRC": curve(1), b"wtpt": xyz(0.9642, 1, 0.8249)}, b"GRAY")
    assert read_image(saved(tmp_path, picture, icc_profile=grey)).tobytes() == picture.tobytes()


def test_lab_and_cmyk_become_rgb(tmp_path):
    path = saved(tmp_path, Image.new("LAB", (8, 8), (255, 128, 128)), "tiff")  # L 100, a 0, b 0
    assert min(first(path)) >= 253
    path = saved(tmp_path, Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "jpg", quality=95)
    assert np.abs(np.subtract(first(path), (255, 0, 0))).max() <= 4


def test_the_gamma_of_a_png_is_applied(tmp_path):
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (128,) * 3).save(content, "png")
    for value, expected in ((45455, 128), (100_000, 186)):  # the usual one, and linear light
        gama = b"gAMA" + struct.pack(">I", value)
        chunk = struct.pack(">I", 4) + gama + struct.pack(">I", zlib.crc32(gama))
        data = content.getvalue()
        (tmp_path / "a.png").write_bytes(data[:33] + chunk + data[33:])
        assert first(tmp_path / "a.png") == (expected,) * 3


# -------------------------------------------------------------------------------------------------------- greys


def tiff(values, bits, photometric=1, sample_format=1):
    """An uncompressed little-endian TIFF of one row."""
    entries = [
        (256, 4, len(values)), (257, 4, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8),
        (277, 3, 1), (278, 4, 1), (279, 4, (len(values) * bits + 7) // 8), (339, 3, sample_format),
    ]  # fmt: skip
    if bits == 12:
        bits_of = "".join(f"{v:012b}" for v in values)
        body = bytes(int(bits_of[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(bits_of), 8))
    else:
        body = struct.pack(f"<{len(values)}{'f' if sample_format == 3 else {16: 'H', 32: 'I'}[bits]}", *values)
    body += bytes(len(body) % 2)
    table = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(entries)) + table + bytes(4)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (tiff([0, 0x8000, 0xFFFF], 16), [0, 128, 255]),
        (tiff([0, 0x8000, 0xFFFF], 16, photometric=0), [255, 127, 0]),
        (tiff([0, 0x800, 0xFFF, 0], 12), [0, 128, 255, 0]),
        (tiff([0, 0.5, 1], 32, sample_format=3), [0, 128, 255]),
        (b"P5 3 1 65535\n" + struct.pack(">3H", 0, 0x8000, 0xFFFF), [0, 128, 255]),
        (b"P5 3 1 1023\n" + struct.pack(">3H", 0, 512, 1023), [0, 128, 255]),
    ],
    ids=["16 bits", "white is zero", "12 bits", "floating point", "PGM of 16 bits", "PGM of 10 bits"],
)
def test_greys_of_more_than_8_bits_keep_their_brightness(tmp_path, content, expected):
    (tmp_path / "a.tif").write_bytes(content)
    assert np.asarray(read_image(tmp_path / "a.tif"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    "content", [tiff([0, 200, 255], 32), tiff([0, 100, 255], 32, sample_format=3), tiff([float("nan")], 32, 1, 3)]
)
def test_greys_without_a_known_white_are_refused(tmp_path, content):
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(OSError, match="save it with 8 or 16 bits"):
        read_image(tmp_path / "a.tif")


# ------------------------------------------------------------------------------------------------------ reasons


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "an empty file"),
        (bytes(1000), "never finished"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC; pip install pillow-heif"),
        (b"\xff\x0a" + bytes(20), "JPEG XL; pip install pillow-jxl-plugin"),
        (b"\0\0\0\x18ftypisom", "a video"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a drawing"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "EPS: a drawing"),
        (b"\x89PNG\r\n\x1a\n", "cut off or damaged"),
        (b"some text", "not a format that Pillow reads"),
    ],
)
def test_a_file_that_is_no_picture_says_what_it_is(tmp_path, content, why):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(OSError, match=why) as error:
        read_image(tmp_path / "a.png")
    assert str(error.value).count("a.png") == 1 and "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tiff", "bmp"])
def test_a_cut_file_says_so(tmp_path, suffix):
    path = saved(tmp_path, gradient(size=(300, 200)), suffix)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(OSError, match="not a readable image") as error:
        read_image(path)
    assert str(error.value).count(path.name) == 1


def test_missing_and_forbidden_files_and_folders_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such image"):
        read_image(tmp_path / "no.png")
    with pytest.raises(OSError, match="is a directory"):
        read_image(tmp_path)
    with pytest.raises(OSError, match="camera raw"):
        read_image(saved(tmp_path, gradient(), "tiff").rename(tmp_path / "a.NEF"))


def test_an_installed_plugin_is_used(tmp_path, monkeypatch):
    """A stand-in for pillow_heif, whose "pictures" are all red."""

    def register():
        Image.register_open(
            "FAKE", lambda file, name: Image.new("RGB", (4, 4), "red"), lambda head: head[4:8] == b"ftyp"
        )

    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert first(tmp_path / "a.heic") == (255, 0, 0)


# ------------------------------------------------------------------------------------------------------- memory


def test_too_large_is_said_before_it_is_decoded(tmp_path, monkeypatch):
    path = saved(tmp_path, gradient(size=(300, 200)))
    monkeypatch.setattr(decode, "MAX_PIXELS", 50_000)
    with pytest.raises(OSError, match="too large: 300 x 200 pixels, at most 50,000"):
        read_image(path)


def test_a_large_picture_is_cropped_as_a_small_one_is(tmp_path, monkeypatch):
    """The ways around full size give the same picture: a smooth one, turned, on white."""
    y, x = np.mgrid[0:400, 0:640]
    pixels = np.stack([x * 255 // 640, y * 255 // 400, 255 - x * 255 // 640, np.where(x < 320, 255, 128)], -1)
    smooth = Image.fromarray(pixels.astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix, picture in (("png", smooth), ("jpg", smooth.convert("RGB"))):
        path = saved(tmp_path, picture, suffix, exif=exif)
        whole, _ = ImageDataset([(path, "")], 50)[0]
        with monkeypatch.context() as patch:
            patch.setattr(decode, "WHOLE", 1000)
            part, _ = ImageDataset([(path, "")], 50)[0]
            sizes = {"png": (400, 400), "jpg": (100, 100)}
            assert read_image(path, 50).size == sizes[suffix]
        assert (whole - part).abs().mean() < 0.01 and (whole - part).abs().max() < 0.2


def test_a_thin_picture_takes_no_more_memory_than_its_crop(tmp_path):
    """Scaled as a whole it would have 512 x 2.6 million pixels."""
    path = saved(tmp_path, Image.new("RGB", (51_200, 10), "red"))
    image, _ = ImageDataset([(path, "")], 512)[0]
    assert image.shape == (3, 512, 512) and image[:, 256, 256].tolist() == [1, -1, -1]


def test_peak_memory_of_a_large_jpeg(tmp_path):
    """120 million pixels, 480 MB decoded."""
    Image.new("L", (12_000, 10_000), 90).convert("RGB").save(tmp_path / "a.jpg")
    code = (
        "import sys; from utils.decode import read_image; import resource\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "read_image(sys.argv[1], 512)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.jpg"], capture_output=True, text=True, cwd=ROOT)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 60e6, done.stderr


def test_plain_pictures_keep_their_pixels(tmp_path):
    """What was read before this file existed, to the bit: resume and recorded runs depend on it."""
    picture = gradient(size=(61, 47))
    scaled = picture.resize((42, 32), Image.Resampling.BICUBIC).crop((5, 0, 37, 32))
    image, _ = ImageDataset([(saved(tmp_path, picture), "")], 32)[0]
    assert to_pil(image[None])[0].tobytes() == scaled.tobytes()
