"""The networks that are sampled from: the DiT/SiT backbone, its masked form, named sizes, the loading of official checkpoints; and the VAE.

DiT (Peebles & Xie 2023, arXiv 2212.09748) and SiT (Ma et al. 2024, arXiv 2401.08740) are one backbone: "SiT-XL/2" is DiT-XL/2 trained under
`--diffusion flow`. State-dict keys are those of the official code. Conventions stand at the top of diffusion.py. Blocks are numbered from
1; "features of block k" is the residual stream after block k without any norm, and 0 is the embedded input. Networks have no randomness of
their own: same inputs, same output, in train and eval mode. Training-only heads live in the training scripts.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import pickle
import platform
import shutil
import sys
import time
import zipfile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

SIZES = {  # depth, hidden size, heads: DiT Table 1; H is MaskDiT's; Ti is ours, for CPUs
    "Ti": (6, 128, 4),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "H": (32, 1280, 16),
}
PATCHES = (2, 4, 8)


def parse_model(name):
    """ "DiT-XL/2" or "SiT-XL/2" -> {"depth", "hidden_size", "num_heads", "patch_size"}. Raises ValueError for other names."""
    try:
        family, rest = name.split("-")
        size, patch = rest.split("/")
        depth, hidden_size, num_heads = SIZES[size]
        if family not in ("DiT", "SiT") or int(patch) not in PATCHES:
            raise KeyError(name)
    except (KeyError, ValueError):
        raise ValueError(
            f"unknown model {name!r}: choose DiT-SIZE/PATCH with SIZE in {', '.join(SIZES)} and PATCH in 2, 4, 8"
        ) from None
    return {
        "depth": depth,
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "patch_size": int(patch),
    }


def position_embedding(dim, grid_size):
    """Fixed 2-D sin-cos table (1, grid_size**2, dim), patches row by row: channels = [column sin, column cos, row sin, row cos]."""
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies  # (grid, dim / 4)
    axis = torch.cat([angles.sin(), angles.cos()], 1)  # (grid, dim / 2)
    columns = axis[None].expand(grid_size, -1, -1)  # [row, column] -> column code
    rows = axis[:, None].expand(-1, grid_size, -1)
    return torch.cat([columns, rows], 2).reshape(1, grid_size**2, dim).float()


def modulate(x, shift, scale):
    """LayerNorm without affine, then adaLN's shift and scale: x (N, T, D), shift and scale (N, D)."""
    return torch.addcmul(
        shift.unsqueeze(1), F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale.unsqueeze(1)
    )


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x):
        """The convolution as a linear layer of patches: its result lies in memory as (N, T, D), and with it the whole stream."""
        p = self.proj.kernel_size[0]
        patches = (
            x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5)
        )  # (N, H / p, W / p, C, p, p)
        return F.linear(
            patches.flatten(3).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias
        )  # (N, T, D)


class TimestepEmbedder(nn.Module):
    """Sinusoidal code of the unscaled time (256 channels, cosines first, period up to 10^4) through a two-layer MLP."""

    def __init__(self, hidden_size):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.register_buffer(
            "frequencies", torch.exp(-math.log(10000) * torch.arange(128) / 128), persistent=False
        )

    def forward(self, t):
        angles = t.float()[:, None] * self.frequencies  # (N, 128)
        return self.mlp(
            torch.cat([angles.cos(), angles.sin()], 1).to(self.mlp[0].weight.dtype)
        )  # (N, D)


class LabelEmbedder(nn.Module):
    """Table of num_classes + 1 rows; the last is the null label. Labels are dropped by the training method, not here."""

    def __init__(self, num_classes, hidden_size):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y):
        return self.embedding_table(y)


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
        q, k, v = (
            part.transpose(1, 2) for part in qkv.unbind(2)
        )  # each (N, heads, T, D / heads); no copy here, nor of the gradient
        x = F.scaled_dot_product_attention(
            self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v
        )
        return self.proj(x.transpose(1, 2).reshape(N, T, D))


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Transformer block with adaLN-Zero: DiT section 3.2. The conditioning has cond_size channels, by default hidden_size."""

    def __init__(self, hidden_size, num_heads, qk_norm=False, cond_size=None):
        super().__init__()
        self.attn = Attention(hidden_size, num_heads, qk_norm)
        self.mlp = Mlp(hidden_size)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(cond_size or hidden_size, 6 * hidden_size)
        )

    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(
            6, 1
        )  # each (N, D)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(x, shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(x, shift_m, scale_m))  # (N, T, D)


class FinalLayer(nn.Module):
    """adaLN and a linear layer, both zero at first; also MaskDiT's bridge from encoder to decoder."""

    def __init__(self, hidden_size, out_size, cond_size=None):
        super().__init__()
        self.linear = nn.Linear(hidden_size, out_size)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(cond_size or hidden_size, 2 * hidden_size)
        )

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, 1)
        return self.linear(modulate(x, shift, scale))  # (N, T, out_size)


