"""Faults, as they happen to long runs, many times over; prints what was tried and what was lost.

    python tests/faults.py                  everything: some ten minutes on two CPU cores
    python tests/faults.py --only kills --kills 50 --seed 1

Every run is started as a user would start it. "Lost" means: after the same command was given again until it finished, the final checkpoint
(weights, EMA, method state, optimizer, step, log) and log.jsonl are not, bit for bit, those of a run that nothing happened to.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
TINY = "--model DiT-Ti/8 --image-size 16 --batch-size 4 --lr 1e-3 --sample-every 0 --log-every 7".split()
SCRIPTS = {
    "train_sra.py": [],
    "train_mdt.py": ["--mask-schedule", "linear"],
    "train_discriminative.py": [
        "--prototypes",
        "64",
        "--head-width",
        "32",
        "--freeze-steps",
        "20",
        "--temperature-steps",
        "60",
    ],
    "train_selftranscendence.py": ["--stage", "2", "--teacher", "TEACHER", "--stop-step", "100"],
    "train_diversedit.py": ["--pair-layers", "4"],
}


def start(script, out, *flags, agent=(), **popen):
    """The script as a process; agent: options of torchrun, if it is to be under it. Its output goes to a file: nobody empties a pipe."""
    launch = ["-m", "torch.distributed.run", *agent] if agent else []
    words = [sys.executable, *launch, ROOT / script, *TINY, *flags, "--out", out]
    file = tempfile.TemporaryFile("w+", errors="replace")
    process = subprocess.Popen(
        list(map(str, words)), stdout=file, stderr=subprocess.STDOUT, **popen
    )
    process.file = file
    return process


def ended(process, timeout=300):
    """Its output, once it has ended."""
    process.wait(timeout)
    process.file.seek(0)
    return process.file.read()


def finish(process, code=0, timeout=300):
    """Its output, once it has ended with that exit code."""
    output = ended(process, timeout)
    assert process.returncode == code, (
        f"exit code {process.returncode} in place of {code}: {output[-3000:]}"
    )
    return output


def wait_for(happened, process, timeout=120):
    """Whether it happened before the process ended."""
    deadline = time.time() + timeout
    while process.poll() is None and time.time() < deadline:
        if happened():
            return True
        time.sleep(0.002)
    return False


def reached(out, step):
    """A function: has the log come to that step?"""
    log = Path(out, "log.jsonl")
    return lambda: (
        log.exists() and any(int(s) >= step for s in re.findall(r'"step": (\d+)', log.read_text()))
    )


def children(pid):
    found = [
        int(child)
        for task in Path(f"/proc/{pid}/task").glob("*/children")
        for child in task.read_text().split()
    ]
    return found + [grandchild for child in found for grandchild in children(child)]


def differences(a, b, path=""):
    """Where two nested states are not bitwise the same."""
    if type(a) is not type(b):
        return [path]
    if isinstance(a, dict):
        return [path] * (a.keys() != b.keys()) + [
            d for k in a.keys() & b.keys() for d in differences(a[k], b[k], f"{path}/{k}")
        ]
    if isinstance(a, (list, tuple)):
        return [path] * (len(a) != len(b)) + [
            d for k, pair in enumerate(zip(a, b)) for d in differences(*pair, f"{path}/{k}")
        ]
    return [] if (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b) else [path]


def log_lines(out):
    """log.jsonl without the start records and without what depends on the clock."""
    lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k != "images_per_s"} for line in lines if "step" in line
    ]


def lost(out, expected, step):
    """What differs between the finished runs in two folders; every line of both logs must be JSON."""
    states = [
        torch.load(Path(folder, "checkpoints", f"{step:07d}.pt"), weights_only=True)
        for folder in (out, expected)
    ]
    states = [
        {part: state[part] for part in ("model", "ema", "method", "optimizer", "step", "log")}
        for state in states
    ]
    return differences(*states) + ["log.jsonl"] * (log_lines(out) != log_lines(expected))


def own_flags(script, folder):
    """The script's flags for these tests; trains the teacher that they name."""
    teacher = Path(folder, "teacher")
    if "TEACHER" in SCRIPTS[script] and not teacher.exists():
        finish(start(script, teacher, "--steps", "5"))
    return [str(teacher) if flag == "TEACHER" else flag for flag in SCRIPTS[script]]


