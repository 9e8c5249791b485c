"""Reads the tensors in a PyTorch file without PyTorch, and without running code that the file names.

`torch.save` writes a pickle beside the raw bytes of its tensors: in a zip file since PyTorch 1.6, one after the other before. A
pickle names functions for its reader to call. The reader here knows those that rebuild a tensor; it takes the classes of
hyper-parameters for empty objects, and refuses everything else.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np

from trainer.shared.errors import UserError

_MAGIC = 0x1950A86A20F9469CFC6C
"""First value of a file of the format before PyTorch 1.6."""
_TYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": "<u2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
_INERT = (
    "argparse",
    "omegaconf",
    "pytorch_lightning",
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "typing",
    "torch.optim",
)
"""Packages whose objects are hyper-parameters or the state of a training loop. They are read as empty objects."""


@dataclass(frozen=True)
class Tensor:
    """A tensor whose bytes are not read yet."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    """Reads it. bfloat16 becomes float32."""


class _Storage(NamedTuple):
    """The memory that one or several tensors share: `elements` values of the type `kind`."""

    key: str
    kind: str
    elements: int


class _Inert:
    """Stands for an object of no interest. Takes whatever a pickle does to it."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __setstate__(self, _: Any) -> None: ...
    def __setitem__(self, *_: Any) -> None: ...
    def append(self, _: Any) -> None: ...
    def extend(self, _: Any) -> None: ...
    def __hash__(self) -> int:
        return 0


def read_pytorch(path: str) -> Any:
    """Returns what `torch.save` wrote into the local file `path`: dicts, lists and scalars, with a `Tensor` for each tensor.

    Raises UserError if the file is cut off, is no file of PyTorch, or names code to run.
    """
    try:
        if zipfile.is_zipfile(path):
            return _read_zip(path)
        return _read_sequence(path)
    except UserError:
        raise
    except (
        pickle.UnpicklingError,
        EOFError,
        zipfile.BadZipFile,
        KeyError,
        ValueError,
        TypeError,
        IndexError,
        AttributeError,
    ) as error:
        raise UserError(
            f"{path} is cut off or is no file of PyTorch: {str(error).splitlines()[0] if str(error) else 'it ends'}"
        ) from error


def _read_zip(path: str) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        (pickled,) = (name for name in names if name.endswith("/data.pkl"))
        folder = pickled.removesuffix("data.pkl")
        if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
            raise UserError(f"{path} was written by a big-endian machine: save it again on another one")

        def content(storage: _Storage) -> bytes:
            with zipfile.ZipFile(path) as again:
                return again.read(f"{folder}data/{storage.key}")

        with archive.open(pickled) as file:
            return _Reader(file, path, content).load()


def _read_sequence(path: str) -> Any:
    """Reads the format before PyTorch 1.6: a magic number, a version, facts about the machine, the object, then the bytes."""
    places: dict[str, tuple[int, int]] = {}

    def content(storage: _Storage) -> bytes:
        start, size = places[storage.key]
        with open(path, "rb") as again:
            again.seek(start)
            return again.read(size)

    with open(path, "rb") as file:
        if _Reader(file, path, content).load() != _MAGIC:
            raise ValueError("it does not begin as such a file does")
        _Reader(file, path, content).load()
        _Reader(file, path, content).load()
        reader = _Reader(file, path, content)
        found = reader.load()
        for key in _Reader(file, path, content).load():
            kind, _ = reader.storages[key]
            size = int.from_bytes(file.read(8), "little") * np.dtype(_TYPES[kind]).itemsize
            places[key] = file.tell(), size
            file.seek(size, 1)
        end = file.tell()
        if file.seek(0, 2) < end:
            raise EOFError(f"{end - file.tell():,} bytes are missing")
    return found


class _Reader(pickle.Unpickler):
    def __init__(self, file: BinaryIO | IO[bytes], path: str, content: Callable[[_Storage], bytes]) -> None:
        super().__init__(file, encoding="utf-8")
        self._path, self._content = path, content
        self.storages: dict[str, tuple[str, int]] = {}
        """Kind and number of elements of each storage, by key."""

    def persistent_load(self, about: Any) -> _Storage:
        _, kind, key, _, count, *_ = about
        self.storages[str(key)] = kind, int(count)
        return _Storage(str(key), kind, int(count))

    def find_class(self, module: str, name: str) -> Any:
        known: Mapping[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("collections", "defaultdict"): lambda *_: {},
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("torch", "Size"): tuple,
            ("torch", "device"): lambda *_: None,
            ("numpy", "dtype"): _Inert,
            ("numpy.core.multiarray", "scalar"): _Inert,
            ("numpy._core.multiarray", "scalar"): _Inert,
            ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
        }
        if (module, name) in known:
            return known[module, name]
        if module in ("torch", "torch.storage") and name in _TYPES:
            return name
        if module == "torch":
            return _Inert if name in ("float32", "float16", "bfloat16", "float64", "int64") else self._refuse(module, name)
        if any(module == package or module.startswith(f"{package}.") for package in _INERT):
            return _Inert
        return self._refuse(module, name)

    def _refuse(self, module: str, name: str) -> Any:
        raise UserError(
            f"{self._path} asks its reader to run {module}.{name}, which is not done: "
            "save the weights alone, by torch.save(model.state_dict(), FILE)"
        )

    def _tensor(self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> Tensor:
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if min((offset, *strides)) < 0 or (0 not in shape and last >= storage.elements):
            raise ValueError(f"a tensor of shape {tuple(shape)} lies outside of its storage")
        kind = np.dtype(_TYPES[storage.kind])

        def read() -> np.ndarray:
            content = self._content(storage)
            if len(content) < storage.elements * kind.itemsize:
                raise UserError(f"{self._path} is cut off: a tensor of shape {tuple(shape)} is not whole")
            values = np.frombuffer(content, kind, storage.elements)
            steps = tuple(stride * kind.itemsize for stride in strides)
            array = np.lib.stride_tricks.as_strided(values[offset:], shape, steps, writeable=False).copy()
            return (array.astype(np.uint32) << 16).view(np.float32) if storage.kind == "BFloat16Storage" else array

        return Tensor(tuple(map(int, shape)), read)
