"""Makes FSDP and ZeRO-3 shard for real over CPU processes, so that a laptop rehearses a cluster's command.

Not a command; train.py calls it where torchrun has started several processes and there is no GPU:

    torchrun --nproc_per_node=2 train.py configs/llama_7b.yaml --model_name_or_path TINY --output_dir OUT
"""

import os
from pathlib import Path


def prepare_deepspeed() -> None:
    """Makes DeepSpeed run on the CPU over gloo, without a compiler. Called before anything imports it.

    DeepSpeed asks a variable, not the hardware, what it runs on. At its start it would compile a shared-memory
    all-reduce: a minute that needs g++ and ninja, and a build killed half-way leaves a lock file on which every later
    run waits for ever. gloo does the same job.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    getattr(deepspeed.ops, "__compatible_ops__")["deepspeed_shm_comm"] = False  # noqa: B009 - a plain name is mangled


def present_processes_as_devices() -> None:
    """Lets accelerate shard over the CPU processes of the running group, and not fall back to DDP in silence.

    accelerate turns a process group into an FSDP one only where its type is one of the accelerator types, never where
    it is MULTI_CPU. Nothing in torch asks for that: fully_shard and gloo work on CPU tensors. So once the group stands
    (its device and backend are settled and stay "cpu" and gloo) its type is given as MULTI_GPU.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    state = PartialState()
    assert state.distributed_type == DistributedType.MULTI_CPU and state.device.type == "cpu", repr(state)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def sensible_threads(processes_here: int) -> int:
    """Compute threads for one of `processes_here` processes: the cores that this container may really use, shared.

    Reads the affinity mask and the cgroup's CPU quota; torch looks at the machine's cores alone, and 64 threads on a
    quota of 2 are many times slower than 2.
    """
    cores = float(len(os.sched_getaffinity(0)))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores, int(limit) / int(period))
    return max(1, int(cores) // processes_here)
