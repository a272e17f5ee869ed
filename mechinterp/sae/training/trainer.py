"""One autoencoder in training: its step, what it counts, its state.

1. Activations are multiplied by the scale that the architecture's constants belong to.
2. The losses of this process's rows, in units of the whole batch; backward; gradients are summed over processes.
3. The decoder's gradient loses what only lengthens its rows, all gradients are clipped, Adam steps, rows go back to
   norm 1 (where the architecture holds them there).
4. Features that fired, in any process, are young again. The others grow older by the tokens of the batch; those older
   than `dead_after` are dead, and the TopK family revives them by AuxK.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mechinterp.sae.activations.chunks import under
from mechinterp.sae.autoencoder import Objective, Output, SparseAutoencoder, squared_error
from mechinterp.sae.config import TrainConfig
from mechinterp.sae.training.distributed import Processes

STATE = ("exp_avg", "exp_avg_sq", "step")  # of Adam, by parameter


class Trainer:
    """Trains `sae`, which holds weights for scaled activations until `finished`.

    Attributes:
        sae: on its device.
        config: resolved settings.
        scales: `[site]` factors of what is read and of what is reconstructed.
        steps: done.
        since_fired: `[feature]` tokens since each feature fired.
        broken: the first step whose loss or gradient was not finite; 0 if there was none.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        config: TrainConfig,
        scales: tuple[Tensor, Tensor],
        processes: Processes | None = None,
    ):
        device = sae.W_dec.device
        self.sae, self.config, self.processes = sae, config, processes or Processes()
        self.scales = tuple(one.to(device) for one in scales)
        self.steps = 0
        self.since_fired = torch.zeros(sae.config.d_sae, dtype=torch.long, device=device)
        self.broken = torch.zeros((), dtype=torch.long, device=device)
        if config.penalty == "tanh":
            sae.unit_norm = False  # norms are free, and weigh the penalty (Conerly et al. 2025)
        # Rajamanoharan et al. 2024, both papers; with the tanh penalty JumpReLU is Conerly et al.'s.
        no_momentum = config.architecture == "gated" or (config.architecture == "jumprelu" and config.penalty == "l0")
        self.optimizer = torch.optim.Adam(
            sae.parameters(),
            lr=config.learning_rate or 0.0,
            betas=(0.0 if no_momentum else 0.9, 0.999),
            fused=device.type in ("cpu", "cuda"),
        )
        self._sums: dict[str, Tensor] = {}
        self._counted = 0

    # The step

    def step(self, x: Tensor, y: Tensor | None = None) -> None:
        """One optimizer step.

        Args:
            x: `[batch d_in]` raw activations: this process's share of the batch.
            y: `[batch d_out]` what is to be reconstructed; `x` by default.
        """
        x, y = self.scaled(x, y)
        rate, sparsity = self.schedule(self.steps)
        self.optimizer.param_groups[0]["lr"] = rate
        objective = self._objective(y, sparsity)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.config.autocast):
            output = self.sae(x, y, objective)
        self.optimizer.zero_grad()
        output.loss.backward()
        self._gather_gradients()
        self.sae.project_gradient()
        norm = self._clip()
        self.optimizer.step()
        self.sae.renormalise()
        self._count(y, output, objective, norm)
        # Of the gradient as well: it is of all processes, and the weights of this step are made of it. The result
        # stays on the device: to look at it in every step would wait for the step.
        bad = (self.broken == 0) & ~torch.isfinite(output.loss.detach() + norm)
        self.broken = torch.where(bad, self.steps, self.broken)

    def scaled(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is read and what is reconstructed, in the units of training."""
        read = x * self._wide(0, x.shape[1])
        return read, read if y is None else y * self._wide(1, y.shape[1])

    def _wide(self, which: int, width: int) -> Tensor:
        scale = self.scales[which]
        return scale.repeat_interleave(width // len(scale))

    def schedule(self, step: int) -> tuple[float, float]:
        """Learning rate and sparsity coefficient of a step: up in a line, level, and (the rate) down in a line."""
        config, n = self.config, self.config.n_steps
        rise, fall = config.warm_up * n, config.decay * n
        factor = min(1.0, (step + 1) / rise) if rise else 1.0
        if fall:
            factor *= min(1.0, (n - step) / fall)
        sparsity_rise = (config.sparsity_warm_up or 0.0) * n
        sparsity = min(1.0, (step + 1) / sparsity_rise) if sparsity_rise else 1.0
        return factor * (config.learning_rate or 0.0), sparsity * (config.sparsity or 0.0)

    def _objective(self, y: Tensor, sparsity: float) -> Objective:
        processes, config = self.processes, self.config
        n = len(y) * processes.size
        mean = processes.sum(y.sum(0)) / n
        dead = None
        if config.k_aux and config.dead_after is not None:
            dead = (self.since_fired > config.dead_after).nonzero().flatten()
        return Objective(
            n=n,
            variance=processes.sum((y - mean).square().sum()),
            sparsity=sparsity,
            bandwidth=config.bandwidth or 0.0,
            penalty=config.penalty,
            pre_activation=config.pre_activation or 0.0,
            dead=dead,
            k_aux=config.k_aux or 0,
            aux=config.aux,
            gather=processes.gather if processes.size > 1 else None,
        )

    def _gather_gradients(self) -> None:
        for parameter in self.sae.parameters():
            if parameter.grad is not None:
                self.processes.sum(parameter.grad)

    def _clip(self) -> Tensor:
        """Bring the gradient to norm `clip` at most; the norm that it had."""
        parameters = [one for one in self.sae.parameters() if one.grad is not None]
        norm = torch.nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])
        # On the CPU to look is cheaper than to multiply by 1; elsewhere to look is to wait.
        if norm.device.type != "cpu" or norm > self.config.clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip, norm)
        return norm

    @torch.no_grad()
    def _count(self, y: Tensor, output: Output, objective: Objective, norm: Tensor) -> None:
        self.steps += 1
        fired = self.processes.any(output.codes.fired())
        self.since_fired += objective.n
        self.since_fired[fired] = 0
        found = {f"loss_{name}": value.detach() for name, value in output.losses.items()}
        found["fvu"] = squared_error(y, output.reconstruction.detach()) / objective.variance
        found["l0"] = output.codes.l0() / objective.n
        for name, value in found.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._counted += 1

    # What a log says

    def averages(self) -> dict[str, float]:
        """Loss terms, FVU and L0 since the last call, over all processes, and the share of dead features."""
        names, count = sorted(self._sums), self._counted
        if not count:
            return {}
        sums = self.processes.sum(torch.stack([self._sums[name] for name in names])) / count
        self._sums, self._counted = {}, 0
        made = dict(zip(names, sums.tolist(), strict=True))
        made["loss"] = sum(value for name, value in made.items() if name.startswith("loss_"))
        made["dead"] = float((self.since_fired > (self.config.dead_after or 0)).float().mean())
        return made

    @torch.no_grad()
    def held_out(self, x: Tensor, y: Tensor | None) -> dict[str, float]:
        """FVU and L0 of activations that were not trained on, chosen as at inference (by threshold, without a batch).

        Args:
            x: `[token d_in]` raw activations.
            y: `[token d_out]`; `x` by default.
        """
        missed, l0 = 0.0, 0
        read, wanted = self.scaled(x, y)
        for some, aim in zip(read.split(self.config.batch), wanted.split(self.config.batch), strict=True):
            output = self.sae(some)
            missed += float((aim - output.reconstruction).square().sum())
            l0 += int(output.codes.l0())
        variance = float((wanted - wanted.mean(0)).square().sum())
        return {"fvu": missed / variance if variance else math.nan, "l0": l0 / len(x)}

    # State

    def state_dict(self) -> dict[str, Any]:
        """What is the same in all processes, as a flat dict of tensors and plain values."""
        made: dict[str, Any] = {"steps": self.steps, "since_fired": self.since_fired}
        made |= {"scale_in": self.scales[0], "scale_out": self.scales[1]}
        made |= {f"weights.{name}": value for name, value in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            for part, value in self.optimizer.state.get(parameter, {}).items():
                made[f"adam.{part}.{name}"] = value
        return made

    def sums(self) -> dict[str, Any]:
        """What this process has summed up for the next line of the log."""
        return {"counted": self._counted} | {f"sum.{name}": value for name, value in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue, bit for bit, where `state_dict()` and this process's `sums()`, together, were taken."""
        device = self.sae.W_dec.device

        def here(prefix: str) -> dict[str, Any]:
            return {name: value.to(device) for name, value in under(prefix, state).items()}

        self.sae.load_state_dict(here("weights."))
        self.steps, self._counted = state["steps"], state["counted"]
        self.since_fired = state["since_fired"].to(device)
        self.scales = state["scale_in"].to(device), state["scale_out"].to(device)
        self._sums = here("sum.")
        parts = {part: here(f"adam.{part}.") for part in STATE}
        for name, parameter in self.sae.named_parameters():
            if name in parts["step"]:
                self.optimizer.state[parameter] = {part: parts[part][name].clone() for part in STATE}
