from pathlib import Path

from registration_engine import event_file
from registration_engine.event_file import EventFile

# What TensorBoard 2.20's own RecordWriter makes of the same two events.
STARTED = "100000000000000095fbfe1809000000000000f83f10ac023a020801713b788a"
SCALARS = (
    "33000000000000000ca7205609000000000000f83f10ac022a250a0f0a086c6f672f6c6f7373150000803e"
    "0a120a0b6c6f672f7365636f6e647315000040c0ba096850"
)


def test_events_are_byte_for_byte_what_tensorboard_writes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(event_file.time, "time", lambda: 1.5)

    events = EventFile(tmp_path, first_step=300)
    events.write(300, {"log/loss": 0.25, "log/seconds": -3.0})
    events.close()

    (path,) = tmp_path.iterdir()
    assert "tfevents" in path.name
    assert path.read_bytes().hex().endswith(STARTED + SCALARS)
