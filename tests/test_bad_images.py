"""Images that are not what they should be: repaired in their own colours, or named, all of them, and left out on demand."""

import collections
import io
import itertools
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from support.raw_data import (
    LABELS,
    SYNSETS,
    TRAIN,
    VALIDATION,
    contents,
    picture,
    raw_as_usual,
    read_records,
    tar,
    train_images,
    validation_images,
    without_segments,
)

from beam_jobs import dry_run, files, images
from beam_jobs.build_tfrecords import main
from beam_jobs.job import build, plan_only
from beam_jobs.jpeg import read_jpeg_header
from trainer.shared.errors import UserError
from trainer.shared.records import read_manifest

ADOBE = b"\xff\xee\x00\x0eAdobe"


def patches(mode: str, side: int = 48) -> Image.Image:
    """Colours from all over the space of `mode`, a patch to each of JPEG's blocks, so that its loss is no matter here."""
    y, x = np.mgrid[:side, :side] // 8 * 8 / side
    bands = [x, y, (x + y) / 2, (x * 0.4 + 0.1)][: len(Image.new(mode, (1, 1)).getbands())]
    return Image.fromarray((np.stack(bands, -1) * 230 + 10).astype(np.uint8).squeeze(), mode)


def jpeg(image: Image.Image, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, "jpeg", quality=100, subsampling=0, **options)
    return out.getvalue()


def without_adobe_marker(cmyk: bytes) -> bytes:
    start = cmyk.index(ADOBE)
    return cmyk[:start] + cmyk[start + 16 :]


def plain_cmyk(inks: Image.Image) -> bytes:
    """Inks as they are, without Adobe's marker, which stands for inverted ones."""
    return without_adobe_marker(jpeg(Image.fromarray(255 - np.asarray(inks), "CMYK")))


def ycck(inks: Image.Image) -> bytes:
    """Adobe's other kind: the inverted inks' RGB as YCbCr, and K."""
    adobe = 255 - np.asarray(inks)
    rgb = Image.fromarray(np.ascontiguousarray(255 - adobe[..., :3]), "RGB").convert("YCbCr")
    bands = np.concatenate([np.asarray(rgb), adobe[..., 3:]], -1)
    # Pillow stores what is 255 - its argument, with Adobe's marker, which here is to say YCCK.
    stored = jpeg(Image.fromarray(255 - np.ascontiguousarray(bands), "CMYK"))
    start = stored.index(ADOBE)
    return stored[: start + 15] + b"\x02" + stored[start + 16 :]


def held(store, inks: Image.Image) -> Image.Image:
    """The inks that a file holds: in YCCK three of them went through YCbCr, which rounds."""
    if store is not ycck:
        return inks
    bands = np.asarray(inks)
    rgb = np.asarray(Image.fromarray(np.ascontiguousarray(bands[..., :3]), "RGB").convert("YCbCr").convert("RGB"))
    return Image.fromarray(np.concatenate([rgb, bands[..., 3:]], -1), "CMYK")


