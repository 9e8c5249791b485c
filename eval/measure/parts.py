"""The parts of a folder of features: Parquet files, written atomically and read back as arrays."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

from trainer.shared.errors import UserError
from trainer.shared.files import write_whole

_DIGEST = b"sogclr.digest"


def path_of(folder: str, number: int) -> str:
    return f"{folder}/part-{number:05}.parquet"


def write(path: str, image_ids: np.ndarray, labels: np.ndarray, values: np.ndarray, layout: str) -> None:
    """Writes [n] int64 image IDs, [n] int64 labels and [n, F] float32 features. `ids_of` asks for the same `layout`."""
    count, dim = values.shape
    flat = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), dim)
    table = pa.table(
        {"image_id": image_ids, "label": labels, "features": flat},
        pa.schema(
            [("image_id", pa.int64()), ("label", pa.int64()), ("features", pa.list_(pa.float32(), dim))],
            metadata={_DIGEST: layout.encode()},
        ),
    )
    sink = pa.BufferOutputStream()
    # Features hardly compress.
    pq.write_table(table, sink, use_dictionary=False, compression="none", write_statistics=False, row_group_size=count)
    write_whole(path, sink.getvalue().to_pybytes())


def ids_of(path: str, layout: str) -> np.ndarray | None:
    """Returns the image IDs of a part that an earlier attempt with the same `layout` wrote, or None."""
    if not tf.io.gfile.exists(path):
        return None
    try:
        table = read(path, ["image_id"])
    except UserError:
        return None
    return table["image_id"].to_numpy() if (table.schema.metadata or {}).get(_DIGEST) == layout.encode() else None


def read(path: str, columns: list[str] | None = None) -> pa.Table:
    """Reads a part, or some `columns` of it. Raises UserError if the file is no part of features."""
    try:
        with _File(path, "rb") as file:
            return pq.ParquetFile(pa.PythonFile(file, mode="r")).read(columns)
    except (pa.ArrowInvalid, OSError, tf.errors.OpError) as error:
        raise UserError(f"{path} is not a part of features: {str(error).splitlines()[0]}") from error


def columns_of(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns image IDs, labels and features, as `write` takes them."""
    values = table["features"].combine_chunks()
    dim = values.type.list_size
    return table["image_id"].to_numpy(), table["label"].to_numpy(), values.flatten().to_numpy().reshape(-1, dim)


class _File(tf.io.gfile.GFile):
    """A file with the attribute `closed`, which pyarrow requires."""

    closed = False
