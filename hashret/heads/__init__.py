"""Heads: from real numbers to bits."""
