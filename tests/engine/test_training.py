import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine import bodies
from safetensors.torch import load_file

from registration_engine import PRESETS, checkpoint
from registration_engine.checkpoint import network_of
from registration_engine.cli import main
from registration_engine.distill import distill
from registration_engine.errors import InvalidRequestError
from registration_engine.files import write_volume
from registration_engine.train import train
from registration_engine.training_config import TrainingConfig, read_config

CPU = torch.device("cpu")
SHIPPED = Path(__file__).parents[2] / "deploy" / "training"


def config(out: Path, **changes) -> TrainingConfig:
    values = {
        "model": "student",
        "out": out,
        "shape": (16, 16, 16),
        "epochs": 1,
        "pairs_per_epoch": 5,
        "learning_rate": 1e-3,
        "checkpoint_every": 2,
        "steps_per_pair": 1,
        "validate_every": 4,
        "validation_pairs": 1,
    }
    return TrainingConfig(**{**values, **changes})


def run(training, settings: TrainingConfig, **options):
    return training(settings, device=CPU, report=lambda _: None, **options)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


class KilledError(Exception):
    pass


@pytest.mark.parametrize("training", [train, distill])
def test_a_run_killed_and_resumed_is_the_uninterrupted_run(tmp_path: Path, training, monkeypatch) -> None:
    run(train, config(tmp_path / "teacher", model="teacher", epochs=1, pairs_per_epoch=1))
    extra = {"teacher": str(tmp_path / "teacher" / "state.safetensors"), "lambda_dist": 1.0, "lambda_truth": 0.1}
    whole, pieces = (config(tmp_path / name, **extra) for name in ("whole", "pieces"))
    run(training, whole)

    from registration_engine import train as room

    original, calls = room.synthetic_pair, []

    def until_killed(seed: int, index: int, *rest):
        calls.append(index)
        if len(calls) == 4:  # step 3 is in the log, only step 2 is saved
            raise KilledError
        return original(seed, index, *rest)

    monkeypatch.setattr(room, "synthetic_pair", until_killed)
    with pytest.raises(KilledError):
        run(training, pieces)
    monkeypatch.setattr(room, "synthetic_pair", original)
    stopped = run(training, pieces, time_limit_s=0.001)
    finished = run(training, pieces)

    assert calls == [0, 1, 2, 3]
    assert not stopped.is_complete
    assert finished.is_complete
    first, second = (load_file(c.out / "state.safetensors") for c in (whole, pieces))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert rows(whole.out / "log.csv") == rows(pieces.out / "log.csv")
    assert [r["step"] for r in rows(pieces.out / "log.csv")] == list("12345")
    assert rows(whole.out / "validation.csv") == rows(pieces.out / "validation.csv")


def test_a_process_killed_again_and_again_ends_with_the_weights_of_one_left_alone(tmp_path: Path) -> None:
    lines = ("shape = [16, 16, 16]", "epochs = 1", "pairs_per_epoch = 12", "validation_pairs = 1", "report_every = 1")
    for name in ("whole", "pieces"):
        settings = ('model = "student"', f'out = "{tmp_path / name}"', *lines, "checkpoint_every = 2")
        (tmp_path / f"{name}.toml").write_text("\n".join(settings))
    command = [sys.executable, "-m", "registration_engine.training_cli", "train", "--device", "cpu", "--config"]

    def piece(name: str, killed_after: int | None) -> None:
        with subprocess.Popen([*command, str(tmp_path / f"{name}.toml")], stdout=subprocess.PIPE, text=True) as child:
            for number, _ in enumerate(child.stdout):
                if number == killed_after:
                    child.kill()
                    break
        assert child.returncode == (0 if killed_after is None else -9)

    for killed_after in (2, 5, None):
        piece("pieces", killed_after)
    piece("whole", None)

    first, second = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "pieces"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert rows(tmp_path / "whole" / "log.csv") == rows(tmp_path / "pieces" / "log.csv")
    assert len(list((tmp_path / "pieces" / "tensorboard").iterdir())) == 3


def test_a_run_begins_at_the_weights_it_is_given_and_refuses_those_of_another_network(
    tmp_path: Path, monkeypatch
) -> None:
    first = tmp_path / "first" / "state.safetensors"
    run(train, config(tmp_path / "first", pairs_per_epoch=2))
    still = {"pairs_per_epoch": 1, "learning_rate": 0.0, "start": str(first), "seed": 9}

    run(train, config(tmp_path / "second", **still))

    before, after = (network_of(str(tmp_path / n / "state.safetensors"), device=CPU) for n in ("first", "second"))
    assert all(torch.equal(weight, after.state_dict()[name]) for name, weight in before.state_dict().items())
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path / "weights")
    assert checkpoint.publish(tmp_path / "second" / "state.safetensors").steps == 3
    run(train, config(tmp_path / "fourth", **{**still, "start": "student"}))
    assert checkpoint.publish(tmp_path / "fourth" / "state.safetensors").steps == 4
    with pytest.raises(InvalidRequestError, match="is of another architecture"):
        run(train, config(tmp_path / "third", model="teacher", **still))


