"""`mechinterp sae train | evaluate | features | convert | harvest`."""

from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

from mechinterp import sae as autoencoders
from mechinterp.cli.sae import OnText, SaeConvert, SaeEvaluate, SaeFeatures, SaeHarvest, SaeTrain
from mechinterp.commands.inputs import load_named
from mechinterp.commands.output import frame_text, save
from mechinterp.errors import UserError
from mechinterp.hooked.model import HookedModel
from mechinterp.reporting.features import write_features
from mechinterp.results import write_json
from mechinterp.sae.activations.source import harvest_into, load_model
from mechinterp.sae.autoencoder import SparseAutoencoder
from mechinterp.sae.training.distributed import Processes
from mechinterp.text import Blocks, cut, documents

PER_DOCUMENT = 4  # blocks of one document at most: intervals are over documents


def train(args: SaeTrain, command: str) -> int:
    """The run, and where it is."""
    made = autoencoders.train(args.config, resume=args.resume)
    if not Processes.started().first:  # of those that torchrun has started, one speaks
        return 0
    for name, found in made.held_out.items():
        print(f"{name}: held-out FVU {found['fvu']:.4f}, L0 {found['l0']:.1f}")
    print(f"\nsettings, log, checkpoints and weights in {made.path.absolute()}")
    print(f"measure it in the model: mechinterp sae evaluate {made.path} --text FILE")
    return 0


def evaluate(args: SaeEvaluate, command: str) -> int:
    """All numbers of one autoencoder."""
    sae, model, text, note = _inputs(args)
    result = autoencoders.evaluate(model, sae, text, seed=args.seed)
    print(result.summary())
    print(frame_text(result.top(20)))
    if args.json:
        save(args.json, result.to_json() | {"command": command, "note": note}, write_json)
    return 0


def features(args: SaeFeatures, command: str) -> int:
    """Features as a table, a dashboard, data."""
    sae, model, text, note = _inputs(args)
    chosen = list(args.features) or min(args.n, sae.config.d_sae)
    result = autoencoders.describe(model, sae, text, chosen, seed=args.seed)
    print(result.summary())
    print(frame_text(result.top(12)))
    if args.html:
        save(args.html, result, partial(_write_dashboard, command))
    if args.json:
        save(args.json, result.to_json() | {"command": command, "note": note}, write_json)
    return 0


def _write_dashboard(command: str, path: Path, result: autoencoders.Features) -> None:
    write_features(result, path, command)


def convert(args: SaeConvert, command: str) -> int:
    """One folder into another."""
    autoencoders.convert(args.folder, args.out, args.to)
    print(f"wrote {args.out.absolute()} ({args.to})")
    return 0


def harvest(args: SaeHarvest, command: str) -> int:
    """A store of activations."""
    assert args.out is not None, "check_flags asked for it"
    model = load_model(args.config, Processes())  # first, so that its header stands above the bar
    with tqdm(total=args.n_tokens, unit="token", unit_scale=True, desc="harvest", delay=1) as bar:
        manifest = harvest_into(args.config, args.out, args.shard_tokens, args.store_dtype, partial(_show, bar), model)
    print(f"{manifest.tokens:,} tokens at {', '.join(manifest.widths)} in {args.out.absolute()}")
    print(f"train on them: mechinterp sae train --model {args.model} --store {args.out} …")
    return 0


def _show(bar: tqdm, tokens: int) -> None:
    """Move the bar to so many tokens."""
    bar.update(tokens - bar.n)


def _inputs(args: OnText) -> tuple[SparseAutoencoder, HookedModel, Blocks, str]:
    """The autoencoder, the model that it belongs to, the text, and what is to be said of the text."""
    sae = autoencoders.load(args.folder)
    name = args.model or sae.metadata.model
    if not name:
        raise UserError(f"{args.folder} does not say which model it belongs to; give --model MODEL")
    bos = args.prepend_bos if args.prepend_bos is not None else sae.metadata.bos
    model = load_named(name, args, bos)
    sae.to(model.device)
    length = args.length or sae.metadata.context or 128
    text = cut(model, *documents(args.dataset or args.text, args.split, args.column), length, args.blocks, PER_DOCUMENT)
    print(f"text: {text.source}, {len(text)} blocks of {length} tokens, {len(text.document.unique())} documents")
    note = _not_held_out(sae, args)
    if note:
        print(f"note: {note}")
    return sae, model, text, note


def _not_held_out(sae: SparseAutoencoder, args: OnText) -> str:
    """Numbers on text that was trained on are no held-out numbers: a line that says so, or nothing."""
    given = {args.dataset} if args.dataset else {path.name for path in args.text}
    seen = given & set(sae.metadata.text.split(", "))
    if not seen:
        return ""
    return f"it was trained on text of the name {', '.join(sorted(seen))}; these numbers are not held out"
