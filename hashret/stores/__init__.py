"""Stores of items. No other package contains SQL."""
