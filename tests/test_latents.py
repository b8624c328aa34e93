"""The latent cache, training on it, and sampling through the VAE: exact contents, interruptions, refusals, the real command lines."""

import json
import os
import pickle
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from conftest import ROOT
from PIL import Image
from test_end_to_end import run_in_process
from test_training import TINY, assert_same, checkpoint, command, free_port, log_lines, run
from test_vae import write_safetensors

import models
import sample
import train_sra
from models import VAE_SCALE, AutoencoderKL, LatentCache, cache_latents, latent_layout, load_vae
from train_sra import Images, collate

SIZE = 32  # of the images; latents are 4 x 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """VAE weights (.bin, the same as .safetensors, and others), and 30 images of three classes."""
    folder = tmp_path_factory.mktemp("latents")
    for name, seed in (("vae", 0), ("other", 1)):
        torch.manual_seed(seed)
        vae = AutoencoderKL(channels=(32, 32, 32, 32), layers=1)
        for parameter in vae.parameters():
            parameter.data.mul_(1.5)
        torch.save(vae.state_dict(), folder / f"{name}.bin")
        write_safetensors(folder / f"{name}.safetensors", vae.state_dict())
    rng = np.random.default_rng(0)
    for k in range(30):
        (folder / "data" / f"class{k % 3}").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
        Image.fromarray(pixels).save(folder / "data" / f"class{k % 3}" / f"{k:02d}.png")
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def encode(folder, path, batch_size=8, vae=None, data="data", size=SIZE, vae_file="vae.bin"):
    loaded, vae_hash = load_vae(folder / vae_file)
    return cache_latents(
        path,
        Images(str(folder / data), size, 0, 1),
        vae or loaded,
        vae_hash,
        collate,
        0,
        batch_size,
    )


@pytest.fixture(scope="module")
def cache(folder):
    return encode(folder, folder / "whole.latents")


# The file


def test_moments_of_every_image_and_its_mirror(folder, cache):
    images, (vae, _) = Images(str(folder / "data"), SIZE, 0, 1), load_vae(folder / "vae.bin")
    assert len(cache) == 30 and cache.classes == ["class0", "class1", "class2"]
    keys = [(7, False), (0, True), (29, False), (7, True)]
    moments, labels = cache.__getitems__(keys)
    assert (
        moments.dtype == torch.float16
        and moments.shape == (4, 8, 4, 4)
        and labels.tolist() == [images[k][1] for k in keys]
    )
    for key, stored in zip(keys, moments):
        mean, logvar = vae.encode(
            images[key][0][None].float() / 127.5 - 1
        )  # Images mirrors by itself here
        torch.testing.assert_close(
            stored.float(), torch.cat([mean, logvar], 1)[0], rtol=2e-3, atol=2e-3
        )
    assert not torch.equal(moments[0], moments[3])


def test_header_and_size(folder, cache):
    path = folder / "whole.latents"
    header = json.loads(path.read_bytes()[: 2**20].rstrip(b"\0"))
    assert header == cache.header and header["vae"] == load_vae(folder / "vae.safetensors")[1]
    expected = {
        "count": 30,
        "size": SIZE,
        "scale": 0.18215,
        "crop": "ADM centre",
        "moments": [8, 4, 4],
        "classes": cache.classes,
    }
    assert expected.items() <= header.items()
    assert (
        path.stat().st_size == latent_layout(header)[3]
        and not path.with_name("whole.latents.partial").exists()
    )
    imagenet = latent_layout({"count": 1_281_167, "moments": [8, 32, 32]})[3]
    assert imagenet < 45e9


def test_posterior_samples_are_fresh_scaled_and_of_the_right_spread(cache):
    moments = torch.zeros(2000, 8, 4, 4, dtype=torch.float16)
    moments[:, :4], moments[:, 4:] = 3.0, -2.0
    torch.manual_seed(0)
    z = cache.prepare(moments)
    assert z.shape == (2000, 4, 4, 4) and z.dtype == torch.float32
    assert abs(z.mean() / VAE_SCALE - 3) < 0.01 and abs(z.std() / VAE_SCALE - np.exp(-1)) < 0.01
    assert not torch.equal(cache.prepare(moments), z)
    torch.manual_seed(0)
    assert torch.equal(cache.prepare(moments), z)


