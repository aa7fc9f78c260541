"""The evaluation of codes: measures and named protocols."""
