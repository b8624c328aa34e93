"""Networks that are sampled from, the Stable Diffusion VAE, and the reading of weights.

DiT (Peebles & Xie 2023, arXiv 2212.09748) and SiT (Ma et al. 2024, arXiv 2401.08740) are one
backbone: "SiT-XL/2" is DiT-XL/2 trained under `--diffusion flow`. State-dict keys are the official
code's; conventions stand at the top of diffusion.py. "Features of block k" are the residual stream
after block k = 1 .. depth, without any norm; 0 is the embedded input. Networks draw nothing.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import sys
import time
import zipfile
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint

SIZES = {  # depth, hidden size, heads: DiT Table 1; M MeanFlow's, H MaskDiT's, Ti ours, for CPUs
    "Ti": (6, 128, 4),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "M": (16, 1024, 16),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "H": (32, 1280, 16),
}


class UserError(ValueError):
    """Something that the user can mend. The scripts print it as one line, with exit code 2."""


def fail(message):
    """Ends the program for a mistake that the user can mend: one line, exit code 2."""
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        time.sleep(2)  # if all processes fail, torchrun ends this one once the first has told why
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def parse_model(name):
    """ "DiT-XL/2" or "SiT-XL/2" -> {"depth", "hidden_size", "num_heads", "patch_size"}."""
    family, _, rest = name.partition("-")
    size, _, patch = rest.partition("/")
    if family not in ("DiT", "SiT") or size not in SIZES or patch not in ("2", "4", "8"):
        known = ", ".join(SIZES)
        raise UserError(f"unknown model {name!r}: choose DiT-SIZE/PATCH from {known} and 2, 4, 8")
    shape = dict(zip(("depth", "hidden_size", "num_heads"), SIZES[size]))
    return {**shape, "patch_size": int(patch)}


def position_embedding(dim, grid_size):
    """Fixed table (1, grid_size**2, dim), channels [column sin, column cos, row sin, row cos]."""
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies  # (grid, dim / 4)
    axis = torch.cat([angles.sin(), angles.cos()], 1)  # (grid, dim / 2)
    columns = axis[None].expand(grid_size, -1, -1)  # [row, column] -> column code
    rows = axis[:, None].expand(-1, grid_size, -1)
    return torch.cat([columns, rows], 2).reshape(1, grid_size**2, dim).float()


def modulate(x, shift, scale):
    """LayerNorm without affine, then adaLN's shift and scale: x (N, T, D), the others (N, D)."""
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return torch.addcmul(shift.unsqueeze(1), normed, 1 + scale.unsqueeze(1))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x):
        """The convolution as a linear layer, so that the stream lies in memory as (N, T, D)."""
        p = self.proj.kernel_size[0]
        patches = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (N, C, H / p, p, W / p, p)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (N, T, C * p * p)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)  # (N, T, D)


class TimestepEmbedder(nn.Module):
    """Sinusoidal code of the unscaled time (256 channels, cosines first), then a two-layer MLP."""

    def __init__(self, hidden_size):
        super().__init__()
        layers = nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(*layers)
        frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t):
        angles = t.float()[:, None] * self.frequencies  # (N, 128)
        code = torch.cat([angles.cos(), angles.sin()], 1)
        return self.mlp(code.to(self.mlp[0].weight.dtype))  # (N, D)


class Attention(nn.Module):
    def __init__(self, dim, num_heads, qk_norm=False):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        N, T, D = x.shape
        qkv = self.qkv(x).view(N, T, 3, self.num_heads, -1)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each (N, heads, T, D / heads)
        q = self.q_norm(q).to(v.dtype)
        k = self.k_norm(k).to(v.dtype)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(N, T, D))


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Transformer block with adaLN-Zero: DiT section 3.2. cond_size: width of the conditioning."""

    def __init__(self, hidden_size, num_heads, qk_norm=False, cond_size=None):
        super().__init__()
        self.attn = Attention(hidden_size, num_heads, qk_norm)
        self.mlp = Mlp(hidden_size)
        modulation = nn.Linear(cond_size or hidden_size, 6 * hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), modulation)

    def forward(self, x, c):
        modulation = self.adaLN_modulation(c).chunk(6, 1)  # each (N, D)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(x, shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(x, shift_m, scale_m))  # (N, T, D)


class FinalLayer(nn.Module):
    """adaLN and a linear layer, both zero at first; also MaskDiT's bridge to its decoder."""

    def __init__(self, hidden_size, out_size, cond_size=None):
        super().__init__()
        self.linear = nn.Linear(hidden_size, out_size)
        modulation = nn.Linear(cond_size or hidden_size, 2 * hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), modulation)

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, 1)
        return self.linear(modulate(x, shift, scale))  # (N, T, out_size)


