"""SRA: Self-Representation Alignment (Jiang et al., ICLR 2026, arXiv 2505.02831), SiT and DiT.

An early block of the student is aligned with a later block of its own EMA. The EMA sees the same
image, noise and (dropped) labels at a lower noise level. The head is not used in sampling.

    x_t  = a(t) x_0 + s(t) eps                                                    student input
    t'   = clamp(t - 0.2 u, 0, 1),  u ~ U(0, 1)                      teacher time (section 3.1)
    L    = L_denoise + 0.2 mean smooth-L1( head(f^(m)(x_t, t, y)), f_ema^(n)(x_t', t', y) )

Commands; the same command goes on with an interrupted run:
    # toy: built-in shapes, CPU
    python train_sra.py --image-size 16 --model DiT-Ti/2 --steps 1000 --batch-size 16 \
        --lr 2e-3 --warmup 100 --ema-warmup
    # 8 GPUs, the paper's setting; VAE: sd-vae-ft-ema's diffusion_pytorch_model.safetensors
    torchrun --nproc_per_node=8 train_sra.py --data imagenet/train --vae vae.safetensors \
        --image-size 256 --model SiT-XL/2
    # 2 nodes, on both
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
        train_sra.py --data imagenet/train --vae vae.safetensors --image-size 256 --model SiT-XL/2
    # SRA on DiT: 0.2 is the paper's weight, 0.04 the code's
    torchrun --nproc_per_node=8 train_sra.py --data imagenet/train --vae vae.safetensors \
        --image-size 256 --model DiT-XL/2 --diffusion ddpm --align-weight 0.2
`--align-weight 0` trains plain SiT (DiT with `--diffusion ddpm`), without head or teacher. The
official SiT and DiT do not clip gradients (`--clip-grad 0`).

Implementation details (S/ and D/: SiT-SRA/ and DiT-SRA/ of the official repository at 1723f85)
 1. Features are raw streams after a block; the student's pass the head [S/models/sit.py].
 2. Blocks student -> teacher: SiT B 3->8, L 6->16, XL 8->20; DiT B 3->7, L 6->14, XL 8->16
    [section 3.2, Table 5]. The official parser's 4 -> 8 is not a published setting.
 3. Head: Linear D -> 2D, SiLU, Linear 2D -> D; Xavier, zero bias [S/models/sit.py].
 4. Smooth L1 with beta 0.05, constant weight 0.2 [section 3.2, App. G]. The official code's present
    default is a cosine along tokens with weight 0.5 (`cosine-token`), probably an accident.
 5. The code's weight decays by epochs from epoch 149; `--align-decay 745596 5004000` is that in
    steps, without the stairs (at most 0.3 % apart). 512 px: 495396 4003200. The paper has none.
 6. DiT: t' = clamp(t - r, 1, 999), r in 0 .. 199; at t = 0 the teacher is noisier, t' = 1 [D/].
 7. The teacher runs in the student's precision and stops at its block [App. H suggests both].
Differences from the official code: its EMA starts from other random weights on every rank; its
teacher runs all blocks, in fp32; it trains in fp16, we in bf16; it keeps latents' deviations in
float32, we log-variances in float16, and of mirror images too.
"""

import argparse
import fcntl
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image, ImageDraw
from tqdm import tqdm

import models
from diffusion import DIFFUSIONS, ImageNoise, make_diffusion, sample_preview, seed_of
from models import UserError, write_atomically

# --- method: SRA

import torch.nn.functional as F

from models import DiT, frozen_copy

DEFAULTS = {}

DISTANCES = {  # each (N, T, D) x (N, T, D) -> scalar; S/loss.py
    "smooth-l1": lambda a, b: F.smooth_l1_loss(a, b, beta=0.05),
    "l1": F.l1_loss,
    "l2": F.mse_loss,
    "cosine-token": lambda a, b: (1 - F.cosine_similarity(a, b, dim=1)).mean(),
    "cosine-channel": lambda a, b: (1 - F.cosine_similarity(a, b, dim=2)).mean(),
}


