"""Wins, ties, losses and win rates from pairwise preferences, with standard error, bootstrap and control of length.

    figures = summarise(load_annotations("annotations.json"))

The format and the plain win rate are those of AlpacaEval (github.com/tatsu-lab/alpaca_eval): preference 1 is a win of
output_1, 2 of output_2, 1.5 or 0 a draw, fractions in between are soft, null is a failed judgement and counts nowhere.
Every rate is generator_2's.
"""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from alpaca.answers.pairs import category_of, task_key
from alpaca.common.errors import UserError
from alpaca.common.files import read_text
from alpaca.common.tasks import read_rows

LENGTH_PENALTY = 100.0  # scikit-learn's C for the length coefficient: large, so that it only tames separable data
LENGTH_RESAMPLES = 500  # each is a regression
FOLDS = 5  # AlpacaEval's, of the fit of the length-controlled rate


# ----------------------------------------------------------------------------------------------------------------------
# Reading annotations.


def load_annotations(path: str | Path, generator_1: str | None = None, generator_2: str | None = None) -> list[dict]:
    """Rows of an annotations file (JSON list or JSONL), or of a folder that `evaluation.py judge` wrote.

    Each row gets `win`, the probability in [0, 1] that output_2 is the better one, or None where the preference is
    null; and `index`, its number from 0, where it has none. `generator_1` and `generator_2` choose rows where a file
    holds several pairs of models. Raises UserError naming the rows that cannot be read, where the rows compare more
    than one pair of models, and where no row has a preference.
    """
    path = Path(path) / "annotations.json" if Path(path).is_dir() else Path(path)
    rows, problems, annotations = read_rows(path), [], []
    for number, row in enumerate(rows, start=1):
        if problem := _problem_of(row):
            problems.append(f"  row {number}: {problem}")
            continue
        row = {"generator_1": "output_1", "generator_2": "output_2", **row}
        if generator_1 in (None, row["generator_1"]) and generator_2 in (None, row["generator_2"]):
            annotations.append({"index": len(annotations), **row, "win": _win(row["preference"])})
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
    if all(row["win"] is None for row in annotations):
        raise UserError(f"{path}: all {len(annotations)} preferences are null, so no pair was judged. Judge again.")
    return annotations


def _problem_of(row: Any) -> str | None:
    if not isinstance(row, dict):
        return f"expected an object, found {type(row).__name__}"
    for field in ("instruction", "output_1", "output_2"):
        if not isinstance(row.get(field), str):
            hint = " (an answer file? First run evaluation.py judge)" if "preference" not in row else ""
            return f"{field!r} must be a string, found {row.get(field)!r:.40}{hint}"
    if "preference" not in row:
        return "'preference' is missing (null where the judge failed)"
    value = row["preference"]
    if value is None or type(value) in (int, float) and (value == 0 or math.isnan(value) or 1 <= value <= 2):
        return None
    return f"'preference' must be null, 0 or from 1 to 2, found {value!r:.40}"


def _win(preference: float | None) -> float | None:
    if preference is None or math.isnan(preference):
        return None
    return preference - 1 if preference else 0.5


def with_categories(annotations: Sequence[dict], tasks: Sequence[dict]) -> list[dict]:
    """Annotations with the category of the task that has the same instruction (spacing aside) and, if known, input."""
    by_task, by_instruction = {}, {}
    for task in tasks:
        by_task[task_key(task)] = by_instruction[task_key(task)[0]] = category_of(task)
    found = []
    for row in annotations:
        key = task_key(row)
        category = by_task.get(key) or by_instruction.get(key[0]) or category_of(row)
        found.append({**row, "category": category} if category else row)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Figures.


