"""Runs a training script as it is, and leaves the final state of every process in OUT/ranks: for tests.

    torchrun --nproc_per_node=2 tests/as_ranks.py FAULT train_sra.py --steps 4 --out OUT ...

FAULT: none; apart, where rank 1 changes one weight after its second step; not-finite, where its loss is not a number in the third.
"""

import importlib
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

fault, name, *flags = sys.argv[1:]
sys.argv = [name, *flags]
script = importlib.import_module(Path(name).stem)
method = next(
    value
    for value in vars(script).values()
    if isinstance(value, type) and hasattr(value, "after_step")
)
args, rank = script.parse_args(), os.environ["RANK"]


class Watched(method):
    def forward(self, x0, y, **draws):
        terms = super().forward(x0, y, **draws)
        if (fault, rank, self.step) == ("not-finite", "1", 2):
            terms["loss"] = terms["loss"] * float("nan")
        return terms

    def after_step(self, step, steps):
        super().after_step(step, steps)
        if (fault, rank, step) == ("apart", "1", 1):
            next(self.model.parameters()).add_(1e-3)
        if step + 1 == steps:
            folder = Path(args.out, "ranks")
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(self.state_dict(), folder / f"{rank}.pt")


script.main(Watched, args)
