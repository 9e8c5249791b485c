"""The raw file of each image of a dataset. A worker that lists an archive leaves its part; publishing joins the parts."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from beam_jobs import files
from beam_jobs.layouts.layout import RawImage
from beam_jobs.plan import Plan
from trainer.shared.errors import UserError
from trainer.shared.records import Manifest
from trainer.shared.sources import count_sources, pack_sources, sources_file, unpack_source


def leave_part(plan: Plan, number: int, images: Iterable[RawImage]) -> None:
    """Writes the sources of an archive's images, which are in the order of their IDs, for `join_parts`."""
    files.write(_part(plan, number), pack_sources(image.source for image in images))


def join_parts(plan: Plan, split: str) -> None:
    """Writes the sources of a split to the output folder, from the parts of its archives."""
    parts = [_part(plan, number) for number in plan.raw.of_split(split)]
    with ThreadPoolExecutor(16) as pool:
        files.write(files.join(plan.output, sources_file(plan.name, split)), b"".join(pool.map(files.read, parts)))


def source_of(folder: str, manifest: Manifest, split: str, image_id: int) -> str:
    """Returns the path of an image's raw file, relative to the raw folder. An archive's member is written as if in a folder.

    Raises UserError if the dataset has no such image, or does not know where its images are from.
    """
    if split not in manifest.splits:
        raise UserError(f"{folder} has no split {split}: it has {' and '.join(manifest.splits)}")
    records = manifest.splits[split].records
    if not 0 <= image_id < records:
        raise UserError(f"image ID {image_id} is not within 0..{records - 1}, the image IDs of {split}")
    path = files.join(folder, sources_file(manifest.name, split))
    if not files.find(path):
        raise UserError(f"{path} is missing, which names the raw files: the same conversion into another folder makes it")
    try:
        return unpack_source(files.read(path), image_id)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): the same conversion into another folder makes it again") from error


def wrong_sources(folder: str, manifest: Manifest, split: str) -> list[str]:
    """Returns what is wrong with the file of a split's sources, if there is one. A dataset of an earlier version has none."""
    name = sources_file(manifest.name, split)
    path, records = files.join(folder, name), manifest.splits[split].records
    if not files.find(path):
        return []
    try:
        count = count_sources(files.read(path))
    except ValueError as error:
        return [f"{name} is damaged: {error}"]
    return [] if count == records else [f"{name} names {count} raw files, and the manifest has {records} records of {split}"]


def _part(plan: Plan, number: int) -> str:
    return files.join(plan.work, f"archive-{number:05d}.sources")
