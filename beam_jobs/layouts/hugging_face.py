"""What the two layouts of ImageNet on Hugging Face share: where the files lie, and names that end in the synset."""

import posixpath
import re
from collections.abc import Mapping

from beam_jobs import files
from beam_jobs.layouts.layout import Found, StreamError
from beam_jobs.layouts.passed_over import TEST, PassedOver

_NAME = re.compile(r"(?P<stem>.+)_(?P<synset>n\d{8})(?P<ending>\.\w+)")


def official_name(file: str, path: str) -> tuple[str, str]:
    """Returns an image's official name and its synset.

    n01440764_18_n01440764.JPEG is n01440764_18.JPEG, and ILSVRC2012_val_00000293_n01440764.JPEG is
    ILSVRC2012_val_00000293.JPEG. Raises StreamError, which names `file`, if the name does not end in a synset.
    """
    match = _NAME.fullmatch(posixpath.basename(path))
    if match is None:
        raise StreamError(f"{file} has an image named {path!r}: names must end in the synset, as n01440764_18_n01440764.JPEG")
    return match["stem"] + match["ending"], match["synset"]


def find_files(folder: str, split: str, prefixes: Mapping[str, str], wanted: re.Pattern) -> Found | None:
    """Returns the files of a split in a raw folder, or None if there are none. Files of `test` count with the training images.

    prefixes: how the names of a split's files begin
    wanted: pattern of the names
    """
    for within in ("data", ""):
        where = files.join(folder, within) if within else folder
        found = [info for info in files.starting_with(where, prefixes[split]) if wanted.fullmatch(info.name)]
        if not found:
            continue
        named = tuple(info._replace(name=posixpath.join(within, info.name)) for info in found)
        tests = files.starting_with(where, prefixes["test"]) if split == "train" else []
        others = tuple(PassedOver(posixpath.join(within, info.name), TEST, info.size) for info in tests)
        why = f"{named[0].name} is there" + (f" and {len(named) - 1} more" if len(named) > 1 else "")
        return Found(named, why, others=others)
    return None
