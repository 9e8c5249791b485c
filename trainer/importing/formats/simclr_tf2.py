"""Checkpoints of SimCLR's and SogCLR's code in TensorFlow 2: names are the paths of the objects that hold the variables.

Source: https://github.com/google-research/simclr, tf2/resnet.py and tf2/model.py.
"""

import re
from collections.abc import Sequence

from trainer.importing.format import NORM, Format, Place, counted
from trainer.importing.network import Layer
from trainer.importing.source import Source

_RESNET = "model/resnet_model/"
_HEAD = "model/_projection_head/linear_layers/{}/"
_BOTTLENECK = {"conv1": 0, "conv2": 3, "conv3": 6}
"""Number of a convolution in the list of a bottleneck block's layers. Its batch normalisation is the next."""


class SimCLRTF2(Format):
    name = "SimCLR or SogCLR, TensorFlow 2"

    def recognises(self, source: Source) -> bool:
        return any(name.startswith(f"{_RESNET}initial_conv_relu_max_pool/") for name in source.arrays)

    def encoder(self, source: Source, layers: Sequence[Layer]) -> Sequence[Place]:
        selective = any(layer.role == "squeeze" for layer in layers)
        bottleneck = any(layer.role == "conv3" and layer.group for layer in layers)
        return [_place(layer, selective, bottleneck) for layer in layers]

    def kernels(self, source: Source) -> int:
        return sum(name.startswith(_RESNET) and name.endswith("/kernel") for name in source.arrays)

    def projection(self, source: Source) -> Sequence[Place]:
        found = counted(source, f"{_HEAD}dense/kernel")
        return [_head(source, _HEAD.format(number)) for number in range(found)]

    def classifier(self, source: Source) -> Place | None:
        kernel = "model/supervised_head/linear_layer/dense/kernel"
        return Place(kernel, bias=kernel.replace("kernel", "bias")) if kernel in source.arrays else None

    def step(self, source: Source) -> int:
        return int(source.value("global_step")) if "global_step" in source.arrays else 0

    def passed_over(self, name: str) -> str:
        if "/.OPTIMIZER_SLOT/" in name or name.startswith("optimizer/"):
            return "state of the optimizer"
        return "step counter" if re.fullmatch("global_step|save_counter", name) else ""


def _head(source: Source, place: str) -> Place:
    norm = {one: f"{place}bn_relu/bn/{one}" for one in NORM}
    return Place(f"{place}dense/kernel", {one: name for one, name in norm.items() if name in source.arrays})


def _place(layer: Layer, selective: bool, bottleneck: bool) -> Place:
    conv, norm = _paths(layer, selective, bottleneck)
    return Place(f"{_RESNET}{conv}/kernel", {one: f"{_RESNET}{norm}/{one}" for one in NORM} if layer.norm else {})


def _paths(layer: Layer, selective: bool, bottleneck: bool) -> tuple[str, str]:
    """Returns the paths of a layer's convolution and of its batch normalisation."""
    if not layer.group:
        conv, norm = {"conv": (0, 2), "conv1": (0, 1), "conv2": (2, 3), "conv3": (4, 6)}[layer.role]
        return f"initial_conv_relu_max_pool/{conv}/conv2d", f"initial_conv_relu_max_pool/{norm}/bn"
    block = f"block_groups/{layer.group - 1}/layers/{layer.block}/"
    if layer.role == "shortcut":
        # Selective kernels come with ResNet-D's shortcut: padding and a pool, or at stride 1 the pool alone, come before.
        number = 0 if not selective else 1 if layer.group == 1 else 2
        inner = block + ("projection_layers/" if bottleneck else "shortcut_layers/")
        return f"{inner}{number}/conv2d", f"{inner}{number + 1}/bn"
    if not bottleneck:
        number = {"conv1": 0, "conv2": 2}[layer.role]
        return f"{block}conv2d_bn_layers/{number}/conv2d", f"{block}conv2d_bn_layers/{number + 1}/bn"
    inner = f"{block}conv_relu_dropblock_layers/"
    kernel = f"{inner}3/"
    match layer.role:
        case "conv2" if selective:
            return f"{kernel}conv2d_fixed_padding/conv2d", f"{kernel}batch_norm_relu/bn"
        case "squeeze":
            return f"{kernel}conv2d_0", f"{kernel}batch_norm_relu_1/bn"
        case "attend":
            return f"{kernel}conv2d_1", ""
        case "conv3" if selective:
            return f"{inner}5/conv2d", f"{inner}6/bn"
    number = _BOTTLENECK[layer.role]
    return f"{inner}{number}/conv2d", f"{inner}{number + 1}/bn"
