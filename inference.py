"""Answer one instruction, a file of tasks, or chat in the terminal, with the prompt that the model was trained on.

    python inference.py --model_name_or_path ./alpaca-7b --data_path configs/eval_tasks.jsonl --output_path answers.json
    torchrun --nproc_per_node=8 inference.py --model_name_or_path ./alpaca-7b --data_path t.json --output_path a.json
    python inference.py --model_name_or_path embedded --instruction "Name three colours." --max_new_tokens 48   # 1 min
    python inference.py chat --model_name_or_path ./alpaca-7b
    python inference.py serve --model_name_or_path ./alpaca-7b --port 8000        # an OpenAI-compatible server of it

A model is a folder with a full checkpoint or a LoRA adapter, a GGUF file, a hub name, or the word `embedded`.
"""

import importlib.util
import os
import sys

from alpaca.answers.model_paths import check_model, is_gguf
from alpaca.answers.sampling import Sampling
from alpaca.common.cli import at_least_one, run_cli
from alpaca.common.errors import UserError
from alpaca.common.files import refuse_existing
from alpaca.common.ports import free_port
from alpaca.common.tasks import load_tasks


def answer(
    model_name_or_path: str,
    instruction: str | None = None,
    input: str = "",
    data_path: str | None = None,
    output_path: str | None = None,
    base: str | None = None,
    adapter: str | None = None,
    limit: int | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_beams: int = 1,
    seed: int = 0,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    repetition_penalty: float = 1.0,
):
    """Answers one instruction or a file of tasks.

    Args:
        model_name_or_path: A checkpoint's folder, a LoRA adapter's folder, a GGUF file, or "embedded".
        instruction: One instruction; its answer streams to the terminal.
        input: The instruction's input, if it has one.
        data_path: A file of tasks (instruction, input) instead of one instruction.
        output_path: Where the answers to data_path go (.json or .jsonl); without it they are printed. The same
            command goes on with an interrupted file. Under torchrun each process answers its share of the rows.
        base: A second model, usually the one before fine-tuning: answers of both are printed side by side.
        adapter: A LoRA adapter's folder to put on model_name_or_path.
        limit: Only the first so many tasks of data_path.
        max_new_tokens: An answer's greatest length in tokens.
        temperature: 0 takes the likeliest token each time; above 0 samples.
        top_p: Samples only from the likeliest tokens that make up this probability.
        num_beams: Above 1: beam search, in which temperature and top_p have no part.
        seed: Of the sampling; an answer depends on it and on its row, not on the batch.
        batch_size: Tasks answered at once; lower it where memory runs out.
        device: cuda, cpu, or auto (spread over all GPUs).
        dtype: float32, bfloat16 or float16; by default the checkpoint's own.
        overwrite: Replace output_path. An unfinished run with the same settings goes on.
        repetition_penalty: Above 1: words that the answer already has become less likely. Small models repeat
            themselves less with 1.2.
    """
    sampling = _sampling(max_new_tokens, temperature, top_p, num_beams, seed, repetition_penalty)
    if (instruction is None) == (data_path is None):
        raise UserError('give --instruction "..." or --data_path FILE (or chat: python inference.py chat --help).')
    if instruction is not None and not instruction.strip():
        raise UserError("--instruction is blank.")
    if output_path and (base or data_path is None):
        raise UserError("--output_path takes the answers of one model to a --data_path. Leave out --base.")
    if not output_path and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("under torchrun, inference.py answers a --data_path into an --output_path.")
    at_least_one(batch_size=batch_size, limit=limit)
    models = {"base": (base, None)} if base else {}
    models["tuned" if base else "answer"] = model_name_or_path, adapter
    for path, on_top in models.values():
        check_model(path, on_top)
    tasks = load_tasks(data_path, require_output=False)[:limit] if data_path else []

    from alpaca.answers import answer_file, loading, terminal

    if output_path:
        job = answer_file.AnswerJob(model_name_or_path, tasks, sampling, batch_size, device, dtype, adapter)
        if figures := answer_file.write_answers(job, output_path, [data_path], overwrite):
            print(f"{output_path}: {len(tasks)} answers. {terminal.rate(figures)}")
    elif instruction is not None and base is None:
        model, tokenizer = loading.load_model(model_name_or_path, device, dtype, adapter)
        terminal.print_stream(model, tokenizer, {"instruction": instruction, "input": input}, sampling)
    else:
        tasks = tasks or [{"instruction": instruction, "input": input}]
        terminal.print_answers(models, tasks, sampling, batch_size, device, dtype)


