r"""Vanilla and the five methods side by side: same encoder, images, batch, learning rate, EMA, seed
and sampler, equal steps. README.md beside this file has protocol, results, and how to read them.

    python tests/comparison/compare.py --train cifar10-train.zip --seeds 0 1 2 --ablations \
        --jobs 2 --threads 1 --only train
    python tests/comparison/compare.py --train cifar10-train.zip --test cifar10-test.zip \
        --features features.pt efficientnet.pt --seeds 0 1 2 --ablations --only measure
    OMP_NUM_THREADS=1 python tests/comparison/compare.py --only time    # on a quiet machine
    python tests/comparison/compare.py --only report    # no runs: what is there, collected

--ablations adds, with the first seed, the runs that decide something. The archives hold
SPLIT/CLASS/NAME.jpg. --features are networks for fid.py, as cifar10_features.py and
imagenet_features.py save them; distances are Frechet's in the space of these features: not FID.

Every run is a command of a training script, with a checkpoint at each quarter of the steps.
Measuring takes the runs that have ended, also beside the training. probe.py: held-out loss of EMA
and raw weights at each quarter, linear probe at the end, with seed 0 at each quarter and level.
sample.py: --num images of the last EMA, unguided, from the same noise and labels for all; fid.py
compares them with all test images. "time": what a step of each run costs, all alternating in one
process (costs.json).

The same command goes on where it was stopped. --out keeps to one protocol: other settings, archives
or features are refused. Report: results.json, table.md, figure.png, probe.png and logs/ in --out.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # and probe.py adds its parent

import benchmark
import probe

from models import parse_model, write_atomically
from train_sra import Images

ROOT = Path(__file__).resolve().parents[2]
TRAINING = "image_size model steps batch_size lr warmup threads train_flags".split()
LEVEL = "0.3"  # of the probe
MEASURES = {  # of probe.py: at which checkpoints, weights, levels; more with seed 0
    "raw": (slice(None), "model", [], []),
    "ema": (slice(-1), "ema", [], [LEVEL]),
    "end": (slice(-1, None), "ema", [LEVEL], ["0.7", "0.5", "0.1"]),
}
DIGITS = {"loss": 4, "probe": 1, "distance": 2}


@dataclass
class Run:
    """One training command.

    steps: where it stops, in turn; after: (run, step) that it starts from, whose cost counts as its
    own; offset: steps of the run that it continues, in the same network; colour: in the figure,
    none for an ablation; measured: its own steps at which it is measured; phases: (step, run) up to
    which a step costs what it costs in that run, if not in itself; baseline: with what it is
    compared, a run of the same noise and network.
    """

    title: str
    script: str
    flags: list
    steps: tuple
    after: tuple = ()
    offset: int = 0
    colour: str = ""
    measured: tuple = ()
    phases: tuple = ()
    baseline: str = "vanilla"

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

    def of_run(name, step):
        return checkpoint(a.out / f"{name}-{seed}", step)

    stage2 = ["--stage", 2, "--teacher", of_run("stage1", n // 2), "--stop-step", n // 4]
    tuned = [*edm, *unmasked, "--init-from", of_run("maskdit", n - tuning)]
    tuned += ["--lr", a.lr / 2, "--warmup", 0]  # the EMA starts anew: it warms up again

    add("stage1", "Self-Transcendence, stage 1", transcend, ["--stage", 1], (n // 2,))
    add("vanilla", "vanilla, flow", sra, alone, colour="#000000")
    own = {"colour": "#888888", "baseline": "vanilla_edm"}
    add("vanilla_edm", "vanilla, EDM", sra, [*alone, *edm], **own)
    decoder = {"colour": "#56b4e9", "baseline": "vanilla_edm"}
    add("maskdit_unmasked", "vanilla, EDM, with decoder", mdt, [*edm, *unmasked], **decoder)
    add("sra", "SRA", sra, [], colour="#0072b2")
    with_decoder = {"baseline": "maskdit_unmasked"}
    add("maskdit", "MaskDiT", mdt, edm, (n - tuning, n), colour="#e69f00", **with_decoder)
    add("sddit", "SD-DiT", sd, teacher, colour="#cc79a7", **with_decoder)
    stages = {"after": ("stage1", n // 2), "colour": "#009e73"}
    stages["phases"] = ((n // 4, "selftranscendence"), (n, "vanilla"))
    add("selftranscendence", "Self-Transcendence", transcend, stage2, **stages)
    add("diversedit", "DiverseDiT", diverse, [], colour="#d55e00")
    continued = {"after": ("maskdit", n - tuning), "offset": n - tuning, **with_decoder}
    continued["phases"] = ((tuning, "maskdit_unmasked"),)
    add("maskdit_tuned", "MaskDiT, last eighth unmasked", mdt, tuned, (tuning,), **continued)
    add("diversedit_no_loss", "DiverseDiT without loss", diverse, ["--diversity-weight", 0])
    masked = [*teacher, *alone]
    add("sddit_no_loss", "SD-DiT without its loss, masked", sd, masked, **with_decoder)
    for run in runs.values():
        steps = [n * k // 4 - run.offset for k in ((1, 2, 3, 4) if run.colour else (4,))]
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


def unpack(archive, target):
    """SPLIT/CLASS/NAME of an archive as target/CLASS/NAME."""
    if target.exists():
        return
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with zipfile.ZipFile(archive) as file:
        for name in file.namelist():
            if name.lower().endswith((".jpg", ".jpeg", ".png")):
                group, base = name.split("/")[-2:]
                (partial / group).mkdir(parents=True, exist_ok=True)
                (partial / group / base).write_bytes(file.read(name))
    partial.rename(target)


def images_of(a, folder):
    about = {"data": str(folder), "image_size": a.image_size, "cache": None, "vae_scale": 1}
    data = Images(argparse.Namespace(**about), None)
    data.make_shards("cpu", 0, 1)
    return data


def stack(data, most, target):
    """Images evenly picked, as an .npz that fid.py reads."""
    picked = np.linspace(0, len(data.files) - 1, min(most, len(data.files))).round().astype(int)
    images, _ = data.read([(k, False) for k in picked.tolist()], False)
    images = images.permute(0, 2, 3, 1).numpy()
    write_atomically(target, lambda file: np.savez(file, arr_0=images))


def prepare_reference(a):
    """OUT/reference.npz (all test images at that size), floor.npz (as many training images as
    samples), and for each features statistics_NAME.npz and floor_NAME.json (their distance)."""
    unpack(a.test, a.out / "test")
    for folder, name, most in (("test", "reference.npz", 100_000), ("data", "floor.npz", a.num)):
        if not (a.out / name).exists():
            stack(images_of(a, a.out / folder), most, a.out / name)
    for features in a.features:
        statistics = a.out / f"statistics_{features.stem}.npz"
        if not statistics.exists():
            fid(a, features, ["--save-stats", statistics, a.out / "reference.npz"])
    measure(a, a.out / "floor.npz", a.out, "floor")


def fid(a, features, words):
    command = [os.path.relpath(ROOT / "fid.py"), *words, "--features", features]
    return execute([*command, "--batch-size", 10], a.out / "fid.log", a.threads)  # fits the caches


def measure(a, samples, folder, name):
    """The distance of samples in each features, as FOLDER/NAME_FEATURES.json."""
    for features in a.features:
        target = folder / f"{name}_{features.stem}.json"
        if not target.exists():
            words = [samples, a.out / f"statistics_{features.stem}.npz", "--metrics", "fid"]
            text = fid(a, features, words)
            write_atomically(target, lambda file, text=text: file.write(text.encode()))


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


def protocol_of_measuring(a):
    settings = {key: getattr(a, key) for key in ("num", "solver_steps", "images")}
    settings["test_sha256"] = sha256(a.test)
    for features in a.features:
        beside = features.with_suffix(".json")  # how it was made, and its accuracy
        about = json.loads(beside.read_text()) if beside.exists() else {}
        if about.get("sha256", sha256(features)) != sha256(features):
            sys.exit(f"{beside} describes another file than {features}")
        settings[f"features {features.stem}"] = {"sha256": sha256(features), **about}
    return settings


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def train(a, name, run, seed, needed):
    """One run, after the future of the run that it needs; what is there is not repeated."""
    if needed:
        needed.result()
    folder = a.out / f"{name}-{seed}"
    folder.mkdir(exist_ok=True)
    for steps in run.steps:
        last = checkpoint(folder, steps)
        if not last.exists():
            execute(words(a, name, run, seed, steps), folder / "output.txt", a.threads)
        if not last.exists():
            raise RuntimeError(f"{name}: stopped before step {steps}")


def measure_run(a, name, run, seed):
    """Probes, samples and distances of a run; what is there already is left as it is."""
    folder = a.out / f"{name}-{seed}"
    log, checkpoints = folder / "output.txt", [checkpoint(folder, step) for step in run.measured]
    if not checkpoints[-1].exists():
        return
    for kind, (which, weights, levels, more) in MEASURES.items():
        if checkpoints[which] and not (folder / kind / "probe.json").exists():
            flags = ["--data", a.out / "data", "--test", a.out / "test", "--out", folder / kind]
            levels = levels + more * (seed == 0)
            flags += ["--weights", weights, "--levels", *levels, "--images", *a.images]
            command = [os.path.relpath(probe.__file__), *checkpoints[which], *flags]
            execute(command, log, a.threads)
    samples = folder / "samples_end" / "samples.npz"
    if not samples.exists():
        flags = f"""--num-samples {a.num} --labels balanced --solver heun --steps {a.solver_steps}
            --batch-size 250""".split()
        command = [os.path.relpath(ROOT / "sample.py"), "--ckpt", checkpoints[-1], *flags]
        execute([*command, "--out", samples.parent], log, a.threads)
    measure(a, samples, folder, "distance")
    print(f"{name}, seed {seed}: measured", flush=True)


def checkpoint(folder, step):
    return folder / "checkpoints" / f"{step:07d}.pt"


def time_steps(a):
    """OUT/costs.json: the cost of a step of each run in units of vanilla's, alternating."""
    data = images_of(a, a.out / "data")
    benchmark.pixels = lambda *_: data
    network = {**parse_model(a.model), "input_size": a.image_size, "in_channels": 3}
    network |= {"num_classes": len(data.classes), "learn_sigma": False}
    options = argparse.Namespace(batch_size=a.batch_size, diffusion="flow", cache=None)
    cpu, rows = torch.device("cpu"), []
    methods = {f"{module.__name__}.py": (module, m) for module, m, _ in benchmark.METHODS.values()}
    for name, run in plan(a, a.seeds[0]).items():
        benchmark.METHODS[name] = (*methods[run.script], list(map(str, run.flags)))
        if not run.offset:
            rows.append(benchmark.Row(name, network, False, options, cpu))
    for k in range(33):  # three to warm up
        for row in rows:
            row.step(k % 8)  # at steps before any --stop-step
    seconds = {row.name: np.median(row.times[3:]) for row in rows}
    costs = {name: round(value / seconds["vanilla"], 3) for name, value in seconds.items()}
    about = {"seconds": seconds["vanilla"], "threads": torch.get_num_threads(), "costs": costs}
    (a.out / "costs.json").write_text(json.dumps(about, indent=1) + "\n")


