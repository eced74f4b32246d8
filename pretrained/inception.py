"""The Inception v3 of FID in its pytorch-fid form: images -> 2048 pool3 features.

Module names are the published file's key names, so that loading is one strict `load_state_dict`. Three differences
from torchvision's Inception v3: 1008 classes (loaded but unused), average pooling that does not count the padding, and
a max pool in the last block. Shapes: B batch, c channels.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrained import hub
from pretrained.reward_files import by_hand
from pretrained.weight_files import all_finite, read_file

FILE = "pt_inception-2015-12-05-6726825d.pth"
DIGEST = "6726825d"  # how its SHA-256 begins
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
RELEASE = "pytorch-fid"  # in place of a path: fetch the file from its release


class Unit(nn.Module):
    """Convolution without bias, batch norm, ReLU. Keeps H and W unless `stride` is 2 or `pad` is False."""

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, int], stride: int = 1, pad: bool = True):
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if pad and stride == 1 else 0
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def chain(x: Tensor, *units: nn.Module) -> Tensor:
    for unit in units:
        x = unit(x)
    return x


def average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class A(nn.Module):
    """Mixed_5b to 5d: (B, c_in, 35, 35) -> (B, 224 + c_pool, 35, 35)."""

    def __init__(self, c_in: int, c_pool: int):
        super().__init__()
        self.branch1x1 = Unit(c_in, 64, (1, 1))
        self.branch5x5_1 = Unit(c_in, 48, (1, 1))
        self.branch5x5_2 = Unit(48, 64, (5, 5))
        self.branch3x3dbl_1 = Unit(c_in, 64, (1, 1))
        self.branch3x3dbl_2 = Unit(64, 96, (3, 3))
        self.branch3x3dbl_3 = Unit(96, 96, (3, 3))
        self.branch_pool = Unit(c_in, c_pool, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        five = chain(x, self.branch5x5_1, self.branch5x5_2)
        three = chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(average(x))], 1)


class B(nn.Module):
    """Mixed_6a: (B, 288, 35, 35) -> (B, 768, 17, 17)."""

    def __init__(self):
        super().__init__()
        self.branch3x3 = Unit(288, 384, (3, 3), stride=2)
        self.branch3x3dbl_1 = Unit(288, 64, (1, 1))
        self.branch3x3dbl_2 = Unit(64, 96, (3, 3))
        self.branch3x3dbl_3 = Unit(96, 96, (3, 3), stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return torch.cat([self.branch3x3(x), three, F.max_pool2d(x, 3, stride=2)], 1)


class C(nn.Module):
    """Mixed_6b to 6e: (B, 768, 17, 17) -> same shape; 7x7 convolutions factored into 1x7 and 7x1 with c channels."""

    def __init__(self, c: int):
        super().__init__()
        self.branch1x1 = Unit(768, 192, (1, 1))
        self.branch7x7_1 = Unit(768, c, (1, 1))
        self.branch7x7_2 = Unit(c, c, (1, 7))
        self.branch7x7_3 = Unit(c, 192, (7, 1))
        self.branch7x7dbl_1 = Unit(768, c, (1, 1))
        self.branch7x7dbl_2 = Unit(c, c, (7, 1))
        self.branch7x7dbl_3 = Unit(c, c, (1, 7))
        self.branch7x7dbl_4 = Unit(c, c, (7, 1))
        self.branch7x7dbl_5 = Unit(c, 192, (1, 7))
        self.branch_pool = Unit(768, 192, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        seven = chain(x, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3)
        double = chain(x, self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3)
        double = chain(double, self.branch7x7dbl_4, self.branch7x7dbl_5)
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(average(x))], 1)


class D(nn.Module):
    """Mixed_7a: (B, 768, 17, 17) -> (B, 1280, 8, 8)."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1 = Unit(768, 192, (1, 1))
        self.branch3x3_2 = Unit(192, 320, (3, 3), stride=2)
        self.branch7x7x3_1 = Unit(768, 192, (1, 1))
        self.branch7x7x3_2 = Unit(192, 192, (1, 7))
        self.branch7x7x3_3 = Unit(192, 192, (7, 1))
        self.branch7x7x3_4 = Unit(192, 192, (3, 3), stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = chain(x, self.branch3x3_1, self.branch3x3_2)
        seven = chain(x, self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3, self.branch7x7x3_4)
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], 1)


