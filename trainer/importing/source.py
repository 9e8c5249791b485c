"""Opens a checkpoint of other code: the names and shapes of its arrays, whatever kind of file holds them."""

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.importing.pickles import Tensor, read_pytorch
from trainer.shared.errors import UserError
from trainer.shared.files import is_local, names_in

TAKEN = "a TensorFlow checkpoint (its prefix, as in ckpt-2), a file of torch.save, or a safetensors file"
_INDEX = ".index"
_OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
_DAMAGED = (tf.errors.OpError, RuntimeError, ValueError, IndexError)
"""Errors of TensorFlow's reader at a file that is missing or cut off."""


class Array:
    """An array of a checkpoint that is read when it is asked for."""

    def __init__(self, shape: tuple[int, ...], read: Callable[[], np.ndarray]) -> None:
        self.shape = shape
        self._read = read

    def value(self) -> np.ndarray:
        return self._read()


@dataclass(frozen=True)
class Source:
    """A checkpoint of other code."""

    path: str
    """Path of the file; of a TensorFlow checkpoint, its prefix."""
    sha256: str
    """SHA-256 of the file; of a TensorFlow checkpoint, of its files in the order of their names."""
    arrays: Mapping[str, Array]
    """Arrays by name. Names of a PyTorch file are the keys from the outermost dict inwards, joined by dots."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Numbers and texts of a PyTorch file, named as its arrays are; the metadata of a safetensors file."""
    full_names: Mapping[str, str] = field(default_factory=dict)
    """TensorFlow's own name of a variable -> its name in `arrays`. Only object checkpoints have it."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Returns the shape of an array, or None if there is no such array."""
        return self.arrays[name].shape if name in self.arrays else None

    def value(self, name: str) -> np.ndarray:
        return self.arrays[name].value()


@contextmanager
def open_source(path: str) -> Iterator[Source]:
    """Opens a checkpoint, local or on gs://. Its arrays can be read until the block ends.

    `path` is a file, the prefix of a TensorFlow checkpoint, or a folder that holds one checkpoint. Raises UserError if there is
    none, or if the file is damaged.
    """
    prefix = _tensorflow_prefix(path)
    if prefix:
        yield _open_tensorflow(prefix)
    elif not tf.io.gfile.exists(path) or tf.io.gfile.isdir(path):
        raise UserError(_not_found(path))
    elif is_local(path):
        yield _open_file(path, path)
    else:
        # Tensors are read here and there in the file, which takes one request each on an object store.
        with tempfile.TemporaryDirectory(prefix="import-") as folder:
            copy = f"{folder}/{os.path.basename(path)}"
            tf.io.gfile.copy(path, copy)
            yield _open_file(copy, path)


# ---- TensorFlow


def _tensorflow_prefix(path: str) -> str:
    """Returns the prefix of the TensorFlow checkpoint that `path` names, or "" if there is none."""
    path = path.rstrip("/")
    prefix = re.sub(r"\.(index|data-\d{5}-of-\d{5})$", "", path)
    if tf.io.gfile.exists(prefix + _INDEX):
        return prefix
    if not tf.io.gfile.isdir(path):
        return ""
    for folder in (path, f"{path}/variables"):
        found = sorted(name.removesuffix(_INDEX) for name in names_in(folder) if name.endswith(_INDEX))
        if len(found) > 1:
            raise UserError(
                f"{folder} holds {len(found)} checkpoints, {', '.join(found[:3])}: name one, as in {folder}/{found[-1]}"
            )
        if found:
            return f"{folder}/{found[0]}"
    return ""


def _not_found(path: str) -> str:
    if not tf.io.gfile.exists(path):
        return f"{path} does not exist: name {TAKEN}"
    inside = sorted(names_in(path))
    shown = ", ".join(inside[:3]) + (f" and {len(inside) - 3} more" if len(inside) > 3 else "") if inside else "nothing"
    return f"{path} is a folder with {shown}: name {TAKEN}"


def _open_tensorflow(prefix: str) -> Source:
    files = [prefix + _INDEX, *sorted(tf.io.gfile.glob(f"{prefix}.data-*"))]
    try:
        reader = tf.train.load_checkpoint(prefix)
        shapes = reader.get_variable_to_shape_map()
        graph = reader.get_tensor(_OBJECT_GRAPH) if _OBJECT_GRAPH in shapes else b""
    except _DAMAGED as error:
        raise UserError(f"{prefix} is no whole checkpoint of TensorFlow: {str(error).splitlines()[0]}") from error

    def read(key: str) -> Callable[[], np.ndarray]:
        def value() -> np.ndarray:
            try:
                return np.asarray(reader.get_tensor(key))
            except _DAMAGED as error:
                raise UserError(f"{prefix} is damaged: {key} cannot be read: {str(error).splitlines()[0]}") from error

        return value

    arrays = {key.removesuffix(_VALUE): Array(tuple(shape), read(key)) for key, shape in shapes.items() if key != _OBJECT_GRAPH}
    return Source(prefix, _sha256(files), arrays, full_names=_full_names(graph))


def _full_names(graph: bytes) -> dict[str, str]:
    from tensorflow.core.protobuf import trackable_object_graph_pb2

    parsed = trackable_object_graph_pb2.TrackableObjectGraph.FromString(graph)
    attributes = [one for node in parsed.nodes for one in node.attributes if one.full_name]
    return {one.full_name: one.checkpoint_key.removesuffix(_VALUE) for one in attributes}


# ---- PyTorch and safetensors


def _open_file(local: str, path: str) -> Source:
    """Opens the file `local`, a copy of `path`."""
    if local.endswith(".safetensors"):
        return _open_safetensors(local, path)
    try:
        found = read_pytorch(local)
    except UserError as error:
        raise UserError(str(error).replace(local, path)) from error
    arrays, about = dict[str, Array](), dict[str, Any]()
    for name, value in _leaves(found, ""):
        if isinstance(value, Tensor):
            arrays[name] = Array(value.shape, value.read)
        elif isinstance(value, int | float | str | bool):
            about[name] = value
    return Source(path, _sha256([local]), arrays, about)


def _open_safetensors(local: str, path: str) -> Source:
    from safetensors import SafetensorError, safe_open

    try:
        opened: Any = safe_open(local, "numpy")
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in list(opened.keys())}
        about = dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is cut off or is no safetensors file: {str(error).splitlines()[0]}") from error

    def read(name: str) -> Callable[[], np.ndarray]:
        return lambda: np.asarray(opened.get_tensor(name))

    return Source(path, _sha256([local]), {name: Array(shape, read(name)) for name, shape in shapes.items()}, about)


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yields what lies in nested dicts and lists, with the keys on the way joined by dots."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{name}.{index}" if name else str(index))
    else:
        yield name, value


def _sha256(files: list[str]) -> str:
    digest = hashlib.sha256()
    for name in files:
        with tf.io.gfile.GFile(name, "rb") as file:
            while content := file.read(2**24):
                digest.update(content)
    return digest.hexdigest()
