"""Read samples from tar streams, and never take a cut stream for a whole one.

tarfile, GNU tar and webdataset all read a tar that was cut between two members as complete.
Here the end mark (two zero blocks) is required, as POSIX has it.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NoReturn

from ..runtime.errors import BadInput
from .sample import Sample, check_key

BLOCK = 512
ZEROS = bytes(BLOCK)
MAX_MEMBER = 1 << 30  # bytes: a member is held in memory
MAX_EXTENSION = 1 << 20  # bytes of a pax or long-name header
KEY_RULE = "Keys are ASCII letters, digits, _, / and -, 80 bytes at most."
WHAT_TO_DO = "Make it again, or copy it again if the copy broke off."


class TarMembers:
    """The members of a tar stream (complete archives may follow one another), with offsets."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name, self.offset = file, name, 0

    def fail(self, why: str) -> NoReturn:
        raise BadInput(self.name, f"{why} at byte {self.offset}", WHAT_TO_DO)

    def read(self, size: int, part: str) -> bytes:
        data = self.file.read(size)
        if len(data) < size:  # a pipe may give less than was asked for
            parts = [data]
            while (missing := size - sum(map(len, parts))) and (more := self.file.read(missing)):
                parts.append(more)
            data = b"".join(parts)
        self.offset += len(data)
        if len(data) < size:
            self.fail(f"the stream ends inside {part}")
        return data

    def body(self, size: int, part: str) -> bytes:
        data = self.read(size + (-size) % BLOCK, part)
        return data[:size] if size % BLOCK else data

    def __iter__(self) -> Iterator[tuple[str, int, bytes]]:
        """(name, offset of the header, bytes) of each regular file."""
        longer: dict[str, str] = {}
        ended = False
        while True:
            start = self.offset
            if ended:  # after an end mark: padding, the end of the file, or one more archive
                block = self._padding_or_next()
                if block is None:
                    return
                ended = False
            else:
                block = self.read(BLOCK, "an archive: its end mark is missing")
            if block == ZEROS:
                if self.read(BLOCK, "its end mark") != ZEROS:
                    self.fail("half an end mark")
                ended = True
                continue
            info = self._header(block)
            if info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
                longer.update(self._extension(info))
            elif info.isreg() and not info.issparse():
                name = longer.pop("path", info.name)
                size = int(longer.pop("size", info.size))
                if not 0 <= size <= MAX_MEMBER:
                    self.fail(f"member {name[:100]!r} claims {size} bytes")
                yield name, start, self.body(size, f"member {name[:100]!r}")
                longer.clear()
            elif info.isdir():
                longer.clear()
            else:
                self.fail(f"member {info.name[:100]!r} is a link, a device or sparse")

    def _padding_or_next(self) -> bytes | None:
        while True:
            data = self.file.read(BLOCK)
            if not data:
                return None
            self.offset += len(data)
            if len(data) < BLOCK:
                data += self.read(BLOCK - len(data), "a block after the end mark")
            if data != ZEROS:
                return data

    def _header(self, block: bytes) -> tarfile.TarInfo:
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            self.offset -= BLOCK
            self.fail("not a tar header")
        if info.size < 0:
            self.fail("a header with a negative size")
        return info

    def _extension(self, info: tarfile.TarInfo) -> dict[str, str]:
        if info.size > MAX_EXTENSION:
            self.fail("an oversized extended header")
        data = self.body(info.size, "an extended header")
        if info.type == tarfile.GNUTYPE_LONGNAME:
            return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
        found = {}
        while data:
            length, space, _ = data.partition(b" ")
            if not space or not length.isdigit() or not len(length) + 3 < int(length) <= len(data):
                self.fail("a damaged pax header")
            key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
            if key in (b"path", b"size"):
                found[key.decode()] = value.decode("utf-8", "surrogateescape")
            data = data[int(length) :]
        if "size" in found and not found["size"].isdigit():
            self.fail("a damaged pax header")
        return found if info.type == tarfile.XHDTYPE else {}


def read_tar(file: BinaryIO, name: str) -> Iterator[Sample]:
    """The samples of one tar stream. BadInput: damage, a missing end mark, a broken key."""
    tar = TarMembers(file, name)
    sample: Sample | None = None
    for path, offset, data in tar:
        path = path.removeprefix("./")
        directory, slash, base = path.rpartition("/")
        stem, dot, member = base.partition(".")
        key = f"{directory}{slash}{stem}"
        if not dot or not member:
            raise BadInput(f"{name} at byte {offset}", f"member {path[:100]!r} has no extension",
                           "Pack images with `utilgen pack`.")  # fmt: skip
        if sample is not None and key == sample.key:
            if member in sample.members:
                raise sample.bad(f"it has two {member[:40]!r} members")
            sample.members[member] = data
            continue
        if sample is not None:
            yield sample
        try:
            check_key(key)
        except ValueError as error:
            raise BadInput(f"{name} at byte {offset}", str(error), KEY_RULE) from None
        sample = Sample(key, {member: data}, f"{name} at byte {offset}")
    if sample is not None:
        yield sample
