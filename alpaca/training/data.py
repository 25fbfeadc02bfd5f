"""Training rows as tokens: loads tasks, tokenises them once into a memory-mapped cache, and builds batches.

Not a command; train.py imports it. To see what a model would be trained on:

    python train.py --model_name_or_path huggyllama/llama-7b --data_path alpaca_data.json --output_dir o --dry_run True
    python -c "from train_data import *; print(load_rows('seed_tasks.jsonl')[0])"

The cache lies in $XDG_CACHE_HOME/alpaca_tokens (~/.cache/alpaca_tokens), one folder per data, tokenizer, template,
length and rule; any of them may be deleted at any time.
"""

import contextlib
import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alpaca.common.errors import UserError
from alpaca.common.files import atomic_dir, jdump
from alpaca.common.prompt import PROMPT_DICT, format_prompt
from alpaca.common.run_record import sha256_file
from alpaca.common.tasks import check_tasks, load_tasks

IGNORE_INDEX = -100
TRUNCATIONS = ("cut", "cut_eos", "drop")

# Part of the cache's key: raised whenever the rule below or the layout on disk changes.
CACHE_VERSION = 1
# Rows given to the tokenizer at once: enough for all cores, few enough that the encodings stay in some 50 MB.
CHUNK = 2048

# ----------------------------------------------------------------------------------------------------------------------
# Rows.


def load_rows(data_paths: str | Sequence[str], max_samples: int | None = None) -> list[dict[str, Any]]:
    """Tasks of one or several sources, in order, at most `max_samples` of them.

    `data_paths`: a path, several in a list or separated by commas; each an alpaca_data.json, regen.json, JSONL or
    seed_tasks.jsonl file, or the name (or folder) of a Hugging Face dataset, whose train split is taken. Raises
    UserError that names file and row where a row cannot be read.
    """
    if isinstance(data_paths, str):
        data_paths = [data_paths] if Path(data_paths).is_file() else data_paths.split(",")
    rows = []
    for source in (str(path).strip() for path in data_paths):
        looks_like_file = Path(source).suffix in (".json", ".jsonl") or Path(source).is_file()
        rows += load_tasks(source) if looks_like_file else _load_hub_dataset(source)
    return rows[:max_samples]


