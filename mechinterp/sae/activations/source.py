"""Where a training run's activations come from: text through a model and a shuffle buffer, or a store on disk.

    text ──tokens.py──► blocks ──harvest.py──► chunks ──ahead.py──► buffer.py ──► batches
                                    └──► store.py ──► chunks ──────────┘

All sites of a run come from one pass of the model. Each process reads documents (or shards) of its own.
"""

import hashlib
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechinterp.data_sets import DataSet
from mechinterp.errors import UserError
from mechinterp.hooked.model import HookedModel
from mechinterp.hooked.sites import Site
from mechinterp.models import load
from mechinterp.sae.activations.ahead import Ahead
from mechinterp.sae.activations.buffer import ShuffleBuffer
from mechinterp.sae.activations.chunks import Chunks, FixedChunk
from mechinterp.sae.activations.exclusion import Exclusion, special_tokens
from mechinterp.sae.activations.harvest import Harvest
from mechinterp.sae.activations.store import Store, write_store
from mechinterp.sae.activations.store_format import DTYPES, Manifest, Origin
from mechinterp.sae.activations.tokens import FixedBlocks, TokenBlocks, TokenSource, held_out_blocks
from mechinterp.sae.config import TrainConfig
from mechinterp.sae.metadata import Metadata
from mechinterp.sae.toys.known_dictionary import KnownDictionary
from mechinterp.sae.training.distributed import Processes
from mechinterp.text import DOCSTRINGS

HELD_OUT = "held_out"  # folder of a store, a store of its own


@dataclass(frozen=True)
class Job:
    """One autoencoder to train.

    Attributes:
        name: of it, among those of the run.
        reads, writes: hook names of what it reads and reconstructs.
        metadata: what it will say of itself.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    metadata: Metadata = field(default_factory=Metadata)

    def of(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What it reads `[token d_in]` and reconstructs `[token d_out]`: several sites stand side by side."""
        x = _beside([batch[name] for name in self.reads])
        return x, x if self.writes == self.reads else _beside([batch[name] for name in self.writes])


def _beside(sites: list[Tensor]) -> Tensor:
    return sites[0] if len(sites) == 1 else torch.cat(sites, 1)


