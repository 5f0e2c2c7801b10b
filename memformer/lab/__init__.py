"""Instruments: costs, records, traces, the health of slots, benchmarks, and drawing."""
