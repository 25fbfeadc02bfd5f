"""Turns Meta's LLaMA files (consolidated.*.pth, params.json, tokenizer.model) into the base that weight diffs need.

    python convert_llama.py --input_dir LLaMA/7B --output_dir llama-7b-hf
    python convert_llama.py --input_dir LLaMA/13B --tokenizer LLaMA/tokenizer.model --output_dir llama-13b-hf

Current transformers has no converter any more, and one of the last (4.44.2) rounds to bfloat16, after which no diff of
the float16 base fits. This one keeps Meta's bits and holds one tensor at a time. LLaMA 1 only: later models are
published in the transformers format. One minute on a CPU: test_convert_llama in tests/weights/.
"""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from alpaca.common.cli import run_cli
from alpaca.common.errors import UserError, first_line
from alpaca.common.files import jdump, jload, refuse_lfs_pointer
from alpaca.weights.folders import need_space, new_folder, output_folder, write_index
from alpaca.weights.tensors import Tensor, make_header, new_shard, parse_header, read, read_torch_file

# Meta's name in a layer -> the name here, and the dimension along which the files of one model hold parts of it.
LAYER = {
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "attention_norm": ("input_layernorm", None),  # None: each file holds the whole
    "ffn_norm": ("post_attention_layernorm", None),
}
OUTSIDE = {
    "tok_embeddings": ("model.embed_tokens", 1),
    "norm": ("model.norm", None),
    "output": ("lm_head", 0),
}
SHARD_BYTES = 5 * 10**9


def convert(input_dir: str, output_dir: str, tokenizer: str | None = None) -> None:
    """Writes a Hugging Face checkpoint with Meta's own bits.

    Args:
        input_dir: the folder with consolidated.00.pth (and .01, ...) and params.json.
        output_dir: the folder to make; one that already holds something is left alone and refused.
        tokenizer: tokenizer.model; default: in input_dir, or in the folder above it.
    """
    source = Path(str(input_dir)).expanduser()
    files = find_files(source)
    target = output_folder(output_dir, source)
    places = [Path(str(tokenizer))] if tokenizer else [source / "tokenizer.model", source.parent / "tokenizer.model"]
    vocabulary = next((path for path in places if path.is_file()), None)
    if vocabulary is None:
        raise UserError(f"no tokenizer.model at {' or '.join(map(str, places))}. Say where it is: --tokenizer FILE")
    refuse_lfs_pointer(vocabulary)
    params = read_params(source / "params.json")
    plan = plan_tensors([{t.name: t for t in read_torch_file(path)[0]} for path in files], params)
    headers = plan_shards(plan)
    need_space(target, headers)
    with new_folder(target, "converting", {"input_dir": str(input_dir), "output_dir": str(output_dir)}) as work:
        write_small_files(work, plan, params, headers, vocabulary)  # first: a damaged tokenizer is found in seconds
        with tqdm(desc="convert", total=len(plan), unit="tensor", disable=None) as bar:
            for file, header in headers.items():
                with new_shard(work / file, header) as write:
                    for tensor in parse_header(header, work / file):
                        write(tensor.name, 0, assemble(*plan[tensor.name][1:], params["n_heads"]))
                        bar.update()
    print(f"{target}: {len(plan)} tensors from {len(files)} file(s) of Meta's.")


def find_files(source: Path) -> list[Path]:
    """Meta's files of weights in order; UserError where the folder holds others, or not all of them."""
    files = sorted(source.glob("consolidated.*.pth")) if source.is_dir() else []
    if files and (source / "params.json").is_file():
        refuse_lfs_pointer(source)
        names = [f"consolidated.{number:02}.pth" for number in range(len(files))]
        if [file.name for file in files] != names:
            raise UserError(f"{source} lacks one of Meta's files: found {', '.join(file.name for file in files)}.")
        return files
    hint = ""
    below = sorted(source.glob("*/consolidated.00.pth"))
    if below:
        hint = f" Did you mean --input_dir {below[0].parent}?"
    elif (source / "config.json").is_file():
        hint = " It is in the transformers format already: weight_diff.py takes it as it is."
    raise UserError(f"{source} does not hold Meta's files: expected consolidated.00.pth and params.json.{hint}")


