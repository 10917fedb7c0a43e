"""Reading a request's body: bounded in size before and while it is read, and in time."""

import asyncio

from starlette.requests import ClientDisconnect, Request

from gateway.core.errors import BodyTimeout, BodyTooLarge, GatewayError, InvalidRequest, UnsupportedMediaType


class Unread(Exception):
    """The body was not read to its end: answer, then close the connection."""

    def __init__(self, error: GatewayError) -> None:
        super().__init__(error.message)
        self.error = error


async def read_body(request: Request, most: int, timeout: float) -> bytes:
    """The whole body of a JSON request. Raises ``Unread``."""
    # Not only for order: with any other type a web page could send requests here without asking the browser first.
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Unread(UnsupportedMediaType("the content type must be application/json"))
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise Unread(InvalidRequest("compressed bodies are not supported", code="unsupported_encoding"))
    announced = request.headers.get("content-length", "0")
    if not (announced.isascii() and announced.isdecimal()) or len(announced) > 20 or int(announced) > most:
        raise Unread(_too_large(most))
    body = bytearray()
    try:
        async with asyncio.timeout(timeout):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise Unread(_too_large(most))
    except TimeoutError:
        raise Unread(BodyTimeout(f"the body did not arrive within {timeout:g} s")) from None
    except ClientDisconnect:
        raise Unread(InvalidRequest("the client went away before its body was here")) from None
    return bytes(body)


def _too_large(most: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {most} bytes")
