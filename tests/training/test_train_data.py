"""Training rows as tokens: the labels' rule, truncation, the cache, batches with and without padding."""

import json

import pytest
import tiny_models

from alpaca.common.errors import UserError
from alpaca.common.prompt import IGNORE_INDEX, format_prompt
from alpaca.training import attention
from alpaca.training import data as training_data
from alpaca.training.arguments import TRUNCATIONS, DataArguments
from alpaca.training.data import PaddedCollator, PaddingFreeCollator, data_report, load_rows, tokenize_dataset

MODELS = ("tiny_llama", "tiny_opt", "tiny_tied")


@pytest.fixture(params=MODELS)
def folder(request):
    return request.getfixturevalue(request.param)


def tokenizer_of(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def model_of(folder, kernel="sdpa"):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=kernel)
    model.config.use_cache = False
    return model.train()


def tokenise(rows, tokenizer, tmp_path, max_length=512, **how):
    return tokenize_dataset(rows, tokenizer, max_length, cache_dir=tmp_path / "cache", **how)


def lengths(dataset):
    return dataset["length"][:]


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_several_files_and_formats(tmp_path):
    """Users had to join regen.json, JSONL and seed files by hand; a null input became the text "None"."""
    regen = [{"instruction": "A", "input": None, "output": "1", "avg_similarity_score": 0.1}]
    (tmp_path / "regen.json").write_text(json.dumps(regen))
    (tmp_path / "more.jsonl").write_text('{"instruction": "B", "input": "  ", "output": "2"}\n')
    seed = {"id": "s", "instruction": "C", "instances": [{"input": "x", "output": "3"}]}
    (tmp_path / "seed_tasks.jsonl").write_text(json.dumps(seed) + "\n")
    rows = load_rows(f"{tmp_path}/regen.json, {tmp_path}/more.jsonl,{tmp_path}/seed_tasks.jsonl")
    assert [(row["instruction"], row["output"]) for row in rows] == [("A", "1"), ("B", "2"), ("C", "3")]
    assert ["### Input:" in format_prompt(row) for row in rows] == [False, False, True]
    assert "None" not in format_prompt(rows[0])
    assert len(load_rows([f"{tmp_path}/regen.json", f"{tmp_path}/more.jsonl"], max_samples=1)) == 1


def test_bad_row_is_named(tmp_path):
    """A missing key was a bare KeyError without a row number."""
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"instruction": "A", "output": "1"}, {"instruction": "B"}]))
    with pytest.raises(UserError, match=r"data\.json(.|\n)*row 2(.|\n)*output"):
        load_rows(str(path))


def test_dataset_folder_and_unknown_name(tmp_path):
    """A Hugging Face dataset is read through the datasets library, and a name that is none says what was expected."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"instruction": "A", "input": null, "output": "1"}\n')
    assert load_rows(str(tmp_path / "set"))[0]["input"] == ""
    with pytest.raises(UserError, match="neither a file here nor a Hugging Face dataset"):
        load_rows(str(tmp_path / "nothing_here"))


def test_held_out_rows_that_are_all_rows_are_refused(tiny_llama, tmp_path):
    """Guards: the same file for training and for the held-out loss was told as rows that are too long."""
    path = str(tiny_models.write_tasks(tmp_path / "a.json", 3))
    settings = DataArguments(data_path=path, eval_data_path=path, data_cache_dir=str(tmp_path / "tokens"))
    with pytest.raises(UserError, match=r"every training row is in --eval_data_path .*--val_size"):
        training_data.load_data(settings, 512, 0, tokenizer_of(tiny_llama), print)


def test_split_is_repeatable_and_disjoint():
    """Held-out rows must not depend on the process: each rank splits for itself."""
    rows = tiny_models.make_tasks(50)
    train, held_out = training_data.split_validation(rows, 0.2, seed=3)
    assert (len(train), len(held_out)) == (40, 10)
    assert (train, held_out) == training_data.split_validation(rows, 10, seed=3)
    assert held_out != training_data.split_validation(rows, 10, seed=4)[1]
    assert sorted(row["instruction"] for row in train + held_out) == sorted(row["instruction"] for row in rows)
    with pytest.raises(UserError, match="val_size"):
        training_data.split_validation(rows, 50, seed=0)
    # Once a run without the held-out loss that was asked for, or a traceback of Trainer's.
    with pytest.raises(UserError, match=r"--val_size 0.01 of 50 rows is no row"):
        training_data.split_validation(rows, 0.01, seed=0)


# ---- the rule --------------------------------------------------------------------------------------------------------


def test_labels_follow_the_original_except_at_straddling_tokens(folder, tmp_path):
    """Outputs that begin with "-" merged with the prompt's colon: their first piece was masked, and the prompt differed
    from the one at inference."""
    tokenizer, rows = tokenizer_of(folder), tiny_models.make_tasks(120)
    dataset, straddling = tokenise(rows, tokenizer, tmp_path), 0
    assert len(dataset) == len(rows)
    for row, example in zip(rows, (dataset[i] for i in range(len(dataset))), strict=True):
        prompt, target = format_prompt(row), row["output"] + tokenizer.eos_token
        alone, whole = tokenizer(prompt).input_ids, tokenizer(prompt + target).input_ids
        ids, labels = example["input_ids"].tolist(), example["labels"].tolist()
        assert ids[: len(alone)] == alone, "the prompt is what inference feeds"
        assert labels == [IGNORE_INDEX] * len(alone) + ids[len(alone) :]
        assert ids[-1] == tokenizer.eos_token_id
        if whole[: len(alone)] == alone:
            assert ids == whole
        else:
            straddling += 1
            assert row["output"][0] in "-\n"
        assert tokenizer.decode(ids).endswith(prompt + target)
    assert data_report(dataset, rows)["straddling"] == straddling
    if folder.name == "tiny_llama":
        assert straddling > 0, "the fixture no longer shows the bug"


@pytest.mark.parametrize("first", ["-", "- a", " -", "\n", " a", "", ":", "é", "中", "<unk>"])
def test_continuation_loses_and_adds_no_blank(tiny_llama, tmp_path, first):
    """A target tokenised by itself gets SentencePiece's dummy blank; the row would then say "Response: -"."""
    tokenizer = tokenizer_of(tiny_llama)
    rows = [{"instruction": "go", "input": "", "output": first}]
    example = tokenise(rows, tokenizer, tmp_path)[0]
    text = tokenizer.decode(example["input_ids"])
    assert text.endswith("### Response:" + first + "</s>")


