"""Shared fixtures: tiny models made once a session, and a way to run the project's scripts as a user would."""

import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# Tests never reach a hub, an account or a real key, and small tensors run faster on one thread.
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", PYTHONPATH=str(ROOT))
for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_ORG", "OPENAI_ORGANIZATION"):
    os.environ.pop(name, None)

import tiny_models  # noqa: E402

# The same examples in every run: a red build is then about the change, not about the day.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def environment_as_before():
    """Guards: a test whose outcome depends on which test file ran before it, by a variable that one of them set."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    return tiny_models.make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny_llama")


@pytest.fixture(scope="session")
def tiny_opt(tmp_path_factory) -> Path:
    return tiny_models.make_tiny_opt(tmp_path_factory.mktemp("models") / "tiny_opt")


@pytest.fixture(scope="session")
def tiny_tied(tmp_path_factory) -> Path:
    return tiny_models.make_tiny_tied(tmp_path_factory.mktemp("models") / "tiny_tied")


@pytest.fixture(scope="session")
def run_script():
    """run_script("train.py", "--flag", "value", ...) -> CompletedProcess; a status other than `status` fails the test.

    `status=None` accepts any. The output is text; `cwd` defaults to the repository root.
    """

    def run(*args, status: int | None = 0, timeout: float = 300, env: dict | None = None, cwd=ROOT):
        command = [sys.executable, *map(str, args)]
        done = subprocess.run(
            command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=timeout
        )
        if status is not None:
            assert done.returncode == status, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
        return done

    return run
