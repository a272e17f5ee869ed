import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from mechinterp.errors import UserError
from mechinterp.sae.activations.exclusion import Exclusion
from mechinterp.sae.architectures import make
from mechinterp.sae.autoencoder import SAEConfig
from mechinterp.sae.formats import convert, load, read_sparsity, save, save_saelens, save_sparsify
from mechinterp.sae.metadata import Metadata

FOLDERS = Path(__file__).parent / "folders"
REFUSED = {  # a folder that a peer wrote, and what of it the message must name
    "sae-lens/standard_expected_average": "normalize_activations 'expected_average_only_in'",
    "sae-lens/standard_constant_norm": "normalize_activations 'constant_norm_rescale'",
    "sae-lens/standard_layer_norm": "normalize_activations 'layer_norm'",
    "sae-lens/standard_hook_z": "reshape_activations 'hook_z'",
    "sae-lens/matching_pursuit": "architecture 'matching_pursuit'",
    "sparsify/groupmax": "activation 'groupmax'",
}
PEERS = sorted(str(one.parent.relative_to(FOLDERS)) for one in FOLDERS.glob("*/*/expected.safetensors"))
READABLE = [name for name in PEERS if name not in REFUSED]
D_IN, D_SAE = 6, 16
METADATA = Metadata(
    model="gpt2",
    reads=("blocks.3.hook_resid_post",),
    writes=("blocks.3.hook_resid_post",),
    exclusion=Exclusion(first=True, tokens=(50256,), outlier=6.0),
    context=128,
    bos=True,
    weights_hash="abc",
    text="books",
    n_tokens=1000,
    training={"lr": 1e-3, "seed": 3},
)
ACROSS = replace(METADATA, writes=("blocks.3.hook_mlp_out",))
SHAPES = {
    "standard": SAEConfig("standard", D_IN, D_SAE),
    "gated": SAEConfig("gated", D_IN, D_SAE),
    "topk": SAEConfig("topk", D_IN, D_SAE, k=4),
    "topk_bare": SAEConfig("topk", D_IN, D_SAE, k=4, centred=False),
    "batchtopk": SAEConfig("batchtopk", D_IN, D_SAE, k=4),
    "matryoshka": SAEConfig("matryoshka", D_IN, D_SAE, k=4, prefixes=(4, 16)),
    "jumprelu": SAEConfig("jumprelu", D_IN, D_SAE),
    "crosscoder": SAEConfig("topk", D_IN, D_SAE, k=4, n_sites=2),
    "transcoder": SAEConfig("standard", D_IN, D_SAE, d_out=5, centred=False),
    "skip_transcoder": SAEConfig("standard", D_IN, D_SAE, d_out=5, centred=False, skip=True),
    "jumprelu_transcoder": SAEConfig("jumprelu", D_IN, D_SAE, d_out=5, centred=False),
    "batchtopk_skip_transcoder": SAEConfig("batchtopk", D_IN, D_SAE, k=4, d_out=5, centred=False, skip=True),
    "topk_transcoder": SAEConfig("topk", D_IN, D_SAE, k=4, centred=False),
    "topk_skip_transcoder": SAEConfig("topk", D_IN, D_SAE, k=4, centred=False, skip=True),
    "gated_transcoder": SAEConfig("gated", D_IN, D_SAE, d_out=5, centred=False),
}
ONLY_OURS = ("topk_transcoder", "topk_skip_transcoder", "gated_transcoder")


def made(name: str):
    """An autoencoder none of whose weights is 0."""
    config = SHAPES[name]
    metadata = ACROSS if "transcoder" in name else METADATA
    if name == "crosscoder":
        sites = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
        metadata = replace(METADATA, reads=sites, writes=sites)
    sae = make(config, metadata).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in sae.named_parameters():
            values = torch.randn(parameter.shape, generator=draw)
            made = 0.5 * values if parameter.ndim == 2 else 0.3 * values
            parameter.copy_(made.exp() / 3 if "threshold" in key else made)
        if config.architecture in ("batchtopk", "matryoshka"):
            sae.threshold.fill_(0.7)
            sae.n_updates.fill_(42)
    return sae


