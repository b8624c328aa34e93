"""SRA: Self-Representation Alignment (Jiang et al., arXiv 2505.02831, ICLR 2026), for SiT and DiT.

An early block of the student, at the noise level it is trained on, is aligned with a later block of its own EMA, which sees the same image,
the same noise and the same (dropped) labels at a lower noise level. No external encoder; the projection head is not used in sampling.

    x_t  = a(t) x_0 + s(t) eps                       student input
    t'   = clamp(t - 0.2 u, 0, 1),  u ~ U(0, 1)      teacher time (section 3.1); x_t' has the same x_0 and eps
    L    = L_denoise + 0.2 * mean smooth-L1( head(f^(m)(x_t, t, y)), f_ema^(n)(x_t', t', y) )      (section 3.2)

Commands; running one again resumes it from its newest checkpoint
    python train_sra.py --image-size 16 --model DiT-Ti/2 --steps 1000 --batch-size 16 --lr 2e-3 --warmup 100       toy: built-in shapes, CPU
    torchrun --nproc_per_node=8 train_sra.py --data imagenet/train --vae VAE --image-size 256 --model SiT-XL/2 --no-flip --no-ema-warmup
                                                                        8 GPUs; VAE: sd-vae-ft-ema's diffusion_pytorch_model.safetensors
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_sra.py ...         2 nodes, on both
The paper's optimisation is the default: batch 256, AdamW 1e-4, clipping at 1, 400,000 steps (its longest run: 4 million).
`--align-weight 0` trains plain SiT (or DiT, with `--diffusion ddpm`) and builds neither head nor teacher pass.

Implementation details (S/ and D/ are SiT-SRA/ and DiT-SRA/ of the official repository at 1723f85)
 1. Features are the residual stream after a block, without a norm; the teacher's are raw, the student's pass the head [S/models/sit.py].
 2. Blocks, student -> teacher: SiT B 3->8, L 6->16, XL 8->20; DiT B 3->7, L 6->14, XL 8->16 [section 3.2, Table 5]. Other sizes: depth/4
    and 2 depth/3, rounded, as for B and L. The official parser's 4 -> 8 is not a published setting.
 3. Head: Linear D -> 2D, SiLU, Linear 2D -> D [S/models/sit.py]; Xavier, zero bias.
 4. Distance: smooth L1 with beta 0.05 and a constant weight of 0.2 [section 3.2, App. G]; others by `--align-distance`. The official code
    now defaults to a cosine with weight 0.5 along the token axis (`cosine-token`: each channel's map is compared), probably an accident;
    `cosine-channel` compares each token's vector. Both default to weight 0.5 here.
 5. The official code lets the weight decay late, by 10^-((e - 149) / 1000) after epoch 149 of 5004 steps (512 px: 99 and 800); the paper
    does not. `--align-decay 745596 5004000` is that in steps (512 px: 495396 4003200). Off by default.
 6. DiT: the official code has weight 0.04 where the paper says 0.2 [D/train.py]: `--align-weight 0.04`.
 7. DiT: t' = clamp(t - r, 1, 999), r uniform in 0 .. 199 [D/diffusion/gaussian_diffusion.py]; at t = 0 the teacher is the noisier one.
 8. The teacher is the EMA that is also sampled. It runs in the student's precision and stops at its block (paper App. H suggests both).
 9. A step: student, teacher, backward, clip the global gradient norm to 1 (head included), AdamW, EMA [S/train.py].

Differences from the official code
 1. Its EMA starts from another random network on every rank, so most teachers are wrong at first; ours is equal everywhere from step 0.
 2. Its teacher runs all blocks, in fp32. 3. It trains in fp16, we in bf16. 4. EMA warm-up; `--no-ema-warmup`: the paper's 0.9999.
 5. Latents are kept as mean and log-variance in float16; it keeps the standard deviation in float32. The mirror images are encoded too.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image, ImageDraw
from tqdm import tqdm

from diffusion import DIFFUSIONS, ImageNoise, make_diffusion, sample_ode, seed_of
from models import (
    VAE_SCALE,
    Block,
    cache_latents,
    check_log,
    fresh_store,
    hold_lock,
    image_grid,
    load_checkpoint,
    load_vae,
)
from models import (
    newest_checkpoint,
    on_rank_0,
    open_image,
    parse_model,
    shapes,
    to_uint8,
    write_atomically,
)

# --- method: SRA ------------------------------------------------------------------------------------------------------------------------

import torch.nn.functional as F

from models import DiT, frozen_copy

DEFAULTS = {}  # scaffold flags set otherwise: none; the paper's run also passes --no-flip --no-ema-warmup

DISTANCES = {  # each (N, T, D) x (N, T, D) -> scalar; S/loss.py
    "smooth-l1": lambda a, b: F.smooth_l1_loss(a, b, beta=0.05),
    "l1": F.l1_loss,
    "l2": F.mse_loss,
    "cosine-token": lambda a, b: (1 - F.cosine_similarity(a, b, dim=1)).mean(),
    "cosine-channel": lambda a, b: (1 - F.cosine_similarity(a, b, dim=2)).mean(),
}


def method_arguments(parser):
    add = parser.add_argument_group("SRA").add_argument
    add(
        "--student-block",
        type=int,
        help="block whose projected output is aligned (default: the paper's for the model)",
    )
    add(
        "--teacher-block",
        type=int,
        help="block of the EMA it is aligned with (default: the paper's for the model)",
    )
    add(
        "--align-weight",
        type=float,
        help="0.2, or 0.5 for cosine distances; 0: plain SiT or DiT, no head, no teacher",
    )
    add("--align-distance", choices=DISTANCES, default="smooth-l1")
    add(
        "--align-decay",
        type=int,
        nargs=2,
        metavar=("START", "TENFOLD"),
        help="weight * 10^-((step - START) / TENFOLD) after step START",
    )
    add(
        "--time-gap",
        type=float,
        default=0.2,
        help="the teacher is up to this much nearer to the data, as a fraction of all time",
    )
    add(
        "--head",
        choices=("mlp", "none"),
        default="mlp",
        help="none: features against features, which the paper found to hurt",
    )


def alignment_blocks(depth, ddpm):
    """Student and teacher block (counted from 1) for a network of that depth: SRA section 3.2, Table 5; elsewhere its rule of thumb."""
    if depth == 28:
        return (8, 16) if ddpm else (8, 20)
    if ddpm and depth in (12, 24):
        return depth // 4, 7 * depth // 12
    return max(1, round(depth / 4)), round(2 * depth / 3)


def alignment_weight(step, weight, decay):
    """Weight of the alignment term at a 0-based step (or epoch, if decay is in epochs): S/train.py, D/train.py."""
    start, tenfold = decay or (0, math.inf)
    return weight * 0.1 ** (max(0, step - start) / tenfold)


def teacher_time(t, u, gap):
    """Times (N,) of the teacher from the student's t and u ~ U(0, 1): S/loss.py; DDPM's steps: D/diffusion/gaussian_diffusion.py."""
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
    """`model` is trained, `ema` averages it: teacher, and what is sampled. The loop sets `step`, the number of finished steps."""

    def __init__(self, args, network, diffusion):
        super().__init__()
        self.diffusion, self.step = diffusion, 0
        self.label_drop, self.null_label = args.label_drop, network["num_classes"]
        self.model = DiT(**network)
        self.ema = frozen_copy(self.model)
        default = 0.5 if args.align_distance.startswith("cosine") else 0.2
        self.weight = default if args.align_weight is None else args.align_weight
        self.decay, self.distance, self.gap = (
            args.align_decay,
            DISTANCES[args.align_distance],
            args.time_gap,
        )
        if self.decay and (self.decay[0] < 0 or self.decay[1] < 1):
            raise ValueError(
                f"--align-decay {self.decay[0]} {self.decay[1]}: START must be 0 or more, TENFOLD 1 or more"
            )
        if self.weight == 0:
            return
        if args.diffusion == "edm":
            raise ValueError(
                "SRA is defined for --diffusion flow, gvp and ddpm; with edm only --align-weight 0"
            )
        student, teacher = alignment_blocks(network["depth"], args.diffusion == "ddpm")
        self.student_block = student if args.student_block is None else args.student_block
        self.teacher_block = teacher if args.teacher_block is None else args.teacher_block
        if not 1 <= self.student_block <= self.teacher_block <= network["depth"]:
            blocks = f"{self.student_block} and {self.teacher_block}"
            raise ValueError(
                f"student and teacher block {blocks}: need 1 <= student <= teacher <= {network['depth']} (the depth)"
            )
        self.head = projection_head(network["hidden_size"]) if args.head == "mlp" else nn.Identity()

    def forward(self, x0, y, t=None, noise=None, drop=None, u=None):
        """Images x0 (N, C, H, W) in [-1, 1], labels y (N,) -> scalars. Draws: t (N,), noise like x0, drop and u (N,) from U(0, 1)."""
        n = len(x0)
        t = self.diffusion.draw_t(n, x0.device) if t is None else t
        noise = torch.randn_like(x0) if noise is None else noise
        drop = torch.rand(n, device=x0.device) if drop is None else drop
        u = torch.rand(n, device=x0.device) if u is None else u
        y = torch.where(drop < self.label_drop, self.null_label, y)
        x_t = self.diffusion.add_noise(x0, noise, t)
        if self.weight == 0:
            denoise = self.diffusion.loss(
                self.model(*self.diffusion.net_inputs(x_t, t), y), x0, noise, t
            ).mean()
            return {"loss": denoise, "denoise": denoise}
        out, features = self.model(
            *self.diffusion.net_inputs(x_t, t), y, features=(self.student_block,)
        )
        denoise = self.diffusion.loss(out, x0, noise, t).mean()
        t_teacher = teacher_time(t, u, self.gap)
        x_teacher = self.diffusion.add_noise(x0, noise, t_teacher)
        with torch.no_grad():
            target = self.ema.tokens_after(
                *self.diffusion.net_inputs(x_teacher, t_teacher), y, self.teacher_block
            )  # (N, T, D)
        align = self.distance(self.head(features[self.student_block]).float(), target.float())
        return {
            "loss": denoise + alignment_weight(self.step, self.weight, self.decay) * align,
            "denoise": denoise,
            "align": align,
        }

    def after_step(self, step, steps):
        """Nothing to update: the teacher is the EMA, which the loop keeps."""


# --- end method -------------------------------------------------------------------------------------------------------------------------

# The rest is the same in every training script: arguments, data, checkpoints, loop.

SHAPES = {  # built-in data, by class: colour, corners, (width, height) of each part, turn in degrees, size of the hole
    "red circle": ((220, 40, 40), 64, [(1, 1)], 0, 0),
    "green square": ((40, 170, 60), 4, [(1, 1)], 0, 0),
    "blue triangle": ((40, 70, 220), 3, [(1, 1)], 0, 0),
    "yellow bar": ((235, 195, 20), 4, [(1.2, 0.4)], 0, 0),
    "purple pillar": ((140, 50, 180), 4, [(0.4, 1.2)], 0, 0),
    "cyan ring": ((20, 180, 200), 64, [(1, 1)], 0, 0.55),
    "orange cross": ((240, 130, 20), 4, [(1.2, 0.4), (0.4, 1.2)], 0, 0),
    "pink diamond": ((240, 90, 170), 4, [(1, 1)], 45, 0),
    "brown frame": ((130, 80, 40), 4, [(1, 1)], 0, 0.55),
    "black saltire": ((20, 20, 20), 4, [(1.2, 0.4), (0.4, 1.2)], 45, 0),
}


def fail(message, every_rank=False):
    """A user error: one line on stderr, exit code 2. What every rank sees, the first of each machine prints; the others wait for it."""
    if every_rank or os.environ.get("LOCAL_RANK", "0") == "0":
        print(
            f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}",
            file=sys.stderr,
            flush=True,
        )
    else:
        time.sleep(3)
    sys.exit(2)


def explain(kind, error, trace):
    """sys.excepthook: what befell the machine is told in one line, what is wrong with the program as a traceback."""
    text = " ".join(str(error).split()) or "interrupted"
    if issubclass(kind, torch.OutOfMemoryError):
        text += " (use a smaller --micro-batch, or --checkpointing)"
    elif issubclass(kind, dist.DistError):
        text += " (a process was lost, or they cannot reach each other)"
    elif "gloo/transport" in text:
        text = (
            text.partition(". ")[0]
            + " (another process was lost: the same command goes on from the newest checkpoint)"
        )
    elif not issubclass(kind, (OSError, KeyboardInterrupt)):
        return sys.__excepthook__(kind, error, trace)
    print(
        f"\n{Path(sys.argv[0]).name}: error: {text}", file=sys.__stderr__, flush=True
    )  # torch.distributed redirects sys.stderr here
    os._exit(1)  # at once: threads that wait for other processes would not end


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error, add, switch = (
        fail,
        parser.add_argument_group("run").add_argument,
        argparse.BooleanOptionalAction,
    )
    add(
        "--data",
        default="shapes",
        help="'shapes' (built in) or a folder of class folders of images",
    )
    add("--image-size", type=int, default=32, help="side in pixels; images are cropped as in ADM")
    add(
        "--vae",
        help="weights of the Stable-Diffusion VAE (.safetensors or .bin): train on its latents, encoded once",
    )
    add("--latents", help="the file that caches them (default: DATA.SIZE.latents)")
    add("--flip", action=switch, default=True, help="mirror half of the images")
    add(
        "--out",
        default=f"results/{Path(sys.argv[0]).stem}",
        help="folder of log.jsonl, samples/, checkpoints/",
    )
    add("--model", default="DiT-Ti/4", help="DiT-SIZE/PATCH (or SiT-): Ti S B L XL H, 2 4 8")
    add("--diffusion", choices=DIFFUSIONS, default="flow")
    add("--qk-norm", action=switch, default=False)
    add("--steps", type=int, default=400_000)
    add(
        "--batch-size",
        type=int,
        default=256,
        help="global: over all processes and accumulated micro-batches",
    )
    add(
        "--micro-batch",
        type=int,
        help="images per process and forward (default: all of the process's share)",
    )
    add("--lr", type=float, default=1e-4)
    add("--warmup", type=int, default=0, help="steps of linear learning-rate warm-up")
    add("--clip-grad", type=float, default=1.0, help="global gradient norm; 0: no clipping")
    add("--ema-decay", type=float, default=0.9999)
    add(
        "--ema-warmup",
        action=switch,
        default=True,
        help="decay min(ema-decay, (1 + s) / (10 + s)) at step s",
    )
    add(
        "--label-drop",
        type=float,
        default=0.1,
        help="share of labels replaced by the null label, for guidance",
    )
    add(
        "--precision",
        choices=("bf16", "fp32"),
        help="autocast (default: bf16 on CUDA, fp32 on CPU)",
    )
    add("--compile", action=switch, default=False, help="torch.compile every transformer block")
    add(
        "--checkpointing",
        action=switch,
        default=False,
        help="keep no activations of blocks: a third more time, far less memory",
    )
    add("--seed", type=int, default=0)
    add(
        "--workers", type=int, help="data-loading processes per rank (default: 8 on CUDA, 0 on CPU)"
    )
    add("--log-every", type=int, default=50)
    add(
        "--sample-every",
        type=int,
        default=10_000,
        help="steps between sample grids; 0: only at the end",
    )
    add(
        "--save-every",
        type=int,
        default=10_000,
        help="steps between checkpoints; 0: only at the end",
    )
    add("--keep", type=int, default=0, help="how many checkpoints to keep, the newest; 0: all")
    method_arguments(parser)
    parser.set_defaults(vae_hash=None, **DEFAULTS)
    args = parser.parse_args(argv)
    if args.latents and not args.vae:
        fail("--latents needs --vae")
    least = {"image_size": 1, "steps": 1, "batch_size": 1, "log_every": 1, "micro_batch": 1}
    most = {"ema_decay": 1, "label_drop": 1, "time_gap": 1, "mask_ratio": 1}
    for name, value in vars(args).items():
        if value == "" or (
            isinstance(value, (int, float))
            and not least.get(name, 0) <= value <= most.get(name, 2**63 - 1)
        ):
            fail(f"--{name.replace('_', '-')} {value!r} is out of range")
    return args


def draw_shape(index, size):
    """Image `index` of the built-in data, class index % 10: place, size, tilt and the grey behind it depend on the index alone."""
    rng = np.random.default_rng(index)
    colour, corners, parts, turn, hole = list(SHAPES.values())[index % len(SHAPES)]
    centre, radius, grey = (
        rng.uniform(0.46, 0.54, 2),
        rng.uniform(0.34, 0.42),
        (int(rng.integers(200, 245)),) * 3,
    )
    tilt = np.radians(turn + rng.uniform(-5, 5))
    image = Image.new("RGB", (4 * size, 4 * size), grey)
    for (width, height), fill in [(part, colour) for part in parts] + [((hole, hole), grey)] * (
        hole > 0
    ):
        angles = 2 * np.pi * np.arange(corners) / corners + (np.pi / 4 if corners == 4 else 0)
        x, y = width * np.sin(angles), -height * np.cos(angles)
        points = np.stack(
            [x * np.cos(tilt) - y * np.sin(tilt), x * np.sin(tilt) + y * np.cos(tilt)], 1
        )
        ImageDraw.Draw(image).polygon(
            list(map(tuple, 4 * size * (centre + radius * points))), fill=fill
        )
    return image.resize((size, size), Image.Resampling.BOX)


def center_crop(image, size):
    """ADM's crop: halve with a box filter while the short side stays >= size, bicubic to size, cut out the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    width, height = (max(size, round(side * size / min(image.size))) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop(
        (left, top, left + size, top + size)
    )


