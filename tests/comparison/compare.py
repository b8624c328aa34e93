r"""Vanilla and the five methods side by side: same encoder, images, batch, learning rate, EMA, seed
and sampler, equal steps. README.md beside this file has protocol, results, and how to read them.

    python tests/comparison/compare.py --train cifar10-train.zip --seeds 0 1 2 --ablations \
        --jobs 2 --threads 1 --only train
    python tests/comparison/compare.py --train cifar10-train.zip --test cifar10-test.zip \
        --features features.pt --seeds 0 1 2 --ablations --only measure
    python tests/comparison/compare.py --report    # no runs: what is there, collected once more

--ablations adds, with the first seed, the runs that decide something. The archives hold
SPLIT/CLASS/NAME.jpg: the first --per-class images of each class (by name; 0: all) are trained on,
all test images are the reference. --features is a classifier without its last layer, as
cifar10_features.py saves it beside its accuracy. The distance is Frechet's in the space of these
features: it is not FID, and compares with nothing but itself.

Every run is a command of a training script, with a checkpoint at each quarter of the steps.
Measuring is done for the checkpoints that are there, and may run beside the training: sample.py
draws --num images of the last EMA, without guidance, from the same noise and labels for all runs;
fid.py measures them.

The same command goes on where it was stopped: what is finished is not repeated, and a training run
continues from its last checkpoint. --out keeps to one protocol: other settings, archives or
features are refused. It ends with results.json, table.md, figure.png and logs/ in --out.
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
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from train_sra import center_crop

ROOT = Path(__file__).resolve().parents[2]
PER_PICTURE = 12  # seeds of the grid
TRAINING = "image_size per_class model steps batch_size lr warmup threads train_flags".split()
MEASURING = ["num", "solver_steps"]


@dataclass
class Run:
    """One training command.

    steps: where it stops, in turn; after: (run, step) that it starts from, whose seconds count as
    its own; offset: steps of the run that it continues, in the same network; colour: in the figure,
    none for an ablation; measured: its own steps at which it is sampled.
    """

    title: str
    script: str
    flags: list
    steps: tuple
    after: tuple = ()
    offset: int = 0
    colour: str = ""
    measured: tuple = ()

    @property
    def noise(self):
        return "EDM" if "edm" in self.flags else "flow"


def plan(a, seed):
    """{name: Run}, each behind those that it needs."""
    n, tuning, runs = a.steps, a.steps // 8, {}
    sra, mdt, diverse = "train_sra.py", "train_mdt.py", "train_diversedit.py"
    sd, transcend = "train_discriminative.py", "train_selftranscendence.py"
    edm = ["--diffusion", "edm"]
    small = ["--prototypes", 512, "--head-width", 256] if "-Ti/" in a.model else []
    teacher = [*edm, *small, "--temperature-steps", n // 16, "--freeze-steps", n // 480]
    alone, unmasked = ["--align-weight", 0], ["--mask-ratio", 0]

    def add(name, title, script, flags, steps=(n,), **more):
        runs[name] = Run(title, script, flags, steps, **more)

    def checkpoint(name, step):
        return f"{a.out}/{name}-{seed}/checkpoints/{step:07d}.pt"

    first = f"Self-Transcendence, after {n // 2} of stage 1"
    stage2 = ["--stage", 2, "--teacher", checkpoint("stage1", n // 2), "--stop-step", n // 4]
    tuned = [*edm, *unmasked, "--init-from", checkpoint("maskdit", n - tuning)]
    tuned += ["--lr", a.lr / 2, "--warmup", 0]  # the EMA starts anew: it warms up again

    add("stage1", "Self-Transcendence, stage 1 alone", transcend, ["--stage", 1], (n // 2, n))
    add("vanilla", "vanilla, flow", sra, alone, colour="#000000")
    add("vanilla_edm", "vanilla, EDM", sra, [*alone, *edm], colour="#888888")
    add("sra", "SRA", sra, [], colour="#0072b2")
    add("maskdit", "MaskDiT", mdt, edm, (n - tuning, n), colour="#e69f00")
    continued = {"after": ("maskdit", n - tuning), "offset": n - tuning, "colour": "#8c6000"}
    add("maskdit_tuned", "MaskDiT, last eighth unmasked", mdt, tuned, (tuning,), **continued)
    add("sddit", "SD-DiT", sd, teacher, colour="#cc79a7")
    after = ("stage1", n // 2)
    add("selftranscendence", first, transcend, stage2, after=after, colour="#009e73")
    add("diversedit", "DiverseDiT", diverse, [], colour="#d55e00")
    add("maskdit_unmasked", "MaskDiT's network, nothing hidden", mdt, [*edm, *unmasked])
    add("sra_no_head", "SRA without its head", sra, ["--head", "none"])
    add("diversedit_no_loss", "DiverseDiT without loss", diverse, ["--diversity-weight", 0])
    short = ["--long-residual", "none"]
    add("diversedit_no_residuals", "DiverseDiT without residuals", diverse, short)
    add("sddit_no_loss", "SD-DiT without its loss, masked", sd, [*teacher, *alone])
    for run in runs.values():
        steps = [n * k // 4 - run.offset for k in ((1, 2, 3, 4) if run.colour else (2, 4))]
        run.measured = tuple(step for step in steps if 0 < step <= run.steps[-1])
    return runs


def chosen(a, seed, ablations=False):
    """Those that are asked for, and what they need; of a run that is only needed, no more."""
    runs = plan(a, seed)
    if set(a.runs or ()) - set(runs):
        sys.exit(f"--runs {' '.join(a.runs)}: choose from {', '.join(runs)}")
    asked = a.runs or [name for name, run in runs.items() if ablations or run.colour]
    needed = dict(run.after for name, run in runs.items() if name in asked and run.after)
    for name in set(needed) - set(asked):
        runs[name].steps, runs[name].measured = (needed[name],), ()
    return {name: run for name, run in runs.items() if name in asked or name in needed}


def words(a, name, run, seed, steps):
    """The training command, relative to the current folder."""
    save_every = run.steps[-1] if run.offset else a.steps // 4
    common = f"""--image-size {a.image_size} --model {a.model} --steps {steps}
        --batch-size {a.batch_size} --lr {a.lr} --warmup {a.warmup} --clip-grad 1 --ema-warmup
        --flip --no-qk-norm --seed {seed} --log-every {a.steps // 40} --sample-every 0
        --save-every {save_every}""".split()
    command = [os.path.relpath(ROOT / run.script), "--data", f"{a.out}/data", *common]
    command += [*a.train_flags, *run.flags, "--out", f"{a.out}/{name}-{seed}"]
    return list(map(str, command))


children, stopped = set(), []


def execute(command, log, threads):
    """Runs a command of ours, its output appended to a file; returns its stdout.

    Raises RuntimeError with the end of that file.
    """
    if stopped:
        raise RuntimeError("stopped")
    with open(log, "a") as file:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None,
        )
        children.add(process)
        if stopped:  # the signal may have come before it was in the set
            process.terminate()
        output, _ = process.communicate()
        children.discard(process)
        file.write(output)
    if process.returncode:
        end = Path(log).read_text()[-2000:]
        raise RuntimeError(f"{' '.join(process.args)} ended with {process.returncode}: {end}")
    return output


def stop(number, _):
    """A signal: what is running saves and ends; the same command goes on."""
    stopped.append(number)
    for process in list(children):
        process.terminate()


def unpack(archive, target, per_class):
    """SPLIT/CLASS/NAME of an archive as target/CLASS/NAME, the first per_class of each (0: all)."""
    if target.exists():
        return
    partial, count = target.with_suffix(".partial"), {}
    shutil.rmtree(partial, ignore_errors=True)
    with zipfile.ZipFile(archive) as file:
        names = [n for n in file.namelist() if n.lower().endswith((".jpg", ".jpeg", ".png"))]
        for name in sorted(names):
            _, group, base = f"//{name}".rsplit("/", 2)
            if group in ("", ".", ".."):
                sys.exit(f"{archive}: {name} is not SPLIT/CLASS/NAME")
            count[group] = count.get(group, 0) + 1
            if per_class and count[group] > per_class:
                continue
            (partial / group).mkdir(parents=True, exist_ok=True)
            (partial / group / base).write_bytes(file.read(name))
    partial.rename(target)


def stack(folder, size, limit, target):
    """Images of FOLDER/CLASS, evenly picked up to a limit, as an .npz that fid.py reads."""
    paths = sorted(folder.glob("*/*"), key=lambda path: path.parts)
    picked = np.linspace(0, len(paths) - 1, min(limit or len(paths), len(paths))).round()
    images = []
    for k in picked.astype(int):
        with Image.open(paths[k]) as image:
            images.append(np.asarray(center_crop(image.convert("RGB"), size)))
    np.savez(target.with_suffix(".partial.npz"), arr_0=np.stack(images))
    target.with_suffix(".partial.npz").rename(target)


def prepare_reference(a):
    """OUT/reference.npz (all test images at that size), OUT/statistics.npz of these,
    OUT/floor.json (the distance of training images)."""
    unpack(a.test, a.out / "test", 0)
    for folder, name, limit in (("test", "reference.npz", None), ("data", "floor.npz", a.num)):
        if not (a.out / name).exists():
            stack(a.out / folder, a.image_size, limit, a.out / name)
    statistics = a.out / "statistics.npz"
    if not statistics.exists():
        words = ["--save-stats", statistics, a.out / "reference.npz"]
        fid(a, words, None)
    measure(a, a.out / "floor.npz", a.out / "floor.json", None)


def fid(a, words, threads):
    script = os.path.relpath(ROOT / "fid.py")
    command = [script, *words, "--features", a.features, "--batch-size", 250]
    return execute(command, a.out / "fid.log", threads)


def measure(a, samples, target, threads):
    if not target.exists():
        text = fid(a, [samples, a.out / "statistics.npz", "--metrics", "fid"], threads)
        target.with_suffix(".partial").write_text(text)
        target.with_suffix(".partial").rename(target)


def keep_to_one_protocol(path, settings):
    """A file written once, with the commit of that time; other settings are refused."""
    if not path.exists():
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        path.write_text(json.dumps({**settings, "commit": done.stdout.strip()}, indent=1) + "\n")
    was = json.loads(path.read_text())
    changed = ", ".join(key for key, value in settings.items() if was.get(key) != value)
    if changed:
        sys.exit(f"{path} is of another comparison ({changed}): use its settings, or another --out")


def protocol_of_training(a):
    settings = {key: getattr(a, key) for key in TRAINING}
    return settings | {"train_sha256": sha256(a.train)}


def protocol_of_measuring(a):
    beside = a.features.with_suffix(".json")  # of cifar10_features.py: its accuracy and settings
    features = json.loads(beside.read_text()) if beside.exists() else {}
    if features.get("sha256", sha256(a.features)) != sha256(a.features):
        sys.exit(f"{beside} describes another file than {a.features}")
    settings = {key: getattr(a, key) for key in MEASURING} | {"test_sha256": sha256(a.test)}
    return settings | {"features": {"sha256": sha256(a.features), **features}}


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def train(a, name, run, seed, needed):
    """One run, after the future of the run that it needs; what is there is not repeated."""
    if needed:
        needed.result()
    folder = a.out / f"{name}-{seed}"
    folder.mkdir(exist_ok=True)
    for steps in run.steps:
        last = folder / "checkpoints" / f"{steps:07d}.pt"
        if not last.exists():
            execute(words(a, name, run, seed, steps), folder / "output.txt", a.threads)
        if not last.exists():
            raise RuntimeError(f"{name}: stopped before step {steps}")


def measure_run(a, name, run, seed):
    """Samples of the last EMA and their distance; what is there already is left as it is."""
    folder, step = a.out / f"{name}-{seed}", run.measured[-1]
    samples, result = folder / f"samples_{step:07d}", folder / f"distance_{step:07d}.json"
    if result.exists() or not (folder / "checkpoints" / f"{step:07d}.pt").exists():
        return
    flags = f"""--num-samples {a.num} --labels balanced --solver heun --steps {a.solver_steps}
        --batch-size 250""".split()
    checkpoint = folder / "checkpoints" / f"{step:07d}.pt"
    command = [os.path.relpath(ROOT / "sample.py"), "--ckpt", checkpoint]
    execute([*command, *flags, "--out", samples], folder / "output.txt", a.threads)
    measure(a, samples / "samples.npz", result, a.threads)
    found = distance(a, name, seed, step)
    print(f"{name}, seed {seed}: {found:.3f} at step {step + run.offset}", flush=True)


# --- report


def distance(a, name, seed, step):
    """The measured distance, or None."""
    path = a.out / f"{name}-{seed}" / f"distance_{step:07d}.json"
    return json.loads(path.read_text())["frechet_distance"] if path.exists() else None


def read_log(a, name, seed):
    lines = (a.out / f"{name}-{seed}" / "log.jsonl").read_text().splitlines()
    return list(map(json.loads, lines))


def seconds(a, name, seed, step):
    """Seconds of training up to a step: sum of images / rate over log.jsonl.

    What was lost in a stop, sampling and saving do not count.
    """
    total, last, rate = 0.0, 0, math.inf
    for line in read_log(a, name, seed):
        if "step" in line and line["step"] <= step:
            rate = line["images_per_s"] or rate  # 0 where a single step was run since a start
            total += (line["step"] - last) * a.batch_size / rate
            last = line["step"]
    return total


def describe(a, name, run, seed, points):
    """An entry of results.json: {step: distance} with what stands in the log and the checkpoint."""
    before = seconds(a, run.after[0], seed, run.after[1]) if run.after else 0.0
    path = a.out / f"{name}-{seed}" / "checkpoints" / f"{run.steps[-1]:07d}.pt"
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["method"]
    model = {name: v for name, v in state.items() if name.startswith("model.")}
    start = [line for line in read_log(a, name, seed) if "start" in line][-1]
    return {
        "title": run.title,
        "noise": run.noise,
        "seed": seed,
        "ablation": not run.colour,
        "command": "python " + " ".join(start["command"]),
        "parameters_sampled": sum(v.numel() for k, v in model.items() if "pos_embed" not in k),
        "seconds_before": before,
        "steps_of_the_run_before": run.after[1] if run.after else 0,
        "points": [
            {
                "step": step + run.offset,
                "seconds": before + seconds(a, name, seed, step),
                "distance": value,
            }
            for step, value in points.items()
        ],
        "hardware": start["hardware"],
        "torch": start["torch"],
    }


def collect(a):
    """Everything that is finished, as one dictionary; ablations stand at the end."""
    results = {}
    seeds = {int(path.parent.name.rsplit("-", 1)[1]) for path in a.out.glob("*-*/log.jsonl")}
    for seed in sorted(seeds):
        for name, run in sorted(plan(a, seed).items(), key=lambda item: not item[1].colour):
            points = {step: distance(a, name, seed, step) for step in run.measured[-1:]}
            if points and None not in points.values():
                results[f"{name}-{seed}"] = describe(a, name, run, seed, points)
    protocol = json.loads((a.out / "protocol.json").read_text())
    protocol["measuring"] = json.loads((a.out / "measuring.json").read_text())
    floor = json.loads((a.out / "floor.json").read_text())
    protocol["measure"] = "Frechet distance in classifier features, not FID"
    protocol["num_reference"] = floor["num_reference"]
    return {"protocol": protocol, "training_images": floor["frechet_distance"], "runs": results}


def table(results):
    """Markdown: a row a run, in each cell a value a seed.

    Time is in units of vanilla flow's of the same seed, mean over seeds.
    """
    runs, names = results["runs"], {}
    for name, run in runs.items():
        names.setdefault(name.rsplit("-", 1)[0], []).append(run)
    steps = sorted({p["step"] for run in runs.values() for p in run["points"]})
    unit = {run["seed"]: run["points"][-1]["seconds"] for run in names.get("vanilla", ())}
    heads = ["run", "noise", "M parameters", *(f"step {s}" for s in steps), "time, all counted"]
    rows = [heads]
    for group in sorted(names.values(), key=lambda runs: runs[0]["ablation"]):
        cells = [
            group[0]["title"],
            group[0]["noise"],
            f"{group[0]['parameters_sampled'] / 1e6:.2f}",
        ]
        points = [p for run in group for p in run["points"]]
        for step in steps:
            cells.append(" / ".join(f"{p['distance']:.2f}" for p in points if p["step"] == step))
        last = [(run["points"][-1]["seconds"], run["seed"]) for run in group]
        costs = [cost / unit[seed] for cost, seed in last if seed in unit]
        rows.append([*cells, f"{sum(costs) / len(costs):.2f}" if costs else ""])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * len(heads) + "|")
    protocol = results["protocol"]["measuring"] | results["protocol"]
    accuracy = protocol["features"].get("accuracy")
    note = (
        f"Frechet distance of {protocol['num']} samples to {protocol['num_reference']} test images "
        "in the features of a classifier (its accuracy on them: "
        f"{f'{accuracy:.1%}' if accuracy else 'not stated'}). This is not FID. "
        f"Training images in place of samples: {results['training_images']:.3f}."
    )
    return "\n".join([*lines, "", note]) + "\n"


def font(size):
    return ImageFont.load_default(size)


class Axis:
    """A logarithmic axis from pixel `start` to pixel `end`."""

    def __init__(self, values, start, end):
        self.low, self.high = math.log(min(values)), math.log(max(values))
        margin = 0.04 * (self.high - self.low or 1)
        self.low, self.high = self.low - margin, self.high + margin
        self.start, self.end = start, end

    def place(self, value):
        part = (math.log(value) - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self):
        """Round numbers: at least three, where one of these grids has them."""
        low, high = math.exp(self.low), math.exp(self.high)
        grid = [m * 10.0**e for e in range(-3, 8) for m in (1, 1.5, 2, 3, 4, 5, 6, 8)]
        found = [t for t in grid if low <= t <= high]
        for step in (1, 0.5, 0.2, 0.1, 0.01):
            if len(found) < 3:
                found = [k * step for k in range(math.ceil(low / step), int(high / step) + 1)]
        return found


def curves(draw, box, lines, label, numbers):
    """Log-log axes in box (left, top, right, bottom).

    lines: (colour, dashed, [(x, y), ...]); numbers: at the x axis, or None.
    """
    left, top, right, bottom = box
    points = [(max(x, 1e-3), max(y, 1e-3)) for *_, line in lines for x, y in line]
    xs, ys = (
        Axis(values, *ends) for values, ends in zip(zip(*points), ((left, right), (bottom, top)))
    )
    for x in numbers or xs.ticks():
        u = xs.place(x)
        draw.line([(u, top), (u, bottom)], "#e4e4e4")
        draw.text((u, bottom + 5), f"{x:g}", "#333333", font(15), "mt")
    for y in ys.ticks():
        v = ys.place(y)
        draw.line([(left, v), (right, v)], "#e4e4e4")
        draw.text((left - 6, v), f"{y:g}", "#333333", font(15), "rm")
    draw.rectangle(box, outline="#333333")
    draw.text(((left + right) / 2, bottom + 26), label, "#333333", font(16), "mt")
    for colour, dashed, line in lines:
        placed = [(xs.place(max(x, 1e-3)), ys.place(max(y, 1e-3))) for x, y in line]
        for start, end in pairwise(placed):
            pieces = max(1, round(math.dist(start, end) / 6)) if dashed else 1
            ends = np.linspace(start, end, pieces + 1)
            for k in range(0, pieces, 2):
                draw.line([*ends[k], *ends[k + 1]], colour, 3)
        for x, y in placed:
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour)


def legend(draw, runs, x, y, width):
    left = x
    for run in runs:
        length = font(15).getlength(run.title) + 50
        if x + length > width:
            x, y = left, y + 22
        draw.line([(x, y + 8), (x + 26, y + 8)], run.colour, 4)
        draw.text((x + 32, y), run.title, "#000000", font(15))
        x += length + 6


def figure(a, results, seed):
    """Distance against steps and against seconds, and below the same twelve seeds of every method.

    Ablations are left out. None, if there is nothing to show.
    """
    found = {name: results["runs"].get(f"{name}-{seed}") for name in plan(a, seed)}
    rows = [(name, run) for name, run in plan(a, seed).items() if run.colour and found[name]]
    if not rows:
        return None
    cell, margin, top = a.image_size * max(1, 64 // a.image_size), 210, 415
    pitch = cell + 4
    width = margin + PER_PICTURE * pitch + 20
    image = Image.new("RGB", (width, top + len(rows) * pitch + 10), "white")
    draw = ImageDraw.Draw(image)
    title = "Frechet distance in features of a small CIFAR-10 classifier (not FID). Dashed: EDM"
    draw.text((60, 12), title, "#000000", font(17))
    middle = width // 2
    steps = sorted({p["step"] for name, _ in rows for p in found[name]["points"]})
    for box, axis, label, numbers in (
        ((60, 40, middle - 25, 330), "step", "steps", steps),
        (
            (middle + 45, 40, width - 20, 330),
            "seconds",
            "seconds of training, stage 1 included",
            None,
        ),
    ):
        lines = []
        for name, run in rows:
            points = [(p[axis], p["distance"]) for p in found[name]["points"]]
            lines.append((run.colour, run.noise == "EDM", points))
        curves(draw, box, lines, label, numbers)
    legend(draw, [run for _, run in rows], 60, 372, width)
    for row, (name, run) in enumerate(rows):
        y = top + row * pitch
        value = found[name]["points"][-1]["distance"]
        text = "\n".join([*textwrap.wrap(run.title, 26), f"{value:.2f}"])
        draw.multiline_text((10, y + cell / 2), text, "#000000", font(15), "lm", spacing=3)
        samples = a.out / f"{name}-{seed}" / f"samples_{run.measured[-1]:07d}" / "samples.npz"
        for k, pixels in enumerate(np.load(samples)["arr_0"][:PER_PICTURE]):
            picture = Image.fromarray(pixels).resize((cell, cell), Image.Resampling.NEAREST)
            image.paste(picture, (margin + k * pitch, y))
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


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--train", type=Path, help="archive of training images")
    add("--test", type=Path, help="archive of test images")
    add("--features", type=Path, help="TorchScript module for fid.py")
    add("--out", type=Path, default=Path("results/compare"))
    add("--image-size", type=int, default=16)
    add("--per-class", type=int, default=0, help="training images of each class; 0: all")
    add("--model", default="DiT-Ti/2")
    add("--steps", type=int, default=2000, help="a multiple of 40")
    add("--batch-size", type=int, default=64)
    add("--lr", type=float, default=1e-3)
    add("--warmup", type=int, default=100)
    add("--num", type=int, default=2000, help="samples a measurement")
    add("--solver-steps", type=int, default=12, help="of Heun's method")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--runs", nargs="+", help="these only, and what they need")
    add("--ablations", action="store_true")
    add("--jobs", type=int, default=1, help="runs at a time")
    add("--threads", type=int, help="OMP_NUM_THREADS of each")
    add("--only", choices=("train", "measure"), help="one half of the work (default: both)")
    add("--report", action="store_true", help="no runs: collect what is there")
    more = "for all training scripts, last: --train-flags --compile ..."
    add("--train-flags", nargs=argparse.REMAINDER, default=[], help=more)
    a = parser.parse_args(argv)
    if a.steps % 40:
        parser.error(f"--steps {a.steps}: must be a multiple of 40")
    if a.report:
        return a
    needed = {"train": ["train"], "measure": ["train", "test", "features"]}
    for name in needed["train" if a.only == "train" else "measure"]:
        path = getattr(a, name)
        if not path or not path.is_file() or (name != "features" and not zipfile.is_zipfile(path)):
            parser.error(f"--{name} {path}: needed, an existing file (an archive: zip)")
    return a


def main():
    a = parse_args()
    if a.report:
        if not (a.out / "protocol.json").exists() or not (a.out / "floor.json").exists():
            sys.exit(f"{a.out}: nothing measured there yet")
        settings = json.loads((a.out / "protocol.json").read_text())
        for key in TRAINING:
            setattr(a, key, settings[key])
        return report(a)
    a.out.mkdir(parents=True, exist_ok=True)
    keep_to_one_protocol(a.out / "protocol.json", protocol_of_training(a))
    if a.only != "train":
        keep_to_one_protocol(a.out / "measuring.json", protocol_of_measuring(a))
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    unpack(a.train, a.out / "data", a.per_class)
    plans = [(seed, chosen(a, seed)) for seed in a.seeds]
    if a.ablations:
        plans.append((a.seeds[0], chosen(a, a.seeds[0], ablations=True)))
    tasks = []
    if a.only != "measure":
        with ThreadPoolExecutor(a.jobs) as pool:
            for seed, runs in plans:
                futures = {}  # in order: a task waits only for those that were started before it
                for name in sorted(runs, key=lambda name: runs[name].offset):  # what waits is last
                    needed = futures.get(runs[name].after[0]) if runs[name].after else None
                    futures[name] = pool.submit(train, a, name, runs[name], seed, needed)
                tasks += futures.values()
    if a.only != "train":
        try:
            prepare_reference(a)
        except RuntimeError as error:
            sys.exit(f"{error}")
        with ThreadPoolExecutor(a.jobs) as pool:
            for seed, runs in plans:
                for name, run in runs.items():
                    if run.measured:
                        tasks.append(pool.submit(measure_run, a, name, run, seed))
    errors = [str(error) for future in tasks if (error := future.exception())]
    for error in dict.fromkeys(errors):
        print(error, file=sys.stderr)
    if a.only != "train":
        report(a)
    if errors or stopped:
        sys.exit("not finished: the same command goes on from here")


if __name__ == "__main__":
    main()
