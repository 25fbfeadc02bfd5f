"""client.py and utils.openai_completion against a local server: what is retried, what stops, what is renamed."""

import asyncio
import datetime
import errno
import os
import pickle
import time

import pytest
from fake_openai import FakeOpenAI

from alpaca.common.errors import UserError
from alpaca.common.files import jload
from alpaca.common.journal import Journal, read_records
from alpaca.generation import client, many_requests, prices
from alpaca.generation import server as client_server
from alpaca.generation.client import ModelClient
from alpaca.generation.many_requests import RequestFailed
from alpaca.generation.openai_completion import NotAllAnswered
from utils import OpenAIDecodingArguments, openai_completion


def ask(server, prompts=("Say something.",), close=True, **options):
    """Replies (or RequestFaileds) to prompts asked at the same time, and the ModelClient."""
    options = {"model": "fake-model", "max_tokens": 2000, "max_retries": 4, **options}
    options.setdefault("base_url", server and server.base_url)

    async def main():
        one = ModelClient(**options)
        try:
            tasks = [one.ask(prompt, stop=["\n21. Instruction:"]) for prompt in prompts]
            return await asyncio.gather(*tasks, return_exceptions=True), one
        finally:
            await one.close()

    results, one = asyncio.run(main())
    for result in results:
        if isinstance(result, UserError):
            raise result
    return results, one


def once(fault, times=1):
    """A server that misbehaves for its first requests only."""
    return lambda number, body: fault if number < times else None


# ----------------------------------------------------------------------------------------------------------------------
# Replies.


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_reply_has_text_usage_and_identity(api):
    """Everything that the journal keeps of a reply is read from either endpoint."""
    with FakeOpenAI(reply={"text": "Hello.", "finish_reason": "length"}) as server:
        (reply,), _ = ask(server, ["Say hello to me."], api=api, temperature=0.5)
        sent = server.log[0]["body"]
    assert (reply.text, reply.finish_reason, reply.model) == ("Hello.", "length", "fake-model")
    assert reply.usage == {"prompt": 4, "completion": 1} and reply.request_id.startswith("req_")
    assert sent["temperature"] == 0.5 and sent["max_tokens"] == 2000
    assert ("stop" in sent) == (api == "completions")  # reasoning models refuse it, and chat needs none


def test_auto_takes_chat_and_goes_over_to_completions_where_there_is_none():
    """SA#63: chat models, base models and local servers without a chat template, from the same command."""
    with FakeOpenAI(chat=False) as server:
        replies, one = ask(server, ["a", "b", "c"])
    assert [reply.text != "" for reply in replies] == [True] * 3 and one.api == "completions"
    with FakeOpenAI(completions=False) as server:
        _, one = ask(server)
    assert one.api == "chat"


def test_messages_without_content_or_usage():
    """A refusal has null content, and some servers count no tokens: neither may break the run or cost nothing."""
    with FakeOpenAI(reply={"text": None, "finish_reason": "stop", "usage": None}) as server:
        (reply,), _ = ask(server)
    assert reply.text == "" and reply.usage["prompt"] > 0 and reply.usage["completion"] > 0


# ----------------------------------------------------------------------------------------------------------------------
# What is retried, and for how long.


@pytest.mark.parametrize(
    ("fault", "counted"),
    [
        ("429", "429 rate limit"),
        ("500", "500 server error"),
        ("503", "503 server error"),
        ("reset", "connection lost"),
        ("reset_early", "connection lost"),
        ("broken_json", "broken JSON"),
    ],
)
def test_passing_faults_are_retried_and_counted(fault, counted):
    """Each of these once lost a request or stopped a run."""
    with FakeOpenAI(faults=once(fault)) as server:
        replies, one = ask(server)
    assert replies[0].text and one.counts[counted] == 1


def test_a_length_limit_refused_under_both_names_ends():
    """The two names were tried in turn for ever, as fast as the server could refuse them."""
    with FakeOpenAI(refuses=("max_tokens", "max_completion_tokens")) as server:
        (error,), _ = ask(server)
        tries = len(server.log)
    assert isinstance(error, RequestFailed) and "not supported" in str(error) and tries < 15


