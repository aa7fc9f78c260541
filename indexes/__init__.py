"""Codes in, nearest ids out."""
