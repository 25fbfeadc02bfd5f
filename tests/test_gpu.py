"""What no CPU can check: CUDA's own kernels. Collected only where an NVIDIA GPU is.

    python -m pytest tests/test_gpu.py

benchmarks/gpu.sh measures what is only checked here.
"""

import importlib.util
import subprocess
import sys

import pytest
import tiny_models
import torch
import train_runs
from conftest import ROOT

if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU", allow_module_level=True)

sys.path.append(str(ROOT / "tests/training"))

from test_attention import architectures, short_rows  # noqa: E402

from alpaca.training import attention  # noqa: E402
from alpaca.training.data import PaddedCollator, PaddingFreeCollator  # noqa: E402
from alpaca.training.held_out import answer_losses  # noqa: E402


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


# Heads as wide as real models': the kernels refuse or pad narrower ones.
WIDE = dict(architectures.BASE, hidden_size=256, head_dim=64)
KINDS = {
    "llama": ("Llama", WIDE),
    "mistral_short_window": ("Mistral", dict(WIDE, sliding_window=32)),
    "qwen3": ("Qwen3", WIDE),
}


@pytest.fixture(params=KINDS)
def base(request, tmp_path, monkeypatch):
    monkeypatch.setitem(architectures.ARCHITECTURES, request.param, KINDS[request.param])
    return architectures.make_base(request.param, tmp_path / "base")


@pytest.mark.parametrize("kernel", ["varlen", pytest.param("flash_attention_2", marks=needs("flash_attn"))])
def test_a_kernel_keeps_rows_apart(kernel, base):
    """Guards: borders, windows or grouped heads that the real kernel reads otherwise than its stand-in."""
    from transformers import AutoModelForCausalLM

    rows, model = short_rows([1, 40, 33, 2, 70, 32]), AutoModelForCausalLM.from_pretrained(base).cuda().eval()
    wanted = answer_losses(model, PaddedCollator(0)(rows), "cuda")
    model.set_attn_implementation(attention.register(attention.VARLEN) if kernel == "varlen" else kernel)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = answer_losses(model, PaddingFreeCollator(borders=True)(rows), "cuda")
        alone = [answer_losses(model, PaddingFreeCollator(borders=True)([row]), "cuda") for row in rows]
    assert torch.allclose(found, wanted, atol=0.1) and (found - wanted).abs().mean() < 0.02
    assert torch.allclose(found, torch.cat(alone), atol=1e-2)


def test_varlen_gradients(base):
    """Guards: a kernel that is right forward only."""
    from transformers import AutoModelForCausalLM

    found, rows = [], short_rows([9, 40, 70])
    model = AutoModelForCausalLM.from_pretrained(base).cuda()
    for kernel, collate in (("sdpa", PaddedCollator(0)), (attention.VARLEN, PaddingFreeCollator(borders=True))):
        model.set_attn_implementation(kernel if kernel == "sdpa" else attention.register(kernel))
        batch = {n: v.cuda() if torch.is_tensor(v) else v for n, v in collate(rows).items()}
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(**batch, num_items_in_batch=116).loss
        loss.backward()
        found.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
        model.zero_grad()
    assert (found[0] - found[1]).norm() < 0.05 * found[0].norm()


def losses(base, folder, name, *more, processes=1):
    """(the losses of a run, its output); not in a fork, which could not use the CUDA that this process uses."""
    data = tiny_models.write_tasks(folder / "train.json", 60)
    words = [str(word) for word in architectures.words(base, data, folder / name, *more)]
    start = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"] if processes > 1 else []
    command = [sys.executable, *start, str(ROOT / "train.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return train_runs.losses(folder / name), done.stdout


PLAIN = ["--use_liger_kernel", "False", "--bf16", "True"]


@pytest.mark.parametrize(
    "more",
    [
        ["--torch_compile", "True"],
        pytest.param(["--use_liger_kernel", "True"], marks=needs("liger_kernel")),
        pytest.param(["--attn_implementation", "flash_attention_2"], marks=needs("flash_attn")),
    ],
    ids=str,
)
def test_fast_kernels_train_to_the_same_losses(more, base, tmp_path):
    """Guards: a kernel that is faster because it computes something else."""
    wanted, said = losses(base, tmp_path, "padded", *PLAIN, "--padding_free", "False")
    found, said = losses(base, tmp_path, "fast", *PLAIN, *more)
    assert "batches are padded" not in said and found == pytest.approx(wanted, abs=0.03)


@needs("bitsandbytes")
def test_qlora(base, tmp_path):
    """Guards: 4-bit weights that cannot be trained on, saved or opened again."""
    found, said = losses(base, tmp_path, "qlora", *PLAIN, "--qlora", "True", "--max_steps", 10)
    assert found[-1] < found[0] and "read back, logits within" in said


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU shards nothing")
def test_fsdp2_losses_are_not_rounded(base, tmp_path):
    """Guards: FSDP2 in bfloat16 rounded losses and summed gradients in 16 bits (6.4395 for 6.4180)."""
    wanted, _ = losses(base, tmp_path, "float32", "--use_liger_kernel", "False", "--tf32", "False")
    rows = ["--per_device_train_batch_size", 1, "--fsdp", "True"]
    found, _ = losses(base, tmp_path, "sharded", *PLAIN, *rows, processes=2)
    assert found == pytest.approx(wanted, abs=0.02)
