"""Encoders of other code: their features are those that the code itself computed, and what cannot be taken is named."""

import json
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from trainer import checkpoint as checkpoints
from trainer.encoder import make_encoder
from trainer.folder import read_config
from trainer.heads import make_projection
from trainer.importing import __main__ as command
from trainer.importing import importer
from trainer.importing.importer import import_checkpoint
from trainer.importing.source import open_source
from trainer.presets import resolve
from trainer.shared.errors import UserError
from trainer.state import model_variables
from trainer.train import train

THEIRS = Path(__file__).parent / "goldens" / "checkpoints"
FILES = {
    "simclr_tf2_r18": "ckpt-2",
    "simclr_tf2_r18_cifar": "ckpt-2",
    "simclr_tf2_r50": "ckpt-2.index",
    "simclr_tf2_r50_sk": "ckpt-2",
    "sogclr_tf2_r50": "",
    "simclr_tf1_r50": "model.ckpt-2",
    "simclr_tf1_r50_sk": "model.ckpt-2.data-00000-of-00001",
    "sogclr_pt_r18": "checkpoint_0000.pth.tar",
    "sogclr_pt_r50": "checkpoint_0000.pth.tar",
    "simclr_tf2_r18/saved_model": "",
}
"""What of each folder of checkpoints is named; "" for the folder itself."""


@pytest.mark.parametrize("name", FILES)
def test_features_projections_and_logits_are_those_of_the_official_code(name, tmp_path):
    folder = THEIRS / name
    golden = np.load(THEIRS / name.split("/")[0] / "features.npz")
    images = np.load(THEIRS / "images.npz")
    tolerance = 1e-4 if "_pt_" in name else 1e-5
    found = import_checkpoint(str(folder / FILES[name]), str(tmp_path / "out"), image_size=57)
    config, about = read_config(str(tmp_path / "out"))
    assert about["imported"]["sha256"] == found.sha256
    stored = checkpoints.open_checkpoint(str(tmp_path / "out"))
    shape = config.encoder
    projection = make_projection(
        shape.feature_dim, shape.projection_layers, shape.projection_dim, hidden_dim=shape.projection_hidden_dim
    )
    has_head = any(one.startswith("projections.") for one in golden.files)
    assert any(one.startswith("projection/") for one in stored.arrays) == has_head
    for which in sorted({one.rpartition(".")[2] for one in golden.files}):
        pixels = images[which].astype(np.float32) / 255
        encoder = make_encoder(shape, pixels.shape[1])
        checkpoints.restore(model_variables("encoder", encoder), stored)
        features = np.asarray(encoder(pixels))
        np.testing.assert_allclose(features, golden[f"features.{which}"], atol=tolerance)
        if has_head:
            checkpoints.restore(model_variables("projection", projection), stored)
            np.testing.assert_allclose(projection(features), golden[f"projections.{which}"], atol=tolerance)
        if f"logits.{which}" in golden.files:
            logits = features @ stored.arrays["classifier/dense/kernel"] + stored.arrays["classifier/dense/bias"]
            np.testing.assert_allclose(logits, golden[f"logits.{which}"], atol=10 * tolerance)


# ---- Other formats of PyTorch: the arrays of a checkpoint of SogCLR's, renamed as those projects name them


@pytest.fixture(scope="module")
def theirs():
    """The encoder's arrays of a ResNet-50 by torchvision's names, and those of its projection head by number."""
    found = _state_of("sogclr_pt_r50")
    prefix = "state_dict.module.base_encoder."
    named = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    encoder = {name: value for name, value in named.items() if not name.startswith("fc.")}
    head = {name.removeprefix("fc."): value for name, value in named.items() if name.startswith("fc.")}
    return encoder, head


def _state_of(folder):
    with open_source(str(THEIRS / folder / FILES[folder])) as source:
        return {name: array.value() for name, array in source.arrays.items()}


