"""Positions that a sparse autoencoder is neither trained on nor measured at, and where it is not spliced in.

The first position of a prompt has a norm tens or hundreds of times the others' in most models, whatever token is there
(an attention sink), and so have BOS tokens. One such position among 128 lifts explained variance from .58 to .98: it
says nothing of how well the others are explained. One rule serves training, the scale of activations, metrics and
splicing.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechinterp.errors import UserError

if TYPE_CHECKING:
    from mechinterp.hooked.model import HookedModel


@dataclass(frozen=True)
class Exclusion:
    """Which positions are left out.

    Attributes:
        first: leave out the first token of every prompt (padding is on the left and no token).
        tokens: ids that are left out wherever they stand: BOS, EOS, padding and other special tokens.
        outlier: leave out positions whose norm exceeds this multiple of the median norm; None keeps them. It is judged
            on activations (harvest.py), so `mask` knows nothing of it.

    Raises:
        UserError: a negative id, or a multiple that is not above 1.
    """

    first: bool = True
    tokens: tuple[int, ...] = ()
    outlier: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(sorted(set(self.tokens))))
        if self.tokens and self.tokens[0] < 0:
            raise UserError(f"excluded tokens must be ids ≥ 0; found {self.tokens[0]}")
        if self.outlier is not None and not (math.isfinite(self.outlier) and self.outlier > 1):
            raise UserError(f"outlier must be a multiple of the median norm above 1, or none; found {self.outlier}")

    @classmethod
    def of_model(cls, model: "HookedModel", outlier: float | None = None) -> "Exclusion":
        """The rule for a model: the first position, and every token that its tokenizer calls special."""
        return cls(first=True, tokens=tuple(special_tokens(model)), outlier=outlier)

    def mask(self, tokens: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """Which positions are kept, by position and token.

        Args:
            tokens: token ids.
            real: False at padding.

        Returns:
            True where a position is kept.
        """
        kept = real
        if self.first:
            kept = kept & (real.cumsum(1) > 1)
        if self.tokens:
            kept = kept & ~torch.isin(tokens, torch.tensor(self.tokens, device=tokens.device))
        return kept

    def to_json(self) -> dict[str, Any]:
        """Plain values, which `of` reads."""
        return asdict(self) | {"tokens": list(self.tokens)}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Exclusion":
        """From plain values; what is not given is as by default. Raises UserError for unknown keys and wrong types."""
        known = [one.name for one in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise UserError(f"an exclusion rule has no {', '.join(unknown)}; valid: {', '.join(known)}")
        first, tokens, outlier = (values.get(one.name, one.default) for one in fields(cls))
        if not isinstance(first, bool):
            raise UserError(f"first must be true or false; found {first!r}")
        if not isinstance(tokens, list | tuple) or not all(type(token) is int for token in tokens):
            raise UserError(f"excluded tokens must be a list of ids; found {tokens!r}")
        if outlier is not None and (isinstance(outlier, bool) or not isinstance(outlier, int | float)):
            raise UserError(f"outlier must be a number or none; found {outlier!r}")
        return cls(first, tuple(tokens), outlier)


def special_tokens(model: "HookedModel") -> set[int]:
    """Ids of BOS, EOS, padding and all other special tokens; none without a tokenizer."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        return set()
    added = getattr(tokenizer, "added_tokens_decoder", {})  # reserved ones too, which all_special_ids leaves out
    reserved = {int(number) for number, token in added.items() if getattr(token, "special", False)}
    return reserved | {int(number) for number in tokenizer.all_special_ids if number is not None}
