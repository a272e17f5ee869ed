"""From a text file through a tiny model to autoencoders, stopped and resumed; and from a store of the same."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mechinterp import Site, load
from mechinterp.errors import UserError
from mechinterp.models.planted import LETTERS, word_tokenizer
from mechinterp.sae.activations import source as activations
from mechinterp.sae.activations.ahead import Ahead
from mechinterp.sae.activations.harvest import Harvest
from mechinterp.sae.activations.source import harvest_into, open_source
from mechinterp.sae.activations.store import Store
from mechinterp.sae.config import TrainConfig
from mechinterp.sae.formats import load as load_sae
from mechinterp.sae.training.distributed import Processes
from mechinterp.sae.training.train import train
from mechinterp.sae.training.trainer import Trainer
from tests.families import module

STEPS, BATCH = 24, 16


@pytest.fixture(scope="module")
def of(tmp_path_factory):
    """A tiny random Llama that knows the letters."""
    path = tmp_path_factory.mktemp("model")
    module("llama").save_pretrained(path)
    tokenizer = word_tokenizer((*LETTERS, "</s>"))
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.save_pretrained(path)
    return load(path, device="cpu")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """40 documents of 20 to 30 random words, two blank lines between them."""
    draw = random.Random(0)
    documents = [" ".join(draw.choices(LETTERS, k=draw.randint(20, 30))) for _ in range(40)]
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_text("\n\n\n".join(documents))
    return path


def settings(of, out: Path, **more) -> TrainConfig:
    made = {
        "model": of.info.name, "layer": (1,), "d_sae": 32, "k": 4, "n_tokens": STEPS * BATCH, "batch": BATCH,
        "buffer": 96, "context": 8, "harvest_blocks": 4, "held_out_every": 5, "log_every": 3, "eval_tokens": 30,
        "eval_every": 128, "checkpoint_every": 4 * BATCH, "dead_after": 32, "device": "cpu", "out": out,
    }  # fmt: skip
    return TrainConfig(**(made | more))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of every autoencoder of a run, by file."""
    found = sorted((folder / "sae").rglob("sae_weights.safetensors"))
    return {f"{path.parent.name} {name}": one for path in found for name, one in load_file(path).items()}


def stop_at(monkeypatch, moments: dict[object, list[int]]) -> None:
    """Let methods of these classes raise at their n-th calls, over all sessions."""
    for (owner, name), numbers in moments.items():
        real, calls = getattr(owner, name), []

        def counted(self, *args, real=real, calls=calls, numbers=numbers):
            calls.append(1)
            if len(calls) in numbers:
                raise RuntimeError("stopped")
            return real(self, *args)

        monkeypatch.setattr(owner, name, counted)


def resumed_until_done(config: TrainConfig, of, opened=open_source):
    """Sessions until the run ends, and how many."""
    for session in range(1, 10):
        try:
            return train(config, source=opened(config, of, Processes()), resume=True, progress=False), session
        except RuntimeError as error:
            assert str(error) == "stopped"
    raise AssertionError("it does not come to an end")


KINDS = {
    "two layers": {"layer": (0, 2)},
    "skip-transcoder": {"kind": "skip-transcoder", "site": "mlp_normed", "architecture": "batchtopk"},
    "crosscoder": {"kind": "crosscoder", "layer": (0, 2), "architecture": "standard", "sparsity": 0.1},
}


@pytest.mark.parametrize("name", KINDS)
def test_text_to_autoencoders_stopped_anywhere_ends_bit_for_bit_the_same(of, text, tmp_path, monkeypatch, name):
    whole = train(settings(of, tmp_path / "whole", text=(text,), **KINDS[name]), model=of, progress=False)
    draw = random.Random(name)
    moments = {(Trainer, "step"): sorted(draw.sample(range(6, 30), 2)), (Harvest, "chunk"): [draw.randint(14, 20)]}
    print({method: numbers for (_, method), numbers in moments.items()})
    stop_at(monkeypatch, moments)
    config = settings(of, tmp_path / "stopped", text=(text,), **KINDS[name])
    made, sessions = resumed_until_done(config, of)
    assert sessions >= 3 and made.saes.keys() == whole.saes.keys()
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert expected.keys() == found.keys()
    for key, one in expected.items():
        assert torch.equal(one, found[key]), key
    logs = [(tmp_path / one / "log.jsonl").read_text() for one in ("whole", "stopped")]
    assert logs[0] == logs[1]


