"""The vLLM engine: what it answers, with whose weights, and what it refuses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.core.errors import ArtifactError, DataError
from pipeline.engines.engine import Answer, Completion, Engine, Request, Sampling
from pipeline.engines.transformers import TransformersEngine
from pipeline.engines.vllm import VllmEngine, VllmSettings
from pipeline.models.loading import train_tokenizer

WORDS = ["A correlates with B. However, C and D are independent given A. Therefore: Yes. Hypothesis: B causes C."] * 20
END = 1  # the stop token
GREEDY = Sampling(0.0, 1.0, 0, 24)
DRAWN = Sampling(1.0, 0.95, 30, 24, 1.1)
SIZES = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": END,
    "tie_word_embeddings": True,
}
LORA = LoraConfig(r=5, lora_alpha=40, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(WORDS, 400)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    model_of(3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(base: Path, tokenizer: Any) -> Iterator[Callable[..., VllmEngine]]:
    """Engines of the base; each costs a second or two, so tests share them by what they are made with."""
    kept: dict[str, VllmEngine] = {}

    def make(**settings: Any) -> VllmEngine:
        if str(settings) not in kept:
            given = replace(VllmSettings(dtype=torch.float32, rows=8, max_length=256), **settings)
            kept[str(settings)] = VllmEngine(str(base), tokenizer, [END], given)
        return kept[str(settings)]

    yield make
    for engine in kept.values():
        engine.close()


def model_of(seed: int) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **SIZES))


def adapted(base: Path, seed: int) -> PeftModel:
    """The base with an adapter that changes its answers."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    return get_peft_model(model, LORA)


def prompts(tokenizer: Any, count: int = 6) -> list[list[int]]:
    return [tokenizer.encode(WORDS[0] + " A causes B." * k)[: 20 + 13 * k] for k in range(count)]


def answers(engine: Engine, requests: list[Request], sampling: Sampling, **words: Any) -> dict[Any, Completion]:
    found: list[Answer] = list(engine.generate(requests, sampling, **words))
    assert len(found) == sum(request.samples for request in requests)
    return {(tuple(requests[a.request].prompt), a.sample): a.completion for a in found}


def plain(model: Any, tokenizer: Any, requests: list[Request], sampling: Sampling = GREEDY) -> dict[Any, Completion]:
    engine = TransformersEngine(model.eval(), tokenizer, rows=8)
    engine.stops = {END}
    return answers(engine, requests, sampling)


def test_greedy_text_is_that_of_the_transformers_engine(base: Path, made: Any, tokenizer: Any) -> None:
    requests = [Request(prompt) for prompt in prompts(tokenizer)]
    found = answers(made(trains=True), requests, GREEDY)
    assert found == plain(model_of(3), tokenizer, requests)
    assert len({one.text for one in found.values()}) == len(requests)


def test_a_sample_follows_from_its_seed_whatever_is_generated_beside_it(made: Any, tokenizer: Any) -> None:
    engine = made(trains=True)
    requests = [Request(prompt, seed=7, samples=3) for prompt in prompts(tokenizer)]
    found = answers(engine, requests, DRAWN)
    assert len({tuple(one.token_ids) for one in found.values()}) == len(found)
    alone = answers(engine, requests[4:3:-1], DRAWN)
    assert alone == {key: one for key, one in found.items() if key in alone}
    last = answers(engine, [Request(requests[4].prompt, seed=7, samples=1, first=2)], DRAWN)
    assert last == {key: one for key, one in alone.items() if key in last}
    third = answers(engine, [Request(requests[4].prompt, seed=7, samples=1, first=2)], DRAWN)
    assert third == {(tuple(requests[4].prompt), 2): found[tuple(requests[4].prompt), 2]}
    others = answers(engine, [Request(requests[4].prompt, seed=8, samples=3)], DRAWN)
    assert all(others[key] != found[key] for key in others)


def test_log_probabilities_are_of_the_distribution_that_is_drawn_from(made: Any, tokenizer: Any) -> None:
    sampling = Sampling(0.8, 1.0, 0, 16)
    prompt = prompts(tokenizer)[2]
    [one] = answers(made(trains=True), [Request(prompt, 5)], sampling, logprobs=True).values()
    with torch.no_grad():
        logits = model_of(3)(torch.tensor([prompt + one.token_ids])).logits[0, len(prompt) - 1 : -1]
    wanted = torch.log_softmax(logits / 0.8, -1).gather(-1, torch.tensor(one.token_ids)[:, None])[:, 0]
    assert one.logprobs == pytest.approx(wanted.tolist(), abs=1e-4)
    assert min(one.logprobs or []) < -0.5


def test_scoring_a_row_while_others_are_generated_loses_none(made: Any, tokenizer: Any) -> None:
    engine, plainly = made(trains=True), TransformersEngine(model_of(3).eval(), tokenizer, rows=1)
    ids = prompts(tokenizer)[3]
    labels = [-100] * 9 + ids[9:]
    requests = [Request(prompt, 1, samples=2) for prompt in prompts(tokenizer)]
    wanted, scores, found = answers(engine, requests, DRAWN), [], {}
    for answer in engine.generate(requests, DRAWN):
        scores.append(engine.log_likelihood(ids, labels))
        found[tuple(requests[answer.request].prompt), answer.sample] = answer.completion
    assert found == wanted
    assert scores == pytest.approx([plainly.log_likelihood(ids, labels)] * len(scores), abs=1e-4)


