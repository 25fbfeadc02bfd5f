"""What replies cost: the price table configs/prices.json, and the budget of a run."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

from alpaca.common.errors import UserError
from alpaca.common.files import jload
from alpaca.common.paths import ROOT

# OpenAI's recommended replacement for its small models (deprecations page, October 2026), at $0.10 and $0.50 per
# million tokens. It thinks before it answers unless told not to; a list of tasks does not need that, and the thoughts
# would be billed and would count towards the length limit.
DEFAULT_MODEL = "gpt-6-luna"
DEFAULT_MODEL_EFFORT = "none"


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


@functools.cache
def price_table() -> dict[str, Any]:
    """configs/prices.json."""
    return jload(ROOT / "configs" / "prices.json")


def family(model: str) -> str:
    """A model's name without the date of a snapshot."""
    return re.sub(r"-\d{4}-\d{2}-\d{2}$", "", model)


def find_price(model: str, price_input: float | None = None, price_output: float | None = None) -> Price | None:
    """The model's price from the flags or configs/prices.json (dated snapshots cost what their family costs)."""
    table = price_table()
    if (price_input is None) != (price_output is None):
        raise UserError("--price_input and --price_output (USD per million tokens) go together.")
    if price_input is not None:
        return Price(float(price_input), float(price_output), batch_factor=table["batch_factor"])
    known = table["models"].get(model) or table["models"].get(family(model))
    return Price(**known, batch_factor=table["batch_factor"]) if known else None


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


@dataclasses.dataclass
class Budget:
    """US dollars that replies have cost, that requests under way may cost, and that may be spent in all.

    `price` is that of `model`; replies of other models, from earlier runs in the folder, cost what configs/prices.json
    says. All amounts stay 0 where the price is unknown. A server that ignores `max_tokens` sends replies that cost more
    than was reserved for them; later requests reserve as much as the longest reply cost.
    """

    price: Price | None = None
    limit: float | None = None
    spent: float = 0.0
    reserved: float = 0.0
    longest_reply: int = 0  # tokens
    model: str | None = None

    def cost(self, record: Mapping[str, Any]) -> float:
        """US dollars of a journal's reply."""
        model, price = record.get("asked", self.model), self.price  # a proxy's reply names a model of its own
        if model != self.model:
            price = find_price(model) or price
        return price.cost(record["usage"], record.get("batch", False)) if price else 0.0

    def count(self, record: Mapping[str, Any]) -> None:
        """Adds what a journal's record cost, where it is a reply."""
        if self.price and "usage" in record:
            self.spent += self.cost(record)
            self.longest_reply = max(self.longest_reply, record["usage"]["completion"])

    def most(self, prompt: str, max_tokens: int | None, batch: bool = False) -> float:
        """The most that a request is expected to cost."""
        if self.price is None:
            return 0.0
        usage = {"prompt": estimate_tokens(prompt), "completion": max(max_tokens or 0, self.longest_reply)}
        return self.price.cost(usage, batch)

    def affords(self, dollars: float) -> bool:
        """Whether so much can be reserved beside what is spent and reserved already."""
        return self.limit is None or self.spent + self.reserved + dollars <= self.limit


def estimate_tokens(text: str) -> int:
    """A cautious guess without a tokenizer: English has about four characters a token, other scripts fewer."""
    return len(text.encode("utf-8", "replace")) // 4 + 8
