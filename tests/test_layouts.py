"""ImageNet as people have it: every layout gives the dataset that the official archives of the same images give."""

import gzip
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
from support.raw_data import LABELS, SYNSETS, TRAIN, VALIDATION, picture, tar, train_images, validation_images, write_raw

from beam_jobs import unpack
from beam_jobs.build_tfrecords import main
from beam_jobs.job import build, plan_only
from beam_jobs.layouts import kaggle
from trainer.shared.errors import UserError
from trainer.shared.records import read_manifest

TRAINING = train_images()
VALIDATING = dict(zip(validation_images(), zip(LABELS, validation_images().values(), strict=True), strict=True))
"""Name -> (synset, bytes)."""


def write_all(images: dict[Path, bytes]) -> None:
    for path, content in images.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_training(folder: Path, within: str = "") -> None:
    write_all({folder / synset / within / name: one for synset, images in TRAINING.items() for name, one in images.items()})


def as_kaggle(folder: Path) -> Path:
    base = folder / "ILSVRC" / "Data" / "CLS-LOC"
    write_training(base / "train")
    write_all({base / "val" / name: one for name, (_, one) in VALIDATING.items()})
    write_all({base / "test" / "ILSVRC2012_test_00000001.JPEG": picture(1)})
    rows = [f"{Path(name).stem},{synset} 1 2 3 4 {synset} 5 6 7 8 " for name, (synset, _) in VALIDATING.items()]
    (folder / kaggle.LABELS).write_text("\r\n".join(["ImageId,PredictionString", *reversed(rows)]) + "\r\n")
    (folder / "LOC_synset_mapping.txt").write_text("".join(f"{synset} a class, of its own\n" for synset in SYNSETS))
    return folder


def as_tiny_imagenet(folder: Path) -> Path:
    for synset in SYNSETS:
        write_all({folder / "train" / synset / f"{synset}_boxes.txt": f"{synset}_0.JPEG\t0\t10\t63\t58\n".encode()})
    write_training(folder / "train", "images")
    write_all({folder / "val" / "images" / name: one for name, (_, one) in VALIDATING.items()})
    lines = [f"{name}\t{synset}\t0\t32\t44\t62\n" for name, (synset, _) in VALIDATING.items()]
    (folder / "val" / "val_annotations.txt").write_text("".join(reversed(lines)))
    (folder / "wnids.txt").write_text("\n".join(reversed(SYNSETS)))
    write_all({folder / "test" / "images" / "test_0.JPEG": picture(1)})
    return folder


def with_synset(name: str, synset: str) -> str:
    return f"{Path(name).stem}_{synset}.JPEG"


def shuffled(seed: int) -> list[tuple[str, int, bytes]]:
    """Training images as Hugging Face names them, with labels, in no order."""
    images = [
        (with_synset(name, synset), label, one) for label, synset in enumerate(SYNSETS) for name, one in TRAINING[synset].items()
    ]
    return [images[place] for place in np.random.default_rng(seed).permutation(len(images))]


def as_parquet(folder: Path) -> Path:
    validating = [(with_synset(name, synset), SYNSETS.index(synset), one) for name, (synset, one) in VALIDATING.items()]
    training = shuffled(0)
    parts = {f"train-{number:05d}-of-00003-0a1b2c3d4e5f": training[number::3] for number in range(3)}
    parts |= {"validation-00000-of-00001": validating[::-1], "test-00000-of-00001": [("ILSVRC2012_test_1.JPEG", -1, b"")]}
    for name, images in parts.items():
        rows = {
            "image": pa.array(
                [{"bytes": one, "path": path} for path, _, one in images],
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            ),
            "label": pa.array([label for _, label, _ in images], pa.int64()),
        }
        (folder / "data").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(rows), folder / "data" / f"{name}.parquet", row_group_size=10)
    return folder


def as_hugging_face_archives(folder: Path) -> Path:
    training = shuffled(1)
    for number in range(2):
        write_all({folder / "data" / f"train_images_{number}.tar.gz": zipped({n: c for n, _, c in training[number::2]})})
    validating = {with_synset(name, synset): one for name, (synset, one) in reversed(VALIDATING.items())}
    write_all({folder / "data" / "val_images.tar.gz": zipped(validating)})
    write_all({folder / "data" / "test_images.tar.gz": zipped({"ILSVRC2012_test_00000001.JPEG": picture(1)})})
    return folder


