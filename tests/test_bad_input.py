"""Bad input to every script: one line that names what is wrong and what to do, exit code 2, nothing written and nothing lost.

And unusual input that is good: images with alpha, palettes, EXIF orientation, one pixel wide; links; names that are not UTF-8.
"""

import importlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_models import tiny
from test_training import TINY, command, make_folder, run

import fid
from models import AutoencoderKL
from train_sra import Images, center_crop

TRAIN = {
    "sra": "SRA",
    "mdt": "MaskDiT",
    "discriminative": "SDDiT",
    "selftranscendence": "SelfTranscendence",
    "diversedit": "DiverseDiT",
}
QUIET = (
    DeprecationWarning,
    PendingDeprecationWarning,
    ImportWarning,
    ResourceWarning,
)  # Python does not show these


def call(script, argv):
    """The script's main in this process; handlers and sys.argv are put back."""
    module = importlib.import_module(script)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    before, sys.argv = sys.argv, [f"{script}.py"]
    try:
        if script == "fid":
            module.main([*argv, "--device", "cpu"])
        elif script == "sample":
            module.main(module.parse_args(argv))
        else:
            module.main(
                getattr(module, TRAIN[script[6:]]),
                module.parse_args([*TINY, "--steps", "2", *argv]),
            )
    finally:
        sys.argv = before
        for s, handler in handlers.items():
            signal.signal(s, handler)


def outcome(capfd, script, argv):
    """(exit code, lines of stderr without progress bars and with Python's warnings) of a script run in this process."""
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            code = call(script, [str(word) for word in argv])
        except SystemExit as stop:
            code = stop.code
    shown = [
        f"{w.category.__name__}: {w.message}" for w in caught if not issubclass(w.category, QUIET)
    ]
    return code or 0, shown + [
        line for line in capfd.readouterr().err.split("\n") if line and "\r" not in line
    ]


def files(folder):
    """What lies below a folder: {path: size and time of the last change}, links not followed; the locks of runs do not count."""
    found = (
        os.path.join(top, name)
        for top, _, names in os.walk(os.fsencode(folder))
        for name in names
        if name != b"lock"
    )
    return {path: (os.lstat(path).st_size, os.lstat(path).st_mtime_ns) for path in found}


