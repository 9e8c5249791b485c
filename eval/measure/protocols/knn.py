"""The protocol `knn`: the nearest training images vote for the class of an image. Nothing is fitted."""

from typing import Any

import numpy as np

from eval.measure.features import StoredFeatures
from eval.measure.neighbours import nearest_neighbours
from eval.measure.protocols.protocol import Context, Protocol, Scores, Sizes, Work
from trainer.config import Config
from trainer.preemption import PreemptedError


def scores(context: Context) -> Scores:
    k, temperature = min(context.settings.knn_k, context.train.count), context.settings.knn_temperature

    def on_progress(done: float) -> None:
        context.on_progress("nearest neighbours, images", round(done * context.train.count), context.train.count)
        if context.should_stop():
            raise PreemptedError("stopped in the neighbour search, kept the features: start the same command again to continue")

    context.on_progress("nearest neighbours, first block")
    votes = knn_scores(
        context.train,
        context.validation.values,
        context.manifest.num_classes,
        k,
        temperature,
        strategy=context.strategy,
        on_progress=on_progress,
    )
    return Scores(votes, {"k": k, "temperature": temperature})


def knn_scores(
    train: StoredFeatures, queries: np.ndarray, num_classes: int, k: int, temperature: float, **how: Any
) -> np.ndarray:
    """Returns the votes of the `k` nearest training images for each class, [m, C] float32, for `queries`, [m, F] float32.

    The weight of a neighbour of cosine s is exp(s / temperature) (Wu et al. 2018, section 3.4), here divided by the nearest
    neighbour's. `how` holds keyword arguments of `nearest_neighbours`.
    """
    similarities, image_ids = nearest_neighbours(train, queries, k, **how)
    weights = np.exp((similarities - similarities[:, :1]) / np.float32(temperature))
    scores = np.zeros((len(queries), num_classes), np.float32)
    np.add.at(scores, (np.arange(len(queries))[:, None], train.labels_by_id()[image_ids]), weights)
    return scores


def work(config: Config, sizes: Sizes) -> Work:
    return Work(flops=2.0 * sizes.train * sizes.validation * sizes.features)


PROTOCOLS = (
    Protocol(
        "knn",
        "nearest neighbours by cosine, weighted; nothing is trained",
        work,
        scores,
        uses_features_of=("train", "validation"),
    ),
)
