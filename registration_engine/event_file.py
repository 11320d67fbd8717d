"""Scalars for TensorBoard, written without it: one file of events per piece of a run.

Every piece opens with the step it begins at, and TensorBoard forgets what an earlier, killed piece wrote beyond.

References
----------
TensorFlow, `core/lib/io/record_writer.h` (frames and their checksums), `core/util/event.proto` (fields of an event).
"""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping
from pathlib import Path

_VERSION = b"brain.Event:2"
_WALL_TIME, _STEP, _FILE_VERSION, _SUMMARY, _SESSION_LOG = 1, 2, 3, 5, 7  # fields of Event
_STARTED = b"\x08\x01"  # SessionLog.status = START
_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5  # wire types


class EventFile:
    """Scalars by tag and step, in the order they are written."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in order of their names.
        self._file = (folder / f"events.out.tfevents.{time.time_ns():020}").open("xb")
        self._write(0, _field(_FILE_VERSION, _VERSION))
        self._write(first_step, _field(_SESSION_LOG, _STARTED))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One event of all values; a tag is "group/name"."""
        parts = (
            _field(1, _field(1, tag.encode()) + _key(2, _FLOAT) + struct.pack("<f", value))
            for tag, value in values.items()
        )
        self._write(step, _field(_SUMMARY, b"".join(parts)))

    def flush(self) -> None:
        """Hand everything written so far to the system."""
        self._file.flush()

    def close(self) -> None:
        """Nothing can be written afterwards."""
        self._file.close()

    def _write(self, step: int, what: bytes) -> None:
        event = _key(_WALL_TIME, _DOUBLE) + struct.pack("<d", time.time()) + _key(_STEP, _VARINT) + _varint(step) + what
        length = struct.pack("<Q", len(event))
        self._file.write(length + _checksum(length) + event + _checksum(event))


def _key(field: int, wire_type: int) -> bytes:
    return bytes([field << 3 | wire_type])


def _field(field: int, content: bytes) -> bytes:
    return _key(field, _BYTES) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def _checksum(content: bytes) -> bytes:
    """CRC-32C, turned by 15 bits and shifted by a constant, as the frames have it."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _crc_of_byte(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_TABLE = [_crc_of_byte(byte) for byte in range(256)]
