"""Two processes against one with the same batches, on gloo: gradients, losses, weights, dead features; a whole run.

All is done by one pair of processes, which `pair` starts: this file is also their script. They write what they found
into a folder, the first of them also what it finds when it is alone, and the tests look at it. (To start a process
costs more than all that it does here, and without the shape checks of the tests it does that sooner.)
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

D, FEATURES, BATCH, STEPS = 6, 32, 32, 200
KINDS = {
    "topk": {"k": 2},
    "batchtopk": {"k": 2},
    "matryoshka": {"k": 2, "prefixes": (0.25, 1.0)},
    "standard": {"sparsity": 0.3},
    "gated": {"sparsity": 0.1},
    "jumprelu": {"threshold": 0.05, "bandwidth": 0.05, "sparsity": 0.02},
}
BRIEFLY = ("matryoshka", "gated")  # 20 steps: their relatives are trained for longer
REVIVED = ("topk", "batchtopk", "matryoshka")


def settings(architecture: str, **more):
    from mechinterp.sae.config import TrainConfig

    kind = {"model": "toy", "architecture": architecture, "d_sae": FEATURES, **KINDS[architecture]}
    size = {"n_tokens": STEPS * BATCH, "batch": BATCH, "buffer": 256, "learning_rate": 3e-3, "dead_after": 4 * BATCH}
    return TrainConfig(**kind, **size, k_aux=4 if architecture in REVIVED else None, device="cpu", **more)


def batches(n: int) -> list[torch.Tensor]:
    """`[batch d_in]` of a known dictionary, the same in every process."""
    from mechinterp.sae.toys.known_dictionary import KnownDictionary

    chunks = KnownDictionary(24, D, density=0.1).chunks(BATCH, seed=3)
    return [chunks.chunk()["toy"] for _ in range(n)]


def steps_of(architecture: str, processes) -> dict[str, torch.Tensor]:
    """Train on this process's rows: the first gradients, all losses, the last weights, the ages of the features."""
    from mechinterp.sae.architectures import make
    from mechinterp.sae.autoencoder import SAEConfig
    from mechinterp.sae.training.trainer import Trainer

    config = settings(architecture, clip=1e9).resolved(D)  # gradients are looked at as they were
    shape = SAEConfig(architecture, D, FEATURES, k=KINDS[architecture].get("k"),
                      prefixes=config.prefix_sizes() if architecture == "matryoshka" else ())  # fmt: skip
    sae = make(shape, seed=0, threshold=config.threshold)
    with torch.no_grad():
        if sae.b_enc is not None:
            sae.b_enc[: FEATURES // 4] -= 3.0  # these never fire: AuxK has something to revive
    one = torch.ones(1)
    trainer = Trainer(sae, config, (one, one), processes)
    found, losses, chosen, dead, terms = {}, [], [], [], set()
    count = trainer._count

    def counted(y, output, *more):
        if not trainer.steps:
            found.update({f"gradient.{name}": one.grad.clone() for name, one in sae.named_parameters()})
            found["chosen.0"] = output.codes.dense().detach()
        terms.update(output.losses)
        count(y, output, *more)

    trainer._count = counted
    for batch in batches(20 if architecture in BRIEFLY else STEPS):
        trainer.step(batch[processes.rank :: processes.size])
        log = trainer.averages()
        for values, name in ((losses, "loss"), (chosen, "l0"), (dead, "dead")):
            values.append(log[name])
    assert ("auxk" in terms) == (architecture in REVIVED), terms
    found |= {"losses": torch.tensor(losses), "l0": torch.tensor(chosen), "dead": torch.tensor(dead)}
    found |= {"since_fired": trainer.since_fired} | {f"weights.{name}": one for name, one in sae.state_dict().items()}
    return {name: one.detach().clone() for name, one in found.items()}


def all_steps(processes) -> dict[str, torch.Tensor]:
    return {f"{kind}.{name}": one for kind in KINDS for name, one in steps_of(kind, processes).items()}


def write(found: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: one.contiguous() for name, one in found.items()}, path)


def gathered(processes) -> dict[str, torch.Tensor]:
    """Values of unequal numbers; none at one of them; none at all."""
    rank, found = processes.rank, {}
    for name, n in (("unequal", 3 - 2 * rank), ("one has none", 2 * rank), ("nobody has any", 0)):
        found[f"gather.{name}"] = processes.gather(torch.arange(n) + 10.0 * rank)
    found["sum"] = processes.sum(torch.tensor([1.0 + rank]))
    found["any"] = processes.any(torch.tensor([rank == 1, False]))
    found["broadcast"] = processes.broadcast(torch.tensor([5.0 + rank]))
    return found


