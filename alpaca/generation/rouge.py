"""Exact ROUGE-L F1 of instructions against a growing pool, and all near duplicates of a whole file.

    python benchmarks/bench_dedup.py --data_path alpaca_data.json                       # 52,002 instructions, measured
    python -c "from rouge_index import RougeLIndex; print(RougeLIndex(['name a big city']).scores('Name a city.'))"

The figures are those of rouge_score without stemming, bit for bit, and so are its tokens: runs of [a-z0-9].

What was measured for one candidate against the 52,002 released instructions, in milliseconds of one core (AMD EPYC): a
loop over rouge_score 800 to 1,700; rapidfuzz's `cdist` 4.4 for one query, nearly all of it spent on converting the pool
again, and 0.75 a query in blocks of 16; a numba kernel 1.2; the numpy kernel 0.9, and 1.0 with all that `scores` does.
It needs no compiler and no block of queries, so it is the one that stayed. Texts of more than 64 tokens do not fit its
machine words and go to rapidfuzz.
"""

import itertools
import math
import re
import unicodedata
from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from alpaca.generation.pair_search import PairSearch, TooManyMeetings, f1_scores

SHORT = 64  # tokens that fit the bits of one machine word

# ----------------------------------------------------------------------------------------------------------------------
# Tokens.

_NOT_WORD = re.compile(r"[^a-z0-9]+")


def rouge_tokens(text: str) -> list[str]:
    """The tokens of rouge_score's default tokenizer without stemming: lower case, runs of a-z and 0-9."""
    return _NOT_WORD.sub(" ", text.lower()).split()


# Scripts written without spaces between words: Thai, Lao, Myanmar, Khmer, Tai Le to Tai Tham, the ideographs with
# their iteration and number signs, kana, bopomofo, Yi. First and last code point.
_SPACELESS = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19DF), (0x1A20, 0x1AAF), (0x2E80, 0x2FDF),
    (0x3005, 0x3007), (0x3021, 0x3029), (0x3040, 0x312F), (0x31A0, 0x31BF), (0x31F0, 0x31FF), (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF), (0xA000, 0xA4CF), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F), (0xF900, 0xFAFF), (0x1B000, 0x1B16F),
    (0x20000, 0x3FFFF),
)  # fmt: skip


class _UnicodeTable(dict):
    """For str.translate: letters, marks and numbers stay, those of spaceless scripts alone; the rest parts words."""

    def __missing__(self, code: int) -> str:
        category = unicodedata.category(chr(code))
        if category[0] not in "LMN":
            value = "" if category == "Cf" else " "  # joiners and soft hyphens stand inside words
        elif any(first <= code <= last for first, last in _SPACELESS):
            value = f" {chr(code)} "
        else:
            value = chr(code)
        self[code] = value
        return value


_UNICODE_TABLE = _UnicodeTable()


def unicode_tokens(text: str) -> list[str]:
    """Words of any script after NFKC and case folding; scripts that write no spaces give one token a character.

    On ASCII text these are the tokens of `rouge_tokens`.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return folded.translate(_UNICODE_TABLE).split()


def _plain_text(text: str) -> str:
    """What is compared where a text has no token at all: its characters, without case and spacing."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


# ----------------------------------------------------------------------------------------------------------------------
# One candidate against a pool.


