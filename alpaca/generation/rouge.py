"""Exact ROUGE-L F1 of instructions: one text against a growing pool, and the near duplicates of a whole file.

    python benchmarks/bench_dedup.py --data_path alpaca_data.json                       # measured
    python -c "from alpaca.generation.rouge import RougeLIndex; print(RougeLIndex(['name a city']).scores('Name it'))"

The figures are those of rouge_score without stemming, bit for bit, and so are its tokens: runs of [a-z0-9].
"""

import bisect
import itertools
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import LCSseq

from alpaca.common.cores import CORES
from alpaca.generation.pair_search import (
    CODE_POINTS,
    ROW,
    PairSearch,
    Sequences,
    TokenNumbers,
    TokenStore,
    f1_scores,
)

SHORT = 64  # tokens that fit the bits of one machine word

# ----------------------------------------------------------------------------------------------------------------------
# Tokens.

_NOT_WORD = re.compile(r"[^a-z0-9]+")
_ASCII_WORD = bytes(ord(chr(code).lower()) if chr(code).isalnum() else 32 for code in range(128)) + bytes(128)


def rouge_tokens(text: str) -> list[str]:
    """The tokens of rouge_score's default tokenizer without stemming: lower case, runs of a-z and 0-9."""
    if text.isascii():
        return text.encode().translate(_ASCII_WORD).decode().split()
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


def comparison_tokens(text: str, unicode_dedup: bool = False) -> list[str]:
    """What is compared of an instruction: its tokens, or where it has none all of it as one token that no word equals.

    So identical Chinese instructions are duplicates without `unicode_dedup`, and blank texts resemble nothing.
    """
    if tokens := unicode_tokens(text) if unicode_dedup else rouge_tokens(text):
        return tokens
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return [f" {plain}"] if plain else []


def number_tokens(texts: Iterable[str], unicode_dedup: bool = False) -> TokenNumbers:
    """The `comparison_tokens` of texts, for a TokenStore."""
    numbers: defaultdict[str, int] = defaultdict(lambda: len(numbers))
    rows = [[numbers[token] for token in comparison_tokens(text, unicode_dedup)] for text in texts]
    lengths = np.fromiter(map(len, rows), np.int32, len(rows))
    indices = np.fromiter(itertools.chain.from_iterable(rows), np.int32, int(lengths.sum()))
    return TokenNumbers(list(numbers), indices, lengths)


# ----------------------------------------------------------------------------------------------------------------------
# One candidate against a pool.

_BLOCK = 1 << 17  # instructions scored together; two threads took 3.2 ms for 500,000 with this, 4.3 with half of it
_FRESH = 1024  # newcomers that rapidfuzz scores until they are sorted into a block
_MANY = 1000  # texts from which on one search is faster than scoring each
_TOGETHER = 64  # texts whose figures one thread computes before it takes the next ones


class Compared(NamedTuple):
    """A text beside the pool that it met."""

    new: bool  # and so added
    nearest: Sequence[tuple[str, float]]  # the most similar instructions with their F1, best first
    average: float | None  # F1 with all, 0.0 for an empty pool; None without figures and for a text that is not added


