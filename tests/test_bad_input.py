"""What users get wrong: one line that names it, exit code 2, nothing written; and hostile files."""

import json
import os
import pickle
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import (
    call,
    checkpoint_path,
    make_folder,
    official_dit,
    one_line,
    save_vae,
    train,
)
from PIL import Image


class Means(torch.nn.Module):
    """A feature network for fid.py."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), [2, 2]).flatten(1)


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """Runs, weights and images, good ones and broken ones."""
    here = tmp_path_factory.mktemp("things")
    for name in ("good", "corrupt", "sixteen", "mixed"):
        make_folder(here / name, size=16)
    shutil.copytree(here / "good" / "ant", here / "flat")
    half = (here / "corrupt" / "bee" / "2.png").read_bytes()[:400]
    (here / "corrupt" / "bee" / "2.png").write_bytes(half)
    Image.fromarray(np.full((16, 16), 40000, np.uint16)).save(here / "sixteen" / "ant" / "0.png")
    Image.new("RGB", (8, 8)).save(here / "mixed" / "bee" / "2.png")
    (here / "empty").mkdir()
    (here / "file").write_text("a file\nof text")

    train(here / "sra", "--steps 2")
    train(here / "stage1", "--steps 2", script="train_selftranscendence")
    call("sample", f"--ckpt {here / 'sra'} --num 2 --steps 1 --out {here / 'samples'}")
    checkpoint = checkpoint_path(here / "sra", 2)
    shutil.copy(checkpoint, here / "sra.pt")
    (here / "cut.pt").write_bytes(checkpoint.read_bytes()[:5000])
    torch.save({"a": torch.zeros(1)}, here / "other.pt")
    official = official_dit().state_dict()
    torch.save(official, here / "dit.pt")
    vae = save_vae(here / "vae.bin").state_dict()
    encoder = {name: v for name, v in vae.items() if not name.startswith("decoder")}
    torch.save(encoder, here / "half.bin")

    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    np.savez(here / "images.npz", images)
    np.savez(here / "float.npz", images / 255)
    np.savez(here / "unlike.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez(here / "flat.npz", mu=np.zeros(12), sigma=np.ones(12))
    about = json.dumps({"file": "features.pt", "sha256": "0", "resize": None})
    np.savez(here / "stats.npz", mu=np.zeros(12), sigma=np.eye(12), features=about)
    (here / "latents").mkdir()
    np.save(here / "latents" / "00000.npy", np.zeros((4, 2, 8, 2, 2), np.float16))
    (here / "cut.npz").write_bytes((here / "images.npz").read_bytes()[:1000])
    torch.jit.script(Means()).save(here / "features.pt")
    return here


def files(folder):
    """Everything below a folder, with size and time of change; locks of runs do not count."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


