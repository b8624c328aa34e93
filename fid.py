"""Frechet Inception distance between two sets of images (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz
    python fid.py --save-stats reference.npz DATA/train
    torchrun --standalone --nproc_per_node=8 fid.py samples/ reference.npz --num-samples 50000

SAMPLES and REFERENCE are each a folder of images (searched recursively), an .npz of images (`arr_0`, uint8, N x H x W x 3, as the ADM
evaluator reads), or an .npz of statistics (`mu`, `sigma`). If an .npz has both, the statistics are used. One JSON object goes to stdout.

Protocol, and where each choice comes from:
1. Images are uint8 RGB, all of one size within a set; the order is the array's, or that of the sorted paths. --num limits SAMPLES only.
2. Resize to 299 x 299 bilinearly on TensorFlow 1's grid, source index = output index * in / out, on 0..255; then (x - 128) / 128. This is
   what the TF graph of the ADM evaluator (guided-diffusion, evaluations/evaluator.py) and torch-fidelity do. `--resize pytorch-fid` is
   pytorch-fid's: images / 255, half-pixel bilinear without antialiasing, then 2x - 1. The two numbers are not comparable.
3. Features: the 2048 pool activations of the Inception of 2015-12-05 (TF, 1008 classes), in the weights ported by pytorch-fid, float32
   without TF32, eval mode.
4. Mean and covariance (N - 1) from float64 sums over all processes; the distance in float64 by symmetric eigenvalues (no sqrtm).
5. The result is called "fid" for exactly these weights. With `--features FILE` (TorchScript, uint8 N x 3 x H x W -> N x D) or with other
   Inception weights it is "frechet_distance", and the JSON names the file and its sha256.

Not computed here: sFID, Inception score, precision and recall (the network returns the activations that the first two need).
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"  # first digits, as in the file name
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def fail(message):
    """Ends the program with one line on stderr and exit code 2."""
    tqdm.write(f"fid.py: error: {' '.join(str(message).split())}", file=sys.stderr)  # tqdm.write: a progress bar may be drawn
    sys.exit(2)


def warn(message):
    tqdm.write(f"fid.py: warning: {message}", file=sys.stderr)


# The network


class ConvBN(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size=1, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


def avg_pool(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)  # TF averages over the pixels inside the image only


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
        conv7x7x3 = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), conv7x7x3, F.max_pool2d(x, 3, 2)], 1)


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
    return torch.lerp(x[..., left], x[..., right], z - left)           # (N, C, size, size)


def resize_pytorch_fid(images, size=299):
    """uint8 (N, C, H, W) -> float32 (N, C, size, size) in [0, 1]: half-pixel centres, no antialiasing."""
    return F.interpolate(images.float() / 255, size=(size, size), mode="bilinear", align_corners=False)


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

    def activations(self, images):
        """uint8 (N, 3, H, W) -> dict of float32: pool (N, 2048); spatial (N, 2023), sFID's 7 channels of TF's mixed_6/conv in the order
        height, width, channel; logits_unbiased (N, 1008), without fc.bias, as the Inception score takes them."""
        x = (resize_tf1(images) - 128) / 128 if self.resize == "tf1" else 2 * resize_pytorch_fid(images) - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (N, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))  # (N, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))  # (N, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # (N, 768, 17, 17)
        spatial = self.Mixed_6d.branch1x1(x)[:, :7].permute(0, 2, 3, 1).flatten(1)  # computed twice, under 1% of the work
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))  # (N, 1280, 8, 8)
        pool = self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))  # (N, 2048)
        return {"pool": pool, "spatial": spatial, "logits_unbiased": F.linear(pool, self.fc.weight)}

    def forward(self, images):
        """uint8 (N, 3, H, W) -> pool features, float32 (N, 2048)."""
        return self.activations(images)["pool"]


def load_inception(path, resize):
    """Network, and its name (a string for the weights of 2015-12-05, otherwise a dict with file and sha256). path None: download once."""
    name = f"inception-2015-12-05 ({resize} resize)"
    if path is None:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # torch.hub announces the download there, stdout is for the JSON alone
                weights = torch.hub.load_state_dict_from_url(
                    INCEPTION_URL, map_location="cpu", progress=sys.stderr.isatty(), check_hash=True, weights_only=True
                )
        except Exception as error:
            fail(f"cannot download {INCEPTION_URL} ({error}): fetch it elsewhere and pass --inception FILE")
    else:
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            fail(f"cannot load Inception weights from {path} ({type(error).__name__})")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if not digest.startswith(INCEPTION_SHA256):
            name = {"file": str(path), "sha256": digest, "resize": resize}
    network = InceptionV3(resize)
    try:
        network.load_state_dict(weights, strict=True)
    except Exception:
        fail(f"{path or 'the download'} does not hold the weights of the FID Inception (pt_inception-2015-12-05-6726825d.pth)")
    return network, name


def load_features(path, device):
    """TorchScript network (uint8 (N, 3, H, W) -> (N, D)) and its name {"file", "sha256"}."""
    try:
        network = torch.jit.load(path, map_location=device).eval()
    except Exception as error:
        fail(f"--features {path} is not a TorchScript module ({type(error).__name__}); save one with torch.jit.script(...).save")
    return network, {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


# Sets of images


def load_image(path, size):
    """RGB uint8 (H, W, 3). ValueError, naming the file, if it cannot be read, has more than 8 bits, or is not of `size` (width, height)."""
    try:
        with Image.open(path) as image:
            mode = image.mode
            rgb = image.convert("RGB")
    except Exception as error:
        raise ValueError(f"cannot read image {path} ({error or type(error).__name__})") from error
    if mode.startswith(("I", "F")):  # Pillow would clip these at 255 instead of scaling them
        raise ValueError(f"image {path} is not 8-bit (Pillow mode {mode})")
    if rgb.size != size:
        raise ValueError(f"images of one set must have one size: {path} is {rgb.width}x{rgb.height}, the first one {size[0]}x{size[1]}")
    return np.asarray(rgb)


class ImageFolder:
    """All images below a folder, in the order of their sorted paths."""

    def __init__(self, path):
        self.paths = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        self.count = len(self.paths)
        if not self.paths:
            fail(f"no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {path}")
        try:
            with Image.open(self.paths[0]) as first:
                self.size = first.size
        except Exception as error:
            fail(f"cannot read image {self.paths[0]} ({error})")

    def batches(self, start, stop, batch_size):
        """Yields uint8 (B, H, W, 3) of images start .. stop - 1."""
        with ThreadPoolExecutor(8) as pool:
            for first in range(start, stop, batch_size):
                paths = self.paths[first : min(first + batch_size, stop)]
                try:
                    images = list(pool.map(lambda path: load_image(path, self.size), paths))
                except ValueError as error:
                    fail(error)
                yield np.stack(images)


class ImageArchive:
    """`arr_0` of an .npz, read as a stream: 50,000 images of 512 x 512 are 39 GB, and every process would hold them all."""

    def __init__(self, path):
        self.path = path
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
            self.shape = self.read_header(stream)
        self.count = self.shape[0]

    def read_header(self, stream):
        try:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = read(stream)
        except Exception as error:
            fail(f"cannot read arr_0 of {self.path} ({error})")
        if dtype.hasobject:
            fail(f"arr_0 of {self.path} is a pickled object array (images of different sizes?); a uint8 array (N, H, W, 3) is needed")
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran_order:
            fail(f"arr_0 of {self.path} is {dtype} {shape}; a C-ordered uint8 array (N, H, W, 3) is needed")
        return shape

    def batches(self, start, stop, batch_size):
        """Yields uint8 (B, H, W, 3) of images start .. stop - 1."""
        image_bytes = int(np.prod(self.shape[1:]))
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as stream:
                self.read_header(stream)
                stream.seek(start * image_bytes, os.SEEK_CUR)
                for first in range(start, stop, batch_size):
                    size = min(batch_size, stop - first)
                    yield np.frombuffer(bytearray(stream.read(size * image_bytes)), dtype=np.uint8).reshape(size, *self.shape[1:])
        except Exception as error:
            fail(f"cannot read the images of {self.path} ({error})")


def open_set(path):
    """ImageFolder, ImageArchive, or statistics as a dict: mu (D,), sigma (D, D), num and features (None where the file does not say)."""
    if not path.exists():
        fail(f"{path} does not exist")
    if path.is_dir():
        return ImageFolder(path)
    if path.suffix != ".npz":
        fail(f"{path} is neither a folder nor an .npz")
    if not zipfile.is_zipfile(path):
        fail(f"{path} is not an .npz archive: truncated, or of another format")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if not {"mu", "sigma"} <= set(arrays.files):
                if "arr_0" not in arrays.files:
                    fail(f"{path} holds neither images (arr_0) nor statistics (mu, sigma), but {', '.join(arrays.files) or 'nothing'}")
                return ImageArchive(path)
            mu, sigma = np.asarray(arrays["mu"], dtype=np.float64), np.asarray(arrays["sigma"], dtype=np.float64)
            num = int(arrays["num"]) if "num" in arrays.files else None
            features = json.loads(str(arrays["features"])) if "features" in arrays.files else None
    except Exception as error:
        fail(f"cannot read {path} ({error})")
    if mu.ndim != 1 or sigma.shape != (mu.size, mu.size) or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        fail(f"{path} does not hold finite mu (D,) and sigma (D, D), but shapes {mu.shape} and {sigma.shape}")
    return {"mu": mu, "sigma": sigma, "num": num, "features": features}


# Statistics and distance


def mean_covariance(total, outer, num):
    """Sum of features (D,) and of their outer products (D, D), float64 -> mean, covariance with N - 1."""
    mu = total / num
    return mu, (outer - num * mu[:, None] * mu[None, :]) / (num - 1)


def image_statistics(images, num, network, features, device, batch_size, rank=0, world=1):
    """Statistics (the dict of open_set) of the first `num` images; with several processes rank r reads the r-th contiguous part."""
    total, outer = 0, 0
    start, stop = num * rank // world, num * (rank + 1) // world
    with tqdm(total=stop - start, unit="img", leave=False, disable=None if rank == 0 else True) as bar:  # None: only on a terminal
        for batch in images.batches(start, stop, batch_size):
            x = torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous().to(device)
            try:
                with torch.inference_mode():
                    f = network(x)
            except RuntimeError as error:
                fail(f"the network failed on images of shape {tuple(x.shape)}: {str(error).strip().splitlines()[-1]}")
            if not isinstance(f, torch.Tensor) or f.ndim != 2 or len(f) != len(x):
                fail(f"features must be (N, D), got {tuple(f.shape) if isinstance(f, torch.Tensor) else type(f)} for {len(x)} images")
            f = f.double()
            total, outer = total + f.sum(0), outer + f.T @ f
            bar.update(len(x))
    if world > 1:
        dist.all_reduce(total)
        dist.all_reduce(outer)
    mu, sigma = (x.cpu().numpy() for x in mean_covariance(total, outer, num))
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        fail("the features contain NaN or infinity")
    return {"mu": mu, "sigma": sigma, "num": num, "features": features}


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), float64; mu (D,), sigma (D, D). ValueError if the shapes differ.

    S1 S2 has the eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2), so the last trace is the sum of their roots; singular covariances
    (fewer images than dimensions) need no special case. Can come out below 0 by rounding (about 1e-6).
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, dtype=np.float64) for x in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise ValueError(f"statistics of different dimensions: {mu1.shape} and {mu2.shape}")
    values, vectors = np.linalg.eigh(sigma1)
    root1 = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    trace_root = np.sqrt(np.linalg.eigvalsh(root1 @ sigma2 @ root1).clip(min=0)).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_root)


def same_space(a, b):
    """Whether two feature names mean the same network; the path of a file does not count, its sha256 does."""
    a, b = ({key: x[key] for key in x if key != "file"} if isinstance(x, dict) else x for x in (a, b))
    return a == b


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
    parser = Parser(prog="fid.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("samples", type=Path)
    parser.add_argument("reference", type=Path, nargs="?")
    parser.add_argument("--save-stats", type=Path, metavar="OUT.npz", help="write the statistics of SAMPLES instead of a distance")
    # torchrun (seen on Python 3.11) stops at --num, even behind the script's name: ambiguous with its own --numa-binding, --numa_binding.
    parser.add_argument("--num", "--num-samples", type=positive, metavar="N", help="use the first N images of SAMPLES (default all)")
    parser.add_argument("--resize", choices=["tf1", "pytorch-fid"], help="how Inception's input is resized (default tf1)")
    parser.add_argument("--inception", type=Path, metavar="FILE", help="pt_inception-2015-12-05-6726825d.pth; default: download once")
    parser.add_argument("--features", type=Path, metavar="FILE", help="TorchScript module used instead of Inception")
    parser.add_argument("--batch-size", type=positive, default=64, help="images per process and step (default 64)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default cuda if there is one)")
    args = parser.parse_args(argv)
    if (args.reference is None) == (args.save_stats is None):
        fail("give either SAMPLES REFERENCE, or --save-stats OUT.npz SAMPLES")
    if args.features and (args.inception or args.resize):
        fail("--features replaces Inception: leave out --inception and --resize")
    if args.save_stats and (args.save_stats.suffix != ".npz" or not args.save_stats.absolute().parent.is_dir()):
        fail(f"--save-stats {args.save_stats}: the name must end in .npz and its folder must exist")
    for path in (args.features, args.inception):
        if path and not path.is_file():
            fail(f"{path} is not a file")
    return args


def start_processes(name):
    """Rank, number of processes and device; joins the process group when torchrun started several."""
    rank, local_rank, world = (int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        fail(f"--device {name}: not a device")
    if device.type == "cuda":
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            fail(f"--device {device}: GPU {index} asked for, {torch.cuda.device_count()} there")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False  # on by default for convolutions
    elif device.type != "cpu":
        fail(f"--device {name}: only cpu and cuda have the float64 sums this needs")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None)
    return rank, local_rank, world, device


def main(argv=None):
    args = parse_args(argv)
    paths = [args.samples] if args.reference is None else [args.samples, args.reference]
    sets = [open_set(path) for path in paths]
    counts = [None if isinstance(s, dict) else s.count for s in sets]
    if args.num or args.save_stats:
        if counts[0] is None:
            fail(f"{args.samples} holds statistics; --num and --save-stats need images")
        if args.num and args.num > counts[0]:
            fail(f"--num {args.num}, but {args.samples} holds {counts[0]} images")
        counts[0] = args.num or counts[0]
    rank, local_rank, world, device = start_processes(args.device)
    for path, count in zip(paths, counts):
        if count is not None and count < max(2, world):
            fail(f"{count} of {path} to be used: at least {max(2, world)} images are needed")

    if any(count is not None for count in counts) or args.features or args.inception:
        if world > 1 and local_rank > 0:
            dist.barrier()  # one process of each machine downloads, the others find the file
        network, features = load_features(args.features, device) if args.features else load_inception(args.inception, args.resize or "tf1")
        if world > 1 and local_rank == 0:
            dist.barrier()
        network = network.to(device)
    else:
        network, features = None, next((s["features"] for s in sets if s["features"] is not None), None)
    unnamed = []
    for path, s in zip(paths, sets):
        if isinstance(s, dict) and s["features"] is None:
            unnamed.append(path)
        elif isinstance(s, dict) and not same_space(s["features"], features):
            fail(f"{path} holds statistics of other features: {json.dumps(s['features'])}, not {json.dumps(features)}")

    stats = [
        s if isinstance(s, dict) else image_statistics(s, count, network, features, device, args.batch_size, rank, world)
        for s, count in zip(sets, counts)
    ]
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    dimensions = [s["mu"].size for s in stats]
    if len(set(dimensions)) > 1:
        fail(f"feature dimension mismatch: {args.samples} has {dimensions[0]}, {args.reference} has {dimensions[1]}")
    if args.save_stats:
        try:
            with open(args.save_stats, "wb") as file:
                np.savez(file, **{**stats[0], "features": json.dumps(features)})
        except OSError as error:
            fail(f"cannot write {args.save_stats} ({error})")
        result = {"statistics": str(args.save_stats), "samples": str(args.samples), "num_samples": stats[0]["num"]}
    else:
        distance = frechet_distance(*(s[key] for s in stats for key in ("mu", "sigma")))
        for path in unnamed:
            warn(f"{path} does not say which features its statistics are of; taken to be the same")
        if stats[0]["num"] is not None and stats[0]["num"] < 10_000:
            warn(f"{stats[0]['num']} samples: the distance is biased upwards below about 10,000 (50,000 is usual)")
        result = {"fid" if isinstance(features, str) else "frechet_distance": distance}
        result |= {"samples": str(args.samples), "reference": str(args.reference)}
        result |= {"num_samples": stats[0]["num"], "num_reference": stats[1]["num"]}
    print(json.dumps(result | {"features": features, "device": device.type, "processes": world, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
