"""The settings: the meaning, the type and the allowed values of each, and the settings that it depends on.

A setting is a field of a group. Its type is annotated with its bounds (annotated-types); choices are a Literal. The key of a
setting, as `--set` takes it, is the field's name: `depth=18`. Exceptions: the key of a group's field `name` is the group's name,
as in `loss=nt_xent`; keys of the linear eval are `linear_eval.FIELD`; keys of the conversion are `data.FIELD`, and their group is
in `trainer.shared.data`, because the conversion knows nothing else of this package. This module does not need TensorFlow.
"""

import functools
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Interval, MinLen

from trainer.shared.data import DataSettings
from trainer.shared.errors import UserError
from trainer.shared.settings import Group, OnlyWith, Setting, fields_of, out_of_bounds

_WITH_U = OnlyWith("loss", ("global_contrastive",))
_WITH_OWN_TEMPERATURES = OnlyWith("variant", ("isogclr",))


@dataclass(frozen=True)
class ViewSettings(Group):
    """Cropping and augmentation of an image before the encoder."""

    GROUP: ClassVar[str] = "views"
    image_size: Annotated[int, Ge(8)] = 224
    """Side of a view, pixels."""
    crop_min_area: Annotated[float, Interval(gt=0, le=1)] = 0.08
    """Smallest area of a random resized crop, as a fraction of the image's area."""
    crop_interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Resizing of random crops: `bilinear` as in the official PyTorch code, `bicubic` as in the TensorFlow code, and slower."""
    color_jitter_strength: Annotated[float, Ge(0)] = 1.0
    blur: bool = True
    """Whether half the views get a Gaussian blur. The kernel is a tenth of the side, sigma is 0.1 to 2 pixels."""
    eval_crop_proportion: Annotated[float, Interval(gt=0, le=1)] = 0.875
    """Side of the evaluation crop, as a fraction of the image's shorter side."""


@dataclass(frozen=True)
class EncoderSettings(Group):
    """The encoder and the projection head."""

    GROUP: ClassVar[str] = "encoder"
    depth: Literal[10, 18, 34, 50, 101, 152, 200] = 50
    """Number of layers of the ResNet."""
    width_multiplier: Annotated[float, Ge(1 / 64)] = 1.0
    """Multiplies the channels of every layer; at 1 the first group has 64."""
    selective_kernel_ratio: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Reduction of selective kernels (Li et al. 2019). Above 0 also adds ResNet-D's stem and shortcuts; SimCLRv2 has 0.0625."""
    cifar_stem: bool = False
    """Whether the stem is a 3x3 convolution at stride 1 without pooling, for images of 32 px."""
    pool_padding: Annotated[Literal["tensorflow", "torch"], OnlyWith("cifar_stem", (False,))] = "tensorflow"
    """Padding of the pool after the stem. The official TensorFlow code pads below and on the right, PyTorch on all sides."""
    input_normalization: Literal["none", "imagenet"] = "none"
    """Whether the encoder first normalises its input, RGB in [0, 1], by the mean and deviation of ImageNet's pixels."""
    projection_layers: Annotated[int, Ge(1)] = 2
    projection_hidden_dim: Annotated[int, Ge(0)] = 0
    """Width of the projection head's hidden layers; 0 for the number of features."""
    projection_dim: Annotated[int, Ge(1)] = 128
    precision: Literal["float32", "bfloat16"] = "float32"
    """Data type of the convolutions. Variables, BN's statistics, u, the loss and the optimizer are always float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.selective_kernel_ratio > 0 and self.depth < 50:
            raise UserError(
                f"selective_kernel_ratio={self.selective_kernel_ratio} needs bottleneck blocks: set depth to 50 or more"
            )

    @property
    def feature_dim(self) -> int:
        """F, the number of features of an image."""
        return (2048 if self.depth >= 50 else 512) * int(64 * self.width_multiplier) // 64


@dataclass(frozen=True)
class LossSettings(Group):
    """The contrastive loss."""

    GROUP: ClassVar[str] = "loss"
    name: Literal["global_contrastive", "nt_xent", "decoupled"] = "global_contrastive"
    variant: Annotated[Literal["paper", "tf_official", "pt_official", "isogclr"], _WITH_U] = "paper"
    """How u is stored and initialized. With `isogclr` every image also learns its own temperature."""
    temperature: Annotated[float, Ge(1e-6)] = 0.1
    """Softmax temperature. With variant=isogclr, each image's initial temperature."""
    gamma: Annotated[float, Interval(gt=0, le=1), _WITH_U] = 0.9
    """Weight of the new estimate in the moving average u."""
    temperature_rho: Annotated[float, Ge(0), _WITH_OWN_TEMPERATURES] = 0.3
    """rho, the penalty on an image's temperature (Qiu et al. 2023)."""
    temperature_learning_rate: Annotated[float, Ge(0), _WITH_OWN_TEMPERATURES] = 0.01
    temperature_momentum: Annotated[float, Interval(gt=0, le=1), _WITH_OWN_TEMPERATURES] = 0.9
    """Weight of the new gradient in the moving average of a temperature's gradients."""
    temperature_min: Annotated[float, Ge(0.013), _WITH_OWN_TEMPERATURES] = 0.05
    temperature_max: Annotated[float, Ge(0.013), _WITH_OWN_TEMPERATURES] = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name != "global_contrastive":
            return
        if self.temperature < 0.013:
            raise out_of_bounds("temperature", self.temperature, "at least 0.013: exp(1 / temperature) is summed in float32")
        if self.temperature_max < self.temperature_min:
            raise out_of_bounds("temperature_max", self.temperature_max, f"temperature_min={self.temperature_min} or more")
        if self.variant == "tf_official" and self.gamma <= 0.5:
            raise UserError(
                f"gamma={self.gamma} diverges with variant=tf_official, which stores the sum of both views' u: "
                "set gamma above 0.5, or variant=paper"
            )


