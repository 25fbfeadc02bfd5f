"""inference.py and what it stands on: loading, batches, sampling, streaming, files that survive a kill, serving."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import psutil
import pytest
import tiny_models
import torch
from conftest import ROOT

import inference
from alpaca.answers.answer_file import AnswerJob, weights_identity, write_answers
from alpaca.answers.answer_journal import AnswerJournal, PartJournal
from alpaca.answers.answering import Answer, answer_batch, generate, prompt_ids, room_for_answer, stream_answer
from alpaca.answers.held_out_loss import rouge_of_answers
from alpaca.answers.loading import load_model
from alpaca.answers.model_paths import find_gguf
from alpaca.answers.sampling import Sampling
from alpaca.common.errors import UserError
from alpaca.common.prompt import format_prompt
from alpaca.common.tasks import load_tasks

TASKS = tiny_models.make_tasks(9)


@pytest.fixture(scope="module")
def loaded(tiny_llama, tiny_opt, tiny_tied):
    return {"llama": load_model(str(tiny_llama)), "opt": load_model(str(tiny_opt)), "tied": load_model(str(tiny_tied))}


def one_by_one(model, tokenizer, sampling, tasks=TASKS):
    return [answer_batch(model, tokenizer, [task], sampling, [row])[0] for row, task in enumerate(tasks)]


def copy_of(folder, target):
    return shutil.copytree(folder, target)


# ----------------------------------------------------------------------------------------------------------------------
# Prompts and batches.


SAMPLINGS = [
    Sampling(20), Sampling(20, 0.8, 0.9, seed=3), Sampling(8, num_beams=3), Sampling(20, repetition_penalty=1.3),
]  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "opt", "tied"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_batched_answers_equal_one_by_one(loaded, name, sampling):
    """Left padding with a wrong mask or wrong positions, pad = eos taken for the end, one generator for all rows."""
    model, tokenizer = loaded[name]
    assert answer_batch(model, tokenizer, TASKS, sampling) == one_by_one(model, tokenizer, sampling)


def test_repetition_penalty_spares_the_prompt(loaded):
    """Guards: transformers' default, which makes the words of a task's input as unlikely as repeated ones."""
    model, tokenizer = loaded["llama"]
    prompts = [list(range(20 + shift, 420 + shift)) for shift in range(8)]
    plain = [new for new, _ in generate(model, prompts, Sampling(80), range(8))]
    other = [new for new, _ in generate(model, prompts, Sampling(80, repetition_penalty=1e6), range(8))]
    assert any(len(set(new)) < len(new) for new in plain) and all(len(set(new)) == len(new) for new in other)
    assert [new[0] for new in other] == [new[0] for new in plain]
    assert any(new[0] in prompt for new, prompt in zip(plain, prompts, strict=True))


def test_batched_answers_equal_one_by_one_on_the_embedded_model():
    """The same on a real model, which stops by itself at different lengths."""
    model, tokenizer = load_model("embedded", "auto")  # which asked for a GPU where there is none
    tasks = [
        {"instruction": "Name three colours.", "input": ""},
        {"instruction": "Say which word is a fruit.", "input": "stone, apple, river, a very long word and a short one"},
        {"instruction": "What is 2+2?", "input": ""},
    ]
    batched = answer_batch(model, tokenizer, tasks, Sampling(16))
    assert batched == one_by_one(model, tokenizer, Sampling(16), tasks)
    assert len({answer.tokens for answer in batched}) > 1 and batched[0].finish_reason == "stop"
    assert "Red" in batched[0].text


def test_prompt_ids_are_those_of_training(loaded):
    """A prompt with other ids than in training (no BOS, an EOS behind it) makes a fine-tuned model talk nonsense."""
    from alpaca.training.data import TextEncoder

    for model, tokenizer in loaded.values():
        encoder = TextEncoder(tokenizer)
        for task in TASKS:
            ids, prompt_length, _ = next(encoder.pairs([format_prompt(task)], [task["output"]]))
            assert prompt_ids(tokenizer, task) == ids[:prompt_length]
        assert model.generation_config.eos_token_id == [2]
    assert prompt_ids(loaded["llama"][1], TASKS[0])[0] == 1


def test_sampling_is_seeded_and_exact(loaded):
    """The same seed gives the same answers, another seed others; drawn tokens follow the softmax."""
    model, tokenizer = loaded["tied"]
    first = answer_batch(model, tokenizer, TASKS, Sampling(12, 1.0, seed=1))
    assert first == answer_batch(model, tokenizer, TASKS, Sampling(12, 1.0, seed=1))
    assert first != answer_batch(model, tokenizer, TASKS, Sampling(12, 1.0, seed=2))

    from alpaca.answers.answering import _GumbelNoise

    scores = torch.log(torch.tensor([0.5, 0.3, 0.2])).repeat(20000, 1)
    drawn = _GumbelNoise(7, range(20000))(None, scores).argmax(-1).bincount() / 20000
    assert torch.allclose(drawn, torch.tensor([0.5, 0.3, 0.2]), atol=0.015)


def test_a_row_that_ends_does_not_touch_its_neighbours(loaded):
    """After its EOS a row is padded; the answer stops there, and rows that go on must not change."""
    model, tokenizer = loaded["llama"]
    alone = one_by_one(model, tokenizer, Sampling(10), TASKS[:3])

    def end_row_zero(module, args, out):
        out[0, -1, 2] += 1e4
        return out

    hook = model.lm_head.register_forward_hook(end_row_zero)
    try:
        together = answer_batch(model, tokenizer, TASKS[:3], Sampling(10))
    finally:
        hook.remove()
    assert together[0] == Answer("", "stop", 1)
    assert together[1:] == alone[1:]


def test_prompts_that_nearly_fill_the_context(loaded, tiny_opt, tmp_path):
    """A prompt with little room left must not shorten the others or run beyond OPT's table of positions; one that
    leaves none got an empty answer, which in a comparison is a bad answer."""
    model, tokenizer = loaded["opt"]

    def long(words):
        return {"instruction": "Count.", "input": "zebra " * words}

    words = max(n for n in range(100, 600) if len(prompt_ids(tokenizer, long(n))) < 1024)
    tasks = [TASKS[0], long(words), TASKS[1]]
    figures = write_answers(AnswerJob(str(tiny_opt), tasks, Sampling(30), 4), tmp_path / "answers.json", [])
    rows = json.loads((tmp_path / "answers.json").read_text())
    assert rows[0]["output"] == answer_batch(model, tokenizer, [TASKS[0]], Sampling(30))[0].text
    assert rows[1]["tokens"] == room_for_answer(model, prompt_ids(tokenizer, tasks[1]), 30) < 30
    assert figures["answers"] == 3 and figures["tokens"] == 30 + rows[1]["tokens"] + 30
    tasks.append(long(words + 40))
    message = r"1 of 4 prompts leave no room for an answer in .* 1,024 tokens: row 4 \(1,\d+ tokens\)"
    with pytest.raises(UserError, match=message):
        write_answers(AnswerJob(str(tiny_opt), tasks, Sampling(30)), tmp_path / "long.json", [])
    assert not (tmp_path / "long.json").exists()
    with pytest.raises(UserError, match="no room"):
        list(stream_answer(model, tokenizer, tasks[3], Sampling()))
    # ROUGE-L was measured on answers that a neighbour's long prompt had cut short.
    found = rouge_of_answers(model, tokenizer, [{**task, "output": "a"} for task in tasks[:3]], Sampling(30))
    assert found["mean_answer_tokens"] * 3 == pytest.approx(figures["tokens"])


@pytest.mark.parametrize("sampling", [Sampling(8), Sampling(8, 0.8, 0.9), Sampling(8, num_beams=2)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_stop(tiny_tied, sampling, value):
    """A model with a nan among its weights answered blank lines, with status 0; in half precision sums overflow."""
    model, tokenizer = load_model(str(tiny_tied))
    tensor = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        tensor[3, :2] = value
    bad = r"2 of 8,192 values of model\.layers\.1\.mlp\.up_proj\.weight are not finite"
    with pytest.raises(UserError, match=bad):
        answer_batch(model, tokenizer, TASKS[:2], sampling)
    with pytest.raises(UserError, match=bad):
        list(stream_answer(model, tokenizer, TASKS[0], sampling))
    with torch.no_grad():
        tensor[3, :2] = 0
        model.model.norm.weight.fill_(3e38)
        model.lm_head.weight.mul_(1000)
    with pytest.raises(UserError, match="weights are finite, so the numbers overflow in float32"):
        answer_batch(model, tokenizer, TASKS[:2], sampling)


# ----------------------------------------------------------------------------------------------------------------------
# Streaming.


@pytest.mark.parametrize("name", ["opt", "tied"])
def test_streamed_pieces_are_the_answer(loaded, name):
    """Pieces cut inside a character, or a lost last piece."""
    model, tokenizer = loaded[name]
    for sampling in (Sampling(24), Sampling(24, 0.9, 0.95, seed=5), Sampling(8, num_beams=2)):
        for task in TASKS[:3]:
            pieces = list(stream_answer(model, tokenizer, task, sampling))
            assert "".join(pieces) == answer_batch(model, tokenizer, [task], sampling)[0].text
            assert len(pieces) > 1 or sampling.num_beams > 1


def test_stream_stops_when_told_and_when_left(loaded):
    """A stop that only hides the text would keep the processor busy to the last token."""
    model, tokenizer = loaded["tied"]
    stop, before = threading.Event(), threading.active_count()
    pieces = []
    for piece in stream_answer(model, tokenizer, TASKS[0], Sampling(1500), stop):
        pieces.append(piece)
        if len(pieces) == 3:
            stop.set()
    assert len(pieces) < 1000
    stream = stream_answer(model, tokenizer, TASKS[0], Sampling(1500))
    next(stream)
    stream.close()
    assert threading.active_count() == before


# ----------------------------------------------------------------------------------------------------------------------
# Loading.


def test_the_checkpoints_own_sampling_defaults_do_not_leak(tiny_tied, loaded, tmp_path):
    """A generation_config.json with penalties and temperatures would make "greedy" answers something else."""
    folder = copy_of(tiny_tied, tmp_path / "model")
    odd = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "eos_token_id": [2, 7], "max_length": 3}
    (folder / "generation_config.json").write_text(json.dumps(odd))
    model, tokenizer = load_model(str(folder))
    assert model.generation_config.eos_token_id == [2, 7]
    assert answer_batch(model, tokenizer, TASKS[:2], Sampling(8)) == answer_batch(
        *loaded["tied"], TASKS[:2], Sampling(8)
    )


def test_folders_that_are_no_model(tiny_llama, tmp_path):
    """A base of 32,000 rows beside a tokenizer of 32,001, a lost tensor, a weight diff, a typo: said, not loaded."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    base = copy_of(tiny_llama, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(base)
    with pytest.raises(UserError, match="800 rows of embeddings, its tokenizer 801"):
        load_model(str(base))

    torn = copy_of(tiny_llama, tmp_path / "torn")
    tensors = load_file(torn / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, torn / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors .*layers\.1\.mlp\.up_proj"):
        load_model(str(torn))

    diff = copy_of(tiny_llama, tmp_path / "diff")
    config = json.loads((diff / "config.json").read_text())
    (diff / "config.json").write_text(json.dumps({**config, "weight_diff": {}}))
    with pytest.raises(UserError, match=r"weight diff[\s\S]*weight_diff.py recover"):
        load_model(str(diff))

    with pytest.raises(UserError, match=f"Did you mean {tmp_path / 'base'}"):
        load_model(str(tmp_path / "bass"))
    copy_of(tiny_llama, tmp_path / "out" / "checkpoint-5")
    with pytest.raises(UserError, match="no config.json.*checkpoint-5"):
        load_model(str(tmp_path / "out"))


@pytest.mark.parametrize(("device", "dtype", "message"), [
    ("gpu", None, "--device gpu cannot be used here .*use cpu"),
    ("cuda:99", None, "--device cuda:99 cannot be used here"),
    ("cpu", "int8", "--dtype int8 is no floating-point type"),
])  # fmt: skip
def test_devices_and_types_that_no_model_can_have(tiny_tied, device, dtype, message):
    """They were found after the weights were loaded, and said in a traceback."""
    with pytest.raises(UserError, match=message):
        load_model(str(tiny_tied), device, dtype)


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13476\n"


@pytest.mark.parametrize(("file", "damage", "message"), [
    ("model.safetensors", lambda data: data[:-1000], "cannot be loaded as a model; is a file damaged"),
    ("model.safetensors", lambda data: b"\xff" * 64 + data[64:], "cannot be loaded as a model"),
    ("model.safetensors", lambda data: b"", "cannot be loaded as a model"),
    ("model.safetensors", lambda data: LFS_POINTER.encode(), "model.safetensors is a git-lfs pointer"),
    ("config.json", lambda data: data[:20], "config.json"),
    ("config.json", lambda data: b"[]", "config.json"),
    ("tokenizer.json", lambda data: data[:200], "cannot be loaded as a tokenizer"),
    ("tokenizer.json", lambda data: b'{"model": {}}', "cannot be loaded as a tokenizer"),
    ("tokenizer.json", lambda data: LFS_POINTER.encode(), "tokenizer.json is a git-lfs pointer"),
])  # fmt: skip
def test_damaged_checkpoints_are_errors_in_words(tiny_tied, tmp_path, file, damage, message):
    """Truncated downloads ended in the tracebacks of five libraries."""
    folder = copy_of(tiny_tied, tmp_path / "model")
    (folder / file).write_bytes(damage((folder / file).read_bytes()))
    with pytest.raises(UserError, match=message):
        load_model(str(folder))


def test_damaged_torch_and_gguf_files_are_errors_in_words(tiny_tied, tmp_path, monkeypatch):
    """A cut .bin is a broken zip archive to torch; a cut GGUF file a numpy error deep in the reader."""
    folder = copy_of(tiny_tied, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(100)}, folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:300])
    with pytest.raises(UserError, match="cannot be loaded as a model"):
        load_model(str(folder))
    whole = find_gguf().read_bytes()
    for size in (10, 1000, 1_000_000, 50_000_000):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(UserError, match="cut.gguf cannot be loaded as a GGUF model"):
            load_model(str(tmp_path / "cut.gguf"))
    monkeypatch.setitem(sys.modules, "gguf", None)  # not installed: a whole file was called damaged
    with pytest.raises(UserError, match="needs the package gguf. Type: pip install"):
        load_model("embedded")
    (tmp_path / "cut.gguf").write_text(LFS_POINTER)
    with pytest.raises(UserError, match="git-lfs pointer"):
        load_model(str(tmp_path / "cut.gguf"))


