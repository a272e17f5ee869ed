"""The commands lens, tune, dla, heads, ablate, attention and steer, in process, on the planted model."""

import json
import random

import pytest

from mechinterp.cli import main
from mechinterp.cli.flags import parse_edges, parse_heads, parse_strengths
from mechinterp.commands import inputs
from mechinterp.errors import UserError
from mechinterp.models.planted import LETTERS

PLANTED = "planted-induction"
INDUCTION = ["--task", "induction", "--n", "12"]


def run(capsys, *argv):
    """The command succeeds; what it printed."""
    assert main([*argv]) == 0
    return capsys.readouterr().out


def read(path):
    """JSON without NaN."""
    text = path.read_text()
    assert "NaN" not in text and "Infinity" not in text
    return json.loads(text)


def fails(capsys, *argv, says):
    """The command ends with 2 and one line that names the fault."""
    assert main([*argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: ") and says in err, err


@pytest.fixture
def unloaded(monkeypatch):
    """Bad flags are refused before a model is loaded."""
    monkeypatch.setattr(inputs, "load", lambda *_, **__: pytest.fail("the model was loaded first"))


# lens, tune


def test_lens(capsys, tmp_path):
    out, page = tmp_path / "o.json", tmp_path / "o.html"
    argv = ["lens", PLANTED, "--prompt", "x a b y c d z a", "--answer", "b", "--json", str(out), "--html", str(page)]
    text = run(capsys, *argv)
    assert text.splitlines()[0].startswith(PLANTED) and "first from layer 2 of 2" in text
    found = read(out)
    assert found["layers"] == [0, 1, 2] and len(found["rank"]) == len(found["prob"]) == len(found["top"]) == 3
    assert found["rank"][-1] == 0 and found["prob"][-1] > 0.5 and found["top"][-1][0] == "b"
    assert found["command"].startswith("mechinterp lens") and "Logit lens" in page.read_text()


def test_lens_at_all_positions_and_over_pairs(capsys, tmp_path):
    out = tmp_path / "o.json"
    run(capsys, "lens", PLANTED, "--prompt", "a b a", "--positions", "all", "--top", "2", "--json", str(out))
    found = read(out)
    assert found["rank"] is None and len(found["positions"]) == 3 and len(found["top"][0]) == 2
    pairs = tmp_path / "p.jsonl"
    line = {"clean": "x a b y c d z a", "corrupted": "x c b y a d z a", "answer": "b", "wrong": "d"}
    other = {"clean": "x f g y h i z f", "corrupted": "x h g y f i z f", "answer": "g", "wrong": "i"}
    pairs.write_text("\n".join(map(json.dumps, (line, other))))
    run(capsys, "lens", PLANTED, "--pairs", str(pairs), "--json", str(out), "--html", str(tmp_path / "o.html"))
    assert len(read(out)["prompts"]) == 2 and read(out)["mean"]["prob"]["control"] is not None


def test_tune_and_use(capsys, tmp_path):
    draw = random.Random(0)
    text = tmp_path / "text.txt"
    text.write_text("\n\n\n".join(" ".join(draw.choices(LETTERS, k=40)) for _ in range(20)))
    lens, out = tmp_path / "lens", tmp_path / "o.json"
    size = ["--blocks", "40", "--length", "16", "--steps", "3"]
    said = run(capsys, "tune", PLANTED, "--out", str(lens), "--text", str(text), *size, "--json", str(out))
    assert "held out" in said and f"wrote {lens}" in said and len(read(out)["tuned"]) == 2
    said = run(capsys, "lens", PLANTED, "--prompt", "a b a", "--answer", "b", "--tuned", str(lens))
    assert "tuned lens" in said
    (lens / "config.json").write_text("{}")
    fails(capsys, "lens", PLANTED, "--prompt", "a", "--tuned", str(lens), says="is no tuned lens of ours")
    fails(capsys, "tune", PLANTED, "--out", str(lens), "--text", str(text), "--length", "60", says="the longest has 40")


# dla, heads


def test_dla(capsys, tmp_path):
    out = tmp_path / "o.json"
    argv = ["dla", PLANTED, *INDUCTION, "--sources", "roles", "--json", str(out), "--html", str(tmp_path / "o.html")]
    text = run(capsys, *argv)
    assert "largest L1H2" in text and "sum: heads" in text
    found = read(out)
    assert len(found["heads"]) == 2 and len(found["heads"][0]) == 4 and found["mlps"] == []
    parts = sum(map(sum, found["heads"])) + sum(found["mlps"]) + found["embed"] + found["bias"]
    assert parts == pytest.approx(found["total"], abs=1e-4) == pytest.approx(found["logit_diff"], abs=1e-4)
    assert found["moved_from"][-1] == "other"


def test_heads(capsys, tmp_path):
    out = tmp_path / "o.json"
    argv = ["heads", PLANTED, "--n", "8", "--period", "16", "--json", str(out), "--html", str(tmp_path / "o.html")]
    text = run(capsys, *argv, "--causal", "1")
    found = read(out)
    assert found["n_sequences"] == 8 and found["induction"][1][2] > 0.8 and found["previous_token"][0][2] > 0.8
    assert found["passes"]["duplicate_token"] == [[False] * 4, [True, False, False, False]]
    assert found["passes"]["induction"] == [[False] * 4, [False, False, True, True]], "L1H3 attends as L1H2 does"
    assert "position 0" in text and "period 16" in text and "loss on the last copy" in text
    assert found["causal"]["loss"]["none"] < found["causal"]["loss"]["top"]


def test_heads_on_a_token_file(capsys, tmp_path):
    tokens, out = tmp_path / "t.json", tmp_path / "o.json"
    tokens.write_text(json.dumps([[9, 1, 2, 3, 4, 1, 2, 3, 4], [5, 6, 7, 8, 5, 6, 7, 8]]))
    run(capsys, "heads", PLANTED, "--tokens", str(tokens), "--period", "4", "--json", str(out))
    found = read(out)
    assert found["n_sequences"] == 2 and found["induction"][1][2] > 0.8 and found["source"] == "given sequences"
    tokens.write_text(json.dumps([[1, 2, 3, 4, 1, 2, 3, 5]]))
    fails(capsys, "heads", PLANTED, "--tokens", str(tokens), "--period", "4", says="sequence 1")
    tokens.write_text(json.dumps([[1, 2, 1, 2], [1, 2, 3]]))
    fails(capsys, "heads", PLANTED, "--tokens", str(tokens), "--period", "2", says="sequence 2")
    tokens.write_text(json.dumps([[1, 999, 1, 999]]))
    fails(capsys, "heads", PLANTED, "--tokens", str(tokens), "--period", "2", says="outside the vocabulary")


# ablate, attention


def test_ablate(capsys, tmp_path):
    out = tmp_path / "o.json"
    argv = ["ablate", PLANTED, *INDUCTION, "--heads", "1.2", "--positions", "END", "--draws", "2"]
    text = run(capsys, *argv, "--json", str(out), "--html", str(tmp_path / "o.html"))
    assert "knock-out of L1H2" in text and "P(answer)" in text
    found = read(out)
    assert found["before"]["logit_diff"] > 5 > 1 > found["after"]["logit_diff"]
    assert found["before"].keys() == found["after"].keys() == {"logit_diff", "prob", "accuracy"}
    assert (
        found["ci"]["prob"][1] < 0 and found["value"] == "mean" and found["over"] == "clean" and found["by"] == "role"
    )


def test_ablate_other_things(capsys, tmp_path):
    out = tmp_path / "o.json"
    ablate = ["ablate", PLANTED, *INDUCTION, "--draws", "0", "--json", str(out)]
    run(capsys, *ablate, "--edges", "1.2:END>B1")
    assert read(out)["after"]["logit_diff"] < 1
    run(capsys, *ablate, "--heads", "0.2", "--value", "zero", "--positions", "B1")
    assert read(out)["after"]["prob"] < read(out)["before"]["prob"]
    fails(
        capsys, *ablate, "--heads", "1.2", "--value", "resample", says="no other prompt has the length of prompt 0 and"
    )
    pairs = tmp_path / "p.jsonl"
    names = ("clean", "corrupted", "answer", "wrong")
    lines = [("x a b y c d z a", "x c b y a d z a", "b", "d"), ("x f g y h i z f", "x h g y f i z f", "g", "i")]
    pairs.write_text("\n".join(json.dumps(dict(zip(names, one, strict=True))) for one in lines))
    resample = ["--heads", "1.2", "--value", "resample", "--over", "corrupted", "--draws", "0"]
    run(capsys, "ablate", PLANTED, "--pairs", str(pairs), *resample, "--json", str(out))
    assert read(out)["over"] == "corrupted" and read(out)["after"]["prob"] < 0.5 < read(out)["before"]["prob"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--heads", "1.9"], "head is 0 … 3"),
        (["--heads", "7.0"], "layers 0 … 1"),
        (["--mlps", "0"], "mlp"),
        (["--heads", "1.2", "--positions", "S2"], "S2"),
        (["--heads", "1.2", "--by", "position"], "position"),
        (["--heads", "1.2", "--by", "template"], "template"),
        (["--edges", "1.2:END>XX"], "XX"),
    ],
)
def test_ablate_refuses(capsys, flags, says):
    fails(capsys, "ablate", PLANTED, *INDUCTION, *flags, says=says)


def test_attention(capsys, tmp_path):
    page, out = tmp_path / "o.html", tmp_path / "o.json"
    argv = ["attention", PLANTED, "--prompt", "a b c a", "--heads", "0,1.2", "--html", str(page), "--json", str(out)]
    assert "“a” (position 3) in L0H0" in run(capsys, *argv)
    found = read(out)
    assert found["heads"] == ["L0H0", "L0H1", "L0H2", "L0H3", "L1H2"] and found["tokens"] == ["a", "b", "c", "a"]
    assert found["patterns"][-1][-1][1] > 0.8, "the induction head looks at what followed the first a"
    assert "L1H2" in page.read_text() and "http://" not in page.read_text().split("<script")[0]
    fails(capsys, "attention", PLANTED, "--prompt", "a", "--heads", "5", "--html", str(page), says="5")


# steer


def test_steer(capsys, tmp_path):
    out = tmp_path / "o.json"
    argv = ["steer", PLANTED, "--positive", "a b a", "c b c", "--negative", "a d a", "c d c", "--layer", "1"]
    argv += ["--prompt", "x y z", "f g h", "--answer", "b", "--wrong", "d", "--strengths=-2,2", "--draws", "3"]
    text = run(capsys, *argv, "--max-new-tokens", "2", "--json", str(out), "--html", str(tmp_path / "o.html"))
    found = read(out)
    assert found["strengths"] == [-2, 0, 2] and found["mean"][0] < found["mean"][1] < found["mean"][2]
    assert found["generations"]["2"][0].split()[0] == "b" and found["generations"]["-2"][0].split()[0] == "d"
    assert "random directions" in text
    same = ["steer", PLANTED, "--positive", "a b", "--negative", "a b", "--layer", "1", "--prompt", "x"]
    fails(capsys, *same, "--answer", "b", "--wrong", "d", says="nothing to steer with")
    words = ["steer", PLANTED, "--positive", "a b", "--negative", "a c", "--layer", "9", "--prompt", "x"]
    fails(capsys, *words, "--answer", "b", "--wrong", "d", says="layers 0 … 1")


# Bad flags


def test_heads_edges_and_strengths_are_parsed():
    assert parse_heads("9.6, 10.0") == parse_heads("L9H6,L10H0") == [(9, 6), (10, 0)]
    assert parse_heads("9,1.2", whole_layers=True) == [(9, None), (1, 2)] and parse_heads(None) is None
    assert parse_edges("9.6:END>IO,*:END>S2") == [((9, 6), "END", "IO"), (None, "END", "S2")]
    assert parse_strengths("-2,0,1.5") == [-2, 0, 1.5]
    for wrong in ("", ",", "9", "9.6.1", "a.b", "9.6,9.6"):
        with pytest.raises(UserError, match="--heads"):
            parse_heads(wrong)
    for wrong in ("9.6", "END>IO", "9.6:END", "x:END>IO"):
        with pytest.raises(UserError, match="--edges"):
            parse_edges(wrong)
    for wrong in ("", "a", "inf", "1,,2"):
        with pytest.raises(UserError, match="--strengths"):
            parse_strengths(wrong)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["lens", PLANTED], "either --prompt TEXT or --pairs FILE"),
        (["lens", PLANTED, "--prompt", ""], "--prompt is empty"),
        (["lens", PLANTED, "--prompt", "a", "--top", "0"], "--top must be at least 1"),
        (["lens", PLANTED, "--prompt", "a", "--tuned", "/nowhere"], "no tuned lens at"),
        (["tune", PLANTED, "--out", "/nowhere/lens"], "no folder above it"),
        (["tune", PLANTED, "--out", "lens", "--steps", "0"], "--steps must be at least 1"),
        (["dla", PLANTED], "either --pairs FILE or --task"),
        (["dla", PLANTED, *INDUCTION, "--neurons", "-1"], "--neurons must not be negative"),
        (["heads", PLANTED, "--tokens", "/nowhere.json", "--period", "4"], "no such token file"),
        (["heads", PLANTED, "--tokens", "t.json"], "needs --period"),
        (["heads", PLANTED, "--period", "1"], "--period must be at least 2"),
        (["ablate", PLANTED, *INDUCTION], "nothing to knock out"),
        (["ablate", PLANTED, *INDUCTION, "--heads", ""], "--heads takes layer.index"),
        (["ablate", PLANTED, *INDUCTION, "--heads", "1"], "--heads takes layer.index"),
        (["ablate", PLANTED, *INDUCTION, "--edges", "END"], "--edges takes head:QUERY>KEY"),
        (["attention", PLANTED, "--prompt", "a", "--heads", "x", "--html", "o.html"], "--heads takes"),
        (
            ["steer", PLANTED, "--positive", "a", "--negative", "b", "--layer", "0", "--prompt", "c", "--answer", "a",
             "--wrong", "b", "--strengths=x"],
            "--strengths takes numbers",
        ),
    ],
)  # fmt: skip
def test_bad_flags_are_refused_before_a_model_is_loaded(capsys, unloaded, argv, says):
    fails(capsys, *argv, says=says)
