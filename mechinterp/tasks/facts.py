"""Facts: "The capital of the country France is the city of" -> " Paris", for causal tracing.

Ten relations of our own, one template each, with subjects of one token or several, kept only where the answer is a
single token under the tokenizer of the model at hand. Models differ in what they know: `known` keeps what this one
knows.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from mechinterp.errors import UserError
from mechinterp.hooked import suffix
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.suffix import Read
from mechinterp.tasks.pairs import PromptPairs, Target, assemble

# Relation -> template and subject -> answer. The subject is never the first word: position 0 is an attention sink.
RELATIONS: dict[str, tuple[str, Mapping[str, str]]] = {
    "capital": (
        "The capital of the country {} is the city of",
        {
            "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo",
            "Portugal": "Lisbon", "Great Britain": "London", "South Korea": "Seoul", "Czech Republic": "Prague",
        },
    ),
    "language": (
        "Most people in {} speak a language called",
        {
            "Russia": "Russian", "Egypt": "Arabic", "Mexico": "Spanish", "China": "Mandarin", "Austria": "German",
            "Saudi Arabia": "Arabic", "Costa Rica": "Spanish", "Great Britain": "English",
        },
    ),
    "continent": (
        "The country of {} lies on the continent of",
        {
            "Kenya": "Africa", "India": "Asia", "Poland": "Europe", "Ivory Coast": "Africa", "Sierra Leone": "Africa",
            "Sri Lanka": "Asia", "South Korea": "Asia", "Czech Republic": "Europe",
        },
    ),
    "landmark": (
        "Many tourists visit the {} in the city of",
        {
            "Eiffel Tower": "Paris", "Louvre Museum": "Paris", "Arc de Triomphe": "Paris", "British Museum": "London",
            "Buckingham Palace": "London", "Westminster Abbey": "London", "Roman Forum": "Rome",
            "Trevi Fountain": "Rome", "Sistine Chapel": "Rome", "Prado Museum": "Madrid", "Hagia Sophia": "Istanbul",
            "Forbidden City": "Beijing", "Uffizi Gallery": "Florence", "Van Gogh Museum": "Amsterdam",
        },
    ),
    "theory": (
        "The scientist {} is known for the theory of",
        {
            "Charles Darwin": "evolution", "Isaac Newton": "gravity", "Albert Einstein": "relativity",
            "Sigmund Freud": "psychoanalysis", "Niels Bohr": "quantum",
        },
    ),
    "symbol": (
        "The chemical symbol for {} is",
        {
            "gold": "Au", "silver": "Ag", "iron": "Fe", "hydrogen": "H", "sodium": "Na", "copper": "Cu", "helium": "He",
        },
    ),
    "opposite": (
        "In English, the opposite of {} is",
        {
            "good": "bad", "up": "down", "left": "right", "black": "white", "strong": "weak", "early": "late",
            "positive": "negative",
        },
    ),
    "past": (
        "Today they {} it. Yesterday they",
        {"eat": "ate", "give": "gave", "write": "wrote", "buy": "bought", "know": "knew", "sell": "sold"},
    ),
    "plural": (
        "The plural of dog is dogs, and the plural of {} is",
        {"mouse": "mice", "child": "children", "person": "people", "foot": "feet", "leaf": "leaves", "city": "cities"},
    ),
    "month": (
        "The month of {} is followed by the month of",
        {"January": "February", "May": "June", "June": "July", "September": "October", "November": "December"},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class _Fact:
    """A fact as tokens: the prompt, the places of its subject's first and last token, and the answer."""

    ids: list[int]
    first: int
    last: int
    answer: int

    def swaps_with(self, other: "_Fact") -> bool:
        """Whether the two prompts of one template have subjects of one length, and other answers."""
        return len(self.ids) == len(other.ids) and self.answer != other.answer


