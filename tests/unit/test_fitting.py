"""What `auto` becomes where the GPU or the model is not known, this machine's cards, and the host's own memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recipes import cluster_of, recipe_of
from running import run_cli

from pipeline.config.model_files import model_config
from pipeline.core import nvidia
from pipeline.launchers.torchrun import environment
from pipeline.preflight import checks as preflight
from pipeline.sizing.fitting import resolve_auto, suggest_overrides
from pipeline.sizing.host_memory import host_estimates, limit, slurm_bytes, too_large
from pipeline.sizing.memory import usable
from pipeline.sizing.model_sizes import GIB, known_dims
from pipeline.workflow.plan import Plan, make_plan
from pipeline.workflow.stage import STAGES

TWO_CARDS = "0, GPU-aa11, 11264, 7.5\n1, GPU-bb22, 24576, 8.6\n"
FULL = ["lora.enabled=false", "model.quantization=none"]


@pytest.fixture
def cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nvidia-smi that prints two cards, and the driver's two devices; the file decides what it prints."""
    table = tmp_path / "table"
    table.write_text(TWO_CARDS)
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncat {table}\ntest -s {table}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for module in ("pipeline.config.cluster", "pipeline.launchers.torchrun"):
        monkeypatch.setattr(f"{module}.driver_devices", lambda: ["nvidia0", "nvidia1"])
    nvidia.smallest_gpu.cache_clear()
    return table


@pytest.fixture(autouse=True)
def not_remembered() -> None:
    nvidia.smallest_gpu.cache_clear()


# ---------------------------------------------------------------- this machine's cards