class DiT(nn.Module):
    """Diffusion transformer. `config` holds the constructor's arguments, for checkpoints.

    learn_sigma: twice the output channels (DDPM). interval: h = t - r conditions, too (MeanFlow).
    long_residual: DiverseDiT's residuals (arXiv 2603.04239) from the first half of L blocks to the
    second. z = Linear(LayerNorm(concat(late, early))) replaces the late stream. "pre" (the paper's
    Eq. 8): the stream after block i = 0 .. L/2 - 1 meets what enters block L - i. "post" (the
    released code): the stream after block j = 1 .. L/2 meets what leaves block L + 1 - j.
    """

    def __init__(
        self,
        input_size,
        patch_size,
        in_channels,
        hidden_size,
        depth,
        num_heads,
        num_classes,
        learn_sigma=False,
        qk_norm=False,
        long_residual="none",
        interval=False,
    ):
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__", "interval")}
        super().__init__()
        self.config = {**config, "interval": True} if interval else config
        if input_size % patch_size:
            raise UserError(f"input size {input_size} is not divisible by patch size {patch_size}")
        fused = 0 if long_residual == "none" else depth // 2
        if fused and depth % 2:
            raise UserError(f"long residuals need an even number of blocks, not {depth}")
        self.patch_size = patch_size
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.long_residual = long_residual
        self.checkpointing = False
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.h_embedder = TimestepEmbedder(hidden_size) if interval else None
        table = nn.Embedding(num_classes + 1, hidden_size)  # the last row is the null label
        self.y_embedder = nn.ModuleDict({"embedding_table": table})
        self.register_buffer("pos_embed", position_embedding(hidden_size, input_size // patch_size))
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, qk_norm) for _ in range(depth))
        norms = (nn.LayerNorm(2 * hidden_size, eps=1e-6) for _ in range(fused))
        linears = (nn.Linear(2 * hidden_size, hidden_size) for _ in range(fused))
        self.skip_norms = nn.ModuleList(norms)
        self.skip_linears = nn.ModuleList(nn.ModuleDict({"linear": layer}) for layer in linears)
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)
        self.init_weights()

    def init_weights(self):
        """DiT's: adaLN and the last layer are zero, so that blocks start as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder["embedding_table"].weight, std=0.02)
        for module in self.modules():
            if isinstance(module, TimestepEmbedder):
                nn.init.normal_(module.mlp[0].weight, std=0.02)
                nn.init.normal_(module.mlp[2].weight, std=0.02)
            if isinstance(module, (Block, FinalLayer)):
                nn.init.zeros_(module.adaLN_modulation[1].weight)
            if isinstance(module, FinalLayer):
                nn.init.zeros_(module.linear.weight)

    def embed(self, x):
        """Images (N, C, H, W) -> tokens (N, T, D) with positions: the stream "after block 0"."""
        return self.x_embedder(x) + self.pos_embed

    def condition(self, t, y, h=None):
        """Times (N,), labels (N,), with `interval` h (N,), default 0 -> conditioning (N, D)."""
        c = self.t_embedder(t) + self.y_embedder["embedding_table"](y)
        if self.h_embedder and h is None:
            h = torch.zeros_like(t)  # whose embedding is not zero
        return c if h is None else c + self.h_embedder(h)

    def unpatchify(self, tokens):
        """(N, T, p * p * C) -> (N, C, H, W); within a token the order is (row, column, channel)."""
        p = self.patch_size
        side = math.isqrt(tokens.shape[1])
        x = tokens.view(len(tokens), side, side, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def long_residual_at(self, k, x, early):
        """At block k, x (N, T, D): the first half leaves x in `early`, the second fuses with it."""
        half = len(self.blocks) // 2
        if k <= half:
            early.append(x)
            return x
        norm = self.skip_norms[k - 1 - half]
        linear = self.skip_linears[k - 1 - half]["linear"]
        both = torch.cat([x, early.pop()], 2).float()  # (N, T, 2 D); the norm is in fp32
        both = F.layer_norm(both, both.shape[-1:], norm.weight.float(), norm.bias.float(), norm.eps)
        return linear(both.to(x.dtype)).to(x.dtype)

    def run(self, block, x, c):
        """block(x, c); `checkpointing` computes its activations again in the backward pass."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, c, use_reentrant=False, preserve_rng_state=False)
        return block(x, c)

    def streams(self, x, c):
        """Tokens (N, T, D) -> (k, stream after block k), k = 0 .. depth, as they are asked for."""
        yield 0, x
        early = []
        for k, block in enumerate(self.blocks, 1):
            if self.long_residual == "pre":
                x = self.long_residual_at(k, x, early)
            x = self.run(block, x, c)
            if self.long_residual == "post":
                x = self.long_residual_at(k, x, early)
            yield k, x

    def forward(self, x, t, y, features=(), h=None):
        """x (N, C, H, W); t, y, h (N,) -> out (N, C_out, H, W), or (out, {k: stream of k})."""
        c = self.condition(t, y, h)
        kept = {}
        for k, tokens in self.streams(self.embed(x), c):
            if k in features:
                kept[k] = tokens
        out = self.unpatchify(self.final_layer(tokens, c))
        return (out, kept) if features else out

    def tokens_after(self, x, t, y, block):
        """The stream (N, T, D) after that block; later blocks are not run."""
        streams = self.streams(self.embed(x), self.condition(t, y))
        return next(tokens for k, tokens in streams if k == block)


