"""How fast the conversion is, beside what else one could do with the same images, all in one run.

    python tests/benchmarks/conversion.py --images 3000 60000 --folder DIR

Makes N distinct JPEGs of about 100 KB in ImageNet's raw layout (60 synsets, a twentieth of them validation images) in a new
folder within DIR, removed at the end; 60,000 take 6 GB and as much again for the output. Each contestant runs in a process of its
own, on raw data that is in the page cache, in turns; what is said is the median of the rounds. `seconds` begin after imports,
`command` is all of the process; CPU is that of the process and its children; memory is the peak of their proportional set
sizes, sampled. Contestants:

    cp      the two raw archives copied
    loop    tarfile, tf.train.Example, tf.io.TFRecordWriter
    tfds    a tfds.core.GeneratorBasedBuilder, download_and_prepare
    job-N   beam_jobs.build_tfrecords in N processes
"""

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

CONTESTANTS = ("cp", "loop", "tfds", "job-1", "job-2")
SYNSETS = 60
IMAGES_PER_SHARD = 1200
RAW_FILES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")


def photographs() -> list[bytes]:
    """JPEGs of about 100 KB of photographs that come inside installed packages."""
    from PIL import Image
    from skimage import data

    made = []
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        image = Image.fromarray(getattr(data, name)()).convert("RGB").resize((500, 375), Image.Resampling.LANCZOS)
        for quality in range(99, 40, -1):
            out = io.BytesIO()
            image.save(out, "jpeg", quality=quality, subsampling=0)
            if out.tell() <= 105_000:
                break
        # A comment makes up what is missing, as cameras' notes do in real files.
        made.append(commented(out.getvalue(), bytes(max(0, min(100_000 - out.tell(), 65_000)))))
    return made


def commented(jpeg: bytes, comment: bytes) -> bytes:
    return jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2) + comment + jpeg[2:]


def make_raw(folder: Path, num_images: int) -> None:
    pictures = photographs()

    def add(archive: tarfile.TarFile, name: str, number: int) -> None:
        content = commented(pictures[number % len(pictures)], number.to_bytes(8))
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))

    folder.mkdir(parents=True)
    validation = num_images // 20
    per_class = (num_images - validation) // SYNSETS
    synsets = [f"n{label:08d}" for label in range(SYNSETS)]
    with tarfile.open(folder / RAW_FILES[0], "w") as outer:
        for label, synset in enumerate(synsets):
            inner = folder / "inner.tar"
            with tarfile.open(inner, "w") as archive:
                for number in range(per_class):
                    add(archive, f"{synset}_{number}.JPEG", label * per_class + number)
            outer.add(inner, f"{synset}.tar")
            inner.unlink()
    with tarfile.open(folder / RAW_FILES[1], "w") as archive:
        for number in range(validation):
            add(archive, f"ILSVRC2012_val_{number:08d}.JPEG", num_images + number)
    (folder / "validation_labels.txt").write_text("".join(f"{synsets[number % SYNSETS]}\n" for number in range(validation)))


def raw_images(raw: Path) -> Iterator[tuple[str, str, bytes]]:
    """(split, synset, JPEG) as a plain loop reads them."""
    with tarfile.open(raw / RAW_FILES[0]) as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                for image in inner:
                    yield "train", member.name.removesuffix(".tar"), inner.extractfile(image).read()
    labels = (raw / "validation_labels.txt").read_text().split()
    with tarfile.open(raw / RAW_FILES[1]) as archive:
        for synset, image in zip(labels, archive, strict=True):
            yield "validation", synset, archive.extractfile(image).read()


def run_cp(raw: Path, output: Path) -> float:
    output.mkdir()
    begun = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", *(str(raw / name) for name in RAW_FILES), str(output)], check=True)
    return time.perf_counter() - begun


def run_loop(raw: Path, output: Path) -> float:
    import tensorflow as tf

    output.mkdir()
    begun = time.perf_counter()
    ranks = {f"n{label:08d}": label for label in range(SYNSETS)}
    writer = None
    for number, (_, synset, encoded) in enumerate(raw_images(raw)):
        if number % IMAGES_PER_SHARD == 0:
            if writer:
                writer.close()
            writer = tf.io.TFRecordWriter(str(output / f"{number // IMAGES_PER_SHARD:05d}.tfrecord"))
        feature = {
            "image/encoded": tf.train.Feature(bytes_list=tf.train.BytesList(value=[encoded])),
            "image/class/label": tf.train.Feature(int64_list=tf.train.Int64List(value=[ranks[synset]])),
            "image/ID": tf.train.Feature(int64_list=tf.train.Int64List(value=[number])),
        }
        writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())
    writer.close()
    return time.perf_counter() - begun


