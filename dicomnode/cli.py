"""The command line: the one room that wires the others together. Nothing imports it."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from dicomnode import config as configuration
from dicomnode import jobs_parser, rules_parser
from dicomnode.errors import ConfigError, LocalError, NodeError

log = logging.getLogger("dicomnode")

DESCRIPTION = """
A DICOM node that pairs the series of a study by rules, registers them, and sends the results to the PACS.
Exit status: 0 done; 1 not done, or not all of it (port, disk, database; nothing to send, files left out, other
results); 2 the configuration or the call is wrong.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may be no text, and a terminal's encoding any
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except NodeError as error:
        print(f"dicomnode: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        log.debug("where it came from", exc_info=error)
        print(f"dicomnode: {error.filename or 'trouble'}: {error.strerror or error}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dicomnode", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"dicomnode {metadata.version('dicomnode')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    def config_option(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--config", type=Path, metavar="F", help="configuration file; without it, the defaults")

    config_option(command("serve", _serve, "run listener, scheduler, delivery and one worker, supervised"))
    worker = command("worker", _worker, "run one registration worker")
    config_option(worker)
    worker.add_argument("--supervised", action="store_true", help="stop when standard input closes")
    indexer = command("indexer", _indexer, "run the indexer: read the headers of what has been received")
    config_option(indexer)
    indexer.add_argument("--supervised", action="store_true", help="stop when standard input closes")
    bring_in = command("import", _import, "bring in the DICOM files of a folder, as if they had been sent")
    bring_in.add_argument("folder", type=Path, metavar="DIR", help="folder, with all that lies below it")
    config_option(bring_in)
    check = command("check", _check, "check the configuration and its rules; exit status 0, or 2 with the reason")
    config_option(check)
    check.add_argument("--schema", action="store_true", help="print the JSON Schema of the configuration")
    status = command("status", _status, "show studies, series, jobs and deliveries, with reasons")
    config_option(status)
    status.add_argument("--json", action="store_true", help="print JSON, with each job's report")
    rules_parser.add_commands(commands)
    jobs_parser.add_commands(commands)
    demo = command("demo", _demo, "run the whole line on a generated study, against a stand-in PACS")
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("demo-out"),
        metavar="DIR",
        help="folder for what it makes: new, empty, or a former demo's (default: demo-out)",
    )
    return parser


def _serve(arguments: argparse.Namespace) -> int:
    from dicomnode.service import serve

    config = configuration.load(arguments.config)
    _log_to_stderr(config.log.level)
    serve(config, arguments.config, _stop_at_signals())
    return 0


def _worker(arguments: argparse.Namespace) -> int:
    config, stop = _as_child(arguments)
    # torch comes in here, in the worker's own process
    from dicomnode.archive import Archive
    from dicomnode.index import Index
    from dicomnode.steps import Steps, require_device
    from dicomnode.workflow import Worker

    require_device(config.worker.device)  # jobs wait until it is there
    index = Index(config.database_url)
    steps = Steps(config, index, Archive(config.data_dir))
    worker = Worker(index, steps.in_order(), executor_id="worker-0", lock_folder=config.data_dir)
    worker.start()
    log.info("worker ready")
    stop.wait()
    worker.stop()
    log.info("worker stopped")
    # The durable engine's threads now wait for ever between two steps, which is what makes the stop clean.
    logging.shutdown()
    os._exit(0)


def _as_child(arguments: argparse.Namespace) -> tuple[configuration.Config, threading.Event]:
    """What every child process of `serve` begins with: its configuration, and when to stop."""
    config = configuration.load(arguments.config)
    _log_to_stderr(config.log.level)
    stop = _stop_at_signals()
    if arguments.supervised:
        threading.Thread(target=_stop_at_end_of_input, args=(stop,), daemon=True).start()
    return config, stop


