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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Short runs by noise process, with averages that generate something else than zeros."""
    runs = {}
    for name in ("flow", "gvp", "ddpm", "edm"):
        runs[name] = tmp_path_factory.mktemp(name)
        train(runs[name], f"--steps 3 --diffusion {name} --align-weight 0")
        generator = torch.Generator().manual_seed(0)
        change_average(
            runs[name], 3, lambda v, g=generator: v + 0.05 * torch.randn(v.shape, generator=g)
        )
    return runs


def images(folder):
    with np.load(folder / "samples.npz", allow_pickle=False) as arrays:
        return arrays["arr_0"], arrays["arr_1"]


def assert_same_images(a, b):
    """Equal labels; pixels up to one grey level in a few: products round by batch size."""
    assert (a[1] == b[1]).all() and a[0].shape == b[0].shape
    assert a[0].dtype == b[0].dtype == np.uint8
    difference = np.abs(a[0].astype(int) - b[0].astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


@pytest.mark.parametrize(
    "name, solver",
    [
        ("flow", "heun"),
        ("flow", "sde"),
        ("gvp", "euler"),
        ("ddpm", "euler"),
        ("ddpm", "sde"),
        ("edm", "heun"),
        ("edm", "sde"),
    ],
)
def test_images_do_not_depend_on_the_batch_size(trained, tmp_path, name, solver):
    flags = f"--ckpt {trained[name]} {FLAGS} --solver {solver} --guidance 1.5"
    for batch in (3, 7):
        call("sample", flags, "--batch-size", batch, "--out", tmp_path / str(batch))
    a, b = images(tmp_path / "3"), images(tmp_path / "7")
    assert_same_images(a, b)
    assert a[0].shape == (10, 16, 16, 3) and a[0].std() > 5
    assert len(np.unique(a[0].reshape(10, -1), axis=0)) == 10  # ten different images


def test_images_do_not_depend_on_the_number_of_processes(trained, tmp_path):
    """A process may have nothing to do, too."""
    for num, batch in ((10, 3), (1, 3)):
        flags = f"--ckpt {trained['flow']} --num-samples {num} --steps 3 --batch-size {batch}"
        for processes in (1, 2):
            out = tmp_path / f"{num}_{processes}"
            run("sample", flags, "--out", out, processes=processes)
        assert_same_images(images(tmp_path / f"{num}_1"), images(tmp_path / f"{num}_2"))


def test_files_and_protocol(trained, tmp_path):
    guidance = "--guidance 2 --guidance-interval 0 0.7"
    call(
        "sample",
        f"--ckpt {trained['flow']} {FLAGS} --png --labels balanced {guidance}",
        "--out",
        tmp_path,
    )
    pixels, labels = images(tmp_path)
    assert labels.tolist() == list(range(10))
    assert Image.open(tmp_path / "grid.png").size == (8 * 16, 16)
    assert len(list((tmp_path / "png").iterdir())) == 10
    picture = np.asarray(Image.open(tmp_path / "png" / "000007.png"))
    assert np.array_equal(picture, pixels[7])
    protocol = json.loads((tmp_path / "protocol.json").read_text())
    assert protocol["checkpoint"]["step"] == 3 and protocol["seed"] == 4
    assert protocol["guidance"] == {"scale": 2.0, "interval": [0.0, 0.7], "channels": 3}


def test_an_interrupted_run_goes_on_even_with_another_batch_size(trained, tmp_path, monkeypatch):
    flags = f"--ckpt {trained['flow']} {FLAGS}"
    call("sample", flags, "--out", tmp_path / "whole")
    made = []

    def interrupted(net, diffusion, noise, *others, **options):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.extend(noise)
        return sample_ode(net, diffusion, noise, *others, **options)

    monkeypatch.setattr(sample, "sample_ode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call("sample", flags, "--batch-size 2 --out", tmp_path / "torn")
    made.append(None)  # no more interruptions
    for _ in range(2):  # the second time nothing is left to do
        call("sample", flags, "--batch-size 5 --out", tmp_path / "torn")
        assert len(made) == 5 + 6
    assert_same_images(images(tmp_path / "whole"), images(tmp_path / "torn"))


def test_classes_seed_and_weights_matter(trained, tmp_path):
    base = f"--ckpt {trained['flow']} --num 10 --steps 3"
    for name, flags in (
        ("a", "--seed 4"),
        ("b", "--seed 4 --classes 3 5"),
        ("c", "--seed 5"),
        ("d", "--seed 4 --weights model"),
    ):
        call("sample", base, flags, "--out", tmp_path / name)
    assert set(images(tmp_path / "b")[1]) <= {3, 5}
    first = images(tmp_path / "a")[0]
    assert all((images(tmp_path / name)[0] != first).mean() > 0.5 for name in "cd")


def test_official_checkpoint(tmp_path):
    """Weights in the official layout, on three channels, are sampled as the network itself."""
    model = tiny(hidden_size=128, depth=6, num_heads=4)
    torch.save({"ema": model.state_dict()}, tmp_path / "repa.pt")
    flags = "--official repa --model SiT-Ti/2 --num 3 --steps 4"
    call("sample", "--ckpt", tmp_path / "repa.pt", flags, "--out", tmp_path / "out")
    draw = ImageNoise(0, range(3), (3, 8, 8))
    noise, y = draw(), draw.choice(range(10))
    expected = to_uint8(sample_ode(model, Flow(), noise, y, 4)).numpy()
    assert_same_images(images(tmp_path / "out"), (expected, y.numpy()))


def test_official_latents_are_stored_or_decoded(tmp_path):
    torch.save(official_dit().state_dict(), tmp_path / "dit.pt")
    vae = save_vae(tmp_path / "vae.bin")
    flags = f"--ckpt {tmp_path / 'dit.pt'} --official dit --model DiT-Ti/2 --num 2 --steps 3"
    flags = f"{flags} --solver sde --guidance 1.5 --guidance-channels 3"
    call("sample", flags, "--latents --out", tmp_path / "stored")
    call("sample", flags, "--vae", tmp_path / "vae.bin", "--out", tmp_path / "decoded")
    latents, _ = images(tmp_path / "stored")
    assert latents.shape == (2, 4, 8, 8) and latents.dtype == np.float32
    with torch.no_grad():
        expected = to_uint8(vae.decode(torch.from_numpy(latents) / VAE_SCALE)).numpy()
    assert np.abs(expected.astype(int) - images(tmp_path / "decoded")[0]).max() <= 1


def test_samples_of_a_retrained_network_are_not_taken_for_the_old_ones(tmp_path, capfd):
    train(tmp_path / "run", "--steps 2")
    flags = f"--ckpt {tmp_path / 'run'} --num 2 --steps 2 --out {tmp_path / 'out'}"
    call("sample", flags)
    checkpoint_path(tmp_path / "run", 2).unlink()
    train(tmp_path / "run", "--steps 2 --seed 1")
    assert "samples of another run" in one_line(capfd, "sample", flags)
