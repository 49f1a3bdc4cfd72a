"""A fuzzer that knows the formats that xmag reads; benchmarks/fuzz.py runs it."""
