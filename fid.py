"""FID, sFID, Inception score, precision and recall of a set of images, as the ADM evaluator defines them.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz
    python fid.py --save-stats reference.npz DATA/train                  images of one size
    torchrun --standalone --nproc_per_node=8 fid.py samples/ reference.npz --num-samples 50000
    python fid.py --self-test pt_inception-2015-12-05-6726825d.pth

SAMPLES and REFERENCE are each a folder of images (searched recursively), an .npz of images (`arr_0`, uint8, N x H x W x 3, as the ADM
evaluator reads), or an .npz of statistics (`mu`, `sigma`; for sFID `mu_s`, `sigma_s`). If an .npz has both, the distances take the
statistics and precision and recall the images, as ADM does with its own reference files. One JSON object goes to stdout; what could not be
computed is null there, with one line on stderr that says why. Of all files only that of `--features` is a program: run what you trust.

Protocol, and where each choice comes from (ADM: openai/guided-diffusion at 1b61a43, evaluations/evaluator.py):
1. Images are uint8 RGB, all of one size within a set; the order is the array's, or that of the sorted paths. --num limits SAMPLES only.
   Files become RGB by Pillow's convert("RGB"): alpha is left out, not blended, and EXIF's orientation does not count.
2. Resize to 299 x 299 bilinearly on TensorFlow 1's grid, source index = output index * in / out, on 0..255; then (x - 128) / 128. This is
   what the TF graph of ADM and torch-fidelity do. `--resize pytorch-fid` is pytorch-fid's: images / 255, half-pixel bilinear without
   antialiasing, then 2x - 1. The two numbers are not comparable.
3. Network: the Inception of 2015-12-05 (TF, 1008 classes), in the weights ported by pytorch-fid, float32 without TF32, eval mode.
4. FID (Heusel et al. 2017, 1706.08500, eq. 6): Frechet distance of the 2048 pool activations. sFID (Nash et al. 2021, 2103.03841): of the
   first 7 channels of TF's mixed_6/conv, 17 x 17 x 7. Mean and covariance (N - 1) from float64 sums over all processes.
5. Inception score (Salimans et al. 2016, 1606.03498): softmax without fc.bias, mean over consecutive chunks of 5,000 images.
6. Precision, recall (Kynkaanniemi et al. 2019, 1904.06991): k = 3 in the pool activations, against all images of REFERENCE. Distances are
   float16 in ADM, float32 here: at the borders of the balls a few counts may differ from a published number.
7. Results have the names above for exactly these weights. In the space of `--features FILE` (TorchScript, uint8 N x 3 x H x W -> N x D) or
   of other Inception weights they are "frechet_distance", "feature_precision" and so on, and the JSON names the file and its sha256.
8. Batches are the same for any number of processes, and features are put back in the order of the images: results agree to rounding.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"  # first digits, as in the file name
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
IMAGE_FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "BMP",
)  # whatever the suffix: Pillow hands other formats to other programs
MAX_PIXELS = 2**24  # of an image, 4096 x 4096: a small file may claim, and inflate to, any size
MAX_STATISTICS = 2**30  # bytes of an array of statistics: a covariance of 11,585 dimensions
METRICS = {
    "fid": ["fid"],
    "sfid": ["sfid"],
    "is": ["inception_score"],
    "pr": ["precision", "recall"],
}  # flag: results
NEIGHBOURS = 3
OTHER_SPACE = {  # names of the results when the features are not those of the Inception of 2015-12-05
    "fid": "frechet_distance",
    "sfid": "spatial_frechet_distance",
    "inception_score": "class_score",
    "precision": "feature_precision",
    "recall": "feature_recall",
}


def fail(message):
    """Ends the program with one line on stderr and exit code 2. Every process calls it; the first of each machine prints, others wait."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        tqdm.write(
            f"fid.py: error: {' '.join(str(message).split())}", file=sys.stderr
        )  # tqdm.write: a progress bar may be drawn
    else:
        time.sleep(3)
    sys.exit(2)


def warn(message):
    tqdm.write(f"fid.py: warning: {message}", file=sys.stderr)


def processes():
    """Rank and number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_sum(x):
    """Sum over the processes of a CPU tensor, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def fail_together(error):
    """Ends all processes if one of them has an error (a message, or None); also a barrier."""
    _, world = processes()
    errors = [error]
    if world > 1:
        errors = [None] * world
        dist.all_gather_object(errors, error)
    if any(errors):
        fail(next(e for e in errors if e))


# The network


class ConvBN(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size=1, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


def avg_pool(x):
    return F.avg_pool2d(
        x, 3, stride=1, padding=1, count_include_pad=False
    )  # TF averages over the pixels inside the image only


class Mixed5(nn.Module):
    def __init__(self, in_channels, pool_channels):
        super().__init__()
        self.branch1x1 = ConvBN(in_channels, 64)
        self.branch5x5_1 = ConvBN(in_channels, 48)
        self.branch5x5_2 = ConvBN(48, 64, 5)
        self.branch3x3dbl_1 = ConvBN(in_channels, 64)
        self.branch3x3dbl_2 = ConvBN(64, 96, 3)
        self.branch3x3dbl_3 = ConvBN(96, 96, 3)
        self.branch_pool = ConvBN(in_channels, pool_channels)

    def forward(self, x):
        conv5x5 = self.branch5x5_2(self.branch5x5_1(x))
        conv3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), conv5x5, conv3x3dbl, self.branch_pool(avg_pool(x))], 1)


