"""Stores: where items live. No other room speaks SQL."""
