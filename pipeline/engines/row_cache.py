"""Keys and values of the rows that are being completed, and the attention that reads them.

Rows lie densely: row r of every buffer belongs to the r-th active row. What several rows have in common, a prompt that
is sampled several times or the beginning of several prompts, lies once in a *prefix*, and is read once a step for all
of them: with one query per row, reading keys and values is what attention costs.

    position:   0 … p-1                      p … p+n-1
    buffer:     prefix[f, :, 0 … p-1, :]     own[r, :, 0 … n-1, :]

It takes the place of a model's attention by models/attention.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pipeline.models.attention import register

ATTENTION = "therefore_rows"


@dataclass
class Layer:
    """One layer's buffers, of shapes (prefixes, heads, prefix length, width) and (rows, heads, own length, width)."""

    prefix_keys: torch.Tensor
    prefix_values: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class Reading:
    """A forward pass over tokens with nothing before them; row k of the pass is written to place `to[k]`."""

    to: torch.Tensor
    prefix: bool  # into the prefixes; else into the rows' own part


@dataclass(frozen=True)
class Part:
    """Rows whose own parts are read together, as far as the longest of them."""

    rows: slice
    longest: int  # tokens of its own that a row holds, at most
    shortest: int  # at least; all rows see what stands before


@dataclass
class Going:
    """A forward pass over tokens that follow what rows already hold."""

    rows: torch.Tensor | None  # the rows of the pass; None: the first `lengths.shape[0]`
    family: torch.Tensor  # of each row: the place of its prefix
    seat: torch.Tensor  # of each row: its number among the rows of its prefix
    seats: int  # rows of a prefix, at most
    prefix: torch.Tensor  # of each row: the length of its prefix; 0: none
    lengths: torch.Tensor  # of each row: tokens of its own so far
    parts: list[Part]  # all rows
    longest_prefix: int
    families: int  # places of prefixes in use, counted from the first
    masks: dict[Any, torch.Tensor] = field(default_factory=dict)


