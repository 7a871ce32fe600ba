"""Generated problems, their exact results, and the tolerance rule; shared by the tests."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import dilated

DATA = Path(__file__).resolve().parents[2] / "tests" / "data"
NAMES = ("out", "lse", "dquery", "dkey", "dvalue")


def _load_oracle() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ref_dilated", DATA / "ref_dilated.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = _load_oracle()


def golden_cases() -> list[dict[str, Any]]:
    return json.loads((DATA / "golden_dilated.json").read_text())


def oracle_offsets(
    heads: int,
    kv_heads: int,
    dilations: list[int],
    rule: Any = "paper",
    groups: str = "none",
    gqa_offset: str = "kv",
) -> list[list[int]]:
    """The offset table by the oracle's own builders (independent of the core)."""
    config = {"dilations": dilations, "offset": rule, "gqa_offset": gqa_offset}
    if not isinstance(rule, str):
        config["gqa_offset"] = "q"
    branches = len(dilations)
    members = {
        "none": [range(heads)] * branches,
        "cumulative": oracle.cumulative_groups(heads, branches),
        "literal": oracle.fkodom_groups(heads, branches),
    }[groups]
    repeats = max(1, heads // max(1, kv_heads))
    return [
        [
            oracle.head_offset(config, b, h, heads, repeats) if h in members[b] else -1
            for h in range(heads)
        ]
        for b in range(branches)
    ]


@dataclass
class Case:
    """One random problem: shapes, options as the public function takes them, and a seed for its
    data.
    """

    n: int = 19
    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 8
    segments: list[int] = field(default_factory=lambda: [4, 16])
    dilations: list[int] = field(default_factory=lambda: [1, 3])
    options: dict[str, Any] = field(default_factory=dict)
    masked: bool = False
    seed: int = 0

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """query, key, value, dout, dlse and key_mask; values are rounded to dtype once."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = {
            "query": (self.batch, self.n, self.heads, self.head_dim),
            "key": (self.batch, self.n, self.kv_heads, self.head_dim),
            "value": (self.batch, self.n, self.kv_heads, self.head_dim),
            "dout": (self.batch, self.n, self.heads, self.head_dim),
        }
        drawn = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for name, shape in shapes.items()
        }
        rows = (self.batch, self.heads, self.n)
        drawn["dlse"] = torch.randn(rows, generator=generator, dtype=torch.float64)
        drawn["key_mask"] = torch.rand((self.batch, self.n), generator=generator) > 0.3
        return drawn

    def reference_options(self) -> dict[str, Any]:
        """The same options for dilated.reference: builders resolved by the oracle."""
        rest = dict(self.options)
        table = oracle_offsets(
            self.heads,
            self.kv_heads,
            self.dilations,
            rest.pop("offsets", "paper"),
            rest.pop("groups", "none"),
            rest.pop("gqa_offset", "kv"),
        )
        return {"segments": self.segments, "dilations": self.dilations, "offsets": table, **rest}


def _with_gradients(
    function: Any, data: dict[str, Tensor], dtype: torch.dtype, with_dlse: bool
) -> dict[str, Tensor]:
    inputs = [data[name].to(dtype).requires_grad_() for name in ("query", "key", "value")]
    out, lse = function(*inputs)
    outputs, gradients = [out], [data["dout"].to(dtype)]
    if with_dlse:
        outputs.append(lse)
        gradients.append(data["dlse"].to(lse.dtype))
    found = torch.autograd.grad(outputs, inputs, gradients)
    return dict(zip(NAMES, (out.detach(), lse.detach(), *found), strict=True))


def run(
    case: Case, dtype: torch.dtype, with_dlse: bool = True, device: str = "cpu", **call: Any
) -> dict[str, Tensor]:
    """The operator's outputs and gradients, computed on `device`."""
    data = {name: tensor.to(device) for name, tensor in case.tensors(dtype).items()}
    mask = {"key_mask": data["key_mask"]} if case.masked else {}
    return _with_gradients(
        lambda q, k, v: dilated.dilated_attention(
            q, k, v, segments=case.segments, dilations=case.dilations, return_lse=True,
            **mask, **case.options, **call,
        ),
        data, dtype, with_dlse,
    )  # fmt: skip


def definition(
    case: Case, data_dtype: torch.dtype, dtype: torch.dtype, with_dlse: bool = True, **more: Any
) -> dict[str, Tensor]:
    """dilated.reference on inputs rounded to data_dtype, computed in dtype."""
    data = case.tensors(data_dtype)
    mask = {"key_mask": data["key_mask"]} if case.masked else {}
    options = {**case.reference_options(), **mask, **more}
    return _with_gradients(
        lambda q, k, v: dilated.reference.dilated_attention(q, k, v, **options),
        data, dtype, with_dlse,
    )  # fmt: skip


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; equal infinities do not differ, NaN differs from everything."""
    if actual.numel() == 0:
        return 0.0
    actual, exact = actual.double(), exact.double()
    difference = torch.where(actual == exact, 0.0, (actual - exact).abs())
    return float(difference.nan_to_num(nan=torch.inf).max())


def assert_close(actual: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float) -> None:
    for name in NAMES:
        assert actual[name].shape == exact[name].shape, name
        scale = exact[name].double().abs()
        scale = float(scale[scale.isfinite()].max()) if scale.isfinite().any() else 1.0
        found = error(actual[name], exact[name])
        assert found <= tolerance * max(1.0, scale), f"{name}: error {found}"


def assert_tolerance_rule(
    case: Case, dtype: torch.dtype, actual: dict[str, Tensor], with_dlse: bool = True
) -> None:
    """Semantics §11: error <= 2 x that of the plain definition in the same dtype, plus 1e-5."""
    exact = definition(case, dtype, torch.float64, with_dlse)
    plain = definition(case, dtype, dtype, with_dlse)
    for name in NAMES:
        assert actual[name].shape == exact[name].shape, name
        found = error(actual[name], exact[name])
        bound = 1e-3 if name == "lse" else 2.0 * error(plain[name], exact[name]) + 1e-5
        assert found <= bound, f"{name}: error {found} > {bound} for {case}"


def assert_backend_runs(backend: str, n: int, heads: int, **configuration: Any) -> None:
    """Prints the back end and its SIMD target; fails if another one would run."""
    text = dilated.plan(n, heads, backend=backend, **configuration).explain()
    print(text)
    assert f"{backend:<9} runs this" in text
