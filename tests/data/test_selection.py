"""data/selection.py, the rules that a teacher's rows must pass: planted faults are found, right rows stay."""

import json

import pytest
from conftest import ROOT
from test_build import load_script

selection = load_script("selection")


def test_no_row_of_the_project_is_rejected():
    """A rule that rejects right rows leaves an easy, one-sided rest: short answers without code or sums."""
    rows = json.loads((ROOT / "alpaca_data.json").read_text(encoding="utf-8"))
    rejected = [(selection.row_problem(row), row["instruction"]) for row in rows if selection.row_problem(row)]
    assert rejected == []


@pytest.mark.parametrize(
    ("problem", "instruction", "given", "output"),
    [
        ("a sum is wrong", "What do three tickets cost?", "", "3 × $4.50 = $13.00."),
        ("a sum is wrong", "What is a fifth of 60?", "", r"\( \frac{60}{5} \) = 15, and 20% of 60 = 15"),
        ("a sum is wrong", "What is the mean of 4 and 10?", "", "The mean is (4 + 10) / 2 = 8."),
        ("a sum is wrong", "What do both cost?", "", "The total is 3 + 4 = 8."),
        ("a sum is wrong", "What do both cost?", "", "The total\n3 + 4 = 8"),
        ("code that does not parse", "Write a function that doubles.", "", "```python\ndef f(x) return 2 * x\n```"),
        ("code that does not parse", "Give the record as JSON.", "", '```json\n{"a": 1,}\n```'),
        ("code fence without its end", "Show a loop.", "", "```python\nfor i in x: pass"),
        ("none of the labels that were offered", "Classify it as fact or opinion.", "Tea is nice.", "A statement."),
        ("not in the language that was asked for", "Translate it into French.", "Good day", "good day"),
        (
            "not in the language that was asked for", "Translate the line into Spanish.", "Where is the key?",
            "The key is in the drawer that is in the hall.",
        ),
        ("in another script than its task", "What is the capital of France?", "", "法国的首都是巴黎。"),
        ("longer than asked for", "Explain rain in one sentence.", "", "Water rises. It falls again."),
        ("longer than asked for", "Describe tea in at most 3 words.", "", "A hot drink from leaves"),
        ("not as many points as asked for", "List three fruits.", "", "1. Apple\n2. Pear"),
        ("repeats itself", "Describe a river.", "", "It flows to the sea and it never stops at all. " * 4),
        ("speaks as a model", "What is your favourite colour?", "", "As an AI language model, I have none."),
        ("its input is missing", "Summarize the following article.", "", "It is about bees."),
        ("its input is missing", "Give me the number of rows in the table.", "", "There are 2 rows."),
        ("its input is missing", "Rework the product description for a child.", "", "A cup. You drink from it."),
        ("repeats its task", "Write a poem about our baby.", "My name is Alice.", "My name is\nAlice."),
        ("repeats its task", "The child is not happy.", "", "The child is not happy."),
        ("asks for more", "Fill the table with the names.", "", "Sure, I can help. Please provide me with the names."),
        ("asks for more", "Name the film.", "", "I'm sorry, but I don't have enough information to name it."),
        ("asks for a private or a passing fact", "Which type of fruit is this? Banana or apple?", "", "A banana."),
        ("speaks as a model", "How many countries are there?", "", "As of my last update in 2023, there are 195."),
        ("a placeholder stands for text", "Write to a friend.", "", "Dear [Name], I often think of [specific topic]."),
        ("its input holds another task", "Choose the word.", "The dog runs.\n14. Input:\n<noinput>", "The dog."),
        (
            "repeats itself", "List ten fruits.", "",
            "Sure:\n1. Fig\n2. Plum\n3. Kiwi\n4. Lime\n5. Pear\n6. Date\n7. Fig\n8. Nut\n9. Yam\n10. Sloe",
        ),
        ("asks for a private or a passing fact", "What is the name of your school?", "", "Hill School."),
        ("asks for a private or a passing fact", "Which color is this shirt? White or blue?", "", "White."),
        ("repeats itself", "List five herbs.", "", "1. Mint\n2. Sage\n3. Mint\n4. Dill\n5. Mint"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_named(problem, instruction, given, output):
    assert selection.row_problem({"instruction": instruction, "input": given, "output": output}) == problem


@pytest.mark.parametrize(
    "text",
    [
        "2x + 5 = 20, so 2x = 15", "√(3² + 4²) = 5", "84 = 2² × 3 × 7 and 2 × 3² × 7 = 126", "9 V − 2 V = 7 V",
        "365/364 × ... × 343/365 ≈ 0.493", "10 ÷ 3 = 3.33", "7 ÷ 3 = 2 remainder 1", "18% of 50 = 9", "007 + 1 = 8",
        "twice 2 + 3 = 10", "x squared 3 + 4 = 13", "negative 3 + 5 = 2", "log₂ 8 + 1 = 4", "x+ 3 + 4 = 10",
        "a sum of 3 and 4 + 5 = 12", "the log 100 + 1 = 3", "y 2 + 3 = 7", "20 minus 4 + 1 = 15",
    ],
)  # fmt: skip
def test_what_is_no_wrong_sum(text):
    """Parts of a longer term and rounded results."""
    assert selection.wrong_sum(text) is None
