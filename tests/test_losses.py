"""The losses against the official code's outputs and against float64."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from support import oracle

from trainer.config import Config, replace
from trainer.losses import make_loss
from trainer.losses.global_contrastive import VARIANTS, gamma_of_visit, global_contrastive, global_objective, next_temperature
from trainer.losses.loss import Projections, alignment, uniformity_kernel
from trainer.losses.nt_xent import nt_xent
from trainer.presets import resolve

GOLDENS = Path(__file__).parent / "goldens"


def projections(hidden: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    z1, z2 = tf.split(tf.math.l2_normalize(hidden, axis=-1), 2)
    return z1, z2


def one_replica(hidden: np.ndarray, u: np.ndarray, gamma: float, temperature: float, variant: str):
    """Returns loss, gradient by `hidden`, and the new u of the batch, of a batch on one replica."""
    hidden = tf.constant(hidden)
    u = tf.constant(u)
    with tf.GradientTape() as tape:
        tape.watch(hidden)
        z1, z2 = projections(hidden)
        result = global_contrastive(
            z1, z2, z1, z2, tf.range(len(u)), u, gamma_of_visit(u, gamma, VARIANTS[variant]), temperature, VARIANTS[variant]
        )
    return result.loss.numpy(), tape.gradient(result.loss, hidden).numpy(), result.u.numpy()


@pytest.mark.parametrize("case", range(3))
def test_nt_xent_agrees_with_the_official_code_and_the_oracle(case):
    golden = np.load(GOLDENS / "nt_xent.npz")
    hidden, temperature = tf.constant(golden[f"{case}_hidden"]), float(golden[f"{case}_temperature"])
    with tf.GradientTape() as tape:
        tape.watch(hidden)
        z1, z2 = projections(hidden)
        loss = nt_xent(z1, z2, z1, z2, tf.range(len(z1)), temperature)
    np.testing.assert_allclose(loss, golden[f"{case}_loss"], rtol=1e-5)
    np.testing.assert_allclose(tape.gradient(loss, hidden), golden[f"{case}_grad"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(loss, oracle.nt_xent(*oracle.normalise(hidden.numpy()), temperature), rtol=1e-5)


@pytest.mark.parametrize("variant", ["tf_official", "pt_official"])
def test_trajectory_of_loss_gradient_and_u_agrees_with_the_official_code(variant):
    golden = np.load(GOLDENS / f"gcl_{variant}.npz")
    cases = {name.split("_")[0] for name in golden.files}
    for case in cases:
        u = np.zeros(int(golden[f"{case}_N"]), np.float32)
        gamma, temperature = float(golden[f"{case}_gamma"]), float(golden[f"{case}_temperature"])
        steps = {name.split("_")[1] for name in golden.files if name.startswith(f"{case}_") and name.endswith("_hidden")}
        assert len(steps) > 1
        for step in sorted(steps, key=int):
            here = f"{case}_{step}"
            ids = golden[f"{here}_ids"]
            loss, gradient, u[ids] = one_replica(golden[f"{here}_hidden"], u[ids], gamma, temperature, variant)
            np.testing.assert_allclose(loss, golden[f"{here}_loss"], rtol=1e-5, err_msg=here)
            np.testing.assert_allclose(gradient, golden[f"{here}_grad"], rtol=1e-5, atol=1e-6, err_msg=here)
            np.testing.assert_allclose(u, golden[f"{here}_u"], rtol=1e-5, err_msg=here)


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("batch", [2, 7, 16])
def test_surrogate_and_u_agree_with_the_float64_formulas(variant, batch):
    random = np.random.default_rng(batch)
    hidden = random.normal(size=(2 * batch, 12)).astype(np.float32)
    u = random.uniform(0.5, 3.0, batch).astype(np.float32)
    u[0] = 0.0
    gamma, temperature = 0.7, 0.2
    loss, _, new_u = one_replica(hidden, u, gamma, temperature, variant)

    z1, z2 = oracle.normalise(hidden)
    g1, g2 = oracle.contrast(z1, z2, temperature)
    gammas = np.full(batch, gamma)
    if VARIANTS[variant].first_visit == "image":
        gammas[0] = 1.0
    u1, u2 = (1 - gammas) * u + gammas * g1, (1 - gammas) * u + gammas * g2
    np.testing.assert_allclose(loss, oracle.global_contrastive(z1, z2, u1, u2, temperature), rtol=1e-5)
    np.testing.assert_allclose(new_u, (u1 + u2) / (1 if variant == "tf_official" else 2), rtol=1e-5)


def test_at_gamma_1_the_gradient_is_temperature_times_that_of_decoupled_nt_xent():
    hidden = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
    temperature = 0.3
    _, gradient, _ = one_replica(hidden, np.full(6, 9.0, np.float32), 1.0, temperature, "paper")

    numeric = np.zeros(hidden.shape)
    epsilon = 1e-5
    for index in np.ndindex(*hidden.shape):
        moved = hidden.astype(np.float64)
        moved[index] += epsilon
        above = oracle.decoupled_nt_xent(*oracle.normalise(moved), temperature)
        moved[index] -= 2 * epsilon
        below = oracle.decoupled_nt_xent(*oracle.normalise(moved), temperature)
        numeric[index] = (above - below) / (2 * epsilon)
    np.testing.assert_allclose(gradient, temperature * numeric, rtol=1e-4, atol=1e-6)


def gradient_of_nt_xent(hidden: np.ndarray, temperature: float, decoupled: bool) -> tuple[float, np.ndarray]:
    hidden = tf.constant(hidden)
    with tf.GradientTape() as tape:
        tape.watch(hidden)
        z1, z2 = projections(hidden)
        loss = nt_xent(z1, z2, z1, z2, tf.range(len(z1)), temperature, decoupled)
    return float(loss), tape.gradient(loss, hidden).numpy()


def test_decoupled_nt_xent_agrees_with_float64_and_with_the_global_loss_at_gamma_1():
    hidden = np.random.default_rng(3).normal(size=(14, 8)).astype(np.float32)
    loss, gradient = gradient_of_nt_xent(hidden, 0.3, True)
    z1, z2 = oracle.normalise(hidden)
    # The oracle takes the mean over negatives where NT-Xent takes the sum.
    np.testing.assert_allclose(loss, oracle.decoupled_nt_xent(z1, z2, 0.3) + 2 * np.log(2 * 6), rtol=1e-5)
    _, surrogate, _ = one_replica(hidden, np.ones(7, np.float32), 1.0, 0.3, "paper")
    np.testing.assert_allclose(surrogate, 0.3 * gradient, rtol=1e-4, atol=1e-6)
    assert gradient_of_nt_xent(hidden, 0.3, False)[0] > loss


def test_the_gradient_by_an_images_temperature_is_that_of_its_objective():
    """At gamma = 1, u is the contrast itself, and tau log E exp(s/tau) can be differentiated numerically."""
    random = np.random.default_rng(5)
    hidden, temperatures = random.normal(size=(12, 8)).astype(np.float32), random.uniform(0.1, 0.5, 6).astype(np.float32)
    z1, z2 = projections(tf.constant(hidden))
    result = global_contrastive(
        z1, z2, z1, z2, tf.range(6), tf.ones(6), tf.ones(6), tf.constant(temperatures), VARIANTS["isogclr"]
    )
    epsilon = 1e-5
    for i, temperature in enumerate(temperatures.astype(np.float64)):
        numeric = 0.0
        for sign in (1, -1):
            tau = temperature + sign * epsilon
            g1, g2 = oracle.contrast(*oracle.normalise(hidden), tau)
            numeric += sign * tau * (np.log(g1[i]) + np.log(g2[i])) / 2 / (2 * epsilon)
        np.testing.assert_allclose(result.temperature_gradient[i], numeric, rtol=1e-4, atol=1e-5)


def test_a_temperature_moves_by_its_momentum_and_stays_within_its_bounds():
    config = replace(
        Config(),
        variant="isogclr",
        temperature_rho=0.5,
        temperature_learning_rate=0.1,
        temperature_momentum=0.9,
        temperature_max=0.35,
    )
    before, velocity, gradient = np.array([0.1, 0.2, 0.3]), np.array([0.0, 1.0, -1.0]), np.array([0.3, -2.0, -1.5])
    moved, faster = next_temperature(*(tf.constant(x, tf.float32) for x in (before, velocity, gradient)), config.loss)
    expected = 0.1 * velocity + 0.9 * (gradient + 0.5)
    np.testing.assert_allclose(faster, expected, rtol=1e-6)
    np.testing.assert_allclose(moved, np.clip(before - 0.1 * expected, 0.05, 0.35), rtol=1e-6)
    assert moved[0] == np.float32(0.05)
    assert moved[2] == np.float32(0.35)


def test_alignment_and_uniformity_are_those_of_the_definition():
    z1, z2 = oracle.normalise(np.random.default_rng(6).normal(size=(10, 4)))
    one, two = tf.constant(z1, tf.float32), tf.constant(z2, tf.float32)
    np.testing.assert_allclose(alignment(one, two), np.mean(np.sum((z1 - z2) ** 2, axis=1)), rtol=1e-5)
    pairs = [np.exp(-2 * np.sum((z1[i] - z1[j]) ** 2)) for i in range(5) for j in range(5) if i != j]
    np.testing.assert_allclose(uniformity_kernel(one, one, tf.range(5)), np.mean(pairs), rtol=1e-5)


def test_a_permutation_of_the_batch_changes_nothing():
    random = np.random.default_rng(1)
    hidden, u = random.normal(size=(16, 8)).astype(np.float32), random.uniform(0.5, 2, 8).astype(np.float32)
    order = random.permutation(8)
    loss, _, new_u = one_replica(hidden, u, 0.9, 0.1, "paper")
    permuted, _, permuted_u = one_replica(hidden[np.concatenate([order, order + 8])], u[order], 0.9, 0.1, "paper")
    np.testing.assert_allclose(permuted, loss, rtol=1e-6)
    np.testing.assert_allclose(permuted_u, new_u[order], rtol=1e-6)


def test_anchors_of_two_replicas_give_what_one_replica_gives():
    random = np.random.default_rng(2)
    hidden, u = random.normal(size=(16, 8)).astype(np.float32), tf.constant(random.uniform(0.5, 2, 8).astype(np.float32))
    whole, _, whole_u = one_replica(hidden, u.numpy(), 0.9, 0.1, "paper")
    z1, z2 = projections(tf.constant(hidden))
    gamma = gamma_of_visit(u, 0.9, VARIANTS["paper"])
    halves = [
        global_contrastive(z1[s], z2[s], z1, z2, tf.range(8)[s], u[s], gamma[s], 0.1, VARIANTS["paper"])
        for s in (slice(0, 4), slice(4, 8))
    ]
    np.testing.assert_allclose(np.mean([half.loss for half in halves]), whole, rtol=1e-6)
    np.testing.assert_allclose(np.concatenate([half.u for half in halves]), whole_u, rtol=1e-6)


@pytest.mark.parametrize("settings", [["loss=nt_xent"], ["variant=pt_official"], ["variant=isogclr"]], ids=" ".join)
def test_in_groups_each_group_is_a_batch_of_its_own(settings):
    random = np.random.default_rng(3)
    config = resolve("demo", settings)
    hidden = tf.constant(random.normal(size=(24, 8)).astype(np.float32))
    whole, grouped = make_loss(config.loss), make_loss(config.loss, 4)
    assert grouped.vectors == whole.vectors
    # One replica of two, whose anchors are the last 12 of 24 images.
    stored = {name: tf.constant(random.uniform(0.1, 0.6, 24).astype(np.float32)) for name in whole.vectors}
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(hidden)
        z1, z2 = projections(hidden)
        everything = Projections(z1, z2, tf.concat([z2, z1], 0), tf.concat([z1, z2], 0), tf.range(12, 24))
        loss, entries = tf.function(grouped, autograph=False, jit_compile=True)(everything, stored)
        alone = [
            whole(Projections(z1[s], z2[s], z1[s], z2[s], tf.range(4)), {name: of[12:][s] for name, of in stored.items()})
            for s in (slice(0, 4), slice(4, 8), slice(8, 12))
        ]
        expected = sum(one for one, _ in alone) / 3
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(tape.gradient(loss, hidden), tape.gradient(expected, hidden), rtol=1e-5, atol=1e-6)
    assert entries.keys() == whole.vectors.keys()
    for name, values in entries.items():
        np.testing.assert_allclose(values, np.concatenate([found[name] for _, found in alone]), rtol=1e-5, atol=1e-6)


def test_global_objective_counts_only_images_that_were_seen():
    u = np.array([0.0, 2.0, 0.0, 8.0], np.float32)
    np.testing.assert_allclose(global_objective(tf.constant(u), 0.1), 0.1 * (np.log(2.0) + np.log(8.0)) / 2, rtol=1e-6)
    assert global_objective(tf.zeros(3), 0.1) == 0.0
