"""The validation labels of ImageNet's devkit, unpacked or not. Not a layout: any layout with flat validation images uses it.

    ILSVRC2012_validation_ground_truth.txt    a number a line, in the order of the images' names
    meta.mat                                  the synset of each number

They are looked for in ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_devkit_t12/data/, data/ and the raw folder itself. The devkit's
numbers are not labels: its order of classes is another one than that of synsets.
"""

import gzip
import io
import tarfile
import zlib

from beam_jobs import files
from beam_jobs.listings import FileInfo
from trainer.shared.errors import UserError

ARCHIVE = "ILSVRC2012_devkit_t12.tar.gz"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
META = "meta.mat"
_FOLDERS = ("ILSVRC2012_devkit_t12/data/", "data/", "")


def find(folder: str) -> FileInfo | None:
    """Returns the file in a raw folder that has the ground truth, or None if there is none. Size and time are meta.mat's too."""
    for within in _FOLDERS:
        if found := files.find(files.join(folder, f"{within}{GROUND_TRUTH}")):
            meta = files.find(files.join(folder, f"{within}{META}")) or found
            return FileInfo(f"{within}{GROUND_TRUTH}", found.size + meta.size, max(found.changed, meta.changed))
    found = files.find(files.join(folder, ARCHIVE))
    return found._replace(name=ARCHIVE) if found else None


def is_ground_truth(name: str) -> bool:
    """Returns whether a file has the devkit's labels, judged by its name."""
    return name.rpartition("/")[2] in (ARCHIVE, GROUND_TRUTH)


def read(path: str) -> list[str]:
    """Returns the synset of each validation image in the order of names, from a file that `is_ground_truth`.

    Raises UserError if meta.mat is missing or does not fit, and if a file cannot be read.
    """
    if path.endswith(ARCHIVE):
        truth, meta = _from_archive(path)
    else:
        meta_path = path.removesuffix(GROUND_TRUTH) + META
        if not files.find(meta_path):
            raise UserError(f"{meta_path} is missing: it says which synset each number of {GROUND_TRUTH} is")
        truth, meta = files.read(path), files.read(meta_path)
    synset_of = _synsets(meta, path)
    numbers = truth.decode(errors="replace").split()
    for line, number in enumerate(numbers, start=1):
        if number not in synset_of:
            raise UserError(f"{path} line {line}: {number} is not an ILSVRC2012_ID of {META}, which are 1 to {len(synset_of)}")
    return [synset_of[number] for number in numbers]


def _from_archive(path: str) -> tuple[bytes, bytes]:
    found = {}
    try:
        with files.open_to_read(path) as file, tarfile.open(fileobj=file, mode="r|gz") as archive:
            for member in archive:
                base = member.name.rpartition("/")[2]
                if base in (GROUND_TRUTH, META) and member.isreg():
                    content = archive.extractfile(member)
                    found[base] = content.read() if content else b""
    except (tarfile.ReadError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} cannot be read ({error}): get it again") from error
    if missing := [name for name in (GROUND_TRUTH, META) if name not in found]:
        raise UserError(f"{path} lacks {' and '.join(missing)}: get it again")
    return found[GROUND_TRUTH], found[META]


def _synsets(meta: bytes, path: str) -> dict[str, str]:
    """Returns the synset of each ILSVRC2012_ID. Synsets with children are inner nodes of the hierarchy and have no images."""
    from scipy.io import loadmat

    try:
        table = loadmat(io.BytesIO(meta), squeeze_me=True, variable_names=["synsets"])["synsets"]
        rows = zip(table["ILSVRC2012_ID"].tolist(), table["WNID"].tolist(), table["num_children"].tolist(), strict=True)
        return {str(int(number)): str(synset) for number, synset, children in rows if not children}
    except Exception as error:  # scipy raises errors of all kinds on files that are not MATLAB's
        raise UserError(f"{META} of {path} is not the devkit's ({' '.join(str(error).split())}): get it again") from error
