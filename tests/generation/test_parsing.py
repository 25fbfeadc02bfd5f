"""parsing.py and prompting.py: prompts byte for byte, and replies read as a careful person would read them."""

import json
import re

import hypothesis
import pytest
from hypothesis import strategies as st

import generate_instruction
from alpaca.generation.filters import contains_task_header
from alpaca.generation.parsing import look_of, parse_reply, visible_text
from alpaca.generation.prompting import encode_prompt, next_list_header

HEADERS = [  # how teachers have written the headers of a task
    "{n}. {f}:",
    "{n}) {f}:",
    "{n}.{f}:",
    "{n} {f}:",
    "{n}: {f}:",
    "{n} - {f}:",
    "{n}.\n{f}:",
    "**{n}. {f}:**",
    "**{n}. {f}**:",
    "{n}. **{f}:**",
    "{n}. **{f}**:",
    "__{n}. {f}:__",
    "### {n}. {f}:",
    "## {n}. {f}",
    "### **{n}. {f}**",
    "**{n}. {f}**",
    "Task {n}: {f}:",
    "Task {n} {f}:",
    "#{n} {f}:",
    "{f} {n}:",
    "**{f} {n}:**",
    "- {n}. {f}:",
    "> {n}. {f}:",
    "{n}. {f}：",
    "{n}. {f} :",
]
SEPARATORS = [  # what they put between tasks; most are from the released data's 37 rows that swallowed the next task
    "###\n",
    "###\n\n",
    "\n###\n",
    "##\n",
    "## \n",
    "#\n",
    "\n\n\n\n \n\n",
    "\n",
    "",
    "///\n",
    "```\n",
    "***\n",
    "---\n",
    "\n---\n\n",
    "========\n",
    "________\n\n",
    ";;\n",
    "<!-- --> \n",
    "~~~\n",
]
TASKS = [
    ("Name two planets that have rings.", "", "Saturn and Uranus."),
    ("Translate the greeting into Spanish.", "Good morning, my friend", "Buenos días, amigo mío"),
    ("List three fruits in a table of one row.", "", "| a | b | c |\n|---|---|---|"),
    (
        "Explain when the treaty was signed.",
        "Versailles",
        "It was signed in 1919.\nThe price was $20. Later, in 1920. Yes.",
    ),
]


def write_reply(header: str, separator: str, numbers=(4, 5, 6, 7), marker="<noinput>") -> str:
    """A reply in one teacher's style, beginning after the prompt's own "4. Instruction:"."""
    text = ""
    for number, (instruction, given, output) in zip(numbers, TASKS, strict=False):
        for field, value in (("Instruction", instruction), ("Input", given or marker), ("Output", output)):
            head = header.format(n=number, f=field)
            text += head + (" " if field == "Instruction" and ":" in head.replace("：", ":") else "\n") + value + "\n"
        text += separator
    return text


def rows(tasks) -> list[tuple[str, str, str]]:
    assert [task.problem for task in tasks] == [None] * len(tasks)
    return [(task.instruction, "" if task.input == "<noinput>" else task.input, task.output) for task in tasks]


# ----------------------------------------------------------------------------------------------------------------------
# The prompt.


def test_prompt_is_the_format_of_the_design_byte_for_byte():
    """Guards the generation prompt: models continue exactly this text."""
    tasks = [
        {"instruction": "Sort  the\nwords: ", "input": "b a", "output": "a b"},
        {"instruction": "Say hello.", "input": "", "output": "Hello!"},
    ]
    assert encode_prompt(tasks, "Write {num_tasks} tasks.", 7) == (
        "Write 7 tasks.\n###\n1. Instruction: Sort the words\n1. Input:\nb a\n1. Output:\na b\n"
        "###\n2. Instruction: Say hello.\n2. Input:\n<noinput>\n2. Output:\nHello!\n###\n3. Instruction:"
    )
    assert encode_prompt(tasks, "x", outputs=False).endswith(
        "2. Instruction: Say hello.\n2. Input:\n<noinput>\n###\n3. Instruction:"
    )


