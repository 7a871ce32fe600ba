"""Models made of dilated attention, their layers and positions."""

from dilated.models.branches import Branches, choose_branches
from dilated.models.heat_map import heat_map, heat_map_figure
from dilated.models.layers import DecoderLayer, EncoderLayer
from dilated.models.longnet import LongNet, LongNetLM
from dilated.models.slide_encoder import SlideEncoder, slide_positions, slide_segments
from dilated.models.xpos import XposTables, apply_xpos, xpos_tables

__all__ = [
    "Branches",
    "DecoderLayer",
    "EncoderLayer",
    "LongNet",
    "LongNetLM",
    "SlideEncoder",
    "XposTables",
    "apply_xpos",
    "choose_branches",
    "heat_map",
    "heat_map_figure",
    "slide_positions",
    "slide_segments",
    "xpos_tables",
]
