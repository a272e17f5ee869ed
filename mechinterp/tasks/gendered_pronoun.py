"""Gendered pronoun: "I think Emma was very happy about the car, wasn't" -> " she".

The task of Mathwin et al. 2023 (Identifying a preliminary circuit for predicting gendered pronouns), with templates and
words of our own, kept only where they are single tokens under the tokenizer of the model at hand.
"""

import random

from mechinterp.hooked.model import HookedModel
from mechinterp.tasks.cases import Case, Filled, from_cases
from mechinterp.tasks.pairs import PromptPairs
from mechinterp.tasks.words import alternating, fill, single_tokens, token

TEMPLATES = (
    "I think {name} was very happy about the {thing}, wasn't",
    "It looks as if {name} was looking for the {thing} again, wasn't",
    "We all know that {name} is fond of the old {thing}, isn't",
    "You said that {name} would bring the {thing} along, didn't",
    "The neighbours trust {name} with the {thing} because",
    "After the party {name} forgot about the {thing} until",
    "Nobody listened to {name} talking about the {thing} although",
    "They gave {name} a small {thing} as soon as",
)
FEMALE = (
    "Mary", "Amy", "Kate", "Sarah", "Laura", "Emma", "Anna", "Lucy", "Alice", "Jane", "Rachel", "Linda", "Susan",
    "Helen", "Julia", "Maria", "Nancy", "Carol", "Sophie", "Emily", "Jessica", "Lisa", "Claire", "Elizabeth",
)  # fmt: skip
MALE = (
    "John", "Tom", "James", "Martin", "Scott", "Alan", "Paul", "Peter", "Simon", "David", "Mark", "Robert", "Michael",
    "Steven", "George", "Henry", "Charles", "Frank", "Kevin", "Brian", "Jack", "Adam", "Daniel", "Oliver", "William",
    "Thomas", "Richard", "Andrew",
)  # fmt: skip
THINGS = (
    "car", "house", "book", "piano", "camera", "dog", "horse", "phone", "garden", "boat", "lamp", "clock", "table",
    "box",
)  # fmt: skip
PRONOUNS = ("she", "he")


def gendered_pronoun(model: HookedModel, n: int = 64, seed: int = 0) -> PromptPairs:
    """Pairs over 8 templates, half with a woman's name, half with a man's.

    The corrupted side has a name of the other gender, so that the answer (`she` or `he`) becomes the wrong one, and
    everything else is identical.

    Args:
        model: whose tokenizer decides which words can be used.
        n: pairs; templates and genders are balanced.
        seed: of the draw.

    Returns:
        Pairs with roles NAME and END. The donor of a pair has a third name, of the other gender, and another thing; its
        `same_answer` prompt another name of the same gender and another thing.

    Raises:
        UserError: too few names or things, or not both pronouns, are single tokens; n is below 1.
    """
    draw = random.Random(seed)
    names = [single_tokens(model, FEMALE, "women's names", 2), single_tokens(model, MALE, "men's names", 2)]
    things = single_tokens(model, THINGS, "things", 2)
    single_tokens(model, PRONOUNS, "pronouns", 2)
    pronouns = [token(model, pronoun) for pronoun in PRONOUNS]

    def prompt(template: int, name: str, thing: str) -> Filled:
        ids, at = fill(model, TEMPLATES[template], {"name": name, "thing": thing})
        return Filled(ids, {"NAME": at["name"][0], "END": len(ids) - 1})

    cases = []
    for template, male in alternating(draw, len(TEMPLATES), n):
        (name, same), (other, donor) = draw.sample(names[male], 2), draw.sample(names[not male], 2)
        thing, elsewhere = draw.sample(things, 2)
        cases.append(
            Case(
                template,
                clean=prompt(template, name, thing),
                corrupted=prompt(template, other, thing),
                donor=prompt(template, donor, elsewhere),
                same_answer=prompt(template, same, elsewhere),
                answer={pronouns[male]: 1.0},
                wrong={pronouns[not male]: 1.0},
            )
        )
    return from_cases(model, "gendered-pronoun", "other-gender", cases, seed)
