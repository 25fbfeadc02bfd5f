"""Token ids of many texts, exactly the tokenizer's own; from a table of words where no token crosses a blank.

Not a command; train_data.py uses it:

    encode = BatchEncoder(tokenizer.backend_tokenizer)
    encode(["Below is an instruction", "- one\\n- two"])        # as tokenizer(...).input_ids
    encode.continuation("- one")                               # ids of a text that goes on from another
"""

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

# Words kept in the table; beyond it the table starts anew. 52,000 rows of instruction data hold 190,000.
TABLE_SIZE = 500_000


class BatchEncoder:
    """Encodes with a copy of a `tokenizers.Tokenizer`, free of the padding and truncation that calls leave in it.

    SentencePiece's BPE, as the tokenizers library runs it, merges a whole text as one word, at 2 microseconds a token.
    Merges never join what no vocabulary entry joins, and in LLaMA's vocabulary no entry has a blank behind another
    character: texts cut before each run of blanks give the same ids word by word, and most words come again.
    """

    def __init__(self, backend: Any):
        from tokenizers import Tokenizer

        text = backend.to_str()
        self.backend = Tokenizer.from_str(text)
        self.backend.no_truncation()
        self.backend.no_padding()
        self.layout = json.loads(self.backend.to_str())
        self.by_word = words_are_independent(self.layout)
        parts = {part: _without_dummy_blank(self.layout[part]) for part in ("normalizer", "pre_tokenizer")}
        self._going_on = Tokenizer.from_str(json.dumps({**self.layout, **parts}))
        self._table: dict[str, tuple[int, ...]] = {}
        # What the tokenizer puts before (BOS) and after every text.
        whole, plain = self.backend.encode("a").ids, self.backend.encode("a", add_special_tokens=False).ids
        place = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        self.before, self.after = whole[:place], whole[place + len(plain) :]

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, special tokens included."""
        if not self.by_word:
            return [encoding.ids for encoding in self.backend.encode_batch_fast(texts)]
        blank = "" if self.layout["pre_tokenizer"]["prepend_scheme"] == "never" else " "
        cut = re.compile("[ ▁]+[^ ▁]*|[^ ▁]+").findall
        # The tokenizer puts its blank before a text, but not before one of its own tokens, nor before another blank.
        bare = (" ", "▁", *(token["content"] for token in self.layout["added_tokens"]))
        split = [cut(text if not text or text.startswith(bare) else blank + text) for text in texts]
        if len(self._table) > TABLE_SIZE:
            self._table.clear()
        new = list(set(itertools.chain.from_iterable(split)).difference(self._table))
        for word, encoding in zip(new, self._going_on.encode_batch_fast(new, add_special_tokens=False), strict=True):
            self._table[word] = tuple(encoding.ids)
        look_up, chain = self._table.__getitem__, itertools.chain.from_iterable
        return [[*self.before, *chain(map(look_up, words)), *self.after] for words in split]

    def continuation(self, text: str) -> list[int]:
        """Ids of a text that goes on from another: no special tokens, and no blank put before its first word."""
        return self._going_on.encode(text, add_special_tokens=False).ids


def words_are_independent(layout: dict[str, Any]) -> bool:
    """Whether the tokenizer of this JSON layout gives a text's ids word by word, words being cut before blanks."""
    model, pre = layout["model"], layout["pre_tokenizer"] or {}
    # Every character outside the vocabulary becomes bytes, so that no "unknown" token can span two words.
    plain_bpe = model["type"] == "BPE" and model.get("byte_fallback") and not model.get("dropout")
    plain_bpe = plain_bpe and not model.get("ignore_merges") and "<0x00>" in model["vocab"]
    one_piece = pre.get("type") == "Metaspace" and pre.get("replacement") == "▁" and not pre.get("split", True)
    return bool(
        plain_bpe
        and one_piece
        and pre.get("prepend_scheme") in ("first", "never")
        and layout["normalizer"] is None
        and not any(re.search("[^▁]▁", token) for token in model["vocab"])
        and not any(
            token["lstrip"] or token["rstrip"] or token["single_word"] or token["normalized"]
            or re.search("[ ▁]", token["content"])
            for token in layout["added_tokens"]
        )
    )  # fmt: skip


def _without_dummy_blank(node: Any) -> Any:
    """Part of a tokenizer's layout with everything switched off that puts a blank before the text."""
    if isinstance(node, list):
        return [kept for kept in map(_without_dummy_blank, node) if kept is not None]
    if isinstance(node, dict):
        if node.get("type") == "Prepend":
            return None
        off = {"prepend_scheme": "never", "add_prefix_space": False}
        return {key: off.get(key, _without_dummy_blank(value)) for key, value in node.items()}
    return node
