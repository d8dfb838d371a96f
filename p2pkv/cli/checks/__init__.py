"""What ``p2pkv doctor`` looks at: small functions that each look at one thing and return a :class:`Check`.

They read the host and change nothing. Where they read it (``/proc``, ``/sys``, resource limits) is a parameter with the
real place as its default, so that a test can hand them another host.
"""

from p2pkv.cli.checks.base import Check, Group, Status, run_checks

__all__ = ["Check", "Group", "Status", "run_checks"]