class DiT(nn.Module):
    """Diffusion transformer. `config` holds the constructor arguments as plain values, for checkpoints.

    learn_sigma doubles the output channels (DDPM). input_size is the side of the square input, a multiple of patch_size.

    long_residual: DiverseDiT's residuals from the first half to the second (arXiv 2603.04239), for an even depth L. Early and late meet as
    z = Linear(LayerNorm(concat(late, early))), which replaces the stream. "pre" (the paper's Eq. 8): the one after block i, 0 .. L/2 - 1,
    meets what enters block L - i. "post" (the released code): the one after block j, 1 .. L/2, meets what leaves block L + 1 - j.
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
    ):
        super().__init__()
        self.config = {
            k: v
            for k, v in locals().items()
            if k not in ("self", "__class__") and (k, v) != ("long_residual", "none")
        }
        if input_size % patch_size:
            raise ValueError(
                f"input size {input_size} is not divisible by the patch size {patch_size}"
            )
        if long_residual not in ("none", "pre", "post"):
            raise ValueError(f"unknown long residual {long_residual!r}: choose none, pre or post")
        if long_residual != "none" and depth % 2:
            raise ValueError(f"long residuals need an even number of blocks, not {depth}")
        self.patch_size, self.checkpointing = patch_size, False
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.register_buffer("pos_embed", position_embedding(hidden_size, input_size // patch_size))
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, qk_norm) for _ in range(depth))
        self.long_residual, fused = long_residual, depth // 2 if long_residual != "none" else 0
        self.skip_norms = nn.ModuleList(
            nn.LayerNorm(2 * hidden_size, eps=1e-6) for _ in range(fused)
        )
        self.skip_linears = nn.ModuleList(
            nn.ModuleDict({"linear": nn.Linear(2 * hidden_size, hidden_size)}) for _ in range(fused)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)
        self.init_weights()

    def init_weights(self):
        """DiT's initialisation: Xavier for linear layers and patches, N(0, 0.02) for label table and time MLP, and zeros for adaLN and the
        last layer, so that every block starts as the identity and the output as zero. (Long residuals are plain Xavier, no identity.)
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(
            self.x_embedder.proj.weight.view(self.x_embedder.proj.weight.shape[0], -1)
        )
        nn.init.zeros_(self.x_embedder.proj.bias)
        for weight in (
            self.y_embedder.embedding_table.weight,
            self.t_embedder.mlp[0].weight,
            self.t_embedder.mlp[2].weight,
        ):
            nn.init.normal_(weight, std=0.02)
        for module in self.modules():
            if isinstance(module, (Block, FinalLayer)):
                nn.init.zeros_(module.adaLN_modulation[1].weight)
            if isinstance(module, FinalLayer):
                nn.init.zeros_(module.linear.weight)

    def embed(self, x):
        """Images (N, C, H, W) -> tokens (N, T, D) with positions: the stream "after block 0"."""
        return self.x_embedder(x) + self.pos_embed

    def condition(self, t, y):
        """Times (N,) and labels (N,) -> conditioning (N, D)."""
        return self.t_embedder(t) + self.y_embedder(y)

    def unpatchify(self, tokens):
        """(N, T, p * p * C) -> (N, C, H, W); within a token the order is (row, column, channel)."""
        p, side = self.patch_size, math.isqrt(tokens.shape[1])
        x = tokens.view(len(tokens), side, side, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(
            len(tokens), self.out_channels, side * p, side * p
        )

    def long_residual_at(self, k, x, early):
        """At block k, x (N, T, D): the first half leaves x in `early`, last in first out; the second half fuses with it, norm in fp32."""
        if k <= len(self.blocks) // 2:
            early.append(x)
            return x
        norm, linear = (
            layers[k - 1 - len(self.blocks) // 2] for layers in (self.skip_norms, self.skip_linears)
        )
        both = torch.cat([x, early.pop()], 2).float()  # (N, T, 2 D)
        both = F.layer_norm(
            both, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps
        )
        return linear["linear"](both.to(x.dtype)).to(x.dtype)

    def run(self, block, x, c):
        """block(x, c); with `checkpointing`, what it needs for its gradient is computed again in the backward pass instead of kept."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(
                block, x, c, use_reentrant=False, preserve_rng_state=False
            )  # there is no randomness
        return block(x, c)

    def streams(self, x, c):
        """Embedded tokens (N, T, D) -> an iterator over (k, stream after block k), k = 0 .. depth; blocks run as they are asked for."""
        yield 0, x
        early = []
        for k, block in enumerate(self.blocks, 1):
            if self.long_residual == "pre":
                x = self.long_residual_at(k, x, early)
            x = self.run(block, x, c)
            if self.long_residual == "post":
                x = self.long_residual_at(k, x, early)
            yield k, x

    def forward(self, x, t, y, features=()):
        """x (N, C, H, W), t (N,), y (N,) -> out (N, C_out, H, W); with features, block numbers 0 .. depth: (out, {k: tokens (N, T, D)})."""
        c = self.condition(t, y)
        kept = {}
        for k, tokens in self.streams(self.embed(x), c):
            if k in features:
                kept[k] = tokens
        out = self.unpatchify(self.final_layer(tokens, c))
        return (out, {k: kept[k] for k in features}) if features else out

    def tokens_after(self, x, t, y, block):
        """The stream (N, T, D) after that block; later blocks are not run."""
        for k, tokens in self.streams(self.embed(x), self.condition(t, y)):
            if k == block:
                return tokens
        raise ValueError(
            f"there is no block {block}: blocks are numbered from 1 to {len(self.blocks)}"
        )


class MaskedDiT(DiT):
    """MaskDiT's network (arXiv 2306.09305): the DiT blocks as an encoder of the kept tokens, and a light decoder of all tokens.

    decoder: (depth, hidden size, heads); 8 x 512 x 16 for every size of encoder in the official models/maskdit.py. Its blocks share the
    encoder's conditioning. The bridge between the two starts at zero, so that the decoder first sees positions alone.
    fill: what the decoder gets at dropped places: a learned "mask_token" after the bridge (MaskDiT), or, before it, the "noisy_tokens" that
    the encoder would have seen there (SD-DiT, arXiv 2403.17004). class_token: a learned token in front of the encoder's, without position.
    """

    def __init__(self, decoder=(8, 512, 16), fill="mask_token", class_token=False, **network):
        depth, width, heads = decoder
        if min(decoder) < 1 or width % 4 or width % heads:
            raise ValueError(
                f"decoder {depth} {width} {heads}: all at least 1, the width divisible by 4 and by the number of heads"
            )
        super().__init__(**network)
        self.config = {**network, "decoder": list(decoder)}
        self.config |= {"fill": fill} if fill != "mask_token" else {}
        self.config |= {"class_token": True} if class_token else {}
        if fill not in ("mask_token", "noisy_tokens"):
            raise ValueError(f"unknown fill {fill!r}: choose mask_token or noisy_tokens")
        hidden_size, side = network["hidden_size"], network["input_size"] // network["patch_size"]
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if fill == "mask_token" else None
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden_size)) if class_token else None
        self.register_buffer("decoder_pos_embed", position_embedding(width, side))
        self.decoder_layer = FinalLayer(hidden_size, width)
        self.decoder_blocks = nn.ModuleList(
            Block(width, heads, cond_size=hidden_size) for _ in range(depth)
        )
        self.final_layer = FinalLayer(
            width, self.patch_size**2 * self.out_channels, cond_size=hidden_size
        )
        self.init_weights()
        for token in (self.mask_token, self.class_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)

    def encode_tokens(self, tokens, c, ids_keep=None, features=()):
        """Embedded tokens (N, T, D) -> the stream after the last block (N, [1 +] K, D), class token first; and {k: that of block k}."""
        if ids_keep is not None:
            tokens = tokens.gather(
                1, ids_keep[:, :, None].expand(-1, -1, tokens.shape[2])
            )  # (N, K, D)
        if self.class_token is not None:
            tokens = torch.cat(
                [self.class_token.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], 1
            )  # (N, 1 + K, D)
        kept = {}
        for k, stream in self.streams(tokens, c):
            if k in features:
                kept[k] = stream
        return stream, kept

    def encode(self, x, t, y, ids_keep=None):
        """The encoder alone, as a teacher runs it: its last tokens (N, [1 +] K, D), the class token first if there is one."""
        return self.encode_tokens(self.embed(x), self.condition(t, y), ids_keep)[0]

    def forward(self, x, t, y, ids_keep=None, features=(), detach=False):
        """x (N, C, H, W), t (N,), y (N,) -> out (N, C_out, H, W), or (out, {k: encoder tokens}) as in DiT, the class token first.

        ids_keep (N, K) int64: the tokens of each image that the encoder sees; the decoder gets `fill` in place of the others.
        detach: no gradient from out to the encoder's tokens; the conditioning, which the decoder shares, still gets it.
        """
        c = self.condition(t, y)
        embedded = self.embed(x)  # (N, T, D)
        tokens, kept = self.encode_tokens(embedded, c, ids_keep, features)
        tokens = tokens if self.class_token is None else tokens[:, 1:]
        if detach:
            tokens, embedded = tokens.detach(), embedded.detach()
        if ids_keep is not None and self.mask_token is None:
            tokens = put_back(embedded, ids_keep, tokens)  # (N, T, D)
        tokens = self.decoder_layer(tokens, c)  # (N, K or T, width)
        if ids_keep is not None and self.mask_token is not None:
            tokens = put_back(
                self.mask_token.expand(*embedded.shape[:2], -1), ids_keep, tokens
            )  # (N, T, width)
        tokens = tokens + self.decoder_pos_embed
        for block in self.decoder_blocks:
            tokens = self.run(block, tokens, c)
        out = self.unpatchify(self.final_layer(tokens, c))
        return (out, {k: kept[k] for k in features}) if features else out


def put_back(fill, ids_keep, tokens):
    """fill (N, T, D) with tokens (N, K, D) at the places ids_keep (N, K)."""
    return fill.to(tokens.dtype).scatter(
        1, ids_keep[:, :, None].expand(-1, -1, tokens.shape[2]), tokens
    )


def build_model(config):
    """The network a checkpoint describes: its `config` -> a new one."""
    return MaskedDiT(**config) if "decoder" in config else DiT(**config)


def frozen_copy(model):
    """A copy that is never trained by gradients, e.g. to hold an EMA."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def to_uint8(images):
    """Images in [-1, 1] (N, 3, H, W) -> uint8 (N, H, W, 3), as DiT, SiT and ADM store samples: truncation of 127.5 x + 128."""
    return (
        (127.5 * images.float() + 128)
        .clamp(0, 255)
        .to(torch.uint8)
        .permute(0, 2, 3, 1)
        .contiguous()
    )


def image_grid(images, columns):
    """uint8 images (N, H, W, 3) -> one PIL picture, row by row; N must be a multiple of columns."""
    rows = images.cpu().unflatten(0, (-1, columns))  # (rows, columns, H, W, 3)
    return Image.fromarray(rows.transpose(1, 2).flatten(2, 3).flatten(0, 1).numpy())


# Files


def write_atomically(path, write):
    """write(file) to a temporary name, flush, rename: a file that has its final name is complete. Raises OSError, one line."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError) as error:  # torch.save's are RuntimeErrors, on top of the cause
        temporary.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{path} cannot be written ({first_line(cause)})") from None


def hold_lock(path):
    """Locks a file for the life of this process; returns it open. The system ends the lock with the process, however that ends (over NFS
    only once the server knows that its machine is gone). Raises ValueError, one line, if another process holds it.
    """
    import fcntl  # not on Windows, where the rest of this file runs

    file = open(path, "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = f"{file.read(80).strip()}; if that machine is gone, delete {path}"
        raise ValueError(
            f"{path.parent} is in use by another run ({holder}): wait for it, or use another --out"
        ) from None
    except OSError:
        pass  # a file system without locks
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def open_image(path):
    """A Pillow image whose pixels are still to be read, of a format that Pillow reads itself, whatever the suffix says.

    Raises ValueError or Pillow's errors, one line, for others, and for what would be clipped to 8 bits or is much longer than wide.
    """
    try:
        image = Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP"))
    except Image.UnidentifiedImageError:
        raise ValueError("no PNG, JPEG, WebP or BMP image, or a damaged one") from None
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels: make it smaller")
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"more than 8 bits per channel (mode {image.mode})")
    if max(image.size) > 100 * min(
        image.size
    ):  # scaled to its short side, it would fill the memory
        raise ValueError(
            f"{image.width} x {image.height} pixels, one side more than 100 times the other"
        )
    return image


def check_log(path):
    """Raises ValueError, one line, if there is a file that does not begin as the log of a run does."""
    try:
        with open(path) as file:
            json.loads(file.readline())["start"]
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(
            f"{path} is not the log of a run: move it away, or choose another folder"
        ) from None


def first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0][:100]


def load_tensors(path, mmap=True):
    """Tensors and plain values that torch.save has written, on the CPU. Runs no code of the file, and refuses archives that inflate."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path):
                raise ValueError("an archive that claims to be larger than its file")
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise ValueError("a TorchScript program, not tensors")
    elif mmap:
        open(path, "rb").close()  # is it there at all?
        raise ValueError("no archive as torch.save writes them: cut short, or something else")
    try:
        mmap = mmap and str(path).isprintable()  # torch maps no file whose name is not UTF-8
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise ValueError("no file of tensors and plain values alone") from None


def shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def fits(state, config, size):
    """Whether a state dict is that of the network which `config` describes, found without building it, and no larger than its file."""
    if max(config["depth"], *config.get("decoder", (0,))[:1]) > len(state) or any(
        type(v) is int and v < 1 for v in config.values()
    ):
        return False
    if sum(tensor.nbytes for tensor in state.values()) > size:
        return False
    with torch.device("meta"):
        expected = build_model(config).state_dict()
    return shapes(state) == shapes(expected)


def load_checkpoint(path, checked=False):
    """A checkpoint of the training scripts: {"model", "ema", "method", "optimizer", "step", "args", "log"}, on the CPU.

    Raises ValueError, one line, if the file is missing, damaged, or something else. Never runs code from the file. The tensors are mapped
    from the file as they are used; their checksums are verified first, unless `checked` says that this has been done.
    """
    try:
        content = load_tensors(path)
        damaged = None if checked else zipfile.ZipFile(path).testzip()
    except Exception as error:
        raise ValueError(f"{path} cannot be read ({first_line(error)})") from None
    if damaged:
        raise ValueError(f"{path} cannot be read (wrong checksum in {damaged})")
    if not isinstance(content, dict) or not {
        "model",
        "ema",
        "method",
        "optimizer",
        "step",
        "args",
        "log",
    } <= set(content):
        raise ValueError(
            f"{path} is not a checkpoint of the training scripts (those of official code: sample.py --official)"
        )
    try:
        whole = (
            type(content["step"]) is int
            and "diffusion" in content["args"]
            and type(content["optimizer"]) is dict
        )
        whole &= all(isinstance(value, torch.Tensor) for value in content["method"].values())
        parts = [content["model"], content["ema"] or content["model"]]
        whole &= all(
            fits(part, content["args"]["network"], os.path.getsize(path)) for part in parts
        )
    except Exception as error:
        raise ValueError(
            f"{path} does not describe its own network ({first_line(error)})"
        ) from None
    if not whole:
        raise ValueError(f"{path} holds other weights than those of the network that it describes")
    return content


def newest_checkpoint(folder):
    """Path of the newest readable checkpoint in a folder, or None if it holds no *.pt at all.

    Unreadable ones are named on stderr. Raises ValueError, one line, if there are some and none is readable.
    """
    paths = sorted(
        folder.glob("*.pt"), key=lambda path: (len(path.name), path.name), reverse=True
    )  # by step, however many digits
    for path in paths:
        try:
            load_checkpoint(path)
            return path
        except ValueError as error:
            print(
                f"{error}" + ": taking the one before" * (path != paths[-1]),
                file=sys.stderr,
                flush=True,
            )
    if paths:
        raise ValueError(f"no checkpoint in {folder} is readable: move them away to start over")
    return None


def fresh_store(rank, world):
    """The store in which processes meet, under a name that rank 0 makes up at every start.

    torchrun keeps its store when it restarts processes, and those would find the addresses of the dead.
    """
    store, *_ = next(iter(dist.rendezvous("env://")))
    if rank == 0:
        name = str(time.time_ns())
        store.set("start", name)
        store.wait([f"{name} read"])  # by all others
        store.delete_key("start")
    else:
        name = store.get("start").decode()
        if store.add(name, 1) == world - 1:
            store.set(f"{name} read", "")
    return dist.PrefixStore(name, store)


def on_rank_0(work):
    """work() on rank 0 alone, its result on every rank; a ValueError or OSError of it is raised on every rank, as ValueError."""
    result = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result = [work(), None]
        except ValueError as error:
            result = [None, str(error)]
        except OSError as error:
            result = [
                None,
                f"cannot use {error.filename} ({error.strerror}): choose another place"
                if error.filename
                else str(error),
            ]
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    if result[1]:
        raise ValueError(result[1])
    return result[0]


# Official checkpoints

SOURCES = ("dit", "sit", "repa", "sra", "maskdit")
TRAINING_HEADS = (
    "ap_head.",
    "projectors.",
    "projectors_final.",
)  # of SRA, REPA, Self-Transcendence; unused in sampling


def reverse_time(state):
    """Original-SiT weights, in place -> weights of the same network in our direction of time: f'(x, t) = -f(x, 1 - t), exactly.

    The sinusoidal code of 1 - t is a rotation of that of t, which folds into the first layer of the time MLP; the sign into the last layer.
    """
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(128) / 128
    ).double()  # float32 values, as the network uses them
    cos, sin = frequencies.cos(), frequencies.sin()
    weight = state["t_embedder.mlp.0.weight"].double()
    w_cos, w_sin = weight[:, :128], weight[:, 128:]
    state["t_embedder.mlp.0.weight"] = torch.cat(
        [w_cos * cos + w_sin * sin, w_cos * sin - w_sin * cos], 1
    ).float()
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[name] = -state[name]


def load_official(path, source, num_heads, weights="ema"):
    """Read a checkpoint of the official code: returns (DiT, notes), where notes says in sentences what was converted or left out.

    source: "dit" (also SRA's DiT), "sit" (original SiT), "repa" or "sra" (SiT with time from data to noise: also Self-Transcendence and
    DiverseDiT), "maskdit".
    weights: which entry to take of a training checkpoint, "ema" or "model"; a bare state dict is taken as it is.
    The architecture is read from the tensors; the number of heads cannot be, hence num_heads.
    Raises ValueError, one line, for an unreadable file and for missing or unexpected keys, all named.
    """
    if source not in SOURCES:
        raise ValueError(f"unknown source {source!r}: choose one of {', '.join(SOURCES)}")
    try:
        with torch.serialization.safe_globals(
            [argparse.Namespace]
        ):  # training checkpoints of these repositories hold their flags as one
            state = load_tensors(path, mmap=False)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {first_line(error)}") from None
    if isinstance(state, dict) and {"method", "log"} <= set(state):
        raise ValueError(
            f"{path} is a checkpoint of the training scripts, not of official code (sample.py: leave out --official)"
        )
    notes = []
    if isinstance(state, dict) and ("ema" in state or "model" in state):
        if weights not in state:
            raise ValueError(
                f"{path} has no {weights!r} weights, only {', '.join(map(str, state))}"
            )
        state = state[weights]
        notes.append(f"took the {weights!r} weights of a training checkpoint")
    if not isinstance(state, dict) or not all(
        isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in state.items()
    ):
        raise ValueError(f"{path} holds no state dict")
    if sum(t.nbytes for t in state.values()) > os.path.getsize(path):
        raise ValueError(f"{path} is smaller than its tensors claim to be")
    state = {
        name.removeprefix("module.").removeprefix("model."): tensor
        for name, tensor in state.items()
    }
    heads = [name for name in state if name.startswith(TRAINING_HEADS)]
    for name in heads:
        del state[name]
    if heads:
        notes.append(
            f"left out {len(heads)} tensors of training-only heads ({', '.join(sorted({n.split('.')[0] for n in heads}))})"
        )
    layers = {
        "x_embedder.proj.weight": 4,
        "y_embedder.embedding_table.weight": 2,
        "final_layer.linear.weight": 2,
    }  # name: dimensions
    layers |= {"final_layer.linear.bias": 1, "pos_embed": 3, "t_embedder.mlp.0.weight": 2}
    layers |= {"mask_token": 3} if source == "maskdit" else {}
    missing = [name for name in layers if name not in state]
    if missing:
        raise ValueError(f"{path} is not a DiT or SiT checkpoint: missing {', '.join(missing)}")
    unlike = [
        name for name, ndim in layers.items() if state[name].ndim != ndim or not state[name].numel()
    ]
    unlike += ["t_embedder.mlp.0.weight"] * (state["t_embedder.mlp.0.weight"].shape[-1:] != (256,))
    unlike += ["final_layer.linear.bias"] * (
        state["final_layer.linear.bias"].shape != state["final_layer.linear.weight"].shape[:1]
    )
    if unlike:
        raise ValueError(
            f"{path} is not a DiT or SiT checkpoint: another shape of {', '.join(unlike)}"
        )
    hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    learn_sigma = len(state["final_layer.linear.bias"]) == 2 * in_channels * patch_size**2
    if learn_sigma and source != "dit":
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            rows = state[name].unflatten(0, (patch_size, patch_size, 2 * in_channels))
            state[name] = rows[:, :, :in_channels].flatten(0, 2).clone()
        learn_sigma = False
        notes.append(f"dropped {in_channels} output channels that the official forward drops")
    if source == "sit":
        reverse_time(state)
        notes.append("reversed time: t -> 1 - t, v -> -v")
    if "skip_norms.0.weight" in state:
        notes.append("long residuals: after the block, as in DiverseDiT's released code")
    config = {}
    if source == "maskdit":
        rows = state[
            "y_embedder.embedding_table.weight"
        ].T  # a linear layer of one-hot labels: (hidden, classes)
        state["y_embedder.embedding_table.weight"] = torch.cat([rows, torch.zeros_like(rows[:1])])
        notes.append("null label: the official all-zero label became a zero row of the label table")
        config["decoder"] = (
            len({n.split(".")[1] for n in state if n.startswith("decoder_blocks.")}),
            state["mask_token"].shape[2],
            16,
        )
    config |= {
        "input_size": math.isqrt(state["pos_embed"].shape[1]) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "num_heads": num_heads,
        "num_classes": len(state["y_embedder.embedding_table.weight"]) - 1,
        "learn_sigma": learn_sigma,
        "qk_norm": any(".q_norm." in name for name in state),
        "long_residual": "post" if "skip_norms.0.weight" in state else "none",
    }
    with torch.device("meta"):  # memory only for what fits
        ours = build_model(config).state_dict()
    missing, unexpected = sorted(set(ours) - set(state)), sorted(set(state) - set(ours))
    wrong = [
        f"{n} {tuple(state[n].shape)} for {tuple(ours[n].shape)}"
        for n in ours
        if n in state and state[n].shape != ours[n].shape
    ]
    if missing or unexpected or wrong:
        problems = [
            ("missing", ", ".join(missing)),
            ("unexpected", ", ".join(unexpected)),
            ("wrong shape", listing(wrong)),
        ]
        raise ValueError(
            f"{path} does not fit: "
            + "; ".join(f"{what} {names}" for what, names in problems if names)
        )
    model = build_model(config)
    model.load_state_dict(state)
    return model.eval(), notes


# The Stable-Diffusion VAE

VAE_SCALE = 0.18215  # 1 / standard deviation of the latents: networks are trained on VAE_SCALE * z, and z is what `decode` takes


class ResidualBlock(nn.Module):
    def __init__(self, in_channels, channels, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = (
            nn.Conv2d(in_channels, channels, 1) if in_channels != channels else nn.Identity()
        )

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))  # (N, channels, H, W)