def test_special_token_prefix_and_suffix(tiny_llama, tmp_path):
    """A tokenizer that appends EOS to every text ends prompts in it; the run must not start."""
    from tokenizers import processors

    tokenizer = tokenizer_of(tiny_llama)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    with pytest.raises(UserError, match="add_eos_token"):
        tokenise(tiny_models.make_tasks(2), tokenizer, tmp_path)


def unigram_tokenizer():
    """A SentencePiece-like Unigram tokenizer, whose control tokens are the likeliest of all pieces (score 0)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<unk>"]
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=special, unk_token="<unk>", show_progress=False, initial_alphabet=list("</>#\n")
    )
    backend.train_from_iterator(tiny_models.corpus(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("name", [*MODELS, "unigram"])
def test_special_tokens_spelt_in_a_text_are_text(request, tmp_path, name):
    """A row that spells "</s>" or "<|im_end|>" ended the answer in its middle, with loss: a way to poison a set. In the
    prompt it ended the turn, at inference too."""
    tokenizer = unigram_tokenizer() if name == "unigram" else tokenizer_of(request.getfixturevalue(name))
    words = " ".join(tokenizer.all_special_tokens) + "".join(tokenizer.all_special_tokens)
    task = {"instruction": f"Say {words} twice.", "input": words, "output": f"a {words} b"}
    (example,) = tokenise([task], tokenizer, tmp_path)
    ids = example["input_ids"].tolist()
    assert ids[-1] == tokenizer.eos_token_id
    inner = ids[int(ids[0] == tokenizer.bos_token_id) : -1]
    assert not set(inner) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids).endswith(format_prompt(task) + task["output"] + tokenizer.eos_token)
    assert training_data.encode_prompts(tokenizer, [format_prompt(task)]) == [ids[: example["prompt_length"]]]


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_truncation(tiny_llama, tmp_path, truncation):
    """Long outputs lost EOS without a word, and long prompts left rows without a label: loss 0 or nan."""
    tokenizer = tokenizer_of(tiny_llama)
    long_prompt = {"instruction": "word " * 300, "input": "", "output": "yes"}
    long_answer = {"instruction": "list words", "input": "", "output": "word " * 300}
    short = {"instruction": "list words", "input": "", "output": ""}
    rows = [long_prompt, long_answer, short]
    dataset = tokenise(rows, tokenizer, tmp_path, 100, truncation=truncation)
    report = data_report(dataset, rows)
    assert report["rows"] == 3 and report["empty_outputs"] == 1
    ends = {int(example["row"]): example["input_ids"].tolist()[-1] for example in dataset}
    assert ends[2] == tokenizer.eos_token_id and 0 not in ends
    if truncation == "drop":
        assert (report["kept"], report["dropped"], report["cut"]) == (1, 2, 0)
    else:
        assert (report["kept"], report["dropped"], report["cut"]) == (2, 1, 1)
        assert lengths(dataset)[0] == 100
        assert (ends[1] == tokenizer.eos_token_id) == (truncation == "cut_eos")


def test_no_row_left_is_an_error(tiny_llama, tmp_path):
    """All prompts longer than the limit: training on nothing must not start."""
    with pytest.raises(UserError, match="model_max_length"):
        tokenise(tiny_models.make_tasks(3), tokenizer_of(tiny_llama), tmp_path, 10)


def test_settings_of_the_tokenizer_do_not_leak(tiny_llama, tmp_path):
    """A call with padding and truncation stays in a fast tokenizer's backend and would have padded or cut the rows."""
    tokenizer, rows = tokenizer_of(tiny_llama), tiny_models.make_tasks(5)
    clean = tokenise(rows, tokenizer, tmp_path)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["a", "b c d"], padding="max_length", truncation=True, max_length=8)
    again = tokenise(rows, tokenizer, tmp_path / "other")
    assert lengths(again).tolist() == lengths(clean).tolist()