@pytest.mark.parametrize("new_token", [False, True])
def test_lora_adapter(tiny_llama, tmp_path, new_token):
    """Its base comes from its config, and with tokens added in training the base gets the rows they need."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    if new_token:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=new_token)
    tokenizer.save_pretrained(tmp_path / "adapter")

    found, its_tokenizer = load_model(str(tmp_path / "adapter"))
    assert len(its_tokenizer) == found.get_input_embeddings().weight.shape[0] == 800 + new_token
    ids = torch.tensor([prompt_ids(its_tokenizer, TASKS[0])])
    with torch.inference_mode():
        assert torch.allclose(found(input_ids=ids).logits, tuned.eval()(input_ids=ids).logits, atol=1e-5)
        plain, _ = load_model(str(tiny_llama))
        assert not torch.allclose(found(input_ids=ids).logits[..., :800], plain(input_ids=ids).logits, atol=1e-3)

    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "/gone/base"})
    )
    with pytest.raises(UserError, match="/gone/base, which is not there.*--adapter"):
        load_model(str(tmp_path / "adapter"))
    named, _ = load_model(str(tiny_llama), adapter=str(tmp_path / "adapter"))
    with torch.inference_mode():
        assert torch.equal(named(input_ids=ids).logits, found(input_ids=ids).logits)


def test_other_weights_under_the_same_name_are_told_apart(tmp_path):
    """Guards: a run that went on after its adapter, GGUF file or .bin had changed joined answers of two models."""
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    files = [tmp_path / name for name in ("base/pytorch_model.bin", "adapter/adapter_model.safetensors", "model.gguf")]
    seen = []
    for changed in (None, *files):
        for file in files:
            file.write_bytes(b"new" if file == changed else b"w")
        seen.append(weights_identity(str(tmp_path / "base"), str(tmp_path / "adapter")))
        seen[-1] |= weights_identity(str(tmp_path / "model.gguf"), None)
    assert all(set(found) == set(map(str, files)) for found in seen)
    assert all(seen[0] != found for found in seen[1:])


def test_a_merged_float16_checkpoint_stays_float16(tiny_tied, tmp_path):
    """Guards: `serve --merged_dir` wrote 27 GB of float32 for 13.5 GB of float16, since a CPU answers in float32."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from alpaca.answers.openai_server import write_full_checkpoint

    AutoModelForCausalLM.from_pretrained(tiny_tied, dtype=torch.float16).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(tiny_tied).save_pretrained(tmp_path / "half")
    write_full_checkpoint(str(tmp_path / "half"), None, None, str(tmp_path / "out"))
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} == {torch.float16}


