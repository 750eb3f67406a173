"""Tests of bdlora_compile."""
