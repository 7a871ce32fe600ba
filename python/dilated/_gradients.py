"""Gradients of the operators.

Recording a call turns forward into forward_saving. That is decided when a graph is differentiated,
not when it was captured: a graph of inputs without gradient holds forward, which has a gradient.

The kernels of Autograd are registered directly: torch.library.register_autograd looks at every
argument of the schema again and again, which costs more than a small call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import (  # type: ignore[attr-defined]
    enable_single_level_autograd_function as _single_level,
)
from torch.autograd import forward_ad

from . import _ops
from ._ops import NUM_INPUTS
from ._options import Options
from .errors import Unsupported, message, typed

_BelowAutograd = torch._C._AutoDispatchBelowAutograd


def _records(tensors: Sequence[Tensor]) -> bool:
    """Whether a call of these is recorded. Tangents of forward-mode AD are refused, not dropped."""
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    ):
        raise Unsupported(
            message("tangents", "reverse-mode gradients only", "a forward-mode tangent",
                    "the operator has no forward-mode derivative; dilated.reference has")
        )  # fmt: skip
    if not torch.is_grad_enabled():
        return False
    return any([tensor.requires_grad for tensor in tensors])  # noqa: C419 - faster than lazily


def _record(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """function.apply in a kernel of Autograd, where one level of torch.func is being processed."""
    if torch._C._are_functorch_transforms_active():
        with _single_level():
            return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]
    return function.apply(*arguments)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        with _BelowAutograd():
            out, lse, *saved = _ops.forward_saving_op(*arguments)
        ctx.save_for_backward(*arguments[:3], out, lse, *saved, *arguments[3:NUM_INPUTS])
        ctx.options = arguments[NUM_INPUTS:]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = (None,) * (NUM_INPUTS - 3 + len(ctx.options))
        if dout is None and dlse is None:
            return (None, None, None, *rest)
        saved = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(saved[3])
        return (*_ops.ask(_ops.backward_op, dout, dlse, *saved, *ctx.options), *rest)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layout: int, dtype: int, *parts: Tensor) -> tuple[Tensor, Tensor]:
        half = len(parts) // 2
        ctx.save_for_backward(*parts)
        ctx.layout = layout
        ctx.set_materialize_grads(False)
        with _BelowAutograd():
            out, lse = _ops.merge_op(parts[:half], parts[half:], layout, dtype)
        ctx.out_like = (out.shape, out.dtype)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        parts = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None, None, *(None for _ in parts))
        if dout is None:
            shape, dtype = ctx.out_like
            dout = parts[0].new_zeros(shape, dtype=dtype)
        half = len(parts) // 2
        sides = parts[:half], parts[half:]
        douts, dlses = _ops.ask(_ops.merge_backward_op, dout, dlse, *sides, ctx.layout)
        return (None, None, *douts, *dlses)


class _Once(torch.autograd.Function):
    """A gradient: an operator without a derivative of its own."""

    @staticmethod
    def forward(ctx: Any, operator: Any, unflatten: Any, *arguments: Any) -> Any:
        with _BelowAutograd():
            result = operator(*unflatten(arguments))
        return tuple(x for part in result for x in (part if isinstance(part, list) else [part]))

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[None, ...]:
        raise Unsupported(
            message("create_graph", "first derivatives only", "a second one",
                    "the gradient of dilated_attention is not differentiable; dilated.reference is")
        )  # fmt: skip


def _forward_autograd(*arguments: Any) -> Any:
    if _records(arguments[:3]):
        return _record(_Attention, *arguments)
    with _BelowAutograd():
        return _ops.forward_op(*arguments)


def _forward_saving_autograd(*arguments: Any) -> Any:
    if _records(arguments[:3]):
        return _record(_Once, _ops.forward_saving_op, tuple, *arguments)
    with _BelowAutograd():
        return _ops.forward_saving_op(*arguments)


def _backward_autograd(*arguments: Any) -> Any:
    if _records([x for x in arguments[:5] if x is not None]):
        return _record(_Once, _ops.backward_op, tuple, *arguments)
    with _BelowAutograd():
        return _ops.backward_op(*arguments)


def _merge_autograd(outs: list[Tensor], lses: list[Tensor], layout: int, dtype: int) -> Any:
    if _records([*outs, *lses]):
        return _record(_Merge, layout, dtype, *outs, *lses)
    with _BelowAutograd():
        return _ops.merge_op(outs, lses, layout, dtype)


def _merge_backward_autograd(
    dout: Tensor, dlse: Tensor | None, outs: list[Tensor], lses: list[Tensor], layout: int
) -> Any:
    count = len(outs)
    if _records([dout, *outs, *lses, *(() if dlse is None else (dlse,))]):

        def unflatten(flat: tuple[Any, ...]) -> tuple[Any, ...]:
            return (*flat[:2], flat[2 : 2 + count], flat[2 + count : -1], flat[-1])

        flat = _record(_Once, _ops.merge_backward_op, unflatten, dout, dlse, *outs, *lses, layout)
        return list(flat[:count]), list(flat[count:])
    with _BelowAutograd():
        return _ops.merge_backward_op(dout, dlse, outs, lses, layout)


for _name, _kernel in (
    ("forward", _forward_autograd),
    ("forward_saving", _forward_saving_autograd),
    ("backward", _backward_autograd),
    ("merge", _merge_autograd),
    ("merge_backward", _merge_backward_autograd),
):
    _ops.implementations.impl(_name, _kernel, "Autograd")


def forward(
    query: Tensor, key: Tensor, value: Tensor, optional: _ops.OptionalTensors, options: Options
) -> tuple[Tensor, Tensor]:
    """(out, lse) in the user's layout.

    A call that is not recorded goes past the kernel of Autograd, which costs as much as all else.

    Raises:
        InvalidProblem, Unsupported: with the core's message.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or _records((query, key, value))
    ):
        out, lse = _ops.ask(_ops.forward_op, query, key, value, *optional, *options)
        return out, lse
    try:
        with _BelowAutograd():
            out, lse = _ops.forward_op(query, key, value, *optional, *options)
    except (ValueError, RuntimeError) as error:
        raise typed(error) from None
    return out, lse
