"""The latent cache, training on it, and sampling through the VAE."""

import json
import os
import signal
import subprocess

import numpy as np
import pytest
import torch
from conftest import (
    TINY,
    assert_same,
    assert_same_run,
    call,
    close,
    command,
    make_folder,
    network_state,
    one_line,
    run,
    save_vae,
    terminate_after,
    train,
    wait_for,
)
from PIL import Image

import sample
import train_sra
from models import VAE_SCALE, cache_latents, load_vae, to_uint8
from train_sra import SRA, Images, collate

SIZE = 32  # of the images; latents are 4 x 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two VAEs, and 30 images of three classes."""
    folder = tmp_path_factory.mktemp("latents")
    for name, seed in (("vae", 0), ("other", 1)):
        save_vae(folder / f"{name}.bin", seed, gain=1.5)
    make_folder(folder / "data", ("ant", "bee", "cat"), each=10, size=40)
    return folder


@pytest.fixture(scope="module")
def cache(folder):
    vae, digest = load_vae(folder / "vae.bin")
    return cache_latents(folder / "cache", images_of(folder), vae, digest, collate, 0)


def images_of(folder):
    return Images(str(folder / "data"), SIZE, 0, 1)


def flags(folder, tmp_path, vae="vae.bin"):
    data = f"--data {folder / 'data'} --image-size {SIZE} --model DiT-Ti/2 --batch-size 6"
    return f"{data} --vae {folder / vae} --latents {tmp_path / 'c.latents'}"


def test_moments_of_every_image_and_its_mirror(folder, cache):
    images, (vae, _) = images_of(folder), load_vae(folder / "vae.bin")
    keys = [(7, False), (0, True), (29, False), (7, True)]
    moments, labels = cache.__getitems__(keys)
    assert moments.dtype == torch.float16 and moments.shape == (4, 8, 4, 4)
    assert labels.tolist() == [images[key][1] for key in keys]
    for key, stored in zip(keys, moments):
        pixels = images[key][0][None].float() / 127.5 - 1  # mirrored already
        expected = torch.cat(vae.encode(pixels), 1)[0]
        close(stored.float(), expected, rtol=2e-3, atol=2e-3)
    assert not torch.equal(moments[0], moments[3])


def test_posterior_samples_are_fresh_scaled_and_of_the_right_spread(cache):
    moments = torch.zeros(2000, 8, 4, 4, dtype=torch.float16)
    moments[:, :4] = 3.0
    moments[:, 4:] = -2.0
    torch.manual_seed(0)
    z = cache.prepare(moments)
    assert z.shape == (2000, 4, 4, 4) and z.dtype == torch.float32
    assert abs(z.mean() / VAE_SCALE - 3) < 0.01 and abs(z.std() / VAE_SCALE - np.exp(-1)) < 0.01
    assert not torch.equal(cache.prepare(moments), z)


@pytest.mark.parametrize("script", ["train_sra", "train_mdt"])
def test_training_on_latents_resumes_bitwise_and_samples(folder, tmp_path, script):
    """sample.py finds the VAE by itself; its images are its decoded latents."""
    options = f"{flags(folder, tmp_path)} --steps 6"
    train(tmp_path / "a", options, script=script)
    train(tmp_path / "b", options, script=script, method=terminate_after(2, script))
    train(tmp_path / "b", options, script=script)
    assert_same_run(tmp_path / "a", tmp_path / "b", 6)
    grid = Image.open(tmp_path / "a" / "samples" / "0000006.png")
    assert grid.size == (3 * SIZE, 4 * SIZE)
    draw = f"--ckpt {tmp_path / 'a'} --num 5 --steps 2 --batch-size 3"
    call("sample", draw, "--out", tmp_path / "images")
    call("sample", draw, "--latents --out", tmp_path / "stored")
    images = np.load(tmp_path / "images" / "samples.npz")["arr_0"]
    latents = np.load(tmp_path / "stored" / "samples.npz")["arr_0"]
    assert images.shape == (5, SIZE, SIZE, 3) and latents.shape == (5, 4, 4, 4)
    vae, digest = load_vae(folder / "vae.bin")
    decoded = to_uint8(vae.decode(torch.from_numpy(latents) / VAE_SCALE)).numpy()
    assert np.abs(decoded.astype(int) - images).max() <= 1
    protocol = json.loads((tmp_path / "images" / "protocol.json").read_text())
    assert protocol["vae"] == digest


