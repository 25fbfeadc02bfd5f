"""All pairs of token sequences whose ROUGE-L F1 exceeds a threshold, exact, in about linear time.

Used by rouge_index.py, which turns texts into tokens:

    python benchmarks/bench_dedup.py --data_path alpaca_data.json --sizes 10000,100000,1000000     # full scale
    python -c "from rouge_index import near_duplicates; print(near_duplicates(['name a city', 'Name a big city']))"
"""

import functools
import itertools
import math
from collections.abc import Iterator

import numpy as np

_PART = 1 << 24  # signatures held at a time: about 600 MB with what sorting needs
_CHUNK = 1 << 22  # pairs looked at in one array operation
_CODE_POINTS = 0x110000 - 0x800  # what Unicode has without the surrogates
_MOST_SUBSETS = 4096  # signatures of one sequence
_MANY = 200_000  # sequences from which on signatures of three tokens pay


def f1_scores(lcs: np.ndarray, candidate_length: np.ndarray, pool_length: np.ndarray) -> np.ndarray:
    """ROUGE-L F1 from lengths, in rouge_score's order of operations, so that float64 results are equal bit for bit.

    The three arrays broadcast; lengths are at least 1.
    """
    precision = lcs / pool_length
    recall = lcs / candidate_length
    total = precision + recall
    return np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)


class TooManyMeetings(Exception):
    """More pairs share a signature than the caller wants to have compared."""


