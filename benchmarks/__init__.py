"""Speed, error, memory and quality of fastmaf beside zuko, nflows and flowjax; run ``python -m benchmarks --help``."""
