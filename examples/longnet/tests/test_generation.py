"""Sampling and evaluation take any causal module, and leave it as it was."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from configuration import ModelConfig, TrainConfig, build_model
from corpus import Corpus, read_corpus
from dilated import InvalidProblem
from errors import TrainingError
from evaluation import bits_by_context, held_out_windows
from generation import generate
from sampler import Batch
from training import loss_of

CONFIG = TrainConfig(
    context=64,
    model=ModelConfig(
        embed_dim=16, num_layers=2, num_heads=2, segments=(16, 64), dilations=(1, 2), dropout=0.3
    ),
)
PROMPT = torch.tensor([1, 2, 3])


class Fixed(nn.Module):
    """The same logits everywhere."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits.expand(*tokens.shape, -1)


class Wrapped(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flags(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_it_continues_and_repeats() -> None:
    model = build_model(CONFIG)
    draws = [list(generate(model, PROMPT, 12, window=8, generator=seeded())) for _ in range(2)]
    assert draws[0] == draws[1]
    assert len(draws[0]) == 12
    likeliest = model.eval()(PROMPT[None])[0, -1].argmax().item()
    assert list(generate(model, PROMPT, 1, temperature=0)) == [likeliest]


@pytest.fixture
def wrap(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    if request.param != "ddp":
        yield {
            "module": Wrapped,
            "data_parallel": nn.DataParallel,
            "compiled": lambda model: torch.compile(model, backend="eager"),
        }[request.param]
        return
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield nn.parallel.DistributedDataParallel
    dist.destroy_process_group()


@pytest.mark.parametrize("wrap", ["module", "data_parallel", "compiled", "ddp"], indirect=True)
def test_any_causal_module_will_do(wrap: Callable[[nn.Module], nn.Module], corpus: Corpus) -> None:
    model = build_model(CONFIG)
    wrapped = wrap(model)
    for own in (list(generate(m, PROMPT, 4, generator=seeded())) for m in (model, wrapped)):
        assert own == list(generate(model, PROMPT, 4, generator=seeded()))
    curves = [bits_by_context(m, corpus, longest=64, num_windows=2) for m in (model, wrapped)]
    assert curves[0].bits_per_byte == pytest.approx(curves[1].bits_per_byte, abs=1e-6)


@pytest.mark.parametrize("end", ["finished", "left", "failed"])
def test_every_training_flag_comes_back(end: str, corpus: Corpus) -> None:
    """A frozen part stays in eval mode, the rest in training mode."""
    model = build_model(CONFIG).train()
    model.layers[0].eval()
    before = flags(model)
    new = generate(model, PROMPT, 3)
    next(new)
    assert not any(flags(model))
    if end == "failed":
        with torch.no_grad():
            model.output_projection.weight.fill_(math.nan)
        with pytest.raises(InvalidProblem, match="expected logits, got nan or infinity"):
            list(new)
        with pytest.raises(TrainingError, match="expected finite bits per byte"):
            bits_by_context(model, corpus, longest=64, num_windows=2)
    elif end == "finished":
        list(new)
        bits_by_context(model, corpus, longest=64, num_windows=2)
    else:
        new.close()
    assert flags(model) == before


@settings(deadline=None)
@given(k=st.integers(1, 40), equal=st.integers(1, 20), seed=st.integers(0, 5))
def test_top_k_keeps_exactly_k(k: int, equal: int, seed: int) -> None:
    """Also where several tokens are equally likely."""
    logits = torch.zeros(20)
    logits[:equal] = 1.0
    drawn = set(
        generate(Fixed(logits), PROMPT, 200, top_k=k, temperature=5, generator=seeded(seed))
    )
    assert len(drawn) <= k
    if k <= 3:
        assert len(drawn) == k
    if k <= equal:
        assert max(drawn) < equal


@pytest.mark.parametrize("temperature", [0, 5e-324, 1e-45, 1e-30, 1e-7])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e30])
def test_tiny_temperatures_take_the_likeliest(temperature: float, size: float) -> None:
    """The one that temperature 0 takes, also of equally likely ones."""
    model = Fixed(size * torch.tensor([0.1, 0.9, 0.9, -1.0]))
    (likeliest,) = generate(model, PROMPT, 1, temperature=0)
    assert likeliest in (1, 2)
    assert set(generate(model, PROMPT, 20, temperature=temperature, generator=seeded())) == {
        likeliest
    }


def test_temperature_is_what_it_says() -> None:
    logits = torch.tensor([0.0, 1.0])
    drawn = list(generate(Fixed(logits), PROMPT, 2000, temperature=2.0, generator=seeded()))
    assert sum(drawn) / 2000 == pytest.approx(1 / (1 + math.exp(-0.5)), abs=0.04)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_probability_is_refused(bad: float) -> None:
    for temperature in (0.0, 1.0):
        with pytest.raises(InvalidProblem, match=r"^generate: model: expected logits, got nan or"):
            list(generate(Fixed(torch.tensor([0.0, bad])), PROMPT, 1, temperature=temperature))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"prompt": PROMPT[:0]}, "prompt: expected shape (n,) with n >= 1, got (0,)"),
        ({"prompt": PROMPT[None]}, "prompt: expected shape (n,) with n >= 1, got (1, 3)"),
        ({"num_tokens": -1}, "num_tokens: expected >= 0, got -1"),
        ({"window": 0}, "window: expected >= 1, got 0"),
        ({"temperature": -1}, "temperature: expected a finite number >= 0, got -1"),
        ({"temperature": math.nan}, "temperature: expected a finite number >= 0, got nan"),
        ({"top_k": 0}, "top_k: expected >= 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused_at_once(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidProblem) as caught:
        generate(**{"model": Fixed(torch.zeros(2)), "prompt": PROMPT, "num_tokens": 1, **options})
    assert str(caught.value) == f"generate: {text}"


# --- evaluation ---------------------------------------------------------------------------------


def test_same_bytes_are_scored_at_every_context(tmp_path: Path) -> None:
    """A model that ignores its context gives the same bits at every length."""
    path = tmp_path / "text"
    path.write_bytes(os.urandom(20000))
    corpus = read_corpus(path, context=1024)
    curve = bits_by_context(Fixed(torch.zeros(256)), corpus, longest=1024, num_windows=3)
    assert curve.contexts == (256, 512, 1024)
    assert curve.bits_per_byte == pytest.approx((8.0, 8.0, 8.0))
    assert curve.scored_bytes == 256
    windows = held_out_windows(corpus, 1024, 3)
    assert windows.shape == (3, 1025)
    assert len({bytes(window[-256:].tolist()) for window in windows}) == 3


@pytest.mark.parametrize("context", [1, 64])
def test_evaluation_equals_the_loss(corpus: Corpus, context: int) -> None:
    """With one window as long as the scored part, bits are the training loss of that window."""
    model = build_model(CONFIG).eval()
    curve = bits_by_context(model, corpus, longest=context, num_windows=1)
    window = held_out_windows(corpus, context, 1).long()
    with torch.no_grad():
        nats = loss_of(model, Batch(window[:, :-1], window[:, 1:])).item()
    assert curve.contexts == (context,)
    assert curve.bits_per_byte[0] == pytest.approx(nats / math.log(2), abs=1e-6)
