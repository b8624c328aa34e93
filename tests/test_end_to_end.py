"""Every training script: resuming in its modes, two processes, sampling from what it leaves."""

import shutil
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
    free_port,
    log_lines,
    make_folder,
    method_class,
    network_state,
    run,
    terminate_after,
    tiny,
    train,
)

SMALL_HEAD = "--prototypes 64 --head-width 32 --freeze-steps 2 --temperature-steps 6"
STAGE_2 = "--stage 2 --teacher TEACHER"
MODES = {  # script and flags: modes that change which parameters are used, or how
    "mdt": ("train_mdt", ""),
    "mdt unmasking": ("train_mdt", "--mask-schedule fall --mask-ratio 0.75"),
    "sd-dit": ("train_discriminative", SMALL_HEAD),
    "sd-dit mean": ("train_discriminative", f"{SMALL_HEAD} --summary mean --gen-tokens visible"),
    "sd-dit plain": ("train_discriminative", "--align-weight 0 --mask-ratio 0"),
    "stage 1": ("train_selftranscendence", ""),
    "stage 2": ("train_selftranscendence", STAGE_2),
    "stage 2 stops": ("train_selftranscendence", f"{STAGE_2} --stop-step 2 --t-mode all"),
    "diversedit": ("train_diversedit", "--pair-layers 4"),
    "diversedit post": ("train_diversedit", "--long-residual post --pairs all --align-weight 0.2"),
}
BY_ONE = ("mdt unmasking", "sd-dit mean", "sd-dit plain", "stage 1")  # not with two processes


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


@pytest.mark.parametrize("mode", MODES)
def test_interrupted_and_resumed_is_bitwise_the_same(tmp_path, mode, flags_of):
    """Also with activations that are computed again, as the resumed part does."""
    script, flags = flags_of(mode)
    flags = f"--steps 8 {flags}"
    train(tmp_path / "a", flags, script=script)
    train(tmp_path / "b", flags, script=script, method=terminate_after(3, script))
    train(tmp_path / "b", flags, "--checkpointing", script=script)
    assert_same_run(tmp_path / "a", tmp_path / "b", 8)
    assert not any("frozen" in name for name in checkpoint(tmp_path / "a", 8)["method"])
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
    """As a user types it."""
    result = run(script, TINY, "--steps 2 --out", tmp_path)
    assert "step 2 of 2" in result.stdout and log_lines(tmp_path)[-1]["step"] == 2


@pytest.mark.parametrize("script", METHODS)
def test_init_from_takes_weights_and_average(tmp_path, script, capfd):
    """With a fresh optimizer; for other classes all but the label table."""
    small = SMALL_HEAD if script == "train_discriminative" else ""
    train(tmp_path / "first", small, "--steps 2 --ema-warmup", script=script)
    still = f"{small} --steps 1 --lr 0 --ema-decay 1 --init-from {tmp_path / 'first'}"
    train(tmp_path / "same", still, script=script)
    data = f"--data {make_folder(tmp_path / 'data')}"
    train(tmp_path / "other", still, data, script=script)
    table = "y_embedder.embedding_table.weight"
    for part in ("model", "ema"):
        first = network_state(tmp_path / "first", 2, part)
        assert_same(network_state(tmp_path / "same", 1, part), first)
        other = network_state(tmp_path / "other", 1, part)
        assert len(first.pop(table)) == 11 and len(other.pop(table)) == 3
        assert_same(other, first)
    moments = checkpoint(tmp_path / "same", 1)["optimizer"]["state"].values()
    assert all(state["step"] == 1 for state in moments)
    assert "label table" in capfd.readouterr().out


def test_a_run_resumes_without_what_it_started_from(tmp_path):
    script = "train_discriminative"  # whose teacher starts as the student
    train(tmp_path / "first", SMALL_HEAD, "--steps 2", script=script)
    flags = f"{SMALL_HEAD} --steps 6 --init-from {tmp_path / 'first'}"
    train(tmp_path / "a", flags, script=script)
    train(tmp_path / "b", flags, script=script, method=terminate_after(2, script))
    shutil.rmtree(tmp_path / "first")
    train(tmp_path / "b", flags, script=script)
    assert_same_run(tmp_path / "a", tmp_path / "b", 6)


def test_init_from_official_weights(tmp_path):
    """The official layout: here that of the network itself."""
    model = tiny(hidden_size=128, depth=6, num_heads=4, num_classes=5)
    torch.save({"ema": model.state_dict(), "model": model.state_dict()}, tmp_path / "repa.pt")
    flags = "--image-size 8 --model DiT-Ti/2 --steps 1 --lr 0 --official repa --init-from"
    train(tmp_path / "run", flags, tmp_path / "repa.pt")
    state, expected = network_state(tmp_path / "run", 1, "model"), model.state_dict()
    del state["y_embedder.embedding_table.weight"], expected["y_embedder.embedding_table.weight"]
    assert_same(state, dict(expected))