def read_params(path: Path) -> dict:
    """Meta's params.json; UserError where it is not that of a LLaMA of 2023."""
    params = jload(path)
    for key in ("dim", "n_heads", "n_layers", "norm_eps"):
        value = params.get(key) if isinstance(params, dict) else None
        if not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{path} has no number {key} above 0: these are not LLaMA 1's files, or they are damaged.")
    # Code Llama and later models say more; Llama 2 differs from LLaMA 1 in the epsilon of its two smaller sizes.
    newer = [f"{key} {params[key]}" for key in ("rope_theta", "ffn_dim_multiplier", "use_scaled_rope") if key in params]
    if params["dim"] in (4096, 5120) and params["norm_eps"] == 1e-5:
        newer.append("norm_eps 1e-05")
    if newer:
        raise UserError(
            f"{path} has {', '.join(newer)}: these are a later model's files, not LLaMA 1's. Fetch that model in the "
            "transformers format, which weight_diff.py takes as it is."
        )
    if params.get("n_kv_heads", params["n_heads"]) != params["n_heads"]:
        raise UserError(
            f"{path} has {params['n_kv_heads']} key heads for {params['n_heads']} query heads; this converter is for "
            "the LLaMA of 2023, which has as many of one as of the other."
        )
    return params


def plan_tensors(parts: list[dict[str, Tensor]], params: dict) -> dict[str, tuple]:
    """Per tensor to write: (its type, its shape, the parts that it is made of, the dimension they are joined along)."""
    names = {f"{old}.weight": (f"{new}.weight", along) for old, (new, along) in OUTSIDE.items()}
    for layer in range(params["n_layers"]):
        for old, (new, along) in LAYER.items():
            names[f"layers.{layer}.{old}.weight"] = (f"model.layers.{layer}.{new}.weight", along)
    plan = {}
    for old, (new, along) in names.items():
        pieces = [part.get(old) for part in parts]
        if None in pieces:
            raise UserError(f"consolidated.{pieces.index(None):02}.pth has no {old}: these are not LLaMA 1's files.")
        shape = list(pieces[0].shape)
        if along is None:
            pieces = pieces[:1]
        else:
            shape[along] = sum(piece.shape[along] for piece in pieces)
        if old == "tok_embeddings.weight" and shape[1] != params["dim"]:
            raise UserError(
                f"{len(parts)} file(s) hold {shape[1]} of {params['dim']} columns of {old}: fetch the others."
            )
        plan[new] = (pieces[0].dtype, tuple(shape), pieces, along)
    return plan


def plan_shards(plan: dict[str, tuple]) -> dict[str, str]:
    """File name -> header: tensors in order, at most SHARD_BYTES in a file."""
    groups, held = [[]], 0
    for name, (dtype, shape, *_) in plan.items():
        size = Tensor(name, dtype, shape, Path(), 0).nbytes
        if groups[-1] and held + size > SHARD_BYTES:
            groups.append([])
            held = 0
        groups[-1].append((name, dtype, shape))
        held += size
    if len(groups) == 1:
        return {"model.safetensors": make_header(groups[0])}
    count = len(groups)
    return {f"model-{i:05}-of-{count:05}.safetensors": make_header(group) for i, group in enumerate(groups, start=1)}


def assemble(shape: tuple, pieces: list[Tensor], along: int | None, heads: int) -> np.ndarray:
    """One tensor's elements, joined from the files and, for q and k, with the rows in the order of this format.

    Meta rotates neighbouring rows of a head together; here a head's first half is rotated with its second half.
    """
    arrays = [read(piece, 0, piece.numel).reshape(piece.shape) for piece in pieces]
    values = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=along)
    if pieces[0].name.endswith(("attention.wq.weight", "attention.wk.weight")):
        rows, columns = shape
        values = values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2)
    return np.ascontiguousarray(values).reshape(-1)


def write_small_files(work: Path, plan: dict, params: dict, headers: dict[str, str], vocabulary: Path) -> None:
    """config.json, generation_config.json, the tokenizer, and the index."""
    from transformers import LlamaTokenizer

    dtype, (rows, _) = plan["model.embed_tokens.weight"][:2]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": params["dim"],
        "intermediate_size": plan["model.layers.0.mlp.gate_proj.weight"][1][0], "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"], "num_key_value_heads": params["n_heads"], "vocab_size": rows,
        "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": params["norm_eps"],
        "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "use_cache": True,
        "dtype": {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}[dtype],
    }  # fmt: skip
    jdump(config, work / "config.json", indent=2)
    jdump({"bos_token_id": 1, "eos_token_id": 2}, work / "generation_config.json", indent=2)
    (work / "tokenizer.model").write_bytes(vocabulary.read_bytes())
    try:
        tokenizer = LlamaTokenizer.from_pretrained(work, add_bos_token=True)
    except Exception as error:  # noqa: BLE001 - transformers tries several readers, each with errors of its own
        reason = first_line(error)
        raise UserError(f"{vocabulary} cannot be read as LLaMA's tokenizer ({reason}). Fetch it again.") from error
    tokenizer.model_max_length = 2048
    tokenizer.save_pretrained(work)
    write_index(work, headers)


if __name__ == "__main__":
    run_cli({"convert": convert}, default="convert")
