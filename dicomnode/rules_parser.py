"""The options of the commands about rules. Law: light; what a command does is imported when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

Subparsers = Any


def add_commands(commands: Subparsers) -> None:
    """Add the commands to the command line's."""

    def command(parent: Subparsers, name: str, run: str, text: str) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = parent.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=_later(run))
        sub.add_argument("--config", type=Path, metavar="F", help="configuration file; without it, the defaults")
        return sub

    text = "check, keep, try and compare pairing rules"
    group = commands.add_parser("rules", help=text, description=text, allow_abbrev=False)
    parent = group.add_subparsers(required=True, metavar="ACTION")
    command(
        parent, "check", "check_file", "check a file of rules; exit status 0, or 2 with every mistake"
    ).add_argument("file", type=Path, help="YAML, see docs/rules.md")
    put = command(parent, "import", "import_file", "put a file of rules in force, without a restart")
    put.add_argument("file", type=Path, help="YAML, see docs/rules.md")
    put.add_argument("--comment", metavar="TEXT", default="", help="why, for the history")
    for name, run, text in (
        ("export", "export", "print rules as they were written"),
        ("list", "list_rules", "list the rules of a version"),
    ):
        command(parent, name, run, text).add_argument(
            "--version", type=int, metavar="N", help="a version; without it, the one in force"
        )
    command(parent, "history", "history", "list every version that was in force")
    diff = command(parent, "diff", "diff", "what changed between two versions")
    diff.add_argument("old", type=int, nargs="?", help="a version; without it, the version before the one in force")
    diff.add_argument("new", type=int, nargs="?", help="a version; without it, the one in force")
    back = command(parent, "rollback", "rollback", "put an earlier version in force again, as a new version")
    back.add_argument("version", type=int, help="its number; `rules history` lists them")
    back.add_argument("--comment", metavar="TEXT", default="", help="why, for the history")
    test = command(parent, "test", "test", "tell which pairs rules would make, with every condition; changes nothing")
    test.add_argument("--rules", type=Path, metavar="F", help="file of rules; without it, those in force")
    which = test.add_mutually_exclusive_group()
    which.add_argument("--study", metavar="UID", help="on what was received of the patient of this study")
    which.add_argument("--last", default="7d", metavar="TIME", help="on what came within 7d, 12h, 30m (default 7d)")
    which.add_argument("--dicom", type=Path, metavar="DIR", help="on the DICOM files of a folder")
    test.add_argument("--brief", action="store_true", help="pairs and reasons only, no conditions")
    test.add_argument("--json", action="store_true", help="print JSON")
    why = command(commands, "why", "why", "tell why a series or study was paired as it was, with every condition")
    why.add_argument("uid", help="a Series or Study Instance UID")
    why.add_argument("--json", action="store_true", help="print JSON")
    settle = command(commands, "settle", "settle", "list what the rules could not decide, or decide one item")
    settle.add_argument("item", type=int, nargs="?", help="number of the item; without it, all open ones are listed")
    settle.add_argument("--fixed", metavar="UID", help="series that stays; UID#N names volume N of a series")
    settle.add_argument(
        "--moving", metavar="UID", action="append", default=[], help="series brought onto it; repeatable"
    )


def _later(name: str) -> Callable[[argparse.Namespace], int]:
    """Run `rules_cli`'s function of that name: every other command would pay for what it imports."""

    def run(arguments: argparse.Namespace) -> int:
        from dicomnode import rules_cli

        done: int = getattr(rules_cli, name)(arguments)
        return done

    return run
