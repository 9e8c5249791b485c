"""Checkpoints of VISSL's SimCLR. Its projection head has no batch normalisation, so it is left out.

Source: https://github.com/facebookresearch/vissl, vissl/models/base_ssl_model.py.
"""

from collections.abc import Sequence

from trainer.importing.format import Place
from trainer.importing.formats.torchvision import PyTorchFormat, sequential
from trainer.importing.source import Source

_MODEL = "classy_state_dict.base_model.model."


class VISSL(PyTorchFormat):
    name = "VISSL"
    encoders = (
        f"{_MODEL}trunk._feature_blocks.",
        f"{_MODEL}trunk.base_model._feature_blocks.",
        "model_state_dict._feature_blocks.",
        "_feature_blocks.",
    )

    def projection(self, source: Source) -> Sequence[Place]:
        return sequential(source, f"{_MODEL}heads.0.clf.")

    def passed_over(self, name: str) -> str:
        if name.startswith("classy_state_dict.") and not name.startswith(f"{_MODEL}trunk."):
            return "state of the training loop and of heads"
        return super().passed_over(name)
