"""Rules that keep or reject one generated row, on what can be told from its text alone.

    python data/build.py                                              # applies them to a teacher's run
    python -c "import sys; sys.path.insert(0, 'data'); import selection; print(selection.wrong_sum('2 + 2 = 5'))"

`row_problem` names the first rule that a row breaks. A row without a fault by these rules may still be wrong.
"""

import ast
import json
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence

FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+#-]*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
NUMBER_WORDS = {
    "single": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12,
}  # fmt: skip
COUNT = rf"(\d+|{'|'.join(NUMBER_WORDS)})"


def row_problem(row: Mapping[str, str]) -> str | None:
    """Why a row of instruction, input and output is not kept, or None."""
    instruction, given, output = row["instruction"], row["input"], row["output"]
    checks = (
        speaks_as_a_model(output),
        asks_back(output),
        echo(instruction, given, output),
        placeholder(instruction, output),
        input_problem(instruction, given),
        asks_the_reader(instruction, given),
        loop(instruction, output),
        code_problem(output),
        wrong_sum(FENCE.sub("", output)),
        label_problem(instruction, output),
        language_problem(instruction, given, output),
        length_problem(instruction, output),
    )
    return next((problem for problem in checks if problem), None)


def speaks_as_a_model(output: str) -> str | None:
    spoken = re.search(
        r"(?i)\b(?:as|I am|I'm) an? (?:\w+ )?(?:AI|artificial intelligence|language model|chatbot)\b(?!-)|"
        r"\bmy (?:training data|knowledge cutoff|last (?:update|training))\b|\bcreated by Alibaba\b|"
        r"\bI(?:'m| am) Qwen\b",
        output,
    )
    return "speaks as a model" if spoken else None


_ASKS_BACK = re.compile(
    r"(?i)^(?:sure|certainly|of course|(?:i'm |i am )?sorry|unfortunately|i (?:need|don't|do not)|please|could you|"
    r"to \w+ (?:the|this|your|you))\b[^\n]{0,160}?\b(?:provide me|please provide|provide more|share|specify|"
    r"(?:more|enough|further|additional) (?:\w+ )?(?:information|context|details?))\b"
)


def asks_back(output: str) -> str | None:
    """An answer that begins by asking for what the task should have held. The task cannot be answered, or was not."""
    return "asks for more" if _ASKS_BACK.search(output) and len(output.split()) < 80 else None


def echo(instruction: str, given: str, output: str) -> str | None:
    """The task's own text as its answer, where it did not ask for a text that may be right as it is."""
    if re.search(r"(?i)\b(?:correct|proofread|fix|edit|check|sort|order|format|repeat|print|copy|return)", instruction):
        return None
    answer, *task = (" ".join(text.split()) for text in (output, given, instruction))
    return "repeats its task" if answer in task else None


def placeholder(instruction: str, output: str) -> str | None:
    """A text with "[specific topic]" where its matter should stand. A plain "[name]" or "[date]" may be left open."""
    if re.search(r"(?i)\b(?:template|form|placeholders?|fill|brackets?)\b", instruction):
        return None
    found = re.search(
        r"(?i)(?<!\w)\[(?:insert|specific|topic|subject|describe|mention|details?|example)\b[^\]\n]{0,60}\](?!\()",
        output,
    )
    return "a placeholder stands for text" if found else None


# ----------------------------------------------------------------------------------------------------------------------
# What a task speaks of.

_MATERIAL = (
    r"(?:text|sentences?|paragraph|passage|article|code|function|snippet|list|numbers|table|data|email|message|letter|"
    r"poem|story|review|conversation|dialogue|recipe|quote|statements?|words|query|json|csv|items|document|report)"
)
_POINTS_AT_MATERIAL = re.compile(
    rf"(?i)\bthe following\b|\bthe (?:given|provided) {_MATERIAL}\b|\bth(?:is|ese) {_MATERIAL}\b|"
    rf"\b{_MATERIAL} (?:given |shown |provided )?(?:below|above)\b(?! \d)|"
    r"^(?!.*\b(?:query|sql|css|html)\b).*\b(?:(?:in|of|from) the (?:table|document|passage|chart)|"
    r"the product description)\b"
)


def input_problem(instruction: str, given: str) -> str | None:
    """Where an instruction points at a text that is neither in the input nor in the instruction itself, or the input
    goes on into another task."""
    if re.search(r"(?im)^\s*\d+\.\s*(?:instruction|input|output):", given):
        return "its input holds another task"
    pointed = None if given else _POINTS_AT_MATERIAL.search(instruction)
    # Material inside the instruction stands behind a colon or a dash, in quotation marks, in brackets, or is a number.
    own = re.search(r"[:–-]\s*\S|[\"“'‘`\[{(]\S|\d", instruction[pointed.end() :]) if pointed else None
    return "its input is missing" if pointed and not own else None


