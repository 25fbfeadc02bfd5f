"""parse_analysis.py on small datasets, with the real English parser."""

import json
import math
import sys
from collections import Counter

import pytest
from matplotlib.colors import to_rgb

import parse_analysis
from alpaca.answers import diversity, diversity_figures
from alpaca.common.errors import UserError

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
    pairs = diversity.parse_instructions([row[0] for row in TASKS])
    assert pairs[:4] == [("write", "poem"), ("write", "letter"), ("list", "river"), ("rewrite", "sentence")]
    assert pairs[4] == (None, None)
    assert pairs[5] == ("explain", None)


def test_processes_do_not_change_the_result(monkeypatch):
    """Blocks parsed in two processes must come back in file order."""
    monkeypatch.setattr(diversity, "BLOCK", 2)
    texts = [row[0] for row in TASKS] * 4
    assert diversity.parse_instructions(texts, 2) == diversity.parse_instructions(texts)


def test_entropy():
    """Four equally common kinds are two bits; one kind is none; no data is no error."""
    assert diversity.entropy_bits(Counter("abcd")) == 2.0
    assert diversity.entropy_bits(Counter("aaaa")) == 0.0
    assert diversity.entropy_bits(Counter()) == 0.0
    assert math.isclose(diversity.entropy_bits(Counter("aab")), 0.9182958340544896)


def test_length_histogram_bins_cover_every_text():
    """A length at a power of two must fall in one bin, and the bins must add up to the number of texts."""
    histogram = diversity.length_histogram([" ".join("w" * n) for n in (1, 2, 3, 4, 7, 8, 100)])
    assert histogram["bins"] == {"0-1": 1, "2-3": 2, "4-7": 2, "8-15": 1, "16-31": 0, "32-63": 0, "64-127": 1}
    assert histogram["longest"] == 100 and histogram["texts"] == 7


def contrast(one, other):
    """WCAG's contrast ratio of two RGB colors: 4.5 is the least for text."""
    lights = sorted(diversity_figures.luminance(color) + 0.05 for color in (one, other))
    return lights[1] / lights[0]


def test_every_slice_of_the_figure_can_be_read():
    """Narrow slices had no label or one of 5 points, and black stood on dark blue, brown and gray."""
    verbs = [f"verb{number}" for number in range(20)]
    top = [
        {"verb": verb, "objects": [[f"noun{number}_{i}", max(1, 4000 >> (number + 2 * i))] for i in range(4)]}
        for number, verb in enumerate(verbs)
    ]
    summary = {"rows": 10, "with_verb_and_object": 10, "share_shown": 1.0, "top": top}
    axes = diversity_figures.ring_figure({"data": summary}).axes[0]
    wedges = axes.patches
    inside, outside = [], []
    texts = [text for text in axes.texts if text.get_text()]  # pie adds an empty one to each slice
    for text in texts:
        assert text.get_fontsize() >= 8
        (inside if math.hypot(*text.get_position()) < 1 else outside).append(text)
    assert len(inside) > 10 and len(outside) > 20
    for text in inside:
        x, y = text.get_position()
        radius, angle = math.hypot(x, y), math.degrees(math.atan2(y, x)) % 360
        wedge = next(
            w for w in wedges if w.r - w.width < radius < w.r and (angle - w.theta1) % 360 < w.theta2 - w.theta1
        )
        assert contrast(wedge.get_facecolor()[:3], to_rgb(text.get_color())) >= 4.5
        assert (
            math.radians(wedge.theta2 - wedge.theta1) * radius
            >= 1.3 * text.get_fontsize() * diversity_figures.POINT - 1e-9
        )
    # Each slice once: a verb whose slice is too narrow is named with its objects.
    shown = [word for text in texts for word in text.get_text().split()]
    assert set(shown) == {*verbs, *(noun for entry in top for noun, _ in entry["objects"])}
    assert len(texts) == len(wedges) - sum(verb not in [t.get_text() for t in inside] for verb in verbs)
    angles = sorted(math.degrees(math.atan2(*text.get_position()[::-1])) % 360 for text in outside)
    gaps = [after - before for before, after in zip(angles, angles[1:] + [angles[0] + 360], strict=True)]
    assert min(gaps) * math.pi / 180 > 1.25 * 8 * diversity_figures.POINT


def test_script_writes_figures_for_two_datasets(run_script, dataset, tmp_path, monkeypatch):
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
    monkeypatch.setattr(sys, "argv", ["parse_analysis.py"])  # after which the record is named
    parse_analysis.analyze(str(dataset), str(trained))
    assert json.loads((trained / "run.json").read_text())["command"] == ["train.py"]
    assert json.loads((trained / "parse_analysis.run.json").read_text())["outcome"] == "finished"


def test_instructions_without_a_verb_give_figures_too(tmp_path):
    """A file of questions ended in matplotlib's "All wedge sizes are zero"."""
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "Five rivers?", "input": "", "output": "Nile"}]))
    parse_analysis.analyze(str(tmp_path / "a.json"), str(tmp_path / "out"))
    assert json.loads((tmp_path / "out/analysis.json").read_text())["a.json"]["with_verb_and_object"] == 0
    assert (tmp_path / "out/verb_object.png").is_file() and (tmp_path / "out/verb_object.html").is_file()


def test_missing_file_is_named(run_script, tmp_path):
    """A wrong path must end with its name and status 2, without a traceback."""
    done = run_script(
        "parse_analysis.py", "--data_path", tmp_path / "no.json", "--output_dir", tmp_path / "o", status=2
    )
    assert "no.json" in done.stderr and "Traceback" not in done.stderr


def test_missing_language_model_says_how_to_get_it(monkeypatch):
    """A bare OSError of spaCy told nobody that the model is a package of its own."""
    monkeypatch.setattr(diversity, "LANGUAGE_MODELS", ())
    diversity.load_parser.cache_clear()
    with pytest.raises(UserError, match="spacy download en_core_web_sm"):
        diversity.load_parser()
    diversity.load_parser.cache_clear()
