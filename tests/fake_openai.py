"""A local OpenAI server that misbehaves on demand: real HTTP over a real socket, for tests and benchmarks.

    with FakeOpenAI(latency=0.01, faults={"429": 0.2, "reset": 0.1}) as server:
        ...  # server.base_url, server.log

    python tests/fake_openai.py --port 8123 --latency 2 --rough 0.1        # by hand, until Ctrl-C

It offers /v1/models, /v1/completions, /v1/chat/completions, /v1/files and /v1/batches. Replies to generation prompts
are lists of made-up tasks that depend on the prompt alone, so that the same question always gets the same answer.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any

ROUGH = {"429": 1.0, "500": 1.0, "reset": 1.0, "drip": 1.0, "broken_json": 1.0}  # weights of a misbehaving server


class FakeOpenAI:
    """The server, running in a thread between __enter__ and __exit__ (or start and stop).

    reply: what to say: a text, a dict (text, finish_reason and other fields of the choice, usage), or a function of the
        request's JSON that returns either. A dict with "sent" is what is sent instead: a JSON value, or bytes.
    faults: weights by name (of 1 in all, the rest behaves well), or a function (number of the request, its JSON) ->
        a fault's name or None. Names: "429", "500", "503", "reset" (connection cut in mid-body), "reset_early", "drip"
        (a whole reply, a few bytes at a time), "hang", "broken_json", "empty_choices", "content_filter", "length",
        "empty", "html" (a 200 of another kind), "policy" and "400" (this prompt is refused), "context" (too long for
        the model), and "401", "403", "404", "quota" for the permanent ones.
    latency: seconds before a reply, a number or a function of a random.Random. retry_after: seconds in 429 replies, or
    None. refuses: names of parameters that get a 400. chat, completions: whether the endpoint exists. key: the only key
    accepted. models: names, or anything else that /models is to answer. shutdown_date: of every model. max_parallel:
    more requests than this at a time get a 429. most_tokens: a larger max_tokens gets a 400 with the allowed range.
    ignores_length: replies are longer than max_tokens.
    batch_polls: how often a batch is "in_progress" when asked for. context_room: reply tokens up to which the fault
    "context" lets a request pass.
    log: a dict for each request to a completions endpoint: number, path, body, fault, status, text, done (the whole
    reply was handed to a client that was there), request_id, latency, begin and end (time.monotonic()).
    """

    def __init__(
        self,
        reply: str | Callable[[dict], Any] | None = None,
        faults: Mapping[str, float] | Callable[[int, dict], str | None] | None = None,
        latency: float | Callable[[random.Random], float] = 0.0,
        retry_after: float | None = 0.05,
        refuses: tuple[str, ...] = (),
        chat: bool = True,
        completions: bool = True,
        key: str | None = None,
        models: Any = ("fake-model",),
        shutdown_date: str | None = None,
        max_parallel: int | None = None,
        batch_polls: int = 1,
        context_room: int = 1024,
        tasks_per_reply: int = 5,
        most_tokens: int | None = None,
        ignores_length: bool = False,
        seed: int = 0,
        port: int = 0,
    ):
        self.reply, self.faults, self.latency, self.retry_after = reply, faults or {}, latency, retry_after
        self.refuses, self.chat, self.completions, self.key = refuses, chat, completions, key
        self.models, self.shutdown_date, self.max_parallel = models, shutdown_date, max_parallel
        self.batch_polls, self.tasks_per_reply, self.port = batch_polls, tasks_per_reply, port
        self.context_room, self.most_tokens, self.ignores_length = context_room, most_tokens, ignores_length
        self.rng = random.Random(seed)
        self.log: list[dict[str, Any]] = []
        self.files: dict[str, dict[str, Any]] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.parallel = self.most_parallel = 0
        self.base_url = ""

    def __enter__(self) -> "FakeOpenAI":
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    def finished(self) -> list[dict[str, Any]]:
        """The log entries of good replies that were sent whole."""
        return [entry for entry in self.log if entry["done"] and entry["status"] == 200 and entry["text"] is not None]

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, backlog=512)
        self.port = server.sockets[0].getsockname()[1]
        self.base_url = f"http://127.0.0.1:{self.port}/v1"
        self._ready.set()
        await self._end.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    # ------------------------------------------------------------------------------------------------------------------
    # HTTP.

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while line := await reader.readline():
                method, target, _ = line.decode("latin-1").split(" ", 2)
                head = await reader.readuntil(b"\r\n\r\n") if line.strip() else b""
                headers = BytesParser(policy=HTTP).parsebytes(head)
                content = await reader.readexactly(int(headers.get("Content-Length", 0)))
                writer.client_gone = reader.at_eof  # nothing is pipelined: an end of input means that nobody listens
                if not await self._answer(method, target, headers, content, writer):
                    break
        writer.close()

    async def _answer(self, method: str, target: str, headers, content: bytes, writer: asyncio.StreamWriter) -> bool:
        """Handles one request; False where the connection has to end."""
        self.query = target.partition("?")[2]
        path = target.split("?")[0].removeprefix("/v1")
        if self.key is not None and headers.get("Authorization") != f"Bearer {self.key}":
            return await self._send(writer, 401, _error("Incorrect API key provided.", "invalid_api_key"))
        if path in ("/completions", "/chat/completions") and method == "POST":
            return await self._complete(path, json.loads(content), writer)
        status, body = self._other(method, path, headers, content)
        return await self._send(writer, status, body)

    async def _send(
        self, writer: asyncio.StreamWriter, status: int, body: Any, headers: Mapping[str, str] | None = None, cut=False,
        drip=False,
    ) -> bool:  # fmt: skip
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(data)}", "Content-Type: application/json"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n")
        if cut:
            writer.write(data[: len(data) // 2])
            await writer.drain()
            writer.transport.abort()
            return False
        step = max(1, len(data) // 10) if drip else len(data) or 1
        for position in range(0, len(data), step):
            writer.write(data[position : position + step])
            await writer.drain()
            if drip:
                await asyncio.sleep(0.01)
        return True

    # ------------------------------------------------------------------------------------------------------------------
    # Completions.

    async def _complete(self, path: str, body: dict, writer: asyncio.StreamWriter) -> bool:
        entry = {"number": len(self.log), "path": path, "body": body, "fault": None, "status": 200, "text": None}
        entry |= {"done": False, "begin": time.monotonic(), "end": None}
        entry["request_id"] = f"req_{self.rng.getrandbits(48):012x}"
        self.log.append(entry)
        self.parallel += 1
        self.most_parallel = max(self.most_parallel, self.parallel)
        try:
            if refusal := self._refusal(path, body):
                entry["status"] = refusal[0]
                return await self._send(writer, *refusal)
            fault = entry["fault"] = self._fault(entry["number"], body)
            entry["latency"] = self.latency(self.rng) if callable(self.latency) else self.latency
            await asyncio.sleep(entry["latency"])
            return await self._complete_with(fault, path, body, entry, writer)
        finally:
            self.parallel -= 1
            entry["end"] = entry["end"] or time.monotonic()

    def _refusal(self, path: str, body: dict) -> tuple[int, Any] | None:
        if (path == "/chat/completions" and not self.chat) or (path == "/completions" and not self.completions):
            return 404, _error(f"Invalid URL (POST /v1{path})", None)
        for name in self.refuses:
            if name in body:
                better = " Use 'max_completion_tokens' instead." if name == "max_tokens" else ""
                message = f"Unsupported parameter: '{name}' is not supported with this model.{better}"
                return 400, _error(message, "unsupported_parameter", param=name)
        if self.most_tokens and body.get("max_tokens", 0) > self.most_tokens:
            return 400, _error(f"max_tokens must be in [1, {self.most_tokens}]", "invalid_parameter")
        return None

    def _fault(self, number: int, body: dict) -> str | None:
        if self.max_parallel is not None and self.parallel > self.max_parallel:
            return "429"
        if callable(self.faults):
            return self.faults(number, body)
        point = self.rng.random()
        for name, weight in self.faults.items():
            point -= weight
            if point < 0:
                return name
        return None

    async def _complete_with(
        self, fault: str | None, path: str, body: dict, entry: dict, writer: asyncio.StreamWriter
    ) -> bool:
        errors = {
            "429": (429, "Rate limit reached.", "rate_limit_exceeded"),
            "500": (500, "The server had an error.", None),
            "503": (503, "Overloaded.", None),
            "401": (401, "Incorrect API key provided.", "invalid_api_key"),
            "403": (403, "Country not supported.", "unsupported_country"),
            "404": (404, f"The model `{body.get('model')}` does not exist.", "model_not_found"),
            "quota": (429, "You exceeded your current quota.", "insufficient_quota"),
            "policy": (400, "The response was filtered due to the prompt triggering a policy.", "content_filter"),
            "400": (400, "Something in this prompt cannot be tokenised.", "bad_request"),
            "context": (400, "This model's maximum context length is 4096 tokens.", "context_length_exceeded"),
        }
        if (
            fault == "context"
            and (body.get("max_tokens") or body.get("max_completion_tokens") or 0) <= self.context_room
        ):
            fault = None  # short enough now
        if fault in errors:
            status, message, code = errors[fault]
            entry["status"] = status
            limited = fault == "429" and self.retry_after is not None
            headers = {"Retry-After": f"{self.retry_after:g}"} if limited else {}
            return await self._send(writer, status, _error(message, code), headers)
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault == "reset_early":
            writer.transport.abort()
            return False
        if fault == "html":
            return await self._send(writer, 200, b"<html><body>Sign in to the network</body></html>")
        data = self._completion(path, body, fault)
        if "sent" in data:
            entry["text"], entry["done"] = "", True
            return await self._send(writer, 200, data["sent"])
        if fault == "broken_json":
            return await self._send(writer, 200, json.dumps(data).encode()[:-20])
        if fault == "reset":
            return await self._send(writer, 200, data, cut=True)
        if data["choices"]:
            choice = data["choices"][0]
            entry["text"] = choice["text"] if path == "/completions" else choice["message"]["content"]
        names = {"x-request-id": entry["request_id"]}
        alive = await self._send(writer, 200, data, names, drip=fault == "drip")
        entry |= {"done": not writer.client_gone(), "end": time.monotonic()}
        return alive

    def _completion(self, path: str, body: dict, fault: str | None = None) -> dict[str, Any]:
        prompt = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        made = self.reply(body) if callable(self.reply) else self.reply
        if made is None:
            made = made_up_reply(prompt, self.tasks_per_reply)
        choice = made if isinstance(made, dict) else {"text": made, "finish_reason": "stop"}
        if "sent" in choice:
            return choice
        room = 4 * (body.get("max_tokens") or body.get("max_completion_tokens") or 10**9)  # four characters a token
        if len(choice["text"] or "") > room and not self.ignores_length:
            choice = {**choice, "text": choice["text"][:room], "finish_reason": "length"}
        if fault in ("length", "content_filter"):
            choice = {"text": choice["text"][: len(choice["text"]) * 2 // 3], "finish_reason": fault}
        if fault == "empty":
            choice = {"text": "", "finish_reason": "stop"}
        counted = {"prompt_tokens": len(str(prompt)) // 4, "completion_tokens": len(choice["text"] or "") // 4}
        counted["total_tokens"] = sum(counted.values())
        choice = dict(choice)
        text, usage = choice.pop("text"), choice.pop("usage", counted)
        content = {"text": text} if path == "/completions" else {"message": {"role": "assistant", "content": text}}
        choices = [{"index": index, **content, **choice} for index in range(body.get("n", 1))]
        return {
            "id": f"cmpl-{self.rng.getrandbits(40):010x}",
            "object": "chat.completion" if path.startswith("/chat") else "text_completion",
            "model": body.get("model"),
            "choices": [] if fault == "empty_choices" else choices,
            "usage": usage,
        }

    # ------------------------------------------------------------------------------------------------------------------
    # Models, files, batches.

    def _other(self, method: str, path: str, headers, content: bytes) -> tuple[int, Any]:
        parts = path.strip("/").split("/")
        if parts[0] == "models":
            if not isinstance(self.models, tuple):
                return 200, self.models
            found = [{"id": name, "object": "model", "created": 0, "owned_by": "tests"} for name in self.models]
            found = [{**model, "shutdown_date": self.shutdown_date} for model in found]
            if len(parts) == 1:
                return 200, {"object": "list", "data": found}
            one = next((model for model in found if model["id"] == parts[1]), None)
            return (200, one) if one else (404, _error(f"The model `{parts[1]}` does not exist", "model_not_found"))
        if parts[0] == "files":
            return self._files(method, parts[1:], headers, content)
        if parts[0] == "batches":
            return self._batches(method, parts[1:], content)
        return 404, _error(f"Invalid URL ({method} {path})", None)

    def _files(self, method: str, parts: list[str], headers, content: bytes) -> tuple[int, Any]:
        def shown(file: dict) -> dict:
            return {name: value for name, value in file.items() if name != "content"}

        if method == "POST":
            form = BytesParser(policy=HTTP).parsebytes(
                b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n" + content
            )
            upload = next(part for part in form.iter_parts() if part.get_filename())
            return 200, shown(self.add_file(upload.get_payload(decode=True), upload.get_filename()))
        if not parts:
            return 200, {"object": "list", "data": [shown(file) for file in self.files.values()], "has_more": False}
        file = self.files.get(parts[0])
        if file is None:
            return 404, _error("No such File object.", None)
        return 200, file["content"] if parts[1:] == ["content"] else shown(file)

    def add_file(self, content: bytes, name: str) -> dict[str, Any]:
        file = {"id": f"file-{len(self.files)}", "object": "file", "bytes": len(content), "created_at": 0}
        file |= {"filename": name, "purpose": "batch", "status": "processed", "content": content}
        self.files[file["id"]] = file
        return file

    def _batches(self, method: str, parts: list[str], content: bytes) -> tuple[int, Any]:
        if method == "POST" and not parts:
            wish = json.loads(content)
            batch = {"id": f"batch_{len(self.batches)}", "object": "batch", "created_at": int(time.time())}
            batch |= {"endpoint": wish["endpoint"], "completion_window": "24h", "input_file_id": wish["input_file_id"]}
            batch |= {"status": "in_progress", "metadata": wish.get("metadata"), "polls": 0}
            lines = self.files[wish["input_file_id"]]["content"].decode().splitlines()
            batch["request_counts"] = {"total": len(lines), "completed": 0, "failed": 0}
            self.batches[batch["id"]] = batch
            return 200, batch
        if not parts:
            return 200, {"object": "list", "data": list(self.batches.values())[::-1], "has_more": False}
        batch = self.batches.get(parts[0])
        if batch is None:
            return 404, _error("No such batch.", None)
        batch["polls"] += 1
        if batch["status"] == "in_progress" and batch["polls"] > self.batch_polls:
            self._run_batch(batch)
        return 200, batch

    def _run_batch(self, batch: dict[str, Any]) -> None:
        good, bad = [], []
        for line in self.files[batch["input_file_id"]]["content"].decode().splitlines():
            request = json.loads(line)
            fault = self._fault(len(good) + len(bad), request["body"])
            answer = {"id": f"batch_req_{request['custom_id']}", "custom_id": request["custom_id"], "error": None}
            if fault == "500":
                body = _error("The server had an error.", None)
                bad.append({**answer, "response": {"status_code": 500, "request_id": "r", "body": body}})
            else:
                body = self._completion(request["url"].removeprefix("/v1"), request["body"], fault)
                good.append({**answer, "response": {"status_code": 200, "request_id": "r", "body": body}})
        for name, rows in (("output_file_id", good), ("error_file_id", bad)):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
            batch[name] = self.add_file(content, f"{batch['id']}_{name}.jsonl")["id"] if rows else None
        batch["status"] = "completed"
        batch["request_counts"] = {"total": len(good) + len(bad), "completed": len(good), "failed": len(bad)}


def _error(message: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": code or "invalid_request_error", "code": code, "param": param}}


# ----------------------------------------------------------------------------------------------------------------------
# Made-up tasks.

_VERBS = "Explain Describe Compare Summarize Translate Rewrite Classify Outline Suggest Correct".split()
_START = "br d fl g h k l m n p r s t tr v w".split()
_MIDDLE = "a e i o u ai ea ou".split()
_END = "lt m n nd r rk s st th x".split()


def made_up_reply(prompt: str, tasks: int) -> str:
    """What a teacher could answer to `prompt`: tasks in the prompt's own format, or a sentence to any other prompt."""
    rng = random.Random(hashlib.sha256(str(prompt).encode()).digest())
    numbers = re.findall(r"(?m)^(\d+)\. Instruction:", str(prompt))
    if not numbers:
        return f"This is the answer to {str(prompt).split(chr(10))[0]!r}: {' '.join(_word(rng) for _ in range(8))}."
    first, text = int(numbers[-1]), ""
    for number in range(first, first + tasks):
        instruction = f"{rng.choice(_VERBS)} the {' '.join(_word(rng) for _ in range(rng.randint(4, 9)))}."
        if rng.random() < 0.05:
            instruction = rng.choice(["Draw a picture of the sea at night.", "Explain why the sky is blue at noon."])
        given = "<noinput>" if rng.random() < 0.6 else " ".join(_word(rng) for _ in range(12))
        output = " ".join(_word(rng) for _ in range(rng.randint(1, 60)))
        header = f"###\n{number}. Instruction:" if number > first else ""
        text += f"{header} {instruction}\n{number}. Input:\n{given}\n{number}. Output:\n{output}\n"
    return text


def _word(rng: random.Random) -> str:
    return "".join(rng.choice(_START) + rng.choice(_MIDDLE) for _ in range(rng.randint(1, 2))) + rng.choice(_END)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--latency", type=float, default=0.0, help="mean seconds before a reply")
    parser.add_argument("--rough", type=float, default=0.0, help="share of requests that meet a fault")
    parser.add_argument("--tasks", type=int, default=5, help="tasks in a reply")
    parser.add_argument("--log", help="file that gets the log of requests, as JSON, at the end")
    flags = parser.parse_args()
    shares = {name: flags.rough / len(ROUGH) for name in ROUGH}
    with FakeOpenAI(
        port=flags.port,
        faults=shares,
        latency=lambda rng: rng.uniform(0.5, 1.5) * flags.latency,
        tasks_per_reply=flags.tasks,
    ) as running:
        print(f"listening on {running.base_url}", flush=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    if flags.log:
        kept = [{name: value for name, value in entry.items() if name != "body"} for entry in running.log]
        with open(flags.log, "w") as stream:
            json.dump(kept, stream)
