"""Cases: what a task made of templates draws for one pair, and the pairs made of many."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mechinterp.errors import UserError
from mechinterp.hooked.model import HookedModel
from mechinterp.tasks.pairs import PromptPairs, Target, assemble


class Filled(NamedTuple):
    """A prompt as token ids, and the token at which each role is."""

    ids: list[int]
    roles: dict[str, int]


@dataclass(frozen=True)
class Case:
    """One pair, its control prompts (see PromptPairs), and what is asked after the last token, as id -> weight."""

    template: int
    clean: Filled
    corrupted: Filled
    donor: Filled
    same_answer: Filled
    answer: Mapping[int, float]
    wrong: Mapping[int, float]


def from_cases(model: HookedModel, name: str, corruption: str, cases: Sequence[Case], seed: int) -> PromptPairs:
    """Prompt pairs of these cases.

    Raises:
        UserError: a pair whose prompts differ in length or in the places of their roles.
    """
    for i, case in enumerate(cases):
        if any(one.roles != case.clean.roles for one in (case.corrupted, case.donor, case.same_answer)):
            raise UserError(f"pair {i + 1}: a role is not at the same token of every prompt: {case.clean.roles}")
    return assemble(
        model,
        name,
        corruption,
        [case.clean.ids for case in cases],
        [case.corrupted.ids for case in cases],
        [case.clean.roles for case in cases],
        [[Target(len(case.clean.ids) - 1, case.answer, case.wrong)] for case in cases],
        donor=([case.donor.ids for case in cases], [case.donor.roles for case in cases]),
        same_answer=[case.same_answer.ids for case in cases],
        templates=[case.template for case in cases],
        seed=seed,
        source={"task": name, "n": len(cases), "seed": seed, "corruption": corruption},
    )