@dataclass(eq=False)
class Source:
    """Batches of activations, and what is held out.

    Attributes:
        jobs: what is trained on them.
        buffer: gives the batches.
        hold_out: gives what `held_out` is, when it is first asked for.
        origin: what a checkpoint must share: text, weights, sites; plain values.
        harvest: counts tokens; None where no model runs.
    """

    jobs: tuple[Job, ...]
    buffer: ShuffleBuffer
    hold_out: Callable[[], Mapping[str, Tensor]]
    origin: Mapping[str, Any]
    harvest: Harvest | None = None

    @cached_property
    def held_out(self) -> Mapping[str, Tensor]:
        """Hook name -> `[token d]`, float32, that no batch has; empty where there is none.

        Raises:
            UserError: fewer than two tokens.
        """
        found = self.hold_out()
        n = min((len(rows) for rows in found.values()), default=2)
        if n < 2:
            raise UserError(f"held-out numbers need at least 2 tokens; found {n}: give more text, or eval_every=0")
        return {name: rows.to(self.buffer.device or rows.device).float() for name, rows in found.items()}

    def batch(self) -> dict[str, Tensor]:
        """Hook name -> `[batch d]`, float32. Raises StopIteration at the end of a finite source."""
        return {name: rows.float() for name, rows in self.buffer.batch().items()}

    def sample(self, n: int) -> dict[str, Tensor]:
        """The next n rows, or all there are, without taking them."""
        return {name: rows.float() for name, rows in self.buffer.peek(n).items()}

    def counts(self) -> dict[str, Any]:
        """Of the harvest, for the log: tokens run through the model, left out, of outlying norm; epochs of the text."""
        if self.harvest is None:
            return {}
        found = self.harvest.counts
        made = {"harvested": found.tokens, "excluded": found.excluded, "outliers": found.outliers}
        blocks = self.harvest.blocks
        return made | ({"epoch": blocks.epoch} if isinstance(blocks, TokenBlocks) else {})

    def state_dict(self) -> dict[str, Any]:
        """Everything that later batches depend on."""
        return self.buffer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue, bit for bit, where the state was taken."""
        self.buffer.load_state_dict(state)

    def close(self) -> None:
        """Stop harvesting ahead, so that the process can end; the next batch starts it again."""
        if isinstance(self.buffer.chunks, Ahead):
            self.buffer.chunks.close()


def open_source(
    config: TrainConfig, model: HookedModel | None, processes: Processes, data: DataSet | None = None
) -> Source:
    """The source that the settings ask for; `data` is a data set in the place of their text.

    Raises:
        UserError: a site or layer that the model does not have, text that cannot be had, a store of something else.
    """
    if config.store is not None:
        return _from_store(config, config.store, model, processes)
    model = model or load_model(config, processes)
    return _from_text(config, model, processes, data)


def load_model(config: TrainConfig, processes: Processes) -> HookedModel:
    """The model of the settings, on the device of the settings; its header is printed once."""
    device = processes.device(config.model_device or config.device)
    model = load(config.model, device=device, dtype=config.dtype)
    if processes.first:
        print(model.header(), flush=True)
    return model


# ---- text through a model ------------------------------------------------------------------------------------------


def token_blocks(
    config: TrainConfig, model: HookedModel, shard: tuple[int, int] = (0, 1), data: DataSet | None = None
) -> TokenBlocks:
    """The training documents of a shard, as packed blocks.

    Documents of files are shuffled, for an autoencoder ends up fitted to the book that comes last; a stream is not.
    """
    seed = config.seed if isinstance(data, Sized) or (config.text and data is None) else None
    return TokenBlocks(
        model, text_source(config, data), config.context, shard, config.held_out_every, seed, config.split,
        config.column,
    )  # fmt: skip


def harvest_of(config: TrainConfig, model: HookedModel, blocks: TokenSource) -> Harvest:
    """Blocks, as activations of every site of the settings."""
    return Harvest(model, sites(config, model), blocks, exclusion_of(config, model), config.harvest_blocks)


def held_out_of(
    config: TrainConfig, model: HookedModel, n_tokens: int, data: DataSet | None = None
) -> dict[str, Tensor]:
    """Hook name -> about n `[token d]` of held-out documents, by the same rule of exclusion.

    Raises:
        UserError: no held-out document is long enough for a block.
    """
    n_blocks = -(-n_tokens // (config.context - 1))
    blocks = held_out_blocks(
        model, text_source(config, data), config.context, n_blocks, config.held_out_every, split=config.split,
        column=config.column,
    )  # fmt: skip
    made = list(harvest_of(config, model, FixedBlocks(blocks.prompts.tokens)))
    return {name: torch.cat([one[name] for one in made])[:n_tokens] for name in made[0]}


def text_source(config: TrainConfig, data: DataSet | None = None) -> Any:
    """What `text.documents` is to read."""
    return data if data is not None else config.dataset or config.text or DOCSTRINGS


def text_hash(config: TrainConfig) -> str:
    """sha256 over the text files; empty where the text is not in files."""
    found = hashlib.sha256()
    for path in config.text:
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest() if config.text else ""


def exclusion_of(config: TrainConfig, model: HookedModel) -> Exclusion:
    """Position 0 unless it is kept, special tokens, outliers if they are to be dropped."""
    return Exclusion(not config.keep_first, tuple(special_tokens(model)), config.outlier)


def sites(config: TrainConfig, model: HookedModel) -> list[Site]:
    """Every site that is read or reconstructed, once. Raises UserError for those that the model does not have."""
    names = [config.site] + ([config.target or "mlp_out"] if config.transcodes else [])
    found = [model.resolve(Site(name, layer)) for name in names for layer in config.layers]
    return list(dict.fromkeys(found))


def _from_text(config: TrainConfig, model: HookedModel, processes: Processes, data: DataSet | None) -> Source:
    blocks = token_blocks(config, model, (processes.rank, processes.size), data)
    harvest = harvest_of(config, model, blocks)
    device = processes.device(config.device)
    chunks: Chunks = harvest
    size = config.buffer // processes.size
    if device != model.device:
        # As far ahead as a refill of the buffer is long.
        chunks = Ahead(harvest, max(1, size // 2 // (config.harvest_blocks * (config.context - 1))))
    exclusion = exclusion_of(config, model)
    metadata = Metadata(
        model=model.info.name,
        exclusion=exclusion,
        context=config.context,
        bos=model.info.bos,
        weights_hash=model.weights_hash(),
        text=blocks.source,
    )
    layers = [site.layer for site in sites(replace(config, kind="sae", target=None), model) if site.layer is not None]
    if len(layers) < len(config.layers):
        raise UserError(f"layer names one twice, or none: {config.layers} of {config.site} is {layers or 'no layer'}")
    origin = {
        "model weights": metadata.weights_hash,
        "text": metadata.text,
        "text hash": text_hash(config),
        "sites": [site.hook_name for site in sites(config, model)],
        "exclusion": exclusion.to_json(),
    }
    return Source(
        jobs(config, layers, metadata),
        ShuffleBuffer(chunks, size, processes.share(config.batch), config.seed * 1_000 + processes.rank, device),
        partial(held_out_of, config, model, config.eval_tokens, data) if config.eval_every != 0 else dict,
        origin,
        harvest,
    )


def jobs(config: TrainConfig, layers: list[int], metadata: Metadata) -> tuple[Job, ...]:
    """One autoencoder a layer, or one crosscoder.

    Args:
        layers: of the settings, counted from 0.
        metadata: without sites.
    """
    read = [Site(config.site, layer).hook_name for layer in layers]
    target = config.target or "mlp_out"
    written = [Site(target, layer).hook_name for layer in layers] if config.transcodes else read
    groups = [(tuple(read), tuple(written))] if config.kind == "crosscoder" else [
        ((one,), (other,)) for one, other in zip(read, written, strict=True)
    ]  # fmt: skip
    return tuple(Job(one[-1], one, other, replace(metadata, reads=one, writes=other)) for one, other in groups)


# ---- a store -------------------------------------------------------------------------------------------------------


def _from_store(config: TrainConfig, folder: Path, model: HookedModel | None, processes: Processes) -> Source:
    store = Store.open(folder)
    origin = store.manifest.origin
    if min(config.layers) < 0:
        raise UserError(f"with a store, layers are counted from 0; found {', '.join(map(str, config.layers))}")
    rule = Exclusion.of(origin.exclusion)
    asked = (not config.keep_first, config.outlier, config.context)
    if asked != (rule.first, rule.outlier, origin.context):
        raise UserError(
            f"the store in {folder} was made with keep_first {not rule.first}, outlier {rule.outlier}, context "
            f"{origin.context}; the settings ask for {config.keep_first}, {config.outlier}, {config.context}"
        )
    metadata = Metadata(
        model=origin.model,
        exclusion=rule,
        context=origin.context,
        bos=origin.reading.get("bos"),
        weights_hash=origin.weights_hash,
        text=origin.text,
    )
    made = jobs(config, list(config.layers), metadata)
    names = list(dict.fromkeys(name for job in made for name in (*job.reads, *job.writes)))
    if model is None and config.model != origin.model:
        raise UserError(f"the store in {folder} is of the model {origin.model}, not {config.model}")
    name, weights = (origin.model, origin.weights_hash) if model is None else (model.info.name, model.weights_hash())
    store.require(name, weights, names, context=config.context)
    device = processes.device(config.device)
    chunks = store.chunks(config.seed, (processes.rank, processes.size), names)
    size = config.buffer // processes.size
    return Source(
        made,
        ShuffleBuffer(chunks, size, processes.share(config.batch), config.seed * 1_000 + processes.rank, device),
        partial(_held_out_beside, folder, names, config) if config.eval_every != 0 else dict,
        {"store": store.manifest.digest, "sites": names},
    )


def _held_out_beside(folder: Path, names: list[str], config: TrainConfig) -> dict[str, Tensor]:
    """What was harvested from held-out text together with the store; nothing where it is not there."""
    if not (folder / HELD_OUT).is_dir():
        return {}
    store = Store.open(folder / HELD_OUT)
    return store.chunks(hook_names=names, endless=False, chunk_tokens=config.eval_tokens).chunk()


# ---- a known dictionary --------------------------------------------------------------------------------------------


def synthetic_source(dictionary: KnownDictionary, config: TrainConfig, processes: Processes | None = None) -> Source:
    """Activations whose features are known, in the place of a model's; one site, "toy"."""
    processes = processes or Processes.started()
    # Streams of their own for every process, and for what is held out.
    chunks = dictionary.chunks(seed=1 + config.seed * 1_000 + processes.rank)
    held_out = dictionary.chunks(config.eval_tokens, seed=config.seed * 1_000)
    return source_of(chunks, "toy", config, {"dictionary": repr(dictionary)}, held_out.chunk, processes)


