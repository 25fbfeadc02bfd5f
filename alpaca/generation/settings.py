"""The settings of a generation run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from alpaca.common.cli import at_least_one
from alpaca.common.errors import UserError
from alpaca.common.shard import Shard

# A journal of 2026 keeps the prompt's text and the seeds' checksum under the names of their flags.
_NAMES_IN_JOURNAL = {"prompt_text": "prompt_path", "seeds_sha256": "seed_tasks_path"}


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """What decides which replies come and which tasks are kept. A folder holds the replies of one such set."""

    model_name: str = ""
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 3072
    reasoning_effort: str | None = None
    api: str = "auto"
    seed: int = 42
    num_prompt_instructions: int = 3
    num_tasks_per_request: int = 20
    sample_from_generated: int = 0
    sample_lag: int = 64
    answer_separately: bool = False
    answer_temperature: float | None = None
    unicode_dedup: bool = False
    similarity_figures: bool = True
    prompt_text: str = ""
    seeds_sha256: str = ""
    shard: Shard = Shard()

    @property
    def tasks_per_reply(self) -> int:
        """How many tasks the prompt's list has room for behind its examples."""
        return self.num_tasks_per_request - self.num_prompt_instructions

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> "GenerationSettings":
        """The settings among a command's flags."""
        return cls(**{field.name: flags[field.name] for field in dataclasses.fields(cls)})

    def check(self, seeds: int) -> None:
        """Raises UserError for values that fit no run, not each other, or not so many seeds."""
        if self.api not in ("auto", "completions", "chat"):
            raise UserError(f"--api must be auto, completions or chat, found {self.api!r}.")
        if not 0 <= self.sample_from_generated <= self.num_prompt_instructions < self.num_tasks_per_request:
            raise UserError(
                "expected 0 <= --sample_from_generated <= --num_prompt_instructions < --num_tasks_per_request, found "
                f"{self.sample_from_generated}, {self.num_prompt_instructions}, {self.num_tasks_per_request}."
            )
        if self.answer_temperature is not None and not self.answer_separately:
            raise UserError("--answer_temperature is that of separate answers: add --answer_separately True.")
        at_least_one(max_tokens=self.max_tokens, sample_lag=self.sample_lag)
        if seeds < self.num_prompt_instructions:
            raise UserError(f"--seed_tasks_path has {seeds} tasks, fewer than --num_prompt_instructions.")

    def to_record(self) -> dict[str, Any]:
        """As they stand in the journal; settings that it did not have from the start only where they are not the
        default."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        shard = values.pop("shard")
        for name, default in (("similarity_figures", True), ("answer_temperature", None)):
            if values[name] == default:
                del values[name]
        record = {_NAMES_IN_JOURNAL.get(name, name): value for name, value in values.items()}
        return record if shard.whole else record | {"shard": str(shard)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "GenerationSettings":
        """Settings read from a journal. Those that it does not name have their defaults."""
        own = {_NAMES_IN_JOURNAL.get(field.name, field.name): field.name for field in dataclasses.fields(cls)}
        values = {own[name]: value for name, value in record.items() if name in own}
        if "shard" in values:
            values["shard"] = Shard(*map(int, values["shard"].split("/")))
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much is asked at a time, and when a run ends."""

    max_concurrency: int = 32  # requests under way
    max_requests_without_new: int = 100  # replies in a row without a task that is kept
    expected_tasks_per_request: float = 10.0  # before replies tell
    batch_poll_seconds: float = 30.0

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> "Limits":
        """The limits among a command's flags."""
        values = {field.name: flags[field.name] for field in dataclasses.fields(cls)}
        if values["expected_tasks_per_request"] is None:
            room = flags["num_tasks_per_request"] - flags["num_prompt_instructions"]
            values["expected_tasks_per_request"] = 0.6 * room
        if flags["sample_from_generated"]:  # examples come from requests so much earlier: these must have ended
            values["max_concurrency"] = min(values["max_concurrency"], flags["sample_lag"])
        return cls(**values)

    def check(self) -> None:
        """Raises UserError for values that fit no run."""
        at_least_one(max_concurrency=self.max_concurrency, max_requests_without_new=self.max_requests_without_new)
