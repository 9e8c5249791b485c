"""Presets and overrides: what they resolve to, and what each mistake is told."""

import json

import pytest

from trainer.config import Config, config_from_dict, config_to_json, split_overrides, values_of
from trainer.presets import PRESETS, resolve
from trainer.settings import settings
from trainer.shared.errors import UserError


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_resolves_and_says_its_command_result_source_and_cost(name):
    assert isinstance(resolve(name), Config)
    preset = PRESETS[name]
    assert all((preset.summary, preset.command, preset.published, preset.source, preset.cost))
    assert name in preset.command


def test_imagenet_preset_is_the_official_recipe():
    expected = {
        **{"depth": 50, "image_size": 224, "global_batch_size": 512, "epochs": 800, "weight_decay": 1e-6},
        **{"temperature": 0.1, "gamma": 0.9, "loss": "global_contrastive", "optimizer": "lars", "warmup_epochs": 10},
        **{"base_learning_rate": 0.075, "learning_rate_scaling": "sqrt", "projection_layers": 2, "projection_dim": 128},
    }
    values = values_of(resolve("sogclr_imagenet_r50_b512"))
    assert {key: values[key] for key in expected} == expected


@pytest.mark.parametrize("text", ["512", "512.0", " 512 ", "5.12e2"])
def test_numbers_are_taken_in_every_form_a_pipeline_gives_them(text):
    config = resolve("demo", [f"global_batch_size={text}"])
    assert config.optimizer.global_batch_size == 512
    assert isinstance(config.optimizer.global_batch_size, int)


def test_overrides_reach_every_type_of_setting():
    values = values_of(
        resolve("demo", ["blur=True", "loss=nt_xent", "gamma=.9", "depth=34", "linear_eval.l2_penalties=1e-2,1e-3"])
    )
    assert (values["blur"], values["loss"], values["gamma"], values["depth"]) == (True, "nt_xent", 0.9, 34)
    assert values["linear_eval.l2_penalties"] == (0.01, 0.001)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epocs=3", "epocs is not a setting; did you mean epochs?"),
        ("linear_eval.l2=3", "linear_eval.l2 is not a setting; did you mean linear_eval.l2_penalties?"),
        ("epochs=3.5", "epochs=3.5 is not a whole number"),
        ("epochs=many", "epochs=many is not a whole number"),
        ("gamma=nan", "gamma=nan is not a number"),
        ("blur=maybe", "blur=maybe is not true or false"),
        ("loss=ntxent", "loss=ntxent is not one of global_contrastive, nt_xent, decoupled; did you mean nt_xent?"),
        ("gamma=1.5", "gamma=1.5 makes no sense: it must be in (0, 1]"),
        ("warmup_epochs=17", "warmup_epochs=17.0 makes no sense: it must be between 0 and epochs=16"),
        ("global_batch_size=1", "global_batch_size=1 makes no sense"),
        ("ghost_batch_size=1", "ghost_batch_size=1 makes no sense: it must be at least 2, or 0 for the global batch"),
        ("ghost_batch_size=48", "ghost_batch_size=48 does not divide the 128 images of a replica: take 32, or 0 for the global"),
        ("contrast_batch_size=1", "contrast_batch_size=1 makes no sense: it must be at least 2, or 0 for the global batch"),
        ("contrast_batch_size=256", "contrast_batch_size=256 does not divide the 128 images of a replica: take 128, or 0 for"),
        ("linear_eval.holdout_fraction=1", "linear_eval.holdout_fraction=1.0 makes no sense"),
        ("linear_eval.protocols=cached,onlin", "linear_eval.protocols=onlin is not one of cached, "),
        ("epochs", "'epochs' is not an override: write key=value, as in epochs=100"),
    ],
)
def test_a_wrong_override_names_the_field_and_what_would_be_right(override, message):
    with pytest.raises(UserError) as error:
        resolve("demo", [override])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


UNUSED = [
    (f"{need.key}={value}", key, one)
    for key, one in settings().items()
    for need in one.needs
    for value in settings()[need.key].choices
    if value not in need.values
]


@pytest.mark.parametrize(("chosen", "key", "setting"), UNUSED, ids=[f"{chosen} {key}" for chosen, key, _ in UNUSED])
def test_a_setting_that_nothing_uses_is_refused_and_its_user_named(chosen, key, setting):
    default = setting.default
    other = next(one for one in setting.choices if one != default) if setting.choices else default * 0.9
    config = resolve("demo", [chosen, f"{key}={default}"])
    assert values_of(config)[key] == default
    with pytest.raises(UserError) as error:
        resolve("demo", [chosen, f"{key}={other}"])
    assert str(error.value).startswith(f"{key}={other} has no effect with {chosen}: only ")
    assert any(
        f"only {need.key}={need.values[0]} uses it; leave {key} at {default}" in str(error.value) for need in setting.needs
    )
    assert "\n" not in str(error.value)


def test_a_stored_config_with_a_setting_that_nothing_uses_is_read():
    """An earlier version wrote it, and the run it is of did not use it either."""
    stored = json.loads(config_to_json(resolve("demo", ["loss=nt_xent"]))) | {"gamma": 0.5}
    assert config_from_dict(stored).loss.gamma == 0.5


def test_a_combination_that_diverges_is_refused():
    with pytest.raises(UserError, match=r"gamma=0\.5 diverges with variant=tf_official"):
        resolve("demo", ["variant=tf_official", "gamma=0.5"])


def test_a_wrong_preset_names_the_nearest():
    with pytest.raises(UserError, match=r"there is no preset sogclr_imagenet_r50_b521; did you mean sogclr_imagenet_r50_b512\?"):
        resolve("sogclr_imagenet_r50_b521")


def test_a_config_comes_back_from_json_as_it_was():
    config = resolve("demo", ["gamma=.7", "linear_eval.l2_penalties=1e-2"])
    assert config_from_dict(json.loads(config_to_json(config))) == config


def test_a_config_of_another_version_is_refused():
    stored = json.loads(config_to_json(Config()))
    stored["gone"] = stored.pop("gamma")
    with pytest.raises(UserError, match=r"do not match: gone$"):
        config_from_dict(stored)


@pytest.mark.parametrize(("key", "value"), [("epochs", "many"), ("gamma", None), ("blur", 3), ("depth", 19)])
def test_a_stored_config_that_somebody_spoilt_is_refused_in_one_line(key, value):
    stored = json.loads(config_to_json(Config())) | {key: value}
    with pytest.raises(UserError, match=f"^{key}={value} is not [^\n]+$"):
        config_from_dict(stored)


def test_a_config_from_before_a_setting_is_read():
    stored = json.loads(config_to_json(Config()))
    del stored["linear_eval"]["knn_k"], stored["pool_padding"]
    assert config_from_dict(stored) == Config()


def test_overrides_divide_into_pretrainings_and_linear_evals():
    items = ["epochs=3", "linear_eval.seed=1", "gamma=.8"]
    assert split_overrides(items) == (["epochs=3", "gamma=.8"], ["linear_eval.seed=1"])
