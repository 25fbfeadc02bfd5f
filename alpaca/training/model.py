"""The base model and its tokenizer, made ready to train: padding token, new embedding rows, adapters, one full copy.

Not a command; train.py uses it.

    tokenizer = load_tokenizer("huggyllama/llama-7b", max_length=512)
    model = load_model(model_args, training_args, tokenizer, say=print)
"""

import importlib.util
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import init_empty_weights
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import prevent_arange_dtype_change
from transformers.modeling_utils import set_zero3_state
from transformers.pytorch_utils import Conv1D

from alpaca.common.errors import UserError, first_line
from alpaca.common.files import refuse_lfs_pointer
from alpaca.training.arguments import DEFAULT_PAD_TOKEN
from alpaca.training.internals import layer_classes, supports_flash_attention, unsharded


def load_tokenizer(name: str, max_length: int, cache_dir: str | None = None) -> Any:
    """The base's tokenizer, padding on the right, `model_max_length` = `max_length`."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, cache_dir=cache_dir, model_max_length=max_length, padding_side="right"
        )
    except (OSError, ValueError) as error:
        raise UserError(f"--model_name_or_path {name}: its tokenizer cannot be read: {first_line(error)}") from error
    if tokenizer.eos_token is None:
        raise UserError(f"--model_name_or_path {name}: its tokenizer has no end token, so an answer could never end")
    return tokenizer


def load_config(name: str, cache_dir: str | None = None) -> Any:
    """The base's settings.

    Raises UserError where they cannot be read, where a file of the folder `name` is a git-lfs pointer, and where they
    are not those of a causal text model.
    """
    if Path(name).is_dir():
        refuse_lfs_pointer(name)
    try:
        config = AutoConfig.from_pretrained(name, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise UserError(f"--model_name_or_path {name}: its config cannot be read: {first_line(error)}") from error
    if hasattr(config, "vision_config") or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = "has a part for pictures" if hasattr(config, "vision_config") else "is not a causal language model"
        raise UserError(
            f"--model_name_or_path {name}: {config.model_type} {kind}; train.py trains text models. "
            "Name a checkpoint of its text model alone."
        )
    return config


def empty_model(config: Any) -> Any:
    """A model of `config` whose parameters have shapes and no memory (device "meta"); its other buffers are real."""
    with unsharded(), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()  # on "meta" tied weights come apart, and would count twice
    return model


def check_wrap_class(config: Any, fsdp_config: dict[str, Any] | None) -> None:
    """Raises UserError where --fsdp_config names a layer class that the model does not have; lists those it has."""
    wanted = (fsdp_config or {}).get("transformer_layer_cls_to_wrap") or []
    if not wanted:
        return
    model = empty_model(config)
    present = {type(module).__name__ for module in model.modules()}
    if unknown := [name for name in wanted if name not in present]:
        right = ", ".join(sorted(layer_classes(model))) or ", ".join(sorted(present))
        raise UserError(
            f"the model {type(model).__name__} has no layer class {unknown[0]!r} to wrap; right for it: {right}. "
            "Leave the flag out and it is found from the model."
        )


# ----------------------------------------------------------------------------------------------------------------------
# Embeddings.


def smart_tokenizer_and_embedding_resize(
    special_tokens_dict: dict[str, str], tokenizer: Any, model: Any, pad_to_multiple_of: int | None = None
) -> int:
    """Adds the tokens and gives them embedding rows: each the mean of the old rows, as the original.

    Only ever grows: a matrix with spare rows (OPT has 50,272 for 50,265 tokens) keeps them, and new tokens use them.
    `pad_to_multiple_of` rounds the number of rows up. Returns how many tokens were new.
    """
    old = len(tokenizer)
    new = tokenizer.add_special_tokens(special_tokens_dict)
    rows = model.get_input_embeddings().weight.shape[0]
    wanted = embedding_rows(rows, len(tokenizer), pad_to_multiple_of)
    if wanted > rows:
        # mean_resizing would sample around the mean with a covariance of 4096 x 4096 (47 s for 7B) that the mean
        # then overwrites.
        model.resize_token_embeddings(wanted, mean_resizing=False)
    if new or wanted > rows:
        first = min(old, rows)
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                if layer is not None:
                    weight = layer.weight
                    mean = weight[:first].mean(dim=0, keepdim=True)
                    weight[old:] = mean
    return new


def embedding_rows(rows: int, tokens: int, multiple: int | None) -> int:
    """Rows that an embedding of `rows` needs for `tokens` tokens: never fewer than it has."""
    wanted = max(rows, tokens)
    return -(-wanted // multiple) * multiple if multiple else wanted


# ----------------------------------------------------------------------------------------------------------------------
# Loading.


def pick_attention(requested: str | None, config: Any, dtype: torch.dtype, args: Any) -> str | None:
    """The attention to load a model with; None lets transformers take sdpa, or eager for a model that lacks it.

    Flash attention by itself only where it is installed, the model supports it and the arithmetic is 16 bit.
    """
    if requested or args.device.type != "cuda" or importlib.util.find_spec("flash_attn") is None:
        return requested
    half = args.bf16 or args.fp16 or dtype != torch.float32
    return "flash_attention_2" if half and supports_flash_attention(empty_model(config)) else None


def load_model(model_args: Any, training_args: Any, tokenizer: Any, say=print) -> Any:
    """The model to train: new rows made, adapters attached, and where it will be sharded one full copy, on rank 0.

    Under FSDP the other ranks get shapes alone and their share follows when Trainer shards; under ZeRO-3 every rank
    builds its shards empty and rank 0 fills them, one tensor at a time. In both, rows are added before sharding.
    """
    args, name = training_args, model_args.model_name_or_path
    config = load_config(name, args.cache_dir)
    dtype = config.dtype or torch.float32 if model_args.dtype == "auto" else getattr(torch, model_args.dtype)
    attention = pick_attention(model_args.attn_implementation, config, dtype, args)
    adapters = bool(model_args.lora_r or model_args.qlora)
    special = {}
    if tokenizer.pad_token is None:
        if adapters:
            # An added row would have to be trained and shipped beside the adapters; padding is masked, so any will do.
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        else:
            special = {"pad_token": DEFAULT_PAD_TOKEN}
    multiple = None if adapters else model_args.pad_to_multiple_of

    zero3 = bool(args.deepspeed) and args.hf_deepspeed_config.is_zero3()
    one_copy = zero3 or (args.fsdp and args.fsdp_plugin_args["cpu_ram_efficient_loading"])

    def full_model() -> Any:
        options = {"quantization_config": four_bit()} if model_args.qlora else {}
        try:
            loaded = AutoModelForCausalLM.from_pretrained(
                name, cache_dir=args.cache_dir, dtype=dtype, attn_implementation=attention, **options
            )
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"--model_name_or_path {name} cannot be loaded: {first_line(error)}") from error
        drop_refused_sampling(loaded, say)
        new = smart_tokenizer_and_embedding_resize(special, tokenizer, loaded, multiple)
        if new:
            rows = loaded.get_input_embeddings().weight.shape[0]
            say(f"added {', '.join(special.values())}: the embedding has {rows:,} rows, the new ones are the mean")
        return loaded

    def empty_config() -> Any:
        tokenizer.add_special_tokens(special)
        text = config.get_text_config()
        text.vocab_size = embedding_rows(text.vocab_size, len(tokenizer), multiple)
        config.dtype, config._attn_implementation = dtype, attention
        return config

    if zero3:
        model = zero3_model(full_model, empty_config, args)
    elif args.process_index == 0 or not one_copy:
        model = full_model()
    else:
        # Not on "meta": accelerate tells the optimizer's parameters apart by address. These have addresses, and no
        # memory behind them as nothing is ever written there.
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(empty_config(), dtype=dtype)
        model.tie_weights()
    return with_adapters(model, model_args, args, say) if adapters else model


def drop_refused_sampling(model: Any, say=print) -> None:
    """Leaves only the tokens in generation settings that transformers reads and refuses to write (a temperature without
    do_sample, for example), which would otherwise end the run when it saves."""
    settings = model.generation_config
    try:
        if settings is not None:
            settings.validate(strict=True)
    except ValueError as error:
        tokens = {name: getattr(settings, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**tokens)
        say(f"note: the base's generation settings are left out, since they cannot be saved: {first_line(error)}")


def zero3_model(full_model, empty_config, args: Any) -> Any:
    """A ZeRO-3 model filled from the one full copy on rank 0."""
    import deepspeed

    weights = {}
    if args.process_index == 0:
        with unsharded():
            weights = full_model().state_dict()
    deepspeed.init_distributed()
    # Random values for weights that are filled a moment later would be minutes of work, hence no_init_weights.
    with (
        set_zero3_state(), no_init_weights(), prevent_arange_dtype_change(),
        deepspeed.zero.Init(config_dict_or_path=args.hf_deepspeed_config.config),
    ):  # fmt: skip
        model = AutoModelForCausalLM.from_config(empty_config())
    model.tie_weights()  # part of the initialisation that was skipped; untied, a tied head would train by itself
    saved = set(model.state_dict())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if args.process_index == 0:
                    parameter.copy_(weights.pop(name))
        for name, buffer in model.named_buffers():
            if name in saved:
                if args.process_index == 0:
                    buffer.copy_(weights.pop(name))
                torch.distributed.broadcast(buffer, src=0)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Adapters.


def four_bit() -> Any:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage=torch.bfloat16,
    )  # fmt: skip


def adapter_targets(model: Any, model_args: Any) -> list[str]:
    """The names of the layers that get adapters: those asked for, or the model's query, key and value projections.

    DeepSeek's latent attention makes the three in two steps each; a state-space layer (Mamba) has one projection of its
    input in their place.
    """
    asked, head = model_args.lora_target_modules, model.get_output_embeddings()
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }
    if asked == "all-linear":  # peft's word
        return sorted(linear)
    if asked:
        return [part.strip() for part in asked.split(",")]
    for known in (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("qkv_proj",), ("query_key_value",),
                  ("c_attn",), ("Wqkv",), ("q_lin", "k_lin", "v_lin"),
                  ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"), ("in_proj",)):  # fmt: skip
        if set(known) <= linear:
            return list(known)
    raise UserError(
        "--lora_target_modules is needed: the model has no query, key and value layers with a known name. "
        f"Its linear layers: {', '.join(sorted(linear))}; all of them: --lora_target_modules all-linear"
    )


def with_adapters(model: Any, model_args: Any, args: Any, say) -> Any:
    """`model` with LoRA adapters (Hu et al., 2021) and everything else frozen."""
    if model_args.qlora:
        model = peft.prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=bool(args.activation_checkpointing)
        )
    elif args.activation_checkpointing:
        model.enable_input_require_grads()
    targets, rank = adapter_targets(model, model_args), model_args.lora_r or 16
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=model_args.lora_alpha or 2 * rank,
        lora_dropout=model_args.lora_dropout, target_modules=targets,
    )  # fmt: skip
    try:
        model = peft.get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"--lora_target_modules {model_args.lora_target_modules}: {first_line(error)}") from error
    if args.fsdp and adapts_tied_ends(model):
        raise UserError(
            "--lora_target_modules on the embedding or the output of a model that ties them: FSDP2 cannot shard it. "
            "Leave them out, or use --deepspeed configs/default_offload_opt_param.json in place of --fsdp."
        )
    trained, total = model.get_nb_trainable_parameters()
    say(f"LoRA rank {rank} on {', '.join(targets)}: {trained:,} of {total:,} parameters are trained")
    return model


def adapts_tied_ends(model: Any) -> bool:
    """Whether embedding or output have adapters in a model that ties the two."""
    base = model.get_base_model()
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    tied = base.config.get_text_config().tie_word_embeddings
    return tied and any(isinstance(end, peft.tuners.tuners_utils.BaseTunerLayer) for end in ends)


def merge_adapters(model: Any, weights: dict[str, Any], dtype: Any) -> tuple[Any, dict[str, Any]]:
    """The plain model, and its weights in `dtype`, that the adapted `model` with the gathered `weights` amounts to.

    A tied head stays tied, unless it or the embedding has adapters of its own: then the plain model has both.
    """
    config = model.get_base_model().config
    with torch.device("meta"):
        shell = peft.get_peft_model(empty_model(config), model.peft_config["default"])
    shell.load_state_dict(weights, assign=True, strict=False)
    if not adapts_tied_ends(shell):
        shell.get_base_model().tie_weights()
    merged = shell.merge_and_unload()
    return merged, {name: tensor.to(dtype) for name, tensor in merged.state_dict().items()}
