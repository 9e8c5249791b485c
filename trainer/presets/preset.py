"""What a preset is."""

from dataclasses import dataclass

from trainer.config import Config


@dataclass(frozen=True)
class Preset:
    """An experiment that anyone can run again. `name` is METHOD_DATASET_ENCODER_bBATCH."""

    name: str
    summary: str
    command: str
    """How to run it; DIR is the folder of the raw data."""
    published: str
    """What others measured with these settings."""
    source: str
    """Where that is published."""
    cost: str
    """What a run takes: measured, or reckoned where it says so."""
    config: Config
