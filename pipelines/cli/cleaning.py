"""The command clean: lists what a root keeps and removes what no run needs."""

import json
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path

from pipelines.cli.options import Commands, Output, add_command, add_json, add_root, read_output
from pipelines.cli.phases import showing
from pipelines.cli.store import check_runs, open_store, root_of, shown
from trainer.shared.errors import UserError

_EXAMPLES = """
examples:
  sogclr clean --dry-run
  sogclr clean
  sogclr clean --force features/features-train-0123456789abcdef

Removes what no run in MLflow refers to. To remove a run with all it keeps,
delete the run in the MLflow UI first. What a running command uses stays.
"""


def add_to(commands: Commands) -> None:
    """Adds the command of this module."""
    one = add_command(commands, "clean", _read, clean, "List what a root keeps, and remove what no run needs.", _EXAMPLES)
    one.add_argument("paths", nargs="*", metavar="PATH", help="only these, as the list names them (default: everything)")
    add_root(one)
    one.add_argument("--dry-run", action="store_true", help="only list")
    one.add_argument("--force", action="store_true", help="also remove what a run in MLflow refers to")
    add_json(one)


@dataclass(frozen=True)
class CleanOptions:
    paths: tuple[str, ...]
    """Paths relative to the root; empty for everything."""
    root: Path
    dry_run: bool
    force: bool
    output: Output


def _read(args: Namespace) -> CleanOptions:
    return CleanOptions(tuple(args.paths), root_of(args.root), args.dry_run, args.force, read_output(args))


def clean(options: CleanOptions) -> int:
    """Prints each thing that a root keeps, with its size, its age and what needs it, and removes it if it may."""
    root = options.root
    check_runs(root)
    with showing("clean", "loading MLflow"):
        from components import tracking
        from pipelines.kept import Reference, examined, listed, remove
        from pipelines.logs import logged_runs

    things = listed(root)
    if unknown := [path for path in options.paths if path not in things]:
        raise UserError(f"{shown(root)} keeps no {unknown[0]}; sogclr clean --dry-run lists what it keeps")
    store = open_store(root)
    references = [Reference(*one) for one in tracking.references(store)]
    elsewhere = sorted(run for run in logged_runs(root) if not tracking.was_recorded(store, run))
    if elsewhere and not (options.dry_run or options.force):
        raise UserError(
            f"{len(elsewhere)} runs of {shown(root)}, as {elsewhere[0][:8]}, are in another MLflow store: set "
            "MLFLOW_TRACKING_URI to it, or name what to remove and add --force"
        )
    chosen = [one for one in examined(root, things, references) if not options.paths or one.path in options.paths]
    rows = []
    for one in chosen:
        may = not one.used and (options.force or not one.needed_by)
        removed = may and not options.dry_run and remove(root, one.path)
        rows.append({**asdict(one), "removable": may, "removed": removed})
        if not options.output.json:
            fate = "removed" if removed else "would be removed" if may and options.dry_run else "stays"
            why = "in use" if one.used else f"needed by {', '.join(one.needed_by)}" if one.needed_by else "nothing needs it"
            print(f"{_size(one.bytes):>9} {_age(one.seconds):>6} {fate:<16} {one.path} ({one.what}; {why})", flush=True)
    if options.output.json:
        print(json.dumps(rows))
    else:
        freed = sum(row["bytes"] for row in rows if row["removed" if not options.dry_run else "removable"])
        print(f"{_size(freed)} {'would be freed' if options.dry_run else 'freed'}, of {_size(sum(one.bytes for one in chosen))}")
    return 0


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
