"""Put another attention into a model through transformers' `ALL_ATTENTION_FUNCTIONS`.

    register("therefore_rows", "row_cache", attend)       once, at import
    model.config._attn_implementation = "therefore_rows"  then model(…, row_cache=…) calls attend(row_cache, module, …)

Every architecture that looks its attention up there works, whatever its projections, rotations and adapters do. No mask
function is registered for the name, so transformers makes no mask.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipeline.core.errors import LaunchError

LAYERS = {"full_attention", "sliding_attention"}  # kinds of layers whose attention is a plain softmax


class Attend(Protocol):
    """Returns the output, (rows, tokens, heads, width), of queries, keys and values, (rows, heads, tokens, width).

    `given` is what the forward pass was given; `window`: how far back a sliding layer sees.
    """

    def __call__(
        self,
        given: Any,
        /,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        window: int | None,
        dropout: float,
    ) -> torch.Tensor: ...


def register(name: str, argument: str, attend: Attend) -> None:
    """Register `attend` under a name; `argument` is the keyword of the forward pass whose value it is given first."""

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **more: Any,
    ) -> tuple[torch.Tensor, None]:
        if softcap is not None or s_aux is not None:
            raise LaunchError(
                f"{argument}: got a model whose attention has a soft cap or sinks; expected a plain softmax, which is "
                "all that this project computes itself. Fix: another model"
            )
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast they come in float32
        given = more[argument]
        return attend(given, module, query, key, value, scaling=scaling, window=sliding_window, dropout=dropout), None

    ALL_ATTENTION_FUNCTIONS.register(name, attention)


def is_plain(model: PreTrainedModel) -> bool:
    """Return whether a model's attention can be replaced in training: a softmax of scores, in layers that look it up.

    And nothing else leads from token to token: layers with a state, of Mamba and others, would read across rows.
    """
    config = model.config.get_text_config()
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    kinds = set(getattr(config, "layer_types", None) or LAYERS)
    sinks = any(hasattr(module, "sinks") for module in model.modules())
    looked_up = bool(model._supports_attention_backend) and config is model.config
    return looked_up and not (capped or sinks or model._is_stateful) and kinds <= LAYERS