def inputs() -> torch.Tensor:
    return torch.randn((16, D_IN), generator=torch.Generator().manual_seed(2))


def same(a, b, tolerance: float = 1e-5) -> None:
    """Outputs agree, relative to their largest."""
    for one, other in ((a.features, b.features), (a.reconstruction, b.reconstruction)):
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def copied(name: str, to: Path) -> Path:
    """A peer's folder, to be spoilt."""
    to.mkdir()
    for one in (FOLDERS / name).iterdir():
        (to / one.name).write_bytes(one.read_bytes())
    return to


def edit(path: Path, **changes) -> None:
    found = json.loads(path.read_text())
    found.update(changes)
    path.write_text(json.dumps({key: value for key, value in found.items() if value != "GONE"}))


# What peers wrote


def test_every_peer_has_folders():
    kinds = {name.split("/")[0] for name in READABLE}
    assert kinds == {"sae-lens", "sparsify", "dictionary-learning"}
    assert len(READABLE) >= 28 and set(REFUSED) <= set(PEERS)


@pytest.mark.parametrize("name", READABLE)
def test_a_peers_folder_gives_its_features_and_reconstruction(name):
    sae, expected = load(FOLDERS / name), load_file(FOLDERS / name / "expected.safetensors")
    output = sae(expected["x"])
    tolerance = 2e-2 if "bfloat16" in name else 1e-5  # what the peer computed in bfloat16
    for got, wanted in (
        (output.features, expected["features"]),
        (output.reconstruction, expected["reconstruction"]),
    ):
        assert got.shape == wanted.shape
        assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert torch.equal(output.features != 0, expected["features"] != 0)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_changes_the_meaning_is_refused_by_name(name):
    with pytest.raises(UserError) as caught:
        load(FOLDERS / name)
    assert REFUSED[name] in str(caught.value) and "\n" not in str(caught.value)


def test_metadata_of_saelens():
    found = load(FOLDERS / "sae-lens/batchtopk").metadata
    assert (found.model, found.reads, found.context, found.bos) == ("gpt2", ("blocks.1.hook_resid_pre",), 128, True)
    assert found.writes == found.reads and found.text == "NeelNanda/pile-10k"
    assert found.training["training_architecture"] == "batchtopk"
    across = load(FOLDERS / "sae-lens/skip_transcoder").metadata
    assert (across.reads, across.writes) == (("blocks.1.hook_mlp_in",), ("blocks.1.hook_mlp_out",))


def test_metadata_of_dictionary_learning():
    found = load(FOLDERS / "dictionary-learning/topk").metadata
    assert (found.model, found.reads, found.context) == (
        "EleutherAI/pythia-70m", ("blocks.1.hook_resid_post",), 128,
    )  # fmt: skip


def test_a_sparsify_folder_is_named_after_its_module(tmp_path):
    assert load(copied("sparsify/topk", tmp_path / "layers.7")).metadata.reads == ("blocks.7.hook_resid_post",)
    assert load(copied("sparsify/transcoder", tmp_path / "layers.8")).metadata.reads == ()


def test_sparsity():
    assert read_sparsity(FOLDERS / "sae-lens/standard").shape == (D_SAE,)
    assert read_sparsity(FOLDERS / "sae-lens/gated") is None


# Releases of SAELens before 6


