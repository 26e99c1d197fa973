"""Batches without padding: all rows of a micro-batch in one line, and a prompt that several rows share only once.

    flat = Flat(rows=[7, 9])                                two rows: their tokens stand one after another
    flat = Flat(rows=[3, 5, 4], prompts=[6], of=[0, 0, 0])  three completions of one prompt, whose six tokens come first
    model(input_ids=tokens[None], position_ids=flat.positions[None], flat=flat, …)

Everything but the attention treats each token by itself: projections, norms and the head then compute only real tokens.
The attention takes the line apart again: prompts attend to themselves, rows to themselves and to their prompt, a copy
of whose keys and values stands before theirs (the split of Prefix Grouper, Liu et al. 2025, arXiv 2506.05433). Losses
and gradients are those of a padded batch.

It takes the place of a model's attention by models/attention.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from pipeline.models.attention import is_plain, register
from pipeline.workflow.runtime import Runtime

ATTENTION = "therefore_flat"
BLOCK = 128  # queries


class Flat:
    """Where the tokens of a micro-batch stand: first every prompt, then every row.

    `rows`: the number of tokens of each row. `prompts`: that of each shared prompt, and `of`: which of them each row
    follows. Without prompts, rows have nothing before them.
    """

    def __init__(self, rows: Sequence[int], prompts: Sequence[int] = (), of: Sequence[int] = ()) -> None:
        lengths = torch.tensor([*prompts, *rows])
        first = lengths.cumsum(0) - lengths  # of each prompt and row, in the line
        count, before = len(prompts), torch.tensor(list(of), dtype=torch.long)
        self.prompts = _places(first[:count], lengths[:count])  # (prompts, longest): of each token, in the line
        self.own = _places(first[count:], lengths[count:])
        self.prompt_lengths = lengths[:count][before]  # of each row's prompt
        self.keys = torch.cat([self.prompts[before], self.own], 1) if count else self.own
        self.places = torch.cat([torch.arange(n) for n in lengths])  # of each token, in its own prompt or row
        offsets = torch.cat([torch.zeros(count, dtype=torch.long), self.prompt_lengths]) if count else 0 * lengths
        self.positions = self.places + offsets.repeat_interleave(lengths)
        # where each token's output stands among the outputs of all prompts, then of all rows
        width = torch.tensor([self.prompts.shape[1]] * count + [self.own.shape[1]] * len(rows))
        start = width.cumsum(0) - width
        self.outputs = self.places + start.repeat_interleave(lengths)
        self.masks: dict[tuple[bool, int | None], torch.Tensor | None] = {}

    def to(self, device: torch.device | str, **_: Any) -> Flat:
        """Move to a device, as accelerate moves what a data loader gives."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(device))
        self.masks = {}
        return self

    def mask(self, prompts: bool, window: int | None) -> torch.Tensor | None:
        """Return which keys each query may look at, (1 or rows, 1, queries, keys); None: those that stand before it.

        It is the same for all layers of one window. Padding is on the right, where nothing is read later.
        """
        if (prompts, window) not in self.masks:
            self.masks[prompts, window] = self._mask(prompts, window)
        return self.masks[prompts, window]

    def _mask(self, prompts: bool, window: int | None) -> torch.Tensor | None:
        queries = (self.prompts if prompts else self.own).shape[1]
        border = 0 if prompts else self.keys.shape[1] - queries  # keys of the shared prompts
        if not border and (window is None or queries <= window):
            return None
        at = torch.arange(queries, device=self.keys.device)[:, None]
        own = torch.arange(queries, device=self.keys.device)[None]
        seen = own <= at if window is None else (own <= at) & (own > at - window)
        if not border:
            return seen[None, None]
        length = self.prompt_lengths[:, None, None]
        before = torch.arange(border, device=self.keys.device)
        shared = (before < length).expand(-1, queries, -1)
        if window is not None:
            shared = shared & (before > length + at - window)
        return torch.cat([shared, seen.expand(len(shared), -1, -1)], 2)[:, None]


