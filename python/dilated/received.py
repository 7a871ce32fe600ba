"""How much attention each position receives: attention maps in memory that grows with n, not n^2.

    O(p) = sum_j A(p, j) v_j        received(j) = sum_p c_p A(p, j)

Weights A are never formed. dV_j = sum_p A(p, j) dO_p: with dO_p = c_p in one channel, that channel
of one backward pass is the answer, for every option of the operator.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._options import COLUMN_SUM_PRESETS, integers
from ._torch_masks import refuse
from .errors import InvalidProblem, message
from .functional import dilated_attention, observers

if TYPE_CHECKING:
    from ._options import Integers

_OP = "attention_received"


@contextmanager
def attention_received(layer: nn.Module, queries: Integers | None = None) -> Iterator[list[Tensor]]:
    """Record, while `layer` runs, the attention that each position receives from some queries.

    `layer` is any module that attends through this package: an attention module, a layer, a model,
    torchscale's after `dilated.compat.torchscale.convert`. Every call of the operator within it
    adds one tensor to the list. Each is computed from the call's queries and keys by one forward
    and one backward pass, in float32 (float64 for float64), without dropout, and has no gradient.
    Other threads' calls are not recorded, nor what activation checkpointing repeats in backward.
    Nothing is seen of layers that torch.compile compiles:
    `torch.compiler.set_stance("force_eager")` lets them run without.

    Args:
        layer: the module to watch.
        queries: positions of the queries, in each sequence, whose mean is taken: [0] is a class
            token in front. None: all of a sequence's queries.

    Yields:
        A list that fills with tensors (batch, heads, seqlen), packed (heads, total). Every head's
        weights sum to 1, except where queries see no key, with another merge than "lse" or an
        out_scale, and with preset "torchscale" without its phantom keys, which keep their part.

    Raises:
        InvalidProblem: the layer is no module, or a query is not in every sequence.
        Unsupported: preset "fkodom", whose output is not a weighted mean of values; windows, as
            with a cache of keys; a layer inside a transform of torch.func; another request of the
            operator.

    Example:
        >>> import torch, dilated
        >>> layer = dilated.MultiheadDilatedAttention(64, 4, [16, 64], [1, 4])
        >>> with dilated.attention_received(layer, queries=[0]) as received:
        ...     out, _ = layer(torch.randn(2, 100, 64))
        >>> [weights] = received
        >>> weights.shape, torch.allclose(weights.sum(-1), torch.ones(2, 4))
        (torch.Size([2, 4, 100]), True)
    """
    if not isinstance(layer, nn.Module):
        raise InvalidProblem(message("layer", "a module", type(layer).__name__, op=_OP))
    positions = None if queries is None else integers("queries", queries)
    if positions is not None and (not positions or min(positions) < 0):
        expected = "positions >= 0, at least one, or None for all"
        raise InvalidProblem(message("queries", expected, str(positions), op=_OP))
    received: list[Tensor] = []

    def observe(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> None:
        received.append(_received(query, key, value, options, positions))

    def start(*_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if torch._C._current_graph_task_id() == -1:  # else backward recomputes the layer
            observers.append((threading.get_ident(), observe))

    def stop(*_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        entry = threading.get_ident(), observe
        if entry in observers:
            observers.remove(entry)

    hooks = [
        layer.register_forward_pre_hook(start),
        layer.register_forward_hook(stop, always_call=True),
    ]
    try:
        yield received
    finally:
        for hook in hooks:
            hook.remove()
        # Torch calls no hook after what is no Exception, such as KeyboardInterrupt.
        for entry in [entry for entry in observers if entry[1] is observe]:
            observers.remove(entry)


@contextmanager
def _apart_from_the_model(device: torch.device) -> Iterator[None]:
    """A graph of its own, whatever the model runs in."""

    def same(x: Tensor) -> Tensor:
        return x

    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        # Checkpointing counts what a layer saves.
        torch.autograd.graph.saved_tensors_hooks(same, same),
    ):
        yield


def _plain(x: Any) -> Any:
    """A tensor without history that a graph may save."""
    if not isinstance(x, Tensor):
        return x
    return x.clone() if x.is_inference() else x.detach()


def _received(
    query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any], positions: list[int] | None
) -> Tensor:
    if options.get("preset") in COLUMN_SUM_PRESETS:
        hint = "it divides outputs by their sums over positions"
        refuse("preset", "one whose output is a weighted sum of values", "'fkodom'", hint, _OP)
    if torch._C._are_functorch_transforms_active():
        hint = "watch a call outside of vmap, grad and vjp"
        refuse("layer", "a call without transforms", "one inside torch.func", hint, _OP)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    layout = options.get("layout", "bshd")
    heads_dim = 1 if layout in ("bhsd", "shd") else 2
    heads, kv_heads = query.shape[heads_dim], key.shape[heads_dim]
    repeats = heads // kv_heads if kv_heads else 0
    channels = value.shape[-1]
    share = _shares(query, options, layout, positions)  # (batch, seqlen), packed (total,)
    with _apart_from_the_model(query.device):
        probe = torch.zeros(value.shape, dtype=dtype, device=value.device, requires_grad=True)
        call = {name: _plain(option) for name, option in options.items()}
        out: Tensor = dilated_attention(
            _plain(query).to(dtype), _plain(key).to(dtype), probe, **{**call, "dropout_p": 0.0}
        )
        # Query heads that share a kv head take a channel each.
        parts = []
        for first in range(0, repeats, max(1, channels)):
            count = min(channels, repeats - first)
            dout = torch.zeros_like(out)
            for head in range(heads):
                if first <= head % repeats < first + count:
                    dout.select(heads_dim, head).select(-1, head % repeats - first).copy_(share)
            [dvalue] = torch.autograd.grad(out, probe, dout, retain_graph=True)
            parts.append(dvalue[..., :count])
    if not parts:
        return out.new_zeros(*_by_head(out, layout).shape[:-1])
    # (batch, seqlen, kv_heads, repeats) -> (batch, heads, seqlen)
    weights = _by_head(torch.cat(parts, -1), layout).transpose(-1, -2)
    return weights.flatten(-3, -2).contiguous()


def _by_head(x: Tensor, layout: str) -> Tensor:
    """(batch, heads, seqlen, ...), packed (heads, total, ...)."""
    return x if layout == "bhsd" else x.transpose(-3, -2)


def _shares(
    query: Tensor, options: dict[str, Any], layout: str, positions: list[int] | None
) -> Tensor:
    """c_p of every row: 1 / count at the chosen queries."""
    if layout == "shd":
        bounds = torch.as_tensor(options["cu_seqlens"], device="cpu").tolist()
        share = query.new_zeros(query.shape[0], dtype=torch.float64)
        rows = [share[start:end] for start, end in itertools.pairwise(bounds)]
    else:
        n = query.shape[2 if layout == "bhsd" else 1]
        share = query.new_zeros(query.shape[0], n, dtype=torch.float64)
        rows = list(share)
    used = options.get("seqused")
    lengths = [len(row) for row in rows] if used is None else torch.as_tensor(used).tolist()
    for row, length in zip(rows, lengths, strict=True):
        if positions is None:
            row[:length] = 1.0 / max(1, length)
            continue
        if max(positions) >= length:
            expected = f"below the length of every sequence, {length}"
            raise InvalidProblem(message("queries", expected, str(max(positions)), op=_OP))
        for position in positions:
            row[position] += 1.0 / len(positions)
    return share
