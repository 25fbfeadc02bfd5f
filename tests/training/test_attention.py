"""Attention over rows that stand end to end: torch's varlen kernel (a stand-in here), windows, compiled layers."""

import inspect
import json

import pytest
import tiny_models
import torch
import train_runs
import varlen_reference
from test_architectures import architectures, model_of

from alpaca.training import attention, internals
from alpaca.training.data import PaddedCollator, PaddingFreeCollator
from alpaca.training.held_out import answer_losses


@pytest.fixture
def varlen(monkeypatch):
    """Training takes the varlen kernel, which is computed by the stand-in, in float32 too."""
    monkeypatch.setattr(attention, "varlen_attn", varlen_reference.varlen_attn)
    monkeypatch.setattr(attention, "VARLEN_TYPES", (torch.bfloat16, torch.float16, torch.float32))
    monkeypatch.setattr(attention, "has_varlen", lambda *_: True)


def test_stand_in_has_the_signature_of_torch():
    """Guards: a stand-in that takes what torch's own kernel refuses, so that these tests prove nothing."""
    from torch.nn.attention.varlen import varlen_attn

    found, wanted = (inspect.signature(f).parameters for f in (varlen_reference.varlen_attn, varlen_attn))
    assert [(p.name, p.kind, p.default) for p in found.values()] == [
        (p.name, p.kind, p.default) for p in wanted.values()
    ]


def short_rows(lengths):
    generator = torch.Generator().manual_seed(3)
    rows = []
    for length in lengths:
        ids = torch.randint(5, 500, (length,), generator=generator).numpy()
        rows.append({"input_ids": ids, "labels": ids, "length": length, "prompt_length": 1})
    return rows


@pytest.mark.parametrize("name", ["llama", "mistral_short_window", "gemma3_short_window", "deepseek_v3"])
@pytest.mark.parametrize("kernel", [attention.ROWS, attention.VARLEN])
def test_rows_are_computed_as_in_a_padded_batch(name, kernel, varlen, tmp_path):
    """Guards: rows that see each other, a window one token too wide, grouped heads in the wrong order."""
    model = model_of(name, tmp_path).eval()
    rows = short_rows([1, 40, 33, 2, 70, 32])
    wanted = answer_losses(model, PaddedCollator(0)(rows), "cpu")
    model.set_attn_implementation(attention.register(kernel))
    assert attention.fits(model, 512)
    by_length = kernel == attention.ROWS
    batch = PaddingFreeCollator(row_lengths=by_length, borders=not by_length)(rows)
    assert torch.allclose(answer_losses(model, batch, "cpu"), wanted, atol=2e-5)
    # A padded batch under the same kernel, as the proof before step 1 needs it.
    assert torch.allclose(answer_losses(model, PaddedCollator(0)(rows), "cpu"), wanted, atol=2e-5)


def test_gradients_of_both_kernels_are_those_of_a_padded_batch(varlen, tmp_path):
    """Guards: a kernel that is right forward only."""
    model, rows, found = model_of("qwen3", tmp_path), short_rows([9, 40, 3]), {}
    for name, collate in (
        ("sdpa", PaddedCollator(0)),
        (attention.ROWS, PaddingFreeCollator(row_lengths=True)),
        (attention.VARLEN, PaddingFreeCollator(borders=True)),
    ):
        model.set_attn_implementation(name if name == "sdpa" else attention.register(name))
        model.zero_grad()
        model(**collate(rows), num_items_in_batch=49).loss.backward()
        found[name] = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    for name in (attention.ROWS, attention.VARLEN):
        assert torch.allclose(found[name], found["sdpa"], atol=1e-5), name


def test_windows_are_proved_on_a_row_that_is_longer(tmp_path):
    """Guards: two rows shorter than the window prove nothing about it."""
    import datasets

    model = model_of("mistral_short_window", tmp_path).eval()
    rows = short_rows([10, 11, 12, 60])
    dataset = datasets.Dataset.from_list([{k: list(v) if k[-1] == "s" else v for k, v in row.items()} for row in rows])
    dataset = dataset.with_format("numpy")
    model.set_attn_implementation(attention.register())

    def without_window(examples):
        model.config.sliding_window = None
        for layer in model.model.layers:
            layer.self_attn.config.sliding_window = None
        return PaddingFreeCollator(row_lengths=True)(examples)

    proof = [PaddingFreeCollator(row_lengths=True), PaddedCollator(0), dataset, "cpu", True]
    assert attention.rows_stay_apart(model, *proof, window=32)[0]
    assert not attention.rows_stay_apart(model, without_window, *proof[1:], window=32)[0]