def test_prompt_file_has_the_number_as_a_parameter():
    """The original wrote "20" into the text; here it is filled in, and nothing of the placeholder is left."""
    prompt = encode_prompt([], num_tasks=13)
    assert "13" in prompt and "{num_tasks}" not in prompt and prompt.endswith("###\n1. Instruction:")


# ----------------------------------------------------------------------------------------------------------------------
# Well-formed replies: the original's rules, written down independently.


def original_rules(first: int, text: str, cut: bool) -> list[dict[str, str]]:
    """What the original script reads: split at ###, then at consecutive numbered headers, seven pieces a task."""
    found = []
    pieces = f"{first}. Instruction:{text}".split("###")
    for offset, piece in enumerate(pieces):
        if cut and offset == len(pieces) - 1:
            break
        parts = re.split(rf"{first + offset}\.\s+(?:Instruction|Input|Output):", piece)
        if len(parts) == 4:
            instruction, given, output = (part.strip() for part in parts[1:])
            given = "" if given.lower() == "<noinput>" else given
            found.append({"instruction": instruction, "input": given, "output": output})
    return found


_letters = st.characters(exclude_characters="#", exclude_categories=("Cc", "Cs", "Zl", "Zp"))
_line = st.text(_letters, min_size=1, max_size=40).filter(lambda s: s.strip() == s and s)
# Behind "Instruction:" the original kept the rest of a chat model's "**1. Instruction:**"; the parser does not.
_instruction = _line.filter(lambda s: not s.startswith(("*", "_")))
_text = st.lists(_line, min_size=1, max_size=4).map("\n".join)
_format_word = re.compile(r"(?i)instruction|input|output")


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
    st.lists(st.tuples(_instruction, st.one_of(st.just("<noinput>"), _text), _text), min_size=1, max_size=6),
    st.integers(1, 6),
    st.booleans(),
    st.booleans(),
)
def test_well_formed_replies_give_the_tasks_of_the_original(tasks, first, cut, closed):
    """Any text without the format's own words and separator is read exactly as the original reads it."""
    if any(_format_word.search(field.replace("<noinput>", "")) for task in tasks for field in task):
        return
    text = ""
    for number, (instruction, context, output) in enumerate(tasks, start=first):
        text += f"{number}. Instruction:" if number > first else ""
        text += f" {instruction}\n{number}. Input:\n{context}\n{number}. Output:\n{output}\n"
        text += "###\n" if closed or number < first + len(tasks) - 1 else ""
    read = [
        {"instruction": t.instruction, "input": "" if t.input == "<noinput>" else t.input, "output": t.output}
        for t in parse_reply(text, first, cut)
        if not t.problem
    ]
    assert read == original_rules(first, text, cut)


def test_post_process_filters_as_the_original():
    """The importable function of forks: same arguments, same rows, None for no response."""
    text = (
        " Name two planets with rings.\n4. Input:\n<NoInput>\n4. Output:\nSaturn\n###\n"
        "5. Instruction: Draw a cat on a mat.\n5. Input:\n<noinput>\n5. Output:\nok\n###\n"
        "6. Instruction: Too short this\n6. Input:\nx\n6. Output:\ny\n###\n"
        "7. Instruction: Write a program that adds numbers.\n7. Input:\nx\n7. Output:\ny\n###\n"
        "8. Instruction: Answer with no words at all.\n8. Input:\nN/A\n8. Output:\n\n###\n"
        "9. Instruction: Name one moon of Mars.\n9. Input:\nN/A\n9. Output:\nPhobos"
    )
    post = generate_instruction.post_process_gpt3_response
    planets = {"instruction": "Name two planets with rings.", "input": "", "output": "Saturn"}
    moon = {"instruction": "Name one moon of Mars.", "input": "", "output": "Phobos"}
    assert post(3, {"text": text, "finish_reason": "stop"}) == [planets, moon]
    assert post(3, {"text": text, "finish_reason": "length"}) == [planets]
    assert post(3, None) == []