def test_every_token_is_watched_and_who_stops_listening_leaves_nothing_behind(made: Any, tokenizer: Any) -> None:
    engine, seen = made(trains=True), list[list[int]]()
    prompt = prompts(tokenizer)[1]
    [one] = answers(engine, [Request(prompt)], GREEDY, watch=lambda *of: seen.append(of[2])).values()
    assert seen == [one.token_ids[: k + 1] for k in range(one.tokens)]
    begun = engine.generate([Request(prompt, samples=4)], DRAWN)
    next(begun)
    begun.close()
    assert not engine.core.has_unfinished_requests()


def test_a_prompt_that_is_too_long_is_refused_before_anything_is_generated(made: Any, tokenizer: Any) -> None:
    engine = made(trains=True)
    with pytest.raises(DataError, match=r"prompt: got 256 tokens; expected fewer than 256, which vLLM reads"):
        next(engine.generate([Request([5] * 20), Request([5] * 256)], GREEDY))
    with pytest.raises(DataError, match="row: got 300 tokens"):
        engine.log_likelihood([5] * 300, [5] * 300)
    [one] = answers(engine, [Request([5] * 250)], Sampling(1.0, 1.0, 0, 24)).values()
    assert one.tokens <= 6  # as many as fit, and it says so
    assert one.truncated
    assert not engine.core.has_unfinished_requests()


def test_pushed_weights_answer_at_once_and_a_prompt_read_before_is_read_again(made: Any, tokenizer: Any) -> None:
    engine, requests = made(trains=True), [Request(prompt) for prompt in prompts(tokenizer)]
    before = answers(engine, requests, GREEDY)
    for seed in (4, 3):
        engine.update(model_of(seed))
        found = answers(engine, requests, GREEDY)
        assert found == plain(model_of(seed), tokenizer, requests)
        assert (found == before) == (seed == 3)


def test_an_adapter_that_was_handed_over_answers_and_none_of_before(base: Path, made: Any, tokenizer: Any) -> None:
    """Each swap is compared with PEFT; the base's own answers differ, and so do those of the adapter before."""
    engine, requests = made(lora_rank=5, trains=True), [Request(prompt) for prompt in prompts(tokenizer)]
    found = []
    for seed in (1, 2, 1):
        engine.update(adapted(base, seed))
        found.append(answers(engine, requests, GREEDY))
        assert found[-1] == plain(adapted(base, seed), tokenizer, requests)
        assert len(engine.core.list_loras()) == 1
    assert found[0] == found[2] != found[1]
    assert found[1] != plain(model_of(3), tokenizer, requests)


def test_the_adapter_of_a_folder_answers_as_in_peft(base: Path, made: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = adapted(base, 8)
    model.save_pretrained(tmp_path)
    engine, requests = made(lora_rank=5, trains=True), [Request(prompt) for prompt in prompts(tokenizer)]
    engine.load_adapter(tmp_path)
    assert answers(engine, requests, GREEDY) == plain(model, tokenizer, requests)


def test_an_adapter_that_vllm_computes_otherwise_is_refused(base: Path, made: Any, tmp_path: Path) -> None:
    engine = made(lora_rank=5, trains=True)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(rank_pattern={"q_proj": 2}, r=4))
    model.save_pretrained(tmp_path / "pattern")
    with pytest.raises(ArtifactError, match=r"sets rank_pattern, which vLLM does not compute\. Fix: cluster"):
        engine.load_adapter(tmp_path / "pattern")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=16)).save_pretrained(tmp_path / "wide")
    with pytest.raises(ArtifactError, match="LoRA rank 16 is greater than max_lora_rank 8"):
        engine.load_adapter(tmp_path / "wide")


def test_a_base_in_4_bit_takes_adapters_as_it_does_in_training(base: Path, made: Any, tokenizer: Any) -> None:
    """QLoRA: both quantize the same 16-bit weights to nf4, and only the adapter is exchanged."""
    from pipeline.models.loading import nf4_config

    engine = made(dtype=torch.bfloat16, quantization="nf4", lora_rank=5, trains=True)
    quantized = nf4_config(torch.bfloat16, bnb_4bit_quant_storage=torch.bfloat16)
    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=quantized),
        LORA,
        autocast_adapter_dtype=False,
    )
    engine.update(policy)
    prompt = prompts(tokenizer)[2]
    [one] = answers(engine, [Request(prompt, 5)], Sampling(1.0, 1.0, 0, 24), logprobs=True).values()
    scores = {}
    for name, model in (("policy", policy), ("base", policy.get_base_model())):
        with torch.no_grad(), policy.disable_adapter() if name == "base" else torch.no_grad():
            logits = model(torch.tensor([prompt + one.token_ids])).logits[0, len(prompt) - 1 : -1].float()
        scores[name] = torch.log_softmax(logits, -1).gather(-1, torch.tensor(one.token_ids)[:, None])[:, 0]
    given = torch.tensor(one.logprobs)
    apart = {name: float((given - score).abs().mean()) for name, score in scores.items()}
    assert apart["policy"] < 0.4 < 4 * apart["policy"] < apart["base"], apart  # the first is rounding to bfloat16


def test_it_says_which_setting_helps_where_it_cannot_start(base: Path, tokenizer: Any) -> None:
    from pipeline.core.errors import LaunchError

    settings = VllmSettings(dtype=torch.float32, rows=8, max_length=4096, use="grpo")
    with pytest.raises(LaunchError, match=r"generation\.grpo\.engine: vLLM did not start: .* Fix: .*engine=transf"):
        VllmEngine(str(base), tokenizer, [END], settings)
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
