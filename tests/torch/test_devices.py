"""devices: GPUs that are asked for and not there are an error on the node; what a stage ran on is written down."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from recipes import recipe_of

from pipeline.config.cluster import Cluster, read_cluster
from pipeline.core.errors import LaunchError
from pipeline.sizing.model_sizes import GIB
from pipeline.training import devices
from pipeline.workflow.runtime import format_hardware


def cluster_of(name: str = "2x2080ti", *words: str) -> Cluster:
    cluster, problems = read_cluster(name, words)
    assert cluster is not None, problems
    return cluster


def with_card(
    monkeypatch: pytest.MonkeyPatch,
    name: str = "NVIDIA GeForce RTX 2080 Ti",
    gib: float = 10.75,
    at: tuple[int, int] = (7, 5),
) -> None:
    """A machine with two cards, as torch tells them."""
    card = SimpleNamespace(name=name, total_memory=int(gib * GIB), major=at[0], minor=at[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: at)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 8 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 9 * GIB)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def without_cuda(monkeypatch: pytest.MonkeyPatch, built: str | None, found: list[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(devices, "driver_devices", lambda: found)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("THEREFORE_ALLOW_CPU", raising=False)


def test_gpus_that_are_not_there_are_an_error_that_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [
        (None, ["nvidia0"], {}, "has neither CUDA nor ROCm. Fix: run scripts/setup on a node with a GPU"),
        ("13.0", [], {}, "there is no device file of a driver (/dev/nvidia0, /dev/kfd)"),
        ("13.0", ["nvidia0"], {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES hides all GPUs"),
        ("13.0", ["nvidia0"], {}, "was built for 13.0, which the driver does not support"),
    ]
    for built, found, environment, told in cases:
        without_cuda(monkeypatch, built, found)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(LaunchError) as raised:
            devices.check_devices(cluster_of(), smoke_test=False)
        assert str(raised.value).startswith("cluster.gpus: got 2 on ")
        assert told in str(raised.value)
        assert "cluster.gpus=0 trains on the CPU" in str(raised.value)


def test_without_gpus_in_the_cluster_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    without_cuda(monkeypatch, None, [])
    assert devices.check_devices(cluster_of("local"), smoke_test=False) == []
    assert devices.check_devices(replace(cluster_of(), gpus=0), smoke_test=False) == []


def test_a_smoke_test_runs_on_a_cpu_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    without_cuda(monkeypatch, "13.0", [])
    (told,) = devices.check_devices(cluster_of(), smoke_test=True)
    assert told.startswith("cluster.gpus: got 2, but this ran on the CPU: there is no device file")


def test_cards_as_the_cluster_says_need_no_word(monkeypatch: pytest.MonkeyPatch) -> None:
    with_card(monkeypatch)
    assert devices.check_devices(cluster_of(), smoke_test=False) == []


def test_a_smaller_or_other_card_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with_card(monkeypatch, "NVIDIA L4", 22.0, (8, 9))
    smaller, other = devices.check_devices(cluster_of("a100"), smoke_test=False)
    assert smaller.startswith("cluster.gpu_memory: got ")
    assert "expected at most 22.0, which NVIDIA L4 has. Fix: cluster.gpu_memory=22.0" in smaller
    assert "cluster.compute_capability: got 8; expected 8.9, which NVIDIA L4 has" in other


def test_more_processes_than_cards_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with_card(monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(LaunchError, match=r"got a process number 3 on .* its 2 GPUs\. Fix: cluster\.processes=2"):
        devices.check_devices(cluster_of(), smoke_test=False)


def test_a_card_that_fails_at_its_first_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with_card(monkeypatch)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nlong story")

    monkeypatch.setattr(torch, "zeros", fail)
    with pytest.raises(
        LaunchError, match="CUDA fails at its first use: CUDA error: uncorrectable ECC error encountered"
    ):
        devices.check_devices(cluster_of(), smoke_test=False)


def test_what_a_stage_runs_on_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    with_card(monkeypatch)
    found = devices.describe_hardware(recipe_of("deepseek7b"), cluster_of(), "grpo", 2)
    assert found["device"] == "NVIDIA GeForce RTX 2080 Ti"
    assert (found["precision"], found["attention"]) == ("float16", "sdpa")
    assert (found["compute_capability"], found["gpu_memory_gib"], found["runtime"]) == (7.5, 10.75, "CUDA 13.0")
    assert found["layout"].endswith("on 2 processes")
    assert set(found["planned_gib"]) == {"grpo, learning", "grpo, generating"}
    assert devices.measured_usage() == {"allocated_gib": 8.0, "reserved_gib": 9.0}
    line = format_hardware({**found, "measured": devices.measured_usage()})
    assert line.startswith("NVIDIA GeForce RTX 2080 Ti, precision float16, attention sdpa, ")
    assert "planned: grpo, learning " in line
    assert line.endswith("held at most: allocated 8.0 GiB, reserved 9.0 GiB")


@pytest.mark.parametrize(
    ("stage", "words", "told"),
    [
        ("sft", [], "cluster.sft.deepspeed=zero3"),
        ("sft", ["sft.per_device_batch_size=8"], "Fix: cluster.sft.per_device_batch_size=4"),
        ("grpo", ["grpo.gradient_checkpointing=false"], "cluster.grpo.gradient_checkpointing=true"),
        ("evaluate", ["evaluate_batch_size=32"], "Fix: cluster.evaluate_batch_size=16"),
        ("evaluate", ["evaluate_batch_size=1"], "Fix: cluster.max_memory="),
    ],
)
def test_a_gpu_whose_memory_ran_out_has_a_remedy_in_every_stage(stage: str, words: list[str], told: str) -> None:
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 10.75"
    )
    sentence = devices.explain_out_of_memory(error, stage, cluster_of("2x2080ti", *words))
    assert sentence is not None
    assert sentence.startswith(f"{stage}: the GPU's memory ran out")
    assert told in sentence


def test_only_memory_is_explained_as_memory() -> None:
    assert devices.explain_out_of_memory(RuntimeError("shape mismatch"), "sft", cluster_of()) is None
    host = RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory: out of memory")
    assert "the host's memory ran out" in str(devices.explain_out_of_memory(host, "sft", cluster_of()))
