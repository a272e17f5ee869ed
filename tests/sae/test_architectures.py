"""Every architecture in every shape: sparse = dense = the papers' equations; where gradients go; scales; states."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from mechinterp.errors import UserError
from mechinterp.sae import kernels
from mechinterp.sae.activations.exclusion import Exclusion
from mechinterp.sae.architectures import ARCHITECTURES, BatchTopK, JumpReLU, make
from mechinterp.sae.autoencoder import Objective, SAEConfig, SparseAutoencoder, geometric_median
from mechinterp.sae.config import TOP_K
from mechinterp.sae.kernels import Entries, Everything
from mechinterp.sae.metadata import Metadata
from tests.sae import plain

D_SAE, BATCH, K = 64, 40, 2
PREFIXES = (8, 24, 64)
SHAPES: dict[str, dict[str, Any]] = {
    "sae": {"d_in": 6},
    "transcoder": {"d_in": 6, "d_out": 4, "centred": False, "skip": True},
    "crosscoder": {"d_in": 8, "n_sites": 2},
}
# Name -> architecture, and what its losses need. Thresholds are above half of the bandwidth (see the test below).
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {"sparsity": 0.3}),
    "gated": ("gated", {"sparsity": 0.3}),
    "topk": ("topk", {}),
    "batchtopk": ("batchtopk", {}),
    "matryoshka": ("matryoshka", {}),
    "jumprelu": ("jumprelu", {"sparsity": 0.3, "bandwidth": 0.3}),
    "jumprelu-tanh": (
        "jumprelu",
        {"sparsity": 0.3, "bandwidth": 0.9, "penalty": "tanh", "pre_activation": 0.2},
    ),
}
DEAD = (1, 3, 8, 20, 21, 40, 63)
AUXK = {"k_aux": 3, "aux": 0.25}

each_kind = pytest.mark.parametrize("kind", KINDS)
each_shape = pytest.mark.parametrize("shape", SHAPES)


def config_of(kind: str, shape: str = "sae") -> SAEConfig:
    architecture = KINDS[kind][0]
    more: dict[str, Any] = {"k": K} if kind in ("topk", "batchtopk", "matryoshka") else {}
    if kind == "matryoshka":
        more["prefixes"] = PREFIXES
    return SAEConfig(architecture, d_sae=D_SAE, **SHAPES[shape], **more)


@torch.no_grad()
def drawn(kind: str, shape: str = "sae", dtype: torch.dtype = torch.float64, sparse: bool = True) -> SparseAutoencoder:
    """An autoencoder all of whose weights are random, so that no gradient is 0 by chance; few features fire."""
    sae = make(config_of(kind, shape), seed=1).to(dtype)
    draw = torch.Generator().manual_seed(5)
    for name, parameter in sae.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64).to(dtype)
        if name == "threshold":
            parameter.copy_(0.5 + 0.1 * noise.clamp(-2, 2))
        else:
            parameter.copy_(0.4 * noise)
    if sparse and kind not in ("topk", "batchtopk", "matryoshka"):
        bias = sae.b_gate if kind == "gated" else sae.b_enc
        assert isinstance(bias, Tensor)
        bias.sub_(1.0)
    return sae


def batch_of(sae: SparseAutoencoder, n: int = BATCH) -> tuple[Tensor, Tensor]:
    """What is read and what is reconstructed."""
    draw = torch.Generator().manual_seed(7)
    x = torch.randn(n, sae.config.d_in, generator=draw, dtype=torch.float64)
    y = torch.randn(n, sae.config.d_out, generator=draw, dtype=torch.float64) + 0.5
    return x.to(sae.W_dec.dtype), (y if sae.transcodes else x).to(sae.W_dec.dtype)


def objective_of(kind: str, y: Tensor, **more: Any) -> Objective:
    revived = {"dead": torch.tensor(DEAD), **AUXK} if kind in ("topk", "batchtopk", "matryoshka") else {}
    return Objective.of(y, **(KINDS[kind][1] | revived | more))


def gradients(losses: Tensor, of: dict[str, Tensor]) -> dict[str, Tensor]:
    made = torch.autograd.grad(losses, list(of.values()), retain_graph=True, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(of.items(), made, strict=True)}


def by_hand(kind: str, sae: SparseAutoencoder, x: Tensor, y: Tensor) -> tuple[plain.Made, dict[str, Tensor]]:
    """The papers' equations on the same weights, and those weights."""
    weights = {name: value.detach().clone().requires_grad_() for name, value in sae.named_parameters()}
    c = sae.config
    more = KINDS[kind][1] | ({"dead": DEAD, **AUXK} if c.k else {})
    shape = {"centred": c.centred, "n_sites": c.n_sites, "k": c.k or 0, "prefixes": c.prefixes}
    return plain.run(c.architecture, weights, x, y, **shape, **more), weights


