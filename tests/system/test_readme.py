"""README's commands, run: what it tells an administrator to type must work as it stands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def run(line: str) -> subprocess.CompletedProcess[str]:
    """`.venv/bin/x` is this interpreter's `x`, wherever its environment stands."""
    program, *arguments = shlex.split(line)
    assert program.startswith(".venv/bin/")
    path = Path(sys.executable).parent / Path(program).name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=False, cwd=ROOT)


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    for command in ("make demo", "make test"):
        assert command in commands()
        done = subprocess.run(shlex.split(f"{command} --dry-run"), capture_output=True, check=False, cwd=ROOT)
        assert done.returncode == 0


def test_check_runs_as_written() -> None:
    (line,) = [line for line in commands() if "dicomnode check" in line]

    assert run(line).returncode == 0


@pytest.mark.parametrize("line", [c for c in commands() if c.startswith(".venv")])
def test_every_other_command_knows_its_options(line: str) -> None:
    done = run(f"{line} --help")

    assert done.returncode == 0
    for option in re.findall(r"--[a-z-]+", line):
        assert option in done.stdout


def test_every_configuration_key_of_the_table_exists_with_its_default() -> None:
    from dicomnode.config import Config

    defaults = Config()
    rows = re.findall(r"^\| `(.+?)` \| (.*?) \|", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    keys = [key for names, _ in rows for key in re.findall(r"[a-z_]+\.[a-z_]+", names)]
    assert {"node.ae_title", "node.port", "database.url", "worker.preset", "access.mode"} <= set(keys)
    for key in keys:
        section, name = key.split(".")
        assert hasattr(getattr(defaults, section), name), key
    assert (
        f"`{defaults.node.ae_title}`, `{defaults.node.host}`, `{defaults.node.port}`"
        in (ROOT / "README.md").read_text()
    )
    assert f"`max_pdu` {defaults.limits.max_pdu}" in (ROOT / "README.md").read_text()


def test_every_command_of_the_program_is_named() -> None:
    text = (ROOT / "README.md").read_text()

    done = subprocess.run([sys.executable, "-m", "dicomnode", "--help"], capture_output=True, text=True, check=True)

    for name in re.findall(r"^    (\w+) ", done.stdout, flags=re.MULTILINE):
        assert name in text
