"""Models made of dilated attention: the paper's decoder `LongNetLM` and its positions."""

from dilated.models.longnet import LongNetLM
from dilated.models.xpos import XposTables, apply_xpos, xpos_tables

__all__ = ["LongNetLM", "XposTables", "apply_xpos", "xpos_tables"]
