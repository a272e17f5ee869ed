"""The command line, in process, on the planted model and on tiny folders. One subprocess: what `--help` imports."""

import io
import json
import math
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import get_args

import pytest
import torch

import mechinterp as mi
from mechinterp.cli import flags, main
from mechinterp.cli.flags import check_outputs, parse_layers
from mechinterp.commands import inputs, models, sites
from mechinterp.errors import UserError
from mechinterp.hooked.sites import KINDS, Site
from mechinterp.metrics import METRICS
from mechinterp.models.catalog import CATALOG
from mechinterp.models.load import DTYPES
from mechinterp.models.planted import LETTERS, word_tokenizer
from mechinterp.patching.sweep import Direction
from mechinterp.reporting import Report, Run
from mechinterp.tasks.ioi import Corruption
from tests.families import module

PLANTED = "planted-induction"
KEYS = {
    "model", "site", "direction", "metric", "positions", "n_prompts", "dims", "coords", "effect", "ci_low", "ci_high",
    "baseline", "per_prompt", "threshold", "control", "bos", "seed",
}  # fmt: skip
# a b … a -> b; corrupted: a and c change places, so that the answer becomes d
PAIR = {"clean": "x a b y c d z a", "corrupted": "x c b y a d z a", "answer": "b", "wrong": "d", "roles": {"B1": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random Llama with a tokenizer of letters that adds no BOS but has one."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    module("llama").save_pretrained(path)
    tokenizer = word_tokenizer((*LETTERS, "<s>"))
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def pairs_file(tmp_path):
    def write(*entries):
        path = tmp_path / "pairs.jsonl"
        path.write_text("\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries))
        return str(path)

    return write


def letters(shift):
    """Another pair of the same kind."""
    words = dict(zip("abcdxyz", (LETTERS[(i + shift) % 26] for i in range(7)), strict=True))

    def renamed(text):
        return " ".join(words[word] for word in text.split())

    return {**PAIR, **{name: renamed(PAIR[name]) for name in ("clean", "corrupted", "answer", "wrong")}}


def fails(capsys, *argv, says):
    """The command ends with 2, one message that names the fault, and no traceback."""
    assert main(list(argv)) == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == 1 and says in err and "Traceback" not in err, err
    return err


def refused(capsys, *argv, says):
    """The CLI library refuses the flags in its own box."""
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and says in err and "Traceback" not in err, err


# The grammar


def test_help_does_not_import_torch():
    program = (
        "import sys\nfrom mechinterp.cli import main\n"
        "for argv in (['--help'], ['patch', '--help'], []):\n"
        "    try: main(argv)\n    except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'numpy', 'transformers', 'plotly', 'mechinterp.commands'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(mi.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: mechinterp [-h] {check,sites,models,patch,lens,") == 2


def test_no_subcommand_prints_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 0 and "subcommands" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mechinterp {mi.__version__}\n"


def test_the_names_are_those_of_the_library():
    assert get_args(flags.SiteName) == tuple(name for name, kind in KINDS.items() if kind.layered)
    assert get_args(flags.MetricName) == tuple(METRICS)
    assert get_args(flags.Direction) == get_args(Direction)
    assert get_args(flags.Corruption) == get_args(Corruption)
    assert get_args(flags.DTypeName) == tuple(DTYPES)
    assert get_args(flags.TaskName) == tuple(mi.tasks.TASKS)


def test_layers():
    assert parse_layers(None) is None
    assert parse_layers("3,4,8-11") == [3, 4, 8, 9, 10, 11]
    assert parse_layers("-1") == [-1]
    for wrong in ("", "a", "3,,4", "1,1", "4-2", "1-"):
        with pytest.raises(UserError, match="--layers"):
            parse_layers(wrong)


@pytest.mark.parametrize("flags, bos", [([], "no BOS"), (["--bos"], "BOS prepended"), (["--no-bos"], "no BOS")])
def test_the_header_comes_first_and_bos_has_three_states(folder, capsys, flags, bos):
    assert main(["sites", folder, *flags, "--dtype", "bfloat16", "--device", "cpu"]) == 0
    header = capsys.readouterr().out.splitlines()[0]
    assert header.startswith(folder) and bos in header and "bfloat16" in header and "cpu" in header
    assert "raw weights" in header


def test_bos_by_default_is_the_tokenizers(tmp_path, capsys):
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer((*LETTERS, "<s>"))
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    special = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=special)
    module("gpt2").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for given, bos in (([], "BOS prepended"), (["--no-bos"], "no BOS")):
        assert main(["sites", str(tmp_path), *given]) == 0
        assert bos in capsys.readouterr().out.splitlines()[0]


# check, sites, models, report


def test_check(capsys, tmp_path):
    out = tmp_path / "check.json"
    assert main(["check", PLANTED, "--json", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(PLANTED)
    assert sum("pass" in line for line in lines) == 5 and sum("skip " in line for line in lines) == 1
    assert "native" in next(line for line in lines if "skip " in line)
    assert f"wrote {out}" in lines
    found = json.loads(out.read_text())
    assert found["ok"] and [one["ok"] for one in found["identities"]] == [None, *[True] * 5]


def test_check_fails_with_1(capsys, monkeypatch):
    def broken(*args, **kwargs):
        model = mi.load(*args, **kwargs)
        point = model.hook_points[Site("resid_post", 0).hook_name]
        point.add_hook(lambda activation, hook: activation + 1, is_permanent=True)
        return model

    monkeypatch.setattr(inputs, "load", broken)
    assert main(["check", PLANTED]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_sites(folder, capsys, tmp_path):
    out = tmp_path / "sites.json"
    assert main(["sites", folder, "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "[batch pos head=4 d_head=6]" in text and "[batch pos kv_head=2 d_head=6]" in text
    listed = {one["site"]: one for one in json.loads(out.read_text())["sites"]}
    assert listed["z"]["sizes"] == {"head": 4, "d_head": 6} and listed["z"]["layers"] == "all"
    assert listed["embed"]["layers"] == "–" and "pos_embed" not in listed
    assert listed["mlp_post"]["shape"] == "[batch pos d_mlp=40]"
    assert all(one["writable"] for one in listed.values())


def test_sites_that_can_only_be_read(tmp_path, capsys):
    module("opt").save_pretrained(tmp_path)
    assert main(["sites", str(tmp_path)]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("pattern"))
    assert " no " in row


def test_models(capsys, tmp_path):
    out = tmp_path / "models.json"
    assert main(["models", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    names = [one["name"] for one in json.loads(out.read_text())["models"]]
    assert {PLANTED, *CATALOG} <= set(names) and all(name in text for name in names)


def test_refetch(capsys, monkeypatch):
    fails(capsys, "models", "--refetch", "gpt5", says="'gpt5' is not an embedded model; valid: smollm2-135m")
    asked = []
    monkeypatch.setattr(models, "fetch", lambda entry, refetch: asked.append((entry.name, refetch)) or Path("/cache"))
    assert main(["models", "--refetch", "smollm2-135m"]) == 0
    assert asked == [("smollm2-135m", True)] and "/cache" in capsys.readouterr().out


def test_report(tmp_path, capsys):
    with Run.open("example", {"seed": 0}, root=tmp_path) as run:
        page = run.finish(Report(title="t", question="q", answer="a", header="h", command="c"))
    page.unlink()
    assert main(["report", str(run.path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(page) and page.is_file()
    fails(capsys, "report", str(tmp_path / "none"), says="no run folder")
    fails(capsys, "report", str(tmp_path), says="no report at")


# patch


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """One sweep of the planted model with all outputs; the text is what it printed."""
    place = tmp_path_factory.mktemp("swept")
    command = ["patch", PLANTED, "--task", "induction", "--n", "16", "--positions", "B1,END", "--seed", "3"]
    command += ["--json", str(place / "o.json"), "--html", str(place / "o.html")]
    with redirect_stdout(io.StringIO()) as printed:
        assert main(command) == 0
    return place, printed.getvalue()


def test_patch_prints_what_was_run_and_what_was_found(swept):
    place, text = swept
    lines = text.splitlines()
    assert lines[0].startswith(PLANTED) and "no BOS" in lines[0]
    assert lines[1] == "task: induction, swapped-predecessors, n=16, seed 3, roles A1 B1 C1 D1 END"
    assert lines[2].lstrip().startswith("clean") and "[END]" in lines[2]
    assert lines[5].startswith("baseline: clean logit-diff 7.")
    assert "largest L1H2 END" in lines[6] and "n=16" in lines[6]
    rows = lines[8:20]
    assert lines[7].split() == ["cell", "effect", "ci_low", "ci_high", "control", "passes"]
    assert rows[0].startswith("L1H2 END") and rows[0].endswith("yes") and len({row.index(".") for row in rows}) == 1
    assert lines[20].startswith("passes: |effect| >") and "donor" in lines[20]
    assert lines[21:] == [f"wrote {place / 'o.json'}", f"wrote {place / 'o.html'}"]
    assert all(Path(line.split()[1]).is_absolute() for line in lines[21:])


def test_patch_writes_json(swept):
    text = (swept[0] / "o.json").read_text()
    found = json.loads(text)
    assert found.keys() >= KEYS and "NaN" not in text and "Infinity" not in text
    assert found["dims"] == ["layer", "head", "role"]
    assert found["coords"] == {"layer": [0, 1], "head": [0, 1, 2, 3], "role": ["B1", "END"]}
    assert (found["model"], found["site"], found["direction"]) == (PLANTED, "z", "denoise")
    assert (found["metric"], found["positions"], found["n_prompts"]) == ("logit-diff", "B1,END", 16)
    assert (found["bos"], found["seed"]) == (False, 3)
    effect = torch.tensor(found["effect"])
    assert effect.shape == (2, 4, 2) and effect[1, 2, 1] > 0.9 and effect[0, 2, 0] > 0.3
    assert torch.allclose(torch.tensor(found["per_prompt"]).mean(-1), effect, atol=1e-5)
    assert found["baseline"]["clean"] > 7 > -7 > found["baseline"]["corrupted"]
    assert any(value is None for row in found["control"] for cells in row for value in cells), "undefined is null"
    assert sorted(path.name for path in swept[0].iterdir()) == ["o.html", "o.json"]


def test_patch_writes_a_report(swept):
    page = (swept[0] / "o.html").read_text()
    assert "L1H2" in page and "patch planted-induction --task induction" in page
    assert "over prompts" in page and "http://" not in page.split("<script")[0]


def test_patch_from_a_file(pairs_file, tmp_path, capsys):
    file = pairs_file(PAIR, *[letters(shift) for shift in range(1, 10)])
    out = tmp_path / "o.json"
    flags = ["--positions", "roles", "--site", "resid_pre", "--direction", "noise", "--layers=-1", "--n", "8"]
    assert main(["patch", PLANTED, "--pairs", file, *flags, "--json", str(out)]) == 0
    assert "task: pairs, given, n=8" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["n_prompts"] == 8 and found["coords"] == {"layer": [1], "role": ["B1"]}
    assert found["direction"] == "noise" and found["dims"] == ["layer", "role"]


@pytest.mark.parametrize(
    "positions, dims, labels",
    [("all", [], None), ("last", [], None), ("each", ["pos"], list(range(8))), ("0,-1", ["pos"], [0, -1])],
)
def test_positions(pairs_file, tmp_path, positions, dims, labels):
    out = tmp_path / "o.json"
    file = pairs_file(PAIR, letters(5))
    assert main(["patch", PLANTED, "--pairs", file, f"--positions={positions}", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["dims"] == ["layer", "head", *dims] and found["coords"].get("pos") == labels


def test_undefined_is_null(pairs_file, tmp_path, capsys):
    same = {**PAIR, "corrupted": PAIR["clean"]}
    out = tmp_path / "o.json"
    argv = ["patch", PLANTED, "--pairs", pairs_file(same, same), "--json", str(out)]
    fails(capsys, *argv, says="the model does not do this task")
    assert main([*argv, "--force"]) == 0
    assert "undefined" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["effect"] == [[None] * 4] * 2 and found["threshold"] is None


# Bad input: an exit code, a message that names the fault, no traceback


def test_unknown_model(capsys):
    err = fails(capsys, "check", "planted-inductoin", says="cannot load the model 'planted-inductoin'")
    assert "Did you mean 'planted-induction'?" in err
    fails(capsys, "sites", "/nowhere/at/all", says="no such folder or GGUF file")


def test_unknown_names(capsys):
    patch = ["patch", PLANTED, "--task", "induction"]
    refused(capsys, *patch, "--site", "zz", says="invalid choice 'zz' for argument '--site'")
    refused(capsys, *patch, "--metric", "loss", says="invalid choice 'loss' for argument '--metric'")
    refused(capsys, *patch, "--direction", "up", says="invalid choice 'up' for argument '--direction'")
    refused(capsys, *patch, "--heads", "3", says="--heads")
    refused(capsys, "patch", says="MODEL")
    refused(capsys, "pach", PLANTED, says="pach")


def test_unknown_places(capsys):
    patch = ["patch", PLANTED, "--task", "induction", "--n", "4"]
    fails(capsys, *patch, "--layers", "7", says="this model has layers 0 … 1")
    fails(capsys, *patch, "--positions", "S2", says="roles: A1, B1, C1, D1, END")
    fails(capsys, *patch, "--positions", "99", says="position 99 is outside")
    fails(capsys, *patch, "--site", "mlp_out", says="has no site mlp_out")
    fails(capsys, *patch, "--device", "gpu", says="unknown device 'gpu'")
    fails(capsys, *patch, "--bos", says="a BOS was asked for")
    fails(capsys, *patch, "--revision", "main", says="only hub names have revisions")


def test_unknown_names_through_the_library():
    model = mi.load(PLANTED)
    for make, says in (
        (lambda: Site("resid_prr", 0), "did you mean 'resid_pre'"),
        (lambda: model.resolve(Site("z", 0, head=9)), "head is 0 … 3"),
        (lambda: model.resolve(Site("z", 5)), "layers 0 … 1"),
        (lambda: mi.evaluate(model, mi.tasks.induction(model, n=2), "loss"), "unknown metric 'loss'"),
    ):
        with pytest.raises(UserError, match=says):
            make()


def test_nan_in_a_patch_source():
    model = mi.load(PLANTED)
    source = torch.full((1, 3, 4, model.d_head), math.nan)
    with pytest.raises(UserError, match=r"source of a patch at .* holds NaN"):
        model([[1, 2, 3]], [mi.Patch(Site("z", 1), source)])


def test_pairs_that_cannot_be_read(capsys, pairs_file, tmp_path, monkeypatch):
    """Said before the model is loaded."""
    monkeypatch.setattr(inputs, "load", lambda *_, **__: pytest.fail("the model was loaded first"))
    patch = ["patch", PLANTED, "--pairs"]
    fails(capsys, *patch, str(tmp_path / "none.jsonl"), says="no such pairs file")
    fails(capsys, *patch, pairs_file(""), says="holds no pairs")
    fails(capsys, *patch, pairs_file("", "  "), says="holds no pairs")
    fails(capsys, *patch, pairs_file(PAIR, '{"clean": '), says="pairs.jsonl, line 2 is not JSON")
    fails(capsys, *patch, pairs_file("[1]"), says="line 1 must be an object")
    fails(capsys, *patch, pairs_file({**PAIR, "answr": "b"}), says="unknown fields ['answr']")
    fails(capsys, *patch, pairs_file({"clean": "a b"}), says="needs 'corrupted'")
    fails(capsys, *patch, pairs_file(PAIR), "--n", "2", says="holds 1 pairs")


def test_pairs_that_do_not_fit(capsys, pairs_file):
    patch = ["patch", PLANTED, "--pairs"]
    longer = {**PAIR, "corrupted": PAIR["corrupted"] + " e"}
    err = fails(capsys, *patch, pairs_file(PAIR, longer), says="pair 2: the clean side has 8 tokens, the corrupted 9")
    assert "x | a | b" in err
    err = fails(capsys, *patch, pairs_file({**PAIR, "answer": "b e"}), says="needs answers of one token")
    assert "'b' | 'e'" in err and "seq-logprob" in err
    fails(capsys, *patch, pairs_file({**PAIR, "roles": {"B1": 40}}), says="B1 is at token 40")


def test_a_longer_answer_by_teacher_forcing(pairs_file, tmp_path):
    out = tmp_path / "o.json"
    file = pairs_file({**PAIR, "answer": "b y"}, {**PAIR, "answer": "b y"})
    assert main(["patch", PLANTED, "--pairs", file, "--metric", "seq-logprob", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["metric"] == "seq-logprob"


def test_flags_that_contradict_each_other(capsys, pairs_file, monkeypatch):
    monkeypatch.setattr(inputs, "load", lambda *_, **__: pytest.fail("the model was loaded first"))
    induction = ["patch", PLANTED, "--task", "induction"]
    fails(capsys, "patch", PLANTED, says="either --pairs FILE or --task")
    fails(capsys, *induction, "--pairs", pairs_file(PAIR), says="either --pairs FILE or --task")
    fails(capsys, *induction, "--bos", "--no-bos", says="--bos and --no-bos were both given")
    fails(capsys, *induction, "--corruption", "new-names", says="is for --task ioi only")
    fails(capsys, *induction, "--n", "0", says="--n must be at least 1")
    fails(capsys, *induction, "--layers", "one", says="--layers takes numbers")


def test_outputs_that_cannot_be_written(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "load", lambda *_, **__: pytest.fail("the model was loaded first"))
    (tmp_path / "file").write_text("")
    patch = ["patch", PLANTED, "--task", "induction"]
    fails(capsys, *patch, "--json", str(tmp_path / "none" / "o.json"), says="there is no folder")
    fails(capsys, *patch, "--html", str(tmp_path / "file" / "o.html"), says="there is no folder")
    fails(capsys, *patch, "--json", str(tmp_path), says="it is a folder")
    same = str(tmp_path / "o")
    fails(capsys, *patch, "--json", same, "--html", same, says="two outputs would be written to")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    fails(capsys, "check", PLANTED, "--json", str(tmp_path / "o.json"), says="permission denied")
    with pytest.raises(UserError, match="permission denied"):
        check_outputs(tmp_path / "o.json")


def test_a_disk_that_fills_up(capsys, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sites, "write_json", full)
    fails(capsys, "sites", PLANTED, "--json", str(tmp_path / "o.json"), says="No space left on device")


def test_a_model_that_cannot_do_the_task(folder, capsys, pairs_file):
    wrong = {**PAIR, "answer": "d", "wrong": "b"}
    err = fails(capsys, "patch", PLANTED, "--pairs", pairs_file(wrong), says="the model does not do this task")
    assert "--force" in err
    words = {
        "ioi": "names", "greater-than": "nouns", "gendered-pronoun": "women's names", "agreement": "subjects",
        "docstring": "functions", "capitals": "people",
    }  # fmt: skip
    for task, needed in words.items():
        err = fails(capsys, "patch", folder, "--task", task, says="as single tokens")
        assert f" {needed}" in err, "each task asks for its own words"


def test_interrupted(capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(inputs, "load", interrupt)
    assert main(["sites", PLANTED]) == 130
    assert capsys.readouterr().err == "interrupted\n"
