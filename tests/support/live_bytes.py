"""The peak of live tensor bytes while real model code runs on tensors without data: memory without the hardware."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations make, as long as something holds them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.peak = 0, 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.seen:
                    self.seen.add(key)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self.gone, key, storage.nbytes())
        return result

    def gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


class _Flash(torch.autograd.Function):
    """What FlashAttention keeps for its backward: queries, keys, values and the output."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def flash(
    module: torch.nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **_: Any
) -> tuple[torch.Tensor, None]:
    return _Flash.apply(q, k, v).transpose(1, 2), None  # type: ignore[no-untyped-call]


def repeated(
    module: torch.nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **rest: Any
) -> tuple[torch.Tensor, None]:
    """The same where transformers repeats the keys that heads share, before it calls SDPA."""
    groups = module.num_key_value_groups
    return flash(module, q, repeat_kv(k, groups), repeat_kv(v, groups), mask, **rest)


AttentionInterface.register("live_bytes", flash)
AttentionInterface.register("live_bytes_repeated", repeated)


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The peak of storages that some tensor of the program still views: for code that keeps nothing for a backward."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.peak = 0, 0
        self.known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self.views: dict[int, int] = {}
        self.tensors: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and id(tensor) not in self.tensors:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.tensors.add(id(tensor))
                    weakref.finalize(tensor, self.gone, id(tensor), storage._cdata, storage.nbytes())
                    self.live += storage.nbytes() * (storage._cdata not in self.views)
                    self.views[storage._cdata] = self.views.get(storage._cdata, 0) + 1
                    self.peak = max(self.peak, self.live)
        return result

    def gone(self, tensor: int, storage: int, size: int) -> None:
        self.tensors.discard(tensor)
        self.views[storage] -= 1
        if not self.views[storage]:
            del self.views[storage]
            self.live -= size