# ----------------------------------------------------------------------------------------------------------------------
# The journal.


def test_journal_survives_a_torn_line_and_refuses_other_settings(tmp_path):
    """A kill in mid-write leaves half a line; going on with another model or length would mix two runs in one file."""
    output = tmp_path / "answers.jsonl"
    with AnswerJournal(output, {"model": "a", "seed": 0}) as journal:
        journal.add({0: {"text": "zero"}, 2: {"text": "two\nlines"}})
        with pytest.raises(UserError, match="another run is writing"):
            AnswerJournal(output, {"model": "a", "seed": 0})
    with open(journal.path, "a", encoding="utf-8") as stream:
        stream.write('{"row": 1, "answer": {"text": "to')
    with pytest.raises(UserError, match="model: a, now b"):
        AnswerJournal(output, {"model": "b", "seed": 0})
    with AnswerJournal(output, {"model": "a", "seed": 0}) as journal:
        assert journal.answers == {0: {"text": "zero"}, 2: {"text": "two\nlines"}}
        with PartJournal(
            output, {"model": "a", "seed": 0}, 1
        ) as part:  # another process of this run, or of a killed one
            part.add({1: {"text": "one"}})
        journal.take_over_parts()
        journal.finish([{"instruction": "x"}] * 3, "a")
    assert [json.loads(line)["output"] for line in output.read_text().splitlines()] == ["zero", "one", "two\nlines"]
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    with pytest.raises(UserError, match="already exists"):
        AnswerJournal(output, {})
    with pytest.raises(UserError, match="must end in"):
        AnswerJournal(tmp_path / "answers.txt", {})
    journal.path.write_text('{"settings": {}}\nno JSON\n{"row": 1, "answer": {}}\n')
    output.unlink()
    with pytest.raises(UserError, match="line 2 is broken"):
        AnswerJournal(output, {"model": "c"})
    with AnswerJournal(output, {"model": "c"}, overwrite=True) as journal:
        assert journal.answers == {}