class Images(torch.utils.data.Dataset):
    """Items by (index, flip): uint8 (3, size, size) and label, or a message naming an unreadable file. Classes in alphabetical order."""

    def __init__(self, data, size, rank, world, check=True):
        self.size, self.classes, self.files, self.length, self.digest = (
            size,
            list(SHAPES),
            None,
            20_000,
            "shapes",
        )
        if data == "shapes":
            return
        if not os.path.isdir(data):
            fail(f"--data {data}: no such folder")
        self.files, self.classes, names = [], [], hashlib.sha256()
        for name in sorted(os.listdir(data)):
            paths = (
                os.path.join(folder, file)
                for folder, _, files in os.walk(os.path.join(data, name))
                for file in files
            )
            paths = sorted(
                path
                for path in paths
                if path.lower().endswith((".png", ".jpg", ".jpeg", ".webp", ".bmp"))
            )
            self.files += [(path, len(self.classes)) for path in paths]
            self.classes += [name] if paths else []
            names.update(repr([os.path.relpath(path, data) for path in paths]).encode())
        if not self.files:
            fail(
                f"--data {data}: no images found; expected {data}/CLASS/NAME.png (or jpg, jpeg, webp, bmp)"
            )
        self.length, self.digest = len(self.files), names.hexdigest()
        for path, _ in (
            self.files[rank::world] if check else ()
        ):  # headers only: this finds most bad files before training
            try:
                open_image(path).close()
            except Exception as error:
                fail(f"cannot read image {path}: {error}", every_rank=True)

    def __len__(self):
        return self.length

    def prepare(self, images):
        return images.float() / 127.5 - 1

    def __getitem__(self, key):
        index, flip = key
        path, label = self.files[index] if self.files else (None, index % len(SHAPES))
        try:
            image = (
                center_crop(open_image(path).convert("RGB"), self.size)
                if path
                else draw_shape(index, self.size)
            )
        except Exception as error:
            return f"cannot read image {path}: {error}"
        pixels = np.asarray(image).transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(pixels[:, :, ::-1] if flip else pixels)), label


