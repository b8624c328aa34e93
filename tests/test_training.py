"""The scaffold of the training scripts, through train_sra.py: what a run promises.

The other scripts share it byte for byte; test_end_to_end.py runs all of them.
"""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from conftest import (
    ROOT,
    TINY,
    as_rank,
    assert_same,
    assert_same_run,
    call,
    checkpoint,
    checkpoint_path,
    close,
    free_port,
    log_lines,
    logged,
    make_folder,
    network_state,
    one_line,
    outcome,
    run,
    saved_steps,
    start,
    terminate_after,
    train,
    wait_for,
    words,
    workers,
)
from PIL import Image

import models
import train_sra
from train_sra import SRA, center_crop, draw_shape, micro_batches, parse_args

DDPM = "--diffusion ddpm --micro-batch 2 --qk-norm --warmup 6 --ema-warmup --flip"


# Resuming


@pytest.mark.parametrize("flags", ["", DDPM], ids=["flow", "ddpm"])
def test_interrupted_and_resumed_is_bitwise_the_same(tmp_path, flags, capfd):
    """SIGTERM in the middle of a log interval, against eight steps at once."""
    train(tmp_path / "a", "--steps 8", flags)
    train(tmp_path / "b", "--steps 8", flags, method=terminate_after(3))
    (step,) = saved_steps(tmp_path / "b")
    assert step in (4, 5) and f"step {step} of 8" in capfd.readouterr().out
    train(tmp_path / "b", "--steps 8", flags)
    assert_same_run(tmp_path / "a", tmp_path / "b", 8)
    assert [line["step"] for line in log_lines(tmp_path / "a")] == [3, 6, 8]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_hang_up_and_ctrl_c_finish_the_step_and_save(tmp_path, number):
    signal.signal(number, signal.SIG_DFL)  # in the background it may be ignored
    train(tmp_path, "--steps 8", method=terminate_after(2, number=number))
    assert saved_steps(tmp_path)[0] in (3, 4)


def test_truncated_newest_checkpoint_falls_back_to_the_one_before(tmp_path, capfd):
    train(tmp_path, "--steps 6 --save-every 2")
    expected = network_state(tmp_path, 6)
    newest = checkpoint_path(tmp_path, 6)
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    code, lines = outcome(capfd, "train_sra", "--steps 6 --save-every 2 --out", tmp_path)
    assert code == 0 and len(lines) == 1 and "0000006.pt" in lines[0]
    assert_same(expected, network_state(tmp_path, 6))


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    train(tmp_path, "--steps 8 --save-every 2")
    assert saved_steps(tmp_path) == [2, 4, 6, 8]
    train(tmp_path, "--steps 12 --save-every 2 --keep 2")
    assert saved_steps(tmp_path) == [10, 12]


def test_autosave_is_the_newest_until_the_next_checkpoint(tmp_path):
    """By time, here after every step; a run that was killed goes on from it."""
    seen = []

    class Watched(SRA):
        def after_step(self, step, steps):
            seen.append(sorted(path.stem for path in (tmp_path / "checkpoints").glob("*")))

    train(tmp_path, "--steps 6 --save-every 4 --log-every 1 --save-minutes 0", method=Watched)
    last, fourth = ["autosave"], ["0000004"]
    assert seen == [[], last, last, last, fourth, fourth + last]
    assert saved_steps(tmp_path) == [4, 6]


def test_an_error_keeps_what_is_trained(tmp_path):
    """Whatever the error is; but not weights that are not finite, and no half of a step."""

    class Broken(SRA):
        def forward(self, x0, y):
            if self.step == 5:
                raise OSError("a broken shard")
            return super().forward(x0, y)

    class HalfDone(SRA):
        def after_step(self, step, steps):
            raise OSError("a broken shard")

    train(tmp_path / "a", "--steps 8")
    cases = ("b", Broken, 1e-3, ["autosave"]), ("c", Broken, math.inf, []), ("d", HalfDone, 1, [])
    for folder, method, lr, left in cases:
        with pytest.raises(OSError, match="a broken shard"):
            train(tmp_path / folder, "--steps 8 --log-every 0 --lr", lr, method=method)
        assert [path.stem for path in (tmp_path / folder).glob("checkpoints/*")] == left
    assert models.load_checkpoint(tmp_path / "b")[1]["step"] == 5
    train(tmp_path / "b", "--steps 8")
    assert_same_run(tmp_path / "a", tmp_path / "b", 8)


