"""The base of every result: labelled arrays (xarray) in a frozen dataclass, with a table, a JSON form, and a file.

Arrays are saved as safetensors, labels and provenance as JSON in the same file's metadata. NaN (undefined) becomes
null in JSON.
"""

import html
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import xarray as xr
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mechinterp.errors import UserError
from mechinterp.files import replacing, write_text

R = TypeVar("R", bound="Result")


@dataclass(frozen=True, repr=False)
class Result:
    """Labelled arrays with what they were made from.

    Attributes:
        data: arrays with axis words as dimensions; those over `prompt` are kept, so every mean can be taken again.
        about: model, task, metric, direction, seed, …: plain JSON values.
    """

    data: xr.Dataset
    about: Mapping[str, Any]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; it appears whole or not at all."""
        arrays = {str(name): np.ascontiguousarray(array.values) for name, array in self.data.data_vars.items()}
        note = {
            "kind": type(self).__name__,
            "dims": {str(name): list(map(str, array.dims)) for name, array in self.data.data_vars.items()},
            "coords": {str(name): coord.values.tolist() for name, coord in self.data.coords.items()},
            "about": dict(self.about),
        }
        with replacing(path) as partial:
            save_file(arrays, partial, metadata={"mechinterp_result": json.dumps(plain(note), allow_nan=False)})

    @classmethod
    def load(cls: type[R], path: str | Path) -> R:
        """Read what `save` wrote. Raises UserError if the file is missing, damaged, or holds another kind of result."""
        try:
            with safe_open(path, framework="np") as file:
                note = json.loads((file.metadata() or {}).get("mechinterp_result", "null"))
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read a result from {path}: {error}") from error
        if note is None or note["kind"] != cls.__name__:
            found = "no result" if note is None else f"a {note['kind']}"
            raise UserError(f"{path} holds {found}, not a {cls.__name__}")
        variables = {name: (dims, arrays[name]) for name, dims in note["dims"].items()}  # in the order of saving
        return cls(xr.Dataset(variables, coords=note["coords"]), note["about"])

    def summary(self) -> str:
        """The finding in one line, with n and interval."""
        raise NotImplementedError

    def top(self, n: int = 10) -> pd.DataFrame:
        """The rows that a reader looks at first."""
        return self.to_frame().head(n)

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.summary())}</p>" + self.top(10).to_html(index=False, float_format="%.3f")

    def __repr__(self) -> str:
        return f"{self.summary()}\n{self.top(10).to_string(index=False, float_format='%.3f')}"

    def to_frame(self) -> pd.DataFrame:
        """One row a cell: labels, then every array without a `prompt` axis."""
        cells = self.data[[name for name, array in self.data.data_vars.items() if "prompt" not in array.dims]]
        return cells.to_dataframe().reset_index()


def plain(value: Any) -> Any:
    """Nested lists and plain numbers for JSON; what is not finite becomes None."""
    if isinstance(value, xr.DataArray):
        value = value.values
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON without NaN; the file appears whole or not at all."""
    write_text(path, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")
