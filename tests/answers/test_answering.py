"""answering.py: the prompt's ids, batches, sampling, streaming; answers that do not depend on their neighbours."""

import json
import threading

import pytest
import tiny_models
import torch

from alpaca.answers.answer_file import AnswerJob, write_answers
from alpaca.answers.answering import Answer, answer_batch, generate, prompt_ids, room_for_answer, stream_answer
from alpaca.answers.held_out_loss import rouge_of_answers
from alpaca.answers.loading import load_model
from alpaca.answers.sampling import Sampling
from alpaca.common.errors import UserError
from alpaca.common.prompt import format_prompt

TASKS = tiny_models.make_tasks(9)


@pytest.fixture(scope="module")
def loaded(tiny_llama, tiny_opt, tiny_tied):
    return {"llama": load_model(str(tiny_llama)), "opt": load_model(str(tiny_opt)), "tied": load_model(str(tiny_tied))}


def one_by_one(model, tokenizer, sampling, tasks=TASKS):
    return [answer_batch(model, tokenizer, [task], sampling, [row])[0] for row, task in enumerate(tasks)]


# ----------------------------------------------------------------------------------------------------------------------
# Prompts and batches.


SAMPLINGS = [
    Sampling(20), Sampling(20, 0.8, 0.9, seed=3), Sampling(8, num_beams=3), Sampling(20, repetition_penalty=1.3),
]  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "opt", "tied"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_batched_answers_equal_one_by_one(loaded, name, sampling):
    """Left padding with a wrong mask or wrong positions, pad = eos taken for the end, one generator for all rows."""
    model, tokenizer = loaded[name]
    assert answer_batch(model, tokenizer, TASKS, sampling) == one_by_one(model, tokenizer, sampling)


def test_repetition_penalty_spares_the_prompt(loaded):
    """Guards: transformers' default, which makes the words of a task's input as unlikely as repeated ones."""
    model, tokenizer = loaded["llama"]
    prompts = [list(range(20 + shift, 420 + shift)) for shift in range(8)]
    plain = [new for new, _ in generate(model, prompts, Sampling(80), range(8))]
    other = [new for new, _ in generate(model, prompts, Sampling(80, repetition_penalty=1e6), range(8))]
    assert any(len(set(new)) < len(new) for new in plain) and all(len(set(new)) == len(new) for new in other)
    assert [new[0] for new in other] == [new[0] for new in plain]
    assert any(new[0] in prompt for new, prompt in zip(plain, prompts, strict=True))


def test_batched_answers_equal_one_by_one_on_the_embedded_model():
    """The same on a real model, which stops by itself at different lengths."""
    model, tokenizer = load_model("embedded", "auto")  # which asked for a GPU where there is none
    tasks = [
        {"instruction": "Name three colours.", "input": ""},
        {"instruction": "Say which word is a fruit.", "input": "stone, apple, river, a very long word and a short one"},
        {"instruction": "What is 2+2?", "input": ""},
    ]
    batched = answer_batch(model, tokenizer, tasks, Sampling(16))
    assert batched == one_by_one(model, tokenizer, Sampling(16), tasks)
    assert len({answer.tokens for answer in batched}) > 1 and batched[0].finish_reason == "stop"
    assert "Red" in batched[0].text


def test_prompt_ids_are_those_of_training(loaded):
    """A prompt with other ids than in training (no BOS, an EOS behind it) makes a fine-tuned model talk nonsense."""
    from alpaca.training.data import TextEncoder

    for model, tokenizer in loaded.values():
        encoder = TextEncoder(tokenizer)
        for task in TASKS:
            ids, prompt_length, _ = next(encoder.pairs([format_prompt(task)], [task["output"]]))
            assert prompt_ids(tokenizer, task) == ids[:prompt_length]
        assert model.generation_config.eos_token_id == [2]
    assert prompt_ids(loaded["llama"][1], TASKS[0])[0] == 1


def test_sampling_is_seeded_and_exact(loaded):
    """The same seed gives the same answers, another seed others; drawn tokens follow the softmax."""
    model, tokenizer = loaded["tied"]
    first = answer_batch(model, tokenizer, TASKS, Sampling(12, 1.0, seed=1))
    assert first == answer_batch(model, tokenizer, TASKS, Sampling(12, 1.0, seed=1))
    assert first != answer_batch(model, tokenizer, TASKS, Sampling(12, 1.0, seed=2))

    from alpaca.answers.answering import _GumbelNoise

    scores = torch.log(torch.tensor([0.5, 0.3, 0.2])).repeat(20000, 1)
    drawn = _GumbelNoise(7, range(20000))(None, scores).argmax(-1).bincount() / 20000
    assert torch.allclose(drawn, torch.tensor([0.5, 0.3, 0.2]), atol=0.015)


