"""Who worked when, as inline SVG: one lane a worker, one bar an event, no script and nothing fetched."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from stretto.errors import OptionError

__all__ = ["timeline"]

LEFT, TOP, LANE, BAR = 90.0, 34.0, 46.0, 30.0
COLOURS = ("#4269d0", "#efb118", "#3ca951", "#ff725c", "#6cc5b0", "#a463f2")

Event = tuple[str, str, float, float]  # worker, what, start and end in seconds


def timeline(events: Sequence[Event], *, title: str = "", width: int = 960) -> str:
    """The SVG of ``events``; lanes in the order in which workers first appear. OptionError when there is none."""
    if not events:
        raise OptionError("events", "an empty list", "at least one (worker, what, start, end)")
    lanes = list(dict.fromkeys(e[0] for e in events))
    kinds = list(dict.fromkeys((e[0], _kind(e[1])) for e in events))
    begin, end = min(e[2] for e in events), max(e[3] for e in events)
    scale = (width - LEFT - 16) / max(end - begin, 1e-9)
    height = TOP + LANE * len(lanes) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" width="{width}" '
        f'font-family="system-ui, sans-serif" font-size="12" role="img" aria-label="{escape(title)}">',
        f'<rect width="{width}" height="{height:.0f}" fill="#fff"/>',
        f'<text x="8" y="20" font-size="14" fill="#222">{escape(title)}</text>',
    ]
    for i, lane in enumerate(lanes):
        y = TOP + LANE * i
        parts.append(f'<text x="8" y="{y + 20:.0f}" fill="#222">{escape(lane)}</text>')
        parts.append(f'<rect x="{LEFT}" y="{y + BAR + 6:.0f}" width="{width - LEFT - 16:.0f}" height="1" fill="#ddd"/>')
    for worker, what, start, stop in events:
        x, w = LEFT + (start - begin) * scale, max(1.0, (stop - start) * scale)
        y = TOP + LANE * lanes.index(worker)
        colour = COLOURS[kinds.index((worker, _kind(what))) % len(COLOURS)]
        label = f"{worker}: {what}, {1e3 * (start - begin):.2f} to {1e3 * (stop - begin):.2f} ms"
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.0f}" width="{w:.1f}" height="{BAR:.0f}" fill="{colour}" fill-opacity="0.85">'
            f"<title>{escape(label)}</title></rect>"
        )
    foot = TOP + LANE * len(lanes) + 16
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = LEFT + share * (width - LEFT - 16)
        anchor = "start" if share == 0 else "end" if share == 1 else "middle"
        value = f"{1e3 * share * (end - begin):.1f} ms"
        parts.append(f'<text x="{x:.0f}" y="{foot:.0f}" fill="#666" text-anchor="{anchor}">{value}</text>')
    parts.append(_legend(kinds, foot + 18))
    parts.append("</svg>")
    return "\n".join(parts)


def _kind(what: str) -> str:
    """What an event is called without its numbers: equal kinds share a colour."""
    return "rows" if what.endswith(" rows") else what


def _legend(kinds: Sequence[tuple[str, str]], y: float) -> str:
    out, x = [], LEFT
    for i, (worker, kind) in enumerate(kinds):
        text = f"{worker}: {kind}"
        out.append(f'<rect x="{x:.0f}" y="{y - 9:.0f}" width="10" height="10" fill="{COLOURS[i % len(COLOURS)]}"/>')
        out.append(f'<text x="{x + 14:.0f}" y="{y:.0f}" fill="#222">{escape(text)}</text>')
        x += 30 + 7 * len(text)
    return "".join(out)
