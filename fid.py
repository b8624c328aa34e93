"""FID, sFID, Inception score, precision and recall of images, as ADM's evaluator defines them.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz
    python fid.py --save-stats reference.npz DATA/train    # statistics to compare with, once
    torchrun --nproc_per_node=8 fid.py samples/ reference.npz --num-samples 50000

SAMPLES and REFERENCE are each a folder of images (searched recursively, without hidden files), a
training script's decoded images (DATA.cache/HASH), or an .npz of images (`arr_0`, uint8
N x H x W x 3), of statistics (`mu`, `sigma`; for sFID `mu_s`, `sigma_s`), or of both (ADM's
reference files: FID and sFID then take the statistics). Prints one JSON object; what cannot be
computed is null, and a line on stderr says why. --features FILE is a TorchScript network, uint8
N x 3 x H x W -> N x D; its code is run, so use only what you trust.

ADM is openai/guided-diffusion at 1b61a43, evaluations/evaluator.py. Implementation details:
1. Images of a set have one size. Files are sorted by path, alpha channels are dropped.
2. Resizing to 299 x 299 as in ADM's TensorFlow 1 graph: bilinear, source index = output index *
   in / out, then (x - 128) / 128. --resize pytorch-fid: half-pixel centres. The numbers differ.
3. Network: the Inception of 2015-12-05 in the weights of pytorch-fid, float32 without TF32.
4. FID (1706.08500, eq. 6): Frechet distance of the 2048 pooled activations. sFID (2103.03841): of
   the first 7 channels of TF's mixed_6/conv (17 x 17 x 7). Float64 sums, covariance with N - 1.
5. Inception score (1606.03498): softmax without bias, mean over chunks of 5,000 images in order.
6. Precision, recall (1904.06991): k = 3 neighbours, pooled activations, all images of REFERENCE.
   ADM computes distances in float16, we in float32: single counts may differ.
7. With another network the results have other names (frechet_distance, ...). Statistics of another
   network are refused; those that name none, such as ADM's, count as those of the network in use.
"""

import argparse
import glob
import hashlib
import json
import math
import os
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

