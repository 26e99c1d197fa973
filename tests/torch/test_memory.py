"""The memory planner against the real thing: published parameter counts, the models' own code without data."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from live_bytes import LiveBytes, LiveTensors, repeated
from peft import LoraConfig, get_peft_model
from published import PUBLISHED
from recipes import cluster_of, recipe_of
from running import run_cli
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from trl.trainer import utils as trl_utils

from pipeline.config.cluster import Cluster, batches, read_cluster
from pipeline.config.model_files import model_config
from pipeline.config.recipe import Lora, Recipe, read, recipe_names
from pipeline.sizing.fitting import needs, resolve_auto, suggest_overrides
from pipeline.sizing.memory import FRAGMENTATION, MemoryEstimate, Term, shared_keys, states_of, usable, zero_of
from pipeline.sizing.model_sizes import (
    GIB,
    TILE,
    activation_bytes_per_token,
    adapter_parameters,
    dims_of,
    logits_and_loss_bytes,
    prefill_bytes_per_token,
)
from pipeline.training import flat
from pipeline.workflow.plan import make_plan, spec_of

LORA = Lora(True, 8, 16.0, 0.05, ("all-linear",))
KINDS = {"qwen2": "qwen1.5b", "llama": "llama8b", "phi3": "phi3.5", "qwen3": "qwen3-4b", "gemma3_text": "gemma3-1b"}


def config_of(kind: str, **changes: Any) -> dict[str, Any]:
    config = model_config(recipe_of(KINDS[kind]).model)
    assert config is not None
    return {**config, **changes}


def empty(
    config: dict[str, Any],
    *,
    lora: Lora | None,
    checkpointing: bool,
    attention: str = "live_bytes",
    autocast: bool = True,
) -> PreTrainedModel:
    """The model without data, its attention keeping what FlashAttention keeps."""
    values = {key: value for key, value in config.items() if key != "architectures"}
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), attn_implementation=attention)
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
        model = get_peft_model(model, adapter, autocast_adapter_dtype=autocast).to("meta")
    model.train()
    model.config.use_cache = False
    return model


def kept(
    config: dict[str, Any], tokens: int, *, lora: Lora | None, checkpointing: bool, attention: str = "live_bytes"
) -> int:
    """Bytes that are alive between the forward and the backward pass."""
    model = empty(config, lora=lora, checkpointing=checkpointing, attention=attention)
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
    assert dims_of(config).parameters == PUBLISHED[name]


def test_seventy_billion_parameters_on_up_to_64_gpus() -> None:
    """R1-Distill-Llama-70B, from its published configuration: full training, whose states ZeRO-3 shares out."""
    large = {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672}
    shape = dims_of(config_of("llama", **large))
    assert shape.parameters == 70_553_706_496
    optimizer = recipe_of("llama8b").sft.optimizer
    totals = [
        sum(term.bytes for term in states_of(shape.parameters, optimizer, zero_of("zero3"), gpus, False))
        for gpus in (1, 64)
    ]
    assert totals == pytest.approx([18 * shape.parameters, 18 * shape.parameters / 64])  # gradients summed in 32 bit


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_exactly_what_peft_adds(kind: str) -> None:
    config = config_of(kind, num_hidden_layers=2)
    model = empty(config, lora=LORA, checkpointing=False)
    added = sum(weights.numel() for name, weights in model.named_parameters() if "lora_" in name)
    assert adapter_parameters(dims_of(config), LORA) == added


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
    whole, only_input = activation_bytes_per_token(dims_of(few), lora, mask=4, dropped=4, low=4, repeated=False)
    assert (growth[1] - growth[0]) / 64 / 2 == pytest.approx(only_input if checkpointing else whole, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_sdpa_keeps_the_keys_that_were_repeated_for_it(kind: str) -> None:
    few, many = config_of(kind, num_hidden_layers=2), config_of(kind, num_hidden_layers=4)
    growth = [
        kept(many, tokens, lora=None, checkpointing=False, attention="live_bytes_repeated")
        - kept(few, tokens, lora=None, checkpointing=False, attention="live_bytes_repeated")
        for tokens in (64, 128)
    ]
    whole, _ = activation_bytes_per_token(dims_of(few), None, repeated=True)
    assert (growth[1] - growth[0]) / 64 / 2 == pytest.approx(whole, rel=0.01)


def test_activations_are_computed_again_only_where_memory_asks_for_it() -> None:
    def layouts(name: str, cluster: str, *words: str) -> list[tuple[object, bool]]:
        found = resolve_auto(recipe_of(name), cluster_of(cluster, *words))
        return [(one.per_device_batch_size, one.gradient_checkpointing is True) for one in (found.sft, found.grpo)]

    assert [again for _, again in layouts("qwen1.5b", "h100")] == [False, False]
    assert [again for _, again in layouts("llama8b", "2x3090")] == [True, True]
    on_40_gb = layouts("deepseek7b", "a100")
    assert on_40_gb == [(16, True), (8, True)]  # one group: with fewer rows its prompt would be computed several times
    asked = layouts("qwen1.5b", "h100", "sft.gradient_checkpointing=true", "grpo.gradient_checkpointing=true")
    assert [again for _, again in asked] == [True, True]
    assert [again for _, again in layouts("tiny", "local")] == [False, False]


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_is_computed_once_is_held_once_but_for_its_keys(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the planner says of a learning step is enough, and not much too much."""
    prompt, rows, sizes = 256, 8, (128, 192)
    monkeypatch.setattr(flat, "sdpa_attention_forward", repeated)
    measured = []
    for new in sizes:
        place = flat.Flat([new] * rows, [prompt], [0] * rows).to("meta")
        alive = []
        for layers in (2, 4):
            model = empty(config_of(kind, num_hidden_layers=layers), lora=None, checkpointing=False)
            model.config._attn_implementation = flat.ATTENTION
            ids = torch.ones((1, len(place.positions)), dtype=torch.long, device="meta")
            gc.collect()
            with LiveBytes() as live:
                output = model(input_ids=ids, position_ids=place.positions[None], flat=place)
                alive.append(live.live)
            assert output.logits.shape[1] == len(place.positions)
        measured.append((alive[1] - alive[0]) / 2)
    dims, more = dims_of(config_of(kind)), sizes[1] - sizes[0]
    whole, _ = activation_bytes_per_token(dims, None, repeated=True)
    planned = rows * more * whole + shared_keys(dims, rows, more, 2)
    assert 0.75 * planned < measured[1] - measured[0] < 1.02 * planned


