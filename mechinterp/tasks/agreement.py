"""Subject-verb agreement across an attractor: "The keys near the old cabinet" -> " are".

The task of Linzen et al. 2016 (Assessing the Ability of LSTMs to Learn Syntax-Sensitive Dependencies), with templates
and words of our own, kept only where they are single tokens under the tokenizer of the model at hand.
"""

import random

from mechinterp.hooked.model import HookedModel
from mechinterp.tasks.cases import Case, Filled, from_cases
from mechinterp.tasks.pairs import PromptPairs
from mechinterp.tasks.words import alternating, fill, single_groups, single_tokens, token

TEMPLATES = (
    "The {subject} near the {attractor}",
    "It turned out that the {subject} behind the {attractor}",
    "I think that the {subject} next to the {attractor}",
    "The {subject} in front of the {attractor} really",
    "As you can see, the {subject} beside the {attractor}",
    "The {subject} that came with the {attractor}",
    "We were told that the {subject} for the {attractor}",
    "The {subject} I bought for the {attractor}",
)
# Singular and plural.
SUBJECTS = (
    ("key", "keys"), ("picture", "pictures"), ("letter", "letters"), ("box", "boxes"), ("chair", "chairs"),
    ("book", "books"), ("lamp", "lamps"), ("bottle", "bottles"), ("flower", "flowers"), ("tool", "tools"),
    ("table", "tables"), ("bag", "bags"), ("toy", "toys"), ("cup", "cups"), ("ticket", "tickets"),
)  # fmt: skip
ATTRACTORS = (
    ("door", "doors"), ("window", "windows"), ("car", "cars"), ("house", "houses"), ("teacher", "teachers"),
    ("student", "students"), ("doctor", "doctors"), ("child", "children"), ("horse", "horses"), ("tree", "trees"),
    ("boat", "boats"), ("machine", "machines"), ("garden", "gardens"), ("guest", "guests"),
)  # fmt: skip
VERBS = ("is", "are")


def agreement(model: HookedModel, n: int = 64, seed: int = 0) -> PromptPairs:
    """Pairs over 8 templates, half with a singular subject, half with a plural one; the attractor has the other number.

    The corrupted side has the subject in the other number, so that the answer (`is` or `are`) becomes the wrong one.

    Args:
        model: whose tokenizer decides which words can be used.
        n: pairs; templates and numbers are balanced.
        seed: of the draw.

    Returns:
        Pairs with roles SUBJECT, ATTRACTOR and END (which is the attractor where the template ends with it). The donor
        of a pair has other nouns, both in the other number; its `same_answer` prompt other nouns in the same numbers.

    Raises:
        UserError: too few nouns have both forms as single tokens, or not both verbs are; n is below 1.
    """
    draw = random.Random(seed)
    subjects = single_groups(model, SUBJECTS, "subjects (singular and plural)", 3)
    attractors = single_groups(model, ATTRACTORS, "attractors (singular and plural)", 3)
    single_tokens(model, VERBS, "verbs", 2)
    verbs = [token(model, verb) for verb in VERBS]

    def prompt(template: int, subject: str, attractor: str) -> Filled:
        ids, at = fill(model, TEMPLATES[template], {"subject": subject, "attractor": attractor})
        return Filled(ids, {"SUBJECT": at["subject"][0], "ATTRACTOR": at["attractor"][0], "END": len(ids) - 1})

    cases = []
    for template, plural in alternating(draw, len(TEMPLATES), n):
        (subject, donor, same), (near, donor_near, same_near) = draw.sample(subjects, 3), draw.sample(attractors, 3)
        cases.append(
            Case(
                template,
                clean=prompt(template, subject[plural], near[not plural]),
                corrupted=prompt(template, subject[not plural], near[not plural]),
                donor=prompt(template, donor[not plural], donor_near[plural]),
                same_answer=prompt(template, same[plural], same_near[not plural]),
                answer={verbs[plural]: 1.0},
                wrong={verbs[not plural]: 1.0},
            )
        )
    return from_cases(model, "agreement", "other-number", cases, seed)
