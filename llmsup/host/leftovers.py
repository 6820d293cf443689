"""Processes that a killed daemon left behind. They carry this home's mark in their environment."""

from contextlib import suppress

from llmsup.config.paths import Paths
from llmsup.host import slot_files
from llmsup.host.process import end_marked
from llmsup.services.envoy import shared_memory

GRACE_S = 5.0


def home_mark(paths: Paths) -> str:
    """What the mark of every process of this home starts with."""
    return f"{paths.state}:"


def end(paths: Paths) -> int:
    """End every process of this home, SIGTERM first; returns how many there were. Blocks.

    Envoy's piece of shared memory goes, too: it is not in the home. So do saved conversations.
    """
    ended = end_marked(home_mark(paths), GRACE_S)
    with suppress(OSError):
        shared_memory(paths.gateway).unlink()
    slot_files.remove_all(paths.slots, paths.slot_index)
    return ended
