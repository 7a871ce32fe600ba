"""The report of a run: `report.html`, which opens without a network, and the same numbers as
JSON.
"""

from dilated.report.build import write_report
from dilated.report.errors import MissingPackage, need_matplotlib
from dilated.report.figures import pattern_picture

__all__ = ["MissingPackage", "need_matplotlib", "pattern_picture", "write_report"]
