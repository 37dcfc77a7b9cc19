"""The test suite; `tests.models`, `tests.zoo` and `tests.networks` are also used by `bench/`."""
