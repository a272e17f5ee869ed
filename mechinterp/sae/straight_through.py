"""Steps whose gradients are not their derivatives: JumpReLU and the count of what is on.

The threshold's gradient is estimated from the pre-activations in a window of width ε around it, with a box of width 1
as the kernel K. Under the L0 penalty pre-activations have passed a ReLU. What it holds at 0 is in no window, however
wide (`positive`), so that the step can stay sparse. In the paper's listing it is in the window once θ < ε / 2; above
that the two are the same.

Rajamanoharan et al. 2024, "Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders",
equations 10 to 12.
"""

from typing import Any

import torch
from torch import Tensor


class JumpReLUFunction(torch.autograd.Function):
    """z · 1[z > θ]; the gradient at θ is −(θ / ε) K((z − θ) / ε)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float, positive: bool) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth, ctx.positive = bandwidth, positive
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        z, threshold = ctx.saved_tensors
        window = _window(z, threshold, ctx.bandwidth, ctx.positive)
        to_threshold = -threshold / ctx.bandwidth * window * grads[0]
        return grads[0] * (z > threshold), _as(to_threshold, threshold), None, None


class StepFunction(torch.autograd.Function):
    """1[z > θ]; the gradient at θ is −(1 / ε) K((z − θ) / ε), and none reaches z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        z, threshold = ctx.saved_tensors
        to_threshold = -_window(z, threshold, ctx.bandwidth, True) / ctx.bandwidth * grads[0]
        return None, _as(to_threshold, threshold), None


def _window(z: Tensor, threshold: Tensor, bandwidth: float, positive: bool) -> Tensor:
    inside = (z - threshold).abs() < bandwidth / 2
    return (inside & (z > 0) if positive else inside).to(z.dtype)


def _as(grad: Tensor, threshold: Tensor) -> Tensor:
    """The gradient at a threshold that was broadcast over rows is their sum."""
    return grad if grad.shape == threshold.shape else grad.sum(0)