def summarise(
    annotations: Sequence[dict], resamples: int = 10_000, seed: int = 0, difficulty_path: str | None = None
) -> dict[str, Any]:
    """All figures of generator_2 against generator_1, over all judged pairs and per category.

    Rates are fractions of 1; `interval` is the 95 % percentile bootstrap over prompts; lengths are in characters;
    `dropped` counts the pairs without a preference. With `difficulty_path` (see `read_difficulty`) there is
    AlpacaEval's `length_controlled` rate, else this project's `length_adjusted` one.
    """
    judged = [row for row in annotations if row["win"] is not None]
    categories: dict[str, list[dict]] = {}
    for row in judged:
        categories.setdefault(category_of(row) or "(none)", []).append(row)
    if difficulty_path:
        by_length = {"length_controlled": length_controlled(annotations, *read_difficulty(difficulty_path))}
    else:
        by_length = {"length_adjusted": length_adjusted(judged, min(resamples, LENGTH_RESAMPLES), seed)}
    return {
        "generator_1": annotations[0]["generator_1"],
        "generator_2": annotations[0]["generator_2"],
        **_figures(judged, resamples, seed),
        "dropped": len(annotations) - len(judged),
        **by_length,
        "bootstrap": {"resamples": resamples, "seed": seed, "level": 0.95, "unit": "prompt"},
        "categories": {name: _figures(rows, resamples, seed) for name, rows in sorted(categories.items())},
    }


def _figures(rows: Sequence[dict], resamples: int, seed: int) -> dict[str, Any]:
    wins = np.array([row["win"] for row in rows])
    lengths = np.array([[len(row["output_1"]), len(row["output_2"])] for row in rows])
    groups = prompt_groups(rows)
    return {
        "pairs": len(rows),
        "wins": int((wins > 0.5).sum()),
        "ties": int((wins == 0.5).sum()),
        "losses": int((wins < 0.5).sum()),
        "win_rate": float(wins.mean()),
        "standard_error": float(scipy.stats.sem(wins)) if len(wins) > 1 else None,
        "interval": bootstrap_interval(
            (np.bincount(groups, wins), np.bincount(groups)),
            lambda sums, sizes, axis: sums.sum(axis) / sizes.sum(axis),
            resamples,
            seed,
        ),
        "mean_length_1": float(lengths[:, 0].mean()),
        "mean_length_2": float(lengths[:, 1].mean()),
    }


def prompt_groups(rows: Sequence[dict]) -> np.ndarray:
    """The prompt's number of each row, int array of shape (rows,): rows of one prompt are drawn together."""
    numbers: dict[tuple, int] = {}
    return np.array([numbers.setdefault((row["instruction"], row.get("input") or ""), len(numbers)) for row in rows])


def bootstrap_interval(data: tuple[np.ndarray, ...], statistic, resamples: int, seed: int) -> list[float] | None:
    """95 % percentile interval of `statistic` when entries of `data` (arrays, one entry a prompt) are drawn together,
    with replacement; None where there is one prompt alone."""
    if len(data[0]) < 2:
        return None
    found = scipy.stats.bootstrap(
        data, statistic, n_resamples=resamples, paired=True, method="percentile", rng=seed, batch=500
    )
    return [float(bound) for bound in found.confidence_interval]


def far_from_raw(raw: float, adjusted: float) -> bool:
    """Whether an adjusted rate moved so far that AlpacaEval doubts its model: by more than a tenth and more than a
    quarter of the way to 0 or to 1."""
    return adjusted < min(0.75 * raw, raw - 0.1) or adjusted > max(raw + 0.25 * (1 - raw), raw + 0.1)


# ----------------------------------------------------------------------------------------------------------------------
# Length-adjusted: for any task set.


