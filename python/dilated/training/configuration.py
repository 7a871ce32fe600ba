"""What a run is: numbers and names only, so that it goes into checkpoints and reports as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from dilated.training.errors import TrainingError


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

    The defaults are `dilated demo`: what learns most in the five minutes of two CPU cores. There
    the number of steps decides: few layers, a narrow feed-forward, short dense segments, a high
    rate with a low beta1, embeddings scaled up.
    """

    input: str | None = None  # None: the Python standard library's own sources
    glob: str = "*"
    context: int = 16384
    batch_size: int = 1
    steps: int = 240
    learning_rate: float = 5e-3
    final_learning_rate: float = 5e-4
    warmup_steps: int = 48
    beta1: float = 0.8
    beta2: float = 0.95
    weight_decay: float = 0.05
    grad_clip: float = 1.0
    seed: int = 0
    checkpoint_every: int = 40
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        for name in ("context", "batch_size", "steps", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{flag(name)}: expected >= 1, got {getattr(self, name)}")
        for name in ("learning_rate", "grad_clip"):
            if not getattr(self, name) > 0:
                raise TrainingError(f"{flag(name)}: expected > 0, got {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`; tuples may come back as lists."""
        model = dict(values["model"])
        for name in ("segments", "dilations"):
            model[name] = tuple(model[name])
        return TrainConfig(**{**values, "model": ModelConfig(**model)})


def flag(name: str) -> str:
    """The command-line spelling of a setting."""
    return "--" + name.replace("_", "-")
