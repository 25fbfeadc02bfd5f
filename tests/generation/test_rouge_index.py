"""rouge.py and pair_search.py: F1 equal to rouge_score's bit for bit, and no pair above a threshold missed."""

import itertools
import re
import resource
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer, tokenizers

from alpaca.generation import pair_search, rouge
from alpaca.generation.rouge import (
    RougeLIndex,
    first_repeats,
    nearest,
    rouge_tokens,
    token_sequences,
    unicode_tokens,
)

reference_tokens = tokenizers.DefaultTokenizer(use_stemmer=False).tokenize
relaxed = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

# Few words, so that texts have much in common; case, punctuation, digits and letters beyond ASCII and beyond the BMP.
WORDS = [
    "a", "the", "list", "List", "name", "of", "city", "don't", "x2", "naïve", "Ⅷ", "İstanbul", "\u212a", "中文", "𝔘x",
    "𐐷", "-", "",
]  # fmt: skip
texts_of_words = st.lists(st.sampled_from(WORDS), max_size=90).map(" ".join)
any_text = st.one_of(texts_of_words, st.text(max_size=60), st.sampled_from(["", " ", "!?", "中文", "中文 ", "ｚ"]))


def reference_f1(new: str, old: str) -> float:
    """The original's figure; where both texts have no token, whether they are the same after normalisation."""
    new_tokens, old_tokens = reference_tokens(new), reference_tokens(old)
    if not new_tokens and not old_tokens:
        plain = [" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in (new, old)]
        return float(plain[0] == plain[1] != "")
    return rouge_scorer._score_lcs(new_tokens, old_tokens).fmeasure


def reference_scores(new: str, pool: list[str]) -> list[float]:
    return [reference_f1(new, old) for old in pool]


@relaxed
@given(st.text())
def test_tokens_are_rouge_scores(text):
    """Guards against a tokenizer that differs on letters whose lower case is ASCII (Kelvin sign) or longer (İ)."""
    assert rouge_tokens(text) == reference_tokens(text)


@relaxed
@given(st.lists(any_text, max_size=12), st.lists(any_text, max_size=6), st.lists(any_text, min_size=1, max_size=4))
def test_scores_equal_rouge_score_bit_for_bit(pool, added, candidates):
    """Guards the kernel, the order of float operations and the padded newcomers against any difference at all."""
    index = RougeLIndex(pool)
    for text in added:
        index.add(text)
    assert len(index) == len(pool) + len(added)
    for text in candidates:
        assert index.scores(text).tolist() == reference_scores(text, pool + added)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 150, 1000])
def test_lengths_around_machine_words(length):
    """Guards the widths of 16, 32 and 64 bits, whose top bit carries out, and the texts that fit none of them."""
    rng = np.random.default_rng(length)
    pool = [" ".join(rng.choice(["a", "b", "c", "d"], n)) for n in (1, 2, 15, 16, 17, 32, 33, 63, 64, 65, 200)]
    pool += ["", " ".join("a" * 1000), " ".join(f"w{i}" for i in range(1000))]
    index = RougeLIndex(pool[:7])
    for text in pool[7:]:
        index.add(text)
    texts = [" ".join(rng.choice(["a", "b", "c", "new"], length)), " ".join("a" * length)]
    for text in texts + pool[-1:] * (length == 1000):
        assert index.scores(text).tolist() == reference_scores(text, pool)


@pytest.mark.parametrize("block, fresh, cores, code_points", [(64, 16, 3, 20), (512, 100, 1, 1 << 20)])
def test_pool_grows_over_many_blocks(monkeypatch, block, fresh, cores, code_points):
    """Guards newcomers, the filling of blocks, several threads, and tokens that are no code points: nothing lost."""
    monkeypatch.setattr(rouge, "_BLOCK", block)
    monkeypatch.setattr(rouge, "_FRESH", fresh)
    monkeypatch.setattr(rouge, "CORES", cores)
    monkeypatch.setattr(rouge, "CODE_POINTS", code_points)
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(50, size=rng.integers(1, 12))) for _ in range(1500)]
    texts[700] = " ".join(f"w{i}" for i in rng.integers(50, size=80))
    for known in (0, 10, block, 1000):
        index = RougeLIndex(texts[:known])
        for text in texts[known:]:
            index.add(text)
        assert index.texts == texts
        for text in [*texts[::300], texts[700]]:
            assert index.scores(text)[texts.index(text)] == 1.0
            assert index.scores(text)[::50].tolist() == reference_scores(text, texts[::50])


