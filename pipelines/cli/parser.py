"""The parser of all commands, in the order in which --help lists them."""

from pipelines.cli import comparing, jobs, looking, planning, rerunning, running, submitting
from pipelines.cli.options import Parser


def make_parser() -> Parser:
    """Returns the parser. What it parses has `command`, which runs a command on it, and `debug`."""
    parser = Parser(
        prog="sogclr",
        description="SogCLR from raw images to a linear eval, on this machine or on Vertex AI, with the lineage of all steps.",
        epilog="sogclr COMMAND --help tells more of each. Exit codes: 0 done, 1 failed, 2 something for you to fix.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in (running, rerunning, comparing, submitting, jobs, planning, looking):
        group.add_to(commands)
    return parser
