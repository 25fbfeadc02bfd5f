"""TrainingArguments: transformers' own with this project's fields. Apart from train_flags.py since it imports torch."""

import dataclasses

import transformers

from alpaca.training.arguments import RunArguments


@dataclasses.dataclass
class TrainingArguments(RunArguments, transformers.TrainingArguments):
    """transformers.TrainingArguments and the fields of train_flags.RunArguments, whose defaults win."""
