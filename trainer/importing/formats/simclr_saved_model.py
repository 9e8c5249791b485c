"""Variables of the SavedModel that SimCLR's code in TensorFlow 2 exports. Their names in the file are numbers.

The object graph in the file has their full names, which number layers in the order of their creation, as TensorFlow 1 does.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

from trainer.importing.format import NORM, Format, Place
from trainer.importing.formats.simclr_tf1 import in_order_of_computation
from trainer.importing.network import Layer
from trainer.importing.source import Source

_LAYER = re.compile(
    r"(?P<model>resnet|projection_head|head_supervised)/.*?(?P<kind>conv2d|batch_normalization|dense)(_(?P<number>\d+))?/(?P<array>\w+)"
)


class SimCLRSavedModel(Format):
    name = "SimCLR, TensorFlow 2, SavedModel"

    def recognises(self, source: Source) -> bool:
        return "trainable_variables_list/0" in source.arrays and any(name.startswith("resnet/") for name in source.full_names)

    def encoder(self, source: Source, layers: Sequence[Layer]) -> Sequence[Place]:
        named = _named(source, "resnet")
        return [
            Place(named.get(place.kernel, place.kernel), {one: named.get(name, name) for one, name in place.norm.items()})
            for place in in_order_of_computation(layers, "{}/{}")
        ]

    def kernels(self, source: Source) -> int:
        return sum(name.endswith("/kernel") for name in _named(source, "resnet"))

    def projection(self, source: Source) -> Sequence[Place]:
        return list(_dense(_named(source, "projection_head")))

    def classifier(self, source: Source) -> Place | None:
        return next(_dense(_named(source, "head_supervised")), None)


def _dense(named: Mapping[str, str]) -> Iterator[Place]:
    """Yields the places of the dense layers of a head."""
    for number, dense in enumerate(sorted(name for name in named if re.fullmatch(r"dense(_\d+)?/kernel", name))):
        norm = f"batch_normalization{f'_{number}' if number else ''}"
        found = {one: named[f"{norm}/{one}"] for one in NORM if f"{norm}/{one}" in named}
        yield Place(named[dense], found, named.get(dense.replace("kernel", "bias"), ""))


def _named(source: Source, model: str) -> dict[str, str]:
    """Returns the array of each variable of a model, by KIND_NUMBER/ARRAY. Numbers begin with the model's first layer."""
    found = [
        (match, name) for full, name in source.full_names.items() if (match := _LAYER.fullmatch(full)) and match["model"] == model
    ]
    numbers: dict[str, list[int]] = {}
    for match, _ in found:
        numbers.setdefault(match["kind"], []).append(int(match["number"] or 0))
    ranks = {kind: sorted(set(of_kind)) for kind, of_kind in numbers.items()}
    named = {}
    for match, name in found:
        rank = ranks[match["kind"]].index(int(match["number"] or 0))
        named[f"{match['kind']}{f'_{rank}' if rank else ''}/{match['array']}"] = name
    return named
