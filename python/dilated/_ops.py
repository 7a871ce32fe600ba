"""The operators of the library, and calls of them with typed errors.

    forward(query, key, value, masks, …)         -> out, lse
    forward_saving(query, key, value, masks, …)  -> out, lse, and what backward needs besides
    backward(dout, dlse, …)                      -> dquery, dkey, dvalue
    merge(outs, lses, …)                         -> out, lse
    merge_backward(dout, dlse, …)                -> douts, dlses

What PyTorch must know besides stands in _gradients.py, _fake.py and _transforms.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _library
from .errors import typed

LIBRARY_PATH = _library.PATH

ops = _library.ops
forward_op = ops.forward.default
forward_saving_op = ops.forward_saving.default
backward_op = ops.backward.default
merge_op = ops.merge.default
merge_backward_op = ops.merge_backward.default

#: Python kernels of the operators.
implementations = torch.library.Library("dilated", "IMPL")

# Operators without tensors read constants only: under fake tensors and tracing they just run.
for _name in (
    "names",
    "backends",
    "check",
    "check_options",
    "runs",
    "explain",
    "print_plan",
    "workspace_bytes",
    "count_pairs",
    "attention_pattern",
    "offsets",
):
    implementations.impl(_name, torch.library.fallthrough_kernel, "Python")
    implementations.impl(_name, torch.library.fallthrough_kernel, "PythonTLSSnapshot")


class OptionalTensors(NamedTuple):
    """Optional tensors of one call, in the order of the schema."""

    key_mask: Tensor | None = None
    seqused: Tensor | None = None
    cu_seqlens: Tensor | None = None
    windows: Tensor | None = None
    dropout_seed: Tensor | None = None
    scale_tensor: Tensor | None = None  # scale, where a compiler would specialize on a float


INPUT_NAMES = ("query", "key", "value", *OptionalTensors._fields)
NUM_INPUTS = len(INPUT_NAMES)


def ask(operator: Callable[..., Any], *arguments: Any) -> Any:
    """What an operator answers; its errors are typed.

    Raises:
        InvalidProblem, Unsupported: with the core's message.
    """
    try:
        return operator(*arguments)
    except (ValueError, RuntimeError) as error:
        raise typed(error) from None
