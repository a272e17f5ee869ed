"""Greater-than: "The trial began in 1732 and was not over until 17" -> an ending above 32.

The task of Hanna et al. 2023 (How does GPT-2 compute greater-than?), with templates and words of our own. What is asked
follows the tokenizer:

1. Where an ending of two digits is one token (GPT-2), the answers are the endings above the start year's.
2. Where every digit is a token (SmolLM2), they are the decade digits above the start year's; its own decade is neither
   right nor wrong, since the second digit would decide.
"""

import random
from dataclasses import dataclass

from mechinterp.errors import UserError
from mechinterp.hooked.model import HookedModel
from mechinterp.tasks.cases import Case, Filled, from_cases
from mechinterp.tasks.pairs import PromptPairs
from mechinterp.tasks.words import alternating, fill, single_tokens

TEMPLATES = (
    "The {noun} began in {start} and was not over until {century}",
    "The {noun} started in the year {start} and finished in the year {century}",
    "After the year {start} the {noun} went on until the year {century}",
    "They began the {noun} in {start} and gave it up in {century}",
    "The {noun} that got under way in {start} came to an end in {century}",
    "It was in {start} that the {noun} began; it lasted until {century}",
    "Few people remember the {noun} that lasted from {start} to {century}",
    "According to the records, the {noun} ran from {start} through {century}",
)
NOUNS = (
    "trial", "war", "project", "campaign", "journey", "reign", "conflict", "dispute", "expedition", "rebellion",
    "siege", "tour", "work", "study", "construction", "famine", "festival", "strike",
)  # fmt: skip
CENTURIES = ("11", "12", "13", "14", "15", "16", "17", "18")
NEUTRAL = "01"  # of the corrupted year: the paper's, which every ending follows


@dataclass(frozen=True)
class _Years:
    """How a tokenizer splits years: `endings[century][ending]` is the first token of the last two digits."""

    endings: dict[str, dict[str, int]]
    by_decade: bool

    def asked(self, ending: str) -> str:
        """What the first token of an ending says: its decade, or all of it."""
        return ending[0] if self.by_decade else ending

    def starts(self, century: str, other: str) -> list[str]:
        """Endings of start years that both centuries have, with decades above and below."""
        return [one for one in self.endings[century] if one in self.endings[other] and "10" <= one < "90"]


def greater_than(model: HookedModel, n: int = 64, seed: int = 0) -> PromptPairs:
    """Pairs over 8 templates; the corrupted side has the start year "…01", so that every ending may follow.

    Args:
        model: whose tokenizer decides how the years are asked for.
        n: pairs; templates are balanced.
        seed: of the draw.

    Returns:
        Pairs with roles NOUN, XX (the end of the start year's century), YY (its ending, or the decade of it), YY+1 and
        END. Answers are a set: all tokens above the start year's; wrong answers those below. The donor of a pair has
        another noun and century, and an ending at least 30 years away (the answers of any two years overlap);
        its `same_answer` prompt another noun and century, and the same ending or decade.

    Raises:
        UserError: too few nouns are single tokens, or years do not end with tokens of one or two digits; n below 1.
    """
    draw = random.Random(seed)
    nouns, years = single_tokens(model, NOUNS, "nouns", 2), _years(model)

    def prompt(template: int, noun: str, century: str, ending: str) -> Filled:
        ids, at = fill(model, TEMPLATES[template], {"noun": noun, "start": century + ending, "century": century})
        yy = at["start"][1] - int(years.by_decade)
        return Filled(ids, {"NOUN": at["noun"][0], "XX": yy - 1, "YY": yy, "YY+1": yy + 1, "END": len(ids) - 1})

    cases = []
    for template, _ in alternating(draw, len(TEMPLATES), n):
        (noun, elsewhere), (century, other) = draw.sample(nouns, 2), draw.sample(list(years.endings), 2)
        starts = years.starts(century, other)
        ending = draw.choice(starts)
        away = [one for one in starts if abs(int(one) - int(ending)) >= 30]
        alike = [one for one in starts if years.asked(one) == years.asked(ending)]
        tokens = {years.asked(one): token for one, token in years.endings[century].items()}
        cases.append(
            Case(
                template,
                clean=prompt(template, noun, century, ending),
                corrupted=prompt(template, noun, century, NEUTRAL),
                donor=prompt(template, elsewhere, other, draw.choice(away)),
                same_answer=prompt(template, elsewhere, other, draw.choice(alike)),
                answer={token: 1.0 for asked, token in tokens.items() if asked > years.asked(ending)},
                wrong={token: 1.0 for asked, token in tokens.items() if asked < years.asked(ending)},
            )
        )
    return from_cases(model, "greater-than", "start-01", cases, seed)


def _years(model: HookedModel) -> _Years:
    """Years that split into a century and an ending of one token, or of two where no century has such endings.

    Centuries are kept that have nearly all endings (GPT-2 has a few years as one token), of one length.
    """
    for size in (1, 2):
        kept, lengths = dict[str, dict[str, int]](), list[int]()
        for century in CENTURIES:
            front = model.encode(f" {century}", bos=False)
            endings = {}
            for ending in (f"{number:02}" for number in range(100)):
                ids = model.encode(f" {century}{ending}", bos=False)
                rest = ids[len(front) :]
                if ids == front + rest and model.token_strings(rest) == ([ending] if size == 1 else list(ending)):
                    endings[ending] = rest[0]
            # With 90, any two centuries share an ending at least 30 away from any other one.
            if len(endings) >= 90 and NEUTRAL in endings and len(front) in (lengths or [len(front)]):
                kept[century], lengths = endings, [len(front)]
        if len(kept) >= 2:
            return _Years(kept, by_decade=size == 2)
    shown = " | ".join(model.token_strings(model.encode(" 1732", bos=False)))
    raise UserError(
        f"greater-than needs years whose last two digits are one token, or one each; the tokenizer of "
        f"{model.info.name} makes {shown} of ' 1732'. Give your own pairs as JSON lines instead"
    )