def _load_hub_dataset(name: str) -> list[dict[str, Any]]:
    import datasets

    try:
        dataset = datasets.load_dataset(name, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise UserError(
            f"--data_path {name}: neither a file here nor a Hugging Face dataset that can be loaded ({error}). "
            "Give a .json or .jsonl file, or a dataset with the columns instruction, input, output."
        ) from error
    return check_tasks(list(dataset), name)


def split_validation(
    rows: Sequence[dict[str, Any]], val_size: int | float, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(train, validation): `val_size` rows, or that share of them where it is below 1, drawn by `seed`, order kept."""
    count = round(val_size * len(rows)) if 0 < val_size < 1 else int(val_size)
    if not 0 <= count < len(rows):
        raise UserError(f"--val_size {val_size} leaves nothing to train on: there are {len(rows)} rows.")
    held_out = set(random.Random(seed).sample(range(len(rows)), count))
    train = [row for number, row in enumerate(rows) if number not in held_out]
    return train, [rows[number] for number in sorted(held_out)]


# ----------------------------------------------------------------------------------------------------------------------
# The rule: prompt + output + EOS, loss on output + EOS only.


class PairEncoder:
    """Token ids of (source, target) texts, where the target carries the EOS token's text at its end.

    The ids are the tokenizer's own of source + target wherever these begin with its ids of the source alone. Where
    they do not, one token straddles the source's end (LLaMA's ":-"); at inference the model is fed the source's own
    ids, so there the text is split at the source's end and the target is tokenised as its continuation.
    """

    def __init__(self, tokenizer):
        """Raises UserError for a tokenizer that is not a fast one, that has no EOS, or that appends tokens."""
        from alpaca.training.batch_encoder import BatchEncoder

        name = tokenizer.name_or_path
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"{type(tokenizer).__name__} has no fast tokenizer; save it once with a tokenizer.json "
                "(AutoTokenizer.from_pretrained(...).save_pretrained(...)) and pass that folder."
            )
        if tokenizer.eos_token is None:
            raise UserError(f"the tokenizer {name} has no eos_token, which marks an answer's end.")
        self.encode = BatchEncoder(tokenizer.backend_tokenizer)
        self.eos, self.eos_id = tokenizer.eos_token, tokenizer.eos_token_id
        if self.encode.after:
            raise UserError(
                f"the tokenizer {name} adds tokens after every text ({self.encode.after}). "
                "Set add_eos_token to false in its tokenizer_config.json; answers get their EOS here."
            )
        if self.encode.continuation("a" + self.eos)[-1] != self.eos_id:
            raise UserError(f"the tokenizer {name} cannot read its own eos_token {self.eos!r}.")

    def fingerprint(self) -> str:
        """Hex sha256 of all that decides the ids."""
        return hashlib.sha256(f"{json.dumps(self.encode.layout)}\n{self.eos}\n{self.eos_id}".encode()).hexdigest()

    def __call__(self, sources: Sequence[str], targets: Sequence[str]) -> Iterator[tuple[list[int], int, bool]]:
        """For each pair: its ids (not truncated), how many of them are the source's, whether a token was split."""
        prompts = self.encode(sources)
        wholes = self.encode([source + target for source, target in zip(sources, targets, strict=True)])
        for prompt, whole, target in zip(prompts, wholes, targets, strict=True):
            straddles = whole[: len(prompt)] != prompt
            yield (prompt + self.encode.continuation(target) if straddles else whole), len(prompt), straddles


def truncate(ids: Sequence[int], prompt_length: int, max_length: int, truncation: str, eos_id: int) -> Sequence[int]:
    """The ids that are trained on; an empty list where no token of the answer would be left to learn.

    `truncation`: "cut" ends a longer row at `max_length` tokens, without EOS, so that a cut answer is not taught as a
    finished one (the original's way); "cut_eos" makes EOS its last token; "drop" leaves such rows out.
    """
    if len(ids) <= max_length:
        return ids if prompt_length < len(ids) else []
    if truncation == "drop":
        return []
    kept = max_length - (truncation == "cut_eos")
    if prompt_length >= kept:
        return []
    return [*ids[:kept], eos_id] if truncation == "cut_eos" else ids[:max_length]


# ----------------------------------------------------------------------------------------------------------------------
# Tokenised once, kept on disk, mapped into memory by every process.


class TokenDataset:
    """Tokenised rows in one flat array; an item is {"input_ids": int64 [n], "labels": int64 [n]} as numpy arrays.

    `lengths` and `prompt_lengths`: int64 [rows], in tokens. `source_rows`: the row's place in the rows that were
    tokenised. `report`: counts, see `tokenize_dataset`.
    """

    def __init__(self, tokens, index, report: dict[str, Any]):
        """`tokens`: int32 [total]; `index`: int64 [rows, 3] of end in `tokens`, prompt length, source row."""
        import numpy as np

        self.tokens, self.report = tokens, report
        self.ends, self.prompt_lengths, self.source_rows = np.ascontiguousarray(index.T)
        self.lengths = np.diff(self.ends, prepend=0)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int | str) -> Any:
        if isinstance(number, str):  # a whole column, as datasets.Dataset gives it
            return [self[row][number] for row in range(len(self))]
        end = self.ends[number]
        ids = self.tokens[end - self.lengths[number] : end].astype("int64")
        labels = ids.copy()
        labels[: self.prompt_lengths[number]] = IGNORE_INDEX
        return {"input_ids": ids, "labels": labels}

    @classmethod
    def open(cls, folder: Path) -> "TokenDataset | None":
        """The rows kept in `folder`, memory-mapped; None where there are none, or not the bytes that were written."""
        import numpy as np

        try:
            report = json.loads((folder / "report.json").read_text())
            if any(sha256_file(folder / name) != digest for name, digest in report["sha256"].items()):
                return None
            tokens = np.memmap(folder / "tokens.int32", dtype=np.int32, mode="r")
            return cls(tokens, np.load(folder / "index.npy"), report)
        except (OSError, ValueError, KeyError):
            return None


def tokenize_dataset(
    rows: Sequence[Mapping[str, Any]],
    tokenizer,
    max_length: int,
    truncation: str = "cut",
    cache_dir: str | os.PathLike | None = None,
    num_proc: int | None = None,
) -> TokenDataset:
    """Tokenises `rows` on all cores, or opens what an earlier call with the same content, tokenizer and rule left.

    Safe to call from every process of a run: one does the work, the others wait for its files. `truncation`: see
    `truncate`. `cache_dir`: where the tokens are kept; the default is named at the top of this file. `num_proc`:
    threads of the tokenizer (default: all cores); the first call of a process decides.

    The report's counts: rows (given), kept, dropped (no answer token within `max_length`, or too long under "drop"),
    cut, straddling (a token was split at the prompt's end), empty_outputs, tokens, response_tokens, longest.
    Raises UserError where no row is left, or the cache cannot be written.
    """
    if truncation not in TRUNCATIONS:
        raise UserError(f"--truncation {truncation}: expected one of {', '.join(TRUNCATIONS)}.")
    if num_proc:
        os.environ["RAYON_NUM_THREADS"] = str(num_proc)
    encoder = PairEncoder(tokenizer)
    key = _cache_key(rows, encoder, max_length, truncation)
    cache = Path(cache_dir or default_cache_dir())
    folder = cache / key
    dataset = TokenDataset.open(folder)
    if dataset is None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with _only_one_process(cache / f"{key}.lock"):
                dataset = TokenDataset.open(folder)
                if dataset is None:
                    _write_tokens(rows, encoder, max_length, truncation, folder)
                    dataset = TokenDataset.open(folder)
        except OSError as error:
            raise UserError(
                f"the tokenised data cannot be kept in {cache} ({error}). Name a folder that can be written: "
                "--data_cache_dir DIR"
            ) from error
    return dataset


