"""The settings of the conversion in the pipeline: what they may be, where they go, and the datasets that presets are for."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from support.raw_data import LABELS, OF_VALIDATION, SYNSETS, VALIDATION, picture, raw_as_usual, write_raw

from beam_jobs import subsets
from beam_jobs.build_tfrecords import main as build_tfrecords
from beam_jobs.job import build
from beam_jobs.plan import make_plan, options_of
from beam_jobs.raw import raw_identity
from pipelines import cli
from pipelines.cli.options import make_experiment
from trainer.config import config_from_dict, config_to_json, data_from, pretraining_of, split_overrides
from trainer.presets import PRESETS, resolve, resolve_pretraining
from trainer.shared.data import DATASETS, NAMED_SUBSETS, DataSettings, as_overrides, digest_of, require_dataset
from trainer.shared.errors import UserError
from trainer.shared.records import read_manifest

ALL = DataSettings(
    expect="imagenet",
    subset="gs://bucket/classes.txt",
    images_per_class=100,
    on_bad_image="skip",
    verify="decode",
    max_side=512,
    validation_labels="gs://bucket/labels.txt",
    validation=False,
    allow_other_counts=True,
)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.subst=imagenet_s", "data.subst is not a setting; did you mean data.subset?"),
        ("data.images_per_class=-1", "data.images_per_class=-1 makes no sense: it must be 0 or more"),
        ("data.max_side=large", "data.max_side=large is not a whole number"),
        ("data.verify=decod", "data.verify=decod is not one of headers, decode; did you mean decode?"),
        ("data.on_bad_image=ignore", "data.on_bad_image=ignore is not one of fail, skip"),
        ("data.expect=imagnet", "data.expect=imagnet is not one of any, imagenet, cifar10; did you mean imagenet?"),
        ("data.allow_other_counts=maybe", "data.allow_other_counts=maybe is not true or false"),
    ],
)
def test_a_wrong_setting_of_the_conversion_names_what_would_be_right(override, message):
    with pytest.raises(UserError) as error:
        resolve("demo", [override])
    assert str(error.value) == message


def test_every_setting_survives_its_way_through_the_pipelines_parameters():
    assert all(getattr(ALL, field.name) != field.default for field in dataclasses.fields(ALL))
    assert data_from(as_overrides(ALL)) == ALL
    assert as_overrides(DataSettings()) == []
    assert data_from(["data.images_per_class=100.0"]).images_per_class == 100


def test_the_job_has_an_option_for_every_setting(capsys):
    with pytest.raises(SystemExit):
        build_tfrecords(["--help"])
    told = capsys.readouterr().out
    for field in dataclasses.fields(DataSettings):
        assert f"--{field.name.replace('_', '-')}" in told


def test_default_settings_are_the_jobs_defaults(raw):
    assert make_plan(str(raw), "output", **options_of(DataSettings())) == make_plan(str(raw), "output")


def test_settings_of_the_conversion_are_none_of_pretraining():
    config = resolve("demo", as_overrides(ALL))
    assert pretraining_of(config) == pretraining_of(resolve("demo"))
    assert config_from_dict(json.loads(config_to_json(config))) == resolve("demo")
    items = ["epochs=3", "data.subset=imagenet_s", "data.allow_other_counts=true", "linear_eval.seed=1"]
    assert split_overrides(items) == (["epochs=3", "data.allow_other_counts=true"], ["linear_eval.seed=1"])
    with pytest.raises(UserError, match=r"data\.subset=imagenet_s cannot be set here: the dataset is finished"):
        resolve_pretraining("demo", items)


# ---- What presets are for


def test_every_preset_but_the_demo_has_the_dataset_of_its_name():
    for name, preset in PRESETS.items():
        known = preset.config.data.dataset
        named = max((one for one in DATASETS if f"_{one}_" in name), key=len, default=None)
        assert known == (DATASETS[named] if named else None)
        assert named or name == "demo"
        assert known is None or known.title in preset.data


def test_named_subsets_have_the_recorded_digests():
    assert set(NAMED_SUBSETS) == set(subsets.SUBSETS)
    for name, synsets in subsets.SUBSETS.items():
        assert digest_of(synsets) == DATASETS[name].synsets
    facts = Path(__file__).parents[2] / "shared" / "facts"
    if facts.is_dir():
        assert digest_of((facts / "imagenet_s_synsets.txt").read_text().split()) == DATASETS["imagenet_s"].synsets


@pytest.mark.parametrize(
    ("preset", "says"),
    [
        ("sogclr_imagenet_r50_b512", "has 3 classes where ImageNet has 1,000: give ImageNet, or allow any dataset with "),
        ("sogclr_cifar10_r50_b64", "has 3 classes where CIFAR-10 has 10: give CIFAR-10, or allow any dataset with "),
        ("sogclr_imagenet_s_r50_b256", "has no training images of n01440764, n01443537, n01484850 and 97 more"),
    ],
)
def test_other_raw_data_than_the_presets_are_refused_before_an_image_is_read(raw, tmp_path, preset, says):
    with pytest.raises(UserError) as error:
        build(str(raw), str(tmp_path / "output"), **options_of(PRESETS[preset].config.data))
    assert says in str(error.value)
    assert not (tmp_path / "output").exists()


def test_the_refusal_says_how_the_job_and_the_pipeline_allow_it(raw, tmp_path):
    data = PRESETS["sogclr_imagenet_r50_b512"].config.data
    with pytest.raises(UserError, match=r"--allow-other-counts, or with --set data\.allow_other_counts=true in sogclr$"):
        build(str(raw), str(tmp_path / "output"), **options_of(data))
    allowed = dataclasses.replace(data, allow_other_counts=True, images_per_class=2)
    assert build(str(raw), str(tmp_path / "output"), **options_of(allowed)).splits["train"].records == 6


def test_counts_are_checked_for_the_expected_dataset(tmp_path):
    train = {f"class{number}": {"1.png": picture(number, kind="png")} for number in range(10)}
    raw = write_raw(tmp_path / "raw", train, {"1.png": picture(0, kind="png")}, ["class0"])
    with pytest.raises(UserError, match=r"train has 10 images where CIFAR-10 has 50,000 of these 10 classes: get the missing"):
        build(str(raw), str(tmp_path / "output"), expect="cifar10")


def test_a_finished_dataset_that_is_not_the_presets_stops_before_training(built):
    manifest, of_preset = read_manifest(str(built)), PRESETS["sogclr_imagenet_s_r50_b256"].config.data
    says = r"has 3 classes where ImageNet-S has 100, which this preset is for: give ImageNet-S, or allow any dataset with --set "
    with pytest.raises(UserError, match=says + r"data\.allow_other_counts=true$"):
        require_dataset(of_preset, manifest, str(built))
    require_dataset(dataclasses.replace(of_preset, allow_other_counts=True), manifest, str(built))
    require_dataset(DataSettings(), manifest, str(built))


def split_of(manifest, name, records, rejected=0):
    return dataclasses.replace(manifest.splits[name], records=records, rejected=({"source": "a", "reason": "b"},) * rejected)


@pytest.mark.parametrize(
    ("train", "rejected", "options", "wrong"),
    [
        (129_395, 0, {}, ""),
        (129_390, 5, {"on_bad_image": "skip"}, ""),
        (1_000, 0, {"images_per_class": 10}, ""),
        (129_394, 0, {}, "has 129,394 train images where ImageNet-S has 129,395"),
        (129_396, 0, {"images_per_class": 2_000}, "has 129,396 train images where"),
    ],
)
def test_a_finished_dataset_must_have_the_presets_images(built, train, rejected, options, wrong):
    usual = read_manifest(str(built))
    splits = {"train": split_of(usual, "train", train, rejected), "validation": split_of(usual, "validation", 5_000)}
    manifest = dataclasses.replace(usual, synsets=subsets.IMAGENET_S, splits=splits, options=options)
    data = PRESETS["sogclr_imagenet_s_r50_b256"].config.data
    if not wrong:
        require_dataset(data, manifest, "DATA")
        return
    with pytest.raises(UserError, match=wrong):
        require_dataset(data, manifest, "DATA")


def test_trainer_task_refuses_a_dataset_that_is_not_the_presets(built, tmp_path, capsys):
    from trainer.task import main

    with pytest.raises(SystemExit) as ended:
        main(["--preset", "sogclr_imagenet_s_r50_b256", "--data", str(built), "--checkpoint-dir", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert "has 3 classes where ImageNet-S has 100" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- Labels, and files beside the raw data


def test_validation_labels_can_lie_elsewhere(raw, built, tmp_path):
    elsewhere = tmp_path / "labels.txt"
    elsewhere.write_text("".join(f"{label}\n" for label in LABELS))
    other = raw_as_usual(tmp_path / "raw", labels=[SYNSETS[0]] * 20)
    manifest = build(str(other), str(tmp_path / "output"), validation_labels=str(elsewhere))
    assert manifest.fingerprint == read_manifest(str(built)).fingerprint
    with pytest.raises(UserError, match=r"validation_labels=.*/none\.txt is not a file"):
        build(str(other), str(tmp_path / "another"), validation_labels=str(tmp_path / "none.txt"))


def test_validation_labels_that_nothing_uses_are_refused(tmp_path):
    raw = raw_as_usual(tmp_path / "raw")
    (raw / VALIDATION).unlink()
    for synset in SYNSETS:
        (raw / "val" / synset).mkdir(parents=True)
        (raw / "val" / synset / f"{synset}.JPEG").write_bytes(picture(0))
    with pytest.raises(UserError, match="has no effect: the folders of validation images are their labels"):
        build(str(raw), str(tmp_path / "output"), validation_labels=str(raw / OF_VALIDATION))


def test_the_identity_of_raw_data_changes_with_the_files_beside_them(raw, tmp_path):
    file = tmp_path / "classes.txt"
    file.write_text(f"{SYNSETS[0]}\n")
    alone, one = raw_identity(str(raw)), raw_identity(str(raw), [str(file)])
    file.write_text(f"{SYNSETS[1]}\n")
    assert len({alone, one, raw_identity(str(raw), [str(file)])}) == 3
    with pytest.raises(UserError, match=r"there is no file .*/none"):
        raw_identity(str(raw), [str(tmp_path / "none")])


# ---- The commands


def test_an_experiments_parameters_have_the_presets_settings_and_the_users():
    given = make_experiment("sogclr_imagenet_s_r50_b256", ["data.verify=decode", "epochs=30", "data.allow_other_counts=1"])
    assert given.parameters == {
        "data_settings": ["data.subset=imagenet_s", "data.verify=decode", "data.allow_other_counts=true"],
        "preset": "sogclr_imagenet_s_r50_b256",
        "overrides": ["epochs=30", "data.allow_other_counts=1"],
        "linear_eval_overrides": [],
    }


def test_a_compiled_pipeline_has_the_settings_as_a_default(tmp_path):
    file = tmp_path / "pipeline.yaml"
    command = ["compile", "--preset", "sogclr_imagenet_s_r50_b256", "--output", str(file), "--set", "data.max_side=512"]
    assert cli.main(command) == 0
    spec, *_ = yaml.safe_load_all(file.read_text())
    parameter = spec["root"]["inputDefinitions"]["parameters"]["data_settings"]
    assert parameter["defaultValue"] == ["data.subset=imagenet_s", "data.max_side=512"]


VERTEX = (
    "--accelerator v5e-8 --tag t --project my-project-1 --region europe-west4 --pipeline-root gs://bkt/r --raw gs://bkt/raw "
    "--preset sogclr_imagenet_r50_b512 --mlflow-uri https://mlflow.example"
)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (f"submit {VERTEX} --set data.subset=classes.txt", "data.subset=classes.txt is not in Cloud Storage nor a subset"),
        (f"submit {VERTEX} --set data.validation_labels=/l.txt", "data.validation_labels=/l.txt is not in Cloud Storage"),
        (f"submit {VERTEX} --dataflow-arg=--subset=imagenet_s", "--subset=imagenet_s is not Beam's: say --set data.subset=VALUE"),
        (f"submit {VERTEX} --dataflow-arg=--max-side=512", "--max-side=512 is not Beam's: say --set data.max_side=VALUE"),
        ("rerun pretrain --run 1 --set data.subset=imagenet_s", "data.subset=imagenet_s is not a setting of pretrain"),
        ("rerun linear-eval --run 1 --set data.verify=decode", "data.verify=decode is not a setting of linear-eval"),
        ("rerun build-tfrecords --run 1 --set epochs=3", "epochs=3 is not a setting of build-tfrecords"),
        ("run --preset demo --set data.validation=false", "data.validation=false leaves the linear eval of the pipeline without"),
        (f"submit {VERTEX} --set data.validation=false", "data.validation=false leaves the linear eval of the pipeline without"),
        ("run --preset demo --set data.subst=x", "data.subst is not a setting; did you mean data.subset?"),
    ],
)
def test_a_contradiction_is_one_line(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_presets_show_their_data(capsys):
    assert cli.main(["presets", "--json"]) == 0
    shown = {one["name"]: one["data"] for one in json.loads(capsys.readouterr().out)}
    counts = "100 classes, 129,395 train and 5,000 validation images"
    assert shown["sogclr_imagenet_s_r50_b256"] == f"ImageNet-S, {counts}: data.subset=imagenet_s"
    assert shown["demo"] == "any"
