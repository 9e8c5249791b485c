"""The tables of plans: ImageNet presets on TPUs, what each lever does to the step's memory traffic, and the evaluation.

    python tests/benchmarks/plans.py run  [--root DIR] [--only TEXT]    compiles what is missing of docs/plans.jsonl, a line each
    python tests/benchmarks/plans.py page                               puts the tables into docs/plan.md

A row takes a core five to ten minutes, once; one of the evaluation a minute or two. Needs `make tpu-check`.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.code import PROJECT, program_version
from pipelines.plan import compiler, evaluation
from pipelines.plan.estimate import assumptions
from pipelines.plan.machines import DEVICES, dollars_per_hour
from pipelines.vertex import accelerators
from trainer.presets import resolve

RESULTS = PROJECT / "docs" / "plans.jsonl"
PAGE = PROJECT / "docs" / "plan.md"
MARKS = "<!-- plans: begin -->", "<!-- plans: end -->"
EVALUATION_MARKS = "<!-- evaluation: begin -->", "<!-- evaluation: end -->"
MACHINES = ("v5e-8", "v3-8", "v4-8", "v5e-32")
BATCHES = (128, 256, 512, 1024, 2048, 4096, 8192)
LEVER_BATCH = 1024
"""On v5e-8, 128 samples a chip: what the official step's figure is for."""
OFFICIAL_BYTES_PER_SAMPLE = 1198e6
"""What the official step moves, float32, 128 samples a chip, ResNet-50 at 224 px, compiled for a v5e."""
LEVERS = {
    "all of them": {},
    "1x1 convolutions normalised as the others are": {"fuses": False},
    "float32": {"precision": "float32"},
}
EVALUATED = "sogclr_imagenet_r50_b512"
PROTOCOLS = ("cached", "knn", "online", "official", "finetune-1", "finetune-10", "finetune-100")
EVALUATION_MACHINES = ("v5e-8", "v3-8", "a100-1", "l4-1", "cpu")


def rows() -> Iterator[tuple[str, list[str]]]:
    """Yields each row's name and the arguments of the `sogclr plan` that makes it."""
    for batch in BATCHES:
        for machine in MACHINES:
            preset = f"sogclr_imagenet_r50_b{batch}"
            yield f"{preset} {machine}", ["--preset", preset, "--accelerator", machine]


def recorded() -> dict[str, dict[str, Any]]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {line["row"]: line for line in map(json.loads, lines)}


def record(row: str, result: dict[str, Any]) -> None:
    code = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=PROJECT).stdout.strip()
    with RESULTS.open("a") as file:
        file.write(json.dumps({"row": row, "code": code, **result}) + "\n")
    shown = ("fits", "bytes_per_sample", "temp_bytes", "compile_seconds", "total_hours", "problems")
    print(row, {key: result[key] for key in shown if key in result}, flush=True)


def run(root: str, only: str) -> None:
    done = recorded()
    for lever, changes in LEVERS.items():
        row = f"lever: {lever}"
        if row not in done and only in row:
            record(row, lever_result(changes))
    for machine in EVALUATION_MACHINES:
        row = f"evaluation: {machine}"
        if row not in done and only in row:
            record(row, evaluation_result(machine, Path(root)))
    for row, arguments in rows():
        if row not in done and only in row:
            command = [sys.executable, "-m", "pipelines.cli", "plan", *arguments, "--root", root, "--json"]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                record(row, {"refused": result.stderr.strip().splitlines()[-1].removeprefix("error: ")})
            else:
                record(row, json.loads(result.stdout))


def lever_result(changes: dict[str, Any]) -> dict[str, Any]:
    """Returns what the step of `LEVER_BATCH` on v5e-8 needs with one lever undone."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from trainer.lowering import OneOfMany, lower_step
    from trainer.state import create_train_state

    machine = accelerators.get("v5e-8")
    config = resolve(f"sogclr_imagenet_r50_b{LEVER_BATCH}")
    config = replace(config, **{key: value for key, value in changes.items() if key != "fuses"})
    one = OneOfMany(machine.replicas, recompute_in_backward=changes.get("fuses", True))
    program = lower_step(config, create_train_state(config, 1_281_167, 1000, one), one)
    python = compiler.tpu_python(PROJECT)
    assert python is not None, "make tpu-check first"
    compiled = compiler.compile_program(program.hlo, DEVICES["v5e"], python)
    if compiled["fits"]:
        compiled["bytes_per_sample"] = compiled["bytes_accessed"] * machine.replicas / LEVER_BATCH
    return compiled


def evaluation_result(machine: str, root: Path) -> dict[str, Any]:
    """Returns the plan of every protocol of `EVALUATED` on a machine, as `sogclr plan --json` has it under `evaluation`."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    accelerator = accelerators.get(machine)
    python = compiler.tpu_python(PROJECT)
    assert python is not None, "make tpu-check first"
    return evaluation.make_evaluation_estimate(
        resolve(EVALUATED, [f"linear_eval.protocols={','.join(PROTOCOLS)}"]),
        accelerator,
        assumptions(EVALUATED, accelerator),
        evaluation.Limits(),
        python=python,
        cache=root / "plans",
        version=program_version("eval/measure/programs.py"),
    ).as_json()


