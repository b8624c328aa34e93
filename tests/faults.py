"""Faults, as they happen to long runs, many times over; prints what was tried and what was lost.

    python tests/faults.py                  everything: some ten minutes on two CPU cores
    python tests/faults.py --only kills --kills 50 --seed 1

Every run is started as a user would start it. "Lost" means: after the same command was given again
until it finished, the final checkpoint is not, bit for bit, that of a run that nothing happened to.
"""

import argparse
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
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
CACHE = Path(tempfile.gettempdir()) / "tests.cache"  # of the built-in images
TINY = f"--model DiT-Ti/8 --image-size 16 --batch-size 4 --lr 1e-3 --cache {CACHE}"
TINY += " --sample-every 0 --log-every 7"
SCRIPTS = {
    "train_sra": "",
    "train_mdt": "--mask-schedule fall",
    "train_discriminative": "--prototypes 64 --head-width 32 --freeze-steps 20",
    "train_selftranscendence": "--stage 2 --stop-step 100 --teacher TEACHER",
    "train_diversedit": "--pair-layers 4",
}
TWO = "--standalone --nproc_per_node=2"
STATE = ("method", "optimizer", "step")  # what is compared


# Runs


def start(script, out, *flags, agent="", **popen):
    """The script as a process, under torchrun if `agent` holds options of it.

    Its output goes to a file: nobody empties a pipe.
    """
    launch = f"-m torch.distributed.run {agent}" if agent else ""
    words = " ".join(map(str, (launch, ROOT / f"{script}.py", TINY, *flags, "--out", out)))
    file = tempfile.TemporaryFile("w+", errors="replace")
    line = [sys.executable, *words.split()]
    env = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # restarts need it
    process = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT, env=env, **popen)
    process.file = file
    return process


def ended(process, timeout=300):
    """Its output, once it has ended."""
    process.wait(timeout)
    process.file.seek(0)
    return process.file.read()


def finish(process, code=0):
    """Its output, once it has ended with that exit code."""
    output = ended(process)
    assert process.returncode == code, f"exit code {process.returncode}: {output[-3000:]}"
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

    def happened():
        steps = re.findall(r'"step": (\d+)', log.read_text()) if log.exists() else []
        return any(int(s) >= step for s in steps)

    return happened


def writing(out, number):
    """A function: is the checkpoint of that number, or a later one, being written?"""
    folder = Path(out, "checkpoints")
    return lambda: len(checkpoints(out)) >= number - 1 and any(folder.glob(".*"))


def after(seconds):
    """A function: have so many seconds passed since now?"""
    moment = time.time() + seconds
    return lambda: time.time() >= moment


def checkpoints(out):
    """Finished checkpoints, the oldest first."""
    return sorted(Path(out).glob("checkpoints/0*.pt"))


def children(pid):
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *children(child)]
    return found


def workers(agent):
    """The training processes below an agent of torchrun."""
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in children(agent.pid)}
    return [pid for pid, line in lines.items() if "train_sra.py" in line]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# Comparison


def differences(a, b, path=""):
    """Where two nested states are not bitwise the same."""
    if type(a) is not type(b):
        return [path]
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, (list, tuple)):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if not isinstance(a, dict):
        return [] if a == b else [path]
    if a.keys() != b.keys():
        return [path]
    return [d for key in a for d in differences(a[key], b[key], f"{path}/{key}")]


def lost(out, expected, step):
    """What differs between the last checkpoints of two finished runs."""
    states = []
    for folder in (out, expected):
        saved = torch.load(Path(folder, "checkpoints", f"{step:07d}.pt"), weights_only=True)
        states.append({part: saved[part] for part in STATE})
    return differences(*states)


# Faults; each returns what was tried and what was lost


