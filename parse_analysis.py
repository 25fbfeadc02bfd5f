"""Shows how diverse a dataset's instructions are: the commonest root verbs, each with its commonest direct objects.

    python parse_analysis.py --data_path alpaca_data.json --output_dir output/diversity          # 52,002 rows: a minute
    python parse_analysis.py --data_path seed_tasks.jsonl --output_dir output/diversity_seeds     # seconds
    python parse_analysis.py --data_path alpaca_data.json --compare seed_tasks.jsonl --output_dir output/both

The two-ring figure is the one of the Self-Instruct paper: inside the 20 commonest verbs, outside the 4 commonest
objects of each. Written: verb_object.png, verb_object.html (hover for counts), lengths.png and analysis.json (all
counts, entropies, length histograms, and how many instructions have no such pair).
"""

from pathlib import Path

from alpaca.common.cli import at_least_one, run_cli
from alpaca.common.files import jdump, refuse_existing
from alpaca.common.run_record import run_record
from alpaca.common.tasks import load_tasks


def analyze(
    data_path: str,
    output_dir: str,
    compare: str | None = None,
    verbs: int = 20,
    objects: int = 4,
    num_processes: int = 2,
    overwrite: bool = False,
) -> None:
    """Draws the verb-object figure of `data_path`, beside `compare` where one is given, into `output_dir`.

    Args:
        data_path: alpaca_data.json, regen.json, seed_tasks.jsonl, or another file of tasks.
        output_dir: Where the figures and the counts go.
        compare: A second file of tasks, drawn beside the first.
        verbs: How many verbs stand in the inner ring.
        objects: How many objects stand behind each verb.
        num_processes: Parser processes.
        overwrite: Replace an earlier analysis in output_dir.
    """
    at_least_one(verbs=verbs, objects=objects, num_processes=num_processes)
    paths = [data_path] if compare is None else [data_path, compare]
    datasets = {name: load_tasks(path, require_output=False) for name, path in zip(names(paths), paths, strict=True)}
    folder = Path(output_dir)
    refuse_existing(folder / "analysis.json", overwrite)

    from alpaca.answers import diversity, diversity_figures

    with run_record(folder, {"verbs": verbs, "objects": objects, "num_processes": num_processes}, inputs=paths):
        summaries = {}
        for name, tasks in datasets.items():
            pairs = diversity.parse_instructions([task["instruction"] for task in tasks], num_processes)
            summaries[name] = diversity.summarize(tasks, pairs, verbs, objects)
        jdump(summaries, folder / "analysis.json")
        diversity_figures.save_png(diversity_figures.ring_figure(summaries), folder / "verb_object.png")
        diversity_figures.save_png(diversity_figures.length_figure(summaries), folder / "lengths.png")
        diversity_figures.save_html(summaries, folder / "verb_object.html")
    for name, summary in summaries.items():
        print(f"\n{name}: {summary['rows']:,} instructions, {summary['with_verb_and_object']:,} with verb and object, "
              f"{summary['distinct_verbs']:,} verbs ({summary['verb_entropy_bits']:.2f} bits), "
              f"{summary['distinct_pairs']:,} pairs ({summary['pair_entropy_bits']:.2f} bits)")  # fmt: skip
        for entry in summary["top"]:
            shown = ", ".join(f"{noun} {count:,}" for noun, count in entry["objects"])
            print(f"  {entry['verb']:<12}{entry['count']:>7,}   {shown}")
    print(f"\nwritten to {folder}: verb_object.png, verb_object.html, lengths.png, analysis.json")


def names(paths: list[str]) -> list[str]:
    """File names as titles; the whole paths where two files are called the same."""
    short = [Path(path).name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


if __name__ == "__main__":
    run_cli({"analyze": analyze}, default="analyze")
