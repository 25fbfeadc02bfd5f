"""Training rows as tokens: loads tasks, tokenises them once into a memory-mapped cache, and builds batches.

Not a command; train.py imports it. To see what a model would be trained on:

    python train.py --model_name_or_path huggyllama/llama-7b --data_path alpaca_data.json --output_dir o --dry_run True

The cache lies in $XDG_CACHE_HOME/alpaca_tokens (~/.cache/alpaca_tokens); any file in it may be deleted at any time.
"""

import functools
import hashlib
import inspect
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tokenizers import Tokenizer
from transformers.loss.loss_utils import ForCausalLMLoss

from alpaca.common.errors import UserError
from alpaca.common.files import jdump, jload
from alpaca.common.prompt import IGNORE_INDEX, format_prompt
from alpaca.common.run_record import sha256_file
from alpaca.common.tasks import TASK_FILES, check_tasks, load_tasks
from alpaca.training.arguments import named_paths

# Part of the cache's key: raised whenever the rule below or the columns on disk change.
CACHE_VERSION = 2
# Rows given to the tokenizer at once: enough for all cores, few enough that the encodings stay in some 50 MB.
BATCH_SIZE = 2048

# ----------------------------------------------------------------------------------------------------------------------
# Rows.


def load_rows(data_paths: str | Sequence[str], max_samples: int | None = None) -> list[dict[str, Any]]:
    """Tasks of one or several sources, in order, at most `max_samples` of them.

    `data_paths`: a path, several in a list or separated by commas; each a file that alpaca.common.tasks reads, or the
    name (or folder) of a Hugging Face dataset, whose train split is taken. Raises UserError that names file and row
    where a row cannot be read.
    """
    if isinstance(data_paths, str):
        data_paths = named_paths(data_paths)
    rows = []
    for source in (str(path).strip() for path in data_paths):
        rows += (
            load_tasks(source)
            if (Path(source).is_file() or Path(source).suffix in TASK_FILES)
            else _load_hub_dataset(source)
        )
    return rows[:max_samples]


def _load_hub_dataset(name: str) -> list[dict[str, Any]]:
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
    if val_size and not count:
        raise UserError(f"--val_size {val_size} of {len(rows)} rows is no row: give a count, such as --val_size 1.")
    if not 0 <= count < len(rows):
        raise UserError(f"--val_size {val_size} leaves nothing to train on: there are {len(rows)} rows.")
    held_out = set(random.Random(seed).sample(range(len(rows)), count))
    train = [row for number, row in enumerate(rows) if number not in held_out]
    return train, [rows[number] for number in sorted(held_out)]


# ----------------------------------------------------------------------------------------------------------------------
# The rule: prompt + output + EOS, loss on output + EOS only.


class TextEncoder:
    """Token ids of prompts and answers by a tokenizer, free of the padding and truncation that calls leave in it.

    All of a text is text: where it spells a special token ("</s>", "<|im_end|>"), the ids are those of its characters.
    Else a row of data could end an answer in its middle, or open another one's turn.
    """

    def __init__(self, tokenizer):
        """Raises UserError for a tokenizer that is not a fast one."""
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"{type(tokenizer).__name__} has no fast tokenizer; save it once with a tokenizer.json "
                "(AutoTokenizer.from_pretrained(...).save_pretrained(...)) and pass that folder."
            )
        self.eos_id = tokenizer.eos_token_id
        # What the tokenizer puts before (BOS) and after every text.
        whole, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
        place = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        self.before, self.after = whole[:place], whole[place + len(plain) :]
        self.layout = text_only(json.loads(tokenizer.backend_tokenizer.to_str()), set(tokenizer.all_special_tokens))
        self._tokenizer = text_tokenizer(self.layout)
        parts = ("normalizer", "pre_tokenizer")
        self._going_on = text_tokenizer(self.layout | {part: without_dummy_blank(self.layout[part]) for part in parts})

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts that an answer will follow: BOS where the tokenizer puts one, nothing at the end."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[*self.before, *encoding.ids] for encoding in encodings]

    def pairs(self, prompts: Sequence[str], answers: Sequence[str]) -> Iterator[tuple[list[int], int, bool]]:
        """For each pair: ids of prompt + answer + EOS, how many are the prompt's, whether a token was split between.

        The ids are the tokenizer's own of the whole text wherever these begin with its ids of the prompt alone. Where
        they do not, one token straddles the prompt's end (LLaMA's ":-"); at inference the model is fed the prompt's own
        ids, so there the text is split at the prompt's end and the answer is tokenised as its continuation.
        """
        wholes = self._tokenizer.encode_batch(list(map(str.__add__, prompts, answers)), add_special_tokens=False)
        for prompt, answer, whole in zip(prompts, answers, wholes, strict=True):
            ids, straddles = [*self.before, *whole.ids], False
            # A token that begins with the answer: merges within the prompt are then those of the prompt alone. Offsets
            # leave out blanks, so behind one they prove nothing.
            first = whole.char_to_token(len(prompt)) if not prompt[-1:].isspace() else None
            if first is not None and whole.token_to_chars(first)[0] == len(prompt):
                length = len(self.before) + first
            else:
                (alone,) = self.prompts([prompt])
                length, straddles = len(alone), ids[: len(alone)] != alone
                if straddles:
                    ids = alone + self._going_on.encode(answer, add_special_tokens=False).ids
            yield [*ids, self.eos_id], length, straddles