def agree(one: Tensor, other: Tensor, tolerance: float, what: str) -> None:
    """To a tolerance relative to the norm."""
    assert one.shape == other.shape, what
    one, other = one.detach(), other.detach()
    error = float((one - other).norm()) / max(float(other.norm()), 1e-12)
    assert error <= tolerance, f"{what}: {error:.1e}"


# ---- sparse = dense = the equations --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("way", ["sparse", "as chosen", "dense"])
@each_shape
@each_kind
def test_outputs_losses_and_gradients(kind, shape, way, dtype, monkeypatch):
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    if way == "sparse":
        monkeypatch.setattr(kernels, "DENSE", 1.0)
    sae = drawn(kind, shape, dtype)
    x, y = batch_of(sae)
    output = sae(x, y, objective_of(kind, y), dense=way == "dense")
    if way == "sparse" and kind != "jumprelu-tanh":
        assert isinstance(output.codes.selection, Entries)
    if way == "dense":
        assert isinstance(output.codes.selection, Everything)
    wanted, weights = by_hand(kind, sae, x, y)
    assert 0 < int(output.codes.l0()) < 0.5 * BATCH * D_SAE  # the test would be empty
    agree(output.features, wanted.features, tolerance, "features")
    agree(output.reconstruction, wanted.reconstruction, tolerance, "reconstruction")
    assert set(output.losses) == set(wanted.losses)
    for term, loss in output.losses.items():
        agree(loss, wanted.losses[term], tolerance, term)
        ours = gradients(loss, dict(sae.named_parameters()))
        theirs = gradients(wanted.losses[term], weights)
        for name in weights:
            agree(ours[name], theirs[name], tolerance, f"gradient of {term} to {name}")
    agree(output.loss, torch.stack(list(wanted.losses.values())).sum(), tolerance, "loss")


@each_shape
@each_kind
def test_the_gradient_to_what_is_read(kind, shape):
    """Attribution goes through an autoencoder at inference: sparse = dense = equations, for x, too."""
    sae = drawn(kind, shape)
    if isinstance(sae, BatchTopK):
        sae.threshold.fill_(0.8)
    x, _ = batch_of(sae)
    up = torch.randn(BATCH, sae.config.d_out, dtype=torch.float64)
    made = []
    for dense in (False, True):
        read = x.clone().requires_grad_()
        output = sae(read, dense=dense)
        made += torch.autograd.grad((output.reconstruction * up).sum(), read)
    agree(made[0], made[1], 1e-11, "gradient to x")
    assert float(made[0].abs().sum()) > 0
    step, rows = 1e-6, torch.randn_like(x)
    with torch.no_grad():
        change = (sae(x + step * rows).reconstruction - sae(x - step * rows).reconstruction) / (2 * step)
    agree((change * up).sum(), (made[0] * rows).sum(), 1e-5, "slope along a direction")


def test_few_dead_features_are_all_used():
    sae = drawn("topk")
    x, y = batch_of(sae)
    few = torch.tensor(DEAD[:2])
    loss = sae(x, y, objective_of("topk", y, dead=few)).losses["auxk"]
    weights = dict(sae.named_parameters())
    wanted = plain.run("topk", weights, x, y, centred=True, k=K, dead=DEAD[:2], **AUXK).losses["auxk"]
    agree(loss, wanted, 1e-11, "auxk")


@pytest.mark.parametrize("none", [{"dead": None}, {"dead": torch.zeros(0, dtype=torch.long)}, {"k_aux": 0}])
@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka"])
def test_no_dead_features_no_term(kind, none):
    sae = drawn(kind)
    x, y = batch_of(sae)
    assert set(sae(x, y, objective_of(kind, y, **none)).losses) == {"fvu"}