class RougeLIndex:
    """ROUGE-L F1 of a text against every instruction of a pool that grows.

    The pool's token numbers are kept column by column: column j holds token j of every instruction longer than j,
    longest first, so that each column is a prefix of the one before. A candidate of m tokens sets bit i of
    `masks[token i]`; one step of the bit-parallel recurrence for the longest common subsequence (Crochemore et al.
    2001, in Hyyrö's form of 2004) is then four array operations on a column. Newcomers collect in a padded table of
    the same kind, which is sorted in when it is full.

    unicode_dedup: tokens of any script. Without it only [a-z0-9] counts, as in rouge_score; there, texts without any
    token score 1.0 when they are equal after Unicode normalisation, and 0.0 otherwise.
    """

    def __init__(self, instructions: Iterable[str] = (), unicode_dedup: bool = False):
        self._tokens = unicode_tokens if unicode_dedup else rouge_tokens
        self._numbers: dict[str, int] = {}  # token -> its row in the masks; row 0 is padding
        self._texts: list[str] = []
        self._ids: list[array] = []
        self._long: list[int] = []  # instructions of more than SHORT tokens
        self._plain: dict[str, list[int]] = {}  # instructions without a token, by their plain text
        self._tables: dict[int, np.ndarray] = {}
        for text in instructions:
            self._append(text)
        self._sort_in()

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def texts(self) -> Sequence[str]:
        """The pool, in the order in which it was added."""
        return self._texts

    def add(self, text: str) -> None:
        """Puts `text` at the end of the pool."""
        ids = self._append(text)
        if len(self) - self._sorted > self._recent.shape[1]:
            self._sort_in()
        elif len(ids) <= SHORT:
            column = len(self) - 1 - self._sorted
            self._recent[: len(ids), column] = ids
            self._recent_lengths[column] = len(ids)
            self._recent_height = max(self._recent_height, len(ids))

    def scores(self, text: str) -> np.ndarray:
        """F1 of `text` against each instruction of the pool: float64 of shape (len(self),), in order of adding."""
        tokens = self._tokens(text)
        result = np.zeros(len(self))
        if not tokens:
            result[self._plain.get(_plain_text(text), [])] = 1.0
            return result
        m = len(tokens)
        # Tokens that the pool does not know count in m and match nothing.
        numbers = [self._numbers.get(token, 0) for token in tokens]
        if m > SHORT:
            self._score_with_rapidfuzz(numbers, range(len(self)), result)
            return result

        word = np.uint16 if m <= 16 else np.uint32 if m <= 32 else np.uint64  # the narrowest is the fastest
        masks = np.zeros(len(self._numbers) + 1, word)
        for i, number in enumerate(numbers):
            masks[number] |= word(1 << i)
        masks[0] = 0
        if m not in self._tables:
            lengths = np.arange(SHORT + 1)
            table = np.zeros((m + 1, SHORT + 1))
            table[:, 1:] = f1_scores(np.arange(m + 1)[:, None], np.float64(m), lengths[None, 1:])
            self._tables[m] = table.ravel()
        table = self._tables[m]

        lcs = _common_subsequences(masks, m, self._columns, self._counts, self._sorted)
        result[: self._sorted] = table.take(lcs * (SHORT + 1) + self._sorted_lengths).take(self._rank)
        fresh = len(self) - self._sorted
        if fresh:
            height = self._recent_height
            columns = self._recent[:height, :fresh].ravel()
            lcs = _common_subsequences(masks, m, columns, [fresh] * height, fresh)
            result[self._sorted :] = table.take(lcs * (SHORT + 1) + self._recent_lengths[:fresh])
        if self._long:
            self._score_with_rapidfuzz(numbers, self._long, result)
        return result

    def scores_many(self, texts: Sequence[str]) -> np.ndarray:
        """F1 of each of `texts` against each instruction of the pool: float64 of shape (len(texts), len(self))."""
        return np.array([self.scores(text) for text in texts]).reshape(len(texts), len(self))

    def top(self, text: str, k: int, scores: np.ndarray | None = None) -> list[tuple[str, float]]:
        """The `k` most similar instructions with their F1, best first; equal ones in order of adding.

        `scores`: the result of `self.scores(text)`, where the caller has it already.
        """
        if scores is None:
            scores = self.scores(text)
        k = min(k, len(scores))
        if k < 1:
            return []
        least = np.partition(scores, len(scores) - k)[len(scores) - k]
        enough = np.flatnonzero(scores >= least)
        best = enough[np.argsort(-scores[enough], kind="stable")[:k]]
        return [(self._texts[i], float(scores[i])) for i in best]

    def near_duplicates(self, threshold: float = 0.7) -> list[tuple[int, int, float]]:
        """Every pair of the pool with F1 above `threshold`; see the function of this name."""
        return near_duplicates(self._texts, threshold, self._tokens is unicode_tokens)

    def _append(self, text: str) -> array:
        tokens = self._tokens(text)
        ids = array("q", [self._numbers.setdefault(token, len(self._numbers) + 1) for token in tokens])
        if not tokens and (plain := _plain_text(text)):
            self._plain.setdefault(plain, []).append(len(self._texts))
        if len(ids) > SHORT:
            self._long.append(len(self._texts))
        self._texts.append(text)
        self._ids.append(ids)
        return ids

    def _sort_in(self) -> None:
        self._sorted = len(self)
        # Long instructions stand here as empty ones.
        short = [ids if len(ids) <= SHORT else () for ids in self._ids]
        lengths = np.fromiter(map(len, short), np.int64, len(short))
        flat = np.fromiter(itertools.chain.from_iterable(short), np.int64, int(lengths.sum()))
        starts = np.cumsum(lengths) - lengths
        order = np.argsort(-lengths, kind="stable")
        self._rank = np.argsort(order)  # where each instruction stands in the columns
        self._sorted_lengths = lengths[order]
        self._counts = [int((lengths > j).sum()) for j in range(int(lengths.max(initial=0)))]
        starts = starts[order]
        self._columns = np.concatenate([flat[starts[:n] + j] for j, n in enumerate(self._counts)] or [flat])
        # Sorting costs as much as some forty candidates; room for an eighth of the pool makes it vanish.
        room = max(1024, len(self) // 8)
        self._recent = np.zeros((SHORT, room), np.int64)
        self._recent_lengths = np.zeros(room, np.int64)
        self._recent_height = 0

    def _score_with_rapidfuzz(self, numbers: list[int], rows: Sequence[int], result: np.ndarray) -> None:
        from rapidfuzz import process
        from rapidfuzz.distance import LCSseq

        rows = [row for row in rows if self._ids[row]]
        # Tokens that the pool does not know are 0 here, which no instruction holds.
        query, pool = array("q", numbers), [self._ids[row] for row in rows]
        lcs = process.cdist([query], pool, scorer=LCSseq.similarity, dtype=np.int32)[0]
        result[rows] = f1_scores(lcs, np.float64(len(numbers)), np.array([len(ids) for ids in pool], np.float64))


def _common_subsequences(masks, m, columns, counts, size) -> np.ndarray:
    """Length of the longest common subsequence of the masked candidate and each of `size` column-wise instructions.

    masks: (vocabulary,) unsigned words of at least `m` bits; columns: token numbers, column after column; counts: how
    many instructions each column holds, never growing.
    """
    word = masks.dtype.type
    matches = masks.take(columns)
    every_bit = word((1 << m) - 1)
    unmatched = np.full(size, every_bit, word)
    sums = np.empty(size, word)
    start = 0
    for n in counts:
        rows, hit, total = unmatched[:n], matches[start : start + n], sums[:n]
        np.bitwise_and(rows, hit, out=hit)
        np.add(rows, hit, out=total)  # the carry out of the word is not needed
        np.subtract(rows, hit, out=rows)
        np.bitwise_or(rows, total, out=rows)
        start += n
    return m - np.bitwise_count(unmatched & every_bit).astype(np.intp)


# ----------------------------------------------------------------------------------------------------------------------
# All near duplicates of a file.

_MEETINGS = 100  # pairs a row that `first_repeats` compares at once; ordinary files have ten to thirty
_LEAF = 4096  # rows below which it compares however many there are


def near_duplicates(
    texts: Sequence[str], threshold: float = 0.7, unicode_dedup: bool = False
) -> list[tuple[int, int, float]]:
    """Every pair of rows with F1 above `threshold`, as (i, j, F1) with i < j, sorted. Exact.

    The list holds all pairs of a cluster, so that a thousand copies of one text give half a million; `first_repeats`
    names each repeated row once. Raises ValueError for a threshold outside [0, 1).
    """
    search, copies = _distinct_texts(texts, threshold, unicode_dedup)
    left, right, scores = search.pairs(np.arange(len(copies)))
    found = [
        (min(i, j), max(i, j), score)
        for a, b, score in zip(left.tolist(), right.tolist(), scores.tolist(), strict=True)
        for i in copies[a]
        for j in copies[b]
    ]
    found += [(i, j, 1.0) for rows in copies for i, j in itertools.combinations(rows, 2)]
    return sorted(found)


def first_repeats(
    texts: Sequence[str], threshold: float = 0.7, unicode_dedup: bool = False
) -> list[tuple[int, int, float]]:
    """The rows that self-instruct's rule drops from a file: in file order, a row goes when its F1 with an earlier row
    that stayed is above `threshold`. Exact, as (i, j, F1) sorted by j: row j goes because of i, the first such row.

    Raises ValueError for a threshold outside [0, 1).
    """
    search, copies = _distinct_texts(texts, threshold, unicode_dedup)
    because: dict[int, tuple[int, float]] = {}

    def keep(rows: np.ndarray) -> np.ndarray:
        try:
            drop(*search.pairs(rows, most=math.inf if len(rows) <= _LEAF else _MEETINGS * len(rows)))
        except TooManyMeetings:
            # What repeats the first half goes before the second half is compared with itself. A file of near copies
            # shrinks to little at once, and no list of all its pairs ever exists.
            first = keep(rows[: len(rows) // 2])
            second = rows[len(rows) // 2 :]
            drop(*search.pairs(first, second))
            second = keep(second[[row not in because for row in second.tolist()]])
            return np.concatenate([first, second])
        return rows[[row not in because for row in rows.tolist()]]

    def drop(left: np.ndarray, right: np.ndarray, scores: np.ndarray) -> None:
        order = np.lexsort((left, right))
        for some in np.array_split(order, len(order) // 1_000_000 + 1):  # Python's numbers take much memory
            for a, b, score in zip(left[some].tolist(), right[some].tolist(), scores[some].tolist(), strict=True):
                if a not in because and b not in because:
                    because[b] = (a, score)

    keep(np.arange(len(copies)))
    found = []
    for distinct, rows in enumerate(copies):
        kept, score = because.get(distinct, (distinct, 1.0))
        gone = rows if distinct in because else rows[1:]
        found += [(copies[kept][0], row, score) for row in gone]
    return sorted(found, key=lambda repeat: repeat[1])


def dedup(texts: Sequence[str], threshold: float = 0.7, unicode_dedup: bool = False) -> np.ndarray:
    """Which rows stay when `first_repeats` is applied: bool of shape (len(texts),)."""
    kept = np.ones(len(texts), bool)
    kept[[j for _, j, _ in first_repeats(texts, threshold, unicode_dedup)]] = False
    return kept


def _distinct_texts(texts, threshold, unicode_dedup) -> tuple[PairSearch, list[list[int]]]:
    """The search over the distinct token sequences, and the rows of each, numbered in order of first appearance."""
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold is an F1 that must be exceeded, 0 <= threshold < 1; got {threshold}")
    tokenize = unicode_tokens if unicode_dedup else rouge_tokens
    numbers: dict[str, int] = {}
    seen: dict[bytes | str, int] = {}
    copies: list[list[int]] = []
    flat, lengths = array("i"), array("i")
    for row, text in enumerate(texts):
        ids = array("i", [numbers.setdefault(token, len(numbers)) for token in tokenize(text)])
        # A blank text resembles nothing, not even another one.
        key = ids.tobytes() or _plain_text(text) or f"blank {row}"
        distinct = seen.setdefault(key, len(copies))
        if distinct < len(copies):
            copies[distinct].append(row)
        else:
            copies.append([row])
            flat.extend(ids)
            lengths.append(len(ids))
    return PairSearch(np.array(flat, np.int32), np.array(lengths, np.int64), threshold), copies