class RowCache:
    """Buffers for `rows` rows of `own_length` tokens and `prefixes` prefixes of `prefix_length` tokens."""

    def __init__(self, rows: int, own_length: int, prefixes: int, prefix_length: int) -> None:
        self.shape = rows, own_length, prefixes, prefix_length
        self.layers: dict[int, Layer] = {}
        self.now: Reading | Going | None = None

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> Layer:
        """Return a layer's buffers; its first forward pass says their device, heads, widths and precision."""
        if index not in self.layers:
            rows, own_length, prefixes, prefix_length = self.shape
            keys, values = ((states.shape[1], states.shape[3]) for states in (key, value))
            make = value.new_zeros
            self.layers[index] = Layer(
                make(prefixes, keys[0], prefix_length, keys[1]),
                make(prefixes, values[0], prefix_length, values[1]),
                make(rows, keys[0], own_length, keys[1]),
                make(rows, values[0], own_length, values[1]),
            )
        return self.layers[index]

    @torch.no_grad()
    def move(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the own parts of rows, up to `length` tokens, to the places of others, all at once."""
        for layer in self.layers.values():
            for buffer in (layer.keys, layer.values):
                buffer[list(targets), :, :length] = buffer[list(sources), :, :length]

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        window: int | None,
        dropout: float,
    ) -> torch.Tensor:
        """Return the attention's output, of shape (rows, tokens, query heads, width); nothing is dropped."""
        layer = self.layer(int(module.layer_idx), key, value)  # type: ignore[arg-type]
        if isinstance(self.now, Reading):
            return _read(self.now, layer, module, query, key, value, scaling, window)
        assert self.now is not None
        with torch.autocast(value.device.type, enabled=False):
            return _go(self.now, layer, query, key, value, scaling, window)


def _read(
    now: Reading,
    layer: Layer,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """Attend causally among the tokens of the pass. Rows are padded on the right, where nothing is read later."""
    tokens = key.shape[2]
    keys, values = (layer.prefix_keys, layer.prefix_values) if now.prefix else (layer.keys, layer.values)
    to = now.to.to(key.device)
    keys[to, :, :tokens] = key
    values[to, :, :tokens] = value
    mask = None
    if window is not None and tokens > window:
        at = torch.arange(tokens, device=key.device)
        mask = ((at[None, :] <= at[:, None]) & (at[None, :] > at[:, None] - window))[None, None]
    output: torch.Tensor = sdpa_attention_forward(
        module, query, key, value, mask, dropout=0.0, scaling=scaling, is_causal=mask is None
    )[0]
    return output


def _go(
    now: Going,
    layer: Layer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """Write the new keys and values behind those of each row; attend to each row's prefix and to its own part.

    The prefix's part is computed for all rows of a prefix at once. Query heads that share a head of keys are lines of
    one matrix product.
    """
    (count, heads, tokens, width), shared, device = query.shape, key.shape[1], key.device
    rows = torch.arange(count, device=device) if now.rows is None else now.rows.to(device)
    at = now.lengths.to(device)[:, None] + torch.arange(tokens, device=device)
    layer.keys[rows[:, None], :, at] = key.transpose(1, 2)
    layer.values[rows[:, None], :, at] = value.transpose(1, 2)
    lines = heads // shared * tokens
    query = (query * scaling).reshape(count, shared, lines, width)
    if not now.longest_prefix:
        return _joined([_own(now, layer, query, None, part, tokens, window)[1] for part in now.parts], heads, tokens)
    used, seats = slice(now.families), now.seats
    prefix_keys = layer.prefix_keys[used, :, : now.longest_prefix]
    prefix_values = layer.prefix_values[used, :, : now.longest_prefix]
    family, seat = now.family.to(device), now.seat.to(device)
    together = query.new_zeros(now.families, shared, seats, lines, width)
    together[family, :, seat] = query
    scores = torch.matmul(together.flatten(2, 3), prefix_keys.transpose(2, 3))
    scores = scores.view(now.families, shared, seats, lines, -1)
    found = [
        _own(now, layer, query, scores[family[part.rows], :, seat[part.rows]], part, tokens, window)
        for part in now.parts
    ]
    spread = torch.zeros_like(scores)
    spread[family, :, seat] = torch.cat([weights for weights, _ in found])
    first = torch.matmul(spread.flatten(2, 3), prefix_values).view(now.families, shared, seats, lines, -1)
    return _joined([output for _, output in found], heads, tokens, first[family, :, seat])


def _own(
    now: Going,
    layer: Layer,
    query: torch.Tensor,
    scores: torch.Tensor | None,
    part: Part,
    tokens: int,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, for some rows, the weights of their prefix, and what comes of their own part."""
    until = part.longest + tokens
    at = part.rows if now.rows is None else now.rows[part.rows].to(query.device)
    keys, values = layer.keys[at, :, :until], layer.values[at, :, :until]
    border = 0 if scores is None else scores.shape[-1]
    own = torch.matmul(query[part.rows], keys.transpose(2, 3))
    scores = own if scores is None else torch.cat([scores, own], -1)
    mask = _mask(now, part, tokens, border, window, query.device)
    lined = scores.float().view(*scores.shape[:2], -1, tokens, scores.shape[3])
    lined[..., -mask.shape[-1] :].masked_fill_(mask, -torch.inf)
    weights = torch.softmax(lined, -1).to(values.dtype).view_as(scores)
    return weights[..., :border], torch.matmul(weights[..., border:], values)


def _joined(parts: list[torch.Tensor], heads: int, tokens: int, more: torch.Tensor | None = None) -> torch.Tensor:
    """Return the outputs of all parts in the shape that models expect: (rows, tokens, heads, width)."""
    output = torch.cat(parts) if len(parts) > 1 else parts[0]
    output = output if more is None else output + more
    return output.reshape(output.shape[0], heads, tokens, -1).transpose(1, 2).contiguous()


def _mask(now: Going, part: Part, tokens: int, border: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return what the new tokens of some rows may not look at; it is the same for all layers.

    Its shape is (rows, 1, 1, tokens, last columns): columns before those are seen by all.
    """
    key = part.rows.start, window, device
    if key not in now.masks:
        lengths, prefix = (t[part.rows].to(device)[:, None, None] for t in (now.lengths, now.prefix))
        at = lengths + torch.arange(tokens, device=device)[:, None]  # of each new token, in its row's own part
        first = 0 if border or window is not None else part.shortest
        own = torch.arange(first, part.longest + tokens, device=device)
        hidden = own > at
        if window is not None:
            hidden |= own <= at - window
        if border:
            before = torch.arange(border, device=device)
            outside = (before >= prefix).expand(-1, tokens, -1)
            if window is not None:
                outside = outside | (before <= prefix + at - window)
            hidden = torch.cat([outside, hidden], -1)
        now.masks[key] = hidden[:, None, None]
    return now.masks[key]


register(ATTENTION, "row_cache", RowCache.attend)


@contextlib.contextmanager
def rows_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model attend through the RowCache that its forward pass is given as `row_cache`."""
    config = model.config.get_text_config()
    kept = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = kept