# ----------------------------------------------------------------------------------------------------------------------
# Malformed replies.


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("separator", ["###\n", "\n", "", "##\n", "\n---\n\n"])
def test_every_header_style_with_common_separators(header, separator):
    """Chat models' bold, heading and numbering styles lost whole replies in the original."""
    assert rows(parse_reply("Here are the tasks:\n\n" + write_reply(header, separator), 4)) == TASKS


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("continued", [True, False])
def test_every_separator(separator, continued):
    """37 released rows swallowed the next task because its separator was not ###."""
    text = write_reply("{n}. {f}:", separator)
    assert rows(parse_reply(text.removeprefix("4. Instruction:") if continued else text, 4)) == TASKS


@pytest.mark.parametrize(
    "numbers", [(4, 5, 7, 8), (4, 6, 9, 20), (1, 2, 3, 4), (4, 4, 4, 4), (4, 5, 5, 6), (9, 8, 7, 6)]
)
def test_numbering_gaps_and_restarts(numbers):
    """One skipped number lost the rest of the reply in the original."""
    assert rows(parse_reply(write_reply("{n}. {f}:", "###\n", numbers), 4)) == TASKS


@pytest.mark.parametrize(
    "title",
    [
        "### Task {n}\n",
        "**Task {n}**\n",
        "**Task {n}:**\n\n",
        "## {n}.\n",
        "**{n}.**\n",
        "\n{n}.\n",
        "\nTask {n}:\n",
        "---\n\n### Task {n}\n",
    ],
)
@pytest.mark.parametrize("header", ["{f}:", "**{f}:**", "**{f}**:", "- **{f}:**", "#### {f}", "**{f}**"])
def test_numbers_in_a_title_or_not_at_all(title, header):
    """Titles above fields without numbers, as chat models write them; the title is no part of the answer before it."""
    text = ""
    for number, (instruction, given, output) in enumerate(TASKS, start=4):
        text += title.format(n=number)
        for field, value in (("Instruction", instruction), ("Input", given or "<noinput>"), ("Output", output)):
            text += f"{header.format(f=field)}{' ' if ':' in header else chr(10)}{value}\n"
        text += "\n"
    assert rows(parse_reply("Sure! Here is the list.\n\n" + text, 4)) == TASKS


def test_only_the_instruction_is_numbered():
    """ "1. Instruction: ..." with plain "Input:" and "Output:" lines below it."""
    text = "".join(
        f"{n}. Instruction: {i}\nInput: {g or '<noinput>'}\nOutput: {o}\n\n" for n, (i, g, o) in enumerate(TASKS, 1)
    )
    assert rows(parse_reply(text, 4)) == TASKS


def test_an_input_section_may_be_missing():
    """A careful reader takes it as no input."""
    (task,) = parse_reply("Name a colour of the sky.\n4. Output:\nBlue", 4)
    assert (task.problem, task.input, task.output) == (None, "", "Blue")


