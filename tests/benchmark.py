"""Training throughput: vanilla against each method, and the bound from counting operations.

    # sizes for the machine: Ti/4 and S/4 on pixels on a CPU; B/2 and XL/2 on latents on CUDA
    python tests/benchmark.py
    # operations, bytes and memory of a step of S/2, B/2 and XL/2, counted without running it
    python tests/benchmark.py --count
    # reading of memory-mapped shards alone: latents of ImageNet-256's shape, and pixels
    python tests/benchmark.py --reading
    # fid.py alone: its network against a plain loop, its Frechet distance against sqrtm
    python tests/benchmark.py --evaluation

For each row: images/s (median step), the ratio to the first row, the bound on the ratio to vanilla
from multiply-adds (a teacher pass costs one forward of the blocks it runs, training three), peak
memory, the slowest step over the median, and the share of a step outside the network's forward and
backward: reading the images, clipping, AdamW, EMA. On CUDA also MFU against a bf16 matrix product
measured in the same run. Steps of the rows alternate; only ratios within one run mean something.
"plain" is vanilla as one would first write it: see PlainDiT. All rows have the same network:
Self-Transcendence is without the qk-norm that is its default.
"""

import argparse
import contextlib
import copy
import gc
import itertools
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
from models import Block, DiT, parse_model

STAGE2 = ["--stage", "2", "--teacher", "TEACHER"]
EDM = ["--diffusion", "edm"]
MEAN_FLOW = ["--mean-flow", "--long-residual", "none", "--diversity-weight", "0", "--omega", "1"]
# name: script, its method, flags; the noise process is --diffusion, unless the flags say otherwise
METHODS = {
    "vanilla": (train_sra, "SRA", ["--align-weight", "0"]),
    "plain": (train_sra, "SRA", ["--align-weight", "0"]),  # see PlainDiT
    "sra": (train_sra, "SRA", []),
    "mdt": (train_mdt, "MaskDiT", EDM),
    "mdt r=0": (train_mdt, "MaskDiT", [*EDM, "--mask-ratio", "0"]),
    "sd-dit": (train_discriminative, "SDDiT", EDM),
    "stage 1": (train_selftranscendence, "SelfTranscendence", []),
    "stage 2": (train_selftranscendence, "SelfTranscendence", STAGE2),
    "all t": (train_selftranscendence, "SelfTranscendence", [*STAGE2, "--t-mode", "all"]),
    "stopped": (train_selftranscendence, "SelfTranscendence", [*STAGE2, "--stop-step", "0"]),
    "diversedit": (train_diversedit, "DiverseDiT", []),
    "no loss": (train_diversedit, "DiverseDiT", ["--diversity-weight", "0"]),
    "meanflow": (train_diversedit, "DiverseDiT", MEAN_FLOW),
    "guided": (train_diversedit, "DiverseDiT", [*MEAN_FLOW, "--kappa", "0.5"]),  # in training
}
# rows whose own part runs on three images in ten; what is left without it
IN_RANGE = {"stage 1": "vanilla", "stage 2": "stopped"}


def block_macs(tokens, D, cond=None):
    """For one image: qkv, projection 4 T D^2, MLP 8 T D^2, attention 2 T^2 D, adaLN 6 D cond."""
    return 12 * tokens * D**2 + 2 * tokens**2 * D + 6 * D * (cond or D)