def test_the_learning_rate_falls_to_half_in_so_many_steps_and_stays_without() -> None:
    falling, steady = (config(Path("x"), halve_every=every) for every in (100, 0))

    assert [falling.learning_rate_at(n) for n in (0, 50, 100, 300)] == pytest.approx(
        [1e-3, 1e-3 / 2**0.5, 5e-4, 1.25e-4]
    )
    assert steady.learning_rate_at(10**6) == 1e-3


def test_training_on_one_pair_again_and_again_finds_its_displacement(tmp_path: Path) -> None:
    weights = {"lambda_truth": 0.1, "lambda_smooth": 0.1, "seed": 4}
    run(train, config(tmp_path, epochs=1, pairs_per_epoch=1, steps_per_pair=20, **weights))

    log = rows(tmp_path / "log.csv")
    assert len(log) == 20
    assert min(float(row["truth"]) for row in log) < 0.85 * float(log[0]["truth"])
    assert float(log[-1]["loss"]) < float(log[0]["loss"])


def test_real_pairs_are_validated_on_where_they_are_there(tmp_path: Path) -> None:
    on = bodies.grid((24, 24, 24), (5.0, 5.0, 5.0))
    for name, amplitude in (("fixed", 0.0), ("moving", 10.0)):
        write_volume(tmp_path / f"{name}.nii.gz", bodies.volume(on, through=bodies.breathing(amplitude)))
    pairs = (("fixed.nii.gz", "moving.nii.gz"), ("fixed.nii.gz", "lost.nii.gz"))
    told: list[str] = []
    settings = config(tmp_path / "run", data=str(tmp_path), real_pairs=pairs, epochs=1, pairs_per_epoch=1)

    train(settings, device=CPU, report=told.append)

    (row,) = rows(tmp_path / "run" / "validation-real.csv")
    assert float(row["similarity_before"]) > 0
    assert float(row["similarity_after"]) > 0
    assert sum("lost.nii.gz is not there" in line for line in told) == 1


def test_a_folder_of_another_run_is_refused_and_kept(tmp_path: Path) -> None:
    run(train, config(tmp_path, pairs_per_epoch=1))
    before = (tmp_path / "state.safetensors").read_bytes()

    with pytest.raises(InvalidRequestError, match=r"learning_rate = 0\.001, the configuration 0\.01"):
        run(train, config(tmp_path, pairs_per_epoch=1, learning_rate=0.01))

    assert (tmp_path / "state.safetensors").read_bytes() == before


def test_a_damaged_state_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_bytes(b"nothing of use")

    with pytest.raises(InvalidRequestError, match=r"state\.safetensors: cannot be read as a training state"):
        run(train, config(tmp_path))


def test_a_teacher_is_a_frozen_network(tmp_path: Path) -> None:
    run(train, config(tmp_path, epochs=1, pairs_per_epoch=1))

    network = network_of(str(tmp_path / "state.safetensors"), device=CPU)

    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("epochs = 0", "key 'epochs': got 0, expected a whole number of 1 or more"),
        ('learning_rate = "fast"', "key 'learning_rate': got 'fast', expected a number of 0 or more"),
        ("shape = [32, 32, 30]", r"key 'shape': got \[32, 32, 30\], expected three multiples of 16"),
        ("bf16 = 1", "key 'bf16': got 1, expected true or false"),
        ("lamda_sim = 1.0", "unknown key 'lamda_sim', expected one of model, out"),
        ('real_pairs = [["a.nii"]]', r"key 'real_pairs': got \[\['a.nii'\]\], expected a list of \[fixed, moving\]"),
        ("seed = [", "no valid TOML"),
    ],
)
def test_a_wrong_configuration_is_refused_with_file_key_got_and_expected(
    tmp_path: Path, line: str, complaint: str
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f'model = "teacher"\nout = "x"\n{line}\n')

    with pytest.raises(InvalidRequestError, match=f"run.toml: {complaint}"):
        read_config(path)


def test_a_configuration_needs_a_model_and_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('model = "teacher"\n')

    with pytest.raises(InvalidRequestError, match="key 'out' is missing"):
        read_config(path)
    with pytest.raises(InvalidRequestError, match="/dev/zero: cannot be read"):
        read_config(Path("/dev/zero"))


