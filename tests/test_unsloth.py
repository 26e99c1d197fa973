"""Unsloth as a backend: refused with the reason where it cannot be, called by its own names where it can.

The package caps TRL below what this project needs and wants a GPU, so its own code runs in no test: a stand-in with
the arguments of its release 2026.10.9 does.
"""

from __future__ import annotations

import importlib.metadata
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config.cluster import read_cluster
from pipeline.config.recipe import Scratch, read
from pipeline.core.errors import RecipeError
from pipeline.models.loading import make_scratch
from pipeline.preflight import checks as preflight
from pipeline.training.trainer import trainable
from pipeline.workflow.artifact import find_checkpoint
from pipeline.workflow.plan import make_plan

ON = ["model.backend=unsloth", "lora.enabled=true", "sft.optimizer.name=adamw_torch"]


def told(tmp_path: Path, *words: str) -> str:
    return "\n".join(preflight.problems(make_plan(["qwen1.5b"], [*ON, *words], cluster="local", runs=tmp_path))[0])


def test_where_it_is_not_installed_the_reason_is_told(tmp_path: Path) -> None:
    assert "model.backend: 'unsloth', but the package is not installed (2026.10.9 asks for trl" in told(tmp_path)
    with pytest.raises(RecipeError, match=r"model\.backend: 'unsloth' trains adapters here; set lora\.enabled=true"):
        make_plan(["tiny"], ["model.backend=unsloth"], runs=tmp_path)


def test_where_it_is_installed_what_does_not_fit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.requires
    needs = ["trl<=1.15.0,>=0.18.2", "torch>=2.4.0", "numpy", 'triton-windows; sys_platform == "win32"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needs if name == "unsloth" else real(name))
    found = told(tmp_path, "cluster.gpus=0")
    here = importlib.metadata.version("trl")
    assert f"the installed unsloth asks for trl<=1.15.0,>=0.18.2, here is {here}" in found
    assert "asks for torch" not in found
    assert "needs a GPU, and this cluster has none" in found
    assert "does not go with DeepSpeed; say cluster.sft.deepspeed=none" in found
    needs[0] = "trl>=1.0"
    alone = ["cluster.gpus=1", "cluster.sft.deepspeed=none", "cluster.grpo.deepspeed=none"]
    assert "unsloth" not in told(tmp_path, *alone)


class FastLanguageModel:
    """The two calls, with the names of 2026.10.9, on transformers and peft."""

    asked: dict[str, Any]

    @staticmethod
    def from_pretrained(
        model_name: str,
        max_seq_length: int,
        dtype: torch.dtype,
        load_in_4bit: bool,
        load_in_8bit: bool,
        load_in_16bit: bool,
        revision: str | None,
        use_gradient_checkpointing: str | bool,
        trust_remote_code: bool,
    ) -> tuple[Any, Any]:
        assert not trust_remote_code
        FastLanguageModel.asked = {"4bit": load_in_4bit, "8bit": load_in_8bit, "length": max_seq_length}
        model = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype)
        return model, AutoTokenizer.from_pretrained(model_name)

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int,
        target_modules: list[str] | str,
        lora_alpha: float,
        lora_dropout: float,
        use_gradient_checkpointing: str | bool,
        random_state: int,
        max_seq_length: int,
    ) -> Any:
        return get_peft_model(model, LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=target_modules))


def test_a_fresh_adapter_is_made_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("unsloth")
    module.FastLanguageModel = FastLanguageModel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "unsloth", module)
    make_scratch(Scratch("qwen2", 400, 16, 1, 2, 2, 32, 128, 10000.0, 0.02), ["A B"] * 20, "think", tmp_path, 0)
    recipe, _ = read("qwen1.5b", [*ON, "lora.r=5", "model.dtype=float32"])
    cluster, _ = read_cluster("local", ["sft.deepspeed=none"])
    assert recipe is not None
    assert cluster is not None
    model = trainable(recipe, find_checkpoint(str(tmp_path)), cluster.sft)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert weights
    assert all("lora_" in name for name in weights)
    assert {p.shape[0] for name, p in weights.items() if "lora_A" in name} == {5}
    lengths = (recipe.sft.max_length, recipe.grpo.max_prompt_length + recipe.grpo.max_completion_length)
    assert FastLanguageModel.asked == {"4bit": True, "8bit": False, "length": max(lengths)}
