"""What is here, and kernels that only a GPU takes: checks of scripts/prove-gpu."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from proof import Measured, Place, check

from pipeline.config.cluster import half_precision
from pipeline.config.recipe import Model
from pipeline.sizing.model_sizes import GIB


def peak() -> dict[str, float]:
    """GiB that were allocated and reserved at most; empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    torch.cuda.synchronize()
    most = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return {name: size / GIB for name, size in most.items()}


def allocated() -> float:
    """GiB that are allocated now, from which the next peak is counted; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / GIB


# ---------------------------------------------------------------- environment


@check("the card's architecture is one that torch was built for", "its sm_… is listed", needs_gpu=True)
def known_architecture(place: Place) -> Measured:
    major, minor = torch.cuda.get_device_capability()
    listed = torch.cuda.get_arch_list()
    return Measured(f"sm_{major}{minor} of {', '.join(listed)}", any(f"{major}{minor}" in name for name in listed))


@check(
    "the stages compute in the card's own 16-bit format",
    "bfloat16 from capability 8.0 on, else float16",
    needs_gpu=True,
)
def own_precision(place: Place) -> Measured:
    from pipeline.models.loading import choose_dtype

    major, minor = torch.cuda.get_device_capability()
    dtype = choose_dtype(Model("x", None, None, None, None, "none", "auto", "auto"))
    return Measured(str(dtype), str(dtype) == f"torch.{half_precision(major + minor / 10)}")


@check("Triton can compile on this node", "a C compiler and Python.h", needs_gpu=True)
def compiler(place: Place) -> Measured:
    found = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    header = (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()
    return Measured(f"{found or 'no compiler'}, {'Python.h' if header else 'no Python.h'}", bool(found) and header)


@check("the packages of a run are here", "torch, transformers, trl, peft, deepspeed, bitsandbytes are imported")
def packages(place: Place) -> Measured:
    import bitsandbytes
    import deepspeed
    import peft
    import transformers
    import trl

    found: list[ModuleType] = [torch, transformers, trl, peft, deepspeed, bitsandbytes]
    return Measured(", ".join(f"{module.__name__} {module.__version__}" for module in found), True)


# ---------------------------------------------------------------- kernels


@check("a product with nf4 weights equals unpacking and multiplying", "relative error < 1 % for 1 to 700 rows")
def nf4_product(place: Place, dtype: str) -> Measured:
    from bitsandbytes.autograd._functions import matmul_4bit
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    kind = getattr(torch, dtype)
    high, wide = (256, 128) if place.small else (18944, 3584)
    torch.manual_seed(0)
    weights = torch.randn(high, wide, device=place.device, dtype=kind) * 0.02
    packed, state = quantize_4bit(weights, blocksize=64, compress_statistics=True, quant_type="nf4", quant_storage=kind)
    plain = dequantize_4bit(packed, state).double()
    errors = {}
    for rows in (1, 4, 5, 8, 16, 32, 64, 129, 700):
        given = torch.randn(rows, wide, device=place.device, dtype=kind)
        wanted = given.double() @ plain.t()
        found = matmul_4bit(given, packed, quant_state=state).double()
        errors[rows] = float((found - wanted).norm() / wanted.norm())
    worst = max(errors, key=lambda rows: errors[rows])
    return Measured(f"{100 * errors[worst]:.2f} % at {worst} rows", errors[worst] < 0.01, {"relative_error": errors})


@check("TRL's fused head in Triton equals its torch form, forward and backward", "< 2 % apart, < 0.1 nats from float32")
def fused_head(place: Place) -> Measured:
    import trl.kernels.chunked_logprob as head

    rows, wide, vocabulary = (64, 32, 1000) if place.small else (600, 896, 151_936)
    torch.manual_seed(1)
    hidden = (torch.randn(rows, wide, device=place.device) * 0.5).to(torch.bfloat16)
    weights = (torch.randn(vocabulary, wide, device=place.device) * 0.05).to(torch.bfloat16)
    target = torch.randint(vocabulary, (rows,), device=place.device)
    compiled = head._TRITON_AVAILABLE and place.gpu

    def scored(triton: bool) -> tuple[torch.Tensor, ...]:
        head._TRITON_AVAILABLE = triton
        given = hidden.clone().requires_grad_()
        outputs = ("log_probs", "entropy")
        chosen, entropy, *_ = head.ChunkedLogProbFunction.apply(
            given, weights, None, target, 0.6, 32768, None, 1.0, outputs
        )
        torch.autograd.backward([chosen.sum() + 0.1 * entropy.sum()])
        assert given.grad is not None
        return chosen.detach(), entropy.detach(), given.grad

    first, second = scored(compiled), scored(False)
    exact = torch.log_softmax(hidden.float() @ weights.float().t() / 0.6, -1).gather(-1, target[:, None])[:, 0]
    apart = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(first, second, strict=True)]
    off = float((first[0] - exact).abs().max())
    form = "Triton" if compiled else "the torch form on both sides"
    got = f"{100 * max(apart):.2f} % apart, {off:.3f} nats from float32 ({form})"
    return Measured(got, max(apart) < 0.02 and off < 0.1 and (compiled or place.small), {"apart": apart})


@check("grouped attention without flash kernels, as on Turing", "repeated keys: the same values, under half the memory")
def grouped_attention(place: Place) -> Measured:
    """F3: asked for grouped heads, only the math kernel answers, with whole score matrices in float32."""
    from torch.nn.functional import scaled_dot_product_attention as attention

    length, wide, heads, groups = (128, 32, 4, 2) if place.small else (2448, 128, 28, 4)
    torch.manual_seed(2)
    kind = torch.float16 if place.gpu else torch.float32
    shapes = [(1, heads, length, wide), (1, groups, length, wide), (1, groups, length, wide)]
    query, key, value = (torch.randn(shape, device=place.device, dtype=kind) for shape in shapes)
    found: dict[str, tuple[torch.Tensor, float]] = {}
    with without_flash(place):
        for name in ("grouped", "repeated"):
            q, k, v = (tensor.clone().requires_grad_() for tensor in (query, key, value))
            before = allocated()
            more = heads // groups if name == "repeated" else 1
            out = attention(
                q,
                k.repeat_interleave(more, 1),
                v.repeat_interleave(more, 1),
                is_causal=True,
                enable_gqa=name == "grouped",
            )
            torch.autograd.backward([out.sum()])
            found[name] = (out.detach(), peak().get("allocated", 0.0) - before)
    same = torch.allclose(found["grouped"][0], found["repeated"][0], atol=2e-3 if place.gpu else 1e-5)
    bytes_ = {name: round(size, 3) for name, (_, size) in found.items()}
    got = f"{'the same' if same else 'other'} values" + (f"; GiB {bytes_}" if place.gpu else "")
    return Measured(got, same and (place.small or 2 * bytes_["repeated"] < bytes_["grouped"]), bytes_)


@check("keys that heads share, by compute capability", "repeated at 7.5, left to SDPA at 8.0")
def repeated_keys(place: Place) -> Measured:
    """What transformers is asked for on a Turing card and on an Ampere one, whatever card this is."""
    from transformers.integrations import sdpa_attention

    from pipeline.models import loading as modeling

    capability, use_gqa = modeling.compute_capability, sdpa_attention.use_gqa_in_sdpa
    keys = torch.randn(1, 2, 8, 4, device=place.device)
    asked = {}
    try:
        for gpu in (8.0, 7.5):
            modeling.compute_capability = partial(float, gpu)
            modeling.repeat_keys_before_ampere()
            asked[gpu] = bool(sdpa_attention.use_gqa_in_sdpa(None, keys, keys))
    finally:
        modeling.compute_capability, sdpa_attention.use_gqa_in_sdpa = capability, use_gqa
    got = ", ".join(f"{'left to SDPA' if grouped else 'repeated'} at {gpu}" for gpu, grouped in asked.items())
    return Measured(got, asked == {8.0: True, 7.5: False})


@contextmanager
def without_flash(place: Place) -> Iterator[None]:
    """The kernels that a card of capability 7.5 has to choose from."""
    switches = (torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.enable_cudnn_sdp)
    for switch in switches if place.gpu else ():
        switch(False)
    yield
    for switch in switches if place.gpu else ():
        switch(True)
