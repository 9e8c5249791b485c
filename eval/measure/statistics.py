"""Statistics of accuracies: confusion matrix, bootstrap intervals, paired tests, spread over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
_RESAMPLES = 10_000
_NUMBERS_AT_ONCE = 1 << 24


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts images by label (row) and prediction (column). Takes arrays [n] int64, returns [C, C] int64."""
    matrix = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(matrix, (labels, predictions), 1)
    return matrix


def bootstrap_interval(
    values: np.ndarray, confidence: float = CONFIDENCE, resamples: int = _RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Returns the percentile interval of the mean of `values` over resampled images (Efron & Tibshirani 1993, chapter 13).

    `values`, [n], has one number for each image: whether it is classified correctly, or the difference of two models. The
    interval depends only on the arguments. Raises ValueError if there are no values.
    """
    if len(values) == 0:
        raise ValueError("an interval needs at least one value")
    # The counts of the distinct values in a resample are multinomial, so there is no need to draw single images.
    distinct, counts = np.unique(np.asarray(values, np.float64), return_counts=True)
    random = np.random.Generator(np.random.Philox(key=[seed, 0]))
    rows = max(1, _NUMBERS_AT_ONCE // len(distinct))
    means = [
        random.multinomial(len(values), counts / len(values), size=min(rows, resamples - begun)) @ distinct / len(values)
        for begun in range(0, resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(means), ((1 - confidence) / 2, (1 + confidence) / 2))
    return float(low), float(high)


@dataclass(frozen=True)
class PairedTest:
    """The comparison of two models, a and b, on the same images."""

    difference: float
    """Accuracy of a minus accuracy of b."""
    interval: tuple[float, float]
    """95% interval of the difference, by bootstrap over images."""
    p_value: float
    """Two-sided p-value of McNemar's exact test. The null hypothesis is that both have the same accuracy."""


def paired_test(correct_a: np.ndarray, correct_b: np.ndarray) -> PairedTest:
    """Compares two models by the images that only one of them classifies correctly (McNemar 1947).

    Both arrays are [n] bool, for the same images in the same order. Raises ValueError if their lengths differ.
    """
    if correct_a.shape != correct_b.shape:
        raise ValueError(f"arrays of shapes {correct_a.shape} and {correct_b.shape} are not of the same images")
    differences = correct_a.astype(np.int64) - correct_b.astype(np.int64)
    only_a, only_b = int(np.sum(differences > 0)), int(np.sum(differences < 0))
    p_value = float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return PairedTest(float(differences.mean()), bootstrap_interval(differences), p_value)


def holm_correction(p_values: Sequence[float]) -> list[float]:
    """Corrects p-values for the number of tests (Holm 1979). Returns them in the given order."""
    corrected = [0.0] * len(p_values)
    smallest = 0.0
    for rank, number in enumerate(np.argsort(p_values, kind="stable").tolist()):
        smallest = max(smallest, min(1.0, (len(p_values) - rank) * p_values[number]))
        corrected[number] = smallest
    return corrected


@dataclass(frozen=True)
class MeanAndSpread:
    """The mean and the spread of one experiment's results over several seeds."""

    mean: float
    deviation: float
    """Sample standard deviation; nan for a single seed."""
    interval: tuple[float, float]
    """95% interval of the mean by Student's t; nan for a single seed."""
    count: int


def mean_and_spread(values: Sequence[float]) -> MeanAndSpread:
    """Returns mean, spread and interval over seeds, one value each. Raises ValueError if there are no values."""
    count = len(values)
    if count == 0:
        raise ValueError("a mean needs at least one value")
    mean = float(np.mean(values))
    if count == 1:
        return MeanAndSpread(mean, float("nan"), (float("nan"), float("nan")), 1)
    deviation = float(np.std(values, ddof=1))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * deviation / count**0.5
    return MeanAndSpread(mean, deviation, (mean - reach, mean + reach), count)
