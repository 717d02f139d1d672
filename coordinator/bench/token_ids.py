"""Token ids for prompts that are no text."""

from __future__ import annotations

COMMON_IDS = range(16, 256)
"""Ids that every vocabulary has, special ones left out."""
