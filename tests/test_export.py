"""Exported encoders: what they make of pictures is what the trainer's own makes of them, wherever they are loaded."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from base64 import b64encode
from contextlib import suppress
from importlib.metadata import version as version_of
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from mlflow import MlflowClient
from PIL import Image
from support.datasets import write_dataset
from support.processes import until

from components import tracking
from eval.export.__main__ import main
from eval.export.card import evaluated_card, model_card
from eval.export.encoder import export
from eval.export.pytorch import exact_in_torchvision
from eval.measure.features import extract, load_encoder
from eval.measure.linear_eval import linear_eval
from eval.serving import Encoder
from trainer import checkpoint as checkpoints
from trainer.augmentation import as_floats, central_crop
from trainer.config import as_dict, replace
from trainer.encoder import make_encoder
from trainer.folder import read_config
from trainer.importing.importer import import_checkpoint
from trainer.presets import resolve
from trainer.settings import EncoderSettings
from trainer.shared.errors import UserError
from trainer.shared.records import decode_example, read_manifest
from trainer.state import model_variables
from trainer.train import train

EXPORT = ["README.md", "encoder.keras", "encoder.py", "encoder.safetensors", "saved_model"]
TINY = ["depth=10", "width_multiplier=0.0625", "global_batch_size=24", "epochs=1", "warmup_epochs=0", "base_learning_rate=1"]


@pytest.fixture(scope="module")
def checkpoint(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    train(resolve("demo", TINY), str(dataset), str(folder), preset="demo")
    return folder


@pytest.fixture(scope="module")
def exported(dataset, checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "here"
    assert export(str(checkpoint), str(folder), data_dir=str(dataset)).features == 32
    return folder


@pytest.fixture(scope="module")
def evaluated(dataset, checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    linear_eval(str(dataset), str(checkpoint), str(folder), ["linear_eval.l2_penalties=1e-2"])
    return folder


@pytest.fixture(scope="module")
def own(dataset, checkpoint, tmp_path_factory):
    """What the trainer's own encoder makes of the validation images, in the order of their IDs."""
    config, _ = read_config(str(checkpoint))
    encoder = load_encoder(config, checkpoints.load_latest(str(checkpoint)))
    folder = str(tmp_path_factory.mktemp("features"))
    return encoder, extract(encoder, config, str(dataset), read_manifest(str(dataset)), "validation", folder).whole().values


@pytest.fixture(scope="module")
def pictures(dataset):
    """The validation images, in the order of their IDs."""
    shards = [str(dataset / shard.file) for shard in read_manifest(str(dataset)).splits["validation"].shards]
    found = [decode_example(record.numpy()) for record in tf.data.TFRecordDataset(shards)]
    return [encoded for encoded, _, _ in sorted(found, key=lambda one: one[2])]


def encoded(mode, kind, size=(40, 33)):
    """A picture of smooth colours; of several channels they differ."""
    y, x = np.mgrid[: size[1], : size[0]]
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.stack([(x * (3 + c) + y * (5 - c)) % 256 for c in range(channels)], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels, mode).save(buffer, kind)
    return buffer.getvalue()


def blocks(card, language):
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


def test_from_bytes_to_features_is_what_evaluation_computes(exported, own, pictures):
    _, expected = own
    model = tf.saved_model.load(str(exported / "saved_model"))
    features = model.signatures["serving_default"](image_bytes=tf.constant(pictures))["features"]
    assert features.dtype == tf.float32
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-6)
    images = as_floats(tf.stack([central_crop(picture, 32, 0.875) for picture in pictures]))
    np.testing.assert_allclose(model.signatures["images"](images=images)["features"], expected, rtol=0, atol=1e-6)
    assert model.signatures["serving_default"](image_bytes=tf.constant([], tf.string))["features"].shape == (0, 32)


@pytest.mark.thorough
def test_the_card_s_own_lines_load_it_without_the_project_and_the_keras_file_with_it(exported, own, pictures, tmp_path):
    alone, with_project, _ = blocks((exported / "README.md").read_text(), "python")
    script = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("trainer", "eval"):
            raise ImportError(name)

