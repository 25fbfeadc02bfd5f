"""Asking a language model over the OpenAI API: retries, rate limits, refused parameters, prices and budgets.

generate_instruction.py and utils.openai_completion ask through it; it is no command itself:

    python generate_instruction.py --num_instructions_to_generate 52000 --max_cost_usd 20      # full scale
    python generate_instruction.py --dry_run True                      # one minute, no key: what a run would cost
"""

import asyncio
import contextvars
import dataclasses
import json
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import Any

from alpaca.common.errors import UserError
from alpaca.generation.prices import DEFAULT_MODEL, check_retired, estimate_tokens, judge_shutdown

OFFICIAL_URL = "https://api.openai.com/v1"
RATE_LIMIT_PATIENCE = 1800.0  # seconds that one request may spend on rate limits alone before the run gives up
BROKEN_REPLIES = 3  # how often the same request may come back unreadable or too late before it is given up
SMALLEST_REPLY = 256  # tokens; a prompt that leaves less room than this is too long for the model

# Parameters that a model may refuse and a run can do without. The length limit is renamed instead.
_OPTIONAL = (
    "stop", "temperature", "top_p", "logit_bias", "reasoning_effort", "presence_penalty", "frequency_penalty",
    "logprobs", "top_logprobs", "echo", "suffix", "best_of", "seed",
)  # fmt: skip
_QUOTA_CODES = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "account_deactivated"}
_POLICY_CODES = {"content_policy_violation", "content_filter", "invalid_prompt"}


class AskError(Exception):
    """This request failed for good, others may go on. `kind` is a short name for the summary."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


@dataclasses.dataclass
class Reply:
    """What the teacher answered. `usage` counts tokens: prompt, completion, and cached (a part of prompt)."""

    text: str
    finish_reason: str | None
    usage: dict[str, int]
    model: str
    request_id: str | None
    seconds: float
    first_token: dict[str, float] | None = None  # its likeliest values and their log-probabilities, where asked for


# ----------------------------------------------------------------------------------------------------------------------
# Whom to ask.


def find_server(base_url: str | None) -> tuple[str, str, bool]:
    """(base URL, key, is it OpenAI itself) from the flag and the environment; UserError when there is nobody to ask."""
    url = (base_url or os.environ.get("OPENAI_BASE_URL") or OFFICIAL_URL).rstrip("/")
    if not re.match(r"https?://", url):
        raise UserError(f"--base_url must begin with http:// or https://, found {url!r}.")
    official = re.match(r"https?://([^/:]+)", url)[1].endswith("api.openai.com")
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key and official:
        raise UserError(
            "no teacher to ask: OPENAI_API_KEY is not set and no --base_url is given. One of these will do:\n"
            f"  export OPENAI_API_KEY=sk-...            then the same command again (model {DEFAULT_MODEL})\n"
            "  --base_url http://127.0.0.1:8080/v1     any server with OpenAI's API, as `python local_llm.py serve`\n"
            "  --dry_run True                          the first prompt and the estimated cost, without asking"
        )
    return url, key or "none", official


def served_model(base_url: str | None, model: str) -> str:
    """The model to ask for: `model`, but where it is OpenAI's default and the server serves only another one, that one.

    Raises UserError where the server serves several others.
    """
    url, key, official = find_server(base_url)
    if official or model != DEFAULT_MODEL:
        return model
    import openai

    try:
        with openai.OpenAI(base_url=url, api_key=key, timeout=30.0, max_retries=1) as client:
            names = [found.id for found in client.models.list().data]
    except openai.APIConnectionError as error:
        raise _unreachable(url, error) from error
    except openai.APIStatusError:
        return model  # no list of models: the first request will tell
    if model in names or not names:
        return model
    if len(names) > 1:
        raise UserError(f"{url} serves {', '.join(sorted(names))}. Choose one with --model_name.")
    print(f"note: {url} serves {names[0]}; it is the teacher.")
    return names[0]


# ----------------------------------------------------------------------------------------------------------------------
# The client.


class Gate:
    """Closed while the server asks for patience; every request passes it before it is sent."""

    def __init__(self) -> None:
        self._opens_at = 0.0
        self._waited_for = 0.0

    def close(self, seconds: float) -> None:
        now = time.monotonic()
        if now + seconds > self._opens_at:
            self._opens_at, self._waited_for = now + seconds, seconds

    async def wait(self) -> None:
        was_closed = False
        while (delay := self._opens_at - time.monotonic()) > 0:
            was_closed = True
            await asyncio.sleep(delay)
        if was_closed:  # not all at once: the next limit would be hit at the same moment
            await asyncio.sleep(random.uniform(0, min(1.0, self._waited_for / 10)))


@dataclasses.dataclass
class _Attempt:
    """One sending of a request. The SDK's own retries reuse it."""

    timeout: asyncio.Timeout
    answered: bool = True


