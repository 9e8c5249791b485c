"""The protocol `global-objective`: the contrastive objective over all pairs of training images, and the norm of its gradient.

It needs the projection head of pretraining. It has no accuracy, and no control: an untrained encoder would cost as much again.
"""

from eval.measure.objective import GROUPS, global_objective
from eval.measure.projections import load_head, projected_views, views_digest
from eval.measure.protocols.protocol import Context, Protocol, Sizes, Values, Work
from trainer.config import Config
from trainer.preemption import PreemptedError
from trainer.shared.errors import UserError
from trainer.shared.progress import of_batches
from trainer.shared.records import Manifest

_COPIES_OF_AN_ANCHOR = 18
"""Peak memory of an anchor beside its projections, in multiples of their size. Measured: see docs/evaluation.md."""


def values(context: Context) -> Values:
    count, temperature = context.train.count, context.config.loss.temperature
    with context.strategy.scope():
        head = load_head(context.config, context.checkpoint)
    projections = projected_views(
        context.encoder,
        head,
        context.config,
        context.data_dir,
        context.manifest,
        context.features_dir,
        shared=context.shares_features,
        strategy=context.strategy,
        on_progress=of_batches(context.on_progress, "projections of two views", count),
        should_stop=context.should_stop,
    )

    def on_progress(done: float) -> None:
        context.on_progress("global objective, images", round(done * count), count)
        if context.should_stop():
            raise PreemptedError(
                "stopped in the global objective, kept the projections: start the same command again to continue"
            )

    context.on_progress("global objective, first block")
    found = global_objective(
        projections,
        temperature,
        anchors=context.settings.objective_anchors,
        seed=context.settings.seed,
        strategy=context.strategy,
        on_progress=on_progress,
    )
    return Values(
        {
            "global_objective": found.value,
            "global_objective_standard_error": found.standard_error,
            "global_objective_alignment": found.alignment,
            "global_objective_contrast": found.contrast,
            "global_objective_gradient_norm": found.gradient_norm,
            "global_objective_gradient_norm_standard_error": found.gradient_norm_standard_error,
        },
        {"temperature": temperature, "images": found.images, "views": views_digest(context.config)},
        {"anchors": found.anchors},
    )


def work(config: Config, sizes: Sizes) -> Work:
    anchors, dim = min(sizes.train, config.linear_eval.objective_anchors), config.encoder.projection_dim
    known = anchors if anchors == sizes.train else anchors / GROUPS
    of_views = 2 * 4.0 * dim
    return Work(
        forward=2 * sizes.train,
        # Two views by two views; cosines and a weighted sum; a multiplication and an addition.
        flops=16.0 * anchors * (sizes.train + known) * dim,
        memory_bytes=of_views * (sizes.train + _COPIES_OF_AN_ANCHOR * anchors),
        disk_bytes=of_views * sizes.train,
    )


def check(config: Config, manifest: Manifest, replicas: int) -> None:
    if manifest.splits["train"].records < 2:
        raise UserError("protocol global-objective needs two training images or more: an image's negatives are other images")


PROTOCOLS = (
    Protocol(
        "global-objective",
        "contrastive objective over all pairs of training images, two views each, and the norm of its gradient; lower is better",
        work,
        values,
        check,
        needs="projection",
    ),
)
