"""sample.py: the same images however they are made, resuming, official checkpoints."""

import json

import numpy as np
import pytest
import torch
from conftest import (
    call,
    change_average,
    checkpoint_path,
    official_dit,
    one_line,
    run,
    save_vae,
    tiny,
    train,
)
from PIL import Image

import sample
from diffusion import Flow, ImageNoise, sample_ode
from models import VAE_SCALE, to_uint8

FLAGS = "--num 10 --steps 3 --seed 4"
WAYS = "flow-heun flow-sde gvp-euler ddpm-euler ddpm-sde edm-heun edm-sde".split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Short runs by noise process, with averages that generate something else than zeros."""
    runs = {}
    for name in ("flow", "gvp", "ddpm", "edm"):
        runs[name] = tmp_path_factory.mktemp(name)
        train(runs[name], f"--steps 3 --diffusion {name} --align-weight 0")
        noise = torch.Generator().manual_seed(0)
        change_average(
            runs[name], 3, lambda v, g=noise: v + 0.05 * torch.randn(v.shape, generator=g)
        )
    return runs


def images(folder):
    with np.load(folder / "samples.npz", allow_pickle=False) as arrays:
        return arrays["arr_0"], arrays["arr_1"]


def assert_same_images(a, b):
    """Equal labels; pixels up to one grey level in a few."""
    assert (a[1] == b[1]).all() and a[0].shape == b[0].shape
    assert a[0].dtype == b[0].dtype == np.uint8
    difference = np.abs(a[0].astype(int) - b[0].astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


@pytest.mark.parametrize("way", WAYS)
def test_images_do_not_depend_on_the_batch_size(trained, tmp_path, way):
    """Up to rounding; so another batch size needs another --out."""
    name, solver = way.split("-")
    flags = f"--ckpt {trained[name]} {FLAGS} --solver {solver} --guidance 1.5"
    for batch in (3, 7):
        call("sample", flags, "--batch-size", batch, "--out", tmp_path / str(batch))
    a, b = images(tmp_path / "3"), images(tmp_path / "7")
    assert_same_images(a, b)
    assert a[0].shape == (10, 16, 16, 3) and a[0].std() > 5
    assert len(np.unique(a[0].reshape(10, -1), axis=0)) == 10


def test_images_do_not_depend_on_the_number_of_processes(trained, tmp_path):
    """Bitwise; a process may have nothing to do, too."""
    for num in (10, 1):
        flags = f"--ckpt {trained['flow']} --num-samples {num} --steps 3 --batch-size 3"
        for processes in (1, 2):
            run("sample", flags, "--out", tmp_path / f"{num}_{processes}", processes=processes)
        one, two = (images(tmp_path / f"{num}_{processes}") for processes in (1, 2))
        assert all(np.array_equal(a, b) for a, b in zip(one, two))


def test_files_and_protocol(trained, tmp_path):
    flags = f"--ckpt {trained['flow']} {FLAGS} --png --labels balanced --guidance 2"
    call("sample", flags, "--guidance-interval 0 0.7 --batch-size 4 --out", tmp_path)
    pixels, labels = images(tmp_path)
    assert labels.tolist() == list(range(10)) and not (tmp_path / "parts").exists()
    assert Image.open(tmp_path / "grid.png").size == (8 * 16, 16)
    assert len(list((tmp_path / "png").iterdir())) == 10
    assert np.array_equal(Image.open(tmp_path / "png" / "000007.png"), pixels[7])
    protocol = json.loads((tmp_path / "protocol.json").read_text())
    assert protocol["checkpoint"]["step"] == 3 and protocol["seed"] == 4
    assert protocol["guidance"] == 2 and protocol["guidance_interval"] == [0, 0.7]
    assert protocol["uint8"] == 128 and len(protocol["weights_sha256"]) == 64
    assert protocol["decoder_sha256"] is None


def test_an_interrupted_run_goes_on(trained, tmp_path, monkeypatch, capfd):
    """Bitwise, with what is missing alone; under other flags it is refused."""
    flags = f"--ckpt {trained['flow']} {FLAGS} --batch-size 2"
    call("sample", flags, "--out", tmp_path / "whole")
    made = []

    def interrupted(net, diffusion, noise, *others, **options):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.extend(noise)
        return sample_ode(net, diffusion, noise, *others, **options)

    monkeypatch.setattr(sample, "sample_ode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call("sample", flags, "--out", tmp_path / "torn")
    assert not (tmp_path / "torn" / "samples.npz").exists()
    for other in ("--batch-size 5", "--num 9", "--uint8 127.5"):
        assert "protocol.json" in one_line(
            capfd, "sample", flags, other, "--out", tmp_path / "torn"
        )
    made.append(None)  # no more interruptions
    for _ in range(2):  # the second time nothing is left to do
        call("sample", flags, "--out", tmp_path / "torn")
        assert len(made) == 5 + 6
    a, b = images(tmp_path / "whole"), images(tmp_path / "torn")
    assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])


def test_classes_seed_weights_and_rounding_matter(trained, tmp_path):
    file = checkpoint_path(trained["flow"], 3)
    saved = torch.load(file, weights_only=True)
    saved["args"]["classes"][3:5] = ["ant", "bee"]  # the names of built-in classes hold blanks
    torch.save(saved, tmp_path / "named.pt")
    found = []
    more = ("", "--classes 3 4", "--classes ant bee", "--seed 5", "--weights model")
    for k, flags in enumerate((*more, "--labels null", "--uint8 127.5")):
        flags = f"--ckpt {tmp_path / 'named.pt'} --seed 4 --num 10 --steps 3 {flags}"
        call("sample", flags, "--out", tmp_path / str(k))
        found.append(images(tmp_path / str(k)))
    pixels = [pixels for pixels, _ in found]
    assert set(found[1][1]) == {3, 4} and set(found[5][1]) == {10}
    assert np.array_equal(pixels[1], pixels[2])
    for k in (1, 3, 4, 5):
        assert (pixels[k] != pixels[0]).mean() > 0.3, k
    lower = pixels[0].astype(int) - pixels[6]
    assert set(np.unique(lower)) == {0, 1} and 0.2 < lower.mean() < 0.8  # half a level


def test_guidance_needs_a_null_label(tmp_path, capfd):
    train(tmp_path / "run", "--steps 1 --label-drop 0")
    flags = f"--ckpt {tmp_path / 'run'} --num 2 --steps 1 --out {tmp_path / 'out'}"
    assert "--label-drop 0" in one_line(capfd, "sample", flags, "--guidance 1.5")
    call("sample", flags)


@pytest.mark.parametrize("source", ["repa", "meanflow"])
def test_official_weights_are_sampled_as_the_network_itself(tmp_path, source, capfd):
    model = tiny(hidden_size=128, depth=6, num_heads=4, interval=source == "meanflow")
    torch.save({"ema": model.state_dict()}, tmp_path / "official.pt")
    flags = f"--ckpt {tmp_path / 'official.pt'} --official {source} --model SiT-Ti/2 --num 3"
    call("sample", flags, "--steps 4 --latents --out", tmp_path / "out")
    draw = ImageNoise(0, range(3), (3, 8, 8))
    noise, y = draw(), draw.choice(range(10))
    solver = {"repa": "heun"}.get(source, source)
    expected = sample_ode(model, Flow(), noise, y, 4, solver).float().numpy()
    if source == "meanflow":
        assert "--omega" in one_line(capfd, "sample", flags, "--guidance 2 --latents")
    latents, labels = images(tmp_path / "out")
    assert np.array_equal(labels, y) and np.abs(latents - expected).max() < 1e-5


def test_official_latents_are_stored_or_decoded(tmp_path):
    torch.save(official_dit().state_dict(), tmp_path / "dit.pt")
    vae = save_vae(tmp_path / "vae.bin")
    flags = f"--ckpt {tmp_path / 'dit.pt'} --official dit --model DiT-Ti/2 --num 2 --steps 3"
    flags = f"{flags} --solver sde --guidance 1.5 --guidance-channels 3"
    call("sample", flags, "--latents --out", tmp_path / "stored")
    call("sample", flags, "--vae", tmp_path / "vae.bin", "--out", tmp_path / "decoded")
    latents, _ = images(tmp_path / "stored")
    assert latents.shape == (2, 4, 8, 8) and latents.dtype == np.float32
    expected = to_uint8(vae.decode(torch.from_numpy(latents) / VAE_SCALE)).numpy()
    assert np.abs(expected.astype(int) - images(tmp_path / "decoded")[0]).max() <= 1


def test_samples_of_a_retrained_network_are_not_taken_for_the_old_ones(tmp_path, capfd):
    train(tmp_path / "run", "--steps 2")
    flags = f"--ckpt {tmp_path / 'run'} --num 2 --steps 2 --out {tmp_path / 'out'}"
    call("sample", flags)
    checkpoint_path(tmp_path / "run", 2).unlink()
    train(tmp_path / "run", "--steps 2 --seed 1")
    assert "other samples" in one_line(capfd, "sample", flags)


def test_networks_with_an_average_velocity(tmp_path, capfd):
    """One step by default; other solvers take its velocity; guidance is that of the training."""
    noise, found = torch.Generator().manual_seed(0), []
    for name, flags in (("guided", "--mean-flow"), ("plain", "--mean-flow --omega 1")):
        train(tmp_path / name, "--steps 2", flags, script="train_diversedit")
    change_average(
        tmp_path / "guided", 2, lambda v: v + 0.05 * torch.randn(v.shape, generator=noise)
    )
    for k, way in enumerate(
        ("", "--solver meanflow --batch-size 2", "--steps 2", "--solver euler")
    ):
        flags = f"--ckpt {tmp_path / 'guided'} --num 5 {way}"
        call("sample", flags, "--out", tmp_path / str(k))
        found.append(images(tmp_path / str(k)))
    assert_same_images(found[0], found[1])
    assert all((found[0][0] != other).mean() > 0.3 for other, _ in found[2:])
    protocol = json.loads((tmp_path / "0" / "protocol.json").read_text())
    assert (protocol["solver"], protocol["steps"]) == ("meanflow", 1)
    flags = "--num 2 --guidance 1.5 --out"
    plain = f"--ckpt {tmp_path / 'plain'} --solver euler --steps 1"
    call("sample", plain, flags, tmp_path / "euler")
    for name, way in (("plain", ""), ("guided", "--solver euler --steps 1")):
        line = f"--ckpt {tmp_path / name} {way} {flags} {tmp_path / 'none'}"
        assert "--omega" in one_line(capfd, "sample", line)


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--solver meanflow", "--mean-flow"),
        ("--latents --png", "--png"),
        ("--model SiT-B/2", "--model"),
        ("--diffusion edm", "--diffusion"),
        ("--labels null --classes 3", "--classes 3"),
        ("--out {file}", "{file}"),
    ],
)
def test_flags_that_do_not_fit(trained, tmp_path, flags, named, capfd):
    file = tmp_path / "file"
    file.write_text("")
    own = f"--ckpt {trained['flow']} --num 2 --steps 1 --out {tmp_path / 'out'}"
    assert named.format(file=file) in one_line(capfd, "sample", own, flags.format(file=file))
    assert list(tmp_path.iterdir()) == [file]
