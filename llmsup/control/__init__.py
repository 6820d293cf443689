"""The control plane: HTTP on a Unix socket, spoken by the daemon and the command line."""