WEIGHTS_SHA256 = "6726825d"  # first digits
WEIGHTS = f"pt_inception-2015-12-05-{WEIGHTS_SHA256}.pth"
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
DOWNLOAD = Path(torch.hub.get_dir(), "checkpoints", WEIGHTS)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
RANK = int(os.environ.get("RANK", 0))  # torchrun sets these
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def fail(message):
    """Ends the program for a mistake that the user can mend: one line, exit code 2."""
    if LOCAL_RANK > 0:
        time.sleep(2)  # if all processes fail, torchrun ends this one once the first has told why
    print(f"fid.py: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


class ConvBN(nn.Module):
    def __init__(self, in_channels, out_channels, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


AVERAGE_POOL = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
MAX_POOL = nn.MaxPool2d(3, stride=1, padding=1)
HALVE = nn.MaxPool2d(3, stride=2)
# Branches are NAME KERNEL:CHANNELS KERNEL:CHANNELS ...; "/2" is a stride, "," two side by side.
MIXED_5 = "1x1 1x1:64 | 5x5 1x1:48 5x5:64 | 3x3dbl 1x1:64 3x3:96 3x3:96 | _pool 1x1:{}"
MIXED_6 = """1x1 1x1:192 | 7x7 1x1:{0} 1x7:{0} 7x1:192 |
    7x7dbl 1x1:{0} 7x1:{0} 1x7:{0} 7x1:{0} 1x7:192 | _pool 1x1:192"""
MIXED_7 = """1x1 1x1:320 | 3x3 1x1:384 1x3,3x1:384 |
    3x3dbl 1x1:448 3x3:384 1x3,3x1:384 | _pool 1x1:192"""
MIXED_6A = "3x3 3x3/2:384 | 3x3dbl 1x1:64 3x3:96 3x3/2:96 | _pool"
MIXED_7A = "3x3 1x1:192 3x3/2:320 | 7x7x3 1x1:192 1x7:192 7x1:192 3x3/2:192 | _pool"


class Mixed(nn.Module):
    """Concatenated branches, each a chain of convolutions; that of the name _pool pools first."""

    def __init__(self, in_channels, pool, branches):
        super().__init__()
        self.chains = []  # of each branch the layers, of each layer those side by side
        for branch in branches.split("|"):
            name, *convs = branch.split()
            chain = [[pool]] if name == "_pool" else []
            channels = in_channels
            for i, conv in enumerate(convs, start=1):
                number = f"_{i}" if len(convs) > 1 else ""
                kernels, out_channels = conv.split(":")
                chain.append([])
                for letter, kernel in zip("ab" if "," in kernels else [""], kernels.split(",")):
                    shape = (2, "valid") if kernel.endswith("/2") else (1, "same")
                    size = int(kernel[0]), int(kernel[2])
                    layer = ConvBN(channels, int(out_channels), size, *shape)
                    self.add_module(f"branch{name}{number}{letter}", layer)
                    chain[-1].append(layer)
                channels = int(out_channels)
            self.chains.append(chain)

    def forward(self, x):
        outputs = []
        for chain in self.chains:
            y = [x]
            for layers in chain:
                y = [layer(y[0]) for layer in layers]
            outputs += y
        return torch.cat(outputs, 1)


def resize_tf1(images, size=299):
    """(N, C, H, W) -> float32 (N, C, size, size), values as given: TF1's ResizeBilinear."""
    x = images.float()
    height, width = x.shape[-2:]
    y = torch.arange(size, device=x.device, dtype=torch.float32) * (height / size)
    z = torch.arange(size, device=x.device, dtype=torch.float32) * (width / size)
    top, left = y.long(), z.long()
    bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    x = torch.lerp(x[:, :, top], x[:, :, bottom], (y - top)[:, None])  # (N, C, size, W)
    return torch.lerp(x[..., left], x[..., right], z - left)  # (N, C, size, size)


def resize_pytorch_fid(images, size=299):
    """uint8 (N, C, H, W) -> float32 (N, C, size, size) in 0..1: half-pixel centres."""
    return F.interpolate(images.float() / 255, size=(size, size), mode="bilinear")


class InceptionV3(nn.Module):
    """The Inception of 2015-12-05, not torchvision's. Names of the weights as in pytorch-fid."""

    def __init__(self, resize="tf1"):
        super().__init__()
        self.resize = resize
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, 2, "valid")
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, 1, "valid")
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, 1, "valid")
        self.Mixed_5b = Mixed(192, AVERAGE_POOL, MIXED_5.format(32))
        self.Mixed_5c = Mixed(256, AVERAGE_POOL, MIXED_5.format(64))
        self.Mixed_5d = Mixed(288, AVERAGE_POOL, MIXED_5.format(64))
        self.Mixed_6a = Mixed(288, HALVE, MIXED_6A)
        self.Mixed_6b = Mixed(768, AVERAGE_POOL, MIXED_6.format(128))
        self.Mixed_6c = Mixed(768, AVERAGE_POOL, MIXED_6.format(160))
        self.Mixed_6d = Mixed(768, AVERAGE_POOL, MIXED_6.format(160))
        self.Mixed_6e = Mixed(768, AVERAGE_POOL, MIXED_6.format(192))
        self.Mixed_7a = Mixed(768, HALVE, MIXED_7A)
        self.Mixed_7b = Mixed(1280, AVERAGE_POOL, MIXED_7)
        self.Mixed_7c = Mixed(2048, MAX_POOL, MIXED_7)
        self.fc = nn.Linear(2048, 1008)
        self.eval()

    def forward(self, images):
        """uint8 (N, 3, H, W) -> pool (N, 2048), spatial (N, 2023), logits (N, 1008) in a dict."""
        if self.resize == "tf1":
            x = (resize_tf1(images) - 128) / 128
        else:
            x = 2 * resize_pytorch_fid(images) - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (N, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(HALVE(x)))  # (N, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(HALVE(x))))  # (N, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (N, 768, 17, 17)
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # from Mixed_6d's branch1x1
        x = self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x)))  # (N, 2048, 8, 8)
        pool = self.Mixed_7c(x).mean((2, 3))
        logits = F.linear(pool, self.fc.weight)  # without the bias, as in ADM
        return {"pool": pool, "spatial": spatial, "logits": logits}


def load_network(features=None, inception=None, resize="tf1"):
    """The network for inference and its file: TorchScript, or Inception, downloaded once."""
    path = features or inception or DOWNLOAD
    try:
        if path == DOWNLOAD and LOCAL_RANK == 0 and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(WEIGHTS_URL, str(path), WEIGHTS_SHA256)
        if WORLD > 1:
            dist.barrier()
        if features:
            return torch.jit.load(path, map_location="cpu").eval(), path
        network = InceptionV3(resize)
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        fail(f"cannot load {path} ({error!r:.200}): Inception's weights are at {WEIGHTS_URL}")
    return network.to(memory_format=torch.channels_last), path  # faster


