"""What is told where vLLM is not installed, as beside these tests."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from recipes import recipe_of
from running import run_cli

from pipeline.core.errors import LaunchError
from pipeline.engines.vllm import VllmEngine, VllmSettings
from pipeline.models.loading import train_tokenizer

assert importlib.util.find_spec("vllm") is None


def test_an_engine_that_is_not_there_names_the_line_that_installs_it() -> None:
    """A node may lack what the machine that checked has."""
    settings = VllmSettings(dtype=torch.float32, rows=1, max_length=64, quantization="nf4", use="grpo")
    with pytest.raises(LaunchError) as refused:
        VllmEngine("nowhere", train_tokenizer(["a"] * 9, 300), [1], settings)
    assert [text.partition(" Fix: ")[0] for text in refused.value.problems] == [
        "cluster.generation.grpo.engine: package vllm is not installed.",
        "cluster.generation.grpo.engine: package vllm-bnb-plugin, which reads 4-bit models for vLLM, is not installed.",
    ]
    assert all("pip install vllm==0.31.0" in text for text in refused.value.problems)


def test_chat_refuses_it_before_a_model_is_loaded() -> None:
    name = recipe_of("qwen1.5b").model.name
    done = run_cli("chat", "--ckpt", name, "Why?", "cluster.generation.evaluate.engine=vllm")
    assert done.returncode == 2
    assert "error: cluster.generation.evaluate.engine: package vllm is not installed. Fix: " in done.stderr
    assert "Traceback" not in done.stderr
