"""What holds on Cloud Storage, each a function that runs in a world; `tests/test_cloud.py` runs them.

python -m vertex.world python -m vertex.scenarios NAME
"""

import os
import sys
from collections.abc import Callable

from vertex.world import TRUST, World, world

SCENARIOS: dict[str, Callable[[World], None]] = {}


def scenario(function: Callable[[World], None]) -> Callable[[World], None]:
    SCENARIOS[function.__name__] = function
    return function


def noise(size: int) -> bytes:
    """A JPEG of about 95 KB where size is 190: as large as ImageNet's are on average, and quick to decode."""
    import io

    import numpy as np
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3), np.uint8)).save(out, "jpeg", quality=98)
    return out.getvalue()


@scenario
def an_epoch_reads_the_dataset_once(place: World) -> None:
    from support.datasets import write_dataset

    folder = place.google.storage.bucket("a-bucket") / "data"
    picture = noise(190)
    manifest = write_dataset(folder, train=640, validation=320, shards=3, picture=lambda label, random: picture)
    from trainer.input_pipeline import evaluation_batches, training_batches
    from trainer.presets import resolve

    config = resolve("demo", ["global_batch_size=128", "shuffle_window=256"])
    train = sum(shard.bytes for shard in manifest.splits["train"].shards)
    read = place.google.storage.read
    batches = iter(training_batches(config, "gs://a-bucket/data", manifest, 0))
    for _ in range(60):
        next(batches)
    del batches
    taken = sum(count for name, count in read.items() if "-train." in name)
    # A window that is used, one that waits and one that is read lie beyond the last batch.
    epochs = (60 * 128 + 3 * 256) / 640
    requests = place.google.counts["GET storage.googleapis.com: get_as_xml"]
    print(f"{len(picture)} bytes an image; training reads {taken / train / epochs:.3f} times the data, in {requests} requests")
    assert taken <= 1.05 * train * epochs
    for split in ("train", "validation"):
        read.clear()
        steps = sum(1 for _ in evaluation_batches(config.views, "gs://a-bucket/data", manifest, split, 64))
        taken = sum(count for name, count in read.items() if f"-{split}." in name)
        whole = sum(shard.bytes for shard in manifest.splits[split].shards)
        print(f"{steps} batches of {split}: {taken / whole:.3f} times the split")
        assert taken <= 1.05 * whole


@scenario
def a_folder_that_storage_does_not_show_is_not_taken_for_empty(place: World) -> None:
    os.environ |= {"GCS_RETRY_CONFIG_MAX_RETRIES": "1", "GCS_RETRY_CONFIG_INIT_DELAY_TIME_US": "1000"}
    bucket = place.google.storage.bucket("a-bucket")
    import numpy as np
    import pytest
    import tensorflow as tf

    from components.workspace import claim
    from trainer import checkpoint as checkpoints

    # Beside TensorFlow, which would remember what it saw.
    for step in (1, 2):
        checkpoints.save(str(bucket / "run"), checkpoints.Checkpoint(step, {"step": np.array(step)}, {}), keep=2)
    for where in (r"b/a-bucket/o\b", r"storage\.googleapis\.com/a-bucket/run.*checkpoint-00000002"):
        place.google.fail_for(503, 3600, where)
        with pytest.raises(tf.errors.OpError):
            checkpoints.load_latest("gs://a-bucket/run")
        place.google.faults.clear()
    latest = checkpoints.load_latest("gs://a-bucket/run")
    assert latest is not None
    assert latest.step == 2
    assert claim("gs://a-bucket/work", "a job", what="anything").folder.endswith("-1")


if __name__ == "__main__":
    with world() as place:
        os.environ.update(TRUST)
        SCENARIOS[sys.argv[1]](place)
