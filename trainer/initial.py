"""Starts a run from another run's checkpoint: takes its encoder, heads and u. Optimizer, step and order of images begin anew."""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import tensorflow as tf

from trainer import checkpoint as checkpoints
from trainer.config import Config, require_same_encoder, values_of
from trainer.folder import read_config
from trainer.shared.errors import UserError
from trainer.shared.files import is_local
from trainer.shared.records import Manifest
from trainer.state import TrainState

_BY_IMAGE = ("u", "temperature")
"""Vectors over the dataset that a run takes from its source. A temperature's velocity belongs to the optimizer."""


@dataclass(frozen=True)
class Source:
    """A checkpoint that a run starts from."""

    checkpoint: str
    """Path of the file."""
    state_sha256: str
    """SHA-256 of the checkpoint's variables, as `trainer.checkpoint.sha256_of` computes it."""
    parts: tuple[str, ...]
    """What the run takes from it: `encoder`, and any of `projection`, `classifier`, `u` and `temperature`."""
    left: tuple[str, ...] = ()
    """Why each other part begins anew, a sentence a part."""

    def as_json(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def open_source(init_from: str, config: Config) -> tuple[checkpoints.Checkpoint, dict[str, Any]]:
    """Returns the checkpoint `init_from`, a file or the newest one of a folder, and the content of its run's config.json.

    Raises UserError if there is none, or if its encoder or projection head was made with other settings than `config` has.
    """
    before, about = read_config(checkpoints.run_folder(init_from))
    found = checkpoints.open_checkpoint(init_from)
    has_head = any(name.startswith("projection/") for name in found.arrays)
    require_same_encoder(found.path, before, config, has_head)
    return found, about


def find_source(
    init_from: str, recorded: Mapping[str, Any] | None, config: Config, manifest: Manifest, state: TrainState
) -> Source:
    """Returns the source that `init_from` names, a checkpoint or a folder of checkpoints, for a run on the dataset `manifest`.

    `recorded` is the source that this run was begun with, if it was begun before. It is returned unread if `init_from` is its
    folder, whatever that folder's newest checkpoint is by now. Raises UserError if the checkpoint does not fit `state`.
    """
    init_from = os.path.abspath(init_from) if is_local(init_from) else init_from
    if recorded and init_from.rstrip("/") in (recorded["checkpoint"], checkpoints.run_folder(recorded["checkpoint"])):
        return Source(recorded["checkpoint"], recorded["state_sha256"], tuple(recorded["parts"]), tuple(recorded["left"]))
    found, about = open_source(init_from, config)
    reasons = {"projection": "", "classifier": _other_classes(about, manifest)}
    if config.loss.name == "global_contrastive":
        reasons |= dict.fromkeys(_BY_IMAGE[: 2 if config.loss.variant == "isogclr" else 1], _other_u(about, config, manifest))
    parts, left = ["encoder"], []
    for part, reason in reasons.items():
        if not any(name == part or name.startswith(f"{part}/") for name in found.arrays):
            reason = f"{found.path} has none"
        if reason:
            left.append(f"{part} begins anew: {reason}")
        else:
            parts.append(part)
    checkpoints.require_same_shapes(_variables(state, parts), found)
    return Source(found.path, checkpoints.sha256_of(found.arrays), tuple(parts), tuple(left))


def initialise(state: TrainState, source: Source, say: Callable[[str], None]) -> None:
    """Assigns the parts of `source` to `state`, and says which. Raises UserError if the file is gone, changed or does not fit."""
    found = checkpoints.load(source.checkpoint)
    if checkpoints.sha256_of(found.arrays) != source.state_sha256:
        raise UserError(f"{source.checkpoint} changed since this run began: its state_sha256 was {source.state_sha256}")
    checkpoints.restore(_variables(state, source.parts), found)
    say(f"starts with {', '.join(source.parts)} of {source.checkpoint}, state_sha256 {source.state_sha256[:16]}")
    for reason in source.left:
        say(reason)


def _variables(state: TrainState, parts: Collection[str]) -> dict[str, tf.Variable]:
    return {name: variable for name, variable in state.variables().items() if name.split("/")[0] in parts}


def _other_classes(about: Mapping[str, Any], manifest: Manifest) -> str:
    """Returns why the source's online classifier does not fit the dataset's classes, or "" if it does."""
    return "" if about.get("synsets") == list(manifest.synsets) else "it belongs to other classes"


def _other_u(about: Mapping[str, Any], config: Config, manifest: Manifest) -> str:
    """Returns why the source's u estimates something else than this run's u, or "" if it does not."""
    if (found := about.get("dataset_fingerprint")) != manifest.fingerprint:
        return f"it belongs to the images of dataset {found}, not of {manifest.fingerprint}"
    now = values_of(config)
    for key in ("loss", "variant", "temperature"):
        if (then := about["config"][key]) != now[key]:
            return f"it belongs to {key}={then}, not {now[key]}"
    return ""
