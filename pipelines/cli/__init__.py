"""The command line. Each module is a group of commands.

A command reads its options once, into checked and frozen settings; no other code knows argparse. Each command imports heavy
packages itself, so that --help answers at once.
"""

import os
import select
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from pipelines.cli.parser import make_parser
from trainer.shared.errors import UserError
from trainer.shared.processes import endings


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    0 for success, 1 for a failure, 2 for an error that the user can fix, 130 for an interrupt, 141 if the reader of the output
    has closed it.
    """
    args = make_parser().parse_args(arguments)
    # Treat SIGTERM, and SIGHUP of a closed terminal, like an interrupt, so that child processes are ended too.
    before = {number: signal.signal(number, signal.default_int_handler) for number in endings()}
    try:
        code: int = args.command(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        with suppress(OSError):  # a closed terminal takes no more lines
            print("interrupted", file=sys.stderr, flush=True)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            return 141
        if args.debug:
            raise
        print(f"error: {_in_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_one_line(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())} (--debug shows where)"


def _output_is_closed() -> bool:
    """Returns whether the reader of the output has closed it, as `head` does. If so, discards all further output."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if gone:
        # Python flushes stdout again at exit, which must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone
