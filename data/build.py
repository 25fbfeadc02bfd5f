"""Builds alpaca_data.json and data/origin.jsonl from the committed sources, byte for byte.

    python data/build.py                                              # seconds; `make data` does the same and checks
    python data/build.py pack --journal RUN/responses.jsonl           # a run's journal as data/responses-NN.jsonl.gz
    python data/build.py hub --output_dir DIR                         # a Parquet copy with a data set card

The sources are seed_tasks.jsonl, data/written_tasks.jsonl and, where there are any, the packed journals of a teacher's
run. From the journals it makes data/teacher_rows.json and data/teacher_rejections.md without asking the teacher.
"""

import gzip
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

from selection import row_problem  # noqa: E402

from alpaca.common.cli import run_cli  # noqa: E402
from alpaca.common.errors import UserError  # noqa: E402
from alpaca.common.files import atomic_dir, atomic_write, jload, read_jsonl  # noqa: E402
from alpaca.common.run_record import sha256_file  # noqa: E402

FIELDS = ("instruction", "input", "output")
# Whether the selected rows of the teacher go into alpaca_data.json: only if 8 in 10 read ones are right or acceptable.
TEACHER_ROWS_JOIN = False
PART_BYTES = 8_000_000


def build(output_dir: str = str(ROOT)) -> None:
    """Writes alpaca_data.json, data/origin.jsonl and, with packed journals, the teacher's rows and rejections.

    Args:
        output_dir: where the files go; the repository by default.
    """
    seeds = [
        {"origin": "seed", "id": seed["id"], "kind": seed["kind"], "instruction": seed["instruction"]}
        | seed["instances"][0]
        for seed in read_jsonl(ROOT / "seed_tasks.jsonl")
    ]
    written = [
        {"origin": "written", "id": row["name"]} | row for row in mixed(read_jsonl(ROOT / "data/written_tasks.jsonl"))
    ]
    teacher: list[dict[str, Any]] = []
    files = {}
    if parts := sorted(ROOT.glob("data/responses-*.jsonl.gz")):
        rows, rejected = teacher_rows(parts)
        teacher = [{"origin": "teacher", "id": f"teacher_{n}", "kind": "generated"} | row for n, row in enumerate(rows)]
        files["data/teacher_rows.json"] = as_json([only_fields(row) for row in teacher])
        files["data/teacher_rejections.md"] = rejection_table(len(rows), rejected)
    rows = [*seeds, *written, *(teacher if TEACHER_ROWS_JOIN else ())]
    files["alpaca_data.json"] = as_json([only_fields(row) for row in rows])
    files["data/origin.jsonl"] = "".join(
        json.dumps({"row": number} | {key: row[key] for key in ("origin", "id", "kind")}, ensure_ascii=False) + "\n"
        for number, row in enumerate(rows, start=1)
    )
    for name, text in files.items():
        path = Path(output_dir) / name
        before = sha256_file(path) if path.is_file() else None
        with atomic_write(path) as stream:
            stream.write(text)
        after = sha256_file(path)
        state = "unchanged" if after == before else "new" if before is None else "changed"
        print(f"{name:<28}sha256 {after}  {state}")
    for origin, count in Counter(row["origin"] for row in rows).items():
        kinds = len({row["kind"] for row in rows if row["origin"] == origin})
        print(f"{count:6,} rows of alpaca_data.json: {origin}, {kinds} kinds")
    if parts:
        print(f"{len(teacher):6,} rows of data/teacher_rows.json, {sum(rejected.values()):,} tasks rejected")


