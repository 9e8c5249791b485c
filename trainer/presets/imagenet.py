"""The paper's runs on ImageNet-1K and on ImageNet-S (its first 100 synsets).

The settings are those of the official TensorFlow code. Convolutions compute in bfloat16, TPUs' fastest type; the rest is float32.
"""

import dataclasses

from trainer.config import Config, replace
from trainer.presets.preset import Preset
from trainer.shared.data import DataSettings

_PAPER = "Yuan et al. 2022 (arXiv 2202.12387)"
_FIGURE = f"{_PAPER}; figure in the README of the official code, read to +-0.1"
_README = f"{_PAPER} and the README of the official code"

IMAGENET = replace(
    Config(data=DataSettings(expect="imagenet")),
    # Views
    image_size=224,
    crop_min_area=0.08,
    color_jitter_strength=1.0,
    blur=True,
    # Encoder and heads
    depth=50,
    projection_layers=2,
    projection_dim=128,
    precision="bfloat16",
    # Loss
    loss="global_contrastive",
    variant="paper",
    temperature=0.1,
    gamma=0.9,
    # Optimizer
    optimizer="lars",
    epochs=800,
    global_batch_size=512,
    base_learning_rate=0.075,
    learning_rate_scaling="sqrt",
    warmup_epochs=10.0,
    weight_decay=1e-6,
)
"""SogCLR on ImageNet-1K at a global batch of 512."""

IMAGENET_S = replace(dataclasses.replace(IMAGENET, data=DataSettings(subset="imagenet_s")), epochs=400, global_batch_size=256)
"""SogCLR on ImageNet-S."""