# --- report


def price(runs, costs, name, step):
    """Cost up to a step of the run, in steps of vanilla, with that of the run before."""
    run, total, done = runs[name], 0.0, 0
    if run.after:
        total = price(runs, costs, *run.after)
    for until, row in run.phases or ((step, name),):
        total += (min(step, until) - done) * costs[row]
        done = min(step, until)
    return total


def describe(folder, run):
    """An entry of results.json; None, if something is not measured yet."""
    kinds = [kind for kind in MEASURES if kind != "ema" or len(run.measured) > 1]
    paths = [folder / kind / "probe.json" for kind in kinds]
    distances = sorted(folder.glob("distance_*.json"))
    floors = len(list(folder.parent.glob("floor_*.json")))  # in the features that are asked for
    if not floors or len(distances) < floors or not all(path.exists() for path in paths):
        return None
    raw, *more = (json.loads(path.read_text())["networks"] for path in paths)
    averaged = [entry for part in more for entry in part]
    probed = [entry["levels"][LEVEL] for entry in averaged if entry.get("levels")]
    for level, found in averaged[-1]["levels"].items():
        for key in ("strength", "time", *(("cka", "cosine") if level != LEVEL else ())):
            found.pop(key)  # the matrices of one level are enough
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    start = [line for line in lines if "start" in line][-1]
    return {
        **{"title": run.title, "noise": run.noise, "baseline": run.baseline},
        "command": "python " + " ".join(start.get("run", start)["command"]),
        "steps": [step + run.offset for step in run.measured],
        "loss_ema": [np.mean(entry["loss"]).round(5) for entry in averaged],
        "loss_raw": [np.mean(entry["loss"]).round(5) for entry in raw],
        "bins_ema": [round(value, 5) for value in averaged[-1]["loss"]],
        "best_block": [100 * max(found["accuracy"][1:]) for found in probed],
        "levels": dict(sorted(averaged[-1]["levels"].items(), reverse=True)),
        "distance": {path.stem.partition("_")[2]: distance(path) for path in distances},
    }


