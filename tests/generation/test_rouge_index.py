"""rouge.py and pair_search.py: F1 equal to rouge_score's bit for bit, and no pair above a threshold missed."""

import re
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer, tokenizers

from alpaca.generation import pair_search
from alpaca.generation import rouge as rouge_index
from alpaca.generation.rouge import RougeLIndex, dedup, first_repeats, near_duplicates, rouge_tokens, unicode_tokens

reference_tokens = tokenizers.DefaultTokenizer(use_stemmer=False).tokenize
relaxed = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

# Few words, so that texts have much in common; case, punctuation, digits and letters beyond ASCII and beyond the BMP.
WORDS = [
    "a",
    "the",
    "list",
    "List",
    "name",
    "of",
    "city",
    "don't",
    "x2",
    "naïve",
    "Ⅷ",
    "İstanbul",
    "K",
    "中文",
    "𝔘x",
    "𐐷",
    "-",
    "",
]
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
    want = np.array([reference_scores(text, pool + added) for text in candidates]).reshape(len(candidates), len(index))
    got = index.scores_many(candidates)
    assert got.dtype == np.float64 and got.shape == want.shape
    assert (got == want).all()


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 150, 1000])
def test_lengths_around_machine_words(length):
    """Guards the widths of 16, 32 and 64 bits, whose top bit carries out, and the texts that fit none of them."""
    rng = np.random.default_rng(length)
    pool = [" ".join(rng.choice(["a", "b", "c", "d"], n)) for n in (1, 2, 15, 16, 17, 32, 33, 63, 64, 65, 200)]
    pool += ["", " ".join("a" * 1000), " ".join(f"w{i}" for i in range(1000))]
    index = RougeLIndex(pool[:7])
    for text in pool[7:]:
        index.add(text)
    for text in (" ".join(rng.choice(["a", "b", "c", "new"], length)), " ".join("a" * length), pool[-1]):
        assert index.scores(text).tolist() == reference_scores(text, pool)


def test_pool_grows_past_its_room():
    """Guards the moment when newcomers are sorted in: nothing lost, nothing twice, order kept."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(50, size=rng.integers(1, 12))) for _ in range(2500)]
    index = RougeLIndex(texts[:10])
    for text in texts[10:]:
        index.add(text)
    assert list(index.texts) == texts
    for text in texts[::700]:
        assert (index.scores(text) == RougeLIndex(texts).scores(text)).all()
        assert index.scores(text)[texts.index(text)] == 1.0
    assert index.scores(texts[0])[::100].tolist() == reference_scores(texts[0], texts[::100])


def test_nothing_in_the_pool():
    """Guards an empty pool and an empty list of candidates against errors."""
    index = RougeLIndex()
    assert index.scores("a b").shape == index.scores("a " * 100).shape == (0,)
    assert RougeLIndex(["", "!"]).scores("a " * 100).tolist() == [0.0, 0.0]
    assert index.scores_many(["a", ""]).shape == (2, 0)
    assert index.scores_many([]).shape == (0, 0)
    assert index.top("a b", 3) == []
    assert near_duplicates([]) == first_repeats([]) == [] and dedup([]).shape == (0,)


def test_top_is_stable():
    """Guards the order of regen.json's most similar instructions: best first, equal ones as they came."""
    index = RougeLIndex(["x y", "a b c", "c d", "a b d", "b c"])
    assert index.top("a b c", 3) == [("a b c", 1.0), ("b c", 0.8), ("a b d", 2 / 3)]
    assert [text for text, _ in index.top("q", 9)] == list(index.texts)
    assert index.top("a b c", 2, scores=np.array([0.0, 0.5, 0.5, 0.5, 0.0])) == [("a b c", 0.5), ("c d", 0.5)]


def test_chinese_without_unicode_dedup():
    """Guards the original's bug that identical Chinese instructions are never duplicates: [a-z0-9] sees nothing."""
    index = RougeLIndex(["写一首关于春天的诗", "ｗｒｉｔｅ", "写一首诗"])
    assert index.scores(" 写一首关于春天的诗\n").tolist() == [1.0, 0.0, 0.0]
    assert first_repeats(["写一首诗", "画一只猫", "写一首诗 ", "", ""]) == [(0, 2, 1.0)]


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
    assert len(near_duplicates(["写一首关于春天的诗", "写一首关于秋天的诗"], unicode_dedup=True)) == 1


