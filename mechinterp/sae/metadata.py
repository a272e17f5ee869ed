"""Where a sparse autoencoder belongs: the model and the sites that it was trained on, and how the text was read."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mechinterp.errors import UserError
from mechinterp.hooked.sites import Site
from mechinterp.sae.activations.exclusion import Exclusion


@dataclass(frozen=True)
class Metadata:
    """What a saved autoencoder says of itself.

    Attributes:
        model: name of the model; empty where it is not known.
        reads, writes: hook names of the sites that it reads and that it reconstructs; the same ones but for a
            transcoder, one each but for a crosscoder.
        exclusion: positions that it was not trained on, and is not spliced at.
        context: tokens of a block of text; None where it is not known.
        bos: whether blocks began with a BOS; None where it is not known.
        weights_hash: of the model; empty where it is not known.
        text: where the training text came from.
        n_tokens: trained on, excluded ones not counted.
        training: settings of the training, as plain values.
    """

    model: str = ""
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    exclusion: Exclusion = field(default_factory=Exclusion)
    context: int | None = None
    bos: bool | None = None
    weights_hash: str = ""
    text: str = ""
    n_tokens: int = 0
    training: Mapping[str, Any] = field(default_factory=dict)

    def site(self, writes: bool = False) -> Site:
        """The one site that is read (or reconstructed).

        Raises:
            UserError: it is not known, or there are several.
        """
        names = self.writes if writes else self.reads
        if len(names) != 1:
            found = ", ".join(names) or "none"
            raise UserError(f"one site of an autoencoder was asked for; it has: {found}")
        return Site.from_hook(names[0])

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        made = {one.name: getattr(self, one.name) for one in fields(self)}
        return made | {"reads": list(self.reads), "writes": list(self.writes), "exclusion": self.exclusion.to_json()}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Metadata":
        """From plain values. Raises UserError for unknown keys, or sites that are no list."""
        unknown = sorted(set(values) - {one.name for one in fields(cls)})
        if unknown:
            raise UserError(f"unknown metadata of an autoencoder: {', '.join(unknown)}")
        given = dict(values)
        for name in ("reads", "writes"):
            sites = given.get(name, ())
            if not isinstance(sites, list | tuple) or not all(isinstance(one, str) for one in sites):
                raise UserError(f"{name} must be a list of hook names; found {sites!r}")
            given[name] = tuple(sites)
        exclusion = given.get("exclusion")
        given["exclusion"] = Exclusion() if exclusion is None else Exclusion.of(exclusion)
        return cls(**given)
