"""The import table: which room may import which, and which room owns which heavy package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

MAY_IMPORT = {
    "errors": set(),
    "model": set(),
    "remotes": set(),
    "document": {"errors"},
    "outputs": {"document"},
    "fields": set(),
    "destinations": {"document", "fields", "outputs", "remotes", "schedule"},
    "config": {"destinations", "document", "errors", "fields", "remotes", "schedule"},
    "vocabulary": set(),
    "derived": {"model", "vocabulary"},
    "conditions": {"derived", "document", "vocabulary"},
    "rule": {"conditions", "config", "derived", "document", "model", "outputs", "schedule", "thresholds"},
    "rules": {"conditions", "document", "errors", "rule", "vocabulary"},
    "completion": {"model"},
    "scopes": {"derived", "model", "rule"},
    "partners": {"derived", "model", "rule"},
    "findings": {"conditions", "model", "rule", "scopes"},
    "reasons": {"conditions", "derived", "findings", "partners", "rule", "scopes"},
    "trace": {"conditions", "derived", "findings", "model", "partners", "reasons", "rule", "scopes"},
    "pairing": {
        "completion", "conditions", "derived", "findings", "model", "partners", "reasons", "rule", "rules", "scopes",
    },
    "phases": {"errors", "model"},
    "volumes": {"errors", "model", "phases", "registration_engine"},
    "quality": {"registration_engine"},
    "uptake": {"quality", "registration_engine"},
    "thresholds": {"document"},
    "verdict": {"model", "quality", "thresholds"},
    "objects": {"errors", "quality", "uptake", "volumes", "registration_engine"},
    "archive": {"errors", "model", "part10", "spool"},
    "index": {"errors", "model"},
    "pdu": set(),
    "upperlayer": {"pdu"},
    "dimse": {"pdu", "upperlayer"},
    "negotiation": {"pdu"},
    "tls": {"errors", "remotes"},
    "scu": {"dimse", "errors", "model", "part10", "pdu", "remotes", "tls", "upperlayer"},
    "spool": {"errors", "model"},
    "intake": {"archive", "errors", "index", "model", "spool"},
    "part10": set(),
    "importing": {"errors", "intake", "part10", "spool"},
    "stow": {"errors", "intake", "part10", "spool"},
    "web": {"errors", "intake", "spool", "stow"},
    "indexer": {"archive", "errors", "index", "model"},
    "commitment": {"dimse", "errors", "index", "intake", "model", "negotiation", "spool"},
    "messages": {"commitment", "dimse", "errors", "intake", "model", "negotiation", "pdu", "spool", "upperlayer"},
    "listener": {
        "commitment", "errors", "intake", "messages", "negotiation", "part10", "pdu", "spool", "upperlayer",
    },
    "delivery": {"archive", "dimse", "errors", "index", "model", "remotes", "scu", "tls"},
    "scheduler": {
        "archive", "completion", "derived", "errors", "index", "model", "pairing", "remotes", "rule", "rules",
        "trace", "volumes",
    },
    "job_folder": {"archive", "errors", "model", "objects", "quality", "registration_engine", "volumes"},
    "products": {"errors", "job_folder", "model", "objects", "rule", "uptake", "verdict", "volumes"},
    "registering": {
        "errors", "job_folder", "model", "objects", "quality", "rule", "verdict", "volumes",
        "registration_engine",
    },
    "handover": {"archive", "config", "errors", "index", "model", "objects", "rule", "rules"},
    "steps": {
        "archive", "config", "errors", "findings", "handover", "index", "job_folder", "model", "objects", "products",
        "registering", "rule", "rules", "scopes", "volumes", "registration_engine",
    },
    "reproduce": {
        "archive", "errors", "index", "job_folder", "model", "products", "registering", "rules", "registration_engine",
    },
    "workflow": {"errors", "index", "model"},
    "pacs_sources": {"errors", "index", "part10", "remotes"},
    "counts": {"errors", "model", "pacs_sources", "remotes"},
    "retrieve": {"errors", "index", "intake", "model", "pacs_sources", "remotes", "spool"},
    "schedule": {"document"},
    "service": {
        "archive", "commitment", "config", "counts", "delivery", "errors", "index", "intake", "listener", "model",
        "negotiation", "retrieve", "rules", "scheduler", "tls", "web", "workflow",
    },
    "anatomy": set(),
    "phantom": {"anatomy"},
    "demo": {"errors", "part10", "phantom", "remotes", "scu"},
    "jobs_parser": {"jobs_cli"},
    "account": set(),
    "jobs_cli": {
        "account", "archive", "config", "errors", "handover", "index", "model", "reproduce", "rules", "workflow",
    },
    "rules_parser": {"rules_cli"},
    "rules_cli": {
        "account", "config", "destinations", "errors", "findings", "index", "model", "pairing", "partners", "rules",
        "scopes", "trace", "volumes", "workflow",
    },
    "cli": {
        "archive", "config", "demo", "errors", "importing", "index", "indexer", "jobs_parser", "model", "rules",
        "rules_cli", "rules_parser", "service", "steps", "tls", "volumes", "workflow",
    },
    "__main__": {"cli"},
    "__init__": set(),
}  # fmt: skip

OWNERS = {
    "sqlalchemy": {"dicomnode.index.tables", "dicomnode.index", "dicomnode.migrations", "dicomnode.workflow"},
    "fastapi": {"dicomnode.web"},
    "uvicorn": {"dicomnode.web"},
    "python_multipart": {"dicomnode.pacs_sources", "dicomnode.stow"},
    "alembic": {"dicomnode.index"},
    "dbos": {"dicomnode.workflow"},
    "pynetdicom": {"dicomnode.commitment", "dicomnode.pacs_sources", "dicomnode.demo"},
    "highdicom": {"dicomnode.volumes", "dicomnode.objects"},
    "re2": {"dicomnode.conditions", "dicomnode.rules"},
    "torch": {"registration_engine"},
    "gdcm": {"dicomnode.volumes"},
    "PIL": {"dicomnode.demo", "dicomnode.objects", "registration_engine.pictures", "registration_engine.report"},
}
"""Heavy packages and the only rooms that may import them. The workflow shares the index's connections."""


