"""Configuration: one frozen dataclass, changed only by `key=value` overrides, whole and checked from the start.

`resolve(preset, overrides)` is the single way to a `Config`; the presets themselves are in `trainer/presets.py`. Nothing
here needs TensorFlow.
"""

import dataclasses
import json
import math
import operator
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.shared.errors import UserError, nearest

Protocol = Literal["cached", "knn", "online", "official", "finetune-1", "finetune-10", "finetune-100"]
"""Ways to measure an encoder; docs/evaluation.md tells them apart."""


@dataclass(frozen=True)
class LinearEval:
    """How a pretrained encoder is measured."""

    protocols: tuple[Protocol, ...] = ("cached", "knn", "online")
    """What is measured; `cached` always is, for the untrained control and the classifier are its."""
    batch_size: int = 256
    """Images per forward pass of a replica; changes no result."""
    seed: int = 0

    l2_penalties: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    """Candidates for lambda in mean cross-entropy + lambda/2 |W|^2; the best on held-out training images is taken."""
    holdout_fraction: float = 0.1
    """Part of the images of the choice, by image ID, that score the candidates for lambda. The final fit uses all images."""
    choice_images: int = 100_000
    """Training images, at most, that lambda is chosen with. Of a larger split, so many are drawn by `seed`."""
    control_images: int = 50_000
    """Training images, at most, of the untrained control; 0 for no control. Of a larger split, so many are drawn by `seed`."""

    knn_k: int = 200
    """Neighbours that vote; all training images where there are fewer."""
    knn_temperature: float = 0.07
    """A neighbour of cosine s weighs exp(s / temperature)."""

    official_epochs: int = 90
    official_batch_size: int = 4096
    """Images per step of `official`; all training images where there are fewer."""
    official_base_learning_rate: float = 0.1
    """Peak learning rate: this * B / 256; cosine from the first step to 0."""

    finetune_1_epochs: int = 60
    finetune_10_epochs: int = 30
    finetune_100_epochs: int = 30
    finetune_batch_size: int = 4096
    """Images per step of fine-tuning; all labelled images where there are fewer."""
    finetune_base_learning_rate: float = 0.05
    """As `official_base_learning_rate`."""
    finetune_1_subset: str = ""
    """A file that lists the labelled images of `finetune-1`, one a line, in the place of those chosen by `seed`."""
    finetune_10_subset: str = ""
    train_names: str = ""
    """A file with the name of every training image, one a line; needed where a list has names and not image IDs."""


@dataclass(frozen=True)
class Config:
    """All that a pretraining run depends on besides the data and the code."""

    # Views
    image_size: int = 224
    """Side of a view, pixels."""
    crop_min_area: float = 0.08
    """Smallest area of a random resized crop, as a part of the image."""
    crop_interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How crops are resized: as PyTorch's official code does, or, at more cost to the host, as TensorFlow's does."""
    color_jitter_strength: float = 1.0
    blur: bool = True
    """Gaussian blur of half the views, kernel a tenth of the side, sigma .1 to 2."""
    eval_crop_proportion: float = 0.875
    """Part of the shorter side that evaluation sees."""

    # Encoder and heads
    depth: int = 50
    width_multiplier: float = 1.0
    selective_kernel_ratio: float = 0.0
    """Above 0, selective kernels (Li et al. 2019) with this reduction, and ResNet-D's stem and shortcuts; SimCLRv2 has 0.0625."""
    cifar_stem: bool = False
    """A 3x3 stem at stride 1 without pooling, for images of 32 px."""
    projection_layers: int = 2
    projection_dim: int = 128

    # Loss
    loss: Literal["global_contrastive", "nt_xent", "decoupled"] = "global_contrastive"
    variant: Literal["paper", "tf_official", "pt_official", "isogclr"] = "paper"
    """What is stored in u and how it starts, and whether temperatures are learned; only for the global contrastive loss."""
    temperature: float = 0.1
    """Of all images; where each learns its own, the one it starts with."""
    gamma: float = 0.9
    """Weight of the new estimate in u, in (0, 1]."""
    temperature_rho: float = 0.3
    """What an image pays for its temperature; with variant=isogclr, as are the next four."""
    temperature_learning_rate: float = 0.01
    temperature_momentum: float = 0.9
    """Weight of the new gradient, in (0, 1]."""
    temperature_min: float = 0.05
    temperature_max: float = 0.7

    # Optimisation
    epochs: int = 800
    global_batch_size: int = 512
    """Images per step over all replicas; each gives two views."""
    optimizer: Literal["lars", "momentum", "adamw"] = "lars"
    base_learning_rate: float = 0.075
    learning_rate_scaling: Literal["sqrt", "linear"] = "sqrt"
    """Peak learning rate: base * sqrt(B), or base * B / 256."""
    warmup_epochs: float = 10.0
    momentum: float = 0.9
    """Of LARS and SGD; AdamW's beta 1."""
    adam_beta_2: float = 0.999
    weight_decay: float = 1e-6
    precision: Literal["float32", "bfloat16"] = "float32"
    """What convolutions compute in. Variables, BN's statistics, u, the loss and the optimizer are float32 in both."""

    # Run
    seed: int = 0
    shuffle_window: int = 2048
    """Records shuffled among each other, in memory at once; blocks of records are shuffled over the whole set before."""
    cache: bool = False
    """Whether the encoded images stay in memory after the first reading; for sets that fit."""
    log_every_steps: int = 100
    checkpoint_every_epochs: int = 10
    keep_checkpoints: int = 2

    linear_eval: LinearEval = field(default_factory=LinearEval)

    def __post_init__(self) -> None:
        _check(self)