sys.meta_path.insert(0, Absent())
{alone}
sys.meta_path.pop(0)
{with_project}
import numpy
numpy.savez("answers.npz", alone=features, keras=encoder(numpy.load("images.npy"), training=False))
"""
    copytree(exported, tmp_path, dirs_exist_ok=True)
    (tmp_path / "photo.jpg").write_bytes(pictures[3])
    images = as_floats(np.stack([central_crop(picture, 32, 0.875) for picture in pictures]))
    np.save(tmp_path / "images.npy", images)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "answers.npz") as answers:
        np.testing.assert_allclose(answers["alone"], own[1][3:4], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(answers["keras"], own[0](images, training=False), rtol=1e-5, atol=1e-6)


@pytest.mark.thorough
def test_the_card_s_lines_for_pytorch_need_pytorch_alone(exported, own, pictures, tmp_path):
    pytest.importorskip("torch")
    *_, lines = blocks((exported / "README.md").read_text(), "python")
    for name in ("encoder.py", "encoder.safetensors"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    images = as_floats(np.stack([central_crop(picture, 32, 0.875) for picture in pictures]))
    np.save(tmp_path / "images.npy", np.asarray(images).transpose(0, 3, 1, 2))
    script = f"""
import sys
sys.modules |= dict.fromkeys(("trainer", "eval", "tensorflow", "safetensors", "torchvision"))
import numpy, torch
images = torch.from_numpy(numpy.load("images.npy"))
{lines}
numpy.save("features.npy", features.detach())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "features.npy"), own[1], rtol=0, atol=1e-4)


def test_an_imported_encoder_comes_out_of_an_export_as_it_went_in(tmp_path):
    theirs = Path(__file__).parent / "goldens" / "checkpoints" / "simclr_tf2_r50_sk" / "ckpt-2"
    first = import_checkpoint(str(theirs), str(tmp_path / "in"), image_size=57)
    exported = export(str(tmp_path / "in"), str(tmp_path / "out"))
    assert exported.comparison.difference < 1e-5
    again = import_checkpoint(str(tmp_path / "out" / "encoder.safetensors"))
    assert again.config.encoder == replace(first.config, projection_layers=2, projection_dim=128).encoder
    assert again.config.views.image_size == 57
    for name, array in again.translation.arrays.items():
        np.testing.assert_array_equal(array, first.translation.arrays[name])
    assert (
        "Data" not in (tmp_path / "out" / "README.md").read_text() or "imported" in (tmp_path / "out" / "README.md").read_text()
    )


@pytest.mark.parametrize(
    ("settings", "side", "exact"),
    [
        ({"depth": 50}, 224, False),
        ({"depth": 50}, 225, True),
        ({"depth": 50}, 226, True),
        ({"depth": 101}, 57, True),
        ({"depth": 50, "pool_padding": "torch"}, 224, True),
        ({"depth": 50, "width_multiplier": 2}, 225, False),
        ({"depth": 50, "selective_kernel_ratio": 0.0625}, 225, False),
        ({"depth": 18, "pool_padding": "torch"}, 225, False),
        ({"depth": 200, "pool_padding": "torch"}, 225, False),
    ],
)
def test_an_encoder_is_called_torchvision_s_only_where_that_is_exact(settings, side, exact):
    assert exact_in_torchvision(EncoderSettings(**settings), side) is exact


def test_grey_and_cmyk_and_png_are_pictures_too(exported):
    model = Encoder(str(exported / "saved_model"))

    def features(picture):
        return model.predict({"image_bytes": [picture]})

    colour, grey = encoded("RGB", "png"), encoded("L", "png")
    of_grey = Image.open(io.BytesIO(grey)).convert("RGB")
    buffer = io.BytesIO()
    of_grey.save(buffer, "png")
    np.testing.assert_array_equal(features(grey), features(buffer.getvalue()))
    with_alpha = Image.open(io.BytesIO(colour))
    with_alpha.putalpha(128)
    buffer = io.BytesIO()
    with_alpha.save(buffer, "png")
    np.testing.assert_array_equal(features(buffer.getvalue()), features(colour))
    as_jpeg = features(encoded("L", "jpeg"))
    assert np.linalg.norm(as_jpeg - features(grey)) < 0.1 * np.linalg.norm(as_jpeg)
    assert np.all(np.isfinite(features(encoded("CMYK", "jpeg"))))


