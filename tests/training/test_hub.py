"""--push_to_hub against a stand-in for the Hub: what arrives there, and what a refusal costs."""

import json
import time

import pytest
import tiny_models
import train_runs
from fake_hub import FakeHub
from huggingface_hub import ModelCard

import train
from alpaca.training.hub import HubRepository


@pytest.fixture
def hub():
    with FakeHub() as hub:
        yield hub


@pytest.fixture
def push(hub, tiny_llama, tmp_path, run_script):
    """push("--flag", value, ..., token=, status=) -> CompletedProcess of one step with a checkpoint, then the push."""
    data = tiny_models.write_tasks(tmp_path / "data.json", 4)

    def run(*more, token=FakeHub.token, status=0, url=hub.url):
        environment = {
            "HF_ENDPOINT": url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "hf"),
        }
        return run_script(
            "train.py", "--model_name_or_path", tiny_llama, "--data_path", data, "--output_dir", tmp_path / "tuned",
            "--max_steps", 1, "--save_steps", 1, "--push_to_hub", "True", *more, status=status,
            env=environment | ({"HF_TOKEN": token} if token else {}),
        )  # fmt: skip

    return run


def test_the_result_arrives_whole_and_once(push, hub, tmp_path):
    """Guards: Trainer's pushes, which upload checkpoints over the result and a card of their own, and never the final
    model; a token in a file; this machine's folders in public."""
    done = push("--hub_model_id", "someone/alpaca", "--hub_token", hub.token, token=None)
    assert f"pushed: {hub.url}/someone/alpaca/commit/" in done.stdout
    assert hub.commits == [("someone/alpaca", "Fine-tuned model")]
    there, here = hub.files["someone/alpaca"], tmp_path / "tuned"
    assert {"model.safetensors", "tokenizer.json", "README.md", "Modelfile", "checksums.json"} <= set(there)
    assert not [name for name in there if name == "run.json" or name.startswith(("checkpoint", "."))]
    assert all((here / name).read_bytes() == content for name, content in there.items())
    assert ModelCard(there["README.md"].decode()).data.base_model == "tiny_llama"
    assert (here / "checkpoint-1").is_dir()
    texts = [file for file in here.rglob("*") if file.suffix in (".json", ".jsonl", ".md", "")]
    assert not [file for file in texts if file.is_file() and hub.token.encode() in file.read_bytes()]
    assert hub.token not in done.stdout + done.stderr


def test_a_wrong_token_costs_no_training(push, hub, tmp_path):
    """Guards: a login that has run out, found after days of training."""
    done = push(token="hf_wrong", status=2)
    assert "--push_to_hub: no repository tuned" in done.stderr and "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "tuned" / "model.safetensors").exists()


def test_a_hub_that_is_not_there_costs_no_training(push, tmp_path):
    """Guards: the Hub's client raises httpx2's errors; httpx's were caught, and no connection was a traceback."""
    done = push(status=2, url="http://127.0.0.1:9")
    assert "--push_to_hub: no repository tuned at http://127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "tuned" / "model.safetensors").exists()


def test_a_failed_upload_costs_no_model(push, hub, tmp_path, run_script):
    """Guards: a push that fails taking the trained model with it, or leaving the user without a way on."""
    hub.refuses = 1
    done = push(status=2)
    assert "the model is whole in" in done.stderr and "hf upload me/tuned" in done.stderr
    assert "Traceback" not in done.stderr and not hub.commits
    assert json.loads((tmp_path / "tuned" / "run.json").read_text())["outcome"] == "finished"
    run_script("train.py", "verify", tmp_path / "tuned")


def test_no_process_waits_at_a_barrier_for_the_upload(tiny_llama, tmp_path, monkeypatch):
    """Guards: the other processes waited for the upload at a barrier, which gives up after 1,800 s."""
    pushed = tmp_path / "pushed"
    monkeypatch.setattr(HubRepository, "push", lambda self: (time.sleep(1), pushed.touch()) if self.wanted else None)
    monkeypatch.setattr(
        HubRepository, "__init__", lambda self, args, say: vars(self).update(wanted=not args.process_index)
    )
    monkeypatch.setattr(train, "leave_together", lambda: print("pushed before:", pushed.exists(), flush=True))
    data = tiny_models.write_tasks(tmp_path / "data.json", 8)
    argv = ["--model_name_or_path", tiny_llama, "--data_path", data, "--output_dir", tmp_path / "out", "--max_steps", 1]
    argv += ["--save_strategy", "no", "--data_cache_dir", tmp_path / "tokens"]
    run = train_runs.launch(argv, tmp_path / "log", processes=2).ok()
    assert run.output.count("pushed before: True") == 2