@pytest.mark.parametrize(
    ("fault", "kind"),
    [("500", "500 server error"), ("broken_json", "broken JSON"), ("empty_choices", "unreadable reply")],
)
def test_lasting_faults_end_in_a_bounded_number_of_tries(fault, kind):
    """The original retried for ever."""
    with FakeOpenAI(faults={fault: 1.0}) as server:
        (error,), _ = ask(server, max_retries=1)
        tries = len(server.log)
    assert isinstance(error, RequestFailed) and error.kind == kind and tries <= 4


def test_a_drip_or_a_hang_meets_the_request_timeout():
    """A server that sends a byte now and then never meets a read timeout: the whole attempt has a limit."""
    with FakeOpenAI(faults={"hang": 1.0}) as server:
        (error,), _ = ask(server, request_timeout=0.2, max_retries=0)
    assert isinstance(error, RequestFailed) and error.kind == "timeout"
    with FakeOpenAI(faults={"drip": 1.0}) as server:
        (reply,), _ = ask(server, request_timeout=5.0)
    assert reply.text


def test_all_requests_wait_as_the_server_says():
    """A 429 closes the gate for everybody: no request is sent before Retry-After is over."""
    with FakeOpenAI(faults=once("429"), retry_after=0.6) as server:

        async def main():
            one = ModelClient("fake-model", server.base_url, max_retries=3)
            first = asyncio.create_task(one.ask("first"))
            await asyncio.sleep(0.2)  # the 429 is here now
            await asyncio.gather(first, *(one.ask(f"prompt {i}") for i in range(8)))
            await one.close()

        asyncio.run(main())
        refused, *others = server.log
    assert len(others) == 9
    assert min(entry["begin"] for entry in others) - refused["end"] > 0.55


def test_retry_after_in_all_its_spellings():
    """Seconds, milliseconds, a date, nothing."""
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=100)
    assert client._retry_after({"retry-after": "2.5"}) == 2.5
    assert client._retry_after({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5
    assert 95 < client._retry_after({"retry-after": soon.strftime("%a, %d %b %Y %H:%M:%S GMT")}) <= 100
    assert client._retry_after({}) is client._retry_after({"retry-after": "soon"}) is None


def test_a_rate_limit_that_never_ends_stops_the_run(monkeypatch):
    """Bounded too: the message says what the server wants."""
    monkeypatch.setattr(many_requests, "RATE_LIMIT_PATIENCE", 1.5)
    with FakeOpenAI(faults={"429": 1.0}, retry_after=0.01) as server, pytest.raises(UserError, match="limits the rate"):
        ask(server, max_retries=0)


# ----------------------------------------------------------------------------------------------------------------------
# What stops at once.


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("401", "does not accept the key.*Incorrect API key"),
        ("403", "forbids this.*Country not supported"),
        ("404", "no model or endpoint.*does not exist"),
        ("quota", "quota.*exhausted.*exceeded your current quota"),
    ],
)
def test_permanent_errors_stop_at_the_first_reply_with_their_reason(fault, words):
    """A wrong key was retried for ever as a "rate limit"."""
    with FakeOpenAI(faults={fault: 1.0}) as server:
        with pytest.raises(UserError, match=f"(?s){words}"):
            ask(server)
        assert len(server.log) == 1


def test_no_server_is_told_at_once():
    """A wrong --base_url is the user's to mend, not twenty failures in a row."""
    with FakeOpenAI() as server:
        pass
    with pytest.raises(UserError, match="(?s)no connection to http://127.0.0.1.*Is the server running"):
        ask(server, max_retries=1)


