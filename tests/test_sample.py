"""sample.py from the command line: same images however they are made, resuming, official checkpoints, refusals."""

import json
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_models import tiny
from test_training import run, train

import sample
from models import VAE_SCALE, AutoencoderKL, load_vae, to_uint8

FLAGS = ["--num", "10", "--steps", "3", "--seed", "4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoints of short runs whose EMA generates something other than noise-free zeros."""
    runs = {}
    for name, flags in {
        "flow": [],
        "gvp": ["--diffusion", "gvp"],
        "ddpm": ["--diffusion", "ddpm"],
        "edm": ["--diffusion", "edm"],
    }.items():
        runs[name] = tmp_path_factory.mktemp(name)
        train(
            runs[name], "--steps", "3", *flags, *(["--align-weight", "0"] if name == "edm" else [])
        )
        path = runs[name] / "checkpoints" / "0000003.pt"
        saved = torch.load(path, weights_only=True)
        generator = torch.Generator().manual_seed(0)
        for value in saved["ema"].values():
            value += 0.05 * torch.randn(value.shape, generator=generator)
        torch.save(saved, path)
    return runs


def draw(*flags):
    sample.main(sample.parse_args([str(f) for f in flags]))


def images(folder):
    with np.load(folder / "samples.npz", allow_pickle=False) as arrays:
        return arrays["arr_0"], arrays["arr_1"]


def assert_same_images(a, b):
    """Labels exactly; pixels up to one grey level in a few: matrix products round differently by the batch they are in."""
    assert (
        (a[1] == b[1]).all() and a[0].shape == b[0].shape and a[0].dtype == b[0].dtype == np.uint8
    )
    difference = np.abs(a[0].astype(int) - b[0].astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


SAMPLERS = [
    ("flow", "heun"),
    ("flow", "sde"),
    ("gvp", "euler"),
    ("ddpm", "euler"),
    ("ddpm", "sde"),
    ("edm", "heun"),
    ("edm", "sde"),
]


@pytest.mark.parametrize("name,solver", SAMPLERS)
def test_images_do_not_depend_on_the_batch_size(trained, tmp_path, name, solver):
    for batch in (3, 7):
        flags = [
            "--ckpt",
            trained[name],
            *FLAGS,
            "--solver",
            solver,
            "--batch-size",
            batch,
            "--guidance",
            1.5,
        ]
        draw(*flags, "--out", tmp_path / str(batch))
    a, b = images(tmp_path / "3"), images(tmp_path / "7")
    assert a[0].shape == (10, 16, 16, 3)
    assert_same_images(a, b)
    assert (
        a[0].std() > 5 and len(np.unique(a[0].reshape(10, -1), axis=0)) == 10
    )  # ten different images


def test_images_do_not_depend_on_the_number_of_processes(trained, tmp_path):
    flags = [
        "--ckpt",
        trained["flow"],
        "--num-samples",
        10,
        "--steps",
        3,
        "--seed",
        4,
        "--batch-size",
        3,
    ]
    for processes in (1, 2):
        run(ROOT / "sample.py", *flags, "--out", tmp_path / str(processes), processes=processes)
    assert_same_images(images(tmp_path / "1"), images(tmp_path / "2"))


def test_files_and_protocol(trained, tmp_path):
    guidance = ["--guidance", 2, "--guidance-interval", 0, 0.7]
    draw(
        "--ckpt",
        trained["flow"],
        *FLAGS,
        "--batch-size",
        4,
        "--png",
        "--labels",
        "balanced",
        *guidance,
        "--out",
        tmp_path,
    )
    pixels, labels = images(tmp_path)
    assert labels.tolist() == list(range(10))
    assert zipfile.ZipFile(tmp_path / "samples.npz").namelist() == [
        "arr_0.npy",
        "arr_1.npy",
        "protocol.npy",
    ]
    assert Image.open(tmp_path / "grid.png").size == (8 * 16, 16)
    assert len(list((tmp_path / "png").iterdir())) == 10
    assert np.array_equal(np.asarray(Image.open(tmp_path / "png" / "000007.png")), pixels[7])
    assert not (tmp_path / "parts").exists()
    protocol = json.loads((tmp_path / "protocol.json").read_text())
    assert (
        protocol["checkpoint"]["step"] == 3 and protocol["checkpoint"]["script"] == "train_sra.py"
    )
    assert (
        protocol["guidance"] == {"scale": 2.0, "interval": [0.0, 0.7], "channels": 3}
        and protocol["seed"] == 4
    )


def test_an_interrupted_run_goes_on_even_with_another_batch_size(trained, tmp_path):
    draw("--ckpt", trained["flow"], *FLAGS, "--batch-size", 10, "--out", tmp_path / "whole")

    calls = []

    def interrupted(*args, **kwargs):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample_ode(*args, **kwargs)

    sample_ode, sample.sample_ode = sample.sample_ode, interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            draw("--ckpt", trained["flow"], *FLAGS, "--batch-size", 2, "--out", tmp_path / "torn")
        assert sorted(p.name for p in (tmp_path / "torn" / "parts").iterdir()) == [
            "0-2.npz",
            "2-4.npz",
        ]
        join_parts, sample.join_parts = (
            sample.join_parts,
            None,
        )  # interrupted again, between the last image and the last file
        with pytest.raises(TypeError):
            draw("--ckpt", trained["flow"], *FLAGS, "--batch-size", 5, "--out", tmp_path / "torn")
        sample.join_parts = join_parts
        assert len(calls) == 5  # images 4 to 9 in batches of 5: two more calls
        draw("--ckpt", trained["flow"], *FLAGS, "--batch-size", 5, "--out", tmp_path / "torn")
        assert len(calls) == 5  # finished: nothing is made again
    finally:
        sample.sample_ode = sample_ode
    assert_same_images(images(tmp_path / "whole"), images(tmp_path / "torn"))


def test_classes_seed_and_weights_matter(trained, tmp_path):
    base = ["--ckpt", trained["flow"], *FLAGS]
    draw(*base, "--out", tmp_path / "a")
    draw(*base, "--classes", 3, 5, "--out", tmp_path / "b")
    assert set(images(tmp_path / "b")[1]) <= {3, 5}
    draw("--ckpt", trained["flow"], "--num", 10, "--steps", 3, "--seed", 5, "--out", tmp_path / "c")
    draw(*base, "--weights", "model", "--out", tmp_path / "d")
    first = images(tmp_path / "a")[0]
    assert all((images(tmp_path / name)[0] != first).mean() > 0.5 for name in "cd")


def test_official_checkpoint(tmp_path):
    """A DiT-Ti/2 in the official layout, on three channels, samples as the network itself does."""
    from diffusion import Flow, ImageNoise, sample_ode
    from models import to_uint8

    model = tiny(hidden_size=128, depth=6, num_heads=4)
    torch.save({"ema": model.state_dict()}, tmp_path / "repa.pt")
    draw(
        "--ckpt",
        tmp_path / "repa.pt",
        "--official",
        "repa",
        "--model",
        "SiT-Ti/2",
        "--num",
        3,
        "--steps",
        4,
        "--out",
        tmp_path / "out",
    )
    noise = ImageNoise(0, range(3), (3, 8, 8))
    x, y = noise(), noise.choice(range(10))
    assert_same_images(
        images(tmp_path / "out"), (to_uint8(sample_ode(model, Flow(), x, y, 4)).numpy(), y.numpy())
    )


def test_official_latents_need_a_vae_or_are_stored(tmp_path, capfd):
    model = tiny(hidden_size=128, depth=6, num_heads=4, in_channels=4, learn_sigma=True)
    torch.save(model.state_dict(), tmp_path / "dit.pt")
    flags = [
        "--ckpt",
        tmp_path / "dit.pt",
        "--official",
        "dit",
        "--model",
        "DiT-Ti/2",
        "--num",
        2,
        "--steps",
        3,
        "--solver",
        "sde",
    ]
    flags += ["--guidance", 1.5, "--guidance-channels", 3, "--out"]
    assert "give --vae" in one_line(capfd, *flags, tmp_path / "out")
    draw(*flags, tmp_path / "out", "--latents")
    latents, _ = images(tmp_path / "out")
    assert (
        latents.shape == (2, 4, 8, 8) and latents.dtype == np.float32 and np.isfinite(latents).all()
    )
    torch.manual_seed(0)
    torch.save(
        AutoencoderKL(channels=(32, 32, 32, 32), layers=1).state_dict(), tmp_path / "vae.bin"
    )
    draw(*flags, tmp_path / "decoded", "--vae", tmp_path / "vae.bin")
    decoded = to_uint8(
        load_vae(tmp_path / "vae.bin")[0].decode(torch.from_numpy(latents) / VAE_SCALE)
    ).numpy()
    assert np.abs(decoded.astype(int) - images(tmp_path / "decoded")[0]).max() <= 1
    assert "holds samples of another run" in one_line(
        capfd, *flags, tmp_path / "decoded", "--latents"
    )


def one_line(capfd, *flags):
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        draw(*flags)
    err = capfd.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("sample.py: error: "), (
        err
    )
    return err


def test_refusals(trained, tmp_path, capfd):
    good = ["--ckpt", trained["flow"], "--out", tmp_path / "out"]
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    ours = trained["flow"] / "checkpoints" / "0000003.pt"
    (tmp_path / "empty").mkdir()
    cases = [
        ([*good, "--guidance", "0.9"], "guidance 0.9 is below 1"),
        (
            [*good, "--guidance", "2", "--guidance-interval", "0.7", "0.1"],
            "interval 0.7 .. 0.1 is empty",
        ),
        ([*good, "--guidance", "2", "--guidance-channels", "4"], "the model generates 3 channels"),
        ([*good, "--guidance", "2", "--guidance-channels", "-1"], "must be at least 1"),
        ([*good, "--png", "--latents"], "leave out --png"),
        ([*good, "--guidance", "inf"], "must be finite"),
        ([*good, "--churn", "-1", "0", "inf", "1"], "all four must be 0 or more"),
        ([*good, "--seed", "99999999999999999999999"], "out of range"),
        (["--ckpt", ours, "--official", "sit", "--model", "SiT-Ti/8"], "not of official code"),
        ([*good, "--num", "0"], "--num 0: must be at least 1"),
        ([*good, "--classes", "3", "10"], "classes 0 to 9"),
        ([*good, "--solver", "rk45"], "invalid choice: 'rk45'"),
        ([*good, "--model", "DiT-B/2"], "for official checkpoints"),
        (["--ckpt", tmp_path / "none.pt"], "no such file or folder"),
        (["--ckpt", tmp_path / "empty"], "no checkpoints/*.pt"),
        (["--ckpt", tmp_path / "text.pt"], "cannot be read"),
        (["--ckpt", tmp_path / "other.pt"], "is not a checkpoint of the training scripts"),
        (["--ckpt", tmp_path / "other.pt", "--official", "dit"], "--official needs --model"),
        (
            ["--ckpt", tmp_path / "other.pt", "--official", "dit", "--model", "DiT-B/2"],
            "not a DiT or SiT checkpoint",
        ),
        (["--ckpt", trained["ddpm"], "--steps", "1001"], "DDPM has 1 to 1000"),
        (["--guidance", "2"], "the following arguments are required: --ckpt"),
    ]
    for flags, words in cases:
        assert words in one_line(capfd, *flags), flags
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    assert "file" in one_line(capfd, "--ckpt", trained["flow"], "--out", tmp_path / "file")
    draw(*good, "--num", 2, "--steps", 2)
    draw(*good, "--num", 2, "--steps", 2, "--png")  # finished, but not its pictures
    assert len(list((tmp_path / "out" / "png").iterdir())) == 2
    assert "holds samples of another run" in one_line(capfd, *good, "--num", 2, "--steps", 3)


def test_samples_of_a_retrained_network_are_not_taken_for_the_old_ones(tmp_path, capfd):
    train(tmp_path / "run", "--steps", "2")
    flags = ["--ckpt", tmp_path / "run", "--num", 2, "--steps", 2, "--out", tmp_path / "out"]
    draw(*flags)
    capfd.readouterr()
    draw(*flags)
    assert "made before" in capfd.readouterr().out
    (tmp_path / "run" / "checkpoints" / "0000002.pt").unlink()
    train(tmp_path / "run", "--steps", "2", "--seed", "1")
    assert "holds samples of another run" in one_line(capfd, *flags)


def test_guidance_below_one_from_the_real_command_line(trained, tmp_path):
    result = run(
        ROOT / "sample.py",
        "--ckpt",
        trained["flow"],
        "--guidance",
        "0.5",
        "--out",
        tmp_path / "out",
        code=2,
    )
    assert result.stderr.count("\n") == 1 and "below 1" in result.stderr
