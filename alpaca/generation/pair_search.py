"""All pairs of token sequences whose ROUGE-L F1 exceeds a threshold: exact, without comparing all, on all cores.

python generate_instruction.py dedup FILE.jsonl --output UNIQUE.jsonl            # ten million: half an hour
python benchmarks/bench_dedup.py --data_path alpaca_data.json --sizes 1000       # one minute
"""

import contextlib
import functools
import itertools
import math
import os
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import LCSseq

from alpaca.common.files import named_in_errors

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

_PART = 1 << 22  # signatures that a thread sorts at a time, which takes about 400 MB
_CHUNK = 1 << 20  # pairs compared in one array operation
_SAMPLE = 1 << 12  # pairs compared at first, which tell about how many of the others will match
CODE_POINTS = 0x110000  # token numbers below this fit a character of a string
_MOST_SUBSETS = 4096  # signatures of one sequence
_MANY = 200_000  # sequences from which on signatures of three tokens pay
ROW = 0xFFFFFFFF  # the right row of a packed pair
NO_ROW = 2**31 - 1


def f1_scores(lcs: np.ndarray, candidate_length: np.ndarray, pool_length: np.ndarray) -> np.ndarray:
    """ROUGE-L F1 from lengths, in rouge_score's order of operations, so that float64 results are equal bit for bit.

    The three arrays broadcast; lengths are at least 1.
    """
    precision = lcs / pool_length
    recall = lcs / candidate_length
    total = precision + recall
    return np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)


class TooManyMatches(Exception):
    """More pairs are above the threshold than the caller wants to hold."""


class TokenNumbers(NamedTuple):
    """The tokens of some texts: the distinct ones, each text's as indices into these one after the other, counts."""

    words: list[str]
    indices: np.ndarray
    lengths: np.ndarray


class TokenStore:
    """Token sequences of any number, as int32 in a temporary file."""

    def __init__(self):
        self.numbers: dict[str, int] = {}
        self._file = tempfile.TemporaryFile()
        self._lengths: list[np.ndarray] = []

    def append(self, tokens: TokenNumbers) -> None:
        numbers = [self.numbers.setdefault(word, len(self.numbers)) for word in tokens.words]
        np.array(numbers, np.int32)[tokens.indices].tofile(self._file)
        self._lengths.append(tokens.lengths.astype(np.int32))

    def sequences(self) -> "Sequences":
        """What was appended so far. The store cannot be used any more."""
        lengths = np.concatenate([np.empty(0, np.int32), *self._lengths])
        self._file.flush()
        flat = np.memmap(self._file, np.int32) if lengths.any() else np.empty(0, np.int32)
        # The most frequent token becomes 0: small numbers make short strings.
        counts = np.zeros(len(self.numbers), np.int64)
        pieces = range(0, len(flat), 1 << 24)
        for start in pieces:
            counts += np.bincount(flat[start : start + (1 << 24)], minlength=len(counts))
        ranks = np.empty(len(counts), np.int32)
        ranks[np.argsort(-counts, kind="stable")] = np.arange(len(counts), dtype=np.int32)
        for start in pieces:
            flat[start : start + (1 << 24)] = ranks[flat[start : start + (1 << 24)]]
        return Sequences(flat, lengths)