def test_nothing_in_the_pool():
    """Guards an empty pool and an empty file against errors."""
    index = RougeLIndex()
    assert index.scores("a b").shape == index.scores("a " * 100).shape == (0,)
    assert RougeLIndex(["", "!"]).scores("a " * 100).tolist() == [0.0, 0.0]
    assert index.top("a b", 3) == []
    assert repeats([]) == [] and repeats(["", " "]) == []


def test_top_is_stable():
    """Guards the order of regen.json's most similar instructions: best first, equal ones as they came."""
    index = RougeLIndex(["x y", "a b c", "c d", "a b d", "b c"])
    assert index.top("a b c", 3) == [("a b c", 1.0), ("b c", 0.8), ("a b d", 2 / 3)]
    assert [text for text, _ in index.top("q", 9)] == index.texts
    assert index.top("a b c", 2, scores=np.array([0.0, 0.5, 0.5, 0.5, 0.0])) == [("a b c", 0.5), ("c d", 0.5)]


@relaxed
@given(st.integers(1, 30), st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.7, 1.0]), min_size=1, max_size=2500))
def test_top_of_many(k, scores):
    """Guards the shortcut for long pools: the same as sorting all of them."""
    index = RougeLIndex()
    index.texts = [str(i) for i in range(len(scores))]
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[:k]
    assert index.top("", k, np.array(scores)) == [(str(i), scores[i]) for i in best]


def test_chinese_without_unicode_dedup():
    """Guards the original's bug that identical Chinese instructions are never duplicates: [a-z0-9] sees nothing."""
    index = RougeLIndex(["写一首关于春天的诗", "ｗｒｉｔｅ", "写一首诗"])
    assert index.scores(" 写一首关于春天的诗\n").tolist() == [1.0, 0.0, 0.0]
    assert repeats(["写一首诗", "画一只猫", "写一首诗 ", "", ""]) == [(0, 2, 1.0)]


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("Write a haiku!", ["write", "a", "haiku"]),
        ("写一首诗, bitte", ["写", "一", "首", "诗", "bitte"]),
        ("カタカナ ｶﾅ", ["カ", "タ", "カ", "ナ", "カ", "ナ"]),
        ("Straße STRASSE", ["strasse", "strasse"]),
        ("हिन्दी में लिखो", ["हिन्दी", "में", "लिखो"]),
        ("나는 학교에 간다.", ["나는", "학교에", "간다"]),
        ("می‌خواهم", ["میخواهم"]),
        ("ไทย", ["ไ", "ท", "ย"]),
        ("e\u0301te\u0301 d’été", ["été", "d", "été"]),
        ("𠀀𠀁 😀", ["𠀀", "𠀁"]),
    ],
)
def test_unicode_tokens(text, tokens):
    """Guards words of any script: vowel signs stay, joiners vanish, scripts without spaces give characters."""
    assert unicode_tokens(text) == tokens


@relaxed
@given(st.text(st.characters(max_codepoint=127)))
def test_unicode_tokens_agree_on_ascii(text):
    """Guards figures of English data against a change when --unicode_dedup is switched on."""
    assert unicode_tokens(text) == rouge_tokens(text)


def test_unicode_dedup_scores():
    """Guards Chinese and Cyrillic near duplicates, which [a-z0-9] cannot see."""
    index = RougeLIndex(["写一首关于春天的诗", "Напиши короткий рассказ о море"], unicode_dedup=True)
    assert index.scores("写一首关于秋天的诗").tolist() == [2 * (8 / 9) * (8 / 9) / (8 / 9 + 8 / 9), 0.0]
    assert index.scores("напиши короткий рассказ о горе")[1] == pytest.approx(0.8)
    sequences = token_sequences(["写一首关于春天的诗", "写一首关于秋天的诗"], unicode_dedup=True)
    assert first_repeats(sequences).rows.tolist() == [1]


