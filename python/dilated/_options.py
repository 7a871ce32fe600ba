"""Options of a call: checked by type here, by rule in the core, packed for the operators.

PyTorch's cost of a call grows with its arguments, so that names, flags and lists travel in one list
of integers; bindings/torch/arguments.h describes it. The names and their order are the core's.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    NamedTuple,
    SupportsFloat,
    SupportsIndex,
    TypeAlias,
    TypedDict,
)

import torch
from torch import Tensor

from . import _library
from .errors import InvalidProblem, message

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Integers: TypeAlias = Sequence[SupportsIndex] | NDArray[np.integer[Any]]
    Lengths: TypeAlias = Integers | Tensor
    OffsetTable: TypeAlias = Sequence[Integers] | NDArray[np.integer[Any]] | Tensor


class AttentionOptions(TypedDict, total=False):
    """Options that no tensor carries; :func:`dilated.dilated_attention` explains them.

    Example:
        >>> import torch, dilated
        >>> options: dilated.AttentionOptions = {"is_causal": True, "offsets": "zero"}
        >>> x = torch.zeros(1, 8, 2, 4)
        >>> dilated.dilated_attention(x, x, x, segments=[4], dilations=[1], **options).shape
        torch.Size([1, 8, 2, 4])
    """

    is_causal: bool
    scale: SupportsFloat | None
    offsets: str | OffsetTable | None
    groups: str | None
    merge: str | None
    out_scale: SupportsFloat | None
    lse_grad: bool | None
    tail: str | None
    dropout_p: SupportsFloat
    gqa_offset: str | None
    preset: str | None
    layout: str
    backend: str | None
    head_offset: SupportsIndex
    total_heads: SupportsIndex | None
    total_kv_heads: SupportsIndex | None


class Options(NamedTuple):
    """Checked and packed options: the last arguments of every operator."""

    scale: float | None
    out_scale: float | None
    dropout_p: float
    packed: list[int]

    def name(self, argument: str) -> str | None:
        """The name given for layout, backend, preset, ..., gqa_offset."""
        index = self.packed[_ROWS.index(argument)]
        return None if index < 0 else NAMES[argument][index]

    @property
    def layout(self) -> str:
        return LAYOUTS[self.packed[0]]

    @property
    def segments(self) -> list[int]:
        return self.packed[_LISTS : _LISTS + self.packed[_LISTS - 3]]

    @property
    def dilations(self) -> list[int]:
        first = _LISTS + self.packed[_LISTS - 3]
        return self.packed[first : first + self.packed[_LISTS - 2]]

    def with_segments_of(self, length: int) -> Options:
        """The same call with segments of at least `length`; illegal ones stay."""
        count, packed = len(self.segments), list(self.packed)
        packed[_LISTS : _LISTS + count] = [w if w < 1 else max(w, length) for w in self.segments]
        return self._replace(packed=packed)

    def single_branch(self, segment: int, dilation: int, offsets: list[int]) -> Options:
        """The same call, layout "bshd", of one branch with these offsets per head."""
        _, backend, *_ = self.packed
        unset = [-1] * (len(_ROWS) - 2)
        _, *causal_and_heads = self.packed[len(_ROWS) : _LISTS - 3]  # without lse_grad
        head = [LAYOUTS.index("bshd"), backend, *unset, -1, *causal_and_heads]
        packed = [*head, 1, 1, len(offsets), segment, dilation, *offsets]
        return Options(self.scale, None, self.dropout_p, packed)


def text_of(tensor: Tensor) -> str:
    """Text that an operator returned as UTF-8."""
    return bytes(tensor.tolist()).decode()


def read_names() -> dict[str, tuple[str, ...]]:
    lines = text_of(_library.ops.names()).splitlines()
    return {words[0]: tuple(words[1:]) for words in map(str.split, lines)}


NAMES = read_names()

#: Presets that divide every branch by its sum over positions: composed in dilated.parity.
COLUMN_SUM_PRESETS = NAMES.pop("column_sums")
LAYOUTS = NAMES["layout"]

# Order of the packed integers, bindings/torch/arguments.h: names, 5 flags and heads, 3 lengths.
_ROWS = tuple(row for row in NAMES if row != "dtype")
_LISTS = len(_ROWS) + 8

DTYPES = tuple(getattr(torch, name) for name in NAMES["dtype"])


def _refuse(argument: str, expected: str, got: str, hint: str = "") -> InvalidProblem:
    return InvalidProblem(message(argument, expected, got, hint))


def _text(value: object) -> str:
    """A value in a message: tensors by their type, everything else as Python writes it."""
    return f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)


def integer(argument: str, value: Any, expected: str = "an integer") -> int:
    """A 64-bit integer of any kind but bool."""
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if isinstance(value, bool | str | Tensor):
        raise _refuse(argument, expected, _text(value))
    try:
        number = operator.index(value)
    except TypeError:
        raise _refuse(argument, expected, _text(value)) from None
    if not -(2**63) <= number < 2**63:
        raise _refuse(argument, f"{expected} of 64 bits", str(number))
    return number


def integers(argument: str, values: Any) -> list[int]:
    """Plain ints from any sequence of integers, numpy's included."""
    if isinstance(values, str | dict | set | frozenset) or not isinstance(values, Iterable):
        raise _refuse(argument, "a sequence of integers", repr(values))
    if isinstance(values, Tensor):
        hint = "lists of options are read while the call is prepared: call .tolist()"
        raise _refuse(argument, "a sequence of integers", "a Tensor", hint)
    listed = list(values)
    for i, value in enumerate(listed):
        if type(value) is not int or not -(2**63) <= value < 2**63:
            listed[i] = integer(f"{argument}[{i}]", value)
    return listed