_QUESTION = r"^(?:(?:can|could) you tell me|what|which|who|where|when|how|do|does|did|are|is|have|has)\b"
_LIFE = (
    r"(?:name|age|country|city|town|home|house|family|friends?|parents|phone|job|car|school|class|teacher|boss|"
    r"(?:living |bed|class)?room|kitchen|fridge|refrigerator|drawer|closet|desk|day|birthday|hobby|hobbies|pet|dog|cat|"
    r"grocery list|favou?rite|neighbou?rhood|area|opinion)"
)
_ASKS_THE_READER = re.compile(
    rf"(?i){_QUESTION}[^.?]*\byour (?:\w+ )?{_LIFE}\b[^.]*\?$|"
    rf"{_QUESTION}[^.?]*\b(?:do|did|are|were|have) you (?:like|have|own|live|prefer|born|going|wear|doing|usually)\b"
)
_HERE_AND_NOW = re.compile(
    rf"(?i){_QUESTION}[^.?:\"]*\b(?:in|on|of|is|are|does|do) (?:this|these) (?!two|three|year|month|week|century|case)"
    rf"[a-z]+\b[^.:\"]*\?$|{_QUESTION}[^.?:\"]*\bis this\?|{_QUESTION}[^.?:\"]*\b(?:today|right now|at the moment)\?$"
)


def asks_the_reader(instruction: str, given: str) -> str | None:
    """A question about the life of the one who answers, about a thing that nobody sees, or about today."""
    if given or not (_ASKS_THE_READER.search(instruction) or _HERE_AND_NOW.search(instruction)):
        return None
    return "asks for a private or a passing fact"


# ----------------------------------------------------------------------------------------------------------------------
# Loops.


def loop(instruction: str, output: str) -> str | None:
    """Text that goes round: a line four times, a run of eight words three times, one word six times on end, a list
    whose points come again."""
    if re.search(r"(?i)\b(?:poem|song|lyrics|chorus|rap|chant|villanelle|repeat\w*)\b", instruction):
        return None
    lines = [line.strip().lower() for line in output.splitlines() if not line.strip().startswith("|")]
    words = " ".join(lines).split()
    repeats = (
        max(Counter(line for line in lines if len(line.split()) >= 3).values(), default=0) >= 4
        or max(Counter(tuple(words[i : i + 8]) for i in range(len(words) - 7)).values(), default=0) >= 3
        or re.search(r"(?i)\b([a-z]+)(?:\W+\1\b){5}", output)
        or (
            re.match(r"(?i)(?:please )?(?:list|name|give|suggest|write a list|create a list|provide)\b", instruction)
            and _repeated_points(lines)
        )
    )
    return "repeats itself" if repeats else None


def _repeated_points(lines: Sequence[str]) -> bool:
    """Whether a list of five points or more has a fifth of its points twice, or a numbered one a tenth."""
    points = [found[1] for line in lines if (found := re.fullmatch(r"(?:\d+[.)]|[-*•])\s+(.{3,})", line))]
    numbered = not any(line.startswith(("-", "*", "•")) for line in lines)
    return len(points) >= 5 and (10 if numbered else 5) * (len(points) - len(set(points))) >= len(points)


# ----------------------------------------------------------------------------------------------------------------------
# Code.


def code_problem(output: str) -> str | None:
    if output.count("```") % 2:
        return "code fence without its end"
    for language, source in FENCE.findall(output):
        try:
            if language.lower() in ("python", "py", "python3"):
                ast.parse(textwrap.dedent(re.sub(r"(?m)^(?:>>>|\.\.\.) ?", "", source)))
            elif language.lower() == "json":
                json.loads(source)
        except (SyntaxError, ValueError):
            return "code that does not parse"
    # Code without a fence: its first block counts, since prose may follow.
    if re.match(r"(?:def|class) \w+.*:$|from \w+ import|import \w+$", output, re.MULTILINE):
        try:
            ast.parse(output.split("\n\n")[0])
        except SyntaxError:
            return "code that does not parse"
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Sums.

# Possessive repetitions (*+, ++): a long chain of terms without a result behind it is given up at once.
_NUMERAL = r"[-−]?[$€£]?\d[\d,]*+(?:\.\d++)?%?"
_TERM = rf"\(*+[ \t]*+{_NUMERAL}[ \t]*+\)*+"
_SUM = re.compile(rf"({_TERM}(?:[ \t]*+[-+*/×÷−x][ \t]*+{_TERM})++)[ \t]*([=≈])[ \t]*({_NUMERAL})")
_LATEX = ((r"\\times|\\cdot", "×"), (r"\\div", "÷"), (r"\\d?frac\{([^{}]*)\}\{([^{}]*)\}", r"(\1)/(\2)"),
          (r"\\approx", "≈"), (r"\\[()\[\],;]|\\text\{[^{}]*\}", " "))  # fmt: skip


