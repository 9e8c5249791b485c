"""The demo's raw data: crops of photographs from installed packages, in ImageNet's own raw layout.

Each photograph is a synset. Training images are crops of its left 70%, validation images of its right 30%, so no pixel is in
both. Crops of both splits have the same range of sizes.
"""

import importlib.util
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.shared.errors import UserError
from trainer.shared.files import whole_folder

SCIKIT_IMAGE, SCIKIT_LEARN, MATPLOTLIB = "skimage/data", "sklearn/datasets/images", "matplotlib/mpl-data/sample_data"
PHOTOGRAPHS = {
    "astronaut": f"{SCIKIT_IMAGE}/astronaut.png",
    "brick": f"{SCIKIT_IMAGE}/brick.png",
    "camera": f"{SCIKIT_IMAGE}/camera.png",
    "chelsea": f"{SCIKIT_IMAGE}/chelsea.png",
    "china": f"{SCIKIT_LEARN}/china.jpg",
    "coffee": f"{SCIKIT_IMAGE}/coffee.png",
    "coins": f"{SCIKIT_IMAGE}/coins.png",
    "flower": f"{SCIKIT_LEARN}/flower.jpg",
    "grace_hopper": f"{MATPLOTLIB}/grace_hopper.jpg",
    "grass": f"{SCIKIT_IMAGE}/grass.png",
    "gravel": f"{SCIKIT_IMAGE}/gravel.png",
    "hubble_deep_field": f"{SCIKIT_IMAGE}/hubble_deep_field.jpg",
    "immunohistochemistry": f"{SCIKIT_IMAGE}/ihc.png",
    "moon": f"{SCIKIT_IMAGE}/moon.png",
    "motorcycle": f"{SCIKIT_IMAGE}/motorcycle_left.png",
    "page": f"{SCIKIT_IMAGE}/page.png",
    "retina": f"{SCIKIT_IMAGE}/retina.jpg",
    "rocket": f"{SCIKIT_IMAGE}/rocket.jpg",
    "text": f"{SCIKIT_IMAGE}/text.png",
}
"""Photographs by name: package and path of the file."""

TRAIN_CROPS, VALIDATION_CROPS = 105, 30
"""Number of crops of each photograph."""
TRAIN_PART = 0.7
CROP_SIDES = (0.2, 0.6)
"""Range of a crop's height and width, relative to the shorter side of the photograph's validation part."""
LARGEST_SIDE = 128
JPEG_QUALITY = 90
_FILES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "validation_labels.txt", "synset_words.txt")


def ignore(*_: object) -> None:
    """Does nothing."""


def make_raw(folder: str, on_progress: Callable[[int, int], None] = ignore) -> None:
    """Writes the raw data to `folder`, always the same bytes, and atomically. Does nothing if `folder` already has it.

    Calls `on_progress(photographs done, photographs in all)`. Raises UserError if `folder` has other contents, or if a
    photograph is not installed.
    """
    target = Path(folder)
    if target.is_dir() and {path.name for path in target.iterdir()} >= set(_FILES):
        return
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{folder} is in the way: the demo's raw data needs a new or empty folder")
    with whole_folder(folder) as made:
        _write(Path(made), on_progress)


def _write(folder: Path, on_progress: Callable[[int, int], None]) -> None:
    synsets = {name: f"n{90000001 + number}" for number, name in enumerate(PHOTOGRAPHS)}
    validation: list[tuple[str, bytes]] = []
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w", format=tarfile.USTAR_FORMAT) as train:
        for number, (name, synset) in enumerate(synsets.items()):
            on_progress(number, len(synsets))
            photograph = _load(PHOTOGRAPHS[name])
            random = np.random.default_rng(number)
            border = round(TRAIN_PART * photograph.width)
            shorter = min(photograph.width - border, photograph.height)
            sides = (round(CROP_SIDES[0] * shorter), round(CROP_SIDES[1] * shorter))
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w", format=tarfile.USTAR_FORMAT) as of_synset:
                for image in range(TRAIN_CROPS):
                    _add(of_synset, f"{synset}_{image + 1}.JPEG", _crop(photograph, 0, border, sides, random))
            _add(train, f"{synset}.tar", inner.getvalue())
            validation += [(synset, _crop(photograph, border, photograph.width, sides, random)) for _ in range(VALIDATION_CROPS)]

    order = np.random.default_rng(len(synsets)).permutation(len(validation))
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w", format=tarfile.USTAR_FORMAT) as flat:
        for number, source in enumerate(order, start=1):
            _add(flat, f"ILSVRC2012_val_{number:08d}.JPEG", validation[source][1])
    (folder / "validation_labels.txt").write_text("".join(f"{validation[source][0]}\n" for source in order))
    (folder / "synset_words.txt").write_text("".join(f"{synset} {name}\n" for name, synset in synsets.items()))
    on_progress(len(synsets), len(synsets))


def _load(file: str) -> Image.Image:
    package, _, within = file.partition("/")
    # Found without importing the package, whose own loader might download a missing file.
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / within if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(f"the demo's photograph {file} is not installed: install the packages of the lock file")
    with Image.open(path) as image:
        return image.convert("L" if image.mode == "L" else "RGB")


def _crop(photograph: Image.Image, left: int, right: int, sides: tuple[int, int], random: np.random.Generator) -> bytes:
    """Returns a random crop between the columns left and right, as a JPEG. `sides` is the range of its sides in pixels."""
    width, height = (int(side) for side in random.integers(sides[0], sides[1], 2, endpoint=True))
    x = int(random.integers(left, right - width, endpoint=True))
    y = int(random.integers(0, photograph.height - height, endpoint=True))
    crop = photograph.crop((x, y, x + width, y + height))
    crop.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    out = io.BytesIO()
    crop.save(out, "jpeg", quality=JPEG_QUALITY)
    return out.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # without time and owner, so that the bytes are always the same
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def main() -> int:
    import argparse
    import sys

    from trainer.shared.progress import ProgressBars

    parser = argparse.ArgumentParser(prog="python -m pipelines.demo_data", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", metavar="DIR", help="folder to write the raw data to, new or empty")
    folder = parser.parse_args().folder
    try:
        with ProgressBars() as bars:
            make_raw(folder, on_progress=lambda done, total: bars("demo-raw", "drawing photographs", done, total))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: {', '.join(_FILES)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
