"""Features of a frozen encoder: a forward pass over a split writes them to disk in parts, and protocols read the parts back.

A folder of features holds part-00000.parquet, part-00001.parquet and so on. A part has one row for each image, in the order of
the shards, with the columns `image_id` int64, `label` int64 and `features` fixed_size_list<float32>. features.json is written
last. It holds a digest of everything that the features depend on, and the number of rows of each part. An interrupted forward
pass resumes after its last part.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import keras
import numpy as np
import tensorflow as tf

from eval.measure import parts
from eval.measure.alone import alone
from trainer import checkpoint as checkpoints
from trainer.augmentation import as_floats
from trainer.bad_records import naming_bad_records
from trainer.config import Config, values_of
from trainer.distribution import jit_compile
from trainer.encoder import make_encoder
from trainer.input_pipeline import PADDING, evaluation_batches
from trainer.preemption import PreemptedError
from trainer.shared.errors import UserError
from trainer.shared.files import make_folder, write_whole
from trainer.shared.records import Manifest
from trainer.state import model_variables

INDEX = "features.json"
PART_BYTES = 1 << 27
"""Approximate maximum size of the features in a part. The last batch may exceed it."""
_SETTINGS = (
    "image_size",
    "eval_crop_proportion",
    "depth",
    "width_multiplier",
    "selective_kernel_ratio",
    "cifar_stem",
    "precision",
    "pool_padding",
    "input_normalization",
)
"""Settings that determine the features, together with weights and images."""


@dataclass(frozen=True)
class Features:
    """Features of n images, in memory."""

    image_ids: np.ndarray
    """[n] int64."""
    labels: np.ndarray
    """[n] int64."""
    values: np.ndarray
    """[n, F] float32."""

    def by_id(self) -> "Features":
        """Returns the same features in the order of image IDs."""
        order = np.argsort(self.image_ids)
        return Features(self.image_ids[order], self.labels[order], self.values[order])


@dataclass(frozen=True)
class StoredFeatures:
    """Features on disk."""

    folder: str
    digest: str
    dim: int
    rows: tuple[int, ...]
    """Number of images in each part."""

    @property
    def count(self) -> int:
        return sum(self.rows)

    def parts(self) -> Iterator[Features]:
        """Yields the parts in order. Reads the next part while the caller works on the current one."""
        with ThreadPoolExecutor(1) as reader:
            coming = [reader.submit(self._part, number) for number in range(min(1, len(self.rows)))]
            for number in range(len(self.rows)):
                part = coming.pop().result()
                if number + 1 < len(self.rows):
                    coming.append(reader.submit(self._part, number + 1))
                yield part

    def whole(self) -> Features:
        """Returns all features in memory, in the order of image IDs. For small splits."""
        ids, labels = self.ids_and_labels()
        order = np.argsort(ids)
        values = np.empty((self.count, self.dim), np.float32)
        for part in self.parts():
            values[np.searchsorted(ids, part.image_ids, sorter=order)] = part.values
        return Features(ids[order], labels[order], values)

    def ids_and_labels(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns image IDs and labels, [n] int64 each, in the order of the parts."""
        tables = [parts.read(parts.path_of(self.folder, number), ["image_id", "label"]) for number in range(len(self.rows))]
        columns = [np.concatenate([table[name].to_numpy() for table in tables]) for name in ("image_id", "label")]
        return columns[0], columns[1]

    def labels_by_id(self) -> np.ndarray:
        """Returns the label of each image ID, [largest ID + 1] int64. Images without features have the label 0."""
        ids, labels = self.ids_and_labels()
        by_id = np.zeros(int(ids.max()) + 1, np.int64)
        by_id[ids] = labels
        return by_id

    @contextmanager
    def on_this_machine(self) -> Iterator["StoredFeatures"]:
        """Yields these features in a local folder, for callers that read them many times."""
        if "://" not in self.folder:
            yield self
            return
        with tempfile.TemporaryDirectory(prefix="features-") as folder:
            for number in range(len(self.rows)):
                tf.io.gfile.copy(parts.path_of(self.folder, number), parts.path_of(folder, number))
            yield replace(self, folder=folder)

    def examples(self, wanted: np.ndarray | None = None) -> "Examples":
        """Returns all images as examples, or those whose `wanted` is true, [N] bool indexed by image ID."""

        def pieces() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for part in self.parts():
                chosen = slice(None) if wanted is None else wanted[part.image_ids]
                yield part.values[chosen], part.labels[chosen]

        return Examples(self.count if wanted is None else int(wanted.sum()), self.dim, pieces)

    def _part(self, number: int) -> Features:
        path = parts.path_of(self.folder, number)
        table = parts.read(path)
        if table.num_rows != self.rows[number]:
            raise UserError(f"{path} has {table.num_rows} images, but {INDEX} says {self.rows[number]}: delete {self.folder}")
        return Features(*parts.columns_of(table))


