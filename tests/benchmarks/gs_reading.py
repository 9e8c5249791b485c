"""How fast and how much pretraining reads from Cloud Storage: with TensorFlow's defaults, and as `trainer` reads.

    PYTHONPATH=tests python -m vertex.world python tests/benchmarks/gs_reading.py [--latency 30] [--rounds 3]

A loopback server answers each request after the latency of a network, in milliseconds. The records of an epoch are read in the
order of training and not decoded. The rivals take turns, each in a process of its own, since TensorFlow reads its variables once.
The server shares the machine, so the figures are its own and only their ratios carry over.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

from vertex.scenarios import noise
from vertex.world import TRUST, world

IMAGES, SHARDS = 4096, 4
RIVALS = {
    "TensorFlow's default, 4 blocks at once": {"GCS_READAHEAD_BUFFER_SIZE_BYTES": str(64 * 2**20), "AT_ONCE": "4"},
    "8 MiB a request, 4 blocks at once": {"GCS_READAHEAD_BUFFER_SIZE_BYTES": str(8 * 2**20), "AT_ONCE": "4"},
    "blocks exactly, 4 at once": {"AT_ONCE": "4"},
    "blocks exactly, 16 at once": {"AT_ONCE": "16"},
}
_READ = f"""
import os, time, json
from trainer import input_pipeline, reading
from trainer.presets import resolve
from trainer.shared import records
reading._BLOCKS_AT_ONCE = int(os.environ["AT_ONCE"])
if os.environ.get("GCS_READAHEAD_BUFFER_SIZE_BYTES") != "65536":
    # As it was: a buffer of 1 MiB instead of the block's size.
    import numpy as np
    real = input_pipeline.blocks_of
    def blocks(*args):
        found = real(*args)
        return found._replace(sizes=np.full_like(found.sizes, 2**20))
    input_pipeline.blocks_of = blocks
manifest = records.read_manifest("gs://a-bucket/data")
config = resolve("demo", ["shuffle_window=1024"])
batch_size = config.optimizer.global_batch_size
windows = iter(input_pipeline._in_order(batch_size, config.run, "gs://a-bucket/data", manifest, 0, 0, 1))
begun, images = time.monotonic(), 0
while images < {IMAGES}:
    images += int(next(windows)["serialized"].shape[0])
print(json.dumps(images / (time.monotonic() - begun)))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--latency", type=float, default=30, help="milliseconds (default: 30)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with world() as place:
        os.environ.update(TRUST)
        from support.datasets import write_dataset

        picture = noise(250)
        folder = place.google.storage.bucket("a-bucket") / "data"
        write_dataset(folder, train=IMAGES, validation=64, shards=SHARDS, picture=lambda label, random: picture)
        size = sum(file.stat().st_size for file in folder.glob("*train*"))
        place.google.latency = args.latency / 1000
        speeds: dict[str, list[float]] = {name: [] for name in RIVALS}
        read: dict[str, float] = {}
        for _ in range(args.rounds):
            for name, environ in RIVALS.items():
                place.google.storage.read.clear()
                command = [sys.executable, "-c", _READ]
                done = subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True, check=True)
                speeds[name].append(json.loads(done.stdout.splitlines()[-1]))
                read[name] = sum(count for path, count in place.google.storage.read.items() if "-train." in path) / size
    first, *_ = RIVALS
    print(f"{len(picture) / 1000:.0f} KB an image, {size / 1e6:.0f} MB, {args.latency:g} ms a request, {args.rounds} rounds")
    for name, found in speeds.items():
        ratio = statistics.median(one / base for one, base in zip(found, speeds[first], strict=True))
        print(f"{name:<40} {statistics.median(found):>7.0f} images/s, {ratio:.2f} times the first, reads {read[name]:.2f} epochs")


if __name__ == "__main__":
    main()
