"""Autocast and vmap of the operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _ops
from ._fake import known_size
from ._ops import NUM_INPUTS
from ._options import DTYPES, LAYOUTS, Options
from .errors import Unsupported, message


def autocast_inputs(device: str, arguments: tuple[Any, ...]) -> list[Tensor]:
    """Query, key and value as autocast has them for matrix products: of its dtype, but for float64.

    Where no back end runs that dtype they stay as they are, or take the dtype they promote to.
    """
    tensors = list(arguments[:3])
    if any(not t.is_floating_point() or t.dtype == torch.float64 for t in tensors):
        return tensors
    options = Options(*arguments[NUM_INPUTS:])
    dtype = torch.get_autocast_dtype(device)
    head_dim = known_size(tensors[0].shape[-1]) if tensors[0].dim() else None
    runs = dtype in DTYPES and (
        head_dim is None or _ops.ops.runs(device == "cuda", DTYPES.index(dtype), head_dim, *options)
    )
    if not runs:
        dtype = torch.promote_types(
            torch.promote_types(tensors[0].dtype, tensors[1].dtype), tensors[2].dtype
        )
    return [t.to(dtype) for t in tensors]


def _autocast(device: str) -> Callable[..., Any]:
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def forward(*arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(key):
            return _ops.forward_op(*autocast_inputs(device, arguments), *arguments[3:])

    return forward


for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _ops.implementations.impl("forward", _autocast(_device), _key)


def _fold(tensor: Any, dim: int | None, size: int, has_batch: bool = True) -> Any:
    """(size * batch, ...) of a tensor (batch, ...) per sample."""
    if tensor is None or tensor.dim() == 0:  # scale_tensor
        return tensor
    mapped = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return mapped.flatten(0, 1) if has_batch else mapped


def _unfold(tensor: Tensor, size: int, has_batch: bool = True) -> Tensor:
    return tensor.unflatten(0, (size, tensor.shape[0] // max(1, size))) if has_batch else tensor


def _vmap(operator: Any, num_tensors: int) -> Callable[..., Any]:
    """The mapped dimension joins the batch: sequences do not know of one another."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        options = Options(*arguments[num_tensors:])
        layout = options.layout
        if layout == "shd":
            hint = "packed tensors have no batch that the mapped dimension could join"
            raise Unsupported(message("layout", "'bshd' or 'bhsd' under vmap", f"'{layout}'", hint))
        if options.dropout_p > 0.0:
            hint = "sequences of one call draw one mask each; call once per sample"
            got = str(options.dropout_p)
            raise Unsupported(message("dropout_p", "0 under vmap", got, hint))
        size = info.batch_size
        pairs = zip(arguments[:num_tensors], in_dims[:num_tensors], strict=True)
        results = operator(*(_fold(tensor, dim, size) for tensor, dim in pairs), *options)
        return tuple(_unfold(x, size) for x in results), (0,) * len(results)

    return rule


for _name, _operator in (
    ("forward", _ops.forward_op),
    ("forward_saving", _ops.forward_saving_op),
    ("backward", _ops.backward_op),
):
    _rule = _vmap(_operator, len(_operator._schema.arguments) - len(Options._fields))
    torch.library.register_vmap(f"dilated::{_name}", _rule)


_BSHD = LAYOUTS.index("bshd")


def _merge_vmap(info: Any, in_dims: Any, outs: Any, lses: Any, layout: int, dtype: int) -> Any:
    """Packed parts have no batch: the mapped dimension becomes one."""
    size, has_batch = info.batch_size, LAYOUTS[layout] != "shd"
    sides = [
        [_fold(x, dim, size, has_batch) for x, dim in zip(side, dims, strict=True)]
        for side, dims in zip((outs, lses), in_dims[:2], strict=True)
    ]
    results = _ops.merge_op(*sides, layout if has_batch else _BSHD, dtype)
    return tuple(_unfold(x, size, has_batch) for x in results), (0, 0)


def _merge_backward_vmap(
    info: Any, in_dims: Any, dout: Any, dlse: Any, outs: Any, lses: Any, layout: int
) -> Any:
    size, has_batch = info.batch_size, LAYOUTS[layout] != "shd"
    gradients = [
        _fold(x, dim, size, has_batch) for x, dim in zip((dout, dlse), in_dims[:2], strict=True)
    ]
    sides = [
        [_fold(x, dim, size, has_batch) for x, dim in zip(side, dims, strict=True)]
        for side, dims in zip((outs, lses), in_dims[2:4], strict=True)
    ]
    results = _ops.merge_backward_op(*gradients, *sides, layout if has_batch else _BSHD)
    unfolded = [[_unfold(x, size, has_batch) for x in side] for side in results]
    return tuple(unfolded), tuple([0] * len(side) for side in unfolded)


torch.library.register_vmap("dilated::merge", _merge_vmap)
torch.library.register_vmap("dilated::merge_backward", _merge_backward_vmap)