@dataclass(frozen=True)
class Examples:
    """Features with labels. A fit reads them repeatedly, in pieces."""

    count: int
    dim: int
    pieces: Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]
    """Starts a pass over the examples. Yields (values [m, F] float32, labels [m] int64)."""

    @classmethod
    def of(cls, values: np.ndarray, labels: np.ndarray) -> "Examples":
        """Returns examples from arrays in memory: `values` [n, F] float32 and `labels` [n] int64."""
        return cls(len(labels), values.shape[1], lambda: [(values, labels)])

    def in_memory(self) -> "Examples":
        """Returns the same examples, read once and kept in memory."""
        pieces = [(values, labels) for values, labels in self.pieces() if len(labels)]
        return Examples(self.count, self.dim, lambda: pieces)


def read_features(folder: str) -> StoredFeatures:
    """Opens the features in a folder. Raises UserError if features.json is missing or unreadable."""
    folder = folder.rstrip("/")
    try:
        with tf.io.gfile.GFile(f"{folder}/{INDEX}") as file:
            index = json.loads(file.read())
        return StoredFeatures(folder, index["digest"], index["dimensions"], tuple(index["rows"]))
    except (OSError, ValueError, KeyError, tf.errors.OpError) as error:
        raise UserError(f"{folder} is not a folder of features: {str(error).splitlines()[0]}") from error


def load_encoder(config: Config, checkpoint: checkpoints.Checkpoint) -> keras.Model:
    """Returns the encoder in a pretraining checkpoint. Raises UserError if the checkpoint is of another architecture."""
    encoder = make_encoder(config.encoder, config.views.image_size, config.run.seed)
    checkpoints.restore(model_variables("encoder", encoder), checkpoint)
    return encoder