def test_dead_features_that_do_not_fire_get_nothing():
    sae = drawn("topk")
    assert sae.b_enc is not None
    sae.b_enc.data[list(DEAD)] = -100.0
    x, y = batch_of(sae)
    made = gradients(sae(x, y, objective_of("topk", y)).losses["auxk"], dict(sae.named_parameters()))
    assert all(not value.any() for value in made.values())


# ---- where gradients go --------------------------------------------------------------------------------------------

SHARED = {"W_enc", "b_enc", "W_dec"}
# The term -> parameters that it reaches, besides b_dec: every term reaches that through the encoder where the input is
# centred, and the squared error directly.
REACHES: dict[str, dict[str, set[str]]] = {
    "standard": {"mse": SHARED, "l1": SHARED},
    "gated": {
        "mse": {"W_enc", "W_dec", "r_mag", "b_mag"},
        "l1": {"W_enc", "b_gate"},
        "aux": {"W_enc", "b_gate"},
    },
    "topk": {"fvu": SHARED, "auxk": SHARED},
    "batchtopk": {"fvu": SHARED, "auxk": SHARED},
    "matryoshka": {"fvu": SHARED, "auxk": SHARED},
    "jumprelu": {"mse": SHARED | {"threshold"}, "l0": {"threshold"}},
    "jumprelu-tanh": {
        "mse": SHARED | {"threshold"},
        "tanh": SHARED | {"threshold"},
        "pre_activation": SHARED | {"threshold"},
    },
}


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@each_shape
@each_kind
def test_each_term_reaches_what_it_should_and_nothing_else(kind, shape, dense):
    sae = drawn(kind, shape)
    x, y = batch_of(sae)
    output = sae(x, y, objective_of(kind, y), dense=dense)
    assert set(output.losses) == set(REACHES[kind])
    for term, names in REACHES[kind].items():
        error = term in ("mse", "fvu")
        wanted = set(names)
        if error or (sae.config.centred and "W_enc" in names):
            wanted.add("b_dec")
        if error and sae.config.skip:
            wanted.add("W_skip")
        made = gradients(output.losses[term], dict(sae.named_parameters()))
        assert {name for name, value in made.items() if value.any()} == wanted, term


@each_shape
@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka"])
def test_auxk_reaches_dead_features_only_and_b_dec_through_the_encoder_only(kind, shape):
    sae = drawn(kind, shape)
    x, y = batch_of(sae)
    made = gradients(sae(x, y, objective_of(kind, y)).losses["auxk"], dict(sae.named_parameters()))
    for name in ("W_enc", "W_dec", "b_enc"):
        rows = made[name].reshape(D_SAE, -1).any(1).nonzero().flatten().tolist()
        assert rows == list(DEAD), name
    by_encoder = -(made["b_enc"] @ sae.W_enc) if sae.config.centred else torch.zeros_like(made["b_dec"])
    agree(made["b_dec"], by_encoder, 1e-11, "b_dec")


def test_matryoshka_trains_early_features_by_every_prefix():
    """A feature's decoder row has a part of the gradient from each prefix that holds it."""
    sae = drawn("matryoshka")
    x, y = batch_of(sae)
    output = sae(x, y, Objective.of(y))
    made = gradients(output.losses["fvu"], dict(sae.named_parameters()))["W_dec"]
    codes, weights = output.features.detach(), sae.W_dec.detach()
    scale = 2 / (len(PREFIXES) * float((y - y.mean(0)).square().sum()))
    wanted = torch.zeros_like(weights)
    for high in PREFIXES:
        missed = codes[:, :high] @ weights[:high] + sae.b_dec.detach() - y
        wanted[:high] += scale * codes[:, :high].T @ missed
    agree(made, wanted, 1e-11, "W_dec")


def test_thresholds_below_half_a_window_leave_what_the_relu_holds_at_0_alone():
    """The listing of Rajamanoharan et al. (2024b) applies a ReLU first: at θ < ε/2 all that it holds at 0 would be in
    the window, however far below 0 it was. Here only what is above 0 is, so that the step can stay sparse."""
    sae = drawn("jumprelu")
    assert isinstance(sae, JumpReLU)
    sae.threshold.data.fill_(0.1)
    x, y = batch_of(sae)
    objective = Objective.of(y, sparsity=1.0, bandwidth=1.0)
    for dense in (False, True):
        output = sae(x, y, objective, dense=dense)
        made = gradients(output.losses["l0"], dict(sae.named_parameters()))["threshold"]
        pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
        inside = (pre > 0) & ((pre - 0.1).abs() < 0.5)
        agree(made, -inside.double().sum(0) / BATCH, 1e-11, "threshold")


