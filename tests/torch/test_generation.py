"""Sampling that belongs to the prompt: right in distribution, and the same in any batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken

from pipeline.config.cluster import MaxMemory
from pipeline.config.recipe import read
from pipeline.core.errors import RecipeError
from pipeline.engines.generation import (
    GumbelSampler,
    RepetitionPenalty,
    Sampling,
    TokenStreamer,
    batches_of,
    decode,
    generate,
    mean_log_likelihood,
    seed_of,
)
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
    draw = GumbelSampler(sampling, [seed_of(0, [k]) for k in range(rows)], torch.device("cpu"))
    choices = draw(torch.zeros(rows, 1, dtype=torch.long), SCORES.repeat(rows, 1)).argmax(-1)
    return torch.bincount(choices, minlength=5) / rows


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
    stream = TokenStreamer(tokenizer, [tokenizer.eos_token_id], shown.append)
    for part in ([0], *([token] for token in ids)):
        stream.put(torch.tensor(part))
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


def test_batches_hold_every_prompt_once_and_like_lengths() -> None:
    lengths = [5, 1, 4, 4, 2, 9]
    found = batches_of(lengths, 4)
    assert sorted(k for batch in found for k in batch) == list(range(6))
    assert [[lengths[k] for k in batch] for batch in found] == [[9, 5, 4, 4], [2, 1]]


def test_a_repetition_penalty_falls_on_what_stands_already_and_not_on_padding() -> None:
    ids = torch.tensor([[9, 9, 0], [9, 3, 1]])  # the first row is padded with two 9, the second with one
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0, 0, 0, 0, 0, 4.0]]).repeat(2, 1)
    found = RepetitionPenalty(2.0, [2, 1])(ids, scores)
    assert found[0].tolist() == [1.0, 1.0, 0.0, -1.0, 0, 0, 0, 0, 0, 4.0]
    assert found[1].tolist() == [2.0, 0.5, 0.0, -2.0, 0, 0, 0, 0, 0, 4.0]


@pytest.mark.parametrize(("temperature", "penalty"), [(0.0, 1.0), (0.8, 1.0), (0.0, 1.5)])
def test_an_answer_does_not_depend_on_its_batch(tmp_path: Path, temperature: float, penalty: float) -> None:
    recipe, _ = read("tiny", ["model.random_init.hidden_size=32", "model.random_init.layers=1", "seed=3"])
    assert recipe is not None
    assert recipe.model.random_init is not None
    make_random_model(recipe.model.random_init, ["A correlates with B. Therefore: Yes"] * 20, "think", tmp_path, 3)
    checkpoint = find_checkpoint(str(tmp_path))
    tokenizer = load_tokenizer(checkpoint, recipe.model)
    model = load_model(checkpoint, recipe.model, dtype=torch.float32)
    prompts = [tokenizer(text)["input_ids"] for text in ("A", "A correlates", "B. Therefore: Yes", "with B", "Yes A")]
    sampling = Sampling(temperature, 0.95, 0, 12, penalty)

    def answers(prompts: list[list[int]], batch: int, seed: int = 0) -> dict[int, str]:
        return {k: c.text for k, c in generate(model, tokenizer, prompts, sampling, batch, seed)}

    together = answers(prompts, 5)
    assert answers(prompts, 2) == together
    assert answers(prompts[3:4], 1)[0] == together[3]
    ranks = [dict(generate(model, tokenizer, prompts, sampling, 2, 0, rank=rank, world=2)) for rank in (0, 1)]
    assert {k: c.text for found in ranks for k, c in found.items()} == together
    assert (answers(prompts, 5, seed=1) == together) is (temperature == 0.0)


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
        found = dict(generate(model, tokenizer, prompts, Sampling(0.0, 1.0, 0, 12), 3, 0))
        return [found[k].text for k in range(3)]

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
        answers = dict(generate(model, tokenizer, [[5, 6, 7]], Sampling(0.0, 1.0, 0, 24), 1, 0))
        found.append(answers[0].text)
    assert found[0] == found[1]


def test_the_likelihood_of_an_answer_is_that_of_its_own_tokens(tmp_path: Path) -> None:
    recipe, _ = read("tiny")
    assert recipe is not None
    assert recipe.model.random_init is not None
    make_random_model(recipe.model.random_init, ["A correlates with B."] * 20, "think", tmp_path, 0)
    model = load_model(find_checkpoint(str(tmp_path)), recipe.model, dtype=torch.float32).eval()
    ids, start = [3, 9, 4, 7, 5], 3
    found = mean_log_likelihood(model, ids, [-100] * start + ids[start:])
    with torch.inference_mode():
        logs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    assert found == pytest.approx(float((logs[2, 7] + logs[3, 5]) / 2), rel=1e-5)