def test_what_is_no_picture_is_named_and_many_pictures_go_in_parts(exported, own, pictures):
    model = Encoder(str(exported / "saved_model"))
    many = pictures * 3
    np.testing.assert_allclose(model.predict({"image_bytes": many}), np.tile(own[1], (3, 1)), rtol=1e-4, atol=1e-5)
    assert model.predict({"image_bytes": []}).shape == (0, 32)
    for bad, said in ((b"no picture", "Unknown image file format"), (pictures[0][:200], ""), (b"", "")):
        with pytest.raises(UserError, match=rf"picture 2 of 3 cannot be decoded \({len(bad)} bytes\): .*{said}.*JPEG") as raised:
            model.predict({"image_bytes": [pictures[0], bad, pictures[1]]})
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="picture 1 of 1 is str, not bytes"):
        model.predict({"image_bytes": ["text"]})


@pytest.mark.thorough
def test_selective_kernels_in_bfloat16_come_back_the_same(tmp_path):
    config = resolve("demo", [*TINY, "depth=50", "selective_kernel_ratio=0.0625", "cifar_stem=false", "precision=bfloat16"])
    encoder = make_encoder(config.encoder, config.views.image_size, config.run.seed)
    arrays = {name: variable.numpy() for name, variable in model_variables("encoder", encoder).items()}
    checkpoints.save(str(tmp_path), checkpoints.Checkpoint(1, arrays, {}), keep=1)
    about = {"dataset_fingerprint": "f", "num_images": 48, "num_classes": 6, "preset": "", "code_version": ""}
    (tmp_path / "config.json").write_text(json.dumps({"config": as_dict(config), **about}))
    export(str(tmp_path), str(tmp_path / "out"))
    images = tf.random.stateless_uniform([2, 32, 32, 3], [0, 1])
    loaded = tf.saved_model.load(str(tmp_path / "out" / "saved_model"))
    features = loaded.signatures["images"](images=images)["features"]
    np.testing.assert_array_equal(features, tf.function(encoder)(images))
    in_keras = keras.saving.load_model(tmp_path / "out" / "encoder.keras")
    assert [layer.dtype_policy.name for layer in in_keras.layers] == [layer.dtype_policy.name for layer in encoder.layers]
    np.testing.assert_allclose(in_keras(images), features, atol=0.02)


def test_the_card_says_what_it_is_of_and_what_was_measured(exported, evaluated, dataset, checkpoint, tmp_path):
    card = (exported / "README.md").read_text()
    for said in (
        "# Image encoder demo",
        "32 features (numbers)",
        "ResNet-10 of 0.0625 times the usual width, 19,964 parameters",
        "Not measured yet.",
        "48 train and 17 validation images",
        f"Fingerprint: `{read_manifest(str(dataset)).fingerprint}`",
        "step 3 of 3:",
        "`temperature=0.3`",
        "`sogclr run --preset demo --set depth=10 width_multiplier=0.0625 ",
        json.loads((checkpoint / "result.json").read_text())["state_sha256"],
    ):
        assert said in card
    result = json.loads((evaluated / "result.json").read_text())
    card = evaluated_card(str(checkpoint), str(evaluated))
    assert "Not measured yet." not in card
    assert "17 validation images" in card
    rows = re.findall(r"^\| (\S+) \| (\S+) \| (.*)% \| (.*)% to (.*)% \| (.*)% \|$", card, re.MULTILINE)
    assert [(row[0], row[1]) for row in rows] == [(one["protocol"], one["encoder"]) for one in result["accuracies"]]
    for row, one in zip(rows, result["accuracies"], strict=True):
        expected = [one["top_1"], *one["top_1_interval"], one["top_5"]]
        assert [float(text) / 100 for text in row[2:]] == pytest.approx(expected, abs=5e-4)

    other = tmp_path / "other"
    other.mkdir()
    (other / "result.json").write_text(json.dumps({**result, "step": 2}))
    write_dataset(tmp_path / "data", train=30)
    for wrong, said in (
        ({"evaluation": str(other)}, "evaluates the encoder at step 2, not 3"),
        ({"evaluation": str(tmp_path / "data")}, "holds no evaluation"),
        ({"data_dir": str(tmp_path / "data")}, "is dataset test-30; this encoder was pretrained on test-48"),
    ):
        with pytest.raises(UserError, match=said):
            export(str(checkpoint), str(tmp_path / "out"), **wrong)
        assert not (tmp_path / "out").exists()


