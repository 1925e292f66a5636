"""A tiny BERT, its data and the arguments of a transformers.Trainer for it."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}


class Rows(torch.utils.data.Dataset):
    """Token ids and labels, and a column that no model takes."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        return {"input_ids": [(i * 7 + k) % 40 for k in range(6)], "labels": i % 3, "source": f"row {i}"}


def bert(kind=BertForSequenceClassification):
    torch.manual_seed(0)
    return kind(BertConfig(**SIZES, num_labels=3))


def arguments(folder, **kwargs):
    options = {"max_steps": 8, "per_device_train_batch_size": 4, "save_strategy": "no", "learning_rate": 1e-2}
    return TrainingArguments(folder, use_cpu=True, report_to="none", disable_tqdm=True, **(options | kwargs))


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
