"""Asks a language model over the OpenAI API: retries, rate limits, refused parameters, unusual replies.

The openai SDK sends the requests. Retries of completions are counted and bounded here, because all requests wait
together where the server limits the rate.
"""

import asyncio
import contextlib
import dataclasses
import datetime
import email.utils
import json
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2
import openai

from alpaca.common.errors import UserError
from alpaca.generation.many_requests import LONGEST_WAIT, RateLimitGate, RequestFailed
from alpaca.generation.prices import DEFAULT_MODEL, estimate_tokens
from alpaca.generation.server import find_server
from alpaca.generation.settings import GenerationSettings

CUT_OFF_TRIES = 3  # how often a request may come back incomplete or too late
SMALLEST_REPLY = 256  # tokens; a prompt that leaves less room than this is too long for the model
SHOWN = 200  # characters of an unexpected reply that are shown

# Parameters that a model may refuse and a run can do without. The length limit is renamed or lowered instead.
_OPTIONAL = (
    "stop", "temperature", "top_p", "logit_bias", "reasoning_effort", "presence_penalty", "frequency_penalty",
    "logprobs", "top_logprobs", "echo", "suffix", "best_of", "seed",
)  # fmt: skip
_LENGTHS = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
_QUOTA_CODES = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "account_deactivated"}
_POLICY_CODES = {"content_policy_violation", "content_filter", "invalid_prompt"}


@dataclasses.dataclass
class Reply:
    """What the model answered.

    usage counts tokens: prompt, completion, and where the server says so cached (a part of prompt) and reasoning (a
    part of completion). first_token: its likeliest values and their log-probabilities, where asked for. sent: the
    server's JSON, where it has another form than the API promises.
    """

    text: str
    finish_reason: str | None
    usage: dict[str, int]
    model: str  # as the server calls it
    asked: str  # as it was asked for
    request_id: str | None
    seconds: float | None
    first_token: dict[str, float] | None = None
    sent: Any = None


def served_model(base_url: str | None, model: str, flag: str = "--model_name") -> str:
    """The model to ask for: `model`, but where it is OpenAI's default and the server serves only another one, that one.

    `flag`: the command's flag for the model. Raises UserError where the server serves several others.
    """
    server = find_server(base_url)
    if server.official or model != DEFAULT_MODEL:
        return model
    try:
        with openai.OpenAI(
            base_url=server.url, default_query=server.query, api_key=server.key, timeout=30.0, max_retries=1
        ) as client:
            listed = client.get("/models", cast_to=httpx2.Response).json()
        names = [found["id"] for found in listed["data"]]
    except openai.APIConnectionError as error:
        raise server.unreachable(error) from error
    except (openai.APIStatusError, ValueError, KeyError, TypeError):
        return model  # no list of models: the first request will tell
    if model in names or not names:
        return model
    if len(names) > 1:
        raise UserError(f"{server.url} serves {', '.join(sorted(map(str, names)))}. Choose one with {flag}.")
    print(f"note: {server.url} serves {names[0]}; it is the model that is asked.")
    return names[0]


# ----------------------------------------------------------------------------------------------------------------------
# The client.


