"""A small client of the gateway's HTTP API, for the command line."""

import json
import os
import ssl
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx

from cluster.errors import ClusterError

TIMEOUT = httpx.Timeout(connect=5.0, read=600.0, write=30.0, pool=None)
TRACE = {"X-Baton-Trace": "1"}
"""Asks the gateway to say, with the last chunk, who ran the request and how long it took."""
TIMELINE = {"X-Baton-Trace": "timeline"}
"""Asks everyone to note what is done for the request when."""


KEY_VARIABLE, CA_VARIABLE = "BATON_API_KEY", "SSL_CERT_FILE"
"""Of the environment: the API key, and a file of certificates to trust instead of the system's."""


def credentials() -> dict[str, str]:
    """Headers that say who asks, where a key is known."""
    key = os.environ.get(KEY_VARIABLE, "")
    return {"Authorization": f"Bearer {key}"} if key else {}


def trust(url: str) -> ssl.SSLContext:
    """Whose certificates are good; nobody's where there is no TLS, for to read them takes long. ``ClusterError`` where
    they cannot be read."""
    if not url.startswith("https:"):
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    file = os.environ.get(CA_VARIABLE) or None
    try:
        return ssl.create_default_context(cafile=file)
    except OSError as error:
        raise ClusterError(f"{file} holds no certificates: {error.strerror or error}; name a PEM file") from error


def get(url: str, path: str) -> Any:
    """The JSON at ``path``; ``ClusterError`` if there is no gateway."""
    try:
        response = httpx.get(url + path, headers=credentials(), timeout=5.0, trust_env=False, verify=trust(url))
    except httpx.HTTPError as error:
        advice = "`baton status` lists the clusters that run here"
        raise ClusterError(f"{url} does not answer: {str(error) or type(error).__name__}; {advice}") from error
    if response.status_code != 200:
        raise ClusterError(f"{url}{path}: {problem(response.status_code, response.content)}")
    try:
        return response.json()
    except ValueError as error:
        raise ClusterError(f"{url}{path} is no JSON; is this a gateway?") from error


def only_model(url: str) -> str:
    """The name of the model that is served at ``url``."""
    answer = get(url, "/v1/models")
    try:
        return str(answer["data"][0]["id"])
    except (LookupError, TypeError) as error:
        raise ClusterError(f"{url}/v1/models names no model; is this a gateway?") from error


def stream(url: str, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The chunks of a streamed answer."""
    try:
        with (
            httpx.Client(headers=credentials(), timeout=TIMEOUT, trust_env=False, verify=trust(url)) as client,
            client.stream("POST", url + path, json={**body, "stream": True}, headers=TRACE) as response,
        ):
            if response.status_code != 200:
                raise ClusterError(problem(response.status_code, response.read()))
            for line in response.iter_lines():
                yield from _chunk(line)
    except httpx.HTTPError as error:
        raise ClusterError(f"{url}: the answer was cut off ({type(error).__name__})") from error


async def astream(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The same on an event loop, with a client that several share."""
    try:
        async with client.stream("POST", path, json={**body, "stream": True}, headers=TRACE) as response:
            if response.status_code != 200:
                raise ClusterError(problem(response.status_code, await response.aread()))
            async for line in response.aiter_lines():
                for chunk in _chunk(line):
                    yield chunk
    except httpx.HTTPError as error:
        raise ClusterError(f"{client.base_url}: the answer was cut off ({type(error).__name__})") from error


def async_client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, headers=credentials(), timeout=TIMEOUT, trust_env=False, verify=trust(url))


def text_of(chunk: dict[str, Any]) -> str:
    """The text in a chunk of either API."""
    for choice in chunk.get("choices", ()):
        return str(choice.get("text") or choice.get("delta", {}).get("content") or "")
    return ""


def trace_of(chunk: dict[str, Any]) -> dict[str, Any] | None:
    """Which workers ran it, in the last chunk."""
    for choice in chunk.get("choices", ()):
        found: dict[str, Any] | None = choice.get("baton")
        return found
    return None


def _chunk(line: str) -> Iterator[dict[str, Any]]:
    if not line.startswith("data: ") or line == "data: [DONE]":
        return
    try:
        chunk = json.loads(line.removeprefix("data: "))
    except ValueError:
        chunk = None
    if not isinstance(chunk, dict):
        raise ClusterError(f"the server sent something else than a chunk: {line[:80]!r}")
    if "error" in chunk:
        error = chunk["error"]
        raise ClusterError(f"the server gave up: {error.get('message', error) if isinstance(error, dict) else error}")
    yield chunk


def problem(status: int, content: bytes) -> str:
    """What an answer that is no success says."""
    try:
        return f"{status}: {json.loads(content)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"the server answered {status}"
