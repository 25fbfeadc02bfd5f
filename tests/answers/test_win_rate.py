"""Win rates, errors and length control on hand-made annotations with known answers."""

import csv
import json
import math

import numpy as np
import pytest

from alpaca.answers import win_rate
from alpaca.common.errors import UserError


def annotation(number, preference, length_1=10, length_2=10, **extra):
    row = {
        "instruction": f"task {number}",
        "output_1": "a" * length_1,
        "output_2": "b" * length_2,
        "generator_1": "old",
        "generator_2": "new",
        "preference": preference,
    }
    return row | extra


def write(tmp_path, rows, name="annotations.json"):
    path = tmp_path / name
    path.write_text(
        "\n".join(json.dumps(row) for row in rows) if name.endswith("l") else json.dumps(rows), encoding="utf-8"
    )
    return path


def test_known_win_rate_and_standard_error(tmp_path):
    """Draws (1.5, 0) count one half, 2 is generator_2's win, fractions are soft: (0+1+.5+.5+.75)/5."""
    preferences = [1, 2, 1.5, 0, 1.75]
    rows = win_rate.load_annotations(write(tmp_path, [annotation(i, p) for i, p in enumerate(preferences)]))
    figures = win_rate.summarise(rows, resamples=200)
    wins = [0, 1, 0.5, 0.5, 0.75]
    mean = sum(wins) / 5
    error = math.sqrt(sum((win - mean) ** 2 for win in wins) / 4) / math.sqrt(5)
    assert figures["win_rate"] == pytest.approx(mean, abs=1e-12) == 2.75 / 5
    assert figures["standard_error"] == pytest.approx(error, abs=1e-12)
    assert (figures["wins"], figures["ties"], figures["losses"]) == (2, 2, 1)
    assert figures["generator_2"] == "new"


def test_a_null_preference_is_no_draw(tmp_path):
    """Failed judgements counted as draws: 60 nulls reported "50.00 ± 0.00, 60 ties"."""
    rows = win_rate.load_annotations(write(tmp_path, [annotation(i, p) for i, p in enumerate([2, None, 2, 1])]))
    figures = win_rate.summarise(rows, resamples=200)
    assert (figures["pairs"], figures["ties"], figures["dropped"]) == (3, 0, 1)
    assert figures["win_rate"] == pytest.approx(2 / 3)
    assert "3 pairs (1 more have no preference and are not counted)" in win_rate.table(figures)
    with pytest.raises(UserError, match="all 60 preferences are null"):
        win_rate.load_annotations(write(tmp_path, [annotation(i, None) for i in range(60)]))


def test_the_comparison_of_2023():
    """90 wins to 89 and nothing else: 50.28 %, with the binomial's standard error."""
    rows = [annotation(i, 0, win=float(i < 90)) for i in range(179)]
    figures = win_rate.summarise(rows, resamples=2000)
    assert figures["win_rate"] == pytest.approx(90 / 179)
    assert figures["standard_error"] == pytest.approx(math.sqrt(90 / 179 * 89 / 179 / 178), rel=1e-9)
    low, high = figures["interval"]
    # The normal interval is 50.28 +- 7.34 points; the bootstrap's must be near.
    assert low == pytest.approx(0.4294, abs=0.015) and high == pytest.approx(0.5762, abs=0.015)


def test_bootstrap_is_seeded_and_draws_prompts():
    """Ten annotations of each of four prompts are four observations, not forty: the interval must be wide."""
    rows = [annotation(i % 4, 0, win=float(i % 4 < 2)) for i in range(40)]
    by_prompt = win_rate.summarise(rows, resamples=1000, seed=3)["interval"]
    assert by_prompt == win_rate.summarise(rows, resamples=1000, seed=3)["interval"]
    assert by_prompt == [0.0, 1.0]
    apart = [annotation(i, 0, win=float(i % 4 < 2)) for i in range(40)]
    low, high = win_rate.summarise(apart, resamples=1000, seed=3)["interval"]
    assert 0.3 < low < high < 0.7
    assert win_rate.summarise([annotation(1, 0, win=1.0)] * 3, resamples=10)["interval"] is None