class PixelAttention(nn.Module):
    """Attention of all pixels to all, one head."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # (N, 1, H * W, C)
        tokens = F.scaled_dot_product_attention(
            self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        )
        return x + self.to_out[0](tokens)[:, 0].transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([PixelAttention(channels, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nn.Module):
    """Residual blocks of one resolution, then, if asked for, the way down to half of it or up to twice."""

    def __init__(self, in_channels, channels, layers, groups, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(channels if j else in_channels, channels, groups) for j in range(layers)
        )
        self.downsamplers = nn.ModuleList(
            nn.ModuleDict({"conv": nn.Conv2d(channels, channels, 3, stride=2)}) for _ in range(down)
        )
        self.upsamplers = nn.ModuleList(
            nn.ModuleDict({"conv": nn.Conv2d(channels, channels, 3, padding=1)}) for _ in range(up)
        )

    def forward(self, x):
        for block in self.resnets:
            x = block(x)
        for layer in self.downsamplers:
            x = layer["conv"](F.pad(x, (0, 1, 0, 1)))  # zeros at the right and the bottom only
        for layer in self.upsamplers:
            x = layer["conv"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class Encoder(nn.Module):
    def __init__(self, channels, layers, latent_channels, groups, in_channels):
        super().__init__()
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(channels[max(i - 1, 0)], c, layers, groups, down=i < last)
            for i, c in enumerate(channels)
        )
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, channels, layers, latent_channels, groups, out_channels):
        super().__init__()
        channels, last = channels[::-1], len(channels) - 1
        self.conv_in = nn.Conv2d(latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups)
        self.up_blocks = nn.ModuleList(
            Level(channels[max(i - 1, 0)], c, layers + 1, groups, up=i < last)
            for i, c in enumerate(channels)
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """The VAE of latent diffusion (Rombach et al. 2022, arXiv 2112.10752); the defaults are Stable Diffusion's, f = 8.

    channels: one entry per resolution, the first that of the images; each further one halves the sides, which must be divisible
    by `factor` = 2 ** (len(channels) - 1). State-dict keys are those of the files released for the diffusers library.
    `chunk` is the number of images per forward: memory grows with it, results depend on it by rounding only.
    """

    def __init__(
        self, channels=(128, 256, 512, 512), layers=2, latent_channels=4, groups=32, in_channels=3
    ):
        super().__init__()
        self.latent_channels, self.factor = latent_channels, 2 ** (len(channels) - 1)
        self.encoder = Encoder(channels, layers, latent_channels, groups, in_channels)
        self.decoder = Decoder(channels, layers, latent_channels, groups, in_channels)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    @torch.no_grad()
    def encode(self, x, chunk=4):
        """Images (N, 3, H, W) in [-1, 1] -> mean and log variance of z, each (N, 4, H / 8, W / 8); not multiplied by VAE_SCALE.

        The log variance is clamped to [-30, 20]. Raises ValueError for sides that are not divisible by `factor`.
        """
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(
                f"images of {x.shape[2]} x {x.shape[3]} pixels: the VAE needs sides divisible by {self.factor}"
            )
        moments = torch.cat(
            [self.quant_conv(self.encoder(images)) for images in x.split(chunk)]
        )  # (N, 8, H / 8, W / 8)
        mean, logvar = moments.chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    @torch.no_grad()
    def decode(self, z, chunk=4):
        """z (N, 4, h, w), i.e. latents / VAE_SCALE -> images (N, 3, 8 h, 8 w), nominally in [-1, 1], not clamped."""
        return torch.cat(
            [self.decoder(self.post_quant_conv(latents)) for latents in z.split(chunk)]
        )


SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
SAFETENSORS_DTYPES |= {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def read_safetensors(path):
    """{name: tensor} of a .safetensors file; the tensors are mapped from it, privately: writing to them does not change the file.

    Format: 8 bytes, the length of a JSON header {name: {"dtype", "shape", "data_offsets"}}, the header, the data, all little-endian.
    Raises ValueError, one line, if the file is missing, damaged or something else. Nothing in it is run.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, 100_000_000):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        data = torch.from_numpy(np.memmap(path, np.uint8, "c"))
        tensors = {}
        for name, entry in header.items():
            if entry["dtype"] not in SAFETENSORS_DTYPES:
                raise ValueError(f"type {entry['dtype']!r} of {name[:80]!r}")
            dtype, shape, (begin, end) = (
                SAFETENSORS_DTYPES[entry["dtype"]],
                entry["shape"],
                entry["data_offsets"],
            )
            if len(shape) > 8 or not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
                raise ValueError(f"shape or offsets of {name[:80]!r}")
            if end - begin != math.prod(shape) * dtype.itemsize or end > size - 8 - length:
                raise ValueError(f"bytes {begin} to {end} for {name[:80]!r}")
            content = data[8 + length + begin : 8 + length + end]
            if (
                8 + length + begin
            ) % dtype.itemsize:  # a tensor cannot start there: this one is copied
                content = content.clone()
            tensors[name] = content.view(dtype).reshape(shape)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as safetensors: {first_line(error)}") from None
    return tensors


OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def listing(names):
    """The first few of the names, on one line whatever is in them, and how many more there are."""
    few = ", ".join(ascii(name[:120])[1:-1] for name in names[:6])
    return f"{few} and {len(names) - 6} more" if len(names) > 6 else few


def load_vae(path, groups=32):
    """Released weights (.safetensors, or .bin in torch's zip format, told apart by content) -> (AutoencoderKL, sha256).

    The network is float32, in eval mode, without gradients. Its architecture is read from the tensors; the number of groups of its norms
    cannot be, but is 32 in Stable Diffusion's. Both namings of the attention are taken. The sha256 is that of the float32 weights
    in use, with their names: it does not depend on format or naming, and identifies the latents made with them.
    Raises ValueError, one line, if the file is missing, damaged or something else, and for missing, unexpected or wrongly shaped keys.
    """
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        content = load_tensors(path) if is_zip else None
    except Exception as error:
        raise ValueError(f"{path} cannot be read as VAE weights: {first_line(error)}") from None
    content = content if is_zip else read_safetensors(path)
    if not isinstance(content, dict) or not all(
        isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in content.items()
    ):
        raise ValueError(f"{path} holds no state dict")
    if not all(
        t.is_floating_point() and t.layout == torch.strided and t.device.type == "cpu"
        for t in content.values()
    ):
        raise ValueError(f"{path} holds other tensors than dense ones of floating point")
    if sum(t.nbytes for t in content.values()) > os.path.getsize(path):
        raise ValueError(f"{path} is smaller than its tensors claim to be")
    state = {}
    for name, tensor in content.items():
        for old, new in OLD_ATTENTION.items():
            name = name.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
        if name in state:
            raise ValueError(f"{path} has the same weights twice: {name[:80]!r}")
        state[name] = (
            tensor.squeeze((2, 3)) if ".attentions.0." in name and tensor.ndim == 4 else tensor
        )  # 1 x 1 convolutions
    levels = len({name.split(".")[2] for name in state if name.startswith("encoder.down_blocks.")})
    layers = len(
        {name.split(".")[4] for name in state if name.startswith("encoder.down_blocks.0.resnets.")}
    )
    first = ["encoder.conv_in.weight", "post_quant_conv.weight"]
    first += [f"encoder.down_blocks.{i}.resnets.0.conv1.weight" for i in range(max(levels, 1))]
    missing = [
        n
        for n in first
        if n not in state
        or state[n].ndim != 4
        or not 0 < min(state[n].shape) <= max(state[n].shape) < 2**13
    ]
    if missing:
        raise ValueError(f"{path} is no Stable-Diffusion VAE: no convolution {listing(missing)}")
    channels = [len(state[name]) for name in first[2:]]
    if any(width % groups for width in channels):
        raise ValueError(
            f"{path} has {', '.join(map(str, channels))} channels, which {groups} groups do not divide"
        )
    with torch.device("meta"):
        model = AutoencoderKL(
            channels, layers, state[first[1]].shape[0], groups, state[first[0]].shape[1]
        )
    ours = model.state_dict()
    wrong = [
        f"{n} {tuple(state[n].shape)} for {tuple(ours[n].shape)}"
        for n in ours
        if n in state and state[n].shape != ours[n].shape
    ]
    problems = [
        ("missing", sorted(set(ours) - set(state))),
        ("unexpected", sorted(set(state) - set(ours))),
        ("wrong shape", wrong),
    ]
    if any(names for _, names in problems):
        raise ValueError(
            f"{path} does not fit: "
            + "; ".join(f"{what} {listing(names)}" for what, names in problems if names)
        )
    model.to_empty(device="cpu").load_state_dict(state)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.flatten().numpy())
    return model.eval().requires_grad_(False), digest.hexdigest()


