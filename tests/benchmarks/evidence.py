"""The evidence: does the objective that SogCLR reaches depend on the batch size less than SimCLR's? On a part of CIFAR-10.

    python tests/benchmarks/evidence.py run  --raw DIR --work DIR   do the runs that docs/evidence.jsonl lacks
    python tests/benchmarks/evidence.py list                        list the runs, done or due
    python tests/benchmarks/evidence.py page                        write docs/results.md's tables and its figure

`run` trains each encoder on one core, so its bits do not depend on what else the machine does. It measures the global objective
of the final checkpoint, its accuracies, and appends a line. Interrupted, it goes on: finished runs are not repeated, and the
ones that were under way go on from their newest checkpoints. `evidence_runs.py` says which runs there are.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # started by its path
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.evidence_runs import IMAGES_PER_CLASS, PRESET, TEMPERATURES, Line, Run, due, planned

if TYPE_CHECKING:
    import numpy as np

    from eval.measure.objective import GlobalObjective

RESULTS = Path(__file__).parents[2] / "docs" / "evidence.jsonl"
_ORDERS = 20
"""Random orders of the images over which the loss of a batch is averaged."""
_LARGE_BATCH, _LARGE_BATCHES = 500, 30
"""Batches from which the statistics of batch norm are taken anew: 2 views of 500 images. Little is left of the old ones."""


def recorded(results: Path = RESULTS) -> dict[str, Line]:
    """Returns the results so far, by the run's name."""
    lines = results.read_text().splitlines() if results.exists() else []
    return {line["name"]: line for line in map(json.loads, lines)}


def run_all(raw: Path, work: Path, at_once: int) -> None:
    """Does what is due, `at_once` runs at a time, until nothing is."""
    data = work / "data"
    if not (data / "manifest.json").exists():
        first_images(raw, work / "raw", IMAGES_PER_CLASS)
        build = [sys.executable, "-m", "beam_jobs.build_tfrecords", "--raw", work / "raw", "--output", data]
        subprocess.run([*build, "--allow-other-counts"], check=True)
    begun = time.monotonic()
    running: dict[Future[Line], Run] = {}
    with ThreadPoolExecutor(at_once) as pool:
        while True:
            done = recorded()
            under_way = {run.name for run in running.values()}
            waiting = (run for run in due(done) if run.name not in under_way)
            for run in islice(waiting, at_once - len(running)):
                running[pool.submit(_in_a_process, run, work)] = run
            if not running:
                return
            for finished in wait(running, return_when=FIRST_COMPLETED).done:
                line = finished.result()
                del running[finished]
                with RESULTS.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"{(time.monotonic() - begun) / 60:6.1f} min  {line['name']}: {_in_words(line)}", flush=True)


def _in_words(line: Line) -> str:
    """Returns what a run came to. A probe has no top-1."""
    if line["objective"] is None:
        return line["diverged"]
    values = ", ".join(f"{one['value']:.4f}" for one in line["objective"].values())
    return f"objective {values}" + ("" if line["top_1"] is None else f", top-1 {line['top_1']:.2%}")


def first_images(raw: Path, output: Path, per_class: int) -> None:
    """Writes raw data with the first `per_class` training images of each class of `raw`, and all else as it is there.

    First means by their place in the archive. The conversion's own `--images-per-class` takes others, the first by name, and the
    recorded runs are of these.
    """
    output.mkdir(parents=True, exist_ok=True)
    for path in raw.iterdir():
        if path.name != "ILSVRC2012_img_train.tar":
            (output / path.name).write_bytes(path.read_bytes())
    with tarfile.open(raw / "ILSVRC2012_img_train.tar") as train, tarfile.open(output / "ILSVRC2012_img_train.tar", "w") as kept:
        for member in train:
            with tempfile.TemporaryFile() as file:
                with tarfile.open(fileobj=train.extractfile(member)) as images, tarfile.open(fileobj=file, mode="w") as part:
                    for image in islice(images, per_class):
                        part.addfile(image, images.extractfile(image))
                member.size = file.tell()
                file.seek(0)
                kept.addfile(member, file)