def whole_run(folder: Path, processes, resume: bool = False, stop: int | None = None):
    """A run through `train`, stopped by an exception at a step."""
    from mechinterp.sae.activations.source import synthetic_source
    from mechinterp.sae.toys.known_dictionary import KnownDictionary
    from mechinterp.sae.training.train import train
    from mechinterp.sae.training.trainer import Trainer

    made = settings("batchtopk", out=folder, eval_tokens=64, checkpoint_every=20 * BATCH, log_every=7)
    made = replace(made, n_tokens=80 * BATCH, eval_every=9 * BATCH)
    step = Trainer.step

    def stopped(self, *batch):
        if self.steps == stop:
            raise KeyboardInterrupt
        step(self, *batch)

    Trainer.step = stopped
    try:
        train(
            made, source=synthetic_source(KnownDictionary(24, D, density=0.1), made, processes), resume=resume,
            progress=False,
        )  # fmt: skip
    except KeyboardInterrupt:
        assert stop is not None
    finally:
        Trainer.step = step


def refusals(folder: Path, processes) -> dict[str, str]:
    """What goes wrong in one process must be told in both, and hang none."""
    from mechinterp.errors import UserError
    from mechinterp.sae.training import checkpoints, run, trainer

    found = {}

    def told(name, do):
        try:
            do()
            found[name] = "no error"
        except UserError as error:
            found[name] = str(error)

    def full(tensors, path):
        raise OSError(28, "No space left on device")

    save_file, write_json, isfinite = checkpoints.save_file, run.write_json, torch.isfinite
    for name, broken in (("disk of the first", 0), ("disk of the second", 1)):
        if processes.rank == broken:
            checkpoints.save_file = full
        told(name, lambda name=name: whole_run(folder / name, processes))
        checkpoints.save_file = save_file
    (folder / "a file").write_text("")
    told("no folder", lambda: whole_run(folder / "a file" / "run", processes))
    if processes.rank == 0:
        run.write_json = lambda path, value: full({}, path)
    told("no config", lambda: whole_run(folder / "no config", processes))
    run.write_json = write_json
    if processes.rank == 1:
        trainer.torch.isfinite = lambda x: isfinite(x) & False
    told("nan in the second", lambda: whole_run(folder / "nan", processes))
    trainer.torch.isfinite = isfinite
    told("a batch of 33", lambda: processes.share(33))
    return found


def damaged(folder: Path, processes) -> None:
    """A checkpoint whose second part is damaged: both must go on from the one before."""
    newest = max((folder / "checkpoints").glob("tokens-*"))
    if processes.first:
        part = newest / "source-1.safetensors"
        part.write_bytes(part.read_bytes()[:-1] + b"!")
    processes.wait()
    whole_run(folder, processes, resume=True)


def main(folder: Path) -> None:
    from mechinterp.sae.training.distributed import Processes

    processes = Processes.started()
    assert Processes.started() == processes and processes.size == 2
    write(gathered(processes) | all_steps(processes), folder / f"found-{processes.rank}.safetensors")
    if processes.first:
        write(all_steps(Processes()), folder / "alone.safetensors")
    whole_run(folder / "whole", processes)
    whole_run(folder / "stopped", processes, stop=33)
    whole_run(folder / "stopped", processes, resume=True, stop=70)
    damaged(folder / "stopped", processes)
    (folder / f"refused-{processes.rank}.json").write_text(json.dumps(refusals(folder, processes)))


