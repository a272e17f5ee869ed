"""The settings that every experiment has: which model, with or without BOS, where, and the folder of the runs."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import tyro

import mechinterp as mi
from mechinterp.cli import Switch

C = TypeVar("C")


@dataclass(frozen=True)
class Settings:
    """Settings of a run; the same settings always have the same run folder."""

    model: str = "smollm2-135m"
    """Name, folder or GGUF file of the model."""
    seed: int = 0
    """Of the prompts, intervals and controls."""
    bos: Switch = False
    """Put a BOS in front. Without --bos and --no-bos: exactly where the model's own tokenizer adds one."""
    no_bos: Switch = False
    """Put no BOS in front."""
    device: str | None = None
    """cpu or cuda; by default cuda where there is one."""
    dtype: str = "float32"
    """float32, float16 or bfloat16."""
    root: str = field(default="runs", metadata={"in_id": False})
    """Folder of all runs."""

    def load(self) -> mi.HookedModel:
        """The model; settings and header are printed.

        Raises:
            UserError: flags that contradict each other, or a model that cannot be loaded.
        """
        if self.bos and self.no_bos:
            raise mi.UserError("--bos and --no-bos were both given; give one, or neither for the tokenizer's own")
        bos = True if self.bos else False if self.no_bos else None
        model = mi.load(self.model, bos=bos, device=self.device, dtype=self.dtype)
        print(f"{self}\n{model.header()}\n", flush=True)
        return model

    def command(self, script: str) -> str:
        """The command line that makes the same run: every setting of its folder that is not the default."""
        return command(self, script)


def command(config: Any, script: str) -> str:
    """The command line that makes the same run, of any dataclass of settings."""
    given = ["python", f"experiments/{Path(script).name}"]
    for one in fields(config):
        value = getattr(config, one.name)
        if value != one.default and one.metadata.get("in_id", True):
            words = [str(part) for part in value] if isinstance(value, tuple) else [str(value)]
            given += [f"--{one.name.replace('_', '-')}", *([] if value is True else words)]
    return shlex.join(given)


def finished(path: Path) -> None:
    """The last lines of every experiment: where its folder and its report are."""
    print(f"\nreport, figures and results in {path.parent}\n{path}", flush=True)


def command_line(main: Callable[[C], Path], config: type[C], description: str | None) -> None:
    """An experiment as a program. Bad input is one line and exit code 2, as with `mechinterp`."""
    try:
        main(tyro.cli(config, description=description))
    except mi.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
