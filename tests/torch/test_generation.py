"""The transformers engine: the answers of plain `generate`, whatever rows are there and whatever they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import floats, integers, lists, tuples
from peft import LoraConfig, get_peft_model
from plain_generate import GumbelSampler, plain_batch, plain_generate
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from pipeline.config.architectures import ARCHITECTURES
from pipeline.config.cluster import MaxMemory
from pipeline.config.recipe import read
from pipeline.core.errors import LaunchError, RecipeError
from pipeline.engines.drafts import LENGTHS, Costs, Drafts
from pipeline.engines.engine import Completion, Request, Sampling, seed_of
from pipeline.engines.families import find_families, share_out
from pipeline.engines.sampler import Sampler, Stream, penalize
from pipeline.engines.text import TextStream, decode, stop_ids
from pipeline.engines.transformers import TransformersEngine
from pipeline.grpo import as_trl_reward
from pipeline.models.loading import (
    add_lora,
    load_for_chat,
    load_model,
    load_tokenizer,
    make_random_model,
    train_tokenizer,
)
from pipeline.rewards.reward import Sample
from pipeline.tasks.task import task_of
from pipeline.workflow.weights import find_checkpoint

TAGS = ["<think>", "</think>"]
SCORES = torch.tensor([[2.0, 1.0, 0.0, -1.0, -3.0]])


def drawn(sampling: Sampling, rows: int) -> torch.Tensor:
    streams = [Stream(seed_of(0, [k]), torch.device("cpu")) for k in range(rows)]
    choices, _ = Sampler(sampling).choose(SCORES.repeat(rows, 1), streams, [[]] * rows, logprobs=False)
    return torch.bincount(torch.tensor(choices), minlength=5) / rows


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_softmax_says(temperature: float) -> None:
    wanted = torch.softmax(SCORES[0] / temperature, 0)
    error = (wanted * (1 - wanted) / 20_000).sqrt()
    assert ((drawn(Sampling(temperature, 1.0, 0, 1), 20_000) - wanted).abs() < 5 * error + 1e-6).all()


def test_what_top_k_and_top_p_leave_out_is_never_drawn() -> None:
    assert (drawn(Sampling(1.0, 1.0, 2, 1), 2000) > 0).tolist() == [True, True, False, False, False]
    assert (drawn(Sampling(1.0, 0.6, 0, 1), 2000) > 0).tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("special", [False, True], ids=["ordinary", "special"])
def test_the_tags_of_a_thought_are_read_also_where_they_are_special_tokens(special: bool) -> None:
    """Decoding without special tokens would drop them, and every answer would be unread and unpaid."""
    recipe, _ = read("tiny")
    assert recipe is not None
    tokenizer = train_tokenizer(["A correlates with B. Therefore: Yes"] * 20, 400)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    if special:
        tokenizer.add_tokens([AddedToken(tag, special=True, normalized=False) for tag in TAGS], special_tokens=True)
    text = "<think>A correlates with B.</think>\nTherefore: Yes"
    ids = tokenizer.encode(f"{text}<|end|>")
    assert (text in tokenizer.decode(ids, skip_special_tokens=True)) == (not special)
    assert decode(tokenizer, ids) == text
    shown: list[str] = []
    stream = TextStream(tokenizer, [tokenizer.eos_token_id], shown.append)
    for length in range(1, len(ids) + 1):
        stream.watch(0, 0, ids[:length])
    assert shown[-1] == text
    samples: list[Sample] = []
    task = task_of(recipe.task, recipe.seed)

    def keep(sample: Sample) -> float:
        samples.append(sample)
        return 1.0

    reward = as_trl_reward(task, "keep", keep, tokenizer, {tokenizer.eos_token_id})
    columns = {"id": ["a"], "question": ["?"], "gold": ["Yes"], "group": ["a"], "tags": [{}]}
    assert reward(prompts=[""], completions=[[{"content": ""}]], completion_ids=[ids], **columns) == [1.0]
    assert (samples[0].completion, samples[0].grade.correct, samples[0].well_formed) == (text, True, True)


def test_a_repetition_penalty_falls_on_what_stands_already() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0, 0, 0, 0, 0, 4.0]]).repeat(2, 1)
    found = penalize(scores, [[0, 0], [3, 1]], 2.0)
    assert found[0].tolist() == [1.0, 1.0, 0.0, -1.0, 0, 0, 0, 0, 0, 4.0]
    assert found[1].tolist() == [2.0, 0.5, 0.0, -2.0, 0, 0, 0, 0, 0, 4.0]


def test_a_stream_is_the_same_in_any_portions() -> None:
    one, other = (Stream(5, torch.device("cpu")) for _ in range(2))
    rows = [one.draw(1000) for _ in range(4)]
    other.skip()
    other.skip()
    assert torch.equal(other.draw(1000), rows[2])
    assert torch.equal(other.draw(1000), rows[3])


@pytest.mark.parametrize("sampling", [Sampling(0.7, 0.9, 0, 1), Sampling(1.3, 0.5, 4, 1), Sampling(1.0, 1.0, 3, 1)])
def test_what_is_drawn_is_what_transformers_warpers_leave_to_draw(sampling: Sampling) -> None:
    """Peaked rows, where one token is certain, take a shorter way; it has to lead to the same token and stream."""
    torch.manual_seed(0)
    streams = [Stream(k, torch.device("cpu")) for k in range(40)]
    plain = GumbelSampler(sampling, range(40), torch.device("cpu"))
    sharpness = torch.logspace(-1, 2, 40)[:, None]
    sure = 0
    for _ in range(20):
        scores = torch.randn(40, 50) * sharpness
        wanted = plain(torch.zeros(40, 1, dtype=torch.long), scores).argmax(-1)
        found, logprobs = Sampler(sampling).choose(scores, streams, [[]] * 40, logprobs=True)
        assert found == wanted.tolist()
        assert logprobs is not None
        assert max(logprobs) <= 0
        sure += sum(value == 0 for value in logprobs)
    assert sure or sampling.top_p == 1


# ---------------------------------------------------------------- the same answers as plain `generate`

WORDS = ["A correlates with B. However, C and D are independent given A. Therefore: Yes. Hypothesis: B causes C."] * 20
END = 1  # the stop token
SMALL = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = train_tokenizer(WORDS, 400)
    assert made.eos_token_id == END
    return made


def small_model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model with grouped heads; Mistral, Phi-3 and Gemma 3 look back only so far."""
    torch.manual_seed(1)
    near = {"sliding_window": 11} if kind in ("mistral", "phi3", "gemma3_text") else {}
    config = AutoConfig.for_model(kind, **SMALL, **near)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    model.generation_config = GenerationConfig()
    with torch.no_grad():
        model.lm_head.weight[END] *= 2  # completions end at different lengths
    return model


