"""The evaluation at ImageNet's size, on made-up features: memory, seconds a pass, disk; and the fit beside scikit-learn's.

    python tests/benchmarks/evaluation_scale.py scale --work DIR [--images N ...] [--passes P] [--part Q]
    python tests/benchmarks/evaluation_scale.py beside [--images N] [--features F] [--classes C ...]

`scale` makes features of N training images and 50,000 validation images (F = 2,048, C = 1,000) on disk, where they are not
there yet, and runs on them what an evaluation does after its forward passes: `cached` with the choice of its penalty, k-NN, and
of the report the neighbours and the map. Each is a process of its own, whose peak memory is the system's account of it. With
--passes a fit ends after so many evaluations of its objective, with --part k-NN after that part of the training images; the
whole is reckoned from those.

`beside` fits both classifiers to the same examples, ours to its tolerance and scikit-learn's lbfgs to its own. It prints
seconds, objective and top-1 on as many others, and how many times as fast ours comes to the objective that scikit-learn ends
with.

Features are those of a mixture: a centre for each class in 64 dimensions, noise that decays from one dimension to the next, ReLU.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np

VALIDATION = 50_000
_ROWS = 1 << 14


def mixture(images: int, features: int, classes: int, seed: int, noise: float = 1.0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (features [n, F] float32, labels [n] int64) of `images` in all; `seed` draws the images, not the mixture."""
    fixed, own = np.random.default_rng(0), np.random.default_rng(seed)
    centres = 0.6 * fixed.normal(0, 1, (classes, 64)).astype(np.float32)
    spread = fixed.normal(0, 1, (64, features)).astype(np.float32) / 8
    scale = (noise * (1 + np.arange(features)) ** -0.3).astype(np.float32)
    for start in range(0, images, _ROWS):
        count = min(_ROWS, images - start)
        labels = own.integers(0, classes, count)
        seen = centres[labels] + own.normal(0, 1, (count, 64)).astype(np.float32)
        values = seen @ spread + scale * own.normal(0, 1, (count, features)).astype(np.float32)
        yield np.maximum(values, 0), labels


def make(folder: Path, images: int, features: int, classes: int, seed: int) -> None:
    """Writes features as `eval.features` does, unless they are there."""
    from eval.measure import features as storing
    from eval.measure import parts

    if (folder / storing.INDEX).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows, order = [], np.random.default_rng(seed + 100).permutation(images)
    for number, (values, labels) in enumerate(mixture(images, features, classes, seed)):
        ids = order[sum(rows) : sum(rows) + len(labels)]
        parts.write(parts.path_of(str(folder), number), ids, labels, values, "")
        rows.append(len(labels))
    (folder / storing.INDEX).write_text(json.dumps({"digest": "", "dimensions": features, "rows": rows}))


class EnoughError(Exception):
    """As many passes as were asked for."""


def cached(train: Any, validation: Any, classes: int, passes: int, part: float) -> dict[str, Any]:
    """Runs the choice of the penalty and the fit, each of them for `passes` evaluations if that is not 0."""
    from eval.measure import logistic
    from eval.measure.protocols import cached as protocol
    from trainer.settings import LinearEvalSettings

    times: dict[str, list[float]] = {}
    path = logistic.fit_path

    def timed(examples: Any, num_classes: int, penalties: Any, start: Any = None, **how: Any) -> Iterator[Any]:
        name = {train.count: "fit", 90_000: "choice"}.get(examples.count, "choice_on_all")
        own, begun, said = times.setdefault(name, []), time.perf_counter(), how.pop("on_evaluation")

        def on_evaluation(penalty: float, loss: float, gradient: float) -> None:
            own.append(time.perf_counter() - begun)
            said(penalty, loss, gradient)
            if passes and len(own) == passes:
                raise EnoughError

        found = []
        try:
            for classifier in path(examples, num_classes, penalties, start, on_evaluation=on_evaluation, **how):
                found.append(classifier)
                yield classifier
        except EnoughError:
            # What is left of a path is as its last.
            one, zero = np.ones(train.dim, np.float32), np.zeros((train.dim, num_classes), np.float32)
            last = found[-1] if found else logistic.LinearClassifier(0 * one, one, zero, zero[0], 0.0)
            for penalty in list(penalties)[len(found) :]:
                yield replace(last, l2_penalty=penalty)

    protocol.fit_path = timed
    protocol.fit = lambda examples, num_classes, penalty, start, **how: next(
        timed(examples, num_classes, [penalty], start, **how)
    )
    classifier = protocol.fit_with_choice(train, classes, LinearEvalSettings())
    logits = classifier.logits(validation.whole().values)
    correct = logistic.top_k_accuracy(logits, validation.labels_by_id(), 1)
    return {
        "top_1": round(correct, 4),
        "l2_penalty": classifier.l2_penalty,
        **{
            f"{name}_{key}": value
            for name, own in times.items()
            for key, value in {
                "evaluations": len(own),
                "seconds_before_first": round(own[0], 1),
                "seconds_an_evaluation": round((own[-1] - own[0]) / max(1, len(own) - 1), 2),
                "seconds": round(own[-1], 1),
            }.items()
        },
    }


def knn(train: Any, validation: Any, classes: int, passes: int, part: float) -> dict[str, Any]:
    from eval.measure.protocols.knn import knn_scores

    begun, done = time.perf_counter(), [0.0]

    def on_progress(now: float) -> None:
        done[0] = now
        if now >= part and now < 1:
            raise EnoughError

    try:
        scores = knn_scores(train, validation.whole().values, classes, 200, 0.07, on_progress=on_progress)
        top_1 = {"top_1": round(float(np.mean(scores.argmax(1) == validation.labels_by_id())), 4)}
    except EnoughError:
        top_1 = {}
    seconds = time.perf_counter() - begun
    return {**top_1, "part": round(done[0], 3), "seconds": round(seconds, 1), "seconds_whole": round(seconds / done[0], 1)}


