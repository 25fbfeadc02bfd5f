"""data_check.py and filters.py: every kind of bad row is found, and `clean` writes the others."""

import json

import pytest

from alpaca.generation import data_check
from alpaca.generation.filters import (
    contains_task_header,
    find_word_in_string,
    instruction_problem,
    is_no_input,
    normalize_input,
    output_problem,
)

GOOD = [
    {"instruction": "Name three fruits that grow on trees.", "input": "", "output": "Apples, pears and plums."},
    {"instruction": "Sort the words by the alphabet.", "input": "pear, fig", "output": "fig, pear", "note": "kept"},
    {"instruction": "Erkläre kurz, was ein Fluß ist.", "input": "", "output": "Fließendes Wasser – in einem Bett."},
]
BAD = [
    ("unreadable", {"instruction": "Write about the sea.", "input": "x"}),
    ("unreadable", ["not", "an", "object"]),
    ("unreadable", {"instruction": "Add up all the numbers.", "input": 3, "output": "3"}),
    ("output: empty output", {"instruction": "Tell me a short joke.", "input": "", "output": " \n"}),
    ("output: placeholder output", {"instruction": "Design an emblem for us.", "input": "", "output": "<nooutput>"}),
    (
        "output: refusal",
        {"instruction": "Wake me up at five.", "input": "", "output": "As an AI language model, I cannot do that."},
    ),
    (
        "output: contains the next task",
        {
            "instruction": "Give advice about sleeping well.",
            "input": "",
            "output": "Go to bed early.\n##\n18. Instruction: Identify the noun.\n18. Input:\nThe apple\n",
        },
    ),
    ("instruction: fewer than 4 words", {"instruction": "Say a word.", "input": "", "output": "Word."}),
    (
        'instruction: asks for more than text: "picture"',
        {"instruction": "Describe the Picture of an old castle.", "input": "", "output": "Old."},
    ),
    ("exact duplicate", {**GOOD[1], "instruction": "SORT the words by the alphabet. ", "output": "another"}),
    (
        "near duplicate",
        {"instruction": "Name four fruits that grow on trees.", "input": "", "output": "Figs, dates, limes, kiwis."},
    ),
]
MARKERS = [
    (
        data_check.NO_INPUT,
        {"instruction": "Compare tea with strong coffee.", "input": "<No Input>.", "output": "Weaker."},
    ),
    (data_check.OTHER_MARKER, {"instruction": "Explain why the sky is blue.", "input": "N/A", "output": "Scattering."}),
]
ROWS = [GOOD[0], GOOD[1], *[row for _, row in BAD], *[row for _, row in MARKERS], GOOD[2]]


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")
    return path


def test_check_names_each_bad_row(run_script, dataset, tmp_path):
    """Guards the report: each kind of fault under its name and row, both texts of a duplicate, exit status 1."""
    report_path = tmp_path / "report.json"
    done = run_script("generate_instruction.py", "check", dataset, "--json_path", report_path, status=1)
    report = json.loads(report_path.read_text(encoding="utf-8"))
    found = {(name, entry["row"]) for name, entries in report["problems"].items() for entry in entries}
    assert found == {(name, number) for number, (name, _) in enumerate(BAD + MARKERS, start=3)}
    assert report["rows"] == len(ROWS) and report["bad_rows"] == len(BAD) + len(MARKERS)
    assert report["problems"]["near duplicate"] == [
        {
            "row": 13,
            "text": "Name four fruits that grow on trees.",
            "f1": 2 * (6 / 7) * (6 / 7) / (6 / 7 + 6 / 7),
            "repeats_row": 1,
            "repeats": "Name three fruits that grow on trees.",
        }
    ]
    for text in (
        "16 rows, 13 of them",
        "'output' is missing",
        "Name four fruits",
        "Name three fruits",
        "18. Instruction",
    ):
        assert text in done.stdout, text


