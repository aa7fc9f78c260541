"""hashret on the command line."""
