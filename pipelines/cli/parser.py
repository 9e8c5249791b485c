"""The parser of all commands. --help lists them in the order given here."""

from pipelines.cli import cleaning, comparing, importing, jobs, looking, planning, rerunning, running, submitting
from pipelines.cli.options import Parser


def make_parser() -> Parser:
    """Returns the parser. Its results have `command`, a function that gets them and runs the command, and `debug`."""
    parser = Parser(
        prog="sogclr",
        description="SogCLR from raw images to a linear eval, on this machine or on Vertex AI, with the lineage of all steps.",
        epilog="sogclr COMMAND --help explains a command. Exit codes: 0 done, 1 failed, 2 something for you to fix.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in (running, rerunning, comparing, submitting, jobs, planning, importing, looking, cleaning):
        group.add_to(commands)
    return parser
