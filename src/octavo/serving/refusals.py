"""What a client is told when it gets no text: a status, and OpenAI's error object."""

from typing import Any

from starlette.responses import JSONResponse

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CODES = {404: "not_found", 405: "method_not_allowed"}


class Refusal(Exception):  # noqa: N818 - most are the client's to mend
    """Why a request, or what is left of it, is not answered."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, **headers: str
    ) -> None:
        """``headers`` go with the answer, by their names with underscores."""
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": self.message,
            "type": TYPES.get(self.status, kind),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def response(self) -> JSONResponse:
        """The whole answer, where nothing was sent yet."""
        return JSONResponse(self.body(), self.status, self.headers)


def closing() -> Refusal:
    """The server is about to end."""
    return Refusal(503, "closing", "the server is closing; ask again in a while", Retry_After="10")