def png_header(width, height):
    """A PNG of that size, of a few bytes: its header, and no pixels."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    )
    body = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


class Means(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), [2, 2]).flatten(1)


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """Runs, weights, images and broken forms of them."""
    here = tmp_path_factory.mktemp("things")
    for name in (
        "good",
        "corrupt",
        "sixteen",
        "bomb",
        "postscript",
        "newline",
        "loops",
        "thin",
        "large",
        "larger",
    ):
        make_folder(here / name, size=16)
    call("train_sra", ["--out", str(here / "sra")])
    call("train_selftranscendence", ["--out", str(here / "stage1")])
    call(
        "train_discriminative",
        ["--prototypes", "32", "--head-width", "8", "--out", str(here / "prototypes")],
    )
    torch.manual_seed(0)
    vae = AutoencoderKL(channels=(32, 32, 32, 32), layers=1).state_dict()
    torch.save(vae, here / "vae.bin")
    torch.save({k: v for k, v in vae.items() if not k.startswith("decoder")}, here / "half.bin")
    call(
        "train_sra",
        [
            *latent_flags(here),
            "--latents",
            str(here / "cache.latents"),
            "--out",
            str(here / "latent_run"),
        ],
    )

    (here / "file").write_text("a file\nof text")
    (here / "void").write_bytes(b"")
    (here / "folder").mkdir()
    (here / "loop").symlink_to(here / "loop")
    checkpoint = (here / "sra" / "checkpoints" / "0000002.pt").read_bytes()
    (here / "cut.pt").write_bytes(checkpoint[: len(checkpoint) // 2])
    (here / "tail.pt").write_bytes(
        checkpoint[-200:]
    )  # the end of an archive, without what it lists
    torch.save({"a": torch.zeros(1)}, here / "other.pt")
    torch.jit.script(Means()).save(here / "features.pt")
    official = tiny(
        hidden_size=128, depth=6, num_heads=4, in_channels=4, learn_sigma=True
    ).state_dict()
    torch.save(official, here / "dit.pt")
    torch.save(official | {"pos_embed": torch.zeros(4)}, here / "flat.pt")
    torch.save(official | {"blocks.0.attn.qkv.bias": torch.zeros(7)}, here / "shape.pt")

    (here / "corrupt" / "bee" / "2.png").write_bytes(b"not an image")
    Image.fromarray(np.full((16, 16), 40000, np.uint16)).save(here / "sixteen" / "ant" / "0.png")
    (here / "bomb" / "ant" / "0.png").write_bytes(png_header(60000, 60000))
    (here / "large" / "ant" / "0.png").write_bytes(png_header(12000, 12000))
    (here / "larger" / "ant" / "1.png").write_bytes(png_header(12000, 12000))
    Image.new("RGB", (16, 16)).save(here / "postscript" / "ant" / "0.png", "eps")
    (here / "newline" / "ant" / "a\nb.png").write_bytes(b"not an image")
    (here / "loops" / "bee" / "0.png").unlink()
    (here / "loops" / "bee" / "0.png").symlink_to("0.png")
    Image.new("RGB", (1, 60000)).save(here / "thin" / "ant" / "0.png")
    make_folder(here / "one", classes=("ant",))
    shutil.copytree(here / "good" / "ant", here / "flat")
    for name in ("empty", "empty/ant"):
        (here / name).mkdir()
    for k, image in enumerate(sorted((here / "good").rglob("*.png"))):
        (here / "mixed").mkdir(exist_ok=True)
        (Image.open(image).resize((16 + k // 7, 16))).save(here / "mixed" / f"{k}.png")

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 8, 8, 3), np.uint8)
    np.savez(here / "images.npz", images)
    np.savez(here / "float.npz", images / 255)
    np.savez(here / "other.npz", samples=images)
    np.savez(here / "stats.npz", mu=np.zeros(12), sigma=np.eye(12))
    np.savez(here / "unlike.npz", mu=np.zeros(5), sigma=np.eye(5))
    (here / "cut.npz").write_bytes((here / "images.npz").read_bytes()[:1000])
    (here / "tail.npz").write_bytes((here / "images.npz").read_bytes()[-200:])

    for name in ("foreign", "damaged", "unreadable", "pictures"):
        (here / name).mkdir()
    np.savez(here / "foreign" / "samples.npz", images)
    (here / "pictures" / "png").mkdir()
    (here / "pictures" / "png" / "000000.png").write_bytes(b"somebody's")
    (here / "unreadable" / "protocol.json").write_bytes(b"\xff\xfe")
    call(
        "sample",
        ["--ckpt", str(here / "sra"), "--num", "2", "--steps", "1", "--out", str(here / "samples")],
    )
    call("train_sra", ["--out", str(here / "logged"), "--steps", "1"])
    (here / "logged" / "log.jsonl").write_text("no JSON\n")
    return here


def latent_flags(here):
    return ["--data", str(here / "good"), "--vae", str(here / "vae.bin"), "--model", "DiT-Ti/2"]


LATENT = "--data {t}/good --vae {t}/vae.bin --model DiT-Ti/2"
OFFICIAL = "--official dit --model DiT-Ti/2 --latents --num 2 --steps 2"
LONG = "x" * 5000

CASES = {  # script and flags ({t}: the folder of things, {o}: --out where none is given), and words of the error
    # data of the training scripts
    "no data folder": ("train_sra --data {t}/nowhere", "--data {t}/nowhere: no such folder"),
    "data is a file": ("train_mdt --data {t}/file", "--data {t}/file: no such folder"),
    "data without images": (
        "train_discriminative --data {t}/empty",
        "no images found; expected {t}/empty/CLASS/NAME.png",
    ),
    "images without class folders": (
        "train_selftranscendence --data {t}/flat",
        "expected {t}/flat/CLASS/NAME.png",
    ),
    "one class": (
        "train_diversedit --data {t}/one",
        "one class folder, ant: guidance needs two or more; or use --label-drop 0",
    ),
    "corrupt image": ("train_sra --data {t}/corrupt", "cannot read image {t}/corrupt/bee/2.png"),
    "16-bit image": ("train_mdt --data {t}/sixteen", "{t}/sixteen/ant/0.png: more than 8 bits"),
    "huge image": (
        "train_discriminative --data {t}/bomb",
        "cannot read image {t}/bomb/ant/0.png: Image size (3600000000 pixels)",
    ),
    "image that is a program": (
        "train_sra --data {t}/postscript",
        "cannot read image {t}/postscript/ant/0.png",
    ),
    "image of 1 x 60000 pixels": (
        "train_sra --data {t}/thin",
        "cannot read image {t}/thin/ant/0.png",
    ),
    "image linked to itself": (
        "train_selftranscendence --data {t}/loops",
        "cannot read image {t}/loops/bee/0.png",
    ),
    "name of two lines": (
        "train_diversedit --data {t}/newline",
        "cannot read image {t}/newline/ant/a",
    ),
    "name too long": (f"train_sra --data {LONG}", "no such folder"),
    "empty name": ("train_mdt --data {t}/good --vae ''", "--vae"),
    "folder linked to itself": ("train_sra --data {t}/loop", "no such folder"),
    # flags of the training scripts
    "unknown model": ("train_sra --model DiT-Huge/2", "choose DiT-SIZE/PATCH"),
    "unknown flag": ("train_mdt --mask 0.5", "unrecognized arguments: --mask 0.5"),
    "no number": ("train_discriminative --steps many", "--steps: invalid int value: 'many'"),
    "not a number": ("train_selftranscendence --lr nan", "--lr nan is out of range"),
    "resolution and patch": (
        "train_diversedit --image-size 20",
        "20 is not divisible by the patch size 8",
    ),
    "resolution and VAE": (f"train_sra {LATENT} --image-size 36", "not divisible by"),
    "batch and micro-batch": (
        "train_sra --micro-batch 3",
        "--batch-size 4 is not divisible by 1 processes x --micro-batch 3",
    ),
    "more images in a batch than in all": (
        "train_mdt --data {t}/good --batch-size 16",
        "8 images, fewer than --batch-size 16",
    ),
    "latents of pixels": ("train_discriminative --latents {o}/x", "--latents needs --vae"),
    "more processes than images in a batch": (
        "WORLD_SIZE=8 train_sra",
        "--batch-size 4 is not divisible by 8 processes",
    ),
    "MaskDiT: all hidden": ("train_mdt --mask-ratio 1", "--mask-ratio 1.0: must be below 1"),
    "MaskDiT: schedule": (
        "train_mdt --mask-schedule cosine",
        "choose constant, linear, or cosineK",
    ),
    "MaskDiT: decoder": (
        "train_mdt --decoder 2 130 4",
        "the width divisible by 4 and by the number of heads",
    ),
    "MaskDiT: process": ("train_mdt --diffusion ddpm", "not ddpm"),
    "MaskDiT: start from nothing": ("train_mdt --init-from {t}/nowhere.pt", "{t}/nowhere.pt"),
    "MaskDiT: start from SRA": (
        "train_mdt --init-from {t}/sra/checkpoints/0000002.pt",
        "holds another network: it differs in diffusion",
    ),
    "MaskDiT: start from a folder": ("train_mdt --init-from {t}/sra", "{t}/sra"),
    "SD-DiT: prototypes": (
        "train_discriminative --prototypes 0",
        "--prototypes and --head-width must be above 0",
    ),
    "SD-DiT: temperature": ("train_discriminative --teacher-temperature nan 0.1", "temperatures"),
    "SD-DiT: nothing trains": (
        "train_discriminative --align-weight 0 --detach-encoder",
        "nothing would train the encoder",
    ),
    "stage 2 without teacher": ("train_selftranscendence --stage 2", "--stage 2 needs --teacher"),
    "stage 1 with teacher": (
        "train_selftranscendence --teacher {t}/stage1",
        "--teacher belongs to stage 2",
    ),
    "teacher of nothing": (
        "train_selftranscendence --stage 2 --teacher {t}/nowhere",
        "{t}/nowhere: no such file or folder",
    ),
    "teacher of an empty folder": (
        "train_selftranscendence --stage 2 --teacher {t}/folder",
        "{t}/folder: no checkpoint in this folder",
    ),
    "teacher of another size": (
        "train_selftranscendence --stage 2 --teacher {t}/stage1 --model DiT-S/8",
        "does not fit this run: it has hidden_size 128 (here 384)",
    ),
    "teacher is no checkpoint": (
        "train_selftranscendence --stage 2 --teacher {t}/file",
        "{t}/file cannot be read",
    ),
    "times in the wrong order": (
        "train_selftranscendence --t-range 0.7 0.4",
        "need 0 <= LOW <= HIGH <= 1",
    ),
    "DiverseDiT: range": ("train_diversedit --weight-range 0.5 0.1", "need 0 <= LOW < HIGH"),
    "DiverseDiT: weights": ("train_diversedit --term-weights nan 1 1", "must be 0 or more"),
    "DiverseDiT: one block": ("train_diversedit --pair-layers 1", "need --pair-layers 2 or more"),
    "SRA: blocks": (
        "train_sra --student-block 5 --teacher-block 2",
        "need 1 <= student <= teacher <= 6",
    ),
    # VAE and latents
    "no VAE": ("train_sra --data {t}/good --vae {t}/nowhere.bin", "{t}/nowhere.bin cannot be read"),
    "VAE is text": (
        "train_mdt --data {t}/good --vae {t}/file",
        "{t}/file cannot be read as safetensors",
    ),
    "VAE is empty": (
        "train_discriminative --data {t}/good --vae {t}/void",
        "{t}/void cannot be read as safetensors",
    ),
    "VAE is a folder": (
        "train_selftranscendence --data {t}/good --vae {t}/folder",
        "{t}/folder cannot be read as VAE weights",
    ),
    "half a VAE": (
        "train_diversedit --data {t}/good --vae {t}/half.bin",
        "{t}/half.bin does not fit: missing decoder",
    ),
    "VAE is a program": (
        "train_sra --data {t}/good --vae {t}/features.pt",
        "{t}/features.pt cannot be read as VAE weights",
    ),
    "latents are text": (
        f"train_sra {LATENT} --latents {{t}}/file",
        "{t}/file is not a file of latents: move it away",
    ),
    "latents of another size": (
        f"train_sra {LATENT} --image-size 32 --latents {{t}}/cache.latents",
        "size 16 (needed: 32)",
    ),
    "latents in no folder": (f"train_sra {LATENT} --latents {{t}}/nowhere/x", "{t}/nowhere"),
    # output of the training scripts
    "output is a file": (
        "train_sra --out {t}/file",
        "cannot use {t}/file/checkpoints (Not a directory): choose another place",
    ),
    "output below a file": ("train_mdt --out {t}/file/run", "{t}/file/run"),
    "output in /proc": (
        "train_discriminative --out /proc/run",
        "cannot use /proc/run (No such file or directory): choose another place",
    ),
    "output linked to itself": ("train_sra --out {t}/loop", "{t}/loop"),
    "output of another script": (
        "train_mdt --diffusion flow --out {t}/sra",
        "use the flags it was made with, or another --out",
    ),
    "output of another model": (
        "train_sra --model DiT-S/8 --out {t}/sra",
        "--model DiT-S/8 (it has DiT-Ti/8)",
    ),
    "output of a longer run": (
        "train_sra --steps 1 --out {t}/sra",
        "is beyond --steps 1: ask for more, or give this run another --out",
    ),
    "output of other prototypes": (
        "train_discriminative --prototypes 16 --head-width 8 --out {t}/prototypes",
        "does not fit --prototypes 16 (it has 32): use the flags it was made with, or another --out",
    ),
    "output of another head": (
        "train_selftranscendence --head-width 64 --out {t}/stage1",
        "does not fit --head-width 64 (it has None)",
    ),
    "log of something else": ("train_sra --out {t}/logged", "{t}/logged/log.jsonl"),
    # sample.py
    "sample: nothing": ("sample --num 2", "the following arguments are required: --ckpt"),
    "sample: no checkpoint": (
        "sample --ckpt {t}/nowhere",
        "--ckpt {t}/nowhere: no such file or folder",
    ),
    "sample: name too long": (f"sample --ckpt {LONG}", "no such file or folder"),
    "sample: link to itself": ("sample --ckpt {t}/loop", "--ckpt {t}/loop: no such file or folder"),
    "sample: device": ("sample --ckpt /dev/zero", "--ckpt /dev/zero: no such file or folder"),
    "sample: empty folder": ("sample --ckpt {t}/folder", "no checkpoints/*.pt in this folder"),
    "sample: empty file": (
        "sample --ckpt {t}/void",
        "{t}/void cannot be read (no archive as torch.save writes them: cut short, or something else)",
    ),
    "sample: text": ("sample --ckpt {t}/file", "{t}/file cannot be read"),
    "sample: half a checkpoint": (
        "sample --ckpt {t}/cut.pt",
        "{t}/cut.pt cannot be read (no archive as torch.save writes them: cut short",
    ),
    "sample: end of a checkpoint": (
        "sample --ckpt {t}/tail.pt",
        "{t}/tail.pt cannot be read (Bad offset",
    ),
    "sample: VAE for checkpoint": (
        "sample --ckpt {t}/vae.bin",
        "is not a checkpoint of the training scripts",
    ),
    "sample: program": ("sample --ckpt {t}/features.pt", "{t}/features.pt cannot be read"),
    "sample: program as official": (
        f"sample --ckpt {{t}}/features.pt {OFFICIAL}",
        "{t}/features.pt cannot be read",
    ),
    "sample: official, not said": (
        "sample --ckpt {t}/dit.pt",
        "those of official code: sample.py --official",
    ),
    "sample: official, another": (
        f"sample --ckpt {{t}}/other.pt {OFFICIAL}",
        "not a DiT or SiT checkpoint: missing x_embedder",
    ),
    "sample: official, other heads": (
        "sample --ckpt {t}/dit.pt --official dit --model DiT-S/2 --latents",
        "is not a DiT-S/2",
    ),
    "sample: official, flat positions": (
        f"sample --ckpt {{t}}/flat.pt {OFFICIAL}",
        "{t}/flat.pt is not a DiT or SiT checkpoint",
    ),
    "sample: official, a shape": (
        f"sample --ckpt {{t}}/shape.pt {OFFICIAL}",
        "wrong shape blocks.0.attn.qkv.bias (7,) for (384,)",
    ),
    "sample: official, other process": (
        f"sample --ckpt {{t}}/dit.pt {OFFICIAL} --diffusion flow",
        "does not fit --diffusion flow",
    ),
    "sample: ours, called official": (
        f"sample --ckpt {{t}}/sra/checkpoints/0000002.pt {OFFICIAL}",
        "not of official code (sample.py: leave out --official)",
    ),
    "sample: label outside the classes": (
        "sample --ckpt {t}/sra --classes 3 10",
        "--classes 3 10: the model knows classes 0 to 9",
    ),
    "sample: negative label": (
        "sample --ckpt {t}/sra --classes -1",
        "the model knows classes 0 to 9",
    ),
    "sample: guidance": ("sample --ckpt {t}/sra --guidance nan", "guidance nan"),
    "sample: guidance interval": (
        "sample --ckpt {t}/sra --guidance 2 --guidance-interval nan 1",
        "interval nan .. 1",
    ),
    "sample: no steps": ("sample --ckpt {t}/sra --steps 0", "--steps 0: must be at least 1"),
    "sample: more steps than memory": (
        "sample --ckpt {t}/sra --steps 1000000000000000",
        "--steps 1000000000000000",
    ),
    "sample: more images than room": (
        "sample --ckpt {t}/sra --num 1000000000000000",
        "--num 1000000000000000",
    ),
    "sample: latents, no VAE": (
        "sample --ckpt {t}/dit.pt --official dit --model DiT-Ti/2 --num 2",
        "give --vae",
    ),
    "sample: VAE for pixels": (
        "sample --ckpt {t}/sra --vae {t}/vae.bin",
        "generates pixels: leave out --vae",
    ),
    "sample: VAE is text": (
        "sample --ckpt {t}/latent_run --vae {t}/file",
        "{t}/file cannot be read",
    ),
    "sample: pictures of latents": (
        "sample --ckpt {t}/latent_run --latents --png",
        "leave out --png",
    ),
    "sample: output is a file": (
        "sample --ckpt {t}/sra --out {t}/file",
        "cannot use {t}/file (File exists): choose another place",
    ),
    "sample: output in /proc": (
        "sample --ckpt {t}/sra --out /proc/samples",
        "/proc/samples has room for 0 GB: choose another --out",
    ),
    "sample: output of another run": (
        "sample --ckpt {t}/sra --num 3 --out {t}/samples",
        "holds samples of another run (see its protocol.json): choose another --out",
    ),
    "sample: samples of unknown origin": (
        "sample --ckpt {t}/sra --num 2 --out {t}/foreign",
        "holds samples.npz but no protocol.json",
    ),
    "sample: pictures of unknown origin": (
        "sample --ckpt {t}/sra --num 2 --png --out {t}/pictures",
        "holds png but no protocol.json",
    ),
    "sample: protocol is no text": (
        "sample --ckpt {t}/sra --num 2 --out {t}/unreadable",
        "{t}/unreadable holds samples of another run",
    ),
    # fid.py
    "fid: nothing": ("fid", "give SAMPLES REFERENCE"),
    "fid: no samples": ("fid {t}/nowhere.npz {t}/images.npz", "{t}/nowhere.npz does not exist"),
    "fid: name too long": (f"fid {LONG}.npz {{t}}/images.npz", ".npz does not exist"),
    "fid: link to itself": ("fid {t}/loop {t}/images.npz", "{t}/loop does not exist"),
    "fid: checkpoint": ("fid {t}/other.pt {t}/images.npz", "is neither a folder nor an .npz"),
    "fid: half an archive": (
        "fid {t}/cut.npz {t}/images.npz",
        "{t}/cut.npz is not an .npz archive",
    ),
    "fid: end of an archive": (
        "fid {t}/tail.npz {t}/images.npz",
        "{t}/tail.npz is not an .npz archive: truncated",
    ),
    "fid: floats": (
        "fid {t}/float.npz {t}/images.npz",
        "a C-ordered uint8 array (N, H, W, 3) is needed",
    ),
    "fid: other arrays": (
        "fid {t}/other.npz {t}/images.npz",
        "holds neither images (arr_0) nor statistics (mu, sigma), but samples",
    ),
    "fid: other dimension": ("fid {t}/images.npz {t}/unlike.npz", "feature dimension mismatch"),
    "fid: resolutions": ("fid {t}/mixed {t}/images.npz", "images of one set must have one size"),
    "fid: corrupt image": (
        "fid {t}/corrupt {t}/images.npz",
        "cannot read image {t}/corrupt/bee/2.png",
    ),
    "fid: 16-bit image": ("fid {t}/sixteen {t}/images.npz", "{t}/sixteen/ant/0.png is not 8-bit"),
    "fid: huge image": ("fid {t}/bomb {t}/images.npz", "{t}/bomb/ant/0.png"),
    "fid: large image": ("fid {t}/large {t}/images.npz", "scale images to at most"),
    "fid: large image, not the first": (
        "fid {t}/larger {t}/images.npz",
        "{t}/larger/ant/1.png is 12000x12000, the first one 16x16",
    ),
    "fid: image that is a program": (
        "fid {t}/postscript {t}/images.npz",
        "cannot read image {t}/postscript/ant/0.png",
    ),
    "fid: image linked to itself": (
        "fid {t}/loops {t}/images.npz",
        "cannot read image {t}/loops/bee/0.png",
    ),
    "fid: name of two lines": (
        "fid {t}/newline {t}/images.npz",
        "cannot read image {t}/newline/ant/a b.png",
    ),
    "fid: more processes than samples": (
        "WORLD_SIZE=40 fid {t}/images.npz {t}/images.npz",
        "at least 40 images are needed",
    ),
    "fid: more samples than there are": (
        "fid {t}/images.npz {t}/images.npz --num 13",
        "--num 13, but {t}/images.npz holds 12 images",
    ),
    "fid: statistics over their images": (
        "fid --save-stats {t}/images.npz {t}/images.npz",
        "{t}/images.npz is there already",
    ),
    "fid: statistics in no folder": (
        "fid --save-stats {t}/nowhere/x.npz {t}/images.npz",
        "its folder must exist",
    ),
    "fid: statistics in /proc": (
        "fid --save-stats /proc/x.npz {t}/images.npz",
        "cannot write /proc/x.npz",
    ),
}


def prepare(case, things, out, monkeypatch):
    line, words = CASES[case]
    world, line = line.split(" ", 1) if line.startswith("WORLD_SIZE=") else ("", line)
    script, *flags = ["" if word == "''" else word.format(t=things, o=out) for word in line.split()]
    if world:
        monkeypatch.setenv(*world.split("="))
    if script == "fid" and "{t}" in line:
        flags += ["--features", str(things / "features.pt")]
    elif script != "fid" and "--out" not in flags:
        flags += ["--out", str(out)]
    return script, flags, words.format(t=things, o=out)


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case, things, tmp_path, capfd, monkeypatch):
    script, flags, words = prepare(case, things, tmp_path / "out", monkeypatch)
    before = files(things)
    code, lines = outcome(capfd, script, flags)
    assert len(lines) == 1 and lines[0].startswith(f"{script}.py: error: ") and words in lines[0], (
        lines
    )
    assert code == 2 and files(things) == before and not files(tmp_path)


def test_the_command_line_says_the_same(things, tmp_path):
    """From a shell, warnings and all: one line, and the exit code."""
    for case in ("resolution and patch", "sample: label outside the classes", "fid: corrupt image"):
        script, flags, words = prepare(case, things, tmp_path / "out", None)
        result = run(
            ROOT / f"{script}.py", *(TINY if script.startswith("train") else []), *flags, code=2
        )
        assert (
            result.stderr.count("\n") == 1
            and words in result.stderr
            and not result.stdout
            and not files(tmp_path)
        )


def test_more_processes_than_samples(things, tmp_path):
    """Sampling may have idle processes."""
    argv = [
        "--ckpt",
        things / "sra",
        "--num-samples",
        "1",
        "--steps",
        "1",
        "--out",
        tmp_path / "out",
    ]
    assert "1 samples in" in run(ROOT / "sample.py", *argv, processes=2).stdout
    assert np.load(tmp_path / "out" / "samples.npz")["arr_0"].shape == (1, 16, 16, 3)


def test_output_that_cannot_be_written(things, tmp_path, capfd):
    """A folder without write permission, for all but root."""
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere: see the cases in /proc")
    (tmp_path / "locked").mkdir(mode=0o555)
    for script, *flags in (
        ["train_sra", "--out"],
        ["sample", "--ckpt", things / "sra", "--num", 2, "--out"],
    ):
        code, lines = outcome(capfd, script, [*flags, tmp_path / "locked" / "out"])
        assert code == 2 and len(lines) == 1 and f"{tmp_path}/locked/out" in lines[0]


# Images that are good


def unusual_images():
    """Name -> (image, how it is saved, the RGB pixels that are meant): what Pillow's convert("RGB") says, as in ADM."""
    rng = np.random.default_rng(0)
    rgb, alpha = (
        rng.integers(0, 256, (16, 16, 3), np.uint8),
        rng.integers(0, 256, (16, 16, 1), np.uint8),
    )
    index, palette = rng.integers(0, 4, (16, 16), np.uint8), rng.integers(0, 256, (4, 3), np.uint8)
    indexed = Image.fromarray(index, "L")
    indexed.putpalette(palette.tobytes())
    orientation = Image.Exif()
    orientation[0x0112] = 6  # to be turned by 90 degrees
    grey = np.repeat(rgb[:, :, :1], 3, 2)
    cmyk = Image.fromarray(rng.integers(0, 256, (16, 16, 4), np.uint8), "CMYK")
    return {
        "alpha.png": (
            Image.fromarray(np.concatenate([rgb, alpha], 2)),
            {},
            rgb,
        ),  # left out: not blended with any background
        "invisible.webp": (
            Image.fromarray(np.dstack([rgb, 0 * alpha])),
            {"lossless": True, "exact": True},
            rgb,
        ),
        "grey alpha.png": (Image.fromarray(np.dstack([rgb[:, :, 0], alpha]), "LA"), {}, grey),
        "palette.png": (indexed, {}, palette[index]),
        "palette with one transparent.png": (indexed, {"transparency": 1}, palette[index]),
        "palette with alpha.png": (
            indexed,
            {"transparency": bytes([0, 80, 160, 255])},
            palette[index],
        ),
        "turned.png": (
            Image.fromarray(rgb),
            {"exif": orientation},
            rgb,
        ),  # as stored: EXIF does not turn it
        "grey.bmp": (Image.fromarray(rgb[:, :, 0]), {}, grey),
        "one bit.png": (
            Image.fromarray(rgb[:, :, 0] > 99),
            {},
            np.repeat((rgb[:, :, :1] > 99) * np.uint8(255), 3, 2),
        ),
        "cmyk.jpg": (cmyk, {"quality": 100, "subsampling": 0}, None),
    }


