"""`baton demo`: a whole cluster, a few answers at once, who ran what, and nothing left behind."""

import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.client import astream, async_client, text_of, trace_of
from cluster.errors import ClusterError
from cluster.launch import Remains
from cluster.plan import size
from cluster.running import running
from cluster.topology import Topology

TOPOLOGY = Path(__file__).parents[1] / "configs" / "topologies" / "local.yaml"
PROMPTS = (
    "Once upon a time there was a king who had three daughters, and the youngest",
    "Deep in the forest stood a little house, and in the house lived",
    "The old woman opened the door and said to the boy:",
    "When the sun went down, the dwarfs came home from the mountain and",
    "Far out in the sea, where the water is as blue as the cornflower,",
    "The fox looked up at the raven in the tree and",
)
MAX_TOKENS = 48
_SHM = Path("/dev/shm")


@dataclass(slots=True)
class Story:
    """One prompt and what became of it."""

    prompt: str
    text: str = ""
    trace: dict[str, Any] | None = None

    async def run(self, client: httpx.AsyncClient, model: str, seed: int) -> None:
        body = {
            "model": model, "prompt": self.prompt, "max_tokens": MAX_TOKENS, "temperature": 0.7, "seed": seed,
            "ignore_eos": True,
        }  # fmt: skip
        async for chunk in astream(client, "/v1/completions", body):
            self.text += text_of(chunk)
            self.trace = trace_of(chunk) or self.trace


class Stage:
    """All stories, as they grow."""

    def __init__(self, stories: list[Story]) -> None:
        self.stories = stories

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        told = Table.grid(padding=(0, 1, 1, 0))
        for number, story in enumerate(self.stories, 1):
            text = Text(f"{story.prompt}", style="bold").append(" ".join(story.text.splitlines()), style="not bold")
            told.add_row(Text(str(number), style="cyan"), text)
        yield Group(told, self._figures())

    def _figures(self) -> Table:
        table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
        for column in ("", "prefill", "decode", "KV moved", "TTFT", "TPOT"):
            table.add_column(column, justify="left" if column in ("", "prefill", "decode") else "right")
        for number, story in enumerate(self.stories, 1):
            if (trace := story.trace) is not None:
                table.add_row(
                    Text(str(number), style="cyan"),
                    str(trace["prefill_worker"]),
                    str(trace["decode_worker"]),
                    size(trace["kv_bytes"]),
                    _ms(trace["ttft_ms"]),
                    _ms(trace["tpot_ms"]),
                )
        return table


def demo(console: Console) -> None:
    """Start, stream, stop, and prove that nothing is left; ``ClusterError`` if anything of that fails."""
    name = f"demo-{os.getpid()}"
    topology = Topology.load(TOPOLOGY).with_overrides({"gateway.port": 0, "cluster.name": name})
    before, started = _left_behind(), time.monotonic()
    ended: list[Remains] = []
    console.print("[bold]Baton[/] - 1 gateway, 1 router, 2 prefill and 2 decode workers on this machine's CPU")
    with running(topology, console, source=TOPOLOGY, on_end=ended.append) as (cluster, _):
        console.print(f"ready at {cluster.url} after {time.monotonic() - started:.0f} s\n")
        stories = [Story(prompt) for prompt in PROMPTS]
        asyncio.run(_stream(console, cluster.url, cluster.plan.served_model_name, stories))
        console.print()
    left = [*ended[0].items, *sorted(_left_behind() - before)]
    if left:
        raise ClusterError(f"left behind: {', '.join(left)}")
    console.print("stopped; no process, socket file or shared memory is left behind")


async def _stream(console: Console, url: str, model: str, stories: list[Story]) -> None:
    stage = Stage(stories)
    async with async_client(url) as client:
        with Live(stage, console=console, refresh_per_second=12, vertical_overflow="visible"):
            async with asyncio.TaskGroup() as tasks:
                for seed, story in enumerate(stories):
                    tasks.create_task(story.run(client, model, seed))


def _left_behind() -> set[str]:
    """Children of this process, and shared memory by a name of ours or Ray's."""
    children = {f"process {child.pid}" for child in psutil.Process().children(recursive=True)}
    named = {str(path) for path in _SHM.glob("*") if path.name.startswith(("baton", "plasma", "ray"))}
    return children | named


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} ms" if value >= 10 else f"{value:.1f} ms"