def repeats(texts: list[str], threshold: float = 0.7) -> list[tuple[int, int, float]]:
    found = first_repeats(token_sequences(texts), threshold)
    return list(zip(found.others.tolist(), found.rows.tolist(), found.scores.tolist(), strict=True))


def brute_force(scores: np.ndarray, threshold: float, rows, fixed: int):
    """What `first_repeats` and `nearest` (among earlier rows that stayed) must find, from the F1 of all pairs."""
    kept, repeated, most_similar = [], [], []
    for j in rows:
        near = [i for i in kept if scores[i, j] > threshold]
        if near and j >= fixed:
            repeated.append((near[0], j, scores[near[0], j]))
            best = max(near, key=lambda i: (scores[i, j], -i))
            most_similar.append((best, j, scores[best, j]))
        else:
            kept.append(j)
    return repeated, most_similar, kept


def test_few_files_may_be_open(monkeypatch):
    """macOS lets a process open 256 files, and the search held 750 open."""
    rng = np.random.default_rng(0)
    sequences = token_sequences([" ".join(rng.choice(list("abcdefghijkl"), 8)) for _ in range(400)])
    rows = np.arange(len(sequences), dtype=np.int64)
    expected = pair_search.PairSearch(sequences, 0.7).pairs(rows)
    monkeypatch.setattr(pair_search, "_PART", 10)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        found = pair_search.PairSearch(sequences, 0.7).pairs(rows)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(expected) == 12 and found.tolist() == expected.tolist()


