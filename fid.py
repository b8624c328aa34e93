"""FID, sFID, Inception score, precision and recall of images, as ADM's evaluator defines them.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz
    python fid.py --save-stats reference.npz DATA/train    # statistics to compare with, once
    torchrun --nproc_per_node=8 fid.py samples/ reference.npz --num-samples 50000

SAMPLES and REFERENCE are each a folder of images (searched recursively, without hidden files), an
.npz of images (`arr_0`, uint8 N x H x W x 3), of statistics (`mu`, `sigma`; for sFID `mu_s`,
`sigma_s`), or of both (ADM's reference files: FID and sFID then take the statistics). Prints one
JSON object; what cannot be computed is null, and a line on stderr says why. --features FILE is a
TorchScript network, uint8 N x 3 x H x W -> N x D; its code is run, so use only what you trust.

ADM is openai/guided-diffusion at 1b61a43, evaluations/evaluator.py. Implementation details:
1. Images of a set have one size. Files are sorted by path, alpha channels are dropped.
2. Resizing to 299 x 299 as in ADM's TensorFlow 1 graph: bilinear, source index = output index *
   in / out, then (x - 128) / 128. --resize pytorch-fid: half-pixel centres. The numbers differ.
3. Network: the Inception of 2015-12-05 in the weights of pytorch-fid, float32 without TF32.
4. FID (1706.08500, eq. 6): Frechet distance of the 2048 pooled activations. sFID (2103.03841): of
   the first 7 channels of TF's mixed_6/conv (17 x 17 x 7). Float64 sums, covariance with N - 1.
   With fewer than about 10,000 samples both come out too high; 50,000 are usual.
5. Inception score (1606.03498): softmax without bias, mean over chunks of 5,000 images in order.
6. Precision, recall (1904.06991): k = 3 neighbours, pooled activations, all images of REFERENCE.
   ADM computes distances in float16, we in float32: single counts may differ.
7. With another network the results have other names (frechet_distance, ...). Statistics of another
   network are refused; those that name none, such as ADM's, count as those of the network in use.
8. Batches do not depend on the number of processes: the results agree up to rounding.
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

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d"  # first digits
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
DOWNLOAD = Path(torch.hub.get_dir(), "checkpoints", WEIGHTS)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
NEIGHBOURS = 3
METRICS = {  # flag: results, and what they are called for features of another network
    "fid": {"fid": "frechet_distance"},
    "sfid": {"sfid": "spatial_frechet_distance"},
    "is": {"inception_score": "class_score"},
    "pr": {"precision": "feature_precision", "recall": "feature_recall"},
}
NEEDS = {"fid": ["mu", "sigma"], "sfid": ["mu_s", "sigma_s"], "is": ["logits"], "pr": ["pool"]}
RANK = int(os.environ.get("RANK", 0))  # torchrun sets these
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def fail(message):
    """Ends the program for a mistake that the user can mend: one line, exit code 2."""
    if LOCAL_RANK > 0:
        time.sleep(2)  # if all processes fail, torchrun ends this one once the first has told why
    print(f"fid.py: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


# --- network


class ConvBN(nn.Module):
    def __init__(self, in_channels, out_channels, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches, each a chain of convolutions (channels, kernel[, stride, padding]), concatenated.

    Convolutions are numbered if a branch has several. SPLIT is two side by side, a and b.
    """

    def __init__(self, in_channels, pool, branches):
        super().__init__()
        self.pool = pool
        self.branches = {branch: [] for branch in branches}
        for branch, convs in branches.items():
            channels = in_channels
            for i, (out_channels, kernel, *shape) in enumerate(convs, start=1):
                name = f"{branch}_{i}" if len(convs) > 1 else branch
                kernels = kernel if kernel is SPLIT else {"": kernel}
                for letter, kernel in kernels.items():
                    self.add_module(name + letter, ConvBN(channels, out_channels, kernel, *shape))
                self.branches[branch].append([name + letter for letter in kernels])
                channels = out_channels

    def forward(self, x):
        outputs = []
        for branch, convs in self.branches.items():
            y = [self.pool(x) if branch == "branch_pool" else x]
            for names in convs:
                y = [self.get_submodule(name)(y[0]) for name in names]
            outputs += y
        return torch.cat(outputs, 1)


SPLIT = {"a": (1, 3), "b": (3, 1)}
AVERAGE_POOL = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
MAX_POOL = nn.MaxPool2d(3, stride=1, padding=1)
HALVE = nn.MaxPool2d(3, stride=2)


