"""llmsup keeps a local LLM stack up on one small GPU."""

__version__ = "0.1.0"
