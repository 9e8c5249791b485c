"""Whether ImageNet's number of images fits: 1,000 synsets, 1,281,167 training and 50,000 validation images, all tiny.

    python tests/benchmarks/conversion_scale.py --folder DIR [--convert]

Writes the two raw archives in their nested layout to a new folder within DIR (about 2 GB, removed at the end), then indexes and
plans them as the job does: through Beam, up to one group of references for each shard, of which there are 1,100 as of the real
images. With --convert, the whole conversion. Says how long it took and the peak memory of all processes.
"""

import argparse
import io
import resource
import tarfile
import tempfile
import time
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import apache_beam as beam
import numpy as np
from PIL import Image

from beam_jobs import convert, transforms
from beam_jobs.job import build
from beam_jobs.layouts.archives import TRAIN_ARCHIVE, VALIDATION_ARCHIVE
from beam_jobs.layouts.labels import VALIDATION_LABELS
from beam_jobs.plan import make_plan
from beam_jobs.raw import SPLITS
from beam_jobs.references import PackedReference

SYNSETS, TRAIN, VALIDATION, SHARDS = 1000, 1_281_167, 50_000, 1100
VARIANTS = 50
"""Different images of a synset. Its other images repeat them."""


def tiny(label: int, variant: int) -> bytes:
    """Returns a JPEG of 8x8 pixels: the picture of its synset under noise, so that a classifier can learn something."""
    picture, noise = (np.random.default_rng(seed).normal(size=(8, 8)) for seed in ((label,), (label, variant)))
    out = io.BytesIO()
    Image.fromarray(np.clip(128 + 30 * (picture + noise), 0, 255).astype(np.uint8)).save(out, "jpeg", quality=20)
    return out.getvalue()


def write_raw(folder: Path, train: int = TRAIN, validation: int = VALIDATION, content: bytes = b"") -> None:
    """Writes both archives and the labels into a new folder. Every image is `content`, by default a tiny JPEG of its synset."""

    @cache
    def image(label: int, variant: int) -> bytes:
        return content or tiny(label, variant)

    def members(names: list[str], labels: Sequence[int]) -> bytes:
        blocks, different = [], len(set(labels))
        for number, (name, label) in enumerate(zip(names, labels, strict=True)):
            encoded = image(label, number // different % VARIANTS)
            member = tarfile.TarInfo(name)
            member.size = len(encoded)
            blocks += [member.tobuf(tarfile.USTAR_FORMAT), encoded, bytes(-len(encoded) % tarfile.BLOCKSIZE)]
        return b"".join(blocks) + bytes(2 * tarfile.BLOCKSIZE)

    folder.mkdir()
    synsets = [f"n{90000000 + label}" for label in range(SYNSETS)]
    cuts = np.linspace(0, train, SYNSETS + 1).astype(int)
    with tarfile.open(folder / TRAIN_ARCHIVE, "w") as outer:
        for label, synset in enumerate(synsets):
            count = cuts[label + 1] - cuts[label]
            inner = members([f"{synset}_{number}.JPEG" for number in range(count)], [label] * count)
            member = tarfile.TarInfo(f"{synset}.tar")
            member.size = len(inner)
            outer.addfile(member, io.BytesIO(inner))
    labels = [number % SYNSETS for number in range(validation)]
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, validation + 1)]
    (folder / VALIDATION_ARCHIVE).write_bytes(members(names, labels))
    (folder / VALIDATION_LABELS).write_text("".join(f"{synsets[label]}\n" for label in labels))


def index_and_plan(raw: Path, output: Path) -> int:
    """Returns how many images the groups refer to."""
    plan = make_plan(str(raw), str(output), num_shards=SHARDS)
    seen = output / "counts"
    seen.mkdir(parents=True)

    def count(grouped: tuple[convert.ShardKey, Iterable[list[PackedReference]]]) -> None:
        (_, file), groups = grouped
        (seen / file).write_text(str(sum(map(len, groups))))

    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        indexed = pipeline | transforms.Index(plan)
        counts = indexed | beam.Map(convert.count_images)
        grouped = indexed | beam.FlatMap(convert.assign_ids, plan, beam.pvalue.AsDict(counts)) | beam.GroupByKey()
        grouped | beam.Map(count)
    found = [int(path.read_text()) for path in seen.iterdir()]
    assert len(found) == SHARDS * len(SPLITS)
    return sum(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--folder", default=tempfile.gettempdir(), metavar="DIR")
    parser.add_argument("--convert", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scale-", dir=args.folder) as folder:
        raw, output = Path(folder) / "raw", Path(folder) / "output"
        write_raw(raw)
        begun = time.perf_counter()
        if args.convert:
            manifest = build(str(raw), str(output), num_shards=SHARDS)
            count = sum(split.records for split in manifest.splits.values())
        else:
            count = index_and_plan(raw, output)
        seconds = time.perf_counter() - begun
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        what = "converted" if args.convert else "indexed and planned"
        print(f"{count:,} images {what} in {seconds:.0f} s, peak {peak:,.0f} MB")
        assert count == TRAIN + VALIDATION


if __name__ == "__main__":
    main()
