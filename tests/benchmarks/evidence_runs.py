"""The runs of the evidence: arms, temperatures, batch sizes, seeds, and the rule that chooses each cell's learning rate."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PRESET = "sogclr_cifar10_r18w025_b128"
IMAGES_PER_CLASS = 500
"""Training images of each class of CIFAR-10. Few images leave time for many visits, which u's memory is made of."""
ARMS: Mapping[str, tuple[str, ...]] = {
    "SimCLR": ("loss=nt_xent",),
    "decoupled": ("gamma=1.0",),
    "SogCLR .9": ("gamma=0.9",),
    "SogCLR .5": ("gamma=0.5",),
    "SogCLR .1": ("gamma=0.1",),
}
"""Settings of each arm. At gamma = 1 u has no memory: the decoupled contrastive loss."""
TEMPERATURES = (0.1, 0.05)
BATCHES = (16, 32, 64, 128)
ENDS = (16, 128)
SEEDS = (0, 1, 2)
"""Seeds at the two ends. Batches between them have the first one."""
GHOST_SIZES = (16, 32)
"""Images over which batch norm takes its statistics in the ablation, at the largest batch."""
GHOST_ARMS = ("SimCLR", "SogCLR .9")
CONTRAST = "contrast"
"""The group of runs at the largest batch whose negatives come from as many images as the smallest batch has. What the theorem is
about, the number of negatives, is all that differs from the main runs: not the noise of a step, its rate, or batch norm."""
HALF_RATE = "half-rate"
"""The group of runs at the smallest batch with half the chosen rate. They test whether all arms lose by the noise of a step."""
VIEWS_TOGETHER = "ghost-together"
"""The group of runs of the ablation by an earlier program. They are not planned: docs/results.md says what came of them."""
ISOGCLR = ("gamma=0.9", "variant=isogclr")
"""SogCLR with learned temperatures, at the rates of `SogCLR .9`."""

# Without weight decay, so what is minimised is the objective alone. LARS divides a gradient by its norm, so that losses of
# other scales are compared at like rates. Its rate grows with the root of the batch, as in the paper.
_RECIPE = (
    "data.allow_other_counts=true image_size=16 depth=10 optimizer=lars learning_rate_scaling=sqrt weight_decay=0 "
    "log_every_steps=1000"
)
_EPOCHS = 60
_PROBE_EPOCHS = {0.1: 10, 0.05: 60}
"""By temperature. At .05, F of a collapsed encoder is about 0, and that of one that has begun to tell images apart is above 0 for
more than ten epochs. So runs of ten epochs choose rates at which a whole run collapses: docs/results.md shows one."""
_PROBE_SEED = 100
_FIRST_RATES = (0.15, 0.3, 0.6)
_LOWEST_RATE, _HIGHEST_RATE = 0.3 / 16, 0.3 * 16

Line = dict[str, Any]
"""The record of one finished run, a line of docs/evidence.jsonl."""


@dataclass(frozen=True)
class Cell:
    """What a learning rate is chosen for."""

    arm: str
    batch: int
    temperature: float

    @property
    def name(self) -> str:
        return f"{self.arm}-t{self.temperature:g}-b{self.batch}".replace(" ", "")


@dataclass(frozen=True)
class Run:
    group: str
    """`main`, `contrast` (few negatives), `ghost` (batch norm of few images), `half-rate`, `isogclr`, `probe`, `untrained`."""
    cell: Cell
    seed: int
    rate: float
    """Base learning rate."""
    settings: tuple[str, ...] = ()
    """Settings that differ from those of the cell."""
    suffix: str = ""

    @property
    def name(self) -> str:
        return f"{self.group}-{self.cell.name}{self.suffix}-s{self.seed}"

    @property
    def overrides(self) -> tuple[str, ...]:
        epochs = _PROBE_EPOCHS[self.cell.temperature] if self.group == "probe" else _EPOCHS
        return (
            *_RECIPE.split(),
            f"epochs={epochs}",
            f"warmup_epochs={epochs // 10}",
            f"global_batch_size={self.cell.batch}",
            f"temperature={self.cell.temperature:g}",
            f"base_learning_rate={self.rate:g}",
            f"seed={self.seed}",
            *(ISOGCLR if self.group == "isogclr" else ARMS[self.cell.arm]),
            *self.settings,
        )

    @property
    def command(self) -> str:
        settings = " ".join(self.overrides)
        return f"python -m trainer.task --preset {PRESET} --data DATA --checkpoint-dir DIR --set {settings}"