def test_the_loop_trains_on_fresh_samples(folder, tmp_path):
    """Two epochs of the whole set without flips: other latents of the same images."""
    seen = []

    class Records(SRA):
        def forward(self, x0, y):
            seen.append(x0)
            return super().forward(x0, y)

    options = f"{flags(folder, tmp_path)} --batch-size 30 --no-flip --steps 2"
    train(tmp_path / "a", options, method=Records)
    assert seen[0].shape == (30, 4, 4, 4) and seen[0].abs().max() < 20 * VAE_SCALE
    first, second = (x0.sum((0, 2, 3)) for x0 in seen)
    assert not torch.allclose(first, second, rtol=1e-5, atol=1e-5)


def test_latents_are_not_clipped(folder, tmp_path, monkeypatch):
    """DDPM clips pixels while sampling, never latents."""
    clips = []
    make = train_sra.make_diffusion

    def recorded(name, clip):
        clips.append(clip)
        return make(name, clip)

    monkeypatch.setattr(train_sra, "make_diffusion", recorded)
    monkeypatch.setattr(sample, "make_diffusion", recorded)
    train(tmp_path / "a", flags(folder, tmp_path), "--diffusion ddpm --steps 1")
    call("sample", f"--ckpt {tmp_path / 'a'} --num 1 --steps 1 --out {tmp_path / 'images'}")
    assert clips == [False, False]


def test_another_vae_is_refused(folder, tmp_path, capfd):
    """On resuming, for the start of a second stage, and for sampling."""
    train(tmp_path / "a", flags(folder, tmp_path), "--steps 1", script="train_mdt")
    other = flags(folder, tmp_path, "other.bin").replace("c.latents", "d.latents")
    error = one_line(capfd, "train_mdt", other, "--steps 1 --out", tmp_path / "a")
    assert "VAE" in error
    start = f"--init-from {tmp_path / 'a' / 'checkpoints' / '0000001.pt'} --out {tmp_path / 'b'}"
    assert "VAE" in one_line(capfd, "train_mdt", other, start)
    draw = f"--ckpt {tmp_path / 'a'} --num 2 --steps 2 --out {tmp_path / 'images'}"
    assert "VAE" in one_line(capfd, "sample", draw, "--vae", folder / "other.bin")


def test_two_processes_killed_while_encoding(folder, tmp_path):
    """The same command finishes the cache, and trains as if nothing had happened."""
    make_folder(tmp_path / "data", each=300, size=SIZE)
    options = f"{TINY} --data {tmp_path / 'data'} --image-size {SIZE} --model DiT-Ti/2"
    options = f"{options} --vae {folder / 'vae.bin'} --steps 2"
    before = set(tmp_path.rglob("*"))
    process = subprocess.Popen(
        command("train_sra", options, "--out", tmp_path / "run", processes=2),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )

    def encoding():
        new = [p for p in set(tmp_path.rglob("*")) - before if p.is_file() and p.name != "lock"]
        return any(path.stat().st_size for path in new)

    assert wait_for(encoding, process)
    children = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    for line in children.splitlines():
        if f"--out {tmp_path / 'run'}" in line:
            os.kill(int(line.split()[0]), signal.SIGKILL)
    process.wait()
    run("train_sra", options, "--out", tmp_path / "run", processes=2)
    again = options.replace(str(tmp_path / "data"), str(tmp_path / "again"))
    make_folder(tmp_path / "again", each=300, size=SIZE)
    run("train_sra", again, "--out", tmp_path / "whole", processes=2)
    assert_same(network_state(tmp_path / "run", 2), network_state(tmp_path / "whole", 2))