def test_an_old_config_with_its_metadata_at_the_top(tmp_path):
    folder = copied("sae-lens/standard", tmp_path / "a")
    edit(
        folder / "cfg.json", metadata="GONE", architecture="GONE", apply_b_dec_to_input="GONE",
        activation_fn_str="relu", hook_point="blocks.8.hook_resid_pre", hook_point_head_index=None,
        model_name="gpt2-small", context_size=64,
        normalize_activations=False, reshape_activations="GONE",
    )  # fmt: skip
    weights = load_file(folder / "sae_weights.safetensors")
    save_file(weights | {"scaling_factor": torch.ones(D_SAE)}, folder / "sae_weights.safetensors")
    sae, expected = load(folder), load_file(folder / "expected.safetensors")
    assert torch.allclose(sae(expected["x"]).features, expected["features"], atol=1e-5)
    assert (sae.metadata.model, sae.metadata.reads) == ("gpt2-small", ("blocks.8.hook_resid_pre",))


def test_an_old_config_of_topk(tmp_path):
    folder = copied("sae-lens/topk", tmp_path / "a")
    edit(folder / "cfg.json", metadata="GONE", architecture="standard", k="GONE", activation_fn_str="topk",
         activation_fn_kwargs={"k": 4})  # fmt: skip
    expected = load_file(folder / "expected.safetensors")
    assert torch.allclose(load(folder)(expected["x"]).features, expected["features"], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"metadata": "GONE", "hook_name": "blocks.1.attn.hook_z", "reshape_activations": "GONE"}, "hook_z"),
        ({"metadata": {"hook_head_index": 3}}, "hook_head_index 3"),
        ({"normalize_activations": True}, "expected_average_only_in"),
        ({"normalize_activations": "covariance_whitening"}, "covariance_whitening"),
        ({"normalize_activations": "new"}, "normalize_activations 'new'"),
        ({"activation_fn": "tanh-relu"}, "tanh-relu"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor"),
        ({"architecture": "temporal"}, "temporal"),
        ({"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input"),
        ({"d_sae": 0}, "d_sae"),
        ({"d_in": "6"}, "d_in"),
        ({"d_in": "GONE"}, "d_in"),
        ({"metadata": 3}, "metadata"),
        ({"metadata": {"prepend_bos": 3}}, "prepend_bos"),
        ({"metadata": {"mechinterp": {"config": 1}}}, "mechinterp"),
        ({"architecture": "topk"}, "k must be"),
        ({"architecture": "topk", "k": 17}, "k must be"),
        ({"architecture": "transcoder", "d_out": 6}, "apply_b_dec_to_input"),
        ({"activation_fn": "topk", "activation_fn_kwargs": 3}, "is not read"),
        ({"normalize_activations": ["a"]}, "is not read"),
        ({"metadata": {"mechinterp": {"config": {"prefixes": 3}}}}, "mechinterp"),
    ],
    ids=lambda value: value.replace(" ", "-").replace("'", "") if isinstance(value, str) else "",
)
def test_a_config_that_is_not_understood(tmp_path, changes, named):
    folder = copied("sae-lens/standard", tmp_path / "a")
    edit(folder / "cfg.json", **changes)
    with pytest.raises(UserError) as caught:
        load(folder)
    assert named in str(caught.value) and "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_weights_that_are_not_finite(tmp_path):
    folder = copied("sae-lens/standard", tmp_path / "a")
    weights = load_file(folder / "sae_weights.safetensors")
    weights["b_enc"][3] = float("nan")
    save_file(weights, folder / "sae_weights.safetensors")
    with pytest.raises(UserError, match="b_enc holds numbers that are not finite"):
        load(folder)


def test_extra_keys_are_ignored(tmp_path):
    folder = copied("sae-lens/standard", tmp_path / "a")
    edit(folder / "cfg.json", something_new=[1, 2])
    load(folder)


# Round trips


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_folder_of_ours_comes_back_as_it_was(tmp_path, name):
    sae = made(name)
    back = load(save(sae, tmp_path / "a"))
    same(back(inputs()), sae(inputs()), 1e-6)
    assert (back.config, back.metadata) == (sae.config, sae.metadata) and type(back) is type(sae)
    for key, value in sae.state_dict().items():
        assert torch.equal(value, back.state_dict()[key])