def _saved(path, content, **more):
    torch = pytest.importorskip("torch")

    def tensors(one):
        if isinstance(one, dict):
            return {name: tensors(inner) for name, inner in one.items()}
        return torch.from_numpy(np.array(one)) if isinstance(one, np.ndarray | np.generic) else one

    torch.save(tensors(content), path, **more)
    return str(path)


def _prefixed(prefix, arrays):
    return {f"{prefix}{name}": value for name, value in arrays.items()}


def _numbered(arrays):
    numbers = {"conv1": "0", "bn1": "1", **{f"layer{group}": str(group + 3) for group in range(1, 5)}}
    return {f"{numbers[first]}.{rest}": value for (first, _, rest), value in ((n.partition("."), v) for n, v in arrays.items())}


MLP = {"0.weight": np.ones((32, 64), np.float32), "0.bias": np.ones(32, np.float32), "2.weight": np.ones((16, 32), np.float32)}
FC = {"weight": np.ones((10, 64), np.float32), "bias": np.ones(10, np.float32)}
OTHERS = {
    "torchvision or timm": lambda encoder, head: {**encoder, **_prefixed("fc.", FC)},
    "MoCo v3": lambda encoder, head: {
        "epoch": 3,
        "state_dict": {
            **_prefixed("module.base_encoder.", {**encoder, **_prefixed("fc.", head)}),
            **_prefixed("module.momentum_encoder.", encoder),
            **_prefixed("module.predictor.", MLP),
        },
    },
    "lightly": lambda encoder, head: {
        "state_dict": {**_prefixed("backbone.", _numbered(encoder)), **_prefixed("projection_head.layers.", head)},
        "optimizer_states": [],
        "loops": {},
    },
    "solo-learn": lambda encoder, head: {
        "state_dict": {
            **_prefixed("backbone.", encoder),
            **_prefixed("projector.", MLP),
            **_prefixed("classifier.", FC),
        }
    },
    "VISSL": lambda encoder, head: {
        "classy_state_dict": {
            "base_model": {
                "model": {"trunk": _prefixed("_feature_blocks.", encoder), "heads": _prefixed("0.clf.", MLP)},
                "meta": {"num_steps": 7},
            }
        }
    },
}


@pytest.mark.parametrize(("name", "before_1_6"), [*((name, False) for name in OTHERS), ("VISSL", True)])
def test_other_projects_checkpoints_are_recognised_and_give_the_same_features(name, before_1_6, theirs, tmp_path):
    path = _saved(tmp_path / "a.pth", OTHERS[name](*theirs), _use_new_zipfile_serialization=not before_1_6)
    found = import_checkpoint(path, str(tmp_path / "out"), image_size=32)
    assert found.translation.format == name
    assert found.comparison.by == "PyTorch"
    config, _ = read_config(str(tmp_path / "out"))
    assert (config.encoder.pool_padding, config.encoder.input_normalization) == ("torch", "imagenet")
    has_head = any(one.startswith("projection/") for one in found.translation.arrays)
    assert has_head == (name in ("MoCo v3", "lightly"))
    if name in ("solo-learn", "VISSL"):
        assert found.translation.left_out["projection head, which has layers without batch normalisation"] == len(MLP)


def test_safetensors_without_pytorch_are_compared_with_plain_operations(theirs, tmp_path, monkeypatch):
    from safetensors.numpy import save_file

    monkeypatch.setattr(importer, "torch_is_there", lambda: False)
    save_file({name: np.ascontiguousarray(value) for name, value in theirs[0].items()}, tmp_path / "model.safetensors")
    found = import_checkpoint(str(tmp_path / "model.safetensors"), image_size=57)
    assert found.translation.format == "torchvision or timm"
    assert found.comparison.by == "plain TensorFlow"
    assert found.checkpoint == ""


# ---- u