def modules() -> list[Path]:
    return sorted([*(ROOT / "dicomnode").rglob("*.py"), *(ROOT / "registration_engine").rglob("*.py")])


def room_of(path: Path) -> str:
    """`dicomnode/objects/series.py` belongs to room `objects`."""
    return path.relative_to(ROOT / "dicomnode").parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Every module an import names, absolute, lazy and type-checking ones too; relative ones resolved."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names.add(module)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", [p for p in modules() if "dicomnode" in p.parts[len(ROOT.parts)]], ids=str)
def test_a_room_imports_only_the_rooms_below_it(path: Path) -> None:
    room = room_of(path)
    allowed = MAY_IMPORT[room] | {room}

    imported = {
        name.split(".")[1]
        for name in imports_of(path)
        if name.startswith("dicomnode.") and name.split(".")[1] in MAY_IMPORT
    }
    if any(name.split(".")[0] == "registration_engine" for name in imports_of(path)):
        imported.add("registration_engine")

    assert imported <= allowed


@pytest.mark.parametrize("path", modules(), ids=str)
def test_each_heavy_package_has_its_owner(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    imported = {name.split(".")[0] for name in imports_of(path)}

    strangers = {
        package
        for package, owners in OWNERS.items()
        if package in imported and not any(module == o or module.startswith(f"{o}.") for o in owners)
    }

    assert strangers == set()


@pytest.mark.parametrize("path", [p for p in modules() if "registration_engine" in p.parts], ids=str)
def test_the_engine_has_never_heard_of_dicom_networking_sql_or_the_node(path: Path) -> None:
    imported = {name.split(".")[0] for name in imports_of(path)}
    third_party = imported - set(sys.stdlib_module_names) - {
        "registration_engine", "numpy", "safetensors", "torch", "SimpleITK", "PIL",
    }  # fmt: skip

    assert third_party == set()


def test_no_room_imports_the_command_line() -> None:
    assert [r for r, below in MAY_IMPORT.items() if "cli" in below] == ["__main__"]


def test_serving_never_imports_torch() -> None:
    code = "import dicomnode.cli, dicomnode.service, sys; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_a_module_has_no_side_effect() -> None:
    """No thread, no file, no logging handler, no warning filter, no environment change, nothing printed."""
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in modules()]
    importable = [name for name in names if "migrations" not in name and not name.endswith("__main__")]
    code = (
        "import importlib, logging, os, sys, threading, warnings\n"
        # other people's packages bring effects of their own; what counts is what ours add
        "import numpy, pydicom, pynetdicom, highdicom, SimpleITK, sqlalchemy, alembic.command\n"
        "import dbos, pydantic, re2, PIL.Image, torch, yaml, socketserver\n"
        "def state(): return (threading.active_count(), list(logging.getLogger().handlers), list(warnings.filters),\n"
        "                     dict(os.environ), sorted(os.listdir('.')), os.getcwd(), numpy.geterr(),\n"
        "                     torch.get_num_threads(), torch.is_grad_enabled())\n"
        "for name in sys.argv[1:]:\n"
        "    before = state()\n"
        "    importlib.import_module(name)\n"
        "    if before != state(): print(name)\n"
    )

    done = subprocess.run([sys.executable, "-c", code, *importable], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (0, ""), done.stderr