def test_a_fork_with_another_argument_resumes_and_samples(tmp_path, monkeypatch):
    """An argument of DiT that is an integer, 0: checkpoints are read as they were written."""

    class Fork(models.DiT):
        def __init__(self, registers=0, **network):
            super().__init__(**network)
            self.config |= {"registers": registers}

    monkeypatch.setattr(train_sra, "DiT", Fork)
    monkeypatch.setattr(models, "DiT", Fork)
    for steps in (2, 4):
        train(tmp_path, "--steps", steps)
    call("sample", "--num 2 --steps 1 --ckpt", tmp_path, "--out", tmp_path / "samples")
    assert saved_steps(tmp_path) == [2, 4]


def test_the_log_says_when_where_and_with_what(tmp_path, capfd):
    train(tmp_path, "--steps 6")
    first, *rows = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    run = first["run"]
    assert run["torch"] == torch.__version__ and run["host"] and run["date"][:19] <= rows[0]["time"]
    assert len(run["commit"].removesuffix("-dirty")) in (0, 40)  # 0: not in a repository
    assert 0 < rows[0]["seconds"] < rows[1]["seconds"]
    shown = capfd.readouterr().err.splitlines()  # no terminal: plain lines
    assert [line.split(":")[0] for line in shown] == ["step 3", "step 6"]


def test_one_run_per_folder_and_nothing_is_lost_when_it_is_killed(tmp_path):
    """tests/faults.py kills runs many times over, in every script."""
    flags = f"{TINY} --steps 100000 --save-every 6 --keep 2 --sample-every 0 --out"
    first = start("train_sra", flags, tmp_path / "killed")
    assert wait_for(logged(tmp_path / "killed", 9), first)
    result = run("train_sra", flags, tmp_path / "killed", code=2)
    assert result.stderr.count("\n") == 1 and f"{tmp_path / 'killed'} in use" in result.stderr
    assert first.poll() is None
    first.kill()
    first.wait()
    steps = saved_steps(tmp_path / "killed")[-1] + 3
    for folder in ("killed", "whole"):
        train(tmp_path / folder, "--steps", steps)
    assert_same_run(tmp_path / "killed", tmp_path / "whole", steps)


def test_a_run_under_other_flags_is_refused(tmp_path, capfd):
    """In one line that names the flag; --allow-changes goes on, where the weights still fit."""
    train(tmp_path, "--steps 2")
    other = f"--data {make_folder(tmp_path / 'data')}"
    for flags in ("--seed 1", "--lr 5e-4", "--model DiT-S/8", "--align-weight 0", "--flip", other):
        flag, *_ = flags.split()
        line = one_line(capfd, "train_sra", "--steps 3", flags, "--out", tmp_path)
        assert flag in line and "--allow-changes" in line
    train(tmp_path, "--steps 3 --lr 5e-4 --seed 1 --allow-changes")
    assert saved_steps(tmp_path) == [2, 3]
    flags = "--model DiT-S/8 --allow-changes"
    assert "0000003.pt" in one_line(capfd, "train_sra", flags, "--out", tmp_path)


def test_free_flags_do_not_matter(tmp_path):
    """A longer run, other intervals, a folder that was moved: bitwise; micro-batches: allowed."""
    train(tmp_path / "a", "--steps 6")
    train(tmp_path / "b", "--steps 4 --sample-every 2", method=terminate_after(1))
    (tmp_path / "b").rename(tmp_path / "c")
    train(tmp_path / "c", "--steps 6 --log-every 1 --save-every 2 --keep 1 --checkpointing")
    assert_same_run(tmp_path / "a", tmp_path / "c", 6)
    train(tmp_path / "c", "--steps 8 --micro-batch 2")
    assert saved_steps(tmp_path / "c") == [6, 8]


def test_average_follows_its_recursion(tmp_path):
    """EMA with warm-up min(decay, (1 + s) / (10 + s)), by hand."""
    train(tmp_path, "--steps 4 --save-every 1 --ema-warmup --ema-decay 0.2")
    for step in (1, 2, 3):
        decay = min(0.2, (1 + step) / (10 + step))
        before, after = network_state(tmp_path, step), network_state(tmp_path, step + 1)
        weights = network_state(tmp_path, step + 1, "model")
        expected = {k: decay * v + (1 - decay) * weights[k] for k, v in before.items()}
        close(after, expected, rtol=1e-5, atol=1e-7)


# Several processes


class DrawsFromImages(SRA):
    """Every draw is a function of the image it is for: the split of a batch cannot matter."""

    def forward(self, x0, y):
        t = x0.flatten(1).sum(1).abs() % 1
        return super().forward(x0, y, t=t, noise=1.3 * x0.flip(3), drop=t, u=1 - t)


