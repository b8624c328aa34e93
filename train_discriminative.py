"""SD-DiT: self-supervised discrimination in diffusion transformers (Zhu et al., CVPR 2024, arXiv 2403.17004), with inferred details.

The paper has no public code, and its method section was not at hand: this is its skeleton, with the defaults of the work it builds on. The
encoder sees four fifths of a noisy image's tokens and learns, as in iBOT, to agree with its momentum teacher, which sees all tokens at the
clean end of the same PF-ODE; a light decoder denoises all tokens. It gets the raw noisy tokens at hidden places: there is no mask token.

    x_S = x_0 + sigma_S eps,  ln sigma_S ~ N(-1.2, 1.2)      x_T = x_0 + sigma_T eps,  sigma_T = 0.002          D = EDM's denoiser
    P_T = softmax((z_T - C) / tau_T),   P_S = softmax(z_S / tau_S)          z: head logits, C: running mean of z_T
    H   = -sum_k P_T,k ln P_S,k                              per token; no gradient to P_T
    L   = mean w(sigma_S) (D(x_S) - x_0)^2  +  0.1 ( H(class token) + mean over visible patches of H )         w c_out^2 = 1

Commands; running one again resumes it from its newest checkpoint
    python train_discriminative.py --image-size 16 --model DiT-Ti/2 --steps 1000 --batch-size 16 --lr 2e-3 --warmup 100 --ema-warmup
        --prototypes 512 --head-width 256 --freeze-steps 100                                                            toy, on a CPU
    torchrun --nproc_per_node=8 train_discriminative.py --data imagenet/train --vae VAE --image-size 256 --model DiT-XL/2 --steps 2400000
                                                                                     8 GPUs; VAE: a Stable-Diffusion VAE's .safetensors
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_discriminative.py ...    2 nodes, on both
`--align-weight 0` builds no head and no teacher; with `--mask-ratio 0` too it is plain EDM on the same network, the fair baseline.
Logged, for patches and class token: the term; the teacher's entropy (ln K: uniform collapse, 0: one prototype each); KL(T || S); norm of
C; the share of the K prototypes that are some token's first choice (at most tokens / K). Blocks start as the identity: at first the class
token is the same in every image, and its term sits at ln K.

Where the defaults come from: [P] the paper, [2nd] later papers on it, [inferred] from MaskDiT, EDM, DINO or iBOT, [guess] ours
 1. Discriminative loss on the encoder, diffusion loss on the decoder, momentum teacher, one PF-ODE, no mask token [P]. Noisy tokens instead
    [2nd]; embedded, beside the encoder's output, before a shared bridge [guess]. A fifth hidden [2nd], in the whole run [inferred].
 2. Decoder 8 x 512 x 16 at every size (Ti: 2 x 128 x 4), EDM with its log-normal sigma; the same noise for the teacher, at EDM's smallest
    sigma, which the student hardly ever sees: if the teacher looks odd, try `--teacher-sigma` 0.01 or 0.05 [all inferred].
 3. Class and patch terms of iBOT [2nd], on visible patches [2nd]; equal weights, one head for both, its sizes, K, the temperatures, the
    centres (separate), the frozen prototypes of the first 5,000 steps, momentum 0.996 to 1 [inferred]. LayerNorm before the head [guess].
    Two minor sources know of no centring: `--no-centring`. A relative of this method (SRA) does better with 0.9999, constant.
 4. The teacher gets the student's labels, after label dropout [guess]; `--teacher-label null` keeps it from reading the class off them.
 5. Weight 0.1: ln 8192 = 9 would swamp the diffusion loss; try 0.01 to 1 [guess]. The diffusion loss is on all tokens and trains the
    encoder too [guess]; with `--detach-encoder` it does not, but for the embedding of time and label, which the decoder shares.
 6. Batch 256, AdamW 1e-4, no clipping (iBOT clips at 3), EMA 0.9999 without warm-up, 2.4 million steps [inferred from 480 epochs, 2nd].
    Sampling: EMA of the student on all tokens, Heun with 40 steps [inferred].
Ours besides: centres follow the visible tokens of all micro-batches and ranks, once a step. Logits (TF32 on GPUs) and softmax in fp32, in
recomputed chunks: N T K logits never exist at once.
Not here: terms by noise level or by null label, a decoder made of the last encoder blocks, clipping of the head alone.
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

# --- method: SD-DiT ---------------------------------------------------------------------------------------------------------------------

import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from models import MaskedDiT, frozen_copy

DEFAULTS = {"diffusion": "edm", "clip_grad": 0.0, "ema_warmup": False}


def method_arguments(parser):
    add, switch = parser.add_argument_group("SD-DiT").add_argument, argparse.BooleanOptionalAction
    add(
        "--align-weight",
        type=float,
        default=0.1,
        help="weight of the discriminative loss; 0: no head, no teacher",
    )
    add(
        "--mask-ratio",
        type=float,
        default=0.2,
        help="share of the tokens that the student's encoder does not see, below 1",
    )
    add(
        "--summary",
        choices=("token", "mean", "none"),
        default="token",
        help="the class term is on the class token, the mean, or off",
    )
    add(
        "--gen-tokens",
        choices=("all", "visible"),
        default="all",
        help="tokens of the diffusion loss",
    )
    add(
        "--detach-encoder",
        action=switch,
        default=False,
        help="the diffusion loss does not reach the encoder's tokens",
    )
    add(
        "--decoder",
        type=int,
        nargs=3,
        metavar=("DEPTH", "WIDTH", "HEADS"),
        help="default 8 512 16; 2 128 4 for Ti",
    )
    add(
        "--teacher-sigma",
        type=float,
        default=0.002,
        help="noise level of the teacher's input (flow: its time)",
    )
    add(
        "--shared-noise", action=switch, default=True, help="student and teacher see the same noise"
    )
    add(
        "--teacher-label",
        choices=("same", "null"),
        default="same",
        help="the student's labels after label dropout, or none",
    )
    add("--teacher-momentum", type=float, default=0.996)
    add(
        "--teacher-momentum-schedule",
        choices=("cosine", "constant"),
        default="cosine",
        help="cosine: to 1 at the end of the run",
    )
    add(
        "--teacher-temperature", type=float, nargs=2, default=[0.04, 0.07], metavar=("START", "END")
    )
    add(
        "--temperature-steps",
        type=int,
        default=150_000,
        help="steps in which the teacher's temperature goes from START to END",
    )
    add("--student-temperature", type=float, default=0.1)
    add("--prototypes", type=int, default=8192, help="K, the outputs of the head")
    add("--head-width", type=int, default=2048, help="hidden width of the head")
    add(
        "--freeze-steps",
        type=int,
        default=5000,
        help="first steps in which the prototypes do not move",
    )
    add(
        "--centring",
        action=switch,
        default=True,
        help="subtract the running mean from the teacher's logits",
    )
    add("--centre-momentum", type=float, default=0.9)


def momentum_at(step, steps, momentum, schedule):
    """Teacher momentum at a 0-based step: constant, or DINO's cosine from `momentum` to 1."""
    return (
        momentum
        if schedule == "constant"
        else 1 - (1 - momentum) * (1 + math.cos(math.pi * step / steps)) / 2
    )


