"""torchscale's DilatedAttention on this package's operator: its models, GigaPath's and LongViT's.

    dilated.compat.torchscale.convert(model)                  a model that is built already
    dilated.compat.torchscale.install("torchscale")           models that will be built

Numbers are upstream's (preset "torchscale": zero keys fill the last segment, merge weights are
constants in backward), without flash-attn, on any device and dtype of the operator. Different, on
purpose: `key_padding_mask` acts; there is no dropout in eval mode; cached decoding is exact.
Source: https://github.com/microsoft/torchscale, torchscale/component/dilated_attention.py.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from dilated import _ops
from dilated._inputs import require_parameter_dtype, require_tensor, require_tensors
from dilated._options import attention_options, flag, integers
from dilated._torch_masks import key_mask_of, refuse, require_causal_mask
from dilated.compat.torchscale_parts import Multiway, Xpos
from dilated.errors import InvalidProblem, Unsupported, message
from dilated.functional import dilated_attention
from dilated.windows import window_attention

_OP = "compat.torchscale"
_ARGUMENTS = (
    "flash_attention", "segment_length", "dilated_ratio", "seq_parallel",
    "multiway", "layernorm_eps", "xpos_rel_pos", "xpos_scale_base",
)  # fmt: skip
# What upstream's object holds, by which it is recognised.
_ATTRIBUTES = (
    "args", "embed_dim", "num_heads", "head_dim", "dropout",
    "q_proj", "k_proj", "v_proj", "out_proj", "inner_attn_ln", "xpos",
)  # fmt: skip
_Model = TypeVar("_Model", bound=nn.Module)


def _argument(args: Any, name: str) -> Any:
    if not hasattr(args, name):
        expected = f"the attributes {', '.join(_ARGUMENTS)}"
        raise InvalidProblem(message("args", expected, f"an object without {name}", op=_OP))
    return getattr(args, name)


def _list(args: Any, name: str) -> list[int]:
    """A list of integers, or its text, as command lines and configurations give it."""
    given = _argument(args, name)
    if isinstance(given, str):
        try:
            values = ast.literal_eval(given)
        except (SyntaxError, ValueError):
            hint = f"for example '[{1024 if name == 'segment_length' else 1}]'"
            expected = "a list of integers, or its text"
            raise InvalidProblem(
                message(f"args.{name}", expected, repr(given), hint, op=_OP)
            ) from None
        given = values if isinstance(values, list | tuple) else [values]
    return integers(f"args.{name}", given)


def _branches(args: Any) -> tuple[list[int], list[int]]:
    """Segments and dilations; what is left over of the longer list has no partner and is unused."""
    pairs = list(zip(_list(args, "segment_length"), _list(args, "dilated_ratio")))
    segments, dilations = [w for w, _ in pairs], [r for _, r in pairs]
    _ops.ask(_ops.ops.check_options, *attention_options(segments=segments, dilations=dilations))
    return segments, dilations


class DilatedAttention(nn.Module):
    """torchscale's module of that name: same arguments, parameters, state dict and numbers.

    Args:
        args: any object with the attributes flash_attention, segment_length, dilated_ratio,
            seq_parallel, multiway, layernorm_eps, xpos_rel_pos and xpos_scale_base. Lists may be
            tuples or text, too, of any integers; they are read now, not at every call.
            flash_attention has no effect: no other kernel is needed.
        embed_dim: width of the model, a multiple of num_heads.
        num_heads: number of heads.
        dropout: probability of dropping an attention weight, in training.
        self_attention, encoder_decoder_attention: exactly one is True.
        subln: LayerNorm before the output projection (of self-attention only).

    Raises:
        InvalidProblem: an argument is missing or breaks a rule.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from dilated.compat.torchscale import DilatedAttention
        >>> args = SimpleNamespace(
        ...     flash_attention=True, segment_length="[8, 16]", dilated_ratio=[1, 2],
        ...     seq_parallel=False, multiway=False, layernorm_eps=1e-5, xpos_rel_pos=False,
        ...     xpos_scale_base=512,
        ... )
        >>> attention = DilatedAttention(args, 32, 4, self_attention=True, subln=True)
        >>> x = torch.randn(2, 50, 32)
        >>> attention(x, x, x)[0].shape
        torch.Size([2, 50, 32])
    """

    # `convert` makes objects of this class without its constructor.
    row_shift: bool | None
    dropout_in_eval: bool

    def __init__(
        self,
        args: Any,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        self_attention: bool = False,
        encoder_decoder_attention: bool = False,
        subln: bool = False,
    ) -> None:
        super().__init__()
        if bool(self_attention) == bool(encoder_decoder_attention):
            got = f"both {bool(self_attention)}"
            expected = "exactly one of it and encoder_decoder_attention"
            raise InvalidProblem(message("self_attention", expected, got, op=_OP))
        if num_heads < 1 or embed_dim % num_heads:
            expected = f"a divisor of embed_dim = {embed_dim}"
            raise InvalidProblem(message("num_heads", expected, str(num_heads), op=_OP))
        for name in _ARGUMENTS:
            _argument(args, name)
        self.args = args
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = dropout
        self.self_attention = self_attention
        self.encoder_decoder_attention = encoder_decoder_attention
        wrap = Multiway if args.multiway else lambda module: module
        # In upstream's order: the same seed draws the same weights.
        self.k_proj = wrap(nn.Linear(embed_dim, embed_dim))
        self.v_proj = wrap(nn.Linear(embed_dim, embed_dim))
        self.q_proj = wrap(nn.Linear(embed_dim, embed_dim))
        self.out_proj = wrap(nn.Linear(embed_dim, embed_dim))
        has_norm = subln and self_attention
        norm = wrap(nn.LayerNorm(embed_dim, eps=args.layernorm_eps)) if has_norm else None
        self.inner_attn_ln = norm
        has_xpos = args.xpos_rel_pos and self_attention
        self.xpos = Xpos(self.head_dim, args.xpos_scale_base) if has_xpos else None
        self._read_options(None, False)

    def _read_options(self, row_shift: bool | None, dropout_in_eval: bool) -> None:
        self.segments, self.dilations = _branches(self.args)
        self.row_shift = None if row_shift is None else flag("row_shift", row_shift)
        self.dropout_in_eval = flag("dropout_in_eval", dropout_in_eval)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also takes what upstream's class pickled, before `install` put this one in its place."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "segments" not in state:
            self._read_options(None, False)

    def reset_parameters(self) -> None:
        """Upstream's start: Xavier-uniform weights, those of q, k and v scaled by 1 / sqrt(2)."""
        for projection in (self.k_proj, self.v_proj, self.q_proj):
            nn.init.xavier_uniform_(cast(Tensor, projection.weight), gain=2**-0.5)
        nn.init.xavier_uniform_(cast(Tensor, self.out_proj.weight))
        nn.init.zeros_(cast(Tensor, self.out_proj.bias))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        incremental_state: dict[str, Tensor] | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        rel_pos: Tensor | None = None,
        is_first_step: bool = False,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Project, attend, project.

        Args:
            query: (batch, seqlen, embed_dim).
            key: like query.
            value: like query.
            incremental_state: holds "prev_key" and "prev_value" (batch, heads, positions,
                head_dim), to which this call's are added; {} begins. The queries are then the last
                rows of the longer sequence: outputs are those of a call with all rows.
            key_padding_mask: bool (batch, keys), True = the key is ignored. Padding at the end
                shortens the sequence: it gives what it has alone, and 0 for the padding.
            attn_mask: None, or the causal mask, as upstream's decoder hands it on.
            rel_pos: must be None.
            is_first_step: has no effect: what the cache holds says it.
            is_causal: a query sees only keys at or before its own position.

        Returns:
            (output, None).

        Raises:
            InvalidProblem: a shape or a dtype does not fit.
            Unsupported: a request that cannot be honoured: rel_pos, another attn_mask, keys of
                another length, several ranks, or rows that upstream shifts where nobody said
                whether to shift them.
        """
        if rel_pos is not None:
            refuse("rel_pos", "None", "a tensor", "use xPos: args.xpos_rel_pos", op=_OP)
        self._refuse_ranks()
        require_tensors(query, key, value)
        if query.dim() != 3 or query.shape[2] != self.embed_dim:
            expected = f"(batch, seqlen, {self.embed_dim})"
            raise InvalidProblem(message("query", expected, f"shape {tuple(query.shape)}", op=_OP))
        for name, given in (("key", key), ("value", value)):
            if given.shape != query.shape:
                hint = "segments of two lengths do not correspond"
                refuse(
                    name, f"shape {tuple(query.shape)}", f"shape {tuple(given.shape)}", hint, _OP
                )
        q, k, v = self._project(query, key, value)
        cache: dict[str, Tensor] = {}
        if incremental_state is not None:
            k, v, cache = _append(incremental_state, k, v)
        if attn_mask is not None:
            require_causal_mask(attn_mask, k.shape[1])
            is_causal = True
        if self.xpos is not None:
            k = self._turn(k, 0, downscale=True)
            q = self._turn(q, k.shape[1] - q.shape[1], downscale=False)
        out = self._attend(q, k, v, key_padding_mask, bool(is_causal)).flatten(-2)
        if self.inner_attn_ln is not None:
            out = self.inner_attn_ln(out)
        out = self.out_proj(out)
        if incremental_state is not None:  # not before the call has succeeded: it may be repeated
            incremental_state.update(cache)
        return out, None

    def _refuse_ranks(self) -> None:
        if not _argument(self.args, "seq_parallel"):
            return
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        ranks = torch.distributed.get_world_size() if distributed else 1
        if ranks > 1:
            hint = "one sequence over several ranks is not implemented yet"
            refuse("args.seq_parallel", "False with several ranks", f"True with {ranks}", hint, _OP)

    def _project(self, *inputs: Tensor) -> list[Tensor]:
        """(batch, seqlen, heads, head_dim) of query, key and value."""
        outs = []
        for name, projection, x in zip(
            ("query", "key", "value"), (self.q_proj, self.k_proj, self.v_proj), inputs, strict=True
        ):
            weight = next(projection.parameters(), None)  # quantised ones have none
            if weight is not None:
                require_parameter_dtype(name, x, weight, _OP)
            outs.append(projection(x).unflatten(-1, (self.num_heads, self.head_dim)))
        return outs

    def _turn(self, x: Tensor, offset: int, downscale: bool) -> Tensor:
        """xPos, which takes (batch * heads, seqlen, head_dim)."""
        assert self.xpos is not None
        rows = x.transpose(1, 2).flatten(0, 1)
        turned = self.xpos(rows, offset=offset, downscale=downscale)
        return cast(Tensor, turned.unflatten(0, (x.shape[0], -1)).transpose(1, 2))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, is_causal: bool
    ) -> Tensor:
        seqlen = key.shape[1]
        call: dict[str, Any] = {
            "segments": self.segments,
            "dilations": self.dilations,
            "is_causal": is_causal,
            "dropout_p": self.dropout if self.training or self.dropout_in_eval else 0.0,
            **self._definition(seqlen),
            **_sequences(padding, key.shape[:2]),
        }
        if query.shape[1] == seqlen:
            return cast(Tensor, dilated_attention(query, key, value, **call))
        if call.pop("row_shift", False):
            hint = "a cache holds rows before they are shifted; decode without one"
            refuse("incremental_state", "None with row_shift", "a cache", hint, _OP)
        first = seqlen - query.shape[1]
        out, _ = window_attention(query, key, value, seqlen=seqlen, query_start=first, **call)
        return out.to(query.dtype)

    def _definition(self, seqlen: int) -> dict[str, Any]:
        """Options that are upstream's, shifted or not."""
        shifted = [
            f"segment {w} with ratio {r}"
            for w, r in zip(self.segments, self.dilations)
            if r > 0 and w % r and seqlen > w
        ]
        if not shifted:
            return {"preset": "torchscale"}
        if self.row_shift is None:
            hint = (
                "upstream shifts the rows of later segments there: "
                "convert(model, row_shift=True) computes that, for weights trained so; "
                "row_shift=False computes every row in its place"
            )
            expected = "ratios that divide their segments in sequences longer than these"
            got = f"{', '.join(shifted)} at {seqlen} positions"
            refuse("args.dilated_ratio", expected, got, hint, _OP)
        if self.row_shift:
            return {"preset": "torchscale", "row_shift": True}
        return {"offsets": "torchscale", "tail": "phantom", "lse_grad": False}

    def extra_repr(self) -> str:
        """What the operator computes."""
        given: dict[str, Any] = {"segments": self.segments, "dilations": self.dilations}
        if self.row_shift is not None:
            given["row_shift"] = self.row_shift
        if self.dropout_in_eval:
            given["dropout_in_eval"] = True
        return ", ".join(f"{name}={value!r}" for name, value in given.items())


