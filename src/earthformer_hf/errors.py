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
        except Exception as reason:  # whatever it is, a user wants the words first
            if debug:
                raise
            raise SystemExit(f"error: {described(reason)}") from reason

    return run_main


def described(reason: Exception) -> str:
    """What is wrong, in one line; an error that bad input does not explain says its kind, and how to see more."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
    from safetensors import SafetensorError

    # what wrong arguments, broken files, missing extras, and a hub that refuses or cannot be reached raise
    connections = HfHubHTTPError.__bases__  # OSError, and that of the hub's client
    if isinstance(
        reason, (ValueError, ImportError, SafetensorError, DatasetsError, StrictDataclassError, *connections)
    ):
        return one_line(reason)
    return f"{type(reason).__name__}: {one_line(reason)} ({DEBUG} shows where)"


__all__ = ["DEBUG", "described", "ends_in_one_line", "one_line"]
