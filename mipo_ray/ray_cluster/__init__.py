"""All that knows Ray's state: resources, connection, nodes, waiting, and Ray Data's blocks."""
