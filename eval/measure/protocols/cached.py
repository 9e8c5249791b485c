"""The protocol `cached`: a linear classifier, fitted to its optimum on features that are computed once.

Its only hyperparameter, the penalty, is chosen on held-out training images.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from eval.measure.features import StoredFeatures
from eval.measure.logistic import LinearClassifier, accuracies, fit, fit_path
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
    smaller ones in turn, to all images that are not held out, as long as the accuracy improves. Calls `stop()` after each pass
    over the features; an exception from it ends the fit.
    """
    penalties = sorted(settings.l2_penalties, reverse=True)
    chosen_with = min(train.count, settings.choice_images)
    progress = _Progress(on_progress, stop)
    with train.on_this_machine() as features:
        best = None
        if len(penalties) > 1:
            ids = np.sort(features.ids_and_labels()[0])
            drawn = ids[drawn_order(len(ids), settings.seed)]
            held_out = max(1, round(chosen_with * settings.holdout_fraction))
            out, kept, rest = (_mask(of, int(ids.max()) + 1) for of in np.split(drawn, [held_out, chosen_with]))
            how: dict[str, Any] = {"tolerance": _TOLERANCE_OF_CHOICE, "strategy": strategy}
            how["on_evaluation"] = progress.of_path("choice of the penalty, passes", len(penalties))
            candidates = list(fit_path(features.examples(kept), num_classes, penalties, **how))
            best = candidates[int(np.argmax(accuracies(candidates, features.examples(out))))]
            if rest.any():
                smaller = [one for one in penalties if one <= best.l2_penalty]
                how["on_evaluation"] = progress.of_path("choice of the penalty on all images, passes", _TRIED_ON_ALL)
                most = -1.0
                for candidate in fit_path(features.examples(kept | rest), num_classes, smaller, best, **how):
                    (now,) = accuracies([candidate], features.examples(out))
                    if now <= most:
                        break
                    best, most = candidate, now
        return fit(
            features.examples(),
            num_classes,
            penalties[0] if best is None else best.l2_penalty,
            best,
            tolerance=TOLERANCE,
            strategy=strategy,
            on_evaluation=progress.of_path("fit, passes", 1),
        )


def work_of_fits(settings: LinearEvalSettings, images: int) -> float:
    """Returns the expected number of examples that all fits read, over all evaluations of the objective."""
    penalties, chosen_with = len(settings.l2_penalties), min(images, settings.choice_images)
    passes = float(images)
    if penalties > 1:
        passes += penalties * chosen_with + (_TRIED_ON_ALL * images if chosen_with < images else 0)
    return EVALUATIONS * passes


@dataclass(frozen=True)
class _Progress:
    """Counts evaluations of the objective: each is a pass over the examples."""

    on_progress: OnProgress
    stop: Callable[[], None]

    def of_path(self, phase: str, penalties: int) -> Callable[[float, int, float], None]:
        """Returns the `on_evaluation` callback of a path of `penalties` penalties, which is a phase of its own.

        How many evaluations a fit takes is known when it ends, so a penalty counts as `EVALUATIONS` once the next one begins.
        """
        begun: dict[float, int] = {}
        self.on_progress(phase, 0, penalties * EVALUATIONS)

        def on_evaluation(penalty: float, number: int, loss: float) -> None:
            begun.setdefault(penalty, len(begun) * EVALUATIONS)
            done = begun[penalty] + min(number, EVALUATIONS - 1)
            self.on_progress(phase, done, max(penalties, len(begun)) * EVALUATIONS, f"penalty {penalty:g}, loss {loss:.4f}")
            self.stop()

        return on_evaluation


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