class Mixed6a(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch3x3 = ConvBN(288, 384, 3, stride=2, padding=0)
        self.branch3x3dbl_1 = ConvBN(288, 64)
        self.branch3x3dbl_2 = ConvBN(64, 96, 3)
        self.branch3x3dbl_3 = ConvBN(96, 96, 3, stride=2, padding=0)

    def forward(self, x):
        conv3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), conv3x3dbl, F.max_pool2d(x, 3, 2)], 1)


class Mixed6(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.branch1x1 = ConvBN(768, 192)
        self.branch7x7_1 = ConvBN(768, channels)
        self.branch7x7_2 = ConvBN(channels, channels, (1, 7))
        self.branch7x7_3 = ConvBN(channels, 192, (7, 1))
        self.branch7x7dbl_1 = ConvBN(768, channels)
        self.branch7x7dbl_2 = ConvBN(channels, channels, (7, 1))
        self.branch7x7dbl_3 = ConvBN(channels, channels, (1, 7))
        self.branch7x7dbl_4 = ConvBN(channels, channels, (7, 1))
        self.branch7x7dbl_5 = ConvBN(channels, 192, (1, 7))
        self.branch_pool = ConvBN(768, 192)

    def forward(self, x):
        conv7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        conv7x7dbl = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        conv7x7dbl = self.branch7x7dbl_5(self.branch7x7dbl_4(conv7x7dbl))
        return torch.cat([self.branch1x1(x), conv7x7, conv7x7dbl, self.branch_pool(avg_pool(x))], 1)


class Mixed7a(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch3x3_1 = ConvBN(768, 192)
        self.branch3x3_2 = ConvBN(192, 320, 3, stride=2, padding=0)
        self.branch7x7x3_1 = ConvBN(768, 192)
        self.branch7x7x3_2 = ConvBN(192, 192, (1, 7))
        self.branch7x7x3_3 = ConvBN(192, 192, (7, 1))
        self.branch7x7x3_4 = ConvBN(192, 192, 3, stride=2, padding=0)

    def forward(self, x):
        conv7x7x3 = self.branch7x7x3_4(
            self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        )
        return torch.cat(
            [self.branch3x3_2(self.branch3x3_1(x)), conv7x7x3, F.max_pool2d(x, 3, 2)], 1
        )


class Mixed7(nn.Module):
    def __init__(self, in_channels, max_pool):
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = ConvBN(in_channels, 320)
        self.branch3x3_1 = ConvBN(in_channels, 384)
        self.branch3x3_2a = ConvBN(384, 384, (1, 3))
        self.branch3x3_2b = ConvBN(384, 384, (3, 1))
        self.branch3x3dbl_1 = ConvBN(in_channels, 448)
        self.branch3x3dbl_2 = ConvBN(448, 384, 3)
        self.branch3x3dbl_3a = ConvBN(384, 384, (1, 3))
        self.branch3x3dbl_3b = ConvBN(384, 384, (3, 1))
        self.branch_pool = ConvBN(in_channels, 192)

    def forward(self, x):
        conv3x3 = self.branch3x3_1(x)
        conv3x3 = [self.branch3x3_2a(conv3x3), self.branch3x3_2b(conv3x3)]
        conv3x3dbl = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        conv3x3dbl = [self.branch3x3dbl_3a(conv3x3dbl), self.branch3x3dbl_3b(conv3x3dbl)]
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else avg_pool(x)
        return torch.cat([self.branch1x1(x), *conv3x3, *conv3x3dbl, self.branch_pool(pooled)], 1)


def resize_tf1(images, size=299):
    """(N, C, H, W) -> float32 (N, C, size, size), values as given. TF1 ResizeBilinear: source index = output index * in / out."""
    x = images.float()
    height, width = x.shape[-2:]
    y = torch.arange(size, device=x.device, dtype=torch.float32) * (height / size)
    z = torch.arange(size, device=x.device, dtype=torch.float32) * (width / size)
    top, left = y.long(), z.long()
    bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    x = torch.lerp(x[:, :, top], x[:, :, bottom], (y - top)[:, None])  # (N, C, size, W)
    return torch.lerp(x[..., left], x[..., right], z - left)  # (N, C, size, size)


def resize_pytorch_fid(images, size=299):
    """uint8 (N, C, H, W) -> float32 (N, C, size, size) in [0, 1]: half-pixel centres, no antialiasing."""
    return F.interpolate(
        images.float() / 255, size=(size, size), mode="bilinear", align_corners=False
    )


class InceptionV3(nn.Module):
    """The Inception of 2015-12-05 with 1008 classes; names of the weights as in pytorch-fid and torch-fidelity (566 tensors).

    Not torchvision's inception_v3: other average pools, a max pool in Mixed_7c, other weights. Built in eval mode.
    """

    def __init__(self, resize="tf1"):
        super().__init__()
        self.resize = resize
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, stride=2, padding=0)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBN(64, 80)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, padding=0)
        self.Mixed_5b = Mixed5(192, 32)
        self.Mixed_5c = Mixed5(256, 64)
        self.Mixed_5d = Mixed5(288, 64)
        self.Mixed_6a = Mixed6a()
        self.Mixed_6b = Mixed6(128)
        self.Mixed_6c = Mixed6(160)
        self.Mixed_6d = Mixed6(160)
        self.Mixed_6e = Mixed6(192)
        self.Mixed_7a = Mixed7a()
        self.Mixed_7b = Mixed7(1280, max_pool=False)
        self.Mixed_7c = Mixed7(2048, max_pool=True)  # as in the TF graph of 2015
        self.fc = nn.Linear(2048, 1008)
        self.eval()

    def fold(self):
        """Merges every batch norm into its convolution and stores weights channels last: the same function, faster. For inference only."""
        for module in self.modules():
            if isinstance(module, ConvBN):
                module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
        return self.eval().to(memory_format=torch.channels_last).requires_grad_(False)

    def activations(self, images):
        """uint8 (N, 3, H, W) -> dict of float32: pool (N, 2048); spatial (N, 2023), sFID's 7 channels of TF's mixed_6/conv in the order
        height, width, channel; logits_unbiased (N, 1008), without fc.bias, as the Inception score takes them."""
        x = (
            (resize_tf1(images) - 128) / 128
            if self.resize == "tf1"
            else 2 * resize_pytorch_fid(images) - 1
        )
        x = x.to(self.fc.weight.dtype)  # float64 in the self-test alone
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (N, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))  # (N, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))  # (N, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # (N, 768, 17, 17)
        spatial = (
            self.Mixed_6d.branch1x1(x)[:, :7].permute(0, 2, 3, 1).flatten(1)
        )  # computed twice, under 1% of the work
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))  # (N, 1280, 8, 8)
        pool = self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))  # (N, 2048)
        return {"pool": pool, "spatial": spatial, "logits_unbiased": F.linear(pool, self.fc.weight)}

    def forward(self, images):
        """uint8 (N, 3, H, W) -> pool features, float32 (N, 2048)."""
        return self.activations(images)["pool"]