def distance(path):
    return json.loads(path.read_text())["frechet_distance"]


def collect(a):
    """Everything that is measured, as one dictionary; ablations stand at the end."""
    runs, costs = {}, a.out / "costs.json"
    costs = json.loads(costs.read_text()) if costs.exists() else {}
    order = sorted(plan(a, 0).items(), key=lambda item: not item[1].colour)
    for name, _ in order:
        for folder in sorted(a.out.glob(f"{name}-[0-9]*")):
            planned = plan(a, int(folder.name.rsplit("-", 1)[1]))
            entry = describe(folder, planned[name])
            if entry and costs:
                steps = planned[name].measured
                entry["cost"] = [price(planned, costs["costs"], name, step) for step in steps]
            if entry:
                runs[folder.name] = entry
    protocol = json.loads((a.out / "protocol.json").read_text())
    protocol["measuring"] = json.loads((a.out / "measuring.json").read_text())
    floor = {path.stem[6:]: distance(path) for path in sorted(a.out.glob("floor_*.json"))}
    return {"protocol": protocol, "costs": costs, "training_images": floor, "runs": runs}


def numbers(run):
    row = {"loss, EMA": run["loss_ema"][-1], "loss, raw": run["loss_raw"][-1]}
    row["probe, %"] = run["best_block"][-1]
    return row | {f"distance, {name}": value for name, value in run["distance"].items()}


