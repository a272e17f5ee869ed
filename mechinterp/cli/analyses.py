"""Subcommands that analyse: patch, lens, tune, dla, heads, ablate, attention, steer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mechinterp.cli.flags import (
    Direction,
    MetricName,
    OnModel,
    OnPairs,
    OutputFile,
    SiteName,
    Switch,
    check_outputs,
    parse_edges,
    parse_heads,
    parse_layers,
    parse_strengths,
    require,
)
from mechinterp.pairs_file import read_pairs_file
from mechinterp.token_file import read_token_file


@dataclass(frozen=True)
class Patch(OnPairs):
    """Patch every cell of a site, one at a time: effects with intervals and controls."""

    site: SiteName = "z"
    """What to patch (`mechinterp sites MODEL` says what each one is, and which the model has)."""
    positions: str = "all"
    """all (the whole activation at once), each, last, roles (each in turn), role names (END,S2), or indices (0,-1)."""
    direction: Direction = "denoise"
    """denoise puts clean activations into the corrupted run, noise the reverse."""
    metric: MetricName = "logit-diff"
    """What to measure."""
    layers: Annotated[str | None, tyro.conf.arg(metavar="LAYERS")] = None
    """Which layers, such as 3,4,8-11; all by default."""
    json: OutputFile = None
    """Write effects, intervals, controls and the values of every prompt here."""
    html: OutputFile = None
    """Write a report here: one file that opens offline."""
    force: Switch = False
    """Sweep although the model does not do the task."""

    def check_flags(self) -> None:
        """Raise UserError for wrong flags, an unreadable pairs file, or outputs that cannot be written."""
        super().check_flags()
        parse_layers(self.layers)
        check_outputs(self.json, self.html)


@dataclass(frozen=True)
class Lens(OnModel):
    """Logit lens: what each layer would already predict, read through the final norm and the unembedding."""

    prompt: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """A text; the prediction of its last token is read."""
    answer: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """A token, with its leading space, whose probability and rank are followed: " Paris"."""
    pairs: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Prompt pairs as JSON lines, instead of --prompt: means over prompts, with intervals and a control."""
    positions: Literal["last", "all"] = "last"
    """Read the last position of --prompt, or all of them."""
    tuned: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """A tuned lens of this model (`mechinterp tune` trains one), in place of the plain logit lens."""
    top: int = 5
    """Likeliest tokens to name at each layer."""
    seed: int = 0
    """Seed of the intervals."""
    json: OutputFile = None
    """Write layers, top tokens, probability, rank, entropy and KL here."""
    html: OutputFile = None
    """Write a report here: one file that opens offline."""

    def check_flags(self) -> None:
        """Raise UserError for wrong flags, an unreadable pairs file, or outputs that cannot be written."""
        super().check_flags()
        require((self.prompt is None) != (self.pairs is None), "give the text: either --prompt TEXT or --pairs FILE")
        require(self.prompt != "", "--prompt is empty: give at least one token")
        require(
            self.answer is None or self.pairs is None, "--answer goes with --prompt; --pairs have their own answers"
        )
        require(self.pairs is None or self.positions == "last", "--positions all goes with --prompt")
        require(self.top >= 1, f"--top must be at least 1; found {self.top}")
        require(self.tuned is None or self.tuned.is_dir(), f"there is no tuned lens at {self.tuned}")
        check_outputs(self.json, self.html)
        if self.pairs is not None:
            read_pairs_file(self.pairs)


