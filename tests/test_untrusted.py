"""Files from others: no code in them runs, none of them fills the memory, and no name in them leads out of the folder they are for."""

import contextlib
import json
import os
import pickle
import resource
import shutil
import struct
import zipfile

import numpy as np
import pytest
import torch
from test_bad_input import TRAIN, Means, call, files, outcome, png_header
from test_models import tiny
from test_training import make_folder

from models import AutoencoderKL

MIB = 2**20


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@contextlib.contextmanager
def little_memory(more=384 * MIB):
    """This process may take that much more address space."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + more, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A run of SRA, a stage 1, a MaskDiT, a VAE, latents, images, statistics, an official checkpoint."""
    here = tmp_path_factory.mktemp("good")
    make_folder(here / "data", size=16)
    for name in ("sra", "selftranscendence", "mdt"):
        call(f"train_{name}", ["--out", str(here / name)])
    torch.manual_seed(0)
    torch.save(AutoencoderKL(channels=(32, 32, 32, 32), layers=1).state_dict(), here / "vae.bin")
    call("train_sra", [*latents(here), "--out", str(here / "latent")])
    np.savez(here / "images.npz", np.zeros((8, 8, 8, 3), np.uint8))
    np.savez(here / "stats.npz", mu=np.zeros(12), sigma=np.eye(12))
    torch.jit.script(Means()).save(here / "features.pt")
    torch.save(tiny(hidden_size=128, depth=6, num_heads=4).state_dict(), here / "official.pt")
    return here


def latents(here, cache="cache.latents"):
    return [
        "--data",
        str(here / "data"),
        "--vae",
        str(here / "vae.bin"),
        "--model",
        "DiT-Ti/2",
        "--latents",
        str(here / cache),
    ]


def newest(run):
    return run / "checkpoints" / "0000002.pt"


def refused(capfd, script, argv, *words, code=2):
    """One line, after those that name a skipped checkpoint."""
    got, lines = outcome(capfd, script, argv)
    assert got == code and lines and all(".pt " in line for line in lines[:-1]), lines
    assert lines[-1].startswith(f"{script}.py: error: ") and len(lines[-1]) < 1500, lines
    assert all(word in lines[-1] for word in words), lines
    return lines


# Code


PLACES = {  # where the file goes ({f}: the file), by script and flags
    "sample.py --ckpt FILE": ("sample", "--ckpt {f}", "cannot be read"),
    "sample.py --ckpt FOLDER": ("sample", "--ckpt {r}", "no checkpoint in"),
    "sample.py --official": (
        "sample",
        "--ckpt {f} --official dit --model DiT-Ti/2",
        "cannot be read",
    ),
    "sample.py --vae": ("sample", "--ckpt {g}/latent --vae {f}", "cannot be read"),
    "train_mdt.py --init-from": ("train_mdt", "--init-from {f}", "cannot be read"),
    "--teacher FILE": ("train_selftranscendence", "--stage 2 --teacher {f}", "cannot be read"),
    "--teacher FOLDER": ("train_selftranscendence", "--stage 2 --teacher {r}", "no checkpoint in"),
    "--vae": ("train_sra", "--data {g}/data --vae {f}", "cannot be read"),
    "--latents": (
        "train_diversedit",
        "--data {g}/data --vae {g}/vae.bin --model DiT-Ti/2 --latents {f}",
        "is not a file of latents",
    ),
    "--data": ("train_discriminative", "--data {i}", "cannot read image"),
    "fid.py --inception": (
        "fid",
        "{g}/images.npz {g}/images.npz --inception {f}",
        "cannot load Inception weights",
    ),
    "fid.py --self-test": ("fid", "--self-test {f}", "cannot load Inception weights"),
    "fid.py --features": (
        "fid",
        "{g}/images.npz {g}/images.npz --features {f}",
        "is not a TorchScript module",
    ),
    "fid.py SAMPLES": ("fid", "{n} {g}/images.npz --features {g}/features.pt", ".npz"),
    "fid.py REFERENCE": ("fid", "{g}/images.npz {n} --features {g}/features.pt", ".npz"),
    "fid.py FOLDER": ("fid", "{i} {g}/images.npz --features {g}/features.pt", "cannot read image"),
} | {f"resuming {name}": (f"train_{name}", "--out {r}", "no checkpoint in") for name in TRAIN}