def test_the_key_is_sent_and_never_shown(monkeypatch):
    """Keys belong neither into messages nor into files."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-word")
    with FakeOpenAI(key="sk-secret-word") as server:
        assert ask(server)[0][0].text
    with FakeOpenAI(key="sk-another") as server, pytest.raises(UserError) as caught:
        ask(server)
    assert "secret" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# Parameters, lengths, names, prices.


def test_refused_parameters_are_dropped_or_renamed_with_one_warning(capsys):
    """Reasoning models refuse stop, temperature, logit_bias and max_tokens with a 400."""
    refused = ("max_tokens", "temperature", "logit_bias")
    with FakeOpenAI(refuses=refused) as server:
        replies, _ = ask(server, [f"p{i}" for i in range(10)], temperature=0.7, extra={"logit_bias": {"50256": -100}})
        last = server.log[-1]["body"]
    assert all(reply.text for reply in replies)
    assert last["max_completion_tokens"] == 2000 and not set(refused) & set(last)
    notes = capsys.readouterr().err
    assert [notes.count(f"refuses {name}") for name in refused] == [1, 1, 1]


def test_an_unknown_400_is_shown_and_stops():
    """Only known parameters are dropped; anything else is for the user to read."""
    with FakeOpenAI(refuses=("model",)) as server, pytest.raises(UserError, match="'model' is not supported"):
        ask(server)


def test_a_reply_is_shortened_to_fit_the_models_context():
    """The original's "Please reduce your prompt" handling, bounded."""
    with FakeOpenAI(faults={"context": 1.0}) as server:
        (reply,), one = ask(server)
        assert reply.text and server.log[-1]["body"]["max_tokens"] <= 1024
        assert one.counts["reply shortened to fit the model"] == len(server.log) - 1
    with FakeOpenAI(faults={"context": 1.0}, context_room=0) as server:
        (error,), _ = ask(server)
        assert len(server.log) < 20
    assert isinstance(error, RequestFailed) and error.kind == "prompt too long"


def test_a_retired_model_is_told_with_its_successor(monkeypatch):
    """text-davinci-003 is in every old command; OpenAI's own 404 comes before the first request. Elsewhere the name is
    free."""
    with FakeOpenAI(models=("another",)) as server:
        monkeypatch.setattr(client_server, "OFFICIAL_HOST", "127.0.0.1")
        monkeypatch.setenv("OPENAI_API_KEY", "k")
        with pytest.raises(UserError, match=f"(?s)text-davinci-003.*does not exist.*{prices.DEFAULT_MODEL}"):
            check_model(server, "text-davinci-003")
        assert not server.log
    monkeypatch.undo()
    with FakeOpenAI(models=("text-davinci-003",)) as server:
        assert ask(server, model="text-davinci-003")[0][0].text


def check_model(server, model):
    async def check():
        one = ModelClient(model, server.base_url)
        try:
            await one.check_model()
        finally:
            await one.close()

    asyncio.run(check())


