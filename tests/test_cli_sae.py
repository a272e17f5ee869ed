"""`mechinterp sae` from end to end, in process, on a planted model that reads letters, and its bad input."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mechinterp as mi
from mechinterp.cli import main
from mechinterp.cli import sae as flags
from mechinterp.models.load import DTYPES
from mechinterp.models.planted import LETTERS
from mechinterp.sae import config as settings
from mechinterp.sae.activations import store_format
from mechinterp.sae.architectures import ARCHITECTURES
from mechinterp.sae.formats import loading

# What issue and README promise of `sae evaluate --json`.
KEYS = {
    "l0", "fvu", "explained_variance", "ce_clean", "ce_spliced", "ce_zero", "ce_mean", "ce_recovered_zero",
    "ce_recovered_mean", "kl", "dead_fraction", "n_tokens", "ci",
}  # fmt: skip
SITE = ("--layer", "1", "--d-sae", "64", "--k", "4", "--learning-rate", "0.003")
SIZES = ("--n-tokens", "2048", "--batch", "256", "--buffer", "1024", "--eval-tokens", "512", "--context", "32")
SMALL = ("--model", "planted-induction", *SITE, *SIZES)
TRAIN = ("sae", "train", *SMALL, "--checkpoint-every", "512")


def write_letters(path: Path, n: int, seed: int) -> Path:
    """Documents of 80 letters: ten of them, again and again, which the model continues."""
    draw = np.random.default_rng(seed)
    tens = [" ".join(LETTERS[i] for i in draw.permutation(len(LETTERS))[:10]) for _ in range(n)]
    path.write_text("\n\n\n".join(" ".join(8 * [ten]) for ten in tens))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with text to train on, held-out text, a run that has ended, and a store of the same activations."""
    folder = tmp_path_factory.mktemp("sae")
    write_letters(folder / "train.txt", 60, 0)
    write_letters(folder / "held.txt", 20, 1)
    text = ("--text", str(folder / "train.txt"))
    assert main([*TRAIN, *text, "--out", str(folder / "run")]) == 0
    assert main(["sae", "harvest", *SMALL, *text, "--out", str(folder / "store"), "--shard-tokens", "1024"]) == 0
    return folder


@pytest.fixture
def text(place):
    return ("--text", str(place / "train.txt"))


@pytest.fixture
def held(place):
    return ("--text", str(place / "held.txt"))


def says(capsys, argv, *words):
    """The command ends with 2 and one line on stderr, which has these words."""
    capsys.readouterr()
    code = main(list(map(str, argv)))
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, (code, err)
    assert all(word in err for word in words), err


def refused(capsys, argv, *words):
    """The CLI library refuses a flag, in a box of its own."""
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and all(word in err for word in words) and "Traceback" not in err, err


# The grammar


def test_help_and_wrong_settings_need_no_torch():
    program = (
        "import sys\nfrom mechinterp.cli import main\n"
        "for action in ('train', 'evaluate', 'features', 'convert', 'harvest'):\n"
        "    try: main(['sae', action, '--help'])\n    except SystemExit as stop: assert stop.code == 0\n"
        "assert main(['sae', 'train', '--model', 'm', '--k', '100', '--d-sae', '64']) == 2\n"
        "heavy = {'torch', 'numpy', 'transformers', 'plotly', 'mechinterp.commands'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(mi.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: mechinterp sae ") == 5
    assert done.stderr == "error: k must be 1 … d_sae = 64; found 100\n"


def test_the_names_are_those_of_the_library():
    assert get_args(settings.Architecture) == tuple(ARCHITECTURES)
    assert set(settings.TOP_K) < set(ARCHITECTURES)
    assert get_args(settings.Dtype) == tuple(DTYPES)
    assert set(get_args(flags.SaeHarvest.__annotations__["store_dtype"])) == set(store_format.DTYPES)
    unscaled = {name.removesuffix("-tanh") for name in settings.DEFAULTS} - {"top-k"}
    assert unscaled | set(settings.TOP_K) == set(ARCHITECTURES), "every architecture has defaults"


