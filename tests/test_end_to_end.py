"""Every training script from its real command line: one and two processes, resuming, sampling from what it leaves."""

import importlib
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from conftest import ROOT
from test_training import TINY, assert_same, checkpoint, free_port, log_lines, run, terminate_after

import sample

SMALL_HEAD = [
    "--prototypes",
    "64",
    "--head-width",
    "32",
    "--freeze-steps",
    "2",
    "--temperature-steps",
    "6",
]
MODES = {  # one line a mode that changes which parameters are used, or how
    "mdt": ("train_mdt", []),
    "mdt unmasked": ("train_mdt", ["--mask-ratio", "0"]),
    "mdt unmasking": ("train_mdt", ["--mask-schedule", "linear", "--mask-ratio", "0.75"]),
    "mdt flow": ("train_mdt", ["--diffusion", "flow"]),
    "sd-dit": ("train_discriminative", SMALL_HEAD),
    "sd-dit mean, visible": (
        "train_discriminative",
        [*SMALL_HEAD, "--summary", "mean", "--gen-tokens", "visible", "--mask-ratio", "0.5"],
    ),
    "sd-dit plain": ("train_discriminative", ["--align-weight", "0", "--mask-ratio", "0"]),
    "selftrans 1": ("train_selftranscendence", []),
    "selftrans 1 x0": (
        "train_selftranscendence",
        ["--stage1-target", "x0", "--t-mode", "selected"],
    ),
    "selftrans 2": ("train_selftranscendence", ["--stage", "2", "--teacher", "TEACHER"]),
    "selftrans 2 stops": (
        "train_selftranscendence",
        ["--stage", "2", "--teacher", "TEACHER", "--stop-step", "2", "--t-mode", "all"],
    ),
    "selftrans plain": ("train_selftranscendence", ["--align-weight", "0"]),
    "diversedit": ("train_diversedit", ["--pair-layers", "4"]),
    "diversedit post, sra": (
        "train_diversedit",
        ["--long-residual", "post", "--pairs", "all", "--align-weight", "0.2"],
    ),
    "diversedit plain": (
        "train_diversedit",
        ["--long-residual", "none", "--diversity-weight", "0"],
    ),
}


def run_in_process(name, out, *flags, interrupt_at=None):
    """The script's main in this process, optionally sent SIGTERM during a step; the signal handlers of pytest are put back."""
    script = importlib.import_module(name)
    method = next(
        value
        for value in vars(script).values()
        if isinstance(value, type) and hasattr(value, "after_step")
    )
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    argv, sys.argv = sys.argv, [f"{name}.py"]
    try:
        args = script.parse_args([*TINY, "--out", str(out), *flags])
        script.main(method if interrupt_at is None else terminate_after(interrupt_at, method), args)
    finally:
        sys.argv = argv
        for s, handler in handlers.items():
            signal.signal(s, handler)


@pytest.fixture(scope="module")
def flags_of(tmp_path_factory):
    """flags_of(mode): script and flags, TEACHER replaced by the folder of a short stage 1 of Self-Transcendence."""
    teacher = tmp_path_factory.mktemp("teacher")

    def flags_of(mode):
        name, flags = MODES[mode]
        if "TEACHER" in flags and not list(teacher.iterdir()):
            run_in_process("train_selftranscendence", teacher, "--steps", "2")
        return name, [str(teacher) if flag == "TEACHER" else flag for flag in flags]

    return flags_of


@pytest.mark.parametrize("mode", MODES)
def test_interrupted_and_resumed_is_bitwise_the_same(tmp_path, mode, flags_of):
    name, flags = flags_of(mode)
    run_in_process(name, tmp_path / "a", "--steps", "8", *flags)
    run_in_process(name, tmp_path / "b", "--steps", "8", *flags, interrupt_at=3)
    run_in_process(name, tmp_path / "b", "--steps", "8", *flags)
    a, b = checkpoint(tmp_path / "a", 8), checkpoint(tmp_path / "b", 8)
    for part in ("model", "ema", "method", "optimizer", "step", "log"):
        assert_same(a[part], b[part], part)
    assert log_lines(tmp_path / "a") == log_lines(tmp_path / "b")
    assert all(np.isfinite(v) for line in log_lines(tmp_path / "a") for v in line.values())