@dataclass(frozen=True)
class OptimizerSettings(Group):
    """The length of training, and the size and direction of its steps."""

    GROUP: ClassVar[str] = "optimizer"
    name: Literal["lars", "momentum", "adamw"] = "lars"
    epochs: Annotated[int, Ge(1)] = 800
    global_batch_size: Annotated[int, Ge(2)] = 512
    """Images per step over all replicas. Each gives two views. At least 2, because negatives are views of other images."""
    ghost_batch_size: Annotated[int, Ge(0)] = 0
    """Images of each view that BN takes its statistics over (Hoffer et al. 2017); 0 for the global batch. Not 1."""
    contrast_batch_size: Annotated[int, Ge(0)] = 0
    """Images that are each other's negatives; 0 for the global batch. Not 1, because negatives are views of other images."""
    base_learning_rate: Annotated[float, Gt(0)] = 0.075
    learning_rate_scaling: Literal["sqrt", "linear"] = "sqrt"
    """Peak learning rate: base * sqrt(B), or base * B / 256."""
    warmup_epochs: Annotated[float, Ge(0)] = 10.0
    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """Momentum of LARS and SGD; beta 1 of AdamW."""
    adam_beta_2: Annotated[float, Interval(ge=0, lt=1), OnlyWith("optimizer", ("adamw",))] = 0.999
    weight_decay: Annotated[float, Ge(0)] = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_epochs > self.epochs:
            raise out_of_bounds("warmup_epochs", self.warmup_epochs, f"between 0 and epochs={self.epochs}")
        for key, size in self._parts.items():
            if size == 1:
                # Two rows, normalised by their own moments, are 1 and -1 whatever they were. One image has no negatives.
                raise out_of_bounds(key, 1, "at least 2, or 0 for the global batch")
        self.check_parts(1)

    @property
    def _parts(self) -> dict[str, int]:
        return {"ghost_batch_size": self.ghost_batch_size, "contrast_batch_size": self.contrast_batch_size}

    def check_parts(self, replicas: int) -> None:
        """Raises UserError if `ghost_batch_size` or `contrast_batch_size` does not divide the batch of one of `replicas`."""
        own = self.global_batch_size // replicas
        for key, size in self._parts.items():
            if size and own % size:
                near = max((one for one in range(2, min(size, own + 1)) if own % one == 0), default=own)
                raise UserError(
                    f"{key}={size} does not divide the {own} images of a replica: take {near}, or 0 for the global batch"
                )


@dataclass(frozen=True)
class RunSettings(Group):
    """The seed, memory, logging and checkpoints of a run."""

    GROUP: ClassVar[str] = "run"
    seed: Annotated[int, Interval(ge=0, lt=2**31)] = 0
    shuffle_window: Annotated[int, Ge(1)] = 2048
    """Records that are shuffled together in memory. Blocks of records are first shuffled over the whole dataset."""
    cache: bool = False
    """Whether the encoded images stay in memory after the first epoch, for datasets that fit."""
    log_every_steps: Annotated[int, Ge(1)] = 100
    checkpoint_every_epochs: Annotated[int, Ge(1)] = 10
    checkpoint_every_minutes: Annotated[float, Gt(0)] = 10.0
    """Longest time between two checkpoints, within an epoch too. Longer if writing them would take over 1% of a run's time."""
    keep_checkpoints: Annotated[int, Ge(1)] = 2
    """Number of newest checkpoints to keep. As many of those written by epochs are kept beside them."""


