"""The evidence: does SogCLR need no large batch? SimCLR, decoupled and SogCLR by batch size and seed, at one budget, on CIFAR-10.

    python tests/benchmarks/evidence.py run  --raw DIR --work DIR [--groups main ...]   what is missing of docs/evidence.jsonl
    python tests/benchmarks/evidence.py list                                            the runs there are, done or not
    python tests/benchmarks/evidence.py page                                            docs/results.md and its figure

`run` trains each run's encoder on one core (so the same bits come out whatever else the machine does), two at once, evaluates the
final checkpoint by the cached linear eval, and appends a line. Interrupted, it goes on: finished runs are not repeated, and one
that was under way goes on from its newest checkpoint.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

if not __package__:  # started by its path
    sys.path.insert(0, str(Path(__file__).parents[1]))

RESULTS = Path(__file__).parents[2] / "docs" / "evidence.jsonl"
PRESET = "sogclr_cifar10_r18w025_b128"
BATCHES = (16, 32, 64, 128)
SEEDS = (0, 1, 2)
# At 16 px a run takes a core twelve minutes. LARS divides a gradient by its norm, so that losses of other scales are compared
# at the same rate. Its rate grows with the root of the batch, as in the paper.
RECIPE = ("image_size=16", "optimizer=lars", "learning_rate_scaling=sqrt", "epochs=10", "warmup_epochs=1", "log_every_steps=500")
ARMS = {
    "simclr": ("loss=nt_xent",),
    "decoupled": ("gamma=1.0",),
    "sogclr": (),
}
"""Settings of each arm; the rest is the preset's. At gamma = 1 u is forgotten at once: the decoupled contrastive loss."""
ABLATIONS = {
    "gamma .3": ("gamma=0.3",),
    "gamma .6": ("gamma=0.6",),
    "gamma .99": ("gamma=0.99",),
    "variant tf_official": ("variant=tf_official",),
    "variant pt_official": ("variant=pt_official",),
    "u reset each epoch": (),
}
ABLATION_BATCH = 32
TEMPERATURE, TEMPERATURE_BATCHES = 0.1, (16, 128)
"""ImageNet's, at which a small batch's gradient misses more (`gradient_bias.py`)."""
PROBED_RATES = (0.0375, 0.075, 0.15, 0.3)
BASE_LEARNING_RATE = 0.3
"""The best of the probe, in docs/results.md."""
CORES = 2


@dataclass(frozen=True)
class Run:
    group: str
    """`probe`, `main`, `ablation` or `temperature`."""
    arm: str
    batch: int
    seed: int
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.group}-{self.arm}-b{self.batch}-s{self.seed}".replace(" ", "_")

    @property
    def command(self) -> str:
        settings = " ".join(self.overrides)
        return f"python -m trainer.task --preset {PRESET} --data DATA --checkpoint-dir DIR --set {settings}"


def runs() -> Iterator[Run]:
    """Yields every run, those first whose results say most."""

    def settings(batch: int, seed: int, rate: float = BASE_LEARNING_RATE) -> tuple[str, ...]:
        return (f"global_batch_size={batch}", f"seed={seed}", f"base_learning_rate={rate}", *RECIPE)

    for rate in PROBED_RATES:
        short = tuple({"epochs=10": "epochs=3", "warmup_epochs=1": "warmup_epochs=0.3"}.get(one, one) for one in RECIPE)
        own = ("global_batch_size=64", "seed=100", f"base_learning_rate={rate}", *short)
        yield Run("probe", f"simclr rate {rate}", 64, 100, (*own, *ARMS["simclr"]))
    for seed in SEEDS:
        for batch in TEMPERATURE_BATCHES:
            for arm, own in ARMS.items():
                yield Run("temperature", arm, batch, seed, (*settings(batch, seed), *own, f"temperature={TEMPERATURE}"))
        for batch in BATCHES:
            for arm, own in ARMS.items():
                yield Run("main", arm, batch, seed, (*settings(batch, seed), *own))
    for seed in SEEDS:
        for arm, own in ABLATIONS.items():
            yield Run("ablation", arm, ABLATION_BATCH, seed, (*settings(ABLATION_BATCH, seed), *own))


def recorded(results: Path = RESULTS) -> dict[str, dict]:
    """Returns the results so far, by the run's name."""
    lines = results.read_text().splitlines() if results.exists() else []
    return {line["name"]: line for line in map(json.loads, lines)}


