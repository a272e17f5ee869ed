"""The settings of a training run: what is refused, what follows from what, how they are kept."""

import json
import math
import re
import subprocess
import sys
from dataclasses import fields, replace
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from mechinterp.errors import UserError


def as_users_have_it():
    """The settings without the type checks of the tests, which would refuse a bad value before they do."""
    file = find_spec("mechinterp.sae.config").origin
    spec = spec_from_file_location("unchecked_config", file)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TrainConfig


TrainConfig = as_users_have_it()
HERE = Path(__file__)
BAD = {
    # name: settings, what the message must say
    "k above d_sae": ({"k": 65, "d_sae": 64}, "k must be 1 … d_sae = 64; found 65"),
    "k of 0": ({"k": 0}, "k must be 1"),
    "no feature": ({"d_sae": 0, "architecture": "standard"}, "d_sae must be at least 1; found 0"),
    "features that do not divide": ({"architecture": "matryoshka", "d_sae": 100}, "d_sae 100 cannot be divided"),
    "prefixes that do not ascend": ({"architecture": "matryoshka", "prefixes": (0.5, 0.25, 1.0)}, "must ascend"),
    "prefixes that do not end": ({"architecture": "matryoshka", "prefixes": (0.25, 0.5)}, "must ascend"),
    "no prefixes": ({"architecture": "matryoshka", "prefixes": ()}, "must ascend"),
    "a prefix twice": ({"architecture": "matryoshka", "prefixes": (0.5, 0.5, 1.0)}, "must ascend"),
    "unknown architecture": ({"architecture": "top-k"}, "one of standard, gated, topk, .*; found 'top-k'"),
    "unknown kind": ({"kind": "coder"}, "kind must be one of sae, .*; found 'coder'"),
    "unknown penalty": ({"architecture": "jumprelu", "penalty": "l1"}, "penalty must be one of l0, tanh; found 'l1'"),
    "unknown tracker": ({"tracker": "mlflow"}, "tracker must be one of none, trackio, wandb; found 'mlflow'"),
    "unknown dtype": ({"dtype": "int8"}, "dtype must be one of float32, float16, bfloat16; found 'int8'"),
    "sparsity for topk": ({"sparsity": 1.0}, "topk has k"),
    "penalty for topk": ({"penalty": "tanh"}, "penalty is for jumprelu"),
    "bandwidth for gated": ({"architecture": "gated", "bandwidth": 0.1}, "bandwidth is for jumprelu"),
    "threshold for topk": ({"threshold": 0.1}, "threshold is for jumprelu"),
    "pre_activation for standard": ({"architecture": "standard", "pre_activation": 0.1}, "pre_activation is for"),
    "pre_activation for l0": ({"architecture": "jumprelu", "pre_activation": 0.1}, "is for jumprelu's penalty tanh"),
    "a target without a transcoder": ({"target": "mlp_out"}, "target is for transcoders; this is a sae"),
    "a crosscoder of one layer": ({"kind": "crosscoder", "layer": 3}, "a crosscoder reads several layers"),
    "no layer": ({"layer": ()}, "layer names none"),
    "a layer twice": ({"layer": (1, 1)}, "layer names one twice"),
    "a layer that is no number": ({"layer": "8"}, "layer must be int; found"),
    "two sources": ({"text": HERE, "dataset": "x"}, "one of text, dataset and store; found text and dataset"),
    "store and text": ({"text": HERE, "store": Path("x")}, "found text and store"),
    "a missing text": ({"text": Path("no/such.txt")}, "no such text file: no/such.txt"),
    "a buffer below a batch": ({"batch": 64, "buffer": 63}, "buffer must hold a batch of 64; found 63"),
    "fewer tokens than a batch": ({"batch": 64, "n_tokens": 63}, "n_tokens must be at least a batch, 64; found 63"),
    "no tokens": ({"n_tokens": 0}, "n_tokens must be at least 1"),
    "a batch of one": ({"batch": 1}, "batch must be at least 2, to have a variance; found 1"),
    "a prefix that is nan": ({"architecture": "matryoshka", "prefixes": (math.nan, 1.0)}, "above 0 and up to 1"),
    "an infinite prefix": ({"architecture": "matryoshka", "prefixes": (math.inf, 1.0)}, "above 0 and up to 1"),
    "no layer at all": ({"layer": None}, "layer must be one value or several; found None"),
    "half a layer": ({"layer": 1.5}, "layer must be int; found 1.5"),
    "text that is none": ({"text": None}, "text must be one value or several; found None"),
    "text that is a number": ({"text": 5}, "text must be one value or several; found 5"),
    "a store that is a number": ({"store": 5}, "store must be a path or None; found 5"),
    "harvest of nothing": ({"harvest_blocks": 0}, "harvest_blocks must be at least 1"),
    "log every 0": ({"log_every": 0}, "log_every must be at least 1"),
    "one held-out token": ({"eval_tokens": 1}, "eval_tokens must be at least 2"),
    "no checkpoint kept": ({"keep": 0}, "keep must be at least 1"),
    "negative eval_every": ({"eval_every": -1}, "eval_every must be at least 0"),
    "negative checkpoint_every": ({"checkpoint_every": -1}, "checkpoint_every must be at least 0"),
    "negative k_aux": ({"k_aux": -1}, "k_aux must be at least 0"),
    "negative dead_after": ({"dead_after": -1}, "dead_after must be at least 0"),
    "sparsity of 0": ({"architecture": "standard", "sparsity": 0.0}, "sparsity must be above 0"),
    "infinite rate": ({"learning_rate": math.inf}, "learning_rate must be above 0 and finite; found inf"),
    "a rate that is nan": ({"learning_rate": math.nan}, "learning_rate must be above 0 and finite; found nan"),
    "negative clip": ({"clip": -1.0}, "clip must be above 0"),
    "negative aux": ({"aux": -1.0}, "aux must be at least 0 and finite"),
    "aux that is nan": ({"aux": math.nan}, "aux must be at least 0 and finite; found nan"),
    "outlier of 1": ({"outlier": 1.0}, "outlier must be above 1"),
    "warm-up above 1": ({"warm_up": 1.5}, "warm_up is a share of the steps, 0 … 1; found 1.5"),
    "negative decay": ({"decay": -0.1}, "decay is a share"),
    "sparsity warm-up above 1": ({"architecture": "standard", "sparsity_warm_up": 2.0}, "sparsity_warm_up is a share"),
    "a context of 1": ({"context": 1}, "context must be at least 2"),
    "all held out": ({"held_out_every": 1}, "held_out_every must be at least 2"),
    "negative seed": ({"seed": -1}, "seed must be 0"),
    "huge seed": ({"seed": 2**32}, "seed must be 0"),
    "half a feature": ({"k": 2.5}, "k must be int; found 2.5"),
    "a word for a number": ({"n_tokens": "1M"}, "n_tokens must be int; found '1M'"),
    "a word for a rate": ({"learning_rate": "high"}, "learning_rate must be float or None; found 'high'"),
    "a number for a switch": ({"autocast": 1}, "autocast must be bool; found 1"),
    "a switch for a number": ({"batch": True}, "batch must be int; found True"),
    "no model": ({"model": None}, "model must be str; found None"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_setting_is_refused_in_one_line(name):
    settings, message = BAD[name]
    with pytest.raises(UserError, match=message) as caught:
        TrainConfig(**{"model": "m", **settings})
    assert "\n" not in str(caught.value)


def test_whole_numbers_do_where_others_are_asked_for():
    assert TrainConfig(model="m", learning_rate=1, clip=1, architecture="matryoshka", prefixes=(1,)).prefix_sizes()


def test_one_of_a_kind_stands_for_a_tuple():
    made = TrainConfig(model="m", layer=8, text=HERE)
    assert made.layer == (8,) and made.text == (HERE,)
    assert TrainConfig(model="m", layer=[1, 2], text=[str(HERE)]) == TrainConfig(model="m", layer=(1, 2), text=(HERE,))


DEFAULTS = {
    "topk": {"scale": "norm", "sparsity": None, "sparsity_warm_up": 0.0, "learning_rate": 2e-4 * 2, "k_aux": 24},
    "batchtopk": {"scale": "norm", "sparsity": None, "learning_rate": 2e-4 * 2, "k_aux": 24},
    "matryoshka": {"scale": "norm", "sparsity": None, "learning_rate": 2e-4 * 2, "k_aux": 24},
    "standard": {"scale": "norm", "sparsity": 5.0, "sparsity_warm_up": 0.05, "learning_rate": 5e-5, "k_aux": None},
    "gated": {"scale": "unit", "learning_rate": 3e-4, "bandwidth": None, "threshold": None},
    "jumprelu": {"scale": "unit", "sparsity_warm_up": 0.1, "learning_rate": 7e-5, "bandwidth": 0.001,
                 "threshold": 0.001, "pre_activation": None},
}  # fmt: skip


@pytest.mark.parametrize("architecture", DEFAULTS)
def test_what_is_none_is_worked_out(architecture):
    asked = TrainConfig(model="m", architecture=architecture, d_sae=4096, n_tokens=1_000_000)
    made = asked.resolved(48)
    for name, value in DEFAULTS[architecture].items():
        assert getattr(made, name) == pytest.approx(value), name
    assert (made.dead_after, made.eval_every, made.checkpoint_every) == (50_000, 50_000, 100_000)
    assert made.target is None
    assert made.resolved(48) == made  # nothing is left to be worked out


def test_the_tanh_penalty_has_constants_of_its_own():
    made = TrainConfig(model="m", architecture="jumprelu", penalty="tanh").resolved(48)
    assert (made.scale, made.sparsity, made.bandwidth, made.threshold) == ("norm", 20.0, 2.0, 0.1)
    assert (made.pre_activation, made.sparsity_warm_up) == (3e-6, 1.0)


def test_what_is_given_is_kept():
    given = {"learning_rate": 1e-2, "sparsity": 0.5, "sparsity_warm_up": 0.25, "dead_after": 0, "eval_every": 0,
             "checkpoint_every": 7, "bandwidth": 0.5, "threshold": 0.25}  # fmt: skip
    made = TrainConfig(model="m", architecture="jumprelu", **given).resolved(48)
    assert {name: getattr(made, name) for name in given} == given
    assert TrainConfig(model="m", k_aux=0).resolved(48).k_aux == 0


def test_dead_after_is_bounded_and_a_transcoder_has_a_target():
    made = TrainConfig(model="m", kind="skip-transcoder", n_tokens=10**9).resolved(48)
    assert made.dead_after == 10_000_000 and made.target == "mlp_out" and made.transcodes
    assert TrainConfig(model="m", kind="transcoder", target="attn_out").resolved(48).target == "attn_out"
    assert not TrainConfig(model="m", kind="crosscoder", layer=(1, 2)).transcodes


def test_steps_are_whole_batches():
    assert TrainConfig(model="m", n_tokens=1_000, batch=300, buffer=300).n_steps == 3
    assert TrainConfig(model="m", n_tokens=300, batch=300, buffer=300).n_steps == 1


CONFIGS = [
    {},
    {"text": (HERE, HERE.parent / "__init__.py"), "layer": (0, -1), "out": Path("a/b"), "seed": 7},
    {"architecture": "matryoshka", "prefixes": (0.25, 1.0), "store": Path("s")},
    {"architecture": "jumprelu", "penalty": "tanh", "pre_activation": 1e-7, "learning_rate": 1 / 3},
    {"kind": "transcoder", "target": "attn_out", "device": "cpu", "outlier": 8, "keep_first": True},
]


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_json_and_back(number, tmp_path):
    settings = CONFIGS[number]
    if "text" in settings:  # must be there
        file = tmp_path / "a.txt"
        file.write_text("x")
        settings = settings | {"text": (file, HERE)}
    made = TrainConfig(model="m", **settings)
    values = json.loads(json.dumps(made.to_json(), allow_nan=False))
    assert values == made.to_json()  # a checkpoint compares these
    assert TrainConfig.of(values) == made
    assert TrainConfig.of(made.resolved(48).to_json()) == made.resolved(48)
    assert set(values) == {one.name for one in fields(TrainConfig)}


def test_unknown_and_bad_keys_of_a_file_are_refused():
    values = TrainConfig(model="m").to_json()
    with pytest.raises(UserError, match=re.escape("unknown settings of a training run: kk, lr")):
        TrainConfig.of(values | {"lr": 1, "kk": 2})
    with pytest.raises(UserError, match="d_sae must be int; found '64'"):
        TrainConfig.of(values | {"d_sae": "64"})


def test_the_folder_follows_from_the_settings_and_not_from_out():
    one = TrainConfig(model="m")
    assert one.folder == TrainConfig(model="m").folder
    assert re.fullmatch(r"runs/sae/[0-9a-f]{12}", str(one.folder))
    assert replace(one, out=Path("x")).folder == Path("x")
    assert replace(replace(one, out=Path("x")), out=None).folder == one.folder
    others = [{"seed": 1}, {"model": "n"}, {"layer": (0,)}, {"k": 16}, {"learning_rate": 1e-3}, {"text": (HERE,)}]
    assert len({replace(one, **more).folder for more in others} | {one.folder}) == len(others) + 1


def test_settings_come_without_torch():
    script = "import sys; import mechinterp.sae.config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