def kills(script, times, folder, rng, steps=300):
    """SIGKILL so many times, every other time while a checkpoint is being written."""
    flags = f"{SCRIPTS[script]} --steps {steps} --save-every 20"
    if "TEACHER" in flags:
        teacher = Path(folder, "teacher")
        finish(start(script, teacher, "--steps 5"))
        flags = flags.replace("TEACHER", str(teacher))
    expected, out = Path(folder, f"{script}_whole"), Path(folder, f"{script}_killed")
    began = time.time()
    finish(start(script, expected, flags))
    duration = time.time() - began
    tried, gone = [], []
    while len(tried) < times:
        process = start(script, out, flags)
        if len(tried) % 2:
            where = "in a checkpoint"
            done = len(checkpoints(out))
            remaining = (steps // 20 - 1 - done) // (times - len(tried))
            happened = writing(out, done + rng.randint(1, max(1, remaining - 1)))
        else:
            where = "at random"
            happened = after(rng.uniform(0, 1.2 * duration / max(1, times // 2)))
        if not wait_for(happened, process):  # the run was faster: compare it, begin another one
            finish(process)
            gone += lost(out, expected, steps)
            shutil.rmtree(out)
            continue
        process.kill()
        process.wait()
        newest = checkpoints(out)[-1].stem.lstrip("0") if checkpoints(out) else "no checkpoint"
        tried.append(f"{where}, after {newest}")
    finish(start(script, out, flags))
    return tried, gone + lost(out, expected, steps)


def restarts(folder, rng, times=2, steps=150):
    """torchrun --max-restarts with two processes, of which one is killed: it goes on by itself."""
    flags = f"--steps {steps} --save-every 10"
    expected, out = Path(folder, "restarts_whole"), Path(folder, "restarts_killed")
    finish(start("train_sra", expected, flags, agent=TWO))
    process = start("train_sra", out, flags, agent=f"{TWO} --max-restarts={times}")
    for k in range(times):
        assert wait_for(reached(out, 35 + 50 * k), process), ended(process)
        victim = rng.choice(workers(process))
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda victim=victim: not Path(f"/proc/{victim}").exists(), process)
    finish(process)
    return [f"{times} workers"], lost(out, expected, steps)


def pair(out, flags, more=""):
    """Two nodes on this machine."""
    agent = f"--nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d --rdzv_id=faults {more}"
    agent += f" --rdzv_endpoint=127.0.0.1:{free_port()}"
    return [start("train_sra", out, flags, agent=agent) for _ in range(2)]


def nodes(folder, rng, steps=150):
    """Two nodes, one of which dies: the other stops by itself; the same commands go on."""
    flags = f"--steps {steps} --save-every 10"
    expected, out = Path(folder, "nodes_whole"), Path(folder, "nodes_killed")
    finish(start("train_sra", expected, flags, agent=TWO))
    both = pair(out, flags)
    assert wait_for(reached(out, 35), both[0])
    victim = both.pop(rng.randrange(2))
    for pid in (*children(victim.pid), victim.pid):
        os.kill(pid, signal.SIGKILL)
    victim.wait()
    ended(both[0])
    assert both[0].returncode != 0
    for process in pair(out, flags):
        finish(process)
    return ["one of two nodes"], lost(out, expected, steps)


def node_restarts(folder, rng, steps=150):
    """Two nodes with --max-restarts, and one worker killed: both begin anew by themselves."""
    flags = f"--steps {steps} --save-every 10"
    expected, out = Path(folder, "node_restarts_whole"), Path(folder, "node_restarts_killed")
    finish(start("train_sra", expected, flags, agent=TWO))
    both = pair(out, flags, "--max-restarts=3")
    assert wait_for(reached(out, 35), both[0])
    os.kill(rng.choice(workers(rng.choice(both))), signal.SIGKILL)
    for process in both:
        finish(process)
    return ["one worker of two nodes"], lost(out, expected, steps)


def full_disk(folder, rng, steps=40):
    """No room for the next checkpoint: the run stops, and the older ones are as they were.

    A limit on the size of files stands for a full disk.
    """
    flags = f"--save-every 10 --steps {steps}"
    expected, out = Path(folder, "disk_whole"), Path(folder, "disk_full")
    finish(start("train_sra", expected, flags))
    finish(start("train_sra", out, "--save-every 10 --steps 20"))
    before = {path.name: path.read_bytes() for path in checkpoints(out)}

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    process = start("train_sra", out, flags, preexec_fn=limit)
    assert "File too large" in ended(process) and process.returncode != 0
    assert {path.name: path.read_bytes() for path in checkpoints(out)} == before
    finish(start("train_sra", out, flags))
    return ["older checkpoints untouched"], lost(out, expected, steps)


def long_run(folder, rng, steps=5000):
    """Memory and open files: between a fifth of the way and the end neither grows."""
    out, memory, files = Path(folder, "long"), [], []
    flags = f"--steps {steps} --save-every 500 --keep 3"
    process = start("train_sra", out, flags)
    for step in range(steps // 5, steps, steps // 10):
        if wait_for(reached(out, step), process):
            status = Path(f"/proc/{process.pid}/status").read_text()
            memory.append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024)
            files.append(len(os.listdir(f"/proc/{process.pid}/fd")))
    finish(process)
    assert max(memory[1:]) - memory[0] < 20 and max(files) <= files[0] + 4, (memory, files)
    assert [int(path.stem) for path in checkpoints(out)] == [steps - 1000, steps - 500, steps]
    return [f"{memory[0]:.0f} to {memory[-1]:.0f} MB, {files[0]} to {files[-1]} files"], []


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--kills", type=int, default=20, help="in all, spread over the scripts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="NAME", help="the first word of a printed line")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    attempts = {}
    for k, script in enumerate(SCRIPTS):
        share = len(range(k, args.kills, len(SCRIPTS)))
        attempts[f"kills {script}"] = partial(kills, script, share)
    for fault in (restarts, nodes, node_restarts, full_disk, long_run):
        attempts[fault.__name__] = fault
    losses = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, attempt in attempts.items():
            if args.only and name.split()[0] != args.only:
                continue
            began = time.time()
            tried, gone = attempt(folder, rng)
            losses += len(gone)
            seconds = f"{time.time() - began:.0f} s"
            gone = ", ".join(gone[:5]) or "nothing"
            print(f"{name}: {'; '.join(tried)}; lost: {gone}; {seconds}", flush=True)
    sys.exit(1 if losses else 0)


if __name__ == "__main__":
    main()
