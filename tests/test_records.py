"""The record schema against TensorFlow's own protocol buffers."""

import dataclasses
import shutil

import pytest
import tensorflow as tf
from support.datasets import write_dataset

from trainer.shared import records
from trainer.shared.blocks import block_extent, framed_records, locate
from trainer.shared.errors import UserError


@pytest.mark.parametrize(("label", "image_id"), [(0, 0), (127, 128), (999, 1281166), (1, 2**40)])
def test_a_record_is_the_example_that_tensorflow_reads(label, image_id):
    encoded = bytes(range(256)) * 3
    serialized = records.encode_example(encoded, label, image_id)
    features = tf.train.Example.FromString(serialized).features.feature
    assert set(features) == {records.ENCODED, records.LABEL, records.IMAGE_ID}
    assert list(features[records.ENCODED].bytes_list.value) == [encoded]
    assert list(features[records.LABEL].int64_list.value) == [label]
    assert list(features[records.IMAGE_ID].int64_list.value) == [image_id]
    parsed = records.parse_example(serialized)
    assert (parsed[records.ENCODED].numpy(), int(parsed[records.LABEL]), int(parsed[records.IMAGE_ID])) == (
        encoded,
        label,
        image_id,
    )


def test_negative_ids_and_labels_are_refused():
    with pytest.raises(ValueError, match="got -1"):
        records.encode_example(b"", 0, -1)


def test_a_manifest_comes_back_from_json_as_it_was(tmp_path):
    manifest = write_dataset(tmp_path, train=4, validation=4)
    manifest = dataclasses.replace(manifest, options={"max_side": 500})
    assert records.manifest_from_json(records.manifest_to_json(manifest)) == manifest


def test_what_is_no_manifest_is_refused_in_one_line(tmp_path):
    (tmp_path / records.MANIFEST).write_text("{}")
    with pytest.raises(UserError, match="is not a manifest of this version"):
        records.read_manifest(str(tmp_path))


def test_a_start_lists_a_bucket_once_and_asks_for_no_shard_by_itself(built, tmp_path, monkeypatch):
    """At ImageNet's 1,150 shards, two requests each of 30 to 60 ms took every host a minute or two."""
    asked = []

    def of_bucket(function):
        def call(path, *arguments):
            asked.append(f"{function.__name__} {path}")
            return function(path.replace("gs://bucket", str(tmp_path)), *arguments)

        return call

    for name in ("listdir", "exists", "stat", "GFile"):
        monkeypatch.setattr(tf.io.gfile, name, of_bucket(getattr(tf.io.gfile, name)))
    shutil.copytree(built, tmp_path / "data")
    assert records.read_manifest("gs://bucket/data") == records.read_manifest(str(built))
    assert [one for one in asked if "bucket" in one and records.MANIFEST not in one] == ["list_directory_v2 gs://bucket/data"]
    lost = next((tmp_path / "data").glob("*-train.tfrecord-*"))
    lost.unlink()
    with pytest.raises(UserError, match=f"{lost.name} has 0 bytes, but manifest.json says"):
        records.read_manifest("gs://bucket/data")


def test_blocks_hold_the_records_that_tensorflow_reads(built):
    for split in records.read_manifest(str(built)).splits.values():
        for shard in split.shards:
            content = (built / shard.file).read_bytes()
            extents = [block_extent(shard, block) for block in range(len(shard.blocks))]
            found = [record for offset, size in extents for _, record in framed_records(content[offset : offset + size])]
            assert found == list(tf.data.TFRecordDataset(str(built / shard.file)).as_numpy_iterator())
            begins = [position for position, _ in framed_records(content)]
            assert begins[:: records.RECORDS_PER_BLOCK] == list(shard.blocks)


def test_an_image_is_located_where_the_conversion_puts_it(built):
    split = records.read_manifest(str(built)).splits["train"]
    shards = [list(framed_records((built / shard.file).read_bytes())) for shard in split.shards]
    for image_id, (shard, position) in enumerate(locate(split, range(split.records))):
        _, record = shards[shard][position]
        assert records.decode_example(record)[2] == image_id
