"""Vanilla and the five methods side by side: same encoder, images, batch, learning rate, EMA, seed and sampler, equal steps.

    python tests/compare.py --train cifar10-train.zip --test cifar10-test.zip --features features.pt --jobs 2 --threads 1
    ... --ablations                            also the runs that would give a wrong implementation away
    ... --seeds 0 1                            each run with two seeds
    ... --report                               no runs: results.json, table.md, figure.png and logs/ from what is there

The archives hold SPLIT/CLASS/NAME.jpg; the first --per-class images of each class (by name) are trained on, all test images are the
reference. --features: a classifier without its last layer, as tests/cifar10_features.py saves it beside its accuracy. The distance is
Frechet's, in the space of these features: it is not FID, and compares with nothing but itself. Every run is a command of a training
script; sample.py draws --num images of the EMA at each quarter of the steps (ablations: each half), from the same noise and labels for all
runs, without guidance, and fid.py measures them. Seconds are those of training, from log.jsonl, without sampling and saving; what else the
machine did at that time is in them, so that small differences mean nothing.

The same command goes on where it was stopped: what is finished is not repeated, and a training run continues from its last checkpoint
(--jobs may change in between). --out keeps to one protocol: other settings, archives or features are refused.

What is scaled, and by which rule (n: --steps; numbers of the papers and of what their authors released, see each script's docstring)
    blocks                by depth, as the scripts do by default
    MaskDiT               half of the tokens hidden; tuning: the last twentieth of n unmasked (after n in the paper, 100k beyond 2M), at
                          half the learning rate, its EMA going on from MaskDiT's
    SD-DiT                teacher's temperature n / 16 (150k of 2.4M), prototypes frozen n / 480 (5k); momentum 0.996, its cosine over n;
                          Ti: K = 512, head 256 wide; int(0.8 T) tokens are seen: 12 of 16
    Self-Transcendence    stage 1 n / 2 steps, counted in its seconds, not in its steps; the term of stage 2 stops at n / 4; both stages
                          start from the same weights (the seed's)
    DiverseDiT            10 random blocks, or all if there are fewer; L_div is over one batch
The optimisation is one for all, also where a paper has another: AdamW, --lr, --warmup steps, clipping at 1, EMA 0.9999 with warm-up (SRA's
teacher with it), mirrored images, labels dropped at 10 %, no qk-norm. MaskDiT and SD-DiT have a decoder on top, and SD-DiT a class token:
their own baselines are among the ablations. MaskDiT without reconstruction still learns its mask token (officially it is 0 then).
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import hold_lock, load_checkpoint  # noqa: E402
from train_sra import Images  # noqa: E402

PER_PICTURE = 12  # seeds of the grid


@dataclass
class Run:
    """One training command. `steps`: where it stops, in turn; `after`: (run, step) that it starts from, whose seconds count as its own."""

    title: str
    noise: str
    script: str
    flags: list
    steps: tuple
    after: tuple = ()
    offset: int = 0  # steps of the run that it continues, in the same network
    ablation: bool = False
    colour: str = "#888888"
    measured: tuple = ()  # its own steps at which it is sampled


def plan(a, seed):
    """{name: Run}, each behind those that it needs."""
    n = a.steps
    quarters = tuple(n * k // 4 for k in (1, 2, 3, 4))
    tuning = n // 20
    small = ["--prototypes", 512, "--head-width", 256] if "-Ti/" in a.model else []
    edm = ["--diffusion", "edm"]
    sd = [*edm, *small, "--temperature-steps", n // 16, "--freeze-steps", n // 480]
    checkpoint = f"{a.out}/{{}}-{seed}/checkpoints/{{:07d}}.pt"
    st = "train_selftranscendence.py"
    stage2 = ["--stage", 2, "--teacher", checkpoint.format("stage1", n // 2), "--stop-step", n // 4]
    tuned = [
        *edm,
        "--mask-ratio",
        0,
        "--init-from",
        checkpoint.format("maskdit", n - tuning),
        "--lr",
        a.lr / 2,
        "--warmup",
        0,
    ]
    tuned += [
        "--no-ema-warmup",
        "--ema-decay",
        (n - tuning + 1) / (n - tuning + 10),
    ]  # as if its step were that of MaskDiT
    runs = {
        "stage1": Run("Self-Transcendence, stage 1 alone", "flow", st, ["--stage", 1], (n // 2, n), ablation=True),
        "vanilla": Run("vanilla, flow", "flow", "train_sra.py", ["--align-weight", 0], (n,), colour="#000000"),
        "vanilla_edm": Run("vanilla, EDM", "EDM", "train_sra.py", ["--align-weight", 0, *edm], (n,), colour="#888888"),
        "sra": Run("SRA", "flow", "train_sra.py", [], (n,), colour="#0072b2"),
        "maskdit": Run("MaskDiT", "EDM", "train_mdt.py", edm, (n - tuning, n), colour="#e69f00"),
        "sddit": Run("SD-DiT", "EDM", "train_discriminative.py", sd, (n,), colour="#cc79a7"),
        "selftranscendence": Run(f"Self-Transcendence, after {n // 2} of stage 1", "flow", st, stage2, (n,), after=("stage1", n // 2),
                                 colour="#009e73"),
        "diversedit": Run("DiverseDiT", "flow", "train_diversedit.py", [], (n,), colour="#d55e00"),
        "maskdit_tuned": Run("MaskDiT, last 5 % unmasked", "EDM", "train_mdt.py", tuned, (tuning,), after=("maskdit", n - tuning),
                             offset=n - tuning, colour="#8c6000"),
        "maskdit_unmasked": Run("MaskDiT's network, nothing hidden", "EDM", "train_mdt.py", [*edm, "--mask-ratio", 0], (n,), ablation=True),
        "sra_no_head": Run("SRA without its head", "flow", "train_sra.py", ["--head", "none"], (n,), ablation=True),
        "diversedit_no_loss": Run("DiverseDiT without loss", "flow", "train_diversedit.py", ["--diversity-weight", 0], (n,), ablation=True),
        "diversedit_no_residuals": Run("DiverseDiT without residuals", "flow", "train_diversedit.py", ["--long-residual", "none"], (n,),
                                       ablation=True),
        "maskdit_no_mae": Run("MaskDiT without reconstruction", "EDM", "train_mdt.py", [*edm, "--mae-weight", 0], (n,), ablation=True),
        "sddit_no_loss": Run("SD-DiT without its loss, masked", "EDM", "train_discriminative.py", [*sd, "--align-weight", 0], (n,),
                             ablation=True),
        "sddit_plain": Run("SD-DiT's network, nothing hidden, no loss", "EDM", "train_discriminative.py",
                           [*sd, "--align-weight", 0, "--mask-ratio", 0], (n,), ablation=True),
    }  # fmt: skip
    for run in runs.values():
        at = quarters[1::2] if run.ablation else quarters
        run.measured = tuple(
            step - run.offset for step in at if run.offset < step <= run.offset + run.steps[-1]
        )
    return runs


def chosen(a, seed):
    """Those of the plan that are asked for, and what they need; of a run that is only needed, no more than that."""
    runs = plan(a, seed)
    if set(a.runs or ()) - set(runs):
        sys.exit(f"--runs {' '.join(a.runs)}: choose from {', '.join(runs)}")
    asked = a.runs or [name for name, run in runs.items() if a.ablations or not run.ablation]
    needed = dict(run.after for name, run in runs.items() if name in asked and run.after)
    for name in set(needed) - set(asked):
        runs[name].steps, runs[name].measured = (needed[name],), ()
    return {name: run for name, run in runs.items() if name in asked or name in needed}


def words(a, name, run, seed, steps):
    """The training command, relative to the current folder."""
    twentieth, save_every = a.steps // 20, run.steps[-1] if run.offset else a.steps // 4
    log_every = twentieth // (4 if twentieth % 4 == 0 else 2 if twentieth % 2 == 0 else 1)
    command = [
        os.path.relpath(ROOT / run.script),
        "--data",
        f"{a.out}/data",
        "--image-size",
        a.image_size,
        "--model",
        a.model,
    ]
    command += [
        "--steps",
        steps,
        "--batch-size",
        a.batch_size,
        "--lr",
        a.lr,
        "--warmup",
        a.warmup,
        "--clip-grad",
        1,
        "--ema-warmup",
    ]
    command += [
        "--flip",
        "--no-qk-norm",
        "--seed",
        seed,
        "--log-every",
        log_every,
        "--sample-every",
        0,
    ]
    command += [
        "--save-every",
        save_every,
        *a.train_flags,
        *run.flags,
        "--out",
        f"{a.out}/{name}-{seed}",
    ]
    return list(map(str, command))


children, stopped = set(), []


def execute(command, log, threads):
    """Run a command of ours, its output appended to a file; returns its stdout. Raises RuntimeError with the end of that file."""
    if stopped:
        raise RuntimeError("stopped")
    with open(log, "a") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env=environment,
        )
        children.add(process)
        if stopped:  # the signal may have come before it was in the set
            process.terminate()
        output, _ = process.communicate()
        children.discard(process)
        file.write(output)
    if process.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with {process.returncode}: {Path(log).read_text()[-2000:]}"
        )
    return output


def stop(number, _):
    """A signal: what is running saves and ends; the same command goes on."""
    stopped.append(number)
    for process in list(children):
        process.terminate()


def prepare(a):
    """OUT/data (folder of classes), OUT/reference.npz (all test images at that size), OUT/statistics.npz, OUT/floor.json."""
    for archive, folder, limit in ((a.train, "data", a.per_class), (a.test, "test", None)):
        if (a.out / folder).exists():
            continue
        partial, count = a.out / f"{folder}.partial", {}
        shutil.rmtree(partial, ignore_errors=True)
        with zipfile.ZipFile(archive) as file:
            for name in sorted(
                n for n in file.namelist() if n.lower().endswith((".jpg", ".jpeg", ".png"))
            ):
                parts = name.split("/")
                if len(parts) < 2 or {"", ".", ".."} & set(parts):
                    sys.exit(f"{archive}: {name} is not SPLIT/CLASS/NAME")
                group, base = parts[-2:]
                if limit and count.get(group, 0) >= limit:
                    continue
                count[group] = count.get(group, 0) + 1
                (partial / group).mkdir(parents=True, exist_ok=True)
                (partial / group / base).write_bytes(file.read(name))
        partial.rename(a.out / folder)
        print(f"{folder}: {sum(count.values())} images of {len(count)} classes", flush=True)
    for folder, target, limit in (("test", "reference.npz", None), ("data", "floor.npz", a.num)):
        if not (a.out / target).exists():
            images = Images(str(a.out / folder), a.image_size, 0, 1)
            indices = (
                range(len(images))
                if limit is None
                else np.linspace(0, len(images) - 1, min(limit, len(images))).round().astype(int)
            )
            array = np.stack([images[int(k), False][0].numpy().transpose(1, 2, 0) for k in indices])
            np.savez(a.out / "partial.npz", arr_0=array)
            (a.out / "partial.npz").rename(a.out / target)
    if not a.features:
        return
    if not (a.out / "statistics.npz").exists():
        fid = [
            os.path.relpath(ROOT / "fid.py"),
            "--features",
            str(a.features),
            "--batch-size",
            "250",
        ]
        execute(
            [*fid, "--save-stats", f"{a.out}/statistics.npz", f"{a.out}/reference.npz"],
            a.out / "fid.log",
            None,
        )
    measure(a, a.out / "floor.npz", a.out / "floor.json", None)


def measure(a, samples, target, threads):
    if not target.exists():
        fid = [
            os.path.relpath(ROOT / "fid.py"),
            str(samples),
            f"{a.out}/statistics.npz",
            "--features",
            str(a.features),
        ]
        text = execute(
            [*fid, "--metrics", "fid", "--batch-size", "250"], a.out / "fid.log", threads
        )
        target.with_suffix(".partial").write_text(text)
        target.with_suffix(".partial").rename(target)


def keep_to_one_protocol(a):
    """OUT/protocol.json and OUT/features.json: written once; other settings, archives or features end the program with one line."""

    def sha256(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()

    path, settings = a.out / "protocol.json", {k: getattr(a, k) for k in FIXED}
    settings |= {"train_sha256": sha256(a.train), "test_sha256": sha256(a.test)}
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(
        describe, cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    was = json.loads(path.read_text()) if path.exists() else {**settings, "commit": commit}
    changed = [key for key, value in settings.items() if was.get(key) != value]
    if changed:
        sys.exit(
            f"{path} is of another comparison ({', '.join(changed)}): use its settings, or another --out"
        )
    path.write_text(json.dumps(was, indent=1) + "\n")
    if a.features:
        beside, path, found = (
            a.features.with_suffix(".json"),
            a.out / "features.json",
            sha256(a.features),
        )
        features = json.loads(beside.read_text()) if beside.exists() else {"sha256": found}
        if features["sha256"] != found:
            sys.exit(f"{beside} describes another file than {a.features}")
        if path.exists() and json.loads(path.read_text())["sha256"] != found:
            sys.exit(
                f"{a.features} is not what was measured with: delete statistics.npz, *.json and */distance_* in {a.out} first"
            )
        path.write_text(json.dumps(features) + "\n")


def carry_out(a, name, run, seed):
    """Train, sample, measure; whatever is there already is left as it is."""
    folder = a.out / f"{name}-{seed}"
    folder.mkdir(exist_ok=True)
    for steps in run.steps:
        last = folder / "checkpoints" / f"{steps:07d}.pt"
        if not last.exists():
            execute(words(a, name, run, seed, steps), folder / "output.txt", a.threads)
        if not last.exists():
            raise RuntimeError(f"{name}: stopped before step {steps}")
    for step in run.measured:
        samples, result = folder / f"samples_{step:07d}", folder / f"distance_{step:07d}.json"
        if not result.exists():
            command = [
                os.path.relpath(ROOT / "sample.py"),
                "--ckpt",
                folder / "checkpoints" / f"{step:07d}.pt",
                "--num-samples",
                a.num,
            ]
            command += [
                "--labels",
                "balanced",
                "--solver",
                "heun",
                "--steps",
                a.solver_steps,
                "--batch-size",
                250,
                "--out",
                samples,
            ]
            execute(list(map(str, command)), folder / "output.txt", a.threads)
            if a.features:
                measure(a, samples / "samples.npz", result, a.threads)
    if not a.features:
        return
    found = ", ".join(
        f"{distance(a, name, seed, s):.3f} at step {s + run.offset}" for s in run.measured
    )
    print(f"{name}, seed {seed}: {found or 'done'}", flush=True)


# --- report


def distance(a, name, seed, step):
    """The measured distance, or None."""
    path = a.out / f"{name}-{seed}" / f"distance_{step:07d}.json"
    return json.loads(path.read_text())["frechet_distance"] if path.exists() else None


def seconds(a, name, seed, step):
    """Seconds of training up to a step: sum of images / rate over log.jsonl; what was lost in a stop, sampling and saving do not count."""
    lines = [
        json.loads(line)
        for line in (a.out / f"{name}-{seed}" / "log.jsonl").read_text().splitlines()
    ]
    total, last, rate = 0.0, 0, math.inf
    for line in (line for line in lines if "step" in line and line["step"] <= step):
        rate = line["images_per_s"] or rate  # 0 where a single step was run since a start
        total, last = total + (line["step"] - last) * a.batch_size / rate, line["step"]
    return total


def shown(a, seed):
    """[(name, Run)] of the plan in the order of tables and figures: what continues a run stands beside it, ablations at the end."""
    runs = plan(a, seed)
    places = {name: place for place, name in enumerate(runs)}
    return sorted(
        runs.items(),
        key=lambda item: (
            item[1].ablation,
            places[item[1].after[0] if item[1].offset else item[0]],
        ),
    )


def collect(a):
    """Everything that is finished, as one dictionary."""
    results, found = (
        {},
        sorted(
            {
                int(path.name.rsplit("-", 1)[1])
                for path in a.out.glob("*-*")
                if (path / "log.jsonl").exists()
            }
        ),
    )
    for seed in found:
        for name, run in shown(a, seed):
            points = {step: distance(a, name, seed, step) for step in run.measured}
            if not points or None in points.values():
                continue
            before = seconds(a, run.after[0], seed, run.after[1]) if run.after else 0.0
            folder = a.out / f"{name}-{seed}"
            checkpoint = load_checkpoint(folder / "checkpoints" / f"{run.steps[-1]:07d}.pt")
            starts = [
                line
                for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines())
                if "start" in line
            ]
            results[f"{name}-{seed}"] = {
                "title": run.title, "noise": run.noise, "seed": seed, "ablation": run.ablation,
                "command": "python " + " ".join(starts[-1]["command"]),
                "parameters_sampled": sum(v.numel() for k, v in checkpoint["model"].items() if "pos_embed" not in k),
                "seconds_before": before, "steps_of_the_run_before": run.after[1] if run.after else 0,
                "points": [
                    {"step": step + run.offset, "seconds": before + seconds(a, name, seed, step), "distance": value}
                    for step, value in points.items()
                ],
                "hardware": starts[-1]["hardware"], "torch": starts[-1]["torch"],
            }  # fmt: skip
    protocol, floor = (
        json.loads((a.out / "protocol.json").read_text()),
        json.loads((a.out / "floor.json").read_text()),
    )
    protocol |= {
        "measure": "Frechet distance in classifier features, not FID",
        "num_reference": floor["num_reference"],
    }
    protocol["features"] = json.loads((a.out / "features.json").read_text())
    return {"protocol": protocol, "training_images": floor["frechet_distance"], "runs": results}


def table(results):
    """Markdown: a row a run, in each cell a value a seed; time: in units of vanilla flow's of the same seed, mean over seeds."""
    runs, names = results["runs"], {}
    for name, run in runs.items():
        names.setdefault(name.rsplit("-", 1)[0], []).append(run)
    steps = sorted({p["step"] for run in runs.values() for p in run["points"]})
    unit = {run["seed"]: run["points"][-1]["seconds"] for run in names.get("vanilla", ())}
    lines = [
        "| run | noise | M parameters | "
        + " | ".join(f"step {s}" for s in steps)
        + " | time, all counted |"
    ]
    lines.append("|---" * (4 + len(steps)) + "|")
    for group in sorted(names.values(), key=lambda runs: runs[0]["ablation"]):
        values = [
            " / ".join(
                f"{p['distance']:.2f}" for run in group for p in run["points"] if p["step"] == s
            )
            for s in steps
        ]
        costs = [
            run["points"][-1]["seconds"] / unit[run["seed"]] for run in group if run["seed"] in unit
        ]
        cells = [
            group[0]["title"],
            group[0]["noise"],
            f"{group[0]['parameters_sampled'] / 1e6:.2f}",
            *values,
        ]
        lines.append(
            "| " + " | ".join([*cells, f"{sum(costs) / len(costs):.2f}" if costs else ""]) + " |"
        )
    protocol = results["protocol"]
    accuracy = (
        f"{protocol['features']['accuracy']:.1%}"
        if protocol["features"].get("accuracy")
        else "not stated"
    )
    note = (
        f"Frechet distance of {protocol['num']} samples to {protocol['num_reference']} test images in the features of a classifier (its "
        f"accuracy on them: {accuracy}). This is not FID. "
        f"Training images in place of samples: {results['training_images']:.3f}."
    )
    return "\n".join([*lines, "", note]) + "\n"


