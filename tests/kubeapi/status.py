"""Errors as the API answers them: a `Status` object with code, reason and details."""

from __future__ import annotations

from typing import Any

import msgspec

Json = dict[str, Any]

REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    406: "NotAcceptable",
    409: "Conflict",
    410: "Expired",
    415: "UnsupportedMediaType",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
    504: "Timeout",
}
"""metav1.StatusReason by code, where the error says nothing more precise."""


class ApiError(Exception):
    """An answer that is a failure; `retry_after` (seconds) becomes a header and a detail."""

    def __init__(
        self,
        code: int,
        message: str,
        *,
        reason: str | None = None,
        details: Json | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after
        details = dict(details or {})
        if retry_after is not None:
            details["retryAfterSeconds"] = retry_after
        self.status: Json = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": REASONS.get(code, "") if reason is None else reason,
            **({"details": details} if details else {}),
            "code": code,
        }

    @property
    def body(self) -> bytes:
        """The Status object, encoded."""
        return msgspec.json.encode(self.status)


def _of(group: str, plural: str, name: str) -> Json:
    return {"name": name, **({"group": group} if group else {}), "kind": plural}


def _qualified(group: str, plural: str) -> str:
    return f"{plural}.{group}" if group else plural


def not_found(group: str, plural: str, name: str) -> ApiError:
    """There is no such object."""
    text = f'{_qualified(group, plural)} "{name}" not found'
    return ApiError(404, text, details=_of(group, plural, name))


def already_exists(group: str, plural: str, name: str) -> ApiError:
    """The name is taken."""
    text = f'{_qualified(group, plural)} "{name}" already exists'
    return ApiError(409, text, reason="AlreadyExists", details=_of(group, plural, name))


def conflict(group: str, plural: str, name: str, why: str = "") -> ApiError:
    """The object changed since the client read it, or is another one of the same name."""
    why = why or "the object has been modified; please apply your changes to the latest version and try again"
    text = f'Operation cannot be fulfilled on {_qualified(group, plural)} "{name}": {why}'
    return ApiError(409, text, details=_of(group, plural, name))


def invalid(kind: str, name: str, field: str, problem: str, cause: str = "FieldValueInvalid") -> ApiError:
    """A field has a value that it may not have. `problem` begins as "Forbidden: ..." or "Required value"."""
    details = {
        "name": name,
        "kind": kind,
        "causes": [{"reason": cause, "message": problem, "field": field}],
    }
    return ApiError(422, f'{kind} "{name}" is invalid: {field}: {problem}', details=details)


def expired(asked: int, oldest: int) -> ApiError:
    """The version is older than what the server remembers."""
    return ApiError(410, f"too old resource version: {asked} ({oldest})")


def continue_expired() -> ApiError:
    """The page's snapshot is older than what the server remembers."""
    return ApiError(
        410,
        "The provided continue parameter is too old to display a consistent list result. You must start a "
        "new list without the continue parameter.",
    )


def too_large(asked: int, current: int) -> ApiError:
    """The version is newer than what the server has."""
    cause = {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
    return ApiError(
        504,
        f"Timeout: Too large resource version: {asked}, current: {current}",
        details={"causes": [cause]},
        retry_after=1,
    )
