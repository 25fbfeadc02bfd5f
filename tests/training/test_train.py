"""train.py for one process: names, embeddings, a whole run as a user starts it, kills, nan, refusals."""

import json
import os
import shutil
import signal
import time

import pytest
import tiny_models
import train_runs

import train
from alpaca.common.errors import UserError
from alpaca.common.prompt import format_prompt
from alpaca.training import checkpoint
from alpaca.training import model as base_model


def words(base, folder, output_dir, *more):
    data = folder / "train.json"
    if not data.exists():
        tiny_models.write_tasks(data, 120)
    return [
        "--model_name_or_path", base, "--data_path", data, "--output_dir", output_dir, "--max_steps", 12,
        "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, "--learning_rate", "1e-3",
        "--logging_steps", 1, "--save_strategy", "no", "--disable_tqdm", "True",
        "--data_cache_dir", folder / "tokens", *more,
    ]  # fmt: skip


# ---- start -----------------------------------------------------------------------------------------------------------


def test_help_and_refusals_need_no_torch(run_script):
    """Guards: --help and a misspelt flag took as long as importing torch; help hid the project's flags among 150."""
    for words, status in ((["--help"], 0), (["--help", "all"], 0), (["--learning_rte", "3"], 2)):
        done = run_script("-X", "importtime", "train.py", *words, status=status)
        assert "torch" not in done.stderr and "transformers" not in done.stderr.replace("transformers.Training", "")
        if status:
            assert "Did you mean --learning_rate?" in done.stderr
        else:
            assert "--padding_free" in done.stdout and ("--adam_beta1" in done.stdout) == ("all" in words)


# ---- embeddings ------------------------------------------------------------------------------------------------------


def load(folder):
    from transformers import AutoModelForCausalLM

    return base_model.load_tokenizer(str(folder), 512), AutoModelForCausalLM.from_pretrained(folder)


def test_llama_gets_one_row_that_is_the_mean(tiny_llama):
    """Guards: 32,001 rows and the mean of the 32,000, without which the released diff does not fit."""
    tokenizer, model = load(tiny_llama)
    before = model.get_input_embeddings().weight.detach().clone(), model.lm_head.weight.detach().clone()
    assert train.smart_tokenizer_and_embedding_resize({"pad_token": "[PAD]"}, tokenizer, model) == 1
    for old, layer in zip(before, (model.get_input_embeddings(), model.lm_head), strict=True):
        assert layer.weight.shape[0] == 801 and layer.weight[:800].equal(old)
        assert layer.weight[800].allclose(old.mean(0), atol=1e-7)
    assert tokenizer.pad_token_id == 800 and model.config.vocab_size == 801


def test_spare_rows_are_used_and_never_cut_off(tiny_opt):
    """Guards: resizing to len(tokenizer) cut OPT's 50,272 rows to 50,265."""
    tokenizer, model = load(tiny_opt)
    assert train.smart_tokenizer_and_embedding_resize({"pad_token": "[PAD]"}, tokenizer, model) == 1
    weight = model.get_input_embeddings().weight
    assert weight.shape[0] == 520 and tokenizer.pad_token_id == 512 and weight[512].allclose(weight[:512].mean(0))


