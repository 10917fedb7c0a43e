"""Runs on a host: streams requests, many at once, and tells in JSON lines when one begins and how it ended.

``python -m tests.hosts.client URL REQUESTS CONCURRENCY [KEY]``; a line of REQUESTS is a body for /v1/completions.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import httpx

BEGUN = 10
"""Pieces of text after which a stream has begun."""


async def main(url: str, requests: Path, concurrency: int, key: str = "none") -> None:
    bodies = enumerate(json.loads(line) for line in requests.read_text().splitlines())
    headers = {"authorization": f"Bearer {key}"}
    async with (
        httpx.AsyncClient(base_url=url, timeout=120, trust_env=False, headers=headers) as client,
        asyncio.TaskGroup() as tasks,
    ):
        for _ in range(concurrency):
            tasks.create_task(work(client, bodies))


async def work(client: httpx.AsyncClient, bodies: Any) -> None:
    for number, body in bodies:
        text, pieces, error = "", 0, ""
        try:
            async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
                if response.status_code != 200:
                    error = (await response.aread()).decode()
                    continue
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    error = error or json.dumps(chunk.get("error", ""))[1:-1]
                    for choice in chunk.get("choices", ()):
                        text += choice["text"]
                        pieces += 1
                    if pieces == BEGUN:
                        tell(begun=number)
        except httpx.HTTPError as failure:
            error = repr(failure)
        finally:
            tell(ended=number, text=text, error=error)


def tell(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    where, file, at_once, *rest = sys.argv[1:]
    asyncio.run(main(where, Path(file), int(at_once), *rest))
