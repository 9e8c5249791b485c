"""The file encoder.safetensors of this project's own exports. Its metadata describe the encoder."""

import json
from typing import Any

from trainer.importing.formats.torchvision import PyTorchFormat
from trainer.importing.source import Source


class Exported(PyTorchFormat):
    name = "an export of this project, encoder.safetensors"
    encoders = ("",)

    def settings(self, source: Source) -> dict[str, Any]:
        about = json.loads(source.about["encoder"])
        size = {"image_size": int(source.about["image_size"])} if "image_size" in source.about else {}
        return {key: about[key] for key in ("pool_padding", "input_normalization")} | size

    def recognises(self, source: Source) -> bool:
        return "encoder" in source.about and super().recognises(source)
