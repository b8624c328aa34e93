"""DiverseDiT: diverse representation learning in diffusion transformers (CVPR 2026, 2603.04239).

Blocks learn much the same; the ones that differ help. Long residual connections from the first half
of the blocks to the second give late blocks other inputs. A loss on the blocks' own features makes
them differ. No encoder, no teacher. `--mean-flow`: on MeanFlow (2505.13447), sampled in one step.

    z    = Linear( LN( concat(f_{L-i-1}, f_i) ) ), i = 0 .. L/2 - 1, enters block L - i  (Eq. 8)
    orth = mean over pairs P of cos(mu_i, mu_j)                 mu_i: mean of f_i over all tokens
    MI   = mean over P of | mean over tokens of cos(f_i, f_j) |       P: pairs of 10 random blocks
    disp = -min(1, 4 Var_k(a_k / max_k a_k)),  a_k = mean over blocks, tokens of |f_i,k| / ||f_i,k||
    L    = L_denoise + w L_div,    L_div = (orth + MI + disp) / 3
    w    = 1 if L_div > 0.5; (L_div - 0.1) / 0.5 if 0.1 < L_div <= 0.5; else 0   (after Eq. 15)
    L_denoise of MeanFlow = mean of |u - u_tgt|^2 / sg(|u - u_tgt|^2 + 0.01),  x_r = x_t - (t - r) u
    u_tgt = sg(v_g - (t - r) du/dt),    v_g = omega v + kappa v_c + (1 - omega - kappa) v_u

Commands; the same command goes on with an interrupted run:
    # toy: built-in shapes, CPU
    python train_diversedit.py --image-size 16 --model DiT-Ti/2 --steps 1000 --batch-size 16 \
        --lr 2e-3 --warmup 100 --ema-warmup
    # 8 GPUs, the paper's setting; VAE: sd-vae-ft-mse's diffusion_pytorch_model.safetensors
    torchrun --nproc_per_node=8 train_diversedit.py --data imagenet/train --vae vae.safetensors \
        --image-size 256 --model SiT-XL/2
    # 2 nodes, on both; MeanFlow, whose own settings the last two flags are
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
        train_diversedit.py --data imagenet/train --vae vae.safetensors --image-size 256 \
        --model SiT-XL/2 --mean-flow --clip-grad 0 --beta2 0.95
On top: SRA `--align-weight 0.2`, Dispersive Loss (2506.09027) `--disperse-weight 0.5`. Plain SiT,
or with the last three flags above MeanFlow: `--long-residual none --diversity-weight 0`.

Implementation details (files of the official repository at 5fedda17; research model at ff92f9dd)
 1. Long residuals: pre is Eq. 8 and the research model; post is the released models/sit.py. No
    bypass, Xavier, LayerNorm in fp32. Under bf16 each rounds the stream to bf16: the output of S/2
    is then 0.98 % off in place of 0.95 % (random weights).
 2. Pairs: 10 random blocks [supplement], all 45 pairs, drawn anew in every step, equal on all ranks
    (our reading). `--pairs anchor`: loss.py's first 10 pairs, wrapping nowhere. `all`: all blocks.
 3. Terms as in loss.py, which adds the absolute values, the 4 and the limit of disp. disp is over
    the blocks of P, with anchor over all blocks. Each process and micro-batch has its own L_div.
 4. The weight is not detached [train.py]: its gradient is 4 L_div - 0.2 times L_div's.
 5. No flips, no EMA warm-up, batch 256, AdamW 1e-4, clipping at 1. SRA as in train_sra.py.
 6. MeanFlow [Gsunshine/meanflow at d70cb55d]: r = t in the first int(0.75 n) rows, the first ones
    lose their labels. Guidance: Table 4, by model. SRA's teacher sees r = t. Official: fp32.
 7. Dispersive Loss: the paper's weight, block, tau; released code 0.25, last, 1. By micro-batch.
Differences: the released train.py stops with an AttributeError. Its block-diversity coefficient
does nothing. It returns 0 for non-finite values, here the run stops. fp16 there, bf16 here.
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

# --- method: DiverseDiT

import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion import draw_interval, per_image
from models import DiT, frozen_copy

DEFAULTS = {}

GUIDANCE = {  # omega, kappa, times: MeanFlow's Table 4; B/4: the best of its Table 1f
    "B/4": (3.0, 0.0, [0.0, 1.0]),
    "L": (0.2, 0.92, [0.0, 0.8]),
    "XL": (0.2, 0.92, [0.0, 0.75]),
    "other": (1.0, 0.5, [0.0, 1.0]),  # B/2 and M/2; Ti, S and H have no published ones
}


def method_arguments(parser):
    add = parser.add_argument_group("DiverseDiT").add_argument
    wirings = ("pre", "post", "none")
    add("--long-residual", choices=wirings, default="pre", help="pre: paper; post: released code")
    weight = "constant; 0: no diversity loss (default: the paper's adaptive one)"
    add("--diversity-weight", type=float, help=weight)
    ends = ("LOW", "HIGH")
    bounds = "of L_div: weight 0 below, 1 above"
    add("--weight-range", type=float, nargs=2, default=[0.1, 0.5], metavar=ends, help=bounds)
    add("--detach-weight", action="store_true", help="no gradient through the adaptive weight")
    add("--term-weights", type=float, nargs=3, default=[1 / 3] * 3, help="of orth, MI, disp")
    pairs = ("random", "anchor", "all")
    add("--pairs", choices=pairs, default="random", help="which pairs of blocks are to differ")
    add("--pair-layers", type=int, default=10, help="random: number of blocks drawn in a step")
    add("--anchor-block", type=int, default=1, help="anchor: first block of the first of 10 pairs")
    add("--align-weight", type=float, default=0.0, help="of SRA's alignment on top (SRA: 0.2)")
    add("--student-block", type=int, help="SRA: aligned block (default: the paper's)")
    add("--teacher-block", type=int, help="SRA: block of the EMA (default: the paper's)")
    gap = "SRA: the teacher's lead, as a part of all time"
    add("--time-gap", type=float, default=0.2, help=gap)
    add = parser.add_argument_group("Dispersive Loss").add_argument
    add("--disperse-weight", type=float, default=0.0, help="lambda (paper: 0.5)")
    add("--disperse-block", type=int, help="whose stream disperses (default: depth // 4)")
    add("--disperse-temperature", type=float, default=0.5, help="tau")
    add = parser.add_argument_group("MeanFlow").add_argument
    add("--mean-flow", action="store_true", help="learn average velocities, for one-step sampling")
    guided = "of guided targets (default: the paper's; {})"
    add("--omega", type=float, help=guided.format("1 if --kappa is given"))
    add("--kappa", type=float, help=guided.format("0 if --omega is given"))
    add("--guided-times", type=float, nargs=2, metavar=ends, help=guided.format("0 1 beside them"))
    add("--equal-share", type=float, default=0.75, help="share of a micro-batch with r = t")
    add("--time-mean", type=float, default=-0.4, help="of the logit of t and r")
    add("--time-std", type=float, default=1.0, help="of the logit of t and r")
    add("--loss-power", type=float, default=1.0, help="p of the adaptive weight")
    add("--loss-offset", type=float, default=0.01, help="c of the adaptive weight")


def block_pairs(depth, pairs, anchor):
    """Pairs (i, j), i < j, of blocks: all, or loss.py's ten, from (anchor, anchor + 1) on."""
    first = anchor if pairs == "anchor" else 1
    chosen = [(i, j) for i in range(first, depth + 1) for j in range(i + 1, depth + 1)]
    return chosen[:10] if pairs == "anchor" else chosen


