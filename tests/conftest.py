"""What the tests share: reference values, running scripts, what a run leaves, small networks."""

import contextlib
import importlib
import inspect
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes share a few cores
if "TEST_CUDA" not in os.environ:  # TEST_CUDA=1 pytest -k cuda runs what needs a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "goldens"
sys.path.insert(0, str(ROOT))

CORE = {case["case"]: case for case in json.loads((GOLDENS / "manifest_core.json").read_text())}
CORE |= {case["case"]: case for case in json.loads((GOLDENS / "manifest_onestep.json").read_text())}
EVAL = {case["case"]: case for case in json.loads((GOLDENS / "manifest_eval.json").read_text())}
STATE_DICTS = json.loads((GOLDENS / "eval_state_dicts.json").read_text())

METHODS = {
    "train_sra": "SRA",
    "train_mdt": "MaskDiT",
    "train_discriminative": "SDDiT",
    "train_selftranscendence": "SelfTranscendence",
    "train_diversedit": "DiverseDiT",
}
CACHE = Path(tempfile.gettempdir()) / "tests.cache"
TINY = f"--model DiT-Ti/8 --image-size 16 --batch-size 4 --lr 1e-3 --log-every 3 --cache {CACHE}"
SMALL = {"train_mdt": "--decoder 2 16 2"}
SMALL["train_discriminative"] = "--decoder 2 16 2 --head-width 20 --prototypes 24"
NETWORK = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 32,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 10,
}

close = torch.testing.assert_close


# Reference values (tests/goldens/README_*.md)


def recipe_draw(*key):
    """Generator of a named array: RandomState of the crc32 of "salt:name" or "salt:case:input"."""
    return np.random.RandomState(zlib.crc32(":".join(key).encode()))


def recipe_tensor(salt, name, shape, kind=None, gain=1.0):
    """A weight by the recipe of README_core (kind None) or README_eval (w, b, g, v); float32."""
    draw = recipe_draw(salt, name).standard_normal(shape)
    if kind is None:
        kind = "w" if len(shape) > 1 else "g" if name.endswith("norm.weight") else "b"
    values = {
        "w": lambda: gain * draw / math.sqrt(np.prod(shape[1:])),
        "b": lambda: 0.05 * draw,
        "g": lambda: 1 + 0.05 * draw,
        "v": lambda: 1 + np.abs(0.05 * draw),
    }[kind]()
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


class Golden:
    """One reference case: `inputs` and `outputs` by name; `check` at the manifest's tolerance."""

    manifest = CORE

    def __init__(self, case):
        self.meta = self.manifest[case]
        self.config = self.meta.get("config", {})
        self.checked = set()
        self.read(np.load(GOLDENS / self.meta["file"]))

    def read(self, arrays):
        self.inputs, self.outputs = (
            {name: torch.from_numpy(arrays[spec["key"]]) for name, spec in self.meta[kind].items()}
            for kind in ("inputs", "outputs")
        )

    def weights(self, salt_key="salt"):
        """State dict by the recipe, without position embeddings (the constructor's values)."""
        spec = self.meta["weights"]
        return {
            name: recipe_tensor(spec[salt_key], name, shape)
            for name, shape in spec["state_dict"].items()
            if name not in ("pos_embed", "decoder_pos_embed")
        }

    def network(self):
        """The arguments of a plain network of this case."""
        return {name: self.config[name] for name in NETWORK}

    def check(self, name, value, **tolerance):
        tol = {**self.meta["tolerance"], **self.meta["outputs"][name].get("tol", {}), **tolerance}
        expected = self.outputs[name]
        value = torch.as_tensor(value).detach()
        assert tuple(value.shape) == tuple(expected.shape), (name, value.shape, expected.shape)
        limits = {"rtol": tol["rtol"], "atol": tol["atol"]}
        close(value.double(), expected.double(), **limits, msg=lambda m: f"{name}: {m}")
        self.checked.add(name)

    def all_checked(self, *but):
        """Every output of the case was compared, except those named by a caller with a reason."""
        missing = set(self.outputs) - self.checked - set(but)
        assert not missing, f"not compared: {missing}"


