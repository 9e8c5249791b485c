"""Statistics: intervals that hold what they promise, tests against SciPy's and by counting."""

import numpy as np
import pytest
from scipy import stats

from eval.measure.statistics import bootstrap_interval, confusion_matrix, holm_correction, mean_and_spread, paired_test


def test_an_interval_of_rights_and_wrongs_is_that_of_plain_resampling():
    correct = np.arange(300) < 230
    theirs = stats.bootstrap((correct.astype(float),), np.mean, method="percentile", n_resamples=9999, rng=1)
    np.testing.assert_allclose(bootstrap_interval(correct), theirs.confidence_interval, atol=0.005)


def test_an_interval_of_any_numbers_is_that_of_plain_resampling():
    values = np.random.default_rng(0).normal(size=150)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=9999, rng=1)
    np.testing.assert_allclose(bootstrap_interval(values), theirs.confidence_interval, atol=0.01)


def test_an_interval_holds_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    intervals = [bootstrap_interval(random.random(500) < 0.7, resamples=1000, seed=seed) for seed in range(400)]
    assert 0.92 <= np.mean([low <= 0.7 <= high for low, high in intervals]) <= 0.98


def test_an_interval_is_the_same_each_time():
    correct = np.random.default_rng(0).random(50_000) < 0.6
    assert bootstrap_interval(correct) == bootstrap_interval(correct)


def test_two_models_are_compared_by_the_images_where_they_differ():
    """Of 100 images a alone has 15 and b alone 5: P(|X - 10| >= 5) for X of Binomial(20, 1/2) is 0.0414."""
    a, b = np.ones(100, bool), np.ones(100, bool)
    b[:15], a[15:20] = False, False
    result = paired_test(a, b)
    assert result.difference == pytest.approx(0.10)
    assert result.p_value == pytest.approx(0.0414, abs=1e-4)
    assert 0 < result.interval[0] < 0.10 < result.interval[1] < 0.2
    swapped = paired_test(b, a)
    assert (swapped.difference, swapped.p_value) == (-result.difference, result.p_value)


def test_models_that_agree_everywhere_do_not_differ():
    correct = np.arange(10) < 5
    result = paired_test(correct, correct)
    assert (result.difference, result.interval, result.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_models_on_different_images_are_not_compared():
    with pytest.raises(ValueError, match="not of the same images"):
        paired_test(np.ones(3, bool), np.ones(4, bool))


def test_p_values_are_corrected_by_how_many_are_as_small():
    """Of four tests the smallest counts four times, the next three times, and none less than one before it."""
    assert holm_correction([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm_correction([0.9, 0.8]) == [1.0, 1.0]
    assert holm_correction([]) == []


def test_a_confusion_matrix_has_labels_as_rows():
    matrix = confusion_matrix(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_seeds_have_mean_sample_deviation_and_students_interval():
    values = [0.70, 0.72, 0.77]
    result = mean_and_spread(values)
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (result.mean, result.deviation, result.count) == (pytest.approx(0.73), pytest.approx(np.std(values, ddof=1)), 3)
    np.testing.assert_allclose(result.interval, theirs)


def test_one_seed_has_no_spread():
    result = mean_and_spread([0.7])
    assert (result.mean, result.count) == (0.7, 1)
    assert np.isnan([result.deviation, *result.interval]).all()
