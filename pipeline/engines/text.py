"""Tokens to text: where a completion stops, and what of it is read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.models.weight_checks import as_list
from pipeline.scoring.answers import CLOSE, OPEN


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the stop tokens: the tokenizer's eos, and the special tokens of the model's generation config.

    An ordinary word in that config would truncate answers.
    """
    listed = model.generation_config.eos_token_id if model.generation_config else None
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return sorted({tokenizer.eos_token_id, *(special & set(as_list(listed)))})


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of a completion without special tokens, except the tags of a thought.

    Answer parsing and rewards need the tags. Most tokenizers add them as ordinary tokens, some as special ones.
    """
    special = {token: added.content for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    dropped = {token for token, content in special.items() if content not in (OPEN, CLOSE)}
    if len(dropped) == len(special):
        return str(tokenizer.decode(ids, skip_special_tokens=True))
    return str(tokenizer.decode([token for token in ids if token not in dropped], skip_special_tokens=False))


def before_stop(ids: Sequence[int], stops: Collection[int]) -> Sequence[int]:
    """Return the tokens before the first stop token."""
    return ids[: next((k for k, token in enumerate(ids) if token in stops), len(ids))]


class TextStream:
    """Calls `show` with the whole text so far after every token; an incomplete UTF-8 character is held back.

    The text of the last call equals that of the Completion.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Collection[int], show: Callable[[str], None]) -> None:
        self.tokenizer, self.stops, self.show = tokenizer, set(stops), show

    def watch(self, request: int, sample: int, ids: list[int]) -> None:
        """Show the text of the tokens so far; the signature is `engine.Watch`."""
        text = decode(self.tokenizer, before_stop(ids, self.stops))
        if not text.endswith("\ufffd"):
            self.show(text)
