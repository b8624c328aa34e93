"""tests/comparison/compare.py: what it runs; a small one from archives to figure, stopped once."""

import importlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from comparison import compare
from conftest import ROOT, wait_for
from PIL import Image

from train_sra import SHAPES, draw_shape


class Features(torch.nn.Module):
    def forward(self, x):
        return torch.cat([x.float().mean((2, 3)), x.float().std((2, 3))], 1) / 64


@pytest.fixture
def command(tmp_path):
    """The words of a comparison of 40 steps on shapes, in archives as those of CIFAR-10."""
    for split, count in (("train", 3), ("test", 4)):
        with zipfile.ZipFile(tmp_path / f"{split}.zip", "w") as archive:
            for label, name in enumerate(SHAPES):
                for k in range(count):
                    draw_shape(label + 10 * k, 16).save(tmp_path / "image.png")
                    archive.write(tmp_path / "image.png", f"{split}/{name}/{k}.png")
    torch.jit.script(Features()).save(tmp_path / "features.pt")
    words = """--train train.zip --test test.zip --features features.pt --model DiT-Ti/8
        --image-size 16 --steps 40 --batch-size 4 --warmup 2 --num 12
        --solver-steps 2 --threads 1 --out out""".split()
    return [sys.executable, str(ROOT / "tests" / "comparison" / "compare.py"), *words]


def ended(words, folder):
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=240)


def plan(*flags, ablations=True):
    arguments = compare.parse_args(["--only", "report", "--steps", "4000", *flags])
    return arguments, compare.chosen(arguments, 0, ablations)


def test_the_runs_differ_in_their_method_alone():
    arguments, runs = plan()
    parsed = {}
    for name, run in runs.items():
        words = compare.words(arguments, name, run, 0, run.steps[-1])
        parsed[name] = vars(importlib.import_module(Path(words[0]).stem).parse_args(words[1:]))
    scaffold = set.intersection(*map(set, parsed.values())) - {"out", "align_weight"}
    assert [run.measured[-1] + run.offset for run in runs.values() if run.measured] == [4000] * 11
    own = {"maskdit_tuned": "init_from steps lr warmup save_every", "stage1": "steps"}
    vanilla = parsed["vanilla"]
    assert vanilla["ema_warmup"] and vanilla["diffusion"] == "flow"
    for name, settings in parsed.items():
        differing = {key for key in scaffold if settings[key] != vanilla[key]}
        allowed = {"diffusion"} if runs[name].noise == "EDM" else set()
        assert differing == allowed.union(own.get(name, "").split()), name


def test_what_is_only_needed_is_run_no_further():
    _, runs = plan("--runs", "selftranscendence")
    assert list(runs) == ["stage1", "selftranscendence"]
    assert runs["stage1"].steps == (2000,) and runs["stage1"].measured == ()


def test_a_comparison_stopped_and_continued(command, tmp_path):
    out, words = tmp_path / "out", [*command, "--runs", "vanilla", "selftranscendence"]
    process = subprocess.Popen([*words, "--only", "train"], cwd=tmp_path)
    assert wait_for(lambda: list(out.glob("*-0/checkpoints/0000010.pt")), process, timeout=240)
    process.terminate()
    assert process.wait(120) != 0
    early = {path: path.stat().st_mtime_ns for path in out.glob("*/**/*.pt")}
    assert early and not (out / "test").exists()
    done = ended([*words, "--jobs", "2"], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(path.stat().st_mtime_ns == time for path, time in early.items())

    results = json.loads((out / "results.json").read_text())
    assert set(results["runs"]) == {"vanilla-0", "selftranscendence-0"}
    assert results["protocol"]["measuring"]["features features"]["sha256"]
    for run in results["runs"].values():
        assert run["steps"] == [10, 20, 30, 40]
        assert len(run["loss_ema"]) == len(run["loss_raw"]) == len(run["best_block"]) == 4
        assert run["loss_raw"][-1] < run["loss_raw"][0]
        assert set(run["levels"]) == {"0.7", "0.5", "0.3", "0.1"}
        assert run["distance"]["features"] > results["training_images"]["features"]
    table = (out / "table.md").read_text()
    assert "| vanilla, flow | flow | 1 |" in table and "not FID" in table
    vanilla, mine = (run["loss_ema"][-1] for run in results["runs"].values())
    assert f"| {mine - vanilla:+.4f} |" in table
    assert (out / "logs/vanilla-0.jsonl").read_text() == (out / "vanilla-0/log.jsonl").read_text()
    for name in ("figure.png", "probe.png"):
        with Image.open(out / name) as image:
            assert image.width > 500 and len(image.convert("RGB").getcolors(2**20)) > 20

    assert "another comparison (lr)" in ended([*words, "--lr", "1"], tmp_path).stderr
    with open(tmp_path / "features.pt", "ab") as file:
        file.write(b" ")
    assert "another comparison (features features)" in ended(words, tmp_path).stderr

    for part in ("time", "report"):
        assert ended([*command, "--only", part], tmp_path).returncode == 0
    results = json.loads((out / "results.json").read_text())
    assert results["costs"]["costs"]["vanilla"] == 1 and len(results["costs"]["costs"]) == 11
    assert results["runs"]["vanilla-0"]["cost"] == [10, 20, 30, 40]


def test_cost_counts_the_run_before_and_the_phases():
    _, runs = plan()
    costs = {"stage1": 1.5, "selftranscendence": 2, "vanilla": 1}
    costs |= {"maskdit": 0.5, "maskdit_unmasked": 3}
    prices = [compare.price(runs, costs, "selftranscendence", step) for step in (500, 1000, 4000)]
    assert prices == [3000 + 1000, 3000 + 2000, 3000 + 2000 + 3000]
    assert compare.price(runs, costs, "maskdit_tuned", 500) == 3500 / 2 + 1500
    run = {"cost": [2, 4, 6], "steps": [1, 2, 3], "loss_ema": [3, 2, 5 / 3]}
    assert compare.loss_at(run, 5) == pytest.approx(9 / 5)
