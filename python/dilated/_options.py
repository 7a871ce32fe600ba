"""Options of a call: checked by type here, by rule in the core, packed for the operators.

PyTorch's cost of a call grows with its arguments, so that names, flags and lists travel in one list
of integers; bindings/torch/arguments.h describes it. The names and their order are the core's.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
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

    def digit(self, row: str) -> int:
        """What a name or a flag is packed as: 0 for "not given", else its index plus 1."""
        return (self.packed[0] >> (4 * _ROWS.index(row))) & 15

    def name(self, row: str) -> str | None:
        """The name given for layout, backend, preset, ..., gqa_offset."""
        digit = self.digit(row)
        return NAMES[row][digit - 1] if digit else None

    @property
    def layout(self) -> str:
        return LAYOUTS[self.digit("layout") - 1]

    @property
    def segments(self) -> list[int]:
        return self.packed[_LISTS : _LISTS + self.packed[1]]

    @property
    def dilations(self) -> list[int]:
        first = _LISTS + self.packed[1]
        return self.packed[first : first + self.packed[2]]

    @property
    def weights_have_gradients(self) -> bool:
        """Whether backward goes through the weights of the branches."""
        digit = self.digit("lse_grad")
        return digit == 2 or (digit == 0 and self.name("preset") != "torchscale")

    def without_causality(self) -> Options:
        """The same call, not causal."""
        shift = 4 * _ROWS.index("is_causal")
        names = (self.packed[0] & ~(15 << shift)) | (1 << shift)
        return self._replace(packed=[names, *self.packed[1:]])

    def known(self, known: Callable[[int], int | None]) -> Options:
        """The same call with 1 for segments and dilations, 0 for offsets that are not known."""
        entries = [known(entry) for entry in self.packed]
        table = _LISTS + len(self.segments) + len(self.dilations)
        packed = [
            (1 if i < table else 0) if entry is None else entry for i, entry in enumerate(entries)
        ]
        return self._replace(packed=packed)

    def with_segments_of(self, length: int) -> Options:
        """The same call with segments of at least `length`; illegal ones stay."""
        segments = [w if w < 1 else max(w, length) for w in self.segments]
        rest = self.packed[_LISTS + len(segments) :]
        return self._replace(packed=[*self.packed[:_LISTS], *segments, *rest])

    def single_branch(self, segment: int, dilation: int, offsets: list[int]) -> Options:
        """The same call, layout "bshd", of one branch with these offsets per head."""
        names = _names_of(
            layout=LAYOUTS.index("bshd") + 1,
            backend=self.digit("backend"),
            is_causal=self.digit("is_causal"),
        )
        heads = self.packed[4:_LISTS]
        packed = [names, 1, 1, len(offsets), *heads, segment, dilation, *offsets]
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

# The packed integers (bindings/torch/arguments.h): names and flags, 3 lengths, 3 numbers of heads,
# lists.
_ROWS = (*(row for row in NAMES if row != "dtype"), "lse_grad", "is_causal")
_LISTS = 7

DTYPES = tuple(getattr(torch, name) for name in NAMES["dtype"])


def _names_of(**digits: int) -> int:
    """Names and flags in one integer, four bits each."""
    return sum(digit << (4 * _ROWS.index(row)) for row, digit in digits.items())


def _refuse(argument: str, expected: str, got: str, hint: str = "") -> InvalidProblem:
    return InvalidProblem(message(argument, expected, got, hint))


def _text(value: object) -> str:
    """A value in a message: tensors by their type, everything else as Python writes it."""
    return f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)


def _has_64_bits(number: int) -> bool:
    """Compilers know no other integers, and maybe not the value."""
    return torch.compiler.is_compiling() or -(2**63) <= number < 2**63


def integer(argument: str, value: Any, expected: str = "an integer") -> int:
    """A 64-bit integer of any kind but bool."""
    if type(value) is int and _has_64_bits(value):
        return value
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if isinstance(value, bool | str | Tensor):
        raise _refuse(argument, expected, _text(value))
    if torch.compiler.is_compiling() and hasattr(value, "dtype"):
        tensor = torch.as_tensor(value)  # a NumPy number is a tensor to a compiler
        if tensor.is_floating_point() or tensor.dtype == torch.bool:
            raise _refuse(argument, expected, "another number")
        return int(tensor.item())
    try:
        number = operator.index(value)
    except TypeError:
        raise _refuse(argument, expected, _text(value)) from None
    if not _has_64_bits(number):
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
        if type(value) is not int or not _has_64_bits(value):
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


def digit_of(argument: str, value: Any) -> int:
    """Index of an option's name plus 1, 0 for None."""
    if value is None:
        return 0
    names = NAMES[argument]
    if not isinstance(value, str):
        raise _refuse(argument, f"one of {', '.join(names)}", _text(value))
    if value not in names:
        raise _refuse(argument, f"one of {', '.join(names)}", value)
    return names.index(value) + 1


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


def _pack(
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
    """attention_options, each time anew; the defaults of all public functions stand here."""
    segments = integers("segments", segments)
    dilations = integers("dilations", dilations)
    named = offsets is None or isinstance(offsets, str)
    table = [] if named else _table(offsets, len(segments))
    if layout is None:
        raise _refuse("layout", f"one of {', '.join(LAYOUTS)}", "None")
    names = _names_of(
        layout=digit_of("layout", layout),
        backend=digit_of("backend", backend),
        preset=digit_of("preset", preset),
        offsets=digit_of("offsets", offsets) if named else 0,
        groups=digit_of("groups", groups),
        merge=digit_of("merge", merge),
        tail=digit_of("tail", tail),
        gqa_offset=digit_of("gqa_offset", gqa_offset),
        lse_grad=0 if lse_grad is None else 1 + flag("lse_grad", lse_grad),
        is_causal=1 + flag("is_causal", is_causal),
    )
    packed = [
        names,
        len(segments),
        len(dilations),
        -1 if named else len(table),
        integer("head_offset", head_offset),
        _heads("total_heads", total_heads),
        _heads("total_kv_heads", total_kv_heads),
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
OPTION_DEFAULTS: dict[str, Any] = _pack.__kwdefaults__ or {}

# Checking and packing takes as long as the operator needs for a small problem.
_packed: dict[Any, Options] = {}
_MOST_PACKED = 256


def _key(segments: Any, dilations: Any, options: dict[str, Any]) -> Any:
    """A key of these values and their types: True is not 1. None for values without a hash."""
    try:
        values = (*segments, None, *dilations, None, *options.values())
        key = (values, tuple(map(type, values)), tuple(options))
        hash(key)
    except TypeError:  # tables, mistakes
        return None
    return key


def attention_options(*, segments: Any, dilations: Any, **options: Any) -> Options:
    """Options of a call from what the user gave.

    Raises:
        InvalidProblem: a value is of the wrong type, or a name that does not exist.
        TypeError: an option does not exist.
    """
    if not options.keys() <= OPTION_DEFAULTS.keys():
        unknown = ", ".join(sorted(options.keys() - OPTION_DEFAULTS.keys()))
        raise TypeError(f"dilated_attention: unexpected options {unknown}")
    key = None
    if not torch.compiler.is_compiling():
        key = _key(segments, dilations, options)
    known = None if key is None else _packed.get(key)
    if known is None:
        known = _pack(segments=segments, dilations=dilations, **options)
        if key is not None:
            if len(_packed) >= _MOST_PACKED:
                _packed.clear()
            _packed[key] = known
    return known
