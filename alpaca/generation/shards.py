"""Joins the journals of shards: each asked its part of the requests, in a folder of its own."""

import dataclasses
import glob
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alpaca.common.cli import command_with
from alpaca.common.errors import UserError
from alpaca.common.files import jload
from alpaca.common.journal import changed_settings, read_records
from alpaca.common.shard import Shard
from alpaca.generation.harvest import Harvest, run_records
from alpaca.generation.settings import GenerationSettings


def find_folders(pattern: str) -> list[Path]:
    """The folders with a journal that a pattern such as out/shard_* names; UserError where there is none."""
    folders = [Path(path) for path in glob.glob(pattern) if (Path(path) / "responses.jsonl").is_file()]
    if not folders:
        raise UserError(
            f"--shards {pattern!r} names no folder with a responses.jsonl. Quote it: --shards 'out/shard_*'."
        )
    return folders


def join_shards(folders: Sequence[Path], **changes: Any) -> Harvest:
    """The harvest of all shards' replies in the order of the requests: that of one process with the same replies.

    changes: settings that are not to be the shards'. Raises UserError where the folders are no shards of one run.
    """
    journals = {folder: read_records(folder / "responses.jsonl") for folder in folders}
    journals = {folder: records for folder, records in journals.items() if run_records(records)}  # others just began
    if not journals:
        raise UserError(f"no shard of {', '.join(map(str, folders))} has begun.")
    found: dict[int, tuple[Path, GenerationSettings]] = {}
    for folder, records in journals.items():
        settings = GenerationSettings.from_record(run_records(records)[-1]["settings"])
        first_folder, first = next(iter(found.values()), (folder, settings))
        alike = [dataclasses.replace(each, shard=Shard(0, each.shard.count)).to_record() for each in (first, settings)]
        if changed := changed_settings(*alike):
            shown = "".join(f"\n  --{name}: {change}" for name, change in changed.items())
            raise UserError(f"{first_folder} and {folder} are no shards of one run:{shown}")
        if settings.shard.index in found:
            raise UserError(f"{found[settings.shard.index][0]} and {folder} are both shard {settings.shard}.")
        found[settings.shard.index] = folder, settings
    missing = [str(index) for index in range(settings.shard.count) if index not in found]
    if missing:
        print(f"note: {len(missing)} of {settings.shard.count} shards are missing: {', '.join(missing)}.")
    runs = [run_records(records) for records in journals.values()]
    seeds = next(run["seeds"] for run in reversed(runs[0]) if "seeds" in run)
    target = sum(run[-1]["target"] for run in runs)
    harvest = Harvest(seeds, dataclasses.replace(settings, shard=Shard(), **changes), target)
    for records in journals.values():
        harvest.add(records)
    return harvest.read_rest()


def how_to_go_on(harvest: Harvest, folders: Sequence[Path]) -> str:
    """What is missing to the target of all shards, and the command that asks for more."""
    wanted = math.ceil(harvest.target * harvest.target / max(len(harvest.tasks), 1))
    record = jload(folders[0] / "run.json") if (folders[0] / "run.json").is_file() else {}
    # torchrun and Slurm give the shard in the environment.
    shard = record.get("settings", {}).get("shard", "0/1")
    command = command_with(
        record.get("command", ["generate_instruction.py"]), num_instructions_to_generate=wanted, shard=shard
    )
    return (
        f"{harvest.target - len(harvest.tasks):,} of {harvest.target:,} tasks are missing. Finish the shards that "
        "have not reached their own share; where all have, they had tasks in common: start every shard again for more "
        "tasks. Then rebuild again:\n  " + re.sub(r"--shard[= ]\d+/", "--shard I/", command)
    )