def test_check_of_good_rows_exits_0(run_script, tmp_path):
    """Guards use in scripts: status 0 exactly where nothing is wrong, for JSONL and regen.json rows as well."""
    path = tmp_path / "regen.jsonl"
    extra = {"most_similar_instructions": {"a": 0.1}, "avg_similarity_score": 0.05}
    path.write_text("".join(json.dumps({**row, **extra}) + "\n" for row in GOOD), encoding="utf-8")
    done = run_script("generate_instruction.py", "check", path)
    assert "3 rows, 0 of them with a problem" in done.stdout


def test_the_data_that_ships_is_clean(run_script):
    """Guards the project's own data against the faults that it reports in others'."""
    run_script("generate_instruction.py", "check", "alpaca_data.json")
    run_script("generate_instruction.py", "check", "seed_tasks.jsonl")


def test_the_data_that_ships_holds_no_evaluation_task(run_script):
    """Guards the project's figures on configs/eval_tasks.jsonl: none of its tasks stands in the training data."""
    against = ("--against", "configs/eval_tasks.jsonl", "--against_threshold", "0.5")
    done = run_script("generate_instruction.py", "check", "alpaca_data.json", *against)
    assert done.stdout.count(" 0  in an evaluation set: ") == 3


def test_clean_writes_the_good_rows(run_script, dataset, tmp_path):
    """Guards `clean`: good rows unchanged in their order, markers emptied, UTF-8 with indent 4, and check passes."""
    output = tmp_path / "clean.json"
    done = run_script("generate_instruction.py", "clean", dataset, "--output", output)
    want = [GOOD[0], GOOD[1], *[{**row, "input": ""} for _, row in MARKERS], GOOD[2]]
    assert output.read_text(encoding="utf-8") == json.dumps(want, ensure_ascii=False, indent=4)
    assert "5 rows written, 11 dropped" in done.stdout and "refusal" in done.stdout
    run_script("generate_instruction.py", "check", output)


def test_clean_leaves_files_alone(run_script, dataset, tmp_path):
    """Guards other people's results: no overwriting without the flag, nothing written where no row is good."""
    output = tmp_path / "clean.json"
    output.write_text("mine")
    done = run_script("generate_instruction.py", "clean", dataset, "--output", output, status=2)
    assert "--overwrite True" in done.stderr and output.read_text() == "mine"
    run_script("generate_instruction.py", "clean", dataset, "--output", output, "--overwrite", "True")
    assert len(json.loads(output.read_text())) == 5

    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(BAD[3][1]))
    done = run_script("generate_instruction.py", "clean", bad, "--output", tmp_path / "none.jsonl", status=2)
    assert "no row" in done.stderr and not (tmp_path / "none.jsonl").exists()


