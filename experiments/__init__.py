"""Models, data and benchmark suites that show what `lbw_optax` does on real text."""
