"""The tests of this folder run where vLLM is installed: scripts/test runs them with what scripts/setup --vllm makes."""

from __future__ import annotations

import importlib
import os
import warnings

import pytest

from pipeline.sizing.engines import ENVIRONMENT

for name, value in {**ENVIRONMENT, "HF_HUB_OFFLINE": "1"}.items():  # before anything imports vllm
    os.environ.setdefault(name, value)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    importlib.import_module("trl.trainer.grpo_trainer")  # and vllm, whose modules warn while they are imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let vLLM and the libraries below it warn each other: none of it is about this project."""
    for item in items:
        if item.path.parent.name == "vllm":
            item.add_marker(pytest.mark.filterwarnings("default"))