def test_shutdown_dates_of_the_model_list(monkeypatch, capsys):
    """GET /v1/models knows when a model ends: a past date stops the run, a coming one is said."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setattr(client_server, "OFFICIAL_HOST", "127.0.0.1")
    with FakeOpenAI(models=("new-model",), shutdown_date="2025-01-01") as server:
        with pytest.raises(UserError, match="shut down new-model on 2025-01-01"):
            check_model(server, "new-model")
    with FakeOpenAI(models=("new-model",), shutdown_date="2999-01-01") as server:
        check_model(server, "new-model")
    assert "will shut down new-model on 2999-01-01" in capsys.readouterr().out


def test_the_default_model_is_priced():
    assert prices.find_price(prices.DEFAULT_MODEL).output > 0 and len(jload("configs/prices.json")["as_of"]) == 10


def test_prices():
    """Flags before table, snapshots as their family, cached tokens and batches at their own price."""
    price = prices.find_price("x", price_input=1.0, price_output=10.0)
    assert price.cost({"prompt": 1_000_000, "completion": 500_000}) == pytest.approx(6.0)
    assert price.cost({"prompt": 1_000_000, "completion": 500_000}, batch=True) == pytest.approx(3.0)
    cached = prices.Price(1.0, 10.0, cached_input=0.1)
    assert cached.cost({"prompt": 1000, "cached": 600, "completion": 0}) == pytest.approx(460e-6)
    assert prices.find_price("gpt-4o-mini-2024-07-18") == prices.find_price("gpt-4o-mini")
    assert prices.find_price("some-local-model") is None
    with pytest.raises(UserError, match="go together"):
        prices.find_price("x", price_input=1.0)


# ----------------------------------------------------------------------------------------------------------------------
# The original's openai_completion.


@pytest.fixture
def server(monkeypatch):
    with FakeOpenAI(reply=lambda body: f"re: {body.get('prompt') or body['messages'][-1]['content']}") as running:
        monkeypatch.setenv("OPENAI_BASE_URL", running.base_url)
        yield running


def test_openai_completion_single_list_and_text(server):
    """Forks import it: a text gives one completion, a list a list in the same order, return_text the texts."""
    arguments = OpenAIDecodingArguments(max_tokens=7)
    one = openai_completion("hello", arguments, "fake-model")
    assert (one.text, one["text"], one.finish_reason) == ("re: hello", "re: hello", "stop") and one.total_tokens > 0
    prompts = [f"p{i}" for i in range(20)]
    many = openai_completion(prompts, arguments, "fake-model", batch_size=5, return_text=True)
    assert many == [f"re: p{i}" for i in range(20)]
    assert openai_completion(prompts, arguments, "m", max_instances=2, return_text=True) == ["re: p0", "re: p1"]
    assert len(openai_completion(prompts, arguments, "m", batch_size=2, max_batches=3)) == 6
    body = server.log[-1]["body"]
    assert body["max_tokens"] == 7 and body["temperature"] == 0.2
    assert not {"n", "stream", "echo", "suffix", "logprobs", "presence_penalty"} & set(body)


def test_openai_completion_chat_messages_n_and_kwargs(server):
    """Chat messages as prompts, n > 1 as a nested list, further parameters passed on."""
    message = {"role": "user", "content": "hi"}
    assert openai_completion(message, OpenAIDecodingArguments(), "m", return_text=True) == "re: hi"
    talk = [{"role": "system", "content": "be kind"}, message]
    texts = openai_completion(
        [talk, message, "x"], OpenAIDecodingArguments(n=2), "m", return_text=True, logit_bias={"5": 1}
    )
    assert texts == [["re: hi"] * 2, ["re: hi"] * 2, ["re: x"] * 2]
    assert server.log[-1]["body"]["logit_bias"] == {"5": 1}
    assert max(len(entry["body"]["messages"]) for entry in server.log) == 2


def test_one_refused_prompt_costs_no_other_its_reply(server):
    """31 replies that were paid for went with the one prompt that a filter refused."""
    server.faults = lambda number, body: "policy" if body["messages"][-1]["content"] == "p3" else None
    with pytest.raises(NotAllAnswered, match=r"5 of 6 prompts were answered") as refused:
        openai_completion([f"p{i}" for i in range(6)], OpenAIDecodingArguments(), "m")
    travelled = pickle.loads(pickle.dumps(refused.value))  # from a process of a pool, which hung
    assert str(travelled) == str(refused.value) and travelled.completions == refused.value.completions
    texts = [choices and choices[0].text for choices in refused.value.completions]
    assert texts == ["re: p0", "re: p1", "re: p2", None, "re: p4", "re: p5"]


def test_openai_completion_over_completions_and_errors(server):
    """Base models without chat work; a permanent error comes as UserError with the server's words."""
    server.chat = False
    assert openai_completion(["a", "b"], OpenAIDecodingArguments(), "m", return_text=True) == ["re: a", "re: b"]
    server.faults = {"quota": 1.0}
    with pytest.raises(UserError, match="quota"):
        openai_completion(["a", "b"], OpenAIDecodingArguments(), "m")
    with pytest.raises(UserError, match="stream"):
        openai_completion("a", OpenAIDecodingArguments(stream=True), "m")


