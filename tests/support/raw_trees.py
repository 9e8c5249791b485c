"""Random raw data, as it might lie anywhere, and a naive reader that says what a conversion of it must hold."""

import io
import os
import re
import tarfile
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from beam_jobs.layouts.archives import TRAIN_ARCHIVE, VALIDATION_ARCHIVE
from beam_jobs.layouts.labels import VALIDATION_LABELS

LATIN_1 = os.fsdecode("é".encode("latin-1"))
CLASSES = ("n01440764", "n02", "great white", "café", "cafe\u0301s", f"caf{LATIN_1}", "1", "B")
STEMS = ("img", "IMG_", "a b", "é", "e\u0301x", LATIN_1, "n01_", "")
ENDINGS = (".JPEG", ".JPEG", ".jpg", ".png", "")
FOLDERS = ("more", "a b", "x.y", "É", "F0")
JUNK = (
    ".DS_Store",
    "._x.JPEG",
    "Thumbs.db",
    "desktop.ini",
    "n01_boxes.txt",
    "a.xml",
    "notes.txt",
    "__MACOSX/x.JPEG",
    ".git/x.JPEG",
)
FAULTS = (
    *("twice", "concatenated", "outer concatenated", "validation concatenated", "empty class", "only junk", "trailing junk"),
    *("gzip", "cut off", "stray", "label missing", "label too many", "label unknown", "unpadded", "link", "two forms"),
)
Images = dict[str, bytes]
"""Content by path."""


class NotWholeError(Exception):
    """The naive reader would not know what to take."""


@dataclass
class Truth:
    """What a conversion must hold."""

    train: list[tuple[int, bytes]] = field(default_factory=list)
    """(label, content) by image ID."""
    validation: list[tuple[int, bytes]] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=lambda: {"train": 0, "validation": 0})
    """Number of entries by split."""
    junk: dict[str, int] = field(default_factory=lambda: {"train": 0, "validation": 0})
    links: dict[str, int] = field(default_factory=lambda: {"train": 0, "validation": 0})
    """Number of members that are no plain files, by split."""


def write_tree(folder: Path, random: Random, content: Callable[[int], bytes]) -> str:
    """Writes random raw data and returns the fault in it, or "" if there is none.

    content: the bytes of the image of a number
    """
    fault = random.choice(FAULTS) if random.random() < 0.4 else ""
    synsets = random.sample(CLASSES, random.randint(2, 4))
    numbers = iter(range(10_000))
    train = {synset: _images(random, numbers, content, random.randint(1, 5)) for synset in synsets}
    digits = 1 if fault == "unpadded" else 4
    count = 12 if fault == "unpadded" else random.randint(1, 12)
    validation = {f"val_{number:0{digits}}.JPEG": content(9000 + number) for number in range(count)}
    labels = dict(zip(sorted(validation), [random.choice(synsets) for _ in validation], strict=True))
    for images in (*train.values(), validation):
        for name in random.sample(JUNK, random.choice((0, 0, 1, 3))):
            images[name] = b"junk"
    if fault == "only junk":
        train[synsets[0]] = {"Thumbs.db": b"junk"}
    if fault == "two forms":
        train[synsets[0]] |= {unicodedata.normalize(form, "éé.JPEG"): content(8000) for form in ("NFC", "NFD")}
    folder.mkdir(parents=True)
    _write_train(folder, random, train, fault)
    _write_validation(folder, random, validation, labels, fault)
    return fault


def _images(random: Random, numbers, content: Callable[[int], bytes], count: int) -> Images:
    images: Images = {}
    for number in (next(numbers) for _ in range(count)):
        folders = [random.choice(FOLDERS) for _ in range(random.choice((0, 0, 0, 1, 2)))]
        images["/".join((*folders, f"{random.choice(STEMS)}{number}{random.choice(ENDINGS)}"))] = content(number)
    return images


def _tar(random: Random, images: Images, link: bool = False, twice: bool = False) -> bytes:
    out = io.BytesIO()
    kind = random.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(fileobj=out, mode="w", format=kind, encoding="utf-8", errors="surrogateescape") as archive:
        names = list(images)
        random.shuffle(names)
        for name in (*names, *names[: int(twice)]):
            member = tarfile.TarInfo(random.choice(("", "./")) + name)
            member.size = len(images[name])
            archive.addfile(member, io.BytesIO(images[name]))
        if link:
            member = tarfile.TarInfo("val_9999.JPEG")
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(member)
        if random.random() < 0.2:
            member = tarfile.TarInfo("nothing")
            member.type = tarfile.DIRTYPE
            archive.addfile(member)
    return out.getvalue()


