"""The protocols `finetune-1`, `finetune-10`, `finetune-100`: train all weights with the labels of 1, 10 or 100% of the images."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from eval.measure.features import extract, load_encoder
from eval.measure.protocols.protocol import Context, Protocol, Scores, Sizes, Work
from eval.measure.subsets import balanced_counts, balanced_subset, read_subset
from eval.measure.supervised import Recipe, train_classifier, weights_of
from trainer.config import Config
from trainer.distribution import check_divides
from trainer.settings import LinearEvalSettings
from trainer.shared.progress import of_batches
from trainer.shared.records import Manifest


@dataclass(frozen=True)
class _Part:
    """The part of the training images whose labels are used."""

    name: str
    fraction: float
    epochs: Callable[[LinearEvalSettings], int]
    listed: Callable[[LinearEvalSettings], str] = lambda settings: ""
    """Path of a file that lists the images. If empty, they are drawn by the seed."""


_PARTS = (
    _Part("finetune-1", 0.01, lambda one: one.finetune_1_epochs, lambda one: one.finetune_1_subset),
    _Part("finetune-10", 0.1, lambda one: one.finetune_10_epochs, lambda one: one.finetune_10_subset),
    _Part("finetune-100", 1.0, lambda one: one.finetune_100_epochs),
)


def _scores(part: _Part, context: Context) -> Scores:
    image_ids = _image_ids(part, context)
    recipe = _recipe(part, context.config, context.sizes.train if image_ids is None else len(image_ids))
    visits = recipe.image_visits
    with context.strategy.scope():
        encoder = load_encoder(context.config, context.checkpoint)
    folder = f"{context.work_dir}/{part.name}"
    classifier = train_classifier(
        encoder,
        context.config,
        context.data_dir,
        context.manifest,
        recipe,
        image_ids,
        folder,
        strategy=context.strategy,
        on_progress=of_batches(context.on_progress, part.name, visits),
        on_search=lambda done: context.on_progress(f"finding the images of {part.name}, records", done, context.sizes.train),
        should_stop=context.should_stop,
    )
    count = len(context.validation.labels)
    features = extract(
        encoder,
        context.config,
        context.data_dir,
        context.manifest,
        "validation",
        folder,
        strategy=context.strategy,
        on_progress=of_batches(context.on_progress, f"features of {part.name}", count),
        should_stop=context.should_stop,
    )
    used = {name: value for name, value in asdict(recipe).items() if name != "frozen"}
    return Scores(classifier(features.whole().values).numpy(), used, weights_of(classifier))


def _work(part: _Part, config: Config, sizes: Sizes) -> Work:
    images = sizes.train if part.fraction == 1 else max(sizes.classes, round(part.fraction * sizes.train))
    return Work(forward=sizes.validation, trained=_recipe(part, config, images).image_visits)


def _check(part: _Part, config: Config, manifest: Manifest, replicas: int) -> None:
    settings, train = config.linear_eval, manifest.splits["train"]
    if file := part.listed(settings):
        images = len(read_subset(file, manifest, settings.train_names))
    else:
        images = int(balanced_counts(train.records_per_class, part.fraction).sum()) if part.fraction < 1 else train.records
    check_divides(_recipe(part, config, images).batch_size, replicas, "linear_eval.finetune_batch_size")


def _image_ids(part: _Part, context: Context) -> np.ndarray | None:
    """Returns the IDs of the images whose labels are used, or None for all."""
    if file := part.listed(context.settings):
        return read_subset(file, context.manifest, context.settings.train_names)
    if part.fraction == 1:
        return None
    return balanced_subset(context.train.labels_by_id(), part.fraction, context.settings.seed)


def _recipe(part: _Part, config: Config, images: int) -> Recipe:
    settings = config.linear_eval
    return Recipe(
        num_images=images,
        epochs=part.epochs(settings),
        # A batch with more images than the dataset would contain some of them twice.
        batch_size=min(settings.finetune_batch_size, images),
        base_learning_rate=settings.finetune_base_learning_rate,
        seed=settings.seed,
        frozen=False,
    )


def _protocol(part: _Part) -> Protocol:
    return Protocol(
        part.name,
        f"all weights trained on {'all labels' if part.fraction == 1 else f'{part.fraction:.0%} of the labels'}",
        lambda config, sizes: _work(part, config, sizes),
        lambda context: _scores(part, context),
        lambda config, manifest, replicas: _check(part, config, manifest, replicas),
    )


PROTOCOLS = tuple(_protocol(part) for part in _PARTS)
