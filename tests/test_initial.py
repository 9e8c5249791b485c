"""A run that starts from another run's checkpoint: what it takes, what begins anew, what is refused."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from support.datasets import write_dataset

from trainer import checkpoint as checkpoints
from trainer.checkpoint import Checkpoint
from trainer.folder import read_config
from trainer.initial import find_source, initialise
from trainer.preemption import PreemptedError
from trainer.presets import resolve
from trainer.shared.errors import UserError
from trainer.shared.records import read_manifest
from trainer.state import create_train_state
from trainer.task import main
from trainer.train import train

TINY = ["depth=10", "width_multiplier=0.0625", "image_size=16", "global_batch_size=20", "log_every_steps=1"]


def tiny(*overrides: str):
    return resolve("demo", [*TINY, "epochs=1", *overrides])


@pytest.fixture(scope="module")
def source(dataset, tmp_path_factory) -> Path:
    """The folder of a run of one epoch."""
    folder = tmp_path_factory.mktemp("source")
    train(tiny(), str(dataset), str(folder))
    return folder


def started(init_from, config, data):
    """Returns the arrays of a state that starts from `init_from`, those of one that does not, and what is said."""
    manifest = read_manifest(str(data))
    state = create_train_state(config, manifest.splits["train"].records, manifest.num_classes)
    fresh, said = state.arrays(), []
    initialise(state, find_source(str(init_from), None, config, manifest, state), said.append)
    return state.arrays(), fresh, said


def taken(arrays, stored):
    """Returns the first parts of the names whose values are those of the checkpoint."""
    same = {name for name, value in arrays.items() if name in stored and np.array_equal(value, stored[name])}
    return {part for name in same if (part := name.split("/")[0]) and all(n in same for n in arrays if n.split("/")[0] == part)}


def test_encoder_heads_and_u_come_along_and_all_else_begins_anew(source, dataset):
    arrays, fresh, (said,) = started(source, tiny("epochs=2", "seed=3"), dataset)
    stored = checkpoints.open_checkpoint(str(source))
    assert taken(arrays, stored.arrays) == {"encoder", "projection", "classifier", "u"}
    assert arrays["u"].all()
    others = {name for name in arrays if name.split("/")[0] not in ("encoder", "projection", "classifier", "u")}
    assert {"step"} < others
    assert all(np.array_equal(arrays[name], fresh[name]) for name in others)
    digest = checkpoints.sha256_of(stored.arrays)
    assert said == f"starts with encoder, projection, classifier, u of {stored.path}, state_sha256 {digest[:16]}"
    assert digest == json.loads((source / "result.json").read_text())["state_sha256"]


def test_u_stays_behind_where_it_belongs_to_other_images_and_the_classifier_where_classes_differ(source, tmp_path):
    write_dataset(tmp_path / "fewer", train=40)
    arrays, fresh, said = started(source, tiny(), tmp_path / "fewer")
    assert taken(arrays, checkpoints.open_checkpoint(str(source)).arrays) == {"encoder", "projection", "classifier"}
    assert np.array_equal(arrays["u"], fresh["u"])
    assert said[1:] == ["u begins anew: it belongs to the images of dataset test-48, not of test-40"]
    write_dataset(tmp_path / "classes", train=50, classes=5)
    arrays, _, said = started(source, tiny(), tmp_path / "classes")
    assert taken(arrays, checkpoints.open_checkpoint(str(source)).arrays) == {"encoder", "projection"}
    assert said[1] == "classifier begins anew: it belongs to other classes"


def test_u_stays_behind_where_it_estimates_something_else(source, dataset):
    for overrides, why in (
        (("temperature=0.2",), "u begins anew: it belongs to temperature=0.3, not 0.2"),
        (("variant=tf_official",), "u begins anew: it belongs to variant=paper, not tf_official"),
    ):
        arrays, fresh, said = started(source, tiny(*overrides), dataset)
        assert np.array_equal(arrays["u"], fresh["u"])
        assert said[1:] == [why]
    assert len(started(source, tiny("loss=nt_xent"), dataset)[2]) == 1


def test_an_encoder_alone_will_do(source, dataset, tmp_path):
    """As an import of somebody else's encoder leaves one: no heads, no u, no dataset."""
    whole = checkpoints.open_checkpoint(str(source))
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"config": config["config"]}))
    path = checkpoints.save(
        str(tmp_path), Checkpoint(0, {n: v for n, v in whole.arrays.items() if n.startswith("encoder/")}, {}), keep=1
    )
    arrays, fresh, said = started(tmp_path, tiny("projection_dim=32"), dataset)
    assert {"encoder"} == taken(arrays, checkpoints.load(path).arrays)
    assert all(np.array_equal(arrays[name], fresh[name]) for name in arrays if not name.startswith("encoder/"))
    assert said[1] == f"projection begins anew: {path} has none"
    assert [line.split()[0] for line in said[1:]] == ["projection", "classifier", "u"]


