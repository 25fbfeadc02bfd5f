"""Which part of a job this process does, where several processes do it together.

    generate_instruction.py --shard 0/8 ...                     # by hand
    torchrun --nproc_per_node=8 generate_instruction.py ...     # from RANK and WORLD_SIZE
    sbatch --array=0-7 ...                                      # from Slurm's SLURM_ARRAY_TASK_* variables

Parts are counted from 0.
"""

import dataclasses
import os
import re

from alpaca.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part `index` of `count`: the items whose number is `index` modulo `count`."""

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def whole(self) -> bool:
        """True where there is one part alone."""
        return self.count == 1

    def item(self, position: int) -> int:
        """The number of this part's item at `position` (from 0)."""
        return self.index + position * self.count

    def position(self, item: int) -> int:
        """The position of the item with this number; the reverse of `item`."""
        return (item - self.index) // self.count

    def share(self, total: int) -> int:
        """How many of `total` items belong to this part."""
        return len(range(self.index, total, self.count))


def find_shard(flag: str | None = None) -> Shard:
    """The shard of the flag "I/N"; without it that of torchrun and of a Slurm array, combined; else the whole job.

    I counts from 0. Raises UserError where the flag is no such pair.
    """
    if flag is not None:
        found = re.fullmatch(r"(\d+)/(\d+)", flag.strip())
        if not found or int(found[1]) >= int(found[2]):
            raise UserError(f"--shard takes I/N with I from 0 to N-1, such as 0/8, found {flag!r}.")
        return Shard(int(found[1]), int(found[2]))
    slurm = _from_environment("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", os.environ.get("SLURM_ARRAY_TASK_MIN"))
    torchrun = _from_environment("RANK", "WORLD_SIZE")
    return Shard(slurm.index * torchrun.count + torchrun.index, slurm.count * torchrun.count)


def _from_environment(index: str, count: str, first: str | None = None) -> Shard:
    try:
        shard = Shard(int(os.environ[index]) - int(first or 0), int(os.environ[count]))
    except (KeyError, ValueError):
        return Shard()
    if not 0 <= shard.index < shard.count:
        raise UserError(
            f"{index}={os.environ[index]} does not fit {count}={os.environ[count]}; number the tasks without gaps."
        )
    return shard