# ---- shares of processes -------------------------------------------------------------------------------------------


@each_shape
@each_kind
def test_the_gradients_of_two_halves_add_up_to_the_whole(kind, shape):
    """BatchTopK's halves are told the choice of the whole (test_kernels.py has the gathering)."""
    sae = drawn(kind, shape)
    x, y = batch_of(sae)
    whole = objective_of(kind, y)
    output = sae(x, y, whole)
    wanted = gradients(output.loss, dict(sae.named_parameters()))
    chosen = output.codes.selection
    parts = []
    for half in (slice(0, 15), slice(15, None)):
        if isinstance(sae, BatchTopK):
            assert isinstance(chosen, Entries)
            inside = chosen.dense(torch.ones(len(chosen.index)))[half]
            sae.choose = lambda pre, objective, kept=inside: Entries.of_flat(  # type: ignore[method-assign]
                kept.flatten().nonzero().flatten(), *pre.shape
            )
        parts.append(gradients(sae(x[half], y[half], whole).loss, dict(sae.named_parameters())))
    for name, value in wanted.items():
        agree(parts[0][name] + parts[1][name], value, 1e-10, name)


# ---- scales --------------------------------------------------------------------------------------------------------

SCALES = {
    "sae": (torch.tensor([0.37]), torch.tensor([0.37])),
    "transcoder": (torch.tensor([0.37]), torch.tensor([2.1])),
    "crosscoder": (torch.tensor([0.37, 1.9]), torch.tensor([0.37, 1.9])),
}