@pytest.mark.parametrize("adapters", ["none", "16 bit", "32 bit"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_holds_what_the_models_code_holds_while_a_prompt_is_read(kind: str, adapters: str) -> None:
    """The most that is alive in a forward pass, beside keys and values and beside the rotations of each position."""
    config = config_of(kind, num_hidden_layers=3)
    lora = None if adapters == "none" else LORA
    model = empty(config, lora=lora, checkpointing=False, autocast=adapters == "32 bit").eval()
    shape, peaks = dims_of(config), []
    for tokens in (512, 1024):
        ids = torch.ones((1, tokens), dtype=torch.long, device="meta")
        gc.collect()
        with torch.no_grad(), LiveTensors(model) as live:
            model(input_ids=ids, use_cache=True, past_key_values=DynamicCache(), logits_to_keep=1)
        peaks.append(live.peak)
    cache = 2 * shape.layers * shape.key * 2
    held = prefill_bytes_per_token(shape, lora=lora is not None, low=4 if adapters == "32 bit" else 2)
    positions = 8 + 2 * 2 * shape.head_dim
    assert (peaks[1] - peaks[0]) / 512 - cache - positions == pytest.approx(held, rel=0.002)


def test_a_sliding_layer_keeps_the_keys_of_its_window() -> None:
    config = config_of("gemma3_text", num_hidden_layers=6)
    model = empty(config, lora=None, checkpointing=False).eval()
    cache, dims = DynamicCache(config=model.config), dims_of(config)
    with torch.no_grad():
        model(input_ids=torch.ones((1, 1024), dtype=torch.long, device="meta"), past_key_values=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert (dims.sliding_layers, dims.layers) == (5, 6)
    assert held == pytest.approx(dims.cache_bytes(1024), rel=0.01)  # transformers keeps a token less than the window
    assert held < 0.6 * 2 * 2 * dims.key * dims.layers * 1024


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
    shape = dims_of(config_of("llama", vocab_size=100_000))
    hidden = torch.empty((tokens, shape.hidden), dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty((shape.vocabulary, shape.hidden), dtype=torch.bfloat16, device="meta", requires_grad=full)
    targets = torch.zeros(tokens, dtype=torch.long, device="meta")
    with LiveBytes() as live:
        there = (hidden.detach(), weight.detach(), live.live)[-1]  # what the model has anyway
        chunked_logprob.ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, TILE[1])[0].sum().backward()
    assert live.peak - there == pytest.approx(logits_and_loss_bytes(shape, tokens, full=full), rel=0.02)


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
    recipe = recipe_of(name, "sft.global_batch_size=64", "grpo.global_batch_size=64")
    cluster = cluster_of("h100", "sft.per_device_batch_size=1", "grpo.per_device_batch_size=1")
    few, many = (total(recipe, replace(cluster, gpus=gpus)) for gpus in (2**power, 2 ** (power + 1)))
    assert all(many[phase] <= few[phase] * 1.0001 for phase in few if phase != "grpo, generating")


TIGHT_FITS = {  # what does not fit, and the change that is told to make it fit
    "two batches": (
        ["deepseek7b"],
        ["h100", "gpu_memory=16", "sft.per_device_batch_size=16", "grpo.per_device_batch_size=8"],
        ["cluster.sft.per_device_batch_size=1", "cluster.grpo.per_device_batch_size=1"],
    ),
    "what is generated at once": (
        ["phi3.5"],
        ["2x2080ti", "generation_batch_size=16", "evaluate_batch_size=16"],
        ["cluster.generation_batch_size=auto", "cluster.evaluate_batch_size=auto"],
    ),
    "without checkpointing": (
        ["deepseek7b"],
        ["2x2080ti", "sft.gradient_checkpointing=false", "grpo.gradient_checkpointing=false"],
        ["cluster.sft.gradient_checkpointing=true", "cluster.grpo.gradient_checkpointing=true"],
    ),
    "gathered to generate": (
        ["deepseek7b"],
        ["2x2080ti", "grpo.deepspeed=zero3"],
        ["cluster.grpo.deepspeed=zero2"],
    ),
    "16-bit weights": (
        ["deepseek7b", "model.quantization=none"],
        ["2x2080ti"],
        ["model.quantization=nf4", "lora.enabled=true"],
    ),
    "all weights": (
        ["deepseek1.5b", "lora.enabled=false", "model.quantization=none"],
        ["2x3090", "gpu_memory=20", "sft.per_device_batch_size=1", "grpo.per_device_batch_size=1"],
        None,  # whichever it is
    ),
}


@pytest.mark.parametrize("case", TIGHT_FITS)
def test_a_remedy_makes_everything_fit(case: str) -> None:
    (name, *words), (cluster, *more), expected = TIGHT_FITS[case]
    recipe, where = recipe_of(name, *words), cluster_of(cluster, *more)
    assert "does not fit" in verdicts(recipe, where)
    remedy = suggest_overrides(recipe, where)
    assert remedy
    assert expected is None or remedy == expected
    changed = recipe_of(name, *words, *(word for word in remedy if not word.startswith("cluster.")))
    changes = [word.removeprefix("cluster.") for word in remedy if word.startswith("cluster.")]
    assert "does not fit" not in verdicts(changed, cluster_of(cluster, *more, *changes))


def verdicts(recipe: Recipe, cluster: Cluster) -> list[str]:
    return [need.fit(usable(cluster)) for need in needs(recipe, cluster) or []]


def test_a_model_that_no_change_makes_fit_has_no_remedy() -> None:
    recipe, where = recipe_of("deepseek32b"), cluster_of("2x2080ti")
    assert "does not fit" in verdicts(recipe, where)
    assert suggest_overrides(recipe, where) == []


def test_the_recipe_of_two_small_cards_fits_them() -> None:
    """deepseek7b on 2 × RTX 2080 Ti, of whose 11 GB torch can use 10.75 GiB."""
    recipe, where = recipe_of("deepseek7b"), cluster_of("2x2080ti")
    assert usable(where) / GIB == pytest.approx(10.75)
    assert set(verdicts(recipe, where)) <= {"fits", "tight"}
    found = {need.phase: need.total / GIB for need in needs(recipe, where) or []}
    assert found == pytest.approx(
        {"sft": 9.1, "grpo, learning": 10.2, "grpo, generating": 10.1, "evaluate": 9.6}, abs=0.1
    )
    assert "does not fit" in verdicts(recipe, cluster_of("2x2080ti", "grpo.deepspeed=zero3"))


@pytest.mark.parametrize("way", ["nf4", "int8", "none"])
def test_zero3_holds_the_model_and_a_share_of_it_while_it_generates(way: str) -> None:
    """As tests/train/test_training.py measures it in two processes; ZeRO-2 holds it once."""
    words = [f"model.quantization={way}", "lora.enabled=true"]
    recipe = recipe_of("deepseek7b", *words)
    held = {}
    for zero in ("zero2", "zero3"):
        cluster = cluster_of("2x2080ti", f"grpo.deepspeed={zero}", "generation_batch_size=4", "gpu_memory=80")
        need = next(need for need in needs(recipe, cluster) or [] if need.phase == "grpo, generating")
        held[zero] = sum(t.bytes for t in need.terms if t.what.startswith(("weights", "8-bit", "scales", "the whole")))
    adapters = adapter_parameters(dims_of(_config(recipe)), recipe.lora) * 2
    assert (held["zero3"] - adapters) / held["zero2"] == pytest.approx(1.5, rel=0.03)


def _config(recipe: Recipe) -> dict[str, Any]:
    config = model_config(recipe.model)
    assert config is not None
    return config


@settings(max_examples=30)
@given(
    st.sampled_from([name for name in recipe_names() if name != "tiny"]),
    st.sampled_from([6, 11, 16, 24, 40, 80]),
    st.sampled_from([1, 2, 4, 8]),
)
def test_auto_is_the_largest_batch_that_fits_and_keeps_the_global_one(name: str, memory: int, gpus: int) -> None:
    auto = [f"{stage}.{key}=auto" for stage in ("sft", "grpo") for key in ("per_device_batch_size", "deepspeed")]
    recipe = recipe_of(name, "sft.global_batch_size=64", "grpo.global_batch_size=64")
    cluster = resolve_auto(recipe, cluster_of("h100", f"gpus={gpus}", f"gpu_memory={memory}", *auto))
    for stage in ("sft", "grpo"):
        layout = getattr(cluster, stage)
        sizes, problems = batches(cluster, recipe, "sft" if stage == "sft" else "grpo")
        assert problems == []
        assert sizes is not None
        assert sizes.processes * sizes.per_device * sizes.accumulation == 64
        assert layout.deepspeed in ("zero2", "zero3", "zero3_offload")
        fits = {n.phase: n.fit(usable(cluster)) for n in needs(recipe, cluster) or [] if n.phase.startswith(stage)}
        twice = {stage: replace(layout, per_device_batch_size=2 * sizes.per_device)}
        double = replace(cluster, generation_batch_size="auto", **twice)
        if set(fits.values()) == {"fits"} and sizes.accumulation > 1 and sizes.per_device < 16:
            more = [n.fit(usable(cluster)) for n in needs(recipe, double) or [] if n.phase.startswith(stage)]
            assert set(more) != {"fits"}


PHI, CARDS = recipe_of("phi3.5"), cluster_of("2x2080ti")


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
    assume(batch % group == 0)
    recipe, cards = PHI, CARDS
    recipe = replace(recipe, grpo=replace(recipe.grpo, global_batch_size=batch, num_generations=group))
    stage = replace(cards.grpo, per_device_batch_size=rows)
    cluster = resolve_auto(recipe, replace(cards, gpus=processes, gpu_memory=float(memory), grpo=stage))
    at_once = cluster.generation_batch_size
    assert isinstance(at_once, int)
    assert rows * accumulation % at_once == 0
    assert at_once % rows == 0
    assert at_once * processes % group == 0


def test_what_is_said_is_not_decided_again(tmp_path: Path) -> None:
    engines = ["generation.grpo.engine=transformers", "generation.grpo.sleep=false"]
    engines += ["generation.evaluate.engine=transformers", "generation.evaluate.tensor_parallel=1"]
    engines += [f"{stage}.gradient_checkpointing=true" for stage in ("sft", "grpo")]
    recipe = recipe_of("deepseek7b")
    said = cluster_of("2x2080ti", "generation_batch_size=4", "evaluate_batch_size=8", *engines)
    assert resolve_auto(recipe, said) == said
    tiny = cluster_of("h100", "gpus=2", "sft.deepspeed=auto", "grpo.deepspeed=auto")
    decided = resolve_auto(recipe_of("tiny"), tiny)  # nobody knows a configuration of a model from nothing
    assert (decided.sft.deepspeed, decided.grpo.deepspeed) == ("zero2", "zero2")
    assert decided.sft.per_device_batch_size == "auto"


def test_a_step_is_told_what_auto_is(tmp_path: Path) -> None:
    plan = make_plan(["deepseek7b"], ["cluster.grpo.deepspeed=auto"], cluster="2x3090", runs=tmp_path)
    order = spec_of(plan.steps[1], plan.cluster)
    assert order.cluster.grpo.deepspeed.startswith("zero")
    assert isinstance(order.cluster.sft.per_device_batch_size, int)
    told = run_cli("plan", "deepseek7b", "--cluster", "2x3090", "--memory").stdout
    assert f"auto is cluster.sft.per_device_batch_size={order.cluster.sft.per_device_batch_size}" in told


def test_the_verdict_follows_the_card() -> None:
    need = MemoryEstimate("sft", (Term("weights", 8 * GIB),))
    assert [need.fit(size * GIB) for size in (24, 10, 9)] == ["fits", "tight", "does not fit"]


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
    totals, adapters = [], 4 * adapter_parameters(dims_of(_config(recipe)), recipe.lora)
    for words in (["evaluate_batch_size=8"], ["evaluate_batch_size=8", "max_memory={gpu: 4}"]):
        cluster, problems = read_cluster("2x2080ti", words)
        assert cluster is not None, problems
        totals.append(next(need for need in needs(recipe, cluster) or () if need.phase == "evaluate").total)
    assert totals[0] - totals[1] == pytest.approx((2 * 7_615_616_512 + adapters - 4 * GIB) * (1 + FRAGMENTATION))