@dataclass(frozen=True, kw_only=True)
class Tune(OnModel):
    """Train a tuned lens: an affine translator a layer that matches the final prediction on text."""

    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Folder to write the lens to: weights as safetensors, and its config."""
    text: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """A text file, a .jsonl file, or the name of a hub data set; by default the help topics of the Python language."""
    blocks: int = 256
    """Token blocks, a tenth of them held out for the evaluation."""
    length: int = 128
    """Tokens of a block."""
    steps: int | None = None
    """Optimiser steps; by default the trainer's own."""
    seed: int = 0
    """Seed of the training."""
    json: OutputFile = None
    """Write the KL by layer on held-out text here, of the tuned and of the logit lens."""

    def check_flags(self) -> None:
        """Raise UserError for wrong flags or outputs that cannot be written."""
        super().check_flags()
        require(self.out.absolute().parent.is_dir(), f"cannot write {self.out}: there is no folder above it")
        require(not self.out.is_file(), f"cannot write {self.out}: it is a file")
        for name in ("blocks", "length"):
            require(getattr(self, name) >= 2, f"--{name} must be at least 2; found {getattr(self, name)}")
        require(self.steps is None or self.steps >= 1, f"--steps must be at least 1; found {self.steps}")
        check_outputs(self.json)


@dataclass(frozen=True)
class Dla(OnPairs):
    """Direct logit attribution: what each head, MLP and the embedding write for the answer."""

    side: Literal["clean", "corrupted"] = "clean"
    """Which prompts of the pairs to run."""
    against: Literal["wrong", "mean", "nothing"] | None = None
    """The answer's logit less the wrong answer's (default where there is one), less the mean logit, or alone."""
    sources: Literal["roles", "each"] | None = None
    """Split each head by the role, or the position, that it moves from."""
    neurons: int = 0
    """Name this many neurons of largest effect."""
    json: OutputFile = None
    """Write every component's effect, with intervals and controls, here."""
    html: OutputFile = None
    """Write a report here: one file that opens offline."""

    def check_flags(self) -> None:
        """Raise UserError for wrong flags or outputs that cannot be written."""
        super().check_flags()
        require(self.neurons >= 0, f"--neurons must not be negative; found {self.neurons}")
        check_outputs(self.json, self.html)


@dataclass(frozen=True)
class Heads(OnModel):
    """Which heads attend by a pattern: induction, previous token, duplicate token, first token, self."""

    tokens: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A JSON list of token-id lists, used as they are; by default repeated random tokens are made."""
    period: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Length of the repeated part: the second copy is the last N tokens of each sequence. 50 where tokens are made."""
    n: int = 32
    """Sequences to make."""
    seed: int = 0
    """Seed of the sequences, the nulls and the intervals."""
    causal: Annotated[int, tyro.conf.arg(metavar="K")] = 0
    """Also knock the K top induction heads out, against K random heads of the same layers."""
    json: OutputFile = None
    """Write every head's scores, intervals and nulls here."""
    html: OutputFile = None
    """Write a report here: one file that opens offline."""

    def check_flags(self) -> None:
        """Raise UserError for wrong flags, an unreadable token file, or outputs that cannot be written."""
        super().check_flags()
        require(self.n >= 1, f"--n must be at least 1; found {self.n}")
        require(self.causal >= 0, f"--causal must not be negative; found {self.causal}")
        require(self.period is None or self.period >= 2, f"--period must be at least 2; found {self.period}")
        require(self.tokens is None or self.period is not None, "--tokens needs --period N, the length of what repeats")
        check_outputs(self.json, self.html)
        if self.tokens is not None:
            read_token_file(self.tokens)