def number(argument: str, value: Any, hint: str = "") -> float:
    """A real number of any kind but bool."""
    if isinstance(value, float | torch.SymFloat):
        return value  # type: ignore[return-value]
    if isinstance(value, bool | str | Tensor) or not isinstance(value, SupportsFloat):
        raise _refuse(argument, "a number", _text(value), hint)
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise _refuse(argument, "a number", _text(value), hint) from None


def flag(argument: str, value: Any) -> bool:
    """A bool, numpy's included."""
    if isinstance(value, bool):
        return value
    if type(value).__name__ in ("bool", "bool_") and type(value).__module__ == "numpy":
        return bool(value)
    raise _refuse(argument, "True or False", _text(value))


def index_of(argument: str, value: Any) -> int:
    """Index of an option's name, -1 for None."""
    if value is None:
        return -1
    names = NAMES[argument]
    if not isinstance(value, str):
        raise _refuse(argument, f"one of {', '.join(names)}", _text(value))
    if value not in names:
        raise _refuse(argument, f"one of {', '.join(names)}", value)
    return names.index(value)


def _table(offsets: Any, branches: int) -> list[int]:
    rows = offsets.tolist() if isinstance(offsets, Tensor) else offsets
    if not isinstance(rows, Iterable) or any(not isinstance(row, Iterable) for row in rows):
        expected = "a builder's name or a table (branches, heads)"
        raise _refuse("offsets", expected, _text(offsets))
    table = [integers(f"offsets[{b}]", row) for b, row in enumerate(rows)]
    if len(table) != branches or len({len(row) for row in table}) > 1:
        lengths = ", ".join(str(len(row)) for row in table)
        expected, got = f"a table of {branches} equal rows", f"rows of lengths [{lengths}]"
        raise _refuse("offsets", expected, got, "one row per branch, one entry per query head")
    return [entry for row in table for entry in row]


def _heads(argument: str, value: Any) -> int:
    if value is None:
        return -1
    heads = integer(argument, value)
    if heads < 1:
        raise _refuse(argument, ">= 1", str(heads))
    return heads


_SCALE_HINT = "a learnable scale goes into the query: query * scale, with scale=1.0"


def attention_options(
    *,
    segments: Any,
    dilations: Any,
    is_causal: Any = False,
    scale: Any = None,
    offsets: Any = None,
    groups: Any = None,
    merge: Any = None,
    out_scale: Any = None,
    lse_grad: Any = None,
    tail: Any = None,
    dropout_p: Any = 0.0,
    gqa_offset: Any = None,
    preset: Any = None,
    layout: Any = "bshd",
    backend: Any = None,
    head_offset: Any = 0,
    total_heads: Any = None,
    total_kv_heads: Any = None,
) -> Options:
    """Options of a call from what the user gave; the defaults of all public functions stand here.

    Raises:
        InvalidProblem: a value is of the wrong type, or a name that does not exist.
    """
    segments = integers("segments", segments)
    dilations = integers("dilations", dilations)
    named = offsets is None or isinstance(offsets, str)
    table = [] if named else _table(offsets, len(segments))
    if layout is None:
        raise _refuse("layout", f"one of {', '.join(LAYOUTS)}", "None")
    packed = [
        index_of("layout", layout),
        index_of("backend", backend),
        index_of("preset", preset),
        index_of("offsets", offsets) if named else -1,
        index_of("groups", groups),
        index_of("merge", merge),
        index_of("tail", tail),
        index_of("gqa_offset", gqa_offset),
        -1 if lse_grad is None else int(flag("lse_grad", lse_grad)),
        int(flag("is_causal", is_causal)),
        integer("head_offset", head_offset),
        _heads("total_heads", total_heads),
        _heads("total_kv_heads", total_kv_heads),
        len(segments),
        len(dilations),
        -1 if named else len(table),
        *segments,
        *dilations,
        *table,
    ]
    return Options(
        None if scale is None else number("scale", scale, _SCALE_HINT),
        None if out_scale is None else number("out_scale", out_scale),
        number("dropout_p", dropout_p),
        packed,
    )


#: Defaults of all options, by name.
OPTION_DEFAULTS: dict[str, Any] = attention_options.__kwdefaults__ or {}
