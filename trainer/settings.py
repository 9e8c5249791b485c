"""The settings: what each is, what it may be, and what it has an effect with.

A setting is a field of the group that it is of. Its bounds are annotated-types' and stand beside it; its choices are a Literal.
`--set` names a setting by its field, `depth=18`; a group's `name` by the group, `loss=nt_xent`; those of the linear eval by
`linear_eval.FIELD`. Nothing here needs TensorFlow.
"""

import dataclasses
import functools
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval, MinLen

from trainer.shared.errors import UserError, nearest


@dataclass(frozen=True)
class OnlyWith:
    """Marks a setting that has an effect only where the setting `key` is one of `values`."""

    key: str
    values: tuple[str, ...]


_WITH_U = OnlyWith("loss", ("global_contrastive",))
_WITH_OWN_TEMPERATURES = OnlyWith("variant", ("isogclr",))


@dataclass(frozen=True)
class Group:
    """Settings that belong together. Raises UserError, naming the setting, where a value is out of its bounds."""

    def __post_init__(self) -> None:
        (group,) = (name for name, kind in GROUPS.items() if kind is type(self))
        for one in _fields_of(group):
            one.check(getattr(self, one.name))


@dataclass(frozen=True)
class ViewSettings(Group):
    """What an image goes through before the encoder sees it."""

    image_size: Annotated[int, Ge(8)] = 224
    """Side of a view, pixels."""
    crop_min_area: Annotated[float, Interval(gt=0, le=1)] = 0.08
    """Smallest area of a random resized crop, as a part of the image."""
    crop_interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How crops are resized: as PyTorch's official code does, or, at more cost to the host, as TensorFlow's does."""
    color_jitter_strength: Annotated[float, Ge(0)] = 1.0
    blur: bool = True
    """Gaussian blur of half the views, kernel a tenth of the side, sigma .1 to 2."""
    eval_crop_proportion: Annotated[float, Interval(gt=0, le=1)] = 0.875
    """Part of the shorter side that evaluation sees."""


@dataclass(frozen=True)
class EncoderSettings(Group):
    """The encoder and the projection head."""

    depth: Literal[10, 18, 34, 50, 101, 152, 200] = 50
    """Layers of the ResNet."""
    width_multiplier: Annotated[float, Ge(1 / 64)] = 1.0
    """Channels, as a multiple of the usual 64 in the first group."""
    selective_kernel_ratio: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Above 0, selective kernels (Li et al. 2019) with this reduction, and ResNet-D's stem and shortcuts; SimCLRv2 has 0.0625."""
    cifar_stem: bool = False
    """A 3x3 stem at stride 1 without pooling, for images of 32 px."""
    projection_layers: Annotated[int, Ge(1)] = 2
    projection_dim: Annotated[int, Ge(1)] = 128
    precision: Literal["float32", "bfloat16"] = "float32"
    """What convolutions compute in. Variables, BN's statistics, u, the loss and the optimizer are float32 in both."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.selective_kernel_ratio > 0 and self.depth < 50:
            raise UserError(
                f"selective_kernel_ratio={self.selective_kernel_ratio} needs bottleneck blocks: take depth=50 or more"
            )

    @property
    def feature_dim(self) -> int:
        """F, how many features the encoder makes of an image."""
        return (2048 if self.depth >= 50 else 512) * int(64 * self.width_multiplier) // 64


@dataclass(frozen=True)
class LossSettings(Group):
    """The contrastive loss."""

    name: Literal["global_contrastive", "nt_xent", "decoupled"] = "global_contrastive"
    variant: Annotated[Literal["paper", "tf_official", "pt_official", "isogclr"], _WITH_U] = "paper"
    """What is stored in u and how it starts, and whether every image learns a temperature of its own."""
    temperature: Annotated[float, Ge(1e-6)] = 0.1
    """Of all images; where each learns its own, the one it starts with."""
    gamma: Annotated[float, Interval(gt=0, le=1), _WITH_U] = 0.9
    """Weight of the new estimate in u."""
    temperature_rho: Annotated[float, Ge(0), _WITH_OWN_TEMPERATURES] = 0.3
    """What an image pays for its temperature (Qiu et al. 2023, rho)."""
    temperature_learning_rate: Annotated[float, Ge(0), _WITH_OWN_TEMPERATURES] = 0.01
    temperature_momentum: Annotated[float, Interval(gt=0, le=1), _WITH_OWN_TEMPERATURES] = 0.9
    """Weight of the new gradient of a temperature."""
    temperature_min: Annotated[float, Ge(0.013), _WITH_OWN_TEMPERATURES] = 0.05
    temperature_max: Annotated[float, Ge(0.013), _WITH_OWN_TEMPERATURES] = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name != "global_contrastive":
            return
        if self.temperature < 0.013:
            raise _senseless("temperature", self.temperature, "at least 0.013: exp(1 / temperature) is summed in float32")
        if self.temperature_max < self.temperature_min:
            raise _senseless("temperature_max", self.temperature_max, f"temperature_min={self.temperature_min} or more")
        if self.variant == "tf_official" and self.gamma <= 0.5:
            raise UserError(
                f"gamma={self.gamma} diverges with variant=tf_official, which stores the sum of both views' u: "
                "take gamma above 0.5, or variant=paper"
            )


@dataclass(frozen=True)
class OptimizerSettings(Group):
    """How long training is, and by what steps."""

    name: Literal["lars", "momentum", "adamw"] = "lars"
    epochs: Annotated[int, Ge(1)] = 800
    global_batch_size: Annotated[int, Ge(2)] = 512
    """Images per step over all replicas; each gives two views, and needs others to contrast with."""
    base_learning_rate: Annotated[float, Gt(0)] = 0.075
    learning_rate_scaling: Literal["sqrt", "linear"] = "sqrt"
    """Peak learning rate: base * sqrt(B), or base * B / 256."""
    warmup_epochs: Annotated[float, Ge(0)] = 10.0
    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """Of LARS and SGD; AdamW's beta 1."""
    adam_beta_2: Annotated[float, Interval(ge=0, lt=1), OnlyWith("optimizer", ("adamw",))] = 0.999
    weight_decay: Annotated[float, Ge(0)] = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_epochs > self.epochs:
            raise _senseless("warmup_epochs", self.warmup_epochs, f"between 0 and epochs={self.epochs}")


