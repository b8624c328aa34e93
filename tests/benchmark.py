"""Training throughput, side by side in one run: vanilla against each method, beside the bound that counting operations gives.

    python tests/benchmark.py                      sizes for the machine: Ti/4 and S/4 pixels on CPU; B/2 and XL/2 latents-shaped on CUDA
    python tests/benchmark.py --models DiT-B/2 --batch-size 256 --compile on
    python tests/benchmark.py --count              operations, bytes and memory of a step, counted without running it: S/2, B/2, XL/2
    python tests/benchmark.py --loader 0           images/s that the latent cache feeds, here without loader processes
    python tests/benchmark.py --evaluation         fid.py alone: its network against a plain loop, its Frechet distance against sqrtm

For each row: images/s (median step), the ratio to the first row, the bound on the ratio to vanilla from multiply-adds (a teacher
pass costs one forward of the blocks it runs, training three), peak memory, the slowest step over the median, and the share of a step
outside the network's forward and backward: reading the images (in this process; the training scripts read ahead in others with --workers),
clipping, AdamW, EMA. On CUDA also MFU against a bf16 matrix product measured in the same run. Steps of the rows alternate, so that a noisy
machine disturbs all alike; only ratios within one run mean something. "plain" is vanilla as one would first write it: see PlainDiT. All
rows have the same network: Self-Transcendence is without the qk-norm that is its default.
"""

import argparse
import contextlib
import copy
import gc
import json
import math
import multiprocessing
import re
import sys
import tempfile
import time
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import scipy.linalg
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fid
import train_discriminative
import train_diversedit
import train_mdt
import train_selftranscendence
import train_sra
from diffusion import make_diffusion
from models import Block, DiT, LatentCache, latent_layout, parse_model

# name: script, its method, flags; the noise process is --diffusion, unless the flags say otherwise
METHODS = {
    "vanilla": (train_sra, "SRA", ["--align-weight", "0"]),
    "plain": (train_sra, "SRA", ["--align-weight", "0"]),  # see PlainDiT
    "sra": (train_sra, "SRA", []),
    "mdt": (train_mdt, "MaskDiT", ["--diffusion", "edm"]),
    "mdt r=0": (train_mdt, "MaskDiT", ["--diffusion", "edm", "--mask-ratio", "0"]),
    "sd-dit": (train_discriminative, "SDDiT", ["--diffusion", "edm"]),
    "stage 1": (train_selftranscendence, "SelfTranscendence", []),
    "stage 2": (
        train_selftranscendence,
        "SelfTranscendence",
        ["--stage", "2", "--teacher", "TEACHER"],
    ),
    "all t": (
        train_selftranscendence,
        "SelfTranscendence",
        ["--stage", "2", "--teacher", "TEACHER", "--t-mode", "all"],
    ),
    "stopped": (
        train_selftranscendence,
        "SelfTranscendence",
        ["--stage", "2", "--teacher", "TEACHER", "--stop-step", "0"],
    ),
    "diversedit": (train_diversedit, "DiverseDiT", []),
    "no loss": (train_diversedit, "DiverseDiT", ["--diversity-weight", "0"]),
}


def block_macs(tokens, D, cond=None):
    """Multiply-adds of one block for one image: qkv and projection 4 T D^2, MLP 8 T D^2, attention 2 T^2 D, adaLN 6 D cond."""
    return 12 * tokens * D**2 + 2 * tokens**2 * D + 6 * D * (cond or D)