def diversity_terms(features, pairs):
    """orth, MI, disp (scalars) of features (K, N, T, D): section 3.2, as in loss.py.

    pairs (K, K), 0 or 1: which pairs of those K blocks count.
    """
    with torch.autocast(features.device.type, enabled=False):
        f = features.float().flatten(1, 2)  # (K, N T, D)
        count = pairs.sum()
        means = F.normalize(f.mean(1), dim=1, eps=1e-8)  # (K, D)
        directions = F.normalize(f, dim=2, eps=1e-8).flatten(1)  # (K, N T D)
        orth = ((means @ means.T) * pairs).sum() / count
        mi = ((directions @ directions.T / f.shape[1]).abs() * pairs).sum() / count
        activity = (f.abs().mean(1) / f.norm(dim=1).clamp(min=1e-12)).mean(0)  # (D,)
        relative = activity / (activity.max() + 1e-8)
        disp = -(relative.var(unbiased=False) / 0.25).clamp(0, 1)
    return orth, mi, disp


def adaptive_weight(diversity, low, high):
    """Weight of the diversity loss from its own value: after Eq. 15, for low 0.1 and high 0.5."""
    between = torch.where(diversity > low, (diversity - low) / high, 0.0)
    return torch.where(diversity > high, 1.0, between)


