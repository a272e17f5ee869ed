"""Activations of a model on blocks of tokens, for one or several sites in one pass.

1. Take the next blocks, and mark the positions that the exclusion rule keeps.
2. Run them under the interventions in force on the model. Each site's kept rows are copied as its hook point fires.
   When the last one has, an exception leaves the model: what comes after is never computed.
3. Judge outliers on the norms at the first site, against a running median: m ← m + (median of this chunk − m) / n, with
   n the number of chunks so far, at most `MEDIAN_CHUNKS`; so it depends on the chunks and their order only, and the
   first chunk has one. They are counted, and dropped if the rule says so.
4. Out of memory: the same blocks are run again, half as many at a time, and so is all that follows.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mechinterp.errors import UserError, one_line
from mechinterp.hooked.forward import Plan, call_bridge
from mechinterp.hooked.interventions import Rows
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.prompts import Prompts
from mechinterp.hooked.sites import Site
from mechinterp.sae.activations.chunks import under
from mechinterp.sae.activations.exclusion import Exclusion
from mechinterp.sae.activations.tokens import TokenSource

COUNTED_OUTLIER = 10.0
"""Multiple of the median norm above which positions are counted as outliers where the rule gives none."""
MEDIAN_CHUNKS = 100
_OUT_OF_MEMORY = re.compile(r"not enough memory|can't allocate memory|out of memory", re.IGNORECASE)
_PREFIX = "tokens."  # of the token stream's part of a state


@dataclass(frozen=True)
class Counts:
    """What a harvest has done so far.

    Attributes:
        tokens: positions run.
        excluded: of these, left out by the rule on positions and tokens.
        outliers: of the others, those with an outlying norm, whether dropped or not.
    """

    tokens: int
    excluded: int
    outliers: int


class _AllRecorded(Exception):
    pass


class _Recorder:
    """Copies the kept rows of each activation that it is given, and stops the run after the last."""

    def __init__(self, n_sites: int, kept: Tensor, dtype: torch.dtype):
        self.n_sites, self.kept, self.dtype = n_sites, kept, dtype
        self.rows: dict[str, Tensor] = {}

    def __call__(self, name: str, activation: Tensor) -> None:
        rows = activation.flatten(0, 1).flatten(1)  # [token d]
        self.rows[name] = rows.index_select(0, self.kept.to(rows.device)).to(self.dtype)
        if len(self.rows) == self.n_sites:
            raise _AllRecorded


class Harvest:
    """Chunks of activations, resumable; as an iterator it gives them one after the other.

    Attributes:
        sites: resolved, in the order asked for.
        widths: hook name -> size of a row; heads are laid side by side.
        batch_blocks: blocks run at once; halved when memory runs out.
    """

    def __init__(
        self,
        model: HookedModel,
        sites: Sequence[Site],
        blocks: TokenSource,
        exclusion: Exclusion,
        batch_blocks: int = 16,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Nothing is run yet.

        Args:
            model: to run, with whatever interventions are in force when a chunk is asked for.
            sites: whole sites with an axis `pos`, each once.
            blocks: where tokens come from.
            exclusion: which positions are left out.
            batch_blocks: blocks of a chunk.
            dtype: of the activations given.

        Raises:
            UserError: no site, one twice or one that the model does not have, one without positions, part of one.
        """
        if batch_blocks < 1:
            raise UserError(f"batch_blocks must be at least 1; found {batch_blocks}")
        self.model, self.blocks, self.exclusion = model, blocks, exclusion
        self.batch_blocks, self.dtype = batch_blocks, dtype
        self.sites = tuple(_whole(model.resolve(site)) for site in sites)
        names = [site.hook_name for site in self.sites]
        if not names or len(set(names)) < len(names):
            raise UserError("a harvest needs at least one site, each once; found: " + (", ".join(names) or "none"))
        self.widths = {site.hook_name: max(model.axis_size(site), 1) * model.width(site) for site in self.sites}
        self._pending: Tensor | None = None  # [block pos] taken, but not run through yet
        self._tokens = self._excluded = self._chunks = 0
        # On the model's device once there are chunks: a number on the CPU would wait for the run to end.
        self._outliers = torch.zeros((), dtype=torch.int64)
        self._median = torch.zeros(())

    @property
    def counts(self) -> Counts:
        """Tokens run, excluded and outlying so far."""
        return Counts(self._tokens, self._excluded, int(self._outliers))

    @property
    def median_norm(self) -> float:
        """The running median norm at the first site; 0 before the first chunk."""
        return float(self._median)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        return self.chunk()

    def chunk(self) -> dict[str, Tensor]:
        """The next activations: hook name -> `[token d]`, in the order of `sites`, on the model's device.

        Rows are the kept positions in the order of the text, the same ones at every site; there may be none.

        Raises:
            StopIteration: a finite source of tokens is at its end.
            UserError: a site that did not fire, or a single block that does not fit into memory.
        """
        while True:
            if self._pending is None:
                self._pending = self.blocks.take(self.batch_blocks)
            if not len(self._pending):
                self._pending = None
                raise StopIteration
            try:
                # Grad mode off, but no inference tensors: the rows are to train other modules on.
                with torch.inference_mode(False), torch.no_grad():
                    made = self._run(self._pending[: self.batch_blocks])
            except (RuntimeError, MemoryError) as error:
                reason = _memory_message(error)
                if reason is None:
                    raise
            else:
                rest = self._pending[self.batch_blocks :]
                self._pending = rest.clone() if len(rest) else None
                return made
            self._halve(reason)  # out here, where the error no longer holds on to the run's tensors

    def _run(self, tokens: Tensor) -> dict[str, Tensor]:
        prompts = Prompts(tokens.to(self.model.device))
        kept = self.exclusion.mask(prompts.tokens, prompts.real).flatten().nonzero().flatten()
        recorder = _Recorder(len(self.sites), kept, self.dtype)
        try:
            with Plan.of(self.model, self.model.in_force, self.sites, recorder).installed(Rows.all(prompts)):
                call_bridge(self.model, prompts)
        except _AllRecorded:
            pass
        if missing := [site for site in self.sites if site.hook_name not in recorder.rows]:
            raise UserError(f"{missing[0]} did not fire in this run")
        made = {site.hook_name: recorder.rows[site.hook_name] for site in self.sites}
        made = self._without_outliers(made) if len(kept) else made
        self._tokens += tokens.numel()
        self._excluded += tokens.numel() - len(kept)
        return made

    def _without_outliers(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Count positions of outlying norm at the first site, and drop them if the rule says so."""
        norms = torch.linalg.vector_norm(rows[self.sites[0].hook_name], dim=-1, dtype=torch.float32)
        before = self._median.to(norms.device)
        median = before + (norms.median() - before) / min(self._chunks + 1, MEDIAN_CHUNKS)
        outlying = norms > (self.exclusion.outlier or COUNTED_OUTLIER) * median
        if self.exclusion.outlier is not None:
            inside = (~outlying).nonzero().flatten()
            if len(inside) < len(norms):
                rows = {name: one.index_select(0, inside.to(one.device)) for name, one in rows.items()}
        self._median, self._chunks = median, self._chunks + 1
        self._outliers = self._outliers.to(norms.device) + outlying.sum()
        return rows

    def _halve(self, reason: str) -> None:
        """Half as many blocks at once. Raises UserError at one block."""
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        assert self._pending is not None
        running = min(self.batch_blocks, len(self._pending))
        if running == 1:
            raise UserError(f"out of memory with one block of {self._pending.shape[1]} tokens at a time: {reason}")
        self.batch_blocks = running // 2
        print(f"out of memory with {running} blocks at a time; going on with {self.batch_blocks}", flush=True)

    def fresh(self, shard: tuple[int, int] | None = None) -> "Harvest":
        """The same harvest from the beginning of its text, of that shard or its own; this one stays where it is."""
        blocks = self.blocks.fresh(shard)
        return Harvest(self.model, self.sites, blocks, self.exclusion, self.batch_blocks, self.dtype)

    def state_dict(self) -> dict[str, Any]:
        """What the following chunks depend on; the token stream's part under `tokens.`."""
        pending = torch.zeros(0, 0, dtype=torch.int64) if self._pending is None else self._pending.clone().cpu()
        made = {"batch_blocks": self.batch_blocks, "pending": pending, "chunks": self._chunks}
        made |= {"run": self._tokens, "excluded": self._excluded, "outliers": int(self._outliers)}
        made |= {"median": self._median.clone().cpu()}
        return self._settings() | made | {_PREFIX + name: one for name, one in self.blocks.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was taken. Raises UserError if it is of other sites, rules, text or settings."""
        for name, mine in self._settings().items():
            if (theirs := state.get(name)) != mine:
                raise UserError(f"the harvest to continue has {name} {theirs!r}; this one has {mine!r}")
        mine = under(_PREFIX, state)
        self.blocks.load_state_dict(mine)
        self.batch_blocks, self._chunks = int(state["batch_blocks"]), int(state["chunks"])
        self._pending = state["pending"].clone() if len(state["pending"]) else None
        self._tokens, self._excluded = int(state["run"]), int(state["excluded"])
        self._outliers = torch.tensor(int(state["outliers"]))
        self._median = state["median"].clone()

    def _settings(self) -> dict[str, Any]:
        made: dict[str, Any] = {"sites": [site.hook_name for site in self.sites]}
        return made | {"exclusion": self.exclusion.to_json(), "dtype": str(self.dtype).removeprefix("torch.")}


def _whole(site: Site) -> Site:
    if site.kind.axes[:2] != ("batch", "pos"):
        raise UserError(f"{site} has axes {' '.join(site.kind.axes)}: no vector at each position to be harvested")
    if site != site.whole or site.basis is not None:
        raise UserError(f"only whole sites can be harvested; asked for {site}, valid: {site.whole}")
    return site


def _memory_message(error: BaseException) -> str | None:
    """The first line of an error that says that memory ran out, else None."""
    told = isinstance(error, torch.OutOfMemoryError | MemoryError) or _OUT_OF_MEMORY.search(str(error)) is not None
    return one_line(error) if told else None