def font(size):
    return ImageFont.load_default(size)


def curves(draw, box, lines, label, numbers):
    """Log-log axes in box (left, top, right, bottom); lines: (colour, dashed, [(x, y), ...]); numbers: at the x axis, or None."""
    left, top, right, bottom = box
    lines = [
        (colour, dashed, [(max(x, 1e-3), max(y, 1e-3)) for x, y in points])
        for colour, dashed, points in lines
    ]
    xs, ys = ([math.log(p[i]) for *_, points in lines for p in points] for i in (0, 1))
    (x0, x1), (y0, y1) = (
        (min(v) - 0.04 * (max(v) - min(v) or 1), max(v) + 0.04 * (max(v) - min(v) or 1))
        for v in (xs, ys)
    )

    def place(x, y):
        return left + (math.log(x) - x0) / (x1 - x0) * (right - left), bottom - (
            math.log(y) - y0
        ) / (y1 - y0) * (bottom - top)

    ticks = [m * 10.0**e for e in range(-3, 8) for m in (1, 1.5, 2, 3, 4, 5, 6, 8)]

    def inside(step):
        """Numbers for the y axis: those ticks, or multiples of step."""
        low, high = math.exp(y0), math.exp(y1)
        candidates = (
            [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
            if step
            else ticks
        )
        return [t for t in candidates if low <= t <= high]

    for x in (t for t in (numbers or ticks) if x0 <= math.log(t) <= x1):
        u = place(x, math.exp(y0))[0]
        draw.line([(u, top), (u, bottom)], "#e4e4e4")
        draw.text((u, bottom + 5), f"{x:g}", "#333333", font(15), "mt")
    for y in next(
        near
        for step in (0, 1, 0.5, 0.2, 0.1, 0.01)
        if len(near := inside(step)) > 2 or step == 0.01
    ):
        v = place(math.exp(x0), y)[1]
        draw.line([(left, v), (right, v)], "#e4e4e4")
        draw.text((left - 6, v), f"{y:g}", "#333333", font(15), "rm")
    draw.rectangle(box, outline="#333333")
    draw.text(((left + right) / 2, bottom + 26), label, "#333333", font(16), "mt")
    for colour, dashed, points in lines:
        placed = [place(*p) for p in points]
        for (ax, ay), (bx, by) in pairwise(placed):
            pieces = max(1, round(math.hypot(bx - ax, by - ay) / 6)) if dashed else 1
            for k in range(0, pieces, 2):
                f, g = k / pieces, min(1, (k + 1) / pieces)
                draw.line(
                    [
                        (ax + f * (bx - ax), ay + f * (by - ay)),
                        (ax + g * (bx - ax), ay + g * (by - ay)),
                    ],
                    colour,
                    3,
                )
        for x, y in placed:
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour)


