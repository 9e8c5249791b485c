"""Checkpoints of lightly's SimCLR. Its examples number the encoder's layers: 0 is conv1, 1 is bn1, 4 to 7 are layer1 to layer4.

Source: https://github.com/lightly-ai/lightly, examples and lightly/models/modules/heads.py.
"""

import re
from collections.abc import Sequence

from trainer.importing.format import Place
from trainer.importing.formats.torchvision import PyTorchFormat, sequential
from trainer.importing.source import Source

_NUMBERED = "#"
"""Marks a prefix whose layers are numbered."""


class Lightly(PyTorchFormat):
    name = "lightly"
    encoders = tuple(
        f"{outer}{inner}backbone.{marked}"
        for outer in ("state_dict.", "")
        for inner in ("", "model.")
        for marked in ("", _NUMBERED)
    )

    def named(self, prefix: str, name: str) -> str:
        if not prefix.endswith(_NUMBERED):
            return prefix + name
        numbers = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
        first, _, rest = name.partition(".")
        return f"{prefix.removesuffix(_NUMBERED)}{numbers.get(first, first)}.{rest}"

    def kernels(self, source: Source) -> int:
        prefix = (self.prefix(source) or "").removesuffix(_NUMBERED)
        return sum(name.startswith(prefix) and len(one.shape) == 4 for name, one in source.arrays.items())

    def projection(self, source: Source) -> Sequence[Place]:
        return sequential(source, f"{self._outer(source)}projection_head.layers.")

    def classifier(self, source: Source) -> Place | None:
        kernel = f"{self._outer(source)}online_classifier.classification_head.weight"
        return Place(kernel, bias=kernel.replace("weight", "bias")) if kernel in source.arrays else None

    def passed_over(self, name: str) -> str:
        if re.search(r"backbone\.fc\.", name):
            return "classifier that the encoder began with"
        return super().passed_over(name)

    def _outer(self, source: Source) -> str:
        return (self.prefix(source) or "").partition("backbone.")[0]
