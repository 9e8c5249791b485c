"""What the two layouts of ImageNet on Hugging Face share: names that end in the synset."""

import posixpath
import re

from beam_jobs.layouts.layout import StreamError

_NAME = re.compile(r"(?P<stem>.+)_(?P<synset>n\d{8})(?P<ending>\.\w+)")


def official_name(path: str) -> tuple[str, str]:
    """Returns an image's official name and its synset.

    n01440764_18_n01440764.JPEG is n01440764_18.JPEG, and ILSVRC2012_val_00000293_n01440764.JPEG is
    ILSVRC2012_val_00000293.JPEG. Raises StreamError if the name does not end in a synset.
    """
    match = _NAME.fullmatch(posixpath.basename(path))
    if match is None:
        raise StreamError(f"has an image named {path!r}: names must end in the synset, as n01440764_18_n01440764.JPEG")
    return match["stem"] + match["ending"], match["synset"]
