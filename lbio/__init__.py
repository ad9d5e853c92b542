"""The world around lbcore: sockets, HTTP/1.1, configuration files and the command line (anyio and h11)."""