def _indexer(arguments: argparse.Namespace) -> int:
    config, stop = _as_child(arguments)
    from dicomnode import volumes
    from dicomnode.archive import Archive
    from dicomnode.index import Index
    from dicomnode.indexer import Indexer, run
    from dicomnode.model import DuplicatePolicy

    index = Index(config.database_url)
    archive = Archive(config.data_dir)
    policy = DuplicatePolicy(config.node.duplicates)
    run(Indexer(index, archive, volumes.instance_header, duplicates=policy), stop)
    index.close()
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from dicomnode.archive import Archive
    from dicomnode.importing import import_folder
    from dicomnode.index import open_index
    from dicomnode.service import intake_of

    config = configuration.load(arguments.config)
    _log_to_stderr("warning")
    if not arguments.folder.is_dir():
        raise ConfigError("import", "DIR", str(arguments.folder), "a folder")
    index = open_index(config.database_url, create=True)
    intake = intake_of(config, Archive(config.data_dir), index)
    intake.start()
    imported = refused = 0
    try:
        for path, reason in import_folder(arguments.folder, intake, called_ae_title=config.node.ae_title):
            imported += not reason
            refused += bool(reason)
            if reason:
                print(f"{_printable(path)}: not imported: {reason}", file=sys.stderr)
    finally:
        intake.stop()
        index.close()
        print(f"imported {imported} instances, {refused} files not imported")
    return 1 if refused else 0


def _printable(path: Path) -> str:
    """A path as it is, or quoted where a terminal or a reader of lines would stumble over it."""
    return str(path) if str(path).isprintable() else repr(str(path))


def _check(arguments: argparse.Namespace) -> int:
    if arguments.schema:
        print(json.dumps(configuration.schema(), indent=2))
        return 0
    from dicomnode import rules, rules_cli

    config = configuration.load(arguments.config)
    try:
        _load_tls(config)
    except LocalError as error:
        print(error, file=sys.stderr)
        return 2
    rule_set = rules_cli.check_against(config, rules.load(config.rules_path), str(config.rules_path))
    told = config.warnings()
    if config.worker.device.startswith("cuda"):
        from dicomnode.steps import require_device  # torch comes in here

        try:
            require_device(config.worker.device)
        except LocalError as error:
            told.append(f"{error}; on a machine without it nothing is registered")
    for warning in told:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"ok: {len(config.destinations)} destinations, {len(rule_set.rules)} rules")
    return 0


def _load_tls(config: configuration.Config) -> None:
    """LocalError where a certificate or key cannot be used."""
    from dicomnode.tls import client_context, server_context

    if config.tls is not None:
        server_context(config.tls.certificate, config.tls.key, config.tls.client_ca)
    for destination in config.destinations:
        if destination.tls is not None:
            client_context(destination.tls)


def _status(arguments: argparse.Namespace) -> int:
    from dicomnode.index import open_index

    index = open_index(configuration.load(arguments.config).database_url)
    status = index.status()
    index.close()
    if arguments.json:
        print(json.dumps(status, indent=2, default=str))
    else:
        for name, rows in status.items():
            print(f"{name}: {len(rows)}")
            for row in rows:
                told = {key: value for key, value in row.items() if value not in ("", None)}
                print("  " + "  ".join(f"{key}={value}" for key, value in told.items() if not isinstance(value, dict)))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from dicomnode.demo import run

    return run(arguments.out)


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    for chatty in ("alembic", "dbos", "pynetdicom", "highdicom", "PIL"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))
    # What pydicom warns of quotes the data set, line after line; what matters of it stands in quarantine and reasons.
    logging.getLogger("pydicom").disabled = True  # its level it sets itself
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _stop_at_signals() -> threading.Event:
    """An event that SIGTERM or SIGINT sets; the second one kills at once, as it would have without us."""
    stop = threading.Event()

    def handle(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)
    return stop


def _stop_at_end_of_input(stop: threading.Event) -> None:
    while os.read(0, 4096):  # sys.stdin's own buffer would be locked when the interpreter ends
        pass
    stop.set()