def _places(first: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return the places of the tokens of some pieces of the line, one a row; what pads a row is its first token."""
    longest = int(lengths.max()) if len(lengths) else 0
    at = torch.arange(longest)
    return first[:, None] + torch.where(at < lengths[:, None], at, 0)


def _attend(
    flat: Flat,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    window: int | None,
    dropout: float,
) -> torch.Tensor:
    """Attend within each prompt, and from each row to its prompt and itself. Returns (1, tokens, heads, width)."""
    lined = [states[0].transpose(0, 1) for states in (query, key, value)]  # (tokens, heads, width)
    found = []
    for prompts, places in ((True, flat.prompts), (False, flat.own)):
        if not places.numel():
            continue
        keys = places if prompts else flat.keys
        q, k, v = (_taken(states, at) for states, at in zip(lined, (places, keys, keys), strict=True))
        mask = flat.mask(prompts, window)
        if q.device.type == "cpu" and q.shape[2] > BLOCK:
            output = _in_blocks(module, q, k, v, mask, scaling, dropout)
        else:
            words = {"dropout": dropout, "scaling": scaling, "is_causal": mask is None}
            output, _ = sdpa_attention_forward(module, q, k, v, mask, **words)
        found.append(output.flatten(0, 1))
    return torch.cat(found).index_select(0, flat.outputs)[None]


def _in_blocks(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """Attend block by block of queries, each to the keys that stand before its end.

    PyTorch's kernel for CPUs also multiplies what a mask or the causal order hides: twice the work of long rows.
    """
    groups = int(getattr(module, "num_key_value_groups", 1))
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    border = key.shape[2] - query.shape[2]
    found = []
    for first, block in zip(range(0, query.shape[2], BLOCK), torch.split(query, BLOCK, 2), strict=True):
        last = border + first + block.shape[2]
        ones = query.new_ones(block.shape[2], last, dtype=torch.bool)
        seen = ones.tril(first) if mask is None else mask[:, :, first : first + block.shape[2], :last]
        before = key[:, :, :last], value[:, :, :last]
        found.append(scaled_dot_product_attention(block, *before, seen, dropout, scale=scaling))
    return torch.cat(found, 2).transpose(1, 2)


def _taken(states: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Return (rows, heads, longest, width) of (tokens, heads, width)."""
    return states.index_select(0, at.flatten()).view(*at.shape, *states.shape[1:]).transpose(1, 2)


register(ATTENTION, "flat", _attend)


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Put rows of `input_ids` and `labels` into one line; a packed row is the rows of its `seq_lengths`.

    `lengths` comes first: the trainer takes its size for the number of rows, and weighs a validation loss by it.
    """
    flat = Flat([n for row in rows for n in row.get("seq_lengths") or [len(row["input_ids"])]])
    tokens, labels = (torch.tensor([one for row in rows for one in row[name]]) for name in ("input_ids", "labels"))
    labels[flat.places == 0] = -100  # nothing before it says what it is
    return {
        "lengths": torch.tensor([len(row["input_ids"]) for row in rows]),
        "input_ids": tokens[None],
        "position_ids": flat.positions[None],
        "labels": labels[None],
        "shift_labels": torch.cat([labels[1:], labels.new_tensor([-100])])[None],
        "flat": flat,
    }


def of_groups(ids: torch.Tensor, mask: torch.Tensor, scored: int) -> tuple[Flat, dict[str, Any]]:
    """Put prompts and their completions into one line, equal prompts once. Returns it with the inputs of a model.

    `ids`, `mask`: (rows, tokens), prompts padded on the left and completions on the right; the last `scored` columns
    are of completions. The last token of a prompt stands before each of its completions: it says what comes first.
    """
    prompts: dict[tuple[int, ...], int] = {}
    of, rows, labels = [], [], []
    for tokens, seen in zip(ids.tolist(), mask.tolist(), strict=True):
        prompt = tuple(token for token, one in zip(tokens[:-scored], seen[:-scored], strict=True) if one)
        completion = tokens[-scored:][: sum(seen[-scored:])]
        of.append(prompts.setdefault(prompt, len(prompts)))
        rows.append([prompt[-1], *completion[:-1]])
        labels.append(completion or [-100])  # a completion may be left out
    flat = Flat([len(row) for row in rows], [len(prompt) - 1 for prompt in prompts], of)
    line = [token for piece in (*(prompt[:-1] for prompt in prompts), *rows) for token in piece]
    wanted = [-100] * (len(line) - sum(map(len, rows))) + [token for row in labels for token in row]
    inputs = {"input_ids": torch.tensor([line]), "position_ids": flat.positions[None]}
    inputs["shift_labels"] = torch.tensor([wanted])
    flat.to(ids.device)
    return flat, {name: value.to(ids.device) for name, value in inputs.items()} | {"flat": flat}


def replace_attention(runtime: Runtime, model: PreTrainedModel | PeftModel, *, saves: bool) -> bool:
    """Have a model attend as the `flat` of each forward pass says, where `cluster.padding_free` and the model allow it.

    `saves`: whether that saves computing. Returns whether it does; then every forward pass must be given a `flat`.
    """
    asked = runtime.cluster.padding_free
    if asked is False or (asked == "auto" and not saves):
        return False
    possible = is_plain(model.get_base_model() if isinstance(model, PeftModel) else model)
    if possible:
        model.config._attn_implementation = ATTENTION
    elif asked is True:
        runtime.warn(
            f"cluster.padding_free: the attention of {model.config.model_type} cannot be replaced; rows are padded"
        )
    return possible
