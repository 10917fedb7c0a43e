"""A file of records: each is some bytes behind their length (32 bits, little-endian), so that what a killed writer
leaves behind can be read up to its last whole record."""

from collections.abc import Iterator
from typing import BinaryIO

_LENGTH_BYTES = 4


def write_record(file: BinaryIO, record: bytes) -> int:
    """Append ``record`` (under 4 GiB); the bytes that it takes."""
    file.write(len(record).to_bytes(_LENGTH_BYTES, "little"))
    file.write(record)
    return _LENGTH_BYTES + len(record)


def read_records(file: BinaryIO) -> Iterator[bytes]:
    """Every record, but for one at the end that is not whole."""
    while True:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        record = file.read(length)
        if not length or len(record) < length:
            return
        yield record
