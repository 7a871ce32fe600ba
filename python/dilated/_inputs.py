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


def tensor_of(argument: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    raise InvalidProblem(message(argument, "a tensor", type(value).__name__))


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


def extras_of(
    query: Tensor,
    options: Options,
    key_mask: Tensor | None,
    seqused: Lengths | None,
    cu_seqlens: Lengths | None,
    windows: Tensor | None,
    dropout_seed: SupportsIndex | Tensor | None,
) -> _ops.Extras:
    device = query.device
    return _ops.Extras(
        None if key_mask is None else tensor_of("key_mask", key_mask),
        lengths("seqused", seqused, device),
        lengths("cu_seqlens", cu_seqlens, torch.device("cpu")),
        windows,
        _seed(options.dropout_p, dropout_seed, device),
    )
