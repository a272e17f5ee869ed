import pytest

from mechinterp.reporting.cells import shortened, visible


@pytest.mark.parametrize(
    ("token", "shown"),
    [(" Paris", "·Paris"), ("\n\n", "↵↵"), ("\t", "⇥"), ("", "∅"), ("Ġ", "Ġ"),
     ("a\x00", "a\\x00"), ("\u200d", "\\x200d"), ("é", "é"), ("日本", "日本"), ("\ufffd", "\ufffd")],
)  # fmt: skip
def test_blanks_and_control_characters_are_visible(token, shown):
    assert visible(token) == shown


def test_shortened():
    assert [shortened("abcd", width) for width in (5, 4, 3)] == ["abcd", "abcd", "ab…"]