def test_the_shipped_configurations_are_the_papers_schedule() -> None:
    teacher, student = (read_config(SHIPPED / f"{name}-paper.toml") for name in ("teacher", "student"))

    assert (teacher.epochs, teacher.pairs_per_epoch, teacher.learning_rate) == (300, 500, 1e-4)
    assert (student.epochs, student.pairs_per_epoch, student.learning_rate) == (500, 500, 1e-4)
    assert teacher.lambda_truth == student.lambda_truth == 0
    assert student.teacher == str(teacher.out / "state.safetensors")
    assert {read_config(SHIPPED / f"{name}-cpu.toml").model for name in ("teacher", "student")} == {
        "teacher",
        "student",
    }


def test_training_networks_and_tuning_need_torch_numpy_and_safetensors_alone() -> None:
    code = (
        "import sys\n"
        "for name in ('SimpleITK', 'pydicom', 'yaml', 'PIL', 'pydantic', 'scipy'): sys.modules[name] = None\n"
        "sys.argv = ['x', 'models', '--json']\n"
        "import registration_engine.tuning, registration_engine.engine\n"
        "from registration_engine.training_cli import main\n"
        "sys.exit(main())\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), list)


def test_a_piece_ends_with_its_own_exit_status_and_the_last_with_zero(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    text = (
        'model = "student"\nout = "run"\nshape = [16, 16, 16]\nepochs = 1\npairs_per_epoch = 2\nvalidation_pairs = 1\n'
    )
    Path("run.toml").write_text(text)
    command = ["train", "--config", "run.toml", "--device", "cpu"]

    for never in ("nan", "0"):
        with pytest.raises(SystemExit, match="2"):
            main([*command, "--time-limit", never])
    assert main([*command, "--time-limit", "0.001"]) == 4
    assert main([*command, "--time-limit", "1000"]) == 0

    told = capsys.readouterr().out
    assert re.search(r"step 1 of 2, loss -?\d\.\d+, 0:00:\d\d left", told)
    assert "student: step 1 of 2" in told


def test_published_weights_are_what_load_model_loads(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path / "weights")
    run(train, config(tmp_path, epochs=1, pairs_per_epoch=1))
    state = tmp_path / "state.safetensors"

    row = checkpoint.publish(state)

    loaded = checkpoint.load_model("student")
    assert [row] == checkpoint.models()
    assert (row.name, row.parameters, row.steps, row.sha256) == ("student", 237_443, 1, loaded.sha256)
    expected = network_of(str(state), device=CPU).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.network.state_dict().items())
    path = tmp_path / "weights" / row.file
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(InvalidRequestError, match=f"sha256 [0-9a-f]+, expected {row.sha256}"):
        checkpoint.load_model("student")
    with pytest.raises(InvalidRequestError, match="got 'teacher', expected one of student"):
        checkpoint.load_model("teacher")


def test_a_model_published_while_another_loads_is_loaded_whole_and_the_old_file_goes(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path / "weights")
    for seed in (1, 2):
        run(train, config(tmp_path / str(seed), epochs=1, pairs_per_epoch=1, seed=seed))
    first = checkpoint.publish(tmp_path / "1" / "state.safetensors")
    told, read = [], checkpoint.models

    def published_meanwhile() -> list[checkpoint.ShippedModel]:
        rows = read()
        if not told:
            told.append(rows)
            checkpoint.publish(tmp_path / "2" / "state.safetensors")
        return rows

    monkeypatch.setattr(checkpoint, "models", published_meanwhile)

    loaded = checkpoint.load_model("student")

    (second,) = read()
    assert told == [[first]]
    assert loaded.sha256 == second.sha256 != first.sha256
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == ["manifest.json", second.file]
    (tmp_path / "weights" / second.file).unlink()
    with pytest.raises(InvalidRequestError, match=f"its file {second.file} is not there"):
        checkpoint.load_model("student")


def test_the_shipped_weights_are_whole_small_and_described() -> None:
    rows = checkpoint.models()

    assert [row.name for row in rows] == ["student", "teacher"]
    assert sum((checkpoint.WEIGHTS / row.file).stat().st_size for row in rows) < 4_000_000
    card = (checkpoint.WEIGHTS / "MODEL_CARD.md").read_text()
    for row in rows:
        assert checkpoint.load_model(row.name).sha256 == row.sha256
        assert row.sha256 in card
        assert re.search(rf"\b{row.steps} steps?\b", card)
        assert PRESETS[f"paper-{row.name}"].model == row.name