def mixed(rows: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The rows in a fixed order in which every stretch holds many kinds: one of each kind in turn, as in the seeds."""
    by_kind = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row)
    for turn in itertools.zip_longest(*by_kind.values()):
        yield from (row for row in turn if row)


def only_fields(row: Mapping[str, Any]) -> dict[str, str]:
    return {field: row[field] for field in FIELDS}


def as_json(rows: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps(rows, indent=4, ensure_ascii=False) + "\n"


def teacher_rows(parts: Sequence[Path]) -> tuple[list[dict[str, str]], Counter[str]]:
    """The rows of packed journals that pass the rules of selection.py, and how many tasks were rejected why."""
    with tempfile.TemporaryDirectory() as folder:
        with open(Path(folder) / "responses.jsonl", "wb") as journal:
            for part in parts:
                with gzip.open(part) as stream:
                    shutil.copyfileobj(stream, journal)
        command = [sys.executable, str(ROOT / "generate_instruction.py"), "rebuild", "--output_dir", folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"`{' '.join(command[1:])}` failed:\n{done.stdout}{done.stderr}")
        rows = jload(Path(folder) / "alpaca_data.json")
        rejected = Counter(f"generation: {r['reason']}" for r in read_jsonl(Path(folder) / "rejections.jsonl"))
    kept = []
    for row in rows:
        if problem := row_problem(row):
            rejected[f"selection: {problem}"] += 1
        else:
            kept.append(row)
    return kept, rejected


def rejection_table(kept: int, rejected: Counter[str]) -> str:
    tasks = kept + sum(rejected.values())
    lines = ["| tasks | share | outcome |", "| ---: | ---: | --- |"]
    for reason, count in [("kept", kept), *sorted(rejected.items(), key=lambda item: (-item[1], item[0]))]:
        lines.append(f"| {count:,} | {count / tasks:.1%} | {reason} |")
    return "\n".join([*lines, f"| {tasks:,} | 100% | all |"]) + "\n"


def pack(journal: str, output_dir: str = str(ROOT / "data"), part_bytes: int = PART_BYTES) -> None:
    """Writes a run's journal as responses-01.jsonl.gz, responses-02.jsonl.gz, ..., split at line ends.

    Args:
        journal: responses.jsonl of a run that has ended.
        output_dir: the folder for the parts. Parts that stand there already are replaced.
        part_bytes: the largest size of a part.
    """
    path = Path(journal)
    if not path.is_file():
        raise UserError(f"no file {path} for --journal; it is the responses.jsonl of a run.")
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]  # a last line without its end was torn by a crash
    if not whole:
        raise UserError(f"--journal {path} holds no whole line; the parts in {output_dir} stay as they are.")
    # The old parts go last: what they hold was paid for.
    surplus = set(Path(output_dir).glob("responses-*.jsonl.gz"))
    for number, data in enumerate(compressed_parts(whole, part_bytes), start=1):
        target = Path(output_dir) / f"responses-{number:02d}.jsonl.gz"
        surplus.discard(target)
        with atomic_write(target, "wb") as stream:
            stream.write(data)
        print(f"{target}: {len(data):,} bytes, sha256 {sha256_file(target)}")
    for old in surplus:
        old.unlink()


def compressed_parts(journal: bytes, part_bytes: int) -> list[bytes]:
    """gzip files of whole lines, each at most `part_bytes`; the same journal gives the same bytes."""
    part = gzip.compress(journal, mtime=0)
    middle = journal.find(b"\n", len(journal) // 2) + 1
    if len(part) <= part_bytes or middle in (0, len(journal)):
        return [part]
    return compressed_parts(journal[:middle], part_bytes) + compressed_parts(journal[middle:], part_bytes)


def hub(output_dir: str, overwrite: bool = False) -> None:
    """Writes alpaca_data.json as Parquet with its data set card and licence: a folder as the Hugging Face Hub has it.

    Args:
        output_dir: the new folder. `datasets.load_dataset(output_dir)` gives the rows back.
        overwrite: replace what stands there.
    """
    import pyarrow
    import pyarrow.parquet

    rows, origins = jload(ROOT / "alpaca_data.json"), read_jsonl(ROOT / "data/origin.jsonl")
    if len(rows) != len(origins):
        raise UserError("alpaca_data.json and data/origin.jsonl differ in length. Run `python data/build.py` first.")
    table = pyarrow.Table.from_pylist(
        [row | {"origin": o["origin"], "kind": o["kind"]} for row, o in zip(rows, origins, strict=True)]
    )
    with atomic_dir(output_dir, overwrite) as folder:
        (folder / "data").mkdir()
        pyarrow.parquet.write_table(table, folder / "data/train-00000-of-00001.parquet")
        (folder / "README.md").write_text(CARD_HEAD + (ROOT / "datasheet.md").read_text("utf-8"), "utf-8")
        shutil.copyfile(ROOT / "DATA_LICENSE", folder / "LICENSE")
    print(f'{output_dir}: {len(rows):,} rows. Look at it: datasets.load_dataset("{output_dir}")["train"]')


CARD_HEAD = """\
---
pretty_name: Alpaca tasks written anew
license: cc-by-4.0
language:
- en
task_categories:
- text-generation
tags:
- instruction-tuning
- alpaca
size_categories:
- 1K<n<10K
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
---
"""

if __name__ == "__main__":
    run_cli({"build": build, "pack": pack, "hub": hub}, default="build")
