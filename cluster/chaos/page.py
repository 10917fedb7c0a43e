"""A chaos run as one HTML page that needs nothing else: its figures, and what happened when as SVG. ``picture`` is the
first of its pictures alone."""

import html
import math
from collections.abc import Sequence

from cluster.chaos.core.answers import Verdict
from cluster.chaos.core.faults import Kind
from cluster.chaos.core.report import Memory, Report

VIOLATIONS = 20
"""Of the checker's that are told of."""
WIDTH, HEIGHT, LEFT, TOP = 1000, 200, 56, 14
LANE = 13
"""Height of a kind of fault's own line below the tokens."""
NICE = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
"""Ends of axes, times a power of ten."""
COLOURS = {
    Kind.KILL: "#d1242f",
    Kind.STOP: "#bf6a02",
    Kind.CUT: "#8250df",
    Kind.SLOW: "#1a7f37",
    Kind.CORRUPT: "#bf3989",
    Kind.HEAD: "#0a7ea4",
}
LINES = ("#0969da", "#1a7f37", "#bf6a02", "#8250df", "#bf3989", "#57606a", "#d1242f", "#116329")

_COLOURS = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #656d76; --paper: #ffffff; --line: #d0d7de; --flow: #0969da; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #8d96a0; --paper: #0d1117; --line: #30363d; --flow: #58a6ff; }
}
"""
_TEXT = "svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }"
_STYLE = (
    f"{_COLOURS}{_TEXT}"
    """
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1060px;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: 0; } h2 { font-size: 1rem; margin: 2rem 0 .3rem; }
p { color: var(--soft); margin: .2rem 0 1rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1.2rem 0; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: .5rem 1rem; min-width: 6rem; }
.tile b { display: block; font-size: 1.5rem; } .tile span { color: var(--soft); font-size: .85rem; }
.bad b { color: #d1242f; } .good b { color: #1a7f37; }
svg { width: 100%; height: auto; }
table { border-collapse: collapse; } td { padding: .15rem 1.2rem .15rem 0; vertical-align: top; }
td:first-child { color: var(--soft); white-space: nowrap; }
.key { color: var(--soft); font-size: .85rem; } .key i { display: inline-block; width: .8em; height: .8em;
  border-radius: 2px; margin: 0 .3em 0 1em; vertical-align: -.05em; }
"""
)


def page(found: Report, rows: Sequence[tuple[str, str]] = ()) -> str:
    """``rows``: its figures in words."""
    counts = [("streams", sum(found.tally.verdicts.values()), False), ("faults", len(found.strikes), False)]
    counts += [("resumes", found.tally.resumes, False)]
    counts += [(each.value, found.count(each), True) for each in Verdict if each is not Verdict.SAME]
    counts += [("leaked", len(found.leaked), True), ("growing", len(found.growing), True)]
    tiles = "".join(_tile(name, count, judged=judged) for name, count, judged in counts)
    table = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(text)}</td></tr>" for name, text in rows)
    problems = "".join(f"<li>{html.escape(text)}</li>" for text in [*found.problems, *found.violations[:VIOLATIONS]])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>baton chaos: {html.escape(found.topology)}</title>
<style>{_STYLE}</style></head><body>
<h1>baton chaos {html.escape(found.topology)}</h1>
<p>{found.seconds:.0f} s, a fault every {found.every:g} s, {found.concurrency} requests at a time, seed {found.seed};
every stream compared with its failure-free run</p>
<div class="tiles">{tiles}</div>
{f"<ul>{problems}</ul>" if problems else ""}
<h2>Tokens a second at the clients</h2>
{_flow(found)}
<h2>From a fault to the stream's next token, seconds</h2>
{_resumes(found)}
<h2>Private memory of each process, MB</h2>
{_memory(found)}
{_growths(found)}
<h2>Figures</h2>
<table>{table}</table>
</body></html>
"""


def _tile(name: str, count: int, *, judged: bool) -> str:
    look = ("bad" if count else "good") if judged else ""
    return f'<div class="tile {look}"><b>{count}</b><span>{name}</span></div>'


def picture(found: Report) -> str:
    """The tokens a second, with the faults, as an SVG file."""
    style = f"<style>{_COLOURS} svg {{ background: var(--paper); }} {_TEXT}</style>"
    head, rest = _flow(found).split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg">{style}{rest}'


def _nice(most: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(most))
    return next(step * power for step in NICE if step * power >= most)


class _Plane:
    """Seconds and values to places in the picture."""

    def __init__(self, seconds: float, most: float) -> None:
        self.seconds, self.most = max(seconds, 1e-9), _nice(max(most, 1e-9))

    def x(self, at: float) -> float:
        return round(LEFT + (WIDTH - LEFT) * at / self.seconds, 1)

    def y(self, value: float) -> float:
        return round(TOP + HEIGHT * (1 - value / self.most), 1)

    def line(self, points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{self.x(at)},{self.y(value)}" for at, value in points)

    def svg(self, content: str, label: str, lanes: int = 0) -> str:
        """With axes around it, and room for ``lanes`` between the values and the seconds."""
        end = TOP + HEIGHT + lanes * LANE
        steps = [self.most * part / 4 for part in range(5)]
        ticks = "".join(
            f'<line x1="{LEFT}" x2="{WIDTH}" y1="{self.y(step)}" y2="{self.y(step)}" stroke="var(--line)"/>'
            f'<text x="{LEFT - 6}" y="{self.y(step) + 4}" text-anchor="end">{step:,.10g}</text>'
            for step in steps
        )
        every = next(step for step in (5, 10, 30, 60, 120, 300, 600, 1e9) if self.seconds / step <= 12)
        marks = "".join(
            f'<text x="{self.x(n * every)}" y="{end + 16}" text-anchor="middle">{n * every:g} s</text>'
            for n in range(int(self.seconds // every) + 1)
        )
        size = f"0 0 {WIDTH + 20} {end + 24}"
        return f'<svg viewBox="{size}" role="img" aria-label="{label}">{ticks}{content}{marks}</svg>'


def _marks(found: Report, plane: _Plane, kinds: Sequence[Kind]) -> str:
    """Every fault, as long as it lasted: faint behind the tokens, and on the line of its kind."""
    marks = [
        f'<text x="{LEFT - 6}" y="{_lane(lane) + LANE - 3}" text-anchor="end">{kind.value}</text>'
        for lane, kind in enumerate(kinds)
    ]
    for strike in found.strikes:
        begin, colour = strike.began - found.began, COLOURS[strike.fault.kind]
        lasted = strike.fault.seconds or ((strike.restarted or strike.began) - strike.began)
        left = plane.x(begin)
        width = max(2.0, plane.x(min(begin + lasted, found.seconds)) - left)
        title = html.escape(f"{strike.fault.kind.value} {strike.fault.victim} at {begin:.1f} s, {lasted:.1f} s")
        bar = f'<rect x="{left}" width="{width:.1f}" fill="{colour}"'
        lane = _lane(kinds.index(strike.fault.kind))
        marks.append(
            f'<g><title>{title}</title>{bar} y="{TOP}" height="{HEIGHT}" opacity=".1"/>'
            f'{bar} y="{lane + 2}" height="{LANE - 4}" rx="1"/></g>'
        )
    return "".join(marks)


def _lane(number: int) -> float:
    return TOP + HEIGHT + number * LANE + 2


def _flow(found: Report) -> str:
    plane = _Plane(found.seconds, max((rate for _, rate in found.tokens_per_second), default=1.0))
    kinds = sorted({strike.fault.kind for strike in found.strikes})
    points = plane.line(found.tokens_per_second)
    flow = f'<polyline points="{points}" fill="none" stroke="var(--flow)" stroke-width="1.3"/>'
    return plane.svg(_marks(found, plane, kinds) + flow, "tokens a second over time, with faults", len(kinds))


def _resumes(found: Report) -> str:
    resumed = found.tally.resumed
    plane = _Plane(found.seconds, max((resume.seconds for resume in resumed), default=1.0))
    dots = "".join(
        f'<circle cx="{plane.x(each.at - found.began)}" cy="{plane.y(each.seconds)}" r="3" fill="{COLOURS[each.kind]}">'
        f"<title>{each.kind.value} of a {each.role} worker: {each.seconds:.2f} s</title></circle>"
        for each in resumed
    )
    return plane.svg(dots, "seconds from a fault to the next token, for every stream that was resumed")


def _memory(found: Report) -> str:
    most = max((max(each.bytes) for each in found.memory if each.bytes), default=1) / 1e6
    plane = _Plane(found.seconds, most)
    names = sorted({each.name for each in found.memory})
    colours = {name: LINES[number % len(LINES)] for number, name in enumerate(names)}
    lines = "".join(_memory_line(plane, each, colours[each.name]) for each in found.memory)
    key = "".join(f'<i style="background:{colours[name]}"></i>{html.escape(name)}' for name in names)
    return f'<p class="key">{key}</p>' + plane.svg(lines, "private memory of each process over time")


def _growths(found: Report) -> str:
    """A table: every process that was watched for long enough, the fastest growing first."""
    rows = "".join(
        f"<tr><td>{html.escape(each.name)} ({each.pid})</td><td>{growth:+.3f} MB/min</td>"
        f"<td>from {each.times[0]:.0f} s to {each.times[-1]:.0f} s</td></tr>"
        for each, growth in sorted(found.judged, key=lambda pair: -pair[1])
    )
    return f"<table>{rows}</table>"


def _memory_line(plane: _Plane, memory: Memory, colour: str) -> str:
    points = [(at, size / 1e6) for at, size in zip(memory.times, memory.bytes, strict=True)]
    title = f"<title>{html.escape(memory.name)} ({memory.pid}): {memory.growth:+.2f} MB/min</title>"
    return (
        f'<polyline points="{plane.line(points)}" fill="none" stroke="{colour}" stroke-width="1.5">{title}</polyline>'
    )
