"""Masks as PyTorch's and torchscale's layers hand them on, in this package's terms."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from .errors import Unsupported, message


def refuse(
    argument: str, expected: str, got: Any, hint: str, op: str = "dilated_attention"
) -> NoReturn:
    """Raise Unsupported: a request that cannot be honoured."""
    raise Unsupported(message(argument, expected, str(got), hint, op=op))


def _require(
    holds: Tensor, argument: str, expected: str, got: str, hint: str, op: str = "dilated_attention"
) -> None:
    """Raise Unsupported unless all of `holds` is true: now, or where a compiled graph runs."""
    text = message(argument, expected, got, hint, op=op)
    if torch.compiler.is_compiling():
        torch._assert_async(holds.all(), text)
    elif not holds.is_meta and not bool(holds.all()):
        raise Unsupported(text)


def key_mask_of(padding: Tensor, op: str = "dilated_attention") -> Tensor:
    """True = key takes part, from key_padding_mask: True, or -inf, = key is ignored."""
    if padding.dtype == torch.bool:
        return ~padding
    if not padding.is_floating_point():
        hint = "True or -inf: key is ignored"
        refuse("key_padding_mask", "bool or float", padding.dtype, hint, op)
    _require(
        (padding == 0) | (padding == -torch.inf),
        "key_padding_mask", "0 and -inf", "other numbers", "biases of scores are not supported",
        op,
    )  # fmt: skip
    return padding == 0


def require_causal_mask(attn_mask: Tensor, seqlen: int) -> None:
    """attn_mask must be the causal one: nothing else can be honoured."""
    shape, expected = tuple(attn_mask.shape), "None, or the causal mask"
    hint = "use is_causal or key_padding_mask"
    hidden = attn_mask if attn_mask.dtype == torch.bool else attn_mask == -torch.inf
    if shape != (seqlen, seqlen):
        refuse("attn_mask", expected, f"shape {shape}", hint)
    above = torch.ones_like(hidden).triu(1)
    seen = hidden.logical_not() if attn_mask.dtype == torch.bool else attn_mask == 0
    _require(torch.where(above, hidden, seen), "attn_mask", expected, "another mask", hint)