def zipped(members: dict[str, bytes]) -> bytes:
    return gzip.compress(tar(members), 1)


def as_tfds(folder: Path) -> Path:
    import tensorflow_datasets as tfds

    class Imagenet2012(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("5.1.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=list(SYNSETS[::-1])),
                "file_name": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            training = [(name, synset, one) for synset, images in TRAINING.items() for name, one in images.items()]
            validating = [(name, synset, one) for name, (synset, one) in VALIDATING.items()]
            return {"train": self._generate_examples(training), "validation": self._generate_examples(validating)}

        def _generate_examples(self, images):
            for name, synset, one in images:
                yield name, {"image": io.BytesIO(one), "label": synset, "file_name": name}

    builder = Imagenet2012(data_dir=str(folder / "data_dir"))
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=2))
    return Path(builder.data_dir)


LAYOUTS = {
    "kaggle": as_kaggle,
    "tiny imagenet": as_tiny_imagenet,
    "hugging face parquet": as_parquet,
    "hugging face archives": as_hugging_face_archives,
    "tfds": as_tfds,
}
STREAMED = ("hugging face parquet", "hugging face archives", "tfds")


@pytest.fixture(scope="module")
def as_layout(tmp_path_factory):
    """Raw folders by layout, made when first asked for. Tests that change one take a copy."""
    made: dict[str, Path] = {}

    def get(layout: str) -> Path:
        if layout not in made:
            made[layout] = LAYOUTS[layout](tmp_path_factory.mktemp("raw"))
        return made[layout]

    return get