class PairSearch:
    """Finds the pairs of token sequences above a threshold without comparing all with all.

    Let m <= n be two lengths and c the least common subsequence with F1 = 2c / (m + n) above the threshold. A pair
    that matches has at least c tokens in common, in one order. Sort the tokens of each sequence by their frequency in
    the whole file: the k rarest of those c stand among the first m - c + k of the one and the first n - c + k of the
    other, since c - k more must follow (the prefix filter of AllPairs, Bayardo et al. 2007, and PPJoin, Xiao et al.
    2008, with k tokens at once). So every k-subset of such a prefix, in the order of the text, is a signature, and
    sequences that match share one. Three tokens make chance meetings rare in a million texts, two in fewer; where c is
    smaller, or a prefix so long that it has too many subsets, k is smaller.

    Made for instructions: among texts of hundreds of tokens, which all share a few of their rarer ones, nearly every
    pair is compared.

    flat: the token numbers of all sequences, one sequence after the other; lengths: how many each has. No two
    sequences are equal. threshold: 0 <= threshold < 1.
    """

    def __init__(self, flat: np.ndarray, lengths: np.ndarray, threshold: float):
        self.threshold = threshold
        self.lengths = lengths
        self.starts = np.cumsum(lengths) - lengths
        # Renumbered, the rarest token first.
        frequency = np.bincount(flat)
        rank = np.empty(len(frequency), np.int32)
        rank[np.argsort(frequency, kind="stable")] = np.arange(len(frequency), dtype=np.int32)
        self.flat = rank[flat]
        # What follows depends on lengths alone; a sequence carries the number of its length among the distinct ones.
        self.sizes, self.size_of = np.unique(lengths, return_inverse=True)
        shorter, longer = self.sizes[:, None], self.sizes[None, :]
        # Rounded down with a margin: where float error might decide, the pair is compared.
        self.least = np.maximum(np.floor(threshold * (shorter + longer) / 2 - 1e-9).astype(np.int64) + 1, 1)
        self.possible = (shorter <= longer) & (self.least <= shorter)

    def pairs(
        self, rows: np.ndarray, others: np.ndarray | None = None, most: float = math.inf
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pairs of distinct texts above the threshold, within `rows` or between `rows` and `others`: left, right, F1.

        Without `others`, left < right; with them, left is one of `rows`. Each pair comes once, sorted. Raises
        TooManyMeetings before it compares more than about `most` pairs.
        """
        found = [np.empty(0, np.int64)]
        k_of = np.minimum(self.least, self._subset_size(len(rows) + len(rows if others is None else others))[:, None])
        for k in range(1, 4):
            eligible = self.possible & (k_of == k)
            if not eligible.any():
                continue
            for candidates in self._candidates(rows, others, k, eligible, most):
                left, right = candidates >> 32, candidates & 0xFFFFFFFF
                found.append(candidates[self._f1(left, right) > self.threshold])
        found = np.unique(np.concatenate(found))
        left, right = found >> 32, found & 0xFFFFFFFF
        return left, right, self._f1(left, right)

    def _subset_size(self, number_of_rows: int) -> np.ndarray:
        """k for each distinct length of the shorter text, as far as the longest partner's prefix has few k-subsets."""
        excess = np.where(self.possible, self.sizes[None, :] - self.least, 0).max(1, initial=0)
        k_of = np.ones(len(self.sizes), np.int64)
        for k in (2, 3) if number_of_rows > _MANY else (2,):
            k_of[[math.comb(int(prefix), k) <= _MOST_SUBSETS for prefix in excess + k]] = k
        return k_of

    def _candidates(self, rows, others, k, eligible, most) -> Iterator[np.ndarray]:
        """Pairs of rows that share a signature of k tokens, as left << 32 | right, unique within each array."""
        m, n = self.sizes[:, None], self.sizes[None, :]
        # The last place in its prefix that a signature may use: of the shorter and of the longer text of a pair.
        of_shorter = np.where(eligible, m - self.least + k - 1, -1)
        of_longer = np.where(eligible, n - self.least + k - 1, -1)
        prefix = np.maximum(of_shorter.max(1), of_longer.max(0)) + 1
        # The greatest length (as its number) that a shorter text with a signature that ends at this place can match.
        partner = np.full((len(self.sizes), int(prefix.max(initial=0)) + 1), -1)
        for size in np.flatnonzero(eligible.any(1)):
            last = np.arange(of_shorter[size].max() + 1)
            allowed = of_shorter[size][:, None] >= last
            partner[size, last] = len(self.sizes) - 1 - np.argmax(allowed[::-1], axis=0)

        sides = [rows] if others is None else [rows, others]
        combinations = {p: _subsets(int(p), k) for p in np.unique(prefix) if p >= k}
        total = sum(
            len(combinations[p]) * int(np.isin(self.size_of[side], np.flatnonzero(prefix == p)).sum())
            for p in combinations
            for side in sides
        )
        parts = -(-total // _PART)
        for part in range(parts):
            blocks = [
                block
                for side, members in enumerate(sides)
                for block in self._signatures(members, side, k, prefix, combinations, part, parts)
            ]
            keys, owners, lasts = (np.concatenate(columns) for columns in zip(*blocks, strict=True))
            del blocks
            order = np.argsort(keys)
            keys, owners, lasts = keys[order], owners[order], lasts[order]
            del order
            yield from self._meetings(keys, owners, lasts, partner, of_longer, others is not None, most / parts)

    def _signatures(self, rows, side, k, prefix, combinations, part, parts):
        """Yields keys, their rows and their last places. A key is 47 bits of hash, 1 of side, 16 of length number."""
        for size in np.unique(self.size_of[rows]):
            if prefix[size] < k:
                continue
            members, length = rows[self.size_of[rows] == size], int(self.sizes[size])
            subsets = combinations[prefix[size]]
            step = max(1, (1 << 20) // len(subsets))
            for first in range(0, len(members), step):
                some = members[first : first + step]
                tokens = self.flat[self.starts[some][:, None] + np.arange(length)]
                place = np.argsort(tokens, axis=1, kind="stable")[:, : prefix[size]]
                packed = place << 32 | np.take_along_axis(tokens, place, axis=1)
                chosen = [packed[:, column] for column in subsets.T]
                # Into the order of the text: a sorting network over two or three arrays.
                for end in range(k - 1, 0, -1):
                    for i in range(end):
                        low, high = np.minimum(chosen[i], chosen[i + 1]), np.maximum(chosen[i], chosen[i + 1])
                        chosen[i], chosen[i + 1] = low, high
                key = np.zeros(chosen[0].shape, np.uint64)
                for token in chosen:
                    key = (key ^ (token & 0xFFFFFFFF).astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
                    key ^= key >> np.uint64(29)
                key = key.ravel()
                owner = np.repeat(some.astype(np.int32), len(subsets))
                last = np.tile(subsets[:, -1].astype(np.int32), len(some))
                if parts > 1:
                    mine = (key >> np.uint64(32)) % np.uint64(parts) == part
                    key, owner, last = key[mine], owner[mine], last[mine]
                key = key & np.uint64(0xFFFFFFFFFFFE0000) | np.uint64(side << 16 | int(size))
                yield key, owner, last

    def _meetings(self, keys, owners, lasts, partner, of_longer, between, most) -> Iterator[np.ndarray]:
        """Pairs of entries with one hash whose lengths and places allow a match; the shorter looks for the longer."""
        size = self.size_of[owners]
        reach = partner[size, lasts]
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
        if counts.sum() > most:
            raise TooManyMeetings
        first = 0
        while first < len(seekers):
            done = ends[first - 1] if first else 0
            after = max(int(np.searchsorted(ends, done + _CHUNK, side="right")), first + 1)
            n = counts[first:after]
            p = np.repeat(seekers[first:after], n)
            q = np.repeat(start[first:after] - (ends[first:after] - n - done), n) + np.arange(len(p))
            fits = lasts[q] <= of_longer[size[p], size[q]]
            a, b = owners[p[fits]].astype(np.int64), owners[q[fits]].astype(np.int64)
            if between:
                swap = (keys[p[fits]] & np.uint64(1 << 16)) > 0
                left, right = np.where(swap, b, a), np.where(swap, a, b)
            else:
                left, right = np.minimum(a, b), np.maximum(a, b)
            yield np.unique((left << 32 | right)[left != right])
            first = after

    def _f1(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        from rapidfuzz import process
        from rapidfuzz.distance import LCSseq

        lengths = self.lengths[left].astype(np.float64), self.lengths[right].astype(np.float64)
        lcs = process.cpdist(self._strings[left], self._strings[right], scorer=LCSseq.similarity, dtype=np.int32)
        scores = f1_scores(lcs, *lengths)
        if self.flat.max(initial=0) >= _CODE_POINTS:
            # Tokens that share a code point can only add to the common subsequence: what is below the threshold stays
            # below, and the rest is measured on the numbers themselves.
            for i in np.flatnonzero(scores > self.threshold):
                lcs[i] = LCSseq.similarity(self._numbers(left[i]), self._numbers(right[i]))
            scores = f1_scores(lcs, *lengths)
        return scores

    def _numbers(self, row: int) -> list[int]:
        return self.flat[self.starts[row] : self.starts[row] + self.lengths[row]].tolist()

    @functools.cached_property
    def _strings(self) -> np.ndarray:
        """Each sequence as a string with one code point per token, which is what rapidfuzz reads fastest."""
        strings = np.empty(len(self.lengths), object)
        codes = self.flat % _CODE_POINTS
        codes += np.where(codes >= 0xD800, 0x800, 0).astype(np.int32)  # surrogates are no characters
        for i, (start, length) in enumerate(zip(self.starts.tolist(), self.lengths.tolist(), strict=True)):
            strings[i] = codes[start : start + length].astype("<u4").tobytes().decode("utf-32-le")
        return strings


def _subsets(size: int, k: int) -> np.ndarray:
    """All k-subsets of range(size), ascending within each: (number, k)."""
    return np.array(list(itertools.combinations(range(size), k)), np.intp).reshape(-1, k)
