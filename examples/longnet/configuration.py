"""What a run is: numbers and names only, so that it goes into checkpoints and reports as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import psutil
import torch

from dilated.models import LongNetLM
from errors import TrainingError

VOCABULARY = 256  # bytes


@dataclass(frozen=True)
class ModelConfig:
    """The arguments of `dilated.models.LongNetLM` for bytes."""

    embed_dim: int = 128
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int | None = None
    ffn_dim: int | None = 256
    segments: tuple[int, ...] = (512, 2048, 16384)
    dilations: tuple[int, ...] = (1, 2, 4)
    preset: str = "longnet"
    dropout: float = 0.0
    xpos_scale_base: float = 512.0
    scale_embedding: bool = True
    activation_checkpointing: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """One run: its corpus, model, optimiser and length. `context` bytes per window.

    The defaults are `make demo`: what learns most in the five minutes of two CPU cores. There the
    number of steps decides: few layers, a narrow feed-forward, short dense segments, a high rate
    with a low beta1, embeddings scaled up.
    """

    input: str | None = None  # None: the Python standard library's own sources
    glob: str | None = None  # of a folder; None: every file
    separate_documents: bool = False  # files see only themselves
    context: int = 16384
    batch_size: int = 1
    steps: int = 240
    learning_rate: float = 5e-3
    final_rate: float = 0.1  # times learning_rate, at the last step
    warmup_steps: int = 48
    beta1: float = 0.8
    beta2: float = 0.95
    weight_decay: float = 0.05
    grad_clip: float = 1.0
    seed: int = 0
    checkpoint_every: int = 40
    model: ModelConfig = field(default_factory=ModelConfig)

    def check(self) -> None:
        """Raises TrainingError for a setting that cannot work, InvalidProblem for the model's."""
        least = {"context": 1, "batch_size": 1, "steps": 1, "checkpoint_every": 1}
        for name, low in {**least, "warmup_steps": 0}.items():
            if getattr(self, name) < low:
                raise TrainingError(f"{flag(name)}: expected >= {low}, got {getattr(self, name)}")
        for name in ("learning_rate", "grad_clip"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise TrainingError(f"{flag(name)}: expected a finite number > 0, got {value}")
        check_seed(self.seed)
        self._check_memory()
        with torch.device("meta"):
            build_model(self)

    def _check_memory(self) -> None:
        """Sizes that cannot fit, before anything is allocated; the estimates are lower bounds."""
        model, memory = self.model, psutil.virtual_memory().total
        width, inner = model.embed_dim, model.ffn_dim or 4 * model.embed_dim
        layers = model.num_layers * (2 * width * width + 2 * width * inner)
        sizes = {  # weights, gradients and two moments; the residual stream and the logits
            "--embed-dim, --num-layers, --ffn-dim": 16 * (layers + 2 * VOCABULARY * width),
            "--context, --batch-size": 4 * self.batch_size * self.context * (width + VOCABULARY),
        }
        for flags, size in sizes.items():
            if size > memory:
                raise TrainingError(
                    f"{flags}: expected a run that fits into the {memory / 2**30:.0f} GiB of this "
                    f"machine, got one that needs {size / 2**30:.0f} GiB or more"
                )

    def to_json(self) -> str:
        """Plain text, whatever bytes a file name has."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> TrainConfig:
        """The inverse of `to_json`; ValueError, KeyError or TypeError if it is none."""
        values = json.loads(text)
        model = dict(values["model"])
        for name in ("segments", "dilations"):
            model[name] = tuple(model[name])
        return TrainConfig(**{**values, "model": ModelConfig(**model)})

    def with_options(self, given: dict[str, Any]) -> TrainConfig:
        """This configuration with other values, of the run and of its model, by their names."""
        own = {name: value for name, value in given.items() if name in asdict(self)}
        model = {name: value for name, value in given.items() if name in asdict(self.model)}
        return replace(self, **own, model=replace(self.model, **model))


def build_model(config: TrainConfig) -> LongNetLM:
    """The byte-level model of a configuration, with weights drawn from torch's random state."""
    arguments = asdict(config.model)
    sizes = (arguments.pop(name) for name in ("embed_dim", "num_layers", "num_heads"))
    return LongNetLM(VOCABULARY, *sizes, **arguments)


def check_seed(seed: int) -> None:
    """Raises TrainingError for what torch's generators do not take."""
    if not -(2**63) <= seed < 2**64:
        raise TrainingError(f"--seed: expected an integer of 64 bits, got {seed}")


def flag(name: str) -> str:
    """The command-line spelling of a setting."""
    return "--" + name.replace("_", "-")