class E(nn.Module):
    """Mixed_7b, 7c: (B, c_in, 8, 8) -> (B, 2048, 8, 8); 7c uses max pooling, as the original graph does."""

    def __init__(self, c_in: int, maximum: bool = False):
        super().__init__()
        self.maximum = maximum
        self.branch1x1 = Unit(c_in, 320, (1, 1))
        self.branch3x3_1 = Unit(c_in, 384, (1, 1))
        self.branch3x3_2a = Unit(384, 384, (1, 3))
        self.branch3x3_2b = Unit(384, 384, (3, 1))
        self.branch3x3dbl_1 = Unit(c_in, 448, (1, 1))
        self.branch3x3dbl_2 = Unit(448, 384, (3, 3))
        self.branch3x3dbl_3a = Unit(384, 384, (1, 3))
        self.branch3x3dbl_3b = Unit(384, 384, (3, 1))
        self.branch_pool = Unit(c_in, 192, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2)
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.maximum else average(x)
        wide = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        wide += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *wide, self.branch_pool(pooled)], 1)


class Inception(nn.Module):
    """Images (B, 3, H, W) in [-1, 1], of any size, -> pool3 features (B, 2048)."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = Unit(32, 32, (3, 3), pad=False)
        self.Conv2d_2b_3x3 = Unit(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = Unit(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = Unit(80, 192, (3, 3), pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = A(192, 32), A(256, 64), A(288, 64)
        self.Mixed_6a = B()
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = C(128), C(160), C(160), C(192)
        self.Mixed_7a = D()
        self.Mixed_7b, self.Mixed_7c = E(1280), E(2048, maximum=True)
        self.fc = nn.Linear(2048, 1008)  # in the file, but unused

    def forward(self, images: Tensor) -> Tensor:
        # Half-pixel centres, no antialiasing, aspect ratio not kept: the convention of published FIDs.
        x = F.interpolate(images.clamp(-1, 1), (299, 299), mode="bilinear", align_corners=False)
        x = chain(x, self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3)  # (B, 64, 147, 147)
        x = F.max_pool2d(x, 3, stride=2)
        x = chain(x, self.Conv2d_3b_1x1, self.Conv2d_4a_3x3)  # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, stride=2)
        x = chain(x, self.Mixed_5b, self.Mixed_5c, self.Mixed_5d)  # (B, 288, 35, 35)
        x = chain(x, self.Mixed_6a, self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e)  # (B, 768, 17, 17)
        x = chain(x, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c)  # (B, 2048, 8, 8)
        return x.mean((2, 3))


def find_inception(source: str | Path) -> Path:
    """The weight file: `source`, or if that is "pytorch-fid" the released one, fetched once into torch's folder.

    Raises FileNotFoundError that says where to get the file.
    """
    if str(source) != RELEASE:
        return Path(source)
    place = by_hand(FILE)
    try:
        return hub.fetch_release(URL, place, DIGEST)
    except OSError as error:
        raise FileNotFoundError(f"{place}: no Inception weights; get {URL} and put it there ({error})") from None


def load_inception(path: str | Path) -> Inception:
    """The network with the weights of pytorch-fid's file, in evaluation mode and frozen.

    Raises FileNotFoundError if there is no file, ValueError if its keys or shapes do not fit.
    """
    path = find_inception(path)
    if not path.is_file():
        get = f"get {FILE} from release `fid_weights` of the GitHub repository mseitzer/pytorch-fid"
        raise FileNotFoundError(f"{path}: no Inception weights; {get} and put it there")
    with torch.device("meta"):
        model = Inception()
    weights = all_finite(read_file(path), path)
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not pytorch-fid's Inception, use {FILE} ({reason} ...)") from None
    return model.eval().requires_grad_(False)