LINEAR_EVAL = "linear_eval."
"""Prefix of the keys of the linear eval. All keys without a prefix belong to pretraining."""

ProtocolName = Literal["cached", "knn", "online", "official", "finetune-1", "finetune-10", "finetune-100", "global-objective"]
"""Protocols that measure an encoder; docs/evaluation.md describes them."""


@dataclass(frozen=True)
class LinearEvalSettings(Group):
    """The protocols that measure a pretrained encoder."""

    GROUP: ClassVar[str] = "linear_eval"
    PREFIX: ClassVar[str] = LINEAR_EVAL
    protocols: tuple[ProtocolName, ...] = ("cached", "knn", "online")
    """Protocols to run. `cached` always runs: it also scores the untrained control and saves the classifier."""
    batch_size: Annotated[int, Ge(1)] = 256
    """Images per forward pass of a replica. Does not change results."""
    seed: int = 0

    l2_penalties: Annotated[tuple[Annotated[float, Ge(0)], ...], MinLen(1)] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    """Candidates for lambda in mean cross-entropy + lambda/2 |W|^2. The best on held-out training images is used."""
    holdout_fraction: Annotated[float, Interval(gt=0, lt=1)] = 0.1
    """Fraction of the `choice_images`, by image ID, that score the candidates for lambda. The final fit uses all images."""
    choice_images: Annotated[int, Ge(2)] = 100_000
    """Number of training images to choose lambda with, at most. From a larger split, this many are drawn by `seed`."""
    control_images: Annotated[int, Ge(0)] = 50_000
    """Number of training images for the untrained control, at most; 0 disables it. From a larger split, drawn by `seed`."""

    knn_k: Annotated[int, Ge(1)] = 200
    """Neighbours that vote, at most the number of training images."""
    knn_temperature: Annotated[float, Gt(0)] = 0.07
    """A neighbour of cosine s has the weight exp(s / temperature)."""

    objective_anchors: Annotated[int, Ge(100)] = 100_000
    """Number of images up to which `global-objective` is exact. From a larger split, this many anchors are drawn by `seed`."""

    official_epochs: Annotated[int, Ge(1)] = 90
    official_batch_size: Annotated[int, Ge(2)] = 4096
    """Images per step of `official`, at most the number of training images."""
    official_base_learning_rate: Annotated[float, Gt(0)] = 0.1
    """Peak learning rate of `official`: this * B / 256. Decays by a cosine to 0 from the first step on."""

    finetune_1_epochs: Annotated[int, Ge(1)] = 60
    finetune_10_epochs: Annotated[int, Ge(1)] = 30
    finetune_100_epochs: Annotated[int, Ge(1)] = 30
    finetune_batch_size: Annotated[int, Ge(2)] = 4096
    """Images per step of fine-tuning, at most the number of labelled images."""
    finetune_base_learning_rate: Annotated[float, Gt(0)] = 0.05
    """Peak learning rate of fine-tuning: this * B / 256. Decays by a cosine to 0 from the first step on."""
    finetune_1_subset: str = ""
    """Path of a file that lists the labelled images of `finetune-1`, one a line. Without it, `seed` chooses them."""
    finetune_10_subset: str = ""
    """Path of a file that lists the labelled images of `finetune-10`, one a line. Without it, `seed` chooses them."""
    train_names: str = ""
    """Path of a file with the name of every training image, one a line. Needed if a subset lists names, not image IDs."""
    files_sha256: str = ""
    """Digest of the content of these three files. sogclr sets it; the evaluation refuses files that changed since."""

    @property
    def files(self) -> dict[str, str]:
        """The paths of the files that the linear eval reads, by key."""
        names = ("finetune_1_subset", "finetune_10_subset", "train_names")
        return {f"{LINEAR_EVAL}{name}": path for name in names if (path := getattr(self, name))}


GROUPS: tuple[type[Group], ...] = (
    DataSettings,
    ViewSettings,
    EncoderSettings,
    LossSettings,
    OptimizerSettings,
    RunSettings,
    LinearEvalSettings,
)


@functools.cache
def settings() -> dict[str, Setting]:
    """Returns every setting, by key."""
    return {one.key: one for group in GROUPS for one in fields_of(group)}
