"""The experiments there are, each a function that returns its `Config`.

A preset is named METHOD_DATASET_ENCODER_bBATCH. Its docstring says how to run it, what was published for it, and where.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

from trainer.config import Config, override
from trainer.shared.errors import UserError, nearest


def demo() -> Config:
    """A ResNet-18 of a quarter's width on crops of 19 photographs, small enough for two cores.

    Command: sogclr run --preset demo
    Published: none; docs/results.md has what it measures here
    Source: this project
    """
    return Config(
        image_size=32,
        crop_min_area=0.2,
        color_jitter_strength=0.5,
        blur=False,
        depth=18,
        width_multiplier=0.25,
        cifar_stem=True,
        temperature=0.3,
        epochs=16,
        global_batch_size=128,
        warmup_epochs=1,
        optimizer="momentum",
        base_learning_rate=0.03,
        learning_rate_scaling="linear",
        weight_decay=1e-4,
        log_every_steps=20,
        checkpoint_every_epochs=10,
    )


def _cifar10_small(method: str) -> Config:
    """The recipe of CIFAR-10 with a ResNet-18 of a quarter's width, for two cores."""
    return replace(
        _cifar10(method),
        depth=18,
        width_multiplier=0.25,
        optimizer="momentum",
        base_learning_rate=0.03,
        warmup_epochs=1.0,
        global_batch_size=128,
        epochs=40,
        cache=True,
    )


def sogclr_cifar10_r18w025_b128() -> Config:
    """SogCLR on CIFAR-10, a ResNet-18 of a quarter's width, 40 epochs: sized for a CPU.

    Command: sogclr run --preset sogclr_cifar10_r18w025_b128 --raw DIR
    Published: none
    Source: this project
    """
    return _cifar10_small("sogclr")


def simclr_cifar10_r18w025_b128() -> Config:
    """SimCLR on CIFAR-10, a ResNet-18 of a quarter's width, 40 epochs: sized for a CPU.

    Command: sogclr run --preset simclr_cifar10_r18w025_b128 --raw DIR
    Published: none
    Source: this project
    """
    return _cifar10_small("simclr")


_LOSSES: dict[str, Literal["global_contrastive", "nt_xent"]] = {"sogclr": "global_contrastive", "simclr": "nt_xent"}
_TITLES = {"sogclr": "SogCLR", "simclr": "SimCLR"}
_PAPER = "Yuan et al. 2022 (arXiv 2202.12387)"
_FIGURE = f"{_PAPER}; figure in the README of the official code, read to +-0.1"
_IMAGENET = {
    128: {"simclr": 64.5, "sogclr": 67.8},
    256: {"simclr": 66.5, "sogclr": 69.3},
    512: {"simclr": 67.4, "sogclr": 69.5},
    1024: {"simclr": 68.3, "sogclr": 69.4},
    2048: {"simclr": 68.8, "sogclr": 69.3},
    4096: {"simclr": 69.1, "sogclr": 69.4},
    8192: {"simclr": 69.1, "sogclr": 69.1},
}
"""Linear top-1 in per cent, by global batch size and method."""


def _imagenet(method: str, batch: int) -> Config:
    return Config(loss=_LOSSES[method], global_batch_size=batch, precision="bfloat16")


def _imagenet_s(method: str) -> Config:
    return Config(loss=_LOSSES[method], global_batch_size=256, epochs=400, precision="bfloat16")


def _cifar10(method: str) -> Config:
    # Jitter at half strength, without blur: SimCLR's appendix B.9. The rest is the official CIFAR branch.
    return Config(
        loss=_LOSSES[method],
        image_size=32,
        cifar_stem=True,
        color_jitter_strength=0.5,
        blur=False,
        temperature=0.3,
        base_learning_rate=1.0,
        learning_rate_scaling="linear",
        weight_decay=1e-4,
        global_batch_size=64,
        epochs=400,
    )


def _published(name: str, make: Callable[[], Config], summary: str, published: str, source: str) -> Callable[[], Config]:
    """Returns `make` as the preset `name`, with its docstring."""

    def preset() -> Config:
        return make()

    preset.__name__ = preset.__qualname__ = name
    preset.__doc__ = f"{summary}\n\nCommand: sogclr run --preset {name} --raw DIR\nPublished: {published}\nSource: {source}\n"
    return preset


def _all() -> Iterator[Callable[[], Config]]:
    yield demo
    for batch, results in _IMAGENET.items():
        for method, accuracy in results.items():
            yield _published(
                f"{method}_imagenet_r50_b{batch}",
                partial(_imagenet, method, batch),
                f"{_TITLES[method]} on ImageNet-1K, ResNet-50, 800 epochs.",
                f"{accuracy} linear top-1",
                _FIGURE,
            )
    for method, result in {"sogclr": "78.7 linear top-1 (TensorFlow), 80.0 (PyTorch)", "simclr": "76.1 linear top-1"}.items():
        yield _published(
            f"{method}_imagenet_s_r50_b256",
            partial(_imagenet_s, method),
            f"{_TITLES[method]} on ImageNet-S (the first 100 synsets), ResNet-50, 400 epochs.",
            result,
            f"{_PAPER} and the README of the official code",
        )
    for method, accuracy in {"sogclr": 91.78, "simclr": 90.66}.items():
        yield _published(
            f"{method}_cifar10_r50_b64",
            partial(_cifar10, method),
            f"{_TITLES[method]} on CIFAR-10, ResNet-50 with the stem for small images, 400 epochs.",
            f"{accuracy} linear top-1",
            "README of the official code, CIFAR branch",
        )
    yield sogclr_cifar10_r18w025_b128
    yield simclr_cifar10_r18w025_b128


PRESETS: dict[str, Callable[[], Config]] = {preset.__name__: preset for preset in _all()}


def resolve(preset: str, overrides: Iterable[str] = ()) -> Config:
    """Returns the config of `preset` with `overrides` ("key=value") in place. Raises UserError for what it cannot use."""
    if preset not in PRESETS:
        raise UserError(f"there is no preset {preset}{nearest(preset, PRESETS)}; sogclr presets lists them")
    return override(PRESETS[preset](), overrides)


def describe(preset: str) -> dict[str, str]:
    """Returns the parts of a preset's docstring: `name`, `summary`, `command`, `published`, `source`."""
    summary, _, rest = inspect.cleandoc(PRESETS[preset].__doc__ or "").partition("\n\n")
    labelled = dict(line.split(": ", 1) for line in rest.splitlines())
    return {
        "name": preset,
        "summary": summary,
        "command": labelled["Command"],
        "published": labelled["Published"],
        "source": labelled["Source"],
    }