@pytest.fixture
def unusual(tmp_path):
    meant = {}
    for folder in ("ant", "bee"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for name, (image, options, pixels) in unusual_images().items():
        path = tmp_path / "data" / "ant" / name
        image.save(path, **options)
        if name == "cmyk.jpg":
            pixels = np.asarray(Image.open(path).convert("RGB"))
        meant[str(path)] = pixels
    (tmp_path / "elsewhere.png").write_bytes(
        (tmp_path / "data" / "ant" / "turned.png").read_bytes()
    )
    (tmp_path / "data" / "bee" / "link.png").symlink_to(tmp_path / "elsewhere.png")
    meant[str(tmp_path / "data" / "bee" / "link.png")] = meant[
        str(tmp_path / "data" / "ant" / "turned.png")
    ]
    (tmp_path / "data" / "bee" / "up").symlink_to("..")  # a loop, were it followed
    (tmp_path / "data" / "self").symlink_to("self")
    strange = os.fsdecode(os.fsencode(tmp_path / "data" / "bee") + b"/\xff\xfe.png")
    try:
        shutil.copy(tmp_path / "elsewhere.png", strange)
    except OSError:  # a file system of Unicode names alone
        return meant
    return meant | {strange: meant[str(tmp_path / "data" / "ant" / "turned.png")]}


def test_unusual_images_mean_what_pillow_says(unusual, tmp_path, capfd):
    data = Images(str(tmp_path / "data"), 16, 0, 1)
    assert data.classes == ["ant", "bee"] and [path for path, _ in data.files] == sorted(unusual)
    for k, (path, _) in enumerate(data.files):
        assert np.array_equal(data[(k, False)][0].permute(1, 2, 0).numpy(), unusual[path]), path
        assert np.array_equal(fid.load_image(path, (16, 16)), unusual[path]), path
    assert [str(path) for path in fid.ImageFolder(tmp_path / "data").paths] == sorted(unusual)
    code, lines = outcome(
        capfd, "train_sra", ["--data", tmp_path / "data", "--out", tmp_path / "out"]
    )
    assert code == 0 and all("Palette images with Transparency" in line for line in lines), lines


def test_sides_of_one_pixel(tmp_path):
    """The only column, or row, is all there is to see; along it, the centre."""
    ramp = np.arange(96, dtype=np.uint8).reshape(96, 1, 1).repeat(3, 2) * 2
    for name, pixels in (("tall", ramp), ("wide", ramp.transpose(1, 0, 2))):
        image = np.asarray(center_crop(Image.fromarray(pixels), 4)).astype(int)
        image = image if name == "tall" else image.transpose(1, 0, 2)
        assert (
            image.shape == (4, 4, 3)
            and (image == image[:, :1]).all()
            and np.abs(image[:, 0, 0] - 95).max() <= 2
        )
        (tmp_path / name / "a").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / name / "a" / "0.png")
        data = Images(str(tmp_path / name), 4, 0, 1)
        assert data[(0, False)][0].shape == (3, 4, 4)
        assert np.array_equal(
            fid.load_image(tmp_path / name / "a" / "0.png", (pixels.shape[1], pixels.shape[0])),
            pixels,
        )


