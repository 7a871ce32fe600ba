"""Tensors of a call: what the user gave, as the core reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor

from . import _ops
from ._options import Options, integer, integers
from .errors import InvalidProblem, message

if TYPE_CHECKING:
    from ._options import Lengths


def require_tensor(argument: str, value: Any) -> None:
    """Raise InvalidProblem unless it is one."""
    if not isinstance(value, Tensor):
        raise InvalidProblem(message(argument, "a tensor", type(value).__name__))


def require_tensors(query: Any, key: Any, value: Any) -> None:
    """Raise InvalidProblem unless all are tensors."""
    if isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor):
        return
    for name, given in (("query", query), ("key", key), ("value", value)):
        require_tensor(name, given)


def require_parameter_dtype(
    argument: str, x: Tensor, weight: Tensor, op: str = "dilated_attention"
) -> None:
    """Raise InvalidProblem unless x has the dtype of a module's weight, or autocast casts both."""
    device = x.device.type
    casts = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    # A quantised weight is an integer, and its module casts by itself.
    if x.dtype != weight.dtype and weight.is_floating_point() and not casts:
        expected = f"{weight.dtype}, as the parameters"
        raise InvalidProblem(message(argument, expected, str(x.dtype), op=op))


def _integer_tensor(argument: str, value: Tensor, expected: str) -> Tensor:
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise InvalidProblem(message(argument, expected, f"dtype {value.dtype}"))
    if value.dtype == torch.uint64:
        raise InvalidProblem(message(argument, expected, "dtype torch.uint64", "cast to int64"))
    return value


def lengths(argument: str, values: Lengths | None, device: torch.device) -> Tensor | None:
    """Lengths as the core reads them: int64, contiguous, on `device`."""
    if values is None:
        return None
    if isinstance(values, Tensor):
        _integer_tensor(argument, values, "integers")
        return values.to(device, torch.int64).contiguous()
    return torch.tensor(integers(argument, values), dtype=torch.int64, device=device)


_SEED = "an int64 tensor (seed, offset), or an integer"


def _seed(
    dropout_p: float, seed: SupportsIndex | Tensor | None, device: torch.device
) -> Tensor | None:
    """(seed, offset); drawn from torch's default generator if not given."""
    if seed is None:
        if dropout_p == 0.0:
            return None
        return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        _integer_tensor("dropout_seed", seed, _SEED)
        pair = seed.to(device, torch.int64).contiguous()
    else:
        number = integer("dropout_seed", seed, _SEED)
        pair = torch.tensor([number, 0], dtype=torch.int64, device=device)
    return None if dropout_p == 0.0 else pair


_NONE = _ops.OptionalTensors()


def optional_tensors(
    query: Tensor,
    options: Options,
    key_mask: Tensor | None,
    seqused: Lengths | None,
    cu_seqlens: Lengths | None,
    windows: Tensor | None,
    dropout_seed: SupportsIndex | Tensor | None,
) -> tuple[_ops.OptionalTensors, Options]:
    """Optional tensors as the operators take them, and options without what became one of them."""
    if (
        key_mask is seqused is cu_seqlens is windows is dropout_seed is None
        and options.dropout_p == 0.0
        and (options.scale is None or not torch.compiler.is_compiling())
    ):
        return _NONE, options
    scale_tensor = None
    if options.scale is not None and torch.compiler.is_compiling():
        zero = torch.zeros((), dtype=torch.float64, device="cpu")
        scale_tensor, options = zero + options.scale, options._replace(scale=None)
    if key_mask is not None:
        require_tensor("key_mask", key_mask)
    device = query.device
    optional = _ops.OptionalTensors(
        key_mask,
        lengths("seqused", seqused, device),
        lengths("cu_seqlens", cu_seqlens, torch.device("cpu")),
        windows,
        _seed(options.dropout_p, dropout_seed, device),
        scale_tensor,
    )
    return optional, options
