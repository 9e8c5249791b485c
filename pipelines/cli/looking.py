"""The commands that only show things: ui, doctor, presets, accelerators."""

import json
import os
from argparse import Namespace
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from pipelines.cli.options import Commands, Output, add_command, add_json, add_root, read_output
from pipelines.cli.phases import showing
from pipelines.cli.store import check_runs, mlflow_names, open_store, root_of, shown
from pipelines.vertex.accelerators import ACCELERATORS
from trainer.presets import PRESETS
from trainer.shared.errors import UserError


def add_to(commands: Commands) -> None:
    """Adds the commands of this module."""
    ui = add_command(commands, "ui", _read_ui, open_ui, "Open the MLflow UI on a root.")
    add_root(ui)
    ui.add_argument("--port", type=int, default=5000, help="port on this machine (default: 5000); 0 for any")

    summary = "Show what a bug report needs to know about this machine, with advice on each problem."
    doctor = add_command(commands, "doctor", _read_doctor, examine_machine, summary)
    add_root(doctor)
    add_json(doctor)

    add_json(add_command(commands, "presets", read_output, list_presets, "List the presets with the published result of each."))
    summary = "List the machines of Vertex AI for pretraining and evaluation."
    add_json(add_command(commands, "accelerators", read_output, list_accelerators, summary))


# ---- ui


@dataclass(frozen=True)
class UiOptions:
    root: Path
    port: int


def _read_ui(args: Namespace) -> UiOptions:
    return UiOptions(root_of(args.root), args.port)


def open_ui(options: UiOptions) -> int:
    """Serves MLflow's UI until it is interrupted."""
    from pipelines.ui import serve

    root = options.root
    check_runs(root)
    uri = mlflow_names(root)["MLFLOW_TRACKING_URI"]
    if uri.startswith("http"):
        from components.tracking import without_credentials

        raise UserError(f"the runs are on a server, as MLFLOW_TRACKING_URI says: open {without_credentials(uri)}")
    # If the root has moved, its records follow before they are shown.
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        with showing("ui", "loading MLflow"):
            open_store(root)
    log = root / "logs" / "ui.log"
    with ExitStack() as starting:

        def ready(url: str) -> None:
            starting.close()
            print(f"MLflow: {url} (Ctrl-C ends it)", flush=True)

        starting.enter_context(showing("ui", "starting the server"))
        try:
            serve(uri, str(root / "artifacts"), options.port, log, ready)
        except KeyboardInterrupt:
            return 0
    raise RuntimeError(f"the server has stopped unexpectedly; see the log {shown(log)}")


# ---- doctor


@dataclass(frozen=True)
class DoctorOptions:
    root: Path
    output: Output


def _read_doctor(args: Namespace) -> DoctorOptions:
    return DoctorOptions(root_of(args.root), read_output(args))


def examine_machine(options: DoctorOptions) -> int:
    """Prints each finding as soon as it is known. Returns 2 if something is wrong, else 0."""
    with showing("doctor", "loading MLflow"):
        from components.tracking import move_credentials
        from pipelines.doctor import examine

    move_credentials()
    names = mlflow_names(options.root)
    found = []
    for one in examine(options.root, names["MLFLOW_TRACKING_URI"], names["MLFLOW_EXPERIMENT_NAME"]):
        found.append(one)
        if not options.output.json:
            print(f"{'!' if one.wrong else ' '} {one.name}: {one.value}", flush=True)
    wrong = [one for one in found if one.wrong]
    if options.output.json:
        print(json.dumps([asdict(one) for one in found]))
    else:
        print("\n".join(["", *([f"! {one.name}: {one.wrong}" for one in wrong] or ["nothing is wrong"])]))
    return 2 if wrong else 0


# ---- presets, accelerators


def list_presets(output: Output) -> int:
    """Prints the presets: as a table on a terminal, else one line each."""
    titles = ("name", "summary", "published", "source", "cost", "data", "command")
    described = [(one.name, one.summary, one.published, one.source, one.cost, one.data, one.command) for one in PRESETS.values()]
    if output.json:
        print(json.dumps([dict(zip(titles, one, strict=True)) for one in described]))
        return 0
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if console.is_terminal:
        table = Table(box=None, padding=(0, 2, 1, 0))
        for title in ("preset", "what", "published", "source", "cost", "data"):
            table.add_column(title, no_wrap=title == "preset")
        for *shown, _ in described:
            table.add_row(*shown)
        console.print(table)
    else:
        for name, summary, published, source, cost, data, command in described:
            print(f"{name}: {summary} Published: {published}. Source: {source}. Cost: {cost}. Data: {data}. {command}")
    return 0


def list_accelerators(output: Output) -> int:
    """Prints the accelerators, with the reason why one is refused."""
    known = ACCELERATORS.values()
    if output.json:
        print(json.dumps([{**asdict(one), "refused": one.refused} for one in known]))
        return 0
    rows = [("accelerator", "image", "machine", "replicas", "refused", "regions")]
    rows += [(one.name, one.build, one.summary, str(one.replicas), one.refused, ", ".join(one.regions)) for one in known]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        print("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[5]]).rstrip())
    return 0