def test_a_killed_run_with_overwrite_goes_on(tmp_path):
    """Guards: each start of the same command erased the answers that the message about full memory called kept."""
    output, settings = tmp_path / "answers.json", {"model": "a"}
    output.write_text("[]")  # an older result, which stays until the new one is whole
    for seen in ({}, {0: {"text": "zero"}, 1: {"text": "one"}}):
        with AnswerJournal(output, settings, overwrite=True) as journal:
            assert journal.answers == seen
            journal.add({0: {"text": "zero"}})
        with PartJournal(output, settings, 1) as part:
            part.add({1: {"text": "one"}})
    with AnswerJournal(output, {"model": "b"}, overwrite=True) as journal:
        assert journal.answers == {}
        journal.add({0: {"text": "other"}, 1: {"text": "model"}})
        journal.finish([{"instruction": "x"}] * 2, "b")
    with AnswerJournal(output, {"model": "b"}, overwrite=True) as journal:
        assert journal.answers == {}


# ----------------------------------------------------------------------------------------------------------------------
# The command line.


def test_252_tasks_killed_in_the_middle_and_resumed(tiny_tied, run_script, tmp_path):
    """No task twice, none missing, and the same answers as a run that nobody killed, in another batch size."""
    tasks = [
        {"id": f"t{i}", "instruction": task["instruction"], "instances": [{"input": task["input"], "output": "gold"}]}
        for i, task in enumerate(tiny_models.make_tasks(252))
    ]
    data = tmp_path / "tasks.jsonl"
    data.write_text("".join(json.dumps(task) + "\n" for task in tasks), encoding="utf-8")
    flags = ["--model_name_or_path", tiny_tied, "--data_path", data, "--max_new_tokens", "12"]
    output, journal = tmp_path / "killed.json", tmp_path / "killed.json.partial.jsonl"

    command = [sys.executable, "inference.py", *map(str, flags), "--output_path", str(output), "--batch_size", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 40):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    process.kill()
    process.wait()
    held = journal.read_bytes().count(b"\n") - 1
    assert 40 <= held < 252 and not output.exists()

    done = run_script("inference.py", *flags, "--output_path", output, "--batch_size", "32")
    assert f"{held} of 252 answers are there already" in done.stdout and "tokens/s" in done.stdout
    rows = json.loads(output.read_text())
    assert [row["id"] for row in rows] == [task["id"] for task in tasks]
    assert all(row["reference"] == "gold" and row["output"] for row in rows) and not journal.exists()
    assert json.loads((tmp_path / "killed.run.json").read_text())["outcome"] == "finished"
    job = AnswerJob(str(tiny_tied), load_tasks(data, require_output=False), Sampling(12), 16)
    write_answers(job, tmp_path / "whole.jsonl", [])
    whole = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    assert whole == rows
    with pytest.raises(UserError, match="already exists"):
        write_answers(job, output, [])


