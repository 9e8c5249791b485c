"""The demo: a first run in minutes, on pictures from installed packages."""

from trainer.config import Config, replace
from trainer.presets.preset import Preset

PRESETS = (
    Preset(
        name="demo",
        summary="ResNet-18 of a quarter of the usual width on crops of 19 photographs, small enough for two cores.",
        command="sogclr run --preset demo",
        published="none; docs/results.md has our measurements",
        source="this project",
        cost="about five minutes on two cores",
        config=replace(
            Config(),
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
        ),
    ),
)