def encode_prompts(tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """The ids of prompts as training and inference both feed them to a model: BOS where there is one, no EOS."""
    if tokenizer.is_fast:
        return text_encoder(tokenizer).prompts(prompts)
    rows = tokenizer(list(prompts), split_special_tokens=True)["input_ids"]
    return [row[:-1] if row[-1] == tokenizer.eos_token_id else row for row in rows]


def decode_answer(tokenizer, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text that `new` ids add to the `prompt` ids, without special tokens and without blanks at its ends.

    Decoded behind the prompt's last tokens, because SentencePiece drops a blank at the beginning of a text.
    """
    tail, options = list(prompt[-8:]), {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return tokenizer.decode(tail + list(new), **options)[len(tokenizer.decode(tail, **options)) :].strip()


@functools.lru_cache(maxsize=8)
def text_encoder(tokenizer) -> TextEncoder:
    return TextEncoder(tokenizer)


def text_only(layout: dict[str, Any], special: set[str]) -> dict[str, Any]:
    """A tokenizer's JSON layout, changed so that no text gives one of the `special` tokens; no padding, no truncation.

    Holds for a tokenizer with `encode_special_tokens` set, which spares the tokens that are marked as special.
    """
    for token in layout["added_tokens"]:
        token["special"] |= token["content"] in special
    model, special = layout["model"], {token["content"] for token in layout["added_tokens"] if token["special"]}
    if model["type"] == "BPE":  # SentencePiece's merges, derived from its vocabulary, may end in "</s>"
        model["merges"] = [merge for merge in model["merges"] if "".join(merge) not in special]
    elif model["type"] == "Unigram":  # and its scores make control tokens, which have 0, the likeliest of all
        lowest = min(score for _, score in model["vocab"])
        model["vocab"] = [[piece, lowest - 1000 if piece in special else score] for piece, score in model["vocab"]]
    return layout | {"padding": None, "truncation": None}


def text_tokenizer(layout: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(layout))
    tokenizer.encode_special_tokens = True
    return tokenizer


def without_dummy_blank(node: Any) -> Any:
    """Part of a tokenizer's layout with everything switched off that puts a blank before the text."""
    if isinstance(node, list):
        return [kept for kept in map(without_dummy_blank, node) if kept is not None]
    if isinstance(node, dict):
        if node.get("type") == "Prepend":
            return None
        off = {"prepend_scheme": "never", "add_prefix_space": False}
        return {key: off.get(key, without_dummy_blank(value)) for key, value in node.items()}
    return node


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


def tokenize_dataset(
    rows: Sequence[Mapping[str, Any]],
    tokenizer,
    max_length: int,
    truncation: str = "cut",
    cache_dir: str | os.PathLike | None = None,
    num_proc: int | None = None,
) -> datasets.Dataset:
    """Tokenises `rows`, or maps into memory what an earlier call with the same texts, tokenizer and rule left.

    `truncation`: see `truncate`. `cache_dir`: where the tokens are kept; the default is named at the top of this file.
    `num_proc`: processes (default: one, whose tokenizer uses all cores). In numpy format, a row of the result has
    input_ids and labels (int64), length and prompt_length in tokens, row (its place in `rows`), straddles (a token was
    split at the prompt's end) and cut. Rows without an answer token are left out. Raises UserError where no row is
    left, where the tokenizer appends tokens to a text or has no EOS, or where the cache cannot be written.
    """
    encoder = TextEncoder(tokenizer)
    if encoder.eos_id is None:
        raise UserError(f"the tokenizer {tokenizer.name_or_path} has no eos_token, which marks an answer's end.")
    if encoder.after:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} adds tokens after every text ({encoder.after}). "
            "Set add_eos_token to false in its tokenizer_config.json; answers get their EOS here."
        )
    prompts, answers = [format_prompt(row) for row in rows], [row["output"] for row in rows]
    key = _cache_key(encoder, [max_length, truncation], prompts, answers)
    cache = Path(cache_dir or default_cache_dir())
    try:
        cache.mkdir(parents=True, exist_ok=True)
        sums, intact = cache / f"{key}.json", _is_intact(cache / f"{key}.json")
        if not intact:
            for file in cache.glob(f"{key}*"):
                file.unlink()
        tokenised = datasets.Dataset.from_dict({"prompt": prompts, "answer": answers}).map(
            functools.partial(_tokenise, encoder=encoder, max_length=max_length, truncation=truncation),
            with_indices=True, batched=True, batch_size=BATCH_SIZE, remove_columns=["prompt", "answer"],
            features=FEATURES, num_proc=num_proc, cache_file_name=str(cache / f"{key}.arrow"), new_fingerprint=key,
            desc="tokenise",
        )  # fmt: skip
        if not intact:
            jdump({Path(part["filename"]).name: sha256_file(part["filename"]) for part in tokenised.cache_files}, sums)
    except OSError as error:
        raise UserError(
            f"the tokenised data cannot be kept in {cache} ({error}). Name a folder that can be written: "
            "--data_cache_dir DIR"
        ) from error
    if not len(tokenised):
        raise UserError(
            f"none of the {len(rows)} rows has an answer token within {max_length} tokens; raise that limit "
            "(--model_max_length; in evaluation.py --max_length)"
        )
    return tokenised.with_format("numpy")


FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
        **{name: datasets.Value("int32") for name in ("length", "prompt_length", "row")},
        **{name: datasets.Value("bool") for name in ("straddles", "cut")},
    }
)


def _tokenise(
    batch: Mapping[str, list[str]], places: Sequence[int], encoder: TextEncoder, max_length: int, truncation: str
) -> dict[str, list]:
    columns: dict[str, list] = {name: [] for name in FEATURES}
    for place, (ids, prompt_length, straddles) in zip(
        places, encoder.pairs(batch["prompt"], batch["answer"]), strict=True
    ):
        trained = truncate(ids, prompt_length, max_length, truncation, encoder.eos_id)
        if trained:
            labels = [IGNORE_INDEX] * prompt_length + trained[prompt_length:]
            values = trained, labels, len(trained), prompt_length, place, straddles, len(ids) > max_length
            for name, value in zip(FEATURES, values, strict=True):
                columns[name].append(value)
    return columns


def default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alpaca_tokens"


def _cache_key(encoder: TextEncoder, limits: Sequence[Any], *texts: Sequence[str]) -> str:
    """Hex digest of all that decides the ids. The tokenizer's own hash changes whenever it is used."""
    digest = hashlib.sha256(
        json.dumps([CACHE_VERSION, encoder.layout, encoder.before, encoder.eos_id, limits]).encode()
    )
    for column in texts:
        digest.update("\0".join(column).encode())
    return digest.hexdigest()[:32]


def _is_intact(sums: Path) -> bool:
    """Whether the files of an earlier call hold the bytes that it wrote."""
    try:
        return all(sha256_file(sums.with_name(name)) == digest for name, digest in jload(sums).items())
    except (OSError, UserError):
        return False