def train_from_images(rank, port, out, *flags):
    if port:
        as_rank(rank, port)
    steps = "--steps 2 --log-every 1 --save-every 1 --clip-grad 0 --batch-size 8 --flip"
    train(out, steps, *flags, method=DrawsFromImages)


def first_gradients(out):
    """By number of the parameter: after one step Adam's mean is a tenth of it."""
    return {k: v["exp_avg"] for k, v in checkpoint(out, 1)["optimizer"]["state"].items()}


def test_the_split_of_a_batch_does_not_matter(tmp_path):
    """Losses and gradients: the whole batch, micro-batches, two processes with and without."""
    micro = "--micro-batch 2"
    train_from_images(0, 0, tmp_path / "whole")
    train_from_images(0, 0, tmp_path / "micro", micro)
    mp.spawn(train_from_images, (free_port(), tmp_path / "two"), nprocs=2)
    mp.spawn(train_from_images, (free_port(), tmp_path / "both", micro), nprocs=2)
    expected, gradients = log_lines(tmp_path / "whole"), first_gradients(tmp_path / "whole")
    assert expected[0]["grad_norm"] > 0.1
    for split in ("micro", "two", "both"):
        for a, b in zip(expected, log_lines(tmp_path / split), strict=True):
            assert a == pytest.approx(b, rel=1e-5), split
        for k, gradient in first_gradients(tmp_path / split).items():
            atol = 1e-5 * gradients[k].abs().max().item()
            close(gradient, gradients[k], rtol=1e-5, atol=atol)


def train_with_own_seed(rank, port, out):
    as_rank(rank, port)

    class Recorded(SRA):
        def after_step(self, step, steps):
            torch.save(self.state_dict(), f"{out}/rank{rank}_step{step}.pt")

    train(Path(out) / "run", "--steps 3 --seed", rank, method=Recorded)