def hostile(path, kind, marker):
    """A file of that kind which has code in it: torch's zip archive, its older format, a pickle, an object array of numpy."""
    state = {
        "model": {"weight": torch.zeros(2)},
        "ema": Hostile(marker),
        "quant_conv.bias": Hostile(marker),
    }
    if kind == "pickle":
        path.write_bytes(pickle.dumps(state))
    elif kind == "numpy":
        with open(path, "wb") as file:
            np.savez(
                file,
                arr_0=np.array([Hostile(marker)]),
                mu=np.array([Hostile(marker)]),
                sigma=np.array([Hostile(marker)]),
            )
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "archive")


@pytest.mark.parametrize("kind", ["archive", "older", "pickle", "numpy"])
@pytest.mark.parametrize("place", PLACES)
def test_code_in_a_file_does_not_run(good, tmp_path, capfd, place, kind):
    script, line, words = PLACES[place]
    marker, file, run = tmp_path / "ran", tmp_path / "file.safetensors", tmp_path / "run"
    hostile(file, kind, marker)
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(file, newest(run))
    shutil.copy(file, tmp_path / "file.npz")
    shutil.copytree(good / "data", tmp_path / "data")
    shutil.copy(file, tmp_path / "data" / "ant" / "0.png")
    before = files(tmp_path)
    argv = line.format(g=good, f=file, r=run, n=tmp_path / "file.npz", i=tmp_path / "data").split()
    lines = refused(
        capfd,
        script,
        [*argv, *(["--out", tmp_path / "out"] if script != "fid" and "--out" not in argv else [])],
        words,
    )
    assert len(lines) == 1 + (words == "no checkpoint in")
    assert not marker.exists() and files(tmp_path) == before


@pytest.mark.parametrize("kind", ["archive", "older", "pickle", "numpy"])
def test_the_trap_works(tmp_path, kind):
    hostile(tmp_path / "file", kind, tmp_path / "ran")
    if kind == "numpy":
        np.load(tmp_path / "file", allow_pickle=True)["mu"]
    else:
        with pytest.raises(FileExistsError):  # of the second one in the file
            pickle.loads((tmp_path / "file").read_bytes()) if kind == "pickle" else torch.load(
                tmp_path / "file", weights_only=False
            )
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize("entry", ["features", "num", "size", "mu_s"])
def test_code_in_other_entries_of_statistics(good, tmp_path, capfd, entry):
    arrays = {
        "mu": np.zeros(12),
        "sigma": np.eye(12),
        "mu_s": np.zeros(4),
        "sigma_s": np.eye(4),
        entry: np.array([Hostile(tmp_path / "ran")]),
    }
    np.savez(tmp_path / "stats.npz", **arrays)
    argv = [good / "images.npz", tmp_path / "stats.npz", "--features", good / "features.pt"]
    assert len(refused(capfd, "fid", argv, f"cannot read {tmp_path / 'stats.npz'}")) == 1
    assert not (tmp_path / "ran").exists()


