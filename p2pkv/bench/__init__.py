"""``p2pkv bench``: what this project promises, measured on the machine at hand, beside what the machine itself can do.

Every benchmark starts real agents in processes of their own and is a real client of theirs; a limit (memcpy, raw TCP,
raw NIXL) is measured interleaved with what it limits. On top of everything but the command line: nothing imports it.
"""
