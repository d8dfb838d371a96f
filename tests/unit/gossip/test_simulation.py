"""The simulator: deterministic, and small cells come right under it. `make sim` runs more seeds, and the mutants."""

from __future__ import annotations

import pytest

from p2pkv.gossip._gossip import Simulation, chaos


@pytest.mark.parametrize("seed", range(1, 121, 20))
def test_after_chaos_every_view_is_right_and_no_rule_was_broken(seed: int) -> None:
    found = [chaos(s) for s in range(seed, seed + 20)]
    assert [what for what, _, _ in found if what] == []
    assert sum(checks for _, checks, _ in found) > 10_000


def test_the_same_seed_gives_the_same_bytes_and_another_one_others() -> None:
    assert chaos(7) == chaos(7) and chaos(7)[2] != chaos(8)[2]


def started(nodes: int, seed: int = 1, **options: object) -> Simulation:
    cell = Simulation(nodes, seed, **options)  # type: ignore[arg-type]
    for node in range(nodes):
        cell.start(node)
    return cell


def test_nodes_that_know_one_address_find_each_other_within_two_seconds() -> None:
    cell = started(40, loss=0.1, seeds=1)
    cell.run(2.5)
    assert cell.converged() == (True, "")


def test_a_death_is_known_everywhere_within_silence_and_a_tick() -> None:
    cell = started(20, loss=0.1)
    cell.run(3.0)
    cell.crash(4)
    cell.run(2.5)
    assert cell.shown_by(4) == 19 and cell.known_after(4) == -1
    cell.run(0.8)
    assert cell.shown_by(4) == 0 and 2.5 < cell.known_after(4) <= 3.2


def test_nodes_that_stand_still_are_marked_and_mark_nobody() -> None:
    cell = started(30, loss=0.1)
    cell.run(3.0)
    for node in range(6):
        cell.stall(node, 16.0)
    cell.run(10.0)
    assert cell.shown_by(0) == 5, "by those that stand still as well"
    cell.run(16.0)
    assert cell.converged() == (True, "")
    assert cell.results["false_marks"] == 0 and cell.results["marks"] == 6 * 24


def test_when_many_fall_silent_at_once_a_node_waits_as_long_again() -> None:
    cell = started(20)
    cell.run(3.0)
    for node in range(8):
        cell.crash(node)
    cell.run(5.0)
    assert cell.shown_by(0) == 12, "it may be this node that is cut off"
    cell.run(2.0)
    assert cell.shown_by(0) == 0
    assert cell.counts["pardoned"] == 8 * 12


def test_a_partition_that_outlasts_all_memory_heals() -> None:
    cell = started(16, loss=0.1, changes_per_s=20.0, settings={"purge_s": 10.0})
    cell.run(3.0)
    for a in range(8):
        for b in range(8, 16):
            cell.cut(a, b)
            cell.cut(b, a)
    cell.run(60.0)
    assert set(cell.alive_by_node) == {7}
    cell.heal()
    cell.set_changes_per_s(0.0)
    cell.run(10.0)
    assert cell.converged() == (True, "")


def test_a_restored_node_takes_a_later_epoch() -> None:
    cell = started(6, whole_sets=True)
    cell.run(3.0)
    for _ in range(3):
        cell.crash(2)
        cell.run(5.0)
        cell.start(2)
        cell.run(2.0)
    cell.restore(2)
    cell.write(2, 50)
    cell.run(2.0)
    assert not cell.converged()[0], "the later life was alive a moment ago"
    cell.run(8.0)
    assert cell.converged() == (True, "") and cell.counts["renewals"] == 1


def test_a_member_table_that_is_full_of_the_living_takes_nobody_else() -> None:
    cell = started(12, settings={"members_max": 5})
    cell.run(10.0)
    assert max(cell.alive_by_node) <= 5 and cell.counts["full"] > 0
    assert cell.results["violations"] == []
