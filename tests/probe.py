"""What the blocks of trained networks know of an image, how alike they are, how well they denoise.

    python tests/probe.py results/train_sra results/vanilla --data images/train --test images/test
    torchrun --nproc_per_node=2 tests/probe.py DiT-XL-2-256x256.pt --official dit --model DiT-XL/2 \
        --vae vae.safetensors --data imagenet/train --test imagenet/val

DATA and TEST are folders of class folders, of the same classes; images are picked evenly from them.
Image i's noise depends on (--seed, i) alone. Writes to --out: probe.json, and with --levels
probe.png and pca_0.png, pca_1.png, ... of the networks in turn.

1. accuracy: a linear probe of each block. Features are the tokens of a noisy image, averaged (class
   tokens left out), under the null label, standardised on the training images; 0 is the embedded
   input. Ridge regression to one-hot labels; of its strengths 1e-6 .. 10 (the features' variance
   is 1) the best on every fifth training image, then all of them. Accuracy is on the test images.
2. cka: linear CKA (Kornblith et al. 2019, 1905.00414) of these features, between blocks, on the
   test images. cosine: mean over tokens and images of the cosine of two blocks' tokens: the "MI" of
   DiverseDiT's loss, with its sign.
3. pca: the first three principal components of a block's tokens, over the eight images shown, as
   red, green, blue; a row a block, under the images; at the lowest level.
4. loss: the training loss on test images, with their labels and without masks, in --bins parts of
   equal probability of the training times; its mean is the held-out training loss. Networks of one
   noise process compare with each other; flow and EDM do not.

--levels are times of flow, SRA's: s / (1 - s) is the noise over the signal, which EDM (sigma), gvp
and DDPM (the nearest step) have at other times.
"""

import argparse
import json
import math
import os
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
import sample
from diffusion import DDPM, EDM, ImageNoise
from models import UserError
from train_sra import Images

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
STRENGTHS = [10.0**k for k in range(-6, 2)]
COLOURS = "#000000 #d55e00 #0072b2 #009e73 #cc79a7 #e69f00 #56b4e9 #888888".split()


def time_at(diffusion, level):
    """The time at which noise / signal is level / (1 - level), as at that time of linear flow."""
    sigma = level / (1 - level)
    if isinstance(diffusion, DDPM):
        return (diffusion.clock(torch.arange(1000)) - sigma).abs().argmin().item()
    if isinstance(diffusion, EDM):
        return sigma
    return level if diffusion.path == "linear" else 2 / math.pi * math.atan(sigma)


def quantile(diffusion, p):
    """Training times (N,) below which a share p (N,) of them lies."""
    if isinstance(diffusion, DDPM):
        return (1000 * p).long()
    if isinstance(diffusion, EDM):
        return (diffusion.p_mean + diffusion.p_std * torch.special.ndtri(p)).exp()
    return p


class Pictures:
    """Evenly picked images of a folder; batches of them that are this process's share."""

    def __init__(self, args, folder, most, net, vae, device):
        about = {"data": str(folder), "cache": args.cache, "vae_scale": args.vae_scale}
        size = net.config["input_size"] * (vae.factor if vae else 1)
        self.data = Images(argparse.Namespace(**about, image_size=size), vae)
        self.data.make_shards(device, RANK, WORLD)
        count = len(self.data.files)
        self.picked = np.linspace(0, count - 1, min(most, count)).round().astype(int)
        self.labels = self.data.labels[self.picked]
        self.args, self.device = args, device

    def read(self, rows):
        """Images of these rows in [-1, 1], or latents (the mean), and their noise to draw."""
        x, _ = self.data.read([(index, False) for index in self.picked[rows]], False)
        if self.data.vae:
            x = x.chunk(2, 1)[0].float() * self.args.vae_scale
        else:
            x = x.float() / 127.5 - 1
        draw = ImageNoise(self.args.seed, self.picked[rows].tolist(), x.shape[1:], self.device)
        return x.to(self.device), draw

    def batches(self, title):
        size, count = self.args.batch_size, len(self.picked)
        mine = [slice(k, min(k + size, count)) for k in range(0, count, size)][RANK::WORLD]
        for rows in tqdm(mine, title, unit="batch", disable=RANK > 0, dynamic_ncols=True):
            yield rows, *self.read(rows)


def shared(args, name, *shape):
    """A float32 array in a file that all processes see, so that memory is bounded."""
    path = args.out / "parts" / name
    wait()  # nobody reads what was there
    if RANK == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.memmap(path, np.float32, "w+", shape=shape)
    wait()
    return np.memmap(path, np.float32, "r+", shape=shape)


def wait():
    if WORLD > 1:
        dist.barrier()


