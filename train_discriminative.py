"""SD-DiT: self-supervised discrimination in diffusion transformers (CVPR 2024, arXiv 2403.17004).

The paper has no public code. This is its skeleton; details are inferred from the work it builds on.
The encoder sees four fifths of a noisy image's tokens. It learns, as in iBOT, to agree with its
momentum teacher, which sees all tokens at the clean end of the same PF-ODE. A light decoder
denoises all tokens; it gets the raw noisy tokens at hidden places.

    x_S = x_0 + sigma_S eps, ln sigma_S ~ N(-1.2, 1.2)     x_T = x_0 + sigma_T eps, sigma_T = 0.002
    P_T = softmax((z_T - C) / tau_T),   P_S = softmax(z_S / tau_S)     z: logits, C: mean of z_T
    L   = mean w(sigma_S) (D(x_S) - x_0)^2  -  0.1 mean over visible patches of sum_k P_T,k ln P_S,k

Commands; the same command goes on with an interrupted run:
    # toy: built-in shapes, CPU
    python train_discriminative.py --image-size 16 --model DiT-Ti/2 --steps 1000 --batch-size 16 \
        --lr 2e-3 --warmup 100 --ema-warmup --prototypes 512 --head-width 256 --freeze-steps 100
    # 8 GPUs
    torchrun --nproc_per_node=8 train_discriminative.py --data imagenet/train \
        --vae vae.safetensors --image-size 256 --model DiT-XL/2 --steps 2400000
    # 2 nodes, on both
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
        train_discriminative.py --data imagenet/train --vae vae.safetensors --image-size 256 \
        --model DiT-XL/2 --steps 2400000
`--align-weight 0 --mask-ratio 0` is plain EDM on the same network, the fair baseline.

Sources: [P] paper, [S] later papers or summaries of it, [I] inferred from MaskDiT, EDM, DINO or
iBOT, [O] our choice
 1. Loss on the encoder, EDM on the decoder, momentum teacher, one PF-ODE, no mask token [P]. Noisy
    tokens stand there [S], put in before the bridge [O]. A fifth is hidden [S]; decoder 8 x 512.
 2. The teacher sees the smallest noise [S, two sources]: EDM's smallest sigma, the same eps [I].
 3. Visible patches alone [S]. `--summary token` adds iBOT's class token, on which sources differ:
    its term is dead by construction, as all blocks start as the identity and nothing else moves the
    token (it stays at ln K). `mean` takes the mean token.
 4. Head, K, temperatures, centring, momentum 0.996 to 1: DINO's and iBOT's [I]; LayerNorm [O].
 5. The teacher gets the dropped labels [O]. Weight 0.1, as ln 8192 = 9 would swamp the rest [O].
 6. Batch 256, AdamW 1e-4, no clipping, no flips, EMA 0.9999, 2.4 million steps [I; 480 epochs, S].
Logged: entropy of P_T (ln K: uniform; 0: one prototype each), KL, norm of C, prototypes in use.
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

# --- method: SD-DiT

import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from models import MaskedDiT, frozen_copy

DEFAULTS = {"diffusion": "edm", "clip_grad": 0.0}


def method_arguments(parser):
    add = parser.add_argument_group("SD-DiT").add_argument
    switch = argparse.BooleanOptionalAction
    add("--align-weight", type=float, default=0.1, help="of the discriminative loss; 0: no teacher")
    add("--mask-ratio", type=float, default=0.2, help="share of tokens hidden from the encoder")
    summary = "image token with a class term; token: dead by construction, see detail 3"
    add("--summary", choices=("none", "mean", "token"), default="none", help=summary)
    add("--gen-tokens", choices=("all", "visible"), default="all", help="of the diffusion loss")
    add("--detach-encoder", action=switch, default=False, help="no diffusion loss on the encoder")
    decoder = "(default: 8 512 16; for Ti 2 128 4)"
    add("--decoder", type=int, nargs=3, metavar=("DEPTH", "WIDTH", "HEADS"), help=decoder)
    add("--teacher-sigma", type=float, default=0.002, help="noise of its input (flow: its time)")
    add("--shared-noise", action=switch, default=True, help="student and teacher: the same eps")
    labels = "the student's, after dropping, or the null label"
    add("--teacher-label", choices=("same", "null"), default="same", help=labels)
    add("--teacher-momentum", type=float, default=0.996, help="at the start")
    schedule = "cosine: to 1 at the end of the run"
    momentum = ("cosine", "constant")
    add("--teacher-momentum-schedule", choices=momentum, default="cosine", help=schedule)
    ends = ("START", "END")
    add(
        "--teacher-temperature", type=float, nargs=2, default=[0.04, 0.07], metavar=ends, help="tau"
    )
    add("--temperature-steps", type=int, default=150_000, help="steps from START to END")
    add("--student-temperature", type=float, default=0.1, help="tau of the student")
    add("--prototypes", type=int, default=8192, help="K, the outputs of the head")
    add("--head-width", type=int, default=2048, help="hidden width of the head")
    add("--freeze-steps", type=int, default=5000, help="first steps with frozen prototypes")
    add("--centring", action=switch, default=True, help="subtract the mean of teacher logits")
    add("--centre-momentum", type=float, default=0.9, help="of that running mean")


def momentum_at(step, steps, momentum, schedule):
    """Teacher momentum at a 0-based step: constant, or DINO's cosine from `momentum` to 1."""
    if schedule == "constant":
        return momentum
    return 1 - (1 - momentum) * (1 + math.cos(math.pi * step / steps)) / 2