class EvalGolden(Golden):
    """A case of README_eval: inputs are drawn by its recipe, weights come with their kinds."""

    manifest = EVAL

    def read(self, arrays):
        self.salt = self.meta["salt"]
        self.outputs = {name: torch.from_numpy(arrays[name]) for name in self.meta["outputs"]}
        self.inputs = {}
        for name, spec in self.meta["inputs"].items():
            if isinstance(spec, list):
                self.inputs[name] = torch.tensor(spec)
            elif isinstance(spec, dict) and spec["rule"] == "normal":
                self.inputs[name] = self.draw(name, spec["shape"], spec.get("case"))

    def draw(self, name, shape, case=None):
        """An input by the recipe: standard normal float32."""
        values = recipe_draw(self.salt, case or self.meta["case"], name).standard_normal(shape)
        return torch.from_numpy(np.asarray(values, dtype=np.float32))

    def weights(self, state_dict=None, salt=None):
        """State dict by the recipe, without what keeps its constructor's value (pos_embed)."""
        spec = STATE_DICTS[state_dict or self.meta["state_dict"]]
        spec = STATE_DICTS[spec["same_as"]] if "same_as" in spec else spec
        return {
            name: recipe_tensor(salt or self.salt, name, shape, kind)
            for name, (shape, kind) in spec.items()
            if kind != "keep"
        }


@pytest.fixture
def golden():
    return Golden


def official_state(golden, salt_key="salt"):
    """The official state dict of a core case, position embedding included."""
    from models import position_embedding

    state = golden.weights(salt_key)
    shape = golden.meta["weights"]["state_dict"].get("pos_embed")
    if shape:
        state["pos_embed"] = position_embedding(shape[2], int(shape[1] ** 0.5))
    return state


# Small networks and methods


def fill(module, salt):
    """Weights by the recipe, in place of the zeros that hide a block; returns the module."""
    for name, parameter in module.named_parameters():
        parameter.data.copy_(recipe_tensor(salt, name, tuple(parameter.shape)))
    return module


def tiny(**changes):
    """A network of four blocks, 3 x 8 x 8 images and ten classes."""
    from models import DiT

    own = {"hidden_size": 48, "depth": 4, "num_heads": 3}
    return fill(DiT(**{**NETWORK, **own, **changes}), "test")


def official_dit(**changes):
    """A network that `--model DiT-Ti/2` names, with the official code's four channels."""
    shape = {"hidden_size": 128, "depth": 6, "num_heads": 4, "in_channels": 4, "learn_sigma": True}
    return tiny(**{**shape, **changes})


def save_vae(path, seed=0, gain=1.0, levels=4, latent_channels=4):
    """Weights of a small VAE, 4 channels and 8 pixels a side; returns the network."""
    from models import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL([32] * levels, 1, latent_channels)
    for parameter in vae.parameters():
        parameter.data.mul_(gain)
    torch.save(vae.state_dict(), path)
    return vae


def method_class(script):
    return getattr(importlib.import_module(script), METHODS[script])


def small(script, flags="", **network):
    """A method on six blocks, 3 x 8 x 8 images and ten classes; model and EMA by the recipe."""
    from diffusion import make_diffusion

    args = importlib.import_module(script).parse_args(words(SMALL.get(script, ""), flags))
    diffusion = make_diffusion(args.diffusion)
    own = {"depth": 6, "qk_norm": args.qk_norm, "learn_sigma": diffusion.learned_variance}
    torch.manual_seed(0)
    method = method_class(script)(args, {**NETWORK, **own, **network}, diffusion)
    fill(method.model, "student")
    fill(method.ema, "teacher")
    return method


