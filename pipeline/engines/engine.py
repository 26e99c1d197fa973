"""What every engine takes and gives: requests in, completions out as they finish.

    engine = TransformersEngine(model, tokenizer, rows=64)
    for answer in engine.generate([Request(prompt, seed=1, samples=8)], sampling): ...

An engine changes how fast an answer comes, never which answer is asked for: it is a setting of the cluster file, and no
part of a recipe's identity. Each sample has its own random stream, made of the request's seed, the prompt's tokens and
the sample's number, so that batches, processes and interruptions change no completion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Protocol


@dataclass(frozen=True)
class Sampling:
    """The sampling settings; temperature 0 is greedy decoding."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    repetition_penalty: float = 1.0  # 1: none


@dataclass(frozen=True)
class Request:
    """A prompt to be completed, once or several times."""

    prompt: Sequence[int]  # token ids, including the generation prompt; empty where the engine has no tokens
    seed: int = 0
    samples: int = 1
    first: int = 0  # the number of the first sample: the others of a row may have been generated before
    messages: Sequence[Mapping[str, str]] = ()  # the same as a conversation, for an engine without tokens

    @property
    def numbers(self) -> range:
        """The numbers of its samples."""
        return range(self.first, self.first + self.samples)


@dataclass(frozen=True)
class Call:
    """What a completion of a server took."""

    seconds: float  # of the request that was answered
    attempts: int
    prompt_tokens: int  # as the server counts them; 0 where it does not
    completion_tokens: int
    failure: str | None = None  # why there is no completion
    refused: bool = False  # whether the server does not want to answer it


@dataclass(frozen=True)
class Completion:
    """One completion of a prompt."""

    text: str  # without the stop token
    token_ids: list[int]  # including the stop token
    truncated: bool  # it reached max_new_tokens; else it ended with a stop token
    # of each token under the distribution that it was drawn from, in nats; None where they were not asked for
    logprobs: list[float] | None = None
    call: Call | None = None  # of a server, whose tokens are not known here

    @property
    def tokens(self) -> int:
        """How many tokens were generated, including the stop token."""
        return self.call.completion_tokens if self.call else len(self.token_ids)


@dataclass(frozen=True)
class Answer:
    """A completion and whose it is."""

    request: int  # the request's place in the list that was given
    sample: int
    completion: Completion


Watch = Callable[[int, int, list[int]], None]  # request, sample, tokens so far: called after every token


class Engine(Protocol):
    """A source of completions."""

    name: str

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, logprobs: bool = False, watch: Watch | None = None
    ) -> Iterator[Answer]:
        """Yield every sample of every request once, as they finish, in no particular order."""
        ...

    def log_likelihood(self, ids: Sequence[int], labels: Sequence[int]) -> float:
        """Return the mean log-probability, in nats, of the tokens of one row whose label is not -100."""
        ...

    def update(self, policy: Any) -> None:
        """Answer with the policy's present weights from now on."""
        ...

    def close(self) -> None:
        """Give back memory and processes."""
        ...


def seed_of(seed: int, prompt: Sequence[int], sample: int = 0) -> int:
    """Return a 63-bit seed from a request's seed, its prompt's tokens and the number of the sample."""
    text = f"{seed}/{list(prompt)}" + (f"/{sample}" if sample else "")
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") >> 1
