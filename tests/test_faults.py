"""Faults that fit into a test run; `python tests/faults.py` tries all of them, many times over."""

import random

import faults
import pytest
from test_end_to_end import MODES
from test_training import checkpoint, train


def test_killed_at_random_and_within_a_checkpoint_nothing_is_lost(tmp_path):
    hits, lost = faults.kills("train_sra.py", tmp_path, 2, random.Random(0), steps=100)
    assert len(hits) == 2 and lost == []


@pytest.mark.parametrize(
    "fault", [faults.full_disk, faults.same_folder, faults.not_finite], ids=lambda f: f.__name__
)
def test_fault(tmp_path, fault):
    hits, lost = fault(tmp_path)
    assert hits and lost == []


def test_a_loss_is_noticed(tmp_path):
    """The comparison itself: one bit of the optimizer's state, one line of the log."""
    for name in ("a", "b"):
        train(tmp_path / name, "--steps", "3")
    assert faults.lost(tmp_path / "a", tmp_path / "b", 3) == []
    state = checkpoint(tmp_path / "b", 3)
    moment = state["optimizer"]["state"][0]["exp_avg_sq"].flatten()
    moment[0] = moment[0] * (1 + 1e-6) + 1e-30
    faults.torch.save(state, tmp_path / "b" / "checkpoints" / "0000003.pt")
    assert faults.lost(tmp_path / "a", tmp_path / "b", 3) == ["/optimizer/state/0/exp_avg_sq"]
    with open(tmp_path / "b" / "log.jsonl", "a") as log:
        log.write('{"step": 4}\n')
    assert faults.lost(tmp_path / "a", tmp_path / "b", 3)[1:] == ["log.jsonl"]


def test_only_the_newest_checkpoints_are_kept(tmp_path, capfd):
    """--keep counts from the one just written: an unreadable one of a higher number does not push out the readable ones."""
    names = lambda: [p.name for p in sorted((tmp_path / "checkpoints").glob("*.pt"))]  # noqa: E731
    train(tmp_path, "--steps", "8", "--save-every", "2")
    assert names() == ["0000002.pt", "0000004.pt", "0000006.pt", "0000008.pt"]
    (tmp_path / "checkpoints" / "0000008.pt").write_bytes(b"")
    (tmp_path / "checkpoints" / "0000006.pt").write_bytes(b"torn")
    train(tmp_path, "--steps", "5", "--save-every", "5", "--keep", "1")
    assert (
        names() == ["0000005.pt", "0000006.pt", "0000008.pt"]
        and checkpoint(tmp_path, 5)["step"] == 5
    )
    error = capfd.readouterr().err
    assert "0000008.pt cannot be read" in error and "0000006.pt cannot be read" in error
    train(tmp_path, "--steps", "12", "--save-every", "2", "--keep", "2")
    assert names() == ["0000010.pt", "0000012.pt"] and checkpoint(tmp_path, 12)["step"] == 12


def test_a_damaged_line_of_the_log_is_dropped(tmp_path):
    train(tmp_path, "--steps", "3")
    log = tmp_path / "log.jsonl"
    start, step = log.read_text().splitlines()
    log.write_text(f'{start}\n{{"step": 2, "lo\n[1]\n"text"\n{step}\n{{"step": 3')
    train(tmp_path, "--steps", "6")
    assert [line["step"] for line in faults.log_lines(tmp_path)] == [3, 6]


def test_modes_cover_every_script():
    assert {script for script, _ in MODES.values()} | {"train_sra"} == {
        name.removesuffix(".py") for name in faults.SCRIPTS
    }
