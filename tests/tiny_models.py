"""Tiny random models and tokenizers with the traits of the real ones, for tests and small benchmarks.

    make_tiny_llama(folder)            SentencePiece tokenizer, BOS before text, no padding token, untied embeddings
    make_tiny_opt(folder)              byte-level BPE, pad token of its own, vocabulary padded beyond the tokenizer
    make_tiny_tied(folder)             tied embeddings and pad = eos, as in SmolLM2

Everything is seeded: the same call gives the same bytes.
"""

import io
import json
import random
from pathlib import Path

WORDS = """
a about above add adjective advice after again all an and animal answer apple article ask at ball bank be because
before bird blue book bread breakfast bring build but by call can capital car change child city class clean code cold
color common compare computer cook correct count country create cut day define describe detail dinner do dog door down
draft drink each earth easy eat edit email energy english essay every example explain fact family fast find fire fish
five follow food for four friend from fruit game garden general generate give good grammar green grow hand happy have
health help her here high his home hot house how idea identify if important improve in input instruction into is it job
keep kind know language large last learn letter life light like line list little long look love make man many meaning
meal measure milk minute money month moon morning most mountain move movie much music name near need new night no not
number object of oil old on one open or order other our out output over own page paper paragraph part people person
phrase place plan plant play please poem point possible present problem process produce provide question quick rain
read reason recipe red rewrite right river road rule sale same say school science sea season sentence seven short
should show sing six size sky small snow some song sort sound space speak star start step stone story street strong
student study suggest summarize sun table take task teach team tell temperature ten text than that the their them then
there these thing think this three time to today topic town train translate travel tree two under up use value verb
very visit voice walk want warm was water way weather week what when where which white who why will wind winter with
word work world would write year yellow yes you young your zero
""".split()


def corpus() -> list[str]:
    """2,000 lines of prompt-like text over a small vocabulary, with digits, lists, code and some non-ASCII."""
    rng = random.Random(0)
    lines = []
    for number in range(2000):
        words = rng.choices(WORDS, k=rng.randint(4, 24))
        line = " ".join(words).capitalize() + rng.choice([".", "?", "!", ":", ";"])
        lines.append(line if number % 5 else f"{number}. {line} - {number * 7} + x = [y] (z) \"é\" 'ü' 中文 #{number}")
    prompt = "Below is an instruction that describes a task, paired with an input that provides further context."
    headings = "### Instruction: ### Input: ### Response:"
    # ":-" becomes one piece, as in LLaMA's vocabulary: an output that begins with "-" then straddles the prompt's end.
    lines += [prompt, "Write a response that appropriately completes the request.", headings] * 50 + [
        "### Response:-"
    ] * 600
    return lines


def make_tasks(count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` made-up alpaca rows; half have an input, outputs are 1 to 40 words, some begin with "-" or "\\n"."""
    rng = random.Random(seed)
    tasks = []
    for number in range(count):
        words = rng.choices(WORDS, k=rng.randint(4, 12))
        output = " ".join(rng.choices(WORDS, k=rng.randint(1, 40)))
        tasks.append(
            {
                "instruction": f"{' '.join(words).capitalize()} {number}.",
                "input": " ".join(rng.choices(WORDS, k=rng.randint(3, 20))) if number % 2 else "",
                "output": {3: "- ", 7: "\n"}.get(number % 10, "") + output,
            }
        )
    return tasks


def make_sentencepiece(folder: Path, vocab_size: int = 800) -> Path:
    """A LLaMA-like tokenizer.model (BPE, byte fallback, digits apart) alone in `folder`."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, model_type="bpe", vocab_size=vocab_size,
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def make_llama_tokenizer(folder: Path, vocab_size: int = 800):
    from transformers import LlamaTokenizer

    tokenizer = LlamaTokenizer.from_pretrained(make_sentencepiece(folder, vocab_size), add_bos_token=True)
    tokenizer.model_max_length = 2048
    return tokenizer


def _bpe_tokenizer(special: list[str], vocab_size: int, bos: str | None, **names):
    """Byte-level BPE as GPT-2's, trained on the corpus."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus(), trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=2048, **names)


def make_tiny_llama(folder, seed: int = 0, dtype: str = "float32", **overrides) -> Path:
    """A 2-layer Llama of about 0.2 M parameters with the tokenizer of `make_llama_tokenizer`, saved to `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = Path(folder)
    tokenizer = make_llama_tokenizer(folder)
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bpe_tokenizer_with_pad():
    """A byte-level BPE tokenizer of 512 entries with BOS, EOS and a padding token of its own."""
    return _bpe_tokenizer(
        ["<unk>", "<s>", "</s>", "<pad>"], 512, None,
        bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
    )  # fmt: skip


def make_tiny_opt(folder, seed: int = 0) -> Path:
    """A 2-layer OPT; its embedding has more rows (520) than its tokenizer has entries (512), as OPT-6.7B's."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    tokenizer = _bpe_tokenizer(
        ["<s>", "<pad>", "</s>", "<unk>"], 512, "</s>",
        bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>",
    )  # fmt: skip
    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=520, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64,
        max_position_embeddings=1024, bos_token_id=2, eos_token_id=2, pad_token_id=1, dropout=0.0,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def make_tiny_tied(folder, seed: int = 0, dtype: str = "float32") -> Path:
    """A 2-layer Llama with tied embeddings whose padding token is its end token, as SmolLM2."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _bpe_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], 512, None,
        bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>", pad_token="<|im_end|>",
    )  # fmt: skip
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def write_tasks(path, count: int, seed: int = 0) -> Path:
    """`make_tasks` as an alpaca_data.json."""
    path = Path(path)
    path.write_text(json.dumps(make_tasks(count, seed), indent=4, ensure_ascii=False), encoding="utf-8")
    return path
