"""Whether a GGUF file of a checkpoint answers as the checkpoint does: greedy answers of transformers and of llama.cpp.

    python convert_hf_to_gguf.py output/alpaca-7b --outfile alpaca-7b.gguf --outtype f32      # llama.cpp's own script
    python benchmarks/compare_gguf.py --model output/alpaca-7b --gguf alpaca-7b.gguf          # 4 min for 135M on a CPU

Both get the training prompt's bytes. A wrong template, a BOS too many or a lost end token, the usual faults of an
exported fine-tune, show in most answers; a rounding shows in a few. A file of 16 bits or fewer differs in more.
"""

import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alpaca.common.cli import run_cli
from alpaca.common.errors import UserError
from alpaca.common.files import jload
from alpaca.common.paths import ROOT
from alpaca.common.prompt import format_prompt
from alpaca.common.tasks import load_tasks


def compare(model: str, gguf: str, data_path: str = "configs/eval_tasks.jsonl", max_new_tokens: int = 128) -> None:
    """Prints the differing answers, then how many are equal and how many end by themselves.

    Args:
        model: a checkpoint's folder.
        gguf: the file that was made of it.
        data_path: tasks with their inputs.
        max_new_tokens: an answer's greatest length.
    """
    tasks = load_tasks(data_path, require_output=False)
    model, gguf, data_path = (str(Path(path).resolve()) for path in (model, gguf, data_path))
    with tempfile.TemporaryDirectory() as place:
        answers = Path(place) / "answers.json"
        command = ["inference.py", "--model_name_or_path", model, "--data_path", data_path, "--output_path", answers]
        command += ["--max_new_tokens", max_new_tokens, "--dtype", "float32", "--device", "cpu"]
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        ours = [(row["output"], row["finish_reason"]) for row in jload(answers)]
        theirs = served(gguf, tasks, max_new_tokens, Path(place))
    pairs = list(zip(ours, theirs, strict=True))
    for row, ((text, end), (other, other_end)) in enumerate(pairs):
        if (text, end) != (other, other_end):
            print(f"task {row}\n  transformers, {end}: {text!r}\n  llama.cpp, {other_end}: {other!r}")
    ended = [sum(reason == "stop" for _, reason in side) for side in (ours, theirs)]
    lost = sum(a[0] == b[0] and a[1] != b[1] for a, b in pairs)
    print(f"{sum(a == b for a, b in pairs)} of {len(tasks)} answers are equal")
    print(
        f"{ended[0]} end by themselves in transformers, {ended[1]} in llama.cpp; {lost} with equal text end in one only"
    )


def served(gguf: str, tasks: list[dict], max_new_tokens: int, place: Path) -> list[tuple[str, str]]:
    """(text, finish reason) of llama.cpp's greedy answer to each task, one request at a time."""
    ready = place / "url"
    command = ["local_llm.py", "serve", "--gguf", gguf, "--port", "0", "--parallel", "1", "--ready_file", ready]
    server = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        while not ready.exists():
            if server.poll() is not None:
                raise UserError("llama.cpp's server did not start; its reason is above")
            time.sleep(0.1)
        url = ready.read_text().strip() + "/completions"
        found = []
        for task in tasks:
            # The likeliest token, and none of llama.cpp's penalties: they are off unless asked for.
            body = {"prompt": format_prompt(task), "max_tokens": max_new_tokens, "temperature": 0, "top_k": 1}
            request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
            with opener.open(request, timeout=600) as reply:
                choice = json.load(reply)["choices"][0]
            found.append((choice["text"].strip(), choice["finish_reason"]))
        return found
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    run_cli({"compare": compare}, default="compare")