def price(machine: str, hours: float) -> float:
    """Returns dollars by the table of today, whatever it was when a row was compiled."""
    slice_of = accelerators.get(machine)
    return hours * slice_of.replicas * dollars_per_hour(slice_of)


def page() -> None:
    done = recorded()
    titles = ("preset", "machine", "images a device", "memory, GB", "traffic a sample", "of the official", "step", "samples/s")
    lines = ["| " + " | ".join((*titles, "bound by", "hours", "price")) + " |", "|" + "---|" * 11]
    for row, _ in rows():
        if row not in done:
            continue
        preset, machine = row.split()
        one = done[row]
        if "refused" in one:
            lines.append(f"| {preset} | {machine} | refused: {one['refused']} |" + " |" * 8)
            continue
        memory = f"{one['used_bytes'] / 1e9:.1f} of {one['memory_bytes'] / 1e9:.1f}"
        if not one["fits"]:
            lines.append(f"| {preset} | {machine} | {one['batch_per_replica']} | {memory}: does not fit |" + " |" * 7)
            continue
        hours = one["total_hours"]
        lines.append(
            f"| {preset} | {machine} | {one['batch_per_replica']} | {memory} | {one['bytes_per_sample'] / 1e6:.0f} MB "
            f"| {one['bytes_per_sample'] / OFFICIAL_BYTES_PER_SAMPLE:.2f} | {1e3 * one['step_seconds']:.0f} ms "
            f"| {one['samples_per_second']:,.0f} | {one['bound_by']} | {hours:,.0f} | ${price(machine, hours):,.0f} |"
        )
    titles = ("step at 128 samples a chip of a v5e-8", "traffic a sample", "of the official", "temporaries", "of the official")
    lines += ["", "| " + " | ".join(titles) + " |", "|" + "---|" * 5]
    lines.append("| official, float32, without augmentation (as measured by others) | 1,198 MB | 1 | 14.7 GB | 1 |")
    for lever in LEVERS:
        one = done.get(f"lever: {lever}")
        if one and one["fits"]:
            lines.append(
                f"| {'ours' if lever == 'all of them' else f'ours, but {lever}'} | {one['bytes_per_sample'] / 1e6:.0f} MB "
                f"| {one['bytes_per_sample'] / OFFICIAL_BYTES_PER_SAMPLE:.3f} | {one['temp_bytes'] / 1e9:.1f} GB "
                f"| {one['temp_bytes'] / 14.7e9:.2f} |"
            )
        elif one:
            lines.append(f"| ours, but {lever} | does not fit: {one['used_bytes'] / 1e9:.1f} GB | | | |")
    put_between(MARKS, lines)
    put_between(EVALUATION_MARKS, evaluation_table(done))


def evaluation_table(done: dict[str, dict[str, Any]]) -> list[str]:
    """Returns a row for each protocol, and a column of hours and price for each machine."""
    plans = {machine: done[row] for machine in EVALUATION_MACHINES if (row := f"evaluation: {machine}") in done}
    if not plans:
        return []
    names = list(next(iter(plans.values()))["protocols"])
    lines = ["| protocol | images forward | images trained | " + " | ".join(plans) + " |", "|" + "---|" * (3 + len(plans))]
    for name in names:
        cells = [taken(machine, one["protocols"][name]["hours"]) for machine, one in plans.items()]
        first = next(iter(plans.values()))["protocols"][name]
        lines.append(f"| `{name}` | {first['forward_images']:,} | {first['trained_images']:,} | {' | '.join(cells)} |")
    cells = [taken(machine, one["total_hours"]) for machine, one in plans.items()]
    lines.append(f"| all | | | {' | '.join(cells)} |")
    for title, name, unit, size in (
        ("FLOPs an image", "forward_flops", "G", 1e9),
        ("traffic an image", "forward_bytes", "MB", 1e6),
    ):
        cells = [f"{one[name] / size:.1f} {unit}, {one['sources'][name]}" for one in plans.values()]
        lines.append(f"| {title} | | | {' | '.join(cells)} |")
    for title, name, limit in (
        ("memory of a host, GB", "memory_bytes", "host_memory_bytes"),
        ("disk, GB", "disk_bytes", "disk_limit_bytes"),
    ):
        cells = [f"{one[name] / 1e9:.1f} of {one[limit] / 1e9:,.0f}" for one in plans.values()]
        lines.append(f"| {title} | | | {' | '.join(cells)} |")
    return lines


def taken(machine: str, hours: float) -> str:
    return f"{evaluation.duration(hours)}, ${price(machine, hours):,.2f}" if hours else "-"


def put_between(marks: tuple[str, str], lines: list[str]) -> None:
    """Puts lines into the page, in the place of those between two marks."""
    before, _, rest = PAGE.read_text().partition(marks[0])
    PAGE.write_text(before + "\n".join([marks[0], *lines, marks[1]]) + rest.partition(marks[1])[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("--root", default="runs")
    one.add_argument("--only", default="", help="rows whose name has this in it")
    commands.add_parser("page")
    args = parser.parse_args()
    if args.command == "run":
        run(args.root, args.only)
    else:
        page()


if __name__ == "__main__":
    main()
