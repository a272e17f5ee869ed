import json
import re
from dataclasses import dataclass

import numpy as np
import pytest

from mechinterp.errors import UserError
from mechinterp.reporting import Run
from mechinterp.reporting.curves import COLOURS, MANY, MARKERS, curves
from mechinterp.reporting.layout import INK
from mechinterp.reporting.page import HERE

Y = [1.0, np.nan, 0.0, 2.0, 3.0]


def lines_of(figure):
    return {trace.name: trace for trace in figure.data if trace.meta["kind"] == "curve"}


def band_of(figure):
    return next(trace for trace in figure.data if trace.meta["kind"] == "band")


def test_undefined_is_a_gap_and_never_nan():
    figure = curves(range(5), {"a": Y}, ci_low={"a": np.array(Y) - 1}, ci_high={"a": np.array(Y) + 1})
    line = lines_of(figure)["a"]
    assert line.y == (1.0, None, 0.0, 2.0, 3.0) and not line.connectgaps
    json.loads(figure.to_json(), parse_constant=lambda text: pytest.fail(text))


def test_the_interval_is_one_closed_shape_a_stretch():
    band = band_of(curves(range(5), {"a": Y}, ci_low={"a": np.array(Y) - 1}, ci_high={"a": np.array(Y) + 1}))
    # The lone point 0, a gap, then 2 3 4: up along the high ends, back along the low ends.
    assert band.x == (0, 0, None, 2, 3, 4, 4, 3, 2)
    assert band.y == (2.0, 0.0, None, 1.0, 3.0, 4.0, 2.0, 1.0, -1.0)
    assert band.fill == "toself" and band.hoverinfo == "skip"


def test_points_carry_their_numbers():
    figure = curves(
        [-1, 0.5], {"a": [1, np.nan]}, ci_low={"a": [0.5, 0]}, ci_high={"a": [2, 1]}, facts={"n": 64},
        x_title="strength", y_title="KL", x_labels=["<b>", " "],
    )  # fmt: skip
    line = lines_of(figure)["a"]
    assert line.meta["columns"] == ["line", "strength", "x_label", "KL", "ci_low", "ci_high"]
    assert line.meta["value"] == "KL" and line.meta["facts"] == [["n", "64"]]
    assert list(map(list, line.customdata)) == [["a", -1, "<b>", 1.0, 0.5, 2.0], ["a", 0.5, " ", None, 0.0, 1.0]]
    assert line.text[0] == "a · strength -1 (&lt;b&gt;)"
    assert figure.layout.xaxis.ticktext == ("&lt;b&gt;", " ")


def test_lines_differ_by_marker_as_well_as_by_colour():
    made = lines_of(curves([0, 1], {str(i): [i, i] for i in range(len(COLOURS) + 1)}))
    looks = [(line.marker.symbol, line.line.color) for line in made.values()]
    assert len({symbol for symbol, _ in looks}) == len(looks) == len(MARKERS)
    assert looks[0][1] == looks[-1][1]  # colours repeat after six lines, with other markers
    assert all(line.line.dash == "solid" for line in made.values())


def test_controls_are_grey_dashed_and_open():
    made = lines_of(curves([0, 1], {n: [1, 2] for n in "abcd"}, dashed=["b", "d"]))
    assert [made[n].line.color for n in "bd"] == [INK, INK]
    assert [made[n].line.dash for n in "abcd"] == ["solid", "dash", "solid", "dot"]
    assert [made[n].marker.symbol for n in "abcd"] == ["circle", "circle-open", "square", "square-open"]
    assert [made[n].line.color for n in "ac"] == list(COLOURS[:2])


def contrast(one, other):
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05

    pair = luminance(one), luminance(other)
    return max(pair) / min(pair)


@pytest.mark.parametrize("colour", [*COLOURS, INK])
def test_colours_are_seen_on_white_and_on_near_black(colour):
    css, themes = ((HERE / name).read_text() for name in ("report.css", "themes.js"))
    white, black = re.findall(r"--paper: (#\w{6})", css)
    assert contrast(colour, white) >= 3 and contrast(colour, black) >= 3
    on_dark = re.search(rf'"{colour}": "(#\w{{6}})"', themes)  # the page's own, for its dark theme
    assert on_dark is not None and contrast(on_dark[1], black) >= 4.5


def test_log_axis_leaves_out_what_it_cannot_show_and_says_so():
    figure = curves(
        range(3), {"a": [1.0, 0.0, 0.5]}, ci_low={"a": [0.25, -1, -0.1]}, ci_high={"a": [2, 1, 1]}, log_y=True
    )
    line = lines_of(figure)["a"]
    assert line.y == (1.0, None, 0.5) and line.customdata[1][3] == 0.0
    assert [note.text for note in figure.layout.annotations] == ["log scale; 1 at or below 0 not drawn"]
    assert figure.layout.yaxis.type == "log"
    assert min(y for y in band_of(figure).y if y is not None) == 0.25  # the lowest positive end: not -0.1
    assert curves(range(2), {"a": [1, 2]}, log_y=True).layout.annotations[0].text == "log scale"


def test_axes_show_no_room_where_nothing_can_lie():
    assert curves([0, 1], {"a": [0, 1]}).layout.yaxis.rangemode == "nonnegative"
    assert curves([0, 1], {"a": [0, 1]}, ci_low={"a": [-1, 0]}, ci_high={"a": [0, 1]}).layout.yaxis.rangemode is None
    assert curves(range(3), {"a": [0, 1, 2]}).layout.xaxis.dtick == 1  # there is no layer 0.5


def test_many_points_have_fewer_markers_unless_a_lone_point_could_vanish():
    many = np.ones(MANY + 1)
    gap = np.where(np.arange(MANY + 1) % 2, np.nan, 1.0)
    made = lines_of(curves(range(MANY + 1), {"whole": many, "gaps": gap}))
    assert made["whole"].marker.maxdisplayed == MANY // 2 and made["gaps"].marker.maxdisplayed is None
    assert len(made["whole"].customdata) == MANY + 1


def test_one_line_needs_no_legend():
    assert not curves([0], {"a": [1]}).layout.showlegend and curves([0], {"a": [1], "b": [1]}).layout.showlegend


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lines": {}}, "needs lines over finite x; found 0"),
        ({"x": [], "lines": {"a": []}}, "needs lines over finite x"),
        ({"x": [0, np.nan]}, "needs lines over finite x"),
        ({"lines": {"a": [1]}}, r"line 'a' has the shape \[1\].*\[2\]"),
        ({"ci_low": {"a": [1]}, "ci_high": {"a": [1, 2]}}, r"the interval of 'a' has the shape \[1\]"),
        ({"ci_low": {"b": [1, 2]}, "ci_high": {"b": [1, 2]}}, "ci_low names 'b'; the lines are a"),
        ({"ci_low": {"a": [1, 2]}}, "an interval has two ends"),
        ({"dashed": ["b"]}, "dashed names 'b'; the lines are a"),
        ({"x_labels": ["one"]}, r"x_labels has the shape \[1\]"),
        ({"x_title": "line"}, "two columns alike"),
        ({"x_title": "KL", "y_title": "KL"}, "two columns alike"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        curves(**{"x": [0, 1], "lines": {"a": [1, 2]}} | arguments)


@dataclass(frozen=True)
class Config:
    seed: int = 0


def test_a_run_saves_curves(tmp_path):
    with Run.open("e", Config(), tmp_path) as run:
        path = run.figure("kl", curves(range(5), {"a": Y}, log_y=True))
    saved = json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(text))
    assert saved["data"][0]["customdata"][3] == ["a", 3, None, 2.0, None, None]
