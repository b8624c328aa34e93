"""The scaffold of the training scripts, through train_sra.py: resuming, processes, signals, data, faults, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from conftest import ROOT
from faults import free_port, log_lines
from PIL import Image

import train_sra
from train_sra import SRA, Images, center_crop, draw_shape, parse_args, read_order

TINY = [
    "--model",
    "DiT-Ti/8",
    "--image-size",
    "16",
    "--batch-size",
    "4",
    "--lr",
    "1e-3",
    "--log-every",
    "3",
]


def train(out, *flags, method=SRA):
    """Train in this process; the signal handlers of pytest are put back."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    argv, sys.argv = sys.argv, ["train_sra.py"]
    try:
        train_sra.main(method, parse_args([*TINY, "--out", str(out), *flags]))
    finally:
        sys.argv = argv
        for s, handler in handlers.items():
            signal.signal(s, handler)


def command(*words, processes=1):
    """A script's command line, under torchrun for several processes."""
    launch = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        if processes > 1
        else []
    )
    return [sys.executable, *launch, *map(str, words)]


def run(*words, processes=1, code=0, cwd=ROOT, timeout=240):
    result = subprocess.run(
        command(*words, processes=processes),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result


def checkpoint(out, step):
    return torch.load(Path(out) / "checkpoints" / f"{step:07d}.pt", weights_only=True)


def assert_same(a, b, path=""):
    """Bitwise equality of nested dicts, lists and tensors."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert set(a) == set(b), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for k, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{path}/{k}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    else:
        assert a == b, path


def terminate_after(step, method=SRA):
    """A method that is sent SIGTERM during that 0-based step: the run stops at a step boundary and saves."""

    class Interrupted(method):
        def after_step(self, now, steps):
            super().after_step(now, steps)
            if now == step:
                os.kill(os.getpid(), signal.SIGTERM)

    return Interrupted


# Resuming


DDPM_RUN = [
    "--diffusion",
    "ddpm",
    "--micro-batch",
    "2",
    "--qk-norm",
    "--warmup",
    "6",
    "--no-ema-warmup",
]


@pytest.mark.parametrize("flags", [[], DDPM_RUN], ids=["flow", "ddpm"])
def test_interrupted_and_resumed_is_bitwise_the_same(tmp_path, flags, capfd):
    """8 steps at once, and 8 steps with SIGTERM in the middle of a log interval: weights, EMA, head, optimizer, log."""
    train(tmp_path / "a", "--steps", "8", *flags)
    train(tmp_path / "b", "--steps", "8", *flags, method=terminate_after(3))
    assert "the same command goes on from here" in capfd.readouterr().out
    stopped = max((tmp_path / "b" / "checkpoints").iterdir())
    assert 4 <= int(stopped.stem) <= 5
    train(tmp_path / "b", "--steps", "8", *flags)
    a, b = checkpoint(tmp_path / "a", 8), checkpoint(tmp_path / "b", 8)
    for part in ("model", "ema", "method", "optimizer", "step", "log"):
        assert_same(a[part], b[part], part)
    assert log_lines(tmp_path / "a") == log_lines(tmp_path / "b") and [
        line["step"] for line in log_lines(tmp_path / "a")
    ] == [3, 6, 8]


def test_finished_run_started_again_changes_nothing(tmp_path):
    train(tmp_path, "--steps", "3")
    before = checkpoint(tmp_path, 3)
    train(tmp_path, "--steps", "3")
    assert_same(before, checkpoint(tmp_path, 3))


def test_log_lines_beyond_the_checkpoint_are_dropped_on_resuming(tmp_path):
    train(tmp_path, "--steps", "4", "--save-every", "2", "--log-every", "1")
    (
        tmp_path / "checkpoints" / "0000004.pt"
    ).unlink()  # as if killed after step 4 was logged, before it was saved
    train(tmp_path, "--steps", "4", "--save-every", "2", "--log-every", "1")
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2, 3, 4]


def test_truncated_newest_checkpoint_falls_back_to_the_one_before(tmp_path, capfd):
    train(tmp_path / "a", "--steps", "6", "--save-every", "2")
    expected = checkpoint(tmp_path / "a", 6)
    newest = tmp_path / "a" / "checkpoints" / "0000006.pt"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    capfd.readouterr()
    train(tmp_path / "a", "--steps", "6", "--save-every", "2")
    assert "0000006.pt cannot be read" in capfd.readouterr().err
    assert_same(expected, checkpoint(tmp_path / "a", 6))


def test_damaged_newest_checkpoint_falls_back_too(tmp_path, capfd):
    """Right length, wrong bytes in the middle: the checksums of the archive tell."""
    train(tmp_path, "--steps", "4", "--save-every", "2")
    newest = tmp_path / "checkpoints" / "0000004.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 1000] = bytes(1000)
    newest.write_bytes(content)
    capfd.readouterr()
    train(tmp_path, "--steps", "4", "--save-every", "2")
    assert "0000004.pt cannot be read" in capfd.readouterr().err


def test_log_with_an_unfinished_line_is_no_obstacle(tmp_path):
    train(tmp_path, "--steps", "2", "--log-every", "1")
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 3, "lo')
    train(tmp_path, "--steps", "4", "--log-every", "1")
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2, 3, 4]


def test_checkpoint_is_plain_and_complete(tmp_path):
    train(tmp_path, "--steps", "2")
    saved = checkpoint(tmp_path, 2)  # weights_only=True: nothing but tensors and plain values
    assert set(saved) == {"model", "ema", "method", "optimizer", "step", "args", "log"}
    assert json.loads(json.dumps(saved["args"]))["script"] == "train_sra.py"
    assert all(name.startswith("head.") for name in saved["method"]) and len(saved["method"]) == 4
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_ema_follows_its_recursion(tmp_path):
    """EMA with warm-up min(decay, (1 + s) / (10 + s)), by hand from the weights after every step."""
    weights = []

    class Recorded(SRA):
        def after_step(self, step, steps):
            weights.append(
                {k: v.detach().double().clone() for k, v in self.model.named_parameters()}
            )

    train(tmp_path, "--steps", "4", method=Recorded)
    torch.manual_seed(0)
    start = SRA(
        parse_args(TINY),
        checkpoint(tmp_path, 4)["args"]["network"],
        train_sra.make_diffusion("flow"),
    ).model
    expected = {k: v.detach().double() for k, v in start.named_parameters()}
    for step, now in enumerate(weights):
        decay = min(0.9999, (1 + step) / (10 + step))
        expected = {k: decay * v + (1 - decay) * now[k] for k, v in expected.items()}
    saved = checkpoint(tmp_path, 4)["ema"]
    for name, value in expected.items():
        torch.testing.assert_close(saved[name].double(), value, rtol=1e-5, atol=1e-7)


# Several processes


def network_of(diffusion):
    shape = {
        "input_size": 16,
        "patch_size": 8,
        "in_channels": 3,
        "hidden_size": 64,
        "depth": 4,
        "num_heads": 2,
        "num_classes": 10,
    }
    return {**shape, "learn_sigma": diffusion.learned_variance}


def fixed_draws(diffusion, n=8):
    generator = torch.Generator().manual_seed(3)
    x0, noise = torch.randn(2, n, 3, 16, 16, generator=generator)
    t = (
        torch.randint(0, 1000, (n,), generator=generator)
        if diffusion.learned_variance
        else torch.rand(n, generator=generator)
    )
    draws = {
        "noise": noise,
        "t": t,
        "u": torch.rand(n, generator=generator),
        "drop": torch.rand(n, generator=generator),
    }
    return x0, torch.arange(n) % 10, draws


def build(name):
    diffusion = train_sra.make_diffusion(name)
    torch.manual_seed(5)
    method = SRA(
        parse_args(["--diffusion", name, "--label-drop", "0.4"]), network_of(diffusion), diffusion
    )
    for parameter in method.model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return diffusion, method


def ddp_gradients(rank, world, port, name, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    diffusion, method = build(name)
    x0, y, draws = fixed_draws(diffusion)
    share = slice(rank * len(x0) // world, (rank + 1) * len(x0) // world)
    wrapped = torch.nn.parallel.DistributedDataParallel(method)
    loss = wrapped(x0[share], y[share], **{k: v[share] for k, v in draws.items()})["loss"]
    loss.backward()
    gradients = {k: p.grad for k, p in method.named_parameters() if p.requires_grad}
    torch.save({"loss": loss.detach(), "gradients": gradients}, f"{folder}/{rank}.pt")
    del wrapped  # see the end of the scaffold
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["flow", "ddpm"])
def test_two_processes_give_the_loss_and_gradients_of_one(tmp_path, name):
    mp.spawn(ddp_gradients, (2, free_port(), name, str(tmp_path)), nprocs=2)
    diffusion, method = build(name)
    x0, y, draws = fixed_draws(diffusion)
    loss = method(x0, y, **draws)["loss"]
    loss.backward()
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close(
        (ranks[0]["loss"] + ranks[1]["loss"]) / 2, loss.detach(), rtol=1e-5, atol=1e-6
    )
    for key, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().sum() > 0, key
            assert torch.equal(ranks[0]["gradients"][key], ranks[1]["gradients"][key]), key
            largest = parameter.grad.abs().max().item()
            torch.testing.assert_close(
                ranks[0]["gradients"][key], parameter.grad, rtol=1e-5, atol=1e-5 * largest
            )


class DrawsFromImages(SRA):
    """Every draw is a function of the image it is for, so that the split over processes and micro-batches cannot matter."""

    def forward(self, x0, y):
        t = x0.flatten(1).sum(1).abs() % 1
        return super().forward(x0, y, t=t, noise=1.3 * x0.flip(3), drop=t, u=1 - t)


def as_rank(rank, world, port):
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def train_from_images(rank, world, port, out, *flags):
    if world > 1:
        as_rank(rank, world, port)
    train(
        out,
        "--steps",
        "2",
        "--log-every",
        "1",
        "--clip-grad",
        "0",
        "--batch-size",
        "8",
        *flags,
        method=DrawsFromImages,
    )


def test_the_split_of_a_batch_does_not_matter(tmp_path):
    """The loop itself: whole batch, two micro-batches, and two processes with and without micro-batches, from equal draws."""
    train_from_images(0, 1, 0, str(tmp_path / "whole"))
    train_from_images(0, 1, 0, str(tmp_path / "micro"), "--micro-batch", "2")
    mp.spawn(train_from_images, (2, free_port(), str(tmp_path / "two")), nprocs=2)
    mp.spawn(
        train_from_images, (2, free_port(), str(tmp_path / "both"), "--micro-batch", "2"), nprocs=2
    )
    whole = log_lines(tmp_path / "whole")
    assert whole[0]["grad_norm"] > 0.1
    for split in ("micro", "two", "both"):
        for a, b in zip(whole, log_lines(tmp_path / split), strict=True):
            assert a.keys() == b.keys()
            assert all(abs(a[k] - b[k]) <= 1e-5 * abs(a[k]) for k in a), (split, a, b)


def train_as_rank(rank, world, port, out, seeds):
    as_rank(rank, world, port)

    class Recorded(SRA):
        def after_step(self, step, steps):
            torch.save(self.state_dict(), f"{out}/rank{rank}_step{step}.pt")

    train(Path(out) / "run", "--steps", "3", "--seed", str(seeds[rank]), method=Recorded)


def test_ranks_agree_on_weights_ema_and_head_even_if_they_start_apart(tmp_path):
    """Different seeds give the ranks different random networks: DDP must make weights and EMA (the teacher!) equal from step 0."""
    mp.spawn(train_as_rank, (2, free_port(), str(tmp_path), (0, 1)), nprocs=2)
    for step in range(3):
        states = [
            torch.load(tmp_path / f"rank{rank}_step{step}.pt", weights_only=True)
            for rank in range(2)
        ]
        assert_same(*states)


def test_torchrun_resumes_bitwise_and_takes_sigterm(tmp_path):
    """Two processes: uninterrupted, against SIGTERM to torchrun (which passes it on) and the same command again."""
    flags = [ROOT / "train_sra.py", *TINY, "--steps", "60", "--save-every", "0", "--out"]
    run(*flags, tmp_path / "a", processes=2)
    agent = subprocess.Popen(
        command(*flags, tmp_path / "b", processes=2),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.time() + 120
    log = tmp_path / "b" / "log.jsonl"
    while not (log.exists() and '"step": 3' in log.read_text()) and time.time() < deadline:
        time.sleep(0.02)
    agent.terminate()
    out, _ = agent.communicate(timeout=120)
    steps = sorted(int(p.stem) for p in (tmp_path / "b" / "checkpoints").glob("*.pt"))
    assert len(steps) == 1 and 3 <= steps[0] < 60, (steps, out)
    assert "the same command goes on from here" in out
    run(*flags, tmp_path / "b", processes=2)
    a, b = checkpoint(tmp_path / "a", 60), checkpoint(tmp_path / "b", 60)
    for part in ("model", "ema", "method", "optimizer"):
        assert_same(a[part], b[part], part)
    assert log_lines(tmp_path / "a") == log_lines(tmp_path / "b")


def test_two_nodes_meet_on_localhost(tmp_path):
    port = free_port()
    launch = [
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{port}",
    ]
    words = [
        sys.executable,
        *launch,
        "--rdzv_id=test",
        ROOT / "train_sra.py",
        *TINY,
        "--steps",
        "3",
        "--out",
        tmp_path,
    ]
    nodes = [
        subprocess.Popen(
            list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    outputs = [node.communicate(timeout=180)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert checkpoint(tmp_path, 3)["step"] == 3 and "2 processes" in "".join(outputs)


def test_sigterm_to_every_process_saves_and_exits_cleanly(tmp_path):
    """As schedulers do it: the training process and its loaders get the signal, twice."""
    words = command(
        ROOT / "train_sra.py", *TINY, "--steps", "100000", "--workers", "2", "--out", tmp_path
    )
    agent = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    log = tmp_path / "log.jsonl"
    while not (log.exists() and '"step": 3' in log.read_text()) and time.time() < deadline:
        time.sleep(0.02)
    loaders = [
        int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    ]
    assert len(loaders) == 2
    for _ in range(2):
        for pid in (*loaders, agent.pid):
            os.kill(pid, signal.SIGTERM)
    out, err = agent.communicate(timeout=60)
    assert agent.returncode == 0 and "Traceback" not in err, err
    step = int(max((tmp_path / "checkpoints").glob("*.pt")).stem)
    assert (
        f"step {step} of 100000" in out
        and "goes on from here" in out
        and checkpoint(tmp_path, step)["step"] == step
    )


# Data


def order_of(world, micro_batch, start=0, **changes):
    """{step: the set of (index, flip) of all ranks}, and the first rank's list."""
    args = parse_args(["--batch-size", "8", "--steps", "7", *changes.pop("flags", [])])
    args.micro_batch = micro_batch
    accumulate = 8 // (world * micro_batch)
    ranks = [list(read_order(20, args, rank, world, start)) for rank in range(world)]
    assert all(len(batch) == micro_batch for rank in ranks for batch in rank)
    return [
        [
            item
            for rank in ranks
            for batch in rank[k * accumulate : (k + 1) * accumulate]
            for item in batch
        ]
        for k in range(7 - start)
    ]


def test_images_of_a_step_do_not_depend_on_the_split_or_on_resuming():
    whole = order_of(1, 8)
    for world, micro_batch in ((2, 4), (4, 2), (1, 2), (2, 1)):
        assert order_of(world, micro_batch) == whole
    assert order_of(1, 8, start=5) == whole[5:]
    for epoch in (
        whole[:2],
        whole[2:4],
    ):  # 20 images make two batches of 8 an epoch: no image twice, some are flipped
        indices = [index for step in epoch for index, _ in step]
        assert len(set(indices)) == 16 and 0 < sum(flip for step in epoch for _, flip in step) < 16
    assert whole[:2] != whole[2:4] and order_of(1, 8, flags=["--seed", "1"]) != whole
    assert not any(flip for step in order_of(1, 8, flags=["--no-flip"]) for _, flip in step)


def test_built_in_shapes_are_deterministic_and_of_ten_kinds():
    names = list(train_sra.SHAPES)
    assert len(names) == 10
    for label, (colour, *_) in enumerate(train_sra.SHAPES.values()):
        pixels = np.asarray(draw_shape(label, 32)).reshape(-1, 3).astype(int)
        again = np.asarray(draw_shape(label, 32)).reshape(-1, 3)
        assert (pixels == again).all() and (
            pixels != np.asarray(draw_shape(label + 10, 32)).reshape(-1, 3)
        ).any()
        share = (np.abs(pixels - np.array(colour)).max(1) < 12).mean()
        assert 0.03 < share < 0.6, names[label]


def test_center_crop_against_the_definition():
    """ADM's crop keeps a square image of the right size as it is, halves with boxes, and cuts the centre of the longer side."""
    rng = np.random.default_rng(0)
    exact = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
    assert np.array_equal(np.asarray(center_crop(exact, 16)), np.asarray(exact))
    wide = np.zeros((16, 40, 3), np.uint8)
    wide[:, 12:28] = 200
    assert (np.asarray(center_crop(Image.fromarray(wide), 16)) == 200).all()
    double = rng.integers(0, 256, (32, 32, 3), np.uint8)
    boxes = double.reshape(16, 2, 16, 2, 3).mean((1, 3))
    assert (
        np.abs(np.asarray(center_crop(Image.fromarray(double), 16)) - boxes).max() <= 1
    )  # Pillow rounds after each axis
    assert center_crop(Image.new("RGB", (5, 100)), 16).size == (16, 16)


def make_folder(path, classes=("ant", "bee"), each=4, size=20):
    rng = np.random.default_rng(0)
    for name in classes:
        (path / name).mkdir(parents=True)
        for k in range(each):
            Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(
                path / name / f"{k}.png"
            )
    return path


def test_image_folder(tmp_path):
    folder = make_folder(tmp_path / "data", ("bee", "ant"))
    Image.new("L", (30, 20), 128).save(folder / "ant" / "grey.JPG")
    Image.new("RGBA", (16, 16), (255, 0, 0, 255)).save(folder / "bee" / "alpha.webp", lossless=True)
    (folder / "ant" / "notes.txt").write_text("no image")
    data = Images(str(folder), 16, 0, 1)
    assert data.classes == ["ant", "bee"] and len(data) == 10
    items = [data[(k, False)] for k in range(10)]
    assert (
        all(x.shape == (3, 16, 16) and x.dtype == torch.uint8 for x, _ in items)
        and [y for _, y in items] == [0] * 5 + [1] * 5
    )
    assert torch.equal(data[(0, True)][0], data[(0, False)][0].flip(2))


def test_workers_and_main_process_read_the_same(tmp_path):
    make_folder(tmp_path / "data")
    for workers in ("0", "2"):
        train(
            tmp_path / workers,
            "--data",
            str(tmp_path / "data"),
            "--steps",
            "3",
            "--workers",
            workers,
        )
    assert_same(checkpoint(tmp_path / "0", 3)["model"], checkpoint(tmp_path / "2", 3)["model"])


# Faults


def test_not_finite_stops_with_step_rank_and_terms_and_saves_nothing(tmp_path, capfd):
    class Broken(SRA):
        def forward(self, x0, y, **draws):
            terms = super().forward(x0, y, **draws)
            return {**terms, "loss": terms["loss"] * float("nan")} if self.step == 3 else terms

    with pytest.raises(SystemExit) as stop:
        train(tmp_path, "--steps", "6", "--save-every", "2", method=Broken)
    message = str(stop.value.code)
    assert (
        "step 4, rank 0" in message
        and "loss nan" in message
        and "align" in message
        and "grad_norm" in message
    )
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["0000002.pt"]


def one_line(capfd, out, *flags, method=SRA):
    """The run must end with exit code 2 and a single line on stderr, which is returned."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        train(out, *flags, method=method)
    err = capfd.readouterr().err
    assert (
        stop.value.code == 2 and err.count("\n") == 1 and err.startswith("train_sra.py: error: ")
    ), err
    return err


def test_bad_flags(tmp_path, capfd):
    cases = [
        (["--model", "DiT-Huge/2"], "unknown model 'DiT-Huge/2'"),
        (["--model", "DiT-Ti/8", "--image-size", "20"], "20 is not divisible by the patch size 8"),
        (
            ["--batch-size", "6", "--micro-batch", "4"],
            "--batch-size 6 is not divisible by 1 processes x --micro-batch 4",
        ),
        (["--steps", "0"], "--steps 0 is out of range"),
        (["--lr", "-1"], "--lr -1.0 is out of range"),
        (["--seed", "99999999999999999999999"], "is out of range"),
        (["--time-gap", "inf"], "--time-gap inf is out of range"),
        (["--label-drop", "1.5"], "--label-drop 1.5 is out of range"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--diffusion", "vp"], "invalid choice: 'vp'"),
        (["--diffusion", "edm"], "only --align-weight 0"),
        (["--student-block", "9"], "1 <= student <= teacher <= 6"),
        (["--align-decay", "0", "0"], "TENFOLD 1 or more"),
        (["--batch-size", "30000"], "20000 images, fewer than --batch-size 30000"),
        (["--data", str(tmp_path / "nowhere")], "no such folder"),
    ]
    for flags, words in cases:
        assert words in one_line(capfd, tmp_path / "out", *flags), flags


def test_bad_data(tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    assert "no images found" in one_line(capfd, tmp_path / "out", "--data", str(tmp_path / "empty"))
    flat = make_folder(tmp_path / "flat")
    (flat / "ant").rename(tmp_path / "images")
    assert "no images found" in one_line(
        capfd, tmp_path / "out", "--data", str(tmp_path / "images")
    )
    assert "one class folder, bee" in one_line(capfd, tmp_path / "out", "--data", str(flat))
    train(tmp_path / "single", "--data", str(flat), "--label-drop", "0", "--steps", "1")
    deep = make_folder(tmp_path / "deep")
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(deep / "ant" / "0.png")
    assert "more than 8 bits" in one_line(capfd, tmp_path / "out", "--data", str(deep))
    (tmp_path / "file").write_text("")
    assert "file" in one_line(capfd, tmp_path / "file")
    corrupt = make_folder(tmp_path / "corrupt")
    (corrupt / "bee" / "2.png").write_bytes(b"not an image")
    assert str(corrupt / "bee" / "2.png") in one_line(
        capfd, tmp_path / "out", "--data", str(corrupt)
    )
    torn = make_folder(tmp_path / "torn")
    whole = (torn / "ant" / "1.png").read_bytes()
    (torn / "ant" / "1.png").write_bytes(
        whole[: len(whole) // 2]
    )  # the header is fine: found when it is read
    for workers in ("0", "1"):
        with pytest.raises(SystemExit) as stop:
            train(tmp_path / workers, "--data", str(torn), "--steps", "4", "--workers", workers)
        err = capfd.readouterr().err  # a progress bar, then the line
        assert stop.value.code == 2 and "Traceback" not in err
        assert err.splitlines()[-1].startswith(
            f"train_sra.py: error: cannot read image {torn / 'ant' / '1.png'}"
        )


def test_resuming_with_other_flags(tmp_path, capfd):
    train(tmp_path, "--steps", "2")
    assert "--model DiT-S/8 (it has DiT-Ti/8)" in one_line(capfd, tmp_path, "--model", "DiT-S/8")
    assert "--diffusion gvp (it has flow)" in one_line(capfd, tmp_path, "--diffusion", "gvp")
    assert "--align-weight 0.0 (it has None)" in one_line(capfd, tmp_path, "--align-weight", "0")
    assert "is beyond --steps 1" in one_line(capfd, tmp_path, "--steps", "1")
    folder = make_folder(tmp_path / "data")
    assert "other classes" in one_line(capfd, tmp_path, "--data", str(folder))
    saved = checkpoint(tmp_path, 2)
    saved["args"]["script"] = "train_mdt.py"
    torch.save(saved, tmp_path / "checkpoints" / "0000002.pt")
    assert "--script train_sra.py (it has train_mdt.py)" in one_line(capfd, tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(b"")
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, "--steps", "2")
    err = capfd.readouterr().err
    assert (
        stop.value.code == 2
        and "train_sra.py: error: no checkpoint in" in err
        and "Traceback" not in err
    )


def test_resuming_with_a_harmless_change_says_so(tmp_path, capfd):
    train(tmp_path, "--steps", "2")
    train(tmp_path, "--steps", "3", "--lr", "5e-4")
    out = capfd.readouterr().out
    assert "--lr 0.0005 (it has 0.001)" in out and checkpoint(tmp_path, 3)["step"] == 3


def test_errors_from_the_real_command_line(tmp_path):
    """Without and with torchrun, and never a traceback of ours."""
    result = run(ROOT / "train_sra.py", "--model", "DiT-Huge/2", "--out", tmp_path, code=2)
    assert (
        result.stderr.count("\n") == 1
        and result.stderr.startswith("train_sra.py: error: unknown model")
        and not result.stdout
    )
    result = run(
        ROOT / "train_sra.py", *TINY, "--batch-size", "5", "--out", tmp_path, processes=2, code=1
    )
    assert (
        result.stderr.count("train_sra.py: error: --batch-size 5 is not divisible by 2 processes")
        == 1
    )


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="needs a GPU: bf16 training, NCCL and fused AdamW run on CUDA only",
)
def test_cuda_resume_is_bitwise(tmp_path):
    train(tmp_path / "a", "--steps", "8")
    train(tmp_path / "b", "--steps", "8", method=terminate_after(3))
    train(tmp_path / "b", "--steps", "8")
    assert_same(checkpoint(tmp_path / "a", 8)["model"], checkpoint(tmp_path / "b", 8)["model"])


def test_bf16_on_cpu(tmp_path):
    """bf16 autocast changes the loss a little, and only a little."""
    train(tmp_path / "fp32", "--steps", "2")
    train(tmp_path / "bf16", "--steps", "2", "--precision", "bf16")
    a, b = (log_lines(tmp_path / name)[-1]["loss"] for name in ("fp32", "bf16"))
    assert abs(a - b) < 0.02 * a and a != b


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_blocks_compute_the_same(tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train(tmp_path / "eager", "--steps", "3")
    train(tmp_path / "compiled", "--steps", "3", "--compile")
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 1 <= compiled <= 3, (
        f"{compiled} graphs: student, teacher and the sampled EMA share one block"
    )
    assert not torch._dynamo.utils.counters["graph_break"]
    a, b = (log_lines(tmp_path / name)[-1] for name in ("eager", "compiled"))
    assert all(
        abs(a[name] - b[name]) <= 1e-4 * abs(a[name])
        for name in ("loss", "denoise", "align", "grad_norm")
    )
