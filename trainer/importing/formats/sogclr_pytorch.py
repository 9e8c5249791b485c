"""Checkpoints of SogCLR's code in PyTorch, which follows MoCo v3's: with the moving averages u, one longer than the dataset.

Source: https://github.com/Optimization-AI/SogCLR, branch PyTorch.
"""

from collections.abc import Sequence
from typing import Any

from trainer.importing.format import Place
from trainer.importing.formats.torchvision import PyTorchFormat, sequential
from trainer.importing.source import Source


class SogCLRPyTorch(PyTorchFormat):
    name = "SogCLR, PyTorch"
    encoders = ("state_dict.module.base_encoder.", "state_dict.base_encoder.", "module.base_encoder.", "base_encoder.")

    def settings(self, source: Source) -> dict[str, Any]:
        return {**super().settings(source), "loss": "global_contrastive", "variant": "pt_official"}

    def projection(self, source: Source) -> Sequence[Place]:
        return sequential(source, f"{self.prefix(source)}fc.")

    def u(self, source: Source) -> str:
        return "u" if "u" in source.arrays else ""
