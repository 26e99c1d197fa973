"""Every architecture trains in every way here: QLoRA and LoRA (bf16 and fp16), 8 bit, full; plain, ZeRO-2, ZeRO-3."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from every_way import LAYOUTS, WAYS, cells
from recipes import recipe_of
from running import ROOT
from safetensors.torch import load_file

from pipeline.config.cluster import read_cluster
from pipeline.config.recipe import Model
from pipeline.core.files import read_json
from pipeline.models.loading import choose_attention, choose_dtype
from pipeline.sizing.fitting import needs
from pipeline.sizing.memory import states_of, zero_of
from pipeline.training.trainer import LEAST_BUCKET, preserve_adapter_dtype

CELLS = [(layout, *cell) for layout in LAYOUTS for cell in cells(layout)]


@pytest.fixture(scope="module")
def train_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Train the models of a layout, SFT and GRPO, in two processes of one torchrun; each layout once."""

    @cache
    def train(layout: str) -> Path:
        out = tmp_path_factory.mktemp(layout)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command = [*torchrun, "tests/support/every_way.py", layout, str(out)]
        env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr[-6000:]
        return out

    return train


@pytest.fixture(params=LAYOUTS)
def trained(request: pytest.FixtureRequest, train_in: Callable[[str], Path]) -> tuple[str, Path]:
    """A layout and what was trained in it."""
    return request.param, train_in(request.param)


def weights_of(step: Path) -> dict[str, torch.Tensor]:
    adapter = step / "adapter" / "adapter_model.safetensors"
    return dict(load_file(adapter if adapter.exists() else step / "model" / "model.safetensors"))


@pytest.mark.parametrize(("layout", "name", "way"), CELLS)
def test_it_learns_and_grpo_goes_on_from_it(train_in: Callable[[str], Path], layout: str, name: str, way: str) -> None:
    folder = train_in(layout) / name / way
    losses = [entry["loss"] for entry in read_json(folder / "sft" / "history.json") if "loss" in entry]
    assert losses[-1] < losses[0] - 0.15
    sft, grpo = weights_of(folder / "sft"), weights_of(folder / "grpo")
    assert sft.keys() == grpo.keys()  # the same adapter, not a second one
    assert any("lora_B" in key for key in sft) == (way != "full")
    half = choose_dtype(recipe_of(name, *(word for word in WAYS[way] if not word.startswith("cluster."))).model)
    wanted = {torch.float32} if layout == "none" else {half, torch.float32}
    assert {weights.dtype for weights in grpo.values()} <= wanted  # never another 16-bit format (trl#4901)
    moved = max((sft[key].float() - grpo[key].float()).abs().max().item() for key in sft)
    kl = next(entry["kl"] for entry in read_json(folder / "grpo" / "history.json") if "kl" in entry)
    if way in ("nf4", "full"):
        assert kl == 0  # no dropout: the policy is its own reference, which is the SFT model and not the base
    else:
        assert 0 < kl < (2e-3 if name == "gemma3-1b" else 1e-3)  # its norms after each map amplify dropout's noise
        assert moved == pytest.approx(0.01, rel=0.05)  # a step of Adam is as long as the learning rate


@pytest.mark.parametrize("way", ["lora", "full"])
def test_deepspeed_shares_out_the_optimizer_as_the_planner_says(trained: tuple[str, Path], way: str) -> None:
    """The states that each of two processes has saved, in bytes."""
    layout, out = trained
    step = out / "qwen1.5b" / way / "sft"
    shards = sorted(step.glob("checkpoints/checkpoint-2/global_step2/*optim_states.pt"))
    assert len(shards) == (0 if layout == "none" else 2)
    tied = "lm_head.weight"  # saved twice, there once
    count = sum(weights.numel() for key, weights in weights_of(step).items() if key != tied)
    terms = states_of(count, recipe_of("qwen1.5b").sft.optimizer, zero_of(layout), 2, way == "lora")
    wanted = sum(term.bytes for term in terms if term.what.startswith(("float32 copy", "optimizer")))
    for shard in shards:
        saved = torch.load(shard, weights_only=False, map_location="cpu")["optimizer_state_dict"]
        assert size_of(saved) == pytest.approx(wanted, rel=0.001)


