"""Checkpoints of MoCo v3's ResNets: the encoder, its copy that follows it slowly, and a predictor on the projection head.

Source: https://github.com/facebookresearch/moco-v3.
"""

from typing import Any

from trainer.importing.formats.sogclr_pytorch import SogCLRPyTorch
from trainer.importing.formats.torchvision import PyTorchFormat
from trainer.importing.source import Source


class MoCoV3(SogCLRPyTorch):
    name = "MoCo v3"

    def settings(self, source: Source) -> dict[str, Any]:
        return PyTorchFormat.settings(self, source)

    def recognises(self, source: Source) -> bool:
        return super().recognises(source) and any(".momentum_encoder." in f".{name}" for name in source.arrays)

    def u(self, source: Source) -> str:
        return ""

    def passed_over(self, name: str) -> str:
        if ".momentum_encoder." in f".{name}":
            return "copy of the encoder that follows it slowly"
        return "predictor of MoCo" if ".predictor." in f".{name}" else super().passed_over(name)