def test_example_shows_the_mask(tiny_llama, tmp_path):
    """Users could not see whether the masking was right."""
    tokenizer = tokenizer_of(tiny_llama)
    dataset = tokenise([{"instruction": "Say hi.", "input": "", "output": "- hello"}], tokenizer, tmp_path)
    masked, trained = training_data.describe_example(dataset[0], tokenizer).split("--- trained")
    assert masked.endswith("### Response:\n")
    assert "\n- hello</s>\n" in trained


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_cache_is_keyed_by_all_that_matters(tiny_llama, tiny_tied, tmp_path, monkeypatch):
    """Tokenising anew on each start costs minutes; using another run's tokens costs the run."""
    tokenizer, rows = tokenizer_of(tiny_llama), tiny_models.make_tasks(20)
    first = tokenise(rows, tokenizer, tmp_path)
    work = []
    original = training_data._tokenise
    monkeypatch.setattr(training_data, "_tokenise", lambda *args, **more: work.append(args) or original(*args, **more))
    tokenizer(["a", "b c d"], truncation=True, max_length=2)  # a tokenizer's own hash changes with use
    again = tokenise([{**row, "id": 1} for row in rows], tokenizer, tmp_path)
    assert not work and [e["input_ids"].tolist() for e in again] == [e["input_ids"].tolist() for e in first]
    assert again.cache_files, "not mapped from a file"
    for changed in (
        lambda: tokenise(rows[:-1], tokenizer, tmp_path),
        lambda: tokenise([{**rows[0], "input": "other"}, *rows[1:]], tokenizer, tmp_path),
        lambda: tokenise(rows, tokenizer, tmp_path, 511),
        lambda: tokenise(rows, tokenizer, tmp_path, truncation="drop"),
        lambda: tokenise(rows, tokenizer_of(tiny_tied), tmp_path),
    ):
        before = len(work)
        changed()
        assert len(work) == before + 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_cache_is_made_again(tiny_llama, tmp_path, damage):
    """A flipped bit or a cut file in the cache would be trained on in silence."""
    tokenizer, rows = tokenizer_of(tiny_llama), tiny_models.make_tasks(20)
    whole = [example["input_ids"].tolist() for example in tokenise(rows, tokenizer, tmp_path)]
    (path,) = (tmp_path / "cache").glob("*.arrow")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    if damage != "remove":
        path.write_bytes(content if damage == "flip" else content[:-4])
    assert [example["input_ids"].tolist() for example in tokenise(rows, tokenizer, tmp_path)] == whole


def test_several_processes_give_the_same_rows(tiny_llama, tmp_path):
    """Rows numbered within each process's share, or in another order."""
    tokenizer, rows = tokenizer_of(tiny_llama), tiny_models.make_tasks(50)
    one, two = (tokenise(rows, tokenizer, tmp_path / str(n), num_proc=n) for n in (None, 2))
    assert [example["row"] for example in two] == list(range(50))
    assert [e["labels"].tolist() for e in one] == [e["labels"].tolist() for e in two]


