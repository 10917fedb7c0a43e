"""Draws one hand-over as it was: the prefill steps and their layers, the KV leaving beside them, decode going on.

    python benchmarks/engine.py --make 135m MODEL
    python benchmarks/handover_picture.py MODEL -o docs/pictures/handover.svg

starts one prefill and one decode worker on this machine, runs a few prompts to warm up, traces others (`baton trace`),
and draws the one with the median share of its transfer hidden. `--trace FILE` draws a trace that is there already.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WIDTH, LEFT, ROW, GAP = 1180, 150, 30, 8
COLOURS = {
    "steps": "#4c78a8", "layers": "#9ecae9", "pushed layers": "#f58518", "transfer": "#ffbf79", "digests": "#b79a20",
    "decode": "#54a24b", "tokens": "#e45756",
}  # fmt: skip
TOPOLOGY = """
model: {model}
dtype: bfloat16
pools:
  - {{name: prefill, role: prefill, replicas: 1, prefill_chunk: {chunk}, resources: {{cpus: 1}}}}
  - {{name: decode, role: decode, replicas: 1, resources: {{cpus: 0.5}}}}
kv: {{block_size: 16, memory: 256MiB, transport: {transport}, enable_prefix_caching: false}}
gateway: {{port: 0}}
"""

Bar = tuple[str, float, float, str, str]
"""Row, begin, end (ms), colour, text."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--trace", type=Path, help="draw this one")
    parser.add_argument("--words", default="", help="to go with it")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--transport", default="shm")
    options = parser.parse_args()
    if options.trace is not None:
        trace, said = json.loads(options.trace.read_bytes()), options.words
    else:
        trace, said = measured(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(picture(trace, said))


def measured(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """A trace, and the words below the picture."""
    sys.path[0] = str(ROOT)  # beside this file there is another `engine`
    from cluster.launch import Cluster
    from cluster.topology import Topology
    from cluster.trace import ask, fetch
    from cluster.validate import check

    with tempfile.TemporaryDirectory() as folder:
        file, model = Path(folder) / "picture.yaml", Path(folder) / options.model.name
        model.mkdir()
        for source in (*(ROOT / "models" / "tiny-llama").glob("tokenizer*"), *options.model.resolve().iterdir()):
            (model / source.name).unlink(missing_ok=True)
            (model / source.name).symlink_to(source)
        fields = {"model": model, "chunk": options.chunk, "transport": options.transport}
        file.write_text(TOPOLOGY.format(**fields))
        traces = []
        with Cluster(check(Topology.load(file))) as cluster:
            for number in range(8):
                prompt = [3 + (7 * number + place) % 1000 for place in range(options.tokens)]
                trace = fetch(cluster.url, ask(cluster.url, prompt, 8))
                if number >= 3:
                    traces.append(trace)
    shares = [trace["otherData"]["transfers"][0]["share_hidden"] for trace in traces]
    print("share hidden:", shares)
    chosen = traces[shares.index(statistics.median_low(shares))]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    said = (
        f"{options.tokens} tokens in chunks of {options.chunk}, {options.transport}, bf16, {options.model.name} shape, "
        f"median of {len(traces)}, {platform.machine()}, commit {commit.strip()}"
    )
    return chosen, said


def bars_of(trace: dict[str, Any]) -> Iterator[Bar]:
    events = trace["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    for event in events:
        if event["ph"] == "M":
            continue
        who, track, name = names[event["pid"]], event["cat"], event["name"]
        begin = event["ts"] / 1e3
        end = begin + event.get("dur", 0.0) / 1e3
        match track, name:
            case "steps", _ if name.startswith("prefill"):
                yield f"{who}: steps", begin, end, COLOURS["steps"], name.removeprefix("prefill ")
            case "layers", _ if who.startswith("prefill"):
                yield f"{who}: layers", begin, end, COLOURS["layers"], ""
            case "pushed layers", _:
                yield f"{who}: KV leaves", begin, end, COLOURS["pushed layers"], ""
            case "transfer", "push" if not event["args"].get("live"):
                yield f"{who}: KV leaves", begin, end, COLOURS["transfer"], ""
            case "digests", _ if who.startswith("decode"):  # of prefill's it is noted when the loop hears of them
                yield f"{who}: digests", begin, end, COLOURS["digests"], ""
            case "steps", _:
                yield f"{who}: steps", begin, end, COLOURS["decode"], ""
            case "tokens", "tokens to the client":
                yield "client: tokens", begin, end, COLOURS["tokens"], ""
            case "transfer", "opened" | "accepted" | "end sent" | "acked":
                yield f"{who}: messages", begin, end, "#666", name
            case "transfer", "blocks promised" | "end arrives" | "verified and acked":
                yield f"{who}: messages", begin, end, "#666", name


def picture(trace: dict[str, Any], said: str) -> str:
    """The SVG: all of the request, and below it the end of its prefill, closer."""
    bars = list(bars_of(trace))
    moved = trace["otherData"]["transfers"][0]
    steps = [bar for bar in bars if bar[3] == COLOURS["steps"]]
    computed = max(bar[2] for bar in steps)
    tokens = sorted(bar[1] for bar in bars if bar[0] == "client: tokens")
    whole = (min(bar[1] for bar in steps) - 5, tokens[1] + 0.06 * tokens[1])
    reach = max(tokens[1] - computed, 4.0)
    close = (computed - 1.5 * reach, computed + 1.35 * reach)
    order = {": steps": 0, ": layers": 1, ": KV leaves": 2, ": digests": 3, ": messages": 4}
    rows = sorted(
        {bar[0] for bar in bars},
        key=lambda row: (["prefill", "decode", "client"].index(row.partition("-")[0].partition(":")[0]),
                         order.get(row[row.index(":"):], 9)),
    )  # fmt: skip
    title = (
        f"{moved['share_hidden']:.1%} of {moved['bytes'] / 2**20:.1f} MiB of KV left while the prompt was computed; "
        f"the last byte {1e3 * moved['seconds_after_prefill']:.1f} ms after it"
    )
    panel = 46 + len(rows) * (ROW + GAP)
    parts = [text(16, 26, title, 15, "bold"), text(16, 46, said, 11)]
    parts += drawn(bars, rows, whole, 74, computed, "the whole request")
    parts += drawn(bars, rows, close, 74 + panel + 26, computed, "the end of its prefill, closer")
    height = 74 + 2 * panel + 40
    style = "font-family: Helvetica, Arial, DejaVu Sans, sans-serif"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" style="{style}">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{height}" fill="white"/>', *parts, "</svg>\n"])


def drawn(
    bars: list[Bar], rows: list[str], span: tuple[float, float], top: int, computed: float, title: str
) -> Iterator[str]:
    """One panel: the bars within ``span`` (ms)."""
    begin, end = span
    scale = (WIDTH - LEFT - 20) / (end - begin)

    def x(time: float) -> float:
        return LEFT + (min(max(time, begin), end) - begin) * scale

    bottom = top + 14 + len(rows) * (ROW + GAP)
    yield text(LEFT, top + 2, title, 12, "bold")
    for number, row in enumerate(rows):
        y = top + 14 + number * (ROW + GAP)
        yield f'<rect x="{LEFT}" y="{y}" width="{WIDTH - LEFT - 20}" height="{ROW}" fill="#f5f5f5"/>'
        yield text(16, y + 19, row, 12)
        free = 0.0
        for _, start, stop, colour, label in sorted((bar for bar in bars if bar[0] == row), key=lambda bar: bar[1]):
            if stop < begin or start > end:
                continue
            width = max(x(stop) - x(start), 1.4)
            edge = ' stroke="white" stroke-width="0.6"' if width > 4 else ""
            yield f'<rect x="{x(start):.1f}" y="{y}" width="{width:.1f}" height="{ROW}" fill="{colour}"{edge}/>'
            outside = stop == start
            if label and (width > 60 or (outside and x(start) > free)):
                at = x(start) + 5
                yield text(at, y + 19, label, 11, colour="#333" if outside else "white")
                free = at + 6.2 * len(label)
    yield line(x(computed), top + 8, bottom, 'stroke="#000" stroke-dasharray="4 3"')
    yield text(x(computed) - 4, top + 2, "prompt computed", 11, anchor="end")
    step = next(size for size in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if (end - begin) / size <= 12)
    tick = (int(begin / step) + 1) * step
    while tick < end:
        yield line(x(tick), top + 12, bottom, 'stroke="#ccc" stroke-width="0.6"')
        yield text(x(tick), bottom + 12, f"{tick} ms", 10, anchor="middle")
        tick += step


def line(x: float, top: float, bottom: float, style: str) -> str:
    return f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}" {style}/>'


def text(
    x: float, y: float, words: str, size: int, weight: str = "normal", *, colour: str = "#111", anchor: str = "start"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{colour}" '
        f'text-anchor="{anchor}">{escape(words)}</text>'
    )


if __name__ == "__main__":
    main()
