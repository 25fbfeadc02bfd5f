"""Wins, ties, losses and win rates from pairwise preferences, with standard error, bootstrap and length control.

Not a command; `python evaluation.py report` is.

    figures = summarise(load_annotations("annotations.json"))

The format and the plain win rate are those of AlpacaEval (github.com/tatsu-lab/alpaca_eval): preference 1 is a win
of output_1, 2 of output_2, 1.5, 0 or null a draw, fractions in between are soft; the win rate is generator_2's.
"""

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alpaca.common.errors import UserError
from alpaca.common.files import jload, read_jsonl

CATEGORY_FIELDS = ("category", "motivation_app", "dataset")  # this project's, Self-Instruct's, AlpacaEval's
REGULARISATION = 100.0  # scikit-learn's C for the length coefficient: large, so that it only tames separable data


def category_of(row: dict[str, Any]) -> str | None:
    """A task's category under any of the names that the known files use."""
    return next((str(row[field]) for field in CATEGORY_FIELDS if row.get(field)), None)


# ----------------------------------------------------------------------------------------------------------------------
# Reading annotations.


def load_annotations(path: str | Path, generator_1: str | None = None, generator_2: str | None = None) -> list[dict]:
    """Rows of an annotations file (JSON list or JSONL), or of a folder that `evaluation.py judge` wrote.

    Each row gets `win`: the probability in [0, 1] that output_2 is the better one. `generator_1` and `generator_2`
    choose rows where a file holds several pairs of models. Raises UserError naming the rows that cannot be read, and
    where the rows compare more than one pair of models.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "annotations.json"
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [child.name for child in path.parent.glob("*.json*")], n=1)
        raise UserError(f"no file {path}." + (f" Did you mean {path.with_name(near[0])}?" if near else ""))
    rows = read_jsonl(path) if path.suffix == ".jsonl" else jload(path)
    if not isinstance(rows, list):
        raise UserError(f"{path} must hold a list of annotations, found {type(rows).__name__}.")

    problems, annotations = [], []
    for number, row in enumerate(rows, start=1):
        problem, win = _read_row(row)
        if problem:
            problems.append(f"  row {number}: {problem}")
            continue
        row = {"generator_1": "output_1", "generator_2": "output_2", **row, "win": win}
        if generator_1 in (None, row["generator_1"]) and generator_2 in (None, row["generator_2"]):
            annotations.append(row)
    if problems:
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(
            f"{path}: {len(problems)} of {len(rows)} rows are no annotations:\n" + "\n".join(problems[:10]) + more
        )
    if not annotations:
        raise UserError(f"{path} holds no annotations" + (" of these generators." if rows else "."))
    pairs = sorted({(row["generator_1"], row["generator_2"]) for row in annotations})
    if len(pairs) > 1:
        listed = "; ".join(f"{first} and {second}" for first, second in pairs[:8])
        raise UserError(
            f"{path} compares {len(pairs)} pairs of models: {listed}. Choose with --generator_1 and --generator_2."
        )
    return annotations


def with_categories(annotations: Sequence[dict], tasks: Sequence[dict]) -> list[dict]:
    """Annotations with the category of the task that has the same instruction (spacing aside) and, if known, input."""
    by_text, by_instruction = {}, {}
    for task in tasks:
        instruction = " ".join(task["instruction"].split())
        by_text[instruction, " ".join(task["input"].split())] = by_instruction[instruction] = category_of(task)
    found = []
    for row in annotations:
        instruction, given = " ".join(row["instruction"].split()), " ".join((row.get("input") or "").split())
        category = by_text.get((instruction, given)) or by_instruction.get(instruction) or category_of(row)
        found.append({**row, "category": category} if category else row)
    return found


def _read_row(row: Any) -> tuple[str | None, float]:
    if not isinstance(row, dict):
        return f"expected an object, found {type(row).__name__}", 0.0
    for field in ("instruction", "output_1", "output_2"):
        if not isinstance(row.get(field), str):
            hint = " (an answer file? First run evaluation.py judge)" if "preference" not in row else ""
            return f"{field!r} must be a string, found {row.get(field)!r:.40}{hint}", 0.0
    if "preference" not in row:
        return "'preference' is missing (null is a draw)", 0.0
    value = row["preference"]
    if value is None or value == 0 and not isinstance(value, bool) or isinstance(value, float) and math.isnan(value):
        return None, 0.5
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= 2:
        return f"'preference' must be null, 0 or from 1 to 2, found {value!r:.40}", 0.0
    return None, float(value) - 1


# ----------------------------------------------------------------------------------------------------------------------
# Figures.


def summarise(annotations: Sequence[dict], resamples: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """All figures of generator_2 against generator_1, over everything and per category.

    Rates are fractions of 1; `interval` is the 95 % percentile bootstrap over prompts; lengths are in characters.
    """
    whole = _figures(annotations, resamples, seed)
    categories: dict[str, list[dict]] = {}
    for row in annotations:
        categories.setdefault(category_of(row) or "(none)", []).append(row)
    return {
        "generator_1": annotations[0]["generator_1"],
        "generator_2": annotations[0]["generator_2"],
        **whole,
        "length_controlled": length_controlled(annotations, min(resamples, 500), seed),
        "bootstrap": {"resamples": resamples, "seed": seed, "level": 0.95, "unit": "prompt"},
        "categories": {name: _figures(rows, resamples, seed) for name, rows in sorted(categories.items())},
    }


def _figures(rows: Sequence[dict], resamples: int, seed: int) -> dict[str, Any]:
    import numpy as np

    wins = np.array([row["win"] for row in rows])
    lengths = np.array([[len(row["output_1"]), len(row["output_2"])] for row in rows])
    return {
        "pairs": len(rows),
        "wins": int((wins > 0.5).sum()),
        "ties": int((wins == 0.5).sum()),
        "losses": int((wins < 0.5).sum()),
        "win_rate": float(wins.mean()),
        "standard_error": float(wins.std(ddof=1) / math.sqrt(len(wins))) if len(wins) > 1 else None,
        "interval": bootstrap_interval(wins, prompt_groups(rows), resamples, seed),
        "mean_length_1": float(lengths[:, 0].mean()),
        "mean_length_2": float(lengths[:, 1].mean()),
    }


def prompt_groups(rows: Sequence[dict]):
    """The prompt's number of each row, int array of shape (rows,): rows of one prompt are drawn together."""
    import numpy as np

    numbers: dict[tuple, int] = {}
    return np.array([numbers.setdefault((row["instruction"], row.get("input") or ""), len(numbers)) for row in rows])