@pytest.mark.parametrize(
    ("visible", "memory", "capability"),
    [(None, 11.0, 7.5), ("1", 24.0, 8.6), ("GPU-bb22", 24.0, 8.6), ("0,1", 11.0, 7.5)],
)
def test_the_smallest_card_of_this_machine_counts(
    cards: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, memory: float, capability: float
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    cluster = cluster_of("local")
    assert (cluster.gpu_memory, cluster.compute_capability) == (memory, capability)
    assert "--query-gpu=index,uuid,memory.total,compute_cap" in (cards.parent / "asked").read_text()


def test_what_a_file_says_of_its_cards_is_not_asked(cards: Path) -> None:
    cluster = cluster_of("local", "gpu_memory=8", "compute_capability=7.0")
    assert (cluster.gpu_memory, cluster.compute_capability) == (8, 7.0)
    assert cluster_of("local", "gpu_memory=0").gpu_memory == 0  # not to be compared
    assert cluster_of("slurm").gpu_memory is None  # this machine is not where its jobs run
    assert cluster_of("local", "gpus=0").gpu_memory is None


@pytest.mark.parametrize("printed", ["", "No devices were found\n", "0, GPU-aa11, [N/A], 9.0\n"])
def test_cards_that_do_not_tell_are_not_known(cards: Path, printed: str) -> None:
    cards.write_text(printed)
    assert cluster_of("local").gpu_memory is None


def test_a_plan_for_this_machine_is_made_for_its_cards(cards: Path, tmp_path: Path) -> None:
    recipe, cluster = recipe_of("deepseek7b"), cluster_of("local")
    named = cluster_of("2x2080ti", "sft.per_device_batch_size=auto")
    assert resolve_auto(recipe, cluster).sft == resolve_auto(recipe, named).sft
    wrong, _ = preflight.problems(make_plan(["deepseek32b"], runs=tmp_path))
    assert any(text.startswith("memory: ") and "expected at most 10.8 GiB a GPU" in text for text in wrong)
    wrong, _ = preflight.problems(make_plan(["deepseek7b"], ["model.dtype=bfloat16"], runs=tmp_path))
    assert any("compute capability 7.5" in text for text in wrong)


def test_the_allocator_of_gpus_leaves_fewer_holes(cards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, stage = cluster_of("local"), STAGES["sft"]
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert environment(stage, cluster)["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_ALLOC_CONF" not in environment(stage, cluster_of("local", "gpus=0"))
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")  # the user's own
    assert "PYTORCH_ALLOC_CONF" not in environment(stage, cluster)


# ---------------------------------------------------------------- nobody knows


@pytest.mark.parametrize("cluster", [["slurm"], ["h100", "gpu_memory=null"], ["local", "gpus=2", "gpu_memory=0"]])
def test_on_unknown_cards_everything_is_small(cluster: list[str]) -> None:
    auto = [f"{stage}.{key}=auto" for stage in ("sft", "grpo") for key in ("per_device_batch_size", "deepspeed")]
    recipe = recipe_of("deepseek7b")
    found = resolve_auto(recipe, cluster_of(*cluster, *auto, "sft.gradient_checkpointing=auto"))
    assert (found.sft.per_device_batch_size, found.grpo.per_device_batch_size) == (1, 1)
    assert found.sft.gradient_checkpointing is True
    assert (found.sft.deepspeed, found.grpo.deepspeed) == ("zero2", "zero2")
    assert (found.generation_batch_size, found.evaluate_batch_size) == (8, 8)


@pytest.mark.parametrize(("name", "words"), [("tiny", ["gpus=2"]), ("tiny", ["gpus=0"]), ("smollm2", ["gpus=0"])])
def test_models_from_nothing_and_cpus_keep_their_speed(name: str, words: list[str]) -> None:
    found = resolve_auto(recipe_of(name), cluster_of("local", *words))
    assert found.sft.gradient_checkpointing is False
    assert found.sft.per_device_batch_size == "auto"  # the largest that divides the global batch
    assert found.evaluate_batch_size == 100


def notes_of(plan: Plan) -> str:
    return "\n".join(preflight.problems(plan)[1])


def test_check_says_that_memory_was_not_compared(tmp_path: Path) -> None:
    said = "memory was not compared: cluster.gpu_memory is not known. Fix: cluster.gpu_memory="
    assert said in notes_of(make_plan(["deepseek7b"], cluster="slurm", runs=tmp_path))
    assert said not in notes_of(make_plan(["deepseek7b"], cluster="h100", runs=tmp_path))
    assert said not in notes_of(make_plan(["tiny"], cluster="slurm", runs=tmp_path))


def test_check_says_that_an_architecture_is_not_known(tmp_path: Path) -> None:
    config = {**(model_config(recipe_of("qwen1.5b").model) or {}), "model_type": "gemma3"}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    words = [f"model.name={tmp_path / 'model'}", "lora.targets=[nothing_of_it]"]
    notes = notes_of(make_plan(["qwen1.5b"], words, cluster="h100", runs=tmp_path))
    assert "'gemma3', is not one that is known here, so memory and lora.targets were not checked" in notes
    notes = notes_of(make_plan(["qwen1.5b"], ["model.name=someone/else"], cluster="h100", runs=tmp_path))
    assert "someone/else is neither bundled nor in the local cache" in notes
    assert "python -m pipeline download qwen1.5b brings it" in notes
    assert "not checked" not in notes_of(make_plan(["qwen1.5b"], cluster="h100", runs=tmp_path))


# ---------------------------------------------------------------- the host's memory


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64G", 64 * GIB),
        ("500M", 500 * 2**20),
        ("64000", 64000 * 2**20),
        ("1.5T", 1536 * GIB),
        ("0", None),
        ("?", None),
    ],
)
def test_sizes_are_read_as_slurm_reads_them(text: str, size: float | None) -> None:
    assert slurm_bytes(text) == size


def test_offloaded_states_are_counted_against_the_node() -> None:
    """16 bytes of each weight for the optimizer (copy, gradient, two moments), 2 for itself, shared by the nodes."""
    recipe = recipe_of("llama8b", *FULL)
    shape = known_dims(recipe.model)
    assert shape is not None
    for zero, bytes_each, nodes in (("zero3_offload", 18, 1), ("zero3_offload", 18, 2), ("zero2_offload", 16, 1)):
        words = [f"sft.deepspeed={zero}", f"grpo.deepspeed={zero}", f"nodes={nodes}"]
        sft, grpo = host_estimates(recipe, cluster_of("h100", *words))
        loaded = 4 * 4 * shape.parameters if zero == "zero2_offload" else 0  # a float32 copy in each of 4 processes
        wanted = max(bytes_each * shape.parameters / nodes, loaded) + 4 * 3 * GIB
        assert (sft.bytes, grpo.bytes) == pytest.approx((wanted, wanted))
    eight_bit = recipe_of("llama8b", *FULL, "sft.optimizer.name=paged_adamw_8bit")
    less, _ = host_estimates(eight_bit, cluster_of("h100", "sft.deepspeed=zero3_offload"))
    assert less.bytes == pytest.approx((2 * 4 + 2 + 2) * shape.parameters + 12 * GIB)


def test_weights_that_each_process_loads_are_counted() -> None:
    """Full fine-tuning reads float32 on the CPU in every process, LoRA 16 bit; 4-bit weights go to their GPU."""
    sizes = {}
    for name, words in {"full": FULL, "lora": ["model.quantization=none"], "nf4": []}.items():
        recipe = recipe_of("deepseek7b", *words)
        sizes[name] = host_estimates(recipe, cluster_of("2x2080ti"))[0].bytes - 6 * GIB
    assert sizes == {"full": 2 * 4 * 7_615_616_512, "lora": 2 * 2 * 7_615_616_512, "nf4": 0}


def test_check_refuses_what_a_node_cannot_hold_with_remedies_that_hold() -> None:
    words = [*FULL, "cluster.slurm.memory=64G"]
    done = run_cli("check", "llama8b", "--cluster", "h100", *words)
    assert done.returncode == 2
    told = done.stdout + done.stderr
    assert (
        "cluster.slurm.memory: got 64G; expected at least what a node holds of sft 132 GiB (120 of the weights" in told
    )
    assert "Fix: cluster.slurm.memory=132G, or cluster.sft.deepspeed=zero3 cluster.grpo.deepspeed=zero3" in told
    recipe = recipe_of("llama8b", *FULL)
    for remedy in (["slurm.memory=132G"], ["slurm.memory=64G", "sft.deepspeed=zero3", "grpo.deepspeed=zero3"]):
        assert too_large(recipe, resolve_auto(recipe, cluster_of("h100", *remedy))) == []


def test_this_machines_own_memory_counts_for_the_local_launcher() -> None:
    mine = limit(cluster_of("local"))
    assert mine is not None
    assert GIB / 4 < mine < 2**50
    many = int(mine / (4 * 7_615_616_512)) + 1  # processes, of which each loads 28 GiB
    words = ["gpus=1", f"processes={many}", "gpu_memory=80", "sft.deepspeed=zero2", "grpo.deepspeed=zero2"]
    recipe = recipe_of("deepseek7b", *FULL, f"sft.global_batch_size={many}", f"grpo.global_batch_size={many * 8}")
    assert {need.stage for need in too_large(recipe, resolve_auto(recipe, cluster_of("local", *words)))} == {
        "sft",
        "grpo",
    }


def test_no_remedy_for_the_gpu_offloads_more_than_the_host_holds() -> None:
    recipe = recipe_of("llama8b", *FULL)
    zero3 = ["sft.deepspeed=zero3", "grpo.deepspeed=zero3", "gpus=2", "gpu_memory=48"]
    roomy = suggest_overrides(recipe, cluster_of("h100", *zero3, "slurm.memory=480G"))
    assert any("offload" in word for word in roomy)
    assert not any(
        "offload" in word for word in suggest_overrides(recipe, cluster_of("h100", *zero3, "slurm.memory=64G"))
    )


def test_auto_never_takes_zero3_for_muon() -> None:
    small = ["nodes=2", "gpu_memory=32", "sft.deepspeed=auto"]
    recipe = recipe_of("llama8b", *FULL, "sft.optimizer.name=muon", "sft.optimizer.max_grad_norm=0")
    assert resolve_auto(recipe, cluster_of("h100", *small)).sft.deepspeed == "zero2"  # it does not fit
    adamw = recipe_of("llama8b", *FULL)
    assert resolve_auto(adamw, cluster_of("h100", *small)).sft.deepspeed == "zero3"


def test_auto_does_not_offload_to_a_host_that_is_too_small() -> None:
    recipe = recipe_of("llama8b", *FULL)
    words = ["gpus=2", "gpu_memory=48", "sft.deepspeed=auto"]
    assert resolve_auto(recipe, cluster_of("h100", *words, "slurm.memory=480G")).sft.deepspeed == "zero3_offload"
    small = cluster_of("h100", *words, "slurm.memory=64G")
    decided = resolve_auto(recipe, small)
    assert usable(small) > 0
    assert too_large(recipe, decided) != []  # nothing fits, and check says so