def dispersive_loss(tokens, temperature):
    """ln mean_ij exp(-|z_i - z_j|^2 / (T D tau)), i = j too: DispLoss, transport/transport.py.

    tokens (N, T, D) of N images, which push each other apart.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        n = len(tokens)
        z = tokens.float().flatten(1)
        squared = F.pdist(z).square() / z.shape[1]  # of the pairs i < j
        return ((n + 2 * (-squared / temperature).exp().sum()) / n**2).log()


def guidance_settings(model, *given):
    """omega, kappa, times of MeanFlow's guided targets: those given, the others the paper's."""
    _, _, size = model.partition("-")
    default = GUIDANCE.get(size) or GUIDANCE.get(size.partition("/")[0], GUIDANCE["other"])
    if given[:2] != (None, None):  # the table's go together
        default = (1.0, 0.0, [0.0, 1.0])
    return [own if value is None else value for value, own in zip(given, default)]


def time_derivative(net, z, t, r, y, v):
    """du/dt = v d_z u + d_t u (N, C, H, W) of u(z, r, t): MeanFlow eq. 8, in forward mode.

    Of attention's kernels the math one alone has a forward derivative. A compiled block that runs
    under jvp gives up for good: torch 2.13 never runs it compiled again.
    """
    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        tangents = (v, torch.ones_like(t))
        return torch.func.jvp(lambda z, t: net(z, t, y, h=t - r), (z, t), tangents)[1]


def alignment_blocks(depth, ddpm):
    """SRA's student and teacher block, as in train_sra.py: SRA section 3.2, Table 5."""
    if depth == 28:
        return (8, 16) if ddpm else (8, 20)
    if ddpm and depth in (12, 24):
        return depth // 4, 7 * depth // 12
    return max(1, round(depth / 4)), round(2 * depth / 3)


def projection_head(dim):
    """SRA's head, as in train_sra.py."""
    head = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))
    for layer in (head[0], head[2]):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return head


