"""SlideEncoder: tile features and coordinates of a slide in, one embedding out.

    x = [cls_token, patch_embed(tiles) + position(coords)]      embedding = norm(LongNet(x))[cls]

The model of Prov-GigaPath (Nature 2024, doi 10.1038/s41586-024-07441-w) and GigaPath-Flash, with
their parameter names and numbers, so that their weights load with `load_state_dict`.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from dilated._inputs import lengths, require_parameter_dtype
from dilated.errors import InvalidProblem, message
from dilated.models.longnet import LongNet

if TYPE_CHECKING:
    from dilated._options import Lengths

_OP = "SlideEncoder"
_COORDS = (
    torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.int64,
    torch.float32, torch.float64,
)  # fmt: skip


def slide_segments(max_wsi_size: int = 262144, tile_size: int = 256) -> list[int]:
    """GigaPath's five segment lengths: from 1024 to the tiles of the largest slide, geometrically.

    Args:
        max_wsi_size: side of the largest slide, in pixels.
        tile_size: side of a tile, in pixels.

    Returns:
        Five lengths, rounded down; the last is a power of two.

    Raises:
        InvalidProblem: the slide is smaller than a tile.

    Example:
        >>> from dilated.models import slide_segments
        >>> slide_segments()
        [1024, 5792, 32768, 185363, 1048576]
    """
    if not 1 <= tile_size <= max_wsi_size:
        expected, got = f"1 <= tile_size <= max_wsi_size = {max_wsi_size}", str(tile_size)
        raise InvalidProblem(message("tile_size", expected, got, op="slide_segments"))
    tiles = (max_wsi_size // tile_size) ** 2
    last = tiles.bit_length() - 1  # floor(log2)
    return [int(2.0 ** (10 + i * (last - 10) / 4)) for i in range(5)]


def slide_positions(cells: Tensor, grid_size: int, embed_dim: int) -> Tensor:
    """Sine and cosine positions of cells of a grid: half of the channels for each axis.

    The second axis comes first. Only the values of one axis are computed, and gathered: the table
    of all cells, which for 1000 x 1000 of them takes 3 GB, is never made. They are float64 rounded
    to float32, as in that table.

    Args:
        cells: int64 (..., 2), from 0 to grid_size - 1.
        grid_size: cells along each axis.
        embed_dim: channels, a multiple of 4.

    Returns:
        float32 (..., embed_dim).

    Raises:
        InvalidProblem: embed_dim is no multiple of 4.

    Example:
        >>> import torch
        >>> from dilated.models import slide_positions
        >>> slide_positions(torch.tensor([[3, 0]]), 10, 8)[0, :4]  # the second axis: sin 0, cos 0
        tensor([0., 0., 1., 1.])
    """
    if embed_dim % 4:
        expected = "a multiple of 4 (sine and cosine of two axes)"
        raise InvalidProblem(message("embed_dim", expected, str(embed_dim), op="slide_positions"))
    count = embed_dim // 4
    frequency = torch.arange(count, dtype=torch.float64, device=cells.device) / count
    place = torch.arange(grid_size, dtype=torch.float64, device=cells.device)
    angle = place[:, None] * (1.0 / 10000.0**frequency)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1).float()
    return torch.cat([axis[cells[..., 1]], axis[cells[..., 0]]], dim=-1)


class _Slides(NamedTuple):
    """Slides that are encoded together: (slides, tiles, ...), the mask may be None."""

    tiles: Tensor
    coords: Tensor
    key_mask: Tensor | None

    def each(self, change: Callable[[Tensor], Tensor]) -> _Slides:
        """The same change to all of them."""
        mask = None if self.key_mask is None else change(self.key_mask)
        return _Slides(change(self.tiles), change(self.coords), mask)


class SlideEncoder(nn.Module):
    """LongNet over the tiles of a slide, with a class token; the defaults are Prov-GigaPath's.

    Slides of unequal size (`seqused`, or packed with `cu_seqlens`) are encoded one after the other:
    each has the bits it has alone, padding costs nothing, and memory is that of the largest slide.
    Matrix products of all slides at once would round differently from those of one.

    Args:
        in_chans: channels of a tile's features.
        embed_dim: width of the model, a multiple of 4 and of num_heads.
        depth: number of layers.
        num_heads: heads of each layer.
        segments: segment length of every branch, in positions; None: `slide_segments(max_wsi_size,
            tile_size)`.
        dilations: dilation of every branch.
        ffn_dim: inner width of the feed-forward; default 4 * embed_dim.
        slide_ngrids: tiles along each side of the largest slide: what coordinates may be.
        tile_size: side of a tile, in the unit of coordinates.
        max_wsi_size: side of the slide for which segments are chosen.
        global_pool: embed a slide by the mean of its tiles rather than by the class token.
        dropout: on embeddings and on both residual branches of every layer, in training.
        drop_path_rate: as `drop_path` of `LongNet`.
        attention_dropout: on attention probabilities, in training.
        activation_checkpointing: recompute each layer in backward (`torch.utils.checkpoint`).
        **attention_options: options of `LongNet`, row_shift among them, but not is_causal and
            xpos_scale_base. preset is "torchscale".

    Raises:
        InvalidProblem: a size does not fit another one, or an option is unknown or breaks a rule.
        Unsupported: no back end can run this.

    Example:
        >>> import torch
        >>> from dilated.models import SlideEncoder
        >>> encoder = SlideEncoder(in_chans=24, embed_dim=32, depth=2, num_heads=4).eval()
        >>> x, coords = torch.randn(1, 50, 24), 256 * torch.randint(1000, (1, 50, 2))
        >>> [embedding] = encoder(x, coords)
        >>> embedding.shape
        torch.Size([1, 32])
        >>> len(encoder(x, coords, all_layer_embed=True))
        3
    """

    def __init__(
        self,
        in_chans: int = 1536,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 16,
        *,
        segments: Sequence[int] | None = None,
        dilations: Sequence[int] = (1, 2, 4, 8, 16),
        ffn_dim: int | None = None,
        slide_ngrids: int = 1000,
        tile_size: int = 256,
        max_wsi_size: int = 262144,
        global_pool: bool = False,
        dropout: float = 0.25,
        drop_path_rate: float = 0.1,
        attention_dropout: float = 0.0,
        activation_checkpointing: bool = False,
        **attention_options: Any,
    ) -> None:
        super().__init__()
        sizes = {"in_chans": in_chans, "slide_ngrids": slide_ngrids, "tile_size": tile_size}
        for name, size in sizes.items():
            if size < 1:
                raise InvalidProblem(message(name, ">= 1", str(size), op=_OP))
        if embed_dim % 4:
            hint = "positions are sine and cosine of two axes"
            raise InvalidProblem(
                message("embed_dim", "a multiple of 4", str(embed_dim), hint, op=_OP)
            )
        for name in {"is_causal", "xpos_scale_base"} & attention_options.keys():
            hint = "tiles have places, not an order, and the class token comes first"
            got = str(attention_options[name])
            raise InvalidProblem(message(name, "no such option", got, hint, op=_OP))
        self.in_chans, self.embed_dim = in_chans, embed_dim
        self.slide_ngrids, self.tile_size = slide_ngrids, tile_size
        self.global_pool = global_pool
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Linear(in_chans, embed_dim)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.encoder = LongNet(
            embed_dim,
            depth,
            num_heads,
            segments=slide_segments(max_wsi_size, tile_size) if segments is None else segments,
            dilations=dilations,
            ffn_dim=ffn_dim,
            dropout=dropout,
            attention_dropout=attention_dropout,
            drop_path=drop_path_rate,
            activation_checkpointing=activation_checkpointing,
            **{"preset": "torchscale", **attention_options},
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """GigaPath's start: Xavier-uniform weights, zero biases, cls_token of deviation 0.02."""
        if self.cls_token.is_meta:  # as in LongNet
            return
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.cls_token, std=0.02)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], **options: Any) -> SlideEncoder:
        """A model of the sizes that published weights have, with these weights.

        Nothing but one copy of the weights is made: no random start, no table.

        Args:
            state_dict: tensors by name; of a published file, what is under its key "model". It
                decides in_chans, embed_dim, depth, ffn_dim, dtype and device.
            **options: other arguments of the constructor. num_heads cannot be seen in weights: it
                is 16 in all published models.

        Returns:
            The model, in training mode as every new module.

        Raises:
            InvalidProblem: the weights that say the sizes are missing.
            RuntimeError: a name or a shape does not fit, as in `load_state_dict`.

        Example:
            >>> from dilated.models import SlideEncoder
            >>> weights = SlideEncoder(24, 32, 2, 4).state_dict()
            >>> SlideEncoder.from_state_dict(weights, num_heads=4).embed_dim
            32
        """
        needed = ("patch_embed.proj.weight", "encoder.layers.0.ffn.fc1.weight")
        for name in needed:
            if name not in state_dict:
                given = ", ".join(list(state_dict)[:3]) or "none"
                hint = "a published file holds the weights under its key 'model'"
                raise InvalidProblem(
                    message("state_dict", name, f"names {given}", hint, op=f"{_OP}.from_state_dict")
                )
        projection, widening = (state_dict[name] for name in needed)
        layers = [n.split(".")[2] for n in state_dict if n.startswith("encoder.layers.")]
        depth = 1 + max(int(number) for number in layers if number.isdigit())
        with torch.device("meta"):
            model = cls(
                in_chans=projection.shape[1],
                embed_dim=projection.shape[0],
                depth=depth,
                ffn_dim=widening.shape[0],
                **options,
            )
        # Assigned, not filled in: torch's to_empty from meta would import much, and set globals.
        device, dtype = projection.device, projection.dtype
        copies = {name: w.detach().to(device, dtype, copy=True) for name, w in state_dict.items()}
        model.load_state_dict(copies, assign=True)
        return model

    def forward(
        self,
        x: Tensor,
        coords: Tensor,
        all_layer_embed: bool = False,
        *,
        key_mask: Tensor | None = None,
        seqused: Lengths | None = None,
        cu_seqlens: Lengths | None = None,
    ) -> list[Tensor]:
        """Embeddings of slides.

        Args:
            x: features (slides, tiles, in_chans), packed (total, in_chans).
            coords: pixels (slides, tiles, 2), packed (total, 2): integers, float32 or float64, from
                0, below slide_ngrids * tile_size.
            all_layer_embed: also embed what enters the first layer and what leaves each one.
            key_mask: bool (slides, tiles), packed (total,): False leaves a tile out, whatever it
                holds, but not its place: segments follow the padded slide. For slides of unequal
                size give seqused.
            seqused: number of tiles of every slide; what follows them is padding, whatever it
                holds.
            cu_seqlens: starts of packed slides in x and their end, 0, ..., total.

        Returns:
            A list with one tensor (slides, embed_dim), or depth + 1 of them with all_layer_embed:
            the embeddings, as upstream computes them, of the layers' inputs and the last output.

        Raises:
            InvalidProblem: a shape, a dtype, a length or a coordinate breaks a rule.

        Example:
            >>> import torch
            >>> from dilated.models import SlideEncoder
            >>> encoder = SlideEncoder(24, 32, 2, 4).eval()
            >>> x, coords = torch.randn(50, 24), 256 * torch.randint(1000, (50, 2))
            >>> [embeddings] = encoder(x, coords, cu_seqlens=[0, 20, 50])
            >>> [first] = encoder(x[None, :20], coords[None, :20])
            >>> torch.equal(embeddings[:1], first)
            True
        """
        self._check(x, coords, key_mask, packed=cu_seqlens is not None)
        slides = _Slides(x, coords, key_mask)
        parts = list(_apart(slides, seqused, cu_seqlens))
        if not parts:
            parts = [_Slides(x.new_empty(0, 0, self.in_chans), coords.new_empty(0, 0, 2), None)]
        found = [self._encode(part, all_layer_embed) for part in parts]
        return [torch.cat(layer) for layer in zip(*found, strict=True)]

    def _check(self, x: Tensor, coords: Tensor, key_mask: Tensor | None, packed: bool) -> None:
        given = {"x": x, "coords": coords, "key_mask": key_mask}
        for name, tensor in given.items():
            if not isinstance(tensor, Tensor) and (tensor is not None or name != "key_mask"):
                got = type(tensor).__name__
                raise InvalidProblem(message(name, "a tensor", got, op=_OP))
        form = "(total, {}) with cu_seqlens" if packed else "(slides, tiles, {})"
        if x.dim() != (2 if packed else 3) or x.shape[-1] != self.in_chans:
            expected, got = form.format(self.in_chans), f"shape {tuple(x.shape)}"
            raise InvalidProblem(message("x", expected, got, op=_OP))
        require_parameter_dtype("x", x, self.cls_token, _OP)
        if coords.shape != (*x.shape[:-1], 2):
            got = f"shape {tuple(coords.shape)}"
            raise InvalidProblem(
                message("coords", f"shape {(*x.shape[:-1], 2)}, as x", got, op=_OP)
            )
        if coords.dtype not in _COORDS:
            expected, hint = "integers, float32 or float64", "other floats round pixels"
            raise InvalidProblem(message("coords", expected, str(coords.dtype), hint, op=_OP))
        if key_mask is not None and (
            key_mask.shape != x.shape[:-1] or key_mask.dtype != torch.bool
        ):
            expected = f"bool of shape {tuple(x.shape[:-1])}"
            got = f"{key_mask.dtype} of shape {tuple(key_mask.shape)}"
            raise InvalidProblem(message("key_mask", expected, got, op=_OP))

    def _cells(self, coords: Tensor) -> Tensor:
        """int64 cells of the grid of tiles, like coords."""
        # int64 is divided as it is: as a float it would have the default dtype.
        places = coords if coords.is_floating_point() else coords.long()
        cells = torch.div(places, self.tile_size, rounding_mode="floor")
        inside = ((cells >= 0) & (cells < self.slide_ngrids)).all(-1)
        end = self.slide_ngrids * self.tile_size
        expected = f"0 <= coords < slide_ngrids * tile_size = {end}"
        hint = "pixels of the level that was tiled; a larger slide needs a larger slide_ngrids"
        if torch.compiler.is_compiling():
            text = message("coords", expected, "others", hint, op=_OP)
            torch._assert_async(inside.all(), text)
        elif not inside.is_meta and not bool(inside.all()):
            slide, tile = (~inside).nonzero()[0].tolist()
            got = f"{coords[slide, tile].tolist()} at tile {tile}"
            raise InvalidProblem(message("coords", expected, got, hint, op=_OP))
        return cells.long()

    def _encode(self, slides: _Slides, all_layer_embed: bool) -> list[Tensor]:
        """Slides of one size: embeddings (slides, embed_dim) of the layers that are asked for."""
        x, coords, mask = slides
        if mask is not None:  # what is masked may be any number
            x = x.masked_fill(~mask[..., None], 0.0)
            coords = coords.masked_fill(~mask[..., None], 0)
        place = slide_positions(self._cells(coords), self.slide_ngrids, self.embed_dim)
        x = self.patch_embed(x) + place.to(self.cls_token.dtype)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        with_cls = None if mask is None else nn.functional.pad(mask, (1, 0), value=True)
        found: list[Tensor] = []
        last = self.encoder(
            x,
            key_mask=with_cls,
            watch=(lambda state: found.append(self._embed(state, mask)))
            if all_layer_embed
            else None,
        )
        return found if all_layer_embed else [self._embed(last, mask)]

    def _embed(self, state: Tensor, mask: Tensor | None) -> Tensor:
        """(slides, 1 + tiles, embed_dim) -> (slides, embed_dim)."""
        if not self.global_pool:
            return cast(Tensor, self.norm(state[:, 0]))
        tiles = state[:, 1:]
        if mask is None:
            return cast(Tensor, self.norm(tiles.sum(1) / max(1, tiles.shape[1])))
        count = mask.sum(1, keepdim=True).clamp(min=1)
        return cast(Tensor, self.norm(tiles.masked_fill(~mask[..., None], 0.0).sum(1) / count))


