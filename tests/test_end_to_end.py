"""Every training script: resuming in its modes, two processes, sampling from what it leaves."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from conftest import (
    METHODS,
    TINY,
    as_rank,
    assert_same,
    assert_same_run,
    call,
    checkpoint,
    checkpoint_path,
    free_port,
    log_lines,
    method_class,
    method_state,
    network_state,
    run,
    terminate_after,
    train,
)

SMALL_HEAD = "--prototypes 64 --head-width 32 --freeze-steps 2 --temperature-steps 6"
STAGE_2 = "--stage 2 --teacher TEACHER"
MODES = {  # script and flags: modes that change which parameters are used, or how
    "sra": ("train_sra", ""),
    "mdt": ("train_mdt", ""),
    "mdt unmasking": ("train_mdt", "--mask-schedule linear --mask-ratio 0.75"),
    "sd-dit": ("train_discriminative", SMALL_HEAD),
    "sd-dit mean": ("train_discriminative", f"{SMALL_HEAD} --summary mean --gen-tokens visible"),
    "sd-dit plain": ("train_discriminative", "--align-weight 0 --mask-ratio 0"),
    "stage 1": ("train_selftranscendence", ""),
    "stage 2": ("train_selftranscendence", STAGE_2),
    "stage 2 stops": ("train_selftranscendence", f"{STAGE_2} --stop-step 2 --t-mode all"),
    "diversedit": ("train_diversedit", "--pair-layers 4"),
    "diversedit post": ("train_diversedit", "--long-residual post --pairs all --align-weight 0.2"),
}
BY_ONE = ("mdt unmasking", "sd-dit mean", "stage 1")  # these modes are tried with one process


@pytest.fixture(scope="module")
def flags_of(tmp_path_factory):
    """flags_of(mode): script and flags, with a short stage 1 of Self-Transcendence as teacher."""
    teacher = tmp_path_factory.mktemp("teacher")

    def flags_of(mode):
        script, flags = MODES[mode]
        if "TEACHER" in flags and not list(teacher.iterdir()):
            train(teacher, "--steps 2", script="train_selftranscendence")
        return script, flags.replace("TEACHER", str(teacher))

    return flags_of


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "sra"])
def test_interrupted_and_resumed_is_bitwise_the_same(tmp_path, mode, flags_of):
    script, flags = flags_of(mode)
    flags = f"--steps 8 {flags}"
    train(tmp_path / "a", flags, script=script)
    train(tmp_path / "b", flags, script=script, method=terminate_after(3, script))
    train(tmp_path / "b", flags, script=script)
    assert_same_run(tmp_path / "a", tmp_path / "b", 8)
    assert not any("frozen" in name for name in method_state(tmp_path / "a", 8))
    assert all(np.isfinite(v) for line in log_lines(tmp_path / "a") for v in line.values())


def train_and_record(rank, port, out, script, flags):
    as_rank(rank, port)

    class Recorded(method_class(script)):
        def after_step(self, step, steps):
            super().after_step(step, steps)
            if step + 1 == steps:
                torch.save(self.state_dict(), f"{out}/rank{rank}.pt")

    train(Path(out) / "run", flags, script=script, method=Recorded)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in BY_ONE])
def test_two_processes_agree_then_sampling(tmp_path, mode, flags_of):
    """DDP stops in the second step if a trainable parameter got no gradient in the first."""
    script, flags = flags_of(mode)
    arguments = (free_port(), str(tmp_path), script, f"--steps 4 {flags}")
    mp.spawn(train_and_record, arguments, nprocs=2)
    states = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert len(states[0]) > 100
    assert_same(*states)
    assert (tmp_path / "run" / "samples" / "0000004.png").exists()
    flags = f"--ckpt {tmp_path / 'run'} --num 3 --steps 2 --guidance 1.5"
    call("sample", flags, "--out", tmp_path / "samples")
    with np.load(tmp_path / "samples" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (3, 16, 16, 3)


@pytest.mark.parametrize("script", METHODS)
def test_real_command_lines(tmp_path, script):
    """Training, and again with more steps, as a user types it."""
    for steps in (2, 3):
        result = run(script, TINY, "--steps", steps, "--out", tmp_path)
        assert f"step {steps} of {steps}" in result.stdout
    assert [line["step"] for line in log_lines(tmp_path)] == [2, 3]


def test_unmasked_tuning_starts_from_weights_and_average(tmp_path):
    """MaskDiT's second stage: both of the first, a fresh optimizer; resumed without its file."""
    train(tmp_path / "first", "--steps 3", script="train_mdt")
    weights = network_state(tmp_path / "first", 3, "model")
    average = network_state(tmp_path / "first", 3, "ema")
    file = checkpoint_path(tmp_path / "first", 3)
    start = f"--mask-ratio 0 --init-from {file}"
    train(tmp_path / "still", "--steps 1 --lr 0", start, script="train_mdt")
    assert_same(network_state(tmp_path / "still", 1, "model"), weights)
    moments = checkpoint(tmp_path / "still", 1)["optimizer"]["state"]
    assert all(state["step"] == 1 for state in moments.values())
    name = "final_layer.linear.weight"
    now = network_state(tmp_path / "still", 1, "ema")[name]
    assert torch.allclose(now, average[name], rtol=0, atol=1e-5)
    assert (now - weights[name]).abs().max() > 1e-4
    start = f"--steps 6 {start}"
    train(tmp_path / "a", start, script="train_mdt")
    train(tmp_path / "b", start, script="train_mdt", method=terminate_after(2, "train_mdt"))
    file.unlink()
    train(tmp_path / "b", start, script="train_mdt")
    assert_same_run(tmp_path / "a", tmp_path / "b", 6)


def count_collectives(rank, ports, script, flags, folder):
    """What a run of two processes exchanges in 2 steps and in 5, all within one log interval."""
    counts = []
    for port, steps in zip(ports, (2, 5)):
        as_rank(rank, port)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            flags = f"{flags} --log-every 100 --steps {steps}"
            train(Path(folder) / str(steps), flags, script=script)
        events = [event for event in profile.key_averages() if event.key.startswith("gloo:")]
        counts.append({event.key: event.count for event in events})
    if rank == 0:
        (Path(folder) / "counts.json").write_text(json.dumps(counts))


@pytest.mark.parametrize("mode, own", [("sra", 0), ("sd-dit", 1)])
def test_a_step_exchanges_gradients_and_one_flag(tmp_path, mode, own, flags_of):
    """Gradients in one bucket or two, the flag to stop, and SD-DiT's mean logits; no more."""
    script, flags = flags_of(mode)
    ports = (free_port(), free_port())
    mp.spawn(count_collectives, (ports, script, flags, str(tmp_path)), nprocs=2)
    few, many = json.loads((tmp_path / "counts.json").read_text())
    more = {key: many[key] - few.get(key, 0) for key in many}
    assert {key for key, count in more.items() if count} == {"gloo:all_reduce"}
    assert more["gloo:all_reduce"] in {3 * (buckets + 1 + own) for buckets in (1, 2)}


@pytest.mark.parametrize("mode", ["mdt", "diversedit"])
def test_checkpointing_changes_nothing_but_memory(tmp_path, mode, flags_of):
    script, flags = flags_of(mode)
    for folder, more in (("a", ""), ("b", "--checkpointing")):
        train(tmp_path / folder, "--steps 3", flags, more, script=script)
    assert_same_run(tmp_path / "a", tmp_path / "b", 3)
