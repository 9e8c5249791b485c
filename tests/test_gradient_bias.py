"""The bias of a small batch's gradient: exact where it can be known, blind to noise, and shown as it was recorded."""

import numpy as np
import pytest
import tensorflow as tf
from benchmarks import gradient_bias

from trainer.losses.global_contrastive import VARIANTS, global_contrastive

COUNT, TEMPERATURE = 24, 0.3


@pytest.fixture(scope="module")
def hidden():
    return tf.constant(np.random.default_rng(0).normal(size=(COUNT, 2, 4)), tf.float32)


def rotated(exact: np.ndarray, degrees: float, random: np.random.Generator) -> np.ndarray:
    """`exact` turned by an angle, in a direction drawn."""
    unit = exact / np.linalg.norm(exact)
    aside = random.normal(size=exact.shape)
    aside -= (aside @ unit) * unit
    aside *= np.linalg.norm(exact) / np.linalg.norm(aside)
    return np.cos(np.radians(degrees)) * exact + np.sin(np.radians(degrees)) * aside


def test_a_batch_of_all_images_has_the_global_gradient(hidden):
    exact = gradient_bias.global_gradient(hidden, TEMPERATURE)
    epoch = gradient_bias.make_epoch(1.0, hidden, COUNT, TEMPERATURE)
    np.testing.assert_allclose(gradient_bias.mean_gradient(epoch, COUNT, 0, 1.0, 2), exact, atol=1e-6 * np.abs(exact).max())


def test_the_smaller_the_batch_the_more_bias_and_simclr_has_the_most(hidden):
    exact = gradient_bias.global_gradient(hidden, TEMPERATURE)

    def degrees(gamma: float | None, batch: int) -> float:
        epoch = gradient_bias.make_epoch(gamma, hidden, batch, TEMPERATURE)
        means = [gradient_bias.mean_gradient(epoch, COUNT, seed, gamma, 20) for seed in range(4)]
        return gradient_bias.bias(means, exact).degrees

    simclr, decoupled, sogclr = (degrees(gamma, 4) for gamma in (None, 1.0, 0.1))
    assert simclr > decoupled > sogclr
    assert simclr > degrees(None, 12)
    assert decoupled > degrees(1.0, 12)


def test_one_batch_of_all_images_is_biased_by_the_positive_and_by_the_one_u_of_two_views(hidden):
    exact = gradient_bias.global_gradient(hidden, TEMPERATURE)

    def degrees(gamma: float | None) -> float:
        return gradient_bias.bias([gradient_bias.gradient_of_all(gamma, hidden, TEMPERATURE)] * 3, exact).degrees

    assert degrees(1.0) < 1e-3
    assert degrees(None) > 0.1
    assert degrees(0.1) > 5 * degrees(0.9) > 0


def test_an_epoch_moves_u_as_its_batches_one_after_another_do(hidden):
    order, u = np.random.default_rng(1).permutation(COUNT), np.linspace(0.5, 1.5, COUNT, dtype=np.float32)
    gradient, after = gradient_bias.make_epoch(0.9, hidden, 6, TEMPERATURE)(tf.constant(order), tf.constant(u))
    z = tf.math.l2_normalize(hidden, axis=2)
    expected = np.array(u)
    for ids in order.reshape(-1, 6):
        z1, z2 = tf.unstack(tf.gather(z, ids), axis=1)
        given = z1, z2, z1, z2, tf.range(6), u[ids], tf.fill([6], 0.9), TEMPERATURE, VARIANTS["paper"]
        expected[ids] = global_contrastive(*given).u
    np.testing.assert_allclose(after, expected, rtol=1e-6)
    assert gradient.shape == hidden.shape


@pytest.mark.thorough
def test_every_loss_is_measured_at_every_batch_and_with_all_images_at_once(hidden):
    rows = list(gradient_bias.measure(hidden, batches=(4, 12), epochs=1))
    found = [(row["temperature"], row["loss"], row["batch"]) for row in rows]
    expected = [(t, loss, b) for t in gradient_bias.TEMPERATURES for loss in gradient_bias.LOSSES for b in (4, 12, COUNT)]
    assert found == expected
    assert all(row["error"] == 0 for row in rows if row["batch"] == COUNT)


def test_noise_makes_no_angle():
    """Each chain's mean lies 40 degrees off, for its noise; what they have in common lies 3 off, or none."""
    random = np.random.default_rng(2)
    exact = random.normal(size=10_000)
    for degrees in (3.0, 0.0):
        common = rotated(exact, degrees, random)
        means = [common + random.normal(size=exact.shape) * 0.8 for _ in range(12)]
        found = gradient_bias.bias(means, exact)
        assert abs(found.degrees - degrees) < max(3 * found.error, 2.0)
        assert found.degrees < 5


def test_the_page_shows_what_was_recorded(tmp_path):
    rows = [
        {"temperature": temperature, "loss": loss, "batch": batch, "degrees": 100 / batch, "error": 0.25}
        for temperature in gradient_bias.TEMPERATURES
        for loss in gradient_bias.LOSSES
        for batch in (*gradient_bias.BATCHES, 2048)
    ]
    measured = {"run": "a-run", "state_sha256": "5" * 64, "dataset_fingerprint": "f" * 64, "images": 2048, "epochs": 50}
    (tmp_path / "results.md").write_text(f"# Before\n{gradient_bias.BEGIN}\nold\n{gradient_bias.END}\nAfter\n")
    gradient_bias.write_page([measured | {"rows": rows[:20], "run": "an-earlier-run"}, measured | {"rows": rows}], tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert text.startswith("# Before\n")
    assert text.endswith("\nAfter\n")
    assert "old" not in text
    assert "| 0.1 | SogCLR, gamma .9 | 6.25 ± 0.25 | 3.12 ± 0.25 | 1.56 ± 0.25 | 0.78 ± 0.25 | 0.05 |" in text
    assert "| 0.05 | SimCLR | 6.25 ± 0.25 |" in text
    assert text.index("`an-earlier-run`") < text.index("over 2,048 images") < text.index("`a-run`")
    assert (tmp_path / gradient_bias.FIGURE).read_bytes().startswith(b"\x89PNG")
