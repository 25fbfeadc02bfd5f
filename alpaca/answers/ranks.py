"""The processes that torchrun started, and what they tell each other."""

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from alpaca.common.errors import UserError

# The first process may be done long before the last one.
PATIENCE = datetime.timedelta(days=30)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Process `rank` of `count`. Both methods are called by every process and raise UserError where one has ended."""

    rank: int = 0
    count: int = 1

    def share(self, value: Any) -> Any:
        """The first process's `value`, on every process."""
        return self.gather(value)[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        values = [value] * self.count
        if self.count > 1:
            try:
                dist.all_gather_object(values, value)
            except RuntimeError as error:
                raise UserError("another process of this run has ended; its reason is said above.") from error
        return values


@contextlib.contextmanager
def torchrun_ranks() -> Iterator[Ranks]:
    """This process among those that torchrun started; the only one without torchrun."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks()
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), count)
    finally:
        dist.destroy_process_group()
