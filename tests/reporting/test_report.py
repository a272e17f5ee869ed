import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from mechinterp.errors import UserError
from mechinterp.reporting import AttentionView, Prompt, Report, Section, Table, read, rebuild

HOSTILE = "<script>alert(1)</script>"


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the text of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.raw, self._inside = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else None
        if self._inside:
            self.raw.append([tag, dict(attrs), ""])

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside:
            self.raw[-1][2] += data


@pytest.fixture(scope="module")
def parsed(page):
    return Page(page.read_text(encoding="utf-8"))


def data_of(parsed):
    return next(text for _, attrs, text in parsed.raw if attrs.get("id") == "data")


def test_nothing_points_to_the_network(parsed):
    for tag, attrs in parsed.tags:
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            value = attrs.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
    for tag, _, text in parsed.raw:
        if tag == "style":
            assert "@import" not in text and not re.search(r"url\((?!['\"]?data:)", text)
        assert "sourceMappingURL=" not in text
    policy = next(a["content"] for t, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "http" not in policy


def test_one_file_below_ten_megabytes_with_each_bundle_once(page, parsed):
    assert page.stat().st_size < 10e6
    scripts = [text for tag, attrs, text in parsed.raw if tag == "script"]
    assert sum(len(text) > 4e6 for text in scripts) == 1  # plotly.js
    assert sum("var CircuitsVis=" in text for text in scripts) == 1


def test_bundles_are_left_out_where_nothing_uses_them(tmp_path):
    page = Report("t", "q", "a", "h", "c", sections=(Section("s", "text"),)).write(tmp_path / "report.html")
    assert page.stat().st_size < 60_000


def test_markup_is_shown_and_never_run(parsed):
    text = data_of(parsed)
    assert "<" not in text and ">" not in text
    assert not any("onclick" in attrs for _, attrs in parsed.tags)
    assert not any("alert(1)" in script for _, attrs, script in parsed.raw if attrs.get("id") != "data")


def test_prompt_roles_and_tokens_are_escaped(tmp_path):
    prompt = Prompt((HOSTILE,), (HOSTILE,), label=HOSTILE, answer=HOSTILE)
    report = Report(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, ((HOSTILE, HOSTILE),), (prompt,), (), (HOSTILE,),
                    {HOSTILE: HOSTILE})  # fmt: skip
    page = report.write(tmp_path / "report.html").read_text()
    assert HOSTILE not in page
    assert page.count("alert(1)") >= 10


def test_undefined_is_null_and_nan_is_never_written(report, page, parsed):
    refuse = {"parse_constant": lambda name: pytest.fail(name)}
    saved = json.loads(page.with_name("report.json").read_text(), **refuse)
    json.loads(data_of(parsed), **refuse)
    assert saved["manifest"]["loss"] is None
    table = Table(("a",), ((float("inf"),), (np.float64(0.5),)))
    payload = Report("t", "q", "a", "h", "c", sections=(Section("s", table=table),)).payload()
    assert payload["sections"][0]["table"]["rows"] == [[None], [0.5]]


def test_rebuild_gives_the_same_page(report, page, tmp_path):
    (tmp_path / "report.json").write_bytes(page.with_name("report.json").read_bytes())
    assert rebuild(tmp_path) == tmp_path / "report.html"
    assert (tmp_path / "report.html").read_bytes() == page.read_bytes()
    assert not list(tmp_path.glob(".partial-*"))


def test_read_gives_the_same_report(report, page):
    again = read(page.parent)
    assert again.payload() == report.payload()
    assert (again.prompts, again.baseline, again.caveats) == (report.prompts, report.baseline, report.caveats)


def test_attention_is_kept_as_bytes(report):
    view = next(section.attention for section in report.sections if section.attention)
    assert view.patterns.dtype == np.uint8 and view.patterns.shape == (6, 14, 14)
    exact = AttentionView(("a", "b"), ("L0H0",), [[[1.0, 0.0], [0.25, 0.75]]])
    np.testing.assert_allclose(np.asarray(exact.patterns) / 255, [[[1.0, 0.0], [0.25, 0.75]]], atol=0.5 / 255)


def test_tables_show_at_most_their_rows(parsed, page):
    text = page.read_text()
    assert "5 of 6 rows" in text and "\u22120.270" in text


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Table(("a", "b"), ((1,),)), "a row of 1 cells under 2 columns"),
        (lambda: Prompt(("a", "b"), ("IO",)), "1 roles for 2 tokens"),
        (lambda: AttentionView(("a",), ("h",), np.zeros((1, 2, 2))), r"\[head query key\] is \[1, 1, 1\]"),
        (lambda: AttentionView(("a",), ("h",), np.zeros((1, 1, 1)), notes=("x", "y")), "2 notes for 1 heads"),
    ],
)
def test_shapes_must_agree(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_rebuild_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        rebuild(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no report at"):
        rebuild(tmp_path)
    for text in ("{", "[]", '{"format": 99}', '{"format": 1}'):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(UserError, match="run the experiment again"):
            rebuild(tmp_path)
        with pytest.raises(UserError, match="run the experiment again"):
            read(tmp_path)
