"""At the end it is said how much was tried."""

import pytest

from tests.fuzz.harness import counts


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not counts:
        return
    seed = terminalreporter.config.getoption("hypothesis_seed", None)
    again = f", again with SEED={seed}" if seed is not None else ""
    terminalreporter.write_sep("-", f"fuzzing: {counts.total()} inputs{again}")
    for target, count in counts.items():
        terminalreporter.write_line(f"  {target:<20} {count:>7}")