@pytest.fixture(scope="module")
def fingerprint(built):
    return read_manifest(str(built)).fingerprint


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_fingerprint_of_the_archives(layout, as_layout, fingerprint, tmp_path):
    raw, output = as_layout(layout), tmp_path / "output"
    for _ in range(2):  # the second finds that the dataset is there
        manifest = build(str(raw), str(output))
        assert manifest.fingerprint == fingerprint
    assert manifest.synsets == SYNSETS
    assert manifest == read_manifest(str(output))
    assert not (output / ".unpacked").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dry_run_says_the_layout_and_leaves_nothing(layout, as_layout, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["--raw", str(as_layout(layout)), "--output", str(tmp_path / "output"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"train is read as {layout}: " in said
    assert "train: 150 images" in said
    assert "validation: 20 images" in said
    assert ("disk: " in said) == (layout in STREAMED and layout != "tfds")
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_checks_the_images_of_a_stream(tmp_path):
    images = {
        "n01000001_1_n01000001.JPEG": picture(1),
        "n01000001_2_n01000001.JPEG": picture(2, kind="png"),
        "n01000001_3_n01000001.JPEG": b"not an image",
    }
    write_all({tmp_path / "raw" / "train_images_0.tar.gz": zipped(images)})
    planned = plan_only(str(tmp_path / "raw"), str(tmp_path / "output"), validation=False)
    split = planned.splits["train"]
    assert split.images == 2
    within = "train_images_0.tar.gz/n01000001_"
    assert split.repaired == ({"source": f"{within}2.JPEG", "done": "PNG RGB to JPEG RGB"},)
    assert split.rejected == ({"source": f"{within}3.JPEG", "reason": "is not an image"},)
    assert planned.unpacked == sum(map(len, images.values()))
    manifest = build(str(tmp_path / "raw"), str(tmp_path / "output"), validation=False, on_bad_image="skip")
    assert manifest.splits["train"].rejected == split.rejected


def test_a_killed_job_unpacks_only_the_files_that_are_left(as_layout, fingerprint, tmp_path, monkeypatch):
    raw, output = as_layout("hugging face parquet"), tmp_path / "output"
    unpacked: list[str] = []
    images = type(unpack.make_work(str(raw), "", None).sources[0].stream).images

    def dies_in(last):
        def dying(self, folder, name):
            unpacked.append(name)
            for number, image in enumerate(images(self, folder, name)):
                if name == last and number == 20:
                    raise KeyboardInterrupt
                yield image

        return dying

    monkeypatch.setattr("beam_jobs.job.local_writers", lambda processes: unpack.Writers())
    stream = "beam_jobs.layouts.hugging_face_parquet.HuggingFaceParquet.images"
    monkeypatch.setattr(stream, dies_in("data/train-00002-of-00003-0a1b2c3d4e5f.parquet"))
    with pytest.raises(KeyboardInterrupt):
        build(str(raw), str(output))
    first = unpacked[:]
    assert first
    assert not (output / "manifest.json").exists()
    unpacked.clear()
    monkeypatch.setattr(stream, dies_in("no file"))
    assert build(str(raw), str(output)).fingerprint == fingerprint
    assert sorted({*first, *unpacked}) == sorted(path.relative_to(raw).as_posix() for path in raw.glob("data/[tv][ra]*.parquet"))
    assert set(first) & set(unpacked) == {first[-1]}


def test_the_finished_dataset_is_not_unpacked_again(as_layout, tmp_path, monkeypatch):
    raw, output = as_layout("hugging face archives"), tmp_path / "output"
    build(str(raw), str(output))
    monkeypatch.setattr(unpack, "unpack_source", lambda work, number: pytest.fail("it was read again"))
    build(str(raw), str(output))
    copy = Path(shutil.copytree(raw, tmp_path / "raw"))
    write_all({copy / "data" / "train_images_1.tar.gz": zipped({"n01000001_1_n01000001.JPEG": picture(1)})})
    with pytest.raises(UserError, match="has a finished dataset"):
        build(str(copy), str(output))


def test_a_subset_is_unpacked_alone(as_layout, tmp_path, monkeypatch):
    (tmp_path / "subset.txt").write_text(f"{SYNSETS[0]}\n{SYNSETS[2]}\n")
    wholes = {}
    for name, options in {"some": {"subset": str(tmp_path / "subset.txt")}, "all": {}}.items():
        planned = plan_only(str(as_layout("hugging face parquet")), str(tmp_path / "output"), **options)
        wholes[name] = planned.unpacked
    assert wholes["some"] < 0.8 * wholes["all"]
    raw = write_raw(tmp_path / "raw", TRAINING, {name: one for name, (_, one) in VALIDATING.items()}, LABELS)
    found = [
        build(str(folder), str(tmp_path / f"of-{number}"), subset=str(tmp_path / "subset.txt")).fingerprint
        for number, folder in enumerate((raw, as_layout("hugging face parquet"), as_layout("tfds")))
    ]
    assert len(set(found)) == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_unpack_alike(processes, as_layout, fingerprint, tmp_path):
    raw = as_layout("hugging face archives")
    assert build(str(raw), str(tmp_path / "output"), processes=processes).fingerprint == fingerprint


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("layout", "spoil", "says"),
    [
        (
            "hugging face archives",
            lambda raw: cut(raw / "data/train_images_0.tar.gz", -2_000),
            "_0.tar.gz cannot be read to its end",
        ),
        (
            "hugging face archives",
            lambda raw: cut(raw / "data/val_images.tar.gz", -1),
            "val_images.tar.gz cannot be read to its end",
        ),
        (
            "hugging face archives",
            lambda raw: (raw / "data/val_images.tar.gz").write_bytes(zipped({"a.JPEG": picture(1)})),
            "val_images.tar.gz has an image named 'a.JPEG': names must end in the synset",
        ),
        (
            "hugging face parquet",
            lambda raw: cut(next(raw.glob("data/train-00001*")), 20_000),
            "cannot be read as ImageNet's Parquet",
        ),
        (
            "hugging face parquet",
            lambda raw: next(raw.glob("data/train-00001*")).unlink(),
            "train-00001-of-00003 of 3 files are mis",
        ),
        ("tfds", lambda raw: cut(raw / "imagenet2012-train.tfrecord-00001-of-00002", 40_000), "00001-of-00002 is cut off"),
        ("tfds", lambda raw: (raw / "imagenet2012-train.tfrecord-00000-of-00002").unlink(), "train.tfrecord-00000-of-00002 of 2"),
        (
            "tfds",
            lambda raw: (raw / "imagenet2012-train.tfrecord-00000-of-00002").write_bytes(b""),
            "has 0 records where dataset_info",
        ),
        (
            "tiny imagenet",
            lambda raw: shutil.rmtree(raw / "train" / SYNSETS[0]),
            f"train/{SYNSETS[0]}/images/ has no images, and wnids",
        ),
        ("tiny imagenet", lambda raw: write_all({raw / "train" / "a.JPEG": b"x"}), "train/a.JPEG is not in train/SYNSET/images/"),
        (
            "tiny imagenet",
            lambda raw: write_all({raw / "val/images/a.JPEG": b"x"}),
            "val_annotations.txt has no label for a.JPEG",
        ),
        (
            "kaggle",
            lambda raw: (raw / "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000003.JPEG").unlink(),
            "LOC_val_solution.csv has a label for ILSVRC2012_val_00000003, which is not there",
        ),
    ],
)
def test_what_is_missing_or_cut_off_is_named(layout, spoil, says, as_layout, tmp_path):
    raw = Path(shutil.copytree(as_layout(layout), tmp_path / "raw"))
    spoil(raw)
    planned = plan_only(str(raw), str(tmp_path / "output"))
    assert any(says in problem for problem in planned.problems), planned.problems
    with pytest.raises(UserError) as caught:
        build(str(raw), str(tmp_path / "output"))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "output").glob("*.tfrecord-*"))


