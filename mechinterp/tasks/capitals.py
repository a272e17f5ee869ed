"""Country -> capital: "My teacher says that the capital of France is the city of" -> " Paris".

The countries are those of the facts (tasks/facts.py) and more, kept only where the capital is a single token under the
tokenizer of the model at hand. Models differ in what they know: `mi.tasks.known` keeps what this one predicts.
"""

import random
from collections.abc import Mapping

from mechinterp.errors import UserError
from mechinterp.hooked.model import HookedModel
from mechinterp.tasks.cases import Case, Filled, from_cases
from mechinterp.tasks.facts import RELATIONS
from mechinterp.tasks.pairs import PromptPairs
from mechinterp.tasks.words import alternating, fill, is_single, single_tokens, token

TEMPLATES = (
    "My {person} says that the capital of {country} is the city of",
    "Every {person} learns that the capital of {country} is called",
    "A {person} from {country} who visits the capital will go to the city of",
    "One {person} moved to {country} and lived in its capital city,",
    "This {person} works for the government of {country} in the city of",
    "The {person} knew the answer: the capital of {country} is",
    "A {person} with a map of {country} can see that the capital city is named",
    "Another {person} flew to the capital of {country}, which is",
)
PEOPLE = ("teacher", "friend", "student", "brother", "sister", "child", "doctor", "neighbor", "lady", "writer")
# Those of two words are left out: too few others have as many tokens, and London is England's here.
CAPITALS: Mapping[str, str] = {
    **{country: capital for country, capital in RELATIONS["capital"][1].items() if " " not in country},
    "Russia": "Moscow", "China": "Beijing", "Egypt": "Cairo", "Ireland": "Dublin", "Greece": "Athens",
    "Austria": "Vienna", "Cuba": "Havana", "Iran": "Tehran", "Iraq": "Baghdad", "Kenya": "Nairobi",
    "Sweden": "Stockholm", "Poland": "Warsaw", "Syria": "Damascus", "Hungary": "Budapest", "Denmark": "Copenhagen",
    "Canada": "Ottawa", "Belgium": "Brussels", "England": "London", "Scotland": "Edinburgh", "Thailand": "Bangkok",
    "Peru": "Lima", "Chile": "Santiago", "Afghanistan": "Kabul", "Norway": "Oslo", "Finland": "Helsinki",
    "Turkey": "Ankara", "Indonesia": "Jakarta", "Lebanon": "Beirut", "Ukraine": "Kiev", "Vietnam": "Hanoi",
}  # fmt: skip


def capitals(model: HookedModel, n: int = 64, seed: int = 0) -> PromptPairs:
    """Pairs over 8 templates whose corrupted side has another country, of as many tokens; its capital is the wrong one.

    Args:
        model: whose tokenizer decides which countries can be used.
        n: pairs; templates are balanced.
        seed: of the draw.

    Returns:
        Pairs with roles country_first, country_last (the same token for a country of one) and END. The donor of a pair
        has a third country; its `same_answer` prompt the same country, and another person.

    Raises:
        UserError: too few capitals or people are single tokens, or too few countries have as many tokens; n is below 1.
    """
    draw = random.Random(seed)
    people, groups = single_tokens(model, PEOPLE, "people", 2), _by_length(model)
    countries = [country for group in groups.values() for country in group]

    def prompt(template: int, country: str, person: str) -> Filled:
        ids, at = fill(model, TEMPLATES[template], {"country": country, "person": person})
        first, last = at["country"]
        return Filled(ids, {"country_first": first, "country_last": last, "END": len(ids) - 1})

    cases = []
    for template, _ in alternating(draw, len(TEMPLATES), n):
        country, (person, elsewhere) = draw.choice(countries), draw.sample(people, 2)
        group = next(group for group in groups.values() if country in group)
        other, third = draw.sample([one for one in group if one != country], 2)
        cases.append(
            Case(
                template,
                clean=prompt(template, country, person),
                corrupted=prompt(template, other, person),
                donor=prompt(template, third, person),
                same_answer=prompt(template, country, elsewhere),
                answer={token(model, CAPITALS[country]): 1.0},
                wrong={token(model, CAPITALS[other]): 1.0},
            )
        )
    return from_cases(model, "capitals", "other-country", cases, seed)


def _by_length(model: HookedModel) -> dict[int, list[str]]:
    """Countries whose capital is a single token, by their number of tokens; only numbers that three countries have."""
    groups: dict[int, list[str]] = {}
    for country, capital in CAPITALS.items():
        ids = model.encode(f" {country}", bos=False)
        # Its text is compared because a tokenizer of words makes one `<unk>` of any name.
        if is_single(model, capital) and "".join(model.token_strings(ids)).strip() == country:
            groups.setdefault(len(ids), []).append(country)
    kept = {length: group for length, group in groups.items() if len(group) >= 3}
    if not kept:
        found = {length: len(group) for length, group in groups.items()}
        raise UserError(
            f"the tokenizer of {model.info.name} has no three countries of one length whose capitals are single tokens "
            f"(tokens: countries found: {found}); the task needs 3. Give your own pairs as JSON lines instead"
        )
    return kept