def source_of(
    chunks: Chunks,
    site: str,
    config: TrainConfig,
    origin: Mapping[str, Any],
    hold_out: Callable[[], Mapping[str, Tensor]] = dict,
    processes: Processes | None = None,
) -> Source:
    """Activations of your own, of one site, for `train(config, source=…)`.

    Args:
        chunks: gives them by the name of the site; each process needs other ones.
        site: that name.
        config: settings of the training.
        origin: what they are, in plain values: a checkpoint of another origin is refused.
        hold_out: gives activations that are not trained on; none by default.
        processes: that train together; those that torchrun has started by default None.
    """
    processes = processes or Processes.started()
    device, size = processes.device(config.device), config.buffer // processes.size
    buffer = ShuffleBuffer(chunks, size, processes.share(config.batch), config.seed * 1_000 + processes.rank, device)
    job = Job(site, (site,), (site,), Metadata(model=site, text=", ".join(map(str, origin.values()))))
    return Source((job,), buffer, hold_out, dict(origin))


# ---- harvesting to disk --------------------------------------------------------------------------------------------


def harvest_into(
    config: TrainConfig,
    folder: Path,
    shard_tokens: int,
    dtype: str = "float32",
    progress: Callable[[int], None] | None = None,
    model: HookedModel | None = None,
) -> Manifest:
    """Write the activations that a run of these settings would read, and held-out ones beside them, or continue to.

    Args:
        config: settings; `n_tokens` are written, and `eval_tokens` held-out ones.
        folder: of the store.
        shard_tokens: tokens of a shard.
        dtype: of the numbers on disk.
        progress: called with the tokens so far.
        model: instead of loading `config.model`.

    Raises:
        UserError: as `open_source` and `write_store` do.
    """
    model = model or load_model(config, Processes())
    blocks = token_blocks(config, model)
    rule = exclusion_of(config, model).to_json()
    reading = {name: getattr(config, name) for name in ("split", "column", "held_out_every", "seed")}
    reading |= {"text_hash": text_hash(config), "bos": model.info.bos}
    origin = Origin(model.info.name, model.weights_hash(), rule, config.context, blocks.source, reading)
    chunks = harvest_of(config, model, blocks)
    made = write_store(folder, chunks, origin, config.n_tokens, shard_tokens, progress, DTYPES[dtype])
    held_out = FixedChunk(held_out_of(config, model, config.eval_tokens))
    write_store(folder / HELD_OUT, held_out, origin, config.eval_tokens, config.eval_tokens, None, DTYPES[dtype])
    return made
