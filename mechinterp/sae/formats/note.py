"""What only we know of an autoencoder, as it stands in another's config: shape, metadata, and a threshold's age."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mechinterp.errors import UserError
from mechinterp.sae.architectures import BatchTopK
from mechinterp.sae.autoencoder import SAEConfig, SparseAutoencoder
from mechinterp.sae.formats.weights import SETTLED
from mechinterp.sae.metadata import Metadata

KEY = "mechinterp"


@dataclass(frozen=True)
class Note:
    """What we add to a foreign config.

    Attributes:
        config: shape and kind as trained: SAELens writes BatchTopK as JumpReLU.
        metadata: all of it.
        n_updates: of the threshold.
    """

    config: SAEConfig
    metadata: Metadata
    n_updates: int = SETTLED

    @classmethod
    def of(cls, sae: SparseAutoencoder, config: SAEConfig) -> "Note":
        """Of a module that is written with the given config."""
        return cls(config, sae.metadata, int(sae.n_updates) if isinstance(sae, BatchTopK) else SETTLED)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"config": asdict(self.config), "metadata": self.metadata.to_json(), "n_updates": self.n_updates}

    @classmethod
    def read(cls, values: Mapping[str, Any], where: Path) -> "Note | None":
        """From the object that has our key; None where it has not.

        Raises:
            UserError: unknown or missing keys.
        """
        found = values.get(KEY)
        if found is None:
            return None
        try:
            config = SAEConfig(**{**found["config"], "prefixes": tuple(found["config"]["prefixes"])})
            return cls(config, Metadata.of(found["metadata"]), int(found["n_updates"]))
        except (KeyError, TypeError) as error:
            raise UserError(f"{where}: what stands under {KEY!r} is none of ours: {error}") from error
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
