"""Loss of a model on tasks that it was not trained on, and ROUGE-L of its answers against the references.

figures = held_out_loss(model, tokenizer, load_tasks("configs/eval_tasks.jsonl"))
"""

import math
import tempfile
from collections.abc import Sequence
from typing import Any

from rapidfuzz.distance import LCSseq

from alpaca.answers.answering import answers_in_order, context_of
from alpaca.answers.loading import not_finite
from alpaca.answers.sampling import Sampling
from alpaca.common.errors import UserError
from alpaca.generation.rouge import rouge_tokens
from alpaca.training.data import PaddedCollator, tokenize_dataset
from alpaca.training.held_out import loss_on_dataset


def held_out_loss(
    model, tokenizer, tasks: Sequence[dict], max_length: int = 512, batch_size: int = 8
) -> dict[str, Any]:
    """Loss and perplexity of the outputs' tokens and their end token, over all tokens of all rows.

    Tokens, labels and truncation are those of training. Returns loss, perplexity, tokens, rows, and
    rows_without_response (rows whose prompt leaves no token of the output within `max_length`). Raises UserError where
    a row is longer than the model's context, and where the loss is not finite.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows = tokenize_dataset(tasks, tokenizer, max_length, cache_dir=folder)
        longest, context = int(rows["length"][:].max()), context_of(model)
        if context is not None and longest > context:  # learned positions end there, with an IndexError
            raise UserError(
                f"at --max_length {max_length:,} the longest row has {longest:,} tokens, and the model's context ends "
                f"at {context:,}. Use --max_length {context}."
            )
        collate = PaddedCollator(model.generation_config.pad_token_id)
        found = loss_on_dataset(model, rows, collate, batch_size, model.device)
    if not math.isfinite(found["loss"]):
        raise not_finite(model)
    return {
        "loss": found["loss"],
        "perplexity": math.exp(found["loss"]),
        "tokens": found["tokens"],
        "rows": len(rows),
        "rows_without_response": len(tasks) - len(rows),
    }


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L F1 of a text against its reference: rouge_score's tokens without stemming (Lin 2004)."""
    words, wanted = rouge_tokens(text), rouge_tokens(reference)
    common = LCSseq.similarity(words, wanted)
    return 2 * common / (len(words) + len(wanted)) if common else 0.0


def rouge_of_answers(
    model, tokenizer, tasks: Sequence[dict], sampling: Sampling, batch_size: int = 8
) -> dict[str, Any]:
    """Mean ROUGE-L F1 of answers against the tasks' outputs, the answers' mean length in tokens, and the share of them
    that ended before `max_new_tokens`."""
    answers = answers_in_order(model, tokenizer, tasks, sampling, batch_size)
    scores = [rouge_l(answer.text, task["output"]) for answer, task in zip(answers, tasks, strict=True)]
    return {
        "rouge_l": sum(scores) / len(scores),
        "rouge_tasks": len(scores),
        "answers_ended": sum(answer.finish_reason == "stop" for answer in answers) / len(answers),
        "mean_answer_tokens": sum(answer.tokens for answer in answers) / len(answers),
    }
