"""Errors for people: what is wrong and what to type next, without a traceback."""

import contextlib
import sys
from collections.abc import Iterator


class UserError(ValueError):
    """Something the user can put right. Command lines print its text alone, without a traceback, and exit 2."""


@contextlib.contextmanager
def cli_errors() -> Iterator[None]:
    """Turns a UserError into its message on stderr and exit status 2, and Ctrl-C into status 130."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
