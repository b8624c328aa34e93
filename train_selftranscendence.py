"""Self-Transcendence: Is External Feature Guidance Indispensable for Accelerating Diffusion Transformer Training? (Sun et al., arXiv
2601.07773; v1: Beyond External Guidance: Unleashing the Semantic Richness Inside Diffusion Transformers for Improved Training), for SiT.

Two runs, no external encoder. Stage 1 trains a SiT with a head on an early block that predicts what the whole network predicts. Stage 2
trains a new SiT from scratch: its middle block regresses a deeper block of the frozen stage-1 network, after classifier-free guidance
between that network's features with and without label. Heads are not used in sampling; sample from the EMA of stage 2.

    x_t = a(t) x_0 + s(t) eps,   v = a' x_0 + s' eps,   m = 1 where 0.4 <= t <= 0.7, else 0       per image; data t = 0, noise t = 1
    stage 1   L = L_gen + 0.5 mean m ||linear(LN(MLP(h_k))) - v||^2                                h_k: the stream after block k
    stage 2   f_c = T_n(x_t, t, y),   f_u = T_n(x_t, t, null),   f_g = f_u + 30 (f_c - f_u)        T_n: the teacher's after block n
              L = L_gen + 0.5 mean m ||MLP(h_k) - f_g||^2   until --stop-step, then L_gen          squares are means over elements

Commands; running one again resumes it from its newest checkpoint
    python train_selftranscendence.py --image-size 16 --model DiT-Ti/2 --steps 500 --batch-size 16 --lr 2e-3 --warmup 100 --ema-warmup
        --out results/stage1 && python train_selftranscendence.py --image-size 16 --model DiT-Ti/2 --steps 1000 --batch-size 16 --lr 2e-3
        --warmup 100 --ema-warmup --stage 2 --teacher results/stage1 --stop-step 250 --out results/stage2                   toy, on a CPU
    torchrun --nproc_per_node=8 train_selftranscendence.py --data imagenet/train --vae VAE --image-size 256 --model SiT-XL/2 --steps 200000
        --out results/stage1                                8 GPUs; VAE: sd-vae-ft-ema's diffusion_pytorch_model.safetensors; then
    torchrun --nproc_per_node=8 train_selftranscendence.py --data imagenet/train --vae VAE --image-size 256 --model SiT-XL/2 --steps 400000
        --stage 2 --teacher results/stage1 --out results/stage2                         512 px: both with --image-size 512
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_selftranscendence.py ...  2 nodes, on both
Defaults: batch 256, AdamW 1e-4, clipping at 1; qk-norm, no flips and no EMA warm-up as released (`--no-qk-norm` to compare with the other
scripts). `--align-weight 0`: plain SiT or DiT, without head or teacher. A plain SiT can be the teacher too, as an ablation.
Logged: align, as --t-mode has it, before its weight. Stage 2, of the images that the teacher saw: its mean over those in --t-range, with
label, without (align_in, _kept, _dropped; sums divided by expected counts: right on average over many steps), |f_c - f_u| / |f_u|
(guidance_gap), |f_g| / |f_u| (guided_norm). Not logged: the gradient norm of each term.

Implementation details (csslc/Self-Transcendence at 42fde5d; 1, 2: stage; T: train_*.py, sh: train_*.sh, M: models/*.py)
 1. Stage 1 predicts the velocity, though the abstracts speak of VAE features [loss.py:226]; `--stage1-target x0`: compared in x_0.
 2. MLP: D -> 2048 -> 2048 -> D, SiLU [M2:18]; 2 D wide below D = 768 (ours). Stage 1: LayerNorm without affine, then linear [M1:161].
 3. Blocks: stage 1 block 2 [sh1, for B]; stage 2 depth / 2 -> 2 depth / 3: B 6 -> 8 [sh2], L 12 -> 16, XL 14 -> 18 by the same rule.
 4. Teacher: online weights, not the EMA [T2:178]; fp32, on GPUs TF32 [T2:170] (bf16 moved f_g by 1 % in the toy); it stops at its block
    [M2:300]. It must have the student's network, process and VAE, and should have its data: of classes only the number is compared.
 5. Guidance 30, weight 0.5, plain MSE, stop at step 100,000 [sh2; T2:429]; 50,000 from 24 blocks on (a third party's notes). Other
    lengths: stage 1, stage 2 and stop are in proportion 40 : 80 : 20 epochs (10 for L and XL).
 6. A student whose label is dropped has the conditional target [T2:285]. `--drop-target` unconditional: f_g = f_u for it; skip: no term.
 7. After the stop the head gets zero gradients; Adam's momentum moves it by some 9 learning rates more, which nothing reads.

Differences from the official code
 1. Its --t-range masks nothing: (N, 1, 1, 1) times (N,) broadcasts [loss.py:237, 328]. `--t-mode` masked: as described; all: every t, times
    high - low (released, in expectation); released: times the share in range of the micro-batch; selected: mean over those in range of
    the micro-batch (0 if there are none, so that small ones drift towards masked).
 2. Its stage 2 stops with a NameError [T2:188], S does not run [M2:206]. Its teacher is random if no file is given [T2:176].
 3. Its head and teacher run on all images, and the teacher on after the stop; ours, for masked and selected, on those in range alone
    (three in ten), and the teacher is freed at the stop; a run resumed after it still needs the file, for its first step.
 4. Its null label is always 1000 [loss.py:315]. 5. It trains in fp16, we in bf16.
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

# --- method: Self-Transcendence ---------------------------------------------------------------------------------------------------------

from models import DiT, build_model, frozen_copy

DEFAULTS = {"qk_norm": True, "ema_warmup": False, "flip": False}
LOGGED = (
    "align",
    "align_in",
    "align_kept",
    "align_dropped",
    "guidance_gap",
    "guided_norm",
)  # terms of stage 2


def method_arguments(parser):
    add = parser.add_argument_group("Self-Transcendence").add_argument
    add(
        "--stage",
        type=int,
        choices=(1, 2),
        default=1,
        help="1: train the teacher; 2: a new network guided by it",
    )
    add(
        "--align-weight",
        type=float,
        default=0.5,
        help="weight of either stage's own term; 0: plain SiT or DiT, no head, no teacher",
    )
    add(
        "--student-block",
        type=int,
        help="block of the head (default: 2 in stage 1, depth / 2 in stage 2)",
    )
    add(
        "--head-width",
        type=int,
        help="hidden width of the head (default: 2048, or twice the network's where that is below 768)",
    )
    add(
        "--t-range",
        type=float,
        nargs=2,
        default=[0.4, 0.7],
        metavar=("LOW", "HIGH"),
        help="times of the term, both ends included",
    )
    add(
        "--t-mode",
        choices=("masked", "selected", "all", "released"),
        default="masked",
        help="how --t-range counts: difference 1",
    )
    add(
        "--stage1-target",
        choices=("velocity", "x0"),
        help="stage 1: in which its error is measured (default: velocity)",
    )
    add(
        "--teacher",
        metavar="CKPT",
        help="stage 2: a checkpoint of stage 1, or its run folder, whose newest is taken",
    )
    add(
        "--teacher-weights",
        choices=("model", "ema"),
        default="model",
        help="stage 2: which weights of that checkpoint",
    )
    add(
        "--teacher-block",
        type=int,
        help="stage 2: block of the teacher that is regressed (default: 2 depth / 3)",
    )
    add("--teacher-precision", choices=("fp32", "bf16"), default="fp32", help="stage 2")
    add("--feature-guidance", type=float, default=30.0, help="stage 2: w of f_u + w (f_c - f_u)")
    add(
        "--stop-step",
        type=int,
        help="stage 2: steps with its term (default: 100000; 50000 from 24 blocks on)",
    )
    add(
        "--drop-target",
        choices=("conditional", "unconditional", "skip"),
        default="conditional",
        help="stage 2: of students without label",
    )


def window_mean(values, inside, counted, mode, share):
    """Terms (N,) -> scalar, by --t-mode. inside, counted (N,) are 0 or 1: t in range; not skipped. share: of all times, in range."""
    if mode == "selected":
        return (values * inside * counted).sum() / (inside * counted).sum().clamp(min=1)
    if mode == "masked":
        return (values * inside * counted).mean()
    return (share if mode == "all" else inside.mean()) * (values * counted).mean()


class SelfTranscendence(nn.Module):
    """`model` is trained, `ema` averages it and is sampled, `frozen` is the teacher. The loop sets `step`, the number of finished steps."""

    def __init__(self, args, network, diffusion):
        super().__init__()
        self.diffusion, self.step, self.stage, self.weight, self.frozen = (
            diffusion,
            0,
            args.stage,
            args.align_weight,
            None,
        )
        self.label_drop, self.null_label = args.label_drop, network["num_classes"]
        self.model = DiT(**network)
        self.ema = frozen_copy(self.model)
        self.t_range, self.t_mode, self.drop_target = args.t_range, args.t_mode, args.drop_target
        self.everywhere = args.t_mode in ("all", "released")
        if not 0 <= args.t_range[0] <= args.t_range[1] <= 1:
            raise ValueError(
                f"--t-range {args.t_range[0]:g} {args.t_range[1]:g}: need 0 <= LOW <= HIGH <= 1"
            )
        for name in (
            ("stage1_target",) if self.stage == 2 else ("teacher", "teacher_block", "stop_step")
        ):
            if getattr(args, name) is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')} belongs to stage {3 - self.stage}, and this is --stage {self.stage}"
                )
        if self.weight == 0:
            return
        if args.diffusion not in ("flow", "gvp"):
            raise ValueError(
                f"Self-Transcendence needs --diffusion flow or gvp; with {args.diffusion} only --align-weight 0"
            )
        depth, dim = network["depth"], network["hidden_size"]
        default = 2 if self.stage == 1 else depth // 2
        self.student_block = default if args.student_block is None else args.student_block
        self.teacher_block = 2 * depth // 3 if args.teacher_block is None else args.teacher_block
        if not 1 <= self.student_block <= depth or not 1 <= self.teacher_block <= depth:
            blocks = (
                f"--student-block {self.student_block}"
                + f", --teacher-block {self.teacher_block}" * (self.stage == 2)
            )
            raise ValueError(f"{blocks}: need blocks from 1 to {depth} (the depth)")
        width = (2048 if dim >= 768 else 2 * dim) if args.head_width is None else args.head_width
        if width < 1:
            raise ValueError("--head-width 0: must be 1 or more")
        layers = [
            nn.Linear(dim, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, dim),
        ]
        if self.stage == 1:
            layers += [
                nn.LayerNorm(dim, 1e-6, elementwise_affine=False),
                nn.Linear(dim, self.model.final_layer.linear.out_features),
            ]
        self.head = nn.Sequential(*layers)
        for layer in layers[::2]:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        if self.stage == 1:
            self.x0_target, self.stop_step = args.stage1_target == "x0", math.inf
            return
        self.guidance, self.teacher_bf16 = args.feature_guidance, args.teacher_precision == "bf16"
        self.stop_step = (
            (50_000 if depth >= 24 else 100_000) if args.stop_step is None else args.stop_step
        )
        self.frozen = self.load_teacher(args)

    def load_teacher(self, args):
        """--teacher's network up to its block. Raises ValueError, one line, unless it is the student's in all but its weights."""
        if not args.teacher:
            raise ValueError("--stage 2 needs --teacher, a checkpoint or run folder of stage 1")
        path = Path(args.teacher)
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        file = newest_checkpoint(folder) if path.is_dir() else path
        if not file or not file.exists():
            raise ValueError(
                f"--teacher {path}: "
                + ("no such file or folder" if file else "no checkpoint in this folder")
            )
        saved = load_checkpoint(file, checked=path.is_dir())
        theirs = {
            **saved["args"]["network"],
            "diffusion": saved["args"]["diffusion"],
            "VAE": saved["args"].get("vae_hash"),
        }
        ours = {**self.model.config, "diffusion": args.diffusion, "VAE": args.vae_hash}
        unlike = [
            f"{k} {theirs.get(k)} (here {ours.get(k)})"
            for k in ours | theirs
            if ours.get(k) != theirs.get(k)
        ]
        if unlike:
            raise ValueError(f"--teacher {file} does not fit this run: it has {', '.join(unlike)}")
        if saved["args"].get("label_drop") == 0 and self.guidance != 1:
            raise ValueError(
                f"--teacher {file} was trained with --label-drop 0: it has no unconditional features to guide away from"
            )
        args.teacher = str(file)  # what the run's checkpoints record: a folder may get newer ones
        teacher = build_model(saved["args"]["network"])
        teacher.load_state_dict(saved[args.teacher_weights])
        del teacher.blocks[self.teacher_block :], teacher.final_layer
        return teacher.requires_grad_(False).eval()

    @torch.no_grad()
    def teacher_features(self, x_t, t, y):
        """Stage 2: f_c and f_u (N, T, D), fp32, in one doubled forward."""
        x_t, t, y = (
            torch.cat([x_t, x_t]),
            torch.cat([t, t]),
            torch.cat([y, torch.full_like(y, self.null_label)]),
        )
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.teacher_bf16):
            return self.frozen.tokens_after(x_t, t, y, self.teacher_block).float().chunk(2)

    def forward(self, x0, y, t=None, noise=None, drop=None):
        """Images x0 (N, C, H, W) in [-1, 1], labels y (N,) -> scalars. Draws: t (N,), noise like x0, drop (N,) from U(0, 1)."""
        n, (low, high) = len(x0), self.t_range
        t = (
            self.diffusion.draw_t(n, "cpu") if t is None else t
        )  # on the CPU, where it is known without waiting which images count
        in_range = (t >= low) & (t <= high)
        t = t.to(x0.device, non_blocking=True)
        noise = torch.randn_like(x0) if noise is None else noise
        dropped = (torch.rand(n, device=x0.device) if drop is None else drop) < self.label_drop
        y_seen = torch.where(dropped, self.null_label, y)  # by the student
        x_t = self.diffusion.add_noise(x0, noise, t)
        inputs = *self.diffusion.net_inputs(x_t, t), y_seen
        if self.weight == 0 or self.step >= self.stop_step:
            denoise = self.diffusion.loss(self.model(*inputs), x0, noise, t).mean()
            if self.weight == 0:
                return {"loss": denoise, "denoise": denoise}
            unused = sum(
                0 * p.sum() for p in self.head.parameters()
            )  # DDP wants a gradient of every parameter
            return {
                "loss": denoise + unused,
                "denoise": denoise,
                **dict.fromkeys(LOGGED, torch.zeros_like(denoise)),
            }
        rows = slice(
            None
        )  # images on which head and teacher run: those that count, but at least one (of weight 0), for DDP
        if not self.everywhere:
            rows = (
                in_range.nonzero()[:, 0].to(x0.device, non_blocking=True)
                if in_range.any()
                else slice(1)
            )
        out, features = self.model(*inputs, features=(self.student_block,))
        denoise = self.diffusion.loss(out, x0, noise, t).mean()
        projected = self.head(
            features[self.student_block][rows]
        ).float()  # (R, T, D), in stage 1 (R, T, p * p * C)
        inside = in_range.to(x0.device, torch.float32, non_blocking=True)
        counted, error = torch.ones_like(inside), torch.zeros_like(inside)  # (N,)
        if self.stage == 1:
            early, x_t, x0, noise, t = (
                self.model.unpatchify(projected),
                x_t[rows],
                x0[rows],
                noise[rows],
                t[rows],
            )  # (R, C, H, W)
            squares = (
                (self.diffusion.denoise(early, x_t, t) - x0).square()
                if self.x0_target
                else self.diffusion.loss(early, x0, noise, t)
            )
            error[rows] = squares.flatten(1).mean(1)
            align = window_mean(error, inside, counted, self.t_mode, high - low)
            return {"loss": denoise + self.weight * align, "denoise": denoise, "align": align}
        f_c, f_u = self.teacher_features(
            x_t[rows], t[rows], (y_seen if self.drop_target == "unconditional" else y)[rows]
        )
        f_g = torch.lerp(
            f_u, f_c, self.guidance
        )  # f_u + w (f_c - f_u), and exactly f_u or f_c at w = 0 or 1
        error[rows] = (projected - f_g).square().flatten(1).mean(1)
        kept = (~dropped).float()
        align = window_mean(
            error, inside, kept if self.drop_target == "skip" else counted, self.t_mode, high - low
        )
        seen, share = (counted, 1.0) if self.everywhere else (inside, high - low)
        groups = {  # images and their expected share
            "align_in": (inside, high - low),
            "align_kept": (seen * kept, share * (1 - self.label_drop)),
            "align_dropped": (seen * (1 - kept), share * self.label_drop),
        }
        terms = {
            name: (error * group).mean() / max(expected, 1e-9)
            for name, (group, expected) in groups.items()
        }
        terms |= {
            "guidance_gap": (f_c - f_u).norm() / f_u.norm(),
            "guided_norm": f_g.norm() / f_u.norm(),
        }
        return {"loss": denoise + self.weight * align, "denoise": denoise, "align": align, **terms}

    def after_step(self, step, steps):
        """Free the teacher after its last step; emptied first, since DDP still refers to its parameters."""
        if self.frozen is not None and step + 1 >= self.stop_step:
            for parameter in self.frozen.parameters():
                parameter.data = parameter.new_empty(0)
            self.frozen = None


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
    main(SelfTranscendence, parse_args())
