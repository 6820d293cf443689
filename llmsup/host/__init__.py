"""One outside thing a file: processes, ports, probes, logs. No policy."""