MIXED_5 = {
    "branch1x1": [(64, 1)],
    "branch5x5": [(48, 1), (64, 5)],
    "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
}
MIXED_6A = {
    "branch3x3": [(384, 3, 2, "valid")],
    "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2, "valid")],
    "branch_pool": [],
}
MIXED_7A = {
    "branch3x3": [(192, 1), (320, 3, 2, "valid")],
    "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2, "valid")],
    "branch_pool": [],
}
MIXED_7 = {
    "branch1x1": [(320, 1)],
    "branch3x3": [(384, 1), (384, SPLIT)],
    "branch3x3dbl": [(448, 1), (384, 3), (384, SPLIT)],
    "branch_pool": [(192, 1)],
}


def mixed_6(c):
    branches = {
        "branch1x1": [(192, 1)],
        "branch7x7": [(c, 1), (c, (1, 7)), (192, (7, 1))],
        "branch7x7dbl": [(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))],
        "branch_pool": [(192, 1)],
    }
    return Mixed(768, AVERAGE_POOL, branches)


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
        self.Mixed_5b = Mixed(192, AVERAGE_POOL, MIXED_5 | {"branch_pool": [(32, 1)]})
        self.Mixed_5c = Mixed(256, AVERAGE_POOL, MIXED_5 | {"branch_pool": [(64, 1)]})
        self.Mixed_5d = Mixed(288, AVERAGE_POOL, MIXED_5 | {"branch_pool": [(64, 1)]})
        self.Mixed_6a = Mixed(288, HALVE, MIXED_6A)
        self.Mixed_6b = mixed_6(128)
        self.Mixed_6c = mixed_6(160)
        self.Mixed_6d = mixed_6(160)
        self.Mixed_6e = mixed_6(192)
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


def load_inception(path=None, resize="tf1"):
    """Network for inference; without a path the published weights, downloaded once."""
    network = InceptionV3(resize)
    path = path or DOWNLOAD
    try:
        if path == DOWNLOAD and LOCAL_RANK == 0 and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(WEIGHTS_URL, str(path), WEIGHTS_SHA256)
        if WORLD > 1:
            dist.barrier()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        reason = str(error).splitlines()[0]
        fail(f"cannot load {path} ({reason}): give --inception FILE, from {WEIGHTS_URL}")
    return network.to(memory_format=torch.channels_last)  # faster


def load_features(path):
    """TorchScript network, uint8 (N, 3, H, W) -> (N, D). Loading it runs its code."""
    try:
        return torch.jit.load(path, map_location="cpu").eval()
    except (RuntimeError, ValueError):
        fail(f"{path} is not a TorchScript module")


# --- images


def load_image(path):
    """RGB uint8 (H, W, 3)."""
    try:
        with Image.open(path) as image:
            assert image.mode[0] not in "IF", f"it is not 8-bit, Pillow mode {image.mode}"
            return np.asarray(image.convert("RGB"))
    except Exception as error:
        fail(f"cannot read image {path} ({error})")


class ImageSet:
    """SAMPLES or REFERENCE: `num` images (0: statistics only) and the arrays of statistics."""

    def __init__(self, path):
        self.path = path
        self.files = []
        self.num = 0
        self.arrays = {}
        if path.is_dir():
            names = glob.glob("**/*.*", root_dir=path, recursive=True)  # without hidden ones
            self.files = sorted(path / n for n in names if Path(n).suffix.lower() in IMAGE_SUFFIXES)
            self.num = len(self.files)
        elif zipfile.is_zipfile(path):
            with np.load(path, allow_pickle=False) as arrays:
                if "mu" in arrays:
                    self.arrays = {name: arrays[name] for name in arrays if name != "arr_0"}
                if "arr_0" in arrays:
                    with arrays.zip.open("arr_0.npy") as stream:
                        np.lib.format.read_magic(stream)
                        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
                        self.start = stream.tell()
                    if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[3] != 3:
                        fail(f"arr_0 of {path} must be uint8 (N, H, W, 3), not {dtype} {shape}")
                    self.num, *self.shape = shape
        else:
            fail(f"{path} is neither a folder nor a complete .npz file")
        if self.num == 0 and not self.arrays:
            fail(f"{path} holds neither images (arr_0) nor statistics (mu, sigma)")

    def batches(self, start, stop, size):
        """Yields uint8 (B, H, W, 3) of the images start .. stop - 1, reading as it goes."""
        if self.files:
            shape = load_image(self.files[0]).shape
            with ThreadPoolExecutor(8) as pool:
                for first in range(start, stop, size):
                    files = self.files[first : min(first + size, stop)]
                    images = list(pool.map(load_image, files))
                    for file, image in zip(files, images):
                        if image.shape != shape:
                            fail(f"images of one set must have one size: {file} has another")
                    yield np.stack(images)
        else:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as stream:
                image_bytes = math.prod(self.shape)
                stream.seek(self.start + start * image_bytes)
                for first in range(start, stop, size):
                    data = bytearray(stream.read(min(size, stop - first) * image_bytes))
                    yield np.frombuffer(data, np.uint8).reshape(-1, *self.shape)