@pytest.mark.parametrize("seed", range(40))
def test_no_pair_is_missed(seed, monkeypatch):
    """Guards the prefix filter, its parts and its code points against a lost pair: each is forced to its limits."""
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(pair_search, "_PART", int(rng.choice([50, 1 << 24])))
    monkeypatch.setattr(pair_search, "_CHUNK", int(rng.choice([7, 1 << 22])))
    monkeypatch.setattr(pair_search, "_MANY", int(rng.choice([0, 1 << 20])))  # signatures of three tokens, or of two
    monkeypatch.setattr(pair_search, "_MOST_SUBSETS", int(rng.choice([1, 20, 4096])))
    monkeypatch.setattr(pair_search, "CODE_POINTS", int(rng.choice([3, 1 << 20])))  # more tokens than code points
    monkeypatch.setattr(rouge, "_LEAF", int(rng.choice([4, 16, 8192])))
    monkeypatch.setattr(rouge, "_MATCHES", int(rng.choice([0, 3, 200])))
    vocabulary = [f"w{i}" for i in range(rng.choice([3, 10, 60]))]
    lengths = [0, 1, 2, 3, 4, 5, 6, 8, 12, 20, int(rng.choice([3, 130]))]
    texts = [" ".join(rng.choice(vocabulary, rng.choice(lengths))) for _ in range(rng.choice([5, 40, 90]))]
    for i in range(0, len(texts) - 1, 3):  # near copies, also with words in another order
        words = texts[i].split()
        if words:
            words[rng.integers(len(words))] = "changed"
            texts[i + 1] = " ".join(words if i % 2 else words[::-1])
    threshold = float(rng.choice([0.0, 0.3, 0.5, 0.66, 0.7, 0.9]))
    index, sequences = RougeLIndex(texts), token_sequences(texts)
    scores = np.array([index.scores(text) for text in texts])

    above = np.argwhere(scores > threshold)
    search = pair_search.PairSearch(sequences, threshold)
    assert unpacked(search.pairs(np.arange(len(texts)))) == [[i, j] for i, j in above.tolist() if i < j]
    even, odd = np.arange(0, len(texts), 2), np.arange(1, len(texts), 2)
    assert unpacked(search.pairs(even, odd)) == [[i, j] for i, j in above.tolist() if i % 2 == 0 and j % 2]

    for rows, fixed in ((np.arange(len(texts)), 0), (np.arange(len(texts)), len(texts) // 2), (odd, 0)):
        repeated, most_similar, kept = brute_force(scores, threshold, rows.tolist(), fixed)
        first = first_repeats(sequences, threshold, rows, fixed)
        assert list(zip(first.others, first.rows, first.scores, strict=True)) == repeated
        found = nearest(sequences, first.rows, np.array(kept, np.int64), threshold, earlier=True)
        assert list(zip(found.others, found.rows, found.scores, strict=True)) == most_similar


def unpacked(pairs: np.ndarray) -> list[list[int]]:
    return [[pair >> 32, pair & 0xFFFFFFFF] for pair in pairs.tolist()]


@pytest.mark.parametrize("neighbours", [0, 3])
@pytest.mark.parametrize("unicode_dedup", [False, True])
def test_many_are_added_as_one_by_one(monkeypatch, unicode_dedup, neighbours):
    """Guards journals that are read in thousands of replies: the same tasks stay, the same nearest ones are named, and
    each average is over what was in the pool at its time, in all 64 bits."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice([*"abcdefgh", "中文"], rng.integers(1, 9))) for _ in range(600)]
    texts[::50] = [" ".join(rng.choice([*"abcdefgh"], 60 + i)) for i in range(12)]  # on both sides of SHORT
    texts[1::100] = ["", "!", " ", "a", "a", "中文"]
    monkeypatch.setattr(rouge, "_BLOCK", 64)
    found, pools = [], []
    for many in (1 << 20, 0):
        monkeypatch.setattr(rouge, "_MANY", many)
        index = RougeLIndex(texts[:50], unicode_dedup)
        added = [index.add_new(texts[start : start + 200], 0.7, neighbours) for start in range(50, 600, 200)]
        found.append(list(itertools.chain.from_iterable(added)))
        pools.append((index.texts, index.scores("a b c d").tolist()))
    assert found[0] == found[1] and pools[0] == pools[1]
    assert 50 < len(pools[0][0]) < 500
    new = [(text, compared) for text, compared in zip(texts[50:], found[1], strict=True) if compared.new]
    for place, (text, compared) in enumerate(new, start=50):
        before = RougeLIndex(pools[0][0][:place], unicode_dedup)
        average = before.scores(text).mean() if neighbours else None
        assert (list(compared.nearest), compared.average) == (before.top(text, neighbours), average)


def test_exactly_the_threshold_stays():
    """Guards the original's rule that 0.7 stays and only more goes, in the presence of float error."""
    texts = ["a b c d e f g h i j", "a b c d e f g x y z"]
    assert RougeLIndex(texts).scores(texts[0])[1] == 0.7
    assert repeats(texts, 0.7) == [] and len(repeats(texts, 0.69)) == 1


def test_a_file_of_near_copies_stays_small(monkeypatch):
    """Guards against a list of all pairs where one template fills a file: 5,000 near copies have 12 million pairs.
    They differ in length too."""
    compared = []
    f1 = pair_search.Sequences.f1
    monkeypatch.setattr(pair_search.Sequences, "f1", lambda self, pairs: compared.append(len(pairs)) or f1(self, pairs))
    monkeypatch.setattr(rouge, "_LEAF", 64)
    monkeypatch.setattr(rouge, "_MATCHES", 5)
    words = ("", "quickly", "now quickly")
    texts = [f"translate the word number{i} into the french language please {words[i % 3]}" for i in range(5_000)]
    assert len(repeats(texts)) == 4_999
    assert sum(compared) < 100_000


@pytest.mark.parametrize("threshold", [-0.1, 1.0, 7])
def test_a_wrong_threshold_is_refused(threshold):
    """Guards a percentage given for a ratio: it would find nothing and look like a clean file."""
    with pytest.raises(ValueError, match="threshold"):
        repeats(["a b", "a b"], threshold)


def test_rouge_score_is_not_needed():
    """Guards run time against a dependency (with nltk behind it) that only the tests have."""
    code = "from alpaca.generation.rouge import RougeLIndex; RougeLIndex(['a b']).scores('a')"
    code += "; import sys; assert 'rouge_score' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_bench_dedup(run_script, tmp_path):
    """Guards the benchmark's command: it runs, checks its figures against rouge_score, and prints the ratio."""
    done = run_script(
        "benchmarks/bench_dedup.py", "--data_path", "seed_tasks.jsonl", "--sizes", "300,600", "--candidates", "5",
        "--plain_candidates", "1", "--processes", "2", "--output_path", tmp_path / "table.md",
    )  # fmt: skip
    assert re.search(r"RougeLIndex.scores, one candidate \| [\d.]+ \| [\d.,]+ \|", done.stdout)
    assert (tmp_path / "table.md").read_text() in done.stdout
