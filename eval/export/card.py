"""The model card, in Markdown: what an encoder is, its data and recipe, its accuracy, and how to use it.

The card draws on the files beside the checkpoint, and says so if one is missing. Every number in it is measured or published.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from eval.export.pytorch import exact_in_torchvision
from trainer.config import BOOKKEEPING, Config, as_dict
from trainer.encoder import make_encoder
from trainer.folder import RESULT, read_config
from trainer.optimizer import total_steps
from trainer.presets import PRESETS
from trainer.settings import EncoderSettings
from trainer.shared.errors import UserError
from trainer.shared.records import read_manifest

_METHODS = {
    "nt_xent": "SimCLR (Chen et al. 2020, arXiv 2002.05709)",
    "decoupled": "SimCLR with the decoupled loss (Yeh et al. 2022, arXiv 2110.06848)",
    "global_contrastive": "SogCLR (Yuan et al. 2022, arXiv 2202.12387)",
    "isogclr": "iSogCLR (Qiu et al. 2023, arXiv 2305.11965)",
}
_NOT_IN_RECIPE = (*BOOKKEEPING, "checkpoint_every_epochs", "shuffle_window")
"""Settings that are not part of the recipe."""


def model_card(encoder: keras.Model, pretraining: str, step: int, *, data_dir: str = "", evaluation: str = "") -> str:
    """Returns the card of the encoder at `step` of the run in the folder `pretraining`.

    Uses only the shape of `encoder`, not its weights. `data_dir` is the dataset of pretraining, `evaluation` the folder of an
    evaluation of this checkpoint. Raises UserError if either belongs to another encoder.
    """
    config, about = read_config(pretraining.rstrip("/"))
    features, parameters = encoder.output_shape[-1], encoder.count_params()
    loss, shape, size = config.loss, config.encoder, config.views.image_size
    method = _METHODS["isogclr" if loss.variant == "isogclr" and loss.name == "global_contrastive" else loss.name]
    preset = about["preset"] if about["preset"] in PRESETS else ""
    side = f"{size}x{size}"
    of_others = f"imported from a checkpoint of {about['imported']['format']}" if "imported" in about else ""
    origin = of_others or f"pretrained without labels by {method}"
    sections = [
        f"# Image encoder{f' {preset}' if preset else ''}",
        f"Turns a photograph into {features:,} features (numbers) for a linear classifier, nearest-neighbour search or "
        f"clustering. A ResNet-{shape.depth} of {shape.width_multiplier:g} times the usual width, {parameters:,} parameters, "
        f"{origin}. Its input is the central square of a picture at {side} pixels.",
        "## Results",
        _results(step, about, preset, evaluation),
        "## Data",
        _data(about, data_dir),
        "## Recipe",
        _recipe(config, about, preset, step, _state(pretraining, step)),
        "## Intended use",
        "Features for research on representation learning: linear probes, retrieval, clustering, and initial weights for "
        "fine-tuning on photographs like those of pretraining.",
        "Do not use it for decisions about people, for surveillance, or where a wrong answer does harm: its accuracy on "
        "different groups of people was not measured, and the features inherit the biases of the photographs. Do not use it for "
        "other kinds of pictures (medical, satellite, documents) without evaluating it on them. Similar features do not prove "
        "that two pictures show the same thing.",
        "## Licence",
        "The code is under the Apache License 2.0. The weights are also subject to the terms of the photographs of pretraining: "
        "ImageNet's allow research that is not commercial, and no other use.",
        "## Load and serve",
        _USE.format(size=size, features=features, torchvision=_in_torchvision(shape, size)).strip(),
    ]
    return "\n\n".join(sections) + "\n"


def _in_torchvision(shape: EncoderSettings, size: int) -> str:
    name = f"torchvision's and timm's ResNet-{shape.depth}"
    if not exact_in_torchvision(shape, size):
        return f"{name} would compute other features from these weights at {size} pixels: use `encoder.py`."
    given = (
        "normalised as ImageNet's usually are" if shape.input_normalization == "imagenet" else "between 0 and 1, not normalised"
    )
    return f"{name} without its last layer computes the same features at {size} pixels from images {given}."


def evaluated_card(pretraining: str, evaluation: str) -> str:
    """Returns `model_card` of the encoder that the folder `evaluation` evaluates. Reads no weights."""
    config, _ = read_config(pretraining.rstrip("/"))
    return model_card(
        make_encoder(config.encoder, config.views.image_size, config.run.seed),
        pretraining,
        _evaluated(evaluation)["step"],
        evaluation=evaluation,
    )


def _results(step: int, about: Mapping[str, Any], preset: str, evaluation: str) -> str:
    lines = ["Not measured yet."]
    if evaluation:
        found = _evaluated(evaluation)
        for name, own, theirs in (
            ("the encoder at step", step, found["step"]),
            ("an encoder pretrained on dataset", about["dataset_fingerprint"], found["pretraining_dataset_fingerprint"]),
        ):
            if own != theirs:
                raise UserError(f"{evaluation} evaluates {name} {theirs}, not {own}: evaluate this checkpoint")
        lines = [
            f"On all {found['num_images']:,} validation images of dataset `{found['dataset_fingerprint'][:16]}`, "
            f"{len(found['synsets']):,} classes; 95% intervals by bootstrap over images. Results of different protocols are not "
            "comparable.",
            "",
            *_table(("protocol", "encoder", "top-1", "95% interval", "top-5"), map(_row, found["accuracies"])),
        ]
    if preset:
        known = PRESETS[preset]
        lines += ["", f"Published for `{preset}`: {known.published} (source: {known.source})."]
    return "\n".join(lines)


def _evaluated(folder: str) -> dict[str, Any]:
    found = _read_json(f"{folder.rstrip('/')}/{RESULT}")
    if found is None:
        raise UserError(f"{folder} holds no evaluation: {RESULT} is missing; make one with python -m eval.task")
    return found


def _row(row: Mapping[str, Any]) -> Sequence[str]:
    low, high = row["top_1_interval"]
    top_5 = "" if row["top_5"] is None else f"{row['top_5']:.1%}"
    return row["protocol"], row["encoder"], f"{row['top_1']:.1%}", f"{low:.1%} to {high:.1%}", top_5


def _data(about: Mapping[str, Any], data_dir: str) -> str:
    fingerprint = about["dataset_fingerprint"]
    if "imported" in about and not fingerprint:
        return "Not known here: the encoder was imported from the checkpoint of another project. See its documentation."
    text = f"{about['num_images']:,} training images of {about['num_classes']:,} classes. Pretraining did not use the labels."
    if data_dir:
        manifest = read_manifest(data_dir)
        if manifest.fingerprint != fingerprint:
            raise UserError(f"{data_dir} is dataset {manifest.fingerprint}; this encoder was pretrained on {fingerprint}")
        repaired, rejected = (sum(len(getattr(s, what)) for s in manifest.splits.values()) for what in ("repaired", "rejected"))
        counts = " and ".join(f"{split.records:,} {name}" for name, split in manifest.splits.items())
        text += f" The dataset `{manifest.name}` has {counts} images. {repaired:,} images were repaired, {rejected:,} left out."
    return f"{text} Fingerprint: `{fingerprint}`."


def _recipe(config: Config, about: Mapping[str, Any], preset: str, step: int, state: str) -> str:
    if "imported" in about:
        return _source(about["imported"])
    usual = as_dict(PRESETS[preset].config if preset else Config())
    changed = [
        f"{name}={_text(value)}" for name, value in as_dict(config).items() if value != usual[name] and name != "linear_eval"
    ]
    defaults = as_dict(Config())
    unusual = {name: value for name, value in as_dict(config).items() if value != defaults[name] and name not in _NOT_IN_RECIPE}
    steps = total_steps(config.optimizer, about["num_images"])
    lines = [
        f"- Taken at step {step:,} of {steps:,}{'' if step == steps else ', before the end of pretraining'}: "
        f"`epochs={config.optimizer.epochs}`, `global_batch_size={config.optimizer.global_batch_size}`",
        f"- Optimizer {config.optimizer.name}, seed {config.run.seed}, {config.encoder.precision}",
    ]
    if unusual:
        lines.append(f"- Settings that differ from the defaults: {', '.join(f'`{k}={_text(v)}`' for k, v in unusual.items())}")
    if preset:
        command = PRESETS[preset].command + (f" --set {' '.join(changed)}" if changed else "")
        lines.append(f"- Command: `{command}`")
    if about["code_version"]:
        lines.append(f"- Code: `{about['code_version']}`")
    if state:
        lines.append(f"- State: sha256 `{state}`")
    return "\n".join(lines)


def _source(imported: Mapping[str, Any]) -> str:
    left_out = ", ".join(f"{what} ({count})" for what, count in imported["left_out"].items())
    lines = [
        f"- Weights imported from `{imported['path']}`, sha256 `{imported['sha256']}`",
        f"- Format: {imported['format']}; {imported['mapped']} arrays taken; left out: {left_out or 'nothing'}",
        f"- Largest difference to the source's features: {imported['comparison']['difference']:.1e}, "
        f"the largest feature is {imported['comparison']['largest']:.2f}",
    ]
    return "\n".join(lines)


def _state(pretraining: str, step: int) -> str:
    """Returns the digest of the final state of pretraining, or an empty string if pretraining did not end at `step`."""
    ended = _read_json(f"{pretraining.rstrip('/')}/{RESULT}")
    return str(ended["state_sha256"]) if ended and ended["steps"] == step else ""


def _table(head: Sequence[str], rows: Any) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read_json(path: str) -> Any:
    if not tf.io.gfile.exists(path):
        return None
    with tf.io.gfile.GFile(path) as file:
        return json.loads(file.read())


_USE = """
With TensorFlow alone, from the bytes of pictures (JPEG, PNG, still GIF). For images as arrays, [n, {size}, {size}, 3] between 0
and 1, call `encoder.signatures["images"](images=...)`.

```python
import tensorflow as tf

encoder = tf.saved_model.load("saved_model")  # in MLflow's models: "data/saved_model"
picture = tf.io.read_file("photo.jpg")
features = encoder.signatures["serving_default"](image_bytes=picture[None])["features"]  # [1, {features}]
```

In Keras, to continue training, with this project installed:

```python
import keras
import trainer.layers  # its batch normalisation

encoder = keras.saving.load_model("encoder.keras")
```

In PyTorch, with `encoder.py` and `encoder.safetensors` in the same folder; PyTorch is all they need. Images are
[n, 3, {size}, {size}] between 0 and 1; the encoder normalises them itself if it was trained so.

```python
from encoder import load

features = load("encoder.safetensors")(images)  # [n, {features}]
```

{torchvision}

On a server, from MLflow's model registry:

```bash
mlflow models serve --model-uri models:/sogclr-encoder@champion --env-manager local --port 5001
```

```bash
(printf '{{"dataframe_records": [{{"image_bytes": "'; base64 < photo.jpg | tr -d '\\n'; printf '"}}]}}') |
    curl --silent --header 'Content-Type: application/json' --data-binary @- http://127.0.0.1:5001/invocations
```
"""
