"""Training: a known dictionary is recovered, every stop is resumed bit for bit, bad input is refused in one line."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mechinterp.errors import UserError
from mechinterp.sae.activations.source import synthetic_source
from mechinterp.sae.config import TrainConfig
from mechinterp.sae.formats import load
from mechinterp.sae.toys.known_dictionary import KnownDictionary
from mechinterp.sae.training import checkpoints as checkpoints_module
from mechinterp.sae.training import start
from mechinterp.sae.training.distributed import Processes
from mechinterp.sae.training.train import train
from mechinterp.sae.training.trainer import Trainer

TOY = KnownDictionary(24, 8, density=0.08)


def config(out: Path, **more) -> TrainConfig:
    settings = {
        "model": "toy", "d_sae": 32, "k": 2, "n_tokens": 2_560, "batch": 64, "buffer": 512, "log_every": 7,
        "eval_tokens": 256, "eval_every": 512, "checkpoint_every": 640, "device": "cpu", "out": out,
    }  # fmt: skip
    return TrainConfig(**(settings | more))


def run(settings: TrainConfig, resume: bool = False):
    return train(settings, source=synthetic_source(TOY, settings), resume=resume, progress=False)


KINDS = [
    {"architecture": "topk"},
    {"architecture": "batchtopk"},
    {"architecture": "matryoshka", "prefixes": (0.25, 0.5, 1.0)},
    {"architecture": "standard", "sparsity": 0.1},
    {"architecture": "gated"},
    {"architecture": "jumprelu"},
    {"architecture": "jumprelu", "penalty": "tanh", "sparsity": 0.1},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_a_run_writes_a_folder_that_loads_and_learns(tmp_path, kind):
    settings = config(tmp_path / "run", learning_rate=1e-2, **kind)
    made = run(settings)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert lines[-1]["tokens"] == 2_560 and lines[-1]["step"] == 40
    evaluations = [line["held_out_fvu"] for line in lines if "held_out_fvu" in line]
    assert len(evaluations) == 5 and evaluations[-1] < 0.9 * evaluations[0]
    loaded = load(tmp_path / "run")
    x = synthetic_source(TOY, settings).held_out["toy"]
    torch.testing.assert_close(loaded(x).reconstruction, made.sae(x).reconstruction)
    error = (x - made.sae(x).reconstruction).square().sum() / (x - x.mean(0)).square().sum()
    assert float(error) == pytest.approx(made.held_out["toy"]["fvu"], rel=1e-4)  # scales are folded in
    assert json.loads((tmp_path / "run/manifest.json").read_text())["finished"]


def weights(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path / "sae/sae_weights.safetensors")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_a_run_that_is_stopped_and_resumed_ends_bit_for_bit_the_same(tmp_path, kind, monkeypatch):
    run(config(tmp_path / "whole", **kind))
    settings = config(tmp_path / "stopped", **kind)
    step, steps = Trainer.step, []

    def dies(self, *batch):
        steps.append(1)
        if len(steps) in (17, 30):
            raise KeyboardInterrupt
        step(self, *batch)

    monkeypatch.setattr(Trainer, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        run(settings)
    with pytest.raises(KeyboardInterrupt):
        run(settings, resume=True)
    run(settings, resume=True)
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    logs = [(tmp_path / one / "log.jsonl").read_text() for one in ("whole", "stopped")]
    assert logs[0] == logs[1]


def test_a_resumed_run_without_a_checkpoint_begins_anew(tmp_path):
    run(config(tmp_path / "one"))
    run(config(tmp_path / "two"), resume=True)
    pairs = zip(weights(tmp_path / "one").values(), weights(tmp_path / "two").values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_only_the_last_checkpoints_are_kept(tmp_path):
    run(config(tmp_path, keep=2, checkpoint_every=256))
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        "tokens-000000002048",
        "tokens-000000002304",
    ]


def test_another_run_in_the_same_folder_is_refused(tmp_path):
    run(config(tmp_path))
    with pytest.raises(UserError, match="holds a run already"):
        run(config(tmp_path))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    run(config(tmp_path))
    with pytest.raises(UserError, match="other settings: d_sae 32, not 48, k 2, not 3"):
        run(config(tmp_path, d_sae=48, k=3), resume=True)
    run(config(tmp_path, keep=5, log_every=10, eval_every=0, eval_tokens=64), resume=True)  # no weight depends on these


def test_a_checkpoint_of_another_source_is_refused(tmp_path):
    settings = config(tmp_path)
    run(settings)
    other = synthetic_source(replace(TOY, density=0.1), settings)
    with pytest.raises(UserError, match="of another dictionary"):
        train(settings, source=other, resume=True, progress=False)


def test_a_damaged_checkpoint_is_passed_over_and_the_end_is_the_same(tmp_path, capsys):
    run(config(tmp_path / "whole"))
    run(config(tmp_path / "damaged"))
    newest = sorted((tmp_path / "damaged/checkpoints").iterdir())[-1] / "training.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    (tmp_path / "damaged/manifest.json").unlink()  # which says that it has ended
    run(config(tmp_path / "damaged"), resume=True)
    assert "training.safetensors is damaged" in capsys.readouterr().out
    pairs = zip(weights(tmp_path / "whole").values(), weights(tmp_path / "damaged").values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_damaged_checkpoint_does_not_push_a_good_one_out(tmp_path):
    run(config(tmp_path, keep=2))
    old, newest = sorted((tmp_path / "checkpoints").iterdir())
    (newest / "training.safetensors").write_bytes(b"")
    store = checkpoints_module.Checkpoints(tmp_path / "checkpoints", keep=1)
    found = store.newest()
    assert found is not None and found[0] == old and not newest.exists()
    assert newest.with_name(f"damaged-{newest.name}").is_dir()  # what it holds is not thrown away
    written = store.write(found[1]["tokens"] + 64, found[1], found[2])
    assert store.paths() == [written] and store.newest() is not None


def test_held_out_activations_too_few_to_measure_on(tmp_path):
    for rows in (0, 1):
        source = synthetic_source(TOY, config(tmp_path))
        source.hold_out = lambda rows=rows: {"toy": torch.zeros(rows, 8)}
        with pytest.raises(UserError, match=f"need at least 2 tokens; found {rows}"):
            train(config(tmp_path), source=source, progress=False)
    assert not (tmp_path / "config.json").exists()


def test_a_tracker_that_does_not_start(tmp_path, monkeypatch):
    class Tracker:
        @staticmethod
        def init(**_):
            raise OSError("no key\nlog in first")

    monkeypatch.setitem(sys.modules, "wandb", Tracker)
    with pytest.raises(UserError, match="the tracker wandb did not start: no key; valid without one: tracker='none'"):
        run(config(tmp_path, tracker="wandb"))
    run(config(tmp_path), resume=True)


def test_momentum_is_that_of_the_papers(tmp_path):
    betas = {}
    for kind in KINDS:
        settings = config(tmp_path, **kind)
        trainer = start.trainers_of(settings, synthetic_source(TOY, settings), Processes())["toy"]
        betas["-".join(map(str, kind.values()))] = trainer.optimizer.param_groups[0]["betas"][0]
    assert [name for name, beta in betas.items() if not beta] == ["gated", "jumprelu"]


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    real, calls = checkpoints_module.save_file, []

    def full(tensors, path, *more):
        calls.append(1)
        if len(calls) == 4:  # the source's part of the second checkpoint
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path, *more)

    monkeypatch.setattr(checkpoints_module, "save_file", full)
    with pytest.raises(UserError, match=r"No space left on device; the last good one is .*tokens-000000000640"):
        run(config(tmp_path))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["tokens-000000000640"]


def test_a_loss_that_is_not_finite_stops_and_names_the_step(tmp_path, monkeypatch):
    step, steps = Trainer.step, []

    def spoiled(self, x, y):
        steps.append(1)
        step(self, x * torch.inf if len(steps) == 13 else x, y)

    monkeypatch.setattr(Trainer, "step", spoiled)
    with pytest.raises(UserError, match=r"not finite at step 13; the last good checkpoint is .*tokens-000000000640"):
        run(config(tmp_path))


def test_autocast_is_refused_on_the_cpu(tmp_path):
    with pytest.raises(UserError, match="autocast is for CUDA"):
        run(config(tmp_path, autocast=True))


def test_tokens_beyond_the_last_whole_batch_are_not_trained_on(tmp_path):
    made = run(config(tmp_path, n_tokens=1_000))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert (lines[-1]["step"], lines[-1]["tokens"]) == (15, 960) and made.sae.metadata.n_tokens == 960


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "file").write_text("")
    settings = config(tmp_path / "file/run")
    source = synthetic_source(TOY, settings)
    with pytest.raises(UserError, match=r"cannot write a run into .*file/run: Not a directory"):
        train(settings, source=source, progress=False)
    assert source.buffer.chunks.state_dict()["next"] == 0


def test_a_disk_that_is_full_for_the_log_is_told_in_one_line(tmp_path, monkeypatch):
    def full(*args, **more):
        raise OSError(28, "No space left on device")

    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args, **more: (full if self.name == "log.jsonl" and "a" in args
                                                                   else opened)(self, *args, **more))  # fmt: skip
    with pytest.raises(UserError, match=r"cannot write .*log\.jsonl: No space left on device"):
        run(config(tmp_path))


def test_another_run_without_a_checkpoint_is_not_written_over(tmp_path):
    run(config(tmp_path, checkpoint_every=0))
    before = weights(tmp_path)["W_dec"]
    with pytest.raises(UserError, match="holds a run without a checkpoint of other settings: seed 0, not 1"):
        run(config(tmp_path, checkpoint_every=0, seed=1), resume=True)
    run(config(tmp_path, checkpoint_every=0), resume=True)
    assert torch.equal(weights(tmp_path)["W_dec"], before)


def test_no_held_out_activations_and_no_evaluations(tmp_path):
    settings = config(tmp_path)
    source = replace(synthetic_source(TOY, settings), hold_out=dict)
    assert train(settings, source=source, progress=False).held_out == {}
    assert "held_out" not in (tmp_path / "log.jsonl").read_text()


def test_a_source_of_another_batch_is_refused(tmp_path):
    source = synthetic_source(TOY, config(tmp_path, batch=32))
    with pytest.raises(UserError, match="gives batches of 32 tokens; the settings ask for 64"):
        train(config(tmp_path), source=source, progress=False)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_activations_that_no_scale_fits_are_refused(tmp_path, monkeypatch, value):
    monkeypatch.setattr(KnownDictionary, "directions", lambda self: torch.full((24, 8), value))
    with pytest.raises(UserError, match="no scale fits them"):
        run(config(tmp_path))


def test_a_step_whose_gradient_is_not_finite_is_not_kept(tmp_path, monkeypatch):
    """The loss is finite, and the weights after this step would not be: the last step of all shows it nowhere else."""
    total, steps = torch.nn.utils.get_total_norm, []

    def spoiled(gradients):
        steps.append(1)
        return total(gradients) * (torch.nan if len(steps) == 40 else 1)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", spoiled)
    with pytest.raises(UserError, match="not finite at step 40; the last good checkpoint is"):
        run(config(tmp_path))
    assert not (tmp_path / "sae").exists()


def test_a_run_that_has_ended_is_loaded(tmp_path, monkeypatch):
    made = run(config(tmp_path))
    monkeypatch.setattr(Trainer, "step", lambda *_: pytest.fail("it trained again"))
    again = run(config(tmp_path), resume=True)
    assert again.held_out == made.held_out and torch.equal(again.sae.W_dec, made.sae.W_dec)