def bootstrap_counts(groups, resamples: int, seed: int):
    """How often each resample draws each prompt: yields int arrays of shape (block, prompts), `resamples` in all."""
    import numpy as np

    rng, prompts, done = np.random.default_rng(seed), int(groups.max()) + 1, 0
    while done < resamples:
        block = min(500, resamples - done)
        yield rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=block)
        done += block


def bootstrap_interval(wins, groups, resamples: int = 10_000, seed: int = 0) -> list[float] | None:
    """95 % percentile interval of the mean of `wins` (floats, one a row) when prompts are drawn with replacement.

    None where all rows are of one prompt.
    """
    import numpy as np

    if groups.max() == 0:
        return None

    sums, sizes = np.bincount(groups, wins), np.bincount(groups)
    means = [(counts @ sums) / (counts @ sizes) for counts in bootstrap_counts(groups, resamples, seed)]
    return [float(bound) for bound in np.quantile(np.concatenate(means), [0.025, 0.975])]


def length_controlled(annotations: Sequence[dict], resamples: int = 500, seed: int = 0) -> dict[str, Any]:
    """The win rate that generator_2 would have if its answers were as long as generator_1's.

    The generalised linear model of Dubois et al. 2024 (arXiv 2404.04475): logit P(output_2 wins) = theta +
    phi * tanh(d / sd(d)), d the difference of the lengths in characters; the rate is the model's at d = 0. Soft
    preferences count as a win and a loss with their weights. Two things differ from AlpacaEval's own code: its term for
    each instruction's difficulty is left out, because it comes from a table fitted over many models on its 805
    instructions, which other task sets lack; and only phi is regularised (L2, C = 100), not theta, so that without an
    effect of length the result is the plain win rate.

    Returns `win_rate`, `interval` (95 %, bootstrap over prompts), `theta`, `phi`; or win_rate None and a `reason`.
    """
    import numpy as np

    wins = np.array([row["win"] for row in annotations])
    difference = np.array([len(row["output_2"]) - len(row["output_1"]) for row in annotations], dtype=float)
    spread = difference.std(ddof=1) if len(wins) > 1 else 0.0
    if spread == 0 and difference.any():
        return {"win_rate": None, "reason": "every pair differs in length by the same amount"}
    feature = np.tanh(difference / spread) if spread else difference
    groups = prompt_groups(annotations)
    theta, phi = _fit(feature, wins, np.ones_like(wins))
    rates = [
        _logistic(_fit(feature, wins, counts[groups].astype(float))[0])
        for block in bootstrap_counts(groups, resamples, seed)
        for counts in block
    ]
    return {
        "win_rate": _logistic(theta),
        "interval": [float(bound) for bound in np.quantile(rates, [0.025, 0.975])],
        "theta": theta if math.isfinite(theta) else None,
        "phi": phi,
        "resamples": resamples,
    }


