"""What costs time: operations, waits for the device, copies, recompilations. Nothing is timed."""

import argparse
import contextlib
import functools
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
from benchmark import METHODS, PlainDiT, counted_in_range, macs, make_method
from conftest import call, close, fill, log_lines, save_teacher, words

from models import DiT, parse_model

NETWORK = {"input_size": 32, "in_channels": 3, "num_classes": 10, "learn_sigma": False}
NETWORK |= parse_model("DiT-Ti/4")
NAMES = [name for name in METHODS if name != "plain"]


@pytest.fixture
def args(tmp_path):
    teacher = save_teacher(tmp_path / "teacher.pt", DiT(**NETWORK))
    return argparse.Namespace(teacher=str(teacher), diffusion="flow")


def test_the_yardstick_is_the_same_network():
    model = fill(DiT(**NETWORK), "yardstick").double()
    plain = PlainDiT(model).double()
    assert set(plain.state_dict()) == set(model.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    inputs = x, torch.rand(2), torch.tensor([3, 10])
    assert model(*inputs).std() > 0.1
    close(model(*inputs), plain(*inputs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_operations_are_those_of_the_formula(name, args):
    """Matrix products of a step, against those the method needs; three images in ten in range."""
    flop = counted_in_range(name, NETWORK, 8, args, False)[0]
    assert flop / 8 == pytest.approx(2 * macs(NETWORK)[name], rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_reads_nothing_back_from_the_device(name, args):
    """On the meta device whatever would wait for a GPU raises: item, nonzero, a bool."""
    with pytest.raises(RuntimeError):
        torch.zeros(1, device="meta").item()
    draw = mock.patch("torch.nn.init.trunc_normal_", torch.nn.init.normal_)  # looks at values
    with torch.device("meta"), draw, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the teacher's weights are not loaded
        method, _ = make_method(name, NETWORK, args)
    x0 = torch.zeros(16, 3, 32, 32, device="meta")
    y = torch.zeros(16, dtype=torch.int64, device="meta")
    parameters = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, foreach=True)
    torch.manual_seed(0)
    for step in range(2):
        method.step = step
        with mock.patch("torch.autocast", lambda *_, **__: contextlib.nullcontext()):
            terms = method(x0, y)
        terms["loss"].backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            method.after_step(step, 2)


COMPILED = {  # modes in which shapes or the parts that run change from step to step
    "train_sra": "",
    "train_mdt": "--mask-schedule fall --mask-ratio 0.75",
    "train_discriminative": "--prototypes 64 --head-width 32 --freeze-steps 2",
    "train_selftranscendence": "--stage 2 --stop-step 2 --no-qk-norm --batch-size 7 --teacher",
    "train_diversedit": "--align-weight 0.2",
}


@pytest.mark.parametrize("script", COMPILED)
def test_blocks_compile_without_graph_breaks(tmp_path, script, monkeypatch):
    """The same values as without; code generation is left out, which is slow."""
    backend = functools.partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", backend)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    flags = COMPILED[script]
    if flags.endswith("--teacher"):
        teacher = DiT(**{**NETWORK, "input_size": 16, "patch_size": 4})
        flags = f"{flags} {save_teacher(tmp_path / 'teacher.pt', teacher)}"
    flags = words("--model DiT-Ti/4 --steps 4 --log-every 1", flags)
    call(script, *flags, "--compile --out", tmp_path / "compiled")
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] > 0
    call(script, *flags, "--out", tmp_path / "eager")
    torch._dynamo.reset()
    for a, b in zip(log_lines(tmp_path / "compiled"), log_lines(tmp_path / "eager")):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=2e-3, atol=1e-5)
