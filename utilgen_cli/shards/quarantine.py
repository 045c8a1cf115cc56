"""Bad samples in whole streams: stop at the first, or put each aside, count it and go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .sample import BadSample, Sample

MAX_LISTED = 1000
SHOWN = 3  # keys a reason, in the line for people
Check = Callable[[Sample], object]  # raises BadSample


def check_labelled(sample: Sample) -> None:
    """BadSample unless image, label and facts can be read."""
    from .images import decode_rgb

    decode_rgb(sample)
    _ = sample.label, sample.facts


def check_any(sample: Sample) -> None:
    """BadSample unless what is there can be read: all images, label, facts."""
    from .images import check_images

    check_images(sample)
    if "cls" in sample.members:
        _ = sample.label
    _ = sample.facts


@dataclass
class Quarantine:
    """With `skip`, samples that fail a check are left out; without, the first one is the error.

    Only single samples are ever skipped: a stream that is cut or has lost its structure ends the
    run, because nobody knows what is missing.
    """

    skip: bool = False
    checks: tuple[Check, ...] = (check_labelled,)
    reasons: Counter[str] = field(default_factory=Counter)
    listed: dict[str, str] = field(default_factory=dict)  # where: reason, of the first 1,000
    seen: set[int] = field(default_factory=set)

    def reject(self, error: BadSample) -> None:
        """Put a sample aside, or raise."""
        if not self.skip:
            raise error
        where = hash(error.what)
        if where in self.seen:  # read a second time
            return
        self.seen.add(where)
        self.reasons[error.reason] += 1
        if len(self.listed) < MAX_LISTED:
            self.listed[error.what] = error.reason

    def screen(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """The samples that pass all checks. Without `skip` their reader finds the bad ones."""
        for sample in samples:
            try:
                for check in self.checks if self.skip else ():
                    check(sample)
            except BadSample as error:
                self.reject(error)
            else:
                yield sample

    def take(self) -> dict[str, Any]:
        """What was left out, as JSON; counting begins anew."""
        counts = {"reasons": dict(self.reasons), "listed": self.listed}
        self.reasons, self.listed = Counter(), {}
        return counts

    def add(self, counts: dict[str, Any]) -> None:
        """Add what was taken."""
        self.reasons.update(counts["reasons"])
        for where, reason in counts["listed"].items():
            self.seen.add(hash(where))
            if len(self.listed) < MAX_LISTED:
                self.listed[where] = reason

    def settings(self) -> dict[str, str]:
        """What an output directory's settings say of it: nothing where all is as always."""
        return {"on_error": "skip"} if self.skip else {}

    def summary(self) -> dict[str, Any]:
        """For --json: {} without `skip`, else counts, and where the first 1,000 stand."""
        if not self.skip:
            return {}
        found = {"samples": self.reasons.total(), "reasons": dict(sorted(self.reasons.items()))}
        return {"quarantined": {**found, "where": self.listed}}

    def line(self) -> str | None:
        """For people: how many were left out, and why."""
        if not self.reasons:
            return None
        parts = [f"{count} {reason} ({self._some(reason)})" for reason, count in self._sorted()]
        return f"left out {self.reasons.total()} bad samples: {'; '.join(parts)}"

    def _sorted(self) -> list[tuple[str, int]]:
        return sorted(self.reasons.items(), key=lambda entry: (-entry[1], entry[0]))

    def _some(self, reason: str) -> str:
        where = [w for w, r in self.listed.items() if r == reason]
        more = ", ..." if self.reasons[reason] > SHOWN else ""
        return ", ".join(where[:SHOWN]) + more
