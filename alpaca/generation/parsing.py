"""Reads the tasks of a model's reply, whatever style it numbers and labels them in."""

import dataclasses
import html
import json
import re
from collections.abc import Sequence


@dataclasses.dataclass
class ParsedTask:
    """One task of a reply. `problem` says why it cannot be read as a task; None where it can."""

    number: int | None
    instruction: str
    input: str
    output: str
    problem: str | None = None


# ----------------------------------------------------------------------------------------------------------------------
# What is no part of a reply.

_THOUGHTS = r"think|thinking|thoughts?|reasoning"
_THOUGHTS_TAG = re.compile(
    rf"(?i)<(?P<end>/?)(?P<name>{_THOUGHTS})>|\[(?P<end_too>/?)think\]|(?P<final><\|channel\|>final<\|message\|>)"
)
# Marks of the chat format with which some servers let a reply end, and go on.
_END_OF_TURN = re.compile(r"<\|(?:im_end|im_start|endoftext|eot_id|end_of_text|end|return)\|>|<end_of_turn>|</s>\s*\Z")


def visible_text(text: str) -> str | None:
    """A reply without a reasoning model's thoughts and without end-of-turn marks; None where the thoughts never end.

    The thoughts are all up to the last end tag, since chat templates often write the first tag themselves. Tags that an
    answer speaks of are text.
    """
    opening, cut, last = None, 0, 0
    for tag in _THOUGHTS_TAG.finditer(text):
        if not (tag["end"] or tag["end_too"] or tag["final"]):
            opening = tag
            continue
        last = tag.end()
        if not (opening and opening["name"] == tag["name"] and _is_text(text, cut, opening, tag)):
            cut = last
        opening = None
    begun = _THOUGHTS_TAG.match(text.lstrip())
    if begun and not (begun["end"] or begun["end_too"] or begun["final"]):
        if not last:
            return None
        cut = cut or last
    return _END_OF_TURN.split(text[cut:], maxsplit=1)[0]


def _is_text(text: str, cut: int, opening: re.Match, end: re.Match) -> bool:
    """Whether a pair of tags is no pair of thoughts: these ended before, at `cut`, or a task's header stands before
    the pair, or the pair is a part of a line."""
    before = text[: opening.start()]
    if not before.strip():
        return False
    line = before.rsplit("\n", 1)[-1] + text[end.end() :].split("\n", 1)[0]
    inline = "\n" not in text[opening.start() : end.end()] and line.strip()
    return bool(cut or inline or _HEADER.search(before))


_CLOSING_REMARK = re.compile(
    r"""(?ix) [*_]{0,3}
    (?:(?:please[ ])?(?:let[ ]me[ ]know|feel[ ]free[ ]to|don't[ ]hesitate[ ]to) \b
     | (?:i[ ])?hope[ ](?:this|these|that|the|it|they)\b .* \b(?:help|useful|meet|suit|work|fit|list|tasks?)
     | if[ ]you(?:['’]d|[ ]would)?[ ](?:need|want|like|have|prefer)\b .*
           \b(?:let[ ]me[ ]know|feel[ ]free|just[ ]ask|i[ ]can)\b
     | would[ ]you[ ]like[ ](?:me|more|another|any|to)\b
     | these[ ](?:tasks|instructions|examples)\b
     | (?:that(?:['’]s|[ ]is)[ ]all|(?:this[ ]is[ ]the[ ])?end[ ]of[ ](?:the[ ])?(?:list|tasks))\b)
    [^\n]* """
)
_LETTER = re.compile(r"(?i)\s*(?:subject:|to:|from:|dear\b|hi\b|hello\b|hey\b|good (?:morning|afternoon|evening)\b)")

# ----------------------------------------------------------------------------------------------------------------------
# Headers. A field header stands at the start of a line: "4. Instruction:", "**4. Input:**", "### 4) Output",
# "Task 4: Instruction:", "Instruction:". Decoration and number are optional here; what counts is decided per reply.
# All repetitions are bounded, so that a page of dashes costs no time.

