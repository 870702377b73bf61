"""The local backend. A package, because its conftest.py is beside the one of all tests."""
