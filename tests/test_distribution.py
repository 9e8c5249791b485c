"""Replicas: R of them with B/R images each do what one does with B."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from support.copies import Copies

from trainer.distribution import check_divides, jit_compile, make_strategy
from trainer.input_pipeline import training_batches
from trainer.presets import resolve
from trainer.shared.errors import UserError
from trainer.shared.records import read_manifest
from trainer.state import create_train_state
from trainer.step import make_train_step

TINY = ["depth=10", "width_multiplier=0.0625", "global_batch_size=16", "epochs=6", "warmup_epochs=0", "base_learning_rate=0.002"]
GHOSTS = "ghost batches"
CASES = {
    "paper": (4, False, ["blur=true"]),
    "pt_official, LARS": (2, False, ["variant=pt_official", "optimizer=lars"]),
    "isogclr": (2, False, ["variant=isogclr"]),
    "nt_xent": (2, False, ["loss=nt_xent"]),
    "contrast of groups": (2, False, ["contrast_batch_size=4", "temperature=0.05"]),
    GHOSTS: (2, False, ["ghost_batch_size=4"]),
    "gradients as on a TPU": (2, True, ["depth=50"]),
}
"""By name: number of replicas, whether their device's compiler fuses, settings."""
REMOVED = re.compile(r"0 state momentum/encoder/group\d_block1_\w+/beta")
"""The betas of blocks. Their gradient in the first step is zero: all values pass the ReLU after a block (`support.lifted`), and
the norm after that removes what a beta adds; a block's last gamma is zero and hides the betas before it. In float64 these
gradients are below 3e-18. In float32 a sum of terms that cancel remains, whose size depends on the CPU. Two orders of the rows
of one replica differ by 1.4e-9 on one. The gradient of the layer's gamma is a sum of the same terms, which do not cancel there.
"""


@pytest.fixture(scope="module")
def stepped(copies: Copies, dataset, tmp_path_factory) -> Path:
    """The folder where `support.replicas` leaves five steps of each case."""
    folder = tmp_path_factory.mktemp("replicas")
    cases = {name: (count, fuses, [*TINY, *settings]) for name, (count, fuses, settings) in CASES.items()}
    copies.printed_by("support.replicas", dataset, folder, json.dumps(cases))
    return folder


@pytest.mark.thorough
@pytest.mark.parametrize("case", [case for case in CASES if case != GHOSTS])
def test_replicas_do_what_one_does_with_the_whole_batch(stepped, case):
    """Loss, gradients (in the optimizer's slots), u, BN's statistics and weights; and all replicas hold the same bits.

    After one step all agree to float32's accuracy. Each later step begins with the state that one replica had, since a ReLU that
    rounding turned the other way grows from step to step. In this small network one such, in the step itself, can be some per
    cent of the gradient, and where it happens depends on the machine: so of five steps one may be beyond the bound.
    """
    expected, found = (dict(np.load(stepped / f"{case}-{which}.npz")) for which in ("one", "several"))
    assert set(found) == set(expected)
    for name in (name for name in expected if name.startswith("0 ")):
        if REMOVED.fullmatch(name):
            rounding = 1e-3 * np.abs(expected[name.replace("/beta", "/gamma")]).max()
            assert max(np.abs(expected[name]).max(), np.abs(found[name]).max()) <= rounding, name
            continue
        scale = np.abs(expected[name]).max() + 1e-6
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-3 * scale, err_msg=name)
    kinds = {name.removeprefix("0 ").split("/")[0] for name in expected if name.startswith("0 state")}
    apart: dict[str, list[float]] = {kind: [] for kind in kinds}
    for step in range(5):
        loss = f"{step} metric train/contrastive_loss"
        np.testing.assert_allclose(found[loss], expected[loss], rtol=1e-4)
        for kind in kinds:
            ours, theirs = (
                np.concatenate([values[n].ravel().astype(np.float64) for n in expected if n.split("/")[0] == f"{step} {kind}"])
                for values in (found, expected)
            )
            # NT-Xent leaves u at zero.
            apart[kind].append(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-12))
    for kind, distances in apart.items():
        assert sorted(distances)[-2] <= 1e-3, (kind, distances)
        assert kind == "state momentum" or max(distances) <= 1e-2, (kind, distances)


@pytest.mark.thorough
def test_replicas_with_ghost_batches_hold_the_same_state(stepped):
    """`support.replicas` compares their bits. Which views share a ghost batch depends on the number of replicas, so one replica
    has another state. Its variances are about the same.
    """
    one, several = (dict(np.load(stepped / f"{GHOSTS}-{which}.npz")) for which in ("one", "several"))
    assert set(one) == set(several)
    for name, values in several.items():
        assert np.all(np.isfinite(values)), name
        if "moving_variance" in name:
            np.testing.assert_allclose(values, one[name], rtol=0.1, err_msg=name)


def test_a_batch_that_does_not_divide_says_what_would():
    with pytest.raises(UserError, match="global_batch_size=18 does not divide over 4 replicas: take 16 or 20"):
        check_divides(18, 4)
    with pytest.raises(UserError, match=r"take 8$"):
        check_divides(6, 8)
    check_divides(16, 4)


@pytest.mark.thorough
def test_the_whole_step_compiles_under_xla(dataset):
    """With all that a step can have: blur, u, a temperature for each image."""
    config = resolve("demo", [*TINY, "blur=true", "variant=isogclr"])
    batch = next(iter(training_batches(config, str(dataset), read_manifest(str(dataset)), 0)))
    ends = []
    for compiled in (False, True):
        state = create_train_state(config, 48, 6)
        metrics = make_train_step(config, state, compiled=compiled)(batch)
        ends.append((float(metrics["train/contrastive_loss"]), state.arrays()))
    np.testing.assert_allclose(ends[1][0], ends[0][0], rtol=1e-4)
    np.testing.assert_allclose(ends[1][1]["u"], ends[0][1]["u"], rtol=1e-4)


def test_a_machine_with_nothing_else_runs_one_replica_uncompiled():
    strategy = make_strategy()
    assert strategy.num_replicas_in_sync == 1
    assert not jit_compile(strategy)
    assert isinstance(tf.distribute.get_strategy(), type(strategy))