@each_shape
@each_kind
def test_folded_scales_change_nothing_but_units(kind, shape):
    sae = drawn(kind, shape)
    if isinstance(sae, BatchTopK):
        sae.threshold.fill_(0.8)
    x, _ = batch_of(sae)
    scale_in, scale_out = (scale.double() for scale in SCALES[shape])
    wide_in = scale_in.repeat_interleave(sae.config.d_in // len(scale_in))
    wide_out = scale_out.repeat_interleave(sae.config.d_out // len(scale_out))
    before = sae(x * wide_in)
    folded = copy.deepcopy(sae)
    folded.unscaled(scale_in, scale_out)
    after = folded(x)
    agree(after.reconstruction * wide_out, before.reconstruction, 1e-11, "reconstruction")
    agree(after.features * scale_out.mean(), before.features, 1e-11, "features")
    assert torch.equal(after.features != 0, before.features != 0)
    assert 0 < int(after.codes.l0()) < 0.5 * BATCH * D_SAE
    agree(folded(x, dense=True).reconstruction, after.reconstruction, 1e-11, "dense")
    if shape != "crosscoder":
        agree(folded.W_dec.norm(dim=1), sae.W_dec.norm(dim=1), 1e-11, "decoder norms")


def test_a_centred_autoencoder_has_one_scale():
    sae = drawn("topk")
    with pytest.raises(UserError, match="one scale"):
        sae.unscaled(torch.tensor([0.5]), torch.tensor([0.6]))


# ---- at inference --------------------------------------------------------------------------------------------------


def test_batch_top_k_has_a_threshold_after_few_steps():
    sae = make(config_of("batchtopk"), seed=0)
    assert isinstance(sae, BatchTopK)
    draw = torch.Generator().manual_seed(0)
    smallest = []
    for _ in range(5):
        x = torch.randn(BATCH, 6, generator=draw)
        output = sae(x, x, Objective.of(x))
        assert int(output.codes.l0()) == K * BATCH
        features = output.features.detach()
        smallest.append(float(features[features > 0].min()))
        agree(sae.threshold, torch.tensor(smallest).mean(), 1e-6, "plain mean at first")
    held_out = torch.randn(400, 6, generator=draw)
    output = sae(held_out)
    assert abs(int(output.codes.l0()) / 400 - K) < 0.5
    pre = (held_out - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    agree(output.features, pre * (pre > sae.threshold), 1e-6, "features by threshold")
    # A row's features do not depend on the rows beside it.
    agree(sae(held_out[:1]).features, output.features[:1], 1e-6, "alone")
    assert int(sae.n_updates) == 5  # inference leaves it as it was


def test_batch_top_k_averages_exponentially_later():
    sae = make(config_of("batchtopk"), seed=0)
    assert isinstance(sae, BatchTopK)
    sae.n_updates.fill_(1000)
    sae.threshold.fill_(0.5)
    x = torch.randn(BATCH, 6)
    features = sae(x, x, Objective.of(x)).features
    agree(sae.threshold, 0.99 * torch.tensor(0.5) + 0.01 * features[features > 0].min(), 1e-6, "threshold")


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@each_kind
def test_inference_is_the_forward_of_the_equations(kind, dense):
    sae = drawn(kind)
    if isinstance(sae, BatchTopK):
        sae.threshold.fill_(0.8)
    x, y = batch_of(sae)
    output = sae(x, dense=dense)
    pre = (x - sae.b_dec) @ sae.W_enc.T + (0 if sae.b_enc is None else sae.b_enc)
    features = pre * (pre > 0.8) if isinstance(sae, BatchTopK) else by_hand(kind, sae, x, y)[0].features
    agree(output.features, features, 1e-11, "features")
    agree(output.reconstruction, features @ sae.W_dec + sae.b_dec, 1e-11, "reconstruction")
    assert output.losses == {}
    codes = sae.encode(x, dense=dense)
    assert torch.equal(codes.dense(), output.features)
    agree(sae.decode(codes, x), output.reconstruction, 1e-11, "encode, then decode")


@each_kind
def test_codes_tell_the_same_sparse_and_dense(kind):
    sae = drawn(kind)
    x, _ = batch_of(sae)
    for dense in (False, True):
        codes = sae.encode(x, dense=dense)
        values, index, rows = codes.sparse()
        full = torch.zeros(BATCH, D_SAE, dtype=torch.float64)
        full[rows, index] = values
        assert torch.equal(full, codes.dense())
        assert bool((values != 0).all()) and bool((rows.diff() >= 0).all())
        assert int(codes.l0()) == len(values) == int((full != 0).sum())
        assert torch.equal(codes.fired(), (full != 0).any(0))


@each_shape
@each_kind
def test_leading_axes(kind, shape):
    sae = drawn(kind, shape)
    if isinstance(sae, BatchTopK):
        sae.threshold.fill_(0.8)
    axes: list[tuple[int, ...]] = [(), (1,), (0,), (2, 3), (2, 0, 3)]
    for leading, dense in itertools.product(axes, (False, True)):
        x = torch.randn(*leading, sae.config.d_in, dtype=torch.float64)
        output = sae(x, dense=dense)
        flat = sae(x.reshape(-1, sae.config.d_in), dense=dense)
        assert output.reconstruction.shape == (*leading, sae.config.d_out)
        assert output.features.shape == (*leading, D_SAE)
        assert torch.equal(output.reconstruction.reshape(-1, sae.config.d_out), flat.reconstruction)
        assert torch.equal(output.features.reshape(-1, D_SAE), flat.features)


@each_shape
@each_kind
def test_nothing_fires(kind, shape):
    """Then the reconstruction is what is left, and training goes on."""
    sae = drawn(kind, shape)
    for name in ("b_enc", "b_gate"):
        if getattr(sae, name, None) is not None:
            getattr(sae, name).data.fill_(-1000.0)
    x, y = batch_of(sae)
    for objective in (None, objective_of(kind, y)):
        output = sae(x, y, objective)
        rest = sae.b_dec.expand(BATCH, -1) + (0 if sae.W_skip is None else x @ sae.W_skip.T)
        agree(output.reconstruction, rest, 1e-11, "reconstruction")
        assert int(output.codes.l0()) == 0 and not output.codes.fired().any()
        if objective is not None:
            output.loss.backward()
            assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in sae.parameters())


# ---- numbers -------------------------------------------------------------------------------------------------------


@each_shape
@each_kind
def test_half_precision_products(kind, shape):
    """Under autocast codes, losses and gradients stay in float32; the numbers are those of float32 roughly."""
    sae = drawn(kind, shape, torch.float32)
    x, y = batch_of(sae)

    exact = copy.deepcopy(sae)(x, y, objective_of(kind, y)).losses
    with torch.autocast("cpu", torch.bfloat16):
        output = sae(x, y, objective_of(kind, y))
    output.loss.backward()
    assert output.codes.values.dtype == output.reconstruction.dtype == output.loss.dtype == torch.float32
    for name, loss in exact.items():
        agree(output.losses[name], loss, 0.1, name)
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32 and bool(parameter.grad.isfinite().all()), name


@each_shape
@each_kind
def test_training_lowers_the_error(kind, shape):
    """From fresh weights, also a transcoder's decoder at 0; rows stay at norm 1 where they are held there."""
    sae = make(config_of(kind, shape), seed=0)
    x, y = (one.float() for one in batch_of(sae, 60))
    sae.start_at(y)
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.02)
    errors = []
    small = {"sparsity": 0.001} if sae.config.k is None else {}
    for _ in range(8):
        output = sae(x, y, objective_of(kind, y, **small))
        errors.append(float((y - output.reconstruction.detach()).square().sum()))
        optimizer.zero_grad()
        output.loss.backward()
        sae.project_gradient()
        if sae.unit_norm and not sae.transcodes:
            assert sae.W_dec.grad is not None
            along = (sae.W_dec.grad * sae.W_dec.detach()).sum(1)
            assert float(along.abs().max()) < 1e-5
        optimizer.step()
        sae.renormalise()
    assert errors[-1] < 0.95 * errors[0]
    if sae.unit_norm and not sae.transcodes:
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


# ---- weights -------------------------------------------------------------------------------------------------------


@each_shape
@each_kind
def test_fresh_weights(kind, shape):
    config = config_of(kind, shape)
    one, same, other = make(config, seed=3), make(config, seed=3), make(config, seed=4)
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
    assert not torch.equal(one.W_enc, other.W_enc)
    if one.transcodes:
        assert not one.W_dec.any()
        torch.testing.assert_close(one.W_enc.norm(dim=1), torch.ones(D_SAE))
    else:
        assert torch.equal(one.encoder_scale * one.W_dec, one.W_enc)
        torch.testing.assert_close(one.W_dec.norm(dim=1), torch.full((D_SAE,), one.decoder_norm))
    assert one.W_enc.data_ptr() != one.W_dec.data_ptr()
    x = torch.randn(3, config.d_in)
    assert bool(one(x).reconstruction.isfinite().all())


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    make(config_of("topk"))
    assert torch.equal(before, torch.get_rng_state())


@each_shape
@each_kind
def test_state_round_trip(kind, shape):
    sae = drawn(kind, shape)
    x, y = batch_of(sae)
    sae(x, y, objective_of(kind, y))  # moves BatchTopK's threshold
    other = make(sae.config, seed=9).double()
    other.load_state_dict(sae.state_dict())
    assert torch.equal(other(x).reconstruction, sae(x).reconstruction)
    assert set(sae.state_dict()) - {name for name, _ in sae.named_parameters()} == (
        {"threshold", "n_updates"} if isinstance(sae, BatchTopK) else set()
    )


def test_decoder_norms_add_up_over_sites():
    sae = drawn("standard", "crosscoder")
    first, second = sae.W_dec[:, :4].norm(dim=1), sae.W_dec[:, 4:].norm(dim=1)
    agree(sae.decoder_norms(), first + second, 1e-12, "norms")


def test_start_at():
    sae = make(config_of("topk", "transcoder"))
    y = torch.randn(50, 4) + 3
    sae.start_at(y)
    assert torch.equal(sae.b_dec, geometric_median(y))


def grid_median(points: Tensor) -> Tensor:
    """By search on finer and finer grids of the plane."""
    at, width = points.mean(0), float(points.max() - points.min())
    while width > 1e-7:
        steps = torch.linspace(-width, width, 21, dtype=points.dtype)
        around = at + torch.cartesian_prod(steps, steps)
        at = around[torch.cdist(around, points).sum(1).argmin()]
        width /= 3
    return at


@pytest.mark.parametrize("kind", ["cloud", "outlier", "many alike", "a line", "one", "mean at a point"])
def test_geometric_median_is_where_the_mean_distance_is_least(kind):
    points = torch.randn(31, 2, dtype=torch.float64)
    if kind == "outlier":
        points[0] = 1e4
    if kind == "many alike":
        points[5:] = points[4]
    if kind == "a line":
        points[:, 1] = 0
    if kind == "one":
        points = points[:1]
    if kind == "mean at a point":  # and not the median
        points = torch.tensor([[0, 0], [0, 0], [0, 0], [2, 0], [8, 0]], dtype=torch.float64)
    torch.testing.assert_close(geometric_median(points), grid_median(points), rtol=1e-3, atol=1e-3)


# ---- what is refused -----------------------------------------------------------------------------------------------

WRONG: dict[str, dict[str, Any]] = {
    "architecture": {"architecture": "vanilla"},
    "no k": {"architecture": "topk"},
    "k 0": {"architecture": "batchtopk", "k": 0},
    "k above d_sae": {"architecture": "topk", "k": 33},
    "k without a use": {"architecture": "standard", "k": 3},
    "no features": {"architecture": "standard", "d_sae": 0},
    "negative width": {"architecture": "standard", "d_in": -6},
    "negative output": {"architecture": "standard", "d_out": -6, "centred": False},
    "no sites": {"architecture": "standard", "n_sites": 0},
    "sites": {"architecture": "standard", "n_sites": 4},
    "sites of the output": {"architecture": "standard", "n_sites": 3, "d_out": 8, "centred": False},
    "centred transcoder": {"architecture": "standard", "d_out": 4},
    "no prefixes": {"architecture": "matryoshka", "k": 2},
    "prefixes without a use": {"architecture": "topk", "k": 2, "prefixes": (8, 32)},
    "prefixes that fall": {"architecture": "matryoshka", "k": 2, "prefixes": (16, 8, 32)},
    "prefixes that repeat": {"architecture": "matryoshka", "k": 2, "prefixes": (8, 8, 32)},
    "prefixes from 0": {"architecture": "matryoshka", "k": 2, "prefixes": (0, 32)},
    "prefixes that stop early": {"architecture": "matryoshka", "k": 2, "prefixes": (8, 16)},
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_configs(what):
    with pytest.raises(UserError) as error:
        SAEConfig(**({"d_in": 6, "d_sae": 32} | WRONG[what]))
    assert "\n" not in str(error.value)


def test_right_configs():
    assert SAEConfig("topk", 6, 32, k=32).d_out == 6
    assert SAEConfig("standard", 6, 32, d_out=4, centred=False).d_out == 4
    assert set(ARCHITECTURES) == {architecture for architecture, _ in KINDS.values()}


# ---- metadata ------------------------------------------------------------------------------------------------------


def test_metadata_round_trip():
    made = Metadata(
        model="gpt2",
        reads=("blocks.1.hook_resid_pre",),
        writes=("blocks.1.hook_mlp_out",),
        exclusion=Exclusion(first=False, tokens=(5, 3), outlier=10.0),
        context=128,
        training={"k": 32},
    )
    assert Metadata.of(made.to_json()) == made
    assert Metadata.of({}) == Metadata()
    assert made.site().hook_name == "blocks.1.hook_resid_pre"
    assert made.site(writes=True).hook_name == "blocks.1.hook_mlp_out"


def test_wrong_metadata():
    with pytest.raises(UserError, match="unknown metadata of an autoencoder: modle"):
        Metadata.of({"modle": "gpt2"})
    with pytest.raises(UserError, match="reads must be a list of hook names; found 'blocks"):
        Metadata.of({"reads": "blocks.1.hook_resid_pre"})
    with pytest.raises(UserError, match="it has: none"):
        Metadata().site()
    with pytest.raises(UserError, match="it has: a, b"):
        Metadata(reads=("a", "b")).site()


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_what_is_not_a_number_is_not_hidden(architecture):
    """A feature that is NaN is not off: the reconstruction of a broken activation is NaN, and of the others is not."""
    k = 4 if architecture in TOP_K else None
    prefixes = (8, 16) if architecture == "matryoshka" else ()
    sae = make(SAEConfig(architecture, 8, 16, k, prefixes=prefixes)).requires_grad_(False)
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    x[2, 3] = torch.nan
    for dense in (False, True):
        broken = sae(x, dense=dense).reconstruction.isnan().any(1)
        assert broken.tolist() == [row == 2 for row in range(6)], dense


def test_activations_of_another_width_are_refused():
    sae = make(SAEConfig("topk", 8, 16, 4))
    for call in (sae, sae.encode):
        with pytest.raises(UserError, match=r"reads 8 dimensions; found activations of shape \(4, 16\)"):
            call(torch.randn(4, 16))
    x = torch.randn(4, 8)
    with pytest.raises(UserError, match="writes 8 dimensions"):
        sae(x, torch.randn(4, 16), Objective.of(x))
