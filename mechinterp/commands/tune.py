"""`mechinterp tune MODEL`: train a tuned lens on text, and measure it on text that was held out."""

from mechinterp.cli.analyses import Tune
from mechinterp.commands.inputs import load_model
from mechinterp.commands.output import TOP, frame_text, save
from mechinterp.lens import TunedLensConfig, evaluate_tuned_lens, train_tuned_lens
from mechinterp.results import write_json
from mechinterp.text import blocks


def run(args: Tune, command: str) -> int:
    """Train, evaluate, save."""
    model = load_model(args)
    text = blocks(model, args.text, args.length, args.blocks)
    train, held_out = text.split(0.9)
    print(f"text: {text.source}, {len(train)} blocks of {args.length} tokens to train on, {len(held_out)} held out")
    settings = {} if args.steps is None else {"steps": args.steps}
    lens = train_tuned_lens(model, train, TunedLensConfig(seed=args.seed, **settings))
    result = evaluate_tuned_lens(model, lens, held_out, seed=args.seed)
    print(result.summary())
    print(frame_text(result.top(TOP)))
    lens.save(args.out)
    print(f"wrote {args.out.absolute()}")
    if args.json:
        save(args.json, result.to_json() | {"command": command}, write_json)
    return 0
