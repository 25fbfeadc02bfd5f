"""Model names, prices and shutdown dates: configs/prices.json and configs/retired_models.json as functions.

generate_instruction.py plans and counts with it; nothing here asks a server:

    python generate_instruction.py --dry_run True --num_instructions_to_generate 52000                 # full scale
    python -c "import model_catalog as m; print(m.find_price(m.DEFAULT_MODEL))"                        # one minute
"""

import dataclasses
import datetime
import re
from collections.abc import Mapping

from alpaca.common.errors import UserError
from alpaca.common.files import jload
from alpaca.common.paths import ROOT

# OpenAI's recommended replacement for its small models (deprecations page, October 2026), at $0.10 and $0.50 per
# million tokens. It thinks before it answers unless told not to; a list of tasks does not need that, and the thoughts
# would be billed and would count towards the length limit.
DEFAULT_MODEL = "gpt-6-luna"
DEFAULT_MODEL_EFFORT = "none"

_CONFIGS = ROOT / "configs"


@dataclasses.dataclass
class Price:
    """US dollars per million tokens."""

    input: float
    output: float
    cached_input: float | None = None
    batch_factor: float = 0.5

    def cost(self, usage: Mapping[str, int], batch: bool = False) -> float:
        """US dollars of one reply's tokens."""
        cached = usage.get("cached", 0)
        cached_price = self.input if self.cached_input is None else self.cached_input
        dollars = (usage["prompt"] - cached) * self.input + cached * cached_price + usage["completion"] * self.output
        return dollars / 1e6 * (self.batch_factor if batch else 1.0)


def price_for(
    model: str, price_input: float | None, price_output: float | None, max_cost_usd: float | None
) -> Price | None:
    """find_price; UserError where a budget is set and the price is unknown, so that it could never be reached."""
    price = find_price(model, price_input, price_output)
    if max_cost_usd is not None and price is None:
        raise UserError(
            f"--max_cost_usd needs the price of {model}, which configs/prices.json does not list. "
            "Give --price_input and --price_output in USD per million tokens."
        )
    return price


def find_price(model: str, price_input: float | None = None, price_output: float | None = None) -> Price | None:
    """The model's price from the flags or configs/prices.json (dated snapshots cost what their family costs)."""
    table = jload(_CONFIGS / "prices.json")
    if (price_input is None) != (price_output is None):
        raise UserError("--price_input and --price_output (USD per million tokens) go together.")
    if price_input is not None:
        return Price(float(price_input), float(price_output), batch_factor=table["batch_factor"])
    known = table["models"].get(model) or table["models"].get(re.sub(r"-\d{4}-\d{2}-\d{2}$", "", model))
    return Price(**known, batch_factor=table["batch_factor"]) if known else None


def check_retired(model: str) -> None:
    """Raises UserError for a model that OpenAI has shut down, warns about one that it will shut down."""
    table = jload(_CONFIGS / "retired_models.json")
    date = next((day for day, names in table.items() if isinstance(names, list) and model in names), None)
    judge_shutdown(model, date)


def judge_shutdown(model: str, date: str | None) -> None:
    if date and date <= datetime.date.today().isoformat():
        raise UserError(
            f"OpenAI shut down {model} on {date}. Use --model_name {DEFAULT_MODEL}, or give --base_url if {model} is "
            "served elsewhere."
        )
    if date:
        print(f"note: OpenAI will shut down {model} on {date}; {DEFAULT_MODEL} is the current small model.")


def estimate_tokens(text: str) -> int:
    """A cautious guess without a tokenizer: English has about four characters a token, other scripts fewer."""
    return len(text.encode("utf-8")) // 4 + 8
