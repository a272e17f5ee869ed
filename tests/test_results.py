"""Results on disk and in JSON: the same again, and never a NaN."""

import json

import numpy as np
import pytest
import xarray as xr

from mechinterp import UserError
from mechinterp.results import Result, plain, write_json


class Other(Result):
    pass


@pytest.fixture
def result():
    data = xr.Dataset(
        {
            "effect": (("layer", "role"), np.array([[0.5, np.nan], [-0.25, 1e-9]])),
            "passes": (("layer", "role"), np.array([[True, False], [False, False]])),
            "patched": (("layer", "role", "prompt"), np.arange(12.0).reshape(2, 2, 3)),
        },
        coords={"layer": [3, 7], "role": ["S1+1", "END"]},
    )
    return Result(data, {"model": "tiny", "threshold": 0.1, "positions": ["END"], "pairs": {"n": 3}, "nothing": None})


def test_what_is_saved_is_loaded(result, tmp_path):
    result.save(tmp_path / "one.safetensors")
    again = Result.load(tmp_path / "one.safetensors")
    assert list(again.to_frame().columns) == list(result.to_frame().columns)
    assert again.data.identical(result.data) and dict(again.about) == dict(result.about)
    assert all(again.data[name].dtype == result.data[name].dtype for name in result.data)
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]


def test_slices_and_transposes_are_saved_as_they_are(result, tmp_path):
    turned = Result(result.data.transpose("prompt", "role", "layer").isel(prompt=slice(None, None, -2)), result.about)
    turned.save(tmp_path / "two")
    assert Result.load(tmp_path / "two").data.identical(turned.data)


@pytest.mark.parametrize("keep", [0, 5, 300, -3])
def test_a_damaged_file_is_named(result, tmp_path, keep):
    path = tmp_path / "one.safetensors"
    result.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"cannot read a result from .*one.safetensors"):
        Result.load(path)


def test_another_kind_of_file(result, tmp_path):
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(2)}, tmp_path / "weights")
    with pytest.raises(UserError, match="holds no result, not a Result"):
        Result.load(tmp_path / "weights")
    result.save(tmp_path / "one")
    with pytest.raises(UserError, match="holds a Result, not a Other"):
        Other.load(tmp_path / "one")
    with pytest.raises(UserError, match="cannot read a result"):
        Result.load(tmp_path / "missing")


def test_a_row_is_a_cell(result):
    frame = result.to_frame()
    assert list(frame.columns) == ["layer", "role", "effect", "passes"] and len(frame) == 4
    assert frame.loc[(frame.layer == 7) & (frame.role == "S1+1"), "effect"].item() == -0.25


def test_plain_values_hold_no_nan(tmp_path):
    value = {
        "array": np.array([1.5, np.nan, np.inf]),
        "scalar": np.float64("nan"),
        "number": np.int64(3),
        "flag": np.bool_(True),
        "nested": [(float("nan"), {"deep": xr.DataArray([[np.nan, 2.0]])})],
        4: None,
        "text": "nan",
    }
    write_json(tmp_path / "v.json", value)
    text = (tmp_path / "v.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text) == {
        "array": [1.5, None, None],
        "scalar": None,
        "number": 3,
        "flag": True,
        "nested": [[None, {"deep": [[None, 2.0]]}]],
        "4": None,
        "text": "nan",
    }
    assert plain(float("-inf")) is None
    assert [path.name for path in tmp_path.iterdir()] == ["v.json"]
