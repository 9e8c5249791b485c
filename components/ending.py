"""`python -m components.ending MODULE ARGUMENT ...` is `python -m MODULE ARGUMENT ...`, in a process that ends with its work.

The steps start KFP's executor by it. What the interpreter takes apart at its end cannot fail a step that has written its outputs.
"""

import runpy
import sys

from trainer.shared.processes import end_with_its_work


def main() -> None:
    del sys.argv[0]
    end_with_its_work(lambda: runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True))


if __name__ == "__main__":
    main()
