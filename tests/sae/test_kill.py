"""A run that is killed at any moment, and resumed each time, ends as one that never stopped.

This file is also a script, `test_kill.py FOLDER SEED`: it imports the package once (without the shape checks of the
tests), and forks a process for each session, so that many can be killed in little time. It prints the moments.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

STEPS, BATCH, EVERY = 240, 16, 30  # a checkpoint after so many steps
# Where a session stops, to be killed: in a checkpoint, in the removal of an old one, at the start, at the end.
PLACES = ("half a file", "between the parts", "before the rename", "while an old one is removed", "the log", "the sae")


def settings(folder: Path):
    from mechinterp.sae.config import TrainConfig

    return TrainConfig(
        model="toy", architecture="batchtopk", d_sae=48, k=2, n_tokens=STEPS * BATCH, batch=BATCH, buffer=128,
        dead_after=64, log_every=1, eval_tokens=64, eval_every=500, checkpoint_every=EVERY * BATCH, device="cpu",
        out=folder,
    )  # fmt: skip


def session(folder: Path, place: str = "", told: int = -1) -> None:
    """Train, or continue, until the end or until it is killed; it waits for that at a place, if one is named.

    Without a place it writes a byte into `told` for every step, and does not hurry.
    """
    from mechinterp.sae.activations.source import synthetic_source
    from mechinterp.sae.toys.known_dictionary import KnownDictionary
    from mechinterp.sae.training import train as training
    from mechinterp.sae.training.trainer import Trainer

    if place:
        stop_at(place, told)
    elif told >= 0:
        step = Trainer.step

        def slow(self, *batch):
            os.write(told, b".")
            time.sleep(0.004)
            step(self, *batch)

        Trainer.step = slow
    made = settings(folder)
    source = synthetic_source(KnownDictionary(64, 8, density=0.05), made)
    training.train(made, source=source, resume=True, progress=False)


def stop_at(place: str, told: int) -> None:
    """Let this process say so, and wait, when it comes to the place."""
    from mechinterp.sae.training import checkpoints

    save_file, write_part = checkpoints.save_file, checkpoints.write_part
    replace, rmtree = os.replace, shutil.rmtree

    def wait():
        os.write(told, b"!")
        time.sleep(1_000)

    def save_half(tensors, path):
        save_file(tensors, path)
        os.truncate(path, path.stat().st_size // 2)
        wait()

    def part(folder, name, state):
        if name.startswith("source"):
            wait()
        write_part(folder, name, state)

    def rename(source, target):
        name = Path(target).name
        if (place, name[:7]) in {("before the rename", "tokens-"), ("the log", "log.jso"), ("the sae", "sae")}:
            wait()
        replace(source, target)

    def remove(path, ignore_errors=False):
        if Path(path).exists():
            next(Path(path).iterdir()).unlink()
            wait()
        rmtree(path, ignore_errors)

    if place == "half a file":
        checkpoints.save_file = save_half
    elif place == "between the parts":
        checkpoints.write_part = part
    elif place == "while an old one is removed":
        shutil.rmtree = remove
    else:
        os.replace = rename


def forked(*args) -> int:
    process = os.fork()
    if process:
        return process
    try:
        session(*args)
    except BaseException:  # noqa: BLE001 (a fork must not go on with what its parent does)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def told_by(folder: Path, place: str = "") -> tuple[int, int]:
    """A session, and where to read what it tells."""
    read, write = os.pipe()
    process = forked(folder, place, write)
    os.close(write)
    return process, read


def end(process: int, read: int) -> None:
    os.kill(process, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(process, 0)[1]), "it ended before it could be killed"
    os.close(read)


def killed_at_random(folder: Path, rng: random.Random) -> str:
    """A session that is killed some steps and milliseconds after its checkpoint."""
    process, read = told_by(folder)
    n, milliseconds = rng.randint(2, 2 * EVERY), rng.randint(0, 20)
    for _ in range(n):
        assert os.read(read, 1) == b".", "it ended before it could be killed"
    time.sleep(milliseconds / 1_000)
    end(process, read)
    return f"{milliseconds} ms into step {n} of its own"


def killed_at(folder: Path, place: str) -> str:
    """A session that is killed where it waits for it."""
    process, read = told_by(folder, place)
    assert os.read(read, 1) == b"!", f"it never came to the place: {place}"
    aside = [path.name for path in folder.rglob(".partial-*")]
    assert aside, f"nothing was under way: {place}"
    end(process, read)
    return f"{place}: {', '.join(aside)}"


def main(folder: Path, seed: int) -> None:
    # Before the forks, once for all.
    from mechinterp.sae.activations import source  # noqa: F401
    from mechinterp.sae.toys import known_dictionary  # noqa: F401
    from mechinterp.sae.training import train  # noqa: F401

    rng, moments = random.Random(seed), []
    assert os.waitpid(forked(folder / "whole"), 0)[1] == 0
    middle = list(PLACES[:-1])
    rng.shuffle(middle)
    for number, place in enumerate(["", *middle, "", PLACES[-1]]):
        made = killed_at(folder / "killed", place) if place else killed_at_random(folder / "killed", rng)
        moments.append(f"session {number} was killed: {made}")
    assert os.waitpid(forked(folder / "killed"), 0)[1] == 0
    print(json.dumps(moments))


def test_killed_at_any_moment_and_resumed_the_weights_are_the_same_to_the_byte(tmp_path):
    command = [sys.executable, "-W", "error", __file__, str(tmp_path), "0"]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        command, cwd=root, env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    moments = json.loads(done.stdout.splitlines()[-1])
    print("\n".join(moments))  # shown if what follows fails
    assert len(moments) == len(PLACES) + 2
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for name in ("sae/sae_weights.safetensors", "sae/cfg.json", "sae/sparsity.safetensors", "log.jsonl"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    steps = [json.loads(line)["step"] for line in (killed / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    assert not [path for path in killed.rglob("*") if path.name.startswith(".")]
    assert len(list((killed / "checkpoints").iterdir())) == 2
    manifest = json.loads((killed / "manifest.json").read_text())
    assert manifest["finished"] and manifest["seconds"] > 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
