"""The protocol `cached`: a linear classifier fitted to its optimum, on features that are computed once.

Its one free number, the penalty, is chosen on held-out training images.
"""

from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import tensorflow as tf

from eval.features import StoredFeatures
from eval.logistic import LinearClassifier, accuracies, fit
from eval.protocols.protocol import Context, Protocol, Scores, Sizes, Work
from trainer.config import Config, LinearEval
from trainer.preemption import PreemptedError

EVALUATIONS = 40
"""Of the objective in one fit, as planned for."""
TOLERANCE, _TOLERANCE_OF_CHOICE = 5e-4, 2e-3


def scores(context: Context) -> Scores:
    classifier = fit_with_choice(
        context.train,
        context.manifest.num_classes,
        context.settings,
        on_progress=context.on_progress,
        stop=_stopper(context),
        strategy=context.strategy,
    )
    used = {"l2_penalty": classifier.l2_penalty, "images": context.train.count}
    if len(context.settings.l2_penalties) > 1:
        used["penalty_chosen_with"] = min(context.train.count, context.settings.choice_images)
    return Scores(classifier.logits(context.validation.values), used, asdict(classifier))


def work(config: Config, sizes: Sizes) -> Work:
    images = sizes.train * EVALUATIONS
    if (candidates := len(config.linear_eval.l2_penalties)) > 1:
        images += min(sizes.train, config.linear_eval.choice_images) * candidates * EVALUATIONS
    return Work(flops=4.0 * images * sizes.features * sizes.classes)


CACHED = Protocol(
    "cached",
    "exact logistic regression on stored features, its penalty chosen on held-out training images",
    work,
    scores,
    stands_on=("train", "validation"),
)


def fit_with_choice(
    train: StoredFeatures,
    num_classes: int,
    settings: LinearEval,
    *,
    strategy: tf.distribute.Strategy | None = None,
    on_progress: Callable[[float, str], None] = lambda done, text: None,
    stop: Callable[[], None] = lambda: None,
) -> LinearClassifier:
    """Returns the classifier fitted on all of `train`, with the penalty that is best on held-out images.

    The candidates are fitted to `settings.choice_images` of the training images, drawn by the seed, less the part that is held
    out of them. Calls `stop()` after each pass over the features; what it raises ends the fit.
    """
    penalties = sorted(settings.l2_penalties, reverse=True)
    chosen_with = min(train.count, settings.choice_images) if len(penalties) > 1 else 0
    planned = EVALUATIONS * (train.count + len(penalties) * chosen_with)
    progress = _Progress(planned, on_progress, stop)
    with train.on_this_machine() as features:
        best = None
        if len(penalties) > 1:
            ids, _ = features.ids_and_labels()
            drawn = np.sort(ids)[drawn_order(len(ids), settings.seed)][:chosen_with]
            held_out = max(1, round(chosen_with * settings.holdout_fraction))
            out, kept = (_mask(part, int(ids.max()) + 1) for part in (drawn[:held_out], drawn[held_out:]))
            candidates = fit(
                features.examples(kept),
                num_classes,
                penalties,
                tolerance=_TOLERANCE_OF_CHOICE,
                strategy=strategy,
                on_evaluation=progress.of_fit("choice of the penalty", chosen_with, penalties),
            )
            best = candidates[int(np.argmax(accuracies(candidates, features.examples(out))))]
            penalties = [best.l2_penalty]
        return fit(
            features.examples(),
            num_classes,
            penalties,
            best,
            tolerance=TOLERANCE,
            strategy=strategy,
            on_evaluation=progress.of_fit("fit", train.count, penalties),
        )[0]


class _Progress:
    """Turns evaluations of the objective into the part of a protocol's work that is done."""

    def __init__(self, planned: float, on_progress: Callable[[float, str], None], stop: Callable[[], None]) -> None:
        self._planned, self._on_progress, self._stop = planned, on_progress, stop
        self._begun = 0.0

    def of_fit(self, what: str, images: int, penalties: list[float]) -> Callable[[float, int, float], None]:
        """Returns what `fit` calls for one path of penalties on so many images."""
        begun = self._begun
        self._begun += images * len(penalties) * EVALUATIONS

        def on_evaluation(penalty: float, number: int, loss: float) -> None:
            done = begun + images * (penalties.index(penalty) * EVALUATIONS + min(number, EVALUATIONS))
            self._on_progress(done / self._planned, f"{what}: penalty {penalty:g}, pass {number}, loss {loss:.4f}")
            self._stop()

        return on_evaluation


def _stopper(context: Context) -> Callable[[], None]:
    def stop() -> None:
        if context.should_stop():
            raise PreemptedError("stopped in a fit, kept the features: start the same command again to go on")

    return stop


def drawn_order(count: int, seed: int) -> np.ndarray:
    """Returns 0..count-1 in an order drawn by `seed`."""
    return np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(count)


def _mask(ids: np.ndarray, count: int) -> np.ndarray:
    wanted = np.zeros(count, bool)
    wanted[ids] = True
    return wanted
