"""The folder of a pretraining run: its config.json says which run it holds, and no other run may use it."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from trainer.config import BOOKKEEPING, Config, as_dict, config_from_dict
from trainer.settings import settings
from trainer.shared.errors import UserError
from trainer.shared.files import make_folder, write_whole

CONFIG = "config.json"
RESULT = "result.json"


def read_config(checkpoint_dir: str) -> tuple[Config, dict[str, Any]]:
    """Returns (config of the run in `checkpoint_dir`, whole content of its config.json). Raises UserError if there is none."""
    path = f"{checkpoint_dir}/{CONFIG}"
    if not tf.io.gfile.exists(path):
        raise UserError(f"{checkpoint_dir} holds no pretraining run: {CONFIG} is missing")
    with tf.io.gfile.GFile(path) as file:
        stored = json.loads(file.read())
    return config_from_dict(stored["config"]), stored


def recorded_source(checkpoint_dir: str) -> dict[str, Any] | None:
    """Returns the source that the run in `checkpoint_dir` was begun with, or None if there is no run, or none with a source."""
    exists = tf.io.gfile.exists(f"{checkpoint_dir}/{CONFIG}")
    return read_config(checkpoint_dir)[1].get("init_from") if exists else None


def claim_folder(
    checkpoint_dir: str,
    config: Config,
    origin: Mapping[str, Any],
    about: Mapping[str, Any],
    source: Mapping[str, Any] | None = None,
) -> str:
    """Writes config.json into `checkpoint_dir` and returns the run's digest.

    `origin` describes the dataset, `source` is what the run starts from. The run is a function of the settings, of `origin` and
    of the source's `state_sha256` and `parts`, but not of `about`. Raises UserError if the folder already holds another run.
    """
    path = f"{checkpoint_dir}/{CONFIG}"
    now = {name: value for name, value in {**as_dict(config), **origin}.items() if name not in BOOKKEEPING}
    if tf.io.gfile.exists(path):
        before, stored = read_config(checkpoint_dir)
        for name, value in (as_dict(before) | {name: stored[name] for name in origin}).items():
            if name not in BOOKKEEPING and value != now[name]:
                raise UserError(
                    f"{checkpoint_dir} holds a run with {name}={value}, not {now[name]}: {_way_on(name, checkpoint_dir)}"
                )
        if _identity(stored.get("init_from")) != _identity(source):
            raise UserError(f"{checkpoint_dir} holds a run that {_beginning(stored.get('init_from'))}: use another folder")
        # A setting that was unknown to the version that began the run is not part of its digest.
        now = {name: value for name, value in now.items() if name in {**stored["config"], **origin}}
    else:
        make_folder(checkpoint_dir)
        begun = {"init_from": source} if source else {}
        text = json.dumps({"config": as_dict(config), **origin, **about, **begun}, indent=1, sort_keys=True) + "\n"
        write_whole(path, text.encode())
    # A run without a source has the digest that it had before there were sources.
    digested = now | ({"init_from": _identity(source)} if source else {})
    return hashlib.sha256(json.dumps(digested, sort_keys=True).encode()).hexdigest()


def _identity(source: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return {name: source[name] for name in ("state_sha256", "parts")} if source else None


def _beginning(source: Mapping[str, Any] | None) -> str:
    return f"started with --init-from {source['checkpoint']}" if source else "started without --init-from"


def _way_on(name: str, checkpoint_dir: str) -> str:
    """Returns what to do about a folder that holds a run with another value of the setting `name`."""
    if name in settings() and settings()[name].group == "encoder":
        return "use another folder"
    return f"use another folder; --init-from {checkpoint_dir} starts there from this run's encoder"