def load_inception(path, resize):
    """Folded network, and its name (a string for the weights of 2015-12-05, otherwise a dict with file and sha256). path None: download
    once. ValueError for weights that cannot be had or do not fit."""
    name = f"inception-2015-12-05 ({resize} resize)"
    if path is None:
        try:
            with contextlib.redirect_stdout(
                io.StringIO()
            ):  # torch.hub announces the download there, stdout is for the JSON alone
                torch.hub.load_state_dict_from_url(
                    INCEPTION_URL,
                    map_location="cpu",
                    progress=sys.stderr.isatty(),
                    check_hash=True,
                    weights_only=True,
                )
        except Exception as error:
            raise ValueError(
                f"cannot download {INCEPTION_URL} ({error}): fetch it elsewhere and pass --inception FILE"
            ) from error
    file = (
        path or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rsplit("/", 1)[1]
    )  # where it was stored, now or before
    try:
        if zipfile.is_zipfile(file) and sum(
            e.file_size for e in zipfile.ZipFile(file).infolist()
        ) > os.path.getsize(file):
            raise ValueError("an archive that claims to be larger than its file")
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # torch warns of TorchScript files, on two lines, before it refuses them
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"cannot load Inception weights from {file} ({type(error).__name__})"
        ) from error
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if not digest.startswith(INCEPTION_SHA256):
        if path is None:
            raise ValueError(
                f"{file} is not the published file ({digest[:8]}... for {INCEPTION_SHA256}...): delete it"
            )
        name = {"file": str(path), "sha256": digest, "resize": resize}
    network = InceptionV3(resize)
    try:
        network.load_state_dict(weights, strict=True)
    except Exception as error:
        wanted = "the weights of the FID Inception (pt_inception-2015-12-05-6726825d.pth)"
        raise ValueError(f"{path or 'the download'} does not hold {wanted}") from error
    return network.fold(), name


def load_features(path, device):
    """TorchScript network (uint8 (N, 3, H, W) -> (N, D)) and its name {"file", "sha256"}. ValueError for another file."""
    try:
        network = torch.jit.load(path, map_location=device).eval()
    except Exception as error:
        kind = type(error).__name__
        raise ValueError(
            f"--features {path} is not a TorchScript module ({kind}); save one with torch.jit.script(...).save"
        ) from error
    return network, {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


# Sets of images


def check_pixels(what, width, height):
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{what} has {width} x {height} pixels: scale images to at most {MAX_PIXELS}"
        )