@pytest.mark.parametrize("name", sorted(set(SHAPES) - set(ONLY_OURS)))
def test_saelens_sees_what_it_knows(tmp_path, name):
    sae = made(name)
    folder = save_saelens(sae, tmp_path / "a", torch.zeros(D_SAE))
    cfg, weights = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    assert sorted(one.name for one in folder.iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
        "sparsity.safetensors",
    ]
    assert torch.equal(weights["W_enc"].T, sae.W_enc) and cfg["metadata"]["model_name"] == "gpt2"
    if name.startswith(("batchtopk", "matryoshka")):
        assert cfg["architecture"].startswith("jumprelu") and torch.equal(weights["threshold"], torch.full((16,), 0.7))
    # A reader that passes over what only we know computes the same.
    del cfg["metadata"]["mechinterp"]
    (folder / "cfg.json").write_text(json.dumps(cfg))
    back = load(folder)
    same(back(inputs()), sae(inputs()), 1e-6)
    if name != "crosscoder":
        assert back.metadata.reads == sae.metadata.reads and back.metadata.writes == sae.metadata.writes


@pytest.mark.parametrize("name", sorted(ONLY_OURS))
def test_saelens_has_no_such_transcoder(tmp_path, name):
    with pytest.raises(UserError, match="SAELens has no"):
        save_saelens(made(name), tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["topk", "topk_bare", "crosscoder", "topk_transcoder", "topk_skip_transcoder"])
def test_sparsify_round_trip(tmp_path, name):
    sae = made(name)
    back = load(save_sparsify(sae, tmp_path / "a"))
    same(back(inputs()), sae(inputs()), 1e-6)
    assert (back.config, back.metadata) == (sae.config, sae.metadata)


@pytest.mark.parametrize("name", ["standard", "batchtopk", "transcoder"])
def test_sparsify_has_topk_alone(tmp_path, name):
    with pytest.raises(UserError, match="sparsify"):
        save_sparsify(made(name), tmp_path / "a")


def test_a_centred_skip_is_folded_for_saelens(tmp_path):
    sae = load(FOLDERS / "sparsify/topk_skip")  # takes b_dec off the input of the encoder, not of the skip
    assert sae.config.centred and sae.config.skip
    back = load(save(sae, tmp_path / "a"))
    assert not back.config.centred
    same(back(inputs()), sae(inputs()))


@pytest.mark.parametrize("to", ["saelens", "sparsify"])
@pytest.mark.parametrize("name", ["sparsify/topk", "dictionary-learning/topk", "sae-lens/topk_rescaled"])
def test_convert(tmp_path, name, to):
    out = convert(FOLDERS / name, tmp_path / "a", to)
    assert (out / ("sae.safetensors" if to == "sparsify" else "sae_weights.safetensors")).is_file()
    x = load_file(FOLDERS / name / "expected.safetensors")["x"]
    same(load(out)(x), load(FOLDERS / name)(x))


def test_convert_into_the_folder_that_one_is_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert(FOLDERS / "sae-lens/topk", ".", "saelens")
    assert load(tmp_path).config == load(FOLDERS / "sae-lens/topk").config


def test_convert_keeps_sparsity_and_refuses_other_formats(tmp_path):
    out = convert(FOLDERS / "sae-lens/standard", tmp_path / "a")
    assert torch.equal(read_sparsity(out), read_sparsity(FOLDERS / "sae-lens/standard"))
    with pytest.raises(UserError, match="valid: saelens, sparsify"):
        convert(FOLDERS / "sae-lens/standard", tmp_path / "b", "gguf")


# Where it is found, and as what


def test_a_run_is_its_sae_folder(tmp_path):
    save(made("topk"), tmp_path / "run/sae")
    (tmp_path / "run/log.jsonl").write_text("")
    same(load(tmp_path / "run")(inputs()), load(tmp_path / "run/sae")(inputs()), 0.0)


