"""Training a byte-level LongNetLM: corpus, sampler, checkpoints, the loop, held-out evaluation.

read_corpus -> WindowSampler -> train (checkpoints, resume) -> bits_by_context -> dilated.report
"""

from dilated.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from dilated.training.configuration import ModelConfig, TrainConfig
from dilated.training.corpus import Corpus, read_corpus, standard_library
from dilated.training.errors import TrainingError
from dilated.training.evaluation import ContextCurve, bits_by_context
from dilated.training.loop import TrainResult, build_model, train
from dilated.training.sampler import WindowSampler

__all__ = [
    "ContextCurve",
    "Corpus",
    "ModelConfig",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "WindowSampler",
    "bits_by_context",
    "build_model",
    "latest_checkpoint",
    "load_checkpoint",
    "read_corpus",
    "save_checkpoint",
    "standard_library",
    "train",
]