class Head(nn.Module):
    """DINO's head: tokens (M, D) -> unit vectors (M, 256) and prototypes of unit length (K, 256), whose products are logits in [-1, 1]."""

    def __init__(self, dim, width, prototypes):
        super().__init__()
        layers = [
            nn.Linear(dim, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, 256),
        ]
        self.mlp, self.weight = nn.Sequential(*layers), nn.Parameter(torch.zeros(prototypes, 256))
        for parameter in self.parameters():
            nn.init.zeros_(parameter) if parameter.ndim == 1 else nn.init.trunc_normal_(
                parameter, std=0.02
            )

    def forward(self, x):
        x = self.mlp(F.layer_norm(x.float(), x.shape[-1:], eps=1e-6))
        return F.normalize(x.float(), dim=-1), F.normalize(self.weight.float(), dim=-1)


def cross_entropy(student, teacher, prototypes, teacher_prototypes, centre, tau_s, tau_t):
    """H and entropy of P_T, both (M,), and the teacher's first choice (M,) int64, from unit vectors (M, 256) and prototypes (K, 256)."""
    with torch.no_grad():
        log_p = ((teacher @ teacher_prototypes.T - centre) / tau_t).log_softmax(1)  # (M, K)
    log_q = (student @ prototypes.T / tau_s).log_softmax(1)  # (M, K)
    return -(log_p.exp() * log_q).sum(1), -(log_p.exp() * log_p).sum(1), log_p.argmax(1)


