"""The subsets of ImageNet that papers use: their names, synsets and numbers of images."""

import itertools
from collections.abc import Mapping, Sequence

from beam_jobs import files
from beam_jobs.layouts.names import canonical
from trainer.shared.data import DATASETS, digest_of
from trainer.shared.errors import UserError

_IMAGENET_S_SYNSETS = """
n01440764 n01443537 n01484850 n01491361 n01494475 n01496331 n01498041 n01514668 n01514859
n01518878 n01530575 n01531178 n01532829 n01534433 n01537544 n01558993 n01560419 n01580077
n01582220 n01592084 n01601694 n01608432 n01614925 n01616318 n01622779 n01629819 n01630670
n01631663 n01632458 n01632777 n01641577 n01644373 n01644900 n01664065 n01665541 n01667114
n01667778 n01669191 n01675722 n01677366 n01682714 n01685808 n01687978 n01688243 n01689811
n01692333 n01693334 n01694178 n01695060 n01697457 n01698640 n01704323 n01728572 n01728920
n01729322 n01729977 n01734418 n01735189 n01737021 n01739381 n01740131 n01742172 n01744401
n01748264 n01749939 n01751748 n01753488 n01755581 n01756291 n01768244 n01770081 n01770393
n01773157 n01773549 n01773797 n01774384 n01774750 n01775062 n01776313 n01784675 n01795545
n01796340 n01797886 n01798484 n01806143 n01806567 n01807496 n01817953 n01818515 n01819313
n01820546 n01824575 n01828970 n01829413 n01833805 n01843065 n01843383 n01847000 n01855032
n01855672
"""
IMAGENET_S = tuple(_IMAGENET_S_SYNSETS.split())
"""The first 100 synsets in sorted order: ImageNet-S of Yuan et al. 2022 (SogCLR)."""

_IMAGENET100_CMC_SYNSETS = """
n01558993 n01692333 n01729322 n01735189 n01749939 n01773797 n01820546 n01855672 n01978455
n01980166 n01983481 n02009229 n02018207 n02085620 n02086240 n02086910 n02087046 n02089867
n02089973 n02090622 n02091831 n02093428 n02099849 n02100583 n02104029 n02105505 n02106550
n02107142 n02108089 n02109047 n02113799 n02113978 n02114855 n02116738 n02119022 n02123045
n02138441 n02172182 n02231487 n02259212 n02326432 n02396427 n02483362 n02488291 n02701002
n02788148 n02804414 n02859443 n02869837 n02877765 n02974003 n03017168 n03032252 n03062245
n03085013 n03259280 n03379051 n03424325 n03492542 n03494278 n03530642 n03584829 n03594734
n03637318 n03642806 n03764736 n03775546 n03777754 n03785016 n03787032 n03794056 n03837869
n03891251 n03903868 n03930630 n03947888 n04026417 n04067472 n04099969 n04111531 n04127249
n04136333 n04229816 n04238763 n04336792 n04418357 n04429376 n04435653 n04485082 n04493381
n04517823 n04589890 n04592741 n07714571 n07715103 n07753275 n07831146 n07836838 n13037406
n13040303
"""
IMAGENET100_CMC = tuple(_IMAGENET100_CMC_SYNSETS.split())
"""ImageNet-100 of Tian et al. 2020 (Contrastive Multiview Coding)."""

SUBSETS = {"imagenet_s": IMAGENET_S, "imagenet100_cmc": IMAGENET100_CMC}


def synsets_of(subset: str) -> tuple[str, ...]:
    """Returns the sorted synsets of a subset: a name in `SUBSETS`, or a file with a synset a line.

    Raises UserError if it is neither, or if the file is empty or names a synset twice.
    """
    if subset in SUBSETS:
        return tuple(sorted(SUBSETS[subset]))
    if not files.find(subset):
        raise UserError(f"subset={subset} is neither {' nor '.join(SUBSETS)}, nor a file with a synset a line")
    named = sorted(map(canonical, files.read_lines(subset)))
    if not named:
        raise UserError(f"{subset} is empty: it must have a synset a line")
    if twice := next((synset for synset, following in itertools.pairwise(named) if synset == following), None):
        raise UserError(f"{subset} has {twice} twice: each synset must be there once")
    return tuple(named)


def known_counts(synsets: Sequence[str]) -> Mapping[str, int] | None:
    """Returns the number of ImageNet's images of these synsets by split, or None if it is not known.

    It is known for all 1,000 synsets and for the named subsets.
    """
    digest = digest_of(synsets)
    return next((known.images for known in DATASETS.values() if known.synsets == digest), None)