class MaskedDiT(DiT):
    """MaskDiT's network (arXiv 2306.09305): an encoder of kept tokens, a light decoder of all.

    decoder: (depth, hidden size, heads); 8 x 512 x 16 at every size in the official code. The
    bridge to it starts at zero, so that it first sees positions alone. fill: what it gets at
    dropped places. "mask_token": a learned one, after the bridge (MaskDiT). "noisy_tokens": the
    encoder's input, before it (SD-DiT, arXiv 2403.17004). class_token: a learned token in front of
    the encoder's, without position.
    """

    def __init__(self, decoder=(8, 512, 16), fill="mask_token", class_token=False, **network):
        depth, width, heads = decoder
        if min(decoder) < 1 or width % 4 or width % heads:
            raise UserError(f"decoder {depth} {width} {heads}: the width must be divisible by both")
        super().__init__(**network)
        self.config |= {"decoder": list(decoder), "fill": fill, "class_token": class_token}
        hidden_size = network["hidden_size"]
        side = network["input_size"] // network["patch_size"]
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if fill == "mask_token" else None
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden_size)) if class_token else None
        self.register_buffer("decoder_pos_embed", position_embedding(width, side))
        self.decoder_layer = FinalLayer(hidden_size, width)
        blocks = (Block(width, heads, cond_size=hidden_size) for _ in range(depth))
        self.decoder_blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(width, self.patch_size**2 * self.out_channels, hidden_size)
        self.init_weights()
        for token in (self.mask_token, self.class_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)

    def encode_tokens(self, tokens, c, ids_keep=None, features=()):
        """Tokens (N, T, D) -> the last stream (N, [1 +] K, D), class token first, and {k: k's}."""
        if ids_keep is not None:
            index = ids_keep[:, :, None].expand(-1, -1, tokens.shape[2])
            tokens = tokens.gather(1, index)  # (N, K, D)
        if self.class_token is not None:
            class_token = self.class_token.to(tokens.dtype).expand(len(tokens), -1, -1)
            tokens = torch.cat([class_token, tokens], 1)  # (N, 1 + K, D)
        kept = {}
        for k, stream in self.streams(tokens, c):
            if k in features:
                kept[k] = stream
        return stream, kept

    def forward(self, x, t, y, ids_keep=None, features=(), detach=False):
        """x (N, C, H, W), t (N,), y (N,) -> out (N, C_out, H, W), or as in DiT (out, features).

        ids_keep (N, K) int64: the tokens of each image that the encoder sees. The decoder gets
        `fill` in place of the others. detach: no gradient from out to the encoder's tokens; the
        conditioning, which the decoder shares, still gets it.
        """
        c = self.condition(t, y)
        embedded = self.embed(x)  # (N, T, D)
        tokens, kept = self.encode_tokens(embedded, c, ids_keep, features)
        if self.class_token is not None:
            tokens = tokens[:, 1:]
        if detach:
            tokens = tokens.detach()
            embedded = embedded.detach()
        if ids_keep is not None and self.mask_token is None:
            tokens = put_back(embedded, ids_keep, tokens)  # (N, T, D)
        tokens = self.decoder_layer(tokens, c)  # (N, K or T, width)
        if ids_keep is not None and self.mask_token is not None:
            mask_tokens = self.mask_token.expand(*embedded.shape[:2], -1)
            tokens = put_back(mask_tokens, ids_keep, tokens)  # (N, T, width)
        tokens = tokens + self.decoder_pos_embed
        for block in self.decoder_blocks:
            tokens = self.run(block, tokens, c)
        out = self.unpatchify(self.final_layer(tokens, c))
        return (out, kept) if features else out