_HEADER = re.compile(
    r"""(?mix)^
    (?P<decoration>[#>*_•\- \t]{0,12})
    (?:(?:task|example)[ \t]{0,3})?
    (?:(?:no\.?|\#)?[ \t]{0,3}(?P<number>\d{1,4})
        (?:[*_]{0,3}[.):：][*_]{0,3}\s{1,8} | [ \t]{0,3}[-–][ \t]{0,3} | [*_]{0,3}[ \t]{1,3} | [.)](?=[*_a-z]))
    )?
    (?P<bold>[*_]{0,3})
    (?P<field>instruction|input|output)
    (?:[ \t]{0,3}(?P<number_after>\d{1,4}))?
    (?:[*_]{0,3}[ \t]{0,3}[:：]|(?P<bare>[*_]{0,3}[ \t]{0,12}$))
    """
)
# The line that the prompt itself puts between tasks.
_FORMAT_SEPARATOR = re.compile(r"(?m)^[ \t]*###[ \t]*$")
# What teachers write in its place: a run of one sign, a single "#", an HTML comment.
_OTHER_SEPARATOR = re.compile(r"[ \t]*(?:([#*\-=/;~`])(?:[ \t]*\1)+|__+|<!--.*-->|\#)[ \t]*")  # not "_ _ _", a gap
# "### Task 4", "**4.**", "4)": a title above fields that carry no number themselves.
_TITLE = re.compile(
    r"(?i)[ \t]*(?:[#*_> \t-]*(?:task|example)[ \t]*#?\d{1,4}|[#*_]+[ \t]*\d{1,4}|\d{1,4}[.)])[.):]?[*_: \t]*"
)
# "**Task 5: French**", "## 5. French": a title with a name behind its number, in marks or with the word task.
_NAMED_TITLE = re.compile(
    r"(?i)[ \t]*(?P<marks>[#*_]{0,6})[ \t]{0,3}[*_]{0,3}(?P<task>(?:task|example)[ \t]*\#?)?(?P<number>\d{1,4})"
    r"[ \t]*[*_]{0,3}[.):–—-][^\n]{0,100}"
)


def _title_number(line: str) -> int | None:
    found = _NAMED_TITLE.fullmatch(line)
    return int(found["number"]) if found and (found["marks"] or found["task"]) else None


@dataclasses.dataclass
class _Header:
    start: int
    end: int
    field: str
    number: int | None


def _headers(text: str) -> list[_Header]:
    found, numbered_after = [], []
    for match in _HEADER.finditer(text):
        marks = match["decoration"] + match["bold"]
        if match["bare"] is not None and "#" not in marks and "*" not in marks:
            continue  # "4. Output" with neither colon nor bold nor heading is the beginning of a sentence
        number = match["number"] or match["number_after"]
        end = match.end()
        if "*" in marks or "_" in marks:
            end += len(text[end : end + 3]) - len(text[end : end + 3].lstrip("*_"))  # the bold's end: "**4. Input:**"
        found.append(_Header(match.start(), end, match["field"].lower(), int(number) if number else None))
        if match["number_after"]:
            numbered_after.append(found[-1])
    # "Instruction 1:" beside "4. Output:" is a line of an answer.
    if any(h.number is not None and h.field != "instruction" and h not in numbered_after for h in found):
        found = [header for header in found if header not in numbered_after]
    return found


def parse_reply(text: str, first_number: int = 1, cut: bool = False, outputs: bool = True) -> list[ParsedTask]:
    """The tasks of a reply that goes on after "{first_number}. Instruction:" or starts a list of its own.

    `cut`: the reply may have been ended in the middle, so its last task is dropped. `outputs=False` reads a list of
    instructions with inputs, where answers are neither needed nor used. Fragments that are no task come back with
    `problem` set, in the reply's order; remarks before and behind the list are left out.
    """
    text = visible_text(re.sub(r"\r\n?", "\n", text))
    if text is None:
        return [ParsedTask(None, "", "", "", "thoughts that never end")]
    tasks = _read_list(text, first_number, cut, outputs)
    for read in (_read_json, _read_xml) if all(task.problem for task in tasks) else ():
        tasks = read(text, outputs) or tasks
    if all(task.problem for task in tasks) and (translated := _in_english(text)) != text:
        tasks = _read_list(translated, first_number, cut, outputs)
    return tasks


def _read_list(text: str, first_number: int, cut: bool, outputs: bool) -> list[ParsedTask]:
    # Chat models like to repeat the number that the prompt ended with, without its "Instruction:".
    text = re.sub(rf"^\s*{first_number}[.)]\s+(?![*_]*(?i:instruction))", "", text)
    chunks, numbered, preamble = _split_tasks(f"{first_number}. Instruction:\n{text}", first_number, outputs)
    last = len(chunks) - 1
    if cut:
        chunks = _without_cut_task(chunks)
    elif last > 0 and _last_line(chunks[-1]) == _last_line(chunks[-2]):
        last += 1  # the separator that stood between the tasks stands behind the last one too
    tasks, title = [], _title_number(_last_line(preamble))
    for position, chunk in enumerate(chunks):
        next_title = (first_number + position if title is None else title) + 1
        if numbered and position + 1 < len(chunks):
            next_title = _headers(chunks[position + 1])[0].number
        tasks.append(_read_task(chunk, outputs, position < last, numbered, title is not None, next_title))
        title = next_title if _title_number(_last_line(chunk)) == next_title else None
    return tasks