# ---- the tests -----------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """The folder that two processes have written; they end without a warning, by themselves."""
    folder, root = tmp_path_factory.mktemp("pair"), str(Path(__file__).parents[2])
    there = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
    there |= {"MASTER_PORT": str(free_port()), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "error", __file__, str(folder)]
    both = [
        subprocess.Popen(command, env=there | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    try:
        said = [one.communicate(timeout=300)[1] for one in both]
    finally:
        for one in both:
            one.kill()
    assert [one.returncode for one in both] == [0, 0], "\n".join(said)
    assert not any("Warning" in one for one in said), said
    return folder


@pytest.fixture(scope="module")
def found(pair):
    return [load_file(pair / f"found-{rank}.safetensors") for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(pair):
    found = load_file(pair / "alone.safetensors")
    return {architecture: under(f"{architecture}.", found) for architecture in KINDS}


def under(prefix, values):
    return {name.removeprefix(prefix): one for name, one in values.items() if name.startswith(prefix)}


def relative(found, expected):
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


@pytest.mark.parametrize("architecture", KINDS)
def test_the_first_gradients_are_those_of_one_process(found, alone, architecture):
    expected = under("gradient.", alone[architecture])
    assert len(expected) >= 3
    for rank in (0, 1):
        gradients = under(f"{architecture}.gradient.", found[rank])
        assert gradients.keys() == expected.keys()
        for name, one in expected.items():
            assert relative(gradients[name], one) < 1e-5, (rank, name)
    assert float(expected["W_enc"].norm()) > 0


@pytest.mark.parametrize("architecture", KINDS)
def test_the_loss_curve_is_that_of_one_process(found, alone, architecture):
    expected = alone[architecture]
    if architecture not in BRIEFLY:  # it learns
        assert float(expected["losses"][-20:].mean()) < 0.9 * float(expected["losses"][:20].mean())
    for rank in (0, 1):
        torch.testing.assert_close(found[rank][f"{architecture}.losses"], expected["losses"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[rank][f"{architecture}.l0"], expected["l0"], rtol=1e-3, atol=2 / BATCH)


@pytest.mark.parametrize("architecture", KINDS)
def test_dead_features_are_counted_over_all_processes(found, alone, architecture):
    expected = alone[architecture]
    for rank in (0, 1):
        assert torch.equal(found[rank][f"{architecture}.dead"], expected["dead"])
        assert torch.equal(found[rank][f"{architecture}.since_fired"], expected["since_fired"])
    if architecture in REVIVED:
        assert float(expected["dead"].max()) >= 0.25  # there were some to revive


@pytest.mark.parametrize("architecture", KINDS)
def test_both_end_with_the_same_weights(found, architecture):
    first, second = (under(f"{architecture}.weights.", one) for one in found)
    assert first.keys() == second.keys()
    for name, one in first.items():
        assert torch.equal(one, second[name]), name


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
def test_batchtopk_chooses_over_the_whole_batch(found, alone, architecture):
    expected = alone[architecture]["chosen.0"]
    assert int((expected > 0).sum()) == 2 * BATCH
    both = torch.zeros_like(expected)
    for rank in (0, 1):
        both[rank::2] = found[rank][f"{architecture}.chosen.0"]
    assert torch.equal(both > 0, expected > 0)
    shares = [int((found[rank][f"{architecture}.chosen.0"] > 0).sum()) for rank in (0, 1)]
    assert shares[0] != shares[1]  # else the choice within each process would do as well
    threshold = found[0][f"{architecture}.weights.threshold"]
    torch.testing.assert_close(threshold, alone[architecture]["weights.threshold"], rtol=1e-4, atol=0)


def test_gather_sum_any_broadcast(found):
    for one in found:
        assert one["gather.unequal"].tolist() == [0, 1, 2, 10]
        assert one["gather.one has none"].tolist() == [10, 11]
        assert one["gather.nobody has any"].tolist() == []
        assert one["sum"].tolist() == [3] and one["any"].tolist() == [True, False] and one["broadcast"].tolist() == [5]


def test_a_run_of_two_is_resumed_bit_for_bit_from_parts_of_both(pair):
    whole, stopped = pair / "whole", pair / "stopped"
    parts = {path.name for path in max((whole / "checkpoints").iterdir()).iterdir()}
    assert parts == {
        f"{name}.{kind}" for name in ("training", "source-0", "source-1") for kind in ("json", "safetensors")
    }
    sources = [load_file(max((whole / "checkpoints").iterdir()) / f"source-{rank}.safetensors") for rank in (0, 1)]
    assert not torch.equal(sources[0]["rows.toy"], sources[1]["rows.toy"])  # each harvests its own
    for name in ("sae/sae_weights.safetensors", "sae/sparsity.safetensors", "log.jsonl"):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes(), name
    assert not list(pair.rglob(".partial-*"))


def test_a_damaged_part_of_one_process_is_passed_over_by_both(pair):
    # `stopped` was last resumed behind a damaged part: going on from two checkpoints, they would not have ended.
    sessions = json.loads((pair / "stopped/manifest.json").read_text())["sessions"]
    assert sessions == 3


def test_what_fails_in_one_process_is_told_in_both(pair):
    first, second = (json.loads((pair / f"refused-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    for name in ("disk of the first", "disk of the second", "no config"):
        assert "No space left on device" in first[name], name
    assert "cannot write a run into" in first["no folder"]
    assert "not finite at step 1;" in first["nan in the second"]
    assert "a batch of 33 tokens cannot be divided among 2 processes" in first["a batch of 33"]
    assert not list((pair / "disk of the second/checkpoints").iterdir())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
