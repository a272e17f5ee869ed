"""`mechinterp heads MODEL`: which heads attend by a pattern."""

import pandas as pd

from mechinterp.cli.analyses import Heads
from mechinterp.commands.inputs import load_model
from mechinterp.commands.output import frame_text, manifest, save
from mechinterp.files import write_text
from mechinterp.heads import PatternResult, knock_out_top, patterns
from mechinterp.reporting import Report
from mechinterp.reporting.page import render
from mechinterp.reporting.sections.heads import causal_section, pattern_section
from mechinterp.results import write_json
from mechinterp.token_file import read_token_file

BEST = 3  # heads of each kind in the printed table


def run(args: Heads, command: str) -> int:
    """The scores, the heads that pass, and the files asked for."""
    model = load_model(args)
    given = None if args.tokens is None else read_token_file(args.tokens)
    result = patterns(model, given, period=args.period, n=args.n, seed=args.seed)
    about = result.about
    print(f"{about['n_prompts']} sequences ({about['source']}), period {about['period']}")
    print(f"position 0: {about['position_0']}")
    print(result.summary())
    print(frame_text(_best(result)))
    made = result.to_json()
    sections = [pattern_section(result)]
    if args.causal:
        causal = knock_out_top(model, result, args.causal, seed=args.seed)
        print(causal.summary())
        made["causal"] = causal.to_json()
        sections.append(causal_section(causal))
    if args.json:
        save(args.json, made | {"command": command}, write_json)
    if args.html:
        report = Report(
            title=f"attention patterns · {model.info.name}",
            question=f"Which heads of {model.info.name} attend by a pattern?",
            answer=result.summary(),
            header=f"{model.header()} · n = {about['n_prompts']}",
            command=command,
            sections=tuple(sections),
            caveats=(
                "A pattern says where a head looks, not what it moves, nor that the model needs it: `--causal K` "
                "knocks heads out.",
                f"Position 0 is {about['position_0']}.",
            ),
            manifest=manifest(model, about),
        )
        save(args.html, render(report.payload()), write_text)
    return 0


def _best(result: PatternResult) -> pd.DataFrame:
    """The best heads of each kind."""
    return pd.concat([result.top(kind, BEST) for kind in result.kinds], ignore_index=True)