def put_back(fill, ids_keep, tokens):
    """fill (N, T, D) with tokens (N, K, D) at the places ids_keep (N, K)."""
    index = ids_keep[:, :, None].expand(-1, -1, tokens.shape[2])
    return fill.to(tokens.dtype).scatter(1, index, tokens)


def build_model(config):
    """A new network of a checkpoint's `config`."""
    return MaskedDiT(**config) if "decoder" in config else DiT(**config)


def frozen_copy(model):
    """A copy that gradients never train, e.g. to hold an EMA."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def to_uint8(images, offset=128.0):
    """Images in [-1, 1] (N, 3, H, W) -> uint8 (N, H, W, 3): truncation of 127.5 x + offset.

    128 is the rule of ADM, DiT and SiT. 127.5 is that of REPA, SRA, DiverseDiT and MaskDiT.
    """
    levels = (127.5 * images.float() + offset).clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous()


def write_atomically(path, write):
    """write(file) under a temporary name, to the disk, then rename: what has its name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_grid(path, images, columns):
    """uint8 images (N, H, W, 3), N a multiple of columns -> one PNG, row by row."""
    rows = images.cpu().unflatten(0, (-1, columns))  # (rows, columns, H, W, 3)
    grid = Image.fromarray(rows.transpose(1, 2).flatten(2, 3).flatten(0, 1).numpy())
    write_atomically(path, lambda file: grid.save(file, "png"))


def load_tensors(path):
    """What torch.save wrote, mapped from the file, on the CPU. Runs no code of the file."""
    try:
        return torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch.load raises all kinds for files that are something else
        reason = str(error).strip().partition("\n")[0][:100] or type(error).__name__
        raise UserError(f"{path} cannot be read ({reason})") from None


def load_checkpoint(path):
    """(file, content) of a checkpoint, or of the newest readable one of a run's --out folder.

    Content: {"method": state dict, "optimizer", "step", "args"}. Raises UserError.
    """
    files = (path / "checkpoints").glob("*.pt") if path.is_dir() else [path]
    problems = []
    for file in sorted(files, key=lambda file: (len(file.name), file.name), reverse=True):
        try:
            saved = load_tensors(file)
        except UserError as error:
            problems.append(str(error))
            continue
        if not isinstance(saved, dict) or not {"method", "step", "args"} <= saved.keys():
            raise UserError(f"{file} is no checkpoint of the training scripts (see --official)")
        if problems:
            print(f"{'; '.join(problems)}: taking {file}", file=sys.stderr, flush=True)
        return file, saved
    raise UserError("; ".join(problems) or f"no checkpoints/*.pt in {path}")


