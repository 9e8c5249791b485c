"""`python -m components.ending MODULE ARGUMENT ...` is `python -m MODULE ARGUMENT ...`, in a process that ends with its work.

The steps start KFP's executor by it. When a step has written its outputs, nothing that happens afterwards can make it fail.
"""

import runpy
import sys

from trainer.shared.processes import end_with_its_work


def main() -> None:
    del sys.argv[0]
    end_with_its_work(lambda: runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True))


if __name__ == "__main__":
    main()