_attempt: contextvars.ContextVar[_Attempt | None] = contextvars.ContextVar("attempt", default=None)


class Turns:
    """At most `count` requests at a time: `async with turns`, in jobs that `finish_all` runs.

    After an error, other than a request's own AskError, nobody has another turn, and those who have one finish: what
    is asked is paid for.
    """

    def __init__(self, count: int):
        self._free, self.error = asyncio.Semaphore(count), None

    async def __aenter__(self) -> None:
        await self._free.acquire()
        if self.error:
            self._free.release()
            raise self.error

    async def __aexit__(self, kind, error, trace) -> None:
        self._free.release()
        if isinstance(error, Exception) and not isinstance(error, AskError):
            self.error = self.error or error

    async def finish_all(self, jobs: Iterable[Awaitable]) -> list[Any]:
        """The results of all `jobs`, in order. Raises what ended the turns, or any other error, when all are done."""
        results = await asyncio.gather(*jobs, return_exceptions=True)
        for result in (self.error, *results):
            if isinstance(result, BaseException):
                raise result
        return results


class Teacher:
    """One model behind one server. `await ask(prompt)` gives a Reply, raises AskError for this request alone and
    UserError where no request can succeed (wrong key, unknown model, no quota, refused content).

    api: "chat", "completions", or "auto": `first_api`, and the other one where the server says that it lacks the first.
    temperature, top_p, max_tokens, extra: sent with every request (None is left out); max_retries: the SDK's retries of
    one request after connection errors, 408, 409, 429 and 5xx; request_timeout: seconds an attempt may take in all.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api: str = "auto",
        first_api: str = "chat",
        temperature: float | None = None,
        top_p: float | None = None,
        max_tokens: int | None = None,
        reasoning_effort: str | None = None,
        max_retries: int = 6,
        request_timeout: float = 600.0,
        extra: Mapping[str, Any] | None = None,
    ):
        if api not in ("auto", "completions", "chat"):
            raise UserError(f"--api must be auto, completions or chat, found {api!r}.")
        self.url, key, self.official = find_server(base_url)
        if self.official:
            check_retired(model)
        self.model, self.request_timeout = model, request_timeout
        # Nearly every server has chat; one that has not, or a base model, says so at the first request.
        self.api, self._may_switch = (first_api, True) if api == "auto" else (api, False)
        self.settings = {"temperature": temperature, "top_p": top_p, "reasoning_effort": reasoning_effort}
        if self.official:  # 1.0 is the default there, and some models refuse the parameter at any value
            self.settings = {name: value for name, value in self.settings.items() if value != 1.0}
        self.settings.update(extra or {})
        self.max_tokens = max_tokens
        self._length_name, self._renamed = ("max_completion_tokens" if self.official else "max_tokens"), False
        self.dropped: set[str] = set()
        self.counts: Counter[str] = Counter()  # what went wrong and was handled
        self.answered = 0
        self.gate = Gate()
        self._client = self._open_client(key, max_retries)

    def _open_client(self, key: str, max_retries: int):
        import openai

        # Every attempt, the SDK's retries among them, passes these hooks.
        http = openai.DefaultAsyncHttpxClient(
            timeout=self.request_timeout,
            event_hooks={"request": [self._before_request], "response": [self._after_response]},
        )
        return openai.AsyncOpenAI(
            api_key=key,
            base_url=self.url,
            organization=os.environ.get("OPENAI_ORG") or os.environ.get("OPENAI_ORG_ID"),
            max_retries=max_retries,
            timeout=self.request_timeout,
            http_client=http,
        )

    @property
    def client(self):
        """The SDK's client, for the Batch API."""
        return self._client

    async def close(self) -> None:
        await self._client.close()

    async def _before_request(self, request) -> None:
        await self.gate.wait()
        if attempt := _attempt.get():
            if not attempt.answered:
                self.counts["connection lost"] += 1
            attempt.answered = False
            # A server that drips a byte a second never meets a read timeout; the whole attempt has one.
            attempt.timeout.reschedule(asyncio.get_running_loop().time() + self.request_timeout)

    async def _after_response(self, response) -> None:
        if response.status_code < 400:
            return
        await response.aread()
        if attempt := _attempt.get():
            attempt.answered = True
            attempt.timeout.reschedule(None)  # the SDK now waits before it tries again
        if response.status_code == 429:
            if _error_code(response) in _QUOTA_CODES:
                response.headers["x-should-retry"] = "false"  # no wait brings back an exhausted quota
            else:
                self.counts["429 rate limit"] += 1
                self.gate.close(_retry_after(response.headers))
        elif response.status_code >= 500:
            self.counts[f"{response.status_code} server error"] += 1

    async def check_model(self) -> None:
        """At OpenAI: fails before the first request where the model does not exist or its shutdown date is past."""
        import openai

        if not self.official:
            return
        try:
            found = await self._client.models.retrieve(self.model)
        except openai.APIStatusError as error:
            if error.status_code != 403:  # a restricted key may ask models and yet not list them
                self.stop_if_permanent(error)
        except openai.APIConnectionError as error:
            raise _unreachable(self.url, error) from error
        else:
            judge_shutdown(self.model, getattr(found, "shutdown_date", None))

    async def ask(self, prompt: str | Sequence[Mapping[str, str]], stop: Sequence[str] | None = None) -> Reply:
        """One reply to a prompt, or to chat messages. `stop` goes to completion models only: chat models end by
        themselves, and reasoning models refuse it."""
        return self.read_reply(await self.post(prompt, stop), prompt)

    async def post(self, prompt: str | Sequence[Mapping[str, str]], stop: Sequence[str] | None = None) -> dict:
        """As ask, but returns the server's JSON object, which has a choice, with "_request_id" and "_seconds"."""
        import httpx2
        import openai

        begin, room, unreadable, patience = time.monotonic(), self.max_tokens, 0, RATE_LIMIT_PATIENCE
        while True:
            path, body = self.request(prompt, stop, room)
            try:
                async with asyncio.timeout(self.request_timeout) as timeout:
                    before = _attempt.set(_Attempt(timeout))
                    try:
                        response = await self._client.post(path, body=body, cast_to=httpx2.Response)
                    finally:
                        _attempt.reset(before)
                data = json.loads(response.text)
                if data["choices"]:
                    self.answered += 1
                    data["_request_id"] = response.headers.get("x-request-id")
                    data["_seconds"] = round(time.monotonic() - begin, 3)
                    return data
                kind, reason = "empty choices", "the reply has no choices"
            except (ValueError, KeyError, TypeError) as error:
                kind, reason = "broken JSON", f"the reply is not what the API promises: {error!r}"
            except (TimeoutError, openai.APITimeoutError):
                kind, reason = "timeout", f"no whole reply within {self.request_timeout:g} s"
            except openai.RateLimitError as error:
                self.stop_if_permanent(error)
                wait = _retry_after(error.response.headers)
                patience -= max(wait, 1.0)
                if patience < 0:
                    raise UserError(
                        f"{self.url} limits the rate and asks to wait {wait:.0f} s more: {_message(error)}\n"
                        "What was answered is kept; run the same command later, or with a lower --max_concurrency."
                    ) from error
                continue  # the gate does the waiting
            except openai.APIStatusError as error:
                if error.status_code >= 500 or error.status_code in (408, 409):  # after all retries
                    raise AskError("server error", f"{error.status_code}: {_message(error)}") from error
                room = self._adapt(error, body, room, isinstance(prompt, str))
                continue
            except openai.APIConnectionError as error:
                if not self.answered:
                    raise _unreachable(self.url, error) from error
                raise AskError("connection error", str(error.__cause__ or error)) from error
            self.counts[kind] += 1
            unreadable += 1
            if unreadable >= BROKEN_REPLIES:
                raise AskError(kind, reason)

    def request(
        self, prompt: str | Sequence[Mapping[str, str]], stop: Sequence[str] | None = None, room: int | None = None
    ) -> tuple[str, dict]:
        """(path, JSON body) of a request as this model takes it. `room`: most tokens of the reply."""
        settings = {**self.settings, self._length_name: room or self.max_tokens}
        if isinstance(prompt, str) and self.api == "completions":
            path, content = "/completions", {"prompt": prompt}
            settings["stop"] = settings.get("stop") or stop
            settings.pop("reasoning_effort", None)
            if likeliest := settings.pop("top_logprobs", None):
                settings["logprobs"] = min(likeliest, 5)  # as many as OpenAI's completions give
        else:
            path = "/chat/completions"
            content = {"messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)}
            if settings.get("top_logprobs"):
                settings["logprobs"] = True
        sent = {name: value for name, value in settings.items() if value is not None and name not in self.dropped}
        return path, {"model": self.model, **content, **sent}

    def read_reply(self, data: dict, prompt: str | Sequence[Mapping[str, str]]) -> Reply:
        choice = data["choices"][0]
        message = choice.get("message") or {}
        text = choice.get("text") or message.get("content") or ""
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate could be written to no file
        counted, details = data.get("usage") or {}, (data.get("usage") or {}).get("prompt_tokens_details") or {}
        usage = {
            "prompt": counted.get("prompt_tokens") or estimate_tokens(json.dumps(prompt, ensure_ascii=False)),
            "completion": counted.get("completion_tokens") or estimate_tokens(text),
        }
        if details.get("cached_tokens"):
            usage["cached"] = details["cached_tokens"]
        return Reply(
            text=text,
            finish_reason=choice.get("finish_reason"),
            usage=usage,
            model=data.get("model") or self.model,
            request_id=data["_request_id"] or data.get("id"),
            seconds=data["_seconds"],
            first_token=_first_token(choice.get("logprobs")),
        )

    # ------------------------------------------------------------------------------------------------------------------
    # What a refusal means.

    def _adapt(self, error, body: Mapping[str, Any], room: int | None, is_text: bool) -> int | None:
        """Makes the request acceptable after a 4xx and returns the room for its reply, or raises."""
        message, code = _message(error), error.code or ""
        no_endpoint = error.status_code in (404, 405) or "chat template" in message.lower()
        if is_text and no_endpoint and self._switch_api(body, message):
            return room
        self.stop_if_permanent(error)
        named = [p for p in body if error.param == p or re.search(rf"\b{p}\b", message)]
        too_long = code == "context_length_exceeded" or re.search(
            r"(?i)context[ _](length|size|window)|reduce (your prompt|the length)|"
            r"max_\w*tokens\W+(is too large|must be)",
            message,
        )
        # Under its other name too the limit was refused: then it is its size that the server does not take.
        if too_long or (self._renamed and self._length_name in named):
            if not room or int(room * 0.8) < SMALLEST_REPLY:
                raise AskError("prompt too long", message) from error
            self.counts["reply shortened to fit the model"] += 1
            return int(room * 0.8)
        other_name = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
        for name in named:
            if name in other_name:
                if self._length_name == name:  # else another request has learned it already
                    self._length_name, self._renamed = other_name[name], True
                    self._warn(f"{self.model} refuses {name}; {self._length_name} is sent instead")
                return room
        refused = [name for name in named if name in _OPTIONAL]
        if not refused:
            raise UserError(f"{self.url} refuses the request ({error.status_code}): {message}") from error
        for name in refused:
            if name not in self.dropped:
                self.dropped.add(name)
                self._warn(f"{self.model} refuses {name}={body[name]!r}; it is left out from here on")
        return room

    def _switch_api(self, body: Mapping[str, Any], message: str) -> bool:
        """Goes over to the other endpoint, once, where the model or the server lacks the first; True to ask again."""
        unknown_model = re.search(r"(?i)model.*(does not exist|not found|not available)|no such model", message)
        asked = "completions" if "prompt" in body else "chat"
        if self.api != asked:
            return True  # another request has learned it already
        if not self._may_switch or unknown_model:
            return False
        self.api, self._may_switch = ("chat" if asked == "completions" else "completions"), False
        self._warn(f"{self.model} at {self.url} has no {asked} endpoint; {self.api} is used")
        return True

    def stop_if_permanent(self, error) -> None:
        """Raises UserError, with the server's own reason, for errors that no repetition mends."""
        status, code, message = error.status_code, error.code or "", _message(error)
        kept = "What was answered is kept."
        if status == 401:
            raise UserError(
                f"{self.url} does not accept the key (401): {message}\nSet OPENAI_API_KEY. {kept}"
            ) from error
        if status == 403:
            raise UserError(f"{self.url} forbids this (403): {message}\n{kept}") from error
        if status == 404:
            raise UserError(
                f"{self.url} has no model or endpoint for {self.model!r} (404): {message}\n"
                f"Check --model_name, --base_url and --api. {kept}"
            ) from error
        if code in _QUOTA_CODES or getattr(error, "type", None) in _QUOTA_CODES:
            raise UserError(f"the quota at {self.url} is exhausted ({code or status}): {message}\n{kept}") from error
        if code in _POLICY_CODES:
            raise UserError(f"{self.url} refuses the prompt's content ({code}): {message}\n{kept}") from error

    def _warn(self, text: str) -> None:
        print(f"note: {text}.", file=sys.stderr)


def _first_token(logprobs: Any) -> dict[str, float] | None:
    """The likeliest first tokens of a reply, in the form of chat (a list of objects) or of completions (a dict)."""
    try:
        if content := logprobs.get("content"):
            likeliest = [(found["token"], found["logprob"]) for found in content[0]["top_logprobs"]]
        else:
            likeliest = logprobs["top_logprobs"][0].items()
        return {token: float(logprob) for token, logprob in likeliest} or None
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        return None


def _unreachable(url: str, error: Exception) -> UserError:
    return UserError(
        f"no connection to {url}: {error.__cause__ or error}\nIs the server running, and is --base_url right?"
    )


def _message(error) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or error.message)


