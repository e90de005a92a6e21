"""What a client is told: OpenAI's shape of an error, with the HTTP status that fits.

Knows statuses and wording; not what went wrong, nor the web framework.
"""

from __future__ import annotations

from typing import Any

_MAX_CHARS = 400


class ApiError(Exception):
    """A request that is refused, or an answer that failed; `message` is one sentence."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        # A message may quote what came, which may be long or have lines.
        message = " ".join(message[:_MAX_CHARS].split())
        super().__init__(message)
        self.status, self.message = status, message
        self.param, self.code, self.headers = param, code, headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON that OpenAI's clients understand."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "server_error" if self.status >= 500 else _REQUEST),
                "param": self.param,
                "code": self.code,
            }
        }


_REQUEST = "invalid_request_error"
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be fulfilled as it is."""
    return ApiError(400, message, param=param, code=code)