def feature_dim(config: Config) -> int:
    """Returns F, how many features the encoder makes of an image."""
    return (2048 if config.depth >= 50 else 512) * int(64 * config.width_multiplier) // 64


def _check(config: Config) -> None:
    """Raises UserError for a value or a combination that makes no sense, naming the field and what would."""
    # The global contrastive loss sums exp(1 / temperature) in float32; NT-Xent has no such bound.
    smallest = 0.013 if config.loss == "global_contrastive" else 1e-6
    rules: list[tuple[bool, str, str]] = [
        (config.image_size >= 8, "image_size", "at least 8"),
        (0 < config.crop_min_area <= 1, "crop_min_area", "in (0, 1]"),
        (0 < config.eval_crop_proportion <= 1, "eval_crop_proportion", "in (0, 1]"),
        (config.color_jitter_strength >= 0, "color_jitter_strength", "0 or more"),
        (config.depth in (10, 18, 34, 50, 101, 152, 200), "depth", "one of 10, 18, 34, 50, 101, 152, 200"),
        (config.width_multiplier * 64 >= 1, "width_multiplier", "at least 1/64"),
        (0 <= config.selective_kernel_ratio <= 1, "selective_kernel_ratio", "in [0, 1]"),
        (config.projection_layers >= 1, "projection_layers", "at least 1"),
        (config.projection_dim >= 1, "projection_dim", "at least 1"),
        (config.temperature >= smallest, "temperature", f"at least {smallest}"),
        (0 < config.gamma <= 1, "gamma", "in (0, 1]"),
        (config.temperature_rho >= 0, "temperature_rho", "0 or more"),
        (config.temperature_learning_rate >= 0, "temperature_learning_rate", "0 or more"),
        (0 < config.temperature_momentum <= 1, "temperature_momentum", "in (0, 1]"),
        (config.temperature_min >= smallest, "temperature_min", f"at least {smallest}"),
        (
            config.temperature_max >= config.temperature_min,
            "temperature_max",
            f"temperature_min={config.temperature_min} or more",
        ),
        (config.epochs >= 1, "epochs", "at least 1"),
        (config.global_batch_size >= 2, "global_batch_size", "at least 2 (an image needs others to contrast with)"),
        (config.base_learning_rate > 0, "base_learning_rate", "above 0"),
        (0 <= config.warmup_epochs <= config.epochs, "warmup_epochs", f"between 0 and epochs={config.epochs}"),
        (0 <= config.momentum < 1, "momentum", "in [0, 1)"),
        (0 <= config.adam_beta_2 < 1, "adam_beta_2", "in [0, 1)"),
        (config.weight_decay >= 0, "weight_decay", "0 or more"),
        (0 <= config.seed < 2**31, "seed", "in [0, 2^31)"),
        (config.shuffle_window >= 1, "shuffle_window", "at least 1"),
        (config.log_every_steps >= 1, "log_every_steps", "at least 1"),
        (config.checkpoint_every_epochs >= 1, "checkpoint_every_epochs", "at least 1"),
        (config.keep_checkpoints >= 1, "keep_checkpoints", "at least 1"),
        (config.linear_eval.batch_size >= 1, "linear_eval.batch_size", "at least 1"),
        (bool(config.linear_eval.l2_penalties), "linear_eval.l2_penalties", "at least one number, as in 1e-2,1e-3"),
        (all(x >= 0 for x in config.linear_eval.l2_penalties), "linear_eval.l2_penalties", "0 or more, each"),
        (0 < config.linear_eval.holdout_fraction < 1, "linear_eval.holdout_fraction", "in (0, 1)"),
        (config.linear_eval.choice_images >= 2, "linear_eval.choice_images", "at least 2"),
        (config.linear_eval.control_images >= 0, "linear_eval.control_images", "0 (no control) or more"),
        (config.linear_eval.knn_k >= 1, "linear_eval.knn_k", "at least 1"),
        (config.linear_eval.knn_temperature > 0, "linear_eval.knn_temperature", "above 0"),
        (config.linear_eval.official_epochs >= 1, "linear_eval.official_epochs", "at least 1"),
        (config.linear_eval.official_batch_size >= 2, "linear_eval.official_batch_size", "at least 2"),
        (config.linear_eval.official_base_learning_rate > 0, "linear_eval.official_base_learning_rate", "above 0"),
        (config.linear_eval.finetune_1_epochs >= 1, "linear_eval.finetune_1_epochs", "at least 1"),
        (config.linear_eval.finetune_10_epochs >= 1, "linear_eval.finetune_10_epochs", "at least 1"),
        (config.linear_eval.finetune_100_epochs >= 1, "linear_eval.finetune_100_epochs", "at least 1"),
        (config.linear_eval.finetune_batch_size >= 2, "linear_eval.finetune_batch_size", "at least 2"),
        (config.linear_eval.finetune_base_learning_rate > 0, "linear_eval.finetune_base_learning_rate", "above 0"),
    ]
    for holds, name, allowed in rules:
        if not holds:
            raise UserError(f"{name}={operator.attrgetter(name)(config)} makes no sense: it must be {allowed}")
    if config.selective_kernel_ratio > 0 and config.depth < 50:
        raise UserError(f"selective_kernel_ratio={config.selective_kernel_ratio} needs bottleneck blocks: take depth=50 or more")
    if config.loss == "global_contrastive" and config.variant == "tf_official" and config.gamma <= 0.5:
        raise UserError(
            f"gamma={config.gamma} diverges with variant=tf_official, which stores the sum of both views' u: "
            "take gamma above 0.5, or variant=paper"
        )


