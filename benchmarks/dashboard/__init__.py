"""`python -m benchmarks.dashboard`: asv's pages behind a front page for users, without internet."""
