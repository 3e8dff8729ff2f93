"""Speed of numbakern against a copy of the same array, and against the peers installed.

`python -m benchmarks` prints the table. `common` holds the cases with their bounds and the peers,
`startup` what a fresh process pays, `plot` draws the picture of the README from a JSON file.
The timing itself is `numbakern._roofline`, which `python -m numbakern` shares.
"""