def test_code_in_the_parts_of_an_interrupted_sampling(good, tmp_path, capfd):
    argv = ["--ckpt", good / "sra", "--num", "2", "--steps", "1", "--out", tmp_path / "out"]
    call("sample", [str(word) for word in argv])
    (tmp_path / "out" / "samples.npz").unlink()
    (tmp_path / "out" / "parts").mkdir()
    part = tmp_path / "out" / "parts" / "0-2.npz"
    for arrays in (
        {"labels": np.array([Hostile(tmp_path / "ran")] * 2)},
        {"images": np.zeros(2)},
        {"labels": np.zeros(3)},
    ):
        np.savez(part, **arrays)
        assert len(refused(capfd, "sample", argv, f"{part} is damaged: delete it")) == 1
    part.write_bytes(part.read_bytes()[:100])
    refused(capfd, "sample", argv, f"{part} is damaged: delete it")
    assert not (tmp_path / "ran").exists()
    part.unlink()
    call("sample", [str(word) for word in argv])
    whole = (tmp_path / "out" / "samples.npz").read_bytes()
    (tmp_path / "out" / "samples.npz").write_bytes(whole[:100])
    refused(capfd, "sample", [*argv, "--png"], "samples.npz is damaged: delete it")


# Memory


def write_zeros(path, name, head=b"", size=1024 * MIB, **others):
    """A zip archive, an entry of which inflates to `head` and zeros."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for other, content in others.items():
            archive.writestr(other, content)
        with archive.open(name, "w", force_zip64=True) as entry:
            entry.write(head)
            for _ in range(size // (16 * MIB)):
                entry.write(bytes(16 * MIB))
    return path


def npy_header(shape, descr="<f8"):
    text = (
        f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}".encode().ljust(117)
        + b"\n"
    )
    return np.lib.format.magic(1, 0) + struct.pack("<H", len(text)) + text


@pytest.fixture(scope="module")
def inflating(tmp_path_factory):
    """A checkpoint whose pickle inflates to a GiB."""
    return write_zeros(
        tmp_path_factory.mktemp("inflating") / "file.pt", "archive/data.pkl", b"\x80\x02"
    )


@pytest.mark.parametrize(
    "place",
    [
        p
        for p, (_, line, _) in PLACES.items()
        if "{f}" in line and p not in ("--latents", "fid.py --features")
    ],
)
def test_archives_that_inflate(good, inflating, tmp_path, capfd, place):
    script, line, words = PLACES[place]
    (tmp_path / "checkpoints").mkdir()
    os.link(inflating, newest(tmp_path))
    argv = line.format(g=good, f=inflating, r=tmp_path).split()
    argv += ["--out", tmp_path / "out"] if script != "fid" and "--out" not in argv else []
    with little_memory():
        refused(capfd, script, argv, words)


@pytest.mark.parametrize(
    "name, head, size, words",
    [
        ("mu.npy", npy_header("(134217728,)"), 1024, "mu.npy claims 1073741952 bytes"),
        ("mu.npy", npy_header("(1000000000000,)"), 16, "cannot read"),
        ("mu.npy", npy_header("(-1,)"), 16, "cannot read"),
        ("mu.npy", npy_header("(2097152,)"), 16, "does not hold finite mu"),
        (
            "arr_0.npy",
            npy_header("(1, 16384, 16384, 3)", "|u1"),
            768,
            "has 16384 x 16384 pixels: scale images to at most",
        ),
        ("arr_0.npy", npy_header("(1, 99999999, 99999999, 3)", "|u1"), 16, "pixels"),
        ("arr_0.npy", npy_header("(99999999999, 8, 8, 3)", "|u1"), 16, "holds 16777216 bytes"),
        ("arr_0.npy", npy_header("(-1, 8, 8, 3)", "|u1"), 16, "C-ordered uint8"),
    ],
)
def test_arrays_that_inflate_or_claim_to(good, tmp_path, capfd, name, head, size, words):
    write_zeros(
        tmp_path / "big.npz",
        name,
        head,
        size * MIB,
        **{"sigma.npy": npy_header("(1, 1)") + bytes(8)},
    )
    with little_memory():
        assert (
            len(
                refused(
                    capfd,
                    "fid",
                    [tmp_path / "big.npz", good / "images.npz", "--features", good / "features.pt"],
                    words,
                )
            )
            == 1
        )


@pytest.mark.parametrize("side", [12000, 60000, 2**31 - 1])
def test_images_that_claim_to_be_huge(good, tmp_path, capfd, side):
    shutil.copytree(good / "data", tmp_path / "data")
    (tmp_path / "data" / "ant" / "0.png").write_bytes(png_header(side, side))
    with little_memory():
        assert (
            len(
                refused(
                    capfd,
                    "fid",
                    [tmp_path / "data", good / "images.npz", "--features", good / "features.pt"],
                    "ant/0.png",
                )
            )
            == 1
        )
        if side > 13377:  # Pillow's limit; below it, it warns
            argv = ["--data", tmp_path / "data", "--out", tmp_path / "out"]
            assert (
                len(
                    refused(
                        capfd,
                        "train_sra",
                        argv,
                        f"cannot read image {tmp_path / 'data' / 'ant' / '0.png'}",
                    )
                )
                == 1
            )


def test_safetensors_that_claim_to_be_huge(good, tmp_path, capfd):
    header = json.dumps(
        {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    ).encode()
    for length, content in (
        (2**62, b"{}"),
        (2**64 - 1, b"{}"),
        (len(header), header),
        (100_000, b"[" * 100_000),
    ):
        (tmp_path / "vae.safetensors").write_bytes(struct.pack("<Q", length) + content)
        with little_memory():
            for script, argv in (
                ("train_sra", ["--data", good / "data"]),
                ("sample", ["--ckpt", good / "latent"]),
            ):
                argv += ["--vae", tmp_path / "vae.safetensors", "--out", tmp_path / "out"]
                assert (
                    len(
                        refused(
                            capfd, script, argv, "vae.safetensors cannot be read as safetensors"
                        )
                    )
                    == 1
                )
    assert not (tmp_path / "out").exists()


HEADERS = {  # of latents: changed entries
    "more images": {"count": 10**18},
    "fewer than none": {"count": -(10**18)},
    "a fraction": {"count": 8.5},
    "a list": {"count": [8] * 10000},
    "shape": {"moments": [8, 2**40, 2**40]},
    "negative shape": {"moments": [-8, 2, -2]},
    "classes": {"classes": ["x" * 1000] * 1000},
    "path": {"names": "../../../etc/passwd\n" * 1000},
}


@pytest.mark.parametrize("case", HEADERS)
@pytest.mark.parametrize("suffix", ["", ".partial"])
def test_headers_of_latents(good, tmp_path, capfd, case, suffix):
    content = (good / "cache.latents").read_bytes()
    header = json.loads(content[:MIB].rstrip(b"\0"))
    path = tmp_path / f"c.latents{suffix}"
    path.write_bytes(json.dumps(header | HEADERS[case]).encode().ljust(MIB, b"\0") + content[MIB:])
    before = files(tmp_path)
    argv = [*latents(good), "--latents", tmp_path / "c.latents", "--out", tmp_path / "out"]
    with little_memory():
        assert (
            len(
                refused(
                    capfd,
                    "train_sra",
                    argv,
                    f"{path} holds latents of another data set or VAE: ",
                    "move it away",
                )
            )
            == 1
        )
    assert files(tmp_path) == before


def test_labels_of_latents_outside_the_classes(good, tmp_path, capfd):
    content = bytearray((good / "cache.latents").read_bytes())
    for label in (2, -1, 2**31 - 1):
        struct.pack_into("<i", content, MIB + 4096, label)
        (tmp_path / "c.latents").write_bytes(content)
        argv = [*latents(good), "--latents", tmp_path / "c.latents", "--out", tmp_path / "out"]
        assert (
            len(
                refused(
                    capfd,
                    "train_sra",
                    argv,
                    "c.latents has labels outside its 2 classes: move it away to encode anew",
                )
            )
            == 1
        )


NETWORKS = {  # what a checkpoint says of its network
    "deep": {"depth": 10**12},
    "wide": {"hidden_size": 2**20},
    "no width": {"hidden_size": 0},
    "classes": {"num_classes": 10**15},
    "fewer than no classes": {"num_classes": -5},
    "image": {"input_size": 2**40},
    "patches": {"patch_size": 0},
    "decoder": {"decoder": [10**12, 512, 16]},
    "words": {"depth": "six"},
    "unknown": {"surprise": 1},
    "residuals": {"long_residual": "sideways"},
}


@pytest.mark.parametrize("case", NETWORKS)
def test_checkpoints_that_describe_another_network(good, tmp_path, capfd, case):
    saved = torch.load(newest(good / "sra"), weights_only=True)
    saved["args"]["network"] |= NETWORKS[case]
    (tmp_path / "checkpoints").mkdir()
    torch.save(saved, newest(tmp_path))
    with little_memory():
        words = f"{newest(tmp_path)} "
        assert (
            len(
                refused(
                    capfd, "sample", ["--ckpt", newest(tmp_path), "--out", tmp_path / "out"], words
                )
            )
            == 1
        )
        refused(capfd, "train_sra", ["--out", tmp_path], "no checkpoint in")
        refused(
            capfd,
            "train_selftranscendence",
            ["--stage", "2", "--teacher", newest(tmp_path), "--out", tmp_path / "out"],
            words,
        )


DAMAGES = {
    "args is text": lambda c: c.update(args="hello"),
    "no script": lambda c: c["args"].pop("script"),
    "no network": lambda c: c["args"].pop("network"),
    "step is text": lambda c: c.update(step="2"),
    "model is a list": lambda c: c.update(model=[1]),
    "weights are numbers": lambda c: c["model"].update({"pos_embed": 3}),
    "names are numbers": lambda c: c["ema"].update({3: torch.zeros(1)}),
    "another shape": lambda c: c["ema"].update({"pos_embed": torch.zeros(3)}),
    "optimizer is text": lambda c: c.update(optimizer="AdamW"),
    "head of numbers": lambda c: c["method"].update({"head.0.weight": 3}),
    "missing weights": lambda c: c["model"].pop("pos_embed"),
    "expanded weights": lambda c: [
        c[p].update({k: torch.zeros(1).expand(v.shape) for k, v in c[p].items()})
        for p in ("model", "ema")
    ],
}


@pytest.mark.parametrize("case", DAMAGES)
def test_checkpoints_of_other_contents(good, tmp_path, capfd, case):
    saved = torch.load(newest(good / "sra"), weights_only=True)
    DAMAGES[case](saved)
    if case == "expanded weights":  # their optimizer would hold enough bytes
        saved["optimizer"]["state"] = {}
    (tmp_path / "checkpoints").mkdir()
    torch.save(saved, newest(tmp_path))
    assert (
        len(
            refused(
                capfd,
                "sample",
                ["--ckpt", newest(tmp_path), "--out", tmp_path / "out"],
                f"{newest(tmp_path)} ",
            )
        )
        == 1
    )
    refused(
        capfd,
        "train_sra",
        ["--out", tmp_path],
        "error: " if case == "no script" else "no checkpoint in",
    )


OFFICIAL = {  # changed tensors of a file of official code
    "wide": {"x_embedder.proj.weight": torch.zeros(1).expand(2**20, 3, 2, 2)},
    "wide in fact": {"x_embedder.proj.weight": torch.zeros(2**20, 3, 2, 2)},
    "classes": {"y_embedder.embedding_table.weight": torch.zeros(1).expand(2**40, 128)},
    "positions": {"pos_embed": torch.zeros(1).expand(1, 2**40, 128)},
    "empty": {"x_embedder.proj.weight": torch.zeros(128, 3, 0, 0)},
    "time": {"t_embedder.mlp.0.weight": torch.zeros(128, 128)},
    "bias": {"final_layer.linear.bias": torch.zeros(24)},
    "flat": {"y_embedder.embedding_table.weight": torch.zeros(11)},
    "number as a name": {3: torch.zeros(1)},
    "name of two lines": {"blocks.0\nblocks.1": torch.zeros(1)},
}


@pytest.mark.parametrize("case", OFFICIAL)
def test_official_checkpoints_of_other_shapes(good, tmp_path, capfd, case):
    torch.save(
        {**torch.load(good / "official.pt", weights_only=True), **OFFICIAL[case]},
        tmp_path / "official.pt",
    )
    argv = [
        "--ckpt",
        tmp_path / "official.pt",
        "--official",
        "sit",
        "--model",
        "SiT-Ti/2",
        "--out",
        tmp_path / "out",
    ]
    with little_memory():
        assert len(refused(capfd, "sample", argv, str(tmp_path / "official.pt"))) == 1


# Names


NAMES = ("../evil", "../../evil", "/evil", "..\\evil", "evil\n../evil")


def test_names_in_archives_lead_nowhere(good, tmp_path, capfd):
    """Entries of archives are read by name, and never written under it."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    arrays, checkpoint = tmp_path / "a" / "b" / "x.npz", tmp_path / "a" / "b" / "x.pt"
    shutil.copy(good / "images.npz", arrays)
    shutil.copy(newest(good / "sra"), checkpoint)
    for path in (arrays, checkpoint):
        with zipfile.ZipFile(path, "a") as archive:
            for name in NAMES:
                archive.writestr(name + ".npy", b"evil")
    before = files(tmp_path)
    call(
        "fid",
        [
            str(arrays),
            str(good / "images.npz"),
            "--features",
            str(good / "features.pt"),
            "--metrics",
            "fid",
        ],
    )
    assert files(tmp_path) == before
    argv = [
        "--ckpt",
        str(checkpoint),
        "--num",
        "2",
        "--steps",
        "1",
        "--out",
        str(tmp_path / "a" / "b" / "out"),
    ]
    code, _ = outcome(capfd, "sample", argv)
    made = {os.fsdecode(path) for path in files(tmp_path).keys() - before.keys()}
    wanted = (
        set()
        if code
        else {f"{argv[-1]}/{name}" for name in ("samples.npz", "grid.png", "protocol.json")}
    )
    assert made == wanted and not os.path.exists("/evil.npy")