def figure(a, results, seed):
    """Distance against steps and against seconds, and below the same twelve seeds of every method; ablations are left out."""
    rows = [
        (name, run)
        for name, run in shown(a, seed)
        if f"{name}-{seed}" in results["runs"] and not run.ablation
    ]
    if not rows:
        return None
    scale = max(1, 64 // a.image_size)
    cell, gap, margin = a.image_size * scale, 4, 210
    width, top = margin + PER_PICTURE * (cell + gap) + 20, 415
    image = Image.new("RGB", (width, top + len(rows) * (cell + gap) + 10), "white")
    draw = ImageDraw.Draw(image)
    lines = {"step": [], "seconds": []}
    for name, run in rows:
        for axis, sink in lines.items():
            points = [(p[axis], p["distance"]) for p in results["runs"][f"{name}-{seed}"]["points"]]
            sink.append((run.colour, run.noise == "EDM", points))
    middle = width // 2
    steps = sorted({p["step"] for run in results["runs"].values() for p in run["points"]})
    curves(draw, (60, 40, middle - 25, 330), lines["step"], "steps", steps)
    curves(
        draw,
        (middle + 45, 40, width - 20, 330),
        lines["seconds"],
        "seconds of training, stage 1 included",
        None,
    )
    draw.text(
        (60, 12),
        "Frechet distance in features of a small CIFAR-10 classifier (not FID). Dashed: EDM",
        "#000000",
        font(17),
    )
    x, y = 60, 372
    for _, run in rows:
        length = font(15).getlength(run.title) + 50
        if x + length > width:
            x, y = 60, y + 22
        draw.line([(x, y + 8), (x + 26, y + 8)], run.colour, 4)
        draw.text((x + 32, y), run.title, "#000000", font(15))
        x += length + 6
    for row, (name, run) in enumerate(rows):
        y = top + row * (cell + gap)
        value = results["runs"][f"{name}-{seed}"]["points"][-1]["distance"]
        text = "\n".join([*textwrap.wrap(run.title, 26), f"{value:.2f}"])
        draw.multiline_text((10, y + cell / 2), text, "#000000", font(15), "lm", spacing=3)
        with np.load(
            a.out / f"{name}-{seed}" / f"samples_{run.measured[-1]:07d}" / "samples.npz"
        ) as file:
            pictures = file["arr_0"][:PER_PICTURE]
        for k, pixels in enumerate(pictures):
            picture = Image.fromarray(pixels).resize((cell, cell), Image.Resampling.NEAREST)
            image.paste(picture, (margin + k * (cell + gap), y))
    return image


def report(a):
    results = collect(a)
    (a.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    (a.out / "table.md").write_text(text)
    (a.out / "logs").mkdir(exist_ok=True)
    for path in a.out.glob("*-*/log.jsonl"):
        shutil.copyfile(path, a.out / "logs" / f"{path.parent.name}.jsonl")
    picture = figure(a, results, a.seeds[0])
    if picture:
        picture.save(a.out / "figure.png", optimize=True)
    print(f"\n{text}\nresults.json, table.md, figure.png and logs/ are in {a.out}", flush=True)


FIXED = "image_size per_class model steps batch_size lr warmup num solver_steps threads train_flags".split()


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--train", type=Path, help="archive of training images")
    add("--test", type=Path, help="archive of test images")
    add(
        "--features",
        type=Path,
        help="TorchScript module for fid.py; without it the runs are trained and sampled, not yet measured",
    )
    add("--out", type=Path, default=Path("results/compare"))
    add("--image-size", type=int, default=16)
    add("--per-class", type=int, default=1000, help="training images of each class; 0: all")
    add("--model", default="DiT-Ti/4")
    add("--steps", type=int, default=2000, help="a multiple of 20")
    add("--batch-size", type=int, default=64)
    add("--lr", type=float, default=1e-3)
    add("--warmup", type=int, default=100)
    add("--num", type=int, default=1000, help="samples a measurement")
    add("--solver-steps", type=int, default=12, help="of Heun's method")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--runs", nargs="+", help="these only, and what they need")
    add("--ablations", action="store_true")
    add("--jobs", type=int, default=1, help="runs at a time")
    add("--threads", type=int, help="OMP_NUM_THREADS of each")
    add("--report", action="store_true")
    add(
        "--train-flags",
        nargs=argparse.REMAINDER,
        default=[],
        help="for all training scripts, last: --train-flags --compile ...",
    )
    a = parser.parse_args(argv)
    if a.steps % 20:
        parser.error(f"--steps {a.steps}: must be a multiple of 20")
    if not a.report and not (a.train and a.test):
        parser.error("--train and --test are needed")
    for path in (a.train, a.test):
        if not a.report and not zipfile.is_zipfile(path):
            parser.error(f"{path}: no such archive, or not a zip file")
    if a.features and not a.features.is_file():
        parser.error(f"--features {a.features}: no such file")
    return a


def main():
    a = parse_args()
    if a.report:
        if not (a.out / "protocol.json").exists() or not (a.out / "floor.json").exists():
            sys.exit(f"{a.out}: nothing measured there yet")
        for key, value in json.loads((a.out / "protocol.json").read_text()).items():
            setattr(a, key, value)
        return report(a)
    a.out.mkdir(parents=True, exist_ok=True)
    try:
        lock = hold_lock(a.out / "lock")
    except ValueError as error:
        sys.exit(error)
    keep_to_one_protocol(a)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        prepare(a)
    except RuntimeError as error:
        sys.exit(f"{error}")
    with ThreadPoolExecutor(a.jobs) as pool:
        tasks = {}  # in order: a task waits only for those that were started before it

        def task(name, run, seed):
            if run.after:
                tasks[run.after[0], seed].result()
            carry_out(a, name, run, seed)

        for seed in a.seeds:
            for name, run in chosen(a, seed).items():
                tasks[name, seed] = pool.submit(task, name, run, seed)
        errors = [error for future in tasks.values() if (error := future.exception())]
    for error in dict.fromkeys(map(str, errors)):
        print(error, file=sys.stderr)
    if a.features:
        report(a)
    lock.close()
    if errors or stopped:
        sys.exit("not finished: the same command goes on from here")


if __name__ == "__main__":
    main()