def run_killed(command, rank, enough):
    """Starts `command` (a torchrun), kills process `rank` of it with -9 once `enough()`, and waits for its end."""
    torchrun = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not enough():
        assert torchrun.poll() is None, torchrun.stdout.read()
        time.sleep(0.02)
    for process in psutil.Process(torchrun.pid).children(recursive=True):
        if process.environ().get("RANK") == str(rank):
            process.kill()
    torchrun.communicate(timeout=120)
    assert torchrun.returncode != 0


def test_two_processes_answer_what_one_does_whoever_is_killed(tiny_tied, tmp_path):
    """Rows by rank, one file: after kill -9 of either process no row is lost, answered twice, or other than alone."""
    data = tiny_models.write_tasks(tmp_path / "tasks.json", 250)
    tasks, output, alone = json.loads(data.read_text()), tmp_path / "two.json", tmp_path / "one.json"
    journals = [tmp_path / "two.json.partial.jsonl", tmp_path / "two.json.partial.1.jsonl"]

    def answered():
        return [path.read_bytes().count(b"\n") if path.exists() else 0 for path in journals]

    flags = ["--model_name_or_path", tiny_tied, "--data_path", data, "--max_new_tokens", "24", "--output_path", output]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    inference = [*map(str, [*torchrun, ROOT / "inference.py", *flags, "--batch_size", "2"])]
    run_killed(inference, 1, lambda: min(answered()) > 10)
    first = sum(answered())
    assert not output.exists()
    run_killed(inference, 0, lambda: answered()[0] > first and answered()[1] > 5)
    assert not output.exists() and 20 < sum(answered()) < 200
    # evaluation.py goes on with it: the same job.
    evaluation = [*map(str, [*torchrun, ROOT / "evaluation.py", "answer", *flags, "--generator", "two"])]
    done = subprocess.run(evaluation, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("answers are there already") == done.stdout.count("250 answers, ") == 1
    assert not any(path.exists() for path in journals)
    write_answers(AnswerJob(str(tiny_tied), tasks, Sampling(24), 16, generator="two"), alone, [])
    assert json.loads(output.read_text()) == json.loads(alone.read_text())
    assert {row["generator"] for row in json.loads(output.read_text())} == {"two"}


def test_what_torchrun_cannot_share_is_refused(tiny_tied, run_script):
    """Eight processes would each stream the same answer, or ask the same server."""
    env, data = {"WORLD_SIZE": "8", "RANK": "0"}, ["--data_path", "seed_tasks.jsonl", "--output_path", "x.json"]
    one = run_script("inference.py", "--model_name_or_path", tiny_tied, "--instruction", "x", env=env, status=2)
    assert "under torchrun, inference.py answers a --data_path into an --output_path" in one.stderr
    served = run_script("evaluation.py", "answer", "--model", "m", *data, env=env, status=2)
    assert "leave out torchrun" in served.stderr


def test_one_instruction_and_two_models_side_by_side(tiny_tied, tiny_opt, run_script, tmp_path, capsys):
    """Fire reads "a, b" as a tuple and 7 as a number; an instruction is a text."""
    one = run_script(
        "inference.py", "--model_name_or_path", tiny_tied, "--instruction", "red, blue", "--input", "7",
        "--max_new_tokens", "5",
    )  # fmt: skip
    model, tokenizer = load_model(str(tiny_tied))
    wanted = answer_batch(model, tokenizer, [{"instruction": "red, blue", "input": "7"}], Sampling(5))[0].text
    assert one.stdout.strip() == wanted and "tokens/s" in one.stderr
    data = tiny_models.write_tasks(tmp_path / "tasks.json", 5)
    inference.answer(str(tiny_tied), base=str(tiny_opt), data_path=str(data), limit=2, max_new_tokens=5)
    two = capsys.readouterr().out
    assert two.count("base:") == two.count("tuned:") == 3 and "[2]" in two and "[3]" not in two


def test_chat_in_the_terminal(tiny_opt):
    """Instruction, input, answer, again, until the input ends; where it ended behind an instruction, no answer came."""
    command = [sys.executable, "inference.py", "chat", "--model_name_or_path", str(tiny_opt), "--max_new_tokens", "6"]
    done = subprocess.run(
        command, input="Say hi.\n\nSort.\nb, a\nName three.\n", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Instruction:") == 4 and done.stderr.count("tokens/s") == 3


def test_mistakes_are_named_before_anything_is_loaded(tiny_opt, run_script):
    """A misspelt flag or a missing instruction costs a second, not a model's loading."""
    from alpaca.answers import answering

    misspelt = run_script("inference.py", "--model_name", tiny_opt, "--instruction", "x", status=2)
    assert "Did you mean --model_name_or_path" in misspelt.stderr
    nothing = run_script("inference.py", "--model_name_or_path", tiny_opt, status=2)
    assert "--instruction" in nothing.stderr and "Traceback" not in nothing.stderr
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"max_new_tokens": 0}, {"num_beams": 0}):
        with pytest.raises(UserError):
            answering.Sampling(**wrong)
    code = "import inference, evaluation, sys; print('torch' in sys.modules, 'openai' in sys.modules)"
    assert run_script("-c", code).stdout.split() == ["False", "False"]


