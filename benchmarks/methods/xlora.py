"""X-LoRA."""

from __future__ import annotations

METHODS = ()
NOT_TIMED = {"XLoraConfig": "its layers run LoRA's operators, with gates that the model's classifier makes"}