def load_images(path):
    """RGB uint8 (N, H, W, 3) of an image, N = 1, or of a shard of a training script's cache."""
    try:
        if path.suffix == ".npy":
            images = np.load(path, mmap_mode="r").transpose(0, 2, 3, 1)
            if images.dtype != np.uint8 or images.shape[3] != 3:
                raise ValueError("it holds no uint8 images (n, 3, S, S)")
            return images
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"it is not 8-bit, Pillow mode {image.mode}")
            return np.asarray(image.convert("RGB"))[None]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        fail(f"cannot read image {path} ({error})")


class Folder:
    """The images of a folder, sorted by path; without images, those of its .npy shards."""

    def __init__(self, path):
        self.path = path
        self.arrays = {}
        names = glob.glob("**/*.*", root_dir=path, recursive=True)  # without hidden ones
        images = sorted(path / n for n in names if Path(n).suffix.lower() in IMAGE_SUFFIXES)
        self.files = images or sorted(path.glob("[0-9]*.npy"))
        counts = [1 if images else len(load_images(file)) for file in self.files]
        self.starts = np.cumsum([0, *counts])
        self.num = int(self.starts[-1])
        self.shape = load_images(self.files[0]).shape[1:] if self.files else None
        self.pool = ThreadPoolExecutor(8)

    def read(self, first, stop):
        """Images first .. stop - 1, uint8 (B, H, W, 3)."""
        a = np.searchsorted(self.starts, first, side="right") - 1
        b = np.searchsorted(self.starts, stop)
        parts = []
        for k, images in enumerate(self.pool.map(load_images, self.files[a:b]), start=a):
            if images.shape[1:] != self.shape:
                fail(f"images of one set must have one size: {self.files[k]} has another")
            parts.append(images[max(first - self.starts[k], 0) : stop - self.starts[k]])
        return np.concatenate(parts)


class Archive:
    """The statistics of an .npz, and its images `arr_0`, which need not fit into memory."""

    def __init__(self, path):
        if not zipfile.is_zipfile(path):
            fail(f"{path} is neither a folder nor a complete .npz file")
        self.path = path
        self.num = 0
        with np.load(path) as file:
            self.arrays = {name: file[name] for name in file if "mu" in file and name != "arr_0"}
            if "arr_0" not in file:
                return
        self.stream = zipfile.ZipFile(path).open("arr_0.npy")
        np.lib.format.read_magic(self.stream)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(self.stream)
        if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[3] != 3:
            fail(f"arr_0 of {path} must be uint8 (N, H, W, 3), not {dtype} {shape}")
        self.num, *self.shape = shape
        self.start = self.stream.tell()

    def read(self, first, stop):
        """Images first .. stop - 1, uint8 (B, H, W, 3)."""
        image_bytes = math.prod(self.shape)
        self.stream.seek(self.start + first * image_bytes)
        data = bytearray(self.stream.read((stop - first) * image_bytes))
        return np.frombuffer(data, np.uint8).reshape(-1, *self.shape)