def wrong_sum(text: str) -> str | None:
    """A sum such as "4 × 2.35 = 9.40" or "20% of 50 = 10" whose sides differ by more than rounding explains."""
    for pattern, plain in _LATEX:
        text = re.sub(pattern, plain, text)
    text = re.sub(rf"({_NUMERAL})[ \t]+of[ \t]+({_NUMERAL})(?=[ \t]*=)", r"\1 × \2", text)
    for found in _SUM.finditer(text):
        # A part of a longer term says nothing: "2x + 5 = 20", "√4 + 5 = 7", "... × 41 = 9", "8 = 2(x + 1)".
        if _goes_on(text[: found.end(1) - len(found[1].lstrip())]):
            continue
        if re.match(r"[\w^²³!]|\.\d|\s*[-+*/×÷−(]\s*[\w(]|\s*[:√]\s*\d", text[found.end() :]):
            continue
        left, right = _value(found[1]), _value(found[3])
        if left is None or right is None:
            continue
        decimals = len(found[3].partition(".")[2].rstrip("%"))
        rounding = 0.6 * 10**-decimals * (0.01 if "%" in found[3] else 1)
        exact = left.is_integer() and found[2] == "=" and "%" not in found[0]
        if abs(left - right) > (1e-9 if exact else rounding + (0.01 * abs(right) if found[2] == "≈" else 1e-9)):
            return "a sum is wrong"
    return None


_WORDS_BEFORE = "is are be was so then get gets gives makes have has pays costs total therefore thus that".split()


def _goes_on(before: str) -> bool:
    """Whether a sum goes on from the text before it. Most words may say so: "twice 2 + 3", "the log 100 + 1"."""
    if re.search(r"[\w.]\Z|(?:[+*/×÷−=(^√,²³…-]|\.\.)\s*\Z", before):
        return True
    word = re.search(r"(\w+)[ \t]+\Z", before)
    return bool(word) and word[1].lower() not in _WORDS_BEFORE


def _value(side: str) -> float | None:
    """What an arithmetic expression comes to; None where it is none."""
    plain = re.sub(r"[$€£,]", "", side).replace("×", "*").replace("x", "*").replace("÷", "/").replace("−", "-")
    plain = re.sub(r"(\d+(?:\.\d+)?)%", r"(\1/100)", plain)
    plain = re.sub(r"(?<![\d.])0+(?=\d)", "", plain).strip()
    if re.search(r"\*\s*\*|/\s*/|[\d)]\s*\(|\)\s*\d", plain) or plain.count("/") > 1 or len(plain) > 100:
        return None
    try:
        return float(eval(compile(plain, "sum", "eval"), {"__builtins__": {}}))
    except (SyntaxError, ZeroDivisionError):
        return None


# ----------------------------------------------------------------------------------------------------------------------
# Labels.

_LABELS = re.compile(
    r"(?i)^(?:please )?(?:classify|categori[sz]e|label|decide|determine|identify|tell|say|is|are|does|judge|state)\b.*?"
    r"\b(?:as|whether|into|is|are|it's|either|between)\s+(?:either\s+|an?\s+|the\s+)?"
    r"(?P<list>[\w'\"-]+(?:,\s+[\w'\"-]+)*,?\s+or\s+(?:an?\s+)?[\w'\"-]+)\s*[.?]?(?:\s|$)"
)


def labels(instruction: str) -> list[str]:
    """The labels that an instruction offers ("... as positive, negative or neutral."), in lower case."""
    if re.match(r"(?i)(?:true or false|is it true or false)\b", instruction):
        return ["true", "false"]
    found = _LABELS.search(instruction)
    if not found:
        return []
    parts = re.split(r",\s+(?:or\s+)?|\s+or\s+", found["list"])
    return [re.sub(r"^(?:an?)\s+|['\"]", "", part).lower() for part in parts]


def label_problem(instruction: str, output: str) -> str | None:
    named = labels(instruction)
    spelled_otherwise = re.search(r"(?i)\b(?:output|print|return|use|based on)\b", instruction)
    if named and not spelled_otherwise:
        stems = [re.escape(re.sub(r"(?:ies|e?s|y)$", "", label)) for label in named]
        if not re.search(rf"(?i)\b(?:{'|'.join(stems)})", output):
            return "none of the labels that were offered"
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Language.

