"""What does not work just now without any service being down: a full disk, say.

Each trouble goes by a sentence that says what is lost. It is logged when it begins and when it
ends, and stands in `llmsup status` in between.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

log = logging.getLogger(__name__)

RETRY_S = 2.0


@dataclass(frozen=True)
class _Trouble:
    reason: str
    retry: Callable[[], None] | None


class Troubles:
    """The troubles of one daemon, in the order in which they began."""

    def __init__(self) -> None:
        self._known: dict[str, _Trouble] = {}

    @property
    def sentences(self) -> list[str]:
        """Each with its present reason."""
        return [f"{what}: {trouble.reason}" for what, trouble in self._known.items()]

    def tell(self, what: str, reason: str, retry: Callable[[], None] | None = None) -> None:
        """`what` fails for this reason; none means that it works.

        `retry` is called now and then while it fails, and tells what came of it.
        """
        is_new = what not in self._known
        # Known before it is logged: the log may be what does not work.
        if reason:
            self._known[what] = _Trouble(reason, retry)
            if is_new:
                log.warning("%s: %s", what, reason)
        elif not is_new:
            del self._known[what]
            log.info("no longer: %s", what)

    @contextmanager
    def watched(self, what: str, retry: Callable[[], None] | None = None) -> Iterator[None]:
        """Tell of the block whether it works. An OSError ends in here."""
        try:
            yield
        except OSError as error:
            self.tell(what, error.strerror or str(error), retry)
        else:
            self.tell(what, "")

    def retry(self) -> None:
        """Try once more what fails."""
        for trouble in tuple(self._known.values()):
            if trouble.retry is not None:
                trouble.retry()

    async def keep_trying(self) -> None:
        """`retry` now and then, until cancelled."""
        while True:
            await asyncio.sleep(RETRY_S)
            self.retry()