def test_the_gate_lets_nobody_through_early():
    """A second, shorter wait never opens the gate before the first one is over."""

    async def main():
        gate = many_requests.RateLimitGate("u")
        gate.close(0.3, "slow down")
        gate.close(0.1, "slow down")
        begin = time.monotonic()
        await asyncio.gather(*(gate.wait() for _ in range(5)))
        return time.monotonic() - begin

    assert asyncio.run(main()) >= 0.3


# ----------------------------------------------------------------------------------------------------------------------
# Replies in unusual forms, and refusals in unusual words.


def test_content_in_parts_and_usage_in_words_are_read_and_kept():
    """A list of parts crashed before the reply was kept; so did usage whose numbers are no numbers."""
    content = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    usage = {"prompt_tokens": "12", "completion_tokens": {"a": 1}, "total_tokens": None}
    data = {"choices": [{"message": {"content": content}, "finish_reason": "stop"}], "usage": usage}
    with FakeOpenAI(reply={"sent": data}) as server:
        (reply,), _ = ask(server)
    assert reply.text == "Hello" and reply.sent == data
    assert reply.usage["prompt"] == 12 and reply.usage["completion"] > 0
    for odd in ("many", [1], 7, {"prompt_tokens": True}, {"prompt_tokens": float("inf"), "completion_tokens": -3}):
        with FakeOpenAI(reply={"sent": {**data, "usage": odd}}) as server:
            assert ask(server)[0][0].usage["prompt"] > 0


def test_reasoning_that_stands_in_total_tokens_alone_is_counted():
    """A server counted it nowhere else: cap $0.10, shown $0.03, true $0.20."""
    usage = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 900}
    usage["completion_tokens_details"] = {"reasoning_tokens": 750}
    with FakeOpenAI(reply={"text": "x", "finish_reason": "stop", "usage": usage}) as server:
        (reply,), _ = ask(server)
    assert reply.usage == {"prompt": 100, "completion": 800, "reasoning": 750} and reply.sent is None


@pytest.mark.parametrize("sent", [{"error": {"message": "upstream is down"}}, {"choices": []}, [1], {"choices": "x"}])
def test_a_200_without_a_reply_is_a_failure_in_the_servers_words(sent):
    """An error in a 200 was tried again and again, and its text was never shown."""
    with FakeOpenAI(reply={"sent": sent}) as server:
        (error,), _ = ask(server)
        assert len(server.log) == 1
    assert error.kind == "unreadable reply" and error.sent == sent
    assert str(next(iter(sent))) in str(error)


def test_html_instead_of_json_is_shown():
    """The page of a hotel's network came with status 200."""
    with FakeOpenAI(faults={"html": 1.0}) as server:
        (error,), _ = ask(server)
        assert len(server.log) == 1 and "Sign in to the network" in str(error)


def test_a_refused_prompt_is_that_requests_failure():
    """Azure's content filter (400 content_filter) ended the run."""
    with FakeOpenAI(faults=lambda number, body: "policy" if "bad" in str(body) else None) as server:
        (bad, good), _ = ask(server, ["something bad", "something good"])
    assert isinstance(bad, RequestFailed) and bad.kind == "refused content" and "filtered" in str(bad) and good.text


def test_an_unknown_400_is_one_prompts_failure_once_others_were_accepted():
    """Before the first reply it may be any request's, and stops."""
    with FakeOpenAI(faults=lambda number, body: "400" if number == 1 else None) as server:

        async def main():
            one = ModelClient("fake-model", server.base_url)
            await one.ask("first")
            with pytest.raises(RequestFailed, match="cannot be tokenised"):
                await one.ask("second")
            assert (await one.ask("third")).text
            await one.close()

        asyncio.run(main())
    with FakeOpenAI(faults={"400": 1.0}) as server, pytest.raises(UserError, match="refuses the request.*tokenised"):
        ask(server)


@pytest.mark.parametrize(
    ("message", "most"),
    [
        ("max_tokens must be in [1, 2048]", 2048), ("the valid range of max_tokens is [1, 1500]", 1500),
        ("`max_tokens` must be less than or equal to `1024`, the maximum value", 1024),
        ("max_tokens is too large: 3072. This model supports at most 900 completion tokens", 900),
        ("max_tokens must be between 1 and 512", 512), ("max_tokens: maximum is 4096", None),
        ("'max_tokens' is too large: 3072. This model's maximum context length is 4096 tokens", None),
    ],
)  # fmt: skip
def test_ranges_in_messages(message, most):
    assert client._range_end(message, 3072) == most


