"""Translates a checkpoint of other code: its arrays under this project's names, and the settings of its encoder."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.importing.format import Format, Place
from trainer.importing.formats import FORMATS
from trainer.importing.network import Layer, Match, best_match, layers
from trainer.importing.source import TAKEN, Source
from trainer.settings import EncoderSettings
from trainer.shared.errors import UserError

_EPSILON = 1e-5
"""Of batch normalisation: added to the variance."""
_SHOWN = 3
"""Names that an error lists."""


@dataclass(frozen=True)
class Translation:
    """A checkpoint in terms of this project."""

    format: str
    encoder: EncoderSettings
    settings: Mapping[str, Any]
    """All settings that the checkpoint determines, by key; those of the encoder included."""
    arrays: Mapping[str, np.ndarray]
    """Arrays by their names in a checkpoint of this project."""
    step: int
    """Number of train steps behind the checkpoint; 0 if it is not known."""
    classes: int
    """Number of classes of its linear classifier; 0 if it has none."""
    mapped: int
    """Number of the checkpoint's arrays that were taken."""
    left_out: Mapping[str, int]
    """What was not taken, with the number of arrays."""
    u: np.ndarray | None
    """[N] float32: the moving averages by image ID, 0 where an image has not been seen; None if the checkpoint has none."""


def format_of(source: Source) -> Format:
    """Returns the format of a checkpoint. Raises UserError if no format has such names."""
    for one in FORMATS:
        if one.recognises(source):
            return one
    names = sorted(source.arrays)
    others = {
        "a vision transformer": r"(patch_embed|cls_token|pos_embed)",
        "MoCo v1 or v2": r"encoder_q\.",
        "a checkpoint of this project": r"encoder/stem_conv/kernel",
    }
    known = next((what for what, pattern in others.items() if any(re.search(pattern, name) for name in names)), "")
    what = f"is {known}, which is not taken" if known else "is of no known format"
    shown = f"its arrays are {_listed(names)}" if names else "it holds no arrays"
    raise UserError(f"{source.path} {what}: {shown}; known are ResNets of {', '.join(one.name for one in FORMATS)}; name {TAKEN}")


def translate(source: Source) -> Translation:
    """Translates a checkpoint.

    Raises UserError if it is of no known format, if a layer of the encoder is missing or has another shape, or if there is an
    array of unknown purpose.
    """
    form = format_of(source)
    encoder = _settings(form, source)
    taken: set[str] = set()
    arrays: dict[str, np.ndarray] = {}
    places = layers(encoder)
    for layer, place in zip(places, form.encoder(source, places), strict=True):
        taken |= set(place.names())
        if place.kernel not in source.arrays:
            arrays |= _passing_on(layer)
            continue
        arrays[f"encoder/{layer.conv}/kernel"] = form.kernel(source.value(place.kernel))
        arrays |= {f"encoder/{layer.norm}/{one}": source.value(name) for one, name in place.norm.items()}
    settings: dict[str, Any] = {
        "depth": encoder.depth,
        "width_multiplier": encoder.width_multiplier,
        "selective_kernel_ratio": encoder.selective_kernel_ratio,
        "cifar_stem": encoder.cifar_stem,
        "image_size": 32 if encoder.cifar_stem else 224,
        **form.settings(source),
    }
    left_out: dict[str, int] = {}
    head = form.projection(source)
    if head:
        names = {name for place in head for name in place.names()}
        why = _unfit(head, source)
        if why:
            left_out[f"projection head, {why}"] = len(names)
        else:
            projection = _projection(form, source, head)
            arrays |= projection
            settings |= _of_head(projection, head, encoder.feature_dim)
        taken |= names
    classes = 0
    classifier = form.classifier(source)
    if classifier:
        arrays["classifier/dense/kernel"] = form.kernel(source.value(classifier.kernel))
        classes = arrays["classifier/dense/kernel"].shape[1]
        bias = source.value(classifier.bias) if classifier.bias in source.arrays else np.zeros(classes)
        arrays["classifier/dense/bias"] = bias
        taken |= set(classifier.names())
    u = source.value(form.u(source))[:-1].reshape(-1) if form.u(source) else None
    taken |= {form.u(source)}
    for reason in _of_rest(form, source, taken):
        left_out[reason] = left_out.get(reason, 0) + 1
    return Translation(
        form.name,
        encoder,
        settings,
        {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()},
        form.step(source),
        classes,
        len(taken & set(source.arrays)),
        left_out,
        None if u is None else u.astype(np.float32),
    )


