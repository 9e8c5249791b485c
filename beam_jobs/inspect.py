"""The old name of the command `python -m beam_jobs.inspect_dataset`, kept for one version."""

import sys

from beam_jobs.inspect_dataset import main

if __name__ == "__main__":
    print("warning: python -m beam_jobs.inspect is now python -m beam_jobs.inspect_dataset", file=sys.stderr)
    sys.exit(main())
