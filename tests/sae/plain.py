"""Every architecture once more, from the papers' equations: dense matrices, autograd, one function a paper.

Straight-through estimators are written as `value + (slope · (θ − θ.detach()))`: the second term is 0, its gradient is
not. Nothing here is shared with the package; weights come as a dict by the names of its parameters.
"""

from dataclasses import dataclass, field

import torch


@dataclass
class Made:
    features: torch.Tensor
    reconstruction: torch.Tensor
    losses: dict[str, torch.Tensor] = field(default_factory=dict)


def run(
    name, p, x, y, *, centred, n_sites=1, k=0, prefixes=(), sparsity=0.0, penalty="l0", bandwidth=1.0,
    pre_activation=0.0, dead=None, k_aux=0, aux=0.0,
):  # fmt: skip
    """Features, reconstruction and loss terms of a batch."""
    read = x - p["b_dec"] if centred else x
    pre = torch.einsum("bd,fd->bf", read, p["W_enc"])
    if "b_enc" in p:
        pre = pre + p["b_enc"]
    if name == "standard":
        return standard(p, x, y, pre, n_sites, sparsity)
    if name == "gated":
        return gated(p, x, y, pre, n_sites, sparsity)
    if name == "jumprelu":
        if penalty == "l0":
            return jumprelu(p, x, y, pre, sparsity, bandwidth)
        return jumprelu_tanh(p, x, y, pre, n_sites, sparsity, bandwidth, pre_activation)
    kept = largest(pre, k) if name == "topk" else largest_of_batch(pre, k)
    features = pre.clamp_min(0) * kept
    made = Made(features, decode(p, x, features))
    if name == "matryoshka":
        made.losses["fvu"] = sum(fvu(y, decode(p, x, features, m)) for m in prefixes) / len(prefixes)
    else:
        made.losses["fvu"] = fvu(y, made.reconstruction)
    if dead is not None and len(dead):
        made.losses["auxk"] = aux * auxk(p, y, made.reconstruction, pre, dead, k_aux)
    return made


def decode(p, x, features, m=None, frozen=False):
    """x̂ from the first m features."""
    still = {name: value.detach() if frozen else value for name, value in p.items()}
    made = torch.einsum("bf,fd->bd", features[:, :m], still["W_dec"][:m]) + still["b_dec"]
    if "W_skip" in p:
        made = made + torch.einsum("bi,oi->bo", x, still["W_skip"])
    return made


def squared(y, made):
    """Mean over tokens of ‖y − ŷ‖²."""
    return ((y - made) ** 2).sum(1).mean()


def fvu(y, made):
    """The squared error over that of the best constant (Gao et al. 2024)."""
    return squared(y, made) / squared(y, y.mean(0, keepdim=True))


def norms(p, n_sites):
    """‖d_i‖; of a crosscoder Σ over sites (Lindsey et al. 2024)."""
    width = p["W_dec"].shape[1] // n_sites
    return sum((p["W_dec"][:, i * width : (i + 1) * width] ** 2).sum(1).sqrt() for i in range(n_sites))


def largest(pre, k):
    """1 at the k largest of each row."""
    kept = torch.zeros_like(pre)
    for row, values in zip(kept, pre.detach(), strict=True):
        row[values.argsort(descending=True)[:k]] = 1
    return kept


def largest_of_batch(pre, k):
    """1 at the k · batch largest of all that are above 0 (Bussmann et al. 2024)."""
    flat = pre.detach().flatten()
    kept = torch.zeros_like(flat)
    kept[flat.argsort(descending=True)[: k * len(pre)]] = 1
    return kept.view_as(pre) * (pre.detach() > 0)


def standard(p, x, y, pre, n_sites, sparsity):
    """Conerly et al. 2024: ‖y − ŷ‖² + λ Σ f_i ‖d_i‖."""
    features = pre.clamp_min(0)
    made = Made(features, decode(p, x, features))
    made.losses["mse"] = squared(y, made.reconstruction)
    made.losses["l1"] = sparsity * (features * norms(p, n_sites)).sum(1).mean()
    return made


def gated(p, x, y, pre, n_sites, sparsity):
    """Rajamanoharan et al. 2024a: π = W_gate(x − b) + b_gate; W_mag = exp(r) W_gate; the frozen decoder's own term."""
    gate = pre + p["b_gate"]
    features = (gate > 0) * (p["r_mag"].exp() * pre + p["b_mag"]).clamp_min(0)
    made = Made(features, decode(p, x, features))
    opened = gate.clamp_min(0)
    made.losses["mse"] = squared(y, made.reconstruction)
    # The paper holds decoder rows at norm 1 by constraint; where they are not (transcoders), the norm is a constant.
    made.losses["l1"] = sparsity * (opened * norms(p, n_sites).detach()).sum(1).mean()
    made.losses["aux"] = squared(y, decode(p, x, opened, frozen=True))
    return made


def box(u):
    """The kernel K: 1 on (−½, ½)."""
    return ((u > -0.5) & (u < 0.5)).to(u.dtype)


def jump(z, theta, bandwidth):
    """z · H(z − θ), with −θ/ε · K((z − θ)/ε) for the slope in θ."""
    slope = (-theta / bandwidth * box((z - theta) / bandwidth)).detach()
    return z * (z > theta) + slope * (theta - theta.detach())


def step(z, theta, bandwidth):
    """H(z − θ), with −1/ε · K((z − θ)/ε) for the slope in θ."""
    slope = (-box((z - theta) / bandwidth) / bandwidth).detach()
    return (z > theta).to(z.dtype) + slope * (theta - theta.detach())


def jumprelu(p, x, y, pre, sparsity, bandwidth):
    """Rajamanoharan et al. 2024b, with the ReLU on pre-activations of their listing."""
    z, theta = pre.clamp_min(0), p["threshold"]
    features = jump(z, theta, bandwidth)
    made = Made(features, decode(p, x, features))
    made.losses["mse"] = squared(y, made.reconstruction)
    made.losses["l0"] = sparsity * step(z, theta, bandwidth).sum(1).mean()
    return made


def jumprelu_tanh(p, x, y, pre, n_sites, sparsity, bandwidth, pre_activation):
    """Conerly et al. 2025: λ_S Σ tanh(4 f_i ‖d_i‖) + λ_P Σ ReLU(exp(t_i) − pre_i) ‖d_i‖."""
    theta, weights = p["threshold"], norms(p, n_sites)
    features = jump(pre, theta, bandwidth)
    made = Made(features, decode(p, x, features))
    made.losses["mse"] = squared(y, made.reconstruction)
    made.losses["tanh"] = sparsity * torch.tanh(4 * features * weights).sum(1).mean()
    made.losses["pre_activation"] = pre_activation * ((theta - pre).clamp_min(0) * weights).sum(1).mean()
    return made


def auxk(p, y, made, pre, dead, k_aux):
    """Gao et al. 2024, appendix A.2: ‖e − ê‖², ê from the k_aux largest dead features, e = y − ŷ held still."""
    is_dead = torch.zeros(pre.shape[1], dtype=torch.bool)
    is_dead[list(dead)] = True
    among = torch.where(is_dead, pre, -torch.inf)
    kept = largest(among, min(k_aux, len(dead)))
    missed = (y - made).detach()
    revived = torch.einsum("bf,fd->bd", pre.clamp_min(0) * kept, p["W_dec"])
    return squared(missed, revived) / squared(y, y.mean(0, keepdim=True))
