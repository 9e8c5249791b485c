"""The protocol `cached`: a linear classifier, fitted to its optimum on features that are computed once.

Its only hyperparameter, the penalty, is chosen on held-out training images.
"""

from collections.abc import Callable
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

    def path(name: str, examples: Examples, tolerance: float) -> _Path:
        return _Path(name, examples, tolerance, strategy or tf.distribute.get_strategy(), on_progress, stop)

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
            followed = path("choice of the penalty", examples, _TOLERANCE_OF_CHOICE)
            candidates = list(fit_path(examples, num_classes, penalties, **followed.how()))
            best = candidates[int(np.argmax(accuracies(candidates, judges)))]
            if rest.any():
                smaller = [one for one in penalties if one <= best.l2_penalty]
                examples = features.examples(kept | rest)
                followed = path("choice of the penalty with all images", examples, _TOLERANCE_OF_CHOICE)
                most = -1.0
                for candidate in fit_path(examples, num_classes, smaller, best, **followed.how()):
                    (now,) = accuracies([candidate], judges)
                    if now <= most:
                        break
                    best, most = candidate, now
        examples = features.examples()
        penalty = penalties[0] if best is None else best.l2_penalty
        followed = path("fit", examples, TOLERANCE)
        return fit(examples, num_classes, penalty, best, **followed.how())


def work_of_fits(settings: LinearEvalSettings, images: int) -> float:
    """Returns the expected number of examples that all fits read, over all evaluations of the objective."""
    penalties, chosen_with = len(settings.l2_penalties), min(images, settings.choice_images)
    passes = float(images)
    if penalties > 1:
        passes += penalties * chosen_with + (_TRIED_ON_ALL * images if chosen_with < images else 0)
    return EVALUATIONS * passes


class _Path:
    """Reports a path of fits: the examples that it reads before its searches, in a phase, then the passes of its searches.

    How many passes a search takes is known when it ends, so nothing says what is left of it. The text says how far the largest
    component of the gradient is from the value at which the search ends.
    """

    def __init__(
        self,
        name: str,
        examples: Examples,
        tolerance: float,
        strategy: tf.distribute.Strategy,
        on_progress: OnProgress,
        stop: Callable[[], None],
    ) -> None:
        self._name, self._count, self._tolerance = name, examples.count, tolerance
        self._strategy, self._on_progress, self._stop = strategy, on_progress, stop
        self._read, self._to_read = 0, examples.count * passes_before(examples, strategy.num_replicas_in_sync)
        self._passes = self._of_pass = 0
        """Finished passes, and examples read in the pass after them."""
        self._reached = ""
        self._on_read(0)

    def how(self) -> dict[str, Any]:
        """Returns the keyword arguments of `fit_path`."""
        calls = {"on_read": self._on_read, "on_rows": self._on_rows, "on_evaluation": self._on_evaluation}
        return {"tolerance": self._tolerance, "strategy": self._strategy, **calls}

    def _on_read(self, rows: int) -> None:
        self._read += rows
        self._on_progress(f"features for the {self._name}, images", self._read, self._to_read)
        self._stop()

    def _on_rows(self, rows: int) -> None:
        self._of_pass += rows
        pass_now = f"pass {self._passes + 1}, {self._of_pass:,} of {self._count:,} images"
        self._on_progress(self._name, 0, 0, pass_now + self._reached)
        self._stop()

    def _on_evaluation(self, penalty: float, loss: float, gradient: float) -> None:
        self._passes += 1
        self._of_pass = 0
        self._reached = f", penalty {penalty:g}, loss {loss:.4f}, gradient {gradient:.1e} (ends at {self._tolerance:.0e})"


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