@pytest.mark.parametrize("way", ["bf16", "int8", "lora", "full"])
def test_generation_holds_the_weights_that_the_planner_counts(trained: tuple[str, Path], way: str) -> None:
    """Of two processes each: under ZeRO-3 all of the model and its half, else the model once."""
    layout, out = trained
    folder = out / "qwen1.5b" / way
    held = read_json(folder / "grpo" / "weights.json")
    if layout != "zero3":
        assert held["while_generating"] <= held["before"]
    elif way == "int8":  # between two uses bitsandbytes keeps whole what it has multiplied with
        assert held["before"] > 1.1 * held["while_generating"] / 3
    else:
        scales = 0.004 * (way == "bf16")
        assert held["while_generating"] / held["before"] == pytest.approx(3 - 2 * scales, rel=0.002)
    if way != "bf16" or layout == "none":
        return
    # in 16 bit, as on a GPU, the bytes themselves
    words = [word for word in WAYS[way] if not word.startswith("cluster.")]
    recipe = recipe_of("qwen1.5b", *words, "grpo.beta=0.1", f"model.name={folder / 'preprocess' / 'model'}")
    words = ["processes=2", f"grpo.deepspeed={layout}", "grpo.per_device_batch_size=1", "gpus=2"]
    cluster, problems = read_cluster("local", words)
    assert cluster is not None, problems
    need = next(need for need in needs(recipe, cluster) or [] if need.phase == "grpo, generating")
    kinds = ("weights", "scales", "adapters, 16 bit", "reference adapter", "the whole model")
    assert sum(term.bytes for term in need.terms if term.what.startswith(kinds)) == pytest.approx(
        held["while_generating"], rel=0.02
    )


@pytest.mark.parametrize("way", ["nf4", "int8", "lora", "full"])
def test_a_save_of_an_adapter_does_not_clone_its_base(trained: tuple[str, Path], way: str) -> None:
    """Below ZeRO-3, in each process. Before: the whole state, 4-bit weights and their constants too."""
    layout, out = trained
    if layout != "zero2":
        return
    step = out / "qwen1.5b" / way / "sft"
    saved = read_json(step / "engine.json")["saved"]
    assert any("layers.0.self_attn.q_proj" in name for name in saved)
    assert not [name for name in saved if ".base_layer." in name]
    assert {name for name in saved if "lora_" in name} == {
        key.replace(".weight", ".default.weight") for key in weights_of(step) if "lora_" in key
    }


@pytest.mark.parametrize("way", ["fp16", "fp16 lora", "bf16"])
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_deepspeed_computes_in_16_bit_and_sums_gradients_in_32(trained: tuple[str, Path], stage: str, way: str) -> None:
    """Also where GRPO starts from SFT's adapter, which PEFT would load in float32: then nothing would be scaled."""
    layout, out = trained
    step = out / "qwen1.5b" / way / stage
    metrics = read_json(step / "metrics.json")
    assert ("loss_scale" in metrics) == (way != "bf16")
    if layout == "none":
        assert metrics.get("loss_scale", 1) == 1  # accelerate scales nothing on a CPU
        return
    engine = read_json(step / "engine.json")
    assert engine["dtype"] == ("torch.bfloat16" if way == "bf16" else "torch.float16")
    assert engine["summed_in"] == "torch.float32"
    assert engine["bucket"] == max(engine["width"] ** 2, LEAST_BUCKET)  # not DeepSpeed's own 500 million elements
    if way != "bf16":
        assert metrics["loss_scale"] == 2**12


def test_an_overflow_of_float16_is_a_skipped_step(trained: tuple[str, Path]) -> None:
    if trained[0] == "none":
        pytest.skip("accelerate scales nothing on a CPU")
    step = trained[1] / "overflow" / "sft-20"
    assert not (step / "error.json").exists()
    metrics = read_json(step / "metrics.json")
    assert metrics["steps"] == 10
    assert 1 <= metrics["skipped_steps"] <= 8
    assert metrics["loss_scale"] < 2**20
    entries = [entry for entry in read_json(step / "history.json") if "loss" in entry]
    counts = [entry["skipped_steps"] for entry in entries]
    assert counts == sorted(counts)
    assert counts[-1] == metrics["skipped_steps"]
    skipped = [entry["skipped_steps"] > before for before, entry in zip([0, *counts], entries, strict=False)]
    assert [entry["grad_norm"] is None for entry in entries] == skipped
    assert any(weights.any() for key, weights in weights_of(step).items() if "lora_B" in key)  # 0 before training