_STOPWORDS = {
    "english": "the and of to is in that it for was with are this you not",
    "french": "le la les et des est une un dans pour que qui je vous pas du",
    "spanish": "el la los las de que y en un una es por con para no se",
    "german": "der die das und ist nicht ein eine zu den mit ich sie auf für",
    "italian": "il la che di e un una è per non sono con i le del",
    "portuguese": "o a os as de que e um uma é para não com do da",
    "dutch": "de het een en van is dat niet op te zijn ik voor met",
}
_SCRIPTS = {
    "chinese": r"[\u4e00-\u9fff]", "mandarin": r"[\u4e00-\u9fff]", "japanese": r"[\u3040-\u30ff\u4e00-\u9fff]",
    "korean": r"[\uac00-\ud7af]", "russian": r"[\u0400-\u04ff]", "ukrainian": r"[\u0400-\u04ff]",
    "greek": r"[\u0370-\u03ff]", "arabic": r"[\u0600-\u06ff]", "hindi": r"[\u0900-\u097f]",
    "hebrew": r"[\u0590-\u05ff]",
}  # fmt: skip
_LANGUAGES = "|".join([*_STOPWORDS, *_SCRIPTS])
_TARGET = re.compile(rf"(?i)\btranslate\b.*?\b(?:in|to|into)\s+({_LANGUAGES})\b(?! numerals)")


def language_problem(instruction: str, given: str, output: str) -> str | None:
    """A translation that is not in its language, or an answer in a script that the task does not speak of."""
    target = found[1].lower() if (found := _TARGET.search(instruction)) else None
    if target in _SCRIPTS:
        return None if re.search(_SCRIPTS[target], output) else "not in the language that was asked for"
    if target and output.strip().lower() == given.strip().lower():
        return "not in the language that was asked for"
    likely = _likely_language(output) if target and len(output.split()) >= 8 else None
    if likely and likely != target:
        return "not in the language that was asked for"
    # Letters beyond Latin and Greek, whose signs stand in formulas.
    foreign = sum(c.isalpha() and (c > "\u03ff") and not "\u1e00" <= c <= "\u2fff" for c in output)
    speaks_of_language = re.search(rf"(?i)\b(?:{_LANGUAGES}|translat\w*|languages?|words?)\b", instruction)
    if foreign > 0.1 * len(output) and not speaks_of_language:
        return "in another script than its task"
    return None


def _likely_language(text: str) -> str | None:
    """The language most of whose commonest words stand in `text`; None where two are as likely."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    counts = Counter({name: sum(w in stops.split() for w in words) for name, stops in _STOPWORDS.items()})
    (best, most), (_, second) = counts.most_common(2)
    return best if most >= 3 and most > 1.5 * second else None


# ----------------------------------------------------------------------------------------------------------------------
# Length.

_MOST_WORDS = re.compile(rf"(?i)\b(?:at most|no more than|up to|under|fewer than|less than|within) {COUNT} words\b")
_WORDS = re.compile(
    rf"(?i)\b(?:in|of|using|with)\s+(exactly\s+)?(?:about\s+|around\s+|approximately\s+|only\s+)?{COUNT} words\b|"
    rf"\ban? (exactly )?{COUNT}-word (?:answer|article|email|essay|letter|message|paragraph|poem|story|summary)\b"
)
_SENTENCES = re.compile(
    r"(?i)\b(?:in|with|using|exactly|into) (?:a |exactly |just |only )?(single|one|two|three|1|2|3)[ -]sentences?\.?$"
)
_SENTENCE_END = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!e\.g)(?<!i\.e)[.!?][\"')\]]*(?:\s|$)")
# Where a length belongs to a part of the answer.
_OF_A_PART = re.compile(r"(?i)\b(?:each|every|per|pairs?|none|then|lines?)\b")
_POINTS = re.compile(
    r"(?i)(?:please )?(?:list|give|name|suggest|provide|write|create|generate|come up with|think of|propose)\s+"
    rf"(?:me\s+)?(?:a list of\s+)?{COUNT}\s+(?!words?\b|sentences?\b|hundred|thousand|lines?\b|paragraphs?\b|-)"
)


def length_problem(instruction: str, output: str) -> str | None:
    """More or fewer words, sentences or points than the instruction asks for."""
    words = len(output.split())
    if not _OF_A_PART.search(instruction):
        if found := _MOST_WORDS.search(instruction):
            if words > _number(found[1]):
                return "longer than asked for"
        elif found := _WORDS.search(instruction):
            asked, exactly = _number(found[2] or found[4]), found[1] or found[3]
            if (exactly and words != asked) or not 0.6 * asked <= words <= max(1.3 * asked, asked + 2):
                return "not as long as asked for"
        if (found := _SENTENCES.search(instruction)) and len(_SENTENCE_END.findall(output)) > _number(found[1]):
            return "longer than asked for"
    if found := _POINTS.match(instruction):
        points = len(re.findall(r"(?m)^[ \t]*(?:\d+[.)]|[-*•])[ \t]+\S", output))
        if points >= 2 and points % _number(found[1]):
            return "not as many points as asked for"
    return None


def _number(text: str) -> int:
    return NUMBER_WORDS.get(text.lower()) or int(text)
