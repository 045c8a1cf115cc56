"""Our tar headers are tarfile's, byte for byte, and are read as tarfile reads them."""

from __future__ import annotations

import tarfile

from hypothesis import given
from hypothesis import strategies as st

from utilgen_cli.shards.reader import plain_header
from utilgen_cli.shards.writer import tar_header

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_/.-]{0,90}[a-z]", fullmatch=True)


def oracle(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


@given(NAMES, st.integers(0, 8**11 - 1))
def test_a_header_is_the_one_of_tarfile(name: str, size: int) -> None:
    block = tar_header(name, size)
    assert block == oracle(name, size)
    found = plain_header(block)
    assert found is not None
    assert (found.name, found.size, found.isreg()) == (name, size, True)


@given(NAMES, st.integers(0, 8**11 - 1), st.integers(0, 511), st.integers(1, 255))
def test_what_is_not_plain_is_left_to_tarfile(name: str, size: int, at: int, flip: int) -> None:
    """A header with a damaged byte is never read otherwise than tarfile reads it."""
    damaged = bytearray(tar_header(name, size))
    damaged[at] ^= flip
    found = plain_header(bytes(damaged))
    if found is not None:
        theirs = tarfile.TarInfo.frombuf(bytes(damaged), "utf-8", "surrogateescape")
        assert (found.name, found.size, found.type) == (theirs.name, theirs.size, theirs.type)


def test_long_names_take_the_prefix_of_ustar() -> None:
    name = "a" * 60 + "/" + "b" * 60 + ".png"
    assert tar_header(name, 5) == oracle(name, 5)
    assert plain_header(tar_header(name, 5)) is None


def test_digits_that_are_not_octal_are_left_to_tarfile() -> None:
    for at in (130, 150):
        damaged = bytearray(tar_header("a.png", 5))
        damaged[at] = ord("9")
        assert plain_header(bytes(damaged)) is None
