"""The model card: what an encoder is, what it was made of, how good it is, and how to use it, in Markdown.

It says what is on disk beside the checkpoint, and of what is not there, that it is not. No number in it was not measured or
published.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from trainer.config import Config, as_dict
from trainer.encoder import make_encoder
from trainer.optimizer import total_steps
from trainer.presets import PRESETS
from trainer.shared.errors import UserError
from trainer.shared.records import read_manifest
from trainer.train import RESULT, read_config

_METHODS = {
    "nt_xent": "SimCLR (Chen et al. 2020, arXiv 2002.05709)",
    "decoupled": "SimCLR with the decoupled loss (Yeh et al. 2022, arXiv 2110.06848)",
    "global_contrastive": "SogCLR (Yuan et al. 2022, arXiv 2202.12387)",
    "isogclr": "iSogCLR (Qiu et al. 2023, arXiv 2305.11965)",
}
_PLACES = ("linear_eval", "log_every_steps", "keep_checkpoints", "checkpoint_every_epochs", "cache", "shuffle_window")
"""Settings that say nothing of the recipe."""


def model_card(encoder: keras.Model, pretraining: str, step: int, *, data_dir: str = "", evaluation: str = "") -> str:
    """Returns the card of the encoder that the run in the folder `pretraining` had at `step`.

    Of `encoder` only the shape counts. `data_dir` is the dataset that it was pretrained on, `evaluation` the folder of an
    evaluation of this checkpoint. Raises UserError where either is of something else.
    """
    config, about = read_config(pretraining.rstrip("/"))
    features, parameters = encoder.output_shape[-1], encoder.count_params()
    loss, shape, size = config.loss, config.encoder, config.views.image_size
    method = _METHODS["isogclr" if loss.variant == "isogclr" and loss.name == "global_contrastive" else loss.name]
    preset = about["preset"] if about["preset"] in PRESETS else ""
    side = f"{size}x{size}"
    sections = [
        f"# Image encoder{f' {preset}' if preset else ''}",
        f"Makes {features:,} features (numbers) of a photograph, on which a linear classifier, a nearest-neighbour search or a "
        f"clustering can work. A ResNet-{shape.depth} of {shape.width_multiplier:g} times the usual width, {parameters:,} "
        f"parameters, which sees the middle of a picture at {side} pixels; pretrained without labels by {method}.",
        "## Results",
        _results(step, about, preset, evaluation),
        "## Data",
        _data(about, data_dir),
        "## Recipe",
        _recipe(config, about, preset, step, _state(pretraining, step)),
        "## Intended use",
        "Features for research on representation learning: linear probes, retrieval, clustering, a start for fine-tuning on "
        "photographs like those it was pretrained on.",
        "Not for decisions about people, for surveillance, or wherever a wrong answer does harm: how well the features do for "
        "different groups of people was not measured, and what biases the photographs have, the features have. Not for other "
        "kinds of pictures (medical, satellite, documents) without an evaluation of one's own. That features are alike is no "
        "proof that two pictures show the same thing.",
        "## Licence",
        "The code is under the Apache License 2.0. The weights come under the terms of the photographs they were made of, too: "
        "ImageNet's allow research that is not commercial, and no other use.",
        "## Load and serve",
        _USE.format(size=size, features=features).strip(),
    ]
    return "\n\n".join(sections) + "\n"


def evaluated_card(pretraining: str, evaluation: str) -> str:
    """Returns `model_card` of what was evaluated in the folder `evaluation`, without a look at any weight."""
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
            f"{len(found['synsets']):,} classes; 95% intervals by bootstrap over images. Protocols are not comparable with each "
            "other.",
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
        raise UserError(f"{folder} holds no evaluation: {RESULT} is missing; write one with python -m eval.task")
    return found


def _row(row: Mapping[str, Any]) -> Sequence[str]:
    low, high = row["top_1_interval"]
    top_5 = "" if row["top_5"] is None else f"{row['top_5']:.1%}"
    return row["protocol"], row["encoder"], f"{row['top_1']:.1%}", f"{low:.1%} to {high:.1%}", top_5


def _data(about: Mapping[str, Any], data_dir: str) -> str:
    fingerprint = about["dataset_fingerprint"]
    text = f"{about['num_images']:,} training images, whose {about['num_classes']:,} classes pretraining did not use."
    if data_dir:
        manifest = read_manifest(data_dir)
        if manifest.fingerprint != fingerprint:
            raise UserError(f"{data_dir} is dataset {manifest.fingerprint}; this encoder was pretrained on {fingerprint}")
        repaired, rejected = (sum(len(getattr(s, what)) for s in manifest.splits.values()) for what in ("repaired", "rejected"))
        counts = " and ".join(f"{split.records:,} {name}" for name, split in manifest.splits.items())
        text += f" The dataset `{manifest.name}` has {counts} images; {repaired:,} were repaired, {rejected:,} left out."
    return f"{text} Fingerprint: `{fingerprint}`."


def _recipe(config: Config, about: Mapping[str, Any], preset: str, step: int, state: str) -> str:
    plain = as_dict(PRESETS[preset].config if preset else Config())
    changed = [
        f"{name}={_text(value)}" for name, value in as_dict(config).items() if value != plain[name] and name != "linear_eval"
    ]
    unusual = {name: value for name, value in as_dict(config).items() if value != as_dict(Config())[name] and name not in _PLACES}
    steps = total_steps(config.optimizer, about["num_images"])
    lines = [
        f"- Taken at step {step:,} of {steps:,}{'' if step == steps else ', before the end of pretraining'}: "
        f"`epochs={config.optimizer.epochs}`, `global_batch_size={config.optimizer.global_batch_size}`",
        f"- Optimizer {config.optimizer.name}, seed {config.run.seed}, {config.encoder.precision}",
    ]
    if unusual:
        lines.append(f"- Settings that are not the defaults: {', '.join(f'`{k}={_text(v)}`' for k, v in unusual.items())}")
    if preset:
        command = PRESETS[preset].command + (f" --set {' '.join(changed)}" if changed else "")
        lines.append(f"- Command: `{command}`")
    if about["code_version"]:
        lines.append(f"- Code: `{about['code_version']}`")
    if state:
        lines.append(f"- State: sha256 `{state}`")
    return "\n".join(lines)


def _state(pretraining: str, step: int) -> str:
    """Returns the digest of the state that pretraining ended with, if it did at `step`."""
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
With TensorFlow alone, from pictures as they are (JPEG, PNG, still GIF) or from images, [n, {size}, {size}, 3] between 0 and
1, with `encoder.signatures["images"](images=...)`:

```python
import tensorflow as tf

encoder = tf.saved_model.load("saved_model")  # in MLflow's models: "data/saved_model"
picture = tf.io.read_file("photo.jpg")
features = encoder.signatures["serving_default"](image_bytes=picture[None])["features"]  # [1, {features}]
```

In Keras, to go on training, with the project installed:

```python
import keras
import trainer.layers  # its batch normalisation

encoder = keras.saving.load_model("encoder.keras")
```

On a server, from MLflow's registry:

```bash
mlflow models serve --model-uri models:/sogclr-encoder@champion --env-manager local --port 5001
```

```bash
(printf '{{"dataframe_records": [{{"image_bytes": "'; base64 < photo.jpg | tr -d '\\n'; printf '"}}]}}') |
    curl --silent --header 'Content-Type: application/json' --data-binary @- http://127.0.0.1:5001/invocations
```
"""
