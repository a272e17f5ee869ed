"""sparsify's sparse coder (PyPI eai-sparsify 1.3.3), trained by its own `Trainer.fit`. See sae_step.py.

    python sparsify.py FOLDER

Its trainer takes activations from hooks on a model, so it gets a model whose only module gives the batch, at no cost. A
step is what lies between two calls of that model: selecting tokens, the step, and its counts. It takes Adam, as the
others do; all else is as it comes (no gradient clipping, no AuxK). Without Triton, on the CPU, it decodes by
`embedding_bag`.
"""

import contextlib
import os
import sys
from types import SimpleNamespace

os.environ["TQDM_DISABLE"] = "1"

# This file has the name of the package; its folder is not where that is to be looked for.
sys.path.append(sys.path.pop(0))

import torch
from sae_step import Given, stepping
from served import seconds
from sparsify import SparseCoderConfig, TrainConfig, Trainer
from torch import Tensor, nn
from torch.utils.data import Dataset


class Same(Dataset):
    """Items that say nothing, one a step."""

    def __init__(self, n: int, n_tokens: int):
        self.n, self.tokens = n, torch.zeros(n_tokens, dtype=torch.long)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens}

    def select(self, which: range) -> "Same":
        """What comes after the steps that were done."""
        return Same(len(which), len(self.tokens))


class Site(nn.Module):
    """Gives the batch."""

    def __init__(self, x: Tensor):
        super().__init__()
        self.x = x[None]  # [1 pos d_in]

    def forward(self, tokens: Tensor) -> Tensor:
        return self.x


class Model(nn.Module):
    """A model of one module, which notes when it is called."""

    def __init__(self, x: Tensor):
        super().__init__()
        self.site, self.device, self.calls = Site(x), torch.device("cpu"), list[float]()
        self.config, self.dummy_inputs = SimpleNamespace(num_hidden_layers=1), {"input_ids": torch.zeros(1, 1)}

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        self.calls.append(seconds())
        return self.site(input_ids)


def main() -> None:
    """Serve."""
    given = Given()
    model = Model(given.x)
    settings = TrainConfig(
        SparseCoderConfig(num_latents=given.d_sae, k=given.k),
        batch_size=1, optimizer="adam", hookpoints=["site"], log_to_wandb=False, exclude_tokens=[-1],
    )  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        trainer = Trainer(settings, Same(1, len(given.x)), model)  # type: ignore[arg-type]
    trainer.save = lambda: None  # it writes the weights at the end
    coder = trainer.saes["site"]
    with torch.no_grad():
        coder.encoder.weight.copy_(given.weights["W_enc"])
        coder.encoder.bias.copy_(given.weights["b_enc"])
        coder.W_dec.copy_(given.weights["W_dec"])
        coder.b_dec.copy_(given.weights["b_dec"])

    def steps(n: int) -> float:
        # One more than is timed: the last call is the end of the step before it.
        trainer.dataset = Same(trainer.global_step + n + 1, len(given.x))
        model.calls.clear()
        with contextlib.redirect_stdout(sys.stderr):
            trainer.fit()
        return model.calls[-1] - model.calls[0]

    stepping(steps, lambda: coder(given.x).sae_out)


if __name__ == "__main__":
    main()