def draws(method, n=4):
    """Images, labels and all draws that the method's forward takes; the second label is dropped."""
    generator = torch.Generator().manual_seed(1)
    x0, noise, teacher_noise = torch.randn(3, n, 3, 8, 8, generator=generator)
    u, drop = torch.rand(2, n, generator=generator)
    drop = 0.1 + 0.9 * drop
    drop[1] = 0.05
    torch.manual_seed(2)
    every = {"t": method.diffusion.draw_t(n, "cpu"), "noise": noise, "drop": drop, "u": u}
    every |= {"teacher_noise": teacher_noise, "mask": torch.rand(n, 16, generator=generator)}
    taken = inspect.signature(method.forward).parameters
    return x0, torch.arange(n) % 10, {name: every[name] for name in every if name in taken}


def one_by_one(method, images, labels, draws, name):
    """A term of the loss for every image alone: (N,)."""
    values = []
    for k in range(len(images)):
        row = slice(k, k + 1)
        own = {key: draw[row] for key, draw in draws.items()}
        values.append(method(images[row], labels[row], **own)[name])
    return torch.stack(values).detach()


def forwards(module):
    """What a module is given and returns: a list that grows."""
    seen = []
    module.register_forward_hook(lambda module, inputs, output: seen.append((inputs, output)))
    return seen


def watch(method, teacher):
    """Records what the teacher is given and returns, what the student is, the head's output."""
    seen = {"calls": 0}
    tokens_after = teacher.tokens_after

    def recorded(x, t, y, block):
        seen.update(x=x, t=t, y=y, tokens=tokens_after(x, t, y, block), calls=seen["calls"] + 1)
        return seen["tokens"]

    def student(module, inputs, output):
        seen.update(x_t=inputs[0], t_s=inputs[1], y_student=inputs[2], out=output[0])

    teacher.tokens_after = recorded
    method.head.register_forward_hook(lambda module, inputs, output: seen.update(projected=output))
    method.model.register_forward_hook(student)
    return seen


# Images


def make_folder(path, classes=("ant", "bee"), each=4, size=20):
    """An image folder of random pixels."""
    rng = np.random.default_rng(0)
    for name in classes:
        (path / name).mkdir(parents=True)
        for k in range(each):
            pixels = rng.integers(0, 256, (size, size, 3), np.uint8)
            Image.fromarray(pixels).save(path / name / f"{k}.png")
    return path


# Running scripts, in this process and in others


def words(*flags):
    """Flags of a command line; a string may hold several."""
    return " ".join(map(str, flags)).split()


def call(script, *flags, method=None):
    """The script's main in this process; sys.argv and signal handlers are put back."""
    module = importlib.import_module(script)
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {s: signal.getsignal(s) for s in stops}
    argv = sys.argv
    sys.argv = [f"{script}.py"]
    try:
        if script == "fid":
            module.main(words(*flags, "--device cpu"))
        elif script == "sample":
            module.main(module.parse_args(words(*flags)))
        else:
            args = module.parse_args(words(TINY, *flags))
            module.main(method or method_class(script), args)
    finally:
        sys.argv = argv
        for s, handler in handlers.items():
            signal.signal(s, handler)


def train(out, *flags, script="train_sra", method=None):
    """Train a tiny network in this process."""
    call(script, *flags, "--out", out, method=method)


def terminate_after(step, script="train_sra", number=signal.SIGTERM):
    """A method that is sent a signal during that 0-based step: the run stops soon, and saves."""

    class Interrupted(method_class(script)):
        def after_step(self, now, steps):
            super().after_step(now, steps)
            if now == step:
                os.kill(os.getpid(), number)

    return Interrupted


def outcome(capfd, script, *flags):
    """Exit code and lines on stderr, Python's warnings with them, progress without."""
    capfd.readouterr()
    code = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            call(script, *flags)
        except SystemExit as stop:
            code = stop.code
    lines = capfd.readouterr().err.split("\n")
    lines = [line for line in lines if line and "\r" not in line and not line.startswith("step ")]
    silent = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
    shown = [str(w.message) for w in caught if not issubclass(w.category, silent)]
    return code, shown + lines


def one_line(capfd, script, *flags):
    """The script must end with exit code 2 and one line on stderr, which is returned."""
    code, lines = outcome(capfd, script, *flags)
    assert code == 2 and len(lines) == 1 and lines[0].startswith(f"{script}.py: error: "), lines
    return lines[0]


