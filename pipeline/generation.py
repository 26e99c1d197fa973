"""Completions for prompts, by transformers: used wherever a model is asked.

    for index, completion in generate(model, tokenizer, prompts, sampling, batch_size=64): ...

Prompts are asked in batches of like length, so little is padded and each batch ends when its longest answer does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int


@dataclass(frozen=True)
class Completion:
    text: str  # without the stop token
    tokens: int  # the stop token included
    truncated: bool  # it ran into max_new_tokens


def batches_of(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in batches of like length, the longest first: what does not fit in memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda k: (-lengths[k], k))
    return [order[start : start + size] for start in range(0, len(order), size)]


@torch.inference_mode()
def generate_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], sampling: Sampling
) -> list[Completion]:
    """One completion for each prompt (token ids, generation prompt included)."""
    sample = sampling.temperature > 0
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sample,
        temperature=sampling.temperature if sample else None,
        top_p=sampling.top_p if sample else None,
        top_k=(sampling.top_k or None) if sample else None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=stop_ids(model, tokenizer),
    )
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    output = model.generate(**padded, generation_config=config)[:, padded["input_ids"].shape[1] :]
    stops = set(stop_ids(model, tokenizer))
    return [_completion(ids, tokenizer, stops) for ids in output.tolist()]


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a turn: the tokenizer's and those of the model's generation config."""
    listed = model.generation_config.eos_token_id if model.generation_config else None
    ids = [] if listed is None else [listed] if isinstance(listed, int) else list(listed)
    return sorted({tokenizer.eos_token_id, *ids})


def _completion(ids: list[int], tokenizer: PreTrainedTokenizerBase, stops: set[int]) -> Completion:
    length = next((k for k, token in enumerate(ids) if token in stops), None)
    kept = ids if length is None else ids[:length]
    text = tokenizer.decode(kept, skip_special_tokens=True)
    return Completion(text, len(kept) + (length is not None), length is None)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    batch_size: int,
    seed: int,
    *,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[int, Completion]]:
    """(index, completion) for each prompt that falls to this rank, batch by batch.

    Sampling is seeded by batch, so an interrupted run that goes on draws what it would have drawn.
    """
    model.eval()
    for number, batch in enumerate(batches_of([len(prompt) for prompt in prompts], batch_size)):
        if number % world == rank:
            torch.manual_seed(seed + number)
            completions = generate_batch(model, tokenizer, [prompts[k] for k in batch], sampling)
            yield from zip(batch, completions, strict=True)
