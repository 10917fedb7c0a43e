"""Promise: the load of a chaos run asks again where nothing has come, goes on where something has, and else says so."""

import asyncio
import json

import pytest

from cluster.chaos.catalogue import Case
from cluster.chaos.core.answers import Answer, Verdict
from cluster.chaos.load import Load, Stream
from cluster.chaos.recorder import Recorder

HEADERS = "HTTP/1.1 200 OK\r\nx-request-id: 77\r\ntransfer-encoding: chunked\r\n\r\n"
FIRST, SECOND = (
    {"choices": [{"index": 0, "text": text, "token_ids": [token], "finish_reason": finish}]}
    for text, token, finish in (("a", 5, None), ("b", 6, "length"))
)


def event(id: str, chunk: dict[str, object]) -> str:
    data = f"id: {id}\ndata: {json.dumps(chunk)}\n\n"
    return f"{len(data):x}\r\n{data}\r\n"


END = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
WHOLE = HEADERS + event("1", FIRST) + event("2", SECOND) + END
REST = HEADERS + event("2", SECOND) + END


async def asked(*responses: str) -> tuple[Stream, list[str]]:
    """What became of one stream of a gateway that answers so, one connection after the other; what it was asked."""
    paths, waiting = [], list(responses)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        paths.append(head.split()[1].decode())
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                await reader.readexactly(int(line.split()[1]))
        writer.write(waiting.pop(0).encode())
        writer.close()

    streams: list[Stream] = []
    case = Case("case", "/v1/completions", {"max_tokens": 2, "temperature": 0}, expected=Answer())
    for chunk in (FIRST, SECOND):
        case.expected.feed(chunk)
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = "http://{}:{}".format(*server.sockets[0].getsockname())
        with Recorder(None) as recorder:
            load = Load([url], [case], 1, 0, recorder, on_end=streams.append)
            streams += await load.once([case])
    return streams[0], paths


def test_a_stream_that_broke_before_its_first_event_is_asked_for_again() -> None:
    for nothing in ("", HEADERS, HEADERS + event("1", FIRST)[:20]):
        stream, paths = asyncio.run(asked(nothing, WHOLE))
        assert (stream.verdict, stream.refusals, stream.detail) == (Verdict.SAME, 1, "")
        assert paths == ["/v1/completions"] * 2
        assert [url for _, url in stream.cuts] == ([stream.gateway] if nothing else [])


def test_a_stream_that_broke_after_an_event_goes_on_after_it() -> None:
    stream, paths = asyncio.run(asked(HEADERS + event("1", FIRST), REST))
    assert (stream.verdict, stream.attached) == (Verdict.SAME, 1)
    assert paths == ["/v1/completions", "/v1/streams/77?after=1"]


@pytest.mark.parametrize("again", [WHOLE, HEADERS + END], ids=["repeated", "missing"])
def test_what_is_repeated_or_missing_is_no_good_end(again: str) -> None:
    stream, _ = asyncio.run(asked(HEADERS + event("1", FIRST), again))
    assert stream.verdict is not Verdict.SAME
