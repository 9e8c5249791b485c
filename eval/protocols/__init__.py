"""What each protocol of an evaluation asks of a machine. STUB: the real one takes its place when branches are merged."""

from dataclasses import dataclass

from trainer.config import Config


@dataclass(frozen=True)
class Sizes:
    """How large an evaluation is."""

    train: int
    """Training images."""
    validation: int
    classes: int
    features: int
    """Length of a feature vector."""


@dataclass(frozen=True)
class Work:
    """What a protocol does."""

    forward: int = 0
    """Images that go through the frozen encoder."""
    trained: int = 0
    """Images that go through the encoder forward and backward."""
    flops: float = 0.0
    """Of the matrix products of fits and neighbours."""


_PARTS = {"finetune-1": 0.01, "finetune-10": 0.1, "finetune-100": 1.0}
_EVALUATIONS = 400
"""Of a fit's objective."""


def work_of(config: Config, sizes: Sizes) -> dict[str, Work]:
    """Returns the work of forward pass, untrained control and each protocol, by name in the order in which it is done."""
    settings = config.linear_eval
    control = min(50_000, sizes.train)
    a_pass = 4.0 * sizes.features * sizes.classes
    work = {
        "features": Work(forward=sizes.train + sizes.validation),
        "untrained": Work(forward=control + sizes.validation, flops=_EVALUATIONS * a_pass * control),
        "cached": Work(flops=_EVALUATIONS * a_pass * sizes.train),
    }
    for protocol in settings.protocols:
        if protocol == "knn":
            work["knn"] = Work(flops=2.0 * sizes.train * sizes.validation * sizes.features)
        elif protocol == "online":
            work["online"] = Work(flops=2.0 * sizes.validation * sizes.features * sizes.classes)
        elif protocol == "official":
            work["official"] = Work(forward=settings.official_epochs * sizes.train)
        elif protocol in _PARTS:
            epochs = getattr(settings, f"{protocol.replace('-', '_')}_epochs")
            work[protocol] = Work(sizes.validation, round(epochs * _PARTS[protocol] * sizes.train))
    return work


def memory_bytes(sizes: Sizes) -> float:
    """Returns the most that the evaluation holds in the memory of a host."""
    return 1.5e9 + 4.0 * sizes.features * sizes.validation


def disk_bytes(config: Config, sizes: Sizes) -> float:
    """Returns what the features of all splits take on a disk."""
    return 4.0 * sizes.features * (sizes.train + 2 * sizes.validation + min(50_000, sizes.train))