def test_names_of_class_folders_lead_nowhere(good, tmp_path, capfd):
    """Odd names are classes like others: of a run, of its samples, of latents. Links inside are not followed to folders elsewhere."""
    names = ["..evil", "-x", "a b", "{o}", "new\nline", "%s", "$HOME", "\x1b[31m"]
    folder = tmp_path / "data"
    make_folder(folder, names, each=1, size=16)
    make_folder(tmp_path / "elsewhere", ["c"], each=3, size=16)
    (folder / "a b" / "out").symlink_to(tmp_path / "elsewhere")
    (folder / "a b" / "up").symlink_to("..")
    before, flags = files(tmp_path), ["--data", folder, "--out", tmp_path / "out"]
    assert outcome(capfd, "train_sra", flags) == (0, [])
    assert (
        outcome(
            capfd,
            "train_sra",
            [*latents(good), *flags[:2], "--latents", tmp_path / "l", "--out", tmp_path / "out2"],
        )[0]
        == 0
    )
    assert outcome(
        capfd,
        "sample",
        ["--ckpt", tmp_path / "out", "--num", 2, "--steps", 1, "--png", "--out", tmp_path / "s"],
    ) == (0, [])
    protocol = json.loads((tmp_path / "s" / "protocol.json").read_text())
    assert protocol["checkpoint"]["class_names"] == sorted(names)
    made = {
        os.fsdecode(os.path.relpath(path, os.fsencode(tmp_path)))
        for path in files(tmp_path).keys() - before.keys()
    }
    assert {name.split("/")[0] for name in made} == {"out", "out2", "l", "s"}
    assert json.loads((tmp_path / "l").read_bytes()[:MIB].rstrip(b"\0"))["count"] == len(
        names
    )  # and not 3 more