def all_sum(x):
    """Sum over the processes of a CPU tensor, in place."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def extract(images, network, device, batch_size, wanted):
    """Arrays by name: mu (D,), sigma (D, D), the same with _s for sFID, `wanted` features (N, D).

    Every process takes a contiguous part of the batches, and has all results in the end.
    """
    num = images.num
    batch_size = min(batch_size, num // WORLD)
    batches = -(-num // batch_size)
    first = batches * RANK // WORLD * batch_size
    stop = min(batches * (RANK + 1) // WORLD * batch_size, num)
    bar = tqdm(total=stop - first, unit="img", leave=False, disable=RANK > 0 or None)
    sums = {}
    arrays = {}
    for batch in images.batches(first, stop, batch_size):
        x = torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous().to(device)
        with torch.inference_mode():
            out = network(x)
        if not isinstance(out, dict):
            out = {"pool": out}
        for name, f in out.items():
            if name in wanted:
                if name not in arrays:
                    arrays[name] = torch.zeros(num, f.shape[1])
                arrays[name][first : first + len(x)] = f
            if name != "logits":
                f = f.double()
                total, outer = sums.get(name, (0, 0))
                sums[name] = total + f.sum(0), outer + f.T @ f
        first += len(x)
        bar.update(len(x))
    arrays = {name: all_sum(rows) for name, rows in arrays.items()}
    for name, (total, outer) in sums.items():
        mu = all_sum(total.cpu()) / num
        outer = all_sum(outer.cpu())
        end = "_s" if name == "spatial" else ""
        arrays["mu" + end] = mu.numpy()
        arrays["sigma" + end] = ((outer - num * mu.outer(mu)) / (num - 1)).numpy()
    return arrays


# --- metrics


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) in float64; mu (D,), sigma (D, D).

    The last trace is the sum of the roots of the eigenvalues of S1 S2. If S1 or S2 is singular
    (fewer images than dimensions), roots of rounding errors would count: then it is the sum of the
    singular values of R1^T R2, S = R R^T, without the columns of eigenvalue zero.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
    try:
        np.linalg.cholesky(sigma1)
        values = scipy.linalg.eigh(sigma1, sigma2, type=2, eigvals_only=True, driver="gv")
        trace = np.sqrt(values.clip(min=0)).sum()
    except np.linalg.LinAlgError:
        roots = []
        for values, vectors in (np.linalg.eigh(sigma1), np.linalg.eigh(sigma2)):
            positive = values > 10 * np.finfo(float).eps * values.max(initial=0)
            roots.append(vectors[:, positive] * np.sqrt(values[positive]))
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


def neighbour_radii(features, k=NEIGHBOURS, block=1024):
    """Distance of every point of (N, D) to its k-th nearest neighbour, itself not counted: (N,)."""
    parts = [torch.cdist(x, features).topk(k + 1, largest=False) for x in features.split(block)]
    return torch.cat([part.values[:, -1] for part in parts])


def manifold_membership(samples, reference, k=NEIGHBOURS, block=1024):
    """Which samples (N, D) lie in the manifold of the reference (M, D), and the other way round.

    A manifold is the union of the closed balls around its points up to their k-th neighbours
    (1904.06991, eq. 1). `block` rows of distances at a time, about the reference's mean because
    rounding grows with the norms.
    """
    centre = reference.mean(0, dtype=torch.float64).to(reference.dtype)
    samples, reference = samples - centre, reference - centre
    radii = neighbour_radii(reference, k, block)
    samples_inside = []
    reference_inside = torch.zeros_like(radii, dtype=torch.bool)
    for x, own in zip(samples.split(block), neighbour_radii(samples, k, block).split(block)):
        distances = torch.cdist(x, reference)
        samples_inside.append((distances <= radii).any(1))
        reference_inside |= (distances <= own[:, None]).any(0)
    return torch.cat(samples_inside), reference_inside


def precision_recall(samples, reference, k=NEIGHBOURS, block=1024):
    """Share of samples in the manifold of the reference, and of the reference in the samples'."""
    inside = manifold_membership(samples, reference, k, block)
    return tuple(x.double().mean().item() for x in inside)