def prompts_of(lengths: Sequence[int], shared: int = 0) -> list[list[int]]:
    """Random prompts, the first `shared` tokens of which are the same."""
    source = torch.Generator().manual_seed(len(lengths))
    first = torch.randint(5, 390, (shared,), generator=source).tolist()
    return [first + torch.randint(5, 390, (n - shared,), generator=source).tolist() for n in lengths]


def asked(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, rows: int, samples: int = 1
) -> dict[tuple[int, int], Completion]:
    engine = TransformersEngine(model, tokenizer, rows)
    found = list(engine.generate([Request(p, 3, samples) for p in prompts], sampling, logprobs=True))
    places = [(one.request, one.sample) for one in found]
    assert sorted(places) == [(k, sample) for k in range(len(prompts)) for sample in range(samples)]
    return {(one.request, one.sample): one.completion for one in found}


GREEDY, DRAWN = Sampling(0.0, 1.0, 0, 24), Sampling(0.8, 0.95, 30, 24)


@pytest.mark.parametrize(
    "sampling", [GREEDY, DRAWN, Sampling(0.0, 1.0, 0, 24, 1.5)], ids=["greedy", "drawn", "penalty"]
)
@pytest.mark.parametrize("kind", [*ARCHITECTURES, "mistral"])
def test_every_architecture_answers_as_plain_generate_does(kind: str, sampling: Sampling, tokenizer: Any) -> None:
    model = small_model(kind)
    prompts = [*prompts_of([3, 40, 9, 21, 1, 30, 17]), *prompts_of([60, 52, 71, 49, 50], shared=48)]
    wanted = plain_generate(model, tokenizer, prompts, sampling, 4, 3)
    for rows in (1, 3, 12):
        found = asked(model, tokenizer, prompts, sampling, rows)
        assert [found[k, 0].token_ids for k in range(len(prompts))] == wanted, rows
    assert len({tuple(ids) for ids in wanted}) > 6
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_samples_of_a_prompt_are_those_that_it_would_have_alone(dtype: torch.dtype, tokenizer: Any) -> None:
    """Rows come and go at different times here; the prompt is read once, whoever is there."""
    model = small_model("qwen2", dtype)
    read: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda module, given, output: read.append(output[..., 0].numel()))
    prompts, sampling = prompts_of([33, 8, 21]), Sampling(1.0, 1.0, 0, 30)
    found = asked(model, tokenizer, prompts, sampling, rows=7, samples=5)
    generated = sum(one.tokens for one in found.values())
    # rows leave when they end, so that every token is computed once; the three prompts are padded together
    assert sum(read) - generated <= 3 * 32
    assert len({one.tokens for one in found.values()}) > 3
    for k, prompt in enumerate(prompts):
        for sample in range(5):
            if dtype == torch.float32:  # in 16 bit the attentions round differently
                [alone] = plain_batch(model, tokenizer, [prompt], sampling, [seed_of(3, prompt, sample)])
                assert found[k, sample].token_ids == alone
    assert found == asked(model, tokenizer, prompts, sampling, rows=7, samples=5)
    some = [Request(prompts[0], 3, samples=2, first=3), Request(prompts[2], 3, samples=1, first=1)]
    later = {
        (2 * one.request, one.sample): one.completion
        for one in TransformersEngine(model, tokenizer, 7).generate(some, sampling)
    }
    assert set(later) == {(0, 3), (0, 4), (2, 1)}
    assert all(found[key].token_ids == one.token_ids for key, one in later.items())


