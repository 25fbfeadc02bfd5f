"""The page of a report: the figures and every judged pair, to search and filter, in one self-contained HTML file.

Not a command; `python evaluation.py report` writes it. All texts of models and data are escaped; the page's policy
forbids loading anything, and without JavaScript everything is still there to read.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

from alpaca.answers.win_rate import category_of

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5d6670; --line: #d9dee4; --paper: #ffffff; --card: #f6f8fa;
  --win: #1a7f4b; --tie: #8a6d00; --loss: #b3382c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa4ae; --line: #343b43; --paper: #14171a;
  --card: #1d2126; --win: #4cc38a; --tie: #d9b84a; --loss: #f0816f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 24px; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 0 0 4px; overflow-wrap: anywhere; }
p.note { color: var(--soft); margin: 4px 0 16px; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 12px; margin: 16px 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 16px; }
.card b { display: block; font-size: 24px; }
.card span { color: var(--soft); font-size: 13px; }
.bar { display: flex; height: 14px; border-radius: 7px; overflow: hidden; margin: 8px 0 20px; }
.bar div:nth-child(1), .dot.win { background: var(--win); }
.bar div:nth-child(2), .dot.tie { background: var(--tie); }
.bar div:nth-child(3), .dot.loss { background: var(--loss); }
table { border-collapse: collapse; width: 100%; margin-bottom: 20px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 10px; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
.filters { position: sticky; top: 0; background: var(--paper); padding: 10px 0; display: flex; flex-wrap: wrap;
  gap: 10px; border-bottom: 1px solid var(--line); align-items: center; }
.filters input { flex: 1 1 260px; }
.filters input, .filters select { font: inherit; padding: 6px 10px; border: 1px solid var(--line); border-radius: 6px;
  background: var(--card); color: var(--ink); }
article { border: 1px solid var(--line); border-radius: 8px; margin: 14px 0; padding: 12px 16px; }
article h2 { font-size: 15px; font-weight: 600; margin: 0 0 8px; white-space: pre-wrap; overflow-wrap: anywhere; }
.meta { color: var(--soft); font-size: 13px; margin-bottom: 6px; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 6px; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; }
@media (max-width: 760px) { .sides { grid-template-columns: 1fr; } }
.side { background: var(--card); border-radius: 6px; padding: 8px 12px; min-width: 0;
  border-top: 3px solid transparent; }
.side.better { border-top-color: var(--win); }
.side h3 { font-size: 12px; color: var(--soft); margin: 0 0 4px; font-weight: 600; overflow-wrap: anywhere; }
pre { font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; max-height: 420px; overflow-y: auto; }
.input { border-left: 3px solid var(--line); padding-left: 10px; margin-bottom: 10px; color: var(--soft); }
[hidden] { display: none !important; }
"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

SCRIPT = """
const search = document.getElementById('search'), outcome = document.getElementById('outcome');
const category = document.getElementById('category'), shown = document.getElementById('shown');
const pairs = [...document.querySelectorAll('article')].map(node => [node, node.textContent.toLowerCase()]);
function filter() {
  const words = search.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let count = 0;
  for (const [node, text] of pairs) {
    const fits = words.every(word => text.includes(word)) && (!outcome.value || node.dataset.outcome === outcome.value)
      && (!category.value || node.dataset.category === category.value);
    node.hidden = !fits;
    count += fits;
  }
  shown.textContent = count + ' of ' + pairs.length + ' pairs';
}
for (const control of [search, outcome, category]) control.addEventListener('input', filter);
filter();
"""


def report_page(figures: dict[str, Any], annotations: Sequence[dict], judge: dict[str, Any] | None = None) -> str:
    """The whole page as HTML text. `judge`: what `evaluation.py judge` said about its run, where it is known."""
    first, second = (escape(str(figures[key])) for key in ("generator_1", "generator_2"))
    options = "".join(f"<option>{escape(name)}</option>" for name in figures["categories"])
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{second} against {first}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{second} against {first}</h1>
<p class="note">{_judge_note(judge)}</p>
{_cards(figures)}
{_category_table(figures)}
<div class="filters">
<input id="search" type="search" placeholder="Search tasks and answers" aria-label="Search tasks and answers">
<select id="outcome" aria-label="Outcome"><option value="">all outcomes</option>
<option value="win">{second} better</option><option value="tie">ties</option>
<option value="loss">{first} better</option></select>
<select id="category" aria-label="Category"><option value="">all categories</option>{options}</select>
<span id="shown">{len(annotations)} pairs</span>
</div>
{"".join(_pair(number, row) for number, row in enumerate(annotations, start=1))}
<script>{SCRIPT}</script>
</body>
</html>
"""