@dataclass
class Sequences:
    """flat: int32 token numbers of all sequences, one after the other, 0 the most frequent; lengths: of each."""

    flat: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def __post_init__(self):
        self.ends = np.cumsum(self.lengths, dtype=np.int64)
        self.starts = self.ends - self.lengths
        # Each sequence as a string of one character a token, which is what rapidfuzz reads fastest. A sequence with a
        # number that is no code point is a list; rapidfuzz compares both kinds number by number.
        self.strings = np.empty(len(self), object)
        self.bits = np.zeros(len(self), np.uint64)  # a set of 64 classes of tokens
        first = 0
        while first < len(self):
            begin = self.starts[first]
            after = max(int(np.searchsorted(self.ends, begin + _CHUNK)), first + 1)
            codes = np.asarray(self.flat[begin : self.ends[after - 1]])
            text = np.minimum(codes, CODE_POINTS - 1).astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
            starts, ends = ((bounds[first:after] - begin).tolist() for bounds in (self.starts, self.ends))
            self.strings[first:after] = [text[start:end] for start, end in zip(starts, ends, strict=True)]
            for place in np.flatnonzero(codes >= CODE_POINTS):
                row = np.searchsorted(self.ends, begin + place, side="right")
                self.strings[row] = self.flat[self.starts[row] : self.ends[row]].tolist()
            filled = first + np.flatnonzero(self.lengths[first:after])
            classes = np.uint64(1) << (codes.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(58))
            if len(filled):
                self.bits[filled] = np.bitwise_or.reduceat(classes, self.starts[filled] - begin)
            first = after

    def matrix(self, rows: np.ndarray, length: int) -> np.ndarray:
        """The tokens of sequences that all have `length` tokens: (len(rows), length)."""
        return self.flat[self.starts[rows][:, None] + np.arange(length)]

    def first_copies(self, rows: np.ndarray) -> np.ndarray:
        """For each of `rows`, which ascend, the first of them with the same tokens. Those without tokens are alone."""
        first = rows.copy()
        lengths = self.lengths[rows]

        def mark(length: int) -> None:
            places = np.flatnonzero(lengths == length)
            tokens = self.matrix(rows[places], length)
            order = np.lexsort(tokens.T)
            tokens = tokens[order]
            new = np.ones(len(order), bool)
            new[1:] = (tokens[1:] != tokens[:-1]).any(1)
            first[places[order]] = rows[places[order]][new][np.cumsum(new) - 1]

        with ThreadPoolExecutor(CORES) as threads:
            list(threads.map(mark, np.setdiff1d(lengths, [0]).tolist()))
        return first

    def f1(self, pairs: np.ndarray) -> np.ndarray:
        """ROUGE-L F1 of packed pairs (left << 32 | right), whose sequences are not empty."""
        left, right = pairs >> 32, pairs & ROW
        lcs = process.cpdist(self.strings[left], self.strings[right], scorer=LCSseq.similarity, dtype=np.int32)
        return f1_scores(lcs, self.lengths[left].astype(np.float64), self.lengths[right].astype(np.float64))