class Stops:
    """A VAE that is interrupted after so many batches; counts the images it encodes."""

    def __init__(self, vae, batches):
        self.vae, self.batches, self.images = vae, batches, 0
        self.factor, self.latent_channels, self.parameters = (
            vae.factor,
            vae.latent_channels,
            vae.parameters,
        )

    def encode(self, x):
        if self.batches == 0:
            raise KeyboardInterrupt
        self.batches, self.images = self.batches - 1, self.images + len(x) // 2
        return self.vae.encode(x)


def test_interrupted_encoding_goes_on_where_it_stopped(folder, cache, tmp_path):
    vae, path = load_vae(folder / "vae.bin")[0], tmp_path / "c.latents"
    with pytest.raises(KeyboardInterrupt):
        encode(folder, path, vae=Stops(vae, 2))
    assert not path.exists() and path.with_name("c.latents.partial").exists()
    rest = Stops(vae, 100)
    encode(folder, path, vae=rest)
    assert rest.images == 30 - 16
    assert path.read_bytes() == (folder / "whole.latents").read_bytes()
    again = Stops(vae, 0)
    encode(folder, path, vae=again)  # finished: not encoded again


def test_other_caches_are_refused_with_the_reason(folder, cache, tmp_path):
    whole = folder / "whole.latents"

    def refused(words, path=whole, **changes):
        before = path.read_bytes()
        with pytest.raises(ValueError, match=words) as error:
            encode(folder, path, **changes)
        assert "\n" not in str(error.value) and path.read_bytes() == before

    refused("vae .* .needed", vae_file="other.bin")
    refused("size 32 .needed: 64.", size=64)
    (tmp_path / "data").mkdir()
    for k in range(3):
        (tmp_path / "data" / f"class{k}").mkdir()
    for path in sorted((folder / "data").rglob("*.png")):
        name = path.name.replace("07", "97")
        (tmp_path / "data" / path.parent.name / name).write_bytes(path.read_bytes())
    refused("another data set or VAE: names", data=tmp_path / "data")
    next((tmp_path / "data").rglob("*.png")).unlink()
    refused("count 30 .needed: 29.", data=tmp_path / "data")
    short = tmp_path / "short.latents"
    short.write_bytes(whole.read_bytes()[:-1000])
    refused("bytes in place of", short)
    short.rename(tmp_path / "half.latents.partial")
    with pytest.raises(ValueError, match=r"half.latents.partial has .* bytes in place of"):
        encode(folder, tmp_path / "half.latents")
    for k, text in enumerate([b"", b"hello", b"[1, 2]", b"{}", b'{"count": 30}', b"\xff" * 5000]):
        junk = tmp_path / f"junk{k}.latents"
        junk.write_bytes(text)
        refused("is not a file of latents", junk)


