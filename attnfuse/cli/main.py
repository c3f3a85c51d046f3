"""`attnfuse <command>`: finds the command's module and hands over."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

COMMANDS = {
    "info": "this machine, the versions, and each backend: available or why not",
    "inspect": "compile the kernels for a card that is not here and read their machine code: loops, units, ceilings",
    "check": "hold every backend this machine can run to the error budget; exit 1 on any failure",
    "bench": "time attnfuse against its peers, each row checked first; exit 1 on any wrong result",
    "demo": "train audio-visual digit classifiers at each level of fusion, on the CPU, in minutes",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 good, 1 not good, 2 bad arguments."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="attnfuse", description="Attention over a list of sources.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name in argv[:1]:  # the others' modules need not be imported
            import_module(f"attnfuse.cli.{name}").add_arguments(command)
    args = parser.parse_args(argv, argparse.Namespace(command_line=argv))
    try:
        code: int = import_module(f"attnfuse.cli.{args.command}").run(args)
    except (ImportError, ValueError) as error:
        print(f"attnfuse {args.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return code


def _version() -> str:
    try:
        return f"attnfuse {version('attnfuse')}"
    except PackageNotFoundError:  # run from a checkout that is not installed
        return f"attnfuse {import_module('attnfuse').__version__}"