def test_what_comes_of_it(of, text, tmp_path):
    """Two autoencoders in one pass, each of its site; a transcoder; a crosscoder: their shapes, and raw activations."""
    two = train(settings(of, tmp_path / "two", text=(text,), layer=(0, -1)), model=of, progress=False)
    assert [Site.from_hook(name) for name in two.saes] == [Site("resid_post", 0), Site("resid_post", 2)]
    with pytest.raises(UserError, match=r"trained 2: take one of \.saes"):
        _ = two.sae
    config = settings(of, tmp_path / "two", text=(text,), layer=(0, -1))
    source = open_source(config, of, Processes())
    for job in source.jobs:
        x, y = job.of(source.held_out)
        sae = two.saes[job.name]
        assert sae.metadata.reads == job.reads and sae.metadata.model == of.info.name
        error = float((y - sae(x).reconstruction).square().sum() / (y - y.mean(0)).square().sum())
        assert error == pytest.approx(two.held_out[job.name]["fvu"], rel=1e-4) and error < 1
        loaded = load_sae(tmp_path / "two/sae" / job.name)
        torch.testing.assert_close(loaded(x).reconstruction, sae(x).reconstruction)
    lines = [json.loads(line) for line in (tmp_path / "two/log.jsonl").read_text().splitlines()]
    assert lines[-1]["harvested"] >= STEPS * BATCH and lines[-1]["excluded"] > 0
    assert {f"fvu/{name}" for name in two.saes} <= lines[-1].keys()
    assert {f"held_out_fvu/{name}" for name in two.saes} <= lines[-1].keys()


def test_one_of_several_layers_trains_as_it_does_alone(of, text, tmp_path):
    both = train(settings(of, tmp_path / "both", text=(text,), layer=(0, 1)), model=of, progress=False)
    alone = train(settings(of, tmp_path / "alone", text=(text,), layer=(0,)), model=of, progress=False)
    name = next(iter(alone.saes))
    assert torch.equal(both.saes[name].W_dec, alone.sae.W_dec)


def test_harvest_ahead_changes_no_weight_and_leaves_no_thread(of, text, tmp_path, monkeypatch):
    """As with a model on a device of its own; interrupted while chunks are under way."""
    train(settings(of, tmp_path / "whole", text=(text,)), model=of, progress=False)
    opened = []

    def ahead(config, model, processes):
        source = open_source(config, model, processes)
        source.buffer.chunks = Ahead(source.buffer.chunks, 3)
        opened.append(source.buffer.chunks)
        return source

    stop_at(monkeypatch, {(Trainer, "step"): [9, 17], (Harvest, "chunk"): [16]})
    _, sessions = resumed_until_done(settings(of, tmp_path / "ahead", text=(text,)), of, ahead)
    assert sessions == 4
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "ahead")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not any(one._thread._threads for one in opened)


def test_a_store_of_the_same_settings_is_trained_on_and_resumed(of, text, tmp_path, monkeypatch):
    layers = {"layer": (0, 2)}
    written = harvest_into(settings(of, tmp_path / "no run", text=(text,), **layers), tmp_path / "store", 100, model=of)
    assert written.tokens == STEPS * BATCH and len(written.shards) == 4
    again = harvest_into(settings(of, tmp_path / "no run", text=(text,), **layers), tmp_path / "store", 100, model=of)
    assert again == written  # it was complete
    for number, kind in enumerate(({}, {"kind": "crosscoder"})):
        # More tokens than there are: a second pass.
        more = {"store": tmp_path / "store", "n_tokens": 2 * STEPS * BATCH, **layers, **kind}
        whole = train(settings(of, tmp_path / f"whole {number}", **more), progress=False)
        assert whole.held_out and next(iter(whole.saes.values())).metadata.weights_hash == of.weights_hash()
        with monkeypatch.context() as patch:
            stop_at(patch, {(Trainer, "step"): [7, 40]})
            config = settings(of, tmp_path / f"stopped {number}", **more)
            assert resumed_until_done(config, None)[1] == 3
        expected, found = weights(tmp_path / f"whole {number}"), weights(tmp_path / f"stopped {number}")
        assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("change", ["text", "seed", "held_out_every"])
def test_a_store_begun_is_not_finished_with_other_text(of, tmp_path, monkeypatch, change):
    path, draw = tmp_path / "t.txt", random.Random(1)

    def write():
        path.write_text("\n\n\n".join(" ".join(draw.choices(LETTERS, k=25)) for _ in range(40)))

    def harvest(**more):
        return harvest_into(settings(of, tmp_path / "no run", text=(path,), **more), tmp_path / "store", 50, model=of)

    write()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        stop_at(patch, {(Harvest, "chunk"): [6]})
        harvest()
    if change == "text":
        write()
    with pytest.raises(UserError, match="reading"):
        harvest(**{} if change == "text" else {change: 3})


