"""One folder per operator: schema and checks in `__init__.py`, the mathematical truth in `reference.py`."""