def all_sum(x):
    """Sum over the processes of a CPU tensor, in place."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def extract(images, network, device, batch_size, wanted):
    """By name: mu (D,), sigma (D, D), for sFID mu_s, sigma_s, and `wanted` features (N, D)."""
    num = images.num
    size = min(batch_size, num // WORLD)
    batches = -(-num // size)
    stop = min(batches * (RANK + 1) // WORLD * size, num)
    starts = range(batches * RANK // WORLD * size, stop, size)  # the batches of this process
    arrays, sums, outers = {}, {}, {}
    for first in tqdm(starts, unit="batch", leave=False, disable=RANK > 0 or None):
        batch = torch.from_numpy(images.read(first, min(first + size, stop)))
        with torch.inference_mode():
            out = network(batch.permute(0, 3, 1, 2).contiguous().to(device))
        if not isinstance(out, dict):
            out = {"pool": out}
        for name in wanted & out.keys():
            if name not in arrays:
                arrays[name] = torch.zeros(num, out[name].shape[1])
            arrays[name][first : first + size] = out[name]
        for name in {"pool", "spatial"} & out.keys():
            f = out[name].double()
            sums[name] = sums.get(name, 0) + f.sum(0)
            outers[name] = outers.get(name, 0) + f.T @ f
    arrays = {name: all_sum(arrays[name]).to(device) for name in sorted(arrays)}
    for name in sorted(sums):
        mu = all_sum(sums[name].cpu()) / num
        sigma = (all_sum(outers[name].cpu()) - num * mu.outer(mu)) / (num - 1)
        end = "_s" if name == "spatial" else ""
        arrays |= {f"mu{end}": mu.numpy(), f"sigma{end}": sigma.numpy()}
    return arrays


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) in float64; mu (D,), sigma (D, D)."""
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
    try:  # the eigenvalues of S1 S2, five times faster
        np.linalg.cholesky(sigma1)
        values = scipy.linalg.eigh(sigma1, sigma2, type=2, eigvals_only=True, driver="gv")
        trace = np.sqrt(values.clip(min=0)).sum()  # of (S1 S2)^(1/2)
    except np.linalg.LinAlgError:  # singular: fewer images than dimensions
        roots = []
        for values, vectors in (np.linalg.eigh(sigma1), np.linalg.eigh(sigma2)):
            values *= values > 10 * np.finfo(float).eps * values.max()  # others are rounding errors
            roots.append(vectors * np.sqrt(values))  # S = R R^T
        trace = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace)


def inception_score(logits, chunk=5000):
    """exp(mean KL(p(y|x) || p(y))) of (N, classes), mean over chunks of consecutive images."""
    scores = []
    for part in logits.double().split(chunk):
        log_p = part.log_softmax(1)
        log_mean = log_p.logsumexp(0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp().item())
    return float(np.mean(scores))


def neighbour_radii(points, k=3, block=1024):
    """Distance of every point of (N, D) to its k-th nearest neighbour, itself not counted: (N,)."""
    parts = [torch.cdist(x, points).topk(k + 1, largest=False) for x in points.split(block)]
    return torch.cat([part.values[:, -1] for part in parts])


def in_manifold(points, others, block=1024):
    """Which points (N, D) lie in the manifold of others (M, D), the balls around them (eq. 1)."""
    radii = neighbour_radii(others, block=block)
    parts = [(torch.cdist(x, others) <= radii).any(1) for x in points.split(block)]
    return torch.cat(parts)


def precision_recall(samples, reference, block=1024):
    """Share of samples in the manifold of the reference, and of the reference in the samples'."""
    centre = reference.mean(0, dtype=torch.float64).float()  # rounding grows with the norms
    samples, reference = samples - centre, reference - centre
    precision = in_manifold(samples, reference, block).double().mean()
    recall = in_manifold(reference, samples, block).double().mean()
    return precision.item(), recall.item()


METRICS = {  # flag: function, what it takes of each set, results, their names in other features
    "fid": (frechet_distance, "mu sigma", "fid", "frechet_distance"),
    "sfid": (frechet_distance, "mu_s sigma_s", "sfid", "spatial_frechet_distance"),
    "is": (inception_score, "logits", "inception_score", "class_score"),
    "pr": (precision_recall, "pool", "precision recall", "feature_precision feature_recall"),
}


