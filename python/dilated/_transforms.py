"""Autocast and vmap of the operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _ops
from ._fake import known_size
from ._ops import NUM_INPUTS
from ._options import DTYPES, Options
from .errors import Unsupported, message


def _cast(device: str, arguments: tuple[Any, ...]) -> list[Tensor]:
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
            return _ops.forward_op(*_cast(device, arguments), *arguments[3:])

    return forward


for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _ops.implementations.impl("forward", _autocast(_device), _key)


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

        def fold(tensor: Tensor | None, dim: int | None) -> Tensor | None:
            if tensor is None or tensor.dim() == 0:  # scale_tensor
                return tensor
            mapped = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            return mapped.flatten(0, 1)

        tensors = map(fold, arguments[:num_tensors], in_dims[:num_tensors])
        results = operator(*tensors, *options)
        unfolded = tuple(x.unflatten(0, (size, x.shape[0] // max(1, size))) for x in results)
        return unfolded, (0,) * len(unfolded)

    return rule


for _name, _operator in (
    ("forward", _ops.forward_op),
    ("forward_saving", _ops.forward_saving_op),
    ("backward", _ops.backward_op),
):
    _rule = _vmap(_operator, len(_operator._schema.arguments) - len(Options._fields))
    torch.library.register_vmap(f"dilated::{_name}", _rule)