def test_log_probabilities_are_those_of_the_distribution_that_was_drawn_from(tokenizer: Any) -> None:
    model, [prompt] = small_model("llama"), prompts_of([12])
    found = asked(model, tokenizer, [prompt], Sampling(0.5, 1.0, 0, 20), rows=4, samples=4)
    for one in found.values():
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *one.token_ids]])).logits[0, len(prompt) - 1 : -1] / 0.5
        wanted = torch.log_softmax(logits, -1).gather(1, torch.tensor(one.token_ids)[:, None])[:, 0]
        assert one.logprobs == pytest.approx(wanted.tolist(), abs=1e-4)
        assert one.truncated == (one.token_ids[-1] not in stop_ids(model, tokenizer))


def test_a_premise_is_read_once_for_all_its_hypotheses(tokenizer: Any) -> None:
    model = small_model("qwen2")
    read: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda module, given, output: read.append(output[..., 0].numel()))
    prompts = prompts_of([110] * 6, shared=100)
    found = asked(model, tokenizer, prompts, GREEDY, rows=6)
    assert sum(read) == 100 + 6 * 9 + sum(one.tokens for one in found.values())


def test_tokens_that_were_guessed_right_need_no_pass_of_their_own(tokenizer: Any) -> None:
    """The second of two like completions is guessed from the first, several tokens at a time, and is the same."""
    model, [prompt] = small_model("qwen2"), prompts_of([12])
    passes: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda module, given, output: passes.append(output.shape[1]))
    sampling = Sampling(0.0, 1.0, 0, 60)
    [wanted] = plain_generate(model, tokenizer, [prompt], sampling, 1, 0)
    del passes[:]
    once = asked(model, tokenizer, [prompt], sampling, rows=1)
    alone = len(passes)
    twice = asked(model, tokenizer, [prompt, prompt], sampling, rows=1)
    assert [once[0, 0].token_ids, twice[0, 0].token_ids, twice[1, 0].token_ids] == [wanted] * 3
    assert len(wanted) > 30
    assert len(passes) - alone < 1.6 * alone


