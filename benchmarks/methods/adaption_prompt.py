"""Llama-Adapter."""

from __future__ import annotations

METHODS = ()
NOT_TIMED = {"AdaptionPromptConfig": "it adapts attention modules, of which no bare layer can be timed"}
