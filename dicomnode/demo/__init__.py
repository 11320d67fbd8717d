"""`dicomnode demo`: a generated study through the whole line, judged by what a stand-in PACS received.

Writes into one folder: study/ (what is sent), node.yaml and rules.yaml, dicomnode-data/ (the node's), node.log,
received/ (what came back), quality/ (its pages of quality as PNG) and before-after.png. Starts the node as a user
would, and leaves nothing running.
"""

from __future__ import annotations

import shutil
import signal
import sys
import time
from pathlib import Path

from dicomnode.demo.evaluation import Evaluation, evaluate, read_received
from dicomnode.demo.picture import draw_before_after, draw_pages
from dicomnode.demo.processes import DemoError, RunningNode, StandInPacs, send
from dicomnode.phantom import PhantomStudy, write_study

SEED = 1
MEAN_BELOW_MM, P95_BELOW_MM, START_ABOVE_MM = 1.0, 2.5, 6.0
MARK = ".dicomnode-demo"
"""In every folder a demonstration has run in: nothing else is ever replaced."""
OWN_NAMES = (
    "study",
    "received",
    "dicomnode-data",
    "node.yaml",
    "rules.yaml",
    "node.log",
    "quality",
    "before-after.png",
)


def run(folder: Path) -> int:
    """Run the demonstration in `folder`; results of a former one there are replaced.

    Returns
    -------
    int
        0 where everything was delivered and the result is good enough; 1 with a line for each thing that is not.
    """
    started = time.monotonic()
    former = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that `with` blocks end
    try:
        problems = _demonstrate(folder.absolute())
    except DemoError as error:
        problems = [str(error)]
    finally:
        signal.signal(signal.SIGTERM, former)
    for problem in problems:
        print(f"FAILED: {problem}", flush=True)
    print(f"{'failed' if problems else 'passed'} after {time.monotonic() - started:.0f} s; see {folder}", flush=True)
    return 1 if problems else 0


def _demonstrate(folder: Path) -> list[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not (folder / MARK).exists():
            raise DemoError(f"{folder}: got a folder that holds something else, expected an empty one or a new name")
        (folder / MARK).touch()
    except OSError as error:
        raise DemoError(f"{folder}: {error.strerror}; expected a folder to write to") from None
    for name in OWN_NAMES:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    _say("drawing a two-phase contrast CT of a breathing body")
    study = write_study(folder / "study", SEED)
    with StandInPacs(folder / "received") as pacs, RunningNode(folder, pacs.port) as node:
        _say(f"stand-in PACS on port {pacs.port}, node on port {node.port}")
        node.wait_until_it_answers()
        for name, files in (("native", study.fixed_files), ("portal venous", study.moving_files)):
            began = time.monotonic()
            send(files, node.port)
            _say(f"sent the {name} series: {len(files)} instances in {time.monotonic() - began:.1f} s")
        status = node.wait_until_delivered(_say)
        exit_status = node.stop()
    try:
        received = read_received(pacs.files())
        evaluation = evaluate(study, received)
    except ValueError as error:
        raise DemoError(f"what the PACS received cannot be used: {error}") from error
    picture = folder / "before-after.png"
    draw_before_after(study, received.registered, picture)
    draw_pages(received.pages(), folder / "quality")
    _print_table(study, evaluation, status["jobs"][0])
    print("\nThe stand-in PACS received")
    for line in received.inventory():
        print(f"  {line}")
    print(f"\nPictures: {picture}, {folder / 'quality'}", flush=True)
    problems = _problems(evaluation)
    return problems if exit_status == 0 else [*problems, f"the node's exit status: got {exit_status}, expected 0"]


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def _print_table(study: PhantomStudy, evaluation: Evaluation, job: dict[str, object]) -> None:
    print(f"\nError at {len(study.landmarks_mm)} landmarks (organ borders, forks of vessels) against the known motion")
    print(f"  {'':8}{'mean':>10}{'95th':>10}{'largest':>10}   mm")
    for name, error in (("before", evaluation.before), ("after", evaluation.after)):
        print(f"  {name:8}{error.mean_mm:10.2f}{error.p95_mm:10.2f}{error.largest_mm:10.2f}")
    print(f"\nFolding of the delivered field   {100 * evaluation.folding_fraction:.4f} % of its cells")
    print(f"Smallest local volume change     {evaluation.smallest_determinant:.2f}")
    print(
        "Mutual information with native   "
        f"{evaluation.similarity_before:.3f} before, {evaluation.similarity_after:.3f} after (normalized)"
    )
    report = job.get("report")
    seconds = report.get("seconds", {}) if isinstance(report, dict) else {}
    stages = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    print(f"Seconds of registration          {sum(seconds.values()):.1f} ({stages or 'not told by the node'})")
    print(f"Verdict                          {job.get('verdict')} {job.get('reason') or ''}")


def _problems(evaluation: Evaluation) -> list[str]:
    """What is not good enough, each with got and expected."""
    before, after = evaluation.before, evaluation.after
    gained = evaluation.similarity_after - evaluation.similarity_before
    checks = (
        (before.mean_mm > START_ABOVE_MM, "mean error before", before.mean_mm, f"above {START_ABOVE_MM} mm"),
        (after.mean_mm < MEAN_BELOW_MM, "mean error after", after.mean_mm, f"below {MEAN_BELOW_MM} mm"),
        (after.p95_mm < P95_BELOW_MM, "95th percentile after", after.p95_mm, f"below {P95_BELOW_MM} mm"),
        (evaluation.folding_fraction == 0, "folded share of the field", evaluation.folding_fraction, "none"),
        (gained > 0, "gain of mutual information", gained, "above 0"),
    )
    poor = [f"{what}: got {got:.4g}, expected {expected}" for good, what, got, expected in checks if not good]
    return [*evaluation.missing, *poor]
