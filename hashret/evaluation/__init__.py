"""How good codes are: measures, and named protocols."""