def _write_files(folder: Path, images: Images) -> None:
    for name, content in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _spoiled(tar: bytes, random: Random, fault: str) -> bytes:
    return {
        "concatenated": tar + _tar(random, {"second.JPEG": b"x"}),
        "trailing junk": tar + b"junk",
        "gzip": b"\x1f\x8b\x08" + bytes(1000),
        "cut off": tar[: len(tar) - 10240],
    }.get(fault, tar)


def _write_train(folder: Path, random: Random, train: dict[str, Images], fault: str) -> None:
    spoiled = next(iter(train))
    tars = {}
    for synset, images in train.items():
        is_spoiled = synset == spoiled
        tar = _tar(random, images, is_spoiled and fault == "link", is_spoiled and fault == "twice")
        tars[f"{synset}.tar"] = _spoiled(tar, random, fault) if is_spoiled else tar
    if fault == "empty class":
        tars["n09.tar"] = _tar(Random(1), {})
    if fault == "stray":
        tars["stray.JPEG"] = b"x"
    if random.random() < 0.5:
        junk = dict.fromkeys(random.sample(("._n01.tar", ".DS_Store", "notes.txt"), random.choice((0, 2))), b"junk")
        outer = _tar(random, tars | junk)
        (folder / TRAIN_ARCHIVE).write_bytes(outer + outer if fault == "outer concatenated" else outer)
        return
    for synset, images in train.items():
        if random.random() < 0.5 or (
            synset == spoiled and fault in ("link", "twice", "concatenated", "trailing junk", "gzip", "cut off")
        ):
            _write_files(folder / "train", {f"{synset}.tar": tars[f"{synset}.tar"]})
        else:
            _write_files(folder / "train" / synset, images)
    if random.random() < 0.3:
        _write_files(folder / "train", dict.fromkeys(random.sample(JUNK, 2), b"junk"))
    if fault == "empty class":
        (folder / "train" / "n09").mkdir()
    if fault == "stray":
        (folder / "train" / "stray.JPEG").write_bytes(b"x")


def _write_validation(folder: Path, random: Random, validation: Images, labels: dict[str, str], fault: str) -> None:
    if random.random() < 0.3 and fault not in ("validation concatenated", "label missing", "label too many", "label unknown"):
        _write_files(folder / "val", {f"{labels[name]}/{name}": validation[name] for name in labels})
        return
    synsets = list(labels.values())
    if fault == "label missing":
        labels.popitem()
    if fault == "label too many":
        labels["val_9999.JPEG"] = synsets[0]
    if fault == "label unknown":
        labels[next(iter(labels))] = "n09999999"
    separator = random.choice(("\t", ",", " ", None, None))
    lines = [f"{name}{separator}{synset}" if separator else synset for name, synset in labels.items()]
    text = random.choice(("\n", "\r\n")).join((*lines, ""))
    plain = text.encode(errors="surrogateescape")
    encodings = [plain, b"\xef\xbb\xbf" + plain] + ([text.encode("utf-16")] if LATIN_1 not in text else [])
    (folder / VALIDATION_LABELS).write_bytes(random.choice(encodings))
    if random.random() < 0.5:
        _write_files(folder / "val", validation)
        return
    tar = _tar(random, validation)
    (folder / VALIDATION_ARCHIVE).write_bytes(tar + tar if fault == "validation concatenated" else tar)


# ---- The naive reader