def run(base, folder, name, *more, processes=1):
    data = tiny_models.write_tasks(folder / "train.json", 60)
    done = train_runs.launch(architectures.words(base, data, folder / name, *more), folder / f"{name}.log", processes)
    lines = [json.loads(line) for line in (folder / name / "train_log.jsonl").read_text().splitlines()]
    return done.ok(), [line for line in lines if "loss" in line]


@pytest.mark.parametrize("name", ["llama", "gemma3_short_window"])
def test_a_run_takes_the_varlen_kernel(name, varlen, tmp_path, monkeypatch):
    """Guards: the kernel registered and never reached, or fed float32 under autocast, which it refuses."""
    monkeypatch.setattr(internals, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(attention, "VARLEN_TYPES", (torch.bfloat16,))
    base = architectures.make_base(name, tmp_path / "base")
    done, lines = run(base, tmp_path, "varlen", "--bf16", "True")
    assert "end to end: torch's varlen_attn" in done.output and "batches are padded" not in done.output
    _, padded = run(base, tmp_path, "padded", "--bf16", "True", "--padding_free", "False")
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in padded], abs=0.02)


def compiled_run(base, folder, name, *more, processes=1):
    """(losses, compilations after each step) of a run whose layers are compiled."""
    flags = ["--torch_compile_backend", "aot_eager", *more]  # all of torch.compile but the minute of machine code
    done, lines = run(base, folder, name, *flags, processes=processes)
    assert "batches are padded" not in done.output
    return [line["loss"] for line in lines], [line["compilations"] for line in lines]


FIFTY = ["--max_steps", 50, "--per_device_train_batch_size", 3, "--lr_scheduler_type", "constant"]


@pytest.fixture(scope="module")
def fifty_steps(tmp_path_factory):
    """(base, losses) of a run that is not compiled."""
    folder = tmp_path_factory.mktemp("fifty")
    base = architectures.make_base("llama", folder / "base")
    _, lines = run(base, folder, "plain", *FIFTY)
    return base, [line["loss"] for line in lines]


@pytest.mark.parametrize(
    "kernel, more", [(attention.ROWS, []), (attention.VARLEN, ["--gradient_checkpointing", "True"])], ids=str
)
def test_compiled_layers_are_not_compiled_again(kernel, more, fifty_steps, tmp_path, request):
    """Guards: a compilation for each batch's lengths, which is why compiled runs used to be padded."""
    if kernel == attention.VARLEN:
        request.getfixturevalue("varlen")
    base, wanted = fifty_steps
    losses, compilations = compiled_run(base, tmp_path, "compiled", *FIFTY, *more)
    assert 0 < compilations[2] == compilations[-1] <= 16 and len(losses) == 50, compilations
    assert losses == pytest.approx(wanted, rel=1e-4)


def test_compiled_layers_are_sharded(varlen, fifty_steps, tmp_path):
    """Guards: FSDP2's hooks left out of compiled layers, which then compute with shards."""
    base, wanted = fifty_steps
    more = [*FIFTY, "--max_steps", 3, "--gradient_accumulation_steps", 1, "--fsdp", "True"]
    losses, _ = compiled_run(base, tmp_path, "sharded", *more, processes=2)
    assert losses == pytest.approx(wanted[:3], rel=1e-4)


# ---- Liger -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [0.0, 0.1])
def test_a_fused_loss_is_proved_before_step_1(error, tmp_path, monkeypatch):
    """Guards: Liger's loss is on unasked; where it is not the model's, a run would train to something else."""
    import transformers.trainer

    from alpaca.training import training_arguments

    def patch(model, settings):
        plain = model.forward

        def forward(input_ids=None, labels=None, logits_to_keep=0, skip_logits=None, **kwargs):
            out = plain(input_ids=input_ids, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
            skip_logits = model.training if skip_logits is None else skip_logits
            if skip_logits:
                out.loss, out.logits = out.loss + error, None
            return out

        model.forward = forward

    monkeypatch.setattr(transformers.trainer, "apply_liger_kernel", patch)
    monkeypatch.setattr(training_arguments, "adapt_to_hardware", lambda *_: [])
    monkeypatch.setattr("alpaca.training.checks.check_packages", lambda run: [])
    base, data = architectures.make_base("llama", tmp_path / "base"), tiny_models.write_tasks(tmp_path / "t.json", 20)
    argv = architectures.words(base, data, tmp_path / "out", "--use_liger_kernel", "True")
    done = train_runs.launch(argv, tmp_path / "log")
    assert done.status == (2 if error else 0)
    assert ("loss is 0.1 nats from the one without: --use_liger_kernel False" in done.output) == bool(error)
