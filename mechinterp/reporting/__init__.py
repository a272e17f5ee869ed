"""Runs, figures and reports: a run folder in, one offline HTML file out."""

from mechinterp.reporting.cells import visible
from mechinterp.reporting.curves import curves
from mechinterp.reporting.figures import bars, heatmap, largest
from mechinterp.reporting.panels import small_multiples
from mechinterp.reporting.report import AttentionView, Prompt, Report, Section, Table, read, rebuild
from mechinterp.reporting.runs import Run

__all__ = [
    "AttentionView",
    "Prompt",
    "Report",
    "Run",
    "Section",
    "Table",
    "bars",
    "curves",
    "heatmap",
    "largest",
    "read",
    "rebuild",
    "small_multiples",
    "visible",
]