def _sampling(
    max_new_tokens: int, temperature: float, top_p: float, num_beams: int, seed: int | None, penalty: float = 1.0
) -> Sampling:
    if num_beams > 1 and temperature > 0:
        print("warning: beam search ignores --temperature and --top_p.", file=sys.stderr)
    return Sampling(max_new_tokens, temperature, top_p, num_beams, seed, penalty)


def chat(
    model_name_or_path: str,
    adapter: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_p: float = 0.9,
    num_beams: int = 1,
    seed: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
):
    """Answers instructions typed in the terminal, streaming. Each stands alone: Alpaca was trained on single turns.

    Ctrl-C stops an answer, Ctrl-D (or Ctrl-C at the prompt) leaves. Flags as for `answer`; sampling is on by default,
    with another seed each time.
    """
    sampling = _sampling(max_new_tokens, temperature, top_p, num_beams, seed)
    check_model(model_name_or_path, adapter)

    from alpaca.answers import loading, terminal

    terminal.chat(*loading.load_model(model_name_or_path, device, dtype, adapter), sampling)


def serve(
    model_name_or_path: str,
    port: int = 8000,
    backend: str | None = None,
    adapter: str | None = None,
    merged_dir: str | None = None,
    dtype: str | None = None,
):
    """Serves a checkpoint over the OpenAI API on 127.0.0.1, with vLLM where it is installed, else transformers serve.

    Clients name the model by the path given here, which the server lists. Completions take the training prompt as it
    is; chat works with the template that train.py saves in the tokenizer.

    Args:
        model_name_or_path: A checkpoint's folder, a hub name, or an adapter's folder with --merged_dir.
        port: On 127.0.0.1 only; 0 takes a free one.
        backend: vllm or transformers; by default vllm where it is installed.
        adapter: A LoRA adapter's folder to put on model_name_or_path.
        merged_dir: Servers take full checkpoints: where an adapter, a GGUF file or "embedded" is written as one.
        dtype: Of the merged or served weights.
    """
    if backend not in (None, "vllm", "transformers"):
        raise UserError(f"--backend {backend}: choose vllm or transformers.")
    backend = backend or ("vllm" if importlib.util.find_spec("vllm") else "transformers")
    if backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError("vLLM is not installed here: pip install vllm, or --backend transformers.")
    port = free_port(port)
    base, on_top = check_model(model_name_or_path, adapter)
    needs_merge = on_top is not None or is_gguf(base)
    if needs_merge and merged_dir is None:
        raise UserError(f"{adapter or model_name_or_path} is no full checkpoint. Add --merged_dir DIR to write one.")
    if needs_merge:
        way_out = f"Serve it with --model_name_or_path {merged_dir}, or choose another --merged_dir."
        refuse_existing(merged_dir, way_out=way_out)

    from alpaca.answers import openai_server

    if needs_merge:
        openai_server.write_full_checkpoint(model_name_or_path, adapter, dtype, merged_dir)
    path = merged_dir if needs_merge else model_name_or_path
    print(f"model name for clients: {path}   base URL: http://127.0.0.1:{port}/v1", flush=True)
    run = openai_server.serve_with_vllm if backend == "vllm" else openai_server.serve_with_transformers
    run(path, port, dtype)


if __name__ == "__main__":
    run_cli({"answer": answer, "chat": chat, "serve": serve}, default="answer")