def test_a_range_of_max_tokens_shortens_the_reply(capsys):
    """ "max_tokens must be in [1, 2048]" made the client rename the parameter."""
    with FakeOpenAI(most_tokens=500) as server:
        ask(server, ["a", "b", "c"])
        assert server.log[-1]["body"]["max_tokens"] == 500 and len(server.log) <= 6
    assert capsys.readouterr().err.count("takes at most 500") >= 1


@pytest.mark.parametrize("listed", [[], {"data": None}, {"data": [{"name": "x"}]}, "models", {"data": {"a": 1}}, 7])
def test_models_that_are_no_list(listed):
    """/models of a proxy ended in a traceback."""
    with FakeOpenAI(models=listed) as server:
        assert client.served_model(server.base_url, prices.DEFAULT_MODEL) == prices.DEFAULT_MODEL
    with FakeOpenAI(models=b"<html>") as server:
        assert client.served_model(server.base_url, prices.DEFAULT_MODEL) == prices.DEFAULT_MODEL


def test_the_query_of_a_base_url_stays_behind_the_path():
    """Azure's ?api-version= ended up in the middle: .../v1?api-version=1/chat/completions."""
    with FakeOpenAI() as server:
        (reply,), _ = ask(server, base_url=server.base_url + "/?api-version=2026-01-01")
        assert reply.text and server.query == "api-version=2026-01-01"


def test_a_proxy_that_does_not_answer_is_named(monkeypatch):
    """The message named the server, which was well."""
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(UserError, match="proxy http://127.0.0.1:9 of HTTP_PROXY") as caught:
        ask(None, base_url="http://192.0.2.1/v1", max_retries=0)
    assert "secret" not in str(caught.value) and "NO_PROXY" in str(caught.value)


def test_rate_limits_without_a_time_are_said_and_bounded_by_the_clock(monkeypatch, capsys):
    """Without Retry-After the wait was silent, and went on for hours."""
    monkeypatch.setattr(many_requests, "SAY_AFTER", 0.5)
    monkeypatch.setattr(many_requests, "RATE_LIMIT_PATIENCE", 1.5)
    begin = time.monotonic()
    with FakeOpenAI(faults={"429": 1.0}, retry_after=None) as server:
        with pytest.raises(UserError, match="(?s)no reply came for.*Rate limit reached"):
            ask(server, ["a", "b", "c"])
    assert time.monotonic() - begin < 8
    assert capsys.readouterr().err.count("limits the rate") == 1


def test_requests_under_way_finish_after_an_interrupt():
    """Guards: a KeyboardInterrupt in a waiting job ended the event loop, and the paid replies under way with it."""
    slots, done = many_requests.RequestSlots(3), []

    async def job(number):
        async with slots:
            if number == 0:
                await asyncio.sleep(0.01)
                slots._interrupt()
                return
            await asyncio.sleep(0.05)
            done.append(number)

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(slots.run(job(number) for number in range(9)))
    assert done == [1, 2]


def test_a_failed_write_leaves_no_half_record(tmp_path, monkeypatch):
    """Guards: half a record of a full disk, to which the next one was glued when there was room again."""
    write = os.write
    with Journal(tmp_path / "replies.jsonl") as journal:
        journal.append_now([{"number": 1}])
        with monkeypatch.context() as full:

            def half(descriptor, data):
                if len(data) < 10:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return write(descriptor, data[: len(data) - 5])

            full.setattr(os, "write", half)
            with pytest.raises(UserError, match="No space left"):
                journal.append_now([{"number": 2, "text": "long"}])
        journal.append_now([{"number": 3}])
    assert [record["number"] for record in read_records(tmp_path / "replies.jsonl")] == [1, 3]