def streams(net, diffusion, x0, noise, level):
    """Tokens (blocks + 1, N, T, D) of images at that noise level, under the null label."""
    t = torch.tensor([time_at(diffusion, level)] * len(x0), device=x0.device)
    x_t = diffusion.add_noise(x0, noise, t)
    y = torch.full_like(t, net.config["num_classes"], dtype=torch.int64)
    depth = len(net.blocks)
    _, kept = net(*diffusion.net_inputs(x_t, t), y, features=tuple(range(depth + 1)))
    tokens = torch.stack([kept[k].float() for k in range(depth + 1)])
    return tokens[:, :, 1:] if getattr(net, "class_token", None) is not None else tokens


def ridge(x, y, strengths):
    """Regressions from standardised x (N, D), float64, to one-hot y (N,): [x -> labels, ...]."""
    mean, std = x.mean(0), x.std(0).clamp(min=1e-8)
    z, target = (x - mean) / std, F.one_hot(y).double()
    values, vectors = torch.linalg.eigh(z.T @ z / len(z))
    projected = vectors.T @ (z.T @ (target - target.mean(0))) / len(z)
    found = []
    for strength in strengths:
        weights = vectors @ (projected / (values.clamp(min=0) + strength)[:, None])
        found.append(lambda x, w=weights: ((x - mean) / std @ w + target.mean(0)).argmax(1))
    return found


def linear_probe(x, y, x_test, y_test):
    """Test accuracy and strength of a ridge regression; the strength is of training images only."""
    held = torch.arange(len(x)) % 5 == 0
    tried = [(p(x[held]) == y[held]).double().mean() for p in ridge(x[~held], y[~held], STRENGTHS)]
    strength = STRENGTHS[int(np.argmax(tried))]
    (predict,) = ridge(x, y, [strength])
    return (predict(x_test) == y_test).double().mean().item(), strength


def cka(x, y):
    """Linear CKA of features (N, D) and (N, E): eq. 3 with HSIC of linear kernels, centred."""
    x, y = x - x.mean(0), y - y.mean(0)
    return ((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())).item()


def matrix(count, similarity):
    """similarity(i, j) of all pairs, as nested lists; it is symmetric."""
    half = {(i, j): similarity(i, j) for i in range(count) for j in range(i, count)}
    return [[round(half[min(i, j), max(i, j)], 4) for j in range(count)] for i in range(count)]


def principal_colours(tokens):
    """Tokens (N, T, D) -> uint8 (N, side, side, 3): three components, 2 to 98 % in 0..255."""
    x = tokens.flatten(0, 1).double()
    x = x - x.mean(0)
    axes = torch.linalg.svd(x, full_matrices=False)[2][:3]  # (3, D)
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()  # one of the two signs
    values = x @ axes.T
    low, high = torch.quantile(values, torch.tensor([0.02, 0.98], dtype=torch.float64), dim=0)
    levels = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1) * 255
    side = math.isqrt(tokens.shape[1])
    return levels.byte().reshape(len(tokens), side, side, 3).numpy()


@torch.inference_mode()
def look_at_blocks(net, diffusion, train, test, level):
    """Accuracy, strength, CKA and cosine of all blocks at a noise level; of rank 0, else None."""
    depth, width = len(net.blocks) + 1, net.config["hidden_size"]
    features = []
    cosines = shared(test.args, "cosines", len(test.labels), depth, depth)
    for pictures, name in ((train, "train"), (test, "test")):
        features.append(shared(test.args, name, depth, len(pictures.labels), width))
        for rows, x, draw in pictures.batches(f"level {level:g}, {name}"):
            tokens = streams(net, diffusion, x, draw(), level)
            features[-1][:, rows] = tokens.mean(2).cpu()
            if pictures is test:
                unit = F.normalize(tokens, dim=-1)
                alike = torch.einsum("intd,jntd->nij", unit, unit) / tokens.shape[2]
                cosines[rows] = alike.cpu()
    wait()
    if RANK > 0:
        return None

    def features_of(k, part):
        return torch.from_numpy(features[part][k]).double()

    pairs = ((features_of(k, 0), features_of(k, 1)) for k in range(depth))
    probes = [linear_probe(x, train.labels, z, test.labels) for x, z in pairs]
    mean = cosines.mean(0, dtype=np.float64)
    return {
        "time": time_at(diffusion, level),
        "accuracy": [accuracy for accuracy, _ in probes],
        "strength": [strength for _, strength in probes],
        "cka": matrix(depth, lambda i, j: cka(features_of(i, 1), features_of(j, 1))),
        "cosine": matrix(depth, lambda i, j: mean[i, j].item()),
    }


