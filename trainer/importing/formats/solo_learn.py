"""Checkpoints of solo-learn's SimCLR. Its projection head has no batch normalisation, so it is left out.

Source: https://github.com/vturrisi/solo-learn, solo/methods/base.py and simclr.py.
"""

from collections.abc import Sequence

from trainer.importing.format import Place
from trainer.importing.formats.torchvision import PyTorchFormat, sequential
from trainer.importing.source import Source
from trainer.shared.errors import UserError


class SoloLearn(PyTorchFormat):
    name = "solo-learn"
    encoders = ("state_dict.backbone.", "state_dict.encoder.")

    def recognises(self, source: Source) -> bool:
        prefix = self.prefix(source)
        if prefix is None or not ("encoder" in prefix or any(name.startswith("state_dict.projector.") for name in source.arrays)):
            return False
        if source.shape(f"{prefix}conv1.weight")[2:] == (3, 3):  # type: ignore[index]
            raise UserError(
                f"{source.path} is solo-learn's network for small images: its first convolution pads by 2 pixels, which this "
                "project's does not; take a checkpoint that was trained on ImageNet"
            )
        return True

    def projection(self, source: Source) -> Sequence[Place]:
        return sequential(source, "state_dict.projector.")

    def classifier(self, source: Source) -> Place | None:
        kernel = "state_dict.classifier.weight"
        return Place(kernel, bias="state_dict.classifier.bias") if kernel in source.arrays else None

    def passed_over(self, name: str) -> str:
        if name.startswith(("state_dict.momentum_", "state_dict.predictor.", "state_dict.queue")):
            return "part of another method than SimCLR"
        return super().passed_over(name)
