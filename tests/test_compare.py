"""tests/compare.py: what it runs, and one small comparison from archives to figure, stopped and continued."""

import importlib
import json
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import compare
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageDraw

from train_sra import SHAPES, draw_shape


class Features(torch.nn.Module):
    def forward(self, x):
        return torch.cat([x.float().mean((2, 3)), x.float().std((2, 3))], 1) / 64


@pytest.fixture
def command(tmp_path):
    """The words of a comparison of 20 steps on shapes, in archives as those of CIFAR-10."""
    for split, count in (("train", 3), ("test", 4)):
        with zipfile.ZipFile(tmp_path / f"{split}.zip", "w") as archive:
            for label, name in enumerate(SHAPES):
                for k in range(count):
                    draw_shape(label + 10 * k, 16).save(tmp_path / "image.png")
                    archive.write(tmp_path / "image.png", f"{split}/{name}/{k}.png")
    torch.jit.script(Features()).save(tmp_path / "features.pt")
    files = [
        "--train",
        tmp_path / "train.zip",
        "--test",
        tmp_path / "test.zip",
        "--features",
        tmp_path / "features.pt",
    ]
    size = [
        "--model",
        "DiT-Ti/8",
        "--image-size",
        16,
        "--per-class",
        2,
        "--steps",
        20,
        "--batch-size",
        4,
        "--warmup",
        2,
        "--num",
        12,
    ]
    words = [
        sys.executable,
        ROOT / "tests" / "compare.py",
        *files,
        *size,
        "--solver-steps",
        2,
        "--threads",
        1,
        "--out",
        tmp_path / "out",
    ]
    return list(map(str, words))


def plan(*flags):
    arguments = compare.parse_args(["--report", "--steps", "4000", *flags])
    return arguments, compare.chosen(arguments, 0)