def loss_at(run, cost):
    """The held-out loss (EMA) when a run has cost that much; between quarters linear in 1 / step,
    which predicts a quarter from its neighbours much better than linear in steps."""
    step = np.interp(cost, run["cost"], run["steps"])
    return np.interp(-1 / step, [-1 / step for step in run["steps"]], run["loss_ema"])


def table(results, paired):
    """Markdown: a row a run, mean and range over seeds; paired: of the differences from its
    baseline with the same seed."""
    groups, lines = {}, []
    for name, run in results["runs"].items():
        row, about = numbers(run), {"run": run["title"], "noise": run["noise"]}
        other = results["runs"].get(f"{run['baseline']}-{name.rsplit('-', 1)[1]}", run)
        if not paired and "cost" in run:
            about["cost"] = f"{run['cost'][-1] / results['protocol']['steps']:.2f}"
        if paired:
            about = {"run": run["title"], "minus": other["title"]}
            row = {key: row[key] - value for key, value in numbers(other).items()}
            cost = min(entry.get("cost", [0])[-1] for entry in (run, other))
            if cost and cost >= run["cost"][0]:  # an ablation has its end alone
                row["loss, EMA, at equal cost"] = loss_at(run, cost) - loss_at(other, cost)
        if not paired or other is not run:
            groups.setdefault(run["title"], (about, []))[1].append(row)
    for about, rows in groups.values():
        cells = {**about, "seeds": str(len(rows))}
        for key in rows[0]:
            values = [row[key] for row in rows]
            form = f"{'+' if paired else ''}.{DIGITS[key.partition(',')[0]]}f"
            low, mean, high = (format(f(values), form) for f in (min, np.mean, max))
            cells[key] = mean if len(values) == 1 else f"{mean} ({low} to {high})"
        lines = lines or ["| " + " | ".join(cells) + " |", "|---" * len(cells) + "|"]
        lines.append("| " + " | ".join(cells.values()) + " |")
    return "\n".join(lines)


def figure(shown, results):
    """Held-out loss minus the baseline's against steps, and itself against cost; a line a seed."""
    image = Image.new("RGB", (1200, 720), "white")
    draw = ImageDraw.Draw(image)
    of_title = {title: (colour, width) for title, colour, width, _ in shown}
    for column, noise in enumerate(("flow", "EDM")):
        by_steps, by_cost = [], []
        for name, run in results["runs"].items():
            if run["title"] in of_title and run["noise"] == noise:
                form, losses = of_title[run["title"]], run["loss_ema"]
                other = results["runs"].get(f"{run['baseline']}-{name.rsplit('-', 1)[1]}")
                if other:
                    minus = np.subtract(losses, other["loss_ema"])
                    by_steps.append((*form, list(zip(run["steps"], minus))))
                by_cost.append((*form, list(zip(run.get("cost", run["steps"]), losses))))
        title = f"held-out loss, {noise}"
        titles = f"{title}, minus its baseline, by steps", f"{title}, by cost"
        for row, (lines, title) in enumerate(zip((by_steps, by_cost), titles)):
            if lines:
                left, top = 70 + column * 600, 35 + row * 320
                probe.curves(draw, (left, top, left + 510, top + 260), lines, title)
    probe.legend(draw, [entry[:2] for entry in shown], 60, 660)
    return image


