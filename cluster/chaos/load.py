"""Steady load on a gateway, every stream of it beside the answer that it should be."""

import asyncio
import itertools
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from secrets import token_hex
from typing import Any

import httpx

from cluster.chaos.catalogue import Case
from cluster.chaos.core.answers import Answer, Comparison, Verdict
from cluster.chaos.recorder import Recorder
from cluster.client import TRACE, credentials
from cluster.errors import ClusterError
from cluster.submit import retry_after

PATIENCE = 60.0
"""Seconds without an event after which a stream is taken for lost; and of refusals before the first."""
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For clients that speak plain HTTP: else each reads every certificate of this machine, which is some MB each time."""
TIMEOUT = httpx.Timeout(connect=5.0, read=PATIENCE, write=30.0, pool=None)
ATTACH_AGAIN = 0.1
"""Seconds until another gateway is asked for the rest of a stream."""
LONG_PAUSE = 0.2
"""Seconds between two events of a stream from which a pause is noted with when it was."""
OK, SERVER_ERROR, UNAVAILABLE = 200, 500, 503
COME_BACK = (429, UNAVAILABLE)


class Broken(Exception):
    """The stream ended before its end. ``status`` 0: the client was told nothing."""

    def __init__(self, message: str, status: int = 0, code: str = "", after: float | None = None) -> None:
        super().__init__(f"{status}: {message}" if status else message)
        self.status, self.code, self.after = status, code, after


class Refused(Broken):
    """Not accepted now: nothing of an answer has come."""


class CutOff(Broken):
    """The response ended in the middle."""


@dataclass(slots=True)
class Stream:
    """What became of one request. Times are seconds of the monotonic clock."""

    case: str
    begun: float
    request: str = ""
    """Its x-request-id."""
    event_id: str = ""
    """Of the last event that came."""
    attached: int = 0
    """How often it went on at another gateway, or over another connection."""
    first: float = 0.0
    """When the first event came."""
    last: float = 0.0
    attempts: int = 1
    refusals: int = 0
    """How often it was told to come back later, or had to ask again for nothing had come."""
    gateway: str = ""
    """The URL of the one whose headers came last."""
    cuts: list[tuple[float, str]] = field(default_factory=list)
    """Connections that broke between headers and first event: when, and of which gateway."""
    verdict: Verdict = Verdict.LOST
    detail: str = ""
    longest_pause: float = 0.0
    """Between two events."""
    pauses: list[tuple[float, float]] = field(default_factory=list)
    """The long ones, also that before the first event: when they began, and how long they were."""


@dataclass(slots=True)
class Load:
    """Asks requests of ``cases``, ``concurrency`` at a time; what comes of those that are compared is
    written down by ``recorder``."""

    urls: list[str]
    """Of all gateways, which are asked in turn."""
    cases: list[Case]
    concurrency: int
    seed: int
    recorder: Recorder
    on_end: Callable[[Stream], None] = lambda stream: None
    """Called with every stream that has come to its end."""
    tokens: int = 0
    """That have come so far."""
    unstable: list[str] = field(default_factory=list)
    """Cases that were left out, and why."""
    in_flight: dict[int, Stream] = field(default_factory=dict)
    _turns: Iterator[int] = field(default_factory=itertools.count)

    async def learn(self, note: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Ask every case while nothing fails, and note what it answers."""
        async with self._client() as client:
            done = itertools.count(1)

            async def stopped(case: Case) -> None:
                if case.stops and "stop" not in case.body:
                    case.stop_in_the_middle((await self._answer(client, case)).samples[0].text)

            async def learned(case: Case) -> None:
                case.expected = await self._answer(client, case)
                note(next(done), len(self.cases))

            await self._each(stopped, self.cases)
            await self._each(learned, self.cases)

    async def confirm(self, note: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Ask every case once more, beside other neighbours and with nothing of it in the prefix caches; leave those
        out whose answers differ: what depends on rounding cannot be told from what a fault changed. ``ClusterError`` if
        they are many."""
        async with self._client() as client:
            done, salt = itertools.count(1), token_hex(8)

            async def again(case: Case) -> None:
                stream = await self._one(client, case, salt=salt)
                if stream.verdict is not Verdict.SAME:
                    self.unstable.append(f"{case.name}: two answers without any fault differ: {stream.detail}")
                    self.cases.remove(case)
                note(next(done), len(self.cases))

            await self._each(again, sorted(self.cases, key=lambda case: case.name[::-1]))
            if len(self.unstable) > len(self.cases) / 8:
                raise ClusterError("\n".join(self.unstable))

    async def run(self, stopping: asyncio.Event) -> None:
        """Until ``stopping``; what has begun is brought to its end."""
        numbers = itertools.count()

        async def work(client: httpx.AsyncClient) -> None:
            while not stopping.is_set():
                number = next(numbers)
                rng = Random(f"{self.seed}/load/{number}")
                # Every other one finds nothing in the prefix caches, so that there are prompts to compute.
                salt = "" if number % 2 else f"{self.seed}-{number}"
                self.on_end(await self._one(client, rng.choice(self.cases), salt=salt))

        async with self._client() as client, asyncio.TaskGroup() as tasks:
            for _ in range(self.concurrency):
                tasks.create_task(work(client))

    async def once(self, cases: list[Case]) -> list[Stream]:
        """Ask these, all at once, and find nothing of them in the prefix caches."""
        salt = token_hex(8)
        async with self._client() as client, asyncio.TaskGroup() as tasks:
            streams = [tasks.create_task(self._one(client, case, salt=salt)) for case in cases]
        return [stream.result() for stream in streams]

    def _client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.concurrency)
        return httpx.AsyncClient(timeout=TIMEOUT, trust_env=False, limits=limits, verify=NO_TLS, headers=credentials())

    async def _each(self, do: Callable[[Case], Any], cases: list[Case]) -> None:
        waiting = iter(cases)

        async def work() -> None:
            for case in waiting:
                await do(case)

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(self.concurrency):
                    tasks.create_task(work())
        except ExceptionGroup as group:  # one is enough to say
            raise group.exceptions[0] from None

    async def _answer(self, client: httpx.AsyncClient, case: Case) -> Answer:
        """Of a case whose answer is not known yet."""
        answer = Answer()
        try:
            async for event in self._events(client, case, "", Stream(case.name, time.monotonic()), 0, answer):
                answer.feed(event)
                case.prompt = _prompt_of(event) or case.prompt
        except (Broken, httpx.HTTPError) as error:
            raise ClusterError(f"{case.name}: no answer although nothing failed: {error!r}") from error
        return answer

    async def _one(self, client: httpx.AsyncClient, case: Case, *, salt: str) -> Stream:
        stream = Stream(case.name, time.monotonic())
        self.in_flight[id(stream)] = stream
        try:
            await self._follow(client, case, salt, stream)
        finally:
            del self.in_flight[id(stream)]
        return stream

    async def _follow(self, client: httpx.AsyncClient, case: Case, salt: str, stream: Stream) -> None:
        refused: Broken | None = None
        while refused is None or time.monotonic() - stream.begun < PATIENCE:
            comparison = Comparison(case.expected)
            broken = await self._compare(client, case, salt, stream, comparison)
            if not isinstance(broken, Refused):
                break
            refused = broken
            stream.refusals += 1
            await asyncio.sleep(broken.after or 0.1)  # as it was asked to
        stream.attempts = comparison.got.attempts
        stream.verdict, stream.detail = comparison.verdict("" if broken is None else str(broken)), comparison.detail

    async def _compare(
        self, client: httpx.AsyncClient, case: Case, salt: str, stream: Stream, comparison: Comparison
    ) -> Broken | None:
        """Ask once; why the answer broke off, if it did."""
        recorder, got = self.recorder, comparison.got
        number = recorder.ask(time.monotonic(), case)
        try:
            async for event in self._events(client, case, salt, stream, number, got):
                before = got.num_tokens
                recorder.get(stream.last, number, case, got, event)
                comparison.feed(event)
                self.tokens += got.num_tokens - before
        except (httpx.TransportError, Broken) as error:
            broken = error if isinstance(error, Broken) else Broken(_told(error))
            if not stream.event_id and isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError):
                now = time.monotonic()
                recorder.leave(now, number, case)
                # Nothing of the answer has come, though its headers may have: whoever asks anew repeats nothing.
                if stream.gateway:
                    stream.cuts.append((now, stream.gateway))
                return Refused(str(broken), after=ATTACH_AGAIN)
            recorder.fail(time.monotonic(), number, case, broken.status, broken.code, broken.after, str(broken))
            return broken
        recorder.end(stream.last, number, got)
        return None

    async def _events(
        self, client: httpx.AsyncClient, case: Case, salt: str, stream: Stream, number: int, got: Answer
    ) -> AsyncIterator[dict[str, Any]]:
        """The chunks of one answer, up to its end; notes in ``stream`` when they came. Where the connection breaks
        after ``got`` it goes on with the rest at whichever gateway has it first."""
        stream.event_id = stream.request = stream.gateway = ""
        body = case.wants_everything | ({"cache_salt": salt} if salt else {})
        try:
            async with self._asked(client, case.path, body) as (gateway, response):
                stream.request, stream.gateway = response.headers.get("x-request-id", ""), gateway
                async for event in self._read(response, stream):
                    yield event
                return
        except (httpx.TransportError, CutOff):
            if not stream.event_id:  # nothing to go on after
                raise
        async for event in self._go_on(client, stream, number, got):
            yield event

    @asynccontextmanager
    async def _asked(
        self, client: httpx.AsyncClient, path: str, body: dict[str, Any]
    ) -> AsyncIterator[tuple[str, httpx.Response]]:
        """The URL and response of the gateway whose turn it is, or of the next that takes a connection: one that takes
        none has heard of nothing."""
        turn, count = next(self._turns), len(self.urls)
        for further in range(count):
            gateway = self.urls[(turn + further) % count]
            request = client.build_request("POST", gateway + path, json=body, headers=TRACE)
            try:
                response = await client.send(request, stream=True)
                break
            except httpx.ConnectError:
                if further == count - 1:
                    raise
        try:
            yield gateway, response
        finally:
            await response.aclose()

    async def _go_on(
        self, client: httpx.AsyncClient, stream: Stream, number: int, got: Answer
    ) -> AsyncIterator[dict[str, Any]]:
        """The rest of a stream of which the connection broke."""
        until = time.monotonic() + PATIENCE
        for gateway in itertools.cycle(self.urls):
            path = f"/v1/streams/{stream.request}"
            try:
                after = {"after": stream.event_id}
                async with client.stream("GET", gateway + path, params=after, headers=TRACE) as response:
                    if response.status_code == OK:
                        stream.attached += 1
                        self.recorder.attach(time.monotonic(), number, gateway, got)
                    async for event in self._read(response, stream):
                        yield event
                    return
            except (httpx.TransportError, CutOff, Refused):
                if time.monotonic() > until:
                    raise
            await asyncio.sleep(ATTACH_AGAIN)

    async def _read(self, response: httpx.Response, stream: Stream) -> AsyncIterator[dict[str, Any]]:
        """The chunks of one response, which must come to the end of the stream."""
        if response.status_code != OK:
            raise _error(response, await response.aread())
        ended, event_id = False, stream.event_id
        async for line in response.aiter_lines():
            if line.startswith("id: "):
                event_id = line.removeprefix("id: ")
            if not line.startswith("data: "):
                continue
            self._mark(stream)
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                ended = True
                continue
            event = json.loads(data)
            if "error" in event:
                raise _error(response, data.encode())
            if ended:
                raise Broken(f"something came after the end: {data[:100]}")
            yield event
            stream.event_id = event_id  # not before the event is there: the connection may break in between
        if not ended:
            raise CutOff("the stream was closed before its end")

    def _mark(self, stream: Stream) -> None:
        now = time.monotonic()
        since = stream.last or stream.begun
        if now - since > LONG_PAUSE:
            stream.pauses.append((since, now - since))
        if stream.first:
            stream.longest_pause = max(stream.longest_pause, now - since)
        stream.first = stream.first or now
        stream.last = now


def _told(error: httpx.TransportError) -> str:
    if isinstance(error, httpx.TimeoutException):
        return f"nothing came for {PATIENCE:.0f} s"
    return f"the connection broke: {type(error).__name__}: {error}"


def _error(response: httpx.Response, content: bytes) -> Broken:
    """Of an answer that is an error, or that ends with one."""
    status = response.status_code
    try:
        error = json.loads(content)["error"]
        message, code = str(error["message"]), str(error["code"] or "")
    except (ValueError, LookupError, TypeError):
        message, code = content[:100].decode(errors="replace"), ""
    if status == OK:  # the stream had begun: its code tells the status
        return Broken(
            message, SERVER_ERROR if code == "internal_error" else UNAVAILABLE, code, error.get("retry_after")
        )
    after = retry_after(response) if "retry-after" in response.headers else None
    return (Refused if status in COME_BACK else Broken)(message, status, code, after)


def _prompt_of(event: dict[str, Any]) -> list[int]:
    """The tokens of the prompt, where an event tells them."""
    found: list[int] = event.get("prompt_token_ids") or []
    for choice in event["choices"]:
        found = found or choice.get("prompt_token_ids") or []
    return found
