"""Two independent ways to the same answer, for tests and for users."""
