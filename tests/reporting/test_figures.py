import json
import math

import numpy as np
import pytest

from mechinterp.errors import UserError
from mechinterp.reporting import bars, heatmap, largest

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


def test_figures_are_strict_json():
    figure = heatmap(GRID, "abc", "xy")
    json.loads(figure.to_json(), parse_constant=lambda text: pytest.fail(text))
    assert not any(isinstance(v, float) and math.isnan(v) for row in figure.data[0].z for v in row)


# ---- amounts, and tokens in the cells ------------------------------------------------------------------------------

TEXT = [[" a", "\n", "<b>"], ["", " incomprehensible", "x\u200d"]]


def test_amounts_start_at_zero_on_a_scale_that_is_not_diverging():
    trace = heatmap(np.abs(GRID), "abc", "xy", scale="sequential", value="probability").data[0]
    assert (trace.zmin, trace.zmax) == (0, 0.5)
    assert trace.colorscale != heatmap(GRID, "abc", "xy").data[0].colorscale
    luminance = [sum(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for _, colour in trace.colorscale]
    assert luminance == sorted(luminance, reverse=True)
    assert trace.meta["value"] == trace.colorbar.title.text == "probability"
    assert trace.meta["columns"][1] == "probability" and "probability %{customdata[1]" in trace.hovertemplate


def test_negative_amounts_are_refused_and_float_noise_is_not():
    with pytest.raises(UserError, match=r"sequential scale starts at 0, and the smallest KL is -0\.2"):
        heatmap(GRID, "abc", "xy", scale="sequential", value="KL")
    heatmap([[1.0, -1e-8]], "ab", "x", scale="sequential")


def test_tokens_are_drawn_with_visible_blanks_shortened_and_escaped_and_kept_whole():
    grid = np.ones((2, 3))
    grid[1, 1] = np.nan
    trace = heatmap(grid, "abc", "xy", text=TEXT).data[0]
    assert trace.text == (["·a", "↵", "&lt;b&gt;"], ["∅", "", "x\\x200d"])  # an undefined cell has its cross alone
    assert trace.texttemplate == "%{text}"
    assert trace.hovertext[0][2] == "x · c: &lt;b&gt;" and trace.hovertext[1][1] == "y · b: ·incomprehensible"
    at = trace.meta["columns"].index("text")
    assert [[cell[at] for cell in row] for row in trace.customdata] == TEXT
    long = heatmap(np.ones((2, 3)), "abc", "xy", text=TEXT).data[0].text[1][1]
    assert long == "·incompr…"


def test_cells_of_tokens_are_wide_enough_to_be_read():
    figure = heatmap(np.ones((2, 40)), range(40), "xy", text=[["·incompr…"] * 40] * 2)
    assert figure.layout.meta["min_width"] >= 60 * 40


def test_more_columns():
    ranks = np.array([[1, 2, 3], [4, 5, 60]])
    trace = heatmap(GRID, "abc", "xy", more={"rank": ranks, "entropy": GRID}).data[0]
    assert trace.meta["columns"][-2:] == ["rank", "entropy"]
    assert trace.customdata[1][2][-2:] == [60, 0.3] and trace.customdata[0][1][-1] is None
    with pytest.raises(UserError, match="rank has the shape"):
        heatmap(GRID, "abc", "xy", more={"rank": [1]})
    with pytest.raises(UserError, match="text has the shape"):
        heatmap(GRID, "abc", "xy", text=[["a"]])
    with pytest.raises(UserError, match="'effect'"):
        heatmap(GRID, "abc", "xy", more={"effect": GRID})


def test_the_first_row_may_be_the_lowest():
    assert heatmap(GRID, "abc", "xy").layout.yaxis.range == (1.5, -0.5)
    assert heatmap(GRID, "abc", "xy", first_at_top=False).layout.yaxis.range == (-0.5, 1.5)


def test_dots_stand_beside_the_tokens():
    passes = [[True, False, False]] * 2
    assert list(heatmap(np.ones((2, 3)), "abc", "xy", text=TEXT, passes=passes).data[-1].x) == [-0.4, -0.4]


def test_bars_name_their_numbers_and_their_control():
    figure = bars(["a"], [0.5], value="score", control=[0.1], control_name="shuffled")
    assert figure.data[0].meta["columns"][1] == figure.data[0].meta["value"] == "score"
    assert figure.data[0].meta["control"] == figure.data[1].name == "shuffled"
