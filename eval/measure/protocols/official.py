"""The protocol `official`, as in the papers: a linear classifier, trained by momentum SGD on augmented images, frozen encoder."""

from dataclasses import asdict

from eval.measure.protocols.protocol import Context, Protocol, Scores, Sizes, Work
from eval.measure.supervised import Recipe, train_classifier, weights_of
from trainer.config import Config
from trainer.distribution import check_divides
from trainer.shared.progress import of_batches
from trainer.shared.records import Manifest


def scores(context: Context) -> Scores:
    recipe = _recipe(context.config, context.sizes.train)
    visits = recipe.image_visits
    classifier = train_classifier(
        context.encoder,
        context.config,
        context.data_dir,
        context.manifest,
        recipe,
        folder=f"{context.work_dir}/official",
        strategy=context.strategy,
        on_progress=of_batches(context.on_progress, "official", visits),
        should_stop=context.should_stop,
    )
    used = {name: value for name, value in asdict(recipe).items() if name != "frozen"}
    return Scores(classifier(context.validation.values).numpy(), used, weights_of(classifier))


def work(config: Config, sizes: Sizes) -> Work:
    return Work(forward=_recipe(config, sizes.train).image_visits)


def check(config: Config, manifest: Manifest, replicas: int) -> None:
    recipe = _recipe(config, manifest.splits["train"].records)
    check_divides(recipe.batch_size, replicas, "linear_eval.official_batch_size")


def _recipe(config: Config, images: int) -> Recipe:
    settings = config.linear_eval
    return Recipe(
        num_images=images,
        epochs=settings.official_epochs,
        # A batch with more images than the dataset would contain some of them twice.
        batch_size=min(settings.official_batch_size, images),
        base_learning_rate=settings.official_base_learning_rate,
        seed=settings.seed,
        frozen=True,
    )


PROTOCOLS = (
    Protocol(
        "official",
        "protocol of the papers: linear classifier by momentum SGD on augmented images, frozen encoder",
        work,
        scores,
        check,
        uses_features_of=("validation",),
    ),
)