def test_ranks_agree_even_if_they_start_apart(tmp_path):
    """Weights, average (the teacher!) and head are equal from the first step on."""
    mp.spawn(train_with_own_seed, (free_port(), str(tmp_path)), nprocs=2)
    for step in range(3):
        files = [tmp_path / f"rank{rank}_step{step}.pt" for rank in range(2)]
        assert_same(*(torch.load(file, weights_only=True) for file in files))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two processes that nothing happened to, and its flags."""
    folder = tmp_path_factory.mktemp("whole")
    flags = f"{TINY} --steps 60 --save-every 20 --sample-every 0 --log-every 2"
    run("train_sra", flags, "--out", folder, processes=2)
    return folder, flags


def test_torchrun_takes_sigterm_and_resumes_bitwise(tmp_path, whole):
    """Two processes; torchrun passes the signal on to both."""
    expected, flags = whole
    agent = start("train_sra", flags, "--out", tmp_path, processes=2)
    assert wait_for(logged(tmp_path, 4), agent)
    agent.terminate()
    agent.wait(120)
    assert 4 <= saved_steps(tmp_path)[-1] < 60
    run("train_sra", flags, "--out", tmp_path, processes=2)
    assert_same_run(expected, tmp_path, 60)


def test_torchrun_restarts_from_the_newest_checkpoint(tmp_path, whole):
    """One of two workers is killed; --max-restarts goes on by itself."""
    expected, flags = whole
    env = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    options = {"processes": 2, "launch": "--max-restarts 1", "env": env}
    agent = start("train_sra", flags, "--out", tmp_path, **options)
    assert wait_for(logged(tmp_path, 24), agent)
    os.kill(workers(agent)[-1], signal.SIGKILL)
    assert agent.wait(120) == 0
    assert_same_run(expected, tmp_path, 60)


def test_two_nodes_meet_on_localhost(tmp_path):
    launch = f"--nnodes=2 --nproc_per_node=1 --rdzv_endpoint=127.0.0.1:{free_port()}"
    launch += " --rdzv_backend=c10d --rdzv_id=test"
    flags = words(launch, ROOT / "train_sra.py", TINY, "--steps 3 --out", tmp_path)
    line = [sys.executable, "-m", "torch.distributed.run", *flags]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    nodes = [subprocess.Popen(line, **both) for _ in range(2)]
    outputs = [node.communicate(timeout=180)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert saved_steps(tmp_path) == [3] and "2 processes" in "".join(outputs)


def broken_on_rank_1(rank, port, out):
    as_rank(rank, port)

    class Broken(SRA):
        def forward(self, x0, y):
            terms = super().forward(x0, y)
            if rank == 1 and self.step == 3:
                terms["loss"] = terms["loss"] * float("nan")
            return terms

    train(out, "--steps 6 --save-every 2", method=Broken)


def test_not_finite_on_one_rank_stops_all_and_saves_nothing(tmp_path, capfd):
    with pytest.raises(mp.ProcessExitedException):
        mp.spawn(broken_on_rank_1, (free_port(), tmp_path), nprocs=2)
    message = capfd.readouterr().err
    for named in ("step 4, rank 1", "'loss': nan", "align", "grad_norm"):
        assert named in message
    assert saved_steps(tmp_path) == [2]


def test_errors_from_the_real_command_line(tmp_path):
    """One line, once, without and with torchrun."""
    result = run("train_sra", "--model DiT-Huge/2 --out", tmp_path, code=2)
    assert result.stderr.startswith("train_sra.py: error: unknown model") and not result.stdout
    assert result.stderr.count("\n") == 1
    result = run("train_sra", TINY, "--batch-size 5 --out", tmp_path, processes=2, code=1)
    assert result.stderr.count("train_sra.py: error: --batch-size 5 is not divisible by 2") == 1


# Data


def order_of(flags="", length=20):
    """The (index, flip) pairs of each of ten steps."""
    args = parse_args(words("--batch-size 8 --micro-batch 8 --steps 10 --flip", flags))
    return list(micro_batches(length, args, 0, 1, 0))


def test_every_image_once_an_epoch_across_their_borders():
    """Ten steps of 8 images are four epochs of 20, whose borders lie within steps."""
    stream = [item for step in order_of() for item in step]
    epochs = [stream[k : k + 20] for k in range(0, 80, 20)]
    for epoch in epochs:
        assert sorted(index for index, _ in epoch) == list(range(20))
        assert 0 < sum(flip for _, flip in epoch) < 20
    assert epochs[0] != epochs[1] and epochs[1] != epochs[2]
    assert order_of("--seed 1") != order_of()
    assert not any(flip for step in order_of("--no-flip") for _, flip in step)
    (small, *_) = order_of(length=3)  # a step may hold several epochs
    assert sorted(index for index, _ in small[:6]) == [0, 0, 1, 1, 2, 2]


def test_built_in_shapes_are_deterministic_and_of_ten_kinds():
    assert len(set(train_sra.SHAPES)) == 10
    centres = []
    for label in range(10):
        pixels = np.asarray(draw_shape(label, 32)).astype(int)
        assert (pixels == np.asarray(draw_shape(label, 32))).all()
        assert (pixels != np.asarray(draw_shape(label + 10, 32))).any()
        saturated = np.ptp(pixels, axis=2) > 60
        assert 0.1 < saturated.mean() < 0.8 and not saturated[0, 0]
        centres.append(saturated[14:18, 14:18].mean())
    assert min(centres[:5]) > 0.9 and max(centres[5:]) < 0.1  # full, hollow


def test_center_crop_against_the_definition():
    """ADM: an image of the right size stays, halving averages boxes, the longer side is cut."""
    rng = np.random.default_rng(0)
    exact = rng.integers(0, 256, (16, 16, 3), np.uint8)
    assert np.array_equal(np.asarray(center_crop(Image.fromarray(exact), 16)), exact)
    wide = np.zeros((16, 40, 3), np.uint8)
    wide[:, 12:28] = 200
    assert (np.asarray(center_crop(Image.fromarray(wide), 16)) == 200).all()
    double = rng.integers(0, 256, (32, 32, 3), np.uint8)
    boxes = double.reshape(16, 2, 16, 2, 3).mean((1, 3))
    halved = np.asarray(center_crop(Image.fromarray(double), 16))
    assert np.abs(halved - boxes).max() <= 1  # Pillow rounds after each axis
    assert center_crop(Image.new("RGB", (5, 100)), 16).size == (16, 16)


# Precision and compilation


def test_bf16_on_cpu(tmp_path):
    """bf16 autocast changes the loss a little, and only a little."""
    train(tmp_path / "fp32", "--steps 2")
    train(tmp_path / "bf16", "--steps 2 --precision bf16")
    a, b = (log_lines(tmp_path / name)[-1]["loss"] for name in ("fp32", "bf16"))
    assert a != b and a == pytest.approx(b, rel=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_resume_is_bitwise(tmp_path):
    train(tmp_path / "a", "--steps 8")
    train(tmp_path / "b", "--steps 8", method=terminate_after(3))
    train(tmp_path / "b", "--steps 8")
    assert_same(network_state(tmp_path / "a", 8), network_state(tmp_path / "b", 8))