def test_unwritable_cache_names_the_flag(tiny_llama, tmp_path):
    """A read-only home on a cluster ended in a traceback."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--data_cache_dir"):
        tokenize_dataset(tiny_models.make_tasks(2), tokenizer_of(tiny_llama), 512, cache_dir=tmp_path / "file")


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_padded_mask_comes_from_lengths(tiny_tied, tmp_path):
    """Where pad is eos, "not pad" dropped every real EOS from attention and from the lengths."""
    tokenizer = tokenizer_of(tiny_tied)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    dataset = tokenise(tiny_models.make_tasks(6), tokenizer, tmp_path)
    batch = PaddedCollator(tokenizer.pad_token_id)([dataset[i] for i in range(6)])
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths(dataset).tolist()
    for row, length in enumerate(lengths(dataset)):
        assert batch["input_ids"][row, length - 1] == batch["labels"][row, length - 1] == tokenizer.eos_token_id
        assert (batch["labels"][row, length:] == IGNORE_INDEX).all()
    assert [int(count) for count in training_data.count_tokens(batch)] == [
        lengths(dataset).sum(),
        batch["input_ids"].numel(),
    ]


@pytest.mark.parametrize("response_only", [False, True])
def test_padding_free_batch_is_the_same_training(folder, tmp_path, response_only):
    """Rows laid end to end must not see each other (with transformers' own mask OPT's do), and leaving out the prompts'
    logits must change nothing: loss and every gradient equal the padded batch's."""
    import torch

    dataset = tokenise(tiny_models.make_tasks(6), tokenizer_of(folder), tmp_path)
    rows = [dataset[i] for i in range(6)]
    model = model_of(folder)
    loss = model(**PaddedCollator(0)(rows)).loss
    loss.backward()
    assert training_data.takes_logits_to_keep(model) and attention.fits(model, 512)
    free = model_of(folder, attention.register())
    batch = PaddingFreeCollator(response_only, row_lengths=True)(rows)
    assert batch["input_ids"].shape == (1, lengths(dataset).sum())
    free_loss = free(**batch).loss
    free_loss.backward()
    assert free_loss.item() == pytest.approx(loss.item(), abs=1e-6)
    for (name, one), other in zip(model.named_parameters(), free.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, atol=2e-6, rtol=1e-4, msg=name)


def test_rows_do_not_see_each_other(folder, tmp_path):
    """The first row's tokens must leave the second row's logits untouched, to the bit."""
    import torch

    dataset = tokenise(tiny_models.make_tasks(3), tokenizer_of(folder), tmp_path)
    model = model_of(folder, attention.register()).eval()
    collate, length = PaddingFreeCollator(row_lengths=True), int(lengths(dataset)[0])
    other = {**dataset[0], "input_ids": dataset[0]["input_ids"][::-1].copy()}
    with torch.no_grad():
        one, two = (model(**collate([first, dataset[1]])).logits[0, length:] for first in (dataset[0], other))
    assert torch.equal(one, two)


def test_windows_and_chunks_shorter_than_the_rows(monkeypatch):
    """Guards: a window that never reaches the kernel (models without flash attention), and chunks, which none knows."""
    from transformers import MistralConfig, MistralForCausalLM

    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    model = MistralForCausalLM(MistralConfig(vocab_size=32, sliding_window=64, **size))
    assert attention.fits(model, 128)
    model.config.attention_chunk_size = 64
    assert attention.fits(model, 64) and not attention.fits(model, 128)
    model.config.attention_chunk_size = None
    monkeypatch.setattr(attention, "supports_flash_attention", lambda _: False)
    assert attention.fits(model, 64) and not attention.fits(model, 128)


def test_flash_attention_boundaries(tiny_llama, tmp_path):
    """The kernel's boundaries as transformers' own flattening collator gives them."""
    from transformers import DataCollatorWithFlattening

    dataset = tokenise(tiny_models.make_tasks(4), tokenizer_of(tiny_llama), tmp_path)
    rows = [dataset[i] for i in range(4)]
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)
    ours = PaddingFreeCollator(borders=True)(rows)
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert (ours[name] == value) if isinstance(value, int) else ours[name].tolist() == value.tolist(), name


# ---- the original's names --------------------------------------------------------------------------------------------


def test_original_interface(tiny_tied, tmp_path):
    """Forks import these from train; names, arguments and results stay."""
    from types import SimpleNamespace

    import train

    tokenizer = tokenizer_of(tiny_tied)
    data = tiny_models.write_tasks(tmp_path / "data.json", 12)
    module = train.make_supervised_data_module(tokenizer=tokenizer, data_args=SimpleNamespace(data_path=str(data)))
    assert set(module) == {"train_dataset", "eval_dataset", "data_collator"} and module["eval_dataset"] is None
    dataset = train.SupervisedDataset(data_path=str(data), tokenizer=tokenizer)
    batch = train.DataCollatorForSupervisedDataset(tokenizer=tokenizer)(instances=[dataset[i] for i in range(12)])
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    rows = tiny_models.make_tasks(12)
    cached = tokenise(rows, tokenizer, tmp_path)
    sources, targets = [format_prompt(row) for row in rows], [row["output"] + tokenizer.eos_token for row in rows]
    direct = train.preprocess(sources, targets, tokenizer)
    for i in range(12):
        assert dataset[i]["input_ids"].tolist() == cached[i]["input_ids"].tolist() == direct["input_ids"][i].tolist()
        assert dataset[i]["labels"].tolist() == cached[i]["labels"].tolist() == direct["labels"][i].tolist()
