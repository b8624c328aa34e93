"""Images and latents: the shards that are made once, training on them, and the VAE."""

import json

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from conftest import (
    assert_same_run,
    call,
    close,
    free_port,
    make_folder,
    one_line,
    process_group,
    save_vae,
    terminate_after,
    train,
    words,
)
from PIL import Image

import sample
import train_sra
from models import VAE_SCALE, load_vae, to_uint8
from train_sra import SRA, Images, center_crop, parse_args

KEYS = [(7, False), (0, True), (29, False), (7, True)]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(train_sra, "SHARD", 8)


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """30 images of three classes, and VAEs: one, its twin with another decoder, another one."""
    here = tmp_path_factory.mktemp("things")
    make_folder(here / "data", ("cat", "ant", "bee"), each=10, size=40)
    state = save_vae(here / "vae.bin", seed=0, gain=1.5).state_dict()
    other = save_vae(here / "other.bin", seed=1, gain=1.5).state_dict()
    decoder = {k: v for k, v in other.items() if k.startswith(("decoder", "post_quant"))}
    torch.save({**state, **decoder}, here / "twin.bin")
    return here


def open_images(things, cache, *flags, vae=None):
    """The data set, not made yet; 32 x 32 pixels unless the flags say otherwise."""
    paths = f"--data {things / 'data'} --cache {cache} --image-size 32"
    return Images(parse_args(words(paths, *flags)), load_vae(things / vae) if vae else None)


def made(data, rank=0, world=1):
    data.make_shards(torch.device("cpu"), rank, world)
    return data


def contents(cache):
    return {path.relative_to(cache): path.read_bytes() for path in sorted(cache.rglob("*.npy"))}


def latent_flags(things, tmp_path):
    data = f"--data {things / 'data'} --image-size 32 --cache {tmp_path / 'cache'}"
    return f"{data} --model DiT-Ti/2 --batch-size 6 --vae {things / 'vae.bin'}"


def test_pixels_and_moments_are_those_of_the_cropped_file_and_its_mirror(things, tmp_path):
    data = made(open_images(things, tmp_path))
    pixels, labels = data.read(KEYS, False)
    assert data.classes == ["ant", "bee", "cat"] and labels.tolist() == [0, 0, 2, 0]
    for (index, flip), image in zip(KEYS, pixels, strict=True):
        expected = np.asarray(center_crop(Image.open(things / "data" / data.files[index]), 32))
        assert np.array_equal(image.permute(1, 2, 0), expected[:, ::-1] if flip else expected)
    x = data.prepare(pixels)
    assert torch.equal(x, pixels / 127.5 - 1) and x.shape[1:] == data.shape == (3, 32, 32)
    data = made(open_images(things, tmp_path, vae="vae.bin"))
    moments, _ = data.read(KEYS, False)
    assert moments.dtype == torch.float16 and data.shape == (4, 4, 4)
    close(moments.float(), torch.cat(data.vae.encode(x), 1), rtol=2e-3, atol=2e-3)
    assert not torch.equal(moments[0], moments[3])


def test_posterior_samples_are_fresh_scaled_and_of_the_right_spread(things, tmp_path):
    data = open_images(things, tmp_path, vae="vae.bin")
    moments = torch.full((2000, 8, 4, 4), 3.0, dtype=torch.float16)
    moments[:, 4:] = -2.0
    torch.manual_seed(0)
    z = data.prepare(moments)
    assert z.shape == (2000, 4, 4, 4) and z.dtype == torch.float32
    assert abs(z.mean() / VAE_SCALE - 3) < 0.01 and abs(z.std() / VAE_SCALE - np.exp(-1)) < 0.01
    assert not torch.equal(data.prepare(moments), z)


def make_as_rank(rank, port, things, cache, vae):
    train_sra.SHARD = 8
    with process_group(rank, port):
        made(open_images(things, cache, vae=vae), rank, 2)


@pytest.mark.parametrize("vae", [None, "vae.bin"], ids=["pixels", "latents"])
def test_two_processes_make_the_same_shards_and_what_is_missing_alone(things, tmp_path, vae):
    data = made(open_images(things, tmp_path / "one", vae=vae))
    before = contents(tmp_path / "one")
    times = [path.stat().st_mtime_ns for path in data.paths]
    mp.spawn(make_as_rank, (free_port(), things, tmp_path / "two", vae), nprocs=2)
    assert contents(tmp_path / "two") == before and len(before) == 4
    data.paths[2].unlink()
    made(open_images(things, tmp_path / "one", vae=vae))
    changed = [path.stat().st_mtime_ns != t for path, t in zip(data.paths, times)]
    assert changed == [False, False, True, False] and contents(tmp_path / "one") == before