def brute_force(texts: list[str], threshold: float):
    scores = RougeLIndex(texts).scores_many(texts) if texts else np.zeros((0, 0))
    pairs = [(i, j, scores[i, j]) for i in range(len(texts)) for j in range(i + 1, len(texts))]
    kept, repeats = [], []
    for j in range(len(texts)):
        first = next((i for i in kept if scores[i, j] > threshold), None)
        if first is None:
            kept.append(j)
        else:
            repeats.append((first, j, scores[first, j]))
    return [pair for pair in pairs if pair[2] > threshold], repeats, kept


@pytest.mark.parametrize("seed", range(60))
def test_no_pair_is_missed(seed, monkeypatch):
    """Guards the prefix filter, its parts and its code points against a lost pair: each is forced to its limits."""
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(pair_search, "_PART", int(rng.choice([50, 1 << 24])))
    monkeypatch.setattr(pair_search, "_CHUNK", int(rng.choice([7, 1 << 22])))
    monkeypatch.setattr(pair_search, "_MANY", int(rng.choice([0, 1 << 20])))  # signatures of three tokens, or of two
    monkeypatch.setattr(pair_search, "_MOST_SUBSETS", int(rng.choice([1, 20, 4096])))
    monkeypatch.setattr(pair_search, "_CODE_POINTS", int(rng.choice([3, 1 << 20])))  # more tokens than code points
    monkeypatch.setattr(rouge_index, "_LEAF", int(rng.choice([4, 16, 8192])))
    monkeypatch.setattr(rouge_index, "_MEETINGS", int(rng.choice([0, 3, 200])))
    vocabulary = [f"w{i}" for i in range(rng.choice([3, 10, 60]))]
    lengths = [0, 1, 2, 3, 4, 5, 6, 8, 12, 20, int(rng.choice([3, 130]))]
    texts = [" ".join(rng.choice(vocabulary, rng.choice(lengths))) for _ in range(rng.choice([5, 40, 90]))]
    for i in range(0, len(texts) - 1, 3):  # near copies, also with words in another order
        words = texts[i].split()
        if words:
            words[rng.integers(len(words))] = "changed"
            texts[i + 1] = " ".join(words if i % 2 else words[::-1])
    threshold = float(rng.choice([0.0, 0.3, 0.5, 0.66, 0.7, 0.9]))
    pairs, repeats, kept = brute_force(texts, threshold)
    assert near_duplicates(texts, threshold) == RougeLIndex(texts).near_duplicates(threshold) == pairs
    assert first_repeats(texts, threshold) == repeats
    assert np.flatnonzero(dedup(texts, threshold)).tolist() == kept


def test_exactly_the_threshold_stays():
    """Guards the original's rule that 0.7 stays and only more goes, in the presence of float error."""
    texts = ["a b c d e f g h i j", "a b c d e f g x y z"]
    assert RougeLIndex(texts).scores(texts[0])[1] == 0.7
    assert near_duplicates(texts, 0.7) == [] and len(near_duplicates(texts, 0.69)) == 1


def test_a_file_of_near_copies_stays_small(monkeypatch):
    """Guards against a list of all pairs where one template fills a file: 20,000 near copies have 200 million pairs."""
    searched = []
    monkeypatch.setattr(pair_search.PairSearch, "_f1", counting(pair_search.PairSearch._f1, searched))
    monkeypatch.setattr(rouge_index, "_LEAF", 64)
    texts = [f"translate the word number{i} into the french language please" for i in range(20_000)]
    assert dedup(texts).sum() == 1
    assert sum(searched) < 200_000


def counting(function, sizes):
    def wrapped(self, left, right):
        sizes.append(len(left))
        return function(self, left, right)

    return wrapped


@pytest.mark.parametrize("threshold", [-0.1, 1.0, 7])
def test_a_wrong_threshold_is_refused(threshold):
    """Guards a percentage given for a ratio: it would find nothing and look like a clean file."""
    with pytest.raises(ValueError, match="threshold"):
        near_duplicates(["a b", "a b"], threshold)


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