def _split_tasks(text: str, first_number: int, outputs: bool) -> tuple[list[str], bool, str]:
    """One piece of text a task, each beginning with its Instruction header; whether the reply numbers its tasks; and
    the text before the first task.

    The text's first header is the one that the prompt ended with. What follows it is a task, or a remark of a model
    that begins the list anew.
    """
    headers = _headers(text)
    # "2. Output: a number." may be a line of an answer; what follows the prompt's own header is a header.
    telling = [header for header in headers[1:] if header.field == "instruction" or header is headers[1]]
    numbered = any(header.number is not None for header in telling)
    starts = [h for h in headers if h.field == "instruction" and (h.number is not None or not numbered)]
    bounds = [header.start for header in starts] + [len(text)]
    chunks = [text[begin:end] for begin, end in zip(bounds, bounds[1:], strict=False)]
    if len(starts) > 1:
        begins_anew = starts[1].number is None or starts[1].number <= first_number
        has_fields = any(header.field != "instruction" for header in _headers(chunks[0]))
        # "4. Instruction:" + "Here are the tasks:", or nothing at all, and then the list.
        if not has_fields and (begins_anew or outputs):
            return chunks[1:], numbered, chunks[0]
    return chunks, numbered, ""


def _last_line(text: str) -> str:
    return text.rstrip().rsplit("\n", 1)[-1].strip()


def _without_cut_task(chunks: list[str]) -> list[str]:
    """Drops what the length limit cut off: the last task, or only the beginning of one after a separator line."""
    separators = list(_FORMAT_SEPARATOR.finditer(chunks[-1]))
    if separators:
        return [*chunks[:-1], chunks[-1][: separators[-1].start()]]
    return chunks[:-1]


def _read_task(
    chunk: str, outputs: bool, followed: bool, numbered: bool, titled: bool, next_title: int | None
) -> ParsedTask:
    """One task from its piece of text. `titled`: a title stood above it. `followed`: another task comes after it, whose
    title has the number `next_title`, if it has one."""
    start, *headers = _headers(chunk)

    def first(field: str, before: int) -> _Header | None:
        # The task's own number first, then a header without number, then one whose number slipped.
        candidates = [header for header in headers if header.field == field and header.start < before]
        own = [header for header in candidates if header.number == start.number]
        plain = [header for header in candidates if header.number is None]
        return next(iter(own or plain or candidates), None)

    output = first("output", len(chunk))
    given = first("input", output.start if output else len(chunk))
    ends = [header.start for header in (given, output) if header]
    instruction = _clean(chunk[start.end : min(ends, default=len(chunk))], followed and not ends)
    if not outputs and not ends:
        instruction = instruction.split("\n")[0].rstrip()  # the prompt's instructions are lines; the rest is talk
    context = (
        _clean(chunk[given.end : output.start if output else len(chunk)], followed and not output) if given else ""
    )
    answer = _clean(chunk[output.end :], followed, not numbered, titled, next_title) if output else ""
    task = ParsedTask(start.number, _without_bold_end(instruction), context, answer if outputs else "")

    counted = (given, output) if outputs else (given, output, *(h for h in headers if h.field == "output"))
    extra = [
        h for h in headers if h.number == start.number is not None and h.field != "instruction" and h not in counted
    ]
    if not task.instruction:
        task.problem = "no instruction"
    elif outputs and output is None:
        task.problem = "no output section"
    elif extra:
        task.problem = f"repeated or misplaced {extra[0].field} section"
    return task


def _clean(
    field: str, followed: bool, bare_titles: bool = False, titled: bool = False, next_title: int | None = None
) -> str:
    """A field's text without outer white space, and without the separators and the title that lead to the next task,
    or the remark behind the last one."""
    separator = _FORMAT_SEPARATOR.search(field)
    if separator:
        return field[: separator.start()].strip()
    lines, title_found = field.strip().split("\n"), False
    while len(lines) > 1:
        last, blank_before = lines[-1], not lines[-2].strip()
        if last.strip():
            is_separator = _OTHER_SEPARATOR.fullmatch(last) and not _closes_fence(lines)
            if followed:
                is_title = (_title_number(last) or -1) == next_title
                if is_title and not titled:  # the last line of a list "**1. Boil**, **2. Pour**"?
                    is_title = all(_title_number(line) != next_title - 1 for line in lines)
                if bare_titles and _TITLE.fullmatch(last):
                    is_title |= blank_before or not last.strip()[0].isdigit()
                ends = is_separator or (is_title and not title_found)
                title_found |= is_title
            else:
                ends = is_separator and (blank_before or "`" in last)
                ends = ends or (blank_before and _CLOSING_REMARK.fullmatch(last.strip()) and not _LETTER.match(field))
            if not ends:
                break
        lines.pop()
    text = "\n".join(lines).rstrip()
    bare = text.rstrip("#")  # "... of the answer. ###": the separator, glued to the last line
    glued = len(text) - len(bare) >= (2 if not bare or bare[-1].isspace() else 3)
    return (bare if glued else text).strip()