def report(a):
    results = collect(a)
    rows = [f'  "{name}": {json.dumps(run)}' for name, run in results["runs"].items()]
    others = json.dumps({k: v for k, v in results.items() if k != "runs"}, indent=1)[:-2]
    text = f'{others},\n "runs": {{\n' + ",\n".join(rows) + "\n }\n}\n"  # a line a run
    (a.out / "results.json").write_text(text)
    floor = ", ".join(f"{value:.3f} ({k})" for k, value in results["training_images"].items())
    floor = f"Distances are not FID. Training images in place of samples: {floor}."
    parts = [table(results, False), floor, "Minus its baseline:", table(results, True)]
    text = "\n\n".join(parts) + "\n"
    (a.out / "table.md").write_text(text)
    (a.out / "logs").mkdir(exist_ok=True)
    for path in a.out.glob("*-*/log.jsonl"):
        shutil.copyfile(path, a.out / "logs" / f"{path.parent.name}.jsonl")
    shown = []
    for name, run in plan(a, a.seeds[0]).items():
        found = results["runs"].get(f"{name}-{a.seeds[0]}")
        if run.colour and found:
            shown.append((run.title, run.colour, 1 if run.noise == "EDM" else 2, found))
    if shown:
        figure(shown, results).save(a.out / "figure.png", optimize=True)
        probe.figure(shown).save(a.out / "probe.png", optimize=True)
    files = "results.json, table.md, figure.png, probe.png and logs/"
    print(f"\n{text}\n{files} are in {a.out}", flush=True)


def parse_args(argv=None):
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--train", type=Path, help="archive of training images")
    add("--test", type=Path, help="archive of test images")
    add("--features", type=Path, nargs="+", default=[], help="TorchScript modules for fid.py")
    add("--out", type=Path, default=Path("results/compare"))
    add("--image-size", type=int, default=16)
    add("--model", default="DiT-Ti/2")
    add("--steps", type=int, default=1440, help="a multiple of 40")
    add("--batch-size", type=int, default=16)
    add("--lr", type=float, default=1e-3)
    add("--warmup", type=int, default=100)
    add("--num", type=int, default=2000, help="samples a measurement")
    add("--solver-steps", type=int, default=8, help="of Heun's method")
    add("--images", type=int, nargs=3, default=[3000, 3000, 200], help="of probe.py")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--runs", nargs="+", help="these only, and what they need")
    add("--ablations", action="store_true")
    add("--jobs", type=int, default=1, help="runs at a time")
    add("--threads", type=int, help="OMP_NUM_THREADS of each")
    parts = ("train", "measure", "time", "report")
    add("--only", choices=parts, help="a part of the work (default: train, measure, report)")
    more = "for all training scripts, last: --train-flags --compile ..."
    add("--train-flags", nargs=argparse.REMAINDER, default=[], help=more)
    a = parser.parse_args(argv)
    if a.steps % 40:
        parser.error(f"--steps {a.steps}: must be a multiple of 40")
    needed = [("train", a.train), ("test", a.test)][: 1 if a.only == "train" else 2]
    if a.only in ("time", "report"):
        return a
    for name, path in needed:
        if not path or not zipfile.is_zipfile(path):
            parser.error(f"--{name} {path}: needed, an archive (zip)")
    missing = [path for path in a.features if not path.is_file()]
    if missing or (a.only != "train" and not a.features):
        parser.error(f"--features {' '.join(map(str, missing))}: needed, existing files")
    return a


def main():
    a = parse_args()
    if a.only in ("time", "report"):
        if not (a.out / "protocol.json").exists():
            sys.exit(f"{a.out}: nothing there yet")
        settings = json.loads((a.out / "protocol.json").read_text())
        for key in TRAINING:
            setattr(a, key, settings[key])
        return time_steps(a) if a.only == "time" else report(a)
    a.out.mkdir(parents=True, exist_ok=True)
    settings = {key: getattr(a, key) for key in TRAINING} | {"train_sha256": sha256(a.train)}
    keep_to_one_protocol(a.out / "protocol.json", settings)
    if a.only != "train":
        keep_to_one_protocol(a.out / "measuring.json", protocol_of_measuring(a))
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    unpack(a.train, a.out / "data")
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