def digest_of(encoder: keras.Model, config: Config, manifest: Manifest, split: str, image_ids: np.ndarray | None = None) -> str:
    """Returns a digest of everything that the features of `split`, or of `image_ids` in it, depend on.

    The same encoder, images and evaluation crop have the same digest, whatever the batch size and the number of replicas.
    """
    arrays = {name: variable.numpy() for name, variable in model_variables("encoder", encoder).items()}
    about = {
        "encoder": checkpoints.sha256_of(arrays),
        "dataset": manifest.fingerprint,
        "split": split,
        **{key: value for key, value in values_of(config).items() if key in _SETTINGS},
    }
    if image_ids is not None:
        about["image_ids"] = hashlib.sha256(np.sort(image_ids).tobytes()).hexdigest()
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def extract(
    encoder: keras.Model,
    config: Config,
    data_dir: str,
    manifest: Manifest,
    split: str,
    folder: str,
    image_ids: np.ndarray | None = None,
    *,
    shared: bool = False,
    strategy: tf.distribute.Strategy | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> StoredFeatures:
    """Computes the features of `split`, or of `image_ids` in it, into a subfolder of `folder` that is named by their digest.

    Skips the parts that the subfolder already has. In a `shared` folder, waits for another evaluation of this machine that
    computes the same features. `encoder` must be made in the scope of `strategy`, by default TensorFlow's current one. Calls
    `on_progress(finished images)` after each batch. Soon after `should_stop()` returns True, raises PreemptedError and keeps
    the finished parts. Raises UserError if the split does not hold every image ID exactly once, or if features are not finite.
    """
    strategy = strategy or tf.distribute.get_strategy()

    def steps(first: int) -> Iterator[Features]:
        return forward_pass(encoder, config, data_dir, manifest, split, image_ids, first, strategy=strategy)

    stored = StoredPass(
        kind="features",
        digest=digest_of(encoder, config, manifest, split, image_ids),
        dim=encoder.output_shape[-1],
        data_dir=data_dir,
        split=split,
        image_ids=np.arange(manifest.splits[split].records) if image_ids is None else np.sort(image_ids),
        batch_sizes=(strategy.num_replicas_in_sync, config.linear_eval.batch_size),
        steps=steps,
    )
    return stored.read_or_compute(folder, shared, on_progress, should_stop)


@dataclass(frozen=True)
class StoredPass:
    """A forward pass over images of a split whose outputs are stored as features are."""

    kind: str
    """What the outputs are, in the plural: the name of the folder and errors have it."""
    digest: str
    """Digest of everything that the outputs depend on."""
    dim: int
    """Number of outputs of an image."""
    data_dir: str
    split: str
    image_ids: np.ndarray
    """[n] int64, in ascending order."""
    batch_sizes: tuple[int, int]
    """Number of replicas, and images of a step on each."""
    steps: Callable[[int], Iterator[Features]]
    """Yields the outputs of one step of all replicas after another, from the given step on."""

    def read_or_compute(
        self, folder: str, shared: bool, on_progress: Callable[[int], None], should_stop: Callable[[], bool]
    ) -> StoredFeatures:
        """Returns the outputs in a subfolder of `folder`; computes those that are not there. `extract` explains the arguments."""
        folder = f"{folder.rstrip('/')}/{self.kind}-{self.split}-{self.digest[:16]}"
        with alone(folder, should_stop) if shared else nullcontext():
            if tf.io.gfile.exists(f"{folder}/{INDEX}"):
                stored = read_features(folder)
                if stored.digest == self.digest:
                    on_progress(stored.count)
                    return stored
            return self._computed(folder, on_progress, should_stop)

    def _computed(self, folder: str, on_progress: Callable[[int], None], should_stop: Callable[[], bool]) -> StoredFeatures:
        replicas, at_once = self.batch_sizes
        steps_a_part = max(1, PART_BYTES // (4 * self.dim * at_once * replicas))
        # A part of an earlier attempt can be reused only if its batches had the same size.
        layout = f"{self.digest} {steps_a_part} x {replicas} x {at_once}"
        expected, rows, seen = len(self.image_ids), list[int](), list[np.ndarray]()
        while sum(rows) < expected and (ids := parts.ids_of(parts.path_of(folder, len(rows)), layout)) is not None:
            seen.append(ids)
            rows.append(len(ids))
        done = sum(rows)
        on_progress(done)
        pending: list[Features] = []

        def write() -> None:
            part = Features(*(np.concatenate(columns) for columns in zip(*map(_columns, pending), strict=True)))
            self._require_finite(part)
            make_folder(folder)
            parts.write(parts.path_of(folder, len(rows)), *_columns(part), layout)
            seen.append(part.image_ids)
            rows.append(len(part.image_ids))
            pending.clear()

        for batch in self.steps(len(rows) * steps_a_part):
            pending.append(batch)
            done += len(batch.image_ids)
            on_progress(done)
            if len(pending) == steps_a_part:
                write()
            if should_stop():
                raise PreemptedError(
                    f"stopped in the forward pass, kept the {self.kind} of {sum(rows):,} of {expected:,} images of {self.split}: "
                    "start the same command again to continue"
                )
        if pending:
            write()
        if not np.array_equal(np.sort(np.concatenate(seen)), self.image_ids):
            raise UserError(
                f"split {self.split} of {self.data_dir} holds {done} records, not image IDs 0..{self.image_ids[-1]} once each: "
                "build the dataset again"
            )
        index = {"digest": self.digest, "split": self.split, "images": done, "dimensions": self.dim, "rows": rows}
        write_whole(f"{folder}/{INDEX}", (json.dumps(index, indent=1) + "\n").encode())
        return StoredFeatures(folder, self.digest, self.dim, tuple(rows))

    def _require_finite(self, part: Features) -> None:
        finite = np.isfinite(part.values).all(axis=1)
        if not finite.all():
            bad = int(part.image_ids[~finite].min())
            raise UserError(
                f"the {self.kind} of image ID {bad} of {self.split} are not finite: the checkpoint is of a run that diverged"
            )


def forward_pass(
    encoder: keras.Model,
    config: Config,
    data_dir: str,
    manifest: Manifest,
    split: str,
    image_ids: np.ndarray | None = None,
    first_step: int = 0,
    *,
    strategy: tf.distribute.Strategy | None = None,
) -> Iterator[Features]:
    """Yields the features of `split`, or of `image_ids` in it, from `first_step` on. Each element is a step of all replicas."""
    strategy = strategy or tf.distribute.get_strategy()

    def of_host(context: tf.distribute.InputContext) -> tf.data.Dataset:
        return evaluation_batches(
            config.views,
            data_dir,
            manifest,
            split,
            config.linear_eval.batch_size,
            image_ids,
            first_step,
            host=context.input_pipeline_id,
            hosts=context.num_input_pipelines,
            replicas=context.num_replicas_in_sync // context.num_input_pipelines,
        )

    return outputs_of_steps(of_host, features_of_pixels(encoder), ("image",), data_dir, manifest, split, strategy)


def outputs_of_steps(
    of_host: Callable[[tf.distribute.InputContext], tf.data.Dataset],
    outputs: Callable[..., tf.Tensor],
    inputs: tuple[str, ...],
    data_dir: str,
    manifest: Manifest,
    split: str,
    strategy: tf.distribute.Strategy,
) -> Iterator[Features]:
    """Yields what `outputs`, [b, F] float32, makes of the `inputs` of each batch, one step of all replicas after another.

    `of_host` returns batches of a host, with these names, `image_id` and `label`. Images of padding are left out.
    """

    @tf.function(autograph=False, jit_compile=jit_compile(strategy) or None)
    def forward(*given: tf.Tensor) -> tf.Tensor:
        return strategy.run(outputs, args=given)

    def fetched(batch: dict[str, tf.Tensor], values: tf.Tensor) -> Features:
        columns = [
            np.concatenate([part.numpy() for part in strategy.experimental_local_results(of_all)])
            for of_all in (batch["image_id"], batch["label"], values)
        ]
        real = columns[0] != PADDING
        return Features(*(column[real] for column in columns))

    # The accelerator computes a batch while the previous one is copied from it.
    before: tuple[dict[str, tf.Tensor], tf.Tensor] | None = None
    batches = strategy.distribute_datasets_from_function(of_host)
    for batch in naming_bad_records(batches, data_dir, manifest, split):
        now = batch, forward(*(batch[name] for name in inputs))
        if before is not None:
            yield fetched(*before)
        before = now
    if before is not None:
        yield fetched(*before)


def features_of_pixels(encoder: keras.Model) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns a function from uint8 images, [b, S, S, 3], to features, [b, F] float32, with BN in inference mode."""
    return lambda images: encoder(as_floats(images), training=False)


def _columns(features: Features) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return features.image_ids, features.labels, features.values
