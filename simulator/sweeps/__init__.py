"""Many runs: benchmarks of policies, random swarms, and what an operator's log tells of another fleet."""