def _settings(form: Format, source: Source) -> EncoderSettings:
    """Returns the settings of the encoder that a checkpoint holds, found by the names and the shapes of its kernels."""

    def shapes(places: Sequence[Layer]) -> list[tuple[int, ...] | None]:
        found = []
        for layer, place in zip(places, form.encoder(source, places), strict=True):
            shape = source.shape(place.kernel)
            lacks = shape is None and form.may_lack(layer)
            found.append(layer.shape if lacks else None if shape is None else form.kernel_shape(shape))
        return found

    match = best_match(shapes, form.kernels(source))
    if match is None:
        raise UserError(f"{source.path} looks like a checkpoint of {form.name}, but it has no first convolution")
    missing = [
        name
        for layer, place in zip(layers(match.settings), form.encoder(source, layers(match.settings)), strict=True)
        for name in place.norm.values()
        if name not in source.arrays and not form.may_lack(layer)
    ]
    if match.wrong or missing:
        raise UserError(
            f"{source.path} looks like a {_named(match)} of {form.name}, but {_difference(form, source, match, missing)}"
        )
    return match.settings


def _named(match: Match) -> str:
    one = match.settings
    kernels = " with selective kernels" if one.selective_kernel_ratio else ""
    return f"ResNet-{one.depth} of {one.width_multiplier:g} times the usual width{kernels}"


def _difference(form: Format, source: Source, match: Match, missing: Sequence[str]) -> str:
    places = dict(zip(layers(match.settings), form.encoder(source, layers(match.settings)), strict=True))
    lacks = [places[layer].kernel for layer, shape in match.wrong if shape is None] + list(missing)
    if lacks:
        return f"it lacks {_listed(lacks)}"
    layer, shape = match.wrong[0]
    return f"{places[layer].kernel} has the shape {list(shape or ())}, not {list(layer.shape)} (height, width, inputs, outputs)"


def _passing_on(layer: Layer) -> dict[str, np.ndarray]:
    """Returns the arrays of a shortcut that gives what it gets, for a network that has none there."""
    channels = layer.shape[3]
    return {
        f"encoder/{layer.conv}/kernel": np.eye(channels)[None, None],
        f"encoder/{layer.norm}/gamma": np.full(channels, np.sqrt(1 + _EPSILON)),
        f"encoder/{layer.norm}/beta": np.zeros(channels),
        f"encoder/{layer.norm}/moving_mean": np.zeros(channels),
        f"encoder/{layer.norm}/moving_variance": np.ones(channels),
    }


def _unfit(head: Sequence[Place], source: Source) -> str:
    """Returns why this project's projection head cannot hold another code's; "" if it can."""
    if any("moving_mean" not in place.norm for place in head):
        return "which has layers without batch normalisation"
    if "beta" in head[-1].norm and np.any(source.value(head[-1].norm["beta"])):
        return "whose last batch normalisation has an offset"
    hidden = {source.shape(place.norm["moving_mean"]) for place in head[:-1]}
    return "whose hidden layers differ in width" if len(hidden) > 1 else ""


def _projection(form: Format, source: Source, head: Sequence[Place]) -> dict[str, np.ndarray]:
    arrays = {}
    for number, place in enumerate(head, 1):
        arrays[f"projection/dense{number}/kernel"] = form.kernel(source.value(place.kernel))
        norm = {one: source.value(name) for one, name in place.norm.items()}
        if place.bias:
            # Batch normalisation subtracts the mean: a bias before it has no other effect than to move that mean.
            norm["moving_mean"] = norm["moving_mean"] - source.value(place.bias)
        width = len(norm["moving_mean"])
        norm = {"gamma": np.ones(width), "beta": np.zeros(width), **norm}
        if number == len(head):
            del norm["beta"]
        arrays |= {f"projection/norm{number}/{one}": value for one, value in norm.items()}
    return arrays


def _of_head(arrays: Mapping[str, np.ndarray], head: Sequence[Place], features: int) -> dict[str, int]:
    """Returns the settings of the projection head, by key."""
    hidden = arrays["projection/dense1/kernel"].shape[1] if len(head) > 1 else features
    return {
        "projection_layers": len(head),
        "projection_dim": arrays[f"projection/dense{len(head)}/kernel"].shape[1],
        "projection_hidden_dim": 0 if hidden == features else hidden,
    }


def _of_rest(form: Format, source: Source, taken: set[str]) -> list[str]:
    """Returns what each array is that was not taken. Raises UserError if there are arrays of unknown purpose."""
    rest = {name: form.passed_over(name) for name in sorted(set(source.arrays) - taken)}
    unknown = [name for name, reason in rest.items() if not reason]
    if unknown:
        raise UserError(
            f"{source.path} looks like a checkpoint of {form.name}, but no layer takes {_listed(unknown)}: "
            "it is of another network, or of a newer version"
        )
    return list(rest.values())


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
