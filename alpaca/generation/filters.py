"""The rules that decide whether one generated task (instruction, input, output) may enter a data set."""

import re
import string
from collections.abc import Sequence

from alpaca.common.errors import UserError
from alpaca.generation.rouge import unicode_tokens

# What a model that reads and writes text cannot serve: things to look at, to listen to, to open, to draw.
BLOCKED_WORDS = (
    "image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot",
    "go to", "video", "audio", "music", "flowchart", "diagram",
)  # fmt: skip
MIN_WORDS, MAX_WORDS = 4, 150
_BLOCKED = re.compile(rf"(?i)\b(?:{'|'.join(BLOCKED_WORDS)})\b")

# Texts that stand in an input field only to say that there is no input. Decoration around them (quotes, brackets,
# backslashes, full stops) is stripped before matching. "NA" counts in capitals only: "Na" may be sodium.
_NO_INPUT = re.compile(
    r"""(?ix:
        (?:there\s+is\s+|(?:this\s+)?(?:task|instruction)\s+(?:needs|requires)\s+)?
        no[\W_]*(?:additional\s+|further\s+|specific\s+|extra\s+)?inputs?
        (?:[\W_]*\d+ |                                     # the next task's number, left over from the reply
           \s+(?:is\s+|was\s+)?(?:required|needed|necessary|provided|given|available))?
        | none(?:\s+(?:required|needed|provided|given))?
        | n\s*/\s*a | n\.\s*a | not\s+applicable | null | nil
    )|NA|na"""
)
_STAND_IN_WORDS = (
    r"image|picture|photo|photograph|drawing|sketch|graph|chart|diagram|poster|meme|logo|gif|screenshot|infographic|video"
    r"|audio|animation|cartoon|illustration|collage|word\s+cloud|presentation|flow\s?chart"
)
_PLACEHOLDER = re.compile(
    rf"""(?ix)
    \W*(?:no\s*(?:in|out)put(?:\s+(?:required|needed|provided|given|available))?|n/a|none|null|nil)\W*$
    | \W*(?:to\s?do|tbd|placeholder|your\s+(?:answer|response|output)(?:\s+here)?)\W*$
    | \s*(?:\.{{3,}}|…)\s*$
    | [\s<\[({{`"']*no\s?(?:in|out)put\s*[>\])}}]                                      # the marker, then an excuse
    | \s*n/a\s*\(
    | \s*[<\[(]\s*(?:insert|your|add|enter|fill)\b [^\n<>\[\]]* [>\])]\s*$            # [Insert chart]
    | \s*[<\[]\s*(?:an?\s+|the\s+)?(?:[\w-]+[ ,]+){{0,4}}(?:{_STAND_IN_WORDS})s?\b  # [Picture of a bus]
        [^\n<>\[\]=]* [>\]]\s*$
    """
)
# Only openings that speak of the task or of being a model: an apology or "I can't believe it" may be the right answer.
_REFUSAL = re.compile(
    r"""(?ix)
    \s*+["'<(\[]*+
    (?P<sorry>(?:(?:i['’]?m|i\s+am)?\s*(?:very\s+|so\s+)?sorry\b|(?:i|my)\s+apolog(?:ies|i[sz]e)\b|unfortunately\b)
        [,.!]?\s*(?:but\s+)?)?
    (?:as\s+an?\s+(?:ai|artificial\s+intelligence|(?:large\s+)?language\s+model|gpt|text[- ]based)\b[^.\n]*
            \b(?:can(?:not|['’]t)|unable|not\s+able|do(?:es)?\s+not|don['’]t|am\s+not)\b
       |(?:i\s+(?:can(?:not|\s+not|['’]t)|won['’]t|will\s+not|am\s+(?:unable|not\s+able)\s+to)
            |i['’]m\s+(?:unable|not\s+able)\s+to|unable\s+to)\s+
            (?:(?:assist|help)\s+(?:you\s+)?with\s+(?:that|this)
               |(?:fulfil?l?|comply\s+with|complete|perform|process|answer|satisfy|execute)\s+
                    (?:this|that|the|your|such)\s+(?:task|request|instruction|question|prompt)
               |(?:provide|generate|create|produce)\s+(?:visual|(?:an?\s+)?(?:image|picture|video|audio))\b)
       |(?:this|the)\s+(?:task|instruction|request)\b
            (?(sorry)|(?=.{0,200}\b(?:gpt|ai|language|the)\s+model\b))       # without an apology it must name the model
            .{0,200}?\b(?:can(?:not|['’]t)|not\s+possible|beyond|unable|does\s+not\s+meet)\b)
    """,
    re.DOTALL,
)
# The header of the next task, alone at the start of a line. Models leave out or replace the "###" before it ("##", "#",
# "///", a code fence, blank lines), so the numbered header itself is the sign.
_NEXT_HEADER = re.compile(
    r"(?im)^[ \t]*+[#*_>]*+[ \t]*+(?:(?:task[ \t]*)?\d+[ \t]*[.):][ \t]*[*_]*instruction[*_]*[ \t]*[*_]*:"
    r"|#{2,}[ \t]*(?:instruction|response)[ \t]*:[ \t]*$)"
)