def report(train: Any, validation: Any, classes: int, passes: int, part: float) -> dict[str, Any]:
    """The neighbours of eight images and the map of 2,000."""
    from eval.measure.neighbours import nearest_neighbours
    from eval.show.samples import spread

    whole = validation.whole()
    begun = time.perf_counter()
    nearest_neighbours(train, whole.values[:8], 7)
    between = time.perf_counter()
    spread(whole.values[:2000])
    return {"neighbours_seconds": round(between - begun, 1), "map_seconds": round(time.perf_counter() - between, 1)}


PARTS = {"cached": cached, "knn": knn, "report": report}


def scale(work: Path, images: int, features: int, classes: int, passes: int, part: float) -> None:
    for split, count, seed in (("train", images, 1), ("validation", VALIDATION, 2)):
        make(work / f"{split}-{count}-{features}", count, features, classes, seed)
    disk = sum(path.stat().st_size for path in (work / f"train-{images}-{features}").iterdir())
    for name in PARTS:
        command = [sys.executable, __file__, "one", name, "--work", str(work), "--images", str(images)]
        command += ["--features", str(features), "--classes", str(classes), "--passes", str(passes), "--part", str(part)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        print(json.dumps({"images": images, "disk_gb": round(disk / 1e9, 2), "what": name, **json.loads(done)}), flush=True)


def one(name: str, work: Path, images: int, features: int, classes: int, passes: int, part: float) -> None:
    from eval.measure.features import read_features

    train, validation = (read_features(str(work / f"{of}-{features}")) for of in (f"train-{images}", f"validation-{VALIDATION}"))
    found = PARTS[name](train, validation, classes, passes, part)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak_gb": round(peak / 1e9, 2), **found}))


def beside(images: int, features: int, classes: int, penalty: float) -> None:
    """Prints both fits of the same examples."""
    from sklearn.linear_model import LogisticRegression

    from eval.measure.features import Examples
    from eval.measure.logistic import fit, top_k_accuracy
    from eval.measure.protocols.cached import TOLERANCE

    (values, labels), (others, theirs) = (
        tuple(np.concatenate(column) for column in zip(*mixture(images, features, classes, seed), strict=True)) for seed in (1, 2)
    )
    mean, deviation = values.mean(0), values.std(0)
    standard = (values - mean) / deviation

    def objective(weights: np.ndarray, bias: np.ndarray) -> float:
        logits = (standard @ weights + bias).astype(np.float64)
        top = logits.max(1)
        losses = np.log(np.exp(logits - top[:, None]).sum(1)) + top - logits[np.arange(images), labels]
        return float(losses.mean() + penalty / 2 * np.sum(weights.astype(np.float64) ** 2))

    begun = time.perf_counter()
    sklearn = LogisticRegression(C=1 / (penalty * images), max_iter=1000).fit(standard, labels)
    seconds_sklearn = time.perf_counter() - begun
    level = objective(sklearn.coef_.T, sklearn.intercept_)
    losses: list[tuple[float, float]] = []
    begun = time.perf_counter()
    ours = fit(
        Examples.of(values, labels),
        classes,
        penalty,
        tolerance=TOLERANCE,
        on_evaluation=lambda penalty, loss, gradient: losses.append((time.perf_counter() - begun, loss)),
    )
    rows = {
        "ours": (losses[-1][0], len(losses), ours.weights, ours.bias),
        "scikit-learn": (seconds_sklearn, int(sklearn.n_iter_[0]), sklearn.coef_.T, sklearn.intercept_),
    }
    about = {"classes": classes, "penalty": penalty}
    for name, (took, number, weights, bias) in rows.items():
        top_1 = top_k_accuracy((others - mean) / deviation @ weights + bias, theirs, 1)
        said = {**about, "what": name, "seconds": round(took, 1), "evaluations" if name == "ours" else "iterations": number}
        print(json.dumps({**said, "objective": round(objective(weights, bias), 6), "top_1": round(top_1, 4)}), flush=True)
    reached = next((seconds for seconds, loss in losses if loss <= level), float("inf"))
    times = {"to_its_objective": round(seconds_sklearn / reached, 2), "to_our_own": round(seconds_sklearn / losses[-1][0], 2)}
    print(json.dumps({**about, "times_as_fast": times}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("scale", "one"):
        command = commands.add_parser(name)
        if name == "one":
            command.add_argument("what", choices=PARTS)
        command.add_argument("--work", type=Path, required=True)
        command.add_argument("--images", type=int, nargs="+", default=[100_000, 400_000, 1_281_167])
        command.add_argument("--features", type=int, default=2048)
        command.add_argument("--classes", type=int, default=1000)
        command.add_argument("--passes", type=int, default=0)
        command.add_argument("--part", type=float, default=1.0)
    command = commands.add_parser("beside")
    command.add_argument("--images", type=int, default=50_000)
    command.add_argument("--features", type=int, default=512)
    command.add_argument("--classes", type=int, nargs="+", default=[100, 1000])
    command.add_argument("--penalties", type=float, nargs="+", default=[1e-2, 1e-3, 1e-4])
    args = parser.parse_args()
    if args.command == "beside":
        for classes in args.classes:
            for penalty in args.penalties:
                beside(args.images, args.features, classes, penalty)
        return
    for images in args.images:
        given = (args.work, images, args.features, args.classes, args.passes, args.part)
        scale(*given) if args.command == "scale" else one(args.what, *given)


if __name__ == "__main__":
    main()
