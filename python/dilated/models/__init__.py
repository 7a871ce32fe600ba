"""Models made of dilated attention: the paper's decoder `LongNetLM`, and a plain sampler for it."""

from dilated.models.generation import generate
from dilated.models.longnet import LongNetLM
from dilated.models.xpos import XposTables, apply_xpos, xpos_tables

__all__ = ["LongNetLM", "XposTables", "apply_xpos", "generate", "xpos_tables"]