def test_a_folder_of_folders_names_them(tmp_path):
    save(made("topk"), tmp_path / "layers.1")
    save(made("topk"), tmp_path / "sae/layers.2")
    with pytest.raises(UserError, match=r"layers\.1, sae/layers\.2"):
        load(tmp_path)


def test_two_formats_in_one_folder(tmp_path):
    save(made("topk"), tmp_path / "a")
    save_file({"x": torch.zeros(1)}, tmp_path / "a/sae.safetensors")
    with pytest.raises(UserError, match="several"):
        load(tmp_path / "a")


def test_dtype_widens_thresholds_alone(tmp_path):
    sae = made("jumprelu")
    narrow = load(save(sae, tmp_path / "a"), dtype=torch.bfloat16)
    assert narrow.W_enc.dtype == torch.bfloat16 and torch.allclose(narrow.threshold, sae.threshold, rtol=1e-6)
    assert load(tmp_path / "a", dtype=torch.float64).W_enc.dtype == torch.float64
    assert load(FOLDERS / "sae-lens/standard_bfloat16").W_enc.dtype == torch.float32
    with pytest.raises(UserError, match="floats"):
        load(tmp_path / "a", dtype=torch.int64)
    with pytest.raises(UserError, match="cannot put"):
        load(tmp_path / "a", device="nowhere")


def test_a_threshold_below_0_does_what_0_does(tmp_path):
    folder = copied("sae-lens/jumprelu", tmp_path / "a")
    weights = load_file(folder / "sae_weights.safetensors")
    save_file(weights | {"threshold": torch.full((D_SAE,), -1.0)}, folder / "sae_weights.safetensors")
    pre = (inputs() - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    assert torch.allclose(load(folder)(inputs()).features, pre.relu(), atol=1e-5)


# Damage


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda found: found.pop("b_enc"), "b_enc is missing"),
        (lambda found: found.update(W_other=torch.zeros(2)), "W_other is unknown"),
        (lambda found: found.update(b_dec=torch.zeros(7)), "b_dec is (7,), not (6,)"),
        (lambda found: found.update(b_dec=torch.zeros(6, dtype=torch.int64)), "b_dec is of torch.int64"),
        (lambda found: found.update(scaling_factor=torch.full((16,), 2.0)), "scaling_factor is unknown"),
    ],
    ids=["missing", "unknown", "shape", "kind", "scale"],
)
def test_wrong_tensors_are_named(tmp_path, spoil, named):
    folder = copied("sae-lens/standard", tmp_path / "a")
    weights = load_file(folder / "sae_weights.safetensors")
    spoil(weights)
    save_file(weights, folder / "sae_weights.safetensors")
    with pytest.raises(UserError) as caught:
        load(folder)
    assert named in str(caught.value)


@pytest.mark.parametrize("name", ["sae-lens/topk", "sparsify/topk", "dictionary-learning/topk"])
@pytest.mark.parametrize("kind", ["empty", "cut", "text"])
def test_damaged_files(tmp_path, name, kind):
    folder = copied(name, tmp_path / "a")
    weights = next(
        folder / one for one in ("sae_weights.safetensors", "sae.safetensors", "ae.pt") if (folder / one).exists()
    )
    whole = weights.read_bytes()
    weights.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"no weights at all"}[kind])
    with pytest.raises(UserError) as caught:
        load(folder)
    assert weights.name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "{"], ids=["empty", "list", "cut"])
def test_damaged_config(tmp_path, text):
    folder = copied("sparsify/topk", tmp_path / "a")
    (folder / "cfg.json").write_text(text)
    with pytest.raises(UserError, match=r"cfg\.json"):
        load(folder)


