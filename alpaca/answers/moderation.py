"""The demo's moderation hook: a function of the operator's that may refuse a question or an answer."""

import importlib
import os
import sys
import traceback
from collections.abc import Callable

from alpaca.common.errors import UserError

Filter = Callable[[str, str, str | None], str | None]

REFUSED = "This request was refused by the demo's filter."
FILTER_FAILED = "The demo's filter failed, so nothing is shown. Please tell whoever runs this demo."


def load_filter(spec: str) -> Filter:
    """The function that "module:function" names; the module may lie in the working folder. Raises UserError."""
    module, colon, name = spec.partition(":")
    if not (module and colon and name):
        raise UserError(
            f"--filter {spec}: expected module:function, such as my_filter:check for check in my_filter.py."
        )
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        raise UserError(f"--filter {spec}: importing {module} failed: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise UserError(f"--filter {spec}: {module} has no function {name}.")
    return found


def refusal(check: Filter | None, instruction: str, input: str, answer: str | None) -> str | None:
    """What to show instead, or None where `check` lets the texts pass. Whatever goes wrong in it refuses."""
    if check is None:
        return None
    try:
        verdict = check(instruction, input, answer)
    except Exception as error:
        # The error's own text may quote what somebody typed, so the place is printed without it.
        place = traceback.extract_tb(error.__traceback__)[-1]
        print(f"the filter failed: {type(error).__name__} in {place.filename}, line {place.lineno}", file=sys.stderr)
        return FILTER_FAILED
    if verdict is None:
        return None
    return verdict if isinstance(verdict, str) and verdict.strip() else REFUSED
