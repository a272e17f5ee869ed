"""What a training run says while it runs: a JSON-lines file, a progress bar, a tracker if one is asked for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from mechinterp.errors import UserError, one_line
from mechinterp.files import write_text
from mechinterp.results import plain
from mechinterp.sae.config import TrainConfig

SHOWN = ("loss", "fvu", "l0", "dead")  # on the bar


class RunLog:
    """Writes `log.jsonl` in a run's folder: one object a line, with `step` and `tokens`."""

    def __init__(self, folder: Path, config: TrainConfig, tokens: int, progress: bool):
        """Lines after `tokens`, of a session that died, are dropped: they will be written again."""
        self.path = folder / "log.jsonl"
        kept = [line for line in _lines(self.path) if line["tokens"] <= tokens]
        try:
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        self._repeats = any(line.get("epoch") for line in kept)  # said before
        self._tracker = _start_tracker(config, folder)
        self._bar = tqdm(
            total=config.n_steps * config.batch, initial=tokens, unit="token", unit_scale=True, desc="training",
            disable=not progress,
        )  # fmt: skip

    def advance(self, tokens: int) -> None:
        """Move the bar, whose own rate and time left are in tokens."""
        self._bar.update(tokens)

    def write(self, step: int, tokens: int, values: Mapping[str, Any]) -> None:
        """One line."""
        line = plain({"step": step, "tokens": tokens, **values})
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        if values.get("epoch") and not self._repeats:
            self._repeats = True
            self._bar.write("note: the text is shorter than the training, and is read again; the log counts epochs")
        if self._tracker is not None:
            self._tracker.log(dict(line), step=step)
        shown = {name: values[name] for name in SHOWN if isinstance(values.get(name), float)}
        if shown:
            text = ", ".join(
                f"{name} {value:.1%}" if name == "dead" else f"{name} {value:.4g}" for name, value in shown.items()
            )
            self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """End the bar and the tracker's run."""
        self._bar.close()
        if self._tracker is not None:
            self._tracker.finish()


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole: the last one of a killed process may not be."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def _start_tracker(config: TrainConfig, folder: Path) -> Any:
    """A run of trackio or wandb, which share their interface; None if none was asked for."""
    if config.tracker == "none":
        return None
    try:
        tracker = __import__(config.tracker)
    except ImportError:
        raise UserError(
            f"the tracker {config.tracker} is not installed; pip install 'mechinterp[tracking]', or tracker='none'"
        ) from None
    try:
        return tracker.init(project=config.project, name=config.run_name or folder.name, config=config.to_json())
    except Exception as error:  # whatever a tracker raises: no key, no network, a full disk
        raise UserError(
            f"the tracker {config.tracker} did not start: {one_line(error)}; valid without one: tracker='none'"
        ) from error