def test_learned_temperatures_come_along_with_u_and_their_velocity_does_not(source, dataset, tmp_path):
    config = tiny("variant=isogclr")
    manifest = read_manifest(str(dataset))
    stored = create_train_state(config, 48, 6).arrays()
    random = np.random.default_rng(0)
    stored |= {name: random.random(48, np.float32) for name in ("u", "temperature", "temperature_velocity")}
    shutil.copy(source / "config.json", tmp_path)
    about = json.loads((source / "config.json").read_text())
    about["config"]["variant"] = "isogclr"
    (tmp_path / "config.json").write_text(json.dumps(about))
    checkpoints.save(str(tmp_path), Checkpoint(7, stored, {}), keep=1)
    assert manifest.fingerprint == about["dataset_fingerprint"]
    arrays, fresh, _ = started(tmp_path, config, dataset)
    assert {"u", "temperature"} < taken(arrays, stored)
    assert np.array_equal(arrays["temperature_velocity"], fresh["temperature_velocity"])


@pytest.mark.parametrize(
    "setting", ["depth=18", "width_multiplier=0.125", "cifar_stem=false", "projection_layers=3", "projection_dim=64"]
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_what_differs_and_nothing_is_written(source, dataset, tmp_path, setting):
    name, _, value = setting.partition("=")
    with pytest.raises(
        UserError, match=rf"checkpoint-\d+\.npz has {name}=\S+, not {value.title() if value == 'false' else value}: set"
    ):
        train(tiny(setting), str(dataset), str(tmp_path / "run"), init_from=str(source))
    assert not (tmp_path / "run").exists()


def test_no_checkpoint_is_refused(source, dataset, tmp_path):
    with pytest.raises(UserError, match=r"holds no pretraining run: config\.json is missing"):
        train(tiny(), str(dataset), str(tmp_path / "run"), init_from=str(tmp_path))
    torn = tmp_path / "torn"
    shutil.copytree(source, torn)
    (checkpoint,) = torn.glob("*.npz")
    checkpoint.write_bytes(checkpoint.read_bytes()[:-50])
    with pytest.raises(UserError, match=rf"{checkpoint.name} is not a whole checkpoint"):
        train(tiny(), str(dataset), str(tmp_path / "run"), init_from=str(checkpoint))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_on_remote_storage_will_do(source, dataset):
    for path in source.iterdir():
        tf.io.gfile.makedirs("ram://bucket/source")
        tf.io.gfile.copy(str(path), f"ram://bucket/source/{path.name}", overwrite=True)
    _, _, (said,) = started("ram://bucket/source/", tiny(), dataset)
    assert said.startswith("starts with encoder, projection, classifier, u of ram://bucket/source/checkpoint-0000000")


def after(steps):
    asked = iter(range(1, 1000))
    return lambda: next(asked) == steps


@pytest.mark.thorough
def test_a_run_that_is_stopped_goes_on_to_the_same_bits_though_its_source_went_on(source, dataset, tmp_path):
    """It is stopped once before and once after it has a checkpoint of its own."""
    config = tiny("epochs=2")
    alone = train(config, str(dataset), str(tmp_path / "alone"), init_from=str(source))
    assert alone.state_sha256 != train(config, str(dataset), str(tmp_path / "without")).state_sha256

    moving, run = tmp_path / "moving", tmp_path / "run"
    shutil.copytree(source, moving)

    def killed() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, str(dataset), str(run), init_from=str(moving), should_stop=killed)
    assert not list(run.glob("*.npz"))
    newest = checkpoints.open_checkpoint(str(moving))
    changed = {name: value + 1 for name, value in newest.arrays.items()}
    checkpoints.save(str(moving), Checkpoint(99, changed, {}), keep=2)
    with pytest.raises(PreemptedError):
        train(config, str(dataset), str(run), init_from=str(moving), should_stop=after(2))
    moved = tmp_path / "moved"
    moving.rename(moved)
    assert train(config, str(dataset), str(run), init_from=str(moving)).state_sha256 == alone.state_sha256
    begun = read_config(str(run))[1]["init_from"]
    assert begun["checkpoint"] == newest.path
    assert begun["state_sha256"] == checkpoints.sha256_of(newest.arrays)

    for init_from, said in (("", f"started with --init-from {newest.path}"), (str(moved), "started with --init-from")):
        with pytest.raises(UserError, match=re.escape(said)):
            train(config, str(dataset), str(run), init_from=init_from)
    with pytest.raises(UserError, match="started without --init-from"):
        train(config, str(dataset), str(tmp_path / "without"), init_from=str(source))


def test_a_longer_run_in_the_same_folder_is_refused_with_a_way_on(source, dataset, tmp_path, capsys):
    def given(folder, *more):
        arguments = ["--preset", "demo", "--data", dataset, "--checkpoint-dir", folder, *more, "--set", *TINY, "epochs=2"]
        return [str(one) for one in arguments]

    with pytest.raises(SystemExit):
        main(given(source))
    refused = capsys.readouterr().err.splitlines()[-1]
    way = f"use another folder; --init-from {source} starts there from this run's encoder"
    assert refused == f"error: {source} holds a run with epochs=1, not 2: {way}"
    main(given(tmp_path / "longer", "--init-from", source))
    said = capsys.readouterr().err
    assert "[pretrain] starts with encoder, projection, classifier, u of " in said
    assert read_config(str(tmp_path / "longer"))[0].optimizer.epochs == 2
