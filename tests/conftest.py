"""Shared by the tests: the repository root on the path, and readers for the reference values in tests/goldens (see its README files)."""

import json
import math
import os
import sys
import zlib
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # of the processes that tests start: several share a few cores
if (
    "TEST_CUDA" not in os.environ
):  # the tests are about the CPU; TEST_CUDA=1 pytest -k cuda runs those that need a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "goldens"
sys.path.insert(0, str(ROOT))

CORE = {case["case"]: case for case in json.loads((GOLDENS / "manifest_core.json").read_text())}
EVAL = {case["case"]: case for case in json.loads((GOLDENS / "manifest_eval.json").read_text())}
STATE_DICTS = json.loads((GOLDENS / "eval_state_dicts.json").read_text())


@pytest.fixture(autouse=True)
def put_back_excepthook(monkeypatch):
    """The training scripts set it, and some tests run them in this process."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def recipe_draw(*key):
    """The generator of one named array: numpy's legacy RandomState seeded with the crc32 of "salt:name" or "salt:case:input"."""
    return np.random.RandomState(zlib.crc32(":".join(key).encode()))


def recipe_tensor(salt, name, shape, kind=None, gain=1.0):
    """A weight by the recipe of README_core (kind None) or README_eval (kind w, b, g, v); float32."""
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
    """One reference case: `g.inputs[name]`, `g.outputs[name]` as tensors, `g.check(name, value)` at the manifest's own tolerance."""

    def __init__(self, case):
        self.meta = CORE[case]
        arrays = np.load(GOLDENS / self.meta["file"])
        self.config = self.meta.get("config", {})
        self.inputs = {
            name: torch.from_numpy(arrays[spec["key"]])
            for name, spec in self.meta["inputs"].items()
        }
        self.outputs = {
            name: torch.from_numpy(arrays[spec["key"]])
            for name, spec in self.meta["outputs"].items()
        }
        self.checked = set()

    def weights(self, salt_key="salt"):
        """State dict by the recipe; pos_embed is left out (it keeps the constructor's sin-cos values)."""
        spec = self.meta["weights"]
        return {
            name: recipe_tensor(spec[salt_key], name, shape)
            for name, shape in spec["state_dict"].items()
            if name not in ("pos_embed", "decoder_pos_embed")
        }

    def check(self, name, value, **tolerance):
        tol = {**self.meta["tolerance"], **self.meta["outputs"][name].get("tol", {}), **tolerance}
        expected = self.outputs[name]
        value = torch.as_tensor(value)
        assert tuple(value.shape) == tuple(expected.shape), (
            f"{name}: shape {tuple(value.shape)}, expected {tuple(expected.shape)}"
        )
        torch.testing.assert_close(
            value.double(),
            expected.double(),
            rtol=tol["rtol"],
            atol=tol["atol"],
            msg=lambda m: f"{name}: {m}",
        )
        self.checked.add(name)

    def all_checked(self, *but):
        """Every output of the case was compared (but those named, for which the caller states why)."""
        assert self.checked | set(but) == set(self.outputs), (
            f"not compared: {set(self.outputs) - self.checked - set(but)}"
        )


class EvalGolden(Golden):
    """A case of README_eval: inputs are drawn by its recipe, weights come with their kinds; gradients have a tolerance of their own."""

    def __init__(self, case):
        self.meta = EVAL[case]
        arrays = np.load(GOLDENS / self.meta["file"])
        self.config, self.salt = self.meta.get("config", {}), self.meta["salt"]
        self.outputs = {name: torch.from_numpy(arrays[name]) for name in self.meta["outputs"]}
        self.inputs, self.checked = {}, set()
        for name, spec in self.meta["inputs"].items():
            if isinstance(spec, list):
                self.inputs[name] = torch.tensor(spec)
            elif isinstance(spec, dict) and spec["rule"] == "normal":
                self.inputs[name] = self.draw(name, spec["shape"], spec.get("case", case))

    def draw(self, name, shape, case=None):
        """An input by the recipe: standard normal float32."""
        values = recipe_draw(self.salt, case or self.meta["case"], name).standard_normal(shape)
        return torch.from_numpy(np.asarray(values, dtype=np.float32))

    def weights(self, state_dict=None, salt=None):
        """State dict by the recipe, without what keeps its constructor's value (pos_embed)."""
        spec = STATE_DICTS[state_dict or self.meta["state_dict"]]
        spec = STATE_DICTS[spec["same_as"]] if "same_as" in spec else spec
        return {
            n: recipe_tensor(salt or self.salt, n, shape, kind)
            for n, (shape, kind) in spec.items()
            if kind != "keep"
        }


@pytest.fixture
def golden():
    return Golden


@pytest.fixture
def eval_golden():
    return EvalGolden