def run_tfds(raw: Path, output: Path) -> float:
    import numpy as np
    import tensorflow_datasets as tfds

    class Images(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image/encoded": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                "image/class/label": tfds.features.ClassLabel(names=[f"n{label:08d}" for label in range(SYNSETS)]),
                "image/ID": np.int64,
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in ("train", "validation")}

        def _generate_examples(self, split):
            for number, (of_split, synset, encoded) in enumerate(raw_images(raw)):
                if of_split == split:
                    yield number, {"image/encoded": io.BytesIO(encoded), "image/class/label": synset, "image/ID": number}

    begun = time.perf_counter()
    Images(data_dir=str(output)).download_and_prepare()
    return time.perf_counter() - begun


def run_job(raw: Path, output: Path, processes: int) -> float:
    from beam_jobs.job import build

    begun = time.perf_counter()
    build(str(raw), str(output), processes=processes)
    return time.perf_counter() - begun


def run(contestant: str, raw: Path, output: Path) -> float:
    if contestant.startswith("job-"):
        return run_job(raw, output, int(contestant.removeprefix("job-")))
    return {"cp": run_cp, "loop": run_loop, "tfds": run_tfds}[contestant](raw, output)


def descendants(process: int) -> list[int]:
    found = [process]
    for one in found:
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return found


def proportional_memory(process: int) -> float:
    """MB that a process and its descendants have, what they share counted once."""
    total = 0
    for one in descendants(process):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def measure(contestant: str, raw: Path, output: Path) -> dict[str, float]:
    for name in RAW_FILES:
        with (raw / name).open("rb") as file:
            while file.read(2**24):
                pass
    os.sync()
    before = os.times()
    begun = time.perf_counter()
    command = [sys.executable, __file__, "--run", contestant, "--raw", str(raw), "--output", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = 0.0
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.1):
            try:
                peak = max(peak, proportional_memory(process.pid))
            except OSError:
                continue

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    out, errors = process.communicate()
    ended.set()
    watcher.join()
    whole = time.perf_counter() - begun
    after = os.times()
    if process.returncode:
        raise SystemExit(errors)
    shutil.rmtree(output)
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    return {"seconds": float(out.splitlines()[-1]), "command": whole, "cpu": cpu, "memory": peak}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--images", type=int, nargs="+", default=[3000], metavar="N")
    parser.add_argument("--folder", default=tempfile.gettempdir(), metavar="DIR", help="where there is room")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--raw", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(run(args.run, args.raw, args.output))
        return
    for num_images in args.images:
        with tempfile.TemporaryDirectory(prefix="conversion-", dir=args.folder) as folder:
            raw = Path(folder) / "raw"
            make_raw(raw, num_images)
            count = sum(1 for _ in raw_images(raw)) if num_images <= 3000 else num_images
            size = sum((raw / name).stat().st_size for name in RAW_FILES)
            print(f"\n{count:,} images, {size / 1e6:,.0f} MB, {os.cpu_count()} CPUs, {args.rounds} rounds")
            rounds: dict[str, list[dict[str, float]]] = {contestant: [] for contestant in args.contestants}
            for _ in range(args.rounds):
                for contestant in args.contestants:
                    rounds[contestant].append(measure(contestant, raw, Path(folder) / "output"))
                    print(contestant, json.dumps(rounds[contestant][-1]), file=sys.stderr, flush=True)
            print("| | images/s | least-most | command, s | CPU an image, us | peak memory, MB |\n|---|---|---|---|---|---|")
            for contestant, found in rounds.items():
                middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
                rates = sorted(count / one["seconds"] for one in found)
                columns = (
                    f"{count / middle['seconds']:,.0f}",
                    f"{rates[0]:,.0f}-{rates[-1]:,.0f}",
                    f"{middle['command']:.1f}",
                    f"{middle['cpu'] / count * 1e6:.0f}",
                    f"{middle['memory']:.0f}",
                )
                print(f"| {contestant} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
