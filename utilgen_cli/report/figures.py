"""How figures are written: the same in the table on a terminal and in the page."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def percent(value: float | None, digits: int = 1) -> str:
    """`.7312` as `73.1`; an en dash for what is not known."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def mean_std(figure: Row) -> str:
    """`73.1 ± 0.8`, in per cent."""
    std = "" if figure["std"] is None else f" ± {percent(figure['std'])}"
    return percent(figure["mean"]) + std


def signed(value: float) -> str:
    """`+1.3`, in points of per cent."""
    return f"{100 * value:+.1f}".replace("-", "−")


def difference(row: Row) -> str:
    """`+1.3 [+0.2, +2.4]`, in points; a dash for the baseline itself."""
    d = row.get("difference")
    if d is None:
        return "–"
    interval = "" if d["low"] is None else f" [{signed(d['low'])}, {signed(d['high'])}]"
    return signed(d["mean"]) + interval


def p_value(row: Row) -> str:
    """`.034`, `<.001`."""
    p = (row.get("difference") or {}).get("p")
    if p is None:
        return "–"
    return "<.001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def images(row: Row) -> str:
    """`160 + 800`."""
    parts = [n for n in (row["n_real"], row["n_synthetic"]) if n]
    return " + ".join(f"{n:,}" for n in parts)


def duration(seconds: float | None) -> str:
    """`850 ms`, `42 s`, `12.5 min`, `3.2 h`."""
    if seconds is None:
        return "–"
    for limit, size, unit in ((1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 3600:.1f} h"


def share(found: Row | None) -> str:
    """Influence share with its interval: `61.2 [57.9, 64.6]`."""
    if found is None:
        return "–"
    return f"{percent(found['share'])} [{percent(found['low'])}, {percent(found['high'])}]"


def null_share(found: Row | None) -> str:
    """The shuffled-label null of an influence share, as its range."""
    if found is None:
        return "–"
    null = found["null"]
    return f"{percent(null['share'])} [{percent(null['low'])}, {percent(null['high'])}]"


def money(price: float | None) -> str:
    """In whatever the hour was priced in; – where the time is not known."""
    return "–" if price is None else f"{price:.4f}"


def leak_lines(summary: Row) -> list[str]:
    """What was found of the test set in other sets, one line a set that has something.

    Equal keys alone are no finding: sets that are packed or drawn apart all count from 0.
    """
    lines = []
    for name, leak in summary["leaks"].items():
        kinds = (("same_pixels", "exact copies"), ("near", "near copies"))
        found = [f"{leak[kind]} {words}" for kind, words in kinds if leak[kind]]
        if found:
            lines.append(f"{name}: {', '.join(found)} of test images among {leak['n']}")
    if twice := summary["data"].get("validation", {}).get("also_real"):
        lines.append(f"validation: {twice} images are real training images too, and tell less")
    return lines


def comparisons_line(summary: Row) -> str | None:
    """What several p values say together, by Holm's correction."""
    found = [d["p_holm"] for a in summary["arms"] if (d := a.get("difference"))]
    known = [p for p in found if p is not None]
    if len(known) < 2:
        return None
    clear = sum(p < 0.05 for p in known)
    return (
        f"p: each of {len(known)} comparisons by itself; {clear or 'none'} of them below .05 when "
        "corrected for their number (Holm; p_holm in --json)"
    )


def protocol_line(summary: Row) -> str:
    """The protocol in a sentence."""
    p, train = summary["protocol"], summary["protocol"]["train"]
    with_validation = " (validation images included in real)" if p["validation_as_train"] else ""
    return (
        f"{', '.join(p['archs'])} on images of {p['image_size']} pixels; "
        f"{p['seeds']} seeds; {train['steps']} steps of batch {train['batch_size']} for every arm"
        f"{with_validation}; {percent(train['real_share'], 0)} % of a joint batch is real; "
        f"{p['selection']}; {summary['data']['test']['images']:,} test images read once"
    )