def override(config: Config, overrides: Iterable[str]) -> Config:
    """Returns `config` with each `key=value` of `overrides` in place, coerced to its field's declared type.

    Keys of the linear eval are written `linear_eval.NAME`. Numbers may come as any text that has the value, since pipelines
    turn 512 into 512.0. Raises UserError for what is no `key=value`, an unknown key (with the nearest one that exists), a
    value of another type, and a config that makes no sense.
    """
    changes: dict[str, Any] = {}
    for item in overrides:
        key, separator, text = item.partition("=")
        key = key.strip()
        if not separator:
            raise UserError(f"{item!r} is not an override: write key=value, as in epochs=100")
        types = field_types()
        if key not in types:
            raise UserError(f"{key} is not a setting{nearest(key, types)}")
        changes[key] = _coerce(key, text.strip(), types[key])
    linear_eval = {key.removeprefix(LINEAR_EVAL): value for key, value in changes.items() if key.startswith(LINEAR_EVAL)}
    pretraining = {key: value for key, value in changes.items() if not key.startswith(LINEAR_EVAL)}
    return dataclasses.replace(config, **pretraining, linear_eval=dataclasses.replace(config.linear_eval, **linear_eval))


LINEAR_EVAL = "linear_eval."
"""What the keys of the linear eval begin with; all others are pretraining's."""


def split_overrides(overrides: Iterable[str]) -> tuple[list[str], list[str]]:
    """Returns the overrides of pretraining and those of the linear eval, each in its order."""
    items = list(overrides)
    return (
        [item for item in items if not item.strip().startswith(LINEAR_EVAL)],
        [item for item in items if item.strip().startswith(LINEAR_EVAL)],
    )


def field_types() -> dict[str, Any]:
    """Returns every key that can be overridden, with its type."""
    own = {name: kind for name, kind in typing.get_type_hints(Config).items() if name != "linear_eval"}
    return own | {LINEAR_EVAL + name: kind for name, kind in typing.get_type_hints(LinearEval).items()}


def _coerce(key: str, text: str, kind: Any) -> Any:
    try:
        if kind is str:
            return text
        if typing.get_origin(kind) is Literal:
            choices = typing.get_args(kind)
            if text not in choices:
                raise UserError(f"{key}={text} is not one of {', '.join(choices)}{nearest(text, choices)}")
            return text
        if typing.get_origin(kind) is tuple:
            parts = [part.strip() for part in text.strip("()[]").split(",")]
            return tuple(_coerce(key, part, typing.get_args(kind)[0]) for part in parts if part)
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return _number(text, kind)
    except (ValueError, KeyError) as error:
        wanted = {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "numbers with commas between")
        raise UserError(f"{key}={text} is not {wanted}") from error


def _number(text: str, kind: type) -> int | float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    if kind is int:
        if value != int(value):
            raise ValueError(text)
        return int(text) if text.strip().lstrip("+-").isdigit() else int(value)
    return value


def config_to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=1, sort_keys=True) + "\n"


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """Reads what `config_to_json` wrote, parsed. Raises UserError where a setting is missing or unknown.

    A setting of the linear eval may be missing, and has its default then: it is chosen anew at every evaluation.
    """
    flat = {key: value for key, value in values.items() if key != "linear_eval"}
    flat |= {LINEAR_EVAL + key: value for key, value in dict(values.get("linear_eval", {})).items()}
    known = set(field_types())
    unlike = (set(flat) - known) | {key for key in known - set(flat) if not key.startswith(LINEAR_EVAL)}
    if unlike:
        raise UserError(f"the stored config is of another version: it differs from this one's in {', '.join(sorted(unlike))}")
    texts = (f"{key}={','.join(map(str, value)) if isinstance(value, list | tuple) else value}" for key, value in flat.items())
    return override(Config(), texts)