def test_u_comes_along_with_the_dataset_that_it_belongs_to_and_not_without(tmp_path):
    path = str(THEIRS / "sogclr_pt_r18" / "checkpoint_0000.pth.tar")
    u = _state_of("sogclr_pt_r18")["u"]
    import_checkpoint(path, str(tmp_path / "with"), image_size=32, dataset_fingerprint="f" * 64)
    stored = checkpoints.open_checkpoint(str(tmp_path / "with"))
    assert u.shape == (21, 1)
    np.testing.assert_array_equal(stored.arrays["u"], u[:20, 0])
    _, about = read_config(str(tmp_path / "with"))
    assert (about["dataset_fingerprint"], about["num_images"]) == ("f" * 64, 20)
    without = import_checkpoint(path, str(tmp_path / "without"), image_size=32)
    assert "u" not in checkpoints.open_checkpoint(str(tmp_path / "without")).arrays
    assert without.translation.left_out["u, because the dataset that it belongs to was not named"] == 1


def test_pretraining_starts_from_an_imported_encoder_and_its_head(dataset, tmp_path):
    import_checkpoint(str(THEIRS / "simclr_tf2_r18" / "ckpt-2"), str(tmp_path / "theirs"), image_size=32)
    settings = ["depth=18", "width_multiplier=0.03125", "cifar_stem=false", "projection_layers=3", "projection_dim=16"]
    config = resolve("demo", [*settings, "image_size=32", "epochs=1", "warmup_epochs=0", "global_batch_size=24"])
    said = []
    train(config, str(dataset), str(tmp_path / "ours"), init_from=str(tmp_path / "theirs"), say=said.append)
    assert said[0].startswith(f"starts with encoder, projection of {tmp_path / 'theirs'}/checkpoint-00000002.npz")


# ---- What is refused, in one line


class Evil:
    def __reduce__(self):
        return (print, ("it ran",))


def bad(tmp_path, kind):
    """Returns the path of a bad input."""
    whole = THEIRS / "simclr_tf2_r18"
    torchs = THEIRS / "sogclr_pt_r18" / "checkpoint_0000.pth.tar"
    copy = tmp_path / "ckpt-2"
    match kind:
        case "folder":
            (tmp_path / "notes.txt").write_text("nothing")
            return str(tmp_path)
        case "two in a folder":
            for number in (1, 2):
                shutil.copy(whole / "ckpt-2.index", tmp_path / f"ckpt-{number}.index")
            return str(tmp_path)
        case "data missing":
            shutil.copy(whole / "ckpt-2.index", f"{copy}.index")
            return str(copy)
        case "data truncated":
            shutil.copy(whole / "ckpt-2.index", f"{copy}.index")
            Path(f"{copy}.data-00000-of-00001").write_bytes((whole / "ckpt-2.data-00000-of-00001").read_bytes()[:9999])
            return str(copy)
        case "truncated":
            (tmp_path / "a.pth").write_bytes(torchs.read_bytes()[:-5000])
            return str(tmp_path / "a.pth")
        case "runs code":
            with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
                archive.writestr("a/data.pkl", pickle.dumps({"state_dict": Evil()}))
            return str(tmp_path / "a.pth")
        case "picture":
            (tmp_path / "a.pth").write_bytes(b"\xff\xd8\xff\xe0 a picture")
            return str(tmp_path / "a.pth")
        case "absent":
            return str(tmp_path / "absent")
    from safetensors.numpy import save_file

    arrays = {name: value.value() for name, value in _opened(torchs).items()}
    prefix = "state_dict.module.base_encoder."
    encoder = {n.removeprefix(prefix): v for n, v in arrays.items() if n.startswith(prefix) and ".fc." not in n}
    match kind:
        case "ViT":
            encoder = {
                "cls_token": np.zeros((1, 1, 8), np.float32),
                "patch_embed.proj.weight": np.zeros((8, 3, 4, 4), np.float32),
            }
        case "MoCo v2":
            encoder = _prefixed("module.encoder_q.", encoder)
        case "a layer missing":
            del encoder["layer3.1.conv2.weight"]
        case "a layer too many":
            encoder["layer5.0.conv1.weight"] = np.zeros((3, 3, 3, 3), np.float32)
        case "another shape":
            encoder["layer4.1.conv2.weight"] = np.zeros((16, 16, 5, 5), np.float32)
        case "zero":
            encoder = {name: np.zeros_like(value) for name, value in encoder.items()}
    save_file({name: np.ascontiguousarray(value) for name, value in encoder.items()}, tmp_path / "a.safetensors")
    return str(tmp_path / "a.safetensors")


