"""What was tried, by kind; a run of the tests prints it at its end."""

from __future__ import annotations

from collections import Counter

COUNTS: Counter[str] = Counter()
