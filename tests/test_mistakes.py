"""The likeliest mistakes of users, made through the real commands: each is named, and so is the way out.

A message fails here when it is a traceback, when it lacks a word in `named`, or when the command ends with status 0.
"""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
from conftest import ROOT
from fake_openai import FakeOpenAI

import weight_diff

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 13476939516\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_llama, tiny_tied):
    """A folder with what the mistakes are made with: models, a diff, data with faults."""
    folder = tmp_path_factory.mktemp("mistakes")
    tiny_models.write_tasks(folder / "good.json", 8)
    tasks = json.loads((folder / "good.json").read_text())
    del tasks[2]["output"]
    (folder / "no_output.json").write_text(json.dumps(tasks))
    (folder / "comma.json").write_text('[\n{"instruction": "Say so.", "input": "", "output": "So."},\n]')
    shutil.copytree(tiny_llama, folder / "base")
    shutil.copytree(tiny_tied, folder / "other")
    shutil.copytree(tiny_llama, folder / "tuned")
    weight_diff.make_diff(folder / "base", folder / "tuned", folder / "diff")
    shutil.copytree(tiny_llama, folder / "pointer")
    (folder / "pointer" / "model.safetensors").write_text(POINTER)
    (folder / "short.json").write_text("[]")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    verdict = {"instruction": "Say so.", "output_1": "So.", "output_2": "Thus.", "preference": 2}
    (folder / "verdicts.json").write_text(json.dumps([verdict]))
    return folder


TRAIN = "train.py --model_name_or_path {place}/base --data_path {place}/good.json --output_dir {place}/out"
RECOVER = "weight_diff.py recover --path_raw {place}/base --path_diff {place}/diff --path_tuned {place}/recovered"

# The mistake -> the command, and what its message has to name: the thing, and the way out.
MISTAKES = {
    "no such data": (f"{TRAIN} --data_path {{place}}/god.json", ["god.json", ".json"]),
    "no such model": (f"{TRAIN} --model_name_or_path {{place}}/bass", ["bass", "config.json"]),
    "a row with no answer": (f"{TRAIN} --data_path {{place}}/no_output.json", ["no_output.json", "row 3", "output"]),
    "a comma too many": (f"{TRAIN} --data_path {{place}}/comma.json", ["comma.json", "comma"]),
    "a word for a number": (f"{TRAIN} --learning_rate fast", ["learning_rate", "fast"]),
    "a flag misspelt": (f"{TRAIN} --learning_rat 1e-4", ["--learning_rat", "--learning_rate"]),
    "two precisions": (f"{TRAIN} --bf16 True --fp16 True", ["--bf16", "--fp16"]),
    "a result in the way": (f"{TRAIN} --output_dir {{place}}/base", ["base", "--overwrite"]),
    "no key": ("generate_instruction.py --output_dir {place}/gen", ["OPENAI_API_KEY", "--base_url"]),
    "a password in an address": (
        "generate_instruction.py --output_dir {place}/gen --base_url http://me:zebra7@127.0.0.1:9/v1",
        ["--base_url", "export OPENAI_API_KEY"],
    ),
    "a key in an address": (
        "evaluation.py answer --data_path {place}/good.json --output_path {place}/a.json --model m "
        "--base_url http://127.0.0.1:9/v1?subscription-key=zebra7", ["--base_url", "export OPENAI_API_KEY"],
    ),
    "a table that is not there": (
        "evaluation.py report --annotations {place}/verdicts.json --instruction_difficulty {place}/no.csv", ["no.csv"]
    ),
    "no number of tasks": (
        "generate_instruction.py --output_dir {place}/gen --num_instructions_to_generate many",
        ["--num_instructions_to_generate", "many"],
    ),
    "a command misspelt": (
        "generate_instruction.py generate_instruction_folowing_data", ["generate_instruction_following_data"]
    ),
    "no such file to check": ("generate_instruction.py check {place}/god.json", ["god.json"]),
    "another base": (RECOVER.replace("/base", "/other"), ["other", "base"]),
    "a diff for a model": ("inference.py --model_name_or_path {place}/diff --instruction Hi", ["diff", "recover"]),
    "a model for a diff": (RECOVER.replace("/diff", "/tuned"), ["tuned", "diff"]),
    "a pointer for weights": (
        "inference.py --model_name_or_path {place}/pointer --instruction Hi", ["model.safetensors", "git lfs pull"]
    ),
    "a pointer for a diff's base": (RECOVER.replace("/base", "/pointer"), ["model.safetensors", "git lfs pull"]),
    "nothing to answer": ("inference.py --model_name_or_path {place}/base --data_path {place}/god.json", ["god.json"]),
    "no loss without answers": (
        "evaluation.py loss --model_name_or_path {place}/base --data_path {place}/no_output.json", ["row 3", "output"]
    ),
    "half a download": ("fetch_data.py --from_file {place}/short.json --output_dir {place}/s", ["short.json", "bytes"]),
    "an adapter for a model": (
        "weight_diff.py make_diff --path_raw {place}/base --path_tuned {place}/adapter --path_diff {place}/d",
        ["--merge_lora True", "inference.py serve"],
    ),
    "no LLaMA folder": (
        "convert_llama.py --input_dir {place}/base --output_dir {place}/hf", ["base", "params.json"]
    ),
}  # fmt: skip


def in_words(done, *named: str) -> None:
    said = done.stdout + done.stderr
    assert done.returncode != 0, said
    assert "Traceback" not in said
    assert "zebra7" not in said  # the password of an address
    message = said[said.rfind("error: ") :]
    assert message.startswith("error: "), said[-2000:]
    assert not (missing := [word for word in named if word not in message]), f"{missing} not in: {message}"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_way_out(mistake, place, run_script):
    """Guards: tracebacks, and messages that leave the user to guess what to type next."""
    command, named = MISTAKES[mistake]
    in_words(run_script(*command.format(place=place).split(), status=None), *named)


@pytest.mark.parametrize("command", ["local_llm.py serve", "demo.py --model_name_or_path {place}/base"])
def test_a_port_in_use_is_named(command, place, run_script):
    """Guards: OSError 98 behind a page of frames."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run_script(*command.format(place=place).split(), "--port", port, status=None)
    in_words(done, port, "--port")


def test_a_retired_model_is_named(place, run_script):
    """Guards: text-davinci-003 retried for ever, as the original did."""
    with FakeOpenAI(faults=lambda number, body: "404", models=["gpt-5-nano", "gpt-5-mini"]) as server:
        more = ["--base_url", server.base_url, "--model_name", "text-davinci-003"]
        done = run_script("generate_instruction.py", "--output_dir", place / "old", *more, status=None)
    in_words(done, "text-davinci-003", "--model_name")


def test_a_full_disk_is_a_sentence(place):
    """Guards: a chained traceback. A limit on file sizes is what a test has for a disk."""
    command = f"ulimit -f 8; exec {sys.executable} {' '.join(RECOVER.format(place=place).split())}full"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    in_words(done, "recoveredfull")
    assert not Path(place, "recoveredfull").exists()
