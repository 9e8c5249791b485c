"""The work of a conversion's workers: list an archive's images, refer them to shards, write a shard, publish the dataset.

Beam's workers do these steps for `beam_jobs.transforms`, this machine for `beam_jobs.local`. A step may be done twice,
even at the same time: the files are the same, and each appears whole or not at all.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from beam_jobs import images, raw, sources, verify
from beam_jobs.layouts.layout import RawImage
from beam_jobs.plan import Plan, plan_split
from beam_jobs.publish import publish
from beam_jobs.references import PackedImage, PackedReference, Reference, pack_images, pack_reference, unpack_references
from beam_jobs.shards import Record, make_record, write_shard
from trainer.shared.files import is_local
from trainer.shared.records import reading_positions

_BATCH = 32
"""Images that a thread takes at a time."""
_REMOTE_THREADS = 16
"""Simultaneous requests for remote images. Each mostly waits."""

Indexed = tuple[int, list[PackedImage]]
"""The number of an archive, and its images that get IDs, in the order of their IDs."""
ShardKey = tuple[str, str]
"""Split, and the shard's file."""
Item = TypeVar("Item")
Result = TypeVar("Result")


def index_archive(number: int, plan: Plan, on_checked: Callable[[int], None] = lambda size: None) -> Indexed:
    """Returns the images of an archive that get IDs, in the order of their IDs, and reports them.

    on_checked: called with the size in bytes of each image that was checked
    """
    archive = plan.raw.archives[number]
    found = raw.index(plan.raw, archive)
    repaired = found.repaired or []
    if plan.check_first and found.repaired is None:
        found, repaired = _check_images(plan, archive.split, found, on_checked)
    sources.leave_part(plan, number, found.images)
    verify.report_archive(plan, number, found, repaired)
    return number, pack_images(found.images)


def count_images(indexed: Indexed) -> tuple[int, int]:
    number, packed = indexed
    return number, len(packed)


def assign_ids(indexed: Indexed, plan: Plan, counts: dict[int, int]) -> list[tuple[ShardKey, list[PackedReference]]]:
    """Returns references for each shard that has images of an archive; `counts` has the number of images by archive."""
    number, packed = indexed
    split = plan.raw.archives[number].split
    of_split = plan_split(plan, split, counts)
    first_id = of_split.first_ids[number]
    places = reading_positions(of_split.num_images)[first_id : first_id + len(packed)]
    shards = of_split.shards_of(places).tolist()
    by_shard: dict[int, list[PackedReference]] = {}
    for image_id, (place, shard, image) in enumerate(zip(places.tolist(), shards, packed, strict=True), start=first_id):
        by_shard.setdefault(shard, []).append(pack_reference(place, image_id, image))
    return [((split, of_split.shard_files[shard]), references) for shard, references in by_shard.items()]


def write_references(plan: Plan, split: str, shard_file: str, packed: list[PackedReference]) -> dict[str, int]:
    """Writes the shard of the referenced images, in the order of their places.

    Does nothing if the shard is finished already. Returns how many images were written, repaired and rejected.
    """
    references = unpack_references(sorted(packed))
    image_ids = [reference.image_id for reference in references]
    if verify.is_finished(plan, shard_file, image_ids, [reference.image.label for reference in references]):
        return {}
    repaired: verify.Listed = []
    rejected: verify.Listed = []
    resized = 0

    def records() -> Iterator[Record]:
        nonlocal resized
        for reference, outcome in _threaded(plan, references, lambda reference: (reference, _make(plan, split, reference))):
            if isinstance(outcome, images.UnreadableImageError):
                rejected.append({"source": reference.image.source, "reason": str(outcome)})
                continue
            record, done, was_resized = outcome
            resized += was_resized
            if done:
                repaired.append({"id": reference.image_id, "source": reference.image.source, "done": done})
            yield record

    written = write_shard(plan.output, shard_file, records())
    verify.report_shard(plan, written, resized, repaired, rejected)
    return {"written": written.shard.records, "repaired": len(repaired), "rejected": len(rejected)}


def publish_written(_: tuple[None, Iterable[str]], plan: Plan) -> str:
    """Verifies and publishes the dataset, once all shards are written. Returns its fingerprint."""
    return publish(plan).fingerprint


def _make(plan: Plan, split: str, reference: Reference) -> tuple[Record, str, bool] | images.UnreadableImageError:
    """Returns an image's record, how it was repaired and whether it was resized, or why it cannot be read."""
    # An image that was checked when it was indexed need not be decoded again.
    options = replace(plan.images, decode=False) if plan.check_first and plan.images.decode else plan.images
    try:
        prepared = images.prepare(_read(plan, split, reference.image), options)
    except images.UnreadableImageError as error:
        return error
    record = make_record(split, reference.image_id, reference.image.label, prepared.encoded)
    return record, prepared.repaired, prepared.resized


def _check_images(plan: Plan, split: str, found: raw.Index, on_checked: Callable[[int], None]) -> tuple[raw.Index, verify.Listed]:
    """Returns an index without the unreadable images, and a list of the remaining images that will be repaired."""

    def check(image: RawImage) -> tuple[RawImage, str, str]:
        if image.size > images.HEAD_BYTES:
            head = plan.raw.read(split, image, 0, images.HEAD_BYTES)
            tail = plan.raw.read(split, image, image.size - images.TAIL_BYTES, images.TAIL_BYTES)
            if images.keeps_its_bytes(head, tail, plan.images):
                return image, "", ""
        try:
            return image, images.prepare(_read(plan, split, image), plan.images).repaired, ""
        except images.UnreadableImageError as error:
            return image, "", str(error)

    readable, rejected, repaired = [], list(found.rejected), []
    rejected_bytes = found.account["rejected_bytes"]
    for image, done, reason in _threaded(plan, found.images, check):
        on_checked(image.size)
        if reason:
            rejected.append({"source": image.source, "reason": reason})
            rejected_bytes += image.size
            continue
        readable.append(image)
        if done:
            repaired.append({"source": image.source, "done": done})
    account = {**found.account, "rejected_bytes": rejected_bytes}
    return replace(found, images=readable, rejected=rejected, account=account), repaired


def _read(plan: Plan, split: str, image: RawImage) -> bytes:
    """Returns an image's bytes. Raises UnreadableImageError if a local disk fails; a remote file may be readable later."""
    if not image.size:
        return b""
    try:
        data = plan.raw.read(split, image, 0, image.size)
    except OSError as error:
        if not is_local(plan.raw.folder):
            raise
        raise images.UnreadableImageError(f"cannot be read ({error.strerror})") from error
    if len(data) < image.size:
        raise images.UnreadableImageError(f"has {len(data)} bytes where there were {image.size}: the raw data changed meanwhile")
    return data


def _threaded(plan: Plan, items: Sequence[Item], function: Callable[[Item], Result]) -> Iterator[Result]:
    """Yields the result of `function` for each item, in order. Uses several threads if the raw data is remote."""
    if is_local(plan.raw.folder):
        yield from map(function, items)
        return
    threads = _REMOTE_THREADS
    ahead: deque[Future[list[Result]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(items), _BATCH):
            ahead.append(pool.submit(lambda start: [function(item) for item in items[start : start + _BATCH]], start))
            if len(ahead) > threads:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