def cmyk_profile() -> bytes:
    """An ICC profile (ICC.1:2001-04, lut8Type) of a press whose inks are not those of the naive formula."""
    levels = np.array([0.0, 1.0])
    table = []
    for cyan, magenta, yellow, black in itertools.product(levels, repeat=4):
        light = (1 - 0.55 * cyan) * (1 - 0.6 * magenta) * (1 - 0.1 * yellow) * (1 - 0.85 * black)
        a = 128 + (-35 * cyan + 70 * magenta - 5 * yellow) * (1 - black)
        b = 128 + (-45 * cyan - 5 * magenta + 85 * yellow) * (1 - black)
        table += [round(255 * light), round(a), round(b)]
    ramp = bytes(range(256))
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + identity + ramp * 4 + bytes(table) + ramp * 3
    lut += bytes(-len(lut) % 4)
    text = b"text\0\0\0\0made by a test\0\0"
    described = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(4 + 4 + 2 + 1 + 67)
    described += bytes(-len(described) % 4)
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    tags = {b"desc": described, b"cprt": text + bytes(-len(text) % 4), b"wtpt": white, b"A2B0": lut}
    offset = 128 + 4 + 12 * len(tags)
    directory, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        directory += name + struct.pack(">II", offset + len(body), len(content))
        body += content
    size = offset + len(body)
    head = struct.pack(">I4s4s4s4s4s", size, b"test", b"\x02\x10\0\0", b"prtr", b"CMYK", b"Lab ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head + bytes(128 - len(head)) + directory + body


def naive(inks: Image.Image) -> np.ndarray:
    """Light that is left by each ink and by black, [height, width, 3], 0..255: what CMYK without a profile means."""
    left = 1 - np.asarray(inks, float) / 255
    return 255 * left[..., :3] * left[..., 3:]


def managed(inks: Image.Image, profile: bytes) -> np.ndarray:
    of_inks = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return np.asarray(ImageCms.profileToProfile(inks, of_inks, ImageCms.createProfile("sRGB"), outputMode="RGB"), float)


def pixels(encoded: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(encoded)) as image:
        assert (image.format, image.mode) == ("JPEG", "RGB")
        return np.asarray(image, float)


@pytest.mark.parametrize("store", [jpeg, plain_cmyk, ycck], ids=["inverted by Adobe", "plain inks", "YCCK"])
def test_cmyk_jpegs_get_the_colours_that_their_inks_make(store):
    inks = patches("CMYK")
    prepared = images.prepare(store(inks), images.Options())
    assert prepared.repaired == "JPEG CMYK to JPEG RGB"
    difference = np.abs(pixels(prepared.encoded) - naive(held(store, inks)))
    assert difference.max() <= 3, difference.max()


@pytest.mark.parametrize("store", [jpeg, plain_cmyk, ycck], ids=["inverted by Adobe", "plain inks", "YCCK"])
def test_a_cmyk_jpeg_with_a_profile_gets_the_colours_that_it_gives(store):
    inks, profile = patches("CMYK"), cmyk_profile()
    bare = store(inks)
    segment = b"ICC_PROFILE\0\x01\x01" + profile
    prepared = images.prepare(bare[:2] + b"\xff\xe2" + struct.pack(">H", len(segment) + 2) + segment + bare[2:], images.Options())
    assert prepared.repaired == "JPEG CMYK to JPEG RGB by its ICC profile"
    reference = managed(held(store, inks), profile)
    assert np.abs(reference - naive(inks)).max() > 30
    difference = np.abs(pixels(prepared.encoded) - reference)
    assert difference.max() <= 3, difference.max()


def test_a_broken_profile_is_no_profile():
    inks = patches("CMYK")
    prepared = images.prepare(jpeg(inks, icc_profile=b"nonsense" * 30), images.Options())
    assert np.abs(pixels(prepared.encoded) - naive(inks)).max() <= 3


def test_sixteen_bits_become_eight_of_the_same_grey():
    grey = np.linspace(0, 65535, 48 * 48).reshape(48, 48).astype(np.uint16)
    out = io.BytesIO()
    Image.fromarray(grey).save(out, "png")
    prepared = images.prepare(out.getvalue(), images.Options())
    assert np.abs(pixels(prepared.encoded)[..., 0] - grey / 257).max() <= 3


@pytest.mark.parametrize("kind", ["png", "bmp", "gif", "tiff", "webp"])
def test_other_formats_under_the_name_of_jpeg_become_rgb_jpegs(kind):
    out = io.BytesIO()
    patches("RGB").save(out, kind, **({"lossless": True} if kind == "webp" else {}))
    prepared = images.prepare(out.getvalue(), images.Options())
    assert prepared.repaired.startswith(kind.upper())
    with Image.open(io.BytesIO(out.getvalue())) as source:
        assert np.abs(pixels(prepared.encoded) - np.asarray(source.convert("RGB"), float)).mean() <= 3


@pytest.mark.parametrize(
    "data",
    [
        jpeg(patches("L")),
        jpeg(patches("RGB")),
        jpeg(patches("RGB"), progressive=True),
        jpeg(patches("RGB")) + b"what a camera leaves after the end" * 10,
        jpeg(patches("RGB"), exif=b"Exif\0\0 broken"),
        jpeg(patches("RGB"), exif=b"Exif\0\0" + jpeg(patches("L", 16))),
    ],
    ids=["grey", "colour", "progressive", "trailing bytes", "broken EXIF", "a thumbnail within"],
)
@pytest.mark.parametrize("decode", [False, True])
def test_usual_jpegs_keep_their_own_bytes(data, decode):
    assert images.prepare(data, images.Options(decode=decode)) == images.Prepared(data, "", False)


def bomb() -> bytes:
    data = bytearray(jpeg(patches("RGB")))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 60000, 60000)
    return bytes(data)