def length_adjusted(annotations: Sequence[dict], resamples: int = LENGTH_RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """The win rate that generator_2 would have if its answers were as long as generator_1's.

    logit P(output_2 wins) = theta + phi * tanh(d / sd(d)), d the difference of the lengths in characters; the rate is
    the model's at d = 0. Soft preferences count as a win and a loss with their weights. This is the model of Dubois et
    al. 2024 (arXiv 2404.04475) without its instruction difficulty, and so not AlpacaEval's figure: where a model's
    answers are all much shorter, length and quality cannot be told apart, and the rate is far too kind. Only phi is
    regularised (L2, C = 100), so that without an effect of length the result is the plain win rate.

    Returns `win_rate`, `interval` (95 %, bootstrap over prompts), `theta`, `phi`; or win_rate None and a `reason`.
    """
    wins = np.array([row["win"] for row in annotations])
    difference = np.array([len(row["output_2"]) - len(row["output_1"]) for row in annotations], dtype=float)
    spread = difference.std(ddof=1) if len(wins) > 1 else 0.0
    if spread == 0 and difference.any():
        return {"win_rate": None, "reason": "every pair differs in length by the same amount"}
    feature = np.tanh(difference / spread) if spread else difference
    groups = prompt_groups(annotations)

    def rate_of(prompts: np.ndarray) -> float:
        return _logistic(_fit(feature, wins, np.bincount(prompts, minlength=groups.max() + 1)[groups])[0])

    theta, phi = _fit(feature, wins, np.ones_like(wins))
    return {
        "win_rate": _logistic(theta),
        "interval": bootstrap_interval((np.arange(groups.max() + 1),), rate_of, resamples, seed),
        "theta": theta if math.isfinite(theta) else None,
        "phi": phi,
        "resamples": resamples,
    }


def _fit(feature: np.ndarray, wins: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """(theta, phi) of the weighted logistic regression of `wins` on `feature`; theta may be infinite."""
    drawn = weights > 0
    if np.ptp(wins[drawn]) == 0 or np.ptp(feature[drawn]) == 0:
        # Nothing for phi to explain: theta alone gives the mean, which may be 0 or 1.
        mean = float(np.average(wins, weights=weights))
        return (math.log(mean / (1 - mean)) if 0 < mean < 1 else math.copysign(math.inf, mean - 0.5)), 0.0
    model = LogisticRegression(C=LENGTH_PENALTY, solver="newton-cholesky", tol=1e-8)
    model.fit(
        np.concatenate([feature, feature])[:, None],
        np.repeat([1, 0], len(wins)),
        sample_weight=np.concatenate([weights * wins, weights * (1 - wins)]),
    )
    return float(model.intercept_[0]), float(model.coef_[0, 0])


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


# ----------------------------------------------------------------------------------------------------------------------
# Length-controlled: AlpacaEval 2's figure, for task sets whose difficulty was measured.


def read_difficulty(path: str | Path) -> tuple[dict[int, float], np.ndarray]:
    """AlpacaEval's df_gamed.csv: ({index of an instruction: its difficulty}, the gamed rows).

    The columns index and instruction_difficulty are needed. The gamed rows are the judged answers of two models that
    differ from the baseline in length alone: array of shape (rows, 3) of std_delta_len, instruction_difficulty and
    preference in [0, 1], empty where the file has no such columns. Rows without a preference are left out. Raises
    UserError naming the column or line that cannot be read.
    """
    difficulty, gamed = {}, []
    reader = csv.DictReader(io.StringIO(read_text(path)))
    if missing := {"index", "instruction_difficulty"} - set(reader.fieldnames or ()):
        raise UserError(
            f"{path} has no column {' and no column '.join(sorted(missing))}; AlpacaEval's df_gamed.csv has."
        )
    for row in reader:
        try:
            value = float(row["instruction_difficulty"])
            difficulty.setdefault(int(row["index"]), value)
            if row.get("preference") and row.get("std_delta_len"):
                gamed.append((float(row["std_delta_len"]), value, float(row["preference"])))
        except ValueError as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}") from error
    return difficulty, np.array(gamed).reshape(-1, 3)


def length_controlled(annotations: Sequence[dict], difficulty: dict[int, float], gamed: np.ndarray) -> dict[str, Any]:
    """AlpacaEval 2's length-controlled win rate (Dubois et al. 2024, arXiv 2404.04475), as its own code fits it.

    logit P(output_2 wins) = a * tanh(d / sd(d)) + b * difficulty + c, d the length of output_1 less output_2's in
    characters; the rate is the mean of the model at d = 0 over all `annotations`, those without a preference among
    them. The fit: L1, liblinear, no intercept, C of ten from 1e-4 to 1e4 by the log loss of five folds. The `gamed`
    rows, which have no c, take part with a weight of 0.1 each and keep `a` from explaining the quality.

    Returns `win_rate`, `standard_error` and the `weights`. Raises UserError where an instruction has no difficulty, and
    for fewer rows than folds.
    """
    if missing := [row["index"] for row in annotations if row["index"] not in difficulty]:
        raise UserError(
            f"--instruction_difficulty has no row for the instructions with index {', '.join(map(str, missing[:5]))}"
            f"{', ...' if len(missing) > 5 else ''}. It holds AlpacaEval's 805 instructions: the rate needs answers to "
            "those, in their order. Leave the flag out for other task sets."
        )
    delta = np.array([len(row["output_1"]) - len(row["output_2"]) for row in annotations], dtype=float)
    hardness = np.array([difficulty[row["index"]] for row in annotations])
    wins = np.array([math.nan if row["win"] is None else row["win"] for row in annotations])
    spread = delta.std(ddof=1) if len(delta) > 1 else 0.0
    own = np.column_stack([np.tanh(delta / (spread or 1.0)), hardness, np.ones_like(hardness)])[~np.isnan(wins)]
    features = np.concatenate([np.column_stack([np.tanh(gamed[:, 0]), gamed[:, 1], np.zeros(len(gamed))]), own])
    if len(features) < FOLDS:
        raise UserError(
            f"the rate that --instruction_difficulty asks for is fitted in {FOLDS} parts, and there are "
            f"{len(features)} judged answers. Leave the flag out for so few."
        )
    model = _fit_with_best_penalty(
        features, np.concatenate([gamed[:, 2], wins[~np.isnan(wins)]]), np.repeat([0.1, 1.0], [len(gamed), len(own)])
    )
    at_equal_length = np.column_stack([np.zeros_like(hardness), hardness, np.ones_like(hardness)])
    predicted = model.predict_proba(at_equal_length)[:, 1]
    return {
        "win_rate": float(predicted.mean()),
        "standard_error": float(scipy.stats.sem(predicted)) if len(predicted) > 1 else None,
        "weights": dict(zip(("length", "instruction_difficulty", "model"), map(float, model.coef_[0]), strict=True)),
    }


def _fit_with_best_penalty(features: np.ndarray, wins: np.ndarray, weights: np.ndarray) -> LogisticRegression:
    """The regression of `wins` (in [0, 1]) on `features` of shape (rows, n), its L1 penalty chosen by five folds."""
    rows = np.tile(np.arange(len(wins)), 2)  # each row once as a win and once as a loss, weighted by its preference
    labels = np.repeat([1, 0], len(wins))
    shares = np.where(labels, wins[rows], 1 - wins[rows]) * weights[rows]

    def fit(penalty: float, part: np.ndarray) -> LogisticRegression:
        model = LogisticRegression(C=penalty, l1_ratio=1.0, solver="liblinear", fit_intercept=False, random_state=123)
        return model.fit(features[rows[part]], labels[part], sample_weight=shares[part])

    def log_likelihood(model: LogisticRegression, part: np.ndarray) -> float:
        chance = np.clip(model.predict_proba(features[rows[part]])[:, 1], 1e-15, 1 - 1e-15)
        preference = wins[rows[part]]
        return np.mean(weights[rows[part]] * (preference * np.log(chance) + (1 - preference) * np.log(1 - chance)))

    folds = list(GroupKFold(n_splits=FOLDS).split(rows, groups=rows))
    penalties = np.logspace(-4, 4, 10)
    scores = [np.mean([log_likelihood(fit(penalty, train), test) for train, test in folds]) for penalty in penalties]
    return fit(penalties[int(np.argmax(scores))], np.arange(len(rows)))


# ----------------------------------------------------------------------------------------------------------------------
# A table for the terminal.


def by_length(figures: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """("length-controlled win rate" or "length-adjusted win rate", its figures)."""
    name = "length_controlled" if "length_controlled" in figures else "length_adjusted"
    return f"{name.replace('_', '-')} win rate", figures[name]


def table(figures: dict[str, Any]) -> str:
    """The figures as text, rates in percent."""
    dropped = f" ({figures['dropped']} more have no preference and are not counted)" if figures["dropped"] else ""
    lines = [f"{figures['generator_2']} against {figures['generator_1']}, {figures['pairs']} pairs{dropped}", ""]
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
    title, adjusted = by_length(figures)
    if adjusted["win_rate"] is None:
        return "\n".join([*lines, f"\n{title}: none, {adjusted['reason']}"])
    lines.append(f"\n{title}: {100 * adjusted['win_rate']:.2f}")
    if adjusted.get("interval"):
        lines[-1] += f" (95 % interval {' to '.join(f'{100 * bound:.1f}' for bound in adjusted['interval'])})"
    if adjusted.get("standard_error"):
        lines[-1] += f" ± {100 * adjusted['standard_error']:.2f}"
    if title.startswith("length-adjusted"):
        lines.append("It is not AlpacaEval's length-controlled rate, which takes --instruction_difficulty FILE.")
    if far_from_raw(figures["win_rate"], adjusted["win_rate"]):
        lines.append(
            f"warning: it is far from the plain win rate of {100 * figures['win_rate']:.2f}; the answers' lengths may "
            "explain the verdicts too well for this correction to hold."
        )
    return "\n".join(lines)
