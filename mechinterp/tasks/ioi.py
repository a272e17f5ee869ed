"""Indirect object identification: "When Mary and John went to the store, John gave a drink to" -> " Mary".

The task of Wang et al. 2023 (Interpretability in the Wild), with templates and words of our own, kept only where they
are single tokens under the tokenizer of the model at hand.
"""

import random
from typing import Literal

from mechinterp.errors import UserError
from mechinterp.hooked.model import HookedModel
from mechinterp.tasks.pairs import PromptPairs, Target, assemble
from mechinterp.tasks.words import alternating, single_tokens

Corruption = Literal["swapped-subject", "new-names"]

TEMPLATES = (
    "When {A} and {B} walked into the {place}, {S} handed a {object} to",
    "After {A} and {B} left the {place}, {S} gave a {object} to",
    "Yesterday {A} and {B} met at the {place}, and {S} passed a {object} to",
    "While {A} and {B} waited near the {place}, {S} offered a {object} to",
    "Because {A} and {B} worked at the {place}, {S} sent a {object} to",
    "Early that day {A} and {B} found a {object} at the {place}. {S} gave it to",
    "The neighbours {A} and {B} sat inside the {place} until {S} brought a {object} to",
    "Once {A} and {B} reached the {place}, {S} showed a {object} to",
    "In the {place}, {A} and {B} talked for hours before {S} gave a {object} to",
    "As {A} and {B} closed the {place}, {S} lent a {object} to",
    "Last week {A} and {B} visited the {place}. Afterwards {S} mailed a {object} to",
    "At noon {A} and {B} opened the {place}, then {S} sold a {object} to",
)
NAMES = (
    "Mary", "John", "Tom", "James", "Dan", "Martin", "Amy", "Scott", "Kate", "Alan", "Sarah", "Paul", "Laura",
    "Peter", "Emma", "Simon", "Anna", "David", "Lucy", "Mark", "Alice", "Robert", "Jane", "Michael", "Rachel",
    "Steven", "Linda", "George", "Susan", "Henry", "Helen", "Charles", "Julia", "Frank", "Maria", "Kevin", "Nancy",
    "Brian", "Carol", "Jack", "Ruth", "Adam", "Grace", "Daniel", "Sophie", "Oliver", "Emily", "William", "Jessica",
    "Thomas", "Rose", "Richard", "Lisa", "Andrew", "Claire", "Eric",
)  # fmt: skip
PLACES = (
    "store", "school", "office", "garden", "station", "library", "hospital", "market", "restaurant", "park",
    "museum", "house", "shop", "bank",
)  # fmt: skip
OBJECTS = (
    "book", "ring", "drink", "letter", "key", "ball", "card", "bottle", "cup", "map", "watch", "box", "phone",
    "pen",
)  # fmt: skip


def ioi(model: HookedModel, n: int = 64, seed: int = 0, corruption: Corruption = "swapped-subject") -> PromptPairs:
    """Pairs over 12 templates, half with the indirect object first (ABBA), half with the subject first (BABA).

    Args:
        model: whose tokenizer decides which words can be used.
        n: pairs; templates and orders are balanced.
        seed: of the draw.
        corruption: "swapped-subject" makes the second mention the other name, so that the answer becomes the subject
            and everything before S2 is identical; "new-names" replaces the three mentions by three unrelated names
            (the ABC prompts of Wang et al.), so that no name is repeated.

    Returns:
        Pairs with roles IO, S1, S1+1, S2, END. The wrong answer is the subject. The donor of a pair has the same
        template, the other order, and names that occur in neither of its sides; its `same_answer` prompt has the same
        names in the same order, with another place and object.

    Raises:
        UserError: too few names, places or objects are single tokens, or the corruption is unknown.
    """
    if corruption not in ("swapped-subject", "new-names"):
        raise UserError(f"unknown corruption {corruption!r}; valid: 'swapped-subject', 'new-names'")
    draw = random.Random(seed)
    names = single_tokens(model, NAMES, "names", 8)
    places, objects = single_tokens(model, PLACES, "places", 2), single_tokens(model, OBJECTS, "objects", 2)
    clean, corrupted, donor, same_answer = [], [], [], []
    roles, donor_roles, targets, templates = [], [], [], []
    for template, abba in alternating(draw, len(TEMPLATES), n):
        words = {"place": draw.choice(places), "object": draw.choice(objects)}
        io, s, other_io, other_s, a, b, c = draw.sample(names, 7)
        text, at = _fill(model, template, words, io, s, s, abba)
        if corruption == "swapped-subject":
            bad, _ = _fill(model, template, words, io, s, io, abba)
        else:
            bad, _ = _fill(model, template, words, a, b, c, abba)
        clean.append(text)
        corrupted.append(bad)
        other, other_at = _fill(model, template, words, other_io, other_s, other_s, not abba)
        donor.append(other)
        donor_roles.append(other_at)
        elsewhere = {
            "place": draw.choice([place for place in places if place != words["place"]]),
            "object": draw.choice([thing for thing in objects if thing != words["object"]]),
        }
        same_answer.append(_fill(model, template, elsewhere, io, s, s, abba)[0])
        roles.append(at)
        templates.append(template)
        answer, wrong = model.encode(f" {io}", bos=False)[0], model.encode(f" {s}", bos=False)[0]
        targets.append([Target(len(text) - 1, {answer: 1.0}, {wrong: 1.0})])
    source = {"task": "ioi", "n": n, "seed": seed, "corruption": corruption}
    return assemble(
        model, "ioi", corruption, clean, corrupted, roles, targets,
        donor=(donor, donor_roles), same_answer=same_answer, templates=templates, seed=seed, source=source,
    )  # fmt: skip


def _fill(
    model: HookedModel, template: int, words: dict[str, str], io: str, s1: str, s2: str, abba: bool
) -> tuple[list[int], dict[str, int]]:
    """Token ids of a prompt, and where its roles are."""
    first, second = (io, s1) if abba else (s1, io)
    text = TEMPLATES[template].format(A=first, B=second, S=s2, **words)
    ids = model.encode(text, bos=False)
    tokens = model.token_strings(ids)
    # The three mentions in order: names are single tokens after a space, and no other word of a template is a name.
    mentions = [i for i, token in enumerate(tokens) if token.strip() in {io, s1, s2}]
    if len(mentions) != 3:
        raise UserError(f"names are not single tokens in {text!r}: {' | '.join(tokens)}")
    io_at, s1_at = (mentions[0], mentions[1]) if abba else (mentions[1], mentions[0])
    return ids, {"IO": io_at, "S1": s1_at, "S1+1": s1_at + 1, "S2": mentions[2], "END": len(ids) - 1}