def data_report(dataset: datasets.Dataset, rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Counts of a tokenised dataset and of the `rows` that it was made from."""
    lengths, prompt_lengths = dataset["length"][:], dataset["prompt_length"][:]
    return {
        "rows": len(rows),
        "kept": len(dataset),
        "dropped": len(rows) - len(dataset),
        "cut": int(dataset["cut"][:].sum()),
        "straddling": int(dataset["straddles"][:].sum()),
        "empty_outputs": sum(not row["output"].strip() for row in rows),
        "tokens": int(lengths.sum()),
        "response_tokens": int((lengths - prompt_lengths).sum()),
        "longest": int(lengths.max()),
    }


def load_data(
    data_args, max_length: int, seed: int, tokenizer, say=print
) -> tuple[datasets.Dataset, datasets.Dataset | None, dict[str, int]]:
    """Tokenised training rows, tokenised held-out rows (None where none are asked for), counts of the training rows."""
    rows, held_out = load_rows(data_args.data_path, data_args.max_train_samples), None
    if data_args.eval_data_path:
        held_out = load_rows(data_args.eval_data_path)
        known = {(row["instruction"], row["input"]) for row in held_out}
        seen, rows = len(rows), [row for row in rows if (row["instruction"], row["input"]) not in known]
        if len(rows) < seen:
            say(f"{seen - len(rows)} rows of --data_path are in --eval_data_path too and are not trained on")
        if not rows:
            raise UserError(
                f"every training row is in --eval_data_path {data_args.eval_data_path} too, which leaves none to train "
                "on. Name other held-out rows, or take some of --data_path in its place: --val_size 0.05"
            )
    elif data_args.val_size:
        rows, held_out = split_validation(rows, data_args.val_size, seed)
    encoder = text_encoder(tokenizer)
    if encoder.before.count(tokenizer.bos_token_id) > 1:
        say(f"note: the tokenizer itself puts {encoder.before.count(tokenizer.bos_token_id)} BOS before every text")
    options = data_args.truncation, data_args.data_cache_dir, data_args.preprocessing_workers
    train_set = tokenize_dataset(rows, tokenizer, max_length, *options)
    eval_set = tokenize_dataset(held_out, tokenizer, max_length, *options) if held_out else None
    limits = {"max_length": max_length, "truncation": data_args.truncation}
    return train_set, eval_set, data_report(train_set, rows) | limits


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

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        shape = len(examples), max(len(example["input_ids"]) for example in examples)
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
    The model's attention has to keep the rows apart: `row_lengths` adds a tuple of ints of that name, for sdpa row by
    row; `borders` adds what flash attention's and torch's kernels take.

    `response_only`: names the positions that have a label in `logits_to_keep` [kept] and their next tokens in
    `shift_labels` [1, kept], so that the model projects only these onto the vocabulary: the same loss, for about half
    of the largest matrix product. Only for models that `takes_logits_to_keep`.
    """

    def __init__(self, response_only: bool = False, borders: bool = False, row_lengths: bool = False):
        self.response_only, self.borders, self.row_lengths = response_only, borders, row_lengths

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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
        if self.row_lengths:
            batch["row_lengths"] = tuple(lengths)
        if self.borders:
            boundaries = torch.tensor([0, *ends], dtype=torch.int32)
            batch.update(cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries)
            batch.update(max_length_q=max(lengths), max_length_k=max(lengths))
        return batch


class Collator:
    """Batches without padding until `pad` is called; padded ones from then on, or where there is no other."""

    def __init__(self, padding_free: PaddingFreeCollator | None, padded: PaddedCollator):
        self.padding_free, self.padded = padding_free, padded

    def pad(self) -> None:
        self.padding_free = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return (self.padding_free or self.padded)(examples)


def without_adapters(model):
    """The model in which peft put adapters; any other as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def takes_logits_to_keep(model) -> bool:
    """Whether `model` can be asked for the logits of chosen positions and a loss on these (see PaddingFreeCollator)."""
    model = without_adapters(model)  # peft hides the signature
    return "logits_to_keep" in inspect.signature(model.forward).parameters and model.loss_function is ForCausalLMLoss


def count_tokens(batch: Mapping[str, Any]) -> tuple[Any, int]:
    """(real tokens, places with the padding) of a batch; the first may be a tensor on the batch's device."""
    places = batch["input_ids"].numel()
    return (batch["attention_mask"].sum() if "attention_mask" in batch else places), places


# ----------------------------------------------------------------------------------------------------------------------
# The original's names, for code that imports them. Rows and collator are the ones above.


def preprocess(sources: Sequence[str], targets: Sequence[str], tokenizer) -> dict[str, list]:
    """`input_ids` and `labels` (int64 tensors) of prompts and of outputs with their EOS, cut at model_max_length."""
    input_ids, labels = [], []
    answers = [target.removesuffix(tokenizer.eos_token) for target in targets]
    encoded = TextEncoder(tokenizer).pairs(sources, answers)
    for (ids, prompt_length, _), answer, target in zip(encoded, answers, targets, strict=True):
        row = torch.tensor(ids[: len(ids) - (answer == target)][: tokenizer.model_max_length])
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
