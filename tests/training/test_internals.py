"""A test for each private state of a library that training needs: a version that changes it fails here by name."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

from alpaca.training import internals


def model_of(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_transformers_source_lists_its_training_arguments():
    """--help and refusals read names, types and defaults from the source file instead of importing torch."""
    import dataclasses

    import transformers

    from alpaca.training.arguments import RunArguments, own_flags, trainer_flags

    found, declared = trainer_flags(), dataclasses.fields(transformers.TrainingArguments)
    assert set(found) == {field.name for field in declared if field.init}
    for field in declared:
        if field.init and field.name not in own_flags(RunArguments):
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
            assert found[field.name].default == default, field.name
    assert found["learning_rate"].kind == "float" and found["learning_rate"].help


def test_transformers_shards_models_by_its_deepspeed_config():
    """`_hf_deepspeed_config_weak_ref`: forgotten inside `unsharded`, known again after it."""
    from transformers.integrations import deepspeed

    class Config:
        def is_zero3(self):
            return True

    known = Config()
    deepspeed.set_hf_deepspeed_config(known)
    try:
        assert deepspeed.is_deepspeed_zero3_enabled()
        with internals.unsharded():
            assert not deepspeed.is_deepspeed_zero3_enabled()
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()


def test_trainer_trains_an_epoch_in_one_method():
    """`_run_epoch`: not called where no step is left."""
    import transformers

    assert callable(transformers.Trainer._run_epoch)
    state, epochs = SimpleNamespace(global_step=1, max_steps=2), []
    trainer = SimpleNamespace(_run_epoch=lambda epoch: epochs.append(epoch), state=state)
    internals.stop_at_last_step(trainer)
    trainer._run_epoch(epoch=0)
    state.global_step = 2
    trainer._run_epoch(epoch=1)
    assert epochs == [0]


def run_alone(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_deepspeed_asks_a_table_what_it_may_compile():
    """`__compatible_ops__`: the shared-memory all-reduce is the one entry that is switched off."""
    code = (
        "from alpaca.training import internals\n"
        "internals.prepare_deepspeed_on_cpu()\n"
        "import deepspeed\nfrom deepspeed.accelerator import get_accelerator\n"
        "print(get_accelerator().device_name(), getattr(deepspeed.ops, '__compatible_ops__')['deepspeed_shm_comm'])\n"
    )
    assert run_alone(code).split()[-2:] == ["cpu", "False"]


def test_accelerate_shares_the_kind_of_its_process_group():
    """`PartialState._shared_state`: FSDP over CPU processes falls back to DDP unless their type is a device's."""
    code = (
        "import os\nfrom alpaca.common.ports import free_port\n"
        "os.environ.update(RANK='0', WORLD_SIZE='1', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1')\n"
        "os.environ.update(MASTER_PORT=str(free_port()))\n"
        "from accelerate import PartialState\n"
        "from alpaca.training import internals\n"
        "PartialState(cpu=True, backend='gloo')\n"
        "internals.present_processes_as_devices()\n"
        "print(PartialState().distributed_type, PartialState().device)\n"
    )
    assert run_alone(code).split()[-2:] == ["DistributedType.MULTI_GPU", "cpu:0"]


def test_trainer_reads_the_number_of_gpus_from_its_arguments(tmp_path):
    """`_n_gpu`: set to 1, Trainer does not wrap the model in DataParallel."""
    from alpaca.training.training_arguments import TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert args.n_gpu == 0
    internals.use_one_gpu(args)
    assert args.n_gpu == 1


def test_torch_knows_the_bfloat16_instructions_of_the_cpu():
    """`torch.cpu._is_avx512_bf16_supported`, `_is_amx_tile_supported`."""
    assert internals.cpu_has_bf16() in (True, False)


@pytest.mark.parametrize(("name", "layer"), [("tiny_llama", "LlamaDecoderLayer"), ("tiny_opt", "OPTDecoderLayer")])
def test_transformers_models_describe_themselves(request, name, layer):
    """`_no_split_modules`, `config._attn_implementation`, `_supports_attention_backend`."""
    model = model_of(request.getfixturevalue(name))
    assert internals.layer_classes(model) == {layer}
    assert internals.attention_kernel(model) == "sdpa" and internals.hands_arguments_to_attention(model)


def test_torch_fake_tensors_have_storages_told_apart(tiny_llama):
    """`FakeTensorMode`, `_cdata`: what autograd saves is counted without memory, each storage once."""
    import torch

    with internals.fake_tensors():
        layers = [torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)]
        model = torch.nn.Sequential(*layers)
        kept = {"layers": 0, "outside": 0}
        with internals.count_saved_tensors(model, layers[1:], kept):
            model(torch.zeros(5, 8)).exp()
    assert kept == {"layers": 5 * 8 * 4, "outside": 2 * 5 * 8 * 4}
