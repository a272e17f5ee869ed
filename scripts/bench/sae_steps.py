"""Whole training steps of sae.py: ours, the peers', and the least work that a step could be."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from circuit_floors import rate
from measure import timed
from peer import Missing, Peer, measured
from sae_table import Outcome, paired
from safetensors.torch import save_file
from torch import Tensor

from mechinterp.sae import architectures
from mechinterp.sae.activations.memory import keep_freed_memory
from mechinterp.sae.autoencoder import Objective, SAEConfig, SparseAutoencoder
from mechinterp.sae.config import TrainConfig
from mechinterp.sae.training.trainer import Trainer

STEPS = 1_000_000  # that schedules are made for: rates stay near 0, and with them the weights as they are
DEAD = 10**9  # tokens since it fired, of a dead feature
CLEAR = 1e-4  # by which the last chosen pre-activation must exceed the next, to be chosen by everyone
SAME_DENSE, SAME_RECONSTRUCTION = 1e-5, 1e-4
# program, environment, arguments, and how many times as fast ours must be
PEERS = {
    "SAELens": ("sae_lens.py", "sae-lens", (), 5.0),
    "SAELens, sparse": ("sae_lens.py", "sae-lens", ("--sparse",), None),
    "dictionary_learning": ("dictionary_learning.py", "dictionary-learning", (), 5.0),
    "sparsify": ("sparsify.py", "sparsify", (), 1.8),
}
# Runs so many steps; seconds and bytes that the process grew by.
Side = Callable[[int], tuple[float, int]]


@dataclass(frozen=True)
class Shape:
    """Of the autoencoder and of the measurement."""

    d_in: int = 576
    d_sae: int = 9216
    k: int = 32
    batch: int = 2048
    dead: int = 500
    rounds: int = 5
    steps: int = 3  # of a side in a round

    @property
    def products(self) -> int:
        """Multiply-adds of the encoder's product."""
        return self.batch * self.d_in * self.d_sae

    @property
    def adam_bytes(self) -> int:
        """Of Adam's seven passes: it reads weight, gradient and both moments, and writes all but the gradient."""
        return 7 * 4 * (2 * self.d_in * self.d_sae + self.d_in + self.d_sae)

    def __str__(self) -> str:
        return f"d_in {self.d_in}, F {self.d_sae:,}, k {self.k}, batch {self.batch:,}, fp32"


QUICK = Shape(64, 512, 8, 128, 28, 2, 2)


class Setting:
    """Weights and batch."""

    def __init__(self, shape: Shape, device: str = "cpu"):
        keep_freed_memory(torch.device(device))  # as `train` does
        self.shape, self.device = shape, device
        self.x = torch.randn(shape.batch, shape.d_in, generator=torch.Generator().manual_seed(0)).to(device)

    def give(self, folder: Path) -> None:
        """Write both where peers read them."""
        save_file({"x": self.x}, folder / "x.safetensors")
        weights = self.autoencoder("topk").state_dict()
        save_file({name: one.clone() for name, one in weights.items()}, folder / "weights.safetensors")
        given = {"d_in": self.shape.d_in, "d_sae": self.shape.d_sae, "k": self.shape.k}
        (folder / "shape.json").write_text(json.dumps(given))

    def autoencoder(self, architecture: str) -> SparseAutoencoder:
        """A fresh one, always the same. JumpReLU's threshold is where about k features are above it."""
        shape = self.shape
        k = None if architecture == "jumprelu" else shape.k
        config = SAEConfig(architecture, shape.d_in, shape.d_sae, k)
        if k is not None:
            return architectures.make(config).to(self.device)
        pre = self.x[:64] @ architectures.make(config).W_enc.detach().T.to(self.device)
        threshold = float(pre.flatten().topk(shape.k * len(pre)).values[-1])
        return architectures.make(config, threshold=threshold).to(self.device)

    def trainer(
        self, architecture: str = "topk", dense: bool = False, n_dead: int = 0, autocast: bool = False
    ) -> Trainer:
        """Ours. Dead features have small encoder rows: half of their pre-activations are positive, none is chosen."""
        sae, shape = self.autoencoder(architecture), self.shape
        config = TrainConfig(
            model="none", architecture=architecture,  # type: ignore[arg-type]
            d_sae=shape.d_sae, k=shape.k, batch=shape.batch,
            n_tokens=STEPS * shape.batch, warm_up=1.0, decay=0.0, autocast=autocast,
        )  # fmt: skip
        made = Trainer(sae, config.resolved(shape.d_in), (torch.ones(1), torch.ones(1)))
        if dense:
            sae.forward = partial(sae.forward, dense=True)
        dead = self.dead(n_dead)
        made.since_fired[dead] = DEAD
        with torch.no_grad():
            sae.W_enc[dead] *= 0.1
        return made

    def dead(self, n: int) -> Tensor:
        """`[feature]` numbers of dead features."""
        order = torch.randperm(self.shape.d_sae, generator=torch.Generator().manual_seed(1))
        return order[:n].sort().values.to(self.device)

    def side(self, trainer: Trainer) -> Side:
        """Steps of ours, on the CPU."""

        def run(n: int) -> None:
            for _ in range(n):
                trainer.step(self.x)

        def steps(n: int) -> tuple[float, int]:
            spent, peak, _ = measured(lambda: run(n))
            return spent, peak

        return steps


# ---- clocks --------------------------------------------------------------------------------------------------------