def facts(model: HookedModel, n: int | None = None, seed: int = 0, check: bool = True) -> PromptPairs:
    """Facts of ten relations as pairs: the corrupted side has another subject, of as many tokens, with another answer.

    Args:
        model: whose tokenizer decides which facts can be used, and whose knowledge `check` asks for.
        n: facts, the same number of every relation as far as possible; all by default.
        seed: of the order, and of the other subjects.
        check: keep only facts whose answer is the model's first prediction (see `known`).

    Returns:
        Pairs with roles subject_first, subject_last (the same token for a subject of one) and END. The wrong answer is
        that of the other subject. Relations are the templates.

    Raises:
        UserError: no fact can be used, the model knows none, or fewer than `n` are left.
    """
    if n is not None and n < 1:
        raise UserError(f"n must be at least 1; found {n}")
    draw = random.Random(seed)
    chosen: list[tuple[int, _Fact, _Fact]] = []
    for relation, (template, answers) in enumerate(RELATIONS.values()):
        usable = [fact for fact in (_fact(model, template, *one) for one in answers.items()) if fact is not None]
        draw.shuffle(usable)
        for fact in usable:
            others = [other for other in usable if fact.swaps_with(other)]
            if others:
                chosen.append((relation, fact, draw.choice(others)))
    if not chosen:
        raise UserError(f"the tokenizer of {model.info.name} has no answer of our facts as a single token")
    pairs = _pairs(model, chosen, seed)
    return _balanced(known(model, pairs) if check else pairs, n)


def known(model: HookedModel, pairs: PromptPairs) -> PromptPairs:
    """The pairs whose answer is the model's first prediction on the clean prompt, out of its whole vocabulary.

    `source` says how many were known and how many dropped. Raises UserError if the model knows none.
    """
    if pairs.continuations is not None:
        raise UserError(f"known needs answers of one token, but {pairs.long_answer}")
    logits = suffix.record(model, pairs.clean).base_logits(Read(pairs.answers.pos)).cpu()
    answers = pairs.answers
    right = (answers.answer == logits.argmax(-1, keepdim=True)) & (answers.answer_weight > 0)
    kept = (right.any(-1) | (answers.weight == 0)).all(-1).nonzero().flatten()
    if not len(kept):
        raise UserError(f"{model.info.name} answers none of these {len(pairs)} prompts with its first prediction")
    return replace(pairs.take(kept), source={**pairs.source, "known": len(kept), "dropped": len(pairs) - len(kept)})


def _fact(model: HookedModel, template: str, subject: str, answer: str) -> _Fact | None:
    """The fact as tokens; None where the answer is not one token, or the subject's ends are not ends of tokens."""
    text, before = template.format(subject), template.split(" {}")[0]
    ids, front, through = (model.encode(part, bos=False) for part in (text, before, f"{before} {subject}"))
    target = model.encode(f" {answer}", bos=False)
    # Texts are compared because a tokenizer of words makes one `<unk>` of anything.
    whole = "".join(model.token_strings(ids)).replace(" ", "") == text.replace(" ", "")
    single = len(target) == 1 and model.token_strings(target)[0].strip() == answer
    if not (single and whole and ids[: len(front)] == front and ids[: len(through)] == through):
        return None
    return _Fact(ids, len(front), len(through) - 1, target[0])


def _pairs(model: HookedModel, chosen: list[tuple[int, _Fact, _Fact]], seed: int) -> PromptPairs:
    end = [len(fact.ids) - 1 for _, fact, _ in chosen]
    return assemble(
        model,
        "facts",
        "other-subject",
        [fact.ids for _, fact, _ in chosen],
        [other.ids for _, _, other in chosen],
        [
            {"subject_first": fact.first, "subject_last": fact.last, "END": at}
            for (_, fact, _), at in zip(chosen, end, strict=True)
        ],
        [
            [Target(at, {fact.answer: 1.0}, {other.answer: 1.0})]
            for (_, fact, other), at in zip(chosen, end, strict=True)
        ],
        templates=[relation for relation, _, _ in chosen],
        seed=seed,
        source={"task": "facts", "facts": len(chosen), "seed": seed},
    )


def _balanced(pairs: PromptPairs, n: int | None) -> PromptPairs:
    """`n` pairs, taking the relations in turn."""
    if n is None:
        return pairs
    if n > len(pairs):
        raise UserError(f"{n} facts were asked for; {len(pairs)} are left for this model. Valid: n up to {len(pairs)}")
    assert pairs.clean.template is not None
    seen: dict[int, int] = {}
    rounds = []
    for relation in pairs.clean.template.tolist():
        seen[relation] = seen.get(relation, 0) + 1
        rounds.append(seen[relation])
    first = torch.argsort(torch.tensor(rounds), stable=True)[:n].sort().values
    return replace(pairs.take(first), source={**pairs.source, "n": n})
