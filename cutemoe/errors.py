"""The two exceptions of the package, and the one sentence every bad argument is answered with."""


class InvalidCall(ValueError):
    """The call breaks the documented contract; nothing was launched or written."""


class Unsupported(NotImplementedError):
    """The call is valid, but no back end runs it on this device; the message lists every reason."""


def invalid(argument: str, expected: str, got: object, fix: str = "") -> InvalidCall:
    """The error for one bad argument: which one, what was expected, what came, how to fix it."""
    hint = f" ({fix})" if fix else ""
    return InvalidCall(f"{argument}: expected {expected}, got {got}{hint}")
