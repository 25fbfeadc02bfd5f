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

import os
import signal
import sys
import threading
from pathlib import Path

from alpaca.answers.model_paths import check_model
from alpaca.answers.moderation import load_filter
from alpaca.common.cli import at_least_one, run_cli
from alpaca.common.errors import UserError
from alpaca.common.ports import free_port


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
    at_least_one(max_input_chars=max_input_chars, max_new_tokens=max_new_tokens, max_queue=max_queue)
    check = load_filter(filter) if filter else None
    if log_path:  # a place that cannot be written is found here, not at the first answer
        Path(log_path).parent.mkdir(parents=True, exist_ok=True)
        Path(log_path).open("a").close()
    port = free_port(port)
    paths = [path for path in (model_name_or_path, compare) if path]
    for path in paths:
        check_model(path)
    # Gradio would ask its makers' server for news, and reach its own page through a proxy where one is set.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    for name in ("NO_PROXY", "no_proxy"):  # where both are set, programs disagree which one counts
        os.environ[name] = f"{os.environ.get(name, '')},127.0.0.1".lstrip(",")

    from alpaca.answers import demo_page

    models, seconds_per_token = demo_page.load_served(paths, device, dtype)
    limits = demo_page.Limits(max_input_chars, max_new_tokens, max_queue)
    page, end_all = demo_page.build_page(models, seconds_per_token, limits, check, log_path)
    try:
        public = demo_page.launch(page, port, share, max_threads=max_queue + 40)
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