def read_naively(folder: Path) -> Truth:
    """Returns what a conversion of a raw folder must hold. Raises NotWholeError where that is not sure."""
    truth = Truth()
    train: dict[str, Images] = {}
    if (folder / TRAIN_ARCHIVE).exists():
        for name, content in _read_tar((folder / TRAIN_ARCHIVE).read_bytes(), truth, "train", count=False).items():
            if _is_junk(name):
                _count_junk(truth, "train")
            elif not name.endswith(".tar"):
                raise NotWholeError
            else:
                train[_nfc(name[:-4])] = _read_tar(content, truth, "train")
    else:
        empty = [path for path, folders, names in os.walk(folder / "train") if not folders and not names]
        for path in empty:
            if Path(path).parent == folder / "train":
                raise NotWholeError
        for name, content in _read_folder(folder / "train").items():
            top, slash, rest = name.partition("/")
            if _is_junk(name) and (not slash or _is_junk(f"{top}/x")):
                _count_junk(truth, "train")
            elif not slash:
                if not name.endswith(".tar"):
                    raise NotWholeError
                train[_nfc(name[:-4])] = _read_tar(content, truth, "train")
            else:
                truth.seen["train"] += 1
                train.setdefault(_nfc(top), {})[rest] = content
    ranks = {synset: label for label, synset in enumerate(sorted(train))}
    for synset in sorted(train):
        images = _without_junk(train[synset], truth, "train")
        if not images or len(set(map(_nfc, images))) < len(images):
            raise NotWholeError
        truth.train += [(ranks[synset], images[name]) for name in sorted(images, key=_nfc)]
    if (folder / VALIDATION_ARCHIVE).exists():
        found = _read_tar((folder / VALIDATION_ARCHIVE).read_bytes(), truth, "validation")
    else:
        found = _read_folder(folder / "val")
        truth.seen["validation"] += len(found)
    images = _without_junk(found, truth, "validation")
    by_base = {name.rpartition("/")[2]: content for name, content in images.items()}
    labels = {name.rpartition("/")[2]: _nfc(name.partition("/")[0]) for name in images if "/" in name}
    labels = labels or _read_labels(folder / VALIDATION_LABELS, sorted(by_base))
    if set(labels) != set(by_base) or not set(labels.values()) <= set(train):
        raise NotWholeError
    truth.validation = [(ranks[labels[name]], by_base[name]) for name in sorted(by_base)]
    return truth


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _is_junk(name: str) -> bool:
    return bool(re.search(r"(^|/)(\.|__MACOSX/|Thumbs\.db$|desktop\.ini$)|\.(txt|xml)$", name))


def _count_junk(truth: Truth, split: str) -> None:
    truth.seen[split] += 1
    truth.junk[split] += 1


def _without_junk(images: Images, truth: Truth, split: str) -> Images:
    junk = [name for name in images if _is_junk(name)]
    truth.junk[split] += len(junk)
    return {name: content for name, content in images.items() if name not in junk}


def _read_folder(folder: Path) -> Images:
    names = [os.path.join(path, name) for path, _, names in os.walk(folder) for name in names]
    return {os.path.relpath(name, folder): Path(name).read_bytes() for name in names}


def _read_tar(data: bytes, truth: Truth, split: str, count: bool = True) -> Images:
    images: Images = {}
    how = {"mode": "r:", "encoding": "utf-8", "errors": "surrogateescape"}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), **how) as archive:
            members = archive.getmembers()
            rest = data[archive.offset :]
    except tarfile.TarError as error:
        raise NotWholeError from error
    if len(rest) < 512 or rest.strip(b"\0"):
        raise NotWholeError
    for member in members:
        name = member.name.removeprefix("./")
        if member.isdir():
            truth.seen[split] += 1
            truth.junk[split] += 1
        elif not member.isreg():
            truth.seen[split] += count
            truth.links[split] += 1
        elif name in images and _is_junk(name):
            _count_junk(truth, split)
        elif name in images:
            raise NotWholeError
        else:
            truth.seen[split] += count
            images[name] = data[member.offset_data : member.offset_data + member.size]
    return images


def _read_labels(path: Path, names: list[str]) -> dict[str, str]:
    data = path.read_bytes()
    text = (
        data.decode("utf-16") if data[:2] == b"\xff\xfe" else data.removeprefix(b"\xef\xbb\xbf").decode(errors="surrogateescape")
    )
    lines = text.replace("\r", "").splitlines()
    if all(line.startswith("val_") for line in lines):
        pairs = [re.split("[\t, ]", line, maxsplit=1) for line in lines]
        if len(dict(pairs)) < len(pairs):
            raise NotWholeError
        return {name: _nfc(label) for name, label in pairs}
    by_number = sorted(names, key=lambda name: int(re.sub("[^0-9]", "", name)))
    if len(lines) != len(names) or by_number != names:
        raise NotWholeError
    return dict(zip(names, map(_nfc, lines), strict=True))
