"""Numbers and names as people read them, on charts and on the page alike."""

from __future__ import annotations

from unicodedata import category

#: What stands in for a figure that is not known.
UNKNOWN = "-"


def clean(words: str) -> str:
    """Text from anywhere that can be written: what has no shape becomes a mark.

    Args:
        words: May hold control characters, halves of surrogate pairs or marks that turn the
            direction of writing. A line break stays.
    """
    return "".join(c if _has_shape(c) else "\N{REPLACEMENT CHARACTER}" for c in words)


def _has_shape(character: str) -> bool:
    # Python calls every space but one unprintable, the ideographic one too.
    return character.isprintable() or character == "\n" or category(character) == "Zs"


def label(words: str, longest: int = 24) -> str:
    """A name as a chart shows it: on one line, cut where it is long, never taken for a formula."""
    line = clean(" ".join(words[: 8 * longest].split()))
    cut = line if len(line) <= longest else line[: longest - 1] + "…"
    return cut.replace("$", r"\$")


def number(value: float) -> str:
    """Two or three digits that count: 0.0012, 0.012, 0.500, 1.23, 12.3, 123, 1,234."""
    size = abs(value)
    if size >= 1e7 or 0 < size < 1e-4:
        return f"{value:.2e}"
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 1:
        return f"{value:.{1 if size >= 10 else 2}f}"
    if size >= 0.01:
        return f"{value:.3f}"
    return f"{value:#.2g}" if value else "0"


def milliseconds(seconds: float | None) -> str:
    """A time as people compare them: "1.23 ms"."""
    return UNKNOWN if seconds is None else f"{number(1e3 * seconds)} ms"


def percent(share: float | None, digits: int = 1) -> str:
    """A share in [0, 1] as "96.0 %"; what is neither none nor all is never shown as such."""
    if share is None:
        return UNKNOWN
    smallest: float = 10**-digits
    if 0 < 100 * share < smallest / 2:
        return f"< {smallest:g} %"
    if 100 - smallest / 2 <= 100 * share < 100:
        return f"> {100 - smallest:g} %"
    return f"{100 * share:.{digits}f} %"