class Malicious:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("writer", ["torch", "protocol-2", "protocol-4"])
def test_a_pickle_that_wants_to_run_code(tmp_path, writer):
    folder, ran = copied("dictionary-learning/topk", tmp_path / "a"), tmp_path / "ran"
    bad = {"encoder.weight": torch.zeros(2), "x": Malicious(str(ran))}
    if writer == "torch":
        torch.save(bad, folder / "ae.pt")
    else:
        (folder / "ae.pt").write_bytes(pickle.dumps(Malicious(str(ran)), protocol=int(writer[-1])))
    with pytest.raises(UserError) as caught:
        load(folder)
    assert not ran.exists() and "\n" not in str(caught.value) and "only tensors" in str(caught.value)
    assert "mkdir" in str(caught.value) or writer == "protocol-4"
    pickle.loads(pickle.dumps(Malicious(str(ran))))  # noqa: S301 (it would have run)
    assert ran.is_dir()


def test_dictionary_learning_config(tmp_path):
    folder = copied("dictionary-learning/topk", tmp_path / "a")
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    for changes, named in (
        ({"dict_class": "IdentityDict"}, "IdentityDict"),
        ({"k": 5}, "k is 5"),
        ({"k": None}, "k is"),
    ):
        edit(folder / "config.json", trainer=trainer | changes)
        with pytest.raises(UserError, match=named):
            load(folder)


def test_a_note_that_contradicts_its_config(tmp_path):
    folder = save(made("topk"), tmp_path / "a")
    edit(folder / "cfg.json", k=3)
    with pytest.raises(UserError, match="contradicts"):
        load(folder)


# Writing


def test_a_folder_is_replaced_only_if_it_is_an_autoencoders(tmp_path):
    save(made("topk"), tmp_path / "a")
    save(made("jumprelu"), tmp_path / "a")
    assert load(tmp_path / "a").config.architecture == "jumprelu"
    (tmp_path / "a/thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        save(made("topk"), tmp_path / "a")
    assert (tmp_path / "a/thesis.tex").exists() and load(tmp_path / "a").config.architecture == "jumprelu"


@pytest.mark.parametrize(
    "fails", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stopped"]
)
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, fails):
    save(made("jumprelu"), tmp_path / "a")

    def full(*args, **options):
        raise fails

    monkeypatch.setattr("mechinterp.sae.formats.writing.save_file", full)
    with pytest.raises(KeyboardInterrupt if isinstance(fails, KeyboardInterrupt) else UserError):
        save(made("topk"), tmp_path / "a")
    assert [one.name for one in tmp_path.iterdir()] == ["a"] and load(tmp_path / "a").config.architecture == "jumprelu"


def test_sparsity_of_another_size(tmp_path):
    with pytest.raises(UserError, match="one number a feature"):
        save(made("topk"), tmp_path / "a", torch.zeros(3))
    assert not list(tmp_path.iterdir())


# The hub


@pytest.mark.parametrize("name", ["owner/name:blocks.8/sub", "owner/name/blocks.8/sub"])
def test_a_name_on_the_hub(tmp_path, monkeypatch, name):
    asked = {}

    def snapshot(repository, allow_patterns):
        asked[repository] = allow_patterns
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    (tmp_path / "blocks.8").mkdir()
    copied("sae-lens/topk", tmp_path / "blocks.8/sub")
    assert load(name).config.k == 4
    assert set(asked) == {"owner/name"} and all(one.startswith("blocks.8/sub/") for one in asked["owner/name"])
    assert not any(one.endswith("*") for one in asked["owner/name"])


def test_a_hub_that_has_no_such_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: str(tmp_path))
    with pytest.raises(UserError, match="owner/name on the hub has no autoencoder in nowhere"):
        load("owner/name:nowhere")


@pytest.mark.parametrize(
    "name",
    ["nobody/nothing", "nobody/nothing:blocks.3", "release-name", "../up/there", "a/b:../c", "x" * 300],
    ids=lambda name: name[:20].replace("/", "-"),
)
def test_what_is_nowhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:  # the tests have no hub
        load(name)
    assert "\n" not in str(caught.value) and "there is no folder" in str(caught.value)


def test_a_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="no folder"):
        load(Path("owner/name"))
    with pytest.raises(UserError, match="is a file"):
        load(FOLDERS / "sae-lens/topk/cfg.json")