@dataclass(frozen=True)
class RunSettings(Group):
    """The seed, and what a run keeps, logs and holds in memory."""

    seed: Annotated[int, Interval(ge=0, lt=2**31)] = 0
    shuffle_window: Annotated[int, Ge(1)] = 2048
    """Records shuffled among each other, in memory at once; blocks of records are shuffled over the whole set before."""
    cache: bool = False
    """Whether the encoded images stay in memory after the first reading; for sets that fit."""
    log_every_steps: Annotated[int, Ge(1)] = 100
    checkpoint_every_epochs: Annotated[int, Ge(1)] = 10
    keep_checkpoints: Annotated[int, Ge(1)] = 2


ProtocolName = Literal["cached", "knn", "online", "official", "finetune-1", "finetune-10", "finetune-100"]
"""Ways to measure an encoder; docs/evaluation.md tells them apart."""


@dataclass(frozen=True)
class LinearEvalSettings(Group):
    """How a pretrained encoder is measured."""

    protocols: tuple[ProtocolName, ...] = ("cached", "knn", "online")
    """What is measured; `cached` always is, for the untrained control and the classifier are its."""
    batch_size: Annotated[int, Ge(1)] = 256
    """Images per forward pass of a replica; changes no result."""
    seed: int = 0

    l2_penalties: Annotated[tuple[Annotated[float, Ge(0)], ...], MinLen(1)] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    """Candidates for lambda in mean cross-entropy + lambda/2 |W|^2; the best on held-out training images is taken."""
    holdout_fraction: Annotated[float, Interval(gt=0, lt=1)] = 0.1
    """Part of the images of the choice, by image ID, that score the candidates for lambda. The final fit uses all images."""
    choice_images: Annotated[int, Ge(2)] = 100_000
    """Training images, at most, that lambda is chosen with. Of a larger split, so many are drawn by `seed`."""
    control_images: Annotated[int, Ge(0)] = 50_000
    """Training images, at most, of the untrained control; 0 for no control. Of a larger split, so many are drawn by `seed`."""

    knn_k: Annotated[int, Ge(1)] = 200
    """Neighbours that vote; all training images where there are fewer."""
    knn_temperature: Annotated[float, Gt(0)] = 0.07
    """A neighbour of cosine s weighs exp(s / temperature)."""

    official_epochs: Annotated[int, Ge(1)] = 90
    official_batch_size: Annotated[int, Ge(2)] = 4096
    """Images per step of `official`; all training images where there are fewer."""
    official_base_learning_rate: Annotated[float, Gt(0)] = 0.1
    """Peak learning rate: this * B / 256; cosine from the first step to 0."""

    finetune_1_epochs: Annotated[int, Ge(1)] = 60
    finetune_10_epochs: Annotated[int, Ge(1)] = 30
    finetune_100_epochs: Annotated[int, Ge(1)] = 30
    finetune_batch_size: Annotated[int, Ge(2)] = 4096
    """Images per step of fine-tuning; all labelled images where there are fewer."""
    finetune_base_learning_rate: Annotated[float, Gt(0)] = 0.05
    """Peak learning rate: this * B / 256; cosine from the first step to 0."""
    finetune_1_subset: str = ""
    """A file that lists the labelled images of `finetune-1`, one a line, in the place of those chosen by `seed`."""
    finetune_10_subset: str = ""
    """A file that lists the labelled images of `finetune-10`, one a line, in the place of those chosen by `seed`."""
    train_names: str = ""
    """A file with the name of every training image, one a line; needed where a list has names and not image IDs."""


