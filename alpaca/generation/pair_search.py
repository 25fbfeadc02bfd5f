"""All pairs of token sequences whose ROUGE-L F1 exceeds a threshold: exact, without comparing all, on all cores.

python generate_instruction.py dedup FILE.jsonl --output UNIQUE.jsonl            # ten million: eight minutes
python benchmarks/bench_dedup.py --data_path alpaca_data.json --sizes 1000       # one minute
"""

import contextlib
import functools
import itertools
import math
import resource
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, NamedTuple

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import LCSseq

from alpaca.common.cores import CORES
from alpaca.common.files import named_in_errors

_PART = 1 << 22  # signatures that a thread sorts at a time, which takes about 400 MB
_MOST_PARTS = 250  # of three open files each; from then on parts grow
_CHUNK = 1 << 20  # pairs compared in one array operation
_FIRST_CHUNK = 1 << 12  # the same at first: what these find spares many of the others
_JOB = 1 << 16  # signatures made at a time: arrays that fit the cache
CODE_POINTS = 0x110000  # token numbers below this fit a character of a string
_MOST_SUBSETS = 4096  # signatures of one sequence
_MANY = 200_000  # sequences from which on signatures of three tokens pay
ROW = 0xFFFFFFFF  # the right row of a packed pair
_SLOT_BITS = 27  # at most: of a hash, to look it up among those of the smaller side


def f1_scores(lcs: np.ndarray, candidate_length: np.ndarray, pool_length: np.ndarray) -> np.ndarray:
    """ROUGE-L F1 from lengths, in rouge_score's order of operations, so that float64 results are equal bit for bit.

    The three arrays broadcast; lengths are at least 1.
    """
    precision = lcs / pool_length
    recall = lcs / candidate_length
    total = precision + recall
    return np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)


