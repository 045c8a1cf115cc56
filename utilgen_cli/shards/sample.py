"""One sample: a key and its members, in the order in which they stand in the tar."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from types import NoneType
from typing import Any

from ..runtime.errors import BadInput, is_text

IMAGE_TYPES = ("png", "jpg", "jpeg", "webp")
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_/-]*")
TEXTS = {"prompt": (str, NoneType), "model": (str, NoneType), "class_name": (str, int, NoneType)}
REMEDY = "Repair or remove it, then run again."
SHOWN = 6  # members that a message names
MAX_KEY = 80  # bytes: key and member name then fit a plain ustar header


def numbered_key(class_index: int, number: int) -> str:
    """The key of image `number` of a class."""
    return f"{class_index:04d}-{number:06d}"


class BadSample(BadInput):
    """One sample is bad in a stream that is whole; `reason` is what samples are counted by."""

    reason = "unreadable"


@dataclass(slots=True)
class Sample:
    """`members` maps a name without its dot (`png`, `cls`, `utility.json`) to the bytes."""

    key: str
    members: dict[str, bytes]
    origin: str = ""  # file and offset, for messages

    def with_member(self, name: str, data: bytes) -> Sample:
        """The same sample with one member more (or replaced); the others stay byte for byte."""
        return Sample(self.key, {**self.members, name: data}, self.origin)

    def parsed(self, name: str) -> dict[str, Any]:
        """Member `name` as a JSON object; BadInput if it is missing or no object."""
        try:
            value = json.loads(self._member(name), parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise self.bad(f"its {name} member is not JSON") from None
        if not isinstance(value, dict):
            raise self.bad(f"its {name} member is not a JSON object")
        return value

    @property
    def facts(self) -> dict[str, Any]:
        """The `json` member ({} where there is none); a `class_name` in it is text."""
        if "json" not in self.members:
            return {}
        facts = self.parsed("json")
        for name, kinds in TEXTS.items():
            value = facts.get(name)
            if not isinstance(value, kinds) or (isinstance(value, str) and not is_text(value)):
                raise self.bad(f"the {name} in its json is no text")
        named = facts.pop("class_name", None)
        return facts if named is None else {**facts, "class_name": str(named)}

    @property
    def label(self) -> int:
        """The class index in `cls`."""
        text = self._member("cls").strip()
        if not text.isdigit() or len(text) > 9:
            raise self.bad("its cls member is not a class number")
        return int(text)

    @property
    def image(self) -> tuple[str, bytes]:
        """(type, bytes) of the image member."""
        for name in IMAGE_TYPES:
            if name in self.members:
                return name, self.members[name]
        why = f"it has no image member ({', '.join(IMAGE_TYPES)})"
        raise self.bad(f"{why}, only {self._listed()}", "no image")

    def _member(self, name: str) -> bytes:
        if name not in self.members:
            raise self.bad(f"it has no {name} member, only {self._listed()}")
        return self.members[name]

    def _listed(self) -> str:
        names = list(self.members)
        return ", ".join(names[:SHOWN]) + " and others" * (len(names) > SHOWN)

    @property
    def place(self) -> str:
        """Where it stands, for people."""
        where = f"{self.origin}: " if self.origin else ""
        return f"{where}sample {self.key}"

    def bad(self, why: str, reason: str = BadSample.reason) -> BadSample:
        """The error that says what is wrong with this sample and where it stands."""
        error = BadSample(self.place, why, REMEDY)
        error.reason = reason
        return error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def check_key(key: str) -> str:
    """The key itself; ValueError where it breaks the contract of DESIGN section 4."""
    if len(key) > MAX_KEY or not _KEY.fullmatch(key):
        raise ValueError(f"bad key {key[:100]!r}")
    return key
