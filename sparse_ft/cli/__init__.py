"""The command line: one file per verb, each a thin composition of the library's public functions."""
