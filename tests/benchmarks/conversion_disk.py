"""How long a conversion takes on a slow disk: one of few requests a second.

    python tests/benchmarks/conversion_disk.py --folder DIR --iops 100 3000

Makes N JPEGs of about 100 KB in ImageNet's raw layout in a new folder within DIR, a folder on a disk, removed at the end. The dry
run and the conversion run in a process of their own, whose reads the kernel limits to so many a second, and which has so little
memory that the system caches but a part of the raw data. Prints the seconds of each phase, the requests for an image, and what
follows for ImageNet's 1,331,167 images. Needs root and version 1 of control groups (blkio, memory).
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
from contextlib import contextmanager
from pathlib import Path

if not __package__:  # started by its path
    sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.conversion import make_raw

COMMANDS = ("dry-run", "conversion")
IMAGENET = 1_331_167
_GROUPS = Path("/sys/fs/cgroup")


@contextmanager
def limited(iops: int, megabytes: int, folder: Path) -> Iterator[list[Path]]:
    """Gives the control groups that limit a process to reads from the disk of `folder` and to memory, caches included."""
    device = os.stat(folder).st_dev
    blkio, memory = (_GROUPS / kind / f"conversion-{os.getpid()}" for kind in ("blkio", "memory"))
    for group in (blkio, memory):
        group.mkdir()
    try:
        (blkio / "blkio.throttle.read_iops_device").write_text(f"{os.major(device)}:{os.minor(device)} {iops}")
        (memory / "memory.limit_in_bytes").write_text(f"{megabytes}M")
        yield [blkio, memory]
    finally:
        for group in (blkio, memory):
            group.rmdir()


def requests_of(blkio: Path) -> int:
    lines = (blkio / "blkio.throttle.io_serviced").read_text().splitlines()
    return sum(int(line.split()[2]) for line in lines if line.split()[1:2] == ["Read"])


def run(command: str, raw: Path, output: Path) -> dict[str, float]:
    """Returns the seconds of each phase."""
    from beam_jobs.job import build, plan_only

    phases: dict[str, float] = {}
    begun = last = time.perf_counter()
    now = ""

    def on_progress(phase: str, done: int = 0, total: int = 0, text: str = "") -> None:
        nonlocal now, last
        if phase != now:
            phases[now] = time.perf_counter() - last
            now, last = phase, time.perf_counter()

    if command == "dry-run":
        planned = plan_only(str(raw), str(output), on_progress=on_progress)
        phases["said"] = planned.seconds
    else:
        build(str(raw), str(output), on_progress=on_progress)
    on_progress("end")
    phases.pop("")
    phases["all"] = time.perf_counter() - begun
    return phases


def measure(command: str, iops: int, megabytes: int, raw: Path, output: Path) -> dict[str, float]:
    for path in raw.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    with limited(iops, megabytes, raw) as groups:
        child = [sys.executable, __file__, "--run", command, "--raw", str(raw), "--output", str(output)]
        # The process joins before it imports anything.
        joins = " && ".join(f"echo $$ > {group}/cgroup.procs" for group in groups)
        done = subprocess.run(["sh", "-c", f'{joins} && exec "$@"', "sh", *child], stdout=subprocess.PIPE, text=True, check=False)
        requests = requests_of(groups[0])
    if done.returncode:
        raise SystemExit(done.returncode)
    return {**json.loads(done.stdout.splitlines()[-1]), "requests": requests}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--images", type=int, default=8000, metavar="N")
    parser.add_argument("--iops", type=int, nargs="+", default=[100, 3000], metavar="N", help="reads a second")
    parser.add_argument("--memory", type=int, default=450, metavar="MB", help="of the process and its part of the cache")
    parser.add_argument("--commands", nargs="+", default=list(COMMANDS), choices=COMMANDS)
    parser.add_argument("--folder", default=tempfile.gettempdir(), metavar="DIR", help="a folder on a disk")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--raw", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(run(args.run, args.raw, args.output)))
        return
    with tempfile.TemporaryDirectory(prefix="disk-", dir=args.folder) as folder:
        raw, output = Path(folder) / "raw", Path(folder) / "output"
        make_raw(raw, args.images)
        print("| reads a second | command | seconds | requests an image | ImageNet, h | phases |\n|---|---|---|---|---|---|")
        for iops in args.iops:
            for command in args.commands:
                found = measure(command, iops, args.memory, raw, output)
                shutil.rmtree(output, ignore_errors=True)
                seconds, requests = found.pop("all"), found.pop("requests")
                phases = ", ".join(f"{phase} {value:.1f} s" for phase, value in found.items())
                hours = seconds / args.images * IMAGENET / 3600
                print(
                    f"| {iops} | {command} | {seconds:.1f} | {requests / args.images:.2f} | {hours:.1f} | {phases} |", flush=True
                )


if __name__ == "__main__":
    main()
