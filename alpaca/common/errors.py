"""Errors for people: what is wrong, where, and what to type next, without a traceback."""

import contextlib
import difflib
import errno
import os
import sys
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """Something the user can put right. Command lines print its text alone, without a traceback, and exit 2."""


FILE_SYSTEM = {
    errno.ENOSPC: "the disk is full. Make room and type the same command again.",
    errno.EDQUOT: "your disk quota is used up. Make room and type the same command again.",
    errno.ENOENT: "there is no such file or folder.",
    errno.EACCES: "permission denied. Choose a path that you may write to.",
    errno.EPERM: "not permitted. Choose a path that you may write to.",
    errno.EROFS: "this file system is read-only. Choose another path.",
    errno.EISDIR: "this is a folder, and a file is needed.",
    errno.ENOTDIR: "a part of this path is a file, and a folder is needed. Choose another path.",
    errno.EEXIST: "this exists already. Choose another path.",
    errno.ENAMETOOLONG: "this name is too long.",
    errno.EFBIG: "the file would be larger than this file system or a limit (ulimit -f) allows.",
}


@contextlib.contextmanager
def cli_errors() -> Iterator[None]:
    """Ends the process with a message on stderr instead of a traceback.

    Exit status 2 after a UserError and after a file system's refusal (full disk, no right to write, a file where a
    folder is needed), 130 after Ctrl-C, 141 where nobody reads the output any more.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # a pipe that nobody reads is then found here and not while the interpreter ends
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno not in FILE_SYSTEM:
            raise
        print(f"error: {error.filename or 'writing'}: {FILE_SYSTEM[error.errno]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def first_line(error: BaseException) -> str:
    """What another library's error says, in a line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()


def did_you_mean(name: str, candidates: Iterable[str], prefix: str = "") -> str:
    """A hint that follows a sentence, such as " Did you mean PREFIXnearest?"; "" where no candidate is close."""
    near = difflib.get_close_matches(name, list(candidates), n=1)
    return f" Did you mean {prefix}{near[0]}?" if near else ""
