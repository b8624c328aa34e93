"""What costs time: operations of a step against the formula, waits for the device, copies, recompilations. Nothing here is timed."""

import argparse
import collections
import contextlib
import importlib
from unittest import mock

import benchmark
import numpy as np
import pytest
import torch
import torch.nn as nn
from benchmark import METHODS, PlainDiT, Traffic, counted, macs, make_method, save_teacher
from test_end_to_end import MODES, run_in_process
from test_training import log_lines

from models import Attention, DiT, parse_model

NETWORK = {
    "input_size": 32,
    "in_channels": 3,
    "num_classes": 10,
    **parse_model("DiT-Ti/4"),
    "learn_sigma": False,
}


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    teacher = save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pt", NETWORK, "flow")
    return argparse.Namespace(teacher=teacher, diffusion="flow")


def redraw(module, std=0.05):
    """Weights in place of the zeros that hide a block."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module


def test_the_yardstick_is_the_same_network():
    torch.manual_seed(0)
    model = redraw(DiT(**NETWORK)).double()
    plain = PlainDiT(model).double()
    assert set(plain.state_dict()) == set(model.state_dict())
    inputs = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.rand(2), torch.tensor([3, 10])
    ours, theirs = model(*inputs), plain(*inputs)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "plain"])
def test_operations_are_those_of_the_formula(name, args):
    """Matrix products that a step runs, counted, against the products that the method needs: a teacher's later blocks, hidden tokens, or a
    second forward pass would show. Images in range are three in ten, as in the formula.
    """
    if name in benchmark.IN_RANGE:
        everywhere, nowhere = (
            counted(name, NETWORK, 8, args, more=["--t-mode", "all"]),
            counted(benchmark.IN_RANGE[name], NETWORK, 8, args),
        )
        flop = (0.3 * everywhere + 0.7 * nowhere)[0]
    else:
        flop = counted(name, NETWORK, 8, args)[0]
    assert flop / 8 == pytest.approx(2 * macs(NETWORK)[name], rel=0.01)


def test_counted_memory_is_that_of_real_tensors():
    def peak(mode, checkpointing):
        with mode, Traffic() as traffic:
            model = DiT(**NETWORK)
            model.checkpointing = checkpointing
            model(
                torch.randn(16, 3, 32, 32), torch.rand(16), torch.zeros(16, dtype=torch.int64)
            ).square().mean().backward()
        return traffic.peak

    (real, real_again), (empty, empty_again) = (
        [peak(mode, checkpointing) for checkpointing in (False, True)]
        for mode in (mock.MagicMock(), benchmark.WithoutContent())
    )
    assert empty == pytest.approx(real, rel=0.02) and empty_again == pytest.approx(
        real_again, rel=0.02
    )
    assert real_again < 0.6 * real


@pytest.mark.parametrize("name", [name for name in METHODS if name != "plain"])
def test_a_step_reads_nothing_back_from_the_device(name, args):
    """On the meta device whatever would wait for a GPU raises: item, nonzero, a bool of a tensor."""
    with pytest.raises(RuntimeError):
        torch.zeros(1, device="meta").item()
    with (
        torch.device("meta"),
        mock.patch("torch.nn.init.trunc_normal_", nn.init.normal_),
    ):  # the former looks at what it has drawn
        method, _ = make_method(name, NETWORK, args)
    x0, y = (
        torch.zeros(16, 3, 32, 32, device="meta"),
        torch.zeros(16, dtype=torch.int64, device="meta"),
    )
    parameters = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, foreach=True)
    torch.manual_seed(0)
    for step in range(2):
        method.step = step
        with mock.patch(
            "torch.autocast", lambda *_, **__: contextlib.nullcontext()
        ):  # there is none on that device
            terms = method(x0, y)
        terms["loss"].backward()
        torch.stack([v.detach().float() for v in terms.values()])
        nn.utils.clip_grads_with_norm_(
            parameters, 1.0, nn.utils.get_total_norm([p.grad for p in parameters])
        )
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            method.after_step(step, 2)


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = collections.Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names[operation.overloadpacket.__name__] += 1
        return operation(*args, **(kwargs or {}))


def test_attention_copies_no_layouts():
    """Neither queries, keys, values and their gradients nor the result of the attention are copied into another order in memory."""
    attention, x = Attention(64, 4), torch.randn(2, 16, 64, requires_grad=True)
    with Operations() as operations:
        attention(x).backward(torch.ones(2, 16, 64))
    assert any("flash" in name for name in operations.names)
    assert not operations.names.keys() & {"clone", "copy_", "_to_copy", "contiguous"}, (
        operations.names
    )


def test_the_stream_lies_in_memory_as_tokens_of_channels():
    model = DiT(**NETWORK)
    for k, stream in model.streams(
        model.embed(torch.randn(2, 3, 32, 32)), model.condition(torch.rand(2), torch.tensor([1, 2]))
    ):
        assert stream.is_contiguous(), k


# Compilation

COMPILED = {  # modes in which shapes or the parts that run change from step to step
    **{mode: MODES[mode] for mode in ("mdt unmasking", "sd-dit")},
    # an odd batch: were just half of an even one in range at first, the doubled teacher pass would compile once more in the second step
    "selftrans 2 stops": (
        "train_selftranscendence",
        [
            "--stage",
            "2",
            "--teacher",
            "TEACHER",
            "--stop-step",
            "4",
            "--no-qk-norm",
            "--batch-size",
            "7",
        ],
    ),
}


def run(name, out, *flags):
    run_in_process(
        name,
        out,
        "--model",
        "DiT-Ti/4",
        "--image-size",
        "32",
        "--batch-size",
        "8",
        "--steps",
        "6",
        "--log-every",
        "1",
        *flags,
    )


@pytest.fixture
def graphs(monkeypatch):
    """graphs(): how many there are now. Blocks are compiled without code generation, which is slow and changes nothing here."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module,
        "compile",
        lambda self, **options: compile_module(self, backend="aot_eager", **options),
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", COMPILED)
def test_blocks_compile_in_the_first_step_alone(tmp_path, mode, args, graphs, monkeypatch):
    name, flags = COMPILED[mode]
    flags, script = (
        [args.teacher if flag == "TEACHER" else flag for flag in flags],
        importlib.import_module(name),
    )
    method = next(
        value
        for value in vars(script).values()
        if isinstance(value, type) and hasattr(value, "after_step")
    )
    after_step, seen = method.after_step, []
    monkeypatch.setattr(
        method,
        "after_step",
        lambda self, *args: (after_step(self, *args), seen.append(graphs()))[0],
    )
    run(name, tmp_path / "compiled", "--compile", *flags)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert len(seen) == 6 and 1 <= seen[0] == seen[-1] <= 4, seen
    run(name, tmp_path / "not", *flags)
    for a, b in zip(log_lines(tmp_path / "compiled"), log_lines(tmp_path / "not")):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=2e-3, atol=1e-5)