class PairSearch:
    """Finds the pairs of sequences above a threshold, 0 <= threshold < 1, without comparing all with all.

    Let m <= n be two lengths and c the least common subsequence with F1 = 2c / (m + n) above the threshold. A pair
    that matches has at least c tokens in common, in one order. Sort the tokens of each sequence by their frequency in
    the whole file: the k rarest of those c stand among the first m - c + k of the one and the first n - c + k of the
    other, since c - k more must follow (the prefix filter of AllPairs, Bayardo et al. 2007, and PPJoin, Xiao et al.
    2008, with k tokens at once). So every k-subset of such a prefix, in the order of the text, is a signature, and
    sequences that match share one. Three tokens make chance meetings rare in a million texts, two in fewer; where c is
    smaller, or a prefix so long that it has too many subsets, k is smaller.

    Signatures are split by their hash into temporary files, each of which a thread then sorts and compares by itself.

    Made for instructions: among texts of hundreds of tokens, which all share a few of their rarer ones, nearly every
    pair is compared.
    """

    def __init__(self, sequences: Sequences, threshold: float):
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold is an F1 that must be exceeded, 0 <= threshold < 1; got {threshold}")
        self.sequences, self.threshold = sequences, threshold
        # What follows depends on lengths alone; a sequence carries the number of its length among the distinct ones.
        self.sizes = np.flatnonzero(np.bincount(sequences.lengths))
        self.size_of = np.searchsorted(self.sizes, sequences.lengths).astype(np.int32)
        shorter, longer = self.sizes[:, None], self.sizes[None, :]
        # Rounded down with a margin: where float error might decide, the pair is compared.
        self.least = np.maximum(np.floor(threshold * (shorter + longer) / 2 - 1e-9).astype(np.int64) + 1, 1)
        self.possible = (shorter <= longer) & (self.least <= shorter)

    def pairs(self, rows: np.ndarray, others: np.ndarray | None = None, most: float = math.inf) -> np.ndarray:
        """Pairs above the threshold within `rows`, or between `rows` and `others`: int64 left << 32 | right, ascending.

        Without `others`, left < right; with them, left is one of `rows`. Sequences without tokens match none. Raises
        TooManyMatches where there are more than `most`, or would be by what a sample shows.
        """
        found, more = np.empty(0, np.int64), []
        sides = [rows] if others is None else [rows, others]
        compare = functools.partial(self._matches, len(sides) == 2, most)
        with contextlib.closing(self._compared(sides, compare)) as compared:
            for matches in compared:
                more.append(matches)
                # A pair shares many signatures. It is held once.
                if sum(map(len, more)) > max(len(found), _CHUNK):
                    found, more = distinct(np.concatenate([found, *more])), []
                if len(found) > most:
                    raise TooManyMatches
        return distinct(np.concatenate([found, *more]))

    @functools.cached_property
    def _first(self) -> np.ndarray:
        """For `first_partners`, by row."""
        return np.full(len(self.sequences), NO_ROW, np.int32)

    def first_partners(self, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        """The first of `rows` above the threshold with each of `others`, which have none in common with `rows`: int32,
        as long as `others`, -1 where there is none. Pairs are neither held nor compared once a lower row is found."""
        first, lock = self._first, threading.Lock()
        first[others] = NO_ROW

        def compare(signatures: "_Signatures", part: IO[bytes]) -> None:
            for pairs, _ in signatures.candidates(part, between=True):
                pairs = pairs[pairs >> 32 < first[pairs & ROW]]
                pairs = pairs[self._may_match(pairs)]
                pairs = pairs[self.sequences.f1(pairs) > self.threshold]
                with lock:
                    np.minimum.at(first, pairs & ROW, (pairs >> 32).astype(np.int32))

        for _ in self._compared([rows, others], compare):
            pass
        return np.where(first[others] < NO_ROW, first[others], -1)

    def _compared(
        self, sides: Sequence[np.ndarray], compare: Callable[["_Signatures", IO[bytes]], Any]
    ) -> Generator[Any, None, None]:
        """What `compare` returns for each part of the sides' signatures."""
        k_of = np.minimum(self.least, self._subset_size(sum(map(len, sides)))[:, None])
        for k in range(1, 4):
            eligible = self.possible & (k_of == k)
            if eligible.any():
                signatures = _Signatures(self, k, eligible)
                # Parts that nobody read would keep their space on the disk. They close when no thread reads any more.
                with contextlib.ExitStack() as opened, ThreadPoolExecutor(CORES) as threads:
                    parts = [opened.enter_context(part) for part in signatures.write(sides, threads)]
                    yield from threads.map(functools.partial(compare, signatures), parts)

    def _subset_size(self, number_of_rows: int) -> np.ndarray:
        """k for each distinct length of the shorter text, as far as the longest partner's prefix has few k-subsets."""
        excess = np.where(self.possible, self.sizes[None, :] - self.least, 0).max(1, initial=0)
        k_of = np.ones(len(self.sizes), np.int64)
        for k in (2, 3) if number_of_rows > _MANY else (2,):
            k_of[[math.comb(int(prefix), k) <= _MOST_SUBSETS for prefix in excess + k]] = k
        return k_of

    def _matches(self, between: bool, most: float, signatures: "_Signatures", part: IO[bytes]) -> np.ndarray:
        """The pairs above the threshold that share a signature of this part."""
        found, number = [np.empty(0, np.int64)], 0
        for pairs, share in signatures.candidates(part, between):
            pairs = pairs[self._may_match(pairs)]
            found.append(pairs[self.sequences.f1(pairs) > self.threshold])
            number += len(found[-1])
            if number and number > most * share:
                raise TooManyMatches
        return distinct(np.concatenate(found))

    def _may_match(self, pairs: np.ndarray) -> np.ndarray:
        """False where the one has so many classes of tokens which the other lacks that too few can be common."""
        left, right = pairs >> 32, pairs & ROW
        bits, other_bits = self.sequences.bits[left], self.sequences.bits[right]
        length, other_length = self.sequences.lengths[left], self.sequences.lengths[right]
        size, other_size = self.size_of[left], self.size_of[right]
        least = self.least[size, other_size]  # symmetric
        common = np.minimum(
            length - np.bitwise_count(bits & ~other_bits), other_length - np.bitwise_count(other_bits & ~bits)
        )
        return common >= least


class _Signatures:
    """The signatures of k tokens of those pairs of lengths that `eligible` marks.

    A key is 47 bits of hash, 1 of side and 16 of the length's number, so that sorted keys bring those that match
    together, the shorter text first.
    """

    ENTRY = np.dtype([("key", np.uint64), ("row", np.int32), ("last", np.int32)])

    def __init__(self, search: PairSearch, k: int, eligible: np.ndarray):
        self.search, self.k = search, k
        m, n = search.sizes[:, None], search.sizes[None, :]
        # The last place in its prefix that a signature may use: of the shorter and of the longer text of a pair.
        of_shorter = np.where(eligible, m - search.least + k - 1, -1)
        self.of_longer = np.where(eligible, n - search.least + k - 1, -1)
        self.prefix = np.maximum(of_shorter.max(1), self.of_longer.max(0)) + 1
        # The greatest length (as its number) that a shorter text with a signature that ends at this place can match.
        self.partner = np.full((len(search.sizes), int(self.prefix.max(initial=0)) + 1), -1)
        for size in np.flatnonzero(eligible.any(1)):
            last = np.arange(of_shorter[size].max() + 1)
            allowed = of_shorter[size][:, None] >= last
            self.partner[size, last] = len(search.sizes) - 1 - np.argmax(allowed[::-1], axis=0)
        # All k-subsets of a prefix, ascending within each.
        self.subsets = {
            p: np.array(list(itertools.combinations(range(p), k)), np.intp) for p in set(self.prefix.tolist()) if p >= k
        }

    def write(self, sides: Sequence[np.ndarray], threads: ThreadPoolExecutor) -> list[IO[bytes]]:
        """Temporary files of entries, split by hash; an entry is a signature with its row and its last place."""
        jobs, total = [], 0
        for side, rows in enumerate(sides):
            size_of = self.search.size_of[rows]
            order = np.argsort(size_of, kind="stable")
            bounds = np.searchsorted(size_of, np.arange(len(self.prefix) + 1), sorter=order)
            for size, prefix in enumerate(self.prefix.tolist()):
                members = rows[order[bounds[size] : bounds[size + 1]]]
                if prefix in self.subsets and len(members):
                    number = len(self.subsets[prefix])
                    total += number * len(members)
                    step = max(1, _CHUNK // number)
                    jobs += [(members[i : i + step], side, size) for i in range(0, len(members), step)]
        parts = [tempfile.TemporaryFile() for _ in range(-(-total // _PART))]
        lock = threading.Lock()

        def write(job: tuple[np.ndarray, int, int]) -> None:
            entries = self._entries(*job)
            part_of = ((entries["key"] >> np.uint64(32)) % np.uint64(len(parts))).astype(np.uint16)
            entries = entries[np.argsort(part_of, kind="stable")]
            ends = np.cumsum(np.bincount(part_of, minlength=len(parts))).tolist()
            with lock, named_in_errors(tempfile.gettempdir()):
                for part, start, end in zip(parts, [0, *ends], ends, strict=False):
                    part.write(entries[start:end])

        list(threads.map(write, jobs))
        return parts

    def _entries(self, rows: np.ndarray, side: int, size: int) -> np.ndarray:
        """The entries of rows of one length."""
        prefix = int(self.prefix[size])
        subsets = self.subsets[prefix]
        tokens = self.search.sequences.matrix(rows, int(self.search.sizes[size]))
        place = np.argsort(-tokens, axis=1, kind="stable")[:, :prefix]
        packed = place << 32 | np.take_along_axis(tokens, place, axis=1)
        chosen = [packed[:, column] for column in subsets.T]
        # Into the order of the text: a sorting network over two or three arrays.
        for end in range(self.k - 1, 0, -1):
            for i in range(end):
                low, high = np.minimum(chosen[i], chosen[i + 1]), np.maximum(chosen[i], chosen[i + 1])
                chosen[i], chosen[i + 1] = low, high
        key = np.zeros(chosen[0].shape, np.uint64)
        for token in chosen:
            key = (key ^ (token & ROW).astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
            key ^= key >> np.uint64(29)
        entries = np.empty(key.shape, self.ENTRY)
        entries["key"] = key & np.uint64(0xFFFFFFFFFFFE0000) | np.uint64(side << 16 | size)
        entries["row"] = rows[:, None]
        entries["last"] = subsets[:, -1]
        return entries.ravel()

    def candidates(self, part: IO[bytes], between: bool) -> Iterator[tuple[np.ndarray, float]]:
        """Packed pairs of rows with one hash whose lengths and places allow a match; the shorter looks for the longer.

        Each array is distinct, and comes with the share of the part's pairs that have been given so far. The file is
        closed.
        """
        part.seek(0)
        entries = np.fromfile(part, self.ENTRY)
        part.close()
        # Most signatures stand alone and go. To find them, the hashes are sorted with the place in the low bits, which
        # takes a fifth of the time of argsort.
        low = np.uint64((1 << max(len(entries).bit_length(), 17)) - 1)
        hashes = np.sort(entries["key"] & ~low | np.arange(len(entries), dtype=np.uint64))
        new = np.diff(hashes & ~low, prepend=~hashes[:1]) != 0
        order = (hashes[~(new & np.append(new[1:], True))] & low).astype(np.int64)
        order = order[np.argsort(entries["key"][order])]
        keys, rows, lasts = (entries[field][order] for field in self.ENTRY.names)
        del entries, order, hashes, new
        size = self.search.size_of[rows]
        reach = self.partner[size, lasts]
        seekers = np.flatnonzero(reach >= 0)
        reach = reach[seekers].astype(np.uint64)
        if between:
            across = (keys[seekers] & ~np.uint64(0xFFFF)) ^ np.uint64(1 << 16)
            own = size[seekers].astype(np.uint64)
            # Equal lengths meet once: those of the first side look for them.
            from_left = (keys[seekers] & np.uint64(1 << 16)) == 0
            start = np.where(
                from_left, np.searchsorted(keys, across | own), np.searchsorted(keys, across | own, side="right")
            )
            stop = np.searchsorted(keys, across | reach, side="right")
        else:
            start = seekers + 1
            stop = np.searchsorted(keys, keys[seekers] & ~np.uint64(0xFFFF) | reach, side="right")
        counts = np.maximum(stop - start, 0)
        ends = np.cumsum(counts)
        first = 0
        while first < len(seekers):
            done = ends[first - 1] if first else 0
            step = _CHUNK if first else min(_SAMPLE, _CHUNK)
            after = max(int(np.searchsorted(ends, done + step, side="right")), first + 1)
            n = counts[first:after]
            p = np.repeat(seekers[first:after], n)
            q = np.repeat(start[first:after] - (ends[first:after] - n - done), n) + np.arange(len(p))
            fits = lasts[q] <= self.of_longer[size[p], size[q]]
            p, q = p[fits], q[fits]
            left, right = rows[p].astype(np.int64), rows[q].astype(np.int64)
            # Between two sides the first side is left, else the lower row.
            swap = (keys[p] & np.uint64(1 << 16)) > 0 if between else left > right
            left[swap], right[swap] = right[swap], left[swap]
            yield distinct((left << 32 | right)[left != right]), ends[after - 1] / ends[-1] if ends[-1] else 1.0
            first = after


def distinct(values: np.ndarray) -> np.ndarray:
    """The distinct values, ascending. Sorting is faster than the hashing of np.unique."""
    values = np.sort(values)
    new = np.ones(len(values), bool)
    new[1:] = values[1:] != values[:-1]
    return values[new]