def digest(state):
    """sha256 of a state dict: names and values."""
    total = hashlib.sha256()
    for name, tensor in state.items():
        total.update(name.encode())
        total.update(tensor.cpu().contiguous().numpy())
    return total.hexdigest()


def load_state(model, state, path):
    """model.load_state_dict(state), whose complaints become one line that names every key."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit: {' '.join(str(error).split())}") from None


def load_network(path, part, source=None, num_heads=None):
    """(network with the "ema" or "model" weights of a checkpoint or run, what it says of them)."""
    if source:
        model, notes = load_official(path, source, num_heads, part)
        return model, {"file": str(path), "notes": notes}
    file, saved = load_checkpoint(path)
    model = build_model(saved["args"]["network"])
    of_part = [name for name in saved["method"] if name.startswith(f"{part}.")]
    load_state(model, {k.removeprefix(f"{part}."): saved["method"][k] for k in of_part}, file)
    return model.eval(), {"file": str(file), "step": saved["step"], **saved["args"]}


def load_weights(model, part, path, source=None):
    """The same weights into a network; with other classes, its own label table stays."""
    loaded, _ = load_network(path, part, source, model.config["num_heads"])
    if loaded.config["long_residual"] != model.config["long_residual"]:
        raise UserError(f"{path} has long residuals {loaded.config['long_residual']}")
    state, own = loaded.state_dict(), model.state_dict()
    table = "y_embedder.embedding_table.weight"
    if state[table].shape != own[table].shape:
        print(f"{path} has other classes: the label table of {part} starts anew", flush=True)
        state[table] = own[table]
    load_state(model, state, path)


# Official checkpoints

SOURCES = ("dit", "sit", "repa", "sra", "maskdit", "meanflow")
TRAINING_HEADS = ("ap_head.", "projectors.", "projectors_final.")  # SRA, REPA, Self-Transcendence


def reverse_time(state):
    """Weights of the original SiT, in place -> those of the same network in our time.

    f'(x, t) = -f(x, 1 - t), exactly: the sinusoidal code of 1 - t is a rotation of that of t, which
    folds into the first layer of the time MLP. The sign folds into the last layer.
    """
    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128).double()
    cos, sin = frequencies.cos(), frequencies.sin()
    w_cos, w_sin = state["t_embedder.mlp.0.weight"].double().split(128, 1)
    rotated = torch.cat([w_cos * cos + w_sin * sin, w_cos * sin - w_sin * cos], 1)
    state["t_embedder.mlp.0.weight"] = rotated.float()
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[name] = -state[name]


def official_config(state, num_heads):
    """The `config` of a network with these weights; the number of heads is not in them."""
    hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    blocks = {tuple(name.split(".")[:2]) for name in state if "blocks." in name}
    config = {
        "input_size": math.isqrt(state["pos_embed"].shape[1]) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": sum(kind == "blocks" for kind, _ in blocks),
        "num_heads": num_heads,
        "num_classes": len(state["y_embedder.embedding_table.weight"]) - 1,
        "learn_sigma": len(state["final_layer.linear.bias"]) == 2 * in_channels * patch_size**2,
        "qk_norm": any(".q_norm." in name for name in state),
        "long_residual": "post" if "skip_norms.0.weight" in state else "none",
    }
    if "mask_token" in state:
        depth = sum(kind == "decoder_blocks" for kind, _ in blocks)
        config["decoder"] = (depth, state["mask_token"].shape[2], 16)
    return config


def load_official(path, source, num_heads, weights="ema"):
    """A checkpoint of official code -> (network, notes in sentences on what was converted).

    source: "dit" (also SRA's DiT), "sit" (the original), "repa" or "sra" (SiT in our time: also
    Self-Transcendence and DiverseDiT), "maskdit", "meanflow" (its PyTorch ports). weights: "ema"
    or "model" of a training checkpoint; a bare state dict is taken as it is. Raises UserError.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):  # some keep their flags as one
        state = load_tensors(path)
    notes = []
    if isinstance(state, dict) and ("ema" in state or "model" in state):
        state = state.get(weights)
        notes.append(f"took the {weights!r} weights of a training checkpoint")
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no {weights!r} weights")
    state = {name.removeprefix("module.").removeprefix("model."): v for name, v in state.items()}
    if source == "meanflow":  # HaoyiZhu/MeanFlow-PyTorch has our name, zhuyu-cs/MeanFlow another
        state = {name.replace("r_embedder.", "h_embedder."): v for name, v in state.items()}
    kept = {name: v for name, v in state.items() if not name.startswith(TRAINING_HEADS)}
    if len(kept) < len(state):
        notes.append(f"left out {', '.join(sorted(state.keys() - kept.keys()))}: training heads")
    try:
        if source == "maskdit":  # a linear layer of one-hot labels: (hidden, classes)
            rows = kept["y_embedder.embedding_table.weight"].T
            kept["y_embedder.embedding_table.weight"] = F.pad(rows, (0, 0, 0, 1))
            notes.append("null label: the all-zero label became a zero row of the label table")
        config = official_config(kept, num_heads) | {"interval": source == "meanflow"}
    except (KeyError, AttributeError) as missing:
        raise UserError(f"{path} is not a DiT or SiT checkpoint: missing {missing}") from None
    if config["learn_sigma"] and source != "dit":
        config["learn_sigma"] = False
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            rows = kept[name].unflatten(0, (-1, 2, config["in_channels"]))
            kept[name] = rows[:, 0].flatten(0, 1)
        notes.append("dropped the output channels that the official forward drops")
    if source == "sit":
        reverse_time(kept)
        notes.append("reversed time: t -> 1 - t, v -> -v")
    if config["long_residual"] == "post":
        notes.append("long residuals: after the block, as in DiverseDiT's released code")
    model = build_model(config)
    load_state(model, kept, path)
    return model.eval(), notes


