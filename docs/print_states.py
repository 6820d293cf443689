"""Puts the state diagram, printed from the lifecycle table, into docs/states.md.

`python docs/print_states.py` writes it; with `--check` it only says whether it is there.
"""

import sys
from pathlib import Path

from llmsup.core.diagram import mermaid

PAGE = Path(__file__).with_name("states.md")
BEGIN, END = "<!-- printed by make docs: -->\n", "<!-- end -->\n"


def main() -> int:
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = f"{before}{BEGIN}```mermaid\n{mermaid()}```\n{END}{after}"
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(wanted)
        return 0
    if page != wanted:
        print("error: docs/states.md is not what the table says; run make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
