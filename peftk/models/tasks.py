"""`PeftModel` under the names that Hugging Face PEFT has for the tasks of models."""

from __future__ import annotations

from ..nn import TaskType
from .peft_model import PeftModel


class PeftModelForCausalLM(PeftModel, task=TaskType.CAUSAL_LM):
    """A `PeftModel` whose first adapter has the task type CAUSAL_LM."""


class PeftModelForSeq2SeqLM(PeftModel, task=TaskType.SEQ_2_SEQ_LM):
    """A `PeftModel` whose first adapter has the task type SEQ_2_SEQ_LM."""


class PeftModelForSequenceClassification(PeftModel, task=TaskType.SEQ_CLS):
    """A `PeftModel` whose first adapter has the task type SEQ_CLS; the head is trained too."""


class PeftModelForTokenClassification(PeftModel, task=TaskType.TOKEN_CLS):
    """A `PeftModel` whose first adapter has the task type TOKEN_CLS; the head is trained too."""


class PeftModelForQuestionAnswering(PeftModel, task=TaskType.QUESTION_ANS):
    """A `PeftModel` whose first adapter has the task type QUESTION_ANS; the head is trained too."""


class PeftModelForFeatureExtraction(PeftModel, task=TaskType.FEATURE_EXTRACTION):
    """A `PeftModel` whose first adapter has the task type FEATURE_EXTRACTION."""


__all__ = [
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
]
