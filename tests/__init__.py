"""Tests of whole runs, of the data, and of the tools. (test_sparse.py, at the top, proves the method.)"""