def command(script, *flags, processes=1, launch=""):
    """A command line, under torchrun for several processes."""
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node {processes} {launch}"
    agent = torchrun.split() if processes > 1 else []
    return [sys.executable, *agent, str(ROOT / f"{script}.py"), *words(*flags)]


def start(script, *flags, processes=1, launch="", **popen):
    """The script as a process that runs on, without its output."""
    line = command(script, *flags, processes=processes, launch=launch)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": ROOT}
    return subprocess.Popen(line, **quiet, **popen)


def workers(agent):
    """Processes that torchrun started, by number of the process."""
    lists = [path.read_text() for path in Path(f"/proc/{agent.pid}/task").glob("*/children")]
    return sorted(map(int, " ".join(lists).split()))


def run(script, *flags, processes=1, code=0):
    """The script as a user runs it."""
    line = command(script, *flags, processes=processes)
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == code, result.stdout + result.stderr
    return result


def wait_for(happened, process, timeout=120):
    """Whether it happened before the process ended."""
    deadline = time.time() + timeout
    while process.poll() is None and time.time() < deadline:
        if happened():
            return True
        time.sleep(0.01)
    return False


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def as_rank(rank, port, world=2):
    """Make this process one of a group, as torchrun does."""
    torch.set_num_threads(1)
    own = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()}, MASTER_ADDR="127.0.0.1")


@contextlib.contextmanager
def process_group(rank, port, world=2):
    as_rank(rank, port, world)
    torch.distributed.init_process_group("gloo")
    yield
    torch.distributed.destroy_process_group()


# What a run leaves. Only the functions down to `assert_same_run` know how a checkpoint is laid out.

STATE = ("method", "optimizer", "step")


def checkpoint_path(out, step):
    return Path(out) / "checkpoints" / f"{step:07d}.pt"


def saved_steps(out):
    return sorted(int(path.stem) for path in (Path(out) / "checkpoints").glob("*.pt"))


def checkpoint(out, step):
    return torch.load(checkpoint_path(out, step), weights_only=True)


def network_state(out, step, part="ema"):
    """Weights of the network (part "model") or of its average ("ema") in a checkpoint."""
    state = checkpoint(out, step)["method"]
    names = [name for name in state if name.startswith(f"{part}.")]
    return {name.removeprefix(f"{part}."): state[name] for name in names}


def change_average(out, step, change):
    """Apply a function to every tensor of the average in a checkpoint."""
    saved = checkpoint(out, step)
    for name, tensor in saved["method"].items():
        saved["method"][name] = change(tensor) if name.startswith("ema.") else tensor
    torch.save(saved, checkpoint_path(out, step))


def save_teacher(path, model, ema=None, **args):
    """A checkpoint of a network alone, as the scripts write it; returns its path."""
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {f"ema.{name}": tensor for name, tensor in (ema or model).state_dict().items()}
    content = {"method": state, "optimizer": {}, "step": 1}
    own = {"network": model.config, "diffusion": "flow", "vae_hash": None, "label_drop": 0.1}
    content["args"] = {**own, **args}
    torch.save(content, path)
    return path


def assert_same(a, b, path=""):
    """Bitwise equality of nested dicts, lists and tensors."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert set(a) == set(b), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert_same(dict(enumerate(a)), dict(enumerate(b)), path)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    else:
        assert a == b, path


def assert_same_run(a, b, step):
    """Two runs hold bitwise the same weights, average, method state and optimizer."""
    states = [checkpoint(out, step) for out in (a, b)]
    assert_same(*({part: s[part] for part in STATE} for s in states))


def log_lines(out):
    """log.jsonl without the records of starts and without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "step" in line]
    clock = ("images_per_s", "time", "seconds")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def logged(out, step):
    """A function: has the log come to that step?"""
    log = Path(out) / "log.jsonl"
    return lambda: log.exists() and f'"step": {step},' in log.read_text()