def chunked_cross_entropy(student, teacher, *others, rows=4096):
    """The same in chunks of so many rows, each recomputed in the backward pass: rows x K logits are held instead of M x K."""
    chunks = zip(student.split(rows), teacher.split(rows))
    parts = [
        checkpoint(cross_entropy, *chunk, *others, use_reentrant=False, preserve_rng_state=False)
        for chunk in chunks
    ]
    return [torch.cat(part) for part in zip(*parts)]


class SDDiT(nn.Module):
    """`model` is trained, `ema` averages it and is sampled. The loop sets `step`, the number of finished steps."""

    def __init__(self, args, network, diffusion):
        super().__init__()
        if args.diffusion == "ddpm" or args.mask_ratio >= 1:
            raise ValueError(
                "SD-DiT is defined for --diffusion edm (and flow, gvp), not ddpm; --mask-ratio must be below 1"
            )
        if args.detach_encoder and args.align_weight == 0:
            raise ValueError(
                "--detach-encoder with --align-weight 0: nothing would train the encoder"
            )
        positive = (
            args.student_temperature,
            *args.teacher_temperature,
            args.teacher_sigma,
            args.prototypes,
            args.head_width,
        )
        if args.diffusion != "edm" and args.teacher_sigma > 1:
            raise ValueError(
                f"--teacher-sigma {args.teacher_sigma:g}: under --diffusion {args.diffusion} it is a time, at most 1"
            )
        if not all(v > 0 for v in positive) or max(args.teacher_momentum, args.centre_momentum) > 1:
            raise ValueError(
                "temperatures, --teacher-sigma, --prototypes and --head-width must be above 0, momenta at most 1"
            )
        self.args, self.diffusion, self.step, self.null_label = (
            args,
            diffusion,
            0,
            network["num_classes"],
        )
        decoder = args.decoder or ((2, 128, 4) if network["hidden_size"] == 128 else (8, 512, 16))
        self.model = MaskedDiT(
            decoder=decoder, fill="noisy_tokens", class_token=args.summary == "token", **network
        )
        self.ema = frozen_copy(self.model)
        if args.align_weight == 0:
            return
        self.head = Head(network["hidden_size"], args.head_width, args.prototypes)
        self.teacher, self.teacher_head = frozen_copy(self.model), frozen_copy(self.head)
        del (
            self.teacher.decoder_layer,
            self.teacher.decoder_blocks,
            self.teacher.decoder_pos_embed,
            self.teacher.final_layer,
        )
        self.kinds = ("patch",) if args.summary == "none" else ("patch", "class")
        self.register_buffer("centre", torch.zeros(len(self.kinds), args.prototypes))
        self.register_buffer(
            "mean_logits", torch.zeros_like(self.centre), persistent=False
        )  # summed over the micro-batches of a step
        self.micro_batches = 0
        students = [dict(module.named_parameters()) for module in (self.model, self.head)]
        pairs = [
            (p, s[name])
            for t, s in zip((self.teacher, self.teacher_head), students)
            for name, p in t.named_parameters()
        ]
        self.teachers, self.students = zip(
            *pairs
        )  # parameters of the teacher and its head, and those they follow

    def forward(self, x0, y, t=None, noise=None, drop=None, mask=None, teacher_noise=None):
        """Images x0 (N, C, H, W) in [-1, 1], labels y (N,) -> scalars. Draws: t (N,), noise and teacher_noise like x0, drop (N,) and
        mask (N, T) from U(0, 1); the student sees the int(T (1 - ratio)) tokens with the smallest of these.
        """
        n, p, args = len(x0), self.model.patch_size, self.args
        tokens = (x0.shape[2] // p) ** 2
        t = self.diffusion.draw_t(n, x0.device) if t is None else t
        noise = torch.randn_like(x0) if noise is None else noise
        drop = torch.rand(n, device=x0.device) if drop is None else drop
        mask = torch.rand(n, tokens, device=x0.device) if mask is None else mask
        teacher_noise = (
            noise
            if args.shared_noise
            else torch.randn_like(x0)
            if teacher_noise is None
            else teacher_noise
        )
        y = torch.where(drop < args.label_drop, self.null_label, y)
        keep = max(1, int(tokens * (1 - args.mask_ratio)))
        ids_keep = None if keep == tokens else mask.argsort(1)[:, :keep]
        last, x_t = len(self.model.blocks), self.diffusion.add_noise(x0, noise, t)
        out, features = self.model(
            *self.diffusion.net_inputs(x_t, t), y, ids_keep, (last,), args.detach_encoder
        )
        denoise = self.diffusion.loss(out, x0, noise, t)  # (N, C, H, W)
        if ids_keep is not None and args.gen_tokens == "visible":
            denoise = F.avg_pool2d(denoise, p).mean(1).flatten(1).gather(1, ids_keep)  # (N, K)
        denoise = denoise.mean()
        if args.align_weight == 0:
            return {"loss": denoise, "denoise": denoise}
        with torch.no_grad():
            t_teacher = torch.full_like(t, args.teacher_sigma)
            x_teacher = self.diffusion.add_noise(x0, teacher_noise, t_teacher)
            y_teacher = y if args.teacher_label == "same" else torch.full_like(y, self.null_label)
            target = self.teacher.encode(
                *self.diffusion.net_inputs(x_teacher, t_teacher), y_teacher
            )  # (N, [1 +] T, D)
        align, health = self.discriminate(
            self.compared(features[last]), self.compared(target, ids_keep)
        )
        return {"loss": denoise + args.align_weight * align, "denoise": denoise, **health}

    def compared(self, tokens, ids_keep=None):
        """Encoder tokens (N, [1 +] T, D) -> the patches at ids_keep (N K, D), in that order, and the image's summary (N, D)."""
        summary = tokens[:, 0] if self.args.summary == "token" else tokens.mean(1)
        patches = tokens[:, 1:] if self.args.summary == "token" else tokens
        visible = (
            patches
            if ids_keep is None
            else patches.gather(1, ids_keep[:, :, None].expand(-1, -1, patches.shape[2]))
        )
        return {"patch": visible.flatten(0, 1), "class": summary}

    def discriminate(self, student, teacher):
        """What `compared` gives of both networks -> H averaged per kind and summed over the kinds, and what is logged."""
        args, total, terms = self.args, 0, {}
        start, end = args.teacher_temperature
        tau_t = start + (end - start) * min(1.0, self.step / max(1, args.temperature_steps))
        for k, kind in enumerate(self.kinds):
            vectors, prototypes = self.head(student[kind])
            target, target_prototypes = self.teacher_head(teacher[kind])
            with torch.autocast(vectors.device.type, enabled=False):
                others = (
                    prototypes,
                    target_prototypes,
                    self.centre[k],
                    args.student_temperature,
                    tau_t,
                )
                cross, entropy, choice = chunked_cross_entropy(vectors, target, *others)
                self.mean_logits[k] += (
                    target.mean(0) @ target_prototypes.T
                )  # the mean of all logits
            used = torch.zeros_like(self.centre[k]).scatter_(0, choice, 1.0).mean()
            total = total + cross.mean()
            terms |= {
                kind: cross.mean(),
                f"{kind}_entropy": entropy.mean(),
                f"{kind}_kl": (cross - entropy).mean(),
            }
            terms |= {f"{kind}_centre": self.centre[k].norm(), f"{kind}_used": used}
        self.micro_batches += 1
        return total, terms

    @torch.no_grad()
    def after_step(self, step, steps):
        """Teacher and its head follow the student; centres follow the mean logits of all micro-batches and processes."""
        if self.args.align_weight == 0:
            return
        if (
            step < self.args.freeze_steps
        ):  # undone here: zero gradients would leave Adam's moments unfit for the first real one
            self.head.weight.copy_(self.teacher_head.weight)
        momentum = momentum_at(
            step, steps, self.args.teacher_momentum, self.args.teacher_momentum_schedule
        )
        torch._foreach_lerp_(self.teachers, self.students, 1 - momentum)
        if self.args.centring:
            mean = self.mean_logits / self.micro_batches
            if dist.is_initialized():
                dist.all_reduce(mean)
                mean /= dist.get_world_size()
            self.centre.lerp_(mean, 1 - self.args.centre_momentum)
        self.mean_logits.zero_()
        self.micro_batches = 0


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
    main(SDDiT, parse_args())
