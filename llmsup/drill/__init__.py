"""Breaks a live stack on purpose, under light traffic, and says what the clients felt."""