class Head(nn.Module):
    """DINO's: tokens (M, D) -> unit vectors (M, 256), and prototypes of unit length (K, 256).

    Their products are logits in [-1, 1].
    """

    def __init__(self, dim, width, prototypes):
        super().__init__()
        layers = [nn.Linear(dim, width), nn.GELU(), nn.Linear(width, width), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(width, 256))
        for parameter in self.mlp.parameters():
            if parameter.ndim == 1:
                nn.init.zeros_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=0.02)
        self.weight = nn.Linear(256, prototypes, bias=False).weight  # as DINO leaves it

    def forward(self, x):
        x = self.mlp(F.layer_norm(x.float(), x.shape[-1:], eps=1e-6))
        return F.normalize(x.float(), dim=-1), F.normalize(self.weight.float(), dim=-1)


def cross_entropy(student, teacher, prototypes, teacher_prototypes, centre, tau_s, tau_t):
    """H and entropy of P_T, both (M,), and the teacher's first choice (M,) int64.

    From unit vectors (M, 256) and prototypes (K, 256).
    """
    with torch.no_grad():
        log_p = ((teacher @ teacher_prototypes.T - centre) / tau_t).log_softmax(1)  # (M, K)
    log_q = (student @ prototypes.T / tau_s).log_softmax(1)  # (M, K)
    p = log_p.exp()
    return -(p * log_q).sum(1), -(p * log_p).sum(1), log_p.argmax(1)


def chunked_cross_entropy(student, teacher, *others, rows=4096):
    """The same in chunks of rows, recomputed in the backward pass: never M x K logits at once."""
    parts = []
    for chunk in zip(student.split(rows), teacher.split(rows)):
        options = {"use_reentrant": False, "preserve_rng_state": False}
        parts.append(checkpoint(cross_entropy, *chunk, *others, **options))
    return [torch.cat(part) for part in zip(*parts)]


