"""A device that holds few rows, for tests/train/test_recovery.py: put this folder on PYTHONPATH.

TRAIN_ROWS and GENERATE_ROWS are the rows that a model can be given at once, with gradients and without. More of them
raise what CUDA's allocator raises. Python imports this module by itself when it starts.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType


class SmallMemory(importlib.abc.MetaPathFinder):
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

    def forward(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        limit = int(os.environ["TRAIN_ROWS" if torch.is_grad_enabled() else "GENERATE_ROWS"])
        if ids.dim() == 2 and len(ids) > limit and os.environ.get("RANK", "0") == os.environ.get("ON_RANK", "0"):
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {len(ids)} GiB of {limit} GiB")
        return whole(self, ids)

    setattr(torch.nn.Embedding, "forward", forward)  # noqa: B010 (what mypy refuses)
    setattr(torch.nn.Embedding, "limited", True)  # noqa: B010


sys.meta_path.insert(0, SmallMemory())
