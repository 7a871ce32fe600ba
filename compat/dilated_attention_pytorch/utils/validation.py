"""Checks of the package as static methods. Each raises `InvalidProblem`, which is a ValueError.

The wording in brackets at the end of a message is what programs written for the package match.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from dilated.errors import InvalidProblem, message


def invalid(argument: str, expected: str, got: object, hint: str = "") -> InvalidProblem:
    """The error of an argument that breaks a rule, in the template of `dilated`."""
    return InvalidProblem(message(argument, expected, str(got), hint, "dilated_attention_pytorch"))


class ValidationMixin:
    """Static checks, for classes that inherit them.

    Raises:
        InvalidProblem: what is checked does not hold; the message names argument, rule and value.

    Example:
        >>> from dilated_attention_pytorch.utils.validation import ValidationMixin
        >>> ValidationMixin.validate_head_dim(768, 12)
        64
    """

    @staticmethod
    def validate_segment_dilation_match(
        segment_lengths: Sequence[int], dilation_rates: Sequence[int]
    ) -> None:
        """Neither is empty, and there is one dilation for every segment."""
        for name, values in (
            ("segment_lengths", segment_lengths),
            ("dilation_rates", dilation_rates),
        ):
            if len(values) == 0:
                raise invalid(name, "at least one", "none", f"{name} cannot be empty")
        if len(segment_lengths) != len(dilation_rates):
            raise invalid(
                "dilation_rates", f"{len(segment_lengths)} numbers, as in segment_lengths",
                len(dilation_rates), "both must have the same length",
            )  # fmt: skip

    @staticmethod
    def validate_positive_values(values: Sequence[int | float], name: str) -> None:
        """Every value is above 0."""
        for index, value in enumerate(values):
            if value <= 0:
                raise invalid(f"{name}[{index}]", "> 0", value, "it must be positive")

    @staticmethod
    def validate_tensor_shape(tensor: Tensor, expected_dims: int, name: str) -> None:
        """It is a tensor of `expected_dims` dimensions."""
        if not isinstance(tensor, Tensor):
            raise invalid(name, f"{expected_dims}D tensor", type(tensor).__name__)
        if tensor.dim() != expected_dims:
            raise invalid(name, f"{expected_dims}D tensor", f"shape {tuple(tensor.shape)}")

    @staticmethod
    def validate_tensor_shapes_match(
        tensors: Sequence[Tensor], names: Sequence[str], dims_to_check: Sequence[int] | None = None
    ) -> None:
        """All tensors have the sizes of the first one, in `dims_to_check` or everywhere."""
        for tensor, name in zip(tensors[1:], names[1:]):
            first, shape = tuple(tensors[0].shape), tuple(tensor.shape)
            if dims_to_check is None:
                if shape != first:
                    raise invalid(name, f"the shape of {names[0]}, {first}", shape,
                                   "Shape mismatch")  # fmt: skip
                continue
            for dim in dims_to_check:
                if shape[dim] != first[dim]:
                    raise invalid(name, f"the shape of {names[0]}, {first}", shape,
                                   f"Shape mismatch at dimension {dim}")  # fmt: skip

    @staticmethod
    def validate_sequence_length(seq_len: int, segment_lengths: Sequence[int]) -> None:
        """The longest segment divides the sequence. The operator itself takes any length."""
        if len(segment_lengths) == 0:
            raise invalid("segment_lengths", "at least one", "none",
                           "segment_lengths cannot be empty")  # fmt: skip
        longest = max(segment_lengths)
        if seq_len % longest != 0:
            raise invalid(
                "query", f"a multiple of {longest} positions", seq_len,
                "Sequence length must be divisible by the longest segment, or pass "
                "strict_lengths=False to the constructor: any length is then computed exactly",
            )  # fmt: skip

    @staticmethod
    def validate_device_dtype_consistency(tensors: Sequence[Tensor], names: Sequence[str]) -> None:
        """All tensors have device and dtype of the first one."""
        for tensor, name in zip(tensors[1:], names[1:]):
            for what in ("device", "dtype"):
                first, found = getattr(tensors[0], what), getattr(tensor, what)
                if found != first:
                    raise invalid(name, f"the {what} of {names[0]}, {first}", found)

    @staticmethod
    def validate_batch_first_format(tensor: Tensor, name: str, expected_dims: int = 4) -> None:
        """The tensor has `expected_dims` dimensions, the batch first."""
        if tensor.dim() != expected_dims:
            raise invalid(name, f"{expected_dims} dimensions, the batch first",
                           f"shape {tuple(tensor.shape)}")  # fmt: skip

    @staticmethod
    def validate_attention_mask(
        mask: Tensor | None, batch_size: int, seq_len: int, name: str = "attention_mask"
    ) -> None:
        """The mask is None, (n, n) or (batch, 1, n, n), and bool or a float of at most 32 bits.

        For code of your own: the modules of this package take no such mask.
        """
        if mask is None:
            return
        shapes = ((seq_len, seq_len), (batch_size, 1, seq_len, seq_len))
        if tuple(mask.shape) not in shapes:
            raise invalid(name, f"shape {shapes[0]} or {shapes[1]}", tuple(mask.shape))
        if mask.dtype not in (torch.bool, torch.float32, torch.float16, torch.bfloat16):
            raise invalid(name, "bool, float32, float16 or bfloat16", mask.dtype)

    @staticmethod
    def validate_dropout_prob(dropout: float, name: str = "dropout") -> None:
        """A probability."""
        if not 0.0 <= dropout <= 1.0:
            raise invalid(name, "a probability", dropout, "it must be between 0.0 and 1.0")

    @staticmethod
    def validate_head_dim(embed_dim: int, num_heads: int) -> int:
        """head_dim = embed_dim / num_heads; warns where another one would be faster."""
        if num_heads < 1 or embed_dim % num_heads != 0:
            raise invalid("num_heads", f"a divisor of embed_dim = {embed_dim}", num_heads,
                           "embed_dim must be divisible by num_heads")  # fmt: skip
        head_dim = embed_dim // num_heads
        if head_dim % 8 != 0:
            warnings.warn(
                f"head_dim = {head_dim} should be divisible by 8: kernels work in vectors",
                stacklevel=2,
            )
        if head_dim > 128:
            warnings.warn(
                f"head_dim = {head_dim} is above 128: kernels are tuned for less, take more heads",
                stacklevel=2,
            )
        return head_dim

    @staticmethod
    def validate_num_heads(num_heads: int, num_groups: int) -> None:
        """Every (segment, dilation) pair gets at least one head."""
        if num_heads < num_groups:
            raise invalid("num_heads", f">= {num_groups}, the number of segments", num_heads,
                           "every group needs a head")  # fmt: skip