def test_a_stage_whose_every_step_overflows_fails(trained: tuple[str, Path]) -> None:
    if trained[0] == "none":
        pytest.skip("accelerate scales nothing on a CPU")
    step = trained[1] / "overflow" / "sft-60"
    (problem,) = read_json(step / "error.json")
    assert problem.startswith("no optimizer step was taken: the gradients of all 2 steps overflowed float16")
    assert not (step / "adapter").exists()
    assert not (step / "checkpoints").exists()  # or a rerun would resume at the end


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_without_padding_the_loss_and_its_gradient_are_the_same(trained: tuple[str, Path], stage: str) -> None:
    histories = [read_json(trained[1] / "padding_free" / word / stage / "history.json") for word in ("true", "false")]
    flat, padded = ([entry for entry in history if "loss" in entry] for history in histories)
    assert [entry["loss"] for entry in flat] == pytest.approx([entry["loss"] for entry in padded], rel=1e-4, abs=1e-6)
    norms = [[entry["grad_norm"] for entry in entries] for entries in (flat, padded)]
    assert min(norms[1]) > 0
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def size_of(value: Any) -> int:
    """Bytes of the tensors in it."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(size_of, parts))


def test_adapters_are_not_rounded_when_a_trainer_is_made(tmp_path: Path) -> None:
    class Adapted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_A = torch.nn.Parameter(torch.tensor([1.001]))

    model = Adapted()
    with preserve_adapter_dtype(model):
        model.lora_A.data = model.lora_A.data.to(torch.bfloat16)  # as TRL does
    assert model.lora_A.dtype == torch.float32
    assert model.lora_A.item() == pytest.approx(1.001)


# ---------------------------------------------------------------- one place decides


def on_gpu(monkeypatch: pytest.MonkeyPatch, major: int, minor: int, *, flash: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, minor))
    monkeypatch.setattr("pipeline.models.loading.is_flash_attn_2_available", lambda: flash)


def model_of(*words: str) -> Model:
    return recipe_of("deepseek7b", *words).model


@pytest.mark.parametrize(
    ("gpu", "dtype"),
    [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((8, 6), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_the_compute_capability_decides_the_precision(
    monkeypatch: pytest.MonkeyPatch, gpu: tuple[int, int], dtype: torch.dtype
) -> None:
    on_gpu(monkeypatch, *gpu)
    assert choose_dtype(model_of()) is dtype
    assert choose_dtype(model_of("model.dtype=float32")) is torch.float32


def test_a_gpu_is_not_asked_for_a_precision_it_emulates(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, 7, 5)
    with pytest.raises(
        Exception, match=r"model\.dtype: got bfloat16, which this GPU \(compute capability 7\.5\) does not support"
    ):
        choose_dtype(model_of("model.dtype=bfloat16"))


@pytest.mark.parametrize(
    ("gpu", "flash", "words", "attention"),
    [
        ((8, 0), True, [], "flash_attention_2"),
        ((8, 0), False, [], "sdpa"),  # not installed
        ((7, 5), True, [], "sdpa"),  # Turing
        ((9, 0), True, ["model.dtype=float32"], "sdpa"),
        ((9, 0), True, ["model.attention=eager"], "eager"),
    ],
)
def test_flash_attention_only_where_it_is_installed_and_supported(
    monkeypatch: pytest.MonkeyPatch, gpu: tuple[int, int], flash: bool, words: list[str], attention: str
) -> None:
    on_gpu(monkeypatch, *gpu, flash=flash)
    assert choose_attention(model_of(*words)) == attention


def test_a_cpu_has_sdpa() -> None:
    assert choose_attention(model_of()) == "sdpa"
