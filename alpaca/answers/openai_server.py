"""A checkpoint behind OpenAI's API: `vllm serve`, or `transformers serve` with what it lacks.

`transformers serve` lists the models of the hub's cache instead of the one that it serves, and answers an empty list of
messages with status 500. build_server is no public name of transformers; a test of tests/answers/test_inference.py
fails by name where it changes.
"""

import os
import sys

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from transformers.cli.serve import Serve
from transformers.cli.serving import server as transformers_server

from alpaca.answers.loading import load_model
from alpaca.common.files import atomic_dir, usual_rights


def write_full_checkpoint(path: str, adapter: str | None, dtype: str | None, folder: str) -> None:
    """Writes an adapter on its base, or a GGUF file, as a checkpoint that servers take."""
    with atomic_dir(folder) as beside:
        model, tokenizer = load_model(path, "cpu", dtype, adapter)
        if dtype is None:  # a float16 checkpoint answers in float32 on a CPU, and is written as it was
            model = model.to(model.config.dtype)
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        for file in beside.iterdir():
            usual_rights(file)


def serve_with_vllm(path: str, port: int, dtype: str | None) -> None:
    """Replaces this process by vLLM's server."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", path, "--host", "127.0.0.1"]
    command += ["--port", str(port)] + (["--dtype", dtype] if dtype else [])
    sys.stdout.flush()
    os.execv(sys.executable, command)


def serve_with_transformers(path: str, port: int, dtype: str | None) -> None:
    """Serves until Ctrl-C or SIGTERM."""
    build_server = transformers_server.build_server

    def build(*args, **options) -> FastAPI:
        return name_model(build_server(*args, **options), path)

    transformers_server.build_server = build
    Serve(force_model=path, host="127.0.0.1", port=port, dtype=dtype or "auto")


def name_model(app: FastAPI, name: str) -> FastAPI:
    """`app` with a list of models that holds the served one, and status 400 for a chat without messages."""

    @app.middleware("http")
    async def answer_before(request: Request, call_next):
        if request.url.path == "/v1/models":
            model = {"id": name, "object": "model", "created": 0, "owned_by": "local"}
            return JSONResponse({"object": "list", "data": [model]})
        if request.url.path == "/v1/chat/completions" and request.method == "POST" and not await has_messages(request):
            message = "'messages' must be a list of at least one object with role and content."
            error = {"message": message, "type": "invalid_request_error", "param": "messages", "code": None}
            return JSONResponse({"error": error}, status_code=400)
        return await call_next(request)

    return app


async def has_messages(request: Request) -> bool:
    try:
        messages = (await request.json())["messages"]
        return bool(messages) and all(message["role"] and "content" in message for message in messages)
    except (ValueError, KeyError, TypeError):
        return False