def load_image(path, size):
    """RGB uint8 (H, W, 3). ValueError, naming the file, if it cannot be read, has more than 8 bits, or is not of `size` (width, height)."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            mode, found = image.mode, image.size
            rgb = image.convert("RGB") if found == size else None
    except Exception as error:
        raise ValueError(f"cannot read image {path} ({error or type(error).__name__})") from error
    if mode.startswith(("I", "F")):  # Pillow would clip these at 255 instead of scaling them
        raise ValueError(f"image {path} is not 8-bit (Pillow mode {mode})")
    if found != size:
        raise ValueError(
            f"images of one set must have one size: {path} is {found[0]}x{found[1]}, the first one {size[0]}x{size[1]}"
        )
    return np.asarray(rgb)


class ImageFolder:
    """All images below a folder, in the order of their sorted paths."""

    def __init__(self, path):
        tops = [
            path,
            *(p for p in path.iterdir() if p.is_symlink() and p.is_dir()),
        ]  # linked class folders, as in training
        found = (
            Path(folder, name)
            for top in tops
            for folder, _, names in os.walk(top)
            for name in names
        )
        self.paths = sorted(p for p in found if p.suffix.lower() in IMAGE_SUFFIXES)
        self.count = len(self.paths)
        if not self.paths:
            fail(f"no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {path}")
        try:
            with Image.open(self.paths[0], formats=IMAGE_FORMATS) as first:
                self.size = first.size  # (width, height)
            check_pixels("it", *self.size)
        except Exception as error:
            fail(f"cannot read image {self.paths[0]} ({error})")

    def batches(self, start, stop, batch_size):
        """Yields uint8 (B, H, W, 3) of images start .. stop - 1; ValueError for what cannot be used."""
        with ThreadPoolExecutor(8) as pool:
            for first in range(start, stop, batch_size):
                paths = self.paths[first : min(first + batch_size, stop)]
                yield np.stack(list(pool.map(lambda path: load_image(path, self.size), paths)))


class ImageArchive:
    """`arr_0` of an .npz, read as a stream: 50,000 images of 512 x 512 are 39 GB, and every process would hold them all."""

    def __init__(self, path):
        self.path = path
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
            try:
                self.shape = self.read_header(stream)
                check_pixels(f"each image of {path}", self.shape[2], self.shape[1])
            except ValueError as error:
                fail(error)
            held = archive.getinfo("arr_0.npy").file_size - stream.tell()
            if held != math.prod(self.shape):
                fail(
                    f"arr_0 of {path} holds {held} bytes, not the {math.prod(self.shape)} of its shape {self.shape}"
                )
        self.count, self.size = self.shape[0], self.shape[2:0:-1]  # size: (width, height)

    def read_header(self, stream):
        try:
            version = np.lib.format.read_magic(stream)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, fortran_order, dtype = read(stream)
        except Exception as error:
            raise ValueError(f"cannot read arr_0 of {self.path} ({error})") from error
        if dtype.hasobject:
            wanted = "a uint8 array (N, H, W, 3) is needed"
            raise ValueError(
                f"arr_0 of {self.path} is a pickled object array (images of different sizes?); {wanted}"
            )
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1 or fortran_order:
            raise ValueError(
                f"arr_0 of {self.path} is {dtype} {shape}; a C-ordered uint8 array (N, H, W, 3) is needed"
            )
        return shape

    def batches(self, start, stop, batch_size):
        """Yields uint8 (B, H, W, 3) of images start .. stop - 1; ValueError for what cannot be used."""
        image_bytes = int(np.prod(self.shape[1:]))
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as stream:
                self.read_header(stream)
                stream.seek(start * image_bytes, os.SEEK_CUR)
                for first in range(start, stop, batch_size):
                    size = min(batch_size, stop - first)
                    yield np.frombuffer(
                        bytearray(stream.read(size * image_bytes)), dtype=np.uint8
                    ).reshape(size, *self.shape[1:])
        except Exception as error:
            raise ValueError(f"cannot read the images of {self.path} ({error})") from error


class ImageSet:
    """SAMPLES or REFERENCE: `images` (or None), and what the file stores (or None): `stats` {mu (D,), sigma (D, D), and for sFID mu_s,
    sigma_s}, `num` of images behind them, `features` they are of, `size` (width, height) of the images."""

    def __init__(self, path):
        self.path, self.images, self.stats, self.num, self.features, self.size = (
            path,
            None,
            None,
            None,
            None,
            None,
        )
        if not os.path.exists(path):  # unlike Path.exists, False for a name that is too long
            fail(f"{path} does not exist")
        if path.is_dir():
            self.images = ImageFolder(path)
        elif path.suffix != ".npz":
            fail(f"{path} is neither a folder nor an .npz")
        elif not zipfile.is_zipfile(path) or path.open("rb").read(2) != b"PK":
            fail(f"{path} is not an .npz archive: truncated, or of another format")
        else:
            self.open_archive()
        if self.images:
            self.size = self.images.size
            self.num = self.num if self.stats else self.images.count

    def open_archive(self):
        path = self.path
        try:
            with np.load(path, allow_pickle=False) as arrays:
                if "arr_0" in arrays.files:
                    self.images = ImageArchive(path)
                if {"mu", "sigma"} <= set(arrays.files):
                    keys = (
                        ("mu", "sigma", "mu_s", "sigma_s")
                        if {"mu_s", "sigma_s"} <= set(arrays.files)
                        else ("mu", "sigma")
                    )
                    for entry in arrays.zip.infolist():
                        if entry.filename != "arr_0.npy" and entry.file_size > MAX_STATISTICS:
                            raise ValueError(
                                f"{entry.filename} claims {entry.file_size} bytes, statistics have at most {MAX_STATISTICS}"
                            )
                    self.stats = {key: np.asarray(arrays[key], dtype=np.float64) for key in keys}
                    self.num = int(arrays["num"]) if "num" in arrays.files else None
                    self.features = (
                        json.loads(str(arrays["features"])) if "features" in arrays.files else None
                    )
                    self.size = (
                        tuple(arrays["size"].tolist())
                        if "size" in arrays.files and arrays["size"].shape == (2,)
                        else None
                    )
                elif not self.images:
                    fail(
                        f"{path} holds neither images (arr_0) nor statistics (mu, sigma), but {', '.join(arrays.files) or 'nothing'}"
                    )
        except Exception as error:
            fail(f"cannot read {path} ({error})")
        for end in ("", "_s"):
            if self.stats and "mu" + end in self.stats:
                mu, sigma = self.stats["mu" + end], self.stats["sigma" + end]
                if (
                    mu.ndim != 1
                    or sigma.shape != (mu.size, mu.size)
                    or not (np.isfinite(mu).all() and np.isfinite(sigma).all())
                ):
                    shapes = f"shapes {mu.shape} and {sigma.shape}"
                    fail(
                        f"{path} does not hold finite mu{end} (D,) and sigma{end} (D, D), but {shapes}"
                    )


# Statistics and distance


def mean_covariance(total, outer, num):
    """Sum of features (D,) and of their outer products (D, D), float64 -> mean, covariance with N - 1."""
    mu = total / num
    return mu, (outer - num * mu[:, None] * mu[None, :]) / (num - 1)


def batch_activations(network, batch, device):
    """uint8 (B, H, W, 3) -> dict of activations, "pool" (B, D) among them. ValueError if the network cannot do that."""
    x = torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous().to(device)
    try:
        with torch.inference_mode():
            out = (
                network.activations(x) if isinstance(network, InceptionV3) else {"pool": network(x)}
            )
    except RuntimeError as error:
        raise ValueError(
            f"the network failed on images of shape {tuple(x.shape)}: {str(error).strip().splitlines()[-1]}"
        ) from error
    f = out["pool"]
    if not isinstance(f, torch.Tensor) or f.ndim != 2 or len(f) != len(x):
        got = tuple(f.shape) if isinstance(f, torch.Tensor) else type(f)
        raise ValueError(f"features must be (N, D), got {got} for {len(x)} images")
    return out


def extract(images, num, network, device, batch_size, keep=()):
    """Runs the network over the first `num` images. Returns statistics {mu, sigma, and of Inception mu_s, sigma_s}, and {name: (num, D)} of
    the activations named in `keep` ("pool", "logits_unbiased"), float32 on the CPU in the order of the images.

    All processes return the same. Each takes a contiguous part of the batches, which are the same for any number of processes (unless there
    are fewer batches than processes): convolutions round differently in batches of another size.
    """
    rank, world = processes()
    batch_size = min(batch_size, num // world)
    count = -(-num // batch_size)
    first, stop = (
        count * rank // world * batch_size,
        min(count * (rank + 1) // world * batch_size, num),
    )
    sums, kept, error = {}, {}, None
    try:
        with tqdm(
            total=stop - first, unit="img", leave=False, disable=None if rank == 0 else True
        ) as bar:  # None: only on a terminal
            for batch in images.batches(first, stop, batch_size):
                out = batch_activations(network, batch, device)
                for name in out.keys() - {"logits_unbiased"}:
                    f, (total, outer) = out[name].double(), sums.get(name, (0, 0))
                    sums[name] = total + f.sum(0), outer + f.T @ f
                for name in keep:
                    if name not in kept:
                        kept[name] = torch.zeros(num, out[name].shape[1])
                    kept[name][first : first + len(batch)] = out[name]
                first += len(batch)
                bar.update(len(batch))
    except ValueError as e:
        error = str(e)
    fail_together(error)
    stats = {}
    for name, end in (("pool", ""), ("spatial", "_s")):
        if name in sums:
            total, outer = (all_sum(x.cpu()) for x in sums[name])
            stats["mu" + end], stats["sigma" + end] = (
                x.numpy() for x in mean_covariance(total, outer, num)
            )
    if not all(np.isfinite(x).all() for x in stats.values()):
        fail("the features contain NaN or infinity")
    return stats, {
        name: all_sum(kept[name]) for name in keep
    }  # a row is zero in all processes but the one that had the image


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), float64; mu (D,), sigma (D, D). ValueError if the shapes differ.

    The last trace is the sum of the roots of the eigenvalues of S1 S2, which are real: those of the symmetric L^T S1 L with S2 = L L^T, by
    LAPACK. If one is singular (fewer images than dimensions), roots of rounding errors would count: then it is the sum of the singular
    values of R1^T R2, S = R R^T, whose columns of eigenvalue zero are left out. Can come out below 0 by rounding, at equal sets.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, dtype=np.float64) for x in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise ValueError(f"statistics of different dimensions: {mu1.shape} and {mu2.shape}")
    try:
        np.linalg.cholesky(sigma1)
        values = scipy.linalg.eigh(
            sigma1, sigma2, type=2, eigvals_only=True, driver="gv"
        )  # S1 S2 v = w v
        trace_root = np.sqrt(values.clip(min=0)).sum()
    except np.linalg.LinAlgError:
        roots = []
        for values, vectors in (np.linalg.eigh(sigma1), np.linalg.eigh(sigma2)):
            positive = values > 10 * np.finfo(float).eps * values.max(initial=0)
            roots.append(vectors[:, positive] * np.sqrt(values[positive]))
        trace_root = (
            scipy.linalg.svdvals(roots[0].T @ roots[1]).sum()
            if roots[0].size and roots[1].size
            else 0.0
        )
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_root)


def inception_score(logits, chunk=5000, splits=None):
    """Mean and standard deviation over chunks of exp(mean KL(p(y|x) || p(y))), float64; logits (N, classes).

    Chunks are consecutive, `chunk` images each; a short last one counts like the others (ADM, which reports the mean). With `splits`,
    chunk i starts at i * N // splits (torch-fidelity, which shuffles first). Scores by different rules are not comparable.
    """
    n = len(logits)
    bounds = [i * n // splits for i in range(splits + 1)] if splits else [*range(0, n, chunk), n]
    scores = []
    for start, stop in pairwise(bounds):
        log_p = logits[start:stop].double().log_softmax(1)
        log_mean = log_p.logsumexp(0) - np.log(stop - start)
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def squared_distances(a, b):
    """(N, D), (M, D) -> (N, M), as |a|^2 + |b|^2 - 2 a.b: centre the features first, or the rounding of large norms shows."""
    return (a.square().sum(1)[:, None] + b.square().sum(1)).addmm_(a, b.T, alpha=-2).clamp_(min=0)


def row_blocks(n, block):
    """This process's share of the rows 0 .. n - 1, in blocks that are the same for any number of processes."""
    rank, world = processes()
    return [slice(start, min(start + block, n)) for start in range(rank * block, n, world * block)]


