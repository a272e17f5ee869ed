"""A synthetic report with everything that a report can show, including what is awkward: markup, NaN, many heads."""

import numpy as np
import pytest

from mechinterp.reporting import (
    AttentionView,
    Prompt,
    Report,
    Section,
    Table,
    bars,
    curves,
    heatmap,
    small_multiples,
    visible,
)

TOKENS = tuple("When| Mary| and| John| went| to| the| store|,| John| gave| a| drink| to".split("|"))  # noqa: SIM905
ROLES = (None, "IO", None, "S1", "S1+1", None, None, None, None, "S2", None, None, None, "END")
HOSTILE = '</script><script>alert(1)</script><b onclick="alert(2)">'


def lens_figures():
    """Layers × tokens with a token in each cell, the first layer at the bottom; and lines over layers, one log."""
    rng = np.random.default_rng(1)
    tokens, layers = ("The", " capital", " of", "\n"), range(5)
    probability = np.linspace(0.02, 0.9, 5)[:, None] * rng.uniform(0.4, 1, (5, 4))
    probability[1, 2] = np.nan
    says = [[" Paris", "ly", HOSTILE, "\n"]] * 4 + [[" Paris", " antidisestablishment", " the", ""]]
    grid = heatmap(
        probability, [visible(token) for token in tokens], layers, value="probability", scale="sequential", zmax=1.0,
        text=says, more={"rank": (np.arange(20) * 50).reshape(5, 4)}, first_at_top=False, title="Logit lens",
        labels=[[f"layer {layer} at {visible(token)}" for token in tokens] for layer in layers],
    )  # fmt: skip
    answer = np.array([0.01, 0.03, np.nan, 0.4, 0.8])
    lines = {"answer": answer, "wrong": answer * 0.5 + 0.1, "another prompt's answer": np.full(5, 0.05)}
    by_layer = curves(
        layers, lines, ci_low={"answer": answer * 0.8}, ci_high={"answer": answer * 1.1}, facts={"n": 64},
        dashed=["another prompt's answer"], x_title="layer", y_title="probability", title="Probability by layer",
    )  # fmt: skip
    kl = {"logit lens": [4.0, 0.5, 0.02, 0.00031, 0.0]}
    log = curves(layers, kl, x_title="layer", y_title="KL (nats)", title="KL", log_y=True)
    return grid, by_layer, log


def synthetic_report() -> Report:
    rng = np.random.default_rng(0)
    layers, heads = 30, 9
    effect = rng.normal(0, 0.012, (layers, heads))
    order = [(21, 1), (19, 6), (17, 3), (22, 4), (24, 8), (9, 2)]
    for cell, value in zip(order, (0.58, 0.44, 0.31, -0.27, 0.22, 0.13), strict=True):
        effect[cell] = value
    effect[3, 4] = effect[0, 0] = np.nan
    passes = np.abs(np.nan_to_num(effect)) > 0.1
    control = np.where(passes, effect * 0.9, np.nan)
    names = [[f"L{layer}H{head}" for head in range(heads)] for layer in range(layers)]
    facts = {"n": 64, "baseline": "clean 3.52, corrupted −3.41", "direction": "denoise"}
    heads_figure = heatmap(
        effect, range(heads), range(layers), ci_low=effect - 0.03, ci_high=effect + 0.03,
        control=control, passes=passes, labels=names, facts=facts, title="Heads at END, denoising",
        x_title="head", y_title="layer",
    )  # fmt: skip
    top = np.array([effect[cell] for cell in order])
    bar_figure = bars(
        [f"L{layer}H{head}" for layer, head in order], top, ci_low=top - 0.05, ci_high=top + 0.06,
        control=top * np.array([0.92, 0.88, 0.95, 0.9, 0.2, 0.85]), passes=[True, True, True, True, False, True],
        facts=facts, title="Top heads, with a donor of another order and other names", x_title="normalised effect",
    )  # fmt: skip
    roles = ["IO", "S1", "S1+1", "S2", "END"]
    panels = {}
    for name in ("Residual stream", "Attention output", "MLP output"):
        values = rng.normal(0, 0.03, (layers, 5))
        values[:18, 3] += np.linspace(1.0, 0.4, 18)
        values[17:, 4] += np.linspace(0.2, 1.0, 13) if name == "Residual stream" else 0.1
        panels[name] = heatmap(values, roles, range(layers), facts=facts, y_title="layer", title=name)
    pattern = np.tril(rng.random((6, 14, 14)) ** 6) + 1e-3 * np.tril(np.ones((14, 14)))
    pattern[:, 13, 1] += 2.5
    pattern /= pattern.sum(-1, keepdims=True)
    return Report(
        title="ioi_patching",
        question="Which attention heads of SmolLM2-135M carry the indirect-object answer?",
        answer="Five heads pass both controls; L21H1, L19H6 and L17H3 restore 58%, 44% and 31% of the logit difference "
        "at END (64 prompt pairs, swapped subject).",
        header="smollm2-135m · SmolLM2-135M-Instruct, dequantised Q4_1, no chat template · 135M parameters · cpu · "
        "float32 · no BOS · raw weights · n = 64",
        command="python experiments/ioi_patching.py --model smollm2-135m --n 64 --seed 0",
        baseline=(("clean", "3.52"), ("corrupted", "−3.41"), ("accuracy", "98%"), ("n", "64")),
        prompts=(
            Prompt(TOKENS, ROLES, label="clean", answer=" Mary"),
            Prompt((*TOKENS[:9], " Mary", *TOKENS[10:]), ROLES, label="corrupted", answer=" John"),
            Prompt((HOSTILE, "\n", " x"), label="hostile"),
        ),
        sections=(
            Section("Where the answer moves", "Effect of patching each layer at each role.\n\nOne scale for all three.",
                    figures=(small_multiples(panels, columns=3, title="Residual stream, attention and MLP by role"),)),
            Section("Every head", "A dot marks a head that passes both controls.", figures=(heads_figure, bar_figure)),
            Section("What the layers say", figures=lens_figures()),
            Section("The heads found", table=Table(
                ("head", "effect", "95% low", "95% high", "attends to", "passes"),
                tuple((f"L{a}H{b}", effect[a, b], effect[a, b] - 0.03, None, "IO", True) for a, b in order),
                caption="Top heads", max_rows=5)),
            Section("What they attend to", attention=AttentionView(
                TOKENS, tuple(f"L{a}H{b}" for a, b in order), pattern, notes=("name mover",) * 6,
                caption="Attention of the heads found, one clean prompt")),
            Section(HOSTILE, HOSTILE, figures=(heatmap([[0.1, np.nan]], [HOSTILE, "<b>"], ["a"], title=HOSTILE),)),
        ),
        caveats=("Conditional on these 8 templates.", "The model is an instruction-tuned, dequantised one."),
        manifest={"id": "0123456789ab", "versions": {"torch": "2.13.0"}, "seeds": {"seed": 0}, "loss": float("nan"),
                  "argv": ["a", "b"]},
    )  # fmt: skip


@pytest.fixture(scope="session")
def report() -> Report:
    return synthetic_report()


@pytest.fixture(scope="session")
def page(report, tmp_path_factory):
    """The written page of the synthetic report."""
    return report.write(tmp_path_factory.mktemp("run") / "report.html")