def test_serve_asks_for_a_merge_where_there_is_something_to_merge(tiny_tied, tmp_path, monkeypatch):
    """A name on the hub was called no full checkpoint."""
    import inference

    served = []
    monkeypatch.setattr("alpaca.answers.openai_server.serve_with_transformers", lambda path, *_: served.append(path))
    for path in ("an-org/a-model", str(tiny_tied)):
        inference.serve(path, port=0, backend="transformers")
    assert served == ["an-org/a-model", str(tiny_tied)]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_tied)}))
    for path in ("embedded", str(tmp_path)):
        with pytest.raises(UserError, match="is no full checkpoint. Add --merged_dir DIR"):
            inference.serve(path, port=0, backend="transformers")


def test_serve_hands_the_checkpoint_to_a_server(tiny_tied, tmp_path):
    """The served model answers as the local one does, on 127.0.0.1 alone, and a taken port is said. transformers' own
    server lists other models than it serves, and answers a chat without messages with status 500."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "inference.py", "serve", "--model_name_or_path", str(tiny_tied), "--port", str(port)]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub")}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True)
    try:
        base = f"http://127.0.0.1:{port}/v1"
        for _ in range(600):
            assert process.poll() is None, process.stdout.read()
            try:
                urllib.request.urlopen(f"{base}/models", timeout=20).read()
                break
            except urllib.error.HTTPError:
                raise
            except OSError:
                time.sleep(0.2)
        taken = subprocess.run(command, capture_output=True, text=True)
        assert taken.returncode == 2 and "is taken" in taken.stderr
        with urllib.request.urlopen(f"{base}/models", timeout=20) as reply:
            assert [model["id"] for model in json.load(reply)["data"]] == [str(tiny_tied)]
        for messages in ([], "hi", [{"role": "user"}], None):
            body = {"model": str(tiny_tied), "messages": messages}
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(
                    urllib.request.Request(
                        f"{base}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
                    ),
                    timeout=60,
                )
            assert refused.value.code == 400 and "'messages'" in json.load(refused.value)["error"]["message"]
        body = {"model": str(tiny_tied), "prompt": format_prompt(TASKS[0]), "max_tokens": 8, "temperature": 0}
        request = urllib.request.Request(
            f"{base}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        served = json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["text"]
        assert served.strip() == answer_batch(*load_model(str(tiny_tied)), TASKS[:1], Sampling(8))[0].text
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
