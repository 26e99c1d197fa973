"""The memory planner against the real thing: published parameter counts, the models' own code without data."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bytes import LiveBytes
from peft import LoraConfig, get_peft_model
from running import run_cli
from test_rehearsal import PUBLISHED
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from trl.trainer import utils as trl_utils

from pipeline.cluster import Cluster, batches, cluster_names, read_cluster
from pipeline.families import model_config
from pipeline.memory import (
    GIB,
    TILE,
    Need,
    Term,
    adapter_parameters,
    head_bytes,
    kept_per_token,
    needs,
    resolved,
    shape_of,
    states_of,
    what_fits,
    zero_of,
)
from pipeline.plan import make_plan, order_of
from pipeline.recipe import Lora, Recipe, read, recipe_names

LORA = Lora(True, 8, 16.0, 0.05, ("all-linear",))
KINDS = {"qwen2": "qwen1.5b", "llama": "llama8b", "phi3": "phi3.5"}


def recipe_of(name: str, *words: str) -> Recipe:
    recipe, problems = read(name, words)
    assert recipe is not None, problems
    return recipe


def cluster_of(name: str, *words: str) -> Cluster:
    cluster, problems = read_cluster(name, words)
    assert cluster is not None, problems
    return cluster


def config_of(kind: str, **changes: Any) -> dict[str, Any]:
    config = model_config(recipe_of(KINDS[kind]).model)
    assert config is not None
    return {**config, **changes}


def empty(config: dict[str, Any], *, lora: Lora | None, checkpointing: bool) -> PreTrainedModel:
    """The model without data, its attention keeping what FlashAttention keeps."""
    values = {key: value for key, value in config.items() if key != "architectures"}
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), attn_implementation="live_bytes")
    finally:
        torch.set_default_dtype(torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora:
        model.enable_input_require_grads()
        adapter = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, adapter).to("meta")
    model.train()
    model.config.use_cache = False
    return model


def kept(config: dict[str, Any], tokens: int, *, lora: Lora | None, checkpointing: bool) -> int:
    """Bytes that are alive between the forward and the backward pass."""
    model = empty(config, lora=lora, checkpointing=checkpointing)
    ids = torch.ones((1, tokens), dtype=torch.long, device="meta")
    gc.collect()
    with LiveBytes() as live:
        output = model(input_ids=ids)
        alive = live.live
    assert output.logits.shape[1] == tokens
    return int(alive)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_exactly_the_published_ones(name: str) -> None:
    config = model_config(replace(recipe_of("deepseek7b").model, name=name))
    assert config is not None
    assert shape_of(config).parameters == PUBLISHED[name]


def test_seventy_billion_parameters_on_up_to_64_gpus() -> None:
    """R1-Distill-Llama-70B, from its published configuration: full training, whose states ZeRO-3 shares out."""
    large = {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672}
    shape = shape_of(config_of("llama", **large))
    assert shape.parameters == 70_553_706_496
    optimizer = recipe_of("llama8b").sft.optimizer
    totals = [
        sum(term.bytes for term in states_of(shape.parameters, optimizer, zero_of("zero3"), gpus, False))
        for gpus in (1, 64)
    ]
    assert totals == pytest.approx([16 * shape.parameters, 16 * shape.parameters / 64])


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_exactly_what_peft_adds(kind: str) -> None:
    config = config_of(kind, num_hidden_layers=2)
    model = empty(config, lora=LORA, checkpointing=False)
    added = sum(weights.numel() for name, weights in model.named_parameters() if "lora_" in name)
    assert adapter_parameters(shape_of(config), LORA) == added


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_keeps_what_the_models_code_keeps(kind: str, lora: Lora | None, checkpointing: bool) -> None:
    """To the byte: the growth with each layer and token. On this device LoRA's mask and dropped input are float32."""
    few, many = config_of(kind, num_hidden_layers=2), config_of(kind, num_hidden_layers=4)
    growth = [
        kept(many, tokens, lora=lora, checkpointing=checkpointing)
        - kept(few, tokens, lora=lora, checkpointing=checkpointing)
        for tokens in (64, 128)
    ]
    whole, only_input = kept_per_token(shape_of(few), lora, mask=4, dropped=4, low=4)
    assert (growth[1] - growth[0]) / 64 / 2 == pytest.approx(only_input if checkpointing else whole, rel=0.01)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("tokens", [512, 6000])
