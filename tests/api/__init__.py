"""Behaviour of the public interface."""