def test_other_data_have_another_folder(things, tmp_path):
    """Another size, encoder or file; two VAEs that differ in the decoder alone share theirs."""
    root = make_folder(tmp_path / "data", size=40)

    def folder(flags="", vae=None):
        return open_images(things, tmp_path, f"--data {root}", flags, vae=vae).paths[0].parent

    folders = [folder(), folder("--image-size 16"), folder(vae="vae.bin"), folder(vae="other.bin")]
    with open(root / "ant" / "1.png", "ab") as file:
        file.write(b"changed")
    assert len({*folders, folder()}) == 5
    assert folder(vae="vae.bin") == folder(vae="twin.bin")


def test_what_counts_as_an_image(tmp_path):
    """Hidden names do not, links do; alpha is left out, palettes are looked up, EXIF is ignored."""
    folder = make_folder(tmp_path / "data", ("ant", ".hidden"), each=1, size=16) / "ant"
    (folder / "0.png").rename(folder / "._0.png")
    (folder / "notes.txt").write_text("no image")
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (16, 16, 4), np.uint8)
    palette, index = rng.integers(0, 256, (4, 3), np.uint8), rng.integers(0, 4, (16, 16), np.uint8)
    indexed = Image.fromarray(index, "L")
    indexed.putpalette(palette.tobytes())
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(rgba).save(folder / "alpha.png")
    (folder / "deep" / "er").mkdir(parents=True)
    Image.fromarray(rgba[:, :, :3]).save(folder / "deep" / "er" / "exif.PNG", exif=turned)
    (folder / "link.webp").symlink_to("alpha.png")
    indexed.save(folder / "palette.png")
    data = made(open_images(tmp_path, tmp_path, "--image-size 16"))
    names = ("alpha.png", "deep/er/exif.PNG", "link.webp", "palette.png")
    assert data.files == [f"ant/{name}" for name in names] and data.classes == ["ant"]
    x, _ = data.read([(k, False) for k in range(4)], False)
    for image, expected in zip(x, (*[rgba[:, :, :3]] * 3, palette[index])):
        assert np.array_equal(image.permute(1, 2, 0), expected)


@pytest.mark.parametrize("script", ["train_sra", "train_mdt"])
def test_training_on_latents_resumes_bitwise_and_samples(things, tmp_path, script, capfd):
    """sample.py finds the VAE by itself; its images are its decoded latents."""
    options = f"{latent_flags(things, tmp_path)} --steps 6"
    train(tmp_path / "a", options, script=script)
    train(tmp_path / "b", options, script=script, method=terminate_after(2, script))
    train(tmp_path / "b", options, script=script)
    assert_same_run(tmp_path / "a", tmp_path / "b", 6)
    assert Image.open(tmp_path / "a" / "samples" / "0000006.png").size == (3 * 32, 4 * 32)
    draw = f"--ckpt {tmp_path / 'a'} --num 5 --steps 2 --batch-size 3"
    call("sample", draw, "--latents --out", tmp_path / "raw")
    latents = torch.from_numpy(np.load(tmp_path / "raw" / "samples.npz")["arr_0"])
    for name, more in (("vae", ""), ("twin", f"--vae {things / 'twin.bin'}")):
        call("sample", draw, more, "--out", tmp_path / name)
        vae = load_vae(things / f"{name}.bin")
        decoded = to_uint8(vae.decode(latents / VAE_SCALE)).numpy()
        found = np.load(tmp_path / name / "samples.npz")["arr_0"]
        assert found.shape == (5, 32, 32, 3) and np.abs(decoded.astype(int) - found).max() <= 1
        protocol = json.loads((tmp_path / name / "protocol.json").read_text())
        assert protocol["decoder_sha256"] == vae.digest("decoder")
    other = f"--vae {things / 'other.bin'} --out {tmp_path / 'other'}"
    assert "encoder" in one_line(capfd, "sample", draw, other)


def test_any_vae_of_the_family_will_do(tmp_path):
    """Three latent channels, four pixels a side. DDPM clips pixels in sampling, never latents."""
    save_vae(tmp_path / "vae.bin", levels=3, latent_channels=3)
    make_folder(tmp_path / "data", size=24)
    flags = words(latent_flags(tmp_path, tmp_path), "--steps 2 --diffusion ddpm")
    train(tmp_path / "run", *flags)
    draw = f"--ckpt {tmp_path / 'run'} --num 2 --steps 2 --out"
    call("sample", draw, tmp_path / "images")
    call("sample", draw, tmp_path / "raw", "--latents")
    assert np.load(tmp_path / "images" / "samples.npz")["arr_0"].shape == (2, 32, 32, 3)
    assert np.load(tmp_path / "raw" / "samples.npz")["arr_0"].shape == (2, 3, 8, 8)
    _, while_training, _, _ = train_sra.build(SRA, parse_args(flags), torch.device("cpu"), 1)
    _, later, _ = sample.load_network(sample.parse_args(words(draw, tmp_path)))
    assert not while_training.clip and not later.clip
