"""A run killed with SIGKILL at random moments and started again each time, beside one that is left alone.

    python tests/benchmarks/preemption.py [--kills 10] [--seed 0]

Says at which step each kill found the run, and whether both end with the same state_sha256. Exits with 1 where they do not.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

if not __package__:  # started by its path
    sys.path.insert(0, str(Path(__file__).parents[1]))

from support.datasets import write_dataset

SETTINGS = ["width_multiplier=0.0625", "global_batch_size=20", "epochs=200", "log_every_steps=1", "checkpoint_every_epochs=1"]


def start(data: Path, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trainer.task", "--preset", "demo", "--data", str(data), "--checkpoint-dir", str(folder)]
    return subprocess.Popen(
        [*command, "--json", "--set", *SETTINGS], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def newest(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("checkpoint-*.npz"))
    return re.sub(r"\D+", "", names[-1].split(".")[0]).lstrip("0") if names else "none"


def finish(process: subprocess.Popen[str]) -> dict:
    output, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"the run failed with exit code {process.returncode}")
    return json.loads(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        data, alone, killed = (Path(temporary) / name for name in ("data", "alone", "killed"))
        write_dataset(data)
        expected = finish(start(data, alone))
        print(f"left alone: {expected['steps']} steps, state_sha256 {expected['state_sha256'][:16]}...", flush=True)
        for kill in range(args.kills):
            process = start(data, killed)
            after = moments.uniform(1.0, 16.0)
            threading.Timer(after, process.kill).start()
            process.communicate()
            if process.returncode == 0:
                raise SystemExit("the run ended before it was killed: raise epochs")
            print(f"kill {kill + 1} after {after:4.1f} s: newest checkpoint at step {newest(killed)}", flush=True)
        found = finish(start(data, killed))
    same = found["state_sha256"] == expected["state_sha256"]
    print(f"killed {args.kills} times: state_sha256 {found['state_sha256'][:16]}..., {'the same' if same else 'ANOTHER'}")
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
