"""Fixtures of several test files, and what pytest is told about all of them."""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pytest
from support.copies import Copies
from support.datasets import write_dataset
from support.raw_data import raw_as_usual

# What a script starts in the background ignores SIGINT, and so does all that it starts, which tests interrupt with it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A quarter of the time that imports take; `pytest_collection_finish` enables it.
gc.disable()

_LONGEST = (
    "kills",
    "train",
    "eval_devices",
    "distribution",
    "pipeline",
    "dataflow",
    "mlflow_server",
    "gs",
    "submit",
    "jobs",
    "attempts",
    "containers",
    "lowering",
    "runners",
    "order",
    "export",
    "linear_eval",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that take longest first, so that no worker is left alone with one at the end."""
    rank = {f"test_{name}": number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_collection_finish() -> None:
    """Leaves the modules, which stay until the end, out of every later collection of garbage."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """A dataset of 48 training and 17 validation images in 6 classes."""
    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder)
    return folder


@pytest.fixture(scope="session")
def raw(tmp_path_factory) -> Path:
    """What `raw_as_usual` writes: 150 training and 20 validation images of 3 synsets."""
    return raw_as_usual(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="session")
def built(raw, tmp_path_factory) -> Path:
    """The dataset of `raw`, in 2 shards a split."""
    from beam_jobs.job import build

    folder = tmp_path_factory.mktemp("built") / "output"
    build(str(raw), str(folder), num_shards=2)
    return folder


@pytest.fixture(scope="session")
def as_layout(tmp_path_factory) -> Callable[[str], Path]:
    """Raw folders by layout, made when first asked for. Tests that change one take a copy."""
    from support import layouts

    made: dict[str, Path] = {}

    def get(layout: str) -> Path:
        if layout not in made:
            made[layout] = layouts.LAYOUTS[layout](tmp_path_factory.mktemp("raw"))
        return made[layout]

    return get


@pytest.fixture(scope="session")
def fingerprint(built) -> str:
    """The fingerprint of the dataset of `raw`."""
    from trainer.shared.records import read_manifest

    return read_manifest(str(built)).fingerprint


@pytest.fixture(scope="session")
def made_root(tmp_path_factory) -> Path:
    """A root whose store was made and has no run."""
    from components import tracking

    root = tmp_path_factory.mktemp("made")
    tracking.open_root(root)
    return root


@pytest.fixture
def root(made_root, tmp_path) -> Path:
    """A root with a store."""
    from support.roots import copy_store

    copy_store(made_root, tmp_path / "root")
    return tmp_path / "root"


@pytest.fixture(scope="session")
def copies() -> Iterator[Copies]:
    """Runs commands of this project in processes that need no time to import."""
    with Copies() as made:
        yield made


@pytest.fixture
def bucket(monkeypatch):
    """An emulated Cloud Storage that Beam's own client talks to; gives its URL and a function from names to contents."""
    import socket

    from apache_beam.internal.gcp import auth
    from gcp_storage_emulator.server import create_server
    from google.cloud import storage

    from beam_jobs import files

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = create_server("localhost", port, in_memory=True, default_bucket="bucket")
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{port}")
    monkeypatch.setattr(auth._Credentials, "_credentials_init", True)
    monkeypatch.setattr(auth._Credentials, "_credentials", None)
    files._opened_by.cache_clear()
    yield storage.Client.create_anonymous_client().bucket("bucket")
    server.stop()
