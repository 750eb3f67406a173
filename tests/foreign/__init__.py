"""Graphs that others sharded."""