def run_all(raw: Path, work: Path, groups: list[str]) -> None:
    data = work / "data"
    if not (data / "manifest.json").exists():
        subprocess.run([sys.executable, "-m", "beam_jobs.build_tfrecords", "--raw", raw, "--output", data], check=True)
    done = recorded()
    missing = [run for run in runs() if run.group in groups and run.name not in done]
    begun = time.time()

    def work_on(run: Run) -> None:
        environment = os.environ | {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
        command = [sys.executable, __file__, "one", run.name, "--work", str(work)]
        output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        line = json.loads(output.splitlines()[-1])
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
        minutes = (time.time() - begun) / 60
        print(f"{minutes:6.1f} min  {run.name}: top-1 {line['top_1']:.2%}, untrained {line['untrained_top_1']:.2%}", flush=True)

    print(f"{len(missing)} runs to do, {len(done)} done", flush=True)
    with ThreadPoolExecutor(CORES) as pool:
        for finished in [pool.submit(work_on, run) for run in missing]:
            finished.result()


def run_one(run: Run, work: Path) -> dict:
    """Trains and evaluates one run, and returns what is to be recorded of it."""
    import numpy as np

    from eval.measure.features import extract, load_encoder
    from eval.measure.logistic import top_k_accuracy
    from eval.measure.protocols.cached import fit_with_choice
    from trainer import checkpoint as checkpoints
    from trainer.encoder import make_encoder
    from trainer.preemption import PreemptedError
    from trainer.presets import resolve
    from trainer.shared.records import read_manifest
    from trainer.train import train

    # Which moves no bit of what comes out.
    # The images are a part of CIFAR-10's.
    config = replace(resolve(PRESET, [*run.overrides, "data.allow_other_counts=true"]), checkpoint_every_epochs=1)
    data, folder = str(work / "data"), work / "runs" / run.name
    manifest = read_manifest(data)
    whole = not checkpoints.paths(str(folder))
    begun = time.process_time()
    if run.arm == "u reset each epoch":
        every = manifest.splits["train"].records // config.optimizer.global_batch_size
        while True:
            newest = checkpoints.load_latest(str(folder))
            steps_done = newest.step if newest else 0
            if newest is not None and np.any(newest.arrays["u"]):
                forgotten = {**newest.arrays, "u": np.zeros_like(newest.arrays["u"])}
                checkpoints.save(str(folder), replace(newest, arrays=forgotten), config.run.keep_checkpoints)
            taken = iter(range(steps_done + 1, 10**9))
            try:
                result = train(config, data, str(folder), should_stop=lambda taken=taken: next(taken) % every == 0)
                break
            except PreemptedError:
                continue
    else:
        result = train(config, data, str(folder))
    trained_seconds = time.process_time() - begun

    def evaluate(encoder) -> tuple[np.ndarray, np.ndarray, float]:
        with tempfile.TemporaryDirectory() as kept:
            train, validation = (extract(encoder, config, data, manifest, split, kept) for split in ("train", "validation"))
            classifier = fit_with_choice(train, manifest.num_classes, config.linear_eval)
            whole = validation.whole()
        return classifier.logits(whole.values), whole.labels, classifier.l2_penalty

    stored = checkpoints.load(result.checkpoint)
    logits, labels, penalty = evaluate(load_encoder(config, stored))
    control, _, _ = evaluate(make_encoder(config.encoder, config.views.image_size, config.run.seed))
    line = {
        "name": run.name,
        "group": run.group,
        "arm": run.arm,
        "batch": run.batch,
        "seed": run.seed,
        "top_1": top_k_accuracy(logits, labels, 1),
        "top_5": top_k_accuracy(logits, labels, 5),
        "untrained_top_1": top_k_accuracy(control, labels, 1),
        "l2_penalty": penalty,
        "train": {key.removeprefix("train/"): round(value, 6) for key, value in result.metrics.items() if "seconds" not in key},
        "steps": result.steps,
        "state_sha256": result.state_sha256,
        "dataset_fingerprint": manifest.fingerprint,
        "code": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip(),
        **({"core_minutes": round(trained_seconds / 60, 1)} if whole else {}),
        "command": run.command,
        # Which validation images, by ID, are classified rightly: for paired tests.
        "correct": np.packbits(logits.argmax(1) == labels).tobytes().hex(),
    }
    shutil.rmtree(folder)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--raw", type=Path, required=True, help="CIFAR-10 in ImageNet's raw layout")
    run.add_argument("--work", type=Path, required=True, help="for the dataset and checkpoints")
    run.add_argument("--groups", nargs="+", default=["probe", "main", "ablation", "temperature"])
    one = commands.add_parser("one")
    one.add_argument("name")
    one.add_argument("--work", type=Path, required=True)
    commands.add_parser("list")
    page = commands.add_parser("page")
    page.add_argument("--results", type=Path, default=RESULTS, help="what run has appended")
    page.add_argument("--docs", type=Path, default=RESULTS.parent, help="the folder with results.md")
    args = parser.parse_args()
    if args.command == "run":
        run_all(args.raw, args.work, args.groups)
    elif args.command == "one":
        print(json.dumps(run_one(next(run for run in runs() if run.name == args.name), args.work)))
    elif args.command == "list":
        done = recorded()
        for run in runs():
            print(f"{run.name:40} {done[run.name]['top_1']:.2%}" if run.name in done else run.name)
    elif args.command == "page":
        from benchmarks.evidence_page import write_page

        done = recorded(args.results)
        every = [run.name for run in runs()]
        write_page([done[name] for name in every if name in done], len(every), args.docs)


if __name__ == "__main__":
    main()