GROUPS: dict[str, type[Group]] = {
    "views": ViewSettings,
    "encoder": EncoderSettings,
    "loss": LossSettings,
    "optimizer": OptimizerSettings,
    "run": RunSettings,
    "linear_eval": LinearEvalSettings,
}
LINEAR_EVAL = "linear_eval."
"""What the keys of the linear eval begin with; all others are pretraining's."""


@dataclass(frozen=True)
class Setting:
    """A field of a group."""

    key: str
    """How `--set` names it."""
    group: str
    name: str
    kind: Any
    """Its type: int, float, bool, str, a Literal, or a tuple of one of them."""
    bounds: tuple[Any, ...]
    needs: tuple[OnlyWith, ...]
    default: Any

    @property
    def choices(self) -> tuple[Any, ...]:
        """All values that it may have, where those can be listed."""
        return _choices_of(self.kind)

    def check(self, value: Any) -> None:
        """Raises UserError where `value` is none of the choices, or out of the bounds."""
        for one, kind, bounds in self._parts(value):
            choices = _choices_of(kind)
            if choices and one not in choices:
                named = ", ".join(map(str, choices))
                raise UserError(f"{self.key}={one} is not one of {named}{nearest(str(one), map(str, choices))}")
            for bound in bounds:
                if not _holds(bound, one):
                    raise _senseless(self.key, one, _in_words(bound))

    def _parts(self, value: Any) -> Iterator[tuple[Any, Any, tuple[Any, ...]]]:
        """Yields a value, and what it is made of, each with its type and bounds."""
        yield value, self.kind, self.bounds
        if typing.get_origin(self.kind) is tuple:
            kind, markers = _plain(typing.get_args(self.kind)[0])
            for one in value:
                yield one, kind, markers


@functools.cache
def settings() -> dict[str, Setting]:
    """Returns every setting by its key."""
    return {one.key: one for group in GROUPS for one in _fields_of(group)}


@functools.cache
def _fields_of(group: str) -> tuple[Setting, ...]:
    hints = typing.get_type_hints(GROUPS[group], include_extras=True)
    return tuple(_setting(group, field, hints[field.name]) for field in dataclasses.fields(GROUPS[group]))


def _setting(group: str, field: "dataclasses.Field[Any]", hint: Any) -> Setting:
    key = group if field.name == "name" else f"{LINEAR_EVAL}{field.name}" if group == "linear_eval" else field.name
    kind, markers = _plain(hint)
    needs = tuple(marker for marker in markers if isinstance(marker, OnlyWith))
    bounds = tuple(marker for marker in markers if not isinstance(marker, OnlyWith))
    return Setting(key, group, field.name, kind, bounds, needs, field.default)


def _plain(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Returns a type without its markers, and the markers."""
    if typing.get_origin(hint) is not Annotated:
        return hint, ()
    kind, *markers = typing.get_args(hint)
    return kind, tuple(markers)


def _choices_of(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def _holds(bound: Any, value: Any) -> bool:
    match bound:
        case Ge(ge):
            return bool(value >= ge)
        case Gt(gt):
            return bool(value > gt)
        case MinLen(length):
            return len(value) >= length
        case Interval(gt=gt, ge=ge, lt=lt, le=le):
            above = (gt is None or value > gt) and (ge is None or value >= ge)
            return above and (lt is None or value < lt) and (le is None or value <= le)
    raise TypeError(f"no check for {bound}")


def _in_words(bound: Any) -> str:
    """Says what values are within a bound, as in "in (0, 1]"."""
    match bound:
        case Ge(ge):
            return "0 or more" if ge == 0 else f"at least {ge:g}"
        case Gt(gt):
            return f"above {gt}"
        case MinLen(length):
            return f"at least {length} of them, with commas between"
        case Interval(gt=gt, ge=ge, lt=lt, le=le):
            left = f"[{ge}" if gt is None else f"({gt}"
            return f"in {left}, {f'{le}]' if lt is None else f'{lt})'}"
    raise TypeError(f"no words for {bound}")


def _senseless(key: str, value: Any, allowed: str) -> UserError:
    return UserError(f"{key}={value} makes no sense: it must be {allowed}")
