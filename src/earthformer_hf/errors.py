"""How programs end when something is wrong: in one line that says what; `--debug` adds the traceback."""

import functools
import sys
from collections.abc import Callable


DEBUG = "--debug"


def one_line(reason: object) -> str:
    """A message without line breaks; of an error without a message, its name."""
    return " ".join(str(reason).split()) or type(reason).__name__


def ends_in_one_line(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate a script's `main`: an error ends it with one line and exit code 1; `--debug` shows where it arose."""

    @functools.wraps(main)
    def run_main():
        debug = DEBUG in sys.argv
        sys.argv[:] = [argument for argument in sys.argv if argument != DEBUG]
        try:
            main()
        except KeyboardInterrupt:
            sys.stderr.write("interrupted; the same command starts again, or goes on where it keeps checkpoints\n")
            sys.exit(130)
        except Exception as reason:  # whatever it is, a user wants the words first
            if debug:
                raise
            raise SystemExit(f"error: {described(reason)}") from reason

    return run_main


def described(reason: Exception) -> str:
    """What is wrong, in one line, with the host that could not be reached; an error that bad input does not explain
    says its kind, and how to see more."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
    from safetensors import SafetensorError

    # what wrong arguments, broken files, missing extras, and a hub that refuses or cannot be reached raise
    connections = HfHubHTTPError.__bases__  # OSError, and that of the hub's client
    client = sys.modules[connections[0].__module__.partition(".")[0]]
    addresses = (getattr(client, "InvalidURL", UnicodeError),)
    known = (ValueError, ImportError, SafetensorError, DatasetsError, StrictDataclassError, *connections, *addresses)
    if not isinstance(reason, known):
        return f"{type(reason).__name__}: {one_line(reason)} ({DEBUG} shows where)"
    host = _host(reason)
    text = one_line(reason)
    return text if host is None or host in text else f"{host}: {text}"


def _host(reason: BaseException) -> str | None:
    """The host that a request was for, of an error of the hub's client or of its cause."""
    for error in (reason, reason.__cause__, reason.__context__):
        try:
            host = error.request.url.host  # type: ignore[union-attr]
        except (AttributeError, RuntimeError):  # no such error, or raised before there was a request
            continue
        if isinstance(host, str) and host:
            return host
    return None


__all__ = ["DEBUG", "described", "ends_in_one_line", "one_line"]