def _most_parts() -> int:
    """Into how many parts signatures are split; some systems let a process open 256 files."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MOST_PARTS if files == resource.RLIM_INFINITY else min(_MOST_PARTS, max(1, (files - 64) // 3))


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
        # Its tokens as two sets of 64: the most frequent ones, and classes of the others.
        self.bits = np.zeros((2, len(self)), np.uint64)
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
            classes = codes.astype(np.uint64)
            classes = np.where(codes < 64, classes, classes * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(58))
            for bits, frequent in zip(self.bits, (True, False), strict=True):
                if len(filled):
                    members = np.where((codes < 64) == frequent, np.uint64(1) << classes, np.uint64(0))
                    bits[filled] = np.bitwise_or.reduceat(members, self.starts[filled] - begin)
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

    def pairs(self, rows: np.ndarray, others: np.ndarray | None = None) -> np.ndarray:
        """Pairs above the threshold within `rows`, or between `rows` and `others`: int64 left << 32 | right, ascending.

        Without `others`, left < right; with them, left is one of `rows`. Sequences without tokens match none.
        """
        held = _PairList(math.inf)
        self._compare(
            [rows] if others is None else [rows, others], lambda pairs: pairs, lambda pairs: [pairs], held.add
        )
        return held.all()

    def earlier(self, rows: np.ndarray, among: np.ndarray, most: float) -> tuple[np.ndarray, np.ndarray | None]:
        """What each of `rows` repeats: rows above the threshold before it, of `rows` or of `among`, in which it is not.

        Returns the first such row for each, int32, the row itself where there is none; and all pairs as `pairs` does,
        None where they are more than `most`. From there on, only what may be a first one is compared.
        """
        first, held = self._first, _PairList(most)
        first[rows] = rows
        own = threading.local()

        def wanted(pairs: np.ndarray) -> np.ndarray:
            left, right = pairs >> 32, pairs & ROW
            return pairs[left < (first[right] if held.full else right)]

        def in_turn(pairs: np.ndarray) -> Iterator[np.ndarray]:
            if not held.full:
                yield pairs
                return
            # The lowest row that each may repeat: where it does, it is spared the others.
            if not hasattr(own, "place_of"):
                own.place_of = np.empty(len(first), np.int32)
            right, place = pairs & ROW, np.arange(len(pairs), dtype=np.int32)
            own.place_of[right[::-1]] = place[::-1]  # of places for one row, the last that is written stays
            lowest = own.place_of[right] == place
            yield pairs[lowest]
            yield wanted(pairs[~lowest])

        def take(pairs: np.ndarray) -> None:
            np.minimum.at(first, pairs & ROW, (pairs >> 32).astype(np.int32))
            held.add(pairs)

        for sides in ([rows], [among, rows]) if len(among) else ([rows],):
            self._compare(sides, wanted, in_turn, take)
        pairs = held.all()
        return first[rows], None if held.full else pairs

    @functools.cached_property
    def _first(self) -> np.ndarray:
        """For `earlier`, by row."""
        return np.empty(len(self.sequences), np.int32)

    def _compare(
        self,
        sides: Sequence[np.ndarray],
        wanted: Callable[[np.ndarray], np.ndarray],
        in_turn: Callable[[np.ndarray], Iterable[np.ndarray]],
        take: Callable[[np.ndarray], None],
    ) -> None:
        """Gives `take`, by one thread at a time, the pairs above the threshold of those that `wanted` leaves.

        Each array is distinct and ascends; a pair can come several times. in_turn: parts the pairs into those that are
        compared one after the other.
        """
        k_of = np.minimum(self.least, self._subset_size(sum(map(len, sides)))[:, None])
        lock = threading.Lock()
        for k in range(1, 4):
            eligible = self.possible & (k_of == k)
            if not eligible.any():
                continue
            signatures = _Signatures(self, k, eligible)

            def compare(part: _Part, signatures: _Signatures = signatures) -> None:
                for pairs in signatures.candidates(part, between=len(sides) == 2):
                    pairs = wanted(pairs)
                    for chosen in in_turn(pairs[self._may_match(pairs)]):
                        matches = chosen[self.sequences.f1(chosen) > self.threshold]
                        with lock:
                            take(matches)

            # Parts that nobody read would keep their space on the disk. They close when no thread reads any more.
            with contextlib.ExitStack() as opened, ThreadPoolExecutor(CORES) as threads:
                parts = [opened.enter_context(part) for part in signatures.write(sides, threads)]
                list(threads.map(compare, parts))

    def _subset_size(self, number_of_rows: int) -> np.ndarray:
        """k for each distinct length of the shorter text, as far as the longest partner's prefix has few k-subsets."""
        excess = np.where(self.possible, self.sizes[None, :] - self.least, 0).max(1, initial=0)
        k_of = np.ones(len(self.sizes), np.int64)
        for k in (2, 3) if number_of_rows > _MANY else (2,):
            k_of[[math.comb(int(prefix), k) <= _MOST_SUBSETS for prefix in excess + k]] = k
        return k_of

    def _may_match(self, pairs: np.ndarray) -> np.ndarray:
        """False where the one has so many classes of tokens which the other lacks that too few can be common."""
        left, right = pairs >> 32, pairs & ROW
        common, other_common = self.sequences.lengths[left], self.sequences.lengths[right]
        for classes in self.sequences.bits:
            bits, other_bits = classes[left], classes[right]
            common -= np.bitwise_count(bits & ~other_bits)
            other_common -= np.bitwise_count(other_bits & ~bits)
        least = self.least[self.size_of[left], self.size_of[right]]  # symmetric
        return np.minimum(common, other_common) >= least


class _PairList:
    """Distinct packed pairs, as long as they are at most `most`; then `full`, and none."""

    def __init__(self, most: float):
        self.full = False
        self._most, self._found, self._more, self._number = most, np.empty(0, np.int64), [], 0

    def add(self, pairs: np.ndarray) -> None:
        if self.full:
            return
        self._more.append(pairs)
        self._number += len(pairs)
        # A pair shares many signatures. It is held once.
        if self._number > max(len(self._found), min(self._most, _CHUNK)):
            self.all()

    def all(self) -> np.ndarray:
        """The pairs so far, ascending."""
        self._found, self._more, self._number = distinct(np.concatenate([self._found, *self._more])), [], 0
        if len(self._found) > self._most:
            self.full, self._found = True, np.empty(0, np.int64)
        return self._found


