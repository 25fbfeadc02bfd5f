"""train.py on tiny models of 41 architectures: padded, without padding, with LoRA; saved, opened again.

    python benchmarks/architectures.py                          # all, minutes on two CPU cores
    python benchmarks/architectures.py --names llama,gptj       # some

One line each: the first step's loss in padded batches and its distance without padding (where rows could not stay apart
the run pads and says so), the fall of the loss over the steps, that of LoRA, and how far the saved model's logits are
from the trained model's. Weights are four times as large as initialised, so that attention matters in the loss. Exits 1
where a run fails or the two losses differ by more than 1e-4.
"""

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import tiny_models  # noqa: E402
import torch  # noqa: E402
import train_runs  # noqa: E402
import transformers  # noqa: E402

from alpaca.common.cli import run_cli  # noqa: E402

STEPS = 3
BASE = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=1024,
)  # fmt: skip
GPT2 = dict(n_embd=64, n_layer=2, n_head=4, n_positions=1024)
SHORT = dict(hidden_size=64, num_hidden_layers=2)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=32)
WINDOW = dict(head_dim=16, query_pre_attn_scalar=16)
LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip

# Name -> (class of its config, settings).
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", BASE),
    "llama_bias": ("Llama", dict(BASE, attention_bias=True, mlp_bias=True)),
    "llama_rope3": ("Llama", dict(BASE, rope_parameters=LLAMA3_ROPE)),
    "llama_dynamic": (
        "Llama",
        dict(
            BASE,
            max_position_embeddings=128,
            rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0),
        ),
    ),
    "mistral_short_window": ("Mistral", dict(BASE, sliding_window=32)),
    "mistral": ("Mistral", dict(BASE, sliding_window=4096)),
    "qwen2": ("Qwen2", BASE),
    "qwen2_short_window": ("Qwen2", dict(BASE, use_sliding_window=True, sliding_window=32, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(BASE, head_dim=16)),
    "gemma": ("Gemma", dict(BASE, head_dim=16)),
    "gemma2_short_window": ("Gemma2", dict(BASE, **WINDOW, sliding_window=32)),
    "gemma2_softcap": (
        "Gemma2",
        dict(BASE, **WINDOW, sliding_window=4096, attn_logit_softcapping=0.05, final_logit_softcapping=0.5),
    ),
    "gemma3_short_window": ("Gemma3Text", dict(BASE, **WINDOW, sliding_window=32)),
    "gemma3": ("Gemma3Text", dict(BASE, **WINDOW, sliding_window=4096)),
    "phi": ("Phi", dict(BASE, partial_rotary_factor=0.5)),
    "phi3": ("Phi3", BASE),
    "gpt2": ("GPT2", GPT2),
    "gpt_neox": ("GPTNeoX", {name: value for name, value in BASE.items() if name != "num_key_value_heads"}),
    "gptj": ("GPTJ", dict(GPT2, rotary_dim=8)),
    "gpt_bigcode": ("GPTBigCode", GPT2),
    "opt": ("OPT", dict(SHORT, ffn_dim=128, num_attention_heads=4, word_embed_proj_dim=64)),
    "falcon": ("Falcon", dict(SHORT, num_attention_heads=4, alibi=False)),
    "falcon_alibi": ("Falcon", dict(SHORT, num_attention_heads=4, alibi=True)),
    "bloom": ("Bloom", dict(hidden_size=64, n_layer=2, n_head=4)),
    "mpt": ("Mpt", dict(d_model=64, n_layers=2, n_heads=4, max_seq_len=1024)),
    "olmo2": ("Olmo2", BASE),
    "stablelm": ("StableLm", BASE),
    "cohere": ("Cohere", BASE),
    "granite": ("Granite", dict(BASE, logits_scaling=4.0, embedding_multiplier=2.0)),
    "mixtral": ("Mixtral", dict(BASE, num_local_experts=4, num_experts_per_tok=2)),
    "mixtral_router_loss": (
        "Mixtral",
        dict(BASE, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.1),
    ),
    "qwen3_moe": ("Qwen3Moe", dict(BASE, **EXPERTS, head_dim=16, num_experts=4)),
    "qwen2_moe": ("Qwen2Moe", dict(BASE, **EXPERTS, num_experts=4, shared_expert_intermediate_size=32)),
    "gpt_oss": ("GptOss", dict(BASE, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=4096)),
    "mamba": ("Mamba", dict(SHORT, state_size=8)),
    "mamba2": ("Mamba2", dict(SHORT, state_size=8, num_heads=8, head_dim=16, n_groups=2, chunk_size=32)),
    "qwen3_next": (
        "Qwen3Next",
        dict(
            BASE, **EXPERTS, head_dim=16, num_experts=4, shared_expert_intermediate_size=32, linear_num_value_heads=4,
            linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16, num_hidden_layers=4,
        ),
    ),
    "llama4": (
        "Llama4Text",
        dict(BASE, head_dim=16, intermediate_size_mlp=64, num_local_experts=2, attention_chunk_size=8192),
    ),
    "smollm3": ("SmolLM3", BASE),
    "glm4": ("Glm4", dict(BASE, head_dim=16)),
    "deepseek_v3": (
        "DeepseekV3",
        dict(
            BASE, **EXPERTS, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8,
            qk_nope_head_dim=8, v_head_dim=16, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1,
        ),
    ),
}  # fmt: skip


