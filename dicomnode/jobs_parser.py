"""The options of the commands about jobs and deliveries. Law: light; what a command does is imported when it runs."""

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
    text = "write what a job has made to a folder, as it is or would be sent: for a look before `release`"
    export = command("export", text)
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that is not there yet")
    rerun = command("rerun", "register a job's pairs again, as a new job; former results are superseded")
    rerun.add_argument("--current-rules", action="store_true", help="by the rules in force, not by its own version")
    reject = command("reject", "send nothing of a job, and a rejection note to destinations that have something of it")
    reject.add_argument("--reason", default="", metavar="TEXT", help="why; stands in the note and in `status`")
    _add_delivery_commands(commands)


def _add_delivery_commands(commands: Any) -> None:
    def command(name: str, text: str, job_text: str) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=_later(name))
        sub.add_argument("job", metavar="JOB", nargs="?", help=job_text)
        sub.add_argument("--destination", metavar="NAME", help="to this destination alone")
        sub.add_argument("--config", type=Path, metavar="F", help="configuration file; without it, the defaults")
        return sub

    again = command(
        "resend",
        "send at once what has failed or waits for its next attempt: of a job, an instance, or to a destination",
        "what this job made; id or its beginning",
    )
    again.add_argument("--instance", metavar="UID", help="the instance of this SOP Instance UID alone")
    again.add_argument("--delivered", action="store_true", help="what has arrived, too")
    whole = "what this job made; without it, everything to the destination, now and from now on"
    hold = command("hold", "send nothing more of a job, or to a destination, until `release`", whole)
    hold.add_argument("--reason", metavar="TEXT", default="held by a person", help="shown by `status`")
    whole = "what this job made; without it, whatever `hold --destination` holds"
    command("release", "send what `hold` has held, or what waits for approval", whole)


def _later(name: str) -> Callable[[argparse.Namespace], int]:
    """Run `jobs_cli`'s function of that name: every other command would pay for what it imports."""

    def run(arguments: argparse.Namespace) -> int:
        from dicomnode import jobs_cli

        done: int = getattr(jobs_cli, name)(arguments)
        return done

    return run
