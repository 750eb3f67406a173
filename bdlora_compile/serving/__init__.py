"""Serving one model to many requests: records (`requests`), the decode engine (`engine`) and what it is made of."""
