"""`mechinterp attention MODEL`: attention patterns of a prompt as one offline page."""

from dataclasses import replace

from mechinterp.cli.analyses import Attention
from mechinterp.cli.flags import parse_heads
from mechinterp.commands.inputs import load_model
from mechinterp.commands.output import manifest, save
from mechinterp.files import write_text
from mechinterp.reporting.attention import attention_report, patterns
from mechinterp.reporting.page import render
from mechinterp.results import plain, write_json


def run(args: Attention, command: str) -> int:
    """The patterns, and the files asked for."""
    model = load_model(args)
    asked = parse_heads(args.heads, whole_layers=True) or []
    heads = [(layer, head) for layer, one in asked for head in ([one] if one is not None else range(model.n_heads))]
    report = attention_report(model, args.prompt, heads, command=command)
    print(report.answer)
    save(args.html, render(replace(report, manifest=manifest(model, {})).payload()), write_text)
    if args.json:
        ((tokens, weights),) = patterns(model, args.prompt, heads)
        names = [f"L{layer}H{head}" for layer, head in heads]
        found = {"tokens": list(tokens), "heads": names, "patterns": plain(weights), "header": model.header()}
        save(args.json, found | {"command": command}, write_json)
    return 0