def test_a_guess_goes_by_what_followed_before() -> None:
    drafts = Drafts()
    text = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]
    drafts.learn(text, len(text))
    assert drafts.guess([0, 0, 9, 2, 6, 5], 3) == [3, 5, 8]
    assert drafts.guess(text[:13], 8) == [7, 9]
    assert drafts.guess([6, 5], 3) == []
    drafts.learn([9, 2, 6, 5, 1], 1)
    assert drafts.guess([9, 2, 6, 5], 1) == [1]


@given(integers(1, 500), floats(0, 1), floats(0, 1e-2), floats(0, 1e-3), floats(1e-9, 1e-3))
def test_more_is_guessed_where_guesses_are_right_and_cheap(
    rows: int, accepted: float, fixed: float, row: float, token: float
) -> None:
    length = Costs(fixed, row, token).best_length(rows, accepted)
    assert length in LENGTHS
    assert Costs(fixed, row, token).best_length(rows, 0.0) == 0
    assert Costs(fixed, row, token).best_length(rows, min(1.0, accepted + 0.1)) >= length
    assert Costs(fixed, row, token * 2).best_length(rows, accepted) <= length
    assert Costs(1.0, 0.0, 1e-9).best_length(rows, 0.99) == LENGTHS[-1]


@given(
    lists(tuples(integers(0, 3), integers(1, 70), integers(1, 3)), min_size=1, max_size=12),
    integers(1, 4),
)
def test_families_hold_every_sample_once_and_what_they_share_is_shared(
    shapes: list[tuple[int, int, int]], world: int
) -> None:
    starts = prompts_of([64, 50, 40, 33])
    requests = [Request([*starts[start], *range(400, 400 + rest)], 0, samples) for start, rest, samples in shapes]
    families = find_families(requests)
    held = [one for family in families for one in family.waiting]
    assert sorted(held) == [(k, sample) for k, one in enumerate(requests) for sample in range(one.samples)]
    for family in families:
        for request, _ in family.waiting:
            prompt = requests[request].prompt
            assert list(prompt[: len(family.prefix)]) == list(family.prefix)
            assert len(family.prefix) < len(prompt) <= family.longest
    shares = [share_out(requests, rank, world) for rank in range(world)]
    assert sorted(k for share in shares for k in share) == list(range(len(requests)))


def test_a_policy_that_is_updated_answers_with_its_new_weights(tokenizer: Any) -> None:
    old, new, prompts = small_model("qwen2"), small_model("qwen2"), prompts_of([9, 12])
    with torch.no_grad():
        for weights in new.parameters():
            weights.add_(torch.randn(weights.shape, generator=torch.Generator().manual_seed(2)), alpha=0.3)
    engine = TransformersEngine(old, tokenizer, rows=2)
    before = {one.request: one.completion for one in engine.generate([Request(p) for p in prompts], GREEDY)}
    engine.update(new)
    after = {one.request: one.completion for one in engine.generate([Request(p) for p in prompts], GREEDY)}
    assert before != after
    assert [after[k].token_ids for k in range(2)] == plain_generate(new, tokenizer, prompts, GREEDY, 2, 0)


def test_a_model_that_trains_is_asked_without_dropout_and_goes_on_training(tokenizer: Any) -> None:
    model, prompts = small_model("qwen2"), prompts_of([9, 12])
    adapted = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.9, target_modules="all-linear"))
    for name, weights in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.01)
    adapted.eval()
    wanted = plain_generate(adapted, tokenizer, prompts, GREEDY, 2, 0)
    adapted.train()
    found = asked(adapted, tokenizer, prompts, GREEDY, 2)
    assert [found[k, 0].token_ids for k in range(2)] == wanted
    assert adapted.training


