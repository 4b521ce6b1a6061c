"""Methods that papers compare single-path bit sharing with, in the same harness."""
