"""A row of interop.sh's table: how far two computations of the same lie apart."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

TOLERANCE = 1e-5


def row(direction: str, peer: str, folder: Path, features: Tensor, reconstruction: Tensor) -> bool:
    """Print it; whether both lie within `TOLERANCE` of the folder's `expected.safetensors`."""
    wanted = load_file(folder / "expected.safetensors")
    made = {"features": features, "reconstruction": reconstruction}
    gaps = {name: float((value - wanted[name]).abs().max() / wanted[name].abs().max()) for name, value in made.items()}
    fine = all(gap <= TOLERANCE for gap in gaps.values())
    shown = "".join(f" {gap:{width}.1e}" for gap, width in zip(gaps.values(), (12, 15), strict=True))
    print(f"{direction:20} {peer:22} {folder.name:26}{shown}{'' if fine else '   TOO FAR'}", flush=True)
    return fine