def test_published_results_stand_beside(tmp_path):
    config = replace(resolve("sogclr_imagenet_r50_b512"), width_multiplier=0.125)
    about = {"dataset_fingerprint": "f", "num_images": 1281167, "num_classes": 1000, "code_version": "c0de"}
    stored = {"config": as_dict(config), "preset": "sogclr_imagenet_r50_b512", **about}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    card = model_card(make_encoder(config.encoder, config.views.image_size, config.run.seed), str(tmp_path), 500)
    assert "Published for `sogclr_imagenet_r50_b512`: 69.5 linear top-1" in card
    assert "step 500 of 2,001,824, before the end of pretraining" in card
    assert "ImageNet's allow research that is not commercial" in card


def test_the_command_line_replaces_an_earlier_export_and_nothing_else(checkpoint, dataset, evaluated, exported, tmp_path, capsys):
    given = ["--checkpoint", str(checkpoint), "--output"]
    copytree(exported, tmp_path / "out")
    (tmp_path / "out" / "stale").touch()
    main([*given, str(tmp_path / "out"), "--data", str(dataset), "--evaluation", str(evaluated)])
    said = capsys.readouterr().out.splitlines()
    assert said[-2].endswith("out: encoder of step 3, 32 features per image")
    assert said[-1].startswith("in PyTorch, features of 16 seeded images of 32 px differ from the source's")
    assert sorted(file.name for file in tmp_path.rglob("out*/*")) == EXPORT
    (tmp_path / "mine").mkdir()
    for arguments, said in (
        ([*given, str(tmp_path / "mine")], "exists and is not an earlier export"),
        (["--checkpoint", str(tmp_path), "--output", str(tmp_path / "new")], "holds no pretraining run"),
        ([*given, str(tmp_path / "new"), "--data", str(tmp_path)], "holds no finished dataset"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        error = capsys.readouterr().err
        assert (ended.value.code, error.count("\n")) == (2, 1)
        assert error.startswith("error: ")
        assert said in error


@pytest.mark.parametrize("fails_at", range(1, 5))
def test_an_export_to_an_object_store_that_failed_in_the_middle_is_made_again(checkpoint, monkeypatch, fails_at):
    """In ram://, which counts as remote, with Cloud Storage's renaming of folders: file by file."""
    output = f"ram://exports/{fails_at}"
    real, real_rename, copied = tf.io.gfile.copy, tf.io.gfile.rename, []

    def copy(source, target, overwrite=False):
        copied.append(target.removeprefix(output))
        if len(copied) == fails_at:
            raise tf.errors.UnavailableError(None, None, "HTTP response code 503")
        real(source, target, overwrite)

    def rename(source, target, overwrite=False):
        if not tf.io.gfile.isdir(source):
            real_rename(source, target, overwrite)
        for folder, _, files in tf.io.gfile.walk(source):
            for file in files:
                path = f"{folder}/{file}"
                tf.io.gfile.makedirs(os.path.dirname(path.replace(source, target, 1)))
                copy(path, path.replace(source, target, 1))
                tf.io.gfile.remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(tf.io.gfile, "copy", copy)
        patch.setattr(tf.io.gfile, "rename", rename)
        with pytest.raises(tf.errors.UnavailableError):
            export(str(checkpoint), output)
    assert not tf.io.gfile.exists(f"{output}/README.md"), "what decides is not there before all else is"
    for _ in range(2):
        assert export(str(checkpoint), output).features == 32
        assert sorted(name.rstrip("/") for name in tf.io.gfile.listdir(output)) == EXPORT
        model = tf.saved_model.load(f"{output}/saved_model")
        assert model.signatures["images"](images=tf.zeros([1, 32, 32, 3]))["features"].shape == (1, 32)
    tf.io.gfile.makedirs(f"{output}-theirs")
    with tf.io.gfile.GFile(f"{output}-theirs/notes.txt", "w") as file:
        file.write("precious")
    with pytest.raises(UserError, match="exists and is not an earlier export"):
        export(str(checkpoint), f"{output}-theirs")


# ---- On MLflow's server


@pytest.fixture(scope="module")
def registered(exported, checkpoint, dataset, evaluated, tmp_path_factory):
    """The environment of a store in which the encoder is registered and was evaluated, and in which no project is installed."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    artifact = SimpleNamespace(uri=str(checkpoint), metadata={"run_id": "0" * 32})
    data = SimpleNamespace(uri=str(dataset), metadata={"name": "test", "fingerprint": read_manifest(str(dataset)).fingerprint})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        store = tracking.open_store(uri, artifacts=str(folder / "artifacts"))
        run = tracking.StepRun(store, store.client.create_run(store.experiment_id).info.run_id)
        files = [str(checkpoint / name) for name in ("checkpoint-00000003.npz", "config.json", "result.json")]
        run.encoders.log(artifact, data, files, str(exported), params={"preset": "demo"}, metrics={}, step=3)
        run.encoders.rate(artifact, data, evaluated_card(str(checkpoint), str(evaluated)), 0.5)
        run.close()
    (folder / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path[:] = [one for one in sys.meta_path if 'editable' not in str(getattr(one, '__module__', ''))]\n"
    )
    return {**os.environ, "MLFLOW_TRACKING_URI": uri, "PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def server(registered, exported, pictures, tmp_path_factory):
    """Where the card's own command serves the encoder, how to ask with the card's own command, and the folder to ask in."""
    folder = tmp_path_factory.mktemp("elsewhere")
    alone = subprocess.run([sys.executable, "-c", "import trainer"], cwd=folder, env=registered, capture_output=True, text=True)
    assert "No module named 'trainer'" in alone.stderr
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    serve, ask = (block.replace("5001", port) for block in blocks((exported / "README.md").read_text(), "bash"))
    environ = {**registered, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            ["bash", "-c", serve], cwd=folder, env=environ, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        until(lambda: answers(f"http://127.0.0.1:{port}/ping"), process)
        yield f"http://127.0.0.1:{port}/invocations", ask, folder
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(url):
    with suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return answer.status == 200
    return False


def post(url, table):
    """Returns status and answer."""
    request = urllib.request.Request(url, json.dumps(table).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_logged_model_holds_all_that_it_takes(registered):
    client = MlflowClient(registered["MLFLOW_TRACKING_URI"])
    version = client.get_model_version_by_alias(tracking.ENCODER, "champion")
    assert "17 validation images" in version.description
    assert len(version.description) <= 5000
    folder = Path(client.get_logged_model(version.source.removeprefix("models:/")).artifact_location.removeprefix("file://"))
    kept = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert {"MLmodel", "requirements.txt", "conda.yaml", "README.md", "encoder.keras", "code/eval/serving.py"} <= kept
    assert {"checkpoint-00000003.npz", "config.json", "result.json", "code/trainer/shared/records.py"} <= kept
    assert not any(file.endswith(".pyc") for file in kept)
    needed = (folder / "requirements.txt").read_text().split()
    assert all(re.fullmatch(r"[a-z-]+==[\w.]+", one) for one in needed)
    assert {f"mlflow=={version_of('mlflow')}", f"keras=={version_of('keras')}"} < set(needed)
    assert any(one.startswith("tensorflow") for one in needed)


@pytest.mark.thorough
def test_a_server_answers_a_jpeg_with_the_trainer_s_own_features(server, own, pictures):
    url, ask, folder = server
    (folder / "photo.jpg").write_bytes(pictures[3])
    done = subprocess.run(["bash", "-c", ask], cwd=folder, capture_output=True, text=True)
    np.testing.assert_allclose(json.loads(done.stdout)["predictions"], own[1][3:4], rtol=1e-5, atol=1e-6)

    as_text = [b64encode(picture).decode() for picture in pictures]
    for table in (
        {"dataframe_split": {"columns": ["image_bytes"], "data": [[text] for text in as_text]}},
        {"dataframe_records": [{"image_bytes": text} for text in as_text]},
    ):
        status, answer = post(url, table)
        assert status == 200
        np.testing.assert_allclose(answer["predictions"], own[1], rtol=0, atol=1e-6)


@pytest.mark.thorough
def test_what_is_no_picture_is_refused_and_the_server_lives_on(server, own, pictures):
    url, _, _ = server
    good, bad = (b64encode(content).decode() for content in (pictures[0], b"no picture"))
    status, answer = post(url, {"dataframe_records": [{"image_bytes": good}, {"image_bytes": bad}]})
    assert status == 400
    assert "picture 2 of 2 cannot be decoded (10 bytes)" in answer["stack_trace"]
    for wrong in ({"dataframe_records": [{"picture": good}]}, {"dataframe_records": [{"image_bytes": None}]}, {"nothing": 1}):
        assert post(url, wrong)[0] == 400
    status, answer = post(url, {"dataframe_records": [{"image_bytes": good}]})
    assert status == 200
    np.testing.assert_allclose(answer["predictions"], own[1][:1], rtol=1e-5, atol=1e-6)