def _judge_note(judge: dict[str, Any] | None) -> str:
    if not judge:
        return "Preferences as found in the annotations file."
    rule = "the probabilities of its verdicts are averaged" if judge.get("soft") else "disagreement is a tie"
    return escape(
        f"Judge {judge['judge']}, prompt {judge['prompt_version']}, {judge['date']}. Each pair was asked in both "
        f"orders; {rule}. Pairs without a verdict, not counted: {judge['failures']}."
    )


def _percent(rate: float | None) -> str:
    return "–" if rate is None else f"{100 * rate:.1f} %"


def _interval(bounds: Sequence[float] | None) -> str:
    return "–" if bounds is None else f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}"


def _cards(figures: dict[str, Any]) -> str:
    controlled = figures["length_controlled"]
    error = "" if figures["standard_error"] is None else f"± {100 * figures['standard_error']:.1f} (SE), "
    cards = [
        (_percent(figures["win_rate"]), f"win rate, {error}95 % {_interval(figures['interval'])}"),
        (
            _percent(controlled["win_rate"]),
            "length-controlled win rate, "
            + (f"95 % {_interval(controlled['interval'])}" if "interval" in controlled else controlled["reason"]),
        ),
        (f"{figures['wins']} : {figures['ties']} : {figures['losses']}", "wins : ties : losses"),
        (
            f"{figures['mean_length_2']:.0f} : {figures['mean_length_1']:.0f}",
            "mean length in characters, this model : the other",
        ),
    ]
    shares = "".join(
        f'<div style="flex:{figures[key]}" title="{figures[key]} {key}"></div>' for key in ("wins", "ties", "losses")
    )
    inner = "".join(f'<div class="card"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in cards)
    return f'<div class="cards">{inner}</div>\n<div class="bar">{shares}</div>'


def _category_table(figures: dict[str, Any]) -> str:
    if len(figures["categories"]) < 2:
        return ""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{part['pairs']}</td><td>{part['wins']}</td><td>{part['ties']}</td>"
        f"<td>{part['losses']}</td><td>{_percent(part['win_rate'])}</td><td>{_interval(part['interval'])}</td>"
        f"<td>{part['mean_length_2']:.0f} : {part['mean_length_1']:.0f}</td></tr>"
        for name, part in figures["categories"].items()
    )
    head = "category pairs wins ties losses".split() + ["win rate", "95 % interval", "mean length"]
    head = "".join(f"<th>{title}</th>" for title in head)
    opened = " open" if len(figures["categories"]) <= 15 else ""
    return f"<details{opened}><summary>By category</summary><table><tr>{head}</tr>{rows}</table></details>"


def _pair(number: int, row: dict[str, Any]) -> str:
    outcome = "win" if row["win"] > 0.5 else "loss" if row["win"] < 0.5 else "tie"
    category = category_of(row) or "(none)"
    verdict = {"win": f"{row['generator_2']} better", "loss": f"{row['generator_1']} better", "tie": "tie"}[outcome]
    verdicts = row.get("verdicts")
    if outcome == "tie" and verdicts and verdicts[0] != verdicts[1]:
        verdict += ", the two orders disagree"
    elif row["win"] not in (0, 0.5, 1):
        verdict += f", preference {1 + row['win']:.3g}"
    given = f'<pre class="input">{escape(row["input"])}</pre>' if row.get("input") else ""
    sides = "".join(_side(row, side, better=outcome == winner) for side, winner in ((1, "loss"), (2, "win")))
    return f"""<article data-outcome="{outcome}" data-category="{escape(category)}">
<div class="meta"><span class="dot {outcome}"></span>{number} · {escape(category)} · {escape(verdict)}</div>
<h2>{escape(row["instruction"])}</h2>{given}
<div class="sides">{sides}</div>
</article>
"""


def _side(row: dict[str, Any], side: int, better: bool) -> str:
    name, text = escape(str(row[f"generator_{side}"])), row[f"output_{side}"]
    return (
        f'<div class="side{" better" if better else ""}"><h3>{name} · {len(text)} characters</h3>'
        f"<pre>{escape(text.strip()) or '(empty)'}</pre></div>"
    )