class RougeLIndex:
    """ROUGE-L F1 of a text against every instruction of a pool that grows.

    unicode_dedup: tokens of any script. Without it only [a-z0-9] counts, as in rouge_score; there, texts without any
    token score 1.0 when they are equal after Unicode normalisation, and 0.0 otherwise.

    The pool lies in blocks, see `_Block`. Newcomers and texts of more than SHORT tokens are compared by rapidfuzz.
    """

    def __init__(self, instructions: Iterable[str] = (), unicode_dedup: bool = False):
        self.texts: list[str] = []  # in order of adding
        self._unicode = unicode_dedup
        self._numbers: dict[str, int] = {}
        self._rows: list[str | list[int]] = []  # token numbers, as a string where they are code points
        self._long: list[int] = []  # instructions of more than SHORT tokens
        self._blocks: list[_Block] = []
        self._in_blocks = 0  # how many instructions the blocks hold
        self._tables: dict[int, np.ndarray] = {}
        self._threads = ThreadPoolExecutor(CORES)
        # Memory that is used again: fresh megabytes from the system take longer than the work in them.
        self._scratch = [np.empty(_BLOCK * (SHORT + 3), np.uint64) for _ in range(CORES)]
        self.extend(instructions)

    def __len__(self) -> int:
        return len(self.texts)

    def add(self, text: str) -> None:
        """Puts `text` at the end of the pool."""
        self._append(text)
        if len(self) - self._in_blocks >= _FRESH or len(self) % _BLOCK == 0:
            self._fill_block()

    def extend(self, texts: Iterable[str]) -> None:
        """Puts many texts at the end of the pool."""
        for text in texts:
            self._append(text)
            if len(self) % _BLOCK == 0:
                self._fill_block()
        if len(self) > self._in_blocks:
            self._fill_block()

    def add_new(
        self,
        texts: Sequence[str],
        threshold: float,
        neighbours: int = 0,
        done: Callable[[int], object] = lambda texts: None,
    ) -> list[Compared]:
        """Adds each of `texts`, in order, unless its F1 with an instruction of the pool is above `threshold`.

        neighbours: how many the result names of a text that is added, beside its average; 0 gives neither. A text that
        is not added has the most similar instruction alone. Many texts are compared in one search, not one by one;
        `done` is called with 1 for each whose figures are there.
        """
        if len(texts) < _MANY:
            return [self._add_if_new(text, threshold, neighbours) for text in texts]
        pool, all_texts = len(self), [*self.texts, *texts]
        sequences = token_sequences(all_texts, self._unicode)
        similar = first_repeats(sequences, threshold, fixed=pool).rows
        kept = np.setdiff1d(np.arange(len(all_texts)), similar)
        found = nearest(sequences, similar, kept, threshold, earlier=True)
        result = [Compared(True, (), None)] * len(texts)
        for row, other, score in zip(*(column.tolist() for column in found), strict=True):
            result[row - pool] = Compared(False, [(all_texts[other], score)], None)
        kept = kept[pool:].tolist()
        self.extend(all_texts[row] for row in kept)
        if neighbours:
            places = range(pool, len(self))
            parts = [places[start : start + _TOGETHER] for start in range(0, len(places), _TOGETHER)]
            figures = itertools.chain.from_iterable(
                self._threads.map(self._beside_earlier, parts, itertools.repeat(neighbours))
            )
            for row, compared in zip(kept, figures, strict=True):
                result[row - pool] = compared
                done(1)
        return result

    def _add_if_new(self, text: str, threshold: float, neighbours: int) -> Compared:
        scores = self.scores(text)
        best = self.top(text, max(neighbours, 1), scores)
        if best and best[0][1] > threshold:
            return Compared(False, best[:1], None)
        self.add(text)
        return Compared(True, best, _mean(scores)) if neighbours else Compared(True, (), None)

    def _beside_earlier(self, places: Sequence[int], neighbours: int) -> list[Compared]:
        """Figures of instructions of the pool, all of them in blocks, beside those before each."""
        result, memory, scratch = [], np.empty(len(self)), self._scratch.pop()
        try:
            for place in places:
                scores = self._scores_before(place, memory, scratch)
                result.append(Compared(True, self.top(self.texts[place], neighbours, scores), _mean(scores)))
        finally:
            self._scratch.append(scratch)
        return result

    def scores(self, text: str) -> np.ndarray:
        """F1 of `text` against each instruction of the pool: float64 of shape (len(self),), in order of adding."""
        # Tokens that the pool does not know are 0: they count in the length and match nothing.
        numbers = [self._numbers.get(token, 0) for token in comparison_tokens(text, self._unicode)]
        result = np.zeros(len(self))
        if len(numbers) > SHORT:
            self._score_with_rapidfuzz(numbers, range(len(self)), result)
        elif numbers:
            candidate = self._candidate(numbers)
            workers = min(CORES, len(self._blocks))

            def score(worker: int) -> None:
                for block in self._blocks[worker::workers]:
                    block.score(candidate, result[block.first : block.first + len(block)], self._scratch[worker])

            run = self._threads.map if workers > 1 else map
            list(run(score, range(workers)))
            self._score_with_rapidfuzz(numbers, [*self._long, *range(self._in_blocks, len(self))], result)
        return result

    def _scores_before(self, place: int, memory: np.ndarray, scratch: np.ndarray) -> np.ndarray:
        """F1 of an instruction of the pool with each before it, in `memory`. All of them must be in blocks."""
        numbers = _numbers(self._rows[place])
        result = memory[:place]
        if 0 < len(numbers) <= SHORT:
            candidate = self._candidate(numbers)
            for block in self._blocks[: -(-place // _BLOCK)]:
                block.score(candidate, memory[block.first : block.first + len(block)], scratch)
            self._score_with_rapidfuzz(numbers, self._long[: bisect.bisect_left(self._long, place)], result)
        else:
            result.fill(0)
            if numbers:
                self._score_with_rapidfuzz(numbers, range(place), result)
        return result

    def top(self, text: str, k: int, scores: np.ndarray | None = None) -> list[tuple[str, float]]:
        """The `k` most similar instructions with their F1, best first; equal ones in order of adding.

        `scores`: the result of `self.scores(text)`, where the caller has it already.
        """
        if scores is None:
            scores = self.scores(text)
        k = min(k, len(scores))
        if k < 1:
            return []
        places = np.arange(len(scores))
        if len(scores) >= 64 * k:
            # The k-th best of these maxima is at most the k-th best of all, and takes a 64th of the time.
            maxima = scores[: len(scores) // 64 * 64].reshape(64, -1).max(0)
            places = np.flatnonzero(scores >= np.partition(maxima, len(maxima) - k)[len(maxima) - k])
        values = scores[places]
        least = np.partition(values, len(values) - k)[len(values) - k]
        better = places[values > least]
        best = [*better[np.argsort(-scores[better], kind="stable")], *places[values == least][: k - len(better)]]
        return [(self.texts[i], float(scores[i])) for i in best]

    def _append(self, text: str) -> None:
        tokens = comparison_tokens(text, self._unicode)
        numbers = [self._numbers.setdefault(token, len(self._numbers) + 1) for token in tokens]
        if len(numbers) > SHORT:
            self._long.append(len(self))
        self._rows.append("".join(map(chr, numbers)) if max(numbers, default=0) < CODE_POINTS else numbers)
        self.texts.append(text)

    def _fill_block(self) -> None:
        """Sorts the newcomers into the last block, or begins one where that is full."""
        if self._blocks and len(self._blocks[-1]) < _BLOCK:
            self._blocks.pop()
        first = len(self._blocks) * _BLOCK
        self._blocks.append(_Block(first, self._rows[first:]))
        self._in_blocks = len(self)

    def _candidate(self, numbers: Sequence[int]) -> "_Candidate":
        masks: dict[int, int] = {}
        for i, number in enumerate(numbers):
            masks[number] = masks.get(number, 0) | 1 << i
        masks.pop(0, None)
        return _Candidate(masks, len(numbers), self._f1_table(len(numbers)))

    def _f1_table(self, m: int) -> np.ndarray:
        """F1 of a candidate of `m` tokens, at (SHORT + 1) * instruction's length + longest common subsequence."""
        if m not in self._tables:
            numbers = np.arange(SHORT + 1)
            table = np.zeros((SHORT + 1, SHORT + 1))
            table[1:] = f1_scores(numbers, np.float64(m), numbers[1:, None])
            self._tables[m] = table.ravel()
        return self._tables[m]

    def _score_with_rapidfuzz(self, numbers: list[int], rows: Sequence[int], result: np.ndarray) -> None:
        rows = [row for row in rows if self._rows[row]]
        pool = [self._rows[row] for row in rows]
        lcs = process.cdist([numbers], pool, scorer=LCSseq.similarity, dtype=np.int32)[0]
        result[rows] = f1_scores(lcs, np.float64(len(numbers)), np.fromiter(map(len, pool), np.float64, len(pool)))


def _numbers(row: str | list[int]) -> list[int]:
    return list(map(ord, row)) if isinstance(row, str) else row


def _mean(scores: np.ndarray) -> float:
    return float(scores.mean()) if len(scores) else 0.0


class _Candidate(NamedTuple):
    """A text of `m` tokens, at most SHORT: token -> the bits of its places, and its `_f1_table`."""

    masks: Mapping[int, int]
    m: int
    table: np.ndarray


class _Block:
    """Up to _BLOCK instructions, laid out for the bit-parallel longest common subsequence.

    Column j holds token j of every instruction longer than j, longest first, so that each column is a prefix of the
    one before. A candidate of m tokens sets bit i wherever its token i stands; one step of the recurrence (Crochemore
    et al. 2001, in Hyyrö's form of 2004) is then four array operations on a column. Instructions of more than SHORT
    tokens stand here as empty ones.

    first: the number of the first instruction in the pool.
    """

    def __init__(self, first: int, rows: Sequence[str | list[int]]):
        self.first = first
        rows = [row if len(row) <= SHORT else "" for row in rows]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        if all(isinstance(row, str) for row in rows):
            flat = np.frombuffer("".join(rows).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int64)
        else:
            flat = np.array([number for row in rows for number in _numbers(row)])
        order = np.argsort(-lengths, kind="stable")
        starts = (np.cumsum(lengths) - lengths)[order]
        self._rank = np.argsort(order)  # where each instruction stands in a column
        # Where the row of each instruction begins in `_f1_table`.
        self._table_rows = lengths * (SHORT + 1)
        self._counts = [int((lengths > j).sum()) for j in range(int(lengths.max()))]
        columns = np.concatenate([flat[:0], *(flat[starts[:n] + j] for j, n in enumerate(self._counts))])
        self._places = np.argsort(columns, kind="stable")  # where each token stands, token by token
        self._tokens, self._starts = np.unique(columns[self._places], return_index=True)
        self._starts = np.append(self._starts, len(columns))

    def __len__(self) -> int:
        return len(self._rank)

    def score(self, candidate: _Candidate, scores: np.ndarray, scratch: np.ndarray) -> None:
        """Writes the F1 of a candidate with each instruction into `scores`. scratch: memory to work in."""
        masks, m, table = candidate
        word = next(kind for kind in (np.uint8, np.uint16, np.uint32, np.uint64) if m <= 8 * kind(0).itemsize)
        every_bit = word((1 << m) - 1)
        places, words = scratch[: len(self)].view(np.int64), scratch[len(self) :].view(word)
        unmatched, sums, matches = np.split(words[: 2 * len(self) + len(self._places)], [len(self), 2 * len(self)])
        unmatched.fill(every_bit)
        matches.fill(0)
        wanted = np.searchsorted(self._tokens, list(masks))
        for token, mask, i in zip(masks, masks.values(), wanted.tolist(), strict=True):
            if i < len(self._tokens) and self._tokens[i] == token:
                matches[self._places[self._starts[i] : self._starts[i + 1]]] = word(mask)
        start = 0
        for n in self._counts:
            rows, hit, total = unmatched[:n], matches[start : start + n], sums[:n]
            np.bitwise_and(rows, hit, out=hit)
            np.add(rows, hit, out=total)  # the carry out of the word is not needed
            np.subtract(rows, hit, out=rows)
            np.bitwise_or(rows, total, out=rows)
            start += n
        lcs = np.uint8(m) - np.bitwise_count(np.bitwise_and(unmatched, every_bit, out=unmatched)).take(self._rank)
        np.add(lcs, self._table_rows, out=places)
        table.take(places, out=scores, mode="clip")  # without a mode numpy writes into memory of its own first


# ----------------------------------------------------------------------------------------------------------------------
# The near duplicates of a whole file.

_LEAF = 4096  # rows below which `first_repeats` compares however many pairs there are
_MATCHES = 100  # pairs a row that it holds at once; ordinary files have a few
_MOST_MATCHES = 5 * 10**7  # of 8 bytes each


class Matches(NamedTuple):
    """Rows that resemble another one: rows[i], ascending, and others[i] have the ROUGE-L F1 scores[i]."""

    rows: np.ndarray
    others: np.ndarray
    scores: np.ndarray


def token_sequences(texts: Sequence[str], unicode_dedup: bool = False) -> Sequences:
    """The texts as rows for `first_repeats` and `nearest`."""
    store = TokenStore()
    for start in range(0, len(texts), 10_000):
        store.append(number_tokens(texts[start : start + 10_000], unicode_dedup))
    return store.sequences()


def first_repeats(
    sequences: Sequences, threshold: float = 0.7, rows: np.ndarray | None = None, fixed: int = 0
) -> Matches:
    """The rows that self-instruct's rule drops from a file: in file order, a row goes when its F1 with an earlier row
    that stayed is above `threshold`. Exact; `others` holds the first such row.

    rows: ascending numbers of those that count, default all. fixed: so many rows from the start stay whatever they are.
    Raises ValueError for a threshold outside [0, 1).
    """
    search = PairSearch(sequences, threshold)
    rows = np.arange(len(sequences)) if rows is None else rows
    staying, rows = rows[rows < fixed], rows[rows >= fixed]
    copies = sequences.first_copies(rows)
    undecided = rows[copies == rows]
    repeated = np.full(len(sequences), -1, np.int32)  # the first row that a row repeats, if any
    size = len(undecided)  # rows decided together
    while len(undecided):
        block, later = undecided[:size], undecided[size:]
        most = math.inf if len(block) <= _LEAF else min(_MATCHES * len(block), _MOST_MATCHES)
        first, pairs = search.earlier(block, staying, most)
        if pairs is not None:
            _drop(pairs, repeated)
            stays, waits, size = repeated[block] < 0, np.zeros(len(block), bool), 2 * size
        else:
            # Too many pairs to hold. A row that repeats none stays, and one whose first is such a row goes. The others
            # wait: the row that they repeat goes or waits itself, and may leave them a later one.
            stays = first == block
            goes = ~stays & np.isin(first, np.concatenate([staying, block[stays]]))
            repeated[block[goes]] = first[goes]
            waits = ~stays & ~goes
            if waits.mean() > 0.5:
                size = max(len(block) // 2, _LEAF)
        staying = np.sort(np.concatenate([staying, block[stays]]))
        undecided = np.concatenate([block[waits], later])
    # A copy repeats what the row that it copies repeats, or that row.
    others = np.where(repeated[copies] >= 0, repeated[copies], copies)
    gone = others != rows
    return Matches(rows[gone], others[gone], sequences.f1(others[gone].astype(np.int64) << 32 | rows[gone]))


def _drop(pairs: np.ndarray, repeated: np.ndarray) -> None:
    """Writes into `repeated`, by row, the first row that stays and that a row repeats. pairs: all that are above."""
    left, right = pairs >> 32, pairs & ROW
    bounds = np.flatnonzero(np.diff(left, prepend=-1, append=-1)).tolist()
    for start, end in itertools.pairwise(bounds):
        if repeated[left[start]] < 0:
            near = right[start:end]
            repeated[near[repeated[near] < 0]] = left[start]


def nearest(
    sequences: Sequences, rows: np.ndarray, among: np.ndarray, threshold: float, earlier: bool = False
) -> Matches:
    """For each of `rows` that has F1 above `threshold` with one of `among`: the most similar of these, the first of
    equals. Both ascend and have no row in common. earlier: only rows before a row count.
    """
    copies = sequences.first_copies(rows)
    pairs = PairSearch(sequences, threshold).pairs(rows[copies == rows], among)
    left = pairs >> 32
    start, stop = np.searchsorted(left, copies), np.searchsorted(left, copies, side="right")
    which = np.repeat(np.arange(len(rows)), stop - start)
    pairs = pairs[np.arange(len(which)) - np.repeat(np.cumsum(stop - start) - stop, stop - start)]
    if earlier:
        fits = pairs & ROW < rows[which]
        which, pairs = which[fits], pairs[fits]
    others, scores = pairs & ROW, sequences.f1(pairs)
    best = np.lexsort((others, -scores, which))
    best = best[np.flatnonzero(np.diff(which[best], prepend=-1))]
    return Matches(rows[which[best]], others[best], scores[best])
