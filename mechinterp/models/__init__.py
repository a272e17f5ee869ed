"""Names, folders, files and modules -> a hooked model; embedded and planted models."""

from mechinterp.models.load import load, local_names

__all__ = ["load", "local_names"]
