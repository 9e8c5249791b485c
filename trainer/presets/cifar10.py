"""CIFAR-10: the recipe of the official code's CIFAR branch, and a smaller encoder for machines without an accelerator."""

from trainer.config import Config, replace
from trainer.presets.preset import Preset
from trainer.shared.data import DataSettings

_BRANCH = "README of the official code, CIFAR branch"

CIFAR10 = replace(
    Config(data=DataSettings(expect="cifar10")),
    # Views: jitter at half strength, without blur (Chen et al. 2020, appendix B.9)
    image_size=32,
    color_jitter_strength=0.5,
    blur=False,
    # Encoder and heads
    depth=50,
    cifar_stem=True,
    # Loss
    loss="global_contrastive",
    temperature=0.3,
    # Optimizer
    optimizer="lars",
    epochs=400,
    global_batch_size=64,
    base_learning_rate=1.0,
    learning_rate_scaling="linear",
    weight_decay=1e-4,
)
"""SogCLR on CIFAR-10, as the official code runs it."""

CIFAR10_SMALL = replace(
    CIFAR10,
    depth=18,
    width_multiplier=0.25,
    optimizer="momentum",
    epochs=40,
    global_batch_size=128,
    base_learning_rate=0.03,
    warmup_epochs=1.0,
    cache=True,
)
"""SogCLR on CIFAR-10 with a ResNet-18 of a quarter of the usual width, for two cores."""

PRESETS = (
    Preset(
        name="sogclr_cifar10_r50_b64",
        summary="SogCLR on CIFAR-10, ResNet-50 with the stem for small images, 400 epochs.",
        command="sogclr run --preset sogclr_cifar10_r50_b64 --raw DIR",
        published="91.78 linear top-1",
        source=_BRANCH,
        cost="reckoned by sogclr plan: 2.6 hours, $3, on a v5e-1",
        config=replace(CIFAR10, loss="global_contrastive"),
    ),
    Preset(
        name="simclr_cifar10_r50_b64",
        summary="SimCLR on CIFAR-10, ResNet-50 with the stem for small images, 400 epochs.",
        command="sogclr run --preset simclr_cifar10_r50_b64 --raw DIR",
        published="90.66 linear top-1",
        source=_BRANCH,
        cost="reckoned by sogclr plan for sogclr_cifar10_r50_b64: 2.6 hours, $3, on a v5e-1",
        config=replace(CIFAR10, loss="nt_xent"),
    ),
    Preset(
        name="sogclr_cifar10_r18w025_b128",
        summary="SogCLR on CIFAR-10, ResNet-18 of a quarter of the usual width, 40 epochs: sized for a CPU.",
        command="sogclr run --preset sogclr_cifar10_r18w025_b128 --raw DIR",
        published="none",
        source="this project",
        cost="not measured yet: sogclr plan --preset sogclr_cifar10_r18w025_b128 --accelerator cpu",
        config=replace(CIFAR10_SMALL, loss="global_contrastive"),
    ),
    Preset(
        name="simclr_cifar10_r18w025_b128",
        summary="SimCLR on CIFAR-10, ResNet-18 of a quarter of the usual width, 40 epochs: sized for a CPU.",
        command="sogclr run --preset simclr_cifar10_r18w025_b128 --raw DIR",
        published="none",
        source="this project",
        cost="not measured yet: sogclr plan --preset simclr_cifar10_r18w025_b128 --accelerator cpu",
        config=replace(CIFAR10_SMALL, loss="nt_xent"),
    ),
)