def _in_a_process(run: Run, work: Path) -> Line:
    environment = os.environ | {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
    command = [sys.executable, __file__, "one", run.name, "--work", str(work)]
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def run_one(run: Run, work: Path) -> Line:
    """Trains and measures one run, and returns its record. The results of a run that diverges are None."""
    from trainer import checkpoint as checkpoints
    from trainer.presets import resolve
    from trainer.shared.records import read_manifest
    from trainer.train import DivergedError, train

    config = resolve(PRESET, run.overrides)
    data, folder = str(work / "data"), str(work / "runs" / run.name)
    line = {
        "name": run.name,
        "group": run.group,
        "arm": run.cell.arm,
        "batch": run.cell.batch,
        "temperature": run.cell.temperature,
        "seed": run.seed,
        "rate": run.rate,
        "settings": list(run.settings),
        "dataset_fingerprint": read_manifest(data).fingerprint,
        "code": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip(),
        "command": run.command,
    }
    if run.group == "untrained":
        return line | measured(run, config, data, None)
    whole, begun = not checkpoints.paths(folder), time.process_time()
    try:
        result = train(config, data, folder)
    except DivergedError as error:
        return line | {"diverged": str(error), "objective": None, "own_objective": None, "top_1": None}
    minutes = round((time.process_time() - begun) / 60, 2)
    return (
        line
        | {"steps": result.steps, "state_sha256": result.state_sha256}
        | {"train": {key: round(value, 6) for key, value in result.metrics.items() if "seconds" not in key}}
        | ({"core_minutes": minutes} if whole else {})
        | measured(run, config, data, checkpoints.load(result.checkpoint))
    )


def measured(run: Run, config: Any, data: str, stored: Any) -> dict[str, Any]:
    """Returns the objective, the loss that the arm minimises, and accuracies of the checkpoint `stored`, or of the start."""

    from eval.measure.objective import global_objective
    from eval.measure.projections import make_head, projected_views
    from trainer import checkpoint as checkpoints
    from trainer.encoder import make_encoder
    from trainer.shared.records import read_manifest
    from trainer.state import model_variables

    manifest = read_manifest(data)
    encoder = make_encoder(config.encoder, config.views.image_size, config.run.seed)
    head = make_head(config)
    if stored is not None:
        checkpoints.restore(model_variables("encoder", encoder) | model_variables("projection", head), stored)

    def objectives() -> tuple["np.ndarray", dict[str, dict[str, float]]]:
        with tempfile.TemporaryDirectory() as kept:
            projections = projected_views(encoder, head, config, data, manifest, kept)
        wanted = TEMPERATURES if run.group == "untrained" else (run.cell.temperature,)
        return projections, {f"{one:g}": _rounded(global_objective(projections, one)) for one in wanted}

    projections, objective = objectives()
    record: dict[str, Any] = {"objective": objective}
    value = next(iter(objective.values()))["value"]
    decoupled = {"SimCLR": False, "decoupled": True}.get(run.cell.arm)
    record["own_objective"] = (
        value if decoupled is None else round(loss_of_batches(projections, run.cell.batch, run.cell.temperature, decoupled), 6)
    )
    if run.group == "probe":
        return record | {"top_1": None}
    record |= accuracies(encoder, config, data)
    if run.group != "untrained":
        take_statistics(encoder, head, config, data)
        again = accuracies(encoder, config, data)
        record["with_statistics_of_large_batches"] = {
            "objective": objectives()[1],
            **{key: again[key] for key in ("top_1", "knn_top_1")},
        }
    return record


def _rounded(objective: "GlobalObjective") -> dict[str, float]:
    return {name: round(getattr(objective, name), 6) for name in ("value", "alignment", "contrast", "gradient_norm")}


def loss_of_batches(projections: "np.ndarray", batch: int, temperature: float, decoupled: bool) -> float:
    """Returns the mean of temperature / 2 * NT-Xent over random batches of `projections`, [n, 2, d] float32, seeded."""
    import numpy as np
    import tensorflow as tf

    from trainer.losses.nt_xent import nt_xent

    z1, z2 = tf.unstack(tf.math.l2_normalize(tf.constant(projections), axis=2), axis=1)
    positions = tf.range(batch)

    def loss(own: tf.Tensor) -> tf.Tensor:
        views = tf.gather(z1, own), tf.gather(z2, own)
        return nt_xent(*views, *views, positions, temperature, decoupled)

    random = np.random.default_rng(0)
    per_epoch = len(projections) // batch
    orders = (random.permutation(len(projections))[: per_epoch * batch].reshape(per_epoch, batch) for _ in range(_ORDERS))
    return (
        temperature / 2 * float(np.mean([tf.map_fn(loss, order, tf.float32).numpy().mean(dtype=np.float64) for order in orders]))
    )


def accuracies(encoder: Any, config: Any, data: str) -> dict[str, Any]:
    """Returns top-1 by the protocol `cached`, which validation images are right, by ID, and top-1 by nearest neighbours."""
    import numpy as np

    from eval.measure.features import extract
    from eval.measure.logistic import top_k_accuracy
    from eval.measure.protocols.cached import fit_with_choice
    from eval.measure.protocols.knn import knn_scores
    from trainer.shared.records import read_manifest

    manifest, settings = read_manifest(data), config.linear_eval
    with tempfile.TemporaryDirectory() as kept:
        train, validation = (extract(encoder, config, data, manifest, split, kept) for split in ("train", "validation"))
        classifier = fit_with_choice(train, manifest.num_classes, settings)
        whole = validation.whole()
        votes = knn_scores(train, whole.values, manifest.num_classes, settings.knn_k, settings.knn_temperature)
    logits = classifier.logits(whole.values)
    return {
        "top_1": top_k_accuracy(logits, whole.labels, 1),
        "knn_top_1": top_k_accuracy(votes, whole.labels, 1),
        "l2_penalty": classifier.l2_penalty,
        "correct": np.packbits(logits.argmax(1) == whole.labels).tobytes().hex(),
    }


def take_statistics(encoder: Any, head: Any, config: Any, data: str) -> None:
    """Takes the moving statistics of batch norm anew, from large batches of training views. No weight changes."""
    import tensorflow as tf

    from trainer.augmentation import augment
    from trainer.input_pipeline import training_batches
    from trainer.shared.records import read_manifest

    for batch in training_batches(in_large_batches(config), data, read_manifest(data), 0).take(_LARGE_BATCHES):
        views, draws = (tf.concat([batch[name][:, 0], batch[name][:, 1]], axis=0) for name in ("views", "draws"))
        head(encoder(augment(views, draws, config.views.color_jitter_strength, config.views.blur), training=True), training=True)


def in_large_batches(config: Any) -> Any:
    """Returns the config with the batches of `take_statistics`, and no parts within them."""
    whole = {"ghost_batch_size": 0, "contrast_batch_size": 0}
    return replace(config, optimizer=replace(config.optimizer, global_batch_size=_LARGE_BATCH, **whole))


def find(name: str, done: Mapping[str, Line]) -> Run:
    """Returns the run that is due and has this name."""
    return next(run for run in due(done) if run.name == name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--raw", type=Path, required=True, help="CIFAR-10 in ImageNet's raw layout")
    one = commands.add_parser("one")
    one.add_argument("name")
    for command in (run, one):
        command.add_argument("--work", type=Path, required=True, help="for the dataset and checkpoints")
    run.add_argument("--at-once", type=int, default=2, metavar="N", help="runs at a time, each on one core (default: 2)")
    commands.add_parser("list")
    page = commands.add_parser("page")
    page.add_argument("--results", type=Path, default=RESULTS, help="what run has appended")
    page.add_argument("--docs", type=Path, default=RESULTS.parent, help="the folder with results.md")
    args = parser.parse_args()
    if args.command == "run":
        run_all(args.raw, args.work, args.at_once)
    elif args.command == "one":
        print(json.dumps(run_one(find(args.name, recorded()), args.work)))
    elif args.command == "list":
        done = recorded()
        for name, line in done.items():
            print(f"{name:40} done, {line.get('core_minutes', '')} core minutes")
        for one_due in due(done):
            print(f"{one_due.name:40} due")
    elif args.command == "page":
        from benchmarks.evidence_page import write_page

        write_page(list(recorded(args.results).values()), len(list(planned())), args.docs)


if __name__ == "__main__":
    main()