@pytest.mark.parametrize("within", ["ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"])
def test_kaggles_folder_is_found_from_any_of_its_levels(within, as_layout, fingerprint, tmp_path, monkeypatch):
    monkeypatch.chdir(as_layout("kaggle"))
    assert build(within, str(tmp_path / "output")).fingerprint == fingerprint


META = [("WNID", "O"), ("ILSVRC2012_ID", "f8"), ("num_children", "f8")]


def write_devkit(folder: Path, packed: bool) -> None:
    """The devkit numbers the classes in an order of its own, and has inner nodes of the hierarchy after them."""
    numbers = {SYNSETS[2]: 1, SYNSETS[0]: 2, SYNSETS[1]: 3}
    data = folder / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    table = np.array([(synset, number, 0) for synset, number in numbers.items()] + [("n00000001", 4, 3)], META)
    scipy.io.savemat(data / "meta.mat", {"synsets": table.reshape(-1, 1)})
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{numbers[synset]}\n" for synset in LABELS))
    if packed:
        with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
            archive.add(data.parent, "ILSVRC2012_devkit_t12")
        shutil.rmtree(data.parent)


def without_labels(folder: Path, raw: Path) -> Path:
    folder.mkdir()
    for name in (TRAIN, VALIDATION):
        (folder / name).symlink_to(raw / name)
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_the_devkit_has_the_labels(packed, raw, fingerprint, tmp_path):
    folder = without_labels(tmp_path / "raw", raw)
    write_devkit(folder, packed)
    assert build(str(folder), str(tmp_path / "output")).fingerprint == fingerprint


def test_a_ground_truth_that_does_not_fit_is_refused(raw, tmp_path):
    folder = without_labels(tmp_path / "raw", raw)
    write_devkit(folder, packed=False)
    data = folder / "ILSVRC2012_devkit_t12" / "data"
    truth = data / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("1\n4\n")
    with pytest.raises(UserError, match="line 2: 4 is not an ILSVRC2012_ID"):
        build(str(folder), str(tmp_path / "output"))
    (data / "meta.mat").unlink()
    with pytest.raises(UserError, match=r"meta.mat is missing"):
        build(str(folder), str(tmp_path / "output"))


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_the_folder_of_validation_images_has_other_names_too(name, fingerprint, tmp_path):
    write_training(tmp_path / "raw" / "train")
    write_all({tmp_path / "raw" / name / synset / image: one for image, (synset, one) in VALIDATING.items()})
    assert build(str(tmp_path / "raw"), str(tmp_path / "output")).fingerprint == fingerprint


def test_training_images_alone_are_converted_when_asked_for(as_layout, built, tmp_path, capsys):
    raw = tmp_path / "raw"
    write_training(raw / "train")
    arguments = ["--raw", str(raw), "--output", str(tmp_path / "output"), "--num-shards", "2"]
    assert main(arguments) == 2
    assert "give --no-validation for pretraining without linear eval" in capsys.readouterr().err
    assert main([*arguments, "--no-validation", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"].keys() == {"train"}
    manifest, whole = read_manifest(str(tmp_path / "output")), read_manifest(str(built))
    assert manifest.splits == {"train": whole.splits["train"]}
