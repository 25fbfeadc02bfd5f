"""Instruction data as people have it: encodings, CSV, Parquet, broken files."""

import errno
import json
import os

import pytest

from alpaca.common import tasks
from alpaca.common.errors import UserError
from alpaca.common.files import atomic_dir, jdump, jload, write_jsonl
from alpaca.common.tasks import iter_rows, load_tasks, read_rows

ROWS = [
    {"instruction": "Translate to German.", "input": "a line\nand, a “second” one", "output": "ja", "origin": "me"},
    {"instruction": "说出三种颜色。", "input": "", "output": "红\u2028绿", "origin": "me"},
]
LIST, LINES = json.dumps(ROWS, ensure_ascii=False), "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(("name", "text"), [("data.json", LIST), ("data.jsonl", LINES + "\n\n")])
def test_encodings(tmp_path, encoding, name, text):
    """Files saved by Windows programs begin with a byte-order mark or are UTF-16; both ended in a decoding error."""
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert load_tasks(tmp_path / name) == list(iter_rows(tmp_path / name)) == ROWS


@pytest.mark.parametrize("write", [write_jsonl, jdump])
def test_half_a_character_is_written(tmp_path, write):
    """JSON can hold a lone surrogate, in a further column too: it ended a run when all its answers were there."""
    rows = [{**ROWS[0], "note": "cut \ud83d"}]
    write(*((tmp_path / "out.json", rows) if write is write_jsonl else (rows, tmp_path / "out.json")))
    assert read_rows(tmp_path / "out.json") == rows


def test_folders_that_cannot_be_renamed(tmp_path, monkeypatch):
    """A link, the folder one is in and a mounted disk failed at the rename, when all the work was done."""
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to("place")
    with atomic_dir(tmp_path / "link") as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "place/a").read_text() == "new"
    monkeypatch.chdir(tmp_path / "place")
    with pytest.raises(UserError, match=r"the folder that you are in.* such as .*place/out"), atomic_dir(".", True):
        pass
    monkeypatch.setattr("pathlib.Path.is_mount", lambda path: path.name == "disk")
    with pytest.raises(UserError, match=r"disk is a mounted disk"), atomic_dir(tmp_path / "disk"):
        pass
    assert (tmp_path / "place/a").read_text() == "new"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file is a file, and a folder"), atomic_dir(tmp_path / "file", True):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_the_old_folder_comes_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    """It stayed under a hidden name, and its own name was gone."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a").write_text("old")
    rename = os.replace

    def refuse(source, target):
        if str(source).endswith(".partial"):
            raise PermissionError(errno.EACCES, "no", str(target))
        rename(source, target)

    monkeypatch.setattr("alpaca.common.files.os.replace", refuse)
    with pytest.raises(PermissionError), atomic_dir(tmp_path / "out", True) as folder:
        (folder / "a").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out/a").read_text() == "old"


def test_csv_and_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "data.csv").write_bytes(
        'instruction,input,output\r\n"Say ""hi"", twice",,"hi\nhi"\r\nAdd.,2 + 2,4\r\n'.encode("utf-8-sig")
    )
    assert load_tasks(tmp_path / "data.csv") == [
        {"instruction": 'Say "hi", twice', "input": "", "output": "hi\nhi"},
        {"instruction": "Add.", "input": "2 + 2", "output": "4"},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "data.parquet")
    assert load_tasks(tmp_path / "data.parquet") == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[\n{"instruction": "x", "output": "y"},\n]', "trailing comma before ']' in line 3"),
        ("a.json", '[{"instruction": "x", "output": "y",}]', "trailing comma before '}' in line 1 (row 1)"),
        ("a.json", '[{"instruction": "x"}, {"instruction": "y", "out', "(row 2)"),
        ("a.json", '[{"instruction": "x", "output": "y"},', "ends in the middle"),
        ("a.jsonl", '{"instruction": "x", "output": "y"}\n{"instruction": ', "line 2"),
        ("a.json", '{"data": [{"instruction": "x", "output": "y"}]}', "Its rows stand under 'data'"),
        ("a.json", b'[{"instruction": "caf\xe9", "output": "y"}]', "line 1 is not UTF-8 text"),
        ("a.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer"),
        ("a.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer"),
        ("a.parquet", "PAR1 and no more", "cannot be read as Parquet"),
        ("a.csv", "prompt,output\nx,y\n", "no column 'instruction'"),
        ("a.csv", "instruction,output\nx,y\nName a city, please,Rome\n", "line 3 (row 2) has 3 cells, the header 2"),
        ("a.json", "[]", "holds no rows"),
        ("a.json", "", "holds no rows"),
        ("a.json", '[{"instruction": "x", "output": 5}]', "row 1: 'output' must be a string, found int"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        load_tasks(tmp_path / name)
    assert message in str(error.value) and name in str(error.value)


CONTENTS = [
    LIST, LINES, json.dumps(ROWS * 3, indent=4), json.dumps(ROWS * 3), "", " ", "[\n]", "1\n2\n", "{", '{"a": 1}\n',
    ' \n[ 12 , [], -1.5e3,null,\t"a]" ] ', '["a" "b"]', "[1, 2", "[1, 2]]", "[1,, 2]", "[,]", "[1}",
    '{"data": [{"instruction": "x"}]}',
]  # fmt: skip


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_rows_that_are_read_one_by_one(tmp_path, monkeypatch, content, block):
    """Guards large files: the same rows or the same error as from the whole text, wherever a piece of it ends."""

    def outcome(function):
        try:
            return list(function(tmp_path / "a.json"))
        except UserError as error:
            return str(error)

    monkeypatch.setattr(tasks, "BLOCK", block)
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    assert outcome(iter_rows) == outcome(read_rows)


def test_a_misspelt_name(tmp_path):
    (tmp_path / "alpaca_data.json").write_text(LIST)
    with pytest.raises(UserError, match="Did you mean .*alpaca_data.json"):
        load_tasks(tmp_path / "alpaca_dta.json")
    with pytest.raises(UserError, match="is a folder"):
        load_tasks(tmp_path)


def test_jload_takes_open_files(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    with open(tmp_path / "a.json") as stream:
        assert jload(stream) == {"a": 1}
    with open(tmp_path / "a.json", "rb") as stream:
        assert jload(stream) == {"a": 1}
