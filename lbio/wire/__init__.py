"""What goes over connections: sockets, heads, bodies, streams."""