def method_arguments(parser):
    add = parser.add_argument_group("SRA").add_argument
    add("--student-block", type=int, help="aligned block (default: the paper's for the model)")
    add("--teacher-block", type=int, help="block of the EMA (default: the paper's for the model)")
    add("--align-weight", type=float, help="0: plain (default: 0.2, with cosine distances 0.5)")
    add("--align-distance", choices=DISTANCES, default="smooth-l1", help="of student and teacher")
    decay = "weight * 10^-((step - START) / TENFOLD) after step START (default: constant)"
    add("--align-decay", type=int, nargs=2, metavar=("START", "TENFOLD"), help=decay)
    add("--time-gap", type=float, default=0.2, help="the teacher's lead, as a part of all time")
    add("--head", choices=("mlp", "none"), default="mlp", help="projection of the student")


def alignment_blocks(depth, ddpm):
    """Student and teacher block for a network of that depth: SRA section 3.2, Table 5.

    For depths that the paper does not have: its rule of thumb.
    """
    if depth == 28:
        return (8, 16) if ddpm else (8, 20)
    if ddpm and depth in (12, 24):
        return depth // 4, 7 * depth // 12
    return max(1, round(depth / 4)), round(2 * depth / 3)


def alignment_weight(step, weight, decay):
    """Weight at a 0-based step (or epoch, if decay is in epochs): S/train.py, D/train.py."""
    start, tenfold = decay or (0, math.inf)
    return weight * 0.1 ** (max(0, step - start) / tenfold)


def teacher_time(t, u, gap):
    """Teacher's times (N,) from the student's t and u ~ U(0, 1): S/loss.py.

    DDPM's integer steps: D/diffusion/gaussian_diffusion.py.
    """
    if t.dtype == torch.int64:
        return (t - (u * round(1000 * gap)).long()).clamp(1, 999)
    return (t - gap * u).clamp(0, 1)


def projection_head(dim):
    head = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))
    for layer in (head[0], head[2]):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return head


class SRA(nn.Module):
    """`model` is trained, `ema` averages it: the teacher, and what is sampled."""

    def __init__(self, args, network, diffusion):
        super().__init__()
        self.diffusion = diffusion
        self.step = 0  # set by the loop: steps that are done
        self.label_drop = args.label_drop
        self.null_label = network["num_classes"]
        self.model = DiT(**network)
        self.ema = frozen_copy(self.model)
        self.weight = args.align_weight
        if self.weight is None:
            self.weight = 0.5 if args.align_distance.startswith("cosine") else 0.2
        self.distance = DISTANCES[args.align_distance]
        self.gap, self.decay = args.time_gap, args.align_decay
        if self.decay and (self.decay[0] < 0 or self.decay[1] < 1):
            raise UserError(f"--align-decay {self.decay}: START must be 0 or more, TENFOLD 1")
        if self.weight == 0:
            return
        if args.diffusion == "edm":
            raise UserError("SRA is not defined for --diffusion edm (but --align-weight 0 is)")
        student, teacher = alignment_blocks(network["depth"], args.diffusion == "ddpm")
        self.student_block = student if args.student_block is None else args.student_block
        self.teacher_block = teacher if args.teacher_block is None else args.teacher_block
        if not 1 <= self.student_block <= self.teacher_block <= network["depth"]:
            blocks = f"--student-block {self.student_block} --teacher-block {self.teacher_block}"
            raise UserError(f"{blocks}: need 1 <= student <= teacher <= {network['depth']}")
        dim = network["hidden_size"]
        self.head = projection_head(dim) if args.head == "mlp" else nn.Identity()

    def forward(self, x0, y, t=None, noise=None, drop=None, u=None):
        """Images x0 (N, C, H, W) in [-1, 1], labels y (N,) -> {"loss", ...}, scalars.

        Draws: t (N,), noise like x0, drop and u (N,) from U(0, 1).
        """
        n = len(x0)
        t = self.diffusion.draw_t(n, x0.device) if t is None else t
        noise = torch.randn_like(x0) if noise is None else noise
        drop = torch.rand(n, device=x0.device) if drop is None else drop
        u = torch.rand(n, device=x0.device) if u is None else u
        y = torch.where(drop < self.label_drop, self.null_label, y)
        x_t = self.diffusion.add_noise(x0, noise, t)
        if self.weight == 0:
            out = self.model(*self.diffusion.net_inputs(x_t, t), y)
            denoise = self.diffusion.loss(out, x0, noise, t).mean()
            return {"loss": denoise, "denoise": denoise}
        k = self.student_block
        out, features = self.model(*self.diffusion.net_inputs(x_t, t), y, features=(k,))
        denoise = self.diffusion.loss(out, x0, noise, t).mean()
        t_teacher = teacher_time(t, u, self.gap)
        x_teacher = self.diffusion.add_noise(x0, noise, t_teacher)
        inputs = self.diffusion.net_inputs(x_teacher, t_teacher)
        with torch.no_grad():
            target = self.ema.tokens_after(*inputs, y, self.teacher_block)  # (N, T, D)
        align = self.distance(self.head(features[k]).float(), target.float())
        weight = alignment_weight(self.step, self.weight, self.decay)
        return {"loss": denoise + weight * align, "denoise": denoise, "align": align}

    def after_step(self, step, steps):
        """Nothing to update: the teacher is the EMA, which the loop keeps."""