def macs(network):
    """Multiply-adds of one training step for one image, by method; backward costs two forwards, a teacher pass has none."""
    T, D, depth = (
        (network["input_size"] // network["patch_size"]) ** 2,
        network["hidden_size"],
        network["depth"],
    )
    patch = network["patch_size"] ** 2 * network["in_channels"]
    embed = T * patch * D + 256 * D + D**2
    final = T * patch * D * (2 if network["learn_sigma"] else 1) + 2 * D**2
    vanilla = embed + depth * block_macs(T, D) + final
    _, teacher_block = train_sra.alignment_blocks(depth, network["learn_sigma"])
    decoder, width, _ = (2, 128, 4) if D == 128 else (8, 512, 16)

    def masked(kept):
        bridge = kept * D * width + 2 * D**2
        return (
            embed
            + depth * block_macs(kept, D)
            + bridge
            + decoder * block_macs(T, width, D)
            + T * patch * width
            + 2 * D * width
        )

    seen = int(T * 0.8)  # of SD-DiT's student; its bridge is on all tokens
    head = 2048 * D + 2048**2 + 2048 * 256 + 256 * 8192  # per token
    student = masked(seen) + (T - seen) * D * width + (seen + 1) * head
    teacher_pass = embed + depth * block_macs(T + 1, D) + (seen + 1) * head
    residuals, layers = depth // 2 * 2 * T * D**2, min(10, depth)
    hidden = 2048 if D >= 768 else 2 * D
    mlp, guide = T * (2 * D * hidden + hidden**2), 2 * (embed + 2 * depth // 3 * block_macs(T, D))
    return {
        "vanilla": 3 * vanilla,
        "plain": 3 * vanilla,
        "sra": 3 * (vanilla + 4 * T * D**2) + embed + teacher_block * block_macs(T, D),
        "mdt": 3 * masked(T // 2),
        "mdt r=0": 3 * masked(T),
        "sd-dit": 3 * student
        + teacher_pass
        + (seen + 1) * 2 * 256 * 8192,  # both logits are computed again in the backward pass
        "stage 1": 3 * (vanilla + 0.3 * (mlp + T * D * patch)),  # three images in ten are in range
        "stage 2": 3 * (vanilla + 0.3 * mlp) + 0.3 * guide,
        "all t": 3 * (vanilla + mlp) + guide,
        "stopped": 3 * vanilla,
        "diversedit": 3
        * (vanilla + residuals + layers**2 * T * D),  # cosines of all pairs of blocks at all tokens
        "no loss": 3 * (vanilla + residuals),
    }


def save_teacher(path, network, diffusion):
    """A checkpoint of that network, untrained, for stage 2 of Self-Transcendence."""
    model = DiT(**network)
    content = {
        "model": model.state_dict(),
        "ema": {},
        "method": {},
        "optimizer": {},
        "step": 0,
        "log": torch.zeros(0),
    }
    torch.save({**content, "args": {"network": model.config, "diffusion": diffusion}}, path)
    return str(path)


class PlainBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def attention(self, x):
        N, T, D = x.shape
        q, k, v = (
            self.attn["qkv"](x).reshape(N, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        )
        weights = (q @ k.transpose(2, 3) / math.sqrt(D // self.heads)).softmax(3)
        return self.attn["proj"]((weights @ v).transpose(1, 2).reshape(N, T, D))

    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
            v[:, None] for v in self.adaLN_modulation(c).chunk(6, 1)
        )
        x = x + gate_a * self.attention(self.norm(x) * (1 + scale_a) + shift_a)
        hidden = self.mlp["fc1"](self.norm(x) * (1 + scale_m) + shift_m)
        return x + gate_m * self.mlp["fc2"](nn.functional.gelu(hidden, approximate="tanh"))


class PlainDiT(nn.Module):
    """DiT as one would first write it: the yardstick. Explicit softmax attention, separate products and sums, patches by a convolution; in
    Row.step an EMA parameter by parameter, AdamW and clipping with default flags, the loss read back in every step. State dict and
    outputs are those of the DiT it is made from.
    """

    def __init__(self, model):
        super().__init__()
        dim = model.config["hidden_size"]
        for name in ("x_embedder", "t_embedder", "y_embedder"):
            self.add_module(name, copy.deepcopy(getattr(model, name)))
        self.register_buffer("pos_embed", model.pos_embed.clone())
        self.blocks = nn.ModuleList(
            PlainBlock(dim, model.config["num_heads"]) for _ in model.blocks
        )
        self.norm, self.final_layer = (
            nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False),
            nn.Module(),
        )
        self.final_layer.linear = copy.deepcopy(model.final_layer.linear)
        self.final_layer.adaLN_modulation = copy.deepcopy(model.final_layer.adaLN_modulation)
        self.unpatchify = model.unpatchify
        self.load_state_dict(model.state_dict())

    def forward(self, x, t, y):
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = (v[:, None] for v in self.final_layer.adaLN_modulation(c).chunk(2, 1))
        return self.unpatchify(self.final_layer.linear(self.norm(x) * (1 + scale) + shift))


def make_method(name, network, args, more=()):
    """The method of a row, and its parsed flags: args.diffusion, those of METHODS with args.teacher, and `more`."""
    script, method, own = METHODS[name]
    parsed = script.parse_args(
        [
            "--diffusion",
            args.diffusion,
            *(args.teacher if flag == "TEACHER" else flag for flag in own),
            *more,
        ]
    )
    torch.manual_seed(0)
    method = getattr(script, method)(parsed, network, make_diffusion(parsed.diffusion))
    if name == "plain":
        method.model, method.ema = (
            PlainDiT(method.model),
            PlainDiT(method.ema).requires_grad_(False),
        )
    return method, parsed


class Row:
    """One method at one size: the arithmetic of a training step of the scaffold, timed in parts; no loader, log or progress bar."""

    def __init__(self, name, network, compiled, args, device):
        self.name, self.compiled, self.device, self.times, self.outside = (
            name,
            compiled,
            device,
            [],
            [],
        )
        self.method, parsed = make_method(name, network, args)
        self.method.to(device)
        self.parameters, self.clip = (
            [p for p in self.method.parameters() if p.requires_grad],
            parsed.clip_grad,
        )
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=1e-4, weight_decay=0.0, fused=None if name == "plain" else True
        )
        self.trained, self.averaged = (
            list(self.method.model.parameters()),
            list(self.method.ema.parameters()),
        )
        if compiled:
            for module in self.method.modules():
                if isinstance(module, (Block, PlainBlock)):
                    module.compile()
        side = network["input_size"]
        self.bf16, self.shape = (
            device.type == "cuda",
            (args.batch_size, network["in_channels"], side, side),
        )
        self.pixels = network["in_channels"] == 3
        self.data = train_sra.Images("shapes", network["input_size"], 0, 1) if self.pixels else None
        self.classes, self.memory = network["num_classes"], 0

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(self, k):
        start = self.now()
        n = self.shape[0]
        if self.pixels:
            x0, y = train_sra.collate(
                [self.data[((k * n + i) % len(self.data), False)] for i in range(n)]
            )
            x0 = x0.to(self.device).float() / 127.5 - 1
        else:
            x0, y = torch.randn(self.shape, device=self.device), torch.randint(self.classes, (n,))
        y, read = y.to(self.device), self.now()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.method(x0, y)["loss"]
        loss.backward()
        network = self.now()
        if self.name == "plain":
            loss.item()
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters])
            if self.clip:
                nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            if self.name == "plain":
                for a, p in zip(self.averaged, self.trained):
                    a.mul_(1 - 1e-4).add_(p, alpha=1e-4)
            else:
                torch._foreach_lerp_(self.averaged, self.trained, 1e-4)
            self.method.after_step(k, 1000)
        end = self.now()
        self.times.append(end - start)
        self.outside.append(1 - (network - read) / (end - start))


class WithoutContent(FakeTensorMode):
    """Tensors with shapes and without content; a copy of a module stays in the same mode."""

    def __deepcopy__(self, memo):
        return self


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write, views excepted, and the most that storages held at once."""

    def __init__(self):
        super().__init__()
        self.bytes = self.live = self.peak = 0
        self.seen = weakref.WeakKeyDictionary()

    def hold(self, storage):
        if storage not in self.seen:
            self.seen[storage] = size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.release, size)

    def release(self, size):
        self.live -= size

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        outputs = [v for v in tree_leaves(result) if isinstance(v, torch.Tensor)]
        for v in outputs:
            self.hold(v.untyped_storage())
        if operation.namespace == "aten" and not operation.is_view:
            inputs = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
            if not outputs:  # of operations on lists: what they write
                changed = [
                    a
                    for a, about in zip(args, operation._schema.arguments)
                    if about.alias_info and about.alias_info.is_write
                ]
                outputs = [v for v in tree_leaves(changed) if isinstance(v, torch.Tensor)]
            self.bytes += sum(v.numel() * v.element_size() for v in inputs + outputs)
        return result


def counted(name, network, batch, args, checkpointing=False, more=()):
    """A step in bf16 of tensors without content: FLOP (a product and a sum count as two; attention's products computed again do not
    count), bytes moved by the forward and backward pass and by the rest, peak bytes.
    """
    side, aten = network["input_size"], torch.ops.aten
    products = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
            q, k, v
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
            2 * sdpa_flop_count(q, k, v)
        ),
    }
    draw = mock.patch(
        "torch.nn.init.trunc_normal_", nn.init.normal_
    )  # the former looks at what it has drawn
    with WithoutContent(), Traffic() as traffic, draw:
        method, parsed = make_method(name, network, args, more)
        method.model.checkpointing = checkpointing
        parameters = [p for p in method.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, fused=True)
        flop = FlopCounterMode(display=False, custom_mapping=products)
        for counter in (
            flop,
            contextlib.nullcontext(),
        ):  # the first step makes AdamW's state; the counter keeps tensors alive
            with counter:
                x0, y = (
                    torch.randn(batch, network["in_channels"], side, side),
                    torch.zeros(batch, dtype=torch.int64),
                )
                traffic.bytes, traffic.peak = 0, traffic.live
                with torch.autocast("cpu", torch.bfloat16):
                    loss = method(x0, y)["loss"]
                loss.backward()
            inside, traffic.bytes = traffic.bytes, 0
            norm = nn.utils.get_total_norm([p.grad for p in parameters])
            if parsed.clip_grad:
                nn.utils.clip_grads_with_norm_(parameters, parsed.clip_grad, norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_lerp_(
                    list(method.ema.parameters()), list(method.model.parameters()), 1e-4
                )
                method.after_step(0, 1000)
            del loss, norm, x0, y
        return np.array([flop.get_total_flops(), inside, traffic.bytes, traffic.peak])


IN_RANGE = {
    "stage 1": "vanilla",
    "stage 2": "stopped",
}  # rows whose own part runs on three images in ten; what is left without it


def count(args):
    """Prints for each network and method: operations and bytes of a step in bf16, the bound, and peak memory."""
    print(
        "TFLOP and GB per image: of the forward and backward pass; GB as moved by eager operations (compiled ones move less)."
    )
    print(
        "bound: images/s over vanilla's, from the operations that the code runs; formula: from those that the method needs."
    )
    print(
        "GB per step: norm, clipping, AdamW, EMA. Peak memory in GiB for n images in a micro-batch, without and with --checkpointing."
    )
    columns = f"{'model':9} {'tokens':>6} {'method':10} {'TFLOP':>7} {'bound':>6} {'formula':>7} {'GB/image':>8} {'GB/step':>7}"
    print(f"{columns} {'memory':>14} {'checkpointing':>16}")
    for model in args.models:
        for side in (32, 64):
            network = {
                "input_size": side,
                "in_channels": 4,
                "num_classes": 1000,
                **parse_model(model),
                "learn_sigma": False,
            }
            formula, first = macs(network), None
            with tempfile.TemporaryDirectory() as folder:
                args.teacher = save_teacher(Path(folder, "teacher.pt"), network, args.diffusion)
                for name in (n for n in args.methods if n != "plain"):

                    def step(batch, checkpointing):
                        if name not in IN_RANGE:
                            return counted(name, network, batch, args, checkpointing)
                        some = counted(
                            name, network, batch, args, checkpointing, ["--t-mode", "all"]
                        )
                        return 0.3 * some + 0.7 * counted(
                            IN_RANGE[name], network, batch, args, checkpointing
                        )

                    (a, b), (c, d) = ([step(n, again) for n in (8, 16)] for again in (False, True))
                    flop, moved, rest = b[0] / 16, (b[1] - a[1]) / 8, b[2]
                    first = first or flop
                    ratios = f"{first / flop:6.3f} {formula['vanilla'] / formula[name]:7.3f}"
                    line = f"{model:9} {side**2 // network['patch_size'] ** 2:6} {name:10} {flop / 1e12:7.3f} {ratios}"
                    line += f" {moved / 1e9:8.2f} {rest / 1e9:7.1f}"
                    for low, high in ((a[3], b[3]), (c[3], d[3])):
                        line += (
                            f" {(2 * low - high) / 2**30:6.2f} + {(high - low) / 8 / 2**30:.3f} n"
                        )
                    print(line, flush=True)


def median(values):
    return sorted(values)[len(values) // 2]


def matmul_rate(device):
    """Measured bf16 multiply-adds per second of an 8192^3 product."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    torch.cuda.synchronize()
    return 10 * 8192**3 / (time.perf_counter() - start)


def peak_memory(*row):
    """Peak memory of three steps on their own, in GiB: of the GPU, or on a CPU what the process grew by (call it in a fresh process)."""

    def resident():  # what getrusage tells would count the parent's memory
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    cuda, before = torch.cuda.is_available(), resident()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    row = Row(*row)
    for k in range(3):
        row.step(k)
    if cuda:
        return torch.cuda.max_memory_allocated() / 2**30
    return (resident() - before) / 2**20


def loader(workers, entries=50_000, batch=256, batches=100):
    """Images/s that the latent cache feeds: random batches, mirrored or not, of a generated file of ImageNet-256's shape."""
    header = {"count": entries, "classes": ["one", "two"], "moments": [8, 32, 32]}
    _, _, start, end = latent_layout(header)
    text = json.dumps(header).encode().ljust(2**20, b"\0")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "latents"
        with open(path, "wb") as file:
            file.write(text.ljust(start, b"\0"))
            block = torch.randn(500, 2, 8, 32, 32).half().numpy().tobytes()
            for _ in range(entries // 500):
                file.write(block)
        cache = LatentCache(path, header)
        order = torch.randint(entries, (batches, batch)).tolist()
        keys = [[(i, i % 2 == 0) for i in row] for row in order]
        data = torch.utils.data.DataLoader(
            cache, batch_sampler=keys, num_workers=workers, collate_fn=train_sra.collate
        )
        start, seen = None, 0
        for moments, _ in data:
            start, seen = (
                (time.perf_counter(), 0) if start is None else (start, seen + len(moments))
            )
        rate = seen / (time.perf_counter() - start)
    print(
        f"latent cache, {end / 1e9:.2f} GB, {entries} entries, batch {batch}, {workers} workers: {rate:.0f} images/s"
    )


def evaluation(device):
    """Features/s of fid.py against a plain NCHW loop over the same network, and its Frechet distance against the formula with sqrtm."""

    def timed(function, *args):
        start = time.perf_counter()
        result = function(*args)  # on the CPU in the end, so that nothing is still running
        return time.perf_counter() - start, result

    torch.manual_seed(0)
    plain, folded = fid.InceptionV3(), fid.InceptionV3()
    for module in plain.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(
                module.weight, nonlinearity="relu"
            )  # activations keep their size through the layers
    folded.load_state_dict(plain.state_dict())
    plain, folded = plain.to(device), folded.fold().to(device)
    rng, times = np.random.default_rng(0), ([], [])
    batch = rng.integers(0, 256, (16, 256, 256, 3), dtype=np.uint8)

    @torch.inference_mode()
    def plain_loop():
        return plain(torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous().to(device)).cpu()

    for _ in range(6):
        (a, expected), (b, features) = (
            timed(plain_loop),
            timed(lambda: fid.batch_activations(folded, batch, device)["pool"].cpu()),
        )
        times[0].append(a)
        times[1].append(b)
    a, b = (len(batch) / median(t[1:]) for t in times)
    error = ((features - expected).abs().max() / expected.abs().max()).item()
    print(
        f"Inception, 256 px: plain NCHW {a:.2f} images/s, fid.py {b:.2f}, ratio {b / a:.2f}; features differ by {error:.1e}"
    )

    stats = []
    for _ in range(2):
        x = rng.standard_normal((6000, 2048)) * np.linspace(0.05, 1, 2048) + rng.standard_normal(
            (6000, 1)
        ) * rng.uniform(0, 1, 2048)
        stats += [x.mean(0), np.cov(x, rowvar=False)]
    mu1, sigma1, mu2, sigma2 = stats

    def literal():
        return ((mu1 - mu2) ** 2).sum() + np.trace(
            sigma1 + sigma2 - 2 * scipy.linalg.sqrtm(sigma1 @ sigma2).real
        )

    ours = [timed(fid.frechet_distance, *stats) for _ in range(3)]
    (a, expected), b = timed(literal), median([seconds for seconds, _ in ours])
    error = abs(ours[0][1] / expected - 1)
    print(
        f"Frechet distance, 2048-d: scipy's sqrtm {a:.2f} s, fid.py {b:.2f} s, ratio {a / b:.1f}; relative difference {error:.1e}"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--models", nargs="+", help="default: see above")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--diffusion", choices=("flow", "gvp"), default="flow", help="of vanilla and SRA"
    )
    parser.add_argument("--batch-size", type=int, default=128 if cuda else 16)
    parser.add_argument(
        "--input-size", type=int, default=32, help="side of latents, or of images on a CPU"
    )
    parser.add_argument(
        "--steps", type=int, default=30 if cuda else 9, help="timed steps of each row"
    )
    parser.add_argument(
        "--compile", choices=("off", "on", "both"), default="both" if cuda else "off"
    )
    parser.add_argument(
        "--count",
        action="store_true",
        help="only: count operations, bytes and memory of a step, of S/2, B/2 and XL/2",
    )
    parser.add_argument(
        "--loader", type=int, metavar="WORKERS", help="only: images/s that the latent cache feeds"
    )
    parser.add_argument("--evaluation", action="store_true", help="time fid.py instead of training")
    args = parser.parse_args()
    sizes = ["DiT-B/2", "DiT-XL/2"] if cuda else ["DiT-Ti/4", "DiT-S/4"]
    args.models = args.models or (["DiT-S/2", "DiT-B/2", "DiT-XL/2"] if args.count else sizes)
    if args.count:
        return count(args)
    if args.loader is not None:
        return loader(args.loader)
    device = torch.device("cuda" if cuda else "cpu")
    if args.evaluation:
        evaluation(device)
        return
    torch.set_float32_matmul_precision("high")
    peak = matmul_rate(device) if cuda else None
    hardware = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"torch {torch.__version__}, {hardware}, batch {args.batch_size}, {args.diffusion}, compile {args.compile}",
        flush=True,
    )
    if cuda:
        print(f"bf16 matrix product: {2 * peak / 1e12:.0f} TFLOP/s")
    columns = f"{'model':10} {'method':10} {'compile':>7} {'images/s':>9} {'ratio':>6} {'bound':>6} {'memory':>10}"
    print(f"{columns} {'worst':>6} {'outside':>8}" + "    MFU" * cuda)
    folder = tempfile.TemporaryDirectory()
    for model in args.models:
        shape = {
            "input_size": args.input_size,
            "in_channels": 4 if cuda else 3,
            "num_classes": 1000 if cuda else 10,
        }
        network = {**shape, **parse_model(model), "learn_sigma": False}
        args.teacher = save_teacher(Path(folder.name, "teacher.pt"), network, args.diffusion)
        compile_modes = {"off": (False,), "on": (True,), "both": (False, True)}[args.compile]
        settings = [
            (name, network, compiled, args, device)
            for compiled in compile_modes
            for name in args.methods
        ]
        if cuda:
            memory = [peak_memory(*s) for s in settings]
        else:
            with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
                memory = [pool.apply(peak_memory, s) for s in settings]
        rows = [Row(*s) for s in settings]
        for k in range(3 + args.steps):  # three to warm up
            for row in rows:
                row.step(k)
        cost, first = (
            macs(network),
            args.batch_size / median(rows[0].times[3:]),
        )  # the first row is the yardstick
        for row, peak_gib in zip(rows, memory):
            rate, bound = args.batch_size / median(row.times[3:]), cost["vanilla"] / cost[row.name]
            line = f"{model:10} {row.name:10} {'on' if row.compiled else 'off':>7} {rate:9.1f} {rate / first:6.3f} {bound:6.3f}"
            line += f" {peak_gib:6.2f} GiB"
            line += f" {max(row.times[3:]) / median(row.times[3:]):6.2f} {100 * median(row.outside[3:]):7.1f}%"
            line += f" {100 * cost[row.name] * rate / peak:5.1f}%" if cuda else ""
            print(line, flush=True)
        seconds = {row.name: median(row.times[3:]) for row in rows if not row.compiled}
        if {"mdt", "mdt r=0"} <= set(seconds):
            gain, bound = seconds["mdt r=0"] / seconds["mdt"], cost["mdt r=0"] / cost["mdt"]
            print(
                f"{model:10} masking half of the tokens: {gain:.3f} times the images/s of the same network unmasked; bound {bound:.3f}"
            )
        del rows, row
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
