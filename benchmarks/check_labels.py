"""Compares every row's ids and labels with the original's rule, and explains each row that differs.

    python benchmarks/check_labels.py --data_path alpaca_data.json --tokenizer huggyllama/llama-7b   # all rows, minutes
    python benchmarks/check_labels.py --data_path alpaca_data.json --tokenizer huggyllama/llama-7b --max_samples 2000

The original's rule, written here a second time on the tokenizer's own calls: the ids of prompt + output + EOS, cut at
the longest length; labels are the same ids, as many masked at the front as the prompt alone has tokens. A difference is
explained where one token of the whole text covers characters on both sides of the prompt's end. Exits 1 where a
difference has another cause, or where a row's ids do not decode to its own text.
"""

import collections
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alpaca.common.cli import run_cli
from alpaca.common.errors import UserError
from alpaca.common.prompt import IGNORE_INDEX, format_prompt
from alpaca.training.data import load_rows, tokenize_dataset

BATCH = 1000


def load_tokenizer(name: str):
    """Any checkpoint's tokenizer; a folder with nothing but a tokenizer.model is read as LLaMA's, with BOS."""
    from transformers import AutoTokenizer, LlamaTokenizer

    folder = Path(name)
    if folder.is_dir() and not any((folder / file).is_file() for file in ("tokenizer_config.json", "vocab.json")):
        return LlamaTokenizer.from_pretrained(name, add_bos_token=True)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer {name} cannot be read: {error}") from error


def original_rule(tokenizer, prompts: list[str], targets: list[str], max_length: int) -> list[tuple[list, list, list]]:
    """(ids, labels, character spans) of each row."""
    limit = dict(truncation=True, max_length=max_length)
    whole = tokenizer([a + b for a, b in zip(prompts, targets, strict=True)], return_offsets_mapping=True, **limit)
    alone = tokenizer(prompts, **limit)
    rows = []
    for ids, spans, prompt in zip(whole["input_ids"], whole["offset_mapping"], alone["input_ids"], strict=True):
        rows.append((ids, [IGNORE_INDEX] * min(len(prompt), len(ids)) + ids[len(prompt) :], spans))
    return rows


def check(data_path: str, tokenizer: str, max_length: int = 512, max_samples: int | None = None) -> int:
    """Prints a table of equal, explained and unexplained rows; returns 1 where one is unexplained.

    `tokenizer`: a checkpoint's folder or name. `max_length` in tokens, as --model_max_length of train.py.
    """
    tok = load_tokenizer(tokenizer)
    rows = load_rows(data_path, max_samples)
    with tempfile.TemporaryDirectory() as cache:
        dataset = tokenize_dataset(rows, tok, max_length, cache_dir=cache)
        kept = {int(row): place for place, row in enumerate(dataset["row"][:])}
        counts: collections.Counter[str] = collections.Counter()
        tokens: collections.Counter[str] = collections.Counter()
        faults = []
        for start in range(0, len(rows), BATCH):
            chunk = rows[start : start + BATCH]
            prompts = [format_prompt(row) for row in chunk]
            targets = [row["output"] + tok.eos_token for row in chunk]
            alone = tok(prompts)["input_ids"]
            for number, (ids, labels, spans) in enumerate(original_rule(tok, prompts, targets, max_length)):
                row, prompt = start + number, prompts[number]
                if row not in kept:
                    untrained = all(label == IGNORE_INDEX for label in labels)
                    counts["dropped, the original has no label either" if untrained else "dropped for no reason"] += 1
                    faults += [] if untrained else [row]
                    continue
                ours = dataset[kept[row]]
                if ours["input_ids"].tolist() == ids and ours["labels"].tolist() == labels:
                    counts["equal ids and labels"] += 1
                    continue
                seam = [i for i, (begin, end) in enumerate(spans) if begin < len(prompt) < end]
                text = tok.decode(ours["input_ids"])
                length = int(ours["prompt_length"])
                explained = (
                    bool(seam)
                    and ours["input_ids"][:length].tolist() == alone[number]
                    and (len(ours["input_ids"]) == max_length or text.endswith(prompt + targets[number]))
                )
                counts["differ, one token straddles the prompt's end" if explained else "differ, unexplained"] += 1
                if explained:
                    tokens[tok.convert_ids_to_tokens(ids[seam[0]])] += 1
                else:
                    faults.append(row)
    print(f"| {len(rows):,} rows of {Path(data_path).name}, {type(tok).__name__}, at most {max_length} tokens | rows |")
    print("| --- | ---: |")
    for name, count in counts.most_common():
        print(f"| {name} | {count:,} |")
    print("\nstraddling tokens: " + ", ".join(f"{token!r} {count:,}" for token, count in tokens.most_common(20)))
    if faults:
        print(f"\nunexplained rows (the first is 0): {', '.join(map(str, faults[:20]))}")
    return 1 if faults else 0


if __name__ == "__main__":
    run_cli({"check": check}, default="check")
