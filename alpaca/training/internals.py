"""Every place where training needs private state of a library, because there is no public way.

Not a command. tests/training/test_internals.py fails by name where a new version of the library changes one.
"""

import contextlib
import os
from collections.abc import Iterator

import torch
import transformers
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.integrations import moe


def prepare_deepspeed_on_cpu() -> None:
    """Makes DeepSpeed run on the CPU over gloo, without a compiler. Called before anything imports it.

    DeepSpeed asks a variable, not the hardware, what it runs on. At its start it would compile a shared-memory
    all-reduce: a minute that needs g++ and ninja, and a build killed half-way leaves a lock file on which every later
    run waits for ever. gloo does the same job.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    getattr(deepspeed.ops, "__compatible_ops__")["deepspeed_shm_comm"] = False  # noqa: B009 - a plain name is mangled


def present_processes_as_devices() -> None:
    """Lets accelerate shard over the CPU processes of the running group, where it would fall back to DDP in silence.

    accelerate turns a process group into an FSDP one only where its type is one of the accelerator types, never where
    it is MULTI_CPU. torch does not need that: fully_shard and gloo work on CPU tensors. So the type of the group, whose
    device and backend stay "cpu" and gloo, is set to MULTI_GPU.
    """
    state = PartialState()
    assert state.distributed_type == DistributedType.MULTI_CPU and state.device.type == "cpu", repr(state)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


@contextlib.contextmanager
def unsharded() -> Iterator[None]:
    """Models made inside stay whole. While transformers knows a ZeRO-3 config it shards each model that it makes."""
    known = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = known


def prepare_buffers_apart(trainer: transformers.Trainer) -> None:
    """Lets accelerate shard models whose state dict holds buffers (DeepSeek-V3's router bias) with FSDP2.

    It takes all that a state dict holds for sharded weights. So buffers are left out of it while it prepares
    the model (`_non_persistent_buffers_set`), and rank 0's values go to the other processes afterwards.
    """
    prepare = trainer.accelerator.prepare

    def prepare_apart(*args, **kwargs):
        hidden = []
        for module in trainer.model.modules():
            names = set(module._buffers) - module._non_persistent_buffers_set
            module._non_persistent_buffers_set |= names
            hidden.append((module, names))
        prepared = prepare(*args, **kwargs)
        for module, names in hidden:
            module._non_persistent_buffers_set -= names
            for name in sorted(names):
                if module._buffers[name] is not None:
                    torch.distributed.broadcast(module._buffers[name], src=0)
        return prepared

    trainer.accelerator.prepare = prepare_apart


def stop_at_last_step(trainer: transformers.Trainer) -> None:
    """Trains nothing where the checkpoint that is resumed from has made all steps.

    Trainer looks for the last step only after it has made one (`_run_epoch`).
    """
    run_epoch = trainer._run_epoch

    def run_unfinished(**kwargs) -> None:
        if trainer.state.global_step < trainer.state.max_steps:
            run_epoch(**kwargs)

    trainer._run_epoch = run_unfinished


def cpu_has_bf16() -> bool:
    """Whether the CPU computes in bfloat16; without the instructions float32 is four times faster."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def use_one_gpu(args: transformers.TrainingArguments) -> None:
    """Keeps Trainer from DataParallel, which is slow and cannot split rows that stand end to end."""
    args._n_gpu = 1


def layer_classes(model: torch.nn.Module) -> set[str]:
    """The class names of the model's layers, which FSDP wraps one by one."""
    return set(model._no_split_modules or ())


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The model's layers, those that FSDP wraps one by one."""
    return [module for module in model.modules() if type(module).__name__ in layer_classes(model)]


def compilations() -> int:
    """How many graphs torch.compile has made in this process so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def attention_kernel(model: torch.nn.Module) -> str:
    """The attention that the model computes with: "sdpa", "eager", "flash_attention_2", ..."""
    return model.config._attn_implementation


def hands_arguments_to_attention(model: torch.nn.Module) -> bool:
    """Whether the arguments of the model's call reach the attention function."""
    return bool(model._supports_attention_backend)


def supports_flash_attention(model: torch.nn.Module) -> bool:
    return bool(model._supports_flash_attn)


@contextlib.contextmanager
def count_saved_tensors(model: torch.nn.Module, layers: list[torch.nn.Module], kept: dict[str, int]) -> Iterator[None]:
    """Adds the bytes that autograd saves within the block to kept["layers"] or kept["outside"], the weights' apart.

    Storages are told apart by identity (`_cdata`): those of fake tensors have no address.
    """
    seen = {weight.untyped_storage()._cdata for weight in model.parameters()}
    place = ["outside"]
    keep_alive = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            keep_alive.append(tensor)  # else the next tensor could get its identity
            kept[place[-1]] += storage.nbytes()
        return tensor

    hooks = [layer.register_forward_pre_hook(lambda *_: place.append("layers")) for layer in layers]
    hooks += [layer.register_forward_hook(lambda *_: place.pop() and None) for layer in layers]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    for hook in hooks:
        hook.remove()


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors made inside have shapes and types and take no memory.

    torch knows the shapes of the experts' grouped products in bfloat16 alone; transformers' fallback knows all.
    """
    can_use = moe._can_use_grouped_mm
    moe._can_use_grouped_mm = lambda *_: False
    try:
        with FakeTensorMode():
            yield
    finally:
        moe._can_use_grouped_mm = can_use
