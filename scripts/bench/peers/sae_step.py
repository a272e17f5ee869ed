"""What the programs of sparse autoencoders share: weights and batch of the folder, and the calls.

    python PEER.py FOLDER        FOLDER holds weights.safetensors, x.safetensors and shape.json

`reconstruct` gives what the autoencoder makes of the batch with the weights as they were given. `step` takes `steps`
whole training steps with `threads` threads and gives their seconds; the weights move on.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from served import seconds, serve
from torch import Tensor

TOTAL = 1_000_000  # steps that schedules are made for


class Given:
    """The folder's: x `[batch d_in]`, weights as ours (W_enc `[feature d_in]`), d_in, d_sae, k."""

    def __init__(self) -> None:
        self.folder = Path(sys.argv[1])
        shape = json.loads((self.folder / "shape.json").read_text())
        self.d_in, self.d_sae, self.k = shape["d_in"], shape["d_sae"], shape["k"]
        self.x: Tensor = load_file(self.folder / "x.safetensors")["x"]
        self.weights: dict[str, Tensor] = load_file(self.folder / "weights.safetensors")


def stepping(steps_of: Callable[[int], float | None], reconstruct: Callable[[], Tensor]) -> None:
    """Serve both calls.

    Args:
        steps_of: takes so many steps; gives their seconds, or None where it is to be timed as a whole.
        reconstruct: `[batch d_in]` of the weights at hand.
    """

    def step(asked: dict) -> tuple[float, dict[str, Tensor]]:
        torch.set_num_threads(asked["threads"])
        start = seconds()
        spent = steps_of(asked["steps"])
        return seconds() - start if spent is None else spent, {"threads": torch.tensor(torch.get_num_threads())}

    def made(asked: dict) -> tuple[float, dict[str, Tensor]]:
        with torch.no_grad():
            return 0.0, {"reconstruction": reconstruct()}

    serve(Path(sys.argv[1]), {"step": step, "reconstruct": made})
