"""Fuzzing of everything that reads bytes from elsewhere: `make fuzz`.

Each module in `TARGETS` is one fuzz target. `python -m tests.fuzz` runs all, `python -m tests.fuzz NAME` one.
`test_targets.py` reads the kept inputs again without atheris, in `make test`.
"""
