"""parse_analysis.py on small datasets, with the real English parser."""

import json
import math
from collections import Counter

import pytest

import parse_analysis

TASKS = [
    ("Write a short poem about the sea.", "", "Blue and wide."),
    ("Write a letter to the landlord.", "The tap drips.", "Dear Ms Lee, the tap drips."),
    ("List five rivers in Europe.", "", "Rhine, Danube, Loire, Po, Ebro"),
    ("Rewrite the sentence in the past tense.", "I walk home.", "I walked home."),
    ("What is the capital of France?", "", "Paris"),
    ("Explain how photosynthesis works.", "", "Plants turn light into sugar."),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tasks.json"
    rows = [dict(zip(("instruction", "input", "output"), row, strict=True)) for row in TASKS]
    path.write_text(json.dumps(rows))
    return path


def test_finds_verb_and_object_of_commands():
    """A capital first word made "List five rivers" a noun phrase, so its pair was lost."""
    pairs = parse_analysis.parse_instructions([row[0] for row in TASKS])
    assert pairs[:4] == [("write", "poem"), ("write", "letter"), ("list", "river"), ("rewrite", "sentence")]
    assert pairs[4] == (None, None)
    assert pairs[5] == ("explain", None)


def test_processes_do_not_change_the_result(monkeypatch):
    """Blocks parsed in two processes must come back in file order."""
    monkeypatch.setattr(parse_analysis, "BLOCK", 2)
    texts = [row[0] for row in TASKS] * 4
    assert parse_analysis.parse_instructions(texts, 2) == parse_analysis.parse_instructions(texts)


def test_entropy():
    """Four equally common kinds are two bits; one kind is none; no data is no error."""
    assert parse_analysis.entropy_bits(Counter("abcd")) == 2.0
    assert parse_analysis.entropy_bits(Counter("aaaa")) == 0.0
    assert parse_analysis.entropy_bits(Counter()) == 0.0
    assert math.isclose(parse_analysis.entropy_bits(Counter("aab")), 0.9182958340544896)


def test_length_histogram_bins_cover_every_text():
    """A length at a power of two must fall in one bin, and the bins must add up to the number of texts."""
    histogram = parse_analysis.length_histogram([" ".join("w" * n) for n in (1, 2, 3, 4, 7, 8, 100)])
    assert histogram["bins"] == {"0-1": 1, "2-3": 2, "4-7": 2, "8-15": 1, "16-31": 0, "32-63": 0, "64-127": 1}
    assert histogram["longest"] == 100 and histogram["texts"] == 7


def test_script_writes_figures_for_two_datasets(run_script, dataset, tmp_path):
    """Side by side must work for datasets of different size, one of them in the seeds' format with `instances`."""
    done = run_script(
        "parse_analysis.py", "--data_path", "seed_tasks.jsonl", "--compare", dataset, "--output_dir", tmp_path / "out"
    )
    out = tmp_path / "out"
    assert "write" in done.stdout
    for name in ("verb_object.png", "lengths.png"):
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (out / "verb_object.html").read_text()
    assert "sunburst" in page and "rewrite sentence" in page
    analysis = json.loads((out / "analysis.json").read_text())
    assert list(analysis) == ["seed_tasks.jsonl", "tasks.json"]
    small = analysis["tasks.json"]
    assert (small["rows"], small["with_verb_and_object"], small["verb_without_object"], small["no_root_verb"]) == (
        6,
        4,
        1,
        1,
    )
    assert small["top"][0]["verb"] == "write" and sorted(small["top"][0]["objects"]) == [["letter", 1], ["poem", 1]]
    assert json.loads((out / "run.json").read_text())["outcome"] == "finished"
    again = ["parse_analysis.py", "--data_path", dataset, "--output_dir"]
    assert "already exists" in run_script(*again, out, status=2).stderr
    # A model's folder keeps its own record, which the demo reads.
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "run.json").write_text(json.dumps({"command": ["train.py"], "settings": {}}))
    run_script(*again, trained)
    assert json.loads((trained / "run.json").read_text())["command"] == ["train.py"]
    assert json.loads((trained / "parse_analysis.run.json").read_text())["outcome"] == "finished"


def test_missing_file_is_named(run_script, tmp_path):
    """A wrong path must end with its name and status 2, without a traceback."""
    done = run_script(
        "parse_analysis.py", "--data_path", tmp_path / "no.json", "--output_dir", tmp_path / "o", status=2
    )
    assert "no.json" in done.stderr and "Traceback" not in done.stderr


def test_missing_language_model_says_how_to_get_it(monkeypatch):
    """A bare OSError of spaCy told nobody that the model is a package of its own."""
    monkeypatch.setattr(parse_analysis, "LANGUAGE_MODELS", ())
    parse_analysis.load_parser.cache_clear()
    with pytest.raises(parse_analysis.UserError, match="spacy download en_core_web_sm"):
        parse_analysis.load_parser()
    parse_analysis.load_parser.cache_clear()