def test_attention_that_it_cannot_compute_is_refused(tokenizer: Any) -> None:
    config = AutoConfig.for_model("gemma2", **SMALL)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config = GenerationConfig()
    with pytest.raises(LaunchError, match="soft cap or sinks"):
        asked(model, tokenizer, [[5, 6]], GREEDY, 1)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_model_that_is_larger_than_its_memory_answers_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: bool
) -> None:
    """Most of its layers wait on disk here, where the device is the CPU; on a GPU they wait on the CPU.

    The base of an adapter may not wait on disk, and nothing is written where it was about to.
    """
    recipe, _ = read("tiny", ["seed=3", "lora.enabled=true", "lora.r=4"])
    assert recipe is not None
    assert recipe.model.random_init is not None
    make_random_model(
        recipe.model.random_init, ["A correlates with B. Therefore: Yes"] * 20, "think", tmp_path / "model", 3
    )
    checkpoint = find_checkpoint(str(tmp_path / "model"))
    tokenizer = load_tokenizer(checkpoint, recipe.model)
    if adapter:
        torch.manual_seed(0)
        tuned = add_lora(load_model(checkpoint, recipe.model, dtype=torch.float32), recipe.lora, keep_dtype=False)
        for name, weights in tuned.named_parameters():
            if "lora_B" in name:  # an adapter begins as nothing; this one changes the answers
                torch.nn.init.normal_(weights, std=0.5)
        tuned.save_pretrained(tmp_path / "adapter")
        tokenizer.save_pretrained(tmp_path / "adapter")
        checkpoint = find_checkpoint(str(tmp_path / "adapter"))
    prompts = [tokenizer(text)["input_ids"] for text in ("A", "B. Therefore: Yes", "with B")]

    def answers(limits: MaxMemory | None, *, disk: bool = False) -> list[str]:
        model = load_for_chat(checkpoint, replace(recipe.model, dtype="float32"), limits)
        waiting = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
        assert ("disk" in waiting) is disk
        found = asked(model, tokenizer, prompts, Sampling(0.0, 1.0, 0, 12), 3)
        return [found[k, 0].text for k in range(3)]

    little, enough = MaxMemory(cpu=0.0011), MaxMemory(cpu=1.0)  # GiB: of 2.4 MB of weights a layer or two; all of them
    if not adapter:
        assert answers(little, disk=True) == answers(None)
        return
    assert answers(enough) == answers(None)
    before = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    monkeypatch.chdir(tmp_path)  # PEFT would write below the working folder
    with pytest.raises(RecipeError, match="is an adapter, and a part of its base model would be on disk"):
        answers(little)
    assert {path: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"model", "adapter"}


def test_a_models_own_generation_config_changes_no_answer(tmp_path: Path) -> None:
    """Qwen2.5's asks for a repetition penalty, which no recipe has asked for."""
    recipe, _ = read("tiny")
    assert recipe is not None
    assert recipe.model.random_init is not None
    make_random_model(recipe.model.random_init, ["A correlates with B."] * 20, "think", tmp_path, 0)
    checkpoint = find_checkpoint(str(tmp_path))
    tokenizer = load_tokenizer(checkpoint, recipe.model)
    found = []
    for penalty in (1.0, 1.9):
        model = load_model(checkpoint, recipe.model, dtype=torch.float32)
        model.generation_config.repetition_penalty = penalty
        found.append(asked(model, tokenizer, [[5, 6, 7]], Sampling(0.0, 1.0, 0, 24), 1)[0, 0].text)
    assert found[0] == found[1]


def test_the_likelihood_of_an_answer_is_that_of_its_own_tokens(tmp_path: Path) -> None:
    recipe, _ = read("tiny")
    assert recipe is not None
    assert recipe.model.random_init is not None
    make_random_model(recipe.model.random_init, ["A correlates with B."] * 20, "think", tmp_path, 0)
    model = load_model(find_checkpoint(str(tmp_path)), recipe.model, dtype=torch.float32).eval()
    ids, start = [3, 9, 4, 7, 5], 3
    tokenizer = load_tokenizer(find_checkpoint(str(tmp_path)), recipe.model)
    found = TransformersEngine(model, tokenizer, 1).log_likelihood(ids, [-100] * start + ids[start:])
    with torch.inference_mode():
        logs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    assert found == pytest.approx(float((logs[2, 7] + logs[3, 5]) / 2), rel=1e-5)
