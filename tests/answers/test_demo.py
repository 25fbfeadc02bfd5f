"""The web demo: demo.py runs as a user runs it, on tiny models, and a headless Chromium types and clicks."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from conftest import ROOT
from playwright.sync_api import expect, sync_playwright

from alpaca.answers import demo_page, live, moderation
from alpaca.answers.answering import Answer
from alpaca.answers.demo_page import describe_origin, display_names
from alpaca.common.files import read_jsonl
from alpaca.common.ports import free_port

# The hook of demo.py's docstring, and the ways in which one can fail.
FILTER = """
def check(instruction, input, answer):
    if "explode" in instruction:
        raise RuntimeError(f"cannot judge {instruction}")
    if "odd" in input:
        return 0
    if answer and "later" in instruction and len(answer) > 200:
        return "This demo has thought better of it."
    text = f"{instruction} {input} {answer or ''}".lower()
    return "This demo does not guess lottery numbers." if "lottery" in text else None
"""
LONGEST = 6000  # tokens: much of a minute for a tiny model, so that there is something to stop


# ----------------------------------------------------------------------------------------------------------------------
# A model that never ends by itself, two demos, a browser.


def make_endless(tiny_llama: Path, folder: Path, seed: int) -> Path:
    """A tiny model that writes varied text until it is cut off: its end token's score is far below all others."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    torch.manual_seed(seed)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.1)
        # One coordinate is the same large number for every token, and only the end token's row looks at it.
        model.get_input_embeddings().weight[:, 0] = 1
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[tokenizer.eos_token_id, 0] = -10
    model.config.max_position_embeddings = 2 * LONGEST
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Demo:
    """demo.py as a process; `url` is known once it serves."""

    def __init__(self, cwd: Path, *flags):
        self.folder, self.lines = cwd, []
        command = [sys.executable, str(ROOT / "demo.py"), "--port", "0", *map(str, flags)]
        self.process = subprocess.Popen(
            command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            # A proxy where nobody listens: the demo must not ask for its own page there.
            env={**os.environ, "http_proxy": "http://127.0.0.1:9", "NO_PROXY": "example.org", "no_proxy": ""},
            # A shell's background jobs ignore Ctrl-C, and children would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        self.ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line)
            if "open http://" in line:
                self.ready.set()
        self.ready.set()

    @property
    def output(self) -> str:
        return "".join(self.lines)

    @property
    def url(self) -> str:
        assert self.ready.wait(120), self.output
        found = re.search(r"open (http://127\.0\.0\.1:\d+)", self.output)
        assert found, self.output
        return found[1]


@pytest.fixture(scope="module")
def demos(tiny_llama, tmp_path_factory):
    """(one model behind a filter, two models with a record); both start at the same time."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "my_filter.py").write_text(FILTER, encoding="utf-8")
    first, second = (make_endless(tiny_llama, folder / name, seed) for seed, name in enumerate(("first", "second")))
    limits = ("--max_new_tokens", LONGEST, "--max_input_chars", 300, "--max_queue", 1)
    single = Demo(folder, "--model_name_or_path", first, "--filter", "my_filter:check", *limits)
    record = ("--log_path", "records/asked.jsonl")
    double = Demo(folder, "--model_name_or_path", first, "--compare", second, *record, *limits)
    yield single, double
    for demo in (single, double):
        demo.process.kill()
        demo.process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium with a fresh profile, to which no name but 127.0.0.1 resolves."""
    found = subprocess.run(
        ["bash", ROOT / "tests" / "install_browser.sh", "--find"], capture_output=True, text=True,
        env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    if found.returncode:
        pytest.fail(found.stderr)
    flags = (
        "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync"
    ).split()
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"), executable_path=found.stdout.strip(), headless=True,
            args=[*flags, "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"],
            viewport={"width": 1280, "height": 900},
        )  # fmt: skip
        context.set_default_timeout(30_000)
        expect.set_options(timeout=30_000)
        yield context
        context.close()


@pytest.fixture
def open_page(browser):
    """open_page(demo or URL) -> a page that is ready; whatever any of them asks for must come from 127.0.0.1."""
    hosts, pages = set(), []

    def note(request):
        if request.url.startswith(("http", "ws")):
            hosts.add(urlsplit(request.url).hostname)

    def open_one(demo):
        page = browser.new_page()
        page.goto(demo if isinstance(demo, str) else demo.url)
        expect(page.locator("#ask")).to_be_visible()
        pages.append(page)
        return page

    browser.on("request", note)
    yield open_one
    browser.remove_listener("request", note)
    for page in pages:
        page.close()
    assert hosts == {"127.0.0.1"}


def box(page, name):
    return page.locator(f"#{name} textarea")


def shown(page, number: int = 0) -> str:
    return box(page, f"answer_{number}").input_value()


def status(page, number: int = 0):
    return page.locator(f"#status_{number}")


def set_number(page, name: str, value: float) -> None:
    field = page.locator(f"#{name} input[type=number]")
    field.fill(str(value))
    field.press("Tab")


def wait_for_growth(page, number: int = 0) -> str:
    """Returns a text that was seen to be longer than one seen before it."""
    grows = "([id, length]) => document.querySelector(`#answer_${id} textarea`).value.length > length"
    page.wait_for_function(grows, arg=[number, 0])
    early = shown(page, number)
    page.wait_for_function(grows, arg=[number, len(early)])
    return shown(page, number)


def ask(page, instruction: str, input: str = "", max_new_tokens: int | None = None) -> None:
    if max_new_tokens:
        set_number(page, "max_new_tokens", max_new_tokens)
    box(page, "instruction").fill(instruction)
    box(page, "input").fill(input)
    page.click("#ask")


# ----------------------------------------------------------------------------------------------------------------------
# One model.


def test_enter_sends_and_shift_enter_breaks_the_line(demos, open_page):
    """Gradio's own way is the other one round, and no word on the page said how to send."""
    page = open_page(demos[0])
    expect(page.locator("#keys")).to_have_text("Enter sends, Shift+Enter breaks the line.")
    set_number(page, "max_new_tokens", 8)
    field = box(page, "instruction")
    field.press_sequentially("One line")
    field.press("Shift+Enter")
    field.press_sequentially("and another")
    expect(field).to_have_value("One line\nand another")
    page.wait_for_timeout(500)
    assert shown(page) == "" and status(page).inner_text().strip() == ""
    field.press("Enter")
    expect(status(page)).to_contain_text("8 tokens")
    expect(field).to_have_value("One line\nand another")
    box(page, "input").fill("an input")
    box(page, "input").press("Enter")
    expect(page.locator("#retry")).to_be_disabled()
    expect(page.locator("#retry")).to_be_enabled()


def test_streams_stops_and_retries(demos, open_page):
    """The demo's very purpose: an answer that shows only when complete, or a Stop that only hides it, fails here."""
    page = open_page(demos[0])
    ask(page, "Tell a long story.", max_new_tokens=LONGEST)
    wait_for_growth(page)
    expect(status(page)).to_have_text("Writing …")
    page.click("#stop")
    expect(status(page)).to_contain_text("Stopped.")
    stopped = shown(page)
    tokens = int(re.search(r"([\d,]+) tokens", status(page).inner_text())[1].replace(",", ""))
    assert 0 < tokens < LONGEST
    page.wait_for_timeout(1500)
    assert shown(page) == stopped and "Stopped." in status(page).inner_text()

    # Another setting, another text in the box: Retry asks the old instruction again, and samples anew.
    set_number(page, "max_new_tokens", 12)
    box(page, "instruction").fill("Something else")
    page.click("#retry")
    expect(status(page)).to_contain_text("Cut off: no room for more tokens. 12 tokens")
    expect(box(page, "instruction")).to_have_value("Tell a long story.")
    first = shown(page)
    assert first and not stopped.startswith(first)
    page.click("#retry")
    page.wait_for_function("old => document.querySelector('#answer_0 textarea').value != old", arg=first)
    expect(page.locator("#retry")).to_be_enabled()

    # Greedily, the same question has the same answer.
    set_number(page, "temperature", 0)
    greedy = []
    for _ in range(2):
        page.click("#retry")
        expect(page.locator("#retry")).to_be_disabled()
        expect(page.locator("#retry")).to_be_enabled()
        greedy.append(shown(page))
    assert greedy[0] == greedy[1] != ""


def test_beams_come_in_one_piece(demos, open_page):
    """Beam search cannot stream; the page has to say so, or a long wait looks like a broken demo."""
    page = open_page(demos[0])
    expect(page.get_by_text("Beams above 1 search without streaming")).to_be_visible()
    set_number(page, "num_beams", 2)
    ask(page, "Name a colour.", max_new_tokens=200)
    expect(status(page)).to_have_text("Searching; the answer comes in one piece …")
    assert shown(page) == ""
    expect(status(page)).to_contain_text("200 tokens")
    assert shown(page)


def test_examples_and_clear(demos, open_page):
    """An example that fills only one box would ask about an input that is not there; beside the answer to another
    question it would look answered."""
    page = open_page(demos[0])
    ask(page, "Say something.", max_new_tokens=8)
    expect(status(page)).to_contain_text("8 tokens")
    seeds = {row["name"]: row for row in read_jsonl(ROOT / "seed_tasks.jsonl")}
    expect(page.locator("#examples button")).to_have_count(12)
    with_input, without = seeds["building_site_sign"], seeds["bus_stop_haiku"]
    page.locator("#examples button", has_text=with_input["instruction"]).click()
    expect(box(page, "instruction")).to_have_value(with_input["instruction"])
    expect(box(page, "input")).to_have_value(with_input["instances"][0]["input"])
    expect(box(page, "answer_0")).to_have_value("")
    expect(status(page)).to_have_text("")
    expect(page.locator("#retry")).to_be_disabled()
    page.locator("#examples button", has_text=without["instruction"]).click()
    expect(box(page, "instruction")).to_have_value(without["instruction"])
    expect(box(page, "input")).to_have_value("")

    set_number(page, "max_new_tokens", LONGEST)
    page.click("#ask")
    wait_for_growth(page)
    page.click("#clear")
    for name in ("instruction", "input", "answer_0"):
        expect(box(page, name)).to_have_value("")
    page.wait_for_timeout(1000)
    assert shown(page) == "" and status(page).inner_text().strip() == ""
    expect(page.locator("#retry")).to_be_disabled()


def test_length_limit(demos, open_page):
    """Too long a text is refused before it costs anything, with the figures that say what to do."""
    page = open_page(demos[0])
    ask(page, "Sum up.", "word " * 70)
    message = "instruction and input have 357 characters, and this demo takes 300"
    expect(page.get_by_text(message).first).to_be_visible()
    assert shown(page) == ""
    ask(page, "  ")
    expect(page.get_by_text("Type an instruction first.").first).to_be_visible()
    ask(page, "Sum up.", "word", max_new_tokens=8)
    expect(status(page)).to_contain_text("8 tokens")
    assert page.get_by_text(message).count() == 0


def test_filter(demos, open_page):
    """A hook refuses before and during an answer; one that breaks refuses too, and prints nothing that was typed."""
    page = open_page(demos[0])
    ask(page, "Guess the Lottery numbers.")
    expect(status(page)).to_have_text("This demo does not guess lottery numbers.")
    assert shown(page) == ""
    ask(page, "Please explode quietly.")
    expect(status(page)).to_have_text(moderation.FILTER_FAILED)
    ask(page, "Say something.", "odd")
    expect(status(page)).to_have_text(moderation.REFUSED)
    ask(page, "Refuse this later.", max_new_tokens=LONGEST)
    expect(status(page)).to_have_text("This demo has thought better of it.")
    expect(box(page, "answer_0")).to_have_value("")
    expect(page.locator("#ask")).to_be_enabled()
    assert "the filter failed: RuntimeError in" in demos[0].output
    for word in ("explode", "Lottery", "later", "story"):
        assert word not in demos[0].output


def test_queue_limit_and_closed_tabs(demos, open_page):
    """One answer at a time; one waits and is told how long; the next is turned away; Stop leaves the line, and a closed
    tab ends its answer."""
    running, waiting, third = (open_page(demos[0]) for _ in range(3))
    ask(running, "First.", max_new_tokens=LONGEST)
    wait_for_growth(running)
    ask(waiting, "Second.", max_new_tokens=LONGEST)
    expect(status(waiting)).to_have_text(
        re.compile(r"Waiting: 1 question is before yours, at most about \d+ (s|minutes)\.")
    )
    ask(third, "Third.", max_new_tokens=8)
    expect(status(third)).to_have_text("Busy: 1 questions are waiting already. Please try again in a minute.")
    waiting.click("#stop")
    expect(status(waiting)).to_have_text("Stopped.")
    third.click("#ask")
    expect(status(third)).to_contain_text("Waiting: 1 question is before yours")
    before = len(shown(running))
    assert before and shown(waiting) == shown(third) == ""
    running.close()
    expect(status(third)).to_contain_text("8 tokens")
    assert shown(waiting) == ""


# ----------------------------------------------------------------------------------------------------------------------
# A page on which the models say what a test wants.


@pytest.fixture
def scripted(monkeypatch, open_page):
    """scripted(text) -> a page whose model answers with `text`."""
    pages = []

    def open_scripted(text: str):
        def stream(model, tokenizer, task, sampling, stop_event):
            yield from text
            return Answer(text, "stop", len(text))

        monkeypatch.setattr(live, "stream_answer", stream)
        served = live.Served("scripted", "0 M", "", None, None)
        page, _ = demo_page.build_page([served], 0.01, demo_page.Limits(300, 64, 1), None, None)
        port = free_port()
        demo_page.launch(page, port, share=False, max_threads=40)
        pages.append(page)
        return open_page(f"http://127.0.0.1:{port}")

    yield open_scripted
    for page in pages:
        page.close(verbose=False)


MARKDOWN = """# Fruits

- **apple**
- <b onclick="document.title = 'clicked'">pear</b>

![tracker](http://example.org/pixel.png)
<img src="http://example.org/pixel.png" onerror="document.title = 'loaded'">
<script>document.title = 'ran'</script>
[link](javascript:document.title='followed') ${document.title = 'template'} {{constructor}}

| a | b |
|---|---|
| 1 | 2 |
"""


def test_markdown_is_shown_on_demand_and_can_do_nothing(scripted):
    """Lists came as raw asterisks; rendered as it stands, a model's HTML would act on the visitor's browser."""
    page = scripted(MARKDOWN)
    ask(page, "List fruits.")
    expect(status(page)).to_contain_text("Complete.")
    rendered = page.locator("#rendered_0")
    expect(rendered).to_be_hidden()
    expect(box(page, "answer_0")).to_have_value(MARKDOWN)
    page.locator("#as_markdown input").check()
    expect(rendered).to_be_visible()
    expect(box(page, "answer_0")).to_be_hidden()
    expect(rendered.locator("h1")).to_have_text("Fruits")
    expect(rendered.locator("li strong")).to_have_text("apple")
    expect(rendered.locator("td")).to_have_count(2)
    for tag in ("img", "script", "b", "a[href^=javascript]"):
        expect(rendered.locator(tag)).to_have_count(0)
    expect(rendered).to_contain_text("${document.title = 'template'} {{constructor}}")
    assert page.title() == "Alpaca demo"
    page.locator("#as_markdown input").uncheck()
    expect(rendered).to_be_hidden()
    expect(box(page, "answer_0")).to_be_visible()


@pytest.mark.parametrize(("width", "open_at_first"), [(1280, True), (360, False)])
def test_settings_are_folded_on_a_phone(scripted, browser, width, open_at_first):
    """On a phone the sliders stood between the question and its answer."""
    page = scripted("x")
    page.set_viewport_size({"width": width, "height": 800})
    page.reload()
    expect(page.locator("#temperature")).to_be_visible(visible=open_at_first)
    page.locator("#settings > button").click()
    expect(page.locator("#temperature")).to_be_visible(visible=not open_at_first)


# ----------------------------------------------------------------------------------------------------------------------
# Two models.


def overlaps(page) -> list[str]:
    """Pairs of visible leaf elements (text, fields, buttons) whose boxes overlap, and what sticks out sideways."""
    return page.evaluate("""() => {
        const all = [...document.querySelectorAll('textarea, button, label > span, p, li, h1, h4, input, .meta-text')]
            .filter(e => e.checkVisibility({opacityProperty: true}) && e.getBoundingClientRect().width > 1);
        const found = [], box = new Map(all.map(e => [e, e.getBoundingClientRect()]));
        for (const a of all) {
            const x = box.get(a);
            if (x.right > innerWidth + 1 || x.left < -1) found.push('sticks out: ' + a.outerHTML.slice(0, 80));
            for (const b of all) {
                if (a === b || a.contains(b) || b.contains(a)) continue;
                const y = box.get(b);
                if (Math.min(x.right, y.right) - Math.max(x.left, y.left) > 2
                    && Math.min(x.bottom, y.bottom) - Math.max(x.top, y.top) > 2)
                    found.push(a.outerHTML.slice(0, 80) + ' / ' + b.outerHTML.slice(0, 80));
            }
        }
        return found;
    }""")


def test_two_models_side_by_side(demos, open_page):
    """Both answers grow at the same time, are different models', are kept only because asked, and fit a phone."""
    page = open_page(demos[1])
    ask(page, "Tell a long story.", max_new_tokens=LONGEST)
    wait_for_growth(page, 1)
    wait_for_growth(page, 0)
    for number in (0, 1):
        expect(status(page, number)).to_have_text("Writing …")
    for width in (1280, 700, 360):
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_timeout(300)
        assert overlaps(page) == [], width
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.set_viewport_size({"width": 1280, "height": 900})
    left, right = (page.locator(f"#answer_{number}").bounding_box() for number in (0, 1))
    assert left["x"] + left["width"] <= right["x"] and abs(left["y"] - right["y"]) < 2
    page.click("#stop")
    for number in (0, 1):
        expect(status(page, number)).to_contain_text("Stopped.")
    assert shown(page, 0) != shown(page, 1)
    about = page.locator("#about")
    for text in ("demo", "first", "second", "M parameters", "Licence", "make up facts", "recorded"):
        expect(about).to_contain_text(text)
    record = demos[1].folder / "records/asked.jsonl"
    for _ in range(100):
        if record.is_file() and record.read_text(encoding="utf-8").endswith("\n"):
            break
        page.wait_for_timeout(100)
    row = read_jsonl(record)[-1]
    assert row["instruction"] == "Tell a long story." and row["settings"]["max_new_tokens"] == LONGEST
    # A text field makes line ends of the carriage returns among random bytes.
    assert [answer["shown"].split() for answer in row["answers"]] == [shown(page, number).split() for number in (0, 1)]


# ----------------------------------------------------------------------------------------------------------------------
# The process.


def test_listens_on_this_machine_only_and_ends_clean(demos, open_page):
    """Nothing but 127.0.0.1 is listened on; Ctrl-C in the middle of an answer ends with status 0 and no traceback."""
    page = open_page(demos[1])
    ask(page, "Go on and on.", max_new_tokens=LONGEST)
    wait_for_growth(page)
    process = psutil.Process(demos[1].process.pid)
    listening = {c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}
    demos[1].process.send_signal(signal.SIGINT)
    assert demos[1].process.wait(60) == 0
    assert "Traceback" not in demos[1].output and "ending the demo" in demos[1].output


def test_the_page_tells_where_a_model_is_from(tmp_path):
    """A demo that calls a fine-tuned model "a checkpoint", or drops the licence on its card, misleads its visitors."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    unknown = "not stated; the terms of its base model and of its training data apply"
    assert describe_origin(str(folder)) == ("a checkpoint without a run record", unknown)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/models/llama/7b"}')
    assert describe_origin(str(folder)) == ("fine-tuned from llama/7b", unknown)
    settings = {"model_name_or_path": "huggyllama/llama-7b", "data_path": "data/alpaca_data.json, more.jsonl"}
    (folder / "run.json").write_text(json.dumps({"settings": settings}))
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\nA model.\n")
    told = ("fine-tuned from huggyllama/llama-7b on alpaca_data.json, more.jsonl", "cc-by-nc-4.0")
    assert describe_origin(str(folder)) == told
    assert describe_origin("some/model") == ("the Hugging Face hub, some/model", unknown)
    assert describe_origin("embedded")[1] == "Apache-2.0"


@pytest.mark.parametrize(("paths", "names"), [
    (["/a/run/checkpoint-5", "/b/run/checkpoint-5"], ["a/run/checkpoint-5", "b/run/checkpoint-5"]),
    (["/a/out/model", "/a/base/model"], ["out/model", "base/model"]),
    (["x/model", "y/z/x/model"], ["x/model", "z/x/model"]),
    (["same/model", "same/model"], ["same/model (1)", "same/model (2)"]),
    (["embedded", "./alpaca-7b"], ["SmolLM2-135M-Instruct", "alpaca-7b"]), (["model"], ["model"]),
])  # fmt: skip
def test_models_of_the_same_name_are_told_apart(paths, names):
    """Two checkpoints of the same last two folders had the same heading."""
    assert display_names(paths) == names
    assert display_names(["runs/embedded_tuned"]) == ["runs/embedded_tuned"]
    assert display_names(["embedded_tuned"]) == ["embedded_tuned"]


def test_flags_are_checked_before_a_model_is_loaded(run_script, tmp_path):
    """A busy port or a misspelt filter must not cost a model's loading time, nor end in a traceback."""
    (tmp_path / "broken.py").write_text("import no_such_thing\n", encoding="utf-8")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for flags, message in (
            (["--port", port], f"port {port} is taken"),
            (["--filter", "check"], "expected module:function"),
            (["--filter", "broken:check"], "No module named 'no_such_thing'"),
            (["--filter", "json:nothing"], "json has no function nothing"),
            (["--max_queue", 0], "at least 1"),
            (["--log_path", tmp_path / "broken.py" / "log.jsonl"], "broken.py: this exists already"),
            (["--comparee", "x"], "Did you mean --compare?"),
        ):
            done = run_script(ROOT / "demo.py", "--model_name_or_path", "embedded", *flags, status=2, cwd=tmp_path)
            assert message in done.stderr and "Traceback" not in done.stderr
            assert "loading" not in done.stdout