def test_a_bad_row_takes_no_good_one_with_it(run_script, tmp_path):
    """Guards the order of filters: the good row stays where an earlier row with the same instruction has no output."""
    path, output, report_path = tmp_path / "data.jsonl", tmp_path / "clean.jsonl", tmp_path / "report.json"
    rows = [{**GOOD[0], "output": ""}, GOOD[0], {**GOOD[0], "output": "again"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("--json_path", report_path, "--overwrite", "True")
    for command, more, repeated in (("clean", ("--output", output), [3]), ("check", (), [2, 3])):
        run_script("generate_instruction.py", command, path, *more, *arguments, status=int(command == "check"))
        problems = json.loads(report_path.read_text())["problems"]
        assert [entry["row"] for entry in problems[data_check.EXACT]] == repeated
    assert json.loads(output.read_text()) == GOOD[0]


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_dedup_keeps_rows_as_they_stand(run_script, tmp_path, ending):
    """Guards `dedup`: only duplicates and unreadable rows go, no filter and no repair touches the others. Instructions
    without an answer are rows too."""
    path, output = tmp_path / "data.json", tmp_path / f"unique.{ending}"
    unanswered = {"instruction": "Count all the birds on this roof."}
    rows = [
        *ROWS,
        unanswered,
        dict(unanswered),
        {"instruction": "写", "instances": [{"input": "n/a", "output": ""}], "more": {"a": [1.5, None]}},
    ]
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    done = run_script("generate_instruction.py", "dedup", path, "--output", output)
    gone = ("unreadable", "exact duplicate", "near duplicate")
    want = [GOOD[0], GOOD[1], *[row for kind, row in BAD if kind not in gone or row == BAD[0][1]]]
    want += [*[row for _, row in MARKERS], GOOD[2], unanswered, rows[-1]]
    if ending == "json":
        assert output.read_text(encoding="utf-8") == json.dumps(want, ensure_ascii=False, indent=4)
    else:
        assert [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()] == want
    assert f"{len(want)} rows written, 5 dropped" in done.stdout and "refusal" not in done.stdout


def test_several_processes_find_the_same(tmp_path, monkeypatch, capsys):
    """Guards large files: batches from several processes in order, the same report and rows as from one."""
    path, found = tmp_path / "data.jsonl", []
    rows = [dict(row, number=i) if isinstance(row, dict) else row for i in range(9) for row in ROWS]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    for cores, one_process, batch in ((1, 0, 1000), (2, 0, 7), (3, 0, 50)):
        monkeypatch.setattr(data_check, "CORES", cores)
        monkeypatch.setattr(data_check, "ONE_PROCESS", one_process)
        monkeypatch.setattr(data_check, "BATCH", batch)
        report, clean = tmp_path / "report.json", tmp_path / "clean.jsonl"
        data_check.clean(str(path), str(clean), json_path=str(report), overwrite=True)
        figures = json.loads(report.read_text(encoding="utf-8"))
        found.append((figures["problems"], figures["lengths"], clean.read_bytes()))
    assert found[0] == found[1] == found[2]
    assert len(found[0][2].splitlines()) == 5 and len(found[0][0][data_check.EXACT]) == 5 * 8 + 9
    assert f"and {5 * 8 + 9 - 3} more" in capsys.readouterr().out


EVALUATION = [
    {
        "instruction": "Name two famous fruits that grow on very tall trees, please.",
        "instances": [{"input": "", "output": "Figs."}],
    },
    {
        "instruction": "Summarise this.",
        "input": "One two three four five six seven eight nine ten eleven twelve thirteen fourteen.",
        "output": "zero one two three four five six",
    },
]
WORDS = EVALUATION[1]["input"].split()
LEAKS = [
    (
        {
            "instruction": "Name three famous fruits that grow on very tall trees, please.",
            "input": "",
            "output": "Apples.",
        },
        1,
    ),
    ({"instruction": "Count upwards for me, please.", "input": "", "output": "So: " + " ".join(WORDS[:13])}, 2),
    ({"instruction": "Repeat what you see here.", "input": "(ONE! " + ", ".join(WORDS[1:]) + ")", "output": "No."}, 2),
    ({"instruction": "Sum up this long text.", "input": "a b c d " + " ".join(WORDS[1:]) + " x", "output": "Sum."}, 2),
]
CLEAN_OF_EVALUATION = [
    {"instruction": "Count a little way up.", "input": "", "output": " ".join(WORDS[:12]) + " end"},
    {"instruction": "Count in a broken way.", "input": " ".join([*WORDS[:7], "x", *WORDS[7:]]), "output": "Done."},
    {"instruction": "Count across two of its texts.", "input": " ".join(WORDS[8:] + WORDS[:6]), "output": "Done."},
]


def test_rows_that_stand_in_an_evaluation_set(run_script, tmp_path):
    """Guards `--against`: instructions above the threshold, 13 words in a row wherever they begin, and no 12 words."""
    path, tasks, report_path = tmp_path / "data.json", tmp_path / "tasks.jsonl", tmp_path / "report.json"
    rows = [GOOD[0], *CLEAN_OF_EVALUATION, *[row for row, _ in LEAKS], GOOD[1]]
    path.write_text(json.dumps(rows), encoding="utf-8")
    tasks.write_text("".join(json.dumps(task) + "\n" for task in EVALUATION), encoding="utf-8")
    against = ("--against", f"seed_tasks.jsonl,{tasks}")
    done = run_script("generate_instruction.py", "check", path, *against, "--json_path", report_path, status=1)
    problems = json.loads(report_path.read_text(encoding="utf-8"))["problems"]
    found = {entry["row"]: entry for kind, entries in problems.items() if "evaluation" in kind for entry in entries}
    assert sorted(found) == [5, 6, 7, 8]
    for row, (task, source) in zip((5, 6, 7, 8), LEAKS, strict=True):
        assert (found[row]["against"], found[row]["against_row"]) == (str(tasks), source)
        assert found[row]["text"] in task.values()
    assert found[5]["f1"] == 2 * (10 / 11) * (10 / 11) / (10 / 11 + 10 / 11)
    assert found[5]["against_text"] == EVALUATION[0]["instruction"]
    assert found[6]["words"] == " ".join(WORDS[:13]).lower() and found[6]["against_text"] == EVALUATION[1]["input"]
    assert found[7]["words"].endswith("thirteen fourteen") and len(found[8]["words"].split()) == 13
    for text in ("13 words of the input", "13 words of the output", "F1 0.9091 with row 1 of", "Name two famous"):
        assert text in done.stdout, text

    run_script("generate_instruction.py", "clean", path, *against, "--output", tmp_path / "clean.json")
    assert json.loads((tmp_path / "clean.json").read_text()) == [GOOD[0], *CLEAN_OF_EVALUATION, GOOD[1]]
    strict = ("--against_threshold", "0.6", "--json_path", report_path, "--overwrite", "True")
    run_script("generate_instruction.py", "check", path, *against, *strict, status=1)
    entries = json.loads(report_path.read_text(encoding="utf-8"))["problems"][data_check.EVALUATED]
    assert [entry["row"] for entry in entries] == [1, 5]


def test_user_errors(run_script, dataset):
    """Guards messages for people: a missing file, broken JSON and a threshold in percent end with status 2."""
    assert (
        "Did you mean" in run_script("generate_instruction.py", "check", dataset.with_name("dta.json"), status=2).stderr
    )
    done = run_script("generate_instruction.py", "check", dataset, "--threshold", "70", status=2)
    assert "--threshold" in done.stderr and "Traceback" not in done.stderr
    done = run_script("generate_instruction.py", "check", dataset, "--against", "seed_task.jsonl", status=2)
    assert "Did you mean ./seed_tasks.jsonl" in done.stderr
    dataset.write_text('[{"instruction": "cut')
    assert "not valid JSON" in run_script("generate_instruction.py", "check", dataset, status=2).stderr


@pytest.mark.parametrize(
    "text",
    ["No input", "Noinput", "<no input>", "<NO INPUT>", "no input.", '"<noinput>"', "`<noinput>`", r"\<noinput\>",
     r"{\noinput}", "[No Input]", ":\n<noinput>", "<noinput?", "< noinput >", "no-input", "No_Input", "<noinput>\n11",
     "No input required.", "no input needed", "N/A", "n/a", "<N/A>", "NA", "None", "<none>", "none.", "(none provided)",
     "null", "nil", "Not applicable", "No additional input", "This task requires no input.", "There is no input."],
)  # fmt: skip
def test_no_input_markers(text):
    """Guards the spellings of "no input" that teachers use; 599 rows of the released data train models on them."""
    assert is_no_input(text) and normalize_input(text) == ""


@pytest.mark.parametrize(
    "text",
    ["", "No lemon", "The boy <noinput> the ball", "Na", "None of the students", "[3, 4, <noinput>]", "1->2->NULL",
     "Noisy", "No, I haven't seen it", "no", "nothing", "0", "-", "no input " * 50],
)  # fmt: skip
def test_inputs_that_are_inputs(text):
    """Guards real inputs that look like markers: gaps to fill, lists that end in NULL, sodium."""
    assert not is_no_input(text) and normalize_input(text) == text.strip()


@pytest.mark.parametrize(
    "instruction, reason",
    [
        ("Name a river", "fewer than 4 words"),
        ("Name a long river", None),
        (" ".join(["word"] * 150), None),
        (" ".join(["word"] * 151), "more than 150 words"),
        ("Write a program that sorts", 'starts with "Write a program"'),
        ("write a program that sorts", None),
        ("Describe the image you see", 'asks for more than text: "image"'),
        ("Imagine an imaginary imagery club", None),
        ("Please GO TO the shop now", 'asks for more than text: "go to"'),
        ("Profile the mapping of drawings", None),
        ("'Quote' this one for me", "starts with punctuation"),
        ("Élan is what you need", "starts with a non-ASCII character"),
        ("Need élan for this one", None),
        ("", "fewer than 4 words"),
        ("写一首关于春天的诗", "fewer than 4 words"),
    ],
)
def test_instruction_filters(instruction, reason):
    """Guards the original's filters: their limits, whole words in any case, and which beginnings are refused."""
    assert instruction_problem(instruction) == reason


def test_instructions_of_any_language():
    """Guards --unicode_dedup against filters that let no Chinese or French beginning pass."""
    assert instruction_problem("写一首关于春天的诗", any_language=True) is None
    assert instruction_problem("写诗", any_language=True) == "fewer than 4 words"
    assert instruction_problem("Écris un court poème", any_language=True) is None
    assert instruction_problem("Écris une description du plot", any_language=True) == 'asks for more than text: "plot"'


def test_find_word_in_string():
    """Guards the helper that forks import: whole words, any case, and signs that regular expressions read."""
    assert find_word_in_string("map", "The MAP.") and not find_word_in_string("map", "maps")
    assert not find_word_in_string("a.c", "abc")


@pytest.mark.parametrize(
    "output, reason",
    [
        ("", "empty output"),
        ("\n ", "empty output"),
        ("<nooutput>", "placeholder output"),
        ("No Output", "placeholder output"),
        ("<noinput> \n\nThe instruction cannot be completed.", "placeholder output"),
        ("N/A (no visual output)", "placeholder output"),
        ("[Insert bar chart]", "placeholder output"),
        ("<graph of cases by population>", "placeholder output"),
        ("[Picture of a bus with circles around its wheels]", "placeholder output"),
        ("...", "placeholder output"),
        ("None", "placeholder output"),
        ("[1, 2, 3]", None),
        ("<html>\n<body>picture</body>\n</html>", None),
        ('<img src="logo.png" alt="logo">', None),
        ("[Scene: A small park.]\n\nAlice: Hello!", None),
        ("0", None),
        ("I'm sorry, but I can't assist with that.", "refusal"),
        ("I’m unable to fulfill this request.", "refusal"),
        ("Sorry, this task involves creating visual output which the model cannot generate.", "refusal"),
        ("This task cannot be performed by a GPT model.", "refusal"),
        ("I'm sorry for what I said and did.", None),
        ("I apologize for arriving late - I could not find the road.", None),
        ("I can't believe that!", None),
        ("Unable to comprehend the problem, he sought help.", None),
        ("The task is hard, but it can be done.", None),
        ("This task cannot wait until tomorrow.", None),
        ("Sleep well.\n///\n14. Instruction: Calculate the mean.", "contains the next task"),
        ("Sleep well.\n\n\n6. Instruction: Sort the list.\n6. Input:\n3, 1", "contains the next task"),
        ("```\ncode\n```\n**7. Instruction:** Name a river.", "contains the next task"),
        ("Ingredients: eggs.\nInstructions:\n1. Beat the eggs.", None),
        ("4. Output the result\n5. Input and output devices: a mouse", None),
        ("# Output: 90", None),
    ],
)
def test_output_checks(output, reason):
    """Guards outputs: stand-ins and refusals go, while apologies, recipes, markup and lists that resemble them stay."""
    assert output_problem("Do what is asked of you.", output) == reason


def test_none_may_be_the_answer():
    """Guards "None" where the instruction offers it among the answers."""
    assert output_problem("Identify the type of correlation (positive, negative, or none).", "None.") is None
    assert contains_task_header("no header here, see 3. Instruction: below") is False


def test_blank_lines_cost_little():
    """Guards against patterns whose time grows with the square of a run of blanks: this one would take hours."""
    blanks = " " * 1_000_000
    for text in (f"a\n{blanks}b", f"{blanks}b", f"a{blanks}", "#" * 1_000_000, "[" + "a " * 500_000):
        assert output_problem("Do what is asked of you.", text) is None
        assert not is_no_input(text)