def test_every_setting_is_a_flag_and_has_a_help():
    written = {one.name for one in fields(settings.TrainConfig)}
    assert {one.name for one in fields(flags.SaeTrain)} == written | {"resume"}
    assert {one.name for one in fields(flags.SaeHarvest)} == written | {"store_dtype", "shard_tokens"}


# From end to end


def test_a_resumed_run_ends_with_the_same_weights(place, text, tmp_path, capsys):
    shutil.copytree(place / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "sae")
    note = tmp_path / "run" / "manifest.json"
    note.write_text(
        json.dumps({name: value for name, value in json.loads(note.read_text()).items() if name != "finished"})
    )
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["tokens-000000001024", "tokens-000000001536"], "the last two are kept"
    assert main([*TRAIN, *text, "--out", str(tmp_path / "run"), "--resume"]) == 0
    said = capsys.readouterr().out
    assert "held-out FVU" in said and str(tmp_path / "run") in said
    before, after = (load_file(one / "run/sae/sae_weights.safetensors") for one in (place, tmp_path))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["tokens"] == 2048 and [line["tokens"] for line in lines] == sorted(
        line["tokens"] for line in lines
    )
    assert json.loads((tmp_path / "run" / "config.json").read_text())["k"] == 4


def test_a_run_that_has_ended_is_not_trained_again(place, text, capsys, monkeypatch):
    monkeypatch.setattr("mechinterp.sae.training.trainer.Trainer.step", pytest.fail)
    before = (place / "run/sae/sae_weights.safetensors").stat().st_mtime_ns
    assert main([*TRAIN, *text, "--out", str(place / "run"), "--resume"]) == 0
    assert "held-out FVU" in capsys.readouterr().out
    assert (place / "run/sae/sae_weights.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("folder", ["run", "run/sae"])
def test_evaluate_writes_what_was_promised(place, held, folder, tmp_path, capsys):
    out = tmp_path / "e.json"
    argv = ["sae", "evaluate", str(place / folder), *held, "--blocks", "16", "--json", str(out)]
    assert main(argv) == 0
    found = json.loads(out.read_text(), parse_constant=pytest.fail)  # no NaN
    assert found.keys() >= KEYS and found["command"].startswith("mechinterp sae evaluate")
    numbers = KEYS - {"ci", "n_tokens"}
    assert all(isinstance(found[name], float) for name in numbers) and numbers <= found["ci"].keys()
    assert found["l0"] == 4 and found["n_tokens"] == 16 * 31, "position 0 is left out"
    assert found["fvu"] == pytest.approx(1 - found["explained_variance"])
    low, high = found["ci"]["fvu"]
    assert low < found["fvu"] < high
    said = capsys.readouterr().out
    assert "16 blocks of 32 tokens" in said and "documents" in said and "not held out" not in said


def test_text_that_was_trained_on_is_told(place, text, held, tmp_path, capsys):
    told = "it was trained on text of the name train.txt; these numbers are not held out"
    for given, note in ((text, told), (held, "")):
        argv = ["sae", "evaluate", str(place / "run"), *given, "--blocks", "4", "--json", str(tmp_path / "e.json")]
        assert main(argv) == 0
        assert json.loads((tmp_path / "e.json").read_text())["note"] == note
        assert (told in capsys.readouterr().out) == bool(note)


def test_a_long_document_does_not_stand_for_all(place, tmp_path, capsys):
    """Intervals are over documents: of each of them come four blocks at most."""
    short = (place / "held.txt").read_text().split("\n\n\n")
    (tmp_path / "t.txt").write_text("\n\n\n".join([" ".join(10 * [short[0]]), *short[1:9]]))
    assert main(["sae", "evaluate", str(place / "run"), "--text", str(tmp_path / "t.txt"), "--blocks", "20"]) == 0
    assert "20 blocks of 32 tokens, 9 documents" in capsys.readouterr().out


def test_text_in_another_column(place, tmp_path, capsys):
    lines = tmp_path / "t.jsonl"
    halves = (place / "held.txt").read_text().split("\n\n\n")
    lines.write_text("\n".join(json.dumps({"body": half}) for half in halves))
    argv = ["sae", "evaluate", str(place / "run"), "--text", str(lines), "--blocks", "4"]
    says(capsys, argv, "line 1: expected a JSON object with a text in 'text'; found the fields body")
    assert main([*argv, "--column", "body"]) == 0


def test_features_as_a_page_and_as_data(place, held, tmp_path, capsys):
    page, data = tmp_path / "f.html", tmp_path / "f.json"
    argv = ["sae", "features", str(place / "run"), *held, "--html", str(page), "--json", str(data)]
    assert main([*argv, "--n", "6"]) == 0
    found = json.loads(data.read_text(), parse_constant=pytest.fail)
    assert len(found["features"]) == 6 and found["features"][0]["contexts"] and found["d_sae"] == 64
    shown = page.read_text()
    assert "mechinterp sae features" in shown and 'src="http' not in shown and 'href="http' not in shown
    assert main([*argv, "--features", "3", "5"]) == 0
    assert [one["feature"] for one in json.loads(data.read_text())["features"]] == [3, 5]
    assert "wrote" in capsys.readouterr().out


def test_convert_there_and_back(place, tmp_path, capsys):
    there, back = tmp_path / "sparsify", tmp_path / "back"
    assert main(["sae", "convert", str(place / "run"), "--to", "sparsify", "--out", str(there)]) == 0
    assert {path.name for path in there.iterdir()} >= {"cfg.json", "sae.safetensors"}
    assert main(["sae", "convert", str(there), "--out", str(back)]) == 0
    assert "(saelens)" in capsys.readouterr().out
    x = torch.randn(8, 280)
    ours, theirs = (loading.load(folder)(x) for folder in (place / "run", back))
    torch.testing.assert_close(ours.reconstruction, theirs.reconstruction)
    torch.testing.assert_close(ours.features, theirs.features)


def test_train_from_a_store(place, tmp_path, capsys):
    out = tmp_path / "run"
    argv = [*TRAIN, "--store", str(place / "store"), "--out", str(out)]
    assert main(argv) == 0
    sae = mi.sae.load(out)
    assert sae.metadata.model == "planted-induction" and sae.metadata.reads == ("blocks.1.hook_resid_post",)
    assert sae.metadata.text == "train.txt" and sae.metadata.context == 32
    assert main(["sae", "harvest", *SMALL, "--text", str(place / "train.txt"), "--out", str(place / "store"),
                 "--shard-tokens", "1024"]) == 0, "a store that is whole is left as it is"  # fmt: skip
    assert "2,048 tokens" in capsys.readouterr().out


def test_several_layers_and_a_transcoder(place, text, tmp_path, capsys):
    out = tmp_path / "two"
    asked = list(TRAIN)
    at = asked.index("--layer")
    asked[at + 1 : at + 2] = ["0", "1"]
    assert main([*asked, *text, "--out", str(out)]) == 0
    assert {path.name for path in (out / "sae").iterdir()} == {"blocks.0.hook_resid_post", "blocks.1.hook_resid_post"}
    says(capsys, ["sae", "evaluate", out, *text], "no autoencoder in", "sae/blocks.0.hook_resid_post", "name one")
    assert main(["sae", "evaluate", str(out / "sae/blocks.0.hook_resid_post"), *text, "--blocks", "4"]) == 0
    between = ("--kind", "transcoder", "--site", "resid_pre", "--target", "resid_post")
    assert main([*TRAIN, *text, *between, "--out", str(tmp_path / "t")]) == 0
    assert mi.sae.load(tmp_path / "t").metadata.writes == ("blocks.1.hook_resid_post",)


@pytest.mark.real_model
def test_on_the_real_model(smollm2, tmp_path, monkeypatch, capsys):
    from mechinterp.commands import inputs
    from mechinterp.sae.activations import source as activations

    for module in (inputs, activations):
        monkeypatch.setattr(module, "load", lambda *args, **kwargs: smollm2)
    out = tmp_path / "run"
    topics = mi.text.documents(mi.text.BUILT_IN)[0]
    files = {"train.txt": slice(6, 40), "held.txt": slice(6)}
    for name, part in files.items():
        (tmp_path / name).write_text("\n\n\n".join(topics[part]))
    at = ("--model", "smollm2-135m", "--layer", "9", "--d-sae", "64", "--k", "4", "--text", str(tmp_path / "train.txt"))
    assert main(["sae", "train", *at, *SIZES, "--out", str(out)]) == 0
    text = tmp_path / "held.txt"
    argv = ["sae", "evaluate", str(out), "--text", str(text), "--blocks", "4", "--json", str(tmp_path / "e.json")]
    assert main(argv) == 0
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["n_tokens"] == 4 * 31 and found["ce_zero"] > found["ce_clean"] and 0 < found["fvu"] < 1.2
    assert main(["sae", "features", str(out), "--text", str(text), "--blocks", "4", "--n", "4"]) == 0
    assert "promotes" in capsys.readouterr().out


# Bad input: exit code 2 and one line

# name: flags of `sae train` beside the small ones, what the line must say
BAD_TRAIN = {
    "unknown site": (["--site", "resid_past"], ["unknown site 'resid_past'", "'resid_post'"]),
    "layer beyond the model": (["--layer", "7"], ["layer 7", "layers 0 … 1"]),
    "prefixes that do not divide": (
        ["--architecture", "matryoshka", "--d-sae", "60"],
        ["d_sae 60 cannot be divided", "0.0625", "a multiple of 16"],
    ),
    "k above d_sae": (["--k", "100"], ["k must be 1 … d_sae = 64; found 100"]),
    "negative learning rate": (["--learning-rate", "-1"], ["learning_rate must be above 0", "found -1.0"]),
    "text and data set": (["--dataset", "x/y"], ["one of text, dataset and store; found text and dataset"]),
    "autocast on cpu": (["--autocast", "--device", "cpu"], ["autocast is for CUDA"]),
    "context beyond the model": (["--context", "100"], ["100", "2 … 64"]),
    "unknown model": (["--model", "no-such-model"], ["no-such-model"]),
}


@pytest.mark.parametrize("name", BAD_TRAIN)
def test_bad_settings(name, text, tmp_path, capsys):
    wrong, words = BAD_TRAIN[name]
    says(capsys, [*TRAIN, *text, *wrong, "--out", tmp_path / "run"], *words)
    assert not (tmp_path / "run" / "sae").exists()


BAD_TEXT = {
    "empty": ("t.txt", b"", "holds no text"),
    "white space": ("t.txt", b" \n\n\n\n ", "holds no text"),
    "binary": ("t.txt", bytes(range(256)), "valid: UTF-8 text or JSON lines"),
    "zeros": ("t.txt", b"a\0b", "it is binary; valid: UTF-8 text or JSON lines"),
    "without the column": ("t.jsonl", b'{"body": "a"}\n', "a text in 'text'; found the fields body"),
    "no JSON": ("t.jsonl", b"a b c\n", "line 1: expected a JSON object"),
    "a number": ("t.jsonl", b'{"text": 3}\n', "'text' must be a text; found 3"),
    "too short": ("t.txt", b"a b c", "tokens"),
}


@pytest.mark.parametrize("command", ["train", "harvest", "evaluate", "features"])
@pytest.mark.parametrize("name", BAD_TEXT)
def test_bad_text(name, command, place, tmp_path, capsys):
    file, content, words = BAD_TEXT[name]
    (tmp_path / file).write_bytes(content)
    start = (*SMALL, "--out", tmp_path / "run") if command in ("train", "harvest") else (place / "run",)
    says(capsys, ["sae", command, *start, "--text", tmp_path / file], words, "" if name == "too short" else file)


def test_a_missing_text(place, tmp_path, capsys):
    for start in ([*TRAIN, "--out", tmp_path / "x"], ["sae", "evaluate", place / "run"]):
        says(capsys, [*start, "--text", tmp_path / "no.txt"], "no such text file", "no.txt")


def test_a_store_of_something_else(place, tmp_path, capsys):
    argv = [*TRAIN, "--store", place / "store", "--out", tmp_path / "x"]
    says(capsys, [*argv, "--layer", "0"], "has sites blocks.1.hook_resid_post, not blocks.0.hook_resid_post")
    says(capsys, [*argv, "--site", "resid_pre"], "blocks.1.hook_resid_post, not blocks.1.hook_resid_pre")
    says(capsys, [*argv, "--model", "planted-or"], "is of the model planted-induction, not planted-or")
    says(capsys, [*argv, "--context", "16"], "context 32; the settings ask for", "16")
    says(capsys, [*argv, "--layer", "-1"], "layers are counted from 0")
    says(capsys, [*argv, "--n-tokens", "4096", "--seed", "1", "--store", place], "is no store of activations")
    damaged = tmp_path / "store"
    shutil.copytree(place / "store", damaged)
    shard = sorted(damaged.glob("shard-*"))[0]
    shard.write_bytes(shard.read_bytes()[:-64])
    says(capsys, [*TRAIN, "--store", damaged, "--out", tmp_path / "y"], shard.name)


def test_a_store_cannot_be_continued_with_other_settings(place, text, tmp_path, capsys):
    argv = ["sae", "harvest", *SMALL, *text]
    says(capsys, [*argv, "--out", place / "store", "--context", "16"], "was begun with context 32, not 16")
    says(capsys, argv, "give the folder to write activations to: --out FOLDER")
    says(capsys, [*argv, "--out", place / "train.txt"], "cannot write", "train.txt is a file")
    says(capsys, [*argv, "--out", tmp_path / "s", "--shard-tokens", "0"], "--shard-tokens must be at least 1; found 0")
    store = ["--store", place / "store", "--out", tmp_path / "s"]
    says(capsys, ["sae", "harvest", *SMALL, *store], "--store is for sae train")


def test_a_checkpoint_of_other_settings(place, text, held, capsys):
    argv = [*TRAIN, *text, "--out", place / "run"]
    says(capsys, argv, "run holds a run already", "--resume", "another folder")
    says(capsys, [*argv, "--resume", "--k", "5"], "of other settings: k 4, not 5")
    says(capsys, [*TRAIN, *held, "--out", place / "run", "--resume"], "of other settings: text", "held.txt")


def test_a_text_that_has_changed(place, tmp_path, capsys):
    """The same name with other words in it."""
    shutil.copytree(place / "run", tmp_path / "run")
    config, text = tmp_path / "run" / "config.json", tmp_path / "train.txt"
    shutil.copy(place / "train.txt", text)
    argv = [*TRAIN, "--text", text, "--out", tmp_path / "new"]
    assert main(list(map(str, argv))) == 0
    write_letters(text, 60, 7)
    says(capsys, [*argv, "--resume"], "of another text hash")
    assert config.is_file()


class _Runs:
    """What a pickle that wants to run code looks like."""

    def __reduce__(self):
        return os.mkdir, (os.environ["MECHINTERP_TEST_PWNED"],)


def test_a_pickle_that_wants_to_run_code(held, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "ae"
    folder.mkdir()
    mark = tmp_path / "ran"
    monkeypatch.setenv("MECHINTERP_TEST_PWNED", str(mark))
    trainer = {"dict_class": "AutoEncoderTopK", "k": 4, "layer": 1, "lm_name": "planted-induction"}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    (folder / "ae.pt").write_bytes(pickle.dumps(_Runs()))
    says(capsys, ["sae", "evaluate", folder, *held], "ae.pt")
    torch.save(_Runs(), folder / "ae.pt")
    says(capsys, ["sae", "evaluate", folder, *held], "ae.pt")
    says(capsys, ["sae", "convert", folder, "--out", tmp_path / "x"], "ae.pt")
    assert not mark.exists() and not (tmp_path / "x").exists()


def test_what_is_no_autoencoder(place, held, tmp_path, capsys):
    (tmp_path / "none").mkdir()
    for action in ("evaluate", "features"):
        says(capsys, ["sae", action, tmp_path / "none", *held], "no autoencoder in", "sae_weights.safetensors")
        says(capsys, ["sae", action, place / "held.txt", *held], "is a file; give the folder")
    says(capsys, ["sae", "convert", tmp_path / "none", "--out", tmp_path / "x"], "no autoencoder in")
    says(capsys, ["sae", "convert", tmp_path / "nowhere", "--out", tmp_path / "x"], "there is no folder", "nowhere")
    broken = tmp_path / "broken"
    shutil.copytree(place / "run" / "sae", broken)
    (broken / "sae_weights.safetensors").write_bytes(b"not at all")
    says(capsys, ["sae", "evaluate", broken, *held], "sae_weights.safetensors")


def test_an_autoencoder_of_another_model(place, held, capsys):
    argv = [place / "run", *held, "--model", "planted-or"]
    says(capsys, ["sae", "evaluate", *argv], "was trained on planted-induction; the model here is planted-or")
    says(capsys, ["sae", "features", *argv], "was trained on planted-induction; the model here is planted-or")


def test_bad_flags_of_evaluate_and_features(place, held, tmp_path, capsys):
    run = ["sae", "evaluate", place / "run"]
    says(capsys, run, "give the text: either --text FILE … or --dataset NAME")
    says(capsys, [*run, *held, "--dataset", "x/y"], "either --text FILE … or --dataset NAME")
    says(capsys, [*run, *held, "--blocks", "0"], "--blocks must be at least 1; found 0")
    says(capsys, [*run, *held, "--length", "1"], "--length must be at least 2; found 1")
    says(capsys, [*run, *held, "--length", "900"], "blocks of 900 tokens", "2 … 64")
    says(capsys, [*run, *held, "--json", tmp_path / "no" / "e.json"], "there is no folder")
    says(capsys, [*run, *held, "--json", tmp_path], "it is a folder")
    features = ["sae", "features", place / "run", *held]
    says(capsys, [*features, "--n", "0"], "--n must be at least 1; found 0")
    says(capsys, [*features, "--features", "64"], "0 … 63; found 64")
    says(capsys, [*features, "--html", tmp_path / "no" / "f.html"], "there is no folder")
    same = tmp_path / "same"
    says(capsys, [*features, "--html", same, "--json", same], "two outputs would be written to")


def test_outputs_that_cannot_be_written(place, text, tmp_path, capsys):
    file = place / "train.txt"
    says(capsys, [*TRAIN, *text, "--out", file], "cannot write", "train.txt is a file")
    says(capsys, [*TRAIN, *text, "--out", file / "run"], "cannot write", "train.txt is a file")
    convert = ["sae", "convert", place / "run", "--out"]
    says(capsys, [*convert, tmp_path / "no" / "x"], "there is no folder above it")
    says(capsys, [*convert, file], "train.txt")
    says(capsys, [*convert, place / "run"], "holds other things than an autoencoder")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):
        return  # root may write anywhere
    says(capsys, [*TRAIN, *text, "--out", locked / "run"], "no permission to write into")
    says(capsys, [*convert, locked / "x"], "locked")


def test_choices_are_refused_by_the_parser(text, capsys):
    refused(capsys, [*TRAIN, *text, "--architecture", "top-k"], "--architecture", "batchtopk")
    refused(capsys, ["sae", "convert", "x", "--out", "y", "--to", "npz"], "--to", "sparsify")
    refused(capsys, ["sae", "train"], "--model")