def planned() -> Iterator[tuple[str, Cell, int, tuple[str, ...], str]]:
    """Yields group, cell, seed, settings and suffix of each run but the probes; those first whose results say most."""
    asked, others = [*ARMS][:3], [*ARMS][3:]
    for temperature in TEMPERATURES:
        for arms in (asked, others):
            for seed in SEEDS:
                for arm in arms:
                    for batch in ENDS:
                        yield "main", Cell(arm, batch, temperature), seed, (), ""
    smallest, largest = ENDS
    first = TEMPERATURES[0]
    for seed in SEEDS:
        for arm in ARMS:
            yield CONTRAST, Cell(arm, largest, first), seed, (f"contrast_batch_size={smallest}",), f"-c{smallest}"
    for seed in SEEDS:
        for size in GHOST_SIZES:
            for arm in GHOST_ARMS:
                yield "ghost", Cell(arm, largest, first), seed, (f"ghost_batch_size={size}",), f"-g{size}"
        for arm in GHOST_ARMS:
            yield HALF_RATE, Cell(arm, smallest, first), seed, (), ""
    for batch in ENDS:
        yield "isogclr", Cell("SogCLR .9", batch, first), SEEDS[0], (), ""
    for temperature in TEMPERATURES:
        for batch in BATCHES:
            if batch not in ENDS:
                for arm in ARMS:
                    yield "main", Cell(arm, batch, temperature), SEEDS[0], (), ""


def untrained(seed: int) -> Run:
    """Returns the encoder of a seed before its first step. Its objective is measured at each temperature."""
    return Run("untrained", Cell("SimCLR", ENDS[-1], TEMPERATURES[0]), seed, _FIRST_RATES[0])


def due(done: Mapping[str, Line]) -> Iterator[Run]:
    """Yields the runs that `done`, by name, lacks and that may begin: a cell's probes, or what has a chosen rate."""
    yielded: set[str] = set()
    for run in _following(done):
        if run.name not in done and run.name not in yielded:
            yielded.add(run.name)
            yield run


def _following(done: Mapping[str, Line]) -> Iterator[Run]:
    yield from map(untrained, SEEDS)
    for group, cell, seed, settings, suffix in planned():
        tried = own_objectives(done.values(), cell)
        for rate in rates_to_try(tried):
            epochs = "" if cell.temperature == TEMPERATURES[0] else f"-e{_PROBE_EPOCHS[cell.temperature]}"
            yield Run("probe", cell, _PROBE_SEED, rate, (), f"{epochs}-r{rate:g}")
        if (rate := chosen_rate(done.values(), cell)) is not None:
            # At .05 a cell has runs at rates that were chosen by another rule.
            named = suffix if cell.temperature == TEMPERATURES[0] else f"{suffix}-r{rate:g}"
            yield Run(group, cell, seed, rate / 2 if group == HALF_RATE else rate, settings, named)


def own_objectives(lines: Iterable[Line], cell: Cell) -> dict[float, float | None]:
    """Returns what a cell's probes came to, by the rate; None for one that diverged."""
    epochs = f" epochs={_PROBE_EPOCHS[cell.temperature]} "
    return {
        line["rate"]: line["own_objective"]
        for line in lines
        if line["group"] == "probe" and cell_of(line) == cell and epochs in line["command"]
    }


def chosen_rate(lines: Iterable[Line], cell: Cell) -> float | None:
    """Returns the rate that a cell's probes chose, or None if some are missing."""
    tried = own_objectives(lines, cell)
    return None if rates_to_try(tried) else best_rate(tried)


def cell_of(line: Line) -> Cell:
    return Cell(line["arm"], line["batch"], line["temperature"])


def best_rate(tried: Mapping[float, float | None]) -> float:
    """Returns the rate whose run reached the lowest value of its own objective. None stands for a run that diverged."""
    return min(sorted(tried), key=lambda rate: math.inf if tried[rate] is None else tried[rate])


def rates_to_try(tried: Mapping[float, float | None]) -> Sequence[float]:
    """Returns the rates still to be probed: three at first, then twice or half the best, until it has worse neighbours."""
    missing = [rate for rate in _FIRST_RATES if rate not in tried]
    if missing:
        return missing
    best = best_rate(tried)
    neighbours = [rate for rate in (best / 2, best * 2) if _LOWEST_RATE <= rate <= _HIGHEST_RATE]
    return [rate for rate in neighbours if rate not in tried]
