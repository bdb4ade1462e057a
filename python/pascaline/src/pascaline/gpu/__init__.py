"""NVML, read in a process that can be killed, and the Prometheus exporter over it."""