def macs(network):
    """Multiply-adds of a training step for one image, by method; backward costs two forwards."""
    T = (network["input_size"] // network["patch_size"]) ** 2
    D, depth = network["hidden_size"], network["depth"]
    patch = network["patch_size"] ** 2 * network["in_channels"]
    embed = T * patch * D + 256 * D + D**2
    final = T * patch * D * (2 if network["learn_sigma"] else 1) + 2 * D**2
    vanilla = embed + depth * block_macs(T, D) + final
    _, teacher_block = train_sra.alignment_blocks(depth, network["learn_sigma"])
    decoder, width = (2, 128) if D == 128 else (8, 512)

    def masked(kept):
        encoder = embed + depth * block_macs(kept, D) + kept * D * width + 2 * D**2
        return encoder + decoder * block_macs(T, width, D) + T * patch * width + 2 * D * width

    seen = int(T * 0.8)  # of SD-DiT's student; its bridge is on all tokens
    head = 2048 * D + 2048**2 + 2048 * 256 + 256 * 8192  # per token
    student = masked(seen) + (T - seen) * D * width + seen * head
    teacher_pass = embed + depth * block_macs(T, D) + seen * head
    logits = seen * 2 * 256 * 8192  # both are computed again in the backward pass
    residuals, layers = depth // 2 * 2 * T * D**2, min(10, depth)
    cosines = layers**2 * T * D  # of all pairs of blocks at all tokens
    hidden = 2048 if D >= 768 else 2 * D
    mlp = T * (2 * D * hidden + hidden**2)
    guide = 2 * (embed + 2 * depth // 3 * block_macs(T, D))
    average = vanilla + 256 * D + D**2  # with the embedder of t - r
    derivative = 3 * average  # torch multiplies the tangents of weights as well, which are zero
    return {
        "vanilla": 3 * vanilla,
        "plain": 3 * vanilla,
        "sra": 3 * (vanilla + 4 * T * D**2) + embed + teacher_block * block_macs(T, D),
        "mdt": 3 * masked(T // 2),
        "mdt r=0": 3 * masked(T),
        "sd-dit": 3 * student + teacher_pass + logits,
        "stage 1": 3 * (vanilla + 0.3 * (mlp + T * D * patch)),  # three images in ten are in range
        "stage 2": 3 * (vanilla + 0.3 * mlp) + 0.3 * guide,
        "all t": 3 * (vanilla + mlp) + guide,
        "stopped": 3 * vanilla,
        "diversedit": 3 * (vanilla + residuals + cosines),
        "no loss": 3 * (vanilla + residuals),
        "meanflow": 3 * average + derivative / 4,
        "guided": 3 * average + derivative / 4 + 2 * average,
    }


def save_teacher(path, network, diffusion):
    """A checkpoint of that network, untrained, for stage 2 of Self-Transcendence."""
    model = DiT(**network)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    about = {"network": model.config, "diffusion": diffusion, "vae_hash": None, "label_drop": 0.1}
    torch.save({"method": state, "optimizer": {}, "step": 0, "args": about}, path)
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
        qkv = self.attn["qkv"](x).reshape(N, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) / math.sqrt(D // self.heads)).softmax(3)
        return self.attn["proj"]((weights @ v).transpose(1, 2).reshape(N, T, D))

    def forward(self, x, c):
        modulation = self.adaLN_modulation(c)[:, None].chunk(6, 2)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        x = x + gate_a * self.attention(self.norm(x) * (1 + scale_a) + shift_a)
        hidden = self.mlp["fc1"](self.norm(x) * (1 + scale_m) + shift_m)
        return x + gate_m * self.mlp["fc2"](nn.functional.gelu(hidden, approximate="tanh"))


class PlainDiT(nn.Module):
    """DiT as one would first write it: the yardstick. Explicit softmax attention, separate products
    and sums, patches by a convolution; in Row.step an EMA parameter by parameter, AdamW and
    clipping with default flags, the loss read back in every step. State dict and outputs are those
    of the DiT it is made from.
    """

    def __init__(self, model):
        super().__init__()
        dim, heads = model.config["hidden_size"], model.config["num_heads"]
        for name in ("x_embedder", "t_embedder", "y_embedder"):
            self.add_module(name, copy.deepcopy(getattr(model, name)))
        self.register_buffer("pos_embed", model.pos_embed.clone())
        self.blocks = nn.ModuleList(PlainBlock(dim, heads) for _ in model.blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.final_layer = nn.Module()
        self.final_layer.linear = copy.deepcopy(model.final_layer.linear)
        self.final_layer.adaLN_modulation = copy.deepcopy(model.final_layer.adaLN_modulation)
        self.unpatchify = model.unpatchify
        self.load_state_dict(model.state_dict())

    def forward(self, x, t, y):
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, 2)
        return self.unpatchify(self.final_layer.linear(self.norm(x) * (1 + scale) + shift))


def make_method(name, network, args, more=()):
    """The method of a row and its parsed flags; `more` flags stand behind those of METHODS."""
    script, method, own = METHODS[name]
    own = [args.teacher if flag == "TEACHER" else flag for flag in own]
    parsed = script.parse_args(["--diffusion", args.diffusion, *own, *more])
    torch.manual_seed(0)
    method = getattr(script, method)(parsed, network, make_diffusion(parsed.diffusion))
    if name == "plain":
        method.model = PlainDiT(method.model)
        method.ema = PlainDiT(method.ema).requires_grad_(False)
    return method, parsed


def pixels(side, cache):
    """The built-in images, in shards below `cache`."""
    parsed = train_sra.parse_args(["--image-size", str(side), "--cache", cache])
    data = train_sra.Images(parsed, None)
    data.make_shards("cpu", 0, 1)
    return data


class Row:
    """One method at one size: the arithmetic of a step of the training scripts, timed in parts."""

    def __init__(self, name, network, compiled, args, device):
        self.name, self.compiled, self.device = name, compiled, device
        self.times, self.outside = [], []
        self.method, parsed = make_method(name, network, args)
        self.method.to(device)
        self.parameters = [p for p in self.method.parameters() if p.requires_grad]
        self.clip = parsed.clip_grad
        fused = None if name == "plain" else True
        self.optimizer = torch.optim.AdamW(self.parameters, 1e-4, weight_decay=0.0, fused=fused)
        self.trained = list(self.method.model.parameters())
        self.averaged = list(self.method.ema.parameters())
        if compiled:
            for module in self.method.modules():
                if isinstance(module, (Block, PlainBlock)):
                    module.compile()
        side, channels = network["input_size"], network["in_channels"]
        self.bf16 = device.type == "cuda"
        self.shape = (args.batch_size, channels, side, side)
        self.data = pixels(side, args.cache) if channels == 3 else None
        self.classes = network["num_classes"]

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def read(self, k):
        """Images or latents and labels of step k, on the device."""
        n = self.shape[0]
        if self.data is None:
            y = torch.randint(self.classes, (n,))
            return torch.randn(self.shape, device=self.device), y.to(self.device)
        keys = [((k * n + i) % len(self.data.files), False) for i in range(n)]
        x0, y = self.data.read(keys, self.device.type == "cuda")
        return self.data.prepare(x0.to(self.device)), y.to(self.device)

    def update(self, loss, k):
        """Clipping, AdamW and EMA."""
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

    def step(self, k):
        start = self.now()
        x0, y = self.read(k)
        read = self.now()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.method(x0, y)["loss"]
        loss.backward()
        network = self.now()
        self.update(loss, k)
        end = self.now()
        self.times.append(end - start)
        self.outside.append(1 - (network - read) / (end - start))


class WithoutContent(FakeTensorMode):
    """Tensors with shapes and without content; a copy of a module stays in the same mode."""

    def __deepcopy__(self, memo):
        return self


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write, views excepted; the most that storages held at once."""

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
                about = [argument.alias_info for argument in operation._schema.arguments]
                changed = [a for a, alias in zip(args, about) if alias and alias.is_write]
                outputs = [v for v in tree_leaves(changed) if isinstance(v, torch.Tensor)]
            self.bytes += sum(v.numel() * v.element_size() for v in inputs + outputs)
        return result


def counted(name, network, batch, args, checkpointing=False, more=()):
    """FLOP (2 a multiply-add; not those of attention that are computed again), bytes moved by the
    forward and backward pass, by the rest, and peak bytes of a step in bf16, without running it.
    """
    shape = (batch, network["in_channels"], network["input_size"], network["input_size"])
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    products = {
        attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        backward: lambda g, q, k, v, *_, **__: 2 * sdpa_flop_count(q, k, v),
    }
    # trunc_normal_ looks at what it has drawn
    draw = mock.patch("torch.nn.init.trunc_normal_", nn.init.normal_)
    with WithoutContent() as mode, Traffic() as traffic, draw:
        mode.cache_enabled = MEAN_FLOW[0] not in METHODS[name][2]  # jvp fails on cached views
        method, parsed = make_method(name, network, args, more)
        method.model.checkpointing = checkpointing
        parameters = [p for p in method.parameters() if p.requires_grad]
        trained, averaged = list(method.model.parameters()), list(method.ema.parameters())
        optimizer = torch.optim.AdamW(parameters, fused=True)
        flop = FlopCounterMode(display=False, custom_mapping=products)
        # the first step makes AdamW's state, and its counter keeps tensors alive
        for counter in (flop, contextlib.nullcontext()):
            with counter:
                x0, y = torch.randn(shape), torch.zeros(batch, dtype=torch.int64)
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
                torch._foreach_lerp_(averaged, trained, 1e-4)
                method.after_step(0, 1000)
            del loss, norm, x0, y
        return np.array([flop.get_total_flops(), inside, traffic.bytes, traffic.peak])


def counted_in_range(name, network, batch, args, checkpointing):
    """counted(), of rows with a part that runs on three images in ten as the mean over images."""
    if name not in IN_RANGE:
        return counted(name, network, batch, args, checkpointing)
    everywhere = counted(name, network, batch, args, checkpointing, ["--t-mode", "all"])
    nowhere = counted(IN_RANGE[name], network, batch, args, checkpointing)
    return 0.3 * everywhere + 0.7 * nowhere


COUNT = """TFLOP and GB per image: of the forward and backward pass; GB as moved by eager operations
(compiled ones move less). bound: images/s over vanilla's, from the operations that the code runs;
formula: from those that the method needs. GB per step: norm, clipping, AdamW, EMA. Peak memory in
GiB for n images in a micro-batch, without and with --checkpointing."""


def count(args):
    """Prints what COUNT describes, a row for each network and method."""
    print(COUNT)
    columns = f"{'model':9} {'tokens':>6} {'method':10} {'TFLOP':>7} {'bound':>6} {'formula':>7}"
    print(f"{columns} {'GB/image':>8} {'GB/step':>7} {'memory':>14} {'checkpointing':>16}")
    for model, side in itertools.product(args.models, (32, 64)):
        network = {"input_size": side, "in_channels": 4, "num_classes": 1000}
        network |= {**parse_model(model), "learn_sigma": False}
        formula, first = macs(network), None
        tokens = side**2 // network["patch_size"] ** 2
        with tempfile.TemporaryDirectory() as folder:
            args.teacher = save_teacher(Path(folder, "teacher.pt"), network, args.diffusion)
            for name in (n for n in args.methods if n != "plain"):
                a, b, c, d = (
                    counted_in_range(name, network, batch, args, checkpointing)
                    for checkpointing in (False, True)
                    for batch in (8, 16)
                )
                flop, moved, rest = b[0] / 16, (b[1] - a[1]) / 8, b[2]
                first = first or flop
                line = f"{model:9} {tokens:6} {name:10} {flop / 1e12:7.3f} {first / flop:6.3f}"
                line += f" {formula['vanilla'] / formula[name]:7.3f}"
                line += f" {moved / 1e9:8.2f} {rest / 1e9:7.1f}"
                for low, high in ((a[3], b[3]), (c[3], d[3])):
                    each = (high - low) / 8
                    line += f" {(low - 8 * each) / 2**30:6.2f} + {each / 2**30:.3f} n"
                print(line, flush=True)


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
    """GiB of three steps: of the GPU; on a CPU what the process, a fresh one, grew by."""

    def resident():  # what getrusage tells would count the parent's memory
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])

    cuda, before = torch.cuda.is_available(), resident()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    row = Row(*row)
    for k in range(3):
        row.step(k)
    if cuda:
        return torch.cuda.max_memory_allocated() / 2**30
    return (resident() - before) / 2**20


def time_reading(title, data):
    """Images/s of read_ahead, in random order and mirrored, from the system's cache of files."""
    args = train_sra.parse_args(["--batch-size", "256", "--micro-batch", "256", "--flip"])
    for first in (0, 40):  # a pass over the data each, the first one to fill the cache
        args.steps = first + 40
        keys = train_sra.micro_batches(len(data.files), args, 0, 1, first)
        start = time.perf_counter()
        sizes = [x.nbytes for x, _ in train_sra.read_ahead(data, keys, False)]
        seconds = time.perf_counter() - start
    print(f"{title}: {40 * 256 / seconds:7.0f} images/s, {sum(sizes) / 1e9 / seconds:.2f} GB/s")


def compare_reading():
    """Latents of ImageNet-256's shape, random ones, and built-in images, 10,000 of each."""
    with tempfile.TemporaryDirectory() as folder:
        data = pixels(32, folder)
        data.files = data.files[:10_000]
        time_reading("pixels, uint8 (3, 32, 32)", data)
        data.vae = True  # what it reads now are moments of images and their mirrors
        rng = np.random.default_rng(0)
        data.paths = [Path(folder, f"{k}.npy") for k in range(10)]
        for path in data.paths:
            np.save(path, rng.standard_normal((1024, 2, 8, 32, 32), np.float32).astype(np.float16))
        data.make_shards("cpu", 0, 1)  # maps them
        time_reading("latents, float16 (8, 32, 32)", data)


def timed(function, *args):
    start = time.perf_counter()
    result = function(*args)  # on the CPU in the end, so that nothing is still running
    return time.perf_counter() - start, result


def time_features(device):
    """Features/s of fid.py against a plain NCHW loop over the same network."""
    torch.manual_seed(0)
    plain, ours = fid.InceptionV3(), fid.InceptionV3()
    for module in plain.modules():
        if isinstance(module, nn.Conv2d):  # activations keep their size through the layers
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    ours.load_state_dict(plain.state_dict())
    plain, ours = plain.to(device), ours.to(device, memory_format=torch.channels_last)
    batch = np.random.default_rng(0).integers(0, 256, (16, 256, 256, 3), dtype=np.uint8)

    @torch.inference_mode()
    def features_of(network):
        x = torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous().to(device)
        return network(x)["pool"].cpu()

    pairs = [(timed(features_of, plain), timed(features_of, ours)) for _ in range(6)]
    (_, expected), (_, features) = pairs[-1]
    a = len(batch) / np.median([first for (first, _), _ in pairs[1:]])
    b = len(batch) / np.median([second for _, (second, _) in pairs[1:]])
    error = ((features - expected).abs().max() / expected.abs().max()).item()
    line = f"Inception, 256 px: plain NCHW {a:.2f} images/s, fid.py {b:.2f}, ratio {b / a:.2f}"
    print(f"{line}; features differ by {error:.1e}")


def time_distance():
    """The Frechet distance of fid.py against the formula with sqrtm."""
    rng, stats = np.random.default_rng(0), []
    for _ in range(2):
        x = rng.standard_normal((6000, 2048)) * np.linspace(0.05, 1, 2048)
        x += rng.standard_normal((6000, 1)) * rng.uniform(0, 1, 2048)
        stats += [x.mean(0), np.cov(x, rowvar=False)]
    mu1, sigma1, mu2, sigma2 = stats
    ours = [timed(fid.frechet_distance, *stats) for _ in range(3)]
    a, root = timed(scipy.linalg.sqrtm, sigma1 @ sigma2)
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root.real)
    b, error = np.median([seconds for seconds, _ in ours]), abs(ours[0][1] / expected - 1)
    line = f"Frechet distance, 2048-d: scipy's sqrtm {a:.2f} s, fid.py {b:.2f} s, ratio {a / b:.1f}"
    print(f"{line}; relative difference {error:.1e}")


def parse_args():
    cuda = torch.cuda.is_available()
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--models", nargs="+", help="default: see above")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--diffusion", choices=("flow", "gvp"), default="flow", help="of vanilla and SRA")
    add("--batch-size", type=int, default=128 if cuda else 16)
    add("--input-size", type=int, default=32, help="side of latents, or of images on a CPU")
    add("--steps", type=int, default=30 if cuda else 9, help="timed steps of each row")
    add("--compile", choices=("off", "on", "both"), default="both" if cuda else "off")
    add("--count", action="store_true", help="count operations, bytes and memory of a step")
    add("--reading", action="store_true", help="time the reading of shards instead of training")
    add("--evaluation", action="store_true", help="time fid.py instead of training")
    args = parser.parse_args()
    sizes = ["DiT-B/2", "DiT-XL/2"] if cuda else ["DiT-Ti/4", "DiT-S/4"]
    args.models = args.models or (["DiT-S/2", "DiT-B/2", "DiT-XL/2"] if args.count else sizes)
    return args


def peak_memories(settings):
    """Peak memory of each row in GiB, on a CPU each in a process of its own."""
    if torch.cuda.is_available():
        return [peak_memory(*row) for row in settings]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = [pool.apply(peak_memory, row) for row in settings]
        pool.close()
        pool.join()
    return memory


def compare(model, args, device, peak):
    """Prints a row for each method and mode of compilation; peak: of the GPU, or None."""
    network = {"input_size": args.input_size, "in_channels": 4 if peak else 3}
    network |= {"num_classes": 1000 if peak else 10, **parse_model(model), "learn_sigma": False}
    modes = {"off": (False,), "on": (True,), "both": (False, True)}[args.compile]
    with tempfile.TemporaryDirectory() as folder:
        args.teacher = save_teacher(Path(folder, "teacher.pt"), network, args.diffusion)
        args.cache = folder
        if not peak:
            pixels(args.input_size, folder)
        pairs = itertools.product(modes, args.methods)
        settings = [(name, network, compiled, args, device) for compiled, name in pairs]
        memory = peak_memories(settings)
        rows = [Row(*row) for row in settings]
    for k in range(3 + args.steps):  # three to warm up
        for row in rows:
            row.step(k)
    cost = macs(network)
    first = args.batch_size / np.median(rows[0].times[3:])  # the first row is the yardstick
    for row, gib in zip(rows, memory):
        seconds, worst = np.median(row.times[3:]), max(row.times[3:])
        rate, bound = args.batch_size / seconds, cost["vanilla"] / cost[row.name]
        line = f"{model:10} {row.name:10} {'on' if row.compiled else 'off':>7} {rate:9.1f}"
        line += f" {rate / first:6.3f} {bound:6.3f} {gib:6.2f} GiB"
        line += f" {worst / seconds:6.2f} {100 * np.median(row.outside[3:]):7.1f}%"
        line += f" {100 * cost[row.name] * rate / peak:5.1f}%" if peak else ""
        print(line, flush=True)
    seconds = {row.name: np.median(row.times[3:]) for row in rows if not row.compiled}
    if {"mdt", "mdt r=0"} <= set(seconds):
        gain, bound = seconds["mdt r=0"] / seconds["mdt"], cost["mdt r=0"] / cost["mdt"]
        print(f"{model:10} masking half of the tokens: {gain:.3f} times as fast; bound {bound:.3f}")


def main():
    args = parse_args()
    if args.count:
        return count(args)
    if args.reading:
        return compare_reading()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if args.evaluation:
        time_features(device)
        return time_distance()
    torch.set_float32_matmul_precision("high")
    peak = matmul_rate(device) if cuda else None
    hardware = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    settings = f"batch {args.batch_size}, {args.diffusion}, compile {args.compile}"
    print(f"torch {torch.__version__}, {hardware}, {settings}", flush=True)
    if cuda:
        print(f"bf16 matrix product: {2 * peak / 1e12:.0f} TFLOP/s")
    columns = f"{'model':10} {'method':10} {'compile':>7} {'images/s':>9} {'ratio':>6} {'bound':>6}"
    print(f"{columns} {'memory':>10} {'worst':>6} {'outside':>8}" + "    MFU" * cuda)
    for model in args.models:
        compare(model, args, device, peak)
        gc.collect()


if __name__ == "__main__":
    main()