def neighbour_radii(features, k=NEIGHBOURS, block=1024):
    """Squared distance of every point of (N, D) to its k-th nearest neighbour, itself not counted: (N,)."""
    radii = torch.zeros(len(features))
    for rows in row_blocks(len(features), block):
        distances = squared_distances(features[rows], features)
        distances[:, rows].diagonal().fill_(torch.inf)
        radii[rows] = distances.topk(k, dim=1, largest=False).values[:, -1].cpu()
    return all_sum(radii)


def manifold_membership(samples, reference, k=NEIGHBOURS, block=1024):
    """Which samples (N, D) lie inside the manifold of the reference (M, D), and which reference points inside that of the samples: two bool
    (N,), (M,) on the CPU. A manifold is the union of closed balls around its points, as far as their k-th neighbours (1904.06991, eq. 1).

    `block` rows of distances at a time (50,000 x 50,000 would be 10 GB), the blocks divided among the processes. In float32 about the
    reference's mean: squared norms are then of the size of the squared distances, which so are right to about 1e-6.
    """
    centre = reference.mean(0, dtype=torch.float64).to(reference.dtype)
    samples, reference = samples - centre, reference - centre
    sample_radii, reference_radii = (
        neighbour_radii(x, k, block).to(x.device) for x in (samples, reference)
    )
    samples_inside, reference_inside = (
        torch.zeros(len(samples), dtype=torch.int),
        torch.zeros(len(reference), dtype=torch.int),
    )
    for rows in row_blocks(len(samples), block):
        distances = squared_distances(samples[rows], reference)
        samples_inside[rows] = (distances <= reference_radii).any(1).cpu().int()
        reference_inside += (distances <= sample_radii[rows, None]).any(0).cpu()
    return all_sum(samples_inside) > 0, all_sum(reference_inside) > 0


