"""What the engines' answers are compared with: transformers' own `generate`, whole batches, each prompt its own stream.

This is how completions were made before there were engines, and each engine of this project has to answer the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.engines.engine import Sampling, seed_of
from pipeline.engines.text import stop_ids


class GumbelSampler(LogitsProcessor):  # type: ignore[misc]
    """Samples by a greedy choice of log-probability plus Gumbel noise, each row with its own generator."""

    def __init__(self, sampling: Sampling, seeds: Sequence[int], device: torch.device) -> None:
        self.warpers: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
        if sampling.top_k:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        noise = torch.stack([torch.rand(scores.shape[1], generator=g, device=g.device) for g in self.generators])
        return scores - torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))


class RepetitionPenalty(LogitsProcessor):  # type: ignore[misc]
    """Makes tokens that are already in a row less likely, without counting its padding."""

    def __init__(self, penalty: float, pads: Sequence[int]) -> None:
        self.penalty, self.pads = penalty, pads

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for row, pad in enumerate(self.pads):
            seen = input_ids[row, pad:]
            old = scores[row, seen]
            scores[row, seen] = torch.where(old < 0, old * self.penalty, old / self.penalty)
        return scores


@torch.inference_mode()
def plain_batch(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
) -> list[list[int]]:
    """Return the tokens of one completion of each prompt, up to and with its stop token."""
    stops = stop_ids(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=stops,
        cache_implementation="static" if model.device.type == "cpu" else None,
        disable_compile=True,
    )
    padded = tokenizer.pad({"input_ids": list(map(list, prompts))}, padding_side="left", return_tensors="pt")
    longest = padded["input_ids"].shape[1]
    shaped = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        shaped.append(RepetitionPenalty(sampling.repetition_penalty, [longest - len(prompt) for prompt in prompts]))
    if sampling.temperature:
        shaped.append(GumbelSampler(sampling, seeds, model.device))
    kept, model.generation_config = model.generation_config, GenerationConfig()
    output = model.generate(**padded.to(model.device), generation_config=config, logits_processor=shaped)
    model.generation_config = kept
    found = []
    for ids in output[:, longest:].tolist():
        end = next((k + 1 for k, token in enumerate(ids) if token in stops), len(ids))
        found.append(ids[:end])
    return found


def plain_generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, size: int, seed: int
) -> list[list[int]]:
    """Return the tokens of each prompt's completion, made in batches of `size` prompts of similar length."""
    model.eval()
    order = sorted(range(len(prompts)), key=lambda k: (-len(prompts[k]), k))
    found: dict[int, list[int]] = {}
    for start in range(0, len(order), size):
        batch = [prompts[k] for k in order[start : start + size]]
        completions = plain_batch(model, tokenizer, batch, sampling, [seed_of(seed, prompt) for prompt in batch])
        found |= dict(zip(order[start : start + size], completions, strict=True))
    return [found[k] for k in range(len(prompts))]