@torch.inference_mode()
def held_out_loss(net, diffusion, test, bins):
    """Mean loss of images in each bin of the training times: [bins]; on all ranks."""
    rng = np.random.default_rng(test.args.seed)
    inside = torch.from_numpy(rng.random((len(test.labels), bins)))
    losses = shared(test.args, "losses", len(test.labels), bins)
    for rows, x, draw in test.batches("loss"):
        y = test.labels[rows].to(x.device)
        for k in range(bins):
            t = quantile(diffusion, (k + inside[rows, k]) / bins)
            t = (t.float() if t.is_floating_point() else t).to(x.device)
            noise = draw()
            out = net(*diffusion.net_inputs(diffusion.add_noise(x, noise, t), t), y)
            losses[rows, k] = diffusion.loss(out, x, noise, t).mean((1, 2, 3)).cpu()
    wait()
    return losses.mean(0, dtype=np.float64).tolist()


@torch.inference_mode()
def principal_picture(net, diffusion, pictures, level, cell=40):
    """Images, and below them a row a block of their tokens as colours; a PIL image."""
    x, draw = pictures.read(slice(None))
    rows = [np.stack([pictures.data.decode(i) for i in pictures.picked]).transpose(0, 2, 3, 1)]
    rows += map(principal_colours, streams(net, diffusion, x, draw(), level).cpu())
    picture = Image.new("RGB", (cell * len(x), cell * len(rows)))
    for k, row in enumerate(rows):
        strip = Image.fromarray(np.concatenate(list(row), 1))
        strip = strip.resize((picture.width, cell), Image.Resampling.NEAREST)
        picture.paste(strip, (0, k * cell))
    return picture


# --- figures


def font(size):
    return ImageFont.load_default(size)


def ticks(low, high):
    """Round numbers from low to high, three or more."""
    step = 10.0 ** math.floor(math.log10(high - low))
    while (high - low) / step < 3:
        step /= 2
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def curves(draw, box, lines, title):
    """Axes in box (left, top, right, bottom); lines: (colour, width, [(x, y), ...])."""
    left, top, right, bottom = box
    points = np.array([point for *_, line in lines for point in line], dtype=float)
    low, high = points.min(0), points.max(0)
    margin = 0.04 * np.where(high > low, high - low, 1)
    low, high = low - margin, high + margin

    def place(x, y):
        share = (np.array([x, y]) - low) / (high - low)
        return left + share[0] * (right - left), bottom - share[1] * (bottom - top)

    for x in ticks(low[0], high[0]):
        u, _ = place(x, 0)
        draw.line([(u, top), (u, bottom)], "#e4e4e4")
        draw.text((u, bottom + 4), f"{x:g}", "#333333", font(13), "mt")
    for y in ticks(low[1], high[1]):
        _, v = place(0, y)
        draw.line([(left, v), (right, v)], "#e4e4e4")
        draw.text((left - 5, v), f"{y:g}", "#333333", font(13), "rm")
    draw.rectangle(box, outline="#333333")
    draw.text(((left + right) / 2, top - 6), title, "#000000", font(15), "mb")
    for colour, width, line in lines:
        placed = [place(*point) for point in line]
        draw.line(placed, colour, width)
        for x, y in placed:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)


