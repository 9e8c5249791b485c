"""`python -m pipelines.cli` is `sogclr`."""

import sys

from pipelines.cli import main

sys.exit(main())