def kills(script, folder, times, rng, steps=300):
    """SIGKILL so many times, every other time while a checkpoint is being written; (where it hit, what was lost)."""
    flags = [*own_flags(script, folder), "--steps", str(steps), "--save-every", "20"]
    name = Path(script).stem
    expected, out = Path(folder, f"{name}_whole"), Path(folder, f"{name}_killed")
    began = time.time()
    finish(start(script, expected, *flags))
    whole, hits, gone = time.time() - began, [], []
    while len(hits) < times:
        process, done = start(script, out, *flags), len(list(out.glob("checkpoints/0*.pt")))
        if len(hits) % 2:  # after as many more checkpoints as leave enough for the other kills
            more = rng.randint(1, max(1, (steps // 20 - 1 - done) // (times - len(hits)) - 1))
            hit = wait_for(
                lambda: (
                    len(list(out.glob("checkpoints/0*.pt"))) >= done + more - 1
                    and any(out.glob("checkpoints/.*.tmp"))
                ),
                process,
            )
            where = "in a checkpoint"
        else:
            moment = time.time() + rng.uniform(0, 1.2 * whole / max(1, times // 2))
            hit = wait_for(lambda: time.time() >= moment, process)
            where = "at random"
        if not hit:  # the run was faster: compare it, and kill another one
            finish(process)
            gone += lost(out, expected, steps)
            shutil.rmtree(out)
            continue
        process.kill()
        process.wait()
        newest = max(out.glob("checkpoints/0*.pt"), default=None)
        hits.append(f"{where}, after {newest.stem.lstrip('0') if newest else 'no checkpoint'}")
    finish(start(script, out, *flags))
    return hits, gone + lost(out, expected, steps)


def restarts(folder, rng, times=2, steps=150):
    """torchrun --max-restarts with two processes, of which one is killed; it goes on by itself."""
    flags = ["--steps", str(steps), "--save-every", "10"]
    agent = ["--standalone", "--nproc_per_node=2", f"--max-restarts={times}"]
    expected, out = Path(folder, "restarts_whole"), Path(folder, "restarts_killed")
    finish(start("train_sra.py", expected, *flags, agent=agent))
    process, hits = start("train_sra.py", out, *flags, agent=agent), []
    for k in range(times):
        assert wait_for(reached(out, 35 + 50 * k), process), ended(process)
        victim = rng.choice(
            [
                pid
                for pid in children(process.pid)
                if "train_sra.py" in Path(f"/proc/{pid}/cmdline").read_text()
            ]
        )
        os.kill(victim, signal.SIGKILL)
        hits.append(f"after step {35 + 50 * k} or later")
        wait_for(lambda: not Path(f"/proc/{victim}").exists(), process)
    finish(process)
    return hits, lost(out, expected, steps)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def nodes(folder, rng, steps=150):
    """Two nodes, one of which dies with its agent: the other stops by itself and names the cause; the same commands go on."""
    flags = ["--steps", str(steps), "--save-every", "10"]
    expected, out = Path(folder, "nodes_whole"), Path(folder, "nodes_killed")
    finish(start("train_sra.py", expected, *flags, agent=["--standalone", "--nproc_per_node=2"]))

    def pair():
        agent = [
            "--nnodes=2",
            "--nproc_per_node=1",
            "--rdzv_backend=c10d",
            f"--rdzv_endpoint=127.0.0.1:{free_port()}",
            "--rdzv_id=faults",
        ]
        return [start("train_sra.py", out, *flags, agent=agent) for _ in range(2)]

    both = pair()
    assert wait_for(reached(out, 35), both[0])
    victim = rng.choice(both)
    for pid in (victim.pid, *children(victim.pid)):
        os.kill(pid, signal.SIGKILL)
    victim.wait()
    output = ended(next(p for p in both if p is not victim))
    assert "another process was lost" in output, output[-3000:]
    for process in pair():
        finish(process)
    return ["the other names the cause"], lost(out, expected, steps)


def node_restarts(folder, rng, steps=150):
    """Two nodes with --max-restarts, and one worker killed: both agents begin anew by themselves."""
    flags = ["--steps", str(steps), "--save-every", "10"]
    expected, out = Path(folder, "node_restarts_whole"), Path(folder, "node_restarts_killed")
    finish(start("train_sra.py", expected, *flags, agent=["--standalone", "--nproc_per_node=2"]))
    agent = [
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{free_port()}",
        "--max-restarts=3",
    ]
    both = [
        start("train_sra.py", out, *flags, agent=[*agent, "--rdzv_id=faults"]) for _ in range(2)
    ]
    assert wait_for(reached(out, 35), both[0])
    os.kill(rng.choice(children(rng.choice(both).pid)), signal.SIGKILL)
    for process in both:
        finish(process)
    return ["one worker of two nodes"], lost(out, expected, steps)


def full_disk(folder, steps=40):
    """No room for the next checkpoint (a limit on the size of files stands for a full disk): one line, the older ones as they were."""
    flags = ["--log-every", "10", "--save-every", "10", "--steps", str(steps)]
    expected, out = Path(folder, "disk_whole"), Path(folder, "disk_full")
    finish(start("train_sra.py", expected, *flags))
    finish(start("train_sra.py", out, *flags[:-1], "20"))
    before = {p.name: p.read_bytes() for p in out.glob("checkpoints/*")}

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    output = finish(start("train_sra.py", out, *flags, preexec_fn=limit), code=1)
    assert re.search(
        r"train_sra.py: error: \S+0000030.pt cannot be written \(.*File too large\)\n$", output
    ), output
    assert "Traceback" not in output
    assert {p.name: p.read_bytes() for p in out.glob("checkpoints/*")} == before
    finish(start("train_sra.py", out, *flags))
    return ["one line, older checkpoints untouched"], lost(out, expected, steps)


def signals(folder, steps=100_000):
    """SIGTERM, and Ctrl-C: saved within the step, exit code 0, how to go on. A second one, later: at once."""
    hits, flags = [], ["--steps", str(steps), "--save-every", "0"]
    for number in (signal.SIGTERM, signal.SIGINT):
        out = Path(folder, f"signal_{number.name}")
        process = start("train_sra.py", out, *flags)
        assert wait_for(reached(out, 35), process)
        process.send_signal(number)
        output = finish(process)
        saved = max(out.glob("checkpoints/0*.pt"))
        assert (
            f"step {int(saved.stem)} of {steps}, in {out}: the same command goes on from here"
            in output
        ), output
        hits.append(f"{number.name}: saved")
    slow = Path(folder, "slow")  # a step that takes long: many micro-batches
    process = start(
        "train_sra.py", slow, "--steps", "2", "--batch-size", "20000", "--micro-batch", "1"
    )
    assert wait_for(lambda: (slow / "log.jsonl").exists(), process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    time.sleep(4)
    assert process.poll() is None, "the step was to take longer"
    process.send_signal(signal.SIGTERM)
    began = time.time()
    finish(process, code=128 + signal.SIGTERM)
    assert time.time() - began < 2
    return [*hits, "a second one: at once"], []


def same_folder(folder):
    """A second run on the folder of a running one is refused; a killed run's lock is taken over."""
    out, flags = Path(folder, "shared"), ["--steps", "100000", "--save-every", "0"]
    first = start("train_sra.py", out, *flags, "--workers", "2")
    assert wait_for(reached(out, 7), first)
    before = sorted(p.name for p in out.rglob("*"))
    output = finish(start("train_sra.py", out, *flags), code=2)
    assert (
        output.count("\n") == 1
        and f"{out} is in use by another run (process {first.pid} on" in output
    ), output
    assert sorted(p.name for p in out.rglob("*")) == before
    first.kill()  # its loaders live on for a while
    third = start("train_sra.py", out, *flags)
    log = out / "log.jsonl"
    assert wait_for(lambda: log.read_text().count('"start"') == 2 and reached(out, 7)(), third), (
        ended(third)
    )
    third.send_signal(signal.SIGTERM)
    finish(third)
    first.wait()
    return ["refused, then taken over"], []


def not_finite(folder):
    """A loss that is not a number on one process of two stops both, with step, rank and terms, and is not saved."""
    out = Path(folder, "not_finite")
    flags = ["not-finite", "train_sra.py", *TINY, "--steps", "8", "--save-every", "2", "--out", out]
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        ROOT / "tests" / "as_ranks.py",
        *flags,
    ]
    output = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, timeout=300
    ).stderr
    assert "stopped, not finite: step 3, rank 1: loss nan, denoise" in output, output
    assert [p.name for p in out.glob("checkpoints/0*.pt")] == ["0000002.pt"]
    return ["step, rank and terms named"], []


def long_run(folder, steps=5000):
    """Memory and open files of a run with loaders: between a fifth of the way and the end neither grows."""
    out, seen = Path(folder, "long"), []
    process = start(
        "train_sra.py",
        out,
        "--steps",
        str(steps),
        "--save-every",
        "500",
        "--keep",
        "3",
        "--workers",
        "1",
        "--sample-every",
        "1000",
    )

    def sample():
        status = Path(f"/proc/{process.pid}/status").read_text()
        seen.append(
            (
                int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024,
                len(os.listdir(f"/proc/{process.pid}/fd")),
            )
        )

    for step in range(steps // 5, steps, steps // 10):
        if wait_for(reached(out, step), process):
            sample()
    finish(process)
    memory, files = zip(*seen)
    assert max(memory[1:]) - memory[0] < 20 and max(files) <= files[0] + 4, (
        seen
    )  # batches on their way from the loader are files
    assert [p.name for p in sorted(out.glob("checkpoints/0*.pt"))] == [
        f"{steps - 500 * k:07d}.pt" for k in (2, 1, 0)
    ]
    for line in Path(out, "log.jsonl").read_text().splitlines():
        json.loads(line)
    return [f"{memory[0]:.0f} to {memory[-1]:.0f} MB, {files[0]} to {files[-1]} files"], []


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kills", type=int, default=20, help="in all, spread over the five scripts"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="NAME", help="the first word of a line of the table")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        share = {
            script: len(range(k, args.kills, len(SCRIPTS))) for k, script in enumerate(SCRIPTS)
        }
        tried = [
            (f"kills {script}", lambda script=script: kills(script, folder, share[script], rng))
            for script in SCRIPTS
        ]
        tried += [
            ("restarts", lambda: restarts(folder, rng)),
            ("nodes", lambda: nodes(folder, rng)),
        ]
        tried += [("node_restarts", lambda: node_restarts(folder, rng))]
        tried += [
            (f.__name__, lambda f=f: f(folder))
            for f in (full_disk, signals, same_folder, not_finite, long_run)
        ]
        losses = 0
        for name, attempt in tried:
            if args.only and name.split()[0] != args.only:
                continue
            began = time.time()
            hits, gone = attempt()
            losses += len(gone)
            print(
                f"{name}: {len(hits)} ({'; '.join(hits)}); lost: {', '.join(gone[:5]) or 'nothing'}; {time.time() - began:.0f} s",
                flush=True,
            )
    sys.exit(1 if losses else 0)


if __name__ == "__main__":
    main()
