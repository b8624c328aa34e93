"""Curves of one or several runs in one picture, a panel for each term of their log.jsonl.

    python tests/curves.py results/train_sra results/train_mdt --terms loss grad_norm

Without --terms: all that one of the runs has logged. A point is the mean of neighbouring lines of
the log, at most --points of them a run. What an interrupted run logged twice counts once.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from probe import COLOURS, curves, legend

OTHERS = ("step", "time", "seconds", "epoch", "images_per_s", "lr")  # no terms of the loss


def read_log(path):
    """The rows of a run's log, by step; a later one of the same step replaces an earlier one."""
    rows = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return [row for _, row in sorted({row["step"]: row for row in rows if "step" in row}.items())]


def points(rows, term, limit):
    """[(step, mean), ...] of a term: neighbours are averaged, so that at most `limit` are left."""
    values = np.array([(row["step"], row[term]) for row in rows if term in row])
    parts = np.array_split(values, max(1, min(limit, len(values))))
    return [part.mean(0).tolist() for part in parts if len(part)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="--out of a run")
    parser.add_argument("--terms", nargs="+", help="names in log.jsonl (default: all)")
    parser.add_argument("--since", type=int, default=0, help="first step that is shown")
    parser.add_argument("--points", type=int, default=100, help="of a curve, at most")
    parser.add_argument("--out", type=Path, default=Path("results/curves.png"))
    args = parser.parse_args()
    for run in args.runs:
        if not (run / "log.jsonl").is_file():
            parser.error(f"{run} holds no log.jsonl")
    logs = [[row for row in read_log(run) if row["step"] >= args.since] for run in args.runs]
    logged = dict.fromkeys(name for rows in logs for row in rows for name in row)
    terms = args.terms or [name for name in logged if name not in OTHERS]
    if not set(terms) <= logged.keys():
        parser.error(f"--terms: choose from {', '.join(logged)}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    width = 20 + 360 * min(3, len(terms))
    image = Image.new("RGB", (width, 60 + 270 * -(-len(terms) // 3) + 20 * len(logs)), "white")
    draw = ImageDraw.Draw(image)
    colours = [COLOURS[k % len(COLOURS)] for k in range(len(logs))]
    for k, term in enumerate(terms):
        left, top = 70 + 360 * (k % 3), 30 + 270 * (k // 3)
        lines = [(c, 2, points(rows, term, args.points)) for c, rows in zip(colours, logs)]
        curves(draw, (left, top, left + 280, top + 200), lines, term)
    entries = list(zip(map(str, args.runs), colours))
    bottom = legend(draw, entries, 70, 270 * -(-len(terms) // 3), columns=1)
    image.crop((0, 0, width, bottom)).save(args.out)


if __name__ == "__main__":
    main()
