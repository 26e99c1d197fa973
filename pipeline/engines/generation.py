"""Completions for prompts, by transformers: used wherever a model is asked.

    for index, completion in generate(model, tokenizer, prompts, sampling, batch_size=64): ...

Prompts are asked in batches of like length, so little is padded and each batch ends when its longest answer does.
Every prompt draws from a random stream of its own, so batches, processes and interruptions do not change an answer.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from pipeline.models.loading import input_device
from pipeline.models.weight_checks import as_list
from pipeline.scoring.answers import CLOSE, OPEN


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    repetition_penalty: float = 1.0  # 1: none


@dataclass(frozen=True)
class Completion:
    text: str  # without the stop token
    tokens: int  # the stop token included
    truncated: bool  # it ran into max_new_tokens


def batches_of(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in batches of like length, the longest first: what does not fit in memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda k: (-lengths[k], k))
    return [order[start : start + size] for start in range(0, len(order), size)]


class GumbelSampler(LogitsProcessor):
    """Sampling as a greedy choice: the largest of log-probability plus Gumbel noise (Gumbel 1954; Maddison 2014).

    Each row of the batch has its own generator, which `model.generate`'s sampling cannot have.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int], device: torch.device) -> None:
        self.warpers: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
        if sampling.top_k:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores of shape (rows, vocabulary) with what may not be drawn at -inf, and noise on the rest."""
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        noise = torch.stack([torch.rand(scores.shape[1], generator=g, device=g.device) for g in self.generators])
        return scores - torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))


class RepetitionPenalty(LogitsProcessor):
    """Makes what a row already holds less likely (Keskar et al. 2019); what was padded is no part of a row."""

    def __init__(self, penalty: float, pads: Sequence[int]) -> None:
        self.penalty, self.pads = penalty, pads

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores of shape (rows, vocabulary), those of tokens that stand already divided (or, below 0, multiplied)."""
        scores = scores.clone()
        for row, pad in enumerate(self.pads):
            seen = input_ids[row, pad:]
            old = scores[row, seen]
            scores[row, seen] = torch.where(old < 0, old * self.penalty, old / self.penalty)
        return scores


@torch.inference_mode()
def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    streamer: BaseStreamer | None = None,
) -> list[Completion]:
    """One completion for each prompt (token ids, generation prompt included), drawn with its seed.

    `streamer` is told each token of a single prompt as it is drawn.
    """
    device = input_device(model)
    stops = stop_ids(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=stops,
        cache_implementation=kv_cache_type(device),
        disable_compile=True,
    )
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(device)
    shaped = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        longest = padded["input_ids"].shape[1]
        shaped.append(RepetitionPenalty(sampling.repetition_penalty, [longest - len(prompt) for prompt in prompts]))
    if sampling.temperature:
        shaped.append(GumbelSampler(sampling, seeds, device))
    with ignore_model_defaults(model), warnings.catch_warnings():
        # where weights are on the disk the model's own device is "meta", which transformers compares with the prompt's
        warnings.filterwarnings("ignore", r"You are calling \.generate\(\) with the `input_ids` being on a device")
        output = model.generate(**padded, generation_config=config, logits_processor=shaped, streamer=streamer)
    output = output[:, padded["input_ids"].shape[1] :]
    return [_completion(ids, tokenizer, set(stops)) for ids in output.tolist()]


@contextlib.contextmanager
def ignore_model_defaults(model: PreTrainedModel) -> Iterator[None]:
    """While `model.generate` runs: what the call leaves open is transformers' default, not the model's own wish.

    transformers fills every open setting from the model's generation config: beams, penalties, time limits, and any
    number of answers to one prompt.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    kept = inner.generation_config
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = kept


class TokenStreamer(BaseStreamer):
    """Tells `show` the whole text so far, after every token that makes it longer; a cut character is waited for.

    The last text it tells is that of the Completion.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], show: Callable[[str], None]) -> None:
        self.tokenizer, self.stops, self.show = tokenizer, set(stops), show
        self.ids: list[int] | None = None  # None: the prompt is still to come

    def put(self, value: torch.Tensor) -> None:
        if self.ids is None:
            self.ids = []
            return
        self.ids += value.tolist()
        text = self._text()
        if not text.endswith("\ufffd"):
            self.show(text)

    def end(self) -> None:
        self.show(self._text())

    def _text(self) -> str:
        return _completion(self.ids or [], self.tokenizer, self.stops).text


def kv_cache_type(device: torch.device, *, mixed: bool = False) -> str | None:
    """On a CPU keys and values are written in place: a cache that grows is copied at every token, most of the time.

    `mixed`: float32 weights under autocast, whose keys are not of the precision that such a cache is made in.
    """
    return "static" if device.type == "cpu" and not mixed else None


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a turn: the tokenizer's, and the special ones that the model's generation config lists.

    An ordinary word in that list would cut answers short.
    """
    listed = model.generation_config.eos_token_id if model.generation_config else None
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return sorted({tokenizer.eos_token_id, *(special & set(as_list(listed)))})


def _completion(ids: list[int], tokenizer: PreTrainedTokenizerBase, stops: set[int]) -> Completion:
    length = next((k for k, token in enumerate(ids) if token in stops), None)
    kept = ids if length is None else ids[:length]
    return Completion(decode(tokenizer, kept), len(kept) + (length is not None), length is None)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of a completion: without special tokens, but with the tags of a thought where these are special ones.

    Readers and rewards look for the tags. Most tokenizers add them as ordinary tokens, some as special ones.
    """
    special = {token: added.content for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    dropped = {token for token, content in special.items() if content not in (OPEN, CLOSE)}
    if len(dropped) == len(special):
        return str(tokenizer.decode(ids, skip_special_tokens=True))
    return str(tokenizer.decode([token for token in ids if token not in dropped], skip_special_tokens=False))


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

    A prompt's random stream is seeded by `seed` and its own tokens.
    """
    model.eval()
    for number, batch in enumerate(batches_of([len(prompt) for prompt in prompts], batch_size)):
        if number % world == rank:
            asked = [prompts[k] for k in batch]
            completions = generate_batch(model, tokenizer, asked, sampling, [seed_of(seed, ids) for ids in asked])
            yield from zip(batch, completions, strict=True)


@torch.inference_mode()
def mean_log_likelihood(model: PreTrainedModel, ids: list[int], labels: list[int]) -> float:
    """Mean log-probability of the tokens of one row that have a label, in nats."""
    where = input_device(model)
    logits = model(input_ids=torch.tensor([ids], device=where)).logits[0, :-1]
    wanted = torch.tensor(labels[1:], device=logits.device)
    scored = wanted != -100
    chosen = torch.log_softmax(logits[scored].float(), -1).gather(-1, wanted[scored][:, None])
    return float(chosen.mean())


def seed_of(seed: int, prompt: Sequence[int]) -> int:
    """A seed of 63 bits from the recipe's seed and a prompt's tokens."""
    return int.from_bytes(sha256(f"{seed}/{list(prompt)}".encode()).digest()[:8], "big") >> 1