class SDDiT(nn.Module):
    """`model` is trained, `ema` averages it and is sampled; `teacher` is the momentum encoder."""

    def __init__(self, args, network, diffusion):
        super().__init__()
        self.check(args)
        self.args = args
        self.diffusion = diffusion
        self.step = 0  # set by the loop: steps that are done
        self.null_label = network["num_classes"]
        default = (2, 128, 4) if network["hidden_size"] == 128 else (8, 512, 16)
        own = {"fill": "noisy_tokens", "class_token": args.summary == "token"}
        self.model = MaskedDiT(decoder=args.decoder or default, **own, **network)
        self.ema = frozen_copy(self.model)
        if args.align_weight == 0:
            return
        self.head = Head(network["hidden_size"], args.head_width, args.prototypes)
        self.teacher = frozen_copy(self.model)
        self.teacher_head = frozen_copy(self.head)
        del self.teacher.decoder_layer, self.teacher.decoder_blocks
        del self.teacher.decoder_pos_embed, self.teacher.final_layer
        self.kinds = ("patch",) if args.summary == "none" else ("patch", "class")
        self.register_buffer("centre", torch.zeros(len(self.kinds), args.prototypes))
        summed = torch.zeros_like(self.centre)  # over the micro-batches of a step
        self.register_buffer("mean_logits", summed, persistent=False)
        self.micro_batches = 0
        self.teachers, self.students = [], []  # parameters, and those that they follow
        for teacher, student in ((self.teacher, self.model), (self.teacher_head, self.head)):
            parameters = dict(student.named_parameters())
            for name, parameter in teacher.named_parameters():
                self.teachers.append(parameter)
                self.students.append(parameters[name])

    def check(self, args):
        if args.diffusion == "ddpm" or not 0 <= args.mask_ratio < 1:
            raise UserError("SD-DiT needs --diffusion edm (flow, gvp) and a --mask-ratio below 1")
        if args.detach_encoder and args.align_weight == 0:
            raise UserError("--detach-encoder --align-weight 0: nothing would train the encoder")
        if args.diffusion != "edm" and args.teacher_sigma > 1:
            raise UserError(f"--teacher-sigma {args.teacher_sigma:g}: a time of flow, at most 1")
        if min(args.student_temperature, *args.teacher_temperature, args.teacher_sigma) <= 0:
            raise UserError("temperatures and --teacher-sigma must be above 0")

    def forward(self, x0, y, t=None, noise=None, drop=None, mask=None, teacher_noise=None):
        """Images x0 (N, C, H, W) in [-1, 1], labels y (N,) -> {"loss", ...}, scalars.

        Draws: t (N,), noise and teacher_noise like x0, drop (N,) and mask (N, T) from U(0, 1): the
        student sees the int(T (1 - ratio)) tokens whose mask is smallest.
        """
        args = self.args
        n = len(x0)
        p = self.model.patch_size
        tokens = (x0.shape[2] // p) ** 2
        t = self.diffusion.draw_t(n, x0.device) if t is None else t
        noise = torch.randn_like(x0) if noise is None else noise
        drop = torch.rand(n, device=x0.device) if drop is None else drop
        mask = torch.rand(n, tokens, device=x0.device) if mask is None else mask
        if args.shared_noise:
            teacher_noise = noise
        elif teacher_noise is None:
            teacher_noise = torch.randn_like(x0)
        y = torch.where(drop < args.label_drop, self.null_label, y)
        keep = max(1, int(tokens * (1 - args.mask_ratio)))
        ids_keep = None if keep == tokens else mask.argsort(1)[:, :keep]
        x_t = self.diffusion.add_noise(x0, noise, t)
        inputs = self.diffusion.net_inputs(x_t, t)
        last = len(self.model.blocks)
        out, features = self.model(*inputs, y, ids_keep, (last,), args.detach_encoder)
        denoise = self.diffusion.loss(out, x0, noise, t)  # (N, C, H, W)
        if ids_keep is not None and args.gen_tokens == "visible":
            denoise = F.avg_pool2d(denoise, p).mean(1).flatten(1).gather(1, ids_keep)  # (N, K)
        denoise = denoise.mean()
        if args.align_weight == 0:
            return {"loss": denoise, "denoise": denoise}
        target = self.teacher_tokens(x0, teacher_noise, t, y)
        student = self.compared(features[last])
        align, health = self.discriminate(student, self.compared(target, ids_keep))
        return {"loss": denoise + args.align_weight * align, "denoise": denoise, **health}

    @torch.no_grad()
    def teacher_tokens(self, x0, noise, t, y):
        """The momentum encoder's last tokens (N, [1 +] T, D) of the nearly clean images."""
        if self.step == 0:  # it starts as the student, also after --init-from
            torch._foreach_copy_(self.teachers, self.students)
        t = torch.full_like(t, self.args.teacher_sigma)
        if self.args.teacher_label == "null":
            y = torch.full_like(y, self.null_label)
        x, t = self.diffusion.net_inputs(self.diffusion.add_noise(x0, noise, t), t)
        return self.teacher.encode_tokens(self.teacher.embed(x), self.teacher.condition(t, y))[0]

    def compared(self, tokens, ids_keep=None):
        """Tokens (N, [1 +] T, D) -> patches at ids_keep (N K, D), the image's summary (N, D)."""
        summary = tokens.mean(1)
        if self.args.summary == "token":
            summary, tokens = tokens[:, 0], tokens[:, 1:]
        if ids_keep is not None:
            tokens = tokens.gather(1, ids_keep[:, :, None].expand(-1, -1, tokens.shape[2]))
        return {"patch": tokens.flatten(0, 1), "class": summary}

    def discriminate(self, student, teacher):
        """What `compared` gives of both -> H, averaged per kind and summed; terms for the log."""
        args = self.args
        start, end = args.teacher_temperature
        tau_t = start + (end - start) * min(1.0, self.step / max(1, args.temperature_steps))
        total = 0
        terms = {}
        for k, kind in enumerate(self.kinds):
            vectors, prototypes = self.head(student[kind])
            target, target_prototypes = self.teacher_head(teacher[kind])
            with torch.autocast(vectors.device.type, enabled=False):
                others = (prototypes, target_prototypes, self.centre[k])
                taus = (args.student_temperature, tau_t)
                cross, entropy, choice = chunked_cross_entropy(vectors, target, *others, *taus)
                self.mean_logits[k] += (
                    target.mean(0) @ target_prototypes.T
                )  # the mean of all logits
            total = total + cross.mean()
            terms[kind] = cross.mean()
            terms[f"{kind}_entropy"] = entropy.mean()
            terms[f"{kind}_kl"] = (cross - entropy).mean()
            terms[f"{kind}_centre"] = self.centre[k].norm()
            terms[f"{kind}_used"] = torch.zeros_like(self.centre[k]).scatter_(0, choice, 1.0).mean()
        self.micro_batches += 1
        return total, terms

    @torch.no_grad()
    def after_step(self, step, steps):
        """Teacher and head follow the student, centres the mean logits of all processes."""
        args = self.args
        if args.align_weight == 0:
            return
        if step < args.freeze_steps:  # undone here: zero gradients would spoil Adam's moments
            self.head.weight.copy_(self.teacher_head.weight)
        schedule = (args.teacher_momentum, args.teacher_momentum_schedule)
        momentum = momentum_at(step, steps, *schedule)
        torch._foreach_lerp_(self.teachers, self.students, 1 - momentum)
        if args.centring:
            mean = self.mean_logits / self.micro_batches
            if dist.is_initialized():
                dist.all_reduce(mean)
                mean /= dist.get_world_size()
            self.centre.lerp_(mean, 1 - args.centre_momentum)
        self.mean_logits.zero_()
        self.micro_batches = 0


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
    main(SDDiT, parse_args())
