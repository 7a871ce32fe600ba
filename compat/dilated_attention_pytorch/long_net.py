"""The package's LongNet: an encoder and a decoder over the same sequence.

The paper's model is a decoder: `dilated.models.LongNetLM`, which rotates queries and keys (xPos).
Here nothing but causality and segments tells positions apart: the package added rotated embeddings
to the embeddings, where a rotation does not become a relative position; that is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from .transformer import (
    Activation,
    DilatedTransformerDecoderLayer,
    DilatedTransformerEncoderLayer,
)
from .utils.validation import ValidationMixin

# Base model of arXiv 2307.02486, section 4.1.
SEGMENT_LENGTHS = (2048, 4096, 8192, 16384, 32768)
DILATION_RATES = (1, 2, 4, 6, 12)


class LongNet(nn.Module):
    """Encoder layers, then decoder layers whose memory is what the encoder returns.

    Args:
        d_model: width of the model.
        nhead: number of heads; divides d_model.
        num_encoder_layers: number of encoder layers, >= 1.
        num_decoder_layers: number of decoder layers, >= 1.
        dim_feedforward: inner width of the feed-forwards.
        segment_lengths: segment length of every group of heads.
        dilation_rates: dilation of every group of heads.
        dropout: of attention weights and of all blocks, in training.
        activation: "relu", "gelu" or a callable.
        layer_norm_eps: of all norms.
        device: of the parameters.
        dtype: of the parameters.
        strict_lengths: refuse lengths that the longest segment does not divide.

    Raises:
        InvalidProblem: a value breaks a rule.

    Example:
        >>> import torch
        >>> from dilated_attention_pytorch import LongNet
        >>> net = LongNet(64, 8, 1, 1, 128, segment_lengths=[16, 64], dilation_rates=[1, 4])
        >>> net(torch.randn(2, 128, 64)).shape
        torch.Size([2, 128, 64])
    """

    def __init__(
        self,
        d_model: int = 768,
        nhead: int = 12,
        num_encoder_layers: int = 12,
        num_decoder_layers: int = 12,
        dim_feedforward: int = 3072,
        segment_lengths: Sequence[int] = SEGMENT_LENGTHS,
        dilation_rates: Sequence[int] = DILATION_RATES,
        dropout: float = 0.0,
        activation: str | Activation = functional.relu,
        layer_norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        strict_lengths: bool = True,
    ) -> None:
        super().__init__()
        ValidationMixin.validate_positive_values([num_encoder_layers], "num_encoder_layers")
        ValidationMixin.validate_positive_values([num_decoder_layers], "num_decoder_layers")
        shared: dict[str, Any] = {
            "d_model": d_model, "nhead": nhead, "segment_lengths": segment_lengths,
            "dilation_rates": dilation_rates, "dim_feedforward": dim_feedforward,
            "dropout": dropout, "activation": activation, "layer_norm_eps": layer_norm_eps,
            "device": device, "dtype": dtype, "strict_lengths": strict_lengths,
        }  # fmt: skip
        # Gains of an encoder-decoder: MAGNETO (arXiv 2210.06423), figure 2.
        decoder_gain = log(3 * num_decoder_layers) ** 0.5
        encoder_gain = decoder_gain * (log(2 * num_encoder_layers) / 3) ** 0.5
        self.encoder = nn.TransformerEncoder(
            # Typed as torch's own layer; any module that is called like it does.
            DilatedTransformerEncoderLayer(**shared, gamma_init=encoder_gain),  # type: ignore[arg-type]
            num_encoder_layers,
            enable_nested_tensor=False,
        )
        self.decoder = nn.TransformerDecoder(
            DilatedTransformerDecoderLayer(**shared, gamma_init=decoder_gain),  # type: ignore[arg-type]
            num_decoder_layers,
        )

    def forward(self, x: Tensor, is_causal: bool = True) -> Tensor:
        """Encode x, then decode x with what that gave.

        Args:
            x: (batch, n, d_model).
            is_causal: a position sees no later one, in encoder, decoder and memory.

        Returns:
            Like x.

        Raises:
            InvalidProblem: a shape breaks a rule; with strict_lengths, the longest segment does
                not divide n.
        """
        memory = x
        for layer in self.encoder.layers:
            memory = layer(memory, is_causal=is_causal)
        for layer in self.decoder.layers:
            x = layer(x, memory, tgt_is_causal=is_causal, memory_is_causal=is_causal)
        return x


class LongNetLM(nn.Module):
    """:class:`LongNet` between a token embedding and logits.

    Args:
        num_tokens: size of the vocabulary.
        d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, segment_lengths,
            dilation_rates, dropout, activation, layer_norm_eps, device, dtype, strict_lengths:
            as in :class:`LongNet`.

    Raises:
        InvalidProblem: a value breaks a rule.

    Example:
        >>> import torch
        >>> from dilated_attention_pytorch import LongNetLM
        >>> model = LongNetLM(256, 64, 8, 1, 1, 128, segment_lengths=[16], dilation_rates=[1])
        >>> model(torch.zeros(2, 32, dtype=torch.int64)).shape
        torch.Size([2, 32, 256])
    """

    def __init__(
        self,
        num_tokens: int,
        d_model: int = 768,
        nhead: int = 12,
        num_encoder_layers: int = 12,
        num_decoder_layers: int = 12,
        dim_feedforward: int = 3072,
        segment_lengths: Sequence[int] = SEGMENT_LENGTHS,
        dilation_rates: Sequence[int] = DILATION_RATES,
        dropout: float = 0.0,
        activation: str | Activation = functional.relu,
        layer_norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        strict_lengths: bool = True,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.token_embedding = nn.Embedding(num_tokens, d_model, **place)
        self.long_net = LongNet(
            d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward,
            segment_lengths, dilation_rates, dropout, activation, layer_norm_eps,
            strict_lengths=strict_lengths, **place,
        )  # fmt: skip
        self.norm = nn.LayerNorm(d_model, layer_norm_eps, **place)
        self.out = nn.Linear(d_model, num_tokens, **place)

    def forward(self, x: Tensor, is_causal: bool = True) -> Tensor:
        """Logits.

        Args:
            x: tokens, integers (batch, n).
            is_causal: a position sees no later one.

        Returns:
            (batch, n, num_tokens).

        Raises:
            InvalidProblem: as :meth:`LongNet.forward`.
        """
        features = self.norm(self.long_net(self.token_embedding(x), is_causal=is_causal))
        return cast(Tensor, self.out(features))