def default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alpaca_tokens"


def _cache_key(rows, encoder: PairEncoder, max_length: int, truncation: str) -> str:
    digest = hashlib.sha256()
    for part in (CACHE_VERSION, encoder.fingerprint(), PROMPT_DICT, max_length, truncation):
        digest.update(f"{part}\n".encode())
    for row in rows:
        digest.update(
            f"{row['instruction']}\0{row.get('input') or ''}\0{row['output']}\0".encode(errors="surrogatepass")
        )
    return digest.hexdigest()[:32]


@contextlib.contextmanager
def _only_one_process(lock: Path) -> Iterator[None]:
    """Holds `lock` for the block. The system frees it when its holder dies, so a killed run blocks nobody."""
    import fcntl

    with open(lock, "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _write_tokens(rows, encoder: PairEncoder, max_length: int, truncation: str, folder: Path) -> None:
    import numpy as np
    from tqdm import tqdm

    counts = dict.fromkeys(("dropped", "cut", "straddling", "empty_outputs", "tokens", "response_tokens", "longest"), 0)
    index = []
    with atomic_dir(folder, overwrite=True) as beside:
        with open(beside / "tokens.int32", "wb") as stream, tqdm(total=len(rows), desc="tokenise", unit="row") as bar:
            for start in range(0, len(rows), CHUNK):
                chunk = rows[start : start + CHUNK]
                sources = [format_prompt(row) for row in chunk]
                targets = [row["output"] + encoder.eos for row in chunk]
                kept = []
                for number, (ids, prompt_length, straddles) in enumerate(encoder(sources, targets), start=start):
                    counts["empty_outputs"] += not rows[number]["output"].strip()
                    counts["straddling"] += straddles
                    trained = truncate(ids, prompt_length, max_length, truncation, encoder.eos_id)
                    if not trained:
                        counts["dropped"] += 1
                        continue
                    counts["cut"] += len(ids) > max_length
                    counts["tokens"] += len(trained)
                    counts["response_tokens"] += len(trained) - prompt_length
                    counts["longest"] = max(counts["longest"], len(trained))
                    kept += trained
                    index.append((counts["tokens"], prompt_length, number))
                np.asarray(kept, dtype=np.int32).tofile(stream)
                bar.update(len(chunk))
        if not index:
            raise UserError(
                f"none of the {len(rows)} rows has an answer token within {max_length} tokens; raise that limit "
                "(--model_max_length; in evaluation.py --max_length)"
            )
        np.save(beside / "index.npy", np.asarray(index, dtype=np.int64).reshape(-1, 3))
        hashes = {name: sha256_file(beside / name) for name in ("tokens.int32", "index.npy")}
        settings = {"max_length": max_length, "truncation": truncation}
        report = {"rows": len(rows), "kept": len(index), **counts, **settings, "sha256": hashes}
        jdump(report, beside / "report.json")


def describe_example(example: Mapping[str, Any], tokenizer) -> str:
    """One tokenised example as text: what is masked, what is trained on, and the ids at the seam."""
    ids, labels = list(map(int, example["input_ids"])), list(map(int, example["labels"]))
    prompt_length = next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    # Decoding the answer alone would lose a blank before its first word.
    prompt, whole = tokenizer.decode(ids[:prompt_length]), tokenizer.decode(ids)
    seam = slice(max(prompt_length - 3, 0), prompt_length + 3)
    return "\n".join(
        [
            f"--- masked: {prompt_length} tokens without loss " + "-" * 40,
            prompt,
            f"--- trained: {len(ids) - prompt_length} tokens with loss " + "-" * 40,
            whole[len(prompt) :],
            "--- ids at the seam " + "-" * 52,
            f"ids    {ids[seam]}  {tokenizer.convert_ids_to_tokens(ids[seam])}",
            f"labels {labels[seam]}",
        ]
    )


# ----------------------------------------------------------------------------------------------------------------------
# Batches.


class PaddedCollator:
    """Rows padded on the right to the longest of the batch; every tensor is int64 [rows, longest].

    The attention mask follows from the rows' lengths, never from the ids: where pad is eos, a row's own EOS counts.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None):
        self.pad_token_id, self.pad_to_multiple_of = pad_token_id, pad_to_multiple_of or 1

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        import torch

        longest = max(len(example["input_ids"]) for example in examples)
        shape = len(examples), -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "labels": torch.full(shape, IGNORE_INDEX),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
        }
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            batch["input_ids"][row, :length] = torch.as_tensor(example["input_ids"])
            batch["labels"][row, :length] = torch.as_tensor(example["labels"])
            batch["attention_mask"][row, :length] = 1
        return batch


class PaddingFreeCollator:
    """Rows laid end to end in one row without padding: input_ids, labels, position_ids int64 [1, tokens].

    Positions restart at 0 with every row, and each row's first label is masked, since nothing of its own precedes it.
    The model's attention has to keep the rows apart: `row_attention` adds `row_lengths`, a tuple of ints, for the
    module of that name; `flash_attention` adds the boundaries that its kernel takes.

    `response_only`: names the positions that have a label in `logits_to_keep` [kept] and their next tokens in
    `shift_labels` [1, kept], so that the model projects only these onto the vocabulary: the same loss, for about half
    of the largest matrix product. Only for models that `takes_logits_to_keep`.
    """

    def __init__(self, response_only: bool = False, flash_attention: bool = False, row_attention: bool = False):
        self.response_only, self.flash_attention, self.row_attention = response_only, flash_attention, row_attention

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        import numpy as np
        import torch

        lengths = [len(example["input_ids"]) for example in examples]
        ends = np.cumsum(lengths)
        labels = np.concatenate([example["labels"] for example in examples])
        labels[ends - lengths] = IGNORE_INDEX
        arrays = {
            "input_ids": np.concatenate([example["input_ids"] for example in examples])[None],
            "labels": labels[None],
            "position_ids": np.concatenate([np.arange(length) for length in lengths])[None],
        }
        if self.response_only:
            next_labels = np.append(labels[1:], IGNORE_INDEX)
            arrays["logits_to_keep"] = np.flatnonzero(next_labels != IGNORE_INDEX)
            arrays["shift_labels"] = next_labels[arrays["logits_to_keep"]][None]
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self.row_attention:
            batch["row_lengths"] = tuple(lengths)
        if self.flash_attention:
            boundaries = torch.tensor([0, *ends], dtype=torch.int32)
            batch.update(cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries)
            batch.update(max_length_q=max(lengths), max_length_k=max(lengths))
        return batch


def takes_logits_to_keep(model) -> bool:
    """Whether `model` can be asked for the logits of chosen positions and a loss on these (see PaddingFreeCollator)."""
    import inspect

    from transformers.loss.loss_utils import ForCausalLMLoss

    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft hides the signature
    return "logits_to_keep" in inspect.signature(model.forward).parameters and model.loss_function is ForCausalLMLoss


def count_tokens(batch: Mapping[str, Any]) -> tuple[Any, int]:
    """(real tokens, places with the padding) of a batch; the first may be a tensor on the batch's device."""
    places = batch["input_ids"].numel()
    return (batch["attention_mask"].sum() if "attention_mask" in batch else places), places


# ----------------------------------------------------------------------------------------------------------------------
# The original's names, for code that imports them. Rows and collator are the ones above.


def preprocess(sources: Sequence[str], targets: Sequence[str], tokenizer) -> dict[str, list]:
    """`input_ids` and `labels` (int64 tensors) of prompts and of outputs that end in EOS, cut at model_max_length."""
    import torch

    input_ids, labels = [], []
    for ids, prompt_length, _ in PairEncoder(tokenizer)(sources, targets):
        row = torch.tensor(ids[: tokenizer.model_max_length])
        input_ids.append(row)
        labels.append(row.clone())
        labels[-1][:prompt_length] = IGNORE_INDEX
    return dict(input_ids=input_ids, labels=labels)


class SupervisedDataset:
    """The rows of one file, tokenised in memory; an item is {"input_ids", "labels"} as int64 tensors."""

    def __init__(self, data_path: str, tokenizer):
        rows = load_rows(data_path)
        targets = [row["output"] + tokenizer.eos_token for row in rows]
        tokenised = preprocess([format_prompt(row) for row in rows], targets, tokenizer)
        self.input_ids, self.labels = tokenised["input_ids"], tokenised["labels"]

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return dict(input_ids=self.input_ids[i], labels=self.labels[i])


class DataCollatorForSupervisedDataset(PaddedCollator):
    """Pads with the tokenizer's own padding token."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer.pad_token_id)
        self.tokenizer = tokenizer

    def __call__(self, instances: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return super().__call__(instances)


def make_supervised_data_module(tokenizer, data_args) -> dict[str, Any]:
    """What the original handed to Trainer: train_dataset, no eval_dataset, data_collator."""
    dataset = SupervisedDataset(data_path=data_args.data_path, tokenizer=tokenizer)
    return dict(
        train_dataset=dataset, eval_dataset=None, data_collator=DataCollatorForSupervisedDataset(tokenizer=tokenizer)
    )