def _apart(
    slides: _Slides, seqused: Lengths | None, cu_seqlens: Lengths | None
) -> Iterator[_Slides]:
    """Slides that may be encoded together: all at once, or each alone and without its padding."""
    tiles = slides.tiles
    if seqused is None and cu_seqlens is None:
        yield slides
        return
    if cu_seqlens is None:
        flat = slides.each(lambda part: part.flatten(0, 1))
        size, count = tiles.shape[1], tiles.shape[0]
        starts, ends = [[size * (i + k) for i in range(count)] for k in (0, 1)]
    else:
        flat, bounds = slides, _host("cu_seqlens", cu_seqlens)
        ordered = all(a <= b for a, b in itertools.pairwise(bounds))
        if not bounds or bounds[0] != 0 or bounds[-1] != tiles.shape[0] or not ordered:
            expected = f"0, ..., {tiles.shape[0]}, ascending"
            raise InvalidProblem(message("cu_seqlens", expected, str(bounds), op=_OP))
        starts, ends = bounds[:-1], bounds[1:]
    if seqused is not None:
        used = _host("seqused", seqused)
        whole = [end - start for start, end in zip(starts, ends, strict=True)]
        if len(used) != len(whole) or any(not 0 <= n <= w for n, w in zip(used, whole)):
            expected = f"{len(whole)} lengths, each at most its slide's"
            raise InvalidProblem(message("seqused", expected, str(used), op=_OP))
        ends = [start + n for start, n in zip(starts, used, strict=True)]
    for start, end in zip(starts, ends, strict=True):
        yield flat.each(lambda part: part[None, start:end])


def _host(name: str, values: Lengths) -> list[int]:
    found = lengths(name, values, torch.device("cpu"))
    assert found is not None
    if found.dim() != 1:
        got = f"shape {tuple(found.shape)}"
        raise InvalidProblem(message(name, "one dimension", got, op=_OP))
    return [int(n) for n in found.tolist()]