def png_bomb() -> bytes:
    data = bytearray(picture(1, kind="png"))
    data[16:24] = struct.pack(">II", 100_000, 100_000)
    import zlib

    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def with_garbled_table(data: bytes, table: int) -> bytes:
    """A JPEG with a Huffman table that makes no sense, in the segment at byte `table`."""
    return data[: table + 5] + b"\x0f" * 16 + data[table + 21 :]


def garbled() -> bytes:
    """Whole by its header and its end, but the Huffman table of its last scan makes no sense."""
    data = jpeg(patches("RGB"), progressive=True)
    return with_garbled_table(data, data.rindex(b"\xff\xc4"))


def cut_off(data: bytes) -> bytes:
    """All of the header, and half of the pixels."""
    scan = read_jpeg_header(data).scan
    return data[: (scan + len(data)) // 2]


UNREADABLE = {
    "empty": (b"", "is empty"),
    "text": (b"404: this image is gone", "is not an image"),
    "truncated": (cut_off(jpeg(patches("RGB"))), "cannot be decoded (image file is truncated"),
    "truncated in the header": (jpeg(patches("RGB"))[:100], "cannot be decoded"),
    "truncated with a thumbnail": (
        cut_off(jpeg(patches("RGB"), exif=b"Exif\0\0" + jpeg(patches("L", 16)))),
        "cannot be decoded (image file is truncated",
    ),
    "truncated PNG": (picture(2, kind="png")[:200], "cannot be decoded"),
    "no quantization table": (
        without_segments(jpeg(patches("RGB")), 0xDB),
        "cannot be decoded (quantization table 0 is missing)",
    ),
    "garbled Huffman table": (
        with_garbled_table(jpeg(patches("RGB")), jpeg(patches("RGB")).index(b"\xff\xc4")),
        "cannot be decoded (a Huffman table makes no sense)",
    ),
    "no pixels": (b"\xff\xd8\xff\xd9", "is not an image"),
    "bomb": (bomb(), "claims to be 60000 x 60000 pixels"),
    "PNG bomb": (png_bomb(), "has more than 89,478,485 pixels"),
}


@pytest.mark.parametrize(("data", "reason"), UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("decode", [False, True])
def test_what_cannot_be_read_says_why(data, reason, decode):
    with pytest.raises(images.UnreadableImageError) as caught:
        images.prepare(data, images.Options(decode=decode))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_decoding_finds_what_headers_do_not_show():
    data = garbled()
    assert images.prepare(data, images.Options()).encoded == data
    with pytest.raises(images.UnreadableImageError, match="cannot be decoded"):
        images.prepare(data, images.Options(decode=True))


def test_what_is_kept_with_a_damaged_header_is_decoded_by_tensorflow():
    """Changes bytes of headers at random. TensorFlow, which trains on what is kept, is the judge."""
    import tensorflow as tf

    random = np.random.default_rng(0)
    whole = [jpeg(patches("RGB")), jpeg(patches("RGB"), progressive=True), jpeg(patches("L"), optimize=True), picture(3)]
    fates = collections.Counter()
    for number in range(300):
        data = bytearray(whole[number % len(whole)])
        for position in random.integers(2, read_jpeg_header(bytes(data)).scan, 2):
            data[position] = random.integers(256)
        try:
            prepared = images.prepare(bytes(data), images.Options())
        except images.UnreadableImageError:
            fates["refused"] += 1
            continue
        tf.io.decode_jpeg(prepared.encoded, channels=3)
        fates["kept" if prepared.encoded == data else "repaired"] += 1
    assert fates["kept"] > 50
    assert fates["refused"] > 50


def test_a_jpeg_that_relies_on_the_usual_huffman_tables_keeps_its_bytes():
    """As frames of Motion JPEG do: their tables are those of the standard, and decoders know them."""
    data = without_segments(picture(1), 0xC4)
    assert read_jpeg_header(data).fault == "Huffman table 0 of DC coefficients is missing"
    assert images.prepare(data, images.Options()).encoded == data


# ---- In a conversion


def with_bad(train: dict | None = None) -> dict[str, dict[str, bytes]]:
    """Training images, each kind of unreadable one among them in the second synset."""
    train = train or train_images()
    for number, (data, _) in enumerate(UNREADABLE.values()):
        train[SYNSETS[1]][f"bad_{number:02}.JPEG"] = data
    return train


def linked(name: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    return member


def tar_with(images_by_name: dict[str, bytes], *members: tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in images_by_name.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in members:
            archive.addfile(member)
    return out.getvalue()


def raw_with_everything_wrong(folder: Path) -> Path:
    raw = raw_as_usual(folder, train=with_bad(), labels=["n09999999", *LABELS[1:]])
    (raw / VALIDATION).write_bytes(
        tar_with(
            {"../../outside.JPEG": picture(1), **validation_images()}, linked("link.JPEG"), linked("hard.JPEG", tarfile.LNKTYPE)
        )
    )
    return raw


def test_everything_wrong_is_named_at_once_and_nothing_is_published(tmp_path):
    raw = raw_with_everything_wrong(tmp_path / "raw")
    with pytest.raises(UserError) as caught:
        build(str(raw), str(tmp_path / "output"))
    assert "\n" not in str(caught.value)
    (listed,) = (tmp_path / "output").iterdir()
    lines = listed.read_text().splitlines()
    for number, (_, reason) in enumerate(UNREADABLE.values()):
        assert any(f"bad_{number:02}.JPEG {reason}" in line for line in lines)
    for expected in (
        "line 1: n09999999 is not a synset",
        f"{VALIDATION} has 23 images and there are 20 labels",
        f"{VALIDATION}/link.JPEG is a link or a device",
        f"{VALIDATION}/hard.JPEG is a link or a device",
        f"{VALIDATION}/outside.JPEG has the path ../../outside.JPEG, which leaves the archive",
    ):
        assert any(expected in line for line in lines), expected
    assert len(lines) == len(UNREADABLE) + 5
    assert str(listed) in str(caught.value)


def test_two_cut_off_archives_are_both_named(tmp_path):
    raw = raw_as_usual(tmp_path / "raw")
    for name in (TRAIN, VALIDATION):
        (raw / name).write_bytes((raw / name).read_bytes()[:-15000])
    with pytest.raises(UserError, match=f"{TRAIN} is cut off.*{VALIDATION} is cut off"):
        build(str(raw), str(tmp_path / "output"))


def test_skipping_leaves_out_what_cannot_be_read_before_ids_are_given(built, tmp_path):
    raw = raw_as_usual(tmp_path / "raw", train=with_bad())
    manifest = build(str(raw), str(tmp_path / "output"), num_shards=2, on_bad_image="skip")
    assert manifest.fingerprint == read_manifest(str(built)).fingerprint
    assert manifest.options == {"on_bad_image": "skip"}
    rejected = manifest.splits["train"].rejected
    assert [entry["source"].rsplit("/", 1)[1] for entry in rejected] == [f"bad_{n:02}.JPEG" for n in range(len(UNREADABLE))]
    assert all(reason in entry["reason"] for entry, (_, reason) in zip(rejected, UNREADABLE.values(), strict=True))
    for path in built.glob("*.tfrecord-*"):
        assert (tmp_path / "output" / path.name).read_bytes() == path.read_bytes()


def test_skipping_a_validation_image_keeps_the_labels_of_the_others(tmp_path):
    validation = validation_images()
    names = sorted(validation)
    validation[names[4]] = b""
    raw = raw_as_usual(tmp_path / "raw", validation=validation)
    (raw / VALIDATION).write_bytes(
        tar_with({name: data for name, data in validation.items() if name != names[7]}, linked(names[7]))
    )
    manifest = build(str(raw), str(tmp_path / "output"), on_bad_image="skip")
    kept = [number for number in range(20) if number not in (4, 7)]
    found = sorted(read_records(tmp_path / "output", "validation"))
    assert found == [(image_id, SYNSETS.index(LABELS[n]), validation[names[n]]) for image_id, n in enumerate(kept)]
    assert [entry["reason"] for entry in manifest.splits["validation"].rejected] == [
        "is empty",
        "is a link or a device, not a file",
    ]


def test_skipping_with_decoding_leaves_out_what_only_decoding_finds(tmp_path):
    train = train_images()
    train[SYNSETS[0]]["garbled.JPEG"] = garbled()
    raw = raw_as_usual(tmp_path / "raw", train=train)
    manifest = build(str(raw), str(tmp_path / "output"), on_bad_image="skip", verify="decode")
    assert manifest.splits["train"].records == 150
    assert manifest.options == {"on_bad_image": "skip", "verify": "decode"}
    with pytest.raises(UserError, match=r"garbled\.JPEG cannot be decoded"):
        build(str(raw), str(tmp_path / "other"), verify="decode")


def test_a_synset_without_a_readable_image_is_refused_even_when_skipping(tmp_path):
    train = train_images(5)
    train[SYNSETS[2]] = dict.fromkeys(train[SYNSETS[2]], b"")
    with pytest.raises(UserError, match="no training image of n02000001 can be read"):
        build(str(raw_as_usual(tmp_path / "raw", train=train)), str(tmp_path / "output"), on_bad_image="skip")


def test_larger_images_are_made_as_small_as_asked_and_counted(tmp_path):
    train = train_images(5)
    train[SYNSETS[0]] |= {"wide.JPEG": jpeg(patches("RGB", 300).crop((0, 0, 300, 100))), "odd.JPEG": jpeg(patches("CMYK", 200))}
    raw = raw_as_usual(tmp_path / "raw", train=train)
    plain = build(str(raw), str(tmp_path / "plain"))
    manifest = build(str(raw), str(tmp_path / "output"), max_side=64)
    assert manifest.options == {"max_side": 64}
    assert manifest.fingerprint != plain.fingerprint
    assert manifest.splits["train"].resized == 2
    assert [entry["source"].rsplit("/", 1)[1] for entry in manifest.splits["train"].repaired] == ["odd.JPEG"]
    sizes = []
    for _, _, encoded in sorted(read_records(tmp_path / "output", "train")):
        with Image.open(io.BytesIO(encoded)) as image:
            sizes.append(image.size)
    assert sizes.count((64, 21)) == 1
    assert sizes.count((64, 64)) == 1
    assert max(max(size) for size in sizes) == 64


# ---- The plan


def test_the_plan_tells_what_would_be_done_and_writes_nothing(tmp_path, capsys):
    train = with_bad()
    train[SYNSETS[0]]["inks.JPEG"] = jpeg(patches("CMYK"))
    raw = raw_as_usual(tmp_path / "raw", train=train)
    planned = plan_only(str(raw), str(tmp_path / "output"), on_bad_image="skip", num_shards=3)
    assert not (tmp_path / "output").exists()
    assert planned.classes == 3
    of_train = planned.splits["train"]
    assert (of_train.images, of_train.shards, len(of_train.rejected)) == (151, 3, len(UNREADABLE))
    assert [entry["done"] for entry in of_train.repaired] == ["JPEG CMYK to JPEG RGB"]
    assert of_train.bytes == sum(len(data) for images in train.values() for name, data in images.items() if "bad" not in name)
    assert planned.seconds > 0
    assert not planned.problems
    assert build(str(raw), str(tmp_path / "output"), on_bad_image="skip", num_shards=3).splits["train"].records == 151

    assert main(["--raw", str(raw), "--output", str(tmp_path / "other"), "--dry-run"]) == 2
    printed = capsys.readouterr().out
    assert "train: 151 images" in printed
    assert f"would repair {TRAIN}/n01000001.tar/inks.JPEG: JPEG CMYK to JPEG RGB" in printed
    assert f"would fail: {len(UNREADABLE)} of the images cannot be read: give --on-bad-image=skip" in printed
    assert main(["--raw", str(raw), "--output", str(tmp_path / "other"), "--dry-run", "--json", "--on-bad-image=skip"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"]["validation"]["images"] == 20
    assert not (tmp_path / "other").exists()


def test_the_plan_looks_at_headers_and_ends_only(raw, tmp_path, monkeypatch):
    """Or planning ImageNet would read all of it."""
    large = {synset: {f"{n}.JPEG": jpeg(patches("RGB", 300)) for n in range(3)} for synset in SYNSETS}
    folder = raw_as_usual(tmp_path / "raw", train=large)
    sizes: list[int] = []
    read_range = files.read_range
    monkeypatch.setattr(files, "read_range", lambda *a: sizes.append(a[2]) or read_range(*a))
    monkeypatch.setattr(dry_run, "_seconds_an_image", lambda plan: 1.0)
    planned = plan_only(str(folder), str(tmp_path / "output"))
    assert planned.splits["train"].images == 9
    assert max(sizes) <= max(images.HEAD_BYTES, *(len(data) for data in validation_images().values()))


def test_the_archives_stay_as_they_are(tmp_path):
    raw = raw_with_everything_wrong(tmp_path / "raw")
    before = contents(raw)
    with pytest.raises(UserError):
        build(str(raw), str(tmp_path / "output"))
    assert contents(raw) == before
    assert tar({}) == tar_with({})