def collate(items):
    """Images (N, 3, H, W) and labels (N,), or the first error: messages cross process boundaries as text."""
    if isinstance(items, tuple):  # latents come as whole batches
        return items
    return next(
        (item for item in items if isinstance(item, str)), None
    ) or torch.utils.data.default_collate(items)


def read_order(length, args, rank, world, start):
    """The [(index, flip), ...] of each micro-batch of a rank from step `start` on: a pure function of (seed, epoch), so nothing is saved,
    and the images of a step do not depend on how they are split.
    """
    share, current = args.batch_size // world, None
    for step in range(start, args.steps):
        epoch, place = divmod(step, length // args.batch_size)
        if epoch != current:
            rng, current = np.random.default_rng([args.seed, epoch]), epoch
            order, flips = rng.permutation(length), rng.random(length) < 0.5
        first = place * args.batch_size + rank * share
        for a in range(first, first + share, args.micro_batch):
            chosen = slice(a, a + args.micro_batch)
            yield list(zip(order[chosen].tolist(), (flips[chosen] & args.flip).tolist()))


def logged_step(line):
    """The step of a line of log.jsonl; 0 for a start record, infinity for a damaged line."""
    try:
        return json.loads(line).get("step", 0) + 0
    except (ValueError, AttributeError, TypeError):
        return math.inf


def outlive_signals(worker):
    """Loader processes go on for a minute after a signal to all processes, so that the training process can finish its step and save."""
    os.setpgrp()
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))


