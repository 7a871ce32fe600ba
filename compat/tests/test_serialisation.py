"""R9, R11, R12 for every public module: copies, pickles and state dicts train on bit for bit."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from restated import MODULES, inputs, output
from torch import Tensor, nn


def train(module: nn.Module, given: tuple[Tensor, ...]) -> list[Tensor]:
    """Output of three steps, with dropout."""
    torch.manual_seed(1)
    optimiser = torch.optim.SGD(module.parameters(), 0.1) if list(module.parameters()) else None
    outputs = []
    for _ in range(3):
        given = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in given)
        out = output(module, *given)
        if optimiser:
            optimiser.zero_grad()
        out.square().mean().backward()
        if optimiser:
            optimiser.step()
        outputs += [out.detach(), *(x.grad for x in given if x.grad is not None)]
    return outputs


def through_torch_save(module: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def by_state_dict(module: nn.Module, name: str) -> nn.Module:
    stream = io.BytesIO()
    torch.save(module.state_dict(), stream)
    stream.seek(0)
    fresh = MODULES[name]()
    fresh.load_state_dict(torch.load(stream, weights_only=True))
    return fresh


@pytest.mark.parametrize("name", MODULES)
def test_copies_train_as_the_original_does(name: str) -> None:
    module, given = MODULES[name](), inputs(name)
    output(module, *given)  # used once: the package's copies broke after use
    copies = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        through_torch_save(module),
        by_state_dict(module, name),
    ]
    expected = train(module, given)
    for twin in copies:
        for result, exact in zip(train(twin, given), expected, strict=True):
            assert torch.equal(result, exact)


@pytest.mark.parametrize("name", MODULES)
def test_forward_twice_is_the_same(name: str) -> None:
    module, given = MODULES[name]().eval(), inputs(name)
    assert torch.equal(output(module, *given), output(module, *given))


@pytest.mark.parametrize("name", MODULES)
def test_half_precision_models(name: str) -> None:
    module = MODULES[name]().to(torch.bfloat16).eval()
    given = tuple(x.bfloat16() if x.is_floating_point() else x for x in inputs(name))
    out = output(module, *given)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


def test_construction_changes_no_process_wide_state() -> None:
    """X12: the package set TF32 flags, seeds and the current device."""

    def state() -> tuple[object, ...]:
        return (
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
        )

    before = state()
    for make in MODULES.values():
        make()
    assert state() == before


def test_parameters_are_where_the_caller_says() -> None:
    """R11: no device and no dtype is chosen for the caller."""
    for name, make in MODULES.items():
        with torch.device("meta"):
            module = make()
        assert all(p.is_meta and p.dtype == torch.float32 for p in module.parameters()), name
