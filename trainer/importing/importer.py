"""Makes a checkpoint folder from a checkpoint of other code."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tensorflow as tf

from trainer import checkpoint as checkpoints
from trainer.config import Config, as_dict
from trainer.config import replace as with_settings
from trainer.encoder import make_encoder
from trainer.folder import CONFIG
from trainer.importing import check
from trainer.importing.check import Comparison, compare, features_by_torch, plain_features, seeded_images, torch_is_there
from trainer.importing.format import Format
from trainer.importing.formats.torchvision import PyTorchFormat
from trainer.importing.network import Layer, layers
from trainer.importing.source import Source, open_source
from trainer.importing.translate import Translation, format_of, translate
from trainer.presets import PRESETS, PUBLISHED, resolve_pretraining
from trainer.settings import EncoderSettings
from trainer.shared.errors import UserError, nearest
from trainer.shared.files import names_in, write_whole
from trainer.state import model_variables


@dataclass(frozen=True)
class Imported:
    """An imported checkpoint."""

    source: str
    """Path of the file that it was made from."""
    sha256: str
    """Of that file."""
    translation: Translation
    config: Config
    comparison: Comparison
    state_sha256: str
    """SHA-256 of the checkpoint's arrays."""
    checkpoint: str
    """Path of the checkpoint; "" after a dry run."""

    def describe(self) -> dict[str, Any]:
        """Returns what config.json says of the source."""
        return {
            "path": self.source,
            "sha256": self.sha256,
            "format": self.translation.format,
            "mapped": self.translation.mapped,
            "left_out": dict(self.translation.left_out),
            "comparison": vars(self.comparison),
        }


def import_checkpoint(
    path: str,
    output: str = "",
    *,
    image_size: int = 0,
    dataset_fingerprint: str = "",
    preset: str = "",
    code_version: str = "",
    base: Config | None = None,
    replaces: bool = False,
) -> Imported:
    """Makes a checkpoint folder `output` from a checkpoint of other code. Without `output`, only finds out what it would hold.

    `path` is a file, the prefix of a TensorFlow checkpoint or a folder that holds one, local or on gs://. `image_size` is the
    side of the encoder's images, by default 224, or 32 for the CIFAR stem. u is imported if `dataset_fingerprint` names the
    dataset that it belongs to, whose image IDs must be in the order of u. `preset` is the published experiment that the
    checkpoint comes from. The result has the settings of `base`, by default the usual ones, except those that the checkpoint
    determines. With `replaces`, `output` may hold an earlier import, whole or not.

    Raises UserError if the file is not a checkpoint of a known format, if its features differ from those of the result or say
    nothing about the images, if `preset` has another encoder, or if `output` holds something.
    """
    if output and not replaces and names_in(output):
        raise UserError(f"{output} is not empty: name a new folder")
    with open_source(path) as source:
        form = format_of(source)
        translation = _with_u(translate(source), dataset_fingerprint)
        config = _config(translation, image_size, base or Config())
        _require_preset(preset, config, source.path)
        comparison = _compared(form, source, translation, config)
        arrays = dict(translation.arrays) | ({} if translation.u is None else {"u": translation.u})
        found = Imported(source.path, source.sha256, translation, config, comparison, checkpoints.sha256_of(arrays), "")
    if not output:
        return found
    about = {
        "config": as_dict(config),
        "preset": preset,
        "code_version": code_version,
        "dataset_fingerprint": dataset_fingerprint,
        "num_images": 0 if translation.u is None else len(translation.u),
        "num_classes": translation.classes,
        "synsets": [],
        "imported": found.describe(),
    }
    saved = checkpoints.save(output, checkpoints.Checkpoint(translation.step, arrays, {}, f"imported {found.sha256}"), keep=1)
    # Last: without it, a folder holds no run.
    write_whole(f"{output}/{CONFIG}", (json.dumps(about, indent=1, sort_keys=True) + "\n").encode())
    return replace(found, checkpoint=saved)