def main(method_cls, args):
    """Train method_cls(args, network, diffusion), an nn.Module with `model`, `ema`, forward(x0, y) -> {"loss": ..., ...}, after_step.

    Every trainable parameter must get a gradient in every step (DDP). State below `frozen` is not saved.
    """
    sys.excepthook = explain
    rank, world, local = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    cuda, out = device.type == "cuda", Path(args.out)
    if cuda and local >= torch.cuda.device_count():
        fail(
            f"{local + 1} processes or more on this machine, which has {torch.cuda.device_count()} GPUs"
        )
    torch.set_float32_matmul_precision("high")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names of files that are not UTF-8
    args.micro_batch = args.micro_batch or max(1, args.batch_size // world)
    accumulate, rest = divmod(args.batch_size, world * args.micro_batch)
    if rest or not accumulate:
        fail(
            f"--batch-size {args.batch_size} is not divisible by {world} processes x --micro-batch {args.micro_batch}"
        )
    bf16 = (args.precision or ("bf16" if cuda else "fp32")) == "bf16"

    latents = Path(args.latents or f"{args.data.rstrip('/')}.{args.image_size}.latents")
    data = Images(
        args.data, args.image_size, rank, world, check=not (args.vae and latents.exists())
    )
    if len(data.classes) < 2 and args.label_drop > 0:
        fail(
            f"--data {args.data} has one class folder, {data.classes[0]}: guidance needs two or more; or use --label-drop 0"
        )
    if len(data) < args.batch_size:
        fail(
            f"--data {args.data} has {len(data)} images, fewer than --batch-size {args.batch_size}"
        )

    vae, channels, side = (
        (None, 4, args.image_size // 8) if args.vae else (None, 3, args.image_size)
    )
    diffusion = make_diffusion(args.diffusion, clip=not args.vae)
    try:
        if args.vae:
            vae, args.vae_hash = load_vae(args.vae)
            vae.to(device)
        torch.manual_seed(args.seed)
        network = {
            "input_size": side,
            "in_channels": channels,
            "num_classes": len(data.classes),
            **parse_model(args.model),
        }
        method = method_cls(
            args,
            {**network, "learn_sigma": diffusion.learned_variance, "qk_norm": args.qk_norm},
            diffusion,
        ).to(device)
    except ValueError as error:
        fail(error)
    parameters = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0, fused=True)

    if world > 1:
        if cuda:
            torch.cuda.set_device(device)
        meeting = {"store": fresh_store(rank, world), "rank": rank, "world_size": world}
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **meeting)
    description = {
        **vars(args),
        "script": Path(sys.argv[0]).name,
        "classes": data.classes,
        "network": method.model.config,
    }

    def stored_state():  # all but a frozen teacher, which its own checkpoint holds
        return {k: v for k, v in method.state_dict().items() if not k.startswith("frozen.")}

    def find_start():
        check_log(out / "log.jsonl")
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        locks.append(hold_lock(out / "lock"))
        for path in (out / "checkpoints").glob(".*.tmp"):  # what a killed run was writing
            path.unlink()
        return newest_checkpoint(out / "checkpoints")

    locks = []
    try:
        path = on_rank_0(find_start)
        saved = load_checkpoint(path, checked=True) if path else None
    except ValueError as error:
        fail(error)
    step, rows = 0, []
    if saved:
        compared = {
            k: v
            for k, v in description.items()
            if k not in ("out", "workers", "checkpointing", "keep")
        }
        was = {k: saved["args"].get(k) for k, v in compared.items() if saved["args"].get(k) != v}
        named = {"classes": "other classes", "vae_hash": "another VAE"}
        changed = [
            f"--{k.replace('_', '-')} {description[k]} (it has {v})"
            for k, v in was.items()
            if k not in ("network", *named)
        ]
        changed += [text for k, text in named.items() if k in was]
        state = {
            f"{part}.{k}": v for part in ("model", "ema") for k, v in saved[part].items()
        } | saved["method"]
        if saved["step"] > args.steps:
            fail(
                f"{path} is beyond --steps {args.steps}: ask for more, or give this run another --out"
            )
        if {"script", "classes", "network", "diffusion", "vae_hash"} & set(was) or shapes(
            state
        ) != shapes(stored_state()):
            fail(
                f"{path} does not fit {', '.join(changed) or 'this network'}: use the flags it was made with, or another --out"
            )
        if changed and rank == 0:
            print(f"resuming with {', '.join(changed)}", flush=True)
        method.load_state_dict(state, strict=False)  # strict above
        optimizer.load_state_dict(saved["optimizer"])
        step, rows = saved["step"], saved["log"].tolist()
        del saved, state
    workers = (8 if cuda else 0) if args.workers is None else args.workers
    if args.vae:
        try:
            data = cache_latents(latents, data, vae, args.vae_hash, collate, workers)
        except (ValueError, OSError) as error:
            fail(error)
    method.model.checkpointing = args.checkpointing
    wrapped, options = (
        method,
        {
            "device_ids": [local] if cuda else None,
            "broadcast_buffers": False,
            "gradient_as_bucket_view": True,
        },
    )
    if world > 1:
        warnings.filterwarnings(
            "ignore", message=".*broadcast_buffers"
        )  # its new name is unknown to older versions
        wrapped = nn.parallel.DistributedDataParallel(
            method, **options
        )  # starts by giving every rank the weights and EMA of rank 0
    if args.compile:
        torch._dynamo.config.optimize_ddp = (
            False  # blocks are compiled one by one: nothing for DDP to split
        )
        for module in method.modules():
            if isinstance(module, Block):
                module.compile(dynamic=getattr(method, "dynamic", None))

    def save():
        own = {k: v for k, v in stored_state().items() if not k.startswith(("model.", "ema."))}
        content = {
            "model": method.model.state_dict(),
            "ema": method.ema.state_dict(),
            "method": own,
            "optimizer": optimizer.state_dict(),
        }
        content |= {
            "step": step,
            "args": description,
            "log": torch.tensor(rows, dtype=torch.float64),
        }
        path = out / "checkpoints" / f"{step:07d}.pt"
        write_atomically(path, lambda file: torch.save(content, file))
        older = sorted(
            (p for p in path.parent.glob("*.pt") if p.stem.isdigit() and int(p.stem) < step),
            key=lambda p: int(p.stem),
        )
        for p in (
            older[: max(0, len(older) - args.keep + 1)] if args.keep else ()
        ):  # the new one is whole
            p.unlink()

    def draw_samples(lines=4):  # one column a class, at most ten
        labels = (
            np.linspace(0, len(data.classes) - 1, min(10, len(data.classes)))
            .round()
            .astype(int)
            .tolist()
            * lines
        )
        noise = ImageNoise(args.seed, range(len(labels)), (channels, side, side), device)()
        images = sample_ode(
            method.ema, diffusion, noise, torch.tensor(labels, device=device), 50, "euler"
        )
        grid = image_grid(
            to_uint8(vae.decode(images.float() / VAE_SCALE) if vae else images),
            len(labels) // lines,
        )
        write_atomically(out / "samples" / f"{step:07d}.png", lambda file: grid.save(file, "png"))

    stop = []  # times of signals. The first ends the run after this step; one that comes 2 s later, at once: torchrun repeats the first

    def on_signal(number, _):
        if stop and time.monotonic() > stop[0] + 2:
            os._exit(128 + number)
        stop.append(time.monotonic())

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    order = read_order(len(data), args, rank, world, step)
    options = {
        "num_workers": workers,
        "collate_fn": collate,
        "pin_memory": cuda,
        "worker_init_fn": outlive_signals,
    }
    batches = iter(torch.utils.data.DataLoader(data, batch_sampler=order, **options))
    bar = tqdm(total=args.steps, initial=step, disable=rank > 0, unit="step", dynamic_ncols=True)
    if rank == 0:
        hardware = (
            torch.cuda.get_device_name(device)
            if cuda
            else f"CPU, {torch.get_num_threads()} threads"
        )
        start = {
            "start": step,
            "command": sys.argv,
            "torch": torch.__version__,
            "processes": world,
            "hardware": hardware,
            **description,
        }
        lines = (
            (out / "log.jsonl").read_text().split("\n")[:-1] if (out / "log.jsonl").exists() else []
        )
        lines = [
            line for line in lines if logged_step(line) <= step
        ]  # a killed run may have logged further
        text = "".join(f"{line}\n" for line in [*lines, json.dumps(start)])
        write_atomically(out / "log.jsonl", lambda file: file.write(text.encode()))
        bar.write(f"batch {args.batch_size} = {world} processes x {accumulate} micro-batches x {args.micro_batch}; {len(data)} images; "
                  f"{sum(p.numel() for p in parameters) / 1e6:.1f} M trainable parameters")  # fmt: skip
    trained, averaged = list(method.model.parameters()), list(method.ema.parameters())
    pending, names, timer, timed = [], [], 0.0, None
    while step < args.steps:
        flag = torch.tensor(float(len(stop)))
        agreement = (
            dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True) if world > 1 else None
        )  # do all ranks stop after this step?
        torch.manual_seed(seed_of(args.seed, rank, step))
        method.step, sums = step, 0
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / max(1, args.warmup))
        for micro in range(accumulate):
            batch = next(batches)
            if isinstance(batch, str):
                bar.close()
                fail(batch, every_rank=True)
            x0, y = (v.to(device, non_blocking=True) for v in batch)
            x0 = data.prepare(x0)
            with (
                contextlib.nullcontext()
                if micro == accumulate - 1 or world == 1
                else wrapped.no_sync()
            ):
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    terms = wrapped(x0, y)
                (terms["loss"] / accumulate).backward()
            sums = sums + torch.stack([v.detach().float() for v in terms.values()]) / accumulate
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if args.clip_grad:
            nn.utils.clip_grads_with_norm_(parameters, args.clip_grad, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(args.ema_decay, (1 + step) / (10 + step)) if args.ema_warmup else args.ema_decay
        with torch.no_grad():
            torch._foreach_lerp_(averaged, trained, 1 - decay)
            method.after_step(step, args.steps)
        step, names = step + 1, [*terms, "grad_norm"]
        pending.append(torch.cat([sums, norm.detach().float().reshape(1)]))
        timer, timed = (
            (time.perf_counter(), 0) if timed is None else (timer, timed + args.batch_size)
        )  # the first step is not timed
        if agreement:
            agreement.wait()
        stopping = bool(flag) or step == args.steps
        logging = step % args.log_every == 0 or step == args.steps
        sampling = step == args.steps or (args.sample_every and step % args.sample_every == 0)
        saving = stopping or (args.save_every and step % args.save_every == 0)
        bar.update()
        if not (logging or sampling or saving):
            continue
        means = torch.stack(pending)  # (steps since the last time, terms): read back only here
        mine, pending = means.tolist(), []
        if world > 1:
            dist.all_reduce(means)
        rows += (means / world).tolist()
        if not torch.isfinite(means).all():
            bar.close()
            for k, row in enumerate(mine, step - len(mine) + 1):
                if not all(map(math.isfinite, row)):
                    values = ", ".join(f"{name} {v:g}" for name, v in zip(names, row))
                    sys.exit(f"stopped, not finite: step {k}, rank {rank}: {values}")
            sys.exit(1)
        if logging:
            averages = {name: sum(column) / len(rows) for name, column in zip(names, zip(*rows))}
            rate, rows = timed / (time.perf_counter() - timer), []
            bar.set_postfix({k: f"{v:.4g}" for k, v in averages.items()} | {"img/s": f"{rate:.1f}"})
            if rank == 0:
                epoch = step * args.batch_size / len(data)
                with open(out / "log.jsonl", "a") as log:
                    log.write(
                        json.dumps(
                            {
                                "step": step,
                                **averages,
                                "lr": group["lr"],
                                "epoch": epoch,
                                "images_per_s": rate,
                            }
                        )
                        + "\n"
                    )
        if rank == 0 and sampling:
            draw_samples()
        if rank == 0 and saving:
            save()
        if stopping:
            break
        timer, timed = time.perf_counter(), 0
    bar.close()
    if rank == 0:
        print(
            f"step {step} of {args.steps}, in {out}"
            + ("" if step == args.steps else ": the same command goes on from here"),
            flush=True,
        )
    if world > 1:
        dist.barrier()
        del wrapped  # while the group lives: as its last holder it would wait, with the GIL, for a thread of gloo's that may want the GIL
        dist.destroy_process_group()


if __name__ == "__main__":
    main(SRA, parse_args())
