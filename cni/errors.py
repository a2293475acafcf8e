"""How a request fails: the error of the CNI protocol and its codes."""

from __future__ import annotations

# Below 100 the codes are the specification's (section 5, "Error").
INCOMPATIBLE_VERSION = 1
UNSUPPORTED_FIELD = 2
UNKNOWN_CONTAINER = 3
BAD_ENVIRONMENT = 4
IO_FAILURE = 5
DECODE_FAILURE = 6
BAD_CONFIG = 7
TRY_AGAIN = 11
NOT_AVAILABLE = 50
LIMITED = 51
INTERNAL = 100
ALREADY_EXISTS = 101
CHECK_FAILED = 102


class CniError(Exception):
    """A request failed: `code` for the runtime, `msg` a sentence for a person, `details` what helps."""

    def __init__(self, code: int, msg: str, details: str = "") -> None:
        super().__init__(msg)
        self.code = code
        self.msg = msg
        self.details = details
