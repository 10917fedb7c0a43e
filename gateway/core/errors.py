"""What a gateway answers when it does not answer with tokens. One tree; each error knows its HTTP status.

GatewayError
├── InvalidRequest (400)
│   └── ContextExceeded
├── Unauthorized (401), AdminOnly (403)
├── ModelNotFound (404), PathNotFound (404), StreamNotFound (404), MethodNotAllowed (405)
├── HeadersTimeout (408), BodyTimeout (408), StreamTaken (409), BodyTooLarge (413), UnsupportedMediaType (415)
├── NotOffered (501)
├── Overloaded (429)
│   └── RateLimited
├── Unavailable (503)
│   └── AttemptsExhausted
└── InternalError (500)
"""

from typing import ClassVar


class GatewayError(Exception):
    """An answer to the client: its message is shown as it stands, so it names nothing but the client's own request."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code
        self.retry_after = retry_after
        """Seconds after which asking again may help."""


class InvalidRequest(GatewayError):
    status = 400
    type = "invalid_request_error"


class ContextExceeded(InvalidRequest):
    default_code = "context_length_exceeded"


class Unauthorized(InvalidRequest):
    """The client has shown no key that is known here."""

    status = 401
    default_code = "invalid_api_key"


class AdminOnly(InvalidRequest):
    status = 403
    default_code = "permission_denied"


class ModelNotFound(InvalidRequest):
    status = 404
    default_code = "model_not_found"


class PathNotFound(InvalidRequest):
    status = 404
    default_code = "not_found"


class StreamNotFound(InvalidRequest):
    status = 404
    default_code = "stream_not_found"


class MethodNotAllowed(InvalidRequest):
    status = 405
    default_code = "method_not_allowed"


class HeadersTimeout(InvalidRequest):
    status = 408
    default_code = "headers_timeout"


class BodyTimeout(InvalidRequest):
    status = 408
    default_code = "body_timeout"


class StreamTaken(InvalidRequest):
    """Another connection reads the stream now."""

    status = 409
    default_code = "stream_taken"


class BodyTooLarge(InvalidRequest):
    status = 413
    default_code = "body_too_large"


class UnsupportedMediaType(InvalidRequest):
    status = 415
    default_code = "unsupported_media_type"


class NotOffered(GatewayError):
    """A method of an interface that others define, and that has no meaning here."""

    status = 501
    type = "invalid_request_error"
    default_code = "not_offered"


class Overloaded(GatewayError):
    status = 429
    type = "rate_limit_error"
    default_code = "overloaded"


class RateLimited(Overloaded):
    """This tenant has asked for as much as it may."""

    default_code = "rate_limit_exceeded"


class Unavailable(GatewayError):
    status = 503
    default_code = "unavailable"


class AttemptsExhausted(Unavailable):
    default_code = "attempts_exhausted"


class InternalError(GatewayError):
    default_code = "internal_error"
