"""Runs, figures and reports: a run folder in, one offline HTML file out."""

from mechinterp.reporting.figures import bars, heatmap, largest, small_multiples
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
    "heatmap",
    "largest",
    "read",
    "rebuild",
    "small_multiples",
]
