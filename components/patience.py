"""Retries calls while a service is down, and puts a service's errors into words.

All it knows of MLflow, Google Cloud and storage is what their errors look like.
"""

import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, Never, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_before_delay, wait_exponential

from trainer.shared.errors import UserError

PATIENCE_OF_STEPS = 3600.0
"""Seconds that a step waits for a service that is down, before it fails and leaves its work to the next attempt."""
SHORTEST_WAIT, LONGEST_WAIT = 0.5, 10.0
"""Seconds between two calls. The wait doubles after each call."""

_TRANSIENT = (429, 500, 502, 503, 504)
_TRANSIENT_IN_STORAGE = (
    "AbortedError",
    "DeadlineExceededError",
    "InternalError",
    "ResourceExhaustedError",
    "UnavailableError",
    "UnknownError",
)
"""Names of TensorFlow's exceptions."""

T = TypeVar("T")


def is_transient(error: BaseException) -> bool:
    """Returns whether the same call may succeed later: the service did not answer, was overloaded, or had an internal error."""
    if isinstance(error, UserError) or not isinstance(error, Exception):
        return False
    for cause in _causes(error):
        module = type(cause).__module__
        if isinstance(cause, ConnectionError | TimeoutError) or module.startswith("requests."):
            response = getattr(cause, "response", None)
            return response is None or response.status_code in _TRANSIENT
        if module.startswith("google.api_core."):
            return getattr(cause, "code", None) in _TRANSIENT
        if module.startswith("google.auth.") and getattr(cause, "retryable", False):
            return True
        if module.startswith("tensorflow."):
            return type(cause).__name__ in _TRANSIENT_IN_STORAGE
        if _is_locked(cause):
            return True
    # Only the exceptions of MLflow's REST client come from a server. Its other exceptions are errors of this process.
    return _rest_status(error) in _TRANSIENT


def answer(error: BaseException) -> str:
    """Returns in one line how a service failed, for example "answers HTTP 503 at https://mlflow.example.com".

    The line holds no credentials.
    """
    causes = list(_causes(error))
    urls = [request.url for one in causes if (request := getattr(one, "request", None)) is not None and hasattr(request, "url")]
    where = f" at {without_credentials(str(urls[0])).partition('?')[0]}" if urls else ""
    # MLflow's client tries twice, and then keeps only this part of the answer.
    counted = re.search(r"too many (\d{3}) error responses", str(error))
    statuses = [counted[1]] if counted else []
    for one in causes:
        if type(one).__module__.startswith("google.api_core.") and getattr(one, "code", None) is not None:
            statuses.append(f"{int(one.code)} ({one_line(getattr(one, 'message', one))})")
        elif type(one).__module__.startswith("requests.") and getattr(one, "response", None) is not None:
            statuses.append(str(one.response.status_code))
    coded = re.search(r"failed with error code (\d{3}) ", str(error))
    if not statuses and (status := coded[1] if coded else _rest_status(error)):
        statuses.append(f"{status} ({one_line(error)})")
    if statuses:
        return f"answers HTTP {statuses[0]}{where}"
    if any(isinstance(one, TimeoutError) or "Timeout" in type(one).__name__ for one in causes):
        return f"does not answer{where} (timeout)"
    if any(map(_is_locked, causes)):
        return "is locked by another process"
    reasons = [one.strerror for one in causes if isinstance(one, OSError) and one.strerror]
    if is_transient(error) and (reasons or urls):
        return f"does not answer{where} ({reasons[-1].lower() if reasons else one_line(causes[-1])})"
    return f"fails ({type(error).__name__}: {one_line(error)})"


def one_line(what: object) -> str:
    """Returns a text as one line of at most 500 characters, without the credentials in its URLs."""
    return without_credentials(" ".join(str(what).split()))[:500]


def without_credentials(text: str) -> str:
    """Returns `text` without USER:PASSWORD@ in its URLs."""
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


def _causes(error: BaseException) -> Iterator[Any]:
    """Yields an exception and its causes, the root cause last."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _is_locked(error: BaseException) -> bool:
    """Returns whether another process holds the lock of a SQLite database."""
    return getattr(error, "sqlite_errorname", "").startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))


def _rest_status(error: BaseException) -> int | None:
    status = getattr(error, "get_http_status_code", None)
    return int(status()) if type(error).__name__ == "RestException" and status is not None else None


class UnansweredError(UserError):
    """A service was down until the caller's patience ended."""


def patiently(call: Callable[[], T], patience: float, service: str = "MLflow") -> T:
    """Returns the result of `call`. Repeats the call after a transient error, for up to `patience` seconds.

    Prints once on stderr how the service fails. Raises UnansweredError with the last error when patience ends. Raises an error
    that is not transient at once.
    """
    if not patience:
        return call()

    def tell(state: RetryCallState) -> None:
        if state.attempt_number == 1:
            say(f"{service} {answer(_error_of(state))}; waiting for it")

    def give_up(state: RetryCallState) -> Never:
        error = _error_of(state)
        raise UnansweredError(
            f"{service} {answer(error)}; gave up after {patience:.0f} s: start the same command again once it works"
        ) from error

    repeated = Retrying(
        retry=retry_if_exception(is_transient),
        wait=wait_exponential(SHORTEST_WAIT, LONGEST_WAIT),
        stop=stop_before_delay(patience),
        before_sleep=tell,
        retry_error_callback=give_up,
    )
    return repeated(call)


def _error_of(state: RetryCallState) -> BaseException:
    error = state.outcome and state.outcome.exception()
    assert error, "only failed calls are repeated"
    return error


def say(line: str) -> None:
    """Prints a line on stderr at once."""
    print(line, file=sys.stderr, flush=True)


class PatientClient:
    """A client that repeats every call for up to `patience` seconds while the server is down."""

    def __init__(self, client: Any, patience: float) -> None:
        self.impatient = client
        self._patience = patience

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.impatient, name)
        if not callable(attribute):
            return attribute
        return lambda *args, **named: patiently(lambda: attribute(*args, **named), self._patience)
