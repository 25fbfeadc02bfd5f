"""What data sets teach: one model fine-tuned on each, with the same steps, settings and seed, and measured alike.

    python local_llm.py export_hf --output_dir base
    python fetch_data.py
    python benchmarks/compare_data.py --model base --data seeds=seed_tasks.jsonl,new=alpaca_data.json \\
        --released data/stanford/alpaca_data.json --output_dir comparison

Of the released rows as many are drawn as the largest other file has, and further ones on which no model is trained.
With the embedded model on two CPU cores a training of 64 steps takes about six minutes. What an interrupted run has
finished is not done again.
"""

import random
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alpaca.common.cli import run_cli
from alpaca.common.errors import UserError
from alpaca.common.files import jdump, jload
from alpaca.common.journal import changed_settings
from alpaca.common.paths import ROOT
from alpaca.common.run_record import sha256_file
from alpaca.common.tasks import load_tasks

COLUMNS = (
    ("loss, evaluation tasks", "tasks", "loss", "{:.4f}"), ("loss, released rows", "rows", "loss", "{:.4f}"),
    ("ROUGE-L", "tasks", "rouge_l", "{:.4f}"), ("answers that end", "tasks", "answers_ended", "{:.0%}"),
    ("tokens an answer", "tasks", "mean_answer_tokens", "{:.1f}"),
)  # fmt: skip


def compare(
    model: str,
    data: str,
    released: str,
    output_dir: str,
    max_steps: int = 64,
    held_out: int = 500,
    rouge_tasks: int = 60,
    repetition_penalty: float = 1.0,
    draw_seed: int = 0,
) -> None:
    """Prints a table with a line for the base and for each data set, and writes it to OUTPUT_DIR/table.md.

    Args:
        model: the base, a checkpoint's folder.
        data: name=file, comma-separated.
        released: the rows that Stanford released, from fetch_data.py.
        output_dir: models, figures and the table.
        max_steps: of eight rows each, with the settings of configs/quickstart_cpu.yaml.
        held_out: released rows that nothing is trained on.
        rouge_tasks: how many of configs/eval_tasks.jsonl are answered, greedily, in at most 128 tokens.
        repetition_penalty: of the answers.
        draw_seed: of the draw among the released rows.
    """
    folder = Path(output_dir).absolute()
    files = dict(part.split("=", 1) for part in data.split(",") if "=" in part)
    if len(files) != data.count(",") + 1:
        raise UserError(f"--data takes name=file, comma-separated, found {data!r}.")
    if taken := files.keys() & {"base", "released", "figures"}:
        raise UserError(f"--data: {min(taken)} is a name of this script's own; choose another.")
    settings = {"model": model, "data": data, "released": released, "max_steps": max_steps, "held_out": held_out}
    settings |= {"rouge_tasks": rouge_tasks, "draw_seed": draw_seed}
    settings["sha256"] = [sha256_file(file)[:16] for file in (*files.values(), released)]
    earlier = jload(folder / "settings.json") if (folder / "settings.json").is_file() else settings
    if changed := changed_settings(earlier, settings):
        shown = "; ".join(f"{name} {change}" for name, change in changed.items())
        raise UserError(f"{folder} holds a comparison with other settings ({shown}). Choose another --output_dir.")
    size = max(len(load_tasks(file)) for file in files.values())
    rows = load_tasks(released)
    if len(rows) < size + held_out:
        raise UserError(
            f"{released} has {len(rows):,} rows; {size:,} are trained on, as many as in the largest other file, and "
            f"{held_out:,} kept out. Give a smaller --held_out, or the whole release: python fetch_data.py"
        )
    drawn = random.Random(draw_seed).sample(rows, size + held_out)
    jdump(settings, folder / "settings.json")
    for name, rows in (("released", drawn[:size]), ("held_out", drawn[size:])):
        jdump(rows, folder / f"{name}.json")
    files = {name: Path(file).absolute() for name, file in files.items()} | {"released": folder / "released.json"}

    models = {"base": Path(model).absolute()}
    for name, file in files.items():
        models[name] = folder / name
        if not (folder / name / "Modelfile").is_file():  # the last file that a run writes
            run("train.py", "configs/quickstart_cpu.yaml", "--model_name_or_path", models["base"], "--data_path", file,
                "--output_dir", folder / name, "--max_steps", max_steps, "--overwrite", True)  # fmt: skip
    answers = ("--rouge_tasks", rouge_tasks, "--max_new_tokens", 128, "--repetition_penalty", repetition_penalty)
    figures: dict[str, dict[str, dict]] = {name: {} for name in models}
    for name, path in models.items():
        for what, place, file, options in (
            ("tasks", f"{name}_tasks_penalty_{repetition_penalty:g}", "configs/eval_tasks.jsonl", answers),
            ("rows", f"{name}_rows", folder / "held_out.json", ("--rouge_tasks", 0)),
        ):
            found = folder / "figures" / place
            if not (found / "loss.json").is_file():
                run("evaluation.py", "loss", "--model_name_or_path", path, "--data_path", file, "--output_dir", found,
                    "--overwrite", True, *options)  # fmt: skip
            figures[name][what] = jload(found / "loss.json")["model"]
    table = "\n".join(table_lines(figures)) + "\n"
    print(table)
    jdump(table, folder / "table.md")


def run(script: str, *arguments: object) -> None:
    """Runs a command of the project, its output on the screen; ends where it fails."""
    done = subprocess.run([sys.executable, script, *map(str, arguments)], cwd=ROOT)
    if done.returncode:
        raise UserError(f"`{script} {' '.join(map(str, arguments))}` failed; the same command goes on from here.")


def table_lines(figures: dict[str, dict[str, dict]]) -> list[str]:
    titles = ["trained on", *(title for title, *_ in COLUMNS)]
    lines = [f"| {' | '.join(titles)} |", "| --- |" + " ---: |" * len(COLUMNS)]
    for name, found in figures.items():
        cells = [name, *(form.format(found[what][key]) for _, what, key, form in COLUMNS)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    run_cli({"compare": compare}, default="compare")
