"""Which missing block is asked of which holder. Pure.

First form: runs. Neighbouring blocks of a chain go to one holder as long as it has them, because a run is one request
and one lease; among the holders of a run's first block the one with the lowest cost wins. Costs, deadlines and
splitting one run over several holders come with measured estimates (a later issue); the shape of the answer is final.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence


def assign(
    holders: Sequence[Sequence[int]], cost: Callable[[int], float], excluded: Collection[int] = ()
) -> tuple[dict[int, list[int]], list[int]]:
    """Give every block to a holder.

    Args:
        holders: per block, the nodes that have it.
        cost: of asking a node; lower is better. Asked once per node.
        excluded: nodes that are not to be asked.

    Returns:
        Per node the positions of its blocks, ascending; and the positions that nobody can give.
    """
    costs: dict[int, float] = {}
    runs: dict[int, list[int]] = {}
    nobody: list[int] = []
    current: int | None = None
    for position, nodes in enumerate(holders):
        usable = [node for node in nodes if node not in excluded]
        if not usable:
            nobody.append(position)
            continue
        if current not in usable:
            for node in usable:
                if node not in costs:
                    costs[node] = cost(node)
            current = min(usable, key=lambda node: (costs[node], node))
        assert current is not None
        runs.setdefault(current, []).append(position)
    return runs, nobody