STAGE_2 = "train_selftranscendence --stage 2"
OFFICIAL = "--official dit --num 2 --latents"
FEATURES = "--features {t}/features.pt"
CASES = [  # script and flags, a word of the error; {t}: the folder of things
    ("train_sra --data {t}/nowhere", "--data {t}/nowhere"),
    ("train_discriminative --data {t}/empty", "--data {t}/empty"),
    ("train_selftranscendence --data {t}/flat", "--data {t}/flat"),
    ("train_sra --data {t}/corrupt", "{t}/corrupt/bee/2.png"),
    ("train_mdt --mask 0.5", "--mask"),
    ("train_sra --steps many", "--steps"),
    ("train_diversedit --image-size 20", "20 is not divisible"),
    ("train_sra --micro-batch 3", "--batch-size 4"),
    ("train_sra --batch-size 0", "--batch-size 0"),
    ("train_sra --student-block 5 --teacher-block 2", "--student-block 5"),
    ("train_sra --diffusion edm", "--diffusion edm"),
    ("train_mdt --mask-ratio 1", "--mask-ratio 1"),
    ("train_mdt --mask-schedule never", "--mask-schedule"),
    ("train_mdt --init-from {t}/nowhere.pt", "{t}/nowhere.pt"),
    ("train_mdt --init-from {t}/sra.pt", "{t}/sra.pt"),
    ("train_discriminative --teacher-sigma 0", "--teacher-sigma"),
    ("train_diversedit --pair-layers 1", "--pair-layers"),
    (STAGE_2, "--teacher"),
    (f"{STAGE_2} --teacher {{t}}/empty", "{t}/empty"),
    (f"{STAGE_2} --teacher {{t}}/stage1 --model DiT-S/8", "hidden_size 128 (here 384)"),
    ("train_sra --data {t}/good --vae {t}/nowhere.bin", "{t}/nowhere.bin"),
    ("train_mdt --data {t}/good --vae {t}/file", "{t}/file"),
    ("train_mdt --data {t}/good --vae {t}/dit.pt", "{t}/dit.pt"),
    ("train_diversedit --data {t}/good --vae {t}/half.bin", "decoder"),
    ("train_sra --data {t}/good --vae {t}/vae.bin --image-size 20", "--image-size 20"),
    ("train_sra --out {t}/file", "{t}/file"),
    ("train_mdt --out {t}/sra", "--diffusion"),
    ("sample --num 2", "--ckpt"),
    ("sample --ckpt {t}/nowhere", "{t}/nowhere"),
    ("sample --ckpt {t}/empty", "{t}/empty"),
    ("sample --ckpt {t}/file", "{t}/file"),
    ("sample --ckpt {t}/cut.pt", "{t}/cut.pt"),
    ("sample --ckpt {t}/dit.pt", "--official"),
    (f"sample --ckpt {{t}}/dit.pt {OFFICIAL} --model DiT-S/2", "DiT-S/2"),
    (f"sample --ckpt {{t}}/other.pt {OFFICIAL} --model DiT-Ti/2", "not a DiT or SiT"),
    (f"sample --ckpt {{t}}/dit.pt {OFFICIAL}", "--official needs --model"),
    (f"sample --ckpt {{t}}/dit.pt {OFFICIAL} --model DiT-Ti/2 --diffusion flow", "flow"),
    ("sample --ckpt {t}/dit.pt --official dit --model DiT-Ti/2 --num 2", "--vae"),
    ("sample --ckpt {t}/sra --vae {t}/vae.bin", "generates pixels"),
    ("sample --ckpt {t}/sra --classes 3 10", "--classes"),
    ("sample --ckpt {t}/sra --guidance 0.5", "guidance 0.5"),
    ("sample --ckpt {t}/sra --guidance 2 --guidance-interval 0.7 0.1", "interval 0.7"),
    ("sample --ckpt {t}/sra --steps 0", "--steps"),
    ("sample --ckpt {t}/sra --num 3 --out {t}/samples", "another --out"),
    ("fid", "SAMPLES"),
    (f"fid {{t}}/nowhere.npz {{t}}/images.npz {FEATURES}", "{t}/nowhere.npz"),
    (f"fid {{t}}/cut.npz {{t}}/images.npz {FEATURES}", "{t}/cut.npz"),
    (f"fid {{t}}/float.npz {{t}}/images.npz {FEATURES}", "{t}/float.npz"),
    (f"fid {{t}}/images.npz {{t}}/unlike.npz {FEATURES}", "dimension"),
    (f"fid {{t}}/corrupt {{t}}/images.npz {FEATURES}", "{t}/corrupt/bee/2.png"),
    (f"fid {{t}}/sixteen {{t}}/images.npz {FEATURES}", "{t}/sixteen/ant/0.png"),
    (f"fid {{t}}/mixed {{t}}/images.npz {FEATURES}", "{t}/mixed/bee/2.png"),
    (f"fid {{t}}/images.npz --num 99 --save-stats {{t}}/new.npz {FEATURES}", "--num 99"),
    ("fid {t}/images.npz {t}/images.npz --features {t}/file", "{t}/file"),
    ("fid {t}/images.npz {t}/images.npz --inception {t}/file", "cannot load {t}/file"),
    (f"fid {{t}}/images.npz {{t}}/images.npz --resize pytorch-fid {FEATURES}", "leave out"),
    (f"fid {{t}}/images.npz {FEATURES}", "give either SAMPLES REFERENCE"),
    (f"fid {{t}}/images.npz --save-stats {{t}}/flat.npz {FEATURES}", "flat.npz: give a new name"),
    (f"fid {{t}}/empty {{t}}/images.npz {FEATURES}", "empty: 0 images"),
    (f"fid {{t}}/latents {{t}}/images.npz {FEATURES}", "{t}/latents/00000.npy"),
    (f"fid {{t}}/images.npz {{t}}/flat.npz {FEATURES} --metrics fid", "dimensions"),
    (f"fid {{t}}/images.npz {{t}}/stats.npz {FEATURES}", "{t}/stats.npz holds statistics of other"),
]