def _opened(path):
    with open_source(str(path)) as source:
        return dict(source.arrays)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("folder", "is a folder with notes.txt: name a TensorFlow checkpoint"),
        ("two in a folder", "holds 2 checkpoints, ckpt-1, ckpt-2: name one, as in .*ckpt-2"),
        ("data missing", "ckpt-2 is (no whole checkpoint of TensorFlow|damaged)"),
        ("data truncated", "ckpt-2 is (no whole checkpoint of TensorFlow|damaged)"),
        ("truncated", "a.pth is cut off or is no file of PyTorch"),
        ("runs code", "a.pth asks its reader to run builtins.print, which is not done: save the weights alone"),
        ("picture", "a.pth is cut off or is no file of PyTorch"),
        ("absent", "absent does not exist: name a TensorFlow checkpoint"),
        (
            "ViT",
            "is a vision transformer, which is not taken: its arrays are cls_token, patch_embed.proj.weight; known are ResNets",
        ),
        ("MoCo v2", "is MoCo v1 or v2, which is not taken: .* and [0-9]+ more; known are"),
        ("a layer missing", "looks like a ResNet-18 of 0.03125 times .* torchvision or timm, but it lacks layer3.1.conv2.weight"),
        ("a layer too many", "but no layer takes layer5.0.conv1.weight: it is of another network"),
        ("another shape", r"layer4.1.conv2.weight has the shape \[5, 5, 16, 16\], not \[3, 3, 16, 16\]"),
        ("zero", "the features of .* are all zero: its weights are not those of a trained encoder"),
    ],
)
def test_what_cannot_be_taken_is_named_in_one_line(kind, said, tmp_path, capsys):
    output = tmp_path / "out"
    with pytest.raises(UserError, match=said) as refused:
        import_checkpoint(bad(tmp_path, kind), str(output), image_size=32)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600
    assert not output.exists()
    assert "it ran" not in capsys.readouterr().out


def test_a_folder_that_holds_something_is_not_written_to(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="is not empty: name a new folder"):
        import_checkpoint(str(THEIRS / "simclr_tf2_r18" / "ckpt-2"), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_preset_of_another_encoder_is_refused(tmp_path):
    path = str(THEIRS / "simclr_tf2_r18" / "ckpt-2")
    with pytest.raises(UserError, match="has depth=18, and preset simclr_v1_imagenet_r50_b4096 50: name another preset, or none"):
        import_checkpoint(path, str(tmp_path / "out"), image_size=32, preset="simclr_v1_imagenet_r50_b4096")
    with pytest.raises(UserError, match="simclr_v1 is not a preset"):
        import_checkpoint(path, str(tmp_path / "out"), image_size=32, preset="simclr_v1")
    assert not (tmp_path / "out").exists()


# ---- The command


def test_the_command_says_what_it_found_and_writes_nothing_when_dry(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = str(THEIRS / "simclr_tf1_r50" / "model.ckpt-2")
    command.main([path, "--dry-run", "--image-size", "32", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["depth"] == 50
    assert (found["format"], found["checkpoint"]) == ("SimCLR, TensorFlow 1", "")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit) as ended:
        command.main([path])
    assert ended.value.code == 2
    assert "name the new folder by --output DIR, or ask for --dry-run" in capsys.readouterr().err