def test_a_tokenizer_that_git_lfs_did_not_fetch(tmp_path, tiny_llama):
    """Guards: a clone without git-lfs holds a few lines under the tokenizer's name, and no message said so."""
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    (folder / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:9e55\nsize 4\n")
    with pytest.raises(UserError, match=r"tokenizer\.model is a git-lfs pointer"):
        base_model.load_config(str(folder))


def test_rows_up_to_a_multiple(tiny_llama):
    """Guards: odd vocabulary sizes that are slow on GPUs and break converters, where the user asks for round ones."""
    tokenizer, model = load(tiny_llama)
    train.smart_tokenizer_and_embedding_resize({"pad_token": "[PAD]"}, tokenizer, model, pad_to_multiple_of=64)
    assert model.lm_head.weight.shape[0] == 832 and model.lm_head.weight.isfinite().all()


def test_generation_settings_that_cannot_be_saved(tiny_llama, tmp_path):
    """Guards: a base's temperature without do_sample ended a run in a ValueError when it saved, after all training."""
    _, model = load(tiny_llama)
    model.generation_config.temperature, model.generation_config.eos_token_id = 0.6, 2
    said = []
    base_model.drop_refused_sampling(model, said.append)
    assert "generation settings are left out" in said[0] and model.generation_config.eos_token_id == 2
    model.save_pretrained(tmp_path)
    base_model.drop_refused_sampling(model, said.append)
    assert len(said) == 1


def test_overwriting_an_adapter_leaves_none_of_it(tmp_path):
    """Guards: a plain model beside an old adapter_config.json is taken for an adapter by everything that loads it."""
    for name in ("adapter_config.json", "config.json", "adapter_model.safetensors", "notes.txt"):
        (tmp_path / name).write_text("{}")
    train.clear_result(str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


# ---- a whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quickstart(tiny_tied, tmp_path_factory, run_script):
    """(CompletedProcess, output folder) of the quickstart's run file, as a user starts it."""
    folder = tmp_path_factory.mktemp("quickstart")
    data = tiny_models.write_tasks(folder / "train.json", 60)
    done = run_script(
        "train.py", "configs/quickstart_cpu.yaml", "--model_name_or_path", tiny_tied, "--data_path", data,
        "--output_dir", folder / "out", "--learning_rate", "1e-3", "--data_cache_dir", folder / "tokens",
        "--max_steps", -1, "--num_train_epochs", 1, "--val_size", 20, "--eval_on_start", True,
    )  # fmt: skip
    return done, folder / "out"


def test_run_leaves_everything_behind(quickstart):
    """Guards: a checkpoint that lacks its tokenizer, its prompt, or any word of how it was made."""
    done, out = quickstart
    for name in (
        "model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "run.json", "train_log.jsonl",
        "train_report.json", "loss_curve.png", "README.md", "checksums.json", "trainer_state.json",
    ):  # fmt: skip
        assert (out / name).stat().st_size > 0, name
    record = json.loads((out / "run.json").read_text())
    assert record["outcome"] == "finished" and record["settings"]["learning_rate"] == 1e-3 and record["inputs"]
    assert "masked" in done.stdout and "read back, every tensor as in memory" in done.stdout
    report = json.loads((out / "train_report.json").read_text())
    assert report["eval_loss_last"] < report["eval_loss_first"] and report["padding_share"] == 0


def test_chat_template_is_the_training_prompt(quickstart):
    """Guards: a chat server that feeds the checkpoint a prompt it was never trained on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(quickstart[1])
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Name a bird."}], tokenize=False)
    assert asked == format_prompt({"instruction": "Name a bird.", "input": ""})


def test_a_result_is_not_overwritten(quickstart, tiny_tied, run_script, tmp_path):
    """Guards: the second start of a command replaced the first's result; a run that could not begin deleted it."""
    _, out = quickstart
    again = words(tiny_tied, tmp_path, out)
    before = (out / "model.safetensors").read_bytes()
    done = run_script("train.py", *again, status=2)
    assert "--overwrite True" in done.stderr and "--resume_from_checkpoint auto" in done.stderr
    assert (out / "model.safetensors").read_bytes() == before
    shutil.copytree(tiny_tied, tmp_path / "torn")
    (tmp_path / "torn/model.safetensors").write_bytes(b"torn")
    torn = ["--model_name_or_path", tmp_path / "torn", "--overwrite", "True"]
    assert train_runs.launch([*again, *torn], tmp_path / "log").status
    assert (out / "model.safetensors").read_bytes() == before and (out / "config.json").exists()
    run = train_runs.launch([*again, "--overwrite", "True", "--max_steps", 1], tmp_path / "log").ok()
    assert "saved to" in run.output and (out / "model.safetensors").read_bytes() != before


def test_save_dtype(tiny_llama, tmp_path):
    """Guards: 26 GB of float32 for a 7B model."""
    from safetensors.torch import load_file

    more = ["--save_dtype", "bfloat16", "--max_steps", 2]
    train_runs.launch(words(tiny_llama, tmp_path, tmp_path / "out", *more), tmp_path / "log").ok()
    assert {str(t.dtype) for t in load_file(tmp_path / "out/model.safetensors").values()} == {"torch.bfloat16"}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


@pytest.fixture(scope="module")
def plain(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    train_runs.launch(words(tiny_llama, folder, folder / "out", "--max_steps", 3), folder / "log").ok()
    return folder


@pytest.mark.parametrize(
    "more",
    [
        ["--gradient_checkpointing", "True"],
        ["--optim", "adamw_torch"],  # the fused one is the default
    ],
    ids=str,
)
def test_faster_settings_have_the_same_loss(plain, tiny_llama, tmp_path, more):
    """Guards: a setting that Trainer knows and this script breaks; a compiled model was saved under other names."""
    run = train_runs.launch([*words(tiny_llama, plain, tmp_path / "fast", "--max_steps", 3), *more], tmp_path / "log")
    assert "read back, every tensor as in memory" in run.ok().output
    assert train_runs.losses(tmp_path / "fast") == pytest.approx(train_runs.losses(plain / "out"), rel=1e-5)


def test_loss_that_is_not_finite_stops_the_run(tiny_llama, tmp_path):
    """Guards: nan losses were replaced by an average in the log, and the run went on for hours."""
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"][40] = float("inf")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    run = train_runs.launch(words(broken, tmp_path, tmp_path / "out"), tmp_path / "log")
    assert run.status == 2 and "at step 1; the batch held rows" in run.output and "Traceback" not in run.output
    named = run.output.split("the batch held rows ")[1].split(" of the training rows")[0].split(", ")
    assert len(named) == 2 and all(0 <= int(row) < 120 for row in named)
    assert "loss is" in json.loads((tmp_path / "out/run.json").read_text())["outcome"]
    assert not (tmp_path / "out/config.json").exists()


# ---- interrupted and resumed -----------------------------------------------------------------------------------------

SAVES = ["--save_strategy", "steps", "--save_steps", 4, "--save_total_limit", 2, "--lr_scheduler_type", "cosine"]


@pytest.fixture(scope="module")
def uninterrupted(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train_runs.launch(words(tiny_llama, folder, folder / "out", *SAVES), folder / "log").ok()
    return folder


def interrupt(number, base, folder, out, processes=1):
    """Starts a run and sends the signal `number` to its first process once checkpoint-4 is complete."""
    pids = train_runs.start(words(base, folder, out, *SAVES, "--max_steps", 12), folder / "cut", processes)
    deadline = time.monotonic() + 120
    while not (out / "checkpoint-4" / checkpoint.SEAL).exists():
        assert time.monotonic() < deadline, (folder / "cut/0.txt").read_text()
        time.sleep(0.001)
    os.kill(pids[0], number)
    return train_runs.wait(pids, folder / "cut")


@pytest.mark.parametrize("number, status", [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_interrupted_and_resumed_is_uninterrupted(number, status, uninterrupted, tiny_llama, tmp_path):
    """Guards: --resume_from_checkpoint was parsed and ignored; a resumed run saw other rows or other random numbers."""
    out = tmp_path / "out"
    shutil.copy(uninterrupted / "train.json", tmp_path)
    cut = interrupt(number, tiny_llama, tmp_path, out)
    assert cut.status == status and not (out / "config.json").exists()
    if number == signal.SIGTERM:
        newest = checkpoint.checkpoints(out)[0]
        assert newest.name != "checkpoint-12" and checkpoint.find_damage(newest) == []
        assert json.loads((out / "run.json").read_text())["outcome"] == "interrupted"
    resumed = [*words(tiny_llama, tmp_path, out, *SAVES), "--resume_from_checkpoint", "auto"]
    run = train_runs.launch(resumed, tmp_path / "log").ok()
    assert "resuming from" in run.output
    assert (out / "model.safetensors").read_bytes() == (uninterrupted / "out/model.safetensors").read_bytes()
    assert train_runs.losses(out) == train_runs.losses(uninterrupted / "out")
    assert [folder.name for folder in checkpoint.checkpoints(out)] == ["checkpoint-12", "checkpoint-8"]


def test_sigterm_to_one_of_two_processes_stops_both(tiny_llama, tmp_path):
    """Guards: a signal that reaches the processes in different steps left them waiting for each other."""
    out = tmp_path / "out"
    cut = interrupt(signal.SIGTERM, tiny_llama, tmp_path, out, processes=2)
    assert cut.statuses == [143, 143], cut.output[-3000:]
    assert checkpoint.find_damage(checkpoint.checkpoints(out)[0]) == []


def test_damaged_shard_is_not_resumed_from(uninterrupted, tiny_llama, tmp_path):
    """Guards: a bit-flipped weight was loaded, and training went on from it."""
    out = tmp_path / "out"
    shutil.copytree(uninterrupted / "out", out)
    shutil.copy(uninterrupted / "train.json", tmp_path)
    shard = out / "checkpoint-12/model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1000] ^= 4
    shard.write_bytes(content)
    again = words(tiny_llama, tmp_path, out, *SAVES)
    refused = train_runs.launch([*again, "--resume_from_checkpoint", shard.parent], tmp_path / "log")
    assert refused.status == 2 and "model.safetensors was changed after it was written" in refused.output
    # With --overwrite too, as many scripts of 2023 have it: what a run goes on from is not what it replaces.
    resumed = [*again, "--resume_from_checkpoint", "auto", "--overwrite_output_dir", "True"]
    run = train_runs.launch(resumed, tmp_path / "log").ok()
    assert "passed over" in run.output and "resuming from" in run.output and "checkpoint-8" in run.output
    assert "was made with" not in run.output
    assert (out / "model.safetensors").read_bytes() == (uninterrupted / "out/model.safetensors").read_bytes()


def test_resuming_after_the_last_step_trains_nothing(tiny_llama, tmp_path):
    """Guards: a run resumed from its last checkpoint made one step more, and replaced the model with that one."""
    out = tmp_path / "out"
    once = [*words(tiny_llama, tmp_path, out, *SAVES), "--max_steps", 2, "--lr_scheduler_type", "constant"]
    train_runs.launch(once, tmp_path / "log").ok()
    whole, losses = (out / "model.safetensors").read_bytes(), train_runs.losses(out)
    (out / "model.safetensors").unlink()  # as after a kill during the final save
    run = train_runs.launch([*once, "--resume_from_checkpoint", "auto"], tmp_path / "log").ok()
    assert (out / "model.safetensors").read_bytes() == whole and train_runs.losses(out) == losses
    assert "all 2 steps were made before: nothing is trained" in run.output
    assert [folder.name for folder in checkpoint.checkpoints(out)] == ["checkpoint-2"]


def test_resuming_with_another_batch_is_said(uninterrupted, tiny_llama, tmp_path):
    """Guards: a run resumed on other hardware, hence with another global batch, trained on other rows unnoticed."""
    out = tmp_path / "out"
    shutil.copytree(uninterrupted / "out", out)
    shutil.copy(uninterrupted / "train.json", tmp_path)
    again = [*words(tiny_llama, tmp_path, out, *SAVES), "--resume_from_checkpoint", "auto", "--max_steps", 13]
    run = train_runs.launch([*again, "--gradient_accumulation_steps", 4], tmp_path / "log").ok()
    assert "checkpoint-12 was made with 4 rows a step, this run takes 8" in run.output
