"""Faults of a model's input, for tests/train/test_recovery.py: put this folder on PYTHONPATH.

TRAIN_ROWS and GENERATE_ROWS are the rows that a model can be given at once, with gradients and without, on rank
ON_RANK. More of them raise what CUDA's allocator raises. BAD_ROW is a file: the first row of the BAD_CALL-th
micro-batch of rank 0 is written there, and that row makes the loss of its batch NaN from then on, in every process.
KILL_CALL: at that micro-batch of its process rank 0 is killed; each takes a while.
Python imports this module by itself when it starts.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType


class Faults(importlib.abc.MetaPathFinder):
    """Limits torch's embeddings as soon as the training code is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name in ("pipeline.training.devices", "pipeline.engines.transformers"):
            limit_rows()
        return None


def limit_rows() -> None:
    import torch

    if getattr(torch.nn.Embedding, "limited", False):
        return
    whole = torch.nn.Embedding.forward
    bad_row, calls = os.environ.get("BAD_ROW"), [0]

    def forward(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and (kill := os.environ.get("KILL_CALL")) and os.environ["RANK"] == "0":
            calls[0] += 1
            time.sleep(0.6)  # progress.json is written twice a second, so each step is in it
            if calls[0] == int(kill):
                os.kill(os.getpid(), signal.SIGKILL)
        if bad_row and torch.is_grad_enabled() and ids.dim() == 2:
            rows = [str(sorted(row)) for row in ids.tolist()]
            calls[0] += 1
            if calls[0] == int(os.environ["BAD_CALL"]) and os.environ["RANK"] == "0" and not Path(bad_row).exists():
                Path(bad_row).write_text(rows[0])
            if Path(bad_row).exists() and Path(bad_row).read_text() in rows:
                return whole(self, ids) * float("nan")
        limit = int(os.environ.get("TRAIN_ROWS" if torch.is_grad_enabled() else "GENERATE_ROWS", "1000"))
        if ids.dim() == 2 and len(ids) > limit and os.environ.get("RANK", "0") == os.environ.get("ON_RANK", "0"):
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {len(ids)} GiB of {limit} GiB")
        return whole(self, ids)

    setattr(torch.nn.Embedding, "forward", forward)  # noqa: B010 (what mypy refuses)
    setattr(torch.nn.Embedding, "limited", True)  # noqa: B010


sys.meta_path.insert(0, Faults())