class DiverseDiT(nn.Module):
    """`model` is trained, `ema` averages it: what is sampled, and SRA's teacher."""

    def __init__(self, args, network, diffusion):
        super().__init__()
        self.args = args
        self.diffusion = diffusion
        self.step = 0  # set by the loop: steps that are done
        self.null_label = network["num_classes"]
        self.depth = network["depth"]
        if args.mean_flow:
            given = (args.omega, args.kappa, args.guided_times)
            args.omega, args.kappa, args.guided_times = guidance_settings(args.model, *given)
        self.model = DiT(**network, long_residual=args.long_residual, interval=args.mean_flow)
        self.ema = frozen_copy(self.model)
        self.layers = self.depth  # blocks that the loss sees
        if args.pairs == "random":
            self.layers = min(args.pair_layers, self.depth)
        quarter = self.depth // 4
        self.disperse_block = quarter if args.disperse_block is None else args.disperse_block
        self.check(args)
        if args.diversity_weight != 0:
            pairs = torch.zeros(self.layers, self.layers)
            for i, j in block_pairs(self.layers, args.pairs, args.anchor_block):
                pairs[i - 1, j - 1] = 1
            self.register_buffer("pairs", pairs, persistent=False)
        if args.align_weight > 0:
            if args.diffusion == "edm":
                raise UserError("SRA is not defined for --diffusion edm")
            student, teacher = alignment_blocks(self.depth, args.diffusion == "ddpm")
            self.student_block = student if args.student_block is None else args.student_block
            self.teacher_block = teacher if args.teacher_block is None else args.teacher_block
            if not 1 <= self.student_block <= self.teacher_block <= self.depth:
                bounds = f"1 <= --student-block <= --teacher-block <= {self.depth}"
                raise UserError(f"SRA needs {bounds}")
            self.head = projection_head(network["hidden_size"])

    def check(self, args):
        if args.diversity_weight != 0:
            low, high = args.weight_range
            if self.layers < 2 or not 1 <= args.anchor_block < self.depth:
                raise UserError("no pairs: --pair-layers 2 or more, --anchor-block below depth")
            if not 0 <= low < high:
                raise UserError(f"--weight-range {low} {high}: need 0 <= LOW < HIGH")
        if args.disperse_weight != 0:
            if args.micro_batch == 1:
                raise UserError("--disperse-weight: one image in a --micro-batch has no others")
            if not 1 <= self.disperse_block <= self.depth:
                raise UserError(f"--disperse-block {self.disperse_block}: 1 to {self.depth}")
        if args.mean_flow:
            low, high = args.guided_times
            if args.diffusion != "flow":
                raise UserError(f"--mean-flow is not defined for --diffusion {args.diffusion}")
            if not (0 <= args.kappa < 1 and low < high and 0 <= args.equal_share <= 1):
                raise UserError("need 0 <= --kappa < 1, LOW < HIGH, 0 <= --equal-share <= 1")
            if args.label_drop == 0 and (args.omega, args.kappa) != (1, 0):
                raise UserError("--label-drop 0: guided targets need a null label, or --omega 1")
        elif (args.omega, args.kappa, args.guided_times) != (None, None, None):
            raise UserError("--omega, --kappa and --guided-times are for --mean-flow")

    def choose_layers(self):
        """Blocks that the loss sees in this step, ascending; equal on all ranks."""
        if self.layers == self.depth:
            return range(1, self.depth + 1)
        rng = np.random.default_rng(seed_of(self.args.seed, self.step))
        return sorted((rng.permutation(self.depth)[: self.layers] + 1).tolist())

    def forward(self, x0, y, t=None, r=None, noise=None, drop=None, u=None, layers=None):
        """Images x0 (N, C, H, W) in [-1, 1], labels y (N,) -> {"loss", ...}, scalars.

        Draws: t (N,), noise like x0, drop and u (N,) from U(0, 1), layers of the pairs, ascending;
        for MeanFlow r (N,) too, equal to t in the first int(equal_share N) rows.
        """
        args = self.args
        n = len(x0)
        if args.mean_flow and t is None:
            t, r = draw_interval(n, args.equal_share, args.time_mean, args.time_std, x0.device)
        t = self.diffusion.draw_t(n, x0.device) if t is None else t
        noise = torch.randn_like(x0) if noise is None else noise
        drop = torch.rand(n, device=x0.device) if drop is None else drop
        u = torch.rand(n, device=x0.device) if u is None else u
        layers = self.choose_layers() if layers is None else layers
        wanted = tuple(layers) if args.diversity_weight != 0 else ()
        wanted += (self.disperse_block,) if args.disperse_weight != 0 else ()
        wanted += (self.student_block,) if args.align_weight > 0 else ()
        dropped = drop < args.label_drop
        if args.mean_flow:  # as many, but the first rows
            dropped = torch.arange(n, device=x0.device) < dropped.sum()
        labels = torch.where(dropped, self.null_label, y)
        x_t = self.diffusion.add_noise(x0, noise, t)
        h = t - r if args.mean_flow else None
        inputs = (*self.diffusion.net_inputs(x_t, t), labels)
        out = self.model(*inputs, features=wanted, h=h)
        out, features = out if wanted else (out, {})
        if args.mean_flow:
            v = self.diffusion.target(x0, noise, t)
            terms = self.mean_flow(out, x_t, v, t, r, labels)
        else:
            terms = {"denoise": self.diffusion.loss(out, x0, noise, t).mean()}
        total = terms["denoise"]
        if args.diversity_weight != 0:
            parts = diversity_terms(torch.stack([features[k] for k in layers]), self.pairs)
            diversity = sum(a * b for a, b in zip(args.term_weights, parts))
            weight = adaptive_weight(diversity, *args.weight_range)
            if args.diversity_weight is not None:
                weight = torch.full_like(weight, args.diversity_weight)
            total = total + (weight.detach() if args.detach_weight else weight) * diversity
            terms |= {"diversity": diversity, "weight": weight}
            terms |= dict(zip(("orth", "mi", "disp"), parts))
        if args.disperse_weight != 0:
            disperse = dispersive_loss(features[self.disperse_block], args.disperse_temperature)
            total = total + args.disperse_weight * disperse
            terms |= {"disperse": disperse}
        if args.align_weight > 0:
            align = self.alignment(features[self.student_block], x0, labels, t, noise, u)
            total = total + args.align_weight * align
            terms |= {"align": align}
        return {"loss": total, **terms}

    def mean_flow(self, u, z, v, t, r, labels):
        """MeanFlow's loss of u (N, C, H, W), what the network gives for z (N, C, H, W) and labels.

        Also mean squared errors: to v; to the target, where r = t and where r < t.
        """
        args = self.args
        with torch.no_grad():
            target = self.mean_flow_target(z, v, t, r, labels)
        errors = (u.float() - target).square().flatten(1).sum(1)  # (N,), over C, H, W
        divisor = (errors + args.loss_offset).pow(args.loss_power).detach()  # section 4.3
        terms = {"denoise": (errors / divisor).mean(), "error_v": F.mse_loss(u.float(), v)}
        k = int(args.equal_share * len(u))
        for name, part in (("error_equal", errors[:k]), ("error_below", errors[k:])):
            terms |= {name: part.mean() / v[0].numel()} if len(part) else {}
        return terms

    def mean_flow_target(self, z, v, t, r, labels):
        """v_g - (t - r) du/dt (N, C, H, W): MeanFlow eq. 18."""
        v_g = self.guided_velocity(z, v, t, labels)
        k = int(self.args.equal_share * len(z))  # r = t up to here: no derivative needed
        if k == len(z):
            return v_g
        dudt = time_derivative(self.model, z[k:], t[k:], r[k:], labels[k:], v_g[k:])
        return torch.cat([v_g[:k], v_g[k:] - per_image(t - r, z)[k:] * dudt])

    def guided_velocity(self, z, v, t, y):
        """v_g = omega v + kappa v_c + (1 - omega - kappa) v_u (N, C, H, W): MeanFlow eq. 19, 21.

        v_c and v_u are the network's own velocities, u at h = 0, with labels y (N,) and without.
        In rows whose label was dropped, and at other times, v_g = v.
        """
        omega, kappa = self.args.omega, self.args.kappa
        low, high = self.args.guided_times
        if omega == 1 and kappa == 0:
            return v
        null = torch.full_like(y, self.null_label)
        labels = [null, y] if kappa != 0 else [null]
        m = len(labels)
        own = self.model(z.repeat(m, 1, 1, 1), t.repeat(m), torch.cat(labels)).float().chunk(m)
        guided = omega * v + kappa * own[-1] + (1 - omega - kappa) * own[0]
        chosen = (low <= t) & (t <= high) & (y != self.null_label)
        return torch.where(chosen[:, None, None, None], guided, v)

    def alignment(self, tokens, x0, y, t, noise, u):
        """SRA's loss of the student's tokens (N, T, D), as in train_sra.py."""
        earlier = (t - self.args.time_gap * u).clamp(0, 1)
        if t.dtype == torch.int64:  # DDPM's steps
            earlier = (t - (u * round(1000 * self.args.time_gap)).long()).clamp(1, 999)
        x_teacher = self.diffusion.add_noise(x0, noise, earlier)
        inputs = self.diffusion.net_inputs(x_teacher, earlier)
        with torch.no_grad():
            target = self.ema.tokens_after(*inputs, y, self.teacher_block)  # (N, T, D)
        return F.smooth_l1_loss(self.head(tokens).float(), target.float(), beta=0.05)

    def after_step(self, step, steps):
        """Nothing to update: SRA's teacher is the EMA, which the loop keeps."""


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
    main(DiverseDiT, parse_args())
