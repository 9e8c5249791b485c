"""The last step of a conversion: makes the written shards a dataset for TFDS and this project."""

import json
from typing import Any

from beam_jobs import files, sources, verify
from beam_jobs.origin import Origin, from_json
from beam_jobs.plan import UNPACKED, Plan
from trainer.shared.errors import UserError
from trainer.shared.records import ENCODED, IMAGE_ID, LABEL, MANIFEST, Manifest, manifest_from_json, manifest_to_json

CONVERSION = ".conversion"
"""File of a dataset that holds the `Origin` of the conversion that made it.

Not part of the manifest: the origin depends on the raw files' times, and equal datasets must have equal manifests.
"""
_FEATURES = "tensorflow_datasets.core.features"


def publish(plan: Plan) -> Manifest:
    """Verifies the dataset, then writes TFDS's metadata, the images' sources and, last, the manifest. Returns the manifest.

    If the manifest exists already, only cleans up. Raises the errors of `verify.verify_dataset`.
    """
    path = files.join(plan.output, MANIFEST)
    if files.find(path):
        manifest = manifest_from_json(files.read(path).decode())
    else:
        manifest = verify.verify_dataset(plan)
        for name, text in _tfds_metadata(plan, manifest).items():
            files.write(files.join(plan.output, name), text.encode())
        for split in manifest.splits:
            sources.join_parts(plan, split)
        files.delete_temporary(plan.output)
        files.write(files.join(plan.output, CONVERSION), plan.origin.to_json().encode())
        files.write(path, manifest_to_json(manifest).encode())
    files.delete_folder(plan.work)
    files.delete_folder(files.join(plan.output, UNPACKED))
    return manifest


def origin_of(output: str) -> Origin | None:
    """Returns what the finished dataset in a folder was made of, or None if the folder does not say."""
    path = files.join(output, CONVERSION)
    return from_json(files.read(path).decode(errors="replace")) if files.find(path) else None


def refuse_lost_shards(output: str) -> None:
    """Raises UserError if a shard of the finished dataset in a folder is missing or has another length."""
    manifest = manifest_from_json(files.read(files.join(output, MANIFEST)).decode())
    sizes = {file.name: file.size for file in files.tree(output, depth=0)}
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        if sizes.get(shard.file) != shard.bytes:
            found = f"has {sizes[shard.file]} bytes, not {shard.bytes}" if shard.file in sizes else "is missing"
            raise UserError(f"{output} has a finished dataset whose {shard.file} {found}: delete the folder to make it again")


def _tfds_metadata(plan: Plan, manifest: Manifest) -> dict[str, str]:
    """Returns the contents of TFDS's metadata files by name, as TFDS's `folder_dataset.write_metadata` writes them.

    Does not use TFDS, because that imports TensorFlow, which workers have no memory for.
    """
    splits = [
        {
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "name": name,
            "numBytes": str(sum(shard.bytes for shard in split.shards)),
            "shardLengths": [str(shard.records) for shard in split.shards],
        }
        for name, split in manifest.splits.items()
    ]
    info = {
        "description": f"Made by beam_jobs.build_tfrecords; its fingerprint is {manifest.fingerprint}.",
        "fileFormat": "tfrecord",
        "name": manifest.name,
        "splits": splits,
        "version": plan.version,
    }
    features = {
        IMAGE_ID: {
            "pythonClassName": f"{_FEATURES}.tensor_feature.Tensor",
            "tensor": {"dtype": "int64", "encoding": "none", "shape": {}},
        },
        LABEL: {
            "classLabel": {"numClasses": str(manifest.num_classes)},
            "pythonClassName": f"{_FEATURES}.class_label_feature.ClassLabel",
        },
        ENCODED: {
            "image": {"dtype": "uint8", "encodingFormat": "jpeg", "shape": {"dimensions": ["-1", "-1", "3"]}},
            "pythonClassName": f"{_FEATURES}.image_feature.Image",
        },
    }
    of_dict = {"featuresDict": {"features": features}, "pythonClassName": f"{_FEATURES}.features_dict.FeaturesDict"}
    return {
        "dataset_info.json": _json(info, 2),
        "features.json": _json(of_dict, 4),
        f"{LABEL.replace('/', '.')}.labels.txt": "".join(f"{synset}\n" for synset in manifest.synsets),
    }


def _json(content: Any, indent: int) -> str:
    return json.dumps(content, indent=indent, sort_keys=True)
