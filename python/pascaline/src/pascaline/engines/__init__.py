"""Engines behind one interface: command line, environment, probes, progress counters."""
