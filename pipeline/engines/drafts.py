"""Guess tokens that are likely to come, so that one forward pass can confirm several.

A guess costs a place in a pass that is made anyway. It is kept only where the model, with the random stream of its row,
chooses the same token, so guessing changes no answer (speculative decoding, Leviathan et al. 2023, with the n-grams of
what has been written as the guesser: Saxena 2023). Completions of one run resemble each other: proofs have a grammar,
and the samples of a prompt speak of the same things.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.sizing.memory import GUESSED

ORDERS = (8, 4)  # tokens that a guess goes by; the longer ones first
MEMORY = 2**17  # n-grams that are remembered; the oldest are forgotten
LENGTHS = (0, 1, 2, 3, 5, GUESSED)  # tokens that may be guessed at once


@dataclass(frozen=True)
class Costs:
    """Seconds of a forward pass over one token of each row: only their proportions count, so rough values do."""

    fixed: float  # of the pass itself, whatever is in it
    row: float  # of each row: reading its keys and values
    token: float  # of each token: the products with all weights

    def best_length(self, rows: int, accepted: float) -> int:
        """Return how many tokens to guess, so that most come out of each second.

        Args:
            rows: rows of the pass.
            accepted: the share of guesses that turned out right.
        """

        def rate(length: int) -> float:
            expected = sum(accepted**k for k in range(length + 1))  # each needs all before it to be right
            return expected / (self.fixed + rows * (self.row + (1 + length) * self.token))

        return max(LENGTHS, key=rate)


class Drafts:
    """Remembers what followed each n-gram, and guesses that it follows again."""

    def __init__(self) -> None:
        self.next: dict[int, int] = {}
        self.right, self.tried = 10.0, 20.0  # half of them, until it is known better

    @property
    def accepted(self) -> float:
        """The share of guesses that turned out right, of the last thousand or so."""
        return min(self.right / self.tried, 0.99)

    def count(self, right: int, tried: int) -> None:
        """Take note of guesses that were looked at."""
        self.right, self.tried = self.right + right, self.tried + tried
        if self.tried > 2000:
            self.right, self.tried = self.right / 2, self.tried / 2

    def learn(self, tokens: Sequence[int], new: int) -> None:
        """Remember the n-grams that end with one of the last `new` tokens."""
        for end in range(len(tokens) - new, len(tokens)):
            for order in ORDERS:
                if end >= order:
                    self.next[hash(tuple(tokens[end - order : end]))] = tokens[end]
        while len(self.next) > MEMORY:
            del self.next[next(iter(self.next))]

    def guess(self, tokens: Sequence[int], length: int) -> list[int]:
        """Return up to `length` tokens that may follow."""
        seen = list(tokens[-ORDERS[0] :])
        found: list[int] = []
        while len(found) < length:
            keys = (hash(tuple(seen[-order:])) for order in ORDERS if len(seen) >= order)
            token = next((self.next[key] for key in keys if key in self.next), None)
            if token is None:
                break
            found.append(token)
            seen.append(token)
        return found
