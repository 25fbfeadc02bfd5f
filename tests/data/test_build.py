"""data/build.py and data/verify_rows.py on the committed files: what is built from them is what stands here."""

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT

from alpaca.common.errors import UserError
from alpaca.common.journal import Journal
from alpaca.common.run_record import sha256_file


def load_script(name):
    """A script of data/ as a module, under a name that no room uses."""
    spec = importlib.util.spec_from_file_location(f"data_{name}", ROOT / f"data/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_build_gives_the_committed_files(tmp_path, run_script):
    """An edit of a seed or a written row that is not followed by `make data` leaves two versions of the data."""
    run_script("data/build.py", "--output_dir", tmp_path)
    built = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(built) >= 2
    for name in built:
        assert sha256_file(tmp_path / name) == sha256_file(ROOT / name), f"{name}: run `make data`"


def test_every_row_has_its_origin():
    """A row whose origin is unknown has no licence."""
    rows = json.loads((ROOT / "alpaca_data.json").read_text(encoding="utf-8"))
    origins = read_jsonl(ROOT / "data/origin.jsonl")
    assert [origin["row"] for origin in origins] == list(range(1, len(rows) + 1))
    sources = {seed["id"]: {"instruction": seed["instruction"]} | seed["instances"][0]
               for seed in read_jsonl(ROOT / "seed_tasks.jsonl")}  # fmt: skip
    sources |= {row["name"]: row for row in read_jsonl(ROOT / "data/written_tasks.jsonl")}
    for row, origin in zip(rows, origins, strict=True):
        assert list(row) == ["instruction", "input", "output"] and all(sources[origin["id"]][k] == row[k] for k in row)


def test_every_stretch_of_rows_holds_many_kinds():
    """Rows sorted by kind make the batches of an unshuffled run, and every sample of the first rows, one-sided."""
    kinds = [origin["kind"] for origin in read_jsonl(ROOT / "data/origin.jsonl")]
    for begin in range(0, len(kinds) - 60, 20):
        assert max(Counter(kinds[begin : begin + 60]).values()) <= 6, begin


def test_every_check_of_every_row_holds(run_script):
    """Wrong sums and code that does not run pass for style."""
    told = run_script("data/verify_rows.py").stdout.splitlines()
    assert told[-1].endswith(", 0 failed")
    covered, total = map(int, re.findall(r"\d+", told[-1])[:2])
    assert covered >= 500
    datasheet = (ROOT / "datasheet.md").read_text(encoding="utf-8")
    assert f"| all | {total:,} | 65 | | | {covered} ({covered / total:.0%}) |" in datasheet


@pytest.mark.parametrize("output", ["def f(n):\n    return n + 2", "def f(n) return"])
def test_a_failing_check_is_told(tmp_path, run_script, output):
    """A check whose error is swallowed counts a wrong row as verified."""
    row = {"kind": "code", "name": "plus_one", "instruction": "Add one to a number.", "input": "", "output": output}
    row["check"] = "assert run_python(output)['f'](1) == 2"
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    told = run_script("data/verify_rows.py", tmp_path / "rows.jsonl", status=1).stdout
    assert "plus_one" in told and "1 of 1 rows executed or recomputed, 1 failed" in told


def test_assertions_are_checked_without_them_in_python(tmp_path):
    """Under `python -O` every false check held; a row without a name and a file of no rows ended in tracebacks."""
    row = {"kind": "code", "name": "plus_one", "instruction": "Add.", "input": "", "output": "2", "check": "assert 0"}
    for content, status, said in (
        (json.dumps(row), 1, "1 failed"), ('{"instruction": "Add."}', 2, "row 1 is no object with a name"),
        ("{", 2, "line 1 is not valid JSON"),
    ):  # fmt: skip
        (tmp_path / "rows.jsonl").write_text(content + "\n")
        command = [sys.executable, "-O", "data/verify_rows.py", tmp_path / "rows.jsonl"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status and said in done.stdout + done.stderr, done.stderr
        assert "Traceback" not in done.stderr


def test_a_program_that_ends_itself_ends_no_check():
    """A row's sys.exit(0) ended the whole check with status 0, and no later row was looked at."""
    row = {"output": "```python\nimport sys\nsys.exit(0)\n```", "check": "run_python(code(output))"}
    assert load_script("verify_rows").verify(row) == "SystemExit: 0"


def test_a_check_does_not_delete():
    """`make data` runs the checks on the machine of whoever types it."""
    verify_rows = load_script("verify_rows")
    assert verify_rows.run_shell("echo a > x", "cat x") == "a\n"
    for command in ("rm x", "find . -delete", "curl example.org"):
        with pytest.raises(ValueError, match="may not run"):
            verify_rows.run_shell("", command)


def test_a_packed_journal_gives_the_same_journal(tmp_path):
    """A part that is split inside a line, or an order that sorts 10 before 2, breaks the rebuild."""
    build = load_script("build")
    with_records = Journal(tmp_path / "responses.jsonl")
    with_records.append_now([{"kind": "reply", "index": n, "text": "é" * (n % 50)} for n in range(3000)])
    with_records.close()
    whole = (tmp_path / "responses.jsonl").read_bytes()
    with open(tmp_path / "responses.jsonl", "ab") as stream:
        stream.write(b'{"torn')
    build.pack(str(tmp_path / "responses.jsonl"), str(tmp_path / "parts"), part_bytes=1200)
    parts = sorted((tmp_path / "parts").iterdir())
    assert len(parts) > 10 and all(part.stat().st_size <= 1200 for part in parts)
    assert b"".join(build.gzip.decompress(part.read_bytes()) for part in parts) == whole
    sums = [sha256_file(part) for part in parts]
    build.pack(str(tmp_path / "responses.jsonl"), str(tmp_path / "parts"), part_bytes=1200)
    assert [sha256_file(part) for part in parts] == sums
    (tmp_path / "empty.jsonl").write_text('{"torn')
    with pytest.raises(UserError, match="holds no whole line"):  # the old parts were removed first
        build.pack(str(tmp_path / "empty.jsonl"), str(tmp_path / "parts"))
    assert [sha256_file(part) for part in parts] == sums
    build.pack(str(tmp_path / "responses.jsonl"), str(tmp_path / "parts"))
    assert [part.name for part in (tmp_path / "parts").iterdir()] == ["responses-01.jsonl.gz"]


def test_the_hub_folder_loads(tmp_path, run_script):
    """A card whose YAML head names a wrong path gives an empty data set on the Hub."""
    import datasets

    run_script("data/build.py", "hub", "--output_dir", tmp_path / "hub")
    loaded = datasets.load_dataset(str(tmp_path / "hub"), split="train", cache_dir=str(tmp_path / "cache"))
    rows = json.loads((ROOT / "alpaca_data.json").read_text(encoding="utf-8"))
    assert [{k: row[k] for k in ("instruction", "input", "output")} for row in loaded] == rows
    assert set(loaded["origin"]) <= {"seed", "written", "teacher"}
    assert (tmp_path / "hub/README.md").read_text(encoding="utf-8").startswith("---\npretty_name:")


def test_a_packed_run_becomes_selected_rows(tmp_path):
    """`make data` needs no teacher: the journal's replies become rows, and what the rules reject is counted."""
    build = load_script("build")
    seeds = [{"id": "seed_task_0", "instruction": "Name the planets.", "input": "", "output": "Mercury, Venus, ..."}]
    reply = {"kind": "reply", "index": 0, "first_number": 2, "finish_reason": "stop", "model": "m"}
    reply["text"] = (
        " What do four pens at 2.50 cost?\n2. Input:\n<noinput>\n2. Output:\n4 × 2.50 = 10.00\n###\n"
        "3. Instruction: Add up three cups at 3.20 each.\n3. Input:\n<noinput>\n3. Output:\n3 × 3.20 = 9.90\n###\n"
        "4. Instruction: Draw a map of the town.\n4. Input:\n<noinput>\n4. Output:\nHere it is.\n"
    )
    with_records = Journal(tmp_path / "responses.jsonl")
    with_records.append_now([{"kind": "run", "target": 10, "settings": {}, "seeds": seeds}, reply])
    with_records.close()
    build.pack(str(tmp_path / "responses.jsonl"), str(tmp_path / "data"))
    rows, rejected = build.teacher_rows(sorted((tmp_path / "data").iterdir()))
    assert rows == [{"instruction": "What do four pens at 2.50 cost?", "input": "", "output": "4 × 2.50 = 10.00"}]
    assert rejected == {"selection: a sum is wrong": 1, 'generation: asks for more than text: "draw"': 1}
    table = build.rejection_table(len(rows), rejected)
    assert "| 1 | 33.3% | kept |" in table and table.endswith("| 3 | 100% | all |\n")