def recognise(path: str, preset: str, overrides: Iterable[str]) -> tuple[str, str]:
    """Returns (name of its format, SHA-256) of a checkpoint of other code. Computes no features.

    Raises UserError if `import_checkpoint` could not take it for `preset` with `overrides`.
    """
    base, published = base_of(preset, overrides)
    with open_source(path) as source:
        translation = translate(source)
        _require_preset(published, _config(translation, base.views.image_size, base), source.path)
        return translation.format, source.sha256


def base_of(preset: str, overrides: Iterable[str]) -> tuple[Config, str]:
    """Returns (the settings of an encoder that is evaluated as `preset` with `overrides` is, the published preset or "").

    They are all of a published preset's settings. Of any other preset, they are those of the views and of the linear eval: the
    encoder was not trained by the others.
    """
    config = resolve_pretraining(preset, overrides)
    if preset in PUBLISHED:
        return config, preset
    return Config(views=config.views, linear_eval=config.linear_eval), ""


def _with_u(translation: Translation, dataset_fingerprint: str) -> Translation:
    """Returns `translation` without u, if it is not known which dataset it belongs to."""
    if translation.u is None or dataset_fingerprint:
        return translation
    reason = "u, because the dataset that it belongs to was not named"
    return replace(translation, u=None, left_out={**translation.left_out, reason: 1}, mapped=translation.mapped - 1)


def _config(translation: Translation, image_size: int, base: Config) -> Config:
    given = {"image_size": image_size} if image_size else {}
    config = with_settings(replace(base, encoder=EncoderSettings()), **{**translation.settings, **given})
    # The online classifier was trained on classes whose order is not known.
    measured = tuple(one for one in config.linear_eval.protocols if one != "online")
    return replace(config, linear_eval=replace(config.linear_eval, protocols=measured))


def _require_preset(preset: str, config: Config, path: str) -> None:
    if not preset:
        return
    if preset not in PRESETS:
        raise UserError(f"{preset} is not a preset{nearest(preset, PRESETS)}")
    wanted = PRESETS[preset].config.encoder
    for key in ("depth", "width_multiplier", "selective_kernel_ratio", "cifar_stem", "pool_padding", "input_normalization"):
        if (found := getattr(config.encoder, key)) != getattr(wanted, key):
            raise UserError(f"{path} has {key}={found}, and preset {preset} {getattr(wanted, key)}: name another preset, or none")


def _compared(form: Format, source: Source, translation: Translation, config: Config) -> Comparison:
    """Compares the features of the imported encoder with those of its source."""
    side = config.views.image_size
    encoder = make_encoder(config.encoder, side)
    arrays = translation.arrays
    checkpoints.restore(model_variables("encoder", encoder), checkpoints.Checkpoint(0, arrays, {}, path=source.path))
    images = seeded_images(side)
    features = np.asarray(encoder(tf.constant(images), training=False))
    if isinstance(form, PyTorchFormat) and torch_is_there():
        theirs, by = features_by_torch(config.encoder, _named_in_torch(form, source, config), images), "PyTorch"
    else:
        theirs, by = plain_features(config.encoder, _reader(form, source, config), images), "plain TensorFlow"
    return compare(features, theirs, side, by, source.path)


def _named_in_torch(form: PyTorchFormat, source: Source, config: Config) -> Mapping[str, np.ndarray]:
    """Returns the source's arrays of the encoder, by torchvision's names."""
    places = layers(config.encoder)
    found = {}
    for layer, place in zip(places, form.encoder(source, places), strict=True):
        if place.kernel not in source.arrays:
            continue
        conv, norm = layer.torch_names
        found[f"{conv}.weight"] = source.value(place.kernel)
        found |= {f"{norm}.{name.rpartition('.')[2]}": source.value(name) for name in place.norm.values()}
    return found


def _reader(form: Format, source: Source, config: Config) -> Any:
    places = layers(config.encoder)
    by_layer = dict(zip(places, form.encoder(source, places), strict=True))

    def read(layer: Layer) -> check.Normalised | None:
        place = by_layer[layer]
        if place.kernel not in source.arrays:
            return None
        norm = {one: source.value(name) for one, name in place.norm.items()}
        return form.kernel(source.value(place.kernel)), norm or None

    return read
