"""Labels of validation images that come as pairs of a name and a synset. Not a layout: several layouts use it."""

from collections.abc import Mapping, Sequence, Set

from beam_jobs.layouts.layout import and_more


def synsets_by_name(
    file: str, pairs: Mapping[str, str], names: Sequence[str], known: Set[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the synset of each of `names` and the problems of the labels. A missing label is "".

    A synset that is not in `known` is a problem, unless `known` is None. `file` is the file of the pairs.
    """
    problems = []
    missing = [name for name in names if name not in pairs]
    if missing:
        more = f", and for {len(missing) - 1} more images" if len(missing) > 1 else ""
        problems.append(f"{file} has no label for {missing[0]}{more}")
    absent = sorted(pairs.keys() - set(names))
    if absent:
        more = f", and {len(absent) - 1} more" if len(absent) > 1 else ""
        problems.append(f"{file} has a label for {absent[0]}, which is not there{more}")
    synsets = tuple(pairs.get(name, "") for name in names)
    unknown = sorted({synset for synset in synsets if synset and known is not None and synset not in known})
    if unknown:
        problems.append(f"{file}: {unknown[0]} is not a synset of the training images{and_more(unknown)}")
    return synsets, tuple(problems)
