"""Which engine generates where, what vLLM refuses, and what it takes of a GPU."""

from __future__ import annotations

import sys

import pytest
from recipes import cluster_of, recipe_of

from pipeline.core.hashing import plain
from pipeline.preflight.checks import problems
from pipeline.sizing import engines
from pipeline.sizing.engines import LORA_RANKS, choose_engine, engine_rank, parallels, resolve_engines, vllm_problems
from pipeline.sizing.fitting import needs, resolve_auto, suggest_overrides
from pipeline.sizing.host_memory import host_estimates
from pipeline.sizing.memory import usable
from pipeline.sizing.model_sizes import GIB
from pipeline.workflow.plan import make_plan

GPUS = ("gpus=4", "gpu_memory=40", "compute_capability=8.0")
ASKED = ("generation.grpo.engine=vllm", "generation.evaluate.engine=vllm")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where vLLM is installed, which it is not beside these tests."""
    versions = {"vllm": "0.31.0", "vllm-bnb-plugin": "0.0.3"}
    monkeypatch.setattr(engines, "_version", versions.get)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("zero", ["none", "zero2", "zero3", "zero3_offload"])
@pytest.mark.parametrize(
    ("words", "cluster", "refused"),
    [
        (["model.quantization=nf4"], [], None),
        (["model.quantization=none"], [], None),
        (["model.quantization=none", "lora.enabled=false"], [], None),
        (["model.quantization=int8"], [], r"int8', to which vLLM cannot quantize .* Fix: .*transformers, or .*=nf4"),
        (["model.quantization=nf4", "model.dtype=float32"], [], r"expected 16 bit.* Fix: model\.dtype=auto"),
        (["lora.r=512"], [], None),
        (["lora.r=513"], [], r"lora\.r 513; expected at most 512.* Fix: lora\.r=512"),
        ([], ["compute_capability=7.5"], None),
        (
            [],
            ["compute_capability=7.0"],
            r"needs compute capability 7\.5; .* Fix: cluster\.generation\.grpo\.eng",
        ),
        ([], ["generation.grpo.gpu_memory=0.05"], r"gpu_memory: got 0\.05, .* Fix: .*gpu_memory=0\.[01]\d, or"),
    ],
    ids=["nf4", "lora", "full", "int8", "nf4 fp32", "r 512", "r 513", "turing", "volta", "share"],
)
def test_what_vllm_works_with(words: list[str], cluster: list[str], refused: str | None, zero: str) -> None:
    recipe = recipe_of("deepseek7b", *words)
    large = [*GPUS, "gpu_memory=80"]
    found = list(vllm_problems(recipe, cluster_of("local", *large, f"grpo.deepspeed={zero}", *cluster), "grpo"))
    auto = cluster_of("local", *large, *cluster)
    assert choose_engine(recipe, auto, "grpo") == ("vllm" if refused is None else "transformers")
    if refused is None:
        assert found == []
    else:
        with pytest.raises(AssertionError, match=refused):
            raise AssertionError("\n".join(found))


def test_a_missing_package_is_named_with_the_line_that_installs_it() -> None:
    recipe, where = recipe_of("deepseek7b"), cluster_of("local", *GPUS, *ASKED)
    vllm, plugin, *others = vllm_problems(recipe, where, "grpo")
    line = f"{sys.executable} -m pip install vllm==0.31.0 vllm-bnb-plugin==0.0.3 -c "
    assert f"package vllm is not installed. Fix: {line}" in vllm
    assert "constraints-vllm.txt, or cluster.generation.grpo.engine=transformers" in vllm
    assert "package vllm-bnb-plugin, which reads 4-bit models for vLLM, is not installed" in plugin
    assert others == []
    assert choose_engine(recipe, cluster_of("local", *GPUS), "grpo") == "transformers"


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_version", {"vllm": "0.33.0", "vllm-bnb-plugin": "0.0.3"}.get)
    [found] = vllm_problems(recipe_of("deepseek7b"), cluster_of("local", *GPUS), "evaluate")
    assert "package vllm: got 0.33.0; expected <0.32,>=0.31. Fix: " in found


def test_check_tells_it_before_anything_is_queued() -> None:
    plan = make_plan(["tiny"], [f"cluster.{word}" for word in ASKED])
    wrong, _ = problems(plan)
    assert [text.partition(":")[0] for text in wrong if "vllm is not" in text] == [
        "cluster.generation.grpo.engine",
        "cluster.generation.evaluate.engine",
    ]


@pytest.mark.usefixtures("installed")
def test_auto_is_transformers_on_a_cpu_and_for_models_that_are_done_at_once() -> None:
    here, there = cluster_of("local", "gpus=0"), cluster_of("local", *GPUS)
    assert choose_engine(recipe_of("deepseek7b"), here, "grpo") == "transformers"
    assert choose_engine(recipe_of("tiny"), there, "evaluate") == "transformers"
    assert choose_engine(recipe_of("tiny"), cluster_of("local", *GPUS, *ASKED), "evaluate") == "vllm"
    decided = resolve_engines(recipe_of("deepseek7b"), there).generation
    assert (decided.grpo.sleep, decided.evaluate.tensor_parallel) == (True, 1)
    [wrong] = vllm_problems(recipe_of("tiny"), cluster_of("local", "gpus=0", "generation.grpo.sleep=true"), "grpo")
    assert "Fix: cluster.generation.grpo.sleep=auto" in wrong


@pytest.mark.usefixtures("installed")
def test_an_engine_is_no_part_of_a_steps_identity() -> None:
    one, other = (make_plan(["deepseek7b"], [f"cluster.generation.grpo.engine={name}"]) for name in ("vllm", "auto"))
    assert [step.fingerprint for step in one.steps] == [step.fingerprint for step in other.steps]
    assert "generation" not in plain(cluster_of("local"))  # a record of before has none


@pytest.mark.parametrize("rank", [1, 2, 8, 9, 65, 300, 512])
def test_an_adapter_fits_into_the_engine_that_is_made_for_it(rank: int) -> None:
    most = engine_rank(rank)
    assert most in LORA_RANKS
    assert most >= rank
    assert all(other < rank for other in LORA_RANKS if other < most)


@pytest.mark.usefixtures("installed")
def test_vllm_takes_its_share_beside_the_trainer_and_gives_it_back_while_it_sleeps() -> None:
    recipe = recipe_of("deepseek7b")

    def learning(*words: str) -> float:
        found = {
            need.phase: need.total
            for need in needs(recipe, cluster_of("local", *GPUS, "grpo.deepspeed=zero2", *words)) or ()
        }
        return found["grpo, learning"]

    share = 0.35 * usable(cluster_of("local", *GPUS))
    plain_engine, asleep = learning("generation.grpo.engine=transformers"), learning("generation.grpo.engine=vllm")
    awake = learning("generation.grpo.engine=vllm", "generation.grpo.sleep=false", "grpo.per_device_batch_size=1")
    small = learning("generation.grpo.engine=vllm", "grpo.per_device_batch_size=1")
    assert awake - small == pytest.approx(share)
    assert asleep <= usable(cluster_of("local", *GPUS))
    assert plain_engine > 0
    where = resolve_auto(recipe, cluster_of("local", *GPUS, "grpo.deepspeed=zero2", "generation.grpo.engine=vllm"))
    hosts = {need.stage: need for need in host_estimates(recipe, where)}
    assert "of what vLLM keeps there" in hosts["grpo"].what
    assert hosts["grpo"].bytes - hosts["sft"].bytes > 4 * 3 * GIB  # the base in 4 bit, of each of four processes


@pytest.mark.usefixtures("installed")
def test_auto_goes_back_to_transformers_where_both_do_not_fit() -> None:
    """Two 11 GB cards hold a 7B model in 4 bit and what trains it, but not a second copy beside it."""
    recipe, cards = recipe_of("deepseek7b"), cluster_of("2x2080ti")
    decided = resolve_auto(recipe, cards)
    assert decided.generation.grpo.engine == "transformers"
    assert decided.generation.evaluate.engine == "vllm"
    forced = cluster_of("2x2080ti", "generation.grpo.engine=vllm")
    assert any(need.fit(usable(forced)) == "does not fit" for need in needs(recipe, forced) or ())
    assert "cluster.generation.grpo.engine=transformers" in suggest_overrides(recipe, forced)


@pytest.mark.usefixtures("installed")
def test_an_evaluation_shares_a_model_among_as_few_gpus_as_hold_it() -> None:
    recipe = recipe_of("deepseek32b", "model.quantization=none")
    where = cluster_of("local", *GPUS)
    assert parallels(recipe, where) == [1, 2, 4]
    assert resolve_engines(recipe, where).generation.evaluate.tensor_parallel == 2
    [wrong] = vllm_problems(recipe, cluster_of("local", *GPUS, "generation.evaluate.tensor_parallel=3"), "evaluate")
    assert wrong.startswith("cluster.generation.evaluate.tensor_parallel: got 3; expected a divisor of the 4 processes")
    assert wrong.endswith("Fix: 1 or 2 or 4")
    [limits] = vllm_problems(recipe_of("deepseek7b"), cluster_of("local", *GPUS, "max_memory={gpu: 10}"), "evaluate")
    assert limits.startswith("cluster.max_memory: got a limit")