def _closes_fence(lines: Sequence[str]) -> bool:
    """True where the last line is the closing fence of a code block that these lines opened."""
    fences = [line for line in lines if line.lstrip().startswith("```")]
    return lines[-1].lstrip().startswith("```") and len(fences) % 2 == 0


def _without_bold_end(text: str) -> str:
    """ "**4. Instruction: Do it**" leaves a closing "**" behind, whose opening one belonged to the header."""
    return text[:-2].rstrip() if text.endswith("**") and text.count("**") % 2 else text


def _read_json(text: str, outputs: bool) -> list[ParsedTask]:
    """Tasks of a reply in JSON or JSON lines, in a fence or bare, as a list, an object of lists or one by one."""
    decoder, tasks, position = json.JSONDecoder(strict=False), [], 0
    while (position := text.find("{", position)) >= 0:
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            value, end = {}, position + 1
        fields = {str(key).lower(): entry for key, entry in value.items()}
        if isinstance(fields.get("instruction"), str):
            problem = "no output section" if outputs and "output" not in fields else None
            answer = _json_text(fields.get("output")) if outputs else ""
            tasks.append(
                ParsedTask(None, fields["instruction"].strip(), _json_text(fields.get("input")), answer, problem)
            )
            position = end
        else:
            position += 1  # an outer object; the tasks may be inside
    return tasks


_XML_FIELD = re.compile(r"(?is)<(instruction|input|output)\b[^<>]*>(.*?)</\1\s*>")


def _read_xml(text: str, outputs: bool) -> list[ParsedTask]:
    """Tasks of a reply in XML: <instruction>, <input> and <output> elements, whatever stands around them."""
    tasks = []
    for field, content in _XML_FIELD.findall(text):
        content = html.unescape(re.sub(r"(?s)^\s*<!\[CDATA\[(.*?)\]\]>\s*$", r"\1", content)).strip()
        if field.lower() == "instruction":
            tasks.append(ParsedTask(None, content, "", "", "no output section" if outputs else None))
        elif tasks and field.lower() == "input":
            tasks[-1].input = content
        elif tasks and outputs:
            tasks[-1].output, tasks[-1].problem = content, None
    return tasks


# The field names in other languages, and other names in English.
_NAMES = {
    "Instruction": (
        "anweisung|aufgabe|consigne|instrucci[oó]n|instrução|istruzione|instructie|opdracht|instrukcja|polecenie"
        "|инструкция|задание|інструкція|завдання|talimat|yönerge|hướng dẫn|chỉ dẫn|yêu cầu|instruksi|perintah"
        "|指令|指示|说明|說明|命令|지시(?:사항)?|명령|التعليمات|تعليمات|التعليمة|निर्देश|دستور(?:العمل)?"
    ),
    "Input": (
        "eingabe|entr[eé]e|entrada|invoer|wejście|dane wejściowe|ввод|вход(?:ные данные)?|введення|вхід|girdi|giriş"
        "|đầu vào|masukan|输入|輸入|入力|입력|المدخلات|المدخل|الإدخال|इनपुट|ورودی|context"
    ),
    "Output": (
        "ausgabe|antwort|sortie|réponse|salida|respuesta|saída|resposta|uitvoer|wyjście|wynik|вывод"
        "|выход(?:ные данные)?|ответ|виведення|вихід|відповідь|çıktı|đầu ra|keluaran"
        "|输出|輸出|出力|출력|المخرجات|المخرج|الإخراج|आउटपुट|خروجی"
        "|response|answer"
    ),
}
_OTHER_NAMES = [
    (re.compile(rf"(?im)^([#>*_•\- \t\d.)]{{0,16}})(?:{names})(?=[*_ \t\d]{{0,8}}[:：]|[*_]{{0,3}}[ \t]*$)"), name)
    for name, names in _NAMES.items()
]


def _in_english(text: str) -> str:
    """A reply with the names of its fields in English."""
    for pattern, name in _OTHER_NAMES:
        text = pattern.sub(rf"\g<1>{name}", text)
    return text


def look_of(text: str) -> str:
    """What a reply looks like of which no task could be read, with its first lines."""
    lines = [line for line in text.strip().split("\n") if line.strip()]
    if sum(line.strip().startswith("|") for line in lines) >= 3:
        look = "a table"
    elif text.lstrip()[:1] in ("{", "[", "<"):
        look = "JSON or XML of another form"
    else:
        look = "text without the headers Instruction:, Input: and Output:"
    return f"{look}, which begins:\n" + "\n".join(f"    {line[:110]}" for line in lines[:4])


def _json_text(value) -> str:
    if value is None:
        return ""
    return value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
