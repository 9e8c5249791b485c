"""Published encoders on ImageNet-1K, to import and evaluate: `sogclr import CHECKPOINT --preset NAME` makes one comparable.

The settings are those that the authors pretrained with, as far as they publish them. docs/checkpoints.md says which files are
meant.
"""

from trainer.config import replace
from trainer.presets.imagenet import IMAGENET
from trainer.presets.preset import Preset

_SIMCLR = "Chen et al. 2020 (arXiv 2002.05709) and the README of the official code"
_SIMCLR_V2 = "Chen et al. 2020 (arXiv 2006.10029) and the README of the official code"
_SOGCLR_PYTORCH = "Yuan et al. 2022 (arXiv 2202.12387) and the README of the official PyTorch code"
_COST = "of an import: none; pretraining was not reckoned"

SIMCLR_V2 = replace(
    IMAGENET,
    projection_layers=3,
    precision="float32",
    loss="nt_xent",
    epochs=800,
    global_batch_size=4096,
    base_learning_rate=0.1,
    learning_rate_scaling="sqrt",
    weight_decay=1e-4,
)
"""SimCLRv2's ResNet-50 without selective kernels."""

PRESETS = (
    Preset(
        name="simclr_v1_imagenet_r50_b4096",
        summary="SimCLRv1's published ResNet-50, 1x width, 1000 epochs.",
        command="sogclr import CHECKPOINT --output DIR --preset simclr_v1_imagenet_r50_b4096",
        published="69.1 linear top-1",
        source=_SIMCLR,
        cost=_COST,
        config=replace(
            IMAGENET,
            precision="float32",
            loss="nt_xent",
            epochs=1000,
            global_batch_size=4096,
            base_learning_rate=0.3,
            learning_rate_scaling="linear",
        ),
    ),
    Preset(
        name="simclr_v2_imagenet_r50_b4096",
        summary="SimCLRv2's published ResNet-50, 1x width, without selective kernels.",
        command="sogclr import CHECKPOINT --output DIR --preset simclr_v2_imagenet_r50_b4096",
        published="71.7 linear top-1",
        source=_SIMCLR_V2,
        cost=_COST,
        config=SIMCLR_V2,
    ),
    Preset(
        name="simclr_v2_imagenet_r50sk_b4096",
        summary="SimCLRv2's published ResNet-50, 1x width, with selective kernels.",
        command="sogclr import CHECKPOINT --output DIR --preset simclr_v2_imagenet_r50sk_b4096",
        published="74.6 linear top-1",
        source=_SIMCLR_V2,
        cost=_COST,
        config=replace(SIMCLR_V2, selective_kernel_ratio=0.0625),
    ),
    Preset(
        name="sogclr_pt_imagenet_r50_b256",
        summary="SogCLR's ResNet-50 of the official PyTorch code, 800 epochs.",
        command="sogclr import CHECKPOINT --output DIR --preset sogclr_pt_imagenet_r50_b256",
        published="69.0 linear top-1",
        source=_SOGCLR_PYTORCH,
        cost=_COST,
        config=replace(
            IMAGENET,
            pool_padding="torch",
            input_normalization="imagenet",
            precision="float32",
            variant="pt_official",
            global_batch_size=256,
        ),
    ),
)
