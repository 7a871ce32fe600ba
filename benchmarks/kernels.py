"""torch's dense attention kernels with their log-sum-exp, which compositions merge by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

_ATEN = torch.ops.aten


class Kernel(Protocol):
    """softmax(q k^T) v over (batch, heads, rows, head_dim), at torch's scale."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(out, log-sum-exp (batch, heads, rows))."""
        ...

    def backward(
        self,
        grad: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        lse: Tensor,
        is_causal: bool,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients for `out` and `lse` as given, which may be those of more keys than these."""
        ...


class HostFlash:
    """What scaled_dot_product_attention runs on the CPU."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See Kernel."""
        out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu.default(
            q, k, v, 0.0, is_causal, attn_mask=bias
        )
        return out, lse

    def backward(
        self,
        grad: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        lse: Tensor,
        is_causal: bool,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Kernel."""
        grads: tuple[Tensor, Tensor, Tensor]
        grads = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default(
            grad, *inputs, out, lse, 0.0, is_causal, attn_mask=bias
        )
        return grads


@dataclass(frozen=True)
class CudaKernel:
    """The back end `name` ("cudnn" or "flash") of scaled_dot_product_attention on CUDA."""

    name: str

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See Kernel; without a bias."""
        _refuse_bias(bias)
        found: tuple[Any, ...]
        if self.name == "cudnn":
            found = _ATEN._scaled_dot_product_cudnn_attention.default(
                q, k, v, None, True, 0.0, is_causal
            )
            return found[0], found[1].squeeze(-1) if found[1].dim() == 4 else found[1]
        found = _ATEN._scaled_dot_product_flash_attention.default(q, k, v, 0.0, is_causal)
        return found[0], found[1]

    def backward(
        self,
        grad: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        lse: Tensor,
        is_causal: bool,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Kernel; without a bias."""
        _refuse_bias(bias)
        rows = inputs[0].shape[2], inputs[1].shape[2]
        state = torch.empty((), dtype=torch.int64, device=grad.device)  # of dropout, which is off
        grads: tuple[Tensor, Tensor, Tensor]
        if self.name == "cudnn":
            grads = _ATEN._scaled_dot_product_cudnn_attention_backward.default(
                grad, *inputs, out, lse.unsqueeze(-1), state, state, None, None, None, *rows,
                0.0, is_causal,
            )  # fmt: skip
        else:
            grads = _ATEN._scaled_dot_product_flash_attention_backward.default(
                grad, *inputs, out, lse, None, None, *rows, 0.0, is_causal, state, state
            )
        return grads


def _refuse_bias(bias: Tensor | None) -> None:
    if bias is not None:
        raise NotImplementedError("padded keys need a mask, which this kernel has not")


HOST = HostFlash()
CUDNN = CudaKernel("cudnn")
FLASH = CudaKernel("flash")