# The Stable Diffusion VAE

VAE_SCALE = 0.18215  # Stable Diffusion's: networks see scale * z, of about unit variance


class ResidualBlock(nn.Module):
    def __init__(self, in_channels, channels, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        same = in_channels == channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))  # (N, channels, H, W)


class PixelAttention(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # (N, 1, H * W, C)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        tokens = self.to_out[0](F.scaled_dot_product_attention(q, k, v))
        return x + tokens[:, 0].transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([PixelAttention(channels, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nn.Module):
    """Residual blocks of one resolution, then, if asked for, down to half of it or up to twice."""

    def __init__(self, in_channels, channels, layers, groups, down=False, up=False):
        super().__init__()
        widths = [in_channels] + [channels] * (layers - 1)
        self.resnets = nn.Sequential(*(ResidualBlock(w, channels, groups) for w in widths))
        to_half = [nn.Conv2d(channels, channels, 3, stride=2)] if down else []
        to_twice = [nn.Conv2d(channels, channels, 3, padding=1)] if up else []
        self.downsamplers = nn.ModuleList(nn.ModuleDict({"conv": conv}) for conv in to_half)
        self.upsamplers = nn.ModuleList(nn.ModuleDict({"conv": conv}) for conv in to_twice)

    def forward(self, x):
        x = self.resnets(x)
        for layer in self.downsamplers:
            x = layer["conv"](F.pad(x, (0, 1, 0, 1)))  # zeros at the right and the bottom only
        for layer in self.upsamplers:
            x = layer["conv"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class Coder(nn.Module):
    """Encoder (down) or decoder of the VAE; the state-dict names are those of diffusers."""

    def __init__(self, ends, channels, layers, groups, down):
        super().__init__()
        pairs = list(zip(channels[:1] + channels, channels))  # of every level
        change = [{"down": down, "up": not down}] * (len(pairs) - 1) + [{}]
        levels = (Level(*pair, layers, groups, **c) for pair, c in zip(pairs, change))
        self.conv_in = nn.Conv2d(ends[0], channels[0], 3, padding=1)
        self.down_blocks = nn.Sequential(*levels if down else ())
        self.mid_block = MidBlock(channels[-1 if down else 0], groups)
        self.up_blocks = nn.Sequential(*levels)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], ends[1], 3, padding=1)

    def forward(self, x):
        x = self.up_blocks(self.mid_block(self.down_blocks(self.conv_in(x))))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """The VAE of latent diffusion (Rombach et al. 2022, arXiv 2112.10752); defaults: SD's, f = 8.

    channels: one entry per resolution, that of the images first; f = `factor` halves the sides
    len(channels) - 1 times. State-dict keys are those of diffusers. chunk: images per forward.
    """

    def __init__(self, channels=(128, 256, 512, 512), layers=2, latent_channels=4, groups=32):
        super().__init__()
        self.latent_channels = C = latent_channels
        self.factor = 2 ** (len(channels) - 1)
        self.encoder = Coder((3, 2 * C), list(channels), layers, groups, down=True)
        self.decoder = Coder((C, 3), list(channels[::-1]), layers + 1, groups, down=False)
        self.quant_conv = nn.Conv2d(2 * C, 2 * C, 1)
        self.post_quant_conv = nn.Conv2d(C, C, 1)

    @torch.no_grad()
    def encode(self, x, chunk=4):
        """Images (N, 3, H, W) in [-1, 1] -> mean, log variance of z, each (N, C, H / f, W / f)."""
        moments = torch.cat([self.quant_conv(self.encoder(images)) for images in x.split(chunk)])
        mean, logvar = moments.chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    @torch.no_grad()
    def decode(self, z, chunk=4):
        """z (N, C, h, w), latents / scale -> images (N, 3, f h, f w), about [-1, 1], no clamp."""
        return torch.cat([self.decoder(self.post_quant_conv(part)) for part in z.split(chunk)])

    def digest(self, part):
        """sha256 of "encoder" or "decoder": sd-vae-ft-ema and -mse share the encoder's latents."""
        names = {"encoder": ("encoder.", "quant_conv."), "decoder": ("decoder.", "post_quant")}
        return digest({k: v for k, v in self.state_dict().items() if k.startswith(names[part])})


OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_safetensors(path):
    """{name: tensor} of a .safetensors file of floating-point weights. Raises UserError.

    8 bytes, the length of a JSON header {name: {"dtype", "shape", "data_offsets"}}, it, the data.
    """
    tensors = {}
    try:
        content = torch.from_file(str(path), size=os.path.getsize(path), dtype=torch.uint8)
        length = int(content[:8].view(torch.int64))
        header = json.loads(bytes(content[8 : 8 + length].numpy()))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            values = content[begin:end].clone().view(SAFETENSORS_DTYPES[entry["dtype"]])
            tensors[name] = values.reshape(entry["shape"])
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error})") from None
    return tensors


def load_vae(path, groups=32):
    """Released weights (.safetensors, or .bin in torch's zip format) -> AutoencoderKL, frozen.

    The architecture is read from the tensors, but for the groups of its norms. Raises UserError.
    """
    content = load_tensors(path) if zipfile.is_zipfile(path) else read_safetensors(path)
    if "post_quant_conv.weight" not in content:
        raise UserError(f"{path} is not Stable Diffusion's kind of VAE")
    state = {}
    for name, tensor in content.items():
        if ".attentions.0." in name:
            for old, new in OLD_ATTENTION.items():
                name = name.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
            tensor = tensor.squeeze((2, 3)) if tensor.ndim == 4 else tensor  # 1 x 1 convolutions
        state[name] = tensor.float()
    channels, layers = [], 0
    while f"encoder.down_blocks.{len(channels)}.resnets.0.conv1.weight" in state:
        channels.append(len(state[f"encoder.down_blocks.{len(channels)}.resnets.0.conv1.weight"]))
    while f"encoder.down_blocks.0.resnets.{layers}.conv1.weight" in state:
        layers += 1
    vae = AutoencoderKL(channels, layers, len(state["post_quant_conv.weight"]), groups)
    load_state(vae, state, path)
    return vae.eval().requires_grad_(False)
