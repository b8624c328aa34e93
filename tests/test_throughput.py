"""What costs time: operations, waits for the device, copies, recompilations. Nothing is timed."""

import argparse
import collections
import contextlib
from unittest import mock

import benchmark
import numpy as np
import pytest
import torch
from benchmark import METHODS, PlainDiT, Traffic, counted, macs, make_method
from conftest import call, close, fill, log_lines, method_class, save_teacher, words
from torch.utils._python_dispatch import TorchDispatchMode

from models import Attention, DiT, parse_model

NETWORK = {
    "input_size": 32,
    "in_channels": 3,
    "num_classes": 10,
    **parse_model("DiT-Ti/4"),
    "learn_sigma": False,
}
NAMES = [name for name in METHODS if name != "plain"]


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    file = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    teacher = save_teacher(file, DiT(**NETWORK))
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
    if name in benchmark.IN_RANGE:
        everywhere = counted(name, NETWORK, 8, args, more=["--t-mode", "all"])
        nowhere = counted(benchmark.IN_RANGE[name], NETWORK, 8, args)
        flop = (0.3 * everywhere + 0.7 * nowhere)[0]
    else:
        flop = counted(name, NETWORK, 8, args)[0]
    assert flop / 8 == pytest.approx(2 * macs(NETWORK)[name], rel=0.01)


def test_counted_memory_is_that_of_real_tensors():
    def peak(mode, checkpointing):
        with mode, Traffic() as traffic:
            model = DiT(**NETWORK)
            model.checkpointing = checkpointing
            inputs = torch.randn(16, 3, 32, 32), torch.rand(16), torch.zeros(16).long()
            model(*inputs).square().mean().backward()
        return traffic.peak

    real = [peak(contextlib.nullcontext(), again) for again in (False, True)]
    empty = [peak(benchmark.WithoutContent(), again) for again in (False, True)]
    assert empty == pytest.approx(real, rel=0.02) and real[1] < 0.6 * real[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_reads_nothing_back_from_the_device(name, args):
    """On the meta device whatever would wait for a GPU raises: item, nonzero, a bool."""
    with pytest.raises(RuntimeError):
        torch.zeros(1, device="meta").item()
    draw = mock.patch("torch.nn.init.trunc_normal_", torch.nn.init.normal_)  # looks at values
    with torch.device("meta"), draw:
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


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = collections.Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names[operation.overloadpacket.__name__] += 1
        return operation(*args, **(kwargs or {}))


def test_attention_copies_no_layouts():
    """Neither queries, keys, values and their gradients nor the result are reordered."""
    attention, x = Attention(64, 4), torch.randn(2, 16, 64, requires_grad=True)
    with Operations() as operations:
        attention(x).backward(torch.ones(2, 16, 64))
    assert any("flash" in name for name in operations.names)
    assert not operations.names.keys() & {"clone", "copy_", "_to_copy", "contiguous"}


COMPILED = {  # modes in which shapes or the parts that run change from step to step
    "train_mdt": "--mask-schedule linear --mask-ratio 0.75 --batch-size 8",
    "train_discriminative": "--prototypes 64 --head-width 32 --freeze-steps 2 --batch-size 8",
    # an odd batch: half of an even one in range would be a shape of its own in the first step
    "train_selftranscendence": "--stage 2 --stop-step 4 --no-qk-norm --batch-size 7 --teacher",
}


@pytest.mark.parametrize("script", COMPILED)
def test_blocks_compile_in_the_first_step_alone(tmp_path, script, args, monkeypatch):
    """Without code generation, which is slow and changes nothing here."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **options: compile_module(self, backend="aot_eager", **options),
    )
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    graphs = []

    class Counted(method_class(script)):
        def after_step(self, step, steps):
            super().after_step(step, steps)
            graphs.append(counters["stats"]["unique_graphs"])

    flags = COMPILED[script]
    if flags.endswith("--teacher"):
        flags = f"{flags} {args.teacher}"
    flags = words("--model DiT-Ti/4 --image-size 32 --steps 6 --log-every 1", flags)
    call(script, *flags, "--compile --out", tmp_path / "compiled", method=Counted)
    assert not counters["graph_break"]
    assert len(graphs) == 6 and 1 <= graphs[0] == graphs[-1] <= 4, graphs
    call(script, *flags, "--out", tmp_path / "eager")
    torch._dynamo.reset()
    for a, b in zip(log_lines(tmp_path / "compiled"), log_lines(tmp_path / "eager")):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=2e-3, atol=1e-5)
