"""Draw the next token of each row from its own random stream.

A choice is the largest log-probability plus Gumbel noise (Gumbel 1954; Maddison 2014), which is a draw from softmax.
Temperature, top-k and top-p are transformers' own, in its order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pipeline.engines.engine import Sampling

SURE = 1e-3  # a token whose probability exceeds top_p by this is the only one that top-p leaves, whatever is rounded


class Stream:
    """The random numbers of one sample: a row of the vocabulary's size a token, drawn when it is needed."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.skipped = 0  # rows that no choice has needed

    def skip(self) -> None:
        self.skipped += 1

    def draw(self, words: int) -> torch.Tensor:
        """Return the next row: `words` numbers between 0 and 1."""
        device, rows = self.generator.device, self.skipped + 1
        self.skipped = 0
        if device.type == "cpu":  # numbers come one after another, in whatever portions they are asked for
            return torch.rand(rows * words, generator=self.generator)[-words:]
        for _ in range(rows - 1):
            torch.rand(words, generator=self.generator, device=device)
        return torch.rand(words, generator=self.generator, device=device)


class Sampler:
    """Chooses tokens as a `Sampling` says."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.warpers: list[Any] = []
        if sampling.temperature:
            self.warpers.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k:
                self.warpers.append(TopKLogitsWarper(sampling.top_k))
        self.top_p = TopPLogitsWarper(sampling.top_p) if sampling.temperature and sampling.top_p < 1 else None

    def choose(
        self, logits: torch.Tensor, streams: Sequence[Stream], written: Sequence[Sequence[int]], *, logprobs: bool
    ) -> tuple[list[int], list[float] | None]:
        """Return a token for each row of the logits, and its log-probability.

        Args:
            logits: shape (rows, vocabulary).
            streams: the random stream of each row; unused at temperature 0.
            written: prompt and completion so far of each row, for the repetition penalty.
            logprobs: whether log-probabilities are wanted.
        """
        scores = logits.float()
        if self.sampling.repetition_penalty != 1:
            scores = penalize(scores, written, self.sampling.repetition_penalty)
        for warper in self.warpers:
            scores = warper(None, scores)
        if not self.sampling.temperature:
            tokens = scores.argmax(-1)
        else:
            tokens, scores = self._draw(scores, streams)
        found = torch.log_softmax(scores, -1).gather(1, tokens[:, None])[:, 0].tolist() if logprobs else None
        return tokens.tolist(), found

    def _draw(self, scores: torch.Tensor, streams: Sequence[Stream]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens, and the scores with -inf for what top-p leaves out."""
        drawn = list(range(len(streams)))
        tokens = scores.argmax(-1)
        if self.top_p is not None:
            sure = (torch.softmax(scores, -1).amax(-1) > self.sampling.top_p + SURE).tolist()
            drawn = [row for row, is_sure in enumerate(sure) if not is_sure]
            for row, is_sure in enumerate(sure):
                if is_sure:
                    streams[row].skip()
            alone = torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)
            if drawn:
                alone[drawn] = self.top_p(None, scores[drawn])
            scores = alone
        if drawn:
            noise = torch.stack([streams[row].draw(scores.shape[1]) for row in drawn])
            noisy = scores[drawn] - torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))
            tokens[drawn] = noisy.argmax(-1)
        return tokens, scores


def penalize(scores: torch.Tensor, written: Sequence[Sequence[int]], penalty: float) -> torch.Tensor:
    """Return scores of shape (rows, vocabulary), divided (below 0: multiplied) for tokens already in the row.

    Source: Keskar et al. 2019, CTRL.
    """
    scores = scores.clone()
    for row, tokens in enumerate(written):
        seen = torch.tensor(sorted(set(tokens)), device=scores.device)
        old = scores[row, seen]
        scores[row, seen] = torch.where(old < 0, old * penalty, old / penalty)
    return scores
