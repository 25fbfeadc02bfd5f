"""How answers are generated, checked before a model is loaded."""

import dataclasses

from alpaca.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0, sampled above; with several beams, beam search without temperature and top_p.

    Sampling draws from a generator of its own for each row, seeded with `seed` (None: another each time) and the row's
    number: an answer does not depend on the batch it is generated in.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1
    seed: int | None = 0

    def __post_init__(self):
        if self.max_new_tokens < 1 or self.num_beams < 1:
            raise UserError("--max_new_tokens and --num_beams must be at least 1.")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError("--temperature must be 0 (greedy) or more, --top_p above 0 and at most 1.")