def legend(draw, entries, left, top, pitch=270, columns=4):
    """entries: (title, colour), row by row; returns the place below them."""
    for k, (title, colour) in enumerate(entries):
        x, y = left + k % columns * pitch, top + k // columns * 20
        draw.line([(x, y + 8), (x + 26, y + 8)], colour, 4)
        draw.text((x + 32, y), title, "#000000", font(13))
    return top + -(-len(entries) // columns) * 20 + 8


def heat(values, low, side=130):
    """A square picture of a matrix: white is `low`, dark blue 1; block 0 at the upper left."""
    share = (np.array(values)[..., None] - low) / (1 - low)
    pixels = (255 + share * (np.array([8.0, 48, 107]) - 255)).round().astype(np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)


def figure(entries):
    """Accuracy by block from 1 on, a panel a level, then CKA and cosines at a level between.

    entries: [(title, colour, width of the line, what probe.json holds of it)].
    """
    levels = list(entries[0][3]["levels"])
    chosen = sorted(levels, key=float)[(len(levels) - 1) // 2]
    width = max(310 * len(levels) + 20, 150 * len(entries) + 100, 1150)
    image = Image.new("RGB", (width, 700), "white")
    draw = ImageDraw.Draw(image)
    for k, level in enumerate(levels):
        lines = []
        for _, colour, thickness, found in entries:
            points = list(enumerate(100 * np.array(found["levels"][level]["accuracy"])))
            lines.append((colour, thickness, points[1:]))
        box = (55 + 310 * k, 30, 300 + 310 * k, 255)
        curves(draw, box, lines, f"probe, % by block, level {level}")
    y = legend(draw, [entry[:2] for entry in entries], 55, 285)
    for name in ("cka", "cosine"):
        values = [found["levels"][chosen][name] for *_, found in entries]
        low = np.min(values)  # of all, so that they compare; the highest is 1, on the diagonal
        draw.text((10, y + 65), f"{name}\nat {chosen}\n{low:.2f} to 1", "#000000", font(14), "lm")
        for k, (title, *_) in enumerate(entries):
            image.paste(heat(values[k], low), (90 + 150 * k, y))
            text = textwrap.fill(title, 18) if name == "cosine" else ""
            draw.multiline_text((90 + 150 * k, y + 134), text, "#000000", font(13))
        y += 142
    return image.crop((0, 0, width, y + 60))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = models.fail
    add = parser.add_argument
    add("ckpt", type=Path, nargs="+", metavar="CKPT", help="a checkpoint, or a run's --out folder")
    add("--data", type=Path, required=True, help="folder of training images")
    add("--test", type=Path, required=True, help="folder of test images")
    add("--out", type=Path, default=Path("results/probe"), help="folder for all output")
    add("--weights", choices=("ema", "model"), default="ema", help="which weights of it")
    add("--official", choices=models.SOURCES, help="they are of that official code")
    add("--model", help="official checkpoints: DiT-SIZE/PATCH")
    add("--diffusion", help="official checkpoints: as in sample.py")
    add("--vae", type=Path, help="VAE of the latents (default: the file of the training)")
    add("--cache", help="folder for decoded images (default: beside DATA and TEST)")
    add("--levels", type=float, nargs="*", default=[0.7, 0.5, 0.3, 0.1], help="none: the loss only")
    add("--bins", type=int, default=10, help="of the loss; 0: without it")
    sets = {"nargs": 3, "metavar": ("TRAIN", "TEST", "LOSS"), "default": [5000, 5000, 1000]}
    add("--images", type=int, **sets, help="of DATA, of TEST, and of TEST for the loss, at most")
    add("--batch-size", type=int, default=50, help="per process")
    add("--seed", type=int, default=0, help="of the noise")
    args = parser.parse_args(argv)
    args.guidance, args.latents = 1.0, False  # for sample.py's loaders
    args.labels = "null" if args.levels else "random"
    return args


def probe(args, path, device):
    """(what probe.json holds of a checkpoint, its PCA picture or None). Raises UserError."""
    args.ckpt = path
    net, diffusion, about = sample.load_network(args)
    vae = sample.load_decoder(args, about, device)
    args.vae_scale = about["vae_scale"]
    net.to(device)

    def pictures(folder, most):
        return Pictures(args, folder, most, net, vae, device)

    test = pictures(args.test, args.images[1])
    found = {"file": about["file"], "weights": args.weights, "step": about.get("step")}
    found |= {"diffusion": about["diffusion"], "levels": {}}
    if args.bins:
        if about.get("classes", test.data.classes) != test.data.classes:
            raise UserError(f"{args.test} has other classes than {path}'s training: give --bins 0")
        chosen = pictures(args.test, args.images[2])
        found["loss"] = held_out_loss(net, diffusion, chosen, args.bins)
    if not args.levels:
        return found, None
    train = pictures(args.data, args.images[0])
    if train.data.classes != test.data.classes:
        raise UserError(f"{args.data} and {args.test} have different classes")
    for level in args.levels:
        found["levels"][str(level)] = look_at_blocks(net, diffusion, train, test, level)
    return found, principal_picture(net, diffusion, pictures(args.test, 8), min(args.levels))


def main(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if WORLD > 1:
        dist.init_process_group("gloo")
    entries, settings = [], vars(args).copy()
    try:
        for k, path in enumerate(settings.pop("ckpt")):
            found, picture = probe(args, path, device)
            entries.append((str(path), COLOURS[k % len(COLOURS)], 2, found))
            if RANK == 0 and picture:
                picture.save(args.out / f"pca_{k}.png", optimize=True)
    except UserError as error:
        models.fail(error)
    if RANK == 0:
        shutil.rmtree(args.out / "parts", ignore_errors=True)
        content = {"settings": settings, "networks": [found for *_, found in entries]}
        (args.out / "probe.json").write_text(json.dumps(content, indent=1, default=str) + "\n")
        if args.levels:
            figure(entries).save(args.out / "probe.png", optimize=True)
        print(f"probe.json of {len(entries)} networks in {args.out}", flush=True)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