def assert_ranks_agree(out):
    """Weights, EMA and all other state that a checkpoint holds are the same in both processes (see as_ranks.py)."""
    states = [torch.load(out / "ranks" / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert len(states[0]) > 100
    assert_same(*states)


BY_ONE = (
    "mdt unmasking",
    "mdt flow",
    "sd-dit mean, visible",
    "selftrans 1 x0",
    "selftrans plain",
    "diversedit plain",
)  # enough, in time


@pytest.mark.parametrize("mode", ["sra", *(mode for mode in MODES if mode not in BY_ONE)])
def test_two_processes_agree_then_sampling(tmp_path, mode, flags_of):
    """DDP stops in the second step if a trainable parameter got no gradient in the first."""
    name, flags = flags_of(mode) if mode in MODES else ("train_sra", [])
    run(
        ROOT / "tests" / "as_ranks.py",
        "none",
        f"{name}.py",
        *TINY,
        "--steps",
        4,
        *flags,
        "--out",
        tmp_path / "run",
        processes=2,
    )
    assert (tmp_path / "run" / "samples" / "0000004.png").exists()
    assert_ranks_agree(tmp_path / "run")
    flags = [
        "--ckpt",
        tmp_path / "run",
        "--num",
        3,
        "--steps",
        2,
        "--guidance",
        1.5,
        "--out",
        tmp_path / "samples",
    ]
    sample.main(sample.parse_args(list(map(str, flags))))
    with np.load(tmp_path / "samples" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (3, 16, 16, 3)


def test_ranks_that_drift_apart_are_noticed(tmp_path):
    run(
        ROOT / "tests" / "as_ranks.py",
        "apart",
        "train_sra.py",
        *TINY,
        "--steps",
        4,
        "--out",
        tmp_path,
        processes=2,
    )
    with pytest.raises(AssertionError, match="model"):
        assert_ranks_agree(tmp_path)


def test_unmasked_tuning_starts_from_weights_and_ema(tmp_path):
    """MaskDiT's second stage: weights and EMA of the first, each its own, a fresh optimizer; it resumes without the first one's file."""
    run_in_process("train_mdt", tmp_path / "first", "--steps", "3")
    first = checkpoint(tmp_path / "first", 3)
    assert any((first["model"][k] != first["ema"][k]).any() for k in first["model"])
    start = [
        "--mask-ratio",
        "0",
        "--init-from",
        str(tmp_path / "first" / "checkpoints" / "0000003.pt"),
    ]
    run_in_process("train_mdt", tmp_path / "still", "--steps", "1", *start, "--lr", "0")
    still = checkpoint(tmp_path / "still", 1)
    assert_same(still["model"], first["model"])
    assert still["step"] == 1 and all(
        state["step"] == 1 for state in still["optimizer"]["state"].values()
    )
    assert torch.allclose(
        still["ema"]["final_layer.linear.weight"],
        first["ema"]["final_layer.linear.weight"],
        rtol=0,
        atol=1e-5,
    )
    away = (
        (still["ema"]["final_layer.linear.weight"] - first["model"]["final_layer.linear.weight"])
        .abs()
        .max()
    )
    assert away > 1e-4  # the EMA is the first stage's EMA, not its weights
    run_in_process("train_mdt", tmp_path / "a", "--steps", "6", *start)
    run_in_process("train_mdt", tmp_path / "b", "--steps", "6", *start, interrupt_at=2)
    (tmp_path / "first" / "checkpoints" / "0000003.pt").rename(tmp_path / "moved.pt")
    run_in_process("train_mdt", tmp_path / "b", "--steps", "6", *start)
    assert_same(checkpoint(tmp_path / "a", 6)["model"], checkpoint(tmp_path / "b", 6)["model"])
    start[-1] = str(tmp_path / "moved.pt")
    for flags in (["--diffusion", "flow"], ["--decoder", "2", "128", "2"], ["--qk-norm"]):
        with pytest.raises(SystemExit) as stop:
            run_in_process("train_mdt", tmp_path / "other", "--steps", "1", *start, *flags)
        assert stop.value.code == 2


def collectives(rank, port, name, flags, folder):
    """Counts what a run of two processes exchanges in 2 steps and in 5, all within one log interval."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    counts = []
    for k, steps in enumerate((2, 5)):
        os.environ["MASTER_PORT"] = str(port[k])
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run_in_process(
                name, Path(folder) / str(steps), "--steps", str(steps), "--log-every", "100", *flags
            )
        counts.append(
            {
                event.key: event.count
                for event in profile.key_averages()
                if event.key.startswith("gloo:")
            }
        )
    if rank == 0:
        (Path(folder) / "counts.json").write_text(json.dumps(counts))


OWN = {"train_discriminative": 1}  # the mean of its teacher's logits, for the centres


@pytest.mark.parametrize("mode", ["sra", "sd-dit"])
def test_a_step_exchanges_gradients_and_one_flag(tmp_path, mode, flags_of):
    """Three more steps exchange gradients (in one bucket or two) and the flag to stop three times more, and nothing else."""
    name, flags = flags_of(mode) if mode in MODES else ("train_sra", [])
    mp.spawn(collectives, ((free_port(), free_port()), name, flags, str(tmp_path)), nprocs=2)
    few, many = json.loads((tmp_path / "counts.json").read_text())
    more = {key: many[key] - few.get(key, 0) for key in many}
    assert {key for key, count in more.items() if count} == {"gloo:all_reduce"}
    assert more["gloo:all_reduce"] in {3 * (buckets + 1 + OWN.get(name, 0)) for buckets in (1, 2)}


@pytest.mark.parametrize("mode", ["mdt", "diversedit"])
def test_checkpointing_changes_nothing_but_memory(tmp_path, mode, flags_of):
    name, flags = flags_of(mode)
    for folder, more in (("a", []), ("b", ["--checkpointing"])):
        run_in_process(name, tmp_path / folder, "--steps", "3", *flags, *more)
    a, b = checkpoint(tmp_path / "a", 3), checkpoint(tmp_path / "b", 3)
    for part in ("model", "ema", "method", "optimizer", "log"):
        assert_same(a[part], b[part], part)
