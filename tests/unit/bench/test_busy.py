"""``p2pkv bench busy`` with a scene that needs no engine: the order of things, and the claims."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest

from p2pkv.bench import busy


class Pulled(NamedTuple):
    ttft_s: float = 0.5
    prompt_tokens: int = 4096
    from_peer_tokens: int = 4096
    right: bool = True


@dataclass
class Fake:
    """Notes what is asked of it; pulls while busy take ``busy_s``."""

    busy_s: float = 0.6
    dead_tokens: int = 4096
    wrong_at: int = -1
    did: list[str] = field(default_factory=list)
    pulls: int = 0
    state: str = "idle"

    def fill(self, prompts: int) -> None:
        self.did.append(f"fill {prompts}")

    def pull(self) -> Pulled:
        self.did.append("pull")
        self.pulls += 1
        return Pulled(
            ttft_s=self.busy_s if self.state == "busy" else 0.5,
            from_peer_tokens=self.dead_tokens if self.state == "dead" else 4096,
            right=self.pulls - 1 != self.wrong_at,
        )

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        self.state = "busy"
        yield
        self.state = "prefilling"

    def rest(self) -> None:
        self.state = "idle"
        self.did.append("rest")

    def stop(self) -> None:
        self.state = "stopped"
        self.did.append("stop")

    def kill(self) -> None:
        self.state = "dead"
        self.did.append("kill")


def test_idle_is_measured_on_both_sides_of_busy_and_death_comes_last() -> None:
    scene = Fake()
    measured = busy.run(scene, quick=True)
    assert [row.source for row in measured.rows if isinstance(row, busy.BusyPull)] == [
        "idle", "busy", "busy", "idle", "stopped", "dead",
    ]  # fmt: skip
    assert scene.did == ["fill 6", *["pull"] * 3, "rest", "pull", "stop", "pull", "kill", "pull"]
    assert measured.ok


@pytest.mark.parametrize(
    ("scene", "broken"),
    [
        (Fake(busy_s=0.8), "busy.ttft_over_idle"),
        (Fake(dead_tokens=3840), "busy.dead.pulled"),
        (Fake(wrong_at=2), "busy.wrong_answers"),
    ],
)
def test_each_claim_fails_by_itself(scene: Fake, broken: str) -> None:
    measured = busy.run(scene, quick=True)
    assert [claim.id for claim in measured.claims if not claim.ok] == [broken]
