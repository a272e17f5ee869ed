import numpy as np
import pytest

from mechinterp.errors import UserError
from mechinterp.reporting import bars, curves, heatmap, small_multiples

GRID = np.array([[0.5, np.nan, -0.2], [0.0, 0.1, 0.3]])


def test_small_multiples_share_one_scale_and_one_colour_bar():
    panels = {name: heatmap(GRID * k, "abc", "xy") for name, k in (("one", 1), ("two", -3), ("three", 2))}
    joint = small_multiples(panels, columns=2)
    effects = [trace for trace in joint.data if trace.meta["kind"] == "effect"]
    assert {trace.zmax for trace in effects} == {1.5}
    assert sum(trace.showscale for trace in effects) == 1
    assert [trace.meta["title"] for trace in effects] == ["one", "two", "three"]
    assert len({trace.xaxis for trace in effects}) == 3
    assert panels["one"].data[0].zmax == 0.5  # the originals are untouched


def test_small_multiples_refuses_what_it_cannot_lay_out():
    with pytest.raises(UserError, match="no figure"):
        small_multiples({})
    grid = heatmap(GRID, "abc", "xy")
    for other in (bars(["a"], [1.0]), curves([0, 1], {"a": [1.0, 2.0]})):
        with pytest.raises(UserError, match="takes heatmaps; 'b' holds none"):
            small_multiples({"a": grid, "b": other})
    with pytest.raises(UserError, match="one colour scale"):
        small_multiples({"a": grid, "b": heatmap(np.abs(GRID), "abc", "xy", scale="sequential")})
    for changed in ({"value": "score"}, {"more": {"rank": GRID}}):
        with pytest.raises(UserError, match="one table"):
            small_multiples({"a": grid, "b": heatmap(GRID, "abc", "xy", **changed)})


def test_amounts_share_a_scale_from_zero_and_keep_their_tokens_and_direction():
    def grid(k):
        return heatmap(np.abs(GRID) * k, "abc", "xy", scale="sequential", text=[[" a"] * 3] * 2, first_at_top=False)

    joint = small_multiples({"one": grid(1), "two": grid(4)})
    amounts = [trace for trace in joint.data if trace.meta["kind"] == "amount"]
    assert [(trace.zmin, trace.zmax) for trace in amounts] == [(0, 2.0)] * 2
    assert amounts[1].text[1] == ["·a"] * 3
    assert joint.layout.yaxis.range == joint.layout.yaxis2.range == (-0.5, 1.5)
    assert joint.layout.meta["min_width"] == 2 * grid(1).layout.meta["min_width"]
