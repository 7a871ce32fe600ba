"""Errors of a module reach the ranks that share its sequence."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

if TYPE_CHECKING:
    from .distributed import SequenceGroups

_Method = TypeVar("_Method", bound=Callable[..., Any])


def telling_ranks(method: _Method) -> _Method:
    """A method with an argument `sequence_groups` whose exceptions the other ranks hear of."""

    @wraps(method)
    def told(
        self: Any, *arguments: Any, sequence_groups: SequenceGroups | None = None, **more: Any
    ) -> Any:
        if sequence_groups is None:
            return method(self, *arguments, **more)
        if torch.compiler.is_compiling():  # operators tell, graphs cannot
            return method(self, *arguments, sequence_groups=sequence_groups, **more)
        with sequence_groups:
            return method(self, *arguments, sequence_groups=sequence_groups, **more)

    return cast(_Method, told)
