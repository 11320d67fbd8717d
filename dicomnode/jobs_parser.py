"""The options of the commands about jobs. Law: light; what a command does is imported when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    """Add the commands to the command line's."""

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=_later(name))
        sub.add_argument("job", metavar="JOB", help="id of the job, or its beginning; `status` lists them")
        sub.add_argument("--config", type=Path, metavar="F", help="configuration file; without it, the defaults")
        return sub

    command("provenance", "print how a job came to its results: inputs, rule, software, device, figures")
    text = "come to a job's results again, write them to a folder, send nothing, and say what differs"
    again = command("reproduce", text)
    again.add_argument("--out", type=Path, required=True, metavar="DIR", help="an empty folder, or one to be made")
    again.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N; without it, as the configuration has it")


def _later(name: str) -> Callable[[argparse.Namespace], int]:
    """Run `jobs_cli`'s function of that name: every other command would pay for what it imports."""

    def run(arguments: argparse.Namespace) -> int:
        from dicomnode import jobs_cli

        done: int = getattr(jobs_cli, name)(arguments)
        return done

    return run