def _error_code(response) -> str | None:
    try:
        error = response.json().get("error") or {}
    except (ValueError, AttributeError):
        return None
    return error.get("code") or error.get("type") if isinstance(error, dict) else None


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds the server asks to wait: Retry-After-Ms, Retry-After in seconds or as a date; 1 where it does not say."""
    import email.utils

    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) / unit)
        except (KeyError, ValueError):
            continue
    when = email.utils.parsedate_tz(headers.get("retry-after"))
    return max(0.0, email.utils.mktime_tz(when) - time.time()) if when else 1.0


# ----------------------------------------------------------------------------------------------------------------------
# The original's openai_completion, on top of the client.


class Completion(dict):
    """One choice of a reply: text, finish_reason, total_tokens and the server's fields, as items and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def complete_all(
    prompts: Sequence[Any], model: str, settings: Mapping[str, Any], max_concurrency: int = 16
) -> list[list[Completion]]:
    """Asks for every prompt (text, chat message or list of chat messages) and returns its choices, in order.

    Raises UserError where a request cannot be answered.
    """
    settings = dict(settings)
    max_tokens = settings.pop("max_tokens", None)

    async def ask_all() -> list[list[Completion]]:
        teacher = Teacher(model, max_tokens=max_tokens, extra=settings)
        turns = Turns(max_concurrency)

        async def ask_one(prompt: Any) -> list[Completion]:
            async with turns:
                try:
                    data = await teacher.post([prompt] if isinstance(prompt, Mapping) else prompt)
                except AskError as error:
                    raise UserError(f"{teacher.url} did not answer: {error}") from error
            tokens = (data.get("usage") or {}).get("total_tokens")
            return [
                Completion(
                    choice,
                    text=choice.get("text") or (choice.get("message") or {}).get("content") or "",
                    total_tokens=tokens,
                )
                for choice in data["choices"]
            ]

        try:
            return await turns.finish_all(map(ask_one, prompts))
        finally:
            await teacher.close()

    return asyncio.run(ask_all())