PRESETS = (
    Preset(
        name="simclr_imagenet_r50_b128",
        summary="SimCLR on ImageNet-1K, ResNet-50, 800 epochs.",
        command="sogclr run --preset simclr_imagenet_r50_b128 --raw DIR",
        published="64.5 linear top-1",
        source=_FIGURE,
        cost="reckoned by sogclr plan for sogclr_imagenet_r50_b128: 51 hours, $490, on a v5e-8",
        config=replace(IMAGENET, loss="nt_xent", global_batch_size=128),
    ),
    Preset(
        name="sogclr_imagenet_r50_b128",
        summary="SogCLR on ImageNet-1K, ResNet-50, 800 epochs.",
        command="sogclr run --preset sogclr_imagenet_r50_b128 --raw DIR",
        published="67.8 linear top-1",
        source=_FIGURE,
        cost="reckoned by sogclr plan: 51 hours, $490, on a v5e-8",
        config=replace(IMAGENET, loss="global_contrastive", global_batch_size=128),
    ),
    Preset(
        name="simclr_imagenet_r50_b256",
        summary="SimCLR on ImageNet-1K, ResNet-50, 800 epochs.",
        command="sogclr run --preset simclr_imagenet_r50_b256 --raw DIR",
        published="66.5 linear top-1",
        source=_FIGURE,
        cost="reckoned by sogclr plan for sogclr_imagenet_r50_b256: 39 hours, $379, on a v5e-8",
        config=replace(IMAGENET, loss="nt_xent", global_batch_size=256),
    ),
    Preset(
        name="sogclr_imagenet_r50_b256",
        summary="SogCLR on ImageNet-1K, ResNet-50, 800 epochs.",
        command="sogclr run --preset sogclr_imagenet_r50_b256 --raw DIR",
        published="69.3 linear top-1",
        source=_FIGURE,
        cost="reckoned by sogclr plan: 39 hours, $379, on a v5e-8",
        config=replace(IMAGENET, loss="global_contrastive", global_batch_size=256),
    ),
    Preset(
        name="simclr_imagenet_r50_b512",
        summary="SimCLR on ImageNet-1K, ResNet-50, 800 epochs.",
        command="sogclr run --preset simclr_imagenet_r50_b512 --raw DIR",
        published="67.4 linear top-1",
        source=_FIGURE,
        cost="reckoned by sogclr plan for sogclr_imagenet_r50_b512: 29 hours, $283, on a v5e-8",
        config=replace(IMAGENET, loss="nt_xent", global_batch_size=512),
    ),
    Preset(
        name="sogclr_imagenet_r50_b512",
        summary="SogCLR on ImageNet-1K, ResNet-50, 800 epochs.",
        command="sogclr run --preset sogclr_imagenet_r50_b512 --raw DIR",
        published="69.5 linear top-1",
        source=_FIGURE,
        cost="reckoned by sogclr plan: 29 hours, $283, on a v5e-8",
        config=replace(IMAGENET, loss="global_contrastive", global_batch_size=512),
    ),
    Preset(
        name="simclr_imagenet_r50_b1024",
        summary="SimCLR on ImageNet-1K, ResNet-50, 800 epochs.",
        command="sogclr run --preset simclr_imagenet_r50_b1024 --raw DIR",
        published="68.3 linear top-1",
        source=_FIGURE,
        cost="reckoned by sogclr plan for sogclr_imagenet_r50_b1024: 26 hours, $245, on a v5e-8",
        config=replace(IMAGENET, loss="nt_xent", global_batch_size=1024),
    ),
    Preset(
        name="sogclr_imagenet_r50_b1024",
        summary="SogCLR on ImageNet-1K, ResNet-50, 800 epochs.",
        command="sogclr run --preset sogclr_imagenet_r50_b1024 --raw DIR",
        published="69.4 linear top-1",
        source=_FIGURE,
        cost="reckoned by sogclr plan: 26 hours, $245, on a v5e-8",
        config=replace(IMAGENET, loss="global_contrastive", global_batch_size=1024),
    ),
    Preset(
        name="simclr_imagenet_r50_b2048",
        summary="SimCLR on ImageNet-1K, ResNet-50, 800 epochs.",
        command="sogclr run --preset simclr_imagenet_r50_b2048 --raw DIR",
        published="68.8 linear top-1",
        source=_FIGURE,
        cost="reckoned by sogclr plan for sogclr_imagenet_r50_b2048: 22 hours, $210, on a v5e-8",
        config=replace(IMAGENET, loss="nt_xent", global_batch_size=2048),
    ),
    Preset(
        name="sogclr_imagenet_r50_b2048",
        summary="SogCLR on ImageNet-1K, ResNet-50, 800 epochs.",
        command="sogclr run --preset sogclr_imagenet_r50_b2048 --raw DIR",
        published="69.3 linear top-1",
        source=_FIGURE,
        cost="reckoned by sogclr plan: 22 hours, $210, on a v5e-8",
        config=replace(IMAGENET, loss="global_contrastive", global_batch_size=2048),
    ),
    Preset(
        name="simclr_imagenet_r50_b4096",
        summary="SimCLR on ImageNet-1K, ResNet-50, 800 epochs.",
        command="sogclr run --preset simclr_imagenet_r50_b4096 --raw DIR",
        published="69.1 linear top-1",
        source=_FIGURE,
        cost="reckoned by sogclr plan for sogclr_imagenet_r50_b4096: 22 hours, $213, on a v5e-8",
        config=replace(IMAGENET, loss="nt_xent", global_batch_size=4096),
    ),
    Preset(
        name="sogclr_imagenet_r50_b4096",
        summary="SogCLR on ImageNet-1K, ResNet-50, 800 epochs.",
        command="sogclr run --preset sogclr_imagenet_r50_b4096 --raw DIR",
        published="69.4 linear top-1",
        source=_FIGURE,
        cost="reckoned by sogclr plan: 22 hours, $213, on a v5e-8",
        config=replace(IMAGENET, loss="global_contrastive", global_batch_size=4096),
    ),
    Preset(
        name="simclr_imagenet_r50_b8192",
        summary="SimCLR on ImageNet-1K, ResNet-50, 800 epochs.",
        command="sogclr run --preset simclr_imagenet_r50_b8192 --raw DIR",
        published="69.1 linear top-1",
        source=_FIGURE,
        cost="reckoned by sogclr plan for sogclr_imagenet_r50_b8192: 5 hours, $211, on a v5e-32",
        config=replace(IMAGENET, loss="nt_xent", global_batch_size=8192),
    ),
    Preset(
        name="sogclr_imagenet_r50_b8192",
        summary="SogCLR on ImageNet-1K, ResNet-50, 800 epochs.",
        command="sogclr run --preset sogclr_imagenet_r50_b8192 --raw DIR",
        published="69.1 linear top-1",
        source=_FIGURE,
        cost="reckoned by sogclr plan: 5 hours, $211, on a v5e-32",
        config=replace(IMAGENET, loss="global_contrastive", global_batch_size=8192),
    ),
    Preset(
        name="sogclr_imagenet_s_r50_b256",
        summary="SogCLR on ImageNet-S (the first 100 synsets), ResNet-50, 400 epochs.",
        command="sogclr run --preset sogclr_imagenet_s_r50_b256 --raw DIR",
        published="78.7 linear top-1 (TensorFlow), 80.0 (PyTorch)",
        source=_README,
        cost="reckoned by sogclr plan: 2.0 hours, $19, on a v5e-8",
        config=replace(IMAGENET_S, loss="global_contrastive"),
    ),
    Preset(
        name="simclr_imagenet_s_r50_b256",
        summary="SimCLR on ImageNet-S (the first 100 synsets), ResNet-50, 400 epochs.",
        command="sogclr run --preset simclr_imagenet_s_r50_b256 --raw DIR",
        published="76.1 linear top-1",
        source=_README,
        cost="reckoned by sogclr plan for sogclr_imagenet_s_r50_b256: 2.0 hours, $19, on a v5e-8",
        config=replace(IMAGENET_S, loss="nt_xent"),
    ),
)