def test_the_head_holds_a_tile_of_logits_and_never_all(
    monkeypatch: pytest.MonkeyPatch, tokens: int, full: bool
) -> None:
    """TRL's own head on tensors without data. Its kernels, which work in place on a GPU, are left out."""
    from trl.kernels import chunked_logprob

    for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
        monkeypatch.setattr(chunked_logprob, name, lambda *_, **__: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which this device does not know
    assert (chunked_logprob.TOKEN_CHUNK_SIZE, trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE) == TILE
    shape = shape_of(config_of("llama", vocab_size=100_000))
    hidden = torch.empty((tokens, shape.hidden), dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty((shape.vocabulary, shape.hidden), dtype=torch.bfloat16, device="meta", requires_grad=full)
    targets = torch.zeros(tokens, dtype=torch.long, device="meta")
    with LiveBytes() as live:
        there = (hidden.detach(), weight.detach(), live.live)[-1]  # what the model has anyway
        chunked_logprob.ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, TILE[1])[0].sum().backward()
    assert live.peak - there == pytest.approx(head_bytes(shape, tokens, full=full), rel=0.02)


def test_four_bit_weights_are_as_large_as_bitsandbytes_makes_them() -> None:
    from bitsandbytes.functional import quantize_4bit

    weights = torch.randn(1024, 4096)
    packed, state = quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
    measured = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert measured / weights.numel() == pytest.approx(0.5 + 1 / 64 + 4 / (64 * 256), rel=0.001)


# ---------------------------------------------------------------- the plan


def total(recipe: Recipe, cluster: Cluster) -> dict[str, float]:
    found = needs(recipe, cluster)
    assert found is not None
    return {need.phase: need.total for need in found}


@pytest.mark.parametrize("word", ["sft.gradient_checkpointing=true", "sft.deepspeed=zero3", "sft.deepspeed=zero2"])
def test_what_saves_memory_needs_less(word: str) -> None:
    plain = ["sft.deepspeed=none", "sft.gradient_checkpointing=false", "sft.per_device_batch_size=2"]
    before, after = (total(recipe_of("deepseek7b"), cluster_of("a100", *plain, *more)) for more in ([], [word]))
    assert after["sft"] < before["sft"]


@settings(max_examples=20)
@given(st.sampled_from([name for name in recipe_names() if name != "tiny"]), st.integers(0, 5))
def test_more_gpus_never_need_more_of_each(name: str, power: int) -> None:
    def of(gpus: int) -> dict[str, float]:
        words = [f"gpus={gpus}", "sft.per_device_batch_size=1", "grpo.per_device_batch_size=1"]
        recipe = recipe_of(name, "sft.global_batch_size=64", "grpo.global_batch_size=64")
        return total(recipe, cluster_of("h100", *words))

    few, many = of(2**power), of(2 ** (power + 1))
    assert all(many[phase] <= few[phase] * 1.0001 for phase in few if phase != "grpo, generating")


@pytest.mark.parametrize("cluster", [name for name in cluster_names() if name not in ("local", "slurm")])
@pytest.mark.parametrize("name", [name for name in recipe_names() if name != "tiny"])
def test_a_remedy_makes_everything_fit(name: str, cluster: str) -> None:
    recipe, where = recipe_of(name), cluster_of(cluster)
    remedy = what_fits(recipe, where)
    gpu = (where.gpu_memory or 0) * GIB
    if all(need.verdict(gpu) != "does not fit" for need in needs(recipe, where) or []) or not remedy:
        return
    changed = recipe_of(name, *(word for word in remedy if not word.startswith("cluster.")))
    smaller = cluster_of(cluster, *(word.removeprefix("cluster.") for word in remedy if word.startswith("cluster.")))
    assert all(need.verdict(gpu) != "does not fit" for need in needs(changed, smaller) or [])


@settings(max_examples=30)
@given(
    st.sampled_from([name for name in recipe_names() if name != "tiny"]),
    st.sampled_from([6, 11, 16, 24, 40, 80]),
    st.sampled_from([1, 2, 4, 8]),
)
def test_auto_is_the_largest_batch_that_fits_and_keeps_the_global_one(name: str, memory: int, gpus: int) -> None:
    auto = [f"{stage}.{key}=auto" for stage in ("sft", "grpo") for key in ("per_device_batch_size", "deepspeed")]
    recipe = recipe_of(name, "sft.global_batch_size=64", "grpo.global_batch_size=64")
    cluster = resolved(recipe, cluster_of("h100", f"gpus={gpus}", f"gpu_memory={memory}", *auto))
    for stage in ("sft", "grpo"):
        layout = getattr(cluster, stage)
        sizes, problems = batches(cluster, recipe, "sft" if stage == "sft" else "grpo")
        assert problems == []
        assert sizes is not None
        assert sizes.processes * sizes.per_device * sizes.accumulation == 64
        assert layout.deepspeed in ("zero2", "zero3", "zero3_offload")
        fits = {n.phase: n.verdict(memory * GIB) for n in needs(recipe, cluster) or [] if n.phase.startswith(stage)}
        twice = {stage: replace(layout, per_device_batch_size=2 * sizes.per_device)}
        double = replace(cluster, generation_batch_size="auto", **twice)
        if set(fits.values()) == {"fits"} and sizes.accumulation > 1 and sizes.per_device < 16:
            more = {n.phase: n.verdict(memory * GIB) for n in needs(recipe, double) or [] if n.phase.startswith(stage)}
            assert set(more.values()) != {"fits"}


@given(
    st.sampled_from([2, 4, 8]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 24),
    st.integers(5, 80),
)
def test_what_is_generated_at_once_is_a_whole_share_of_whole_groups(
    group: int, processes: int, rows: int, accumulation: int, memory: int
) -> None:
    batch = processes * rows * accumulation
    if batch % group:
        return
    recipe = recipe_of("phi3.5", f"grpo.global_batch_size={batch}", f"grpo.num_generations={group}")
    words = [f"gpus={processes}", f"grpo.per_device_batch_size={rows}", f"gpu_memory={memory}"]
    cluster = resolved(recipe, cluster_of("2x2080ti", *words))
    at_once = cluster.generation_batch_size
    assert isinstance(at_once, int)
    assert rows * accumulation % at_once == 0
    assert at_once % rows == 0
    assert at_once * processes % group == 0


def test_what_is_said_is_not_decided_again(tmp_path: Path) -> None:
    recipe, said = recipe_of("deepseek7b"), cluster_of("2x2080ti", "generation_batch_size=4", "evaluate_batch_size=8")
    assert resolved(recipe, said) == said
    tiny = cluster_of("h100", "gpus=2", "sft.deepspeed=auto", "grpo.deepspeed=auto")
    decided = resolved(recipe_of("tiny"), tiny)  # nobody knows a configuration of a model from nothing
    assert (decided.sft.deepspeed, decided.grpo.deepspeed) == ("zero2", "zero3")
    assert decided.sft.per_device_batch_size == "auto"


def test_a_step_is_told_what_auto_is(tmp_path: Path) -> None:
    plan = make_plan(["deepseek7b"], ["cluster.grpo.deepspeed=auto"], cluster="2x3090", runs=tmp_path)
    order = order_of(plan.steps[1], plan.cluster)
    assert order.cluster.grpo.deepspeed.startswith("zero")
    assert isinstance(order.cluster.sft.per_device_batch_size, int)
    told = run_cli("plan", "deepseek7b", "--cluster", "2x3090", "--memory").stdout
    assert f"auto is cluster.sft.per_device_batch_size={order.cluster.sft.per_device_batch_size}" in told


def test_the_verdict_follows_the_card() -> None:
    need = Need("sft", (Term("weights", 8 * GIB),))
    assert [need.verdict(size * GIB) for size in (24, 10, 9)] == ["fits", "tight", "does not fit"]


def test_the_table_names_every_term_and_the_remedy() -> None:
    told = run_cli("plan", "deepseek7b", "--cluster", "2x2080ti", "--memory").stdout
    for words in (
        "deepseek7b/sft: ",
        "weights, nf4 with double quantization",
        "one layer computed again",
        "key/value cache",
    ):
        assert words in told
    told = run_cli("plan", "deepseek32b", "--cluster", "2x2080ti", "--memory").stdout
    assert "does not fit in 11" in told
    assert "to make it fit: " in told


def test_an_evaluation_may_keep_most_weights_on_the_cpu() -> None:
    recipe, _ = read("deepseek7b", ["model.quantization=none"])
    assert recipe is not None
    totals = []
    for words in (["evaluate_batch_size=8"], ["evaluate_batch_size=8", "max_memory={gpu: 4}"]):
        cluster, problems = read_cluster("2x2080ti", words)
        assert cluster is not None, problems
        totals.append(next(need for need in needs(recipe, cluster) or () if need.phase == "evaluate").total)
    assert totals[0] - totals[1] == pytest.approx((2 * 7_615_616_512 - 4 * GIB) * 1.08)
