"""Self-Transcendence: Is External Feature Guidance Indispensable ...? (Sun et al., 2601.07773).

Two runs for SiT, no external encoder. Stage 1 trains a SiT with a head on an early block that
predicts what the whole network predicts. Stage 2 trains a new SiT: its middle block regresses a
deeper block of the frozen stage-1 network, after classifier-free guidance of its features.

    x_t = a(t) x_0 + s(t) eps,  v = a' x_0 + s' eps,  m = 1 where 0.4 <= t <= 0.7, else 0
    stage 1:  L = L_gen + 0.5 mean m ||linear(LN(MLP(h_k))) - v||^2       h_k: stream after block k
    stage 2:  f_g = f_u + 30 (f_c - f_u),   f_c = T_n(x_t, t, y),   f_u = T_n(x_t, t, null)
              L = L_gen + 0.5 mean m ||MLP(h_k) - f_g||^2  until --stop-step, then L_gen

Commands; the same command goes on with an interrupted run:
    # toy: built-in shapes, CPU
    python train_selftranscendence.py --image-size 16 --model DiT-Ti/2 --steps 500 \
        --batch-size 16 --lr 2e-3 --warmup 100 --ema-warmup --out results/stage1
    python train_selftranscendence.py --image-size 16 --model DiT-Ti/2 --steps 1000 \
        --batch-size 16 --lr 2e-3 --warmup 100 --ema-warmup --out results/stage2 \
        --stage 2 --teacher results/stage1 --stop-step 250
    # 8 GPUs, 40 + 80 epochs
    torchrun --nproc_per_node=8 train_selftranscendence.py --data imagenet/train \
        --vae vae.safetensors --image-size 256 --model SiT-XL/2 --steps 200000 --out results/stage1
    torchrun --nproc_per_node=8 train_selftranscendence.py --data imagenet/train \
        --vae vae.safetensors --image-size 256 --model SiT-XL/2 --steps 400000 \
        --stage 2 --teacher results/stage1 --out results/stage2
    # the paper's 400 epochs: the same stage 1; for B --model SiT-B/2 in both
    torchrun --nproc_per_node=8 train_selftranscendence.py --data imagenet/train \
        --vae vae.safetensors --image-size 256 --model SiT-XL/2 --steps 2000000 \
        --stage 2 --teacher results/stage1 --out results/stage2_400
    # 2 nodes, on both: each of these under
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
        train_selftranscendence.py --data imagenet/train --vae vae.safetensors --image-size 256 \
        --model SiT-XL/2 --steps 200000 --out results/stage1
`--align-weight 0`: plain SiT or DiT. A plain SiT can be the teacher too, as an ablation.

Implementation details (csslc/Self-Transcendence at 42fde5d; T2, sh2: train_*.py, .sh, stage 2)
 1. Stage 1 predicts the velocity, the abstracts say VAE features [loss.py:226]: --stage1-target x0.
 2. MLP D -> 2048 -> 2048 -> D, SiLU [models:18]; 2 D wide below D = 768 (ours).
 3. Blocks: stage 1: 2; stage 2: depth/2 -> 2 depth/3, B 6 -> 8 [sh2], L 12 -> 16, XL 14 -> 18.
 4. Teacher: online weights [T2:178], fp32: bf16 moves f_g by 1 %. It stops at its block.
 5. Guidance 30, weight 0.5, MSE, stop at 100,000 [sh2]; 50,000 from 24 blocks (third-party notes).
 6. qk-norm, no flips, no EMA warm-up. Students without label regress f_g too [T2:285].
Differences: the official --t-range masks nothing, (N, 1, 1, 1) meets (N,) [loss.py:237]: --t-mode
released. Its stage 2 stops with a NameError [T2:188]. Its teacher runs on all images, to the end.
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

# --- method: Self-Transcendence

from models import DiT, frozen_copy

DEFAULTS = {"qk_norm": True}

LOGGED = ("align", "align_in", "align_kept", "align_dropped", "guidance_gap", "guided_norm")


def method_arguments(parser):
    add = parser.add_argument_group("Self-Transcendence").add_argument
    add("--stage", type=int, choices=(1, 2), default=1, help="1: teacher; 2: guided by it")
    add("--align-weight", type=float, default=0.5, help="of the stage's own term; 0: plain SiT")
    add("--student-block", type=int, help="block of the head (default: 2; stage 2: depth / 2)")
    add("--head-width", type=int, help="of the head (default: 2048, below D = 768 twice D)")
    ends = ("LOW", "HIGH")
    add(
        "--t-range", type=float, nargs=2, default=[0.4, 0.7], metavar=ends, help="times of the term"
    )
    modes = ("masked", "selected", "all", "released")
    add("--t-mode", choices=modes, default="masked", help="for times outside: see window_mean")
    target = "stage 1: where its error is measured (default: velocity)"
    add("--stage1-target", choices=("velocity", "x0"), help=target)
    add("--teacher", metavar="CKPT", help="stage 2: a checkpoint or run folder of stage 1")
    add("--teacher-weights", choices=("model", "ema"), default="model", help="stage 2: which of it")
    add("--teacher-block", type=int, help="stage 2: regressed block (default: 2 depth / 3)")
    add("--teacher-precision", choices=("fp32", "bf16"), default="fp32", help="stage 2: of it")
    add("--feature-guidance", type=float, default=30.0, help="stage 2: w of f_u + w (f_c - f_u)")
    add(
        "--stop-step", type=int, help="stage 2: steps with the term (default: 100000; L, XL: 50000)"
    )
    targets = ("conditional", "unconditional", "skip")
    add("--drop-target", choices=targets, default="conditional", help="stage 2: of null labels")


def window_mean(values, inside, counted, mode, share):
    """Terms (N,) -> scalar. inside, counted (N,), 0 or 1: t in --t-range; not skipped.

    masked: the others count as 0. selected: mean of those inside. all: every t, times `share`, the
    window's length. released: every t, times the share of the batch that is inside.
    """
    if mode == "selected":
        return (values * inside * counted).sum() / (inside * counted).sum().clamp(min=1)
    if mode == "masked":
        return (values * inside * counted).mean()
    return (share if mode == "all" else inside.mean()) * (values * counted).mean()


def projection_head(dim, width, out_size=None):
    """MLP of three layers; in stage 1 (out_size) then LayerNorm and a linear layer."""
    layers = [nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
    layers.append(nn.Linear(width, dim))
    if out_size:
        layers.append(nn.LayerNorm(dim, 1e-6, elementwise_affine=False))
        layers.append(nn.Linear(dim, out_size))
    for layer in layers[::2]:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class SelfTranscendence(nn.Module):
    """`model` is trained, `ema` averages it and is sampled."""

    def __init__(self, args, network, diffusion):
        super().__init__()
        self.check(args, network["depth"])
        self.args = args
        self.diffusion = diffusion
        self.step = 0  # set by the loop: steps that are done
        self.null_label = network["num_classes"]
        self.model = DiT(**network)
        self.ema = frozen_copy(self.model)
        self.frozen = []  # stage 2: the teacher, in a list so that it is no part of the state
        if args.align_weight == 0:
            return
        depth, dim = network["depth"], network["hidden_size"]
        self.student_block = args.student_block or (2 if args.stage == 1 else depth // 2)
        self.teacher_block = args.teacher_block or 2 * depth // 3
        self.everywhere = args.t_mode in ("all", "released")
        self.stop_step = math.inf
        width = args.head_width or (2048 if dim >= 768 else 2 * dim)
        if args.stage == 1:
            out_size = self.model.final_layer.linear.out_features
            self.head = projection_head(dim, width, out_size)
        else:
            self.head = projection_head(dim, width)
            self.stop_step = 50_000 if depth >= 24 else 100_000
            if args.stop_step is not None:
                self.stop_step = args.stop_step
            self.frozen.append(self.load_teacher(args))

    def check(self, args, depth):
        low, high = args.t_range
        if not 0 <= low <= high <= 1:
            raise UserError(f"--t-range {low:g} {high:g}: need 0 <= LOW <= HIGH <= 1")
        others = (
            ("teacher", "teacher_block", "stop_step") if args.stage == 1 else ("stage1_target",)
        )
        for name in others:
            if getattr(args, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} is of the other stage: this is --stage {args.stage}")
        if args.align_weight and args.diffusion not in ("flow", "gvp"):
            raise UserError("Self-Transcendence needs --diffusion flow or gvp, or --align-weight 0")
        for block in (args.student_block, args.teacher_block):
            if block is not None and not 1 <= block <= depth:
                raise UserError(f"there is no block {block}: blocks are 1 to {depth}")

    def load_teacher(self, args):
        """--teacher's network up to its block: the student's in all but its weights."""
        if not args.teacher:
            raise UserError("--stage 2 needs --teacher, a checkpoint or run folder of stage 1")
        teacher, trained = models.load_network(Path(args.teacher), args.teacher_weights)
        theirs = {**teacher.config, "diffusion": trained["diffusion"]}
        ours = {**self.model.config, "diffusion": args.diffusion}
        theirs["VAE"], ours["VAE"] = trained["vae_hash"], vars(args).get("vae_hash")
        unlike = [f"{k} {theirs.get(k)} (here {v})" for k, v in ours.items() if theirs.get(k) != v]
        if unlike:
            raise UserError(f"--teacher {trained['file']} has another {', '.join(unlike)}")
        if trained["label_drop"] == 0 and args.feature_guidance != 1:
            raise UserError("--teacher was trained with --label-drop 0: it has no null features")
        args.teacher = trained["file"]  # what checkpoints record: a folder may get newer ones
        del teacher.blocks[self.teacher_block :], teacher.final_layer
        for block in teacher.blocks if args.compile else ():
            block.compile()
        return teacher.requires_grad_(False)

    @torch.no_grad()
    def teacher_features(self, x_t, t, y):
        """f_c and f_u (N, T, D), fp32, in one doubled forward."""
        labels = torch.cat([y, torch.full_like(y, self.null_label)])
        teacher = self.frozen[0].to(x_t.device)
        bf16 = self.args.teacher_precision == "bf16"
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=bf16):
            inputs = (torch.cat([x_t, x_t]), torch.cat([t, t]), labels)
            return teacher.tokens_after(*inputs, self.teacher_block).float().chunk(2)

    def forward(self, x0, y, t=None, noise=None, drop=None):
        """Images x0 (N, C, H, W) in [-1, 1], labels y (N,) -> {"loss", ...}, scalars.

        Draws: t (N,), noise like x0, drop (N,) from U(0, 1). t is drawn on the CPU, where it is
        known without waiting which images are in range.
        """
        args = self.args
        low, high = args.t_range
        t = self.diffusion.draw_t(len(x0), "cpu") if t is None else t
        noise = torch.randn_like(x0) if noise is None else noise
        drop = torch.rand(len(x0), device=x0.device) if drop is None else drop
        in_range = (t >= low) & (t <= high)
        t = t.to(x0.device, non_blocking=True)
        dropped = drop < args.label_drop
        y_seen = torch.where(dropped, self.null_label, y)  # by the student
        x_t = self.diffusion.add_noise(x0, noise, t)
        inputs = (*self.diffusion.net_inputs(x_t, t), y_seen)
        if args.align_weight == 0 or self.step >= self.stop_step:
            denoise = self.diffusion.loss(self.model(*inputs), x0, noise, t).mean()
            if args.align_weight == 0:
                return {"loss": denoise, "denoise": denoise}
            unused = sum(0 * p.sum() for p in self.head.parameters())  # a gradient for DDP
            zeros = dict.fromkeys(LOGGED, torch.zeros_like(denoise))
            return {"loss": denoise + unused, "denoise": denoise, **zeros}
        k = self.student_block
        out, features = self.model(*inputs, features=(k,))
        denoise = self.diffusion.loss(out, x0, noise, t).mean()
        rows = slice(None)  # images on which head and teacher run: at least one, for DDP
        if not self.everywhere:
            chosen = in_range.nonzero()[:, 0] if in_range.any() else torch.zeros(1, dtype=int)
            rows = chosen.to(x0.device, non_blocking=True)
        projected = self.head(features[k][rows]).float()  # (R, T, D), stage 1: (R, T, p * p * C)
        inside = in_range.to(x0.device, torch.float32, non_blocking=True)
        error, kept = torch.zeros_like(inside), (~dropped).float()
        if args.stage == 1:
            early = self.model.unpatchify(projected)  # (R, C, H, W)
            error[rows] = self.early_error(early, x_t[rows], x0[rows], noise[rows], t[rows])
            align = window_mean(error, inside, torch.ones_like(kept), args.t_mode, high - low)
            terms = {}
        else:
            y = y_seen if args.drop_target == "unconditional" else y
            f_c, f_u = self.teacher_features(x_t[rows], t[rows], y[rows])
            f_g = torch.lerp(f_u, f_c, args.feature_guidance)  # exactly f_u or f_c at w = 0 or 1
            error[rows] = (projected - f_g).square().flatten(1).mean(1)
            counted = kept if args.drop_target == "skip" else torch.ones_like(kept)
            align = window_mean(error, inside, counted, args.t_mode, high - low)
            terms = self.means(error, inside, kept)
            terms |= {"guidance_gap": (f_c - f_u).norm() / f_u.norm()}
            terms |= {"guided_norm": f_g.norm() / f_u.norm()}
        loss = denoise + args.align_weight * align
        return {"loss": loss, "denoise": denoise, "align": align, **terms}

    def early_error(self, early, x_t, x0, noise, t):
        """Stage 1: squared error (N,) of the head's velocities, or of x_0 from them."""
        if self.args.stage1_target == "x0":
            squares = (self.diffusion.denoise(early, x_t, t) - x0).square()
        else:
            squares = self.diffusion.loss(early, x0, noise, t)
        return squares.flatten(1).mean(1)

    def means(self, error, inside, kept):
        """Logged: mean error of images in --t-range, and of those seen with and without label.

        Sums are divided by expected counts: right on average over many steps.
        """
        low, high = self.args.t_range
        drop = self.args.label_drop
        seen, share = (torch.ones_like(inside), 1.0) if self.everywhere else (inside, high - low)
        groups = {
            "align_in": (inside, high - low),
            "align_kept": (seen * kept, share * (1 - drop)),
            "align_dropped": (seen * (1 - kept), share * drop),
        }
        return {k: (error * g).mean() / max(expected, 1e-9) for k, (g, expected) in groups.items()}

    def after_step(self, step, steps):
        """Frees the teacher after its last step."""
        if self.frozen and step + 1 >= self.stop_step:
            self.frozen.clear()


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
    main(SelfTranscendence, parse_args())