def measure(metrics, samples, reference, official):
    """Results by name; None, with a line on stderr, if something is missing."""
    results = {}
    for metric in metrics:
        function, keys, names, other_names = METRICS[metric]
        keys = keys.split()
        names = (names if official else other_names).split()
        sets = [samples] if metric == "is" else [samples, reference]
        without = [s.path for s in sets if not s.arrays.keys() >= set(keys)]
        if without:
            what = "images" if metric in ("is", "pr") else " and ".join(keys)
            print(f"fid.py: no {' and '.join(names)}: {without[0]} has no {what}", file=sys.stderr)
            results |= dict.fromkeys(names)
            continue
        data = [s.arrays[key] for s in sets for key in keys]
        shapes = [x.shape for x in data]
        if metric in ("fid", "sfid") and shapes != 2 * [shapes[0], 2 * shapes[0]]:
            fail(f"dimensions of mu, sigma, mu, sigma do not fit together: {shapes}")
        results |= zip(names, np.atleast_1d(function(*data)).tolist())
    return results


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("fid.py", description=__doc__, formatter_class=formatter)
    parser.error = fail
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    default = "default: %(default)s"
    add("samples", type=Path, metavar="SAMPLES", help="images to judge")
    add("reference", type=Path, metavar="REFERENCE", nargs="?", help="images to compare with")
    add("--metrics", nargs="+", choices=METRICS, help="default: all; with --features: fid pr")
    add("--save-stats", type=Path, metavar="FILE", help="write statistics of SAMPLES (default: no)")
    add("--num", "--num-samples", type=int, help="use the first NUM of SAMPLES (default: all)")
    add("--resize", choices=["tf1", "pytorch-fid"], default="tf1", help=f"ADM's is tf1, {default}")
    add("--inception", type=Path, metavar="FILE", help="its weights (default: downloaded once)")
    add("--features", type=Path, metavar="FILE", help="another network (default: Inception)")
    add("--batch-size", type=int, default=64, help=f"images per process, {default}")
    add("--device", choices=["cpu", "cuda"], default=device, help=f"where to compute, {default}")
    args = parser.parse_args(argv)
    args.metrics = args.metrics or (["fid", "pr"] if args.features else list(METRICS))
    if (args.reference is None) == (args.save_stats is None):
        fail("give either SAMPLES REFERENCE, or SAMPLES --save-stats FILE")
    inception_only = args.inception or args.resize != "tf1" or {"sfid", "is"} & {*args.metrics}
    if args.features and inception_only:
        fail("--features replaces Inception: leave out --inception, --resize, --metrics sfid is")
    out = args.save_stats
    if out and (out.suffix != ".npz" or out.exists() or not out.parent.is_dir()):
        fail(f"--save-stats {out}: give a new name that ends in .npz, in a folder that exists")
    return args


def main(argv=None):
    args = parse_args(argv)
    device = torch.device("cuda", LOCAL_RANK) if args.device == "cuda" else torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = False  # it is on by default
    if WORLD > 1:
        dist.init_process_group("gloo")
    paths = args.samples, args.reference
    sets = [Folder(path) if path.is_dir() else Archive(path) for path in paths if path]
    samples = sets[0]
    if args.num is not None or args.save_stats:
        samples.arrays = {}  # statistics are those of all images
    if (args.num or 0) > samples.num:
        fail(f"--num {args.num}, but {samples.path} holds {samples.num} images")
    samples.num = samples.num if args.num is None else args.num
    for s in sets:
        if not s.arrays and s.num < max(4, WORLD):  # precision needs three neighbours
            fail(f"{s.path}: {s.num} images and no statistics (mu, sigma) are too few")
    counts = [int(s.arrays.get("num", 0)) if s.arrays else s.num for s in sets]
    features = None
    if args.features or any(s.num for s in sets):
        network, path = load_network(args.features, args.inception, args.resize)
        features = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        features["resize"] = None if args.features else args.resize
    for s in sets:
        if "features" in s.arrays:
            stored = json.loads(str(s.arrays["features"]))
            features = features or stored
            if stored | {"file": ""} != features | {"file": ""}:
                fail(f"{s.path} holds statistics of other features: {stored}, not {features}")
    metrics = ["fid", "sfid"] if args.save_stats else args.metrics
    for s in sets:
        wanted = {key for metric in metrics for key in METRICS[metric][1].split()} - s.arrays.keys()
        if s is not samples:
            wanted.discard("logits")
        if s.num and wanted:
            s.arrays = extract(s, network.to(device), device, args.batch_size, wanted) | s.arrays
    if WORLD > 1:
        dist.destroy_process_group()
    if RANK > 0:
        return
    protocol = {"samples": str(args.samples), "num_samples": counts[0] or None}
    if args.save_stats:
        np.savez(args.save_stats, num=samples.num, features=json.dumps(features), **samples.arrays)
        results = {"statistics": str(args.save_stats)}
    else:
        official = features is not None and features["sha256"].startswith(WEIGHTS_SHA256)
        results = measure(args.metrics, *sets, official)
        if 0 < counts[0] < 10_000:
            print(f"fid.py: {counts[0]} samples, under 10,000: FID is too high", file=sys.stderr)
        if len({tuple(s.shape) for s in sets if s.num}) > 1:
            print("fid.py: SAMPLES and REFERENCE differ in resolution", file=sys.stderr)
        protocol |= {"reference": str(args.reference), "num_reference": counts[1] or None}
    protocol |= {"features": features, "batch_size": args.batch_size, "processes": WORLD}
    protocol |= {"device": args.device, "torch": torch.__version__}
    print(json.dumps(results | protocol))


if __name__ == "__main__":
    main()
