"""LARS and the learning rate against the official code, momentum and AdamW against their formulas."""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from trainer.config import Config, replace
from trainer.optimizer import AdamW, Lars, Momentum, learning_rate, total_steps

GOLDENS = Path(__file__).parent / "goldens"
ROWS = json.loads((GOLDENS / "lr_schedule.json").read_text())


def test_lars_agrees_with_the_official_code_step_by_step():
    golden = np.load(GOLDENS / "lars.npz")
    names = [str(name) for name in golden["names"]]
    variables = [tf.Variable(golden[f"init_{i}"]) for i in range(len(names))]
    exempt = [any(part in name for part in ("bias", "batch_normalization", "head_supervised")) for name in names]
    lars = Lars(variables, exempt, float(golden["momentum"]), float(golden["weight_decay"]), float(golden["trust_coefficient"]))
    steps = sorted({int(name.split("_")[0]) for name in golden.files if name[0].isdigit()})
    assert len(steps) > 1
    for step in steps:
        gradients = [tf.constant(golden[f"{step}_grad_{i}"]) for i in range(len(names))]
        lars.apply(gradients, tf.constant(golden[f"{step}_lr"]), tf.constant(step, tf.int64))
        for i, variable in enumerate(variables):
            np.testing.assert_allclose(variable, golden[f"{step}_param_{i}"], rtol=1e-5, atol=1e-7, err_msg=f"{step} {names[i]}")


def test_momentum_is_nesterovs_with_decay_of_what_is_not_exempt():
    kernel, bias = tf.Variable([1.0, -2.0]), tf.Variable([0.5])
    optimizer = Momentum([kernel, bias], [False, True], momentum=0.9, weight_decay=0.1)
    w, b, vw, vb = np.array([1.0, -2.0]), np.array([0.5]), np.zeros(2), np.zeros(1)
    for step in range(3):
        gw, gb = np.array([0.3, 0.1]) * (step + 1), np.array([-0.2])
        optimizer.apply(
            [tf.constant(gw, tf.float32), tf.constant(gb, tf.float32)], tf.constant(0.05), tf.constant(step, tf.int64)
        )
        gw = gw + 0.1 * w
        vw, vb = 0.9 * vw + 0.05 * gw, 0.9 * vb + 0.05 * gb
        w, b = w - (0.9 * vw + 0.05 * gw), b - (0.9 * vb + 0.05 * gb)
    np.testing.assert_allclose(kernel, w, rtol=1e-6)
    np.testing.assert_allclose(bias, b, rtol=1e-6)


def test_adamw_is_adam_with_decay_beside_it_of_what_is_not_exempt():
    kernel, bias = tf.Variable([1.0, -2.0]), tf.Variable([0.5])
    optimizer = AdamW([kernel, bias], [False, True], beta_1=0.9, beta_2=0.99, weight_decay=0.1)
    w, first, second = np.array([1.0, -2.0, 0.5]), np.zeros(3), np.zeros(3)
    for step in range(4):
        gradient = np.array([0.3, 0.1, -0.2]) * (step - 1.5)
        given = [tf.constant(gradient[:2], tf.float32), tf.constant(gradient[2:], tf.float32)]
        optimizer.apply(given, tf.constant(0.05), tf.constant(step, tf.int64))
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
        change = first / (1 - 0.9 ** (step + 1)) / (np.sqrt(second / (1 - 0.99 ** (step + 1))) + 1e-8)
        w = w - 0.05 * (change + 0.1 * w * [1, 1, 0])
    np.testing.assert_allclose(np.concatenate([kernel, bias]), w, rtol=1e-5)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"b{row['batch_size']}-{row['scaling']}-step{row['step']}")
def test_learning_rate_agrees_with_the_official_code(row):
    config = replace(
        Config(),
        base_learning_rate=row["base_learning_rate"],
        learning_rate_scaling=row["scaling"],
        global_batch_size=row["batch_size"],
        epochs=row["epochs"],
        warmup_epochs=row["warmup_epochs"],
    )
    assert total_steps(config.optimizer, row["num_examples"]) == row["total_steps"]
    ours = learning_rate(config.optimizer, row["num_examples"], tf.constant(row["step"], tf.int64))
    np.testing.assert_allclose(ours, row["learning_rate"], rtol=1e-5, atol=1e-12)