def test_a_row_that_ends_does_not_touch_its_neighbours(loaded):
    """After its EOS a row is padded; the answer stops there, and rows that go on must not change."""
    model, tokenizer = loaded["llama"]
    alone = one_by_one(model, tokenizer, Sampling(10), TASKS[:3])

    def end_row_zero(module, args, out):
        out[0, -1, 2] += 1e4
        return out

    hook = model.lm_head.register_forward_hook(end_row_zero)
    try:
        together = answer_batch(model, tokenizer, TASKS[:3], Sampling(10))
    finally:
        hook.remove()
    assert together[0] == Answer("", "stop", 1)
    assert together[1:] == alone[1:]


def test_prompts_that_nearly_fill_the_context(loaded, tiny_opt, tmp_path):
    """A prompt with little room left must not shorten the others or run beyond OPT's table of positions; one that
    leaves none got an empty answer, which in a comparison is a bad answer."""
    model, tokenizer = loaded["opt"]

    def long(words):
        return {"instruction": "Count.", "input": "zebra " * words}

    words = max(n for n in range(100, 600) if len(prompt_ids(tokenizer, long(n))) < 1024)
    tasks = [TASKS[0], long(words), TASKS[1]]
    figures = write_answers(AnswerJob(str(tiny_opt), tasks, Sampling(30), 4), tmp_path / "answers.json", [])
    rows = json.loads((tmp_path / "answers.json").read_text())
    assert rows[0]["output"] == answer_batch(model, tokenizer, [TASKS[0]], Sampling(30))[0].text
    assert rows[1]["tokens"] == room_for_answer(model, prompt_ids(tokenizer, tasks[1]), 30) < 30
    assert figures["answers"] == 3 and figures["tokens"] == 30 + rows[1]["tokens"] + 30
    tasks.append(long(words + 40))
    message = r"1 of 4 prompts leave no room for an answer in .* 1,024 tokens: row 4 \(1,\d+ tokens\)"
    with pytest.raises(UserError, match=message):
        write_answers(AnswerJob(str(tiny_opt), tasks, Sampling(30)), tmp_path / "long.json", [])
    assert not (tmp_path / "long.json").exists()
    with pytest.raises(UserError, match="no room"):
        list(stream_answer(model, tokenizer, tasks[3], Sampling()))
    # ROUGE-L was measured on answers that a neighbour's long prompt had cut short.
    found = rouge_of_answers(model, tokenizer, [{**task, "output": "a"} for task in tasks[:3]], Sampling(30))
    assert found["mean_answer_tokens"] * 3 == pytest.approx(figures["tokens"])


@pytest.mark.parametrize("sampling", [Sampling(8), Sampling(8, 0.8, 0.9), Sampling(8, num_beams=2)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_stop(tiny_tied, sampling, value):
    """A model with a nan among its weights answered blank lines, with status 0; in half precision sums overflow."""
    model, tokenizer = load_model(str(tiny_tied))
    tensor = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        tensor[3, :2] = value
    bad = r"2 of 8,192 values of model\.layers\.1\.mlp\.up_proj\.weight are not finite"
    with pytest.raises(UserError, match=bad):
        answer_batch(model, tokenizer, TASKS[:2], sampling)
    with pytest.raises(UserError, match=bad):
        list(stream_answer(model, tokenizer, TASKS[0], sampling))
    with torch.no_grad():
        tensor[3, :2] = 0
        model.model.norm.weight.fill_(3e38)
        model.lm_head.weight.mul_(1000)
    with pytest.raises(UserError, match="weights are finite, so the numbers overflow in float32"):
        answer_batch(model, tokenizer, TASKS[:2], sampling)


# ----------------------------------------------------------------------------------------------------------------------
# Streaming.


@pytest.mark.parametrize("name", ["opt", "tied"])
def test_streamed_pieces_are_the_answer(loaded, name):
    """Pieces cut inside a character, or a lost last piece."""
    model, tokenizer = loaded[name]
    for sampling in (Sampling(24), Sampling(24, 0.9, 0.95, seed=5), Sampling(8, num_beams=2)):
        for task in TASKS[:3]:
            pieces = list(stream_answer(model, tokenizer, task, sampling))
            assert "".join(pieces) == answer_batch(model, tokenizer, [task], sampling)[0].text
            assert len(pieces) > 1 or sampling.num_beams > 1


def test_stream_stops_when_told_and_when_left(loaded):
    """A stop that only hides the text would keep the processor busy to the last token."""
    model, tokenizer = loaded["tied"]
    stop, before = threading.Event(), threading.active_count()
    pieces = []
    for piece in stream_answer(model, tokenizer, TASKS[0], Sampling(1500), stop):
        pieces.append(piece)
        if len(pieces) == 3:
            stop.set()
    assert len(pieces) < 1000
    stream = stream_answer(model, tokenizer, TASKS[0], Sampling(1500))
    next(stream)
    stream.close()
    assert threading.active_count() == before