def _fit(feature, wins, weights) -> tuple[float, float]:
    """(theta, phi) of the weighted logistic regression of `wins` on `feature`; theta may be infinite."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    drawn = weights > 0
    if np.ptp(wins[drawn]) == 0 or np.ptp(feature[drawn]) == 0:
        # Nothing for phi to explain: theta alone gives the mean, which may be 0 or 1.
        mean = float(np.average(wins, weights=weights))
        return (math.log(mean / (1 - mean)) if 0 < mean < 1 else math.copysign(math.inf, mean - 0.5)), 0.0
    model = LogisticRegression(C=REGULARISATION, solver="newton-cholesky", tol=1e-8)
    model.fit(
        np.concatenate([feature, feature])[:, None],
        np.repeat([1, 0], len(wins)),
        sample_weight=np.concatenate([weights * wins, weights * (1 - wins)]),
    )
    return float(model.intercept_[0]), float(model.coef_[0, 0])


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


# ----------------------------------------------------------------------------------------------------------------------
# A table for the terminal.


def table(figures: dict[str, Any]) -> str:
    """The figures as text, rates in percent."""
    lines = [f"{figures['generator_2']} against {figures['generator_1']}, {figures['pairs']} pairs", ""]
    head = f"{'':24} {'wins':>5} {'ties':>5} {'losses':>6}  {'win rate':>8} {'± SE':>5}  {'95 % interval':>14}"
    lines += [head + f"  {'mean length':>13}", "-" * (len(head) + 15)]
    for name, part in [("all", figures), *figures["categories"].items()]:
        if part is not figures and len(figures["categories"]) == 1:
            continue
        error = "" if part["standard_error"] is None else f"{100 * part['standard_error']:.2f}"
        interval = " to ".join(f"{100 * bound:.1f}" for bound in part["interval"] or [])
        lines.append(
            f"{name[:24]:24} {part['wins']:5} {part['ties']:5} {part['losses']:6}  {100 * part['win_rate']:8.2f} "
            f"{error:>5}  {interval:>14}  {part['mean_length_2']:5.0f} : {part['mean_length_1']:5.0f}"
        )
    controlled = figures["length_controlled"]
    if controlled["win_rate"] is None:
        lines.append(f"\nlength-controlled win rate: none, {controlled['reason']}")
    else:
        interval = " to ".join(f"{100 * bound:.1f}" for bound in controlled["interval"])
        lines.append(f"\nlength-controlled win rate: {100 * controlled['win_rate']:.2f} (95 % interval {interval})")
    return "\n".join(lines)
