"""Read samples from tar streams, and never take a cut stream for a whole one.

tarfile, GNU tar and webdataset all read a tar that was cut between two members as complete.
Here the end mark (two zero blocks) is required, as POSIX has it.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from typing import BinaryIO, NoReturn

from ..runtime.errors import BadInput
from .sample import BadSample, Sample, check_key
from .sums import Sums

BLOCK = 512
ZEROS = bytes(BLOCK)
MAX_MEMBER = 1 << 30  # bytes: a member is held in memory
PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
MAX_EXTENSION = 1 << 20  # bytes of a pax or long-name header
MAX_EXTENSIONS = 16  # blocks and bodies of such headers before one member
MAX_SAMPLE = 1 << 30  # bytes of a sample's members together
MAX_MEMBERS = 256  # of a sample
MAX_PADDING = 1 << 26  # zero bytes after an end mark
KEY_RULE = "Keys are ASCII letters, digits, _, / and -, 80 bytes at most."
WHAT_TO_DO = "Make it again, or copy it again if the copy broke off."
PACKED = {  # how compressed files begin: whose, and what unpacks them
    b"\x1f\x8b": ("gzip", "gunzip"), b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\xfd7zXZ": ("xz", "unxz"), b"BZh": ("bzip2", "bunzip2"), b"PK\3\4": ("zip", "unzip"),
}  # fmt: skip


def plain_header(block: bytes) -> tarfile.TarInfo | None:
    """A regular file's header of the usual kind, at a tenth of tarfile's time; else None."""
    if block[156:157] != tarfile.REGTYPE or block[257:262] != b"ustar" or block[345]:
        return None
    size, total = block[124:135], block[148:154]
    if (size + total).strip(b"01234567") or block[135] not in b"\0 " or block[154]:
        return None
    if sum(block) - sum(block[148:156]) + 8 * ord(" ") != int(total, 8):
        return None
    name, end, _ = block[:100].partition(b"\0")
    info = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
    info.size = int(size, 8)
    return info if end and name else None


class TarMembers:
    """The members of a tar stream (complete archives may follow one another), with offsets."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name, self.offset = file, name, 0
        self.last = ""  # the last whole member
        self.raw: list[bytes] = []  # what was read since the raw bytes were last taken

    def fail(self, why: str) -> NoReturn:
        place = f"after {self.last}" if self.last else "before the first member"
        raise BadInput(self.name, f"{why} at byte {self.offset}, {place}", WHAT_TO_DO)

    def take_raw(self) -> list[bytes]:
        """The bytes of the last member, headers and padding too (or of what stood before it)."""
        taken, self.raw = self.raw, []
        return taken

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
        self.raw.append(data)
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
                if len(self.raw) > MAX_EXTENSIONS:
                    self.fail("too many extended headers")
                longer.update(self._extension(info))
            elif info.type in PLAIN:
                name = longer.pop("path", info.name)
                size = int(longer.pop("size", info.size))
                if not 0 <= size <= MAX_MEMBER:
                    self.fail(f"member {name[:100]!r} claims {size} bytes")
                data = self.body(size, f"member {name[:100]!r}")
                self.last = name[:100]
                yield name, start, data
                longer.clear()
            elif info.isdir():
                longer.clear()
                self.raw.clear()
            else:
                self.fail(f"member {info.name[:100]!r} is a link, a device or sparse")

    def _padding_or_next(self) -> bytes | None:
        start = self.offset
        while True:
            if self.offset - start > MAX_PADDING:
                self.fail(f"more than {MAX_PADDING:,} zero bytes after an end mark")
            data = self.file.read(BLOCK)
            if not data:
                return None
            self.offset += len(data)
            if len(data) < BLOCK:
                data += self.read(BLOCK - len(data), "a block after the end mark")
            if data != ZEROS:
                return data

    def _header(self, block: bytes) -> tarfile.TarInfo:
        plain = plain_header(block)
        if plain is not None:
            return plain
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            self.offset -= BLOCK
            self._refuse_packed(block)
            self.fail("not a tar header")
        if info.size < 0:
            self.fail("a header with a negative size")
        return info

    def _refuse_packed(self, block: bytes) -> None:
        for begins, (kind, tool) in PACKED.items():
            if self.offset == 0 and block.startswith(begins):
                why, advice = f"is compressed by {kind}, and no tar", f"Unpack it first ({tool})."
                raise BadInput(self.name, why, advice)

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
            if key.startswith(b"GNU.sparse"):
                self.fail("a sparse member")
            if key in (b"path", b"size"):
                found[key.decode()] = value.decode("utf-8", "surrogateescape")
            data = data[int(length) :]
        if "size" in found and not found["size"].isdigit():
            self.fail("a damaged pax header")
        return found if info.type == tarfile.XHDTYPE else {}


def read_tar(file: BinaryIO, name: str) -> Iterator[Sample]:
    """The samples of one tar stream. BadInput: damage, a missing end mark, a broken key."""
    for sample, _ in _grouped(TarMembers(file, name), name, hashed=False):
        yield sample


def read_checked(
    file: BinaryIO, name: str, sums: Sums, reject: Callable[[BadSample], None]
) -> Iterator[Sample]:
    """`read_tar`, where each sample is held to `sums` before it is handed on; `reject` gets those
    that differ."""
    tar = TarMembers(file, name)
    for sample, digest in _grouped(tar, name, hashed=True):
        error = sums.error(sample, digest)
        if error is None:
            yield sample
        else:
            reject(error)
    sums.finish(tar.offset)


def _grouped(tar: TarMembers, name: str, hashed: bool) -> Iterator[tuple[Sample, str]]:
    """Members with the same key as one sample, and the SHA-256 of their bytes in the tar."""
    sample: Sample | None = None
    digest = hashlib.sha256()
    for path, offset, data in tar:
        key, member = _split(path, offset, name)
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample, digest.hexdigest()
            sample, digest = _begin(key, f"{name} at byte {offset}", path), hashlib.sha256()
        _add(sample, member, data)
        for block in tar.take_raw() if hashed else ():
            digest.update(block)
        tar.raw.clear()
    if sample is not None:
        yield sample, digest.hexdigest()


def _add(sample: Sample, member: str, data: bytes) -> None:
    held = sum(map(len, sample.members.values()))
    if member in sample.members:
        why = f"two {member[:40]!r} members"
    elif len(sample.members) == MAX_MEMBERS or held + len(data) > MAX_SAMPLE:
        why = f"more than {MAX_MEMBERS} members or {MAX_SAMPLE:,} bytes"
    else:
        sample.members[member] = data
        return
    raise BadInput(f"{sample.origin}: sample {sample.key}", why, "Repair or remove it.")


def _split(path: str, offset: int, name: str) -> tuple[str, str]:
    """(key, member name) of a path in a tar."""
    directory, slash, base = path.removeprefix("./").rpartition("/")
    stem, dot, member = base.partition(".")
    if not dot or not member:
        raise BadInput(f"{name} at byte {offset}", f"member {path[:100]!r} has no extension",
                       "Pack images with `utilgen pack`.")  # fmt: skip
    return f"{directory}{slash}{stem}", member


def _begin(key: str, origin: str, path: str) -> Sample:
    try:
        check_key(key)
    except ValueError as error:
        raise BadInput(f"{origin}: member {path[:100]!r}", str(error), KEY_RULE) from None
    return Sample(key, {}, origin)
