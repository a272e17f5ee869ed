"""Sections of a report, one file an analysis: a result in, figures, tables and words out."""
