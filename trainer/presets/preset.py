"""The type of a preset."""

from dataclasses import dataclass

from trainer.config import Config
from trainer.shared.data import as_overrides


@dataclass(frozen=True)
class Preset:
    """A reproducible experiment. `name` is METHOD_DATASET_ENCODER_bBATCH."""

    name: str
    summary: str
    command: str
    """Command line that runs the experiment; DIR is the folder of the raw data."""
    published: str
    """Published accuracy of these settings."""
    source: str
    """Publication that reports `published`."""
    cost: str
    """Duration and price of a run. "reckoned" marks an estimate of `sogclr plan`; all other numbers are measured."""
    config: Config

    @property
    def data(self) -> str:
        """The dataset that the preset is for, and its settings of the conversion, in words."""
        data = self.config.data
        counts = ""
        if known := data.dataset:
            images = " and ".join(f"{count:,} {split}" for split, count in known.images.items())
            counts = f"{known.title}, {known.classes:,} classes, {images} images: "
        return counts + (" ".join(as_overrides(data)) or "any")
