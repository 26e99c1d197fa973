"""Generate completions with transformers, for evaluation and chat.

    for index, completion in generate(model, tokenizer, prompts, sampling, batch_size=64, seed=1): ...

Batches have prompts of similar length, so that little is padded. Every prompt has its own random stream, so batches,
processes and interruptions do not change a completion.
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
    """The sampling settings; temperature 0 is greedy decoding."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    repetition_penalty: float = 1.0  # 1: none


@dataclass(frozen=True)
class Completion:
    """The completion of one prompt."""

    text: str  # without the stop token
    tokens: int  # including the stop token
    truncated: bool  # it reached max_new_tokens


def batches_of(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return indices in batches of similar length, the longest first, so that out-of-memory errors come at once."""
    order = sorted(range(len(lengths)), key=lambda k: (-lengths[k], k))
    return [order[start : start + size] for start in range(0, len(order), size)]


class GumbelSampler(LogitsProcessor):
    """Samples by a greedy choice of log-probability plus Gumbel noise (Gumbel 1954; Maddison 2014).

    Each row of the batch has its own generator, which `model.generate`'s sampling does not support.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int], device: torch.device) -> None:
        self.warpers: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
        if sampling.top_k:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores of shape (rows, vocabulary): -inf for excluded tokens, noise added to the rest."""
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        noise = torch.stack([torch.rand(scores.shape[1], generator=g, device=g.device) for g in self.generators])
        return scores - torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))


class RepetitionPenalty(LogitsProcessor):
    """Makes tokens that are already in a row less likely (Keskar et al. 2019), without counting its padding."""

    def __init__(self, penalty: float, pads: Sequence[int]) -> None:
        self.penalty, self.pads = penalty, pads

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores of shape (rows, vocabulary), divided (below 0: multiplied) for tokens already in the row."""
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
    """Return one completion for each prompt (token ids, including the generation prompt), sampled with its seed.

    `streamer` gets each token of a single prompt as it is generated.
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
    """Use transformers' defaults, not the model's generation config, for settings that `model.generate` is not given.

    Otherwise transformers fills them from the model's generation config: beams, penalties, time limits, and any number
    of completions per prompt.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    kept = inner.generation_config
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = kept


class TokenStreamer(BaseStreamer):
    """Calls `show` with the whole text so far after every token; an incomplete UTF-8 character is held back.

    The text of the last call equals that of the Completion.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], show: Callable[[str], None]) -> None:
        self.tokenizer, self.stops, self.show = tokenizer, set(stops), show
        self.ids: list[int] | None = None  # None: the first `put` is the prompt

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
    """Return `static` on a CPU, where copying a growing cache at every token would take most of the time; else None.

    `mixed`: float32 weights under autocast, whose keys do not have the precision of a static cache.
    """
    return "static" if device.type == "cpu" and not mixed else None


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the stop tokens: the tokenizer's eos, and the special tokens of the model's generation config.

    An ordinary word in that config would truncate answers.
    """
    listed = model.generation_config.eos_token_id if model.generation_config else None
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return sorted({tokenizer.eos_token_id, *(special & set(as_list(listed)))})


def _completion(ids: list[int], tokenizer: PreTrainedTokenizerBase, stops: set[int]) -> Completion:
    """Return the completion of generated token ids, which end at the first stop token."""
    length = next((k for k, token in enumerate(ids) if token in stops), None)
    kept = ids if length is None else ids[:length]
    return Completion(decode(tokenizer, kept), len(kept) + (length is not None), length is None)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of a completion without special tokens, except the tags of a thought.

    Answer parsing and rewards need the tags. Most tokenizers add them as ordinary tokens, some as special ones.
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
    """Yield (index, completion) for each prompt of this rank, batch by batch.

    A prompt's random stream is seeded by `seed` and the prompt's tokens.
    """
    model.eval()
    for number, batch in enumerate(batches_of([len(prompt) for prompt in prompts], batch_size)):
        if number % world == rank:
            chosen = [prompts[k] for k in batch]
            completions = generate_batch(model, tokenizer, chosen, sampling, [seed_of(seed, ids) for ids in chosen])
            yield from zip(batch, completions, strict=True)


@torch.inference_mode()
def mean_log_likelihood(model: PreTrainedModel, ids: list[int], labels: list[int]) -> float:
    """Return the mean log-probability, in nats, of the tokens of one row whose label is not -100."""
    where = input_device(model)
    logits = model(input_ids=torch.tensor([ids], device=where)).logits[0, :-1]
    wanted = torch.tensor(labels[1:], device=logits.device)
    scored = wanted != -100
    chosen = torch.log_softmax(logits[scored].float(), -1).gather(-1, wanted[scored][:, None])
    return float(chosen.mean())


def seed_of(seed: int, prompt: Sequence[int]) -> int:
    """Return a 63-bit seed from the recipe's seed and a prompt's tokens."""
    return int.from_bytes(sha256(f"{seed}/{list(prompt)}".encode()).digest()[:8], "big") >> 1