class ModelClient:
    """One model behind one server. `await ask(prompt)` gives a Reply, raises RequestFailed for this request alone and
    UserError where no request can succeed (wrong key, unknown model, no quota).

    api: "chat", "completions", or "auto": `first_api`, and the other one where the server says that it lacks the first.
    temperature, top_p, max_tokens, extra: sent with every request (None is left out); max_retries: of one request after
    connection errors, 408, 409 and 5xx; request_timeout: seconds that one try may take in all; flag: the command's flag
    for the model, which errors name. `counts` holds what went wrong and was mended by another try.
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
        flag: str = "--model_name",
    ):
        if api not in ("auto", "completions", "chat"):
            raise UserError(f"--api must be auto, completions or chat, found {api!r}.")
        self.server = find_server(base_url)
        self.model, self.url, self.flag = model, self.server.url, flag
        self.max_retries, self.request_timeout = max_retries, request_timeout
        # Nearly every server has chat; one that has not, or a base model, says so at the first request.
        self.api, self._may_switch = (first_api, True) if api == "auto" else (api, False)
        self.settings = {"temperature": temperature, "top_p": top_p, "reasoning_effort": reasoning_effort}
        if self.server.official:  # 1.0 is the default there, and some models refuse the parameter at any value
            self.settings = {name: value for name, value in self.settings.items() if value != 1.0}
        self.settings.update(extra or {})
        self.max_tokens = max_tokens
        self._length_name = "max_completion_tokens" if self.server.official else "max_tokens"
        self._length_renamed = False
        self.dropped: set[str] = set()  # parameters that the model refuses
        self.counts: Counter[str] = Counter()
        self.answered = False  # a reply has come
        self.accepted = False  # or did in an earlier run: requests of this form are right
        self.gate = RateLimitGate(self.url)
        # The SDK's own retries serve the Batch API's calls.
        self.sdk = openai.AsyncOpenAI(
            api_key=self.server.key,
            base_url=self.url,
            default_query=self.server.query,
            organization=os.environ.get("OPENAI_ORG") or os.environ.get("OPENAI_ORG_ID"),
            max_retries=max_retries,
            timeout=request_timeout,
        )
        self._once = self.sdk.with_options(max_retries=0)

    @classmethod
    def for_settings(cls, settings: GenerationSettings, **connection: Any) -> "ModelClient":
        """The client of a generation run."""
        names = ("api", "temperature", "top_p", "max_tokens", "reasoning_effort")
        return cls(settings.model_name, **{name: getattr(settings, name) for name in names}, **connection)

    async def close(self) -> None:
        await self.sdk.close()

    async def check_model(self) -> None:
        """At OpenAI: fails before the first request where the model does not exist or its shutdown date is past."""
        if not self.server.official:
            return
        try:
            date = getattr(await self.sdk.models.retrieve(self.model), "shutdown_date", None)
        except openai.APIStatusError as error:
            if error.status_code != 403:  # a restricted key may ask models and yet not list them
                self.stop_if_permanent(error)
            return
        except openai.APIConnectionError as error:
            raise self.server.unreachable(error) from error
        if date and date <= datetime.date.today().isoformat():
            raise UserError(f"OpenAI shut down {self.model} on {date}. Use {self.flag} {DEFAULT_MODEL}.")
        if date:
            print(f"note: OpenAI will shut down {self.model} on {date}; {DEFAULT_MODEL} is the current small model.")

    async def ask(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        stop: Sequence[str] | None = None,
        temperature: float | None = None,
    ) -> Reply:
        """One reply to a prompt, or to chat messages. `stop` goes to completion models only: chat models end by
        themselves, and reasoning models refuse it. `temperature`: another one than the client's."""
        begin = time.monotonic()
        data, request_id = await self.post(prompt, stop, temperature)
        try:
            return self.read_reply(data, prompt, request_id, round(time.monotonic() - begin, 3))
        except Exception as error:  # whatever form it has: it is paid for, and the caller keeps it
            raise RequestFailed("unreadable reply", repr(error), data) from error

    async def post(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        stop: Sequence[str] | None = None,
        temperature: float | None = None,
    ) -> tuple[dict[str, Any], str | None]:
        """As ask, but returns the server's JSON object, which has a choice, and the id of the request."""
        room, tries = self.max_tokens, Counter()
        while True:
            await self.gate.wait()
            path, body = self.request(prompt, stop, room, temperature)
            wait = None
            try:
                async with asyncio.timeout(self.request_timeout):  # of the whole try: a slow drip meets no read timeout
                    response = await self._once.post(path, body=body, cast_to=httpx2.Response)
                data = _json_object(response.text)
                self.answered = self.accepted = True
                self.gate.reply_came()
                return data, response.headers.get("x-request-id")
            except (TimeoutError, openai.APITimeoutError):
                failure = RequestFailed("timeout", f"no whole reply within {self.request_timeout:g} s")
            except openai.APIConnectionError as error:
                failure = RequestFailed("connection lost", str(error.__cause__ or error))
                if not self.answered and tries["connection lost"] >= self.max_retries:
                    raise self.server.unreachable(error) from error
            except openai.RateLimitError as error:
                self.stop_if_permanent(error)
                self.counts["429 rate limit"] += 1
                self.gate.close(_retry_after(error.response.headers), _message(error))
                continue
            except openai.APIStatusError as error:
                if error.status_code < 500 and error.status_code not in (408, 409):
                    room = self._adapt(error, body, room, isinstance(prompt, str))
                    continue
                failure = RequestFailed(f"{error.status_code} server error", _message(error))
                wait = _retry_after(error.response.headers)
            except RequestFailed as error:
                if error.kind != "broken JSON":
                    raise
                failure = error
            tries[failure.kind] += 1
            billed = tries["timeout"] + tries["broken JSON"]  # perhaps
            if tries.total() > self.max_retries or billed >= CUT_OFF_TRIES:
                raise failure
            self.counts[failure.kind] += 1
            if wait is None:
                wait = min(0.5 * 2.0 ** (tries.total() - 1), 8.0) * random.uniform(0.75, 1.0)
            await asyncio.sleep(min(wait, LONGEST_WAIT))

    def request(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        stop: Sequence[str] | None = None,
        room: int | None = None,
        temperature: float | None = None,
    ) -> tuple[str, dict]:
        """(path, JSON body) of a request as this model takes it. `room`: most tokens of the reply."""
        settings = {**self.settings, self._length_name: room or self.max_tokens}
        if temperature is not None:
            settings["temperature"] = temperature
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

    def read_reply(
        self, data: dict[str, Any], prompt: Any, request_id: str | None = None, seconds: float | None = None
    ) -> Reply:
        """The Reply in a server's JSON object, whatever its form: what cannot be read is kept in `sent`."""
        choice = data["choices"][0]
        message = choice.get("message")
        content = choice.get("text")
        if content is None and isinstance(message, dict):
            content = message.get("content")
        text = text_of(content).encode("utf-8", "replace").decode()  # a lone surrogate could be written to no file
        usage, usual = _read_usage(data.get("usage"))
        guesses = {"prompt": lambda: json.dumps(prompt, ensure_ascii=False), "completion": lambda: text}
        usage = {name: usage.get(name) or estimate_tokens(guess()) for name, guess in guesses.items()} | usage
        thoughts = message.get("reasoning_content") or message.get("reasoning") if isinstance(message, dict) else None
        if isinstance(thoughts, str) and thoughts and not usage.get("reasoning"):  # vLLM counts none
            usage["reasoning"] = min(estimate_tokens(thoughts), usage["completion"])
        finish_reason = choice.get("finish_reason")
        usual = usual and isinstance(content, str | None) and isinstance(finish_reason, str | None)
        return Reply(
            text=text,
            finish_reason=finish_reason if isinstance(finish_reason, str | None) else str(finish_reason),
            usage=usage,
            model=str(data.get("model") or self.model),
            asked=self.model,
            request_id=request_id or data.get("id"),
            seconds=seconds,
            first_token=_first_token(choice.get("logprobs")),
            sent=None if usual else data,
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
        if code in _POLICY_CODES or re.search(r"(?i)content (management policy|filter)", message):
            raise RequestFailed("refused content", message) from error
        named = [name for name in body if error.param == name or re.search(rf"\b{name}\b", message)]
        length = next((name for name in named if name in _LENGTHS), None)
        unknown = code == "unsupported_parameter" or re.search(
            r"(?i)unsupported|not supported|unknown|unrecogni[sz]ed|unexpected|not permitted|instead", message
        )
        if length and unknown and not (self._length_renamed and length == self._length_name):
            if self._length_name == length:  # else another request has learned it already
                self._length_name, self._length_renamed = _LENGTHS[length], True
                self._warn(f"{self.model} refuses {length}; {self._length_name} is sent instead")
            return room
        if length and (most := _range_end(message, room)):
            self.max_tokens = most
            self._warn(f"{self.model} takes at most {most} for {length}; longer replies are cut there")
            return most
        too_long = r"(?i)context[ _](length|size|window)|reduce (your prompt|the length)|too (long|large)"
        if length or code == "context_length_exceeded" or re.search(too_long, message):
            if not room or int(room * 0.8) < SMALLEST_REPLY:
                raise RequestFailed("prompt too long", message) from error
            self.counts["reply shortened to fit the model"] += 1
            return int(room * 0.8)
        refused = [name for name in named if name in _OPTIONAL]
        if refused:
            for name in set(refused) - self.dropped:
                self.dropped.add(name)
                self._warn(f"{self.model} refuses {name}={body[name]!r}; it is left out from here on")
            return room
        if self.accepted:  # it is this prompt
            raise RequestFailed("refused request", f"{error.status_code}: {message}") from error
        raise UserError(f"{self.url} refuses the request ({error.status_code}): {message}") from error

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
            small = f" OpenAI's current small model is {DEFAULT_MODEL}." if self.server.official else ""
            raise UserError(
                f"{self.url} has no model or endpoint for {self.model!r} (404): {message}\n"
                f"Check {self.flag}, --base_url and --api.{small} {kept}"
            ) from error
        if code in _QUOTA_CODES or getattr(error, "type", None) in _QUOTA_CODES:
            raise UserError(f"the quota at {self.url} is exhausted ({code or status}): {message}\n{kept}") from error

    def _warn(self, text: str) -> None:
        print(f"note: {text}.", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# Reading what servers send.


def _json_object(text: str) -> dict[str, Any]:
    """The JSON object in the body of a 200, which has at least one choice; RequestFailed with its words where not.

    A text that begins as JSON and does not end as such was cut off on its way (kind "broken JSON").
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        if text.lstrip()[:1] in ("", "{", "["):
            raise RequestFailed("broken JSON", f"the reply is cut off: ...{text[-SHOWN:]!r}") from error
        raise RequestFailed("unreadable reply", f"expected JSON, found {text[:SHOWN]!r}", text) from error
    choices = data.get("choices") if isinstance(data, dict) else None
    if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
        raise RequestFailed("unreadable reply", f"expected choices, found {text[:SHOWN]}", data)
    return data


def text_of(content: Any) -> str:
    """The text of a reply's content: a string, or a list of parts of which those of type text count."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        kind = content.get("type", "text")
        return text_of(content.get("text")) if kind in ("text", "output_text") else ""
    return "".join(map(text_of, content)) if isinstance(content, list) else ""


def _read_usage(counted: Any) -> tuple[dict[str, int], bool]:
    """Tokens of prompt and completion (more than 0), cached and reasoning, as far as they can be read; and whether the
    server sent them as the API promises, or not at all.

    Some servers count reasoning in total_tokens alone: it is a part of the completion here.
    """
    if not isinstance(counted, dict):
        return {}, counted is None
    usual = True

    def number(place: Any, name: str) -> int:
        nonlocal usual
        value = place.get(name) if isinstance(place, dict) else None
        if value is None:
            return 0
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        usual = False
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            return max(int(float(value)), 0)
        return 0

    prompt = number(counted, "prompt_tokens")
    completion = number(counted, "completion_tokens")
    if prompt:
        completion = max(completion, number(counted, "total_tokens") - prompt)
    found = {"prompt": prompt, "completion": completion}
    found["cached"] = min(number(counted.get("prompt_tokens_details"), "cached_tokens"), prompt)
    found["reasoning"] = number(counted.get("completion_tokens_details"), "reasoning_tokens")
    return {name: value for name, value in found.items() if value}, usual


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


def _message(error) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or error.message)[:2000]


def _range_end(message: str, room: int | None) -> int | None:
    """The largest value that a message such as "max_tokens must be in [1, 2048]" allows, where it is below `room`."""
    found = re.search(
        r"(?i)[\[(]\s*\d+\s*,\s*(\d+)\s*[\])]|\bbetween\s+\d+\s+and\s+(\d+)"
        r"|(?:<=?|\b(?:less than or equal to|at most|up to|no more than|maximum(?: value)?(?: of| is| allowed is)?:?))"
        r"\W{0,3}(\d+)",
        message,
    )
    most = int(next(filter(None, found.groups()))) if found else 0
    return most if room and 0 < most < room else None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds the server asks to wait: Retry-After-Ms, Retry-After in seconds or as a date; None where it is silent."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) / unit)
        except (KeyError, ValueError):
            continue
    when = email.utils.parsedate_tz(headers.get("retry-after"))
    return max(0.0, email.utils.mktime_tz(when) - time.time()) if when else None