def test_names_that_are_not_utf8(things, tmp_path):
    """Data, output, checkpoint and samples under such names, from the command line, where the terminal takes UTF-8 alone."""
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    try:
        shutil.copytree(things / "good", f"{odd} data")
    except OSError:
        pytest.skip("this file system has Unicode names alone")
    os.rename(f"{odd} data/ant", f"{odd} data/" + os.fsdecode(b"\xfe"))
    for script, *flags in (
        ["train_sra", *TINY, "--steps", 1, "--data", f"{odd} data", "--out", f"{odd} out"],
        ["sample", "--ckpt", f"{odd} out", "--num", 2, "--steps", 1, "--out", f"{odd} samples"],
        [
            "fid",
            f"{odd} samples/samples.npz",
            f"{odd} data",
            "--features",
            things / "features.pt",
            "--device",
            "cpu",
        ],
    ):
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
        words = command(ROOT / f"{script}.py", *flags)
        result = subprocess.run(
            words,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=240,
            env=environment,
            errors="backslashreplace",
        )
        assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["samples"] == f"{odd} samples/samples.npz"
    with np.load(f"{odd} samples/samples.npz") as arrays:
        assert json.loads(str(arrays["protocol"]))["checkpoint"]["class_names"] == [
            "bee",
            os.fsdecode(b"\xfe"),
        ]