@dataclass(frozen=True)
class Ablate(OnPairs):
    """Knock heads, MLPs, neurons or attention edges out: logit difference, P(answer) and accuracy before and after."""

    heads: Annotated[str | None, tyro.conf.arg(metavar="HEADS")] = None
    """Heads as layer.head: 9.6,10.0."""
    mlps: Annotated[str | None, tyro.conf.arg(metavar="LAYERS")] = None
    """MLPs by layer: 3,4,8-11."""
    neurons: Annotated[str | None, tyro.conf.arg(metavar="NEURONS")] = None
    """Neurons as layer.index: 3.127,5.8."""
    edges: Annotated[str | None, tyro.conf.arg(metavar="EDGES")] = None
    """Attention from a query role to a key role, of one head or all: 9.6:END>IO,*:END>S2."""
    value: Literal["mean", "zero", "resample"] = "mean"
    """What an activation becomes: its mean over prompts, zero, or that of another prompt."""
    positions: str = "all"
    """Where: all, last, roles (all of them), role names (END,S2), or indices (0,-1)."""
    over: Literal["clean", "corrupted"] = "clean"
    """Prompts that means and donors are taken from."""
    by: Literal["role", "template", "position", "all"] | None = None
    """Means by role (default where the pairs have roles), by template and position, by position, or over everything."""
    text: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """Also the loss on plain text: a text file, a data set's name, or "built-in"."""
    draws: int = 20
    """Random knock-outs of as many heads of the same layers, as the control."""
    force: Switch = False
    """Go on although the model does not do the task."""
    json: OutputFile = None
    """Write both metrics before and after, with intervals and the control, here."""
    html: OutputFile = None
    """Write a report here: one file that opens offline."""

    def check_flags(self) -> None:
        """Raise UserError for wrong flags or outputs that cannot be written."""
        super().check_flags()
        asked = (self.heads, self.mlps, self.neurons, self.edges)
        require(
            any(one is not None for one in asked), "nothing to knock out; give --heads, --mlps, --neurons or --edges"
        )
        parse_heads(self.heads)
        parse_layers(self.mlps, "--mlps")
        parse_heads(self.neurons, "--neurons")
        parse_edges(self.edges)
        require(self.draws >= 0, f"--draws must not be negative; found {self.draws}")
        check_outputs(self.json, self.html)


@dataclass(frozen=True, kw_only=True)
class Attention(OnModel):
    """Attention patterns of a prompt, as one HTML file that opens offline."""

    prompt: Annotated[str, tyro.conf.arg(metavar="TEXT")]
    """A text."""
    heads: Annotated[str, tyro.conf.arg(metavar="HEADS")]
    """Heads as layer.head: 9.6,10.0; or "9" for all heads of a layer."""
    html: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """Write the page here."""
    json: OutputFile = None
    """Write tokens and patterns here."""

    def check_flags(self) -> None:
        """Raise UserError for wrong flags or outputs that cannot be written."""
        super().check_flags()
        require(self.prompt != "", "--prompt is empty: give at least one token")
        parse_heads(self.heads, whole_layers=True)
        check_outputs(self.json, self.html)


@dataclass(frozen=True, kw_only=True)
class Steer(OnModel):
    """Steer with the mean difference of two sets of texts: strengths beside random directions, and continuations."""

    positive: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT")]
    """Texts to steer towards; or one file with a text a line."""
    negative: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT")]
    """Texts to steer away from; or one file with a text a line."""
    layer: int
    """Layer whose residual stream (behind the block) is read and steered; negative counts from the end."""
    prompt: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT")]
    """Texts to steer: their next token is measured, and they are continued; or one file with a text a line."""
    answer: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TOKEN")]
    """Tokens that show the behaviour, with their leading spaces: " good" " great"."""
    wrong: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TOKEN")]
    """Tokens that show the opposite: " bad" " awful"."""
    strengths: str = "-2,-1,1,2"
    """Factors of the vector; write negative ones as --strengths=-2,2. 0 is always among them."""
    positions: Literal["last", "all"] = "last"
    """Tokens of the contrast texts that the vector is the mean over."""
    max_new_tokens: int = 24
    """Tokens to generate at each strength; 0 for none."""
    draws: int = 19
    """Random directions of the same norm, as the control."""
    seed: int = 0
    """Seed of the control."""
    json: OutputFile = None
    """Write the sweep and the generations here."""
    html: OutputFile = None
    """Write a report here: one file that opens offline."""

    def check_flags(self) -> None:
        """Raise UserError for wrong flags or outputs that cannot be written."""
        super().check_flags()
        for name in ("positive", "negative", "prompt", "answer", "wrong"):
            texts = getattr(self, name)
            require(bool(texts) and all(texts), f"--{name} needs at least one text, none of them empty")
        parse_strengths(self.strengths)
        require(self.max_new_tokens >= 0, f"--max-new-tokens must not be negative; found {self.max_new_tokens}")
        require(self.draws >= 1, f"--draws must be at least 1; found {self.draws}")
        check_outputs(self.json, self.html)