def in_turn(sides: dict[str, Side], shape: Shape) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Milliseconds a step of every side in each round, one side after the other; bytes that its first steps took."""
    peaks = {name: side(2)[1] for name, side in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(shape.rounds):
        for name, side in sides.items():
            times[name].append(1e3 * side(shape.steps)[0] / shape.steps)
    return times, peaks


def floor(shape: Shape) -> float:
    """Milliseconds of the least: the encoder's product, and Adam's seven passes over the parameters.

    Multiply-adds at the rate of a large matmul, bytes at that of a large copy, both as they are just now.
    """
    return 1e3 * (shape.products / rate() + shape.adam_bytes / bandwidth())


def bandwidth(n: int = 2**25) -> float:
    """Bytes a second that a large copy reads and writes, the best of some."""
    source, target = torch.zeros(2, n)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source))[0] for _ in range(6))


# ---- checks --------------------------------------------------------------------------------------------------------


def dense_gap(setting: Setting, architecture: str = "topk", n_dead: int = 0, autocast: bool = False) -> float:
    """The largest relative difference between the sparse step and the dense one, of losses and of reconstructions."""
    x = setting.x
    more = {"dead": setting.dead(n_dead), "k_aux": setting.shape.d_in // 2, "aux": 1 / 32} if n_dead else {}
    objective = Objective.of(x, sparsity=0.001, **more)
    sae = setting.trainer(architecture, n_dead=n_dead).sae
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        sparse, dense = (sae(x, x, objective, dense=dense) for dense in (False, True))
    assert set(sparse.losses) == set(dense.losses) and ("auxk" in dense.losses) == bool(n_dead)
    losses = [abs(float(sparse.losses[name] / value) - 1) for name, value in dense.losses.items()]
    made, wanted = sparse.reconstruction, dense.reconstruction
    return max(*losses, float((made - wanted).abs().max() / wanted.abs().max()))


def reconstruction_gap(setting: Setting, theirs: Tensor) -> float:
    """The largest difference to a peer's reconstruction, as a share of the largest value.

    Rows whose next feature is so near the last chosen one that rounding may choose between them are left out.
    """
    sae = setting.trainer().sae
    with torch.no_grad():
        ours = sae(setting.x).reconstruction
        best = (setting.x @ sae.W_enc.T).topk(setting.shape.k + 1).values
    clear = best[:, -2] - best[:, -1] > CLEAR * best[:, -2]
    assert clear.float().mean() > 0.9
    return float((ours - theirs)[clear].abs().max() / theirs.abs().max())


# ---- cases ---------------------------------------------------------------------------------------------------------


def step(setting: Setting, folder: Path, threads: Sequence[int], skipped: dict[str, str]) -> Iterator[Outcome]:
    """TopK steps beside the peers', our own dense one, and those of other architectures; limits at threads[0]."""
    shape = setting.shape
    setting.give(folder)
    ours = {name: setting.side(setting.trainer(name)) for name in ("topk", "batchtopk", "jumprelu")}
    ours["dense"] = setting.side(setting.trainer(dense=True))
    gaps = {name: dense_gap(setting, name) for name in ("topk", "batchtopk", "jumprelu")}
    with ExitStack() as stack:
        peers: dict[str, Peer] = {}
        for name, (program, environment, args, _) in PEERS.items():
            try:
                peers[name] = Peer(environment, "setup_sae.sh", program, folder, *args)
            except Missing as error:
                skipped[f"step, {name}"] = str(error)
                continue
            stack.callback(peers[name].close)
            gaps[name] = reconstruction_gap(setting, peers[name]("reconstruct")[2]["reconstruction"])
        for n_threads in threads:
            with using(n_threads):
                sides = ours | {name: partial(_peer_steps, peer, n_threads) for name, peer in peers.items()}
                times, peaks = in_turn(sides, shape)
                least = floor(shape)
            for name in (*peers, "dense", "batchtopk", "jumprelu"):
                limit = PEERS[name][3] if name in peers and n_threads == threads[0] else None
                yield _beside(name, n_threads, times, peaks, gaps, least, limit, shape)


def _peer_steps(peer: Peer, threads: int, n: int) -> tuple[float, int]:
    spent, peak, made = peer("step", steps=n, threads=threads)
    assert int(made["threads"]) == threads
    return spent, peak


def _beside(
    name: str, threads: int, times: dict[str, list[float]], peaks: dict[str, int], gaps: dict[str, float],
    least: float, limit: float | None, shape: Shape,
) -> Outcome:  # fmt: skip
    """Ours beside a peer or our dense step; another architecture of ours beside TopK."""
    another = name in ("batchtopk", "jumprelu")
    left, right = ("topk", name) if another else (name, "topk")
    return Outcome(
        f"step {right}", left if name in PEERS else f"our {left} step", threads, median(times[left]),
        median(times[right]), paired(times[left], times[right]), limit, None, least,
        max_rel_diff=gaps.get(name, gaps["topk"]), tolerance=SAME_RECONSTRUCTION if name in PEERS else SAME_DENSE,
        other_peak_bytes=peaks[left], ours_peak_bytes=peaks[right], what=str(shape),
    )  # fmt: skip


def auxk(setting: Setting, threads: int) -> Outcome:
    """A step that revives dead features beside one without dead ones."""
    shape = setting.shape
    sides = {"with": setting.side(setting.trainer(n_dead=shape.dead)), "without": setting.side(setting.trainer())}
    times, peaks = in_turn(sides, shape)
    return Outcome(
        "auxk", "a step without dead features", threads, median(times["without"]), median(times["with"]),
        paired(times["with"], times["without"]), at_most=1.15, max_rel_diff=dense_gap(setting, n_dead=shape.dead),
        tolerance=SAME_DENSE, other_peak_bytes=peaks["without"], ours_peak_bytes=peaks["with"],
        what=f"{shape.dead} dead, {shape}",
    )  # fmt: skip


@contextmanager
def using(n: int) -> Iterator[None]:
    """So many threads of torch for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