class _Part(NamedTuple):
    """Temporary files of entries, one for each field."""

    hashes: IO[bytes]
    rows: IO[bytes]
    lasts: IO[bytes]

    def __enter__(self) -> "_Part":
        return self

    def __exit__(self, *_) -> None:
        for file in self:
            file.close()

    def read(self, dtypes: Sequence[type]) -> list[np.ndarray]:
        """The fields of all entries. The files close, and with that their space is free."""
        with self:
            for file in self:
                file.seek(0)
            return [np.fromfile(file, dtype) for file, dtype in zip(self, dtypes, strict=True)]


class _Signatures:
    """The signatures of k tokens of those pairs of lengths that `eligible` marks.

    An entry is a signature's hash (uint32), its row (int32), and its last place and group (uint32, or uint64 for very
    long texts). The group is its side and the number of its length. Sorted by hash and group, those that match stand
    together, the shorter text first. Each field lies in a file of its own: its values can be read on end.
    """

    def __init__(self, search: PairSearch, k: int, eligible: np.ndarray):
        self.search, self.k = search, k
        self.size_bits = len(search.sizes).bit_length()
        self.side_bit = np.uint64(1 << self.size_bits)
        self.group_bits = self.side_bit * np.uint64(2) - np.uint64(1)
        m, n = search.sizes[:, None], search.sizes[None, :]
        # The last place in its prefix that a signature may use: of the shorter and of the longer text of a pair.
        of_shorter = np.where(eligible, m - search.least + k - 1, -1)
        self.of_longer = np.where(eligible, n - search.least + k - 1, -1)
        self.prefix = np.maximum(of_shorter.max(1), self.of_longer.max(0)) + 1
        most = int(self.prefix.max(initial=0)) << self.size_bits + 1
        self.dtypes = (np.uint32, np.int32, np.uint32 if most < 1 << 32 else np.uint64)
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

    def write(self, sides: Sequence[np.ndarray], threads: ThreadPoolExecutor) -> list["_Part"]:
        """The entries in temporary files, split by hash.

        Of two sides, the larger one's entries are only those whose hash the smaller one probably has.
        """
        jobs: list[list[tuple[np.ndarray, int, int]]] = [[] for _ in sides]
        totals = [0] * len(sides)
        for side, rows in enumerate(sides):
            size_of = self.search.size_of[rows]
            order = np.argsort(size_of, kind="stable")
            bounds = np.searchsorted(size_of, np.arange(len(self.prefix) + 1), sorter=order)
            for size, prefix in enumerate(self.prefix.tolist()):
                members = rows[order[bounds[size] : bounds[size + 1]]]
                if prefix in self.subsets and len(members):
                    number = len(self.subsets[prefix])
                    totals[side] += number * len(members)
                    step = max(1, _JOB // number)
                    jobs[side] += [(members[i : i + step], side, size) for i in range(0, len(members), step)]
        number_of_parts = min(-(-sum(totals) // _PART), _most_parts())
        parts = [_Part(*(tempfile.TemporaryFile() for _ in range(3))) for _ in range(number_of_parts)]
        smaller = int(np.argmin(totals))
        slot_bits = min(totals[smaller].bit_length() + 3, _SLOT_BITS)
        hashes = np.zeros(1 << slot_bits, bool)
        lock = threading.Lock()

        def write(job: tuple[np.ndarray, int, int]) -> None:
            part_of, *fields = self._entries(*job, len(parts))
            order = np.argsort(part_of, kind="stable")
            if len(sides) == 2:
                slots = fields[0] >> np.uint32(32 - slot_bits)
                if job[1] == smaller:
                    hashes[slots] = True
                else:
                    order = order[hashes[slots[order]]]
                    part_of = part_of[order]
            fields = [field[order] for field in fields]
            ends = np.cumsum(np.bincount(part_of, minlength=len(parts))).tolist()
            with lock, named_in_errors(tempfile.gettempdir()):
                for part, start, end in zip(parts, [0, *ends], ends, strict=False):
                    for file, field in zip(part, fields, strict=True):
                        file.write(field[start:end])

        for side in (smaller, 1 - smaller)[: len(sides)]:
            list(threads.map(write, jobs[side]))
        return parts

    def _entries(self, rows: np.ndarray, side: int, size: int, parts: int) -> list[np.ndarray]:
        """The number of the part of each entry of rows of one length, and the entries' fields."""
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
        last_and_group = (subsets[:, -1] << self.size_bits + 1) + (side << self.size_bits) + size
        fields = (
            # Of other bits than the hash, which tells signatures apart that share a part.
            (key.astype(np.uint32) % np.uint32(parts)).astype(np.uint16),
            (key >> np.uint64(32)).astype(np.uint32),
            np.broadcast_to(rows.astype(np.int32)[:, None], key.shape),
            np.broadcast_to(last_and_group.astype(self.dtypes[2]), key.shape),
        )
        return [field.ravel() for field in fields]

    def candidates(self, part: "_Part", between: bool) -> Iterator[np.ndarray]:
        """Packed pairs of rows with one hash whose lengths and places allow a match; the shorter looks for the longer.

        Each array is distinct. The files are closed.
        """
        hashes, rows, lasts = part.read(self.dtypes)
        # One sort of words that hold as much of the hash as there is room for, the group, and the entry's place. Most
        # signatures stand alone and go.
        place_bits = np.uint64(len(hashes).bit_length())
        places = np.uint64((1 << int(place_bits)) - 1)
        hash_bits = ~((self.group_bits << place_bits) | places)
        words = hashes.astype(np.uint64)
        words <<= np.uint64(32)
        words &= hash_bits
        words |= (lasts & self.group_bits) << place_bits
        words |= np.arange(len(hashes), dtype=np.uint64)
        words.sort()
        new = np.diff(words & hash_bits, prepend=~words[:1]) != 0
        words = words[~(new & np.append(new[1:], True))]
        order = (words & places).astype(np.int64)
        keys = words >> place_bits
        rows, lasts = rows[order], (lasts[order] >> (self.size_bits + 1)).astype(np.int32)
        del hashes, words, order, new
        size = self.search.size_of[rows]
        reach = self.partner[size, lasts]
        seekers = np.flatnonzero(reach >= 0)
        reach = reach[seekers].astype(np.uint64)
        if between:
            across = (keys[seekers] & ~(self.side_bit - np.uint64(1))) ^ self.side_bit
            own = size[seekers].astype(np.uint64)
            # Equal lengths meet once: those of the first side look for them.
            from_left = (keys[seekers] & self.side_bit) == 0
            start = np.where(
                from_left, np.searchsorted(keys, across | own), np.searchsorted(keys, across | own, side="right")
            )
            stop = np.searchsorted(keys, across | reach, side="right")
        else:
            start = seekers + 1
            stop = np.searchsorted(keys, keys[seekers] & ~self.group_bits | reach, side="right")
        counts = np.maximum(stop - start, 0)
        ends = np.cumsum(counts)
        first, step = 0, min(_FIRST_CHUNK, _CHUNK)
        while first < len(seekers):
            done = ends[first - 1] if first else 0
            after = max(int(np.searchsorted(ends, done + step, side="right")), first + 1)
            n = counts[first:after]
            p = np.repeat(seekers[first:after], n)
            q = np.repeat(start[first:after] - (ends[first:after] - n - done), n) + np.arange(len(p))
            fits = lasts[q] <= self.of_longer[size[p], size[q]]
            p, q = p[fits], q[fits]
            left, right = rows[p].astype(np.int64), rows[q].astype(np.int64)
            # Between two sides the first side is left, else the lower row.
            swap = (keys[p] & self.side_bit) > 0 if between else left > right
            left[swap], right[swap] = right[swap], left[swap]
            yield distinct((left << 32 | right)[left != right])
            first, step = after, min(2 * step, _CHUNK)


def distinct(values: np.ndarray) -> np.ndarray:
    """The distinct values, ascending. Sorting is faster than the hashing of np.unique."""
    values = np.sort(values)
    new = np.ones(len(values), bool)
    new[1:] = values[1:] != values[:-1]
    return values[new]
