"""How answers are generated, checked before a model is loaded."""

import dataclasses

from alpaca.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0, sampled above; with several beams, beam search without temperature and top_p.

    Sampling draws from a generator of its own for each row, seeded with `seed` (None: another each time) and the row's
    number: an answer does not depend on the batch it is generated in. A `repetition_penalty` above 1 (Keskar et al.,
    2019) makes tokens less likely that the answer already has; those of the prompt stay as likely, so that a task's
    input can be copied.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1
    seed: int | None = 0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if self.max_new_tokens < 1 or self.num_beams < 1:
            raise UserError("--max_new_tokens and --num_beams must be at least 1.")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError("--temperature must be 0 (greedy) or more, --top_p above 0 and at most 1.")
        if self.repetition_penalty < 1:
            raise UserError("--repetition_penalty must be 1 (none) or more; 1.1 to 1.3 are usual.")