def measure(metrics, samples, reference, device):
    """Results by name; None, with a warning, if something is missing."""
    results = {}
    for metric in metrics:
        results |= dict.fromkeys(METRICS[metric])
        sets = [samples] if metric == "is" else [samples, reference]
        without = [s.path for s in sets if not s.arrays.keys() >= set(NEEDS[metric])]
        if without:
            what = "images" if metric in ("is", "pr") else " and ".join(NEEDS[metric])
            name = " and ".join(METRICS[metric])
            print(f"fid.py: no {name}: {without[0]} holds no {what}", file=sys.stderr)
            continue
        data = [s.arrays[key] for s in sets for key in NEEDS[metric]]
        if data[0].shape[-1] != data[-1].shape[-1]:
            fail(f"feature dimension mismatch: {data[0].shape[-1]} and {data[-1].shape[-1]}")
        if metric == "is":
            results["inception_score"] = inception_score(*data)
        elif metric == "pr":
            pools = [pool.to(device) for pool in data]
            results["precision"], results["recall"] = precision_recall(*pools)
        else:
            results[metric] = frechet_distance(*data)
    return results


# --- command line


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
    add(
        "--resize",
        choices=["tf1", "pytorch-fid"],
        default="tf1",
        help=f"as ADM or pytorch-fid, {default}",
    )
    add("--inception", type=Path, metavar="FILE", help="its weights (default: downloaded once)")
    add("--features", type=Path, metavar="FILE", help="another network (default: Inception)")
    add("--batch-size", type=int, default=64, help=f"images per process, {default}")
    add("--device", choices=["cpu", "cuda"], default=device, help=f"where to compute, {default}")
    args = parser.parse_args(argv)
    if (args.reference is None) == (args.save_stats is None):
        fail("give either SAMPLES REFERENCE, or SAMPLES --save-stats FILE")
    if args.batch_size < 1 or (args.num is not None and args.num < 1):
        fail("--batch-size and --num must be positive")
    if args.features and (args.inception or args.resize != "tf1"):
        fail("--features replaces Inception: leave out --inception and --resize")
    if args.features and {"sfid", "is"} & set(args.metrics or ()):
        fail("--metrics sfid and is need Inception: leave out --features")
    out = args.save_stats
    if out and (out.suffix != ".npz" or out.exists() or not out.parent.is_dir()):
        fail(f"--save-stats {out}: give a new name that ends in .npz, in a folder that exists")
    if args.save_stats:
        args.metrics = ["fid", "sfid"]
    elif args.metrics is None:
        args.metrics = ["fid", "pr"] if args.features else list(METRICS)
    return args


def main(argv=None):
    args = parse_args(argv)
    device = torch.device("cuda", LOCAL_RANK) if args.device == "cuda" else torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = False  # it is on by default
    if WORLD > 1:
        dist.init_process_group("gloo")
    sets = [ImageSet(path) for path in (args.samples, args.reference) if path]
    samples = sets[0]
    if args.num or args.save_stats:
        samples.arrays = {}  # statistics are those of all images
    if args.num:
        if args.num > samples.num:
            fail(f"--num {args.num}, but {samples.path} holds {samples.num} images")
        samples.num = args.num
    counts = [int(s.arrays.get("num", 0)) if s.arrays else s.num for s in sets]
    features = None
    if args.features or any(s.num for s in sets):
        path = args.features or args.inception or DOWNLOAD
        network = load_features(path) if args.features else load_inception(path, args.resize)
        features = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        features["resize"] = None if args.features else args.resize
    for s in sets:
        if "features" in s.arrays:
            stored = json.loads(str(s.arrays["features"]))
            features = features or stored
            if stored | {"file": ""} != features | {"file": ""}:
                fail(f"{s.path} holds statistics of other features: {stored}, not {features}")
    for s in sets:
        wanted = {key for metric in args.metrics for key in NEEDS[metric]} - s.arrays.keys()
        if s is not samples:
            wanted.discard("logits")
        if s.num and wanted:
            if s.num < max(NEIGHBOURS + 1, WORLD):
                fail(f"{s.path} holds too few images: {s.num}")
            found = extract(s, network.to(device), device, args.batch_size, wanted)
            s.arrays = found | s.arrays
    if WORLD > 1:
        dist.destroy_process_group()
    if RANK > 0:
        return
    protocol = {"samples": str(args.samples), "num_samples": counts[0] or None}
    if args.save_stats:
        np.savez(args.save_stats, num=samples.num, features=json.dumps(features), **samples.arrays)
        results = {"statistics": str(args.save_stats)}
    else:
        results = measure(args.metrics, *sets, device)
        protocol |= {"reference": str(args.reference), "num_reference": counts[1] or None}
    if features is None or not features["sha256"].startswith(WEIGHTS_SHA256):
        names = {k: v for renamed in METRICS.values() for k, v in renamed.items()}
        results = {names.get(name, name): value for name, value in results.items()}
    protocol |= {"features": features, "batch_size": args.batch_size, "processes": WORLD}
    protocol |= {"device": args.device, "torch": torch.__version__}
    print(json.dumps(results | protocol))


if __name__ == "__main__":
    main()
