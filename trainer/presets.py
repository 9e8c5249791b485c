"""The experiments there are, each a function that returns its `Config`.

A preset is named METHOD_DATASET_ENCODER_bBATCH. Its docstring says how to run it, what was published for it, and where.
"""

import inspect
from collections.abc import Callable, Iterable

from trainer.config import Config, nearest, override
from trainer.records import UserError


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
        epochs=40,
        global_batch_size=128,
        warmup_epochs=1,
        optimizer="momentum",
        base_learning_rate=0.03,
        learning_rate_scaling="linear",
        weight_decay=1e-4,
        log_every_steps=20,
        checkpoint_every_epochs=10,
    )


def sogclr_imagenet_r50_b512() -> Config:
    """SogCLR on ImageNet-1K, ResNet-50, 800 epochs.

    Command: sogclr run --preset sogclr_imagenet_r50_b512 --raw DIR
    Published: 69.5 linear top-1
    Source: Yuan et al. 2022 (arXiv 2202.12387); figure in the README of the official code, read to +-0.1
    """
    return Config(global_batch_size=512)


def simclr_imagenet_r50_b512() -> Config:
    """SimCLR on ImageNet-1K, ResNet-50, 800 epochs: the same recipe with NT-Xent.

    Command: sogclr run --preset simclr_imagenet_r50_b512 --raw DIR
    Published: 67.4 linear top-1
    Source: Yuan et al. 2022 (arXiv 2202.12387); figure in the README of the official code, read to +-0.1
    """
    return Config(global_batch_size=512, loss="nt_xent")


def sogclr_imagenet_s_r50_b256() -> Config:
    """SogCLR on ImageNet-S (the first 100 synsets), ResNet-50, 400 epochs.

    Command: sogclr run --preset sogclr_imagenet_s_r50_b256 --raw DIR
    Published: 78.7 linear top-1 (TensorFlow), 80.0 (PyTorch)
    Source: Yuan et al. 2022 (arXiv 2202.12387) and the README of the official code
    """
    return Config(global_batch_size=256, epochs=400)


def simclr_imagenet_s_r50_b256() -> Config:
    """SimCLR on ImageNet-S (the first 100 synsets), ResNet-50, 400 epochs.

    Command: sogclr run --preset simclr_imagenet_s_r50_b256 --raw DIR
    Published: 76.1 linear top-1 (TensorFlow)
    Source: Yuan et al. 2022 (arXiv 2202.12387) and the README of the official code
    """
    return Config(global_batch_size=256, epochs=400, loss="nt_xent")


PRESETS: dict[str, Callable[[], Config]] = {
    function.__name__: function
    for function in (
        demo,
        sogclr_imagenet_r50_b512,
        simclr_imagenet_r50_b512,
        sogclr_imagenet_s_r50_b256,
        simclr_imagenet_s_r50_b256,
    )
}


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
