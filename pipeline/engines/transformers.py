"""Generate with a transformers model: rows come and go, and what they share is computed once.

    engine = TransformersEngine(model, tokenizer, rows=100)
    for answer in engine.generate(requests, sampling): ...

A forward pass holds the next token of every active row. A row that ends leaves, and a waiting prompt takes its place,
so nothing is computed for padding and no row waits for the longest. A prompt that is sampled several times, and the
beginning that prompts have in common (a premise with several hypotheses), is read once and lies in memory once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.core import heartbeat
from pipeline.engines.drafts import Costs, Drafts
from pipeline.engines.engine import Answer, Completion, Request, Sampling, Watch, seed_of
from pipeline.engines.families import Family, find_families
from pipeline.engines.row_cache import Going, Part, Reading, RowCache, rows_attention
from pipeline.engines.sampler import Sampler, Stream
from pipeline.engines.text import before_stop, decode, stop_ids
from pipeline.models.loading import input_device
from pipeline.sizing.memory import GUESSED, READ

SEATS = 16  # rows that share a prefix at once, at most
WORDS = 2**23  # logits of guessed tokens at once, at most: rows × tokens × vocabulary
PART, PARTS = 32, 4  # rows of a part of the attention, at least; parts, at most
ADMIT = 8  # prompts wait until an eighth of the rows is free: reading them a few at a time costs more


@dataclass
class Row:
    """One sample while it is generated."""

    request: int
    sample: int
    written: list[int]  # prompt and completion so far
    own: list[int]  # the prompt's tokens after the prefix: at least the last one
    stream: Stream
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    family: Family | None = None
    place: int = 0  # of the family's prefix
    seat: int = 0


class TransformersEngine:
    """Generates with a model in this process."""

    name = "transformers"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
        """Make an engine that computes up to `rows` rows at once."""
        self.model, self.tokenizer, self.rows = model, tokenizer, rows
        self.stops = set(stop_ids(model, tokenizer))

    @torch.no_grad()
    def log_likelihood(self, ids: Sequence[int], labels: Sequence[int]) -> float:
        """Return the mean log-probability, in nats, of the tokens of one row whose label is not -100."""
        logits = self.model(input_ids=torch.tensor([ids], device=input_device(self.model))).logits[0, :-1]
        wanted = torch.tensor(labels[1:], device=logits.device)
        scored = wanted != -100
        chosen = torch.log_softmax(logits[scored].float(), -1).gather(-1, wanted[scored][:, None])
        return float(chosen.mean())

    def update(self, policy: Any) -> None:
        """Generate with this model from now on."""
        self.model = policy

    def close(self) -> None:
        """Forget the model."""
        del self.model

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, logprobs: bool = False, watch: Watch | None = None
    ) -> Iterator[Answer]:
        """Yield every sample of every request once, as they finish."""
        # a policy between two steps: all of it in evaluation mode would let bitsandbytes pack its weights anew
        dropouts = [one for one in self.model.modules() if isinstance(one, torch.nn.Dropout) and one.training]
        for one in dropouts:
            one.training = False
        try:
            yield from _Run(self, requests, sampling, logprobs, watch).answers()
        finally:
            for one in dropouts:
                one.training = True


class _Run:
    """The rows of one call of `generate`."""

    def __init__(
        self,
        engine: TransformersEngine,
        requests: Sequence[Request],
        sampling: Sampling,
        logprobs: bool,
        watch: Watch | None,
    ) -> None:
        self.engine, self.requests, self.sampling = engine, requests, sampling
        self.logprobs, self.watch = logprobs, watch
        self.device = input_device(engine.model)
        self.words = engine.model.get_output_embeddings().weight.shape[0]
        self.sampler = Sampler(sampling)
        families = find_families(requests)
        total = sum(len(family.waiting) for family in families)
        sharing = [family for family in families if family.prefix]
        self.capacity = max(1, min(engine.rows, total))
        self.seats = min(SEATS, self.capacity, max((len(family.waiting) for family in sharing), default=1))
        places = min(len(sharing), 2 * -(-self.capacity // self.seats))
        own = (
            max((family.longest - len(family.prefix) for family in families), default=1)
            + sampling.max_new_tokens
            + GUESSED
        )
        # a CPU reads no further than the longest row of each part; a GPU would rather start fewer kernels
        self.part = max(PART, -(-self.capacity // PARTS)) if self.device.type == "cpu" else self.capacity
        self.cache = RowCache(self.capacity, own, places, max((len(f.prefix) for f in sharing), default=0))
        self.drafts, self.costs = Drafts(), costs_of(engine.model, self.device, own)
        self.free_places = list(range(places))[::-1]
        self.waiting = deque(families)
        self.begun: list[Family] = []  # have a prefix in the cache, and samples that wait for a row
        self.active: list[Row] = []
        self.members: dict[str, torch.Tensor] | None = None  # what `Going` says of the rows while none comes or goes

    def answers(self) -> Iterator[Answer]:
        while self.waiting or self.begun or self.active:
            heartbeat.beat()
            free = self.capacity - len(self.active)
            if free * ADMIT >= self.capacity or not self.active:
                self._admit(free)
            yield from self._step()

    # ---- rows come

    def _admit(self, free: int) -> None:
        """Give free rows to waiting samples; read their prompts but for the last token, which the next step takes."""
        come: list[Row] = []
        new: list[Family] = []
        for family in self.begun:
            come += self._seat(family, free - len(come))
        while len(come) < free and self.waiting and (not self.waiting[0].prefix or self.free_places):
            family = self.waiting[0]
            if family.prefix and family.place < 0:
                family.place = self.free_places.pop()
                family.free_seats = list(range(self.seats))[::-1]
                new.append(family)
            come += self._seat(family, free - len(come))
            if family.waiting and not family.prefix:
                break
            self.waiting.popleft()
            if family.waiting:
                self.begun.append(family)
        self.begun = [family for family in self.begun if family.waiting]
        if not come:
            return
        for batch in _batches(new, [len(family.prefix) for family in new]):
            self._read([family.prefix for family in batch], [family.place for family in batch], prefix=True)
        self._sort()
        first = len(self.active)
        self.active += come
        self.members = None
        alone = [k for k, row in enumerate(come) if row.family is None and len(row.own) > 1]
        for batch in _batches(alone, [len(come[k].own) for k in alone]):
            self._read([come[k].own[:-1] for k in batch], [first + k for k in batch], prefix=False)
        together = [k for k, row in enumerate(come) if row.family is not None and len(row.own) > 1]
        for batch in _batches(together, [len(come[k].own) for k in together]):
            self._read_rest([come[k] for k in batch], [first + k for k in batch])

    def _seat(self, family: Family, free: int) -> list[Row]:
        """Make rows of a family's waiting samples, as many as rows and seats are free."""
        rows: list[Row] = []
        while family.waiting and free > len(rows) and (not family.prefix or family.free_seats):
            request, sample = family.waiting.popleft()
            prompt = list(self.requests[request].prompt)
            seed = seed_of(self.requests[request].seed, prompt, sample)
            row = Row(request, sample, prompt, prompt[len(family.prefix) :], Stream(seed, self.device))
            if family.prefix:
                row.family, row.place, row.seat = family, family.place, family.free_seats.pop()
            family.active += 1
            rows.append(row)
        return rows

    def _read(self, prompts: Sequence[Sequence[int]], places: list[int], *, prefix: bool) -> None:
        longest = max(map(len, prompts))
        self.cache.now = Reading(torch.tensor(places), prefix)
        self._forward(self._padded(prompts), torch.arange(longest, device=self.device).expand(len(prompts), -1))

    def _read_rest(self, rows: list[Row], places: list[int]) -> None:
        """Read what prompts have after their prefix, but for the last token."""
        tokens = self._padded([row.own[:-1] for row in rows])
        self.cache.now = self._going(rows, [0] * len(rows), torch.tensor(places))
        before = torch.tensor([len(row.family.prefix) if row.family else 0 for row in rows], device=self.device)
        self._forward(tokens, before[:, None] + torch.arange(tokens.shape[1], device=self.device))

    def _padded(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        longest, pad = max(map(len, prompts)), next(iter(self.engine.stops))
        return torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in prompts], device=self.device)

    def _sort(self) -> None:
        """Put the rows that hold most first, so that the parts of the attention hold rows of similar length."""
        held = [len(row.own) + len(row.ids) - 1 for row in self.active]
        order = sorted(range(len(held)), key=lambda k: -held[k])
        moved = [k for k, source in enumerate(order) if k != source]
        if self.part < self.capacity and moved:
            self.cache.move([order[k] for k in moved], moved, held[order[0]])
            self.active = [self.active[k] for k in order]

    # ---- rows go on

    def _step(self) -> Iterator[Answer]:
        """Compute the next token of every row; yield the rows that end, and let others take their places."""
        rows = self.active
        held = [len(row.own) + len(row.ids) - 1 for row in rows]
        length = self.costs.best_length(len(rows), self.drafts.accepted)
        length = min(length, max(0, WORDS // (len(rows) * self.words) - 1))
        drafts = [self.drafts.guess(row.ids, length) for row in rows]
        fed = [[row.ids[-1] if row.ids else row.own[-1], *draft] for row, draft in zip(rows, drafts, strict=True)]
        tokens = self._padded(fed)
        self.cache.now = now = self._going(rows, held, None)
        positions = (now.prefix + now.lengths)[:, None] + torch.arange(tokens.shape[1], device=self.device)
        logits = self._forward(tokens, positions, keep=tokens.shape[1])
        before = [len(row.ids) for row in rows]
        going = list(range(len(rows)))  # rows whose tokens so far were guessed right
        for at in range(tokens.shape[1]):
            self._write(going, logits[going, at])
            going = [
                k
                for k in going
                if at < len(drafts[k]) and drafts[k][at] == rows[k].ids[-1] and not self._ended(rows[k])
            ]
            if not going:
                break
        for row, draft, start in zip(rows, drafts, before, strict=True):
            new = len(row.ids) - start
            self.drafts.learn(row.ids, new)
            self.drafts.count(new - 1, min(len(draft), new))
            if self.watch:
                for end in range(start + 1, len(row.ids) + 1):
                    self.watch(row.request, row.sample, row.ids[:end])
        ended = [place for place, row in enumerate(rows) if self._ended(row)]
        finished = [rows[place] for place in ended]
        if ended:
            self._leave(ended, max(held) + tokens.shape[1])
        for row in finished:
            yield Answer(row.request, row.sample, self._completion(row))

    def _write(self, places: list[int], logits: torch.Tensor) -> None:
        """Give rows their next token, chosen by its logits."""
        rows = [self.active[place] for place in places]
        chosen, scores = self.sampler.choose(
            logits, [row.stream for row in rows], [row.written for row in rows], logprobs=self.logprobs
        )
        for k, (row, token) in enumerate(zip(rows, chosen, strict=True)):
            row.ids.append(token)
            row.written.append(token)
            if scores is not None:
                row.logprobs.append(scores[k])

    def _ended(self, row: Row) -> bool:
        return row.ids[-1] in self.engine.stops or len(row.ids) == self.sampling.max_new_tokens

    def _leave(self, ended: list[int], length: int) -> None:
        """Take rows out; the last rows move into the holes, so that active rows lie densely."""
        gone, rows = set(ended), self.active
        for place in ended:
            family = rows[place].family
            if family is not None:
                family.free_seats.append(rows[place].seat)
                family.active -= 1
                if not family.active and not family.waiting:
                    self.free_places.append(family.place)
        left = len(rows) - len(ended)
        holes = [place for place in ended if place < left]
        movers = [place for place in range(left, len(rows)) if place not in gone]
        if holes:
            self.cache.move(movers, holes, length)
            for hole, mover in zip(holes, movers, strict=True):
                rows[hole] = rows[mover]
        del rows[left:]
        self.members = None

    def _completion(self, row: Row) -> Completion:
        ended = row.ids[-1] in self.engine.stops
        text = decode(self.engine.tokenizer, before_stop(row.ids, self.engine.stops))
        return Completion(text, row.ids, not ended, row.logprobs if self.logprobs else None)

    # ---- forward passes

    def _going(self, rows: list[Row], held: list[int], places: torch.Tensor | None) -> Going:
        """Describe rows to the cache; `held`: the tokens that each has of its own."""
        if places is not None or self.members is None:
            prefix = [len(row.family.prefix) if row.family else 0 for row in rows]
            # rows without a prefix share one seat more, whose weights are all zero
            seats = [row.seat if row.family else self.seats for row in rows]
            described = torch.tensor([[row.place, *of] for row, *of in zip(rows, seats, prefix, strict=True)])
            members = dict(zip(("family", "seat", "prefix"), described.T.to(self.device), strict=True))
            if places is None:
                self.members = members
        else:
            members = self.members
        families = max((row.place for row in rows if row.family), default=-1) + 1
        return Going(
            places,
            lengths=torch.tensor(held, device=self.device),
            parts=[
                Part(slice(first, first + len(part)), max(part), min(part))
                for first in range(0, len(held), self.part)
                if (part := held[first : first + self.part])
            ],
            longest_prefix=max(len(row.family.prefix) if row.family else 0 for row in rows),
            seats=self.seats + 1,
            families=families,
            **members,
        )

    @torch.no_grad()
    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor, keep: int = 1) -> torch.Tensor:
        """Return the logits of each row's last tokens, of shape (rows, keep, vocabulary)."""
        with rows_attention(self.engine.model):
            output = self.engine.model(
                input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=keep, row_cache=self.cache
            )
        logits: torch.Tensor = output.logits
        return logits


def costs_of(model: PreTrainedModel, device: torch.device, length: int) -> Costs:
    """Return rough costs of a pass; they follow from the model alone, so that the same run does the same again.

    Args:
        model: the model.
        device: where it computes.
        length: tokens that a row's cache may hold; half of them are counted.
    """
    flops, bandwidth, overhead = (5e10, 1e10, 1.2e-3) if device.type == "cpu" else (1e14, 1e12, 3e-4)
    config = model.config.get_text_config()
    weights = sum(one.numel() for name, one in model.named_parameters() if "embed" not in name)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * width  # bytes of a token in 16 bit
    return Costs(config.num_hidden_layers * overhead, length / 2 * cache / bandwidth, 2 * weights / flops)


def _batches(items: Sequence[Any], lengths: Sequence[int]) -> list[list[Any]]:
    """Split items into batches of similar length whose padded sizes stay below READ tokens."""
    batches: list[list[Any]] = []
    longest = 0
    for k in sorted(range(len(items)), key=lambda k: -lengths[k]):
        if not batches or (len(batches[-1]) + 1) * longest > READ:
            batches.append([])
            longest = lengths[k]
        batches[-1].append(items[k])
    return batches