# Latents


class LatentCache(torch.utils.data.Dataset):
    """A finished file of latent moments (see cache_latents), memory-mapped: `header`, `classes`; items by lists of (index, flip).

    Raises ValueError, one line, unless the file is the one that the header describes.
    """

    def __init__(self, path, header):
        check_latents(path, header)
        self.path, self.header, self.classes = path, header, header["classes"]
        _, labels, moments, _ = latent_layout(header)
        self.labels = np.memmap(path, np.int32, "r", labels, (header["count"],))
        self.moments = np.memmap(
            path, np.float16, "r", moments, (header["count"], 2, *header["moments"])
        )
        if self.labels.min() < 0 or self.labels.max() >= len(self.classes):
            raise ValueError(
                f"{path} has labels outside its {len(self.classes)} classes: move it away to encode anew"
            )

    def __reduce__(self):  # for loader processes: the name, not 42 GB
        return LatentCache, (self.path, self.header)

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, keys):
        """[(index, flip), ...] -> float16 moments (N, 2 C, h, w), means before log-variances, and int64 labels (N,)."""
        index, flip = np.array(keys, dtype=np.int64).T
        return torch.from_numpy(self.moments[index, flip]), torch.from_numpy(
            self.labels[index].astype(np.int64)
        )

    def prepare(self, moments):
        """A fresh sample of the posterior, scaled to about unit variance: (N, 2 C, h, w) -> (N, C, h, w) float32, on the same device."""
        mean, logvar = moments.float().chunk(2, 1)
        return (mean + (0.5 * logvar).exp() * torch.randn_like(mean)) * VAE_SCALE