def test_a_store_knows_whether_there_was_a_bos(of, text, tmp_path):
    harvest_into(settings(of, tmp_path / "no run", text=(text,)), tmp_path / "store", 200, model=of)
    source = open_source(settings(of, tmp_path / "run", store=tmp_path / "store"), None, Processes())
    assert source.jobs[0].metadata.bos is of.info.bos


def test_text_that_is_read_again_is_told(of, text, tmp_path, capsys):
    told = "note: the text is shorter than the training"
    train(settings(of, tmp_path / "a", text=(text,), n_tokens=150 * BATCH), model=of)
    assert told in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    assert lines[0]["epoch"] == 0 and lines[-1]["epoch"] >= 1


def test_a_store_without_held_out_activations_is_trained_on(of, text, tmp_path):
    config = settings(of, tmp_path / "no run", text=(text,))
    harvest_into(config, tmp_path / "store", 200, model=of)
    for path in (tmp_path / "store/held_out").iterdir():
        path.unlink()
    (tmp_path / "store/held_out").rmdir()
    made = train(settings(of, tmp_path / "run", store=tmp_path / "store"), progress=False)
    assert made.held_out == {} and len(weights(tmp_path / "run")) > 2


def test_a_store_of_something_else_is_refused(of, text, tmp_path):
    harvest_into(settings(of, tmp_path / "no run", text=(text,)), tmp_path / "store", 200, model=of)
    assert Store.open(tmp_path / "store").manifest.origin.model == of.info.name
    for more, message in (
        ({"layer": (0,)}, "does not fit: it has sites"),
        ({"layer": (-1,)}, "layers are counted from 0; found -1"),
        ({"model": "gpt2"}, f"is of the model {of.info.name}, not gpt2"),
        ({"context": 9}, "context 8; the settings ask for False, None, 9"),
        ({"keep_first": True}, "keep_first False"),
        ({"batch": 128, "buffer": 96}, "buffer must hold a batch"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            train(settings(of, tmp_path / "run", store=tmp_path / "store", **more), progress=False)
        assert "\n" not in str(caught.value)


def test_text_or_model_that_will_not_do_is_refused_before_anything_is_trained(of, text, tmp_path):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("")
    binary.write_bytes(bytes(range(256)))
    for more, message in (
        ({"layer": (7,)}, "layer"),
        ({"site": "resid_pots"}, "resid_post"),
        ({"site": "pattern"}, "pattern"),
        ({"layer": (2, -1)}, "layer names one twice"),
        ({"text": (empty,)}, "empty|no text"),
        ({"text": (binary,)}, "binary.txt"),
        ({"context": 1_000}, "context|positions|long"),
        ({"held_out_every": 41, "context": 30}, "held"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            train(settings(of, tmp_path / "run", **({"text": (text,)} | more)), model=of, progress=False)
        assert "\n" not in str(caught.value), more
    assert not (tmp_path / "run/config.json").exists()


def test_a_checkpoint_of_other_text_of_the_same_name_is_refused(of, text, tmp_path):
    changed = tmp_path / "letters.txt"
    changed.write_text(text.read_text())
    config = settings(of, tmp_path / "run", text=(changed,))
    train(config, model=of, progress=False)
    changed.write_text(text.read_text().replace("a", "b"))
    with pytest.raises(UserError, match="of another text hash"):
        train(config, model=of, resume=True, progress=False)


def test_the_manifest_names_text_and_weights(of, text, tmp_path):
    train(settings(of, tmp_path / "run", text=(text,)), model=of, progress=False)
    inputs = json.loads((tmp_path / "run/manifest.json").read_text())["inputs"]
    assert inputs["text"] == "letters.txt" and len(inputs["text hash"]) == 64
    assert inputs["model weights"] == of.weights_hash()
    assert activations.text_hash(settings(of, tmp_path)) == ""


def test_a_data_set_object_in_the_place_of_text_ends_as_its_file_does(of, text, tmp_path):
    import datasets

    rows = [{"text": one} for one in text.read_text().split("\n\n\n")]
    train(settings(of, tmp_path / "file", text=(text,)), model=of, progress=False)
    data = datasets.Dataset.from_list(rows)
    train(settings(of, tmp_path / "data"), model=of, data=data, progress=False)
    expected, found = weights(tmp_path / "file"), weights(tmp_path / "data")
    assert all(torch.equal(one, found[key]) for key, one in expected.items())
    with pytest.raises(UserError, match="no column"):
        train(settings(of, tmp_path / "wrong", column="body"), model=of, data=data, progress=False)
