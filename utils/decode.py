"""Picture files as a viewer shows them: upright, transparency on white, colours in sRGB, greys with 8 bits.

Read are the formats that Pillow reads, and HEIC, AVIF and JPEG XL where their Pillow plugin is installed.
"""

import importlib
import io
import os
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

WHOLE = 2**25  # pixels; of a larger picture only the centre square is converted, and a JPEG is decoded at reduced size
MAX_PIXELS = 2 * 89_478_485  # Pillow's own limit; 716 MB decoded
Image.MAX_IMAGE_PIXELS = 2**29  # that limit is applied here, after a JPEG's reduction
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # of broken metadata: harmless, and many
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # an error says it where it matters

ORIENTATION = 0x0112
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # TIFF tags
CAMERA_RAW = (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2")  # Pillow reads some as their thumbnail
SRGB = ImageCms.createProfile("sRGB")


def read_image(path: str | Path, resolution: int | None = None) -> Image.Image:
    """A picture file in RGB, as a viewer shows it.

    resolution: what the centre crop will be scaled to. Memory then depends on it rather than on the picture: a JPEG of
    more than `WHOLE` pixels is decoded at 1/2 to 1/8 of its size, and where the picture or its scaled copy is larger
    than that, only its centre square is returned.
    Raises OSError with the file's name and the reason if it cannot be read.
    """
    try:
        with open_picture(path) as file:
            if resolution and file.size[0] * file.size[1] > WHOLE:
                file.draft(None, (2 * resolution, 2 * resolution))  # JPEG only; keeps twice the pixels needed
            W, H = file.size
            if W * H > MAX_PIXELS:
                raise OSError(f"too large: {W} x {H} pixels, at most {MAX_PIXELS:,} are read; scale it down")
            deep = ";16" in str(getattr(file, "tile", ""))
            file.load()
            picture = file
            if deep and isinstance(file.info.get("transparency"), tuple):  # colours of 16 bits have lost the lower 8
                file.info["transparency"] = tuple(v >> 8 for v in file.info["transparency"])
            if resolution and max(W * H, resolution**2 * max(W, H) // min(W, H)) > WHOLE:
                side = min(file.size)
                left, top = (file.size[0] - side) // 2, (file.size[1] - side) // 2
                picture = file.crop((left, top, left + side, top + side))
            turn = TRANSPOSE.get(orientation(file))
            picture = to_rgb(picture, tiff_tags(file))
            return picture if turn is None else picture.transpose(turn)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything for a damaged file
        raise OSError(f"{path}: not a readable image ({reason(path, error)})") from None


def open_picture(path: str | Path) -> Image.Image:
    """`Image.open`; where Pillow does not know the format, once more with the plugin for it, if that is installed."""
    if Path(path).suffix.lower() in CAMERA_RAW:
        raise OSError("camera raw; convert it to PNG or JPEG")
    try:
        file = Image.open(path)
    except UnidentifiedImageError:
        plugin = plugin_for(path)
        if not plugin:
            raise
        try:
            module = importlib.import_module(plugin[1])
        except ImportError:
            raise OSError(f"{plugin[0]}; pip install {plugin[2]} to read it, or convert it to PNG") from None
        if hasattr(module, "register_heif_opener"):
            module.register_heif_opener()
        file = Image.open(path)
    if file.format in ("EPS", "WMF"):  # Pillow would start another program to draw it
        raise OSError(f"{file.format}: a drawing without pixels; convert it to PNG")
    return file


def plugin_for(path: str | Path) -> tuple[str, str, str] | None:
    """Format, module and package for a file that Pillow alone does not read."""
    head = first_bytes(path)
    if head[4:8] == b"ftyp" and head[8:12] in HEIC:
        return "HEIC", "pillow_heif", "pillow-heif"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"):
        return "AVIF", "pillow_avif", "pillow-avif-plugin"
    if head[:2] == b"\xff\x0a" or head[:12] == b"\0\0\0\x0cJXL \r\n\x87\n":
        return "JPEG XL", "pillow_jxl", "pillow-jxl-plugin"
    return None


def first_bytes(path: str | Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(512)


def reason(path: str | Path, error: Exception) -> str:
    """Why a file could not be read, in a few words and without its name."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno).lower()
    if not isinstance(error, UnidentifiedImageError):
        text = str(error) or type(error).__name__
        cut = isinstance(error, SyntaxError) or any(word in text.lower() for word in ("truncated", "broken", "eof"))
        return f"cut off or damaged: {text}" if cut else text
    head = first_bytes(path)
    text = head.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    if not head:
        return "an empty file"
    if not head.strip(b"\0"):
        return "all zeros: a copy or download that was never finished"
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page that was saved under an image's name; download it again"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer; fetch the file with git lfs pull"
    if text.startswith((b"<svg", b"<?xml", b"%pdf")):
        return "a drawing without pixels; convert it to PNG"
    if text.startswith((b"v/1\x01", b"#?radiance")):
        return "high dynamic range (EXR or HDR); convert it to PNG"
    if head[4:8] == b"ftyp":
        return "a video; extract its frames as PNG or JPEG"
    if head.startswith((b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF", b"II*\0", b"MM\0*", b"BM")):
        return "cut off or damaged near its beginning"
    return "not a format that Pillow reads; convert it to PNG or JPEG"


def orientation(file: Image.Image) -> int:
    """EXIF's orientation, 1 to 8. Everything else in EXIF is ignored, and so is EXIF that is broken."""
    try:
        value = file.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow's parser raises nearly anything here
        return 1
    return value if isinstance(value, int) else 1


def tiff_tags(file: Image.Image) -> tuple[int, bool]:
    """Bits of a grey value and whether 0 is white. Other formats than TIFF: 16, as Pillow scales them, and False."""
    tags = getattr(file, "tag_v2", {}) if file.format == "TIFF" else {}
    return tags.get(BITS_PER_SAMPLE, (16,))[0], tags.get(PHOTOMETRIC) == 0


def to_rgb(picture: Image.Image, tags: tuple[int, bool] = (16, False)) -> Image.Image:
    """RGB with 8 bits in sRGB, transparency on white. An RGB picture without a profile is returned as it is.

    tags: see `tiff_tags`. Raises OSError for greys whose white is not defined.
    """
    info, alpha = picture.info, None
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture, alpha = eight_bits(picture, *tags)
    grey = picture.mode in ("1", "L", "LA")
    if alpha is None and picture.has_transparency_data:
        picture = picture.convert("RGBA")
        alpha = picture.getchannel("A")
        picture = picture.convert("RGB")
    if picture.mode == "LAB":
        lab = ImageCms.buildTransform(ImageCms.createProfile("LAB"), SRGB, "LAB", "RGB")
        picture = ImageCms.applyTransform(picture, lab)
    elif info.get("icc_profile"):
        picture = to_srgb(picture, info["icc_profile"], grey)
    elif "gamma" in info and "srgb" not in info and abs(info["gamma"] * 2.2 - 1) > 0.05:  # libpng's tolerance
        exponent = 1 / (2.2 * info["gamma"]) if info["gamma"] > 0 else 1
        picture = picture.convert("RGB").point([round(255 * (v / 255) ** exponent) for v in range(256)] * 3)
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    if alpha is not None:
        canvas = Image.new("RGB", picture.size, "white")
        canvas.paste(picture, mask=alpha)
        picture = canvas
    return picture


def eight_bits(picture: Image.Image, bits: int, white_is_zero: bool) -> tuple[Image.Image, Image.Image | None]:
    """Greys of more than 8 bits, or in 0..1 -> an L picture, and the mask of the transparent value if there is one.

    Raises OSError if it is not known which value is white.
    """
    values = np.asarray(picture)
    low, high = values.min(), values.max()
    if picture.mode == "F":
        if not (0 <= low and high <= 1):
            raise OSError(f"floating-point greys from {low:g} to {high:g}, not in 0..1; save it with 8 or 16 bits")
        grey = (values * 255).round().astype(np.uint8)
    else:
        if bits > 16 or low < 0 or high > 65535:
            raise OSError(f"greys of {bits} bits, from {low} to {high}; save it with 8 or 16 bits")
        grey = (values >> (bits - 8)).astype(np.uint8)
    key = picture.info.get("transparency")
    mask = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)) if isinstance(key, int) else None
    return Image.fromarray(255 - grey if white_is_zero else grey), mask


def to_srgb(picture: Image.Image, profile: bytes, grey: bool) -> Image.Image:
    """A picture's colours, which mean what `profile` (ICC) says, in sRGB. A profile of other channels is ignored."""
    space = profile[16:20]
    if space == b"GRAY" and grey:
        picture = picture.convert("L")
    elif space == b"RGB " and picture.mode not in ("CMYK", "RGB"):
        picture = picture.convert("RGB")
    if {"L": b"GRAY", "RGB": b"RGB ", "CMYK": b"CMYK"}.get(picture.mode) != space:
        return picture
    transform = srgb_transform(profile, picture.mode)
    return ImageCms.applyTransform(picture, transform) if transform else picture


@lru_cache(maxsize=32)
def srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The conversion to sRGB; None for a broken profile, and for sRGB itself, whose pixels must stay as they are."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, SRGB, mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
    if mode == "CMYK":
        return transform
    levels = np.linspace(0, 255, 16).round().astype(np.uint8)
    if mode == "L":
        sample = Image.fromarray(levels[None])
    else:
        sample = Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), -1).reshape(16, 256, 3))
    converted = np.asarray(ImageCms.applyTransform(sample, transform), dtype=int)
    same = np.abs(converted - np.asarray(sample.convert("RGB"), dtype=int)).max() <= 3  # the rounding of sRGB profiles
    return None if same else transform