def latent_layout(header):
    """Byte offsets of the parts of a latent file: flags of finished images, labels, moments, and the end."""
    count, flags = header["count"], 2**20  # the header has the first MiB
    labels = flags + -(-count // 4096) * 4096
    moments = labels + -(-4 * count // 4096) * 4096
    return flags, labels, moments, moments + 4 * count * math.prod(header["moments"])


def check_latents(path, expected):
    """Raises ValueError, one line, unless the file's header and size are those expected; names what differs."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(2**20).rstrip(b"\0"))
        unlike = [k for k in expected if header[k] != expected[k]]
    except FileNotFoundError:
        raise ValueError(f"{path} is not there: all processes need it") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path} is not a file of latents: move it away") from None
    if unlike:
        shown = ", ".join(
            f"{k} {' '.join(str(header[k])[:20].split())} (needed: {str(expected[k])[:20]})"
            for k in unlike
        )
        raise ValueError(
            f"{path} holds latents of another data set or VAE: {shown}; move it away to encode anew"
        )
    size, right = path.stat().st_size, latent_layout(expected)[3]
    if size != right:
        raise ValueError(
            f"{path} has {size} bytes in place of {right}: move it away to encode anew"
        )


def cache_latents(path, images, vae, vae_hash, collate, workers, batch_size=32):
    """Encode every image and its mirror once, by all processes -> LatentCache. An interrupted encoding goes on where it stopped.

    path: one file: a JSON header of all that the latents depend on, flags of finished images, labels, and moments (count, 2, 2 C, h, w) in
    float16, the second of the two those of the mirror; called PATH.partial until it is whole. 42 GB for ImageNet at 256 px.
    images: items (index, False) -> uint8 (3, S, S) and label, or a message; `classes`, `size`, and `digest`, of their names. collate: a
    list of them -> batch, or a message. vae: on its device; it encodes in float32 (TF32 on GPUs), as bfloat16 moves means by 1 % of their
    spread.
    Raises ValueError, one line, on every process: a file of other latents, no room, unreadable images (when all others are encoded).
    """
    import fcntl  # not on Windows, where the rest of this file runs

    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    partial, device, locks = (
        path.with_name(f"{path.name}.partial"),
        next(vae.parameters()).device,
        [],
    )
    if (vae.latent_channels, vae.factor) != (4, 8):
        raise ValueError(
            f"the VAE has {vae.latent_channels} channels and a factor of {vae.factor}; Stable Diffusion's has 4 and 8"
        )
    if images.size % 8:
        raise ValueError(f"the image size {images.size} is not divisible by 8, as the VAE needs")
    expected = {
        "format": "latents 1",
        "count": len(images),
        "classes": images.classes,
        "names": images.digest,
        "size": images.size,
    }
    expected |= {
        "crop": "ADM centre",
        "vae": vae_hash,
        "scale": VAE_SCALE,
        "moments": [8, images.size // 8, images.size // 8],
    }
    flags, labels, moments, end = latent_layout(expected)
    text = json.dumps(expected).encode().ljust(2**20, b"\0")

    def open_file():
        """Indices still to be encoded, or None if the file is whole; makes the file, and locks it for this job."""
        if path.exists():
            return None
        if len(text) > 2**20:
            raise ValueError(f"the names of {len(images.classes)} classes are longer than a MiB")
        if not partial.exists():
            room, new = (
                shutil.disk_usage(path.parent).free,
                partial.with_name(f"{partial.name}.{os.getpid()}"),
            )
            if room < end:
                raise ValueError(
                    f"{partial} needs {end / 1e9:.1f} GB, and there are {room / 1e9:.1f} GB"
                )
            with open(new, "wb") as file:
                file.write(text)
                file.truncate(end)
            os.replace(new, partial)
        check_latents(partial, expected)
        locks.append(open(partial, "rb"))
        try:
            fcntl.flock(locks[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is encoding {partial}: wait for it") from None
        except OSError:
            pass  # a file system without locks
        return np.flatnonzero(np.memmap(partial, np.uint8, "r", flags, (expected["count"],)) == 0)

    todo = on_rank_0(open_file)
    if todo is None:
        return LatentCache(path, expected)
    check_latents(partial, expected)  # what this process sees under that name
    mine, errors, finished = (
        todo[rank::world].tolist(),
        [],
        np.memmap(partial, np.uint8, "r", flags, (expected["count"],)),
    )
    batches = [
        [(i, False) for i in mine[k : k + batch_size]] for k in range(0, len(mine), batch_size)
    ]
    loader = torch.utils.data.DataLoader(
        images, batch_sampler=batches, num_workers=workers, collate_fn=collate
    )
    size, count = (
        4 * math.prod(expected["moments"]),
        expected["count"],
    )  # bytes of an image and its mirror; images
    with (
        open(partial, "r+b") as file,
        tqdm(
            total=count,
            initial=count - len(todo),
            disable=rank > 0,
            unit="img",
            desc="encoding",
            dynamic_ncols=True,
        ) as bar,
    ):
        for keys, batch in zip(batches, loader):
            if isinstance(batch, str):
                errors.append(batch)
                continue
            x = batch[0].to(device).float() / 127.5 - 1
            encoded = torch.cat(vae.encode(torch.cat([x, x.flip(3)])), 1).half()  # (2 N, 2 C, h, w)
            if not torch.isfinite(encoded).all():
                errors.append(
                    f"latents of images {keys[0][0]} to {keys[-1][0]} are not finite in float16: is this the right VAE?"
                )
                break
            pairs = (
                encoded.unflatten(0, (2, -1)).transpose(0, 1).contiguous().cpu().numpy()
            )  # (N, 2, 2 C, h, w)
            for (i, _), pair, label in zip(keys, pairs, batch[1].numpy().astype(np.int32)):
                os.pwrite(file.fileno(), pair.tobytes(), moments + i * size)
                os.pwrite(file.fileno(), label.tobytes(), labels + 4 * i)
            os.fsync(file.fileno())  # flags are never on disk before what they stand for
            for i, _ in keys:
                os.pwrite(file.fileno(), b"\1", flags + i)
            bar.update(int(finished.sum()) - bar.n if rank == 0 else 0)
        os.fsync(file.fileno())
    gathered = [errors]
    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, errors)
    errors = [error for some in gathered for error in some]
    if errors:
        raise ValueError(
            errors[0]
            + f" (and {len(errors) - 1} more; the other images are encoded)" * (len(errors) > 1)
        )

    def finish():
        if not np.memmap(partial, np.uint8, "r", flags, (count,)).all():
            raise ValueError(
                f"{partial} lacks images that other processes encoded: it must be in a folder that all of them share"
            )
        os.replace(partial, path)

    on_rank_0(finish)
    return LatentCache(path, expected)