def precision_recall(samples, reference, k=NEIGHBOURS, block=1024):
    """Share of samples (N, D) inside the reference's manifold, and of reference points (M, D) inside the samples'."""
    return tuple(
        inside.double().mean().item()
        for inside in manifold_membership(samples, reference, k, block)
    )


def same_space(a, b):
    """Whether two feature names mean the same network; the path of a file does not count, its sha256 does."""
    a, b = (
        {key: x[key] for key in x if key != "file"} if isinstance(x, dict) else x for x in (a, b)
    )
    return a == b


def self_test(path, device):
    """Checks a file of Inception weights in seconds; a dict for the JSON, or ends the program with what is wrong.

    Proves that the file has the published digest (its first 8 digits), the names and shapes of the network and finite values, and that the
    network as used here (float32, batch norms folded, this device) computes on two fixed images what the plain float64 one does, by either
    resize. Does not prove that resize and layers are those of the TF graph: that needs features which the original computed from the file.
    """
    images = torch.arange(2 * 3 * 64 * 64).reshape(2, 3, 64, 64)
    images = torch.stack([images[0] // 64 % 64 * 4, images[1] * 7919 % 251]).to(
        torch.uint8
    )  # a ramp, a fixed texture
    try:
        used, name = load_inception(path, "tf1")
    except ValueError as error:
        fail(error)
    weights = torch.load(path, map_location="cpu", weights_only=True)
    for key, value in weights.items():
        if not value.isfinite().all() or (key.endswith("running_var") and (value < 0).any()):
            fail(f"{path}: {key} has NaN, infinity or a negative variance")
    if not isinstance(name, str):
        fail(
            f"{path} fits the network, but its sha256 {name['sha256'][:8]}... is not the published {INCEPTION_SHA256}...: other weights"
        )
    plain, used = InceptionV3(), used.to(device)
    plain.load_state_dict(weights)
    plain.double()
    pool, worst = [], 0.0
    for resize in ("tf1", "pytorch-fid"):
        plain.resize = used.resize = resize
        with torch.inference_mode():
            expected, out = plain.activations(images), used.activations(images.to(device))
        for key, value in expected.items():
            error = ((out[key].cpu() - value).abs().max() / value.abs().max()).item()
            worst = max(worst, error)
            if not error < 1e-3:
                fail(
                    f"{path}: float32 {key} ({resize} resize) differs from float64 by {error:.1e} of its largest value, more than 1e-3"
                )
        pool.append(expected["pool"])
    moved_by_image, moved_by_resize = (
        (pool[0][0] - pool[0][1]).norm().item(),
        (pool[0] - pool[1]).norm(dim=1).max().item(),
    )
    if not min(moved_by_image, moved_by_resize) > 0:
        fail(f"{path}: the features are the same for two images or for two resizes")
    moves = {"moved_by_image": moved_by_image, "moved_by_resize": moved_by_resize}
    return {
        "self_test": str(path),
        "passed": True,
        "tensors": len(weights),
        "float32_error": worst,
        **moves,
    }


# Command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(message)


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def parse_args(argv):
    parser = Parser(
        prog="fid.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("samples", type=Path, nargs="?")
    parser.add_argument("reference", type=Path, nargs="?")
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        help="default all; with --features fid and pr, in the space of these",
    )
    parser.add_argument(
        "--save-stats",
        type=Path,
        metavar="OUT.npz",
        help="write the statistics of SAMPLES (not enough for pr)",
    )
    # torchrun (seen on Python 3.11) stops at --num, even behind the script's name: ambiguous with its own --numa-binding, --numa_binding.
    parser.add_argument(
        "--num",
        "--num-samples",
        type=positive,
        metavar="N",
        help="use the first N images of SAMPLES (default all)",
    )
    parser.add_argument(
        "--resize",
        choices=["tf1", "pytorch-fid"],
        help="how Inception's input is resized (default tf1)",
    )
    parser.add_argument(
        "--inception",
        type=Path,
        metavar="FILE",
        help="pt_inception-2015-12-05-6726825d.pth; default: download once",
    )
    parser.add_argument(
        "--features", type=Path, metavar="FILE", help="TorchScript module used instead of Inception"
    )
    parser.add_argument(
        "--self-test",
        type=Path,
        metavar="FILE",
        help="check a file of Inception weights, nothing else",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=64, help="images per process and step (default 64)"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default cuda if there is one)")
    args = parser.parse_args(argv)
    if args.self_test is None and args.samples is None:
        fail("give SAMPLES REFERENCE, or --save-stats OUT.npz SAMPLES, or --self-test FILE")
    if args.self_test is None and (args.reference is None) == (args.save_stats is None):
        fail("give either SAMPLES REFERENCE, or --save-stats OUT.npz SAMPLES")
    if args.self_test and (
        args.samples or args.save_stats or args.features or args.inception or args.resize
    ):
        fail("--self-test FILE stands alone")
    if args.features and (args.inception or args.resize):
        fail("--features replaces Inception: leave out --inception and --resize")
    if args.features and {"sfid", "is"} & set(args.metrics or ()):
        fail("--metrics sfid and is need Inception: leave out --features")
    if args.save_stats and args.metrics:
        fail("--save-stats computes no metrics: leave out --metrics")
    if args.save_stats and (
        args.save_stats.suffix != ".npz" or not args.save_stats.absolute().parent.is_dir()
    ):
        fail(f"--save-stats {args.save_stats}: the name must end in .npz and its folder must exist")
    if args.save_stats and os.path.lexists(args.save_stats):
        fail(f"--save-stats {args.save_stats} is there already: choose another name, or delete it")
    for path in (args.features, args.inception, args.self_test):
        if path and not os.path.isfile(path):
            fail(f"{path} is not a file")
    return args


def find_device(name):
    """The device of this process."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        fail(f"--device {name}: not a device")
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
        needed = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.index is None else index + 1
        if needed > torch.cuda.device_count():
            fail(
                f"--device {device}: GPU {needed - 1} asked for, {torch.cuda.device_count()} there"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False  # on by default for convolutions
    elif device.type != "cpu":
        fail(f"--device {name}: only cpu and cuda have the float64 sums this needs")
    return device


def load_network(args, device):
    """Network on the device and name of its features; one process of each machine downloads, the others find the file."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    error = None
    for turn in (True, False):
        if first == turn:
            try:
                if args.features:
                    network, features = load_features(args.features, device)
                else:
                    network, features = load_inception(args.inception, args.resize or "tf1")
            except ValueError as e:
                error = str(e)
        fail_together(error)
    return network.to(device), features


def missing(metric, sets, counts):
    """Why a metric cannot be computed from these sets, or None; `counts` are the images to be used of each."""
    if metric == "sfid":
        for s in sets:
            if s.stats and "mu_s" not in s.stats:
                return f"{s.path} stores no mu_s, sigma_s"
    if metric == "is" and not sets[0].images:
        return f"{sets[0].path} holds only statistics, images are needed"
    if metric == "pr":
        for s, count in zip(sets, counts):
            if not s.images:
                return f"{s.path} holds only statistics, images are needed"
            if count <= NEIGHBOURS:
                return f"{count} images of {s.path} have no {NEIGHBOURS} neighbours each"
    return None


def compute(todo, stats, kept, device):
    """Results by name; `stats` and `kept` (see extract) of SAMPLES and REFERENCE. All processes must call it, the first has all results."""
    results = {}
    if "pr" in todo:
        results["precision"], results["recall"] = precision_recall(
            *(k["pool"].to(device) for k in kept)
        )
    if processes()[0] == 0:
        if "is" in todo:
            results["inception_score"], _ = inception_score(kept[0]["logits_unbiased"])
        for metric, end in (("fid", ""), ("sfid", "_s")):
            if metric in todo:
                results[metric] = frechet_distance(
                    *(s[key + end] for s in stats for key in ("mu", "sigma"))
                )
    return results


def main(argv=None):
    args = parse_args(argv)
    warnings.simplefilter(
        "ignore", Image.DecompressionBombWarning
    )  # check_pixels and load_image refuse what it warns of
    device = find_device(args.device)
    versions = {"device": device.type, "torch": torch.__version__}
    if args.self_test:
        print(json.dumps(self_test(args.self_test, device) | versions))
        return
    sets = [ImageSet(path) for path in (args.samples, args.reference) if path]
    samples, reference = sets[0], sets[-1]
    if (args.num or args.save_stats) and samples.stats:
        fail(f"{args.samples} holds statistics; --num and --save-stats need images")
    if args.num and args.num > samples.num:
        fail(f"--num {args.num}, but {args.samples} holds {samples.num} images")
    samples.num = args.num or samples.num
    counts = [s.images and s.images.count for s in sets]
    counts[0] = args.num or counts[0]
    metrics = (
        []
        if args.save_stats
        else args.metrics or (["fid", "pr"] if args.features else list(METRICS))
    )
    reasons = {metric: missing(metric, sets, counts) for metric in metrics}
    todo = [metric for metric in metrics if reasons[metric] is None]
    keep = [
        ["pool"] * ("pr" in todo) + ["logits_unbiased"] * ("is" in todo),
        ["pool"] * ("pr" in todo),
    ]
    from_images = [bool(s.images and (names or not s.stats)) for s, names in zip(sets, keep)]
    if todo == ["is"]:
        from_images[1] = False  # nothing of the reference is asked for
    world = int(os.environ.get("WORLD_SIZE", "1"))
    for s, count, run in zip(sets, counts, from_images):
        if run and count < max(2, world):
            fail(f"{count} of {s.path} to be used: at least {max(2, world)} images are needed")
    if world > 1:
        dist.init_process_group(
            "gloo", timeout=timedelta(days=1)
        )  # all that is exchanged lies on the CPU
    if any(from_images) or args.features or args.inception:
        network, features = load_network(args, device)
    else:
        network, features = None, next((s.features for s in sets if s.features is not None), None)
    for s in sets:
        if s.stats and s.features is not None and not same_space(s.features, features):
            fail(
                f"{s.path} holds statistics of other features: {json.dumps(s.features)}, not {json.dumps(features)}"
            )

    stats, kept = [], []
    for s, count, names, run in zip(sets, counts, keep, from_images):
        computed, activations = (
            extract(s.images, count, network, device, args.batch_size, names) if run else ({}, {})
        )
        stats.append(s.stats or computed)
        kept.append(activations)
        for key in {"mu", "mu_s"} & stats[0].keys() & stats[-1].keys():
            a, b = stats[0][key].size, stats[-1][key].size
            if a != b:
                fail(
                    f"feature dimension mismatch: {args.samples} has {a}, {args.reference} has {b}"
                )
    results = dict.fromkeys(name for metric in metrics for name in METRICS[metric]) | compute(
        todo, stats, kept, device
    )
    rank, _ = processes()
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    if args.save_stats:
        temporary = args.save_stats.with_name(f".{args.save_stats.name}.tmp")
        try:
            with open(temporary, "wb") as file:
                np.savez(
                    file,
                    **stats[0],
                    num=samples.num,
                    size=samples.size,
                    features=json.dumps(features),
                )
            os.replace(temporary, args.save_stats)
        except OSError as error:
            fail(f"cannot write {args.save_stats} ({error})")
        protocol = {
            "statistics": str(args.save_stats),
            "samples": str(args.samples),
            "num_samples": samples.num,
        }
    else:
        for s in sets:
            if s.stats and s.features is None:
                warn(
                    f"{s.path} does not say which features its statistics are of; taken to be the same"
                )
        for metric in metrics:
            if reasons[metric]:
                warn(f"no {' and '.join(METRICS[metric])}: {reasons[metric]}")
        if samples.size and reference.size and samples.size != reference.size:
            sizes = ["{}x{}".format(*s.size) for s in sets]
            warn(
                f"images of {args.samples} are {sizes[0]}, those of {args.reference} {sizes[1]}: what is measured includes the resolution"
            )
        if samples.num is not None and samples.num < 10_000:
            warn(
                f"{samples.num} samples: the distance is biased upwards below about 10,000 (50,000 is usual)"
            )
        if not str(features).startswith("inception-2015-12-05 ("):
            results = {OTHER_SPACE[name]: value for name, value in results.items()}
        protocol = {"samples": str(args.samples), "reference": str(args.reference)}
        protocol |= {"num_samples": samples.num, "num_reference": reference.num}
        if "is" in todo:
            protocol |= {"score_chunk": 5000}
        if "pr" in todo:
            protocol |= {"neighbours": NEIGHBOURS, "num_reference_manifold": counts[1]}
    print(
        json.dumps(
            results
            | protocol
            | {"features": features, "batch_size": args.batch_size, "processes": world}
            | versions
        )
    )


if __name__ == "__main__":
    main()
