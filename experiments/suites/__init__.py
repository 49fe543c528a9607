"""The suites of the command line, one module each."""
