import json
import math

import numpy as np
import pytest

from mechinterp.errors import UserError
from mechinterp.reporting import bars, heatmap, largest, small_multiples

GRID = np.array([[0.5, np.nan, -0.2], [0.0, 0.1, 0.3]])


def kinds(figure):
    return [trace.meta["kind"] for trace in figure.data]


def test_scale_is_symmetric_about_zero_and_can_be_shared():
    trace = heatmap(GRID, "abc", "xy").data[0]
    assert (trace.zmin, trace.zmax) == (-0.5, 0.5)
    assert heatmap(GRID, "abc", "xy", zmax=largest(GRID, [-2.0])).data[0].zmin == -2.0


@pytest.mark.parametrize("arrays", [(), ([0.0, 0.0],), ([np.nan],)])
def test_scale_of_nothing_is_one(arrays):
    assert largest(*arrays) == 1.0


def test_undefined_cells_are_marked_and_null():
    figure = heatmap(GRID, "abc", "xy")
    assert kinds(figure) == ["effect", "undefined", "mark"]
    assert figure.data[0].z[0][1] is None and figure.data[0].customdata[0][1][1] is None
    assert (list(figure.data[2].x), list(figure.data[2].y)) == ([1], [0])
    assert "NaN" not in figure.to_json()


def test_none_is_undefined_too():
    assert heatmap([[None, 1.0]], "ab", "x").data[0].z[0][0] is None


def test_cells_carry_their_numbers():
    passes = np.array([[True, None, False], [None, None, None]], dtype=object)
    figure = heatmap(
        GRID, "abc", "xy", ci_low=GRID - 0.1, ci_high=GRID + 0.1, control=GRID / 2, passes=passes, facts={"n": 64}
    )
    cells = figure.data[0].customdata
    assert cells[0][0] == ["x · a", 0.5, pytest.approx(0.4), pytest.approx(0.6), 0.25, "yes"]
    assert [cell[5] for cell in cells[0]] == ["yes", None, "no"]
    assert figure.data[0].meta["facts"] == [["n", "64"]]
    dots = figure.data[-1]
    assert (list(dots.x), list(dots.y)) == ([0], [0])


def test_markup_in_labels_is_escaped_in_the_drawing_and_kept_in_the_numbers():
    figure = heatmap([[1.0]], ["<b>"], ["y"], title="<i>t</i>")
    assert figure.layout.xaxis.ticktext == ("&lt;b&gt;",)
    assert figure.layout.title.text == "&lt;i&gt;t&lt;/i&gt;"
    assert figure.data[0].text[0][0] == "y · &lt;b&gt;"
    assert figure.data[0].customdata[0][0][0] == "y · <b>"


def test_repeated_labels_keep_their_own_columns():
    figure = heatmap([[1.0, 2.0]], [" to", " to"], ["0"])
    assert list(figure.data[0].x) == [0, 1]


@pytest.mark.parametrize("wrong", ["ci_low", "ci_high", "control", "passes"])
def test_shapes_must_agree(wrong):
    with pytest.raises(UserError, match=rf"{wrong} has the shape \[2\].*\[2, 3\]"):
        heatmap(GRID, "abc", "xy", **{wrong: [0.0, 1.0]})
    with pytest.raises(UserError, match="values"):
        heatmap(GRID, "ab", "xy")


def test_bars_tell_passing_from_failing_without_colour():
    figure = bars(["a", "b", "c"], [0.5, np.nan, -0.2], ci_low=[0.4, np.nan, -0.3], ci_high=[0.7, np.nan, -0.1],
                  control=[0.1, np.nan, 0.0], passes=[True, False, False])  # fmt: skip
    passing, failing, control = figure.data
    assert (passing.marker.pattern.shape, failing.marker.pattern.shape) == ("", "/")
    assert list(passing.y) == [0] and list(failing.y) == [1, 2]
    assert passing.error_x.array[0] == pytest.approx(0.2) and passing.error_x.arrayminus[0] == pytest.approx(0.1)
    assert list(control.x) == [0.1, None, 0.0]
    assert "NaN" not in figure.to_json()


def test_bars_alone():
    figure = bars(["a"], [0.5])
    assert len(figure.data) == 1 and not figure.layout.showlegend


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
    with pytest.raises(UserError, match="'b'"):
        small_multiples({"a": heatmap(GRID, "abc", "xy"), "b": bars(["a"], [1.0])})


def test_figures_are_strict_json():
    figure = heatmap(GRID, "abc", "xy")
    json.loads(figure.to_json(), parse_constant=lambda text: pytest.fail(text))
    assert not any(isinstance(v, float) and math.isnan(v) for row in figure.data[0].z for v in row)
