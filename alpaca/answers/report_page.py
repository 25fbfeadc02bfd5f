"""The page of a report: the figures and every judged pair, to search and filter, in one self-contained HTML file.

All texts of models and data are escaped by Jinja. The page's policy forbids loading anything. Without JavaScript every
pair is still there to read.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from alpaca.answers.pairs import category_of
from alpaca.answers.win_rate import by_length


def report_page(figures: dict[str, Any], annotations: Sequence[dict], judge: dict[str, Any] | None = None) -> str:
    """The whole page as HTML text.

    `figures` and `annotations`: of win_rate. `judge`: the judge.json of `evaluation.py judge`, where there is one.
    """
    pages = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    pages.filters |= {"percent": _percent, "interval": _interval}
    pairs = [_pair(row) for row in annotations if row["win"] is not None]
    return pages.get_template("report_page.html").render(
        figures=figures, note=_note(figures, judge), cards=_cards(figures), pairs=pairs
    )


def _note(figures: dict[str, Any], judge: dict[str, Any] | None) -> str:
    if not judge:
        return f"Preferences as found in the annotations file. Without one, not counted: {figures['dropped']}."
    rule = "the probabilities of its verdicts are averaged" if judge.get("soft") else "disagreement is a tie"
    return (
        f"Judge {judge['judge']}, prompt {judge['prompt_version']}, {judge['date']}. Each pair was asked in both "
        f"orders; {rule}. Pairs without a verdict, not counted: {judge['failures'] + figures['dropped']}."
    )


def _percent(rate: float | None) -> str:
    return "–" if rate is None else f"{100 * rate:.1f} %"


def _interval(bounds: Sequence[float] | None) -> str:
    return "–" if bounds is None else f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}"


def _cards(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """(figure, what it is) of the boxes at the top."""
    title, adjusted = by_length(figures)
    error = "" if figures["standard_error"] is None else f"± {100 * figures['standard_error']:.1f} (SE), "
    if adjusted["win_rate"] is None:
        title += f": {adjusted['reason']}"
    elif "interval" in adjusted:
        title += f", 95 % {_interval(adjusted['interval'])}"
    elif adjusted["standard_error"] is not None:
        title += f", ± {100 * adjusted['standard_error']:.1f} (SE)"
    return [
        (_percent(figures["win_rate"]), f"win rate, {error}95 % {_interval(figures['interval'])}"),
        (_percent(adjusted["win_rate"]), title),
        (f"{figures['wins']} : {figures['ties']} : {figures['losses']}", "wins : ties : losses"),
        (
            f"{figures['mean_length_2']:.0f} : {figures['mean_length_1']:.0f}",
            "mean length in characters, this model : the other",
        ),
    ]


def _pair(row: dict[str, Any]) -> dict[str, Any]:
    outcome = "win" if row["win"] > 0.5 else "loss" if row["win"] < 0.5 else "tie"
    verdict = {"win": f"{row['generator_2']} better", "loss": f"{row['generator_1']} better", "tie": "tie"}[outcome]
    verdicts = row.get("verdicts")
    if outcome == "tie" and verdicts and verdicts[0] != verdicts[1]:
        verdict += ", the two orders disagree"
    elif row["win"] not in (0, 0.5, 1):
        verdict += f", preference {1 + row['win']:.3g}"
    sides = [
        (row[f"generator_{side}"], row[f"output_{side}"], outcome == better)
        for side, better in ((1, "loss"), (2, "win"))
    ]
    return {
        "row": row, "outcome": outcome, "category": category_of(row) or "(none)", "verdict": verdict, "sides": sides,
    }  # fmt: skip