@pytest.mark.parametrize("line, message", CASES, ids=[line for line, _ in CASES])
def test_bad_input(line, message, things, tmp_path, capfd):
    script, *flags = line.format(t=things).split()
    if script != "fid" and "--out" not in flags:
        flags += ["--out", tmp_path / "out"]
    before = files(things)
    assert message.format(t=things) in one_line(capfd, script, *flags)
    assert files(things) == before and not files(tmp_path)


# Files with code in them


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def set_trap(path, kind, marker):
    """A file in torch's format (or its older one), a pickle, or arrays of objects."""
    state = {"model": {"weight": torch.zeros(2)}, "ema": Trap(marker)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(state))
    elif kind == "arrays":
        objects = np.array([Trap(marker)])
        with open(path, "wb") as file:
            np.savez(file, arr_0=objects, mu=objects, sigma=objects, images=objects, labels=objects)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "archive")


PLACES = [  # {f}: the file, {o}: what it is a checkpoint or part of, {t}: the folder of things
    "sample --ckpt {f}",
    "sample --ckpt {f} --official dit --model DiT-Ti/2",
    "train_mdt --init-from {f}",
    "train_selftranscendence --stage 2 --teacher {f}",
    "train_sra --data {t}/good --vae {f}",
    "train_sra --out {o}",
    "sample --ckpt {t}/sra --num 2 --steps 1 --out {o}",
    "fid {f}.npz {t}/images.npz --features {t}/features.pt",
    "fid {t}/images.npz {f}.npz --features {t}/features.pt",
    "fid {t}/images.npz {t}/images.npz --features {f}",
]


@pytest.mark.parametrize("kind", ["archive", "older", "pickle", "arrays"])
@pytest.mark.parametrize("place", PLACES)
def test_code_in_a_file_does_not_run(place, kind, things, tmp_path):
    file, out = tmp_path / "trap.bin", tmp_path / "begun"
    part = out / "parts" / "0000000.npz"
    for path in (file, tmp_path / "trap.bin.npz", checkpoint_path(out, 2), part):
        path.parent.mkdir(parents=True, exist_ok=True)
        set_trap(path, kind, tmp_path / "ran")
    script, *flags = place.format(f=file, o=out, t=things).split()
    if script != "fid" and "--out" not in flags:
        flags += ["--out", tmp_path / "out"]
    with pytest.raises((SystemExit, ValueError, KeyError)) as stop:
        call(script, *flags)
    assert getattr(stop.value, "code", 2) == 2 and not (tmp_path / "ran").exists()
    careless = {"pickle": pickle.load, "arrays": lambda f: np.load(f, allow_pickle=True)["mu"]}
    with open(file, "rb") as f:
        careless.get(kind, partial(torch.load, weights_only=False))(f)
    assert (tmp_path / "ran").is_dir()
