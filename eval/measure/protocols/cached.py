"""The protocol `cached`: a linear classifier, fitted to its optimum on features that are computed once.

Its only hyperparameter, the penalty, is chosen on held-out training images.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import tensorflow as tf

from eval.measure.features import Examples, StoredFeatures
from eval.measure.logistic import LinearClassifier, accuracies, fit, fit_path, passes_before
from eval.measure.protocols.protocol import Context, Protocol, Scores, Sizes, Work
from trainer.config import Config
from trainer.preemption import PreemptedError
from trainer.settings import LinearEvalSettings
from trainer.shared.progress import OnProgress, silent

EVALUATIONS = 12
"""Expected evaluations of the objective for one penalty. docs/evaluation.md lists measurements."""
_TRIED_ON_ALL = 2
"""Expected number of penalties to fit to all images of a large set, before the best is known."""
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
    return Work(flops=4.0 * work_of_fits(config.linear_eval, sizes.train) * sizes.features * sizes.classes)


CACHED = Protocol(
    "cached",
    "exact logistic regression on stored features, its penalty chosen on held-out training images",
    work,
    scores,
    uses_features_of=("train", "validation"),
)
PROTOCOLS = (CACHED,)


def fit_with_choice(
    train: StoredFeatures,
    num_classes: int,
    settings: LinearEvalSettings,
    *,
    strategy: tf.distribute.Strategy | None = None,
    on_progress: OnProgress = silent,
    stop: Callable[[], None] = lambda: None,
) -> LinearClassifier:
    """Returns the classifier fitted to all of `train`, with the penalty that is best on held-out images.

    Draws `settings.choice_images` training images by the seed, holds a fraction of them out, and fits every candidate penalty to
    the rest. If these are not all of `train`, the best candidate may be too large for all of it. Then fits this penalty, and
    smaller ones in turn, to all images that are not held out, as long as the accuracy improves. Calls `stop()` several times in a
    pass over many features; an exception from it ends the fit.
    """
    penalties = sorted(settings.l2_penalties, reverse=True)
    chosen_with = min(train.count, settings.choice_images)

    def path(name: str, examples: Examples, penalties: int, tolerance: float) -> _Path:
        return _Path(name, examples, penalties, tolerance, strategy or tf.distribute.get_strategy(), on_progress, stop)

    with train.on_this_machine() as features:
        best = None
        if len(penalties) > 1:
            ids = np.sort(features.ids_and_labels()[0])
            drawn = ids[drawn_order(len(ids), settings.seed)]
            held_out = max(1, round(chosen_with * settings.holdout_fraction))
            out, kept, rest = (_mask(of, int(ids.max()) + 1) for of in np.split(drawn, [held_out, chosen_with]))
            on_progress("reading held-out features")
            judges = features.examples(out).in_memory()
            examples = features.examples(kept)
            followed = path("choice of the penalty", examples, len(penalties), _TOLERANCE_OF_CHOICE)
            candidates = list(fit_path(examples, num_classes, penalties, **followed.how()))
            followed.end()
            best = candidates[int(np.argmax(accuracies(candidates, judges)))]
            if rest.any():
                smaller = [one for one in penalties if one <= best.l2_penalty]
                examples = features.examples(kept | rest)
                expected = min(_TRIED_ON_ALL, len(smaller))
                followed = path("choice of the penalty with all images", examples, expected, _TOLERANCE_OF_CHOICE)
                most = -1.0
                for candidate in fit_path(examples, num_classes, smaller, best, **followed.how()):
                    (now,) = accuracies([candidate], judges)
                    if now <= most:
                        break
                    best, most = candidate, now
                followed.end()
        examples = features.examples()
        penalty = penalties[0] if best is None else best.l2_penalty
        followed = path("fit", examples, 1, TOLERANCE)
        classifier = fit(examples, num_classes, penalty, best, **followed.how())
        followed.end()
        return classifier


def work_of_fits(settings: LinearEvalSettings, images: int) -> float:
    """Returns the expected number of examples that all fits read, over all evaluations of the objective."""
    penalties, chosen_with = len(settings.l2_penalties), min(images, settings.choice_images)
    passes = float(images)
    if penalties > 1:
        passes += penalties * chosen_with + (_TRIED_ON_ALL * images if chosen_with < images else 0)
    return EVALUATIONS * passes


class _Path:
    """Counts the examples that a path of fits reads, in a phase before its searches and in one of them."""

    def __init__(
        self,
        name: str,
        examples: Examples,
        penalties: int,
        tolerance: float,
        strategy: tf.distribute.Strategy,
        on_progress: OnProgress,
        stop: Callable[[], None],
    ) -> None:
        self._name, self._count, self._penalties, self._tolerance = name, examples.count, penalties, tolerance
        self._strategy, self._on_progress, self._stop = strategy, on_progress, stop
        self._read, self._to_read = 0, examples.count * passes_before(examples, strategy.num_replicas_in_sync)
        self._done = self._since = 0
        """Examples read in searches, and since the last evaluation of the objective."""
        self._gradients: dict[float, list[float]] = {}
        """Penalty -> largest component of the gradient at each evaluation."""
        self._text = ""
        self._on_read(0)

    def how(self) -> dict[str, Any]:
        """Returns the keyword arguments of `fit_path`."""
        calls = {"on_read": self._on_read, "on_rows": self._on_rows, "on_evaluation": self._on_evaluation}
        return {"tolerance": self._tolerance, "strategy": self._strategy, **calls}

    def end(self) -> None:
        self._on_progress(f"{self._name}, images", self._done, self._done, self._text)

    def _on_read(self, rows: int) -> None:
        self._read += rows
        self._on_progress(f"features for the {self._name}, images", self._read, self._to_read)
        if self._read == self._to_read:
            self._report()
        self._stop()

    def _on_rows(self, rows: int) -> None:
        self._done += rows
        self._since += rows
        self._report()
        self._stop()

    def _on_evaluation(self, penalty: float, loss: float, gradient: float) -> None:
        self._gradients.setdefault(penalty, []).append(gradient)
        self._since = 0
        self._text = f"penalty {penalty:g}, loss {loss:.4f}"

    def _report(self) -> None:
        *ended, now = self._gradients.values() or [[]]
        each = (EVALUATIONS + sum(map(len, ended))) / (1 + len(ended))
        evaluations = evaluations_left(now, self._tolerance) + each * max(0, self._penalties - len(ended) - 1)
        left = max(1, round(evaluations * self._count) - self._since)
        self._on_progress(f"{self._name}, images", self._done, self._done + left, self._text)


def evaluations_left(gradients: Sequence[float], tolerance: float) -> float:
    """Returns how many evaluations a search still takes, reckoned from the largest component of the gradient at each so far.

    The logarithm of the gradient falls about evenly, though not at every evaluation. So its level now is the mean of the lower
    half of the last six, and the search counts as if three evaluations had fallen at the expected rate.
    """
    if not gradients:
        return EVALUATIONS
    logs, end = np.log(np.maximum(gradients, 1e-30)), np.log(tolerance)
    if logs[-1] <= end:
        return 0.0
    last = np.sort(logs[-6:])
    top, now = max(logs), last[: (len(last) + 1) // 2].mean()
    rate = (top - now + 3 * (top - end) / EVALUATIONS) / (len(logs) + 3)
    return float(max(1.0, (now - end) / rate))


def _stopper(context: Context) -> Callable[[], None]:
    def stop() -> None:
        if context.should_stop():
            raise PreemptedError("stopped in a fit, kept the features: start the same command again to continue")

    return stop


def drawn_order(count: int, seed: int) -> np.ndarray:
    """Returns a random permutation of 0..count-1, determined by `seed`."""
    return np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(count)


def _mask(ids: np.ndarray, count: int) -> np.ndarray:
    wanted = np.zeros(count, bool)
    wanted[ids] = True
    return wanted
