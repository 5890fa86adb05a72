"""The fixtures of tests/helpers.py, tiny runs that are made once, for test_all.py and tests/ alike."""
pytest_plugins = ["helpers"]
