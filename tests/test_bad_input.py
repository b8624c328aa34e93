"""What users get wrong: one line that names it, exit code 2, nothing written; and hostile files."""

import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    call,
    checkpoint_path,
    make_folder,
    official_dit,
    one_line,
    outcome,
    save_vae,
    train,
)
from PIL import Image

import fid
from train_sra import Images


class Means(torch.nn.Module):
    """A feature network for fid.py."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), [2, 2]).flatten(1)


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """Runs, weights and images, good ones and broken ones."""
    here = tmp_path_factory.mktemp("things")
    for name in ("good", "corrupt", "torn", "sixteen", "mixed"):
        make_folder(here / name, size=16)
    make_folder(here / "one", classes=("ant",))
    shutil.copytree(here / "good" / "ant", here / "flat")
    (here / "corrupt" / "bee" / "2.png").write_bytes(b"not an image")
    whole = (here / "torn" / "bee" / "2.png").read_bytes()
    (here / "torn" / "bee" / "2.png").write_bytes(whole[: len(whole) // 2])
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
CASES = [  # script and flags, words of the error; {t}: the folder of things
    ("train_sra --data {t}/nowhere", "--data {t}/nowhere: no such folder"),
    ("train_mdt --data {t}/file", "--data {t}/file: no such folder"),
    ("train_discriminative --data {t}/empty", "no images found"),
    ("train_selftranscendence --data {t}/flat", "no images found"),
    ("train_diversedit --data {t}/one", "one class folder, ant"),
    ("train_sra --data {t}/corrupt", "{t}/corrupt/bee/2.png"),
    ("train_mdt --data {t}/sixteen", "{t}/sixteen/ant/0.png: more than 8 bits"),
    ("train_mdt --data {t}/good --batch-size 16", "8 images, fewer than --batch-size 16"),
    ("train_sra --model DiT-Huge/2", "unknown model"),
    ("train_mdt --mask 0.5", "unrecognized arguments: --mask"),
    ("train_selftranscendence --lr nan", "--lr nan"),
    ("train_sra --steps 0", "--steps 0"),
    ("train_sra --label-drop 1.5", "--label-drop 1.5"),
    ("train_diversedit --image-size 20", "20 is not divisible by the patch size 8"),
    ("train_sra --micro-batch 3", "--batch-size 4 is not divisible by"),
    ("train_sra --student-block 5 --teacher-block 2", "need 1 <= student <= teacher <= 6"),
    ("train_mdt --mask-ratio 1", "--mask-ratio 1.0: must be below 1"),
    ("train_mdt --init-from {t}/nowhere.pt", "{t}/nowhere.pt"),
    ("train_mdt --init-from {t}/sra.pt", "holds another network"),
    ("train_discriminative --prototypes 0", "--prototypes"),
    ("train_diversedit --pair-layers 1", "--pair-layers 2 or more"),
    (STAGE_2, "--stage 2 needs --teacher"),
    (f"{STAGE_2} --teacher {{t}}/nowhere", "{t}/nowhere: no such file or folder"),
    (f"{STAGE_2} --teacher {{t}}/empty", "{t}/empty: no checkpoint"),
    (f"{STAGE_2} --teacher {{t}}/stage1 --model DiT-S/8", "hidden_size 128 (here 384)"),
    ("train_sra --data {t}/good --vae {t}/nowhere.bin", "{t}/nowhere.bin cannot be read"),
    ("train_mdt --data {t}/good --vae {t}/file", "{t}/file cannot be read"),
    ("train_mdt --data {t}/good --vae {t}/dit.pt", "no Stable-Diffusion VAE"),
    ("train_diversedit --data {t}/good --vae {t}/half.bin", "missing decoder"),
    ("train_sra --out {t}/file", "{t}/file"),
    ("train_mdt --diffusion flow --out {t}/sra", "{t}/sra"),
    ("train_sra --model DiT-S/8 --out {t}/sra", "--model DiT-S/8 (it has DiT-Ti/8)"),
    ("sample --num 2", "required: --ckpt"),
    ("sample --ckpt {t}/nowhere", "{t}/nowhere: no such file or folder"),
    ("sample --ckpt {t}/empty", "no checkpoints/*.pt in this folder"),
    ("sample --ckpt {t}/file", "{t}/file cannot be read"),
    ("sample --ckpt {t}/cut.pt", "{t}/cut.pt cannot be read"),
    ("sample --ckpt {t}/other.pt", "is not a checkpoint of the training scripts"),
    ("sample --ckpt {t}/dit.pt", "--official"),
    (f"sample --ckpt {{t}}/dit.pt {OFFICIAL} --model DiT-S/2", "is not a DiT-S/2"),
    (f"sample --ckpt {{t}}/other.pt {OFFICIAL} --model DiT-Ti/2", "not a DiT or SiT"),
    (f"sample --ckpt {{t}}/sra.pt {OFFICIAL} --model DiT-Ti/2", "leave out --official"),
    (f"sample --ckpt {{t}}/dit.pt {OFFICIAL}", "--official needs --model"),
    ("sample --ckpt {t}/dit.pt --official dit --model DiT-Ti/2 --num 2", "give --vae"),
    ("sample --ckpt {t}/sra --vae {t}/vae.bin", "generates pixels"),
    ("sample --ckpt {t}/sra --classes 3 10", "--classes 3 10: the model knows classes 0 to 9"),
    ("sample --ckpt {t}/sra --guidance 0.5", "guidance 0.5 is below 1"),
    ("sample --ckpt {t}/sra --guidance 2 --guidance-interval 0.7 0.1", "interval 0.7 .. 0.1"),
    ("sample --ckpt {t}/sra --steps 0", "--steps 0: must be at least 1"),
    ("sample --ckpt {t}/sra --png --latents", "leave out --png"),
    ("sample --ckpt {t}/sra --num 3 --out {t}/samples", "choose another --out"),
    ("sample --ckpt {t}/sra --out {t}/file", "{t}/file"),
    ("fid", "give SAMPLES REFERENCE"),
    (f"fid {{t}}/nowhere.npz {{t}}/images.npz {FEATURES}", "{t}/nowhere.npz does not exist"),
    (f"fid {{t}}/other.pt {{t}}/images.npz {FEATURES}", "is neither a folder nor an .npz"),
    (f"fid {{t}}/cut.npz {{t}}/images.npz {FEATURES}", "{t}/cut.npz is not an .npz"),
    (f"fid {{t}}/float.npz {{t}}/images.npz {FEATURES}", "uint8"),
    (f"fid {{t}}/images.npz {{t}}/unlike.npz {FEATURES}", "dimension"),
    (f"fid {{t}}/corrupt {{t}}/images.npz {FEATURES}", "{t}/corrupt/bee/2.png"),
    (f"fid {{t}}/mixed {{t}}/images.npz {FEATURES}", "one size"),
]


@pytest.mark.parametrize("line, message", CASES, ids=[line for line, _ in CASES])
def test_bad_input(line, message, things, tmp_path, capfd):
    script, *flags = line.format(t=things).split()
    if script != "fid" and "--out" not in flags:
        flags += ["--out", tmp_path / "out"]
    before = files(things)
    assert message.format(t=things) in one_line(capfd, script, *flags)
    assert files(things) == before and not files(tmp_path)


def test_an_image_that_ends_early_is_named(things, tmp_path, capfd):
    flags = f"--steps 4 --data {things / 'torn'} --out {tmp_path}"
    code, lines = outcome(capfd, "train_sra", flags)
    assert code == 2 and f"cannot read image {things / 'torn' / 'bee' / '2.png'}" in lines[-1]


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
            np.savez(file, arr_0=objects, mu=objects, sigma=objects, labels=objects)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "archive")


PLACES = [  # {f}: the file, {r}: a run whose newest checkpoint it is, {t}: the folder of things
    "sample --ckpt {f}",
    "sample --ckpt {f} --official dit --model DiT-Ti/2",
    "train_mdt --init-from {f}",
    "train_selftranscendence --stage 2 --teacher {f}",
    "train_sra --data {t}/good --vae {f}",
    "train_sra --out {r}",
    "fid {f}.npz {t}/images.npz --features {t}/features.pt",
    "fid {t}/images.npz {f}.npz --features {t}/features.pt",
    "fid {t}/images.npz {t}/images.npz --features {f}",
]


@pytest.mark.parametrize("kind", ["archive", "older", "pickle", "arrays"])
@pytest.mark.parametrize("place", PLACES)
def test_code_in_a_file_does_not_run(place, kind, things, tmp_path, capfd):
    file, newest = tmp_path / "trap.bin", checkpoint_path(tmp_path / "run", 2)
    newest.parent.mkdir(parents=True)
    for path in (file, newest, tmp_path / "trap.bin.npz"):
        set_trap(path, kind, tmp_path / "ran")
    script, *flags = place.format(f=file, r=tmp_path / "run", t=things).split()
    if script != "fid" and "--out" not in flags:
        flags += ["--out", tmp_path / "out"]
    code, lines = outcome(capfd, script, *flags)
    assert code == 2 and lines[-1].startswith(f"{script}.py: error: "), lines
    assert not (tmp_path / "ran").exists()


def test_code_in_a_part_of_an_interrupted_sampling_does_not_run(things, tmp_path, capfd):
    flags = f"--ckpt {things / 'sra'} --num 2 --steps 1 --out {tmp_path / 'out'}"
    call("sample", flags)
    (tmp_path / "out" / "samples.npz").unlink()
    (tmp_path / "out" / "parts").mkdir()
    set_trap(tmp_path / "out" / "parts" / "0-2.npz", "arrays", tmp_path / "ran")
    assert "0-2.npz" in one_line(capfd, "sample", flags)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["archive", "older", "pickle", "arrays"])
def test_the_trap_works(tmp_path, kind):
    set_trap(tmp_path / "file", kind, tmp_path / "ran")
    if kind == "pickle":
        pickle.loads((tmp_path / "file").read_bytes())
    elif kind == "arrays":
        np.load(tmp_path / "file", allow_pickle=True)["mu"]
    else:
        torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "ran").is_dir()


# Unusual images that are good


def test_unusual_images_mean_what_pillow_says(tmp_path):
    """Alpha is left out, palettes are looked up, EXIF turns nothing; links are followed."""
    folder = tmp_path / "data" / "ant"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (16, 16, 4), np.uint8)
    palette, index = rng.integers(0, 256, (4, 3), np.uint8), rng.integers(0, 4, (16, 16), np.uint8)
    indexed = Image.fromarray(index, "L")
    indexed.putpalette(palette.tobytes())
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(rgba).save(folder / "alpha.png")
    Image.fromarray(rgba[:, :, :3]).save(folder / "exif.png", exif=turned)
    indexed.save(folder / "palette.png")
    (folder / "link.png").symlink_to("alpha.png")
    data = Images(str(tmp_path / "data"), 16, 0, 1)
    for k, expected in enumerate((rgba[:, :, :3], rgba[:, :, :3], rgba[:, :, :3], palette[index])):
        assert np.array_equal(data[(k, False)][0].permute(1, 2, 0).numpy(), expected)
        assert np.array_equal(fid.load_image(data.files[k][0], (16, 16)), expected)