@pytest.mark.parametrize(
    "output",
    [
        "# Title\n\n### A heading\nText below it.\n### Another\n- a\n- b",
        "It began in 1920.\nIt cost $20.\n20. This is point twenty.",
        "Instruction: Given a sentence, count its words.\nInput: I am here\nOutput: 3",
        "def f(x):\n    return x\n\n```python\nprint(1)\n```",
        "### Input\nstays text\n### Output\nstays text",
        "1. Input: five\n2. Output: six",
        "- Instruction 1: Sort the words.\n- Instruction 2: Count the words.",
        "A\n\n---\n\nB",
        "C# and F#",
        "The output:\nnothing",
        "Input and output are words.\nOutput\nInstruction manuals are words too.",
        '{"instruction": "x", "output": "y"}',
        "a\n\n42",
        "你好，世界。\n这是第二行。",
        "Привет: мир\n№ 5",
        "مرحبا بالعالم",
        "* one\n* two",
        "*emphasis* at the start",
        "__init__ is a method",
        "-",
        "#",
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_text_inside_an_output_stays_text(output, before):
    """A heading truncated the output and shifted all later numbers; "20." ended the reply; samples became tasks."""
    tasks = [("Do the first thing now.", "", output), ("Do the second thing now.", "x", "y")]
    tasks = tasks if before else tasks[::-1]
    text = "".join(
        f"###\n{n}. Instruction: {i}\n{n}. Input:\n{g or '<noinput>'}\n{n}. Output:\n{o}\n"
        for n, (i, g, o) in enumerate(tasks, 4)
    )
    assert rows(parse_reply(text.removeprefix("###\n4. Instruction:"), 4)) == tasks


def test_length_drops_only_the_last_task():
    """At every possible place of the cut, all tasks that were complete before the last separator are read whole."""
    text = write_reply("{n}. {f}:", "###\n").removeprefix("4. Instruction:")
    ends = [match.end() for match in re.finditer("###", text)]
    for cut in range(len(text)):
        whole = sum(end <= cut for end in ends)
        got = rows(parse_reply(text[:cut], 4, cut=True))
        # Right behind a separator its task is known to be whole; before it, the last task is dropped.
        assert got in (TASKS[:whole], TASKS[: max(0, whole - 1)]), text[:cut]
        assert len(got) >= whole - 1
    assert rows(parse_reply(text[: ends[1] + 1], 4, cut=True)) == TASKS[:2]


def test_an_uncut_reply_keeps_its_last_task_whatever_ends_it():
    """Stop strings, separators and a code fence around the whole reply are no part of the last answer."""
    text = write_reply("{n}. {f}:", "###\n")
    for reply in (
        text,
        text.rstrip("\n"),
        text + "###",
        f"```\n{text.removesuffix('###' + chr(10))}```",
        f"```text\n{text}```\n",
    ):
        assert rows(parse_reply(reply, 4)) == TASKS
    assert next_list_header(20) == "\n21. Instruction:"


@pytest.mark.parametrize(
    "preamble",
    ["", "Here are 20 tasks:\n\n", "Sure!\n", "**Tasks**\n\n", "<think>\nI will list\n1. Instruction: x\n</think>\n\n"],
)
def test_preambles_and_line_ends(preamble):
    """Remarks before the list and Windows line ends change nothing."""
    text = preamble + write_reply("{n}. {f}:", "###\n")
    assert rows(parse_reply(text, 4)) == rows(parse_reply(text.replace("\n", "\r\n"), 4)) == TASKS


def test_the_number_alone_is_repeated():
    """ "4. Name two planets..." after a prompt that ended with "4. Instruction:" is no part of the instruction."""
    text = write_reply("{n}. {f}:", "###\n").replace("4. Instruction: ", "4. ")
    assert rows(parse_reply(text, 4)) == TASKS


def test_remarks_behind_the_list_are_no_answer():
    """Behind the format's own separator nothing belongs to the last answer."""
    text = write_reply("{n}. {f}:", "###\n") + "\nI hope these tasks help you!"
    assert rows(parse_reply(text, 4)) == TASKS


@pytest.mark.parametrize("wrap", ["{}", "```json\n{}\n```", "Here you are:\n```\n{}\n```\nEnjoy!"])
def test_json_replies(wrap):
    """Some chat models answer every list in JSON; a cut one still gives its whole tasks."""
    made = [{"instruction": i, "input": g, "output": o} for i, g, o in TASKS]
    for text in (json.dumps(made, indent=2), json.dumps({"tasks": made}), "\n".join(map(json.dumps, made))):
        assert rows(parse_reply(wrap.format(text), 4)) == TASKS
    cut = json.dumps(made)[:-30]
    assert rows(parse_reply(cut, 4, cut=True)) == TASKS[:3]


def test_what_cannot_be_read_is_named():
    """Fragments come back with the reason, for the ledger of rejections; they are not dropped silently."""
    reply = "Do this thing here.\n###\n5. Instruction: And that.\n5. Input:\nx\n###\n"
    reply += "6. Instruction:\n6. Input:\na\n6. Output:\nb"
    assert [task.problem for task in parse_reply(reply, 4)] == ["no output section", "no instruction"]
    twice = "Do it.\n4. Input:\na\n4. Output:\nb\n4. Output:\nc"
    assert [task.problem for task in parse_reply(twice, 4)] == ["repeated or misplaced output section"]
    assert [task.problem for task in parse_reply("I cannot help with that.", 4)] == ["no output section"]


def test_instructions_only():
    """--answer_separately reads lists without outputs, and ignores outputs that come nevertheless."""
    text = " Name two planets.\n5. Instruction: Sort the words.\n5. Input:\nb a\n5. Output:\na b\n###\n"
    text += "6. Instruction: Last one.\n6. Input:\n<noinput>"
    tasks = parse_reply(text, 4, outputs=False)
    assert [(t.instruction, t.input, t.output, t.problem) for t in tasks] == [
        ("Name two planets.", "", "", None),
        ("Sort the words.", "b a", "", None),
        ("Last one.", "<noinput>", "", None),
    ]


@pytest.mark.parametrize("tag", ["think", "thinking", "Thought", "reasoning"])
@pytest.mark.parametrize("begin", [True, False])
def test_thoughts_are_no_tasks(tag, begin):
    """Where the chat template wrote <think>, only the end tag comes, and the thoughts became the first instruction."""
    draft = "I need tasks.\n4. Instruction: Draft one of four.\n4. Output:\nx\n"
    text = (f"<{tag}>\n" if begin else "") + f"{draft}</{tag}>\n\n" + write_reply("{n}. {f}:", "###\n")
    assert rows(parse_reply(text, 4)) == TASKS
    unclosed = parse_reply(f"<{tag}>\n{draft}", 4)
    assert [task.problem for task in unclosed] == ["thoughts that never end"]


def test_tags_in_an_answer_are_text():
    """An answer about "<thought>...</thought>" took all tasks before it along, without a line in the ledger."""
    answer = "<thought>Paris is the capital.</thought> is how it is marked."
    tasks = [("Name two planets.", "", "Mars, Venus"), ("Explain this tag to me.", "", answer)]
    text = "".join(f"{n}. Instruction: {i}\n{n}. Output: {o}\n###\n" for n, (i, _, o) in enumerate(tasks, 4))
    for thoughts in ("", "<think>\nI write <think>x</think> there.\n</think>\n", "Hm.</think>\n"):
        assert rows(parse_reply(thoughts + text, 4)) == tasks
    assert visible_text(f"So: {answer}") == f"So: {answer}"


@pytest.mark.parametrize(
    "thoughts",
    [
        "Okay.\n<think>hmm</think>", "A <think> tag?\n</think>",
        "<think>\nOne\n<think>\ntwo\n</think>\nthree\n</think>", "<think>He writes <think>b</think> here.</think>",
        "[think]so[/think]", "4. Instruction: a draft\n4. Output: x\n</think>",
    ],
)  # fmt: skip
def test_thoughts_that_speak_of_thoughts(thoughts):
    """A tag within the thoughts took their end for its own, and all of them stayed, or nothing did."""
    answer = "Write it so:\n<think>\nhmm\n</think>\nThat is all."
    assert visible_text(f"{thoughts}\nDone.").strip() == "Done."
    assert visible_text(f"{thoughts}\n{answer}").strip() == answer
    assert visible_text("<think>He wants a <think> tag explained.</think>\nDone.").strip() == "Done."
    assert visible_text("[Reasoning]\nGood.\n\nRating: 4") == "[Reasoning]\nGood.\n\nRating: 4"


@pytest.mark.parametrize("header", ["Instruction:", "### Instruction:", "**Instruction**:"])
def test_numbered_fields_in_an_answer_are_text(header):
    """ "2. Output: a number." in one answer made the reply a numbered one: its tasks became one row, with the others in
    its output."""
    stages = "Three stages:\n1. Input: data comes in.\n2. Output: a number."
    tasks = [("Explain the stages of computing.", "", stages), ("Name two planets now.", "", "Mars, Venus")]
    for talk in ("", "Here are the tasks:\n\n"):
        text = talk + "".join(f"{header} {i}\n{header.replace('Instruction', 'Output')} {o}\n\n" for i, _, o in tasks)
        assert rows(parse_reply(text, 4)) == tasks


def test_the_last_line_of_an_answer_stays():
    """A fifth step before task 5 went as its title, or beside its title; "_ _ _" went as a rule."""
    steps = [f"**{n}. Step:** do it" for n in range(1, 6)]
    for title, answer in (
        ("", "\n".join(steps)), ("**Task {n}**\n", "\n".join(steps)), ("**Task {n}**\n", "Five letters:\n_ _ _ _ _"),
    ):  # fmt: skip
        tasks = [("Explain this in five steps.", "", answer), ("Name two planets now.", "", "Mars, Venus")]
        text = "Here they are:\n\n"
        for number, (instruction, _, output) in enumerate(tasks, 4):
            text += f"{title.format(n=number)}Instruction: {instruction}\nOutput: {output}\n\n"
        assert rows(parse_reply(text, 4)) == tasks


def test_marks_of_the_chat_format_end_a_reply():
    """<|im_end|> stood in the last output, and behind it the turns that a runaway model made up."""
    text = write_reply("{n}. {f}:", "\n").rstrip()
    for end in ("<|im_end|>", "<|im_end|>\n<|im_start|>user\nMore.", "</s>", "<|eot_id|>\n", "<end_of_turn>"):
        assert rows(parse_reply(text + end, 4)) == TASKS
    assert visible_text("<s>old</s> new") == "<s>old</s> new"


@pytest.mark.parametrize("header", ["{f}:", "**{f}:**", "{n}. {f}:", "**{n}. {f}:**"])
@pytest.mark.parametrize(
    "title", ["**Task {n}: French**\n", "## {n}. French\n", "### Task {n} - French\n\n", "**{n}. French:**\n"]
)
def test_titles_with_a_name_are_no_part_of_the_answer_before(header, title):
    """ "**Task 5: French**" stayed at the end of task 4's output."""
    text = ""
    for number, (instruction, given, output) in enumerate(TASKS, start=4):
        text += title.format(n=number) if number > 4 else ""
        for field, value in (("Instruction", instruction), ("Input", given or "<noinput>"), ("Output", output)):
            text += f"{header.format(f=field, n=number)} {value}\n"
        text += "\n"
    assert rows(parse_reply(text.removeprefix(header.format(f="Instruction", n=4)), 4)) == TASKS
    assert rows(parse_reply("Sure!\n\n" + title.format(n=4) + text, 4)) == TASKS


@pytest.mark.parametrize("last", ["**3. Serve**", "## 3. Serve", "3. Serve", "**Step 3: Serve**", "Task 9: rest."])
def test_the_last_line_of_a_list_is_no_title(last):
    """A title carries the next task's number."""
    tasks = [("Explain how to make tea.", "", f"**1. Boil**\n**2. Pour**\n{last}"), ("Name a colour now.", "", "Red")]
    for header in ("{n}. {f}:", "{f}:"):
        text = "".join(
            f"{header.format(n=n, f='Instruction')} {i}\n{header.format(n=n, f='Output')}\n{o}\n\n"
            for n, (i, _, o) in enumerate(tasks, 4)
        )
        assert rows(parse_reply(text.removeprefix("4. Instruction:"), 4)) == tasks


@pytest.mark.parametrize(
    "remark",
    [
        "Let me know if you need more tasks!", "I hope these tasks are helpful.", "---\n\nFeel free to ask for more.",
        "These tasks cover many kinds of work.", "If you'd like changes, just let me know.", "---", "```", "***",
        "Would you like me to go on?", "Please let me know if anything is unclear.", "End of the list.",
    ],
)  # fmt: skip
def test_remarks_rules_and_fences_behind_the_list(remark):
    """They ended up in the last output."""
    text = write_reply("{n}. {f}:", "\n").rstrip()
    assert rows(parse_reply(f"{text}\n\n{remark}", 4)) == TASKS


def test_the_last_line_of_a_letter_is_no_remark():
    letter = "Dear Ann,\n\nThe train leaves at five.\n\nLet me know if that suits you."
    (task,) = parse_reply(f"Write a short letter.\n4. Output:\n{letter}", 4)
    assert task.output == letter
    hope = "She waited.\n\nI hope the weather holds, he said."
    assert parse_reply(f"Write a short story.\n4. Output:\n{hope}", 4)[0].output == hope


LANGUAGES = {
    "de": ("Anweisung", "Eingabe", "Ausgabe"), "fr": ("Consigne", "Entrée", "Sortie"), "zh": ("指令", "输入", "输出"),
    "es": ("Instrucción", "Entrada", "Salida"), "ru": ("Инструкция", "Ввод", "Вывод"), "ja": ("指示", "入力", "出力"),
    "vi": ("Hướng dẫn", "Đầu vào", "Đầu ra"), "ar": ("التعليمات", "المدخلات", "المخرجات"),
    "ko": ("지시", "입력", "출력"), "other words": ("Instruction", "Context", "Response"),
}  # fmt: skip


@pytest.mark.parametrize("names", LANGUAGES.values(), ids=LANGUAGES)
@pytest.mark.parametrize("header", ["{n}. {f}:", "**{n}. {f}：**", "### {f}", "{f}:"])
def test_headers_in_other_languages(names, header):
    """A whole reply was lost because its headers were translated like the rest."""
    text = write_reply(header, "###\n")
    for english, name in zip(("Instruction", "Input", "Output"), names, strict=True):
        text = re.sub(rf"\b{english}\b(?=[:：*]|$)", name, text, flags=re.M)
    assert rows(parse_reply(text, 4)) == TASKS


def test_xml_replies():
    """Some chat models answer in elements."""
    text = "Here you are.\n<tasks>\n"
    for instruction, given, output in TASKS:
        text += f"<task id='1'>\n<instruction>{instruction}</instruction>\n<input>{given}</input>\n"
        text += f"<output>\n{output.replace('|', '&#124;')}\n</output></task>\n"
    assert rows(parse_reply(text + "</tasks>", 4)) == TASKS
    assert rows(parse_reply(text + "<task><instruction>Half of a task", 4, cut=True)) == TASKS


@pytest.mark.parametrize(
    ("text", "look"),
    [
        ("| Instruction | Output |\n|---|---|\n| Name a colour. | Red |", "a table, which begins:\n    | Instr"),
        ("I would rather talk about the weather.", "without the headers Instruction:"),
        ('{"tasks": [{"question": "?"}]}', "JSON or XML of another form"),
    ],
)
def test_what_a_reply_without_tasks_looks_like(text, look):
    """Replies in a form that is not read were only counted, so that nobody knew what to change."""
    assert all(task.problem for task in parse_reply(text, 4)) and look in look_of(text)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(st.text(max_size=300), st.booleans(), st.booleans())
def test_no_text_breaks_the_parser(text, cut, outputs):
    """Teachers write anything; the parser never raises."""
    for reply in (text, f"4. Instruction:{text}\n5. Input: {text}\n## Output\n{text}", '{"instruction": ' + text):
        parse_reply(reply, 4, cut, outputs)


def test_long_runs_of_signs_are_read_in_linear_time():
    """A pattern that backtracks would take hours on these."""
    for run in ("-" * 500_000, "#" * 500_000, "* " * 250_000, "1" * 500_000, "\n" * 500_000, "4. " * 200_000,
                "{" * 200_000 + '"instruction"'):  # fmt: skip
        parse_reply(f"Do it now.\n4. Output:\n{run}x\n{run}", 4)


def test_no_swallowed_task_in_any_style():
    """Every header style with every separator: no output holds the next task."""
    for one in HEADERS:
        for separator in SEPARATORS:
            text = write_reply(one, separator)
            tasks = parse_reply(text, 4)
            assert len(tasks) == len(TASKS), (one, separator)
            assert not any(contains_task_header(task.output) for task in tasks)