def find_word_in_string(w: str, s: str) -> re.Match | None:
    """The first whole-word match of `w` in `s`, whatever the case, or None. `w` may be several words."""
    return re.search(rf"\b{re.escape(w)}\b", s, flags=re.IGNORECASE)


def instruction_problem(text: str, any_language: bool = False) -> str | None:
    """Why the original's filters refuse this instruction, or None when it may stay.

    The checks and their order are those of Stanford Alpaca: more than 3 and at most 150 words, no word that asks for
    something other than text, no "Write a program" at the start (GPT-3 then left the language open), no punctuation or
    non-ASCII character at the start. `any_language=True` leaves out the last one and counts the characters of scripts
    written without spaces as words, so that Chinese, Japanese or Thai instructions can pass.
    """
    words = len(unicode_tokens(text) if any_language else text.split())
    if words < MIN_WORDS:
        return f"fewer than {MIN_WORDS} words"
    if words > MAX_WORDS:
        return f"more than {MAX_WORDS} words"
    if blocked := _BLOCKED.search(text):
        return f'asks for more than text: "{blocked[0].lower()}"'
    if text.startswith("Write a program"):
        return 'starts with "Write a program"'
    if text[0] in string.punctuation:
        return "starts with punctuation"
    if not any_language and not text[0].isascii():
        return "starts with a non-ASCII character"
    return None


def check_seeds(instructions: Sequence[str], any_language: bool) -> None:
    """Raises UserError where the filters or the comparison need any_language=True for tasks such as these; prints a
    note where they refuse some of them for another reason."""
    refused = [(text, problem) for text in instructions if (problem := instruction_problem(text, any_language))]
    if not any_language:
        letters = [letter for text in instructions for letter in text if letter.isalpha()]
        foreign = sum(not letter.isascii() for letter in letters)
        mended = [pair for pair in refused if not instruction_problem(pair[0], any_language=True)]
        if 4 * len(mended) > len(instructions) or 10 * foreign > len(letters):
            example = f", such as {mended[0][0][:60]!r} ({mended[0][1]})" if mended else ""
            raise UserError(
                f"the filters refuse {len(mended)} of {len(instructions)} seed instructions{example}, and "
                f"{foreign / len(letters):.0%} of the seeds' letters would not count in the comparison: without "
                "--unicode_dedup True both know ASCII letters alone. Add it."
            )
    if refused:
        print(f"note: the filters refuse {len(refused)} of {len(instructions)} seeds, the first: {refused[0][1]}.")


def is_no_input(text: str) -> bool:
    """True where an input field holds only a way to say that there is no input: "<noinput>", "No Input.", "N/A", ...

    An empty text is not a marker: it is already the right way to say so.
    """
    if len(text) > 100:  # no marker is that long, and texts can be
        return False
    core = re.sub(r"^[\W_]+|[\W_]+$", "", text)
    return _NO_INPUT.fullmatch(core) is not None


def normalize_input(text: str) -> str:
    """The input as it belongs into the data: outer white space removed, a no-input marker turned into ""."""
    return "" if is_no_input(text) else text.strip()


def find_task_header(text: str) -> re.Match | None:
    """The match where a line of `text` begins a new task ("7. Instruction: ..."), or None."""
    return _NEXT_HEADER.search(text)


def contains_task_header(text: str) -> bool:
    """True where `text` holds the beginning of a new task: the row has swallowed the one after it."""
    return find_task_header(text) is not None


def output_problem(instruction: str, output: str) -> str | None:
    """Why this output cannot stay, or None: empty, a stand-in for an answer, a refusal, or a following task inside it.

    "None" or "N/A" alone is an answer, not a stand-in, where the instruction offers that word.
    """
    if not output.strip():
        return "empty output"
    if contains_task_header(output):
        return "contains the next task"
    word = output.strip(" .\n")
    if _PLACEHOLDER.match(output) and not (word and find_word_in_string(word, instruction)):
        return "placeholder output"
    if _REFUSAL.match(output):
        return "refusal"
    return None