# --- end method: the rest is the same in every training script

CORNERS = {"triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6, "circle": 64}
SHAPES = [f"{kind} {form}" for kind in ("full", "hollow") for form in CORNERS]  # built-in classes
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SHARD = 1024  # images in a file of the cache
FREE = """allow_changes cache checkpointing classes compile data keep log_every micro_batch network
out run sample_every save_every save_minutes script steps vae""".split()  # may change in a run


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = models.fail
    add = parser.add_argument_group("run").add_argument
    switch = argparse.BooleanOptionalAction
    add("--data", default="shapes", help="'shapes' (built in) or a folder of class folders")
    add("--image-size", type=int, default=32, help="side in pixels, after ADM's crop")
    add("--vae", help="weights of a VAE (.safetensors or .bin): train on its latents")
    add("--vae-scale", type=float, default=models.VAE_SCALE, help="factor on the latents")
    add("--cache", help="folder for decoded images and latents (default: DATA.cache)")
    add("--flip", action=switch, default=False, help="mirror half of the images")
    add("--out", default=f"results/{Path(sys.argv[0]).stem}", help="folder for all output")
    add("--allow-changes", action="store_true", help="go on with a run under other flags")
    add("--init-from", help="start from network and EMA of this checkpoint or run")
    add("--official", choices=models.SOURCES, help="--init-from is of that official code")
    add("--model", default="DiT-Ti/4", help="DiT-SIZE/PATCH (or SiT-): Ti S B L XL H, 2 4 8")
    add("--diffusion", choices=DIFFUSIONS, default="flow", help="noise process")
    add("--qk-norm", action=switch, default=False, help="LayerNorm of queries and keys")
    add("--steps", type=int, default=400_000, help="optimizer steps of the whole run")
    add("--batch-size", type=int, default=256, help="over all processes and micro-batches")
    add("--micro-batch", type=int, help="images per process and forward (default: all)")
    add("--lr", type=float, default=1e-4, help="learning rate of AdamW")
    add("--beta2", type=float, default=0.999, help="AdamW's decay of squared gradients")
    add("--warmup", type=int, default=0, help="steps of linear learning-rate warm-up")
    add("--clip-grad", type=float, default=1.0, help="global gradient norm; 0: no clipping")
    add("--ema-decay", type=float, default=0.9999, help="decay of the weights' average")
    add("--ema-warmup", action=switch, default=False, help="decay at most (1 + s) / (10 + s)")
    add("--label-drop", type=float, default=0.1, help="share of labels replaced by the null label")
    add("--precision", choices=("bf16", "fp32"), help="autocast (default: bf16 on CUDA, else fp32)")
    add("--compile", action=switch, default=False, help="torch.compile every block")
    add("--checkpointing", action=switch, default=False, help="recompute blocks, for less memory")
    add("--seed", type=int, default=0, help="of weights, data order and every draw")
    add("--log-every", type=int, default=50, help="steps between lines of log.jsonl")
    add("--sample-every", type=int, default=10_000, help="steps between grids; 0: at the end")
    add("--save-every", type=int, default=10_000, help="steps between checkpoints; 0: at the end")
    add("--save-minutes", type=float, default=20.0, help="between writings of autosave.pt")
    add("--keep", type=int, default=0, help="how many checkpoints to keep; 0: all")
    method_arguments(parser)
    parser.set_defaults(**DEFAULTS)
    for action in parser._actions:
        if action.default not in (None, argparse.SUPPRESS) and "default" not in action.help:
            action.help += " (default: %(default)s)"
    return parser.parse_args(argv)


def draw_shape(index, size):
    """Image `index` of the built-in data, of class index % 10; it depends on the index alone."""
    rng = np.random.default_rng(index)
    hollow, form = divmod(index % 10, 5)
    x, y = 4 * size * rng.uniform(0.46, 0.54, 2)
    radius, turn = 4 * size * rng.uniform(0.36, 0.45), rng.uniform(-6, 6)
    grey = f"hsl(0, 0%, {rng.integers(78, 96)}%)"
    image = Image.new("RGB", (4 * size, 4 * size), grey)
    for part, fill in [(1, f"hsl({36 * (index % 10)}, 80%, 45%)"), (0.5, grey)][: 1 + hollow]:
        corners = list(CORNERS.values())[form]
        ImageDraw.Draw(image).regular_polygon((x, y, part * radius), corners, turn, fill)
    return image.resize((size, size), Image.Resampling.BOX)


def center_crop(image, size):
    """ADM's: halve with a box filter while twice too large, bicubic to size, cut the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    width, height = (max(size, round(side * size / min(image.size))) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))


class Images:
    """Pixels, or with a VAE latents, decoded once into memory-mapped shards."""

    def __init__(self, args, vae):
        self.root, self.size, self.vae, self.scale = args.data, args.image_size, vae, args.vae_scale
        if args.data == "shapes":
            self.files = [f"{SHAPES[i % 10]}/{i}" for i in range(20_000)]
            sizes = self.decode(0).tolist()  # so that other drawings are other data
        else:
            found = glob.glob("*/**/*", root_dir=args.data, recursive=True)  # skips hidden names
            self.files = sorted(name for name in found if name.lower().endswith(SUFFIXES))
            sizes = [os.path.getsize(os.path.join(args.data, name)) for name in self.files]
        if not self.files:
            raise UserError(f"--data {args.data}: no images DATA/CLASS/NAME.png (jpg, webp, bmp)")
        folders = [name.split("/")[0] for name in self.files]
        classes, labels = np.unique(folders, return_inverse=True)
        self.classes, self.labels = classes.tolist(), torch.from_numpy(labels)
        channels, factor = (vae.latent_channels, vae.factor) if vae else (3, 1)
        if self.size % factor:
            raise UserError(f"--image-size {self.size} is not divisible by the VAE's {factor}")
        self.shape = (channels, self.size // factor, self.size // factor)
        self.vae_hash = vae.digest("encoder") if vae else None
        key = json.dumps([SHARD, self.files, folders, sizes, self.size, "ADM crop", self.vae_hash])
        self.hash = hashlib.sha256(key.encode()).hexdigest()[:16]
        folder = Path(args.cache or f"{args.data.rstrip('/')}.cache", self.hash)
        self.paths = [folder / f"{k:05d}.npy" for k in range(-(-len(self.files) // SHARD))]

    def decode(self, index):
        """Image `index` as uint8 (3, S, S). Raises UserError for a file that cannot be read."""
        path, shapes = os.path.join(self.root, self.files[index]), self.root == "shapes"
        try:
            image = draw_shape(index, self.size) if shapes else Image.open(path)
            image = center_crop(image.convert("RGB"), self.size)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"cannot read image {path}: {error}") from None
        return np.asarray(image).transpose(2, 0, 1)

    def make_shards(self, device, rank, world):
        """Each process makes its share of the missing shards, plain .npy; then all map them."""
        missing = [k for k in range(rank, len(self.paths), world) if not self.paths[k].exists()]
        with ThreadPoolExecutor() as pool:
            for k in tqdm(missing, "decoding", unit=" x 1024", disable=rank > 0 or not missing):
                indices = range(len(self.files))[k * SHARD : (k + 1) * SHARD]
                parts = []
                for first in range(0, len(indices), 64):
                    images = np.stack(list(pool.map(self.decode, indices[first : first + 64])))
                    if self.vae:  # moments (n, 2, 2 C, h, w) in place of pixels
                        x = torch.from_numpy(images).to(device).float() / 127.5 - 1
                        pairs = torch.stack([x, x.flip(3)], 1).flatten(0, 1)  # (2 n, 3, S, S)
                        moments = torch.cat(self.vae.encode(pairs), 1).half()
                        images = moments.unflatten(0, (-1, 2)).cpu().numpy()
                    parts.append(images)
                write_atomically(self.paths[k], lambda file: np.save(file, np.concatenate(parts)))
        if world > 1:
            dist.barrier()
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each shard is an open file
        self.shards = [torch.from_numpy(np.load(path, mmap_mode="c")) for path in self.paths]

    def read(self, keys, pin):
        """[(index, flip), ...] -> uint8 (N, 3, S, S) or moments (N, 2 C, h, w), and labels (N,)."""
        items = []
        for index, flip in keys:
            item = self.shards[index // SHARD][index % SHARD]
            items.append(item[int(flip)] if self.vae else item.flip([2] if flip else []))
        x, y = torch.stack(items), self.labels[[index for index, _ in keys]]
        return (x.pin_memory(), y.pin_memory()) if pin else (x, y)

    def prepare(self, x):
        """On the device: pixels in [-1, 1], or a fresh sample of the latents' posterior, scaled."""
        if not self.vae:
            return x.float() / 127.5 - 1
        mean, logvar = x.float().chunk(2, 1)
        return (mean + (0.5 * logvar).exp() * torch.randn_like(mean)) * self.scale


def micro_batches(length, args, rank, world, start):
    """[(index, flip), ...] of each micro-batch from step `start` on; pure in (seed, epoch)."""

    @functools.lru_cache(2)
    def shuffled(epoch):
        rng = np.random.default_rng([args.seed, epoch])
        order, flips = rng.permutation(length), (rng.random(length) < 0.5) & args.flip
        return list(zip(order.tolist(), flips.tolist()))

    share = args.batch_size // world
    for step in range(start, args.steps):
        first = step * args.batch_size + rank * share
        for k in range(first, first + share, args.micro_batch):
            yield [shuffled(i // length)[i % length] for i in range(k, k + args.micro_batch)]


def read_ahead(data, keys, pin):
    """The batches of these keys; a thread reads and pins the next ones while the device works."""
    with ThreadPoolExecutor(1) as pool:
        coming = (pool.submit(data.read, chosen, pin) for chosen in keys)
        waiting = list(itertools.islice(coming, 3))
        while waiting:
            waiting += itertools.islice(coming, 1)
            yield waiting.pop(0).result()


def resume(method, optimizer, args, about):
    """Loads the newest checkpoint of --out, else --init-from; returns the steps that are done."""
    if not list(Path(args.out, "checkpoints").glob("*.pt")):
        for name in ("model", "ema") if args.init_from else ():
            models.load_weights(getattr(method, name), name, Path(args.init_from), args.official)
        return 0
    path, saved = models.load_checkpoint(Path(args.out))
    before = {**json.loads(json.dumps(vars(parse_args([])))), **saved["args"]}
    changed = [key for key in about if key not in FREE and before.get(key) != about[key]]
    if changed and not args.allow_changes:
        flags = [f"--{key.removesuffix('_hash').replace('_', '-')}" for key in changed]
        advice = "use what log.jsonl says, or another --out, or --allow-changes"
        raise UserError(f"{path} was made with another {', '.join(flags)}: {advice}")
    models.load_state(method, saved["method"], path)
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"]


def save_checkpoint(method, optimizer, args, about, automatic=False):
    """As STEP.pt, or as autosave.pt, which stays until the next STEP.pt."""
    folder = Path(args.out, "checkpoints")
    name = "autosave" if automatic else f"{method.step:07d}"
    content = {"method": method.state_dict(), "optimizer": optimizer.state_dict()}
    content |= {"step": method.step, "args": about}
    write_atomically(folder / f"{name}.pt", lambda file: torch.save(content, file))
    old = sorted(folder.glob("[0-9]*.pt"), key=os.path.getmtime)[: -max(0, args.keep)]
    old += folder.glob(".*.tmp")  # of a run that was killed
    old += [] if automatic else folder.glob("autosave.pt")
    for path in old:
        path.unlink()


def draw_samples(method, diffusion, data, args, step, device):
    """A grid of the EMA's samples, a column for each of at most ten classes."""
    columns = min(10, len(data.classes))
    y = torch.linspace(0, len(data.classes) - 1, columns).round().long().repeat(4).to(device)
    noise = ImageNoise(args.seed, range(len(y)), data.shape, device)()
    images = sample_preview(method.ema, diffusion, noise, y).float()
    if data.vae:
        images = data.vae.decode(images / args.vae_scale)
    path = Path(args.out, "samples", f"{step:07d}.png")
    models.write_grid(path, models.to_uint8(images), columns)


def build(method_cls, args, device, world):
    """Data, noise process, method, and what a checkpoint says about the run. Raises UserError."""
    args.micro_batch = args.micro_batch or max(1, args.batch_size // world)
    sizes = f"{world} processes x {args.micro_batch} images"
    if min(args.batch_size, args.micro_batch) < 1 or args.batch_size % (world * args.micro_batch):
        raise UserError(f"--batch-size {args.batch_size} is not divisible by {sizes}")
    vae = models.load_vae(args.vae).to(device) if args.vae else None
    data = Images(args, vae)
    diffusion = make_diffusion(args.diffusion, clip=not vae)
    network = {**models.parse_model(args.model), "num_classes": len(data.classes)}
    network |= {"in_channels": data.shape[0], "input_size": data.shape[1]}
    network |= {"qk_norm": args.qk_norm, "learn_sigma": diffusion.learned_variance}
    args.classes, args.data_hash, args.vae_hash = data.classes, data.hash, data.vae_hash
    torch.manual_seed(args.seed)
    method = method_cls(args, network, diffusion).to(device)
    about = {**vars(args), "script": Path(sys.argv[0]).name, "network": method.model.config}
    git = f"cd '{Path(__file__).parent}' && git describe --always --dirty --abbrev=40 2>/dev/null"
    run = {"command": sys.argv, "date": time.strftime("%F %T %z"), "host": os.uname().nodename}
    run |= {"commit": subprocess.getoutput(git), "threads": torch.get_num_threads()}
    run |= {"python": sys.version, "torch": torch.__version__, "numpy": np.__version__}
    about["run"] = {**run, "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None}
    return data, diffusion, method, json.loads(json.dumps(about))  # plain, as it is read again


def main(method_cls, args):
    """Trains method_cls(args, network, diffusion): `model`, `ema`, forward(x0, y), after_step."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda, out = torch.cuda.is_available(), Path(args.out)
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    bf16 = args.precision == "bf16" or (cuda and not args.precision)
    torch.set_float32_matmul_precision("high")
    try:
        data, diffusion, method, about = build(method_cls, args, device, world)
        parameters = [p for p in method.parameters() if p.requires_grad]
        betas = (0.9, args.beta2)
        optimizer = torch.optim.AdamW(parameters, args.lr, betas, weight_decay=0.0, fused=True)
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / "lock", "w")  # the system ends the lock with the process
        if rank == 0:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        step = method.step = resume(method, optimizer, args, about)
        data.make_shards(device, rank, world)
    except UserError as error:
        models.fail(error)
    except OSError as error:
        models.fail(f"{error}; is --out {out} in use, or --out or --cache no folder?")
    wrapped = method
    if world > 1:  # starts by giving every rank the weights and EMA of rank 0
        wrapped = nn.parallel.DistributedDataParallel(method, gradient_as_bucket_view=True)
        wrapped.broadcast_buffers = False  # they never change
    method.model.checkpointing = args.checkpointing
    if args.compile:
        torch._dynamo.config.optimize_ddp = False  # compiled one by one: nothing to split
        for block in [module for module in method.modules() if isinstance(module, models.Block)]:
            block.compile()
    accumulate = args.batch_size // (world * args.micro_batch)
    if rank == 0:
        parts = f"{accumulate} x {args.micro_batch} images on each of {world} processes"
        print(f"{sum(p.numel() for p in parameters):,} parameters; {parts}", flush=True)
        log = open(out / "log.jsonl", "a", buffering=1)
        print(json.dumps({"start": step, "processes": world, **about}), file=log)
    signals = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, lambda *_: signals.append(True))
    batches = read_ahead(data, micro_batches(len(data.files), args, rank, world, step), cuda)
    trained, averaged = list(method.model.parameters()), list(method.ema.parameters())
    bar = tqdm(total=args.steps, initial=step, unit="step", disable=rank > 0 or None)
    history, stopping = [], False
    begun = timer = saved = time.perf_counter()
    try:
        while step < args.steps and not stopping:
            torch.manual_seed(seed_of(args.seed, rank, step))
            lr = args.lr * min(1.0, (step + 1) / max(1, args.warmup))
            optimizer.param_groups[0] |= {"lr": lr, "betas": betas}
            rows = []
            for micro in range(1, accumulate + 1):
                x0, y = (part.to(device, non_blocking=True) for part in next(batches))
                wrapped.require_backward_grad_sync = micro == accumulate
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    terms = wrapped(data.prepare(x0), y)
                (terms["loss"] / accumulate).backward()
                rows.append(torch.stack([value.detach().float() for value in terms.values()]))
            norm = nn.utils.clip_grad_norm_(parameters, args.clip_grad or math.inf)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            decay = min(args.ema_decay, (1 + step) / (10 + step) if args.ema_warmup else 1.0)
            with torch.no_grad():
                torch._foreach_lerp_(averaged, trained, 1 - decay)
                method.after_step(step, args.steps)
            history.append(torch.cat([torch.stack(rows).mean(0), norm.detach().float()[None]]))
            step = method.step = step + 1
            bar.update()
            stop = torch.tensor([len(signals), step, -step])
            if world > 1:  # all end at the same step; a GPU works meanwhile
                dist.all_reduce(stop, dist.ReduceOp.MAX)
            stopping = bool(stop[0])
            if stop[1] != -stop[2]:
                sys.exit(f"--out {out}: not the same folder for all processes")
            ending = stopping or step == args.steps
            logging = ending or (args.log_every and step % args.log_every == 0)
            sampling = step == args.steps or (args.sample_every and step % args.sample_every == 0)
            saving = ending or (args.save_every and step % args.save_every == 0)
            late = rank == 0 and time.perf_counter() - saved > 60 * args.save_minutes
            if logging or sampling or saving or late:
                names = [*terms, "grad_norm"]
                for k, values in enumerate(torch.stack(history).tolist(), step + 1 - len(history)):
                    if not all(map(math.isfinite, values)):
                        sys.exit(f"not finite: step {k}, rank {rank}: {dict(zip(names, values))}")
            if logging:
                means = torch.stack(history).mean(0)
                if world > 1:
                    dist.all_reduce(means)
                row = dict(zip(names, (means / world).tolist()))
                row["images_per_s"] = len(history) * args.batch_size / (time.perf_counter() - timer)
                row |= {"lr": lr, "epoch": step * args.batch_size / len(data.files)}
                row |= {"time": time.strftime("%F %T"), "seconds": time.perf_counter() - begun}
                if rank == 0:
                    print(json.dumps({"step": step, **row}), file=log)
                    text = f"step {step}: loss {row['loss']:.4f}, {row['images_per_s']:.0f} img/s"
                    bar.write(text, file=sys.stderr)
                history = []
            if rank == 0 and (saving or late):
                save_checkpoint(method, optimizer, args, about, automatic=not saving)
                saved = time.perf_counter()
            if rank == 0 and sampling:
                draw_samples(method, diffusion, data, args, step, device)
            timer = time.perf_counter() if logging else timer
    except Exception:  # whatever it is, what is trained is kept, if the last step is whole
        whole = optimizer.state[parameters[0]].get("step") == step
        if rank == 0 and whole and all(row.isfinite().all() for row in history):
            save_checkpoint(method, optimizer, args, about, automatic=True)
        raise
    bar.close()
    if rank == 0:
        print(f"step {step} of {args.steps}, in {out}", flush=True)
    if world > 1:
        del wrapped  # as its last holder, the group would wait for a thread of gloo's
        dist.destroy_process_group()


if __name__ == "__main__":
    main(SRA, parse_args())
