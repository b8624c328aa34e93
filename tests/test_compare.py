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
from PIL import Image

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
    files = ["--train", tmp_path / "train.zip", "--test", tmp_path / "test.zip", "--features", tmp_path / "features.pt"]
    size = ["--model", "DiT-Ti/8", "--image-size", 16, "--per-class", 2, "--steps", 20, "--batch-size", 4, "--warmup", 2, "--num", 12]
    words = [sys.executable, ROOT / "tests" / "compare.py", *files, *size, "--solver-steps", 2, "--threads", 1, "--out", tmp_path / "out"]
    return list(map(str, words))


def plan(*flags):
    arguments = compare.parse_args(["--train", "a", "--test", "b", "--features", "c", "--steps", "4000", *flags])
    return arguments, compare.chosen(arguments, 0)


def test_the_runs_differ_in_their_method_alone():
    arguments, runs = plan("--ablations")
    common = []
    for name, run in runs.items():
        words = compare.words(arguments, name, run, 0, run.steps[-1])
        importlib.import_module(Path(words[0]).stem).parse_args(words[1:])  # it knows all of these flags
        shared = words[1 : len(words) - len(run.flags) - 2]
        for flag in ("--steps", "--save-every"):
            del shared[shared.index(flag) : shared.index(flag) + 2]
        common.append(shared)
    assert len(common) == 15 and all(words == common[0] for words in common)
    assert runs["stage1"].steps == (2000, 4000) and runs["selftranscendence"].after == ("stage1", 2000)
    assert "--stop-step" in runs["selftranscendence"].flags and 1000 in runs["selftranscendence"].flags
    assert runs["maskdit"].steps == (3800, 4000) and runs["maskdit_tuned"].steps == (200,) and runs["maskdit_tuned"].offset == 3800
    assert all(run.measured[-1] + run.offset == 4000 for run in runs.values())
    assert set(runs) - set(plan()[1]) == {name for name, run in runs.items() if run.ablation} - {"stage1"}


def test_what_is_only_needed_is_run_no_further():
    _, runs = plan("--runs", "selftranscendence")
    assert list(runs) == ["stage1", "selftranscendence"]
    assert runs["stage1"].steps == (2000,) and runs["stage1"].measured == ()


def test_a_comparison_stopped_and_continued(command, tmp_path):
    out, words = tmp_path / "out", [*command, "--runs", "vanilla", "selftranscendence", "--jobs", "2"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(out.glob("vanilla-0/distance_0000005.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) != 0
    early = {path: path.stat().st_mtime_ns for path in out.glob("*-0/**/*.pt")}
    assert early
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(path.stat().st_mtime_ns == time for path, time in early.items())
    results = json.loads((out / "results.json").read_text())
    assert set(results["runs"]) == {"vanilla-0", "selftranscendence-0"}
    ours, vanilla = results["runs"]["selftranscendence-0"], results["runs"]["vanilla-0"]
    assert [p["step"] for p in vanilla["points"]] == [p["step"] for p in ours["points"]] == [5, 10, 15, 20]
    assert 0 < ours["seconds_before"] < ours["points"][0]["seconds"] < ours["points"][-1]["seconds"]
    assert all(p["distance"] > results["training_images"] for p in vanilla["points"])
    assert "| vanilla, flow | flow |" in (out / "table.md").read_text() and "| 1.00 |" in (out / "table.md").read_text()
    assert (out / "logs" / "vanilla-0.jsonl").read_bytes() == (out / "vanilla-0" / "log.jsonl").read_bytes()
    with Image.open(out / "figure.png") as image:
        assert image.width > 12 * 64 and len(image.convert("RGB").getcolors(2**20)) > 20
    other = subprocess.run([*words, "--lr", "1"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert other.returncode and "another comparison" in other.stderr