def make_base(name: str, folder: Path) -> Path:
    """A tiny random model of an architecture, with a tokenizer of 512 entries whose padding token is its own."""
    kind, settings = ARCHITECTURES[name]
    tokenizer = tiny_models.bpe_tokenizer_with_pad()
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **ids, **settings
    )
    for setting, value in list(vars(config).items()):
        if "drop" in setting and isinstance(value, float):
            setattr(config, setting, 0.0)  # random numbers differ with and without padding
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def words(base: Path, data: Path, out: Path, *more) -> list:
    return [
        "--model_name_or_path", base, "--data_path", data, "--output_dir", out, "--max_steps", STEPS,
        "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, "--learning_rate", "1e-3",
        "--logging_steps", 1, "--save_strategy", "no", "--disable_tqdm", "True",
        "--data_cache_dir", data.parent / "tokens", *more,
    ]  # fmt: skip


def try_architecture(name: str, folder: Path) -> dict[str, Any]:
    """Trains the tiny model in three ways. "failed" names what ended a run; else the figures of the table."""
    data = tiny_models.write_tasks(folder / "train.json", 40)
    base = make_base(name, folder / name / "base")
    found: dict[str, Any] = {"failed": ""}
    for way, more in (
        ("padded", ["--padding_free", "False"]),
        ("padding_free", []),
        ("lora", ["--lora_r", 4, "--merge_lora", "True"]),
    ):
        out = folder / name / way
        run = train_runs.launch(words(base, data, out, *more), folder / name / f"{way}.log")
        if run.status:
            last = next((line for line in reversed(run.output.strip().splitlines()) if line.strip()), "")
            return found | {"failed": f"{way}: {last}"}
        found[way] = train_runs.losses(out)
        found[f"{way}_logits"] = float(re.search(r"logits within (\S+) of", run.output)[1])
        if way == "padding_free":
            found["pads"] = "batches are padded" in run.output
    return found


def table(names: str | None = None) -> int:
    """Prints the table. `names`: with commas between; default: all."""
    chosen = names.split(",") if names else list(ARCHITECTURES)
    print("| architecture | padded loss | without padding | loss falls by | with LoRA | saved logits | |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- |", flush=True)
    bad = 0
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            found = try_architecture(name, Path(folder))
        if found["failed"]:
            bad += 1
            print(f"| {name} | | | | | | **{found['failed'][:160]}** |", flush=True)
            continue
        apart = abs(found["padding_free"][0] - found["padded"][0])
        bad += apart > 1e-4
        fall, lora_fall = (found[way][0] - found[way][-1] for way in ("padding_free", "lora"))
        print(
            f"| {name} | {found['padded'][0]:.4f} | {'pads' if found['pads'] else f'{apart:.0e} apart'} | {fall:.3f} | "
            f"{lora_fall:.3f} | {max(found['padding_free_logits'], found['lora_logits']):.0e} | "
            f"{'**rows see each other**' if apart > 1e-4 else ''} |",
            flush=True,
        )
    print(f"\n{len(chosen) - bad} of {len(chosen)} architectures train, save and open again with the same losses")
    return int(bad > 0)


if __name__ == "__main__":
    run_cli({"table": table}, default="table")