def _append(
    state: dict[str, Tensor], key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(batch, positions, heads, head_dim) of all keys and values so far, and the state to come."""
    cache = {}
    for name, new in (("prev_key", key), ("prev_value", value)):
        rows = new.transpose(1, 2)
        if name in state:
            cached = state[name]
            if cached.shape[:2] != rows.shape[:2] or cached.shape[3:] != rows.shape[3:]:
                batch, heads, _, head_dim = rows.shape
                expected = f"shape ({batch}, {heads}, positions, {head_dim})"
                argument, got = f"incremental_state[{name!r}]", f"shape {tuple(cached.shape)}"
                raise InvalidProblem(message(argument, expected, got, op=_OP))
            rows = torch.cat([cached, rows], dim=2)
        cache[name] = rows
    return cache["prev_key"].transpose(1, 2), cache["prev_value"].transpose(1, 2), cache


def _sequences(padding: Tensor | None, shape: Sequence[int]) -> dict[str, Tensor]:
    """Lengths, for padding at the end, and a mask, for padding elsewhere."""
    if padding is None:
        return {}
    require_tensor("key_padding_mask", padding)
    if tuple(padding.shape) != tuple(shape):
        got = f"shape {tuple(padding.shape)}"
        raise InvalidProblem(message("key_padding_mask", f"shape {tuple(shape)}", got, op=_OP))
    kept = key_mask_of(padding)
    positions = torch.arange(1, shape[1] + 1, device=padding.device)
    # The sum with no rows is 0, where a maximum would be an error.
    used = (kept * positions).cummax(1).values[:, -1:].sum(1) if shape[1] else kept.sum(1)
    inside = positions <= used[:, None]
    known = not torch.compiler.is_compiling() and padding.device.type == "cpu"
    if known and bool(kept.all()):
        return {}
    if known and bool(torch.equal(kept, inside)):
        return {"seqused": used}
    return {"seqused": used, "key_mask": kept}


def _looks_like_upstream(module: nn.Module) -> bool:
    named = any(cls.__name__ == "DilatedAttention" for cls in type(module).__mro__)
    return named and all(hasattr(module, name) for name in _ATTRIBUTES)


def convert(
    model: _Model, *, row_shift: bool | None = None, dropout_in_eval: bool = False
) -> _Model:
    """Let every DilatedAttention of torchscale, or of a copy of it, run on this operator.

    In place: the modules stay the same objects with their parameters, hooks and state-dict names;
    their class becomes :class:`DilatedAttention`. Nothing is imported from torchscale. Converting
    again changes the switches.

    Args:
        model: any module that contains such modules, or is one.
        row_shift: where a ratio does not divide its segment, upstream shifts the rows of the
            segments after the first. True computes that, as weights that were trained so need (by
            single branches: slower); False computes every row in its place; None raises
            Unsupported where the two differ.
        dropout_in_eval: also drop attention weights in eval mode, as upstream does.

    Returns:
        model.

    Raises:
        InvalidProblem: the model has no such module, or one's arguments break a rule. The model is
            then as it was.
        Unsupported: such a module was wrapped or changed, so that a new class would not act.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from dilated.compat import torchscale
        >>> args = SimpleNamespace(
        ...     flash_attention=True, segment_length=[8, 16], dilated_ratio=[1, 2],
        ...     seq_parallel=False, multiway=False, layernorm_eps=1e-5, xpos_rel_pos=False,
        ...     xpos_scale_base=512,
        ... )
        >>> layer = torchscale.DilatedAttention(args, 32, 4, self_attention=True)
        >>> torchscale.convert(layer, row_shift=True)
        DilatedAttention(
          segments=[8, 16], dilations=[1, 2], row_shift=True
          (k_proj): Linear(in_features=32, out_features=32, bias=True)
          (v_proj): Linear(in_features=32, out_features=32, bias=True)
          (q_proj): Linear(in_features=32, out_features=32, bias=True)
          (out_proj): Linear(in_features=32, out_features=32, bias=True)
        )
    """
    if not isinstance(model, nn.Module):
        got = type(model).__name__
        raise InvalidProblem(message("model", "a module", got, op=f"{_OP}.convert"))
    found = [
        (name, module) for name, module in model.named_modules() if _looks_like_upstream(module)
    ]
    if not found:
        expected = "a model with modules of torchscale's class DilatedAttention"
        raise InvalidProblem(message("model", expected, type(model).__name__, op=f"{_OP}.convert"))
    for name, module in found:
        _check_convertible(f"model.{name}" if name else "model", module)
    flag("row_shift", row_shift if row_shift is not None else False)
    flag("dropout_in_eval", dropout_in_eval)
    for _, module in found:
        module.__class__ = DilatedAttention
        cast(DilatedAttention, module)._read_options(row_shift, dropout_in_eval)
    return model


def _check_convertible(name: str, module: nn.Module) -> None:
    changed = None
    if type(module).__name__ != "DilatedAttention":
        changed = f"{type(module).__name__}, a class derived from it"
    elif "forward" in vars(module):
        changed = "an object with a forward of its own"
    if changed:
        hint = "convert the model before it is wrapped or patched"
        raise Unsupported(
            message(name, "an unchanged DilatedAttention", changed, hint, op=f"{_OP}.convert")
        )
    args = cast(Any, module).args
    for argument in _ARGUMENTS:
        _argument(args, argument)
    _branches(args)


# What upstream's constructor takes, by which its class is told from others of that name.
_CONSTRUCTOR = list(inspect.signature(DilatedAttention).parameters)


def _is_upstream_class(value: object) -> bool:
    # Its real type: some modules hold proxies whose __class__ warns.
    if not issubclass(type(value), type) or cast(type, value).__name__ != "DilatedAttention":
        return False
    return list(inspect.signature(cast(type, value)).parameters) == _CONSTRUCTOR


def install(package: str | ModuleType = "torchscale") -> list[str]:
    """Let models that are built from now on have :class:`DilatedAttention` in place of upstream's.

    Args:
        package: the package whose class is replaced, or its name: torchscale, or a copy of it such
            as "gigapath.torchscale". Its modules that use the class must have been imported.

    Returns:
        What now names this class: "module.attribute", sorted: all attributes of the package that
        named upstream's, and "DilatedAttention" of other modules that imported it.

    Raises:
        InvalidProblem: no imported module of the package has upstream's class.

    Example:
        >>> from dilated.compat import torchscale
        >>> import torchscale.model.LongNet        # doctest: +SKIP
        >>> torchscale.install()                   # doctest: +SKIP
    """
    if not isinstance(package, str | ModuleType):
        got = type(package).__name__
        raise InvalidProblem(message("package", "a package or its name", got, op=f"{_OP}.install"))
    prefix = package if isinstance(package, str) else package.__name__
    places = [
        (name, attribute, value)
        for name, module in list(sys.modules.items())
        if isinstance(module, ModuleType) and module is not sys.modules[__name__]
        for attribute, value in list(vars(module).items())
        if _is_upstream_class(value)
    ]
    within = [place for place in places if f"{place[0]}.".startswith(f"{prefix}.")]
    if not within:
        expected = "a package whose imported modules have torchscale's class DilatedAttention"
        hint = "import the modules that build the model first"
        raise InvalidProblem(message("package", expected, repr(prefix), hint, op=f"{_OP}.install"))
    replaced = {value for _, _, value in within}
    others = [p for p in places if p[1] == "DilatedAttention" and p[2] in replaced]
    named = {(name, attribute) for name, attribute, _ in within + others}
    for name, attribute in named:
        setattr(sys.modules[name], attribute, DilatedAttention)
    return sorted(f"{name}.{attribute}" for name, attribute in named)
