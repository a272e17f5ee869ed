"""The README's example runs as it stands."""

import re
from pathlib import Path

import plotly.graph_objects as go
import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.real_model
def test_the_example_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)  # it trains into runs/
    shown = []
    monkeypatch.setattr(go.Figure, "show", lambda self: shown.append(self))
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example.replace("n=16", "n=4"), "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert len(shown) == 1 and "L23H3" in said and "accuracy" in said


def test_commands_and_scripts_that_it_names_exist():
    root = Path(__file__).parent.parent
    for path in re.findall(r"(?:scripts|experiments)/\w+(?:/\w+)*\.(?:sh|py)", README):
        assert (root / path).is_file(), path
    from mechinterp.cli import main

    for command in set(re.findall(r"^mechinterp (\w+)", README, re.MULTILINE)):
        with pytest.raises(SystemExit) as left:
            main([command, "--help"])
        assert left.value.code == 0