def test_no_room_is_said_before_encoding(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(models.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"needs 0.0 GB"):
        encode(folder, tmp_path / "c.latents")
    assert not list(tmp_path.iterdir())


def test_broken_images_are_named_when_all_others_are_encoded(folder, tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    good = next((folder / "data").rglob("*.png")).read_bytes()
    for k in range(9):
        (tmp_path / "data" / "a" / f"{k}.png").write_bytes(good[:-60] if k in (1, 5) else good)
    with pytest.raises(
        ValueError, match=r"cannot read image .*1\.png.*and 1 more; the other images are encoded"
    ):
        encode(folder, tmp_path / "c.latents", data=tmp_path / "data", batch_size=3)
    for k in (1, 5):
        (tmp_path / "data" / "a" / f"{k}.png").write_bytes(good)
    rest = Stops(load_vae(folder / "vae.bin")[0], 100)
    encode(folder, tmp_path / "c.latents", data=tmp_path / "data", vae=rest)
    assert rest.images == 6  # two batches of three


def test_unfit_vaes_and_sizes_are_refused(folder, tmp_path):
    vae = load_vae(folder / "vae.bin")[0]
    vae.quant_conv.weight.mul_(1e7)
    with pytest.raises(ValueError, match="images 0 to 7 are not finite in float16"):
        encode(folder, tmp_path / "d.latents", vae=vae)
    with pytest.raises(ValueError, match="image size 36 is not divisible by 8"):
        encode(folder, tmp_path / "e.latents", size=36)
    for changes in ({"latent_channels": 16}, {"channels": (32, 32, 32)}):
        other = AutoencoderKL(**{"channels": (32, 32, 32, 32), "layers": 1, **changes})
        with pytest.raises(ValueError, match="Stable Diffusion's has 4 and 8"):
            encode(folder, tmp_path / "f.latents", vae=other)
    assert not (tmp_path / "f.latents.partial").exists()


def test_one_run_at_a_time_encodes(folder, tmp_path):
    class Meets(Stops):
        def encode(self, x):
            with pytest.raises(ValueError, match="another run is encoding"):
                encode(folder, tmp_path / "c.latents")
            return super().encode(x)

    assert (
        len(encode(folder, tmp_path / "c.latents", vae=Meets(load_vae(folder / "vae.bin")[0], 100)))
        == 30
    )


def test_class_names_longer_than_the_header_are_refused(folder, tmp_path):
    images = Images(str(folder / "data"), SIZE, 0, 1)
    images.classes = ["x" * 200 + str(k) for k in range(6000)]
    vae, vae_hash = load_vae(folder / "vae.bin")
    with pytest.raises(ValueError, match="names of 6000 classes are longer than a MiB"):
        cache_latents(tmp_path / "c.latents", images, vae, vae_hash, collate, 0)


def test_loader_processes_get_the_name_of_the_file(cache):
    content = pickle.dumps(cache)
    assert len(content) < 2000 and torch.equal(
        pickle.loads(content).__getitems__([(3, True)])[0], cache.__getitems__([(3, True)])[0]
    )


def ranks_apart(rank, port, folder):
    """Rank 1 sees another cache under the same name, as on a machine with a disk of its own."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    folder = Path(folder)
    vae, vae_hash = load_vae(folder / "vae.bin")
    images = Images(str(folder / "data"), SIZE, 0, 1)
    try:
        cache_latents(folder / f"rank{rank}.latents", images, vae, vae_hash, collate, 0)
        result = "accepted"
    except ValueError as error:
        result = str(error)
    (folder / f"result{rank}").write_text(result)
    torch.distributed.destroy_process_group()


def test_every_process_checks_the_file_it_reads(folder, cache):
    (folder / "rank0.latents").write_bytes((folder / "whole.latents").read_bytes())
    other = encode(folder, folder / "rank1.latents", vae_file="other.bin")
    assert other.header["vae"] != cache.header["vae"]
    mp.spawn(ranks_apart, (free_port(), str(folder)), nprocs=2)
    assert (folder / "result0").read_text() == "accepted" and "of another data set or VAE: vae" in (
        folder / "result1"
    ).read_text()


# From the command line


def flags(folder, tmp_path, vae="vae.bin"):
    data = [
        "--data",
        folder / "data",
        "--image-size",
        SIZE,
        "--model",
        "DiT-Ti/2",
        "--vae",
        folder / vae,
    ]
    return [*map(str, [*data, "--latents", tmp_path / "c.latents"])]


@pytest.mark.parametrize("name", ["train_sra", "train_mdt"])
def test_training_on_latents_resumes_bitwise_and_samples(folder, tmp_path, name):
    """One script encodes, resumes bitwise on another process's cache, and sample.py finds the VAE by itself."""
    options = [*flags(folder, tmp_path), "--steps", "6", "--batch-size", "6"]
    run_in_process(name, tmp_path / "a", *options)
    run_in_process(name, tmp_path / "b", *options, interrupt_at=2)
    run_in_process(name, tmp_path / "b", *options)
    a, b = checkpoint(tmp_path / "a", 6), checkpoint(tmp_path / "b", 6)
    for part in ("model", "ema", "method", "optimizer", "step", "log"):
        assert_same(a[part], b[part], part)
    assert log_lines(tmp_path / "a") == log_lines(tmp_path / "b")
    network = a["args"]["network"]
    assert (
        network["in_channels"] == 4 and network["input_size"] == 4 and network["num_classes"] == 3
    )
    assert Image.open(tmp_path / "a" / "samples" / "0000006.png").size == (3 * SIZE, 4 * SIZE)
    draw = ["--ckpt", tmp_path / "a", "--num", 5, "--steps", 2, "--batch-size", 3]
    sample.main(sample.parse_args([*map(str, [*draw, "--out", tmp_path / "images"])]))
    sample.main(sample.parse_args([*map(str, [*draw, "--latents", "--out", tmp_path / "stored"])]))
    with (
        np.load(tmp_path / "images" / "samples.npz") as images,
        np.load(tmp_path / "stored" / "samples.npz") as latents,
    ):
        assert images["arr_0"].shape == (5, SIZE, SIZE, 3) and latents["arr_0"].shape == (
            5,
            4,
            4,
            4,
        )
        protocol = json.loads(images["protocol"].item())
        decoded = models.to_uint8(
            load_vae(folder / "vae.bin")[0].decode(torch.from_numpy(latents["arr_0"]) / VAE_SCALE)
        ).numpy()
        assert np.abs(decoded.astype(int) - images["arr_0"]).max() <= 1
    assert protocol == json.loads((tmp_path / "images" / "protocol.json").read_text())
    assert protocol["vae"] == a["args"]["vae_hash"] == load_vae(folder / "vae.safetensors")[1]


def test_the_loop_trains_on_fresh_samples_and_latents_are_not_clipped(
    folder, tmp_path, monkeypatch
):
    """Two epochs of the whole set without flips: other latents of the same images. DDPM clips pixels while sampling, never latents."""
    seen, made = [], []

    class Records(train_sra.SRA):
        def forward(self, x0, y):
            seen.append(x0)
            return super().forward(x0, y)

    monkeypatch.setattr(train_sra, "SRA", Records)
    original = train_sra.make_diffusion
    monkeypatch.setattr(
        train_sra, "make_diffusion", lambda name, clip: (made.append(clip), original(name, clip))[1]
    )
    options = [
        *flags(folder, tmp_path),
        "--diffusion",
        "ddpm",
        "--batch-size",
        "30",
        "--no-flip",
        "--steps",
        "2",
    ]
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    train_sra.main(Records, train_sra.parse_args([*TINY, "--out", str(tmp_path / "a"), *options]))
    for s, handler in handlers.items():
        signal.signal(s, handler)
    first, second = (x0.sum((0, 2, 3)) for x0 in seen)
    assert x0_is_scaled(seen[0]) and not torch.allclose(first, second, rtol=1e-5, atol=1e-5)
    assert made == [False]
    args = sample.parse_args(["--ckpt", str(tmp_path / "a")])
    assert sample.load_network(args, tmp_path / "a" / "checkpoints" / "0000002.pt")[1].clip is False


def x0_is_scaled(x0):
    return (
        x0.shape == (30, 4, 4, 4) and x0.dtype == torch.float32 and x0.abs().max() < 20 * VAE_SCALE
    )


def test_which_vae_samples(folder, tmp_path, capfd):
    """The checkpoint's own by default, the same weights in another format, no other one; and none at all for pixels."""
    moved = tmp_path / "moved.bin"
    moved.write_bytes((folder / "vae.bin").read_bytes())
    options = flags(folder, tmp_path)
    options[options.index("--vae") + 1] = str(moved)
    run_in_process("train_sra", tmp_path / "a", *options, "--steps", "2", "--batch-size", "6")
    moved.unlink()
    draw = [
        "--ckpt",
        str(tmp_path / "a"),
        "--num",
        "2",
        "--steps",
        "2",
        "--out",
        str(tmp_path / "images"),
    ]

    def refused(words, *more):
        with pytest.raises(SystemExit) as stop:
            sample.main(sample.parse_args([*draw, *more]))
        error = capfd.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and words in error, error

    refused("moved.bin, the VAE that")
    refused("is another VAE than the one", "--vae", str(folder / "other.safetensors"))
    refused("no file", "--vae", str(folder / "nowhere.bin"))
    refused("leave out --png and --vae", "--latents", "--vae", str(folder / "vae.bin"))
    refused("cannot be read", "--vae", str(next((folder / "data").rglob("*.png"))))
    assert not (tmp_path / "images").exists()
    sample.main(sample.parse_args([*draw, "--vae", str(folder / "vae.safetensors")]))
    assert (tmp_path / "images" / "grid.png").exists()
    run_in_process("train_sra", tmp_path / "pixels", "--steps", "1")
    draw[1] = str(tmp_path / "pixels")
    refused("generates pixels", "--vae", str(folder / "vae.bin"))


def test_resuming_with_another_vae_is_refused(folder, tmp_path, capfd):
    options = ["--steps", "2", "--batch-size", "6"]
    run_in_process("train_sra", tmp_path / "a", *flags(folder, tmp_path), *options)
    other = flags(folder, tmp_path, "other.bin")
    for changes, words in (
        ([], "another VAE: use the flags it was made with"),
        (["--out", str(tmp_path / "b")], "holds latents of another data set or VAE: vae"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_in_process("train_sra", tmp_path / "a", *other, *changes, *options)
        assert stop.value.code == 2 and words in capfd.readouterr().err
    capfd.readouterr()
    run_in_process(
        "train_sra",
        tmp_path / "a",
        *flags(folder, tmp_path, "vae.safetensors"),
        "--steps",
        "3",
        "--batch-size",
        "6",
    )
    assert "resuming with" in capfd.readouterr().out  # the same weights, in another file


def test_unmasked_tuning_needs_the_same_vae(folder, tmp_path, capfd):
    run_in_process(
        "train_mdt", tmp_path / "a", *flags(folder, tmp_path), "--steps", "1", "--batch-size", "6"
    )
    start = [
        "--init-from",
        str(tmp_path / "a" / "checkpoints" / "0000001.pt"),
        "--steps",
        "1",
        "--batch-size",
        "6",
    ]
    run_in_process("train_mdt", tmp_path / "b", *flags(folder, tmp_path), *start)
    for more, words in (
        (flags(folder, tmp_path, "other.bin"), "it differs in VAE"),
        (["--latents", "x"], "--latents needs --vae"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_in_process("train_mdt", tmp_path / "c", *more, *start)
        assert stop.value.code == 2 and words in capfd.readouterr().err


def test_two_processes_killed_in_the_middle_of_encoding(folder, cache, tmp_path):
    """SIGKILL to all of them while the cache is being written; the same command finishes it, and trains."""
    many = tmp_path / "data"
    for k in range(600):
        (many / f"class{k % 3}").mkdir(parents=True, exist_ok=True)
        source = sorted((folder / "data" / f"class{k % 3}").iterdir())[k // 3 % 10]
        os.link(source, many / f"class{k % 3}" / f"{k:04d}.png")
    options = [
        "--data",
        many,
        "--image-size",
        SIZE,
        "--model",
        "DiT-Ti/2",
        "--vae",
        folder / "vae.bin",
        "--steps",
        2,
        "--batch-size",
        4,
    ]
    words = command(ROOT / "train_sra.py", *TINY, *options, "--out", tmp_path / "run", processes=2)
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    partial, done = Path(f"{many}.{SIZE}.latents.partial"), 0
    while process.poll() is None and done == 0:
        time.sleep(0.02)
        if partial.exists() and partial.stat().st_size > 2**20:
            done = int(np.memmap(partial, np.uint8, "r", 2**20, (600,)).sum())
    for line in subprocess.run(
        ["ps", "-ewwo", "pid,args"], capture_output=True, text=True
    ).stdout.splitlines():
        if str(tmp_path / "run") in line:
            os.kill(int(line.split()[0]), signal.SIGKILL)
    process.wait()
    assert 0 < done < 600 and partial.exists()
    run(ROOT / "train_sra.py", *TINY, *options, "--out", tmp_path / "run", processes=2)
    assert not partial.exists() and (tmp_path / "run" / "samples" / "0000002.png").exists()
    path = Path(f"{many}.{SIZE}.latents")
    both = LatentCache(path, json.loads(path.read_bytes()[: 2**20].rstrip(b"\0")))
    files = sorted(many.glob("*/*"))
    small = sorted((folder / "data").glob("*/*"))
    for i in (
        0,
        77,
        300,
        599,
    ):  # equal to the small cache's entry of the same picture, up to rounding
        k = int(files[i].stem)
        source = sorted((folder / "data" / f"class{k % 3}").iterdir())[k // 3 % 10]
        np.testing.assert_allclose(
            both.moments[i].astype(float), cache.moments[small.index(source)], rtol=1e-2, atol=1e-2
        )
        assert both.labels[i] == k % 3