def test_length_adjusted_recovers_the_model_it_assumes():
    """Soft preferences made from theta and phi: the rate at equal length is logistic(theta), not the raw win rate."""
    theta, phi = 0.4, 1.2
    difference = np.random.default_rng(0).normal(150, 300, 600).astype(int)
    chances = 1 / (1 + np.exp(-(theta + phi * np.tanh(difference / difference.std(ddof=1)))))
    rows = [
        annotation(i, 0, 1000, 1000 + d, win=float(p)) for i, (d, p) in enumerate(zip(difference, chances, strict=True))
    ]
    found = win_rate.length_adjusted(rows, resamples=20)
    assert found["theta"] == pytest.approx(theta, abs=1e-3) and found["phi"] == pytest.approx(phi, abs=1e-2)
    assert found["win_rate"] == pytest.approx(1 / (1 + math.exp(-theta)), abs=1e-3)
    assert np.mean(chances) > found["win_rate"] + 0.05
    assert found["interval"][0] <= found["win_rate"] <= found["interval"][1]


def test_length_adjusted_without_an_effect_of_length_is_the_win_rate():
    """Regularising the model term would pull small samples to one half; equal lengths must change nothing."""
    rows = [annotation(i, 0, win=float(i < 7)) for i in range(10)]
    assert win_rate.length_adjusted(rows, 20)["win_rate"] == pytest.approx(0.7, abs=1e-12)
    # Each length difference with the same share of wins: again no effect.
    rows = [annotation(i, 0, 100, 100 + 40 * (i % 3), win=float(i // 3 < 7)) for i in range(30)]
    found = win_rate.length_adjusted(rows, 20)
    assert found["win_rate"] == pytest.approx(0.7, abs=1e-6) and found["phi"] == pytest.approx(0, abs=1e-5)


def test_length_adjusted_at_the_edges():
    """Only wins, verdicts that follow length exactly, one row, one constant difference: finite or said to be none."""
    only_wins = [annotation(i, 0, 100, 100 + i, win=1.0) for i in range(20)]
    assert win_rate.length_adjusted(only_wins, 20)["win_rate"] == 1.0
    longest_wins = [annotation(i, 0, 100, 90 + 20 * (i % 2), win=float(i % 2)) for i in range(40)]
    separable = win_rate.length_adjusted(longest_wins, 20)
    assert separable["win_rate"] == pytest.approx(0.5, abs=0.01) and math.isfinite(separable["phi"])
    constant = win_rate.length_adjusted([annotation(i, 0, 5, 9, win=float(i % 2)) for i in range(8)], 20)
    assert constant["win_rate"] is None and "same amount" in constant["reason"]
    assert win_rate.length_adjusted([annotation(0, 0, win=1.0)], 20)["win_rate"] == 1.0
    json.dumps(win_rate.summarise(only_wins, resamples=20), allow_nan=False)


def wave(i, k):
    """Fixed numbers in [0, 1) that need no generator."""
    return math.sin(12.9898 * i + 78.233 * k) * 43758.5453 % 1


def logistic(x):
    return 1 / (1 + math.exp(-x))


def short_winded(count):
    """Annotations of a model whose answers are all far shorter than the baseline's, and AlpacaEval's df_gamed rows."""
    rows, gamed = [], []
    for i in range(count):
        length_1 = 400 + int(2000 * wave(i, 1))
        length_2 = int(length_1 * (0.1 + 0.3 * wave(i, 2)))
        x = -1.5 + 2 * wave(i, 3) - 1.2 * math.tanh((length_1 - length_2) / 900)
        preference = 1 + round(min(max(logistic(x) + 0.2 * (wave(i, 4) - 0.5), 0.001), 0.999), 4)
        rows.append(annotation(i, {7: None, 8: 0, 9: 1.5}.get(i, preference), length_1, length_2))
    for model, sign in (("verbose", -1), ("concise", 1)):
        for i in range(count):
            length = round(sign * (0.3 + 1.4 * wave(i, 5 + sign)), 4)
            chance = logistic(-1.1 * math.tanh(length)) + 0.2 * (wave(i, 9) - 0.5)
            gamed.append({
                "model": model, "index": i, "preference": "" if i == 3 else round(min(max(chance, 0.001), 0.999), 4),
                "std_delta_len": length, "instruction_difficulty": round(2 * wave(i, 3) - 1, 4),
                "not_gamed_baseline": False,
            })  # fmt: skip
    return rows, gamed


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_length_controlled_is_alpaca_evals_figure(tmp_path):
    """Without instruction difficulty the rate of a short-winded model was far off (19.75 where AlpacaEval says 5.88).

    The figures are those that the package alpaca_eval 0.6.6 printed for these very rows.
    """
    rows, gamed = short_winded(120)
    table = write_csv(tmp_path / "df_gamed.csv", gamed)
    annotations = win_rate.load_annotations(write(tmp_path, rows))
    figures = win_rate.summarise(annotations, 100, difficulty_path=table)
    found = figures["length_controlled"]
    assert found["win_rate"] == pytest.approx(0.4392530983283193, abs=1e-4)
    assert found["standard_error"] == pytest.approx(0.009578024098416196, abs=1e-4)
    assert list(found["weights"].values()) == pytest.approx([-1.20532568, 0.76596389, -0.23493604], abs=1e-3)
    assert figures["win_rate"] == pytest.approx(0.2090781512605042) and "length_adjusted" not in figures
    shown = win_rate.table(figures)
    assert "length-controlled win rate: 43.9" in shown and "warning: it is far from the plain win rate" in shown
    plain = win_rate.table(win_rate.summarise(annotations, 100))
    assert "length-adjusted win rate" in plain and "not AlpacaEval's length-controlled rate" in plain

    few = [{"index": str(i), "instruction_difficulty": 0.5} for i in range(4)]
    with pytest.raises(UserError, match="there are 4 judged answers"):
        win_rate.length_controlled(annotations[:4], *win_rate.read_difficulty(write_csv(table, few)))
    with pytest.raises(UserError, match="no row for the instructions with index 119"):
        win_rate.length_controlled(annotations, *win_rate.read_difficulty(write_csv(table, gamed[:119])))
    with pytest.raises(UserError, match="no column instruction_difficulty"):
        win_rate.read_difficulty(write_csv(table, [{"index": 0}]))
    with pytest.raises(UserError, match="line 2: .*'hard'"):
        win_rate.read_difficulty(write_csv(table, [{"index": 0, "instruction_difficulty": "hard"}]))


@pytest.mark.parametrize(("raw", "adjusted", "far"), [
    (0.2, 0.11, False), (0.2, 0.09, True), (0.2, 0.39, False), (0.2, 0.41, True), (0.5, 0.37, True), (0.9, 0.99, False),
])  # fmt: skip
def test_when_an_adjusted_rate_is_far(raw, adjusted, far):
    """AlpacaEval's own rule: more than 10 points and more than a quarter of the way to 0 or 100."""
    assert win_rate.far_from_raw(raw, adjusted) is far


def test_categories_of_all_known_files(tmp_path):
    """Self-Instruct calls the category motivation_app, AlpacaEval dataset; a task file can supply it."""
    rows = [
        annotation(0, 2, category="maths"),
        annotation(1, 1, motivation_app="Gmail"),
        annotation(2, 2, dataset="koala"),
        annotation(3, 2),
    ]
    rows = win_rate.load_annotations(write(tmp_path, rows, "annotations.jsonl"))
    tasks = [{"instruction": "task  3\n", "input": "", "category": "maths"}]
    figures = win_rate.summarise(win_rate.with_categories(rows, tasks), resamples=50)
    assert {name: part["pairs"] for name, part in figures["categories"].items()} == {"Gmail": 1, "koala": 1, "maths": 2}
    assert figures["categories"]["maths"]["win_rate"] == 1.0
    assert "Gmail" in win_rate.table(figures)


@pytest.mark.parametrize("value", [3, 0.5, -1, "2", True, [1]])
def test_impossible_preferences_are_named(tmp_path, value):
    """A preference outside the scale silently shifts a mean; its row is named instead."""
    path = write(tmp_path, [annotation(0, 1), annotation(1, value)])
    with pytest.raises(UserError, match="row 2: 'preference'"):
        win_rate.load_annotations(path)


def test_files_that_are_no_annotations(tmp_path):
    """An answer file, an empty file, a misspelt name, two pairs of models in one file."""
    with pytest.raises(UserError, match="judge"):
        win_rate.load_annotations(write(tmp_path, [{"instruction": "x", "output": "y"}]))
    with pytest.raises(UserError, match="'preference' is missing"):
        win_rate.load_annotations(write(tmp_path, [{"instruction": "x", "output_1": "y", "output_2": "z"}]))
    with pytest.raises(UserError, match="no annotations"):
        win_rate.load_annotations(write(tmp_path, []))
    with pytest.raises(UserError, match="Did you mean .*annotations.json"):
        win_rate.load_annotations(tmp_path / "anotations.json")
    two = write(tmp_path, [annotation(0, 1), annotation(0, 2, generator_2="newer")])
    with pytest.raises(UserError, match="2 pairs of models: old and new; old and newer"):
        win_rate.load_annotations(two)
    assert len(win_rate.load_annotations(two, generator_2="newer")) == 1
