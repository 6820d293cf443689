"""What the kernel knows of a process and its descendants, without asking them."""

from dataclasses import dataclass

from llmsup.host import procfs


@dataclass(frozen=True)
class Signs:
    """CPU seconds and major faults of the whole tree; whether it was stopped by a signal."""

    cpu_s: float
    faults: int
    is_stopped: bool
    is_traced: bool


def signs(pid: int) -> Signs:
    """The signs of `pid` now; all zero where it has gone."""
    tree = procfs.descendants(pid)
    usages = [procfs.usage(each) for each in tree]
    return Signs(
        cpu_s=sum(usage.cpu_s for usage in usages),
        faults=sum(usage.major_faults for usage in usages),
        is_stopped=procfs.state(_worker(tree)) == "T",
        is_traced=any(map(procfs.is_traced, tree)),
    )


def _worker(tree: list[int]) -> int:
    """Who does the work: the root, or its only child where it waits for one, as Envoy's shell."""
    root, *children = tree
    return children[0] if len(children) == 1 and procfs.state(root) != "T" else root
