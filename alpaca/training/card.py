"""What stands beside a trained model for those who did not train it: its card, and a Modelfile for Ollama."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from alpaca.common.files import jdump
from alpaca.common.prompt import PROMPT_DICT
from alpaca.training.report import report_rows

CARD_SETTINGS = (
    "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim",
    "per_device_train_batch_size", "gradient_accumulation_steps", "model_max_length", "truncation", "padding_free",
    "dtype", "bf16", "fp16", "lora_r", "lora_alpha", "lora_target_modules", "seed",
)  # fmt: skip


def describe(
    folder: str, base: str, data_paths: Sequence[str], settings: Mapping[str, Any], report: Mapping[str, Any], tokenizer
) -> None:
    """Writes README.md and, for a whole model, Modelfile into `folder`.

    `base`: the model that was trained, as it was named. `settings`: flag -> value. `report`: train_report.json.
    """
    jdump(model_card(base, data_paths, settings, report), Path(folder) / "README.md")
    if not (Path(folder) / "adapter_config.json").exists():
        jdump(modelfile(tokenizer, settings["model_max_length"]), Path(folder) / "Modelfile")


def modelfile(tokenizer, context: int) -> str:
    """The text of an Ollama Modelfile under which a chat's message gets the training prompt, byte for byte.

    The message is the instruction. A system message, where there is one, is the input: Ollama's templates know no other
    second text. Stop strings are the tokenizer's EOS and the heading that a model which does not end goes on with. They
    stand as they are, line feeds too: Ollama takes the quotes off and reads no escapes.
    """
    with_input, without = PROMPT_DICT["prompt_input"], PROMPT_DICT["prompt_no_input"]
    template = (
        "{{ if .System }}"
        + with_input.replace("{instruction}", "{{ .Prompt }}").replace("{input}", "{{ .System }}")
        + "{{ else }}"
        + without.replace("{instruction}", "{{ .Prompt }}")
        + "{{ end }}{{ .Response }}"
    )
    stops = [text for text in (tokenizer.eos_token, "\n\n### Instruction:") if text]
    return "\n".join(
        [
            "# ollama create NAME -f Modelfile, typed in this folder. A system message is the task's input.",
            "FROM .",
            f'TEMPLATE """{template}"""',
            *(f'PARAMETER stop """{text}"""' for text in stops),
            "PARAMETER temperature 0",
            f"PARAMETER num_ctx {max(2048, context)}",
            "",
        ]
    )


def model_card(base: str, data_paths: Sequence[str], settings: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """README.md of a trained checkpoint: what it is, how it was made, its figures, how to prompt it, its licence."""
    shown = {name: value for name, value in settings.items() if name in CARD_SETTINGS and value not in (None, "")}
    figures = "\n".join(f"| {name} | {value} |" for name, value in report_rows(report))
    recipe = "\n".join(f"| `{name}` | `{value}` |" for name, value in shown.items())
    versions = ", ".join(f"{name} {version}" for name, version in report["packages"].items())
    name = f"{Path(base).name}, fine-tuned on instructions"
    return f"""---
{card_head(base, data_paths, name, report)}
---

# {name}

`{base}`, fine-tuned with the Stanford Alpaca recipe on {", ".join(f"`{path}`" for path in data_paths)}.

## Prompt

Exactly this text, with a line feed at each line's end and nothing after the last colon; the tokenizer's chat template
and the Modelfile write it too. A task with an input has a paragraph `### Input:` before the response.

```
{PROMPT_DICT["prompt_no_input"]}
```

## Figures

| | |
| --- | --- |
{figures}

{sample_answers(report["sample_answers"])}## Settings

| flag | value |
| --- | --- |
{recipe}

Made with {versions}; commit {report["commit"]}. `train_log.jsonl`, `train_report.json` and `run.json` beside this file
hold every step, every figure and every setting.

## Licence and limits

The base model's licence holds for these weights. The released Alpaca data, and data generated with OpenAI's models, are
for non-commercial use (CC BY-NC 4.0): a model trained on them is too. The model was tuned to follow instructions and
not to be safe: it states falsehoods with confidence and repeats the biases of its data.
"""


def sample_answers(rows: Sequence[Mapping[str, Any]]) -> str:
    """The card's section with the answers of --sample_tasks after the last step; "" where there are none."""
    if not rows:
        return ""
    parts = [f"## Answers after step {rows[0]['step']:,}, greedy\n"]
    for row in rows:
        task = "\n".join(filter(None, (row["instruction"], row["input"])))
        parts += [f"```\n{task}\n--- answer\n{row['answer']}{'' if row['ended'] else ' [...]'}\n```\n"]
    return "\n".join(parts) + "\n"


def card_head(base: str, data_paths: Sequence[str], name: str, report: Mapping[str, Any]) -> str:
    """The YAML head that the Hub reads. A file or folder of this machine has no name there, and is named by its last
    part; the held-out loss is a result of the model where it was measured."""
    loss = report["eval_loss_of_saved_step"]
    results = None
    if loss is not None:
        results = [EvalResult("text-generation", "alpaca", "held-out rows", "loss", round(loss, 4))]
    return ModelCardData(
        base_model=Path(base).name if Path(base).exists() else base,
        datasets=[Path(path).name if Path(path).exists() else path for path in data_paths],
        metrics=["loss"],
        language="en",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["alpaca", "instruction-tuning"],
        model_name=name,
        eval_results=results,
    ).to_yaml()