@pytest.mark.parametrize("name", ["train/../image.png", "image.png", "/image.png"])
def test_an_archive_names_no_other_places(name, command, tmp_path):
    with zipfile.ZipFile(tmp_path / "train.zip", "a") as archive:
        archive.writestr(name, (tmp_path / "image.png").read_bytes())
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (
        done.returncode
        and f"{name} is not SPLIT/CLASS/NAME" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not list(tmp_path.glob("out/*.png"))


def test_missing_files_are_one_line(command, tmp_path):
    for name in ("train.zip", "features.pt"):
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (
            done.returncode == 2
            and name in done.stderr
            and "no such" in done.stderr
            and not (tmp_path / "out").exists()
        )
        (tmp_path / name).write_bytes(kept)


def test_the_runs_differ_in_their_method_alone():
    arguments, runs = plan("--ablations")
    parsed = {}
    for name, run in runs.items():
        words = compare.words(arguments, name, run, 0, run.steps[-1])
        parsed[name] = vars(importlib.import_module(Path(words[0]).stem).parse_args(words[1:]))
    scaffold = set.intersection(*(set(settings) for settings in parsed.values())) - {
        "out",
        "align_weight",
    }
    differing = {
        name: {k for k in scaffold if settings[k] != parsed["vanilla"][k]}
        for name, settings in parsed.items()
    }
    edm = {name for name, run in runs.items() if run.noise == "EDM"}
    assert differing.pop("maskdit_tuned") == {
        "diffusion",
        "steps",
        "lr",
        "warmup",
        "save_every",
        "ema_warmup",
        "ema_decay",
    }
    assert all(
        keys == ({"diffusion"} if name in edm else set()) for name, keys in differing.items()
    )
    assert all(parsed[name]["diffusion"] == ("edm" if name in edm else "flow") for name in parsed)
    assert parsed["maskdit_tuned"]["ema_decay"] == 3801 / 3810 and parsed["vanilla"]["ema_warmup"]
    assert len(runs) == 16
    assert runs["stage1"].steps == (2000, 4000) and runs["selftranscendence"].after == (
        "stage1",
        2000,
    )
    assert (
        "--stop-step" in runs["selftranscendence"].flags and 1000 in runs["selftranscendence"].flags
    )
    assert (
        runs["maskdit"].steps == (3800, 4000)
        and runs["maskdit_tuned"].steps == (200,)
        and runs["maskdit_tuned"].offset == 3800
    )
    assert all(run.measured[-1] + run.offset == 4000 for run in runs.values())
    assert set(runs) - set(plan()[1]) == {name for name, run in runs.items() if run.ablation} - {
        "stage1"
    }


def test_what_is_only_needed_is_run_no_further():
    _, runs = plan("--runs", "selftranscendence")
    assert list(runs) == ["stage1", "selftranscendence"]
    assert runs["stage1"].steps == (2000,) and runs["stage1"].measured == ()


def test_a_comparison_stopped_and_continued(command, tmp_path):
    out, words = (
        tmp_path / "out",
        [*command, "--runs", "vanilla", "selftranscendence", "--jobs", "2"],
    )
    process = subprocess.Popen(
        words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while (
        not list(out.glob("*-0/distance_0000005.json"))
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) != 0
    early = {
        path: path.stat().st_mtime_ns
        for part in ("*.pt", "samples.npz", "distance_*.json")
        for path in out.glob(f"*-0/**/{part}")
    }
    assert len(early) > 2
    done = subprocess.run(
        words, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(path.stat().st_mtime_ns == time for path, time in early.items())
    results = json.loads((out / "results.json").read_text())
    assert set(results["runs"]) == {"vanilla-0", "selftranscendence-0"}
    ours, vanilla = results["runs"]["selftranscendence-0"], results["runs"]["vanilla-0"]
    assert (
        [p["step"] for p in vanilla["points"]]
        == [p["step"] for p in ours["points"]]
        == [5, 10, 15, 20]
    )
    assert 0 < ours["seconds_before"] < ours["points"][0]["seconds"] < ours["points"][-1]["seconds"]
    assert all(p["distance"] > results["training_images"] for p in vanilla["points"])
    assert (
        "| vanilla, flow | flow |" in (out / "table.md").read_text()
        and "| 1.00 |" in (out / "table.md").read_text()
    )
    assert (out / "logs" / "vanilla-0.jsonl").read_bytes() == (
        out / "vanilla-0" / "log.jsonl"
    ).read_bytes()
    with Image.open(out / "figure.png") as image:
        assert image.width > 12 * 64 and len(image.convert("RGB").getcolors(2**20)) > 20
    assert "not FID" in (out / "table.md").read_text() and results["protocol"]["features"]["sha256"]
    other = subprocess.run(
        [*words, "--lr", "1"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert other.returncode and "another comparison (lr)" in other.stderr
    with open(tmp_path / "features.pt", "ab") as file:
        file.write(b" ")
    other = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert other.returncode and "is not what was measured with" in other.stderr


def lay_out(out, name, seconds_per_image, distances):
    """A finished run, as its files are left: stopped once, and gone on from step 500; some steps were run again."""
    folder = out / f"{name}-0"
    folder.mkdir()
    rates = [
        (250, 1 / seconds_per_image),
        (500, 1 / seconds_per_image),
        (501, 0),
        (1000, 1 / seconds_per_image),
    ]
    rates += [(step, 1 / seconds_per_image) for step in range(1250, 4001, 250)]
    lines = [{"start": 0}, *({"step": step, "images_per_s": rate} for step, rate in rates)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step, value in distances.items():
        (folder / f"distance_{step:07d}.json").write_text(json.dumps({"frechet_distance": value}))


def test_seconds_are_those_of_the_images(tmp_path):
    arguments, _ = plan("--out", str(tmp_path))
    lay_out(tmp_path, "vanilla", 0.01, {1000: 3.0})
    assert compare.seconds(arguments, "vanilla", 0, 1000) == pytest.approx(
        0.01 * 1000 * arguments.batch_size
    )
    assert compare.seconds(arguments, "vanilla", 0, 4000) == pytest.approx(
        0.01 * 4000 * arguments.batch_size
    )
    assert (
        compare.distance(arguments, "vanilla", 0, 1000) == 3.0
        and compare.distance(arguments, "vanilla", 0, 2000) is None
    )


def row(title, seed, cost, distances, ablation=False):
    points = [
        {"step": step, "seconds": cost * step, "distance": value}
        for step, value in distances.items()
    ]
    return {
        "title": title,
        "noise": "flow",
        "seed": seed,
        "ablation": ablation,
        "parameters_sampled": 1.9e6,
        "points": points,
    }


def test_table_and_curves_of_odd_results():
    protocol = {"num": 10, "num_reference": 40, "features": {"accuracy": 0.9}}
    runs = {
        "odd-0": row("odd", 0, 2, {2: 0.0, 4: 1.25}, ablation=True),
        "vanilla-0": row("plain", 0, 1, {1: 3, 4: 2.0}),
    }
    runs |= {"vanilla-1": row("plain", 1, 3, {1: 5, 4: 4.0}), "late-1": row("late", 1, 6, {4: 7.0})}
    lines = compare.table({"runs": runs, "protocol": protocol, "training_images": 0.5}).splitlines()
    assert lines[2] == "| plain | flow | 1.90 | 3.00 / 5.00 |  | 2.00 / 4.00 | 1.00 |"
    assert lines[3] == "| late | flow | 1.90 |  |  | 7.00 | 2.00 |"
    assert lines[4] == "| odd | flow | 1.90 |  | 0.00 | 1.25 | 2.00 |"
    assert "90.0%" in lines[-1] and "0.500" in lines[-1]
    del runs["vanilla-0"], runs["vanilla-1"]
    assert (
        compare.table({"runs": runs, "protocol": protocol, "training_images": 0.5})
        .splitlines()[3]
        .endswith("1.25 |  |")
    )
    for points in (
        [(1, 2.0)],
        [(1, 0.0), (2, -1e-9)],
        [(1, 6.1), (2, 7.9)],
        [(1, 1.0), (9, 900.0)],
    ):
        image = Image.new("RGB", (300, 200), "white")
        compare.curves(
            ImageDraw.Draw(image), (60, 10, 290, 150), [("#ff0000", True, points)], "steps", None
        )
        assert any(colour == (255, 0, 0) for _, colour in image.getcolors(2**16))
